"""Modes of models and of torch's arithmetic that are entered and left."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcodec_ext._torch.detours import detours_closed


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No gradients, no inference mode and no detours, whatever the caller has set."""
    with detours_closed(), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def hooked_arithmetic() -> Iterator[None]:
    """Plain arithmetic, with attention computed by its layers: its fast path calls no hooks."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_arithmetic():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Gradients, with attention from operations that have second derivatives."""
    with hooked_arithmetic(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> None:
    """Set the mode of each module by itself, whatever its `train` does."""
    for module in model.modules():
        module.training = training(module)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Modes, buffers and random numbers are afterwards as they were; no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {b.device.index or 0 for b in model.parameters() if b.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.data = before


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch from a seed; afterwards the caller's go on where they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def check_module(model: object) -> None:
    """Refuse what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")


def place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first floating-point parameter of a model."""
    check_module(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    raise ValueError("the model has no floating-point parameter")


def clock(model: nn.Module) -> float:
    """Seconds, read after the model's device has finished its work."""
    device, _ = place(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
