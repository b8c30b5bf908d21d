"""Engines of the backends, and the parts of a call that codec, foci and their kin share."""

import warnings
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import resolve_seed
from lcodec_ext.dependence.backends import cpu as _native
from lcodec_ext.dependence.backends import reference as _reference
from lcodec_ext.dependence.backends.reference_columns import ReferenceColumns
from lcodec_ext.dependence.scaling import Columns
from lcodec_ext.dependence.table import column_list

Ties = Literal["average", "random", "first"]
TIES = ("average", "random", "first")


class Engine(Protocol):
    """What a backend offers the FOCI loop: state and steps, so that the loop stays in Python."""

    piece: int  # how many candidates are asked for at a time where a progress bar shows them

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""

    def row_sums(self, column: int) -> tuple[Any, Any]:
        """Per row: sum of min(R_i, R_j) over the neighbours used, and how many they are.

        Arrays, or tensors on the columns' device.
        """

    def score(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every candidate, the sum over rows in fixed point, whole and fraction.

        With a floor only the largest sum and those above the floor are asked for: an engine may
        give -1 as the whole of any other.
        """

    def leaders(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The candidates that may have the largest exact sum, in any order, and their scores.

        At least those with the largest, unless it is not above the floor; seldom many more.
        """


def lay_out(backend: str, X: Any) -> Columns:
    """The columns of a clean (n, p) table, array or tensor, as a resolved backend wants them."""
    if backend == "cuda":
        from lcodec_ext.dependence.backends import cuda as _cuda

        return _cuda.CudaColumns(X)
    X = np.ascontiguousarray(X)
    return ReferenceColumns(X) if backend == "reference" else _native.CpuColumns(X)


def make_engine(columns: Columns, factors: Any, R: Any, ties: str, seed: int | None) -> Engine:
    """The engine of the columns' backend, with the response's ranks."""
    if isinstance(columns, ReferenceColumns):
        return _reference.ReferenceEngine(columns, factors, R, ties, resolve_seed(seed))
    if isinstance(columns, _native.CpuColumns):
        return _native.CpuEngine(columns, factors, R, ties, resolve_seed(seed))
    from lcodec_ext.dependence.backends import cuda as _cuda

    assert isinstance(columns, _cuda.CudaColumns)
    return _cuda.CudaEngine(columns, factors, R, ties, resolve_seed(seed))


def nearest(columns: Columns, ties: str, seed: int | None) -> tuple[Any, Any]:
    """(indptr, indices) of the nearest other rows by the columns' backend."""
    if isinstance(columns, ReferenceColumns):
        return _reference.nearest(columns, ties, resolve_seed(seed))
    if isinstance(columns, _native.CpuColumns):
        return _native.nearest(columns, ties, resolve_seed(seed))
    from lcodec_ext.dependence.backends import cuda as _cuda

    assert isinstance(columns, _cuda.CudaColumns)
    return _cuda.nearest(columns, ties, resolve_seed(seed))


def constant_columns(columns: Columns) -> NDArray[np.bool_]:
    """Which columns have one value only."""
    return columns.low == columns.high


def warn_constant_columns(
    flags: NDArray[np.bool_], name: str, names: list[str] | None, stacklevel: int
) -> None:
    """One warning for all columns of an argument that are flagged as constant."""
    constant = np.flatnonzero(flags)
    if len(constant):
        verb = "is" if len(constant) == 1 else "are"
        warnings.warn(
            f"{column_list(constant, names)} of {name} {verb} constant and can tell nothing",
            stacklevel=stacklevel + 1,
        )
