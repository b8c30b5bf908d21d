"""Tell NumPy arrays from tensors, and convert anything array-like.

pandas is used only if it is loaded already, and so is torch, but for arrays on a CUDA device.
"""

import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import first_few

_FILE = re.compile(
    r"\.(parquet|pq|npy|npz|csv|tsv|txt|arrow|feather|h5|hdf5|xlsx?|jsonl?|pkl|pickle|mat|rds)"
    r"(\.(gz|bz2|zip|xz|zst))?$"
)
MAX_INTEGER = 2**53  # up to it float64 holds all integers
# Of DLPack: the CPU, and its memory that CUDA or ROCm has pinned; CUDA, and its managed memory
_HOST_DEVICES, _CUDA_DEVICES = (1, 3, 11), (2, 13)


def is_tensor(value: object) -> bool:
    """Whether value is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def device_of(value: Any) -> str | None:
    """Name of the device that a tensor, or an array known by DLPack, lies on; None of the CPU."""
    if type(value) is np.ndarray:
        return None
    if is_tensor(value):
        return None if value.device.type == "cpu" else str(value.device)
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return None
    try:
        kind, index = value.__dlpack_device__()
    except TypeError:  # pyarrow before 22, for types that DLPack does not know
        return None
    if kind in _HOST_DEVICES:
        return None
    return f"cuda:{index}" if kind in _CUDA_DEVICES else f"{int(kind)} of DLPack"


def on_cuda(value: Any) -> bool:
    """Whether value is a tensor, or an array known by DLPack, on a CUDA device."""
    return (device_of(value) or "").startswith("cuda")


def array_module(array: Any) -> Any:
    """NumPy or torch, whichever an array belongs to; they name much alike."""
    return sys.modules["torch" if is_tensor(array) else "numpy"]


def is_float(array: Any) -> bool:
    """Whether an array or tensor holds floating-point numbers."""
    return array.is_floating_point() if is_tensor(array) else array.dtype.kind == "f"


def beyond_float64(array: Any) -> bool:
    """Whether an array or tensor holds different numbers that float64 may merge.

    Integers beyond 2**53, and long doubles that are equal once they are rounded.
    """
    if array.dtype == bool or not array.shape[0]:
        return False
    if is_float(array):
        return not is_tensor(array) and array.dtype.itemsize > 8 and _merged(array)
    if str(array.dtype) == "torch.uint64":  # torch knows no maximum of it
        array = array.view(array_module(array).int64)
        if array.min() < 0:  # 2**63 and more
            return True
    return max(int(array.max()), -int(array.min())) > MAX_INTEGER


def _merged(array: NDArray) -> bool:
    columns = array.T if array.ndim == 2 else [array.ravel()]
    with np.errstate(all="ignore"):
        return any(
            len(np.unique(column)) > len(np.unique(column.astype(np.float64))) for column in columns
        )


def as_array(value: Any, name: str, *, tensors: bool | None = None) -> tuple[Any, list[str] | None]:
    """Anything array-like as an array of real numbers, and its column names if it has them.

    A NumPy array in native byte order, float16 as float32, missing values as NaN; or a tensor of a
    dtype that torch can sort and compare, or uint64. Columns of different types, missing values and
    lists are made one array, and integers that this would round are refused.

    Parameters
    ----------
    value : array_like
    name : str
        What error messages call it.
    tensors : bool, optional
        Whether tensors stay tensors. By default those on a CUDA device do. Arrays of others on a
        CUDA device become tensors that share their memory.
    """
    if type(value) is np.ndarray:  # of one type, and so quickly done
        return _real(value, name), None
    if not is_tensor(value) and on_cuda(value):
        value = _shared_on_cuda(value, name)
    if value is None:
        raise ValueError(f"{name} must be an array of numbers; got None")
    if isinstance(value, str | bytes):
        advice = f"pass the data, such as df[{value!r}]"
        if isinstance(value, str) and names_file(value):
            advice = _ADVICE[_FILES]
        raise ValueError(
            f"{name} must be an array, a column or a table; got the {type(value).__name__} "
            f"{value!r}: {advice}"
        )
    if is_tensor(value):
        keep = on_cuda(value) if tensors is None else tensors
        return (_real_tensor if keep else _tensor_to_numpy)(value, name), None
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise ValueError(
            f"{name} is sparse ({type(value).__name__}); expected a dense array: "
            f"pass {name}.toarray()"
        )
    if type(value).__name__ == "LazyFrame":
        raise ValueError(f"{name} is a LazyFrame, which holds no data: pass {name}.collect()")
    if isinstance(value, Mapping):
        way = f"{name}.to_dataframe()" if hasattr(value, "to_dataframe") else f"DataFrame({name})"
        raise ValueError(
            f"{name} is a {type(value).__name__}; expected an array or a data frame: pass {way}"
        )
    value = in_memory(value, name)
    if (single := _frame_of_one_type(value)) is not None:
        return _real(single, name), [str(label) for label in value.columns]
    frame = None if type(value) in (list, tuple) else _frame(value)
    if frame is None:
        return _column(value, name), None
    names, parts = frame
    labels = [f"column {column!r} (index {k}) of {name}" for k, column in enumerate(names)]
    columns = [_column(part, label) for part, label in zip(parts, labels, strict=True)]
    if not columns:
        return np.empty((len(value), 0)), names
    if np.result_type(*{part.dtype for part in columns}).kind == "f":  # before they are stacked
        for column, label in zip(columns, labels, strict=True):
            refuse_merged(column, label)
    return np.column_stack(columns), names


def names_file(text: str) -> bool:
    """Whether text is meant as the path of a file: by its ending, or by how it begins."""
    return text.startswith("~") or "://" in text or _FILE.search(text.lower()) is not None


def in_memory(value: Any, name: str) -> Any:
    """value, if it does not lie on a device; as a NumPy array, if it is known by DLPack alone."""
    if isinstance(value, np.ndarray) or is_tensor(value) or not hasattr(value, "__dlpack_device__"):
        return value
    if (device := device_of(value)) is not None:
        raise ValueError(
            f"{name} is a {kind_of(value)} on device {device}; data are not copied between "
            f"devices unasked: pass a copy on the CPU, such as torch.from_dlpack({name}).cpu()"
        )
    if hasattr(value, "__array__"):
        return value
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name} cannot be made into an array: {error}") from None


def torch_for(value: Any, name: str) -> Any:
    """torch, which passes on data that lie on a CUDA device."""
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{name} is a {kind_of(value)} on device {device_of(value)}, which PyTorch passes on "
            "to the kernels: install lcodec_ext[torch]"
        ) from None
    return torch


def _shared_on_cuda(value: Any, name: str) -> Any:
    """An array of CuPy, JAX or others on a CUDA device, as a tensor that shares its memory."""
    try:
        return torch_for(value, name).from_dlpack(value)
    except (AssertionError, BufferError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name} is a {kind_of(value)} on device {device_of(value)}, which PyTorch cannot "
            f"share: {error}"
        ) from None


def kind_of(value: Any) -> str:
    """The full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def column_names(value: Any) -> list[str] | None:
    """Names of the columns of any library's table; None where there are none, or other labels."""
    frame, pandas = _frame(value), sys.modules.get("pandas")
    if frame is None:
        return None
    labels = value.columns if pandas and isinstance(value, pandas.DataFrame) else frame[0]
    return frame[0] if all(isinstance(label, str) for label in labels) else None


def refuse_columns(value: Any, name: str) -> None:
    """Refuse a data frame whose columns are not numbers, a dict, text; leave arrays to others."""
    fields = getattr(getattr(value, "dtype", None), "names", None)  # of a structured array
    other = isinstance(value, Mapping | str | bytes) or type(value).__name__ == "LazyFrame"
    if other or fields or _frame(value) is not None:
        as_array(value, name, tensors=False)


def refuse_merged(column: NDArray, label: str, beside: str = "") -> None:
    """Refuse a column whose numbers float64 may merge."""
    if beyond_float64(column):
        what = "numbers" if is_float(column) else "integers beyond 2**53"
        raise ValueError(
            f"{label} holds {what}{beside}, which float64 cannot tell apart; "
            "subtract an offset first"
        )


def _frame_of_one_type(value: Any) -> NDArray | None:
    """Values of a pandas data frame whose columns all are of the same type of NumPy's floats."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not isinstance(value, pandas.DataFrame):
        return None
    dtypes = set(value.dtypes)
    if len(dtypes) == 1 and dtypes <= {np.dtype("f4"), np.dtype("f8")}:
        values: NDArray = value.to_numpy()
        return values
    return None


def _frame(value: Any) -> tuple[list[str], list[Any]] | None:
    """Names and columns of a data frame or table of any library; None for anything else."""
    pandas, arrow = sys.modules.get("pandas"), sys.modules.get("pyarrow")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        columns = [value.iloc[:, k] for k in range(value.shape[1])]
        return [str(label) for label in value.columns], columns
    if arrow is not None and isinstance(value, arrow.Table | arrow.RecordBatch):
        return list(value.column_names), list(value.columns)
    labels = getattr(value, "columns", None)
    if isinstance(labels, list) and hasattr(value, "to_numpy"):  # polars and its like
        return [str(label) for label in labels], [value[label] for label in labels]
    dims, places = getattr(value, "dims", None), getattr(value, "coords", None)
    if isinstance(dims, tuple) and len(dims) == 2 and places is not None:  # xarray and its like
        named = np.asarray(places[dims[1]]) if dims[1] in places else np.empty(0)
        if named.ndim == 1 and all(isinstance(label, str) for label in named) and len(named):
            return [str(label) for label in named], list(np.asarray(value).T)
    return None


def _column(value: Any, label: str) -> NDArray:
    """An array, or a column of any library, as an array of real numbers; NaN where one misses."""
    pandas, polars, arrow = map(sys.modules.get, ("pandas", "polars", "pyarrow"))
    if pandas is not None and isinstance(value, pandas.api.extensions.ExtensionArray):
        value = pandas.Series(value)
    missing = None
    if pandas is not None and isinstance(value, pandas.Series | pandas.Index):
        values, missing = _pandas_column(value, label)
    elif polars is not None and isinstance(value, polars.Series):
        kind = value.dtype
        exact = kind.is_decimal() or "128" in str(kind)  # NumPy has no such integers
        if exact or not (kind.is_numeric() or kind == polars.Boolean):
            raise _not_numbers(label, str(kind))
        missing = value.is_null().to_numpy()
        values = value.fill_null(False if kind == polars.Boolean else 0).to_numpy()
    elif arrow is not None and isinstance(value, arrow.Array | arrow.ChunkedArray):
        values, missing = _arrow_column(value, label)
    elif isinstance(value, np.ma.MaskedArray):
        values, missing = value.data, np.ma.getmaskarray(value)
    else:
        values = listed(value, label)
    values = _real(values, label)
    if missing is None or not missing.any():
        return values
    refuse_merged(values[~missing], label, " (and missing values)")
    filled = values.astype(values.dtype if values.dtype.kind == "f" else np.float64)
    filled[missing] = np.nan
    return filled


def _pandas_column(column: Any, label: str) -> tuple[NDArray, NDArray | None]:
    """Values of a pandas column or index, and where they are missing."""
    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        return column.to_numpy(), None
    numpy_dtype = getattr(dtype, "numpy_dtype", None)
    if numpy_dtype is None or numpy_dtype.kind not in "biuf":
        raise _not_numbers(label, "categorical" if str(dtype) == "category" else str(dtype))
    missing = np.asarray(column.isna())
    # 0 takes a missing integer's place, because NaN would make all of them floats
    fill = np.nan if numpy_dtype.kind == "f" else numpy_dtype.type(0)
    return column.to_numpy(dtype=numpy_dtype, na_value=fill), missing


def _arrow_column(column: Any, label: str) -> tuple[NDArray, NDArray | None]:
    """Values of a pyarrow array, and where they are missing."""
    arrow, kind = sys.modules["pyarrow"], column.type
    if not (
        arrow.types.is_integer(kind)
        or arrow.types.is_floating(kind)
        or arrow.types.is_boolean(kind)
    ):
        raise _not_numbers(label, str(kind))
    if not column.null_count:
        return np.asarray(column), None
    missing = np.asarray(column.is_null())
    return np.asarray(column.fill_null(False if arrow.types.is_boolean(kind) else 0)), missing


def arrow_dtypes(schema: Any, name: str) -> set[np.dtype[Any]]:
    """dtypes that `as_array` makes of a pyarrow schema's columns; refuses those of no numbers."""
    found: dict[Any, np.dtype[Any]] = {}
    for k, field in enumerate(schema):
        if field.type not in found:
            label = f"column {field.name!r} (index {k}) of {name}"
            empty = sys.modules["pyarrow"].array([], field.type)
            found[field.type] = _column(empty, label).dtype
    return set(found.values())


def listed(value: Any, label: str) -> NDArray:
    """A nested sequence as an array, if no integer in it is rounded; as objects if it has text.

    Missing values, and numbers, that stand among text would be made text by NumPy.
    """
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{label} cannot be made into an array: {error}") from None
    if isinstance(value, np.ndarray):
        return array
    if array.dtype.kind in "US":
        return np.array(value, dtype=object)
    if array.dtype.kind == "f":
        _refuse_rounded(value, array, label)
    return array


def refuse_converted(given: Any, array: Any, name: str) -> None:
    """Refuse integers that somebody else's conversion to an array of floats may have merged."""
    if array.dtype.kind == "f" and _large(array).any():
        if np.asarray(given).dtype == object:
            _refuse_rounded(given, array, name)
        else:
            refuse_merged(as_array(given, name, tensors=False)[0], name)


def _large(array: NDArray) -> NDArray[np.bool_]:
    with np.errstate(all="ignore"):
        large: NDArray[np.bool_] = np.abs(array) >= MAX_INTEGER
    return large


def _refuse_rounded(value: Any, array: NDArray, label: str) -> None:
    """Refuse integers of a nested sequence, or objects, that its array of floats has rounded."""
    with np.errstate(all="ignore"):  # a quick look at both ends; it ignores NaN
        ends = [each.reduce(array, axis=None, initial=0) for each in (np.fmin, np.fmax)]
    if max(map(abs, ends)) < MAX_INTEGER:
        return
    large = _large(array)
    given = np.array(value, dtype=object) if large.any() else array
    for entry in given[large] if given.shape == array.shape else ():
        if hasattr(entry, "item"):  # a tensor or an array of one number
            entry = entry.item()
        if isinstance(entry, numbers.Integral) and abs(int(entry)) > MAX_INTEGER:
            raise ValueError(
                f"{label} holds integers beyond 2**53, here {entry}, beside floats; float64 cannot "
                "tell them apart: subtract an offset first"
            )


_TO_ITEMS = ("to_pylist", "to_list")  # of pyarrow, and of pandas and polars
_TEXT_KINDS = "USOT"  # of NumPy: T is its StringDType
_TEXT = ("categor", "enum", "dictionary", "str", "utf8", "binary")


def class_codes(value: Any) -> tuple[NDArray, bool] | None:
    """Codes of strings or categories, NaN where one is missing, and whether they lack an order.

    None for anything else. Codes of ordered categories are in their order.
    """
    plain = isinstance(value, np.ndarray) and value.dtype.kind not in _TEXT_KINDS
    if plain or value is None or is_tensor(value):
        return None
    frame = _frame(value)
    if frame is not None:
        if len(frame[1]) != 1:
            return None
        (value,) = frame[1]
    kind = getattr(value, "dtype", getattr(value, "type", None))
    if kind is None:
        try:
            value = listed(value, "")
        except ValueError:  # as_array says why
            return None
        kind = value.dtype
    if isinstance(kind, np.dtype) and kind.kind not in _TEXT_KINDS:
        return None
    if not any(word in str(kind).lower() for word in (*_TEXT, "object", "<u", ">u", "|s")):
        return None
    if getattr(kind, "ordered", False) is True and hasattr(value, "isna"):  # pandas
        codes = np.asarray(getattr(value, "cat", value).codes)
        return np.where(codes < 0, np.nan, codes) if (codes < 0).any() else codes, False
    items = next((getattr(value, way)() for way in _TO_ITEMS if hasattr(value, way)), value)
    entries = np.array(items, dtype=object)
    if np.ma.is_masked(value):
        entries[np.ma.getmaskarray(value)] = None
    if entries.ndim == 2 and entries.shape[1] == 1:
        entries = entries[:, 0]
    present = [entry for entry in entries if not _is_missing(entry)] if entries.ndim == 1 else []
    categories = any(word in str(kind).lower() for word in ("categor", "enum", "dictionary"))
    if not present or not (categories or all(isinstance(entry, str | bytes) for entry in present)):
        return None
    code = {entry: k for k, entry in enumerate(sorted(set(present), key=str))}
    if len(present) < len(entries):
        return np.array([code.get(entry, np.nan) for entry in entries]), True
    return np.array([code[entry] for entry in entries]), True


def _is_missing(entry: Any) -> bool:
    if entry is None or type(entry).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(entry, float | np.floating) and bool(entry != entry)


_ENCODE = (
    "encode categories as numbers first: a column of 0 and 1 for each (get_dummies of pandas, "
    "to_dummies of polars), or their codes if their order is meant"
)
_FILES = ("path", "parquet", "dataset")
_ADVICE = {  # for words in a dtype's or a type's name
    _FILES: "read it first, and pass the table; foci alone reads Parquet by columns",
    ("[(",): "make a data frame of the fields first: pandas.DataFrame",
    ("list", "struct", "array"): "pass columns of numbers",
    ("date", "time", "duration", "period"): "pass the number that is meant, such as days since "
    "a day of your choice",
    (
        "decimal",
        "fraction",
    ): "convert them to floats first, less an offset where they have over 15 digits",
    ("int128",): "convert them to 64 bits first, as far as they fit",
    ("sparse",): "make the column dense first",
    ("(float", "(int", "(bool"): "convert them first, with astype(float) or astype('int64')",
    ("none", "null"): "leave the column out: it is empty",
    _TEXT: _ENCODE,
}


def _advice(kind: str) -> str:
    """What to do about values that are not numbers."""
    word = kind.lower()
    found = (advice for words, advice in _ADVICE.items() if any(part in word for part in words))
    return next(found, "pass columns of numbers")


def _advice_on_objects(entries: NDArray) -> str:
    """What to do about Python objects."""
    present = [entry for entry in entries.ravel() if not _is_missing(entry)]
    text = any(isinstance(entry, str | bytes) for entry in present)
    if text and any(isinstance(entry, numbers.Number) for entry in present):
        return (
            "put NaN for text that marks a missing value; if they all are classes, write the "
            "numbers as text, too"
        )
    whole = [abs(int(entry)) for entry in present if isinstance(entry, numbers.Integral)]
    if not text and max(whole, default=0) > MAX_INTEGER:
        return (
            "convert them first, with astype('int64') (or 'Int64' of pandas, where some are "
            "missing): astype(float) would merge integers beyond 2**53, and there are such"
        )
    types = dict.fromkeys(type(entry).__name__ for entry in present)
    return _advice(f"({', '.join(types or ['None'])})")


def _not_numbers(label: str, kind: str) -> ValueError:
    return ValueError(f"{label} is {kind}; expected numbers: {_advice(kind)}")


def _real(array: NDArray, label: str) -> NDArray:
    """array, if its dtype is one of real numbers; native byte order, float16 as float32."""
    if array.dtype.kind not in "biuf":
        raise _not_real(array, label)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and sys.float_info.min / 2 == 0 and _has_subnormals(array):
        raise ValueError(
            f"{label} holds numbers below {np.finfo(array.dtype).tiny:.3g}, which this thread "
            "takes for zero: rescale the data, or undo what has set that for the thread, such as "
            "torch.set_flush_denormal(True)"
        )
    return array


def _not_real(array: NDArray, label: str) -> ValueError:
    """What is said of an array of another dtype; of a table of text or objects, of its column."""
    kind, such = array.dtype.kind, ""
    if array.ndim == 2 and kind in "OUS":
        column, entry = _first_no_number(array)
        if column is not None:
            array, label, such = array[:, column], f"column {column} of {label}", f" ({entry!r})"
    what = {"c": "complex numbers", "U": "strings", "S": "strings", "O": "objects"}
    given = what.get(kind, f"values of dtype {array.dtype}")
    advice = _advice(given)
    if given == "objects" and array.size:
        types = dict.fromkeys(type(entry).__name__ for entry in array.ravel())
        given = "strings" if [*types] == ["str"] else f"objects ({first_few([*types], 5)})"
        advice = _advice_on_objects(array)
        if array.ndim == 0 and isinstance(array.item(), Iterable):
            advice = f"pass a list of what it holds, list({label})"
            if isinstance(array.item(), set | frozenset):
                advice = "a set has no order: pass a list"
    if given == "strings" and not such and _first_no_number(array)[0] is None:
        large = any(abs(float(entry)) > MAX_INTEGER for entry in array.ravel().tolist())
        advice = f"convert them first, with astype({'int64' if large else 'float'})"
    return ValueError(f"{label} must hold real numbers; got {given}{such}; {advice}")


def _first_no_number(array: NDArray) -> tuple[int | None, Any]:
    """The first column with an entry that is neither a number nor text of one, and the entry."""
    for k, column in enumerate(array.reshape(len(array) if array.ndim else 1, -1).T):
        for entry in column.tolist():
            try:
                float(0 if _is_missing(entry) else entry)
            except (TypeError, ValueError):
                return k, entry
    return None, None


def _has_subnormals(array: NDArray) -> bool:
    """By their bits, because a thread that takes them for zero cannot compare them."""
    info = np.finfo(array.dtype)
    if info.bits > 64:
        return False
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    bits = array.view(unsigned) & unsigned.type(2 ** (info.bits - 1) - 1)  # without the sign
    return bool(((bits > 0) & (bits < info.tiny.view(unsigned))).any())


def _dense_tensor(tensor: Any, name: str) -> Any:
    """A tensor of real numbers without its gradient; bfloat16 as float32, which holds it."""
    if tensor.is_complex():
        raise ValueError(f"{name} must be real; got a tensor of {tensor.dtype}")
    if str(tensor.layout) != "torch.strided":
        raise ValueError(f"{name} must be dense; got a tensor of layout {tensor.layout}")
    tensor = tensor.detach().resolve_neg()
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor


def _tensor_to_numpy(tensor: Any, name: str) -> NDArray:
    tensor = _dense_tensor(tensor, name)
    try:
        array = tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be made into an array from a tensor of {tensor.dtype}: {error}"
        ) from None
    return _real(array, name)


def _real_tensor(tensor: Any, name: str) -> Any:
    tensor = _dense_tensor(tensor, name)
    torch = array_module(tensor)
    wider = {
        torch.bool: torch.uint8,
        torch.float16: torch.float32,
        torch.uint16: torch.int32,
        torch.uint32: torch.int64,
    }
    dtype = wider.get(tensor.dtype, tensor.dtype)
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64)
    if dtype not in (torch.float32, torch.float64, *integers):
        raise ValueError(f"{name} must hold real numbers; got a tensor of {tensor.dtype}")
    return tensor.to(dtype)
