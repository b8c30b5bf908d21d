"""Batches of samples: their forms, and how they are cut and joined."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

SAMPLES = 128  # of one batch, where the package makes the batches

_LABELS = ("labels", "label")
_SHOWN = 4  # types in a message


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and the targets that the loss compares its outputs with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any
    size: int  # samples
    numbers: Any = None  # of the samples in the data that were given, a sequence

    def part(self, samples: slice) -> "Batch":
        """Some samples of the batch."""
        whole = (self.args, self.kwargs, self.targets)
        args, kwargs, targets = part_of(whole, self.size, samples)
        numbers = None if self.numbers is None else self.numbers[samples]
        return Batch(args, kwargs, targets, len(range(self.size)[samples]), numbers)

    @staticmethod
    def joined(batches: "Sequence[Batch]") -> "Batch":
        """The samples of several batches, one after the other."""
        sizes = [batch.size for batch in batches]
        trees = [(batch.args, batch.kwargs, batch.targets) for batch in batches]
        args, kwargs, targets = joined(trees, sizes)
        return Batch(args, kwargs, targets, sum(sizes))

    @property
    def data(self) -> tuple[Any, Any]:
        """The batch as the operators of `lcodec_ext.curvature` take it."""
        return (self.kwargs or self.args), self.targets

    @property
    def kinds(self) -> list[tuple[int, torch.dtype]]:
        """Dimensions and dtype of each tensor."""
        return [(t.ndim, t.dtype) for t in tensors_of((self.args, self.kwargs, self.targets))]


class Batches:
    """The batches of a data set, the same ones on every pass.

    Parameters
    ----------
    data : object
        As `HessianOperator` takes it.
    device : torch.device
        To which tensors are moved.
    dtype : torch.dtype
        Of floating-point tensors.

    Attributes
    ----------
    cut_here : bool
        Whether the batches are cut from tensors or a Dataset, and mean nothing to the caller.
    generators : list of torch.Generator
        That a DataLoader draws from.
    """

    def __init__(self, data: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self.cut_here = False
        self._given: list[tuple[Tensor, int]] = []
        self._first: list[Tensor] = []  # of its first batch
        self.generators: list[torch.Generator] = []
        self._read: Callable[[], Iterable[Any]]
        stream = isinstance(getattr(data, "dataset", data), IterableDataset)
        self._most: float = ENDLESS * (1 if stream else 10)
        self._length = math.inf  # samples of a stream
        if stream and getattr(data, "batch_sampler", data) is not None:
            length = length_of(getattr(data, "dataset", data))
            self._length = math.inf if length is None else length
        elif not stream and length_of(data) is not None:
            self._most = math.inf
        if isinstance(data, DataLoader):
            self._read = lambda: data
            self.generators = _generators(data)
        elif isinstance(data, Dataset) or is_dataset(data) or is_list_of_samples(data):
            self.cut_here = True
            self._read = lambda: _from_dataset(data)
        elif is_batch(data):
            self.cut_here = True
            n = n_samples(data, "data")
            self._given = [(t, t._version) for t in tensors_of(data) if not t.is_inference()]
            self._read = lambda: (
                part_of(data, n, slice(k, k + SAMPLES)) for k in range(0, n, SAMPLES)
            )
        elif isinstance(data, Iterator):
            raise TypeError(
                "data is an iterator, which can be read only once; pass a list of batches, or a "
                f"callable that returns a new iterator (got {type(data).__name__})"
            )
        elif isinstance(data, Iterable) and not isinstance(data, str | bytes | Tensor):
            self._read = lambda: data
        elif callable(data):
            self._read = data
        else:
            raise TypeError(
                "data must be a pair (inputs, targets) of tensors, a dict of tensors with "
                "'labels', a Dataset, a DataLoader, an iterable of such batches or a callable that "
                f"returns one; got an object of type {type(data).__name__}"
            )

    def __iter__(self) -> Iterator[Batch]:
        if any(tensor._version != version for tensor, version in self._given):
            raise ValueError(
                "data were changed in place after the operator was made, and it has to read them "
                "again; make a new operator, or give it copies"
            )
        begin = 0
        for number, batch in enumerate(self._read()):
            name = "data" if self.cut_here else f"batch {number} of data"
            if not is_one_batch(batch):
                raise TypeError(
                    f"{name} must be a pair (inputs, targets) of tensors (torch.as_tensor makes "
                    f"them of arrays) or a dict with 'labels'; got {described(batch)}"
                )
            size = n_samples(batch, name)
            if begin + size > self._length:
                raise ValueError(f"data gives more samples than its length, {self._length:,}")
            if self._length == math.inf and begin >= self._most:
                raise ValueError(endless("data", begin))
            moved = _moved(batch, self._device, self._dtype)
            if number == 0 and not self._given:
                self._check_first(moved)
            made = as_batch(moved, size, name)
            yield replace(made, numbers=range(begin, begin + size))
            begin += size

    def _check_first(self, batch: Any) -> None:
        """Refuse a first batch that is another one than when it was read first."""
        found = [t.clone() for t in tensors_of(batch)]  # a model may write to its inputs
        self._first = self._first or found
        if len(found) != len(self._first) or not all(map(_same, found, self._first)):
            raise ValueError(
                "data must give the same batches each time it is read; the first batch has another "
                "content than before. Give data without random augmentation, or read them once, "
                "list(data)"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _generators(loader: Any) -> list[torch.Generator]:
    parts = (
        loader,
        loader.sampler,
        loader.batch_sampler,
        getattr(loader.batch_sampler, "sampler", None),
    )
    found = {id(g): g for part in parts if (g := getattr(part, "generator", None)) is not None}
    return list(found.values())


def is_batch(data: Any) -> bool:
    """Whether data is one batch, and not a collection of them."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, tuple | list) and len(data) > 1 and isinstance(data[-1], Tensor)


def is_one_batch(data: Any) -> bool:
    """Whether data is a batch where only a batch is allowed: its targets may be nested."""
    return is_batch(data) or (
        isinstance(data, tuple | list)
        and len(data) > 1
        and all(next(tensors_of(part), None) is not None for part in data)
    )


def is_dataset(data: Any) -> bool:
    """Whether data has a length and is indexed as a Dataset is, and is nothing else."""
    known = Mapping | tuple | list | str | bytes | range | Tensor | np.ndarray
    table = hasattr(data, "iloc") or hasattr(data, "columns")
    indexed = hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")
    if not indexed or table or isinstance(data, known):
        return False
    return not hasattr(type(data), "__iter__") or (len(data) > 0 and is_sample(data[0]))


def is_list_of_samples(data: Any) -> bool:
    """Whether data is a list of samples, (input, target) or dicts, and not of batches."""
    return (
        isinstance(data, tuple | list)
        and len(data) > 0
        and all(isinstance(each, tuple | list | Mapping) for each in data)
        and any(is_sample(each) for each in data[:_SHOWN])
    )


def is_sample(value: Any) -> bool:
    """Whether a value is one sample and no batch: its parts have no first axis in common."""
    if not isinstance(value, tuple | list | Mapping):
        return False
    parts = list(value.values() if isinstance(value, Mapping) else value)
    lengths = set()
    for part in parts:
        if isinstance(part, tuple | list | Mapping):
            if is_sample(part):
                return True
            continue
        if not isinstance(part, Tensor | np.ndarray) or part.ndim == 0:
            return True
        lengths.add(len(part))
    return len(lengths) > 1


#: Samples of data without a length after which nobody expects an end, and what they may take.
ENDLESS = 1_000_000
ENDLESS_BYTES = 8 * 2**30


def length_of(data: Any) -> int | None:
    """len(data), None without one."""
    try:
        return len(data)
    except TypeError:
        return None


def endless(name: str, n: int, size: int = 0) -> str:
    """What to do with data that do not end."""
    after = f"{n:,} samples" + (f" of {size / 2**30:.2g} GiB" if size > ENDLESS_BYTES else "")
    return (
        f"{name} has no length and has not ended after {after}: give it a __len__, or pass "
        "the samples that you mean, list(itertools.islice(data, n)) for instance"
    )


def as_batch(batch: Any, size: int, name: str) -> Batch:
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        for key in _LABELS:
            if key in inputs:
                return Batch((), inputs, inputs.pop(key), size)
        raise ValueError(f"{name} must have 'labels' among its keys; got {list(inputs)}")
    *args, targets = batch
    if len(args) == 1 and isinstance(args[0], Mapping):
        return Batch((), dict(args[0]), targets, size)
    if len(args) == 1 and isinstance(args[0], tuple | list):
        args = list(args[0])
    return Batch(tuple(args), {}, targets, size)


def _from_dataset(dataset: Any) -> Iterator[Any]:
    return iter(DataLoader(dataset, SAMPLES, collate_fn=default_collate))


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors_of(value)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        made = {key: map_tensors(function, value) for key, value in tree.items()}
        return made if type(tree) is dict else _like(tree, made)
    if isinstance(tree, tuple | list):
        values = [map_tensors(function, value) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return tuple(values) if isinstance(tree, tuple) else values
    return tree


def _like(tree: Any, made: dict[str, Any]) -> Any:
    try:
        return type(tree)(**made)  # the outputs of transformers
    except TypeError:
        return made


def n_samples(batch: Any, name: str) -> int:
    first = next(tensors_of(batch), None)
    if first is None or first.ndim == 0:
        raise ValueError(f"{name} must hold tensors with samples along their first axis")
    if len(first) == 0:
        raise ValueError(f"{name} is empty: its first tensor has shape {tuple(first.shape)}")
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in _LABELS if key in batch), None)
    else:
        targets = batch[-1]
    if isinstance(targets, Tensor) and targets.ndim and len(targets) != len(first):
        raise ValueError(f"{name} has {len(first)} inputs and {len(targets)} targets")
    return len(first)


def part_of(tree: Any, n: int, samples: slice | Tensor) -> Any:
    """Some of n samples: of each tensor whose first axis has n entries, a slice or the numbers."""

    def part(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != n:
            return tensor
        return tensor[samples if isinstance(samples, slice) else samples.to(tensor.device)]

    return map_tensors(part, tree)


def joined(trees: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The samples of several trees of one structure, one after the other.

    Tensors whose first axes are not the sizes are taken from the first tree.
    """
    columns = zip(*(list(tensors_of(tree)) for tree in trees), strict=True)

    def join(tensor: Tensor) -> Tensor:
        column = next(columns)
        if all(t.ndim and len(t) == size for t, size in zip(column, sizes, strict=True)):
            return torch.cat(column)
        return tensor

    return map_tensors(join, trees[0])


def _moved(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    def move(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            raise TypeError(f"data must be real; got a tensor of {tensor.dtype}")
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        # A copy: what is kept does not change when the caller's tensor does.
        return tensor.detach().to(device, wanted, copy=True)

    return map_tensors(move, tree)


def described(value: Any) -> str:
    """Describe in a few words what was given instead of a batch."""
    if isinstance(value, Tensor):
        return f"a single tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        kinds = [type(part).__name__ for part in value[:_SHOWN]]
        more = f", ... {len(value):,} values" if len(value) > _SHOWN else ""
        return f"({', '.join(kinds)}{more})"
    return f"an object of type {type(value).__name__}"
