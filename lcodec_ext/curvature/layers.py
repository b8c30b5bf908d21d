"""Layers that have units: which they are, and how their parameters are cut into units.

docs/curvature.md lists the kinds of layers and the slices that their units own.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from lcodec_ext._checks import first_few
from lcodec_ext._torch.copies import quantised
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.wrapped import unwrapped

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OVER_FEATURES = (nn.LayerNorm, nn.RMSNorm)
NORMS = (_NormBase, nn.GroupNorm, *OVER_FEATURES)  # _NormBase: batch and instance norms
_KINDS = (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *TRANSPOSED, *EMBEDDINGS, *NORMS)
_FROZEN = "its parameters do not require gradients"
_LISTED = 12  # layers named in an error message


@dataclass(frozen=True)
class Cut:
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
        """The reverse of `view`."""
        return view.transpose(1, 2).flatten(0, 1) if self.groups else view

    def counts(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Lengths of the axes that count units."""
        return (self.groups, shape[1]) if self.groups else tuple(shape[: self.leading])

    def index(self, position: tuple[int, ...], shape: Sequence[int]) -> tuple[int | slice, ...]:
        """Where the parameter has what `view` has at a position on the axes that count units."""
        if not self.groups:
            return position
        group, column = position
        n_inputs = shape[0] // self.groups
        return slice(group * n_inputs, (group + 1) * n_inputs), column


@dataclass(frozen=True)
class UnitParameter:
    """A parameter in which every unit of a range owns a slice."""

    name: str  # as named_parameters lists it
    shape: tuple[int, ...]
    cut: Cut
    first: int  # the unit that owns its first slice
    tied: bool  # other modules have it, too

    @property
    def length(self) -> int:
        """Entries of one unit's slice."""
        return math.prod(self.shape) // max(1, math.prod(self.cut.counts(self.shape)))


@dataclass(frozen=True)
class UnitRange:
    """Units of a layer, from first up to stop, that own slices of the same parameters."""

    first: int
    stop: int
    parameters: tuple[UnitParameter, ...]


@dataclass(frozen=True)
class UnitLayer:
    """A layer that has units with trainable parameters."""

    module: nn.Module
    n_units: int
    ranges: tuple[UnitRange, ...]
    refused: dict[int, str]  # units that cannot be selected, and why

    def selectable(self) -> list[int]:
        """The units that can be selected."""
        return [unit for unit in range(self.n_units) if unit not in self.refused]


class NoUnitsError(Exception):
    """Why a module of a kind that has units has none."""


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear layer with its weight transposed."""
    # Whoever made such a module has imported its class.
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())
    return isinstance(module, kind)


def is_linear(module: nn.Module) -> bool:
    """Whether the layer multiplies the last axis of its input by a matrix."""
    return isinstance(module, nn.Linear) or is_transformers_conv1d(module)


def is_unit_layer(module: nn.Module) -> bool:
    """Whether the module is of a kind that has units."""
    return isinstance(module, _KINDS) or is_transformers_conv1d(module)


def unit_axis(module: nn.Module) -> tuple[int, int]:
    """On which axis of a layer's output its units are, and how many last axes count them together.

    The axis counts from the front, or, negative, from the end.
    """
    if isinstance(module, CONVOLUTIONS + TRANSPOSED):
        return -1 - len(module.kernel_size), 1
    if isinstance(module, INSTANCE_NORMS):
        return -2 - next(k for k, kind in enumerate(INSTANCE_NORMS) if isinstance(module, kind)), 1
    if isinstance(module, OVER_FEATURES):
        return -1, len(module.normalized_shape)
    return 1 if isinstance(module, NORMS) else -1, 1


#: A parameter's attribute name: its cut, and the unit that owns its first slice.
Cuts = dict[str, tuple[Cut, int]]


def unit_cuts(module: nn.Module) -> list[tuple[int, int, Cuts]]:
    """Units and parameters of a layer: (first, stop, cuts) for each range of units.

    Raises NoUnitsError, with the reason, where a parameter cannot be written to.
    """
    weights, bias = ["weight"], "bias"
    if isinstance(module, nn.MultiheadAttention):
        weights, bias = ["in_proj_weight"], "in_proj_bias"
        if not module.embed_dim == module.kdim == module.vdim:
            weights = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    problem = not_differentiable(module)
    if problem:
        raise NoUnitsError(problem)
    found: list[tuple[int, int, Cuts]] = []
    first = 0
    for key in weights:
        weight = _parameter(module, key)
        if weight is None:
            raise NoUnitsError("it has no parameters")
        cut = Cut()
        if isinstance(module, TRANSPOSED):
            cut = Cut(groups=module.groups)
        elif is_transformers_conv1d(module):
            cut = Cut(groups=1)
        elif isinstance(module, NORMS):
            cut = Cut(leading=weight.ndim)
        cuts = {key: (cut, first)}
        shift = _parameter(module, bias)
        if shift is not None:
            cuts[bias] = (Cut(leading=shift.ndim), 0)
        stop = first + math.prod(cut.counts(weight.shape))
        found.append((first, stop, cuts))
        first = stop
    return found


def not_differentiable(module: nn.Module) -> str:
    """Why the gradients of a layer's weight are not derivatives; empty if they are."""
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return "max_norm: its forward pass overwrites its weight"
    if isinstance(module, EMBEDDINGS) and module.scale_grad_by_freq:
        return "scale_grad_by_freq: its gradients are not derivatives of the loss"
    return ""


def _parameter(module: nn.Module, key: str) -> nn.Parameter | None:
    """A module's own parameter; None if it has none of that name."""
    if parametrize.is_parametrized(module, key):
        raise NoUnitsError(f"its {key} is computed from other parameters, by a parametrization")
    parameter = module._parameters.get(key)
    if parameter is None and getattr(module, key, None) is not None:
        raise NoUnitsError(f"its {key} is computed from other parameters, or is a buffer")
    if isinstance(parameter, nn.UninitializedParameter):
        raise NoUnitsError(f"its {key} is not initialised; run the model once")
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
        If it has none, or if its weight is computed from others or not initialised.

    Examples
    --------
    >>> n_units(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
    6
    """
    check_module(module)
    if not is_unit_layer(module):
        raise ValueError(f"a module of type {type(module).__name__} has no units")
    try:
        return unit_cuts(module)[-1][1]
    except NoUnitsError as error:
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
    check_module(model)
    model = unwrapped(model)
    owners = parameter_owners(model)
    layers: dict[str, UnitLayer] = {}
    without: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_unit_layer(module) or name in without:
            continue
        if isinstance(module, nn.MultiheadAttention):
            name = _join(name, "in_proj")
            if "in_proj" in module._modules:
                without[name] = "it names a module and the input projections of its attention"
                continue
        try:
            layers[name] = _unit_layer(module, owners)
        except NoUnitsError as error:
            without[name] = str(error)
    return layers, without


def _unit_layer(module: nn.Module, owners: dict[int, list[str]]) -> UnitLayer:
    ranges = []
    refused: dict[int, str] = {}
    n = 0
    for first, n, cuts in unit_cuts(module):
        parameters = []
        for key, (cut, origin) in cuts.items():
            parameter = module._parameters[key]
            assert parameter is not None
            if parameter.requires_grad:
                names = owners[id(parameter)]
                shape = tuple(parameter.shape)
                parameters.append(UnitParameter(names[0], shape, cut, origin, len(names) > 1))
        if parameters:
            ranges.append(UnitRange(first, n, tuple(parameters)))
        else:  # one of an attention's projections, or all there is
            refused |= dict.fromkeys(range(first, n), _FROZEN)
    if isinstance(module, EMBEDDINGS) and module.padding_idx is not None:
        refused.setdefault(module.padding_idx, "it is padding_idx, whose gradient is always zero")
    if len(refused) >= n:
        raise NoUnitsError(next(iter(refused.values()), "it has none"))
    return UnitLayer(module, n, tuple(ranges), refused)


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def listed(layers: Iterable[str]) -> str:
    """The layers with units, as the end of an error message."""
    return f"layers with units: {first_few([*map(repr, layers)], _LISTED) or 'none'}"


def why_not(name: str, model: nn.Module, layers: Iterable[str], without: dict[str, str]) -> str:
    """The reason why a layer cannot be selected, as the end of a sentence that names it."""
    if name in without:
        return f"whose units cannot be selected: {without[name]}"
    every = dict(model.named_modules(remove_duplicate=False))
    firsts = {id(module): first for first, module in model.named_modules()}
    owner = name if name in every else name.removesuffix("in_proj").removesuffix(".")
    module = every.get(owner)
    if module is not None and is_unit_layer(module):
        first, attention = firsts[id(module)], isinstance(module, nn.MultiheadAttention)
        if owner != first:
            first = _join(first, "in_proj") if attention else first
            return f"which is {first!r} under another name; take that one"
        if attention:
            return (
                f"a MultiheadAttention; its units are those of {_join(owner, 'in_proj')!r} and "
                f"{_join(owner, 'out_proj')!r}"
            )
    kind = f" (a {type(every[name]).__name__})" if name in every else ""
    return f"which has no units in this model{kind}; {listed(layers)}{quantised(model)}"
