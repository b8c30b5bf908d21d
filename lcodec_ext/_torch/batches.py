"""Batches of samples: their forms, and how they are cut and joined."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lcodec_ext._checks import first_few
from lcodec_ext._torch.detours import cast_forward
from lcodec_ext._torch.inputs import TextsError, beyond_the_model, by_name

SAMPLES = 128  # of one batch, where the package makes the batches

_COMPARED = 32  # batches that must be the same ones whenever they are read
_LABELS = ("labels", "label", "label_ids")  # as transformers calls them
_SHIFT = "prepare_decoder_input_ids_from_labels"  # of models of transformers
_DECODER = {"decoder_input_ids", "decoder_inputs_embeds"}  # inputs of a decoder
_SHOWN, _KEYS = 4, 8  # types, and keys, in a message


#: What to do with samples of other forms.
SAMPLES_ARE = (
    "A sample is a pair (input, target) of tensors, arrays or numbers, or a dict with 'labels'. Of "
    "samples with more entries, such as (x, y, id), pass "
    "DataLoader(data, collate_fn=lambda rows: default_collate([(x, y) for x, y, *_ in rows])); of "
    "dicts [(row['x'], row['y']) for row in rows], with the keys that they have"
)

#: What to do with rows of texts, as tokenizers and `datasets` give them.
ROWS_ARE = (
    "A row is a dict with 'labels', whose lists are as long in all rows. Of rows of unequal length "
    "pass DataLoader(data, collate_fn=DataCollatorWithPadding(tokenizer)), or the collator of the "
    "training. Take columns out that the model does not read, as by data.remove_columns. "
    "trainer.get_eval_dataloader(data) does both"
)


class NoSamplesError(ValueError):
    """There is no sample, as on a rank of a process group that has none of its own."""


class InputsError(TypeError):
    """The model does not take the inputs that the samples have."""


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

    def named(self, model: nn.Module) -> "Batch":
        """The batch by the names that a model has for its inputs: to look at, not to call with.

        An "attention_mask" that is passed by its position is then known as one.
        """
        named = by_name(model, self.args, self.kwargs)
        return self if named is None else replace(self, args=(), kwargs=named)

    def outputs(self, model: nn.Module) -> Any:
        """What a model returns; where it takes other inputs, say how to leave some out."""
        first = next(tensors_of((self.args, self.kwargs)), None)
        try:
            with cast_forward("cpu" if first is None else first.device.type) as cast:
                outputs = model(*self.args, **self.kwargs, **self._for_decoder(model))
            check_recorded(outputs)
            return map_tensors(widened, getattr(outputs, "logits", outputs)) if cast else outputs
        except ValueError as error:
            if hasattr(model, _SHIFT) or not self._lacks_decoder_inputs(model):
                raise
            raise InputsError(
                f"{error}. {type(model).__name__} is an encoder-decoder and has no {_SHIFT} to "
                "make its decoder's inputs of the labels: put 'decoder_input_ids' into every "
                "sample, the labels shifted to the right by one, with the start token first and "
                "padding in the place of -100"
            ) from error
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError) as error:
            beyond = beyond_the_model(model, self.args, self.kwargs)
            if beyond:
                raise TextsError(f"{error}. {beyond}") from error
            if "same dtype" not in str(error):
                raise
            raise ValueError(
                f"{error}. The package computes with copies of the weights in float32, or float64: "
                "let the forward pass convert its inputs to the dtype of the weights, "
                "x.to(self.layer.weight.dtype), and not to one that is written down"
            ) from error
        except TypeError as error:
            if len(self.args) + len(self.kwargs) < 2:
                raise
            inputs = (
                f"the keywords {list(self.kwargs)}" if self.kwargs else f"{len(self.args)} inputs"
            )
            columns = (
                " Leave columns out that it does not take, as by data.remove_columns."
                if self.kwargs
                else ""
            )
            raise InputsError(
                f"{error}. The model was called with {inputs}.{columns} {SAMPLES_ARE}"
            ) from error

    def _lacks_decoder_inputs(self, model: nn.Module) -> bool:
        """Whether an encoder-decoder of transformers is to make its decoder's inputs of labels."""
        config = getattr(model, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or not self.kwargs:
            return False
        if self.kwargs.keys() & _DECODER or not isinstance(self.targets, Tensor):
            return False
        return self.targets.ndim == 2 and not self.targets.is_floating_point()

    def _for_decoder(self, model: nn.Module) -> dict[str, Tensor]:
        """What it makes of them by itself where labels are passed, which they are not here."""
        shift = getattr(model, _SHIFT, None)
        if shift is None or not self._lacks_decoder_inputs(model):
            return {}
        return {"decoder_input_ids": shift(labels=self.targets)}

    @property
    def kinds(self) -> list[tuple[int, torch.dtype]]:
        """Dimensions and dtype of each tensor."""
        return [(t.ndim, t.dtype) for t in tensors_of((self.args, self.kwargs, self.targets))]


def check_recorded(outputs: Any) -> None:
    """Refuse outputs of torch.inference_mode where gradients are wanted."""
    if torch.is_grad_enabled() and any(t.is_inference() for t in tensors_of(outputs)):
        raise ValueError(
            "the forward pass of the model is under torch.inference_mode, through which no "
            "gradient goes; put the call of the model under it instead, where it is used"
        )


def widened(tensor: Tensor) -> Tensor:
    """In float32, if it is of half the precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


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
        self._seen: list[list[Content]] = []  # of the first batches, when they were read first
        self.generators: list[torch.Generator] = []
        self._read: Callable[[], Iterable[Any]]
        self._length = Length.of(data)
        check_not_columns(data, "data")
        if isinstance(data, DataLoader):
            self._read = lambda: _from_loader(data)
            self.generators = _generators(data)
        elif isinstance(data, Dataset) or is_dataset(data) or is_list_of_samples(data):
            self.cut_here = True
            self._read = lambda: _from_dataset(data)
        elif is_batch(data):
            self.cut_here = True
            n = n_samples(data, "data")
            self._length = Length(n)
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
            self._length.check("data", begin, number)
            name = "data" if self.cut_here else f"batch {number} of data"
            if not is_one_batch(batch):
                raise TypeError(
                    f"{name} must be a pair (inputs, targets) of tensors (torch.as_tensor makes "
                    f"them of arrays) or a dict with 'labels'; got {described(batch)}. "
                    f"{SAMPLES_ARE}"
                )
            size = n_samples(batch, name)
            self._length.check("data", begin + size)
            if number < _COMPARED and not self._given:
                self._compare(batch, number)
            made = as_batch(_moved(batch, self._device, self._dtype), size, name)
            yield replace(made, numbers=range(begin, begin + size))
            begin += size

    def _compare(self, batch: Any, number: int) -> None:
        """Refuse a batch that is another one than when it was read first."""
        found = [content_of(t) for t in tensors_of(batch)]
        if number == len(self._seen):
            self._seen.append(found)
        elif found != self._seen[number]:
            raise ValueError(
                f"data must give the same batches each time it is read; batch {number} has another "
                "content than before. Give data without random augmentation, or read them once, "
                "list(data)"
            )


Content = tuple[torch.Size, torch.dtype, int]


def content_of(tensor: Tensor) -> Content:
    """Shape, dtype and a checksum of the entries."""
    plain = tensor.detach().cpu()
    plain = plain if plain.layout == torch.strided else plain.to_dense()
    entries = plain.contiguous().reshape(-1).view(torch.uint8).numpy()
    return tensor.shape, tensor.dtype, zlib.crc32(entries.data)


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


def check_not_columns(data: Any, name: str) -> None:
    """Refuse inputs and targets as lists: ([x0, x1, ...], [y0, y1, ...])."""
    parts = data if isinstance(data, tuple | list) else ()
    if not parts or not all(isinstance(each, tuple | list) and each for each in parts):
        return
    first, last = parts[0], parts[-1]
    if len(first) == len(last) and _is_number(last[0]) and not _is_number(first[0]):
        raise TypeError(
            f"{name} must give pairs (inputs, targets) of tensors; got {described(data)}: pass "
            "(torch.as_tensor(inputs), torch.as_tensor(targets)), or torch.stack of lists of "
            "tensors"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 0
    return isinstance(value, int | float | np.number)


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
with suppress(AttributeError, ValueError, OSError):  # or half of the memory, where it is known
    _MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    ENDLESS_BYTES = min(ENDLESS_BYTES, _MEMORY // 2) if _MEMORY > 0 else ENDLESS_BYTES


def length_of(data: Any) -> int | None:
    """len(data), None without one."""
    try:
        return len(data)
    except TypeError:
        return None


class Length(NamedTuple):
    """How many samples, or batches, data say that they have; None where they do not say."""

    samples: int | None = None
    batches: int | None = None
    most: int = 0  # samples after which nobody expects an end

    @classmethod
    def of(cls, data: Any) -> "Length":
        """Of a stream of samples, of a DataLoader, or of an iterable of batches."""
        source = getattr(data, "dataset", data) if isinstance(data, DataLoader) else data
        if not isinstance(source, IterableDataset):
            return cls(batches=length_of(data), most=10 * ENDLESS)
        if isinstance(data, DataLoader) and data.batch_sampler is None:  # its batches are its own
            return cls(batches=length_of(source), most=ENDLESS)
        return cls(length_of(source), most=ENDLESS)

    def check(self, name: str, samples: int, batches: int = 0, size: int = 0) -> None:
        """Refuse what comes after the end, where there is one.

        Parameters
        ----------
        name : str
            Of the argument.
        samples, batches : int
            That were read; of batches, that another one follows.
        size : int, default 0
            Bytes that they take, if they are kept.
        """
        if self.samples is not None and samples > self.samples:
            raise ValueError(f"{name} gives more samples than its length, {self.samples:,}")
        if self.batches is not None and batches >= self.batches:
            raise ValueError(f"{name} gives more batches than its length, {self.batches:,}")
        if self.samples is not None or self.batches is not None:
            return
        if samples > self.most or size > ENDLESS_BYTES:
            of = f" of {size / 2**30:.2g} GiB" if size > ENDLESS_BYTES else ""
            raise ValueError(
                f"{name} has no length and has not ended after {samples:,} samples{of}: give it a "
                "__len__, or pass the samples that you mean, list(itertools.islice(data, n)) for "
                "instance"
            )


def as_batch(batch: Any, size: int, name: str) -> Batch:
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        for key in _LABELS:
            if key in inputs:
                return Batch((), inputs, inputs.pop(key), size)
        raise ValueError(
            f"{name} must have 'labels' among its keys; got {list(inputs)}. {SAMPLES_ARE}"
        )
    *args, targets = batch
    if len(args) == 1 and isinstance(args[0], Mapping):
        return Batch((), dict(args[0]), targets, size)
    if len(args) == 1 and isinstance(args[0], tuple | list):
        args = list(args[0])
    return Batch(tuple(args), {}, targets, size)


def _from_loader(loader: Any) -> Iterator[Any]:
    try:
        yield from loader
    except TypeError as error:
        if default_collate.__name__ not in str(error):
            raise
        raise TypeError(
            f"the samples of data do not make a batch: {error}. {SAMPLES_ARE}"
        ) from error


def _from_dataset(dataset: Any) -> Iterator[Any]:
    def collate(rows: list[Any]) -> Any:
        return collated(rows, plain_collate, "data", None)

    return iter(DataLoader(dataset, SAMPLES, collate_fn=collate))


def plain_collate(rows: list[Any]) -> Any:
    """`default_collate`, of rows in which lists of numbers in dicts are tensors.

    Tokenizers and `datasets` give such lists, which would be taken apart.
    """
    return default_collate([_with_tensors(row) for row in rows])


def _with_tensors(row: Any) -> Any:
    if isinstance(row, Mapping):
        return {key: _as_tensor(value) for key, value in row.items()}
    if type(row) in (tuple, list):
        return type(row)(_with_tensors(each) if isinstance(each, Mapping) else each for each in row)
    return row


def _as_tensor(value: Any) -> Any:
    """Lists of numbers, nested or not, as a tensor; anything else as it is."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if first is value or not isinstance(first, int | float | np.number):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # ragged, or of other things, too
        return value


def collated(
    rows: list[Any], collate: Callable[[list[Any]], Any], name: str, first: int | None
) -> Any:
    """Some samples of a Dataset as a batch; the number of the first one is for messages."""
    which = "a sample" if first is None else f"sample {first}"
    advice = ROWS_ARE if isinstance(rows[0], Mapping) else SAMPLES_ARE
    try:
        data = collate(rows)
    except (TypeError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"the samples of {name} do not make a batch: {error}. {which.capitalize()} is "
            f"{described(rows[0])}. {advice}"
        ) from error
    if not is_one_batch(data):
        raise TypeError(
            f"{name} must be a Dataset of pairs (input, target), or of dicts with 'labels'; "
            f"{which} is {described(rows[0])}. {advice}"
        )
    return data


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
        raise ValueError(
            f"{name} must hold tensors with samples along their first axis; torch.as_tensor makes "
            "them of lists"
        )
    if len(first) == 0:
        raise NoSamplesError(f"{name} is empty: its first tensor has shape {tuple(first.shape)}")
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
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {first_few([*map(repr, value)], _KEYS)}"
    return f"an object of type {type(value).__name__}"
