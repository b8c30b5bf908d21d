"""Methods of deletion from the literature, each from the description in its paper.

They have the signature of the functions in `lcodec_ext.evaluation.methods`, take
``(model, forget, retain, loss_fn, seed)`` and return a new model. None looks at test samples.
Defaults are those of the papers where these state some for small networks. `tune` searches settings
with the same budget for each. Methods that need classes ask for logits of shape (n, C), (n, 1) or
(n,), as `lcodec_ext.evaluation.metrics` reads them.

A new one is a function here, and entries in `LITERATURE` (methods.py) and `GRIDS` (tune.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, check_real
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.loss import LossFunction, mean_gradient, trainable
from lcodec_ext._torch.modes import evaluating, plain_arithmetic, seeded
from lcodec_ext._torch.predict import log_probabilities_of
from lcodec_ext._torch.samples import Samples, outputs_in_training, outputs_of
from lcodec_ext.evaluation.training import (
    adam,
    batch_loss,
    both_sets,
    check_part,
    checked_budget,
    descend,
    epochs_of,
    finished,
    retained_set,
    sgd,
    start_again,
    take_step,
    trained_copy,
)
from lcodec_ext.unlearning.request import random_samples


@plain_arithmetic()
def scrub(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    alpha: float = 0.5,
    gamma: float = 1.0,
    ascents: int = 2,
    temperature: float = 1.0,
    learning_rate: float = 5e-4,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """SCRUB: a student that disobeys the trained model on the removed samples only.

    Each of the first `ascents` epochs begins with a pass over the removed samples that increases
    KL(teacher || student). Every epoch has a pass over the retained ones that decreases ``alpha
    KL(teacher || student) + gamma loss``. Adam, in training mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay
        As `fine_tune` takes them.
    alpha, gamma : float
        Weights of the teacher and of the labels on retained samples.
    ascents : int, default 2
        Epochs that begin with a pass over the removed samples.
    temperature : float, default 1.0
        Divides the logits before KL is computed.
    learning_rate : float, default 5e-4
    epochs : int, default 5
    batch_size : int, default 128

    References
    ----------
    M. Kurmanji, P. Triantafillou, J. Hayes and E. Triantafillou, "Towards Unbounded Machine
    Unlearning", NeurIPS 2023.
    """
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        check_real(value, name, 0)
    check_integer(ascents, "ascents", 0)
    if not check_real(temperature, "temperature", 0) > 0:
        raise ValueError("temperature must be above 0; got 0")
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    removed, retained = both_sets(model, forget, retain, loss_fn)
    teacher, student = trained_copy(model, training=False), trained_copy(model, training=True)
    steps = adam(student, learning_rate, weight_decay)

    def divergence(batch: Batch) -> Tensor:
        with torch.no_grad():
            target = _softened(outputs_of(teacher, batch), temperature)
        return _kl(target, _softened(outputs_in_training(student, batch), temperature))

    with seeded(seed), torch.enable_grad():
        for epoch in range(epochs):
            if epoch < ascents:
                for batch in epochs_of(removed, 1, batch_size, [seed, epoch, 0]):
                    take_step(steps, -divergence(batch))
            for batch in epochs_of(retained, 1, batch_size, [seed, epoch, 1]):
                loss = gamma * batch_loss(student, batch, loss_fn)
                take_step(steps, loss + alpha * divergence(batch))
    return finished(student, model)


@plain_arithmetic()
def selective_dampening(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    alpha: float = 10.0,
    dampening: float = 1.0,
    n_samples: int | None = 2000,
) -> nn.Module:
    """SSD: shrink the parameters that matter much more to the removed samples than to all.

    The importance of a parameter is the mean over samples of its squared gradient, in evaluation
    mode. Where that of the removed samples, F, is more than alpha times that of the training
    samples, D, the parameter is multiplied by ``min(dampening D / F, 1)``. Nothing is trained.

    Parameters
    ----------
    model, forget, retain, loss_fn
        As `fine_tune` takes them.
    seed : int, default 0
        Of the choice of n_samples.
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        Not used: importances are of the loss.
    alpha : float, default 10.0
    dampening : float, default 1.0
        lambda of the reference.
    n_samples : int or None, default 2000
        Retained samples that estimate the importance, one backward pass each; None for all.

    References
    ----------
    J. Foster, S. Schoepf and A. Brintrup, "Fast Machine Unlearning Without Retraining Through
    Selective Synaptic Dampening", AAAI 2024.
    """
    check_real(alpha, "alpha", 0)
    check_real(dampening, "dampening", 0)
    checked_budget(model, seed, 0, 1, weight_decay)
    removed, retained = both_sets(model, forget, retain, loss_fn)
    n_retain, m = len(retained), len(removed)
    if n_samples is not None and check_integer(n_samples, "n_samples", 1) < n_retain:
        retained = retained.subset(random_samples(n_retain, n_samples, seed)).loaded()
    damped = copy_of(model)
    with evaluating(damped):
        of_removed, of_retained = (
            _importance(damped, samples, loss_fn) for samples in (removed, retained)
        )
    weights = trainable(damped)
    for weight, ours, theirs in zip(weights, of_removed, of_retained, strict=True):
        every = (n_retain * theirs + m * ours) / (n_retain + m)
        factor = (dampening * every / ours).clamp(max=1.0)
        weight.copy_(torch.where(ours > alpha * every, weight * factor, weight))
    return finished(damped, model)


def _importance(model: nn.Module, samples: Samples, loss_fn: LossFunction) -> list[Tensor]:
    """Mean square of the gradient of single samples, by each trainable parameter."""
    weights = trainable(model)
    found = [torch.zeros_like(weight) for weight in weights]
    with torch.enable_grad():
        for batch in samples.batches(1):
            loss = batch_loss(model, batch, loss_fn)
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, part in zip(found, parts, strict=True):
                if part is not None:
                    total += part.square() / len(samples)
    return found


@plain_arithmetic()
def random_labels(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """Train on with wrong labels for the removed samples, and the right ones for the retained.

    Every epoch is a pass over the removed samples, each with a label drawn from the others than its
    own, and one over the retained samples: SGD with momentum 0.9, in training mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay, learning_rate, epochs, batch_size
        As `fine_tune` takes them; learning_rate is 0.01 by default.

    References
    ----------
    L. Graves, V. Nagisetty and V. Ganesh, "Amnesiac Machine Learning", AAAI 2021. A. Golatkar, A.
    Achille and S. Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020.
    """
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    tuned = trained_copy(model, training=True)
    steps = sgd(tuned, learning_rate, weight_decay)
    with seeded(seed), torch.enable_grad():
        parts = both_sets(model, forget, retain, loss_fn)
        descend(tuned, steps, _relabelled(tuned, *parts, epochs, batch_size, seed), loss_fn)
    return finished(tuned, model)


@plain_arithmetic()
def salun(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    share: float = 0.5,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """SalUn: `random_labels` on the parameters with the largest gradient of the removed samples.

    All other parameters keep their values, bit for bit.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay, learning_rate, epochs, batch_size
        As `random_labels` takes them.
    share : float, default 0.5
        Of all parameters, those that change.

    References
    ----------
    C. Fan, J. Liu, Y. Zhang, E. Wong, D. Wei and S. Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-Based Weight Saliency in Both Image Classification and Generation", ICLR 2024.
    """
    check_part(share, "share")
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    removed, retained = both_sets(model, forget, retain, loss_fn)
    tuned = copy_of(model)
    weights = trainable(tuned)
    with evaluating(tuned), torch.enable_grad():
        named = {str(k): weight for k, weight in enumerate(weights)}
        _, gradient = mean_gradient(tuned, removed, loss_fn, named, batch_size)
    salience = torch.cat([part.abs().flatten() for part in gradient.values()])
    most = max(1, round(share * len(salience)))
    level = salience.kthvalue(len(salience) - most + 1).values
    fixed = [
        (part.abs() < level, w.clone()) for part, w in zip(gradient.values(), weights, strict=True)
    ]
    tuned.train()
    steps = sgd(tuned, learning_rate, weight_decay)
    with seeded(seed), torch.enable_grad():
        for batch in _relabelled(tuned, removed, retained, epochs, batch_size, seed):
            take_step(steps, batch_loss(tuned, batch, loss_fn))
            with torch.no_grad():
                for weight, (keep, before) in zip(weights, fixed, strict=True):
                    weight.copy_(torch.where(keep, before, weight))
    return finished(tuned, model)


def _relabelled(
    model: nn.Module, removed: Samples, retained: Samples, epochs: int, size: int, seed: int
) -> Iterator[Batch]:
    """Of every epoch, the removed samples with wrong labels, then the retained ones."""
    for epoch in range(epochs):
        for batch in epochs_of(removed, 1, size, [seed, epoch, 0]):
            yield _with_wrong_labels(model, batch)
        yield from epochs_of(retained, 1, size, [seed, epoch, 1])


def _with_wrong_labels(model: nn.Module, batch: Batch) -> Batch:
    with evaluating(model), torch.no_grad():
        classes = _softened(outputs_of(model, batch)).shape[1]
    labels = batch.targets
    if not isinstance(labels, Tensor) or labels.numel() != batch.size:
        given = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels)
        raise ValueError(f"random labels need one class a sample as target; forget has {given}")
    shift = torch.randint(1, classes, labels.shape).to(labels.device)
    return replace(batch, targets=((labels.long() + shift) % classes).to(labels.dtype))


@plain_arithmetic()
def bad_teacher(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    retain_share: float = 0.3,
    learning_rate: float = 1e-4,
    epochs: int = 1,
    batch_size: int = 128,
) -> nn.Module:
    """Learn removed samples from a model with random weights, and the others from the trained one.

    The student decreases KL(teacher || student) over shuffled batches of removed samples and a
    share of the retained ones: Adam, in training mode. The teachers are in evaluation mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay
        As `fine_tune` takes them; the loss is not used.
    retain_share : float, default 0.3
        Of the retained samples, those that the student sees; drawn once.
    learning_rate : float, default 1e-4
    epochs : int, default 1
    batch_size : int, default 128

    References
    ----------
    V. S. Chundawat, A. K. Tarun, M. Mandal and M. Kankanhalli, "Can Bad Teaching Induce
    Forgetting? Unlearning in Deep Networks Using an Incompetent Teacher", AAAI 2023.
    """
    check_part(retain_share, "retain_share")
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    removed, retained = both_sets(model, forget, retain, None)
    few = max(1, round(retain_share * len(retained)))
    kept = retained.subset(random_samples(len(retained), few, seed))
    both = Samples.joined([kept, removed])
    competent, student = trained_copy(model, training=False), trained_copy(model, training=True)
    incompetent = trained_copy(model, training=False)
    steps = adam(student, learning_rate, weight_decay)
    rng = np.random.default_rng(seed)
    with seeded(seed), torch.enable_grad():
        start_again(incompetent)
        for _ in range(epochs):
            for numbers in np.array_split(rng.permutation(len(both)), -(-len(both) // batch_size)):
                batch = both.fetch(numbers.tolist())
                with torch.no_grad():
                    good, bad = (
                        _softened(outputs_of(each, batch)) for each in (competent, incompetent)
                    )
                is_removed = torch.from_numpy(numbers >= few).to(good.device)
                target = torch.where(is_removed[:, None], bad, good)
                take_step(steps, _kl(target, _softened(outputs_in_training(student, batch))))
    return finished(student, model)


def cf_k(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    layers: int = 1,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """CF-k: train the last k layers on with the retained samples, and freeze the others.

    A layer is a module with a weight matrix or kernel, together with the norms that follow it, in
    the order of ``model.modules()``. All other modules are in evaluation mode, so that batch norm
    keeps its statistics. SGD with momentum 0.9.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay, learning_rate, epochs, batch_size
        As `fine_tune` takes them; learning_rate is 0.01 by default.
    layers : int, default 1
        k; all layers where there are fewer.

    References
    ----------
    S. Goel, A. Prabhu, A. Sanyal, S.-N. Lim, P. Torr and P. Kumaraguru, "Towards Adversarial
    Evaluations for Inexact Machine Unlearning", 2022 (arXiv:2201.06640).
    """
    return _last_layers(
        model, retain, loss_fn, seed, weight_decay, layers, learning_rate, epochs, batch_size, False
    )


def eu_k(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    layers: int = 1,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """EU-k: as `cf_k`, from random weights of the last k layers.

    The parameters, and the reference, are those of `cf_k`.
    """
    return _last_layers(
        model, retain, loss_fn, seed, weight_decay, layers, learning_rate, epochs, batch_size, True
    )


@plain_arithmetic()
def _last_layers(
    model: nn.Module,
    retain: Any,
    loss_fn: LossFunction,
    seed: int,
    weight_decay: Any,
    layers: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    restart: bool,
) -> nn.Module:
    check_integer(layers, "layers", 1)
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    samples = retained_set(model, retain, loss_fn)
    tuned = trained_copy(model, training=False)
    trainable(tuned)  # at least one parameter is
    own = [
        (module, found)
        for module in tuned.modules()
        if (found := [p for p in module.parameters(recurse=False) if p.requires_grad])
    ]
    starts = [k for k, (_, found) in enumerate(own) if any(p.ndim > 1 for p in found)]
    first = starts[-layers] if layers <= len(starts) else 0
    last = {id(parameter): parameter for _, found in own[first:] for parameter in found}
    frozen = [p for _, found in own[:first] for p in found if id(p) not in last]
    with seeded(seed), torch.enable_grad():
        for module, _ in own[first:]:
            module.train()
            if restart:
                start_again(module)
        for parameter in frozen:
            parameter.requires_grad_(False)
        steps = sgd(tuned, learning_rate, weight_decay)
        descend(tuned, steps, epochs_of(samples, epochs, batch_size, seed), loss_fn)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return finished(tuned, model)


@plain_arithmetic()
def l1_sparse(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    gamma: float = 5e-4,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """Train on with the retained samples and a penalty gamma |w|_1 that falls linearly to 0.

    SGD with momentum 0.9, in training mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay, learning_rate, epochs, batch_size
        As `fine_tune` takes them; learning_rate is 0.01 by default.
    gamma : float, default 5e-4
        Of the first step.

    References
    ----------
    J. Jia, J. Liu, P. Ram, Y. Yao, G. Liu, Y. Liu, P. Sharma and S. Liu, "Model Sparsity Can
    Simplify Machine Unlearning", NeurIPS 2023.
    """
    check_real(gamma, "gamma", 0)
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    samples = retained_set(model, retain, loss_fn)
    tuned = trained_copy(model, training=True)
    weights = trainable(tuned)
    steps = sgd(tuned, learning_rate, weight_decay)
    total = epochs * max(1, len(samples) // batch_size)
    with seeded(seed), torch.enable_grad():
        for k, batch in enumerate(epochs_of(samples, epochs, batch_size, seed)):
            penalty = torch.stack([weight.abs().sum() for weight in weights]).sum()
            loss = batch_loss(tuned, batch, loss_fn)
            take_step(steps, loss + gamma * (1 - k / total) * penalty)
    return finished(tuned, model)


# ---------------------------------------------------------------------------------------------


def _softened(outputs: Any, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of logits that were divided by a temperature."""
    found = log_probabilities_of(outputs) if isinstance(outputs, Tensor) else None
    if found is None:
        given = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
        raise ValueError(
            "this method needs classes: the model must return logits of shape (n, C), (n, 1) or "
            f"(n,); got {given}"
        )
    return found if temperature == 1 else (found / temperature).log_softmax(1)


def _kl(log_target: Tensor, log_found: Tensor) -> Tensor:
    """KL(target || found), mean over samples."""
    return (log_target.exp() * (log_target - log_found)).sum(1).mean()
