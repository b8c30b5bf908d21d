"""A selection on disk, step by step, so that it can go on after an interruption."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import is_tensor
from lcodec_ext._files import file_to_write, json_ready, write_atomically
from lcodec_ext._random import mixed
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import Laid
from lcodec_ext.dependence.foci_null import StepTest

_FORMAT = 1


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
    """

    m: Any
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    tests: list[StepTest] = field(default_factory=list)
    reason: Any = None
    not_taken: int | None = None


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
        If it is no checkpoint of this version.
    """

    def __init__(self, path: Any, text: str | None) -> None:
        self._path = path
        self._of: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        if text is not None:
            try:
                self._saved = json.loads(text)
                if self._saved["format"] != _FORMAT or not isinstance(self._saved["of"], dict):
                    raise ValueError("another format")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"checkpoint {str(path)!r} is not a checkpoint that this version can read "
                    f"({error}): pass another path, or delete the file"
                ) from None

    def seed(self, given: int | None) -> int | None:
        """The seed to go on with: the one that was drawn, where none is given."""
        if given is None and self._saved is not None:
            found: int | None = self._saved["of"].get("seed")
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
        saved = self._saved["of"]
        for name in {**self._of, **saved}:
            if self._of.get(name) != saved.get(name):
                raise ValueError(
                    f"checkpoint {str(self._path)!r} is of another selection: its {name} is "
                    f"{saved.get(name)!r}, and that of this call is {self._of.get(name)!r}; pass "
                    "another path, or delete the file"
                )
        tests = [
            StepTest(*(math.nan if value is None else value for value in test))
            for test in self._saved["tests"]
        ]
        steps = [(column, T, conditional) for column, T, conditional in self._saved["steps"]]
        m = exact.read(self._saved["m"])
        return Progress(m, steps, tests, self._saved["stop_reason"], self._saved["not_taken"])

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


def saved_text(path: Any) -> str | None:
    """What a checkpoint holds; None if there is no file."""
    found = file_to_write(path)
    return found.read_text(encoding="utf-8") if found.exists() else None


def digest(y: Any) -> str:
    """Of a response: its type, shape and values."""
    values = np.ascontiguousarray(y.cpu().numpy() if is_tensor(y) else y)
    return f"{values.dtype}{list(values.shape)} {hashlib.sha256(values.tobytes()).hexdigest()[:16]}"


def ranges_word(laid: Laid, p: int, first: int) -> int:
    """64 bits of the range and factor of p columns, the first of which is number `first`.

    Words of parts of a table add up to that of the table.
    """
    words = mixed(np.arange(first + 1, first + p + 1, dtype=np.uint64))
    for part in (laid.columns.low, laid.columns.high, laid.factors):
        numbers: NDArray[np.float64] = part[:p].astype(np.float64) + 0.0  # -0 is 0
        words = mixed(words ^ numbers.view(np.uint64))
    return int(words.sum(dtype=np.uint64))
