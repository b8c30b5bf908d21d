"""Units of a model, selections of them, and their parameters as one vector.

A unit is what a layer computes one output feature with: a slice of its weight and an entry of its
bias. Layers are named by the qualified name under which `named_modules` lists them.

==============================  ==================  ============================================
Layer                           Units               Slice of the weight, then of the bias
==============================  ==================  ============================================
Linear                          output features     ``weight[o]``, ``bias[o]``
Conv1d, Conv2d, Conv3d          output channels     ``weight[o]``, ``bias[o]``
ConvTranspose1d, 2d, 3d         output channels     ``weight[g * i : (g + 1) * i, o % k]``,
                                                    ``bias[o]``; k = out_channels / groups,
                                                    g = o // k, i = in_channels / groups
transformers Conv1D             output features     ``weight[:, o]``, ``bias[o]``
Embedding, EmbeddingBag         rows                ``weight[o]``
BatchNorm, InstanceNorm,        entries             ``weight.flatten()[o]``,
GroupNorm, LayerNorm, RMSNorm                       ``bias.flatten()[o]``
MultiheadAttention ``name``,    queries, keys and   ``in_proj_weight[o]``, or row o % embed_dim of
as layer ``name.in_proj``       values in a row     ``q_``, ``k_``, ``v_proj_weight``;
                                                    ``in_proj_bias[o]``
==============================  ==================  ============================================

The output projection of a MultiheadAttention is a Linear, ``name.out_proj``. Its ``bias_k`` and
``bias_v`` belong to no unit. Subclasses count as their base class.
"""

import dataclasses
import json
import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from lcodec_ext._checks import check_integer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: batch and instance norm
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_FROZEN = "its parameters do not require gradients"
_LISTED = 12  # layers named in an error message


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


class UnitSelection:
    """Units of a model as data: for each layer the indices of its selected units.

    A selection knows no model. Methods that take one, or tensors by parameter name, lay out the
    selected parameters as one vector of ``size(model)`` coordinates: for each layer in the order of
    `named_modules`, for each selected unit ascending, its slice of the weight, flattened, then its
    entry of the bias. The module `lcodec_ext.curvature.units` lists the slices.

    - Parameters that do not require gradients are not coordinates.
    - An entry of a tied parameter that several selected units own is one coordinate, at its first
      place, under the name by which `named_parameters` lists it.
    - A module that is registered under several names goes by its first.

    Parameters
    ----------
    units : mapping of str to iterable of int
        For each layer, by its qualified module name ("" is the model itself, if it is a layer),
        the indices of the selected units, at least one. They are kept in increasing order; the
        order of the layers is of no meaning. An empty mapping is the empty selection.

    Raises
    ------
    ValueError, TypeError
        For a layer without a unit, repeated or negative indices, or wrong types.

    Notes
    -----
    Immutable and hashable. ``|``, ``&`` and ``-`` are set operations on units, ``len`` is their
    number. Where a model is taken, ValueError is raised, by name and with the reason, for

    - layers and units that the model does not have, and modules that have no units;
    - layers without a parameter that requires gradients;
    - weights that are computed from others (parametrizations, weight norm, pruning);
    - lazy modules that have not run yet;
    - the row `padding_idx` of an embedding, whose gradient is always zero, and embeddings with
      `max_norm`, whose forward pass overwrites their weight, or `scale_grad_by_freq`, whose
      gradients are no derivatives;
    - two selected layers that cut one tied parameter into units in different ways, as a convolution
      and a transposed one;
    - selected parameters whose memory overlaps that of another one without being the same object,
      and expanded ones: writing to one would change the other.

    Only the selected layers are looked at: another one never gets in the way.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> selection = UnitSelection({"2": [0], "0": [7, 2]})
    >>> len(selection), selection.units["0"], selection.size(model)
    (3, (2, 7), 15)
    >>> UnitSelection.from_json(selection.to_json()) == selection
    True
    >>> (UnitSelection.all(model) - selection).units
    {'0': (0, 1, 3, 4, 5, 6), '2': (1, 2)}
    >>> vector = selection.gather(model).detach()
    >>> selection.add_(model, vector, alpha=-1)
    >>> model[0].bias[2].item(), selection.gather(model).norm().item()
    (0.0, 0.0)
    """

    __slots__ = ("_units",)

    def __init__(self, units: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(units, Mapping):
            raise TypeError(
                "units must map layer names to unit indices; got an object of type "
                f"{type(units).__name__}"
            )
        self._units: dict[str, tuple[int, ...]] = {}
        for name, indices in units.items():
            if not isinstance(name, str):
                raise TypeError(f"layer names must be strings; got {name!r}")
            if isinstance(indices, Tensor):
                indices = indices.tolist()
            if not isinstance(indices, Iterable):
                raise TypeError(f"the units of layer {name!r} must be integers; got {indices!r}")
            chosen = [check_integer(index, f"a unit of layer {name!r}", 0) for index in indices]
            if not chosen:
                raise ValueError(f"no units are given for layer {name!r}; leave the layer out")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"units of layer {name!r} are repeated: {sorted(chosen)}")
            self._units[name] = tuple(sorted(chosen))

    # -----------------------------------------------------------------------------------------
    # Other ways to make one

    @classmethod
    def all(cls, model: nn.Module) -> "UnitSelection":
        """Select every unit of a model that can be selected.

        Left out is what the class refuses: frozen layers, computed weights, padding rows and so
        on. Of two layers that cut a tied parameter in different ways, the first is taken.
        """
        layers, _ = find_unit_layers(model)
        cuts: dict[str, _Cut] = {}
        chosen = {}
        for name, layer in layers.items():
            parts = [part for block in layer.blocks for part in block.parts]
            if all(cuts.get(part.parameter, part.cut) == part.cut for part in parts):
                cuts |= {part.parameter: part.cut for part in parts}
                chosen[name] = layer.selectable()
        return cls(chosen)

    @classmethod
    def from_globs(cls, model: nn.Module, *patterns: str) -> "UnitSelection":
        """Select all units of the layers whose names match a pattern.

        Parameters
        ----------
        model : Module
        *patterns : str
            Shell patterns, as in `fnmatch.fnmatchcase`: "encoder.*", "layer[34].?.conv2". ``*``
            also matches dots. At least one.

        Raises
        ------
        ValueError
            For a pattern that matches no layer with units that can be selected, or layers that
            cannot be selected together.
        """
        if not patterns:
            raise ValueError("patterns must have at least one pattern; got none")
        layers, without = find_unit_layers(model)
        chosen: dict[str, None] = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"patterns must be strings; got {pattern!r}")
            matched = [name for name in layers if fnmatchcase(name, pattern)]
            if not matched:
                reasons = [
                    f"layer {name!r}: {reason}"
                    for name, reason in without.items()
                    if fnmatchcase(name, pattern)
                ]
                why = f"; {'; '.join(reasons[:_LISTED])}" if reasons else f"; {_known(layers)}"
                raise ValueError(f"the pattern {pattern!r} matches no layer with units{why}")
            chosen |= dict.fromkeys(matched)
        selection = cls({name: layers[name].selectable() for name in layers if name in chosen})
        UnitLayout(selection, model)  # its refusals, while the patterns are at hand
        return selection

    def to_dict(self) -> dict[str, list[int]]:
        """Return `units` with lists for tuples, JSON serialisable."""
        return {name: list(indices) for name, indices in self._units.items()}

    @classmethod
    def from_dict(cls, units: Mapping[str, Iterable[int]]) -> "UnitSelection":
        """Make the selection that `to_dict` wrote."""
        return cls(units)

    def to_json(self) -> str:
        """Write the selection as a JSON object: {"layer": [unit, ...], ...}."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> "UnitSelection":
        """Make the selection that `to_json` wrote; ValueError if it cannot be read."""
        try:
            units = json.loads(text)
        except ValueError as error:
            raise ValueError(f"text must be the JSON of a UnitSelection: {error}") from error
        if not isinstance(units, dict):
            raise ValueError(
                f"text must be the JSON of a UnitSelection, an object; got {text[:40]!r}"
            )
        return cls(units)

    # -----------------------------------------------------------------------------------------
    # A set of units

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """For each layer its selected units, ascending; a copy."""
        return dict(self._units)

    def __len__(self) -> int:
        return sum(map(len, self._units.values()))

    def __eq__(self, other: object) -> bool:
        return self._units == other._units if isinstance(other, UnitSelection) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._units.items()))

    def __repr__(self) -> str:
        return f"UnitSelection({self.to_dict()})"

    def __or__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.union)

    def __and__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.intersection)

    def __sub__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.difference)

    def _combine(self, other: object, operation: Any) -> "UnitSelection":
        if not isinstance(other, UnitSelection):
            return NotImplemented
        combined = {
            name: operation(set(self._units.get(name, ())), other._units.get(name, ()))
            for name in self._units | other._units
        }
        return UnitSelection({name: units for name, units in combined.items() if units})

    # -----------------------------------------------------------------------------------------
    # The vector of its parameters

    def size(self, model: nn.Module) -> int:
        """Count the coordinates: the trainable parameters that the units own in a model."""
        return UnitLayout(self, model).size

    def segments(self, model: nn.Module) -> tuple[Segment, ...]:
        """List the slices of parameters that the units own, in the order of the coordinates."""
        return UnitLayout(self, model).segments()

    def gather(
        self, source: nn.Module | Mapping[str, Tensor], *, model: nn.Module | None = None
    ) -> Tensor:
        """Collect the selected entries of a model's parameters, or of tensors of their shapes.

        Parameters
        ----------
        source : Module or mapping of str to Tensor
            Tensors by parameter name, gradients for instance: at least those of `segments`, of
            the shapes of the parameters and on one device.
        model : Module, optional
            The model that has the selected layers; given with a mapping, and only then.

        Returns
        -------
        Tensor, shape (size(model),)
            A copy. Of the dtype of the tensors, the promoted one where they differ, and on their
            device; an empty selection takes both from the model's first parameter. Differentiable
            by the tensors, as indexing is.

        Raises
        ------
        ValueError, TypeError
            For what the class refuses, and for tensors that are missing or of another shape.

        Notes
        -----
        Copies size(model) entries a few times; no work is done on the parameters' other entries.
        """
        layout, tensors = self._lay_out(source, model, "source")
        return layout.gather(tensors)

    def scatter_(
        self,
        target: nn.Module | Mapping[str, Tensor],
        vector: Tensor,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Overwrite the selected entries in place, the reverse of `gather`; others stay.

        Parameters
        ----------
        target : Module or mapping of str to Tensor
            As the source of `gather`.
        vector : Tensor, shape (size(model),)
            Converted to the dtype and device of each tensor.
        model : Module, optional
            The model that has the selected layers; given with a mapping, and only then.

        Raises
        ------
        ValueError, TypeError
            As `gather`, and for a vector of another shape or of a dtype that does not convert
            (floating to integer, complex to real). Nothing has been written then.
        """
        layout, tensors = self._lay_out(target, model, "target")
        layout.scatter_(tensors, vector)

    def add_(
        self,
        target: nn.Module | Mapping[str, Tensor],
        vector: Tensor,
        alpha: float = 1,
        *,
        model: nn.Module | None = None,
    ) -> None:
        """Add alpha * vector to the selected entries in place; others stay.

        Parameters
        ----------
        target : Module or mapping of str to Tensor
            As the source of `gather`.
        vector : Tensor, shape (size(model),)
            The sum is formed in the wider of its dtype and the target's, and rounded once.
        alpha : float, default 1
        model : Module, optional
            The model that has the selected layers; given with a mapping, and only then.

        Raises
        ------
        ValueError, TypeError
            As `scatter_`.
        """
        layout, tensors = self._lay_out(target, model, "target")
        layout.add_(tensors, vector, alpha)

    def _lay_out(
        self, tensors: object, model: nn.Module | None, name: str
    ) -> "tuple[UnitLayout, Mapping[str, Tensor]]":
        if isinstance(tensors, nn.Module):
            if model is not None:
                raise TypeError(f"model is given with a mapping only; {name} is a model itself")
            layout = UnitLayout(self, tensors)
            return layout, layout.parameters
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"{name} must be a torch.nn.Module or a mapping of parameter names to tensors; got "
                f"an object of type {type(tensors).__name__}"
            )
        if model is None:
            raise TypeError(
                f"model must be given where {name} is a mapping: the module whose parameters it "
                "holds the tensors of"
            )
        return UnitLayout(self, model), tensors


# ---------------------------------------------------------------------------------------------
# Layers that have units


@dataclass(frozen=True)
class _Cut:
    """How a parameter is cut into units.

    groups = 0: the leading axes count the units. groups > 0, transposed layers: the first axis
    holds the input channels of all groups, the second the outputs of one group.
    """

    leading: int = 1
    groups: int = 0

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor with the axes that count units first; always a view."""
        if self.groups:
            return torch.unflatten(tensor, 0, (self.groups, -1)).transpose(1, 2)
        return tensor

    def unview(self, view: Tensor) -> Tensor:
        return view.transpose(1, 2).flatten(0, 1) if self.groups else view

    def counts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Lengths of the axes that count units."""
        if self.groups:
            return self.groups, shape[1]
        return tuple(shape[: self.leading])

    def index(self, position: tuple[int, ...], shape: Sequence[int]) -> tuple[int | slice, ...]:
        """Where the parameter has what `view` has at a position on the axes that count units."""
        if not self.groups:
            return position
        group, column = position
        n_inputs = shape[0] // self.groups
        return slice(group * n_inputs, (group + 1) * n_inputs), column


@dataclass(frozen=True)
class _Part:
    """A parameter of which every unit of a block owns a slice."""

    parameter: str  # as named_parameters lists it
    shape: tuple[int, ...]
    cut: _Cut
    first: int  # the unit that owns its first slice
    tied: bool  # other modules have it, too

    @property
    def length(self) -> int:
        """Entries of one unit's slice."""
        return math.prod(self.shape) // max(1, math.prod(self.cut.counts(self.shape)))


@dataclass(frozen=True)
class _Block:
    """Units of a layer, from first up to stop, that own slices of the same parameters."""

    first: int
    stop: int
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class UnitLayer:
    """A layer that has units with trainable parameters."""

    name: str
    module: nn.Module
    n_units: int
    blocks: tuple[_Block, ...]
    refused: dict[int, str]  # units that cannot be selected, and why

    def selectable(self) -> list[int]:
        """The units that can be selected."""
        return [unit for unit in range(self.n_units) if unit not in self.refused]


class _NoUnitsError(Exception):
    """Why a module of a kind that has units has none."""


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # Whoever made such a module has imported its class.
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    return isinstance(module, kind)


def _is_layer(module: nn.Module) -> bool:
    kinds = (
        nn.Linear,
        nn.MultiheadAttention,
        *_CONVOLUTIONS,
        *_TRANSPOSED,
        *_EMBEDDINGS,
        *_NORMS,
    )
    return isinstance(module, kinds) or _is_transformers_conv1d(module)


def _pieces(module: nn.Module) -> list[tuple[int, int, dict[str, tuple[_Cut, int]]]]:
    """Units and parameters of a layer: (first, stop, {attribute: (cut, its first unit)}).

    Raises _NoUnitsError, with the reason, if a parameter of it is not one that can be written to.
    """
    if isinstance(module, nn.MultiheadAttention):
        weights, bias = ["in_proj_weight"], "in_proj_bias"
        if not module.embed_dim == module.kdim == module.vdim:
            weights = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    else:
        weights, bias = ["weight"], "bias"
    if isinstance(module, _EMBEDDINGS):
        if module.max_norm is not None:
            raise _NoUnitsError("max_norm: its forward pass overwrites its weight")
        if module.scale_grad_by_freq:
            raise _NoUnitsError("scale_grad_by_freq: its gradients are no derivatives of the loss")
    pieces = []
    first = 0
    for key in weights:
        weight = _parameter(module, key)
        if weight is None:
            raise _NoUnitsError("it has no parameters")
        cut = _Cut()
        if isinstance(module, _TRANSPOSED):
            cut = _Cut(groups=module.groups)
        elif _is_transformers_conv1d(module):
            cut = _Cut(groups=1)
        elif isinstance(module, _NORMS):
            cut = _Cut(leading=weight.ndim)
        stop = first + math.prod(cut.counts(weight.shape))
        attributes = {key: (cut, first)}
        shift = _parameter(module, bias)
        if shift is not None:
            attributes[bias] = (_Cut(leading=shift.ndim), 0)
        pieces.append((first, stop, attributes))
        first = stop
    return pieces


def _parameter(module: nn.Module, key: str) -> nn.Parameter | None:
    """A module's own parameter, None if it has none of that name."""
    if parametrize.is_parametrized(module, key):
        raise _NoUnitsError(f"its {key} is computed from other parameters, by a parametrization")
    parameter = module._parameters.get(key)
    if parameter is None and getattr(module, key, None) is not None:
        raise _NoUnitsError(f"its {key} is computed from other parameters, or is a buffer")
    if isinstance(parameter, nn.UninitializedParameter):
        raise _NoUnitsError(f"its {key} is not initialised; run the model once")
    return parameter


def n_units(module: nn.Module) -> int:
    """Count the units of one layer, whether its parameters require gradients or not.

    Parameters
    ----------
    module : Module
        Of a kind that has units; for a `MultiheadAttention`, those of its input projections.

    Raises
    ------
    ValueError
        If it has none, or if its weight is computed from other parameters or not initialised.

    Examples
    --------
    >>> n_units(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
    6
    """
    _check_module(module)
    if not _is_layer(module):
        raise ValueError(f"a module of type {type(module).__name__} has no units")
    try:
        return _pieces(module)[-1][1]
    except _NoUnitsError as error:
        raise ValueError(f"this {type(module).__name__} has no units: {error}") from None


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """List for every parameter, by id, the names it has in the modules that own it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(_join(name, key))
    return owners


def find_unit_layers(model: nn.Module) -> tuple[dict[str, UnitLayer], dict[str, str]]:
    """Find the layers with units that can be selected, and for other layers the reason why not.

    Layers are in the order of `named_modules`. A `MultiheadAttention` stands as its input
    projections, under its name with ".in_proj".
    """
    _check_module(model)
    owners = parameter_owners(model)
    layers: dict[str, UnitLayer] = {}
    without: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _is_layer(module) or name in without:
            continue
        if isinstance(module, nn.MultiheadAttention):
            name = _join(name, "in_proj")
            if "in_proj" in module._modules:
                without[name] = "it names a module and the input projections of its attention"
                continue
        try:
            pieces = _pieces(module)
        except _NoUnitsError as error:
            without[name] = str(error)
            continue
        blocks = []
        refused: dict[int, str] = {}
        for first, stop, attributes in pieces:
            parts = []
            for key, (cut, origin) in attributes.items():
                parameter = module._parameters[key]
                assert parameter is not None
                if parameter.requires_grad:
                    names = owners[id(parameter)]
                    shape = tuple(parameter.shape)
                    parts.append(_Part(names[0], shape, cut, origin, len(names) > 1))
            if parts:
                blocks.append(_Block(first, stop, tuple(parts)))
            else:  # one of an attention's projections, or all there is
                refused |= dict.fromkeys(range(first, stop), _FROZEN)
        if isinstance(module, _EMBEDDINGS) and module.padding_idx is not None:
            refused.setdefault(
                module.padding_idx, "it is padding_idx, whose gradient is always zero"
            )
        n = pieces[-1][1]
        if len(refused) < n:
            layers[name] = UnitLayer(name, module, n, tuple(blocks), refused)
        else:
            without[name] = next(iter(refused.values()), "it has none")
    return layers, without


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(module).__name__}")


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _known(layers: Iterable[str]) -> str:
    names = list(layers)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"layers with units: {', '.join(map(repr, names[:_LISTED])) or 'none'}{more}"


def _why_not(name: str, model: nn.Module, layers: Iterable[str], without: dict[str, str]) -> str:
    """The reason why a layer cannot be selected, as the end of a sentence that names it."""
    if name in without:
        return f"whose units cannot be selected: {without[name]}"
    every = dict(model.named_modules(remove_duplicate=False))
    firsts = {id(module): first for first, module in model.named_modules()}
    owner = name if name in every else name.removesuffix("in_proj").removesuffix(".")
    if owner in every:
        module = every[owner]
        first = firsts[id(module)]
        if owner != first and _is_layer(module):
            if isinstance(module, nn.MultiheadAttention):
                first = _join(first, "in_proj")
            return f"which is {first!r} under another name; take that one"
        if isinstance(module, nn.MultiheadAttention):
            return (
                f"a MultiheadAttention; its units are those of {_join(owner, 'in_proj')!r} and "
                f"{_join(owner, 'out_proj')!r}"
            )
    kind = f" (a {type(every[name]).__name__})" if name in every else ""
    return f"which has no units in this model{kind}; {_known(layers)}"


# ---------------------------------------------------------------------------------------------
# The vector


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

    def __init__(self, selection: UnitSelection, model: nn.Module) -> None:
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
