"""The emulator that runs CUDA kernels on the CPU: right kernels are right, wrong ones are caught.

Other tests rely on it for the package's kernels; here it is tested with kernels of its own.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lcodec_ext
from lcodec_ext import _emulated

pytestmark = pytest.mark.native

Bug = _emulated.Bug
ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 1), ("shuffled", 2)]
ASAN = "address" in lcodec_ext.build_info()["sanitizers"]


@pytest.fixture(autouse=True)
def defaults():
    yield
    _emulated.configure("forward")
    assert _emulated.allocated_bytes() == 0


@pytest.fixture(params=ORDERS, ids=lambda order: f"{order[0]}{order[1]}")
def order(request):
    _emulated.configure(*request.param)


# ------------------------------------------------------------------------------------------------
# Kernels with known results: (right result, function that runs the kernel with a bug or without)


def case_sum():
    values = np.random.default_rng(0).integers(0, 1000, 1000, dtype=np.int32)
    return values.sum(), lambda bug: _emulated.sum(values, bug)


def case_transpose():
    values = np.random.default_rng(0).normal(size=(45, 70)).astype(np.float32)
    return values.T, lambda bug: _emulated.transpose(values, bug)


def case_nearest():
    x = np.random.default_rng(0).integers(0, 9, (101, 3)).astype(np.float32)  # ties
    distance = np.square(x[:, None] - x).sum(axis=-1)
    np.fill_diagonal(distance, np.inf)
    return distance.argmin(axis=1), lambda bug: _emulated.nearest(x, bug)


def case_scan():
    values = np.random.default_rng(0).integers(-99, 99, 100, dtype=np.int32)
    return values.cumsum(), lambda bug: _emulated.scan(values, bug)


def case_histogram():
    values = np.random.default_rng(0).integers(0, 301, 4000, dtype=np.int32)
    return np.bincount(values), lambda bug: _emulated.histogram(values, 301, bug)


CASES = [case_sum, case_transpose, case_nearest, case_scan, case_histogram]


@pytest.mark.parametrize("case", CASES)
def test_right_kernels(case, order):
    expected, run = case()
    np.testing.assert_array_equal(run(Bug.none), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_removed_barrier_gives_a_wrong_result_in_some_order(case):
    expected, run = case()
    wrong = 0
    for order in ORDERS:
        _emulated.configure(*order)
        wrong += not np.array_equal(run(Bug.no_barrier), expected)
    assert wrong > 0


@pytest.mark.parametrize("case", [case_sum, case_histogram])
def test_shared_memory_that_was_not_written_gives_a_wrong_result(case, order):
    expected, run = case()
    assert not np.array_equal(run(Bug.uninitialised), expected)


HEAD = r"^kernel {}_kernel, block \(\d, 0, 0\): thread \(\d+, 0, 0\) "
PLACE = r"{} \(.*selftest\.cu:\d+\)"


@pytest.mark.parametrize(
    ("case", "bug", "message"),
    [
        (
            case_sum,
            Bug.divergent_barrier,
            f"waits at {PLACE.format('__syncthreads')} for thread .*, which has ended$",
        ),
        (
            case_sum,
            Bug.other_barrier,
            f"waits at {PLACE.format('__syncthreads')} for thread .*, "
            f"which waits at {PLACE.format('__syncthreads')}$",
        ),
        (
            case_sum,
            Bug.early_exit,
            f"waits at {PLACE.format('__syncthreads')} for thread .*, which has ended$",
        ),
        (
            case_scan,
            Bug.wrong_mask,
            f"waits at {PLACE.format('__shfl_up_sync')} with mask 0xffffffff for thread "
            r"\(100, 0, 0\), which has ended$",
        ),
        (
            case_scan,
            Bug.partial_warp,
            f"at {PLACE.format('__shfl_up_sync')} has lanes in its mask 0xffffffff that do not "
            "exist: its warp has 4$",
        ),
        (
            case_scan,
            Bug.foreign_mask,
            f"at {PLACE.format('__shfl_up_sync')} is not in its own mask 0x0000ffff$",
        ),
        (
            case_scan,
            Bug.outside_lane,
            f"at {PLACE.format('__shfl_down_sync')} reads from lane 31, which is not in the mask "
            "0x7fffffff$",
        ),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_mistakes_are_named(case, bug, message, order):
    expected, run = case()
    with pytest.raises(RuntimeError, match=HEAD.format(case.__name__[5:]) + message):
        run(bug)
    np.testing.assert_array_equal(run(Bug.none), expected)  # the next launch is not affected


def test_a_write_behind_shared_memory_is_caught(tmp_path):
    """By ASan at once, which ends the process; without it when the block has ended."""
    code = (
        "import numpy as np\n"
        "from lcodec_ext import _emulated as e\n"
        "e.histogram(np.zeros(9, dtype=np.int32), 301, e.Bug.overrun)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert ("heap-buffer-overflow" in done.stderr) == ASAN
    assert ("wrote behind a shared array of 1204 bytes" in done.stderr) != ASAN


# ------------------------------------------------------------------------------------------------
# Warp operations, atomics, arithmetic


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 1024])
def test_compaction_by_votes(n, order):
    values = np.random.default_rng(n).integers(-1, 2, n, dtype=np.int32)
    for data in (values, np.zeros_like(values), np.ones_like(values)):
        kept = data[data != 0]
        out, counts = _emulated.compact(data)
        np.testing.assert_array_equal(out[: len(kept)], kept)
        assert list(counts) == [len(kept), len(kept) > 0, len(kept) == n]


@pytest.mark.parametrize("width", [2, 8, 32])
def test_warp_operations(width, order):
    values = np.random.default_rng(width).integers(-(2**31), 2**31, 32).astype(np.int32)
    lane = np.arange(32)
    first = lane // width * width
    last = first + width - 1
    halved = values.view(np.uint32) >> 1
    odd = int(((values & 1) << lane.astype(np.int64)).sum())
    expected = [
        values[first + 3 % width],
        values[np.where(lane - 2 >= first, lane - 2, lane)],
        values[np.where(lane + 2 <= last, lane + 2, lane)],
        values[np.where(lane ^ 5 <= last, lane ^ 5, lane)],
        values[lane ^ 1],
        values[lane // 2],
        odd,
        (values > 0).any(),
        (values > 0).all(),
        values.sum(dtype=np.int64),
        halved.sum(dtype=np.int64),
        values.min(),
        values.max(),
        np.bitwise_or.reduce(halved),
        values[np.where(lane < 16, 15, 16)],
    ]
    result = _emulated.warp_operations(values, width)
    assert len(result) == len(expected)
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, np.full(32, want).astype(np.int64).astype(np.int32))


def test_arithmetic_and_atomics(order):
    rng = np.random.default_rng(5)
    a = rng.integers(0, 2**64, 606, dtype=np.uint64)
    a[:6] = [0, 1, 2**31, 2**32, 2**63, 2**64 - 1]
    b = rng.permutation(a)
    words = [(int(x), int(y), int(x) % 2**32, int(y) % 2**32) for x, y in zip(a, b, strict=True)]

    def first_bit(x):
        return (x & -x).bit_length()

    def bits(x, dtype, integer):
        return int(np.array(x, dtype=dtype).view(integer))

    expected = [
        [low.bit_count() for x, y, low, low_b in words],
        [x.bit_count() for x, y, low, low_b in words],
        [first_bit(low) for x, y, low, low_b in words],
        [first_bit(x) for x, y, low, low_b in words],
        [32 - low.bit_length() for x, y, low, low_b in words],
        [64 - x.bit_length() for x, y, low, low_b in words],
        [int(f"{low:032b}"[::-1], 2) for x, y, low, low_b in words],
        [low * low_b >> 32 for x, y, low, low_b in words],
        [x * y >> 64 for x, y, low, low_b in words],
        [min(x, y) for x, y, low, low_b in words],
        [max(low, low_b) for x, y, low, low_b in words],
        [
            bits(np.uint32(low & 0x3FFFFFFF).view(np.float32) + np.float32(1), "f4", "u4")
            for x, y, low, low_b in words
        ],
        [
            bits(np.uint64(x >> 2).view(np.float64) * np.float64(3), "f8", "u8")
            for x, y, low, low_b in words
        ],
    ]
    start = np.array([5, 5, 10**9, 10**9, 0, 0, 4], dtype=np.uint32)
    result, atomics = _emulated.arithmetic(a, b, start)
    np.testing.assert_array_equal(result, np.array(expected, dtype=np.uint64))
    lows = [low for x, y, low, low_b in words]
    assert list(atomics) == [
        (5 + sum(lows)) % 2**32,
        (5 - sum(lows)) % 2**32,
        min(lows),
        max(lows),
        np.bitwise_or.reduce(lows),
        7,
        4 + len(lows),
    ]


# ------------------------------------------------------------------------------------------------
# Launches and memory


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes"),
    [
        ((5, 3, 2), (7, 2, 3), 0),
        ((1, 65535, 1), (1, 1, 1), 0),
        ((1, 1, 1), (16, 1, 64), 1),
        ((2, 1, 1), (1, 1024, 1), 227 * 1024),
    ],
)
def test_every_thread_runs(grid, block, shared_bytes, order):
    count = _emulated.count_threads(grid, block, shared_bytes=shared_bytes, barriers=2)
    assert count == np.prod(grid) * np.prod(block)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "error"),
    [
        ((1, 1, 1), (1025, 1, 1), 0, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (32, 33, 1), 0, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (1, 1, 65), 0, "cudaErrorInvalidConfiguration"),
        ((0, 1, 1), (32, 1, 1), 0, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (32, 0, 1), 0, "cudaErrorInvalidConfiguration"),
        ((1, 65536, 1), (32, 1, 1), 0, "cudaErrorInvalidConfiguration"),
        ((1, 1, 1), (32, 1, 1), 227 * 1024 + 1, "cudaErrorInvalidValue"),
    ],
)
def test_what_a_gpu_refuses(grid, block, shared_bytes, error):
    with pytest.raises(RuntimeError, match=f"^{error}$"):
        _emulated.count_threads(grid, block, shared_bytes=shared_bytes)
    assert _emulated.count_threads((1, 1, 1), (1, 1, 1)) == 1


def test_shared_memory_that_is_not_granted_is_the_launchs_error():
    """Also where the runtime leaves no last error behind."""
    _emulated.configure("forward", refuse_attributes=True)
    with pytest.raises(RuntimeError, match="^cudaErrorInvalidDevice$"):
        _emulated.count_threads((1, 1, 1), (32, 1, 1), shared_bytes=48 * 1024 + 1)
    assert _emulated.count_threads((1, 1, 1), (32, 1, 1), shared_bytes=48 * 1024) == 32


def test_launches_from_several_os_threads():
    expected, run = case_nearest()
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(run, [Bug.none] * 8):
            np.testing.assert_array_equal(result, expected)


def test_device_memory_can_run_out():
    values = np.arange(1000, dtype=np.int64)
    needed = 3 * values.nbytes
    for memory in (0, needed - 1):
        _emulated.configure("forward", memory=memory)
        with pytest.raises(RuntimeError, match="^cudaErrorMemoryAllocation$"):
            _emulated.sums(values)
        assert _emulated.allocated_bytes() == 0
    _emulated.configure("forward", memory=2 * needed)
    assert _emulated.count_threads((1, 1, 1), (1, 1, 1)) == 1  # no error is left behind
    _emulated.sums(values)


def test_unknown_order_is_an_error():
    with pytest.raises(ValueError, match="order must be"):
        _emulated.configure("sideways")


# ------------------------------------------------------------------------------------------------
# Device-wide primitives


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@given(
    n=st.sampled_from([0, 1, 2, 31, 33, 255, 257, 1000]),
    segments=st.sampled_from([0, 1, 2, 7]),
    begin_bit=st.integers(0, 31),
    width=st.integers(1, 64),
    few=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sort_pairs_is_stable(dtype, n, segments, begin_bit, width, few, seed):
    rng = np.random.default_rng(seed)
    bits = 8 * np.dtype(dtype).itemsize
    end_bit = min(begin_bit + width, bits)
    high = 5 if few else 2**bits
    keys = (rng.integers(0, high, (segments, n), dtype=np.uint64) << begin_bit * few).astype(dtype)
    values = rng.permutation(segments * n).astype(np.int32).reshape(segments, n)
    digits = (keys >> dtype(begin_bit)) & dtype(2 ** (end_bit - begin_bit) - 1)
    place = np.argsort(digits, axis=1, kind="stable")
    sorted_keys, sorted_values = _emulated.sort_pairs(
        keys.ravel(), values.ravel(), segments, begin_bit, end_bit
    )
    np.testing.assert_array_equal(sorted_keys, np.take_along_axis(keys, place, 1).ravel())
    np.testing.assert_array_equal(sorted_values, np.take_along_axis(values, place, 1).ravel())


@pytest.mark.parametrize("bits", [(-1, 8), (8, 8), (9, 8), (0, 33)])
def test_sort_pairs_refuses_bits_that_are_not_there(bits):
    keys = np.zeros(3, dtype=np.uint32)
    with pytest.raises(RuntimeError, match="^cudaErrorInvalidValue$"):
        _emulated.sort_pairs(keys, np.zeros(3, dtype=np.int32), 1, *bits)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("n", [0, 1, 255, 1000])
def test_sums_are_of_64_bits(dtype, n):
    values = np.random.default_rng(n).integers(2**30, 2**31, n).astype(dtype)
    inclusive, exclusive = _emulated.sums(values)
    expected = values.cumsum(dtype=np.int64)
    np.testing.assert_array_equal(inclusive, expected)
    np.testing.assert_array_equal(exclusive, expected - values)
