"""Tables from files, for the command line: CSV, TSV, NPZ, NPY and Parquet, with NumPy alone.

A reader learns the names of the columns first and asks which of them are wanted, so that the
others are neither parsed nor kept. Parquet needs pyarrow.
"""

import csv
import io
import shutil
import sys
import tempfile
import warnings
import zipfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

Choose = Callable[[list[str]], list[str]]

_MISSING = {"", "na", "n/a", "<na>", "#n/a", "nan", "-nan", "null", "none"}
_TRUTH = {"true": 1.0, "false": 0.0}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_SUFFIXES = ".csv, .tsv, .tab, .npz, .npy or .parquet"
_EXACT_INTEGER = 2.0**53
_ENCODE = (
    "encode categories as numbers first: one column of 0 and 1 for each, or codes where their "
    "order is meant"
)


class TableError(ValueError):
    """A table, or a column of it, cannot be used."""


class Table:
    """Named columns of numbers, as the package's functions take data frames.

    Parameters
    ----------
    columns : list of str
    arrays : sequence of ndarray of shape (n,)
        One for each column.
    lines : ndarray of shape (n,), optional
        Where the rows are in a text file.
    """

    def __init__(
        self, columns: list[str], arrays: Sequence[NDArray], lines: NDArray | None = None
    ) -> None:
        self.columns, self._lines = columns, lines
        self._arrays = dict(zip(columns, arrays, strict=True))

    def __len__(self) -> int:
        return len(self._arrays[self.columns[0]])

    def __getitem__(self, name: str) -> NDArray:
        return self._arrays[name]

    def select(self, names: Sequence[str]) -> "Table":
        """Some of the columns, in the order given."""
        return Table(list(names), [self._arrays[name] for name in names], self._lines)

    def to_numpy(self) -> NDArray:
        """The columns side by side, shape (n, p)."""
        return np.column_stack([self._arrays[name] for name in self.columns])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray:
        return self.to_numpy() if dtype is None else self.to_numpy().astype(dtype)

    def n_complete(self) -> int:
        """How many rows have no NaN."""
        found = np.zeros(len(self), dtype=bool)
        for values in self._arrays.values():
            if values.dtype.kind == "f":
                found |= np.isnan(values)
        return len(self) - int(np.count_nonzero(found))

    def first(self, test: Callable[[NDArray], NDArray]) -> str | None:
        """Line, or row where there are no lines, and column of a number for which test is true.

        It is the first one of its column.
        """
        for name, values in self._arrays.items():
            if values.dtype.kind == "f" and (found := test(values)).any():
                row = int(found.argmax())
                where = f"row {row + 1}" if self._lines is None else f"line {self._lines[row]}"
                return f"{where}, column {name!r}"
        return None


def label_of(path: str) -> str:
    """A file's name for messages."""
    return "standard input" if path == "-" else path


def read_table(
    path: str, choose: Choose, *, header: bool = True, delimiter: str | None = None
) -> Table:
    """Read the chosen columns of a file.

    Parameters
    ----------
    path : str
        The suffix says what it is; "-" is CSV from standard input.
    choose : callable
        From the names of all columns to those that are wanted; it may refuse.
    header : bool, default True
        Whether the first line of a CSV or TSV file has the names. Otherwise they are "0", "1", ...
    delimiter : str, optional
        Of CSV; by default that of the suffix.

    Raises
    ------
    TableError
        If it cannot be read, or a wanted cell is no number; file, line and column are named.
    """
    suffix = ".csv" if path == "-" else Path(path).suffix.lower()
    text = suffix in _DELIMITERS or (delimiter is not None and suffix in ("", ".txt", ".dat"))
    if not text and (delimiter is not None or not header):
        option = "a delimiter" if delimiter is not None else "no header"
        raise TableError(f"{path}: {option} is for CSV and TSV files; this one ends in {suffix!r}")
    if path != "-" and not Path(path).is_file():
        what = "is a directory" if Path(path).is_dir() else "does not exist"
        raise TableError(f"{path} {what}; expected a table: {_SUFFIXES}, or - for standard input")
    if text:
        return _read_text(path, choose, header, delimiter or _DELIMITERS[suffix])
    readers = {".npz": _read_npz, ".npy": _read_npy, ".parquet": _read_parquet}
    if suffix not in readers:
        raise TableError(
            f"{path} ends in {suffix!r}; expected {_SUFFIXES} (or say --delimiter for a text file)"
        )
    return readers[suffix](path, choose)


# ---------------------------------------------------------------------------------------------
# Text


def _read_text(path: str, choose: Choose, header: bool, delimiter: str) -> Table:
    label = label_of(path)
    try:
        with ExitStack() as stack:
            file: TextIO
            if path == "-":  # kept on disk, because a second reading may be needed
                spool = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(sys.stdin.buffer, spool)
                file = io.TextIOWrapper(spool, encoding="utf-8-sig", newline="")
            else:
                file = stack.enter_context(open(path, encoding="utf-8-sig", newline=""))
            return _Text(file, label, header, delimiter).read(choose)
    except UnicodeDecodeError as error:
        raise TableError(
            f"{label} is not UTF-8: {error.reason} at byte {error.start}; convert it first, for "
            "instance with iconv -f latin1 -t utf-8"
        ) from None
    except csv.Error as error:
        raise TableError(f"{label} is no {delimiter!r}-separated table: {error}") from None


class _Text:
    """A seekable file of delimited text."""

    def __init__(self, file: TextIO, label: str, header: bool, delimiter: str) -> None:
        self._file, self._label = file, label
        self._header, self._delimiter = header, delimiter
        self._names: list[str] = []
        self._lines: NDArray[np.int64]  # of the rows, once they are read

    def read(self, choose: Choose) -> Table:
        first = next(self._reader(), None)
        if first is None:
            raise TableError(f"{self._label} is empty; expected a table")
        if self._header:
            self._names = [name.strip() or f"column {k}" for k, name in enumerate(first)]
            self._check_header()
        else:
            self._names = [str(k) for k in range(len(first))]
        wanted = choose(self._names)
        places = [self._names.index(name) for name in wanted]
        values = self._plain(places)
        if values is None:
            values = self._careful(places)
        if large := [k for k, column in zip(places, values.T, strict=True) if _beyond(column)]:
            self._check_integers(large)
        return Table(wanted, list(values.T), self._lines)

    def _reader(self) -> Any:
        self._file.seek(0)
        return csv.reader(self._file, delimiter=self._delimiter, strict=True)

    def _check_header(self) -> None:
        for name in self._names:
            if self._names.count(name) > 1:
                raise TableError(
                    f"{self._label}: {self._names.count(name)} columns are named {name!r}; "
                    "expected different names"
                )
        for other in "\t;|":
            if len(self._names) == 1 and other in self._names[0]:
                raise TableError(
                    f"{self._label} has one column, {self._names[0][:60]!r}; if {other!r} "
                    f"separates its columns, pass --delimiter '{other}'".replace("'\t'", "tab")
                )

    def _plain(self, places: list[int]) -> NDArray | None:
        """The columns by NumPy's parser, or None where a line needs a closer look.

        It would misread quotes, and lines with a cell too many.
        """
        commas = len(self._names) - 1
        empty: list[int] = []  # which are no rows; a line of one cell may be

        def lines() -> Iterator[str]:
            for number, line in enumerate(self._file, 1 + self._header):
                if line.count(self._delimiter) != commas or '"' in line:
                    raise ValueError("not plain")
                if not commas and not line.strip("\r\n"):
                    empty.append(number)
                yield line

        self._file.seek(0)
        if self._header and (self._file.readline().count(self._delimiter) != commas):
            return None  # a quoted header, perhaps of several lines
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "no data": the caller says how many rows it needs
                values = np.loadtxt(
                    lines(), delimiter=self._delimiter, comments=None, usecols=places, ndmin=2
                ).reshape(-1, len(places))
        except ValueError:
            return None
        numbers = np.arange(len(values) + len(empty)) + 1 + self._header
        self._lines = np.delete(numbers, np.array(empty, dtype=int) - 1 - self._header)
        return values

    def _rows(self, places: list[int]) -> Iterator[tuple[int, Sequence[str]]]:
        """Line number and wanted cells of every row; empty lines are none."""
        reader = self._reader()
        if self._header:
            next(reader)
        pick = itemgetter(*places) if len(places) > 1 else lambda row: (row[places[0]],)
        width = len(self._names)
        for row in reader:
            if len(row) != width:
                if not row:
                    continue
                advice = ""
                if len(row) == width + 1 and self._header:
                    advice = " (row names without a header, as R writes them? give them one)"
                raise TableError(
                    f"{self._label}, line {reader.line_num}: {len(row)} cells; expected {width}, "
                    f"as in the first line{advice}"
                )
            yield reader.line_num, pick(row)

    def _careful(self, places: list[int]) -> NDArray:
        """The columns by Python's parser: quotes, missing cells, and messages that say where."""
        values, lines = array("d"), array("q")
        for line, cells in self._rows(places):
            lines.append(line)
            try:
                values.extend([_number(cell) for cell in cells])
            except ValueError:
                self._refuse(places, line, cells)
        self._lines = np.frombuffer(lines, dtype=np.int64)
        return np.frombuffer(values).reshape(-1, len(places))

    def _refuse(self, places: list[int], line: int, cells: Sequence[str]) -> None:
        for place, cell in zip(places, cells, strict=True):
            try:
                _number(cell)
            except ValueError:
                shown = cell if len(cell) <= 40 else cell[:37] + "..."
                decimal = cell.replace(",", ".", 1)
                advice = _ENCODE
                if "," in cell and decimal.replace(".", "", 1).lstrip("+-").isdecimal():
                    advice = "decimals need a point"
                elif line == 1 and not self._header:
                    advice = "a header? then leave out --no-header"
                raise TableError(
                    f"{self._label}, line {line}, column {self._names[place]!r}: {shown!r} is no "
                    f"number; {advice}"
                ) from None

    def _check_integers(self, places: list[int]) -> None:
        """Refuse integers that float64 rounds: it would make different ones equal."""
        for line, cells in self._rows(places):
            for place, cell in zip(places, cells, strict=True):
                digits = cell.strip().lstrip("+-")
                if len(digits) > 15 and digits.isdecimal() and int(digits) != float(digits):
                    raise TableError(
                        f"{self._label}, line {line}, column {self._names[place]!r}: {cell} is "
                        "beyond 2**53, where float64 cannot tell integers apart; leave the column "
                        "out, or subtract an offset first"
                    )


def _beyond(column: NDArray) -> bool:
    """Whether there are numbers that could be rounded integers."""
    low, high = np.fmin.reduce(column, initial=0), np.fmax.reduce(column, initial=0)
    return bool(max(high, -low) >= _EXACT_INTEGER)


def _number(cell: str) -> float:
    """A cell's number: NaN where it is missing, 1 and 0 for true and false."""
    try:
        number = float(cell)
    except ValueError:
        word = cell.strip().lower()
        if word in _MISSING:
            return np.nan
        return _TRUTH[word] if word in _TRUTH else _raise(cell)
    return number if "_" not in cell else _raise(cell)  # Python's own spelling, 1_000


def _raise(cell: str) -> float:
    raise ValueError(cell)


# ---------------------------------------------------------------------------------------------
# Arrays


def _read_npz(path: str, choose: Choose) -> Table:
    """Every 1-d array is a column; a 2-d array "X" is the columns X0, X1, ..."""
    columns: dict[str, NDArray] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise TableError(f"{path} cannot be read as NPZ: {error}") from None
    for key, values in arrays.items():
        _add_array(columns, key, values, path)
    return _chosen(columns, choose, path)


def _read_npy(path: str, choose: Choose) -> Table:
    """The columns of a 2-d array, named "0", "1", ..."""
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise TableError(f"{path} cannot be read as NPY: {error}") from None
    columns: dict[str, NDArray] = {}
    _add_array(columns, "", np.atleast_2d(values.T).T, path)
    return _chosen(columns, choose, path)


def _add_array(columns: dict[str, NDArray], key: str, values: NDArray, path: str) -> None:
    if values.ndim not in (1, 2):
        raise TableError(
            f"{path}: array {key!r} has shape {values.shape}; expected 1 axis, a column, or 2, "
            "rows and columns"
        )
    new = {key: values}
    if values.ndim == 2:
        new = {f"{key}{k}": values[:, k] for k in range(values.shape[1])}
    for name, column in new.items():
        if name in columns:
            raise TableError(f"{path}: two columns would be named {name!r}; rename an array")
        columns[name] = column


def _chosen(columns: dict[str, NDArray], choose: Choose, path: str) -> Table:
    wanted = choose(list(columns))
    lengths = {name: len(columns[name]) for name in wanted}
    if len(set(lengths.values())) > 1:
        (name, n), (other, m) = list({n: (name, n) for name, n in lengths.items()}.values())[:2]
        raise TableError(
            f"{path}: columns must have one length; {name!r} has {n} rows and {other!r} has {m}"
        )
    for name in wanted:
        if columns[name].dtype.kind not in "biuf":
            raise TableError(
                f"{path}: column {name!r} is of dtype {columns[name].dtype}; expected numbers: "
                f"{_ENCODE}"
            )
    return Table(wanted, [np.asarray(columns[name]) for name in wanted])


# ---------------------------------------------------------------------------------------------
# Parquet


def _read_parquet(path: str, choose: Choose) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise TableError(
            f"{path}: Parquet needs pyarrow: pip install pyarrow (or convert the table to CSV or "
            "NPZ)"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        wanted = choose(list(file.schema_arrow.names))
        table = file.read(columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read as Parquet: {error}") from None
    arrays = []
    for name in wanted:
        column = table.column(name)
        kind = column.type
        known = pyarrow.types
        if not (known.is_integer(kind) or known.is_floating(kind) or known.is_boolean(kind)):
            raise TableError(
                f"{path}: column {name!r} is of type {kind}; expected numbers: {_ENCODE}"
            )
        values = column.to_numpy()
        if column.null_count and not known.is_floating(kind):
            present = column.drop_null().to_numpy()
            if len(present) and max(int(present.max()), -int(present.min())) > _EXACT_INTEGER:
                raise TableError(
                    f"{path}: column {name!r} holds integers beyond 2**53 beside missing values; "
                    "no float64 can tell them apart: leave out the missing rows, or subtract an "
                    "offset"
                )
        if values.dtype == object:  # booleans with missing values
            values = np.array([np.nan if v is None else float(v) for v in values])
        arrays.append(values)
    return Table(wanted, arrays)
