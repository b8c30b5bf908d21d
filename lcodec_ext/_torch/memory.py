"""How much memory is available."""

from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")
_NONE = 2**60  # bytes: more is how version 1 says that there is no limit


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on a device now; None where nothing tells.

    Of a CUDA device what is free, and what PyTorch has reserved and not given out. Of a CPU under
    Linux what the system calls available, and what its control groups leave, of version 1 or 2:
    the least of them, as containers and batch systems set it.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle
    if device.type != "cpu":
        return None
    return min((*_of_system(), *_of_groups()), default=None)


def _of_system() -> Iterator[int]:
    for line in _lines(_ROOT / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield 1024 * int(value.split()[0])


def _of_groups() -> Iterator[int]:
    """What every control group that this process is in leaves, those above included."""
    mounted = _ROOT / "sys/fs/cgroup"
    for line in _lines(_ROOT / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            tops, names = [mounted, mounted / "unified"], ("memory.max", "memory.current")
            cache = "inactive_file"
        elif "memory" in controllers.split(","):
            tops, names = [mounted / "memory"], ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = "total_inactive_file"
        else:
            continue
        for top in tops:
            folder = top / path.lstrip("/")  # in a container it may be another, and only top is
            for each in (folder, *folder.parents):
                if each == top or top in each.parents:
                    yield from _left(each, *names, cache)


def _left(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    """What a control group leaves; files that it read and may forget do not count as used."""
    most = _number(folder / limit)
    if most is None or most > _NONE or (taken := _number(folder / used)) is None:
        return
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == cache:
            taken -= int(value)
    yield max(0, most - taken)


def _number(path: Path) -> int | None:
    text = next(_lines(path), "max")
    return None if text == "max" else int(text)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text().splitlines()
    except OSError:
        return
