"""Put data on a GPU, wait for it, describe it, and measure what it can do at most.

With "cpu" as the device, data stay NumPy arrays and there is nothing to wait for.
"""

import statistics
import time
from functools import cache
from typing import Any, NamedTuple

import environment
import numpy as np
from numpy.typing import NDArray

SCHEDULERS = 4  # of a multiprocessor, on every GPU since Volta: each issues an instruction a cycle


def place(data: Any, device: str) -> Any:
    """Return the data with every array as a tensor on the device."""
    if device == "cpu":
        return data
    if isinstance(data, dict):
        return {key: place(value, device) for key, value in data.items()}
    if isinstance(data, np.ndarray):
        import torch

        return torch.from_numpy(data).to(device)
    return data


def fetch(array: Any) -> NDArray:
    """Return an array or tensor as an array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def wake(device: str, seconds: float = 0.02) -> None:
    """Keep the device busy for a moment, because an idle device lowers its clock."""
    if device == "cpu":
        return
    import torch

    matrix = torch.ones(2048, 2048, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()


def description() -> dict[str, Any]:
    """The current device, and the driver."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    # by its UUID, because nvidia-smi and CUDA number devices differently
    which = f"GPU-{found.uuid}" if hasattr(found, "uuid") else None
    described = environment.nvidia("driver_version", "clocks.max.sm", which=which)
    driver, clock = described[0] if described else (None, None)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30),
        "driver": driver,
        "max_clock_mhz": int(clock) if clock and clock.isdecimal() else None,
    }


def versions() -> dict[str, Any]:
    """Return the CUDA versions that the package and torch were compiled with."""
    import torch

    import lcodec_ext

    return {"nvcc": lcodec_ext.build_info()["cuda_version"], "torch_cuda": torch.version.cuda}


class Rates(NamedTuple):
    """The rates from which floors are computed.

    copy_bytes_per_second is measured: bytes read and written by a large copy on the device.
    warp_instructions_per_second is computed: what all schedulers issue at the device's highest
    clock; None if the clock is unknown.
    """

    copy_bytes_per_second: float
    warp_instructions_per_second: float | None


@cache
def rates() -> Rates:
    device = description()
    clock = device["max_clock_mhz"]
    issued = device["multiprocessors"] * SCHEDULERS * clock * 1e6 if clock else None
    return Rates(_copy_bandwidth(), issued)


def _copy_bandwidth() -> float:
    """Time copies of random numbers, many times as large as the caches."""
    import torch

    free, _total = torch.cuda.mem_get_info()
    source = torch.empty(min(2**28, free // 32), dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    wake("cuda")
    seconds = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds[2:])
