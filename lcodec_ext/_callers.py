"""Warnings that point at the user's line, however deep they arise."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What stands between a user's line and the one that warns: this package, and what calls it or wraps
# its functions.
_PASSED = {"lcodec_ext", "contextlib", "functools", "joblib", "sklearn", "torch"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line of other code than this package's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _root(frame.f_globals) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def held_back() -> Iterator[list[warnings.WarningMessage]]:
    """What the block warns of, also what filters would hide. Nobody hears it before `give`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def give(caught: Iterable[warnings.WarningMessage]) -> None:
    """Warn of what was held back; filters that make errors of warnings raise them now."""
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def _root(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
