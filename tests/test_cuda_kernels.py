"""The CUDA kernels against the reference, with ==: emulated, and on a GPU if there is one."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import DEVICES
from lcodec_ext.dependence.backends.reference import ReferenceBackend, ReferenceColumns

pytestmark = [
    pytest.mark.native,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # overflow is among the cases
]

nearest = ReferenceBackend().nearest
TIES = {"average": 0, "random": 1, "first": 2}
SEED = 2**63 + 11


def continuous(rng, n, p):
    return rng.normal(size=(n, p))


def grid(rng, n, p):
    """Integers: distances are tied."""
    return rng.integers(0, 4, (n, p)).astype(float)


def binary(rng, n, p):
    """Few large groups, in any order."""
    return rng.integers(0, 2, (n, p)).astype(float)


def all_equal(rng, n, p):
    return np.full((n, p), 2.5)


def duplicates(rng, n, p):
    """Every row some three times."""
    return rng.normal(size=(n // 3 + 1, p))[rng.integers(0, n // 3 + 1, n)]


def offset(rng, n, p):
    return rng.normal(size=(n, p)) + 1e7


def denormals(rng, n, p):
    """Values and squares that a device must not flush."""
    return rng.integers(-9, 9, (n, p)) * np.where(np.arange(p) % 3, 3e-320, 1e-45)


def tiny_squares(rng, n, p):
    """Distances that are denormal in float32, or 0 in both types."""
    return rng.integers(0, 9, (n, p)) * np.where(np.arange(p) % 3, 1e-22, 1e-170)


def signed_zeros(rng, n, p):
    return rng.choice([-1.0, -0.0, 0.0, 1.0], (n, p))


def overflow(rng, n, p):
    """Distances that are infinite, some or all of them."""
    return rng.choice([-1e25, 1e25, 0.0], (n, p)) * rng.choice([1.0, 1e12], (n, p))


def outlier(rng, n, p):
    """The nearest rows of the last row are behind all others."""
    X = rng.normal(size=(n, p))
    X[n - 1] += 50
    X[: n // 3, 0] = 3
    return X


SHAPES = [
    continuous, grid, binary, all_equal, duplicates, offset, denormals, tiny_squares, signed_zeros,
    overflow, outlier,
]  # fmt: skip


@functools.cache
def table(shape, n, p, dtype):
    X = shape(np.random.default_rng((n, p)), n, p).astype(dtype)
    X.flags.writeable = False
    return X


# ------------------------------------------------------------------------------------------------
# column_statistics


def call_statistics(device, dtype, n, p, x=0, low=0, high=0, deviation=0):
    addresses = {"x": x, "low": low, "high": high, "deviation": deviation}
    addresses = {name: int(array) for name, array in addresses.items()}
    device.module.column_statistics({"dtype": dtype, "n": n, "p": p} | addresses, device.stream)


def column_statistics(device, X):
    n, p = X.shape
    x = device.to_device(X)
    low, high = device.empty(p, X.dtype), device.empty(p, X.dtype)
    deviation = device.empty(p, np.float64)
    call_statistics(device, X.dtype.name, n, p, x, low, high, deviation)
    return [device.to_host(out) for out in (low, high, deviation)]


def check_columns(device, X):
    reference = ReferenceColumns(X)
    low, high, deviation = column_statistics(device, X)
    np.testing.assert_array_equal(low, reference.low)
    np.testing.assert_array_equal(high, reference.high)
    np.testing.assert_array_equal(deviation, reference.standard_deviations())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [1, 7, 8, 9, 33])  # a block takes 8
def test_columns_of_any_number_of_rows(device, p, dtype):
    """Below, at and above a round of 64 lanes, and 16 rounds that are loaded at once."""
    for n in (2, 3, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1087, 1088, 1089, 2049, 3333):
        check_columns(device, table(continuous, n, p, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_columns(device, dtype):
    """Where a block takes 32 columns, and just below."""
    for n, p in [
        (2, 2**14 - 1), (2, 2**14), (63, 2**14 + 31), (64, 2**14 + 1), (65, 2**14),
        (150, 2**14 + 33),
    ]:  # fmt: skip
        check_columns(device, table(continuous, n, p, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_columns_of_every_shape(device, shape, dtype):
    for n in (2, 65, 1100):
        check_columns(device, table(shape, n, 11, dtype))


def test_the_order_of_additions_shows():
    """What the tests above compare would differ in another order."""
    X = table(continuous, 1100, 11, np.float64)
    assert (ReferenceColumns(X).standard_deviations() != X.std(axis=0, ddof=1)).any()
    assert (ReferenceColumns(X).standard_deviations() != X[::-1].std(axis=0, ddof=1)).any()


# ------------------------------------------------------------------------------------------------
# neighbors


@functools.cache
def expected_neighbors(shape, n, p, dtype, ties):
    return nearest(ReferenceColumns(table(shape, n, p, dtype)), ties, SEED)


def call_neighbors(device, X, ties, seed, **arrays):
    """``X`` may be a table by column on the device or 0; arrays that are not given are 0."""
    dtype, columns, n, p = X
    addresses = {
        name: int(arrays.get(name, 0)) for name in ("factor", "offset", "count", "indices")
    }
    given = {
        "dtype": np.dtype(dtype).name,
        "columns": int(columns),
        "n": n,
        "p": p,
        "ties": TIES.get(ties, ties),
        "seed": seed,
    }
    device.module.neighbors(given | addresses, device.stream)


def check_neighbors(device, X, ties, expected, seed=SEED, **factor):
    n, p = X.shape
    indptr, indices = expected
    on_device = X.dtype, device.to_device(X.T), n, p
    held = {name: device.to_device(array) for name, array in factor.items()}

    count = device.empty(n, np.int64)
    call_neighbors(device, on_device, ties, seed, count=count, **held)
    np.testing.assert_array_equal(device.to_host(count), np.diff(indptr))

    found = device.empty(len(indices), np.int64)
    call_neighbors(
        device, on_device, ties, seed, offset=device.to_device(indptr[:-1]), indices=found, **held
    )
    np.testing.assert_array_equal(device.to_host(found), indices)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("p", [1, 2, 3, 129])
def test_neighbors_in_scaled_columns(device, rng, dtype, ties, p):
    X = table(grid, 300, p, dtype)
    factor = rng.uniform(0.1, 3, p).astype(dtype)
    factor[-1] = 0
    expected = nearest(ReferenceColumns(X), ties, SEED, factor)
    check_neighbors(device, X, ties, expected, factor=factor)


@pytest.mark.parametrize(
    ("shape", "ties"),
    [(continuous, "average"), (binary, "average"), (binary, "random"), (grid, "first")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbors_of_any_number_of_rows(device, dtype, shape, ties):
    """Below, at and above what a block takes of rows, a warp and a tile of candidates."""
    for n in (
        2, 3, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1025,
    ):  # fmt: skip
        expected = expected_neighbors(shape, n, 3, dtype, ties)
        check_neighbors(device, table(shape, n, 3, dtype), ties, expected)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbors_in_any_number_of_columns(device, dtype, ties):
    """Below, at and above the columns that fit shared memory, in one tile and in several."""
    for n, p in [
        (40, 1), (40, 2), (40, 4), (2, 127), (40, 127), (40, 128), (40, 129), (40, 255), (40, 257),
        (530, 128), (530, 129),
    ]:  # fmt: skip
        expected = expected_neighbors(duplicates, n, p, dtype, ties)
        check_neighbors(device, table(duplicates, n, p, dtype), ties, expected)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_neighbors_of_every_shape(device, shape, dtype, ties):
    several_tiles = 530 if ties == "average" else 260
    for n, p in [(2, 2), (3, 1), (several_tiles, 1), (several_tiles, 5)]:
        expected = expected_neighbors(shape, n, p, dtype, ties)
        check_neighbors(device, table(shape, n, p, dtype), ties, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_operation_is_rounded(device, dtype):
    """a^2 + b^2 = b^2 + a^2 if each square is rounded; a fused multiply-add tells them apart."""
    rng = np.random.default_rng(2)
    step = 14 if dtype == np.float32 else 40  # differences are exact, squares are not
    a, b = rng.integers(2 ** (step - 2), 2 ** (step - 1), (2, 60)) / 2.0**step
    center = 8.0 * np.arange(60)
    rows = [(center, 0 * a), (center + a, b), (center + b, a)]
    X = np.hstack([np.stack(row) for row in rows]).T.astype(dtype)
    expected = nearest(ReferenceColumns(X), "average", 0)
    assert (np.diff(expected[0])[:60] == 2).sum() > 50
    check_neighbors(device, X, "average", expected)


@given(
    device=st.sampled_from(DEVICES),
    dtype=st.sampled_from([np.float32, np.float64]),
    ties=st.sampled_from(sorted(TIES)),
    n=st.integers(2, 70),
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9),
    p=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
def test_tables_of_few_values(device, dtype, ties, n, values, p, seed):
    X = np.random.default_rng(seed).choice(values, (n, p)).astype(dtype)
    device.start()
    try:
        check_columns(device, X)
        check_neighbors(device, X, ties, nearest(ReferenceColumns(X), ties, seed), seed)
    finally:
        device.finish()


@pytest.mark.parametrize("ties", ["random", "first"])
def test_one_neighbor_is_counted_without_a_look_at_the_columns(device, ties):
    for n in (2, 255, 256, 257):
        count = device.empty(n, np.int64)
        call_neighbors(device, (np.float32, 0, n, 3), ties, 0, count=count)
        assert (device.to_host(count) == 1).all()


@pytest.mark.parametrize("ties", TIES)
def test_neighbors_are_written_where_offsets_say(device, ties):
    """Rows in any order, with room between them."""
    X = table(grid, 300, 2, np.float32)
    indptr, indices = expected_neighbors(grid, 300, 2, np.float32, ties)
    count = np.diff(indptr)
    places = np.random.default_rng(1).permutation(300)
    starts = np.empty(300, dtype=np.int64)
    starts[places] = np.cumsum(count[places] + 1) - count[places]
    found = device.empty(int((count + 1).sum() + 1), np.int64)
    untouched = device.to_host(found)
    call_neighbors(
        device, (np.float32, device.to_device(X.T), 300, 2), ties, SEED,
        offset=device.to_device(starts), indices=found,
    )  # fmt: skip
    expected = untouched.copy()
    for i in range(300):
        expected[starts[i] : starts[i] + count[i]] = indices[indptr[i] : indptr[i + 1]]
    np.testing.assert_array_equal(device.to_host(found), expected)


# ------------------------------------------------------------------------------------------------
# What is refused


def test_sizes_that_kernels_do_not_take(device):
    failed = r"^CUDA kernel {} failed: invalid argument$"
    for n, p in [(1, 3), (0, 3), (3, 0), (-1, 3)]:
        with pytest.raises(RuntimeError, match=failed.format("column_statistics")):
            call_statistics(device, "float32", n, p)
        for ties in TIES:
            with pytest.raises(RuntimeError, match=failed.format("neighbors")):
                call_neighbors(device, (np.float64, 0, n, p), ties, 0)
    with pytest.raises(RuntimeError, match=failed.format("neighbors")):
        call_neighbors(device, (np.float64, 0, 2**31 - 1, 1), "first", 0)


def test_unknown_arguments(device):
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        call_statistics(device, "float16", 2, 2)
    for ties in (-1, 3):
        with pytest.raises(ValueError, match="unknown tie rule"):
            call_neighbors(device, (np.float32, 0, 2, 2), ties, 0)
