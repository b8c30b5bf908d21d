"""Column scaling factors, and the guard against distances that overflow or underflow."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext.dependence.backends.base import Columns, Laid

Standardize = Literal["scale", "bounded"]
STANDARDIZE = ("scale", "bounded", None)

_LIMITS = {  # of a working precision: the smallest normal number, and the largest one
    np.dtype(kind): (float(np.finfo(kind).tiny), float(np.finfo(kind).max))
    for kind in (np.float32, np.float64)
}

Label = Callable[[int], str]  # what messages call a column


def constant_columns(columns: Columns) -> NDArray[np.bool_]:
    """Which columns have one value only."""
    return columns.low == columns.high


def scaled(
    columns: Columns, standardize: Standardize | None, label: Label, n: int | None = None
) -> Laid:
    """Columns with their factors c_f, in the columns' dtype: computed in double, rounded once.

    ``((max - min) c_f)^2`` in working precision is a column's squared span; inf where it overflows.
    Rounding is monotone, so this bounds every pair's term of the squared distance, and the sum over
    columns in their order bounds the distance.

    Parameters
    ----------
    columns : Columns
    standardize : {"scale", "bounded", None}
        1 / standard deviation (n - 1), 1 / range, or 1. A constant column gets 0.
    label : callable
    n : int, optional
        Rows: warns of what underflows.

    Raises
    ------
    ValueError
        If a factor is not a finite positive number of the working precision.
    """
    low, high = columns.low, columns.high
    tiny, most = _LIMITS[low.dtype]
    factors = spread = np.ones(len(low), dtype=low.dtype)
    with np.errstate(all="ignore"):  # the result is checked below
        if standardize is not None:
            if standardize == "bounded":
                spread = high.astype(np.float64) - low.astype(np.float64)
            else:
                spread = columns.standard_deviations()
            factors = (1.0 / spread).astype(low.dtype)
        spans = _squared((high - low) * factors)
        # a factor of no use makes a span of 0, infinity or NaN
        usual = len(spans) == 0 or (_smallest(spans) >= tiny and _largest(spans) <= most)
        if standardize is not None and not usual:
            constant = low == high
            _check_factors(factors, spread, constant, label)
            factors[constant] = 0
            spans = _squared((high - low) * factors)
    laid = Laid(columns, factors, spans)
    if n is not None:
        _warn_underflow(laid, n, label)
    return laid


def _squared(values: NDArray) -> NDArray:
    return values * values


def _check_factors(
    factors: NDArray, spread: NDArray, constant: NDArray[np.bool_], label: Label
) -> None:
    """Refuse factors that are of no use, except those of constant columns."""
    usable = np.isfinite(factors) & (factors > 0) & np.isfinite(spread)
    bad = np.flatnonzero(~usable & ~constant)
    if len(bad):
        raise ValueError(
            f"{label(int(bad[0]))} cannot be standardised in {factors.dtype}: its spread "
            f"{spread[bad[0]]:.3g} is too large or too small; rescale the column, or pass "
            "standardize=None"
        )


def _smallest(values: NDArray) -> float:
    """NaN if there is one. Sooner found than by a reduction where values are few."""
    return float(values[values.argmin()])


def _largest(values: NDArray) -> float:
    return float(values[values.argmax()])


def check_distances(columns: Columns, label: Label, n: int | None = None) -> NDArray:
    """Refuse a table whose squared distances over all columns overflow; returns factors of 1.

    With n, warns of what underflows on n rows.
    """
    laid = scaled(columns, None, label)
    if not far_from_overflow(laid.spans):
        with np.errstate(over="ignore", under="ignore"):
            bounds = np.add.accumulate(laid.spans)
        check_overflow(bounds, label)
    if n is not None:
        _warn_underflow(laid, n, label)
    return laid.factors


def far_from_overflow(spans: NDArray) -> bool:
    """Whether no sum of some squared spans, each taken once, overflows in any order."""
    most = _LIMITS[spans.dtype][1] / 4  # sums are rounded
    return not len(spans) or _largest(spans) * len(spans) < most


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


def _warn_underflow(laid: Laid, n: int, label: Label) -> None:
    """Warn of columns whose neighbours' squared differences are too small to tell apart.

    n rows lie about span / n apart; squares below the smallest normal number lose digits.
    """
    columns, factors, spans = laid
    least = _LIMITS[spans.dtype][0] * float(n) ** 2
    if len(spans) == 0 or _smallest(spans) >= least:
        return
    small = spans.astype(np.float64) < least
    affected = np.flatnonzero(small & (factors > 0) & ~constant_columns(columns))
    if len(affected):
        warn(
            f"squared differences along {label(int(affected[0]))} underflow {factors.dtype}, so "
            "that near rows look equal; rescale it",
        )
