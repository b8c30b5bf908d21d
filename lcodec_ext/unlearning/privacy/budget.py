"""How the epsilons and deltas of several releases add up."""

import math
from collections.abc import Mapping
from typing import Any

from lcodec_ext._checks import check_integer, check_real, counted
from lcodec_ext.unlearning.privacy.gaussian import (
    check_delta,
    check_positive,
    delta_of_ratio,
    largest,
)

_SLACK = 1e-12  # relative, of a budget: ten times 0.1 is not more than 1


class PrivacyBudgetExceeded(ValueError):
    """A release, or a removal, would take more than what is left of a budget."""


def _exact_epsilon(square_sum: float, delta: float) -> float:
    """The smallest epsilon of Gaussian noise whose (sensitivity/sigma)^2 adds up to square_sum."""
    ratio = math.sqrt(square_sum)

    def above(epsilon: float) -> bool:
        return delta_of_ratio(ratio, epsilon) > delta

    upper = 1.0
    while upper < math.inf and above(upper):
        upper *= 2
    if upper == math.inf:
        return math.inf
    exact = largest(0.0, upper, above) if above(0.0) else 0.0
    return math.nextafter(exact, math.inf)


class PrivacyBudget:
    """An (epsilon, delta) for all releases together, and what is left of it.

    A release is paid for if one of two theorems says that all releases together stay within the
    budget. Basic composition adds epsilons and deltas up. If all releases are Gaussian, their exact
    composition holds as well: the squares of sensitivity/sigma add up (Dong, Roth & Su 2022), and
    `gaussian_delta` gives the delta. It allows far more releases of a small epsilon.

    Parameters
    ----------
    epsilon, delta : float
        Positive, and delta below 1. Attributes have the same names; `n_releases` counts releases.

    Examples
    --------
    >>> budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    >>> budget.spend(0.6, 1e-6)
    >>> budget
    PrivacyBudget(epsilon=1, delta=1e-05; 1 release took 0.6)
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        self.epsilon, self.delta = check_positive(epsilon, "epsilon"), check_delta(delta)
        self.n_releases = 0
        self._epsilon_sum = 0.0
        self._delta_sum = 0.0
        self._square_sum: float | None = 0.0  # of sensitivity/sigma; None: not all are Gaussian

    @property
    def spent(self) -> tuple[float, float]:
        """Sums of epsilon and delta over the releases: basic composition."""
        return self._epsilon_sum, self._delta_sum

    @property
    def spent_epsilon(self) -> float:
        """Smallest epsilon that is proven for all releases together at the budget's delta.

        Infinity if there is none.
        """
        basic = self._epsilon_sum if self._fits(0.0, self._delta_sum) else math.inf
        if self._square_sum is None or self._square_sum == 0.0:
            return basic
        return min(basic, _exact_epsilon(self._square_sum, self.delta))

    def spend(self, epsilon: float, delta: float, *, ratio: float | None = None) -> None:
        """Pay for a release, before it is made.

        Parameters
        ----------
        epsilon, delta : float
            At least 0.
        ratio : float, optional
            sensitivity / sigma of a release with Gaussian noise; ValueError if it does not give
            (epsilon, delta).

        Raises
        ------
        PrivacyBudgetExceeded
            If it does not fit. Nothing is paid then.
        """
        epsilon, delta = check_real(epsilon, "epsilon", 0.0), check_real(delta, "delta", 0.0)
        square_sum = None
        if ratio is not None:
            ratio = check_real(ratio, "ratio", 0.0)
            given = delta_of_ratio(ratio, epsilon)
            if given > delta * (1 + 1e-9) + 1e-15:
                raise ValueError(
                    f"ratio={ratio!r} does not give epsilon={epsilon!r} with delta={delta!r} but "
                    f"with {given!r}"
                )
            if self._square_sum is not None:
                square_sum = self._square_sum + ratio * ratio
        epsilon_sum, delta_sum = self._epsilon_sum + epsilon, self._delta_sum + delta
        fits = self._fits(epsilon_sum, delta_sum) or (
            square_sum is not None
            and self._fits(0.0, delta_of_ratio(math.sqrt(square_sum), self.epsilon))
        )
        if not fits:
            raise PrivacyBudgetExceeded(
                f"epsilon={epsilon:g}, delta={delta:g} does not fit: "
                f"{self._needed(epsilon_sum, delta_sum, square_sum)}. The budget is "
                f"epsilon={self.epsilon:g}, delta={self.delta:g}, {self._taken()}; train again for "
                "a new budget"
            )
        self._epsilon_sum, self._delta_sum = epsilon_sum, delta_sum
        self._square_sum = square_sum
        self.n_releases += 1

    def _needed(self, epsilon: float, delta: float, square_sum: float | None) -> str:
        """What all releases and one more would take, by each theorem that applies."""
        sums = f"with it the sums are epsilon={epsilon:.4g}, delta={delta:.4g}"
        if square_sum is None:
            return sums
        gaussian = _exact_epsilon(square_sum, self.delta)
        return (
            f"{sums}, and by the composition of Gaussians it is epsilon={gaussian:.4g} at "
            f"delta={self.delta:g}"
        )

    def _taken(self) -> str:
        """What was spent, by the theorem under which it fits."""
        if not self.n_releases:
            return "of which nothing is spent"
        taken = f"of which {counted(self.n_releases, 'release')} so far took"
        exact = math.inf
        if self._square_sum is not None:
            exact = _exact_epsilon(self._square_sum, self.delta)
        if self._fits(self._epsilon_sum, self._delta_sum) and self._epsilon_sum <= exact:
            return f"{taken} epsilon={self._epsilon_sum:.4g}, delta={self._delta_sum:.4g}, by sums"
        return (
            f"{taken} epsilon={exact:.4g} at delta={self.delta:g}, by the composition of Gaussians"
        )

    def _fits(self, epsilon: float, delta: float) -> bool:
        return epsilon <= self.epsilon * (1 + _SLACK) and delta <= self.delta * (1 + _SLACK)

    def to_dict(self) -> dict[str, Any]:
        """Give the state in types that JSON knows, to the bit."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "n_releases": self.n_releases,
            "epsilon_sum": self._epsilon_sum,
            "delta_sum": self._delta_sum,
            "square_sum": self._square_sum,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "PrivacyBudget":
        """Make it from `to_dict`; ValueError for anything else."""
        names = {"epsilon", "delta", "n_releases", "epsilon_sum", "delta_sum", "square_sum"}
        if set(state) != names:
            raise ValueError(f"state must have {sorted(names)}; got {sorted(map(str, state))}")
        budget = cls(state["epsilon"], state["delta"])
        budget.n_releases = check_integer(state["n_releases"], "n_releases", 0)
        budget._epsilon_sum = check_real(state["epsilon_sum"], "epsilon_sum", 0.0)
        budget._delta_sum = check_real(state["delta_sum"], "delta_sum", 0.0)
        if state["square_sum"] is None:
            budget._square_sum = None
        else:
            budget._square_sum = check_real(state["square_sum"], "square_sum", 0.0)
        return budget

    def __repr__(self) -> str:
        return (
            f"PrivacyBudget(epsilon={self.epsilon:g}, delta={self.delta:g}; "
            f"{counted(self.n_releases, 'release')} took {self.spent_epsilon:g})"
        )
