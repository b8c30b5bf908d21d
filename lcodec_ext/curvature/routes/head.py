"""Factored rows: a layer whose outputs are the model's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import known_loss
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext.curvature.kernels import softmax_rows_product
from lcodec_ext.curvature.layers import is_linear
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.curvature.masked.model import ForwardPass
from lcodec_ext.curvature.masked.rows import is_convolution, patches
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import MAX_BYTES
from lcodec_ext.curvature.routes.base import Route, gradient_graph, pull
from lcodec_ext.curvature.routes.gauss_newton import gauss_newton_diagonal
from lcodec_ext.curvature.routes.low_rank import FactoredRows, LowRank


@dataclass(frozen=True)
class _Head:
    """One layer of selected rows that gives the model's outputs, in a batch."""

    A: Tensor  # (n, D): its inputs, with ones for the bias
    z: Tensor  # (n, C): its outputs
    units: Tensor  # (r,)


def find_head(objective: Objective, run: ForwardPass) -> _Head | None:
    """The head, if all selected units are of one layer whose outputs, or their means, are z."""
    layout = objective.masked.layout
    z = run.outputs
    if not isinstance(layout, UnitLayout) or len(layout.blocks) > 1:
        return None
    if objective.masked.whole or len(run.layer_outputs) != 1:
        return None
    if not isinstance(z, Tensor) or len(run.values) != 1:
        return None
    added, ((out, version),) = run.calls[0], run.layer_outputs
    if out._version != version:  # changed in place: the layer's own output is lost
        return None
    module, axis, places = added.rows.module, added.axis, added.rows.places
    if places is None:
        return None
    x = added.input
    if is_linear(module) and _only_views(z, out):
        A, z = x.reshape(-1, x.shape[-1]), z.detach().reshape(-1, out.shape[-1])
    elif is_convolution(module) and module.groups == 1 and _is_mean(z, out, axis):
        A, z = _mean_patches(module, x), z.detach().reshape(len(out), -1)
    else:
        return None
    keys = {each.rows.key for each in run.calls}
    if "weight" not in keys:
        return None
    if "bias" in keys:
        A = torch.cat([A, A.new_ones(len(A), 1)], 1)
    return _Head(A.detach().contiguous(), z, places)


_VIEWS = ("ViewBackward", "UnsafeViewBackward", "SqueezeBackward", "UnsqueezeBackward")
_MEANS = ("MeanBackward", *_VIEWS)


def _between(z: Tensor, out: Tensor, allowed: tuple[str, ...]) -> bool:
    """Whether z is made of out by a chain of allowed operations."""
    node = z.grad_fn
    while node is not None and node is not out.grad_fn:
        if not node.name().startswith(allowed) or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return node is not None


def _only_views(z: Tensor, out: Tensor) -> bool:
    return z.numel() == out.numel() and _between(z, out, _VIEWS)


def _is_mean(z: Tensor, out: Tensor, axis: int) -> bool:
    """Whether z is the mean of out over all positions."""
    if out.ndim != 1 - axis or not _between(z, out, _MEANS):
        return False
    mean = out.detach().flatten(2).mean(2)
    return z.shape.numel() == mean.numel() and torch.allclose(
        z.detach().reshape(mean.shape), mean, rtol=1e-5, atol=1e-7
    )


def _mean_patches(module: Any, x: Tensor) -> Tensor:
    per_sample = patches(module, x[:1]).nbytes
    parts = torch.split(x, max(1, MAX_BYTES // per_sample))
    return torch.cat([patches(module, part).mean(2) for part in parts])


class HeadRoute(Route):
    """Hessian and Gauss-Newton matrix, which are one: the outputs are linear in the parameters.

    With A the layer's inputs, ``Q = (H_L U)[:, rows]`` for ``U = A V^T`` and H_L the second
    derivative of the loss by the outputs, the product is ``Q^T A``.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        heads, batches = [], []
        for _, batch in objective.passes("inputs of the head"):
            run = objective.run(batch)
            head = find_head(objective, run)
            if head is None:
                raise NotAHeadError("the outputs are not linear in the selected parameters")
            objective.check_cut(run.outputs, batch)
            heads.append(head)
            batches.append((batch, run.outputs.detach()))
        self._units = heads[0].units
        self._A = torch.cat([head.A for head in heads])
        self._known = self._closed_form(heads, batches)
        r, width = len(self._units), self._A.shape[1]
        what = f"{r} rows of the layer that gives the outputs, {len(self._A)} inputs of {width}"
        if self._known is not None:
            self.plan = f"factored rows: {what}; second derivative of the loss in closed form"
        else:
            self.plan = f"factored rows: {what}; second derivative of the loss by autograd"
            self._gradients = [
                self._loss_gradient(head, outputs, batch)
                for head, (batch, outputs) in zip(heads, batches, strict=True)
            ]

    def _closed_form(self, heads: list[_Head], batches: list[Any]) -> "_OutputHessian | None":
        loss = known_loss(self._objective.loss_fn)
        if loss is None or loss.reduction != self._objective.reduction:
            return None
        if len({outputs.numel() / batch.size for batch, outputs in batches}) > 1:
            return None  # means over unequal numbers: batches have shares of their own
        z = torch.cat([head.z for head in heads])
        n, C = z.shape
        if loss.kind == "cross_entropy":
            for head, (batch, outputs) in zip(heads, batches, strict=True):
                y = batch.targets
                if outputs.shape != head.z.shape or y.ndim != 1 or y.is_floating_point():
                    return None
                if (y == loss.ignore_index).any():
                    return None
            P = z.softmax(1)[:, self._units].contiguous()
            return _OutputHessian(P, True, 1 / n if loss.reduction == "mean" else 1.0)
        if any(outputs.shape != batch.targets.shape for batch, outputs in batches):
            return None  # targets that are broadcast
        share = 1 / (n * C) if loss.reduction == "mean" else 1.0
        chosen = z[:, self._units]
        S = torch.full_like(chosen, 2.0)
        if loss.kind == "bce_with_logits":
            S = torch.sigmoid(chosen) * torch.sigmoid(-chosen)
        return _OutputHessian(S, False, share)

    def _loss_gradient(self, head: _Head, outputs: Tensor, batch: Batch) -> Any:
        with twice_differentiable():
            z = outputs.requires_grad_()
            (gradient,) = gradient_graph(self._objective.loss(z, batch), [z])
        return z, gradient, head.z.shape, self._objective.share(batch)

    def product(self, V: Tensor) -> Tensor:
        A, r = self._A, len(self._units)
        columns = []
        for column in V.T:
            W = column.reshape(r, -1)
            if self._known is not None:
                columns.append(self._known.product(A, W).flatten())
                continue
            U, Q, start = A @ W.T, [], 0
            for z, gradient, shape, share in self._gradients:
                moved = U.new_zeros(shape)
                moved[:, self._units] = U[start : start + len(moved)]
                start += len(moved)
                with twice_differentiable():
                    (pulled,) = pull([gradient], [z], [moved.reshape(z.shape)])
                Q.append(pulled.reshape(shape)[:, self._units] * share)
            columns.append((torch.cat(Q).T @ A).flatten())
        return torch.stack(columns, 1)

    def diagonal(self) -> Tensor | None:
        if self._known is not None:
            return self._known.diagonal(self._A)
        return gauss_newton_diagonal(self._objective)

    def low_rank(self, most: int) -> LowRank | None:
        if self._known is None or self._known.S.numel() > most:
            return None
        return self._known.low_rank(self._A)


class NotAHeadError(Exception):
    """The selected units are not those of a layer that gives the outputs."""


@dataclass(frozen=True)
class _OutputHessian:
    """Second derivatives of the samples' losses by r outputs.

    share * (diag(S_i) - S_i S_i^T) for the softmax, else share * diag(S_i).
    """

    S: Tensor  # (n, r)
    softmax: bool
    share: float

    def product(self, A: Tensor, W: Tensor) -> Tensor:
        if self.softmax:
            return softmax_rows_product(A, self.S, W).mul_(self.share * len(A))
        return (self.S * (A @ W.T)).mul_(self.share).T @ A

    def diagonal(self, A: Tensor) -> Tensor:
        S = self.S * (1 - self.S) if self.softmax else self.S
        return (S.mul(self.share).T @ A.square()).flatten()

    def low_rank(self, A: Tensor) -> LowRank:
        root = self.S.sqrt()
        L = torch.diag_embed(root)
        if self.softmax:
            # (I - a u u^T)^2 = I - u u^T for u = root and a = (1 - sqrt(1 - |u|^2)) / |u|^2
            total = self.S.sum(1)
            a = 1 / (1 + (1 - total).clamp(min=0).sqrt())
            L = L - a[:, None, None] * self.S[:, :, None] * root[:, None, :]
        return FactoredRows(L.transpose(1, 2).contiguous(), A, self.share)
