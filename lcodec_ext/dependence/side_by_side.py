"""Several selections at a time, each on a thread of Python's."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lcodec_ext._arrays import is_tensor
from lcodec_ext._threads import get_num_threads, use_threads_here

_T = TypeVar("_T")
_BESIDE = 1 << 28  # bytes that may be taken at a time


class _Here(threading.local):
    stop: threading.Event | None = None  # ends what a thread of these works on


_here = _Here()


class StoppedError(RuntimeError):
    """Nobody waits for what this thread computes."""


def go_on() -> None:
    """Raise if the call that this thread works for has been interrupted, or has failed.

    Python tells the main thread alone of Ctrl-C. Selections ask before each step.
    """
    if _here.stop is not None and _here.stop.is_set():
        raise StoppedError


def side_by_side(work: Callable[[int], _T], some: range, values: Any, each: int) -> Iterator[_T]:
    """work(k) for each of some numbers, in their order.

    Several are computed at a time where values, a table, lie on the CPU and few bytes are taken:
    ``each`` by one call. The threads that a user allows are shared among those that run. What
    they warn of is not told at the caller's line, which is not on their stacks.
    """
    threads, workers = get_num_threads(), 1
    if not is_tensor(values):
        workers = max(1, min(threads, len(some), _BESIDE // max(each, 1)))
    if workers == 1:
        yield from map(work, some)
        return
    stop = threading.Event()
    shares = [(threads + k) // workers for k in range(workers)]
    pool = ThreadPoolExecutor(workers, "lcodec_ext", _begin, (shares, stop))
    try:
        yield from pool.map(work, some)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begin(shares: list[int], stop: threading.Event) -> None:
    use_threads_here(shares.pop())
    _here.stop = stop
