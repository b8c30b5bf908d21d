"""How tests run lcodec_ext._cuda without a GPU: CPU tensors are treated as CUDA tensors."""

from contextlib import contextmanager, nullcontext
from unittest import mock

from lcodec_ext import _arrays
from lcodec_ext._torch import device as _device
from lcodec_ext.dependence.backends import cuda as _cuda


@contextmanager
def cuda_on_cpu(module, stream=lambda: 0):
    """Inside it CPU tensors run on the CUDA backend, and `module` replaces the kernels."""

    class Device:
        def __init__(self, device):
            self.module = module

        def guard(self):
            return nullcontext()

        def stream(self):
            return stream()

    with (
        mock.patch.object(_arrays, "DEVICE_TYPE", "cpu"),
        mock.patch.object(_cuda, "Device", Device),
        mock.patch.object(_device, "Device", Device),
    ):
        yield
