"""The layers whose units the unlearning records, selects and changes.

They are `nn.Linear`, with one unit for each output feature, and `nn.Conv1d`, `Conv2d` and `Conv3d`,
with one for each output channel. What a unit's parameters are is said by
`lcodec_ext.curvature.UnitSelection`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lcodec_ext.curvature.units import UnitSelection, find_unit_layers, parameter_owners

# Transposed convolutions are no subclasses of these.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """A layer that has units: its module and their number."""

    name: str
    module: nn.Module
    n_units: int

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
    found, without = find_unit_layers(model)
    owners = parameter_owners(model)
    modules = dict(model.named_modules())
    layers: dict[str, Layer] = {}
    for name, layer in found.items():
        if isinstance(layer.module, _TRANSPOSED):
            without[name] = "transposed convolution: its units are not recorded"
        if not isinstance(layer.module, (nn.Linear, *_CONVOLUTIONS)):
            continue
        for parameter in layer.module.parameters(recurse=False):
            names = owners[id(parameter)]
            if parameter.requires_grad and len(names) > 1:
                raise ValueError(
                    "the parameters of a unit must be its own; tied parameters: "
                    + " is ".join(names)
                )
        layers[name] = Layer(name, layer.module, layer.n_units)
    kinds = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
    without = {
        name: reason for name, reason in without.items() if isinstance(modules.get(name), kinds)
    }
    return layers, without


def check_selection(selection: UnitSelection, layers: Mapping[str, Layer]) -> None:
    """Refuse a selection that is empty or has layers other than these."""
    if not selection:
        raise ValueError("the selection must have at least one unit; it is empty")
    for name in selection.units:
        if name not in layers:
            known = ", ".join(map(repr, layers)) or "none"
            raise ValueError(
                f"the selection names layer {name!r}, which has no units in this model; layers "
                f"with units: {known}"
            )
