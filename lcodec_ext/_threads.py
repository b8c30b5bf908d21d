"""How many threads the compiled code uses, and which instructions."""

import os

from lcodec_ext._checks import check_integer

_MAX_THREADS = 1024

_threads: int | None = None


def set_num_threads(threads: int) -> None:
    """Set how many CPU threads the package uses; results do not depend on it.

    Parameters
    ----------
    threads : int
        From 1 to 1024. Overrides the environment variable ``LCODEC_NUM_THREADS``.

    Raises
    ------
    TypeError, ValueError
        For anything else.
    """
    global _threads
    _threads = check_integer(threads, "threads", 1, _MAX_THREADS)


def get_num_threads() -> int:
    """How many CPU threads the package uses.

    What `set_num_threads` was given, else the environment variable ``LCODEC_NUM_THREADS``,
    else the number of CPUs this process may run on.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If the environment variable does not hold a number from 1 to 1024.
    """
    if _threads is not None:
        return _threads
    given = os.environ.get("LCODEC_NUM_THREADS", "").strip()
    if given:
        if not given.isdecimal() or not 1 <= int(given) <= _MAX_THREADS:
            raise ValueError(
                f"LCODEC_NUM_THREADS must be an integer from 1 to {_MAX_THREADS}; got {given!r}"
            )
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_settings() -> tuple[str, int]:
    """SIMD level (environment variable ``LCODEC_SIMD``, for tests) and threads."""
    return os.environ.get("LCODEC_SIMD", "").strip() or "auto", get_num_threads()
