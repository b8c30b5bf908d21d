"""Means over tokens: told or found out, and made plain means over samples."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_integer
from lcodec_ext._torch.batches import Batch, map_tensors, part_of
from lcodec_ext._torch.copies import work_copy
from lcodec_ext._torch.loss import (
    LossFunction,
    check_loss_fn,
    known_loss,
    loss_in,
    same_loss,
    scalar_loss,
    share_of,
)
from lcodec_ext._torch.modes import evaluating
from lcodec_ext._torch.samples import Samples, outputs_of
from lcodec_ext._torch.token_loss import TokenLoss

_READ = 256  # samples whose labels are counted at a time
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
_IGNORED = -100


def per_token_loss(
    loss_fn: LossFunction | None = None, *, causal: bool = False, ignore_index: int = _IGNORED
) -> TokenLoss:
    """A loss that is a mean over tokens, for language models and other sequences of labels.

    By itself, for training, it is the mean over the counted tokens of a batch. `unlearn`,
    `evaluate` and the operators make the objective of it that such training has on the whole
    training set: the mean over all counted tokens of all samples. There a sample of n counts

    ::

        (mean loss of its tokens) * (its counted tokens) / (n * mean counted tokens of a sample)

    so that long samples count more than short ones, and one without a counted token for nothing.
    Weight decay belongs to the mean, so that tokens share it, too: removing a sample removes its
    tokens' share.

    Parameters
    ----------
    loss_fn : callable, optional
        ``loss_fn(outputs, targets)``, the mean over the counted tokens of a batch. By default
        cross-entropy of logits of shape (n, T, classes) and labels of shape (n, T); the same with
        the label smoothing of a given ``nn.CrossEntropyLoss``. Any other loss is called as it is,
        and shifts labels by itself where it is causal.
    causal : bool, default False
        Whether outputs for a token are compared with the label of the next one, as the causal
        models of transformers do: labels are then those of the input, and the first of each sample
        counts for nothing.
    ignore_index : int, default -100
        Label of tokens that do not count, such as padding; of a given ``nn.CrossEntropyLoss`` its
        own.

    Returns
    -------
    callable
        ``loss(outputs, targets)``, a scalar tensor.

    Raises
    ------
    ValueError
        For a cross-entropy with class weights or without a mean: the weights of samples are then
        other than their tokens. When used, for targets that are not one tensor of integers.

    Notes
    -----
    A loss that is found to be a mean over tokens is taken for one without being told, as far as
    the labels tell: docs/models.md.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.unlearning import per_token_loss
    >>> logits = torch.zeros(2, 3, 4)
    >>> labels = torch.tensor([[0, 1, 2], [3, -100, -100]])
    >>> round(per_token_loss()(logits, labels).item(), 4), round(torch.tensor(4.0).log().item(), 4)
    (1.3863, 1.3863)
    """
    check_bool(causal, "causal")
    check_integer(ignore_index, "ignore_index", -(2**63))
    if loss_fn is None:
        return TokenLoss(None, None, causal, ignore_index)
    if isinstance(loss_fn, TokenLoss):
        raise TypeError(f"loss_fn is a loss over tokens already: {loss_fn!r}")
    check_loss_fn(loss_fn)
    known = known_loss(loss_fn)
    if isinstance(loss_fn, nn.CrossEntropyLoss) or loss_fn is torch.nn.functional.cross_entropy:
        if known is None or known.reduction != "mean":
            raise ValueError(
                "per_token_loss takes a cross-entropy that is the mean over tokens, without class "
                f"weights; got {loss_fn!r}"
            )
        own = known.ignore_index if ignore_index == _IGNORED else ignore_index
        return TokenLoss(None, None, causal, own, getattr(loss_fn, "label_smoothing", 0.0))
    return TokenLoss(None, loss_fn, causal, ignore_index)


def by_tokens(loss_fn: LossFunction, model: nn.Module, *sets: Samples | None) -> LossFunction:
    """A loss as a plain mean over samples, where it is a mean over the tokens of a batch.

    Parameters
    ----------
    loss_fn : callable
        Other losses are returned as they are, and so is one whose mean tokens are known.
    model : Module
        On whose outputs a loss is found to be such a mean.
    *sets : Samples or None
        The training samples: removed and retained.
    """
    given = [samples for samples in sets if samples]
    if not isinstance(loss_fn, TokenLoss):
        found = _found(loss_fn, model, given)
        if found is None:
            return loss_fn
        loss_fn = found
    return loss_fn if loss_fn.mean_tokens is not None else of_sets(loss_fn, *given)


def of_sets(loss_fn: LossFunction, *sets: Samples | None) -> LossFunction:
    """A loss over tokens with the mean number of those of some samples; others as they are."""
    if not isinstance(loss_fn, TokenLoss):
        return loss_fn
    given = [samples for samples in sets if samples]
    total = 0
    for samples in given:
        total += (tokens := count_tokens(loss_fn, samples))
        check_counted(tokens, samples.name, loss_fn)
    return loss_fn.of_mean(total / sum(map(len, given)))


def check_counted(tokens: float, name: str, loss_fn: TokenLoss) -> None:
    """Refuse samples without any token that counts."""
    if not tokens:
        shifted = ", shifted by one" if loss_fn.causal else ""
        raise ValueError(
            f"no token of {name} counts: all labels{shifted} are {loss_fn.ignore_index}, which the "
            "loss ignores"
        )


def doubt_of_shift(loss_fn: TokenLoss, model: nn.Module, samples: Samples) -> str:
    """What speaks against the given `causal`, by the model and a few samples; empty if nothing."""
    batch = samples.fetch(slice(4))
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if loss_fn.causal:
        if not decodes or loss_fn.loss_fn is not None:
            return ""
        return (
            f"per_token_loss(causal=True) shifts the labels, and {type(model).__name__} is an "
            "encoder-decoder, which is trained on labels as they are: pass per_token_loss()"
        )
    ids, labels = batch.kwargs.get("input_ids"), batch.targets
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
        return ""
    if decodes or ids.shape != labels.shape:
        return ""
    counted = labels != loss_fn.ignore_index
    if not bool(counted.any()) or not torch.equal(ids[counted], labels[counted]):
        return ""
    return (
        f"the labels of {samples.name} are its own input_ids, token by token, and loss_fn compares "
        "the outputs for a token with the label of this token: a causal language model is trained "
        "on the next one, per_token_loss(causal=True)"
    )


def weight_share(loss_fn: LossFunction, samples: Samples) -> float:
    """What a sample of a set counts for on average, 1 over the training samples."""
    if not isinstance(loss_fn, TokenLoss):
        return 1.0
    return share_of(loss_fn, count_tokens(loss_fn, samples), len(samples))


def count_tokens(loss_fn: TokenLoss, samples: Samples) -> int:
    """The counted tokens of samples."""

    def own() -> list[Tensor]:
        counts = [int(loss_fn.counted(b.targets).sum()) for b in samples.batches(_READ)]
        return [torch.tensor(sum(counts), dtype=torch.float64)]

    like = [torch.zeros((), dtype=torch.float64)]
    (total,) = samples.summed(f"the labels of the {samples.name} samples", own, like)
    return int(total)


# ---------------------------------------------------------------------------------------------
# Found out


def _found(loss_fn: LossFunction, model: nn.Module, sets: Sequence[Samples]) -> TokenLoss | None:
    """The loss over tokens that a loss is, where it is one and no plain mean over samples."""
    candidates = _candidates(loss_fn)
    for samples in sets:
        own = samples.own
        if not len(own) or not has_tokens(own.fetch([0])):
            continue
        numbers = _telling(candidates, own)
        if not numbers:
            continue
        try:
            if any(p.is_floating_point() and p.dtype != own.dtype for p in model.parameters()):
                model = work_copy(model, own.dtype)
            with evaluating(model), torch.no_grad():
                batch = own.fetch(numbers)
                found = recognised(loss_fn, outputs_of(model, batch), batch)
        except _FAILURES:
            return None  # those who use the model tell
        if found is not None:
            return found
    return None


def found_in(loss_fn: LossFunction, model: nn.Module, batches: Iterable[Batch]) -> TokenLoss | None:
    """As `by_tokens` finds it out, of the first batch that tells; without a mean."""
    for batch in batches:
        if not has_tokens(batch):
            return None
        counts = torch.stack([each.counted(batch.targets) for each in _candidates(loss_fn)], 1)
        some = counts[counts[:, 0] > 0]
        if not len(some) or bool((counts == some[0]).all()):
            continue
        try:
            with torch.no_grad():
                return recognised(loss_fn, outputs_of(model, batch), batch)
        except _FAILURES:
            return None  # those who use the model tell
    return None


def _candidates(loss_fn: LossFunction) -> list[TokenLoss]:
    known = known_loss(loss_fn)
    index = getattr(loss_fn, "ignore_index", _IGNORED) if known is None else known.ignore_index
    index = index if isinstance(index, int) else _IGNORED
    return [TokenLoss(loss_fn, loss_fn, causal, index) for causal in (False, True)]


def of_kind(loss_fn: LossFunction, causal: bool) -> TokenLoss:
    """The loss over tokens that a loss was found to be elsewhere."""
    return _candidates(loss_fn)[causal]


def has_tokens(batch: Batch) -> bool:
    """Whether samples have several whole numbers for labels each."""
    targets = batch.targets
    if not isinstance(targets, Tensor) or targets.ndim < 2:
        return False
    return not targets.is_floating_point() and targets.dtype != torch.bool


def _telling(candidates: Sequence[TokenLoss], samples: Samples) -> list[int]:
    """A few samples with counted tokens, whose numbers of them differ; none if all are alike."""
    counts = torch.cat(
        [
            torch.stack([each.counted(batch.targets).cpu() for each in candidates], 1)
            for batch in samples.batches(_READ)
        ]
    )
    plain, shifted = counts.T
    ones = (plain > 0).nonzero()[:, 0]
    if not len(ones):
        return []
    if (counts[ones] == counts[ones[0]]).all():  # but a mean over no tokens tells, too
        return [int(ones[0]), *(plain == 0).nonzero()[:1, 0].tolist()]
    first = plain - shifted  # 1 where the first label counts
    picked = {int(ones[each[ones].argmin()]) for each in (plain, first)}
    picked |= {int(ones[each[ones].argmax()]) for each in (plain, first)}
    return sorted(picked)


def recognised(loss_fn: LossFunction, outputs: Any, batch: Batch) -> TokenLoss | None:
    """The loss over tokens that a loss is on a batch; None where it is a plain mean, or neither.

    Where all samples have as many counted tokens both means are one, and it is taken for plain.
    """
    if batch.size < 2 or not has_tokens(batch):
        return None
    n, targets = batch.size, batch.targets
    dtype = next((t.dtype for t in [outputs] if isinstance(t, Tensor)), torch.float32)
    loss_fn, given = loss_in(dtype, loss_fn), loss_fn
    with torch.no_grad():
        outputs = map_tensors(Tensor.detach, outputs)
        whole = scalar_loss(loss_fn, outputs, targets)
        each = torch.stack(
            [
                scalar_loss(loss_fn, *part_of((outputs, targets), n, slice(k, k + 1)))
                for k in range(n)
            ]
        )
    if same_loss(each.mean(), whole):
        return None
    found = []
    for candidate in _candidates(given):
        counted = candidate.counted(targets).to(each)
        of_tokens = torch.where(counted > 0, each * counted, 0.0).sum() / counted.sum()
        if same_loss(of_tokens, whole):
            found.append(candidate)
    if len(found) > 1:  # whose first labels count in no sample: the cross-entropies tell
        found.sort(key=lambda one: not _is_cross_entropy(one, outputs, targets, whole))
    return found[0] if found else None


def _is_cross_entropy(loss_fn: TokenLoss, outputs: Any, targets: Tensor, value: Tensor) -> bool:
    try:
        found = replace(loss_fn, loss_fn=None, mean_tokens=None)(outputs, targets)
    except _FAILURES:
        return False
    return same_loss(found, value.to(found))
