"""Engines of the backends, and the parts of a call that codec, foci and their kin share."""

import warnings
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext import _native
from lcodec_ext._random import resolve_seed
from lcodec_ext._scaling import Columns
from lcodec_ext._validation import column_list
from lcodec_ext.reference import engine as _reference
from lcodec_ext.reference.columns import ReferenceColumns

Ties = Literal["average", "random", "first"]
TIES = ("average", "random", "first")


class Engine(Protocol):
    """What a backend offers the FOCI loop: state and steps, so that the loop stays in Python."""

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""

    def row_sums(self, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per row: sum of min(R_i, R_j) over the neighbours used, and how many they are."""

    def score(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every candidate, the sum over rows in fixed point, whole and fraction.

        With a floor only the largest sum and those above the floor are asked for: an engine may
        give -1 as the whole of any other.
        """


def lay_out(backend: str, X: NDArray) -> Columns:
    """The columns of a clean (n, p) table as a resolved backend wants them."""
    return ReferenceColumns(X) if backend == "reference" else _native.CpuColumns(X)


def make_engine(
    columns: Columns, factors: NDArray, R: NDArray[np.int64], ties: str, seed: int | None
) -> Engine:
    """The engine of the columns' backend, with the response's ranks."""
    if isinstance(columns, ReferenceColumns):
        return _reference.ReferenceEngine(columns, factors, R, ties, resolve_seed(seed))
    assert isinstance(columns, _native.CpuColumns)
    return _native.CpuEngine(columns, factors, R, ties, resolve_seed(seed))


def nearest(
    columns: Columns, ties: str, seed: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indptr, indices) of the nearest other rows by the columns' backend."""
    if isinstance(columns, ReferenceColumns):
        return _reference.nearest(columns, ties, resolve_seed(seed))
    assert isinstance(columns, _native.CpuColumns)
    return _native.nearest(columns, ties, resolve_seed(seed))


def warn_constant_columns(X: NDArray, name: str, names: list[str] | None, stacklevel: int) -> None:
    """One warning for all constant columns of an argument."""
    # three rows rule out most columns
    suspects = np.flatnonzero((X[0] == X[-1]) & (X[0] == X[len(X) // 2]))
    constant = suspects[(X[:, suspects] == X[0, suspects]).all(axis=0)]
    if len(constant):
        verb = "is" if len(constant) == 1 else "are"
        warnings.warn(
            f"{column_list(constant, names)} of {name} {verb} constant and can tell nothing",
            stacklevel=stacklevel + 1,
        )
