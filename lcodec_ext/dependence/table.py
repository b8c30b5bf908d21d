"""What users pass in, made into arrays that the backends can trust.

CUDA tensors are checked and converted where they lie; nothing but verdicts is read from them.
Every message names the argument, says what was given and what was expected.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor, on_device
from lcodec_ext._checks import check_choice

MAX_ROWS = 1_000_000  # the integer sums of the exactness contract are proven up to here
_EXACT_INTEGER = 2**53


class Features(NamedTuple):
    """Feature columns in the working precision.

    ``values`` is a C-contiguous (n, p) array, or CUDA tensor: float32 where the input was float32,
    float16 or bfloat16, float64 for everything else. ``names`` are column names, None without any.
    """

    values: Any
    names: list[str] | None


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
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be made into an array from a tensor of {tensor.dtype}: {error}"
        ) from None


def _on_device(tensor: Any, name: str) -> Any:
    """A CUDA tensor as one of a dtype that torch can sort and compare; and uint64."""
    import torch

    tensor = _dense_tensor(tensor, name)
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


def _is_float(array: Any) -> bool:
    return array.is_floating_point() if is_tensor(array) else array.dtype.kind == "f"


def _is_integer(array: Any) -> bool:
    if is_tensor(array):
        return not array.is_floating_point()
    return array.dtype.kind in "iu"


def _beyond_exact(integers: Any) -> bool:
    """Whether float64 would merge some of the integers."""
    if str(integers.dtype) == "torch.uint64":  # torch knows no maximum of it
        integers = integers.view(array_module(integers).int64)
        if integers.min() < 0:  # 2**63 and more
            return True
    return max(int(integers.max()), -int(integers.min())) > _EXACT_INTEGER


def _pandas_column(column: Any, label: str) -> NDArray:
    """One pandas column as a NumPy array; missing values become NaN."""
    dtype = column.dtype
    if isinstance(dtype, np.dtype):
        return column.to_numpy()
    numpy_dtype = getattr(dtype, "numpy_dtype", None)
    if numpy_dtype is None or numpy_dtype.kind not in "biuf":
        kind = "categorical" if str(dtype) == "category" else str(dtype)
        raise ValueError(
            f"{label} is {kind}; expected numbers: encode it first, for instance with "
            "pandas.get_dummies, or with its codes if the order of the categories is meant"
        )
    if column.isna().any():
        known = column.dropna()
        if numpy_dtype.kind in "iu" and len(known) and _beyond_exact(known.to_numpy(numpy_dtype)):
            raise ValueError(
                f"{label} holds integers beyond 2**53 beside missing values; no float64 can tell "
                "them apart: leave out the missing rows, or subtract an offset"
            )
        wide = numpy_dtype if numpy_dtype.kind == "f" else np.dtype(np.float64)
        return column.to_numpy(dtype=wide, na_value=np.nan)
    return column.to_numpy(dtype=numpy_dtype)


def _as_array(value: Any, name: str) -> tuple[Any, list[str] | None]:
    """Anything array-like as a NumPy array of real numbers, with column names if it has them.

    CUDA tensors stay CUDA tensors.
    """
    if value is None:
        raise ValueError(f"{name} must be an array of numbers; got None")
    if on_device(value):
        return _on_device(value, name), None
    names = None
    pandas = sys.modules.get("pandas")
    if is_tensor(value):
        array = _tensor_to_numpy(value, name)
    elif pandas is not None and isinstance(value, pandas.DataFrame):
        names = [str(column) for column in value.columns]
        columns = []
        for k, column in enumerate(names):
            label = f"column {column!r} (index {k}) of {name}"
            columns.append(_real(_pandas_column(value.iloc[:, k], label), label))
        # column by column, because pandas makes bool beside float an object array
        array = np.column_stack(columns) if columns else np.empty((len(value), 0))
    elif pandas is not None and isinstance(value, pandas.Series | pandas.Index):
        array = _pandas_column(value, name)
    else:
        if hasattr(value, "toarray") and hasattr(value, "nnz"):
            raise ValueError(
                f"{name} is sparse ({type(value).__name__}); expected a dense array: "
                f"pass {name}.toarray()"
            )
        if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
            value = np.ma.filled(value.astype(np.result_type(value.dtype, np.float32)), np.nan)
        labels = getattr(value, "columns", None)
        if isinstance(labels, list) and hasattr(value, "to_numpy"):  # polars and its like
            names = [str(label) for label in labels]
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} cannot be made into an array: {error}") from None
    return _real(array, name), names


def _real(array: NDArray, label: str) -> NDArray:
    """array, if its dtype is one of real numbers; native byte order, float16 as float32."""
    if array.dtype.kind not in "biuf":
        what = {"c": "complex numbers", "U": "strings", "S": "strings", "O": "objects"}
        given = what.get(array.dtype.kind, f"values of dtype {array.dtype}")
        advice = "; encode categories as numbers first" if array.dtype.kind in "USO" else ""
        raise ValueError(f"{label} must hold real numbers; got {given}{advice}")
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_response(y: Any, name: str = "y") -> Any:
    """A response as a 1-d array, or CUDA tensor, of its own dtype (ranks need no conversion).

    Accepts shape (n,) or (n, 1).
    """
    array, _ = _as_array(y, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be one column, of shape (n,) or (n, 1); got shape {tuple(array.shape)}"
        )
    return array


def as_features(X: Any, name: str, *, allow_1d: bool = True) -> Features:
    """Feature columns as a C-contiguous (n, p) array, or CUDA tensor, of the working precision.

    A 1-d array is one column where ``allow_1d``; p = 0 is an error, and so are integers that
    float64 cannot hold.
    """
    array, names = _as_array(X, name)
    if array.ndim == 1 and allow_1d:
        array = array[:, None]
        label = getattr(X, "name", None)
        names = [label] if isinstance(label, str) else None
    if array.ndim != 2:
        hint = f"; for one feature pass {name}.reshape(-1, 1)" if array.ndim == 1 else ""
        shapes = "(n,) or (n, p)" if allow_1d else "(n, p)"
        raise ValueError(f"{name} must have shape {shapes}; got shape {tuple(array.shape)}{hint}")
    if array.shape[1] == 0:
        raise ValueError(f"{name} must have at least one column; got shape {tuple(array.shape)}")
    if _is_integer(array) and len(array) and _beyond_exact(array):
        raise ValueError(
            f"{name} holds integers beyond 2**53, which float64 cannot tell apart; "
            "subtract an offset first"
        )
    xp = array_module(array)
    dtype = xp.float32 if array.dtype == xp.float32 else xp.float64
    if is_tensor(array):
        return Features(array.to(dtype).contiguous(), names)
    return Features(np.ascontiguousarray(array, dtype=dtype), names)


def _where(name: str, array: Any, names: list[str] | None, flags: Any) -> str:
    """'X has ... at row 3, column 'age' (index 2)' for the first flagged entry."""
    xp = array_module(array)
    first = xp.argwhere(flags)[0].tolist()
    place = f"row {first[0]}"
    if array.ndim == 2:
        place += (
            f", column {first[1]}"
            if names is None
            else (f", column {names[first[1]]!r} (index {first[1]})")
        )
    more = int(xp.count_nonzero(flags)) - 1
    return f"{name} at {place}" + (f" and {more} more" if more else "")


def clean_rows(arrays: dict[str, Any], nan_policy: str | None, minimum: int = 3) -> dict[str, Any]:
    """Arrays of equal length without NaN or infinity; or CUDA tensors, on one device.

    Parameters
    ----------
    arrays : dict
        Validated responses and features, by argument name.
    nan_policy : {"raise", "omit", None}
        "omit" drops every row that has a NaN in any of the arrays. None: NaN is an error, and the
        caller has no such option.
    minimum : int
        Rows that must remain.
    """
    if nan_policy is not None:
        check_choice(nan_policy, "nan_policy", ("raise", "omit"))
    values = {
        name: array.values if isinstance(array, Features) else array
        for name, array in arrays.items()
    }
    lengths = {name: len(array) for name, array in values.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"all arguments must have the same number of rows; {given}")
    n = next(iter(lengths.values()))
    xp = array_module(next(iter(values.values())))
    drop: Any = None
    for name, array in values.items():
        if not _is_float(array):
            continue
        source = arrays[name]
        names = source.names if isinstance(source, Features) else None
        with np.errstate(over="ignore", invalid="ignore"):
            if xp.isfinite(array.sum()):  # one pass; the rare rest looks closer
                continue
        infinite = xp.isinf(array)
        if infinite.any():
            raise ValueError(
                f"infinite values are not allowed; got {_where(name, array, names, infinite)}"
            )
        missing = xp.isnan(array)
        if missing.any():
            if nan_policy != "omit":
                advice = "leave out the rows with missing values first"
                if nan_policy == "raise":
                    advice = "pass nan_policy='omit' to leave out rows with missing values"
                raise ValueError(f"NaN in {_where(name, array, names, missing)}; {advice}")
            rows = missing.any(axis=1) if array.ndim == 2 else missing
            drop = rows if drop is None else drop | rows
    remaining = n if drop is None else n - int(xp.count_nonzero(drop))
    if remaining < minimum:
        left = f"{remaining} left after omitting NaN" if remaining < n else f"{n}"
        raise ValueError(f"{' and '.join(values)} must have at least {minimum} rows; got {left}")
    if remaining > MAX_ROWS:
        raise ValueError(
            f"{' and '.join(values)} may have at most {MAX_ROWS:,} rows, the size up to which "
            f"the sums are proven exact; got {remaining:,}: take a random sample of rows"
        )
    if remaining < n:
        values = {name: array[~drop] for name, array in values.items()}
    return values


def column_label(index: int, names: list[str] | None) -> str:
    """A column in a message: its name and index, or its index."""
    return f"column {index}" if names is None else f"column {names[index]!r} (index {index})"


def column_list(indices: NDArray[np.intp], names: list[str] | None, most: int = 5) -> str:
    """Several columns in a message, the first few of many."""
    shown = ", ".join(column_label(int(k), names) for k in indices[:most])
    return shown + (f" and {len(indices) - most} more" if len(indices) > most else "")
