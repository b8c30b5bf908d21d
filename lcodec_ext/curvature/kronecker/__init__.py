"""Kronecker-factored curvature of selected rows, with corrected eigenvalues (EK-FAC).

The gradient of a sample by the rows P of a layer is a sum of outer products g x^T over positions: x
is the layer's input, g what reaches its outputs P from the loss. The block of these parameters is
taken to have the eigenvectors of G[P, P] (x) A, with A and G the second moments of x and g; its
eigenvalues are the exact mean squares of the gradients along them.
"""

from lcodec_ext.curvature.kronecker.factors import KroneckerFactors
from lcodec_ext.curvature.kronecker.operator import EKFACOperator, KroneckerOperator

__all__ = ["EKFACOperator", "KroneckerFactors", "KroneckerOperator"]
