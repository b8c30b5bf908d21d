"""What was done to a model, one line for each request, each line sealed by the one before.

A ledger is a file of JSON Lines. An entry is one line of canonical JSON (sorted keys, no spaces,
ASCII) with

==============  ==============================================================================
``number``      0, 1, 2, ...
``kind``        "start", "remove", "skip", "release" or "rollback"
``record``      what happened, see `Unlearner`: nothing of it depends on the time or the host
``environment`` when and where: time (UTC), seconds taken, versions; what noise a release drew and
                did
``previous``    ``hash`` of the entry before, of the first one 64 zeros
``hash``        SHA-256 of the line without it
==============  ==============================================================================

so that an entry cannot be changed, moved or taken out without changing the hashes of all that
follow. Who can write the file can write all of it anew: note the last hash elsewhere (it says
nothing about the data), and `verify_ledger` tells whether it is still there.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from lcodec_ext._files import json_ready, sync_folder
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.samples import Samples, as_samples
from lcodec_ext.unlearning.privacy import Guarantee, PrivacyBudget
from lcodec_ext.unlearning.stream.checkpoints import (
    LedgerError,
    checkpoint_name,
    read_checkpoint,
    state_hash,
    state_of,
)

FORMAT = 1
FIRST = "0" * 64  # what the first entry has for the hash of the one before
LEDGER_FILE, CHECKPOINT_FOLDER = "ledger.jsonl", "checkpoints"
_KINDS = ("start", "remove", "skip", "release", "rollback")
_FIELDS = {"number", "kind", "record", "environment", "previous", "hash"}
_PROBE = 64  # samples that are looked at where all would take too long


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
        "time" (UTC, ISO 8601) and "versions"; of a removal "seconds", of a release "released", the
        SHA-256 of the tensors that were given away.
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
        raise LedgerError(f"it has not the fields {', '.join(sorted(_FIELDS))}")
    entry = Entry(**values)
    if entry.line().rstrip(b"\n") != line.removesuffix(b"\n"):
        raise LedgerError("it is not written as entries are")
    if entry != _seal(entry.number, entry.kind, entry.record, entry.environment, entry.previous):
        raise LedgerError("its hash is not that of its content")
    if entry.previous != previous:
        raise LedgerError("it does not follow the entry before: the hash of that is another one")
    if entry.number != number:
        raise LedgerError(f"its number is {entry.number!r}, not {number}")
    return entry


def _scan(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Entry | LedgerError | None]]:
    """Each line with its entry, or what is wrong with it; None for a torn end."""
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

    A sequence that reads its entries from the file when they are asked for, and so takes no
    memory to speak of.

    Parameters
    ----------
    path : Path, optional
        Of the file, which need not exist; without one the ledger is kept in memory.

    Raises
    ------
    LedgerError
        If a line does not verify. Only a last line that was cut short, as by a killed process, is
        left out: it was never acknowledged.
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
            for line, found in _scan(file):
                if isinstance(found, LedgerError):
                    raise found
                if found is None:
                    self.torn = line
                    break
                self._ends.append(self._ends[-1] + len(line))
                self.head = found.hash

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

    def __iter__(self) -> Iterator[Entry]:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else f"in {str(self._path)!r}"
        return f"Ledger({len(self)} entries {where}, head {self.head[:12]}...)"

    def repair(self) -> None:
        """Cut off a torn last line; complete one that lacks nothing but its end."""
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
        """Add an entry; when this returns, it is on the disk, and if it raises, it is not there."""
        assert kind in _KINDS
        entry = _seal(len(self), kind, recordable(record), recordable(environment), self.head)
        line = entry.line()
        if self._path is None:
            self._memory += line
        else:
            self._write(self._path, line)
        self._ends.append(self._ends[-1] + len(line))
        self.head = entry.hash
        return entry

    def _write(self, path: Path, line: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size != self._ends[-1]:
                raise LedgerError(
                    f"the ledger was changed from outside: it has {size} bytes, not "
                    f"{self._ends[-1]}"
                )
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


# ---------------------------------------------------------------------------------------------
# What the entries amount to


@dataclass(frozen=True)
class Point:
    """What later entries need to know of one.

    `parent` is the entry whose removals this one adds its own to: the one before, or the one that
    was rolled back to.
    """

    removed: tuple[int, ...]
    skipped: tuple[int, ...]
    parent: int
    checkpoint: str
    sha256: str

    @property
    def is_request(self) -> bool:
        """Whether it asked for samples to be removed."""
        return bool(self.removed or self.skipped)


class History:
    """What the entries so far amount to: which samples are removed, and what can be restored.

    Attributes
    ----------
    start : dict
        The record of the first entry.
    points : list of Point
        One for each entry.
    hashes : dict of int to str
        Of the contents of the samples that were ever asked for.
    removed, pending : dict of int to None
        Samples removed, and samples asked for and not removed, in the order of the requests.
    budget : PrivacyBudget or None
        What releases have spent; a rollback brings nothing back.
    """

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}
        self.points: list[Point] = []
        self.hashes: dict[int, str] = {}
        self.removed: dict[int, None] = {}
        self.pending: dict[int, None] = {}
        self.budget: PrivacyBudget | None = None

    def add(self, entry: Entry) -> None:
        """Take in the next entry; LedgerError if it cannot follow those before it."""
        try:
            problem = self._add(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its record lacks something, or has it of a wrong type ({error!r})"
        if problem is not None:
            raise LedgerError(f"line {entry.number + 1} of the ledger: {problem}")

    def _add(self, entry: Entry) -> str | None:
        record, number = entry.record, entry.number
        if (entry.kind == "start") != (number == 0) or entry.kind not in _KINDS:
            return f"an entry {number} cannot be of kind {entry.kind!r}"
        if entry.kind == "start":
            if record["format"] != FORMAT:
                return f"its format is {record['format']!r}; this version reads {FORMAT}"
            self.start = record
            int(record["keep"]), int(record["train"]["n"])
            if record["budget"] is not None:
                self.budget = PrivacyBudget.from_dict(record["budget"])
        ids: tuple[int, ...] = ()
        skipped: tuple[int, ...] = ()
        if entry.kind in ("remove", "skip"):
            ids, skipped = tuple(record["ids"]), tuple(record["skipped"])
            if not set(skipped) <= set(ids) or (entry.kind == "skip") != (len(skipped) == len(ids)):
                return f"of its samples {ids} it cannot have skipped {skipped}"
        times, stay = Counter(ids), set(skipped)
        for i, sha256 in zip(ids, record.get("hashes", ()), strict=True):
            if not 0 <= i < self.start["train"]["n"] or i in self.removed or times[i] > 1:
                return f"it removes sample {i}, which is not there to remove"
            if self.hashes.setdefault(i, sha256) != sha256:
                return f"sample {i} has another content than in an entry before"
        parent = record["to"] if entry.kind == "rollback" else number - 1
        if entry.kind == "rollback" and not 0 <= parent < number:
            return f"it goes back to entry {parent}, which is not before it"
        if entry.kind == "release":
            if self.budget is None:
                return "there is no budget for a release"
            spend(self.budget, Guarantee.from_dict(record["guarantee"]))
            if self.budget.to_dict() != record["budget"]:
                return "what is left of the privacy budget is not what its guarantee leaves"
        checkpoint = record["checkpoint"]
        removed = tuple(i for i in ids if i not in stay)
        point = Point(removed, skipped, parent, checkpoint["file"], checkpoint["sha256"])
        new = entry.kind in ("start", "remove", "rollback")
        if point.checkpoint != (checkpoint_name(number) if new else self.points[-1].checkpoint):
            return f"it cannot have the checkpoint {point.checkpoint!r}"
        if entry.kind != "remove" and number and point.sha256 != self.points[parent].sha256:
            return f"its weights must be those of entry {parent}, and are not"
        self.points.append(point)
        if entry.kind == "rollback":
            self.removed, self.pending = self.at(number)
        else:
            _take_in(point, self.removed, self.pending)
        if record["n_removed"] != len(self.removed) or record["n_pending"] != len(self.pending):
            return (
                f"after it {len(self.removed)} samples are removed and {len(self.pending)} "
                f"pending; it says {record['n_removed']} and {record['n_pending']}"
            )
        return None

    def at(self, number: int) -> tuple[dict[int, None], dict[int, None]]:
        """The samples removed and pending after an entry."""
        path = []
        while number >= 0:
            path.append(self.points[number])
            number = self.points[number].parent
        removed: dict[int, None] = {}
        pending: dict[int, None] = {}
        for point in reversed(path):
            _take_in(point, removed, pending)
        return removed, pending

    def steps(self, number: int) -> list[int]:
        """The entries whose steps led to the weights of an entry, in their order."""
        path = []
        while number >= 0:
            if self.points[number].removed:
                path.append(number)
            number = self.points[number].parent
        return path[::-1]

    def kept(self) -> set[str]:
        """The checkpoints that are to be kept: the original and the newest."""
        names: set[str] = set()
        for point in reversed(self.points):
            names.add(point.checkpoint)
            if len(names) == self.start["keep"]:
                break
        return names | {point.checkpoint for point in self.points[:1]}

    def restorable(self) -> list[int]:
        """The entries that can be rolled back to."""
        there = self.kept()
        return [k for k, point in enumerate(self.points[:-1]) if point.checkpoint in there]

    def mismatch(self, train: Samples, hashes: Sequence[str] | None = None) -> str | None:
        """Why these are not the training data on record; None if nothing differs.

        All samples are looked at where they are in memory, else a probe of them and the removed
        ones. With the hashes of all, these are looked at.
        """
        n = self.start["train"]["n"]
        if len(train) != n:
            return (
                f"train has {len(train)} samples, on record are {n}: give the data as they were, "
                "with the removed samples"
            )
        known = self.start["train"]
        if not _same_data(train, known, hashes):
            return "train has other contents, or another order, than the data on record"
        for i, sha256 in self.hashes.items():
            if (train.hashes([i])[0] if hashes is None else hashes[i]) != sha256:
                return f"sample {i} of train has another content than the removed one on record"
        return None


def _take_in(point: Point, removed: dict[int, None], pending: dict[int, None]) -> None:
    for i in point.removed:
        pending.pop(i, None)
        removed[i] = None
    pending.update(dict.fromkeys(point.skipped))


def spend(budget: PrivacyBudget, guarantee: Guarantee) -> None:
    """Pay for a release."""
    epsilon, delta, sensitivity = guarantee.epsilon, guarantee.delta, guarantee.sensitivity
    if epsilon is None or delta is None or sensitivity is None:
        raise ValueError("a release without noise cannot be paid for")
    ratio = sensitivity / guarantee.sigma if guarantee.sigma else None
    budget.spend(epsilon, delta, ratio=ratio)


def data_record(samples: Samples, *, read: bool = True, progress: bool = False) -> dict[str, Any]:
    """What a ledger says of a data set: its size, and hashes of its contents if it may be read.

    "sha256" is over 64 samples across it, "content" over all. Both are SHA-256 of the hashes of the
    samples, one after the other.
    """
    n = len(samples)
    if not read:
        return {"n": n, "sha256": None}

    def hashes() -> Iterator[str]:
        with progress_bar(progress, total=n, desc="hashes", unit="sample") as bar:
            for sha256 in samples.each_hash():
                yield sha256
                bar.update()

    sha256, content = _hashes_of(n, hashes())
    return {"n": n, "sha256": sha256, "content": content}


def same_data(samples: Samples | None, known: Mapping[str, Any] | None) -> bool:
    """Whether a data set is that of a record, as far as `History.mismatch` looks."""
    if samples is None or known is None:
        return samples is None and known is None
    return len(samples) == known["n"] and _same_data(samples, known)


def _same_data(
    samples: Samples, known: Mapping[str, Any], hashes: Iterable[str] | None = None
) -> bool:
    n, content = len(samples), known.get("content")  # earlier versions had only the probe
    if known["sha256"] is None:
        return True
    if content is not None and (samples.resident or hashes is not None):
        return _hashes_of(n, samples.each_hash() if hashes is None else hashes)[1] == content
    return _joined_hash(samples.each_hash(_probe(n))) == known["sha256"]


def _hashes_of(n: int, hashes: Iterable[str]) -> tuple[str, str]:
    """Over the probe, and over all."""
    probe, some = set(_probe(n)), []
    digest = hashlib.sha256()
    for k, sha256 in enumerate(hashes):
        digest.update(sha256.encode())
        if k in probe:
            some.append(sha256)
    return _joined_hash(some), digest.hexdigest()


def _joined_hash(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _probe(n: int) -> list[int]:
    return [k * n // _PROBE for k in range(_PROBE)] if n > _PROBE else list(range(n))


# ---------------------------------------------------------------------------------------------
# Verification


@dataclass(frozen=True)
class Verification:
    """What `verify_ledger` found; true if nothing is wrong.

    Attributes
    ----------
    problems : tuple of str
        What does not verify.
    notes : tuple of str
        What verifies, and should be known all the same.
    entries : int
        Entries that verify.
    head : str
        Hash of the last of them.
    removed, pending : tuple of int
        Numbers of the samples that are removed, and of those whose removal was taken back by the
        guard.
    counted : int, optional
        Where an entry does not verify: how many entries there are before it, to which removed and
        pending belong.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    entries: int
    head: str
    removed: tuple[int, ...] = ()
    pending: tuple[int, ...] = ()
    counted: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "verifies" if self.ok else "does NOT verify"
        counts = f"{len(self.removed)} samples removed, {len(self.pending)} pending"
        if self.counted == 0:
            counts = "samples not counted"
        elif self.counted is not None:
            counts += f" after entry {self.counted - 1} (what follows is not counted)"
        lines = [f"The ledger {verdict}: {self.entries} entries, {counts}, head {self.head}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_ledger(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    train: Any = None,
    *,
    head: str | None = None,
) -> Verification:
    """Check the ledger of an `Unlearner`, its checkpoints, and a model and data against it.

    Nothing is changed, and an `Unlearner` may have the directory in use.

    Parameters
    ----------
    directory : str or path
        The directory that was given to `Unlearner`.
    model : Module, optional
        Said to have the weights of the last entry: `Unlearner.model`, not a release, which has
        noise.
    train : tensors, Dataset or DataLoader, optional
        The training data, as they were given to `Unlearner`: nothing taken out. Every sample is
        read and hashed, and all contents must be those on record. Ledgers of earlier versions have
        only 64 samples and the removed ones on record, those of streams with `statistics` only the
        removed ones. A sample of the content of a removed one that is still retained is noted.
    head : str, optional
        Hash of an entry, noted earlier and kept elsewhere (`Ledger.head`). It must still be
        there: this shows a ledger that was written anew, or cut short.

    Returns
    -------
    Verification
        True if all verifies; print it.

    Raises
    ------
    FileNotFoundError
        If the directory has no ledger.

    Notes
    -----
    Checked are the chain of hashes, that every entry is possible after those before it, that the
    checkpoints which should be kept are there with the tensors on record, and what is given of
    model, train and head.
    """
    folder = Path(directory)
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(directory)!r} has no {LEDGER_FILE}")
    found = _Findings()
    entries = counted = 0
    last, seen = FIRST, {FIRST}
    history = History()
    with open(path, "rb") as file:
        for line, entry in _scan(file):
            if entry is None:
                found.notes.append(
                    f"line {entries + 1} of the ledger ({len(line)} bytes) was cut short while it "
                    "was written, so it was never acknowledged; Unlearner.resume drops it"
                )
            elif isinstance(entry, LedgerError):
                found.problems.append(str(entry))
            else:
                entries += 1
                last = entry.hash
                seen.add(last)
                if not found.problems:
                    try:
                        history.add(entry)
                        counted += 1
                    except LedgerError as error:
                        found.problems.append(str(error))
    whole = not found.problems
    if head is not None and head not in seen:
        found.problems.append(f"no entry has the hash {head} that was noted earlier")
    if not counted and whole:
        found.problems.append("the ledger has no entry")
    removed, pending = history.at(counted - 1)
    if counted and whole:
        _verify_contents(folder, model, train, history, found)
    return Verification(
        tuple(found.problems),
        tuple(found.notes),
        entries,
        last,
        tuple(removed),
        tuple(pending),
        None if counted and whole else counted,
    )


def _verify_contents(
    folder: Path, model: nn.Module | None, train: Any, history: History, found: _Findings
) -> None:
    """Check what is beside the ledger against it."""
    _verify_checkpoints(folder / CHECKPOINT_FOLDER, history, found)
    if model is not None:
        sha256 = state_hash(state_of(model))
        if sha256 != history.points[-1].sha256:
            found.problems.append(
                "the weights of model are not those of the last entry: their SHA-256 is "
                f"{sha256}, on record is {history.points[-1].sha256}"
            )
    if train is not None:
        _verify_data(train, history, found)


def _verify_checkpoints(folder: Path, history: History, found: _Findings) -> None:
    expected = {point.checkpoint: point.sha256 for point in history.points}
    wanted = history.kept()
    for name in sorted(wanted):
        try:
            read_checkpoint(folder / name, expected[name])
        except LedgerError as error:
            found.problems.append(str(error))
    left = sorted({path.name for path in folder.glob("*.pt")} - wanted)
    if left:
        found.notes.append(
            f"checkpoints that are no longer needed, or were never acknowledged: {', '.join(left)};"
            " Unlearner.resume deletes them"
        )


def _verify_data(train: Any, history: History, found: _Findings) -> None:
    # Hashes are of the content as it was given: neither a move nor a conversion is in them.
    samples = as_samples(train, "train", _device_of(train), torch.float64)
    contents = {history.hashes[i]: i for i in history.removed}
    twins = []

    def hashes() -> Iterator[str]:  # every sample is read once
        for i, sha256 in enumerate(samples.each_hash()):
            if i not in history.removed and sha256 in contents:
                twins.append((i, contents[sha256]))
            yield sha256

    problem = history.mismatch(samples, list(hashes()))
    if problem is not None:
        found.problems.append(problem)
        return
    found.notes += [
        f"sample {i} is retained and has the content of sample {twin}, which is removed"
        for i, twin in twins
    ]


def _device_of(data: Any) -> torch.device:
    if isinstance(data, torch.Tensor):
        return data.device
    if isinstance(data, Mapping):
        data = tuple(data.values())
    if isinstance(data, list | tuple) and data:
        return _device_of(data[0])
    return torch.device("cpu")
