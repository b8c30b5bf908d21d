"""Settings of methods of deletion, chosen by the same small search for each."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._files import json_ready
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.decay import Decay, check_decay
from lcodec_ext._torch.loss import LossFunction, check_loss_fn
from lcodec_ext._torch.modes import place, seeded
from lcodec_ext._torch.predict import Prediction, Score, predict
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.evaluation.methods import (
    BASELINES,
    LITERATURE,
    Baseline,
    Method,
    carry_out,
)
from lcodec_ext.evaluation.metrics import js_distances
from lcodec_ext.evaluation.training import check_numbers, count, take
from lcodec_ext.unlearning.request import random_samples

Grid = Mapping[str, Sequence[Any]]

_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_ADAM = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_BATCHES = (32, 128)

#: By name of a method, the values that `tune` tries for its options, in ascending order. They reach
#: far, so that the best one lies inside; `tune` tries some of the combinations.
GRIDS: Mapping[str, Grid] = MappingProxyType(
    {
        "gradient ascent": {"learning_rate": _RATES, "epochs": (5, 20, 50)},
        "NegGrad+": {
            "retain_weight": (0.9, 0.97, 0.99, 0.997, 0.999, 0.9997),
            "learning_rate": (0.01, 0.03, 0.1, 0.3),
        },
        "fine-tune SGD": {"learning_rate": _RATES, "batch_size": _BATCHES},
        "fine-tune Adam": {"learning_rate": _ADAM, "batch_size": _BATCHES},
        "L-BFGS": {"iterations": (2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 100, 150)},
        "SCRUB": {"learning_rate": _ADAM, "ascents": (1, 2, 3), "alpha": (0.0, 0.1, 1.0)},
        "SSD": {"alpha": (1.5, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0), "dampening": (0.1, 0.3, 1, 3)},
        "SalUn": {"learning_rate": _RATES, "batch_size": _BATCHES, "share": (0.2, 0.5, 0.8)},
        "random labels": {"learning_rate": _RATES, "batch_size": _BATCHES},
        "bad teacher": {"learning_rate": _ADAM, "retain_share": (0.3, 1.0)},
        "CF-k": {"layers": (1, 2, 3), "learning_rate": _RATES},
        "EU-k": {"layers": (1, 2, 3), "learning_rate": _RATES},
        "L1-sparse": {"gamma": (1e-5, 1e-4, 1e-3, 3e-3), "learning_rate": _RATES},
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
    parts : dict of str to float
        What the distance is the mean of, before it is divided: "js_forget", "loss_forget",
        "js_test", where forget are the control samples and test the validation samples.
    seconds : float or None
    error : str or None
    """

    name: str
    options: dict[str, Any]
    distance: float | None
    parts: dict[str, float]
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
            f"{self.settings['n_validation']} for validation, at most "
            f"{self.settings['n_settings']} settings each",
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
    n_settings: int = 12,
    epochs: int = 5,
    validation: Any = 0.2,
    n_retrain: int = 3,
    weight_decay: Decay = 0.0,
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
    settings from its grid, and the one nearest to retraining is chosen. Half of the settings are
    drawn from the grid, then neighbours of the best one so far follow, and more draws where all of
    these were tried. A grid with no more than n_settings is tried as a whole.

    The distance is a mean of three, each as a share of what it was before the deletion, or of the
    distance of one retrained model from another where that is larger: the Jensen-Shannon distance
    to the retrained models on control samples, the difference in mean loss on control samples, and
    the Jensen-Shannon distance on validation samples. So a method must forget, and must not harm.
    Without classes it is the mean of the differences in mean loss on both.

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
        For a name, the values of each option, in an order that has similar ones side by side; by
        default those of `GRIDS`. All combinations make up the grid.
    n_settings : int, default 12
        Most settings for a method.
    epochs : int, default 5
        Passes over the samples that a method may take: the option of that name, for baselines whose
        options and grid leave it open. 5 is 5% of a training of 100 epochs.
    validation : float, tuple of tensors, dict of tensors, or Dataset, default 0.2
        Share of the samples outside control that are held out; or samples outside data, and then
        none of data are held out.
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
    share = isinstance(validation, int | float)
    if share and not 0 < check_real(validation, "validation", 0) < 1:
        raise ValueError(f"validation must be between 0 and 1, a share; got {validation}")
    check_integer(n_retrain, "n_retrain", 3)
    check_seed(seed, optional=False)
    check_bool(progress, "progress")
    weight_decay = check_decay(weight_decay)
    check_loss_fn(loss_fn)
    if not callable(train):
        raise TypeError(f"train must be callable as train(samples, seed); got {train!r}")
    n_held = None if share else count(validation, "validation")
    removed, held, rest = _split(count(data), control, validation if share else 0.0, seed)
    unseen = take(data, held) if share else validation
    with seeded(seed):
        model = train(take(data, sorted([*removed, *rest])), seed)
    again = []
    for own in range(seed, seed + n_retrain):
        with seeded(own):
            again.append(train(take(data, rest), own + 1))
    searches = {
        name: _Search(name, grid, n_settings, np.random.default_rng([seed, k]))
        for k, (name, (_, grid)) in enumerate(chosen.items())
    }
    yardstick = _Yardstick(
        model, again, (take(data, removed), take(data, rest), unseen), loss_fn, batch_size,
        {"weight_decay": weight_decay, "seed": seed, "score": score},
    )  # fmt: skip
    most = len(searches) * n_settings
    with progress_bar(progress, total=most, desc="tune", unit="setting") as bar:
        for name, search in searches.items():
            while todo := search.next():
                for options in todo:
                    method = _with_options(chosen[name][0], options)
                    search.trials.append(yardstick.trial(name, options, method))
                    bar.update()
    return Tuned(
        methods={
            name: _with_options(method, searches[name].best.options)
            for name, (method, _) in chosen.items()
        },
        trials=tuple(trial for search in searches.values() for trial in search.trials),
        original=yardstick.distance(yardstick.original),
        floor=yardstick.distance(yardstick.floor),
        settings={
            "n_control": len(removed),
            "n_validation": len(held) if n_held is None else n_held,
            "n_settings": n_settings,
            "epochs": epochs,
            "n_retrain": n_retrain,
            "weight_decay": weight_decay,
            "seed": seed,
            "grids": {name: dict(grid) for name, (_, grid) in chosen.items()},
        },
    )


class _Search:
    """The settings of one method: half of them drawn, then neighbours of the best so far.

    Where all neighbours of the best one were tried, half of what is left is drawn again.
    """

    def __init__(self, name: str, grid: Grid, most: int, rng: np.random.Generator) -> None:
        self.name, self.trials = name, list[Trial]()
        self._options, self._values, self._most = list(grid), list(grid.values()), most
        every = list(itertools.product(*(range(len(values)) for values in self._values)))
        first = len(every) if len(every) <= most else max(1, most // 2)
        order = rng.permutation(len(every)).tolist()
        self._todo = [every[k] for k in sorted(order[:first])]
        self._others = [every[k] for k in order[first:]]
        self._tried: list[tuple[int, ...]] = []

    @property
    def best(self) -> Trial:
        return _nearest(self.trials, self.name)

    def next(self) -> list[dict[str, Any]]:
        """What to try now; nothing when the search has ended."""
        todo = self._todo if not self._tried else self._neighbours()
        self._tried += todo
        return [
            {
                option: values[k]
                for option, values, k in zip(self._options, self._values, place, strict=True)
            }
            for place in todo
        ]

    def _neighbours(self) -> list[tuple[int, ...]]:
        """Places one step away from the best one that were not tried, while any may be."""
        if all(trial.distance is None for trial in self.trials):
            return []
        at = self._tried[self.trials.index(self.best)]
        beside = [
            (*at[:axis], at[axis] + step, *at[axis + 1 :])
            for axis in range(len(at))
            for step in (1, -1)
            if 0 <= at[axis] + step < len(self._values[axis])
        ]
        left = self._most - len(self._tried)
        if new := [place for place in beside if place not in self._tried]:
            return new[:left]
        others = [place for place in self._others if place not in self._tried]
        return others[: -(-left // 2)]


class _Yardstick:
    """How far a method's model is from the retrained ones, on control and validation samples."""

    def __init__(
        self,
        model: nn.Module,
        retrained: Sequence[nn.Module],
        sets: tuple[Any, Any, Any],
        loss_fn: LossFunction,
        batch_size: int,
        defaults: Mapping[str, Any],
    ) -> None:
        for each in (model, *retrained):
            if not isinstance(each, nn.Module):
                raise TypeError(
                    "train must return a model (torch.nn.Module); got an object of type "
                    f"{type(each).__name__}"
                )
        control, self._retain, validation = sets
        self._model, self._control = model, control
        self._loss_fn, self._batch_size, self._defaults = loss_fn, batch_size, defaults
        self._measured = {
            part: as_samples(each, name, *place(model)).loaded()
            for part, name, each in (
                ("forget", "control", control),
                ("test", "validation", validation),
            )
        }
        self._theirs = [self._run(each) for each in retrained]
        runs = [run for each in self._theirs for run in each.values()]
        self._keys: tuple[str, ...] = ("loss_forget", "loss_test")
        if all(run.log_probabilities is not None for run in runs):
            self._keys = ("js_forget", "loss_forget", "js_test")
        self.original = self._apart(self._run(model))
        pairs = list(itertools.combinations(self._theirs, 2))
        self.floor = {
            key: float(np.mean([_between(key, *pair) for pair in pairs])) for key in self._keys
        }

    def _run(self, model: nn.Module) -> dict[str, Prediction]:
        return {
            part: predict(model, samples, self._loss_fn, self._batch_size, of_tokens=True)
            for part, samples in self._measured.items()
        }

    def _apart(self, ours: Mapping[str, Prediction]) -> dict[str, float]:
        """The mean distances to the retrained models."""
        return {
            key: float(np.mean([_between(key, ours, each) for each in self._theirs]))
            for key in self._keys
        }

    def distance(self, parts: Mapping[str, float]) -> float:
        """The one number that settings are compared by."""
        scales = {key: max(self.original[key], self.floor[key]) or 1.0 for key in self._keys}
        return float(np.mean([parts[key] / scales[key] for key in self._keys]))

    def trial(self, name: str, options: dict[str, Any], method: Method) -> Trial:
        """Delete the control samples, and measure; or the error."""
        try:
            done = carry_out(
                method, self._model, self._control, self._retain, self._loss_fn, self._defaults
            )
            parts = self._apart(self._run(done.model))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            warn(f"method {name!r} failed with {options}. {message}")
            return Trial(name, options, None, {}, None, message)
        return Trial(name, options, self.distance(parts), parts, done.seconds)


def _between(key: str, one: Mapping[str, Prediction], other: Mapping[str, Prediction]) -> float:
    """A distance of two models: the mean over samples of JS, or of the mean losses."""
    measure, _, part = key.partition("_")
    ours, theirs = one[part], other[part]
    if measure == "loss":
        return abs(ours.loss - theirs.loss)
    pair = ours.log_probabilities, theirs.log_probabilities
    return float(js_distances(*pair).mean())  # type: ignore[arg-type]


def _nearest(trials: Sequence[Trial], name: str) -> Trial:
    ours = [trial for trial in trials if trial.name == name]
    if not ours:
        raise KeyError(f"no setting of {name!r} was tried")
    found = [trial for trial in ours if trial.distance is not None]
    if not found:
        raise ValueError(f"all settings of {name!r} failed. {ours[-1].error}")
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
    few = max(4, round(validation * len(others))) if validation else 0
    if few >= len(others):
        raise ValueError(
            f"data has {n} samples and control takes {len(removed)}: too few are left to hold "
            f"{few} out and to train on the others"
        )
    order = np.random.default_rng([seed, 1]).permutation(others)
    return removed, np.sort(order[:few]).tolist(), np.sort(order[few:]).tolist()
