"""The CPU engine's own machinery - tree, lists, sorted groups - against the reference, with ==.

Hypothesis tables are small; here are the shapes at which trees have many leaves, lists run out and
groups are sorted.
"""

import numpy as np
import pytest

import lcodec_ext
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuColumns, CpuEngine
from lcodec_ext.dependence.backends.reference import ReferenceColumns, ReferenceEngine

pytestmark = pytest.mark.native

RNG = np.random.default_rng(7)
ranks = CpuBackend().ranks


@pytest.fixture(autouse=True)
def _numbers_do_not_depend_on_other_tests(monkeypatch):
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(7))


def continuous(n):
    return RNG.normal(size=(n, 6))


def grid(n):
    """Integers: every distance tied, small groups of equal rows."""
    return RNG.integers(0, 12, (n, 6)).astype(float)


def binary(n):
    """Few large groups."""
    return RNG.integers(0, 2, (n, 6)).astype(float)


def mixed(n):
    """Binary beside continuous columns."""
    return np.hstack([RNG.integers(0, 2, (n, 3)), RNG.normal(size=(n, 3))])


def zero_inflated(n):
    """One large group among single rows."""
    return np.where(RNG.random((n, 6)) < 0.7, 0.0, RNG.normal(size=(n, 6)))


def heavy_tails(n):
    """Outliers far from everything: lists run out."""
    return RNG.standard_cauchy((n, 6)) ** 3


def two_clusters(n):
    return RNG.normal(size=(n, 6)) * 1e-3 + 1e3 * RNG.integers(0, 2, n)[:, None]


def offset(n):
    return RNG.normal(size=(n, 6)) + 1e7


def all_equal(n):
    return np.full((n, 6), 2.5)


def duplicates(n):
    """Every row some ten times."""
    return RNG.normal(size=(n // 10 + 1, 6))[RNG.integers(0, n // 10 + 1, n)]


def rare_levels(n):
    """Few values, some of them of one row alone or two; 0 with both signs."""
    X = RNG.integers(0, 3, (n, 6)) * RNG.choice([-1.0, 1.0], (n, 6))
    for column in range(6):
        X[RNG.integers(0, n, 4), column] = [7.0, 8.0, 8.0, 12.5]
    return X


def many_levels(n):
    """Some 200 values beside columns of two."""
    X = RNG.integers(0, 200, (n, 6)).astype(float) ** 2
    X[:, :2] = RNG.integers(0, 2, (n, 2))
    X[:16, 2:] = 4.0  # looks discrete from its first rows
    return X


def denormals(n):
    """Differences whose squares vanish: distinct rows at distance 0."""
    X = RNG.integers(0, 9, (n, 6)).astype(float)
    X[:, :3] *= 1e-30
    X[:, 3:] *= 1e-200
    return X


def lattice_with_noise(n):
    """Groups that are large, and near each other beside the candidates' spread."""
    X = RNG.normal(size=(n, 6)) * 50
    X[:, :2] = RNG.integers(0, 3, (n, 2)) * 1e-3
    return X


SHAPES = [
    continuous, grid, binary, mixed, zero_inflated, heavy_tails, two_clusters, offset, all_equal,
    duplicates, denormals, lattice_with_noise, rare_levels, many_levels,
]  # fmt: skip


@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # 1e-200 is 0 in float32
def test_engine_equals_reference(shape, dtype, ties):
    for n, selections in [(257, [0, 3, 1, 4]), (700, [0, 4])]:
        X = shape(n).astype(dtype)
        R, _ = ranks(RNG.integers(0, n, n))
        factors = np.array([1.0, 0.3, 2.0, 1.0, 1.7, 0.0], dtype=dtype)
        cpu = CpuEngine(CpuColumns(X), factors, R, ties, 11)
        reference = ReferenceEngine(ReferenceColumns(X), factors, R, ties, 11)
        candidates = np.array([1, 2, 5]) if n > 300 else np.arange(6)
        for column in [*selections, None]:
            for got, expected in zip(
                cpu.score(candidates), reference.score(candidates), strict=True
            ):
                np.testing.assert_array_equal(got, expected)
            for got, expected in zip(cpu.row_sums(2), reference.row_sums(2), strict=True):
                np.testing.assert_array_equal(got, expected)
            if column is not None:
                cpu.select(column)
                reference.select(column)


@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("n", [3, 63, 64, 65])
def test_few_rows_equal_reference(n, shape, ties):
    """Fewer than 64 rows are compared with each other; more are searched in a tree."""
    X, (R, _) = shape(n), ranks(RNG.integers(0, n, n))
    factors = np.array([1.0, 0.3, 2.0, 1.0, 1.7, 0.0])
    cpu = CpuEngine(CpuColumns(X), factors, R, ties, 5)
    reference = ReferenceEngine(ReferenceColumns(X), factors, R, ties, 5)
    for column in [0, 3, 1]:
        assert cpu.exact_sum(column) == reference.exact_sum(column)
        for got, expected in zip(cpu.row_sums(2), reference.row_sums(2), strict=True):
            np.testing.assert_array_equal(got, expected)
        cpu.select(column)
        reference.select(column)


def hard_to_sort(rng, n):
    """Near values, far ones, ties of many levels, order and none: more columns than a tile has."""
    x = rng.normal(size=n)
    zeros = np.where(rng.random(n) < 0.5, rng.choice([-0.0, 0.0], n), x)
    columns = [
        x, x + 1e7, x * (1e-40 if n < 600 else 1e-9), x**15, np.exp(15 * x), np.exp(-15 * x),
        rng.standard_cauchy(n) ** 3, np.round(x, 2), np.round(x, 2) + 5, zeros,
        np.sort(x), -np.sort(x), np.sort(np.round(x, 1)),
        x.round() + 1e-6 * rng.normal(size=n), np.where(np.arange(n) == n // 3, 1e15, x), 0 * x,
        1e9 - np.arange(n), np.arange(n) % 300 + 0.5, np.arange(n) // 2,
    ]  # fmt: skip
    return np.column_stack(columns)


@pytest.mark.parametrize("ties", ["average", "first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [3, 7, 8, 9, 100, 511, 513, 1000, 8191, 8192, 8193])
def test_columns_are_sorted(n, dtype, ties, simd_level):
    """Sorted columns, the tree without any: below and above a power of two and the longest tile."""
    rng = np.random.default_rng(n)
    X = hard_to_sort(rng, n).astype(dtype)
    p = X.shape[1]
    R, _ = ranks(rng.integers(0, n, n))
    engine = CpuEngine(CpuColumns(X), np.full(p, 1e-3, dtype), R, ties, 0)
    whole, fraction = engine.score(np.arange(p))
    for column in range(p):
        sums, counts = engine.row_sums(column)
        assert whole[column] == (sums // counts).sum()
        assert fraction[column] == ((sums % counts << 43) // counts).sum()


@pytest.mark.parametrize("ties", ["first", "random", "all"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("d", [1, 3, 6, 18])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_neighbors_equal_reference(shape, ties, d):
    X = np.hstack([shape(300)] * 3)[:, :d].astype(np.float32)
    got, expected = (
        lcodec_ext.nearest_neighbors(X, ties=ties, seed=3, backend=backend)
        for backend in ("cpu", "reference")
    )
    if ties == "all":
        np.testing.assert_array_equal(got[0], expected[0])
        got, expected = got[1], expected[1]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_candidates_do_not_influence_each_other(shape):
    """A candidate's score is the same alone, beside others, and in any place of a tile."""
    X = np.hstack([shape(150) for _ in range(11)]).astype(np.float32)
    R, _ = ranks(RNG.normal(size=150))
    factors = np.ones(66, dtype=np.float32)
    engine = CpuEngine(CpuColumns(X), factors, R, "average", 0)
    for column in (None, 4, 20):
        if column is not None:
            engine.select(column)
        together = np.column_stack(engine.score(np.arange(66)))
        for size in (1, 15, 16, 17, 31, 33, 63, 64, 65):  # below and above a tile of every level
            some = RNG.permutation(66)[:size]
            np.testing.assert_array_equal(np.column_stack(engine.score(some)), together[some])


def depends_on(X, column):
    """Ranks of a response that a column nearly determines."""
    return ranks(X[:, column] + 0.3 * X[:, column + 1] + 1e-3 * RNG.normal(size=len(X)))[0]


@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_only_candidates_that_cannot_win_are_skipped(shape, ties):
    X = np.hstack([shape(300) for _ in range(8)])
    engine = CpuEngine(CpuColumns(X), np.ones(48), depends_on(X, 20), ties, 5)
    for selected in (None, 3, 20):
        if selected is not None:
            engine.select(selected)
        whole, fraction = engine.score(np.arange(48))
        exact = whole + fraction * 2.0**-43
        for floor in (0, int(np.median(whole)), int(whole.max()), int(whole.max()) + 2):
            some = engine.score(np.arange(48), floor)
            kept = some[0] >= 0
            np.testing.assert_array_equal(some[0][kept], whole[kept])
            np.testing.assert_array_equal(some[1][kept], fraction[kept])
            assert (exact[~kept] < max(exact.max(), floor)).all()
            assert kept.any() or floor > exact.max()


@pytest.mark.parametrize("k", [1, 3, 13])
def test_most_candidates_are_skipped(k):
    """Where one column is best by far, and where none is above the floor."""
    X = RNG.normal(size=(600, 200))
    engine = CpuEngine(CpuColumns(X), np.ones(200), depends_on(X, 150), "first", 0)
    for column in range(k):
        engine.select(column)
    everything = np.arange(k, 200)
    whole, _ = engine.score(everything)
    at_first = engine.compiled.scanned[0]
    some, _ = engine.score(everything, int(np.sort(whole)[-2]))
    of_some = engine.compiled.scanned[0] - at_first
    assert some[150 - k] == whole[150 - k] == whole.max()
    assert np.count_nonzero(some < 0) > 150
    assert of_some < 0.9 * at_first
    none, _ = engine.score(everything, int(whole.max()) + 1)
    assert (none[np.arange(k, 200) != 150] == -1).all()


def test_rows_of_many_columns_are_compared_with_all():
    """Around the largest number of columns for which a tree is used."""
    X = np.hstack([grid(90) for _ in range(3)])
    R, _ = ranks(RNG.integers(0, 9, 90))
    for ties in ("average", "random"):
        cpu = CpuEngine(CpuColumns(X), np.ones(18), R, ties, 3)
        reference = ReferenceEngine(ReferenceColumns(X), np.ones(18), R, ties, 3)
        for column in range(14):
            cpu.select(column)
            reference.select(column)
            if column >= 9:
                for got, expected in zip(cpu.row_sums(17), reference.row_sums(17), strict=True):
                    np.testing.assert_array_equal(got, expected)
                np.testing.assert_array_equal(
                    cpu.score(np.arange(14, 18)), reference.score(np.arange(14, 18))
                )
