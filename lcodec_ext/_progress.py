"""Progress bars, on request."""

from typing import Any


def progress_bar(enabled: bool, **options: Any) -> Any:
    """A tqdm bar with an ETA, or a silent one.

    Raises
    ------
    ImportError
        If a bar is wanted and tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if enabled:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from None
        return _Silent()
    return tqdm(disable=not enabled, **options)


def progress_line(enabled: bool, text: str) -> None:
    """A line among the bars."""
    if enabled:
        with progress_bar(True, total=0, bar_format="{desc}", desc=text):
            pass


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
