"""Column scaling factors, and the guard against distances that overflow or underflow."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext.dependence.backends.base import Columns

Standardize = Literal["scale", "bounded"]
STANDARDIZE = ("scale", "bounded", None)

Label = Callable[[int], str]  # what messages call a column


def constant_columns(columns: Columns) -> NDArray[np.bool_]:
    """Which columns have one value only."""
    return columns.low == columns.high


def scale_factors(columns: Columns, standardize: Standardize | None, label: Label) -> NDArray:
    """The factor c_f of every column, in the columns' dtype: computed in double, rounded once.

    Parameters
    ----------
    columns : Columns
    standardize : {"scale", "bounded", None}
        1 / standard deviation (n - 1), 1 / range, or 1. A constant column gets 0.
    label : callable

    Raises
    ------
    ValueError
        If a factor is not a finite positive number of the working precision.
    """
    dtype = columns.low.dtype
    if standardize is None:
        return np.ones(len(columns.low), dtype=dtype)
    constant = constant_columns(columns)
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
            f"{label(int(bad[0]))} cannot be standardised in {dtype}: its spread "
            f"{spread[bad[0]]:.3g} is too large or too small; rescale the column, or pass "
            "standardize=None"
        )
    factors[constant] = 0
    return factors


def squared_spans(columns: Columns, factors: NDArray) -> NDArray:
    """``((max - min) * c)^2`` of every column in working precision; inf where it overflows.

    Rounding is monotone, so this bounds every pair's term of the squared distance, and the
    sum over columns in their order bounds the distance.
    """
    with np.errstate(over="ignore", under="ignore"):
        return _squared_spans(columns, factors)


def _squared_spans(columns: Columns, factors: NDArray) -> NDArray:
    scaled = (columns.high - columns.low) * factors
    return scaled * scaled


def check_distances(columns: Columns, label: Label, n: int | None = None) -> NDArray:
    """Refuse a table whose squared distances over all columns overflow; returns factors of 1.

    With n, warns of what underflows on n rows.
    """
    low = columns.low
    factors = np.ones(len(low), dtype=low.dtype)
    with np.errstate(over="ignore", under="ignore"):
        spans = _squared_spans(columns, factors)
        bounds = np.add.accumulate(spans)
    check_overflow(bounds, label)
    if n is not None:
        _warn_underflow(spans, columns, factors, n, label)
    return factors


def check_overflow(bounds: NDArray, label: Label) -> None:
    """Refuse bounds on squared distances, sums of squared spans, that are not finite.

    `label` names the column of the k-th bound.
    """
    finite = np.isfinite(bounds)
    if not finite.all():
        overflow = np.flatnonzero(~finite)
        advice = " or pass float64" if bounds.dtype == np.float32 else ""
        raise ValueError(
            f"squared distances overflow {bounds.dtype} with {label(int(overflow[0]))}: its "
            f"values are too far apart; rescale it{advice}"
        )


def warn_underflow(columns: Columns, factors: NDArray, n: int, label: Label) -> None:
    """Warn of columns whose neighbours' squared differences are too small to tell apart.

    n rows lie about span / n apart; squares below the smallest normal number lose digits.
    """
    _warn_underflow(squared_spans(columns, factors), columns, factors, n, label)


def _warn_underflow(
    spans: NDArray, columns: Columns, factors: NDArray, n: int, label: Label
) -> None:
    tiny = np.finfo(factors.dtype).tiny
    small = spans.astype(np.float64, copy=False) < float(tiny) * float(n) ** 2
    if not small.any():
        return
    affected = np.flatnonzero(small & ~constant_columns(columns) & (factors > 0))
    if len(affected):
        warn(
            f"squared differences along {label(int(affected[0]))} underflow {factors.dtype}, so "
            "that near rows look equal; rescale it",
        )
