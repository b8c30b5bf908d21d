"""The user's model and data, by import path, and numbers of samples."""

import argparse
import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcodec_ext._callers import warn
from lcodec_ext._checks import counted, first_few
from lcodec_ext.cli.console import Console, InputError
from lcodec_ext.cli.import_path import call
from lcodec_ext.cli.weights import read_weights

if TYPE_CHECKING:
    from torch import nn

    from lcodec_ext.unlearning.groups import Groups

PARTS = ("train", "test", "validation", "groups", "loss_fn", "retrain")
IMPORT_PATHS = """\
models and data:
  --model and --data each name a function of yours, as path/to/file.py:name or
  package.module:name. It is called without arguments.
  The function of --model returns a torch.nn.Module, or (module, parts). The function of --data
  returns parts: a dict or an object with some of
    train       (inputs, targets), a dict of tensors with "labels", or a Dataset
    loss_fn     loss_fn(outputs, targets), the mean loss of a batch
    validation  optional: samples that the guard watches
    groups      optional: for each sample of train, whom it belongs to, an integer or a string
    test        for evaluate: samples that training has not seen
    retrain     for evaluate: retrain(retained, seed) trains a model from scratch
  Samples are named by their number in train, counted from 0.
"""

FORGET = """\
requests:
  --forget 3,17,20-40      numbers of samples, and ranges, which include both ends
  --forget @ids.txt        the same in a file, separated by commas, spaces or line breaks
  --forget ids.json        a JSON list of integers
  --forget-group u17,u18   all samples of groups, users for instance, by the ids in "groups"
  --forget-group @who.txt  the same in a file, one id on each line
  --forget-group who.json  a JSON list of ids
"""


def add_problem(parser: argparse.ArgumentParser) -> None:
    """Add the options that name model, weights and data."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="PATH:NAME", help="a function that makes the model")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="its weights, a state_dict in a .pt or .safetensors file (default: those that the "
        "function gives it)",
    )
    group.add_argument("--data", metavar="PATH:NAME", help="a function that makes the data")


class Problem:
    """The user's model and data.

    Parameters
    ----------
    model : str
        Import path.
    weights : str or None
        File.
    data : str or None
        Import path. Without one, the function of the model must give the parts too.

    Attributes
    ----------
    source : str
        The option that the parts come from.
    """

    def __init__(self, model: str, weights: str | None, data: str | None) -> None:
        need_torch()
        from torch import nn

        made, parts = call(model, "--model"), None
        if isinstance(made, tuple) and len(made) == 2:
            made, parts = made
        if not isinstance(made, nn.Module):
            raise InputError(
                f"--model must return a torch.nn.Module, or (module, parts); {model}() returned "
                f"an object of type {type(made).__name__}"
            )
        self.model = made
        self._parts = {} if parts is None else parts_of(parts, f"--model {model}")
        if data is not None:
            self._parts |= parts_of(call(data, "--data"), f"--data {data}")
        self.source = f"--data {data}" if data else f"--model {model}"
        if weights is not None:
            self.model = self.with_weights(weights, "--weights")

    def __getitem__(self, name: str) -> Any:
        if name not in self._parts:
            given = ", ".join(self._parts) or "none of the parts"
            raise InputError(f"{self.source} must give {name!r}; it gives {given}")
        return self._parts[name]

    def get(self, name: str) -> Any:
        """A part, or None if it is not given."""
        return self._parts.get(name)

    def with_weights(self, file: str, option: str) -> "nn.Module":
        """A copy of the model with the weights of a file, also of one that wraps the model."""
        from lcodec_ext._torch.names import AmbiguousNamesError, without_prefix

        model = copy.deepcopy(self.model)
        try:
            state, left = without_prefix(read_weights(file, option), model.state_dict())
            model.load_state_dict(state)
            if left:
                warn(
                    f"{option} {file} also holds {counted(len(left), 'tensor')} that the model "
                    f"does not have, left out here: {first_few(left, 4)}"
                )
        except AmbiguousNamesError as error:
            raise InputError(f"{option} {file} {error}") from None
        except RuntimeError as error:  # its message lists what does not fit
            raise InputError(f"{option} {file} does not fit the model: {error}") from None
        return model


def need_torch() -> None:
    """Refuse the command where PyTorch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("this command needs PyTorch: pip install 'lcodec_ext[torch]'") from None


def parts_of(given: Any, source: str) -> dict[str, Any]:
    """The parts of a problem, from a dict or from the attributes of an object."""
    if isinstance(given, Mapping):
        if unknown := [str(key) for key in given if key not in PARTS]:
            raise InputError(
                f"{source} gives {', '.join(map(repr, unknown))}; the parts are {', '.join(PARTS)}"
            )
        found = dict(given)
    else:
        found = {name: getattr(given, name) for name in PARTS if hasattr(given, name)}
    found = {name: part for name, part in found.items() if part is not None}
    if not found:
        raise InputError(
            f"{source} must return a dict, or an object, with some of {', '.join(PARTS)}; it "
            f"returned an object of type {type(given).__name__}"
        )
    return found


def parse_ids(text: str) -> list[int]:
    """The numbers of the samples in a request, ascending, each once."""
    source, content = "--forget", text
    if text.startswith("@") or text.endswith(".json"):
        source = f"--forget {text}"
        path = Path(text.removeprefix("@"))
        if not path.is_file():
            raise InputError(f"{source}: {path} does not exist")
        content = path.read_text(encoding="utf-8")
    ids = _listed(content, source) if text.endswith(".json") else _written(content, source)
    if not ids:
        raise InputError(f"{source} names no sample")
    return sorted(set(ids))


def _listed(content: str, source: str) -> list[int]:
    try:
        ids = json.loads(content)
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{source} must be a list of integers >= 0")
    return ids


def _written(content: str, source: str) -> list[int]:
    ids: list[int] = []
    for word in re.split(r"[\s,]+", content.strip(" \t\r\n,")):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise InputError(f"{source}: expected numbers and ranges, as 3,17,20-40; got {word!r}")
        ids.extend(range(first, last + 1))
    return ids


def parse_groups(text: str) -> list[str | int]:
    """The ids of the groups in a request, as they are written."""
    source = f"--forget-group {text}"
    if text.startswith("@") or text.endswith(".json"):
        path = Path(text.removeprefix("@"))
        if not path.is_file():
            raise InputError(f"{source}: {path} does not exist")
        content = path.read_text(encoding="utf-8")
        ids = _json_ids(content, source) if text.endswith(".json") else content.splitlines()
    else:
        ids = text.split(",")
    found = [each.strip() if isinstance(each, str) else each for each in ids]
    found = [each for each in found if each != ""]
    if not found:
        raise InputError(f"{source} names no group")
    return found


def _json_ids(content: str, source: str) -> list[str | int]:
    try:
        ids = json.loads(content)
    except ValueError as error:
        raise InputError(f"{source} is not JSON: {error}") from None
    if not isinstance(ids, list) or not all(type(each) in (str, int) for each in ids):
        raise InputError(f"{source} must be a list of integers or strings")
    return ids


def as_groups(given: Any, n: int, source: str) -> "Groups":
    """The ids of the n samples of train."""
    from lcodec_ext.unlearning.groups import Groups

    if given is None:
        raise InputError(
            f"--forget-group needs the ids of all samples: {source} must give 'groups'"
        )
    return Groups.of(given, n, "train")


def known_groups(groups: "Groups", wanted: list[str | int]) -> list[str | int]:
    """The ids of a request as the data have them: text may be written for integers."""
    if all(isinstance(each, int) for each in groups.ids):
        wanted = [int(each) if str(each).lstrip("-").isdecimal() else each for each in wanted]
    try:
        return groups.named(wanted)
    except ValueError as error:
        raise InputError(f"--forget-group: {error}") from None


def n_samples(train: Any, model: "nn.Module") -> int:
    """How many samples train has, in any form that `unlearn` takes."""
    import torch

    from lcodec_ext._torch.samples import as_samples

    parameter = next(model.parameters(), torch.zeros(()))
    return len(as_samples(train, "train", parameter.device, torch.float64))


def note_weights(options: argparse.Namespace, console: Console) -> None:
    """Say so if the model is used as its function makes it."""
    if not options.weights:  # nothing else would tell that they may be random
        console.note(f"no --weights: the model as {options.model} makes it")


def check_ids(ids: list[int], n: int, option: str = "--forget") -> None:
    """Refuse a request that names samples beyond the n, or all of them; ids ascend."""
    if ids[-1] >= n:
        raise InputError(f"--forget names sample {ids[-1]}; train has the numbers 0 to {n - 1}")
    if len(ids) == n:
        raise InputError(f"{option} must leave at least one sample; it names all of train")
