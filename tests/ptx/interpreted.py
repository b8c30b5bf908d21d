"""Where kernels are tested as nvcc compiled them: a PTX interpreter's device, and its memory."""

import re
from contextlib import contextmanager

import _interpreted  # in build/ptx, by `make check-ptx`
import numpy as np
import torch

from cuda_on_cpu import DeviceOnCpu
from devices import DeviceArray, Emulator

MODULE = _interpreted.cuda


class Memory:
    """Device memory of its exact size: an access behind it is a mistake at once."""

    def __init__(self, size):
        self.address = _interpreted.allocate(size)

    def __del__(self):
        _interpreted.free(self.address)


class Interpreter(Emulator):
    """The device for tests that take one, in an order of warps and blocks."""

    module = MODULE

    def start(self):
        _interpreted.configure(*self._order)

    def finish(self):
        _interpreted.configure("forward")

    def to_device(self, array):
        array = np.ascontiguousarray(array)
        memory = Memory(array.nbytes)
        _interpreted.write(memory.address, array.reshape(-1).view(np.uint8))
        return DeviceArray(memory.address, memory, array.shape, array.dtype)

    def empty(self, shape, dtype):
        memory = Memory(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return DeviceArray(memory.address, memory, np.empty(shape).shape, np.dtype(dtype))

    def to_host(self, array):
        size = int(np.prod(array.shape)) * array.dtype.itemsize
        return _interpreted.read(array.address, size).view(array.dtype).reshape(array.shape)


def adopted_address(tensor, data_ptr=torch.Tensor.data_ptr):
    """A CPU tensor's address, which kernels may then use as far as the tensor's memory goes."""
    storage = tensor.untyped_storage()
    if storage.nbytes():
        _interpreted.adopt(storage.data_ptr(), storage.nbytes())
    return data_ptr(tensor)


def device_of(tensor):
    """As that of the package, for CPU tensors."""
    return DeviceOnCpu(MODULE)


def kernels_named(name):
    """Mangled names of this package's kernels that start with this name; then come types."""
    return [k for k in _interpreted.kernel_names() if re.match(rf"_ZN6lcodec4cuda\d+{name}", k)]


@contextmanager
def changed(name, pattern, replacement, count=0):
    """The kernel of this name in whose PTX the pattern is replaced, everywhere or so often."""
    (kernel,) = kernels_named(name)
    source = _interpreted.kernel_source(kernel)
    other, found = re.subn(pattern, replacement, source, count=count)
    assert found > 0
    try:
        _interpreted.replace_source(kernel, other)
        yield
    finally:
        _interpreted.replace_source(kernel, source)
