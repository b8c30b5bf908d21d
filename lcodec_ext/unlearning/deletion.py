"""The removal of some samples at once: select, step, guard."""

from collections.abc import Iterator
from dataclasses import dataclass

from lcodec_ext.curvature import Selection, SolveResult
from lcodec_ext.unlearning.guard import Attempt, Watch, guarded_step
from lcodec_ext.unlearning.request import Part
from lcodec_ext.unlearning.rules import RULES
from lcodec_ext.unlearning.select import Choice, choose, joined
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

    @property
    def skipped(self) -> bool:
        """Whether the removal was taken back; a later unit of "cheap" is taken back alone."""
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


def delete(work: Workplace, part: Part, watch: Watch) -> Deletion:
    """Remove some samples from the model of the workplace.

    With a repeated selection one unit is selected after the other, at the weights that the step
    on the one before has left.
    """
    selection = work.settings.selection
    repeated = isinstance(selection, str) and RULES[selection].repeated
    taken: Selection | None = None
    rounds: list[tuple[Attempt, ...]] = []
    for number in range(work.settings.n_units or _ROUNDS if repeated else 1):
        with work.timed("gradients"):
            gradient = work.gradient(part.forget)[1]
        choice = choose(work, part, gradient, taken)
        if not choice.selection:
            if not number:  # the loss is 0, whatever is perturbed
                taken = choice.selection
                rounds.append((Attempt(work.settings.damping, Steps()),))
            break
        block = Block.of(work, part, choice.selection, gradient)
        del gradient  # as large as the model
        rounds.append(guarded_step(block, watch))
        accepted = rounds[-1][-1].accepted
        if accepted or not number:
            taken = joined(taken, choice.selection)
        if not accepted:
            break
    assert taken is not None  # the first round is always taken
    return Deletion(part.numbers, taken, choice, tuple(rounds))
