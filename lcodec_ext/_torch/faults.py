"""Which sample a loss fails on, and why: for messages."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, part_of, tensors_of

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
_CHARACTERS = 40  # of a target in a message


def number_in(batch: Batch, k: int) -> int:
    """The number of a batch's k-th sample in the data that were given."""
    return k if batch.numbers is None else int(batch.numbers[k])


def sample_in(batch: Batch, k: int, name: str) -> str:
    """A batch's k-th sample, in words."""
    return f"sample {number_in(batch, k):,} of {name}"


def check_finite(tensors: Any, numbers: Any, name: str, *, whole: bool = True) -> None:
    """Refuse samples that hold NaN or infinity; numbers are those of the samples.

    The message counts them if these samples are the whole set.
    """
    for tensor in tensors:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue  # one pass, where isfinite of every number takes several times as long
        if not bool(torch.isfinite(tensor).all()):  # the sum of finite numbers may overflow
            rows = torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
            k = int((~rows).nonzero()[0])
            entry = tuple((~torch.isfinite(tensor[k])).nonzero()[0].tolist())
            value = float(tensor[k][entry] if entry else tensor[k])
            where = f", at {list(entry)}" if entry else ""
            count = f", {int((~rows).sum()):,} of {len(rows):,} samples have such values"
            raise ValueError(
                f"{name} holds NaN or infinity: sample {int(numbers[k]):,} has {value}{where}"
                f"{count if whole else ''}. Leave such samples out or fill them in"
            )


def check_labels(
    batch: Batch, n_classes: int, ignore_index: int, name: str, *, ignored: bool
) -> None:
    """Refuse labels of cross-entropy outside the classes, and ignored ones unless they may be."""
    targets = batch.targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
        return
    skipped = targets == ignore_index
    wrong = (targets < 0) | (targets >= n_classes)
    wrong = wrong & ~skipped if ignored else wrong | skipped
    if not bool(wrong.any()):
        return
    k = int(wrong.nonzero()[0])
    label = int(targets[k])
    if label == ignore_index:
        raise ValueError(
            f"{sample_in(batch, k, name)} has target {label}, which loss_fn ignores "
            f"(ignore_index): leave such samples out, {int(skipped.sum()):,} of "
            f"{len(targets):,} here"
        )
    raise ValueError(
        f"{sample_in(batch, k, name)} has target {label}; the model has {n_classes} outputs, so "
        f"targets must be classes 0 to {n_classes - 1}"
    )


def fault_of(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, batch: Batch, name: str) -> str:
    """The first sample whose own loss fails or is not finite, in words; empty if there is none."""
    n = batch.size
    for k in range(n):
        own, targets = part_of((outputs, batch.targets), n, slice(k, k + 1))
        try:
            with torch.no_grad():
                loss: Any = loss_fn(own, targets)
            if not isinstance(loss, Tensor):  # of whichever sample
                return ""
            if bool(torch.isfinite(loss).all()):
                continue
            found = f"has the loss {float(loss.sum()):g}"
        except _FAILURES as error:
            found = f"fails: {error}"
        if not all(bool(torch.isfinite(t).all()) for t in tensors_of(own)):
            found += ", as its outputs are not finite"
        return f"{sample_in(batch, k, name)}, with target {_shown(targets)}, {found}"
    return ""


def _shown(targets: Any) -> str:
    values = [t[0].tolist() if t.ndim else t.item() for t in tensors_of(targets)]
    text = str(values[0] if len(values) == 1 else values)
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 3] + "..."
