"""Chatterjee's coefficient xi, of one pair of variables or of many, and its tests."""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import as_array, beyond_float64
from lcodec_ext._callers import warn
from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_probability,
    check_seed,
    counted,
    first_few,
)
from lcodec_ext._random import fresh_seed, tie_seed
from lcodec_ext.dependence.backends.base import TIES, HostBackend, Ties
from lcodec_ext.dependence.backends.path_sums import PathSums, RankSums
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve_on_cpu
from lcodec_ext.dependence.limits import (
    PairSums,
    interval,
    limit_skewness,
    permutation_variance,
    subsampled_sd,
    upper_tail,
)
from lcodec_ext.dependence.permutation import Weighted, check_permutations, joined
from lcodec_ext.dependence.table import MAX_ROWS, Features, as_features, as_response, clean_rows
from lcodec_ext.dependence.xi_null import Path

METHODS = ("asymptotic", "permutation")
_AT_ONCE = 1 << 22  # rows, or sums, of columns that share their permutations
_DOUBLE = np.dtype(np.float64)
Sums = tuple[list[PathSums], list[RankSums]]


def _plain(column: object) -> bool:
    """Whether a column is taken as it is, without being looked at by Python."""
    return (
        type(column) is np.ndarray
        and column.dtype == _DOUBLE
        and column.ndim == 1
        and column.flags.c_contiguous
    )


class XiPairs(NamedTuple):
    """Columns x and responses y, in rows of equal length, and what xi is made of."""

    X: NDArray[np.float64]  # (n,), or (k, n)
    Y: NDArray[np.float64]
    shape: tuple[int, ...]  # of a result
    names: tuple[list[str], ...] | None  # of x and y in messages, where they are several
    tie_seed: int
    paths: list[PathSums]
    ranks: list[RankSums]

    @property
    def n(self) -> int:
        """How many rows there are."""
        return self.X.shape[-1]

    def xi(self, i: int, j: int) -> float:
        """xi of response j on column i, rounded once; nan if the response is constant."""
        whole = 2 * self.ranks[j].denominator
        if whole == 0:
            return math.nan
        length, over = self.paths[i].length(j)
        return (whole * over - self.n * length) / (whole * over)

    def permutation_sd(self, i: int, j: int) -> float:
        """Standard deviation of xi over all permutations of y; nan if it is constant."""
        if self.ranks[j].denominator == 0:
            return math.nan
        return self._permutation_sd(j, self.paths[i].weights(self.n))

    def _permutation_sd(self, j: int, weights: PairSums) -> float:
        n = self.n
        variance, over = permutation_variance(weights, self.ranks[j].distances(n))
        return math.sqrt(n * n * variance / ((2 * self.ranks[j].denominator) ** 2 * over))

    def asymptotic(self, i: int, j: int, y_continuous: bool) -> tuple[float, float, float]:
        """xi, P(xi >= its value) under independence by its limit, and the sd."""
        n, ranks, value = self.n, self.ranks[j], self.xi(i, j)
        sd = math.sqrt(2 / (5 * n)) if y_continuous else math.nan
        if ranks.denominator == 0:
            return value, math.nan, sd
        skewness = 0.0
        if self.paths[i].averaged:
            weights = self.paths[i].weights(n)
            sd = sd if y_continuous else self._permutation_sd(j, weights)
            skewness = self.skewness(i, j, weights)
        elif not y_continuous:
            sd = math.sqrt(ranks.limit_variance(n) / (n * ranks.denominator**2))
        tail = upper_tail(value / sd, skewness) if sd > 0 else 1.0
        return value, tail, sd

    def skewness(self, i: int, j: int, weights: PairSums) -> float:
        """Skewness of the sum of chi-squares that xi tends to where tied rows are averaged."""
        ranks = self.ranks[j]
        minima = ranks.limit_variance(self.n) / self.n**4
        return limit_skewness(weights, self.paths[i].cube, minima, ranks.cube)

    def shaped(self, value: Any) -> Any:
        """value(i, j) of all pairs: as it is, or as an array; an array for each of several."""
        if not self.shape:
            return value(0, 0)
        pairs = [[value(i, j) for j in range(len(self.ranks))] for i in range(len(self.paths))]
        array = np.array(pairs, dtype=np.float64)
        return np.moveaxis(array, (0, 1), (-2, -1)).reshape(array.shape[2:] + self.shape)

    def warn_constant(self) -> None:
        """One warning for all responses that are constant."""
        constant = [j for j, ranks in enumerate(self.ranks) if ranks.denominator == 0]
        if not constant:
            return
        label = "y" if self.names is None else first_few([self.names[1][j] for j in constant], 5)
        verb = "is" if len(constant) == 1 else "are"
        what = "returning nan" if self.names is None else "its values are nan"
        if len(constant) > 1:
            what = "their values are nan"
        warn(f"{label} {verb} constant, so xi is undefined: {what}")


def pairs_of(
    backend: HostBackend, x: Any, y: Any, ties: Ties, seed: int | None, nan_policy: str
) -> XiPairs:
    """The sums of all pairs of columns of x and of y."""
    check_choice(ties, "ties", TIES)
    check_seed(seed)
    drawn = tie_seed(ties, seed)
    if _plain(x) and _plain(y) and len(x) == len(y) and 3 <= len(x) <= MAX_ROWS:
        check_choice(nan_policy, "nan_policy", ("raise", "omit"))
        sums = backend.xi_sums(x, y, ties, drawn)
        if sums is not None:
            return XiPairs(x, y, (), None, drawn, *sums)
    given = {"x": _variables(x, "x"), "y": _variables(y, "y")}
    rows = clean_rows({name: each.values for name, each in given.items()}, nan_policy)
    rows.warn_if_most()
    X, Y = (_comparable(rows.values[name]) for name in given)
    names = tuple(each.names for each in given.values())
    shape = tuple(len(each.names) for each in given.values() if each.table)
    single = max(map(len, names)) == 1
    sums = finite(backend.xi_sums(X, Y, ties, drawn))
    return XiPairs(X, Y, () if single else shape, None if single else names, drawn, *sums)


def finite(sums: Sums | None) -> Sums:
    """Sums of columns that have been found to be finite."""
    if sums is None:
        raise AssertionError("a value is not finite")
    return sums


class _Variables(NamedTuple):
    """One column, of its own dtype, or the columns of a table."""

    values: Any
    table: bool  # whether they were given in two dimensions
    names: list[str]  # in messages


def _variables(value: Any, name: str) -> _Variables:
    if isinstance(value, Features):
        return _Variables(value, True, [value.label(k) for k in range(value.values.shape[1])])
    array, _ = as_array(value, name, tensors=False)
    if array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
        return _Variables(as_response(array, name), array.ndim == 2, [name])
    features = as_features(value, name, tensors=False)
    return _Variables(features, True, [features.label(k) for k in range(array.shape[1])])


def _comparable(values: NDArray) -> NDArray[np.float64]:
    """Columns as rows of memory, in float64; codes in the same order where it merges numbers."""
    if beyond_float64(values):
        return np.unique(values, return_inverse=True)[1].astype(np.float64)
    return np.ascontiguousarray(values.T, dtype=np.float64)


def xi(
    x: Any,
    y: Any,
    *,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
) -> Any:
    """Chatterjee's coefficient xi of y on x.

    With the rows in increasing order of x, R_i the number of y_j <= y_i and L_i the number of
    y_j >= y_i,

        xi = 1 - n sum |R_{i+1} - R_i| / (2 sum L_i (n - L_i)).

    It converges to 0 when y is independent of x and to 1 when y is a function of x; it is not
    symmetric. ``docs/dependence.md`` says how to read values.

    Parameters
    ----------
    x : array_like of shape (n,) or (n, k)
        Real numbers of any dtype, 3 <= n <= 10^6. Only their order counts.
    y : array_like of shape (n,) or (n, m)
        The same. Every column of y is paired with every column of x.
    ties : {"average", "random", "first"}
        How rows with equal x are ordered. "average" (default): the exact expectation over all
        their orders. "random": one order, drawn by `seed`, as in R's XICOR. "first": in the order
        of the rows.
    seed : int in [0, 2**64) or None
        For ``ties="random"``; None (default) draws a fresh one.
    nan_policy : {"raise", "omit"}
        "omit" leaves out rows with a NaN, in any column of x or y, with a warning if they are more
        than half.
    backend : {"auto", "cpu", "reference"}
        All give the same bits. "auto" and "cpu" run compiled code on the package's threads;
        "reference" is O(n^2). Data are on the CPU.

    Returns
    -------
    float, or ndarray of shape (k, m)
        xi, correctly rounded from its exact rational value; nan, with a warning, for a
        constant y. A float where x and y are one column each. Otherwise entry i, j has column j
        of y on column i of x, and an argument of one dimension has none in the result: of x
        (n,) and y (n, m) it has the shape (m,).

    Raises
    ------
    ValueError
        For NaN (unless omitted), infinity, fewer than 3 rows, lengths that differ, more than
        two dimensions, or an unknown option.

    Notes
    -----
    O((k + m) n log n + k m n) time, O((k + m) n) memory. A call on two float64 arrays of 50 rows
    takes some 10 microseconds. S. Chatterjee, "A new coefficient of correlation", JASA 116 (2021),
    2009-2022, section 1.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import xi
    >>> x = np.arange(-10, 11)
    >>> round(xi(x, x**2), 4), round(xi(x**2, x), 4)
    (0.7273, -0.125)
    >>> xi(x, np.column_stack([x, x**2, x % 2])).round(4)
    array([ 0.8636,  0.7273, -0.9091])
    """
    chosen = resolve_on_cpu("xi", backend, x=x, y=y)
    pairs = pairs_of(chosen, x, y, ties, seed, nan_policy)
    pairs.warn_constant()
    return pairs.shaped(pairs.xi)


class _Triple(NamedTuple):
    statistic: Any
    pvalue: Any
    sd: Any


class XiTestResult(_Triple):
    """The result of :func:`xi_test`: a tuple (statistic, pvalue, sd), and what belongs to it.

    It unpacks into three: ``statistic, pvalue, sd = xi_test(x, y)``. What `codec_test` returns
    unpacks into two.

    Attributes
    ----------
    statistic : float or ndarray
        The coefficient xi.
    pvalue : float or ndarray
        One-sided p-value of independence; large xi speak against it.
    sd : float or ndarray
        Standard deviation of xi under independence, where its mean is 0.
    confidence_interval : tuple of two, or None
        Lower and upper end, floats or arrays; None where none was asked for.
    confidence_level : float or None
        As it was asked for.
    method : {"asymptotic", "permutation"}
    n : int
        How many rows were used.
    seed : int or None
        What permutations, subsamples and random ties were drawn from; None where none were.
    """

    confidence_interval: tuple[Any, Any] | None = None
    confidence_level: float | None = None
    method: str = "asymptotic"
    n: int = 0
    seed: int | None = None

    def _replace(self, **changes: Any) -> "XiTestResult":
        """Another result with some of the three values replaced; the rest is kept."""
        made = super()._replace(**changes)
        made.__dict__.update(self.__dict__)
        return made

    def __repr__(self) -> str:
        by = "permutations" if self.method == "permutation" else "the limit of many rows"
        of = f"on {counted(self.n, 'row')}, by {by}"
        ends = self.confidence_interval
        level = f"{100 * (self.confidence_level or 0):.6g}% interval"
        if np.ndim(self.statistic) == 0:
            head = f"xi = {self.statistic:.4f}, p-value = {self.pvalue:.4g}, sd = {self.sd:.4f}"
            more = "" if ends is None else f"\n  {level} from {ends[0]:.4f} to {ends[1]:.4f}"
            return f"XiTestResult: {head} {of}{more}"
        lines = [f"XiTestResult: {counted(self.statistic.size, 'pair')} {of}"]
        shown = {"xi": self.statistic, "p-value": self.pvalue, "sd": self.sd}
        if ends is not None:
            shown |= {f"{level} from": ends[0], "to": ends[1]}
        for name, values in shown.items():
            text = np.array2string(values, precision=4, threshold=20, suppress_small=False)
            lines.append(f"  {name}, of shape {values.shape}: {' '.join(text.split())}")
        return "\n".join(lines)


def xi_test(
    x: Any,
    y: Any,
    *,
    y_continuous: bool = False,
    method: Literal["asymptotic", "permutation"] = "asymptotic",
    n_permutations: int | None = None,
    confidence_level: float | None = None,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
) -> XiTestResult:
    """Test independence of x and y with Chatterjee's xi.

    If y is independent of x, xi has mean 0, exactly so over all permutations of y. The p-value is
    one-sided, since dependence makes xi large.

    Parameters
    ----------
    x, y, ties, nan_policy, backend
        As in :func:`xi`, of one column or several.
    y_continuous : bool
        For method="asymptotic". If True, sd = sqrt(2 / (5 n)), the limit for a continuous y and x
        (Theorem 2.1). If False (default), sd is estimated from the ranks of y (Theorem 2.2), which
        is right for a continuous and for a tied y. Where tied x are averaged, the sd is the exact
        one over all permutations of y.
    method : {"asymptotic", "permutation"}
        "asymptotic" (default): sqrt(n) xi tends to a normal distribution. Where tied x are averaged
        it tends to a sum of chi-squares the fewer values x has; a gamma distribution then takes the
        normal one's place. "permutation": p = (1 + b) / (1 + n_permutations), where b random
        permutations of y have at least the given xi. It is right for every n and all ties.
    n_permutations : int, optional
        For method="permutation": from 1 to 10^6; 999 by default, which makes 0.001 the smallest
        p-value.
    confidence_level : float, optional
        Between 0 and 1: an interval for the xi of the population, xi -+ z s, of at least 20 rows.
        The standard error s is from the spread over 200 subsamples, and assumes that sqrt(n) xi is
        nearly normal. That fails where y is a function of x: there the interval means nothing. It
        ends at 1 at most, and is not cut at 0. With a warning, it is nan where xi is the same on
        all subsamples. There is a warning, too, where y is constant in more than 5% of them. By
        default none is computed.
    seed : int in [0, 2**64) or None
        Of ``ties="random"``, permutations and subsamples; None (default) draws a fresh one.

    Returns
    -------
    XiTestResult
        ``(statistic, pvalue, sd)``, with the interval as ``confidence_interval``: floats, or arrays
        of the shape that :func:`xi` returns. With method="permutation" the sd is the exact one over
        all permutations. For a constant y, with a warning, statistic and p-value are nan, and so
        is an estimated sd.

    Raises
    ------
    ValueError, TypeError
        As :func:`xi`, and for options that cannot be used.

    Notes
    -----
    O(n log n) for "asymptotic"; O(n) more for every permutation, and n / 10 rows for every
    subsample. The normal limit serves from n of about 20 on (Chatterjee 2021); with fewer rows take
    permutations. ``docs/inference.md`` says what each p-value and interval assumes.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import xi_test
    >>> x = np.arange(40)
    >>> result = xi_test(x, np.cos(x / 5), method="permutation", seed=0)
    >>> round(result.statistic, 4), round(result.pvalue, 4)
    (0.8143, 0.001)
    """
    check_bool(y_continuous, "y_continuous")
    check_choice(method, "method", METHODS)
    count = check_permutations(method, n_permutations)
    if y_continuous and count:
        raise ValueError(
            "y_continuous=True is for method='asymptotic': permutations need to know nothing of y; "
            "leave it out"
        )
    level = (
        None
        if confidence_level is None
        else check_probability(confidence_level, "confidence_level")
    )
    chosen = resolve_on_cpu("xi_test", backend, x=x, y=y)
    drawn = seed_of_test(seed, bool(count) or level is not None, ties)
    pairs = pairs_of(chosen, x, y, ties, drawn, nan_policy)
    pairs.warn_constant()
    result = tested(chosen, pairs, y_continuous, method, count, ties, drawn, True)
    if level is not None:
        result.confidence_level = level
        result.confidence_interval = _interval(chosen, pairs, result.statistic, level, ties, drawn)
    return result


def seed_of_test(seed: int | None, draws: bool, ties: str) -> int | None:
    """The seed that permutations, subsamples and ties share; None where nothing is drawn."""
    check_seed(seed)
    if not draws and ties != "random":
        return None
    return fresh_seed() if seed is None else int(seed)


def tested(
    backend: HostBackend,
    pairs: XiPairs,
    y_continuous: bool,
    method: str,
    n_permutations: int,
    ties: Ties,
    seed: int | None,
    diagonal: bool,
) -> XiTestResult:
    """The tests of all pairs, of checked options; without a diagonal, p-values there are nan."""
    if method == "asymptotic":
        result = XiTestResult(*pairs.shaped(lambda i, j: pairs.asymptotic(i, j, y_continuous)))
    else:
        tails = _permutation_pvalues(backend, pairs, ties, seed or 0, n_permutations, diagonal)
        result = XiTestResult(pairs.shaped(pairs.xi), tails, pairs.shaped(pairs.permutation_sd))
    result.method, result.n, result.seed = method, pairs.n, seed
    return result


def _permutation_pvalues(
    backend: HostBackend, pairs: XiPairs, ties: Ties, seed: int, count: int, diagonal: bool
) -> Any:
    """The p-values of all pairs. Permutations of a response are drawn once for many columns."""
    X, Y = np.atleast_2d(pairs.X), np.atleast_2d(pairs.Y)
    paths = [Path(x, ties, pairs.tie_seed) for x in X]
    segments = max(len(path.weights) for path in paths)
    at_once = max(1, _AT_ONCE // max(pairs.n, (count + 1) * segments))
    tails = np.full((len(X), len(Y)), math.nan)
    for j in range(len(Y)):
        if pairs.ranks[j].denominator == 0:
            continue
        R = backend.ranks(Y[j])[0]
        used = [i for i in range(len(X)) if diagonal or i != j]
        for first in range(0, len(used), at_once):
            some = used[first : first + at_once]
            together = joined([Weighted(paths[i].pairs, [], []) for i in some])
            sums = backend.permuted_sums(together, R, None, seed, count + 1)
            ends = np.cumsum([len(paths[i].weights) for i in some])[:-1]
            for i, own in zip(some, np.split(sums, ends, axis=1), strict=True):
                tails[i, j] = (1 + paths[i].exceeding(own)) / (1 + count)
    return pairs.shaped(lambda i, j: float(tails[i, j]))


def _interval(
    backend: HostBackend, pairs: XiPairs, values: Any, level: float, ties: Ties, seed: int | None
) -> tuple[Any, Any]:
    def statistic(rows: NDArray[np.int64]) -> Any:
        X, Y = (np.take(each, rows, axis=-1) for each in (pairs.X, pairs.Y))
        paths, ranks = finite(backend.xi_sums(X, Y, ties, pairs.tie_seed))
        part = pairs._replace(X=X, Y=Y, paths=paths, ranks=ranks)
        return part.shaped(part.xi)

    spread = subsampled_sd(statistic, pairs.n, seed=seed or 0)
    return interval(values, spread, level)
