"""Systems with one curvature, for a request and its control groups, at any damping."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lcodec_ext._progress import progress_bar
from lcodec_ext.curvature import CurvatureOperator
from lcodec_ext.curvature.kronecker import KroneckerOperator
from lcodec_ext.curvature.solvers import Krylov
from lcodec_ext.unlearning.groups import FEWEST
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Workplace

STEPS = 8  # blocks of the Krylov space
MAX_BYTES = 2**30  # of what the vectors of a calibration take
_FEWEST_STEPS = 2
_NO_MATTER = 1e-2  # of the smallest eigenvalue: a damping that changes no solution by more
_WORKING = 4  # vectors of a solution in closed form


class Solutions(Protocol):
    """Solutions of (A + damping I) x = b for some b, at any damping.

    Attributes
    ----------
    products : int
        Products of A with a vector that they took.
    largest, least : float
        Of the eigenvalues of A, or of what is known of them.
    floor : float
        Of dampings: less changes no solution by much.
    method : str
        What a `SolveResult` calls it.
    lengthens : tuple of str
        The reasons for which less damping is not tried, and a longer step is: it is not solved
        well enough; or there is no damping left, and the curvature is an approximation.
    """

    products: int
    largest: float
    least: float
    floor: float
    method: str
    lengthens: tuple[str, ...]

    def solve(self, shift: float, column: int) -> Tensor:
        """The solution for a damping and one b, shape (p,)."""

    def residuals(self, shift: float) -> Tensor:
        """|(A + shift I) x - b| / |b| of these solutions, one for each b."""


class Plan(NamedTuple):
    """How many systems are solved at once, and in what."""

    groups: int  # control groups: columns in addition to the request's
    steps: int  # blocks of a Krylov space; 0 where the solution has a closed form
    at_once: int  # vectors that are multiplied at once
    bytes: int


class Maker(ABC):
    """A way to such solutions."""

    @abstractmethod
    def planned(
        self, p: int, itemsize: int, groups: int, steps: int = STEPS, most: int = MAX_BYTES
    ) -> Plan:
        """What fits in so many bytes, for p parameters of itemsize bytes."""

    @abstractmethod
    def solutions(self, work: Workplace, operator: Any, b: list[Tensor], plan: Plan) -> Solutions:
        """For each b of shape (p,). The list is emptied, so that their memory is free."""


class _InAKrylovSpace(Maker):
    def planned(
        self, p: int, itemsize: int, groups: int, steps: int = STEPS, most: int = MAX_BYTES
    ) -> Plan:
        """The space that fits.

        One vector is multiplied at a time where a block would take too much, then there are fewer
        groups, at least four, then fewer steps, at least two. That least is taken in any case.
        """
        given = groups
        for groups in dict.fromkeys((given, min(given, FEWEST))):
            for at_once in (groups + 1, 1):
                needed = Krylov.bytes_of(p, groups + 1, steps, at_once, itemsize)
                plan = Plan(groups, steps, at_once, needed)
                if needed <= most:
                    return plan
        if steps > _FEWEST_STEPS:
            return self.planned(p, itemsize, groups, steps - 1, most)
        return plan

    def solutions(
        self, work: Workplace, operator: CurvatureOperator, b: list[Tensor], plan: Plan
    ) -> Krylov:
        """The space, with a bar of products.

        After each product freed memory goes back to the system, if it is limited.
        """
        work.give_back()
        total = plan.steps * len(b)
        with progress_bar(work.progress, total=total, desc="solve", unit="product") as bar:

            def product(V: Tensor) -> Tensor:
                found = operator @ V
                bar.update(V.shape[1])
                work.give_back()
                return found

            return Krylov(product, b, plan.steps, plan.at_once)


class _ClosedForm:
    """Solutions of a matrix whose eigenvectors are known."""

    method = "ekfac"
    lengthens: tuple[str, ...] = ("range",)

    def __init__(self, operator: KroneckerOperator, b: list[Tensor]) -> None:
        self._operator = operator
        self._b: list[list[Tensor]] = []
        while b:  # in the eigenvectors: what each damping then takes is half
            self._b.append(operator.coordinates(b.pop(0)))
        self.products, self.largest, self.least = 0, operator.largest, operator.least
        rounding = torch.finfo(operator.dtype).eps * operator.largest
        self.floor = max(_NO_MATTER * (operator.least + operator.shift), 10 * rounding)

    def solve(self, shift: float, column: int) -> Tensor:
        return self._operator.solve_coordinates(self._b[column], shift)

    def residuals(self, shift: float) -> Tensor:
        """Those of an exact solution: the rounding is not looked at before a step is taken."""
        return torch.zeros(len(self._b), dtype=torch.float64)


class _InClosedForm(Maker):
    def planned(
        self, p: int, itemsize: int, groups: int, steps: int = STEPS, most: int = MAX_BYTES
    ) -> Plan:
        """Fewer groups, at least four, where so many vectors would take too much."""
        count = groups
        if itemsize * p * (groups + 1 + _WORKING) > most:
            count = min(groups, FEWEST)
        return Plan(count, 0, 1, itemsize * p * (count + 1 + _WORKING))

    def solutions(
        self, work: Workplace, operator: KroneckerOperator, b: list[Tensor], plan: Plan
    ) -> _ClosedForm:
        return _ClosedForm(operator, b)


#: Of matrices that only multiply: one space serves each b and every damping.
KRYLOV = _InAKrylovSpace()
_MAKERS: dict[str, Maker] = {"ekfac": _InClosedForm()}


def maker_of(settings: Settings) -> Maker:
    """How systems are solved at any damping with the curvature of settings."""
    return _MAKERS.get(settings.curvature, KRYLOV)


def plan_of(settings: Settings, p: int, itemsize: int, left: int | None = None) -> Plan:
    """What settings solve, within the memory that is left for vectors if that is limited."""
    most = MAX_BYTES if left is None else min(MAX_BYTES, left)
    steps = settings.max_iterations or STEPS
    return maker_of(settings).planned(p, itemsize, settings.control_groups, steps, most)
