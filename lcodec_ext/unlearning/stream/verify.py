"""Checks of a ledger, its checkpoints, and a model and data against it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcodec_ext._checks import counted
from lcodec_ext._torch.samples import as_samples
from lcodec_ext._torch.states import state_hash, tensors_of_state
from lcodec_ext.unlearning.groups import Groups
from lcodec_ext.unlearning.stream.checkpoints import LedgerError, read_checkpoint
from lcodec_ext.unlearning.stream.given import check_groups
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import CHECKPOINT_FOLDER, FIRST, LEDGER_FILE, scan


@dataclass(frozen=True)
class Verification:
    """What `verify_ledger` found; true if nothing is wrong.

    Attributes
    ----------
    problems, notes : tuple of str
        What does not verify; what verifies, and should be known all the same.
    entries, head : int, str
        Number of entries that verify, and the hash of the last of them.
    removed, pending : tuple of int
        Samples that are removed, and those whose removal the guard took back.
    counted : int, optional
        If an entry does not verify: the number of entries before it, to which removed and pending
        belong.
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
        counts = f"{counted(len(self.removed), 'sample')} removed, {len(self.pending)} pending"
        if self.counted == 0:
            counts = "samples not counted"
        elif self.counted is not None:
            counts += f" after entry {self.counted - 1} (what follows is not counted)"
        entries = counted(self.entries, "entry", "entries")
        lines = [f"The ledger {verdict}: {entries}, {counts}, head {self.head}"]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def verify_ledger(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    train: Any = None,
    *,
    head: str | None = None,
    groups: Any = None,
) -> Verification:
    """Check the ledger of an `Unlearner`, its checkpoints, and a model and data against it.

    Checked are the chain of hashes, that every entry is possible after those before it, that the
    checkpoints to be kept are there with the tensors on record, and model, train and head if they
    are given. Nothing is changed, and an `Unlearner` may have the directory in use.

    Parameters
    ----------
    directory : str or path
        The directory that was given to `Unlearner`.
    model : Module, optional
        Must have the weights of the last entry: `Unlearner.model`, not a release, which has noise.
    train : tensors, Dataset or DataLoader, optional
        The training data, as they were given to `Unlearner`, the removed samples included. Every
        sample is read and hashed. Ledgers of earlier versions have only 64 samples and the removed
        ones on record, those of streams with `statistics` only the removed ones. A retained sample
        with the content of a removed one is noted.
    head : str, optional
        Hash of an entry, noted earlier and kept elsewhere (`Ledger.head`). It must still be in the
        ledger: this reveals a ledger that was rewritten, or cut short.
    groups : array_like, Series or Tensor of int or str, optional
        Whom each training sample belongs to, as given to `Unlearner`. Every request for a group
        must have asked for all its samples that were not removed before.

    Returns
    -------
    Verification
        True if all verifies; print it.

    Raises
    ------
    FileNotFoundError
        If the directory has no ledger.
    """
    folder = Path(directory)
    path = folder / LEDGER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"directory {str(directory)!r} has no {LEDGER_FILE}")
    problems: list[str] = []
    notes: list[str] = []
    hashes, history, counted = [FIRST], History(), 0
    with open(path, "rb") as file:
        for line, entry in scan(file):
            if entry is None:
                notes.append(
                    f"line {len(hashes)} of the ledger ({len(line)} bytes) was cut short while it "
                    "was written, so it was never acknowledged; Unlearner.resume drops it"
                )
                continue
            try:
                if isinstance(entry, LedgerError):
                    raise entry
                hashes.append(entry.hash)
                if not problems:
                    history.add(entry)
                    counted += 1
            except LedgerError as error:
                problems.append(str(error))
    whole = not problems
    if head is not None and head not in hashes:
        problems.append(f"no entry has the hash {head} that was noted earlier")
    if not counted and whole:
        problems.append("the ledger has no entry")
    removed, pending = history.at(counted - 1)
    if counted and whole:
        problems += _checkpoint_problems(folder / CHECKPOINT_FOLDER, history)
        notes += _leftovers(folder / CHECKPOINT_FOLDER, history)
        problems += [] if model is None else _model_problems(model, history)
        if train is not None:
            data_problems, twins = _verify_data(train, history)
            problems += data_problems
            notes += twins
        if groups is not None and history.start.get("groups") is None:
            notes.append("the stream has no groups on record; those given are not compared")
        elif groups is not None:
            problems += _group_problems(groups, history)
    return Verification(
        tuple(problems),
        tuple(notes),
        len(hashes) - 1,
        hashes[-1],
        tuple(removed),
        tuple(pending),
        None if counted and whole else counted,
    )


def _checkpoint_problems(folder: Path, history: History) -> Iterator[str]:
    expected = {point.checkpoint: point.sha256 for point in history.points}
    for name in sorted(history.kept()):
        try:
            read_checkpoint(folder / name, expected[name])
        except LedgerError as error:
            yield str(error)


def _leftovers(folder: Path, history: History) -> Iterator[str]:
    left = sorted({path.name for path in folder.glob("*.pt")} - history.kept())
    if left:
        yield (
            f"checkpoints that are no longer needed, or were never acknowledged: {', '.join(left)};"
            " Unlearner.resume deletes them"
        )


def _model_problems(model: nn.Module, history: History) -> Iterator[str]:
    sha256, recorded = state_hash(tensors_of_state(model)), history.points[-1].sha256
    if sha256 != recorded:
        yield (
            f"the weights of model are not those of the last entry: their SHA-256 is {sha256}, on "
            f"record is {recorded}"
        )


def _verify_data(train: Any, history: History) -> tuple[list[str], list[str]]:
    """What is wrong with the training data, and which retained samples have removed contents."""
    # Hashes are of the content as it was given: neither a move nor a conversion is in them.
    samples = as_samples(train, "train", _device_of(train), torch.float64)
    hashes = samples.hashes()  # every sample is read once
    problem = history.mismatch(samples, hashes)
    if problem is not None:
        return [problem], []
    contents = {history.hashes[i]: i for i in history.removed}
    return [], [
        f"sample {i} is retained and has the content of sample {contents[sha256]}, which is removed"
        for i, sha256 in enumerate(hashes)
        if i not in history.removed and sha256 in contents
    ]


def _group_problems(given: Any, history: History) -> list[str]:
    try:
        groups = Groups.of(given, int(history.start["train"]["n"]), "train")
        check_groups(groups, history.start.get("groups"))
    except (TypeError, ValueError) as error:
        return [str(error)]
    return [
        f"entry {number} asks for samples {each['samples']} of group {each['id']!r}, of which "
        f"{each['before']} were removed before; the group has {own}"
        for number, each in history.groups
        for own in [groups.samples(each["id"]) if each["id"] in groups.ids else []]
        if sorted([*each["samples"], *each["before"]]) != own
    ]


def _device_of(data: Any) -> torch.device:
    if isinstance(data, torch.Tensor):
        return data.device
    if isinstance(data, Mapping):
        data = tuple(data.values())
    if isinstance(data, list | tuple) and data:
        return _device_of(data[0])
    return torch.device("cpu")
