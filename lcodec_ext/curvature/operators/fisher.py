"""Fisher matrices."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, counted
from lcodec_ext._torch.loss import LossFunction, known_loss
from lcodec_ext._torch.modes import plain_arithmetic
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.operators.base import SMALL_CHEAP, CurvatureOperator
from lcodec_ext.curvature.operators.on_model import ModelOperator, head_or_delta
from lcodec_ext.curvature.parameters import ParameterSelection, Selection
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.delta import GaussNewtonForm
from lcodec_ext.curvature.routes.fisher import FisherRoute, stored_product
from lcodec_ext.curvature.routes.low_rank import LowRank, StoredRows
from lcodec_ext.curvature.selection import UnitSelection

_LEAST_RUN = 8  # coordinates in a segment, on average, below which columns are copied


class FisherOperator(ModelOperator):
    """The Fisher matrix of a loss by the parameters of selected units.

    ::

        kind="empirical":  F = (1/N) sum_i g_i g_i^T + (weight_decay + damping) I
        kind="model":      the same with the expectation over targets that the model predicts

    where g_i is the gradient of sample i's loss. For kind="model" the loss must be a negative log
    likelihood in its natural parameter: softmax cross-entropy, BCE with logits or squared error.
    The matrix then is the Gauss-Newton matrix.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress,
    cache_bytes, group
        As for `HessianOperator`. loss_fn must be a plain mean or sum over samples.
    kind : {"empirical", "model"}, default "empirical"

    Raises
    ------
    ValueError, TypeError
        As `HessianOperator`; for a loss other than a plain mean or sum; for kind="model" with a
        loss other than these.

    Notes
    -----
    Gradients of samples are kept: as factors where they are outer products (a Linear layer without
    positions), else stored, N p numbers that a product reads once. Above 512 MiB they are kept as
    factors by position, or formed again for every product. Up to 2048 samples are solved in their
    rows, with an N x N matrix. Over a group each rank keeps the gradients of its own samples; those
    of all but the first rank are sent once for that matrix, N p numbers.

    References
    ----------
    Martens (2020), New insights and perspectives on the natural gradient method. JMLR 21.
    """

    _kind = "Fisher matrix"

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: Selection,
        *,
        kind: Literal["empirical", "model"] = "empirical",
        damping: float = 0.0,
        weight_decay: Any = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        cache_bytes: int | None = None,
        group: Any = None,
    ) -> None:
        self.kind = check_choice(kind, "kind", ("empirical", "model"))
        own = loss_fn.loss_fn if isinstance(loss_fn, TokenLoss) else loss_fn
        if kind == "model" and own is not None and known_loss(own) is None:
            raise ValueError(
                "kind='model' needs a loss that is a negative log likelihood: cross_entropy, "
                "binary_cross_entropy_with_logits or mse_loss of torch.nn.functional, a "
                "functools.partial of them, or CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, "
                f"without class weights, or per_token_loss() of these; got {loss_fn!r}"
            )
        super().__init__(
            model,
            loss_fn,
            data,
            selection,
            damping=damping,
            weight_decay=weight_decay,
            reduction=reduction,
            dtype=dtype,
            progress=progress,
            cache_bytes=cache_bytes,
            group=group,
        )

    def _choose(self, objective: Objective) -> Route:
        if self.kind == "empirical":
            return FisherRoute(objective)
        return head_or_delta(objective, GaussNewtonForm)

    def restrict(self, selection: Selection) -> "RestrictedFisher":
        """The operator of fewer parameters, on the same stored gradients.

        Without a copy of them, but for scattered single parameters.

        Parameters
        ----------
        selection : UnitSelection or ParameterSelection
            Part of the operator's own.

        Raises
        ------
        ValueError
            For units that this operator does not have, and where no gradients are stored (see
            `plan`).
        """
        stored = self._route.stored if isinstance(self._route, FisherRoute) else ()
        if not stored:
            raise ValueError(f"restrict() needs stored gradients; this operator has {self.plan}")
        return RestrictedFisher(self, selection, stored)


class RestrictedFisher(CurvatureOperator):
    """What `FisherOperator.restrict` returns."""

    _kind = "Fisher matrix"

    def __init__(
        self, whole: FisherOperator, selection: Selection, stored: Sequence[Tensor]
    ) -> None:
        if not isinstance(selection, UnitSelection | ParameterSelection) or not selection:
            raise ValueError(
                "selection must be a UnitSelection or ParameterSelection with at least one entry; "
                f"got {selection!r}"
            )
        own = whole._objective.selection
        if isinstance(selection, UnitSelection) and isinstance(own, UnitSelection):
            others = selection - own
            if others:
                raise ValueError(f"selection must be part of the operator's; that lacks {others}")
        columns = whole._objective.masked.columns(selection)
        if (columns < 0).any():
            raise ValueError(
                "selection must be part of the operator's; that lacks "
                f"{int((columns < 0).sum()):,} of its {len(columns):,} parameters"
            )
        self.decay = None if whole.decay is None else whole.decay[columns]
        breaks = (columns.diff() != 1).nonzero()[:, 0] + 1
        starts = torch.cat([breaks.new_zeros(1), breaks])
        lengths = torch.cat([breaks, breaks.new_tensor([len(columns)])]) - starts
        # In another order, as tied parameters may be, or scattered: the kernel takes long runs.
        if (columns.diff() <= 0).any() or len(columns) < _LEAST_RUN * len(starts):
            stored = [G[:, columns] for G in stored]
            columns, starts = torch.arange(len(columns), device=columns.device), starts[:1]
            lengths = lengths.new_tensor([len(columns)])
        self._stored, self._columns = stored, columns
        self._segments = torch.stack([columns[starts], lengths], 1)
        self._share = whole._objective.sample_share
        self.selection, self.shift, self.formed_up_to = selection, whole.shift, SMALL_CHEAP
        self.plan = f"{counted(len(self._segments), 'segment')} of {whole.plan}"
        self.shape = (len(columns), len(columns))
        self.dtype, self.device = whole.dtype, whole.device

    def _product(self, V: Tensor) -> Tensor:
        return stored_product(self._stored, V, self._segments, self._share)

    def _diagonal(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for G in self._stored:
            total += G[:, self._columns].square().sum(0)
        return total * self._share

    def _low_rank(self, most: int) -> LowRank | None:
        n = sum(map(len, self._stored))
        if n > most:
            return None
        weights = torch.full((n,), self._share, dtype=self.dtype, device=self.device)
        return StoredRows(tuple(G[:, self._columns] for G in self._stored), weights)
