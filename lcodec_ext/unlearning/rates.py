"""How long passes take on this machine, timed on a few samples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._torch.modes import clock
from lcodec_ext._torch.samples import Samples, outputs_of
from lcodec_ext.curvature import Selection, UnitSelection
from lcodec_ext.curvature.solvers import Krylov, conjugate_gradient
from lcodec_ext.dependence import lfoci
from lcodec_ext.unlearning.record import record
from lcodec_ext.unlearning.step import OPERATORS, in_krylov_space
from lcodec_ext.unlearning.workload import FactorBlock, Graphs, Phase, Sizes, Workload
from lcodec_ext.unlearning.workplace import Workplace

_ENOUGH = 0.02  # seconds of a run, after which no more samples are taken
_GROWTH = 4  # of the samples from one run to the next
_LONG, _VERY_LONG = 0.05, 1.0  # seconds, after which a run is repeated once, and never
_FEW = 16  # samples of a run, fewer of which count only where they are slow
_COORDINATES = 16_000  # of vectors that are timed, at most
_TIMED_ITERATIONS = 8
_TRIED = 16  # samples and perturbations that are recorded, units that are selected from
_SIDE = 256  # of a matrix whose eigenvectors are timed
_STEPS = 8  # of L-FOCI, where nothing says how many


@dataclass(frozen=True)
class Rate:
    """Seconds of a batch, and of each sample in it."""

    batch: float
    sample: float

    def of(self, times: int, n: int, batch_size: int) -> float:
        """Of n samples in batches, as often as said."""
        return times * (-(-n // batch_size) * self.batch + n * self.sample) if n else 0.0


@dataclass(frozen=True)
class Rates:
    """What was timed.

    `products` are with one column. `solve` is what an iteration costs without its product: seconds,
    and seconds a coordinate and column; of Lanczos' iteration for each vector in its basis.
    `basis` is what the eigenvectors of all Kronecker factors take, and `rotated` a multiplication
    with them.
    """

    passes: Mapping[str, Rate]  # forward, gradient, graphs, products
    solve: Rate
    graphs: Graphs
    activations: Graphs
    perturbation: Rate | None = None  # of one, of all its samples
    selection: float = 0.0  # seconds
    basis: float = 0.0  # seconds
    rotated: float = 0.0  # seconds of a multiply-add

    def seconds(self, work: Workload, phase: Phase) -> float:
        """Of a phase."""
        size = phase.batch_size or work.settings.batch_size
        total = 0.0
        for kind, rate in self.passes.items():
            if phase.name == "perturbation" and self.perturbation is not None:
                rate = self.perturbation
            total += sum(rate.of(times, n, size) for times, n in getattr(phase, kind))
        each = work.columns * work.sizes.p
        if work.method == "lanczos":
            each *= work.columns * work.iterations
        total += phase.solves * (self.solve.batch + each * self.solve.sample)
        total += phase.bases * self.basis + phase.rotated * self.rotated
        return total + phase.selections * self.selection


def timed(
    work: Workplace, selection: Selection, source: Samples, request: Samples, sizes: Sizes
) -> Rates:
    """Time passes over the first samples of a source, and what the settings select by."""
    settings = work.settings
    most = min(len(source), settings.batch_size)
    some = source.subset(range(most)).loaded()
    forward = _fitted(work, some, lambda samples: [lambda: work.mean_loss(samples)])
    gradient = _fitted(work, some, lambda samples: [lambda: work.gradient(samples)])
    passes = {"forward": forward[0], "gradient": gradient[0]}
    graphs = Graphs(0.0, 0.0)
    if settings.update != "gradient" and settings.curvature not in ("secant", "ekfac"):
        built = _Built(work, selection)
        passes["graphs"], passes["products"] = _fitted(work, some, built.calls, built.fits)
        graphs = _line(built.n_bytes)
    rates = Rates(passes, _solve_rate(work, sizes.p), graphs, activations_of(work, some))
    if sizes.blocks:
        rates = replace(rates, basis=_basis_seconds(work, sizes.blocks), rotated=_rotated(work))
    if settings.selection in ("lfoci", "cheap"):
        rates = replace(rates, perturbation=_recorded(work, request), selection=_selected(work))
    return rates


def _fastest(work: Workplace, call: Callable[[], object]) -> float:
    """Seconds of the fastest of two or three calls: the first one of a shape sets things up."""
    found: list[float] = []
    while not found or (sum(found) < _VERY_LONG and len(found) < (2 if sum(found) > _LONG else 3)):
        begin = clock(work.model)
        call()
        found.append(clock(work.model) - begin)
    return min(found)


def _fitted(
    work: Workplace,
    samples: Samples,
    calls: Callable[[Samples], list[Callable[[], object]]],
    fits: Callable[[int], bool] = lambda size: True,
) -> list[Rate]:
    """Seconds of a batch and of a sample in it, from the least and the most that were tried."""
    for call in calls(samples.subset([0]).loaded()):
        call()  # the first one of a process loads what it needs, which may take a second
    found: list[tuple[int, list[float]]] = []
    size = min(_GROWTH, len(samples))
    while True:
        tried = calls(samples.subset(range(size)).loaded())
        found.append((size, [_fastest(work, call) for call in tried]))
        last = sum(found[-1][1])
        if size == len(samples) or last > (_ENOUGH if size >= _FEW else _VERY_LONG):
            break
        size = min(_GROWTH * size, len(samples))
        if not fits(size):
            break
    if len(found) == 1 and found[0][0] > 1:
        found.insert(0, (1, [_fastest(work, call) for call in calls(samples.subset([0]).loaded())]))
    if len(found) == 1:
        return [Rate(0.0, seconds) for seconds in found[0][1]]
    (n, before), (m, after) = found[0], found[-1]
    samples_rate = [max(0.0, (b - a) / (m - n)) for a, b in zip(before, after, strict=True)]
    return [Rate(max(0.0, b - m * rate), rate) for b, rate in zip(after, samples_rate, strict=True)]


class _Built:
    """Operators of a few samples, and the memory of their graphs."""

    def __init__(self, work: Workplace, selection: Selection) -> None:
        self._work, self._selection = work, selection
        self._vector: Tensor | None = None
        self.n_bytes: dict[int, int] = {}

    def _operator(self, samples: Samples) -> Any:
        settings = self._work.settings
        operator: Any = OPERATORS[settings.curvature](
            self._work.model,
            self._work.loss_fn,
            samples.data(settings.batch_size),
            self._selection,
            dtype=self._work.dtype,
        )
        self.n_bytes[len(samples)] = operator.graph_bytes
        return operator

    def fits(self, size: int) -> bool:
        """Whether graphs of so many samples, and a product with them, take half of max_memory."""
        most, known = self._work.settings.max_memory, max(self.n_bytes)
        return most is None or 4 * self.n_bytes[known] * size / known <= most

    def calls(self, samples: Samples) -> list[Callable[[], object]]:
        """To build one, and to multiply with it."""
        made: list[Any] = []

        def build() -> None:
            made[:] = [self._operator(samples)]

        def multiply() -> None:
            operator = made[0]
            if self._vector is None:
                size, dtype, device = operator.shape[0], operator.dtype, operator.device
                self._vector = torch.ones(size, dtype=dtype, device=device)
            _ = operator @ self._vector

        return [build, multiply]


def _line(found: Mapping[int, float]) -> Graphs:
    if len(found) < 2:
        return Graphs(0.0, sum(found.values()) / max(1, sum(found)))
    few, many = min(found), max(found)
    sample = max(0.0, (found[many] - found[few]) / (many - few))
    return Graphs(max(0.0, found[few] - few * sample), sample)


def activations_of(work: Workplace, samples: Samples) -> Graphs:
    """Memory that a backward pass needs of the forward pass, by samples."""
    found: dict[int, float] = {}
    tensors = (*work.model.parameters(), *work.model.buffers())
    own = {t.untyped_storage().data_ptr() for t in tensors}
    for size in sorted({1, min(2, len(samples))}):
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = samples.fetch(range(size))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = work.loss_fn(outputs_of(work.model, batch), batch.targets)
        found[size] = sum(kept.values())
        del loss
    return _line(found)


def _solve_rate(work: Workplace, p: int) -> Rate:
    """What an iteration costs without its product, and each coordinate, column and vector in it."""
    settings, found = work.settings, []
    krylov = settings.calibrate or in_krylov_space(settings, False)
    columns = 1 + settings.control_groups if settings.calibrate else 1
    iterations = min(settings.max_iterations or 30, _TIMED_ITERATIONS if krylov else 4)
    generator = torch.Generator().manual_seed(0)
    for n in sorted({min(p, _COORDINATES // 32), min(p, _COORDINATES)}):
        b = torch.randn(n, columns, dtype=work.dtype, generator=generator).to(work.device)
        scale = torch.linspace(1, 2, n, dtype=work.dtype, device=work.device)[:, None]

        def solve(b: Tensor = b, scale: Tensor = scale) -> None:
            if krylov:
                Krylov(lambda V: scale * V, b, iterations)
                return
            options: dict[str, Any] = {"rtol": 0.0, "max_iterations": iterations, "describe": ""}
            conjugate_gradient(lambda V: scale[:, 0] * V, b[:, 0], **options)

        solve()
        found.append((n * columns * (columns * iterations if krylov else 1), _fastest(work, solve)))
    (n, before), (m, after) = found[0], found[-1]
    each = max(0.0, (after - before) / (m - n)) if m > n else 0.0
    return Rate(max(0.0, after - m * each) / iterations, each / iterations)


def _basis_seconds(work: Workplace, blocks: Sequence[FactorBlock]) -> float:
    """Of eigenvectors in float64, from those of one small matrix: their work is cubic."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=torch.float64, device=work.device).tril().add(1e-3)
    each = _fastest(work, lambda: torch.linalg.eigh(matrix)) / _SIDE**3
    return each * sum(b.rows**3 + b.columns**3 for b in blocks)


def _rotated(work: Workplace) -> float:
    """Of a multiply-add in a product of matrices."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=work.dtype, device=work.device)
    return _fastest(work, lambda: [matrix @ matrix for _ in range(4)]) / (4 * _SIDE**3)


def _recorded(work: Workplace, request: Samples) -> Rate:
    settings = work.settings
    some = request.subset(range(min(len(request), _TRIED)))

    def run() -> object:
        return record(
            work.model,
            some,
            work.loss_fn,
            n_perturbations=count,
            noise_std=settings.noise_std,
            perturb=settings.perturb,
            rows=settings.foci_rows,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )

    count = max(3, min(settings.n_perturbations, -(-settings.batch_size // len(some))))
    seconds = _fastest(work, run)
    return Rate(0.0, seconds / (count * len(some)))


def _selected(work: Workplace) -> float:
    """L-FOCI on random numbers of as many rows, and fewer units."""
    settings = work.settings
    rng = np.random.default_rng(0)
    units = len(UnitSelection.all(work.model))
    few = min(units, _TRIED)
    table = rng.standard_normal((settings.n_perturbations, few))
    steps = 1 if settings.selection == "cheap" else settings.n_units or _STEPS
    tried = min(2, few)
    seconds = _fastest(work, lambda: lfoci(table, table.sum(1), max_features=tried, stop=False))
    return seconds * units / few * math.ceil(steps / tried)
