"""Exact sums and the coefficients made of them: the one place where a T is divided.

Backends deliver integers: for each row the sum ``S_i`` of ``min(R_i, R_j)`` over its ``c_i``
tied neighbours. What is compared or reported is the rational ``sum_i S_i / c_i``.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

FRACTION_BITS = 43  # n * 2**43 < 2**63 up to n = 2**20
_HALF_BITS = 26
_HALF = (1 << _HALF_BITS) - 1
MAX_ROUNDING = 1 << 20  # units of 2**-43 that a fixed-point sum can lie below its exact one


def total(sums: NDArray[np.int64], counts: NDArray[np.int64]) -> Fraction:
    """``sum_i sums[i] / counts[i]`` exactly: rows of equal count are added as integers.

    ``bincount`` adds doubles, exactly so here: the halves of a sum (below 2**40) are below 2**26,
    and 10**6 of them below 2**53.
    """
    low = np.bincount(counts, weights=sums & _HALF)
    high = np.bincount(counts, weights=sums >> _HALF_BITS)
    result = Fraction(0)
    for count in np.flatnonzero(low + high).tolist():
        result += Fraction((int(high[count]) << _HALF_BITS) + int(low[count]), count)
    return result


def fixed_point(sums: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[int, int]:
    """The same sum as (whole, fraction) with 43 bits, each row rounded down.

    Short of the exact sum by less than ``n * 2**-43``, and exact where fraction is 0 (a
    remainder is at least 1/c > 2**-43). What engines return for every candidate.
    """
    whole = sums // counts
    fraction = ((sums - whole * counts) << FRACTION_BITS) // counts
    return int(whole.sum()), int(fraction.sum())


class ResponseSums:
    """The sums over ranks that a coefficient needs beside its neighbours'."""

    def __init__(self, R: NDArray[np.int64], L: NDArray[np.int64]) -> None:
        n = len(R)
        self.n = n
        self.sum_R = int(R.sum())
        self.sum_L2 = int((L * L).sum())  # at most 10**18
        self.denominator = int((L * (n - L)).sum())

    @property
    def constant(self) -> bool:
        """Whether y is constant: the denominator of T(Y, Z) is 0."""
        return self.denominator == 0

    def unconditional(self, m: Fraction) -> Fraction | None:
        """T(Y, Z) from ``sum m_i``; None where the denominator is 0 (y constant).

        (n sum m_i - sum L_i^2) / sum L_i (n - L_i); Azadkia and Chatterjee 2021, section 2.
        """
        if self.denominator == 0:
            return None
        return (self.n * m - self.sum_L2) / self.denominator

    def conditional(self, m_w: Fraction, m_x: Fraction) -> Fraction | None:
        """T(Y, Z | X) from ``sum m^W_i`` and ``sum m^X_i``; None if y is a function of X.

        sum (m^W_i - m^X_i) / sum (R_i - m^X_i), the same m^X above and below.
        """
        denominator = self.sum_R - m_x
        if denominator == 0:
            return None
        return (m_w - m_x) / denominator
