"""Layers that have units: which they are, and how their parameters are cut.

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

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # _NormBase: batch and instance norm


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


_FROZEN = "its parameters do not require gradients"


_LISTED = 12  # layers named in an error message


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
