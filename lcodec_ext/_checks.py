"""Checks of single arguments; messages name the argument, what was given and expected."""

import itertools
import math
import numbers
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np


def at_most(values: Iterable[Any], most: int, name: str) -> list[Any]:
    """The entries of what may be an iterator, which may have no end: refuse more than there are."""
    if isinstance(values, Sized):
        return list(values)
    found = list(itertools.islice(values, most + 1))
    if len(found) > most:
        raise ValueError(
            f"{name} goes on after {most:,} entries, and there are no more: pass those that you "
            f"mean, list(itertools.islice({name}, n)) for instance"
        )
    return found


def _describe(value: object) -> str:
    """A value in an error message: short, and with its type."""
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return f"{text} ({type(value).__name__})"


def first_few(items: Sequence[object], most: int, between: str = ", ") -> str:
    """The first few of many items, and how many more there are."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return between.join(map(str, items[:most])) + more


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number of things: "1 row", "1,200 rows"; `nouns` is the plural where it has no s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def check_choice(value: object, name: str, choices: Sequence[str | None]) -> Any:
    """value, if it is one of the choices."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}; got {_describe(value)}")
    return value


def check_bool(value: object, name: str) -> bool:
    """value, if it is True or False (Python's or NumPy's)."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {_describe(value)}")
    return bool(value)


def check_integer(value: object, name: str, minimum: int, maximum: int | None = None) -> int:
    """value as an int, if it is an integer (not a bool or a float) in the range."""
    whole = type(value) is int or (
        isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)
    )
    number = int(value) if whole else 0  # type: ignore[call-overload]
    if whole and minimum <= number and (maximum is None or number <= maximum):
        return number
    expected = f"an integer >= {minimum}"
    if maximum is not None:
        expected = f"an integer from {minimum} to {maximum}"
    if not whole:
        raise TypeError(f"{name} must be {expected}; got {_describe(value)}")
    raise ValueError(f"{name} must be {expected}; got {number}")


def check_real(value: object, name: str, minimum: float) -> float:
    """value as a float, if it is a finite real number of at least minimum."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number >= {minimum:g}; got {_describe(value)}")
    number = float(value)
    if not math.isfinite(number) or number < minimum:
        raise ValueError(f"{name} must be a finite number >= {minimum:g}; got {number!r}")
    return number


def check_positive(value: object, name: str) -> float:
    """value as a float, if it is a finite real number above 0."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a positive number; got {_describe(value)}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive, finite number; got {number!r}")
    return number


def check_probability(value: object, name: str) -> float:
    """value as a float, if it is a real number between 0 and 1, both excluded."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number between 0 and 1; got {_describe(value)}")
    number = float(value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must be a number between 0 and 1; got {number!r}")
    return number


def check_seed(seed: object, name: str = "seed", *, optional: bool = True) -> int | None:
    """A seed in [0, 2**64), or None where that is allowed."""
    if seed is None and optional:
        return None
    expected = "an integer in [0, 2**64)" + (" or None" if optional else "")
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{name} must be {expected}; got {_describe(seed)}")
    number = int(seed)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be {expected}; got {number}")
    return number
