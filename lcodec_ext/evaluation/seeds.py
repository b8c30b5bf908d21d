"""One seed of a population: train, delete, train again, measure; and where that is kept."""

import dataclasses
import inspect
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._build import __version__
from lcodec_ext._files import json_ready, write_atomically
from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.decay import Decay
from lcodec_ext._torch.loss import LossFunction
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
)
from lcodec_ext.evaluation.shared import called, samples_hash
from lcodec_ext.evaluation.training import take
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings

PARTS = ("forget", "retain", "test")
STATISTICS = tuple(f"{what}_{part}" for what in ("accuracy", "loss") for part in PARTS)
_FORMAT = 1
_CPU = torch.device("cpu")
_SETTINGS_FILE = "population.json"

Unlearn = Callable[..., nn.Module | UnlearnResult]


class Seeded:
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
        """Delete as the callable does."""
        positional = [seed] if self.fifth else []
        named = {"seed": seed} if self.asks and not self.fifth else {}
        return self.unlearn(model, forget, retain, loss_fn, *positional, **named)


#: Of one seed, by "WHO/PART" the margins, by "WHO/statistics" what `STATISTICS` names and the
#: seconds; by "WHO/error" why there are none.
Found = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What is done for every seed."""

    train: Callable[[Any, int], nn.Module]
    methods: dict[str, Method]
    data: Any
    removed: list[int]
    kept: list[int]
    test: Any
    loss_fn: LossFunction
    weight_decay: Decay
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
        values += [runs[part].loss for part in PARTS]
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


def carried_out(
    work: Work, seeds: list[int], processes: int, folder: Path | None
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


def _one(work: Work, k: int, folder: Path | None) -> tuple[int, Found]:
    found = work.for_seed(k)
    if folder is not None:
        content = io.BytesIO()
        np.savez(content, **found)
        write_atomically(folder / _name(k), content.getvalue())
    return k, found


def _name(k: int) -> str:
    return f"seed-{k:05d}.npz"


class Store:
    """The folder with what was found for each seed, if there is one."""

    def __init__(self, directory: str | Path | None, work: Work) -> None:
        self.folder = None if directory is None else Path(directory)
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"directory must be a folder; {self.folder} is a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = described(work)
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


def described(work: Work) -> dict[str, Any]:
    """What tells one evaluation from another."""
    return {
        "format": _FORMAT,
        "version": __version__,
        "data": samples_hash(_in_place(work.data, "data")),
        "test": samples_hash(_in_place(work.test, "test")),
        "forget": work.removed,
        "train": called(work.train),
        "loss_fn": called(work.loss_fn),
        "methods": {name: method_described(method) for name, method in work.methods.items()},
        "weight_decay": work.weight_decay,
        "max_samples": work.max_samples,
        "seed": work.seed,
    }


def _in_place(data: Any, name: str) -> Samples:
    """Samples where they are, before there is a model."""
    parts = data if isinstance(data, tuple | list | Mapping) else ()
    first = next(tensors_of(parts), None)
    return as_samples(data, name, first.device if first is not None else _CPU, torch.float32)


def method_described(method: Any) -> Any:
    """A method as JSON: its options, or the name of the function."""
    if isinstance(method, Seeded):
        return called(method.unlearn)
    if isinstance(method, Baseline):
        return {"baseline": called(method.run), **_options(method.options)}
    if not isinstance(method, Mapping):
        return called(method)
    options = {k: v for k, v in method.items() if k not in (*NOT_SETTINGS, "inplace")}
    preset = options.pop("preset", "recommended")
    if isinstance(preset, Settings):
        settings = dataclasses.replace(preset, **options)
    else:
        settings = Settings.preset(preset, **options)
    return settings.to_dict()  # whole, so that changed defaults are told


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = json_ready(options)
    return {key: json.loads(json.dumps(value, default=repr)) for key, value in plain.items()}
