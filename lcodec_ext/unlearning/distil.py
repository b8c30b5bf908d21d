"""Mini-batches of the retained samples, with the outputs of the removed ones led by a teacher."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._torch.batches import Batch, part_of, tensors_of
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.loss import NotFiniteError, finite_loss, is_much_worse, known_loss, mean_loss
from lcodec_ext._torch.modes import evaluating, seeded
from lcodec_ext._torch.predict import predict
from lcodec_ext._torch.samples import NotTrainedError as NotTrainedError
from lcodec_ext._torch.samples import Samples, outputs_in_training, outputs_of
from lcodec_ext.unlearning.descent import Losses, descend, masks_of
from lcodec_ext.unlearning.repair import recalibrate
from lcodec_ext.unlearning.step import Block

BATCH = 128  # retained samples; a quarter as many removed ones are added
_HARD, _HARD_SHARE = 0.25, 0.4  # the retained samples that lose most, and their share of a batch
_KEPT, _FRESH = 0.5, 0.2  # of the weights, in a copy that is trained again
_CONFIDENCE = 1.15  # norm of the copy's logits, as a share of the model's on retained samples
_MEASURED = 1000  # retained samples whose logits are measured, and that batch norms are set by

_EACH: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
}


@dataclass(frozen=True)
class Pass:
    """How long mini-batches go on, and how fast."""

    epochs: float
    rate: float
    warm: float  # share of the batches in which the rate rises
    least: int  # batches, in any case
    stream: int  # of random numbers
    led: float = 0.0  # weight of the removed samples' outputs, added to the loss

    def batches(self, n: int) -> int:
        """How many of n samples it takes."""
        return max(self.least, math.ceil(self.epochs * n / BATCH))


COPY = Pass(epochs=1.3, rate=0.1, warm=0.2, least=150, stream=8)
FOLLOW = Pass(epochs=1.25, rate=0.03, warm=0.1, least=150, stream=9, led=0.5)  # the copy
HOLD = Pass(epochs=0.5, rate=0.01, warm=0.1, least=75, stream=10, led=1.0)  # what a step left


def trained_copy(block: Block, validation: Samples) -> nn.Module:
    """A copy with half of the weights and some noise, trained on the retained samples for a while.

    It has forgotten most of the removed samples, and keeps what the network has learnt in general.
    The noise is 0.2 times fresh weights: those of `reset_parameters` where all layers have it, else
    normal numbers with a variance of 1 / fan-in for matrices.
    """
    work, retained = block.work, block.retained.all
    before = work.mean_loss(validation)
    rng = np.random.default_rng([work.settings.seed, COPY.stream])
    with work.ranks.alone("a copy of the model"):
        model = copy_of(work.model)
        _shrink_and_perturb(model, int(rng.integers(2**63)))
    total = COPY.batches(len(retained))

    def loss_of(batch: Batch) -> Tensor:
        return finite_loss(work.loss_fn, outputs_in_training(model, batch), batch, "retain")

    def losses() -> Losses:
        for numbers in _draws(len(retained), BATCH, total, rng):
            yield partial(loss_of, retained.fetch(numbers))

    try:
        descend(
            work,
            model,
            {k: p for k, p in model.named_parameters() if p.requires_grad},
            losses(),
            total=total,
            rate=COPY.rate,
            warm=COPY.warm,
            seed=int(rng.integers(2**63)),
            what="teacher",
        )
        after = mean_loss(model, validation, work.loss_fn, work.settings.batch_size)
    except NotFiniteError:
        after = math.nan
    if is_much_worse(before, after):
        raise NotTrainedError(
            f"a copy that SGD trained on the retained samples loses {after:.3g} on validation "
            f"samples, and the model {before:.3g}"
        )
    return model


def _shrink_and_perturb(model: nn.Module, seed: int) -> None:
    owners = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    fresh = copy_of(model)
    with seeded(seed), torch.no_grad():
        if all(callable(getattr(owner, "reset_parameters", None)) for owner in owners):
            for module in fresh.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.reset_parameters()  # type: ignore[operator]
        else:
            for p in fresh.parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn_like(p) / math.sqrt(p[0].numel()))
        for p, new in zip(model.parameters(), fresh.parameters(), strict=True):
            if p.requires_grad:
                p.mul_(_KEPT).add_(new, alpha=_FRESH)


def outputs_led_by(block: Block, teacher: nn.Module, *, rescale: bool) -> Tensor:
    """A teacher's outputs for the removed samples, as the model is to have them.

    Logits are centred, and those of a copy rescaled: it was trained for a short time and is less
    sure than the model.
    """
    work = block.work
    wanted = _outputs(block, teacher, block.part.forget)
    if not rescale or _kind(block) not in ("cross_entropy", "bce_with_logits"):
        return wanted
    rng = np.random.default_rng([work.settings.seed, FOLLOW.stream, 1])
    few = rng.permutation(len(block.retained.all))[:_MEASURED]
    own = _outputs(block, work.model, block.retained.all.subset(np.sort(few).tolist()))
    size = _size(wanted)
    return wanted * (_CONFIDENCE * _size(own) / size) if size else wanted


def follow(block: Block, teacher: nn.Module, wanted: Tensor, how: Pass) -> int:
    """Train on the retained samples, while the removed samples' outputs are led to what is wanted.

    Two fifths of a batch are among the quarter of the retained samples that the teacher loses most
    on. Batch norms are set by retained samples afterwards. Returns the batches.
    """
    work, retained, forget = block.work, block.retained.all, block.part.forget
    rng = np.random.default_rng([work.settings.seed, how.stream])
    total = how.batches(len(retained))
    hard = _hardest(block, teacher)
    n_hard = int(_HARD_SHARE * BATCH)
    streams = (
        _draws(len(retained), BATCH - n_hard, total, rng),
        _draws(len(hard), n_hard, total, rng),
        _draws(len(forget), BATCH // 4, total, rng),
    )

    def loss_of(kept: Batch, removed: Batch, targets: Tensor) -> Tensor:
        outputs, led = _both(work.model, kept, removed)
        loss = finite_loss(work.loss_fn, outputs, kept, "retain")
        return loss + how.led * _apart(block, led, targets)

    def losses() -> Losses:
        for some, hardest, gone in zip(*streams, strict=True):
            kept = retained.fetch([*some, *hard[hardest].tolist()])
            yield partial(loss_of, kept, forget.fetch(gone), wanted[torch.as_tensor(gone)])

    descend(
        work,
        work.model,
        {k: work.parameters[k] for k in block.layout.parameters},
        losses(),
        total=total,
        rate=how.rate,
        warm=how.warm,
        seed=int(rng.integers(2**63)),
        what="finish",
        masks=masks_of(block),
    )
    recalibrate(block, _MEASURED)
    return total


def _draws(n: int, size: int, total: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """A number of draws of at most size of n, in which every one comes up before any again."""
    size, order = min(size, n), np.empty(0, np.int64)
    for _ in range(total):
        if len(order) < size:
            order = rng.permutation(n)
        yield order[:size].tolist()
        order = order[size:]


def _both(model: nn.Module, kept: Batch, removed: Batch) -> tuple[Tensor, Tensor]:
    """Outputs for two batches, in one pass if their samples are of one shape."""
    shapes = [
        [t.shape[1:] for t in tensors_of((b.args, b.kwargs, b.targets))] for b in (kept, removed)
    ]
    if shapes[0] != shapes[1]:
        return outputs_in_training(model, kept), outputs_in_training(model, removed)
    outputs = outputs_in_training(model, Batch.joined([kept, removed]))
    n = kept.size + removed.size
    first, second = slice(kept.size), slice(kept.size, n)
    return part_of(outputs, n, first), part_of(outputs, n, second)


def _kind(block: Block) -> str:
    known = known_loss(block.work.loss_fn)
    return "" if known is None else known.kind


def _apart(block: Block, outputs: Tensor, wanted: Tensor) -> Tensor:
    """How far outputs are from what is wanted."""
    if _kind(block) != "cross_entropy" or outputs.ndim < 2:
        return F.mse_loss(outputs, wanted)
    return F.smooth_l1_loss(outputs - outputs.mean(1, keepdim=True), wanted)


def _size(outputs: Tensor) -> float:
    """Mean norm of logits."""
    flat = outputs.detach().reshape(len(outputs), -1)
    return float(flat.norm(dim=1).mean())


def _outputs(block: Block, model: nn.Module, samples: Samples) -> Tensor:
    """Outputs in evaluation mode; logits of cross-entropy centred."""

    def own() -> list[Tensor | None]:
        found = []
        with evaluating(model), torch.no_grad():
            for batch in samples.batches(block.work.settings.batch_size):
                found.append(outputs_of(model, batch))
        if not all(isinstance(each, Tensor) for each in found):
            raise NotTrainedError(f"the model returns {type(found[0]).__name__}, not one tensor")
        if len({each.shape[1:] for each in found}) > 1:
            raise NotTrainedError("the outputs of the model differ in shape from sample to sample")
        return [torch.cat(found)]

    what = f"the outputs for the {samples.name} samples"
    (stacked,) = samples.stacked(what, own, same=(NotTrainedError,))
    assert stacked is not None
    outputs = stacked.to(samples.device)
    if _kind(block) == "cross_entropy" and outputs.ndim > 1:
        outputs -= outputs.mean(1, keepdim=True)
    return outputs


def _hardest(block: Block, model: nn.Module) -> NDArray[np.int64]:
    """Numbers of the retained samples that a model loses most on."""
    work, retained = block.work, block.retained.all
    each = _EACH.get(_kind(block))
    if each is None:
        losses = predict(model, retained, work.loss_fn, work.settings.batch_size).losses
    else:

        def own() -> list[Tensor | None]:
            found: list[Tensor] = []
            with evaluating(model), torch.no_grad():
                for batch in retained.batches(work.settings.batch_size):
                    parts = each(outputs_of(model, batch), batch.targets, reduction="none")
                    found.append(parts.reshape(batch.size, -1).mean(1))
            return [torch.cat(found)]

        (stacked,) = retained.stacked("the loss of the retained samples", own)
        assert stacked is not None
        losses = stacked
    most = max(1, int(_HARD * len(retained)))
    return losses.cpu().numpy().argsort(kind="stable")[::-1][:most].copy()
