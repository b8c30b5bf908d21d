"""A selection on disk, step by step, so that it can go on after an interruption."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import is_tensor
from lcodec_ext._files import file_to_write, json_ready, short_digest, write_atomically
from lcodec_ext._random import mixed
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import Columns
from lcodec_ext.dependence.backends.block_table import BlockTable
from lcodec_ext.dependence.foci_null import StepTest

_FORMAT = 1
_PIECE = 1 << 16  # numbers that are mixed at a time: they stay in the cache


@dataclass
class Progress:
    """How far a selection is.

    Attributes
    ----------
    m : Fraction or tuple of Fraction
        The exact sum of the columns selected.
    steps : list of (column, T, conditional T)
    tests : list of StepTest
        With stop="permutation", of every step, and of the one that ended the selection.
    reason : str or None
        Why it ended; None before.
    not_taken : int or None
        The best column of the step that ended it.
    determined : bool
        Whether y was a function of the columns before a step that was taken.
    """

    m: Any
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    tests: list[StepTest] = field(default_factory=list)
    reason: Any = None
    not_taken: int | None = None
    determined: bool = False


class Checkpoint:
    """The file of a selection.

    Parameters
    ----------
    path : str or path
    text : str or None
        What the file holds; None if there is none.

    Raises
    ------
    ValueError
        If this version cannot read it, or it lacks something.
    """

    def __init__(self, path: Any, text: str | None) -> None:
        self._path = path
        self._of: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None  # what the selection was of
        self._before: Progress | None = None
        if text is not None:
            try:
                saved = json.loads(text)
                if saved["format"] != _FORMAT or not isinstance(saved["of"], dict):
                    raise ValueError("another format")
                self._saved, self._before = saved["of"], _progress(saved)
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"checkpoint {str(path)!r} is not a checkpoint that this version can read "
                    f"({error}): pass another path, or delete the file"
                ) from None

    def seed(self, given: int | None) -> int | None:
        """The seed to go on with: the one that was drawn, where none is given."""
        if given is None and self._saved is not None:
            found: int | None = self._saved.get("seed")
            return found
        return given

    def resume(self, of: dict[str, Any]) -> Progress | None:
        """How far the selection was; None at the beginning.

        Parameters
        ----------
        of : dict
            What the steps depend on, in types of JSON.

        Raises
        ------
        ValueError
            If the file is of another selection; it names what differs.
        """
        self._of = json.loads(json.dumps(of))
        if self._saved is None:
            return None
        saved, asked = self._saved, self._of
        for name in {**asked, **saved}:
            if saved.get(name) != asked.get(name):
                raise ValueError(
                    f"checkpoint {str(self._path)!r} is of another selection: its {name} is "
                    f"{saved.get(name)!r}, and that of this call is {asked.get(name)!r}; pass "
                    "another path, or delete the file"
                )
        return self._before

    def write(self, progress: Progress) -> None:
        """Replace the file by one that has all steps so far."""
        tests = json_ready(progress.tests)  # nan is None there
        content = {
            "format": _FORMAT,
            "of": self._of,
            "steps": progress.steps,
            "m": exact.written(progress.m),
            "tests": tests,
            "stop_reason": progress.reason,
            "not_taken": progress.not_taken,
        }
        write_atomically(self._path, json.dumps(content, allow_nan=False) + "\n")


def _progress(saved: dict[str, Any]) -> Progress:
    tests = [
        StepTest(*(math.nan if value is None else value for value in test))
        for test in saved["tests"]
    ]
    steps = [(column, T, conditional) for column, T, conditional in saved["steps"]]
    return Progress(exact.read(saved["m"]), steps, tests, saved["stop_reason"], saved["not_taken"])


def saved_text(path: Any) -> str | None:
    """What a checkpoint holds; None if there is no file."""
    found = file_to_write(path)
    return found.read_text(encoding="utf-8") if found.exists() else None


def digest(y: Any) -> str:
    """Of a response: its type, shape and values."""
    values = np.asarray(y.cpu().numpy() if is_tensor(y) else y)
    return f"{values.dtype}{list(values.shape)} {short_digest(values)}"


def word_of(columns: Columns, n: int, p: int, first: int) -> int:
    """64 bits of the first p columns, n values in places each; the first is number `first`.

    Words of parts of a table add up to that of the table.
    """
    word = 0
    numbers = mixed(np.arange(first + 1, first + p + 1, dtype=np.uint64))
    rows = mixed(np.arange(1, n + 1, dtype=np.uint64))
    step = max(1, _PIECE // n)
    for begin, block in _blocks(columns, p, step):
        for k in range(0, block.shape[1], step):
            values = block[:, k : k + step].T + block.dtype.type(0)  # -0 is 0
            bits = values.view(f"u{values.itemsize}").astype(np.uint64, copy=False)
            of_columns = mixed(bits ^ rows).sum(axis=1, dtype=np.uint64)
            at = begin + k
            of_columns = mixed(of_columns ^ numbers[at : at + len(of_columns)])
            word += int(of_columns.sum(dtype=np.uint64))
    return word & (2**64 - 1)


def _blocks(columns: Columns, p: int, step: int) -> Iterator[tuple[int, NDArray]]:
    """The first p columns in blocks, and the index of the first of each."""
    if isinstance(columns, BlockTable):
        yield from columns.survey()
        return
    for begin in range(0, p, step):
        values = columns.take(list(range(begin, min(begin + step, p))))
        yield begin, values.cpu().numpy() if is_tensor(values) else values
