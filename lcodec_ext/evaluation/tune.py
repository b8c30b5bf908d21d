"""Settings of methods of deletion, chosen by the same small search for each."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._files import json_ready
from lcodec_ext._torch.loss import LossFunction, check_loss_fn
from lcodec_ext._torch.modes import seeded
from lcodec_ext._torch.predict import Score
from lcodec_ext.evaluation.evaluate import Evaluation, evaluate
from lcodec_ext.evaluation.methods import (
    BASELINES,
    LITERATURE,
    NO_OP,
    RETRAINED,
    Baseline,
    Method,
)
from lcodec_ext.evaluation.training import check_numbers, count, take
from lcodec_ext.unlearning.request import random_samples

Grid = Mapping[str, Sequence[Any]]

_RATES = (0.01, 0.03, 0.1, 0.3)

#: By name of a method, the values that `tune` tries for its options: 8 settings each.
GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        "gradient ascent": {"learning_rate": (0.003, 0.01, 0.03, 0.1), "epochs": (5, 20)},
        "NegGrad+": {"retain_weight": (0.99, 0.95, 0.9, 0.8), "learning_rate": (0.03, 0.1)},
        "fine-tune SGD": {"learning_rate": _RATES, "batch_size": (32, 128)},
        "fine-tune Adam": {"learning_rate": (1e-3, 3e-3, 1e-2, 3e-2), "batch_size": (32, 128)},
        "L-BFGS": {"iterations": (5, 10, 15, 20, 25, 30, 40, 50)},
        "SCRUB": {"learning_rate": (1e-3, 5e-3), "ascents": (1, 3), "alpha": (0.1, 1.0)},
        "SSD": {"alpha": (5.0, 10.0, 20.0, 50.0), "dampening": (1.0, 5.0)},
        "SalUn": {"learning_rate": _RATES, "batch_size": (32, 128)},
        "random labels": {"learning_rate": _RATES, "batch_size": (32, 128)},
        "bad teacher": {"learning_rate": (1e-4, 3e-4, 1e-3, 3e-3), "retain_share": (0.3, 1.0)},
        "CF-k": {"layers": (1, 2), "learning_rate": _RATES},
        "EU-k": {"layers": (1, 2), "learning_rate": _RATES},
        "L1-sparse": {"gamma": (1e-5, 1e-4), "learning_rate": _RATES},
    }
)


@dataclass(frozen=True)
class Trial:
    """One setting of one method in a search.

    Attributes
    ----------
    name : str
        Of the method.
    options : dict
        The setting.
    distance : float or None
        From the retrained models, on control and validation samples; see `tune`. None if it failed.
    seconds : float or None
    error : str or None
    """

    name: str
    options: dict[str, Any]
    distance: float | None
    seconds: float | None
    error: str | None = None


@dataclass(frozen=True, repr=False)
class Tuned:
    """What `tune` chose; its repr is a table.

    Attributes
    ----------
    methods : dict of str to method
        Each with its best setting, for the methods of `evaluate`.
    trials : tuple of Trial
        All that was tried.
    original, floor : float or None
        Distance of the model before the deletion, and of one retrained model from another.
    settings : dict
        What the search was given: sizes, seed, budget.
    """

    methods: dict[str, Method]
    trials: tuple[Trial, ...]
    original: float | None
    floor: float | None
    settings: dict[str, Any]

    def best(self, name: str) -> Trial:
        """The chosen trial of a method: the nearest to retraining, of equal ones the first."""
        return _nearest(self.trials, name)

    def to_dict(self) -> dict[str, Any]:
        """Settings, trials and choices, for JSON."""
        return {
            "settings": json_ready(self.settings),
            "original": self.original,
            "floor": self.floor,
            "chosen": {name: json_ready(self.best(name).options) for name in self.methods},
            "trials": [json_ready(vars(trial)) for trial in self.trials],
        }

    def __repr__(self) -> str:
        lines = [
            f"Tuned on {self.settings['n_control']} control samples and "
            f"{self.settings['n_validation']} for validation, {self.settings['n_settings']} "
            "settings each",
            f"distance from retraining: {self.original:.3f} before the deletion, {self.floor:.3f} "
            "from one retrained model to another",
        ]
        width = max(map(len, self.methods), default=0) + 2
        for name in self.methods:
            trial = self.best(name)
            options = ", ".join(f"{key}={value}" for key, value in trial.options.items())
            lines.append(f"{name:{width}}{trial.distance:8.3f}  {options}")
        return "\n".join(lines)


def tune(
    train: Callable[[Any, int], nn.Module],
    data: Any,
    control: int | Sequence[int],
    loss_fn: LossFunction,
    *,
    methods: Mapping[str, Method] | Sequence[str] | None = None,
    grids: Mapping[str, Grid] | None = None,
    n_settings: int = 8,
    epochs: int = 5,
    validation: float = 0.2,
    n_retrain: int = 3,
    weight_decay: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    score: Score | None = None,
    progress: bool = False,
) -> Tuned:
    """Choose settings of methods on retained samples alone, with the same budget for each.

    The samples of a request, and the test samples, are not among what this function is given, so a
    choice cannot be fitted to them. Some retained samples are the *control* forget set, some are
    held out for *validation*. One model is trained on all but the latter, and a few on all but
    both; these are the yardstick. Every method deletes the control samples with at most n_settings
    settings from its grid, and the one nearest to retraining is chosen.

    The distance is the sum of the mean Jensen-Shannon distances to the retrained models on control
    and on validation samples: a method must forget, and must not harm. Without classes it is the
    sum of the differences in mean loss.

    Parameters
    ----------
    train : callable
        ``train(samples, seed)`` trains a model from scratch; samples are of the kind of data.
    data : tuple of tensors, dict of tensors, or Dataset
        Retained samples.
    control : int or sequence of int
        Numbers of the samples in data that are deleted in the search; of an int, so many are drawn.
        They should be like those of a request: as many, and mislabelled if those are.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch.
    methods : mapping, sequence of str, or None
        Names of `BASELINES` and `LITERATURE` that have a grid, by default all; or by name a
        `Baseline`, or a dict of options of `unlearn`.
    grids : mapping of str to mapping, optional
        For a name, the values of each option; by default those of `GRIDS`. All combinations make
        up the grid.
    n_settings : int, default 8
        Most settings for a method; of larger grids so many are drawn.
    epochs : int, default 5
        Passes over the samples that a method may take: the option of that name, for baselines whose
        options and grid leave it open. 5 is 5% of a training of 100 epochs.
    validation : float, default 0.2
        Share of the samples outside control that are held out.
    n_retrain : int, default 3
    weight_decay, seed, batch_size, score, progress
        As `evaluate` takes them.

    Returns
    -------
    Tuned
        Its `methods` go to ``evaluate(methods=...)``.

    Raises
    ------
    ValueError
        If all settings of a method fail, and for arguments out of range.
    TypeError
        For arguments of the wrong type.

    Notes
    -----
    It costs 1 + n_retrain trainings, and the deletions. Training options are those of `train`, and
    none of the methods' settings depends on the time it takes; `Trial.seconds` has it.
    """
    check_integer(epochs, "epochs", 0)
    chosen = _methods(methods, grids, epochs)
    check_integer(n_settings, "n_settings", 1)
    if not 0 < check_real(validation, "validation", 0) < 1:
        raise ValueError(f"validation must be between 0 and 1, a share; got {validation}")
    check_integer(n_retrain, "n_retrain", 3)
    check_seed(seed, optional=False)
    check_bool(progress, "progress")
    check_loss_fn(loss_fn)
    if not callable(train):
        raise TypeError(f"train must be callable as train(samples, seed); got {train!r}")
    removed, held, rest = _split(count(data), control, validation, seed)
    tried = {
        name: _settings(grid, n_settings, np.random.default_rng([seed, k]))
        for k, (name, (_, grid)) in enumerate(chosen.items())
    }
    with seeded(seed):
        model = train(take(data, sorted([*removed, *rest])), seed)
    evaluation = evaluate(
        model,
        take(data, removed),
        take(data, rest),
        take(data, held),
        loss_fn,
        retrained=lambda own: train(take(data, rest), own + 1),
        methods={
            f"{name} {k}": _with_options(chosen[name][0], options)
            for name, settings in tried.items()
            for k, options in enumerate(settings)
        },
        n_retrain=n_retrain,
        weight_decay=weight_decay,
        seed=seed,
        batch_size=batch_size,
        score=score,
        relearn=False,
        progress=progress,
    )
    trials = tuple(_trials(evaluation, tried))
    best = {name: _nearest(trials, name).options for name in chosen}
    return Tuned(
        methods={name: _with_options(chosen[name][0], best[name]) for name in chosen},
        trials=trials,
        original=_distance(evaluation, NO_OP),
        floor=_distance(evaluation, RETRAINED),
        settings={
            "n_control": len(removed),
            "n_validation": len(held),
            "n_settings": n_settings,
            "epochs": epochs,
            "n_retrain": n_retrain,
            "weight_decay": weight_decay,
            "seed": seed,
            "grids": {name: dict(grid) for name, (_, grid) in chosen.items()},
        },
    )


def _trials(
    evaluation: Evaluation, tried: Mapping[str, Sequence[dict[str, Any]]]
) -> Iterator[Trial]:
    for name, settings in tried.items():
        errors = []
        for k, options in enumerate(settings):
            entry = evaluation[f"{name} {k}"]
            distance = _distance(evaluation, entry.name)
            errors += [entry.error] if distance is None else []
            yield Trial(name, options, distance, entry.seconds, entry.error)
        if len(errors) == len(settings):
            raise ValueError(f"all settings of {name!r} failed. {errors[-1]}")


def _nearest(trials: Sequence[Trial], name: str) -> Trial:
    found = [t for t in trials if t.name == name and t.distance is not None]
    if not found:
        raise KeyError(f"no setting of {name!r} was measured")
    return min(found, key=lambda trial: trial.distance or 0.0)


def _methods(
    methods: Any, grids: Mapping[str, Grid] | None, epochs: int
) -> dict[str, tuple[Any, Grid]]:
    """Each method with its grid."""
    known = {**BASELINES, **LITERATURE}
    if methods is None:
        methods = list(GRIDS)
    if isinstance(methods, str) or not isinstance(methods, Mapping | Sequence):
        raise TypeError(
            "methods must be a mapping of names to methods, or a list of names; got an object of "
            f"type {type(methods).__name__}"
        )
    if not isinstance(methods, Mapping):
        for name in methods:
            if name not in known:
                names = ", ".join(map(repr, known))
                raise ValueError(f"methods must be names among {names}; got {name!r}")
        methods = {name: known[name] for name in methods}
    found = {}
    for name, method in methods.items():
        if not isinstance(method, Baseline | Mapping):
            raise TypeError(
                f"method {name!r} must be a Baseline or a dict of options of unlearn, so that it "
                f"has options to choose; got an object of type {type(method).__name__}"
            )
        grid = {**GRIDS, **(grids or {})}.get(name)
        if grid is None:
            raise ValueError(f"grids must have the values to try for {name!r}; it has none")
        if not grid or not all(
            isinstance(values, Sequence) and not isinstance(values, str) and len(values)
            for values in grid.values()
        ):
            raise ValueError(
                f"grids[{name!r}] must map options to sequences of values, at least one; got "
                f"{dict(grid)!r}"
            )
        if isinstance(method, Baseline) and "epochs" in inspect.signature(method.run).parameters:
            method = Baseline(method.run, {"epochs": epochs, **method.options})
        found[name] = (method, grid)
    return found


def _settings(grid: Grid, most: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(every) <= most:
        return every
    return [every[k] for k in np.sort(rng.choice(len(every), most, replace=False))]


def _with_options(method: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(method, Baseline):
        return Baseline(method.run, {**method.options, **options})
    return {**method, **options}


def _split(
    n: int, control: Any, validation: float, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the control samples, of those held out, and of the rest."""
    if isinstance(control, int | np.integer) and not isinstance(control, bool):
        removed = random_samples(n, check_integer(control, "control", 1, n - 1), seed)
    else:
        removed = check_numbers(control, "control", n)
    others = np.setdiff1d(np.arange(n), removed)
    few = max(4, round(validation * len(others)))
    if few >= len(others):
        raise ValueError(
            f"data has {n} samples and control takes {len(removed)}: too few are left to hold "
            f"{few} out and to train on the others"
        )
    order = np.random.default_rng([seed, 1]).permutation(others)
    return removed, np.sort(order[:few]).tolist(), np.sort(order[few:]).tolist()


def _distance(evaluation: Evaluation, name: str) -> float | None:
    """From the retrained models, on control and validation samples; None where it failed."""
    entry, yardstick = evaluation[name], evaluation[RETRAINED]
    total = 0.0
    for part in ("forget", "test"):
        found = entry.metrics.get(f"js_{part}")
        if found is None and yardstick.metrics.get(f"js_{part}") is None:
            ours, theirs = (each.metrics.get(f"loss_{part}") for each in (entry, yardstick))
            if ours is not None and theirs is not None:
                found = abs(ours - theirs)
                if entry is yardstick:
                    found = evaluation.floor[f"loss_{part}"]
        if found is None:
            return None
        total += found
    return total
