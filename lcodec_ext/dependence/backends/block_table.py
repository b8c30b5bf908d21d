"""A table larger than memory: a block of its columns is in memory at a time."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import on_cuda
from lcodec_ext._checks import check_integer
from lcodec_ext.dependence.backends.base import Columns
from lcodec_ext.dependence.sources import PYARROW, Source, in_memory_source, open_source

MAX_MEMORY = 1 << 30  # bytes: blocks large enough to be read fast, and a share of any machine
_READING = 1 << 26  # bytes of what is read at a time, and its conversion; also of permutations
_READING_NUMBER = 64  # of these where the whole table is less, and nothing is permuted
_COLUMN_BYTES = 320  # of lists, names and statistics of each column
_ROW_BYTES = 128  # of what the engine keeps of each row
_NUMBER_BYTES = {4: 20, 8: 32}  # of a block, its sorted columns and those packed; measured 13, 21

Convert = Callable[[NDArray, int], NDArray]


class _Spread(NamedTuple):
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    deviations: NDArray[np.float64]


class _Memory:
    """The one place where blocks lie, for all tables made of the same source."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, dtype=np.uint8)

    def take(self, columns: int, n: int, dtype: np.dtype[Any]) -> NDArray:
        """An array of shape (columns, n), which overwrites the one before."""
        size = columns * n * dtype.itemsize
        if len(self._bytes) < size:
            self._bytes = np.empty(0, dtype=np.uint8)  # before the larger one is there
            self._bytes = np.empty(size, dtype=np.uint8)
        return self._bytes[:size].view(dtype).reshape(columns, n)


class BlockTable:
    """A table of shape (n, p) of which a block of columns is in memory at a time.

    It stands where an array stands, and where `Columns` stand once it is laid out.

    Parameters
    ----------
    source : Source
        Where its columns are read.
    lay_out : callable
        `Backend.lay_out` of an array.
    max_memory : int
        Bytes that all work on it may take.
    """

    def __init__(self, source: Source, lay_out: Callable[[Any], Columns], max_memory: int) -> None:
        self._source, self._lay_out, self._max_memory = source, lay_out, max_memory
        self._memory, self._stamp = _Memory(), source.stamp()
        self._convert: Convert | None = None
        self._counts = False
        self._rows: NDArray[np.bool_] | None = None  # those that are left
        self._before = np.zeros(1, dtype=np.int64)  # how many of them are before each row
        self._beside: NDArray | None = None
        self._spread: _Spread | None = None
        self._work = 0  # bytes
        self.names = source.names

    def _with(self, **changes: Any) -> "BlockTable":
        changed = copy.copy(self)
        changed.__dict__ |= changes
        return changed

    def converted(self, convert: Convert, counts: bool) -> "BlockTable":
        """The table of what `convert` makes of its numbers.

        Parameters
        ----------
        convert : callable
            From columns as they were read, and the index of the first, to those to compute with.
            It refuses numbers that cannot be used, when they are first read.
        counts : bool
            Whether they become others: integers in float64.
        """
        table = self._with(_convert=convert, _counts=counts, _spread=None)
        if table.dtype == np.float32 and any(each.kind != "f" for each in self._source.dtypes):
            table._known()  # before anyone asks for the precision
        return table

    def beside(self, columns: NDArray) -> "BlockTable":
        """The table with further columns behind all others, which its shape leaves out."""
        before = [] if self._beside is None else [self._beside]
        return self._with(_beside=np.concatenate([*before, columns], axis=1))

    def beside_work_of(self, size: int) -> "BlockTable":
        """The table with blocks that leave so many bytes for other work."""
        return self._with(_work=size)

    # As an array -----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Rows that are left, and columns."""
        return self._source.n if self._rows is None else int(self._before[-1]), self._source.p

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The working precision. Where integers are beside float32, one that misses widens it."""
        beside = set() if self._beside is None else {self._beside.dtype}
        single = np.result_type(*self._source.dtypes, *beside) == np.float32 and not self._counts
        return np.dtype(np.float32 if single else np.float64)

    def __getitem__(self, rows: NDArray[np.bool_]) -> "BlockTable":
        """The table of the rows of a mask, once."""
        before = np.concatenate([[0], np.cumsum(rows)])
        return self._with(_rows=rows, _before=before, _spread=None)

    # As columns ------------------------------------------------------------------------------

    @property
    def values(self) -> "BlockTable":
        """The table itself."""
        return self

    @property
    def low(self) -> NDArray:
        """Smallest value of every column."""
        return self._known().low.astype(self.dtype)

    @property
    def high(self) -> NDArray:
        """Largest value of every column."""
        return self._known().high.astype(self.dtype)

    def standard_deviations(self) -> NDArray[np.float64]:
        """Standard deviations (n - 1) in double, the same bits as of a table in memory."""
        return self._known().deviations

    def take(self, columns: list[int]) -> NDArray:
        """Some of the columns, an array of shape (n, k)."""
        values = np.empty((len(columns), len(self)), dtype=self.dtype)
        for place, column in enumerate(columns):
            self._read_into(values[place : place + 1], int(column))
        return values.T

    def put(self, column: int, values: NDArray) -> bool:
        """Put other values in the place of a column beside the table; engines see them."""
        assert self._beside is not None
        self._beside[:, column - self._source.p] = values
        return True

    def _known(self) -> _Spread:
        if self._spread is None:
            for _ in self.survey():
                pass
        assert self._spread is not None
        if self._beside is None:
            return self._spread
        beside = _spread_of(self._lay_out(self._beside))
        return _Spread(*map(np.concatenate, zip(self._spread, beside, strict=True)))

    def survey(self) -> Iterator[tuple[int, NDArray]]:
        """Every block and the index of its first column, once; low and high are then known."""
        found = []
        p = self.shape[1]
        for first in range(0, p, self.width):
            buffer = self._memory.take(min(self.width, p - first), len(self), self.dtype)
            self._read_into(buffer, first, is_new=True)
            yield first, buffer.T
            found.append(_spread_of(self._lay_out(buffer.T)))
        self._spread = _Spread(*map(np.concatenate, zip(*found, strict=True)))
        self.check_unchanged()

    # Blocks ----------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Columns of a block, as many as the memory allows."""
        n, p = self.shape
        held = self._source.held
        reading = min(_READING, self._source.n * p * _READING_NUMBER)
        reading = _READING if self._work else reading
        fixed = reading + self._work + held + p * _COLUMN_BYTES + n * _ROW_BYTES
        each = n * _NUMBER_BYTES[self.dtype.itemsize]
        if self._max_memory < fixed + each:
            advice = ""
            if 2 * (held - PYARROW) > fixed:
                advice = (
                    f". What Parquet says of each column takes {held - PYARROW:,} of them: write "
                    "several files of fewer columns, and pass ColumnBlocks of their paths"
                )
            raise ValueError(
                f"max_memory must be at least {fixed + each:,} bytes for {n:,} rows and {p:,} "
                f"columns; got {self._max_memory:,}{advice}"
            )
        return min(p, (self._max_memory - fixed) // max(each, 1))

    def block(self, columns: NDArray[np.int64], behind: Sequence[NDArray]) -> NDArray:
        """Some columns and further ones behind them, valid until the next block is asked for.

        They lie one after the other in the array, which has shape (n, m).

        Parameters
        ----------
        columns : array of int64
            In ascending order.
        behind : sequence of array of shape (n,)
        """
        m = len(columns)
        buffer = self._memory.take(m + len(behind), len(self), self.dtype)
        begins = np.flatnonzero(np.diff(columns, prepend=-2) != 1)
        for begin, end in zip(begins, [*begins[1:], m], strict=True):
            self._read_into(buffer[begin:end], int(columns[begin]))
        for place, values in enumerate(behind, m):
            buffer[place] = values
        return buffer.T

    def in_memory(self) -> NDArray:
        """All columns, and then the further ones of `beside`."""
        beside = [] if self._beside is None else list(self._beside.T)
        values = self.block(np.arange(self.shape[1]), beside)
        self._memory = _Memory()  # nothing overwrites it
        self.check_unchanged()
        return values

    def check_unchanged(self) -> None:
        """Refuse files that were written since they were opened."""
        stamp = self._source.stamp()
        if stamp != self._stamp:
            names = [path for path, *_ in dict.fromkeys((*self._stamp, *stamp))]
            changed = next(name for name in names if _of(name, stamp) != _of(name, self._stamp))
            raise RuntimeError(
                f"{changed} was written while it was in use, so the steps do not belong together; "
                "begin again once it is complete"
            )

    def _read_into(self, out: NDArray, first: int, is_new: bool = False) -> None:
        """Read as many columns as `out`, of shape (m, n), has rows, from the first on."""
        p = self._source.p
        if first >= p and self._beside is not None:
            out[:] = self._beside.T[first - p : first - p + len(out)]
            return
        whole = self._counts or any(dtype.itemsize > 8 for dtype in self._source.dtypes)
        for rows, begin, values in self._source.pieces(first, first + len(out), whole):
            if self._convert is not None and (is_new or self._counts):
                values = self._convert(values, begin)
            start = rows.start
            if self._rows is not None:
                values, start = values[self._rows[rows]], self._before[rows.start]
            columns = slice(begin - first, begin - first + values.shape[1])
            out[columns, start : start + len(values)] = values.T


def block_table(
    X: Any, name: str, max_memory: float | None, lay_out: Callable[[Any], Columns]
) -> BlockTable | None:
    """X as a table that is read in blocks; None if it lies in memory, and no limit is given.

    Parameters
    ----------
    X : Any
        What `open_source` opens; with `max_memory` an array or a data frame, too.
    name : str
        What error messages call it.
    max_memory : int, optional
        Bytes, 4e9 as well; `MAX_MEMORY` by default.
    lay_out : callable
        `Backend.lay_out` of an array.
    """
    source = open_source(X, name)
    limit = MAX_MEMORY
    if max_memory is not None:
        whole = isinstance(max_memory, float) and max_memory.is_integer()  # 4e9
        limit = check_integer(int(max_memory) if whole else max_memory, "max_memory", 1)
        shape = getattr(X, "shape", ())
        if source is None and len(shape) == 2 and 0 not in shape and not on_cuda(X):
            source = in_memory_source(X, name)
        if source is None:
            raise ValueError(
                f"max_memory={limit:,} limits the work on a table that is read in blocks; got "
                f"{name} of type {type(X).__name__}, which is in memory as a whole: pass an array, "
                "a data frame, the path of a Parquet file or ColumnBlocks"
            )
    return None if source is None else BlockTable(source, lay_out, limit)


def _spread_of(columns: Columns) -> _Spread:
    low, high = (np.asarray(each, dtype=np.float64) for each in (columns.low, columns.high))
    return _Spread(low, high, columns.standard_deviations())


def _of(path: str, stamp: Any) -> Any:
    return [entry for entry in stamp if entry[0] == path]
