"""The benchmark cases on a GPU, their counted floors, and small calls for a checker.

`python benchmarks/run.py --device cuda` runs them. The package and the published algorithm get
tensors on the device; the package's CPU engine gets NumPy arrays and must give the same bits.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import accelerator
import cases
import environment
import numpy as np
from cases import Case, Claim, Data, Peer, Size
from numpy.typing import NDArray

import lcodec_ext
from lcodec_ext.curvature import kernels, reference

WARP = 32
# Instructions of a scan for one neighbour and a warp of candidates, as nvcc 13.0 compiles the loop
# for compute capability 9.0: 153 for eight neighbours. Starting and ending a scan is not counted.
SCAN_INSTRUCTIONS = 19
COUNTED_COLUMNS = 2000


# --------------------------------------------------------------------------------------------
# Peers


def by_cpu(ours: Callable[[Data, str], Any], all_cores: bool = False) -> Peer:
    """The package on the same data in the CPU's memory, on the run's threads or all cores."""

    def run(data: Data, threads: int) -> Any:
        with environment.cpu_threads(environment.cores() if all_cores else threads):
            return ours(data, "cpu")

    return Peer(f"lcodec_ext on the CPU{', all cores' * all_cores}", run, "identical")


def on_device(peer: Peer) -> Peer:
    return replace(peer, name=f"{peer.name} on the GPU", on_device=True)


# --------------------------------------------------------------------------------------------
# Floors


def floor_of(bytes_moved: float, instructions: float, seconds: float) -> dict[str, float]:
    """Return the least time that the counted work takes, and the measured time divided by it.

    instructions: warp instructions of the inner loops, bounded by the schedulers that issue them.
    """
    rates = accelerator.rates()
    floor = bytes_moved / rates.copy_bytes_per_second
    if rates.warp_instructions_per_second:
        floor = max(floor, instructions / rates.warp_instructions_per_second)
    return {
        "milliseconds": float(f"{seconds * 1e3:.4g}"),
        "floor_bytes": bytes_moved,
        "floor_warp_instructions": float(f"{instructions:.4g}"),
        "floor_milliseconds": float(f"{floor * 1e3:.4g}"),
        "time_over_floor": float(f"{seconds / floor:.4g}"),
    }


def foci_work(data: Data) -> tuple[float, float]:
    """Bytes: every column once per step. Instructions: those of the scans, without sorting.

    The CPU engine counts the neighbours, on the first columns without standardisation, in its tiles
    of at most 16 candidates (AVX2, float32). A warp of 32 must scan at least as far.
    """
    p = data["X"].shape[1]
    part = cases.first_columns(data, min(p, COUNTED_COLUMNS))
    level = "avx2" if "avx2" in lcodec_ext.build_info()["simd_supported"] else "baseline"
    simd = mock.patch.dict(os.environ, LCODEC_SIMD=level)
    with environment.cpu_threads(environment.cores()), simd:
        distances = cases.scanned(part, floor=None)[0] * p / part["X"].shape[1]
    return data["steps"] * data["X"].nbytes, distances / WARP * SCAN_INSTRUCTIONS


def search_work(n: int, columns: int, itemsize: int) -> tuple[float, float]:
    """An exhaustive search: three instructions a column and pair, and two to keep the nearest."""
    return n * columns * itemsize, n * n / WARP * (3 * columns + 2)


def foci_floor(name: str, size: Size, seconds: float) -> dict[str, float]:
    return floor_of(*foci_work(CASES[name].data(size)), seconds)


def codec_floor(size: Size, seconds: float) -> dict[str, float]:
    """Two searches: in the columns of x, and in those of x and z."""
    work = np.add(search_work(size["n"], 2, 4), search_work(size["n"], 3, 4))
    return floor_of(*work.tolist(), seconds)


def neighbors_floor(size: Size, seconds: float) -> dict[str, float]:
    return floor_of(*search_work(size["n"], size["d"], 4), seconds)


# --------------------------------------------------------------------------------------------
# The cases: data and comparisons are those of the CPU's


def from_cpu(name: str, like: str, **changes: Any) -> Case:
    return replace(cases.CASES[like], name=name, sweep=None, claims=(), **changes)


def published(like: str, **options: Any) -> Peer:
    (peer,) = (p for p in cases.CASES[like].peers if p.name == "published algorithm")
    return on_device(replace(peer, **options))


_ALL = (
    from_cpu(
        "gpu_foci_wide",
        "foci_wide",
        full=({"n": 1000, "p": 40_000, "steps": 10},),
        quick=({"n": 200, "p": 500, "steps": 4},),
        peers=(
            published("foci_wide", part=100),
            by_cpu(cases.raw_foci),
            by_cpu(cases.raw_foci, all_cores=True),
        ),
        metrics=partial(foci_floor, "gpu_foci_wide"),
    ),
    from_cpu(
        "gpu_foci_large",
        "foci_wide",
        full=({"n": 4096, "p": 40_000, "steps": 4},),
        quick=({"n": 500, "p": 500, "steps": 2},),
        peers=(
            published("foci_wide", part=40),
            by_cpu(cases.raw_foci),
            by_cpu(cases.raw_foci, all_cores=True),
        ),
        metrics=partial(foci_floor, "gpu_foci_large"),
    ),
    from_cpu(
        "gpu_foci_binary",
        "foci_binary",
        peers=(by_cpu(cases.foci), by_cpu(cases.foci, all_cores=True)),
        metrics=partial(foci_floor, "gpu_foci_binary"),
    ),
    from_cpu(
        "gpu_codec",
        "codec",
        peers=(published("codec"), by_cpu(cases.codec)),
        metrics=codec_floor,
    ),
    from_cpu(
        "gpu_neighbors",
        "neighbors",
        peers=(published("neighbors"), by_cpu(cases.neighbors)),
        metrics=neighbors_floor,
    ),
)

_CLAIMS = {
    "gpu_foci_wide": (
        Claim("milliseconds", at_most=20),
        Claim("published algorithm on the GPU", at_least=1000),
    ),
    "gpu_foci_large": (Claim("lcodec_ext on the CPU", at_least=100),),
}

CASES = {case.name: replace(case, claims=_CLAIMS.get(case.name, ())) for case in _ALL}


# --------------------------------------------------------------------------------------------
# The first calls, and small calls for a checker

CHUNK_BYTES = 1 << 22  # of a piece of a matrix: enough that n = 2000 takes several


def outlying(rng: np.random.Generator, n: int, p: int) -> Data:
    """Columns in which a few rows lie far out: their lists end before their neighbours."""
    data = cases.continuous(rng, n, p)
    data["X"][:: n // 7] *= 50
    return data


def foci(data: Data, ties: str) -> Any:
    result = lcodec_ext.foci(data["X"], data["y"], ties=ties, seed=3, stop=False, max_features=3)
    return result.ordering, result.cumulative


def all_neighbors(data: Data) -> Any:
    found = lcodec_ext.nearest_neighbors(data["X"], ties="all")
    return tuple(accelerator.fetch(array) for array in found)


def permuted(data: Data) -> Any:
    found = lcodec_ext.codec_test(data["y"], data["X"][:, :3], n_permutations=99, seed=1)
    return found.pvalue, found.statistic


def table(data: Data, dtype: Any = np.float32) -> Data:
    return {"X": data["X"].astype(dtype), "y": data["y"]}


def kernel_calls(n: int, dtype: Any) -> Iterator[tuple[str, Callable[[Data], Any], Data]]:
    """Kernels of curvature; the reference forms the sums of CUDA's written tree."""
    rng = np.random.default_rng([cases.SEED, n])
    d, r = 137, 10
    segments = [(3, 40), (50, 87)]
    G, A = (rng.normal(size=(n, d)).astype(dtype) for _ in range(2))
    v = rng.normal(size=127).astype(dtype)
    P = rng.dirichlet(np.ones(r), size=n).astype(dtype)
    V = rng.normal(size=(r, d)).astype(dtype)

    def gram(data: Data) -> Any:
        if isinstance(data["G"], np.ndarray):
            tree = reference.CudaTree(data["G"].itemsize, CHUNK_BYTES)
            return reference.masked_gram_product(
                tree, data["G"], data["v"][None], segments, None, 0.0
            )[0]
        return on_gpu(kernels.masked_gram_product, data["G"], data["v"], segments)

    def softmax(data: Data) -> Any:
        if isinstance(data["A"], np.ndarray):
            tree = reference.CudaTree(data["A"].itemsize, CHUNK_BYTES)
            return reference.softmax_rows_product(tree, data["A"], data["P"], data["V"], None, 0.0)
        return on_gpu(kernels.softmax_rows_product, data["A"], data["P"], data["V"])

    def factored(data: Data) -> Any:
        if isinstance(data["A"], np.ndarray):
            return reference.factored_gram(data["P"], data["A"], cuda=True)
        return on_gpu(kernels.factored_gram, data["P"], data["A"])

    what = f"n = {n}, {np.dtype(dtype).name}"
    yield f"masked_gram_product, {what}", gram, {"G": G, "v": v}
    yield f"softmax_rows_product, {what}", softmax, {"A": A, "P": P, "V": V}
    yield f"factored_gram, {what}", factored, {"A": A, "P": P}


def on_gpu(kernel: Callable[..., Any], *arguments: Any) -> NDArray:
    with mock.patch.object(kernels.device_of(arguments[0]).module, "CHUNK_BYTES", CHUNK_BYTES):
        return accelerator.fetch(kernel(*arguments))


def first_calls() -> Iterator[tuple[str, Callable[[Data], Any], Data]]:
    """One call of each kind, at sizes with the scan's table in shared memory and outside of it."""
    rng = np.random.default_rng(cases.SEED)
    average = partial(foci, ties="average")
    yield "foci, n = 1500, float32", average, table(outlying(rng, 1500, 33))
    yield "foci, n = 2000, float64", average, table(cases.mixed(rng, 2000, 33), np.float64)
    for n, dtype in ((1500, np.float32), (2000, np.float64)):
        yield from kernel_calls(n, dtype)


def check_first_calls(device: str) -> int:
    """Say what CUDA's status is, and make the first calls; return how many there are."""
    print(f"status: {lcodec_ext.cuda_status()}", flush=True)
    return checked(first_calls(), device)


def small_calls() -> Iterator[tuple[str, Callable[[Data], Any], Data]]:
    """Calls that reach all kernels in both precisions, on data that a checker gets through.

    n = 150 is a multiple of no warp; n = 500 takes more shared memory than a kernel has unasked,
    n = 1800 more than a block can have, and its sorts go over several tiles.
    """
    rng = np.random.default_rng(cases.SEED)
    n, p = 150, 70
    tables = {
        "continuous": cases.continuous(rng, n, p),
        "mixed": cases.mixed(rng, n, p),
        "binary": cases.binary(rng, n, p),
    }
    tables["float64"] = tables["mixed"] | {"X": tables["mixed"]["X"].astype(np.float64)}
    for kind, data in tables.items():
        data = {key: data[key] for key in ("X", "y")}
        for ties in ("average", "random", "first"):
            yield f"foci, {kind}, ties={ties!r}", partial(foci, ties=ties), data
        yield f"nearest_neighbors, {kind}", all_neighbors, {"X": data["X"][:, :5].copy()}
    yield "codec", partial(cases.codec, backend="auto"), cases.triple(rng, n)
    for n in (500, 1500, 1800):
        yield f"foci, n = {n}", partial(foci, ties="average"), table(outlying(rng, n, 33))
    yield "codec_test", permuted, table(cases.continuous(rng, 150, 10))
    for dtype in (np.float32, np.float64):
        yield from kernel_calls(200, dtype)


def check_small_calls(device: str) -> int:
    """Make all small calls; return how many there are."""
    return checked(small_calls(), device)


def checked(calls: Iterator[tuple[str, Callable[[Data], Any], Data]], device: str) -> int:
    """Make calls; each must give the CPU's bits on the device. Return how many there are."""
    count = 0
    for name, call, data in calls:
        got, expected = call(accelerator.place(data, device)), call(data)
        assert cases.same_bits(got, expected), f"{name}: {got} != {expected}"
        count += 1
        print(f"{name}: same", flush=True)
    return count
