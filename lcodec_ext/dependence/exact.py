"""Exact sums and the coefficients made of them: the one place where a T is divided.

Backends deliver integers: for each row the sum ``S_i`` of ``min(R_i, R_j)`` over its ``c_i``
tied neighbours. What is compared or reported is the rational ``sum_i S_i / c_i``.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rational = int | Fraction  # arithmetic on integers is much quicker

FRACTION_BITS = 43  # n * 2**43 < 2**63 up to n = 2**20
_HALF_BITS = 26
_HALF = (1 << _HALF_BITS) - 1
MAX_ROUNDING = 1 << 20  # units of 2**-43 that a fixed-point sum can lie below its exact one


def sum_of_ratios(numerators: Sequence[int], denominators: Sequence[int]) -> Fraction:
    """``sum_k numerators[k] / denominators[k]`` over a few positive denominators."""
    if len(denominators) == 1:
        return Fraction(numerators[0], denominators[0])
    common = math.lcm(*denominators)
    shares = zip(numerators, denominators, strict=True)
    return Fraction(sum(number * (common // share) for number, share in shares), common)


def total(sums: NDArray[np.int64], counts: NDArray[np.int64]) -> Fraction:
    """``sum_i sums[i] / counts[i]``: rows of equal count are added as integers.

    ``bincount`` adds doubles, exactly so here: the halves of a sum (below 2**40) are below 2**26,
    and 10**6 of them below 2**53. The sums of one count add up to 10**18 at most.
    """
    if counts.sum() == len(counts):  # all are 1
        return Fraction(int(sums.sum()))
    low = np.bincount(counts, weights=sums & _HALF).astype(np.int64)
    high = np.bincount(counts, weights=sums >> _HALF_BITS).astype(np.int64)
    used = np.flatnonzero(low + high)
    return sum_of_ratios(((high[used] << _HALF_BITS) + low[used]).tolist(), used.tolist())


def fixed_point(sums: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[int, int]:
    """The same sum as (whole, fraction) with 43 bits, each row rounded down.

    Short of the exact sum by less than ``n * 2**-43``, and exact where fraction is 0 (a
    remainder is at least 1/c > 2**-43). What engines return for every candidate.
    """
    whole = sums // counts
    fraction = ((sums - whole * counts) << FRACTION_BITS) // counts
    return int(whole.sum()), int(fraction.sum())


def contenders(
    columns: NDArray[np.int64], whole: NDArray[np.int64], fraction: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Those of some candidates that may have the largest exact sum; none if all were skipped (-1).

    Fixed point rounds every row down by less than one unit, so a score lies up to n units below
    its exact sum, and on it where the fraction is 0.
    """
    if len(whole) and not len(fraction.nonzero()[0]):  # all are exact
        best = (whole == max(whole[whole.argmax()], 0)).nonzero()[0]
        return columns[best], whole[best], fraction[best]
    high = whole + (fraction >> FRACTION_BITS)
    top = high.max(initial=0)
    close = (high >= top - 1) & (whole >= 0)  # others are out of the leader's reach
    columns, whole, fraction, high = columns[close], whole[close], fraction[close], high[close]
    if len(columns) <= 1:
        return columns, whole, fraction
    place = ((high - (top - 1)) << FRACTION_BITS) + (fraction & ((1 << FRACTION_BITS) - 1))
    near = place.max() - place <= np.where(fraction == 0, 0, MAX_ROUNDING)
    return columns[near], whole[near], fraction[near]


def written(sums: Any) -> str:
    """An exact sum, or those of several parts, as text: hexadecimal, which may be of any length."""
    parts = sums if isinstance(sums, tuple) else (sums,)
    text = " ".join(f"{part.numerator:x}/{part.denominator:x}" for part in parts)
    return f"({text})" if isinstance(sums, tuple) else text


def read(text: str) -> Any:
    """What `written` wrote; ValueError for other texts."""
    pairs = (part.split("/") for part in text.strip("()").split(" "))
    parts = tuple(Fraction(int(above, 16), int(below, 16)) for above, below in pairs)
    return parts if text.startswith("(") else parts[0]


class ResponseSums:
    """The sums over ranks, arrays or tensors, that a coefficient needs."""

    def __init__(self, R: Any, L: Any) -> None:
        n = len(R)
        self.n = n
        self.sum_R = int(R.sum())  # and that of L: both count the pairs with y_i <= y_j
        self.sum_L2 = int((L * L).sum())  # at most 10**18
        self.denominator = n * self.sum_R - self.sum_L2  # sum L_i (n - L_i)

    @property
    def start(self) -> Fraction:
        """``sum m_i`` of no columns: T(Y, {}) = 0."""
        return Fraction(self.sum_L2, self.n)

    def floor(self, m: Rational) -> int:
        """What an engine's whole sums must exceed to be a gain over m."""
        return int(m)

    @property
    def constant(self) -> bool:
        """Whether y is constant: the denominator of T(Y, Z) is 0."""
        return self.denominator == 0

    def gains(self, m: Rational, before: Rational, least: Rational) -> bool:
        """Whether T(Y, Z) of m exceeds that of an earlier sum by more than the least."""
        return self.n * (m - before) > least * self.denominator

    def value(self, m: Rational) -> float:
        """T(Y, Z) from ``sum m_i``, rounded once."""
        above = self.n * m.numerator - self.sum_L2 * m.denominator
        return above / (self.denominator * m.denominator)

    def unconditional(self, m: Rational) -> Fraction:
        """T(Y, Z) from ``sum m_i``, of a y that is not constant.

        (n sum m_i - sum L_i^2) / sum L_i (n - L_i); Azadkia and Chatterjee 2021, section 2.
        """
        above = self.n * m.numerator - self.sum_L2 * m.denominator
        return Fraction(above, self.denominator * m.denominator)

    def conditional(self, m_w: Rational, m_x: Rational) -> Fraction | None:
        """T(Y, Z | X) from ``sum m^W_i`` and ``sum m^X_i``; None if y is a function of X.

        sum (m^W_i - m^X_i) / sum (R_i - m^X_i), the same m^X above and below.
        """
        denominator = self.sum_R - m_x
        if denominator == 0:
            return None
        return Fraction(m_w - m_x, denominator)
