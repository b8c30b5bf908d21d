"""What ranks of a process group tell each other of models, samples and methods."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from lcodec_ext._checks import counted
from lcodec_ext._files import json_ready
from lcodec_ext._torch.modes import place
from lcodec_ext._torch.samples import Samples, as_samples
from lcodec_ext._torch.states import state_hash, tensors_of_state
from lcodec_ext._torch.token_loss import TokenLoss, given_loss
from lcodec_ext.evaluation.methods import NOT_SETTINGS, Baseline
from lcodec_ext.evaluation.metrics import Measured, Sets
from lcodec_ext.unlearning.result import UnlearnResult

_ALL = "evaluate takes all retained samples on every rank, where unlearn takes shards"


class Weights(nn.Module):
    """The parameters of a model that another rank has, by name: all that distances need of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = {name: p.detach().cpu() for name, p in model.named_parameters()}

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        """As `torch.nn.Module.named_parameters`."""
        yield from self.held.items()


def to_send(measured: Measured) -> Measured:
    """What was measured, with the model's weights in the model's place."""
    return measured._replace(model=Weights(measured.model))


def received(measured: Measured, model: nn.Module) -> Measured:
    """What another rank has sent, on the device of a model."""
    assert isinstance(measured.model, Weights)
    device, _ = place(model)
    measured.model.held = {name: p.to(device) for name, p in measured.model.held.items()}
    return measured


def model_hash(model: nn.Module) -> str | None:
    """The hash of a model's state; None of one that no checkpoint could have."""
    try:
        return state_hash(tensors_of_state(model))
    except TypeError:
        return None


def samples_hash(samples: Samples) -> str:
    """A digest of all samples, in their order."""
    whole = hashlib.sha256()
    for each in samples.each_hash():
        whole.update(each.encode())
    return whole.hexdigest()


def _told_of_samples(samples: Samples) -> str:
    return f"{counted(len(samples), 'sample')}, digest {samples_hash(samples)[:16]}"


def called(function: Any) -> str:
    """What a function, or an object that is called, is called."""
    if isinstance(function, TokenLoss):
        own = given_loss(function)
        return repr(own) if isinstance(own, TokenLoss) else called(own)
    return getattr(function, "__qualname__", type(function).__qualname__)


def told_of(method: Any) -> Any:
    """Of a method what all ranks must have alike, as JSON."""
    if isinstance(method, UnlearnResult):
        method = method.model
    if isinstance(method, nn.Module):
        return model_hash(method)
    if isinstance(method, Baseline):
        return {"baseline": called(method.run), **told_of(method.options)}
    if not isinstance(method, Mapping):
        return called(method)
    options = {key: value for key, value in method.items() if key not in NOT_SETTINGS}
    return json_ready(options, nonfinite=repr, other=called)


def told_of_all(
    model: nn.Module, sets: Sets, retrained: Any, methods: Any, validation: Any, groups: Any
) -> dict[str, Any]:
    """Of the arguments of `evaluate` what all ranks must have alike."""
    trained = called(retrained) if callable(retrained) else [told_of(each) for each in retrained]
    if validation is not None:
        validation = _told_of_samples(as_samples(validation, "validation", *place(model)))
    if groups is not None:
        ids = groups.tolist() if hasattr(groups, "tolist") else groups
        groups = np.array([str(each) for each in ids])
    return {
        "model": model_hash(model),
        "forget": _told_of_samples(sets.forget),
        f"retain ({_ALL})": _told_of_samples(sets.retain),
        "test": _told_of_samples(sets.test),
        "loss_fn": called(sets.loss_fn),
        "retrained": trained,
        "methods": json.dumps({name: told_of(each) for name, each in methods.items()}),
        "weight_decay": json.dumps(sets.weight_decay),
        "seed": int(sets.seed),
        "batch_size": int(sets.batch_size),
        "score": None if sets.score is None else called(sets.score),
        "validation": validation,
        "groups": groups,
    }
