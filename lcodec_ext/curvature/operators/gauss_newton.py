"""The generalised Gauss-Newton matrix."""

from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.operators.on_model import ModelOperator, head_or_delta
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.delta import GaussNewtonForm


class GaussNewtonOperator(ModelOperator):
    """The generalised Gauss-Newton matrix of a loss by the parameters of selected units.

    ::

        G = (1/N) sum_b n_b J_b^T (d2 loss_b / dz dz) J_b + (weight_decay + damping) I

    with z the model's outputs and J their derivative by the parameters. Never indefinite where the
    loss is convex in the outputs, as cross-entropy and squared error are, and the Hessian where the
    outputs are linear in the parameters.

    Parameters, errors and cost are those of `HessianOperator`. Where loss_fn is a plain mean or sum
    and a sample has at most 64 outputs, the diagonal takes a backward pass for each of them, and
    few samples are solved in the rows of J ("woodbury").

    References
    ----------
    Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    Neural Computation 14.
    """

    _kind = "gauss_newton matrix"

    def _choose(self, objective: Objective) -> Route:
        return head_or_delta(objective, GaussNewtonForm)
