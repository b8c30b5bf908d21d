"""What is sent back from a model's outputs: columns of a square root of the loss's Hessian."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import known_loss
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext.curvature.kronecker.draws import content, signs_of_texts
from lcodec_ext.curvature.masked.model import ForwardPass
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.routes.gauss_newton import output_hessians

ALL_COLUMNS = 16  # outputs of a sample up to which every column is taken
_FORMED = 64  # outputs of a sample whose Hessian is formed where the loss is not known
_OTHERWISE = (
    "make an EKFACOperator with kind='empirical', or take curvature='fisher' in place of 'ekfac'"
)

#: From a tensor of the outputs' shape to the square root times each sample's part of it.
Root = Callable[[Tensor], Tensor]


class Seeds:
    """What is sent back through a model for each batch.

    Parameters
    ----------
    kind : {"model", "empirical"}
        "empirical": the gradient of each sample's loss. "model": columns L e of a square root of
        the Hessian of each sample's loss by its outputs, H = L L^T.
    seed : int
        Of the random combinations.
    draws : int or None
        How many random combinations of the columns are taken; None takes all columns of at most 16
        outputs, and one combination of more.
    """

    def __init__(self, kind: str, seed: int, draws: int | None) -> None:
        self.kind, self.seed, self.draws = kind, seed, draws

    def of(
        self, objective: Objective, run: ForwardPass, batch: Batch
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Values and what reaches them, once for each backward pass."""
        if self.kind == "empirical":
            with twice_differentiable():
                total = objective.sum_of_losses(run, batch)
            if total.requires_grad:
                yield [total], [torch.ones_like(total)]
            return
        outputs = run.outputs
        if not isinstance(outputs, Tensor):
            raise ValueError(
                "kind='model' needs a model whose output is one tensor, or has logits; this one "
                f"returns a {type(outputs).__name__}: {_OTHERWISE}"
            )
        if not outputs.requires_grad:
            return
        root = square_root(objective, outputs.detach(), batch)
        n = batch.size
        if len(outputs) != n:
            raise ValueError(
                f"kind='model' needs outputs with samples along the first axis; for {n} samples "
                f"they have shape {tuple(outputs.shape)}: {_OTHERWISE}"
            )
        each = outputs.numel() // n
        if self.draws is None and each <= ALL_COLUMNS:
            for column in range(each):
                unit = torch.zeros_like(outputs).reshape(n, -1)
                unit[:, column] = 1
                yield [outputs], [root(unit.reshape(outputs.shape))]
            return
        ignored = getattr(objective.loss_fn, "ignore_index", -100)
        hashes, draws = content(batch, ignored).to(outputs.device), self.draws or 1
        for draw in range(draws):
            sign = signs_of_texts(hashes, outputs, batch, self.seed, draw)
            yield [outputs], [root(sign) / draws**0.5]


def square_root(objective: Objective, outputs: Tensor, batch: Batch) -> Root:
    """A square root of the Hessian of each sample's loss by its outputs."""
    loss, n, targets = known_loss(objective.loss_fn), batch.size, batch.targets
    if isinstance(objective.loss_fn, TokenLoss):
        tokens = objective.loss_fn.cross_entropy_weights(outputs, targets)
        if tokens is None:
            return _formed(objective, outputs, batch)
        weight, axis = tokens
        return _softmax_root(outputs.softmax(axis), weight.unsqueeze(axis), axis)
    if loss is None or not isinstance(targets, Tensor) or loss.reduction != objective.reduction:
        return _formed(objective, outputs, batch)
    mean = loss.reduction == "mean"
    if loss.kind == "cross_entropy":
        if outputs.ndim < 2:
            return _formed(objective, outputs, batch)
        p = outputs.softmax(1)
        weight = p.new_ones(p.shape[:1] + p.shape[2:])
        if not targets.is_floating_point():
            weight = (targets != loss.ignore_index).to(p.dtype)
        elif not torch.allclose(targets.sum(1).to(weight), weight, atol=1e-4):
            return _formed(objective, outputs, batch)  # of no distributions
        if mean:
            weight = weight * (n / weight.sum())
        return _softmax_root(p, weight.unsqueeze(1), 1)
    if outputs.shape != targets.shape:
        return _formed(objective, outputs, batch)
    scale = n / outputs.numel() if mean else 1.0
    if loss.kind == "mse":
        return lambda unit: unit * (2 * scale) ** 0.5
    spread = (torch.sigmoid(outputs) * torch.sigmoid(-outputs) * scale).sqrt()
    return lambda unit: unit * spread


def _softmax_root(p: Tensor, weight: Tensor, axis: int) -> Root:
    """Of weight (diag(p) - p p^T): sqrt(weight) (diag(sqrt(p)) - p sqrt(p)^T)."""
    root, weight = p.sqrt(), weight.sqrt()

    def product(unit: Tensor) -> Tensor:
        each = root * unit
        return weight * (each - p * each.sum(axis, keepdim=True))

    return product


def _formed(objective: Objective, outputs: Tensor, batch: Batch) -> Root:
    n = batch.size
    each = outputs.numel() // n
    if each > _FORMED:
        raise ValueError(
            f"kind='model' forms the second derivative of the loss by the {each:,} outputs of a "
            f"sample, at most {_FORMED}, for losses other than cross_entropy, "
            "binary_cross_entropy_with_logits and mse_loss of torch.nn.functional without weights; "
            f"got {objective.loss_fn!r}: pass one of these by itself, if it is one. Else "
            f"{_OTHERWISE}"
        )
    objective.check_plain(outputs, batch, 1, "since the loss of each sample is differentiated")
    with twice_differentiable():
        H = output_hessians(objective, outputs, batch).double()
    values, vectors = torch.linalg.eigh((H + H.transpose(1, 2)) / 2)
    if (values < -1e-5 * values.abs().amax(1, keepdim=True)).any():
        raise ValueError(
            "kind='model' needs a loss that is convex in the outputs; the second derivative of "
            f"this one has the eigenvalue {float(values.min()):.3g}: {_OTHERWISE}"
        )
    roots = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.transpose(1, 2)
    roots = roots.to(outputs.dtype)
    return lambda unit: (roots @ unit.reshape(n, -1, 1)).reshape(unit.shape)
