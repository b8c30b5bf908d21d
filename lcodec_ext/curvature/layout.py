"""Coordinates: which entry of the vector of a selection is which entry of which parameter."""

import dataclasses
import functools
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature.layers import Cut, UnitParameter, UnitRange, find_unit_layers, why_not

_LARGE = 2**22  # coordinates from which on they are gathered piece by piece, in half the memory


class Units(Protocol):
    """Units by layer, ascending: what a layout needs of a `UnitSelection`."""

    @property
    def units(self) -> Mapping[str, tuple[int, ...]]:
        """For each layer its selected units."""


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
class CoordinateBlock:
    """Consecutive units of a layer with coordinates in the same parameters: a matrix of them."""

    module: str
    units: tuple[int, ...]
    start: int
    parameters: tuple[UnitParameter, ...]

    @property
    def width(self) -> int:
        """Coordinates of one unit."""
        return sum(parameter.length for parameter in self.parameters)

    def entries(self, parameter: UnitParameter) -> NDArray[np.intp]:
        """The units' places in the parameter's cut."""
        return np.array(self.units) - parameter.first

    def positions(self, parameter: UnitParameter) -> tuple[NDArray[np.intp], ...]:
        """Where `Cut.view` of the parameter has the units, axis by axis."""
        return np.unravel_index(self.entries(parameter), parameter.cut.counts(parameter.shape))


@dataclass
class _Taken:
    """What of a tied parameter has coordinates already."""

    module: str  # the first layer that has it
    cut: Cut
    entries: set[int]


class Layout(ABC):
    """A selection laid out on a model: which coordinate is which entry of which parameter.

    The methods of a selection make one for each call; keep one to use it often. It is out of date
    once modules or parameters of the model are replaced, or their `requires_grad` is.

    Attributes
    ----------
    size : int
        Number of coordinates.
    parameters : dict of str to Parameter
        Those with coordinates.
    """

    size: int
    parameters: dict[str, nn.Parameter]
    _empty: Tensor  # what an empty selection gathers

    @abstractmethod
    def _gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """The selected entries, piece by piece; views where they are all of a tensor."""

    @abstractmethod
    def _overwrite(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        """Write a vector to the selected entries."""

    @abstractmethod
    def _increase(self, tensors: Mapping[str, Tensor], vector: Tensor, alpha: float) -> None:
        """Add a multiple of a vector to the selected entries."""

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As the selection's `gather`, from tensors by name."""
        self._check(tensors, "source")
        if not self.size:
            return self._empty.clone()
        pieces, own = self._gathered(tensors), [tensors[name] for name in self.parameters]
        differentiable = torch.is_grad_enabled() and any(each.requires_grad for each in own)
        if differentiable or self.size < _LARGE:
            return torch.cat(list(pieces))
        kind = functools.reduce(torch.promote_types, (each.dtype for each in own))
        out, start = torch.empty(self.size, dtype=kind, device=own[0].device), 0
        for piece in pieces:
            out[start : start + len(piece)] = piece
            start += len(piece)
        return out

    def scatter_(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        """As the selection's `scatter_`, to tensors by name."""
        self._check_target(tensors, vector)
        with torch.no_grad():
            self._overwrite(tensors, vector)

    def add_(self, tensors: Mapping[str, Tensor], vector: Tensor, alpha: float = 1) -> None:
        """As the selection's `add_`, to tensors by name."""
        _check_alpha(alpha)
        self._check_target(tensors, vector)
        with torch.no_grad():
            self._increase(tensors, vector, alpha)

    def numbers_in(self, whole: "Layout") -> Tensor:
        """For each coordinate its number among those of another layout; -1 where it has none.

        int64, shape (size,), on the device of the parameters.
        """
        places = {
            name: torch.full(p.shape, -1, dtype=torch.float64, device=p.device)
            for name, p in (self.parameters | whole.parameters).items()
        }
        whole.scatter_(places, torch.arange(whole.size, dtype=torch.float64))
        return self.gather(places).long()

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


class UnitLayout(Layout):
    """A selection of units laid out on a model; see `Layout`.

    Parameters
    ----------
    selection : UnitSelection
    model : Module

    Attributes
    ----------
    blocks : list of CoordinateBlock
        In the order of the coordinates.

    Raises
    ------
    ValueError
        For what `UnitSelection` refuses.
    """

    def __init__(self, selection: Units, model: nn.Module) -> None:
        model = unwrapped(model)
        layers, without = find_unit_layers(model)
        chosen = selection.units
        for name, units in chosen.items():
            if name not in layers:
                why = why_not(name, model, layers, without)
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
        self.blocks: list[CoordinateBlock] = []
        self._on_device: dict[tuple[int, str, torch.device], tuple[Tensor, ...] | None] = {}
        taken: dict[str, _Taken] = {}
        for name in layers:
            for each in layers[name].ranges:
                self._place(name, each, chosen.get(name, ()), taken)
        every = dict(model.named_parameters())
        self.parameters = {p.name: every[p.name] for block in self.blocks for p in block.parameters}
        first = next(iter(every.values()), torch.empty(0))
        self._empty = torch.empty(0, dtype=first.dtype, device=first.device)
        check_memory(self.parameters, every)

    def _place(
        self, module: str, within: UnitRange, units: Iterable[int], taken: dict[str, _Taken]
    ) -> None:
        """Append blocks for the units of a range; of tied parameters only what is new."""
        units = [unit for unit in units if within.first <= unit < within.stop]
        if not units:
            return
        tied = [parameter for parameter in within.parameters if parameter.tied]
        for parameter in tied:
            before = taken.setdefault(parameter.name, _Taken(module, parameter.cut, set()))
            if before.cut != parameter.cut:
                raise ValueError(
                    f"layers {before.module!r} and {module!r} cut the parameter "
                    f"{parameter.name!r}, which is tied, into units in different ways; select "
                    "units of one of them only"
                )

        def fresh(unit: int) -> tuple[UnitParameter, ...]:
            return tuple(
                p
                for p in within.parameters
                if not p.tied or unit - p.first not in taken[p.name].entries
            )

        for parameters, group in [(key, tuple(group)) for key, group in groupby(units, fresh)]:
            if parameters:
                self.blocks.append(CoordinateBlock(module, group, self.size, parameters))
                self.size += len(group) * self.blocks[-1].width
        for parameter in tied:
            taken[parameter.name].entries.update(unit - parameter.first for unit in units)

    def segments(self) -> tuple[Segment, ...]:
        """List the slices of parameters, in the order of the coordinates."""
        found = []
        for block in self.blocks:
            start = block.start
            positions = [
                zip(*(axis.tolist() for axis in block.positions(p)), strict=True)
                for p in block.parameters
            ]
            for unit, *each in zip(block.units, *positions, strict=True):
                for p, position in zip(block.parameters, each, strict=True):
                    index = p.cut.index(position, p.shape)
                    found.append(Segment(p.name, block.module, unit, start, p.length, index))
                    start += p.length
        return tuple(found)

    def places(self) -> Iterator[tuple[UnitParameter, NDArray[np.intp], NDArray[np.intp]]]:
        """List which entries of a parameter are which coordinates.

        Yields
        ------
        parameter : UnitParameter
        entries : ndarray of int, shape (n,)
            Places in the parameter's cut, ascending.
        starts : ndarray of int, shape (n,)
            The first of the ``parameter.length`` coordinates of each.
        """
        for block in self.blocks:
            first = block.start + np.arange(len(block.units)) * block.width
            for parameter in block.parameters:
                yield parameter, block.entries(parameter), first
                first = first + parameter.length

    def _gathered(self, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
        for block in self.blocks:
            columns = []
            for p in block.parameters:
                tensor = tensors[p.name]
                view, positions = p.cut.view(tensor), self._positions(block, p, tensor.device)
                entries = view if positions is None else view[positions]
                columns.append(entries.reshape(len(block.units), p.length))
            yield (torch.cat(columns, 1) if len(columns) > 1 else columns[0]).flatten()

    def _overwrite(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        for view, positions, entries in self._split(tensors, vector):
            if positions is None:
                view.copy_(entries)
            else:
                view.index_put_(positions, entries.to(view))

    def _increase(self, tensors: Mapping[str, Tensor], vector: Tensor, alpha: float) -> None:
        for view, positions, entries in self._split(tensors, vector):
            old = view if positions is None else view[positions]
            total = old.add(entries.to(view.device), alpha=alpha)
            if positions is None:
                view.copy_(total)
            else:
                view.index_put_(positions, total.to(view.dtype))

    def _split(
        self, tensors: Mapping[str, Tensor], vector: Tensor
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...] | None, Tensor]]:
        """Views of the tensors, where they have the units, and what of the vector belongs there.

        They have units everywhere, in order, where the places are None.
        """
        for block in self.blocks:
            n = len(block.units)
            matrix = vector[block.start : block.start + n * block.width].reshape(n, block.width)
            column = 0
            for p in block.parameters:
                view = p.cut.view(tensors[p.name])
                positions = self._positions(block, p, view.device)
                rest = view.shape[len(p.cut.counts(p.shape)) :]
                shape = view.shape if positions is None else (n, *rest)
                yield view, positions, matrix[:, column : column + p.length].reshape(shape)
                column += p.length

    def _positions(
        self, block: CoordinateBlock, parameter: UnitParameter, device: torch.device
    ) -> tuple[Tensor, ...] | None:
        """`CoordinateBlock.positions` as tensors, kept: to a GPU they are copied once.

        None where these are all places in order: copies are then several times as fast.
        """
        key = block.start, parameter.name, device
        if key not in self._on_device:
            places = math.prod(parameter.cut.counts(parameter.shape))
            whole = np.array_equal(block.entries(parameter), np.arange(places))
            self._on_device[key] = (
                None
                if whole
                else tuple(torch.tensor(axis, device=device) for axis in block.positions(parameter))
            )
        return self._on_device[key]


def _check_alpha(alpha: object) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a real number; got {alpha!r} ({type(alpha).__name__})")


def _is_expanded(tensor: Tensor) -> bool:
    return any(
        stride == 0 and length > 1
        for stride, length in zip(tensor.stride(), tensor.shape, strict=True)
    )


def check_memory(selected: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> None:
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
