"""The Hessian."""

from torch import Tensor

from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.operators.base import positive
from lcodec_ext.curvature.operators.on_model import ModelOperator, head_or_delta
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.delta import HessianForm


class HessianOperator(ModelOperator):
    """The Hessian of a loss by the parameters of selected units.

    ::

        H = (1/N) sum_b n_b d2 loss_b / dw dw + (weight_decay + damping) I

    over batches b of n_b samples, N in all; without 1/N and n_b for ``reduction="sum"``. Where
    loss_fn is a mean over samples, this is the Hessian of the mean loss however they are batched.
    Of a mean over tokens, told by `lcodec_ext.unlearning.per_token_loss` or found out, it is that
    of the mean over all counted tokens. Of samples with one label each, some of which are ignored
    (-100), it is the mean where each batch has the same share of them; others are refused, and
    ``reduction="sum"``, times 1 / (valid labels), or `per_token_loss` is exact.

    Parameters
    ----------
    model : Module
        Any that PyTorch differentiates twice. The operator keeps a copy, in evaluation mode: the
        model is left as it is, and may change afterwards without changing the operator.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar tensor. Of outputs with `logits`, as the models of
        transformers return them, it is given these.
    data : tensors, Dataset, DataLoader, iterable of batches, or callable
        A batch is (inputs, ..., targets), with the last entry for the loss and the others for the
        model (a tuple or dict of inputs is unpacked), or a dict of the model's keywords with the
        targets as "labels". A Dataset, or tensors that are one such batch, is cut into batches of
        128; the loss must then be a plain mean, or sum, over samples. A callable returns an
        iterable of batches. Data are read several times and must be the same each time; torch's
        random numbers are repeated, and left to the caller as they were. Tensors are moved to the
        model's device.
    selection : UnitSelection or ParameterSelection
        The coordinates, in its order.
    damping : float, default 0.0
        Added to the diagonal.
    weight_decay : float, Optimizer or mapping of str to float, default 0.0
        lambda of the objective's (lambda / 2) |w|^2, added to the diagonal. An optimizer of the
        model's parameters has it by groups, a mapping by parameter name (0 where there is none).
    reduction : {"mean", "sum"}, default "mean"
        Of loss_fn, and of the matrix.
    dtype : torch.float32 or torch.float64, optional
        To which model and data are converted. By default float64 where a selected parameter is,
        float32 otherwise, as for bfloat16 weights.
    progress : bool, default False
        Show progress bars; needs tqdm.
    cache_bytes : int, optional
        Of graphs, or gradients of samples, that are kept from one product to the next; the graph of
        the first batch always is. 512 MiB by default.
    group : torch.distributed.ProcessGroup, optional
        Over whose ranks the samples are spread: data are those of this rank, any number or none.
        The matrix is that of all samples, each counted once, whoever has it. All ranks call with
        the same model and options, and make the same calls of the operator, which all return the
        same. A product sends p numbers and one a rank (docs/distributed.md). A model may be wrapped
        in DistributedDataParallel: units and parameters have the names of the model inside.

    Raises
    ------
    ValueError, TypeError
        For units that cannot be selected, data or options that cannot be used, and a loss that is
        not finite; the message names it. Over a group also for what differs between ranks.
    RuntimeError
        Over a group, where another rank failed.

    Notes
    -----
    If the units are of one layer whose outputs are the model's (a Linear, or a convolution under
    global average pooling), its inputs are kept, and a product is two matrix products of N x r x D.
    Otherwise the gradient's graph is kept for up to 512 MiB, and a product is two passes from the
    loss back to the first selected layer. Both are exact; `plan` says which, and docs/curvature.md
    how they work.

    The Hessian of a network is usually indefinite, and `solve` then raises
    `IndefiniteCurvatureError`: see `GaussNewtonOperator`. Its diagonal takes p products.

    References
    ----------
    Pearlmutter (1994), Fast exact multiplication by the Hessian. Neural Computation 6.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature import HessianOperator, UnitSelection
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    >>> H = HessianOperator(
    ...     model, torch.nn.functional.cross_entropy, (X, y), UnitSelection({"2": [0, 1]}),
    ...     damping=0.1,
    ... )
    >>> H.shape, (H @ torch.ones(18)).shape
    ((18, 18), torch.Size([18]))
    >>> H.solve(torch.ones(18)).method
    'cholesky'
    """

    _kind = "hessian"

    def _choose(self, objective: Objective) -> Route:
        return head_or_delta(objective, HessianForm)

    def _preconditioner(self) -> Tensor:
        scale = self._route.scale()
        return super()._preconditioner() if scale is None else positive(self._shifted(scale))

    def _advice(self) -> str | None:
        return "GaussNewtonOperator, which is never indefinite for a convex loss"
