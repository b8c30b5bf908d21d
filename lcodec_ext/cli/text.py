"""Tables from delimited text, by pyarrow."""

import csv
import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import closing
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import counted
from lcodec_ext.cli.columns import (
    DATES,
    ENCODE,
    EXACT_INTEGER,
    TableError,
    Unusable,
    option,
    rounded,
    shown,
)
from lcodec_ext.cli.sources import Source, need_pyarrow

_MISSING = {"", "na", "n/a", "<na>", "#n/a", "nan", "-nan", "null", "none"}
_TRUTH = {"true": "1", "false": "0"}
_MARKERS = {"missing", "unknown", "nil", "none", "n.a.", "na."}  # that --na can name
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_SHAPE = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_BLOCKS = (1 << 20, 1 << 25, 1 << 30, (1 << 31) - 1)  # pyarrow wants a whole row in a block
_BYTES = "latin-1"  # every byte is a letter, where only quotes and lines count
_TEXT_AT_ONCE = 1 << 28


class TextReader:
    """A file of delimited text. The options are those of `read_table`."""

    index: tuple[str, ...] = ()

    def __init__(
        self,
        source: Source,
        header: bool,
        delimiter: str,
        na_values: Collection[str],
        decimal: str,
        thousands: str | None,
    ) -> None:
        self._arrow = need_pyarrow(source.label)
        source.decode()
        if delimiter == " ":
            source.squeeze()
        # Text is read up to three times: for the names, the numbers, and a mistake among them.
        self._source, self._label, self._header = source, source.label, header
        self._delimiter, self._checked = delimiter, False
        self._quoted = delimiter != "\t"  # TSV has no quoting
        self._na = {marker.strip() for marker in na_values}
        self._decimal, self._thousands = decimal, thousands
        self._grouped = None
        if thousands:
            mark, point = re.escape(thousands), re.escape(decimal)
            groups = rf"[+-]?\d{{1,3}}(?:{mark}\d{{3}})+(?:{point}\d*)?"
            self._grouped = re.compile(groups)
        self._given = self._read_names()
        self.names = [str(k) for k in range(len(self._given))]
        if header:
            self.names = [_unquoted(name) for name in self._given]
            self._check_delimiter()

    def load(self, places: list[int]) -> list[NDArray | Unusable]:
        """Some columns as float64."""
        columns = [self._given[place] for place in places]
        found: dict[str, NDArray | Unusable] = {}
        try:
            table = self._table(columns, self._arrow.float64())
        except self._arrow.ArrowInvalid:  # words among the numbers, or a mistake
            suspects = columns
        else:
            self._check_quotes(table.num_rows)
            read = {column: table.column(column).to_numpy() for column in columns}
            suspects = [column for column, values in read.items() if _beyond(values)]
            found = {**read}
        # in groups, to keep little text in memory
        size = max(1, len(self._given) * _TEXT_AT_ONCE // max(1, self._source.size()))
        for start in range(0, len(suspects), size):
            found |= self._from_text(suspects[start : start + size])
        markers = [float(marker) for marker in self._na if _NUMBER.fullmatch(marker)]
        for column, values in found.items():
            if markers and isinstance(values, np.ndarray):
                found[column] = np.where(np.isin(values, markers), math.nan, values)
        return [found[column] for column in columns]

    def labels(self, place: int) -> list[str | None]:
        """A column as text, None where it is missing; nothing where some cell is a number."""
        words = [
            None if cell is None else _unquoted(cell.strip())
            for cell in self._text([self._given[place]]).column(0).to_pylist()
        ]
        labels = [None if word is None or not self._plain(word) else word for word in words]
        return [] if any(label and self._is_number(label) for label in labels) else labels

    def _is_number(self, cell: str) -> bool:
        try:
            float(self._plain(cell))
        except ValueError:
            return False
        return True

    def _read_names(self) -> list[str]:
        """The columns' names as pyarrow has them."""
        with closing(self._rows("utf-8-sig")) as rows:
            row, lines, last = next((each for each in rows if each[0]), ([], [], 0))
        try:
            "".join(row).encode()
        except UnicodeEncodeError:
            raise self._refusal("the names of its columns are in another encoding") from None
        if not row:
            raise TableError(f"{self._label} is empty; expected a table")
        if len(lines) > 1:
            self._check_closed(lines, last, len(row))
        return row if self._header else [f"f{k}" for k in range(len(row))]

    def _check_delimiter(self) -> None:
        for other, said in (("\t", "tab"), (";", "';'"), ("|", "'|'")):
            if len(self.names) == 1 and other in self._given[0]:
                raise TableError(
                    f"{self._label} has one column, {self.names[0][:60]!r}; if {said} separates "
                    f"its columns, pass --delimiter {said}"
                )

    def _fitting(
        self, read: Callable[..., Any], *, use_threads: bool = True, **conversion: Any
    ) -> Any:
        """What a reader of pyarrow returns, with blocks that hold the longest row."""
        csv = self._arrow.csv
        words = [w for word in sorted(_MISSING) for w in {word, word.upper(), word.capitalize()}]
        parse = csv.ParseOptions(
            delimiter=self._delimiter,
            quote_char='"' if self._quoted else False,
            newlines_in_values=self._quoted,
        )
        convert = csv.ConvertOptions(
            null_values=[*words, "NaN", "N/A", *self._na], decimal_point=self._decimal, **conversion
        )
        for size in _BLOCKS:
            options = csv.ReadOptions(
                autogenerate_column_names=not self._header, use_threads=use_threads, block_size=size
            )
            try:
                return read(self._source.for_pyarrow(self._arrow), options, parse, convert)
            except self._arrow.ArrowInvalid as error:
                small = "straddl" in str(error) or "or block" in str(error)  # the header, too
                if not small or size == _BLOCKS[-1]:
                    raise
        raise AssertionError("the last size returns or raises")

    def _table(self, columns: list[str], kind: Any, **options: Any) -> Any:
        types = dict.fromkeys(columns, kind)
        return self._fitting(
            self._arrow.csv.read_csv, include_columns=columns, column_types=types, **options
        )

    def _from_text(self, columns: list[str]) -> dict[str, NDArray | Unusable]:
        """Columns cell by cell, after pyarrow has refused them or rounded one."""
        table = self._text(columns)
        return {column: self._numbers(table.column(column)) for column in columns}

    def _text(self, columns: list[str]) -> Any:
        """Columns as they are written."""
        string = self._arrow.string()
        try:  # one thread knows the row of a mistake
            table = self._table(columns, string, use_threads=False, strings_can_be_null=True)
        except (self._arrow.ArrowInvalid, UnicodeDecodeError) as error:
            self._check_quotes(None)
            raise self._refusal(error) from None
        self._check_quotes(table.num_rows)
        return table

    def _refusal(self, error: Exception | str) -> TableError:
        text = str(error)
        if isinstance(error, UnicodeDecodeError | str) or "UTF8" in text:
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
            f"{self._label}, row {row - self._header}: {counted(got, 'cell')}; expected "
            f"{expected}, as in the first line{advice}"
        )

    # Quotes

    def _check_quotes(self, n_rows: int | None) -> None:
        """Warn of quoted cells that span lines; refuse quotes that do not match.

        Without a line more than rows there is no such cell, and nothing else is looked at.
        """
        if self._checked or not self._quoted or not self._has_quotes():
            return
        self._checked = True
        with io.TextIOWrapper(self._source.open(), encoding=_BYTES, newline="") as text:
            n_lines = sum(1 for line in text if line.strip("\r\n"))
        if n_rows is not None and n_lines == n_rows + self._header:
            return
        spans = []
        with closing(self._rows(_BYTES)) as rows:
            for _, lines, last in rows:
                if len(lines) > 1:
                    self._check_closed(lines, last, len(self._given))
                    spans.append((last - len(lines) + 1, last))
        if not spans:
            return
        (first, last), *more = spans
        others = f", and {counted(len(more), 'more cell')} like it" if more else ""
        warnings.warn(
            f"{self._label}, line {first}: a quoted cell goes on to line {last}{others}; its lines "
            "are read as one row. If they are several, a quote is missing",
            stacklevel=2,
        )

    def _has_quotes(self) -> bool:
        with self._source.open() as file:
            while piece := file.read(1 << 24):
                if b'"' in piece:
                    return True
        return False

    def _rows(self, encoding: str) -> Generator[tuple[list[str], list[str], int]]:
        """Cells of every row, its lines, and the number of the last of them."""
        limit = csv.field_size_limit(sys.maxsize)
        kept: list[str] = []

        def keeping(lines: Iterable[str]) -> Iterator[str]:
            for line in lines:
                kept.append(line)
                yield line

        try:
            # what is not UTF-8 in columns that are not used does no harm
            with io.TextIOWrapper(
                self._source.open(), encoding, errors="surrogateescape", newline=""
            ) as text:
                reader = csv.reader(
                    keeping(text),
                    delimiter=self._delimiter,
                    quoting=csv.QUOTE_MINIMAL if self._quoted else csv.QUOTE_NONE,
                )
                for row in reader:
                    yield row, list(kept), reader.line_num
                    kept.clear()
        finally:
            csv.field_size_limit(limit)

    def _check_closed(self, lines: list[str], last: int, n_columns: int) -> None:
        """Refuse a cell that spans lines where its quotes are not those of a cell."""
        first = last - len(lines) + 1
        try:
            list(csv.reader(lines, delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            found = "no quote closes it"
            if "expected after" in str(error):
                found = f"the quote that ends it, on line {last}, is not the end of a cell"
        else:
            marks = {line.count(self._delimiter) for line in lines[1:-1]}
            few = n_columns == 2 and len(lines) < 7  # a comma in each of few lines is prose, too
            if marks != {n_columns - 1} or n_columns < 2 or few:
                return
            found = "the lines between have as many cells as a row"
        raise TableError(
            f"{self._label}, line {first}: a quoted cell goes on to line {last}, and {found}; "
            "correct the quotes, or double those that belong to the text"
        )

    # Numbers

    def _numbers(self, column: Any) -> NDArray | Unusable:
        """A column of text as numbers, or the first cell that is not one."""
        try:
            values: NDArray = column.cast(self._arrow.float64()).to_numpy()
            if self._decimal == "." and not _beyond(values):
                return values
        except self._arrow.ArrowInvalid:
            pass
        numbers = np.empty(len(column))
        for row, cell in enumerate(column.to_pylist()):
            word = "" if cell is None else self._plain(cell)
            try:
                numbers[row] = float(word) if word else math.nan
            except ValueError:
                what = f": {shown(cell)} is not a number"
                return Unusable(f"row {row + 1}", what, self._advice(cell, row))
            if abs(numbers[row]) >= EXACT_INTEGER and _loses_digits(word):
                return Unusable(f"row {row + 1}", *rounded(cell.strip()))
        return numbers

    def _plain(self, cell: str) -> str:
        """A number as Python writes it, "" where it is missing, or something that is neither."""
        text = _unquoted(cell.strip()).strip()
        word = text.lower()
        if word in _MISSING or text in self._na:
            return ""
        if word in _TRUTH:
            return _TRUTH[word]
        word = word.replace("_", "?")  # Python reads 1_000 as a number
        if self._grouped and self._grouped.fullmatch(text):
            word = word.replace(self._thousands or "", "")
        if self._decimal != ".":
            word = word.replace(".", "?").replace(self._decimal, ".")
        return word

    def _advice(self, cell: str, row: int) -> str:
        text = cell.strip()
        if row == 0 and not self._header:
            return "a header? then leave out --no-header"
        if self._decimal == "." and re.fullmatch(r"[+-]?\d*,\d+", text):
            return "decimals need a point, or --decimal ,"
        if found := re.fullmatch(r"[+-]?\d{1,3}(?:([,.' ])\d{3})(?:\1\d{3})*([,.]\d+)?", text):
            mark, rest = found.groups()
            decimal = f" {option('decimal', rest[0])}" if rest and rest[0] != self._decimal else ""
            return f"if it has thousands, pass {option('thousands', mark)}{decimal}"
        if not any(map(str.isalnum, text)) or text.lower() in _MARKERS:
            return f"if it marks a missing value, pass {option('na', text)}"
        if re.fullmatch(r"(\d{1,4}([-/.])\d{1,2}\2\d{1,4}.*|\d{1,2}:\d{2}(:\d{2}.*)?)", text):
            return DATES
        if re.search(r"\d", text) and not re.search(r"[^\W\d_]", text):
            return "take the signs beside the number out first"
        return ENCODE


def _unquoted(text: str) -> str:
    """Text without the quotes around all of it, which stay in TSV and after a blank."""
    bare = text.strip()
    return bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] == '"' else text


def _loses_digits(word: str) -> bool:
    """Whether float64 has other digits than a number that is written with many, in any notation."""
    n_digits = sum(map(str.isdigit, word.lower().partition("e")[0].lstrip("+-0.")))
    return n_digits > 15 and Decimal(f"{float(word):.{n_digits - 1}e}") != Decimal(word)


def _beyond(values: NDArray) -> bool:
    """Whether a column has numbers that may be integers which float64 has rounded."""
    return bool(np.nanmax(np.abs(values), initial=0) >= EXACT_INTEGER)
