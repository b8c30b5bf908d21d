"""The backend that computes everything by its definition, row by row: the oracle of the tests."""

import math
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
from lcodec_ext.dependence.backends.path_sums import PathSums, RankSums

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

    def take(self, columns: list[int]) -> NDArray:
        return self.values[:, columns]

    def put(self, column: int, values: NDArray) -> bool:
        self.values[:, column] = values
        return True


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
        self,
        pairs: Pairs,
        R: NDArray[np.int64],
        start: RowNumbers | None,
        seed: int,
        count: int,
        first: int = 0,
    ) -> NDArray[np.int64]:
        sums = np.zeros((count, len(pairs.begin) - 1), dtype=np.int64)
        for b in range(count):
            ranks = R[permutation(len(R), seed, first + b, start)].tolist()
            for s, (begin, end) in enumerate(pairwise(pairs.begin.tolist())):
                owners = pairs.owner[begin:end] if len(pairs.owner) else range(end - begin)
                for i, j in zip(owners, pairs.other[begin:end], strict=True):
                    sums[b, s] += min(ranks[i], ranks[j])
            for g, s in enumerate(pairs.segment):
                members = [i for label in pairs.label for i in np.flatnonzero(label == g)]
                sums[b, s] += sum(min(ranks[i], ranks[j]) for i, j in combinations(members, 2))
        return sums

    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> NDArray:
        return np.array([permutation(n, seed, b, start) for b in range(first, first + count)])

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

    def xi_sums(
        self, X: NDArray[np.float64], Y: NDArray[np.float64], ties: Ties, seed: int
    ) -> tuple[list[PathSums], list[RankSums]] | None:
        if not (np.isfinite(X).all() and np.isfinite(Y).all()):
            return None
        ranks = [self.ranks(y) for y in np.atleast_2d(Y)]
        rs = [R.tolist() for R, _ in ranks]
        paths = [_path_sums(_grouped(x, ties, seed), rs) for x in np.atleast_2d(X)]
        return paths, [_rank_sums(R.tolist(), L.tolist()) for R, L in ranks]


def _grouped(x: NDArray, ties: Ties, seed: int) -> list[list[int]]:
    """Rows in the order of x; those that tie are together where they are averaged."""
    xs = x.tolist()
    words = tie_hash(seed if ties == "random" else 0, len(xs)).tolist()
    if ties != "random":
        words = [0] * len(xs)
    order = sorted(range(len(xs)), key=lambda i: (xs[i], words[i], i))
    if ties != "average":
        return [[i] for i in order]
    return [list(group) for _, group in groupby(order, key=lambda i: xs[i])]


def _path_sums(groups: list[list[int]], rs: list[list[int]]) -> PathSums:
    """A step inside a group joins a random pair of it, one to the next group a pair of both."""
    rows: dict[int, int] = {}
    squares: dict[int, int] = {}
    lengths: list[dict[int, int]] = [{} for _ in rs]
    for g, group in enumerate(groups):
        s = len(group)
        beside = (g > 0) + (g < len(groups) - 1)
        rows[s] = rows.get(s, 0) + (2 * (s - 1) + beside) ** 2
        squares[s] = squares.get(s, 0) + 2 * (s - 1)
        for R, length in zip(rs, lengths, strict=True):
            inside = 2 * sum(abs(R[a] - R[b]) for a, b in combinations(group, 2))
            length[s] = length.get(s, 0) + inside
    for left, right in pairwise(groups):
        st = len(left) * len(right)
        squares[st] = squares.get(st, 0) + 1
        for R, length in zip(rs, lengths, strict=True):
            step = sum(abs(R[a] - R[b]) for a, b in product(left, right))
            length[st] = length.get(st, 0) + step
    denominators = sorted(squares)
    cube = _cube_of_weights([len(group) for group in groups]) if denominators != [1] else 0.0
    found = [[sums.get(d, 0) for d in denominators] for sums in (rows, squares, *lengths)]
    common = math.lcm(*denominators)
    if common <= 1 << 20:
        found = [
            [sum(value * (common // d) for value, d in zip(values, denominators, strict=True))]
            for values in found
        ]
        denominators = [common]
    return PathSums(denominators, found[0], found[1], found[2:], cube)


def _cube_of_weights(sizes: list[int]) -> float:
    """tr (a H)^3 with H = I - 1 1'/n, added up as in ``csrc/cpu/chatterjee.cpp``."""
    n, last = sum(sizes), len(sizes) - 1
    a = [(2 * s - 2 + (g > 0) + (g < last)) / (2 * s) for g, s in enumerate(sizes)]
    trace = once = twice = 0.0
    for g, s in enumerate(sizes):
        trace += (s - 1) * (s - 2) / (s * s)
        once += s * a[g] * a[g]
        twice += (s - 1) * a[g] * a[g]
        if g < last:
            t = sizes[g + 1]
            trace += 3 * (s - 1) / (4 * s * s * t) + 3 * (t - 1) / (4 * t * t * s)
            twice += a[g] * a[g + 1]
    rest = (n - 1) / n
    return trace - 3 * twice / n + 3 * rest * once / n - rest * rest * rest


def _cube_of_minima(R: list[int]) -> float:
    """The sum over thresholds s <= t <= u of q_s^2 (q_t p_t) p_u^2, times their orders."""
    n = len(R)
    cube = singles = doubles = pairs = 0.0
    for threshold in range(1, n + 1):
        below = sum(r < threshold for r in R)
        q, p = below / n, (n - below) / n
        cube += (
            6 * pairs * (p * p)
            + 3 * (doubles * (p * p) + singles * (q * p * p * p))
            + (q * p) * (q * p) * (q * p)
        )
        pairs += singles * (q * p)
        doubles += q * q * q * p
        singles += q * q
    return cube


def _rank_sums(R: list[int], L: list[int]) -> RankSums:
    n = len(R)
    minima = [[min(a, b) for b in R] for a in R]
    return RankSums(
        denominator=sum(v * (n - v) for v in L),
        total=sum(R),
        squares=sum(r * r for r in R),
        minima=sum(map(sum, minima)),
        minima_squares=sum(k * k for row in minima for k in row),
        minima_rows=sum(sum(row) ** 2 for row in minima),
        distance_rows=sum(sum(abs(a - b) for b in R) ** 2 for a in R),
        cube=_cube_of_minima(R),
    )
