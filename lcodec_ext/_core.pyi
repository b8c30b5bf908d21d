"""Types of the compiled module (csrc/bindings); its submodules are written as classes here."""

from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    flags: str
    sanitize: str
    simd_compiled: list[str]
    simd_supported: list[str]
    hardware_threads: int
    cuda_version: str
    cuda_architectures: str

def build_info() -> _BuildInfo: ...
def cuda_probe() -> tuple[bool, str]: ...

_F = TypeVar("_F", np.float32, np.float64)
_I64 = NDArray[np.int64]
_I32 = NDArray[np.int32]

class _Engine:
    def select(self, column: int) -> None: ...
    def score(
        self, candidates: _I64, floor: int, level: str, threads: int
    ) -> tuple[_I64, _I64]: ...
    def row_sums(self, candidate: int, level: str, threads: int) -> tuple[_I64, _I64]: ...
    def sums_by_count(
        self, candidate: int, level: str, threads: int
    ) -> tuple[list[int], list[int]]: ...
    # With LCODEC_INSTRUMENTS: distances with a candidate; the vector instructions that these take
    # at the least; those of scans that go on with all candidates until the last one stops;
    # thread-seconds.
    @property
    def scanned(self) -> tuple[int, int, int, float]: ...

class dependence:
    class EngineFloat(_Engine):
        def __init__(
            self,
            x: NDArray[np.float32],
            factor: NDArray[np.float32],
            rank: NDArray[np.int32],
            ties: int,
            seed: int,
            sorted_rows: NDArray[np.int32],
        ) -> None: ...

    class EngineDouble(_Engine):
        def __init__(
            self,
            x: NDArray[np.float64],
            factor: NDArray[np.float64],
            rank: NDArray[np.int32],
            ties: int,
            seed: int,
            sorted_rows: NDArray[np.int32],
        ) -> None: ...

    @staticmethod
    def lay_out(
        x: NDArray[_F], level: str, threads: int
    ) -> tuple[NDArray[_F], NDArray[_F], NDArray[_F]]: ...
    @staticmethod
    def sort_columns(columns: NDArray[_F], level: str, threads: int) -> _I32: ...
    @staticmethod
    def standard_deviations(
        columns: NDArray[_F], level: str, threads: int
    ) -> NDArray[np.float64]: ...
    @staticmethod
    def neighbors(
        x: NDArray[_F], factor: NDArray[_F], ties: int, seed: int, level: str, threads: int
    ) -> tuple[_I64, _I64]: ...
    @staticmethod
    def permuted_sums(
        rank: _I32,
        start: _I32,
        begin: _I64,
        owner: _I32,
        other: _I32,
        label: _I32,
        size: _I32,
        segment: _I32,
        seed: int,
        first: int,
        count: int,
        level: str,
        threads: int,
    ) -> _I64: ...
    @staticmethod
    def permutations(
        n: int, start: _I32, seed: int, first: int, count: int, level: str, threads: int
    ) -> _I32: ...
    @staticmethod
    def nearest_minima(
        x: NDArray[_F],
        factor: NDArray[_F],
        rank: NDArray[np.int32],
        k: int,
        level: str,
        threads: int,
    ) -> tuple[_I64, _I64, _I64]: ...
    # The fields of backends.path_sums.PathSums of all x, and of RankSums of all y.
    @staticmethod
    def chatterjee(
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        ties: int,
        seed: int,
        level: str,
        threads: int,
    ) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]] | None: ...
    # With LCODEC_INSTRUMENTS.
    @staticmethod
    def bare_permutations(rank: _I32, other: _I32, seed: int, count: int) -> int: ...
    @staticmethod
    def saturate(level: str, rounds: int) -> int: ...
    @staticmethod
    def throw_in_a_helper(level: str, threads: int) -> None: ...
    @staticmethod
    def helped_at_once(calls: int) -> int: ...

# Matrices are addresses, 0 for none: NumPy has no bfloat16.
class RowsProduct(TypedDict):
    dtype: str
    x: int
    n: int
    d: int
    stride: int
    segments: int
    count: int
    size: int
    p: int
    weight: int
    v: int
    m: int
    damping: float
    out: int

class FactoredGram(TypedDict):
    dtype: str
    delta: int
    delta_stride: int
    r: int
    a: int
    a_stride: int
    d: int
    n: int
    k: int

class curvature:
    @staticmethod
    def masked_gram_product(given: RowsProduct, level: str, threads: int) -> None: ...
    @staticmethod
    def softmax_rows_product(given: RowsProduct, level: str, threads: int) -> None: ...
    @staticmethod
    def factored_gram(given: FactoredGram, level: str, threads: int) -> None: ...

# Where CUDA was built. Arrays and streams are addresses, 0 for none.
class Statistics(TypedDict):
    dtype: str
    x: int
    n: int
    p: int
    low: int
    high: int
    deviation: int

class Neighbors(TypedDict):
    dtype: str
    columns: int
    factor: int
    n: int
    p: int
    ties: int
    seed: int
    offset: int
    count: int
    indices: int

class Problem(TypedDict):
    x: int
    n: int
    p: int
    factor: int
    rank: int
    ties: int
    seed: int
    workspace: int
    scratch: int

class _CudaEngine:
    def __init__(self, given: Problem) -> None: ...
    @staticmethod
    def workspace_bytes(n: int, p: int, scratch: int) -> int: ...
    @staticmethod
    def least_scratch(n: int) -> int: ...
    def start(self, stream: int) -> None: ...
    def select(self, column: int, stream: int) -> None: ...
    def score(self, whole: int, fraction: int, stream: int) -> None: ...
    def leaders(self, whole: int, fraction: int, candidate: int, out: int, stream: int) -> None: ...
    def row_sums(self, column: int, sum: int, count: int, stream: int) -> None: ...

class Permuted(TypedDict):
    n: int
    rank: int
    start: int
    segments: int
    begin: int
    owner: int
    other: int
    labelings: int
    label: int
    groups: int
    size: int
    segment: int
    sorted: int
    place: int
    seed: int
    first: int
    count: int
    sum: int
    workspace: int

class cuda:
    class EngineFloat(_CudaEngine): ...
    class EngineDouble(_CudaEngine): ...

    @staticmethod
    def column_statistics(given: Statistics, stream: int) -> None: ...
    @staticmethod
    def neighbors(given: Neighbors, stream: int) -> None: ...
    @staticmethod
    def permuted_sums_bytes(n: int, groups: int, count: int) -> int: ...
    @staticmethod
    def permuted_sums(given: Permuted, stream: int) -> None: ...

    CHUNK_BYTES: int

    @staticmethod
    def row_groups(n: int, size: int, itemsize: int, chunk_bytes: int) -> int: ...
    @staticmethod
    def rows_product_bytes(n: int, size: int, m: int, itemsize: int, chunk_bytes: int) -> int: ...
    @staticmethod
    def masked_gram_product(
        given: RowsProduct, workspace: int, chunk_bytes: int, stream: int
    ) -> None: ...
    @staticmethod
    def softmax_rows_product(
        given: RowsProduct, workspace: int, chunk_bytes: int, stream: int
    ) -> None: ...
    @staticmethod
    def factored_gram(given: FactoredGram, stream: int) -> None: ...
