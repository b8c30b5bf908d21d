"""What kind of response y is: numbers, classes without an order, or several columns.

T of classes is averaged over one class against the rest.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lcodec_ext.dependence.backends.base import Backend, Engine, Ties
from lcodec_ext.dependence.exact import ResponseSums
from lcodec_ext.dependence.joint import JointEngine, JointSums, Sums, several_responses
from lcodec_ext.dependence.k_nearest import NeighborsEngine


class ClassSums(JointSums):
    """Coefficients of classes: means over the classes of those of ``y == class``."""

    def __init__(self, classes: list[ResponseSums]) -> None:
        share = Fraction(1, len(classes))
        super().__init__(classes, [each.start for each in classes], [share] * len(classes))

    def conditional(self, m_w: Sums, m_x: Sums) -> Fraction | None:
        """T(Y, Z | X): a class that X determines counts as 1; None if X determines all of them."""
        values = [each.conditional(*s) for each, *s in zip(self.parts, m_w, m_x, strict=True)]
        if all(value is None for value in values):
            return None
        return sum((Fraction(1) if v is None else v for v in values), Fraction(0)) / len(values)


class Response(NamedTuple):
    """Max ranks of a response of numbers, or of one class against the rest, and their sums."""

    R: Any
    sums: ResponseSums


def responses(backend: Backend, y: Any, nominal: bool) -> list[Response]:
    """One response of numbers, or one for each code of classes without an order."""
    codes: Any = np.unique(y) if nominal else []
    ranks = [backend.ranks(y == code) for code in codes] if nominal else [backend.ranks(y)]
    return [Response(R, ResponseSums(R, L)) for R, L in ranks]


def response_engine(
    backend: Backend,
    columns: Any,
    factors: Any,
    y: Any,
    nominal: bool,
    ties: Ties,
    seed: int,
    n_neighbors: int = 1,
    average: bool = False,
) -> tuple[ResponseSums | JointSums, Engine | NeighborsEngine | JointEngine]:
    """Sums and an engine for a response: numbers, codes of classes without an order, or columns.

    y of shape (n, q) is q responses. Their values are the last columns of the table: all of them
    where their orders are averaged, otherwise all but the last.
    """
    if n_neighbors >= len(y):
        raise ValueError(
            f"n_neighbors must be below the number of rows, {len(y):,}; got {n_neighbors:,}"
        )

    def engine_of(R: Any) -> Engine | NeighborsEngine:
        if n_neighbors > 1:
            return NeighborsEngine(backend, columns, factors, R, n_neighbors)
        return backend.engine(columns, factors, R, ties, seed)

    if nominal:
        found = responses(backend, y, nominal)
        if len(found) > 1:
            classes = ClassSums([sums for _, sums in found])
            return classes, JointEngine([engine_of(R) for R, _ in found], classes)
    elif y.ndim == 2:
        q = y.shape[1]
        first = len(factors) - (q if average else q - 1)
        varying = [k for k in range(q) if not (y[:, k] == y[0, k]).all()]
        ranks = [backend.ranks(y[:, k]) for k in varying]
        if len(varying) > 1:
            return several_responses(ranks, [first + k for k in varying], engine_of, average)
        y = y[:, varying[0] if varying else 0]
    R, L = backend.ranks(y)
    return ResponseSums(R, L), engine_of(R)
