"""NumPy arrays and torch tensors, told apart without importing torch."""

import sys
from typing import Any

DEVICE_TYPE = "cuda"  # of the tensors that backend="cuda" takes; tests emulate it with "cpu"


def is_tensor(value: object) -> bool:
    """Whether value is a torch tensor, without importing torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def on_device(value: Any) -> bool:
    """Whether value is a tensor that the CUDA backend computes on where it lies."""
    return is_tensor(value) and value.device.type == DEVICE_TYPE


def array_module(array: Any) -> Any:
    """NumPy or torch, whichever a validated array belongs to; they name much alike."""
    return sys.modules["torch" if is_tensor(array) else "numpy"]
