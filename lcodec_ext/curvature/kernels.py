"""The fused kernels of masked curvature, as PyTorch operators on CPU and CUDA tensors.

Importing this module registers ``torch.ops.lcodec_ext.masked_gram_product``,
``softmax_rows_product``, ``factored_gram``, ``segments_gather`` and ``segments_add_``; the
functions here call them. Sums are added in one written order (``lcodec/curvature.hpp`` and
``lcodec/cuda_curvature.hpp`` in ``csrc/include``): the bits of a result do not depend on the number
of threads, the SIMD level or the order in which a GPU runs its blocks. Those of CPU and CUDA
differ, within the error bounds stated there. Nothing waits for a CUDA device, and with segments
that are tensors there, all of it can be captured in a CUDA graph. There are no gradients.

Segments on the CPU are checked. On CUDA their values are taken on trust, so that nothing waits for
the device: wrong ones give wrong results, and never reach memory outside of the arguments.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcodec_ext import _core
from lcodec_ext._arrays import on_device
from lcodec_ext._threads import cpu_settings
from lcodec_ext._torch import device as _device
from lcodec_ext._torch.library import register

__all__ = [
    "factored_gram",
    "masked_gram_product",
    "segments_add_",
    "segments_gather",
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
        G, v, _as_segments(segments, 2, G), weights, damping
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
    weights : Tensor of shape (N,), optional
        One for each sample, of the dtype of P. Ones by default.
    damping : float, default 0.0

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


def segments_gather(parameters: Sequence[Tensor], segments: Segments, size: int) -> Tensor:
    """Copy stretches of several tensors into one vector, in one launch.

    Parameters
    ----------
    parameters : sequence of Tensor
        Contiguous, of one dtype (float32, float64 or bfloat16), on one device; stretches are of
        their flat views. On CUDA every 192 of them take a launch.
    segments : Tensor of int64, shape (count, 3), or sequence of triples
        (index of the parameter, start, length), in the order of the vector. A tensor on the
        parameters' device is used as it is.
    size : int
        What the lengths add up to; given, so that nothing has to be read from a device.

    Returns
    -------
    Tensor of shape (size,), of the parameters' dtype

    Raises
    ------
    ValueError
        If an argument is not as described; it is named.

    Notes
    -----
    O(size).

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature.kernels import segments_gather
    >>> weight, bias = torch.arange(6.0).reshape(2, 3), torch.tensor([7.0, 8.0])
    >>> segments_gather([weight, bias], [(0, 3, 3), (1, 1, 1)], 4)
    tensor([3., 4., 5., 8.])
    """
    parameters = list(parameters)
    _check_parameters(parameters)
    table = _as_segments(segments, 3, parameters[0])
    return torch.ops.lcodec_ext.segments_gather(parameters, table, size)


def segments_add_(
    parameters: Sequence[Tensor], segments: Segments, x: Tensor, alpha: float = 1.0
) -> None:
    """Add a multiple of a vector to stretches of several tensors, in place, in one launch.

    Parameters
    ----------
    parameters, segments
        As for `segments_gather`; stretches of a parameter must not overlap.
    x : Tensor of shape (size,)
        float64 for float64 parameters, float32 otherwise: sums are rounded to bfloat16 once.
    alpha : float, default 1.0

    Raises
    ------
    ValueError
        If an argument is not as described; it is named.
    RuntimeError
        If a parameter requires a gradient outside of ``torch.no_grad()``.

    Notes
    -----
    O(size).

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature.kernels import segments_add_
    >>> bias = torch.tensor([7.0, 8.0])
    >>> segments_add_([bias], [(0, 1, 1)], torch.tensor([2.0]), alpha=-0.5)
    >>> bias
    tensor([7., 7.])
    """
    parameters = list(parameters)
    _check_parameters(parameters)
    torch.ops.lcodec_ext.segments_add_(
        parameters, _as_segments(segments, 3, parameters[0]), x, alpha
    )


# ------------------------------------------------------------------------------------------------
# Checks, of shapes alone where tensors have no values


def _shown(tensor: Tensor) -> str:
    return f"a tensor of {tensor.dtype}, shape {tuple(tensor.shape)}"


def _as_segments(segments: Segments, words: int, like: Tensor) -> Tensor:
    """A table of segments on the device of `like`."""
    if isinstance(segments, Tensor):
        return segments
    try:
        rows = [[operator.index(word) for word in segment] for segment in segments]
    except TypeError:
        rows = [[]]
    if any(len(row) != words for row in rows):
        raise ValueError(
            f"segments must be int64 of shape (count, {words}), or a sequence of {words} integers "
            f"each; got {segments!r:.200}"
        )
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, words).to(like.device)


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


def _check_table(segments: Tensor, words: int) -> None:
    if segments.dtype != torch.int64 or segments.ndim != 2 or segments.shape[1] != words:
        raise ValueError(
            f"segments must be int64 of shape (count, {words}); got {_shown(segments)}"
        )


def _check_values(segments: Tensor, size: int, where: str) -> None:
    """Refuse segments (start, length), whose values can be seen, that are no `size` columns."""
    total = int(segments[:, -1].sum())
    if (segments < 0).any():
        raise ValueError(f"segments must not be negative; got {segments.min().item()}")
    if total != size:
        raise ValueError(f"segments have {total} elements in all; expected {size}, as {where} has")


def _check_gram(G: Tensor, v: Tensor, segments: Tensor, weights: Tensor | None) -> None:
    _check_matrix("G", G, tuple(_COMPUTED))
    dtype = _COMPUTED[G.dtype]
    if v.dtype != dtype or v.ndim not in (1, 2):
        raise ValueError(
            f"v must be {dtype} for a G of {G.dtype}, of shape (size,) or (size, m); got "
            f"{_shown(v)}"
        )
    _check_device("v", v, "G", G.device)
    _check_table(segments, 2)
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


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError("parameters must be one tensor or more; got none")
    first = parameters[0]
    for k, parameter in enumerate(parameters):
        if parameter.dtype not in _COMPUTED or parameter.dtype != first.dtype:
            raise ValueError(
                "parameters must be float32, float64 or bfloat16, all the same; parameter 0 is "
                f"{first.dtype}, parameter {k} is {parameter.dtype}"
            )
        if not parameter.is_contiguous():
            raise ValueError(
                f"parameters must be contiguous; parameter {k}, of shape "
                f"{tuple(parameter.shape)}, has strides {parameter.stride()}"
            )
        _check_device(f"parameter {k}", parameter, "parameter 0", first.device)


def _check_stretches(parameters: Sequence[Tensor], segments: Tensor) -> None:
    _check_parameters(parameters)
    _check_table(segments, 3)
    _check_device("segments", segments, "parameter 0", parameters[0].device)


def _check_stretch_values(parameters: Sequence[Tensor], segments: Tensor, size: int) -> None:
    _check_values(segments, size, "the vector")
    sizes = torch.tensor([parameter.numel() for parameter in parameters])
    index, start, length = segments.unbind(1)
    if len(segments) and int(index.max()) >= len(parameters):
        raise ValueError(
            f"segments name parameter {int(index.max())}; there are {len(parameters)} parameters"
        )
    # start + length might be too large for an int64
    beyond = (start > sizes[index] - length).nonzero()[:, 0].tolist()
    if beyond:
        k = beyond[0]
        raise ValueError(
            f"segment {k} ends at {int(start[k]) + int(length[k])}, behind parameter "
            f"{int(index[k])} of {int(sizes[index[k]])} elements"
        )


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
    number = module.cuda_rows_product_bytes(
        matrix.shape[0], size, m, matrix.element_size(), module.CUDA_CHUNK_BYTES
    )
    return matrix.new_empty(number, dtype=torch.uint8)


def _device_of(tensor: Tensor) -> Any:
    return _device.Device(tensor.device)


def _masked_gram_product(
    G: Tensor, v: Tensor, segments: Tensor, weights: Tensor | None, damping: float
) -> Tensor:
    _check_gram(G, v, segments, weights)
    G, v, segments, weights = _plain(G, v, segments, weights)
    N, d = G.shape
    size, m = v.shape[0], 1 if v.ndim == 1 else v.shape[1]
    table, weights = segments.contiguous(), _contiguous(weights)
    vectors = (v if v.ndim == 1 else v.t()).contiguous()  # by vector
    out = torch.empty_like(vectors)
    name, stride = _NAMES[G.dtype], _row_stride(G)
    if not on_device(G):
        _check_values(table, size, "v")
        _check_order(table, d)
        if out.numel():
            _core.masked_gram_product(
                name, _address(G), N, stride, _address(table), len(table), size, _address(weights),
                _address(vectors), m, damping, _address(out), *cpu_settings(),
            )  # fmt: skip
    elif out.numel():
        device = _device_of(G)
        if d == 0:
            raise ValueError(f"G must have columns where v has elements; got {_shown(G)}")
        with device.guard():
            workspace = _workspace(device.module, G, size, m)
            device.module.cuda_masked_gram_product(
                name, _address(G), N, d, stride, _address(table), len(table), size,
                _address(weights), _address(vectors), m, damping, _address(out),
                _address(workspace), device.module.CUDA_CHUNK_BYTES, device.stream(),
            )  # fmt: skip
    return out if v.ndim == 1 else out.t().contiguous()


def _check_order(segments: Tensor, d: int) -> None:
    start, length = segments.unbind(1)
    wrong = (start > d - length).nonzero()[:, 0].tolist()  # start + length might be too large
    if wrong:
        k = wrong[0]
        last = int(start[k]) + int(length[k])
        raise ValueError(f"segment {k} ends at {last}, behind the {d} of G")
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
    (N, D), m = A.shape, len(V)
    P, V, weights = P.contiguous(), V.contiguous(), _contiguous(weights)
    out = torch.empty_like(V)
    if not out.numel():
        return out
    name, stride = _NAMES[A.dtype], _row_stride(A)
    if not on_device(A):
        _core.softmax_rows_product(
            name, _address(A), N, stride, D, _address(P), _address(weights), _address(V), m,
            damping, _address(out), *cpu_settings(),
        )  # fmt: skip
        return out
    device = _device_of(A)
    with device.guard():
        segments = torch.zeros(2, dtype=torch.int64, device=A.device)
        segments[1] = D
        workspace = _workspace(device.module, A, D, m)
        device.module.cuda_softmax_rows_product(
            name, _address(A), N, D, stride, _address(segments), _address(P), _address(weights),
            _address(V), m, damping, _address(out), _address(workspace),
            device.module.CUDA_CHUNK_BYTES, device.stream(),
        )  # fmt: skip
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
    arguments = (
        _NAMES[A.dtype], _address(Delta), _row_stride(Delta), Delta.shape[1], _address(A),
        _row_stride(A), A.shape[1], N, _address(out),
    )  # fmt: skip
    if not on_device(A):
        _core.factored_gram(*arguments, *cpu_settings())
        return out
    device = _device_of(A)
    with device.guard():
        device.module.cuda_factored_gram(*arguments, device.stream())
    return out


def _fake_factored_gram(Delta: Tensor, A: Tensor) -> Tensor:
    _check_factors(Delta, A)
    return A.new_empty((A.shape[0], A.shape[0]))


def _segments_gather(parameters: list[Tensor], segments: Tensor, size: int) -> Tensor:
    _check_stretches(parameters, segments)
    if size < 0:
        raise ValueError(f"size must not be negative; got {size}")
    parameters, table = _plain(*parameters), segments.contiguous()
    out = parameters[0].new_empty(size)
    addresses = [_address(parameter) for parameter in parameters]
    name = _NAMES[out.dtype]
    if not on_device(out):
        _check_stretch_values(parameters, table, size)
        _core.segments_gather(name, addresses, _address(table), len(table), _address(out))
    elif len(table):
        device = _device_of(out)
        sizes = [parameter.numel() for parameter in parameters]
        with device.guard():
            device.module.cuda_segments_gather(
                name, addresses, sizes, _address(table), len(table), size, _address(out),
                device.stream(),
            )  # fmt: skip
    return out


def _fake_segments_gather(parameters: list[Tensor], segments: Tensor, size: int) -> Tensor:
    _check_stretches(parameters, segments)
    return parameters[0].new_empty(size)


def _segments_add_(parameters: list[Tensor], segments: Tensor, x: Tensor, alpha: float) -> None:
    _check_addition(parameters, segments, x)
    for k, parameter in enumerate(parameters):
        if parameter.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"parameter {k} requires a gradient and cannot be changed in place; do it under "
                "torch.no_grad()"
            )
    table = segments.contiguous()
    if not on_device(x):
        _check_stretch_values(parameters, table, len(x))
    if not torch.is_inference_mode_enabled():  # saved tensors are known to be out of date
        torch.autograd.graph.increment_version(parameters)
    x, *parameters = _plain(x, *parameters)
    x = x.contiguous()
    addresses = [_address(parameter) for parameter in parameters]
    name = _NAMES[parameters[0].dtype]
    if not on_device(x):
        _core.segments_add(name, addresses, _address(table), len(table), alpha, _address(x))
    elif len(table):
        device = _device_of(x)
        sizes = [parameter.numel() for parameter in parameters]
        with device.guard():
            device.module.cuda_segments_add(
                name, addresses, sizes, _address(table), len(table), len(x), alpha, _address(x),
                device.stream(),
            )  # fmt: skip


def _check_addition(parameters: list[Tensor], segments: Tensor, x: Tensor) -> None:
    _check_stretches(parameters, segments)
    if x.ndim != 1:
        raise ValueError(f"x must have shape (size,); got {_shown(x)}")
    _check_like("x", x, (x.shape[0],), "parameter 0", parameters[0])


def _fake_segments_add_(
    parameters: list[Tensor], segments: Tensor, x: Tensor, alpha: float
) -> None:
    _check_addition(parameters, segments, x)


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
    (
        "segments_gather(Tensor[] parameters, Tensor segments, SymInt size) -> Tensor",
        _segments_gather,
        _fake_segments_gather,
    ),
    (
        "segments_add_(Tensor(a!)[] parameters, Tensor segments, Tensor x, float alpha) -> ()",
        _segments_add_,
        _fake_segments_add_,
    ),
):
    register(_schema, _kernel, _fake)
