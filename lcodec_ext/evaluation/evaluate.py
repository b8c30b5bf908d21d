"""Methods of deletion compared with models that were retrained without the removed samples."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lcodec_ext._build import __version__
from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_integer, check_seed, counted
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.decay import decay_of
from lcodec_ext._torch.group import AnyRanks, ranks_of
from lcodec_ext._torch.loss import LossFunction, check_copy, check_loss_fn
from lcodec_ext._torch.modes import clock, place, seeded
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.samples import as_samples
from lcodec_ext._torch.tokens import by_tokens
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.evaluation.methods import (
    NO_OP,
    RETRAINED,
    Done,
    Method,
    carry_out,
    find_method,
    methods_of,
)
from lcodec_ext.evaluation.metrics import (
    DISTANCES,
    WITHOUT_GAP,
    Measured,
    Number,
    Sets,
    measure,
    relearn_time,
    scikit_learn,
)
from lcodec_ext.evaluation.shared import model_hash, received, to_send, told_of_all
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.select import find_candidates

FORMAT = 1
_KEPT = 1000  # losses of either set that are kept for histograms
_RELEARN: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": 200}
FOR_A_GAP = 3  # retrained models: what two differ by says little of what others would
_CLEAR = 1.25  # floors by which the original is away, at least, where there is a gap
_TOLERANCE = 0.05  # of the gap in forget loss, at which the samples count as learnt again


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
    sha256 : str or None
        Of the model's weights and buffers, as a ledger has it of its checkpoints; None of
        "retrained".
    """

    name: str
    seconds: Number
    metrics: dict[str, Number]
    gap_closed: dict[str, Number]
    spread: dict[str, Number] | None = None
    units_per_layer: dict[str, list[int]] | None = None
    phases: dict[str, float] | None = None
    skipped: bool = False
    error: str | None = None
    losses: dict[str, list[float]] = field(default_factory=lambda: {"forget": [], "test": []})
    sha256: str | None = None


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `evaluate` found; its repr is a table.

    Attributes
    ----------
    methods : tuple of MethodEvaluation
        "no-op", "retrained" if there are such models, and the methods in their order.
        ``evaluation["L-BFGS"]`` is one.
    floor : dict of str to float or None
        What one retrained model is away from another, on average; None without two of them.
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
        return find_method(self.methods, name)

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
        return {"format": FORMAT, **rest, "methods": methods}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Evaluation":
        """The evaluation that `to_dict` wrote.

        Raises
        ------
        ValueError
            If data have another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"data must be an evaluation of format {FORMAT}; got format {data.get('format')!r}"
            )
        methods = tuple(MethodEvaluation(**entry) for entry in data["methods"])
        rest = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "methods"}
        return cls(methods=methods, **rest)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each method, the columns of methods.csv.

        Metrics have their names. Gaps have the prefix gap_closed_, spreads spread_, phases
        seconds_. "units" of "units_of" were changed. NaN where a method has no such number.

        Raises
        ------
        ImportError
            Without pandas, which the extra ``lcodec_ext[evaluation]`` installs.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Evaluation.to_frame needs pandas: pip install 'lcodec_ext[evaluation]'"
            ) from error
        return pandas.DataFrame(method_rows(self.to_dict())).set_index("method")

    def __repr__(self) -> str:
        columns = [
            ("", "seconds", "seconds", ".2f"),
            ("accuracy", "forget", "accuracy_forget", ".1%"),
            ("", "retain", "accuracy_retain", ".1%"),
            ("", "test", "accuracy_test", ".1%"),
            ("token", "forget", "token_accuracy_forget", ".1%"),
            ("accuracy", "retain", "token_accuracy_retain", ".1%"),
            ("", "test", "token_accuracy_test", ".1%"),
            ("loss", "forget", "loss_forget", ".3f"),
            ("MIA", "AUC", "mia_auc", ".3f"),
            ("TPR at", "1% FPR", "mia_tpr", ".1%"),
            ("", "ToW", "tow", ".3f"),
            ("JS", "forget", "js_forget", ".3f"),
            ("", "test", "js_test", ".3f"),
            ("closed", "JS", "gap_closed_js_forget", ".0%"),
            ("", "loss", "gap_closed_loss_forget", ".0%"),
        ]
        width = max(len(method.name) for method in self.methods) + 2
        rows = method_rows(self.to_dict())
        columns = [c for c in columns if any(row.get(c[2]) is not None for row in rows)]
        lines = [
            f"Evaluation: {counted(self.n_forget, 'sample')} removed, {self.n_retain} retained, "
            f"{self.n_test} for the test; {counted(self.n_retrained, 'retrained model')}",
            *(" " * width + "".join(f"{c[line]:>9}" for c in columns) for line in (0, 1)),
        ]
        for row in rows:
            cells = [(row.get(key), form) for _, _, key, form in columns]
            numbers = "".join(f"{'-' if v is None else format(v, form):>9}" for v, form in cells)
            note = row["error"] or "taken back" * row["skipped"]
            note = note if len(note) <= 60 else note[:57] + "..."
            lines.append(f"{row['method']:{width}}{numbers}  {note}".rstrip())
        return "\n".join([*lines, *self._without_gap(width)])

    def _without_gap(self, width: int) -> list[str]:
        """Why no gap is shown; where the original is within the floor, each method's distance."""
        if self.n_retrained < FOR_A_GAP:
            return [few_retrained(self.n_retrained)]
        floor, before = self.floor.get("js_forget"), self.methods[0]
        start = before.metrics.get("js_forget")
        if floor is None or start is None or before.gap_closed.get("js_forget") is not None:
            return []
        lines = [
            f"No gap in JS to close: the original is {start:.3f} from the retrained models, which "
            f"are {floor:.3f} from each other (the floor)."
        ]
        for method in self.methods:
            if (found := method.metrics.get("js_forget")) is not None:
                lines.append(f"{method.name:{width}}JS {found:.3f}, floor {found - floor:+.3f}")
        return lines


def few_retrained(n: int) -> str:
    """What cannot be said with fewer models than a gap needs."""
    missing = {
        0: "Without retrained models nothing says how near to retraining a method is",
        1: "JS is the distance to the one retrained model; how far another one is from it, nothing "
        "says, and so there is no share of a gap",
        2: "The floor is the distance of the two retrained models; a share of a gap would hang on "
        "that one distance, and is not given",
    }
    return f"{missing[n]}: give at least {FOR_A_GAP} of them."


def method_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A flat row for each method of what `Evaluation.to_dict` returns."""
    rows = []
    for method in evaluation["methods"]:
        units = (method.get("units_per_layer") or {}).values()
        row = {
            "method": method["name"],
            "skipped": bool(method.get("skipped")),
            "error": method.get("error"),
            "seconds": method.get("seconds"),
            "share_of_retraining": share_of_retraining(method, evaluation),
            "units": sum(chosen for chosen, _ in units) if units else None,
            "units_of": sum(of for _, of in units) if units else None,
        }
        for prefix, part in (
            ("", "metrics"),
            ("gap_closed_", "gap_closed"),
            ("spread_", "spread"),
            ("seconds_", "phases"),
        ):
            row |= {f"{prefix}{key}": value for key, value in (method.get(part) or {}).items()}
        rows.append(row)
    return rows


def share_of_retraining(method: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Number:
    """The method's time as a share of the time of retraining, where both were taken."""
    whole = {each["name"]: each.get("seconds") for each in evaluation["methods"]}.get(RETRAINED)
    seconds = method.get("seconds")
    return seconds / whole if seconds is not None and whole else None


def evaluate(
    model: nn.Module,
    forget: Any,
    retain: Any,
    test: Any,
    loss_fn: LossFunction,
    *,
    retrained: Sequence[nn.Module] | Callable[[int], nn.Module] | None = None,
    methods: Mapping[str, Method] | Sequence[str] | None = None,
    n_retrain: int = 3,
    weight_decay: Any = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    score: Score | None = None,
    validation: Any = None,
    groups: Any = None,
    relearn: bool = True,
    progress: bool = False,
    group: Any = None,
) -> Evaluation:
    """Measure what methods of deletion leave, compared with models retrained without the samples.

    Every model is measured by the functions of `lcodec_ext.evaluation.metrics`: accuracies and
    losses on removed, retained and test samples; the distances of predictions (removed and test
    samples) and of weights to the retrained models, their mean; membership inference; the gradient
    norm of the retained objective; the time to learn the removed samples again.

    With d the mean distance of a method to the retrained models in a metric, and *floor* that of
    one retrained model to another,

    ::

        gap closed = 1 - (d - floor) / (d of the original - floor)

    is 0 for the original model and on average exactly 1 for a retrained one. It is not clipped. It
    is None where there is no gap: where the original is within 1.25 times the floor, or no farther
    from the retrained models than two of these are from each other. See docs/evaluation.md.

    Parameters
    ----------
    model : Module
        The trained model. It is left as it was.
    forget, retain, test : tuple of tensors, dict of tensors, Dataset or DataLoader
        Removed, retained and never-seen samples.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch, over samples or over tokens
        (`per_token_loss`, or found out).
    retrained : sequence of Module, callable, or None
        Models trained from scratch without the removed samples; or ``retrained(seed)``, which
        trains one, and is timed. Gap closed needs at least 3, a floor 2, and a distance 1. None, or
        no model, leaves the measures that compare with nothing.
    methods : mapping, sequence of str, or None
        By name: a model; an `UnlearnResult`; a dict of options of `unlearn`; a `Baseline`; or a
        callable ``(model, forget, retain, loss_fn, seed)`` that returns a model or an
        `UnlearnResult`, given a copy of the model and the samples as they were passed in. Options
        and baselines get this function's weight_decay and seed unless they have their own. Or
        names of `BASELINES` and `LITERATURE`, by default all of the former.
    n_retrain : int, default 3
        With a callable: how many models, from the seeds ``seed``, ``seed + 1``, ...
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        lambda of the trained objective, mean loss plus (lambda / 2) |w|^2: one number, the
        optimizer that trained the model, or numbers by parameter name (0 for the others).
    seed : int, default 0
    batch_size : int, default 256
        Most samples in one pass of the measurements.
    score : callable, optional
        ``score(outputs, targets)``, one number per sample, in the place of accuracy.
    validation : tuple of tensors, dict of tensors, Dataset or DataLoader, optional
        Never-seen samples for `unlearn`, other ones than test.
    groups : array_like, Series or Tensor of int or str, shape (n_retained,), optional
        For `unlearn`, where whole users are removed: whom each retained sample belongs to.
    relearn : bool, default True
        Whether to measure the time to learn again: at most 200 steps of Adam over the removed
        samples for every model, until 5% of the gap in loss to the retrained models are left.
    progress : bool, default False
        Show a bar; needs tqdm.
    group : torch.distributed.ProcessGroup, optional
        All its ranks call this function with equal arguments. Retrained models and methods are
        shared out over them, and every rank has the whole evaluation. Times are those of the rank
        that took them, and so are warnings about a method. No method, nor `retrained`, may use the
        group. See ``docs/distributed.md``.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        For two retrained models with equal weights, and for samples or models that cannot be
        measured. With a group also for arguments that differ between ranks.
    TypeError
        For arguments of the wrong type.
    RuntimeError
        With a group, where another rank failed. A method that fails does not end the call.
    ImportError
        Without scikit-learn, before anything is trained.

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
    ranks = ranks_of(group, "evaluate")
    with ranks.alone("the check of the arguments"):
        model = unwrapped(model)
        device, dtype = place(model)
        weight_decay = decay_of(weight_decay, model)
        defaults = {"weight_decay": weight_decay, "seed": seed, "score": score}
        defaults |= {"validation": validation, "groups": groups}
        given = methods_of(methods, defaults)
        retrained = _checked_retrained(retrained)
        check_integer(n_retrain, "n_retrain", 1)
        check_seed(seed, optional=False)
        check_integer(batch_size, "batch_size", 1)
        check_bool(relearn, "relearn")
        check_bool(progress, "progress")
        check_loss_fn(loss_fn)
        scikit_learn()
        removed, retained, unseen = (
            as_samples(each, name, device, dtype)
            for each, name in ((forget, "forget"), (retain, "retain"), (test, "test"))
        )
        check_copy(model, retained, loss_fn)
        removed = removed.loaded()
        loss_fn = by_tokens(loss_fn, model, removed, retained)
        sets = Sets(removed, retained, unseen, loss_fn, score, weight_decay, batch_size, seed)
        n_retrained = n_retrain if callable(retrained) else len(retrained)
        compared: dict[str, Any] = {}
        if group is not None:
            compared = told_of_all(model, sets, retrained, given, validation, groups)
        total = len(ranks.share(1 + n_retrained)) + len(ranks.share(len(given)))
        shown = progress_bar(progress and ranks.rank == 0, total=total, desc=NO_OP, unit="model")
    ranks.agree({**compared, "n_retrain": n_retrained, "relearn": relearn})
    settings: dict[str, Any] = {
        "weight_decay": weight_decay,
        "seed": int(seed),
        "batch_size": int(batch_size),
        "retrained_seeds": [seed + k for k in range(n_retrain)] if callable(retrained) else None,
        "methods": {},
        "versions": {"lcodec_ext": __version__, "torch": torch.__version__},
    }
    with shown as bar:
        measured, seconds = _measure_first(ranks, model, retrained, n_retrained, sets, bar)
        yardstick = _Yardstick(measured[0], measured[1:], sets, relearn, ranks)
        if relearn:
            until = {"tolerance": _TOLERANCE, "level": yardstick.level}
            settings["relearn"] = {"optimizer": "Adam", **_RELEARN, **until}
        given_to = model, forget, retain, loss_fn, defaults
        found = _judge(ranks, given, given_to, sets, yardstick, bar)
        # of one rank, as processors may round differently
        first = ranks.share_out(1, "the yardstick", lambda _: yardstick.of_itself(seconds))[0]
    settings["methods"] = {entry.name: own for entry, own in found if own is not None}
    return Evaluation(
        methods=(*first.entries, *(entry for entry, _ in found)),
        floor=first.floor,
        n_forget=len(sets.forget),
        n_retain=len(sets.retain),
        n_test=len(sets.test),
        n_retrained=n_retrained,
        settings=settings,
    )


def _checked_retrained(retrained: Any) -> Any:
    if isinstance(retrained, nn.ModuleList):  # which is callable, as all modules are
        retrained = list(retrained)
    retrained = () if retrained is None else retrained
    models = isinstance(retrained, Sequence) and not isinstance(retrained, str)
    if not models and (isinstance(retrained, nn.Module) or not callable(retrained)):
        raise TypeError(
            "retrained must be a list of models, or a callable that trains one from a seed; got "
            f"an object of type {type(retrained).__name__}"
        )
    if models:
        retrained = [unwrapped(each) for each in retrained]
        for (i, one), (j, other) in itertools.combinations(enumerate(retrained), 2):
            if _equal_weights(one, other):
                what = "are the same model" if one is other else "have equal weights"
                raise ValueError(
                    "retrained must have models that were trained apart, from different seeds: "
                    f"retrained[{i}] and retrained[{j}] {what}. What two of them differ by is the "
                    "floor of every comparison"
                )
        return retrained
    try:
        inspect.signature(retrained).bind(0)
    except TypeError:
        raise TypeError(
            "retrained is called with a seed, retrained(seed), and trains a model from it; what "
            "was given does not take exactly one argument"
        ) from None
    except ValueError:  # one that does not tell its arguments
        pass
    return retrained


def _equal_weights(one: Any, other: Any) -> bool:
    if not (isinstance(one, nn.Module) and isinstance(other, nn.Module)):
        return False
    ours, theirs = one.state_dict(), other.state_dict()
    return one is other or (
        ours.keys() == theirs.keys()
        and all(isinstance(each, torch.Tensor) for each in (*ours.values(), *theirs.values()))
        and all(torch.equal(each, theirs[name].to(each.device)) for name, each in ours.items())
    )


def _measure_first(
    ranks: AnyRanks,
    model: nn.Module,
    retrained: Sequence[nn.Module] | Callable[[int], nn.Module],
    n: int,
    sets: Sets,
    bar: Any,
) -> tuple[list[Measured], Number]:
    """Measure the original and those retrained, given or trained; the mean time of a training.

    Ranks share them out. Of what others measured there are the weights in the model's place.
    """
    own: dict[int, Measured] = {}

    def of(some: range) -> list[tuple[Measured, Number, str | None]]:
        found = []
        for k in some:
            seconds, each = None, model
            if k > 0:
                bar.set_description(RETRAINED)
                each, seconds = _retrained_model(retrained, k - 1, sets.seed, model)
            own[k] = measure(each, sets)
            state = model_hash(each) if callable(retrained) and k in (1, 2) else None
            found.append((to_send(own[k]) if ranks.size > 1 else own[k], seconds, state))
            bar.update()
        return found

    pieces = ranks.share_out(1 + n, "the measurement of the retrained models", of)
    found = [each for piece in pieces for each in piece]
    states = [state for _, _, state in found[1:3] if state is not None]
    if len(states) == 2 and states[0] == states[1]:
        with ranks.alone("a warning"):
            warn(
                f"retrained({sets.seed}) and retrained({sets.seed + 1}) have equal weights: where "
                "training draws anything at random, it must use its seed. What retrained "
                "models differ by is the floor of every comparison",
            )
    seconds = _mean([seconds for _, seconds, _ in found[1:]])
    return [own.get(k) or received(each, model) for k, (each, _, _) in enumerate(found)], seconds


def _retrained_model(
    retrained: Sequence[nn.Module] | Callable[[int], nn.Module], k: int, seed: int, model: nn.Module
) -> tuple[nn.Module, Number]:
    """Retrained model number k, and the time of its training where it is trained here."""
    begin = clock(model)
    with seeded(seed + k):
        found = retrained(seed + k) if callable(retrained) else retrained[k]
    seconds = clock(model) - begin if callable(retrained) else None
    if not isinstance(found, nn.Module):
        raise TypeError(
            "retrained must give models (torch.nn.Module); got an object of type "
            f"{type(found).__name__}"
        )
    return unwrapped(found), seconds


_Judged = list[tuple[MethodEvaluation, dict[str, Any] | None]]


def _judge(
    ranks: AnyRanks,
    methods: Mapping[str, Method],
    given_to: tuple[Any, ...],
    sets: Sets,
    yardstick: "_Yardstick",
    bar: Any,
) -> _Judged:
    """Carry out all methods and measure them; with the settings of those that do not fail."""

    def of(some: range) -> _Judged:
        found: _Judged = []
        for name in itertools.islice(methods, some.start, some.stop):
            bar.set_description(name)
            try:
                done = carry_out(methods[name], *given_to)
                entry = yardstick.entry(name, measure(done.model, sets), done)
                found.append((entry, done.settings))
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                warn(f"method {name!r} failed. {message}")
                found.append((yardstick.failure(name, message), None))
            bar.update()
        return found

    pieces = ranks.share_out(len(methods), "the comparison of the methods", of)
    return [each for piece in pieces for each in piece]


class _OfItself(NamedTuple):
    """What a yardstick says of the original and the retrained models."""

    entries: list[MethodEvaluation]
    floor: dict[str, Number]


class _Yardstick:
    """From the original model, 0, to the retrained ones, 1.

    Ranks share out the time to learn again; the models of which they did not measure others have.
    """

    def __init__(
        self,
        original: Measured,
        references: list[Measured],
        sets: Sets,
        relearn: bool,
        ranks: AnyRanks,
    ) -> None:
        self._sets, self._references = sets, references
        self.level = _relearn_level(original, references) if relearn else None
        self._kept = {
            name: random_samples(len(samples), min(_KEPT, len(samples)), sets.seed)
            for name, samples in (("forget", sets.forget), ("test", sets.test))
        }
        everyone = [original, *references]

        def learn(some: range) -> list[dict[str, Number]]:
            return [self._relearnt(everyone[k].model) for k in some]

        pieces = ranks.share_out(len(everyone), "the time to learn again", learn)
        learnt, *others = [each for piece in pieces for each in piece]
        with ranks.alone("the comparison of the retrained models"):
            self._set_floor(original, references, learnt, others)

    def _set_floor(
        self,
        original: Measured,
        references: list[Measured],
        learnt: dict[str, Number],
        others: list[dict[str, Number]],
    ) -> None:
        """What retrained models differ by, and the gap from the original to them."""
        self._theirs = [
            self._distances(each, k) | other
            for k, (each, other) in enumerate(zip(references, others, strict=True))
        ]
        pairs = list(itertools.combinations(self._theirs, 2))
        self._original, self._measured = self._distances(original) | learnt, original
        self.floor: dict[str, Number] = {
            name: _mean(
                [each[name] for each in self._theirs]
                if name in DISTANCES
                else [_apart(one.get(name), other.get(name)) for one, other in pairs]
            )
            for name in (*original.metrics, "relearn_steps", *DISTANCES)
            if name not in WITHOUT_GAP
        }
        self._start = self._to_references(self._original)
        between = list(itertools.combinations(range(len(references)), 2))
        farthest = {
            name: max(
                [
                    DISTANCES[name](references[i], references[j])
                    if name in DISTANCES
                    else _apart(self._theirs[i].get(name), self._theirs[j].get(name))
                    for i, j in between
                ],
                key=lambda distance: -1.0 if distance is None else distance,
                default=None,
            )
            for name in self.floor
        }
        self._gap = {
            name: len(references) >= FOR_A_GAP
            and _is_gap(self._start[name], self.floor[name], farthest[name])
            for name in self.floor
        }

    def _distances(self, measured: Measured, own: int | None = None) -> dict[str, Number]:
        """Metrics of a model, and distances to the retrained models, without itself."""
        others = [each for k, each in enumerate(self._references) if k != own]
        found = dict(measured.metrics)
        for name, distance in DISTANCES.items():
            found[name] = _mean([distance(measured, other) for other in others])
        return found

    def _relearnt(self, model: nn.Module) -> dict[str, Number]:
        """The time to learn again, where it is asked for."""
        if self.level is None:
            return {}
        sets = self._sets
        learnt = relearn_time(
            model,
            sets.forget,
            sets.loss_fn,
            self.level,
            batch_size=sets.batch_size,
            **_RELEARN,
        )
        return {f"relearn_{k}": float(v) for k, v in dataclasses.asdict(learnt).items()}

    def _to_references(self, found: dict[str, Number]) -> dict[str, Number]:
        """Distance to the retrained models, in every metric that has a floor."""
        return {
            name: found[name]
            if name in DISTANCES
            else _mean([_apart(found.get(name), each.get(name)) for each in self._theirs])
            for name in self.floor
        }

    def _closed(self, distances: dict[str, Number]) -> dict[str, Number]:
        return {
            name: gap_closed(distances[name], self._start[name], floor) if self._gap[name] else None
            for name, floor in self.floor.items()
        }

    def _losses(self, measured: Measured) -> dict[str, list[float]]:
        runs = {"forget": measured.forget, "test": measured.test}
        return {name: run.losses[self._kept[name]].tolist() for name, run in runs.items()}

    def of_itself(self, seconds: Number) -> _OfItself:
        """Of the original and the retrained models, whose training took so many seconds."""
        entries = [self._entry(NO_OP, self._original, self._measured)]
        if self._references:
            entries.append(self._retrained_entry(seconds))
        return _OfItself(entries, self.floor)

    def entry(self, name: str, measured: Measured, done: Done) -> MethodEvaluation:
        """Of a method that was carried out."""
        found = self._distances(measured) | self._relearnt(measured.model)
        return self._entry(name, found, measured, done)

    def _entry(
        self, name: str, found: dict[str, Number], measured: Measured, done: Done | None = None
    ) -> MethodEvaluation:
        result = None if done is None else done.result
        phases = units = None
        if result is not None:
            phases = {k: v for k, v in result.seconds.items() if k != "total"}
            units = _units_per_layer(measured.model, result)
        return MethodEvaluation(
            name=name,
            seconds=0.0 if done is None else done.seconds,
            metrics=found,
            gap_closed=self._closed(self._to_references(found)),
            units_per_layer=units,
            phases=phases,
            skipped=result is not None and bool(result.skipped),
            losses=self._losses(measured),
            sha256=model_hash(measured.model),
        )

    def _retrained_entry(self, seconds: Number) -> MethodEvaluation:
        columns = {name: [found[name] for found in self._theirs] for name in self._theirs[0]}
        return MethodEvaluation(
            name=RETRAINED,
            seconds=seconds,
            metrics={name: _mean(values) for name, values in columns.items()},
            gap_closed=self._closed(self.floor),
            spread={name: _spread(values) for name, values in columns.items()},
            losses=self._losses(self._references[0]),
        )

    def failure(self, name: str, message: str) -> MethodEvaluation:
        return MethodEvaluation(
            name=name,
            seconds=None,
            metrics=dict.fromkeys(self._original),
            gap_closed=dict.fromkeys(self.floor),
            error=message,
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


def _is_gap(original: Number, floor: Number, farthest: Number) -> bool:
    """Whether the original is farther from retrained models than chance takes one of these."""
    if original is None or floor is None or farthest is None:
        return False
    return original > max(farthest, _CLEAR * floor)


def _apart(one: Number, other: Number) -> Number:
    return None if one is None or other is None else abs(one - other)


def _relearn_level(original: Measured, references: list[Measured]) -> float:
    """The loss at which removed samples count as learnt again."""
    before = original.forget.loss
    losses = [each.forget.loss for each in references]
    after = float(np.mean(losses)) if losses else before
    # The last term allows for rounding between dtypes: the original model reaches the level itself.
    return before + _TOLERANCE * max(after - before, 0.0) + 1e-6 * abs(before)


def _units_per_layer(model: nn.Module, result: UnlearnResult) -> dict[str, list[int]]:
    """Of every layer with candidates: how many units were selected, and how many it has.

    Nothing where single parameters were.
    """
    if not isinstance(result.selection, UnitSelection):
        return {}
    candidates = find_candidates(model, result.settings).selection.units
    chosen, every = result.selection.units, UnitSelection.all(model).units
    return {layer: [len(chosen.get(layer, ())), len(every[layer])] for layer in candidates}


def _mean(values: Sequence[Number]) -> Number:
    """None if a value is missing."""
    return float(np.mean(values)) if values and None not in values else None  # type: ignore[arg-type]


def _spread(values: list[Number]) -> Number:
    if len(values) < 2 or None in values:
        return None
    return float(np.std(values, ddof=1))  # type: ignore[arg-type]
