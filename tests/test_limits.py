"""Moments under permutation against all permutations, and the spread that an interval rests on."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcodec_ext import codec, nearest_neighbors
from lcodec_ext.dependence.backends.reference import ReferenceBackend
from lcodec_ext.dependence.exact import ResponseSums
from lcodec_ext.dependence.limits import (
    distance_sums,
    graph_cube,
    graph_sums,
    limit_skewness,
    minima_traces,
    minimum_sums,
    normal_interval,
    null_moments,
    permutation_moments,
    subsampled_sd,
    subsamples,
)

BACKEND = ReferenceBackend()


@st.composite
def tables(draw):
    """A response that is not constant, and one or two columns with ties; few rows."""
    n = draw(st.integers(3, 6))
    d = draw(st.integers(1, 2))
    Z = [[draw(st.integers(0, 3)) for _ in range(d)] for _ in range(n)]
    y = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n).filter(lambda y: len(set(y)) > 1))
    return np.array(y), np.array(Z, dtype=float)


def values_over_permutations(R, indptr, indices):
    """T(Y, Z) for every order of the ranks, from its definition."""
    n = len(R)
    sums = ResponseSums(R, np.array([sum(b >= a for b in R) for a in R]))
    for order in permutations(range(n)):
        S = R[list(order)]
        m = Fraction(0)
        for i in range(n):
            near = indices[indptr[i] : indptr[i + 1]]
            m += Fraction(int(np.minimum(S[i], S[near]).sum()), len(near))
        yield sums.unconditional(m)


@given(tables())
def test_moments_of_T_are_those_over_all_permutations(table):
    y, Z = table
    R, L = BACKEND.ranks(y)
    indptr, indices = nearest_neighbors(Z, ties="all")
    values = list(values_over_permutations(R, indptr, indices))
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert mean == Fraction(-1, len(y) - 1)
    found, sd = null_moments(ResponseSums(R, L), R, graph_sums(indptr, indices))
    assert found == pytest.approx(float(mean), rel=1e-12)
    assert sd**2 == pytest.approx(float(variance), rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("seed", range(6))
def test_skewness_is_that_of_the_eigenvalues(seed):
    """Of one column with many ties, few ties, and single rows next to large groups."""
    rng = np.random.default_rng(seed)
    z = (rng.integers(0, 3, 60), rng.integers(0, 50, 60), rng.normal(size=60))[seed % 3]
    z = np.where(rng.random(60) < 0.4, 0, z)[:, None].astype(float)
    R = BACKEND.ranks((rng.normal(size=60) * 3).round(seed % 2))[0]
    indptr, indices = nearest_neighbors(z, ties="all")
    W = np.zeros((60, 60))
    for i in range(60):
        near = indices[indptr[i] : indptr[i + 1]]
        W[i, near] = 1 / len(near)
    H = np.eye(60) - 1 / 60
    A, K = H @ (W + W.T) @ H / 2, H @ np.minimum.outer(R, R) @ H / 60
    distinct, size = np.unique(z, return_counts=True)
    graph = nearest_neighbors(distinct[:, None], ties="all")
    cube = graph_cube(*graph, size)
    assert cube == pytest.approx(np.trace(A @ A @ A), abs=1e-9)
    square_k, cube_k = minima_traces(R)
    assert square_k == pytest.approx(np.trace(K @ K), rel=1e-9)
    assert cube_k == pytest.approx(np.trace(K @ K @ K), rel=1e-9)
    m, k = np.linalg.eigvalsh(A), np.linalg.eigvalsh(K)
    expected = 8 * (m**3).sum() * (k**3).sum() / (2 * (m**2).sum() * (k**2).sum()) ** 1.5
    found = limit_skewness(graph_sums(*graph, size), cube, square_k, cube_k)
    assert found == pytest.approx(max(expected, 0), rel=1e-6, abs=1e-9)


@given(tables())
def test_the_graph_of_distinct_rows_has_the_same_sums(table):
    _, Z = table
    distinct, size = np.unique(Z, axis=0, return_counts=True)
    if len(distinct) == 1:
        graph = graph_sums(np.array([0, 0]), np.array([], dtype=np.int64), size)
    else:
        graph = graph_sums(*nearest_neighbors(distinct, ties="all"), size)
    expected = graph_sums(*nearest_neighbors(Z, ties="all"))
    assert shares(graph) == pytest.approx(shares(expected))


def shares(sums):
    """Sums as floats."""
    return [sums.total / sums.over, sums.rows / sums.over**2, sums.squares / sums.over**2]


def test_kernels_by_their_definition():
    R = np.array([4, 7, 4, 1, 4, 7, 7])
    for sums, kernel in (
        (minimum_sums(R), np.minimum),
        (distance_sums(R), lambda a, b: abs(a - b)),
    ):
        pairs = kernel(R[:, None], R[None, :])
        np.fill_diagonal(pairs, 0)
        assert sums == (7, 1, pairs.sum(), (pairs.sum(axis=1) ** 2).sum(), (pairs**2).sum())


def test_kernels_of_a_million_rows_do_not_overflow():
    n = 1_000_000
    least, far = minimum_sums(np.full(n, n)), distance_sums(np.repeat([1, n], n // 2))
    assert least.total == n * (n - 1) * n
    assert least.rows == n * ((n - 1) * n) ** 2
    assert least.squares == n * (n - 1) * n**2
    assert far.total == n * (n // 2) * (n - 1)
    assert far.rows == n * (n // 2 * (n - 1)) ** 2
    assert far.squares == n * (n // 2) * (n - 1) ** 2


@pytest.mark.parametrize("d", [1, 2])
def test_the_limit_of_a_continuous_response(d):
    """2/5 + (2/5) q + (4/5) o of Shi, Drton and Han: mutual pairs, and pairs that share one."""
    n = 20_000
    rng = np.random.default_rng(d)
    near = nearest_neighbors(rng.random((n, d)))
    R = rng.permutation(n) + 1
    graph = graph_sums(np.arange(n + 1), near)
    _, sd = null_moments(ResponseSums(R, n + 1 - R), R, graph)
    received = np.bincount(near, minlength=n)
    q = (near[near] == np.arange(n)).mean()
    o = (received * (received - 1)).mean()
    assert n * sd**2 == pytest.approx(0.4 + 0.4 * q + 0.8 * o, rel=1e-3)
    if d == 1:  # two of three rows are their neighbour's neighbour; a quarter has two, one has none
        assert n * sd**2 == pytest.approx(0.4 + 0.4 * 2 / 3 + 0.8 / 2, rel=0.03)


def test_a_constant_graph_has_no_variance():
    size = np.array([7])
    graph = graph_sums(np.array([0, 0]), np.array([], dtype=np.int64), size)
    R = np.arange(1, 8)
    assert null_moments(ResponseSums(R, 8 - R), R, graph) == (-1 / 6, 0.0)
    assert permutation_moments(graph, minimum_sums(R))[1] == 0


def test_subsamples_are_rows_without_replacement_and_depend_on_the_seed_alone():
    drawn = [rows.tolist() for rows in subsamples(50, 10, 400, seed=3)]
    assert drawn == [rows.tolist() for rows in subsamples(50, 10, 400, seed=3)]
    assert all(rows == sorted(set(rows)) and len(rows) == 10 for rows in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=50)
    assert abs(counts - 80).max() < 4.5 * math.sqrt(80 * 0.8)
    assert len({tuple(rows) for rows in drawn}) == 400


@pytest.mark.parametrize("conditional", [False, True])
def test_an_interval_covers_the_mean_of_T(conditional):
    runs, n = 120, 200
    values, sds = [], []
    for run in range(runs):
        rng = np.random.default_rng([run, n])
        z, x, noise = rng.normal(size=(3, n))
        y = z + noise + conditional * x

        def T(rows, y=y, z=z, x=x):
            return codec(y[rows], z[rows], x[rows] if conditional else None)

        values.append(T(np.arange(n)))
        sds.append(subsampled_sd(T, n, n_subsamples=60, seed=run).sd)
    bounds = [normal_interval(v, sd, 0.95) for v, sd in zip(values, sds, strict=True)]
    covered = sum(low <= np.mean(values) <= high for low, high in bounds) / runs
    assert covered > 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs)  # it errs on the safe side
    assert np.mean(sds) < 1.4 * np.std(values)  # and not by much
