"""Several responses at a time: a weighted sum of the T of each.

`JointSums` and `JointEngine` stand where `exact.ResponseSums` and an `Engine` stand for a single
response. What they pass to each other is one exact sum for each part.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import permutations
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence.backends.base import Leaders, Scores
from lcodec_ext.dependence.exact import FRACTION_BITS, Rational, ResponseSums

Sums = tuple[Fraction, ...]


class PartEngine(Protocol):
    """What a part needs of an engine."""

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""

    def exact_sum(self, column: int) -> Fraction:
        """The total over rows of the mean of min(R_i, R_j)."""

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        """For every candidate `exact_sum` in fixed point, whole and fraction."""


class JointSums:
    """V = sum of w_k (T_k - T_k^0) over parts k, T_k^0 being T_k of no candidate columns.

    Parameters
    ----------
    parts : list of ResponseSums
        The response of every part, none of them constant.
    start : sequence of Fraction
        ``sum m_i`` of every part before a candidate is selected.
    weights : list of Fraction
        w_k, so that V is 1 where all T_k are 1.
    """

    constant = False

    def __init__(
        self, parts: list[ResponseSums], start: Sequence[Fraction], weights: list[Fraction]
    ) -> None:
        self.parts, self.weights = parts, weights
        self.start: Sums = tuple(start)
        values = zip(parts, self.start, weights, strict=True)
        self._base = sum((w * part.unconditional(m) for part, m, w in values), Fraction(0))

    def floor(self, m: Sums) -> int:
        """None: no part may lose a candidate that another one needs."""
        return 0

    def gains(self, m: Sums, before: Sums, least: Rational) -> bool:
        """Whether V of m exceeds that of earlier sums by more than the least."""
        return self.unconditional(m) - self.unconditional(before) > least

    def value(self, m: Sums) -> float:
        """V of Z, rounded once."""
        return float(self.unconditional(m))

    def unconditional(self, m: Sums) -> Fraction:
        """V of Z, for T(Y, Z)."""
        values = zip(self.parts, m, self.weights, strict=True)
        return sum((w * part.unconditional(s) for part, s, w in values), -self._base)

    def conditional(self, m_w: Sums, m_x: Sums) -> Fraction | None:
        """(V(X, Z) - V(X)) / (1 - V(X)), for T(Y, Z | X); None if Y is a function of X.

        Of one part this is the T of `ResponseSums`.
        """
        given = self.unconditional(m_x)
        return None if given == 1 else (self.unconditional(m_w) - given) / (1 - given)


class JointEngine:
    """An engine for each part, all of them over the same columns."""

    piece = 2**62  # all candidates at a time

    def __init__(self, engines: Sequence[PartEngine], sums: JointSums) -> None:
        self._engines, self._sums = engines, sums

    def select(self, column: int) -> None:
        """Add a column to the conditioning set of every part."""
        for engine in self._engines:
            engine.select(column)

    def exact_sum(self, column: int) -> Sums:
        """The exact sum of every part."""
        return tuple(engine.exact_sum(column) for engine in self._engines)

    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        """Candidates within a bound on rounding of the best; the caller compares exact sums."""
        values = np.zeros(len(columns))
        slack = 0.0
        parts = zip(self._engines, self._sums.parts, self._sums.weights, strict=True)
        for engine, sums, weight in parts:
            whole, fraction = engine.score(columns)
            # integers below 2**63: floats need not hold a small difference of large sums
            numerators = sums.n * whole - sums.sum_L2
            share = fraction.astype(np.float64) * 2.0**-FRACTION_BITS
            each = float(weight) * (numerators + sums.n * share) / sums.denominator
            values += each
            slack += 2.0**-40 * (1 + float(np.abs(each).max(initial=0)))
            slack += sums.n**2 * 2.0**-FRACTION_BITS / sums.denominator  # rows are rounded down
        near = columns[values >= values.max(initial=-np.inf) - slack]
        return near, np.zeros_like(near), np.ones_like(near)


def several_responses(
    ranks: list[tuple[Any, Any]],
    columns: list[int],
    engine_of: Callable[[Any], PartEngine],
    average: bool,
) -> tuple[JointSums, JointEngine]:
    """T^q of q responses (Ansari and Fuchs), of one part for each T(Y_i, (Y_A, X)) in it.

    The responses A before Y_i are conditioned on first, in their order.

    Parameters
    ----------
    ranks : list of (R, L)
        Of every response, none of which is constant.
    columns : list of int
        The columns of the table that have their values; the last response needs none, unless
        orders are averaged.
    engine_of : callable
        An engine for max ranks R.
    average : bool
        The mean over all orders of the responses, instead of theirs.
    """
    q = len(ranks)
    orders = list(permutations(range(q))) if average else [tuple(range(q))]
    steps = [[(i, frozenset(order[:k])) for k, i in enumerate(order)] for order in orders]
    sums, engines, start = [], [], {}
    for part in dict.fromkeys(step for order in steps for step in order):
        response, before = part
        sums.append(ResponseSums(*ranks[response]))
        engines.append(engine_of(ranks[response][0]))
        start[part] = sums[-1].start
        for k, other in enumerate(sorted(before)):
            if k == len(before) - 1:
                start[part] = engines[-1].exact_sum(columns[other])
            engines[-1].select(columns[other])
    base = {part: each.unconditional(start[part]) for part, each in zip(start, sums, strict=True)}
    left = [q - sum((base[step] for step in order), Fraction(0)) for order in steps]
    weights = []
    for part in start:
        shares = [rest for rest, order in zip(left, steps, strict=True) if part in order]
        # a sum of 1 / share, whose terms are made one fraction at the end
        below = prod(share.numerator for share in shares)
        above = sum(share.denominator * (below // share.numerator) for share in shares)
        weights.append(Fraction(above, below * len(orders)))
    joint = JointSums(sums, list(start.values()), weights)
    return joint, JointEngine(engines, joint)
