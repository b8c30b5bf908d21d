"""What readers of tables share: named columns of numbers, and why a column cannot be used."""

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import first_few

EXACT_INTEGER = 2**53
ENCODE = (
    "encode categories as numbers first: one column of 0 and 1 for each, or codes where their "
    "order is meant"
)
DATES = "make it a number first, for instance days since a date"
_MOST_NAMED = 50


class TableError(ValueError):
    """A table, or a column of it, cannot be used."""


class Unusable(NamedTuple):
    """Why a column cannot be used: "row 3" or "", what is wrong there, and what to do."""

    place: str
    what: str
    advice: str


class UnusableColumnsError(TableError):
    """Columns of a table cannot be used.

    Parameters
    ----------
    label : str
        The file, for messages.
    problems : dict
        What is wrong, by column.
    """

    def __init__(self, label: str, problems: dict[str, Unusable]) -> None:
        self.label, self.problems = label, problems
        (name, problem), *more = problems.items()
        if more:
            text = f"{label}: {len(problems)} columns cannot be used: {listed(problems)}"
        else:
            place = f", {problem.place}," if problem.place else ":"
            text = f"{label}{place} column {name!r}{problem.what}"
        advice = dict.fromkeys(each.advice for each in problems.values())
        super().__init__("; ".join([text, *advice]))


class Names(list[str]):
    """Names of a table's columns, and those of a pandas index, which is no candidate."""

    def __init__(self, names: Sequence[str], index: Collection[str] = ()) -> None:
        super().__init__(names)
        self.pandas_index = frozenset(index)


Choose = Callable[[Names], list[str]]


class Reader(Protocol):
    """A table whose columns are known and not read yet."""

    names: list[str]

    @property
    def index(self) -> Collection[str]:
        """Those of the names that are a pandas index."""
        ...

    def load(self, places: list[int]) -> list[NDArray | Unusable]:
        """Some columns, by their places in ``names``."""
        ...

    def labels(self, place: int) -> list[str | None]:
        """A column as text, None where it is missing; nothing where it does not hold text."""
        ...


class Table:
    """Named columns of numbers, as the package's functions take data frames.

    Parameters
    ----------
    columns : list of str
    arrays : sequence of ndarray of shape (n,)
        One for each column.
    left_out : dict, optional
        Columns that were wanted and cannot be used, and why.
    """

    def __init__(
        self,
        columns: list[str],
        arrays: Sequence[NDArray],
        left_out: dict[str, Unusable] | None = None,
    ) -> None:
        self.columns, self.left_out = columns, left_out or {}
        self._arrays = dict(zip(columns, arrays, strict=True))

    def __len__(self) -> int:
        return len(self._arrays[self.columns[0]])

    def __getitem__(self, name: str) -> NDArray:
        return self._arrays[name]

    def select(self, names: Sequence[str]) -> "Table":
        """Some of the columns, in the order given."""
        return Table(list(names), [self._arrays[name] for name in names])

    def to_numpy(self) -> NDArray:
        """The columns side by side, shape (n, p)."""
        return np.column_stack([self._arrays[name] for name in self.columns])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return self.to_numpy() if dtype is None else self.to_numpy().astype(dtype)

    def missing(self) -> tuple[int, dict[str, int]]:
        """How many rows have a NaN, and how many each column has, where it has any."""
        rows = np.zeros(len(self), dtype=bool)
        counts = {}
        for name, values in self._arrays.items():
            if (flags := is_missing(values)).any():
                rows |= flags
                counts[name] = int(flags.sum())
        return int(rows.sum()), counts

    def first(self, test: Callable[[NDArray], NDArray]) -> str | None:
        """Row (from 1) and column of the first value for which test is true."""
        for name, values in self._arrays.items():
            if (found := test(values)).any():
                return f"row {int(found.argmax()) + 1}, column {name!r}"
        return None


def is_missing(values: NDArray) -> NDArray[np.bool_]:
    """Where a column of numbers has NaN, or one of labels None."""
    if values.dtype.kind == "O":
        return np.array([value is None for value in values], dtype=bool)
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)


def headless(names: Sequence[str]) -> str:
    """A hint where names in the first line are numbers, as those of a row are."""
    if any(re.fullmatch(r"[+-]?\d+\.\d+(e[+-]?\d+)?", name, re.IGNORECASE) for name in names):
        return " (no header? pass --no-header)"
    return ""


def label_of(path: str) -> str:
    """A file's name for messages."""
    return "standard input" if path == "-" else path


def listed(problems: dict[str, Unusable]) -> str:
    """Columns that cannot be used, each with what is wrong, in one line."""
    each = [
        f"{name!r} ({problem.place}{': ' if problem.place else ''}{problem.what.lstrip(': ')})"
        for name, problem in problems.items()
    ]
    return first_few(each, _MOST_NAMED)


def shown(cell: str | None) -> str:
    """A cell in a message."""
    text = repr(cell)
    return text if len(text) <= 40 else text[:36] + "...'"


def option(name: str, value: str) -> str:
    """An option as a shell takes it."""
    return f"--{name} {shlex.quote(value)}"


def not_numbers(kind: str) -> Unusable:
    """A column of a type that is not numbers."""
    advice = ENCODE
    if re.search("date|time|duration", kind):
        advice = DATES
    elif "decimal" in kind:
        advice = "convert it to float64 first, less an offset where it has over 15 digits"
    return Unusable("", f" is of {kind}; expected numbers", advice)


def rounded(number: object) -> tuple[str, str]:
    """What is wrong with an integer that float64 rounds, and what to do."""
    return (
        f": {number} is beyond 2**53, where float64 cannot tell integers apart",
        "subtract an offset first",
    )
