"""The empirical Fisher matrix."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lcodec_ext._checks import counted
from lcodec_ext.curvature.kernels import masked_gram_product
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import MAX_BYTES, SampleGradients, chunks
from lcodec_ext.curvature.routes import base
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.low_rank import KeptRows, LowRank, PlainRows, StoredRows


class FisherRoute(Route):
    """sum_i g_i g_i^T by gradients of samples: stored, as factors, or formed again every time."""

    def __init__(self, objective: Objective) -> None:
        self._objective, most = objective, base.cache_bytes(objective)
        kept = KeptRows(self._chunks("gradients of samples"), most)
        self.stored = tuple(kept.stored)
        self._factors = tuple(kept.factors)
        if not kept.complete and not kept.plain:
            self._factors = self._factors_within(most)
        if not self.stored and not self._factors:
            for _ in objective.passes():  # the first one that is complete counts the samples
                pass
        samples = counted(objective.n_samples, "sample")
        beyond = f"they take more than {most >> 20} MiB"
        if self.stored:
            entries = counted(objective.masked.size, "entry", "entries")
            self.plan = f"stored gradients: {samples} of {entries}, one pass over them a product"
        elif kept.complete:
            self.plan = f"factored rows: the gradients of {samples} are outer products"
        elif self._factors:
            self.plan = (
                f"factored rows: the gradients of {samples} are sums of outer products over "
                f"positions; stored, {beyond}"
            )
        else:
            self.plan = f"gradients of {samples}, formed again for every product: kept, {beyond}"

    def _factors_within(self, max_bytes: int) -> tuple[SampleGradients, ...]:
        """Factors of all gradients; none where some have none, or they take more memory."""
        kept, n_bytes = [], 0
        for gradients in self._chunks("factors of gradients"):
            kept.append(gradients)
            n_bytes += gradients.nbytes
            if n_bytes > max_bytes or not gradients.factors:
                return ()
        return tuple(kept)

    def _chunks(self, what: str = "") -> Iterator[SampleGradients]:
        return chunks(self._objective, MAX_BYTES, what)

    def product(self, V: Tensor) -> Tensor:
        if self.stored:
            return stored_product(self.stored, V, None, self._objective.sample_share)
        total = torch.zeros_like(V)
        for gradients in self._factors or self._chunks():
            for out, column in zip(total.T, V.T, strict=True):
                out += gradients.combine(gradients.dot(column) * self._objective.sample_share)
        return total

    def diagonal(self) -> Tensor:
        total = self._objective.masked.zeros()
        for G in self.stored:
            total += G.square().sum(0)
        if not self.stored:
            for gradients in self._factors or self._chunks():
                total += gradients.combine_squares(total.new_ones(gradients.n))
        return total * self._objective.sample_share

    def dense(self) -> Tensor:
        p = self._objective.masked.size
        total = self._objective.masked.zeros(p, p)
        for G in self.stored or (g.dense() for g in self._factors or self._chunks("matrix")):
            total.addmm_(G.T, G)
        return total * self._objective.sample_share

    def low_rank(self, most: int) -> LowRank | None:
        n = self._objective.n_samples
        weights = self._objective.masked.zeros(n) + self._objective.sample_share
        if n > most:
            return None
        if self.stored:
            return StoredRows(self.stored, weights)
        if self._factors and all(gradients.is_plain() for gradients in self._factors):
            return PlainRows(self._factors, weights)
        return None


def stored_product(
    pieces: Sequence[Tensor], V: Tensor, segments: Tensor | None, share: float
) -> Tensor:
    """share * sum_i g_i (g_i . V) over the selected columns of stored rows g_i."""
    if segments is None:
        segments = torch.tensor([[0, len(V)]], device=V.device)
    total = torch.zeros_like(V)
    for G in pieces:
        total.add_(masked_gram_product(G, V, segments), alpha=share * len(G))
    return total
