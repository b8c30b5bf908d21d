"""Parameters that no sample uses: the regulariser alone does not move them."""

from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.request import Request
from lcodec_ext.unlearning.workplace import LossesAndGradients, Measured, Workplace


def measured_first(work: Workplace, request: Request) -> Measured:
    """Losses and gradients at the start; rows without a gradient anywhere are left alone.

    Where neither the removed nor the retained samples have a gradient (unused heads, rows of
    embeddings, dead units), nothing balances the removed samples' part of the regulariser: it would
    only scale the weights. It is left out there from now on. A theorem's step has all of it.
    """
    before = work.measure(request.forget, request.monitored)
    if work.settings.update == "certified":
        return before.kept(request.m, request.n_retain)
    idle = {
        name: entries
        for name, g in before.forget.items()
        if work.decay[name] and bool((entries := _alone(work, name, g, request.forget)).any())
    }
    for gradient, samples in _of_retained(work, request, before, idle):
        for name in list(idle):
            idle[name] &= _alone(work, name, gradient[name], samples)
    for name, entries in idle.items():
        if bool(entries.any()):
            work.decay[name] = work.decay[name] * (~entries).to(work.parameters[name].dtype)
            for gradient in (before.forget, before.retained or {}):
                if name in gradient:
                    gradient[name].masked_fill_(entries, 0.0)
    return before.kept(request.m, request.n_retain)


def _alone(work: Workplace, name: str, gradient: Tensor, samples: Samples | None) -> Tensor:
    """The rows in which a gradient of samples is that of the regulariser alone.

    Whole rows, what belongs to a unit: single entries, of inputs that are always zero for instance,
    are those of a parameter that is used.
    """
    p = work.parameters[name].detach()
    share = 1.0 if samples is None else work.share(samples)
    alone = gradient == work.decay[name] * p * share
    if share != 1:  # of tokens, added up in another order
        alone = torch.isclose(gradient, work.decay[name] * p * share, rtol=1e-5, atol=0.0)
    if p.ndim > 1:
        alone = alone.flatten(1).all(1).view(-1, *[1] * (p.ndim - 1)).expand_as(p)
    return alone & (p != 0)


def _of_retained(
    work: Workplace, request: Request, before: LossesAndGradients, idle: dict[str, Tensor]
) -> list[tuple[dict[str, Any], Samples | None]]:
    """Gradients of the retained samples that the step knows, as far as there is doubt; of which."""
    if not idle:
        return []
    if request.kept is None:
        return [(_of_statistics(work, request, idle), None)]
    assert before.retained is not None
    read, monitored = request.kept.read, request.kept.monitored
    if len(read) <= len(monitored):
        return [(before.retained, monitored)]
    doubted = {name: work.parameters[name] for name in idle}
    return [(before.retained, monitored), (work.gradient(read, doubted)[1], read)]


def _of_statistics(work: Workplace, request: Request, idle: dict[str, Tensor]) -> dict[str, Any]:
    """The regulariser's gradient where the statistics have no curvature, else another one."""
    statistics = request.statistics
    found = {k: torch.full_like(p, torch.nan) for k, p in work.parameters.items()}
    if statistics is None or statistics.selection is None:
        return found
    known = statistics.diagonal()
    assert known is not None  # whatever has a selection has a matrix or factors
    layout = statistics.selection.layout(work.model)
    diagonal = {k: torch.full_like(p, torch.nan) for k, p in work.parameters.items()}
    layout.scatter_(diagonal, known.to(work.device, work.dtype))
    for name in idle:
        plain = work.decay[name] * work.parameters[name].detach()
        found[name] = torch.where(diagonal[name] == 0, plain, found[name])
    return found
