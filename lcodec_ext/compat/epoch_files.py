"""Gradients and parameters under the published code's keys, and its files of the last two epochs.

Keys are (str(module), parameter name), for every module and every parameter below it. Modules that
print the same share their keys, and the last one's tensors are kept. Only the entries of the root
are complete: their names are qualified. ``docs/compat.md`` describes the files.
"""

import errno
import os
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import first_few
from lcodec_ext.compat.switch import bugs

Bank = dict[tuple[str, str], Any]  # to a tensor, or None for a parameter without a gradient
Measured = tuple[Tensor, Tensor, float, float]  # loss before and after, gradient norm likewise


def getGradObjs(model: nn.Module, *, reference_bugs: bool | None = None) -> tuple[Bank, Bank]:
    """Collect the gradients and the parameters of a model by (str(module), parameter name).

    Returns
    -------
    grad_objs, param_objs : dict
        To ``.grad`` and ``.data``, not to copies. Where there is no gradient, zeros, so that
        scripts can add them up; with `reference_bugs` None. Of modules that print the same, the
        last one counts. The entries of the model itself are complete.
    """
    zeros: dict[nn.Parameter, Tensor] = {}
    if not bugs(reference_bugs):
        zeros = {p: torch.zeros_like(p.data) for p in model.parameters() if p.grad is None}
    gradients: Bank = {}
    parameters: Bank = {}
    for module in model.modules():
        for name, parameter in module.named_parameters():
            gradients[str(module), name] = zeros.get(parameter, parameter.grad)
            parameters[str(module), name] = parameter.data
    return gradients, parameters


def gradNorm(model: nn.Module) -> float:
    """Euclidean norm of all gradients of a model; a gradient that is None counts as zero."""
    squares = [float(p.grad.double().norm()) ** 2 for p in model.parameters() if p.grad is not None]
    return float(sum(squares)) ** 0.5


def backward(loss: Tensor, model: nn.Module) -> tuple[Tensor, float]:
    """Add the gradient of a loss to the parameters' own; return the loss and their norm."""
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), gradNorm(model)


def file_name(stem: str, epoch: int, what: str) -> str:
    """Of the file of an epoch with "grads" or "params"."""
    return f"{stem}_epoch_{epoch}_{what}.pt"


def write_epoch(stem: str, epoch: int, gradients: Bank, parameters: Bank) -> None:
    """Write both files of an epoch."""
    torch.save(parameters, file_name(stem, epoch, "params"))
    torch.save(gradients, file_name(stem, epoch, "grads"))


def read_epoch(stem: str, epoch: int, device: torch.device) -> tuple[Bank, Bank]:
    """Gradients and parameters of an epoch, as they are stored."""
    banks = []
    for what in ("grads", "params"):
        name = file_name(stem, epoch, what)
        if not os.path.exists(name):
            raise FileNotFoundError(
                errno.ENOENT,
                f"{os.strerror(errno.ENOENT)}; approxType='FD' reads what do_epoch wrote in the "
                f"last two of params.train_epochs epochs, under the stem outString{_others(name)}",
                name,
            )
        bank = torch.load(name, map_location=device, weights_only=True)
        if not isinstance(bank, dict):
            raise ValueError(f"{name} must hold a dict; it holds a {type(bank).__name__}")
        banks.append(bank)
    return banks[0], banks[1]


def _others(name: str) -> str:
    """Which files of that kind there are: scripts that train name them otherwise than others."""
    folder, ending = os.path.dirname(name) or ".", "_params.pt"
    found = (
        sorted(each for each in os.listdir(folder) if each.endswith(ending))
        if (os.path.isdir(folder))
        else []
    )
    if not found:
        return ""
    return f". That folder has {first_few(found, 4)}: rename the files or set the script's stem"


def of_root(bank: Bank, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Take the entries of the model itself by qualified name; None becomes zeros.

    The root is found by its string. Another version of PyTorch may print it differently; then the
    names and shapes of its parameters tell.
    """
    parameters = dict(model.named_parameters())
    by_module: dict[str, dict[str, Any]] = {}
    for module, key in bank:
        by_module.setdefault(module, {})[key] = bank[module, key]
    for module in (str(model), *by_module):
        entries = by_module.get(module, {})
        if entries.keys() == parameters.keys() and all(
            entries[key] is None or entries[key].shape == p.shape for key, p in parameters.items()
        ):
            return {
                key: torch.zeros_like(p) if entries[key] is None else entries[key]
                for key, p in parameters.items()
            }
    raise ValueError(
        f"{name} must be a file of this model: none of its modules has the model's "
        f"{len(parameters)} parameters, with their names and shapes"
    )
