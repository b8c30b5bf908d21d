"""Selections of single parameters as data, and where they are in a model."""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, counted
from lcodec_ext._files import numbers_of, ranges_of
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.names import unwrapped_name
from lcodec_ext._torch.tensor_files import read_tensors, write_tensors
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature.coordinates import Coordinates
from lcodec_ext.curvature.layers import (
    EMBEDDINGS,
    Cut,
    NoUnitsError,
    is_unit_layer,
    not_differentiable,
    unit_cuts,
)
from lcodec_ext.curvature.layout import Layout, UnitLayout, check_memory
from lcodec_ext.curvature.selection import UnitSelection

Indices = NDArray[np.int64]

_FORMAT = "parameter selection 1"


@dataclass(frozen=True)
class FoundParameter:
    """A parameter of a model: whether and how its entries can be selected."""

    parameter: nn.Parameter
    refused: str  # why it cannot be selected; empty if it can
    cut: Cut | None  # how its layer cuts it into units; None for one that no layer does
    padding: range  # entries whose gradient is always zero


def find_parameters(model: nn.Module) -> dict[str, FoundParameter]:
    """Find the parameters of a model, as named_parameters lists them."""
    check_module(model)
    model = unwrapped(model)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    return {
        name: _found(parameter, owners[id(parameter)])
        for name, parameter in model.named_parameters()
    }


def _found(parameter: nn.Parameter, owners: Sequence[tuple[nn.Module, str]]) -> FoundParameter:
    refused = ""
    if isinstance(parameter, nn.UninitializedParameter):
        refused = "it is not initialised; run the model once"
    elif not parameter.requires_grad:
        refused = "it does not require gradients"
    elif not parameter.is_floating_point() or parameter.layout != torch.strided:
        refused = f"it is {parameter.dtype}, {parameter.layout}; only real dense ones can be"
    cut, padding = None, []
    for module, key in owners:
        if not is_unit_layer(module):
            continue
        refused = refused or (not_differentiable(module) if key == "weight" else "")
        try:
            cuts = {k: c for _, _, each in unit_cuts(module) for k, (c, _) in each.items()}
        except NoUnitsError:
            continue
        cut = cut or cuts.get(key)
        if isinstance(module, EMBEDDINGS) and module.padding_idx is not None:
            padding.append(module.padding_idx)
    row = range(0)
    if len(padding) == len(owners) and len(set(padding)) == 1:  # no other layer gives it a gradient
        width = parameter.shape[1]
        row = range(padding[0] * width, (padding[0] + 1) * width)
    return FoundParameter(parameter, refused, cut, row)


def view_order(cut: Cut, shape: Sequence[int]) -> Tensor | None:
    """The flat index of each entry of a cut's view; None where the view is the parameter."""
    if not cut.groups:
        return None
    return cut.view(torch.arange(torch.Size(shape).numel()).reshape(shape)).flatten()


class ParameterLayout(Layout):
    """Single parameters laid out on a model; see `Layout`.

    Coordinates are in the order of `named_parameters`, and of the entries of each.

    Attributes
    ----------
    parts : dict of str to (int, Tensor or slice, Cut or None)
        For each parameter its first coordinate, its flat indices, and how its layer cuts it.
    """

    def __init__(self, selection: "ParameterSelection", model: nn.Module) -> None:
        model = unwrapped(model)
        found, counts = find_parameters(model), selection.counts
        for name in counts:
            if name not in found:
                raise ValueError(f"the selection names parameter {name!r}, {_why_not(name, model)}")
            one, last = found[name], selection.last(name)
            if one.refused:
                raise ValueError(
                    f"the selection names parameter {name!r}, which cannot be selected: "
                    f"{one.refused}"
                )
            if last >= one.parameter.numel():
                raise ValueError(
                    f"the selection names entry {last} of parameter {name!r}, which has "
                    f"{one.parameter.numel()}, of shape {tuple(one.parameter.shape)}"
                )
        self.parameters = {k: p.parameter for k, p in found.items() if k in counts}
        self.parts: dict[str, tuple[int, Tensor | slice, Cut | None]] = {}
        self.size = 0
        for name in self.parameters:
            self.parts[name] = self.size, selection.place(name), found[name].cut
            self.size += counts[name]
        self._counts = counts
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        first = next((p.parameter for p in found.values()), torch.empty(0))
        self._empty = torch.empty(0, dtype=first.dtype, device=first.device)
        check_memory(self.parameters, {k: p.parameter for k, p in found.items()})

    def place(self, name: str, device: torch.device) -> Tensor | slice:
        """The flat indices of a parameter's selected entries, on a device."""
        place = self.parts[name][1]
        if isinstance(place, slice):
            return place
        key = name, device
        if key not in self._on_device:
            self._on_device[key] = place.to(device)
        return self._on_device[key]

    def _gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for name in self.parts:
            yield tensors[name].reshape(-1)[self.place(name, tensors[name].device)]

    def _overwrite(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        for name, part in self._split(vector):
            self._write(tensors[name], name, part.to(tensors[name]))

    def _increase(self, tensors: Mapping[str, Tensor], vector: Tensor, alpha: float) -> None:
        for name, part in self._split(vector):
            tensor = tensors[name]
            before = tensor.reshape(-1)[self.place(name, tensor.device)]
            total = before.add(part.to(tensor.device), alpha=alpha)
            self._write(tensor, name, total.to(tensor.dtype))

    def _write(self, tensor: Tensor, name: str, part: Tensor) -> None:
        flat = tensor.reshape(-1)
        flat[self.place(name, tensor.device)] = part
        if not tensor.is_contiguous():  # flat is a copy
            tensor.copy_(flat.reshape(tensor.shape))

    def _split(self, vector: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name, (start, _, _) in self.parts.items():
            yield name, vector[start : start + self._counts[name]]


def _why_not(name: str, model: nn.Module) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): key for key, parameter in model.named_parameters()}
    if name in every:
        return f"which is {first[id(every[name])]!r} under another name; take that one"
    if name in dict(model.named_buffers()):
        return "which is a buffer of this model; only parameters can be selected"
    near = difflib.get_close_matches(name, every, 1)
    return "which this model does not have" + (f"; is it {near[0]!r}?" if near else "")


class ParameterSelection(Coordinates):
    """Single parameters of a model as data: for each named parameter some of its entries.

    Any trainable parameter can be selected, those of layers without units too: of RNNs, LoRA
    factors and other raw `nn.Parameter`. A selection is independent of any model. Methods that take
    one lay out the selected entries as one vector of ``size(model)`` coordinates: parameters in the
    order of `named_parameters`, entries by increasing index.

    Parameters
    ----------
    indices : mapping of str to iterable of int
        For each parameter, by its name in `named_parameters`, the indices of its selected entries
        in the flattened parameter, at least one, in any order: a range, list, array or tensor of
        integers. An empty mapping is the empty selection.

    Raises
    ------
    ValueError, TypeError
        For a parameter without an entry, repeated or negative indices, or wrong types.

    Notes
    -----
    Immutable and hashable. ``|``, ``&`` and ``-`` are set operations on entries, ``len`` is their
    number, and ``(name, index) in selection`` asks for one. Consecutive entries take no memory,
    others 8 bytes each.

    Methods that take a model raise ValueError, by name and with the reason, for parameters and
    entries that the model does not have, and for parameters that are frozen, not initialised, not
    real or not dense, that share memory with others, or whose gradients are not derivatives. A
    tied parameter is selected under its first name.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> mask = ParameterSelection({"0.weight": [3, 0, 1], "2.bias": range(3)})
    >>> len(mask), mask.indices["0.weight"], ("2.bias", 1) in mask
    (6, array([0, 1, 3]), True)
    >>> mask.to_dict()
    {'parameters': {'0.weight': '0-1,3', '2.bias': '0-2'}}
    >>> ParameterSelection.from_dict(mask.to_dict()) == mask
    True
    >>> len(ParameterSelection.of(model) - mask)
    45
    """

    __slots__ = ("_indices",)

    def __init__(self, indices: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(indices, Mapping):
            raise TypeError(
                "indices must map parameter names to flat indices; got an object of type "
                f"{type(indices).__name__}"
            )
        self._indices: dict[str, range | Indices] = {}
        for name, given in indices.items():
            if not isinstance(name, str):
                raise TypeError(f"parameter names must be strings; got {name!r}")
            if (plain := unwrapped_name(name)) in self._indices:
                raise ValueError(f"parameter {plain!r} is named twice, as a wrapped one, too")
            self._indices[plain] = _checked(name, given)

    # -----------------------------------------------------------------------------------------
    # Other ways to make one

    @classmethod
    def of(cls, model: nn.Module) -> "ParameterSelection":
        """Select all trainable parameters of a model.

        What the class refuses is left out, and so are the padding rows of embeddings.
        """
        chosen: dict[str, Iterable[int]] = {}
        for name, one in find_parameters(model).items():
            if not one.refused and one.parameter.numel() > len(one.padding):
                every = range(one.parameter.numel())
                chosen[name] = (
                    np.delete(np.arange(len(every)), one.padding) if one.padding else every
                )
        return cls(chosen)

    @classmethod
    def from_units(cls, selection: UnitSelection, model: nn.Module) -> "ParameterSelection":
        """Select the parameters that units own in a model."""
        if not isinstance(selection, UnitSelection):
            raise TypeError(f"selection must be a UnitSelection; got {type(selection).__name__}")
        found: dict[str, list[Indices]] = {}
        for parameter, entries, _ in UnitLayout(selection, model).places():
            order = view_order(parameter.cut, parameter.shape)
            length = parameter.length
            flat = (entries[:, None] * length + np.arange(length)).ravel()
            found.setdefault(parameter.name, []).append(
                flat if order is None else order.numpy()[flat]
            )
        return cls({name: np.concatenate(parts) for name, parts in found.items()})

    @classmethod
    def top(cls, values: Mapping[str, Tensor], k: int) -> "ParameterSelection":
        """Select the k entries of largest magnitude.

        Parameters
        ----------
        values : mapping of str to Tensor
            By parameter name, of the parameters' shapes: a step, or gradients.
        k : int
            How many, at least one and at most all. Of equal ones those of the first parameter are
            taken, in the order of the mapping, and of the lowest indices.

        Raises
        ------
        ValueError
            For NaN, and for k beyond the number of entries.
        """
        if not isinstance(values, Mapping) or not values:
            raise TypeError("values must map parameter names to tensors, at least one")
        flat = torch.cat([v.detach().abs().reshape(-1).double().cpu() for v in values.values()])
        check_integer(k, "k", 1, len(flat))
        if flat.isnan().any():
            raise ValueError("values must be numbers; they hold NaN")
        least = flat.topk(k).values[-1]
        chosen = flat > least
        equal = (flat == least).nonzero()[:, 0]
        chosen[equal[: k - int(chosen.sum())]] = True
        found, start = {}, 0
        for name, value in values.items():
            here = chosen[start : start + value.numel()].nonzero()[:, 0]
            start += value.numel()
            if len(here):
                found[name] = here
        return cls(found)

    def to_dict(self) -> dict[str, dict[str, str]]:
        """Return the entries as ranges, "0-15,17", JSON serialisable."""
        return {"parameters": {name: ranges_of(each) for name, each in self._indices.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ParameterSelection":
        """Make the selection that `to_dict` wrote."""
        if not is_parameters(values):
            raise ValueError(
                "values must be the dict of a ParameterSelection, {'parameters': {name: ranges}}; "
                f"got {str(values)[:60]}"
            )
        return cls({name: _numbers(text, name) for name, text in values["parameters"].items()})

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file: for each parameter its indices, int64, by its name."""
        tensors = {name: torch.tensor(_array(each)) for name, each in self._indices.items()}
        write_tensors(path, tensors, {"format": _FORMAT})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ParameterSelection":
        """Read what `save` wrote; ValueError if it is something else."""
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path!s} holds no {_FORMAT}; its format is {metadata.get('format')}")
        return cls(tensors)

    # -----------------------------------------------------------------------------------------
    # A set of entries

    @property
    def indices(self) -> dict[str, Indices]:
        """For each parameter its selected flat indices, ascending, int64; not to be written to."""
        return {name: _array(each) for name, each in self._indices.items()}

    @property
    def counts(self) -> dict[str, int]:
        """For each parameter how many of its entries are selected."""
        return {name: len(each) for name, each in self._indices.items()}

    def last(self, name: str) -> int:
        """The largest index that is selected of a parameter."""
        return int(self._indices[name][-1])

    def place(self, name: str) -> Tensor | slice:
        """The selected flat indices of a parameter, as an index to a flat tensor."""
        each = self._indices[name]
        if isinstance(each, range):
            return slice(each.start, each.stop)
        return torch.from_numpy(each.copy())

    def __len__(self) -> int:
        return sum(map(len, self._indices.values()))

    def __contains__(self, entry: object) -> bool:
        if not isinstance(entry, tuple) or len(entry) != 2 or entry[0] not in self._indices:
            return False
        each = self._indices[entry[0]]
        if isinstance(each, range):
            return entry[1] in each
        at = int(np.searchsorted(each, entry[1]))
        return at < len(each) and bool(each[at] == entry[1])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ParameterSelection):
            return NotImplemented
        return self._indices.keys() == other._indices.keys() and all(
            _same(each, other._indices[name]) for name, each in self._indices.items()
        )

    def __hash__(self) -> int:
        return hash(frozenset((name, _key(each)) for name, each in self._indices.items()))

    def __repr__(self) -> str:
        entries = counted(len(self), "entry", "entries")
        return f"ParameterSelection({entries} of {counted(len(self._indices), 'parameter')})"

    def __or__(self, other: "ParameterSelection") -> "ParameterSelection":
        return self._combine(other, np.union1d)

    def __and__(self, other: "ParameterSelection") -> "ParameterSelection":
        return self._combine(other, np.intersect1d)

    def __sub__(self, other: "ParameterSelection") -> "ParameterSelection":
        return self._combine(other, np.setdiff1d)

    def _combine(self, other: object, operation: Any) -> "ParameterSelection":
        if not isinstance(other, ParameterSelection):
            return NotImplemented
        nothing = range(0)
        combined = {
            name: operation(
                _array(self._indices.get(name, nothing)), _array(other._indices.get(name, nothing))
            )
            for name in self._indices | other._indices
        }
        return ParameterSelection({name: each for name, each in combined.items() if len(each)})

    def layout(self, model: nn.Module) -> ParameterLayout:
        """Find the entries in a model; for many calls of `gather` and its like."""
        return ParameterLayout(self, model)


def _checked(name: str, given: Any) -> range | Indices:
    """Sorted indices, as a range if they are consecutive."""
    if isinstance(given, range) and given.step == 1 and given and given.start >= 0:
        return given
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise TypeError(f"the indices of parameter {name!r} must be integers; got {given!r}")
    found = np.asarray(given if isinstance(given, np.ndarray) else list(given))
    if not found.size:
        raise ValueError(f"no indices are given for parameter {name!r}; leave the parameter out")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TypeError(
            f"the indices of parameter {name!r} must be integers in one dimension; got "
            f"{found.dtype} of shape {found.shape}"
        )
    found = np.sort(found.astype(np.int64))
    if found[0] < 0:
        raise ValueError(f"an index of parameter {name!r} must be at least 0; got {found[0]}")
    if (np.diff(found) == 0).any():
        twice = found[1:][np.diff(found) == 0][0]
        raise ValueError(f"indices of parameter {name!r} are repeated, {twice} for instance")
    if found[-1] - found[0] + 1 == len(found):
        return range(int(found[0]), int(found[-1]) + 1)
    found.flags.writeable = False
    return found


def _array(each: range | Indices) -> Indices:
    return np.arange(each.start, each.stop) if isinstance(each, range) else each


def _same(a: range | Indices, b: range | Indices) -> bool:
    if isinstance(a, range) or isinstance(b, range):
        return isinstance(a, range) and isinstance(b, range) and a == b
    return np.array_equal(a, b)


def _key(each: range | Indices) -> Any:
    return each if isinstance(each, range) else hashlib.sha256(each.tobytes()).digest()


def _numbers(text: Any, name: str) -> range | Indices:
    try:
        return numbers_of(text)
    except (AttributeError, ValueError):
        raise ValueError(
            f"the indices of parameter {name!r} must be ranges, as in '0-15,17'; got "
            f"{str(text)[:40]!r}"
        ) from None


def is_parameters(values: object) -> bool:
    """Whether this is what `ParameterSelection.to_dict` writes; a `UnitSelection` writes lists."""
    return (
        isinstance(values, Mapping)
        and values.keys() == {"parameters"}
        and isinstance(values["parameters"], Mapping)
    )


Selection = UnitSelection | ParameterSelection


def selection_from_dict(values: Mapping[str, Any]) -> Selection:
    """Make the selection, of units or of single parameters, that its `to_dict` wrote."""
    if is_parameters(values):
        return ParameterSelection.from_dict(values)
    return UnitSelection.from_dict(values)


def all_trainable(model: nn.Module) -> Selection:
    """Select all trainable parameters of a model: by units, if every parameter belongs to some."""
    units, every = UnitSelection.all(model), ParameterSelection.of(model)
    covered = UnitLayout(units, model).parameters
    return units if every.counts.keys() <= covered.keys() else every
