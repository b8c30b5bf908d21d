"""Registering functions as operators of PyTorch; needs torch."""

from collections.abc import Callable
from typing import Any

import torch

_library: Any = torch.library.Library("lcodec_ext", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Add an operator to torch.ops.lcodec_ext.

    The kernel serves CPU and CUDA tensors. A fallthrough is registered for autograd, which would
    otherwise warn that the operator has no backward pass.
    """
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"lcodec_ext::{name}", fake, lib=_library)
