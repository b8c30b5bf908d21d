"""Measures of a deletion: what a model does, remembers and reveals beside retrained models.

Models are called in evaluation mode, without autocast, and left as they were. What they put out is
taken to float64 before anything is computed from it. ``data`` is what `unlearn` takes: tensors, a
dict with "labels", a Dataset or a DataLoader. ``loss_fn(outputs, targets)`` is the mean loss of a
batch.

Where a predicted distribution is needed, outputs of shape (n, C) are logits of C >= 2 classes,
with integer targets of shape (n,), and outputs of shape (n,) or (n, 1) are the logits of class 1,
with targets 0 and 1.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._torch.loss import LossFunction, objective, trainable
from lcodec_ext._torch.modes import clock, evaluating, place, plain_arithmetic
from lcodec_ext._torch.predict import Prediction, Score, log_probabilities_of, predict
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of


def accuracy(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction,
    *,
    score: Score | None = None,
    batch_size: int = 256,
) -> float | None:
    """Share of samples whose class is predicted.

    The class of the largest logit, or, of single logits, class 1 where it is positive.

    Parameters
    ----------
    model : Module
    data : tuple of tensors, dict of tensors, Dataset or DataLoader
    loss_fn : callable
        Tells regression, and losses of probabilities, from classification.
    score : callable, optional
        ``score(outputs, targets)``, one number a sample, shape (n,), of which the mean is taken
        instead: for models with several outputs, for instance.
    batch_size : int, default 256

    Returns
    -------
    float or None
        None where outputs and targets are not those of a classification and there is no score.
    """
    run = predict(model, _samples(model, data, "data"), loss_fn, batch_size, score)
    return run.accuracy


def sample_losses(
    model: nn.Module, data: Any, loss_fn: LossFunction, *, batch_size: int = 256
) -> Tensor:
    """Loss of each sample alone.

    Returns
    -------
    Tensor of float64, shape (n,), on the CPU
        Their mean is the loss of the data.

    Raises
    ------
    ValueError
        If the loss of a batch is not the mean of its samples' losses (class weights, ignored
        targets, sums), or is not finite.
    """
    return predict(model, _samples(model, data, "data"), loss_fn, batch_size).losses


def js_distance(model: nn.Module, other: nn.Module, data: Any, *, batch_size: int = 256) -> float:
    """Jensen-Shannon distance of the distributions that two models predict, mean over samples.

    Of a sample, the square root of the divergence to base 2, summed over the classes: from 0 for
    the same distribution to 1 for disjoint ones. It is a metric. The divergence without the
    root, or averaged over classes, is not comparable with it.

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

    The "activations" are those of the last layer, after softmax, as in the references; from 0 to
    sqrt(2).

    References
    ----------
    A. Golatkar, A. Achille, A. Ravichandran, M. Polito and S. Soatto, "Mixed-Privacy Forgetting
    in Deep Networks", CVPR 2021. V. S. Chundawat, A. K. Tarun, M. Mandal and M. Kankanhalli, "Can
    Bad Teaching Induce Forgetting?", AAAI 2023.
    """
    return _distance(activation_distances, model, other, data, batch_size)


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
    ours, theirs = (dict(each.named_parameters()) for each in (model, other))
    for name in ours.keys() | theirs.keys():
        shapes = [tuple(each[name].shape) if name in each else None for each in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"model and other must have the same parameters; {name!r} has shape {shapes[0]} "
                f"in model and {shapes[1]} in other (None: it is not there)"
            )
    difference = norm = 0.0
    for name, theirs_each in theirs.items():
        reference = theirs_each.detach().double()
        difference += float((ours[name].detach().double() - reference).square().sum())
        norm += float(reference.square().sum())
    return (difference / norm if relative else difference) ** 0.5


def gradient_norm(
    model: nn.Module,
    data: Any,
    loss_fn: LossFunction,
    *,
    weight_decay: float = 0.0,
    batch_size: int = 256,
) -> float:
    """Euclidean norm of the gradient of the objective on all the data.

    The objective is the mean loss plus (weight_decay / 2) |w|^2, w being all trainable parameters:
    on the retained samples its gradient vanishes at what retraining converges to. The norm is
    that of the whole gradient; a mean over the norms of batches would be larger.

    Parameters
    ----------
    model : Module
    data : tuple of tensors, dict of tensors, Dataset or DataLoader
        The retained samples.
    loss_fn : callable
    weight_decay : float, default 0.0
        As `torch.optim.SGD` means it.
    batch_size : int, default 256
        Bounds the memory and changes nothing else.

    Notes
    -----
    Backward passes are in the model's dtype, sums in float64. In float32 rounding leaves about
    1e-7 times the size of the terms.
    """
    check_real(weight_decay, "weight_decay", 0)
    check_integer(batch_size, "batch_size", 1)
    samples = _samples(model, data, "data")
    with evaluating(model), plain_arithmetic(), torch.enable_grad():
        _, gradient = objective(model, samples, loss_fn, weight_decay, batch_size)
    return float(sum(each.square().sum() for each in gradient)) ** 0.5


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
        Scores.
    """
    scores = [np.asarray(each, dtype=np.float64).ravel() for each in (positives, negatives)]
    for name, each in zip(("positives", "negatives"), scores, strict=True):
        if not len(each) or not np.isfinite(each).all():
            raise ValueError(f"{name} must be finite numbers, at least one; got {len(each)}")
    n, m = map(len, scores)
    _, inverse, counts = np.unique(np.concatenate(scores), return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    return float((midranks[inverse[:n]].sum() - n * (n + 1) / 2) / (n * m))


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
    auc_by_feature : dict of str to float
        The same for "loss", "modified_entropy", "confidence" (of the right class; these two for
        classification) and "calibrated", the attack that combines them.
    accuracy : float
        Of the calibrated attack, on removed and held-out samples with equal weight; 0.5 by chance.
    member_share : float
        Of the removed samples, which it takes for members.
    calibration_accuracy : float
        Of the same attack on the samples on which it was calibrated.
    n_calibration, n_held_out : int
        Non-members (and about as many members) it was calibrated on, and others for the test.
    """

    auc: float
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

    The calibrated attack is a logistic regression (L2 penalty 1, as scikit-learn's default) on
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
    2018 (loss). L. Song and P. Mittal, USENIX Security 2021 (modified entropy, confidence).
    """
    sets = [
        _samples(model, each, name)
        for name, each in (("forget", forget), ("retain", retain), ("test", test))
    ]
    split = calibration_split(len(sets[1]), len(sets[2]), seed)
    sets[1] = sets[1].subset(split.members.tolist())
    runs = [predict(model, each, loss_fn, batch_size) for each in sets]
    return attack(
        features(runs[0]),
        features(runs[1]),
        features(runs[2], split.calibration),
        features(runs[2], split.held_out),
    )


@dataclass(frozen=True)
class Relearning:
    """How fast a model learns the removed samples again.

    Attributes
    ----------
    steps : int
        Taken until the loss was down; where it was not, all that were allowed.
    seconds : float
    reached : bool
        Whether it was.
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
    mode, so that nothing is random. Few steps, beside a retrained model, show that the samples
    were hidden rather than forgotten.

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
        samples = _samples(model, forget, "forget").loaded()
        learner = copy.deepcopy(model).eval()
        weights = trainable(learner)
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        steps, begin = 0, clock(model)
        while True:
            last = steps == max_steps
            loss, gradient = objective(learner, samples, loss_fn, 0.0, batch_size)
            if loss <= level or last:
                return Relearning(steps, clock(model) - begin, loss <= level)
            for weight, each in zip(weights, gradient, strict=True):
                weight.grad = each.to(weight.dtype)
            optimizer.step()
            steps += 1


def _distance(
    distances: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    other: nn.Module,
    data: Any,
    batch_size: int,
) -> float:
    check_integer(batch_size, "batch_size", 1)
    samples = _samples(model, data, "data")
    total = 0.0
    with evaluating(model), evaluating(other), plain_arithmetic():
        for batch in samples.batches(batch_size):
            pair = []
            for each in (model, other):
                outputs = outputs_of(each, batch)
                logs = log_probabilities_of(outputs) if isinstance(outputs, Tensor) else None
                if logs is None:
                    given = (
                        f"shape {tuple(outputs.shape)}"
                        if isinstance(outputs, Tensor)
                        else type(outputs)
                    )
                    raise ValueError(
                        "the models must return logits of shape (n, C), (n, 1) or (n,); got "
                        f"{given}"
                    )
                pair.append(logs)
            total += float(distances(*pair).sum())
    return total / len(samples)


def js_distances(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon distance of each row, shape (n,), of log-probabilities (n, C).

    With m = (p + q) / 2 and d = (p - q) / (p + q) the divergence is the sum over classes of
    m ((1 + d) log(1 + d) + (1 - d) log(1 - d)) / 2: terms that are not negative, so that small
    distances do not cancel.
    """
    d = torch.where(log_p == log_q, 0.0, (log_p - log_q) / 2).tanh()
    square = d.square()
    series = square * (
        1 + square * (1 / 6 + square * (1 / 15 + square * (1 / 28 + square * (1 / 45))))
    )
    direct = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    term = torch.where(d.abs() < 0.03, series, direct)
    middle = (log_p.exp() + log_q.exp()) / 2
    return ((middle * term).sum(1) / (2 * np.log(2))).sqrt()


def activation_distances(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Euclidean distance of the probabilities of each row, shape (n,)."""
    return (log_p.exp() - log_q.exp()).norm(dim=1)


# ---------------------------------------------------------------------------------------------
# Membership inference


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


def features(
    run: Prediction, numbers: NDArray[np.intp] | None = None
) -> dict[str, NDArray[np.float64]]:
    """What the attack sees of samples, larger for what looks more like a member."""
    seen = {"loss": -run.losses}
    if run.log_probabilities is not None and run.labels is not None:
        seen["modified_entropy"] = -modified_entropy(run.log_probabilities, run.labels)
        seen["confidence"] = run.log_probabilities.gather(1, run.labels[:, None])[:, 0]
    return {k: v.numpy() if numbers is None else v.numpy()[numbers] for k, v in seen.items()}


def attack(
    forget: dict[str, NDArray[np.float64]],
    members: dict[str, NDArray[np.float64]],
    calibration: dict[str, NDArray[np.float64]],
    held_out: dict[str, NDArray[np.float64]],
) -> MembershipInference:
    """Calibrate on members and on non-members; try on the removed and on those held out."""
    sets = (forget, members, calibration, held_out)
    names = [name for name in forget if all(name in each for each in sets)]
    pooled = {k: np.sort(np.concatenate([members[k], calibration[k]])) for k in names}

    def quantiles(each: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        columns = []
        for k in names:
            below = np.searchsorted(pooled[k], each[k], "left")
            columns.append(below + np.searchsorted(pooled[k], each[k], "right"))
        return np.stack(columns, 1) / len(pooled[names[0]]) - 1  # -1 to 1

    seen = [quantiles(each) for each in sets]
    weights = _logistic(seen[1], seen[2])
    scores = [x @ weights[1:] + weights[0] for x in seen]
    # A score of 0 is a guess.
    judged = [float(np.heaviside(score, 0.5).mean()) for score in scores]
    auc = {name: roc_auc(forget[name], held_out[name]) for name in names}
    auc["calibrated"] = roc_auc(scores[0], scores[3])
    return MembershipInference(
        auc=auc["loss"],
        auc_by_feature=auc,
        accuracy=(judged[0] + 1 - judged[3]) / 2,
        member_share=judged[0],
        calibration_accuracy=(judged[1] + 1 - judged[2]) / 2,
        n_calibration=len(seen[2]),
        n_held_out=len(seen[3]),
    )


def _logistic(
    positives: NDArray[np.float64], negatives: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Intercept and weights of a logistic regression, by Newton's method.

    Either class has half the weight; the penalty is |w|^2 / 2 without the intercept.
    """
    x = np.concatenate([positives, negatives])
    x = np.column_stack([np.ones(len(x)), x])
    y = np.repeat([1.0, 0.0], [len(positives), len(negatives)])
    share = np.where(y == 1, len(y) / (2 * len(positives)), len(y) / (2 * len(negatives)))
    penalty = np.eye(x.shape[1])
    penalty[0, 0] = 0.0
    weights = np.zeros(x.shape[1])
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(x @ weights / 2))
        gradient = x.T @ (share * (p - y)) + penalty @ weights
        curvature = (x * (share * np.maximum(p * (1 - p), 1e-9))[:, None]).T @ x + penalty
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return weights


def _samples(model: nn.Module, data: Any, name: str) -> Samples:
    return as_samples(data, name, *place(model))
