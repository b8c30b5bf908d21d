"""The CUDA engine against the reference, wherever kernels can run: == throughout."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from devices import EMULATED, PARAMETERS
from lcodec_ext import _emulated
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuColumns, CpuEngine
from lcodec_ext.dependence.backends.reference import ReferenceColumns, ReferenceEngine

ranks = CpuBackend().ranks
pytestmark = pytest.mark.native

TIES = ("average", "random", "first")
MOST_LEADERS = 64
LEADER_WORDS = 1 + 3 * MOST_LEADERS


class DeviceEngine:
    """An engine with its memory on a device; all results as arrays."""

    def __init__(self, device, X, factors, R, ties="average", seed=0, scratch=1 << 28):
        self.device, (self.n, self.p) = device, X.shape
        make = device.module.EngineFloat
        if X.dtype == np.float64:
            make = device.module.EngineDouble
        scratch = max(scratch, make.least_scratch(self.n))
        size = make.workspace_bytes(self.n, self.p, scratch)
        self.workspace = device.empty(size, np.uint8)
        self.held = [device.to_device(a) for a in (X, factors, R.astype(np.int32))]
        x, factor, rank = map(int, self.held)
        self.engine = make(
            {
                "x": x,
                "n": self.n,
                "p": self.p,
                "factor": factor,
                "rank": rank,
                "ties": TIES.index(ties),
                "seed": seed,
                "workspace": int(self.workspace),
                "scratch": scratch,
            }
        )
        self.engine.start(device.stream)

    def select(self, column):
        self.engine.select(column, self.device.stream)

    def _call(self, name, shapes, *arguments):
        outputs = [self.device.empty(shape, np.int64) for shape in shapes]
        getattr(self.engine, name)(*arguments, *map(int, outputs), self.device.stream)
        results = [self.device.to_host(output) for output in outputs]
        self.device.to_host(self.workspace)  # nothing is written behind it
        return results

    def score(self):
        return self._call("score", (self.p, self.p))

    def row_sums(self, column):
        return self._call("row_sums", (self.n, self.n), column)

    def leaders(self, whole, fraction, candidate):
        held = [self.device.to_device(a) for a in (whole, fraction, candidate.astype(np.uint8))]
        (out,) = self._call("leaders", (LEADER_WORDS,), *map(int, held))
        count = out[0]
        found = out[1:].reshape(3, MOST_LEADERS)[:, : min(count, MOST_LEADERS)]
        return count, found


def assert_steps_equal(
    device, X, R, selected, ties="average", seed=0, factors=None, scratch=1 << 28
):
    """Scores and row sums of every step, and those before the first one."""
    X = np.ascontiguousarray(X)
    p = X.shape[1]
    factors = np.ones(p, X.dtype) if factors is None else factors.astype(X.dtype)
    engine = DeviceEngine(device, X, factors, R, ties, seed, scratch)
    expected = ReferenceEngine(ReferenceColumns(X), factors, R, ties, seed)
    for column in (None, *selected):
        if column is not None:
            engine.select(column)
            expected.select(column)
        taken = list(selected[: selected.index(column) + 1]) if column is not None else []
        left = np.setdiff1d(np.arange(p), taken)
        whole, fraction = engine.score()
        assert (whole[taken] == -1).all()
        assert (fraction[taken] == -1).all()
        want = expected.score(left)
        np.testing.assert_array_equal(whole[left], want[0])
        np.testing.assert_array_equal(fraction[left], want[1])
        for candidate in left[:2]:
            for got, sums in zip(
                engine.row_sums(candidate), expected.row_sums(candidate), strict=True
            ):
                np.testing.assert_array_equal(got, sums)


def continuous(rng, n, p):
    return rng.normal(size=(n, p))


def offset(rng, n, p):
    return 1e7 + rng.integers(0, 40, size=(n, p)).astype(float)


def binary(rng, n, p):
    return rng.integers(0, 2, size=(n, p)).astype(float)


def mixed(rng, n, p):
    X = rng.normal(size=(n, p))
    X[:, ::2] = rng.integers(0, 3, size=(n, (p + 1) // 2))
    return X


def equal(rng, n, p):
    return np.ones((n, p))


def clusters(rng, n, p):
    """Two far apart, and one row between them."""
    X = rng.normal(size=(n, p)) * 1e-3
    X[: n // 2] += 1e4
    X[n // 2] = 5e3
    return X


def heavy_tailed(rng, n, p):
    return rng.standard_cauchy(size=(n, p))


def tiny(rng, n, p):
    """Differences whose squares underflow."""
    return rng.integers(-3, 4, size=(n, p)) * 1e-23


def zeros(rng, n, p):
    """Of both signs."""
    return rng.choice([-0.0, 0.0, 1.0], size=(n, p))


def copies(rng, n, p):
    """Rows that occur twice, and one that occurs often."""
    X = np.repeat(rng.normal(size=((n + 1) // 2, p)), 2, axis=0)[:n]
    X[: n // 3] = X[0]
    return X[rng.permutation(n)]


def levels(rng, n, p):
    """Two groups as far from each other as values beside each other are."""
    X = rng.integers(0, n // 2, size=(n, p)).astype(float)
    X[:, 1] = rng.integers(0, 2, n)
    return X


SHAPES = [
    continuous, offset, binary, mixed, equal, clusters, heavy_tailed, tiny, zeros, copies, levels,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_shape(device, shape, ties, dtype, rng):
    X = shape(rng, 150, 5).astype(dtype)
    R, _ = ranks(rng.integers(0, 40, 150))
    assert_steps_equal(device, X, R, [1, 4, 0], ties, seed=2**64 - 3)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("n", [3, 4, 31, 32, 33, 63, 64, 65, 130, 257])
def test_awkward_numbers_of_rows(device, n, ties, rng):
    for shape in (continuous, binary):
        R, _ = ranks(rng.integers(0, n, n))
        assert_steps_equal(device, shape(rng, n, 3).astype(np.float32), R, [2, 0], ties, seed=5)


@pytest.mark.parametrize("p", [1, 2, 31, 32, 33, 64, 65])
def test_awkward_numbers_of_columns(device, p, rng):
    X = mixed(rng, 40, p).astype(np.float32)
    R, _ = ranks(rng.normal(size=40))
    assert_steps_equal(device, X, R, [p - 1][: p - 1], factors=rng.uniform(0.5, 2, p))


def test_more_selected_columns_than_are_held(device, rng):
    X = rng.integers(0, 3, size=(30, 40)).astype(np.float32)
    R, _ = ranks(rng.normal(size=30))
    X[:, 35] = rng.normal(size=30)
    engine = DeviceEngine(device, X, np.ones(40, np.float32), R)
    expected = ReferenceEngine(ReferenceColumns(X), np.ones(40, np.float32), R, "average", 0)
    for column in range(36):
        engine.select(column)
        expected.select(column)
        if column >= 31:
            left = np.arange(column + 1, 40)
            whole, fraction = engine.score()
            np.testing.assert_array_equal([whole[left], fraction[left]], expected.score(left))
            np.testing.assert_array_equal(engine.row_sums(39), expected.row_sums(39))


@pytest.mark.parametrize("shape", [continuous, binary, copies], ids=lambda shape: shape.__name__)
def test_one_row_or_column_at_a_time(device, shape, rng):
    X = shape(rng, 150, 5).astype(np.float32)
    R, _ = ranks(rng.integers(0, 50, 150))
    assert_steps_equal(device, X, R, [3, 1], scratch=0)


@pytest.mark.parametrize("ties", TIES)
def test_more_rows_than_lists_hold(device, ties, rng):
    """Lists end, and lanes go along their candidate's order; the tile is not in shared memory."""
    n = 1800
    X = rng.normal(size=(n, 4)).astype(np.float32)
    X[:, 0] = rng.integers(0, 20, n)  # large groups, each at distance 0 from a row
    X[:, 3] = rng.standard_cauchy(n).round(1)  # outliers, some of them tied
    R, _ = ranks(X[:, 1] + X[:, 2])
    assert_scores_equal_cpu(device, X, R, [1, 0], ties)


@pytest.mark.parametrize("ties", TIES)
def test_lists_end_while_the_tile_is_in_shared_memory(device, ties, rng):
    """Float32 and 1026 to 1760 rows: lanes go on along the order from the shared-memory scan."""
    n = 1500
    X = rng.normal(size=(n, 4)).astype(np.float32)
    X[::211] *= 50  # few rows, far from all others
    X[:, 3] = rng.standard_cauchy(n).round(1)
    R, _ = ranks(X[:, 1] + X[:, 2])
    assert_scores_equal_cpu(device, X, R, [1, 0], ties)


def assert_scores_equal_cpu(device, X, R, selected, ties="average"):
    """Against the CPU engine, where the reference would take too long."""
    factors = np.ones(X.shape[1], X.dtype)
    engine = DeviceEngine(device, X, factors, R, ties)
    expected = CpuEngine(CpuColumns(X), factors, R, ties, 0)
    for column in selected:
        engine.select(column)
        expected.select(column)
        left = np.setdiff1d(np.arange(X.shape[1]), selected)
        whole, fraction = engine.score()
        np.testing.assert_array_equal([whole[left], fraction[left]], expected.score(left))


@st.composite
def tables(draw):
    n = draw(st.integers(3, 90))
    p = draw(st.integers(1, 5))
    values = draw(st.sampled_from([2, 3, 9, 1000]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    X = rng.integers(0, values, size=(n, p)).astype(draw(st.sampled_from([np.float32, np.float64])))
    X *= draw(st.sampled_from([1.0, 0.1, 1e-22, 1e10]))
    return X, ranks(rng.integers(0, draw(st.sampled_from([1, 2, n])), n))[0]


@pytest.mark.parametrize("device", PARAMETERS)
@given(table=tables(), ties=st.sampled_from(TIES), seed=st.integers(0, 2**64 - 1))
def test_tables_of_few_values(device, table, ties, seed):
    X, R = table
    device.start()
    try:
        selected = list(range(X.shape[1] - 1))[:2]
        assert_steps_equal(device, X, R, selected, ties, seed)
    finally:
        device.finish()


@pytest.mark.parametrize("p", [1, 5, 33, 1025, 3000])
def test_leaders(device, p, rng):
    for kind in ("spread", "close", "equal", "selected"):
        whole = rng.integers(0, 1000, p)
        fraction = rng.integers(0, 1 << 43, p)
        if kind == "close":
            whole[:] = rng.integers(999, 1001, p)
            fraction[:] = (1000 - whole) * (1 << 43) + rng.integers(0, 1 << 21, p)
            fraction[rng.random(p) < 0.2] = 0
        elif kind == "equal":
            whole[:], fraction[:] = 5, 0
        elif kind == "selected":
            whole[:] = fraction[:] = -1
        candidate = rng.random(p) < 0.8
        # tables of any size: an engine only needs their number of columns
        X = np.zeros((3, p), np.float32)
        engine = DeviceEngine(device, X, np.ones(p, np.float32), np.arange(1, 4))
        count, found = engine.leaders(whole, fraction, candidate)
        columns = np.flatnonzero(candidate)
        want = np.array(exact.contenders(columns, whole[columns], fraction[columns]))
        assert count == want.shape[1]
        if count <= MOST_LEADERS:
            np.testing.assert_array_equal(found[:, np.argsort(found[0])], want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_functions_on_emulated_kernels(shape, ties, dtype, rng):
    """Validation, memory and the loop of FOCI around the kernels."""
    X = torch.from_numpy(shape(rng, 70, 6).astype(dtype))
    y = X[:, 0] * X[:, 3] + torch.from_numpy(rng.integers(0, 3, 70))
    options = {"ties": ties, "seed": 4}
    calls = [
        lambda where: lcodec_ext.foci(X, y, stop=False, max_features=4, **options, **where),
        lambda where: lcodec_ext.codec(y, X[:, :2], X[:, 2:4], **options, **where),
        lambda where: lcodec_ext.lfoci(X, y, **options, **where),
    ]
    if ties != "average":
        calls.append(lambda where: lcodec_ext.nearest_neighbors(X, **options, **where).tolist())
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant columns, underflow
            expected = call({"backend": "cpu"})
            got = call({"backend": cuda_on_cpu(_emulated.cuda)})
        assert str(got) == str(expected)
        if hasattr(got, "ordering"):
            np.testing.assert_array_equal(got.ordering, expected.ordering)
            np.testing.assert_array_equal(got.cumulative, expected.cumulative)


def test_the_workspace_is_no_larger_than_the_table_needs(device):
    for make in (device.module.EngineFloat, device.module.EngineDouble):
        sizes = [make.workspace_bytes(100, 10, scratch) for scratch in (1 << 14, 1 << 28, 1 << 40)]
        assert sizes[0] < sizes[1] == sizes[2] < 1 << 25
        assert make.least_scratch(100) < make.least_scratch(10_000) < 1 << 24


def test_a_table_for_which_shared_memory_is_not_granted(rng):
    """400 rows of float32 take 52 800 bytes. The error names the kernel and says why."""
    X = rng.normal(size=(400, 3)).astype(np.float32)
    engine = DeviceEngine(EMULATED[0], X, np.ones(3, np.float32), np.arange(1, 401))
    engine.select(0)
    _emulated.configure("forward", refuse_attributes=True)
    try:
        with pytest.raises(RuntimeError, match="CUDA kernel scan failed: invalid device ordinal"):
            engine.score()
    finally:
        _emulated.configure("forward")
    engine.score()


def test_arguments_that_engines_do_not_take(device, rng):
    X = rng.normal(size=(10, 3)).astype(np.float32)
    engine = DeviceEngine(device, X, np.ones(3, np.float32), np.arange(1, 11))
    for column in (-1, 3):
        with pytest.raises(RuntimeError, match="CUDA kernel select failed: invalid argument"):
            engine.select(column)
        with pytest.raises(RuntimeError, match="CUDA kernel row_sums failed: invalid argument"):
            engine.row_sums(column)
    given = {"x": 0, "n": 10, "p": 3, "factor": 0, "rank": 0, "ties": 0, "seed": 0}
    given |= {"workspace": int(engine.workspace), "scratch": 100}
    little = device.module.EngineFloat(given)
    with pytest.raises(RuntimeError, match="CUDA kernel start failed: invalid argument"):
        little.start(device.stream)
    with pytest.raises(ValueError, match="unknown tie rule"):
        device.module.EngineFloat(given | {"ties": 3})
