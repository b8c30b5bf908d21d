"""Woodbury's formula."""

import math

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.result import SolveResult
from lcodec_ext.curvature.solvers.system import EPS, Product, System, check_tensor, refine


def woodbury(
    gram: Tensor,
    weights: Tensor,
    damping: float,
    project: Product,
    lift: Product,
    b: Tensor,
    *,
    product: Product,
    describe: str,
) -> SolveResult:
    """Solve with a matrix of low rank plus damping, ``A = damping I + R^T diag(weights) R``.

    ::

        x = (b - R^T (damping I + C K)^-1 C R b) / damping,   K = R R^T,  C = diag(weights)

    Parameters
    ----------
    gram : Tensor, shape (k, k)
        K; best in float64, if R is not.
    weights : Tensor, shape (k,)
        Of any sign.
    damping : float
        Positive.
    project, lift : callable
        B to R B, (p, m) to (k, m), and C to R^T C, (k, m) to (p, m), in the dtype of b.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    product : callable
        v to A v, for the residual.
    describe : str

    Raises
    ------
    IndefiniteCurvatureError
        For weights of both signs, if damping plus the smallest eigenvalue of C K is at most k eps
        times the largest in size: these are the eigenvalues of A, but for damping itself.
    ValueError
        For damping that is not positive, wrong shapes, and NaN or infinity.

    Notes
    -----
    O(k^3 + k^2 m), in float64, one call of project and lift and one product, and the same again for
    each of up to two refinements, in the columns where they lower the residual. It is about
    eps ||A|| / damping, with the eps of the dtype of b, since numbers of the size of b / damping
    cancel. Woodbury, "Inverting modified matrices" (1950).
    """
    system = System(product, b, describe)
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be finite and > 0 for Woodbury's formula; got {damping!r}")
    k = len(weights)
    check_tensor("weights", weights, (k,))
    check_tensor("gram", gram, (k, k))
    if system.zero:
        return system.result("woodbury")
    K, C = gram.detach().to(b.device, torch.float64), weights.detach().to(b.device, torch.float64)
    inner = _inner((K + K.T) / 2, C, damping, system)

    def solve(r: Tensor) -> Tensor:
        m = r.shape[1]
        projected = check_tensor("project", project(r), (k, m), b)
        lifted = check_tensor(
            "lift", lift(inner(projected.double()).to(b.dtype)), tuple(r.shape), b
        )
        return (r - lifted) / damping

    return refine("woodbury", system, solve, system.apply, steps=2)


def _inner(K: Tensor, C: Tensor, damping: float, system: System) -> Product:
    """B to (damping I + C K)^-1 C B."""
    identity = torch.eye(len(C), dtype=K.dtype, device=K.device)
    if (C >= 0).all():
        root = C.sqrt()[:, None]
        factor, failed = torch.linalg.cholesky_ex(damping * identity + root * K * root.T)
        if not failed:
            return lambda B: root * torch.cholesky_solve(root * B, factor)
        # Rounding of K beyond the damping: its eigenvalues are not negative.
        values, vectors = torch.linalg.eigh(root * K * root.T)
        values = damping + values.clamp_min(0)[:, None]
        return lambda B: root * (vectors @ (vectors.T @ (root * B) / values))
    values, vectors = torch.linalg.eigh(K)
    half = vectors * values.clamp_min(0).sqrt()  # K = half half^T: C K and half^T C half agree
    smallest, largest = torch.linalg.eigvalsh(half.T @ (C[:, None] * half))[[0, -1]].tolist()
    system.check_spectrum(damping + smallest, damping + largest, len(C) * EPS)
    lu, pivots = torch.linalg.lu_factor(damping * identity + C[:, None] * K)
    return lambda B: torch.linalg.lu_solve(lu, pivots, C[:, None] * B)
