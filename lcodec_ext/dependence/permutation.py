"""What a permutation test repeats: sums over the same pairs of rows, of permuted ranks.

Neighbours depend on the columns alone, so permuting y leaves them as they are: they are searched
once, and every permutation costs one sum of minima. All sums are integers until the end.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor
from lcodec_ext._checks import check_integer
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext.dependence.backends.base import Backend, Pairs, RowNumbers, Ties
from lcodec_ext.dependence.classes import Response
from lcodec_ext.dependence.ranks import AnyRanks

_LISTED = 8  # rows of a group up to which its pairs are listed
_NONE = np.empty(0, dtype=np.int32)


def check_permutations(method: str, n_permutations: object) -> int:
    """How many permutations a method draws: none for the limit, which refuses a number of them."""
    if n_permutations is None:
        return 0 if method == "asymptotic" else 999
    count = check_integer(n_permutations, "n_permutations", 1, 10**6)
    if method == "asymptotic":
        raise ValueError(
            f"method='asymptotic' draws no permutations; got n_permutations={count}: leave it out, "
            "or pass method='permutation'"
        )
    return count


class Weighted(NamedTuple):
    """Pairs, and what the sum of each segment counts in the sum of ``m_i``: num / den."""

    pairs: Pairs
    num: list[int]
    den: list[int]


class _Points(NamedTuple):
    """The distinct rows of a table: `first` row, `size` and rows of each, and each row's point."""

    first: NDArray[np.int64]
    size: NDArray[np.int64]
    of_row: NDArray[np.int64]
    rows: NDArray[np.int64]  # in the order of their points
    start: NDArray[np.int64]  # where the rows of a point begin


class Neighbors(NamedTuple):
    """The nearest rows that each row uses, as those of distinct rows.

    A row that has equal ones is nearest to these. Point k is the row ``points.first[k]``, and the
    points next to it are ``indices[indptr[k]:indptr[k + 1]]``. `zero` tells which points have
    another one at a computed distance of 0, because squares of differences underflow.
    """

    points: "_Points"
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    zero: NDArray[np.bool_]


def find_neighbors(backend: Backend, table: Any, factors: Any, ties: Ties, seed: int) -> Neighbors:
    """The nearest rows of each row of a table.

    Parameters
    ----------
    backend : Backend
    table : array or tensor of shape (n, k)
    factors : array of shape (k,)
        Scaling of every column.
    ties, seed
        As in `codec`. Unless ties="average" every row is a point of its own.
    """

    def nearest(X: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        indptr, indices = backend.nearest(backend.lay_out(X), ties, seed, factors)
        return (indptr.cpu().numpy(), indices.cpu().numpy()) if is_tensor(X) else (indptr, indices)

    points = _distinct(table) if ties == "average" else _by_row(len(table))
    if len(points.size) == len(table):
        return Neighbors(_by_row(len(table)), *nearest(table), np.zeros(len(table), dtype=bool))
    if len(points.size) == 1:
        none = np.zeros(2, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return Neighbors(points, *none, np.zeros(1, dtype=bool))
    distinct = table[points.first]
    found = nearest(distinct)
    return Neighbors(points, *found, _zero_apart(distinct, factors, *found))


def neighbor_pairs(found: Neighbors) -> Weighted:
    """Each row and the nearest rows that it uses, as pairs.

    A group of many equal rows needs no list, which would have the square of its size; between
    distinct rows the lists are short.
    """
    points, indptr, indices, zero = found
    n = len(points.rows)
    if len(points.size) == n and len(indices) == n:
        none = np.empty((0, n), dtype=np.int32)
        pairs = Pairs(np.array([0, n]), _NONE, indices.astype(np.int32), none, _NONE, _NONE)
        return Weighted(pairs, [1], [1])
    listed = (points.size == 1) | zero
    return _joined(
        [*_listed_pairs(points, listed, indptr, indices), *_groups(points, ~listed)], points
    )


def _by_row(n: int) -> _Points:
    rows = np.arange(n)
    return _Points(rows, np.ones(n, dtype=np.int64), rows, rows, rows)


def _distinct(table: Any) -> _Points:
    if is_tensor(table):
        torch = array_module(table)
        of_row = torch.unique(table + 0.0, dim=0, return_inverse=True)[1].cpu().numpy()  # -0 is 0
        rows = np.argsort(of_row, kind="stable")
    else:
        rows = np.lexsort(table.T)
        ordered = table[rows]
        changes = (ordered[1:] != ordered[:-1]).any(axis=1)
        of_row = np.empty(len(table), dtype=np.int64)
        of_row[rows] = np.concatenate([[0], np.cumsum(changes)])
    size = np.bincount(of_row)
    start = np.cumsum(size) - size
    return _Points(rows[start], size, of_row, rows, start)


@np.errstate(under="ignore")
def _zero_apart(
    distinct: Any, factors: NDArray, indptr: NDArray[np.int64], indices: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which of the distinct rows are at a computed distance of 0 from their nearest one."""
    values = distinct.cpu().numpy() if is_tensor(distinct) else distinct
    other = values[indices[indptr[:-1]]]
    distance = np.zeros(len(values), dtype=values.dtype)
    for f, factor in enumerate(factors):
        scaled = (values[:, f] - other[:, f]) * factor
        distance = distance + scaled * scaled
    return distance == 0


class _Segment(NamedTuple):
    """Pairs of one weight, and groups of it as a label of each row, or -1."""

    num: int
    den: int
    owner: NDArray[np.int64]
    other: NDArray[np.int64]
    groups: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # points


def _ranges(start: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """``start[0], start[0] + 1, ...``, count[0] of them, and so on."""
    ends = np.cumsum(count)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - (ends - count), count)


def _listed_pairs(
    points: _Points,
    listed: NDArray[np.bool_],
    indptr: NDArray[np.int64],
    indices: NDArray[np.int64],
) -> list[_Segment]:
    """The pairs of rows in listed points, by how many neighbours a row has."""
    point = np.flatnonzero(listed)
    if not len(point):
        return []
    per_point = np.diff(indptr)[point]
    near = indices[_ranges(indptr[point], per_point)]  # points
    of = np.repeat(point, per_point)
    twins = point[points.size[point] > 1]  # whose own rows are as near
    near, of = np.concatenate([near, twins]), np.concatenate([of, twins])
    sizes = points.size[near]
    other = points.rows[_ranges(points.start[near], sizes)]
    of = np.repeat(of, sizes)
    owners = points.size[of]
    owner = points.rows[_ranges(points.start[of], owners)]
    other = np.repeat(other, owners)
    apart = owner != other
    owner, other = owner[apart], other[apart]
    count = np.bincount(owner)[owner]
    order = np.lexsort((owner, count))
    owner, other, count = owner[order], other[order], count[order]
    bounds = np.flatnonzero(np.concatenate([[True], count[1:] != count[:-1], [True]]))
    return [_Segment(1, int(count[a]), owner[a:b], other[a:b]) for a, b in pairwise(bounds)]


def _groups(points: _Points, grouped: NDArray[np.bool_]) -> list[_Segment]:
    """The pairs of equal rows, by how many they are: listed if few. Each pair counts twice."""
    segments = []
    for size in np.unique(points.size[grouped]).tolist():
        these = np.flatnonzero(grouped & (points.size == size))
        if size > _LISTED:
            none = np.empty(0, dtype=np.int64)
            segments.append(_Segment(2, size - 1, none, none, these))
            continue
        rows = points.rows[points.start[these][:, None] + np.arange(size)]
        a, b = np.triu_indices(size, 1)
        segments.append(_Segment(2, size - 1, rows[:, a].ravel(), rows[:, b].ravel()))
    return segments


def _joined(segments: list[_Segment], points: _Points) -> Weighted:
    sizes = [len(segment.owner) for segment in segments]
    grouped = [(s, g) for s, segment in enumerate(segments) for g in segment.groups.tolist()]
    number = np.full(len(points.size), -1, dtype=np.int32)
    number[[g for _, g in grouped]] = np.arange(len(grouped))
    label = number[points.of_row][None] if grouped else np.empty((0, len(points.rows)), np.int32)
    pairs = Pairs(
        np.cumsum([0, *sizes]),
        np.concatenate([segment.owner for segment in segments]).astype(np.int32),
        np.concatenate([segment.other for segment in segments]).astype(np.int32),
        label,
        points.size[[g for _, g in grouped]].astype(np.int32),
        np.array([s for s, _ in grouped], dtype=np.int32),
    )
    return Weighted(pairs, [each.num for each in segments], [each.den for each in segments])


def joined(lists: list[Weighted]) -> Pairs:
    """The pairs of several lists over the same rows, with their segments one after another."""
    owned = any(len(each.pairs.owner) for each in lists)
    begin, owner, label, segment = [np.zeros(1, dtype=np.int64)], [], [], []
    segments = groups = 0
    for each, _, _ in lists:
        n = each.label.shape[1]
        begin.append(begin[-1][-1] + each.begin[1:])
        listed = len(each.other) == 0 or len(each.owner)
        owner.append(each.owner if listed else np.arange(n, dtype=np.int32))
        label.append(np.where(each.label < 0, -1, each.label + groups).astype(np.int32))
        segment.append(each.segment + np.int32(segments))
        segments, groups = segments + len(each.begin) - 1, groups + len(each.size)
    return Pairs(
        np.concatenate(begin),
        np.concatenate(owner) if owned else _NONE,
        np.concatenate([each.pairs.other for each in lists]),
        np.concatenate(label),
        np.concatenate([each.pairs.size for each in lists]),
        np.concatenate(segment),
    )


def reordered(pairs: Pairs, position: NDArray[np.int64]) -> Pairs:
    """The pairs where row i has moved to ``position[i]``."""
    owner = pairs.owner
    if not len(owner):
        begin = pairs.begin
        owner = np.arange(begin[-1]) - np.repeat(begin[:-1], np.diff(begin))
    label = np.empty_like(pairs.label)
    label[:, position] = pairs.label
    moved = position.astype(np.int32)
    return pairs._replace(owner=moved[owner], other=moved[pairs.other], label=label)


def numerators(sums: NDArray[np.int64], weighted: Weighted) -> tuple[list[int], int]:
    """``sum_i m_i`` of every row of sums, exactly: integers over one denominator."""
    common = math.lcm(*weighted.den)
    weights = zip(weighted.num, weighted.den, strict=True)
    factors = [num * (common // den) for num, den in weights]
    if len(factors) == 1:
        return [factors[0] * total for total in sums[:, 0].tolist()], common
    return (sums.astype(object) @ np.array(factors, dtype=object)).tolist(), common


class Blocks(NamedTuple):
    """Rows in blocks of rows that are near each other: `order` has them block by block."""

    order: NDArray[np.int64]
    start: RowNumbers  # for each place in that order, where its block begins

    @property
    def position(self) -> NDArray[np.int64]:
        """Where each row is in the order."""
        position = np.empty_like(self.order)
        position[self.order] = np.arange(len(self.order))
        return position


def near_blocks(ranks: NDArray, least: int) -> Blocks:
    """Blocks of at least `least` rows that are near each other, by the ranks of every column.

    A block of twice as many rows is halved, where the sorted values of its widest column change
    nearest to the middle; if they change nowhere with enough rows on both sides, the next widest
    column is taken. Rows that are equal in all columns are one block, however many they are, if
    they are enough.

    Parameters
    ----------
    ranks : array of shape (n, k)
        As `column_ranks` gives them. Columns of any units and shape count alike: of raw values the
        widest column would be halved time and again, and the others never.
    least : int
    """
    order = np.arange(len(ranks))
    start = np.zeros(len(ranks), dtype=np.int32)
    open_blocks = [(0, len(ranks))]
    while open_blocks:
        a, b = open_blocks.pop()
        start[a:b] = a
        middle = _halved(ranks, order[a:b], least) if b - a >= 2 * least else None
        if middle is not None:
            rows, at = middle
            order[a:b] = rows
            open_blocks += [(a, a + at), (a + at, b)]
    return Blocks(order, start)


def column_ranks(table: Any) -> NDArray[np.float64]:
    """How many rows are smaller, and how many at most as large, together: of every value."""
    values = table.cpu().numpy() if is_tensor(table) else table
    ranks = np.empty(values.shape)
    for k, column in enumerate(values.T):
        ordered = np.sort(column)
        ranks[:, k] = np.searchsorted(ordered, column) + np.searchsorted(ordered, column, "right")
    return ranks


def _halved(
    values: NDArray, rows: NDArray[np.int64], least: int
) -> tuple[NDArray[np.int64], int] | None:
    """The rows in order of the column that halves them, and where the second half begins."""
    block = values[rows]
    width = block.max(axis=0) - block.min(axis=0)
    for column in np.argsort(-width, kind="stable").tolist():
        if width[column] == 0:
            return None
        by_value = np.argsort(block[:, column], kind="stable")
        ordered = block[by_value, column]
        inside = ordered[least - 1 : len(rows) - least + 1]
        changes = np.flatnonzero(inside[1:] != inside[:-1]) + least
        if len(changes):
            at = int(changes[np.abs(2 * changes - len(rows)).argmin()])
            return rows[by_value], at
    return None


class NullValues(NamedTuple):
    """T of the data and under permutations, over one denominator."""

    numerators: list[int]  # of the data first
    denominator: int

    def at_least(self) -> int:
        """How many permutations have at least the data's value. Exact."""
        observed, *others = self.numerators
        return sum(other >= observed for other in others)

    def values(self) -> NDArray[np.float64]:
        """Every T as an exact rational rounded once, that of the data first."""
        return np.array([number / self.denominator for number in self.numerators])


def permuted_sums(
    backend: Backend,
    pairs: Pairs,
    R: Any,
    start: RowNumbers | None,
    seed: int,
    count: int,
    ranks: AnyRanks = ONE_RANK,
) -> NDArray[np.int64]:
    """`Backend.permuted_sums` of the first `count` permutations, which ranks share out."""

    def of(some: range) -> NDArray[np.int64]:
        if not some:
            return np.empty((0, len(pairs.begin) - 1), dtype=np.int64)
        return backend.permuted_sums(pairs, R, start, seed, len(some), some.start)

    return np.concatenate(ranks.share_out(count, "the permutations", of))


def permuted_values(
    backend: Backend,
    weighted: Weighted,
    responses: list[Response],
    seed: int,
    n_permutations: int,
    ranks: AnyRanks = ONE_RANK,
) -> NullValues:
    """T(Y, Z) of the data and under permutations of y; with classes the mean of their T.

    All classes are permuted together: the same permutations are drawn for each. Ranks share out the
    permutations.
    """
    scale = math.lcm(*(each.sums.denominator for each in responses))
    values = [0] * (n_permutations + 1)
    for R, sums in responses:
        found = permuted_sums(backend, weighted.pairs, R, None, seed, n_permutations + 1, ranks)
        minima, common = numerators(found, weighted)
        share = scale // sums.denominator
        for b, m in enumerate(minima):
            values[b] += (sums.n * m - sums.sum_L2 * common) * share
    return NullValues(values, scale * common * len(responses))
