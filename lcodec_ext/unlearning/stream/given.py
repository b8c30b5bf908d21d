"""What a user gives to a stream, and how it is compared with the ledger."""

import functools
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import nn

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool
from lcodec_ext._torch.loss import LossFunction, check_copy, check_loss_fn
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.samples import Samples, as_samples, working_dtype
from lcodec_ext._torch.states import state_hash
from lcodec_ext._torch.token_loss import TokenLoss, given_loss
from lcodec_ext._torch.tokens import by_tokens
from lcodec_ext.unlearning.groups import Groups
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream.contents import Contents, data_record, is_data
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import FORMAT, recordable


@dataclass(frozen=True)
class Given:
    """Data and functions of a stream."""

    train: Samples
    validation: Samples | None
    loss_fn: LossFunction
    score: Score | None
    statistics: TrainingStatistics | None
    progress: bool
    settings: Settings
    groups: Groups | None = None
    contents: Contents = field(default_factory=Contents)  # of the training samples

    def with_statistics_at(self, original: nn.Module) -> "Given":
        """The same with statistics at the original weights: the model moves, they do not."""
        if self.statistics is None:
            return self
        return replace(self, statistics=self.statistics.at(original))

    def without(
        self, statistics: TrainingStatistics, original: nn.Module, numbers: Sequence[int]
    ) -> TrainingStatistics:
        """The statistics without some samples."""
        return statistics.without(
            original,
            self.loss_fn,
            self.train.subset(numbers),
            batch_size=self.settings.batch_size,
            dtype=self.settings.dtype,
        )


def receive(
    model: nn.Module,
    train: Any,
    loss_fn: LossFunction,
    validation: Any,
    statistics: TrainingStatistics | None,
    score: Score | None,
    progress: bool,
    settings: Settings,
    groups: Any,
) -> Given:
    """Check what a user gives to a stream."""
    check_module(model)
    check_loss_fn(loss_fn)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the model has no parameter")
    if train is None:
        raise ValueError(
            "train is None: requests name samples by their number in it. With statistics only the "
            "samples to delete are read, so a Dataset that finds these is enough. Where there is "
            "none, unlearn(model, forget, None, ..., statistics=...) takes the samples themselves, "
            "and statistics.without(...) makes the statistics for the next request"
        )
    dtype = settings.dtype or working_dtype(model)
    samples = as_samples(train, "train", parameter.device, dtype)
    if validation is not None:
        validation = as_samples(validation, "validation", parameter.device, dtype)
    if statistics is not None and statistics.n != len(samples):
        raise ValueError(
            f"statistics must be of the training samples, {len(samples)}; they are of "
            f"{statistics.n}"
        )
    check_copy(model, samples, loss_fn)
    loss_fn = by_tokens(loss_fn, model, samples)
    check_bool(progress, "progress")
    if groups is not None:
        groups = Groups.of(groups, len(samples), "train")
    return Given(samples, validation, loss_fn, score, statistics, progress, settings, groups)


# ---------------------------------------------------------------------------------------------
# The first entry


def start_record(given: Given, model: nn.Module) -> dict[str, Any]:
    """What the first entry says of what is given."""
    statistics, progress = given.statistics, given.progress
    return {
        "format": FORMAT,
        "settings": given.settings.to_dict(),
        "model": name_of(model),
        "trainable": _trainable(model),
        "loss_fn": name_of(given.loss_fn),
        "score": None if given.score is None else name_of(given.score),
        "options": {"loss_fn": _options_of(given.loss_fn), "score": _options_of(given.score)},
        "train": data_record(
            given.train, read=statistics is None, progress=progress, contents=given.contents
        ),
        "validation": given.validation and data_record(given.validation, progress=progress),
        "statistics": statistics and _statistics_record(statistics),
        "groups": given.groups and _groups_record(given.groups),
    }


def check_given(given: Given, model: nn.Module, history: History) -> None:
    """Refuse what differs from the start; ValueError names it."""
    start = history.start
    _check_function("loss_fn", given.loss_fn, start)
    _check_function("score", given.score, start)
    problem = history.mismatch(given.train, contents=given.contents)
    if problem is not None:
        raise ValueError(problem)
    if not is_data(given.validation, start["validation"]):
        raise ValueError(
            "validation must be what was given at the start: it decides which requests are skipped"
        )
    if (given.statistics and _statistics_record(given.statistics)) != start["statistics"]:
        raise ValueError("statistics must be what was given at the start")
    check_groups(given.groups, start.get("groups"))
    trainable = _trainable(model)
    if trainable != start["trainable"]:
        changed = sorted(set(trainable) ^ set(start["trainable"]))
        raise ValueError(
            "model must have the same parameters that require gradients as at the start; "
            f"another one is {(changed or trainable)[0]!r}"
        )


def check_groups(groups: Groups | None, known: Mapping[str, Any] | None) -> None:
    """Refuse groups that are not those on record."""
    if groups is None and known is not None:
        raise ValueError(
            f"groups must be what was given at the start, ids of {known['n']} groups; got None"
        )
    if groups is not None and known is None:
        raise ValueError("groups must be what was given at the start: none were; leave them out")
    if groups is not None and _groups_record(groups) != known:
        raise ValueError("groups must be what was given at the start: these are other ids")


def settings_on_record(history: History, perturb: Any) -> Settings:
    """The settings of a stream; `perturb` is given again where it was a function."""
    recorded = dict(history.start["settings"])
    if perturb is None:
        return Settings.from_dict(recorded)
    return Settings.from_dict(recorded | {"perturb": None}).replace(perturb=perturb)


def _trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def _groups_record(groups: Groups) -> dict[str, Any]:
    return {"n": len(groups), "sha256": groups.sha256()}


def _statistics_record(statistics: TrainingStatistics) -> dict[str, Any]:
    return {"n": statistics.n, "kind": statistics.kind, "sha256": state_hash(statistics.tensors())}


# ---------------------------------------------------------------------------------------------
# Functions by name and options


def name_of(value: Any) -> str:
    """The name of a function, or of an object's class."""
    value = given_loss(value)
    if isinstance(value, TokenLoss):
        return "per_token_loss"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _options_of(value: Any) -> dict[str, Any]:
    """What identifies a function besides its name: a partial's arguments, options of torch's."""
    value = given_loss(value)
    if isinstance(value, TokenLoss):
        own = {} if value.loss_fn is None else {"function": name_of(value.loss_fn)}
        return own | _simple(vars(value))
    if isinstance(value, functools.partial):
        given = {str(k): v for k, v in enumerate(value.args)} | value.keywords
        return {"function": name_of(value.func)} | _simple(given)
    options: dict[str, Any] = {}
    if isinstance(value, nn.Module):
        for name, module in value.named_modules():
            prefix = f"{name}." if name else ""
            if name:
                options[name] = name_of(module)
            if type(module).__module__.startswith("torch."):
                options |= {prefix + k: v for k, v in _simple(vars(module)).items()}
    return options


def _simple(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_")
        and key != "training"
        and (value is None or isinstance(value, bool | int | float | str))
    }


def _check_function(argument: str, given: Any, start: Mapping[str, Any]) -> None:
    """Refuse a function that is not the one on record; earlier versions recorded less."""
    must = f"{argument} must be what was given at the start: given is"
    if argument in start:
        name, known = (None if given is None else name_of(given)), start[argument]
        if name != known:
            raise ValueError(f"{must} {name}, on record is {known}")
    if "options" in start:
        options, known = recordable(_options_of(given)), start["options"][argument]
        for key in sorted(options.keys() | known.keys()):
            if (key in options, options.get(key)) != (key in known, known.get(key)):
                raise ValueError(
                    f"{must} {name_of(given)} with {_option(key, options)}, on record is "
                    f"{_option(key, known)}"
                )


def _option(key: str, options: Mapping[str, Any]) -> str:
    return f"{key}={options[key]!r}" if key in options else f"no {key}"


# ---------------------------------------------------------------------------------------------
# When and where


def circumstances() -> dict[str, Any]:
    """The time, and the versions on which the bits may depend."""
    versions = {
        "lcodec_ext": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "versions": versions}
