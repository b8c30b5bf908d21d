"""Cholesky factorisation."""

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.result import SolveResult
from lcodec_ext.curvature.solvers.system import EPS, System, check_tensor, refine


def cholesky(matrix: Tensor, b: Tensor, *, describe: str, advice: str | None = None) -> SolveResult:
    """Solve with a dense positive definite matrix by its Cholesky factorisation, in float64.

    Parameters
    ----------
    matrix : Tensor of the dtype of b, shape (p, p)
        Symmetric: the lower triangle is factorised.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    describe, advice
        As in `conjugate_gradient`.

    Raises
    ------
    IndefiniteCurvatureError
        If the smallest eigenvalue is at most p eps times the largest (with the eps of float64; for
        float32, whose entries resolve no more, at least eps of float32 times the largest).
    ValueError
        For wrong shapes or dtypes, and NaN or infinity.

    Notes
    -----
    p^3 / 3 multiplications for the factor and 2 p^3 / 3 for the inverse, whose norm bounds the
    smallest eigenvalue from below; eigenvalues are computed only where that does not tell. One step
    of iterative refinement in the columns where it lowers the residual.
    """
    system = System(None, b, describe, advice)
    p = len(b)
    check_tensor("matrix", matrix, (p, p), b)
    A = matrix.detach().double()
    if system.zero:
        return system.result("cholesky")
    factor, failed = torch.linalg.cholesky_ex(A)
    unit = max(p * EPS, torch.finfo(b.dtype).eps)
    if failed or unit * A.norm() * torch.cholesky_inverse(factor).norm() >= 1:
        smallest, largest = torch.linalg.eigvalsh(A)[[0, -1]].tolist()
        system.check_spectrum(smallest, largest, unit, bool(failed))
    return refine(
        "cholesky",
        system,
        lambda r: torch.cholesky_solve(r.double(), factor),
        lambda x: A @ x.double(),
        steps=1,
    )
