"""What the operators have in common that a model, a loss and data make."""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_integer, check_real
from lcodec_ext._torch.decay import Decay, decay_of, decay_text, vector_of
from lcodec_ext._torch.group import AnyRanks, Ranks, ranks_of
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import check_module, plain_arithmetic
from lcodec_ext._torch.shards import without_repeats
from lcodec_ext._torch.wrapped import told_of, unwrapped
from lcodec_ext.curvature.masked.model import MaskedModel
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.operators.base import SMALL, SMALL_CHEAP, CurvatureOperator
from lcodec_ext.curvature.parameters import Selection
from lcodec_ext.curvature.routes.base import Route
from lcodec_ext.curvature.routes.delta import DeltaRoute, Form
from lcodec_ext.curvature.routes.head import HeadRoute, NotAHeadError
from lcodec_ext.curvature.routes.low_rank import LowRank
from lcodec_ext.curvature.routes.sharded import ShardedRoute


class ModelOperator(CurvatureOperator):
    """What the operators have in common that a model, a loss and data make."""

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: Selection,
        *,
        damping: float = 0.0,
        weight_decay: Any = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        cache_bytes: int | None = None,
        group: Any = None,
    ) -> None:
        ranks = ranks_of(group, type(self).__name__)
        with ranks.alone("the arguments"):
            self.damping = check_real(damping, "damping", 0)
            if cache_bytes is not None:
                check_integer(cache_bytes, "cache_bytes", 0)
            options: dict[str, Any] = {"dtype": dtype, "reduction": reduction, "progress": progress}
            options["cache_bytes"] = cache_bytes
            model, self.weight_decay, objective = own_objective(
                ranks, model, loss_fn, data, selection, weight_decay, **options
            )
        if isinstance(ranks, Ranks):
            options = {"kind": self._kind, "damping": self.damping, "reduction": reduction}
            agree(ranks, model, objective, self.weight_decay, options)
        self._progress, self._ranks = objective.progress, ranks
        self.selection = objective.selection
        masked = objective.masked
        self.shape, self.dtype, self.device = (masked.size,) * 2, masked.dtype, masked.device
        self._objective = objective
        self._route = (
            ShardedRoute(ranks, objective, self._choose)
            if isinstance(ranks, Ranks)
            else self._choose(objective)
        )
        self.plan = self._route.plan
        self.shift, self.decay = decayed(self.damping, self.weight_decay, masked)
        self.formed_up_to = SMALL_CHEAP if self._route.formed_cheaply else SMALL

    @property
    def graph_bytes(self) -> int:
        """Memory of the graphs of all batches, whether they are kept or not."""
        return self._route.graph_bytes

    @abstractmethod
    def _choose(self, objective: Objective) -> Route:
        """The route for the case."""

    def _describe(self) -> str:
        return (
            f"the {self._kind} on {self.shape[0]:,} selected parameters, with weight_decay="
            f"{decay_text(self.weight_decay)} and damping={self.damping:g} included"
        )

    def _product(self, V: Tensor) -> Tensor:
        return self._route.product(V)

    def _diagonal(self) -> Tensor | None:
        return self._route.diagonal()

    def _low_rank(self, most: int) -> LowRank | None:
        return self._route.low_rank(most)

    def _dense(self) -> Tensor | None:
        return self._route.dense()


def own_objective(
    ranks: AnyRanks,
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    selection: Any,
    weight_decay: Any,
    *,
    progress: bool,
    **options: Any,
) -> tuple[nn.Module, Decay, Objective]:
    """The model itself, its weight decay, and the objective on this rank's samples.

    Repeats of a sampler are left out. options are those of `Objective`.
    """
    model = unwrapped(model)
    check_module(model)
    decay = decay_of(weight_decay, model)
    if isinstance(ranks, Ranks):
        data = without_repeats(data, "data", ranks, getattr(data, "batch_size", None) or 1)
    shown = check_bool(progress, "progress") and ranks.rank == 0
    shared = isinstance(ranks, Ranks)
    options |= {"progress": shown, "shared": shared}
    return model, decay, Objective(model, loss_fn, data, selection, **options)


def agree(
    ranks: Ranks, model: nn.Module, objective: Objective, decay: Decay, options: dict[str, Any]
) -> None:
    """Check that all ranks have the same model, selection and options; count their tokens."""
    masked = objective.masked
    digest = hashlib.sha256(repr(objective.selection.to_dict()).encode()).hexdigest()[:16]
    ranks.agree(
        {
            **told_of(model),
            "selection": f"{objective.selection!r}, digest {digest}",
            "dtype": str(masked.dtype),
            "weight_decay": dict(decay) if isinstance(decay, Mapping) else decay,
            **options,
        }
    )
    tokens, n = objective.tokens or (0, 0)
    told = ranks.gather(np.array([objective.tokens is not None, tokens, n], np.int64))
    if told[:, 0].any():
        rank = next((r for r, each in enumerate(told) if not each[0]), None)
        if rank is not None:
            raise ValueError(
                f"loss_fn is a mean over tokens on some ranks, which the data of rank {rank} do "
                "not show: say so on all, per_token_loss(loss_fn)"
            )
        objective.count_tokens(int(told[:, 1].sum()), int(told[:, 2].sum()))


def decayed(
    damping: float, weight_decay: Decay, masked: MaskedModel
) -> tuple[float, Tensor | None]:
    """What damping and weight decay add to every entry of the diagonal, and what to each."""
    if not isinstance(weight_decay, Mapping):
        return damping + weight_decay, None
    return damping, vector_of(weight_decay, masked.layout, masked.base)


def head_or_delta(objective: Objective, form: type[Form]) -> Route:
    """Factored rows where the units are those of a head, else backward passes."""
    try:
        return HeadRoute(objective)
    except NotAHeadError as reason:
        return DeltaRoute(objective, form, str(reason))
