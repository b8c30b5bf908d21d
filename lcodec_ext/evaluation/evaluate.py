"""Methods of deletion beside models that were retrained without the removed samples."""

import copy
import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import clock, place, seeded
from lcodec_ext._torch.predict import Prediction, Score, predict
from lcodec_ext._torch.samples import Samples, as_samples
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.evaluation import metrics
from lcodec_ext.evaluation.methods import Baseline, fine_tune, gradient_ascent, lbfgs, neg_grad_plus
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.select import find_candidates
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.unlearn import unlearn

NO_OP, RETRAINED = "no-op", "retrained"

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

DISTANCES = ("js_forget", "js_test", "activation_forget", "activation_test", "weight_distance")
_SCALARS = (
    "accuracy_forget",
    "accuracy_retain",
    "accuracy_test",
    "loss_forget",
    "loss_retain",
    "loss_test",
    "mia_auc",
    "mia_accuracy",
    "relearn_steps",
)
_KEPT = 1000  # losses of either set that are kept for histograms
_TOLERANCE = 0.05  # of the gap in forget loss, at which the samples count as learnt again
_FORMAT = 1

Number = float | None
Method = (
    nn.Module
    | UnlearnResult
    | Baseline
    | Mapping[str, Any]
    | Callable[[nn.Module, Any, Any, LossFunction, int], nn.Module | UnlearnResult]
)


@dataclass(frozen=True)
class MethodEvaluation:
    """One method, or the retrained models, in an `Evaluation`.

    Attributes
    ----------
    name : str
    seconds : float or None
        Wall time of the method; of "retrained", the mean; None where it was not measured.
    metrics : dict of str to float or None
        None where a metric does not apply.
    gap_closed : dict of str to float or None
        See `evaluate`.
    spread : dict of str to float or None, or None
        Of "retrained": the standard deviation of each metric over the models.
    units_per_layer : dict of str to [int, int], or None
        Of methods by `unlearn`: units selected, and how many there are.
    phases : dict of str to float, or None
        Of methods by `unlearn`: where the seconds went.
    skipped : bool
        Whether `unlearn` took a step back, so that samples are still in the model.
    error : str or None
        Why there is nothing to measure.
    losses : dict of str to list of float
        Of at most 1000 removed ("forget") and "test" samples, the same ones for all methods; of
        "retrained", those of the first model.
    """

    name: str
    seconds: Number
    metrics: dict[str, Number]
    gap_closed: dict[str, Number]
    spread: dict[str, Number] | None
    units_per_layer: dict[str, list[int]] | None
    phases: dict[str, float] | None
    skipped: bool
    error: str | None
    losses: dict[str, list[float]]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` found; its repr is a table.

    Attributes
    ----------
    methods : tuple of MethodEvaluation
        "no-op", "retrained", and the methods in their order. ``evaluation["L-BFGS"]`` is one.
    floor : dict of str to float or None
        What one retrained model is away from another, on average.
    n_forget, n_retain, n_test, n_retrained : int
    settings : dict
        Weight decay, seeds, the options of the methods, versions.
    """

    methods: tuple[MethodEvaluation, ...]
    floor: dict[str, Number]
    n_forget: int
    n_retain: int
    n_test: int
    n_retrained: int
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> MethodEvaluation:
        for method in self.methods:
            if method.name == name:
                return method
        known = ", ".join(repr(method.name) for method in self.methods)
        raise KeyError(f"no method {name!r}; there are {known}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON."""
        methods = []
        for method in self.methods:
            entry = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
            if method.spread is None:
                del entry["spread"]
            methods.append(entry)
        rest = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "methods"
        }
        return {"format": _FORMAT, **rest, "methods": methods}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_dict` wrote.

        Raises
        ------
        ValueError
            If data have another format.
        """
        if data.get("format") != _FORMAT:
            raise ValueError(
                f"data must be an evaluation of format {_FORMAT}; got format {data.get('format')!r}"
            )
        methods = tuple(
            MethodEvaluation(**{"spread": None, "error": None, **entry})
            for entry in data["methods"]
        )
        rest = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "methods"}
        return cls(methods=methods, **rest)

    def __repr__(self) -> str:
        columns = (
            ("", "seconds", ".2f", lambda m: m.seconds),
            ("accuracy", "forget", ".1%", lambda m: m.metrics.get("accuracy_forget")),
            ("", "retain", ".1%", lambda m: m.metrics.get("accuracy_retain")),
            ("", "test", ".1%", lambda m: m.metrics.get("accuracy_test")),
            ("loss", "forget", ".3f", lambda m: m.metrics.get("loss_forget")),
            ("MIA", "AUC", ".3f", lambda m: m.metrics.get("mia_auc")),
            ("JS", "forget", ".3f", lambda m: m.metrics.get("js_forget")),
            ("", "test", ".3f", lambda m: m.metrics.get("js_test")),
            ("closed", "JS", ".0%", lambda m: m.gap_closed.get("js_forget")),
            ("", "loss", ".0%", lambda m: m.gap_closed.get("loss_forget")),
        )
        width = max(len(method.name) for method in self.methods) + 2
        lines = [
            f"Evaluation: {self.n_forget} samples removed, {self.n_retain} retained, "
            f"{self.n_test} for the test; {self.n_retrained} retrained models",
            " " * width + "".join(f"{column[0]:>9}" for column in columns),
            " " * width + "".join(f"{column[1]:>9}" for column in columns),
        ]
        for method in self.methods:
            cells = [(column[3](method), column[2]) for column in columns]
            row = "".join(f"{'-' if v is None else format(v, form):>9}" for v, form in cells)
            note = method.error or "taken back" * method.skipped
            note = note if len(note) <= 60 else note[:57] + "..."
            lines.append(f"{method.name:{width}}{row}  {note}".rstrip())
        return "\n".join(lines)


def evaluate(
    model: nn.Module,
    forget: Any,
    retain: Any,
    test: Any,
    loss_fn: LossFunction,
    *,
    retrained: Sequence[nn.Module] | Callable[[int], nn.Module],
    methods: Mapping[str, Method] | Sequence[str] | None = None,
    n_retrain: int = 3,
    weight_decay: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    score: Score | None = None,
    relearn: bool = True,
    progress: bool = False,
) -> Evaluation:
    """Measure what methods of deletion leave, beside models retrained without the samples.

    Every model is measured as `lcodec_ext.unlearning.metrics` defines it: accuracies and losses
    on removed, retained and test samples; the distances of predictions (removed and test samples)
    and of weights to each retrained model, averaged over those; membership inference; the
    gradient norm of the retained objective; the time to learn the removed samples again.

    Two retrained models differ, too. The *floor* of a metric is the mean distance of one
    retrained model to another; for accuracies, losses, attacks and relearning the distance is the
    absolute difference. With d the mean distance of a method to the retrained models,

    ::

        gap closed = 1 - (d - floor) / (d of the original - floor)

    is 0 for the original model and on average exactly 1 for a retrained one. It is not clipped:
    negative where a method leads away, above 1 where it is nearer to the retrained models than
    these are to each other, and None where the original is no farther from them than that.

    Parameters
    ----------
    model : Module
        The trained model. It is left as it was.
    forget, retain, test : tuple of tensors, dict of tensors, Dataset or DataLoader
        Removed, retained and never-seen samples.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch.
    retrained : sequence of Module, or callable
        At least 3 models trained from scratch without the removed samples; or ``retrained(seed)``,
        which trains one, and is timed.
    methods : mapping, sequence of str, or None
        By name: a model; an `UnlearnResult`; a dict of options of `unlearn`; a `Baseline`; or a
        callable ``(model, forget, retain, loss_fn, seed)`` that returns a model or an
        `UnlearnResult`, given a copy of the model and the samples as they were passed in. Options
        and baselines get this function's weight_decay and seed unless they have their own. Or
        names of `BASELINES`, by default all of them:

        - "recommended", "paper": `unlearn` with that preset;
        - "all units": the recommended preset with ``selection="full"``;
        - "random units", "gradient units": the recommended preset on half the parameters, of units
          drawn at random or of those of the largest gradient;
        - "gradient ascent": SGD up the loss of the removed samples, until the retained suffer;
        - "NegGrad+": SGD down the loss of the retained samples and up that of the removed ones;
        - "fine-tune SGD", "fine-tune Adam": 5 epochs on the retained samples;
        - "L-BFGS": 20 iterations of it on the retained objective.
    n_retrain : int, default 3
        With a callable: how many models, from the seeds ``seed``, ``seed + 1``, ...
    weight_decay : float, default 0.0
        lambda of the trained objective, mean loss plus (lambda / 2) |w|^2.
    seed : int, default 0
    batch_size : int, default 256
        Most samples in one pass of the measurements.
    score : callable, optional
        ``score(outputs, targets)``, one number a sample, in the place of accuracy.
    relearn : bool, default True
        Whether to measure the time to learn again: at most 200 steps of Adam over the removed
        samples for every model, until 5% of the gap in loss to the retrained models are left.
    progress : bool, default False
        Show a bar; needs tqdm.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        For fewer than 3 retrained models, for two with equal weights, and for samples or models
        that cannot be measured.
    TypeError
        For arguments of the wrong type.

    Warns
    -----
    UserWarning
        If a method fails, or leaves a model whose outputs are not finite. Its error is in the
        evaluation, and the others go on. If ``retrained(seed)`` gives the same for two seeds.

    Notes
    -----
    No method is given the test samples. Half of them calibrate the attack, which is tried on the
    others.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> x, y = torch.randn(90, 4, generator=torch.manual_seed(0)), torch.arange(90) % 3
    >>> def train(x, y, seed=0):
    ...     torch.manual_seed(seed)
    ...     model = torch.nn.Linear(4, 3)
    ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ...     for _ in range(50):
    ...         optimizer.zero_grad()
    ...         cross_entropy(model(x), y).backward()
    ...         optimizer.step()
    ...     return model
    >>> evaluation = evaluate(
    ...     train(x[:60], y[:60]),
    ...     (x[:10], y[:10]),
    ...     (x[10:60], y[10:60]),
    ...     (x[60:], y[60:]),
    ...     cross_entropy,
    ...     retrained=lambda seed: train(x[10:60], y[10:60], seed),
    ...     methods=["L-BFGS", "fine-tune SGD"],
    ... )
    >>> [method.name for method in evaluation.methods]
    ['no-op', 'retrained', 'L-BFGS', 'fine-tune SGD']
    """
    device, dtype = place(model)
    defaults = {"weight_decay": weight_decay, "seed": seed, "score": score}
    given = _methods(methods, defaults)
    if isinstance(retrained, nn.ModuleList):  # which is callable, as all modules are
        retrained = list(retrained)
    _check_retrained(retrained)
    check_integer(n_retrain, "n_retrain", 3)
    check_real(weight_decay, "weight_decay", 0)
    check_seed(seed, optional=False)
    check_integer(batch_size, "batch_size", 1)
    check_bool(relearn, "relearn")
    check_bool(progress, "progress")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable; got an object of type {type(loss_fn).__name__}")
    removed = as_samples(forget, "forget", device, dtype).loaded()
    judge = _Judge(
        removed,
        as_samples(retain, "retain", device, dtype),
        as_samples(test, "test", device, dtype),
        loss_fn,
        score,
        weight_decay=weight_decay,
        batch_size=batch_size,
        seed=seed,
    )
    n_retrained = n_retrain if callable(retrained) else len(retrained)
    settings: dict[str, Any] = {
        "weight_decay": float(weight_decay),
        "seed": int(seed),
        "batch_size": int(batch_size),
        "retrained_seeds": [seed + k for k in range(n_retrain)] if callable(retrained) else None,
        "methods": {},
        "versions": {"lcodec_ext": __version__, "torch": torch.__version__},
    }
    total = 1 + n_retrained + len(given)
    with progress_bar(progress, total=total, desc=NO_OP, unit="model") as bar:
        original = judge.measure(model)
        bar.update()
        references, times = [], []
        first: nn.Module | None = None
        for k in range(n_retrained):
            bar.set_description(RETRAINED)
            reference = retrained[k] if not callable(retrained) else None
            if callable(retrained):
                begin = clock(model)
                with seeded(seed + k):
                    reference = retrained(seed + k)
                times.append(clock(model) - begin)
            if not isinstance(reference, nn.Module):
                raise TypeError(
                    "retrained must give models (torch.nn.Module); got an object of type "
                    f"{type(reference).__name__}"
                )
            if k == 1 and callable(retrained) and _equal_weights(first, reference):
                warnings.warn(
                    f"retrained({seed}) and retrained({seed + 1}) have equal weights: where "
                    "training draws anything at random, it must use its seed. What retrained "
                    "models differ by is the floor of every comparison",
                    stacklevel=2,
                )
            first = reference if first is None else first
            references.append(judge.measure(reference))
            bar.update()
        level = _relearn_level(original, references) if relearn else None
        scale = _Scale(original, references, judge, level)
        if level is not None:
            settings["relearn"] = {
                "optimizer": "Adam",
                "learning_rate": 1e-3,
                "max_steps": 200,
                "tolerance": _TOLERANCE,
                "level": level,
            }
        entries = [
            scale.entry(NO_OP, original),
            scale.retrained_entry(float(np.mean(times)) if times else None),
        ]
        for name, method in given.items():
            bar.set_description(name)
            try:
                done = _carry_out(method, model, forget, retain, loss_fn, defaults)
                entry = scale.entry(name, judge.measure(done.model), done)
                settings["methods"][name] = done.settings
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                warnings.warn(f"method {name!r} failed. {message}", stacklevel=2)
                entry = scale.failure(name, message)
            entries.append(entry)
            bar.update()
    return Evaluation(
        methods=tuple(entries),
        floor=scale.floor,
        n_forget=len(removed),
        n_retain=len(judge.retain),
        n_test=len(judge.test),
        n_retrained=n_retrained,
        settings=settings,
    )


def _methods(methods: Any, defaults: Mapping[str, Any]) -> dict[str, Method]:
    """The methods by name, checked."""
    if methods is None:
        return dict(BASELINES)
    if isinstance(methods, str) or not isinstance(methods, Mapping | Sequence):
        raise TypeError(
            "methods must be a mapping of names to methods, or a list of names of BASELINES; got "
            f"an object of type {type(methods).__name__}"
        )
    if not isinstance(methods, Mapping):
        for name in methods:
            if name not in BASELINES:
                known = ", ".join(map(repr, BASELINES))
                raise ValueError(f"methods must be names of BASELINES ({known}); got {name!r}")
        return {name: BASELINES[name] for name in methods}
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
    """Refuse options of `unlearn` now, and not after the retraining."""
    for key in ("validation", "statistics", "score", "progress"):
        options.pop(key, None)
    if options.pop("inplace", False):
        raise ValueError(f"method {name!r} must not have inplace=True: others need the model")
    preset = options.pop("preset", "recommended")
    try:
        if isinstance(preset, Settings):
            dataclasses.replace(preset, **options)
        else:
            Settings.preset(preset, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"method {name!r}: {error}") from None


def _check_retrained(retrained: Any) -> None:
    models = isinstance(retrained, Sequence) and not isinstance(retrained, str)
    if models and len(retrained) < 3:
        raise ValueError(
            "retrained must have at least 3 models: what two of them differ by is the floor of "
            f"every comparison; got {len(retrained)}"
        )
    if not models and (isinstance(retrained, nn.Module) or not callable(retrained)):
        raise TypeError(
            "retrained must be a list of at least 3 models, or a callable that trains one from a "
            f"seed; got an object of type {type(retrained).__name__}"
        )
    if models:
        for (i, one), (j, other) in itertools.combinations(enumerate(retrained), 2):
            if _equal_weights(one, other):
                what = "are the same model" if one is other else "have equal weights"
                raise ValueError(
                    "retrained must have models that were trained apart, from different seeds: "
                    f"retrained[{i}] and retrained[{j}] {what}. What two of them differ by is the "
                    "floor of every comparison"
                )
        return
    try:
        inspect.signature(retrained).bind(0)
    except TypeError:
        raise TypeError(
            "retrained is called with a seed, retrained(seed), and trains a model from it; what "
            "was given does not take exactly one argument"
        ) from None
    except ValueError:  # one that does not tell its arguments
        pass


def _equal_weights(one: Any, other: Any) -> bool:
    if not (isinstance(one, nn.Module) and isinstance(other, nn.Module)):
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    return one is other or (
        ours.keys() == theirs.keys()
        and all(
            isinstance(value, torch.Tensor)
            and isinstance(theirs[name], torch.Tensor)
            and torch.equal(value, theirs[name].to(value.device))
            for name, value in ours.items()
        )
    )


class _Done(NamedTuple):
    """A method that was carried out."""

    model: nn.Module
    seconds: Number
    result: UnlearnResult | None
    settings: dict[str, Any]


def _carry_out(
    method: Method,
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    defaults: Mapping[str, Any],
) -> _Done:
    settings: dict[str, Any] = {}
    seconds: Number = None
    made: Any = method
    if not isinstance(method, nn.Module | UnlearnResult):
        seed = defaults["seed"]
        begin = clock(model)
        with seeded(seed):
            if isinstance(method, Baseline):
                options = {"weight_decay": defaults["weight_decay"], **method.options}
                run = getattr(method.run, "func", method.run)  # of a partial
                name = getattr(run, "__name__", type(run).__name__)
                settings = {"baseline": name, **options}
                made = method.run(model, forget, retain, loss_fn, seed, **options)
            elif isinstance(method, Mapping):
                made = unlearn(model, forget, retain, loss_fn, **{**defaults, **method})
            else:
                made = method(copy.deepcopy(model), forget, retain, loss_fn, seed)
        seconds = clock(model) - begin
    if isinstance(made, UnlearnResult):
        if seconds is None:
            seconds = made.seconds["total"]
        return _Done(made.model, seconds, made, made.settings.to_dict())
    if not isinstance(made, nn.Module):
        raise TypeError(
            f"a method must return a model or an UnlearnResult; got {type(made).__name__}"
        )
    return _Done(made, seconds, None, {k: _plain(v) for k, v in settings.items()})


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, UnitSelection):
        return value.to_dict()
    return value if isinstance(value, str | bool | int | float | None) else repr(value)


class _Measured(NamedTuple):
    """A model and what was measured on it alone."""

    model: nn.Module
    metrics: dict[str, Number]
    forget: Prediction
    test: Prediction


class _Judge:
    """Measures models, one by one, on the same samples."""

    def __init__(
        self,
        forget: Samples,
        retain: Samples,
        test: Samples,
        loss_fn: LossFunction,
        score: Score | None,
        *,
        weight_decay: float,
        batch_size: int,
        seed: int,
    ) -> None:
        self.forget, self.retain, self.test, self.loss_fn = forget, retain, test, loss_fn
        self._score, self._weight_decay, self.batch_size = score, weight_decay, batch_size
        self._split = metrics.calibration_split(len(retain), len(test), seed)
        self._kept = {
            name: random_samples(len(samples), min(_KEPT, len(samples)), seed)
            for name, samples in (("forget", forget), ("test", test))
        }

    def measure(self, model: nn.Module) -> _Measured:
        runs = {
            name: predict(model, samples, self.loss_fn, self.batch_size, self._score)
            for name, samples in (
                ("forget", self.forget),
                ("retain", self.retain),
                ("test", self.test),
            )
        }
        split = self._split
        attack = metrics.attack(
            metrics.features(runs["forget"]),
            metrics.features(runs["retain"], split.members),
            metrics.features(runs["test"], split.calibration),
            metrics.features(runs["test"], split.held_out),
        )
        found: dict[str, Number] = {f"accuracy_{name}": r.accuracy for name, r in runs.items()}
        found |= {f"loss_{name}": float(r.losses.mean()) for name, r in runs.items()}
        found |= {
            "mia_auc": attack.auc,
            "mia_accuracy": attack.accuracy,
            "mia_member_share": attack.member_share,
            "gradient_norm": metrics.gradient_norm(
                model,
                self.retain,
                self.loss_fn,
                weight_decay=self._weight_decay,
                batch_size=self.batch_size,
            ),
        }
        return _Measured(model, found, runs["forget"], runs["test"])

    def relearn(self, model: nn.Module, level: float) -> dict[str, Number]:
        found = metrics.relearn_time(
            model, self.forget, self.loss_fn, level, batch_size=self.batch_size
        )
        return {
            "relearn_steps": float(found.steps),
            "relearn_seconds": found.seconds,
            "relearn_reached": float(found.reached),
        }

    def losses(self, measured: _Measured) -> dict[str, list[float]]:
        runs = {"forget": measured.forget, "test": measured.test}
        return {name: run.losses[self._kept[name]].tolist() for name, run in runs.items()}


class _Scale:
    """From the original model, 0, to the retrained ones, 1."""

    def __init__(
        self,
        original: _Measured,
        references: list[_Measured],
        judge: _Judge,
        level: float | None,
    ) -> None:
        self._references, self._judge, self._level = references, judge, level
        self._reference_metrics = [self._all_metrics(each, k) for k, each in enumerate(references)]
        self.floor = {
            name: _mean(
                None if a is None or b is None else abs(a - b)
                for a, b in itertools.combinations(
                    [each.get(name) for each in self._reference_metrics], 2
                )
            )
            for name in _SCALARS
        }
        self.floor |= {
            name: _mean(each[name] for each in self._reference_metrics) for name in DISTANCES
        }
        self._original_distances = self._distances_in_all(self._all_metrics(original))

    def _all_metrics(self, measured: _Measured, own: int | None = None) -> dict[str, Number]:
        """Metrics of a model; distances are to the retrained models, without itself."""
        found = dict(measured.metrics)
        others = [each for k, each in enumerate(self._references) if k != own]
        between = [_distances(measured, other) for other in others]
        found |= {name: _mean(each[name] for each in between) for name in DISTANCES}
        relative = [_weight_distance(measured, other, relative=True) for other in others]
        found["weight_distance_relative"] = _mean(relative)
        if self._level is not None:
            found |= self._judge.relearn(measured.model, self._level)
        return found

    def _distances_in_all(self, found: dict[str, Number]) -> dict[str, Number]:
        """Distance to the retrained models, in every metric that has a floor."""
        distances = {name: found[name] for name in DISTANCES}
        for name in _SCALARS:
            value = found.get(name)
            theirs = [each.get(name) for each in self._reference_metrics]
            distances[name] = _mean(
                None if value is None or each is None else abs(value - each) for each in theirs
            )
        return distances

    def _gap_closed(self, found: dict[str, Number]) -> dict[str, Number]:
        distances = self._distances_in_all(found)
        return {
            name: gap_closed(distances[name], self._original_distances[name], floor)
            for name, floor in self.floor.items()
        }

    def entry(self, name: str, measured: _Measured, done: _Done | None = None) -> MethodEvaluation:
        found = self._all_metrics(measured)
        result = None if done is None else done.result
        phases = units = None
        if result is not None:
            phases = {k: v for k, v in result.seconds.items() if k != "total"}
            units = _units_per_layer(measured.model, result)
        return MethodEvaluation(
            name=name,
            seconds=0.0 if done is None else done.seconds,
            metrics=found,
            gap_closed=self._gap_closed(found),
            spread=None,
            units_per_layer=units,
            phases=phases,
            skipped=result is not None and bool(result.skipped),
            error=None,
            losses=self._judge.losses(measured),
        )

    def retrained_entry(self, seconds: Number) -> MethodEvaluation:
        each = self._reference_metrics
        names = each[0].keys()
        return MethodEvaluation(
            name=RETRAINED,
            seconds=seconds,
            metrics={name: _mean(found[name] for found in each) for name in names},
            gap_closed={
                name: gap_closed(floor, self._original_distances[name], floor)
                for name, floor in self.floor.items()
            },
            spread={name: _spread([found[name] for found in each]) for name in names},
            units_per_layer=None,
            phases=None,
            skipped=False,
            error=None,
            losses=self._judge.losses(self._references[0]),
        )

    def failure(self, name: str, message: str) -> MethodEvaluation:
        return MethodEvaluation(
            name=name,
            seconds=None,
            metrics=dict.fromkeys(self._reference_metrics[0]),
            gap_closed=dict.fromkeys(self.floor),
            spread=None,
            units_per_layer=None,
            phases=None,
            skipped=False,
            error=message,
            losses={"forget": [], "test": []},
        )


def gap_closed(distance: Number, original: Number, floor: Number) -> Number:
    """Share of a gap that was closed, beyond what retrained models differ by.

    Parameters
    ----------
    distance, original : float or None
        Mean distance of a model, and of the original one, to the retrained models.
    floor : float or None
        Mean distance of a retrained model to another.

    Returns
    -------
    float or None
        ``1 - (distance - floor) / (original - floor)``; None where the original is within the
        floor, and where one of the distances is None.
    """
    if distance is None or original is None or floor is None or original <= floor:
        return None
    return 1 - (distance - floor) / (original - floor)


def _distances(measured: _Measured, other: _Measured) -> dict[str, Number]:
    found: dict[str, Number] = dict.fromkeys(DISTANCES)
    for name, ours, theirs in (
        ("forget", measured.forget.log_probabilities, other.forget.log_probabilities),
        ("test", measured.test.log_probabilities, other.test.log_probabilities),
    ):
        if ours is not None and theirs is not None:
            found[f"js_{name}"] = float(metrics.js_distances(ours, theirs).mean())
            found[f"activation_{name}"] = float(metrics.activation_distances(ours, theirs).mean())
    found["weight_distance"] = _weight_distance(measured, other)
    return found


def _weight_distance(measured: _Measured, other: _Measured, *, relative: bool = False) -> Number:
    ours, theirs = (
        {name: parameter.shape for name, parameter in each.model.named_parameters()}
        for each in (measured, other)
    )
    if ours != theirs:
        return None
    return metrics.weight_distance(measured.model, other.model, relative=relative)


def _relearn_level(original: _Measured, references: list[_Measured]) -> float:
    """The loss at which removed samples count as learnt again."""
    before = float(original.forget.losses.mean())
    after = float(np.mean([each.forget.losses.mean() for each in references]))
    # The losses are compared across dtypes: the original model, too, must be seen to be there.
    return before + _TOLERANCE * max(after - before, 0.0) + 1e-6 * abs(before)


def _units_per_layer(model: nn.Module, result: UnlearnResult) -> dict[str, list[int]]:
    """Of every layer with candidates: how many units were selected, and how many it has."""
    candidates = find_candidates(model, result.settings).selection.units
    chosen, every = result.selection.units, UnitSelection.all(model).units
    return {layer: [len(chosen.get(layer, ())), len(every[layer])] for layer in candidates}


def _mean(values: Iterable[Number]) -> Number:
    known = list(values)
    numbers = [value for value in known if value is not None]
    return float(np.mean(numbers)) if numbers and len(numbers) == len(known) else None


def _spread(values: list[Number]) -> Number:
    numbers = [value for value in values if value is not None]
    return float(np.std(numbers, ddof=1)) if len(numbers) == len(values) else None
