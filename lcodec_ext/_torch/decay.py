"""Weight decay: one number for all parameters, or one for each."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_real
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.names import own_name
from lcodec_ext._torch.wrapped import unwrapped

#: One number, or one for each parameter by its name; 0 for those without a name.
Decay = float | Mapping[str, float]


def check_decay(value: Any, name: str = "weight_decay") -> float | dict[str, float]:
    """A number >= 0, or numbers by parameter name."""
    if isinstance(value, torch.optim.Optimizer):
        raise TypeError(
            f"{name} is an optimizer, and its model is not known here: pass the numbers by "
            "parameter name, or to `unlearn`, `Unlearner` or `estimate` weight_decay=optimizer"
        )
    if not isinstance(value, Mapping):
        return check_real(value, name, 0)
    return {str(key): check_real(each, f"{name}[{key!r}]", 0) for key, each in value.items()}


def decay_of(value: Any, model: nn.Module, name: str = "weight_decay") -> float | dict[str, float]:
    """The weight decay of a model's trainable parameters: one number if it is the same for all.

    Parameters
    ----------
    value : float, torch.optim.Optimizer, or mapping of str to float
        An optimizer of the model's parameters has it in its groups. Parameters that neither the
        optimizer nor the mapping has get 0.

    Raises
    ------
    ValueError
        For an optimizer of another model, and names that the model does not have.
    """
    if not isinstance(value, torch.optim.Optimizer | Mapping):
        return check_real(value, name, 0)
    model = unwrapped(model)
    own = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if isinstance(value, torch.optim.Optimizer):
        known = {
            id(p): check_real(float(group.get("weight_decay") or 0.0), name, 0)
            for group in value.param_groups
            for p in group["params"]
        }
        if not any(id(p) in known for p in own.values()):
            raise ValueError(
                f"{name} is an optimizer of other parameters than the model's: pass the one that "
                "trained this model, or the numbers by parameter name"
            )
        found = {key: known.get(id(p), 0.0) for key, p in own.items()}
    else:
        given = check_decay(value, name)
        assert isinstance(given, dict)
        every = dict(model.named_parameters(remove_duplicate=False))
        given = {own_name(key, every): each for key, each in given.items()}
        for key in given:
            if key not in every:
                near = difflib.get_close_matches(key, own, 1)
                raise ValueError(
                    f"{name} names parameter {key!r}, which the model does not have"
                    + (f"; is it {near[0]!r}?" if near else "")
                )
        found = {key: given.get(key, 0.0) for key in own}
    numbers = set(found.values())
    return numbers.pop() if len(numbers) == 1 else found


def with_decay(options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Options with the numbers of a model's parameters in place of the optimizer that has them."""
    found = dict(options)
    given = found.get("weight_decay")
    if isinstance(given, torch.optim.Optimizer | Mapping):
        check_module(model)
        found["weight_decay"] = decay = decay_of(given, model)
        if _is_decoupled(given) and decay:
            name = type(given).__name__
            warn(
                f"{name} decays weights apart from the loss: what it minimised has no such term. "
                f"Its weight_decay {decay_text(decay)} is taken as that of an L2 penalty, which is "
                "an approximation: compare the result with retraining. The number itself, "
                "weight_decay=1e-2 for example, says that this is meant",
            )
    return found


def _is_decoupled(given: Any) -> bool:
    """Whether an optimizer decays weights outside of the loss's gradient."""
    return isinstance(given, torch.optim.Optimizer) and (
        isinstance(given, torch.optim.AdamW)
        or any(group.get("decoupled_weight_decay") for group in given.param_groups)
    )


def each_decay(value: Decay, names: Iterable[str]) -> dict[str, float]:
    """The number of each parameter."""
    if isinstance(value, Mapping):
        return {name: value.get(name, 0.0) for name in names}
    return dict.fromkeys(names, value)


def groups_of(value: Decay, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters as an optimizer takes them, with the weight decay of each."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, number in each_decay(value, parameters).items():
        groups.setdefault(number, []).append(parameters[name])
    return [{"params": each, "weight_decay": number} for number, each in groups.items()]


def penalty(value: Decay, parameters: Mapping[str, Tensor]) -> float:
    """(weight_decay / 2) |w|^2, summed in float64."""
    each = each_decay(value, parameters)
    return sum(
        each[name] / 2 * float(p.detach().double().square().sum()) for name, p in parameters.items()
    )


def least_decay(value: Decay) -> float:
    """The number that holds for every parameter."""
    return min(value.values(), default=0.0) if isinstance(value, Mapping) else value


def scaled(value: Decay, factor: float) -> Decay:
    """Every number times a factor."""
    if factor == 1:
        return value
    if isinstance(value, Mapping):
        return {name: number * factor for name, number in value.items()}
    return value * factor


def decay_text(value: Decay) -> str:
    """A weight decay in a message."""
    if isinstance(value, Mapping):
        return f"{min(value.values()):g} to {max(value.values()):g} by parameter"
    return f"{value:g}"


def vector_of(value: Decay, layout: Any, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The number of each coordinate of a layout; None where it is one number for all."""
    if not isinstance(value, Mapping):
        return None
    each = each_decay(value, parameters)
    found: Tensor = layout.gather({k: torch.full_like(p, each[k]) for k, p in parameters.items()})
    return found.detach()
