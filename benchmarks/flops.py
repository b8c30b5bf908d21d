"""Count floating point operations of matrix products and convolutions.

The formulas are PyTorch's (`torch.utils.flop_counter`). This module adds products with a vector and
the kernels of this package. A multiplication and an addition are two operations. Elementwise work,
normalisation, softmax and sums are not counted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lcodec_ext.curvature.kernels  # noqa: F401  registers the operators


def _gram(G: Tensor, v: Tensor, *_: Any) -> int:
    return 4 * len(G) * v.numel()


def _softmax_rows(A: Tensor, P: Tensor, V: Tensor, *_: Any) -> int:
    return 4 * len(A) * V.numel()


def _factored(Delta: Tensor, A: Tensor) -> int:
    return len(A) * (len(A) + 1) * (Delta.shape[1] + A.shape[1])


_MORE: dict[Any, Callable[..., int]] = {
    torch.ops.aten.dot: lambda a, b: 2 * a.numel(),
    torch.ops.aten.mv: lambda matrix, vector: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda vector, matrix, *_, **__: 2 * matrix.numel(),
    torch.ops.lcodec_ext.masked_gram_product: _gram,
    torch.ops.lcodec_ext.softmax_rows_product: _softmax_rows,
    torch.ops.lcodec_ext.factored_gram: _factored,
}


class _Counter(TorchDispatchMode):
    # FlopCounterMode itself follows modules by hooks, which torch.func.jvp of a gradient refuses
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _MORE:
            self.flops += _MORE[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        return result


def count(function: Callable[[], Any]) -> int:
    """Count the operations of a call."""
    with _Counter() as counter:
        function()
    return counter.flops
