"""A way to multiply by the matrix of an objective."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcodec_ext.curvature.routes.low_rank import LowRank

if TYPE_CHECKING:
    from lcodec_ext.curvature.objective import Objective

CACHE_BYTES = 2**29  # of what is kept from one product to the next
FEW_ROWS = 2048  # of a matrix of low rank that is solved in its rows


def cache_bytes(objective: "Objective") -> int:
    """Of what may be kept from one product to the next."""
    return CACHE_BYTES if objective.cache_bytes is None else objective.cache_bytes


class Route(ABC):
    """A way to multiply by the matrix of an objective."""

    plan: str  # which way and why, for people
    graph_bytes = 0  # of the graphs of all batches, whether they are kept or not
    formed_cheaply = True  # whether the matrix costs less than p products through the model

    @abstractmethod
    def product(self, V: Tensor) -> Tensor:
        """The matrix times the columns of V, shape (p, m)."""

    def diagonal(self) -> Tensor | None:
        """The diagonal, where it costs less than p products."""
        return None

    def scale(self) -> Tensor | None:
        """A positive stand-in for a diagonal that costs p products, where there is one."""
        return None

    def low_rank(self, most: int) -> LowRank | None:
        """The matrix by at most so many rows, where it has such a form."""
        return None

    def dense(self) -> Tensor | None:
        """The matrix itself, where it costs less than p products."""
        return None


def pull(
    values: Sequence[Tensor], by: Sequence[Tensor], seeds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """sum seeds . d values / d by, keeping the graph; zeros where nothing depends."""
    pairs = [(v, s) for v, s in zip(values, seeds, strict=True) if v.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in by]
    roots, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(roots, by, seeds, retain_graph=True, materialize_grads=True)


def gradient_graph(loss: Tensor, by: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient by some tensors, with its graph; zeros where nothing depends."""
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in by]
    return torch.autograd.grad(loss, by, create_graph=True, materialize_grads=True)
