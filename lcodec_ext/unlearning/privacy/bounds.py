"""Bounds on the distance between a removal by one Newton step and retraining."""

import math
from typing import NamedTuple

from lcodec_ext._checks import check_choice, check_integer, check_real
from lcodec_ext.unlearning.privacy.gaussian import check_positive

#: Largest absolute third derivative of the logistic loss log(1 + e^s).
LOGISTIC_THIRD_DERIVATIVE = 1.0 / (6.0 * math.sqrt(3.0))


class LossConstants(NamedTuple):
    """Bounds on a sample's loss: its gradient's norm, its Hessian's Lipschitz constant."""

    lipschitz: float
    hessian_lipschitz: float


def logistic_constants(max_norm: float, n_outputs: int = 1) -> LossConstants:
    """Give the constants of logistic and softmax regression, valid for all weights.

    Parameters
    ----------
    max_norm : float
        A bound B on the Euclidean norm of an input, the constant 1 of a bias included. It must hold
        for every sample that could have been in the data. Fix it beforehand and clip inputs to it:
        a bound read off the data tells about them.
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
    reach = check_positive(max_norm, "max_norm")
    if check_integer(n_outputs, "n_outputs", 1) > 1:
        reach *= math.sqrt(2.0)
    return LossConstants(reach, reach**3 * LOGISTIC_THIRD_DERIVATIVE)


class RemovalBound(NamedTuple):
    """A bound on the distance between a removal and retraining, in its parts."""

    curvature: float  # from the Hessian that changes along the step
    training: float  # from a training gradient that is not zero
    solve: float  # from a linear system that is not solved exactly
    retraining: float  # from the retrained model's own gradient

    @property
    def distance(self) -> float:
        """Bound on the distance to the exact minimiser of the retained objective."""
        return self.curvature + self.training + self.solve

    @property
    def sensitivity(self) -> float:
        """Bound on the distance to a model retrained to the same bound on the gradient."""
        return self.distance + self.retraining


def check_removed(n: object, m: object) -> tuple[int, int]:
    """Return the numbers of training and of removed samples as ints, if m < n."""
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

    docs/privacy.md derives it.

    Parameters
    ----------
    n, m : int
        Training samples, and how many of them are removed, all removals so far together.
    lipschitz, hessian_lipschitz : float
        L and M: bounds on the gradient norm and on the Hessian's Lipschitz constant of every
        sample's loss, without the regulariser.
    strong_convexity : float
        c: the retained objective, with the regulariser, is c-strongly convex everywhere. With
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
        With g = rtol = 0 and m <= n/2 its distance is at most 2 M G^2 m^2 / (n^2 c^3), where
        G = L + min(L + g, lambda radius): the bound of Sekhari et al. (2021).
    """
    n, m = check_removed(n, m)
    big_l = check_real(lipschitz, "lipschitz", 0.0)
    big_m = check_real(hessian_lipschitz, "hessian_lipschitz", 0.0)
    convexity = check_positive(strong_convexity, "strong_convexity")
    decay = check_real(weight_decay, "weight_decay", 0.0)
    radius = radius if radius == math.inf else check_positive(radius, "radius")
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
    `removal_bound` does not need the two "exact".

    Arguments are those of `removal_bound`, L and M of every sample's loss plus regulariser.
    """
    n, m = check_removed(n, m)
    big_l = check_real(lipschitz, "lipschitz", 0.0)
    big_m = check_real(hessian_lipschitz, "hessian_lipschitz", 0.0)
    convexity = check_positive(strong_convexity, "strong_convexity")
    step = big_l * m / n / convexity
    return 2 * big_m * step * step / convexity
