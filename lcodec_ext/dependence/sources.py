"""Tables that are read by columns, again in every step: memory-mapped arrays, Parquet, blocks."""

import mmap
import os
import re
import sys
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import arrow_dtypes, as_array, names_file
from lcodec_ext._checks import counted, first_few
from lcodec_ext._threads import get_num_threads

_PIECE = 1 << 20  # numbers that are read at a time
_MAPPED = 1 << 24  # bytes of a file that are mapped at a time
_AROUND = 1 << 17  # bytes that the system maps around one that is read
PYARROW = 1 << 26  # bytes that it takes at most, decodes in and keeps for later
_PYARROW_LEAST, _PYARROW_NUMBER = 1 << 24, 48  # of these for anything, and for a number
_FOOTER = (2500, 1000)  # bytes that it keeps of a column, and of its part in each row group

Stamp = tuple[tuple[str, int, int], ...]  # path, size and time of every file


class ColumnBlocks:
    """A table in blocks of columns that need not all be in memory, for `foci`.

    Parameters
    ----------
    blocks : sequence
        Tables of shape (n, m), from left to right: arrays, data frames, or what `foci` reads by
        columns itself, such as paths of Parquet files. It is indexed, so an object whose
        ``__getitem__`` reads a block when it is asked for works as a list does. Every block is
        opened when `foci` begins, read once to check its values, and once in each step. It must
        hold the same each time. A block that is not read by columns itself is in memory as a whole.

    Raises
    ------
    TypeError
        If blocks is not a sequence: a generator cannot be read again in the next step.
    ValueError
        If it is empty.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import ColumnBlocks, foci
    >>> rng = np.random.default_rng(0)
    >>> blocks = [rng.normal(size=(500, 3)), rng.normal(size=(500, 5))]
    >>> foci(ColumnBlocks(blocks), blocks[0][:, 1] * blocks[1][:, 2]).ordering.tolist()
    [5, 1]
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        indexed = hasattr(blocks, "__getitem__") and hasattr(blocks, "__len__")
        if not indexed or isinstance(blocks, str | bytes | Mapping) or hasattr(blocks, "shape"):
            raise TypeError(
                "blocks must be a list, or an object with __len__ and __getitem__, of tables that "
                f"can be read again in every step; got {type(blocks).__name__}: instead of a "
                "generator pass list(blocks), or an object that reads block k when asked for [k]"
            )
        if len(blocks) == 0:
            raise ValueError("blocks must hold at least one table; got none")
        self.blocks = blocks

    def __repr__(self) -> str:
        kind = type(self.blocks).__name__
        return f"ColumnBlocks({counted(len(self.blocks), 'block')} in a {kind})"

    def __array__(self, *_: Any, **__: Any) -> NDArray:
        raise TypeError("foci alone reads ColumnBlocks; pass what they hold as one array")


class Piece(NamedTuple):
    """A part of a table that was read: some rows, and columns from the first on."""

    rows: slice
    first: int
    values: NDArray


class Source(ABC):
    """A table of numbers that is read by columns.

    Attributes
    ----------
    n, p : int
        Rows and columns.
    names : list of str or None
    dtypes : set of dtype
        Those of the columns as `as_array` has them. Reading adds float64 where an integer misses.
    held : int
        Bytes that it keeps in memory all the time.
    """

    n: int
    p: int
    names: list[str] | None
    dtypes: set[np.dtype[Any]]
    held: int = 0

    @abstractmethod
    def pieces(self, first: int, last: int, whole: bool) -> Iterator[Piece]:
        """The columns from `first` to `last` - 1, piece by piece; with all rows each if `whole`.

        A piece is valid until the next one is asked for.
        """

    @abstractmethod
    def stamp(self) -> Stamp:
        """What shows that a file has changed; nothing where there is no file."""


def open_source(X: Any, name: str) -> Source | None:
    """X as a table that is read by columns; None if it is none.

    Taken are memory-mapped arrays, paths of Parquet files and of folders of them, pyarrow's
    ParquetFile and Dataset, and `ColumnBlocks`.
    """
    if isinstance(X, ColumnBlocks):
        return _Blocks(X.blocks, name)
    if isinstance(X, np.memmap):
        return ArraySource(X, name) if X.ndim == 2 and X.size else None
    if isinstance(X, list | tuple) and X and all(map(_is_path, X)):
        raise ValueError(
            f"{name} is a {type(X).__name__} of paths: pass ColumnBlocks({name}) where each file "
            "has some of the columns; where each has some of the rows, pass "
            f"the path of their folder, or pyarrow.dataset.dataset({name})"
        )
    if isinstance(X, str | os.PathLike):
        path = Path(os.path.expanduser(X))
        if not _is_path(X) and not os.path.exists(path):
            return None  # text
        return _ParquetFiles(_open_parquet(path, str(X), name), name, [path])
    parquet, dataset = map(sys.modules.get, ("pyarrow.parquet", "pyarrow.dataset"))
    is_file = parquet is not None and isinstance(X, parquet.ParquetFile)
    if is_file or (dataset is not None and isinstance(X, dataset.Dataset)):
        return _ParquetFiles(X, name, [Path(file) for file in getattr(X, "files", ())])
    return None


class ArraySource(Source):
    """An array, whose file is unmapped again behind what is read if it is memory-mapped."""

    def __init__(self, array: NDArray, name: str) -> None:
        self._array, self._name = np.asarray(array), name
        self.n, self.p = array.shape
        self.names = None
        self.dtypes = {as_array(self._array[:0], name)[0].dtype}
        self._file = getattr(array, "filename", None)
        base: Any = array
        mode = None
        while isinstance(base, np.ndarray):
            mode = getattr(base, "mode", mode)
            base = base.base
        # a private copy ("c") is lost when it is unmapped
        mapped = isinstance(base, mmap.mmap) and mode != "c"
        self._mapping = base if mapped and hasattr(mmap, "MADV_DONTNEED") else None

    def pieces(self, first: int, last: int, whole: bool) -> Iterator[Piece]:
        """See `Source`."""
        by_column = self._array.strides[0] <= self._array.strides[1]
        step = max(1, min(last - first, _PIECE // self.n)) if by_column or whole else last - first
        for begin in range(first, last, step):
            some = self._array[:, begin : min(begin + step, last)]
            if by_column:
                yield self._piece(slice(0, self.n), begin, some)
                continue
            row_bytes = some.shape[1] * some.itemsize + _AROUND
            rows = max(1, min(_PIECE // some.shape[1], _MAPPED // row_bytes))
            parts = [slice(k, min(k + rows, self.n)) for k in range(0, self.n, rows)]
            if whole:
                gathered = np.empty_like(some)
                for part in parts:
                    gathered[part] = self._unmapped(some[part])
                yield self._piece(slice(0, self.n), begin, gathered)
            else:
                yield from (self._piece(part, begin, some[part]) for part in parts)

    def _piece(self, rows: slice, first: int, values: NDArray) -> Piece:
        return Piece(rows, first, as_array(self._unmapped(values), self._name)[0])

    def _unmapped(self, values: NDArray) -> NDArray:
        """values, once what was read before is unmapped."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return values

    def stamp(self) -> Stamp:
        """Of its files."""
        return _stamp([] if self._file is None else [Path(self._file)])


def in_memory_source(X: Any, name: str) -> ArraySource:
    """An array, or a data frame, which is made one where its columns are of several types."""
    array, names = as_array(X, name, tensors=False)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape (n, m); got shape {tuple(array.shape)}")
    source = ArraySource(array, name)
    source.names = names
    return source


class _ParquetFiles(Source):
    """A Parquet file, or a data set of pyarrow."""

    def __init__(self, opened: Any, name: str, paths: Sequence[Path]) -> None:
        self._opened, self._name, self._paths = opened, name, paths
        self._is_file = hasattr(opened, "schema_arrow")
        schema = opened.schema_arrow if self._is_file else opened.schema
        self.names = list(schema.names)
        twice = [column for column, count in Counter(self.names).items() if count > 1]
        if twice:
            raise ValueError(
                f"{name} has several columns named {first_few([*map(repr, twice)], 5)}; Parquet is "
                "read by names: give them different ones"
            )
        self.dtypes = arrow_dtypes(schema, name)
        self.p = len(self.names)
        if self._is_file:
            self.n, files, groups = opened.metadata.num_rows, 1, opened.metadata.num_row_groups
        else:
            self.n = opened.count_rows()
            files = groups = len(getattr(opened, "files", paths))
        pyarrow = min(PYARROW, _PYARROW_LEAST + _PYARROW_NUMBER * self.n * self.p)
        self.held = pyarrow + self.p * (files * _FOOTER[0] + groups * _FOOTER[1])

    def pieces(self, first: int, last: int, whole: bool) -> Iterator[Piece]:
        """See `Source`."""
        step = max(1, _PIECE // max(self.n, 1))
        for begin in range(first, last, step):
            names = (self.names or [])[begin : min(begin + step, last)]
            table = self._read(names)
            if any(kind.kind != "f" for kind in self.dtypes) and any(
                column.null_count and as_array(column[:0], "")[0].dtype.kind != "f"
                for column in table.columns
            ):
                self.dtypes.add(np.dtype(np.float64))  # as NaN stands where an integer misses
            yield Piece(slice(0, self.n), begin, as_array(table, self._name)[0])

    def _read(self, names: list[str]) -> Any:
        threads = get_num_threads() > 1
        if self._is_file:  # which also gives "a.b" where "a" is asked for
            return self._opened.read(columns=names, use_threads=threads).select(names)
        return self._opened.to_table(columns=names, use_threads=threads)

    def stamp(self) -> Stamp:
        """Of its files."""
        return _stamp(self._paths)


class _Blocks(Source):
    """Tables beside each other, each opened when it is needed."""

    def __init__(self, blocks: Sequence[Any], name: str) -> None:
        self._blocks, self._name = blocks, name
        self._held: tuple[int, Source] | None = None
        self._starts = [0]
        self._stamps: list[Stamp] = []
        self.dtypes = set()
        names: list[str] | None = []
        for k in range(len(blocks)):
            block = self._open(k)
            if k == 0:
                self.n = block.n
            elif block.n != self.n:
                raise ValueError(
                    f"block {k} of {name} has {block.n:,} rows and block 0 has {self.n:,}; "
                    "expected the same rows in all blocks"
                )
            names = None if names is None or block.names is None else names + block.names
            self._starts.append(self._starts[-1] + block.p)
            self._stamps.append(block.stamp())
            self.dtypes |= block.dtypes
            self.held = max(self.held, block.held)
        self.names, self.p = names, self._starts[-1]

    def pieces(self, first: int, last: int, whole: bool) -> Iterator[Piece]:
        """See `Source`."""
        k = bisect_right(self._starts, first) - 1
        while first < last:
            start, end = self._starts[k : k + 2]
            block = self._open(k)
            if (block.n, block.p) != (self.n, end - start) or block.stamp() != self._stamps[k]:
                raise RuntimeError(
                    f"block {k} of {self._name} has changed while it was in use: it had shape "
                    f"{(self.n, end - start)} and has {(block.n, block.p)} now, or its file was "
                    "written; expected the same block each time"
                )
            stop = min(last, end)
            for piece in block.pieces(first - start, stop - start, whole):
                yield piece._replace(first=piece.first + start)
            self.dtypes |= block.dtypes
            first, k = stop, k + 1

    def stamp(self) -> Stamp:
        """Of the files of all blocks; what else a block is shows when it is opened."""
        return _stamp([Path(path) for each in self._stamps for path, *_ in each])

    def _open(self, k: int) -> Source:
        if self._held is None or self._held[0] != k:
            self._held = None  # before the next one takes memory
            name = f"block {k} of {self._name}"
            block = self._blocks[k]
            source = open_source(block, name)
            if source is None:
                source = in_memory_source(block, name)
            self._held = (k, source)
        return self._held[1]


def _stamp(paths: Sequence[Path]) -> Stamp:
    found = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                status = file.stat()
                found.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(found)


def _is_path(X: Any) -> bool:
    """Whether a value is a path, or text that is meant to be one."""
    return isinstance(X, os.PathLike) or (isinstance(X, str) and names_file(X))


def _open_parquet(path: Path, given: str, name: str) -> Any:
    """A ParquetFile; a Dataset of a folder's files."""
    if not os.path.exists(path):
        raise ValueError(f"{name} is {given!r}, and there is no such file{_instead(given)}")
    try:
        import pyarrow.dataset
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{name} is {given!r}; Parquet files are read with pyarrow: "
            "pip install 'lcodec_ext[tables]'"
        ) from None
    try:
        if path.is_dir():
            files = _files_of(path)
            if not files:
                raise ValueError(f"{name} is {given!r}, a folder without files")
            opened = pyarrow.dataset.dataset(list(map(str, files)), format="parquet")
            opened.count_rows()  # which opens all of them
            return opened
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        advice = "take out what is not Parquet" if path.is_dir() else _advice(path)
        raise ValueError(
            f"{name} is {given!r}, which cannot be read as Parquet: {error}; {advice}"
        ) from None


def _instead(given: str) -> str:
    """What to pass instead of text that names no file."""
    if "://" in given:
        return ": files are read from disks; download it, or pass a pyarrow.dataset.Dataset"
    if any(sign in given for sign in "*?["):
        return (
            ": patterns are not expanded; pass ColumnBlocks(sorted(glob.glob(...))) where each "
            "file has some of the columns, or the path of the folder where each has some of the "
            "rows"
        )
    return ""


def _advice(path: Path) -> str:
    """What to do about a file that is not Parquet."""
    whole = repr(str(path))
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if ".npy" in suffixes:
        return f"pass numpy.load({whole}, mmap_mode='r')"
    if suffixes & {".csv", ".tsv", ".txt"}:
        return (
            f"convert it once, pandas.read_csv({whole}).to_parquet('X.parquet'), or read it with "
            "the command lcodec-ext foci"
        )
    if ".parquet" in suffixes:
        return "it is not complete, or not Parquet: write it again"
    return "convert it to Parquet, or read it first and pass the table"


def _files_of(folder: Path) -> list[Path]:
    """The files of a folder, and of those in it, in the order of people: part-2 before part-10.

    Without those that begin with a dot or an underscore, which are marks of the writers.
    """
    found = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part[0] in "._" for part in parts):
            found.append((_natural(parts), parts, path))
    return [path for *_, path in sorted(found)]


def _natural(parts: Sequence[str]) -> list[list[str | int]]:
    """A key by which names are sorted with the numbers in them as numbers."""
    return [
        [int(each) if k % 2 else each for k, each in enumerate(re.split("([0-9]+)", part))]
        for part in parts
    ]
