"""Scores that compare unlearned models with retrained ones, sample by sample, over many models.

All take two arrays of shape (N, n): one number for each of N models and n samples, such as the
margin of the right class. The models of a population differ in seed. An attacker sees one number
and tells from which population it is; if he cannot, the sample is forgotten.

Scores of few models are biased upward: two samples from one population differ. `of_retraining`
tells what a second population of retrained models would score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import check_integer, check_real, check_seed
from lcodec_ext.evaluation.metrics import scikit_learn, tpr_at_fpr

Floats = NDArray[np.float64]

_BINS, _WIDTH = 13, 0.5  # of the challenge's forgetting quality


@dataclass(frozen=True)
class ULira:
    """What the attack U-LiRA finds; larger is worse, but for chance.

    Attributes
    ----------
    auc : array, shape (n,)
        Of each sample: the chance that an unlearned model looks more like one than a retrained
        model does. 0.5 where they cannot be told apart.
    tpr : array, shape (n,)
        Of each sample: the share of unlearned models that are told while at most 1% of the
        retrained ones are accused; with fewer than 200 models of either kind, none may be.
    pooled_auc, pooled_tpr : float
        Of all samples together.
    """

    auc: Floats
    tpr: Floats
    pooled_auc: float
    pooled_tpr: float


def ulira(unlearned: Any, retrained: Any, *, fpr: float = 0.01) -> ULira:
    """U-LiRA: a likelihood-ratio attack with a normal distribution for each sample and population.

    The distributions are fitted to half of the models, and the attack is tried on the others; then
    the halves change places, and what was found is averaged. Models with even numbers are one half.

    Parameters
    ----------
    unlearned, retrained : array_like, shape (N, n)
        N >= 4.
    fpr : float, default 0.01
        False-positive rate of the true-positive rates.

    References
    ----------
    J. Hayes, I. Shumailov, E. Triantafillou, A. Khalifa and N. Papernot, "Inexact Unlearning Needs
    More Careful Evaluations to Avoid a False Sense of Privacy", 2024 (arXiv:2403.01218).
    """
    ours, theirs = _populations(unlearned, retrained, 4)
    folds = []
    for fit, judge in ((0, 1), (1, 0)):
        ratios = [
            _log_normal(each[judge::2], ours[fit::2]) - _log_normal(each[judge::2], theirs[fit::2])
            for each in (ours, theirs)
        ]
        columns = zip(*(each.T for each in ratios), strict=True)
        folds.append(
            (
                _auc(*ratios),
                np.array([tpr_at_fpr(found, others, fpr) for found, others in columns]),
                float(_auc(*(each.reshape(-1, 1) for each in ratios))[0]),
                tpr_at_fpr(ratios[0], ratios[1], fpr),
            )
        )
    auc, tpr, pooled_auc, pooled_tpr = (
        np.mean(np.stack(each), axis=0) for each in zip(*folds, strict=True)
    )
    return ULira(auc, tpr, float(pooled_auc), float(pooled_tpr))


def _log_normal(values: Floats, fitted: Floats) -> Floats:
    """Log density of a normal distribution with the mean and variance of each column."""
    mean = fitted.mean(0)
    least = 1e-6 * (1 + np.abs(mean))  # models that are all alike have no spread
    deviation = np.maximum(fitted.std(0, ddof=1), least)
    return np.asarray(-0.5 * ((values - mean) / deviation) ** 2 - np.log(deviation))


def _auc(positives: Floats, negatives: Floats) -> Floats:
    """Of each column, the chance that a positive is larger than a negative; ties count half."""
    from scipy.stats import rankdata

    n = len(positives)
    ranks = rankdata(np.concatenate([positives, negatives]), axis=0)[:n].sum(0)
    return np.asarray((ranks - n * (n + 1) / 2) / (n * len(negatives)))


def klom(
    unlearned: Any, retrained: Any, *, bins: int = 20, least: float = 1e-5, clip: float = 100.0
) -> Floats:
    """KLoM: KL divergence of the margins, unlearned || retrained, of each sample, shape (n,).

    Margins are counted in bins of equal width from the smallest to the largest of both
    populations. Where the retrained models have none, a share of `least` stands for 0, so that the
    divergence is at most ``-log(least)``, 11.5.

    Parameters
    ----------
    unlearned, retrained : array_like, shape (N, n)
    bins : int, default 20
    least : float, default 1e-5
    clip : float, default 100
        Margins are cut to -clip and clip first.

    References
    ----------
    K. Georgiev, R. Rinberg, S. M. Park, S. Garg, A. Ilyas, A. Madry and S. Neel, "Attribute-to-
    Delete: Machine Unlearning via Datamodel Matching", ICLR 2025.
    """
    check_integer(bins, "bins", 1)
    if not 0 < check_real(least, "least", 0) < 1:
        raise ValueError(f"least must be between 0 and 1; got {least}")
    check_real(clip, "clip", 0)
    ours, theirs = (np.clip(each, -clip, clip) for each in _populations(unlearned, retrained, 1))
    both = np.concatenate([ours, theirs])
    low, width = both.min(0), np.ptp(both, axis=0)

    def shares(values: Floats) -> Floats:
        place = (values - low) / np.where(width > 0, width, 1) * bins
        numbers = np.minimum(place.astype(int), bins - 1)
        counts = np.zeros((bins, values.shape[1]))
        np.add.at(counts, (numbers, np.arange(values.shape[1])), 1)
        return counts / len(values)

    p, q = shares(ours), shares(theirs)
    q = np.where(p > 0, np.maximum(q, least), q)
    q = q / q.sum(0)
    ratio = np.where(p > 0, p, 1) / np.where(p > 0, q, 1)
    return np.asarray((p * np.log(ratio)).sum(0))


def privacy_degrees(unlearned: Any, retrained: Any, *, delta: float = 0.01) -> Floats:
    """Epsilon of each sample, shape (n,), by the NeurIPS unlearning challenge.

    An attack with false-positive rate a and false-negative rate b shows that (epsilon, delta)
    unlearning does not hold below ``max(log(1 - delta - a) - log b, log(1 - delta - b) - log a)``.
    The largest over all attacks by a threshold, of either direction, is returned. It is infinite
    where one of them makes no mistake; one with only one of the rates 0 does not count, as in the
    challenge; it is at least 0.

    Parameters
    ----------
    unlearned, retrained : array_like, shape (N, n)
    delta : float, default 0.01

    References
    ----------
    E. Triantafillou, P. Kairouz, F. Pedregosa, J. Hayes and others, "Are We Making Progress in
    Unlearning? Findings from the First NeurIPS Unlearning Competition", 2024 (arXiv:2406.09073).
    """
    if not check_real(delta, "delta", 0) < 1:
        raise ValueError(f"delta must be from 0 to below 1; got {delta}")
    ours, theirs = _populations(unlearned, retrained, 1)
    both = np.concatenate([ours, theirs])
    order = np.argsort(both, axis=0, kind="stable")
    is_ours = order < len(ours)
    below = np.cumsum(is_ours, axis=0), np.cumsum(~is_ours, axis=0)  # or at the threshold
    ranked = np.take_along_axis(both, order, axis=0)
    whole = np.ones((1, both.shape[1]), dtype=bool)
    between = np.concatenate([ranked[:-1] < ranked[1:], whole])  # equal values stay together
    best = np.zeros(both.shape[1])
    for rates in (
        (below[0] / len(ours), 1 - below[1] / len(theirs)),
        (1 - below[0] / len(ours), below[1] / len(theirs)),
    ):
        missed, accused = (np.where(between, rate, 0.0) for rate in rates)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.fmax(
                np.log(1 - delta - accused) - np.log(missed),
                np.log(1 - delta - missed) - np.log(accused),
            )
        found = np.where((missed > 0) & (accused > 0), found, -np.inf)
        found = np.where(between & (missed == 0) & (accused == 0), np.inf, found)
        best = np.fmax(best, np.nanmax(np.where(np.isnan(found), -np.inf, found), axis=0))
    return best


def forgetting_quality(epsilons: Any) -> float:
    """The challenge's score of the epsilons of all samples: from 2^-12, 0.00024, to 1, the best.

    Each sample scores ``2 / 2^k`` with k the number of its bin: 1 below 0.5, 2 below 1, ..., 13
    from 6 on. The score is the mean.
    """
    values = np.asarray(epsilons, dtype=np.float64).ravel()
    if not len(values) or np.isnan(values).any() or (values < 0).any():
        raise ValueError(f"epsilons must be numbers >= 0, at least one; got {epsilons!r}")
    return float((2.0 / 2.0 ** np.digitize(values, np.arange(_BINS) * _WIDTH)).mean())


def of_retraining(
    score: Callable[[Floats, Floats], float], retrained: Any, *, draws: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of a score between two populations of retrained models.

    A pair of populations is drawn by the smoothed bootstrap: so many models with replacement, and
    normal noise of Silverman's width on each number, scaled so that the variance stays. The
    deviation is NaN where a score is infinite.

    Parameters
    ----------
    score : callable
        ``score(one, other)`` of two arrays of shape (N, n).
    retrained : array_like, shape (N, n)
    draws : int, default 20
        Pairs.
    seed : int, default 0

    References
    ----------
    B. W. Silverman, "Density Estimation for Statistics and Data Analysis", 1986, section 6.4.1.
    """
    check_integer(draws, "draws", 2)
    check_seed(seed, optional=False)
    given, _ = _populations(retrained, retrained, 2)
    n = len(given)
    mean, deviation = given.mean(0), given.std(0, ddof=1)
    width = 1.06 * n**-0.2  # in standard deviations
    rng = np.random.default_rng(seed)

    def population() -> Floats:
        drawn = given[rng.integers(0, n, n)]
        noise = width * deviation * rng.standard_normal(drawn.shape)
        return np.asarray(mean + (drawn - mean + noise) / np.sqrt(1 + width**2))

    found = [score(population(), population()) for _ in range(draws)]
    finite = bool(np.isfinite(found).all())
    return float(np.mean(found)), float(np.std(found, ddof=1)) if finite else float("nan")


def _populations(unlearned: Any, retrained: Any, least: int) -> tuple[Floats, Floats]:
    scikit_learn()  # and so SciPy
    ours, theirs = (np.asarray(each, dtype=np.float64) for each in (unlearned, retrained))
    for name, each in (("unlearned", ours), ("retrained", theirs)):
        if each.ndim != 2 or len(each) < least or not each.shape[1]:
            raise ValueError(
                f"{name} must have a row for each of at least {least} models and a column for each "
                f"sample; got shape {each.shape}"
            )
        if not np.isfinite(each).all():
            raise ValueError(f"{name} holds NaN or infinity")
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(
            "unlearned and retrained must be of the same samples; got "
            f"{ours.shape[1]} and {theirs.shape[1]} columns"
        )
    return ours, theirs
