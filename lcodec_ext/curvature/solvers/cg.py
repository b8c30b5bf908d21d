"""Conjugate gradients."""

import math

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.iterate import State, iterate
from lcodec_ext.curvature.solvers.result import SolveResult
from lcodec_ext.curvature.solvers.system import (
    FLOOR,
    ROUNDING,
    Product,
    System,
    check_tensor,
    dots,
    norms,
    plus,
)


def conjugate_gradient(
    product: Product,
    b: Tensor,
    *,
    diagonal: Tensor | None = None,
    rtol: float,
    max_iterations: int,
    describe: str,
    advice: str | None = None,
    progress: bool = False,
) -> SolveResult:
    """Solve with a positive definite matrix by (preconditioned) conjugate gradients.

    Columns run in lock-step, one product for all of them, until each has converged. Where the true
    residual is still above rtol then, the iteration is restarted from x, at most three times, as
    long as that halves the true residual.

    Parameters
    ----------
    product : callable
        v to A v, of the shape, dtype and device of v.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    diagonal : Tensor, shape (p,), optional
        That of A, or one like it, positive: the Jacobi preconditioner.
    rtol : float
        Relative residual to reach, in every column.
    max_iterations : int
        For each column, restarts included.
    describe : str
        Names the matrix in messages.
    advice : str, optional
        What to use where the matrix is indefinite, besides more damping.
    progress : bool
        Show a progress bar.

    Raises
    ------
    IndefiniteCurvatureError
        If a direction d has d^T A d <= 16 eps ||A|| d^T d, in the norm of the preconditioner and
        with ||A|| the largest ||A d|| / ||d|| so far, and the residual is more than rounding.
        Some indefinite matrices pass: b may have no part in their negative directions.
    ValueError
        For a diagonal that is not positive, wrong shapes, and NaN or infinity.

    Warns
    -----
    ConvergenceWarning
        If the true residual is above rtol at the end.

    Notes
    -----
    One product and O(p) for each iteration and column; about 10 vectors of length p a column.
    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """
    system = System(product, b, describe, advice)
    weight = b.new_ones(1, 1) if diagonal is None else _checked_diagonal(diagonal, b)
    eps = torch.finfo(b.dtype).eps
    rounding, floor = ROUNDING * eps, FLOOR * eps
    norm = b.new_zeros((), dtype=torch.float64)  # of D^-1/2 A D^-1/2, from below

    def start(x: Tensor, r: Tensor) -> State:
        d = r / weight
        rho = dots(r, d)
        return torch.zeros_like(r), r, d, rho, rho.sqrt(), dots(weight * x, x).sqrt()

    def step(state: State) -> tuple[State, Tensor, Tensor]:
        nonlocal norm
        y, r, d, rho, least, before = state
        q = system.apply(d)
        curvature, length = dots(d, q), dots(weight * d, d)
        norm = torch.maximum(norm, (dots(q / weight, q) / length).max().sqrt())
        flat = curvature <= rounding * norm * length
        if flat.any():
            size = before + dots(weight * y, y).sqrt()
            refused = flat & (least > rounding * norm * size)  # else it has converged
            if refused.any():
                quotients = curvature / dots(d, d)
                worst = quotients.where(refused, math.inf).argmin()
                quotient = quotients[worst].item()
                negative = bool(curvature[worst] < -rounding * norm * length[worst])
                found = f"d^T A d / d^T d is {quotient:.4g} for a direction d of the iteration"
                raise system.refusal(found, quotient, negative)
        alpha = (rho / curvature).where(~flat, 0)
        y, r = plus(y, alpha, d), plus(r, -alpha, q)
        z = r / weight
        rho, last = dots(r, z), rho
        least = torch.minimum(least, rho.sqrt())
        ended = flat | (rho.sqrt() <= floor * norm * dots(weight * y, y).sqrt())
        return (y, r, plus(z, rho / last, d), rho, least, before), norms(r), ended

    return iterate("cg", system, start, step, rtol, max_iterations, progress)


def _checked_diagonal(diagonal: Tensor, b: Tensor) -> Tensor:
    check_tensor("diagonal", diagonal, (len(b),), b)
    if len(b) and not diagonal.min() > 0:
        i = int(diagonal.argmin())
        raise ValueError(f"diagonal must be positive; entry {i} is {diagonal[i].item():.4g}")
    return diagonal.detach()[:, None]
