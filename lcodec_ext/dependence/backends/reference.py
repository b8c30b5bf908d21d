"""The backend that computes everything by its definition, row by row: the oracle of the tests."""

from fractions import Fraction
from itertools import combinations, groupby, pairwise, product

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import pick, tie_hash
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import HostBackend, HostEngine, Scores, Ties

_LANES = 64


class ReferenceColumns:
    """A table as it is, with each column's range."""

    def __init__(self, X: NDArray) -> None:
        self.values = X
        self.low = X.min(axis=0)
        self.high = X.max(axis=0)

    @np.errstate(all="ignore")  # the caller checks the result
    def standard_deviations(self) -> NDArray[np.float64]:
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


@np.errstate(under="ignore")  # expected: the kernels underflow alike
def _distances(X: NDArray, factors: NDArray, columns: list[int], i: int) -> NDArray:
    """``sum_f ((x_if - x_jf) * c_f)^2`` of row i and every row j.

    In the order of ``columns``, each operation rounded in the dtype of X.
    """
    distance = np.zeros(len(X), dtype=X.dtype)
    for f in columns:
        scaled = (X[i, f] - X[:, f]) * factors[f]
        distance = distance + scaled * scaled
    return distance


def _neighbors(
    X: NDArray, factors: NDArray, columns: list[int], i: int, ties: Ties, word: int
) -> NDArray[np.int64]:
    """The nearest rows of row i that a tie rule uses, in increasing order.

    ``word`` is the row's `tie_hash`.
    """
    distance = _distances(X, factors, columns, i)
    others = np.delete(np.arange(len(X)), i)
    tied = others[distance[others] == distance[others].min()]
    if ties == "average":
        return tied
    k = pick(word, len(tied)) if ties == "random" else 0
    return tied[k : k + 1]


class ReferenceEngine(HostEngine):
    """O(n^2) in every column."""

    def __init__(
        self,
        columns: ReferenceColumns,
        factors: NDArray,
        R: NDArray[np.int64],
        ties: Ties,
        seed: int,
    ) -> None:
        super().__init__(columns.values.shape[1])
        self._X, self._factors, self._R, self._ties = columns.values, factors, R, ties
        self._words = tie_hash(seed, len(R))

    def row_sums(self, column: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        columns = [*self._selected, column]
        n = len(self._X)
        sums = np.empty(n, dtype=np.int64)
        counts = np.empty(n, dtype=np.int64)
        for i, word in enumerate(self._words):
            used = _neighbors(self._X, self._factors, columns, i, self._ties, int(word))
            sums[i] = np.minimum(self._R[i], self._R[used]).sum()
            counts[i] = len(used)
        return sums, counts

    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        scores = [exact.fixed_point(*self.row_sums(int(column))) for column in columns]
        whole, fraction = np.array(scores, dtype=np.int64).reshape(-1, 2).T
        return whole, fraction


class ReferenceBackend(HostBackend):
    """Plain NumPy and Python, O(n^2)."""

    def lay_out(self, X: NDArray) -> ReferenceColumns:
        return ReferenceColumns(np.ascontiguousarray(X))

    def engine(
        self,
        columns: ReferenceColumns,
        factors: NDArray,
        R: NDArray[np.int64],
        ties: Ties,
        seed: int,
    ) -> ReferenceEngine:
        return ReferenceEngine(columns, factors, R, ties, seed)

    def nearest(
        self, columns: ReferenceColumns, ties: Ties, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        X = columns.values
        n, p = X.shape
        ones = np.ones(p, dtype=X.dtype)
        used = [
            _neighbors(X, ones, list(range(p)), i, ties, int(word))
            for i, word in enumerate(tie_hash(seed, n))
        ]
        indptr = np.concatenate([[0], np.cumsum([len(js) for js in used])]).astype(np.int64)
        return indptr, np.concatenate(used)

    def nearest_minima(
        self,
        columns: ReferenceColumns,
        factors: NDArray,
        used: list[int],
        R: NDArray[np.int64],
        k: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        found = []
        for i in range(len(R)):
            distance = np.delete(_distances(columns.values, factors, used, i), i)
            minima = np.minimum(R[i], np.delete(R, i))
            far = np.sort(distance)[k - 1]
            nearer, tied = distance < far, distance == far
            share = Fraction(k - int(nearer.sum()), int(tied.sum()))
            total = int(minima[nearer].sum()) + share * int(minima[tied].sum())
            rest = (total - int(total)) * int(tied.sum())
            found.append((int(total), int(rest), int(tied.sum())))
        whole, rests, counts = np.array(found, dtype=np.int64).T
        return whole, rests, counts

    def ranks(self, y: NDArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        R = [np.count_nonzero(y <= value) for value in y]
        L = [np.count_nonzero(y >= value) for value in y]
        return np.array(R, dtype=np.int64), np.array(L, dtype=np.int64)

    def path_length(self, x: NDArray, R: NDArray[np.int64], ties: Ties, seed: int) -> Fraction:
        xs, rs = x.tolist(), R.tolist()
        rows = range(len(xs))
        if ties == "random":
            words = tie_hash(seed, len(xs)).tolist()
            order = sorted(rows, key=lambda i: (xs[i], words[i], i))
        else:
            order = sorted(rows, key=lambda i: (xs[i], i))
        if ties != "average":
            return Fraction(sum(abs(rs[i] - rs[j]) for i, j in pairwise(order)))
        groups = [[rs[i] for i in group] for _, group in groupby(order, key=lambda i: xs[i])]
        length = Fraction(0)
        for group in groups:
            length += Fraction(2 * sum(abs(a - b) for a, b in combinations(group, 2)), len(group))
        for left, right in pairwise(groups):
            total = sum(abs(a - b) for a, b in product(left, right))
            length += Fraction(total, len(left) * len(right))
        return length

    def null_variance(self, R: NDArray[np.int64]) -> int:
        rs = R.tolist()
        n = len(rs)
        rows = [[min(a, b) for b in rs] for a in rs]
        squares = sum(k * k for row in rows for k in row)
        sums = [sum(row) for row in rows]
        return n * n * squares - 2 * n * sum(s * s for s in sums) + sum(sums) ** 2
