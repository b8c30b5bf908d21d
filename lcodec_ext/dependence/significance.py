"""Is T larger than chance makes it? The tests of independence that belong to `codec`."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor
from lcodec_ext._callers import warn
from lcodec_ext._checks import check_choice, check_integer, check_probability, counted
from lcodec_ext._random import fresh_seed
from lcodec_ext.dependence.backends.base import Backend, Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.classes import Response, responses
from lcodec_ext.dependence.codec import _Arguments, _prepare, codec
from lcodec_ext.dependence.exact import FRACTION_BITS
from lcodec_ext.dependence.exchangeable import DOUBTFUL, NearRows
from lcodec_ext.dependence.limits import (
    MIN_ROWS,
    graph_cube,
    graph_sums,
    interval,
    limit_skewness,
    minima_traces,
    null_moments,
    subsampled_sd,
    upper_tail,
)
from lcodec_ext.dependence.permutation import (
    Blocks,
    Neighbors,
    check_permutations,
    find_neighbors,
    neighbor_pairs,
    numerators,
    permuted_values,
)
from lcodec_ext.dependence.ranks import AnyRanks, ranks_of
from lcodec_ext.dependence.scaling import check_distances

Method = Literal["permutation", "local_permutation", "asymptotic"]
METHODS: tuple[Method, ...] = ("permutation", "local_permutation", "asymptotic")
_CHUNK = 1 << 22  # values of permuted columns at a time


@dataclass(frozen=True, eq=False)
class CodecTestResult:
    """The result of `codec_test`. Unpacks as (statistic, pvalue).

    Attributes
    ----------
    statistic : float
        T(Y, Z) or T(Y, Z | X), the value of `codec`.
    pvalue : float
        ``(1 + #{T_b >= T}) / (n_permutations + 1)``, compared exactly; by a normal or gamma
        distribution with method="asymptotic".
    method : {"permutation", "local_permutation", "asymptotic"}
    alternative : {"greater"}
    n : int
        Rows used.
    n_permutations : int
        0 with method="asymptotic".
    null_distribution : ndarray of float64, shape (n_permutations,)
        T under each permutation, in the order in which they were drawn.
    null_mean, null_sd : float
        Mean and standard deviation of T where nothing but chance makes it: of the permutations
        drawn, or, with method="asymptotic", exactly over all permutations of y.
    null_skewness : float
        Of the limit of many rows, with method="asymptotic": 0 for a normal distribution, otherwise
        that of a gamma distribution. 0 for other methods.
    confidence_interval : tuple of two floats, or None
        Lower and upper end, for the mean of T on so many rows: bias is not covered, so an interval
        can lie below 0, where no T of a population is. nan where the subsamples tell no spread;
        None where none was asked for, and of fewer than 20 rows.
    confidence_level : float or None
        As it was asked for.
    seed : int
        From which permutations and subsamples were drawn: with it the test gives the same again.
    exchangeability_pvalue : float, or None
        With method="local_permutation", a p-value of its assumption: that z is exchangeable where x
        is near. A small one says that z follows x within the blocks: a small `pvalue` then is no
        evidence. None for other methods, and where T is 1 by convention.
    """

    statistic: float
    pvalue: float
    method: Method
    alternative: Literal["greater"]
    n: int
    n_permutations: int
    null_distribution: NDArray[np.float64]
    null_mean: float
    null_sd: float
    confidence_interval: tuple[float, float] | None
    confidence_level: float | None
    seed: int
    exchangeability_pvalue: float | None = None
    null_skewness: float = 0.0

    def __iter__(self) -> Iterator[float]:
        return iter((self.statistic, self.pvalue))

    def plot(self, ax: Any = None) -> Any:
        """Draw T under the permutations, or by its limit, and T of the data with its interval.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            What to draw on; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        from lcodec_ext.dependence.plots import plot_null

        return plot_null(self, ax)

    def __repr__(self) -> str:
        head = (
            f"CodecTestResult: T = {self.statistic:.4f}, p-value = {self.pvalue:.4g} on "
            f"{counted(self.n, 'row')}"
        )
        if self.confidence_level is not None:
            head += f"\n  {self._interval()}"
        by = {
            "permutation": f"{self.n_permutations:,} permutations of y",
            "local_permutation": f"{self.n_permutations:,} permutations of z where x is near",
            "asymptotic": "the limit of many rows",
        }[self.method]
        head += f"\n  by chance T is {self.null_mean:.4f} +- {self.null_sd:.4f}, by {by}"
        if self.exchangeability_pvalue is not None:
            doubt = ": trust no small p-value" if self.exchangeability_pvalue <= DOUBTFUL else ""
            head += (
                "\n  that z is exchangeable where x is near has p-value "
                f"{self.exchangeability_pvalue:.4g}{doubt}"
            )
        return head

    def _interval(self) -> str:
        if self.confidence_interval is None:
            return f"no interval: it needs at least {MIN_ROWS} rows"
        low, high = self.confidence_interval
        text = f"{100 * (self.confidence_level or 0):.6g}% interval"
        if math.isnan(low):
            return f"no {text}: subsamples do not tell how much T varies"
        below = "; it lies below 0, where no population has T" if high < 0 else ""
        text += f" from {low:.4f} to {high:.4f} for the mean of T at this n"
        return f"{text}; bias is not covered{below}"


def codec_test(
    y: Any,
    z: Any,
    x: Any = None,
    *,
    method: Method | None = None,
    n_permutations: int | None = None,
    k_perm: int | None = None,
    alternative: Literal["greater"] = "greater",
    confidence_level: float | None = 0.95,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
    decimals: int | None = None,
    group: Any = None,
) -> CodecTestResult:
    """Test whether y is independent of z, or of z given x, with the coefficient T of `codec`.

    ``docs/inference.md`` says which test assumes what, and what is not known of it.

    Parameters
    ----------
    y, z, x, ties, nan_policy, backend, decimals
        As in `codec`. With strings or categories as y all classes are permuted together.
        Columns of z and x are not standardised, and those of `foci` are: T of two or more columns
        depends on their units, so scale them first, ``table / table.std()``, unless they share one.
    method : {"permutation", "local_permutation", "asymptotic"}, optional
        "permutation", the default without x, permutes y: an exact test of independence of y and
        z, for any distribution, ties and number of columns, if rows are independent.
        "local_permutation", the default with x, permutes z among rows whose x are near each other:
        a test of independence given x. It is exact where x has few different rows, and approximate
        otherwise. "asymptotic" takes no x: a normal distribution with the exact mean and variance
        of T over all permutations of y, which needs no permutations. Where z has few different
        rows, a gamma distribution with the skewness of the limit takes the normal one's place.
    n_permutations : int, optional
        From 1 to 10^6, 999 by default. The smallest p-value is 1 / (n_permutations + 1). Not with
        "asymptotic".
    k_perm : int, optional
        Only for "local_permutation", 3 by default: rows that change places are in blocks of k_perm
        to 2 k_perm - 1 rows, or of more rows with equal x. From 2 to n // 2. Small blocks keep what
        z owes to x, and so the level of the test; larger ones gain little power. Rows are near by
        the ranks of each column of x, whatever its unit.
    alternative : {"greater"}
        Dependence makes T large. A small T is no evidence of anything: there is no other test.
    confidence_level : float or None, default 0.95
        Between 0 and 1: an interval for the mean of T at this n, T -+ c s. The standard error s is
        from the spread of T over 200 subsamples. It covers how T varies, not how far T of n rows
        is from that of the population, and means nothing where y is a function of z. It ends at 1
        at most, and is not cut at 0. None leaves it out; fewer than 20 rows have none.
    seed : int, optional
        In [0, 2^64), for the permutations and for ties="random". None draws a fresh one, which is
        in the result. Permutation b is a function of seed and b: every backend and number of
        threads has the same.
    group : torch.distributed.ProcessGroup, optional
        All its ranks call this function with equal arguments. Each draws a share of the
        permutations and of the subsamples, and has the whole result, with the bits of one process.
        Neighbours are searched on every rank. Warnings come on every rank. See
        ``docs/distributed.md``.

    Returns
    -------
    CodecTestResult
        With p-value 1, an interval of nan, and a warning, where T is 1 by convention: y is
        constant, or a function of x on this sample. With a warning, the interval is nan where T is
        the same on all subsamples. There is a warning, too, where T is undefined on more than 5%
        of them, as where a class of y is rare, and where `exchangeability_pvalue` is 0.05 at most.

    Raises
    ------
    ValueError, TypeError, RuntimeError, torch.OutOfMemoryError
        As `codec`, and for options that cannot be used, such as method="permutation" with an x.
        With a group also for arguments that differ between ranks, and where another rank failed.

    Notes
    -----
    "permutation" searches neighbours once. Each permutation then costs about 3 ns a row and thread
    on continuous data, once for each class. "local_permutation" searches the neighbours in x once,
    and compares all permutations of a single z in one step of `foci`; with several columns of z it
    costs one `codec` for each permutation. The interval takes 200 calls of `codec` on a tenth of
    the rows, 30 to 5000: on one thread 0.07 s at 1000 rows, where 999 permutations take 0.01 s, and
    0.9 s at 10^5, where they take 0.8 s.

    References
    ----------
    M. Azadkia and S. Chatterjee, "A simple measure of conditional dependence", Annals of Statistics
    49 (2021). J. Runge, "Conditional independence testing based on a nearest-neighbor estimator of
    conditional mutual information", AISTATS 2018. I. Kim, M. Neykov, S. Balakrishnan and L.
    Wasserman, "Local permutation tests for conditional independence", Annals of Statistics 50
    (2022).

    Examples
    --------
    >>> import numpy as np
    >>> x, z = np.random.default_rng(1).random((2, 300))
    >>> y = (x + z) % 1
    >>> codec_test(y, z, seed=1).pvalue > 0.05
    True
    >>> codec_test(y, z, x, seed=1).pvalue
    0.001
    """
    ranks = ranks_of(group, "codec_test")
    with ranks.alone("the check of the arguments"):
        chosen = resolve(backend, y=y, z=z, x=x)
        chosen_method = _check_method(method, x, alternative)
        count = check_permutations(chosen_method, n_permutations)
        least = _check_block(chosen_method, k_perm)
        if confidence_level is not None:
            check_probability(confidence_level, "confidence_level")
        given = _prepare(chosen, y, z, x, ties, seed, nan_policy, decimals)
        n = len(given.table)
        if x is not None:
            _check_rows(n, least)
        columns = given.lay_out(chosen)
        factors = check_distances(columns, given.label, len(given.table))
    _agree(ranks, given, chosen_method, count, least, confidence_level, ties, seed)
    drawn = ranks.share_out(1, "the seed", lambda _: fresh_seed() if seed is None else int(seed))[0]
    plan = _Plan(chosen, given, factors, ties, drawn, count, least, ranks)
    found = _NULLS[chosen_method](plan)
    if found is None:
        constant = bool((given.y == given.y[0]).all())
        reason = "constant" if constant else "a function of x on this sample"
        warn(f"y is {reason}: the coefficient and its p-value are 1 by convention")
    ends = None if confidence_level is None else _interval(plan, found, confidence_level)
    if found is None:
        found = _Null(1.0, 1.0, np.ones(count), 1.0, 0.0)
    if found.exchangeability is not None:
        _warn_of_blocks(found.exchangeability)
    return CodecTestResult(
        statistic=found.statistic,
        pvalue=found.pvalue,
        method=chosen_method,
        alternative="greater",
        n=n,
        n_permutations=len(found.values),
        null_distribution=found.values,
        null_mean=found.mean,
        null_sd=found.sd,
        confidence_interval=ends,
        confidence_level=confidence_level,
        seed=drawn,
        exchangeability_pvalue=found.exchangeability,
        null_skewness=found.skewness,
    )


def _agree(ranks: AnyRanks, given: _Arguments, method: Method, *options: Any) -> None:
    """Refuse ranks that test something else."""
    names = "n_permutations", "k_perm", "confidence_level", "ties", "seed"
    arrays = {
        "y": given.y,
        "z": given.table[:, given.r : given.p],
        "x": given.table[:, : given.r] if given.r else None,
    }
    classes = given.target.nominal
    ranks.agree(
        {**arrays, "classes": classes, "method": method, **dict(zip(names, options, strict=True))}
    )


def _warn_of_blocks(pvalue: float) -> None:
    """Say that permutations of z lose what z owes to x."""
    if pvalue <= DOUBTFUL:
        warn(
            "z follows x even within the blocks of near rows in which it is permuted (p-value "
            f"{pvalue:.3g} that it does not): a small p-value of the test is no evidence that y "
            "depends on z given x; pass more rows, fewer columns of x, or k_perm=2, so that blocks "
            "have nearer rows",
        )


def _check_method(method: object, x: Any, alternative: object) -> Method:
    """The method that is meant; refuse those that test something else."""
    check_choice(method, "method", (None, *METHODS))
    if alternative in ("less", "two-sided"):
        raise ValueError(
            f"alternative must be 'greater'; got {alternative!r}: dependence makes T large, and a "
            "small T is no evidence of anything"
        )
    check_choice(alternative, "alternative", ("greater",))
    if x is None and method == "local_permutation":
        raise ValueError(
            "method='local_permutation' permutes z among rows with near x, and x is None; pass x, "
            "or method='permutation'"
        )
    if x is not None and method == "permutation":
        raise ValueError(
            "method='permutation' permutes y over all rows, which tests whether y is independent "
            "of x and z together, not of z given x; pass method='local_permutation', or leave out x"
        )
    if x is not None and method == "asymptotic":
        raise ValueError(
            "method='asymptotic' is for T(Y, Z): no computable distribution of T(Y, Z | X) is "
            "known; pass method='local_permutation', or leave out x"
        )
    if method == "asymptotic":
        return "asymptotic"
    return "permutation" if x is None else "local_permutation"


def _check_block(method: Method, k_perm: int | None) -> int:
    """How many rows a block has at least; refuse what would be ignored."""
    if k_perm is None:
        return 3
    least = check_integer(k_perm, "k_perm", 2)
    if method != "local_permutation":
        raise ValueError(
            f"k_perm={least} needs an x, among whose near rows z is permuted; pass x, or leave out "
            "k_perm"
        )
    return least


def _check_rows(n: int, k_perm: int) -> None:
    """Refuse blocks that would be one."""
    if n < 4:
        raise ValueError(
            f"a test given x needs at least 4 rows, for two blocks of two; got {n}: pass more rows"
        )
    if k_perm > n // 2:
        raise ValueError(
            f"k_perm must be at most n // 2, which is {n // 2} for the {n} rows used, so that not "
            f"all of z is permuted; got {k_perm}"
        )


class _Plan(NamedTuple):
    """What a test computes from."""

    backend: Backend
    given: _Arguments
    factors: NDArray
    ties: Ties
    seed: int
    n_permutations: int
    k_perm: int
    ranks: AnyRanks


class _Null(NamedTuple):
    """T of the data, and what chance makes of it."""

    statistic: float
    pvalue: float
    values: NDArray[np.float64]  # under permutations
    mean: float
    sd: float
    exchangeability: float | None = None
    skewness: float = 0.0  # of the limit

    @classmethod
    def of(cls, exceed: int, values: NDArray[np.float64]) -> "_Null":
        """From T of the data and under permutations, `exceed` of which have at least the data's."""
        null = values[1:]
        pvalue = (1 + exceed) / len(values)
        sd = float(null.std(ddof=1)) if len(null) > 1 else 0.0
        return cls(float(values[0]), pvalue, null, float(null.mean()), sd)


def _responses(plan: _Plan) -> list[Response] | None:
    """The responses; None for a y that is constant."""
    found = responses(plan.backend, plan.given.y, plan.given.target.nominal)
    if len(found) == 1 and (plan.given.target.nominal or found[0].sums.constant):
        return None
    return found


def _neighbors(plan: _Plan) -> Neighbors:
    return find_neighbors(plan.backend, plan.given.table, plan.factors, plan.ties, plan.seed)


def _permuted(plan: _Plan) -> _Null | None:
    """T under permutations of y; None for a y that is constant."""
    with plan.ranks.alone("the search for neighbours"):
        found = _responses(plan)
        pairs = None if found is None else neighbor_pairs(_neighbors(plan))
    if found is None or pairs is None:
        return None
    null = permuted_values(plan.backend, pairs, found, plan.seed, plan.n_permutations, plan.ranks)
    return _Null.of(null.at_least(), null.values())


def _normal(plan: _Plan) -> _Null | None:
    """A normal or gamma distribution in the place of permutations; each rank has it by itself."""
    with plan.ranks.alone("the limit of many rows"):
        return _limit(plan)


def _limit(plan: _Plan) -> _Null | None:
    """The mean and variance of T over all permutations of y, and the skewness of its limit."""
    if plan.given.target.nominal:
        raise ValueError(
            "method='asymptotic' takes numbers as y; got classes without an order: pass "
            "method='permutation'"
        )
    found = _responses(plan)
    if found is None:
        return None
    if plan.ties == "first" and _repeats(plan.given.table):
        raise ValueError(
            "method='asymptotic' goes without ties='first' where rows of z are equal: all of them "
            "have the first one as neighbour, and T has another limit; pass ties='average', or "
            "method='permutation'"
        )
    R, sums = found[0]
    near = _neighbors(plan)
    minima, common = numerators(
        plan.backend.permuted_sums(neighbor_pairs(near).pairs, R, None, 0, 1), neighbor_pairs(near)
    )
    statistic = float(sums.unconditional(Fraction(minima[0], common)))
    ranks = R.cpu().numpy() if is_tensor(R) else R
    graph = graph_sums(near.indptr, near.indices, near.points.size)
    mean, sd = null_moments(sums, ranks, graph)
    cube = graph_cube(near.indptr, near.indices, near.points.size)
    skewness = limit_skewness(graph, cube, *minima_traces(ranks))
    pvalue = 1.0 if sd == 0 else upper_tail((statistic - mean) / sd, skewness)
    return _Null(statistic, pvalue, np.empty(0), mean, sd, skewness=skewness)


def _repeats(table: Any) -> bool:
    """Whether rows of a table are equal."""
    values = table.cpu().numpy() if is_tensor(table) else table
    ordered = values[np.lexsort(values.T)]
    return bool((ordered[1:] == ordered[:-1]).all(axis=1).any())


def _interval(plan: _Plan, found: _Null | None, level: float) -> tuple[float, float] | None:
    """T -+ c s, with s from the spread over subsamples; nan where T is 1 by convention."""
    if len(plan.given.table) < MIN_ROWS:
        return None
    if found is None:
        return math.nan, math.nan
    given, r = plan.given, plan.given.r

    def of_rows(rows: NDArray[np.int64]) -> float:
        taken = _where_it_lies(given.table, rows)
        y, table = given.y[taken], given.table[taken]
        if (y == y[0]).all():
            return math.nan
        if given.target.nominal:
            if 2 * len(np.unique(y)) > len(y):  # a T that `codec` refuses
                return math.nan
            y = y.cpu().numpy() if is_tensor(y) else y
            y = y.astype(str)
        x = table[:, :r] if r else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of columns that are constant in a subsample
            return codec(y, table[:, r:], x, ties=plan.ties, seed=plan.seed, backend=plan.backend)

    spread = subsampled_sd(of_rows, len(given.table), seed=plan.seed, ranks=plan.ranks)
    return interval(found.statistic, spread, level)


def _where_it_lies(array: Any, rows: NDArray[np.int64]) -> Any:
    """Numbers of rows, where an array's or tensor's data are."""
    return array_module(array).from_numpy(rows).to(array.device) if is_tensor(array) else rows


class _Given(NamedTuple):
    """A response with what x tells about it: ``sum m_i``, and ``sum (R_i - m_i)``."""

    R: Any
    minima: Fraction
    denominator: Fraction

    def value(self, minima: Fraction) -> Fraction:
        """T(Y, Z | X); 1 if y is a function of x."""
        if self.denominator == 0:
            return Fraction(1)
        return (minima - self.minima) / self.denominator


class _Sums(NamedTuple):
    """Of some permutations and each response, ``sum m_i`` of x and z in fixed point, rounded down.

    ``exact(k)`` has the exact sums of permutation k.
    """

    low: list[list[Fraction]]
    rounded: list[list[bool]]
    exact: Any


def _locally_permuted(plan: _Plan) -> _Null | None:
    """T under permutations of z among rows with near x; None if x determines y."""
    given, backend = plan.given, plan.backend

    def mean(sums: list[Fraction]) -> Fraction:
        values = [each.value(m) for each, m in zip(conditioned, sums, strict=True)]
        return sum(values, Fraction(0)) / len(values)

    with plan.ranks.alone("the search for near rows"):
        found = responses(backend, given.y, given.target.nominal)
        conditioned = [_conditioned(plan, each) for each in found]
        determined = all(each.denominator == 0 for each in conditioned)
        if not determined:
            unmoved = _compare(plan, conditioned, given.table[:, None, given.r :])
            observed = mean(unmoved.exact(0))
            near = NearRows(backend, given.table[:, : given.r], plan.k_perm)
            columns = [responses(backend, z, False)[0] for z in given.table[:, given.r :].T]
    if determined:
        return None
    slack = sum((1 / each.denominator for each in conditioned if each.denominator), Fraction(0))
    slack *= Fraction(len(given.table), len(conditioned) << FRACTION_BITS)

    def under(some: range) -> tuple[int, list[float]]:
        """How many of some permutations have at least the data's T, and the T of each."""
        exceed, values = 0, []
        for permuted in _permuted_tables(plan, near.blocks, some):
            sums = _compare(plan, conditioned, permuted)
            for k, (low, rounded) in enumerate(zip(sums.low, sums.rounded, strict=True)):
                value = mean(low)
                if any(rounded) and value < observed <= value + slack:
                    value = mean(sums.exact(k))
                exceed += value >= observed
                values.append(float(value))
        return exceed, values

    pieces = plan.ranks.share_out(plan.n_permutations, "the permutations", under)
    values = [float(observed), *(value for _, own in pieces for value in own)]
    return _Null.of(sum(exceed for exceed, _ in pieces), np.array(values))._replace(
        exchangeability=near.exchangeability(columns, plan.seed, plan.n_permutations, plan.ranks)
    )


def _conditioned(plan: _Plan, response: Response) -> _Given:
    given, r = plan.given, plan.given.r
    engine = _engine(plan, response.R, given.table[:, :r])
    for column in range(r - 1):
        engine.select(column)
    minima = engine.exact_sum(r - 1)
    return _Given(response.R, minima, response.sums.sum_R - minima)


def _engine(plan: _Plan, R: Any, table: Any) -> Any:
    columns = plan.backend.lay_out(table)
    factors = np.ones(table.shape[1], dtype=plan.factors.dtype)
    return plan.backend.engine(columns, factors, R, plan.ties, plan.seed)


def _permuted_tables(plan: _Plan, blocks: Blocks, some: range) -> Iterator[Any]:
    """The columns of z under the permutations of these numbers, the first of which is 1.

    A few at a time, of shape (n, permutations, q).
    """
    given, r = plan.given, plan.given.r
    z = given.table[:, r:]
    n, q = z.shape
    size = max(16, _CHUNK // (n * q))
    for first in range(some.start + 1, some.stop + 1, size):
        count = min(size, some.stop + 1 - first)
        moved = plan.backend.permutations(n, blocks.start, plan.seed, first, count)
        rows = np.empty((n, count), dtype=np.int64)
        rows[blocks.order] = blocks.order[moved.T]
        yield z[_where_it_lies(z, rows)]


def _compare(plan: _Plan, conditioned: list[_Given], permuted: Any) -> _Sums:
    """The sums of some permutations of z: a single column of each is a candidate beside x."""
    given, r = plan.given, plan.given.r
    x = given.table[:, :r]
    xp = array_module(x)
    _, count, q = permuted.shape
    if q > 1:
        exact = []
        for k in range(count):
            table = xp.concatenate([x, permuted[:, k]], axis=1)
            exact.append([_sum_of_all(plan, each.R, table) for each in conditioned])
        return _Sums(exact, [[False] * len(conditioned)] * count, exact.__getitem__)
    table = xp.concatenate([x, permuted[:, :, 0]], axis=1)
    engines = [_engine(plan, each.R, table) for each in conditioned]
    for engine in engines:
        for column in range(r):
            engine.select(column)
    scores = [engine.score(np.arange(r, r + count)) for engine in engines]
    unit = 1 << FRACTION_BITS
    low = [
        [Fraction(int(whole[k]) * unit + int(rest[k]), unit) for whole, rest in scores]
        for k in range(count)
    ]
    rounded = [[bool(rest[k]) for _, rest in scores] for k in range(count)]
    return _Sums(low, rounded, lambda k: [engine.exact_sum(r + k) for engine in engines])


def _sum_of_all(plan: _Plan, R: Any, table: Any) -> Fraction:
    engine = _engine(plan, R, table)
    last = table.shape[1] - 1
    for column in range(last):
        engine.select(column)
    total: Fraction = engine.exact_sum(last)
    return total


_NULLS: dict[str, Callable[[_Plan], _Null | None]] = {
    "permutation": _permuted,
    "local_permutation": _locally_permuted,
    "asymptotic": _normal,
}
