"""A CUDA device as the compiled kernels see it."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from lcodec_ext import _core
from lcodec_ext._build import cuda_is_available, cuda_status


class Device:
    """A CUDA device as the kernels see it: entry points, current stream, guard.

    Tests put one in its place whose memory is the CPU's.

    Raises
    ------
    RuntimeError
        If this build or this machine cannot run the kernels.
    """

    module: Any = getattr(_core, "cuda", None)  # None in a build without CUDA

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if self.module is not None:
            with self.guard():
                if cuda_is_available():
                    return
        raise RuntimeError(
            f"tensors on device '{device}' need the CUDA backend, which is not there "
            f"({cuda_status()}) Pass CPU data instead, with .cpu()"
        )

    def guard(self) -> AbstractContextManager[None]:
        """Context in which this device is the current one."""
        return torch.cuda.device(self._device)

    def stream(self) -> int:
        """The device's current stream, a cudaStream_t."""
        return torch.cuda.current_stream(self._device).cuda_stream
