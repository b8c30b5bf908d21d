"""The columns that a selection chooses from: one greedy step over them, decided exactly."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import Laid, Leaders
from lcodec_ext.dependence.backends.block_table import BlockTable
from lcodec_ext.dependence.foci_null import Chance, StepNull, StepTest
from lcodec_ext.dependence.scaling import Label, check_overflow, far_from_overflow

Make = Callable[[Laid], tuple[Any, Any]]  # sums of a response and an engine over a table


class Candidates:
    """The first columns of a table, those selected and those left, and the engine over them.

    Parameters
    ----------
    make : callable
        Makes the sums of a response, and an engine, for `laid`.
    laid : Laid
    p : int
        How many of its columns may be selected; those of y that are in distances come last.
    given : int
        How many columns of y are in distances.
    label : callable
        What messages call a column.
    """

    def __init__(self, make: Make, laid: Laid, p: int, given: int, label: Label) -> None:
        self._make = make
        self.laid = laid
        self.response, self._engine = make(laid)
        self._reach = Reach(laid.spans, label)
        for column in range(len(laid.factors) - given, len(laid.factors)):
            self._reach.add(column)
        self.selected: list[int] = []
        self._left = np.arange(p)

    @property
    def count(self) -> int:
        """How many columns are left to select from."""
        return len(self._left)

    def leave_out(self, column: int) -> None:
        """Never select a column."""
        self._left = self._left[self._left != column]

    def add(self, column: int, *, measure: bool = False) -> Any:
        """Condition on a column, after those selected; returns their exact sum, if wanted."""
        self._reach.add(column)
        found = self._engine.exact_sum(column) if measure else None
        self._engine.select(column)
        self.selected.append(column)
        self.leave_out(column)
        self._check_unchanged()
        return found

    def replace(self, laid: Laid) -> None:
        """Go on with a table that has other columns behind those that may be selected."""
        self.laid = laid
        _, self._engine = self._make(laid)
        for column in self.selected:
            self._engine.select(column)

    def best(self, floor: int, bar: Any, step: int) -> tuple[int, Any] | None:
        """The best column and its exact sum, the lowest index on equality; None if none is left.

        Those whose sum is at most the floor need not be found. `bar`, if there is one, shows the
        progress of the step.
        """
        return self.exact_best(self.leaders(floor, bar, step))

    def leaders(self, floor: int, bar: Any, step: int) -> Leaders:
        """The columns that may be the best and their scores, found in pieces where a bar shows."""
        left, engine = self._left, self._engine
        self._reach.check(left)
        if bar is None and len(left):
            found: Leaders = engine.leaders(left, floor)
            self._check_unchanged()
            return found
        if not len(left):
            return left, left, left
        bar.set_description(f"FOCI step {step}")
        bar.reset(total=len(left))
        parts = []
        for start in range(0, len(left), engine.piece):
            piece = left[start : start + engine.piece]
            parts.append(engine.leaders(piece, floor))
            # a candidate with an equal sum is still wanted
            floor = max(floor, int(parts[-1][1].max(initial=0)) - 1)
            bar.update(len(piece))
        self._check_unchanged()
        columns, whole, fraction = (np.concatenate(each) for each in zip(*parts, strict=True))
        return exact.contenders(columns, whole, fraction)

    def exact_best(self, leaders: Leaders) -> tuple[int, Any] | None:
        """The leader whose exact sum has the largest value, the lowest on equality, and that sum.

        None if there are no leaders.
        """
        columns, whole, fraction = leaders
        if len(columns) == 0:
            return None
        if not len(fraction.nonzero()[0]):  # exact, and so equal
            return int(columns[columns.argmin()]), int(whole[0])
        sums = {int(column): self._engine.exact_sum(int(column)) for column in np.sort(columns)}
        self._check_unchanged()
        if len(sums) == 1:
            return next(iter(sums.items()))
        best = max(sums, key=lambda column: self.response.unconditional(sums[column]))
        return best, sums[best]

    def test(self, null: StepNull, gain: Fraction) -> StepTest:
        """Whether chance makes a gain of the columns left."""
        return null.judge(self.chance(null, gain))

    def chance(self, null: StepNull, gain: Fraction) -> Chance:
        """What chance makes of the columns left."""
        chance = null.chance(self.laid, self.selected, self._left.tolist(), gain)
        self._check_unchanged()
        return chance

    def _check_unchanged(self) -> None:
        """Refuse files that were written since they were opened, behind all that reads them."""
        if isinstance(self.laid.columns, BlockTable):
            self.laid.columns.check_unchanged()


class Reach:
    """A bound on squared distances in the columns selected so far; refuses what overflows."""

    def __init__(self, spans: NDArray, label: Label) -> None:
        self.spans, self._label, self._bound = spans, label, spans.dtype.type(0)
        self.far = far_from_overflow(spans)  # whatever is selected, while spans stay as they are

    def check(self, columns: Sequence[int] | NDArray[np.int64]) -> None:
        """Refuse columns any of which would overflow beside those selected."""
        if self.far:
            return
        with np.errstate(over="ignore", under="ignore"):
            bounds = self._bound + self.spans[columns]
        check_overflow(bounds, lambda k: self._label(int(columns[k])))

    def add(self, column: int) -> None:
        """Select a column, and refuse one that overflows."""
        self.check([column])
        self._bound = self._bound + self.spans[column]
