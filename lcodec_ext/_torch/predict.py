"""One pass of a model over samples."""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcodec_ext._checks import check_integer
from lcodec_ext._torch.batches import Batch, map_tensors, part_of, tensors_of
from lcodec_ext._torch.faults import sample_in
from lcodec_ext._torch.loss import (
    LossFunction,
    check_loss_fn,
    check_reduction,
    known_loss,
    loss_in,
    loss_of,
    scalar_loss,
)
from lcodec_ext._torch.modes import evaluating, plain_arithmetic
from lcodec_ext._torch.samples import Samples, outputs_of

Score = Callable[[Any, Any], Tensor]

# Their outputs are not logits, even where the targets are 0 and 1.
_NOT_OF_LOGITS = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    F.mse_loss,
    F.l1_loss,
    F.smooth_l1_loss,
    F.huber_loss,
    F.binary_cross_entropy,
)


class Prediction(NamedTuple):
    """What one pass over n samples gives; all in float64, on the CPU.

    Attributes
    ----------
    losses : Tensor, shape (n,)
    scores : Tensor, shape (n,), or None
        1 for each sample that is classified correctly, or the caller's score.
    log_probabilities : Tensor, shape (n, C), or None
        None where the model does not classify; so are the labels.
    labels : Tensor of int64, shape (n,), or None
    """

    losses: Tensor
    scores: Tensor | None
    log_probabilities: Tensor | None
    labels: Tensor | None

    @property
    def accuracy(self) -> float | None:
        """Mean score."""
        return None if self.scores is None else float(self.scores.mean())


@plain_arithmetic()
def predict(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    batch_size: int,
    score: Score | None = None,
) -> Prediction:
    """Losses, scores and predicted distributions of all samples."""
    check_integer(batch_size, "batch_size", 1)
    check_loss_fn(loss_fn)
    loss_fn = loss_in(torch.float64, loss_fn)

    def own() -> list[Tensor | None]:
        return list(_predicted(model, samples, loss_fn, batch_size, score))

    what = f"the outputs for the {samples.name} samples"
    losses, scores, log_probabilities, labels = samples.stacked(what, own, same=(ValueError,))
    assert losses is not None
    if log_probabilities is None or labels is None:
        return Prediction(losses, scores, None, None)
    if score is None:
        scores = log_probabilities.argmax(1).eq(labels).double()
    return Prediction(losses, scores, log_probabilities, labels)


def _predicted(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    batch_size: int,
    score: Score | None,
) -> Prediction:
    """That of the samples that are here, without whether they are right."""
    losses, scores, classified = [], [], []
    with evaluating(model):
        for batch in samples.batches(batch_size):
            outputs, targets = _in_double((outputs_of(model, batch), batch.targets))
            if not all(bool(torch.isfinite(t).all()) for t in tensors_of(outputs)):
                first = _first_of(outputs, batch, samples)
                raise ValueError(f"the outputs of the model hold NaN or infinity{first}")
            losses.append(_each_loss(loss_fn, outputs, targets, batch, samples.name).cpu())
            classes = _classes(outputs, targets, loss_fn)
            classified.append(None if classes is None else tuple(t.cpu() for t in classes))
            if score is not None:
                scores.append(scores_of(score, outputs, targets, batch.size))
    known = [pair for pair in classified if pair is not None]
    log_probabilities = labels = None
    if len(known) == len(classified):
        log_probabilities, labels = (torch.cat(each) for each in zip(*known, strict=True))
    right = None if score is None else torch.cat(scores)
    return Prediction(torch.cat(losses), right, log_probabilities, labels)


@plain_arithmetic()
def size_of_losses(
    model: nn.Module, samples: Samples, loss_fn: LossFunction, batch_size: int, losses: Tensor
) -> float:
    """What losses rise by where outputs are those of other samples: their size, in any unit.

    At least twice its standard error; the spread or the mean of the losses where that vanishes, as
    of a model whose outputs are all the same. A factor of all losses is one of this, and what is
    added to them, whatever the outputs are, is nothing.
    """
    loss_fn = loss_in(torch.float64, loss_fn)
    n, rises = len(samples), []
    order = np.random.default_rng(0).permutation(n)
    with evaluating(model):
        for numbers in np.array_split(order, max(1, -(-n // max(2, batch_size)))):
            batch = samples.fetch(numbers.tolist())
            outputs, targets = _in_double((outputs_of(model, batch), batch.targets))
            others = part_of(outputs, batch.size, torch.arange(batch.size).roll(1))
            try:
                found = _each_alone(loss_fn, others, targets, batch.size).double().cpu()
            except (RuntimeError, ValueError, TypeError, IndexError):  # it takes no other outputs
                continue
            rises.append(found - losses[torch.from_numpy(numbers)])
    rise = torch.cat([*rises, torch.zeros(0, dtype=torch.float64)])
    rise = rise[torch.isfinite(rise)]
    if len(rise) > 1:
        least = 2 * float(rise.std()) / math.sqrt(len(rise))
        if (size := max(float(rise.mean()), least)) > 0:
            return size
    spread = float(losses.std(correction=0))
    return spread or abs(float(losses.mean())) or 1.0


def _in_double(tree: Any) -> Any:
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, tree)


def _first_of(outputs: Any, batch: Batch, samples: Samples) -> str:
    """The first sample whose outputs are not finite, in words."""
    for t in tensors_of(outputs):
        if t.ndim and len(t) == batch.size and not bool(torch.isfinite(t).all()):
            k = int((~torch.isfinite(t).reshape(batch.size, -1).all(1)).nonzero()[0])
            return f", first for {sample_in(batch, k, samples.name)}"
    return ""


def _each_loss(
    loss_fn: LossFunction, outputs: Any, targets: Any, batch: Batch, name: str
) -> Tensor:
    """The loss of each sample of a batch alone, shape (n,)."""
    loss_of(loss_fn, outputs, replace(batch, targets=targets), name)  # its refusals
    n, losses = batch.size, _each_cross_entropy(loss_fn, outputs, targets)
    if losses is None:
        losses = _each_alone(loss_fn, outputs, targets, n).double()
    if not torch.isfinite(losses).all():
        k = int((~torch.isfinite(losses)).nonzero()[0])
        raise ValueError(
            f"the loss of a sample of {name} is NaN or infinite: {sample_in(batch, k, name)}"
        )
    whole = scalar_loss(loss_fn, outputs, targets)
    mean = losses.mean().to(whole.dtype)
    check_reduction(whole, mean, n, why=f" of {name}", of=(outputs, targets))
    return losses


def _each_cross_entropy(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor | None:
    """Cross-entropies of classified samples, which need no call for each; None of other losses."""
    known = known_loss(loss_fn)
    if known is None or (known.kind, known.reduction) != ("cross_entropy", "mean"):
        return None
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or outputs.ndim != 2:
        return None
    if targets.is_floating_point() or targets.ndim != 1 or (targets == known.ignore_index).any():
        return None
    if not isinstance(loss_fn, nn.CrossEntropyLoss):
        plain: Any = loss_fn
        each: Tensor = functools.partial(plain, reduction="none")(outputs, targets)
        return each
    return F.cross_entropy(
        outputs, targets, reduction="none", label_smoothing=loss_fn.label_smoothing
    )


def _each_alone(loss_fn: LossFunction, outputs: Any, targets: Any, n: int) -> Tensor:
    parts = list(tensors_of((outputs, targets)))
    dims = tuple(0 if part.ndim and len(part) == n else None for part in parts)

    def alone(*each: Tensor) -> Tensor:
        single = iter([t if d is None else t[None] for t, d in zip(each, dims, strict=True)])
        return scalar_loss(loss_fn, *map_tensors(lambda _: next(single), (outputs, targets)))

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(alone, in_dims=dims)(*parts)
    except (RuntimeError, ValueError, NotImplementedError):  # what vmap cannot trace
        rows = [
            alone(*(t if d is None else t[i] for t, d in zip(parts, dims, strict=True)))
            for i in range(n)
        ]
        return torch.stack(rows)


def scores_of(score: Score, outputs: Any, targets: Any, n: int) -> Tensor:
    """The caller's score of each sample of a batch, shape (n,), in float64 on the CPU."""
    each = score(outputs, targets)
    if not isinstance(each, Tensor) or each.shape != (n,):
        given = f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each)
        raise ValueError(
            f"score must return one number per sample, a tensor of shape ({n},); got {given}"
        )
    return each.double().cpu()


def _classes(outputs: Any, targets: Any, loss_fn: LossFunction) -> tuple[Tensor, Tensor] | None:
    """Log-probabilities (n, C) and labels (n,), where this is a classification.

    Of targets that are probabilities, as one-hot ones are, the likeliest class is the label.
    """
    known = known_loss(loss_fn)
    of_classes = known is not None and known.kind == "cross_entropy"
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    if loss_fn in _NOT_OF_LOGITS or type(loss_fn) in _NOT_OF_LOGITS:
        return None
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    log_probabilities = log_probabilities_of(outputs)
    if log_probabilities is None:
        return None
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        labels = classes_of(targets)
        if labels is None or (targets.ndim == 2 and not of_classes):
            return None
        return log_probabilities, labels
    if targets.numel() != len(outputs) or not ((targets == 0) | (targets == 1)).all():
        return None
    return log_probabilities, targets.reshape(-1).long()


def classes_of(targets: object) -> Tensor | None:
    """The classes of targets that are whole numbers, shape (n,), or probabilities, shape (n, C)."""
    if not isinstance(targets, Tensor) or targets.dtype == torch.bool:
        return None
    if targets.ndim == 1 and not targets.is_floating_point():
        return targets.long()
    if targets.ndim != 2 or targets.shape[1] < 2 or not targets.is_floating_point():
        return None
    shares = (targets >= 0).all() & ((targets.sum(1) - 1).abs() <= 1e-3).all()
    return targets.argmax(1) if bool(shares) else None


def log_probabilities_of(outputs: Tensor) -> Tensor | None:
    """Of logits of shape (n, C), (n, 1) or (n,), shape (n, classes); None for other outputs."""
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return outputs.double().log_softmax(1)
    if outputs.ndim == 1 or outputs.shape[1:] == (1,):
        logits = outputs.double().reshape(-1)
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return None
