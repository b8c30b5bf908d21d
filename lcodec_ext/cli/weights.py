"""Weights of models in .pt and .safetensors files."""

import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lcodec_ext._files import write_atomically
from lcodec_ext.cli.console import InputError

if TYPE_CHECKING:
    from torch import nn

_HOLDERS = ("state_dict", "model_state_dict", "model")  # in checkpoints of training loops
SUFFIXES = (".pt", ".pth", ".safetensors")
_READ = (*SUFFIXES, ".ckpt", ".bin")  # of Lightning, and of transformers


def read_weights(file: str, option: str) -> dict[str, Any]:
    """The state_dict in a file, on the CPU. Only tensors are loaded, never other objects."""
    path = Path(file)
    if path.suffix.lower() not in _READ:
        raise InputError(f"{option} must be a file ending in {' or '.join(_READ)}; got {file!r}")
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
                "it holds pickled Python objects, perhaps a whole model, and loading them could "
                "run any code. Save the tensors alone: torch.save(model.state_dict(), file)"
            )
        raise InputError(f"{option} {file} cannot be read as tensors: {found}") from error
    except Exception as error:
        told = str(error).splitlines() or ["no message"]
        raise InputError(
            f"{option} {file} cannot be read as tensors (a state_dict saved by torch.save or "
            f"safetensors): {type(error).__name__}: {told[0][:200]}"
        ) from error
    if isinstance(state, Mapping):
        held = (state.get(key) for key in _HOLDERS)
        state = next((each for each in held if isinstance(each, Mapping)), state)
    if not isinstance(state, Mapping):
        raise InputError(
            f"{option} {file} must hold a state_dict; got an object of type {type(state).__name__}"
        )
    return dict(state)


def _is_pickled(path: Path) -> bool:
    """Whether a file is a pickle, or one that torch.save writes now or wrote before PyTorch 1.6."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def write_weights(path: Path, model: "nn.Module") -> None:
    """Write the state_dict of a model, as a whole or not at all."""
    write_atomically(path, _writer(model.state_dict(), path))


def check_writable(path: Path, model: "nn.Module") -> None:
    """Write a file of zeros as large as the weights, and delete it again.

    Afterwards it is certain that the result can be written: the writer is installed and takes
    these tensors, the folder is writable, and the disk has space.
    """
    import torch

    try:
        zeros = {key: torch.zeros_like(t, device="cpu") for key, t in model.state_dict().items()}
        write = _writer(zeros, path)
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
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
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
