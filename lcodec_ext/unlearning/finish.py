"""The finish: a few iterations on the retained objective, for as long as validation gains."""

import numpy as np
import torch
from torch import Tensor

from lcodec_ext._torch.loss import NotFiniteError, mean_gradient
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.step import Block

MOST = 10_000  # retained samples; more do not change the direction by much
_SLACK = 1.1  # times the least validation loss, up to which an iterate is as good
_PATIENCE = 8  # iterations without a gain that end it


def finish(block: Block, validation: Samples) -> int:
    """L-BFGS on the retained objective from the present weights, up to where validation is best.

    In evaluation mode, on the selected parameters, with history 10 and a strong Wolfe line search.
    At most `Settings.finish` iterations, each of one or two passes over the retained samples and
    one over validation. Returns the iterations that were kept.
    """
    work = block.work
    retained = _some(block)
    parameters = {k: work.parameters[k] for k in block.layout.parameters}
    theta = block.now().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=1,
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

    best, kept, least = block.now(), 0, work.mean_loss(validation)
    with work.timed("finish"):
        for iteration in range(1, work.settings.finish + 1):
            try:
                optimizer.step(closure)  # type: ignore[no-untyped-call]
            except NotFiniteError:
                break
            block.put(theta.detach())
            loss = work.mean_loss(validation)
            least = min(least, loss)
            if loss <= _SLACK * least:
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
