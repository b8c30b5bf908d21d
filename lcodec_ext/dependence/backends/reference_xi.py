"""The sums behind xi as they are defined: O(n^2), plain Python. Twin of ``_xi_sums.py``."""

from fractions import Fraction
from itertools import combinations, groupby, pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._random import tie_hash


def ranks(y: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Max ranks from below and from above, counted."""
    values = y.tolist()
    R = [sum(other <= value for other in values) for value in values]
    L = [sum(other >= value for other in values) for value in values]
    return np.array(R, dtype=np.int64), np.array(L, dtype=np.int64)


def path_length(x: NDArray[Any], R: NDArray[np.int64], ties: str, seed: int) -> Fraction:
    """Sum of |R_(k+1) - R_(k)| in the order of x; with ties="average" its expectation."""
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


def null_variance(R: NDArray[np.int64]) -> int:
    """n^6 (a - 2 b + c^2), from all pairs k_ij = min(R_i, R_j)."""
    rs = R.tolist()
    n = len(rs)
    rows = [[min(a, b) for b in rs] for a in rs]
    squares = sum(k * k for row in rows for k in row)
    sums = [sum(row) for row in rows]
    return n * n * squares - 2 * n * sum(s * s for s in sums) + sum(sums) ** 2
