"""What solvers return, and what they raise and warn of."""

import math
from dataclasses import dataclass

from torch import Tensor


class IndefiniteCurvatureError(ValueError):
    """The matrix is not positive definite: its Newton step may go anywhere.

    Attributes
    ----------
    rayleigh : float
        d^T A d / d^T d of a direction d that was found, not positive beyond rounding; the smallest
        eigenvalue where eigenvalues were computed.
    least_damping : float or None
        Damping to add so that this quotient is no longer negative; unless it is an eigenvalue,
        other directions may take more. None for a matrix that is singular within rounding.
    """

    def __init__(
        self, message: str, rayleigh: float = math.nan, least_damping: float | None = None
    ) -> None:
        super().__init__(message)
        self.rayleigh = rayleigh
        self.least_damping = least_damping


class ConvergenceWarning(UserWarning):
    """An iterative solver ended with a residual above the one that was asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class SolveResult:
    """Solution of a linear system, and how good it is.

    Attributes
    ----------
    x : Tensor
        Shape, dtype and device of b.
    residual : float
        ||b - A x|| / ||b|| of this x, the largest over the columns; 0 for b = 0.
    iterations : int
        The largest over the columns; 0 for direct methods.
    method : {"cg", "minres", "cholesky", "woodbury", "ekfac"}
    """

    x: Tensor
    residual: float
    iterations: int
    method: str

    def __repr__(self) -> str:
        return (
            f"SolveResult(x=<{self.x.dtype}, shape {tuple(self.x.shape)}>, "
            f"residual={self.residual:.3g}, iterations={self.iterations}, method={self.method!r})"
        )
