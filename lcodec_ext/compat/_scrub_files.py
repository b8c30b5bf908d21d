"""The parameters and gradients of the last two epochs, in the published code's files.

A file is a dict from (str(module), parameter name) to a tensor, for every module and every
parameter below it. Modules that look alike have the same key there, and the last one's tensors; the
entries of the root, whose names are qualified, are whole.
"""

import errno
import os
from typing import Any

import torch
from torch import Tensor, nn

Bank = dict[tuple[str, str], Any]  # to a tensor, or None for a parameter without a gradient


def getGradObjs(model: nn.Module) -> tuple[Bank, Bank]:
    """Collect the gradients and the parameters of a model by (str(module), parameter name).

    Parameters
    ----------
    model : Module

    Returns
    -------
    grad_objs, param_objs : dict
        What ``.grad`` (None where there is none) and ``.data`` refer to, not copies. Modules that
        look alike have the same key: of these the last one's is kept. The entries of the model
        itself, under qualified names, are complete.
    """
    gradients: Bank = {}
    parameters: Bank = {}
    for module in model.modules():
        for name, parameter in module.named_parameters():
            gradients[str(module), name] = parameter.grad
            parameters[str(module), name] = parameter.data
    return gradients, parameters


def gradNorm(model: nn.Module) -> float:
    """Euclidean norm of all gradients of a model; those that are None count as zero."""
    squares = [float(p.grad.double().norm()) ** 2 for p in model.parameters() if p.grad is not None]
    return float(sum(squares)) ** 0.5


def file_name(stem: str, epoch: int, what: str) -> str:
    return f"{stem}_epoch_{epoch}_{what}.pt"


def write_epoch(stem: str, epoch: int, gradients: Bank, parameters: Bank) -> None:
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
                "last two of params.train_epochs epochs, under the stem outString",
                name,
            )
        bank = torch.load(name, map_location=device, weights_only=True)
        if not isinstance(bank, dict):
            raise ValueError(f"{name} must hold a dict; it holds a {type(bank).__name__}")
        banks.append(bank)
    return banks[0], banks[1]


def of_root(bank: Bank, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Take the entries of the model itself, by qualified name: those that cannot collide.

    The root is found by its string, or, where another version of PyTorch prints it differently, by
    the names and shapes of its parameters.
    """
    shapes = {key: p.shape for key, p in model.named_parameters()}
    by_module: dict[str, dict[str, Any]] = {}
    for module, key in bank:
        by_module.setdefault(module, {})[key] = bank[module, key]

    def fits(entries: dict[str, Any]) -> bool:
        return entries.keys() == shapes.keys() and all(
            entries[key] is None or entries[key].shape == shape for key, shape in shapes.items()
        )

    for module in (str(model), *by_module):
        if module in by_module and fits(by_module[module]):
            return {
                key: torch.zeros_like(p)
                if by_module[module][key] is None
                else by_module[module][key]
                for key, p in model.named_parameters()
            }
    raise ValueError(
        f"{name} must be a file of this model: it has no module with the model's "
        f"{len(shapes)} parameters, of their names and shapes"
    )
