"""The ledger, what it adds up to, and the checkpoints: in one directory, or in memory."""

import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lcodec_ext._torch.states import state_hash
from lcodec_ext.unlearning.stream.checkpoints import (
    Checkpoints,
    DirectoryLock,
    LedgerError,
    checkpoint_name,
)
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import CHECKPOINT_FOLDER, LEDGER_FILE, Ledger


class Store:
    """A ledger, its history and its checkpoints, locked against other processes and objects.

    All is in an existing folder, or in memory. LedgerError if the ledger there does not verify,
    RuntimeError if the folder is in use. With lock=False other processes are not kept out: only
    what they wrote before is noticed.
    """

    def __init__(self, folder: Path | None, *, lock: bool = True) -> None:
        self._folder, self._owner = folder, os.getpid()
        self._turn, self._holder, self._closed = threading.Lock(), 0, False
        self._lock = None if folder is None or not lock else DirectoryLock(folder)
        _STORES.add(self)
        with self.closed_on_failure():
            self.ledger = Ledger(None if folder is None else folder / LEDGER_FILE)
            self.history = History()
            for entry in self.ledger:
                self.history.add(entry)
            self.checkpoints = Checkpoints(None if folder is None else folder / CHECKPOINT_FOLDER)

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Release the directory if the block fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the directory, after another thread's request; nothing is written afterwards."""
        with nullcontext() if self.in_turn else self._turn:
            self._closed = True
            self._let_go()

    def in_child(self) -> None:
        """After a fork: the directory is the parent's, and no thread here has the turn."""
        self._turn, self._holder = threading.Lock(), 0
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One request at a time: other threads wait for the end of the block.

        RuntimeError, LedgerError where nothing may be written: in a child process, within a block
        of the same thread, and after something else wrote to the ledger.
        """
        self._check_open()
        if self.in_turn:
            raise RuntimeError(
                "this Unlearner is amid a request, and another one came from within it (from a "
                "function that it calls, or a signal handler): wait for the first one's end"
            )
        with self._turn:
            self._holder = threading.get_ident()
            try:
                self.check_own()
                yield
            finally:
                self._holder = 0

    @property
    def in_turn(self) -> bool:
        """Whether this thread is within a request."""
        return self._holder == threading.get_ident()

    def check_own(self) -> None:
        """Refuse to write in a child of the process that opened the folder, and after others.

        In one's turn: amid another thread's, the file is ahead of what is known of it.
        """
        self._check_open()
        self.ledger.check_unchanged()

    def _check_open(self) -> None:
        if self._folder is not None and os.getpid() != self._owner:
            raise RuntimeError(
                f"directory {str(self._folder)!r} belongs to the Unlearner of process "
                f"{self._owner}, and this is its child {os.getpid()}: make requests there, or "
                "close() it there and call Unlearner.resume here"
            )
        if self._closed:
            raise RuntimeError("the Unlearner was closed before the end of the request")

    def state(self, number: int) -> dict[str, Tensor]:
        """Read the weights of an entry."""
        point = self.history.points[number]
        return self.checkpoints.read(point.checkpoint, point.sha256)

    def write(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Write the checkpoint of the entry to come; what its record says of it."""
        self.check_own()  # what stands under this name could be another one's
        name = checkpoint_name(len(self.ledger))
        self.checkpoints.write(name, state)
        return {"file": name, "sha256": state_hash(state)}

    def append(self, kind: str, record: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write an entry; without "checkpoint" in its record it has that of the entry before."""
        written = record.get("checkpoint")
        if written is None:
            last = self.history.points[-1]
            checkpoint = {"file": last.checkpoint, "sha256": last.sha256}
            record = {**record, "checkpoint": checkpoint}
        try:
            entry = self.ledger.append(kind, record, environment)
        except LedgerError:  # another one's entry may name what stands there now
            raise
        except BaseException:
            if written is not None:
                with suppress(OSError):
                    self.checkpoints.remove(written["file"])
            raise
        self.history.add(entry)

    def prune(self) -> None:
        """Delete the checkpoints that are not to be kept."""
        with suppress(OSError):  # what cannot be deleted now is tried again with the next entry
            self.checkpoints.keep_only(self.history.kept())


_STORES: "weakref.WeakSet[Store]" = weakref.WeakSet()


def _in_child() -> None:
    for store in list(_STORES):
        store.in_child()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield  # no other thread gets a KeyboardInterrupt
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
