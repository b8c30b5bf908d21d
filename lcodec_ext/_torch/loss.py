"""Losses: which are known, their mean and their gradient over samples."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._torch.modes import evaluating
from lcodec_ext._torch.samples import Samples, outputs_of

# ---------------------------------------------------------------------------------------------
# Losses


@dataclass(frozen=True)
class KnownLoss:
    """A loss whose second derivative by the outputs is written down.

    Attributes
    ----------
    kind : {"cross_entropy", "bce_with_logits", "mse"}
    reduction : {"mean", "sum"}
    ignore_index : int
        Of cross-entropy: the target that counts for nothing.
    """

    kind: str
    reduction: str
    ignore_index: int = -100


_MODULES: dict[type, str] = {
    torch.nn.CrossEntropyLoss: "cross_entropy",
    torch.nn.BCEWithLogitsLoss: "bce_with_logits",
    torch.nn.MSELoss: "mse",
}

_FUNCTIONS: dict[Any, str] = {
    torch.nn.functional.cross_entropy: "cross_entropy",
    torch.nn.functional.binary_cross_entropy_with_logits: "bce_with_logits",
    torch.nn.functional.mse_loss: "mse",
}


def known_loss(loss_fn: Any) -> KnownLoss | None:
    """Recognise softmax cross-entropy, BCE with logits and squared error, without weights."""
    options: dict[str, Any]
    if type(loss_fn) in _MODULES:
        if getattr(loss_fn, "weight", None) is not None:
            return None
        if getattr(loss_fn, "pos_weight", None) is not None:
            return None
        kind, options = _MODULES[type(loss_fn)], vars(loss_fn)
    else:
        options = {}
        while isinstance(loss_fn, functools.partial) and not loss_fn.args:
            options = loss_fn.keywords | options
            loss_fn = loss_fn.func
        try:
            kind = _FUNCTIONS[loss_fn]
        except (KeyError, TypeError):
            return None
        if options.keys() - {"reduction", "label_smoothing", "ignore_index"}:
            return None
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        return None
    return KnownLoss(kind, reduction, options.get("ignore_index", -100))


LossFunction = Callable[[Any, Any], Tensor]


def mean_loss(model: nn.Module, samples: Samples, loss_fn: LossFunction, batch_size: int) -> float:
    """Of samples, in evaluation mode, without the regulariser; NaN or infinity where it is."""
    total = 0.0
    with evaluating(model), torch.no_grad():
        for batch in samples.batches(batch_size):
            loss = loss_fn(outputs_of(model, batch), batch.targets)
            total += loss.item() * batch.size / len(samples)
    return total


def is_much_worse(before: float, after: float) -> bool:
    """Whether a mean loss rose by as much as is warned of; NaN is worse, too."""
    return math.isfinite(before) and not after <= 1.5 * before + 0.05


def objective(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    weight_decay: float,
    batch_size: int,
) -> tuple[float, list[Tensor]]:
    """Mean loss without, and its gradient with the regulariser, by every trainable parameter."""
    weights = trainable(model)
    gradient = [weight_decay * weight.detach().double() for weight in weights]
    total = 0.0
    for batch in samples.batches(batch_size):
        loss = loss_fn(outputs_of(model, batch), batch.targets) * (batch.size / len(samples))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the samples of {samples.name} is NaN or infinite")
        total += loss.item()
        parts = torch.autograd.grad(loss, weights, allow_unused=True)
        for sum_, part in zip(gradient, parts, strict=True):
            if part is not None:
                sum_ += part
    return total, gradient


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, at least one."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("the model has no trainable parameter")
    return found
