"""Products by two backward passes through the delta hook.

The hook adds layer(x; d), with d = 0, to the output of a selected layer. Autograd differentiates by
d alone (docs/curvature.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, map_tensors
from lcodec_ext._torch.copies import graph_nodes
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext.curvature.masked.model import ForwardPass
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import SampleGradients
from lcodec_ext.curvature.routes import base
from lcodec_ext.curvature.routes.base import Route, gradient_graph, pull
from lcodec_ext.curvature.routes.gauss_newton import (
    NoRowsError,
    gauss_newton_diagonal,
    gauss_newton_rows,
)
from lcodec_ext.curvature.routes.low_rank import KeptRows, LowRank


class Form(ABC):
    """The matrix of one batch's loss, by backward passes through a graph that is kept."""

    @abstractmethod
    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        """Displacements of the parameters to gradients by them."""

    @abstractmethod
    def roots(self) -> list[Tensor]:
        """What the graph hangs on."""


class HessianForm(Form):
    """Second derivatives: the gradient's graph, pulled back by a vector."""

    def __init__(self, objective: Objective, run: ForwardPass, batch: Batch) -> None:
        objective.check_cut(run.outputs, batch)
        if any(node.name().startswith("WeightNormInterface") for node in graph_nodes(run.values)):
            raise ValueError(
                "the selected parameters are those of a weight norm, whose second derivatives "
                "PyTorch computes wrongly; take the GaussNewtonOperator or the FisherOperator, or "
                "other parameters"
            )
        self._by = run.displacements
        self._gradient = gradient_graph(objective.loss(run.outputs, batch), self._by)

    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        return pull(self._gradient, self._by, d)

    def roots(self) -> list[Tensor]:
        return list(self._gradient)


class GaussNewtonForm(Form):
    """J^T H J: J v is the derivative by u of J^T u, which is linear in u."""

    def __init__(self, objective: Objective, run: ForwardPass, batch: Batch) -> None:
        objective.check_cut(run.outputs, batch)
        self._by, self._values = run.displacements, run.values
        self._u = [torch.zeros_like(value, requires_grad=True) for value in run.values]
        self._pulled: Sequence[Tensor] = ()
        if run.values:
            self._pulled = torch.autograd.grad(
                run.values, self._by, self._u, create_graph=True, materialize_grads=True
            )
        self._leaves = [value.detach().requires_grad_() for value in run.values]
        leaf = {id(value): leaf for value, leaf in zip(run.values, self._leaves, strict=True)}
        outputs = map_tensors(lambda t: leaf.get(id(t), t), run.outputs)
        loss = objective.loss(outputs, batch)
        objective.masked.check_loss(loss, run.displacements)
        self._gradient = gradient_graph(loss, self._leaves)

    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._values:
            return [torch.zeros_like(part) for part in d]
        moved = pull(self._pulled, self._u, d)
        return pull(self._values, self._by, pull(self._gradient, self._leaves, moved))

    def roots(self) -> list[Tensor]:
        return [*self._pulled, *self._values, *self._gradient]


class DeltaRoute(Route):
    """Products by backward passes that end at the first selected layer."""

    formed_cheaply = False

    def __init__(self, objective: Objective, form: Callable[..., Form], why: str) -> None:
        self._objective, self._form = objective, form
        self._diagonal: Tensor | None = None
        self._rows: dict[int, LowRank | None] = {}
        self._kept: dict[int, tuple[Form, Batch]] = {}
        model = objective.masked.model
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        most, total = base.cache_bytes(objective), 0
        for number, batch in objective.passes("primal"):
            built = self._build(batch)
            total += graph_bytes(built.roots(), own)
            if total <= most or number == 0:
                self._kept[number] = built, batch
            del built
        self.graph_bytes = total
        kept, n_batches = len(self._kept), objective.n_batches
        self.plan = (
            f"delta hook, {why}: backward passes from the loss to the first selected layer, for "
            f"the selected rows only, on graphs that are kept ({kept} of {n_batches} batches"
            + (f", {most >> 20} MiB; the others run forward again" * (kept < n_batches))
            + ")"
        )
        for name, reason in objective.masked.whole.items():
            self.plan += f"; whole gradients of {name}: {reason}"

    def _build(self, batch: Batch) -> Form:
        run = self._objective.run(batch)
        with twice_differentiable():
            return self._form(self._objective, run, batch)

    def product(self, V: Tensor) -> Tensor:
        objective = self._objective
        columns = [objective.masked.split(column) for column in V.T]
        total = [[torch.zeros_like(part) for part in d] for d in columns]

        def add(built: Form, batch: Batch) -> None:
            with twice_differentiable():
                for out, d in zip(total, columns, strict=True):
                    for each, part in zip(out, built.product(d), strict=True):
                        each.add_(part.detach(), alpha=objective.share(batch))

        for built, batch in self._kept.values():
            add(built, batch)
        if len(self._kept) < objective.n_batches:
            for _, batch in objective.passes(skip=self._kept):
                add(self._build(batch), batch)
        # Each part goes once it is joined, and one column is not copied: all of them are as large
        # as the model.
        joined = [objective.masked.join(out.pop(0) for _ in range(len(out))) for out in total]
        return joined[0][:, None] if len(joined) == 1 else torch.stack(joined, 1)

    def diagonal(self) -> Tensor | None:
        return self.scale() if self._form is GaussNewtonForm else None

    def scale(self) -> Tensor | None:
        if self._diagonal is None:
            self._diagonal = gauss_newton_diagonal(self._objective)
        return self._diagonal

    def dense(self) -> Tensor | None:
        if self._form is not GaussNewtonForm:
            return None
        p = self._objective.masked.size
        total = self._objective.masked.zeros(p, p)
        try:
            for values, share, rows in gauss_newton_rows(self._objective, what="matrix"):
                weights = values * share
                R = rows.dense()
                total.addmm_(R.T, R * weights[:, None])
        except NoRowsError:
            return None
        return total

    def low_rank(self, most: int) -> LowRank | None:
        if self._form is not GaussNewtonForm or self._objective.n_samples > most:
            return None
        if most not in self._rows:
            self._rows[most] = self._low_rank(most)
        return self._rows[most]

    def _low_rank(self, most: int) -> LowRank | None:
        weights: list[Tensor] = []

        def chunks() -> Iterator[SampleGradients]:
            for values, share, rows in gauss_newton_rows(self._objective, most):
                weights.append(values * share)
                yield rows

        try:
            kept = KeptRows(chunks(), base.cache_bytes(self._objective))
        except NoRowsError:
            return None
        if not kept.complete or not weights:  # none: the loss is linear in the outputs
            return None
        return kept.low_rank(torch.cat(weights))


def graph_bytes(roots: Sequence[Tensor], others: set[int]) -> int:
    """Memory that a graph keeps, without the storages of others."""
    storages: dict[int, int] = {}
    for node in graph_nodes(roots):
        if node.name().endswith("::Error"):
            raise ValueError(
                "the model or the loss has a function that is marked @once_differentiable"
            )
        for name in _saved_names(type(node)):
            saved = getattr(node, name)
            for tensor in saved if isinstance(saved, tuple | list) else (saved,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(n for address, n in storages.items() if address not in others)


_SAVED: dict[type, list[str]] = {}


def _saved_names(kind: type) -> list[str]:
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_saved_")]
    return _SAVED[kind]
