"""The user's model and data, by import path; weights in files; numbers of samples."""

import argparse
import copy
import json
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import Console, InputError
from lcodec_ext.cli.import_path import call

if TYPE_CHECKING:
    from torch import nn

PARTS = ("train", "test", "validation", "loss_fn", "retrain")
WEIGHTS = (".pt", ".pth", ".safetensors")
IMPORT_PATHS = """\
models and data:
  --model and --data name a function of yours, as path/to/file.py:name or package.module:name. It
  is called without arguments.
  The model's returns a torch.nn.Module, or (module, parts). The data's returns parts, a dict or an
  object with some of
    train       (inputs, targets), a dict of tensors with "labels", or a Dataset
    loss_fn     loss_fn(outputs, targets), the mean loss of a batch
    validation  optional: what the guard watches
    test        for evaluate: samples that training has not seen
    retrain     for evaluate: retrain(retained, seed), which trains a model from scratch
  Samples go by their number in train, from 0.
"""

FORGET = """\
requests:
  --forget 3,17,20-40      numbers of samples, and ranges with both their ends
  --forget @ids.txt        such numbers in a file, separated by commas, spaces or lines
  --forget ids.json        a JSON list of integers
"""


def add_problem(parser: argparse.ArgumentParser) -> None:
    """Add the options that name model, weights and data."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="PATH:NAME", help="a function that makes the model")
    group.add_argument(
        "--weights",
        metavar="FILE",
        help="its weights, a state_dict in a .pt or .safetensors file (default: as it is made)",
    )
    group.add_argument("--data", metavar="PATH:NAME", help="a function that makes the data")


class Problem:
    """The user's model and data.

    Parameters
    ----------
    model : str
        Import path.
    weights : str or None
    data : str or None
        Import path; without one the model's function gives the data too.
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
        self._source = f"--data {data}" if data else f"--model {model}"
        if weights is not None:
            self.model = self.with_weights(weights, "--weights")

    def __getitem__(self, name: str) -> Any:
        if name not in self._parts:
            there = ", ".join(self._parts) or "none of the parts"
            raise InputError(f"{self._source} must give {name!r}; it gives {there}")
        return self._parts[name]

    def get(self, name: str) -> Any:
        """A part, or None if the data do not give it."""
        return self._parts.get(name)

    def with_weights(self, file: str, option: str) -> "nn.Module":
        """A copy of the model with the weights of a file."""
        model = copy.deepcopy(self.model)
        try:
            model.load_state_dict(_read_weights(file, option))
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
    """The parts of a problem, of a dict or of an object's attributes."""
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


def _read_weights(file: str, option: str) -> dict[str, Any]:
    path = Path(file)
    if path.suffix.lower() not in WEIGHTS:
        raise InputError(f"{option} must be a file ending in {' or '.join(WEIGHTS)}; got {file!r}")
    if not path.is_file():
        raise InputError(f"{option}: {file} does not exist")
    try:
        if path.suffix.lower() == ".safetensors":
            state = _safetensors(option).load_file(path)
        else:
            import torch

            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:  # its message is long, with terminal codes
        found = "torch.save did not write it"
        if _is_pickled(path):
            found = (
                "it holds pickled Python objects, a whole model perhaps, and to load them could "
                "run any code. Save the tensors alone: torch.save(model.state_dict(), file)"
            )
        raise InputError(f"{option} {file} cannot be read as tensors: {found}") from error
    except Exception as error:
        told = str(error).splitlines() or ["no message"]
        raise InputError(
            f"{option} {file} cannot be read as tensors (a state_dict saved by torch.save or "
            f"safetensors): {type(error).__name__}: {told[0][:200]}"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # a checkpoint of Lightning and others
    if not isinstance(state, Mapping):
        raise InputError(
            f"{option} {file} must hold a state_dict; got an object of type {type(state).__name__}"
        )
    return dict(state)


def _is_pickled(path: Path) -> bool:
    """Whether a file is one that torch.save writes, now or before PyTorch 1.6, or a pickle."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def write_weights(path: Path, model: "nn.Module") -> None:
    """Write a model's state_dict at once."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, _writer(state, path))


def check_writable(path: Path, model: "nn.Module") -> None:
    """Write a file as large as that of the weights, of zeros, and delete it again.

    Afterwards it is certain that the result can be written: the writer is installed and takes
    these tensors, the folder is writable, and the disk has space.
    """
    import torch

    if path.is_dir():
        raise InputError(f"--output {path} is a folder; expected the name of a file")
    try:
        state = {
            key: torch.zeros_like(value, device="cpu").contiguous()
            for key, value in model.state_dict().items()
        }
        write = _writer(state, path)
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:
            write(file)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"--output {path} cannot be written: {type(error).__name__}: {error}"
        ) from error


def _writer(state: dict[str, Any], path: Path) -> Callable[[IO[bytes]], object]:
    """A function that writes tensors to an open file, in the format of the path's suffix."""
    if path.suffix.lower() == ".safetensors":
        save = _safetensors("--output").save
        copies = {key: value.clone() for key, value in state.items()}  # it refuses shared memory
        return lambda file: file.write(save(copies))
    import torch

    return lambda file: torch.save(state, file)


def _safetensors(option: str) -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise InputError(
            f"{option}: .safetensors needs safetensors: pip install safetensors (or use .pt)"
        ) from None
    return safetensors


def parse_ids(text: str) -> list[int]:
    """The numbers of a request, ascending, each once."""
    source, content = "--forget", text
    if text.startswith("@") or text.endswith(".json"):
        source = f"--forget {text}"
        path = Path(text.removeprefix("@"))
        if not path.is_file():
            raise InputError(f"{source}: {path} does not exist")
        content = path.read_text(encoding="utf-8")
    if text.endswith(".json"):
        try:
            ids = json.loads(content)
        except ValueError as error:
            raise InputError(f"{source} is not JSON: {error}") from None
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{source} must be a list of integers >= 0")
    else:
        ids = []
        for word in re.split(r"[\s,]+", content.strip(" \t\r\n,")):
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", word)
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if first > last:
                raise InputError(
                    f"{source}: expected numbers and ranges, as 3,17,20-40; got {word!r}"
                )
            ids.extend(range(first, last + 1))
    if not ids:
        raise InputError(f"{source} names no sample")
    return sorted(set(ids))


def n_samples(train: Any, model: "nn.Module") -> int:
    """How many samples there are, of any kind of train that `unlearn` takes."""
    import torch

    from lcodec_ext._torch.samples import as_samples

    parameter = next(model.parameters(), torch.zeros(()))
    return len(as_samples(train, "train", parameter.device, torch.float64))


def note_weights(options: argparse.Namespace, console: Console) -> None:
    """Say so where the model is taken as it is made."""
    if not options.weights:  # they may be random, and nothing else would tell
        console.note(f"no --weights: the model as {options.model} makes it")


def check_ids(ids: list[int], n: int) -> None:
    """Refuse a request that names samples beyond the n, or all of them."""
    if ids[-1] >= n:
        raise InputError(f"--forget names sample {ids[-1]}; train has the numbers 0 to {n - 1}")
    if len(ids) == n:
        raise InputError("--forget must leave at least one sample; it names all of train")
