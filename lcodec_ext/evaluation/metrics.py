"""Measures of a deletion: what a model does, remembers and reveals, compared with retrained models.

Models are called in evaluation mode, without autocast, and left as they were. Their outputs are
converted to float64 first. ``data`` is what `unlearn` takes: tensors, a dict with "labels", a
Dataset or a DataLoader. ``loss_fn(outputs, targets)`` is the mean loss of a batch.

Where a predicted distribution is needed, outputs of shape (n, C) are logits of C >= 2 classes,
with integer targets of shape (n,). Outputs of shape (n,) or (n, 1) are the logits of class 1, with
targets 0 and 1. Of a loss over tokens (`per_token_loss`, or found out) outputs of shape (n, T, C)
are logits of tokens, and those whose labels count are what a measure is the mean over.

`evaluate` reports what the tables `METRICS` and `DISTANCES`, at the end of this file, list. A new
metric is a function and an entry there.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.decay import Decay, decay_of
from lcodec_ext._torch.loss import (
    LossFunction,
    check_copy,
    check_loss_fn,
    euclidean_norm,
    objective,
    trainable,
)
from lcodec_ext._torch.modes import clock, evaluating, place, plain_arithmetic
from lcodec_ext._torch.predict import Prediction, Score, log_probabilities_of, predict
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens, of_sets
from lcodec_ext._torch.wrapped import unwrapped

Number = float | None
Features = dict[str, NDArray[np.float64]]


def accuracy(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction,
    *,
    score: Score | None = None,
    batch_size: int = 256,
) -> float | None:
    """Share of samples whose class is predicted: the largest logit, or a single positive one.

    Of a loss over tokens the share of counted tokens.

    Parameters
    ----------
    model : Module
    data : tuple of tensors, dict of tensors, Dataset or DataLoader
    loss_fn : callable
        Tells regression, and losses of probabilities, from classification.
    score : callable, optional
        ``score(outputs, targets)`` returns one number per sample, shape (n,); their mean takes the
        place of the accuracy, for models with several outputs for instance.
    batch_size : int, default 256

    Returns
    -------
    float or None
        None where outputs and targets are not those of a classification and there is no score.
    """
    return predict(model, _samples(model, data, "data"), loss_fn, batch_size, score).accuracy


def sample_losses(
    model: nn.Module, data: Any, loss_fn: LossFunction, *, batch_size: int = 256
) -> Tensor:
    """Loss of each sample alone: float64, shape (n,), on the CPU. Their mean is that of the data.

    Of a loss over tokens each is the mean over the counted tokens of a sample, 0 without any; the
    mean of the data is that of all tokens.

    Raises
    ------
    ValueError
        If the loss of a batch is not the mean of its samples' losses (class weights, ignored
        targets, sums), or is not finite.
    """
    return predict(model, _samples(model, data, "data"), loss_fn, batch_size).losses


def js_distance(model: nn.Module, other: nn.Module, data: Any, *, batch_size: int = 256) -> float:
    """Jensen-Shannon distance of the distributions that two models predict, mean over samples.

    For a sample it is the square root of the divergence to base 2, summed over the classes: 0 for
    the same distribution, 1 for disjoint ones. It is a metric. The divergence without the root, or
    averaged over classes, is not comparable with it.

    References
    ----------
    D. M. Endres and J. E. Schindelin, "A new metric for probability distributions", IEEE
    Transactions on Information Theory 49 (2003).
    """
    return _distance(js_distances, model, other, data, batch_size)


def activation_distance(
    model: nn.Module, other: nn.Module, data: Any, *, batch_size: int = 256
) -> float:
    """Euclidean distance of the probabilities that two models predict, mean over samples.

    From 0 to sqrt(2). The "activations" are those of the last layer, after softmax, as in the
    references.

    References
    ----------
    A. Golatkar, A. Achille, A. Ravichandran, M. Polito and S. Soatto, "Mixed-Privacy Forgetting
    in Deep Networks", CVPR 2021. V. S. Chundawat, A. K. Tarun, M. Mandal and M. Kankanhalli, "Can
    Bad Teaching Induce Forgetting?", AAAI 2023.
    """
    return _distance(activation_distances, model, other, data, batch_size)


def js_distances(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon distance of each row, shape (n,), of log-probabilities (n, C).

    With m = (p + q) / 2 and d = (p - q) / (p + q) the divergence is the sum over classes of
    m ((1 + d) log(1 + d) + (1 - d) log(1 - d)) / 2. These terms are not negative, so that small
    distances do not cancel, as they do in `scipy.spatial.distance.jensenshannon`.
    """
    _check_alike(log_p, log_q)
    d = torch.where(log_p == log_q, 0.0, (log_p - log_q) / 2).tanh()
    square = d.square()
    series = square * (
        1 + square * (1 / 6 + square * (1 / 15 + square * (1 / 28 + square * (1 / 45))))
    )
    direct = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    term = torch.where(d.abs() < 0.03, series, direct)
    middle = (log_p.exp() + log_q.exp()) / 2
    return ((middle * term).sum(1) / (2 * np.log(2))).sqrt()


def _check_alike(log_p: Tensor, log_q: Tensor) -> None:
    if log_p.shape != log_q.shape:
        (n, ours), (m, theirs) = log_p.shape, log_q.shape
        raise ValueError(
            f"models that are compared must have the same classes; one has {ours} of them for {n} "
            f"samples, the other {theirs} for {m}"
        )


def activation_distances(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Euclidean distance of the probabilities of each row, shape (n,)."""
    _check_alike(log_p, log_q)
    return (log_p.exp() - log_q.exp()).norm(dim=1)


def _distance(
    distances: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    other: nn.Module,
    data: Any,
    batch_size: int,
) -> float:
    check_integer(batch_size, "batch_size", 1)
    samples = _samples(model, data, "data")

    def distribution(each: nn.Module, batch: Any) -> Tensor:
        outputs = outputs_of(each, batch)
        found = log_probabilities_of(outputs) if isinstance(outputs, Tensor) else None
        if found is None:
            given = (
                f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
            )
            raise ValueError(
                f"the models must return logits of shape (n, C), (n, 1) or (n,); got {given}. Of "
                "tokens `evaluate` has the distance, where it knows which of them count"
            )
        return found

    total = 0.0
    with evaluating(model), evaluating(other), plain_arithmetic():
        for batch in samples.batches(batch_size):
            total += float(distances(distribution(model, batch), distribution(other, batch)).sum())
    return total / len(samples)


def weight_distance(model: nn.Module, other: nn.Module, *, relative: bool = False) -> float:
    """Euclidean distance of the parameters of two models, by name.

    Buffers, such as running statistics, do not count. Between networks trained from different
    starts it says little.

    Parameters
    ----------
    model, other : Module
        With the same parameters.
    relative : bool, default False
        Divide by the norm of the other's.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    check_bool(relative, "relative")
    ours, theirs = (dict(unwrapped(each).named_parameters()) for each in (model, other))
    for name in ours.keys() | theirs.keys():
        shapes = [tuple(each[name].shape) if name in each else None for each in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model and other must have the same parameters; {name!r} has shape {shapes[0]} "
                f"in model and {shapes[1]} in other (None: it has no such parameter)"
            )
    difference = norm = 0.0
    for name, each in theirs.items():
        reference = each.detach().double()
        difference += float((ours[name].detach().double() - reference).square().sum())
        norm += float(reference.square().sum())
    return (difference / norm if relative else difference) ** 0.5


def gradient_norm(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction,
    *,
    weight_decay: Any = 0.0,
    batch_size: int = 256,
) -> float:
    """Euclidean norm of the gradient of the objective on all the data.

    The objective is the mean loss plus (weight_decay / 2) |w|^2 over all trainable parameters w.
    On the retained samples its gradient vanishes at what retraining converges to. The norm is
    that of the whole gradient; a mean over the norms of batches would be larger.

    Parameters
    ----------
    model : Module
    data : tuple of tensors, dict of tensors, Dataset or DataLoader
        The retained samples.
    loss_fn : callable
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        As `torch.optim.SGD` means it; of an optimizer by its groups, of a mapping by names.
    batch_size : int, default 256
        Bounds the memory and changes nothing else.

    Notes
    -----
    Backward passes are in the model's dtype, sums in float64. In float32 rounding leaves about
    1e-7 times the size of the terms.
    """
    model = unwrapped(model)
    decay = decay_of(weight_decay, model)
    check_integer(batch_size, "batch_size", 1)
    samples = _samples(model, data, "data")
    loss_fn = of_sets(by_tokens(loss_fn, model, samples), samples)
    with evaluating(model), plain_arithmetic(), torch.enable_grad():
        _, gradient = objective(model, samples, loss_fn, decay, batch_size)
    return euclidean_norm(gradient)


# ---------------------------------------------------------------------------------------------
# Membership inference


def scikit_learn() -> tuple[Any, Any]:
    """`LogisticRegression` and `roc_auc_score`, with a clear error where they are missing."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(
            "membership inference, and so evaluate, needs scikit-learn: "
            "pip install 'lcodec_ext[evaluation]'"
        ) from error
    return LogisticRegression, roc_auc_score


def modified_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """Prediction entropy that knows the right class: 0 if sure and right, large if sure and wrong.

    ::

        -(1 - p_y) log p_y - sum over i != y of p_i log(1 - p_i)

    Parameters
    ----------
    log_probabilities : Tensor, shape (n, C)
        Logarithms, because probabilities near 1 have lost 1 - p.
    targets : Tensor of int, shape (n,)
        y.

    Returns
    -------
    Tensor, shape (n,)

    References
    ----------
    L. Song and P. Mittal, "Systematic Evaluation of Privacy Risks of Machine Learning Models",
    USENIX Security 2021.
    """
    p = log_probabilities.exp()
    top = log_probabilities.argmax(1, keepdim=True)
    log_not = torch.log1p(-p.scatter(1, top, 0.0))
    rest = log_probabilities.scatter(1, top, -torch.inf).logsumexp(1, keepdim=True)
    log_not = log_not.scatter(1, top, rest)
    log_p = log_probabilities.scatter(1, top, torch.log1p(-rest.exp()))  # near 0 still exact
    right = targets[:, None]
    others = (p * log_not).scatter(1, right, 0.0).sum(1)
    return -others - (log_not.exp() * log_p).gather(1, right)[:, 0]


def roc_auc(positives: Any, negatives: Any) -> float:
    """Chance that a positive has the larger score than a negative; ties count half.

    Parameters
    ----------
    positives, negatives : array_like or Tensor, shapes (n,) and (m,)
        Scores. Both must hold finite numbers, at least one; else it is a ValueError.
    """
    scores = _scores(positives, negatives)
    _, roc_auc_score = scikit_learn()
    return float(roc_auc_score(np.repeat([1, 0], [*map(len, scores)]), np.concatenate(scores)))


def tpr_at_fpr(positives: Any, negatives: Any, fpr: float = 0.01) -> float:
    """Share of positives that an attack finds while it accuses at most a share of the negatives.

    A sample is accused if its score is above a threshold, the lowest that at most
    ``floor(fpr * m)`` of the negatives exceed. Chance is fpr or less: with fewer than ``1 / fpr``
    negatives none may be accused.

    Parameters
    ----------
    positives, negatives : array_like or Tensor, shapes (n,) and (m,)
        Scores, larger for what looks more like a positive; finite, at least one of either.
    fpr : float, default 0.01
        False-positive rate, from 0 to below 1.

    References
    ----------
    N. Carlini, S. Chien, M. Nasr, S. Song, A. Terzis and F. Tramer, "Membership Inference Attacks
    From First Principles", IEEE S&P 2022: why a mean, such as the AUC, hides a few samples that
    are surely known.
    """
    if not check_real(fpr, "fpr", 0) < 1:
        raise ValueError(f"fpr must be from 0 to below 1; got {fpr}")
    found, others = _scores(positives, negatives)
    allowed = int(fpr * len(others) * (1 + 1e-12))  # 0.29 * 100 is 28.999...
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((found > threshold).mean())


def _scores(positives: Any, negatives: Any) -> list[NDArray[np.float64]]:
    scores = [np.asarray(each, dtype=np.float64).ravel() for each in (positives, negatives)]
    for name, each in zip(("positives", "negatives"), scores, strict=True):
        if not len(each) or not np.isfinite(each).all():
            raise ValueError(f"{name} must be finite numbers, at least one; got {len(each)}")
    return scores


@dataclass(frozen=True)
class MembershipInference:
    """How well an attacker tells the removed samples from samples never seen.

    Attributes
    ----------
    auc : float
        Of the attack by loss: the chance that a removed sample has the smaller loss than a held-out
        test sample, ties counting half. 0.5 where they cannot be told apart. For removed samples
        unlike the others, mislabelled ones for instance, it is not 0.5 after retraining either:
        compare with that.
    tpr : float
        Of the same attack: the share of removed samples that it finds while it accuses at most 1%
        of the held-out test samples (`tpr_at_fpr`).
    auc_by_feature : dict of str to float
        The same for "loss", "modified_entropy", "confidence" (of the right class; these two for
        classification), "min_k" (of a loss over tokens: the mean log-probability of the fifth of a
        sample's tokens that are the least likely) and "calibrated", the attack that combines them.
    accuracy : float
        Of the calibrated attack, on removed and held-out samples with equal weight; 0.5 by chance.
    member_share : float
        Share of removed samples that the attack takes for members.
    calibration_accuracy : float
        Of the same attack on the samples on which it was calibrated.
    n_calibration, n_held_out : int
        Non-members (and about as many members) it was calibrated on, and others for the test.
    """

    auc: float
    tpr: float
    auc_by_feature: dict[str, float]
    accuracy: float
    member_share: float
    calibration_accuracy: float
    n_calibration: int
    n_held_out: int


def membership_inference(
    model: nn.Module,
    forget: Any,
    retain: Any,
    test: Any,
    loss_fn: LossFunction,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> MembershipInference:
    """Attack a model: find out which samples it was trained on.

    Half of the test samples, and as many retained ones, calibrate the attack. It is then tried on
    the removed samples and on the other half of the test samples, neither of which it has seen.

    The calibrated attack is scikit-learn's logistic regression (L2 penalty 1, balanced classes) on
    loss, modified entropy and confidence, each as its quantile among the calibration samples;
    losses of trained networks span many orders of magnitude.

    Parameters
    ----------
    model : Module
    forget, retain, test : tuple of tensors, dict of tensors, Dataset or DataLoader
        Removed, retained and never-seen samples; at least 4 of test.
    loss_fn : callable
    seed : int, default 0
        Of the choice of calibration samples.
    batch_size : int, default 256

    References
    ----------
    S. Yeom, I. Giacomelli, M. Fredrikson and S. Jha, "Privacy Risk in Machine Learning", CSF
    2018 (loss). L. Song and P. Mittal, USENIX Security 2021 (modified entropy, confidence). W.
    Shi, A. Ajith, M. Xia, Y. Huang, D. Liu, T. Blevins, D. Chen and L. Zettlemoyer, "Detecting
    Pretraining Data from Large Language Models", ICLR 2024 (min-k%, with k = 20 as there).
    """
    removed, retained, unseen = (
        _samples(model, each, name)
        for name, each in (("forget", forget), ("retain", retain), ("test", test))
    )
    split = calibration_split(len(retained), len(unseen), seed)
    members = predict(model, retained.subset(split.members.tolist()), loss_fn, batch_size)
    runs = (predict(model, each, loss_fn, batch_size) for each in (removed, unseen))
    return attack(next(runs), features_of(members), next(runs), split)


class CalibrationSplit(NamedTuple):
    """Numbers of retained samples, and of test samples, for the attack."""

    members: NDArray[np.intp]
    calibration: NDArray[np.intp]
    held_out: NDArray[np.intp]


def calibration_split(n_retain: int, n_test: int, seed: int) -> CalibrationSplit:
    """Draw the samples that calibrate an attack, and those held out."""
    check_seed(seed, optional=False)
    if n_test < 4:
        raise ValueError(
            f"test must have at least 4 samples, half of them to calibrate the attack; got {n_test}"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(n_test)
    half = n_test // 2
    members = rng.choice(n_retain, min(half, n_retain), replace=False)
    return CalibrationSplit(np.sort(members), np.sort(order[:half]), np.sort(order[half:]))


def features_of(run: Prediction, numbers: NDArray[np.intp] | slice = slice(None)) -> Features:
    """What the attack sees of samples, larger for what looks more like a member."""
    seen = {"loss": -run.losses}
    if run.least_likely is not None:
        seen["min_k"] = run.least_likely
    elif run.log_probabilities is not None and run.labels is not None:
        seen["modified_entropy"] = -modified_entropy(run.log_probabilities, run.labels)
        seen["confidence"] = run.log_probabilities.gather(1, run.labels[:, None])[:, 0]
    return {name: values.numpy()[numbers] for name, values in seen.items()}


def attack(
    forget: Prediction, members: Features, test: Prediction, split: CalibrationSplit
) -> MembershipInference:
    """Calibrate on members and on non-members; try on the removed and on those held out."""
    logistic_regression, _ = scikit_learn()
    sets = (
        features_of(forget),
        members,
        features_of(test, split.calibration),
        features_of(test, split.held_out),
    )
    names = [name for name in sets[0] if all(name in each for each in sets)]
    pooled = {name: np.sort(np.concatenate([sets[1][name], sets[2][name]])) for name in names}

    def quantiles(each: Features) -> NDArray[np.float64]:  # -1 to 1
        below, above = (
            np.stack([np.searchsorted(pooled[k], each[k], side) for k in names], 1)
            for side in ("left", "right")
        )
        return (below + above) / len(pooled["loss"]) - 1

    seen = [quantiles(each) for each in sets]
    with warnings.catch_warnings():
        # Rounding can end the line search of a fit that starts at its optimum; L-BFGS takes over.
        warnings.filterwarnings("ignore", message="Line search of Newton solver")
        fitted = logistic_regression(
            C=1.0, class_weight="balanced", solver="newton-cholesky", tol=1e-6
        ).fit(np.concatenate(seen[1:3]), np.repeat([1, 0], [len(seen[1]), len(seen[2])]))
    scores = [fitted.decision_function(each) for each in seen]
    # A score of 0 is a guess, also where the fit has rounded it.
    judged = [
        float(np.heaviside(np.where(np.abs(score) < 1e-12, 0, score), 0.5).mean())
        for score in scores
    ]
    auc = {name: roc_auc(sets[0][name], sets[3][name]) for name in names}
    auc["calibrated"] = roc_auc(scores[0], scores[3])
    return MembershipInference(
        auc=auc["loss"],
        tpr=tpr_at_fpr(sets[0]["loss"], sets[3]["loss"]),
        auc_by_feature=auc,
        accuracy=(judged[0] + 1 - judged[3]) / 2,
        member_share=judged[0],
        calibration_accuracy=(judged[1] + 1 - judged[2]) / 2,
        n_calibration=len(seen[2]),
        n_held_out=len(seen[3]),
    )


# ---------------------------------------------------------------------------------------------
# Relearning


@dataclass(frozen=True)
class Relearning:
    """How fast a model learns the removed samples again.

    Attributes
    ----------
    steps : int
        Taken until the loss reached the level; where it did not, all that were allowed.
    seconds : float
    reached : bool
        Whether it did.
    """

    steps: int
    seconds: float
    reached: bool


def relearn_time(
    model: nn.Module,
    forget: Any,
    loss_fn: LossFunction,
    level: float,
    *,
    learning_rate: float = 1e-3,
    max_steps: int = 200,
    batch_size: int = 256,
) -> Relearning:
    """Count the steps of fine-tuning on the removed samples until their loss is at a level.

    A copy of the model takes steps of Adam on the mean loss of all removed samples, in evaluation
    mode, so that nothing is random. Few steps, compared with a retrained model, show that the
    samples were hidden rather than forgotten.

    Parameters
    ----------
    model : Module
    forget : tuple of tensors, dict of tensors, Dataset or DataLoader
    loss_fn : callable
    level : float
        Mean loss to reach: that of the original model, or a little more.
    learning_rate : float, default 1e-3
        Adam's usual one.
    max_steps : int, default 200
    batch_size : int, default 256
        Most samples in one pass; it changes nothing else.

    References
    ----------
    A. Golatkar, A. Achille and S. Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020.
    """
    check_real(level, "level", -np.inf)
    check_real(learning_rate, "learning_rate", 0)
    check_integer(max_steps, "max_steps", 0)
    check_integer(batch_size, "batch_size", 1)
    with plain_arithmetic(), torch.enable_grad():
        check_loss_fn(loss_fn)
        samples = _samples(model, forget, "forget").loaded()
        check_copy(model, samples, loss_fn)
        loss_fn = of_sets(by_tokens(loss_fn, model, samples), samples)
        learner = copy_of(model)
        learner.eval()
        weights = trainable(learner)
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        steps, begin = 0, clock(model)
        while True:
            loss, gradient = objective(learner, samples, loss_fn, 0.0, batch_size)
            if loss <= level or steps == max_steps:
                return Relearning(steps, clock(model) - begin, loss <= level)
            for weight, each in zip(weights, gradient, strict=True):
                weight.grad = each.to(weight.dtype)
            optimizer.step()
            steps += 1


def _samples(model: nn.Module, data: Any, name: str) -> Samples:
    return as_samples(data, name, *place(model))


# ---------------------------------------------------------------------------------------------
# What `evaluate` reports


@dataclass(frozen=True)
class Sets:
    """The samples and the objective on which `evaluate` compares models."""

    forget: Samples
    retain: Samples
    test: Samples
    loss_fn: LossFunction
    score: Score | None
    weight_decay: Decay
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Seen:
    """A model and one pass of it over each set: what metrics are computed from."""

    model: nn.Module
    sets: Sets
    forget: Prediction
    retain: Prediction
    test: Prediction
    attack: MembershipInference


def tug_of_war(ours: Mapping[str, Number], theirs: Mapping[str, Number]) -> Number:
    """ToW of the accuracies of a model and of a retrained one, as `METRICS` names them.

    The product over removed, retained and test samples of ``1 - |difference of accuracies|``: 1
    where all three agree, and small where one is far off. Of a loss over tokens by the accuracies
    of tokens. None without accuracies.

    References
    ----------
    K. Zhao, M. Kurmanji, G.-O. Barbulescu, E. Triantafillou and P. Triantafillou, "What Makes
    Unlearning Hard and What to Do About It", NeurIPS 2024.
    """
    product = 1.0
    for part in ("forget", "retain", "test"):
        key = f"token_accuracy_{part}"
        key = key if ours.get(key) is not None else f"accuracy_{part}"
        one, other = (each.get(key) for each in (ours, theirs))
        if one is None or other is None:
            return None
        product *= 1 - abs(one - other)
    return product


class Measured(NamedTuple):
    """A model, its metrics, and what distances to other models are computed from."""

    model: nn.Module
    metrics: dict[str, Number]
    forget: Prediction
    test: Prediction


def measure(model: nn.Module, sets: Sets) -> Measured:
    """Run a model on all sets, and compute the metrics of it alone."""
    options = sets.loss_fn, sets.batch_size, sets.score
    forget, retain, test = (
        predict(model, each, *options, of_tokens=each is not sets.retain)
        for each in (sets.forget, sets.retain, sets.test)
    )
    split = calibration_split(len(sets.retain), len(sets.test), sets.seed)
    found = attack(forget, features_of(retain, split.members), test, split)
    seen = Seen(model, sets, forget, retain, test, found)
    metrics = {**METRICS, **(TOKEN_METRICS if isinstance(sets.loss_fn, TokenLoss) else {})}
    return Measured(model, {name: metric(seen) for name, metric in metrics.items()}, forget, test)


def _accuracy(seen: Seen, run: Prediction) -> Number:
    """Of samples, or the mean score; tokens have an accuracy of their own."""
    return run.accuracy if run.counted is None or seen.sets.score is not None else None


def _token_accuracy(seen: Seen, run: Prediction) -> Number:
    return None if seen.sets.score is not None else run.accuracy


def _objectives_gradient_norm(seen: Seen) -> float:
    sets = seen.sets
    return gradient_norm(
        seen.model,
        sets.retain,
        sets.loss_fn,
        weight_decay=sets.weight_decay,
        batch_size=sets.batch_size,
    )


def _mean_distance(
    distances: Callable[[Tensor, Tensor], Tensor], set_: Literal["forget", "test"]
) -> Callable[[Measured, Measured], Number]:
    def distance(one: Measured, other: Measured) -> Number:
        ours, theirs = (getattr(each, set_).log_probabilities for each in (one, other))
        return None if ours is None or theirs is None else float(distances(ours, theirs).mean())

    return distance


def _weights_apart(measured: Measured, other: Measured, *, relative: bool = False) -> Number:
    try:
        return weight_distance(measured.model, other.model, relative=relative)
    except ValueError:  # models of different kinds
        return None


#: By name, the metrics of a model alone. The distance between two values is their difference.
METRICS: Mapping[str, Callable[[Seen], Number]] = MappingProxyType(
    {
        "accuracy_forget": lambda seen: _accuracy(seen, seen.forget),
        "accuracy_retain": lambda seen: _accuracy(seen, seen.retain),
        "accuracy_test": lambda seen: _accuracy(seen, seen.test),
        "loss_forget": lambda seen: seen.forget.loss,
        "loss_retain": lambda seen: seen.retain.loss,
        "loss_test": lambda seen: seen.test.loss,
        "mia_auc": lambda seen: seen.attack.auc,
        "mia_tpr": lambda seen: seen.attack.tpr,
        "mia_accuracy": lambda seen: seen.attack.accuracy,
        "mia_member_share": lambda seen: seen.attack.member_share,
        "gradient_norm": _objectives_gradient_norm,
    }
)

#: By name, what is reported besides of a loss over tokens.
TOKEN_METRICS: Mapping[str, Callable[[Seen], Number]] = MappingProxyType(
    {
        "token_accuracy_forget": lambda seen: _token_accuracy(seen, seen.forget),
        "token_accuracy_retain": lambda seen: _token_accuracy(seen, seen.retain),
        "token_accuracy_test": lambda seen: _token_accuracy(seen, seen.test),
        "perplexity_forget": lambda seen: seen.forget.perplexity,
        "perplexity_retain": lambda seen: seen.retain.perplexity,
        "perplexity_test": lambda seen: seen.test.perplexity,
        "mia_min_k_auc": lambda seen: seen.attack.auc_by_feature.get("min_k"),
    }
)

#: By name, distances of one model to another, and ToW, which is 1 at no distance.
DISTANCES: Mapping[str, Callable[[Measured, Measured], Number]] = MappingProxyType(
    {
        "tow": lambda one, other: tug_of_war(one.metrics, other.metrics),
        "js_forget": _mean_distance(js_distances, "forget"),
        "js_test": _mean_distance(js_distances, "test"),
        "activation_forget": _mean_distance(activation_distances, "forget"),
        "activation_test": _mean_distance(activation_distances, "test"),
        "weight_distance": _weights_apart,
        "weight_distance_relative": lambda one, other: _weights_apart(one, other, relative=True),
    }
)

#: Metrics that are reported without a floor and a closed gap.
WITHOUT_GAP = {
    "mia_member_share",
    "tow",
    "gradient_norm",
    "weight_distance_relative",
    "relearn_seconds",
    "relearn_reached",
}
