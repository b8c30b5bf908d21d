"""The strength of a step, found by deleting control groups of retained samples in the same way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._files import json_ready
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature import CurvatureOperator, SolveResult
from lcodec_ext.unlearning.control import (
    Control,
    control_groups,
    few,
    known_classes,
    measured,
    some_of_pool,
)
from lcodec_ext.unlearning.levels import Fetched, Levels, Lost
from lcodec_ext.unlearning.solutions import Solutions, maker_of, plan_of
from lcodec_ext.unlearning.step import Block, Steps, operator_of, told

_Measured = TypeVar("_Measured")

RISE = 0.1  # of the validation loss, that a deletion may cause; and that any control group may have
_RESTORED = 0.5  # of what retained samples lose less than validation: what a finish gives back
POINTS = 0.003  # of accuracy on validation samples, that a step may cost
OWN = 3.0  # times what unseen samples lose more than trained ones: what the request may rise by
OUTLIERS = 3.0  # times what control groups and validation lose: the request is unlike either
_START = 1e-2  # of the largest curvature: the damping that is tried first
_LENGTHS = 8  # that are tried, at most
_GROWTH = 1.2, 4.0  # of a length from one try to the next
_CLOSE = 1.15  # between dampings or lengths, where a search ends
_DECADES = 8  # below, to which dampings are tried
_BISECTIONS = 4  # of a decade, at most
_NEAR = 0.9  # of the target, from which the control groups have reached it
TRIALS = _DECADES + _BISECTIONS + _LENGTHS  # dampings and lengths after the first one, at most


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
    length : float
        Multiple of the solution that the step takes: above 1 where the Krylov space is too small
        for a solution with less damping.
    stopped_by : str
        What a stronger step would have met: "control", the control groups reach the validation
        loss; "validation", the validation loss rises by more than 10%; "retained", the retained
        loss rises by more than a tenth of what it is below validation, or so much that a warning
        would be due; "accuracy", fewer validation samples are told right; "request", the removed
        samples' own loss rises by more than three times what unseen samples lose more than trained
        ones; "residual", the solution is worse than none; "curvature", the matrix is indefinite;
        "range", nothing. There was no step where it is "outliers", for which a finish alone does,
        or "finish": on few retained samples it did for these, too.
    cap : float
        The loss that 2% of the validation samples exceed. In `trained`, `control` and `unseen` no
        sample counts for more: a few would carry the means.
    trained, unseen : float
        Mean loss before, of trained samples (of control groups and others that the step does not
        read) and of validation samples. At most 2% of trained samples may be above the cap: further
        ones have wrong labels, or are unlike validation samples otherwise.
    control_before, control_after : tuple of float
        Mean loss of each control group, before and after its own virtual deletion, samples left out
        that were above the cap before.
    control : float
        What trained samples lose once they are deleted: `trained` and the mean rise of the groups'
        losses, the highest and the lowest rise left out where there are six groups.
    spread : float
        Standard error of the rise.
    validation_before, validation_after : float
        Mean loss of the validation samples, before and after the deletion.
    retained_before, retained_after : float
        The same of retained samples that the step does not read.
    attack_before, attack_after : float
        How well losses tell members from others, before and after: the AUC of control groups, after
        their own virtual deletions, against validation samples, after the request's. 0.5 is not at
        all. It is a check and steers nothing: most samples of a group lose little at any strength,
        so it hardly moves while the mean multiplies.
    outliers : bool
        Whether the request is unlike other samples, as ones with wrong labels are; or loses,
        after the step, more than three times what control groups and validation do.
    unlike : float
        How often a removed sample loses more than a retained one, before: 0.5 for samples like any
        other, 0.9 and more for outliers; nan without a finish.
    finish : int
        Iterations or batches of the finish that followed.
    finish_by : str
        What finished, and why that; "undone: ..." says what was tried and taken back.
    group_size : int
        Samples in a group; of groups of users the mean, rounded.
    groups_of : str
        "users": other whole users, by the ids in `groups`; "samples": random samples with the
        labels of the request, also where there were too few users; "classes": random samples of
        other classes, where no retained sample has a label of the request.
    n_validation : int
        Validation samples that were used.
    products : int
        Products of the curvature with a vector that the step and its control took.
    tried : int
        Dampings that were tried.
    """

    strength: float
    length: float
    stopped_by: str
    cap: float
    trained: float
    unseen: float
    control_before: tuple[float, ...]
    control_after: tuple[float, ...]
    control: float
    spread: float
    validation_before: float
    validation_after: float
    retained_before: float
    retained_after: float
    attack_before: float
    attack_after: float
    outliers: bool
    unlike: float
    finish: int
    finish_by: str
    group_size: int
    groups_of: str
    n_validation: int
    products: int
    tried: int

    @classmethod
    def without_a_step(
        cls,
        harm: "Harm",
        control: Control,
        before: tuple[float, ...],
        unlike: float,
        outliers: bool,
    ) -> "Calibration":
        """Where a finish alone does: a step of infinite damping is none."""
        return cls(
            strength=math.inf,
            length=1.0,
            stopped_by="outliers" if outliers else "finish",
            cap=harm.levels.cap,
            trained=harm.levels.trained,
            unseen=harm.levels.unseen,
            control_before=before,
            control_after=(),
            control=math.nan,
            spread=math.nan,
            validation_before=harm.validation_before,
            validation_after=math.nan,
            retained_before=harm.retained_before,
            retained_after=math.nan,
            outliers=outliers,
            unlike=unlike,
            finish=0,
            finish_by="",
            group_size=control.size,
            groups_of=control.of,
            n_validation=len(harm.validation),
            products=0,
            attack_before=math.nan,
            attack_after=math.nan,
            tried=0,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it; what is not finite becomes None."""
        found: dict[str, Any] = json_ready(asdict(self))
        return found

    def __str__(self) -> str:
        undone = self.finish_by.startswith("undone")  # and nothing else came of it
        finish = f", finish {f'of {self.finish} steps by ' * (not undone)}{self.finish_by}"
        finish *= bool(self.finish_by)
        if not self.control_after:
            return (
                "outliers" * self.outliers
                + "the finish was enough" * (not self.outliers)
                + f", no step: before, a removed sample lost more than a retained one in "
                f"{self.unlike:.0%} of pairs, validation {self.validation_before:.3g} -> "
                f"{self.validation_after:.3g}{finish}"
            )
        return (
            f"{len(self.control_after)} control groups of {self.group_size}"
            + " samples of other users" * (self.groups_of == "users")
            + f": loss {self.trained:.3g} -> "
            f"{self.control:.3g} +- {self.spread:.2g}, unseen {self.unseen:.3g} (single "
            f"losses count for at most {self.cap:.3g}); validation {self.validation_before:.3g} -> "
            f"{self.validation_after:.3g}, stopped by {self.stopped_by}" + finish
        )


@dataclass(frozen=True)
class _Tried:
    """What a damping does to control groups and, with the request, to validation samples."""

    damping: float
    control: tuple[float, ...]
    validation: float  # nan where control groups go too far, which decides
    retained: float
    objection: str
    length: float = 1.0  # multiple of the solution


@dataclass(frozen=True, eq=False)
class Calibrated:
    """Steps of any damping for a request, and what was found of the right one."""

    block: Block
    operator: CurvatureOperator
    space: Solutions
    direction: Tensor
    harm: "Harm"
    found: Calibration

    def step(self, damping: float) -> Steps:
        """Take the step of a damping from where the block starts, lengthened as was found."""
        x = self.space.solve(damping, 0)
        left = (self.operator @ x).add_(x, alpha=damping).sub_(self.direction)
        size = float(self.direction.norm())
        residual = float(left.norm()) / size if size else 0.0
        del left
        solve = told(SolveResult(x, residual, self.space.products, self.space.method))
        self.block.put(x.mul_(self.found.length).add_(self.block.start))
        return Steps((solve,), plan=self.operator.plan)


def calibrated(block: Block, harm: "Harm", *, restored: bool = False) -> Calibrated:
    """Find the strength of the step for a block's request, with samples nobody has trained on.

    Where a finish by mini-batches follows, which restores what retained samples lose, they may lose
    more by the step (`restored`).

    With four control groups it takes 40 products of the curvature with a vector: `STEPS` for the
    request and for each group, which thirty iterations of one solve would come near. It also takes
    a gradient of each group, and the losses of 1000 samples of control groups, 1000 validation and
    500 retained samples at two to nine dampings, most often five or six. Memory: `planned`.
    """
    work, settings = block.work, block.work.settings
    with work.timed("calibration"):
        rng = np.random.default_rng([settings.seed, 6])
        p, itemsize = block.start.numel(), block.start.element_size()
        plan = plan_of(settings, p, itemsize, work.space_bytes)
        control = control_groups(block, rng, plan.groups)
        groups = [
            _usual(block, each, few(each, rng, max(1, measured(settings) // plan.groups)), harm)
            for each in control.groups
        ]
        directions = [block.removal, *(_direction(block, each) for each, _ in groups)]
        operator = operator_of(block, block.removal, 0.0)
        space = maker_of(settings).solutions(work, operator, directions, plan)
        some = [each for _, each in groups]
        own = Fetched(work, few(block.part.forget, rng, measured(settings)))
        trial = _Trial(block, space, some, own, harm, restored)
        attack = _attack([each.losses() for each in some], harm.each())
        with progress_bar(work.progress, desc="strength", unit="trial") as trial.bar:
            chosen, reason = trial.search()
        after, others, lost = trial.losses(chosen)
        mean, spread = trial.level(chosen.control)
        level = max(trial.target, *chosen.control)
        found = Calibration(
            strength=chosen.damping,
            length=chosen.length,
            stopped_by=reason,
            cap=harm.levels.cap,
            trained=trial.trained,
            unseen=harm.levels.unseen,
            control_before=trial.before,
            control_after=chosen.control,
            control=mean,
            spread=spread,
            validation_before=harm.validation_before,
            validation_after=chosen.validation,
            retained_before=harm.retained_before,
            retained_after=chosen.retained,
            attack_before=attack,
            attack_after=_attack(after, others),
            outliers=reason in ("validation", "retained") and lost > OUTLIERS * level,
            unlike=math.nan,
            finish=0,
            finish_by="",
            group_size=control.size,
            groups_of=control.of,
            n_validation=len(harm.validation),
            products=space.products,
            tried=trial.tried,
        )
    return Calibrated(block, operator, space, block.removal, harm, found)


class Harm:
    """What losses of validation and retained samples may become."""

    def __init__(
        self,
        validation: "Fetched",
        retained: "Fetched",
        validation_before: float,
        retained_before: float,
        levels: Levels,
        rise: float = RISE,
    ) -> None:
        self._held, self._kept, self._rise = validation, retained, rise
        self.levels = levels
        self.validation_before = self._least = validation_before
        self.retained_before = retained_before
        self._right = None if validation is None else validation.right

    @classmethod
    def of(cls, block: Block, held: Samples) -> "Harm":
        """Measured from the present weights on, on draws from validation and retained samples."""
        work, settings = block.work, block.work.settings
        with work.timed("calibration"):
            rng = np.random.default_rng([settings.seed, 12])
            both = known_classes(held, block, rng), some_of_pool(block, rng)
            validation, retained = (Fetched(work, each) for each in both)
            levels = Levels.of(retained.lost(), validation.lost())
            return cls(
                validation, retained, validation.loss(), retained.loss(), levels, settings.max_rise
            )

    @property
    def validation(self) -> Samples:
        """Samples that were not trained on."""
        return self._held.samples

    @property
    def retained(self) -> Samples:
        """Retained samples that the step does not read."""
        return self._kept.samples

    def now(self) -> tuple[float, float]:
        """Mean losses of validation and retained samples, at the present weights."""
        return self._held.loss(), self._kept.loss()

    @property
    def most(self) -> float:
        """The largest validation loss that is allowed.

        A loss below zero has no size, but a distance from the trained samples'.
        """
        gap = max(0.0, self.validation_before - self.retained_before)
        return self._least + self._rise * (self._least if self._least > 0 else gap)

    def validation_loss(self) -> float:
        """That of the validation samples alone."""
        return self._held.loss()

    def costs_accuracy(self) -> bool:
        """Whether fewer validation samples are right than before, as of the last `now`.

        By more than 0.3%, than two samples, and than half a standard error of the difference: what
        losses hide where samples are near the border of two classes. The caller's score counts for
        accuracy, as it does for the guard.
        """
        if self._right is None or self._held.right is None:
            return False
        falls = self._right - self._held.right
        return float(falls.sum()) > max(2, POINTS * len(falls), float(falls.norm()) / 2)

    def each(self) -> Tensor:
        """The loss of each validation sample, at the present weights."""
        return self._held.losses()

    def each_retained(self) -> Lost:
        """What each retained sample loses, at the present weights."""
        return self._kept.lost()

    def start_again(self) -> None:
        """Judge by the losses before, whatever a step that was tried has gained."""
        self._least = self.validation_before

    def accept(self, validation: float) -> None:
        """Take note of a loss that was reached: what was gained is not given away."""
        self._least = min(self._least, validation)

    def broken(self, validation: float, retained: float, *, restored: bool = False) -> str:
        """Which losses do not hold; NaN does not. Less is asked for before they are restored.

        Validation alone would not do: where a network knows its samples by heart, it loses more on
        validation samples than by guessing, and any damage lowers that.
        """
        if not validation <= self.most:
            return "validation"
        gap = max(self.validation_before - self.retained_before, self.retained_before)
        if not retained <= self.retained_before + (_RESTORED if restored else self._rise) * gap:
            return "retained"
        if restored:
            return ""
        return "retained" if is_much_worse(self.retained_before, retained) else ""


class _Trial:
    """Dampings that are tried."""

    def __init__(
        self,
        block: Block,
        space: Solutions,
        groups: Sequence[Fetched],
        own: Fetched,
        harm: Harm,
        restored: bool,
    ) -> None:
        self.block, self.space, self.groups, self.harm = block, space, groups, harm
        self.own, self.own_before = own, own.loss()
        self.restored, self.tried = restored, 0
        self.bar = progress_bar(False)
        lost = [each.lost() for each in groups]
        self.before = tuple(map(harm.levels.mean, lost))
        self.trained = start = harm.levels.of_trained(Lost.joined([*lost, harm.each_retained()]))
        # Where validation samples lose hardly more than trained ones there is no gap to go by.
        self.target = max(harm.levels.unseen, start + RISE * max(0.0, start))
        if not self.target > start:  # of losses below zero the size says nothing of a gap
            self.target = start + RISE * abs(start)

    def level(self, control: Sequence[float]) -> tuple[float, float]:
        """What trained samples lose, by how the losses of groups rose; and its standard error."""
        mean, error = robust_mean(
            [new - old for new, old in zip(control, self.before, strict=True)]
        )
        return self.trained + mean, error

    @property
    def _most_of_own(self) -> float:
        """What the request may lose; where its samples are hard they move further than others.

        Outliers may lose anything.
        """
        if self.own_before > OUTLIERS * self.target > 0:
            return math.inf
        return self.own_before + OWN * (self.target - self.trained)

    def search(self) -> tuple[_Tried, str]:
        """The least damping that passes, and why less does not: by tens, then bisected."""
        start = _START * self.space.largest or 1.0
        tried = self._try(start)
        if tried.objection:
            for decade in (1, 2, 3):
                bad, tried = tried, self._try(start * 10**decade)
                if not tried.objection:
                    return self._lengthened(*self._bisected(tried, bad))
            return tried, tried.objection
        for decade in range(1, _DECADES + 1):
            damping = start / 10**decade
            if damping < self.space.floor:
                break
            good, tried = tried, self._try(damping)
            if tried.objection:
                return self._lengthened(*self._bisected(good, tried))
        return self._lengthened(tried, "range")

    def _lengthened(self, good: _Tried, reason: str) -> tuple[_Tried, str]:
        """A longer step, where the space is too small for one with less damping."""
        if reason not in self.space.lengthens:
            return good, reason
        bad, shorter = None, None
        for _ in range(_LENGTHS):
            if bad is None:
                length = good.length * self._growth(shorter, good)
            else:
                if self._near(good, bad) or bad.length < _CLOSE * good.length:
                    break
                share = self._share(good, bad)
                length = good.length ** (1 - share) * bad.length**share
            tried = self._try(good.damping, length)
            if tried.objection:
                bad = tried
            else:
                shorter, good = good, tried
        return good, reason if bad is None else bad.objection

    def _growth(self, shorter: _Tried | None, good: _Tried) -> float:
        """How much longer a step should reach the target, by the power that its rise grows with."""
        rise = self.level(good.control)[0] - self.trained
        before = 0.0 if shorter is None else self.level(shorter.control)[0] - self.trained
        wanted = 0.97 * self.target - self.trained
        power = 2.0
        if shorter is not None and 0 < before < rise:
            power = max(1.0, math.log(rise / before) / math.log(good.length / shorter.length))
        if not 0 < rise < wanted:
            return _GROWTH[0]
        return min(max((wanted / rise) ** (1 / power), _GROWTH[0]), _GROWTH[1])

    def _near(self, good: _Tried, bad: _Tried) -> bool:
        reached = self.level(good.control)[0] >= _NEAR * self.target
        return bad.objection == "control" and reached

    def _bisected(self, good: _Tried, bad: _Tried) -> tuple[_Tried, str]:
        for _ in range(_BISECTIONS):
            if self._near(good, bad) or good.damping < _CLOSE * bad.damping:
                break
            share = self._share(good, bad)
            tried = self._try(good.damping ** (1 - share) * bad.damping**share)
            if tried.objection:
                bad = tried
            else:
                good = tried
        return good, bad.objection

    def _share(self, good: _Tried, bad: _Tried) -> float:
        """Where to try between two dampings: where the control groups would reach the target."""
        if bad.objection != "control":
            return 0.5
        low, high = (self.level(each.control)[0] for each in (good, bad))
        if not 0 < low < self.target < high < math.inf:
            return 0.5
        share = math.log(0.97 * self.target / low) / math.log(high / low)
        return min(max(share, 0.1), 0.9)

    def _try(self, damping: float, length: float = 1.0) -> _Tried:
        """What a damping does: to each group its own step, to others the request's."""
        self.tried += 1
        self.bar.update()
        if self.space.least + damping <= 0:
            return _Tried(damping, self.before, math.nan, math.nan, "curvature")
        control = tuple(
            self.harm.levels.mean(self._at((damping, length, k), group.lost))
            for k, group in enumerate(self.groups, start=1)
        )
        if not self.level(control)[0] <= self.target:
            return _Tried(damping, control, math.nan, math.nan, "control", length)
        harm = self.harm
        validation, retained = self._at((damping, length, 0), harm.now)
        objection = harm.broken(validation, retained, restored=self.restored)
        if not objection and not self.restored and harm.costs_accuracy():
            objection = "accuracy"
        if not objection and not self._at((damping, length, 0), self.own.loss) <= self._most_of_own:
            objection = "request"
        if not objection and self.space.residuals(damping).max() > 1:
            objection = "residual"
        if not objection:
            harm.accept(validation)
        return _Tried(damping, control, validation, retained, objection, length)

    def _at(self, step: tuple[float, float, int], measure: Callable[[], _Measured]) -> _Measured:
        """What is measured after a step, which is then undone.

        A step is a damping, a length, and the column of the space that it is for.
        """
        damping, length, column = step
        self.block.put(self.space.solve(damping, column).mul_(length).add_(self.block.start))
        try:
            return measure()
        finally:
            self.block.put(self.block.start)

    def losses(self, chosen: _Tried) -> tuple[list[Tensor], Tensor, float]:
        """Of control samples after their steps, of validation ones after the request's; its own."""
        step = chosen.damping, chosen.length
        control = [self._at((*step, k), each.losses) for k, each in enumerate(self.groups, 1)]
        others, loss = self._at((*step, 0), lambda: (self.harm.each(), self.own.loss()))
        return control, others, loss


def _attack(control: Sequence[Tensor], others: Tensor) -> float:
    """The chance that a control sample loses less than another, ties half: the AUC of losses."""
    values, ranked = torch.cat(list(control)), others.sort().values
    if not bool(torch.isfinite(values).all() & torch.isfinite(ranked).all()):
        return math.nan
    below = torch.searchsorted(ranked, values) + torch.searchsorted(ranked, values, right=True)
    return 1 - float(below.double().mean()) / (2 * len(ranked))


def robust_mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error, of six or more without the highest and the lowest.

    Losses of groups have a heavy tail: one sample in a thousand may carry the mean of its group.
    NaN of none.
    """
    if not len(values):
        return math.nan, math.nan
    kept = sorted(values)[1:-1] if len(values) >= 6 else list(values)
    return float(np.mean(kept)), float(np.std(kept) / math.sqrt(max(1, len(kept) - 1)))


def _usual(block: Block, group: Samples, some: Samples, harm: Harm) -> tuple[Samples, Fetched]:
    """A group, and samples of it whose loss is taken, without those that are above the cap.

    Of a large group the latter alone are left out. All stay where most are above the cap.
    """
    work = block.work
    kept = np.flatnonzero((Fetched(work, some).losses() <= harm.levels.cap).numpy())
    if len(kept) < len(some) / 2:
        return group, Fetched(work, some)
    usual = some.subset(kept.tolist()).loaded()
    return (usual if len(some) == len(group) else group), Fetched(work, usual)


def _direction(block: Block, group: Samples) -> Tensor:
    """What removing a control group would start from, as `Block.removal` is for the request."""
    parameters = {k: block.work.parameters[k] for k in block.layout.parameters}
    _, gradient = block.work.gradient(group, parameters)
    # As large as the request: where the pool has fewer samples their mean stands for all of it.
    return block.layout.gather(gradient).mul_(len(block.part.forget) / block.part.n_retain)
