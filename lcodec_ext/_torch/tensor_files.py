"""Tensors and texts by name, in safetensors files."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from lcodec_ext._files import file_path, file_to_read, write_atomically


def write_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors, whole or not at all."""
    file_path(path)  # before anything is copied
    copies = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_atomically(path, _safetensors().save(copies, dict(metadata)))


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata; ValueError for a file that holds something else."""
    safetensors = _safetensors()
    file_to_read(path)
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            # Copies: in the file, numbers are not where vector instructions want them.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # of a kind of its own
        raise ValueError(f"{path!s} is not a safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError:
        raise ImportError("this needs safetensors: pip install safetensors") from None
    return safetensors
