"""What a removal with noise guarantees, and what keeps it from being certified."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from lcodec_ext._checks import check_real, first_few
from lcodec_ext._files import json_ready
from lcodec_ext.unlearning.privacy.bounds import (
    check_removed,
    removal_bound,
    sekhari_sensitivity,
)
from lcodec_ext.unlearning.privacy.gaussian import check_delta, check_positive, gaussian_sigma

Kind = Literal["certified", "heuristic", "none"]

_PAPER_LIPSCHITZ = 1.0
_PAPER_HESSIAN_LIPSCHITZ = 0.25
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # outputs linear in weight and bias
_RESHAPES = (nn.Identity, nn.Flatten, nn.Unflatten)
STATEMENTS = {  # assumptions that cannot be checked
    "convexity": "the retained objective is strongly convex: it is where the loss is convex in the "
    "outputs of the model and there is weight decay",
    "data": "the constants hold for every data set that could have been there, not only for this",
    "retraining": "training again would end with a gradient of at most gradient_bound, too",
    "frozen_parameters": "parameters that are not trained do not depend on the training data",
    "preprocessing": "how inputs are scaled does not depend on samples that may be deleted",
    "requests": "what is to be deleted was chosen without sight of earlier releases",
    "noise": "real-valued Gaussian noise; it is added in float64 and rounded",
}


@dataclass(frozen=True)
class Guarantee:
    """What a release guarantees, and on which conditions.

    Attributes
    ----------
    kind : {"certified", "heuristic", "none"}
        Certified: the release is (epsilon, delta)-indistinguishable from retraining plus the same
        noise, if the assumptions hold. Heuristic: there is noise, but no theorem. None: no noise.
    epsilon, delta : float or None
        None without noise.
    sigma : float
        Standard deviation of the noise on every coordinate.
    sensitivity : float or None
        What the noise is scaled to.
    assumptions : dict
        By name, the constants and statements that the numbers rest on, whether checked or not.
    reasons : tuple of str
        Why it is not certified; empty if it is.
    """

    kind: Kind
    epsilon: float | None = None
    delta: float | None = None
    sigma: float = 0.0
    sensitivity: float | None = None
    assumptions: dict[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def certified(self) -> bool:
        """Whether there is a theorem for it."""
        return self.kind == "certified"

    def to_dict(self) -> dict[str, Any]:
        """Give all of it in types that JSON knows."""
        return json_ready(asdict(self))

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Guarantee":
        """Make it from `to_dict`."""
        return cls(**{**state, "reasons": tuple(state["reasons"])})

    def __str__(self) -> str:
        """Say it in a few lines."""
        if self.kind == "none":
            head = "no guarantee: nothing is hidden by noise"
        else:
            head = (
                f"{self.kind}: epsilon={self.epsilon:g}, delta={self.delta:g}, "
                f"sigma={self.sigma:.4g}, sensitivity={self.sensitivity:.4g}"
            )
        return "\n".join([head, *(f"  not certified: {reason}" for reason in self.reasons)])


def removal_guarantee(
    model: nn.Module,
    *,
    n: int,
    m: int,
    epsilon: float | None,
    delta: float | None,
    n_selected: int,
    weight_decay: float,
    training_gradient_norm: float,
    solve_residual: float,
    parameter_norm: float,
    update: str = "newton",
    curvature: str = "hessian",
    gradient: str = "removal",
    damping: float = 0.0,
    steps: int = 1,
    n_curvature: int | None = None,
    order: str = "batch",
    repair_epochs: int = 0,
    lipschitz: float | None = None,
    hessian_lipschitz: float | None = None,
    strong_convexity: float | None = None,
    radius: float | None = None,
    gradient_bound: float | None = None,
    rtol: float | None = None,
) -> Guarantee:
    """Decide what a removal with noise guarantees, and how much noise it takes.

    Certified is one undamped Newton step with the exact Hessian of all retained samples, from the
    weights that training ended with, on all parameters, for all removals at once, with nothing
    after it. docs/privacy.md lists the conditions.

    Parameters
    ----------
    model : nn.Module
        The model after the update, without noise. To be certified it must be float64 and, by its
        structure, linear in the trainable parameters: one linear or convolution layer, behind
        modules without trainable parameters, in Sequentials.
    n, m : int
        Training samples, and how many of them are removed, all removals since training together.
    epsilon, delta : float or None
        What is asked for. None for both: no noise.
    n_selected : int
        Trainable parameters that the step changed.
    weight_decay : float
        lambda of the objective.
    training_gradient_norm, solve_residual, parameter_norm : float
        Measured: |grad F| where training ended, F the mean loss plus (lambda/2) |w|^2; the relative
        residual of the step's linear system; |w| of all trainable parameters, the larger of before
        and after the step.
    update, curvature, gradient, damping, steps, n_curvature, order, repair_epochs
        How the removal was done, by the names of `lcodec_ext.unlearning.Settings`.
    lipschitz, hessian_lipschitz, strong_convexity, radius, gradient_bound, rtol : float or None
        As in `removal_bound`; radius may be infinite. If one is None, the noise is heuristic: it
        takes the paper's lipschitz 1 and hessian_lipschitz 0.25, and the weight decay for the
        strong convexity.

    Returns
    -------
    Guarantee
        Certified noise is scaled to `removal_bound`, heuristic noise to `sekhari_sensitivity`.
        Measured values are only compared with their bounds: noise that depended on them would tell
        about the data.

    Raises
    ------
    ValueError
        If only one of epsilon and delta is given, or if noise is asked for and neither
        strong_convexity nor weight_decay is positive.
    """
    n, m = check_removed(n, m)
    if (epsilon is None) != (delta is None):
        raise ValueError(
            f"epsilon and delta go together; got epsilon={epsilon!r} and delta={delta!r}"
        )
    if epsilon is None or delta is None:
        return Guarantee("none", reasons=("no epsilon is asked for, so no noise is added",))
    epsilon, delta = check_positive(epsilon, "epsilon"), check_delta(delta)
    decay = check_real(weight_decay, "weight_decay", 0.0)
    constants = {
        "lipschitz": lipschitz,
        "hessian_lipschitz": hessian_lipschitz,
        "strong_convexity": strong_convexity,
        "radius": radius,
        "gradient_bound": gradient_bound,
        "rtol": rtol,
    }
    doubts = (
        (update != "newton", f"update={update!r}: it takes 'newton'"),
        (curvature != "hessian", f"curvature={curvature!r}: it takes the exact 'hessian'"),
        (damping != 0, f"damping={damping:g}: the system that is solved must be the Hessian's"),
        (steps != 1, f"steps={steps}: the bound is that of one step"),
        (
            n_curvature is not None and n_curvature < n - m,
            f"n_curvature={n_curvature}: the Hessian is not that of all {n - m} retained samples",
        ),
        (order != "batch", f"order={order!r}: all removals must be one step from the training end"),
        (repair_epochs != 0, f"repair_epochs={repair_epochs}: training follows the step"),
    )
    measured = {
        "gradient_bound": ("training_gradient_norm", training_gradient_norm),
        "rtol": ("solve_residual", solve_residual),
        "radius": ("parameter_norm", parameter_norm),
    }
    reasons = (
        *(f"{name} is not given" for name, value in constants.items() if value is None),
        *_doubts_of_selection(model, n_selected),
        *(doubt for holds, doubt in doubts if holds),
        *_doubts_of_model(model),
        *_doubts_of_measured(measured, constants),
    )
    if reasons:
        return _heuristic(n, m, epsilon, delta, decay, constants, reasons)
    return _certified(n, m, epsilon, delta, decay, gradient, constants)


def _certified(
    n: int,
    m: int,
    epsilon: float,
    delta: float,
    decay: float,
    gradient: str,
    constants: Mapping[str, Any],
) -> Guarantee:
    """The noise of the theorem."""
    bound = removal_bound(n, m, weight_decay=decay, gradient=gradient, **constants)
    sigma = gaussian_sigma(bound.sensitivity, epsilon, delta)
    assumptions: dict[str, Any] = {**constants, "weight_decay": decay, "n": n, "m": m}
    if constants["radius"] == math.inf:
        assumptions["radius"] = "everywhere"  # JSON has no infinity
    assumptions |= STATEMENTS
    return Guarantee("certified", epsilon, delta, sigma, bound.sensitivity, assumptions)


def _heuristic(
    n: int,
    m: int,
    epsilon: float,
    delta: float,
    decay: float,
    constants: Mapping[str, float | None],
    reasons: tuple[str, ...],
) -> Guarantee:
    """The paper's noise, with its constants where none are given."""
    otherwise = {
        "lipschitz": _PAPER_LIPSCHITZ,
        "hessian_lipschitz": _PAPER_HESSIAN_LIPSCHITZ,
        "strong_convexity": decay,
    }
    assumed = [name for name in otherwise if constants[name] is None]
    used = otherwise | {k: v for k in otherwise if (v := constants[k]) is not None}
    if not used["strong_convexity"] > 0:
        raise ValueError(
            "epsilon needs a strongly convex objective: give weight_decay > 0 or "
            f"strong_convexity > 0; got weight_decay={decay!r} and "
            f"strong_convexity={constants['strong_convexity']!r}"
        )
    sensitivity = sekhari_sensitivity(n, m, **used)
    sigma = gaussian_sigma(sensitivity, epsilon, delta)
    assumptions = {**used, "n": n, "m": m, "assumed_without_evidence": assumed}
    return Guarantee("heuristic", epsilon, delta, sigma, sensitivity, assumptions, reasons)


# ---------------------------------------------------------------------------------------------
# Why a removal is not certified


def _doubts_of_selection(model: nn.Module, n_selected: int) -> Iterator[str]:
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if n_selected < n_trainable:
        yield f"the step changed {n_selected} of {n_trainable} trainable parameters"


def _doubts_of_measured(
    measured: Mapping[str, tuple[str, float]], limits: Mapping[str, float | None]
) -> Iterator[str]:
    for limit_name, (name, value) in measured.items():
        limit = limits[limit_name]
        if limit is not None and not value <= limit:  # NaN is above, too
            yield f"{name} is {value:.3g}, above {limit_name}={limit:g}"


def _doubts_of_model(model: nn.Module) -> Iterator[str]:
    if not_linear := _not_linear(model):
        yield (
            "the model is not linear in its trainable parameters, and so its objective not convex"
            + not_linear
        )
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    if buffers:
        yield f"buffers are released without noise: {', '.join(map(repr, buffers))}"
    rough = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float64}
    if rough:
        yield (
            f"the weights are {', '.join(sorted(map(str, rough)))}, to which the step is rounded "
            "beyond its bound: it takes model.double()"
        )


def _not_linear(model: nn.Module) -> str | None:
    """Why the outputs may not be linear in the trainable parameters; None if they are.

    Decided by structure: a linear or convolution layer alone or in Sequentials, behind anything
    that has no trainable parameters and before what only reshapes.
    """
    holders = [
        (name, module)
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if len(holders) != 1:
        names = first_few([repr(name) for name, _ in holders], 3)
        return f": {len(holders)} modules have some ({names})"
    name, layer = holders[0]
    seems = f", as far as can be told: {name!r} is"
    own = dict(layer.named_parameters(recurse=False)).keys()
    if type(layer) not in _LINEAR or not own <= {"weight", "bias"} or _hooked(layer):
        return (
            f"{seems} a {type(layer).__name__} with {', '.join(sorted(own))}, "
            "not a plain Linear or convolution layer"
        )
    behind = False
    for found, module in _in_order(model):
        if behind and (type(module) not in _RESHAPES or _hooked(module)):
            return f"{seems} followed by {found!r}, a {type(module).__name__}"
        if not behind and module is not layer and any(part is layer for part in module.modules()):
            caller = type(module).__name__
            return f"{seems} called by {found!r}, a {caller}, and not in a Sequential"
        behind = behind or module is layer
    return None


def _in_order(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that are called one after the other, Sequentials opened."""
    if type(module) is not nn.Sequential or _hooked(module):
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from _in_order(child, f"{name}.{key}" if name else key)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks may change what a module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
