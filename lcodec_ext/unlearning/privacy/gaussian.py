"""The Gaussian mechanism: how much noise gives (epsilon, delta)."""

import math
from collections.abc import Callable

import torch

from lcodec_ext._checks import check_real

_DELTA_MARGIN = 1e-10  # relative; above the rounding errors of gaussian_delta


def check_positive(value: object, name: str) -> float:
    """Return value as a float, if it is a finite number above 0."""
    number = check_real(value, name, 0.0)
    if number == 0.0:
        raise ValueError(f"{name} must be positive; got {number!r}")
    return number


def check_delta(delta: object) -> float:
    """Return delta as a float, if it is between 0 and 1."""
    number = check_positive(delta, "delta")
    if number >= 1.0:
        raise ValueError(f"delta must be between 0 and 1, both excluded; got {number!r}")
    return number


def delta_of_ratio(ratio: float, epsilon: float) -> float:
    """Compute delta of Gaussian noise whose sigma is sensitivity / ratio.

    It is Phi(a) - e^epsilon Phi(-b), and epsilon - b^2/2 = -a^2/2: e^epsilon need not be formed.
    """
    if ratio == 0.0:
        return 0.0
    a, b = ratio / 2 - epsilon / ratio, ratio / 2 + epsilon / ratio
    density = 0.5 * math.exp(-a * a / 2)
    scaled = torch.special.erfcx(torch.tensor([abs(a), b], dtype=torch.float64) / math.sqrt(2.0))
    near, tail = scaled.tolist()
    if a <= 0.0:
        return max(0.0, density * (near - tail))
    return max(0.0, 0.5 * math.erfc(-a / math.sqrt(2.0)) - density * tail)


def gaussian_delta(sigma: float, sensitivity: float, epsilon: float) -> float:
    """Compute the smallest delta of Gaussian noise, exactly (Balle & Wang 2018, theorem 8).

    Parameters
    ----------
    sigma, sensitivity, epsilon : float
        Standard deviation of the noise on each coordinate; largest Euclidean distance of the two
        vectors that must not be told apart; all at least 0.

    Returns
    -------
    float
        delta = Phi(s/2 - epsilon/s) - e^epsilon Phi(-s/2 - epsilon/s) with s = sensitivity / sigma,
        without overflow, with an error of at most 1e-11 delta or 1e-15, whichever is larger.

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
    return delta_of_ratio(ratio, epsilon) if math.isfinite(ratio) else 1.0


def largest(lower: float, upper: float, holds: Callable[[float], bool]) -> float:
    """Find the largest float in [lower, upper) for which `holds`: true at lower, false at upper.

    Bisection down to neighbouring floats. A root finder would not say on which side it ends, and
    noise must err on the safe side.
    """
    while lower < (middle := lower + (upper - lower) / 2) < upper:
        lower, upper = (middle, upper) if holds(middle) else (lower, middle)
    return lower


def gaussian_sigma(sensitivity: float, epsilon: float, delta: float) -> float:
    """Compute the standard deviation that makes Gaussian noise (epsilon, delta)-private.

    Parameters
    ----------
    sensitivity : float
        Largest Euclidean distance of the two vectors that must not be told apart.
    epsilon : float
        Positive. Below 1 the result is the classical sensitivity sqrt(2 ln(1.25/delta)) / epsilon,
        which is proven only there (Dwork & Roth 2014). From 1 on it is the smallest possible sigma,
        that of the analytic Gaussian mechanism (Balle & Wang 2018).
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
    epsilon, delta = check_positive(epsilon, "epsilon"), check_delta(delta)
    if sensitivity == 0.0:
        return 0.0
    if epsilon < 1.0:
        sigma = sensitivity * (math.sqrt(2 * math.log(1.25 / delta)) / epsilon)
    else:
        target = delta * (1 - _DELTA_MARGIN)

        def safe(ratio: float) -> bool:
            return delta_of_ratio(ratio, epsilon) <= target

        lower, upper = 1.0, 1.0
        while safe(upper):
            lower, upper = upper, 2 * upper
        while not safe(lower):
            lower, upper = lower / 2, lower
        sigma = sensitivity / largest(lower, upper, safe)
    if not math.isfinite(sigma):
        raise ValueError(
            f"sigma overflows for sensitivity={sensitivity!r}, epsilon={epsilon!r}, delta={delta!r}"
        )
    return sigma
