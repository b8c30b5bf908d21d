"""xi against its definition, its twin backend, brute force over orders, and its distribution."""

import math
import time
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcodec_ext import XiTestResult, xi, xi_test
from lcodec_ext.dependence.backends.cpu import CpuBackend
from lcodec_ext.dependence.backends.reference import ReferenceBackend

CPU = CpuBackend()
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
TIES = ["average", "random", "first"]


def xi_in_order(y, order):
    """The definition, exactly, for one order of the rows."""
    n = len(y)
    R = [sum(b <= a for b in y) for a in y]
    L = [sum(b >= a for b in y) for a in y]
    length = sum(abs(R[i] - R[j]) for i, j in pairwise(order))
    return 1 - Fraction(n * length, 2 * sum(v * (n - v) for v in L))


@st.composite
def samples(draw):
    """x and y with many ties, few, or none; y is not constant."""
    n = draw(st.integers(3, 40))
    levels = draw(st.sampled_from([2, 3, 10, 10**6]))
    numbers = st.lists(st.integers(-levels, levels), min_size=n, max_size=n)
    return draw(numbers), draw(numbers.filter(lambda y: len(set(y)) > 1))


# --------------------------------------------------------------------------------------------
# The coefficient


@given(samples(), st.sampled_from(TIES), st.integers(0, 2**64 - 1))
def test_backends_return_the_same_bits(sample, ties, seed):
    x, y = sample
    results = [
        xi_test(x, y, ties=ties, seed=seed, backend=backend) for backend in ("cpu", "reference")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("ties", TIES)
def test_columns_that_are_sorted_side_by_side(ties, simd_level, threads, rng):
    """More than a vector has lanes: near values, far ones, ties, zeros of both signs, an order."""
    x = rng.normal(size=300)
    zeros = rng.choice([-0.0, 0.0, 1.0], 300)
    X = np.array([x, x.round(1), x**15, x + 1e9, zeros, np.arange(300)] * 3)
    found, expected = (each.xi_sums(X, X[:6], ties, 3) for each in (CPU, ReferenceBackend()))
    assert found == expected
    X[17, 299] = np.inf
    assert CPU.xi_sums(X, X[:6], ties, 3) is None


@backends
@pytest.mark.parametrize(
    "x", [(0, 0, 1, 1, 1, 2), (3, 3, 3, 3, 3, 3), (5, 4, 4, 4, 4, 0), (1, 2, 3, 4, 5, 6)]
)
@pytest.mark.parametrize("y", [(0, 1, 2, 3, 4, 5), (4, 1, 4, 1, 0, 9), (1, 0, 0, 0, 0, 0)])
def test_average_is_the_mean_over_all_orders(x, y, backend):
    orders = [order for order in permutations(range(6)) if sorted(x) == [x[i] for i in order]]
    mean = sum(xi_in_order(y, order) for order in orders) / len(orders)
    assert xi(x, y, backend=backend) == float(mean)


@backends
def test_first_orders_ties_by_row(backend):
    x, y = [1, 0, 1, 0, 1], [3, 1, 4, 1, 5]
    expected = float(xi_in_order(y, [1, 3, 0, 2, 4]))
    assert xi(x, y, ties="first", backend=backend) == expected


def test_random_draws_orders_uniformly():
    x, y = [0, 0, 0, 1], [1, 2, 4, 3]
    values = [xi(x, y, ties="random", seed=seed) for seed in range(3000)]
    orders = [(*head, 3) for head in permutations(range(3))]
    expected = {}
    for order in orders:
        value = float(xi_in_order(y, order))
        expected[value] = expected.get(value, 0) + 3000 / len(orders)
    counts = [values.count(value) for value in expected]
    assert sum(counts) == 3000
    assert scipy.stats.chisquare(counts, list(expected.values())).pvalue > 1e-3


def test_random_without_seed_draws_afresh():
    x, y = np.zeros(100), np.random.default_rng(0).normal(size=100)
    assert len({xi(x, y, ties="random") for _ in range(5)}) > 1


@given(samples(), st.randoms())
def test_average_depends_only_on_the_orders_of_x_and_y(sample, random):
    x, y = sample
    rows = list(range(len(x)))
    random.shuffle(rows)
    moved = xi([x[i] ** 3 for i in rows], [math.atan(y[i]) for i in rows])
    assert moved == xi(x, y)


@given(samples())
def test_constant_x_tells_nothing(sample):
    _, y = sample
    assert xi(np.ones(len(y)), y) == 0.0


def test_range():
    n = 101
    x = np.arange(n)
    assert xi(x, x) == xi(x, -x) == (n - 2) / (n + 1)
    assert xi(x, x % 2) < -0.9


def test_agrees_with_scipy():
    rng = np.random.default_rng(1)
    x = rng.normal(size=300)
    for y, y_continuous in ((x**2 + rng.normal(size=300), True), (rng.integers(0, 4, 300), False)):
        expected = scipy.stats.chatterjeexi(x, y, y_continuous=y_continuous)
        result = xi_test(x, y, y_continuous=y_continuous)
        assert result.statistic == pytest.approx(expected.statistic, abs=1e-13)
        assert result.pvalue == pytest.approx(expected.pvalue, abs=1e-13)


@pytest.mark.parametrize("n", [20, 300])
def test_ties_in_the_order_of_the_rows_agree_with_scipy(n):
    """SciPy's sort need not keep the order of equal values, so it is given their places."""
    x, y = np.random.default_rng(n).integers(0, 6, (2, n))
    places = np.argsort(np.argsort(x, kind="stable"))
    expected = scipy.stats.chatterjeexi(places, y)
    result = xi_test(x, y, ties="first")
    assert result.statistic == pytest.approx(expected.statistic, abs=1e-13)
    assert result.pvalue == pytest.approx(expected.pvalue, abs=1e-13)
    assert abs(xi_test(x, y).statistic - expected.statistic) > 1e-4


# --------------------------------------------------------------------------------------------
# Size: a million rows, the most there may be


@pytest.mark.parametrize("size", [1, 2, 1000, 500_000, 1_000_000])
def test_a_million_rows_do_not_overflow(size):
    n = 1_000_000
    x, y = np.arange(n) // size, np.arange(n)
    groups = n // size
    # within a group of consecutive ranks (s^2 - 1) / 3, from one to the next s
    expected = Fraction(groups * (size**2 - 1), 3) + (groups - 1) * size
    (path,), _ = CPU.xi_sums(x.astype(float), y.astype(float), "average", 0)
    assert Fraction(*path.length(0)) == expected


def sums_of_ranks(R):
    """Sums over minima and distances of sorted ranks, in Python's integers."""
    n, total = len(R), sum(R)
    squares = sum((2 * (n - i) + 1) * r * r for i, r in enumerate(R, 1))
    rows, before = [], 0
    for i, r in enumerate(R, 1):
        before += r
        rows.append(before + (n - i) * r)
    distances = [n * r + total - 2 * row for r, row in zip(R, rows, strict=True)]
    return sum(rows), squares, sum(v * v for v in rows), sum(v * v for v in distances)


@pytest.mark.parametrize("apart", [None, 0, 999_999])
def test_the_variance_of_a_million_rows_does_not_overflow(apart):
    n = 1_000_000
    y = np.random.default_rng(0).permutation(n).astype(float)
    if apart is not None:  # one row below the rest or above it: the heaviest ranks there are
        y = np.where(np.arange(n) == 7, apart - 0.5, 1000.0)
    R = np.sort(CPU.ranks(y)[0]).tolist()
    _, (sums,) = CPU.xi_sums(np.arange(n, dtype=float), y, "average", 0)
    expected = (sums.minima, sums.minima_squares, sums.minima_rows, sums.distance_rows)
    assert sums_of_ranks(R) == expected
    assert (sums.total, sums.squares) == (sum(R), sum(r * r for r in R))


def test_a_million_rows_in_small_groups_take_seconds():
    rng = np.random.default_rng(0)
    x, y = rng.permutation(1_000_000) // 2, rng.random(1_000_000)
    start = time.perf_counter()
    assert abs(xi(x, y)) < 0.005
    assert time.perf_counter() - start < 30  # well below 1 s; a loop over the groups takes minutes


def test_sums_of_many_denominators_are_exact():
    rng = np.random.default_rng(2)
    sizes = rng.permutation(np.arange(1, 40))
    x = np.repeat(np.arange(len(sizes)), sizes).astype(float)
    y = rng.integers(0, 500, len(x)).astype(float)
    found, expected = (each.xi_sums(x, y, "average", 0) for each in (CPU, ReferenceBackend()))
    assert found[0][0][:4] == expected[0][0][:4]


# --------------------------------------------------------------------------------------------
# The test of independence


def test_result_is_a_named_tuple():
    result = xi_test([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert isinstance(result, XiTestResult)
    assert result == (result.statistic, result.pvalue, result.sd)
    assert result.pvalue == pytest.approx(0.5 * math.erfc(result.statistic / result.sd / 2**0.5))


@pytest.mark.parametrize(
    ("continuous", "y_continuous"), [(True, True), (True, False), (False, False)]
)
def test_level(continuous, y_continuous):
    rng = np.random.default_rng(3)
    runs, alpha = 1000, 0.1
    rejected = 0
    for _ in range(runs):
        y = rng.random(200) if continuous else rng.random(200) < 0.3
        rejected += xi_test(rng.random(200), y, y_continuous=y_continuous).pvalue < alpha
    assert abs(rejected / runs - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / runs)


def test_level_with_tied_x():
    rng = np.random.default_rng(4)
    runs, alpha = 1000, 0.1
    rejected = {"random": 0, "average": 0}
    for seed in range(runs):
        x, y = rng.integers(0, 5, (2, 200))
        for ties in rejected:
            rejected[ties] += xi_test(x, y, ties=ties, seed=seed).pvalue < alpha
    bound = 4 * math.sqrt(alpha * (1 - alpha) / runs)
    for ties in rejected:
        assert abs(rejected[ties] / runs - alpha) < bound


@backends
def test_nearly_constant_y_has_an_exact_sd(backend):
    y = np.zeros(50)
    y[13] = 1
    result = xi_test(np.arange(50), y, backend=backend)
    assert result.statistic == float(1 - Fraction(50, 49))
    assert result.sd == math.sqrt(1 / 50)  # n times the variance is exactly 1


# --------------------------------------------------------------------------------------------
# Input


@backends
@pytest.mark.parametrize("y_continuous", [False, True])
def test_constant_y(backend, y_continuous):
    with pytest.warns(UserWarning, match="y is constant"):
        assert math.isnan(xi([1, 2, 3, 4], [2, 2, 2, 2], backend=backend))
    with pytest.warns(UserWarning, match="y is constant"):
        result = xi_test([1, 2, 3, 4], [2.0] * 4, y_continuous=y_continuous, backend=backend)
    assert math.isnan(result.statistic)
    assert math.isnan(result.pvalue)
    assert result.sd == math.sqrt(0.1) if y_continuous else math.isnan(result.sd)


def test_arrays_of_all_kinds():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 9, (2, 60))
    expected = xi(x, y)
    readonly = x.astype(float)
    readonly.flags.writeable = False
    for odd in (
        x.tolist(),
        x.astype(np.float16),
        x.astype(np.uint8),
        x.astype(">f8"),
        x[:, np.newaxis],
        np.repeat(x, 2)[::2],
        x[::-1].copy()[::-1],
        readonly,
        x + 10**7,
        x.astype(np.float64) + 1e15,
    ):
        assert xi(odd, y) == expected
    assert xi(x, (y > 4)) == xi(x, (y > 4).astype(float))


def test_tensors():
    x = torch.arange(20, dtype=torch.float64, requires_grad=True)
    y = (x - 7) ** 2
    expected = xi(x.detach().numpy(), y.detach().numpy())
    assert xi(x, y) == expected
    assert xi(x.to(torch.bfloat16), y.half()) == expected


def test_omitted_rows():
    x = [1.0, 5.0, math.nan, 2.0, 2.0, 7.0]
    y = [3.0, 1.0, 4.0, math.nan, 2.0, 9.0]
    kept = [0, 1, 4, 5]
    expected = xi_test([x[i] for i in kept], [y[i] for i in kept])
    assert xi_test(x, y, nan_policy="omit") == expected
    with pytest.raises(ValueError, match="NaN in x at row 2"):
        xi(x, y)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3 rows"),
        ([], [], "at least 3 rows"),
        ([1, 2, 3], [1, 2, 3, 4], "same number of rows"),
        ([1, 2, math.inf], [1, 2, 3], "infinite"),
        (np.ones((4, 2, 2)), [1, 2, 3, 4], "must have shape"),
        ([1, 2, 3], ["a", "b", "c"], "strings"),
        ([1, 2, 3], None, "None"),
        ([1j, 2, 3], [1, 2, 3], "complex"),
    ],
)
def test_bad_data(x, y, message):
    for function in (xi, xi_test):
        with pytest.raises(ValueError, match=message):
            function(x, y)


def test_bad_options():
    x = y = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="ties must be one of"):
        xi(x, y, ties="min")
    with pytest.raises(ValueError, match="backend must be one of"):
        xi(x, y, backend="gpu")
    with pytest.raises(ValueError, match="xi computes on the CPU only; got backend='cuda'"):
        xi(x, y, backend="cuda")
    with pytest.raises(TypeError, match="seed"):
        xi(x, y, ties="random", seed=1.5)
    with pytest.raises(ValueError, match="nan_policy"):
        xi(x, y, nan_policy="drop")
    with pytest.raises(TypeError, match="y_continuous"):
        xi_test(x, y, y_continuous="yes")
