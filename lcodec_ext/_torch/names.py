"""Names of parameters as wrappers and checkpoints have them, and as the model inside has them."""

import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What wrappers call the model: torch.compile, checkpointing, FSDP, Fabric.
_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_HOLDERS = (_COMPILED, _CHECKPOINTED, "_fsdp_wrapped_module", "_forward_module")
_PARALLEL = "module"  # the attribute of a DistributedDataParallel that has it
_WRAPPER = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_WRAPPERS = (  # of modules that may not be loaded
    ("torch._dynamo.eval_frame", "OptimizedModule", _COMPILED),
    (_WRAPPER, "ActivationWrapper", _CHECKPOINTED),
    ("lightning_fabric.wrappers", "_FabricModule", "_original_module"),
    ("lightning.fabric.wrappers", "_FabricModule", "_original_module"),
)
_Value = TypeVar("_Value")


def inside(module: nn.Module) -> nn.Module | None:
    """The module that torch.compile, DistributedDataParallel or another one has wrapped."""
    found: Any = None
    if isinstance(module, DistributedDataParallel | DataParallel):
        found = module.module
    for where, kind, attribute in _WRAPPERS:
        if isinstance(module, getattr(sys.modules.get(where), kind, ())):
            found = getattr(module, attribute)
    return found if isinstance(found, nn.Module) else None


def unwrapped_name(name: str) -> str:
    """The name of a module or tensor without what torch.compile and others have added to it."""
    if not any(holder in name for holder in _HOLDERS):
        return name
    return ".".join(part for part in name.split(".") if part not in _HOLDERS)


def own_name(name: str, own: Collection[str]) -> str:
    """The one of a model's own names that is meant by one of the wrapped model; else as given."""
    if name in own:
        return name
    plain = unwrapped_name(name)
    apart = ".".join(part for part in plain.split(".") if part != _PARALLEL)
    found = (each for each in (plain, apart) if each in own)
    return next(found, name)


class AmbiguousNamesError(ValueError):
    """A state holds several models."""


def without_prefix(
    state: Mapping[str, _Value], own: Iterable[str]
) -> tuple[dict[str, _Value], list[str]]:
    """What a state has under a model's own names, and the names of what is left over.

    The names of the state are the model's, or all of them behind one prefix, such as DDP's
    "module." or the attribute of a larger module that has the model; torch.compile may have added
    to either. Where neither is so, the state comes back with what was compiled renamed, for the
    caller to tell what does not fit.

    Raises
    ------
    AmbiguousNamesError
        If several prefixes give all of the model's names, as a model and its average do.
    """
    names, plain = list(own), {unwrapped_name(str(key)): value for key, value in state.items()}
    if not names or len(plain) < len(state) or plain.keys() >= set(names):
        if len(plain) < len(state):
            return dict(state), []
        return plain, []
    ends = [key.removesuffix(names[0]) for key in plain if key.endswith(f".{names[0]}")]
    prefixes = [end for end in ends if all(end + name in plain for name in names)]
    if len(prefixes) > 1:
        raise AmbiguousNamesError(
            f"holds the model {len(prefixes)} times, under {' and '.join(map(repr, prefixes))}: "
            "save the one that is meant by itself"
        )
    if not prefixes:
        return plain, []
    taken = {name: plain[prefixes[0] + name] for name in names}
    return taken, sorted(plain.keys() - {prefixes[0] + name for name in names})
