"""The fused kernels of masked curvature, as PyTorch operators on CPU and CUDA tensors.

Importing this module registers ``torch.ops.lcodec_ext.masked_gram_product``,
``softmax_rows_product`` and ``factored_gram``; the functions here call them. Sums are added in one
written order (``lcodec/curvature.hpp`` and ``lcodec/cuda_curvature.hpp`` in ``csrc``): the bits of
a result do not depend on the number of threads, the SIMD level or the order in which a GPU runs its
blocks. Those of CPU and CUDA differ, within the error bounds stated there. Nothing waits for a CUDA
device, and with segments that are tensors there, all of it can be captured in a CUDA graph.
Gradients are not available.

Segments on the CPU are checked. On CUDA their values are taken on trust, so that nothing waits for
the device: wrong ones give wrong results, and never reach memory outside of the arguments.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcodec_ext import _core
from lcodec_ext._threads import cpu_settings
from lcodec_ext._torch.device import device_of
from lcodec_ext._torch.library import register

__all__ = [
    "factored_gram",
    "masked_gram_product",
    "softmax_rows_product",
]

_COMPUTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

Segments = Tensor | Sequence[Sequence[int]]


def masked_gram_product(
    G: Tensor,
    v: Tensor,
    segments: Segments,
    weights: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Multiply by the weighted Gram matrix of selected columns, plus damping.

    ``out = (1/N) sum_i w_i g_i (g_i . v) + damping v``, with g_i the selected columns of row i of
    G: for per-sample gradients G, the empirical Fisher matrix restricted to these columns. G is
    read once, in place.

    Parameters
    ----------
    G : Tensor of float32, float64 or bfloat16, shape (N, d)
        Any distance between rows, elements of a row side by side: ``G.stride(1) == 1``. N may be 0:
        the sum is then 0.
    v : Tensor, shape (size,) or (size, m)
        One or m vectors over the selected columns, in their order. float64 for a float64 G, float32
        otherwise; so are all sums.
    segments : Tensor of int64, shape (count, 2), or sequence of pairs
        (start, length) of stretches of columns, ascending and apart; their lengths add up to size.
        A tensor on the device of G is used as it is.
    weights : Tensor of shape (N,), optional
        One for each row, of the dtype of v. Ones by default.
    damping : float, default 0.0

    Returns
    -------
    Tensor of the shape and dtype of v

    Raises
    ------
    ValueError
        If an argument is not as described; it is named.

    Notes
    -----
    O(N size m) operations, N size elements of G moved. Each column of v gives the bits that it
    gives alone.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature.kernels import masked_gram_product
    >>> G = torch.tensor([[1.0, 9.0, 2.0], [3.0, 9.0, 4.0]])
    >>> masked_gram_product(G, torch.tensor([1.0, 1.0]), [(0, 1), (2, 1)], damping=0.5)
    tensor([12.5000, 17.5000])
    """
    return torch.ops.lcodec_ext.masked_gram_product(
        G, v, _as_segments(segments, G), weights, damping
    )


def softmax_rows_product(
    A: Tensor,
    P: Tensor,
    V: Tensor,
    weights: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """Multiply by the Hessian of softmax cross-entropy in selected rows of a linear layer.

    ``out = Q^T A + damping V``, where ``U = A V^T`` and row i of Q is
    ``w_i p_i * (u_i - p_i . u_i) / N``: exact for the mean loss over N samples, labels of any kind.

    Parameters
    ----------
    A : Tensor of float32, float64 or bfloat16, shape (N, D)
        Inputs of the layer; a column of ones for the bias. ``A.stride(1) == 1``. N may be 0.
    P : Tensor of shape (N, r)
        Softmax probabilities of the selected rows: r of the layer's outputs. float64 for a float64
        A, float32 otherwise.
    V : Tensor of shape (r, D)
        Of the dtype of P.
    weights, damping
        As for `masked_gram_product`, weights of the dtype of P.

    Returns
    -------
    Tensor of the shape and dtype of V

    Raises
    ------
    ValueError
        If an argument is not as described; it is named.

    Notes
    -----
    O(N r D) operations, one pass over A.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature.kernels import softmax_rows_product
    >>> A, P = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5]])
    >>> softmax_rows_product(A, P, torch.tensor([[1.0, 0.0]]))
    tensor([[0.2500, 0.5000]])
    """
    return torch.ops.lcodec_ext.softmax_rows_product(A, P, V, weights, damping)


def factored_gram(Delta: Tensor, A: Tensor) -> Tensor:
    """Gram matrix of factored rows: ``(Delta Delta^T) * (A A^T)``, elementwise.

    Row i stands for the outer product of Delta_i and A_i, the gradient of a sample in selected rows
    of a linear layer. Neither product is stored.

    Parameters
    ----------
    Delta, A : Tensor of float32 or float64, shapes (N, r) and (N, d)
        Of one dtype, with elements of a row side by side. ``N >= 1``.

    Returns
    -------
    Tensor of shape (N, N)
        Symmetric, bit for bit.

    Raises
    ------
    ValueError
        If an argument is not as described; it is named.

    Notes
    -----
    O(N^2 (r + d)) operations, half of them left out for symmetry.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature.kernels import factored_gram
    >>> factored_gram(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    tensor([[ 2.,  6.],
            [ 6., 36.]])
    """
    return torch.ops.lcodec_ext.factored_gram(Delta, A)


# ------------------------------------------------------------------------------------------------
# Checks, of shapes alone where tensors have no values


def _shown(tensor: Tensor) -> str:
    return f"a tensor of {tensor.dtype}, shape {tuple(tensor.shape)}"


def _as_segments(segments: Segments, like: Tensor) -> Tensor:
    """A table of segments on the device of `like`."""
    if isinstance(segments, Tensor):
        return segments
    try:
        rows = [[operator.index(word) for word in segment] for segment in segments]
    except TypeError:
        rows = [[]]
    if any(len(row) != 2 for row in rows):
        raise ValueError(
            "segments must be int64 of shape (count, 2), or a sequence of 2 integers each; got "
            f"{segments!r:.200}"
        )
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).to(like.device)


def _check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(
            f"all arguments must be on one device; {other} is on '{device}', {name} is on "
            f"'{tensor.device}'"
        )


def _check_matrix(name: str, matrix: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if matrix.dtype not in dtypes or matrix.ndim != 2:
        listed = [_NAMES[dtype] for dtype in dtypes]
        raise ValueError(
            f"{name} must be {', '.join(listed[:-1])} or {listed[-1]} and have two dimensions; got "
            f"{_shown(matrix)}"
        )
    if min(matrix.shape[0], matrix.shape[1] - 1) > 0 and matrix.stride(1) != 1:
        raise ValueError(
            f"{name} must have the elements of a row side by side; its strides are "
            f"{matrix.stride()}: pass {name}.contiguous()"
        )


def _check_like(
    name: str, tensor: Tensor, shape: tuple[int, ...], other: str, matrix: Tensor
) -> None:
    dtype = _COMPUTED[matrix.dtype]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} must be {dtype} of shape {shape} for {other}, {_shown(matrix)}; got "
            f"{_shown(tensor)}"
        )
    _check_device(name, tensor, other, matrix.device)


def _check_table(segments: Tensor) -> None:
    if segments.dtype != torch.int64 or segments.ndim != 2 or segments.shape[1] != 2:
        raise ValueError(f"segments must be int64 of shape (count, 2); got {_shown(segments)}")


def _check_values(segments: Tensor, size: int) -> None:
    """Refuse segments (start, length) that do not select `size` columns; reads their values."""
    total = int(segments[:, -1].sum())
    if (segments < 0).any():
        raise ValueError(f"segments must not be negative; got {segments.min().item()}")
    if total != size:
        raise ValueError(f"segments have {total} elements in all; expected {size}, as v has")


def _check_gram(G: Tensor, v: Tensor, segments: Tensor, weights: Tensor | None) -> None:
    _check_matrix("G", G, tuple(_COMPUTED))
    dtype = _COMPUTED[G.dtype]
    if v.dtype != dtype or v.ndim not in (1, 2):
        raise ValueError(
            f"v must be {dtype} for a G of {G.dtype}, of shape (size,) or (size, m); got "
            f"{_shown(v)}"
        )
    _check_device("v", v, "G", G.device)
    _check_table(segments)
    _check_device("segments", segments, "G", G.device)
    if weights is not None:
        _check_like("weights", weights, (G.shape[0],), "G", G)


def _check_softmax(A: Tensor, P: Tensor, V: Tensor, weights: Tensor | None) -> None:
    _check_matrix("A", A, tuple(_COMPUTED))
    if P.ndim != 2:
        raise ValueError(f"P must have shape (N, r); got {_shown(P)}")
    _check_like("P", P, (A.shape[0], P.shape[1]), "A", A)
    _check_like("V", V, (P.shape[1], A.shape[1]), "A", A)
    if weights is not None:
        _check_like("weights", weights, (A.shape[0],), "A", A)


def _check_factors(Delta: Tensor, A: Tensor) -> None:
    for name, matrix in (("Delta", Delta), ("A", A)):
        _check_matrix(name, matrix, (torch.float32, torch.float64))
    if A.dtype != Delta.dtype or A.shape[0] != Delta.shape[0] or A.shape[0] == 0:
        raise ValueError(
            "Delta and A must have one dtype and the same number of rows, at least one; got "
            f"{_shown(Delta)}, and {_shown(A)}"
        )
    _check_device("A", A, "Delta", Delta.device)


# ------------------------------------------------------------------------------------------------
# The kernels


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _plain(*tensors: Tensor | None) -> list[Any]:
    """Tensors as their memory has them: no gradients, no lazy negation."""
    return [None if t is None else t.detach().resolve_neg() for t in tensors]


def _contiguous(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.contiguous()


def _row_stride(matrix: Tensor) -> int:
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _workspace(module: Any, matrix: Tensor, size: int, m: int) -> Tensor:
    number = module.rows_product_bytes(
        matrix.shape[0], size, m, matrix.element_size(), module.CHUNK_BYTES
    )
    return matrix.new_empty(number, dtype=torch.uint8)


def _rows_product(
    x: Tensor,
    segments: Tensor | None,
    size: int,
    v: Tensor,
    weights: Tensor | None,
    damping: float,
    out: Tensor,
    p: Tensor | None = None,
) -> "_core.RowsProduct":
    """What the compiled products take, by name; v and out have a row for each vector."""
    return {
        "dtype": _NAMES[x.dtype],
        "x": x.data_ptr(),
        "n": x.shape[0],
        "d": x.shape[1],
        "stride": _row_stride(x),
        "segments": _address(segments),
        "count": 1 if segments is None else segments.numel() // 2,
        "size": size,
        "p": _address(p),
        "weight": _address(weights),
        "v": v.data_ptr(),
        "m": v.numel() // size,
        "damping": damping,
        "out": out.data_ptr(),
    }


def _masked_gram_product(
    G: Tensor, v: Tensor, segments: Tensor, weights: Tensor | None, damping: float
) -> Tensor:
    _check_gram(G, v, segments, weights)
    G, v, segments, weights = _plain(G, v, segments, weights)
    d, size = G.shape[1], v.shape[0]
    table, weights = segments.contiguous(), _contiguous(weights)
    vectors = (v if v.ndim == 1 else v.t()).contiguous()  # by vector
    out = torch.empty_like(vectors)
    device = device_of(G)
    if device is None:
        _check_values(table, size)
        _check_order(table, d)
        if out.numel():
            given = _rows_product(G, table, size, vectors, weights, damping, out)
            _core.curvature.masked_gram_product(given, *cpu_settings())
    elif out.numel():
        if d == 0:
            raise ValueError(f"G must have columns where v has elements; got {_shown(G)}")
        with device.guard():
            given = _rows_product(G, table, size, vectors, weights, damping, out)
            workspace = _workspace(device.module, G, size, given["m"])
            device.module.masked_gram_product(
                given, _address(workspace), device.module.CHUNK_BYTES, device.stream()
            )
    return out if v.ndim == 1 else out.t().contiguous()


def _check_order(segments: Tensor, d: int) -> None:
    start, length = segments.unbind(1)
    wrong = (start > d - length).nonzero()[:, 0].tolist()  # start + length might be too large
    if wrong:
        k = wrong[0]
        last = int(start[k]) + int(length[k])
        raise ValueError(f"segment {k} ends at {last}, and G has {d} columns")
    end = start + length
    wrong = (start[1:] < end[:-1]).nonzero()[:, 0].tolist()
    if wrong:
        k = wrong[0] + 1
        raise ValueError(
            f"segments must ascend and not overlap; segment {k} starts at {int(start[k])}, the one "
            f"before ends at {int(end[k - 1])}"
        )


def _fake_masked_gram_product(
    G: Tensor, v: Tensor, segments: Tensor, weights: Tensor | None, damping: float
) -> Tensor:
    _check_gram(G, v, segments, weights)
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _softmax_rows_product(
    A: Tensor, P: Tensor, V: Tensor, weights: Tensor | None, damping: float
) -> Tensor:
    _check_softmax(A, P, V, weights)
    A, P, V, weights = _plain(A, P, V, weights)
    D = A.shape[1]
    P, V, weights = P.contiguous(), V.contiguous(), _contiguous(weights)
    out = torch.empty_like(V)
    if not out.numel():
        return out
    device = device_of(A)
    if device is None:
        given = _rows_product(A, None, D, V, weights, damping, out, P)
        _core.curvature.softmax_rows_product(given, *cpu_settings())
        return out
    with device.guard():
        segments = torch.zeros(2, dtype=torch.int64, device=A.device)
        segments[1] = D
        workspace = _workspace(device.module, A, D, len(V))
        given = _rows_product(A, segments, D, V, weights, damping, out, P)
        device.module.softmax_rows_product(
            given, _address(workspace), device.module.CHUNK_BYTES, device.stream()
        )
    return out


def _fake_softmax_rows_product(
    A: Tensor, P: Tensor, V: Tensor, weights: Tensor | None, damping: float
) -> Tensor:
    _check_softmax(A, P, V, weights)
    return torch.empty_like(V, memory_format=torch.contiguous_format)


def _factored_gram(Delta: Tensor, A: Tensor) -> Tensor:
    _check_factors(Delta, A)
    Delta, A = _plain(Delta, A)
    N = len(A)
    out = A.new_empty((N, N))
    given: _core.FactoredGram = {
        "dtype": _NAMES[A.dtype],
        "delta": Delta.data_ptr(),
        "delta_stride": _row_stride(Delta),
        "r": Delta.shape[1],
        "a": A.data_ptr(),
        "a_stride": _row_stride(A),
        "d": A.shape[1],
        "n": N,
        "k": out.data_ptr(),
    }
    device = device_of(A)
    if device is None:
        _core.curvature.factored_gram(given, *cpu_settings())
        return out
    with device.guard():
        device.module.factored_gram(given, device.stream())
    return out


def _fake_factored_gram(Delta: Tensor, A: Tensor) -> Tensor:
    _check_factors(Delta, A)
    return A.new_empty((A.shape[0], A.shape[0]))


for _schema, _kernel, _fake in (
    (
        "masked_gram_product(Tensor G, Tensor v, Tensor segments, Tensor? weights, float damping)"
        " -> Tensor",
        _masked_gram_product,
        _fake_masked_gram_product,
    ),
    (
        "softmax_rows_product(Tensor A, Tensor P, Tensor V, Tensor? weights, float damping)"
        " -> Tensor",
        _softmax_rows_product,
        _fake_softmax_rows_product,
    ),
    ("factored_gram(Tensor Delta, Tensor A) -> Tensor", _factored_gram, _fake_factored_gram),
):
    register(_schema, _kernel, _fake)
