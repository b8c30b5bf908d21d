"""Rows of a Gauss-Newton matrix, sample by sample."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext.curvature.masked.model import ForwardPass
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import (
    MAX_BYTES,
    SampleGradients,
    gradients_by_seeds,
    has_factors,
    pieces,
)
from lcodec_ext.curvature.routes.base import _gradient, _pull

_FEW_OUTPUTS = 64  # whose second derivatives are formed for a diagonal


def output_hessians(objective: Objective, outputs: Tensor, batch: Batch) -> Tensor:
    """Second derivatives of every sample's loss by its own outputs, shape (n, C, C)."""
    z = outputs.detach().requires_grad_()
    n = batch.size
    loss = objective.loss(z, batch) * (n if objective.reduction == "mean" else 1)
    (gradient,) = _gradient(loss, [z])
    gradient = gradient.reshape(n, -1)
    rows = [
        _pull([gradient[:, c].sum()], [z], [torch.ones_like(loss)])[0]
        for c in range(gradient.shape[1])
    ]
    blocks = torch.stack([row.reshape(n, -1) for row in rows], 1)
    if not torch.isfinite(blocks).all():
        raise ValueError("the second derivative of the loss by the outputs is NaN or infinite")
    return blocks


Blocks = Iterator[tuple[Tensor, SampleGradients]]


def _gauss_newton_rows(
    objective: Objective, most: float = math.inf, what: str = ""
) -> Iterator[tuple[Batch, Blocks | None]]:
    """J_i^T e for every sample and every eigenvector e of its loss's second derivative.

    Of every batch; None where outputs are many or not by sample, or rows are more than most.
    """
    for key, batch in pieces(objective, MAX_BYTES, what):
        run = objective.run(batch)
        with twice_differentiable():
            outputs, n = run.outputs, batch.size
            if (
                not isinstance(outputs, Tensor)
                or not outputs.requires_grad
                or len(outputs) != n
                or outputs.numel() > n * _FEW_OUTPUTS
                or outputs.numel() // n * objective.n_samples > most
                or not objective.is_plain(outputs, batch, key)
                or not has_factors(objective, run, batch, key)
            ):
                yield batch, None
                return
            values, vectors = torch.linalg.eigh(output_hessians(objective, outputs, batch).double())
            values, vectors = values.to(outputs.dtype), vectors.to(outputs.dtype)

        def blocks(
            run: ForwardPass = run, values: Tensor = values, vectors: Tensor = vectors, n: int = n
        ) -> Blocks:
            for c in range(values.shape[1]):
                if values[:, c].any():
                    seeds = vectors[:, :, c].reshape(run.outputs.shape)
                    with twice_differentiable():
                        gradients = gradients_by_seeds(
                            objective.masked, run, [run.outputs], [seeds], n
                        )
                    # of the mean over the batch, as the share of the batch expects
                    yield values[:, c] / (n if objective.reduction == "mean" else 1), gradients

        yield batch, blocks()


def gauss_newton_diagonal(objective: Objective) -> Tensor | None:
    """The diagonal of the Gauss-Newton matrix, where outputs are few: C backward passes."""
    total = torch.zeros_like(objective.masked.theta)
    for batch, blocks in _gauss_newton_rows(objective, what="diagonal"):
        if blocks is None:
            return None
        for weights, gradients in blocks:
            total += gradients.combine_squares(weights) * objective.share(batch)
    return total
