"""xi where y is permuted against x: one pass over the ranks for each permutation."""

from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import tie_hash
from lcodec_ext.dependence.backends.base import Pairs, Ties


class Path:
    """The length of a response in the order of x, as a sum of minima over pairs of rows.

    ``abs(a - b) = a + b - 2 min(a, b)``, so that a length is a constant less ``sum_s weights[s]
    sums[s]``, where ``sums[s]`` adds min(R_i, R_j) over the pairs of a segment; R_i itself is that
    of row i with itself. Where tied rows are averaged, the pairs between two groups are those of
    both as one, less their own.
    """

    def __init__(self, x: NDArray[np.float64], ties: Ties, seed: int) -> None:
        n = len(x)
        words = tie_hash(seed, n) if ties == "random" else np.zeros(n, dtype=np.uint64)
        order = np.lexsort((words, x))
        first = np.append(True, np.diff(x[order]) != 0)
        if ties != "average" or first.all():
            ends = order[[0, -1]]
            self.weights = [Fraction(2), Fraction(1)]
            self.pairs = _pairs(n, [(order[:-1], order[1:]), (ends, ends)])
            return
        group = np.empty(n, dtype=np.int64)
        group[order] = np.cumsum(first) - 1
        self._average(group, np.bincount(group))

    def _average(self, group: NDArray[np.int64], size: NDArray[np.int64]) -> None:
        before, after = np.append(0, size[:-1]), np.append(size[1:], 0)
        kinds, kind = np.unique(np.array([size, before, after]), axis=1, return_inverse=True)
        weights: dict[Fraction, int] = {}

        def segments(values: list[Fraction]) -> NDArray[np.int64]:
            return np.array([weights.setdefault(value, len(weights)) for value in values])

        own, joint, rows = [], [], []
        for s, left, right in kinds.T.tolist():
            shares = [Fraction(2, s * t) if t else Fraction(0) for t in (left, right)]
            own.append(Fraction(4, s) - sum(shares))
            joint.append(shares[1])
            rows.append(-Fraction(2 * s - 2 + (left > 0) + (right > 0), s))
        kind = kind.ravel()
        own_segment, joint_segment, row_segment = (segments(v)[kind] for v in (own, joint, rows))
        single = row_segment[group]
        listed = [np.flatnonzero(single == s) for s in range(len(weights))]
        groups = len(size)
        label = np.full((3, len(group)), -1)
        label[0] = group
        for parity in (0, 1):  # groups taken as 01 23 45 ..., and as 0 12 34 ...
            lower = group - (group + parity) % 2
            paired = (lower >= 0) & (lower + 1 < groups)
            label[1 + parity, paired] = groups + lower[paired]
        self.weights = list(weights)
        self.pairs = _pairs(
            len(group),
            [(rows, rows) for rows in listed],
            label,
            np.concatenate([size, size[:-1] + size[1:]]),
            np.concatenate([own_segment, joint_segment[:-1]]),
        )

    def exceeding(self, sums: NDArray[np.int64]) -> int:
        """How many permutations have a length of at most that of the data, which come first."""
        weights = np.array([float(weight) for weight in self.weights])
        close = sums @ weights
        slack = 1e-12 * (sums @ np.abs(weights)).max()
        beyond = int((close[1:] > close[0] + slack).sum())
        near = sums[1:][np.abs(close[1:] - close[0]) <= slack]
        over = lcm(*(weight.denominator for weight in self.weights))
        exact = [int(weight * over) for weight in self.weights]
        distinct, counts = np.unique(near - sums[0], axis=0, return_counts=True)
        for difference, times in zip(distinct.tolist(), counts.tolist(), strict=True):
            total = sum(w * d for w, d in zip(exact, difference, strict=True))
            beyond += times if total >= 0 else 0
        return beyond


def _pairs(
    n: int,
    listed: list[tuple[NDArray, NDArray]],
    label: NDArray | None = None,
    size: NDArray | None = None,
    segment: NDArray | None = None,
) -> Pairs:
    lengths = [len(first) for first, _ in listed]
    first, second = (np.concatenate(each).astype(np.int32) for each in zip(*listed, strict=True))
    none = np.empty(0, dtype=np.int32)
    return Pairs(
        np.cumsum([0, *lengths], dtype=np.int64),
        first,
        second,
        np.empty((0, n), dtype=np.int32) if label is None else label.astype(np.int32),
        none if size is None else size.astype(np.int32),
        none if segment is None else segment.astype(np.int32),
    )
