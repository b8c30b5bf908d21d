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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext._random import tie_hash
from lcodec_ext.dependence.exact import ResponseSums, sum_of_ratios
from lcodec_ext.dependence.ranks import AnyRanks

MIN_ROWS = 20  # of an interval
_UNDEFINED = 0.05  # the share of subsamples above which one is warned


class PairSums(NamedTuple):
    """Sums over a symmetric matrix with a diagonal of 0: weights a_ij or a kernel k_ij.

    Integers over one denominator, so that exact arithmetic is quick.
    """

    n: int
    over: int  # the denominator of `total`; the others have its square
    total: int  # of all entries
    rows: int  # of the squared sums of the rows
    squares: int  # of the squared entries


def permutation_variance(weights: PairSums, kernel: PairSums) -> tuple[int, int]:
    """Numerator and denominator of the variance of `permutation_moments`."""
    n, a, k = weights.n, weights, kernel
    pairs = n * (n - 1)
    second = 2 * a.squares * k.squares * (n - 2)
    second += 4 * (a.rows - a.squares) * (k.rows - k.squares)
    if n > 3:
        none_a = a.total**2 - 4 * a.rows + 2 * a.squares
        none_k = k.total**2 - 4 * k.rows + 2 * k.squares
        second = second * (n - 3) + none_a * none_k
    rest = (n - 2) * max(n - 3, 1)
    variance = second * pairs - (a.total * k.total) ** 2 * rest
    return variance, (a.over * k.over * pairs) ** 2 * rest


def permutation_moments(weights: PairSums, kernel: PairSums) -> tuple[Fraction, Fraction]:
    """Mean and variance of ``sum_{i != j} a_ij k_{p(i) p(j)}`` over all permutations p.

    Two pairs of different rows have both, one or no row in common; each case has its number of
    pairs, and every arrangement of its rows is as likely as any other.
    """
    pairs = weights.n * (weights.n - 1) * weights.over * kernel.over
    mean = Fraction(weights.total * kernel.total, pairs)
    return mean, Fraction(*permutation_variance(weights, kernel))


def minimum_sums(R: NDArray[np.int64]) -> PairSums:
    """The kernel of T: min(R_i, R_j) of max ranks. O(n log n)."""
    n = len(R)
    r = np.sort(R)
    later = np.arange(n - 1, -1, -1)
    rows = np.cumsum(r) - r + later * r
    squares = 2 * _exact_sum(later * r * r)
    return PairSums(n, 1, int(rows.sum()), _sum_of_squares(rows), squares)


def distance_sums(R: NDArray[np.int64]) -> PairSums:
    """The kernel of xi: abs(R_i - R_j) of max ranks. O(n log n)."""
    n = len(R)
    r = np.sort(R)
    before, total = np.cumsum(r) - r, int(r.sum())
    k = np.arange(n)
    rows = (2 * k - n + 1) * r - 2 * before + (total - r)
    squares = 2 * (n * _exact_sum(r * r) - total**2)
    return PairSums(n, 1, int(rows.sum()), _sum_of_squares(rows), squares)


def _exact_sum(values: NDArray[np.int64]) -> int:
    """Sum of nonnegative int64, which may exceed one."""
    return (int((values >> 32).sum()) << 32) + int((values & 0xFFFFFFFF).sum())


def _sum_of_squares(values: NDArray[np.int64]) -> int:
    """Sum of squares of 10^6 integers from 0 to 2^41 at most."""
    high, low = values >> 20, values & 0xFFFFF
    cross = int((high * low).sum())
    return (int((high * high).sum()) << 40) + (cross << 21) + int((low * low).sum())


def upper_tail(z: float, skewness: float = 0.0) -> float:
    """P(Z >= z) of a variable with mean 0, variance 1 and a skewness of at least 0.

    A normal one, or a gamma variable (Pearson's type III), which a weighted sum of chi-squares
    nearly is: k = 4 / skewness^2 is its shape, and its zero lies at -sqrt(k).
    """
    if skewness < 0.02:
        return 0.5 * math.erfc(z / math.sqrt(2))
    shape = 4 / skewness**2
    return _gamma_tail(shape, shape + z * math.sqrt(shape))


def _gamma_tail(shape: float, x: float) -> float:
    """P(G >= x) of a gamma variable: a series below the mean, a continued fraction beyond it.

    Abramowitz and Stegun (1964), 6.5.29 and 6.5.31, the fraction by Lentz's method.
    """
    if x <= 0:
        return 1.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1 / shape
        k = shape
        while term > total * 1e-16:
            k += 1
            term *= x / k
            total += term
        return max(1 - front * total, 0.0)
    b = x + 1 - shape
    c, d = math.inf, 1 / b
    value = d
    for i in range(1, 100_000):
        b += 2
        step = i * (shape - i)
        d = 1 / (step * d + b)
        c = b + step / c
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * value


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
    sizes, start, end, counts, received = _links(indptr, indices, size)
    grouped = sizes > 1
    # what a row receives is 1 in the mean, so that its square is the rest of a row sum's
    uneven = math.fsum((sizes * (received - 1) ** 2).tolist())
    mutual = np.isin(end * rows + start, start * rows + end)
    shares = math.fsum((1 / (counts[start] * counts[end]))[mutual].tolist())
    n = int(sizes.sum())
    squares = _ratios(sizes, counts) + _ratios(sizes[grouped], counts[grouped]) + Fraction(shares)
    row_sums = n + Fraction(uneven) / 4
    over = math.lcm(row_sums.denominator, 2 * squares.denominator)
    return PairSums(n, over, n * over, int(row_sums * over**2), int(squares / 2 * over**2))


class _Links(NamedTuple):
    """The graph of distinct rows without what equal rows give each other."""

    sizes: NDArray[np.int64]
    start: NDArray[np.int64]  # rows that have no equal one, once for each neighbour
    end: NDArray[np.int64]
    counts: NDArray[np.int64]  # neighbours of each
    received: NDArray[np.float64]  # the sum of what others give each


def _links(
    indptr: NDArray[np.int64], indices: NDArray[np.int64], size: NDArray[np.int64] | None
) -> _Links:
    rows = len(indptr) - 1
    sizes = np.ones(rows, dtype=np.int64) if size is None else size
    start = np.repeat(np.arange(rows), np.diff(indptr))
    alone = sizes[start] == 1
    start, end = start[alone], indices[alone]
    counts = np.bincount(start, weights=sizes[end], minlength=rows).astype(np.int64)
    grouped = sizes > 1
    counts[grouped] = sizes[grouped] - 1
    received = np.bincount(end, weights=1 / counts[start], minlength=rows) + grouped.astype(float)
    return _Links(sizes, start, end, counts, received)


def graph_cube(
    indptr: NDArray[np.int64], indices: NDArray[np.int64], size: NDArray[np.int64]
) -> float:
    """Trace of the cube of the centred weights of T, of the arguments of `graph_sums`.

    It adds up triangles of rows that are next to each other. Three different rows hardly ever are
    and are not counted; in one column they never are.
    """
    sizes, start, end, counts, received = _links(indptr, indices, size)
    n = int(sizes.sum())
    grouped = sizes > 1
    s = sizes[grouped].astype(np.float64)
    joined = grouped[end]
    triangles = math.fsum((s * (s - 2) / (s - 1) ** 2).tolist())
    triangles += math.fsum((0.75 * sizes[end] / counts[start] ** 2)[joined].tolist())
    u = (1 + received) / 2  # the sums of the rows
    near = np.bincount(start, weights=sizes[end] * u[end] / counts[start], minlength=len(u))
    near[grouped] = u[grouped]
    twice = math.fsum((sizes * u * near).tolist())
    once = math.fsum((sizes * u * u).tolist())
    return triangles - 3 * twice / n + 3 * once / n - 1


def minima_traces(R: NDArray[np.int64]) -> tuple[float, float]:
    """Traces of square and cube of the centred min(R_i, R_j) / n of max ranks.

    min(R_i, R_j) is a sum over thresholds t of whether both are at least t, and the covariance of
    two thresholds s <= t is q_s p_t, with q_s the share of ranks below s and p_t = 1 - q_t.
    """
    n = len(R)
    q = np.cumsum(np.bincount(R, minlength=n + 1))[:n] / n
    p = 1 - q

    def before(terms: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.cumsum(terms) - terms

    singles = before(q * q)
    square = (q * p) ** 2 + 2 * singles * p * p
    cube = (q * p) ** 3 + 3 * (before(q**3 * p) * p * p + singles * q * p**3)
    cube += 6 * before(singles * q * p) * p * p
    return math.fsum(square.tolist()), math.fsum(cube.tolist())


def limit_skewness(weights: PairSums, cube: float, squares: float, cubes: float) -> float:
    """Skewness of the weighted sum of chi-squares to which a sum over pairs of rows tends.

    It is sum_ab m_a l_b (z_ab^2 - 1) over the eigenvalues m of the centred weights and l of the
    centred minima, whose powers are traces: those of the weights' cube, and of the minima's square
    and cube.
    """
    n, over = weights.n, weights.over**2
    own = (n * (n * weights.squares - 2 * weights.rows) + weights.total**2) / (n * n * over)
    return max(8 * cube * cubes / (2 * own * squares) ** 1.5, 0.0) if own > 0 else 0.0


def _ratios(sizes: NDArray[np.int64], counts: NDArray[np.int64]) -> Fraction:
    """``sum sizes / counts``."""
    distinct, which = np.unique(counts, return_inverse=True)
    of_each = np.bincount(which, weights=sizes).astype(np.int64)
    return sum_of_ratios(of_each.tolist(), distinct.tolist())


def null_moments(sums: ResponseSums, R: NDArray[np.int64], graph: PairSums) -> tuple[float, float]:
    """Mean and standard deviation of T(Y, Z) where y is permuted against Z, of a y not constant.

    The mean is -1 / (n - 1). In the limit T is normal if the ties in Z are groups of bounded size;
    with few distinct rows in Z it tends to a weighted sum of chi-squares (`limit_skewness`).
    """
    mean, variance = permutation_moments(graph, minimum_sums(R))
    scale = Fraction(sums.n, sums.denominator)
    return float(sums.unconditional(mean)), math.sqrt(scale**2 * max(variance, Fraction(0)))


# --------------------------------------------------------------------------------------------
# Intervals


def normal_interval(value: Any, sd: Any, confidence_level: float) -> tuple[Any, Any]:
    """value -+ z sd, where a normal variable is in (-z, z) with the probability asked for."""
    half = NormalDist().inv_cdf((1 + confidence_level) / 2) * sd
    return value - half, value + half


class Spread(NamedTuple):
    """What subsamples tell about a coefficient, or about several of them."""

    sd: Any
    undefined: Any  # how many subsamples leave it undefined
    drawn: int  # subsamples


def interval(value: Any, spread: Spread, confidence_level: float) -> tuple[Any, Any]:
    """value -+ z sd, at most 1; nan with a warning where subsamples tell no spread.

    The lower end is not cut at 0: a coefficient of few rows can be below 0, and the width of the
    interval says how sure it is.
    """
    values, sd, undefined = (np.asarray(each) for each in (value, spread.sd, spread.undefined))
    asked = np.isfinite(values)  # of a constant y one has been warned already
    flat = asked & ~(sd > 0)
    few = asked & ~flat & (undefined > _UNDEFINED * spread.drawn)

    def of(some: NDArray[np.bool_]) -> str:
        return f"{some.sum()} of {some.size} coefficients: " if some.ndim else ""

    if flat.any():
        warn(
            f"{of(flat)}subsamples do not tell how much the coefficient varies, because it is the "
            "same on all that define it: the interval is nan",
        )
    if few.any():
        most = int(undefined[few].max())
        warn(
            f"{of(few)}{'up to ' if few.ndim else ''}{most} of {spread.drawn} subsamples leave the "
            "coefficient undefined, because y is constant in them or has a class of too few rows: "
            "the interval rests on the others and can be too narrow",
        )
    low, high = normal_interval(values, np.where(sd > 0, sd, math.nan), confidence_level)
    high = np.minimum(high, 1.0)
    return (low, high) if values.ndim else (float(low), float(high))


def subsamples(
    n: int, size: int, count: int, seed: int, first: int = 0
) -> Iterator[NDArray[np.int64]]:
    """Rows of `count` subsamples without replacement, in increasing order, from the `first` one on.

    A subsample's rows are those with the smallest `tie_hash` of its own seed, drawn from `seed`.
    """
    for own in tie_hash(seed, first + count)[first:].tolist():
        words = tie_hash(own, n)
        yield np.sort(np.argpartition(words, size - 1)[:size])


def subsampled_sd(
    statistic: Callable[[NDArray[np.int64]], Any],
    n: int,
    *,
    n_subsamples: int = 200,
    size: int | None = None,
    seed: int,
    ranks: AnyRanks = ONE_RANK,
) -> Spread:
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
        The coefficient of the rows it is given, by increasing index: a float, or an array of
        several. Where a subsample leaves it undefined, nan; those values are not counted.
    size
        m, by default n / 10, but 30 to 5000, and at most n / 2.
    ranks
        Subsamples are shared out over them; the statistic is then a float.

    Returns
    -------
    Spread
        `sd` and `undefined` are numbers, or arrays of the statistic's shape: the same bits on every
        machine where the statistic has them. `sd` is nan where fewer than two subsamples define the
        statistic.
    """
    if n < MIN_ROWS:
        raise ValueError(f"an interval needs at least 20 rows; got {n}: leave confidence_level out")
    m = min(max(n // 10, 30), 5000, n // 2) if size is None else size

    def of(some: range) -> NDArray:
        drawn = subsamples(n, m, len(some), seed, some.start)
        return np.array([statistic(rows) for rows in drawn])

    values = np.concatenate(ranks.share_out(n_subsamples, "the subsamples", of))
    sds = [_spread(column, m / (n - m)) for column in values.reshape(len(values), -1).T.tolist()]
    undefined = np.isnan(values).sum(axis=0)
    if values.ndim == 1:
        return Spread(sds[0], int(undefined), n_subsamples)
    return Spread(np.reshape(sds, values.shape[1:]), undefined, n_subsamples)


def _spread(values: list[float], factor: float) -> float:
    defined = [value for value in values if not math.isnan(value)]
    if len(defined) < 2:
        return math.nan
    mean = math.fsum(defined) / len(defined)
    squares = math.fsum((value - mean) ** 2 for value in defined)
    return math.sqrt(squares / (len(defined) - 1) * factor)
