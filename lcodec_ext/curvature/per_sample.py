"""Gradients of single samples by the parameters of selected units, as factors where possible.

The gradient of sample i by the rows of a layer is linear in what reaches them from the loss, D_i,
and in the layer's input, x_i: for a Linear layer, the outer product D_i x_i^T. Inner products with
it, and sums of it, need no more than these two.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, counted
from lcodec_ext._torch.batches import Batch, map_tensors, tensors_of
from lcodec_ext._torch.detours import cast_dtype
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import plain_arithmetic, twice_differentiable
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature.masked.entries import Entries
from lcodec_ext.curvature.masked.model import ForwardPass, MaskedModel
from lcodec_ext.curvature.masked.rows import RowsCall, is_convolution, patches
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.parameters import Selection

MAX_BYTES = 2**27  # of the gradients of a chunk of samples

Key = tuple[int, int]  # of a piece of a batch: the batch, and its first sample in it


@dataclass(frozen=True)
class Factors:
    """The gradients of n samples by the rows of one call of a layer.

    Attributes
    ----------
    call : RowsCall
        The rows, and the layer's input.
    reached : Tensor
        Gradient of every sample's loss by what the rows add to the output.
    entries : Entries
        Of the parameter.
    """

    call: RowsCall
    reached: Tensor
    entries: Entries

    def _rows(self, displacement: Tensor) -> Tensor:
        call = self.call
        return call.rows.of(call.args, call.kwargs, displacement, call.axis)

    def dot(self, vector: Tensor) -> Tensor:
        """Inner products of the gradients with a vector of all coordinates, shape (n,)."""
        d = self.entries.take(vector)
        with torch.no_grad():
            return (self._rows(d) * self.reached).flatten(1).sum(1)

    def add_combined(self, weights: Tensor, out: Tensor) -> None:
        """Add sum_i weights_i gradient_i to a vector of all coordinates."""
        weighted = self.reached * weights.reshape(-1, *[1] * (self.reached.ndim - 1))
        with torch.enable_grad():
            zero = weighted.new_zeros(self.entries.shape, requires_grad=True)
            (total,) = torch.autograd.grad(self._rows(zero).expand_as(weighted), zero, weighted)
        self.entries.add_to(out, total)

    def plain(self) -> tuple[Tensor, Tensor] | None:
        """(D, x), of shapes (n, entries) and (n, length), if gradients are single outer products.

        The x of a bias is a column of ones.
        """
        reached = self.reached
        rows = self.call.rows
        if reached.ndim != 2 or rows.part is not None:
            return None
        if rows.is_bias:
            return reached, reached.new_ones(len(reached), 1)
        return (reached, self.call.input) if rows.is_product else None

    def dense(self) -> Tensor:
        """The gradients, shape (n, entries * length), entry by entry."""
        reached, call, shape = self.reached, self.call, self.entries.shape
        n, module = len(reached), call.rows.module
        if call.rows.part is not None:  # one of the projections of an attention
            padded = reached.new_zeros(*reached.shape[:-1], shape[0])
            padded[..., call.rows.part] = reached
            reached = padded
        if len(shape) == 1 and call.rows.is_bias:
            return reached.movedim(call.axis, 1).flatten(2).sum(2) if reached.ndim > 2 else reached
        if len(shape) == 1:  # the scale of a norm
            with torch.no_grad():
                products = self._rows(reached.new_ones(shape)) * reached
            return products.movedim(call.axis, 1).reshape(n, shape[0], -1).sum(2)
        if call.rows.is_product:
            x = call.input.reshape(n, -1, call.input.shape[-1])
            each = reached.reshape(n, -1, reached.shape[-1]).transpose(1, 2) @ x
            return each.flatten(1)
        if isinstance(module, nn.Embedding):
            place = call.rows.of.place[call.input].reshape(n, -1)  # type: ignore[attr-defined]
            entries, length = shape
            row = (torch.arange(n, device=place.device)[:, None] * (entries + 1) + place).flatten()
            sums = reached.new_zeros(n * (entries + 1), length)
            sums.index_add_(0, row, reached.reshape(-1, length))
            return sums.reshape(n, entries + 1, length)[:, :-1].flatten(1)
        if is_convolution(module) and module.groups == 1:
            reached = reached.flatten(2)
            per_sample = reached.shape[2] * math.prod(shape[1:]) * reached.element_size()
            step = max(1, MAX_BYTES // per_sample)
            parts = zip(torch.split(reached, step), torch.split(call.input, step), strict=True)
            return torch.cat(
                [(a @ patches(module, x).transpose(1, 2)).flatten(1) for a, x in parts]
            )
        return self._one_by_one()

    def _one_by_one(self) -> Tensor:
        call = self.call
        options = {key: value for key, value in call.kwargs.items() if key != "input"}

        def one(x: Tensor, reached: Tensor) -> Tensor:
            def rows(d: Tensor) -> Tensor:
                return call.rows.of((x[None], *call.args[1:]), options, d, call.axis)

            pull: Any = torch.func.vjp(rows, reached.new_zeros(self.entries.shape))[1]
            (gradient,) = pull(reached[None])
            return gradient

        return torch.func.vmap(one)(call.input, self.reached).flatten(1)


@dataclass(frozen=True)
class SampleGradients:
    """The gradients of n samples by the p selected parameters.

    Attributes
    ----------
    n, size : int
        Samples, and p.
    factors : tuple of Factors
        Of which the gradients are the sum; none where they are stored.
    """

    n: int
    size: int
    factors: tuple[Factors, ...]
    _stored: Tensor | None = None

    def __repr__(self) -> str:
        kind = counted(len(self.factors), "factor") if self.factors else "stored"
        samples, parameters = counted(self.n, "sample"), counted(self.size, "parameter")
        return f"SampleGradients({samples} x {parameters}, {kind})"

    @property
    def nbytes(self) -> int:
        """Memory of the factors, or of the stored gradients; what several share counts once."""
        if self._stored is not None:
            return self._stored.nbytes
        kept: dict[int, int] = {}
        for factors in self.factors:
            for t in (factors.reached, *tensors_of([factors.call.args, factors.call.kwargs])):
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return sum(kept.values())

    def plain(self) -> list[tuple[Tensor, Tensor]]:
        """For each parameter (D, x), if gradients are outer products D_i x_i^T; else nothing."""
        if not all(factors.entries.complete for factors in self.factors):
            return []
        return self._products()

    def _products(self) -> list[tuple[Tensor, Tensor]]:
        """As `plain`, of the rows that have the selected entries."""
        pairs = [factors.plain() for factors in self.factors]
        parameters = {factors.call.rows.parameter for factors in self.factors}
        if len(parameters) < len(pairs):
            return []
        found = [pair for pair in pairs if pair is not None]
        return found if len(found) == len(pairs) else []

    def is_plain(self) -> bool:
        """Whether gradients are one outer product for each parameter."""
        return bool(self.plain())

    @plain_arithmetic()
    def dense(self) -> Tensor:
        """All of them, shape (n, p)."""
        if self._stored is not None:
            return self._stored
        out = self.factors[0].reached.new_zeros(self.n, self.size)
        for factors in self.factors:
            pair = None if factors.entries.complete else factors.plain()
            if pair is None:
                factors.entries.add_to(out, factors.dense())
            else:
                factors.entries.add_products(out, *pair)
        return out

    @plain_arithmetic()
    def dot(self, vector: Tensor) -> Tensor:
        """Inner products with a vector of shape (p,), shape (n,)."""
        if self._stored is not None:
            return self._stored @ vector
        return torch.stack([factors.dot(vector) for factors in self.factors]).sum(0)

    @plain_arithmetic()
    def combine(self, weights: Tensor) -> Tensor:
        """sum_i weights_i gradient_i, shape (p,)."""
        if self._stored is not None:
            return weights @ self._stored
        out = weights.new_zeros(self.size)
        for factors in self.factors:
            factors.add_combined(weights, out)
        return out

    @plain_arithmetic()
    def combine_squares(self, weights: Tensor) -> Tensor:
        """sum_i weights_i gradient_i^2, entry by entry, shape (p,)."""
        pairs = self._products()
        if not pairs:
            return weights @ self.dense().square()
        out = weights.new_zeros(self.size)
        for factors, (D, x) in zip(self.factors, pairs, strict=True):
            factors.entries.add_to(out, (D.square() * weights[:, None]).T @ x.square())
        return out


def gradients_by_seeds(
    masked: MaskedModel, run: ForwardPass, values: Sequence[Tensor], seeds: Sequence[Tensor], n: int
) -> SampleGradients:
    """Factors of J_i^T seed_i for every sample i of a run whose layers take samples first."""
    factors = []
    for call, reached in zip(run.calls, _reached(run, values, seeds), strict=True):
        args, kwargs = map_tensors(Tensor.detach, (call.args, call.kwargs))
        without_graph = replace(call, args=args, kwargs=kwargs, value=reached)
        factors.append(Factors(without_graph, reached, masked.entries[call.rows.parameter]))
    return SampleGradients(n, masked.size, tuple(factors))


def _reached(
    run: ForwardPass, values: Sequence[Tensor], seeds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """What reaches the rows of every call from values with seeds."""
    at = [call.value for call in run.calls]
    return torch.autograd.grad(values, at, seeds, retain_graph=True, materialize_grads=True)


def has_factors(objective: Objective, run: ForwardPass, batch: Batch, key: Key) -> bool:
    """Whether the layers with rows have samples along their first axis, each on its own.

    Found out once for each batch; key says which it is.
    """
    if key not in objective.factored:
        objective.factored[key] = _samples_come_first(objective, run, batch)
    return objective.factored[key] and _as_long_as_the_batch(objective, run, batch.size)


def _as_long_as_the_batch(objective: Objective, run: ForwardPass, n: int) -> bool:
    whole = objective.masked.whole.keys() - (objective.masked.spread or set())
    if whole or any(value.ndim == 0 or len(value) != n for value in run.values):
        return False
    for call in run.calls:
        if len(call.value) != n or isinstance(call.rows.module, nn.EmbeddingBag):
            return False
        tensors = list(tensors_of([call.args, call.kwargs]))
        if any(t.ndim == 0 or len(t) != n for t in tensors):
            return False
        if tuple(t._version for t in tensors) != call.versions:
            return False  # changed in place since
    return True


def _reached_apart(
    objective: Objective, run: ForwardPass, seeds: Sequence[Tensor]
) -> Sequence[Tensor]:
    """What reaches the rows of every call, and parameters that each sample has for itself."""
    own = zip(objective.masked.entries, run.displacements, strict=True)
    apart = [d for name, d in own if name in (objective.masked.spread or ())]
    at = [*(call.value for call in run.calls), *apart]
    return torch.autograd.grad(run.values, at, seeds, retain_graph=True, materialize_grads=True)


def _samples_come_first(objective: Objective, run: ForwardPass, batch: Batch) -> bool:
    n = batch.size
    if not _as_long_as_the_batch(objective, run, n):
        return False
    if n == 1 or not run.values or not (run.calls or objective.masked.spread):
        return True
    generator = torch.Generator(run.values[0].device).manual_seed(0)
    seeds = [
        torch.randn(v.shape, dtype=v.dtype, device=v.device, generator=generator)
        for v in run.values
    ]
    whole = _reached_apart(objective, run, seeds)
    tolerance = 1e-3 if objective.masked.dtype == torch.float32 else 1e-8
    if cast_dtype() is not None:
        tolerance = 5e-2  # of bfloat16, whose last bit differs between sizes of batches
    # The length of an axis proves nothing: halves of the batch must give the same on their own.
    for half in (slice(0, n // 2), slice(n // 2, n)):
        samples = batch.part(half)
        try:
            alone = objective.run(samples)
            parts = _reached_apart(objective, alone, [seed[half] for seed in seeds])
        except (RuntimeError, ValueError, IndexError):  # it takes no such batch
            return False
        if not _as_long_as_the_batch(objective, alone, samples.size) or len(parts) != len(whole):
            return False
        for a, b in zip(whole, parts, strict=True):
            a = a[half]
            if a.shape != b.shape or not (a - b).norm() <= tolerance * b.norm():
                return False
    return True


def gradient_of(objective: Objective, batch: Batch) -> Tensor:
    """The gradient of the sum of a batch's losses, shape (p,)."""
    run = objective.run(batch)
    with twice_differentiable():
        return objective.derivative(objective.sum_of_losses(run, batch), run)


def _gradients(objective: Objective, batch: Batch, key: Key) -> SampleGradients:
    """The gradients of a batch's samples."""
    n, masked = batch.size, objective.masked
    if objective.factored.get(key, True):
        run = objective.run(batch)
        with twice_differentiable():
            if key not in objective.factored:
                why = "since gradients of single samples are taken"
                objective.check_plain(run.outputs, batch, 1, why)
            if has_factors(objective, run, batch, key):
                total = objective.sum_of_losses(run, batch)
                if not total.requires_grad:  # the loss does not depend on these parameters
                    zeros = masked.zeros(n, masked.size)
                    return SampleGradients(n, masked.size, (), zeros)
                return gradients_by_seeds(masked, run, [total], [torch.ones_like(total)], n)
    rows = [gradient_of(objective, batch.part(slice(i, i + 1))) for i in range(n)]
    return SampleGradients(n, masked.size, (), torch.stack(rows))


def per_sample_gradients(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    selection: Selection,
    *,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_BYTES,
    progress: bool = False,
) -> Iterator[SampleGradients]:
    """Gradients of every sample's loss by the selected parameters.

    Parameters
    ----------
    model, loss_fn, data, selection, dtype, progress
        As for `HessianOperator`.
    reduction : {"mean", "sum"}, default "mean"
        Whether loss_fn is the mean or the sum of a batch's losses; gradients are of the losses of
        single samples in either case.
    max_bytes : int, default 2**27
        Upper limit on the memory of a chunk's stored gradients. A chunk has at least one sample.

    Yields
    ------
    SampleGradients
        Consecutive samples. Layers with samples along the first axis of their input give factors
        (halves of every batch must give the same on their own); others are differentiated sample by
        sample, which is slow.

    Raises
    ------
    ValueError, TypeError
        As `HessianOperator`, and for a loss that is not the plain mean or sum over samples.

    Notes
    -----
    One backward pass from the loss to the first selected layer; no gradient of other units'
    parameters is formed.
    """
    model = unwrapped(model)
    objective = Objective(
        model, loss_fn, data, selection, dtype=dtype, reduction=reduction, progress=progress
    )
    check_integer(max_bytes, "max_bytes", 1)
    return chunks(objective, max_bytes, "per-sample gradients")


def chunks(objective: Objective, max_bytes: int, what: str) -> Iterator[SampleGradients]:
    """The gradients of all samples, so many at once that they take max_bytes when stored."""
    for key, batch in pieces(objective, max_bytes, what):
        yield _gradients(objective, batch, key)


def pieces(objective: Objective, max_bytes: int, what: str = "") -> Iterator[tuple[Key, Batch]]:
    """The batches, cut where their gradients would take more than max_bytes, and their names."""
    most = max(1, max_bytes // objective.masked.row_bytes)
    for number, batch in objective.passes(what):
        if batch.size <= most:
            yield (number, 0), batch
            continue
        for start in range(0, batch.size, most):
            yield (number, start), batch.part(slice(start, start + most))
