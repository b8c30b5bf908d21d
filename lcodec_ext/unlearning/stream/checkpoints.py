"""Weights by name, written so that a killed process leaves all of a file or nothing of it."""

import errno
import fcntl
import os
import re
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._files import sync_folder, write_atomically
from lcodec_ext._torch.copies import copy_of, writable
from lcodec_ext._torch.states import state_hash

#: In the place of a whole state: only the tensors that differ from those of checkpoint 0.
_CHANGES = "tensors that differ from 000000.pt"
_NAME = re.compile(r"\d{6,}\.pt")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_TEMPORARY = re.compile(r"\.\d{6,}\.pt(\.\w+)?\.tmp")


class LedgerError(ValueError):
    """A ledger or a checkpoint that is not what was written."""


def checkpoint_name(number: int) -> str:
    """The file with the weights that entry `number` left."""
    return f"{number:06d}.pt"


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with the given state; the tensors must be those that it has."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ state.keys()):
        where = "model has no" if name in state else "the checkpoint has no"
        raise ValueError(f"model is not the one that was saved: {where} {name!r}")
    for name, tensor in state.items():
        if own[name].shape != tensor.shape or own[name].dtype != tensor.dtype:
            raise ValueError(
                f"model is not the one that was saved: its {name!r} is {own[name].dtype} of shape "
                f"{tuple(own[name].shape)}, in the checkpoint {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
    changed = copy_of(model)
    writable(changed)
    changed.load_state_dict(dict(state))
    return changed


class Checkpoints:
    """States by file name, in a folder or, without one, in memory.

    Of a state most of which is that of checkpoint 0, as of a model with adapters, what differs is
    kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._states: dict[str, dict[str, Any]] = {}
        self._first: dict[str, str] | None = None  # the hash of each tensor of checkpoint 0
        if folder is not None and not folder.is_dir():
            folder.mkdir(mode=0o700)
            sync_folder(folder.parent)

    def write(self, name: str, state: dict[str, Tensor]) -> None:
        """Save a state; nothing is there under the name before all of it is."""
        kept = self._changes(name, state)
        if self._folder is None:
            self._states[name] = kept
        else:
            write_atomically(self._folder / name, lambda file: torch.save(kept, file))

    def _changes(self, name: str, state: dict[str, Tensor]) -> dict[str, Any]:
        """A state as it is kept."""
        if name == checkpoint_name(0):
            self._first = _each_hash(state)
            return state
        if self._first is None:  # resumed, from a folder
            assert self._folder is not None
            try:
                first = _load(self._folder / checkpoint_name(0))
            except LedgerError:
                return state
            self._first = _each_hash(first)
        hashes, first_hashes = _each_hash(state), self._first
        changed = {k: t for k, t in state.items() if hashes[k] != first_hashes.get(k)}
        size = sum(t.nbytes for t in state.values())
        return {_CHANGES: changed} if 2 * sum(t.nbytes for t in changed.values()) < size else state

    def read(self, name: str, sha256: str) -> dict[str, Tensor]:
        """Load a state and check its hash; LedgerError if it is missing or another one."""
        if self._folder is not None:
            return read_checkpoint(self._folder / name, sha256)
        kept = self._states[name]
        return self._states[checkpoint_name(0)] | kept[_CHANGES] if _CHANGES in kept else kept

    def names(self) -> set[str]:
        """The files that are there."""
        if self._folder is None:
            return set(self._states)
        return {path.name for path in self._folder.iterdir() if _NAME.fullmatch(path.name)}

    def remove(self, name: str) -> None:
        """Delete a state."""
        if self._folder is None:
            self._states.pop(name, None)
        else:
            (self._folder / name).unlink(missing_ok=True)

    def keep_only(self, names: Collection[str]) -> None:
        """Delete all other states, and what interrupted writing left."""
        for name in self.names() - set(names):
            self.remove(name)
        if self._folder is not None:
            for path in self._folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def read_checkpoint(path: Path, sha256: str) -> dict[str, Tensor]:
    """Load a state and check its hash; LedgerError if it is missing or another one."""
    state = _load(path)
    try:
        if isinstance(changes := state.get(_CHANGES), dict):
            state = _load(path.with_name(checkpoint_name(0))) | changes
        found = state_hash(state)
    except LedgerError as error:
        raise LedgerError(
            f"checkpoint {path.name} has only what differs from the first one, and {error}"
        ) from error
    except Exception as error:  # of what is no state
        raise LedgerError(f"checkpoint {path.name} cannot be read: {error}") from error
    if found != sha256:
        raise LedgerError(
            f"checkpoint {path.name} holds other tensors than the ledger says: their SHA-256 is "
            f"{found}, not {sha256}"
        )
    return state


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LedgerError(f"checkpoint {path.name} is missing") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise LedgerError(f"checkpoint {path.name} cannot be read: {error}") from error


def _each_hash(state: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: state_hash({name: tensor}) for name, tensor in state.items()}


class DirectoryLock:
    """Keeps other processes, and other objects of this one, out of a directory.

    The kernel releases it when the process ends, however it ends. A child of the process never
    holds it: `release` in a child gives up the child's copy, and in the process the lock.
    """

    def __init__(self, directory: Path) -> None:
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode() or "unknown"
            os.close(descriptor)
            raise RuntimeError(
                f"directory {str(directory)!r} is in use by an Unlearner (process {holder}); "
                "close() that one first"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            raise RuntimeError(
                f"the file system of directory {str(directory)!r} has no file locks ({error}): "
                "take a directory on a local disk, or pass lock=False (--no-lock on the command "
                "line) and see to it that one process at a time uses the directory"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self.release = weakref.finalize(self, _unlock, descriptor, os.getpid())


def _unlock(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # a child that shares the descriptor would otherwise keep the lock
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
