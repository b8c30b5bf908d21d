"""How a coefficient varies: its exact moments under permutation, and how sure a value is.

T(Y, Z) and xi are, up to constants, ``sum_{i != j} a_ij k(y_i, y_j)``: the weights a know Z or x
alone, the kernel k knows the ranks of y alone. If y is independent of Z, every permutation of y is
as likely as any other, and mean and variance over all n! of them have a closed form in six sums
(Mantel 1967, Cancer Research 27): three of the weights and three of the kernel. They hold for any
ties in y and Z, and for any number of columns. In the limit of a continuous y and d columns, the
variance of sqrt(n) T is 2/5 + (2/5) q_d + (4/5) o_d (Shi, Drton and Han 2024), where q_d is the
share of rows that are their neighbour's neighbour and o_d the number of ordered pairs of rows that
share a neighbour, over n: the sums of the weights below hold both.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import tie_hash
from lcodec_ext.dependence.exact import ResponseSums, sum_of_ratios


class PairSums(NamedTuple):
    """Sums over a symmetric matrix with a diagonal of 0: weights a_ij or a kernel k_ij."""

    n: int
    total: Fraction  # of all entries
    rows: Fraction  # of the squared sums of the rows
    squares: Fraction  # of the squared entries


def permutation_moments(weights: PairSums, kernel: PairSums) -> tuple[Fraction, Fraction]:
    """Mean and variance of ``sum_{i != j} a_ij k_{p(i) p(j)}`` over all permutations p.

    Two pairs of different rows have both, one or no row in common; each case has its number of
    pairs, and every arrangement of its rows is as likely as any other.
    """
    n = weights.n
    pairs = n * (n - 1)
    mean = Fraction(weights.total * kernel.total, pairs)
    second = Fraction(2 * weights.squares * kernel.squares, pairs)
    one_a, one_k = (each.rows - each.squares for each in (weights, kernel))
    second += Fraction(4 * one_a * one_k, pairs * (n - 2))
    if n > 3:
        none_a, none_k = (
            each.total**2 - 4 * each.rows + 2 * each.squares for each in (weights, kernel)
        )
        second += Fraction(none_a * none_k, pairs * (n - 2) * (n - 3))
    return mean, second - mean**2


def minimum_sums(R: NDArray[np.int64]) -> PairSums:
    """The kernel of T: min(R_i, R_j) of max ranks. O(n log n)."""
    n = len(R)
    r = np.sort(R)
    later = np.arange(n - 1, -1, -1)
    rows = np.cumsum(r) - r + later * r
    squares = 2 * _exact_sum(later * r * r)
    return PairSums(n, Fraction(int(rows.sum())), _sum_of_squares(rows), Fraction(squares))


def distance_sums(R: NDArray[np.int64]) -> PairSums:
    """The kernel of xi: abs(R_i - R_j) of max ranks. O(n log n)."""
    n = len(R)
    r = np.sort(R)
    before, total = np.cumsum(r) - r, int(r.sum())
    k = np.arange(n)
    rows = (2 * k - n + 1) * r - 2 * before + (total - r)
    squares = 2 * (n * _exact_sum(r * r) - total**2)
    return PairSums(n, Fraction(int(rows.sum())), _sum_of_squares(rows), Fraction(squares))


def _exact_sum(values: NDArray[np.int64]) -> int:
    """Sum of nonnegative int64, which may exceed one."""
    return (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())


def _sum_of_squares(values: NDArray[np.int64]) -> Fraction:
    """Sum of squares of 10^6 integers from 0 to 2^41 at most."""
    high, low = values >> 20, values & 0xFFFFF
    cross = int((high * low).sum())
    squares = (int((high * high).sum()) << 40) + (cross << 21) + int((low * low).sum())
    return Fraction(squares)


# --------------------------------------------------------------------------------------------
# T(Y, Z)


def graph_sums(
    indptr: NDArray[np.int64], indices: NDArray[np.int64], size: NDArray[np.int64] | None = None
) -> PairSums:
    """The weights of T: a row gives each of its c nearest rows 1 / c, half of it to either order.

    Parameters
    ----------
    indptr, indices
        The neighbours that the coefficient uses: of row i they are
        ``indices[indptr[i]:indptr[i + 1]]``, in increasing order, as
        ``nearest_neighbors(ties="all")`` returns them.
    size : int64 of shape (len(indptr) - 1,), optional
        How many rows are equal to each: the graph is then that of the distinct rows. Rows that
        have an equal one are nearest to these, whatever the graph says of them. This saves the
        squares of the sizes.

    Notes
    -----
    Time and memory are those of the graph, times a logarithm. Exact where every row has one
    neighbour, or an equal row; else two of its sums add rounded quotients.
    """
    rows = len(indptr) - 1
    sizes = np.ones(rows, dtype=np.int64) if size is None else size
    listed = np.diff(indptr)
    start = np.repeat(np.arange(rows), listed)
    alone = sizes[start] == 1
    start, end = start[alone], indices[alone]
    counts = np.bincount(start, weights=sizes[end], minlength=rows).astype(np.int64)
    grouped = sizes > 1
    counts[grouped] = sizes[grouped] - 1
    # what a row receives is 1 in the mean, so that its square is the rest of a row sum's
    received = np.bincount(end, weights=1 / counts[start], minlength=rows) + grouped - 1
    uneven = math.fsum((sizes * received**2).tolist())
    mutual = np.isin(end * rows + start, start * rows + end)
    shares = math.fsum((1 / (counts[start] * counts[end]))[mutual].tolist())
    n = int(sizes.sum())
    squares = _ratios(sizes, counts) + _ratios(sizes[grouped], counts[grouped]) + Fraction(shares)
    return PairSums(n, Fraction(n), n + Fraction(uneven) / 4, squares / 2)


def _ratios(sizes: NDArray[np.int64], counts: NDArray[np.int64]) -> Fraction:
    """``sum sizes / counts``."""
    distinct, which = np.unique(counts, return_inverse=True)
    return sum_of_ratios(np.bincount(which, weights=sizes).astype(np.int64), distinct)


def null_moments(sums: ResponseSums, R: NDArray[np.int64], graph: PairSums) -> tuple[float, float]:
    """Mean and standard deviation of T(Y, Z) where y is permuted against Z, of a y not constant.

    The mean is -1 / (n - 1). In the limit T is normal if the ties in Z are groups of bounded size;
    with few distinct rows in Z it tends to a weighted sum of chi-squares, which a permutation test
    knows and a normal approximation does not.
    """
    mean, variance = permutation_moments(graph, minimum_sums(R))
    scale = Fraction(sums.n, sums.denominator)
    return float(sums.unconditional(mean)), math.sqrt(scale**2 * max(variance, Fraction(0)))


# --------------------------------------------------------------------------------------------
# Intervals


def normal_interval(value: float, sd: float, confidence_level: float) -> tuple[float, float]:
    """value -+ z sd, where a normal variable is in (-z, z) with the probability asked for."""
    half = NormalDist().inv_cdf((1 + confidence_level) / 2) * sd
    return value - half, value + half


def subsamples(n: int, size: int, count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Rows of `count` subsamples without replacement, in increasing order.

    A subsample's rows are those with the smallest `tie_hash` of its own seed, drawn from `seed`.
    """
    for own in tie_hash(seed, count).tolist():
        words = tie_hash(own, n)
        yield np.sort(np.argpartition(words, size - 1)[:size])


def subsampled_sd(
    statistic: Callable[[NDArray[np.int64]], float],
    n: int,
    *,
    n_subsamples: int = 200,
    size: int | None = None,
    seed: int,
) -> float:
    """Standard deviation of a coefficient of n rows, from its spread over subsamples of m rows.

    Their variance times m / n is that of n rows where the coefficient is sqrt(n)-normal and m / n
    is small, whatever the ties, the columns, and the conditioning (Politis and Romano 1994). The
    bootstrap with n of n rows is wrong for neighbours (Lin and Han 2024); Dette and Kroll (2024)
    prove m of n for xi. Only the spread is used, not where the subsamples lie: their bias is
    larger than that of n rows. Subsamples overlap, and the factor 1 / (1 - m / n) makes up for it
    at least.

    Parameters
    ----------
    statistic
        The coefficient of the rows it is given, by increasing index.
    size
        m, by default n / 10, but 30 to 5000, and at most n / 2.
    """
    m = min(max(n // 10, 30), 5000, n // 2) if size is None else size
    values = [statistic(rows) for rows in subsamples(n, m, n_subsamples, seed)]
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance * m / (n - m))
