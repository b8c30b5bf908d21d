"""Cholesky factorisation."""

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.result import SolveResult, _refusal
from lcodec_ext.curvature.solvers.system import _EPS, _check, _refine, _System


def cholesky(matrix: Tensor, b: Tensor, *, describe: str, advice: str | None = None) -> SolveResult:
    """Solve with a dense positive definite matrix by its Cholesky factorisation, in float64.

    Parameters
    ----------
    matrix : Tensor of the dtype of b, shape (p, p)
        Symmetric: the lower triangle is factorised.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    describe, advice
        As in `conjugate_gradient`.

    Returns
    -------
    SolveResult
        With a step of iterative refinement in the columns where that lowers the residual.

    Raises
    ------
    IndefiniteCurvatureError
        If the smallest eigenvalue is at most p eps times the largest (with the eps of float64; for
        float32, whose entries resolve no more, at least eps of float32 times the largest).
    ValueError
        For arguments of wrong shapes or dtypes, NaN or infinity in them.

    Notes
    -----
    p^3 / 3 multiplications for the factor and 2 p^3 / 3 for the inverse, whose norm bounds the
    smallest eigenvalue from below. Eigenvalues are computed only where that does not tell.
    """
    system = _System(None, b, describe)
    p = len(b)
    _check("matrix", matrix, (p, p), b)
    A = matrix.detach().double()
    if system.zero:
        return system.result("cholesky")
    factor, failed = torch.linalg.cholesky_ex(A)
    unit = max(p * _EPS, torch.finfo(b.dtype).eps)
    if failed or unit * A.norm() * torch.cholesky_inverse(factor).norm() >= 1:
        smallest, largest = torch.linalg.eigvalsh(A)[[0, -1]].tolist()
        rounding = unit * max(largest, -smallest)
        if failed or smallest <= rounding:
            found = f"its smallest eigenvalue is {smallest:.4g}, the largest {largest:.4g}"
            raise _refusal(describe, found, smallest, smallest < -rounding, advice)
    return _refine(
        "cholesky",
        system,
        lambda r: torch.cholesky_solve(r.double(), factor),
        lambda x: A @ x.double(),
        steps=1,
    )
