"""Neighbours and rank sums by their definition."""

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import pick, tie_hash
from lcodec_ext.dependence import exact as _exact
from lcodec_ext.dependence.backends.reference_columns import ReferenceColumns


def tied_neighbors(X: NDArray, factors: NDArray, columns: list[int], i: int) -> NDArray[np.int64]:
    """All j != i whose computed squared distance to row i is smallest, in increasing order.

    The distance is ``sum_f ((x_if - x_jf) * c_f)^2`` in the order of ``columns``, each
    operation rounded in the dtype of X.
    """
    distance = np.zeros(len(X), dtype=X.dtype)
    for f in columns:
        scaled = (X[i, f] - X[:, f]) * factors[f]
        distance = distance + scaled * scaled
    others = np.delete(np.arange(len(X)), i)
    nearest = distance[others].min()
    return others[distance[others] == nearest]


def chosen_neighbors(tied: NDArray[np.int64], ties: str, word: int) -> NDArray[np.int64]:
    """Those of the tied neighbours that a tie rule uses."""
    if ties == "first":
        return tied[:1]
    if ties == "random":
        k = pick(word, len(tied))
        return tied[k : k + 1]
    return tied


class ReferenceEngine:
    """Scores candidate columns given the selected ones; the twin of ``_native.CpuEngine``.

    Parameters
    ----------
    columns : ReferenceColumns
    factors : ndarray of shape (p,)
        Scaling factor of every column, in the dtype of the columns.
    R : ndarray of int64, shape (n,)
        Max ranks of the response.
    ties : {"average", "random", "first"}
    seed : int
        Used by ties="random".
    """

    piece = 1024

    def __init__(
        self,
        columns: ReferenceColumns,
        factors: NDArray,
        R: NDArray[np.int64],
        ties: str,
        seed: int,
    ) -> None:
        self._X, self._factors, self._R, self._ties = columns.values, factors, R, ties
        self._words = tie_hash(seed, len(R))
        self._selected: list[int] = []

    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""
        self._selected.append(column)

    def row_sums(self, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Per row: sum of min(R_i, R_j) over the neighbours used, and how many they are.

        Neighbours in the selected columns and ``column`` behind them.
        """
        columns = [*self._selected, column]
        n = len(self._X)
        sums = np.empty(n, dtype=np.int64)
        counts = np.empty(n, dtype=np.int64)
        for i in range(n):
            tied = tied_neighbors(self._X, self._factors, columns, i)
            used = chosen_neighbors(tied, self._ties, int(self._words[i]))
            sums[i] = np.minimum(self._R[i], self._R[used]).sum()
            counts[i] = len(used)
        return sums, counts

    def score(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every candidate, the sum over rows in fixed point (``_exact.fixed_point``).

        All of them are computed whatever the floor.
        """
        scores = [_exact.fixed_point(*self.row_sums(int(column))) for column in columns]
        whole, fraction = np.array(scores, dtype=np.int64).reshape(-1, 2).T
        return whole, fraction

    def leaders(
        self, columns: NDArray[np.int64], floor: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The candidates that may have the largest exact sum, and their sums in fixed point."""
        return _exact.contenders(columns, *self.score(columns, floor))


def nearest(
    table: ReferenceColumns, ties: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(indptr, indices) of the neighbours used; the twin of ``_native.nearest``."""
    X = table.values
    ones = np.ones(X.shape[1], dtype=X.dtype)
    words = tie_hash(seed, len(X))
    columns = list(range(X.shape[1]))
    used = [
        chosen_neighbors(tied_neighbors(X, ones, columns, i), ties, int(words[i]))
        for i in range(len(X))
    ]
    indptr = np.concatenate([[0], np.cumsum([len(js) for js in used])]).astype(np.int64)
    return indptr, np.concatenate(used)
