"""Matrices of second derivatives, restricted to the parameters of selected units.

Nothing here forms a matrix of the whole model, or pays for parameters outside of the selection.
"""

from lcodec_ext.curvature.operators.base import CurvatureOperator, Method
from lcodec_ext.curvature.operators.fisher import FisherOperator, RestrictedFisher
from lcodec_ext.curvature.operators.gauss_newton import GaussNewtonOperator
from lcodec_ext.curvature.operators.hessian import HessianOperator
from lcodec_ext.curvature.operators.matrix import MatrixOperator
from lcodec_ext.curvature.operators.secant import SecantOperator

__all__ = [
    "CurvatureOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "MatrixOperator",
    "Method",
    "RestrictedFisher",
    "SecantOperator",
]
