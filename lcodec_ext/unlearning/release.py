"""What the noise of the settings guarantees for the result of a deletion."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lcodec_ext._torch.decay import decay_text, least_decay
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext.unlearning.deletion import Deletion
from lcodec_ext.unlearning.privacy import Guarantee, add_noise, removal_guarantee
from lcodec_ext.unlearning.request import Request
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Measured, Workplace, norm

#: What `removal_guarantee` asks of the settings.
_OPTIONS = {each.name for each in dataclasses.fields(Settings)} & {
    *inspect.signature(removal_guarantee).parameters
}
OF_TOKENS = (
    "loss_fn: a mean over tokens, in which a long sample counts for more than one; the theorem is "
    "of a plain mean over samples"
)
GUARDED = "max_drop: a guard looks at the data and tells what it saw"


def guarantee_of(
    settings: Settings,
    model: nn.Module,
    *,
    damping: float,
    order: str,
    of_tokens: bool = False,
    **measured: Any,
) -> Guarantee:
    """What the noise of the settings guarantees for a deletion with them, the guard included.

    Parameters
    ----------
    settings, model : Settings, Module
    damping, order
        As the step had them.
    of_tokens : bool, default False
        Whether the loss is a mean over tokens.
    **measured
        n, m, n_selected, training_gradient_norm, solve_residual and parameter_norm, as
        `removal_guarantee` takes them.

    Raises
    ------
    ValueError
        If the settings ask for a certificate and there is none.
    """
    options = {name: getattr(settings, name) for name in _OPTIONS}
    decay = settings.weight_decay
    options["weight_decay"] = least = least_decay(decay)
    convex = least > 0 or settings.strong_convexity is not None or settings.epsilon is None
    if isinstance(decay, dict) and not convex:
        raise ValueError(
            "epsilon needs a strongly convex objective, one number weight_decay > 0 or "
            f"strong_convexity > 0; got weight_decay={decay_text(decay)}, of which the least "
            "counts, and strong_convexity=None"
        )
    if settings.update == "certified":  # a Newton step, whose conditions are then demanded
        options["update"] = "newton"
    guarantee = removal_guarantee(
        model, **options | {"damping": damping, "order": order} | measured
    )
    reasons = guarantee.reasons
    if isinstance(decay, dict):
        reasons = (*reasons, "weight_decay: the theorem is of one number for all parameters")
    if settings.max_drop is not None:
        reasons = (*reasons, GUARDED)
    if of_tokens:
        reasons = (*reasons, OF_TOKENS)
    if settings.lengthen is not None:
        reasons = (*reasons, "lengthen: the length of the step depends on the data")
    if settings.update == "certified" and reasons:
        raise ValueError(
            "update='certified' is not possible here: "
            + "; ".join(reasons)
            + ". Ask for update='newton' to get the same step with heuristic noise"
        )
    if guarantee.kind == "none" or not reasons:
        return guarantee
    return dataclasses.replace(guarantee, kind="heuristic", reasons=reasons)


def check_certifiable(work: Workplace, model: nn.Module, request: Request) -> None:
    """Refuse update="certified" where a condition is not met, before anything is computed."""
    if work.settings.update == "certified":
        guarantee_of(
            work.settings,
            model,
            n=request.m + request.n_retain,
            m=request.m,
            n_selected=work.n_trainable,
            training_gradient_norm=0.0,
            solve_residual=0.0,
            parameter_norm=0.0,
            damping=work.settings.damping,
            order=work.settings.order,
            of_tokens=isinstance(work.loss_fn, TokenLoss),
        )


def guarantee_of_deletions(
    work: Workplace,
    model: nn.Module,
    request: Request,
    deletions: Sequence[Deletion],
    before: Measured,
    start_norm: float,
    n_selected: int,
) -> Guarantee:
    """What noise the result of deletions takes, and what that guarantees."""
    settings, monitored = work.settings, request.monitored
    whole = monitored is not None and len(monitored) == request.n_retain
    now = norm({k: p.detach() for k, p in work.parameters.items()})
    guarantee = guarantee_of(
        settings,
        model,
        n=request.m + request.n_retain,
        m=request.m,
        n_selected=n_selected,
        training_gradient_norm=before.training_norm if whole else math.nan,
        solve_residual=max((v.residual for d in deletions for v in d.solves), default=math.nan),
        parameter_norm=max(start_norm, now),
        damping=deletions[-1].last.damping,
        order=settings.order,
        of_tokens=isinstance(work.loss_fn, TokenLoss),
    )
    if guarantee.kind == "none" or not any(d.skipped for d in deletions):
        return guarantee
    why = "samples of the request were not removed: their removal was taken back"
    return dataclasses.replace(guarantee, kind="heuristic", reasons=(*guarantee.reasons, why))


def with_noise(work: Workplace, model: nn.Module, guarantee: Guarantee) -> nn.Module:
    """A model with the noise of a guarantee, which the workplace takes over."""
    if guarantee.sigma == 0:
        return model
    noisy = add_noise(model, guarantee.sigma)
    work.take_from_first(noisy)  # one draw
    work.take_over(noisy)
    return noisy
