"""The backend that computes everything by its definition, row by row: the oracle of the tests."""

from fractions import Fraction
from itertools import combinations, groupby, pairwise, product

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import permutation, pick, tie_hash
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import (
    HostBackend,
    HostEngine,
    Pairs,
    RowNumbers,
    Scores,
    Ties,
)

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
def _neighbors(
    X: NDArray, factors: NDArray, columns: list[int], i: int, ties: Ties, word: int
) -> NDArray[np.int64]:
    """The nearest rows of row i that a tie rule uses, in increasing order.

    The distance is ``sum_f ((x_if - x_jf) * c_f)^2`` in the order of ``columns``, each
    operation rounded in the dtype of X. ``word`` is the row's `tie_hash`.
    """
    distance = np.zeros(len(X), dtype=X.dtype)
    for f in columns:
        scaled = (X[i, f] - X[:, f]) * factors[f]
        distance = distance + scaled * scaled
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
        self, columns: ReferenceColumns, ties: Ties, seed: int, factors: NDArray | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        X = columns.values
        n, p = X.shape
        scales = np.ones(p, dtype=X.dtype) if factors is None else factors
        used = [
            _neighbors(X, scales, list(range(p)), i, ties, int(word))
            for i, word in enumerate(tie_hash(seed, n))
        ]
        indptr = np.concatenate([[0], np.cumsum([len(js) for js in used])]).astype(np.int64)
        return indptr, np.concatenate(used)

    def permuted_sums(
        self, pairs: Pairs, R: NDArray[np.int64], start: RowNumbers | None, seed: int, count: int
    ) -> NDArray[np.int64]:
        sums = np.zeros((count, len(pairs.begin) - 1), dtype=np.int64)
        for b in range(count):
            ranks = R[permutation(len(R), seed, b, start)].tolist()
            for s, (first, end) in enumerate(pairwise(pairs.begin.tolist())):
                owners = pairs.owner[first:end] if len(pairs.owner) else range(end - first)
                for i, j in zip(owners, pairs.other[first:end], strict=True):
                    sums[b, s] += min(ranks[i], ranks[j])
            for g, s in enumerate(pairs.segment):
                members = [i for label in pairs.label for i in np.flatnonzero(label == g)]
                sums[b, s] += sum(min(ranks[i], ranks[j]) for i, j in combinations(members, 2))
        return sums

    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> NDArray:
        return np.array([permutation(n, seed, b, start) for b in range(first, first + count)])

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
