"""Units of a model, selections of them, and the parameters that a selection owns.

A unit is one output feature of an `nn.Linear` or one output channel of an `nn.Conv1d`, `Conv2d`
or `Conv3d`: a row of the weight (its first axis) and an entry of the bias. Layers are named by
the qualified name under which `named_modules` lists them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._validation import check_integer

# Transposed convolutions are no subclasses of these: their weight holds input channels first.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, init=False)
class UnitSelection:
    """Units of a model as data: for each layer the indices of its selected units.

    Parameters
    ----------
    units : mapping of str to iterable of int
        For each layer, by its qualified module name ("" is the model itself, if it is a layer),
        the indices of the selected units, at least one. They are kept in increasing order.

    Attributes
    ----------
    units : dict of str to tuple of int

    Raises
    ------
    ValueError, TypeError
        For no layer, a layer without a unit, repeated or negative indices, or wrong types.

    Examples
    --------
    >>> selection = UnitSelection({"fc1": [7, 2], "fc2": [0]})
    >>> len(selection), selection.units["fc1"]
    (3, (2, 7))
    >>> UnitSelection.from_dict(selection.to_dict()) == selection
    True
    """

    units: dict[str, tuple[int, ...]]

    def __init__(self, units: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(units, Mapping):
            raise TypeError(
                "units must map layer names to unit indices; got an object of type "
                f"{type(units).__name__}"
            )
        if not units:
            raise ValueError("a selection must have at least one unit; got no layer")
        checked: dict[str, tuple[int, ...]] = {}
        for name, indices in units.items():
            if not isinstance(name, str):
                raise TypeError(f"layer names must be strings; got {name!r}")
            if not isinstance(indices, Iterable):
                raise TypeError(f"the units of layer {name!r} must be integers; got {indices!r}")
            chosen = [check_integer(index, f"a unit of layer {name!r}", 0) for index in indices]
            if not chosen:
                raise ValueError(f"no units are given for layer {name!r}; leave the layer out")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"units of layer {name!r} are repeated: {sorted(chosen)}")
            checked[name] = tuple(sorted(chosen))
        object.__setattr__(self, "units", checked)

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.units.values())

    def n_parameters(self, model: nn.Module) -> int:
        """Count the trainable parameters that the selected units own in a model."""
        return UnitParameters(self, find_layers(model)[0]).size

    def to_dict(self) -> dict[str, list[int]]:
        """Return `units` with lists for tuples, JSON serialisable."""
        return {name: list(indices) for name, indices in self.units.items()}

    @classmethod
    def from_dict(cls, units: Mapping[str, Iterable[int]]) -> "UnitSelection":
        """Make the selection that `to_dict` wrote."""
        return cls(units)


@dataclass(frozen=True)
class Layer:
    """A layer that has units: its module, their number, and its trainable parameters."""

    name: str
    module: nn.Module
    n_units: int
    parameters: dict[str, nn.Parameter]  # by qualified name; units along the first axis

    def mean_activation(self, output: Tensor) -> Tensor:
        """Average each unit over samples and positions, shape (n_units,)."""
        positions = len(self.module.kernel_size) if isinstance(self.module, _CONVOLUTIONS) else 0
        return output.movedim(-1 - positions, -1).reshape(-1, self.n_units).mean(0)


def find_layers(model: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Find the layers that have units, and for the other layers the reason why not.

    Raises
    ------
    ValueError
        If a parameter of a layer belongs to another module, too: tied parameters.
    """
    layers: dict[str, Layer] = {}
    without: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(_join(name, key))
    for name, module in model.named_modules():
        if isinstance(module, _TRANSPOSED):
            without[name] = "transposed convolution: no rows by output channel"
        if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            without[name] = "its weight is computed from other parameters"
            continue
        parameters = {
            _join(name, key): parameter
            for key in ("weight", "bias")
            if (parameter := module._parameters.get(key)) is not None and parameter.requires_grad
        }
        if not parameters:
            without[name] = "its parameters do not require gradients"
            continue
        for parameter in parameters.values():
            if len(owners[id(parameter)]) > 1:
                raise ValueError(
                    "the parameters of a unit must be its own; tied parameters: "
                    + " is ".join(owners[id(parameter)])
                )
        layers[name] = Layer(name, module, len(weight), parameters)
    return layers, without


def _join(module: str, parameter: str) -> str:
    return f"{module}.{parameter}" if module else parameter


class UnitParameters:
    """The parameters of selected units as one vector.

    Layer by layer in the order of the selection: the selected rows of the weight, one after
    another, then their entries of the bias.

    Parameters
    ----------
    selection : UnitSelection
    layers : dict of str to Layer
        The layers of the model that have units.

    Raises
    ------
    ValueError
        If the model has no such layer or unit.
    """

    def __init__(self, selection: UnitSelection, layers: Mapping[str, Layer]) -> None:
        self.size = 0
        self._tensors: list[tuple[str, nn.Parameter, Tensor, torch.Size]] = []
        for name, indices in selection.units.items():
            if name not in layers:
                known = ", ".join(map(repr, layers)) or "none"
                raise ValueError(
                    f"the selection names layer {name!r}, which has no units in this model; "
                    f"layers with units: {known}"
                )
            layer = layers[name]
            if indices[-1] >= layer.n_units:
                raise ValueError(
                    f"the selection names unit {indices[-1]} of layer {name!r}, which has units "
                    f"0 to {layer.n_units - 1}"
                )
            for key, parameter in layer.parameters.items():
                rows = torch.tensor(indices, device=parameter.device)
                shape = torch.Size((len(indices), *parameter.shape[1:]))
                self._tensors.append((key, parameter, rows, shape))
                self.size += math.prod(shape)
        # Differentiating by rows forms the gradient of the whole tensor on the way.
        self.touched = sum(parameter.numel() for _, parameter, _, _ in self._tensors)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Collect the selected entries of tensors given by parameter name, shape (size,)."""
        return torch.cat([tensors[key][rows].flatten() for key, _, rows, _ in self._tensors])

    def values(self) -> Tensor:
        """Collect the parameters themselves, detached."""
        return self.gather({key: parameter.detach() for key, parameter, _, _ in self._tensors})

    def substituted(self, vector: Tensor) -> dict[str, Tensor]:
        """Make whole parameters, by name, with the selected entries taken from a vector.

        Differentiable by the vector; for `torch.func.functional_call`.
        """
        return {
            key: parameter.detach().index_put((rows,), entries)
            for key, parameter, rows, entries in self._split(vector)
        }

    def write(self, vector: Tensor, model: nn.Module) -> None:
        """Overwrite the selected parameters of a model of the same architecture."""
        with torch.no_grad():
            for key, _, rows, entries in self._split(vector):
                parameter = model.get_parameter(key)
                parameter[rows] = entries.to(parameter)

    def _split(self, vector: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor, Any]]:
        start = 0
        for key, parameter, rows, shape in self._tensors:
            stop = start + math.prod(shape)
            yield key, parameter, rows, vector[start:stop].view(shape)
            start = stop
