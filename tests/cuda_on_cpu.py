"""A CUDA device whose memory is the CPU's, and the backend that computes on it."""

from contextlib import nullcontext

from lcodec_ext._torch.device import Device
from lcodec_ext.dependence.backends.cuda import CudaBackend


class DeviceOnCpu(Device):
    """CPU tensors lie on it; its kernels are those of a module."""

    def __init__(self, module, stream=lambda: 0):
        self.module, self.stream = module, stream

    def guard(self):
        return nullcontext()


def cuda_on_cpu(module, stream=lambda: 0):
    """A backend for `backend=`, which takes CPU tensors for CUDA tensors."""
    return CudaBackend(DeviceOnCpu(module, stream))
