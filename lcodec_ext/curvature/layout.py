"""Coordinates: which entry of the vector of a selection is which entry of which parameter."""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext.curvature.layers import (
    _Block,
    _Cut,
    _Part,
    _why_not,
    find_unit_layers,
)

if TYPE_CHECKING:
    from lcodec_ext.curvature.selection import UnitSelection


@dataclass(frozen=True)
class Segment:
    """Consecutive coordinates of a selection: the slice of one parameter that one unit owns.

    Attributes
    ----------
    parameter : str
        Qualified name, as `named_parameters` lists it.
    module : str
        Name of the layer, as the selection has it.
    unit : int
    start, length : int
        The coordinates ``start`` to ``start + length - 1``.
    index : tuple of int and slice
        For a tensor of the parameter's shape, ``tensor[index].flatten()`` are these coordinates.
        ``tensor[index]`` is a view, contiguous or not.
    """

    parameter: str
    module: str
    unit: int
    start: int
    length: int
    index: tuple[int | slice, ...] = dataclasses.field(hash=False)  # slices hash from 3.12 on


@dataclass(frozen=True)
class _Run:
    """Consecutive units of a layer with coordinates in the same parameters: a matrix of them."""

    module: str
    units: tuple[int, ...]
    start: int
    parts: tuple[_Part, ...]

    @property
    def width(self) -> int:
        return sum(part.length for part in self.parts)

    def positions(self, part: _Part) -> tuple[NDArray[np.intp], ...]:
        """Where `_Cut.view` of the part's parameter has the units, axis by axis."""
        entries = np.array(self.units) - part.first
        return np.unravel_index(entries, part.cut.counts(part.shape))


class UnitLayout:
    """A selection laid out on a model: which coordinate is which entry of which parameter.

    What the methods of `UnitSelection` make and drop; keep one to use it often. It is out of date
    once modules or parameters of the model are replaced, or their `requires_grad` is.

    Parameters
    ----------
    selection : UnitSelection
    model : Module

    Attributes
    ----------
    size : int
        Number of coordinates.
    parameters : dict of str to Parameter
        Those with coordinates.

    Raises
    ------
    ValueError
        For what `UnitSelection` refuses.
    """

    def __init__(self, selection: "UnitSelection", model: nn.Module) -> None:
        layers, without = find_unit_layers(model)
        chosen = selection.units
        for name, units in chosen.items():
            if name not in layers:
                why = _why_not(name, model, layers, without)
                raise ValueError(f"the selection names layer {name!r}, {why}")
            layer = layers[name]
            if units[-1] >= layer.n_units:
                raise ValueError(
                    f"the selection names unit {units[-1]} of layer {name!r}, which has units "
                    f"0 to {layer.n_units - 1}"
                )
            for unit in layer.refused.keys() & set(units):
                raise ValueError(
                    f"the selection names unit {unit} of layer {name!r}, which cannot be selected: "
                    f"{layer.refused[unit]}"
                )
        self.size = 0
        self.runs: list[_Run] = []
        self._on_device: dict[tuple[int, str, torch.device], tuple[Tensor, ...]] = {}
        taken: dict[str, _Taken] = {}
        for name in layers:
            for block in layers[name].blocks:
                self._place(name, block, chosen.get(name, ()), taken)
        every = dict(model.named_parameters())
        self.parameters = {
            part.parameter: every[part.parameter] for run in self.runs for part in run.parts
        }
        first = next(iter(every.values()), torch.empty(0))
        self._empty = torch.empty(0, dtype=first.dtype, device=first.device)
        _check_memory(self.parameters, every)

    def _place(
        self, name: str, block: _Block, units: Iterable[int], taken: "dict[str, _Taken]"
    ) -> None:
        """Append runs for the units of a block; of tied parameters only what is not there yet."""
        units = [unit for unit in units if block.first <= unit < block.stop]
        if not units:
            return
        for part in block.parts:
            if part.tied:
                before = taken.setdefault(part.parameter, _Taken(name, part.cut, set()))
                if before.cut != part.cut:
                    raise ValueError(
                        f"layers {before.module!r} and {name!r} cut the parameter "
                        f"{part.parameter!r}, which is tied, into units in different ways; select "
                        "units of one of them only"
                    )

        def fresh(unit: int) -> tuple[_Part, ...]:
            return tuple(
                part
                for part in block.parts
                if not part.tied or unit - part.first not in taken[part.parameter].entries
            )

        for parts, run in [(parts, tuple(run)) for parts, run in groupby(units, fresh)]:
            if parts:
                self.runs.append(_Run(name, run, self.size, parts))
                self.size += len(run) * self.runs[-1].width
        for part in block.parts:
            if part.tied:
                taken[part.parameter].entries.update(unit - part.first for unit in units)

    def segments(self) -> tuple[Segment, ...]:
        """List the slices of parameters, in the order of the coordinates."""
        found = []
        for run in self.runs:
            start = run.start
            positions = [
                zip(*(axis.tolist() for axis in run.positions(part)), strict=True)
                for part in run.parts
            ]
            for unit, *each in zip(run.units, *positions, strict=True):
                for part, position in zip(run.parts, each, strict=True):
                    index = part.cut.index(position, part.shape)
                    found.append(
                        Segment(part.parameter, run.module, unit, start, part.length, index)
                    )
                    start += part.length
        return tuple(found)

    def places(self) -> Iterator[tuple[_Part, NDArray[np.intp], NDArray[np.intp]]]:
        """List which entries of a parameter are which coordinates.

        Yields
        ------
        part : _Part
        entries : ndarray of int, shape (n,)
            Places in the part's cut, ascending.
        coordinates : ndarray of int, shape (n, part.length)
        """
        for run in self.runs:
            first = run.start + np.arange(len(run.units))[:, None] * run.width
            for part in run.parts:
                yield part, np.array(run.units) - part.first, first + np.arange(part.length)
                first = first + part.length

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As `UnitSelection.gather`, from tensors by name."""
        self._check(tensors, "source")
        pieces = []
        for run in self.runs:
            for_each_unit = []
            for part in run.parts:
                tensor = tensors[part.parameter]
                entries = part.cut.view(tensor)[self._indices(run, part, tensor.device)]
                for_each_unit.append(entries.reshape(len(run.units), part.length))
            matrix = torch.cat(for_each_unit, 1) if len(for_each_unit) > 1 else for_each_unit[0]
            pieces.append(matrix.flatten())
        return torch.cat(pieces) if pieces else self._empty.clone()

    def scatter_(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        """As `UnitSelection.scatter_`, to tensors by name."""
        self._check_target(tensors, vector)
        with torch.no_grad():
            for part, indices, entries in self._split(tensors, vector):
                tensor = tensors[part.parameter]
                part.cut.view(tensor).index_put_(indices, entries.to(tensor))

    def add_(self, tensors: Mapping[str, Tensor], vector: Tensor, alpha: float = 1) -> None:
        """As `UnitSelection.add_`, to tensors by name."""
        _check_alpha(alpha)
        self._check_target(tensors, vector)
        with torch.no_grad():
            for part, indices, entries in self._split(tensors, vector):
                tensor = tensors[part.parameter]
                view = part.cut.view(tensor)
                total = view[indices].add(entries.to(tensor.device), alpha=alpha)
                view.index_put_(indices, total.to(tensor.dtype))

    def substituted(self, vector: Tensor) -> dict[str, Tensor]:
        """Make whole parameters, by name, with the selected entries taken from a vector.

        Differentiable by the vector, and by nothing else; for `torch.func.functional_call`.
        """
        made = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for part, indices, entries in self._split(made, vector):
            view = part.cut.view(made[part.parameter]).index_put(indices, entries)
            made[part.parameter] = part.cut.unview(view)
        return made

    def _split(
        self, tensors: Mapping[str, Tensor], vector: Tensor
    ) -> Iterator[tuple[_Part, tuple[Tensor, ...], Tensor]]:
        """Parts, where the view of each has the units, and what of the vector belongs there."""
        for run in self.runs:
            n = len(run.units)
            matrix = vector[run.start : run.start + n * run.width].reshape(n, run.width)
            column = 0
            for part in run.parts:
                tensor = tensors[part.parameter]
                rest = part.cut.view(tensor).shape[len(part.cut.counts(part.shape)) :]
                entries = matrix[:, column : column + part.length].reshape(n, *rest)
                yield part, self._indices(run, part, tensor.device), entries
                column += part.length

    def _indices(self, run: _Run, part: _Part, device: torch.device) -> tuple[Tensor, ...]:
        """`_Run.positions` as tensors, kept: to a GPU they are copied once."""
        key = run.start, part.parameter, device
        if key not in self._on_device:
            self._on_device[key] = tuple(
                torch.tensor(axis, device=device) for axis in run.positions(part)
            )
        return self._on_device[key]

    def _check(self, tensors: Mapping[str, Tensor], argument: str) -> None:
        devices = set()
        for name, parameter in self.parameters.items():
            if name not in tensors:
                raise ValueError(
                    f"{argument} must have a tensor for parameter {name!r}, as named_parameters "
                    "lists it; it has none"
                )
            tensor = tensors[name]
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{argument}[{name!r}] must be a tensor; got an object of type "
                    f"{type(tensor).__name__}"
                )
            if tensor.shape != parameter.shape or tensor.layout != torch.strided:
                raise ValueError(
                    f"{argument}[{name!r}] must be a dense tensor of the parameter's shape "
                    f"{tuple(parameter.shape)}; got shape {tuple(tensor.shape)}, {tensor.layout}"
                )
            devices.add(tensor.device)
        if len(devices) > 1 and argument == "source":
            raise ValueError(
                "source must have the selected parameters on one device; they are on "
                + ", ".join(sorted(map(str, devices)))
            )

    def _check_target(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        self._check(tensors, "target")
        if not isinstance(vector, Tensor):
            raise TypeError(
                f"vector must be a tensor; got an object of type {type(vector).__name__}"
            )
        if vector.shape != (self.size,):
            raise ValueError(
                f"vector must have one entry for each coordinate, shape ({self.size},); got shape "
                f"{tuple(vector.shape)}"
            )
        for name in self.parameters:
            tensor = tensors[name]
            if not torch.can_cast(vector.dtype, tensor.dtype):
                raise TypeError(
                    f"vector must convert to {tensor.dtype}, the dtype of target[{name!r}]; got "
                    f"{vector.dtype}"
                )
            if _is_expanded(tensor):
                raise ValueError(
                    f"target[{name!r}] is expanded: several entries share one place in memory"
                )


def _check_alpha(alpha: object) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a real number; got {alpha!r} ({type(alpha).__name__})")


@dataclass
class _Taken:
    """What of a tied parameter has coordinates already."""

    module: str  # the first layer that has it
    cut: _Cut
    entries: set[int]


def _is_expanded(tensor: Tensor) -> bool:
    return any(
        stride == 0 and length > 1
        for stride, length in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _check_memory(selected: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> None:
    """Refuse parameters that cannot be written to without changing others."""
    for name, parameter in selected.items():
        if _is_expanded(parameter):
            raise ValueError(
                f"parameter {name!r} is expanded: several of its entries share one place in memory"
            )
    spans = []
    for name, parameter in every.items():
        if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
            continue
        if parameter.layout == torch.strided and parameter.numel() and parameter.data_ptr():
            last = sum(
                (length - 1) * stride
                for length, stride in zip(parameter.shape, parameter.stride(), strict=True)
            )
            begin = parameter.data_ptr()
            end = begin + (last + 1) * parameter.element_size()
            spans.append((str(parameter.device), begin, end, name))
    spans.sort()
    for i, (device, _, end, name) in enumerate(spans):
        for other_device, begin, _, other in spans[i + 1 :]:
            if other_device != device or begin >= end:
                break
            if name in selected or other in selected:
                raise ValueError(
                    f"parameters {name!r} and {other!r} share memory without being one object; tie "
                    "them by assigning the parameter itself, or give each its own"
                )
