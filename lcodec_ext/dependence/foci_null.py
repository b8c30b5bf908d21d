"""What chance makes of a step of FOCI: the largest gain of all candidates, with y permuted."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import check_integer, check_positive
from lcodec_ext.dependence.backends.base import Backend, Laid, Ties
from lcodec_ext.dependence.classes import Response
from lcodec_ext.dependence.exchangeable import NearRows
from lcodec_ext.dependence.permutation import (
    Blocks,
    Weighted,
    find_neighbors,
    joined,
    neighbor_pairs,
    reordered,
)

BLOCK = 5  # rows, at least, among which y is permuted once columns are selected
_PAIRS = 1 << 22  # of candidates that share the drawing of permutations
_SUMS = 1 << 24  # of these candidates under all permutations
_BLOCK_PAIRS, _BLOCK_SUMS = 1 << 20, 1 << 21  # beside a table in blocks: 25 and 17 MB
PERMUTATION_BYTES = 512  # kept of each permutation: 190 without ties, with some 500; measured
_CLOSE = 1e-12  # what floats of two coefficients may be off


class Level(NamedTuple):
    """How surely a step must beat chance."""

    alpha: float
    n_permutations: int

    @property
    def most(self) -> int:
        """How many permutations may reach a step's gain, so that its p-value is at most alpha."""
        values = self.n_permutations + 1
        most = math.floor(self.alpha * values)  # or one more or less, as floats are rounded
        while (1 + most) / values > self.alpha:
            most -= 1
        return most


def check_level(stop: object, alpha: object, n_permutations: object) -> Level | None:
    """The level of stop="permutation", None for another stop."""
    if not isinstance(stop, bool | np.bool_) and stop != "permutation":
        error = ValueError if isinstance(stop, str) else TypeError
        raise error(f"stop must be True, False or 'permutation'; got {stop!r}")
    if stop != "permutation":
        for value, name in ((alpha, "alpha"), (n_permutations, "n_permutations")):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} needs stop='permutation'; with stop={stop!r} nothing is "
                    "tested"
                )
        return None
    level = 0.05 if alpha is None else check_positive(alpha, "alpha")
    if level >= 1:
        raise ValueError(f"alpha must be below 1; got {level:g}")
    count = 999 if n_permutations is None else n_permutations
    chosen = Level(level, check_integer(count, "n_permutations", 1, 10**6))
    if chosen.most < 0:
        least = math.floor(1 / level) - 1  # or one more
        while least < 1 or 1 / (least + 1) > level:
            least += 1
        raise ValueError(
            f"n_permutations must be at least {least:,} for alpha={level:g}, as the smallest "
            f"p-value is 1 / (n_permutations + 1); got {count:,}"
        )
    return chosen


class Chance(NamedTuple):
    """What permutations make of a step: of each the largest gain, and whether it is the step's."""

    largest: NDArray[np.float64]
    reached: NDArray[np.bool_]
    exchangeability: float


class StepTest(NamedTuple):
    """Of one step: what its gain must exceed, and two p-values."""

    threshold: float
    pvalue: float
    exchangeability: float  # that y is exchangeable in the blocks; nan where it is permuted freely


class StepNull:
    """Permutations of y for the steps of one selection.

    Parameters
    ----------
    backend : Backend
    responses : list of Response
    ties, seed
        As in `foci`; the seed is that of the permutations, too.
    level : Level
    in_blocks : bool
        Whether the table is read in blocks, so that memory is to be spared.
    """

    def __init__(
        self,
        backend: Backend,
        responses: list[Response],
        ties: Ties,
        seed: int,
        level: Level,
        in_blocks: bool,
    ) -> None:
        self._backend, self._responses = backend, responses
        self._ties, self._seed, self._level = ties, seed, level
        self._most = (_BLOCK_PAIRS, _BLOCK_SUMS) if in_blocks else (_PAIRS, _SUMS)

    def chance(
        self, laid: Laid, selected: list[int], candidates: list[int], gain: Fraction
    ) -> Chance:
        """The largest gains of the candidates under permutations of y.

        They are those over all rows in the first step, and in blocks of rows with near ranks in
        the selected columns in a later one.
        """
        near = NearRows(self._backend, laid.columns.take(selected), BLOCK) if selected else None
        blocks = near.blocks if near else None
        largest = np.full(self._level.n_permutations, -np.inf)
        reached = np.zeros(self._level.n_permutations, dtype=bool)
        base = next(self._values([self._pairs(laid, selected)], blocks)) if selected else None
        lists: list[Weighted] = []
        listed = segments = 0
        most_pairs, most_sums = self._most
        most_segments = most_sums // ((len(largest) + 1) * len(self._responses))
        for k, column in enumerate(candidates, 1):
            lists.append(self._pairs(laid, [*selected, column]))
            listed += lists[-1].pairs.other.size + lists[-1].pairs.label.size
            segments += len(lists[-1].num)
            if k < len(candidates) and listed < most_pairs and segments < most_segments:
                continue
            for values in self._values(lists, blocks):
                gains = values.rounded[1:] - (0 if base is None else base.rounded[1:])
                largest = np.maximum(largest, gains)
                distance = gains - float(gain)
                reached |= distance > _CLOSE
                for b in np.flatnonzero((np.abs(distance) <= _CLOSE) & ~reached).tolist():
                    exact = values.exact(b + 1) - (0 if base is None else base.exact(b + 1))
                    reached[b] = exact >= gain
            lists, listed, segments = [], 0, 0
        kept = math.nan
        if near:
            kept = near.exchangeability(self._responses, self._seed, self._level.n_permutations)
        return Chance(largest, reached, kept)

    def judge(self, chance: Chance) -> StepTest:
        """The test of a step, from what chance makes of all candidates."""
        largest, reached, kept = chance
        at = len(largest) - 1 - self._level.most
        threshold = np.partition(largest, at)[at]
        return StepTest(float(threshold), (1 + int(reached.sum())) / (len(largest) + 1), kept)

    def _pairs(self, laid: Laid, columns: list[int]) -> Weighted:
        table, factors = laid.columns.take(columns), laid.factors[columns]
        found = find_neighbors(self._backend, table, factors, self._ties, self._seed)
        return neighbor_pairs(found)

    def _values(self, lists: list[Weighted], blocks: Blocks | None) -> Iterator["_Values"]:
        """T(Y, Z) of each list's columns in turn, of the data and under permutations of y."""
        pairs = joined(lists)
        start = None
        if blocks is not None:
            pairs, start = reordered(pairs, blocks.position), blocks.start
        sums = []
        for R, _ in self._responses:
            moved = R if blocks is None else R[blocks.order]
            count = self._level.n_permutations + 1
            sums.append(self._backend.permuted_sums(pairs, moved, start, self._seed, count))
        ends = np.cumsum([len(each.num) for each in lists])
        for each, end in zip(lists, ends.tolist(), strict=True):
            yield _Values(self._responses, [s[:, end - len(each.num) : end] for s in sums], each)


class _Values:
    """T of some columns under permutations: as floats, and one of them exactly."""

    def __init__(
        self, responses: list[Response], sums: list[NDArray[np.int64]], weighted: Weighted
    ) -> None:
        self._responses, self._sums, self._weighted = responses, sums, weighted
        num, den = (np.array(part, dtype=np.int64) for part in weighted[1:])
        self.rounded = np.zeros(len(sums[0]))
        for (_, of_y), found in zip(responses, sums, strict=True):
            counted = found * num  # below 2 * 10^18
            whole = (counted // den).sum(axis=1)
            rest = (counted % den / den).sum(axis=1)
            integers = of_y.n * whole - of_y.sum_L2
            self.rounded += (integers + of_y.n * rest) / of_y.denominator
        self.rounded /= len(responses)

    def exact(self, b: int) -> Fraction:
        """T under permutation b."""
        weights = [
            Fraction(num, den)
            for num, den in zip(self._weighted.num, self._weighted.den, strict=True)
        ]
        total = Fraction(0)
        for (_, of_y), found in zip(self._responses, self._sums, strict=True):
            minima = sum(
                (w * s for w, s in zip(weights, found[b].tolist(), strict=True)), Fraction(0)
            )
            total += of_y.unconditional(minima)
        return total / len(self._responses)
