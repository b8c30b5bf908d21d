"""How many threads the compiled code uses, and which instructions."""

import functools
import math
import os
import threading
from importlib.util import find_spec
from pathlib import Path

from lcodec_ext._checks import check_integer

try:
    import threadpoolctl
except ImportError:
    threadpoolctl = None

_MAX_THREADS = 1024
_PROC, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")

_threads: int | None = None
_limit: int | None = None  # that of threadpoolctl, while it lasts


class _Here(threading.local):
    threads: int | None = None  # those for work that starts on this Python thread


_here = _Here()


def set_num_threads(threads: int) -> None:
    """Set how many CPU threads the package uses; results do not depend on it.

    Parameters
    ----------
    threads : int
        From 1 to 1024. Overrides what `get_num_threads` says about the environment.

    Raises
    ------
    TypeError, ValueError
        For anything else.
    """
    global _threads, _limit
    _threads, _limit = check_integer(threads, "threads", 1, _MAX_THREADS), None


def get_num_threads() -> int:
    """How many CPU threads the package uses.

    The first that is there: what `set_num_threads` was given; the environment variable
    ``LCODEC_NUM_THREADS``; ``OMP_NUM_THREADS``, which joblib sets for its workers; the CPUs that
    this process may use. These are the CPUs of its affinity, at most the CPU quota of its cgroup
    (a container's), rounded up, and at most ``LOKY_MAX_CPU_COUNT``. A limit of
    ``threadpoolctl.threadpool_limits`` lowers any of them while it lasts.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If ``LCODEC_NUM_THREADS`` does not hold a number from 1 to 1024.
    """
    threads = _wanted()
    for limit in (_limit, _here.threads):
        if limit is not None and limit < threads:
            threads = limit
    return threads


def use_threads_here(threads: int) -> None:
    """Let what starts on the calling Python thread use so many threads, because others run, too."""
    _here.threads = threads


def _wanted() -> int:
    if _threads is not None:
        return _threads
    given = os.environ.get("LCODEC_NUM_THREADS", "").strip()
    if given:
        if not given.isdecimal() or not 1 <= int(given) <= _MAX_THREADS:
            raise ValueError(
                f"LCODEC_NUM_THREADS must be an integer from 1 to {_MAX_THREADS}; got {given!r}"
            )
        return int(given)
    return min(_from("OMP_NUM_THREADS") or _cpus(), _MAX_THREADS)


def _from(variable: str) -> int | None:
    """A positive number of somebody else's environment variable; None for anything else there.

    OpenMP's has one for each level of nesting, with commas between.
    """
    given = os.environ.get(variable, "").partition(",")[0].strip()
    return int(given) or None if given.isdecimal() else None


def _cpus() -> int:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = (here, _quota(_PROC, _CGROUPS), _from("LOKY_MAX_CPU_COUNT"))
    return min(limit for limit in limits if limit)


@functools.cache
def _quota(proc: Path, cgroups: Path) -> int | None:
    """CPUs that the cgroups of this process may use, rounded up; None without a quota.

    A quota of a parent group holds for its children. In a container the path of the group may be
    that of the host, which is not there; then the root is the container's group.
    """
    found = []
    for line in _read(proc).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        v1 = "cpu" in controllers.split(",")
        if not path or (controllers and not v1):
            continue
        root = cgroups / "cpu" if v1 else cgroups
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if v1 else ("cpu.max",)
            numbers = " ".join(_read(folder / name) for name in names).split()
            if len(numbers) == 2 and numbers[0].isdecimal() and numbers[1].isdecimal():
                found.append(math.ceil(int(numbers[0]) / max(int(numbers[1]), 1)))
            if folder == root:
                break
    return max(1, min(found)) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def cpu_settings() -> tuple[str, int]:
    """SIMD level (environment variable ``LCODEC_SIMD``, for tests) and threads."""
    return os.environ.get("LCODEC_SIMD", "").strip() or "auto", get_num_threads()


if hasattr(threadpoolctl, "register"):  # from version 3.2 on

    class _Controller(threadpoolctl.LibController):
        """The compiled module as one of the libraries whose threads threadpoolctl limits."""

        user_api = "openmp"  # its threads are for loops, as those of OpenMP
        internal_api = "lcodec_ext"
        filename_prefixes = ("_core.",)
        check_symbols = ("PyInit__core",)

        def set_additional_attributes(self) -> None:
            own = find_spec("lcodec_ext._core")
            if own is None or os.path.realpath(own.origin or "") != os.path.realpath(self.filepath):
                self.dynlib = None  # another package's module of this name

        def get_num_threads(self) -> int:
            return get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            global _limit
            _limit = num_threads if num_threads < _wanted() else None

        def get_version(self) -> None:
            return None

    threadpoolctl.register(_Controller)
