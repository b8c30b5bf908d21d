"""Column scaling factors, and the guard against distances that overflow."""

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence.table import column_label


class Columns(Protocol):
    """A table as a backend lays it out."""

    @property
    def values(self) -> Any:
        """The table: an array, or a tensor on a device."""

    @property
    def low(self) -> NDArray:
        """Smallest value of every column."""

    @property
    def high(self) -> NDArray:
        """Largest value of every column."""

    def standard_deviations(self) -> NDArray[np.float64]:
        """Standard deviations (n - 1) in double, the same bits on every backend."""


def scale_factors(
    columns: Columns, standardize: str | None, names: list[str] | None = None
) -> NDArray:
    """The factor c_f of every column, in the columns' dtype.

    Parameters
    ----------
    columns : Columns
    standardize : {"scale", "bounded", None}
        1 / standard deviation (n - 1), 1 / range, or 1. A constant column gets 0.
    names : list of str, optional
        Column names, for messages.

    Raises
    ------
    ValueError
        If a factor is not a finite positive number of the working precision.

    Notes
    -----
    O(np), two passes, in double, rounded once at the end.
    """
    dtype = columns.low.dtype
    if standardize is None:
        return np.ones(len(columns.low), dtype=dtype)
    constant = columns.low == columns.high
    with np.errstate(all="ignore"):  # the result is checked below
        if standardize == "bounded":
            spread = columns.high.astype(np.float64) - columns.low.astype(np.float64)
        else:
            spread = columns.standard_deviations()
        factors = (1.0 / spread).astype(dtype)
    usable = np.isfinite(factors) & (factors > 0) & np.isfinite(spread)
    bad = np.flatnonzero(~usable & ~constant)
    if len(bad):
        raise ValueError(
            f"{column_label(int(bad[0]), names)} of X cannot be standardised in "
            f"{dtype}: its spread {spread[bad[0]]:.3g} is too large or too small; "
            "rescale the column, or pass standardize=None"
        )
    factors[constant] = 0
    return factors


def squared_spans(columns: Columns, factors: NDArray) -> NDArray:
    """``((max - min) * c)^2`` of every column in working precision; inf where it overflows.

    Rounding is monotone, so this bounds every pair's term of the squared distance, and the
    sum over columns in their order bounds the distance.
    """
    with np.errstate(over="ignore"):
        scaled = (columns.high - columns.low) * factors
        return scaled * scaled


def warn_underflow(
    columns: Columns, factors: NDArray, labels: Callable[[int], str], stacklevel: int
) -> None:
    """Warn of columns whose neighbours' squared differences are too small to tell apart.

    n rows lie about span / n apart; squares below the smallest normal number lose digits.
    """
    tiny = np.finfo(factors.dtype).tiny
    n = max(columns.values.shape)
    with np.errstate(under="ignore"):
        small = squared_spans(columns, factors).astype(np.float64) < float(tiny) * float(n) ** 2
    affected = np.flatnonzero(small & (columns.low != columns.high) & (factors > 0))
    if len(affected):
        warnings.warn(
            f"squared differences along {labels(int(affected[0]))} underflow {factors.dtype}, so "
            "that near rows look equal; rescale it",
            stacklevel=stacklevel + 1,
        )


def check_overflow(bounds: NDArray, labels: Callable[[int], str]) -> None:
    """Refuse bounds on squared distances that are not finite.

    Parameters
    ----------
    bounds : ndarray
        Sums of squared spans in working precision.
    labels : callable
        What to call the column of the k-th bound in the message.

    Raises
    ------
    ValueError
        Naming the first such column.
    """
    overflow = np.flatnonzero(~np.isfinite(bounds))
    if len(overflow):
        advice = " or pass float64" if bounds.dtype == np.float32 else ""
        raise ValueError(
            f"squared distances overflow {bounds.dtype} with {labels(int(overflow[0]))}: its "
            f"values are too far apart; rescale it{advice}"
        )
