"""Ranges and standard deviations of columns by their definition."""

import numpy as np
from numpy.typing import NDArray

_LANES = 64


class ReferenceColumns:
    """A table as it is, with each column's range; the twin of ``_native.CpuColumns``.

    Parameters
    ----------
    X : ndarray of shape (n, p), float32 or float64
    """

    def __init__(self, X: NDArray) -> None:
        self.values = X
        self.low = X.min(axis=0)
        self.high = X.max(axis=0)

    def standard_deviations(self) -> NDArray[np.float64]:
        """Standard deviations (n - 1) in double, by two passes in one written order."""
        n = len(self.values)
        mean = _lane_sums(self.values, None) / n
        return np.sqrt(_lane_sums(self.values, mean) / (n - 1))


def _lane_sums(columns: NDArray, center: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Column sums in double, of squared deviations with a center.

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
