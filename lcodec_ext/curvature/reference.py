"""Products with curvature matrices by their definition, in the two written orders of their sums.

`CpuTree` and `CudaTree` are the trees of ``lcodec/curvature.hpp`` and
``lcodec/cuda_curvature.hpp``: in the dtype of the vectors the kernels return the bits that the
functions here return.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Segments = Sequence[Sequence[int]]  # pairs (start, length)


class Tree(Protocol):
    """Where the parentheses are in sums over columns and over rows."""

    def dots(self, x: NDArray, v: NDArray, segments: Segments) -> NDArray:
        """The selected columns of every row of x, times v."""
        ...

    def sum(self, columns: NDArray, factors: NDArray) -> NDArray:
        """The sum over rows i of factors_i columns_i. At least one row."""
        ...

    def roundings(self, n: int, segments: Segments) -> int:
        """How many roundings a term passes at most: q of the bound gamma_q."""
        ...


class CpuTree:
    """The CPU's: as many lanes as 128 bytes hold, 64 chunks of rows at most.

    Parameters
    ----------
    itemsize : int
        Bytes of what is computed in: 4 or 8.
    """

    def __init__(self, itemsize: int) -> None:
        self.lanes = 128 // itemsize

    def dots(self, x: NDArray, v: NDArray, segments: Segments) -> NDArray:
        lanes = np.zeros((self.lanes, len(x)), v.dtype)
        offset = 0
        for start, length in segments:
            lanes = _lanes(x[:, start : start + length] * v[offset : offset + length], lanes)
            offset += length
        return _halves(lanes)

    def sum(self, columns: NDArray, factors: NDArray) -> NDArray:
        rows = self._chunk_rows(len(columns))
        zero = np.zeros(columns.shape[1], columns.dtype)
        chunks = [
            _in_order([zero, *(factors[c : c + rows, None] * columns[c : c + rows])])
            for c in range(0, len(columns), rows)
        ]
        step = 1
        while step < len(chunks):
            for c in range(0, len(chunks) - step, 2 * step):
                chunks[c] = chunks[c] + chunks[c + step]
            step *= 2
        return chunks[0]

    def roundings(self, n: int, segments: Segments) -> int:
        in_lane = sum(_quotient_up(length, self.lanes) for _, length in segments)
        chunks = _quotient_up(n, self._chunk_rows(n))
        in_dot = 1 + in_lane + _levels(self.lanes)
        return in_dot + min(n, self._chunk_rows(n)) + _levels(chunks) + 5

    def _chunk_rows(self, n: int) -> int:
        return max(32, _quotient_up(n, 64))


class CudaTree:
    """CUDA's: tiles of 4096 columns, groups of 32 rows.

    Parameters
    ----------
    itemsize : int
        Bytes of what the matrix is stored in: 2, 4 or 8.
    chunk_bytes : int
        Of rows that are taken in one launch.
    """

    def __init__(self, itemsize: int, chunk_bytes: int) -> None:
        self.itemsize, self.chunk_bytes = itemsize, chunk_bytes

    def dots(self, x: NDArray, v: NDArray, segments: Segments) -> NDArray:
        products = select(x, segments) * v
        tiles = []
        for start in range(0, max(products.shape[1], 1), 4096):
            lanes = np.zeros((256, len(x)), v.dtype)
            lanes = _lanes(products[:, start : start + 4096], lanes).reshape(8, 32, -1)
            tiles.append(_halves(_halves(lanes.transpose(1, 0, 2))))
        return _in_order(tiles)

    def sum(self, columns: NDArray, factors: NDArray) -> NDArray:
        groups = self._groups(*columns.shape)
        zero = np.zeros(columns.shape[1], columns.dtype)
        partial: list[NDArray] = []
        for k, start in enumerate(range(0, len(columns), 32)):
            rows = slice(start, start + 32)
            total = _in_order([zero, *(factors[rows, None] * columns[rows])])
            if k < groups:
                partial.append(total)
            else:
                partial[k % groups] = partial[k % groups] + total
        return _halves(np.stack([_in_order([zero, *partial[lane::8]]) for lane in range(8)]))

    def roundings(self, n: int, segments: Segments) -> int:
        size = sum(length for _, length in segments)
        groups = self._groups(n, size)
        in_dot = 9 + min(16, _quotient_up(size, 256)) + _quotient_up(size, 4096)
        chunks = _quotient_up(n, 32 * groups)
        return in_dot + 8 + min(32, n) + chunks + _quotient_up(groups, 8)

    def _groups(self, n: int, size: int) -> int:
        most = min(max(_quotient_up(n, 32), 1), 1024)
        return min(max(self.chunk_bytes // (32 * max(size, 1) * self.itemsize), 1), most)


def select(x: NDArray, segments: Segments) -> NDArray:
    """The selected columns, side by side."""
    parts = [x[:, start : start + length] for start, length in segments]
    return np.concatenate([x[:, :0], *parts], axis=1)


def masked_gram_product(
    tree: Tree,
    G: NDArray,
    V: NDArray,
    segments: Segments,
    weights: NDArray | None,
    damping: float,
) -> NDArray:
    """``(1/N) sum_i w_i g_i (g_i . v) + damping v`` for every row v of V."""

    def factors(dots: NDArray) -> NDArray:
        return dots if weights is None else weights[:, None] * dots

    return _product(tree, G, V, segments, damping, factors)


def softmax_rows_product(
    tree: Tree,
    A: NDArray,
    P: NDArray,
    V: NDArray,
    weights: NDArray | None,
    damping: float,
) -> NDArray:
    """``Q^T A + damping V``, where Q_ij is ``w_i p_ij (u_ij - p_i . u_i) / N`` and U = A V^T."""

    def factors(dots: NDArray) -> NDArray:
        mean = np.zeros(len(P), P.dtype)
        for j in range(P.shape[1]):
            mean = mean + P[:, j] * dots[:, j]
        q = P * (dots - mean[:, None])
        return q if weights is None else weights[:, None] * q

    return _product(tree, A, V, [(0, A.shape[1])], damping, factors)


def _product(
    tree: Tree,
    x: NDArray,
    V: NDArray,
    segments: Segments,
    damping: float,
    factors: Callable[[NDArray], NDArray],
) -> NDArray:
    """Sums of the rows times factors(dots of rows and vectors), each column by itself."""
    damped = V.dtype.type(damping) * V
    if len(x) == 0 or V.size == 0:
        return damped
    dots = np.stack([tree.dots(x, v, segments) for v in V], axis=1)
    columns = select(x, segments)
    sums = np.stack([tree.sum(columns, c) for c in factors(dots).T])
    return sums / V.dtype.type(len(x)) + damped


def factored_gram(Delta: NDArray, A: NDArray, cuda: bool = False) -> NDArray:
    """``(Delta Delta^T) * (A A^T)``, with the CPU's dots or CUDA's."""
    dots = _cuda_gram if cuda else _cpu_gram
    return dots(Delta) * dots(A)


def _cpu_gram(x: NDArray) -> NDArray:
    tree = CpuTree(x.itemsize)
    return np.stack([tree.dots(x, row, [(0, len(row))]) for row in x])


def _cuda_gram(x: NDArray) -> NDArray:
    dots = np.zeros((len(x), len(x)), x.dtype)
    for start in range(0, x.shape[1], 32):
        step = np.zeros_like(dots)
        for column in x.T[start : start + 32]:
            step = step + column[:, None] * column
        dots = dots + step
    return dots


def _quotient_up(a: int, b: int) -> int:
    return -(-a // b)


def _levels(parts: int) -> int:
    """Levels of a binary tree over so many parts."""
    return max(parts - 1, 0).bit_length()


def _halves(parts: NDArray) -> NDArray:
    """The sum over axis 0, whose length is a power of two."""
    while len(parts) > 1:
        parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
    return parts[0]


def _in_order(parts: Iterable[NDArray]) -> NDArray:
    first, *others = parts
    for part in others:
        first = first + part
    return first


def _lanes(products: NDArray, lanes: NDArray) -> NDArray:
    """Lane l with the columns l, l + len(lanes), ... added to it in order."""
    lanes = lanes.copy()
    for j in range(0, products.shape[1], len(lanes)):
        piece = products[:, j : j + len(lanes)].T
        lanes[: len(piece)] = lanes[: len(piece)] + piece
    return lanes
