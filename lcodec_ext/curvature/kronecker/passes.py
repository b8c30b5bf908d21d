"""Two passes over the data: second moments of inputs and gradients, then eigenvalues."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, NoSamplesError
from lcodec_ext._torch.group import AnyRanks, Ranks
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.padding import counted_in
from lcodec_ext.curvature.kronecker.factors import BlockFactors, KroneckerFactors
from lcodec_ext.curvature.kronecker.outputs import Seeds
from lcodec_ext.curvature.kronecker.plan import BlockPlan, Lookup, Outer, plan_blocks
from lcodec_ext.curvature.masked.model import ForwardPass
from lcodec_ext.curvature.masked.rows import RowsCall
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import has_factors
from lcodec_ext.curvature.routes.sharded import n_of_all

LARGEST = 8192  # rows or columns of a block up to which their eigenvectors are computed
_BYTES = 2**25  # of the gradients, or patches, of some samples in one block


@dataclass(frozen=True)
class Reached:
    """What a backward pass brings to a block: to its calls, or to its parameter itself."""

    plan: BlockPlan
    n: int
    calls: Sequence[RowsCall]
    reached: Sequence[Tensor]  # of each call; without calls of the parameter, sample by sample
    first: bool  # whether it is the first backward pass of its batch
    words: Sequence[Tensor]  # which places of its texts are no padding, each of shape (n, length)

    def parts(self, cells: int = 1) -> Iterator[list[Outer | Lookup]]:
        """What the calls add to the gradients of consecutive samples.

        As many samples at once as fit in the memory for some, with so many numbers, or inputs of
        all positions, each.
        """
        if not self.calls:
            return
        positions = max(
            each[0].numel() // max(1, each.shape[call.axis])
            for call, each in zip(self.calls, self.reached, strict=True)
        )
        cells = max(cells, self.plan.places.shape[1] * max(1, positions))
        step = max(1, _BYTES // (self.reached[0].element_size() * cells))
        for start in range(0, self.n, step):
            samples = slice(start, min(start + step, self.n))
            yield [
                self.plan.part(call, reached, samples, self.n, self._counted(call))
                for call, reached in zip(self.calls, self.reached, strict=True)
            ]

    def _counted(self, call: RowsCall) -> Tensor | None:
        """Which positions of a call are no padding, shape (n, positions); None where all may be."""
        found = [mask for mask in self.words if mask.shape == call.input.shape[:2]]
        return torch.stack(found).any(0) if found else None

    def dense(self) -> Tensor:
        """Gradients of samples, shape (n, r, D)."""
        if not self.calls:  # of its parameter, which each sample has for itself
            return self.reached[0].reshape(self.n, *self.plan.places.shape)
        return self.plan.dense(self.calls, self.reached)


class Sweep:
    """Forward passes over all samples, and from each the backward passes.

    Attributes
    ----------
    plans : list of BlockPlan
        After the first batch.
    whole : list of str
        Parameters whose whole gradient is formed, then.
    by_sample : bool
        Whether samples are passed one by one: some layer or parameter has no axis of samples.
    """

    def __init__(self, objective: Objective, seeds: Seeds) -> None:
        self._objective, self._seeds = objective, seeds
        self.by_sample = False
        self.plans: list[BlockPlan] = []
        self.whole: list[str] = []

    def __call__(self, what: str) -> Iterator[Reached]:
        """What reaches each block, backward pass by backward pass."""
        for _, batch in self._objective.passes(what):
            if not self.plans:
                self._prepare(batch)
            yield from self._of(batch)

    def _prepare(self, batch: Batch) -> None:
        """Plan the blocks by the first batch, and check its loss."""
        objective = self._objective
        run = objective.run(batch)
        with twice_differentiable():
            objective.check_cut(run.outputs, batch)
            objective.check_plain(
                run.outputs, batch, 1, "since gradients of single samples are taken"
            )
        self._spread(run, batch)
        self.plan([])

    def plan(self, whole: Sequence[str]) -> None:
        """Plan the blocks, with parameters of which other ranks form the whole gradient."""
        masked = self._objective.masked
        for name in whole:
            if name not in masked.whole:
                masked.displace_whole(name, "other ranks do")
        self.plans, self.whole = plan_blocks(masked), sorted(masked.whole)

    def _spread(self, run: ForwardPass, batch: Batch) -> None:
        """Give every sample its own of what all share, positions for instance, if that works."""
        masked, n = self._objective.masked, batch.size
        names = {
            name
            for name in masked.whole
            if masked.base[name].shape[:1] == (1,)
            and masked.entries[name].shape == (masked.base[name].numel(),)
        }
        shared = any(call.value.shape[:1] == (1,) for call in run.calls)
        if n == 1 or not (names or shared) or masked.whole.keys() != names:
            return
        masked.spread = names
        try:
            apart = self._objective.run(batch)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            apart = None
        tolerance = 1e-3 if masked.dtype == torch.float32 else 1e-8
        if apart is None or not _close(run.values, apart.values, tolerance):
            masked.spread = None

    def _of(self, batch: Batch) -> Iterator[Reached]:
        objective, n = self._objective, batch.size
        key = (0, int(n > 1))  # the first batch of several samples tells
        if n > 1 and objective.factored.get(key) is False:
            for i in range(n):
                yield from self._of(batch.part(slice(i, i + 1)))
            return
        run = objective.run(batch)
        objective.check_ignored(run.outputs, batch)
        if sorted(objective.masked.whole) != self.whole:
            later = sorted(set(objective.masked.whole).difference(self.whole))
            raise ValueError(
                f"the model uses the parameters {later} outside of their layers for some batches "
                "only; put a batch for which it does first"
            )
        with twice_differentiable():
            apart = has_factors(objective, run, batch, key)
        if not apart and n > 1:
            self.by_sample = True
            for i in range(n):
                yield from self._of(batch.part(slice(i, i + 1)))
            return
        config = getattr(objective.masked.model, "config", None)
        told = batch.named(objective.masked.model)
        words = counted_in(told, bool(getattr(config, "is_encoder_decoder", False)))
        wanted: list[tuple[BlockPlan, list[RowsCall], list[Tensor]]] = []
        displacements = dict(zip(objective.masked.entries, run.displacements, strict=True))
        for plan in self.plans:
            calls = [call for call in run.calls if call.rows.parameter == plan.parameters[0]]
            at = [call.value for call in calls]
            if plan.parameters[0] in (objective.masked.spread or ()) or (
                plan.is_diagonal and not apart
            ):
                calls, at = [], [displacements[plan.parameters[0]]]
            if at:
                wanted.append((plan, calls, at))
        at = [each for _, _, some in wanted for each in some]
        for number, (values, seeds) in enumerate(self._seeds.of(objective, run, told)):
            reached = list(_back(values, at, seeds))
            for plan, calls, some in wanted:
                own, reached = reached[: len(some)], reached[len(some) :]
                yield Reached(plan, n, calls, own, number == 0, words)


def _close(before: Sequence[Tensor], after: Sequence[Tensor], tolerance: float) -> bool:
    """Whether outputs are the same up to rounding."""
    return len(before) == len(after) and all(
        a.shape == b.shape and bool((a - b).norm() <= tolerance * a.norm())
        for a, b in zip(before, after, strict=True)
    )


def _back(values: list[Tensor], at: list[Tensor], seeds: list[Tensor]) -> Sequence[Tensor]:
    with twice_differentiable():
        return torch.autograd.grad(values, at, seeds, retain_graph=True, materialize_grads=True)


class Moments:
    """Second moments of one block: of the inputs, and of what reaches its rows."""

    def __init__(self, plan: BlockPlan, like: Tensor) -> None:
        r, D = plan.places.shape
        self._plan = plan
        full = 1 < r <= LARGEST and plan.outer and not plan.lookup
        self._rows = like.new_zeros(r, r) if full else None
        full = 1 < D <= LARGEST
        self._inputs = like.new_zeros(D, D) if full and plan.outer else None
        self._looked_up = like.new_zeros(D, D) if full and plan.lookup else None
        self._total = like.new_zeros(2, dtype=torch.float64)  # of g^T g, and positions

    def sums(self) -> list[Tensor]:
        """What is added up over samples."""
        found = [self._rows, self._inputs, self._looked_up, self._total]
        return [t for t in found if t is not None]

    def add(self, back: Reached) -> None:
        """Add what a backward pass brings."""
        for parts in back.parts():
            for part in parts:
                self._add(part, back.first)

    def _add(self, part: Outer | Lookup, first: bool) -> None:
        g = part.g.flatten(0, 1)
        if isinstance(part, Lookup):
            if self._looked_up is not None:
                self._looked_up.addmm_(g.T, g)
            return
        self._total[0] += g.square().sum(dtype=torch.float64)
        if self._rows is not None:
            self._rows.addmm_(g.T, g)
        if first:
            counted = part.counted
            self._total[1] += len(g) if counted is None else counted.sum()
            if self._inputs is not None:
                x = part.x.flatten(0, 1) if counted is None else part.x[counted]
                self._inputs.addmm_(x.T, x)

    def basis(self) -> BlockFactors:
        """The block with the eigenvectors of these moments, and eigenvalues of zero."""
        rows, row_values = eigenvectors(self._rows)
        inputs = self._inputs
        if inputs is not None and self._looked_up is not None:  # tied: the sum over rows of both
            share = float(self._total[0]) / max(1.0, float(self._total[1]))
            inputs = inputs * share + self._looked_up
        columns, _ = eigenvectors(self._looked_up if inputs is None else inputs)
        shape = self._plan.places.shape
        values = self._total.new_zeros(shape)
        return BlockFactors(
            self._plan.parameters, self._plan.places, rows, row_values, columns, values
        )


def eigenvectors(matrix: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Eigenvectors and eigenvalues of a positive matrix, computed in float64."""
    if matrix is None:
        return None, None
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors.to(matrix.dtype), values.clamp(min=0).to(matrix.dtype)


def add_squares(block: BlockFactors, back: Reached) -> None:
    """Add the squares of the samples' gradients in the basis of a block."""
    plan, values = back.plan, block.values
    r, D = plan.places.shape
    if plan.is_diagonal:
        values += back.dense().square().sum(0)
        return
    for parts in back.parts(r * D if plan.outer else D):
        if len(parts) == 1 and isinstance(parts[0], Outer) and parts[0].g.shape[1] == 1:
            g, x = _rotated(block, parts[0])
            values += g[:, 0].square().T @ x[:, 0].square()
        elif plan.outer:
            values += _gradients(block, parts).square().sum(0)
        else:
            _add_looked_up(block, parts)


def _rotated(block: BlockFactors, part: Outer) -> tuple[Tensor, Tensor]:
    g = part.g if block.rows is None else part.g @ block.rows
    return g, part.x if block.columns is None else part.x @ block.columns


def _gradients(block: BlockFactors, parts: list[Outer | Lookup]) -> Tensor:
    """Gradients of samples in the basis, shape (n, r, D)."""
    r = block.places.shape[0]
    total: Tensor | None = None
    for part in parts:
        if isinstance(part, Lookup):
            own = _looked_up(part, r)
            if block.columns is not None:
                own = own @ block.columns
        elif part.g.shape[1] < r:
            g, x = _rotated(block, part)
            own = g.transpose(1, 2) @ x
        else:
            own = part.g.transpose(1, 2) @ part.x
            own = own if block.rows is None else block.rows.T @ own
            own = own if block.columns is None else own @ block.columns
        total = own if total is None else total + own
    assert total is not None
    return total


def _looked_up(part: Lookup, r: int) -> Tensor:
    n, _, D = part.g.shape
    row = torch.arange(n, device=part.g.device)[:, None] * (r + 1) + part.place
    sums = part.g.new_zeros(n * (r + 1), D).index_add_(0, row.flatten(), part.g.flatten(0, 1))
    return sums.reshape(n, r + 1, D)[:, :-1]


def _add_looked_up(block: BlockFactors, parts: list[Outer | Lookup]) -> None:
    """Squares of what each sample brings to each row that it looks up; others are zero."""
    r, D = block.places.shape
    keys, rows = [], []
    for part in parts:
        assert isinstance(part, Lookup)
        n = len(part.g)
        sample = torch.arange(n, device=part.g.device)[:, None] * (r + 1)
        keys.append((sample + part.place).flatten())
        rows.append(part.g.flatten(0, 1))
    key, g = torch.cat(keys), torch.cat(rows)
    kept = key % (r + 1) < r
    which, inverse = torch.unique(key[kept], return_inverse=True)
    sums = g.new_zeros(len(which), D).index_add_(0, inverse, g[kept])
    if block.columns is not None:
        sums = sums @ block.columns
    block.values.index_add_(0, which % (r + 1), sums.square().to(block.values.dtype))


def collect(
    ranks: AnyRanks, objective: Objective, seeds: Seeds, basis: KroneckerFactors | None
) -> tuple[KroneckerFactors, bool]:
    """The factors of an objective's samples, and whether samples were passed one by one.

    In a basis of their own, or in a given one. Samples may be spread over ranks.
    """
    sweep, masked = Sweep(objective, seeds), objective.masked
    if basis is None:
        moments: dict[str, Moments] = {}
        with _alone(ranks, "the Kronecker factors of a rank's own samples"):
            for back in sweep("Kronecker factors"):
                moments = moments or _moments(sweep, masked.zeros(0))
                if not back.plan.is_diagonal:
                    moments[back.plan.parameters[0]].add(back)
        _plan_as_others(ranks, sweep)
        moments = moments or _moments(sweep, masked.zeros(0))
        _add_up(ranks, "the Kronecker factors", [t for m in moments.values() for t in m.sums()])
        blocks = {}
        for name in list(moments):
            with ranks.alone("the eigenvectors"):
                block = moments.pop(name).basis()
            blocks[name] = block.changed(ranks.as_first)
    else:
        given = basis.to(masked.device, masked.dtype).blocks
        blocks = {b.parameters[0]: replace(b, values=torch.zeros_like(b.values)) for b in given}
    with _alone(ranks, "the eigenvalues of a rank's own samples"):
        for back in sweep("corrected eigenvalues"):
            own = blocks.get(back.plan.parameters[0])
            if own is None or own.places.shape != back.plan.places.shape:
                raise ValueError(
                    "basis must be of the same model and selection; it has no block of the "
                    f"{back.plan.places.shape[0]:,} rows of {back.plan.parameters[0]!r}"
                )
            add_squares(own, back)
    _add_up(ranks, "the eigenvalues", [block.values for block in blocks.values()])
    n = n_of_all(ranks, objective) if isinstance(ranks, Ranks) else objective.n_samples
    of = seeds.kind, seeds.seed, seeds.draws, tuple(blocks.values())
    return KroneckerFactors(masked.size, n, *of), sweep.by_sample


def _moments(sweep: Sweep, like: Tensor) -> dict[str, Moments]:
    return {plan.parameters[0]: Moments(plan, like) for plan in sweep.plans}


@contextmanager
def _alone(ranks: AnyRanks, what: str) -> Iterator[None]:
    """Work of one rank, which may have no samples where others have some."""
    with ranks.alone(what), suppress(*((NoSamplesError,) if isinstance(ranks, Ranks) else ())):
        yield


def _plan_as_others(ranks: AnyRanks, sweep: Sweep) -> None:
    """Plan the blocks on a rank without samples, and check that ranks have the same ones."""
    if not isinstance(ranks, Ranks):
        return
    told = ranks.gather_bytes(json.dumps(sweep.whole).encode() if sweep.plans else b"")
    with ranks.alone("the blocks"):
        found = {each for each in told if each}
        if len(found) != 1:
            raise ValueError(
                "ranks must use parameters within the same layers"
                if found
                else "data is empty on every rank of the group: it has no batch"
            )
        sweep.plan(json.loads(found.pop()))


def _add_up(ranks: AnyRanks, what: str, sums: Sequence[Tensor]) -> None:
    """Add what ranks have, in place."""
    if isinstance(ranks, Ranks):
        for own, total in zip(sums, ranks.total(what, lambda: sums, sums), strict=True):
            own.copy_(total)
