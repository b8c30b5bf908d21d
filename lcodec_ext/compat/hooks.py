"""What scripts import from ``hypercolumn`` of the published code: activations by forward hooks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lcodec_ext.compat.switch import bugs

Mean = Callable[[nn.Module, Tensor], Tensor]


class _Hooked(nn.Module):
    """The mean activation of each unit, layer by layer in the order of `getLayers`.

    Of a layer that is called several times, the mean over the calls; zeros for one that is not
    called. With `reference_bugs`, in the order of calls: then columns and layers need not agree.
    """

    _kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)

    def __init__(self, model: nn.Module, *, reference_bugs: bool | None = None) -> None:
        super().__init__()
        self.model = model.eval()
        self.layers = [each for each in model.modules() if isinstance(each, self._kinds)]
        self.activations: list[Tensor] = []
        self._by_call = bugs(reference_bugs)
        self._calls: list[tuple[nn.Module, Tensor]] = []
        self.hooks: list[RemovableHandle] = [
            layer.register_forward_hook(self._record) for layer in self.layers
        ]

    def _record(self, module: nn.Module, _: Any, output: Tensor) -> None:
        over = [0, 2, 3] if isinstance(module, nn.Conv2d) else list(range(output.ndim - 1))
        self._calls.append((module, output.mean(over)))

    def _run(self, call: Callable[[], Any]) -> tuple[list[Tensor], Any]:
        self._calls = []
        output = call()
        if self._by_call:
            self.activations = [mean for _, mean in self._calls]
        else:
            self.activations = [self._of(layer) for layer in self.layers]
        return self.activations, output

    def _of(self, layer: nn.Module) -> Tensor:
        means = [mean for called, mean in self._calls if called is layer]
        weight = layer.get_parameter("weight")
        return torch.stack(means).mean(0) if means else weight.new_zeros(len(weight))

    def getLayers(self) -> list[nn.Module]:
        """The layers whose activations are recorded, in the order of registration."""
        return self.layers

    def clearHooks(self) -> None:
        """Record no longer."""
        for hook in self.hooks:
            hook.remove()


class ActivationsHook(_Hooked):
    """Mean activations of linear and convolution layers; the model goes into evaluation mode."""

    def getActivations(self, x: Any) -> tuple[list[Tensor], Any]:
        """Call the model; the activations of its layers, each of shape (units,), and its output."""
        return self._run(lambda: self.model(x))


class NLP_ActivationsHook(_Hooked):
    """Mean activations of linear layers, over texts and tokens."""

    _kinds = (nn.Linear,)

    def get_NLP_Activations(self, x: Any) -> tuple[list[Tensor], Any]:
        """Call the model with keyword arguments; as `ActivationsHook.getActivations`."""
        return self._run(lambda: self.model(**x))


class HyperC(nn.Module):
    """The maps of all convolutions as samples: one column for each filter, one row a pixel."""

    def __init__(self, model: nn.Module, interp_size: int = 64, interpolate: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        self.interpolate, self.interp_size = interpolate, interp_size
        self.layers = [each for each in model.modules() if isinstance(each, nn.Conv2d)]

    def getHC(self, x: Any) -> tuple[Any, list[nn.Conv2d]]:
        """The maps in the order of calls, and the layers: one tensor if they are interpolated."""
        outputs: list[Tensor] = []

        def record(_: nn.Module, __: Any, output: Tensor) -> None:
            if self.interpolate:
                output = functional.interpolate(
                    output, size=self.interp_size, mode="bilinear", align_corners=True
                )
            outputs.append(output)

        hooks = [layer.register_forward_hook(record) for layer in self.layers]
        try:
            self.model(x)
        finally:
            for hook in hooks:
                hook.remove()
        return (torch.cat(outputs, dim=1) if self.interpolate else outputs), self.layers
