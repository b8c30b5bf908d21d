"""Responses that are classes without an order: T is averaged over one class against the rest.

`ClassSums` and `ClassEngine` stand where `exact.ResponseSums` and an `Engine` stand for an ordered
response. What they pass to each other is one exact sum for each class.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence.backends.base import Backend, Engine, Leaders, Ties
from lcodec_ext.dependence.exact import FRACTION_BITS, ResponseSums

Sums = tuple[Fraction, ...]


class ClassSums:
    """Coefficients of classes: means over the classes of those of ``y == class``."""

    def __init__(self, classes: list[ResponseSums]) -> None:
        self.classes = classes
        self.constant = len(classes) < 2
        self.start: Sums = tuple(each.start for each in classes)

    def floor(self, m: Sums) -> int:
        """None: no class may lose a candidate that another one needs."""
        return 0

    def unconditional(self, m: Sums) -> Fraction:
        """T(Y, Z)."""
        values = (each.unconditional(s) for each, s in zip(self.classes, m, strict=True))
        return sum(values, Fraction(0)) / len(self.classes)

    def conditional(self, m_w: Sums, m_x: Sums) -> Fraction | None:
        """T(Y, Z | X): a class that X determines counts as 1; None if X determines all of them."""
        values = [each.conditional(*s) for each, *s in zip(self.classes, m_w, m_x, strict=True)]
        if all(value is None for value in values):
            return None
        return sum((Fraction(1) if v is None else v for v in values), Fraction(0)) / len(values)


class ClassEngine:
    """An engine for each class, all of them over the same columns."""

    piece = 2**62  # all candidates at a time

    def __init__(self, engines: list[Engine], sums: ClassSums) -> None:
        self._engines, self._sums = engines, sums

    def select(self, column: int) -> None:
        """Add a column to the conditioning set of every class."""
        for engine in self._engines:
            engine.select(column)

    def exact_sum(self, column: int) -> Sums:
        """The exact sum of every class."""
        return tuple(engine.exact_sum(column) for engine in self._engines)

    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        """Candidates within a bound on rounding of the best; the caller compares exact sums."""
        values = np.zeros(len(columns))
        slack = 0.0
        for engine, sums in zip(self._engines, self._sums.classes, strict=True):
            whole, fraction = engine.score(columns)
            # integers below 2**63: floats need not hold a small difference of large sums
            numerators = sums.n * whole - sums.sum_L2
            share = fraction.astype(np.float64) * 2.0**-FRACTION_BITS
            each = (numerators + sums.n * share) / sums.denominator
            values += each
            slack += 2.0**-40 * (1 + float(np.abs(each).max(initial=0)))
            slack += sums.n**2 * 2.0**-FRACTION_BITS / sums.denominator  # rows are rounded down
        near = columns[values >= values.max(initial=-np.inf) - slack]
        return near, np.zeros_like(near), np.ones_like(near)


class Response(NamedTuple):
    """Max ranks of a response of numbers, or of one class against the rest, and their sums."""

    R: Any
    sums: ResponseSums


def responses(backend: Backend, y: Any, nominal: bool) -> list[Response]:
    """One response of numbers, or one for each code of classes without an order."""
    codes: Any = np.unique(y) if nominal else []
    if 2 * len(codes) > len(y):
        raise ValueError(
            f"y has {len(codes):,} classes on {len(y):,} rows; expected classes that repeat: pass "
            "numbers, with astype(float), or astype('int64') for integers, where y is numbers "
            "written as text"
        )
    ranks = [backend.ranks(y == code) for code in codes] if nominal else [backend.ranks(y)]
    return [Response(R, ResponseSums(R, L)) for R, L in ranks]


def response_engine(
    backend: Backend, columns: Any, factors: Any, y: Any, nominal: bool, ties: Ties, seed: int
) -> tuple[ResponseSums | ClassSums, Engine | ClassEngine]:
    """Sums and an engine for a response: numbers, or codes of classes without an order."""
    found = responses(backend, y, nominal)
    engines = [backend.engine(columns, factors, R, ties, seed) for R, _ in found]
    if not nominal:
        return found[0].sums, engines[0]
    classes = ClassSums([sums for _, sums in found])
    return classes, ClassEngine(engines, classes)
