"""The ledger, what it adds up to, and the checkpoints: in one directory, or in memory."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lcodec_ext._torch.states import state_hash
from lcodec_ext.unlearning.stream.checkpoints import Checkpoints, DirectoryLock, checkpoint_name
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import CHECKPOINT_FOLDER, LEDGER_FILE, Ledger


class Store:
    """A ledger, its history and its checkpoints, locked against other processes and objects.

    All is in an existing folder, or in memory. LedgerError if the ledger there does not verify,
    RuntimeError if the folder is in use.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock = None if folder is None else DirectoryLock(folder)
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
        """Release the directory."""
        if self._lock is not None:
            self._lock.release()

    def state(self, number: int) -> dict[str, Tensor]:
        """Read the weights of an entry."""
        point = self.history.points[number]
        return self.checkpoints.read(point.checkpoint, point.sha256)

    def write(self, state: dict[str, Tensor]) -> dict[str, str]:
        """Write the checkpoint of the entry to come; what its record says of it."""
        name = checkpoint_name(len(self.ledger))
        self.checkpoints.write(name, state)
        return {"file": name, "sha256": state_hash(state)}

    def append(self, kind: str, record: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write an entry; without "checkpoint" in its record it has that of the entry before."""
        if "checkpoint" not in record:
            last = self.history.points[-1]
            checkpoint = {"file": last.checkpoint, "sha256": last.sha256}
            record = {**record, "checkpoint": checkpoint}
        try:
            entry = self.ledger.append(kind, record, environment)
        except BaseException:
            self.prune()
            raise
        self.history.add(entry)

    def prune(self) -> None:
        """Delete the checkpoints that are not to be kept."""
        with suppress(OSError):  # what cannot be deleted now is tried again with the next entry
            self.checkpoints.keep_only(self.history.kept())


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
