"""Tables from files, for the command line: CSV and Parquet by pyarrow, NPZ and NPY by NumPy.

A reader learns the names of the columns first and asks which of them are wanted. The other columns
are not converted and need not hold numbers.
"""

from collections import Counter
from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.cli.arrays import ArrayReader, ParquetReader
from lcodec_ext.cli.columns import (
    Choose,
    Names,
    Reader,
    Table,
    TableError,
    Unusable,
    UnusableColumnsError,
    headless,
    is_missing,
    label_of,
    listed,
)
from lcodec_ext.cli.sources import Source
from lcodec_ext.cli.text import TextReader

__all__ = [
    "Table",
    "TableError",
    "UnusableColumnsError",
    "is_missing",
    "label_of",
    "listed",
    "read_table",
]

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_READERS: dict[str, Callable[[Source], Reader]] = {
    ".npz": ArrayReader,
    ".npy": ArrayReader,
    ".parquet": ParquetReader,
}
_EMPTY = Unusable("", " is empty: all its values are missing", "fill it in")
#: What pandas reads, by the name of its function.
_OTHERS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "excel"),
    **{f".{kind}": kind for kind in ("json", "feather", "xml", "html", "orc")},
    ".pkl": "pickle",
    ".h5": "hdf",
    ".dta": "stata",
    ".sav": "spss",
    ".sas7bdat": "sas",
}
_EXPECTED = ".csv, .tsv, .tab, .npz, .npy or .parquet"


def read_table(
    path: str,
    choose: Choose,
    *,
    header: bool = True,
    delimiter: str | None = None,
    na_values: Collection[str] = (),
    decimal: str = ".",
    thousands: str | None = None,
    numeric_only: Collection[str] | None = None,
    response: str | None = None,
) -> Table:
    """Read the chosen columns of a file.

    Parameters
    ----------
    path : str
        The suffix says what it is, without that of a compression; where it says nothing, the
        first bytes do. "-", and a pipe without a suffix, is CSV.
    choose : callable
        From the names of all columns to those that are wanted; it may refuse.
    header : bool, default True
        Whether the first line of a CSV or TSV file has the names. Otherwise they are "0", "1", ...
    delimiter, na_values, decimal, thousands
        Of text, as in ``pandas.read_csv``. The delimiter is that of the suffix by default; " " is
        any number of blanks and tabs.
    numeric_only : collection of str, optional
        Leave out columns that cannot be used, but for these.
    response : str, optional
        A column that may hold text without numbers: labels, None where one is missing.

    Raises
    ------
    TableError
        If the file cannot be read, or a wanted cell is not a number. The message names file, row
        (the first row of data is row 1) and every such column.
    """
    source = Source(path)
    suffix = source.suffix if source.suffix in {*_DELIMITERS, *_READERS} else source.held
    if delimiter is None and (kind := _OTHERS.get(source.suffix)):
        raise TableError(
            f"{path} ends in {source.suffix!r}; expected {_EXPECTED}: convert it first, for "
            f"instance pandas.read_{kind}({path!r}).to_parquet('table.parquet')"
        )
    if not suffix and source.is_stream and not source.suffix:
        suffix = ".csv"
    text = suffix in _DELIMITERS or (delimiter is not None and not suffix)
    options = {
        "--delimiter": delimiter is not None,
        "--no-header": not header,
        "--na": bool(na_values),
        "--decimal": decimal != ".",
        "--thousands": thousands is not None,
    }
    given = [name for name, is_given in options.items() if is_given]
    if suffix in _READERS and given:
        raise TableError(
            f"{source.label}: {given[0]} is for CSV and TSV files; this one is {suffix[1:].upper()}"
        )
    if not text and suffix not in _READERS:
        ends = f"ends in {source.suffix!r}" if source.suffix else "has no suffix"
        raise TableError(
            f"{path} {ends}; expected {_EXPECTED} (or say --delimiter for a text file)"
        )
    reader: Reader
    if text:
        delimiter = delimiter or _DELIMITERS[suffix]
        reader = TextReader(source, header, delimiter, na_values, decimal, thousands)
    else:
        reader = _READERS[suffix](source)
    return _read(reader, source.label, choose, numeric_only, response)


def _read(
    reader: Reader,
    label: str,
    choose: Choose,
    numeric_only: Collection[str] | None,
    response: str | None,
) -> Table:
    names = [name.strip() or f"column {k}" for k, name in enumerate(reader.names)]
    places = {name: k for k, name in enumerate(names)}
    index = [name for name, given in zip(names, reader.names, strict=True) if given in reader.index]
    wanted = choose(Names(names, index))
    counts = Counter(names)
    for name in wanted:
        if counts[name] > 1:
            raise TableError(
                f"{label}: {counts[name]} columns are named {name!r}; expected different names"
                f"{headless(names)}"
            )
    found = dict(zip(wanted, reader.load([places[name] for name in wanted]), strict=True))
    y = response or ""
    if isinstance(found.get(y), Unusable) and (labels := reader.labels(places[y])):
        found[y] = np.array(labels, dtype=object)
    problems = {
        name: got if isinstance(got, Unusable) else _EMPTY
        for name, got in found.items()
        if isinstance(got, Unusable) or _is_empty(got)
    }
    needed = wanted if numeric_only is None else numeric_only
    if unusable := {name: problem for name, problem in problems.items() if name in needed}:
        raise UnusableColumnsError(label, unusable)
    used = {name: values for name, values in found.items() if name not in problems}
    return Table(list(used), [np.asarray(values) for values in used.values()], problems)


def _is_empty(values: NDArray) -> bool:
    return len(values) > 0 and bool(is_missing(values[:1])[0]) and bool(is_missing(values).all())
