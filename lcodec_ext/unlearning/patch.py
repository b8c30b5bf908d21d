"""What a deletion changed, as data: saved, sent, and applied to a copy of the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, counted
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.states import state_hash, tensors_of_state
from lcodec_ext._torch.tensor_files import read_tensors, write_tensors
from lcodec_ext._torch.wrapped import unwrapped

_FORMAT = "weight patch 1"
Model = nn.Module | Mapping[str, Tensor]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class PatchedTensor:
    """The entries of a parameter or buffer that changed.

    Attributes
    ----------
    indices : Tensor of int32 or int64, shape (k,), or None
        Places in the flattened tensor, ascending; None where all entries are kept, which takes
        less than most of them with their places.
    values : Tensor, shape (k,)
        The new values, in the tensor's dtype, on the CPU.
    shape : tuple of int
        Of the tensor.
    """

    indices: Tensor | None
    values: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class WeightPatch:
    """The difference between two models of one architecture: the entries that changed.

    Attributes
    ----------
    before, after : str
        SHA-256 of all weights and buffers of the models, as the ledger of an `Unlearner` has them.
        Of states, those of their tensors.
    tensors : dict of str to PatchedTensor
        By name in `state_dict`, those with changes.

    Notes
    -----
    New values are kept, not differences: applied to the model before, they give the model after
    bit by bit. Buffers that `state_dict` leaves out are not part of it.

    A mapping of tensors by name takes the place of a model everywhere: a state of which a part is
    compared, such as the adapter of a model of peft (`peft.get_peft_model_state_dict`). The hashes
    are then of the adapter alone, whatever the base model is.

    Examples
    --------
    >>> import torch
    >>> old, new = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    >>> patch = WeightPatch.between(old, new)
    >>> patch.apply(old), torch.equal(old.weight, new.weight)
    (True, True)
    """

    before: str
    after: str
    tensors: dict[str, PatchedTensor]

    @classmethod
    def between(cls, before: Model, after: Model) -> "WeightPatch":
        """Compare two models or states; ValueError if they differ in more than values."""
        old, new = _state(before), _state(after)
        for name in sorted(old.keys() ^ new.keys()):
            raise ValueError(f"the models must be of one architecture; only one has {name!r}")
        changed = {}
        for name, tensor in new.items():
            a = old[name].to(tensor.device)
            if a.shape != tensor.shape or a.dtype != tensor.dtype:
                raise ValueError(
                    f"the models must be of one architecture; {name!r} is {a.dtype} of shape "
                    f"{tuple(a.shape)} in one and {tensor.dtype} of shape {tuple(tensor.shape)} in "
                    "the other"
                )
            differs = (_bits(a) != _bits(tensor)).any(1)
            if bool(differs.any()):
                changed[name] = _packed(tensor, differs)
        return cls(state_hash(old), state_hash(new), changed)

    @property
    def n_changed(self) -> int:
        """Entries that are kept."""
        return sum(each.values.numel() for each in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Memory of the entries and their places."""
        return sum(
            each.values.nbytes + (0 if each.indices is None else each.indices.nbytes)
            for each in self.tensors.values()
        )

    def __repr__(self) -> str:
        return (
            f"WeightPatch({counted(self.n_changed, 'entry', 'entries')} of "
            f"{counted(len(self.tensors), 'tensor')}, "
            f"{self.nbytes:,} bytes, {self.before[:8]} -> {self.after[:8]})"
        )

    def apply(self, model: Model, *, strict: bool = True) -> bool:
        """Write the new values to a model, in place.

        Parameters
        ----------
        model : Module or mapping of str to Tensor
            With the weights that the patch starts from. The tensors of a mapping are written to.
        strict : bool, default True
            False also takes a model with other weights, of the same names and shapes, or in another
            dtype, to which values are converted. What results is then on nobody's record.

        Returns
        -------
        bool
            Whether the model was changed: not if it has the patch already.

        Raises
        ------
        ValueError
            For a model whose weights are others, by their hash, or have other names, shapes or
            dtypes. The model is then as it was.

        Warns
        -----
        UserWarning
            If the model has the patch already.
        """
        check_bool(strict, "strict")
        state = _state(model)
        self._check(state, strict)
        now = state_hash(state)
        if now == self.after:
            warn("the model has this patch already; it stays as it is")
            return False
        if strict and now != self.before:
            raise ValueError(
                f"the patch is for weights whose SHA-256 is {self.before}; those of model have "
                f"{now}. Patches of several deletions apply in their order; strict=False applies "
                "this one all the same"
            )
        kept = {name: _taken(state[name], each) for name, each in self.tensors.items()}
        for name, each in self.tensors.items():
            _write(state[name], each, each.values)
        if strict and state_hash(_state(model)) != self.after:
            for name, each in self.tensors.items():
                _write(state[name], each, kept[name])
            raise ValueError(
                "the model does not take the patch: it ties tensors that differ in the patch, or "
                "its state_dict holds copies"
            )
        return True

    def _check(self, state: Mapping[str, Tensor], strict: bool) -> None:
        for name, each in self.tensors.items():
            if name not in state:
                raise ValueError(f"the patch has values for {name!r}, which model does not have")
            tensor = state[name]
            if tuple(tensor.shape) != each.shape or (strict and tensor.dtype != each.values.dtype):
                raise ValueError(
                    f"the patch is for {name!r} of shape {each.shape}, {each.values.dtype}; in "
                    f"model it has shape {tuple(tensor.shape)}, {tensor.dtype}"
                )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        For each tensor "NAME:values" and, unless it has all entries, "NAME:indices".
        """
        tensors = {}
        for name, each in self.tensors.items():
            complex_ = each.values.is_complex()
            tensors[f"{name}:values"] = torch.view_as_real(each.values) if complex_ else each.values
            if each.indices is not None:
                tensors[f"{name}:indices"] = each.indices
        shapes = {
            name: [str(each.values.dtype), list(each.shape)] for name, each in self.tensors.items()
        }
        write_tensors(
            path,
            tensors,
            {
                "format": _FORMAT,
                "before": self.before,
                "after": self.after,
                "tensors": json.dumps(shapes),
            },
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "WeightPatch":
        """Read what `save` wrote; ValueError if it is something else, OSError if it is no file."""
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path!s} holds no {_FORMAT}; its format is {metadata.get('format')}")
        try:
            before, after = metadata["before"], metadata["after"]
            listed = json.loads(metadata["tensors"]).items()
            found = [(name, *kind, tensors[f"{name}:values"]) for name, kind in listed]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path!s} is damaged: {error!r} while reading its list") from error
        changed = {}
        for name, dtype, shape, values in found:
            if dtype.startswith("torch.complex"):
                values = torch.view_as_complex(values)
            indices = tensors.get(f"{name}:indices")
            count, n_entries = len(values), torch.Size(shape).numel()
            inside = indices is None or (
                len(indices) == count and 0 <= int(indices.min()) and int(indices.max()) < n_entries
            )
            if not inside or (indices is None and count != n_entries):
                raise ValueError(f"{path!s} is damaged: {name!r} has places outside of its tensor")
            changed[name] = PatchedTensor(indices, values, tuple(shape))
        return cls(before, after, changed)


def _state(model: Model) -> dict[str, Tensor]:
    """The tensors of a model, or of a state, which share its memory."""
    if isinstance(model, Mapping):
        return tensors_of_state(model)
    check_module(model)
    return tensors_of_state(unwrapped(model))


def _bits(tensor: Tensor) -> Tensor:
    """The bits of each entry as integers, one row for each."""
    flat = tensor.contiguous().reshape(-1, 1)
    if flat.is_complex():
        flat = torch.view_as_real(flat[:, 0])
    return flat.view(_BITS[flat.element_size()])


def _packed(tensor: Tensor, differs: Tensor) -> PatchedTensor:
    """The changed entries with their places, or all entries where that takes less memory."""
    kind = torch.int32 if tensor.numel() < 2**31 else torch.int64
    shape = tuple(tensor.shape)
    values = tensor.detach().reshape(-1)
    if int(differs.sum()) * (tensor.element_size() + kind.itemsize) >= tensor.nbytes:
        return PatchedTensor(None, values.to("cpu", copy=True), shape)
    places = differs.nonzero()[:, 0]
    return PatchedTensor(places.to("cpu", kind), values[places].cpu(), shape)


def _taken(tensor: Tensor, each: PatchedTensor) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.clone() if each.indices is None else flat[each.indices.to(flat.device).long()]


def _write(tensor: Tensor, each: PatchedTensor, values: Tensor) -> None:
    values = values.to(tensor)
    if each.indices is not None:
        flat = tensor.reshape(-1).clone()
        flat[each.indices.to(flat.device).long()] = values
        values = flat
    tensor.copy_(values.reshape(tensor.shape))
