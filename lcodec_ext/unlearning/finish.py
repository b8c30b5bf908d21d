"""The finish: the retained objective, after a step or in its place."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._progress import counted
from lcodec_ext._torch.loss import NotFiniteError, in_parts, mean_gradient, mean_loss
from lcodec_ext._torch.predict import predict
from lcodec_ext._torch.samples import Samples
from lcodec_ext._torch.tokens import of_sets
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
from lcodec_ext.unlearning.statistics import LARGE
from lcodec_ext.unlearning.step import Block

BATCHED = 5000  # retained samples, from which on mini-batches finish
ITERATIONS = 32  # of L-BFGS on fewer
UNLIKE = 0.9  # share of pairs in which a removed sample loses more: outliers
ENOUGH = 0.4  # of the gap between trained samples and validation, where L-BFGS alone does
MOST = 10_000  # retained samples of L-BFGS; more do not change the direction by much
_KEPT_BYTES = 2**26  # of batches that are kept while it iterates
_LINE_SEARCH = 25  # evaluations
_TRAINED = 0.01  # of the retained objective: below, the network is surer than training made it
_ENDED = 0.95  # of it: below, training had not ended, and this would be more of it, no deletion
_PATIENCE = 8  # iterations without one that holds that end it
_LOOKED = 2  # iterations, after which validation is looked at


class Finish(NamedTuple):
    """What followed a step, or took its place."""

    steps: int = 0  # iterations or batches
    by: str = ""  # in words


def form_of(finish: int | None, n: int, n_parameters: int) -> Literal["batches", "L-BFGS", ""]:
    """How `finish` is done with n retained samples, for a model of so many numbers.

    Where no length is given: by mini-batches if there are samples enough, else by L-BFGS, except of
    a large model. Each iteration takes a pass or two over the retained samples, and large models
    are fine-tuned for few epochs: thirty would take several times as long as their training.
    """
    if finish is None:
        if n >= BATCHED:
            return "batches"
        return "" if n_parameters > LARGE else "L-BFGS"
    return "L-BFGS" if finish else ""


def form(block: Block) -> Literal["batches", "L-BFGS", ""]:
    """How this deletion is finished."""
    settings, n = block.work.settings, len(block.retained.all)
    return form_of(settings.finish, n, block.work.n_numbers)


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


def finish_alone(block: Block, harm: Harm, *, outliers: bool, known: bool) -> Finish | None:
    """Make the model one that was not trained on the removed samples, from where it is.

    With few retained samples L-BFGS minimises their objective. With many a copy that has forgotten
    outliers leads their outputs; other samples need a step. None, and everything as before, if the
    removed samples then still lose less than they should, unless they are known to be outliers.
    """
    work, theta, how = block.work, block.now(), form(block)
    batches = how == "batches"
    if not how or (batches and not outliers):
        return None
    why, before = "", work.mean_loss(block.part.forget)

    def does(model: torch.nn.Module) -> bool:
        lost, held = (
            mean_loss(model, each, work.loss_fn, work.settings.batch_size)
            for each in (block.part.forget, harm.validation)
        )
        if outliers:
            return lost > OUTLIERS * held
        return lost - before > ENOUGH * harm.levels.gap

    with work.timed("finish"):
        if batches:
            try:
                teacher = trained_copy(block, harm.validation)
                if not known and not does(teacher):
                    return None
                wanted = outputs_led_by(block, teacher, rescale=True)
                return Finish(
                    follow(block, teacher, wanted, FOLLOW),
                    "mini-batches, led by a copy that was trained without the removed samples",
                )
            except (NotTrainedError, NotFiniteError) as error:
                block.restore(theta, block.buffers)
                if block.work.n_numbers > LARGE:
                    return None
                why = f" instead of mini-batches, as {error}"
        # After a step the vectors that it was found by are still there.
        history = 1 if known and work.space_bytes is not None else work.history
        kept = _lbfgs(block, harm, theta, history, outliers=outliers)
        if known or does(work.model):
            return Finish(kept, f"L-BFGS on the retained samples{why}")
    block.put(theta)
    return None


def finish_step(block: Block, harm: Harm) -> Finish | None:
    """Restore the retained samples after a step, with the removed ones' outputs held; or None.

    Only by mini-batches: on few samples L-BFGS gains nothing after a calibrated step.
    """
    if form(block) != "batches":
        return None
    with block.work.timed("finish"):
        try:
            wanted = outputs_led_by(block, block.work.model, rescale=False)
            batches = follow(block, block.work.model, wanted, HOLD)
        except (NotTrainedError, NotFiniteError):
            return None
    return Finish(batches, "mini-batches, the removed samples' outputs held as after the step")


def _lbfgs(block: Block, harm: Harm, before: Tensor, history: int, *, outliers: bool) -> int:
    """L-BFGS on the retained objective from the present weights, as long as validation holds.

    In evaluation mode, on the selected parameters, with a strong Wolfe line search. The history is
    10 pairs of vectors, fewer where memory is limited.
    Each iteration takes one or two passes over the retained samples, every second one another over
    validation. They end where the objective has fallen to a hundredth: it is not to go on with
    training. For samples like any other a fall by a twentieth is too much, and all is undone:
    training had not ended, and the accuracy that more of it costs hides on the samples that it is
    stopped by. Returns the iterations that were kept.
    """
    work = block.work
    retained = _some(block).kept(work.settings.batch_size, _KEPT_BYTES)
    parameters = {k: work.parameters[k] for k in block.layout.parameters}
    theta = block.now().requires_grad_()
    decay, loss_fn = block.decay(), of_sets(work.loss_fn, retained)
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=1,
        max_eval=_LINE_SEARCH,  # of one iteration: the default allows its line search none
        history_size=history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    known: list[tuple[float, Tensor]] = []  # where the line search ended, for the next one

    def closure() -> float:
        here = theta.detach()
        if not known or not torch.equal(block.now(), here):
            known.clear()  # its gradient is as large as the model
            theta.grad = None
            block.put(here)
            loss, gradient = mean_gradient(
                work.model,
                retained,
                loss_fn,
                parameters,
                work.settings.batch_size,
                weight_decay=work.decay,
                keep_unused=True,
            )
            for each, w in zip(in_parts(decay), in_parts(here), strict=True):
                loss += float((each.double() * w.double().square()).sum()) / 2
            known.append((loss, block.layout.gather(gradient)))
        theta.grad = known[-1][1]
        return known[-1][0]

    best, kept = before, 0
    start = closure()
    most = work.settings.finish or ITERATIONS
    for iteration in counted(
        work.progress, range(1, most + 1), total=most, desc="finish", unit="iteration"
    ):
        try:
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        except NotFiniteError:
            break
        left = known[-1][0]
        if left < _ENDED * start and not outliers and start > 0:
            best, kept = before, 0
            break
        ended = iteration == most or left < _TRAINED * start
        if iteration % _LOOKED and not ended:
            continue
        if not torch.equal(block.now(), theta.detach()):  # known is of other weights
            known.clear()
            block.put(theta.detach())
        if harm.validation_loss() <= harm.most and not harm.costs_accuracy():
            best, kept = theta.detach().clone(), iteration
        elif iteration - kept >= _PATIENCE:
            break
        if ended:
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
