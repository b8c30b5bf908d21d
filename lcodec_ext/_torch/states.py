"""The tensors of a model's state by name, and their hash."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lcodec_ext._torch.names import inside, unwrapped_name


def tensors_of_state(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model's state, by name, which share its memory; others are refused.

    A mapping is a state itself. Names are those of the model that torch.compile or
    DistributedDataParallel has wrapped.
    """
    while isinstance(model, nn.Module) and (held := inside(model)) is not None:
        model = held
    state = {}
    for key, value in (model.state_dict() if isinstance(model, nn.Module) else model).items():
        name = unwrapped_name(key)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of model must be tensors, to be saved; {name!r} is of type "
                f"{type(value).__name__}"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise TypeError(f"{name!r} of model must be a dense tensor; it is {value.layout}")
        state[name] = value.detach()
    return state


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all tensors of a model's state, by name; others are refused."""
    # Not a view: torch.save writes the whole storage of one.
    return {k: t.to("cpu", copy=True).contiguous() for k, t in tensors_of_state(model).items()}


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: of name, dtype, shape and bytes of each, by increasing name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
