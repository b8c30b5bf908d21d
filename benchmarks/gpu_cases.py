"""The benchmark cases on a GPU, their counted floors, and small calls for a checker.

`python benchmarks/run.py --device cuda` runs them. The package and the published algorithm get
tensors on the device; the package's CPU engine gets NumPy arrays and must give the same bits.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import accelerator
import cases
import environment
import numpy as np
from cases import Case, Claim, Data, Peer, Size

import lcodec_ext

WARP = 32
# Instructions of a scan for one neighbour and a warp of candidates, as nvcc 13.0 compiles the loop
# for compute capability 9.0: 153 for eight neighbours. Starting and ending a scan is not counted.
SCAN_INSTRUCTIONS = 19
COUNTED_COLUMNS = 2000


# --------------------------------------------------------------------------------------------
# Peers


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    with mock.patch.dict(os.environ, LCODEC_NUM_THREADS=str(count)):
        yield


def by_cpu(ours: Callable[[Data, str], Any], all_cores: bool = False) -> Peer:
    """The package on the same data in the CPU's memory, on the run's threads or all cores."""

    def run(data: Data, threads: int) -> Any:
        with cpu_threads(environment.cores() if all_cores else threads):
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
    with cpu_threads(environment.cores()), mock.patch.dict(os.environ, LCODEC_SIMD=level):
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
# Small calls


def small_calls() -> Iterator[tuple[str, Callable[[Data], Any], Data]]:
    """Calls that reach the kernels in both precisions, on data that a checker gets through."""
    rng = np.random.default_rng(cases.SEED)
    n, p = 150, 70  # neither is a multiple of a warp

    def foci(data: Data, ties: str) -> Any:
        result = lcodec_ext.foci(
            data["X"], data["y"], ties=ties, seed=3, stop=False, max_features=3
        )
        return result.ordering, result.cumulative

    def all_neighbors(data: Data) -> Any:
        found = lcodec_ext.nearest_neighbors(data["X"], ties="all")
        return tuple(accelerator.fetch(array) for array in found)

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


def check_small_calls(device: str) -> int:
    """Run all calls; each must give the CPU's bits on the device. Return how many there are."""
    count = 0
    for name, call, data in small_calls():
        got, expected = call(accelerator.place(data, device)), call(data)
        assert cases.same_bits(got, expected), f"{name}: {got} != {expected}"
        count += 1
        print(f"{name}: same", flush=True)
    return count
