"""What the noise of a release does to a model."""

import math
import warnings

import torch
from torch import nn

from lcodec_ext.curvature._objective import LossFunction
from lcodec_ext.unlearning.metrics import evaluating
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.samples import Samples, outputs_of


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


def warn_of_noise(
    before: float, after: float, guarantee: Guarantee, samples: str, *, stacklevel: int
) -> None:
    """Warn where noise raises a mean loss by much."""
    if is_much_worse(before, after):
        warnings.warn(
            f"the noise for epsilon={guarantee.epsilon:g}, delta={guarantee.delta:g}, whose "
            f"standard deviation is {guarantee.sigma:.3g}, raised the mean loss of {samples} from "
            f"{before:.3g} to {after:.3g}. A larger epsilon or weight decay takes less noise",
            stacklevel=stacklevel + 1,
        )
