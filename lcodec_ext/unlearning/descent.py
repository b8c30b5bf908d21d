"""Mini-batch descent: networks are trained as they were, for a short while."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from lcodec_ext._progress import progress_bar
from lcodec_ext.unlearning.step import Block
from lcodec_ext.unlearning.workplace import Workplace

Losses = Iterable[Callable[[], Tensor] | None]  # of the batches; None where there is nothing to do


def descend(
    work: Workplace,
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    losses: Losses,
    *,
    total: int,
    rate: float,
    warm: float,
    seed: int,
    what: str,
    masks: list[Tensor] | None = None,
) -> None:
    """SGD with Nesterov momentum 0.9 and coupled weight decay, in training mode.

    The learning rate rises in the first part of total steps, warm as a share, and falls to 0 in a
    cosine. Parameters move where the masks are one.
    """
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, nesterov=True)
    devices = [work.device] if work.device.type == "cuda" else []

    def share(step: int) -> float:
        if step < warm * total:
            return (step + 1) / (warm * total + 1)
        return (1 + math.cos(math.pi * (step - warm * total) / (total - warm * total))) / 2

    def take(loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        decayed = torch._foreach_add(
            gradients, [p.detach() for p in parameters], alpha=work.settings.weight_decay
        )
        if masks is not None:
            torch._foreach_mul_(decayed, masks)
        for p, g in zip(parameters, decayed, strict=True):
            p.grad = g
        optimizer.step()

    model.train()
    try:
        with (
            progress_bar(work.progress, total=total, desc=what, unit="batch") as bar,
            torch.random.fork_rng(devices),
        ):
            torch.manual_seed(seed)  # of dropout
            for step, loss in enumerate(losses):
                for group in optimizer.param_groups:
                    group["lr"] = rate * share(step)
                if loss is not None:
                    take(loss())
                bar.update()
    finally:
        model.eval()
        for p in parameters:
            p.grad = None


def masks_of(block: Block) -> list[Tensor] | None:
    """Ones at the selected coordinates of each parameter; None if all are selected."""
    parameters = block.layout.parameters
    if block.layout.size == sum(block.work.parameters[k].numel() for k in parameters):
        return None
    masks = {k: torch.zeros_like(p) for k, p in parameters.items()}
    block.layout.scatter_(masks, torch.ones_like(block.start))
    return list(masks.values())
