"""Numbers, times and lists as text, for the sentences, tables and figures of reports."""

from collections.abc import Sequence


def number(value: float) -> str:
    """A number to three digits."""
    if value and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share as a percentage of two digits, or more before the point."""
    value = 100 * share
    if value == 0 or abs(value) >= 9.95:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if abs(value) >= 0.95 else f"{value:.1g}%"


def duration(seconds: float) -> str:
    """A time in the unit in which it is read best."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms"
    if seconds < 99.5:
        return f"{seconds:.2g} s"
    if seconds < 5940:
        return f"{seconds / 60:.2g} min"
    return f"{seconds / 3600:.3g} h"


def listed(items: Sequence[str], most: int = 10) -> str:
    """The first few of many items, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def sentence_case(text: str) -> str:
    """The text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def shorten(text: str, most: int) -> str:
    """The text, without its middle if it is longer."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
