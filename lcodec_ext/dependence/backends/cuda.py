"""The backend on CUDA tensors: memory, streams and read-backs around the kernels.

It needs torch; `resolve` imports it when a CUDA tensor is in play. The kernels' interface is
``csrc/lcodec/cuda_engine.hpp``. Everything runs on the current stream of the tensors'
device, read at each call. A step of FOCI reads back once, and more where tied rows leave fractions
to be added up exactly, or many rows are alike.
"""

from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcodec_ext._torch.device import Device
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import (
    TIES,
    Backend,
    Engine,
    Leaders,
    Pairs,
    RowNumbers,
    Scores,
    Ties,
)
from lcodec_ext.dependence.backends.cpu import CpuBackend

SCRATCH = 1 << 28  # bytes; kScratch of the engine
_PAIRS = 1 << 22  # of rows, whose distances are in memory at a time
_MOST_LEADERS = 64  # kMostLeaders of the engine
_LEADER_WORDS = 1 + 3 * _MOST_LEADERS


class CudaColumns:
    """A table on its device, and each column's range; copied only if not contiguous."""

    def __init__(self, X: torch.Tensor, device: Device) -> None:
        self.values = X.contiguous()
        self.device = device

    @cached_property
    def _statistics(self) -> NDArray[np.float64]:
        """Smallest, largest and standard deviation of every column: one read-back, when asked."""
        X, device = self.values, self.device
        n, p = X.shape
        extremes = X.new_empty((2, p))
        deviation = X.new_empty(p, dtype=torch.float64)
        with device.guard():
            given = {
                "dtype": _dtype_name(X),
                "x": X.data_ptr(),
                "n": n,
                "p": p,
                "low": extremes[0].data_ptr(),
                "high": extremes[1].data_ptr(),
                "deviation": deviation.data_ptr(),
            }
            device.module.column_statistics(given, device.stream())
            return torch.cat([extremes.double(), deviation[None]]).cpu().numpy()

    @property
    def low(self) -> NDArray:
        return self._statistics[0].astype(_dtype_name(self.values))

    @property
    def high(self) -> NDArray:
        return self._statistics[1].astype(_dtype_name(self.values))

    def standard_deviations(self) -> NDArray[np.float64]:
        return self._statistics[2]

    def take(self, columns: list[int]) -> torch.Tensor:
        return self.values[:, columns]

    def put(self, column: int, values: NDArray) -> bool:
        """See `Columns`; an engine sorts all columns when it is made."""
        self.values[:, column] = torch.from_numpy(values).to(self.values.device)
        return False


class CudaEngine(Engine):
    """The kernels' engine. Costs are in ``cuda_engine.hpp``.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        If the device has no room for the least workspace.
    RuntimeError
        If a kernel fails; it is named.
    """

    piece = 1 << 62  # a step is short, and scores every column

    def __init__(
        self, columns: CudaColumns, factors: Any, R: torch.Tensor, ties: Ties, seed: int
    ) -> None:
        X, self._device = columns.values, columns.device
        n, self._p = X.shape
        module = self._device.module
        make = module.EngineFloat if X.dtype == torch.float32 else module.EngineDouble
        with self._device.guard():
            factor = torch.as_tensor(factors, dtype=X.dtype, device=X.device).contiguous()
            rank = R.to(torch.int32).contiguous()
            workspace, scratch = _workspace(make, X)
            self._held = (X, factor, rank, workspace)  # the engine keeps their addresses
            given = {
                "x": X.data_ptr(),
                "n": n,
                "p": self._p,
                "factor": factor.data_ptr(),
                "rank": rank.data_ptr(),
                "ties": TIES.index(ties),
                "seed": seed,
                "workspace": workspace.data_ptr(),
                "scratch": scratch,
            }
            self._engine = make(given)
            self._engine.start(self._device.stream())

    def select(self, column: int) -> None:
        with self._device.guard():
            self._engine.select(column, self._device.stream())

    def row_sums(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        X = self._held[0]
        sums, counts = (X.new_empty(len(X), dtype=torch.int64) for _ in range(2))
        with self._device.guard():
            self._engine.row_sums(column, sums.data_ptr(), counts.data_ptr(), self._device.stream())
        return sums, counts

    def score_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Engine`; on the device, and nothing waits for it."""
        X = self._held[0]
        whole, fraction = (X.new_empty(self._p, dtype=torch.int64) for _ in range(2))
        with self._device.guard():
            self._engine.score(whole.data_ptr(), fraction.data_ptr(), self._device.stream())
        return whole, fraction

    def exact_sum(self, column: int) -> Fraction:
        sums, counts = self.row_sums(column)
        totals = sums.new_zeros(len(sums) + 1).index_add_(0, counts, sums)  # up to 10^18
        used = totals.nonzero()[:, 0]
        used, of_used = torch.stack([used, totals[used]]).cpu().numpy()
        return exact.sum_of_ratios(of_used.tolist(), used.tolist())

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        return _read(columns, *self.score_all())

    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        """See `Engine`; found on the device. If there are more than 64, all sums are read back."""
        X = self._held[0]
        whole, fraction = self.score_all()
        mask = np.zeros(self._p, dtype=np.uint8)
        mask[columns] = 1
        with self._device.guard():
            candidate = torch.from_numpy(mask).to(X.device)
            out = X.new_empty(_LEADER_WORDS, dtype=torch.int64)
            self._engine.leaders(
                whole.data_ptr(), fraction.data_ptr(), candidate.data_ptr(), out.data_ptr(),
                self._device.stream(),
            )  # fmt: skip
            read = out.cpu().numpy()
        count = int(read[0])
        if count > _MOST_LEADERS:
            return exact.contenders(columns, *_read(columns, whole, fraction))
        found, *sums = read[1:].reshape(3, _MOST_LEADERS)[:, :count]
        return found, sums[0], sums[1]


class CudaBackend(Backend):
    """CUDA tensors, computed on where they lie."""

    tensors = True

    def __init__(self, device: Device) -> None:
        self._device = device

    def lay_out(self, X: torch.Tensor) -> CudaColumns:
        return CudaColumns(X, self._device)

    def engine(
        self, columns: CudaColumns, factors: Any, R: torch.Tensor, ties: Ties, seed: int
    ) -> CudaEngine:
        return CudaEngine(columns, factors, R, ties, seed)

    def nearest(
        self, columns: CudaColumns, ties: Ties, seed: int, factors: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        X, device = columns.values, columns.device
        n, p = X.shape
        with device.guard():
            transposed = X.t().contiguous()
            scale = X.new_empty(0)
            if factors is not None:
                scale = torch.as_tensor(factors, dtype=X.dtype, device=X.device).contiguous()
            count = X.new_ones(n, dtype=torch.int64)

            def run(offset: int, indices: int) -> None:
                given = {
                    "dtype": _dtype_name(X),
                    "columns": transposed.data_ptr(),
                    "factor": 0 if factors is None else scale.data_ptr(),
                    "n": n,
                    "p": p,
                    "ties": TIES.index(ties),
                    "seed": seed,
                    "offset": offset,
                    "count": count.data_ptr(),
                    "indices": indices,
                }
                device.module.neighbors(given, device.stream())

            if ties == "average":  # otherwise each row uses one
                run(0, 0)
            indptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
            total = int(indptr[-1]) if ties == "average" else n
            indices = X.new_empty(total, dtype=torch.int64)
            run(indptr.data_ptr(), indices.data_ptr())
        return indptr, indices

    def permuted_sums(
        self,
        pairs: Pairs,
        R: torch.Tensor,
        start: RowNumbers | None,
        seed: int,
        count: int,
        first: int = 0,
    ) -> NDArray[np.int64]:
        """See `Backend`; the pairs go to the device, and the sums come back."""
        device, module, n = self._device, self._device.module, len(R)
        with device.guard():
            rank = R.to(torch.int32).contiguous()
            ordered = rank.sort(stable=True)  # places are used where there are groups
            place = torch.empty_like(rank)
            place[ordered.indices] = torch.arange(n, dtype=torch.int32, device=R.device)
            held = {name: torch.from_numpy(part).to(R.device) for name, part in _parts(pairs)}
            held |= {"rank": rank, "sorted": ordered.values.contiguous(), "place": place}
            if start is not None:
                held["start"] = torch.from_numpy(start).to(R.device)
            sums = rank.new_empty((count, len(pairs.begin) - 1), dtype=torch.int64)
            size = int(module.permuted_sums_bytes(n, len(pairs.size), count))
            workspace = rank.new_empty(size, dtype=torch.uint8)
            addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
            given = {
                "n": n,
                "start": 0,
                "owner": 0,
                "segments": sums.shape[1],
                "labelings": len(pairs.label),
                "groups": len(pairs.size),
                "seed": seed,
                "first": first,
                "count": count,
                "sum": sums.data_ptr(),
                "workspace": workspace.data_ptr(),
            }
            module.permuted_sums(given | addresses, device.stream())
            return sums.cpu().numpy()

    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> NDArray:
        """See `Backend`; drawn on the host."""
        return CpuBackend().permutations(n, start, seed, first, count)

    def nearest_minima(
        self, columns: CudaColumns, factors: Any, used: list[int], R: torch.Tensor, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """See `Backend`; by torch, all n^2 distances in blocks of rows, in a column's time each."""
        X = columns.values
        n = len(X)
        found = X.new_empty((3, n), dtype=torch.int64)
        with self._device.guard():
            factor = torch.as_tensor(factors, dtype=X.dtype, device=X.device)
            for rows in torch.split(torch.arange(n, device=X.device), max(1, _PAIRS // n)):
                distance = X.new_zeros((len(rows), n))
                for f in used:
                    scaled = (X[rows, f][:, None] - X[:, f]) * factor[f]
                    distance += scaled * scaled  # rounded by itself: no kernel has both
                distance[torch.arange(len(rows), device=X.device), rows] = torch.inf
                far = distance.topk(k, dim=1, largest=False).values[:, -1:]
                nearer, tied = distance < far, distance == far
                minima = torch.minimum(R[rows][:, None], R)
                count = tied.sum(dim=1)
                of_tied = (k - nearer.sum(dim=1)) * (minima * tied).sum(dim=1)
                found[0, rows] = (minima * nearer).sum(dim=1) + of_tied // count
                found[1, rows] = of_tied % count
                found[2, rows] = count
            whole, rest, counts = found.cpu().numpy()
        return whole, rest, counts

    def ranks(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.contiguous()
        if y.dtype == torch.uint64:  # torch cannot sort it: int64 in the same order
            y = y.view(torch.int64) ^ -(2**63)
        ascending = y.sort().values
        below = torch.searchsorted(ascending, y, right=True)
        return below, len(y) - torch.searchsorted(ascending, y)


def _parts(pairs: Pairs) -> list[tuple[str, NDArray]]:
    """The arrays of pairs by name; without the owners where every pair's row is its number."""
    parts = pairs._asdict()
    return [(name, parts[name]) for name in parts if name != "owner" or len(pairs.owner)]


def _dtype_name(X: torch.Tensor) -> str:
    return "float32" if X.dtype == torch.float32 else "float64"


def _read(columns: NDArray[np.int64], whole: torch.Tensor, fraction: torch.Tensor) -> Scores:
    read = torch.stack([whole, fraction]).cpu().numpy()
    return read[0, columns], read[1, columns]


def _workspace(make: Any, X: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Memory for an engine and its scratch: less of it where the device is short of room."""
    n, p = X.shape
    least = int(make.least_scratch(n))
    scratch = max(SCRATCH, least)
    while True:
        size = int(make.workspace_bytes(n, p, scratch))
        try:
            return X.new_empty(size, dtype=torch.uint8), scratch
        except torch.cuda.OutOfMemoryError as error:
            if scratch == least:
                raise torch.cuda.OutOfMemoryError(
                    f"{n:,} rows and {p:,} columns need a workspace of at least {size:,} bytes on "
                    f"device '{X.device}', which has no room for it: free memory there, pass "
                    f"fewer rows or columns or float32, or compute on the CPU with .cpu() ({error})"
                ) from None
        scratch = max(scratch // 2, least)
