"""Minimal residuals."""

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.iterate import State, iterate
from lcodec_ext.curvature.solvers.result import SolveResult
from lcodec_ext.curvature.solvers.system import (
    FLOOR,
    ROUNDING,
    Product,
    System,
    dots,
    norms,
    plus,
)


def minres(
    product: Product,
    b: Tensor,
    *,
    rtol: float,
    max_iterations: int,
    describe: str,
    progress: bool = False,
) -> SolveResult:
    """Solve with a symmetric matrix, indefinite or not, by minimal residuals.

    Parameters, columns, restarts, results, errors and warnings are those of `conjugate_gradient`,
    except that no matrix is refused. Where A is singular and b outside of its range, a warning
    tells the residual, which cannot reach rtol; it is at most 1.

    Notes
    -----
    One product and O(p) for each iteration and column; about 13 vectors of length p a column.
    Paige and Saunders, "Solution of sparse indefinite systems of linear equations" (1975).
    """
    system = System(product, b, describe)
    eps, tiny = torch.finfo(b.dtype).eps, torch.finfo(b.dtype).tiny
    norm = b.new_zeros((), dtype=torch.float64)  # of A, from below

    def start(x: Tensor, r: Tensor) -> State:
        zero, size = torch.zeros_like(r), norms(r)
        flat = torch.zeros_like(size)
        return zero, zero, r / size.to(r.dtype), zero, zero, flat, flat, flat, flat - 1, flat, size

    def step(state: State) -> tuple[State, Tensor, Tensor]:
        # Lanczos: A V = V T with T tridiagonal (alpha, beta), and the QR factorisation of T by
        # rotations (c, s) to an upper triangle with rows (gamma, delta, epsilon).
        nonlocal norm
        y, u, v, w_older, w_old, beta, dbar, epsilon, c, s, size = state
        q = system.apply(v)
        norm = torch.maximum(norm, norms(q).max())
        alpha = dots(v, q)
        q = plus(plus(q, -alpha, v), -beta, u)
        beta = norms(q)
        delta, gbar = c * dbar + s * alpha, s * dbar - c * alpha
        w = plus(plus(v, -epsilon, w_older), -delta, w_old)
        epsilon, dbar = s * beta, -c * beta
        gamma = torch.hypot(gbar, beta).clamp_min(tiny)
        c, s = gbar / gamma, beta / gamma
        w = w / gamma.to(w.dtype)
        longer = plus(y, c * size, w)
        # size hypot(gbar, dbar) is ||A r|| of the r before this step: if 0, r is the least.
        least = torch.hypot(gbar, dbar) <= ROUNDING * eps * norm
        y, size = y.where(least, longer), s * size
        ended = least | (size <= FLOOR * eps * norm * norms(y))
        v, u = q / beta.clamp_min(tiny).to(q.dtype), v
        return (y, u, v, w_old, w, beta, dbar, epsilon, c, s, size), size, ended

    return iterate("minres", system, start, step, rtol, max_iterations, progress)
