"""Permutations, and sums of minima under them: every backend against the definition, with ==."""

import collections
import itertools
from fractions import Fraction

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from lcodec_ext import _core
from lcodec_ext._random import permutation
from lcodec_ext.dependence.backends.resolve import HOST
from lcodec_ext.dependence.permutation import (
    column_ranks,
    find_neighbors,
    joined,
    near_blocks,
    neighbor_pairs,
    numerators,
    reordered,
)

pytestmark = pytest.mark.native

CPU, REFERENCE = HOST["cpu"], HOST["reference"]
TIES = ["average", "random", "first"]
NO_ROWS = np.empty(0, dtype=np.int32)


def ranks(y):
    return CPU.ranks(np.asarray(y))[0]


# --------------------------------------------------------------------------------------------
# The draws


def numpys_words(seed, stream, attempt, n):
    """Halves of the words of NumPy's Philox, low ones first, from the counter's 0 on."""
    philox = np.random.Philox()
    state = philox.state
    counter = (attempt * 2**64 + stream * 2**128 - 1) % 2**256  # NumPy raises it before it draws
    state["state"]["counter"][:] = [(counter >> (64 * k)) % 2**64 for k in range(4)]
    state["state"]["key"][:] = [seed, 0]
    state["buffer_pos"] = 4
    philox.state = state
    words = philox.random_raw(4 * (n // 8 + 1))
    return np.column_stack([words & np.uint64(2**32 - 1), words >> np.uint64(32)]).ravel()[:n]


def numpys_permutation(n, seed, stream):
    """Fisher and Yates from the last row on; how many rows draw again to be fair."""
    bounds = np.arange(1, n + 1, dtype=np.uint64)
    taken = np.zeros(n, dtype=bool)
    drawn = np.zeros(n, dtype=np.uint64)
    again = 0
    attempt = 0
    while not taken.all():
        products = numpys_words(seed, stream, attempt, n) * bounds
        fair = (products % np.uint64(2**32) >= 2**32 % bounds) & ~taken
        drawn[fair] = products[fair] >> np.uint64(32)
        taken |= fair
        again, attempt = max(again, int((~taken).sum())), attempt + 1
    rows = list(range(n))
    for i, j in zip(reversed(range(n)), drawn[::-1].tolist(), strict=True):
        rows[i], rows[j] = rows[j], rows[i]
    return rows, again


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_words_are_those_of_numpys_philox(seed):
    assert permutation(41, seed, 3).tolist() == numpys_permutation(41, seed, 3)[0]


def test_words_that_would_favour_some_are_drawn_again():
    rows, again = numpys_permutation(10**6, 5, 2)
    assert again > 0
    assert CPU.permutations(10**6, None, 5, 2, 1)[0].tolist() == rows


@st.composite
def starts(draw, n):
    """Where blocks of rows begin, or one block."""
    if draw(st.booleans()):
        return None
    first = np.array([True, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))])
    return np.flatnonzero(first)[np.cumsum(first) - 1].astype(np.int32)


@given(n=st.integers(1, 70), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_permutations_equal_the_reference(n, seed, data):
    start = data.draw(starts(n))
    first = data.draw(st.integers(0, 10**6))
    drawn = CPU.permutations(n, start, seed, first, 3)
    np.testing.assert_array_equal(drawn, REFERENCE.permutations(n, start, seed, first, 3))
    blocks = np.zeros(n, dtype=int) if start is None else start
    for row in drawn:
        assert sorted(row) == list(range(n))
        np.testing.assert_array_equal(blocks[row], blocks)


def test_stream_0_leaves_rows_as_they_are():
    np.testing.assert_array_equal(CPU.permutations(9, None, 5, 0, 1)[0], np.arange(9))


def test_all_orders_are_as_likely():
    draws = CPU.permutations(4, None, 1, 1, 24_000)
    counts = collections.Counter(map(tuple, draws.tolist()))
    assert len(counts) == 24
    for order in itertools.permutations(range(4)):
        assert abs(counts[order] - 1000) < 4 * np.sqrt(1000 * 23 / 24)


# --------------------------------------------------------------------------------------------
# The sums

VALUES = st.one_of(
    st.integers(0, 2).map(float),
    st.sampled_from([0.0, -0.0, 1e-40, 2e-40, 5e-324, 1e-200, 3e-200, 1e7, 1e7 + 1]),
    st.floats(-100, 100),
)


@st.composite
def tables(draw, most=40):
    n = draw(st.integers(3, most))
    k = draw(st.integers(1, 3))
    pool = draw(st.lists(VALUES, min_size=1, max_size=5))
    elements = draw(st.sampled_from([st.sampled_from(pool), VALUES]))
    X = draw(hnp.arrays(np.float64, (n, k), elements=elements))
    y = draw(hnp.arrays(np.int64, n, elements=st.integers(0, draw(st.sampled_from([1, 3, 50])))))
    factors = np.array(draw(st.lists(st.sampled_from([1.0, 0.3]), min_size=k, max_size=k)))
    return X, y, factors


def exact_sum(X, R, factors, ties, seed):
    engine = REFERENCE.engine(REFERENCE.lay_out(X), factors, R, ties, seed)
    for column in range(X.shape[1] - 1):
        engine.select(column)
    return engine.exact_sum(X.shape[1] - 1)


@given(table=tables(), ties=st.sampled_from(TIES), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_sums_are_those_of_permuted_responses(table, ties, seed, data):
    """Of every permutation, the sum over rows that the definition gives for the permuted ranks."""
    X, y, factors = table
    R = ranks(y)
    start = data.draw(starts(len(y)))
    weighted = neighbor_pairs(find_neighbors(CPU, X, factors, ties, seed))
    sums = CPU.permuted_sums(weighted.pairs, R, start, seed, 4)
    np.testing.assert_array_equal(sums, REFERENCE.permuted_sums(weighted.pairs, R, start, seed, 4))
    found, common = numerators(sums, weighted)
    later = CPU.permuted_sums(weighted.pairs, R, start, seed, 2, 1)
    np.testing.assert_array_equal(later, sums[1:3])
    later = REFERENCE.permuted_sums(weighted.pairs, R, start, seed, 2, 1)
    np.testing.assert_array_equal(later, sums[1:3])
    for b, number in enumerate(found):
        permuted = R[permutation(len(R), seed, b, start)]
        assert Fraction(number, common) == exact_sum(X, permuted, factors, ties, seed)


@given(table=tables(), ties=st.sampled_from(TIES))
def test_neighbors_of_backends_are_the_same(table, ties):
    X, _, factors = table
    a, b = (find_neighbors(backend, X, factors, ties, 3) for backend in (CPU, REFERENCE))
    for one, other in zip((*a.points, *a[1:]), (*b.points, *b[1:]), strict=True):
        np.testing.assert_array_equal(one, other)


def some_lists(rng, n):
    """Lists with and without ties, groups of many and of few, and all rows alike."""
    columns = [
        rng.normal(size=n),
        rng.integers(0, 2, n),
        rng.integers(0, n // 3, n),
        np.zeros(n),
        np.arange(n),
        np.where(rng.random(n) < 0.5, 0, rng.integers(1, 9, n)),
    ]
    ones = np.ones(1)
    return [
        neighbor_pairs(find_neighbors(CPU, column[:, None].astype(float), ones, "average", 0))
        for column in columns
    ]


@pytest.mark.parametrize("n", [3, 9, 40, 300])
def test_joined_lists_have_the_sums_of_each(rng, threads, n):
    lists = some_lists(rng, n)
    R = ranks(rng.integers(0, n, n))
    sums = CPU.permuted_sums(joined(lists), R, None, 5, 6)
    each = [CPU.permuted_sums(one.pairs, R, None, 5, 6) for one in lists]
    np.testing.assert_array_equal(sums, np.hstack(each))
    if n <= 40:
        np.testing.assert_array_equal(sums, REFERENCE.permuted_sums(joined(lists), R, None, 5, 6))


def test_reordered_rows_have_the_same_sums(rng):
    n = 60
    R = ranks(rng.integers(0, n, n))
    order = rng.permutation(n)
    position = np.argsort(order)
    for one in some_lists(rng, n):
        moved = reordered(one.pairs, position)
        a = CPU.permuted_sums(one.pairs, R, None, 0, 1)
        b = CPU.permuted_sums(moved, R[order], None, 0, 1)
        np.testing.assert_array_equal(a, b)


def test_many_permutations_take_every_thread(rng, threads):
    n = 37
    R = ranks(rng.normal(size=n))
    one = some_lists(rng, n)[0]
    sums = CPU.permuted_sums(one.pairs, R, None, 9, 2000)
    for b in (0, 1, 1999):
        permuted = R[permutation(n, 9, b)]
        assert sums[b, 0] == np.minimum(permuted, permuted[one.pairs.other]).sum()


# --------------------------------------------------------------------------------------------
# CUDA


@pytest.mark.parametrize("n", [3, 40, 2050])
def test_cuda_sums_equal_the_cpus(rng, device, n):
    lists = some_lists(rng, n)
    R = ranks(rng.integers(0, n, n)).astype(np.int32)
    cut = np.sort(rng.choice(np.arange(1, n), size=min(n - 1, 5), replace=False))
    start = np.zeros(n, dtype=np.int32)
    for c in cut:
        start[c:] = c
    place = np.empty(n, dtype=np.int32)
    place[np.argsort(R, kind="stable")] = np.arange(n)
    for pairs, blocks in itertools.product((lists[0].pairs, joined(lists)), (None, start)):
        count = 3
        sums = device.empty((count, len(pairs.begin) - 1), np.int64)
        size = device.module.permuted_sums_bytes(n, len(pairs.size), count)
        workspace = device.empty(size, np.uint8)
        held = {"rank": R, "sorted": np.sort(R), "place": place} | pairs._asdict()
        if blocks is not None:
            held["start"] = blocks
        arrays = {name: device.to_device(a) for name, a in held.items() if a.size}
        given = {
            "n": n,
            "segments": len(pairs.begin) - 1,
            "labelings": len(pairs.label),
            "groups": len(pairs.size),
            "seed": 3,
            "first": 0,
            "count": count,
            "sum": int(sums),
            "workspace": int(workspace),
        }
        addresses = {"start": 0, "owner": 0, "label": 0, "size": 0, "segment": 0}
        addresses |= {name: int(array) for name, array in arrays.items()}
        device.module.permuted_sums(given | addresses, device.stream)
        np.testing.assert_array_equal(
            device.to_host(sums), CPU.permuted_sums(pairs, R, blocks, 3, count)
        )
        device.to_host(workspace)  # nothing is written behind it


# --------------------------------------------------------------------------------------------
# Blocks


@given(table=tables(), least=st.integers(2, 6))
def test_blocks_partition_the_rows(table, least):
    X, _, _ = table
    blocks = near_blocks(column_ranks(X), least)
    n = len(X)
    assert sorted(blocks.order) == list(range(n))
    np.testing.assert_array_equal(blocks.order[blocks.position], np.arange(n))
    sizes = np.bincount(blocks.start)
    sizes = sizes[sizes > 0]
    assert (sizes >= min(least, n)).all()
    assert (np.diff(blocks.start) >= 0).all()


def test_blocks_of_continuous_data_are_small(rng):
    X = rng.normal(size=(1000, 2))
    sizes = np.bincount(near_blocks(column_ranks(X), 5).start)
    assert set(sizes[sizes > 0]) <= set(range(5, 10))


def test_blocks_know_no_units(rng):
    """Columns that are stretched, or bent upwards, have the same blocks."""
    X = rng.normal(size=(200, 3))
    a = near_blocks(column_ranks(X), 3)
    b = near_blocks(column_ranks(np.column_stack([np.exp(9 * X[:, 0]), 1e6 * X[:, 1], X[:, 2]])), 3)
    assert a.order.tolist() == b.order.tolist()
    assert a.start.tolist() == b.start.tolist()


def test_rows_of_two_groups_are_apart(rng):
    """A column of 0 and 1 beside one of many values, of a large unit."""
    X = np.column_stack([rng.integers(0, 2, 200), np.round(15 * rng.normal(size=200))])
    blocks = near_blocks(column_ranks(X), 3)
    mixed = [
        len(np.unique(X[blocks.order[blocks.start == begin], 0])) > 1
        for begin in np.unique(blocks.start)
    ]
    assert not any(mixed)


def test_equal_values_have_equal_ranks():
    ranks = column_ranks(np.array([[3.0, 0.0], [1.0, -0.0], [3.0, 5e-324]]))
    assert ranks.tolist() == [[4, 2], [1, 2], [4, 5]]


def test_equal_rows_are_a_block(rng):
    x = rng.integers(0, 4, (200, 1)).astype(float)
    blocks = near_blocks(column_ranks(x), 5)
    for begin in np.unique(blocks.start):
        assert len(np.unique(x[blocks.order[blocks.start == begin]])) == 1
    assert len(np.unique(blocks.start)) == 4


# --------------------------------------------------------------------------------------------
# The bindings refuse what would be read out of bounds


def call(**changes):
    given = {
        "rank": np.array([1, 2, 3], dtype=np.int32),
        "start": NO_ROWS,
        "begin": np.array([0, 3]),
        "owner": NO_ROWS,
        "other": np.array([1, 0, 1], dtype=np.int32),
        "label": np.array([[0, 0, -1]], dtype=np.int32),
        "size": np.array([2], dtype=np.int32),
        "segment": np.array([0], dtype=np.int32),
    }
    return _core.dependence.permuted_sums(*(given | changes).values(), 0, 0, 1, "auto", 1)


def test_a_call_by_hand():
    assert call().tolist() == [[1 + 1 + 2 + 1]]


def int32(*values):
    return np.array(values, dtype=np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": int32(1, 2, 4)},
        {"rank": int32(1, 2)},
        {"start": int32(0, 2, 2)},
        {"start": int32(0, 0)},
        {"begin": np.array([0, 2])},
        {"begin": np.array([0, 4, 3])},
        {"begin": np.array([1, 3])},
        {"owner": int32(0, 1)},
        {"owner": int32(0, 1, 3)},
        {"other": int32(1, 0, 3)},
        {"other": int32(-1, 0, 1)},
        {"label": int32(0, 0)[None]},
        {"label": int32(0, 0, 1)[None]},
        {"segment": int32(1)},
        {"size": int32(2, 1)},
    ],
)
def test_a_slip_is_refused(changes):
    with pytest.raises(ValueError, match=r"fit|range|block|small"):
        call(**changes)
