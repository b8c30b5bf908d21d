"""The step: directions, matrices and solves on the selected parameters."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import tensors_of
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
from lcodec_ext.curvature.layout import Layout
from lcodec_ext.unlearning.request import Part
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Workplace

_OPERATORS = {
    "gauss_newton": GaussNewtonOperator,
    "hessian": HessianOperator,
    "fisher": FisherOperator,
}


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
        removal = layout.gather(gradient) * share
        start = layout.gather(work.parameters).detach().clone()
        buffers = {k: b.clone() for k, b in work.model.named_buffers()}
        return cls(work, part, selection, layout, start, buffers, removal)

    @property
    def retained(self) -> Any:
        """The samples that stay, for steps that need them."""
        assert self.part.retained is not None  # requests without them are checked beforehand
        return self.part.retained

    def now(self) -> Tensor:
        """The parameters, a copy."""
        return self.layout.gather(self.work.parameters).detach().clone()

    def put(self, theta: Tensor) -> None:
        """Set the parameters."""
        self.layout.scatter_(self.work.parameters, theta)

    def restore(self, theta: Tensor, buffers: dict[str, Tensor]) -> None:
        """Set parameters and buffers."""
        self.put(theta)
        for name, buffer in self.work.model.named_buffers():
            buffer.copy_(buffers[name])

    def retained_gradient(self) -> Tensor:
        """The retained objective's gradient, on the samples that steps read."""
        with self.work.timed("gradients"):
            parameters = {k: self.work.parameters[k] for k in self.layout.parameters}
            _, gradient = self.work.gradient(self.retained.read, parameters)
        return self.layout.gather(gradient)


@dataclass(frozen=True)
class Steps:
    """The steps of an update that were taken."""

    solves: tuple[SolveResult, ...] = ()  # of Newton steps
    n_gradient: int = 0  # gradient steps
    plan: str = ""  # how products with the last matrix were computed
    failure: NotFiniteError | None = None  # what ended them early


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
                solution, plan = newton_step(block, direction, damping)
                theta += solution.x
                taken = Steps((*taken.solves, solution), plan=plan)
            block.put(theta)
    except NotFiniteError as error:
        return Steps(taken.solves, taken.n_gradient, taken.plan, error)
    return taken


def newton_step(block: Block, direction: Tensor, damping: float) -> tuple[SolveResult, str]:
    """Solve with the damped curvature; return the solution and the plan of the products."""
    with block.work.timed("curvature"):
        operator = operator_of(block, direction, damping)
    with block.work.timed("solve"):
        solution = _solve(operator, direction, block.work.settings, damping)
    return solution, operator.plan


def operator_of(block: Block, direction: Tensor, damping: float) -> CurvatureOperator:
    """The damped curvature that a direction is solved with."""
    work, settings, statistics = block.work, block.work.settings, block.part.statistics
    common: dict[str, Any] = {
        "damping": damping,
        "weight_decay": settings.weight_decay,
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
        return SecantOperator(*arguments, steps=steps, progress=work.progress, **common)
    return _OPERATORS[settings.curvature](*arguments, progress=work.progress, **common)


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
    operator: CurvatureOperator, gradient: Tensor, settings: Settings, damping: float
) -> SolveResult:
    """Solve for the step; refuse, with advice, a matrix that is not positive definite."""
    curvature = settings.curvature
    shift = damping + settings.weight_decay
    rayleigh, least = math.nan, None
    limited = settings.max_iterations is not None
    try:
        with warnings.catch_warnings():
            if limited:
                warnings.simplefilter("ignore", ConvergenceWarning)
            solution = operator.solve(
                gradient, rtol=settings.rtol, max_iterations=settings.max_iterations
            )
        rtol = settings.rtol or (1e-5 if operator.dtype == torch.float32 else 1e-10)
        if solution.method != "cg" or limited or solution.residual <= rtol or shift > 0:
            return solution
        found = f"the residual is {solution.residual:.2g} after {solution.iterations} iterations"
    except IndefiniteCurvatureError as error:
        rayleigh, least = error.rayleigh, error.least_damping
        found = f"its smallest eigenvalue is at most {rayleigh:.4g}"
    if least is None:
        state = "singular or nearly so"
        advice = f"a larger damping, for instance {max(1e-4, 10 * damping):g}"
    else:
        state = "indefinite"
        # 5% cover the rounding. Iterations know one direction: others may take more.
        factor = 1.05 if len(gradient) <= operator.formed_up_to else 2.0
        advice = f"damping above {factor * (damping + least):.2g}"
        if curvature in ("hessian", "secant"):
            advice = (
                "curvature='gauss_newton', which is never indefinite for a loss that is convex in "
                f"the outputs, or {advice}"
            )
        else:
            advice = f"a loss that is convex in the outputs, curvature='fisher' or {advice}"
    raise IndefiniteCurvatureError(
        f"the {curvature} matrix of the retained objective is {state} on the {len(gradient):,} "
        f"selected parameters: {found}, with weight_decay={settings.weight_decay:g} and "
        f"damping={damping:g} included. Use {advice}",
        rayleigh,
        least,
    )
