"""Tables from files, for the command line: CSV and Parquet by pyarrow, NPZ and NPY by NumPy.

A reader learns the names of the columns first and asks which of them are wanted. The other columns
are not converted and need not hold numbers.
"""

import math
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Choose = Callable[[list[str]], list[str]]

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_SUFFIXES = ".csv, .tsv, .tab, .npz, .npy or .parquet"
_MISSING = {"", "na", "n/a", "<na>", "#n/a", "nan", "-nan", "null", "none"}
_TRUTH = {"true": 1.0, "false": 0.0}
_EXACT_INTEGER = 2**53
_SHAPE = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+")
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
    """

    def __init__(self, columns: list[str], arrays: Sequence[NDArray]) -> None:
        self.columns = columns
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

    def n_complete(self) -> int:
        """How many rows have no NaN."""
        missing = [np.isnan(a) for a in self._arrays.values() if a.dtype.kind == "f"]
        return len(self) - int(np.count_nonzero(np.any(missing, axis=0))) if missing else len(self)

    def first(self, test: Callable[[NDArray], NDArray]) -> str | None:
        """Row (from 1) and column of the first number for which test is true."""
        for name, values in self._arrays.items():
            if values.dtype.kind == "f" and (found := test(values)).any():
                return f"row {int(found.argmax()) + 1}, column {name!r}"
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
        If the file cannot be read, or a wanted cell is not a number. The message names file, row
        (the first row of data is row 1) and column.
    """
    suffix = ".csv" if path == "-" else Path(path).suffix.lower()
    text = suffix in _DELIMITERS or (delimiter is not None and suffix in ("", ".txt", ".dat"))
    if not text and (delimiter is not None or not header):
        option = "--delimiter" if delimiter is not None else "--no-header"
        raise TableError(f"{path}: {option} is for CSV and TSV files; this one ends in {suffix!r}")
    if path != "-" and not Path(path).is_file():
        what = "is a directory" if Path(path).is_dir() else "does not exist"
        raise TableError(f"{path} {what}; expected a table: {_SUFFIXES}, or - for standard input")
    if text:
        return _Text(path, header, delimiter or _DELIMITERS[suffix]).read(choose)
    readers = {".npz": _read_npz, ".npy": _read_npy, ".parquet": _read_parquet}
    if suffix not in readers:
        raise TableError(
            f"{path} ends in {suffix!r}; expected {_SUFFIXES} (or say --delimiter for a text file)"
        )
    return readers[suffix](path, choose)


# ---------------------------------------------------------------------------------------------
# Text and Parquet


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise TableError(
            f"{label_of(path)}: CSV and Parquet need pyarrow: pip install 'lcodec_ext[tables]' (or "
            "convert the table to NPZ)"
        ) from None
    return pyarrow


class _Text:
    """A file of delimited text, or standard input."""

    def __init__(self, path: str, header: bool, delimiter: str) -> None:
        self._arrow = _pyarrow(path)
        self._label, self._header, self._delimiter = label_of(path), header, delimiter
        # Text is read up to three times: for the names, the numbers, and a mistake among them.
        self._source = path if path != "-" else sys.stdin.buffer.read()

    def read(self, choose: Choose) -> Table:
        given, names = self._names()
        wanted = choose(names)
        places = dict(zip(names, given, strict=True))
        columns = [places[name] for name in wanted]
        try:
            table = self._table(columns, self._arrow.float64())
        except self._arrow.ArrowInvalid:  # words among the numbers, or a mistake
            table = None
        else:
            arrays = [table.column(column).to_numpy() for column in columns]
            suspects = [k for k, values in enumerate(arrays) if _beyond(values)]
        if table is None:
            suspects = list(range(len(columns)))
            arrays = [np.empty(0)] * len(columns)
        for k in suspects:  # column by column, to keep little text in memory
            text = self._text(columns[k])
            arrays[k] = self._numbers(text, f"column {wanted[k]!r}")
        return Table(wanted, arrays)

    def _names(self) -> tuple[list[str], list[str]]:
        """The columns' names as pyarrow has them, and as the user has them."""
        csv = self._arrow.csv
        try:
            with csv.open_csv(self._open(), *self._options(use_threads=False)) as reader:
                given = reader.schema.names
        except self._arrow.ArrowInvalid as error:
            if "empty" in str(error).lower():
                raise TableError(f"{self._label} is empty; expected a table") from None
            raise self._refusal(error) from None
        except UnicodeDecodeError as error:
            raise self._refusal(error) from None
        if not self._header:
            return given, [str(k) for k in range(len(given))]
        names = [name.strip() or f"column {k}" for k, name in enumerate(given)]
        for name in names:
            if names.count(name) > 1:
                raise TableError(
                    f"{self._label}: {names.count(name)} columns are named {name!r}; expected "
                    "different names"
                )
        for other, said in (("\t", "tab"), (";", "';'"), ("|", "'|'")):
            if len(names) == 1 and other in given[0]:
                raise TableError(
                    f"{self._label} has one column, {names[0][:60]!r}; if {said} separates its "
                    f"columns, pass --delimiter {said}"
                )
        return given, names

    def _open(self) -> Any:
        if isinstance(self._source, bytes):
            return self._arrow.BufferReader(self._source)
        return self._source

    def _options(self, *, use_threads: bool = True, **conversion: Any) -> tuple[Any, Any, Any]:
        csv = self._arrow.csv
        words = [w for word in sorted(_MISSING) for w in {word, word.upper(), word.capitalize()}]
        return (
            csv.ReadOptions(autogenerate_column_names=not self._header, use_threads=use_threads),
            csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            csv.ConvertOptions(null_values=[*words, "NaN", "N/A"], **conversion),
        )

    def _table(self, columns: list[str], kind: Any, **options: Any) -> Any:
        types = dict.fromkeys(columns, kind)
        return self._arrow.csv.read_csv(
            self._open(), *self._options(include_columns=columns, column_types=types, **options)
        )

    def _text(self, column: str) -> list[str | None]:
        """The cells of a column as they are written; None where one is missing."""
        string = self._arrow.string()
        try:  # one thread knows the row of a mistake
            table = self._table([column], string, use_threads=False, strings_can_be_null=True)
        except (self._arrow.ArrowInvalid, UnicodeDecodeError) as error:
            raise self._refusal(error) from None
        return table.column(column).to_pylist()

    def _refusal(self, error: Exception) -> TableError:
        text = str(error)
        if isinstance(error, UnicodeDecodeError) or "UTF8" in text:
            return TableError(
                f"{self._label} is not UTF-8: {text}; convert it first, for instance with iconv -f "
                "latin1 -t utf-8"
            )
        shape = _SHAPE.search(text)
        if shape is None:
            return TableError(f"{self._label} cannot be read as a table: {text}")
        row, expected, got = map(int, shape.groups())
        advice = ""
        if got == expected + 1 and self._header:
            advice = " (row names without a header, as R writes them? give them one)"
        return TableError(
            f"{self._label}, row {row - self._header}: {got} cells; expected {expected}, as in the "
            f"first line{advice}"
        )

    def _numbers(self, cells: list[str | None], name: str) -> NDArray[np.float64]:
        """A column of text as numbers, or a refusal that says where."""
        numbers = np.empty(len(cells))
        for row, cell in enumerate(cells):
            where = f"{self._label}, row {row + 1}, {name}"
            try:
                numbers[row] = math.nan if cell is None else _number(cell)
            except ValueError:
                raise TableError(
                    f"{where}: {_shown(cell)} is not a number; {self._advice(cell or '', row)}"
                ) from None
            digits = (cell or "").strip().lstrip("+-")
            if len(digits) > 15 and digits.isdecimal() and int(digits) != float(digits):
                raise TableError(_rounded(where, cell))
        return numbers

    def _advice(self, cell: str, row: int) -> str:
        if "\n" in cell:
            return "perhaps a quote is not closed"
        if _DECIMAL_COMMA.fullmatch(cell.strip()):
            return "decimals need a point"
        if row == 0 and not self._header:
            return "a header? then leave out --no-header"
        return _ENCODE


def _shown(cell: str | None) -> str:
    text = repr(cell)
    return text if len(text) <= 40 else text[:36] + "...'"


def _beyond(values: NDArray) -> bool:
    """Whether a column has numbers that may be integers which float64 has rounded."""
    return bool(np.nanmax(np.abs(values), initial=0) >= _EXACT_INTEGER)


def _number(cell: str) -> float:
    """A cell's number: NaN where it is missing, 1 and 0 for true and false."""
    word = cell.strip().lower()
    if word in _MISSING:
        return math.nan
    if word in _TRUTH:
        return _TRUTH[word]
    if "_" in word:  # Python reads 1_000 as a number
        raise ValueError(cell)
    return float(word)


def _rounded(where: str, cell: object) -> str:
    return (
        f"{where}: {cell} is beyond 2**53, where float64 cannot tell integers apart; leave the "
        "column out, or subtract an offset first"
    )


def _as_array(pyarrow: Any, column: Any, path: str, name: str) -> NDArray:
    """A column of a Parquet file as an array, with NaN where a value is missing."""
    types, kind = pyarrow.types, column.type
    if types.is_null(kind):
        return np.full(len(column), math.nan)
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise TableError(f"{path}: column {name!r} is of type {kind}; expected numbers: {_ENCODE}")
    if types.is_boolean(kind):
        column = column.cast(pyarrow.uint8())
    if types.is_integer(kind):
        present = column.drop_null().to_numpy()
        for k in np.flatnonzero((present > _EXACT_INTEGER) | (present < -_EXACT_INTEGER)):
            if int(present[k]) != int(float(present[k])):
                row = column.to_pylist().index(int(present[k])) + 1
                raise TableError(_rounded(f"{path}, row {row}, column {name!r}", present[k]))
    if column.null_count and not types.is_floating(kind):
        column = column.cast(pyarrow.float64(), safe=False)
    values: NDArray = column.to_numpy()
    return values


def _read_parquet(path: str, choose: Choose) -> Table:
    pyarrow = _pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        wanted = choose(list(file.schema_arrow.names))
        table = file.read(columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read as Parquet: {error}") from None
    arrays = [_as_array(pyarrow, table.column(name), path, name) for name in wanted]
    return Table(wanted, arrays)


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
    first = wanted[0]
    for name in wanted:
        if len(columns[name]) != len(columns[first]):
            raise TableError(
                f"{path}: columns must have one length; {first!r} has {len(columns[first])} rows "
                f"and {name!r} has {len(columns[name])}"
            )
        if columns[name].dtype.kind not in "biuf":
            raise TableError(
                f"{path}: column {name!r} is of dtype {columns[name].dtype}; expected numbers: "
                f"{_ENCODE}"
            )
    return Table(wanted, [np.asarray(columns[name]) for name in wanted])
