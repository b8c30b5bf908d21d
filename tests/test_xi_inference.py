"""xi of many pairs at once, its distribution under independence, its intervals, and its matrix."""

import json
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from itertools import pairwise, permutations
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lcodec_ext import XiMatrix, XiTestResult, xi, xi_matrix, xi_test
from lcodec_ext._random import tie_hash
from lcodec_ext.dependence.backends import cpu
from lcodec_ext.dependence.backends.cpu import CpuBackend
from lcodec_ext.dependence.backends.reference import ReferenceBackend
from lcodec_ext.dependence.limits import upper_tail
from lcodec_ext.dependence.xi import pairs_of

CPU, REFERENCE = CpuBackend(), ReferenceBackend()
ROOT = Path(__file__).parent.parent
TIES = ["average", "random", "first"]


@st.composite
def tables(draw):
    """Columns x and responses y with many ties, few, or none."""
    n = draw(st.integers(3, 25))
    levels = draw(st.sampled_from([1, 2, 5, 10**6]))
    column = st.lists(st.integers(-levels, levels), min_size=n, max_size=n)
    X, Y = (draw(st.lists(column, min_size=1, max_size=3)) for _ in "XY")
    return np.array(X, dtype=float), np.array(Y, dtype=float)


def on_threads(threads):
    return mock.patch.object(cpu, "cpu_settings", return_value=("baseline", threads))


def expected_length(x, R):
    """The length of R in the order of x, as the mean over all orders of tied rows."""
    groups = [[R[i] for i in np.flatnonzero(x == value)] for value in np.unique(x)]
    length = Fraction(0)
    for group in groups:
        length += Fraction(sum(abs(a - b) for a in group for b in group), len(group))
    for left, right in pairwise(groups):
        steps = sum(abs(a - b) for a in left for b in right)
        length += Fraction(steps, len(left) * len(right))
    return length


def exact_xi(x, y):
    R = [int((y <= value).sum()) for value in y]
    L = [int((y >= value).sum()) for value in y]
    n = len(y)
    return 1 - n * expected_length(x, R) / (2 * sum(v * (n - v) for v in L))


# --------------------------------------------------------------------------------------------
# Many pairs in one call


@pytest.mark.native
@given(tables(), st.sampled_from(TIES), st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_all_sums_are_those_of_the_definition(table, ties, seed, threads):
    X, Y = table
    with on_threads(threads):
        found = CPU.xi_sums(X, Y, ties, seed)
    assert found == REFERENCE.xi_sums(X, Y, ties, seed)


@pytest.mark.native
@pytest.mark.parametrize("n", [511, 512, 4095, 4097])
def test_sizes_around_a_change_of_the_sort(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n)) * 10.0 ** rng.integers(-300, 300, n)
    x[rng.integers(0, n, 50)], y[rng.integers(0, n, 50)] = -0.0, 0.0
    order = np.argsort(x, kind="stable")
    (path,), _ = CPU.xi_sums(x, y, "first", 0)
    R = np.array([np.searchsorted(np.sort(y), value, side="right") for value in y])
    assert path.lengths == [[np.abs(np.diff(R[order])).sum()]]


@pytest.mark.native
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_of_what_is_not_finite(bad):
    values = np.arange(10.0)
    broken = np.where(values == 3, bad, values)
    for backend in (CPU, REFERENCE):
        assert backend.xi_sums(values, broken, "average", 0) is None
        assert backend.xi_sums(broken, values, "average", 0) is None


@pytest.mark.parametrize("ties", TIES)
def test_a_batch_has_the_values_of_its_pairs(ties):
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 9, (40, 3)), rng.integers(0, 5, (40, 4))
    options = {"ties": ties, "seed": 5}
    expected = [[xi(X[:, i], Y[:, j], **options) for j in range(4)] for i in range(3)]
    assert xi(X, Y, **options).tolist() == expected
    assert xi(X[:, 0], Y, **options).tolist() == expected[0]
    assert xi(X, Y[:, 1], **options).tolist() == [row[1] for row in expected]
    assert xi(X[:, [0]], Y, **options).tolist() == [expected[0]]
    assert xi(X, Y[:, [1]], **options).shape == (3, 1)
    assert xi(X[:, [0]], Y[:, [1]], **options) == expected[0][1]  # a float
    options |= {"confidence_level": 0.9}
    for method, count in (("asymptotic", None), ("permutation", 49)):
        options["n_permutations"] = count
        result = xi_test(X, Y, method=method, **options)
        assert result.statistic.tolist() == expected
        one = xi_test(X[:, 2], Y[:, 3], method=method, **options)
        assert [each[2, 3] for each in result] == list(one)
        assert tuple(end[2, 3] for end in result.confidence_interval) == one.confidence_interval


def test_names_and_missing_values_of_a_batch():
    X = pd.DataFrame({"a": [1.0, 2, 3, 4, 5], "b": [2.0, math.nan, 1, 5, 4]})
    y = pd.DataFrame({"u": [1, 2, 3, 4, 6], "v": [7, 7, 7, 7, 7]})
    with pytest.raises(ValueError, match=r"NaN in x at row 1, column 'b' \(index 1\)"):
        xi(X, y)
    with pytest.warns(UserWarning, match=r"^column 'v' \(index 1\) of y is constant.* nan$"):
        found = xi(X, y, nan_policy="omit")
    rows = [0, 2, 3, 4]
    assert found[0, 0] == xi(X["a"].iloc[rows], y["u"].iloc[rows])
    assert np.isnan(found[:, 1]).all()
    with pytest.warns(UserWarning, match=r"^y is constant, so xi is undefined: returning nan$"):
        assert math.isnan(xi(X["a"], y["v"]))
    with pytest.warns(UserWarning, match=r"^column 0 of y, column 1 of y are constant"):
        xi(X["a"], np.ones((5, 2)))


def test_numbers_beyond_float64_keep_their_order():
    x = np.array([2**60, 2**60 + 1, 2**60 + 3, 2**60 + 2])
    y = np.array([4, 1, 3, 2], dtype=np.uint64) + np.uint64(2**63)
    assert xi(x, y) == xi([0, 1, 3, 2], [4, 1, 3, 2])
    with pytest.raises(ValueError, match="column 0 of x holds integers beyond"):
        xi(np.column_stack([x, x]), y)


def test_a_strided_or_foreign_array_is_as_good():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(50, 4))
    x, y = table[:, 1], table[:, 3]
    expected = xi(x.copy(), y.copy())
    assert expected == xi(x, y) == xi(x.astype(">f8"), y.tolist()) == xi(np.ma.array(x), y)


# --------------------------------------------------------------------------------------------
# Under independence


@st.composite
def small_samples(draw):
    n = draw(st.integers(3, 6))
    x, y = (draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in "xy")
    return np.array(x, dtype=float), np.array(y, dtype=float)


@given(small_samples().filter(lambda sample: len(set(sample[1])) > 1))
def test_mean_and_sd_are_those_over_all_permutations(sample):
    x, y = sample
    values = [exact_xi(x, y[list(order)]) for order in permutations(range(len(y)))]
    assert sum(values) == 0
    variance = sum(value**2 for value in values) / len(values)
    result = xi_test(x, y, method="permutation", n_permutations=9, seed=0)
    assert result.sd == math.sqrt(variance)
    if len(set(x.tolist())) < len(x):
        assert xi_test(x, y).sd == result.sd


def test_the_variance_of_seven_tied_rows():
    x, y = np.array([0.0, 0, 1, 1, 1, 2, 3]), np.array([5.0, 1, 1, 2, 2, 2, 0])
    values = [exact_xi(x, y[list(order)]) for order in permutations(range(7))]
    variance = sum(value**2 for value in values) / len(values)
    assert xi_test(x, y).sd == math.sqrt(variance)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize(("levels_x", "levels_y"), [(None, None), (4, None), (None, 2), (3, 3)])
def test_permutation_pvalues_count_exact_values(ties, levels_x, levels_y):
    n, count, seed = 23, 60, 11
    rng = np.random.default_rng([n, levels_x or 0, levels_y or 0])
    x, y = (
        rng.random(n) if levels is None else rng.integers(0, levels, n).astype(float)
        for levels in (levels_x, levels_y)
    )
    order = {"average": x, "first": None, "random": None}[ties]
    if order is None:  # the same order as one of distinct values
        pairs = pairs_of(CPU, x, y, ties, seed, "raise")
        words = tie_hash(seed, n) if ties == "random" else np.arange(n)
        order = np.empty(n)
        order[np.lexsort((words, x))] = np.arange(n)
        assert pairs.xi(0, 0) == float(exact_xi(order, y))
    drawn = CPU.permutations(n, None, seed, 1, count)
    beyond = sum(exact_xi(order, y[rows]) >= exact_xi(order, y) for rows in drawn)
    options = {"method": "permutation", "n_permutations": count, "ties": ties, "seed": seed}
    results = [xi_test(x, y, backend=backend, **options) for backend in ("cpu", "reference")]
    assert results[0] == results[1]
    assert results[0].pvalue == (1 + beyond) / (1 + count)


def test_permutation_pvalues_do_not_depend_on_threads():
    x, y = np.random.default_rng(0).integers(0, 30, (2, 300))
    found = set()
    for threads in (1, 2, 3):
        with on_threads(threads):
            found.add(xi_test(x, y, method="permutation", seed=1).pvalue)
    assert len(found) == 1


def test_a_constant_x_tells_nothing():
    for method in ("asymptotic", "permutation"):
        result = xi_test(np.ones(9), np.arange(9), method=method, seed=0)
        assert tuple(result) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("method", "count"), [("asymptotic", None), ("permutation", 99)])
@pytest.mark.parametrize("levels", [2, 6])
def test_level_where_few_values_are_averaged(method, count, levels):
    rng = np.random.default_rng(levels)
    runs, n = 1200, 60
    pvalues = []
    for run in range(runs):
        x, y = rng.integers(0, levels, n).astype(float), np.floor(4 * rng.random(n))
        pvalues.append(xi_test(x, y, method=method, n_permutations=count, seed=run).pvalue)
    for alpha in (0.05, 0.01):  # a normal tail has 0.07 and 0.035
        rejected = (np.array(pvalues) <= alpha).mean()
        assert abs(rejected - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / runs)


@given(st.floats(-3, 30), st.floats(0.02, 3))
def test_the_tail_is_that_of_a_gamma_variable(z, skewness):
    expected = scipy.stats.pearson3.sf(z, skewness)
    assert upper_tail(z, skewness) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_without_skewness_the_tail_is_normal():
    assert upper_tail(1.5) == pytest.approx(scipy.stats.norm.sf(1.5), rel=1e-14)
    assert upper_tail(1.5, 0.0201) == pytest.approx(scipy.stats.norm.sf(1.5), rel=0.01)


@pytest.mark.parametrize("y", [np.arange(12.0) % 5, np.arange(12.0), np.arange(12.0) > 8])
def test_skewness_by_eigenvalues(y):
    x = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3.0])
    n = len(x)
    size = {value: (x == value).sum() for value in x}
    a = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j and x[i] == x[j]:
                a[i, j] = 1 / size[x[i]]
            elif abs(x[i] - x[j]) == 1:
                a[i, j] = 1 / (2 * size[x[i]] * size[x[j]])
    H = np.eye(n) - 1 / n
    R = (y[:, None] >= y).sum(axis=1)
    m, k = (np.linalg.eigvalsh(H @ each @ H) for each in (a, np.minimum.outer(R, R)))
    expected = 8 * (m**3).sum() * (k**3).sum() / (2 * (m**2).sum() * (k**2).sum()) ** 1.5
    pairs = pairs_of(CPU, x, y.astype(float), "average", None, "raise")
    assert pairs.skewness(0, 0, pairs.paths[0].weights(n)) == pytest.approx(
        max(expected, 0), rel=1e-9
    )


# --------------------------------------------------------------------------------------------
# Intervals and results


def test_an_interval_covers_xi():
    runs, n = 150, 200
    covered = 0
    truth = 0.310  # of y = x + e with normal x and e, by 10^6 rows
    for run in range(runs):
        x, e = np.random.default_rng(run).normal(size=(2, n))
        low, high = xi_test(x, x + e, confidence_level=0.9, seed=run).confidence_interval
        covered += low < truth < high
    assert abs(covered / runs - 0.9) < 4 * math.sqrt(0.09 / runs)


def test_result_is_a_tuple_of_three_with_attributes():
    x, y = np.random.default_rng(0).normal(size=(2, 60))
    result = xi_test(x, y, confidence_level=0.5, seed=3)
    statistic, pvalue, sd = result
    low, high = result.confidence_interval
    assert low < statistic < high
    assert (low + high) / 2 == pytest.approx(statistic)
    assert (result.method, result.n) == ("asymptotic", 60)
    assert xi_test(x, y).confidence_interval is None
    assert repr(result) == (
        f"XiTestResult: xi = {statistic:.4f}, p-value = {pvalue:.4g}, sd = {sd:.4f} on 60 rows, "
        f"by the limit of many rows\n  50% interval from {low:.4f} to {high:.4f}"
    )
    other = result._replace(pvalue=0.5)
    assert (other.pvalue, other.statistic, other.n) == (0.5, statistic, 60)
    assert other.confidence_interval == result.confidence_interval
    several = repr(xi_test(np.column_stack([x, y]), y))
    assert several.startswith("XiTestResult: 2 pairs on 60 rows")
    assert "\n  p-value, of shape (2,): [" in several
    assert (pvalue, sd) == xi_test(x, y)[1:]
    copy = pickle.loads(pickle.dumps(result))
    assert isinstance(copy, XiTestResult)
    assert copy == result
    assert copy.confidence_interval == result.confidence_interval
    for backend in ("cpu", "reference"):
        again = xi_test(x, y, confidence_level=0.5, seed=3, backend=backend)
        assert again.confidence_interval == result.confidence_interval


def test_an_interval_of_a_rare_class_leaves_out_what_is_undefined():
    y = np.arange(100) < 3  # many a subsample of 30 rows has none of them
    with pytest.warns(UserWarning, match="of 200 subsamples leave the coefficient undefined"):
        low, high = xi_test(np.arange(100), y, confidence_level=0.95, seed=0).confidence_interval
    assert math.isfinite(low)
    assert low < high


def test_an_interval_without_spread_is_nan():
    x = np.arange(50.0)
    y = np.random.default_rng(0).normal(size=50)
    with pytest.warns(UserWarning, match="the same on all that define it: the interval is nan"):
        assert np.isnan(xi_test(x, x, confidence_level=0.95, seed=0).confidence_interval).all()
    with pytest.warns(UserWarning, match="^2 of 3 coefficients: subsamples do not tell"):
        found = xi_test(x, np.column_stack([x, y, -x]), confidence_level=0.95, seed=0)
    assert np.isnan(found.confidence_interval).sum() == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "exact"}, ValueError, "method must be one of 'asymptotic', 'permutation'"),
        ({"n_permutations": 0}, ValueError, "n_permutations must be an integer from 1 to"),
        ({"n_permutations": 99.0}, TypeError, "n_permutations"),
        ({"n_permutations": 99}, ValueError, "draws no permutations"),
        ({"method": "permutation", "y_continuous": True}, ValueError, "is for method='asymptotic'"),
        ({"confidence_level": 95}, ValueError, "confidence_level must be a number between 0 and 1"),
        ({"confidence_level": 0.9}, ValueError, "an interval needs at least 20 rows; got 4"),
        ({"confidence_level": "0.9"}, TypeError, "confidence_level"),
        ({"seed": -1, "method": "permutation"}, ValueError, "seed"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        xi_test([1, 2, 3, 4], [1, 2, 4, 3], **options)


@pytest.mark.parametrize(
    "options", [{"method": "permutation"}, {"confidence_level": 0.9}, {"ties": "random"}]
)
def test_the_seed_that_was_drawn_is_in_the_result(rng, options):
    x, y = rng.integers(0, 5, (2, 40))
    first = xi_test(x, y, **options)
    again = xi_test(x, y, seed=first.seed, **options)
    assert first.seed == again.seed
    assert tuple(first) == tuple(again)
    assert first.confidence_interval == again.confidence_interval
    assert xi_test(x, y, seed=5).seed is None
    if "confidence_level" not in options:
        X = rng.integers(0, 5, (40, 3))
        matrix = xi_matrix(X, **options)
        assert xi_matrix(X, seed=matrix.seed, **options).pvalue[0, 1] == matrix.pvalue[0, 1]
        assert xi_matrix(X, seed=5).seed is None


def test_a_matrix_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="draws no permutations"):
        xi_matrix(np.eye(4), n_permutations=99)


# --------------------------------------------------------------------------------------------
# The matrix


def test_the_matrix_has_all_pairs():
    rng = np.random.default_rng(4)
    table = rng.normal(size=(80, 4))
    table[:, 3] = np.round(table[:, 0] ** 2)
    frame = pd.DataFrame(table, columns=list("abcd"))
    for X, names in ((frame, list("abcd")), (table, None)):
        found = xi_matrix(X)
        assert isinstance(found, XiMatrix)
        assert (found.names, found.n) == (names, 80)
        for i in range(4):
            for j in range(4):
                one = xi_test(table[:, i], table[:, j])
                assert found.statistic[i, j] == one.statistic
                assert found.pvalue[i, j] == one.pvalue or (i == j and np.isnan(found.pvalue[i, j]))
    tested = ~np.eye(4, dtype=bool)
    for adjust in ("bh", "by"):
        expected = scipy.stats.false_discovery_control(found.pvalue[tested], method=adjust)
        adjusted = xi_matrix(table, adjust=adjust).adjusted
        assert adjusted[tested] == pytest.approx(expected, rel=1e-12)
        assert np.isnan(np.diag(adjusted)).all()
    plain = xi_matrix(table, adjust=None)
    assert np.array_equal(plain.adjusted, plain.pvalue, equal_nan=True)
    assert ", not adjusted" in repr(plain)
    assert "adjusted 0." in repr(found)
    permuted = xi_matrix(table, method="permutation", n_permutations=19, seed=0)
    assert np.isnan(np.diag(permuted.pvalue)).all()
    one = xi_test(table[:, 1], table[:, 2], method="permutation", n_permutations=19, seed=0)
    assert permuted.pvalue[1, 2] == one.pvalue


def test_a_matrix_draws_permutations_once_for_each_response(monkeypatch):
    calls = []
    original = type(CPU).permuted_sums

    def counted(self, *args):
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(type(CPU), "permuted_sums", counted)
    rng = np.random.default_rng(1)
    table = np.column_stack([rng.normal(size=(30, 4)), rng.integers(0, 4, (30, 2))])
    found = xi_matrix(table, method="permutation", n_permutations=49, seed=3)
    assert len(calls) == 6
    for i, j in permutations(range(6), 2):
        one = xi_test(table[:, i], table[:, j], method="permutation", n_permutations=49, seed=3)
        assert found.pvalue[i, j] == one.pvalue


def test_the_matrix_prints_its_largest_pairs():
    x = np.arange(30.0)
    text = repr(xi_matrix(pd.DataFrame({"a": x, "b": (x - 9) ** 2, "c": x % 7})))
    first, second, *_ = text.splitlines()
    assert first == "XiMatrix: 6 pairs of 3 columns, on 30 rows"
    assert second.startswith("  'b' on 'a': xi = 0.")


def test_a_constant_column_of_the_matrix():
    table = np.column_stack([np.arange(9), np.arange(9) ** 2 % 5, np.ones(9)])
    with pytest.warns(UserWarning, match="^column 2 of X is constant, so xi is undefined"):
        found = xi_matrix(table)
    assert np.isnan(found.statistic[:, 2]).all()
    assert np.isfinite(found.adjusted).sum() == 4
    assert found.pvalue[2, 0] == 1.0


def test_rows_that_the_matrix_omits():
    table = np.random.default_rng(0).normal(size=(20, 3))
    table[4, 1] = np.nan
    with pytest.raises(ValueError, match="NaN in x at row 4, column 1"):
        xi_matrix(table)
    found = xi_matrix(table, nan_policy="omit")
    assert found.n == 19
    rest = xi_matrix(np.delete(table, 4, axis=0))
    assert np.array_equal(found.statistic, rest.statistic)


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((5, 1)), {}, "at least two columns"),
        (np.arange(5), {}, "must have shape"),
        (np.ones((2, 2)), {}, "at least 3 rows"),
        ([["a", "b"], ["c", "d"], ["e", "f"]], {}, "real numbers"),
        (np.eye(4), {"adjust": "holm"}, "adjust must be one of"),
        (np.eye(4), {"method": "exact"}, "method must be one of"),
        (np.eye(4), {"backend": "cuda"}, "xi_matrix computes on the CPU only"),
    ],
)
def test_bad_matrices(X, options, message):
    with pytest.raises(ValueError, match=message):
        xi_matrix(X, **options)


# --------------------------------------------------------------------------------------------
# The record


def test_the_record_keeps_its_promises():
    record = json.loads((ROOT / "benchmarks/results/xi_inference.json").read_text())
    for calls in record["cost"]["calls"].values():
        assert max(calls["xi"], calls["xi_test"]) <= record["cost"]["at_most_us"]
    for row in record["level"]:
        if row["n"] >= 50 or row["method"] == "permutation":
            for alpha in (0.05, 0.01):
                assert abs(row[f"share_{alpha}"] - alpha) < 4 * row[f"error_{alpha}"]
    shares = [row["covered"] for row in record["coverage"]]
    assert min(shares) > 0.9
    text = (ROOT / "docs/inference.md").read_text()
    assert f"held it in {100 * min(shares):.1f}% to {100 * max(shares):.1f}%\nof" in text


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/xi_inference.py", "--quick", "--parts", "cost"]
    file = tmp_path / "record.json"
    subprocess.run([*command, "--output", file], check=True, capture_output=True)
    assert set(json.loads(file.read_text())["cost"]["calls"]) >= {"continuous", "both tied"}
