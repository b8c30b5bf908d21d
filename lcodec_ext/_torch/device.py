"""A CUDA device as the compiled kernels see it."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from lcodec_ext import _core
from lcodec_ext._build import cuda_is_available, cuda_status

_KERNELS = getattr(_core, "cuda", None)  # None in a build without CUDA


class Device:
    """A CUDA device as the kernels see it: entry points, current stream, guard.

    Parameters
    ----------
    device : torch.device
    module
        The kernels' entry points: those of the compiled module, unless a test brings others.

    Raises
    ------
    RuntimeError
        If this build or this machine cannot run the kernels.
    """

    def __init__(self, device: torch.device, module: Any = _KERNELS) -> None:
        self._device, self.module = device, module
        if module is not None:
            with self.guard():
                if cuda_is_available():
                    return
        raise RuntimeError(
            f"tensors on device '{device}' need CUDA, which this build or machine does not offer. "
            f"{cuda_status()} Pass CPU data instead, with .cpu()"
        )

    def guard(self) -> AbstractContextManager[None]:
        """Context in which this device is the current one."""
        return torch.cuda.device(self._device)

    def stream(self) -> int:
        """The device's current stream, a cudaStream_t."""
        return torch.cuda.current_stream(self._device).cuda_stream


def device_of(tensor: torch.Tensor) -> Device | None:
    """The CUDA device of a tensor, None for any other."""
    return Device(tensor.device) if tensor.device.type == "cuda" else None
