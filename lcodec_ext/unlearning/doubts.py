"""What speaks against a calibration: data that it cannot go by, and results that it did not reach.

Control groups are held against validation samples. That says something only if these are like the
training samples, were not trained on, and are many enough; and where control groups stayed far from
them, the request did, too. Each of these is warned of, since nothing in the result would show it.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext._checks import counted
from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.control import labels_of
from lcodec_ext.unlearning.deletion import Deletion
from lcodec_ext.unlearning.guard import Guard
from lcodec_ext.unlearning.request import GUARD_SIZE, Request, n_shared
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Measured, Workplace

_FEWEST = 30  # validation samples; the standard error of fewer is itself unknown
_UNSURE = 0.5  # standard error of their mean loss, as a share of it
_SHARED = 0.1  # of them, that may be training samples, as duplicates are
_UNLIKE = 0.25  # distance between two distribution functions, or shares of labels, beyond chance
_CHANCE = 1.63  # Kolmogorov's: 1% of samples from one distribution are further apart
_LARGE = 0.25  # of the training samples: a request that calls for retraining
_LITTLE = 0.25  # of the way from trained samples to validation
_GAP = 0.1  # of the validation loss, that trained samples lose less: else there is no way to go
_HARDLY = 0.85  # of the loss of guessing
_SMALL = 0.1  # of the removed samples' gradient: training has converged
_FAR = 2.0  # times what validation samples lose, or the request lost before
_POINTS = 0.005  # of accuracy, which a deletion may cost
_ANSWERS = 5  # the same of fewer than a thousand samples, which cannot tell half a point
_SURE = 1.645  # standard errors to one side: 95%


def warn_of_doubts(request: Request, guard: Guard | None, settings: Settings) -> None:
    """Warn of samples that a calibration would go by and should not."""
    if not settings.calibrate:
        return
    for doubt in _doubts(request, guard):
        warn(doubt)


def warn_of_statistics(
    work: Workplace, request: Request, before: Measured, guard: Guard | None
) -> None:
    """Warn of statistics that were collected elsewhere, and of a model that was hardly trained.

    A request after others finds the model a little further away than the statistics, and itself as
    well fitted there: only a loss that is larger there says that they are not of this training.
    """
    statistics = request.statistics
    if statistics is None:
        return
    unit = 1.0 if guard is None else guard.unit
    own = statistics.mean_loss(work.model, request.forget, work.loss_fn, work.settings.batch_size)
    # The last snapshot of `from_epochs` is one of training's, which goes on.
    if statistics.kind != "secant" and is_much_worse(before.forget_loss, own, unit):
        warn(
            "the statistics are of other weights than those that training ended with: at theirs "
            f"the deleted samples lose {own:.3g}, and by the model {before.forget_loss:.3g}. "
            "Collect them from the trained model"
        )
    if request.validation is None or work.settings.calibrate:  # warn_of_doubts says it there
        return
    labels = labels_of(_some_of(request.validation))
    if labels is not None and guard is not None and guard.watched == "accuracy":
        for doubt in _hardly_trained(np.unique(labels, return_counts=True)[1] / len(labels), guard):
            warn(doubt)


def _doubts(request: Request, guard: Guard | None) -> Iterator[str]:
    held, kept = request.validation, request.kept
    assert held is not None
    assert kept is not None
    n = request.m + request.n_retain
    if request.m > _LARGE * n:
        yield (
            f"the request is {request.m:,} of {n:,} training samples: a step from the present "
            "weights forgets less of so many than retraining does, which is also cheaper for them"
        )
    some = _some_of(held)
    trained = [each for each in (request.forget, kept.all) if each.in_memory]
    shared = sum(n_shared(some, each) for each in trained)
    if shared > _SHARED * len(some):
        yield (
            f"{shared:,} of {len(some):,} validation samples are training samples: the deletion "
            "will forget too little or nothing. Pass samples that the model was not trained on"
        )
    if guard is not None:
        yield from _unsure(guard.losses.numpy())
    yield from _unlike(some, request, guard)


def _some_of(held: Samples) -> Samples:
    """As many validation samples as a guard watches."""
    numbers = np.random.default_rng(0).permutation(len(held))[:GUARD_SIZE]
    return held.subset(np.sort(numbers).tolist()).loaded()


def _unsure(losses: NDArray[np.float64]) -> Iterator[str]:
    """Whether validation samples are too few to go by."""
    mean = abs(float(losses.mean()))
    error = float(losses.std()) / math.sqrt(len(losses))
    if len(losses) < _FEWEST or error > _UNSURE * mean:
        many = counted(len(losses), "validation sample")
        yield (
            f"the mean loss of {many} is {mean:.2g} +- {error:.2g}: "
            "the strength of the deletion is as unsure. Pass more of them"
        )


def _unlike(some: Samples, request: Request, guard: Guard | None) -> Iterator[str]:
    """Whether labels or inputs of validation samples are others than those of training samples."""
    assert request.kept is not None
    read = request.kept.read
    read = read.subset(range(min(len(read), GUARD_SIZE)))
    advice = "the strength found by them may be wrong. Pass samples like those"
    known, here, gone = labels_of(read), labels_of(some), labels_of(request.forget)
    if known is not None and here is not None and gone is not None:
        shares = _shares(known, here, gone, request.m / (request.m + request.n_retain))
        if _far(*shares, len(known), len(here)):
            yield f"the labels of validation samples are others than in training: {advice}"
        elif guard is not None and guard.watched == "accuracy":
            yield from _hardly_trained(shares[0], guard)
            guess = float(shares[0].max())
            if guard.before <= guess + 2 * math.sqrt(guess * (1 - guess) / len(here)):
                yield (
                    f"the model tells {guard.before:.1%} of validation samples right, and guessing "
                    f"{guess:.1%}: either their inputs or labels are others than in training, or "
                    "it was hardly trained, or learnt nothing but its samples"
                )
    if min(len(some), len(read)) < _FEWEST:
        return
    chance = _CHANCE * math.sqrt(1 / len(some) + 1 / len(read))
    for a, b in zip(_traits(read), _traits(some), strict=True):
        if _kolmogorov(a, b) > _UNLIKE + chance:
            yield f"the inputs of validation samples are others than in training: {advice}"
            return


def _hardly_trained(shares: NDArray[np.float64], guard: Guard) -> Iterator[str]:
    """Whether validation samples lose nearly what the shares of the labels alone would."""
    kept = shares[shares > 0]
    guessed, loss = float(-(kept * np.log(kept)).sum()), float(guard.losses.mean())
    if _HARDLY * guessed < loss < guessed / _HARDLY:
        yield (
            f"the mean loss of validation samples is {loss:.3g}, and that of guessing by how often "
            f"a label comes is {guessed:.3g}: the model was hardly trained, and nothing shows how "
            "strong a deletion has to be"
        )


def _shares(
    known: NDArray[np.int64], here: NDArray[np.int64], gone: NDArray[np.int64], weight: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each label, its share of training and of validation samples."""
    names = np.unique(np.concatenate([known, here, gone]))
    counts = [np.bincount(np.searchsorted(names, y), minlength=len(names)) for y in (known, gone)]
    retained, removed = (count / count.sum() for count in counts)
    found = np.bincount(np.searchsorted(names, here), minlength=len(names))
    return (1 - weight) * retained + weight * removed, found / found.sum()


def _far(a: NDArray[np.float64], b: NDArray[np.float64], n: int, k: int) -> bool:
    """Whether shares of n and of k samples are further apart than by chance and a quarter."""
    both = (n * a + k * b) / (n + k)
    chance = float(np.sqrt(both * (1 - both) * (1 / n + 1 / k)).sum()) / 2
    return float(np.abs(a - b).sum()) / 2 > _UNLIKE + chance


def _traits(samples: Samples) -> list[NDArray[np.float64]]:
    """Mean and root mean square of each sample's inputs in floating point."""

    def own() -> list[torch.Tensor | None]:
        found: list[list[torch.Tensor]] = []
        for batch in samples.batches(GUARD_SIZE):
            inputs = [t for t in tensors_of((batch.args, batch.kwargs)) if t.is_floating_point()]
            flat = [t.reshape(len(t), -1).double() for t in inputs if t.numel()]
            found.append([f(t) for t in flat for f in (_mean, _size)])
        return [torch.cat(parts).cpu() for parts in zip(*found, strict=True)]

    traits = samples.stacked(f"the inputs of {samples.name}", own)
    return [each.numpy() for each in traits if each is not None]


def _mean(flat: torch.Tensor) -> torch.Tensor:
    return flat.mean(1)


def _size(flat: torch.Tensor) -> torch.Tensor:
    return flat.square().mean(1).sqrt()


def _kolmogorov(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The largest distance between two samples' distribution functions."""
    at = np.concatenate([a, b])
    cumulative = [np.searchsorted(np.sort(each), at, side="right") / len(each) for each in (a, b)]
    return float(np.abs(cumulative[0] - cumulative[1]).max())


def warn_of_shortfall(
    before: Measured,
    after: Measured,
    deletions: Sequence[Deletion],
    guard: Guard | None,
    step_norm: float,
) -> None:
    """Warn of a calibrated step that stayed far from its aim, and of accuracy that any step cost.

    Where the objective's gradient is small compared with that of the removed samples, a step
    without damping is Newton's to the retained samples' optimum: then it is enough, though it moves
    little.
    """
    last = deletions[-1].last
    found = last.calibration
    if found is None:
        for each in _accuracy_fell(guard) if last.accepted else []:
            warn(each)
        return
    if not last.accepted:
        return
    told = []
    reason = _REASONS.get(found.stopped_by, found.stopped_by)
    start, target = found.trained, found.validation_before
    if step_norm == 0:
        told.append(
            "the model is unchanged: nothing was found that makes deleted samples more like the "
            f"validation samples, and none is removed. They lose {after.forget_loss:.3g}, and "
            f"validation samples {target:.3g}. Pass validation samples that the model was not "
            "trained on, or train again without the deleted samples",
        )
    gap = found.unseen - start
    reached = (found.control - start) / gap if gap > _GAP * abs(found.unseen) else 1.0
    solved = found.stopped_by == "range" and before.training_norm < _SMALL * before.forget_norm
    if reached < _LITTLE and found.stopped_by != "control" and not (found.finish or solved):
        told.append(
            f"the deletion forgets little: control groups that were deleted as the request lose "
            f"{found.control:.3g}, before {start:.3g}, and samples that were never seen "
            f"{found.unseen:.3g}. {reason}"
        )
    if found.outliers and not after.forget_loss > target:
        told.append(
            f"the deletion forgets little: the deleted samples lose {after.forget_loss:.3g}, "
            f"before {before.forget_loss:.3g}, and samples that were never seen {target:.3g}"
        )
    if found.groups_of == "classes":
        told.append(
            "a class was deleted as a whole: groups of other classes, which the strength was found "
            f"by, cannot tell how far to go. Its samples lose {after.forget_loss:.3g} now; a model "
            "that never saw their class would hardly recognise any"
        )
    usual = max(target, before.forget_loss)
    if after.forget_loss > _FAR * usual > 0 and not found.outliers:
        told.append(
            f"the deleted samples lose {after.forget_loss:.3g} now, before "
            f"{before.forget_loss:.3g}, and samples that were never seen {target:.3g}: the "
            "deletion may have gone too far for them. Compare it with retraining"
        )
    told += _accuracy_lost(guard)
    for each in told:
        warn(each)


def _accuracy_lost(guard: Guard | None) -> list[str]:
    """What to say where validation samples leave it open that half a point of accuracy is lost.

    Or five answers, of fewer than a thousand. By how many of them are no longer right, or right
    now: a fall on some is chance where as many rise, and hides where they happen to.
    """
    if guard is None or guard.watched != "accuracy":
        return []
    falls = guard.falls().numpy()
    n, changed = len(falls), np.count_nonzero(falls)
    at_most = falls.mean() + _SURE * falls.std() / math.sqrt(n)
    if at_most <= max(_POINTS, _ANSWERS / n):
        return []
    now = guard.before - falls.mean()
    same = abs(falls.sum()) < 0.5
    how = f"stayed at {now:.2%}" if same else f"went from {guard.before:.2%} to {now:.2%}"
    return [
        f"accuracy on {counted(n, 'validation sample')} {how}, where {changed:,} changed: on other "
        f"samples it may have fallen by {100 * at_most:.1f} points (95% bound). More validation "
        "samples would tell"
    ]


def _accuracy_fell(guard: Guard | None) -> list[str]:
    """What to say of a step that was not calibrated, where more than chance says accuracy fell.

    Fewer than five answers are taken for chance: their spread is not known.
    """
    if guard is None or guard.watched not in ("accuracy", "token accuracy"):
        return []
    falls = guard.falls().numpy()
    n, fall = len(falls), float(falls.mean())
    if fall * n < _ANSWERS or fall - _SURE * falls.std() / math.sqrt(n) <= _POINTS:
        return []
    return [
        f"the deletion costs {guard.watched}: on {counted(n, 'sample')} that the guard watches it "
        f"went from {guard.before:.2%} to {guard.before - fall:.2%}, by more than chance. Take a "
        "larger damping, or a smaller max_drop, at which the guard takes the step back"
    ]


_STOPPED = "A stronger step was stopped by "
_REASONS = {
    "validation": _STOPPED + "the loss of validation samples, which would rise by more than 10%",
    "retained": _STOPPED + "the loss of retained samples, which would rise too much",
    "accuracy": _STOPPED + "accuracy on validation samples, which would fall",
    "request": _STOPPED + "the removed samples' own loss, which would rise by three times the gap",
    "residual": _STOPPED + "its system, which max_iterations do not solve",
    "curvature": _STOPPED + "the curvature, which is indefinite",
    "range": "Without damping the step goes no further. A larger n_curvature, more max_iterations "
    "or the weight_decay of the training, if it was another, may",
}
