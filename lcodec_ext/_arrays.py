"""Tell NumPy arrays from tensors, and convert anything array-like.

torch and pandas are used only if they are loaded already.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXACT_INTEGER = 2**53


def is_tensor(value: object) -> bool:
    """Whether value is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def on_cuda(value: Any) -> bool:
    """Whether value is a tensor on a CUDA device."""
    return is_tensor(value) and value.device.type == "cuda"


def array_module(array: Any) -> Any:
    """NumPy or torch, whichever an array belongs to; they name much alike."""
    return sys.modules["torch" if is_tensor(array) else "numpy"]


def is_float(array: Any) -> bool:
    """Whether an array or tensor holds floating-point numbers."""
    return array.is_floating_point() if is_tensor(array) else array.dtype.kind == "f"


def beyond_float64(array: Any) -> bool:
    """Whether an array or tensor holds integers that float64 would merge."""
    if is_float(array) or array.dtype == bool or not array.shape[0]:
        return False
    if str(array.dtype) == "torch.uint64":  # torch knows no maximum of it
        array = array.view(array_module(array).int64)
        if array.min() < 0:  # 2**63 and more
            return True
    return max(int(array.max()), -int(array.min())) > _EXACT_INTEGER


def as_array(value: Any, name: str, *, tensors: bool | None = None) -> tuple[Any, list[str] | None]:
    """Anything array-like as an array of real numbers, and its column names if it has them.

    A NumPy array in native byte order, float16 as float32, missing values as NaN; or a tensor of a
    dtype that torch can sort and compare, or uint64.

    Parameters
    ----------
    value : array_like
    name : str
        What error messages call it.
    tensors : bool, optional
        Whether tensors stay tensors. By default those on a CUDA device do.
    """
    if value is None:
        raise ValueError(f"{name} must be an array of numbers; got None")
    if is_tensor(value):
        keep = on_cuda(value) if tensors is None else tensors
        return (_real_tensor if keep else _tensor_to_numpy)(value, name), None
    pandas = sys.modules.get("pandas")
    if pandas is not None and isinstance(value, pandas.DataFrame):
        return _from_frame(value, name)
    if pandas is not None and isinstance(value, pandas.Series | pandas.Index):
        return _real(_pandas_column(value, name), name), None
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise ValueError(
            f"{name} is sparse ({type(value).__name__}); expected a dense array: "
            f"pass {name}.toarray()"
        )
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        value = np.ma.filled(value.astype(np.result_type(value.dtype, np.float32)), np.nan)
    labels = getattr(value, "columns", None)
    named = isinstance(labels, list) and hasattr(value, "to_numpy")  # polars and its like
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be made into an array: {error}") from None
    return _real(array, name), [str(label) for label in labels or []] if named else None


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


def _from_frame(frame: Any, name: str) -> tuple[NDArray, list[str]]:
    """Column by column, because pandas makes bool beside float an object array."""
    names = [str(column) for column in frame.columns]
    columns = []
    for k, column in enumerate(names):
        label = f"column {column!r} (index {k}) of {name}"
        columns.append(_real(_pandas_column(frame.iloc[:, k], label), label))
    return np.column_stack(columns) if columns else np.empty((len(frame), 0)), names


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
    if not column.isna().any():
        return column.to_numpy(dtype=numpy_dtype)
    if beyond_float64(column.dropna().to_numpy(numpy_dtype)):
        raise ValueError(
            f"{label} holds integers beyond 2**53 and missing values; float64 cannot hold "
            "both: leave out the missing rows, or subtract an offset"
        )
    wide = numpy_dtype if numpy_dtype.kind == "f" else np.dtype(np.float64)
    return column.to_numpy(dtype=wide, na_value=np.nan)


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
