"""What follows a step: batch norms are recalibrated, broken models repaired."""

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import finite_loss
from lcodec_ext._torch.samples import outputs_in_training, outputs_of
from lcodec_ext.unlearning.descent import Losses, descend, masks_of
from lcodec_ext.unlearning.step import Block

_WARM_UP = 0.3  # share of a repair; from a sharp minimum a large first step would destroy


def recalibrate(block: Block, n: int | None = None) -> None:
    """Compute the running statistics of batch norms again, over retained samples.

    Over n of them, by default `Settings.n_recalibrate`.
    """
    settings, model = block.work.settings, block.work.model
    n = settings.n_recalibrate if n is None else n
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not n or not norms:
        return
    with block.work.timed("recalibration"):
        retained = block.retained.all
        order = np.random.default_rng([settings.seed, 4]).permutation(len(retained))
        some = retained.subset(np.sort(order[:n]).tolist()).whole()
        momenta = [module.momentum for module in norms]
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()
            with block.work.ranks.alone("recalibration"), torch.no_grad():
                for batch in some.batches(settings.batch_size):
                    if batch.size > 1 or len(some) == 1:
                        outputs_of(model, batch)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
                module.eval()
        block.work.take_from_first(model)


def repair(block: Block) -> None:
    """Epochs of SGD on the retained samples, as networks are trained, on the selection.

    In training mode, with Nesterov momentum 0.9. The learning rate rises in the first 30% and falls
    to 0 in a cosine.
    """
    work, settings, retained = block.work, block.work.settings, block.retained.all
    size, n = settings.repair_batch_size, len(retained)
    rng = np.random.default_rng([settings.seed, 3])
    seed = int(rng.integers(2**63))

    def loss_of(batch: Batch) -> Tensor:
        return finite_loss(work.loss_fn, outputs_in_training(work.model, batch), batch, "retain")

    def losses() -> Losses:
        for _ in range(settings.repair_epochs):
            for batch in retained.batches(size, rng.permutation(n).tolist()):
                # Batch norm takes no single sample.
                yield partial(loss_of, batch) if batch.size > 1 or n == 1 else None

    descend(
        work,
        work.model,
        {k: work.parameters[k] for k in block.layout.parameters},
        losses(),
        total=settings.repair_epochs * -(-n // size),
        rate=settings.repair_learning_rate,
        warm=_WARM_UP,
        seed=seed,
        what="repair",
        masks=masks_of(block),
    )
