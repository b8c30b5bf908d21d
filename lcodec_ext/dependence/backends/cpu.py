"""The backend on CPU threads with SIMD: the only caller of ``_core``'s CPU functions."""

from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lcodec_ext import _core
from lcodec_ext._threads import cpu_settings
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import (
    TIES,
    HostBackend,
    HostEngine,
    Pairs,
    RowNumbers,
    Scores,
    Ties,
)
from lcodec_ext.dependence.backends.path_sums import PathSums, RankSums

NO_BLOCKS = np.empty(0, dtype=np.int32)
NO_ORDER = np.empty((0, 0), dtype=np.int32)


class CpuColumns:
    """A table laid out by column; one whose columns lie one after the other stays where it is."""

    def __init__(self, X: NDArray) -> None:
        self._range: tuple[NDArray, NDArray] | None = None
        self.order = NO_ORDER  # rows of every column in the order of its values, once it is known
        if X.T.flags.c_contiguous:
            self.values = X.T
        else:
            rows = np.ascontiguousarray(X)
            self.values, low, high = _core.dependence.lay_out(rows, *self._settings)
            self._range = low, high

    @cached_property
    def _settings(self) -> tuple[str, int]:
        return cpu_settings()

    @property
    def low(self) -> NDArray:
        """Smallest value of every column."""
        return self._ranges()[0]

    @property
    def high(self) -> NDArray:
        """Largest value of every column."""
        return self._ranges()[1]

    def _ranges(self) -> tuple[NDArray, NDArray]:
        if self._range is None:
            self._range = self.values.min(axis=1), self.values.max(axis=1)
        return self._range

    def standard_deviations(self) -> NDArray[np.float64]:
        return _core.dependence.standard_deviations(self.values, *self._settings)

    def sort(self) -> None:
        """Find the order of every column, which must not change from then on."""
        self.order = _core.dependence.sort_columns(self.values, *cpu_settings())

    def take(self, columns: list[int]) -> NDArray:
        return self.values[columns].T

    def put(self, column: int, values: NDArray) -> bool:
        self.values[column] = values
        return True


class CpuEngine(HostEngine):
    """The compiled engine. Costs are in ``csrc/lcodec/engine.hpp``."""

    def __init__(
        self, columns: CpuColumns, factors: NDArray, R: NDArray[np.int64], ties: Ties, seed: int
    ) -> None:
        super().__init__(len(columns.values))
        self._settings = cpu_settings()
        single = columns.values.itemsize == 4
        make = _core.dependence.EngineFloat if single else _core.dependence.EngineDouble
        # Benchmarks read what it counts (in a build with LCODEC_INSTRUMENTS).
        self.compiled = make(
            columns.values, factors, R.astype(np.int32), TIES.index(ties), seed, columns.order
        )

    def select(self, column: int) -> None:
        super().select(column)
        self.compiled.select(column)

    def row_sums(self, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self.compiled.row_sums(column, *self._settings)

    def exact_sum(self, column: int) -> Fraction:
        return exact.sum_of_ratios(*self.compiled.sums_by_count(column, *self._settings))

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        wanted = -1 if floor is None else floor
        return self.compiled.score(columns.astype(np.int64, copy=False), wanted, *self._settings)


class CpuBackend(HostBackend):
    """NumPy and the compiled module; results depend neither on threads nor on SIMD level."""

    def lay_out(self, X: NDArray) -> CpuColumns:
        return CpuColumns(X)

    def share(self, columns: CpuColumns) -> None:
        columns.sort()

    def engine(
        self, columns: CpuColumns, factors: NDArray, R: NDArray[np.int64], ties: Ties, seed: int
    ) -> CpuEngine:
        return CpuEngine(columns, factors, R, ties, seed)

    def nearest(
        self, columns: CpuColumns, ties: Ties, seed: int, factors: NDArray | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        x = columns.values
        used = np.ones(len(x), dtype=x.dtype) if factors is None else factors
        return _core.dependence.neighbors(x, used, TIES.index(ties), seed, *cpu_settings())

    def permuted_sums(
        self,
        pairs: Pairs,
        R: NDArray[np.int64],
        start: RowNumbers | None,
        seed: int,
        count: int,
        first: int = 0,
    ) -> NDArray[np.int64]:
        blocks = NO_BLOCKS if start is None else start
        rank = R.astype(np.int32)
        drawn = seed, first, count
        return _core.dependence.permuted_sums(rank, blocks, *pairs, *drawn, *cpu_settings())

    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> RowNumbers:
        blocks = NO_BLOCKS if start is None else start
        return _core.dependence.permutations(n, blocks, seed, first, count, *cpu_settings())

    def nearest_minima(
        self,
        columns: CpuColumns,
        factors: NDArray,
        used: list[int],
        R: NDArray[np.int64],
        k: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        x = columns.values[used]
        return _core.dependence.nearest_minima(
            x, factors[used], R.astype(np.int32), k, *cpu_settings()
        )

    def ranks(self, y: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = y.argsort()
        ascending = y[order]
        below = np.empty(len(y), dtype=np.int64)
        above = np.empty(len(y), dtype=np.int64)
        below[order] = ascending.searchsorted(ascending, "right")  # in order, and so quick
        above[order] = len(y) - ascending.searchsorted(ascending)
        return below, above

    def xi_sums(
        self, X: NDArray[np.float64], Y: NDArray[np.float64], ties: Ties, seed: int
    ) -> tuple[list[PathSums], list[RankSums]] | None:
        level, threads = cpu_settings()
        if X.ndim == Y.ndim == 1:
            threads = 1
        sums = _core.dependence.chatterjee(X, Y, TIES.index(ties), seed, level, threads)
        if sums is None:
            return None
        return [PathSums(*path) for path in sums[0]], [RankSums(*ranks) for ranks in sums[1]]
