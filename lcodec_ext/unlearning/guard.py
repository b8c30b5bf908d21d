"""The guard: whether a step did harm, and what is then done about it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from lcodec_ext._torch.loss import NotFiniteError
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.calibrate import Calibrated, Calibration, Harm, calibrated
from lcodec_ext.unlearning.control import control_groups, of_classes_that_stay
from lcodec_ext.unlearning.finish import (
    UNLIKE,
    Finish,
    finish_alone,
    finish_step,
    form,
    unlikeness,
)
from lcodec_ext.unlearning.groups import FEWEST
from lcodec_ext.unlearning.repair import recalibrate, repair
from lcodec_ext.unlearning.request import Request
from lcodec_ext.unlearning.step import Block, Steps, take_steps
from lcodec_ext.unlearning.workplace import Measured, Workplace

_LONGEST = 8.0  # multiple of a step, by lengthening it
LENGTHS = 6  # that are tried
_ERRORS = 2.0  # standard errors that a rise of losses may be chance
_CLASSIFIED = 0.01  # a rise of a classifier's mean loss up to this does no harm
_SHORT = 1.0  # relative residual of a step that falls short


@dataclass(frozen=True, eq=False)
class Guard:
    """Watches one number for harm; larger is better."""

    work: Workplace
    samples: Samples
    watched: str  # the name of the number
    before: float  # its value at the start
    losses: Tensor  # (n,): of the samples, at the start
    each: Tensor  # (n,): what `before` is the mean of
    unit: float = 1.0  # what falls are counted in

    @classmethod
    def of(cls, work: Workplace, samples: Samples) -> "Guard":
        """Watch samples from the present weights on."""
        with work.timed("guard"):
            quality = work.quality(samples)
            return cls(work, samples, *quality, unit=work.unit(samples, quality))

    def now(self) -> float:
        """The present value, minus infinity where the outputs of the model are not finite."""
        with self.work.timed("guard"):
            try:
                return self.work.quality(self.samples).value
            except ValueError:  # anything else would have failed at the start
                return -math.inf

    def falls(self) -> Tensor:
        """By how much each sample's part of the number fell since the start, shape (n,)."""
        with self.work.timed("guard"):
            return self.each - self.work.quality(self.samples).each

    def harm(self) -> str:
        """How the samples' mean loss rose, if it did by more than half and more than by chance.

        In the losses' own scale, for any task: accuracy may stay at 1 while losses multiply.
        Where accuracy is watched, a rise of 0.01 passes.
        """
        with self.work.timed("guard"):
            rise = self.work.quality(self.samples).losses - self.losses
        mean, before = float(rise.mean()), float(self.losses.mean())
        chance = _ERRORS * float(rise.std(correction=0)) / math.sqrt(len(rise))
        floor = _CLASSIFIED if self.watched in ("accuracy", "token accuracy") else 0.0
        if mean <= abs(before) / 2 + chance + floor:
            return ""
        return f"the samples that the guard watches from {before:.3g} to {before + mean:.3g}"

    @property
    def most(self) -> float:
        """The largest fall that is allowed."""
        most = self.work.settings.max_drop
        return math.inf if most is None else most * self.unit

    def allows(self, value: float) -> bool:
        """Whether the fall since the start is within max_drop. NaN is refused."""
        return self.work.settings.max_drop is None or self.before - value <= self.most


@dataclass(frozen=True, eq=False)
class Watch:
    """The guard of a deletion, and the samples on which a step may be lengthened."""

    guard: Guard | None
    unread: Samples | None  # retained samples that the step has not read
    validation: Samples | None  # to calibrate by
    before: Measured

    @classmethod
    def of(cls, work: Workplace, request: Request, before: Measured) -> "Watch":
        """What the settings ask to watch, from the present weights on."""
        settings, held = work.settings, request.validation
        guarded = settings.max_drop is not None or settings.repair_drop is not None
        unread = None
        if request.kept is not None and (
            settings.lengthen is not None or (guarded and held is None)
        ):
            unread = request.kept.unread()
        held = unread if held is None else held
        if not guarded:
            return cls(None, unread, request.validation, before)
        assert held is not None  # requests without are refused beforehand
        if request.kept is not None and request.kept.pool is not None:
            held = of_classes_that_stay(held, request.kept.pool)
        return cls(Guard.of(work, held), unread, request.validation, before)


@dataclass(frozen=True)
class Attempt:
    """A step that was tried."""

    damping: float
    steps: Steps
    length: float = 1.0  # multiple of the step that was taken
    repaired: bool = False
    value: float = math.nan  # what the guard saw afterwards
    accepted: bool = True
    calibration: Calibration | None = None


def guarded_step(block: Block, watch: Watch) -> tuple[Attempt, ...]:
    """Step until the guard accepts it, with ten times the damping each time; else restore."""
    settings = block.work.settings
    damping, rate = settings.damping, settings.learning_rate
    unread_loss = math.nan
    if settings.lengthen is not None and watch.unread is not None:
        unread_loss = block.work.mean_loss(watch.unread)
    attempts: list[Attempt] = []
    found = None
    if settings.calibrate:
        assert watch.validation is not None  # requests without are refused beforehand
        harm = Harm.of(block, watch.validation)
        instead, unlike, undone = _instead_of_a_step(block, watch.guard, harm)
        if instead is not None:
            return (instead,)
        found = calibrated(block, harm, restored=form(block) == "batches")
        found = replace(found, found=replace(found.found, unlike=unlike, finish_by=undone))
        damping = found.found.strength
    for _ in range(settings.retries + 1):
        if found is None:
            attempts.append(_attempt(block, watch, unread_loss, damping, rate))
        else:
            attempts.append(_calibrated_attempt(block, watch.guard, found, damping))
        if attempts[-1].accepted:
            break
        block.restore(block.start, block.buffers)
        damping = max(10 * damping, 1e-4)
        rate /= 10
    return tuple(attempts)


def _attempt(
    block: Block, watch: Watch, unread_loss: float, damping: float, rate: float
) -> Attempt:
    guard = watch.guard
    steps = take_steps(block, damping, rate)
    damping = damping if steps.damping is None else steps.damping
    if steps.failure is not None:
        if guard is None:
            raise steps.failure
        return Attempt(damping, steps, value=-math.inf, accepted=False)
    recalibrate(block)
    length, harmed = _adjusted(block, watch, unread_loss, steps)
    repaired = bool(block.work.settings.repair_epochs) and harmed and _repaired(block, guard)
    if guard is None:
        return Attempt(damping, steps, length, repaired)
    value = guard.now()
    return Attempt(damping, steps, length, repaired, value, guard.allows(value))


def _instead_of_a_step(
    block: Block, guard: Guard | None, harm: Harm
) -> tuple[Attempt | None, float, str]:
    """The finish alone, where that does; how unlike others the request is; what was undone.

    None, and everything as before, where it forgets too little or does harm: then the step is
    calibrated.
    """
    how = form(block)
    if not how:
        return None, math.nan, ""
    with block.work.timed("calibration"):
        unlike = unlikeness(block, harm.retained)
        outliers = unlike >= UNLIKE
        if how == "batches" and not outliers:
            return None, unlike, ""
        rng = np.random.default_rng([block.work.settings.seed, 13])
        control = control_groups(block, rng, FEWEST)
        if control.of == "classes" and not outliers:  # validation samples say nothing of them
            return None, unlike, ""
        before = tuple(block.work.mean_loss(each) for each in control.groups)
    done = finish_alone(block, harm, outliers=outliers, known=False)
    if done is None:
        why = "training on the retained samples alone left the deleted ones too low a loss"
        return None, unlike, f"undone: {why}"
    found = Calibration.without_a_step(harm, control, before, unlike, outliers)
    attempt = _finished(block, guard, harm, found, Steps(), done)
    if not attempt.accepted and (more := finish_step(block, harm)) is not None:
        done = Finish(done.steps + more.steps, f"{done.by}; then held, for retained samples")
        attempt = _finished(block, guard, harm, found, Steps(), done)
    if attempt.accepted:
        return attempt, unlike, ""
    block.restore(block.start, block.buffers)
    return None, unlike, f"undone: {done.by}, alone, did harm"


def _calibrated_attempt(
    block: Block, guard: Guard | None, calibrated: Calibrated, damping: float
) -> Attempt:
    """A step of a damping, and the finish if it does no harm.

    It is refused if validation or retained losses do not hold, whatever the guard's accuracy says.
    """
    harm, found = calibrated.harm, replace(calibrated.found, strength=damping)
    steps = calibrated.step(damping)
    harm.start_again()
    theta, done = block.now(), None
    if found.outliers and block.work.settings.finish != 0:
        done = finish_alone(block, harm, outliers=True, known=True)
    elif block.work.settings.finish != 0:
        done = finish_step(block, harm)
    if done is not None:
        attempt = _finished(block, guard, harm, found, steps, done)
        if attempt.accepted:
            return attempt
        found = replace(found, finish_by=_and(f"undone: {done.by}, did harm", found.finish_by))
    block.restore(theta, block.buffers)
    return _finished(block, guard, harm, found, steps, Finish())


def _and(*texts: str) -> str:
    return "; before, ".join(text for text in texts if text)


def _finished(
    block: Block, guard: Guard | None, harm: Harm, found: Calibration, steps: Steps, done: Finish
) -> Attempt:
    """An attempt as it now stands, and whether it is accepted."""
    with block.work.timed("guard"):
        validation, retained = harm.now()
    value = math.nan if guard is None else guard.now()
    found = replace(
        found,
        validation_after=validation,
        retained_after=retained,
        finish=done.steps,
        finish_by=_and(done.by, found.finish_by),
    )
    holds = not harm.broken(validation, retained)
    solved = steps.residual <= _SHORT  # by products, where the search went by the recurrence
    accepted = solved and holds and (guard is None or guard.allows(value))
    return Attempt(found.strength, steps, value=value, accepted=accepted, calibration=found)


def _adjusted(block: Block, watch: Watch, unread_loss: float, steps: Steps) -> tuple[float, bool]:
    """Halve a step that does harm, lengthen one that does little; its length, whether to repair."""
    settings, guard = block.work.settings, watch.guard
    whole = block.now() - block.start

    def take(length: float) -> None:
        block.put(block.start + length * whole)
        recalibrate(block)

    def small() -> bool:
        assert watch.unread is not None
        assert settings.lengthen is not None
        rise = block.work.mean_loss(watch.unread) - unread_loss
        unit = 1.0 if guard is None else guard.unit
        return rise <= settings.lengthen * unit * len(block.part.forget)  # false for nan

    short = bool(steps.solves) and steps.solves[-1].residual > _SHORT
    lengthens = short and settings.lengthen is not None and watch.unread is not None
    length = 1.0
    if guard is None:
        return (_lengthened(take, small, length) if lengthens else length), True
    fall = guard.before - guard.now()
    harmed = settings.repair_drop is None or fall > settings.repair_drop * guard.unit
    for halving in range(1, settings.halvings + 1):
        if fall <= guard.most:
            break
        length = 0.5**halving
        take(length)
        fall = guard.before - guard.now()
    if lengthens and not harmed:
        length = _lengthened(take, small, length)
    return length, harmed


def _lengthened(take: Callable[[float], None], small: Callable[[], bool], length: float) -> float:
    """Lengthen a step that ended early, until the retained loss has risen enough."""
    low, high = 1.0, math.inf
    if not small():
        return length
    for _ in range(LENGTHS):
        length = 2 * low if high == math.inf else (low + high) / 2
        take(length)
        low, high = (length, high) if small() else (low, length)
        if low == _LONGEST:
            return low
    take(low)
    return low


def _repaired(block: Block, guard: Guard | None) -> bool:
    """Repair; take that back if it does harm itself, as a large learning rate may.

    Harm is a loss of some accuracy only past max_drop: on samples that the model has memorised
    any training costs a little.
    """
    theta = block.now()
    buffers = {k: b.clone() for k, b in block.work.model.named_buffers()}
    before = math.nan if guard is None else guard.now()
    failed = False
    with block.work.timed("repair"):
        try:
            repair(block)
        except NotFiniteError:
            if guard is None:
                raise
            failed = True
    if guard is None:
        return True
    after = -math.inf if failed else guard.now()
    most = 0.0 if block.work.settings.max_drop is None else guard.most
    if after < before and guard.before - after > most:
        block.restore(theta, buffers)
        return False
    return True
