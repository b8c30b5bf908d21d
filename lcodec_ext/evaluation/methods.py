"""Simple ways to delete samples, which a method has to beat, and how `evaluate` runs a method.

Baselines take ``(model, forget, retain, loss_fn, seed)`` and return a new model. Their budgets are
fixed beforehand, and none looks at the accuracy on the removed samples. The objective that they
fine-tune is the mean loss plus (weight_decay / 2) |w|^2 over all trainable parameters.

A new baseline is a function and an entry in `BASELINES`. `LITERATURE` has the methods of
literature.py.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lcodec_ext._checks import check_choice, check_integer, check_real
from lcodec_ext._files import json_ready
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.decay import groups_of, penalty, with_decay
from lcodec_ext._torch.loss import (
    LossFunction,
    is_much_worse,
    mean_loss,
    named_trainable,
    objective,
    trainable,
)
from lcodec_ext._torch.modes import clock, evaluating, plain_arithmetic, seeded
from lcodec_ext._torch.token_loss import given_loss
from lcodec_ext._torch.tokens import by_tokens, of_sets
from lcodec_ext.evaluation.literature import (
    bad_teacher,
    cf_k,
    eu_k,
    l1_sparse,
    random_labels,
    salun,
    scrub,
    selective_dampening,
)
from lcodec_ext.evaluation.training import (
    adam,
    batch_loss,
    both_sets,
    checked_budget,
    descend,
    epochs_of,
    finished,
    retained_set,
    sgd,
    take_step,
    trained_copy,
)
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.unlearn import unlearn

NO_OP, RETRAINED = "no-op", "retrained"
NOT_SETTINGS = ("validation", "groups", "statistics", "score", "progress")  # of `unlearn`
_GUARD = 1000  # retained samples that tell gradient ascent when to stop


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A baseline with its budget, for the methods of `evaluate`, which fills in the weight decay.

    Attributes
    ----------
    run : callable
        ``run(model, forget, retain, loss_fn, seed, weight_decay=..., **options)`` returns a new
        model: one of the functions here.
    options : mapping of str
        ``Baseline(lbfgs, {"n_samples": 2500})``.
    """

    run: Callable[..., nn.Module]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@plain_arithmetic()
def fine_tune(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    optimizer: Literal["sgd", "adam"] = "sgd",
    weight_decay: Any = 0.0,
    learning_rate: float | None = None,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """Train on with the retained samples, and let the removed ones fade.

    Parameters
    ----------
    model : Module
        It is copied, and trained in training mode.
    forget : object
        Not looked at.
    retain : tuple of tensors, dict of tensors, Dataset or DataLoader
    loss_fn : callable
    seed : int, default 0
        Of the order of the samples, and of dropout.
    optimizer : {"sgd", "adam"}, default "sgd"
        SGD has momentum 0.9.
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        An optimizer of the model's parameters has it by groups, a mapping by parameter name (0 for
        the others).
    learning_rate : float, optional
        By default 0.01 (SGD) or 0.001 (Adam), usual ones for the end of a training.
    epochs : int, default 5
        A few percent of a usual training.
    batch_size : int, default 128
        A last, smaller batch of an epoch is left out.
    """
    check_choice(optimizer, "optimizer", ("sgd", "adam"))
    if learning_rate is None:
        learning_rate = 0.01 if optimizer == "sgd" else 0.001
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    samples = retained_set(model, retain, loss_fn)
    tuned = trained_copy(model, training=True)
    steps = (sgd if optimizer == "sgd" else adam)(tuned, learning_rate, weight_decay)
    with seeded(seed), torch.enable_grad():
        descend(tuned, steps, epochs_of(samples, epochs, batch_size, seed), loss_fn)
    return finished(tuned, model)


@plain_arithmetic()
def gradient_ascent(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    learning_rate: float = 0.01,
    epochs: int = 20,
    batch_size: int = 128,
) -> nn.Module:
    """Climb the loss of the removed samples, for as long as the retained ones allow.

    Steps of plain SGD, in evaluation mode, so that batch norm keeps its statistics. It ends after
    all epochs, or, with the last step taken back, once the mean loss of at most 1000 retained
    samples is above 1.5 times what it was plus 0.05.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed
        As `fine_tune` takes them.
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        It still shrinks the weights.
    learning_rate : float, default 0.01
    epochs : int, default 20
        Over the removed samples.
    batch_size : int, default 128
    """
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    removed, retained = both_sets(model, forget, retain, loss_fn)
    guard = retained.subset(random_samples(len(retained), min(_GUARD, len(retained)), seed))
    guard = guard.loaded()
    climber = copy_of(model)
    weights = trainable(climber)
    groups = groups_of(weight_decay, named_trainable(climber))
    steps = torch.optim.SGD(groups, lr=learning_rate, maximize=True)
    with evaluating(climber):
        start = mean_loss(climber, guard, loss_fn, batch_size)
        for batch in epochs_of(removed, epochs, batch_size, seed):
            before = [weight.clone() for weight in weights]
            with torch.enable_grad():
                take_step(steps, batch_loss(climber, batch, loss_fn))
            if is_much_worse(start, mean_loss(climber, guard, loss_fn, batch_size)):
                for weight, each in zip(weights, before, strict=True):
                    weight.copy_(each)
                break
    return finished(climber, model)


@plain_arithmetic()
def neg_grad_plus(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    retain_weight: float = 0.95,
    learning_rate: float = 0.01,
    epochs: int = 5,
    batch_size: int = 128,
) -> nn.Module:
    """Train on with the retained samples, while climbing the loss of the removed ones.

    Every step of SGD (momentum 0.9) descends ``retain_weight * L(retained batch) - (1 -
    retain_weight) * L(removed batch)``, in training mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, seed, weight_decay
        As `fine_tune` takes them.
    retain_weight : float, default 0.95
        beta of the reference, between 0 and 1.
    learning_rate : float, default 0.01
    epochs : int, default 5
        Over the retained samples; the removed ones come round as often as it takes.
    batch_size : int, default 128

    References
    ----------
    M. Kurmanji, P. Triantafillou, J. Hayes and E. Triantafillou, "Towards Unbounded Machine
    Unlearning", NeurIPS 2023: NegGrad+.
    """
    if not 0 <= check_real(retain_weight, "retain_weight", 0) <= 1:
        raise ValueError(f"retain_weight must be between 0 and 1; got {retain_weight}")
    weight_decay = checked_budget(model, seed, epochs, batch_size, weight_decay, learning_rate)
    removed, retained = both_sets(model, forget, retain, loss_fn)
    tuned = trained_copy(model, training=True)
    steps = sgd(tuned, learning_rate, weight_decay)
    per_epoch = max(1, len(retained) // batch_size)
    rounds = -(-epochs * per_epoch // max(1, len(removed) // batch_size))
    climbing = epochs_of(removed, rounds, batch_size, seed)
    with seeded(seed), torch.enable_grad():
        for batch in epochs_of(retained, epochs, batch_size, seed):
            down, up = (batch_loss(tuned, each, loss_fn) for each in (batch, next(climbing)))
            take_step(steps, retain_weight * down - (1 - retain_weight) * up)
    return finished(tuned, model)


@plain_arithmetic()
def lbfgs(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    seed: int = 0,
    *,
    weight_decay: Any = 0.0,
    iterations: int = 20,
    n_samples: int | None = None,
    batch_size: int = 256,
) -> nn.Module:
    """Minimise the retained objective by some iterations of L-BFGS.

    `torch.optim.LBFGS` with history 10, a strong Wolfe line search and at most 1.25 times as many
    evaluations as iterations, in evaluation mode.

    Parameters
    ----------
    model, forget, retain, loss_fn, weight_decay
        As `fine_tune` takes them.
    seed : int, default 0
        Of the choice of n_samples.
    iterations : int, default 20
    n_samples : int, optional
        Minimise the loss of this many retained samples; by default of all.
    batch_size : int, default 256
        Bounds the memory and changes nothing else.
    """
    check_integer(iterations, "iterations", 0)
    weight_decay = checked_budget(model, seed, 0, batch_size, weight_decay)
    samples = retained_set(model, retain, loss_fn)
    if n_samples is not None and check_integer(n_samples, "n_samples", 1) < len(samples):
        samples = samples.subset(random_samples(len(samples), n_samples, seed)).loaded()
    loss_fn = of_sets(by_tokens(loss_fn, model, samples), samples)
    tuned = copy_of(model)
    weights = trainable(tuned)
    steps = torch.optim.LBFGS(
        weights,
        max_iter=iterations,
        history_size=10,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, gradient = objective(tuned, samples, loss_fn, weight_decay, batch_size)
        for weight, each in zip(weights, gradient, strict=True):
            weight.grad = each.to(weight.dtype)
        return loss + penalty(weight_decay, named_trainable(tuned))

    with evaluating(tuned), torch.enable_grad():
        if iterations:
            steps.step(closure)  # type: ignore[no-untyped-call]
    return finished(tuned, model)


# ---------------------------------------------------------------------------------------------
# What `evaluate` compares

Method = (
    nn.Module
    | UnlearnResult
    | Baseline
    | Mapping[str, Any]
    | Callable[[nn.Module, Any, Any, LossFunction, int], nn.Module | UnlearnResult]
)

#: What `evaluate` compares unless it is told otherwise. Mappings are options of `unlearn`.
BASELINES: Mapping[str, Baseline | Mapping[str, Any]] = MappingProxyType(
    {
        "recommended": {"preset": "recommended"},
        "paper": {"preset": "paper"},
        "all units": {"selection": "full"},
        "random units": {"selection": "random", "max_parameters": 0.5},
        "gradient units": {"selection": "gradient", "max_parameters": 0.5},
        "gradient ascent": Baseline(gradient_ascent),
        "NegGrad+": Baseline(neg_grad_plus),
        "fine-tune SGD": Baseline(fine_tune, {"optimizer": "sgd"}),
        "fine-tune Adam": Baseline(fine_tune, {"optimizer": "adam"}),
        "L-BFGS": Baseline(lbfgs, {"iterations": 20}),
    }
)

#: Methods from the literature, which `evaluate` runs where they are asked for by name.
LITERATURE: Mapping[str, Baseline] = MappingProxyType(
    {
        "SCRUB": Baseline(scrub),
        "SSD": Baseline(selective_dampening),
        "SalUn": Baseline(salun),
        "random labels": Baseline(random_labels),
        "bad teacher": Baseline(bad_teacher),
        "CF-k": Baseline(cf_k),
        "EU-k": Baseline(eu_k),
        "L1-sparse": Baseline(l1_sparse),
    }
)


def methods_of(methods: Any, defaults: Mapping[str, Any]) -> dict[str, Method]:
    """The methods by name, checked before anything is trained."""
    if methods is None:
        return dict(BASELINES)
    if isinstance(methods, str) or not isinstance(methods, Mapping | Sequence):
        raise TypeError(
            "methods must be a mapping of names to methods, or a list of names of BASELINES or "
            "LITERATURE; got "
            f"an object of type {type(methods).__name__}"
        )
    if not isinstance(methods, Mapping):
        every = {**BASELINES, **LITERATURE}
        for name in methods:
            if name not in every:
                known = ", ".join(map(repr, every))
                raise ValueError(
                    f"methods must be names of BASELINES or LITERATURE ({known}); got {name!r}"
                )
        return {name: every[name] for name in methods}
    for name, method in methods.items():
        if not isinstance(name, str) or name in ("", NO_OP, RETRAINED):
            raise ValueError(
                f"the names of methods must be strings other than {NO_OP!r} and {RETRAINED!r}, "
                f"which are always there; got {name!r}"
            )
        if not isinstance(method, UnlearnResult | Baseline | Mapping) and not callable(method):
            raise TypeError(
                f"method {name!r} must be a model, an UnlearnResult, a Baseline, a dict of options "
                f"of unlearn or a callable; got an object of type {type(method).__name__}"
            )
        if isinstance(method, Mapping):
            _check_options(name, {**defaults, **method})
    return dict(methods)


def _check_options(name: str, options: dict[str, Any]) -> None:
    for key in NOT_SETTINGS:
        options.pop(key, None)
    if options.pop("inplace", False):
        raise ValueError(f"method {name!r} must not have inplace=True: others need the model")
    preset = options.pop("preset", "recommended")
    if isinstance(options.get("weight_decay"), torch.optim.Optimizer):
        options.pop("weight_decay")  # the model is needed to read it
    try:
        if isinstance(preset, Settings):
            dataclasses.replace(preset, **options)
        else:
            Settings.preset(preset, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"method {name!r}: {error}") from None


def _given(defaults: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a deletion; groups that all methods share only where they have an effect."""
    options = {**defaults, **method}
    own = {k: v for k, v in options.items() if k not in (*NOT_SETTINGS, "preset", "inplace")}
    validation, statistics = (options.get(k) is not None for k in ("validation", "statistics"))
    settings, _ = resolve(
        options.get("preset", "recommended"),
        own,
        retained=True,
        validation=validation,
        statistics=statistics,
    )
    if not settings.calibrate and "groups" not in method:
        options["groups"] = None
    return options


def find_method(methods: Sequence[Any], name: str) -> Any:
    """The entry of that name; a KeyError tells which there are."""
    for method in methods:
        if method.name == name:
            return method
    known = ", ".join(repr(method.name) for method in methods)
    raise KeyError(f"no method {name!r}; there are {known}")


class Done(NamedTuple):
    """A method that was carried out."""

    model: nn.Module
    seconds: float | None
    result: UnlearnResult | None
    settings: dict[str, Any]


def carry_out(
    method: Method,
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    defaults: Mapping[str, Any],
) -> Done:
    """Delete by a method; models and results are taken as they are."""
    settings: dict[str, Any] = {}
    seconds: float | None = None
    made: Any = method
    if not isinstance(method, nn.Module | UnlearnResult):
        seed = defaults["seed"]
        begin = clock(model)
        with seeded(seed):
            if isinstance(method, Baseline):
                options = {"weight_decay": defaults["weight_decay"], **method.options}
                options = with_decay(options, model)
                run = getattr(method.run, "func", method.run)  # of a partial
                settings = {"baseline": getattr(run, "__name__", type(run).__name__), **options}
                made = method.run(model, forget, retain, loss_fn, seed, **options)
            elif isinstance(method, Mapping):
                own = with_decay(method, model)
                made = unlearn(model, forget, retain, loss_fn, **_given(defaults, own))
            else:
                made = method(copy_of(model), forget, retain, given_loss(loss_fn), seed)
        seconds = clock(model) - begin
    if isinstance(made, UnlearnResult):
        if seconds is None:
            seconds = made.seconds["total"]
        return Done(made.model, seconds, made, made.settings.to_dict())
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"a method must return a model or an UnlearnResult; got {type(made).__name__}"
        )
    return Done(made, seconds, None, json_ready(settings, nonfinite=float, other=repr))
