"""Deletions judged over a population of models: originals, what a method makes of them, retrained.

One model shows what a method did to one start. The scores of the field ask whether the
*distribution* of unlearned models is that of retrained ones: see scores.py.
"""

import dataclasses
import hashlib
import inspect
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool, check_integer, check_real, check_seed
from lcodec_ext._files import json_ready, write_atomically
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.loss import LossFunction, check_loss_fn
from lcodec_ext._torch.modes import clock, place, seeded
from lcodec_ext._torch.predict import Prediction, predict
from lcodec_ext._torch.samples import Samples, as_samples
from lcodec_ext.evaluation.methods import (
    NO_OP,
    NOT_SETTINGS,
    RETRAINED,
    Baseline,
    Method,
    carry_out,
    methods_of,
)
from lcodec_ext.evaluation.metrics import Number, scikit_learn
from lcodec_ext.evaluation.scores import (
    Floats,
    by_chance,
    forgetting_quality,
    klom,
    privacy_degrees,
    ulira,
)
from lcodec_ext.evaluation.training import check_numbers, count, take
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings

FORMAT = 1
CPU = torch.device("cpu")
PARTS = ("forget", "retain", "test")
_SETTINGS_FILE = "population.json"
_STATISTICS = tuple(f"{what}_{part}" for what in ("accuracy", "loss") for part in PARTS)

Unlearn = Callable[..., nn.Module | UnlearnResult]


@dataclass(frozen=True)
class PopulationMethod:
    """One method in a `PopulationEvaluation`.

    Attributes
    ----------
    name : str
    seconds : float or None
        Mean time of a deletion; of "retrained", of a training.
    scores : dict of str to float or None
        See `evaluate_population`. Of "retrained" the accuracies and losses only.
    chance : dict of str to [float, float]
        For the scores that compare populations: mean and standard deviation of what two halves of
        one shuffled population score.
    examples : dict of str to list
        Of each removed sample: "number", "auc", "tpr", "klom", "epsilon".
    error : str or None
        Why there is nothing to score.
    """

    name: str
    seconds: Number
    scores: dict[str, Number]
    chance: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    error: str | None = None


_COLUMNS = (
    ("U-LiRA", "AUC", "ulira_auc", ".3f"),
    ("TPR at", "1% FPR", "ulira_tpr", ".1%"),
    ("KLoM", "forget", "klom_forget", ".2f"),
    ("", "retain", "klom_retain", ".2f"),
    ("", "test", "klom_test", ".2f"),
    ("epsilon", "(median)", "epsilon", ".2f"),
    ("forgetting", "quality", "forgetting_quality", ".3f"),
    ("challenge", "score", "challenge_score", ".3f"),
    ("accuracy", "forget", "accuracy_forget", ".1%"),
    ("", "retain", "accuracy_retain", ".1%"),
    ("", "test", "accuracy_test", ".1%"),
)


@dataclass(frozen=True, repr=False)
class PopulationEvaluation:
    """What `evaluate_population` found; its repr is a table.

    Attributes
    ----------
    methods : tuple of PopulationMethod
        "no-op", "retrained", and the methods in their order. ``evaluation["mine"]`` is one.
    n_models : int
        Of each population.
    n_forget, n_retain, n_test : int
        Samples that were removed, and those of the others that were measured.
    settings : dict
    """

    methods: tuple[PopulationMethod, ...]
    n_models: int
    n_forget: int
    n_retain: int
    n_test: int
    settings: dict[str, Any]

    def __getitem__(self, name: str) -> PopulationMethod:
        for method in self.methods:
            if method.name == name:
                return method
        known = ", ".join(repr(method.name) for method in self.methods)
        raise KeyError(f"no method {name!r}; there are {known}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts, for JSON; infinity is None."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"format": FORMAT, **json_ready(values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "PopulationEvaluation":
        """The evaluation that `to_dict` wrote.

        Raises
        ------
        ValueError
            If data have another format.
        """
        if data.get("format") != FORMAT:
            raise ValueError(
                f"data must be a population evaluation of format {FORMAT}; got format "
                f"{data.get('format')!r}"
            )
        methods = []
        for entry in data["methods"]:
            found = {**entry, "scores": dict(entry["scores"]), "examples": dict(entry["examples"])}
            if found["examples"]:
                values = [math.inf if e is None else e for e in found["examples"]["epsilon"]]
                found["examples"]["epsilon"] = values
                if found["scores"]["epsilon"] is None:
                    found["scores"]["epsilon"] = math.inf
            found["chance"] = {
                name: [math.inf if mean is None else mean, math.nan if sd is None else sd]
                for name, (mean, sd) in entry["chance"].items()
            }
            methods.append(PopulationMethod(**found))
        rest = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name != "methods"}
        return cls(methods=tuple(methods), **rest)

    def to_frame(self, *, examples: bool = False) -> Any:
        """A pandas DataFrame with a row for each method.

        Columns are the scores; "chance_" stands before what they are by chance.

        Parameters
        ----------
        examples : bool, default False
            A row for each method and removed sample instead, with its scores.

        Raises
        ------
        ImportError
            Without pandas, which the extra ``lcodec_ext[evaluation]`` installs.
        """
        check_bool(examples, "examples")
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "PopulationEvaluation.to_frame needs pandas: pip install 'lcodec_ext[evaluation]'"
            ) from error
        if examples:
            parts = [pandas.DataFrame(m.examples).assign(method=m.name) for m in self.methods]
            return pandas.concat(parts).set_index(["method", "number"])
        rows = [
            {"method": m.name, "seconds": m.seconds, "error": m.error, **m.scores}
            | {f"chance_{name}": mean for name, (mean, _) in m.chance.items()}
            for m in self.methods
        ]
        return pandas.DataFrame(rows).set_index("method")

    def __repr__(self) -> str:
        rows = [["", *(c[line] for c in _COLUMNS), ""] for line in (0, 1)]
        for method in self.methods:
            cells = []
            for _, _, key, form in _COLUMNS:
                value, chance = method.scores.get(key), method.chance.get(key)
                cell = "-" if value is None else format(value, form)
                cells.append(cell + (f" ({format(chance[0], form)})" if chance else ""))
            note = method.error or ""
            rows.append([method.name, *cells, note if len(note) <= 60 else note[:57] + "..."])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            [
                f"Population of {self.n_models} models: {self.n_forget} samples removed; measured "
                f"on them, on {self.n_retain} retained and {self.n_test} test samples",
                *(
                    "  ".join(
                        [
                            f"{row[0]:{widths[0]}}",
                            *(f"{c:>{w}}" for c, w in zip(row[1:-1], widths[1:-1], strict=True)),
                            row[-1],
                        ]
                    ).rstrip()
                    for row in rows
                ),
                "In brackets: what two halves of one population of so many models score.",
            ]
        )


def evaluate_population(
    train: Callable[[Any, int], nn.Module],
    unlearn: Unlearn | Mapping[str, Method] | Sequence[str],
    data: Any,
    forget: Sequence[int],
    test: Any,
    loss_fn: LossFunction,
    *,
    n_models: int = 64,
    processes: int = 1,
    directory: str | Path | None = None,
    weight_decay: float = 0.0,
    max_samples: int = 1000,
    draws: int = 20,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> PopulationEvaluation:
    """Compare many unlearned models with as many retrained ones, sample by sample.

    For each of n_models seeds, one model is trained on all data, the method deletes the samples
    from it, and another model is trained without them. Of every model, the margin of each measured
    sample is kept: the log-odds of the right class, or minus the loss where there are no classes.
    The scores are those of `lcodec_ext.evaluation.scores`:

    - ``ulira_auc`` (mean over the removed samples), ``ulira_tpr`` (at 1% false positives, all
      samples pooled), ``ulira_auc_pooled``: the attack U-LiRA. AUC 0.5 is perfect.
    - ``klom_forget``, ``klom_retain``, ``klom_test``: the divergence of the margins, mean over
      samples; ``klom_forget_95``, its 95th percentile.
    - ``epsilon`` (median), ``forgetting_quality`` and ``challenge_score``, the latter times the
      ratios of retained and of test accuracy to those of retrained models: the NeurIPS unlearning
      challenge.
    - accuracies and mean losses on removed, retained and test samples.

    Parameters
    ----------
    train : callable
        ``train(samples, seed)`` trains a model from scratch; samples are of the kind of data.
    unlearn : callable, mapping, or sequence of str
        ``unlearn(model, forget, retain, loss_fn)`` returns a model or an `UnlearnResult`; it is
        given a copy of the model, and ``seed=`` if it has such a parameter. Or several methods, as
        `evaluate` takes them, which share the trained models.
    data : tuple of tensors, dict of tensors, or Dataset
        All training samples.
    forget : sequence of int
        Numbers of those to remove.
    test : tuple of tensors, dict of tensors, Dataset or DataLoader
        Samples that no model is trained on.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch.
    n_models : int, default 64
        Of each population; at least 4. KLoM and epsilon need many.
    processes : int, default 1
        Processes that train, each on one thread. What is passed is sent to them.
    directory : path, optional
        Where the margins of each seed are kept, one small file each, as soon as they are there.
        Another call with the same arguments, or more models, goes on from there.
    weight_decay : float, default 0.0
        Of methods that are options of `unlearn` or baselines.
    max_samples : int, default 1000
        Most samples of each set that are measured; of larger ones so many are drawn.
    draws : int, default 20
        Shuffles for what scores are by chance.
    seed : int, default 0
        All seeds follow from it. Numbers do not depend on the processes.
    batch_size : int, default 256
        Most samples in one pass of the measurements.
    progress : bool, default False
        Show a bar; needs tqdm.

    Returns
    -------
    PopulationEvaluation

    Raises
    ------
    ValueError
        For arguments out of range; for a directory of another evaluation; for models whose outputs
        are not finite.
    TypeError
        For arguments of the wrong type.
    ImportError
        Without scikit-learn, before anything is trained.

    Warns
    -----
    UserWarning
        If a method fails for a seed. Its error is in the evaluation, and the others go on.

    Notes
    -----
    The cost is 2 n_models trainings and n_models deletions. Interrupt it as any Python code
    (Ctrl-C); with a directory nothing that is done is lost. The code of train and of methods is not
    looked at: take a new directory when it changes.

    Examples
    --------
    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> x, y = torch.randn(60, 4, generator=torch.manual_seed(0)), torch.arange(60) % 3
    >>> def train(samples, seed):
    ...     torch.manual_seed(seed)
    ...     model = torch.nn.Linear(4, 3)
    ...     optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    ...     for _ in range(20):
    ...         optimizer.zero_grad()
    ...         cross_entropy(model(samples[0]), samples[1]).backward()
    ...         optimizer.step()
    ...     return model
    >>> sets = (x[:40], y[:40]), range(5), (x[40:], y[40:])
    >>> found = evaluate_population(train, ["L-BFGS"], *sets, cross_entropy, n_models=8)
    >>> [method.name for method in found.methods]
    ['no-op', 'retrained', 'L-BFGS']
    """
    methods = _methods(unlearn, weight_decay, seed)
    _check_train(train)
    n = count(data)
    removed = check_numbers(forget, "forget", n)
    check_integer(n_models, "n_models", 4)
    check_integer(processes, "processes", 1)
    check_integer(max_samples, "max_samples", 1)
    check_integer(draws, "draws", 2)
    check_real(weight_decay, "weight_decay", 0)
    check_seed(seed, optional=False)
    check_integer(batch_size, "batch_size", 1)
    check_bool(progress, "progress")
    check_loss_fn(loss_fn)
    scikit_learn()
    kept = np.setdiff1d(np.arange(n), removed).tolist()
    work = _Work(
        train, methods, data, removed, kept, test, loss_fn, weight_decay, max_samples, seed,
        batch_size,
    )  # fmt: skip
    store = _Store(directory, work)
    store.found |= {k: store.read(k) for k in range(n_models) if store.has(k)}
    todo = [k for k in range(n_models) if k not in store.found]
    with progress_bar(progress, total=n_models, desc="population", unit="seed") as bar:
        bar.update(len(store.found))
        for k, found in _carried_out(work, todo, processes, store.folder):
            store.found[k] = found
            bar.update()
    return _scored([store.found[k] for k in range(n_models)], work, draws)


def _check_train(train: Any) -> None:
    if isinstance(train, nn.Module) or not callable(train):
        raise TypeError(
            f"train must be callable as train(samples, seed); got an object of type "
            f"{type(train).__name__}"
        )
    try:
        inspect.signature(train).bind((), 0)
    except TypeError:
        raise TypeError(
            "train is called as train(samples, seed); what was given does not take two arguments"
        ) from None
    except ValueError:  # one that does not tell its arguments
        pass


def _methods(unlearn: Any, weight_decay: float, seed: int) -> dict[str, Method]:
    """The methods by name; a callable becomes one that `carry_out` can call."""
    if isinstance(unlearn, nn.Module | UnlearnResult):
        raise TypeError(
            "unlearn must delete from any model: a callable (model, forget, retain, loss_fn), a "
            "mapping of names to methods or names of methods; got an object of type "
            f"{type(unlearn).__name__}"
        )
    if not callable(unlearn):
        if not isinstance(unlearn, Mapping | Sequence) or isinstance(unlearn, str):
            raise TypeError(
                "unlearn must be a callable (model, forget, retain, loss_fn), a mapping of names "
                f"to methods or a list of names; got an object of type {type(unlearn).__name__}"
            )
        methods = methods_of(unlearn, {"weight_decay": weight_decay, "seed": seed, "score": None})
        for name, method in methods.items():
            if isinstance(method, nn.Module | UnlearnResult):
                raise TypeError(
                    f"method {name!r} must delete from any model; got one model, an object of type "
                    f"{type(method).__name__}"
                )
        return {
            name: _Seeded(method) if callable(method) else method
            for name, method in methods.items()
        }
    name = getattr(unlearn, "__name__", "unlearn")
    return {"unlearn" if name in ("<lambda>", NO_OP, RETRAINED) else name: _Seeded(unlearn)}


class _Seeded:
    """A callable (model, forget, retain, loss_fn), given the seed where it asks for it.

    It does by a parameter of that name, or by a fifth one that must be given.
    """

    def __init__(self, unlearn: Unlearn) -> None:
        self.unlearn = unlearn
        try:
            parameters = dict(inspect.signature(unlearn).parameters)
        except ValueError:  # one that does not tell its arguments
            parameters = {}
        fifth = next(iter(list(parameters.values())[4:]), None)
        self.asks = "seed" in parameters
        self.fifth = (
            fifth is not None
            and fifth.kind in (fifth.POSITIONAL_ONLY, fifth.POSITIONAL_OR_KEYWORD)
            and (fifth.name == "seed" or fifth.default is fifth.empty)
        )

    def __call__(self, model: nn.Module, forget: Any, retain: Any, loss_fn: Any, seed: int) -> Any:
        positional = [seed] if self.fifth else []
        named = {"seed": seed} if self.asks and not self.fifth else {}
        return self.unlearn(model, forget, retain, loss_fn, *positional, **named)


# ---------------------------------------------------------------------------------------------
# One seed

#: Of one seed, by "WHO/PART" the margins, by "WHO/statistics" what `_STATISTICS` names and the
#: seconds; by "WHO/error" why there are none.
Found = dict[str, Any]


@dataclass(frozen=True)
class _Work:
    """What is done for every seed."""

    train: Callable[[Any, int], nn.Module]
    methods: dict[str, Method]
    data: Any
    removed: list[int]
    kept: list[int]
    test: Any
    loss_fn: LossFunction
    weight_decay: float
    max_samples: int
    seed: int
    batch_size: int

    def for_seed(self, k: int) -> Found:
        """Train, delete, train again, and measure; on one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._for_seed(k)
        finally:
            torch.set_num_threads(threads)

    def _for_seed(self, k: int) -> Found:
        first, second = np.random.SeedSequence([self.seed, k]).generate_state(2).tolist()
        retain = take(self.data, self.kept)
        forget = take(self.data, self.removed)
        original, _ = self._trained(self.data, first)
        again, seconds = self._trained(retain, second)
        found = self._measured(NO_OP, original, 0.0) | self._measured(RETRAINED, again, seconds)
        defaults = {"weight_decay": self.weight_decay, "seed": first, "score": None}
        for name, method in self.methods.items():
            try:
                done = carry_out(method, original, forget, retain, self.loss_fn, defaults)
                found |= self._measured(name, done.model, done.seconds or 0.0)
            except Exception as error:
                found[f"{name}/error"] = f"{type(error).__name__}: {error}"
        return found

    def _trained(self, samples: Any, seed: int) -> tuple[nn.Module, float]:
        with seeded(seed):
            begin = time.perf_counter()
            model = self.train(samples, seed)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"train must return a model (torch.nn.Module); got {type(model).__name__}"
            )
        return model, clock(model) - begin

    def _measured(self, name: str, model: nn.Module, seconds: float) -> Found:
        found: Found = {}
        runs = {}
        for part, numbers in self.parts().items():
            data = self.test if part == "test" else self.data
            samples = as_samples(data, "test" if part == "test" else "data", *place(model))
            if numbers is not None:
                samples = samples.subset(numbers)
            runs[part] = predict(model, samples, self.loss_fn, self.batch_size)
            found[f"{name}/{part}"] = margins(runs[part]).numpy()
        values = [runs[part].accuracy for part in PARTS]
        values += [float(runs[part].losses.mean()) for part in PARTS]
        numbers_ = [math.nan if value is None else value for value in values]
        found[f"{name}/statistics"] = np.array([*numbers_, seconds])
        return found

    def parts(self) -> dict[str, list[int] | None]:
        """Numbers of the samples that are measured: of the data, and of the test samples."""
        n_test = len(_in_place(self.test, "test"))
        return {
            "forget": self._some(self.removed),
            "retain": self._some(self.kept),
            "test": self._some(list(range(n_test))) if n_test > self.max_samples else None,
        }

    def _some(self, numbers: list[int]) -> list[int]:
        if len(numbers) <= self.max_samples:
            return numbers
        return [numbers[k] for k in random_samples(len(numbers), self.max_samples, self.seed)]


def margins(run: Prediction) -> Tensor:
    """Log-odds of the right class of each sample; minus the loss where there are no classes."""
    if run.log_probabilities is None or run.labels is None:
        return -run.losses
    right = run.labels[:, None]
    others = run.log_probabilities.scatter(1, right, -torch.inf).logsumexp(1)
    return run.log_probabilities.gather(1, right)[:, 0] - others


def _carried_out(
    work: _Work, seeds: list[int], processes: int, folder: Path | None
) -> Iterator[tuple[int, Found]]:
    """What is found for each seed, in any order; written to the folder as soon as it is there."""
    if processes == 1 or len(seeds) < 2:
        for k in seeds:
            yield _one(work, k, folder)
        return
    from joblib import Parallel, delayed, parallel_config

    with parallel_config(backend="loky", inner_max_num_threads=1):
        pool = Parallel(n_jobs=processes, return_as="generator_unordered", pre_dispatch=processes)
        yield from pool(delayed(_one)(work, k, folder) for k in seeds)


def _one(work: _Work, k: int, folder: Path | None) -> tuple[int, Found]:
    found = work.for_seed(k)
    if folder is not None:
        content = io.BytesIO()
        np.savez(content, **found)
        write_atomically(folder / _name(k), content.getvalue())
    return k, found


def _name(k: int) -> str:
    return f"seed-{k:05d}.npz"


class _Store:
    """The folder with what was found for each seed, if there is one."""

    def __init__(self, directory: str | Path | None, work: _Work) -> None:
        self.found: dict[int, Found] = {}
        self.folder = None if directory is None else Path(directory)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"directory must be a folder; {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = _described(work)
        file = self.folder / _SETTINGS_FILE
        if file.exists():
            theirs = json.loads(file.read_text(encoding="utf-8"))
            other = [key for key in ours if theirs.get(key) != ours[key]]
            if other:
                raise ValueError(
                    f"directory holds models of another evaluation, which differs in "
                    f"{', '.join(other)}; choose another directory than {self.folder}"
                )
        write_atomically(file, json.dumps(ours, indent=1) + "\n")

    def has(self, k: int) -> bool:
        """Whether a seed is done."""
        return self.folder is not None and (self.folder / _name(k)).is_file()

    def read(self, k: int) -> Found:
        """What was found for a seed."""
        assert self.folder is not None
        with np.load(self.folder / _name(k)) as file:
            return {
                key: str(file[key]) if key.endswith("/error") else file[key] for key in file.files
            }


def _described(work: _Work) -> dict[str, Any]:
    """What tells one evaluation from another."""

    def digest(data: Any, name: str) -> str:
        whole = hashlib.sha256()
        for each in _in_place(data, name).each_hash():
            whole.update(each.encode())
        return whole.hexdigest()

    return {
        "format": FORMAT,
        "version": __version__,
        "data": digest(work.data, "data"),
        "test": digest(work.test, "test"),
        "forget": work.removed,
        "train": _called(work.train),
        "loss_fn": _called(work.loss_fn),
        "methods": {name: _method_described(method) for name, method in work.methods.items()},
        "weight_decay": work.weight_decay,
        "max_samples": work.max_samples,
        "seed": work.seed,
    }


def _in_place(data: Any, name: str) -> Samples:
    """Samples where they are, before there is a model."""
    parts = data if isinstance(data, tuple | list | Mapping) else ()
    first = next(tensors_of(parts), None)
    return as_samples(data, name, first.device if first is not None else CPU, torch.float32)


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _method_described(method: Any) -> Any:
    if isinstance(method, _Seeded):
        return _called(method.unlearn)
    if isinstance(method, Baseline):
        return {"baseline": _called(method.run), **_options(method.options)}
    if not isinstance(method, Mapping):
        return _called(method)
    options = {k: v for k, v in method.items() if k not in NOT_SETTINGS}
    preset = options.pop("preset", "recommended")
    if isinstance(preset, Settings):
        settings = dataclasses.replace(preset, **options)
    else:
        settings = Settings.preset(preset, **options)
    return settings.to_dict()  # whole, so that changed defaults are told


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = json_ready(options)
    return {key: json.loads(json.dumps(value, default=repr)) for key, value in plain.items()}


# ---------------------------------------------------------------------------------------------
# Scores


def _scored(found: list[Found], work: _Work, draws: int) -> PopulationEvaluation:
    def population(name: str) -> dict[str, Floats]:
        keys = (*PARTS, "statistics")
        return {key: np.stack([each[f"{name}/{key}"] for each in found]) for key in keys}

    retrained = population(RETRAINED)
    yardstick = _statistics(retrained)
    methods = []
    for name in (NO_OP, RETRAINED, *work.methods):
        errors = [each[f"{name}/error"] for each in found if f"{name}/error" in each]
        if errors:
            error = f"{errors[0]} ({len(errors)} of {len(found)} seeds)"
            warnings.warn(f"method {name!r} failed. {error}", stacklevel=3)
            methods.append(PopulationMethod(name, None, {}, error=error))
            continue
        ours = population(name)
        seconds = float(ours["statistics"][:, -1].mean())
        if name == RETRAINED:
            methods.append(PopulationMethod(name, seconds, yardstick))
            continue
        scores, chance, examples = _compared(ours, retrained, draws, work.seed)
        examples["number"] = list(work.parts()["forget"] or ())
        own = _statistics(ours)
        ratio = 1.0
        for part in ("retain", "test"):
            one, other = own[f"accuracy_{part}"], yardstick[f"accuracy_{part}"]
            ratio *= one / other if one is not None and other else 1.0
        scores["challenge_score"] = (scores["forgetting_quality"] or 0.0) * ratio
        methods.append(PopulationMethod(name, seconds, scores | own, chance, examples))
    return PopulationEvaluation(
        methods=tuple(methods),
        n_models=len(found),
        n_forget=len(work.removed),
        n_retain=retrained["retain"].shape[1],
        n_test=retrained["test"].shape[1],
        settings={
            "weight_decay": work.weight_decay,
            "seed": work.seed,
            "max_samples": work.max_samples,
            "draws": draws,
            "methods": {name: _method_described(method) for name, method in work.methods.items()},
            "versions": {"lcodec_ext": __version__, "torch": torch.__version__},
        },
    )


def _statistics(population: Mapping[str, Floats]) -> dict[str, Number]:
    means = population["statistics"].mean(0)[: len(_STATISTICS)]
    return {
        name: None if math.isnan(value) else float(value)
        for name, value in zip(_STATISTICS, means, strict=True)
    }


def _compared(
    ours: Mapping[str, Floats], theirs: Mapping[str, Floats], draws: int, seed: int
) -> tuple[dict[str, Number], dict[str, list[float]], dict[str, list[Any]]]:
    """Scores of two populations, what they are by chance, and those of single removed samples."""
    pair = ours["forget"], theirs["forget"]
    attack, apart, epsilons = ulira(*pair), klom(*pair), privacy_degrees(*pair)
    scores: dict[str, Number] = {
        "ulira_auc": float(attack.auc.mean()),
        "ulira_auc_pooled": attack.pooled_auc,
        "ulira_tpr": attack.pooled_tpr,
        "klom_forget": float(apart.mean()),
        "klom_forget_95": float(np.quantile(apart, 0.95)),
        "klom_retain": float(klom(ours["retain"], theirs["retain"]).mean()),
        "klom_test": float(klom(ours["test"], theirs["test"]).mean()),
        "epsilon": float(np.median(epsilons)),
        "forgetting_quality": forgetting_quality(epsilons),
    }
    judged: dict[str, tuple[str, Callable[[Floats, Floats], float]]] = {
        "ulira_auc": ("forget", lambda a, b: float(ulira(a, b).auc.mean())),
        "ulira_tpr": ("forget", lambda a, b: ulira(a, b).pooled_tpr),
        "epsilon": ("forget", lambda a, b: float(np.median(privacy_degrees(a, b)))),
        "forgetting_quality": ("forget", lambda a, b: forgetting_quality(privacy_degrees(a, b))),
        **{f"klom_{part}": (part, lambda a, b: float(klom(a, b).mean())) for part in PARTS},
    }
    chance = {
        name: list(by_chance(score, ours[part], theirs[part], draws=draws, seed=seed))
        for name, (part, score) in judged.items()
    }
    examples = {
        "number": [],
        "auc": attack.auc.tolist(),
        "tpr": attack.tpr.tolist(),
        "klom": apart.tolist(),
        "epsilon": epsilons.tolist(),
    }
    return scores, chance, examples
