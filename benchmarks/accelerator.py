"""Data on a GPU, waiting for it, what it is and what it could do at most.

"cpu" stands for no device: data stay NumPy arrays, and nothing is waited for.
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
    """The data with every array as a tensor on the device."""
    if device == "cpu":
        return data
    if isinstance(data, dict):
        return {key: place(value, device) for key, value in data.items()}
    if isinstance(data, np.ndarray):
        import torch

        return torch.from_numpy(data).to(device)
    return data


def fetch(array: Any) -> NDArray:
    """An array or tensor as an array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def wake(device: str, seconds: float = 0.02) -> None:
    """Keep the device busy for a moment: an idle one has lowered its clock."""
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
    # by its identity, since nvidia-smi does not number devices as CUDA does
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
    """Of CUDA: what the package was compiled with, and what torch was."""
    import torch

    import lcodec_ext

    return {"nvcc": lcodec_ext.build_info()["cuda_version"], "torch_cuda": torch.version.cuda}


class Rates(NamedTuple):
    """What floors are computed from.

    Bytes a second, read and written, of a large copy on the device: measured. Warp instructions a
    second that all schedulers issue at the device's highest clock: computed, None where the clock
    is not known.
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
    """Of many times what the caches hold, and not of zeros."""
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
