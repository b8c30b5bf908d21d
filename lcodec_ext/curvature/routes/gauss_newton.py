"""Rows of a Gauss-Newton matrix, sample by sample."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import (
    MAX_BYTES,
    SampleGradients,
    gradients_by_seeds,
    has_factors,
    pieces,
)
from lcodec_ext.curvature.routes.base import gradient_graph, pull

_FEW_OUTPUTS = 64  # whose second derivatives are formed for a diagonal


def output_hessians(objective: Objective, outputs: Tensor, batch: Batch) -> Tensor:
    """Second derivatives of every sample's loss by its own outputs, shape (n, C, C)."""
    z = outputs.detach().requires_grad_()
    n = batch.size
    loss = objective.loss(z, batch) * (n if objective.reduction == "mean" else 1)
    (gradient,) = gradient_graph(loss, [z])
    gradient = gradient.reshape(n, -1)
    rows = [
        pull([gradient[:, c].sum()], [z], [torch.ones_like(loss)])[0]
        for c in range(gradient.shape[1])
    ]
    blocks = torch.stack([row.reshape(n, -1) for row in rows], 1)
    if not torch.isfinite(blocks).all():
        raise ValueError("the second derivative of the loss by the outputs is NaN or infinite")
    return blocks


class NoRowsError(Exception):
    """Outputs are many or not by sample, or rows are more than were asked for."""


def gauss_newton_rows(
    objective: Objective, most: float = math.inf, what: str = ""
) -> Iterator[tuple[Tensor, float, SampleGradients]]:
    """J_i^T e for every sample and every eigenvector e of its loss's second derivative.

    Yields the eigenvalues and the share that they have in the objective, and these rows; raises
    NoRowsError.
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
                raise NoRowsError
            values, vectors = torch.linalg.eigh(output_hessians(objective, outputs, batch).double())
            values, vectors = values.to(outputs.dtype), vectors.to(outputs.dtype)
        for c in range(values.shape[1]):
            if values[:, c].any():
                seeds = vectors[:, :, c].reshape(outputs.shape)
                with twice_differentiable():
                    rows = gradients_by_seeds(objective.masked, run, [outputs], [seeds], n)
                # of the mean over the batch, as the share of the batch expects
                each = values[:, c] / (n if objective.reduction == "mean" else 1)
                yield each, objective.share(batch), rows


def gauss_newton_diagonal(objective: Objective) -> Tensor | None:
    """The diagonal of the Gauss-Newton matrix, where outputs are few: C backward passes."""
    total = objective.masked.zeros()
    try:
        for values, share, rows in gauss_newton_rows(objective, what="diagonal"):
            total += rows.combine_squares(values) * share
    except NoRowsError:
        return None
    return total
