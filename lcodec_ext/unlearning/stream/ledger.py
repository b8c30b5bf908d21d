"""What was done to a model, one line for each request, each line sealed by the one before.

A ledger is a file of JSON Lines. An entry is one line of canonical JSON (sorted keys, no spaces,
ASCII) with

==============  ==============================================================================
``number``      0, 1, 2, ...
``kind``        "start", "remove", "skip", "release" or "rollback"
``record``      what happened, see `Unlearner`: nothing of it depends on the time or the host
``environment`` when and where: time (UTC), seconds taken, versions; what a removal warned of; what
                a release gave away, and what its noise did
``previous``    ``hash`` of the entry before; 64 zeros for the first one
``hash``        SHA-256 of the line without it
==============  ==============================================================================

so that an entry cannot be changed, moved or taken out without changing the hashes of all that
follow. Whoever can write the file can rewrite all of it: note the last hash elsewhere (it says
nothing about the data), and `verify_ledger` tells whether it is still in the ledger.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from lcodec_ext._checks import counted
from lcodec_ext._files import json_ready, sync_folder
from lcodec_ext.unlearning.stream.checkpoints import LedgerError

FORMAT = 1
FIRST = "0" * 64  # what the first entry has for the hash of the one before
LEDGER_FILE, CHECKPOINT_FOLDER = "ledger.jsonl", "checkpoints"
KINDS = ("start", "remove", "skip", "release", "rollback")
_FIELDS = {"number", "kind", "record", "environment", "previous", "hash"}


@dataclass(frozen=True)
class Entry:
    """One entry of a ledger.

    Attributes
    ----------
    number : int
    kind : {"start", "remove", "skip", "release", "rollback"}
    record : dict
        What happened. The same requests on the same machine give the same record.
    environment : dict
        "time" (UTC, ISO 8601) and "versions"; of a removal "seconds" and the texts of "warnings",
        of a release "released", the SHA-256 of the tensors that were given away.
    previous, hash : str
        SHA-256, of the entry before and of this one.
    """

    number: int
    kind: str
    record: dict[str, Any]
    environment: dict[str, Any]
    previous: str
    hash: str

    def line(self) -> bytes:
        """The line of the file, with its end."""
        return _canonical(vars(self)) + b"\n"


_COLUMNS = [
    *("kind", "time", "note", "ids", "groups", "skipped", "seconds", "forget_loss_before"),
    *("forget_loss_after", "retain_loss_before", "retain_loss_after", "to", "guarantee"),
    *("epsilon", "delta", "sigma", "n_removed", "n_pending", "n_retained", "hash"),
]


def _row(entry: Entry) -> dict[str, Any]:
    """What `Ledger.to_frame` shows of an entry."""
    record, environment = entry.record, entry.environment
    result, guarantee = record.get("result") or {}, record.get("guarantee") or {}
    row = {**vars(entry), **record, **environment, **guarantee, "guarantee": guarantee.get("kind")}
    if "ids" in record:
        row["groups"] = [each["id"] for each in record.get("groups", ())]
    else:
        row.pop("groups", None)  # what the start says of all of them
    row |= {"kind": entry.kind, "seconds": (environment.get("seconds") or {}).get("total")}
    for name in ("forget", "retain"):
        pair = result.get(f"loss_{name}") or (None, None)
        for when, loss in zip(("before", "after"), pair, strict=True):
            row[f"{name}_loss_{when}"] = math.nan if loss is None else float(loss)
    return row


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def recordable(value: Any) -> Any:
    """A value as a ledger has it: NaN and infinity are strings."""
    return json_ready(value, nonfinite=str)


def _seal(number: int, kind: str, record: Any, environment: Any, previous: str) -> Entry:
    body = {
        "number": number,
        "kind": kind,
        "record": record,
        "environment": environment,
        "previous": previous,
    }
    return Entry(**body, hash=hashlib.sha256(_canonical(body)).hexdigest())


def _read(line: bytes, number: int, previous: str) -> Entry:
    """The entry on a line, if it has this number, follows that hash, and is sealed by its own."""
    try:
        values = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise LedgerError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        raise LedgerError(f"its fields must be {', '.join(sorted(_FIELDS))}")
    entry = Entry(**values)
    if entry.line().rstrip(b"\n") != line.removesuffix(b"\n"):
        raise LedgerError("it is not written as entries are")
    if entry != _seal(entry.number, entry.kind, entry.record, entry.environment, entry.previous):
        raise LedgerError("its hash is not that of its content")
    if entry.previous != previous:
        raise LedgerError("it does not follow the entry before, whose hash is another one")
    if entry.number != number:
        raise LedgerError(f"its number is {entry.number!r}, not {number}")
    return entry


def scan(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Entry | LedgerError | None]]:
    """Give each line with its entry, or what is wrong with it; None for a torn end."""
    previous = FIRST
    for number, line in enumerate(lines):
        found: Entry | LedgerError | None
        try:
            found = _read(line, number, previous)
            previous = found.hash
        except LedgerError as error:
            try:  # what follows is checked against what this line says of itself
                previous = json.loads(line)["hash"]
                torn = False
            except (ValueError, TypeError, KeyError):
                # The beginning of an object is never JSON: a line cut short cannot pass for one.
                torn = not line.endswith(b"\n")
            found = None if torn else LedgerError(f"line {number + 1} of the ledger: {error}")
        yield line, found


class Ledger(Sequence[Entry]):
    """The entries of a ledger, verified when it was opened.

    A sequence that reads each entry from the file when it is asked for, and so takes little memory.

    Parameters
    ----------
    path : Path, optional
        Of the file, which need not exist. By default the ledger is kept in memory.

    Raises
    ------
    LedgerError
        If a line does not verify. Only a last line that was cut short, by a killed process for
        instance, is left out: it was never acknowledged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._memory = bytearray()
        self._ends = [0]
        self.head = FIRST
        self.torn = b""
        if path is None or not path.exists():
            return
        with open(path, "rb") as file:
            for line, found in scan(file):
                if isinstance(found, LedgerError):
                    raise found
                if found is None:
                    self.torn = line
                    break
                self._ends.append(self._ends[-1] + len(line))
                self.head = found.hash

    @property
    def path(self) -> Path | None:
        """The file; None in memory."""
        return self._path

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        number = range(len(self))[index]
        start, end = self._ends[number], self._ends[number + 1]
        if self._path is None:
            return Entry(**json.loads(bytes(self._memory[start:end])))
        with open(self._path, "rb") as file:
            file.seek(start)
            return Entry(**json.loads(file.read(end - start)))

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else f"in {str(self._path)!r}"
        return f"Ledger({counted(len(self), 'entry', 'entries')} {where}, head {self.head[:12]}...)"

    def to_frame(self) -> Any:
        """Make a `pandas.DataFrame` with a row for each entry, by number.

        Columns: "kind", "time", "note"; of a request "ids", "groups", "skipped", "seconds", and the
        mean losses of the removed and the retained samples before and after it; of a rollback "to";
        of a request or release "guarantee", "epsilon", "delta" and "sigma"; of all the numbers of
        samples removed, pending and retained, and "hash". What an entry does not have is missing.
        `Entry.record` has the rest. ImportError without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Ledger.to_frame needs pandas: pip install pandas") from error
        rows = [_row(entry) for entry in self]
        return pd.DataFrame(rows, columns=_COLUMNS, index=pd.RangeIndex(len(rows), name="number"))

    def repair(self) -> None:
        """Cut off a torn last line; complete one that lacks only its end."""
        if self._path is None or not self._path.exists():
            return
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            if self.torn:
                os.ftruncate(descriptor, self._ends[-1])
                self.torn = b""
            elif len(self) and os.pread(descriptor, 1, self._ends[-1] - 1) != b"\n":
                os.pwrite(descriptor, b"\n", self._ends[-1])
                self._ends[-1] += 1
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def append(self, kind: str, record: Any, environment: Any) -> Entry:
        """Add an entry. When this returns it is on the disk; if it raises, nothing is added."""
        assert kind in KINDS
        entry = _seal(len(self), kind, recordable(record), recordable(environment), self.head)
        line = entry.line()
        if self._path is None:
            self._memory += line
        else:
            self._write(self._path, line)
        self._ends.append(self._ends[-1] + len(line))
        self.head = entry.hash
        return entry

    def check_unchanged(self) -> None:
        """Refuse a file that something else has written to since."""
        if self._path is None:
            return
        try:
            self._check_size(self._path.stat().st_size)
        except FileNotFoundError:
            self._check_size(0)

    def _check_size(self, size: int) -> None:
        if size != self._ends[-1]:
            raise LedgerError(
                f"the ledger was changed from outside: it has {size} bytes, not "
                f"{self._ends[-1]}. Nothing was written; Unlearner.resume goes on with what is "
                "there"
            )

    def _write(self, path: Path, line: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            self._check_size(size)
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
                if size == 0:
                    sync_folder(path.parent)
            except BaseException:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
