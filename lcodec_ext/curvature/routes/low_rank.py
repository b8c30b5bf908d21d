"""Matrices of low rank: rows that are stored, or products of factors."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcodec_ext.curvature.kernels import factored_gram
from lcodec_ext.curvature.per_sample import SampleGradients


class LowRank(ABC):
    """A matrix R^T diag(weights) R with k rows in R, which need not be stored."""

    weights: Tensor  # (k,)

    @abstractmethod
    def gram(self) -> Tensor:
        """R R^T."""

    @abstractmethod
    def project(self, B: Tensor) -> Tensor:
        """R B for B of shape (p, m)."""

    @abstractmethod
    def lift(self, C: Tensor) -> Tensor:
        """R^T C for C of shape (k, m)."""


@dataclass(frozen=True)
class StoredRows(LowRank):
    """R itself, in pieces of some rows."""

    pieces: tuple[Tensor, ...]
    weights: Tensor

    def gram(self) -> Tensor:
        return torch.cat([torch.cat([a @ b.T for b in self.pieces], 1) for a in self.pieces])

    def project(self, B: Tensor) -> Tensor:
        return torch.cat([piece @ B for piece in self.pieces])

    def lift(self, C: Tensor) -> Tensor:
        total = C.new_zeros(self.pieces[0].shape[1], C.shape[1])
        for piece, part in zip(
            self.pieces, torch.split(C, [len(piece) for piece in self.pieces]), strict=True
        ):
            total.addmm_(piece.T, part)
        return total


class FactoredRows(LowRank):
    """Rows L_ik (x) a_i: k outer products for each of n samples."""

    def __init__(self, L: Tensor, A: Tensor, share: float) -> None:
        self._L, self._A = L, A  # (n, k, r), (n, D)
        self.weights = A.new_full((L.shape[0] * L.shape[1],), share)

    def gram(self) -> Tensor:
        k = self._L.shape[1]
        return factored_gram(self._L.flatten(0, 1), self._A.repeat_interleave(k, 0))

    def project(self, B: Tensor) -> Tensor:
        r = self._L.shape[2]
        U = torch.einsum("nd,rdm->nrm", self._A, B.reshape(r, -1, B.shape[1]))
        return (self._L @ U).flatten(0, 1)

    def lift(self, C: Tensor) -> Tensor:
        n, k, _ = self._L.shape
        Q = self._L.transpose(1, 2) @ C.reshape(n, k, -1)
        return torch.einsum("nrm,nd->rdm", Q, self._A).flatten(0, 1)


class PlainRows(LowRank):
    """Gradients of samples that are outer products, one for each parameter."""

    def __init__(self, gradients: Sequence[SampleGradients], weights: Tensor) -> None:
        self._gradients, self.weights = gradients, weights

    def gram(self) -> Tensor:
        n = len(self.weights)
        total = self.weights.new_zeros(n, n)
        for parameter in zip(*(each.plain() for each in self._gradients), strict=True):
            D, x = (torch.cat(parts) for parts in zip(*parameter, strict=True))
            total += factored_gram(D, x)
        return total

    def project(self, B: Tensor) -> Tensor:
        columns = [torch.cat([g.dot(column) for g in self._gradients]) for column in B.T]
        return torch.stack(columns, 1)

    def lift(self, C: Tensor) -> Tensor:
        total = C.new_zeros(self._gradients[0].size, C.shape[1])
        for gradients, part in zip(
            self._gradients, torch.split(C, [g.n for g in self._gradients]), strict=True
        ):
            for out, column in zip(total.T, part.T, strict=True):
                out += gradients.combine(column)
        return total


class KeptRows:
    """Gradients of samples as they are kept: as factors where these are plain, else stored.

    Factors are smaller then, and products with them cheaper.

    Attributes
    ----------
    plain : bool
        Whether the first gradients are outer products.
    complete : bool
        Whether all of them take no more than max_bytes; else none is kept.
    """

    def __init__(self, chunks: Iterable[SampleGradients], max_bytes: int) -> None:
        self.factors: list[SampleGradients] = []
        self.stored: list[Tensor] = []
        self.plain, self.complete = False, True
        n_bytes = 0
        for gradients in chunks:
            self.plain = gradients.is_plain() if not n_bytes else self.plain
            if self.plain:
                self.factors.append(gradients)
                n_bytes += gradients.nbytes
            else:
                self.stored.append(gradients.dense())
                n_bytes += self.stored[-1].nbytes
            if n_bytes > max_bytes:
                self.factors, self.stored, self.complete = [], [], False
                break

    def low_rank(self, weights: Tensor) -> LowRank:
        """The matrix of these rows with weights."""
        if self.plain:
            return PlainRows(self.factors, weights)
        return StoredRows(tuple(self.stored), weights)


class StackedRows(LowRank):
    """A linear combination of matrices of low rank, their rows one after another."""

    def __init__(self, terms: Sequence[tuple[float, LowRank]]) -> None:
        self._lows = [low for _, low in terms]
        self.weights = torch.cat([factor * low.weights for factor, low in terms])

    def gram(self) -> Tensor:
        blocks = [
            [low.gram() if i == j else None for j, _ in enumerate(self._lows)]
            for i, low in enumerate(self._lows)
        ]
        for j, right in enumerate(self._lows):
            k = len(right.weights)
            for i, left in enumerate(self._lows[:j]):
                block = left.weights.new_empty(len(left.weights), k)
                for start in range(0, k, 64):
                    unit = block.new_zeros(k, min(64, k - start))
                    unit[start:].fill_diagonal_(1)
                    block[:, start : start + 64] = left.project(right.lift(unit))
                blocks[i][j], blocks[j][i] = block, block.T
        return torch.cat([torch.cat(row, 1) for row in blocks])  # type: ignore[arg-type]

    def project(self, B: Tensor) -> Tensor:
        return torch.cat([low.project(B) for low in self._lows])

    def lift(self, C: Tensor) -> Tensor:
        parts = torch.split(C, [len(low.weights) for low in self._lows])
        return torch.stack(
            [low.lift(part) for low, part in zip(self._lows, parts, strict=True)]
        ).sum(0)
