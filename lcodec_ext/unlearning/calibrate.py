"""The strength of a step, found by deleting control groups of retained samples in the same way."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._files import json_ready
from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature import CurvatureOperator, SolveResult
from lcodec_ext.curvature.solvers import Krylov
from lcodec_ext.unlearning.control import Control, control_groups, known_classes, some_of_pool
from lcodec_ext.unlearning.step import Block, Steps, operator_of

RISE = 0.1  # of the validation loss, that a deletion may cause; and that any control group may have
OUTLIERS = 3.0  # times what control groups and validation lose: the request is unlike either
_DECADES = 10  # of dampings, from ten times the largest curvature downwards
_BISECTIONS = 4  # of a decade: the damping is found to within 15%
TRIALS = _DECADES - 1 + _BISECTIONS  # dampings after the first one, at most


@dataclass(frozen=True)
class Calibration:
    """How the strength of a deletion was found, and on what evidence.

    Control groups are retained samples, each about as many as the request has, that were deleted
    virtually by the same step. The strength is the largest after which their mean loss is at most
    that of validation samples, and the validation loss still holds after the request's own step.

    Attributes
    ----------
    strength : float
        The damping of the step; less is stronger.
    stopped_by : str
        What a stronger step would have met: "control", the control groups reach the validation
        loss; "validation", the validation loss rises by more than 10%; "retained", the retained
        loss rises by more than a tenth of what it is below validation, or so much that a warning
        would be due; "residual", the solution is
        worse than none; "curvature", the matrix is indefinite; "range", nothing; "outliers", there
        was no step.
    control_before, control_after : tuple of float
        Mean loss of each control group, before and after its own virtual deletion.
    control : float
        Mean over groups of the latter, the highest and the lowest left out where there are six.
    spread : float
        Its standard error.
    validation_before, validation_after : float
        Mean loss of the validation samples, before and after the deletion.
    retained_before, retained_after : float
        The same of retained samples that the step does not read.
    outliers : bool
        Whether the request is unlike other samples, as ones with wrong labels are: there was no
        step then, only a finish, and nothing after it in `control_after`. Or whether after the step
        it loses more than three times what control groups and validation do.
    unlike : float
        How often a removed sample loses more than a retained one, before: 0.5 for samples like any
        other, 0.9 and more for outliers; nan without a finish.
    finish : int
        Iterations or batches of the finish that followed.
    finish_by : str
        What finished, and why that.
    group_size : int
        Samples in a group; of groups of users the mean, rounded.
    groups_of : str
        "users": other whole users, by the ids in `groups`; "samples": random samples with the
        labels of the request, also where there were too few users; "classes": random samples of
        other classes, where no retained sample has a label of the request.
    n_validation : int
        Validation samples that were used.
    products : int
        Products with the curvature that the step and its control took, with all columns at once.
    """

    strength: float
    stopped_by: str
    control_before: tuple[float, ...]
    control_after: tuple[float, ...]
    control: float
    spread: float
    validation_before: float
    validation_after: float
    retained_before: float
    retained_after: float
    outliers: bool
    unlike: float
    finish: int
    finish_by: str
    group_size: int
    groups_of: str
    n_validation: int
    products: int

    @classmethod
    def without_a_step(
        cls, harm: "Harm", control: Control, before: tuple[float, ...], unlike: float
    ) -> "Calibration":
        """Of outliers, which a finish alone deletes: a step of infinite damping is none."""
        return cls(
            strength=math.inf,
            stopped_by="outliers",
            control_before=before,
            control_after=(),
            control=math.nan,
            spread=math.nan,
            validation_before=harm.validation_before,
            validation_after=math.nan,
            retained_before=harm.retained_before,
            retained_after=math.nan,
            outliers=True,
            unlike=unlike,
            finish=0,
            finish_by="",
            group_size=control.size,
            groups_of=control.of,
            n_validation=len(harm.validation),
            products=0,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it; what is not finite becomes None."""
        found: dict[str, Any] = json_ready(asdict(self))
        return found

    def __str__(self) -> str:
        finish = f", {self.finish} of {self.finish_by}" * bool(self.finish)
        if not self.control_after:
            return (
                f"outliers, no step: a removed sample loses more than a retained one in "
                f"{self.unlike:.0%} of pairs, validation {self.validation_before:.3g} -> "
                f"{self.validation_after:.3g}{finish}"
            )
        before = robust_mean(self.control_before)[0]
        return (
            f"{len(self.control_after)} control groups of {self.group_size}"
            + " samples of other users" * (self.groups_of == "users")
            + f": loss {before:.3g} -> "
            f"{self.control:.3g} +- {self.spread:.2g}, validation {self.validation_before:.3g} -> "
            f"{self.validation_after:.3g}, stopped by {self.stopped_by}" + finish
        )


@dataclass(frozen=True)
class _Tried:
    """What a damping does to control groups and, with the request, to validation samples."""

    damping: float
    control: tuple[float, ...]
    validation: float
    retained: float
    residual: float


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Steps of any damping for a request, and what was found of the right one."""

    block: Block
    operator: CurvatureOperator
    space: Krylov
    direction: Tensor
    harm: "Harm"
    found: Calibration

    def step(self, damping: float) -> Steps:
        """Take the step of a damping from where the block starts."""
        x = self.space.solve(damping, 0)
        product = (self.operator @ x).add_(x, alpha=damping)
        size = float(self.direction.norm())
        residual = float((product - self.direction).norm()) / size if size else 0.0
        self.block.put(self.block.start + x)
        solve = SolveResult(x, residual, self.space.products, "lanczos")
        return Steps((solve,), plan=self.operator.plan)

    @property
    def validation(self) -> Samples:
        """Samples that were not trained on."""
        return self.harm.validation

    def losses(self) -> tuple[float, float]:
        """Of validation and retained samples, at the present weights."""
        work = self.block.work
        return work.mean_loss(self.harm.validation), work.mean_loss(self.harm.retained)


def calibrated(block: Block, held: Samples) -> Calibrated:
    """Find the strength of the step for a block's request, with samples nobody has trained on."""
    work, settings = block.work, block.work.settings
    with work.timed("calibration"):
        rng = np.random.default_rng([settings.seed, 6])
        validation = known_classes(held, block, rng)
        control = control_groups(block, rng)
        groups = control.groups
        directions = torch.stack([block.removal, *(_direction(block, each) for each in groups)], 1)
        operator = operator_of(block, directions[:, 0], 0.0)
        space = Krylov(lambda V: operator @ V, directions, settings.max_iterations or 30)
        before = tuple(work.mean_loss(each) for each in groups)
        harm = Harm.of(block, validation, some_of_pool(block, rng))
        trial = _Trial(block, space, groups, before, harm)
        chosen, reason = trial.search()
        loss = _request_loss(block, space, chosen)
        mean, spread = robust_mean(chosen.control)
        level = max(trial.target, *chosen.control)
        found = Calibration(
            strength=chosen.damping,
            stopped_by=reason,
            control_before=before,
            control_after=chosen.control,
            control=mean,
            spread=spread,
            validation_before=harm.validation_before,
            validation_after=chosen.validation,
            retained_before=harm.retained_before,
            retained_after=chosen.retained,
            outliers=reason in ("validation", "retained") and loss > OUTLIERS * level,
            unlike=math.nan,
            finish=0,
            finish_by="",
            group_size=control.size,
            groups_of=control.of,
            n_validation=len(validation),
            products=space.products,
        )
    return Calibrated(block, operator, space, directions[:, 0], harm, found)


class Harm:
    """What losses of validation and retained samples may become."""

    def __init__(
        self,
        validation: Samples,
        retained: Samples,
        validation_before: float,
        retained_before: float,
    ) -> None:
        self.validation, self.retained = validation, retained
        self.validation_before = self._least = validation_before
        self.retained_before = retained_before

    @classmethod
    def of(cls, block: Block, validation: Samples, retained: Samples) -> "Harm":
        """Measured from the present weights on."""
        work = block.work
        return cls(validation, retained, work.mean_loss(validation), work.mean_loss(retained))

    def accept(self, validation: float) -> None:
        """Take note of a loss that was reached: what was gained is not given away."""
        self._least = min(self._least, validation)

    def broken(self, validation: float, retained: float) -> str:
        """Which losses do not hold; NaN does not.

        Validation alone would not do: where a network knows its samples by heart, it loses more on
        validation samples than by guessing, and any damage lowers that.
        """
        if not validation <= (1 + RISE) * self._least:
            return "validation"
        gap = max(self.validation_before - self.retained_before, self.retained_before)
        if not retained <= self.retained_before + RISE * gap:
            return "retained"
        return "retained" if is_much_worse(self.retained_before, retained) else ""


class _Trial:
    """Dampings that are tried, from weak steps to strong ones."""

    def __init__(
        self,
        block: Block,
        space: Krylov,
        groups: Sequence[Samples],
        before: tuple[float, ...],
        harm: Harm,
    ) -> None:
        self.block, self.space, self.groups, self.harm = block, space, groups, harm
        # Where validation samples lose no more than trained ones there is no gap to go by.
        self.target = max(harm.validation_before, (1 + RISE) * robust_mean(before)[0])

    def search(self) -> tuple[_Tried, str]:
        """The least damping that passes, and why less does not: down by tens, then bisected."""
        top = 10 * self.space.largest or 1.0
        good = self._try(top)
        for decade in range(1, _DECADES):
            tried = self._try(top / 10**decade)
            reason = self._objection(tried)
            if reason:
                return self._bisected(good, tried, reason)
            good = self._accept(tried)
        return good, "range"

    def _bisected(self, good: _Tried, bad: _Tried, reason: str) -> tuple[_Tried, str]:
        for _ in range(_BISECTIONS):
            tried = self._try(math.sqrt(good.damping * bad.damping))
            objection = self._objection(tried)
            if objection:
                bad, reason = tried, objection
            else:
                good = self._accept(tried)
        return good, reason

    def _accept(self, tried: _Tried) -> _Tried:
        self.harm.accept(tried.validation)
        return tried

    def _try(self, damping: float) -> _Tried:
        block, losses = self.block, []
        # The request's own step, and what it does to others; then each group's, to itself.
        for column, some in enumerate([[self.harm.validation, self.harm.retained], *self._own]):
            block.put(block.start + self.space.solve(damping, column))
            losses += [block.work.mean_loss(samples) for samples in some]
        block.put(block.start)
        columns = range(len(self.groups) + 1)
        residual = max(self.space.residual(damping, column) for column in columns)
        return _Tried(damping, tuple(losses[2:]), losses[0], losses[1], residual)

    @property
    def _own(self) -> list[list[Samples]]:
        return [[group] for group in self.groups]

    def _objection(self, tried: _Tried) -> str:
        """What speaks against a damping; NaN does."""
        if self.space.least + tried.damping <= 0:
            return "curvature"
        harmed = self.harm.broken(tried.validation, tried.retained)
        if harmed:
            return harmed
        if not robust_mean(tried.control)[0] <= self.target:
            return "control"
        return "residual" if tried.residual > 1 else ""


def _request_loss(block: Block, space: Krylov, tried: _Tried) -> float:
    block.put(block.start + space.solve(tried.damping, 0))
    loss = block.work.mean_loss(block.part.forget)
    block.put(block.start)
    return loss


def robust_mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, of six or more without the highest and the lowest.

    Losses of groups have a heavy tail: one sample in a thousand may carry the mean of its group.
    """
    kept = sorted(values)[1:-1] if len(values) >= 6 else list(values)
    return float(np.mean(kept)), float(np.std(kept) / math.sqrt(max(1, len(kept) - 1)))


def _direction(block: Block, group: Samples) -> Tensor:
    """What removing a control group would start from, as `Block.removal` is for the request."""
    parameters = {k: block.work.parameters[k] for k in block.layout.parameters}
    _, gradient = block.work.gradient(group, parameters)
    # As large as the request: where the pool has fewer samples their mean stands for all of it.
    return block.layout.gather(gradient) * (len(block.part.forget) / block.part.n_retain)
