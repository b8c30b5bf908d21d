"""Progress bars, on request."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


def progress_bar(enabled: bool, **options: Any) -> Any:
    """A tqdm bar with an ETA, or a silent one.

    Raises
    ------
    ImportError
        If a bar is wanted and tqdm is not installed.
    """
    tqdm = _tqdm(enabled)
    return _Silent() if tqdm is None else tqdm(disable=not enabled, **options)


def progress_line(enabled: bool, text: str) -> None:
    """A line among the bars."""
    if enabled:
        _tqdm(enabled).write(text, file=sys.stderr)


def _tqdm(needed: bool) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if needed:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        return None
    return tqdm


def counted(enabled: bool, items: Iterable[_T], **options: Any) -> Iterator[_T]:
    """The items, with a bar of how many have been dealt with."""
    with progress_bar(enabled, **options) as bar:
        for item in items:
            yield item
            bar.update()


class _Silent:
    """Stands in for a disabled bar where tqdm is not installed."""

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
