"""codec_test, and foci with stop="permutation"."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import _emulated, codec, codec_test, dependence_graph, foci, lfoci
from lcodec_ext._random import permutation
from lcodec_ext.dependence import exact, foci_null
from lcodec_ext.dependence.backends.resolve import HOST
from lcodec_ext.dependence.foci_null import Level, check_level

pytestmark = pytest.mark.native

TIES = ["average", "random", "first"]
EMULATED = cuda_on_cpu(_emulated.cuda)


def exact_T(y, z, ties="average", seed=0):
    """T as a fraction, from the reference's engine."""
    backend = HOST["reference"]
    z = np.asarray(z, dtype=float).reshape(len(y), -1)
    R, L = backend.ranks(np.asarray(y))
    engine = backend.engine(backend.lay_out(z), np.ones(z.shape[1]), R, ties, seed)
    for column in range(z.shape[1] - 1):
        engine.select(column)
    return exact.ResponseSums(R, L).unconditional(engine.exact_sum(z.shape[1] - 1))


def same(a, b):
    assert tuple(a) == tuple(b)
    assert (a.method, a.n, a.n_permutations, a.seed) == (b.method, b.n, b.n_permutations, b.seed)
    assert a.exchangeability_pvalue == b.exchangeability_pvalue
    assert a.null_distribution.tolist() == b.null_distribution.tolist()


# --------------------------------------------------------------------------------------------
# Permutations of y


@st.composite
def data(draw):
    n = draw(st.integers(3, 14))
    levels = draw(st.sampled_from([1, 2, 4, 10**6]))
    integers = st.lists(st.integers(0, levels), min_size=n, max_size=n)
    y = draw(st.lists(st.integers(0, draw(st.sampled_from([2, 50]))), min_size=n, max_size=n))
    y[0], y[1] = 0, 1  # not constant
    q = draw(st.integers(1, 2))
    return np.array(y), np.array([draw(integers) for _ in range(q)], dtype=float).T


@pytest.mark.filterwarnings("ignore:column")
@given(sample=data(), ties=st.sampled_from(TIES), seed=st.integers(0, 2**64 - 1))
def test_pvalue_counts_the_ts_of_permuted_responses(sample, ties, seed):
    """Compared as fractions, with the coefficient of each permuted response by its definition."""
    y, z = sample
    observed = exact_T(y, z, ties, seed)
    permuted = [exact_T(y[permutation(len(y), seed, b)], z, ties, seed) for b in range(1, 20)]
    expected = Fraction(1 + sum(T >= observed for T in permuted), 20)
    for backend in ("cpu", "reference"):
        result = codec_test(
            y, z, confidence_level=None, n_permutations=19, ties=ties, seed=seed, backend=backend
        )
        assert result.statistic == float(observed) == codec(y, z, ties=ties, seed=seed)
        assert result.pvalue == float(expected)
        assert result.null_distribution.tolist() == [float(T) for T in permuted]


def samples(rng, n=60):
    z = rng.normal(size=n)
    y = z + rng.normal(size=n)
    return {
        "continuous": (y, z),
        "two columns": (y, np.column_stack([z, rng.normal(size=n)])),
        "tied": (np.round(y), np.round(z)),
        "binary": (y > 0, z > 0),
        "many alike": (np.round(y), np.where(rng.random(n) < 0.6, 0, z)),
        "classes": (np.array(list("abc"))[np.digitize(y, [-1, 1])], np.round(z, 1)),
        "single precision": (y, z.astype(np.float32)),
    }


@pytest.mark.parametrize("name", samples(np.random.default_rng(0)))
@pytest.mark.parametrize("ties", TIES)
def test_backends_and_threads_agree(rng, threads, name, ties):
    y, z = samples(rng)[name]
    options = {"n_permutations": 30, "seed": 5, "ties": ties, "confidence_level": None}
    results = [codec_test(y, z, backend=backend, **options) for backend in ("cpu", "reference")]
    if y.dtype.kind != "U":
        given = torch.as_tensor(y), torch.as_tensor(z)
        results.append(codec_test(*given, backend=EMULATED, **options))
    for other in results[1:]:
        same(results[0], other)
    assert results[0].statistic == codec(y, z, ties=ties, seed=5)


def test_dependence_is_found_and_independence_is_not(rng):
    x = rng.random(300)
    assert codec_test((7 * x) % 1, x, seed=0).pvalue == 0.001
    ps = [
        codec_test(rng.random(30), x[:30], confidence_level=None, n_permutations=19, seed=s).pvalue
        for s in range(400)
    ]
    rejected = np.mean(np.array(ps) <= 0.1)
    assert abs(rejected - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 400)


def test_size_with_ties(rng):
    """At most alpha, where T takes few values."""
    rejected = 0
    for seed in range(400):
        y, z = rng.integers(0, 2, (2, 40))
        y[:2] = 0, 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rejected += (
                codec_test(y, z, confidence_level=None, n_permutations=19, seed=seed).pvalue <= 0.1
            )
    assert rejected / 400 < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 400)


def test_classes_do_not_depend_on_their_names(rng):
    z = rng.normal(size=90)
    kind = np.digitize(z + rng.normal(size=90), [-0.5, 0.5])
    a = codec_test(np.array(["x", "y", "z"])[kind], z, seed=1)
    b = codec_test(pd.Categorical(np.array(["q", "b", "m"])[kind]), z, seed=1)
    assert tuple(a) == tuple(b)
    np.testing.assert_allclose(a.null_distribution, b.null_distribution, rtol=0, atol=1e-15)
    assert a.statistic == codec(np.array(["x", "y", "z"])[kind], z)


def test_a_seed_is_drawn_and_told(rng):
    y, z = rng.normal(size=(2, 50))
    first = codec_test(y, z)
    assert codec_test(y, z).seed != first.seed
    same(first, codec_test(y, z, seed=first.seed))


def test_result_reads_well(rng):
    y, z = rng.normal(size=(2, 50))
    result = codec_test(y, z, seed=0, n_permutations=99)
    statistic, pvalue = result
    assert (statistic, pvalue) == (result.statistic, result.pvalue)
    assert repr(result).startswith(f"CodecTestResult: T = {statistic:.4f}, p-value = {pvalue:.4g}")
    assert "99 permutations of y" in repr(result)
    assert "99 permutations of z where x is near" in repr(
        codec_test(y, z, rng.normal(size=50), seed=0, n_permutations=99)
    )


def test_constant_responses_warn():
    with pytest.warns(UserWarning, match="y is constant: the"):
        result = codec_test(np.ones(20), np.arange(20), method="asymptotic")
    assert (*result, result.n_permutations) == (1.0, 1.0, 0)
    with pytest.warns(UserWarning, match="1 by convention"):
        result = codec_test(np.ones(20), np.arange(20), n_permutations=9)
    assert tuple(result) == (1.0, 1.0)
    with pytest.warns(UserWarning, match="1 by convention"):
        result = codec_test(["a"] * 20, np.arange(20), n_permutations=9)
    assert tuple(result) == (1.0, 1.0)
    x = np.repeat(np.arange(10), 2)
    with pytest.warns(UserWarning, match="y is a function of x on this sample: the"):
        result = codec_test(x, np.arange(20), x, n_permutations=9, k_perm=2)
    assert tuple(result) == (1.0, 1.0)


def test_rows_with_nan_can_be_left_out(rng):
    y, z = rng.normal(size=(2, 60))
    y[3] = z[7] = np.nan
    keep = ~(np.isnan(y) | np.isnan(z))
    with pytest.raises(ValueError, match="NaN in y"):
        codec_test(y, z)
    result = codec_test(y, z, nan_policy="omit", seed=2)
    same(result, codec_test(y[keep], z[keep], seed=2))
    assert result.n == 58


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "permutation", "x": True}, ValueError, "not of z given x"),
        ({"method": "local_permutation"}, ValueError, "x is None"),
        ({"method": "bootstrap"}, ValueError, "method must be one of"),
        ({"method": "asymptotic", "x": True}, ValueError, "no computable distribution"),
        ({"method": "asymptotic", "y": ["a", "b"] * 15}, ValueError, "takes numbers as y"),
        ({"confidence_level": 95}, ValueError, "between 0 and 1"),
        ({"y": np.ones((30, 2))}, ValueError, "y must be one column"),
        ({"alternative": "less"}, ValueError, "alternative must be 'greater'"),
        ({"alternative": "two-sided"}, ValueError, "no evidence"),
        ({"alternative": "bigger"}, ValueError, "alternative must be one of"),
        ({"n_permutations": 0}, ValueError, "n_permutations must be"),
        ({"n_permutations": 99.0}, TypeError, "n_permutations must be"),
        ({"k_perm": 1}, ValueError, "k_perm must be"),
        ({"k_perm": 16, "x": True}, ValueError, "at most n // 2"),
        ({"k_perm": 3}, ValueError, "k_perm=3 needs an x"),
        ({"x": [1, 2, 3], "y": [1, 2, 3], "z": [1, 2, 3]}, ValueError, "at least 4 rows"),
        ({"method": "asymptotic", "n_permutations": 99}, ValueError, "draws no permutations"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"seed": 1.5}, TypeError, "seed must be"),
        ({"ties": "all"}, ValueError, "ties must be one of"),
        ({"z": ["a"] * 30}, ValueError, "z"),
        ({"z": np.zeros((30, 0))}, ValueError, "at least one column"),
        ({"z": np.arange(29)}, ValueError, "same number of rows"),
        ({"y": [1, 2], "z": [1, 2]}, ValueError, "at least 3 rows"),
    ],
)
def test_what_cannot_be_used_is_refused(rng, changes, error, message):
    options = {"y": rng.normal(size=30), "z": rng.normal(size=30)} | changes
    if options.get("x") is True:
        options["x"] = rng.normal(size=30)
    with pytest.raises(error, match=message):
        codec_test(**options)


def test_kinds_of_input_give_the_same(rng):
    y, z = rng.normal(size=(2, 40))
    expected = codec_test(y, z, seed=3, n_permutations=49)
    same(expected, codec_test(y.tolist(), z.tolist(), seed=3, n_permutations=49))
    same(expected, codec_test(pd.Series(y), pd.DataFrame({"z": z}), seed=3, n_permutations=49))
    same(expected, codec_test(torch.as_tensor(y), torch.as_tensor(z), seed=3, n_permutations=49))


# --------------------------------------------------------------------------------------------
# Permutations of z among rows with near x


@pytest.mark.parametrize("q", [1, 2])
@pytest.mark.parametrize("kind", ["continuous", "tied", "classes", "float32"])
def test_local_permutations_are_those_of_codec(rng, q, kind):
    """Every T under a permutation is codec's of the permuted z; backends agree."""
    n = 48
    x, z = rng.normal(size=(n, 2)), rng.normal(size=(n, q))
    y = x[:, 0] + z[:, 0] + rng.normal(size=n)
    if kind == "tied":
        x, z, y = np.round(x[:, :1]), np.round(z), np.round(y)
    if kind == "float32":
        x, z = x.astype(np.float32), z.astype(np.float32)
    given = np.array(["a", "b"])[(y > 0).astype(int)] if kind == "classes" else y
    options = {"n_permutations": 12, "seed": 8, "k_perm": 4, "confidence_level": None}
    result = codec_test(given, z, x, **options)
    assert result.statistic == codec(given, z, x)
    from lcodec_ext.dependence.permutation import column_ranks, near_blocks

    blocks = near_blocks(column_ranks(x), 4)
    for b, T in enumerate(result.null_distribution, 1):
        rows = np.empty(n, dtype=int)
        rows[blocks.order] = blocks.order[permutation(n, 8, b, blocks.start)]
        assert abs(T - codec(given, z[rows], x)) < 1e-9
    same(result, codec_test(given, z, x, backend="reference", **options))
    if kind != "classes":
        tensors = (torch.as_tensor(v) for v in (y, z, x))
        same(result, codec_test(*tensors, backend=EMULATED, **options))


@pytest.mark.filterwarnings("ignore:z follows x")
def test_conditional_dependence_is_found_and_independence_is_not(rng):
    x, z = rng.random((2, 300))
    assert codec_test((x + z) % 1, z, x, seed=0, n_permutations=199).pvalue == 1 / 200
    rejected = 0
    for seed in range(200):
        x = rng.normal(size=60)
        y, z = x + rng.normal(size=(2, 60))  # dependent, and independent given x
        rejected += (
            codec_test(y, z, x, confidence_level=None, n_permutations=19, seed=seed).pvalue <= 0.1
        )
    assert abs(rejected / 200 - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 200)


@pytest.mark.filterwarnings("ignore:z follows x")
def test_local_permutation_is_exact_for_few_values_of_x(rng):
    rejected = 0
    for seed in range(300):
        x = rng.integers(0, 3, 60)
        y, z = x + rng.random((2, 60))
        rejected += (
            codec_test(y, z, x, confidence_level=None, n_permutations=19, seed=seed).pvalue <= 0.1
        )
    assert abs(rejected / 300 - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 300)


@pytest.mark.filterwarnings("ignore:z follows x")
def test_columns_of_x_count_alike_whatever_their_units(rng):
    """z and y follow a group; the other column of x has a large unit, and tells nothing."""
    rejected = 0
    for seed in range(100):
        group, age = rng.integers(0, 2, 200), np.round(15 * rng.normal(size=200))
        y, z = 3 * group + rng.normal(size=(2, 200))
        x = np.column_stack([group, age])
        rejected += (
            codec_test(y, z, x, confidence_level=None, n_permutations=19, seed=seed).pvalue <= 0.1
        )
    assert rejected / 100 < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 100)


def follows(rng, d):
    x = rng.normal(size=(200, d))
    return x, *(x.sum(axis=1) + 0.5 * rng.normal(size=(2, 200)))


@pytest.mark.parametrize("q", [1, 3])
def test_z_that_follows_x_within_blocks_is_told(rng, q):
    """With five columns of x the test would reject nearly always, though y is independent of z."""
    x, y, z = follows(rng, 5)
    z = np.column_stack([rng.normal(size=(200, q - 1)), z])
    with pytest.warns(UserWarning, match="even within the blocks") as caught:
        result = codec_test(y, z, x, confidence_level=None, n_permutations=99, seed=0)
    assert caught[0].filename == __file__
    assert result.exchangeability_pvalue == 0.01
    assert "has p-value 0.01: trust no small p-value" in repr(result)


@pytest.mark.filterwarnings("ignore:z follows x")
@pytest.mark.parametrize("q", [1, 2])
def test_exchangeability_is_tested_exactly(rng, q):
    """Where it holds, the p-value is at most alpha with probability alpha."""
    rejected = 0
    for seed in range(200):
        x, y, *z = rng.normal(size=(q + 2, 60))
        found = codec_test(
            y, np.transpose(z), x, confidence_level=None, n_permutations=19, seed=seed
        )
        rejected += found.exchangeability_pvalue <= 0.1
    assert abs(rejected / 200 - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 200)


def test_blocks_of_equal_x_are_not_doubted(rng):
    x = rng.integers(0, 3, 60)
    y, z = x + rng.random((2, 60))
    assert codec_test(y, z, x, n_permutations=9).exchangeability_pvalue == 1


def test_exchangeability_is_that_of_every_permuted_z(rng):
    from lcodec_ext.dependence.permutation import column_ranks, near_blocks

    x, z = rng.normal(size=(2, 40))
    z = np.round(z + x, 1)
    found = codec_test(rng.normal(size=40), z, x, n_permutations=19, seed=3)
    blocks = near_blocks(column_ranks(x[:, None]), 3)
    values = []
    for b in range(20):
        rows = np.empty(40, dtype=int)
        rows[blocks.order] = blocks.order[permutation(40, 3, b, blocks.start)]
        values.append(exact_T(z[rows], column_ranks(x[:, None])))
    assert found.exchangeability_pvalue == sum(T >= values[0] for T in values) / 20


def test_only_local_permutation_has_an_exchangeability_pvalue(rng):
    y, z = rng.normal(size=(2, 30))
    assert codec_test(y, z, n_permutations=9).exchangeability_pvalue is None


# --------------------------------------------------------------------------------------------
# The normal limit, and intervals


def test_normal_limit_has_the_moments_of_all_permutations(rng):
    """Over all 720 orders of y, tied and not."""
    for y, z in (
        (np.arange(6), rng.normal(size=6)),
        (np.array([0, 0, 1, 1, 2, 5]), np.array([0.0, 0, 1, 3, 3, 4])),
    ):
        values = [float(exact_T(np.array(order), z)) for order in itertools.permutations(y)]
        result = codec_test(y, z, method="asymptotic")
        assert result.null_mean == pytest.approx(np.mean(values), abs=1e-14)
        assert result.null_sd == pytest.approx(np.std(values), abs=1e-14)
        assert result.statistic == codec(y, z)
        score = (result.statistic - result.null_mean) / result.null_sd
        normal = 0.5 * math.erfc(score / math.sqrt(2))
        assert abs(result.pvalue - normal) < 0.05
        assert len(result.null_distribution) == result.n_permutations == 0
        assert "by the limit of many rows" in repr(result)


@pytest.mark.parametrize("name", sorted(set(samples(np.random.default_rng(0))) - {"classes"}))
@pytest.mark.parametrize("ties", TIES)
def test_limit_is_the_same_on_every_backend(rng, name, ties):
    y, z = samples(rng)[name]
    options = {"method": "asymptotic", "seed": 5, "ties": ties, "confidence_level": None}
    table = np.reshape(np.asarray(z), (len(z), -1))
    if ties == "first" and len(np.unique(table, axis=0)) < len(table):
        with pytest.raises(ValueError, match="goes without ties='first' where rows of z are equal"):
            codec_test(y, z, **options)
        return
    a = codec_test(y, z, **options)
    b = codec_test(y, z, backend="reference", **options)
    c = codec_test(torch.as_tensor(y), torch.as_tensor(z), backend=EMULATED, **options)
    for other in (b, c):
        same(a, other)
        assert (a.null_mean, a.null_sd) == (other.null_mean, other.null_sd)


def test_limit_of_a_binary_z_has_the_level_of_its_tail():
    """A sum of chi-squares: with a normal tail 3.8% are below 0.01."""
    runs = 2000
    below = np.zeros(2)
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        y, z = rng.normal(size=100), rng.integers(0, 2, 100)
        found = codec_test(y, z, method="asymptotic", confidence_level=None)
        below += found.pvalue <= np.array([0.05, 0.01])
    for share, alpha in zip(below / runs, (0.05, 0.01), strict=True):
        assert abs(share - alpha) < 4 * np.sqrt(alpha * (1 - alpha) / runs)


def test_interval_is_the_same_on_every_backend(rng):
    y, z = rng.integers(0, 9, (2, 40))
    options = {"method": "asymptotic", "confidence_level": 0.9, "seed": 5}
    a, b = (codec_test(y, z, backend=backend, **options) for backend in ("cpu", "reference"))
    assert a.confidence_interval == b.confidence_interval
    low, high = a.confidence_interval
    assert low < a.statistic < high
    assert (low + high) / 2 == pytest.approx(a.statistic)


def test_limit_agrees_with_permutations(rng):
    y, z = rng.normal(size=(2, 500))
    limit = codec_test(y, z, method="asymptotic")
    drawn = codec_test(y, z, seed=0, n_permutations=1999)
    assert abs(limit.null_sd - drawn.null_sd) < 4 * limit.null_sd / np.sqrt(2 * 1999)
    assert abs(limit.null_mean - drawn.null_mean) < 4 * limit.null_sd / np.sqrt(1999)
    assert abs(limit.pvalue - drawn.pvalue) < 0.05


def test_z_that_tells_nothing_has_pvalue_1(rng):
    y = rng.normal(size=19)
    with pytest.warns(UserWarning, match="constant"):
        assert codec_test(y, np.ones(19), method="asymptotic").pvalue == 1


def test_interval_has_the_t_of_many_samples(rng):
    """The standard error is about the spread of T over samples."""
    n = 400

    def sample():
        z = rng.normal(size=n)
        return z + rng.normal(size=n), z

    spread = np.std([codec(*sample()) for _ in range(200)], ddof=1)
    found = codec_test(*sample(), confidence_level=0.6826894921, seed=0, n_permutations=1)
    low, high = found.confidence_interval
    assert 0.7 * spread < (high - low) / 2 < 1.5 * spread
    assert f"  68.2689% interval from {low:.4f} to {high:.4f} for the mean of T" in repr(found)


def test_intervals_of_conditional_and_nominal_ts(rng):
    x, z = rng.normal(size=(2, 200))
    y = x + z + 0.5 * rng.normal(size=200)
    options = {"confidence_level": 0.95, "n_permutations": 9, "seed": 1}
    for sample in ((y, z, x), (np.array(["a", "b", "c"])[np.digitize(y, [-1, 1])], z)):
        result = codec_test(*sample, **options)
        low, high = result.confidence_interval
        assert low < result.statistic < high
        assert result.confidence_interval == codec_test(*sample, **options).confidence_interval


def test_an_interval_is_the_default():
    y, z = np.random.default_rng(0).normal(size=(2, 30))
    found = codec_test(y, z, seed=1)
    assert found.confidence_level == 0.95
    again = codec_test(y, z, seed=1, confidence_level=0.95)
    assert found.confidence_interval == again.confidence_interval
    without = codec_test(y, z, seed=1, confidence_level=None)
    assert without.confidence_interval is None
    assert "interval" not in repr(without)
    few = codec_test(y[:19], z[:19], seed=1)
    assert few.confidence_interval is None
    assert "no interval: it needs at least 20 rows" in repr(few)


def test_an_interval_ends_at_1():
    z = np.arange(60.0)
    found = codec_test(np.abs(z - 20) // 3, z, confidence_level=0.9999, seed=0)
    assert found.confidence_interval[1] == 1.0
    assert found.confidence_interval[0] < found.statistic


@pytest.mark.filterwarnings("ignore:column 0 of z is constant")
@pytest.mark.parametrize("case", ["one class is a single row", "constant z"])
def test_an_interval_without_spread_is_nan(case):
    z = np.random.default_rng(0).normal(size=300)
    y = np.arange(300) == 7
    if case == "constant z":
        y, z = z, np.ones(300)
    with pytest.warns(UserWarning, match="the same on all that define it: the interval is nan"):
        found = codec_test(y, z, n_permutations=9, seed=0)
    assert np.isnan(found.confidence_interval).all()
    assert "no 95% interval: subsamples do not tell how much T varies" in repr(found)


def test_subsamples_without_t_are_told():
    z = np.random.default_rng(0).normal(size=60)
    with pytest.warns(UserWarning, match=r"\d+ of 200 subsamples leave the coefficient undefined"):
        codec_test(np.arange(60) % 20 == 7, z, n_permutations=9, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec_test(np.arange(60) % 4 == 1, z, n_permutations=9, seed=0)


def test_a_t_by_convention_has_no_interval():
    with pytest.warns(UserWarning, match="1 by convention") as told:
        found = codec_test(np.ones(30), np.arange(30), n_permutations=9)
    assert len(told) == 1
    assert np.isnan(found.confidence_interval).all()


def test_an_interval_below_0_says_so():
    """Irrelevant z given two columns that tell y: T of the population is 0."""
    a, b, z = np.random.default_rng(0).normal(size=(3, 300))
    y = np.sin(3 * a) + b**2
    found = codec_test(y, z, np.column_stack([a, b]), n_permutations=9, seed=0)
    assert found.confidence_interval[1] < 0
    assert "it lies below 0, where no population has T" in repr(found)


# --------------------------------------------------------------------------------------------
# foci with stop="permutation"


def test_nothing_is_selected_where_y_depends_on_nothing(rng):
    """In 1 - alpha of runs: the first step is an exact test."""
    runs, alpha = 300, 0.1
    selected = 0
    for seed in range(runs):
        X, y = rng.normal(size=(50, 6)), rng.normal(size=50)
        result = foci(X, y, stop="permutation", alpha=alpha, n_permutations=19, seed=seed)
        selected += len(result.ordering) > 0
    assert abs(selected / runs - alpha) < 4 * np.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.filterwarnings("ignore:y follows")
def test_columns_that_matter_are_selected(rng):
    X = rng.normal(size=(500, 8))
    y = X[:, 2] + X[:, 5]
    result = foci(X, y, stop="permutation", seed=1, n_permutations=199)
    assert sorted(result.ordering.tolist()) == [2, 5]
    assert len(result.threshold) == len(result.pvalues) == 3  # and of the step that ended it
    assert (result.pvalues[:2] == 1 / 200).all()
    assert (result.cumulative > result.threshold[:2]).all()
    assert "p-value 0.005" in repr(result)


@pytest.mark.parametrize("kind", ["continuous", "tied", "classes"])
@pytest.mark.parametrize("ties", TIES)
def test_backends_agree_on_steps(rng, kind, ties):
    X = rng.normal(size=(60, 4))
    y = X[:, 1] + 0.3 * rng.normal(size=60)
    if kind == "tied":
        X, y = np.round(X), np.round(y)
    if kind == "classes":
        y = np.array(["a", "b", "c"])[np.digitize(y, [-0.5, 0.5])]
    options = {"stop": "permutation", "alpha": 0.2, "n_permutations": 19, "seed": 4, "ties": ties}
    results = [foci(X, y, backend=backend, **options) for backend in ("cpu", "reference")]
    if kind != "classes":
        results.append(foci(torch.as_tensor(X), torch.as_tensor(y), backend=EMULATED, **options))
    for other in results[1:]:
        assert other.ordering.tolist() == results[0].ordering.tolist()
        assert other.threshold.tolist() == results[0].threshold.tolist()
        assert other.pvalues.tolist() == results[0].pvalues.tolist()
        kept = [each.exchangeability_pvalues for each in (other, results[0])]
        np.testing.assert_array_equal(*kept)
        assert other.stop_reason == results[0].stop_reason


def test_first_steps_pvalue_is_that_of_the_largest_t(rng):
    n, p = 30, 4
    X, y = rng.integers(0, 6, (n, p)).astype(float), rng.integers(0, 4, n)
    result = foci(
        X, y, stop="permutation", n_permutations=39, seed=6, standardize=None, max_features=1
    )
    best = max(exact_T(y, X[:, k]) for k in range(p))
    permuted = [y[permutation(n, 6, b)] for b in range(1, 40)]
    largest = [max(exact_T(one, X[:, k]) for k in range(p)) for one in permuted]
    assert result.pvalues[0] == (1 + sum(T >= best for T in largest)) / 40
    assert abs(result.threshold[0] - float(sorted(largest)[-2])) < 1e-12  # alpha 40 = 2


def test_preselected_columns_are_permuted_within(rng):
    X = rng.normal(size=(300, 4))
    y = X[:, 0] + X[:, 1] + 0.1 * rng.normal(size=300)
    result = foci(X, y, stop="permutation", preselected=[0], seed=0, n_permutations=99)
    assert result.ordering.tolist() == [1]
    assert result.threshold[0] > result.base


def test_y_that_follows_the_selected_columns_within_blocks_is_told(rng):
    x, y, _ = follows(rng, 8)
    needless = x.sum(axis=1) + 0.1 * rng.normal(size=200)
    X = np.column_stack([x, needless])
    options = {"stop": "permutation", "n_permutations": 99, "seed": 0}
    with pytest.warns(UserWarning, match="when column 8 was selected") as caught:
        result = foci(X, y, preselected=range(8), **options)
    assert caught[0].filename == __file__
    assert result.exchangeability_pvalues.tolist() == [0.01]
    X = np.random.default_rng(2).normal(size=(400, 3))
    with pytest.warns(UserWarning, match="for 1 of 4 columns, the column follows") as caught:
        dependence_graph(np.column_stack([X, X.sum(axis=1)]), **options)
    assert len(caught) == 1


def test_a_step_that_is_not_taken_is_not_doubted(rng):
    x, y, _ = follows(rng, 8)
    X = np.column_stack([x, rng.normal(size=200)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = foci(X, y, preselected=range(8), stop="permutation", n_permutations=99, seed=0)
    assert result.ordering.tolist() == []
    assert result.exchangeability_pvalues.tolist() == [0.01]


@pytest.mark.parametrize(
    ("alpha", "n_permutations", "most"),
    [
        (0.3, 9, 2),
        (0.05, 999, 49),
        (0.1, 19, 1),
        (0.29, 99, 28),
        (1e-6, 999_999, 0),
        (0.05, 18, -1),
    ],
)
def test_threshold_and_pvalue_decide_alike(alpha, n_permutations, most):
    """As many permutations may reach a gain as leave its p-value, as a float, at most alpha."""
    assert Level(alpha, n_permutations).most == most
    assert (2 + most) / (n_permutations + 1) > alpha


def test_smallest_levels_are_taken():
    assert check_level("permutation", 1e-6, 999_999).most == 0
    for n in (9, 18, 22, 48, 99, 106, 999):
        assert check_level("permutation", 1 / (n + 1), n).most == 0
        with pytest.raises(ValueError, match=f"at least {n} for"):
            check_level("permutation", 1 / (n + 1), n - 1)


def test_a_step_that_is_taken_exceeds_its_threshold(rng):
    for seed in range(60):
        X, y = rng.normal(size=(30, 3)), rng.normal(size=30)
        found = foci(
            X, y, stop="permutation", alpha=0.3, n_permutations=9, seed=seed, max_features=1
        )
        taken = len(found.ordering)
        assert (found.cumulative > found.threshold[:taken]).all()
        assert (found.pvalues[:taken] <= 0.3).all()


def test_many_permutations_are_held_a_few_columns_at_a_time(rng, monkeypatch):
    X, y = np.round(rng.normal(size=(2, 40, 9)), 1)
    y = y[:, 0] + X[:, 1]
    options = {"stop": "permutation", "n_permutations": 99, "seed": 0, "max_features": 1}
    sizes = []
    sums = type(HOST["cpu"]).permuted_sums

    def counted(*given):
        found = sums(*given)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(type(HOST["cpu"]), "permuted_sums", counted)
    expected = foci(X, y, **options)
    assert len(sizes) == 1
    monkeypatch.setattr(foci_null, "_SUMS", sizes[0] // 4)
    found = foci(X, y, **options)
    assert max(sizes[1:]) < sizes[0] / 2
    assert found.pvalues.tolist() == expected.pvalues.tolist()
    assert found.threshold.tolist() == expected.threshold.tolist()


def test_the_best_column_that_was_not_taken_is_named(rng):
    X = pd.DataFrame(rng.normal(size=(60, 3)), columns=["age", "size", "place"])
    y = X["size"] + 0.1 * rng.normal(size=60)
    options = {"stop": "permutation", "n_permutations": 99, "seed": 0}
    found = foci(X, y, **options)
    assert found.names == ["size"]
    best = foci(X, y, stop=False, preselected=["size"], max_features=1)
    assert (found.not_taken, [found.not_taken_name]) == (best.ordering[0], best.names)
    last = f"stopped: the best of the others, {found.not_taken_name!r} ({found.not_taken}), has"
    assert f"{last} p-value {found.pvalues[-1]:.4g}" in repr(found)
    nothing = foci(X.to_numpy(), rng.normal(size=60), **options)
    assert nothing.ordering.tolist() == []
    assert f"others, column {nothing.not_taken}, has p-value {nothing.pvalues[0]:.4g}" in repr(
        nothing
    )
    assert nothing.not_taken_name is None
    plain = foci(X, y)
    assert (plain.stop_reason, plain.not_taken) == ("no_gain", None)
    graph = dependence_graph(X, **options)
    for k, result in enumerate(graph.results):
        if result.not_taken is not None:
            assert result.not_taken != k
            assert result.not_taken_name == X.columns[result.not_taken]


def test_the_seed_that_was_drawn_is_in_the_result(rng):
    X, y = np.round(rng.normal(size=(60, 3)), 1), np.round(rng.normal(size=60), 1)
    for options in ({"stop": "permutation", "n_permutations": 49}, {"ties": "random"}):
        first = foci(X, y, **options)
        again = foci(X, y, seed=first.seed, **options)
        assert first.seed == again.seed
        assert repr(first) == repr(again)
        graph = dependence_graph(X, **options)
        assert graph.seed == dependence_graph(X, seed=graph.seed, **options).seed
        assert {result.seed for result in graph.results} == {graph.seed}
        assert repr(graph) == repr(dependence_graph(X, seed=graph.seed, **options))
    assert foci(X, y, seed=3).seed is dependence_graph(X, seed=3).seed is None
    assert lfoci(X, y).seed == 0
    assert lfoci(X, y, noise=0).seed is None


def test_other_stops_have_no_band(rng):
    X = rng.normal(size=(50, 3))
    result = foci(X, X[:, 0])
    assert result.threshold is None
    assert result.pvalues is None


def test_constant_y_has_an_empty_band(rng):
    with pytest.warns(UserWarning, match="constant"):
        result = foci(rng.normal(size=(50, 3)), np.ones(50), stop="permutation")
    assert len(result.threshold) == len(result.pvalues) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": "permutations"}, ValueError, "stop must be True, False or 'permutation'"),
        ({"stop": None}, TypeError, "stop must be True, False or 'permutation'"),
        ({"stop": "permutation", "alpha": 0}, ValueError, "alpha must be"),
        ({"stop": "permutation", "alpha": 1}, ValueError, "alpha must be below 1"),
        ({"stop": "permutation", "alpha": "5%"}, TypeError, "alpha must be"),
        ({"stop": "permutation", "n_permutations": 18}, ValueError, "at least 19"),
        ({"stop": "permutation", "n_permutations": True}, TypeError, "n_permutations must be"),
        ({"stop": "permutation", "n_neighbors": 2}, ValueError, "takes one neighbour"),
        ({"stop": "permutation", "y": True}, ValueError, "takes one column of y"),
        ({"alpha": 0.05}, ValueError, "needs stop='permutation'"),
        ({"stop": False, "n_permutations": 99}, ValueError, "needs stop='permutation'"),
    ],
)
def test_levels_that_cannot_be_used_are_refused(rng, options, error, message):
    options = dict(options)
    y = rng.normal(size=(30, 2) if options.pop("y", False) else 30)
    with pytest.raises(error, match=message):
        foci(rng.normal(size=(30, 3)), y, **options)


def test_public_names():
    assert {"codec_test", "CodecTestResult"} <= set(lcodec_ext.__all__)


@pytest.mark.parametrize("function", [codec, codec_test])
def test_categories_as_x_are_told_to_be_codes(rng, function):
    y, z = rng.normal(size=(2, 60))
    x = pd.Series(["a", "b", "c"] * 20)
    for one in (x, x.astype("category"), x.tolist()):
        with pytest.raises(ValueError, match="x holds categories or strings; .*x.cat.codes"):
            function(y, z, one)
    assert codec_test(y, z, x.astype("category").cat.codes, seed=0).n == 60


def test_z_is_permuted_within_categories(rng):
    x = np.repeat([0, 1, 2], 20)
    z = 10 * x + rng.random(60)  # tells the category
    y = x + rng.random(60)
    assert codec_test(y, z, seed=0).pvalue < 0.01
    assert codec_test(y, z, 100 * x, seed=0).pvalue > 0.01
