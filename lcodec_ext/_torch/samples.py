"""Training samples by number, in whatever form they were given."""

import hashlib
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lcodec_ext._torch.batches import (
    Batch,
    InputsError,
    Length,
    NoSamplesError,
    as_batch,
    check_not_columns,
    collated,
    described,
    is_dataset,
    is_list_of_samples,
    is_one_batch,
    joined,
    length_of,
    map_tensors,
    n_samples,
    part_of,
    plain_collate,
    tensors_of,
)
from lcodec_ext._torch.faults import check_finite
from lcodec_ext._torch.modes import set_modes, undisturbed

Indices = Sequence[int] | slice
_HASHED = 1 << 26  # bytes that are hashed at a time
_SIZED = 8  # samples that tell how much all take
_PROBE, _READINGS = 32, 3  # samples that are read so often, to see whether they change
_FEWEST = 24  # readings of all of them together
_DRAWN_ONCE = (
    ". If collate_fn draws, as one that masks words at random, let it draw once: pass batch = "
    "collate_fn([data[i] for i in range(len(data))]), and of this {key: value[numbers] for key, "
    "value in batch.items()}"
)


class Source(NamedTuple):
    """Where single samples come from, and what makes them a batch."""

    get: Callable[[int], Any]
    collate: Callable[[list[Any]], Any]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples that are fetched by number, on a device and in a floating-point type."""

    n: int
    get: Callable[[list[int]], Any]  # from numbers below n to a batch as the user gives it
    device: torch.device
    dtype: torch.dtype  # of floating-point tensors
    name: str  # of the argument they came from, for messages
    in_memory: bool  # fetching is only indexing
    resident: bool  # all samples are in memory, those of a Dataset included
    source: Source | None = None  # of a Dataset
    numbers: NDArray[np.int64] | None = None  # in the data that were given; None if they are these
    cut: Sequence[Batch] | None = None  # all of them in batches, where these are kept

    def __len__(self) -> int:
        return self.n

    # Of samples that are spread over ranks (`ShardedSamples`) these are another matter.

    @property
    def own(self) -> "Samples":
        """Those that are here."""
        return self

    @property
    def places(self) -> NDArray[np.int64]:
        """The numbers of those that are here, among all."""
        return np.arange(self.n)

    @property
    def first(self) -> bool:
        """Whether what is added once, whoever has samples, is added here."""
        return True

    def whole(self) -> "Samples":
        """All of them, here."""
        return self

    def told(self, measure: "Callable[[Samples], float]") -> float:
        """A number of all of them together, which is no sum."""
        return measure(self)

    def summed(
        self,
        what: str,
        own: Callable[[], Sequence[Tensor]],
        like: Sequence[Tensor],
        *,
        given: Sequence[Tensor] = (),
        same: tuple[type[Exception], ...] = (),
    ) -> Sequence[Tensor]:
        """Sums over all of them, from those of `own`; as `Ranks.total`."""
        return own()

    def stacked(
        self,
        what: str,
        own: Callable[[], Sequence[Tensor | None]],
        same: tuple[type[Exception], ...] = (),
    ) -> Sequence[Tensor | None]:
        """Tensors with an entry for each of them, from those of `own`; None where any is."""
        return own()

    def fetch(self, indices: Indices) -> Batch:
        """Fetch some samples as one batch."""
        if isinstance(indices, slice):
            indices = range(self.n)[indices]
        data = self.get([int(i) for i in indices])

        def move(tensor: Tensor) -> Tensor:
            wanted = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(self.device, wanted)

        numbers = np.asarray(indices, dtype=np.int64)
        numbers = numbers if self.numbers is None else self.numbers[numbers]
        made = as_batch(map_tensors(move, data), len(indices), self.name)
        return replace(made, numbers=numbers)

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """Fetch all samples, or those of order, in batches of at most size."""
        if order is None and self.cut is not None:
            yield from self.cut
            return
        numbers: Sequence[int] = range(self.n) if order is None else order
        for start in range(0, len(numbers), size):
            yield self.fetch(numbers[start : start + size])

    def data(self, size: int) -> Callable[[], Iterator[Any]]:
        """All samples as what the operators of `lcodec_ext.curvature` take for data."""
        return lambda: (batch.data for batch in self.batches(size))

    def subset(self, indices: Indices) -> "Samples":
        """Some of the samples, in the order given and numbered from 0."""
        numbers = range(self.n)[indices] if isinstance(indices, slice) else indices
        kept = np.asarray(numbers, dtype=np.int64)

        def fetch(some: list[int]) -> Any:
            return self.get(kept[some].tolist())

        source = self.source
        if source is not None:
            one = source.get
            source = source._replace(get=lambda i: one(int(kept[i])))
        given = kept if self.numbers is None else self.numbers[kept]
        return replace(self, n=len(kept), get=fetch, source=source, numbers=given, cut=None)

    def kept(self, size: int, most: int) -> "Samples":
        """The same samples, in batches that are fetched once where they take at most so much."""
        if not self.n:
            return self
        some = range(0, self.n, max(1, self.n // _SIZED))[:_SIZED]  # texts are of unequal length
        if self.n * sum(t.nbytes for t in tensors_of(self.fetch(some).data)) > most * len(some):
            return self
        return replace(self, cut=list(self.batches(size)))

    def loaded(self) -> "Samples":
        """The same samples in memory, where fetching them is more than indexing."""
        if self.in_memory or not self.n:
            return self
        data = self.fetch(slice(None)).data
        return replace(
            self,
            get=lambda some: part_of(data, self.n, torch.as_tensor(some)),
            in_memory=True,
            resident=True,
        )

    def and_others(self, others: "Samples") -> "Samples":
        """These samples and others, one after the other."""
        return Samples.joined([self, others])

    @staticmethod
    def joined(parts: "Sequence[Samples]") -> "Samples":
        """The samples of several sets, one after the other.

        Samples of Datasets are collated together where their separate batches differ in shape,
        as texts of unequal length do.
        """
        first = parts[0]
        starts = np.cumsum([0, *map(len, parts)])

        def fetch(some: list[int]) -> Any:
            numbers = np.asarray(some)
            owner = np.searchsorted(starts, numbers, side="right") - 1
            within = numbers - starts[owner]
            sizes = np.bincount(owner, minlength=len(parts))
            pieces = [
                parts[k].fetch(within[owner == k].tolist()).data
                for k in np.flatnonzero(sizes).tolist()
            ]
            shapes = [[t.shape[1:] for t in tensors_of(piece)] for piece in pieces]
            if all(shape == shapes[0] for shape in shapes):
                back = np.argsort(np.argsort(owner, kind="stable"))
                together = joined(pieces, sizes[sizes > 0].tolist())
                return part_of(together, len(some), torch.from_numpy(back))
            sources = [part.source for part in parts]
            if sources[0] is None or None in sources:
                names = " and ".join(dict.fromkeys(part.name for part in parts))
                raise ValueError(
                    f"samples of {names} must fit in one batch, and their tensors have the shapes "
                    f"{shapes} (without the first axis); give tensors of one shape (texts "
                    "padded to one length, as by padding='max_length'), or a DataLoader whose "
                    "collate_fn pads"
                )
            data = sources[0].collate(
                [sources[k].get(i) for k, i in zip(owner.tolist(), within.tolist(), strict=True)]
            )
            _check(data, first.name, len(some))
            return data

        memory = all(part.in_memory for part in parts)
        return replace(
            first,
            n=int(starts[-1]),
            get=fetch,
            source=None,
            in_memory=memory,
            resident=memory,
            numbers=np.concatenate([_numbers(part) for part in parts]),
            cut=None,
        )

    def hashes(self, indices: Indices = slice(None)) -> list[str]:
        """SHA-256 of each sample: dtype, shape and bytes of its tensors, in order."""
        return list(self.each_hash(indices))

    def each_hash(self, indices: Indices = slice(None)) -> Iterator[str]:
        """`hashes` of any number of samples, one at a time, in little memory."""
        numbers = range(self.n)[indices] if isinstance(indices, slice) else indices
        size = 1
        if self.in_memory and len(numbers) > 1:  # a Dataset might collate several otherwise
            one = self.get([int(numbers[0])])
            size = max(1, _HASHED // max(1, sum(t.nbytes for t in tensors_of(one))))
        for start in range(0, len(numbers), size):
            some = [int(i) for i in numbers[start : start + size]]
            yield from _hashes(self.get(some), len(some))


def _numbers(samples: Samples) -> NDArray[np.int64]:
    return np.arange(samples.n) if samples.numbers is None else samples.numbers


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """Call a model on a batch; of the outputs of transformers, the logits."""
    outputs = batch.outputs(model)
    return getattr(outputs, "logits", outputs)


# Of models that were called in training mode: which of their outputs is that of evaluation mode.
_MAIN: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
_ALL = object()


class NotTrainedError(ValueError):
    """Mini-batches do not train this model, or its outputs cannot be led."""


def outputs_in_training(model: nn.Module, batch: Batch) -> Any:
    """`outputs_of` of a model that is trained.

    Of one that returns more in training mode, this is what it returns in evaluation mode;
    NotTrainedError where the outputs of both modes are unlike.
    """
    if not model.training:
        return outputs_of(model, batch)
    if model not in _MAIN:
        try:
            with undisturbed(model):
                _MAIN[model] = _main_output(model, batch)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            if isinstance(error, InputsError):
                raise
            if isinstance(error, NotTrainedError | torch.cuda.OutOfMemoryError):
                raise
            raise NotTrainedError(
                f"the model fails in training mode, where it works in evaluation mode: {error}"
            ) from error
    outputs, main = outputs_of(model, batch), _MAIN[model]
    return outputs if main is _ALL else outputs[main]


def _main_output(model: nn.Module, batch: Batch) -> Any:
    """The key of the output in training mode that is the one in evaluation mode."""
    set_modes(model, lambda module: False)
    wanted = outputs_of(model, batch)
    set_modes(model, lambda module: True)
    found = outputs_of(model, batch)
    if _shapes(found) == _shapes(wanted):
        return _ALL
    # With layers at rest that compute otherwise in training mode, the values tell which it is.
    set_modes(model, lambda module: False)
    wanted = outputs_of(model, batch)  # again: the pass above has changed running statistics
    set_modes(model, lambda module: not type(module).__module__.startswith("torch.nn."))
    found = outputs_of(model, batch)
    if isinstance(found, Mapping):
        parts = list(found.items())
    else:
        parts = list(enumerate(found)) if isinstance(found, tuple | list) else []
    for key, part in parts:
        if _shapes(part) == _shapes(wanted) and all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)
            for a, b in zip(tensors_of(part), tensors_of(wanted), strict=True)
        ):
            return key
    raise NotTrainedError(
        f"the model returns {described(found)} in training mode and {described(wanted)} in "
        "evaluation mode, and none of the former is the latter. Let it return the same in both"
    )


def _shapes(outputs: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(outputs)]


def working_dtype(model: nn.Module) -> torch.dtype:
    """float64 for models with trainable parameters in it, else float32."""
    double = any(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
    return torch.float64 if double else torch.float32


def _hashes(data: Any, n: int) -> Iterator[str]:
    """SHA-256 of each of n samples that were fetched together."""
    columns = []
    for tensor in tensors_of(data):
        value = tensor.detach().cpu().contiguous()
        head = f"{value.dtype} {tuple(value.shape[1:])};".encode()
        rows = value.view(n, math.prod(value.shape[1:])).view(torch.uint8).numpy()
        columns.append((head, rows))
    for k in range(n):
        digest = hashlib.sha256()
        for head, rows in columns:
            digest.update(head)
            digest.update(rows[k].data)
        yield digest.hexdigest()


def as_samples(data: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    """Take samples as they were given, and check them.

    Parameters
    ----------
    data : tensors, Dataset or DataLoader
        (inputs, targets), (input, ..., input, targets), a dict of tensors with "labels", a Dataset
        of such samples, or a DataLoader: every sample of its Dataset is taken once, collated as the
        loader does.
    name : str
        Of the argument, for messages.
    device : torch.device
        The model's. Tensors must be there; what a Dataset gives is moved.
    dtype : torch.dtype
        To which floating-point tensors are converted when fetched.
    """
    if isinstance(data, Samples):
        return data
    if isinstance(data, DataLoader):
        return _from_loader(data, name, device, dtype)
    check_not_columns(data, name)
    if isinstance(data, Dataset) or is_dataset(data) or is_list_of_samples(data):
        return _from_dataset(data, plain_collate, name, device, dtype)
    if not isinstance(data, Mapping | tuple | list):
        raise TypeError(
            f"{name} must be a pair (inputs, targets) of tensors, a dict of tensors with 'labels', "
            f"a Dataset or a DataLoader; got {described(data)}{_advice(data)}"
        )
    if isinstance(data, list) and len(data) > 2 and all(map(is_one_batch, data)):
        raise TypeError(
            f"{name} is a list of {len(data):,} batches; pass one pair of all samples, "
            "(torch.cat([x for x, y in batches]), torch.cat([y for x, y in batches])), a Dataset "
            "or a DataLoader"
        )
    mixed = not isinstance(data, Mapping) and any(isinstance(part, np.ndarray) for part in data)
    if mixed or not is_one_batch(data):
        raise TypeError(
            f"{name} must give pairs (inputs, targets) of tensors; got {described(data)}"
            f"{_advice(data)}"
        )
    return _in_memory(data, name, device, dtype)


def _advice(data: Any) -> str:
    """What to do where numbers or arrays were given for samples."""
    parts = data if isinstance(data, tuple | list | range | set | frozenset) else ()
    if isinstance(data, Tensor | np.ndarray):
        whole = str(data.dtype).removeprefix("torch.").startswith(("int", "uint", "bool"))
        by_number = data.ndim < 2 and whole
    else:
        by_number = all(isinstance(i, int | np.integer) for i in parts or [data])
    if by_number:
        return (
            ". Samples by number are for Unlearner.remove; here pass their tensors, "
            "(inputs[numbers], targets[numbers])"
        )
    if any(isinstance(part, np.ndarray) for part in [data, *parts]):
        return "; torch.from_numpy makes tensors of arrays"
    if hasattr(data, "to_numpy"):
        return "; torch.from_numpy makes tensors of columns, frame[columns].to_numpy() for instance"
    if isinstance(data, Iterable) and not isinstance(data, tuple | list | str | bytes):
        return ", which can be read once or only in order: pass list(data), a list of its samples"
    return ""


def _in_memory(data: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    n = n_samples(data, name)
    _check(data, name, n)
    for tensor in tensors_of(data):
        if tensor.device != device:
            raise ValueError(
                f"a tensor of {name} is on {tensor.device} and the model is on {device}; nothing "
                "is copied unasked, move it with .to()"
            )
    check_finite(tensors_of(data), range(n), name)
    as_batch(data, n, name)  # its refusals
    return Samples(
        n,
        lambda some: part_of(data, n, torch.as_tensor(some)),
        device,
        dtype,
        name,
        in_memory=True,
        resident=True,
    )


def _from_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    name: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Samples:
    if isinstance(dataset, IterableDataset):
        dataset = list(_ending(dataset, name))
    n = length_of(dataset)
    if n is None:
        raise TypeError(
            f"{name} has no length: give its class, {type(dataset).__name__}, a __len__ that "
            "returns the number of samples, or make it an IterableDataset"
        )
    if n == 0:
        raise NoSamplesError(f"{name} is empty")

    def fetch(some: list[int]) -> Any:
        rows = [_row(dataset, i, name) for i in some]
        data = collated(rows, collate, name, some[0])
        _check(data, name, len(some))
        check_finite(tensors_of(data), some, name, whole=False)
        return data

    resident = _is_resident(dataset)
    mixed = collate is not default_collate and collate is not plain_collate
    _check_repeatable(fetch, n, name, reread=not resident, mixed=mixed)
    source = Source(dataset.__getitem__, collate)
    return Samples(n, fetch, device, dtype, name, in_memory=False, resident=resident, source=source)


def _row(dataset: Any, i: int, name: str) -> Any:
    try:
        return dataset[i]
    except (TypeError, KeyError, IndexError, NotImplementedError) as error:
        raise ValueError(
            f"sample {i} of {name}, a {type(dataset).__name__} of {len(dataset):,} samples, cannot "
            f"be read: {type(error).__name__}: {error}"
        ) from error


def _ending(data: Any, name: str) -> Iterator[Any]:
    """The samples of a stream, or of a DataLoader over one, as they come, to be kept."""
    length, loaded = Length.of(data), isinstance(data, DataLoader)
    samples = size = 0
    for number, each in enumerate(data):
        length.check(name, samples, number)
        n = n_samples(each, name) if loaded else 1
        samples, size = samples + n, size + _nbytes(each)
        length.check(name, samples, size=size)
        yield from (part_of(each, n, slice(k, k + 1)) for k in range(n)) if loaded else (each,)


def _nbytes(tree: Any) -> int:
    if isinstance(tree, Mapping):
        return sum(map(_nbytes, tree.values()))
    if isinstance(tree, tuple | list):
        return sum(map(_nbytes, tree))
    return int(getattr(tree, "nbytes", 0)) or sys.getsizeof(tree)


def _check_repeatable(
    fetch: Callable[[list[int]], Any], n: int, name: str, *, reread: bool, mixed: bool
) -> None:
    """Refuse samples that change from reading to reading, or by what else is in their batch."""
    some = list(range(0, n, max(1, n // _PROBE))[:_PROBE])
    if not (reread or mixed):
        fetch(some[:1])
        return
    alone = [fetch([i]) for i in some]
    for _ in range(max(_READINGS, -(-_FEWEST // len(some))) - 1):
        for i, data in zip(some, alone, strict=True):
            if list(_hashes(fetch([i]), 1)) != list(_hashes(data, 1)):
                raise ValueError(
                    f"sample {i} of {name} differs when it is read again: give a Dataset without "
                    "random augmentation" + (_DRAWN_ONCE if mixed else "")
                )
    if not mixed or len(some) < 2:
        return
    together = fetch(some)
    for k, (i, data) in enumerate(zip(some, alone, strict=True)):
        own = list(tensors_of(part_of(together, len(some), slice(k, k + 1))))
        pairs = list(zip(tensors_of(data), own, strict=False))
        if len(pairs) != len(own) or not all(_same_but_padded(a, b) for a, b in pairs):
            raise ValueError(
                f"sample {i} of {name} is another one in a batch than alone: collate_fn changes "
                "samples by what else is in the batch, as MixUp does. Give a DataLoader whose "
                "collate_fn only puts samples together"
            )


def _same_but_padded(alone: Tensor, own: Tensor) -> bool:
    """Whether one sample's tensor is the same, or stands at a corner of the other."""
    if alone.ndim != own.ndim or any(a > b for a, b in zip(alone.shape, own.shape, strict=True)):
        return False
    first = tuple(slice(size) for size in alone.shape)
    last = tuple(slice(b - a, None) for a, b in zip(alone.shape, own.shape, strict=True))
    return torch.equal(own[first], alone) or torch.equal(own[last], alone)


def _is_resident(dataset: Any) -> bool:
    """Whether a Dataset is known to have all its samples in memory."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) in (TensorDataset, list)


def _from_loader(loader: Any, name: str, device: torch.device, dtype: torch.dtype) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        rows = list(_ending(loader, name))
        if not rows:
            raise NoSamplesError(f"{name} is empty")

        def collate(some: list[Any]) -> Any:
            return joined(some, [1] * len(some))

        return _from_dataset(rows, collate, name, device, dtype)
    if loader.batch_sampler is None:
        raise ValueError(
            f"{name} is a DataLoader with batch_size=None, so single samples cannot be identified; "
            "pass a Dataset of samples, or a DataLoader with a batch_size"
        )
    sampler = loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    known = RandomSampler | SequentialSampler
    if not isinstance(sampler, known) or sampler.data_source is not dataset:
        indices = getattr(sampler, "indices", None)
        if indices is None:
            raise ValueError(
                f"the sampler of {name}, a {type(sampler).__name__}, does not tell which "
                "samples it draws; pass the Dataset, or a torch.utils.data.Subset of it"
            )
        dataset = Subset(dataset, [int(i) for i in indices])
    return _from_dataset(dataset, loader.collate_fn or default_collate, name, device, dtype)


def _check(data: Any, name: str, n: int) -> None:
    for tensor in tensors_of(data):
        if tensor.is_complex():
            raise TypeError(f"{name} must be real; got a tensor of {tensor.dtype}")
        if tensor.ndim == 0 or len(tensor) != n:
            raise ValueError(
                f"the tensors of {name} must have samples along their first axis, {n} of them; "
                f"got shape {tuple(tensor.shape)}"
            )
