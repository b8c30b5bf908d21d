"""CUDA kernels as nvcc compiled them, run by the PTX interpreter: == the CPU, and no mistake.

`make check-ptx` builds the module `_interpreted` and runs this file, in one process, because the
last test looks at what all others have executed. README.md in this folder says what is checked.
"""

import warnings

import _interpreted
import numpy as np
import pytest
import torch
from interpreted import MODULE, Interpreter, adopted_address, changed, device_of, kernels_named

import lcodec_ext
import test_cuda_engine as engines
import test_cuda_kernels as tables
import test_curvature_kernels as curvature
import test_emulation as emulation
import test_permutation as permutations
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext.curvature import kernels
from test_emulation import (  # noqa: F401
    order,
    test_arithmetic_and_atomics,
    test_compaction_by_votes,
    test_every_thread_runs,
    test_right_kernels,
    test_warp_operations,
    test_what_a_gpu_refuses,
)

DTYPES = [np.float32, np.float64]
TORCH_DTYPES = [torch.float32, torch.float64, torch.bfloat16]


RACE = "(reads|writes) what another thread (reads|writes)|reads what was not written"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Tests of the emulator test the interpreter here, and a mistake ends with its test."""
    monkeypatch.setattr(emulation, "_emulated", _interpreted)
    monkeypatch.setattr(emulation, "Bug", _interpreted.Bug)
    yield
    _interpreted.configure("forward")
    _interpreted.reset()


@pytest.fixture(params=[("forward", 0), ("reversed", 0), ("shuffled", 1)], ids=lambda o: o[0])
def device(request):
    one = Interpreter(*request.param)
    one.start()
    yield one
    one.finish()
    assert _interpreted.allocated_bytes() == 0


@pytest.fixture
def forward():
    return Interpreter("forward", 0)


@pytest.fixture
def on_tensors(monkeypatch):
    """The package's functions of CUDA tensors take CPU tensors."""
    monkeypatch.setattr(torch.Tensor, "data_ptr", adopted_address)
    monkeypatch.setattr(kernels, "device_of", device_of)
    return {"backend": cuda_on_cpu(MODULE)}


# ------------------------------------------------------------------------------------------------
# Mistakes are seen: in kernels of our own


@pytest.mark.parametrize(
    ("case", "bug", "message"),
    [
        ("sum", "no_barrier", RACE),
        ("sum", "divergent_barrier", r"bar\.sync 0: waits for thread \(.*\), which has ended"),
        ("sum", "early_exit", r"bar\.sync 0: waits for thread \(.*\), which has ended"),
        ("sum", "uninitialised", "reads what was not written"),
        ("transpose", "no_barrier", RACE),
        ("nearest", "no_barrier", RACE),
        ("scan", "no_barrier", RACE),
        ("scan", "wrong_mask", r"mask 0xffffffff for thread \(100, 0, 0\), which has ended"),
        ("scan", "partial_warp", r"mask 0xffffffff for lane 4, which does not exist"),
        ("scan", "foreign_mask", "is not in its own mask 0x0000ffff"),
        ("scan", "outside_lane", "reads from lane 31, which is not in the mask 0x7fffffff"),
        ("histogram", "no_barrier", RACE),
        ("histogram", "uninitialised", "reads what was not written"),
        ("histogram", "overrun", "out of bounds"),
    ],
)
def test_mistakes_are_named(case, bug, message):
    expected, run = getattr(emulation, f"case_{case}")()
    place = rf"^kernel \w*{case}_kernel\w*, block \(\d+, .*, thread \(\d+, .*selftest\.cu:\d+, "
    with pytest.raises(RuntimeError, match=f"{place}.*({message})"):
        run(getattr(_interpreted.Bug, bug))
    with pytest.raises(RuntimeError, match=message):  # it stays, as on a device
        run(_interpreted.Bug.none)
    _interpreted.reset()
    np.testing.assert_array_equal(run(_interpreted.Bug.none), expected)


# ------------------------------------------------------------------------------------------------
# Mistakes are seen: put into the PTX of the package's kernels


def step(device, n=150):
    """Two steps of an engine."""
    rng = np.random.default_rng(3)
    X = engines.mixed(rng, n, 5).astype(np.float32)
    R, _ = engines.ranks(rng.integers(0, 40, n))
    engines.assert_scores_equal_cpu(device, X, R, [1, 4])


@pytest.mark.parametrize(
    ("kernel", "pattern", "replacement", "message"),
    [
        ("scan_kernelIfLb1", r"bar\.sync\s+0;", "", RACE),
        ("lists_kernelIf", r"bar\.sync\s+0;", "", RACE),
        ("longest_run_kernelIf", r"bar\.sync\s+0;", "", RACE),
        ("longest_run_kernelIf", r"(bar\.sync\s+0;)", r"@%p1 \1", "which (has ended|waits at an)"),
        ("rank_keys_kernel", r"setp\.ge\.s64", "setp.gt.s64", "ld.global.*: out of bounds"),
        ("column_keys_kernelIf", r"(ld\.global\.f32.*)\];", r"\1+2];", "misaligned address, 2 b"),
        ("scan_kernelIfLb1", r"(shfl\.sync\.idx.*), (\S+);", r"\1, 2;", "not in its own mask 0x0"),
        ("gather_kernel", r"add\.s64", "fma.rn.f16", "does not know the instruction fma.rn.f16"),
        ("gather_kernel", r"\[%rd(\d+)\];", r"[%rd\1+8000000000];", "out of bounds of all device"),
    ],
)
def test_seeded_mistakes_are_seen(kernel, pattern, replacement, message, forward):
    with pytest.raises(RuntimeError, match=message), changed(kernel, pattern, replacement):
        step(forward)
    _interpreted.reset()
    step(forward)


def test_a_wrong_result_is_seen(forward):
    """Where all accesses are right, the CPU's results tell."""
    wrong = changed("scan_kernelIfLb1", r"sub\.rn\.f32", "add.rn.f32")
    with wrong, pytest.raises(AssertionError, match="not equal"):
        step(forward)


def test_launches_have_limits(forward):
    grid, block, most = (1, 1, 1), (32, 1, 1), 227 * 1024
    assert _interpreted.count_threads(grid, block, shared_bytes=most) == 32
    with pytest.raises(RuntimeError, match="^cudaErrorInvalidValue$"):
        _interpreted.count_threads(grid, block, shared_bytes=most + 1)
    smaller = changed("gather_kernel", r"\.maxntid 256", ".maxntid 128")
    with smaller, pytest.raises(RuntimeError, match="gather failed: invalid configuration arg"):
        step(forward)


# ------------------------------------------------------------------------------------------------
# FOCI


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "ties"),
    [
        (engines.continuous, "average"),
        (engines.mixed, "random"),
        (engines.binary, "average"),
        (engines.copies, "first"),
    ],
)
def test_steps(shape, ties, dtype, rng):
    one = Interpreter("shuffled", 1)
    one.start()
    R, _ = engines.ranks(rng.integers(0, 40, 150))
    engines.assert_steps_equal(one, shape(rng, 150, 5).astype(dtype), R, [1, 4, 0], ties, seed=7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [500, 1800])
def test_larger_tables(n, dtype, forward, rng):
    """More shared memory than is granted unasked, or than there is; sorts over several tiles."""
    X = engines.mixed(rng, n, 4).astype(dtype)
    X[::211] *= 50  # few rows, far from all others: their lists end before their neighbours
    X[:, 3] = rng.standard_cauchy(n).round(1)
    R, _ = engines.ranks(rng.integers(0, 3, n))  # classes
    engines.assert_scores_equal_cpu(forward, X, R, [1, 0], "random")


def test_lists_end_while_the_tile_is_in_shared_memory(forward, rng):
    engines.test_lists_end_while_the_tile_is_in_shared_memory(forward, "random", rng)


def test_more_columns_than_a_tile(forward, rng):
    engines.test_awkward_numbers_of_columns(forward, 33, rng)


def test_more_selected_columns_than_are_held(forward, rng):
    engines.test_more_selected_columns_than_are_held(forward, rng)


@pytest.mark.parametrize("p", [5, 33])
def test_leaders(p, forward, rng):
    engines.test_leaders(forward, p, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", engines.TIES)
def test_functions(ties, dtype, on_tensors, rng):
    """Validation, memory and the loop of FOCI around the kernels."""
    X = torch.from_numpy(engines.mixed(rng, 70, 6).astype(dtype))
    y = X[:, 0] * X[:, 3] + torch.from_numpy(rng.integers(0, 3, 70))
    options = {"ties": ties, "seed": 4}
    for call in (
        lambda where: lcodec_ext.foci(X, y, stop=False, max_features=4, **options, **where),
        lambda where: lcodec_ext.codec(y, X[:, :2], X[:, 2:4], **options, **where),
        lambda where: [a.tolist() for a in lcodec_ext.nearest_neighbors(X, ties="all", **where)],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties
            assert str(call(on_tensors)) == str(call({"backend": "cpu"}))


# ------------------------------------------------------------------------------------------------
# Neighbours, statistics of columns, permutations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", tables.TIES)
@pytest.mark.parametrize("p", [3, 129])
def test_neighbors(p, ties, dtype, forward, rng):
    tables.test_neighbors_in_scaled_columns(forward, rng, dtype, ties, p)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # is among the cases
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", tables.TIES)
def test_neighbors_of_awkward_tables(ties, dtype, device):
    for shape, n, p in [(tables.binary, 2, 2), (tables.overflow, 33, 1), (tables.outlier, 260, 5)]:
        expected = tables.expected_neighbors(shape, n, p, dtype, ties)
        tables.check_neighbors(device, tables.table(shape, n, p, dtype), ties, expected)


def test_one_neighbor_is_counted(forward):
    tables.test_one_neighbor_is_counted_without_a_look_at_the_columns(forward, "first")


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_columns(dtype, forward):
    for shape, n, p in [
        (tables.continuous, 2, 1), (tables.denormals, 65, 9), (tables.offset, 1089, 11),
        (tables.continuous, 2, 2**14),
    ]:  # fmt: skip
        tables.check_columns(forward, tables.table(shape, n, p, dtype))


@pytest.mark.parametrize("n", [3, 300])
def test_sums_under_permutations(n, device, rng):
    permutations.test_cuda_sums_equal_the_cpus(rng, device, n)


def test_the_probe():
    assert "CUDA is usable" in _interpreted.probe()


# ------------------------------------------------------------------------------------------------
# Curvature


class OnInterpreter(curvature.Emulated):
    """Where products of curvature run."""

    def run(self, function, *arguments, **options):
        _interpreted.configure(*self.order)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "CHUNK_BYTES", curvature.CHUNK_BYTES)
            return function(*arguments, **options)


WHERE = [OnInterpreter("forward", 0), OnInterpreter("shuffled", 1)]


@pytest.mark.parametrize("where", WHERE, ids=lambda where: where.name)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_products_have_the_bits_of_their_trees(dtype, where, on_tensors, rng):
    for shape in (curvature.SHAPES[1], curvature.SHAPES[2], curvature.SHAPES[6]):
        curvature.test_gram_product_has_the_bits_of_its_tree(where, shape, dtype, rng)
    for n, d, r in ((1, 1, 1), (33, 65, 3), (70, 17, 9)):
        curvature.test_softmax_product_has_the_bits_of_its_tree(where, n, d, r, dtype, rng)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_product_of_several_tiles(dtype, on_tensors, rng):
    curvature.test_gram_product_of_several_tiles(WHERE[0], dtype, rng)


@pytest.mark.parametrize("dtype", TORCH_DTYPES[:2])
def test_factored_gram(dtype, on_tensors, rng):
    for n, r, d in ((1, 1, 1), (5, 0, 2), (40, 40, 70)):
        curvature.test_factored_gram(WHERE[1], n, r, d, dtype, rng)


def test_wrong_segments_stay_within_the_arrays(on_tensors, rng):
    curvature.test_wrong_segments_stay_within_the_arrays(WHERE[0], rng)


# ------------------------------------------------------------------------------------------------
# What has been executed: of all kernels of the package, by all tests above


def test_every_kernel_was_run(capsys):
    """What is left are rare cases, such as sizes beyond 2^31, and parts for more rows at a time."""
    found = {row[0]: row[1:] for row in _interpreted.coverage()}
    lines, total, of = [], 0, 0
    for name in kernels_named(""):
        launches, executed, instructions, never = found[name]
        total, of = total + executed, of + instructions
        lines.append(f"{executed / instructions:6.1%} {launches:5d}  {name}  {' '.join(never)}")
        assert executed > instructions / 4, lines[-1]
    with capsys.disabled():
        print(f"\n{total / of:.1%} of the package's instructions were executed")
        print("share, launches, kernel, lines of the source that were not reached")
        print(*lines, sep="\n")
    assert total > 0.6 * of
