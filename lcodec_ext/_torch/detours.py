"""Detours that models take in training, and that are closed while the package calls them.

torch.compile, torch.utils.checkpoint and torch.autocast change how a model is computed, and not
what it computes. Each is in the way of second derivatives, or of their accuracy.
"""

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as _checkpoint
from torch.amp.autocast_mode import autocast


class _WhileNeeded:
    """A setting of the whole process, made while any call needs it."""

    def __init__(self, make: Callable[[ExitStack], None]) -> None:
        self._lock, self._setting, self._make = threading.Lock(), ExitStack(), make
        self._threads: dict[object, int] = {}  # of those who need it

    @contextmanager
    def needed(self) -> Iterator[None]:
        """Make it, if nobody has; restore it after the last one."""
        key = object()
        with self._lock:
            if not self._threads:
                self._make(self._setting)
            self._threads[key] = threading.get_ident()
        try:
            yield
        finally:
            self._leave(key)

    def here(self) -> bool:
        """Whether a call of this thread needs it."""
        return threading.get_ident() in self._threads.copy().values()

    def _leave(self, key: object) -> None:
        with self._lock:
            if self._threads.pop(key, None) is not None and not self._threads:
                self._setting.close()

    def in_child(self) -> None:
        """After a fork: other threads, and what they hold, are the parent's."""
        self._lock = threading.Lock()
        for key, thread in list(self._threads.items()):
            if thread != threading.get_ident():
                self._leave(key)


def _eager(setting: ExitStack) -> None:
    if hasattr(torch.compiler, "set_stance"):  # since torch 2.6
        setting.enter_context(torch.compiler.set_stance("force_eager"))


def _direct(setting: ExitStack) -> None:
    """Checkpointed functions are called as any other; autocast within a model is off.

    Each for threads that need it: others go on with what is restored afterwards.
    """
    own = _checkpoint._checkpoint_without_reentrant_generator
    reentrant: Any = _checkpoint.CheckpointFunction
    enter: Callable[[Any], Any] = autocast.__enter__

    def generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        return iter([None]) if _directly.here() else own(*args, **kwargs)

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        if not _directly.here() or cast_dtype() is not None:
            return enter(self)
        before, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = before

    for where, name, value in (
        (_checkpoint, "_checkpoint_without_reentrant_generator", generator),
        (_checkpoint, "CheckpointFunction", _Reentrant(reentrant)),
        (autocast, "__enter__", entered),
    ):
        setting.callback(setattr, where, name, getattr(where, name))
        setattr(where, name, value)


class _Reentrant:
    """In the place of CheckpointFunction."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        if _directly.here():
            return function(*args)
        return self._own.apply(function, preserve, *args)


class _Cast(threading.local):
    dtype: torch.dtype | None = None


_eagerly, _directly, _cast = _WhileNeeded(_eager), _WhileNeeded(_direct), _Cast()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_eagerly.in_child)
    os.register_at_fork(after_in_child=_directly.in_child)


@contextmanager
def detours_closed() -> Iterator[None]:
    """Models run as they are written: not compiled, not checkpointed, without autocast.

    What torch.compile made has no second derivatives, and would be compiled again for each way in
    which the package calls a model. A checkpointed function would be run again in the backward
    pass, when the parameters that the package put in the place of the model's are gone.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(_eagerly.needed())
        stack.enter_context(_directly.needed())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(autocast(kind, enabled=False))
        yield


@contextmanager
def autocasting(dtype: torch.dtype | None) -> Iterator[None]:
    """Models are called under autocast where gradients are recorded, in this thread.

    What is measured without gradients stays in the dtype of the model.
    """
    before, _cast.dtype = _cast.dtype, dtype
    try:
        yield
    finally:
        _cast.dtype = before


def cast_dtype() -> torch.dtype | None:
    """The dtype of autocast in a forward pass that begins now; None without autocast."""
    return _cast.dtype if torch.is_grad_enabled() else None


@contextmanager
def cast_forward(device: str) -> Iterator[bool]:
    """A forward pass on a kind of device, under autocast if so it is; whether it is."""
    dtype = cast_dtype()
    if dtype is None:
        yield False
        return
    try:
        with autocast(device, dtype=dtype):
            yield True
    finally:
        # It is cleared with the outermost autocast only, and weights change until then.
        torch.clear_autocast_cache()
