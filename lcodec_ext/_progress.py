"""Progress bars, on request."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


def progress_bar(enabled: bool, **options: Any) -> Any:
    """A tqdm bar with an ETA, or a stand-in that does nothing.

    Without a bar tqdm is neither imported nor called: every bar of tqdm, also a disabled one, takes
    a lock that processes share over a fork, and starts a thread that stays.

    Raises
    ------
    ImportError
        If a bar is wanted and tqdm is not installed.
    """
    if not enabled or not _is_shown():
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0  # no thread that outlives the bar

    return Bar(miniters=1, **options)  # what the thread is for: a slow step is shown, too


def progress_line(enabled: bool, text: str) -> None:
    """A line before the next bar."""
    if enabled and _is_shown():
        print(text, file=sys.stderr)


def _is_shown() -> bool:
    """Whether there is a standard error: services, and programs without a console, have none."""
    return sys.stderr is not None and not getattr(sys.stderr, "closed", False)


def counted(enabled: bool, items: Iterable[_T], **options: Any) -> Iterator[_T]:
    """The items, with a bar of how many have been dealt with."""
    with progress_bar(enabled, **options) as bar:
        for item in items:
            yield item
            bar.update()


class _Silent:
    """Stands in for a bar."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def reset(self, total: int | None = None) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass
