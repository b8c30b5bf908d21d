"""The exact sums behind xi, vectorised; `ReferenceBackend` has them as they are defined.

Sizes in the comments are for the 10^6 rows that validation lets through.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import tie_hash
from lcodec_ext.dependence import exact


def _pair_sums(ids: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum over a < b of |v_a - v_b| among the values (0 to n) of each id.

    ids are 0, 1, ... without a gap, in increasing order. The k-th smallest of s values
    (from k = 0) enters with weight 2k - (s - 1). One sort, O(n log n).
    """
    n = len(ids)
    ordered = np.sort(ids * (n + 1) + values) % (n + 1)
    sizes = np.bincount(ids)
    starts = np.cumsum(sizes) - sizes
    weights = 2 * (np.arange(n) - np.repeat(starts, sizes)) - np.repeat(sizes - 1, sizes)
    # |weights| add up to s^2 / 2 at most, so no partial sum exceeds n^3 / 2 = 5e17
    return np.add.reduceat(weights * ordered, starts)


def path_length(x: NDArray, R: NDArray[np.int64], ties: str, seed: int) -> Fraction:
    """`HostBackend.path_length`.

    With ties="average" each group of tied x comes in a uniformly random order, independent of the
    others.
    A step inside a group joins a random pair of it, so the s - 1 steps of a group of s make
    (2 / s) sum_{a<b} |R_a - R_b|; the step on to a group of t joins a random row of each and
    makes the mean over their s t pairs, whose sum is that of the two groups taken as one, less
    their own.
    """
    n = len(x)
    order = np.lexsort((tie_hash(seed, n), x)) if ties == "random" else np.argsort(x, kind="stable")
    x, R = x[order], R[order]
    first = np.append(True, x[1:] != x[:-1])
    if ties != "average" or first.all():
        return Fraction(int(np.abs(np.diff(R)).sum()))
    group = np.cumsum(first) - 1
    sizes = np.bincount(group)
    within = _pair_sums(group, R)
    joint = np.empty(len(sizes) - 1, dtype=np.int64)
    even, odd = joint[0::2], joint[1::2]
    even[:] = _pair_sums(group // 2, R)[: len(even)]  # groups taken as 01 23 45 ...
    odd[:] = _pair_sums((group + 1) // 2, R)[1 : len(odd) + 1]  # and as 0 12 34 ...
    between = joint - within[:-1] - within[1:]
    # 2 P <= s^2 n / 2 and C <= s t n: those of one denominator add up to n^3 / 2 at most
    denominators = np.concatenate((sizes, sizes[:-1] * sizes[1:]))
    distinct, which = np.unique(denominators, return_inverse=True)
    totals = np.zeros(len(distinct), dtype=np.int64)
    np.add.at(totals, which, np.concatenate((2 * within, between)))
    return exact.sum_of_ratios(totals, distinct)


def _exact_sum(values: NDArray[np.int64]) -> int:
    """Sum of nonnegative int64, which may exceed one."""
    return (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())


def null_variance(R: NDArray[np.int64]) -> int:
    """`HostBackend.null_variance`: after sorting, R_i is the minimum of 2 (n - i) + 1 pairs.

    It is n^4 times the sum of squares of k centred by rows and columns.
    """
    n = len(R)
    r = np.sort(R)
    later = np.arange(n - 1, -1, -1)
    pairs = 2 * later + 1
    squares = _exact_sum(pairs * r * r)  # each up to 2 n^3 = 2e18
    total = int((pairs * r).sum())  # up to n^3
    rows = np.cumsum(r) + later * r  # up to n^2 < 2^40, so that its square takes two halves
    high, low = rows >> 20, rows & 0xFFFFF
    row_squares = (
        (int((high * high).sum()) << 40) + (int((high * low).sum()) << 21) + int((low * low).sum())
    )
    return n * n * squares - 2 * n * row_squares + total * total
