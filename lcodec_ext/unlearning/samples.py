"""Samples as a pair of tensors, whatever they were given as."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)


class Samples(NamedTuple):
    """Inputs and targets, samples along the first axis; floating ones in float64."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def chunks(self, size: int) -> "list[Samples]":
        """Cut into consecutive pieces of at most size samples."""
        pairs = zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True)
        return [Samples(*pair) for pair in pairs]


def as_samples(data: Any, name: str, device: torch.device) -> Samples:
    """Materialise (inputs, targets), a Dataset or a DataLoader, and check it.

    Parameters
    ----------
    data : tuple of two tensors, torch Dataset of (input, target), or torch DataLoader of batches
    name : str
        Of the argument, for messages.
    device : torch.device
        Where the tensors must be: the model's.
    """
    if isinstance(data, DataLoader):
        inputs, targets = _from_loader(data, name)
    elif isinstance(data, Dataset):
        inputs, targets = _from_dataset(data, name)
    elif isinstance(data, (tuple, list)):
        inputs, targets = _pair(data, name)
    else:
        raise TypeError(
            f"{name} must be a pair (inputs, targets) of tensors, a Dataset or a DataLoader; got "
            f"an object of type {type(data).__name__}"
        )
    for what, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor.ndim == 0:
            raise ValueError(f"the {what} of {name} must have samples along their first axis")
        if tensor.is_complex():
            raise TypeError(f"the {what} of {name} must be real; got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(
                f"the {what} of {name} are on {tensor.device} and the model is on {device}; "
                "nothing is copied unasked, move them with .to()"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the {what} of {name} hold NaN or infinity")
    if len(inputs) != len(targets):
        raise ValueError(f"{name} has {len(inputs)} inputs and {len(targets)} targets")
    if len(inputs) == 0:
        raise ValueError(f"{name} is empty")
    return Samples(_double(inputs), _double(targets))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def _pair(data: Any, name: str) -> tuple[Tensor, Tensor]:
    if len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        given = ", ".join(type(part).__name__ for part in data)
        raise TypeError(f"{name} must give pairs (inputs, targets) of tensors; got ({given})")
    return data[0], data[1]


def _from_dataset(dataset: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, IterableDataset):
        items = list(dataset)
    else:
        items = [dataset[i] for i in range(len(dataset))]
    if not items:
        raise ValueError(f"{name} is empty")
    if not isinstance(items[0], (tuple, list)) or len(items[0]) != 2:
        raise TypeError(f"{name} must be a Dataset of pairs (input, target)")
    return _pair(default_collate(items), name)


def _from_loader(loader: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(loader.sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError(f"{name} must come in a fixed order; make its DataLoader without shuffle")
    if loader.drop_last:
        raise ValueError(f"{name} must be complete; make its DataLoader without drop_last")
    batches = [_pair(batch, name) for batch in loader]
    if not batches:
        raise ValueError(f"{name} is empty")
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)
