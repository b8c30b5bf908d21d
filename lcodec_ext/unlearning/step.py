"""The step: directions, matrices and solves on the selected parameters."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.decay import decay_text, least_decay, scaled
from lcodec_ext._torch.loss import Gradient, LossFunction, NotFiniteError
from lcodec_ext.curvature import (
    ConvergenceWarning,
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    IndefiniteCurvatureError,
    SecantOperator,
    Selection,
    SolveResult,
)
from lcodec_ext.curvature.kronecker import EKFACOperator
from lcodec_ext.curvature.layout import Layout
from lcodec_ext.unlearning.request import Part
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.solutions import KRYLOV, Plan
from lcodec_ext.unlearning.statistics import draws_of
from lcodec_ext.unlearning.workplace import Workplace

OPERATORS: dict[str, Any] = {
    "gauss_newton": GaussNewtonOperator,
    "hessian": HessianOperator,
    "fisher": FisherOperator,
    "ekfac": EKFACOperator,
}


FEW = 30  # products with one vector, where nothing says how many


@dataclass(frozen=True, eq=False)
class Block:
    """The selected parameters, where they are, and what is to be removed from them."""

    work: Workplace
    part: Part  # the samples that are removed, and those that stay
    selection: Selection
    layout: Layout
    start: Tensor  # (p,): the parameters before the step
    buffers: dict[str, Tensor]  # of the model, before the step
    removal: Tensor  # (p,): the removed samples' gradient, as a share of the retained objective

    @classmethod
    def of(cls, work: Workplace, part: Part, selection: Selection, gradient: Gradient) -> "Block":
        """The block of a selection at the present weights."""
        layout = selection.layout(work.model)
        share = len(part.forget) / part.n_retain
        removal = layout.gather(gradient).mul_(share)
        start = _now(layout, work)
        buffers = {k: b.clone() for k, b in work.model.named_buffers()}
        return cls(work, part, selection, layout, start, buffers, removal)

    @property
    def retained(self) -> Any:
        """The samples that stay, for steps that need them."""
        assert self.part.retained is not None  # requests without them are checked beforehand
        return self.part.retained

    def now(self) -> Tensor:
        """The parameters, a copy."""
        return _now(self.layout, self.work)

    def put(self, theta: Tensor) -> None:
        """Set the parameters."""
        self.layout.scatter_(self.work.parameters, theta)

    def restore(self, theta: Tensor, buffers: dict[str, Tensor]) -> None:
        """Set parameters and buffers."""
        self.put(theta)
        for name, buffer in self.work.model.named_buffers():
            if buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
            else:  # an observer's that has seen its first data
                buffer.data = buffers[name].clone()

    def decay(self) -> Tensor:
        """The weight decay of each coordinate; one number takes no memory."""
        work, each = self.work, self.work.decay
        own = [each[k] for k in self.layout.parameters]
        numbers = {decay for decay in own if not isinstance(decay, Tensor)}
        if len(numbers) == 1 and not any(isinstance(decay, Tensor) for decay in own):
            return torch.full_like(self.start[:1], *numbers).expand_as(self.start)
        return self.layout.gather(
            {k: torch.ones_like(p) * each[k] for k, p in work.parameters.items()}
        )

    def retained_gradient(self) -> Tensor:
        """The retained objective's gradient, on the samples that steps read."""
        with self.work.timed("gradients"):
            parameters = {k: self.work.parameters[k] for k in self.layout.parameters}
            _, gradient = self.work.gradient(self.retained.read, parameters)
        return self.layout.gather(gradient)


@torch.no_grad()
def _now(layout: Layout, work: Workplace) -> Tensor:
    return layout.gather(work.parameters)


@dataclass(frozen=True)
class Steps:
    """The steps of an update that were taken."""

    solves: tuple[SolveResult, ...] = ()  # of Newton steps, without their solutions
    n_gradient: int = 0  # gradient steps
    plan: str = ""  # how products with the last matrix were computed
    failure: NotFiniteError | None = None  # what ended them early
    damping: float | None = None  # the most that a Newton step took

    @property
    def residual(self) -> float:
        """The largest, 0 without a solve; above 1 a solution is worse than none."""
        return max((solve.residual for solve in self.solves), default=0.0)


def told(solution: SolveResult) -> SolveResult:
    """How a system was solved, without the solution, which is as large as the model."""
    return replace(solution, x=solution.x.new_empty(0))


def take_steps(block: Block, damping: float, learning_rate: float) -> Steps:
    """Take the steps of the update from where the block starts."""
    settings = block.work.settings
    theta, offset = block.start.clone(), None
    taken = Steps()
    try:
        for number in range(settings.steps):
            if settings.gradient == "residual":
                direction = -block.retained_gradient()
            elif number == 0:
                direction = block.removal
                if settings.steps > 1:
                    offset = block.retained_gradient() + block.removal
            else:
                assert offset is not None
                direction = offset - block.retained_gradient()
            if settings.update == "gradient":
                theta += learning_rate * direction
                taken = Steps(n_gradient=taken.n_gradient + 1)
            elif settings.curvature == "secant" and not direction.any():
                pass  # without a direction there are no gradients to compare
            else:
                solution, plan, used = newton_step(block, direction, damping)
                theta += solution.x
                used = max(used, taken.damping or 0.0)
                taken = Steps((*taken.solves, told(solution)), plan=plan, damping=used)
            block.put(theta)
    except NotFiniteError as error:
        return Steps(taken.solves, taken.n_gradient, taken.plan, error, taken.damping)
    return taken


class Damped(NamedTuple):
    """A solution, how its products were computed, and with which damping."""

    solution: SolveResult
    plan: str
    damping: float


def newton_step(block: Block, direction: Tensor, damping: float) -> Damped:
    """Solve with the damped curvature."""
    with block.work.timed("curvature"):
        operator = operator_of(block, direction, damping)
    with block.work.timed("solve"):
        if in_krylov_space(block.work.settings, block.part.statistics is not None):
            return _least_solved(block, operator, direction, damping)
        solution = _solve(block.work, operator, direction, damping)
    return Damped(solution, operator.plan, damping)


def in_krylov_space(settings: Settings, from_statistics: bool) -> bool:
    """Whether a step without calibration is found in a Krylov space, in which damping is free."""
    products = settings.curvature not in ("secant", "ekfac")
    return settings.bounded and not from_statistics and products


def _least_solved(
    block: Block, operator: CurvatureOperator, direction: Tensor, damping: float
) -> Damped:
    """Solve with the least damping, from the one that is asked for, whose residual is at most 1.

    Where iterations are few, a solution with little damping may be worse than none. More damping
    costs no product here.
    """
    settings = block.work.settings
    plan = Plan(groups=0, steps=settings.max_iterations or FEW, at_once=1, bytes=0)
    space = KRYLOV.solutions(block.work, operator, [direction], plan)
    if space.least <= 0 and direction.any():  # with the damping that is in the operator
        raise _indefinite(settings, direction, damping, space.least, -space.least, "")
    more = 0.0
    while float(space.residuals(more)) > 1:
        more = max(2 * more, damping, 1e-6 * space.largest)
    x = space.solve(more, 0)
    size = float(direction.norm())
    left = (operator @ x).add_(x, alpha=more).sub_(direction)
    residual = float(left.norm()) / size if size else 0.0
    solution = SolveResult(x, residual, space.products, space.method)
    return Damped(solution, operator.plan, damping + more)


def operator_of(block: Block, direction: Tensor, damping: float) -> CurvatureOperator:
    """The damped curvature that a direction is solved with."""
    work, settings, statistics = block.work, block.work.settings, block.part.statistics
    common: dict[str, Any] = {
        "damping": damping,
        "weight_decay": scaled(settings.weight_decay, _share_of_retained(block)),
        "dtype": work.dtype,
    }
    if statistics is not None:
        return statistics.operator(
            work.model,
            work.loss_fn,
            block.part.forget,
            block.selection,
            batch_size=settings.batch_size,
            **common,
        )
    common["group"] = work.ranks.group
    data = block.retained.read.data(settings.batch_size)
    loss_fn = work.loss_fn
    if settings.output_damping:
        loss_fn = _held_outputs(loss_fn, settings.output_damping)
    arguments = (work.model, loss_fn, data, block.selection)
    if settings.curvature == "secant":
        # Along the gradient, as far as a hundredth of the weights: short enough to be a
        # derivative, long enough for float32.
        length = 0.01 * float(block.start.norm()) or 0.01
        steps = direction * (length / float(direction.norm()))
        return SecantOperator(*arguments, steps=steps, **common)
    if settings.curvature == "ekfac":
        draws = draws_of(len(block.retained.read), work.n_numbers)
        common |= {"seed": settings.seed, "draws": draws, "progress": work.progress}
    else:
        common["cache_bytes"] = settings.cache_bytes
    return OPERATORS[settings.curvature](*arguments, **common)


def _share_of_retained(block: Block) -> float:
    """What a retained sample counts for on average: tokens share the regulariser."""
    part, work = block.part, block.work
    if part.statistics is None:
        return work.share(block.retained.read)
    m, n = len(part.forget), part.n_retain + len(part.forget)
    return (n - m * work.share(part.forget)) / part.n_retain


def _held_outputs(loss_fn: LossFunction, damping: float) -> LossFunction:
    """A loss with the same values and gradients, and damping added to its second derivative."""

    def held(outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = loss_fn(outputs, targets)
        for z in tensors_of(outputs):
            if z.is_floating_point():
                moved = (z - z.detach()).square()
                loss = loss + damping / 2 * (moved.sum(-1) if z.ndim > 1 else moved).mean()
        return loss

    return held


def _solve(
    work: Workplace, operator: CurvatureOperator, gradient: Tensor, damping: float
) -> SolveResult:
    """Solve for the step; refuse, with advice, a matrix that is not positive definite."""
    settings = work.settings
    shift = damping + least_decay(settings.weight_decay)
    rayleigh, least = math.nan, None
    limited = settings.max_iterations is not None
    try:
        with warnings.catch_warnings():
            if limited:
                warnings.simplefilter("ignore", ConvergenceWarning)
            solution = operator.solve(
                gradient,
                rtol=settings.rtol,
                max_iterations=settings.max_iterations,
                progress=work.progress,
            )
        rtol = settings.rtol or (1e-5 if operator.dtype == torch.float32 else 1e-10)
        if solution.method != "cg" or limited or solution.residual <= rtol or shift > 0:
            return solution
        found = f"the residual is {solution.residual:.2g} after {solution.iterations} iterations"
    except IndefiniteCurvatureError as error:
        rayleigh, least, found = error.rayleigh, error.least_damping, ""
    raise _indefinite(settings, gradient, damping, rayleigh, least, found, operator.formed_up_to)


def _indefinite(
    settings: Settings,
    gradient: Tensor,
    damping: float,
    rayleigh: float,
    least: float | None,
    found: str,
    formed_up_to: int = 0,
) -> IndefiniteCurvatureError:
    """The error for a matrix that is not positive definite, with advice."""
    curvature = settings.curvature
    found = found or f"its smallest eigenvalue is at most {rayleigh:.4g}"
    if least is None:
        state = "singular or nearly so"
        advice = f"a larger damping, for instance {max(1e-4, 10 * damping):g}"
    else:
        state = "indefinite"
        # 5% cover the rounding. Iterations know one direction: others may take more.
        factor = 1.05 if len(gradient) <= formed_up_to else 2.0
        advice = f"damping above {factor * (damping + least):.2g}"
        if curvature in ("hessian", "secant"):
            advice = (
                "curvature='gauss_newton', which is never indefinite for a loss that is convex in "
                f"the outputs, or {advice}"
            )
        else:
            advice = f"a loss that is convex in the outputs, curvature='fisher' or {advice}"
    return IndefiniteCurvatureError(
        f"the {curvature} matrix of the retained objective is {state} on the {len(gradient):,} "
        f"selected parameters: {found}, with weight_decay={decay_text(settings.weight_decay)} and "
        f"damping={damping:g} included. Use {advice}",
        rayleigh,
        least,
    )
