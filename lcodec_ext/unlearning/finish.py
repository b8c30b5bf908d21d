"""The finish: the retained objective, after a step or, for outliers, in its place."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._torch.loss import NotFiniteError, mean_gradient, mean_loss
from lcodec_ext._torch.predict import predict
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.calibrate import OUTLIERS, Harm
from lcodec_ext.unlearning.distil import (
    FOLLOW,
    HOLD,
    NotTrainedError,
    follow,
    outputs_led_by,
    trained_copy,
)
from lcodec_ext.unlearning.request import GUARD_SIZE
from lcodec_ext.unlearning.step import Block

BATCHED = 5000  # retained samples, from which on mini-batches finish
ITERATIONS = 22  # of L-BFGS on fewer
UNLIKE = 0.9  # share of pairs in which a removed sample loses more: outliers
MOST = 10_000  # retained samples of L-BFGS; more do not change the direction by much
_LINE_SEARCH = 25  # evaluations
_PATIENCE = 8  # iterations without one that holds that end it


class Finish(NamedTuple):
    """What followed a step, or took its place."""

    steps: int = 0  # iterations or batches
    by: str = ""  # in words


def in_batches(block: Block) -> bool:
    """Whether mini-batches finish: where no length is given and there are samples enough."""
    return block.work.settings.finish is None and len(block.retained.all) >= BATCHED


def unlikeness(block: Block, retained: Samples) -> float:
    """How often a removed sample loses more than a retained one, before anything is done."""
    work, forget = block.work, block.part.forget
    rng = np.random.default_rng([work.settings.seed, 11])
    few = forget.subset(np.sort(rng.permutation(len(forget))[:GUARD_SIZE]).tolist())
    removed, kept = (
        predict(work.model, each, work.loss_fn, work.settings.batch_size).losses.numpy()
        for each in (few, retained)
    )
    order = np.sort(kept)
    below = np.searchsorted(order, removed, "left") + np.searchsorted(order, removed, "right")
    return float(below.mean() / (2 * len(order)))


def finish_outliers(block: Block, harm: Harm, *, known: bool) -> Finish | None:
    """Make the model one that was not trained on outliers, from where it is.

    With many retained samples a copy that has forgotten them leads their outputs, with few L-BFGS
    minimises the retained objective. None, and everything as before, if they were not known to be
    outliers and after a training without them do not lose much more than validation samples.
    """
    work, theta = block.work, block.now()
    why = ""
    with work.timed("finish"):
        if in_batches(block):
            try:
                teacher = trained_copy(block, harm.validation)
                if not known and not _lost(block, harm, teacher):
                    return None
                wanted = outputs_led_by(block, teacher, rescale=True)
                return Finish(
                    follow(block, teacher, wanted, FOLLOW),
                    "mini-batches, led by a copy that was trained without the removed samples",
                )
            except (NotTrainedError, NotFiniteError) as error:
                block.restore(theta, block.buffers)
                why = f" instead of mini-batches, as {error}"
        kept = _lbfgs(block, harm)
    if not known and not _lost(block, harm, work.model):
        block.put(theta)
        return None
    return Finish(kept, f"L-BFGS on the retained samples{why}")


def finish_step(block: Block, harm: Harm) -> Finish | None:
    """Restore the retained samples after a step, with the removed ones' outputs held; or None.

    Only by mini-batches: on few samples L-BFGS gains nothing after a calibrated step.
    """
    if not in_batches(block):
        return None
    with block.work.timed("finish"):
        try:
            wanted = outputs_led_by(block, block.work.model, rescale=False)
            batches = follow(block, block.work.model, wanted, HOLD)
        except (NotTrainedError, NotFiniteError):
            return None
    return Finish(batches, "mini-batches, the removed samples' outputs held as after the step")


def _lost(block: Block, harm: Harm, model: torch.nn.Module) -> bool:
    """Whether a model loses much more on the removed samples than on validation samples."""
    loss_fn, size = block.work.loss_fn, block.work.settings.batch_size
    forget, held = (
        mean_loss(model, each, loss_fn, size) for each in (block.part.forget, harm.validation)
    )
    return forget > OUTLIERS * held


def _lbfgs(block: Block, harm: Harm) -> int:
    """L-BFGS on the retained objective from the present weights, as long as validation holds.

    In evaluation mode, on the selected parameters, with history 10 and a strong Wolfe line search.
    Each iteration takes one or two passes over the retained samples and one over validation.
    Returns the iterations that were kept.
    """
    work = block.work
    retained = _some(block)
    parameters = {k: work.parameters[k] for k in block.layout.parameters}
    theta = block.now().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=1,
        max_eval=_LINE_SEARCH,  # of one iteration: the default allows its line search none
        history_size=10,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    known: list[tuple[Tensor, float, Tensor]] = []  # where the line search ended, for the next one

    def closure() -> float:
        here = theta.detach()
        if not known or not torch.equal(known[-1][0], here):
            block.put(here)
            loss, gradient = mean_gradient(
                work.model,
                retained,
                work.loss_fn,
                parameters,
                work.settings.batch_size,
                weight_decay=work.settings.weight_decay,
            )
            square = float(here.double().square().sum())
            loss += work.settings.weight_decay / 2 * square
            known[:] = [(here.clone(), loss, block.layout.gather(gradient))]
        theta.grad = known[-1][2].clone()
        return known[-1][1]

    best, kept = block.now(), 0
    most = (1 + work.settings.max_rise) * harm.validation_before
    for iteration in range(1, (work.settings.finish or ITERATIONS) + 1):
        try:
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        except NotFiniteError:
            break
        block.put(theta.detach())
        if work.mean_loss(harm.validation) <= most:
            best, kept = theta.detach().clone(), iteration
        elif iteration - kept >= _PATIENCE:
            break
    block.put(best)
    return kept


def _some(block: Block) -> Samples:
    """The retained samples, or a draw from very many."""
    retained = block.retained.all
    if len(retained) <= MOST:
        return retained
    order = np.random.default_rng([block.work.settings.seed, 7]).permutation(len(retained))
    return retained.subset(np.sort(order[:MOST]).tolist()).loaded()
