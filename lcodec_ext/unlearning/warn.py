"""What a deletion warns of."""

from collections.abc import Sequence

from lcodec_ext._callers import warn
from lcodec_ext._checks import counted, first_few
from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext.curvature.parameters import find_parameters
from lcodec_ext.unlearning.deletion import Deletion
from lcodec_ext.unlearning.guard import Guard
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.rules import RULES
from lcodec_ext.unlearning.select import no_unit
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Measured, Workplace


def warn_of_skipped(
    deletions: Sequence[Deletion], guard: Guard | None, settings: Settings, m: int
) -> None:
    """Warn of steps that were taken back, and of fewer units than were asked for."""
    _warn_of_failed(deletions, m)
    skipped = sum(len(d.numbers) for d in deletions if d.skipped and not d.failure)
    if skipped:
        warn(
            f"the removal of {skipped} of {counted(m, 'sample')} was taken back: in every attempt "
            f"it changed {_refusal(deletions, guard, settings)}. "
            f"{'This sample needs' if skipped == 1 else 'These samples need'} retraining",
        )
    _warn_of_zero_loss(deletions)
    selected = [len(d.selection) for d in deletions if not (d.choice.zero_loss or d.failure)]
    rule = RULES.get(settings.selection) if isinstance(settings.selection, str) else None
    repeated = rule is not None and rule.repeated
    most = settings.n_units
    if not repeated and most is not None and selected and min(selected) < most:
        warn(
            f"n_units is {most}, and only {counted(min(selected), 'unit')} can be ranked: the "
            "others are dead, or there are no more",
        )


def _need_retraining(n: int) -> str:
    return f"{'This sample needs' if n == 1 else 'These samples need'} retraining"


def _warn_of_failed(deletions: Sequence[Deletion], m: int) -> None:
    """Warn of samples for which there is no step, with the first reason."""
    failed = [d for d in deletions if d.failure]
    if failed:
        n = sum(len(d.numbers) for d in failed)
        warn(
            f"no step was found for {n} of {counted(m, 'sample')}, which the model still knows. "
            f"{_need_retraining(n)}. {failed[0].failure[:1].upper()}{failed[0].failure[1:]}"
        )


def _warn_of_zero_loss(deletions: Sequence[Deletion]) -> None:
    """Warn of samples whose loss is 0, and which are deleted without a step."""
    idle = sum(len(d.numbers) for d in deletions if d.choice.zero_loss and not d.selection)
    if idle:
        warn(f"{no_unit(counted(idle, 'sample'))}, and the step leaves the weights as they are")


def warn_of_left_out(work: Workplace) -> None:
    """Warn of trainable parameters that selection="full", or any choice of units, cannot change."""
    if work.settings.selection != "full":
        _warn_of_those_without_units(work)
        return
    left = {k: p for k, p in find_parameters(work.model).items() if k in work.parameters}
    left = {k: p for k, p in left.items() if p.refused}
    if left:
        n = sum(each.parameter.numel() for each in left.values())
        names = first_few([f"{k!r} ({each.refused})" for k, each in left.items()], 3)
        warn(
            f"selection='full' leaves {n:,} of {work.n_trainable:,} trainable parameters as they "
            f"are: {names}",
        )


def _warn_of_those_without_units(work: Workplace) -> None:
    """Warn of trainable parameters that a rule which selects units passes over."""
    rule, left = work.settings.selection, work.without_units
    if not isinstance(rule, str) or rule == "step" or work.settings.candidates != "all":
        return  # a choice of the user's is meant so
    if left and len(left) < len(work.parameters):  # a model without any unit is refused
        names = first_few(list(map(repr, left)), 3)
        warn(
            f"selection={rule!r} selects units, and {sum(left.values()):,} of "
            f"{work.n_trainable:,} trainable parameters belong to none: {names}. They stay as they "
            "are; selection='full' and 'step' change such parameters, too",
        )


def _refusal(deletions: Sequence[Deletion], guard: Guard | None, settings: Settings) -> str:
    """What the last attempt that was refused had changed."""
    refused = [a for d in deletions if not d.failure for a in d.attempts if not a.accepted][-1]
    found = refused.calibration
    if found is not None and not refused.steps.residual <= 1:
        return (
            "the weights by what solves nothing: the relative residual of the last one is "
            f"{refused.steps.residual:.2g}, and that of no step is 1"
        )
    if found is not None and (guard is None or guard.allows(refused.value)):
        return (
            f"losses by more than {settings.max_rise:.0%}, in the last one those of validation "
            f"samples from {found.validation_before:.3g} to {found.validation_after:.3g} and of "
            f"retained ones from {found.retained_before:.3g} to {found.retained_after:.3g}"
        )
    assert guard is not None  # nothing else takes back
    return (
        f"{guard.watched} by more than max_drop={settings.max_drop:g} allows"
        + ("" if guard.unit == 1 else f" (in units of {guard.unit:.3g})")
        + f", in the last one by {refused.value - guard.before:.3g}"
    )


def _warn_of_residual(deletions: Sequence[Deletion]) -> None:
    """Warn if any step that was kept is worse than none as a solution of its system."""
    kept = [a.steps.residual for d in deletions for a in d.attempts if a.accepted]
    unsolved = [residual for residual in kept if not residual <= 1]
    if not unsolved:
        return
    which, its, largest = "the step does", "its system", ""
    if len(kept) > 1:
        which = f"{len(unsolved)} of {len(kept)} steps {'does' if len(unsolved) == 1 else 'do'}"
    if len(unsolved) > 1:
        its, largest = "their systems", "largest "
    warn(
        f"{which} not solve {its}: the {largest}relative residual is {max(unsolved):.2g}, and "
        "that of no step is 1. Take a larger damping or more max_iterations",
    )


def warn_of_harm(
    before: Measured,
    after: Measured,
    guarantee: Guarantee,
    deletions: Sequence[Deletion],
    guard: Guard | None,
) -> None:
    """Warn if losses rose by much, and of a solution that is worse than none."""
    last = deletions[-1].last
    _warn_of_residual(deletions)
    unit = 1.0 if guard is None else guard.unit
    if is_much_worse(before.retained_loss, after.retained_loss, unit):
        found = f"the retained samples from {before.retained_loss:.3g} to {after.retained_loss:.3g}"
    else:
        found = guard.harm() if guard is not None and guarantee.sigma == 0 else ""
    if not found:
        return
    if guarantee.sigma > 0:
        why = (
            f". This includes the noise for epsilon={guarantee.epsilon:g}, whose standard "
            f"deviation is {guarantee.sigma:.3g}; a larger epsilon or weight decay takes less noise"
        )
    else:
        why = (
            ". It went too far, as happens where training did not end at a stationary point. Take "
            f"a larger damping (it was {last.damping:.3g}); 10 to 1000 times as much is common for "
            "networks"
        )
    warn(
        f"the step raised the mean loss of {found}{why}",
    )
