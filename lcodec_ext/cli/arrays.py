"""Tables of typed columns: Parquet by pyarrow, NPZ and NPY by NumPy."""

import math
import zipfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import counted
from lcodec_ext.cli.columns import EXACT_INTEGER, TableError, Unusable, not_numbers, rounded
from lcodec_ext.cli.sources import Source, need_pyarrow


class ParquetReader:
    """The columns of a Parquet file."""

    def __init__(self, source: Source) -> None:
        self._arrow, self._label = need_pyarrow(source.label), source.label
        try:
            self._file = self._arrow.parquet.ParquetFile(source.for_pyarrow(self._arrow))
        except (self._arrow.ArrowException, OSError) as error:
            raise TableError(f"{self._label} cannot be read as Parquet: {error}") from None
        schema = self._file.schema_arrow
        self.names: list[str] = list(schema.names)
        # pandas says which columns are the index; a range is no column, and told by a dict
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        self.index = {name for name in index if isinstance(name, str)}

    def load(self, places: list[int]) -> list[NDArray | Unusable]:
        """Some columns, with NaN where a value is missing."""
        names = [self.names[place] for place in places]
        try:
            table = self._file.read(columns=names)
        except (self._arrow.ArrowException, OSError) as error:
            raise TableError(f"{self._label} cannot be read as Parquet: {error}") from None
        return [self._numbers(table.column(name)) for name in names]

    def labels(self, place: int) -> list[str | None]:
        """A column of strings or categories; nothing for other types."""
        column = self._file.read(columns=[self.names[place]]).column(self.names[place])
        try:
            text = column.cast(self._arrow.string())
        except self._arrow.ArrowException:
            return []
        kind = getattr(column.type, "value_type", column.type)  # that of a dictionary
        is_text = self._arrow.types.is_string(kind) or self._arrow.types.is_large_string(kind)
        return text.to_pylist() if is_text else []

    def _numbers(self, column: Any) -> NDArray | Unusable:
        types, kind = self._arrow.types, column.type
        if types.is_null(kind):
            return np.full(len(column), math.nan)
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
            return not_numbers(f"type {kind}")
        if types.is_boolean(kind):
            column = column.cast(self._arrow.uint8())
        if types.is_integer(kind):
            present = column.drop_null().to_numpy()
            for k in np.flatnonzero((present > EXACT_INTEGER) | (present < -EXACT_INTEGER)):
                if int(present[k]) != int(float(present[k])):
                    row = column.to_pylist().index(int(present[k])) + 1
                    return Unusable(f"row {row}", *rounded(present[k]))
        if column.null_count and not types.is_floating(kind):
            column = column.cast(self._arrow.float64(), safe=False)
        values: NDArray = column.to_numpy()
        return values


class ArrayReader:
    """The arrays of an NPZ or NPY file.

    In NPZ every 1-d array is a column, and a 2-d array X is the columns X0, X1, ... The columns of
    NPY are "0", "1", ... Only arrays with wanted columns are read.
    """

    index: tuple[str, ...] = ()

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kind = "NPZ" if ".npz" in (source.suffix, source.held) else "NPY"
        self._places: list[tuple[str, int | None]] = []  # array, and which column of it
        self.names: list[str] = []
        for key, shape in self._shapes().items():
            for part in range(shape[1]) if len(shape) == 2 else [None]:
                self._places.append((key, part))
                self.names.append(key if part is None else f"{key}{part}")

    def load(self, places: list[int]) -> list[NDArray | Unusable]:
        """Some columns; of different lengths, those that differ from the first are unusable."""
        wanted = [self._places[place] for place in places]
        keys = dict.fromkeys(key for key, _ in wanted)
        arrays = dict(zip(keys, self._arrays(list(keys)), strict=True))
        found: list[NDArray | Unusable] = []
        first: tuple[str, int] | None = None
        for place, (key, part) in zip(places, wanted, strict=True):
            values = arrays[key]
            if isinstance(values, np.ndarray) and part is not None:
                values = values[:, part]
            if isinstance(values, np.ndarray):
                first = first or (self.names[place], len(values))
                if len(values) != first[1]:
                    what = f" has {counted(len(values), 'row')} and {first[0]!r} has {first[1]}"
                    values = Unusable("", what, "columns must have one length")
            found.append(values)
        return found

    def labels(self, place: int) -> list[str | None]:
        """An array of strings; nothing for other types."""
        key, part = self._places[place]
        if self._kind == "NPY":
            return []
        with np.load(self._source.for_numpy(), allow_pickle=False) as file:
            try:
                values = file[key] if part is None else file[key][:, part]
            except ValueError:
                return []
        return values.tolist() if values.dtype.kind == "U" and values.ndim == 1 else []

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array, of which only the head is read; () where there is none."""
        try:
            if self._kind == "NPY":
                shape = self._npy().shape
                return {"": shape if len(shape) != 1 else (*shape, 1)}
            with zipfile.ZipFile(self._source.for_numpy()) as file:
                shapes = {}
                for name in file.namelist():
                    with file.open(name) as member:
                        shapes[name.removesuffix(".npy")] = _shape(member)
                return shapes
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._refusal(error) from None

    def _arrays(self, keys: list[str]) -> list[NDArray | Unusable]:
        try:
            if self._kind == "NPY":
                values = self._npy()
                return [_usable(values[:, None] if values.ndim == 1 else values)]
            with np.load(self._source.for_numpy(), allow_pickle=False) as file:
                return [self._member(file, key) for key in keys]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._refusal(error) from None

    def _npy(self) -> NDArray:
        file = self._source.for_numpy()
        return np.load(file, mmap_mode="r" if isinstance(file, str) else None, allow_pickle=False)

    def _member(self, file: Any, key: str) -> NDArray | Unusable:
        try:
            return _usable(file[key])
        except ValueError:  # objects, which only pickle reads, and pickle can run any code
            return not_numbers("dtype object")

    def _refusal(self, error: Exception) -> TableError:
        return TableError(f"{self._source.label} cannot be read as {self._kind}: {error}")


def _shape(member: IO[bytes]) -> tuple[int, ...]:
    head = {(1, 0): np.lib.format.read_array_header_1_0}
    try:
        version = np.lib.format.read_magic(member)
        return head.get(version, np.lib.format.read_array_header_2_0)(member)[0]
    except ValueError:
        return ()


def _usable(values: Any) -> NDArray | Unusable:
    """An array of numbers with one or two axes, or what is wrong with it."""
    if not isinstance(values, np.ndarray):
        return not_numbers("a type that NumPy did not write")
    if values.dtype.kind not in "biuf":
        return not_numbers(f"dtype {values.dtype}")
    if values.ndim not in (1, 2):
        advice = "expected 1 axis, a column, or 2, rows and columns"
        return Unusable("", f" has shape {values.shape}", advice)
    return values
