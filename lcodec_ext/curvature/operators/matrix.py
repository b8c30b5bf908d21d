"""A matrix that was formed before."""

from torch import Tensor

from lcodec_ext.curvature.operators.base import CurvatureOperator
from lcodec_ext.curvature.routes.low_rank import LowRank


class MatrixOperator(CurvatureOperator):
    """A matrix that was formed before, plus damping.

    Parameters
    ----------
    matrix : Tensor of float32 or float64, shape (p, p)
        Symmetric, without damping; kept as it is.
    shift : float
        Damping and weight decay.
    origin : str
        Where the matrix is from, for `plan`: "saved at training time".
    """

    def __init__(self, matrix: Tensor, shift: float, origin: str) -> None:
        self.matrix, self.shift, self.formed_up_to = matrix, shift, len(matrix)
        self.plan = f"{len(matrix)} x {len(matrix)} matrix {origin}"
        self.shape = (len(matrix), len(matrix))
        self.dtype, self.device = matrix.dtype, matrix.device

    def _product(self, V: Tensor) -> Tensor:
        return self.matrix @ V

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal()

    def _low_rank(self, most: int) -> LowRank | None:
        return None

    def _dense(self) -> Tensor:
        return self.matrix.clone()  # to_dense writes to it
