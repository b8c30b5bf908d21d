"""Adapters of peft, such as LoRA: whether the model computes with them, and on what base."""

import sys
from collections.abc import Container, Iterator
from typing import Any

from torch import nn

from lcodec_ext._torch.copies import quantised


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a model that peft has given adapters, by name."""
    # Whoever made such a layer has imported its class.
    kind = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name, module


def check_trainable(model: nn.Module) -> None:
    """Refuse a model without a trainable parameter."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if why := quantised(model):
        raise ValueError(f"the model has no trainable parameter{why}")
    advice = "call requires_grad_(True) on those that may change"
    if next(_adapted_layers(model), None) is not None:
        advice = (
            "peft freezes the adapters that it loads and those that are not active. Pass "
            "PeftModel.from_pretrained(..., is_trainable=True), or set_adapter(name)"
        )
    raise ValueError(f"the model has no trainable parameter: {advice}")


def check_adapters(model: nn.Module, parameters: Container[int]) -> None:
    """Refuse adapters that the model does not compute with, and adapters of quantised layers.

    Parameters
    ----------
    model : Module
    parameters : container of int
        Ids of the parameters that may change. Adapters that have none of them do not matter.
    """
    for name, layer in _adapted_layers(model):
        if not any(id(parameter) in parameters for parameter in layer.parameters()):
            continue
        if layer.merged:
            raise ValueError(
                f"the adapter of {name!r} is merged into its base weights, which hold what it has "
                "learnt, and the model does not compute with the adapter: call "
                "model.unmerge_adapter() first"
            )
        base = layer.get_base_layer()
        kinds = {p.dtype for p in base.parameters() if not p.is_floating_point()}
        kinds |= {b.dtype for b in base.buffers() if not b.is_floating_point()}
        if kinds or getattr(layer, "quantization_backend", None) is not None:
            what = ", ".join(sorted(map(str, kinds))) or type(base).__name__
            raise ValueError(
                f"{name!r} has an adapter on quantised weights ({what}), through which the package "
                "takes no second derivatives: load the base model without quantization_config, in "
                "bfloat16 for instance, and the same adapter on it"
            )
