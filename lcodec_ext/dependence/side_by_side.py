"""Several selections at a time, each on a thread of Python's."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lcodec_ext._arrays import is_tensor
from lcodec_ext._threads import get_num_threads, use_threads_here

_T = TypeVar("_T")
_BESIDE = 1 << 28  # bytes that may be taken at a time


def side_by_side(work: Callable[[int], _T], some: range, values: Any, each: int) -> Iterator[_T]:
    """work(k) for each of some numbers, in their order.

    Several are computed at a time where values, a table, lie on the CPU and few bytes are taken:
    ``each`` by one call. The threads that a user allows are shared among those that run. They
    must not warn: the caller's line is not on their stacks.
    """
    threads, workers = get_num_threads(), 1
    if not is_tensor(values):
        workers = max(1, min(threads, len(some), _BESIDE // max(each, 1)))
    if workers == 1:
        yield from map(work, some)
        return
    pool = ThreadPoolExecutor(workers, "lcodec_ext", use_threads_here, (threads // workers,))
    try:
        yield from pool.map(work, some)
    finally:
        pool.shutdown(cancel_futures=True)
