"""A mean over tokens, as a loss in which samples count by their tokens."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcodec_ext._torch.batches import part_of, tensors_of

_BYTES = 2**26  # of log-probabilities that are formed at a time


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """What `per_token_loss` returns, and what the package makes of a mean over tokens.

    By itself it is the mean over the counted tokens of a batch. Where `mean_tokens` is given, it is
    ``mean * counted / (n * mean_tokens)`` of a batch of n samples: the plain mean over samples of
    what each contributes to the mean over all tokens, if `mean_tokens` are those of a sample on
    average.

    Attributes
    ----------
    given : object, or None
        The loss that was found to be such a mean; None where the user said so.
    loss_fn : callable, or None for cross-entropy over the classes of the last axis
    causal : bool
        Whether the label of a token is compared with the outputs for the token before it.
    ignore_index : int
    label_smoothing : float
        Of the own cross-entropy.
    mean_tokens : float, or None
    """

    given: Any
    loss_fn: Callable[[Any, Any], Tensor] | None
    causal: bool
    ignore_index: int
    label_smoothing: float = 0.0
    mean_tokens: float | None = None

    def __repr__(self) -> str:
        own = "" if self.loss_fn is None else f"{self.loss_fn!r}, "
        ignored = f", ignore_index={self.ignore_index}" if self.ignore_index != -100 else ""
        return f"per_token_loss({own}causal={self.causal}{ignored})"

    def of_mean(self, mean_tokens: float) -> "TokenLoss":
        """The plain mean over samples, of which one has so many counted tokens on average."""
        return replace(self, mean_tokens=mean_tokens)

    def _labels(self, targets: Any) -> Tensor:
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            given = f"a tensor of {targets.dtype}" if isinstance(targets, Tensor) else type(targets)
            raise ValueError(
                "per_token_loss counts the labels of one tensor of integers, of shape (n, T); got "
                f"targets that are {given}"
            )
        if not self.causal:
            return targets
        if targets.ndim < 2:
            raise ValueError(
                "causal=True compares labels with the outputs one token before, and needs labels "
                f"of shape (n, T); got {tuple(targets.shape)}"
            )
        return targets[:, 1:]

    def counted(self, targets: Any) -> Tensor:
        """How many labels of each sample count, shape (n,), of int64."""
        labels = self._labels(targets)
        return (labels != self.ignore_index).reshape(len(labels), -1).sum(1)

    def weights(self, targets: Any) -> Tensor:
        """What each sample counts for, 1 on average over the training samples: float64, (n,)."""
        assert self.mean_tokens is not None
        return self.counted(targets).double() / self.mean_tokens

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        counted = self.counted(targets).sum()
        if self.loss_fn is None:
            total = self._cross_entropies(outputs, targets).sum()
            if self.mean_tokens is None:
                return total / counted.clamp(min=1)
            return total / (len(targets) * self.mean_tokens)
        if not bool(counted):  # a mean over none
            return sum((t.sum() * 0.0 for t in tensors_of(outputs)), torch.zeros(()))
        loss = self.loss_fn(outputs, targets)
        if self.mean_tokens is None or not isinstance(loss, Tensor):
            return loss
        return loss * (counted.to(loss.dtype) / (len(targets) * self.mean_tokens))

    def _cross_entropies(self, outputs: Any, targets: Tensor) -> Tensor:
        """Of each token, 0 where it does not count; shape (n, T)."""
        logits = logits_of(outputs, targets)
        if logits is None:
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                "per_token_loss() compares logits of shape (n, T, classes) with labels of shape "
                f"(n, T); got outputs of {given} and labels of {tuple(targets.shape)}. A loss of "
                "your own takes other outputs: per_token_loss(loss_fn)"
            )
        labels = self._labels(targets)
        if self.causal:
            logits = logits[:, :-1]
        each = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            labels.reshape(-1).long(),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return each.reshape(labels.shape)

    def cross_entropy_weights(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int] | None:
        """What the cross-entropy of each token counts for in a sample's part, and the class axis.

        As the outputs without their classes; None of other losses. One of the user's is taken for
        cross-entropy where it has the value of that.
        """
        logits = logits_of(outputs, targets)
        if logits is None or self.mean_tokens is None:
            return None
        own = replace(self, loss_fn=None)
        if self.loss_fn is not None and bool(self.counted(targets).any()):
            given, usual = (each(outputs, targets).float() for each in (self, own))
            if not torch.isclose(given, usual, rtol=2e-5, atol=1e-6):
                return None
        counted = (self._labels(targets) != self.ignore_index).to(logits.dtype)
        weights = torch.zeros(targets.shape, dtype=logits.dtype, device=targets.device)
        weights[:, : counted.shape[1]] = counted / self.mean_tokens
        return weights, -1 if logits is outputs else 1

    def each(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean over the tokens of each sample alone, 0 without any; shape (n,)."""
        n, counted = len(targets), self.counted(targets)
        if self.loss_fn is None:
            sums = self._cross_entropies(outputs, targets).reshape(n, -1).sum(1)
            return sums / counted.clamp(min=1)
        return torch.where(counted > 0, self._alone(outputs, targets), 0.0)

    def _alone(self, outputs: Any, targets: Tensor) -> Tensor:
        """What a loss of the user's says of each sample alone, whatever of those without tokens."""
        loss_fn, n = self.loss_fn, len(targets)
        assert loss_fn is not None
        if isinstance(outputs, Tensor):
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    return torch.func.vmap(lambda z, y: loss_fn(z[None], y[None]))(outputs, targets)
            except (RuntimeError, ValueError, NotImplementedError):  # what vmap cannot trace
                pass
        alone = replace(self, mean_tokens=None)
        return torch.stack(
            [alone(*part_of((outputs, targets), n, slice(k, k + 1))) for k in range(n)]
        )

    def right(self, outputs: Any, targets: Tensor) -> Tensor | None:
        """Counted tokens of each sample whose class has the largest logit, shape (n,)."""
        logits = logits_of(outputs, targets)
        if logits is None:
            return None
        labels = self._labels(targets)
        found = logits[:, :-1] if self.causal else logits
        counted = (found.argmax(-1) == labels) & (labels != self.ignore_index)
        return counted.reshape(len(labels), -1).sum(1)

    def distributions(
        self, outputs: Any, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]] | None:
        """Log-probabilities (k, C) for counted tokens, their labels (k,) and samples (k,).

        In float64, a few samples at a time. None where the outputs are not logits.
        """
        logits = logits_of(outputs, targets)
        if logits is None:
            return None
        labels = self._labels(targets)
        if self.causal:
            logits = logits[:, :-1]
        return self._pieces(logits.reshape(len(labels), -1, logits.shape[-1]), labels.flatten(1))

    def _pieces(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        n, length, classes = logits.shape
        step = max(1, _BYTES // (8 * max(1, length * classes)))
        for start in range(0, n, step):
            some = labels[start : start + step]
            counts = some != self.ignore_index
            number = torch.arange(start, start + len(some), device=some.device)
            rows = logits[start : start + step][counts].double().log_softmax(1)
            yield rows, some[counts].long(), number[:, None].expand_as(some)[counts]


def logits_of(outputs: Any, targets: Tensor) -> Tensor | None:
    """Outputs as logits with the classes along the last axis; None where they are no such.

    Classes may also stand along the second axis, as PyTorch's cross-entropy has them.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim != targets.ndim + 1:
        return None
    if outputs.shape[:-1] == targets.shape:
        return outputs
    if outputs.ndim > 2 and (outputs.shape[0], *outputs.shape[2:]) == targets.shape:
        return outputs.movedim(1, -1)
    return None


def given_loss(loss_fn: Any) -> Any:
    """The loss as the user gave it."""
    if not isinstance(loss_fn, TokenLoss):
        return loss_fn
    return replace(loss_fn, mean_tokens=None) if loss_fn.given is None else loss_fn.given
