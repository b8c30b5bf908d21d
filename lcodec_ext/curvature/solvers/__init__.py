"""Solvers of symmetric systems ``A x = b`` with curvature matrices, given as functions or dense.

Every solver returns a `SolveResult`, whose residual is that of the x in it, from a product of its
own: what a recurrence believes is never reported. Every one takes ``b`` as one column of shape (p,)
or as several of shape (p, m), in float32 or float64. ``product`` is called with tensors of as many
dimensions as b has, (p,) or (p, k) with k <= m, scaled by powers of 2; it may use autograd, and
must not write to them. ``describe`` names the matrix in messages, as "the Hessian on 12 selected
parameters, with damping=0.001 included".
"""

from lcodec_ext.curvature.solvers.cg import conjugate_gradient
from lcodec_ext.curvature.solvers.cholesky import cholesky
from lcodec_ext.curvature.solvers.krylov import Krylov
from lcodec_ext.curvature.solvers.minres import minres
from lcodec_ext.curvature.solvers.result import (
    ConvergenceWarning,
    IndefiniteCurvatureError,
    SolveResult,
)
from lcodec_ext.curvature.solvers.system import Product
from lcodec_ext.curvature.solvers.woodbury import woodbury

__all__ = [
    "ConvergenceWarning",
    "IndefiniteCurvatureError",
    "Krylov",
    "Product",
    "SolveResult",
    "cholesky",
    "conjugate_gradient",
    "minres",
    "woodbury",
]
