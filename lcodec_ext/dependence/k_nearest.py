"""Several nearest neighbours: T with m_i as the mean of min(R_i, R_j) over the k nearest rows."""

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import check_integer
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import Backend, Leaders, Scores


def check_neighbors(n_neighbors: object, ties: object) -> None:
    """Refuse a bad number of neighbours, and several of them that tie in another way."""
    if check_integer(n_neighbors, "n_neighbors", 1) > 1 and ties != "average":
        raise ValueError(
            f"n_neighbors={n_neighbors} counts equally near rows by their mean; got ties={ties!r}: "
            "pass ties='average'"
        )


class NeighborsEngine:
    """Stands where an `Engine` stands for one neighbour. Every candidate is searched by itself.

    Where several rows are equally near at the k-th place, m_i is its mean over all their orders:
    if r places are left for c rows, each of them counts r / c.
    """

    piece = 64  # candidates at a time where a progress bar shows them

    def __init__(self, backend: Backend, columns: Any, factors: Any, R: Any, k: int) -> None:
        self._backend, self._table, self._k = backend, (columns, factors), k
        self._R = R
        self._selected: list[int] = []
        self._known: dict[int, Fraction] = {}  # sums of candidates that were looked at

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""
        self._selected.append(column)
        self._known.clear()

    def exact_sum(self, column: int) -> Fraction:
        """The total over rows of m_i."""
        if column not in self._known:
            used = [*self._selected, column]
            whole, rest, tied = self._backend.nearest_minima(*self._table, used, self._R, self._k)
            self._known[column] = (int(whole.sum()) + exact.total(rest, tied)) / self._k
        return self._known[column]

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        """For every candidate `exact_sum` in fixed point; the fraction is 0 only if it is exact."""
        unit = 1 << exact.FRACTION_BITS
        sums = [self.exact_sum(int(column)) for column in columns]
        whole = np.array([int(each) for each in sums], dtype=np.int64)
        rests = [each - int(each) for each in sums]
        fraction = np.array([max(int(rest * unit), rest > 0) for rest in rests], dtype=np.int64)
        return whole, fraction

    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        """The candidates that may have the largest exact sum, and their scores."""
        return exact.contenders(columns, *self.score(columns))
