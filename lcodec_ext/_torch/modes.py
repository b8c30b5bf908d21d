"""Modes of models and of torch's arithmetic that are entered and left."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class _Stance:
    """Nothing is run as compiled: one setting of the whole process, while anybody needs it."""

    def __init__(self) -> None:
        self._lock, self._setting = threading.Lock(), ExitStack()
        self._threads: dict[object, int] = {}  # of those who need it

    def enter(self) -> object:
        """Set it, if nobody has; give what `leave` takes."""
        key = object()
        with self._lock:
            if not self._threads and hasattr(torch.compiler, "set_stance"):  # since torch 2.6
                self._setting.enter_context(torch.compiler.set_stance("force_eager"))
            self._threads[key] = threading.get_ident()
        return key

    def leave(self, key: object) -> None:
        """Restore it after the last one."""
        with self._lock:
            if self._threads.pop(key, None) is not None and not self._threads:
                self._setting.close()

    def in_child(self) -> None:
        """After a fork: other threads, and what they hold, are the parent's."""
        self._lock = threading.Lock()
        for key, thread in list(self._threads.items()):
            if thread != threading.get_ident():
                self.leave(key)


_stance = _Stance()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stance.in_child)


@contextmanager
def _uncompiled() -> Iterator[None]:
    key = _stance.enter()
    try:
        yield
    finally:
        _stance.leave(key)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """No gradients, no autocast and no inference mode, whatever the caller has set.

    Nothing is run as torch.compile made it: that has no second derivatives, and would be compiled
    again for each way in which the package calls a model.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_uncompiled())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
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
