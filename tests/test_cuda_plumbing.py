"""What surrounds the CUDA kernels: memory, streams, read-backs, and checks of CUDA tensors.

CPU tensors replace CUDA tensors, and the reference replaces the kernels, behind their interface.
"""

import ctypes
import itertools
import math
import warnings
from itertools import pairwise
from operator import itemgetter

import numpy as np
import pytest
import torch

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import ops
from lcodec_ext._torch.device import Device
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends import cuda
from lcodec_ext.dependence.backends.base import TIES
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuEngine
from lcodec_ext.dependence.backends.reference import (
    ReferenceBackend,
    ReferenceColumns,
    ReferenceEngine,
)

CPU = CpuBackend()


def at(pointer, shape, dtype):
    """The array at an address."""
    memory = (ctypes.c_byte * (math.prod(shape) * np.dtype(dtype).itemsize)).from_address(pointer)
    return np.frombuffer(memory, dtype).reshape(shape)


# What the compiled functions take by name.
STATISTICS = itemgetter("dtype", "x", "n", "p", "low", "high", "deviation")
NEIGHBORS = itemgetter(
    "dtype", "columns", "factor", "n", "p", "ties", "seed", "offset", "count", "indices"
)
PROBLEM = itemgetter("x", "n", "p", "factor", "rank", "ties", "seed", "workspace", "scratch")


class Kernels:
    """The functions and classes of cuda_engine.hpp, as the reference computes them."""

    def __init__(self):
        self.calls = []  # (name, stream)
        self.EngineFloat = self._engine(np.float32)
        self.EngineDouble = self._engine(np.float64)
        self.backend = cuda_on_cpu(self)

    def column_statistics(self, given, stream):
        dtype, x, n, p, low, high, deviation = STATISTICS(given)
        self.calls.append(("column_statistics", stream))
        columns = ReferenceColumns(at(x, (n, p), dtype))
        at(low, (p,), dtype)[:] = columns.low
        at(high, (p,), dtype)[:] = columns.high
        with np.errstate(over="ignore", invalid="ignore"):
            at(deviation, (p,), np.float64)[:] = columns.standard_deviations()

    def neighbors(self, given, stream):
        dtype, columns, factor, n, p, ties, seed, offset, count, indices = NEIGHBORS(given)
        self.calls.append(("neighbors", stream))
        table = ReferenceColumns(at(columns, (p, n), dtype).T)
        scale = at(factor, (p,), dtype) if factor else None
        indptr, found = ReferenceBackend().nearest(table, TIES[ties], seed, scale)
        if indices:
            np.testing.assert_array_equal(at(offset, (n + 1,), np.int64), indptr)
            at(indices, (len(found),), np.int64)[:] = found
        else:
            at(count, (n,), np.int64)[:] = np.diff(indptr)

    def _engine(kernels, dtype):
        class Engine:
            @staticmethod
            def workspace_bytes(n, p, scratch):
                return 8 * n * p + scratch

            @staticmethod
            def least_scratch(n):
                return 48 * n

            def __init__(self, given):
                x, n, p, factor, rank, ties, seed, workspace, scratch = PROBLEM(given)
                memory = at(workspace, (Engine.workspace_bytes(n, p, scratch),), np.uint8)
                memory[: 1 << 20] = memory[-1 << 20 :] = 0xA5  # it may be hundreds of megabytes
                self._arguments = (
                    ReferenceColumns(at(x, (n, p), dtype)),
                    at(factor, (p,), dtype),
                    at(rank, (n,), np.int32),
                    TIES[ties],
                    seed,
                )
                self._n, self._p, self._selected = n, p, []

            def start(self, stream):
                kernels.calls.append(("start", stream))
                columns, factor, rank, *rest = self._arguments
                self._twin = ReferenceEngine(columns, factor, rank.astype(np.int64), *rest)

            def select(self, column, stream):
                kernels.calls.append(("select", stream))
                self._twin.select(column)
                self._selected.append(column)

            def score(self, whole, fraction, stream):
                kernels.calls.append(("score", stream))
                scores = self._twin.score(np.arange(self._p))
                scores[0][self._selected] = -1
                for pointer, values in zip((whole, fraction), scores, strict=True):
                    at(pointer, (self._p,), np.int64)[:] = values

            def leaders(self, whole, fraction, candidate, out, stream):
                kernels.calls.append(("leaders", stream))
                wanted = np.flatnonzero(at(candidate, (self._p,), np.uint8))
                sums = (at(array, (self._p,), np.int64)[wanted] for array in (whole, fraction))
                found = np.stack(exact.contenders(wanted, *sums))[:, ::-1]
                words = at(out, (193,), np.int64)
                words[:] = -77
                words[0] = found.shape[1]
                kept = min(64, found.shape[1])
                words[1:].reshape(3, 64)[:, :kept] = found[:, :kept]

            def row_sums(self, candidate, sum, count, stream):
                kernels.calls.append(("row_sums", stream))
                for pointer, values in zip(
                    (sum, count), self._twin.row_sums(candidate), strict=True
                ):
                    at(pointer, (self._n,), np.int64)[:] = values

        return Engine


@pytest.fixture
def kernels():
    return Kernels()


def table(name, n=40):
    rng = np.random.default_rng(5)
    X = rng.normal(size=(n, 6))
    if name == "ties":
        X = rng.integers(0, 3, (n, 6)).astype(float)
    if name == "offset":
        X += 1e7
    return X, np.round(X[:, 1] * X[:, 4] + X[:, 2], 1)


def same_result(got, expected):
    for name in ("ordering", "cumulative", "conditional"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), strict=True)
    for name in ("base", "stop_reason", "names", "preselected", "n_samples", "n_features"):
        assert getattr(got, name) == getattr(expected, name)


def tensors(*arrays):
    return [torch.tensor(array) for array in arrays]


# ------------------------------------------------------------------------------------------------
# Results: the same bits as backend="reference"


@pytest.mark.parametrize("name", ["continuous", "ties", "offset"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": False, "ties": "random", "seed": 2**64 - 1},
        {"stop": False, "max_features": 3, "ties": "first", "standardize": None},
        {"preselected": [3, 1], "standardize": "bounded"},
        {"preselected": range(6)},
        {"min_gain": 0.2},
        {"progress": True},
    ],
)
def test_foci(kernels, name, dtype, options):
    X, y = table(name)
    X = X.astype(dtype)
    got = lcodec_ext.foci(*tensors(X, y), backend=kernels.backend, **options)
    assert "start" in dict(kernels.calls)
    same_result(got, lcodec_ext.foci(X, y, backend="reference", **options))


@pytest.mark.parametrize("options", [{}, {"ties": "random", "seed": 3}, {"ties": "first"}])
@pytest.mark.parametrize("name", ["continuous", "ties"])
def test_codec(kernels, name, options):
    X, y = table(name)
    for z, x in ((X[:, 0], None), (X[:, :2], X[:, 4]), (X[:, :1], X[:, 3:])):
        given = [None if array is None else torch.tensor(array) for array in (y, z, x)]
        expected = lcodec_ext.codec(y, z, x, backend="reference", **options)
        assert lcodec_ext.codec(*given, backend=kernels.backend, **options) == expected
    assert "row_sums" in dict(kernels.calls)
    mixed = tensors(y, X[:, 0].astype(np.float32), X[:, 1])
    assert lcodec_ext.codec(*mixed, backend=kernels.backend) == lcodec_ext.codec(
        y, X[:, 0].astype(np.float32), X[:, 1]
    )


@pytest.mark.parametrize("noise", [0, 0.05])
@pytest.mark.parametrize("noise_scale", ["absolute", "relative"])
def test_noise_is_the_hosts(kernels, noise, noise_scale):
    X, y = table("ties")
    X = X.astype(np.float32)
    options = {"noise": noise, "noise_scale": noise_scale, "seed": 7}
    got = lcodec_ext.lfoci(*tensors(X, y), backend=kernels.backend, **options)
    same_result(got, lcodec_ext.lfoci(X, y, backend="reference", **options))
    given = tensors(y, X[:, 1:3], X[:, 4])
    got = lcodec_ext.lcodec(*given, backend=kernels.backend, **options)
    assert got == lcodec_ext.lcodec(y, X[:, 1:3], X[:, 4], backend="reference", **options)


def test_dependence_graph(kernels):
    X, _ = table("ties")
    got = lcodec_ext.dependence_graph(torch.tensor(X), backend=kernels.backend)
    expected = lcodec_ext.dependence_graph(X, backend="reference")
    np.testing.assert_array_equal(got.weights, expected.weights)
    for pair in zip(got.results, expected.results, strict=True):
        same_result(*pair)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["continuous", "ties"])
def test_nearest_neighbors(kernels, name, dtype):
    X = table(name)[0][:, :2].astype(dtype)
    for ties in ("first", "random", "all"):
        kernels.calls.clear()
        got = lcodec_ext.nearest_neighbors(
            torch.tensor(X), ties=ties, seed=9, backend=kernels.backend
        )
        # where a row uses one neighbour, nobody need count them
        assert [name for name, _ in kernels.calls].count("neighbors") == 1 + (ties == "all")
        expected = lcodec_ext.nearest_neighbors(X, ties=ties, seed=9, backend="reference")
        for a, b in zip(*((r if ties == "all" else [r]) for r in (got, expected)), strict=True):
            assert isinstance(a, torch.Tensor)
            np.testing.assert_array_equal(a.numpy(), b, strict=True)


def test_columns_and_engine_equal_their_twins(kernels):
    X, y = table("ties")
    R, _ = CPU.ranks(y)
    columns = kernels.backend.lay_out(torch.tensor(X))
    cpu = CPU.lay_out(X)
    np.testing.assert_array_equal(columns.low, cpu.low)
    np.testing.assert_array_equal(columns.high, cpu.high)
    np.testing.assert_array_equal(columns.standard_deviations(), cpu.standard_deviations())
    assert kernels.calls == [("column_statistics", 0)]
    engines = [
        kernels.backend.engine(columns, np.ones(6), torch.tensor(R), "average", 0),
        CPU.engine(cpu, np.ones(6), R, "average", 0),
    ]
    for engine in engines:
        engine.select(2)
    candidates = np.array([5, 0, 3])
    for got, expected in zip(*(engine.score(candidates) for engine in engines), strict=True):
        np.testing.assert_array_equal(got, expected)
    for some in (candidates, np.array([0]), np.arange(6)[[0, 1, 3, 4, 5]]):
        got, expected = (np.stack(engine.leaders(some)) for engine in engines)
        np.testing.assert_array_equal(
            got[:, np.argsort(got[0])], expected[:, np.argsort(expected[0])]
        )
    for got, expected in zip(*(engine.row_sums(4) for engine in engines), strict=True):
        np.testing.assert_array_equal(got.numpy(), expected)
    for got, expected in zip(*(engine.score_all() for engine in engines), strict=True):
        left = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(np.asarray(got)[left], expected[left])
    assert engines[0].score_all()[0][2] == engines[1].score_all()[0][2] == -1
    assert len({engine.exact_sum(4) for engine in engines}) == 1


# ------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("copies", [63, 64, 65, 200])
def test_more_leaders_than_the_device_lists(kernels, copies):
    X, y = table("ties", 20)
    X = np.hstack([X[:, :1], np.repeat(X[:, 1:2], copies, axis=1), X[:, 4:5]])
    options = {"stop": False, "max_features": 3, "standardize": None}
    got = lcodec_ext.foci(*tensors(X, y), backend=kernels.backend, **options)
    expected = lcodec_ext.foci(X, y, backend="reference", **options)
    same_result(got, expected)
    assert 1 in expected.ordering


def test_progress_asks_for_all_candidates_at_once(kernels):
    X, y = tensors(*table("continuous"))
    steps = 3
    options = {"stop": False, "max_features": steps, "progress": True}
    lcodec_ext.foci(X, y, backend=kernels.backend, **options)
    assert [name for name, _ in kernels.calls].count("score") == steps


def test_progress_in_pieces_changes_nothing(monkeypatch):
    """Also with an engine that skips all that its floor lets it skip."""

    def leaders(engine, columns, floor=None):
        scores = engine.score(columns)
        for k, column in enumerate(columns):
            if exact.total(*engine.row_sums(column)) <= floor:
                scores[0][k] = -1
        return exact.contenders(columns, *scores)

    monkeypatch.setattr(ReferenceEngine, "leaders", leaders)
    rng = np.random.default_rng(2)
    for n in [9] * 8 + [20]:  # few rows: sums that differ by less than 1
        X, y = rng.integers(0, 4, (n, 12)), rng.integers(0, n, n)
        options = {"stop": False, "max_features": 3, "progress": True}
        for backend, engine in (
            ("reference", ReferenceEngine),
            ("cpu", CpuEngine),
        ):
            results = []
            for piece in (1024, 1, 5):
                monkeypatch.setattr(engine, "piece", piece)
                results.append(lcodec_ext.foci(X, y, backend=backend, **options))
            same_result(results[1], results[0])
            same_result(results[2], results[0])


def test_the_stream_is_read_at_each_call():
    streams = itertools.count(100)
    module = Kernels()
    X, y = tensors(*table("ties"))
    backend = cuda_on_cpu(module, stream=lambda: next(streams))
    lcodec_ext.foci(X, y, stop=False, max_features=2, backend=backend)
    lcodec_ext.nearest_neighbors(X, backend=backend)
    lcodec_ext.nearest_neighbors(X, ties="all", backend=backend)
    assert {name for name, _ in module.calls} == {
        "column_statistics", "start", "score", "leaders", "row_sums", "select",
        "neighbors",
    }  # fmt: skip
    assert [stream for _, stream in module.calls] == list(range(100, 100 + len(module.calls)))


def test_a_failed_kernel_is_named(kernels, monkeypatch):
    def start(self, stream):
        raise RuntimeError("CUDA kernel sort_columns failed: an illegal memory access")

    monkeypatch.setattr(kernels.EngineDouble, "start", start)
    with pytest.raises(RuntimeError, match="CUDA kernel sort_columns failed: an illegal"):
        lcodec_ext.foci(*tensors(*table("continuous")), backend=kernels.backend)


class Memory:
    """Replaces Tensor.new_empty on a device with this many bytes for one tensor."""

    def __init__(self, monkeypatch, limit):
        self.asked = []
        new_empty = torch.Tensor.new_empty

        def limited(tensor, size, dtype=None):
            if dtype == torch.uint8:
                self.asked.append(size)
                if size > limit:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.")
            return new_empty(tensor, size, dtype=dtype)

        monkeypatch.setattr(torch.Tensor, "new_empty", limited)


def test_scratch_is_halved_until_it_fits(kernels, monkeypatch):
    X, y = table("continuous")
    fixed = kernels.EngineDouble.workspace_bytes(40, 6, 0)
    memory = Memory(monkeypatch, fixed + 5000)
    got = lcodec_ext.foci(*tensors(X, y), backend=kernels.backend)
    assert memory.asked[0] == fixed + cuda.SCRATCH == fixed + 2**28
    assert all(a - fixed == 2 * (b - fixed) for a, b in pairwise(memory.asked))
    assert memory.asked[-1] == fixed + 4096
    same_result(got, lcodec_ext.foci(X, y, backend="reference"))


def test_the_least_scratch_is_tried_last(kernels, monkeypatch):
    X, y = table("continuous")
    fixed, least = 8 * 40 * 6, kernels.EngineDouble.least_scratch(40)
    memory = Memory(monkeypatch, fixed + least)
    got = lcodec_ext.foci(*tensors(X, y), backend=kernels.backend)
    same_result(got, lcodec_ext.foci(X, y, backend="reference"))
    assert memory.asked[-1] == fixed + least
    Memory(monkeypatch, fixed + least - 1)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"^40 rows and 6 columns need a workspace of at least 3,840 bytes on device 'cpu'.*"
        r"float32, or compute on the CPU with .cpu\(\) \(CUDA out of memory",
    ):
        lcodec_ext.foci(*tensors(X, y), backend=kernels.backend)


# ------------------------------------------------------------------------------------------------
# What users pass in: the same rules and messages as for arrays

N = 30
X0, Y0 = (array[:N] for array in table("continuous"))


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return torch.tensor(array)


ODD_TENSORS = [
    ("requires grad", torch.tensor(X0, requires_grad=True)),
    ("parameter", torch.nn.Parameter(torch.tensor(X0))),
    ("transposed", torch.tensor(X0.T.copy()).T),
    ("strided", torch.tensor(np.repeat(X0, 2, axis=1))[:, ::2]),
    ("negative bit", torch._neg_view(torch.tensor(-X0))),
    ("float16", torch.tensor(X0).half()),
    ("bfloat16", torch.tensor(X0).bfloat16()),
    *(
        (str(dtype), (torch.tensor(X0) > 0.2).to(dtype))
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    ),
    *(
        (str(dtype), torch.tensor(X0 > 0.2).to(dtype))
        for dtype in (torch.uint16, torch.uint32, torch.uint64)
    ),
]


@pytest.mark.parametrize(("name", "odd"), ODD_TENSORS, ids=[name for name, _ in ODD_TENSORS])
def test_odd_tensors_just_work(name, odd):
    y = torch.tensor(Y0)

    def results(backend):
        where = {"backend": backend}
        return (
            lcodec_ext.codec(y, odd, **where),
            lcodec_ext.codec(odd[:, :1], y, **where),
            lcodec_ext.codec(odd[:, 1], y, odd[:, 2], **where),
            lcodec_ext.lcodec(odd[:, 1], y, **where),
            lcodec_ext.foci(odd, y, stop=False, max_features=2, **where).cumulative.tolist(),
            lcodec_ext.lfoci(odd, odd[:, 0], max_features=2, **where).cumulative.tolist(),
        )

    assert results(Kernels().backend) == results("auto")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_the_response_is_compared_as_it_is(dtype):
    """Integers that float64 cannot hold, and integers that int64 cannot hold."""
    y = (np.rint(10 * Y0).astype(np.int64) + 2**62).astype(dtype)
    if dtype == np.uint64:
        y[y > 2**62] += np.uint64(2**63)
    expected = lcodec_ext.codec(Y0, X0)
    assert lcodec_ext.codec(y, X0) == expected
    backend = Kernels().backend
    assert lcodec_ext.codec(torch.tensor(y), torch.tensor(X0), backend=backend) == expected
    got = lcodec_ext.foci(torch.tensor(X0), torch.tensor(y), backend=backend)
    same_result(got, lcodec_ext.foci(X0, Y0))


def test_zeros_of_both_signs_are_equal():
    y = np.where(Y0 > 0, 0.0, -0.0)
    y[:9] = np.arange(9)
    expected = lcodec_ext.codec(y, X0)
    assert lcodec_ext.codec(*tensors(y, X0), backend=Kernels().backend) == expected


BAD_TENSORS = [
    {"y": changed(Y0, 4, np.nan)},
    {"X": changed(X0, (7, 1), np.nan)},
    {"X": changed(X0, (7, slice(None)), np.nan)},
    {"X": changed(X0, (2, 0), np.inf)},
    {"y": changed(Y0, slice(9, 12), -np.inf)},
    {"X": torch.tensor(X0[:2]), "y": torch.tensor(Y0[:2])},
    {"X": torch.tensor(X0[:0]), "y": torch.tensor(Y0[:0])},
    {"X": torch.zeros(0, 3, dtype=torch.int64), "y": torch.tensor(Y0[:0])},
    {"X": torch.tensor(X0[:, :0])},
    {"y": torch.tensor(Y0[:-1])},
    {"y": torch.ones(N, 2, 2)},
    {"y": torch.tensor(Y0)[None]},
    {"y": torch.tensor(Y0) + 0j},
    {"X": torch.tensor(X0) + 0j},
    {"X": torch.zeros(N, 2, 2)},
    {"X": torch.tensor(3.0)},
    {"X": None},
    {"y": None},
    {"X": torch.tensor(X0) * 1e200},
    {"X": torch.full((N, 1), 2**60) + torch.arange(N)[:, None]},
    {"X": -torch.full((N, 1), 2**60)},
    {"X": torch.tensor(np.full((N, 2), 2**63, dtype=np.uint64))},
    {"X": torch.tensor(np.full((N, 2), 2**54, dtype=np.uint64))},
    {"X": torch.eye(N).to_sparse()},
    {"X": torch.zeros(1_000_001, 1), "y": torch.zeros(1_000_001)},
    {"nan_policy": "drop"},
    {"ties": "mean"},
    {"seed": 1.5},
    {"y": changed(Y0, slice(2, None), np.nan), "nan_policy": "omit"},
]


@pytest.mark.parametrize("function", ["foci", "codec", "lfoci"])
@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_bad_tensors(function, bad):
    given = {"X": torch.tensor(X0), "y": torch.tensor(Y0), **bad}
    X, y = given.pop("X"), given.pop("y")

    def message(backend):
        arguments = (y, X) if function == "codec" else (X, y)
        with pytest.raises((ValueError, TypeError)) as caught:
            getattr(lcodec_ext, function)(*arguments, backend=backend, **given)
        return type(caught.value), str(caught.value)

    assert message(Kernels().backend) == message("auto")


def test_tensors_without_numbers():
    float8 = torch.zeros(N, 2, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="X must hold real numbers; got a tensor of torch.float8"):
        lcodec_ext.foci(float8, torch.tensor(Y0), backend=Kernels().backend)


def test_missing_values_can_be_left_out():
    holes, y = X0.copy(), Y0.copy()
    holes[3, 1] = holes[8, 2] = y[5] = np.nan
    for options in ({}, {"ties": "random", "seed": 3}):
        options = {"nan_policy": "omit", "stop": False, **options}
        expected = lcodec_ext.foci(holes, y, **options)
        assert expected.n_samples == N - 3
        got = lcodec_ext.foci(*tensors(holes, y), backend=Kernels().backend, **options)
        same_result(got, expected)


def test_large_float32_sums_are_no_infinities():
    X = (X0 * 1e18).astype(np.float32)
    X[:, 0] = 3e38
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = lcodec_ext.foci(X, Y0)
        got = lcodec_ext.foci(*tensors(X, Y0), backend=Kernels().backend)
    same_result(got, expected)


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU; nothing must ask for its data."""

    device = torch.device("cuda:0")

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        raise AssertionError(f"{function} was called")


class Other(Elsewhere):
    device = torch.device("cuda:1")


def test_data_are_not_copied_between_devices():
    X, y = (tensor.as_subclass(Elsewhere) for tensor in tensors(X0, Y0))
    for backend in ("cpu", "reference"):
        with pytest.raises(
            ValueError,
            match=f"X is a tensor on device 'cuda:0', and backend='{backend}' computes on the CPU; "
            r"data are not copied between devices unasked: pass X.cpu\(\)",
        ):
            lcodec_ext.foci(X, y, backend=backend)
    with pytest.raises(ValueError, match=r"X is on 'cuda:0', y is not a tensor: pass torch.as_t"):
        lcodec_ext.foci(X, Y0)
    other = torch.tensor(Y0).as_subclass(Other)
    for backend in ("auto", "cuda"):
        with pytest.raises(
            ValueError, match=r"X is on 'cuda:0', y is a tensor on device 'cuda:1': pass y.to\(X.d"
        ):
            lcodec_ext.foci(X, other, backend=backend)
    with pytest.raises(
        ValueError, match=r"y is on 'cuda:0', x is a tensor on device 'meta': pass x.to\(y.device"
    ):
        lcodec_ext.codec(y, X, torch.zeros(N, device="meta"))
    with pytest.raises(ValueError, match=r"X is not a tensor: pass torch.as_tensor\(X\).cuda\(\)"):
        lcodec_ext.foci(X0, y, backend="cuda")
    for call in (lcodec_ext.xi, lcodec_ext.xi_test):
        message = f"x is a tensor on device 'cuda:0', and {call.__name__} computes on the CPU only"
        with pytest.raises(ValueError, match=message):
            call(y, y)
    with pytest.raises(ValueError, match="X is a tensor .*, and FOCISelector computes on the CPU"):
        lcodec_ext.FOCISelector().fit(X, y)
    with pytest.raises(
        ValueError, match="FOCISelector computes on the CPU only; got backend='cuda'"
    ):
        lcodec_ext.FOCISelector(backend="cuda").fit(X0, Y0)


def test_a_build_without_the_engine_says_so():
    with pytest.raises(RuntimeError) as caught:
        Device(torch.device("cuda:0"), module=None)
    assert "tensors on device 'cuda:0' need CUDA, which this build or" in str(caught.value)
    assert lcodec_ext.cuda_status() in str(caught.value)


def test_warnings_are_those_of_the_cpu():
    constant = X0.copy()
    constant[:, 1] = 2.5
    x = np.repeat(np.arange(10), 3)
    calls = [
        lambda given, where: lcodec_ext.foci(given(constant), given(Y0), **where),
        lambda given, where: lcodec_ext.foci(given(X0), given(np.ones(N)), **where),
        lambda given, where: lcodec_ext.lfoci(given(constant), given(np.ones(N)), **where),
        lambda given, where: lcodec_ext.codec(
            given(Y0), given(constant), given(np.ones(N)), **where
        ),
        lambda given, where: lcodec_ext.codec(given(np.ones(N)), given(X0), **where),
        lambda given, where: lcodec_ext.codec(given(x**2), given(X0), given(x), **where),
        lambda given, where: lcodec_ext.lcodec(given(np.ones(N)), given(constant), **where),
        lambda given, where: lcodec_ext.codec(
            given(Y0), given((X0 * 1e-25).astype(np.float32)), **where
        ),
        lambda given, where: lcodec_ext.dependence_graph(given(constant), **where),
    ]
    for call in calls:
        told = []
        for given, backend in ((np.asarray, "cpu"), (torch.tensor, Kernels().backend)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(given, {"backend": backend})
            assert {warning.filename for warning in caught} == {__file__}
            told.append([str(warning.message) for warning in caught])
        assert told[0] == told[1] != []


def test_the_single_step_op_on_a_device(kernels):
    X, y = tensors(X0, Y0)
    R, _ = kernels.backend.ranks(y)
    factors = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    got = ops._scored(kernels.backend, X, R, [4, 1], factors, "random", 5)
    assert [name for name, _ in kernels.calls] == ["start", "select", "select", "score"]
    engine = ReferenceEngine(ReferenceColumns(X0), factors.numpy(), R.numpy(), "random", 5)
    for column in (4, 1):
        engine.select(column)
    expected = np.full((2, 6), -1)
    expected[:, [0, 2, 3, 5]] = engine.score(np.array([0, 2, 3, 5]))
    np.testing.assert_array_equal(torch.stack(got), expected)
