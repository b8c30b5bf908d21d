"""Nearest rows in many columns: what the screen leaves out is never nearest, whatever the data."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import lcodec_ext
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuColumns, CpuEngine
from lcodec_ext.dependence.backends.reference import (
    ReferenceBackend,
    ReferenceColumns,
    ReferenceEngine,
)

pytestmark = pytest.mark.native

DTYPES = [np.float32, np.float64]


def continuous(rng, n, d):
    return rng.normal(size=(n, d))


def offset(rng, n, d):
    return rng.normal(size=(n, d)) + 1e6


def lattice(rng, n, d):
    return rng.integers(0, 2, (n, d)).astype(float)


def sparse(rng, n, d):
    return (rng.random((n, d)) < 1 / d).astype(float)


def duplicates(rng, n, d):
    return rng.normal(size=(n // 3 + 1, d))[rng.integers(0, n // 3 + 1, n)]


def equal_rows(rng, n, d):
    return np.ones((n, d))


def outlying_rows(rng, n, d):
    X = rng.normal(size=(n, d))
    X[[0, n // 2]] *= 1e15
    return X


def outlying_column(rng, n, d):
    X = rng.normal(size=(n, d))
    X[:, 5] *= 1e15
    return X


def tight_clusters(rng, n, d):
    """Farther apart by so much that a product in float32 tells nothing within them."""
    return rng.integers(0, 2, (n, 1)) * 1e6 + rng.integers(0, 9, (n, d))


def squares_that_vanish(rng, n, d):
    X = rng.integers(0, 9, (n, d)).astype(float)
    X[:, : d // 2] *= 1e-30
    X[:, d // 2 :] *= 1e-200
    return X


def denormals(rng, n, d):
    return rng.normal(size=(n, d)) * 1e-40


def near_overflow(rng, n, d):
    return rng.uniform(-1, 1, (n, d)) * 1e17


def walk(rng, n, d):
    return np.cumsum(rng.normal(size=(n, d)), axis=0)


KINDS = [
    continuous, offset, lattice, sparse, duplicates, equal_rows, outlying_rows, outlying_column,
    tight_clusters, squares_that_vanish, denormals, near_overflow, walk,
]  # fmt: skip


def by_definition(X):
    """(indptr, indices) of all rows at the least of the computed distances."""
    D = np.zeros((len(X), len(X)), dtype=X.dtype)
    for column in X.T:
        difference = np.subtract.outer(column, column)
        D += difference * difference
    np.fill_diagonal(D, np.inf)
    nearest = D == D.min(axis=1, keepdims=True)
    return np.append(0, np.cumsum(nearest.sum(axis=1))), np.nonzero(nearest)[1]


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # squares that vanish
def test_neighbors_are_those_of_the_definition(kind, dtype, rng, monkeypatch):
    """At every SIMD level; around a tile of 192 rows and a block of 256 columns."""
    for n, d in [(64, 13), (193, 40), (97, 600)]:
        X = kind(rng, n, d).astype(dtype)
        expected = by_definition(X)
        for level in lcodec_ext.build_info()["simd_supported"]:
            monkeypatch.setenv("LCODEC_SIMD", level)
            for threads in ("1", "3"):
                monkeypatch.setenv("LCODEC_NUM_THREADS", threads)
                same(lcodec_ext.nearest_neighbors(X, ties="all"), expected)


@pytest.mark.parametrize(("n", "d"), [(65, 1100), (383, 257), (577, 100)])
def test_tiles_and_blocks_of_all_sizes(n, d, rng, simd_level):
    X = rng.integers(-3, 4, (n, d)).astype(np.float32)
    same(lcodec_ext.nearest_neighbors(X, ties="all"), by_definition(X))


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(64, 130),
    d=st.integers(13, 40),
    values=st.sampled_from([2, 3, 10, 10**6]),
    rows=st.sampled_from([0, 3, 12]),
    columns=st.sampled_from([0, 3, 12]),
    dtype=st.sampled_from(DTYPES),
)
def test_magnitudes_of_rows_and_columns(seed, n, d, values, rows, columns, dtype):
    rng = np.random.default_rng(seed)
    X = rng.integers(-values, values + 1, (n, d)).astype(dtype)
    X *= np.ldexp(dtype(1), rng.integers(-rows, rows + 1, (n, 1)))
    X *= np.ldexp(dtype(1), rng.integers(-columns, columns + 1, d))
    same(lcodec_ext.nearest_neighbors(X, ties="all"), by_definition(X))


@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("kind", [continuous, lattice, sparse, duplicates])
def test_coefficients_equal_the_reference(kind, ties, rng):
    X, y = kind(rng, 100, 20), rng.integers(0, 30, 100)
    R, _ = CpuBackend().ranks(y)
    factors = np.where(np.arange(20) % 3, 0.3, 7.0)
    cpu = CpuEngine(CpuColumns(X), factors, R, ties, 5)
    reference = ReferenceEngine(ReferenceColumns(X), factors, R, ties, 5)
    for column in range(19):
        for engine in (cpu, reference):
            engine.select(column)
        if column in (2, 18):  # with what was selected together
            same(cpu.row_sums(19), reference.row_sums(19))
            same(cpu.score(np.array([19])), reference.score(np.array([19])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_several_neighbours_are_those_of_the_definition(kind, dtype, rng, monkeypatch):
    """Of rows that are screened, and beyond the number for which they are."""
    n, d = 220, 30
    X, R = kind(rng, n, d).astype(dtype), CpuBackend().ranks(rng.integers(0, 50, n))[0]
    table = (np.ones(d, dtype), [*range(d)], R)
    for k in (2, 5, 8, 9):
        expected = ReferenceBackend().nearest_minima(ReferenceColumns(X), *table, k)
        for level in lcodec_ext.build_info()["simd_supported"]:
            for threads in ("1", "3"):
                monkeypatch.setenv("LCODEC_SIMD", level)
                monkeypatch.setenv("LCODEC_NUM_THREADS", threads)
                same(CpuBackend().nearest_minima(CpuColumns(X), *table, k), expected)
