"""What a deletion computes: passes over samples and memory, from its settings and sizes alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lcodec_ext._torch.decay import least_decay
from lcodec_ext.curvature.kronecker.outputs import ALL_COLUMNS
from lcodec_ext.curvature.solvers import Krylov
from lcodec_ext.unlearning.calibrate import TRIALS
from lcodec_ext.unlearning.control import measured
from lcodec_ext.unlearning.distil import BATCH, COPY, FOLLOW, HOLD
from lcodec_ext.unlearning.finish import ITERATIONS, MOST, form_of
from lcodec_ext.unlearning.guard import LENGTHS
from lcodec_ext.unlearning.request import GUARD_SIZE, control_pool
from lcodec_ext.unlearning.rules import RULES
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.solutions import Plan, plan_of
from lcodec_ext.unlearning.statistics import draws_of
from lcodec_ext.unlearning.step import FEW, in_krylov_space

FEW_ROWS = 2048  # of a matrix of low rank, which is solved in its rows
FORMED = 256  # coordinates up to which a matrix is formed
FORMED_FEW_OUTPUTS = 2048  # and one of which that costs less
_LIKELY_TRIALS = 5  # dampings whose losses are measured, of TRIALS + 1
_LIKELY_CG = 40  # iterations to the relative residual that is the default
_CG_VECTORS = 14  # of its iteration, and of a product
_HEAP = 0.1  # of all memory: gaps that the C library keeps between what is in use
HISTORY, _FEWEST_HISTORY = 10, 2  # pairs of vectors that L-BFGS keeps; where memory is limited
_SQUARE = 64  # multiply-adds that take as long as squaring a number and adding it to others
_LBFGS_VECTORS = 8  # that it has besides: weights, and gradients of its line search


class FactorBlock(NamedTuple):
    """A Kronecker-factored block, and what multiplications with its bases take."""

    rows: int  # that have eigenvectors; 0 where they have none, as those that are looked up
    columns: int
    entries: int  # of the matrix of parameters
    positions: int  # of a sample
    looked_up: bool = False

    @property
    def sides(self) -> int:
        """Numbers in its bases."""
        return self.rows**2 + self.columns**2

    @property
    def rotation(self) -> float:
        """Multiply-adds that take a vector to the basis, or back."""
        return self.entries * (self.rows + self.columns)

    def squares(self) -> float:
        """Multiply-adds, or what takes as long, of the squares of a sample's gradient."""
        each = self.positions * self.sides
        if self.looked_up:
            return each
        return min(each, self.rotation) + (self.positions + _SQUARE) * self.entries

    def moments(self) -> float:
        """Of the second moments of a sample's inputs and of what reaches its outputs."""
        return self.positions * self.sides


@dataclass(frozen=True)
class Sizes:
    """How large a request and its model are."""

    m: int  # samples to delete
    n_retain: int
    n_held: int | None  # validation samples
    n_outputs: int  # of a sample
    p: int  # selected parameters
    n_trainable: int
    n_parameters: int  # with buffers
    bytes_each: int  # of a number
    batch_norm: bool
    retained: bool = True  # whether there are retained samples
    n_statistics: int = 0  # coordinates of a matrix that was saved at training time
    head: bool = False  # whether rows of the layer that gives the outputs are kept, and no graphs
    known: bool = True  # whether the selection is known before any gradient
    blocks: tuple[FactorBlock, ...] = ()  # with curvature="ekfac"


@dataclass(frozen=True)
class Graphs:
    """Memory that graphs take: of a batch, and of each sample in it."""

    batch: float
    sample: float

    def of(self, n: int) -> float:
        """Of a batch of n samples."""
        return self.batch + self.sample * n


Pass = tuple[int, int]  # how often, over how many samples


@dataclass(frozen=True)
class Phase:
    """What a phase computes.

    `products` counts samples times columns. A phase that is not certain depends on what comes out:
    the finish of outliers, repeated attempts, a repair.
    """

    name: str
    forward: tuple[Pass, ...] = ()
    gradient: tuple[Pass, ...] = ()
    graphs: tuple[Pass, ...] = ()  # for products
    products: tuple[Pass, ...] = ()
    solves: int = 0  # iterations in which vectors are made orthogonal or added
    selections: int = 0  # by L-FOCI
    bases: int = 0  # of all Kronecker-factored blocks
    rotated: float = 0.0  # multiply-adds with these
    certain: bool = True
    batch_size: int = 0  # where it is not that of the settings

    def passes(self) -> dict[str, int]:
        """Samples by kind of pass."""
        kinds = ("forward", "gradient", "graphs", "products")
        found = {kind: sum(t * n for t, n in getattr(self, kind)) for kind in kinds}
        return {kind: count for kind, count in found.items() if count}


@dataclass(frozen=True)
class Workload:
    """All phases of a deletion with some settings."""

    settings: Settings
    sizes: Sizes
    graphs: Graphs
    kept: int = field(init=False)  # batches whose graphs are kept

    def __post_init__(self) -> None:
        s = self.settings
        whole = self.n_curvature // s.batch_size
        each = self.graphs.of(min(s.batch_size, self.n_curvature))
        fit = math.inf if each <= 0 else max(1, s.cache_bytes // max(1, int(each)))
        object.__setattr__(self, "kept", int(min(whole + 1, fit)))

    # Sizes -----------------------------------------------------------------------------------

    @property
    def newton(self) -> bool:
        """Whether a system is solved."""
        return self.settings.update != "gradient"

    @property
    def from_statistics(self) -> bool:
        """Whether curvature was saved at training time."""
        return self.sizes.n_statistics > 0

    @property
    def n_curvature(self) -> int:
        """Samples that a product reads."""
        s, most = self.sizes, self.settings.n_curvature
        if self.from_statistics:
            return s.m
        left = s.n_retain
        if self.settings.calibrate:
            left -= control_pool(s.n_retain, s.m, self.settings.control_groups)
        return max(1, left if most is None else min(most, left))

    @property
    def n_monitored(self) -> int:
        """Retained samples that losses and gradients are measured on."""
        if not self.sizes.retained:
            return 0
        read = self.sizes.n_retain if self.settings.calibrate else self.n_curvature
        most = self.settings.n_monitor
        return read if most is None else min(most, read)

    @property
    def n_guard(self) -> int:
        """Samples that the guard watches."""
        most = self.settings.n_guard
        held = self.sizes.n_held
        if held is None:
            held = min(GUARD_SIZE, self.sizes.n_retain)
        return held if most is None else min(held, most)

    @property
    def columns(self) -> int:
        """Of the Krylov spaces: the request and its control groups."""
        return 1 + self.plan.groups if self.settings.calibrate else 1

    @property
    def plan(self) -> Plan:
        """Of the Krylov space that calibrates."""
        return plan_of(self.settings, self.sizes.p, self.sizes.bytes_each, self.space_bytes)

    @property
    def space_bytes(self) -> int | None:
        """What max_memory leaves for the vectors of a calibration; None without a limit."""
        return self._left(self._beside_vectors()) if self.settings.calibrate else None

    def _left(self, taken: Mapping[str, float]) -> int | None:
        """What max_memory leaves; None without a limit."""
        most = self.settings.max_memory
        return None if most is None else max(0, int(most / (1 + _HEAP) - sum(taken.values())))

    @property
    def l_bfgs(self) -> bool:
        """Whether L-BFGS may finish."""
        s, z = self.settings, self.sizes
        return s.calibrate and form_of(s.finish, z.n_retain, z.n_parameters) == "L-BFGS"

    @property
    def history(self) -> int:
        """Pairs of vectors that L-BFGS keeps."""
        left, most = self._left(self._finishing(0)), min(HISTORY, self.settings.finish or HISTORY)
        if left is None:
            return most
        pairs = left // max(1, 2 * self.sizes.p * self.sizes.bytes_each)
        return min(most, max(_FEWEST_HISTORY, pairs))

    @property
    def method(self) -> str:
        """How the system is solved."""
        s, p = self.settings, self.sizes.p
        if not self.newton:
            return "none"
        if s.curvature == "ekfac":
            return "closed form"
        if s.calibrate or in_krylov_space(s, self.from_statistics):
            return "lanczos"
        if s.curvature == "secant":
            return "secant"
        if self.from_statistics:
            return "formed"
        few = s.curvature != "hessian" or self.sizes.head
        few = few and not isinstance(s.weight_decay, dict)  # one number on the diagonal
        if (
            s.damping + least_decay(s.weight_decay) > 0
            and few
            and self.rows <= min(FEW_ROWS, p - 1)
        ):
            kept = self.sizes.head or self.rows * p * self.sizes.bytes_each <= s.cache_bytes
            if kept:
                return "woodbury"
        if p <= (FORMED_FEW_OUTPUTS if self.sizes.head or s.curvature == "fisher" else FORMED):
            return "formed"
        return "cg"

    @property
    def rows(self) -> int:
        """Of the matrix as one of low rank."""
        outputs = 1 if self.settings.curvature == "fisher" else self.sizes.n_outputs
        return self.n_curvature * outputs

    @property
    def iterations(self) -> int:
        """Of a solve, at most."""
        most = self.settings.max_iterations
        if self.settings.calibrate:
            return self.plan.steps
        if self.method == "lanczos":
            return min(most or FEW, self.sizes.p)
        return most or min(10 * self.sizes.p, 1000)

    # Phases ----------------------------------------------------------------------------------

    def phases(self) -> Iterator[Phase]:
        """What is computed, in order."""
        s, z = self.settings, self.sizes
        parts = z.m if s.order == "sequential" else 1
        m = 1 if parts > 1 else z.m
        rounds = parts * self.rounds
        both = ((2, z.m), (2, self.n_monitored))
        yield Phase("monitoring", gradient=both)
        yield Phase("gradients", gradient=((rounds, m), *self._retained_gradients(rounds)))
        if s.selection in ("lfoci", "cheap"):
            yield Phase("perturbation", forward=((rounds, s.n_perturbations * m),))
            yield Phase("selection", selections=rounds)
        if s.max_drop is not None or s.repair_drop is not None:
            yield Phase("guard", forward=((2 + 2 * rounds, self.n_guard),))
        if s.calibrate:
            yield from self._calibration()
        else:
            yield from self._steps(rounds)
        yield from self._further(rounds)

    @property
    def rounds(self) -> int:
        """Selections of a repeated rule; the two steps of "step"."""
        selection = self.settings.selection
        if selection == "step":
            return 2
        repeated = isinstance(selection, str) and RULES[selection].repeated
        return self.settings.n_units or 1 if repeated else 1

    def _retained_gradients(self, rounds: int) -> tuple[Pass, ...]:
        s = self.settings
        if s.gradient == "residual":
            return ((rounds * s.steps, self.n_curvature),)
        return ((rounds * s.steps, self.n_curvature),) if s.steps > 1 else ()

    def _products(self, n: int, columns: int) -> dict[str, Any]:
        """n products with all columns: what they run forward again, and multiply."""
        size, total = self.settings.batch_size, self.n_curvature
        left = max(0, total - self.kept * size)
        return {"graphs": ((1, total), (n, left)), "products": ((n * columns, total),)}

    def _factors(self, count: int) -> dict[str, Any]:
        """Kronecker factors so often: two passes over the samples, one where the basis is known."""
        z = self.sizes
        n = z.m + z.n_retain if self.from_statistics else self.n_curvature
        each = draws_of(n, z.n_parameters) is None and z.n_outputs <= ALL_COLUMNS
        columns = z.n_outputs if each else 1
        passes = (1 if self.from_statistics else 2) * columns
        rotated = sum(block.squares() for block in z.blocks)
        if not self.from_statistics:
            rotated += sum(block.moments() for block in z.blocks)
        return {
            "gradient": ((count * passes, self.n_curvature),),
            "bases": 0 if self.from_statistics else count,
            "rotated": count * columns * self.n_curvature * rotated,
        }

    def _rotated(self, n: int) -> float:
        """Of n vectors that are taken to the basis, or back from it."""
        return n * sum(block.rotation for block in self.sizes.blocks)

    def _steps(self, rounds: int) -> Iterator[Phase]:
        s, z, count = self.settings, self.sizes, rounds * self.settings.steps
        method = self.method
        if method == "secant":
            yield Phase("curvature", gradient=((2 * count, self.n_curvature),))
        elif method == "closed form":
            yield Phase("curvature", **self._factors(count))
            yield Phase("solve", rotated=self._rotated(2 * count))
            if s.retries and s.max_drop is not None:
                yield Phase("retries", **self._factors(count * s.retries), certain=False)
        elif method in ("woodbury", "formed"):
            rows = self.sizes.n_outputs
            if method == "formed" and (s.curvature == "hessian" or z.head):
                yield Phase("solve", **_times(count, self._products(z.p, 1)))
            else:
                built = self._products(0, 1)["graphs"]
                found = ((count * rows, self.n_curvature),) if s.curvature != "fisher" else ()
                yield Phase("solve", gradient=found, graphs=built)
        elif method != "none":
            likely = self.iterations if s.max_iterations else min(self.iterations, _LIKELY_CG)
            solve = _times(count, self._products(likely + 1, 1))
            yield Phase("solve", **solve, solves=count * likely)
            if self.iterations > likely:
                n = count * (self.iterations - likely)
                more = self._products(n, 1) | {"graphs": ()}
                yield Phase("more iterations", **more, solves=n, certain=False)
            if s.retries and s.max_drop is not None:
                n = count * s.retries
                more = _times(n, self._products(self.iterations + 1, 1))
                yield Phase("retries", **more, solves=n * self.iterations, certain=False)

    def _solutions(self) -> dict[str, Any]:
        """Of a calibration: what its systems take at any damping."""
        if self.method == "closed form":
            found = self._factors(1)
            found["rotated"] += self._rotated(self.columns * (1 + _LIKELY_TRIALS))
            return found
        return self._products(self.iterations, self.columns) | {"solves": self.iterations}

    def _calibration(self) -> Iterator[Phase]:
        s, m = self.settings, self.sizes.m
        groups = self.columns - 1
        size = min(m, control_pool(self.sizes.n_retain, m, s.control_groups))
        most = measured(s)
        held = min(most, self.sizes.n_held or 0)
        kept = min(most // 2, control_pool(self.sizes.n_retain, m, s.control_groups))

        def losses(trials: int) -> tuple[Pass, ...]:
            return (trials * groups, min(size, most // groups)), (trials, held), (trials, kept)

        solve = self._solutions()
        solve["gradient"] = ((groups, size), *solve.get("gradient", ()))
        yield Phase("calibration", forward=losses(_LIKELY_TRIALS + 2), **solve)
        more = TRIALS + 1 - _LIKELY_TRIALS
        rotated = self._rotated(self.columns * more) if self.method == "closed form" else 0.0
        yield Phase("more dampings", forward=losses(more), rotated=rotated, certain=False)
        yield from self._finish(held, kept)

    def _finish(self, held: int, kept: int) -> Iterator[Phase]:
        """What follows a calibrated step or is tried in its place; more for outliers."""
        s, n = self.settings, self.sizes.n_retain
        how = form_of(s.finish, n, self.sizes.n_parameters)
        if not how:
            return
        yield Phase("finish", forward=((1, self.sizes.m), (2, held), (2, kept)))
        if how == "batches":
            held_back, led = (
                sum(each.batches(n) for each in some) * (BATCH + BATCH // 4)
                for some in ((HOLD,), (COPY, FOLLOW))
            )
            yield Phase("finish", gradient=((1, held_back),), batch_size=BATCH)
            yield Phase("finish", gradient=((1, led),), batch_size=BATCH, certain=False)
            return
        count = s.finish or ITERATIONS
        passes = ((round(1.25 * count), min(MOST, n)),)
        yield Phase("finish", gradient=passes, forward=((count, held),))

    def _further(self, rounds: int) -> Iterator[Phase]:
        s, z = self.settings, self.sizes
        if s.n_recalibrate and z.batch_norm:
            some = min(s.n_recalibrate, z.n_retain)
            yield Phase("recalibration", forward=((rounds, some),))
        if s.lengthen is not None and self.newton:
            some = min(GUARD_SIZE if s.n_guard is None else s.n_guard, z.n_retain)
            yield Phase("lengthening", forward=((1, some),))
            yield Phase("more lengths", forward=((LENGTHS, some),), certain=False)
        if s.repair_epochs:
            passes = ((s.repair_epochs * rounds, z.n_retain),)
            yield Phase(
                "repair",
                gradient=passes,
                certain=s.repair_drop is None,
                batch_size=s.repair_batch_size,
            )

    # Memory ----------------------------------------------------------------------------------

    def memory(self, activations: Graphs) -> dict[str, int]:
        """Bytes by purpose in the phase that takes the most, and "peak", their sum.

        activations : of a backward pass over a batch.
        """
        s, z = self.settings, self.sizes
        finishes = form_of(s.finish, z.n_retain, z.n_parameters) != ""
        largest = max(z.m, self.n_monitored, z.n_retain if finishes else 0)
        batch = activations.of(min(s.batch_size, max(1, largest)))
        backward = {
            "model": 2.0 * z.n_parameters * z.bytes_each,  # the one that moves, and the result
            "gradients": self._measured() + z.n_trainable * z.bytes_each + self._backward(),
            "batch": batch,
        }
        finish = self._finishing(self.history) | {"batch": batch} if self.l_bfgs else backward
        step = self._beside_vectors() | {"vectors": float(self._vectors())}
        if self.method == "closed form":
            step["batch"] = activations.of(min(s.batch_size, self.n_curvature))
        if self.method in ("woodbury", "formed") and s.curvature != "hessian":
            rows = FEW_ROWS * z.p if self.method == "woodbury" else 2 * z.p * z.p
            rows = min(self.rows * z.p, rows) if self.method == "woodbury" else rows
            step["rows"] = float(min(rows * z.bytes_each, s.cache_bytes))
            step["batch"] = activations.of(min(s.batch_size, self.n_curvature))
        found = max((backward, step, finish), key=lambda each: sum(each.values()))
        found["heap"] = _HEAP * sum(found.values())
        parts = {name: int(n) for name, n in found.items() if n}
        return parts | {"peak": sum(parts.values())}

    def _measured(self) -> float:
        """The gradient that stays until the selection is known."""
        return 0.0 if self.sizes.known else float(self.sizes.n_trainable * self.sizes.bytes_each)

    def _backward(self) -> float:
        """A gradient of many batches, and that of one."""
        return 2.0 * self.sizes.n_trainable * self.sizes.bytes_each

    def _finishing(self, history: int) -> dict[str, float]:
        """Memory of L-BFGS by purpose, in place of a step."""
        z = self.sizes
        p = z.p * z.bytes_each
        return {
            "model": float(z.n_parameters * z.bytes_each),
            "gradients": self._measured() + 2 * p + self._backward(),
            "vectors": float((_LBFGS_VECTORS + 2 * history) * p),
        }

    def _beside_vectors(self) -> dict[str, float]:
        """Memory of a step by purpose, without the vectors of its solver."""
        s, z = self.settings, self.sizes
        chosen = z.p * z.bytes_each
        found: dict[str, float] = {
            "model": 2.0 * z.n_parameters * z.bytes_each,  # the one that moves, and the operator's
            # where the step starts, and the removed samples' part of the gradient
            "gradients": self._measured() + 2 * chosen,
        }
        if self.method in ("lanczos", "cg") or s.curvature == "hessian":
            n = self.n_curvature
            each = min(s.batch_size, n)
            some = min(self.kept, -(-n // s.batch_size))
            one = self.graphs.of(each) + chosen  # a gradient hangs on each graph
            found["graphs"] = one * some
            found["batch"] = one  # one that is built, or what a product through one works with
        if self.method == "closed form":
            found["factors"] = float(self._factor_bytes())
        return found

    def _factor_bytes(self) -> int:
        """Of bases, of what they are computed from, and of eigenvalues in float64."""
        z = self.sizes
        working = 3 * 8 * max((max(b.rows, b.columns) ** 2 for b in z.blocks), default=0)
        return 2 * z.bytes_each * sum(b.sides for b in z.blocks) + 2 * 8 * z.p + working

    def _vectors(self) -> int:
        s, z = self.settings, self.sizes
        if s.calibrate:
            return self.plan.bytes
        if self.method == "lanczos":
            return Krylov.bytes_of(z.p, 1, self.iterations, 1, z.bytes_each)
        return (_CG_VECTORS if self.method == "cg" else 4) * z.p * z.bytes_each


def _times(count: int, passes: dict[str, Any]) -> dict[str, Any]:
    return {kind: tuple((count * t, n) for t, n in some) for kind, some in passes.items()}
