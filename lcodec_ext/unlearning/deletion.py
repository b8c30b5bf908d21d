"""The removal of some samples at once: select, step, guard."""

from collections.abc import Iterator
from dataclasses import dataclass

from lcodec_ext.curvature import (
    IndefiniteCurvatureError,
    Selection,
    SolveResult,
    UnitSelection,
)
from lcodec_ext.unlearning.guard import Attempt, Watch, guarded_step
from lcodec_ext.unlearning.request import Part
from lcodec_ext.unlearning.rules import RULES
from lcodec_ext.unlearning.select import Choice, NothingSelectedError, choose, joined
from lcodec_ext.unlearning.step import Block, Steps
from lcodec_ext.unlearning.workplace import Workplace

_ROUNDS = 100  # after which a repeated selection ends in any case; the paper has no such end


@dataclass(frozen=True, eq=False)
class Deletion:
    """What was done to remove some samples at once."""

    numbers: list[int]  # their positions in the request
    selection: Selection  # what was changed, or if all was taken back, what was tried
    choice: Choice  # the last one
    rounds: tuple[tuple[Attempt, ...], ...]  # attempts for each selection; with "cheap" several
    failure: str = ""  # why there is no step

    @property
    def skipped(self) -> bool:
        """Whether there is none, or it was taken back; a later unit of "cheap" is so alone."""
        return not self.rounds[0][-1].accepted

    @property
    def attempts(self) -> Iterator[Attempt]:
        """The attempts of all rounds."""
        return (attempt for attempts in self.rounds for attempt in attempts)

    @property
    def last(self) -> Attempt:
        """The last attempt."""
        return self.rounds[-1][-1]

    @property
    def solves(self) -> list[SolveResult]:
        """Solves of each round's last attempt."""
        return [solve for attempts in self.rounds for solve in attempts[-1].steps.solves]

    @property
    def n_gradient(self) -> int:
        """Gradient steps of these attempts."""
        return sum(attempts[-1].steps.n_gradient for attempts in self.rounds)

    @property
    def plan(self) -> str:
        """How products with the last matrix were computed."""
        return next((a.steps.plan for a in reversed(list(self.attempts)) if a.steps.plan), "")


def delete(work: Workplace, part: Part, watch: Watch, *, goes_on: bool = False) -> Deletion:
    """Remove some samples from the model of the workplace.

    With a repeated selection one unit is selected after the other, at the weights that the step
    on the one before has left. Where the paper's way finds no step, `goes_on` says to leave the
    weights as they are, and to say so, instead of refusing the request.
    """
    selection = work.settings.selection
    repeated = isinstance(selection, str) and RULES[selection].repeated
    taken: Selection | None = None
    rounds: list[tuple[Attempt, ...]] = []
    for number in range(work.settings.n_units or _ROUNDS if repeated else 1):
        try:
            choice, attempts = _round(work, part, watch, taken)
        except (NothingSelectedError, IndefiniteCurvatureError) as error:
            secant = work.settings.curvature == "secant"
            if not goes_on or not (secant or isinstance(error, NothingSelectedError)):
                raise
            if number:  # one unit less
                break
            choice = Choice(UnitSelection({}), 0)
            tried = Attempt(work.settings.damping, Steps(), accepted=False)
            return Deletion(part.numbers, choice.selection, choice, ((tried,),), str(error))
        if number and not choice.selection:
            break
        rounds.append(attempts)
        accepted = attempts[-1].accepted
        if accepted or not number:
            taken = joined(taken, choice.selection)
        if not accepted or choice.zero_loss:
            break
    assert taken is not None  # the first round is always taken
    return Deletion(part.numbers, taken, choice, tuple(rounds))


def _round(
    work: Workplace, part: Part, watch: Watch, taken: Selection | None
) -> tuple[Choice, tuple[Attempt, ...]]:
    """A selection and its attempts; none if a later one is empty, one without a step at loss 0."""
    with work.timed("gradients"):
        gradient = work.gradient(part.forget)[1]
    choice = choose(work, part, gradient, taken)
    if choice.zero_loss:
        return choice, (Attempt(work.settings.damping, Steps()),)
    if taken is not None and not choice.selection:
        return choice, ()
    block = Block.of(work, part, choice.selection, gradient)
    del gradient  # as large as the model
    if not isinstance(work.settings.selection, str) or work.settings.selection == "full":
        watch.before.settle(block.layout)  # other rules may select more later on
    try:
        return choice, guarded_step(block, watch)
    except IndefiniteCurvatureError:
        block.restore(block.start, block.buffers)
        raise
