"""Samples that are spread over the ranks of a process group: what each has of the matrix, added."""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._checks import counted
from lcodec_ext._torch.batches import NoSamplesError
from lcodec_ext._torch.group import Ranks
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.low_rank import LowRank

_ROWS = 64  # that a rank sends at once


class ShardedRoute(Route):
    """The matrix of all ranks' samples, the sum over ranks of those of their own.

    A mean over all N samples has that of a rank's N_r own with weight N_r / N. A product is one
    reduction of as many numbers as it has.

    Parameters
    ----------
    ranks : Ranks
    objective : Objective
        Of the rank's own samples; there may be none.
    choose : callable
        To the route of these.
    """

    def __init__(
        self, ranks: Ranks, objective: Objective, choose: Callable[[Objective], Route]
    ) -> None:
        self._ranks, self._like = ranks, objective.masked.zeros()
        self._own: Route | None = None
        with ranks.alone("the curvature of a rank's own samples"), suppress(NoSamplesError):
            self._own = choose(objective)
        self._n = n_of_all(ranks, objective)
        self._share = weight_of(objective, self._n)
        own = self._own
        self.graph_bytes = 0 if own is None else own.graph_bytes
        plans = ranks.gather_bytes(b"" if own is None else own.plan.encode())
        self.formed_cheaply = self._all(own is None or own.formed_cheaply)
        of = counted(self._n, "sample")
        first = next(plan for plan in plans if plan)
        self.plan = f"{of} over {ranks.size} ranks, one reduction a product; {first.decode()}"

    def _all(self, own: bool) -> bool:
        return bool(self._ranks.gather(np.array([own], dtype=np.uint8)).all())

    def _total(self, what: str, found: Tensor | None, like: Tensor) -> Tensor | None:
        """The weighted sum, or None where some rank with samples has none."""
        if not self._all(self._own is None or found is not None):
            return None

        def part() -> list[Tensor]:
            return [torch.zeros_like(like) if found is None else found * self._share]

        return self._ranks.total(what, part, [like])[0]

    def product(self, V: Tensor) -> Tensor:
        own = self._own

        def part() -> list[Tensor]:
            return [torch.zeros_like(V) if own is None else own.product(V) * self._share]

        return self._ranks.total("a product", part, [V], given=[V])[0]

    def _asked(
        self, what: str, ask: Callable[[Route], Tensor | None], like: Tensor
    ) -> Tensor | None:
        found = None
        with self._ranks.alone(what):
            if self._own is not None:
                found = ask(self._own)
        return self._total(what, found, like)

    def diagonal(self) -> Tensor | None:
        return self._asked("the diagonal", lambda own: own.diagonal(), self._like)

    def scale(self) -> Tensor | None:
        return self._asked("the diagonal", lambda own: own.scale(), self._like)

    def dense(self) -> Tensor | None:
        p = len(self._like)
        return self._asked("the matrix", lambda own: own.dense(), self._like.new_empty(p, p))

    def low_rank(self, most: int) -> LowRank | None:
        if self._n > most:  # each has a row, at least
            return None
        found = None
        with self._ranks.alone("the rows of the matrix"):
            if self._own is not None:
                found = self._own.low_rank(most)
        if not self._all(self._own is None or found is not None):
            return None
        rows = ShardedRows(self._ranks, found, self._share, self._like)
        return rows if len(rows.weights) <= most else None


class ShardedRows(LowRank):
    """Rows that are spread over ranks, in rank order; none of them leaves its rank but for K."""

    def __init__(self, ranks: Ranks, own: LowRank | None, share: float, like: Tensor) -> None:
        self._ranks, self._own, self._like = ranks, own, like
        counts = ranks.gather(np.array([0 if own is None else len(own.weights)], np.int64))[:, 0]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        weights = like.new_zeros(self._starts[-1])
        if own is not None:
            weights[self._rows(ranks.rank)] = own.weights.to(like) * share
        self.weights = ranks.add(weights)

    def _rows(self, rank: int) -> slice:
        return slice(self._starts[rank], self._starts[rank + 1])

    def gram(self) -> Tensor:
        """R R^T: every rank but the first sends its rows once."""
        ranks, own, k = self._ranks, self._own, self._starts[-1]
        mine = self._rows(ranks.rank)
        K = self._like.new_zeros(k, k)
        for rank in range(1, ranks.size):
            for start in range(self._starts[rank], self._starts[rank + 1], _ROWS):
                stop = min(start + _ROWS, self._starts[rank + 1])
                rows = self._like.new_zeros(len(self._like), stop - start)
                with ranks.alone("the rows of the matrix"):
                    if rank == ranks.rank:
                        assert own is not None
                        unit = rows.new_zeros(mine.stop - mine.start, stop - start)
                        unit[start - mine.start :].fill_diagonal_(1)
                        rows = own.lift(unit)
                rows = ranks.broadcast(rows.contiguous(), rank)
                with ranks.alone("the products of rows"):
                    if rank > ranks.rank and own is not None:
                        K[mine, start:stop] = own.project(rows)

        def part() -> list[Tensor]:
            if own is not None:
                K[mine, mine] = own.gram() / 2
            return [K]

        upper = ranks.total("the products of rows", part, [K])[0]
        return upper + upper.T

    def project(self, B: Tensor) -> Tensor:
        out = B.new_zeros(self._starts[-1], B.shape[1])

        def part() -> list[Tensor]:
            if self._own is not None:
                out[self._rows(self._ranks.rank)] = self._own.project(B)
            return [out]

        return self._ranks.total("a product with the rows", part, [out], given=[B])[0]

    def lift(self, C: Tensor) -> Tensor:
        out = C.new_zeros(len(self._like), C.shape[1])

        def part() -> list[Tensor]:
            return [out if self._own is None else self._own.lift(C[self._rows(self._ranks.rank)])]

        return self._ranks.total("a combination of the rows", part, [out], given=[C])[0]


def weight_of(objective: Objective, n: int) -> float:
    """What a rank's own matrix, or gradient, is multiplied with in that of all n samples."""
    return objective.n_samples / n if objective.reduction == "mean" else 1.0


def n_of_all(ranks: Ranks, objective: Objective) -> int:
    """How many samples all ranks have; refuse none, and means over labels ignored unequally."""
    ignored, labels = objective.ignored or (0, 0)
    told = ranks.gather(np.array([objective.n_samples, ignored, labels], np.int64))
    known = [(k, of) for _, k, of in told.tolist() if of]
    for k, of in known:
        if k * known[0][1] != known[0][0] * of and objective.reduction == "mean":
            raise ValueError(
                f"loss_fn ignores {known[0][0]:,} of {known[0][1]:,} labels of a batch on one rank "
                f"of the group, and {k:,} of {of:,} on another: ranks count by their samples, "
                "which is not the mean over the valid labels. Pass reduction='sum' with a loss "
                "that sums, and multiply the operator with 1 / (number of valid labels)"
            )
    if not (n := int(told[:, 0].sum())):
        raise NoSamplesError("data is empty on every rank of the group: it has no batch")
    return n


def gradient(ranks: Ranks, objective: Objective) -> Tensor:
    """The gradient of the objective of all ranks' samples, shape (p,)."""
    found = objective.masked.zeros()
    with ranks.alone("the gradient of a rank's own samples"), suppress(NoSamplesError):
        found = objective.gradient()
    n = n_of_all(ranks, objective)
    return ranks.total("the gradient", lambda: [found * weight_of(objective, n)], [found])[0]
