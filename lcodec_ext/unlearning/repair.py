"""What follows a step: batch norms are recalibrated, broken models repaired."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import finite_loss
from lcodec_ext._torch.samples import outputs_of
from lcodec_ext.unlearning.step import Block

_WARM_UP = 0.3  # share of a repair; from a sharp minimum a large first step would destroy


def recalibrate(block: Block) -> None:
    """Compute the running statistics of batch norms again, over retained samples."""
    settings, model = block.work.settings, block.work.model
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not settings.n_recalibrate or not norms:
        return
    with block.work.timed("recalibration"):
        retained = block.retained.all
        order = np.random.default_rng([settings.seed, 4]).permutation(len(retained))
        some = retained.subset(np.sort(order[: settings.n_recalibrate]).tolist())
        momenta = [module.momentum for module in norms]
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()
            with torch.no_grad():
                for batch in some.batches(settings.batch_size):
                    if batch.size > 1 or len(some) == 1:
                        outputs_of(model, batch)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
                module.eval()


def repair(block: Block) -> None:
    """Epochs of SGD on the retained samples, as networks are trained, on the selection.

    In training mode, with Nesterov momentum 0.9. The learning rate rises in the first 30% and falls
    to 0 in a cosine.
    """
    work, settings, retained = block.work, block.work.settings, block.retained.all
    size, n = settings.repair_batch_size, len(retained)
    total = settings.repair_epochs * -(-n // size)
    warm = _WARM_UP * total
    parameters = [work.parameters[k] for k in block.layout.parameters]
    masks = _masks(block)
    optimizer = torch.optim.SGD(
        parameters, lr=settings.repair_learning_rate, momentum=0.9, nesterov=True
    )

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2

    def step(batch: Batch) -> None:
        loss = finite_loss(work.loss_fn, outputs_of(work.model, batch), batch.targets, "retain")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        decayed = torch._foreach_add(
            gradients, [p.detach() for p in parameters], alpha=settings.weight_decay
        )
        if masks is not None:
            torch._foreach_mul_(decayed, masks)
        for p, g in zip(parameters, decayed, strict=True):
            p.grad = g
        optimizer.step()

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    rng = np.random.default_rng([settings.seed, 3])
    devices = [work.device] if work.device.type == "cuda" else []
    work.model.train()
    try:
        with (
            progress_bar(work.progress, total=total, desc="repair", unit="batch") as bar,
            torch.random.fork_rng(devices),
        ):
            torch.manual_seed(int(rng.integers(2**63)))  # of dropout
            for _ in range(settings.repair_epochs):
                for batch in retained.batches(size, rng.permutation(n).tolist()):
                    if batch.size > 1 or n == 1:  # batch norm takes no single sample
                        step(batch)
                    schedule.step()
                    bar.update()
    finally:
        work.model.eval()
        for p in parameters:
            p.grad = None


def _masks(block: Block) -> list[Tensor] | None:
    """Ones at the selected coordinates of each parameter; None if all are selected."""
    parameters = block.layout.parameters
    if block.layout.size == sum(block.work.parameters[k].numel() for k in parameters):
        return None
    masks = {k: torch.zeros_like(p) for k, p in parameters.items()}
    block.layout.scatter_(masks, torch.ones_like(block.start))
    return list(masks.values())
