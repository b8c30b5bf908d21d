"""Types of the compiled module (csrc/bindings)."""

from typing import TypedDict, TypeVar

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

class _Engine:
    def select(self, column: int) -> None: ...
    def score(
        self, candidates: _I64, floor: int, level: str, threads: int
    ) -> tuple[_I64, _I64]: ...
    def row_sums(self, candidate: int, level: str, threads: int) -> tuple[_I64, _I64]: ...
    @property
    def scanned(self) -> tuple[int, int, int, float]: ...

class EngineFloat(_Engine):
    def __init__(
        self,
        x: NDArray[np.float32],
        factor: NDArray[np.float32],
        rank: NDArray[np.int32],
        ties: int,
        seed: int,
    ) -> None: ...

class EngineDouble(_Engine):
    def __init__(
        self,
        x: NDArray[np.float64],
        factor: NDArray[np.float64],
        rank: NDArray[np.int32],
        ties: int,
        seed: int,
    ) -> None: ...

def lay_out(
    x: NDArray[_F], level: str, threads: int
) -> tuple[NDArray[_F], NDArray[_F], NDArray[_F]]: ...
def standard_deviations(columns: NDArray[_F], level: str, threads: int) -> NDArray[np.float64]: ...
def neighbors(
    x: NDArray[_F], factor: NDArray[_F], ties: int, seed: int, level: str, threads: int
) -> tuple[_I64, _I64]: ...
def saturate(level: str, rounds: int) -> int: ...

# Matrices are addresses, 0 for none; NumPy has no bfloat16.
def masked_gram_product(
    dtype: str,
    g: int,
    n: int,
    stride: int,
    segments: int,
    count: int,
    size: int,
    weight: int,
    v: int,
    m: int,
    damping: float,
    out: int,
    level: str,
    threads: int,
) -> None: ...
def softmax_rows_product(
    dtype: str,
    a: int,
    n: int,
    stride: int,
    d: int,
    p: int,
    weight: int,
    v: int,
    m: int,
    damping: float,
    out: int,
    level: str,
    threads: int,
) -> None: ...
def factored_gram(
    dtype: str,
    delta: int,
    delta_stride: int,
    r: int,
    a: int,
    a_stride: int,
    d: int,
    n: int,
    k: int,
    level: str,
    threads: int,
) -> None: ...

# Where CUDA was built. Arrays and streams are addresses, 0 for none.
def cuda_column_statistics(
    dtype: str, x: int, n: int, p: int, low: int, high: int, deviation: int, stream: int
) -> None: ...
def cuda_neighbors(
    dtype: str,
    columns: int,
    n: int,
    p: int,
    ties: int,
    seed: int,
    offset: int,
    count: int,
    indices: int,
    stream: int,
) -> None: ...

CUDA_CHUNK_BYTES: int

def cuda_row_groups(n: int, size: int, itemsize: int, chunk_bytes: int) -> int: ...
def cuda_rows_product_bytes(n: int, size: int, m: int, itemsize: int, chunk_bytes: int) -> int: ...
def cuda_masked_gram_product(
    dtype: str,
    g: int,
    n: int,
    d: int,
    stride: int,
    segments: int,
    count: int,
    size: int,
    weight: int,
    v: int,
    m: int,
    damping: float,
    out: int,
    workspace: int,
    chunk_bytes: int,
    stream: int,
) -> None: ...
def cuda_softmax_rows_product(
    dtype: str,
    a: int,
    n: int,
    d: int,
    stride: int,
    segments: int,
    p: int,
    weight: int,
    v: int,
    m: int,
    damping: float,
    out: int,
    workspace: int,
    chunk_bytes: int,
    stream: int,
) -> None: ...
def cuda_factored_gram(
    dtype: str,
    delta: int,
    delta_stride: int,
    r: int,
    a: int,
    a_stride: int,
    d: int,
    n: int,
    k: int,
    stream: int,
) -> None: ...

class _CudaEngine:
    def __init__(
        self,
        x: int,
        n: int,
        p: int,
        factor: int,
        rank: int,
        ties: int,
        seed: int,
        workspace: int,
        scratch: int,
    ) -> None: ...
    @staticmethod
    def workspace_bytes(n: int, p: int, scratch: int) -> int: ...
    @staticmethod
    def least_scratch(n: int) -> int: ...
    def start(self, stream: int) -> None: ...
    def select(self, column: int, stream: int) -> None: ...
    def score(self, whole: int, fraction: int, stream: int) -> None: ...
    def leaders(self, whole: int, fraction: int, candidate: int, out: int, stream: int) -> None: ...
    def row_sums(self, column: int, sum: int, count: int, stream: int) -> None: ...

class CudaEngineFloat(_CudaEngine): ...
class CudaEngineDouble(_CudaEngine): ...
