"""What a deletion will cost, and settings that make it cost less."""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool
from lcodec_ext._files import json_ready
from lcodec_ext._progress import progress_line
from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.decay import with_decay
from lcodec_ext._torch.detours import autocasting
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.samples import outputs_of
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature import ParameterSelection, Selection, UnitSelection, all_trainable
from lcodec_ext.curvature.kronecker.passes import LARGEST
from lcodec_ext.curvature.layers import NORMS, is_linear
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.curvature.masked.rows import is_convolution
from lcodec_ext.unlearning.finish import ITERATIONS, form_of
from lcodec_ext.unlearning.limit import Limit
from lcodec_ext.unlearning.rates import Rates, activations_of, timed
from lcodec_ext.unlearning.request import Request, checked_request
from lcodec_ext.unlearning.rules import RULES
from lcodec_ext.unlearning.select import find_candidates, take
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.solutions import STEPS
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.workload import HISTORY, FactorBlock, Graphs, Sizes, Workload
from lcodec_ext.unlearning.workplace import Workplace

#: What is given up for max_seconds, budget and max_memory, in this order: caps on settings.
SACRIFICES: tuple[dict[str, int], ...] = (
    {"n_monitor": 64, "n_guard": 500, "n_recalibrate": 500},
    {"control_groups": 6},
    {"n_curvature": 128},
    {"control_groups": 4},
    {"finish": 10, "repair_epochs": 1},
    {"max_iterations": 20},
    {"n_guard": 250, "n_recalibrate": 250},
    {"finish": 5, "repair_epochs": 0},
    {"n_curvature": 64},
    {"max_iterations": 12, "retries": 1},
    {"finish": 0},
    {"n_guard": 100, "n_monitor": 32, "n_recalibrate": 100},
    {"max_iterations": 6},
    {"n_curvature": 32, "retries": 0},
    {"max_iterations": 4},
    {"n_curvature": 16},
    {"n_guard": 50, "n_monitor": 16, "n_recalibrate": 50},
    {"max_iterations": 2},
)
_ALL = ("n_guard", "n_monitor", "n_curvature", "max_iterations")  # of which None means no limit
_BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_GRAPH = 8  # times the activations that a backward pass keeps, of a graph for products at most
_CACHES = (2**29, 2**28, 2**27, 2**26, 2**25, 0)


@dataclass(frozen=True)
class Estimate:
    """What a deletion will cost on this machine, before it starts.

    Attributes
    ----------
    seconds : dict of str to float
        By phase, of what is computed in any case, and in "total".
    most_seconds : float
        With all that may be added: retries, further dampings, a finish, repair. `max_seconds`
        limits this.
    passes : dict of str to dict of str to int
        Samples by phase, as often as they are passed through the model: "forward"; "gradient",
        forward and back; "graphs", for products with the curvature; "products", times the columns
        that are multiplied.
    memory : dict of str to int
        Peak bytes in addition to the given model and data: copies of the "model",
        "gradients", "vectors" of the solver, "graphs" and "rows" that are kept, Kronecker
        "factors", a "batch", gaps in the "heap"; and their sum, the "peak".
    settings : Settings
        With what max_seconds, budget and max_memory lowered.
    chosen : dict of str to Any
        These settings; empty where nothing was lowered.
    notes : tuple of str
        What the figures take for granted.
    space_bytes : int, optional
        What max_memory leaves for the vectors of a calibration.
    history : int
        Pairs of vectors that L-BFGS keeps: fewer where memory is limited.
    """

    seconds: dict[str, float]
    most_seconds: float
    passes: dict[str, dict[str, int]]
    memory: dict[str, int]
    settings: Settings
    chosen: dict[str, Any]
    notes: tuple[str, ...] = ()
    space_bytes: int | None = None
    history: int = HISTORY

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found: dict[str, Any] = json_ready(values | {"settings": self.settings.to_dict()})
        return found

    def line(self) -> str:
        """In one line: seconds and memory, and what was lowered."""
        most = self.most_seconds
        more = f" (at most {_seconds(most)})" if most > 1.1 * self.seconds["total"] else ""
        lowered = ", ".join(f"{name}={value}" for name, value in self.chosen.items())
        return (
            f"about {_seconds(self.seconds['total'])}{more}, {_bytes(self.memory['peak'])}"
            + f"; {lowered}" * bool(lowered)
        )

    def __str__(self) -> str:
        lines = [f"{'phase':<14}{'seconds':>9}  passes over samples"]
        for phase, passes in self.passes.items():
            counts = ", ".join(f"{count:,} {kind}" for kind, count in passes.items())
            lines.append(f"{phase:<14}{self.seconds[phase]:>9.3g}  {counts}")
        lines.append(f"{'total':<14}{self.seconds['total']:>9.3g}  at most {self.most_seconds:.3g}")
        parts = [f"{_bytes(n)} {what}" for what, n in self.memory.items() if what != "peak"]
        lines.append(f"{'memory':<14}{_bytes(self.memory['peak']):>9}  {', '.join(parts)}")
        if self.chosen:
            lowered = ", ".join(f"{name}={value}" for name, value in self.chosen.items())
            lines.append(f"lowered to fit: {lowered}")
        return "\n".join([*lines, *self.notes])


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _bytes(n: int) -> str:
    return f"{n / 1e9:.2g} GB" if n >= 1e9 else f"{n / 1e6:.2g} MB"


@twice_differentiable()
def estimate(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    *,
    preset: str | Settings = "recommended",
    validation: Any = None,
    statistics: TrainingStatistics | None = None,
    score: Score | None = None,
    groups: Any = None,
    progress: bool = False,
    **options: Any,
) -> Estimate:
    """Say what `unlearn` will cost with the same arguments, without changing anything.

    A few samples are timed on this machine: forward, forward and back, and multiplied with the
    curvature; the rest is counting. It takes about as long as a few hundredths of the deletion.

    Parameters
    ----------
    model, forget, retain, loss_fn, preset, validation, statistics, score, groups, progress
    **options
        As `unlearn` takes them; no bar is shown.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError, TypeError
        As `unlearn` does for arguments that cannot be used; and if max_seconds, budget or
        max_memory are less than the smallest plan takes.

    Notes
    -----
    On a machine with nothing else to do the seconds are within a factor of two for the networks of
    the tests. Rules that select units ("lfoci", "cheap", and ranks) are not run: the cost of their
    steps is that of as many random units, or of all candidates.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.unlearning import estimate
    >>> x, y = torch.randn(100, 4, generator=torch.manual_seed(0)), torch.arange(100) % 3
    >>> model = torch.nn.Linear(4, 3)
    >>> loss_fn = torch.nn.functional.cross_entropy
    >>> found = estimate(model, (x[:5], y[:5]), (x[5:], y[5:]), loss_fn, damping=0.1)
    >>> found.passes["gradients"]
    {'gradient': 5}
    """
    begin = time.perf_counter()
    check_bool(progress, "progress")
    model = unwrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `unlearn` gives them
        settings, _ = resolve(
            preset,
            with_decay(options, model),
            retained=retain is not None,
            validation=validation is not None,
            statistics=statistics is not None,
        )
        work = Workplace.of(model, loss_fn, settings, score, False)
        work, request = checked_request(work, forget, retain, validation, statistics, groups)
    with autocasting(settings.autocast):
        setup, limit = time.perf_counter() - begin, Limit.of(settings, work.device)
        return _estimated(work, request, setup, settings.bounded, limit)


def planned(
    work: Workplace, request: Request, setup: float
) -> tuple[Workplace, Request, Estimate | None]:
    """The workplace and the request with settings that fit; an estimate, if anyone wants one.

    setup : seconds that went by before.
    """
    limit = Limit.of(work.settings, work.device)
    wanted = work.progress or work.settings.bounded
    if not wanted and (limit is None or _roomy(work, request, limit)):
        return work, request, None
    with work.timed("estimate"):
        found = _estimated(work, request, setup, True, limit)
    if not (wanted or found.chosen):
        return work, request, None
    progress_line(work.progress, f"unlearn: {found.line()}")
    if limit is not None and found.settings.max_memory is not None:
        warn(limit.told(found.chosen))
    work = replace(
        work,
        settings=found.settings,
        space_bytes=found.space_bytes,
        history=found.history,
    )
    work.give_back()
    if found.chosen:
        request = request.drawn_again(found.settings)
    return work, request, found


def _roomy(work: Workplace, request: Request, limit: Limit) -> bool:
    """Whether a deletion fits with all parameters selected and graphs as large as any.

    By a forward pass of two samples, in much less time than an estimate.
    """
    sizes = _sizes(work, request, None)
    source = request.forget if request.kept is None else request.kept.all
    activations = activations_of(work, source)
    graphs = Graphs(_GRAPH * activations.batch, _GRAPH * activations.sample)
    return Workload(work.settings, sizes, graphs).memory(activations)["peak"] <= limit.most


def _estimated(
    work: Workplace, request: Request, setup: float, planning: bool, limit: Limit | None
) -> Estimate:
    """limit : of memory, which settings have only where they do not fit otherwise."""
    begin = time.perf_counter()
    selection = _stand_in(work)
    sizes = _sizes(work, request, selection)
    if limit is not None:
        work = replace(work, settings=replace(work.settings, max_memory=limit.most))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = request.forget if request.kept is None else request.kept.all
        rates = timed(work, selection, source, request.forget, sizes)
    if planning:
        setup += time.perf_counter() - begin
    if limit is not None:
        free = replace(work.settings, max_memory=None)
        with contextlib.suppress(ValueError):  # in the time that is allowed
            found = _fitting(free, free, sizes, rates, setup, None)
            if found.memory["peak"] <= limit.most:
                return found
        return _fitting(free, work.settings, sizes, rates, setup, limit)
    return _fitting(work.settings, work.settings, sizes, rates, setup, None)


def _fitting(
    given: Settings,
    limited: Settings,
    sizes: Sizes,
    rates: Rates,
    setup: float,
    limit: Limit | None,
) -> Estimate:
    """The first of the plans for limited settings that fits, beside the given ones."""
    tried: list[Estimate] = []
    for settings in _plans(limited, sizes, rates.graphs):
        found = _of(settings, sizes, rates, setup)
        if fits(found):
            return replace(found, chosen=_changed(given, settings), notes=_notes(settings))
        tried.append(found)
    raise ValueError(_refusal(limited, tried, limit, sizes.bytes_each > 4))


def fits(found: Estimate) -> bool:
    """Whether an estimate is within the limits of its settings."""
    allowed, most = found.settings.seconds_allowed, found.settings.max_memory
    return found.most_seconds <= allowed and (most is None or found.memory["peak"] <= most)


def _plans(settings: Settings, sizes: Sizes, graphs: Graphs) -> Iterator[Settings]:
    """The settings, and lowered ones where they are limited.

    Small batches and few kept graphs come before a smaller Krylov space: they cost no accuracy.
    """
    if not settings.bounded:
        yield settings
        return
    caps: dict[str, int] = {}
    for sacrifice in ({}, *SACRIFICES):
        caps |= sacrifice
        lowered = _capped(settings, caps, sizes)
        batches = [n for n in _BATCHES if n < settings.batch_size]
        batches = [settings.batch_size, *(batches if settings.max_memory is not None else [])]
        kept = [n for n in _CACHES if n < settings.cache_bytes]
        kept = [settings.cache_bytes, *(kept if settings.max_memory is not None else [])]
        plans = [
            _as_planned(replace(lowered, batch_size=size, cache_bytes=cache), sizes, graphs)
            for size in batches
            for cache in kept
        ]
        yield from sorted(plans, key=lambda s: (-(s.max_iterations or 0), -s.control_groups))


def _as_planned(settings: Settings, sizes: Sizes, graphs: Graphs) -> Settings:
    """With the size that the Krylov space of a calibration gets within max_memory."""
    if not settings.calibrate:
        return settings
    plan = Workload(settings, sizes, graphs).plan
    lowered: dict[str, Any] = {}
    if plan.groups < settings.control_groups:
        lowered["control_groups"] = plan.groups
    if 0 < plan.steps < (settings.max_iterations or STEPS):
        lowered["max_iterations"] = plan.steps
    return replace(settings, **lowered) if lowered else settings


def _capped(settings: Settings, caps: Mapping[str, int], sizes: Sizes) -> Settings:
    """Lower what is larger than its cap; None counts as large where it means all."""
    lowered: dict[str, Any] = {}
    for name, cap in caps.items():
        if name in ("control_groups", "finish") and not settings.calibrate:
            continue
        value = getattr(settings, name)
        if name == "finish" and value is None:  # mini-batches are not made shorter
            how = form_of(None, sizes.n_retain, sizes.n_parameters)
            value = {"batches": 0 if cap else ITERATIONS, "L-BFGS": ITERATIONS, "": 0}[how]
        if name == "max_iterations" and settings.calibrate:
            value = value or STEPS
        if (value is None and name in _ALL) or (value is not None and value > cap):
            lowered[name] = cap
    if settings.update == "gradient" or settings.curvature == "ekfac":
        lowered.pop("max_iterations", None)
    return replace(settings, **lowered) if lowered else settings


def _of(settings: Settings, sizes: Sizes, rates: Rates, setup: float) -> Estimate:
    load = Workload(settings, sizes, rates.graphs)
    phases = list(load.phases())
    seconds: dict[str, float] = {"setup": setup}
    passes: dict[str, dict[str, int]] = {}
    most = setup
    for phase in phases:
        each = rates.seconds(load, phase)
        most += each
        if phase.certain:
            seconds[phase.name] = seconds.get(phase.name, 0.0) + each
            passes[phase.name] = phase.passes()
    seconds["total"] = sum(seconds.values())
    memory, space = load.memory(rates.activations), load.space_bytes
    return Estimate(
        seconds, most, passes, memory, settings, {}, space_bytes=space, history=load.history
    )


def _changed(before: Settings, after: Settings) -> dict[str, Any]:
    names = before.__dataclass_fields__
    return {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}


def _notes(settings: Settings) -> tuple[str, ...]:
    selection = settings.selection
    if not isinstance(selection, str) or RULES[selection].size == "given":
        return ()
    if selection == "step":
        return ("selection='step': the step on all candidates, and one as long on those it takes",)
    if RULES[selection].repeated:
        rounds = "n_units rounds" if settings.n_units else "one round; every further one costs more"
        return (f"selection={selection!r}: {rounds}",)
    if settings.n_units is None and settings.max_parameters is None:
        return (f"selection={selection!r}: a step on all candidates, its units are fewer",)
    return (f"selection={selection!r}: a step on as many random units",)


def _refusal(
    settings: Settings, tried: Sequence[Estimate], limit: Limit | None, double: bool
) -> str:
    """What a deletion would take at least."""
    allowed, most = settings.seconds_allowed, settings.max_memory

    def excess(found: Estimate) -> float:
        memory = 0.0 if most is None else found.memory["peak"] / most
        return max(found.most_seconds / allowed, memory)

    least = min(tried, key=excess)
    slow = least.most_seconds > allowed
    large = most is not None and least.memory["peak"] > most
    limits = []
    if slow:
        given = (
            f"max_seconds={settings.max_seconds:g}"
            if settings.max_seconds is not None
            else f"budget={settings.budget:g} of training_seconds={settings.training_seconds:g}"
        )
        limits.append(f"{given}: it takes up to {_seconds(least.most_seconds)}")
    if large:
        whose = f"max_memory={most:,}" if limit is None else str(limit)
        limits.append(f"{whose}: it takes {least.memory['peak']:,} bytes")
    lowered = ", ".join(f"{k}={v}" for k, v in _changed(settings, least.settings).items())
    slack = " (and a quarter more: it was timed just now)" * slow
    told = ", with max_memory" * (large and limit is not None)
    return (
        f"the smallest plan for this deletion ({lowered}) does not fit {' and '.join(limits)}. "
        f"Allow that much{slack}{told}, or select fewer parameters (selection, max_parameters)"
        + ", or compute in float32 (dtype=torch.float32)"
        * (double and large)
    )


def _stand_in(work: Workplace) -> Selection:
    """What a step changes, or as many random units where a rule selects them."""
    settings, selection = work.settings, work.settings.selection
    if isinstance(selection, ParameterSelection):
        return selection
    if (
        isinstance(selection, str)
        and selection in ("full", "step")
        and settings.candidates == "all"
    ):
        return all_trainable(work.model)
    candidates = find_candidates(work.model, settings)
    sized = settings.n_units is not None or settings.max_parameters is not None
    if not isinstance(selection, str) or not sized or RULES[selection].size == "given":
        return candidates.selection
    order = np.random.default_rng(0).permutation(len(candidates.units))
    ranked = [candidates.units[k] for k in order]
    if RULES[selection].repeated:
        ranked = ranked[:1]
    return take(ranked, candidates, settings, work.n_trainable)


def _sizes(work: Workplace, request: Request, selection: Selection | None) -> Sizes:
    """Of a request; without a selection as if all trainable parameters were selected."""
    samples = request.forget if request.kept is None else request.kept.all
    with torch.no_grad(), _positions(work.model) as positions:
        outputs = [*tensors_of(outputs_of(work.model, samples.fetch([0])))]
    modules = dict(work.model.named_modules())
    units = selection.units if isinstance(selection, UnitSelection) else {}
    layers = [modules.get(name) for name in units]
    statistics, settings = request.statistics, work.settings
    return Sizes(
        m=request.m,
        n_retain=request.n_retain,
        n_held=None if request.validation is None else len(request.validation),
        n_outputs=sum(t.numel() for t in outputs),
        p=work.n_trainable if selection is None else selection.layout(work.model).size,
        n_trainable=work.n_trainable,
        n_parameters=work.n_numbers,
        bytes_each=torch.finfo(work.dtype).bits // 8,
        batch_norm=any(isinstance(module, _BatchNorm) for module in modules.values()),
        retained=request.kept is not None,
        n_statistics=0 if statistics is None else statistics.n_parameters or 1,
        head=len(layers) == 1 and layers[0] is work.model and is_linear(layers[0]),
        known=not isinstance(settings.selection, str) or settings.selection == "full",
        blocks=_blocks(work.model, selection, positions) if settings.curvature == "ekfac" else (),
    )


@contextlib.contextmanager
def _positions(model: nn.Module) -> Iterator[dict[str, int]]:
    """How many positions the layers of a model have in what it is called with meanwhile."""
    found: dict[str, int] = {}

    def hook(name: str, module: nn.Module) -> RemovableHandle:
        def count(module: nn.Module, given: Any, outputs: Any) -> None:
            first = next(tensors_of(outputs), None)
            if first is not None and first.ndim > 1:
                channels = first.shape[1 if is_convolution(module) else -1]
                found[name] = found.get(name, 0) + first.numel() // max(1, channels)

        return module.register_forward_hook(count)

    handles = [
        hook(name, module)
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # it takes no hooks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _blocks(
    model: nn.Module, selection: Selection | None, positions: Mapping[str, int]
) -> tuple[FactorBlock, ...]:
    """The Kronecker-factored blocks, those of whole layers where units are not given."""
    modules = dict(model.named_modules())
    if isinstance(selection, UnitSelection):
        shapes = [(b.module, len(b.units), b.width) for b in UnitLayout(selection, model).blocks]
    else:
        shapes = [
            (name.rpartition(".")[0], len(p), p[0].numel() + 1)
            for name, p in model.named_parameters()
            if p.ndim > 1
        ]
    found = []
    for name, rows, columns in shapes:
        module = modules.get(name)
        if isinstance(module, NORMS):
            continue
        looked_up = isinstance(module, nn.Embedding)
        entries, count = rows * columns, positions.get(name, 1)
        rows = rows if rows <= LARGEST and not looked_up else 0
        columns = columns if columns <= LARGEST else 0
        found.append(FactorBlock(rows, columns, entries, count, looked_up))
    return tuple(found)
