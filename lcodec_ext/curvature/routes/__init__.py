"""How a matrix multiplies: the cheapest way that is exact for the case.

A route is built in one pass over the data, and has the matrix of the objective without damping.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, map_tensors
from lcodec_ext._torch.loss import known_loss
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext.curvature.kernels import factored_gram, masked_gram_product, softmax_rows_product
from lcodec_ext.curvature.masked import Run, graph_nodes, is_convolution, is_linear, patches
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.per_sample import (
    MAX_BYTES,
    SampleGradients,
    chunks,
    gradients_by_seeds,
    has_factors,
    pieces,
)

CACHE_BYTES = 2**29  # of what is kept from one product to the next
FEW_ROWS = 2048  # of a matrix of low rank that is solved in its rows
_FEW_OUTPUTS = 64  # whose second derivatives are formed for a diagonal


class LowRank(ABC):
    """A matrix R^T diag(weights) R with k rows in R, which need not be stored."""

    weights: Tensor  # (k,)

    @abstractmethod
    def gram(self) -> Tensor:
        """R R^T."""

    @abstractmethod
    def project(self, B: Tensor) -> Tensor:
        """R B for B of shape (p, m)."""

    @abstractmethod
    def lift(self, C: Tensor) -> Tensor:
        """R^T C for C of shape (k, m)."""


@dataclass(frozen=True)
class StoredRows(LowRank):
    """R itself, in pieces of some rows."""

    pieces: tuple[Tensor, ...]
    weights: Tensor

    def gram(self) -> Tensor:
        return torch.cat([torch.cat([a @ b.T for b in self.pieces], 1) for a in self.pieces])

    def project(self, B: Tensor) -> Tensor:
        return torch.cat([piece @ B for piece in self.pieces])

    def lift(self, C: Tensor) -> Tensor:
        total = C.new_zeros(self.pieces[0].shape[1], C.shape[1])
        for piece, part in zip(
            self.pieces, torch.split(C, [len(piece) for piece in self.pieces]), strict=True
        ):
            total.addmm_(piece.T, part)
        return total


class Route(ABC):
    """A way to multiply by the matrix of an objective."""

    plan: str  # which way and why, for people

    @abstractmethod
    def product(self, V: Tensor) -> Tensor:
        """The matrix times the columns of V, shape (p, m)."""

    def diagonal(self) -> Tensor | None:
        """The diagonal, where it costs less than p products."""
        return None

    def low_rank(self, most: int) -> LowRank | None:
        """The matrix by at most so many rows, where it has such a form."""
        return None

    def dense(self) -> Tensor | None:
        """The matrix itself, where it costs less than p products."""
        return None


# ---------------------------------------------------------------------------------------------
# The delta hook: everything that autograd differentiates twice


class Form(ABC):
    """The matrix of one batch's loss, by backward passes through a graph that is kept."""

    @abstractmethod
    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        """Displacements of the parameters to gradients by them."""

    @abstractmethod
    def roots(self) -> list[Tensor]:
        """What the graph hangs on."""


def _pull(
    values: Sequence[Tensor], by: Sequence[Tensor], seeds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """sum seeds . d values / d by, keeping the graph; zeros where nothing depends."""
    pairs = [(v, s) for v, s in zip(values, seeds, strict=True) if v.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in by]
    roots, seeds = zip(*pairs, strict=True)
    return torch.autograd.grad(roots, by, seeds, retain_graph=True, materialize_grads=True)


def _gradient(loss: Tensor, by: Sequence[Tensor]) -> Sequence[Tensor]:
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in by]
    return torch.autograd.grad(loss, by, create_graph=True, materialize_grads=True)


class HessianForm(Form):
    """Second derivatives: the gradient's graph, pulled back by a vector."""

    def __init__(self, objective: Objective, run: Run, batch: Batch) -> None:
        objective.check_cut(run.outputs, batch)
        self._by = run.displacements
        self._gradient = _gradient(objective.loss(run.outputs, batch), self._by)

    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        return _pull(self._gradient, self._by, d)

    def roots(self) -> list[Tensor]:
        return list(self._gradient)


class GaussNewtonForm(Form):
    """J^T H J: J v is the derivative by u of J^T u, which is linear in u."""

    def __init__(self, objective: Objective, run: Run, batch: Batch) -> None:
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
        self._gradient = _gradient(loss, self._leaves)

    def product(self, d: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._values:
            return [torch.zeros_like(part) for part in d]
        moved = _pull(self._pulled, self._u, d)
        return _pull(self._values, self._by, _pull(self._gradient, self._leaves, moved))

    def roots(self) -> list[Tensor]:
        return [*self._pulled, *self._values, *self._gradient]


class DeltaRoute(Route):
    """Products by backward passes that end at the first selected layer."""

    def __init__(self, objective: Objective, form: Callable[..., Form], why: str) -> None:
        self._objective, self._form = objective, form
        self._diagonal: Tensor | None = None
        self._rows: dict[int, LowRank | None] = {}
        self._kept: dict[int, tuple[Form, Batch]] = {}
        own = {t.untyped_storage().data_ptr() for t in objective.masked.model.state_dict().values()}
        total = 0
        for number, batch in objective.passes("primal"):
            built = self._build(batch)
            total += graph_bytes(built.roots(), own)
            if total <= CACHE_BYTES or number == 0:
                self._kept[number] = built, batch
            del built
        kept, n_batches = len(self._kept), objective.n_batches
        self.plan = (
            f"delta hook, {why}: backward passes from the loss to the first selected layer, for "
            f"the selected rows only, on graphs that are kept ({kept} of {n_batches} batches"
            + (f", {CACHE_BYTES >> 20} MiB; the others run forward again" * (kept < n_batches))
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
        return torch.stack([objective.masked.join(out) for out in total], 1)

    def diagonal(self) -> Tensor | None:
        if self._form is GaussNewtonForm and self._diagonal is None:
            self._diagonal = gauss_newton_diagonal(self._objective)
        return self._diagonal

    def dense(self) -> Tensor | None:
        if self._form is not GaussNewtonForm:
            return None
        p = self._objective.masked.size
        total = self._objective.masked.theta.new_zeros(p, p)
        for batch, blocks in _gauss_newton_rows(self._objective, what="matrix"):
            if blocks is None:
                return None
            for values, gradients in blocks:
                weights = values * self._objective.share(batch)
                R = gradients.dense()
                total.addmm_(R.T, R * weights[:, None])
        return total

    def low_rank(self, most: int) -> LowRank | None:
        if self._form is not GaussNewtonForm or self._objective.n_samples > most:
            return None
        if most not in self._rows:
            self._rows[most] = self._low_rank(most)
        return self._rows[most]

    def _low_rank(self, most: int) -> LowRank | None:
        kept: list[Any] = []
        weights: list[Tensor] = []
        n_bytes = 0
        plain: bool | None = None
        for batch, blocks in _gauss_newton_rows(self._objective, most):
            if blocks is None:
                return None
            for values, gradients in blocks:
                plain = gradients.is_plain() if plain is None else plain
                kept.append(gradients if plain else gradients.dense())
                weights.append(values * self._objective.share(batch))
                n_bytes += kept[-1].nbytes
                if n_bytes > CACHE_BYTES:
                    return None
        if not kept:  # the loss is linear in the outputs
            return None
        if plain:
            return PlainRows(kept, torch.cat(weights))
        return StoredRows(tuple(kept), torch.cat(weights))


def graph_bytes(roots: Sequence[Tensor], besides: set[int]) -> int:
    """Memory that a graph keeps, in tensors whose storages are not among those besides."""
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
    return sum(n for address, n in storages.items() if address not in besides)


_SAVED: dict[type, list[str]] = {}


def _saved_names(kind: type) -> list[str]:
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_saved_")]
    return _SAVED[kind]


# ---------------------------------------------------------------------------------------------
# Rows of a Gauss-Newton matrix


def output_hessians(objective: Objective, outputs: Tensor, batch: Batch) -> Tensor:
    """Second derivatives of every sample's loss by its own outputs, shape (n, C, C)."""
    z = outputs.detach().requires_grad_()
    n = batch.size
    loss = objective.loss(z, batch) * (n if objective.reduction == "mean" else 1)
    (gradient,) = _gradient(loss, [z])
    gradient = gradient.reshape(n, -1)
    rows = [
        _pull([gradient[:, c].sum()], [z], [torch.ones_like(loss)])[0]
        for c in range(gradient.shape[1])
    ]
    blocks = torch.stack([row.reshape(n, -1) for row in rows], 1)
    if not torch.isfinite(blocks).all():
        raise ValueError("the second derivative of the loss by the outputs is NaN or infinite")
    return blocks


Blocks = Iterator[tuple[Tensor, SampleGradients]]


def _gauss_newton_rows(
    objective: Objective, most: float = math.inf, what: str = ""
) -> Iterator[tuple[Batch, Blocks | None]]:
    """J_i^T e for every sample and every eigenvector e of its loss's second derivative.

    Of every batch; None where outputs are many or not by sample, or rows are more than most.
    """
    for key, batch in pieces(objective, MAX_BYTES, what):
        run = objective.run(batch)
        with twice_differentiable():
            outputs, n = run.outputs, batch.size
            if (
                not isinstance(outputs, Tensor)
                or not outputs.requires_grad
                or len(outputs) != n
                or outputs.numel() > n * _FEW_OUTPUTS
                or outputs.numel() // n * objective.n_samples > most
                or not objective.is_plain(outputs, batch, key)
                or not has_factors(objective, run, batch, key)
            ):
                yield batch, None
                return
            values, vectors = torch.linalg.eigh(output_hessians(objective, outputs, batch).double())
            values, vectors = values.to(outputs.dtype), vectors.to(outputs.dtype)

        def blocks(
            run: Run = run, values: Tensor = values, vectors: Tensor = vectors, n: int = n
        ) -> Blocks:
            for c in range(values.shape[1]):
                if values[:, c].any():
                    seeds = vectors[:, :, c].reshape(run.outputs.shape)
                    with twice_differentiable():
                        gradients = gradients_by_seeds(
                            objective.masked, run, [run.outputs], [seeds], n
                        )
                    # of the mean over the batch, as the share of the batch expects
                    yield values[:, c] / (n if objective.reduction == "mean" else 1), gradients

        yield batch, blocks()


def gauss_newton_diagonal(objective: Objective) -> Tensor | None:
    """The diagonal of the Gauss-Newton matrix, where outputs are few: C backward passes."""
    total = torch.zeros_like(objective.masked.theta)
    for batch, blocks in _gauss_newton_rows(objective, what="diagonal"):
        if blocks is None:
            return None
        for weights, gradients in blocks:
            total += gradients.combine_squares(weights) * objective.share(batch)
    return total


# ---------------------------------------------------------------------------------------------
# Factored rows: a layer whose outputs are the model's


@dataclass(frozen=True)
class _Head:
    """One layer of selected rows that gives the model's outputs, in a batch."""

    A: Tensor  # (n, D): its inputs, with ones for the bias
    z: Tensor  # (n, C): its outputs
    units: Tensor  # (r,)


def find_head(objective: Objective, run: Run) -> _Head | None:
    """The head, if all selected units are of one layer whose outputs, or their means, are z."""
    runs = objective.masked.layout.runs
    z = run.outputs
    if len(runs) > 1 or objective.masked.whole or len(run.layer_outputs) != 1:
        return None
    if not isinstance(z, Tensor) or len(run.values) != 1:
        return None
    added, ((out, version),) = run.added[0], run.layer_outputs
    if out._version != version:  # changed in place: what the layer gave is not there any more
        return None
    module, axis, places = added.rows.module, added.axis, added.rows.places
    if places is None:
        return None
    x = added.input
    if is_linear(module) and _only_views(z, out):
        A, z = x.reshape(-1, x.shape[-1]), z.detach().reshape(-1, out.shape[-1])
    elif is_convolution(module) and module.groups == 1 and _is_mean(z, out, axis):
        A, z = _mean_patches(module, x), z.detach().reshape(len(out), -1)
    else:
        return None
    keys = {each.rows.key for each in run.added}
    if "weight" not in keys:
        return None
    if "bias" in keys:
        A = torch.cat([A, A.new_ones(len(A), 1)], 1)
    return _Head(A.detach().contiguous(), z, places)


_VIEWS = ("ViewBackward", "UnsafeViewBackward", "SqueezeBackward", "UnsqueezeBackward")
_MEANS = ("MeanBackward", *_VIEWS)


def _between(z: Tensor, out: Tensor, allowed: tuple[str, ...]) -> bool:
    """Whether z is made of out by a chain of allowed operations."""
    node = z.grad_fn
    while node is not None and node is not out.grad_fn:
        if not node.name().startswith(allowed) or len(node.next_functions) != 1:
            return False
        node = node.next_functions[0][0]
    return node is not None


def _only_views(z: Tensor, out: Tensor) -> bool:
    return z.numel() == out.numel() and _between(z, out, _VIEWS)


def _is_mean(z: Tensor, out: Tensor, axis: int) -> bool:
    """Whether z is the mean of out over all positions."""
    if out.ndim != 1 - axis or not _between(z, out, _MEANS):
        return False
    mean = out.detach().flatten(2).mean(2)
    return z.shape.numel() == mean.numel() and torch.allclose(
        z.detach().reshape(mean.shape), mean, rtol=1e-5, atol=1e-7
    )


def _mean_patches(module: Any, x: Tensor) -> Tensor:
    per_sample = patches(module, x[:1]).nbytes
    parts = torch.split(x, max(1, MAX_BYTES // per_sample))
    return torch.cat([patches(module, part).mean(2) for part in parts])


class HeadRoute(Route):
    """Hessian and Gauss-Newton matrix, which are one: the outputs are linear in the parameters.

    With A the layer's inputs, ``Q = (H_L U)[:, rows]`` for ``U = A V^T`` and H_L the second
    derivative of the loss by the outputs, the product is ``Q^T A``.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        heads, batches = [], []
        for _, batch in objective.passes("inputs of the head"):
            run = objective.run(batch)
            head = find_head(objective, run)
            if head is None:
                raise NotAHeadError("the outputs are not linear in the selected parameters")
            objective.check_cut(run.outputs, batch)
            heads.append(head)
            batches.append((batch, run.outputs.detach()))
        self._units = heads[0].units
        self._A = torch.cat([head.A for head in heads])
        self._known = self._closed_form(heads, batches)
        r, width = len(self._units), self._A.shape[1]
        what = f"{r} rows of the layer that gives the outputs, {len(self._A)} inputs of {width}"
        if self._known is not None:
            self.plan = f"factored rows: {what}; second derivative of the loss in closed form"
        else:
            self.plan = f"factored rows: {what}; second derivative of the loss by autograd"
            self._gradients = [
                self._loss_gradient(head, outputs, batch)
                for head, (batch, outputs) in zip(heads, batches, strict=True)
            ]

    def _closed_form(self, heads: list[_Head], batches: list[Any]) -> "_OutputHessian | None":
        loss = known_loss(self._objective.loss_fn)
        if loss is None or loss.reduction != self._objective.reduction:
            return None
        if len({outputs.numel() / batch.size for batch, outputs in batches}) > 1:
            return None  # means over unequal numbers: batches have shares of their own
        z = torch.cat([head.z for head in heads])
        n, C = z.shape
        if loss.kind == "cross_entropy":
            for head, (batch, outputs) in zip(heads, batches, strict=True):
                y = batch.targets
                if outputs.shape != head.z.shape or y.ndim != 1 or y.is_floating_point():
                    return None
                if (y == loss.ignore_index).any():
                    return None
            P = z.softmax(1)[:, self._units].contiguous()
            return _OutputHessian(P, True, 1 / n if loss.reduction == "mean" else 1.0)
        if any(outputs.shape != batch.targets.shape for batch, outputs in batches):
            return None  # targets that are broadcast
        share = 1 / (n * C) if loss.reduction == "mean" else 1.0
        chosen = z[:, self._units]
        S = torch.full_like(chosen, 2.0)
        if loss.kind == "bce_with_logits":
            S = torch.sigmoid(chosen) * torch.sigmoid(-chosen)
        return _OutputHessian(S, False, share)

    def _loss_gradient(self, head: _Head, outputs: Tensor, batch: Batch) -> Any:
        with twice_differentiable():
            z = outputs.requires_grad_()
            (gradient,) = _gradient(self._objective.loss(z, batch), [z])
        return z, gradient, head.z.shape, self._objective.share(batch)

    def product(self, V: Tensor) -> Tensor:
        A, r = self._A, len(self._units)
        columns = []
        for column in V.T:
            W = column.reshape(r, -1)
            if self._known is not None:
                columns.append(self._known.product(A, W).flatten())
                continue
            U, Q, start = A @ W.T, [], 0
            for z, gradient, shape, share in self._gradients:
                moved = U.new_zeros(shape)
                moved[:, self._units] = U[start : start + len(moved)]
                start += len(moved)
                with twice_differentiable():
                    (pulled,) = _pull([gradient], [z], [moved.reshape(z.shape)])
                Q.append(pulled.reshape(shape)[:, self._units] * share)
            columns.append((torch.cat(Q).T @ A).flatten())
        return torch.stack(columns, 1)

    def diagonal(self) -> Tensor | None:
        if self._known is not None:
            return self._known.diagonal(self._A)
        return gauss_newton_diagonal(self._objective)

    def low_rank(self, most: int) -> LowRank | None:
        if self._known is None or self._known.S.numel() > most:
            return None
        return self._known.low_rank(self._A)


class NotAHeadError(Exception):
    """The selected units are not those of a layer that gives the outputs."""


@dataclass(frozen=True)
class _OutputHessian:
    """Second derivatives of the samples' losses by r outputs.

    share * (diag(S_i) - S_i S_i^T) for the softmax, else share * diag(S_i).
    """

    S: Tensor  # (n, r)
    softmax: bool
    share: float

    def product(self, A: Tensor, W: Tensor) -> Tensor:
        if self.softmax:
            return softmax_rows_product(A, self.S, W).mul_(self.share * len(A))
        return (self.S * (A @ W.T)).mul_(self.share).T @ A

    def diagonal(self, A: Tensor) -> Tensor:
        S = self.S * (1 - self.S) if self.softmax else self.S
        return (S.mul(self.share).T @ A.square()).flatten()

    def low_rank(self, A: Tensor) -> LowRank:
        root = self.S.sqrt()
        L = torch.diag_embed(root)
        if self.softmax:
            # (I - a u u^T)^2 = I - u u^T for u = root and a = (1 - sqrt(1 - |u|^2)) / |u|^2
            total = self.S.sum(1)
            a = 1 / (1 + (1 - total).clamp(min=0).sqrt())
            L = L - a[:, None, None] * self.S[:, :, None] * root[:, None, :]
        return FactoredRows(L.transpose(1, 2).contiguous(), A, self.share)


class FactoredRows(LowRank):
    """Rows L_ik (x) a_i: k outer products for each of n samples."""

    def __init__(self, L: Tensor, A: Tensor, share: float) -> None:
        self._L, self._A = L, A  # (n, k, r), (n, D)
        self.weights = A.new_full((L.shape[0] * L.shape[1],), share)

    def gram(self) -> Tensor:
        k = self._L.shape[1]
        return factored_gram(self._L.flatten(0, 1), self._A.repeat_interleave(k, 0))

    def project(self, B: Tensor) -> Tensor:
        r = self._L.shape[2]
        U = torch.einsum("nd,rdm->nrm", self._A, B.reshape(r, -1, B.shape[1]))
        return (self._L @ U).flatten(0, 1)

    def lift(self, C: Tensor) -> Tensor:
        n, k, _ = self._L.shape
        Q = self._L.transpose(1, 2) @ C.reshape(n, k, -1)
        return torch.einsum("nrm,nd->rdm", Q, self._A).flatten(0, 1)


# ---------------------------------------------------------------------------------------------
# The empirical Fisher matrix


class FisherRoute(Route):
    """sum_i g_i g_i^T by gradients of samples: stored, as factors, or formed again every time."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self.stored: tuple[Tensor, ...] = ()
        self._factors: tuple[SampleGradients, ...] = ()
        n_bytes = 0
        kept: list[Any] = []
        mode = "stored"
        for number, gradients in enumerate(self._chunks("gradients of samples")):
            if number == 0 and gradients.is_plain():
                mode = "plain"  # factors are smaller, and products with them cheaper
            kept.append(gradients.dense() if mode == "stored" else gradients)
            n_bytes += kept[-1].nbytes
            if n_bytes > CACHE_BYTES:
                break
        else:
            self._keep(mode, kept)
            return
        del kept[:]
        if mode == "stored":
            for gradients in self._chunks("factors of gradients"):
                kept.append(gradients)
                n_bytes = sum(each.nbytes for each in kept)
                if n_bytes > CACHE_BYTES or not gradients.factors:
                    break
            else:
                self._keep("positions", kept)
                return
        for _ in objective.passes():  # the first one that is complete counts the samples
            pass
        self.plan = (
            f"gradients of {objective.n_samples} samples, formed again for every product: kept, "
            f"they take more than {CACHE_BYTES >> 20} MiB"
        )

    def _keep(self, mode: str, kept: list[Any]) -> None:
        n, p = self._objective.n_samples, self._objective.masked.size
        if mode == "stored":
            self.stored = tuple(kept)
            self.plan = (
                f"stored gradients: {n} samples of {p} entries, one pass over them a product"
            )
            return
        self._factors = tuple(kept)
        self.plan = f"factored rows: the gradients of {n} samples are outer products"
        if mode == "positions":
            self.plan = (
                f"factored rows: the gradients of {n} samples are sums of outer products over "
                f"positions; stored, they take more than {CACHE_BYTES >> 20} MiB"
            )

    def _chunks(self, what: str = "") -> Iterator[SampleGradients]:
        return chunks(self._objective, MAX_BYTES, what)

    def product(self, V: Tensor) -> Tensor:
        if self.stored:
            return stored_product(self.stored, V, None, self._objective.sample_share)
        total = torch.zeros_like(V)
        for gradients in self._factors or self._chunks():
            for out, column in zip(total.T, V.T, strict=True):
                out += gradients.combine(gradients.dot(column) * self._objective.sample_share)
        return total

    def diagonal(self) -> Tensor:
        total = torch.zeros_like(self._objective.masked.theta)
        for G in self.stored:
            total += G.square().sum(0)
        if not self.stored:
            for gradients in self._factors or self._chunks():
                total += gradients.combine_squares(total.new_ones(gradients.n))
        return total * self._objective.sample_share

    def dense(self) -> Tensor:
        p = self._objective.masked.size
        total = self._objective.masked.theta.new_zeros(p, p)
        for G in self.stored or (g.dense() for g in self._factors or self._chunks("matrix")):
            total.addmm_(G.T, G)
        return total * self._objective.sample_share

    def low_rank(self, most: int) -> LowRank | None:
        n = self._objective.n_samples
        weights = self._objective.masked.theta.new_full((n,), self._objective.sample_share)
        if n > most:
            return None
        if self.stored:
            return StoredRows(self.stored, weights)
        if self._factors and all(gradients.is_plain() for gradients in self._factors):
            return PlainRows(self._factors, weights)
        return None


def stored_product(
    pieces: Sequence[Tensor], V: Tensor, segments: Tensor | None, share: float
) -> Tensor:
    """share * sum_i g_i (g_i . V) over the selected columns of stored rows g_i."""
    if segments is None:
        segments = torch.tensor([[0, len(V)]], device=V.device)
    total = torch.zeros_like(V)
    for G in pieces:
        total.add_(masked_gram_product(G, V, segments), alpha=share * len(G))
    return total


class PlainRows(LowRank):
    """Gradients of samples that are outer products, one for each parameter."""

    def __init__(self, gradients: Sequence[SampleGradients], weights: Tensor) -> None:
        self._gradients, self.weights = gradients, weights

    def gram(self) -> Tensor:
        n = len(self.weights)
        total = self.weights.new_zeros(n, n)
        for parameter in zip(*(each.plain() for each in self._gradients), strict=True):
            D, x = (torch.cat(parts) for parts in zip(*parameter, strict=True))
            total += factored_gram(D, x)
        return total

    def project(self, B: Tensor) -> Tensor:
        columns = [torch.cat([g.dot(column) for g in self._gradients]) for column in B.T]
        return torch.stack(columns, 1)

    def lift(self, C: Tensor) -> Tensor:
        total = C.new_zeros(self._gradients[0].size, C.shape[1])
        for gradients, part in zip(
            self._gradients, torch.split(C, [g.n for g in self._gradients]), strict=True
        ):
            for out, column in zip(total.T, part.T, strict=True):
                out += gradients.combine(column)
        return total
