"""Conjugate gradients."""

import math

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.iterate import _iterate, _State
from lcodec_ext.curvature.solvers.result import SolveResult, _refusal
from lcodec_ext.curvature.solvers.system import (
    _FLOOR,
    _ROUNDING,
    Product,
    _add,
    _check,
    _dots,
    _norms,
    _System,
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

    Columns run in lock-step, one product for all of them; one that has converged takes no further
    part. Where the true residual is above rtol although the recurrence's is at rtol, or below the
    rounding errors of A x, the iteration is restarted from x, as long as that halves the true
    residual, at most three times.

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
    advice : str, optional
        What else than more damping to use where the matrix is indefinite.
    progress : bool
        Show a progress bar.

    Returns
    -------
    SolveResult

    Raises
    ------
    IndefiniteCurvatureError
        If a direction d has d^T A d <= 16 eps ||A|| d^T d, in the norm of the preconditioner and
        with ||A|| the largest ||A d|| / ||d|| so far, and the residual is no rounding error. Not
        every indefinite matrix is found out: b may have no part in its negative directions.
    ValueError
        For a diagonal that is not positive, arguments of wrong shapes, NaN or infinity in them or
        in a product.

    Warns
    -----
    ConvergenceWarning
        If the true residual is above rtol at the end.

    Notes
    -----
    One product and O(p) for each iteration and column; about 10 vectors of length p a column.
    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """
    system = _System(product, b, describe)
    weight = b.new_ones(1, 1) if diagonal is None else _checked_diagonal(diagonal, b)
    eps = torch.finfo(b.dtype).eps
    rounding, floor = _ROUNDING * eps, _FLOOR * eps
    norm = b.new_zeros((), dtype=torch.float64)  # of D^-1/2 A D^-1/2, from below

    def start(x: Tensor, r: Tensor) -> _State:
        d = r / weight
        rho = _dots(r, d)
        return torch.zeros_like(r), r, d, rho, rho.sqrt(), _dots(weight * x, x).sqrt()

    def step(state: _State) -> tuple[_State, Tensor, Tensor]:
        nonlocal norm
        y, r, d, rho, least, before = state
        q = system.apply(d)
        curvature, length = _dots(d, q), _dots(weight * d, d)
        norm = torch.maximum(norm, (_dots(q / weight, q) / length).max().sqrt())
        flat = curvature <= rounding * norm * length
        if flat.any():
            size = before + _dots(weight * y, y).sqrt()
            refused = flat & (least > rounding * norm * size)  # else it has converged
            if refused.any():
                quotients = curvature / _dots(d, d)
                worst = quotients.where(refused, math.inf).argmin()
                quotient = quotients[worst].item()
                negative = bool(curvature[worst] < -rounding * norm * length[worst])
                found = f"d^T A d / d^T d is {quotient:.4g} for a direction d of the iteration"
                raise _refusal(describe, found, quotient, negative, advice)
        alpha = (rho / curvature).where(~flat, 0)
        y, r = _add(y, alpha, d), _add(r, -alpha, q)
        z = r / weight
        rho, last = _dots(r, z), rho
        least = torch.minimum(least, rho.sqrt())
        ended = flat | (rho.sqrt() <= floor * norm * _dots(weight * y, y).sqrt())
        return (y, r, _add(z, rho / last, d), rho, least, before), _norms(r), ended

    return _iterate("cg", system, start, step, rtol, max_iterations, progress)


def _checked_diagonal(diagonal: Tensor, b: Tensor) -> Tensor:
    _check("diagonal", diagonal, (len(b),), b)
    if len(b) and not diagonal.min() > 0:
        i = int(diagonal.argmin())
        raise ValueError(f"diagonal must be positive; entry {i} is {diagonal[i].item():.4g}")
    return diagonal.detach()[:, None]
