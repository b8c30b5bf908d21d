"""Column scaling factors, and the guard against distances that overflow."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._validation import column_label

_LANES = 64


def _lane_sums(columns: NDArray, center: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Column sums in double (of squared deviations with a center), in one written order.

    Lane l adds rows l, l + 64, l + 128, ... one after the other; then the lanes are added in
    halves: 32..63 onto 0..31, 16..31 onto 0..15, and so on. Every backend adds in this order,
    so a scaling factor has the same bits everywhere.
    """
    lanes = np.zeros((_LANES, columns.shape[1]))
    for start in range(0, len(columns), _LANES):
        block = columns[start : start + _LANES].astype(np.float64)
        if center is not None:
            block = block - center
            block = block * block
        lanes[: len(block)] += block
    width = _LANES
    while width > 1:
        width //= 2
        lanes[:width] += lanes[width : 2 * width]
    return lanes[0]


def scale_factors(
    columns: NDArray, standardize: str | None, names: list[str] | None = None
) -> NDArray:
    """The factor c_f of every column, in the columns' dtype.

    Parameters
    ----------
    columns : ndarray of shape (n, p), float32 or float64
    standardize : {"scale", "bounded", None}
        1 / standard deviation (n - 1), 1 / range, or 1. A constant column gets 0.

    Raises
    ------
    ValueError
        If a factor is not a finite positive number of the working precision.

    Notes
    -----
    O(np), two passes, in double, rounded once at the end.
    """
    p = columns.shape[1]
    if standardize is None:
        return np.ones(p, dtype=columns.dtype)
    low = columns.min(axis=0).astype(np.float64)
    high = columns.max(axis=0).astype(np.float64)
    constant = low == high
    with np.errstate(all="ignore"):  # the result is checked below
        if standardize == "bounded":
            spread = high - low
        else:
            mean = _lane_sums(columns, None) / len(columns)
            spread = np.sqrt(_lane_sums(columns, mean) / (len(columns) - 1))
        factors = (1.0 / spread).astype(columns.dtype)
    usable = np.isfinite(factors) & (factors > 0) & np.isfinite(spread)
    bad = np.flatnonzero(~usable & ~constant)
    if len(bad):
        raise ValueError(
            f"{column_label(int(bad[0]), names)} of X cannot be standardised in "
            f"{columns.dtype}: its spread {spread[bad[0]]:.3g} is too large or too small; "
            "rescale the column, or pass standardize=None"
        )
    factors[constant] = 0
    return factors


def squared_spans(columns: NDArray, factors: NDArray) -> NDArray:
    """``((max - min) * c)^2`` of every column in working precision; inf where it overflows.

    Rounding is monotone, so this bounds every pair's term of the squared distance, and the
    sum over columns in their order bounds the distance.
    """
    with np.errstate(over="ignore"):
        scaled = (columns.max(axis=0) - columns.min(axis=0)) * factors
        return scaled * scaled


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
