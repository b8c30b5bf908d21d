"""What trained and unseen samples lose, in batches that are kept."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import share_of, weight_of
from lcodec_ext._torch.predict import classes_of, predict, scores_of
from lcodec_ext._torch.samples import Samples, outputs_of
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext.unlearning.workplace import Workplace

TAIL = 0.02  # of samples, whose losses count for no more than the least of them


class Fetched:
    """Samples whose loss is taken again and again, in batches that are kept."""

    def __init__(self, work: Workplace, samples: Samples) -> None:
        self.samples = samples.kept(work.settings.batch_size, sys.maxsize)
        self._work = work
        self.right: Tensor | None = None  # as of the last loss: 1 where right, or the score

    def __len__(self) -> int:
        return len(self.samples)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss at the present weights; it may be NaN or infinite."""
        n, loss_fn = len(self), self._work.loss_fn
        like = torch.zeros(2 + 2 * n, dtype=torch.float64)
        what = f"the loss of the {self.samples.name} samples"
        (found,) = self.samples.summed(what, lambda: [self._own()], [like])
        tokens = float(found[1])
        self.right = found[2 : 2 + n] if bool(found[2 + n :].all()) else None
        if self.right is not None and isinstance(loss_fn, TokenLoss) and not self._work.score:
            self.right = self.right / (tokens / n)  # their mean is the share of right tokens
        return float(found[0]) / n / share_of(loss_fn, tokens, n)

    def _own(self) -> Tensor:
        """The sum of the losses, counted tokens; by sample `right`, and whether that is known."""
        work, total, tokens, right, n = self._work, 0.0, 0.0, [], len(self)
        found = torch.zeros(2 + 2 * n, dtype=torch.float64)
        for batch in self.samples.batches(work.settings.batch_size):
            outputs = outputs_of(work.model, batch)
            total += float(work.loss_fn(outputs, batch.targets)) * batch.size
            tokens += weight_of(work.loss_fn, batch)
            if (some := self._right(outputs, batch)) is not None:
                right.append(some)
        if right:
            at = 2 + torch.from_numpy(self.samples.places)
            found[at], found[n + at] = torch.cat(right), 1.0
        found[0], found[1] = total, tokens
        return found

    def _right(self, outputs: Any, batch: Batch) -> Tensor | None:
        """Of each sample the score, whether it is right, or its right tokens."""
        work, targets = self._work, batch.targets
        if work.score is not None:
            return scores_of(work.score, outputs, targets, batch.size)
        if isinstance(work.loss_fn, TokenLoss):
            found = work.loss_fn.right(outputs, targets)
            return None if found is None else found.double().cpu()
        labels = classes_of(targets)
        if labels is None or not isinstance(outputs, Tensor) or outputs.ndim != 2:
            return None
        return (outputs.argmax(1) == labels).double().cpu()

    def losses(self) -> Tensor:
        """Of each sample, shape (n,); NaN where one is not finite."""
        return self.lost().losses

    def lost(self) -> "Lost":
        """The loss of each sample, NaN where one is not finite, and its tokens."""
        work = self._work
        options = work.loss_fn, work.settings.batch_size, work.score
        try:
            found = predict(work.model, self.samples, *options)
        except ValueError:
            return Lost(torch.full((len(self),), math.nan))
        return Lost(found.losses, found.counted)


class Lost(NamedTuple):
    """What n samples lose; of a loss over tokens the mean over those of each, and their number."""

    losses: Tensor  # (n,)
    tokens: Tensor | None = None  # (n,)

    @classmethod
    def joined(cls, sets: "Sequence[Lost]") -> "Lost":
        """The samples of several sets, one after the other."""
        known = [each.tokens for each in sets if each.tokens is not None]
        tokens = torch.cat(known) if len(known) == len(sets) else None
        return cls(torch.cat([each.losses for each in sets]), tokens)

    @property
    def mean(self) -> float:
        """Over samples, or over their tokens."""
        if self.tokens is None:
            return float(self.losses.mean())
        return float((self.losses * self.tokens).sum() / self.tokens.sum())

    def up_to(self, cap: float) -> "Lost":
        """No sample losing more than a cap."""
        return Lost(self.losses.clamp(max=cap), self.tokens)

    def below(self, cap: float) -> tuple[float, "Lost"]:
        """The share of those that lose at most a cap, and these."""
        few = self.losses <= cap
        if self.tokens is None:
            return int(few.sum()) / len(few), Lost(self.losses[few])
        share = float(self.tokens[few].sum() / self.tokens.sum())
        return share, Lost(self.losses[few], self.tokens[few])


@dataclass(frozen=True)
class Levels:
    """What trained and unseen samples lose, no sample counting for more than the cap."""

    cap: float
    trained: float
    unseen: float

    @classmethod
    def of(cls, trained: Lost, unseen: Lost) -> "Levels":
        """By the losses of samples."""
        cap = float(unseen.losses.quantile(1 - TAIL))
        found = cls(cap, math.nan, unseen.up_to(cap).mean)
        return replace(found, trained=found.of_trained(trained))

    def mean(self, lost: Lost) -> float:
        """Mean loss; NaN where one is."""
        return lost.up_to(self.cap).mean

    def of_trained(self, lost: Lost) -> float:
        """That of trained samples, of which no more are above the cap than of unseen ones."""
        share, usual = lost.below(self.cap)
        if not share:
            return self.cap
        above = min(TAIL, 1 - share)
        return above * self.cap + (1 - above) * usual.mean

    @property
    def gap(self) -> float:
        """How much less trained samples lose than unseen ones."""
        return max(0.0, self.unseen - self.trained)
