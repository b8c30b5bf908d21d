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
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens, count_tokens, of_sets

LEAST = 0.2  # of a sample's tokens, by which min-k% tells members
_PIECE = 2**23  # outputs that are converted to float64 at a time
_DISTRIBUTIONS = 2**25  # numbers of distributions of tokens that are kept
_MOST = 700.0  # whose exponential is still a number

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
        None where the model does not classify; so are the labels. Of a loss over tokens those of
        tokens, as many as were asked for.
    labels : Tensor of int64, shape (n,), or None
    counted : Tensor, shape (n,), or None
        Of a loss over tokens: how many of each sample's count. `losses` are means over these, 0
        without any, and the mean of `scores` is the share of all tokens that are right.
    likelihoods, least_likely : Tensor, shape (n,), or None
        Of a loss over tokens whose outputs are logits: the log-probability of all of a sample's
        tokens, and the mean of it over the fifth of them that are the least likely; at least one
        token, 0 without any.
    """

    losses: Tensor
    scores: Tensor | None
    log_probabilities: Tensor | None
    labels: Tensor | None
    counted: Tensor | None = None
    likelihoods: Tensor | None = None
    least_likely: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """Mean score."""
        return None if self.scores is None else float(self.scores.mean())

    @property
    def shares(self) -> Tensor:
        """What each sample counts for in the mean loss, 1 on average."""
        if self.counted is None:
            return torch.ones_like(self.losses)
        return shares_of(self.counted)

    @property
    def parts(self) -> Tensor:
        """What each sample contributes to the mean loss, whose mean that is."""
        return self.losses if self.counted is None else self.losses * self.shares

    @property
    def loss(self) -> float:
        """Mean loss: of a loss over tokens the mean over all of them."""
        return float(self.parts.mean())

    @property
    def perplexity(self) -> float | None:
        """Of a loss over tokens: 1 / the geometric mean of what their labels are predicted by."""
        if self.likelihoods is None or self.counted is None or not bool(self.counted.any()):
            return None
        return math.exp(min(-float(self.likelihoods.sum() / self.counted.sum()), _MOST))


def shares_of(counted: Tensor) -> Tensor:
    """Shares of samples by their tokens, 1 on average; all 1 where there is no token."""
    mean = counted.mean()
    return counted / mean if bool(mean) else torch.ones_like(counted)


@plain_arithmetic()
def predict(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    batch_size: int,
    score: Score | None = None,
    *,
    of_tokens: bool = False,
) -> Prediction:
    """Losses, scores and predicted distributions of all samples.

    Distributions of tokens are kept where `of_tokens` says so: of all, or where they would take
    more than 256 MiB of every second, third, ... token.
    """
    check_integer(batch_size, "batch_size", 1)
    check_loss_fn(loss_fn)
    loss_fn = loss_in(torch.float64, by_tokens(loss_fn, model, samples))
    if isinstance(loss_fn, TokenLoss):
        return _predicted_tokens(model, samples, loss_fn, batch_size, score, of_tokens)

    def own() -> list[Tensor | None]:
        return list(_predicted(model, samples, loss_fn, batch_size, score))

    what = f"the outputs for the {samples.name} samples"
    losses, scores, log_probabilities, labels, *_ = samples.stacked(what, own, same=(ValueError,))
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
            _check_outputs(outputs, batch, samples)
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


def _check_outputs(outputs: Any, batch: Batch, samples: Samples) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors_of(outputs)):
        first = _first_of(outputs, batch, samples)
        raise ValueError(f"the outputs of the model hold NaN or infinity{first}")


def _predicted_tokens(
    model: nn.Module,
    samples: Samples,
    loss_fn: TokenLoss,
    batch_size: int,
    score: Score | None,
    of_tokens: bool,
) -> Prediction:
    """`predict` of a loss over tokens. Logits are converted to float64 a few samples at a time."""
    tokens = count_tokens(loss_fn, samples) if of_tokens else 0

    def own() -> list[Tensor | None]:
        columns = []
        with evaluating(model):
            for batch in samples.batches(batch_size):
                outputs = outputs_of(model, batch)
                _check_outputs(outputs, batch, samples)
                found = _of_tokens(loss_fn, outputs, batch, samples.name, tokens)
                if score is not None:
                    wide, targets = _in_double((outputs, batch.targets))
                    found[1] = scores_of(score, wide, targets, batch.size)
                columns.append(found)
        return [
            None if any(part is None for part in each) else torch.cat(each).cpu()
            for each in zip(*columns, strict=True)
        ]

    what = f"the outputs for the {samples.name} samples"
    losses, scores, counted, likelihoods, least, *kept = samples.stacked(
        what, own, same=(ValueError,)
    )
    assert losses is not None
    assert counted is not None
    if score is None and scores is not None and bool(counted.any()):
        scores = scores / counted.mean()  # from right tokens
    log_probabilities, labels = kept or (None, None)
    return Prediction(losses, scores, log_probabilities, labels, counted, likelihoods, least)


def _of_tokens(loss_fn: TokenLoss, outputs: Any, batch: Batch, name: str, tokens: int) -> list[Any]:
    """Of each sample: loss, right tokens, counted ones, their likelihood, that of the least likely.

    Then, where a number of tokens in all says so, distributions and labels of some of them.
    """
    n = batch.size
    step = max(1, _PIECE * n // max(1, sum(t.numel() for t in tensors_of(outputs))))
    losses = []
    for start in range(0, n, step):
        part = batch.part(slice(start, start + step))
        some = _in_double(part_of(outputs, n, slice(start, start + step)))
        loss_of(loss_fn, some, part, name)  # its refusals
        losses.append(_each_of_tokens(loss_fn, some, part, name))
    counted = loss_fn.counted(batch.targets)
    pieces = loss_fn.distributions(outputs, batch.targets)
    if pieces is None:
        return [torch.cat(losses), None, counted.double(), None, None, *[None] * 2 * bool(tokens)]
    right = torch.zeros(n, dtype=torch.float64, device=counted.device)
    likelihoods, kept = [], []
    for rows, labels, sample in pieces:
        right.index_add_(0, sample, rows.argmax(1).eq(labels).double())
        likelihoods.append(rows.gather(1, labels[:, None])[:, 0])
        if tokens:
            every = -(-tokens * rows.shape[1] // _DISTRIBUTIONS)
            kept.append((rows[::every], labels[::every]))
    each = torch.split(torch.cat(likelihoods), counted.tolist())  # in the order of the samples
    found = [torch.cat(losses), right, counted.double(), torch.stack([e.sum() for e in each])]
    found.append(torch.stack([_least(e) for e in each]))
    return found + [torch.cat(column) for column in zip(*kept, strict=True)]


def _least(likelihoods: Tensor) -> Tensor:
    """The mean of the lowest fifth."""
    if not len(likelihoods):
        return likelihoods.new_zeros(())
    return likelihoods.sort().values[: max(1, int(LEAST * len(likelihoods)))].mean()


def _each_of_tokens(loss_fn: TokenLoss, outputs: Any, batch: Batch, name: str) -> Tensor:
    """The mean over the tokens of each sample, which must make up the loss of the batch."""
    targets, counted = batch.targets, loss_fn.counted(batch.targets)
    each = loss_fn.each(outputs, targets).double()
    if not torch.isfinite(each).all():
        k = int((~torch.isfinite(each)).nonzero()[0])
        raise ValueError(
            f"the loss of a sample of {name} is NaN or infinite: {sample_in(batch, k, name)}"
        )
    whole = replace(loss_fn, mean_tokens=None)(outputs, targets)
    mean = (each * counted).sum() / counted.sum().clamp(min=1)
    why = f" of {name}"
    check_reduction(whole, mean.to(whole), batch.size, why=why, of=(outputs, targets))
    return each


@plain_arithmetic()
def size_of_losses(
    model: nn.Module, samples: Samples, loss_fn: LossFunction, batch_size: int, losses: Tensor
) -> float:
    """What losses rise by where outputs are those of other samples: their size, in any unit.

    The losses are what each sample contributes to the mean.

    At least twice its standard error; the spread or the mean of the losses where that vanishes, as
    of a model whose outputs are all the same. A factor of all losses is one of this, and what is
    added to them, whatever the outputs are, is nothing.
    """
    loss_fn = loss_in(torch.float64, of_sets(loss_fn, samples))
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
