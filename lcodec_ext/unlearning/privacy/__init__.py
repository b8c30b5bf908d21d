"""Noise for releases, what it guarantees, and how releases add up.

A release is the weights after a deletion plus Gaussian noise on every coordinate. It is
(epsilon, delta)-indistinguishable from retraining plus the same noise where the noise covers the
distance between the two. `removal_bound` bounds that distance for one Newton step,
`gaussian_sigma` gives the noise, `removal_guarantee` says whether the bound applies, `add_noise`
draws the noise, and `PrivacyBudget` adds up releases. docs/privacy.md has the derivations.
"""

import copy
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real, check_seed

Kind = Literal["certified", "heuristic", "none"]
_Target = TypeVar("_Target", Tensor, nn.Module)

_SQRT2 = math.sqrt(2.0)
_LOGISTIC_THIRD = 1.0 / (6.0 * math.sqrt(3.0))  # largest |third derivative| of log(1 + e^s)
_PAPER_LIPSCHITZ = 1.0
_PAPER_HESSIAN_LIPSCHITZ = 0.25
_SLACK = 1e-12  # of a budget: ten times 0.1 is not more than 1
_DELTA_MARGIN = 1e-10  # relative; above the rounding errors of gaussian_delta
_CHUNK = 1 << 20
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # outputs linear in weight and bias
_RESHAPES = (nn.Identity, nn.Flatten, nn.Unflatten)


class PrivacyBudgetExceeded(ValueError):
    """A release, or a removal, would take more than what is left of a budget."""


# ---------------------------------------------------------------------------------------------
# The Gaussian mechanism


def _check_positive(value: object, name: str) -> float:
    number = check_real(value, name, 0.0)
    if number == 0.0:
        raise ValueError(f"{name} must be positive; got {number!r}")
    return number


def _check_delta(delta: object) -> float:
    number = _check_positive(delta, "delta")
    if number >= 1.0:
        raise ValueError(f"delta must be between 0 and 1, both excluded; got {number!r}")
    return number


def _erfcx(x: float) -> float:
    """exp(x^2) erfc(x) for x >= 0."""
    if x < 25.0:
        return math.exp(x * x) * math.erfc(x)
    t = 0.5 / (x * x)  # of the asymptotic series; the next term is below 1e-16
    return (1.0 - t * (1.0 - t * (3.0 - t * (15.0 - 105.0 * t)))) / (x * math.sqrt(math.pi))


def _delta_of_ratio(ratio: float, epsilon: float) -> float:
    """delta of Gaussian noise whose sigma is sensitivity / ratio.

    With a = ratio/2 - epsilon/ratio and b = ratio/2 + epsilon/ratio it is
    Phi(a) - e^epsilon Phi(-b), and epsilon - b^2/2 = -a^2/2, so that e^epsilon need not be formed.
    """
    if ratio == 0.0:
        return 0.0
    a, b = ratio / 2 - epsilon / ratio, ratio / 2 + epsilon / ratio
    density, tail = 0.5 * math.exp(-a * a / 2), _erfcx(b / _SQRT2)
    if a <= 0.0:
        return max(0.0, density * (_erfcx(-a / _SQRT2) - tail))
    return max(0.0, 0.5 * math.erfc(-a / _SQRT2) - density * tail)


def gaussian_delta(sigma: float, sensitivity: float, epsilon: float) -> float:
    """Compute the smallest delta of Gaussian noise, exactly (Balle & Wang 2018, theorem 8).

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise on each coordinate; 0 is no noise.
    sensitivity : float
        Largest Euclidean distance of the two vectors that shall not be told apart.
    epsilon : float
        At least 0.

    Returns
    -------
    float
        delta = Phi(s/2 - epsilon/s) - e^epsilon Phi(-s/2 - epsilon/s) with s = sensitivity / sigma;
        in floating point without overflow, to about 1e-12 of it (or 1e-15, if that is more).

    Examples
    --------
    >>> round(gaussian_delta(sigma=1.0, sensitivity=1.0, epsilon=1.0), 6)
    0.126937
    """
    sigma = check_real(sigma, "sigma", 0.0)
    sensitivity = check_real(sensitivity, "sensitivity", 0.0)
    epsilon = check_real(epsilon, "epsilon", 0.0)
    if sensitivity == 0.0:
        return 0.0
    ratio = sensitivity / sigma if sigma else math.inf
    return _delta_of_ratio(ratio, epsilon) if math.isfinite(ratio) else 1.0


def _largest(lower: float, upper: float, holds: Any) -> float:
    """The largest float in [lower, upper) for which it holds: true at lower, false at upper."""
    while True:
        middle = lower + (upper - lower) / 2
        if not lower < middle < upper:
            return lower
        if holds(middle):
            lower = middle
        else:
            upper = middle


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """Compute the standard deviation that makes Gaussian noise (epsilon, delta)-private.

    Parameters
    ----------
    sensitivity : float
        Largest Euclidean distance of the two vectors that shall not be told apart.
    epsilon : float
        Positive. Below 1 the classical sigma = sensitivity sqrt(2 ln(1.25/delta)) / epsilon is
        given, which is proven there and only there (Dwork & Roth 2014). From 1 on it is the
        smallest sigma there is, the analytic Gaussian mechanism (Balle & Wang 2018).
    delta : float
        Between 0 and 1, both excluded.

    Returns
    -------
    float
        sigma, with ``gaussian_delta(sigma, sensitivity, epsilon) <= delta``.

    Raises
    ------
    ValueError
        For arguments out of range, and where sigma would overflow.

    Examples
    --------
    >>> round(gaussian_sigma(1.0, epsilon=0.5, delta=1e-5), 4)
    9.6896
    >>> round(gaussian_sigma(1.0, epsilon=1.0, delta=1e-5), 4)
    3.7306
    """
    sensitivity = check_real(sensitivity, "sensitivity", 0.0)
    epsilon, delta = _check_positive(epsilon, "epsilon"), _check_delta(delta)
    if sensitivity == 0.0:
        return 0.0
    if epsilon < 1.0:
        sigma = sensitivity * (math.sqrt(2 * math.log(1.25 / delta)) / epsilon)
    else:
        target = delta * (1 - _DELTA_MARGIN)
        lower, upper = 1.0, 1.0
        while _delta_of_ratio(upper, epsilon) <= target:
            lower, upper = upper, 2 * upper
        while _delta_of_ratio(lower, epsilon) > target:
            lower, upper = lower / 2, lower
        ratio = _largest(lower, upper, lambda s: _delta_of_ratio(s, epsilon) <= target)
        sigma = sensitivity / ratio
    if not math.isfinite(sigma):
        raise ValueError(
            f"sigma overflows for sensitivity={sensitivity!r}, epsilon={epsilon!r}, delta={delta!r}"
        )
    return sigma


# ---------------------------------------------------------------------------------------------
# The distance to retraining


class LossConstants(NamedTuple):
    """Bounds on the derivatives of a sample's loss with respect to the weights.

    Attributes
    ----------
    lipschitz : float
        Of the norm of its gradient.
    hessian_lipschitz : float
        Of its Hessian's Lipschitz constant, in the spectral norm.
    """

    lipschitz: float
    hessian_lipschitz: float


def logistic_constants(max_norm: float, n_outputs: int = 1) -> LossConstants:
    """Give the constants of logistic and softmax regression, valid for all weights.

    Parameters
    ----------
    max_norm : float
        A bound B on the Euclidean norm of an input, the constant 1 of a bias included. It must hold
        for every sample that could have been there, so it is not to be read off the data: clip
        inputs to it.
    n_outputs : int
        1: binary cross-entropy of one logit, with gradient (p - y) x of norm at most B and third
        derivative at most B^3 / (6 sqrt(3)). 2 and more: softmax cross-entropy, with gradient
        (p - y) x^T, |p - y| <= sqrt(2), and as third derivative in a direction the third central
        moment of a variable with range at most sqrt(2) B.

    Examples
    --------
    >>> logistic_constants(1.0)
    LossConstants(lipschitz=1.0, hessian_lipschitz=0.0962...)
    """
    reach = _check_positive(max_norm, "max_norm")
    if check_integer(n_outputs, "n_outputs", 1) > 1:
        reach *= _SQRT2
    return LossConstants(reach, reach**3 * _LOGISTIC_THIRD)


class RemovalBound(NamedTuple):
    """A bound on the distance between a removal and retraining, in its parts.

    Attributes
    ----------
    curvature : float
        From the Hessian that changes along the step.
    training : float
        From a training gradient that is not zero.
    solve : float
        From a linear system that is not solved exactly.
    retraining : float
        From the retrained model's own gradient, which is not zero either.
    """

    curvature: float
    training: float
    solve: float
    retraining: float

    @property
    def distance(self) -> float:
        """Bound on the distance to the exact minimiser of the retained objective."""
        return self.curvature + self.training + self.solve

    @property
    def sensitivity(self) -> float:
        """Bound on the distance to a model retrained to the same bound on the gradient."""
        return self.distance + self.retraining


def _check_removed(n: object, m: object) -> tuple[int, int]:
    n, m = check_integer(n, "n", 2), check_integer(m, "m", 1)
    if m >= n:
        raise ValueError(f"m must be less than n, the training samples; got m={m} and n={n}")
    return n, m


def removal_bound(
    n: int,
    m: int,
    *,
    lipschitz: float,
    hessian_lipschitz: float,
    strong_convexity: float,
    weight_decay: float = 0.0,
    radius: float = math.inf,
    gradient_bound: float = 0.0,
    rtol: float = 0.0,
    gradient: str = "removal",
) -> RemovalBound:
    """Bound the distance between one exact Newton removal and retraining.

    Parameters
    ----------
    n, m : int
        Training samples, and how many of them are removed, all removals so far together.
    lipschitz : float
        L: bound on the gradient norm of every sample's loss, the regulariser left out.
    hessian_lipschitz : float
        M: Lipschitz constant of every sample's Hessian.
    strong_convexity : float
        c: the retained objective, the regulariser included, is c-strongly convex everywhere. With
        convex losses this is the weight decay.
    weight_decay : float
        lambda of the objective F(w) = mean loss + (lambda/2) |w|^2.
    radius : float
        L and M hold on the ball of this radius around 0, in which the weights lie before and after
        the step. Infinity: everywhere.
    gradient_bound : float
        g: bound on |grad F| at the weights that training ended with, and on the retained
        objective's gradient where retraining ends.
    rtol : float
        Relative residual |H d - r| / |r| to which the step d was solved.
    gradient : {"removal", "residual"}
        The right-hand side r: the removed samples' gradient, or minus the retained objective's.

    Returns
    -------
    RemovalBound

    Notes
    -----
    Let f_i be a sample's loss plus the regulariser, F the mean of all n, F_R that of the n - m
    retained, H the Hessian of F_R at w, and w+ = w + d.

    1. With |grad F| <= g, lambda |w| <= L + g, because lambda w is grad F minus a mean of
       gradients of losses; and lambda |w| <= lambda radius. So |grad f_i(w)| <= G with
       G = L + min(L + g, lambda radius).
    2. (n - m) grad F_R(w) = n grad F(w) - s, with s the sum of grad f_i over the removed; so
       |s| <= m G.
    3. The step solves H d = r + e, |e| <= rtol |r|, with r = s / (n - m) for "removal" and
       r = -grad F_R(w) for "residual". So |r| <= m G / (n - m), or (m G + n g) / (n - m), and
       |d| <= (1 + rtol) |r| / c.
    4. By Taylor's theorem |grad F_R(w+) - grad F_R(w) - H d| <= M |d|^2 / 2. So
       |grad F_R(w+)| <= M |d|^2 / 2 + rtol |r| + t, where t = n g / (n - m) for "removal", whose
       right-hand side takes grad F for zero, and t = 0 for "residual".
    5. F_R is c-strongly convex, so w+ is within |grad F_R(w+)| / c of its minimiser, and a model
       retrained to a gradient of at most g is within g / c.

    With g = rtol = 0 and m <= n/2 this is at most 2 M G^2 m^2 / (n^2 c^3), the bound of
    Sekhari et al. (2021).
    """
    n, m = _check_removed(n, m)
    big_l = check_real(lipschitz, "lipschitz", 0.0)
    big_m = check_real(hessian_lipschitz, "hessian_lipschitz", 0.0)
    convexity = _check_positive(strong_convexity, "strong_convexity")
    decay = check_real(weight_decay, "weight_decay", 0.0)
    radius = radius if radius == math.inf else _check_positive(radius, "radius")
    g = check_real(gradient_bound, "gradient_bound", 0.0)
    rtol = check_real(rtol, "rtol", 0.0)
    check_choice(gradient, "gradient", ("removal", "residual"))
    rest = n - m
    sample = big_l + (min(big_l + g, decay * radius) if decay else 0.0)
    right = m * sample / rest
    training = n * g / rest
    if gradient == "residual":
        right, training = right + training, 0.0
    step = (1 + rtol) * right / convexity
    return RemovalBound(
        curvature=big_m * step * step / (2 * convexity),
        training=training / convexity,
        solve=rtol * right / convexity,
        retraining=g / convexity,
    )


def sekhari_sensitivity(
    n: int, m: int, *, lipschitz: float, hessian_lipschitz: float, strong_convexity: float
) -> float:
    """Compute gamma = 2 M L^2 m^2 / (n^2 c^3) of Sekhari et al. (2021).

    It bounds the distance between an exact Newton removal from an exact minimiser and retraining.
    `removal_bound` has the same without the two "exact".

    Parameters
    ----------
    n, m : int
        Training samples, and how many of them are removed.
    lipschitz, hessian_lipschitz : float
        L and M, of every sample's loss plus regulariser.
    strong_convexity : float
        c, of the same.
    """
    n, m = _check_removed(n, m)
    big_l = check_real(lipschitz, "lipschitz", 0.0)
    big_m = check_real(hessian_lipschitz, "hessian_lipschitz", 0.0)
    convexity = _check_positive(strong_convexity, "strong_convexity")
    step = big_l * m / n / convexity
    return 2 * big_m * step * step / convexity


# ---------------------------------------------------------------------------------------------
# What is guaranteed


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
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "Guarantee":
        """Make it again from `to_dict`."""
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


_STATEMENTS = {
    "convexity": "the retained objective is strongly convex: it is where the loss is convex in the "
    "outputs of the model and there is weight decay",
    "data": "the constants hold for every data set that could have been there, not only for this",
    "retraining": "training again would end with a gradient of at most gradient_bound, too",
    "frozen_parameters": "parameters that are not trained do not depend on the training data",
    "preprocessing": "how inputs are scaled does not depend on samples that may be deleted",
    "requests": "what is to be deleted was chosen without sight of earlier releases",
    "noise": "real-valued Gaussian noise; it is added in float64 and rounded",
}


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
    why = "the model is not linear in its trainable parameters, and so its objective not convex"
    if len(holders) != 1:
        names = ", ".join(repr(name) for name, _ in holders[:3])
        more = ", ..." if len(holders) > 3 else ""
        return f"{why}: {len(holders)} modules have some ({names}{more})"
    name, layer = holders[0]
    own = dict(layer.named_parameters(recurse=False)).keys()
    if type(layer) not in _LINEAR or not own <= {"weight", "bias"} or _hooked(layer):
        return (
            f"{why}, as far as can be told: {name!r} is no plain Linear or convolution layer but "
            f"{type(layer).__name__} with {', '.join(sorted(own))}"
        )
    for found, module in _in_order(model):
        if module is layer:
            name = found
            break
        if any(part is layer for part in module.modules()):
            return (
                f"{why}, as far as can be told: {name!r} is called by {found!r}, a "
                f"{type(module).__name__}, and not in a Sequential"
            )
    behind = False
    for found, module in _in_order(model):
        if behind and (type(module) not in _RESHAPES or _hooked(module)):
            return (
                f"{why}, as far as can be told: {name!r} is followed by {found!r}, a "
                f"{type(module).__name__}"
            )
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

    Parameters
    ----------
    model : nn.Module
        The model after the update, without noise. Certified are those in float64 whose outputs are
        linear in the trainable parameters, by their structure: one linear or convolution layer,
        behind modules without trainable parameters, in Sequentials. All others are heuristic.
    n, m : int
        Training samples, and how many of them are removed, all removals since training together:
        the step must start from the weights that training ended with.
    epsilon, delta : float or None
        What is asked for. None for both: no noise.
    n_selected : int
        Trainable parameters that the step changed. Fewer than all: heuristic.
    weight_decay : float
        lambda of the objective.
    training_gradient_norm : float
        Measured |grad F| where training ended, F the mean loss plus (lambda/2) |w|^2.
    solve_residual : float
        Measured relative residual of the step's linear system.
    parameter_norm : float
        Measured |w| of all trainable parameters, the larger of before and after the step.
    update, curvature, gradient, damping, steps, n_curvature, order, repair_epochs
        How the removal was done, by the names of `lcodec_ext.unlearning.Settings`. Certified are
        one undamped "newton" step with the exact "hessian" of all retained samples, taken for all
        removals at once, and nothing after it.
    lipschitz, hessian_lipschitz, strong_convexity, radius, gradient_bound, rtol : float or None
        As in `removal_bound`; radius may be infinite. None: not known, and so not certified; the
        heuristic noise takes the paper's lipschitz 1 and hessian_lipschitz 0.25, and the weight
        decay for the strong convexity.

    Returns
    -------
    Guarantee
        Certified noise is scaled to `removal_bound`, heuristic noise to `sekhari_sensitivity`.
        Measured values are compared with their bounds only: noise that depended on them would tell
        about the data.

    Raises
    ------
    ValueError
        If only one of epsilon and delta is given, or if noise is asked for and neither
        strong_convexity nor weight_decay is positive.
    """
    n, m = _check_removed(n, m)
    if (epsilon is None) != (delta is None):
        raise ValueError(
            f"epsilon and delta go together; got epsilon={epsilon!r} and delta={delta!r}"
        )
    if epsilon is None or delta is None:
        return Guarantee("none", reasons=("no epsilon is asked for, so no noise is added",))
    epsilon, delta = _check_positive(epsilon, "epsilon"), _check_delta(delta)
    decay = check_real(weight_decay, "weight_decay", 0.0)

    constants = {
        "lipschitz": lipschitz,
        "hessian_lipschitz": hessian_lipschitz,
        "strong_convexity": strong_convexity,
        "radius": radius,
        "gradient_bound": gradient_bound,
        "rtol": rtol,
    }
    reasons = [f"{name} is not given" for name, value in constants.items() if value is None]
    n_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if n_selected < n_trainable:
        reasons.append(f"the step changed {n_selected} of {n_trainable} trainable parameters")
    done = (
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
    reasons += [reason for wrong, reason in done if wrong]
    if not_linear := _not_linear(model):
        reasons.append(not_linear)
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    if buffers:
        reasons.append(f"buffers are released without noise: {', '.join(map(repr, buffers))}")
    rough = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float64}
    if rough:
        reasons.append(
            f"the weights are {', '.join(sorted(map(str, rough)))}, to which the step is rounded "
            "beyond its bound: it takes model.double()"
        )
    measured = (
        ("training_gradient_norm", training_gradient_norm, "gradient_bound"),
        ("solve_residual", solve_residual, "rtol"),
        ("parameter_norm", parameter_norm, "radius"),
    )
    for name, value, limit_name in measured:
        limit = constants[limit_name]
        if limit is not None and not value <= limit:  # NaN is above, too
            reasons.append(f"{name} is {value:.3g}, above {limit_name}={limit:g}")

    if reasons:
        return _heuristic(n, m, epsilon, delta, decay, constants, tuple(reasons))
    known = {name: value for name, value in constants.items() if value is not None}
    bound = removal_bound(n, m, weight_decay=decay, gradient=gradient, **known)
    sigma = gaussian_sigma(bound.sensitivity, epsilon, delta)
    assumptions: dict[str, Any] = {**known, "weight_decay": decay, "n": n, "m": m, **_STATEMENTS}
    if known["radius"] == math.inf:
        assumptions["radius"] = "everywhere"  # JSON has no infinity
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

    def known(name: str, otherwise: float) -> float:
        value = constants[name]
        return otherwise if value is None else value

    if not known("strong_convexity", decay) > 0:
        raise ValueError(
            "epsilon needs a strongly convex objective: give weight_decay > 0 or "
            f"strong_convexity > 0; got weight_decay={decay!r} and "
            f"strong_convexity={constants['strong_convexity']!r}"
        )
    used = {
        "lipschitz": known("lipschitz", _PAPER_LIPSCHITZ),
        "hessian_lipschitz": known("hessian_lipschitz", _PAPER_HESSIAN_LIPSCHITZ),
        "strong_convexity": known("strong_convexity", decay),
    }
    sensitivity = sekhari_sensitivity(n, m, **used)
    sigma = gaussian_sigma(sensitivity, epsilon, delta)
    assumed = [name for name in used if constants[name] is None]
    assumptions = {**used, "n": n, "m": m, "assumed_without_evidence": assumed}
    return Guarantee("heuristic", epsilon, delta, sigma, sensitivity, assumptions, reasons)


# ---------------------------------------------------------------------------------------------
# Composition


def _exact_epsilon(square_sum: float, delta: float) -> float:
    """The smallest epsilon of Gaussian noise whose (sensitivity/sigma)^2 adds up to square_sum."""
    ratio = math.sqrt(square_sum)

    def above(epsilon: float) -> bool:
        return _delta_of_ratio(ratio, epsilon) > delta

    upper = 1.0
    while upper < math.inf and above(upper):
        upper *= 2
    if upper == math.inf:
        return math.inf
    exact = _largest(0.0, upper, above) if above(0.0) else 0.0
    return math.nextafter(exact, math.inf)


class PrivacyBudget:
    """An (epsilon, delta) for all releases together, and what is left of it.

    A release is paid where one of two theorems says that all of them together stay within the
    budget: basic composition (epsilons and deltas add up), or, where all releases are Gaussian, the
    exact composition of Gaussians: sensitivity/sigma of all together is the root of the sum of
    squares (Dong, Roth & Su 2022), and `gaussian_delta` gives their delta. The second allows far
    more releases of a small epsilon.

    Parameters
    ----------
    epsilon : float
        Positive.
    delta : float
        Between 0 and 1, both excluded.

    Attributes
    ----------
    epsilon, delta : float
        The budget.
    n_releases : int
        Paid so far.

    Examples
    --------
    >>> budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    >>> budget.spend(0.6, 1e-6)
    >>> budget
    PrivacyBudget(epsilon=1, delta=1e-05; 1 releases took 0.6)
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self.epsilon, self.delta = _check_positive(epsilon, "epsilon"), _check_delta(delta)
        self.n_releases = 0
        self._epsilon_sum = 0.0
        self._delta_sum = 0.0
        self._square_sum: float | None = 0.0  # of sensitivity/sigma; None: not all are Gaussian

    @property
    def spent(self) -> tuple[float, float]:
        """Sums of epsilon and delta over the releases: basic composition."""
        return self._epsilon_sum, self._delta_sum

    @property
    def spent_epsilon(self) -> float:
        """Smallest epsilon that is proven for all releases together at the budget's delta.

        Infinity if there is none.
        """
        basic = self._epsilon_sum if self._fits(0.0, self._delta_sum) else math.inf
        if self._square_sum is None or self._square_sum == 0.0:
            return basic
        return min(basic, _exact_epsilon(self._square_sum, self.delta))

    def spend(self, epsilon: float, delta: float, *, ratio: float | None = None) -> None:
        """Pay for a release, before it is made.

        Parameters
        ----------
        epsilon : float
            At least 0.
        delta : float
            At least 0.
        ratio : float, optional
            sensitivity / sigma, if the release is one of Gaussian noise; it must give
            (epsilon, delta).

        Raises
        ------
        PrivacyBudgetExceeded
            If it does not fit. Nothing is paid then.
        ValueError
            For arguments out of range, or a ratio that does not give (epsilon, delta).
        """
        epsilon, delta = check_real(epsilon, "epsilon", 0.0), check_real(delta, "delta", 0.0)
        square_sum = None
        if ratio is not None:
            ratio = check_real(ratio, "ratio", 0.0)
            if _delta_of_ratio(ratio, epsilon) > delta * (1 + 1e-9) + 1e-15:
                raise ValueError(
                    f"ratio={ratio!r} does not give epsilon={epsilon!r} with delta={delta!r} but "
                    f"with {_delta_of_ratio(ratio, epsilon)!r}"
                )
            if self._square_sum is not None:
                square_sum = self._square_sum + ratio * ratio
        epsilon_sum, delta_sum = self._epsilon_sum + epsilon, self._delta_sum + delta
        fits = self._fits(epsilon_sum, delta_sum) or (
            square_sum is not None
            and _delta_of_ratio(math.sqrt(square_sum), self.epsilon) <= self.delta * (1 + _SLACK)
        )
        if not fits:
            raise PrivacyBudgetExceeded(
                f"epsilon={epsilon:g}, delta={delta:g} does not fit: "
                f"{self._needed(epsilon_sum, delta_sum, square_sum)}. The budget is "
                f"epsilon={self.epsilon:g}, delta={self.delta:g}, {self._taken()}; train again for "
                "a new budget"
            )
        self._epsilon_sum, self._delta_sum = epsilon_sum, delta_sum
        self._square_sum = square_sum
        self.n_releases += 1

    def _needed(self, epsilon: float, delta: float, square_sum: float | None) -> str:
        """What all releases and one more would take, by each measure there is of it."""
        sums = f"with it the sums are epsilon={epsilon:.4g}, delta={delta:.4g}"
        if square_sum is None:
            return sums
        gaussian = _exact_epsilon(square_sum, self.delta)
        return (
            f"{sums}, and by the composition of Gaussians it is epsilon={gaussian:.4g} at "
            f"delta={self.delta:g}"
        )

    def _taken(self) -> str:
        """What was spent, by the measure by which it fits."""
        if not self.n_releases:
            return "of which nothing is spent"
        taken = f"of which {self.n_releases} release" + "s" * (self.n_releases > 1) + " so far took"
        exact = math.inf
        if self._square_sum is not None:
            exact = _exact_epsilon(self._square_sum, self.delta)
        if self._fits(self._epsilon_sum, self._delta_sum) and self._epsilon_sum <= exact:
            return f"{taken} epsilon={self._epsilon_sum:.4g}, delta={self._delta_sum:.4g}, by sums"
        return (
            f"{taken} epsilon={exact:.4g} at delta={self.delta:g}, by the composition of Gaussians"
        )

    def _fits(self, epsilon: float, delta: float) -> bool:
        return epsilon <= self.epsilon * (1 + _SLACK) and delta <= self.delta * (1 + _SLACK)

    def to_dict(self) -> dict[str, Any]:
        """Give the state in types that JSON knows, to the bit."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "n_releases": self.n_releases,
            "epsilon_sum": self._epsilon_sum,
            "delta_sum": self._delta_sum,
            "square_sum": self._square_sum,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "PrivacyBudget":
        """Make it again from `to_dict`.

        Raises
        ------
        ValueError
            If it is not such a state.
        """
        names = {"epsilon", "delta", "n_releases", "epsilon_sum", "delta_sum", "square_sum"}
        if set(state) != names:
            raise ValueError(f"state must have {sorted(names)}; got {sorted(map(str, state))}")
        budget = cls(state["epsilon"], state["delta"])
        budget.n_releases = check_integer(state["n_releases"], "n_releases", 0)
        budget._epsilon_sum = check_real(state["epsilon_sum"], "epsilon_sum", 0.0)
        budget._delta_sum = check_real(state["delta_sum"], "delta_sum", 0.0)
        square_sum = state["square_sum"]
        budget._square_sum = (
            None if square_sum is None else check_real(square_sum, "square_sum", 0.0)
        )
        return budget

    def __repr__(self) -> str:
        """Show the budget and what of it is spent."""
        return (
            f"PrivacyBudget(epsilon={self.epsilon:g}, delta={self.delta:g}; "
            f"{self.n_releases} releases took {self.spent_epsilon:g})"
        )


# ---------------------------------------------------------------------------------------------
# Noise


class _Normals:
    """Standard normals, two from every two 64-bit words by the method of Box and Muller.

    The words come from the operating system's cryptographic generator. Those of a seed are for
    tests: whoever knows the seed can take the noise off again. (torch's CPU generator uses 32 bits
    of a seed, few enough to try them all.)
    """

    def __init__(self, seed: int | None) -> None:
        self._philox = None if seed is None else np.random.Philox(seed)

    def _words(self, n: int) -> NDArray[np.uint64]:
        if self._philox is None:
            return np.frombuffer(secrets.token_bytes(8 * n), dtype=np.uint64)
        return np.asarray(self._philox.random_raw(n), dtype=np.uint64)

    def draw(self, n: int) -> NDArray[np.float64]:
        noise = np.empty(n)
        for start in range(0, n, _CHUNK):
            part = noise[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            # in (0, 1), both excluded
            uniform = ((self._words(2 * half) >> np.uint64(11)) + 0.5) * 2.0**-53
            length = np.sqrt(-2 * np.log(uniform[:half]))
            angle = 2 * np.pi * uniform[half:]
            part[:half] = length * np.cos(angle)
            part[half:] = (length * np.sin(angle))[: len(part) - half]
        return noise

    def like(self, tensor: Tensor) -> Tensor:
        noise = torch.from_numpy(self.draw(tensor.numel())).view(tensor.shape)
        return noise.to(tensor.device)


def standard_normals(like: Tensor, seed: int | None = None) -> Tensor:
    """Draw float64 standard normals of a tensor's shape, on its device, from the same source."""
    return _Normals(seed).like(like)


def add_noise(target: _Target, sigma: float, *, seed: int | None = None) -> _Target:
    """Add independent N(0, sigma^2) noise to every trainable parameter.

    Parameters
    ----------
    target : nn.Module or Tensor
        A model, or a vector of weights. It is not changed.
    sigma : float
        Standard deviation, the same for all coordinates.
    seed : int, optional
        For tests alone. By default the noise comes from the operating system's cryptographic
        generator and no seed exists, so none can be recorded: the noise of a release whose seed is
        known, or can be guessed, can be subtracted. Two releases must not share their noise either,
        or their difference shows the change.

    Returns
    -------
    nn.Module or Tensor
        A copy with noise. Parameters that need no gradient and buffers are the same as before;
        tied parameters get one noise. It is added in float64, then rounded.

    Raises
    ------
    TypeError
        If target is something else, or holds trainable parameters that are not real.
    """
    sigma = check_real(sigma, "sigma", 0.0)
    normals = _Normals(check_seed(seed))

    def noisy(tensor: Tensor, name: str) -> Tensor:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real to take noise; it has dtype {tensor.dtype}")
        value = tensor.detach()
        return (value.double() + sigma * normals.like(value)).to(value.dtype)

    if isinstance(target, Tensor):
        return noisy(target, "target")
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"target must be a model or a tensor; got an object of type {type(target).__name__}"
        )
    released = copy.deepcopy(target)
    with torch.no_grad():
        for name, parameter in released.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(noisy(parameter, name))
    return released
