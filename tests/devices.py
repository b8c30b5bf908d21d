"""Where CUDA kernels are tested: by the emulator in several orders, and on a GPU if any."""

import numpy as np
import pytest
import torch

import lcodec_ext
from lcodec_ext import _core, _emulated

GUARD = 64  # bytes behind every output, which kernels must leave as they are
RUBBISH = 0xA5


class Emulator:
    """Memory of the host, which under emulation is the device's."""

    module = _emulated.cuda
    stream = 0
    marks = ()

    def __init__(self, order, seed):
        self.name = f"{order}{seed}"
        self._order = order, seed

    def start(self):
        _emulated.configure(*self._order)

    def finish(self):
        _emulated.configure("forward")

    def _to_device(self, data):
        return data

    def _to_host(self, memory):
        return memory

    def _address(self, memory):
        return memory.ctypes.data

    def to_device(self, array):
        """An array's copy on the device, with nothing behind it: ASan sees a read there."""
        return self._place(np.ascontiguousarray(array), 0)

    def empty(self, shape, dtype):
        """Memory for an output, in which every byte is rubbish."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        rubbish = np.full(size, RUBBISH, dtype=np.uint8)
        return self._place(rubbish.view(dtype).reshape(shape), GUARD)

    def to_host(self, array):
        """What an output holds; an error if something behind it was written."""
        data = self._to_host(array.memory)
        size = len(data) - GUARD
        assert (data[size:] == RUBBISH).all(), "written behind an array"
        return data[:size].view(array.dtype).reshape(array.shape).copy()

    def _place(self, array, guard):
        data = np.full(array.nbytes + guard, RUBBISH, dtype=np.uint8)
        data[: array.nbytes] = array.reshape(-1).view(np.uint8)
        memory = self._to_device(data)
        return DeviceArray(self._address(memory), memory, array.shape, array.dtype)


class Gpu(Emulator):
    """Memory of torch."""

    module = getattr(_core, "cuda", None)
    name = "cuda"
    marks = pytest.mark.cuda

    def __init__(self):
        pass

    def start(self):
        pass

    def finish(self):
        pass

    def _to_device(self, data):
        return torch.from_numpy(data).cuda()

    def _to_host(self, memory):
        return memory.cpu().numpy()

    def _address(self, memory):
        return memory.data_ptr()

    @property
    def stream(self):
        return torch.cuda.current_stream().cuda_stream


class DeviceArray:
    """``int(array)`` is its address."""

    def __init__(self, address, memory, shape, dtype):
        self.address, self.memory, self.shape, self.dtype = address, memory, shape, dtype

    def __int__(self):
        return self.address

    __index__ = __int__


ORDERS = [("forward", 0), ("reversed", 0), ("shuffled", 1)]
EMULATED = [Emulator(*order) for order in ORDERS]
GPU = [Gpu()] if torch.cuda.is_available() and lcodec_ext.cuda_is_available() else []
DEVICES = EMULATED + GPU
PARAMETERS = [pytest.param(device, marks=device.marks, id=device.name) for device in DEVICES]
