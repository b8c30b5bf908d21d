"""Models that torch.compile and torch.distributed have wrapped."""

import sys
from typing import Any

from torch import nn

from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.names import inside
from lcodec_ext._torch.states import state_hash


def unwrapped(model: Any) -> Any:
    """The model that torch.compile or DistributedDataParallel holds; others as given.

    Hooks of a wrapper then see nothing, and names are those of the model itself. Of a model with
    parts that are wrapped it is one of the same tensors, without wrappers.

    Raises
    ------
    TypeError
        For FullyShardedDataParallel and `fully_shard`, of which a rank has parts of parameters.
    """
    if not isinstance(model, nn.Module):  # refused by those who use it
        return model
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for name, module in model.named_modules():
        parts = [k for k, p in module.named_parameters(recurse=False) if isinstance(p, dtensor)]
        if isinstance(module, fsdp) or parts:
            where = f"model.{name}" if name else "model"
            raise TypeError(
                f"{where} is sharded (FullyShardedDataParallel, fully_shard): this rank has only "
                "parts of its parameters, and needs all. Load the full state "
                "(torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True) into the plain model on every rank"
            )
    while (held := inside(model)) is not None:
        model = held
    if any(inside(module) is not None for module in model.modules()):
        return copy_of(model, sharing=True)
    return model


def told_of(model: nn.Module) -> dict[str, str]:
    """What `Ranks.agree` compares of a model: its parameters, and its buffers."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    # DistributedDataParallel leaves each rank the buffers of its own last pass.
    buffers = {k: b.detach() for k, b in model.named_buffers()}
    remedy = "torch.distributed.broadcast those of one rank"
    return {
        "parameters of model": state_hash(parameters)[:16],
        f"buffers of model ({remedy})": state_hash(buffers)[:16],
    }
