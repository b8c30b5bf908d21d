"""The one door to the compiled engine: lays out arrays, reads the settings, calls ``_core``."""

import numpy as np
from numpy.typing import NDArray

from lcodec_ext import _core
from lcodec_ext._threads import cpu_settings
from lcodec_ext.dependence import exact as _exact

TIES_CODES = {"average": 0, "random": 1, "first": 2}


class CpuColumns:
    """A table laid out by column, with each column's range; twin of ``ReferenceColumns``."""

    def __init__(self, X: NDArray) -> None:
        self.values, self.low, self.high = _core.dependence.lay_out(X, *cpu_settings())

    def standard_deviations(self) -> NDArray[np.float64]:
        """Standard deviations (n - 1) in double, added in the written order."""
        return _core.dependence.standard_deviations(self.values, *cpu_settings())


class CpuEngine:
    """Scores candidate columns given the selected ones, on CPU threads with SIMD.

    The interface of ``reference.engine.ReferenceEngine``, and the same bits. Costs are in
    ``csrc/lcodec/engine.hpp``.
    """

    piece = 1024  # each looks for the rows' neighbours anew, which must stay small beside scoring

    def __init__(
        self, columns: CpuColumns, factors: NDArray, R: NDArray[np.int64], ties: str, seed: int
    ) -> None:
        single = columns.values.dtype == np.float32
        make = _core.dependence.EngineFloat if single else _core.dependence.EngineDouble
        # Benchmarks read what it counted (with LCODEC_INSTRUMENTS).
        self.compiled = make(columns.values, factors, R.astype(np.int32), TIES_CODES[ties], seed)

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""
        self.compiled.select(column)

    def row_sums(self, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per row: sum of min(R_i, R_j) over the neighbours used, and how many they are."""
        return self.compiled.row_sums(column, *cpu_settings())

    def score(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every candidate, the sum over rows in fixed point (``_exact.fixed_point``).

        With a floor, candidates that cannot exceed it or are below another one are skipped as
        soon as that is certain; whole is -1 there.
        """
        wanted = -1 if floor is None else floor
        return self.compiled.score(columns.astype(np.int64, copy=False), wanted, *cpu_settings())

    def leaders(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The candidates that may have the largest exact sum, and their sums in fixed point."""
        return _exact.contenders(columns, *self.score(columns, floor))


def nearest(
    columns: CpuColumns, ties: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indptr, indices) of the nearest other rows; the twin of ``reference.engine.nearest``."""
    x = columns.values
    return _core.dependence.neighbors(
        x, np.ones(len(x), dtype=x.dtype), TIES_CODES[ties], seed, *cpu_settings()
    )
