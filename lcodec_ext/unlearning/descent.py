"""Mini-batch descent: networks are trained as they were, for a short while."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.loss import NotFiniteError
from lcodec_ext._torch.samples import NotTrainedError
from lcodec_ext.unlearning.step import Block
from lcodec_ext.unlearning.workplace import Workplace

Losses = Iterable[Callable[[], Tensor] | None]  # of the batches; None where there is nothing to do


def descend(
    work: Workplace,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Losses,
    *,
    total: int,
    rate: float,
    warm: float,
    seed: int,
    what: str,
    masks: Mapping[str, Tensor] | None = None,
) -> None:
    """SGD with Nesterov momentum 0.9 and coupled weight decay, in training mode.

    The learning rate rises in the first part of total steps, warm as a share, and falls to 0 in a
    cosine. Parameters move where the masks are one, and none does that a loss does not use. Over a
    group every rank takes all steps, and in the end has the state of the first one.
    """
    optimizer = torch.optim.SGD(parameters.values(), lr=rate, momentum=0.9, nesterov=True)
    devices = [work.device] if work.device.type == "cuda" else []

    def share(step: int) -> float:
        if step < warm * total:
            return (step + 1) / (warm * total + 1)
        return (1 + math.cos(math.pi * (step - warm * total) / (total - warm * total))) / 2

    def take(loss: Tensor) -> None:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for p in parameters.values():
            p.grad = None
        for (k, p), g in zip(parameters.items(), found, strict=True):
            if g is not None:
                g = g.to_dense() if g.is_sparse else g  # of embeddings
                decayed = _decayed(g, p.detach(), work.decay[k])
                p.grad = decayed if masks is None else decayed.mul_(masks[k])
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
                with work.ranks.alone(f"a batch of the {what}", (NotFiniteError, NotTrainedError)):
                    if loss is not None:
                        take(loss())
                bar.update()
    finally:
        model.eval()
        for p in parameters.values():
            p.grad = None
    work.take_from_first(model)


def _decayed(gradient: Tensor, p: Tensor, decay: float | Tensor) -> Tensor:
    if isinstance(decay, Tensor):
        return torch.addcmul(gradient, p, decay)
    return torch.add(gradient, p, alpha=decay)


def masks_of(block: Block) -> dict[str, Tensor] | None:
    """Ones at the selected coordinates of each parameter; None if all are selected."""
    parameters = block.layout.parameters
    if block.layout.size == sum(block.work.parameters[k].numel() for k in parameters):
        return None
    masks = {k: torch.zeros_like(p) for k, p in parameters.items()}
    block.layout.scatter_(masks, torch.ones_like(block.start))
    return masks
