"""Which parameters are one block, and what of a forward and backward pass belongs to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from lcodec_ext._torch.batches import map_tensors
from lcodec_ext.curvature.kronecker.places import Places
from lcodec_ext.curvature.layers import NORMS
from lcodec_ext.curvature.masked.entries import Entries
from lcodec_ext.curvature.masked.model import MaskedModel
from lcodec_ext.curvature.masked.rows import LayerRows, RowsCall, is_convolution, patches
from lcodec_ext.curvature.per_sample import Factors


class Outer:
    """Gradients of samples that are sums over positions of g x^T.

    Parameters
    ----------
    g : Tensor, shape (n, positions, r)
    inputs : callable
        To x, shape (n, positions, D), which is formed where it is needed.
    counted : Tensor of bool, shape (n, positions), or None
        Which positions are no padding; None where all may be.
    """

    def __init__(
        self, g: Tensor, inputs: Callable[[], Tensor], counted: Tensor | None = None
    ) -> None:
        self.g, self._inputs, self.counted = g, inputs, counted

    @cached_property
    def x(self) -> Tensor:
        """The layer's input at every position."""
        return self._inputs()


@dataclass(frozen=True)
class Lookup:
    """Gradients of samples that have at row place[i, t] what reached it, g[i, t]; r is no row."""

    place: Tensor  # (n, positions)
    g: Tensor  # (n, positions, D)


@dataclass(frozen=True)
class BlockPlan:
    """A block of parameters: its rows, its columns, and the calls that it is computed from.

    Attributes
    ----------
    parameters : tuple of str
        The first has the calls; a bias may follow.
    places : Places
    entries : Entries
        Of the first parameter.
    outer, lookup : bool
        Whether some of its calls multiply with rows, and whether some look rows up.
    """

    parameters: tuple[str, ...]
    places: Places
    entries: Entries
    outer: bool
    lookup: bool

    @property
    def is_diagonal(self) -> bool:
        """Whether the block has no Kronecker form."""
        return not (self.outer or self.lookup)

    def part(
        self, call: RowsCall, reached: Tensor, samples: slice, n: int, counted: Tensor | None
    ) -> Outer | Lookup:
        """What one call adds to the gradients of some of n samples."""
        module, x, k = call.rows.module, call.input.detach(), len(range(n)[samples])
        if n > 1:  # of one sample everything is its own, whatever its first axis is
            x, reached = x[samples], reached[samples]
        if isinstance(module, nn.Embedding):
            place = call.rows.of.place[x]  # type: ignore[attr-defined]
            return Lookup(place.reshape(k, -1), reached.reshape(k, -1, reached.shape[-1]))
        g = reached.movedim(call.axis, -1)
        g = g.reshape(k, -1, g.shape[-1])
        if call.rows.part is not None:  # one of the projections of an attention
            padded = g.new_zeros(*g.shape[:2], len(self.entries.units))
            padded[..., call.rows.part] = g
            g = padded

        def inputs() -> Tensor:
            if call.rows.is_bias:
                return g.new_ones(*g.shape[:2], 1)
            each = x
            if is_convolution(module):
                each = each if each.ndim == 2 + len(module.kernel_size) else each[None]
                each = patches(module, each).transpose(1, 2)
            each = each.reshape(k, -1, each.shape[-1])
            if len(self.parameters) == 1:
                return each
            return torch.cat([each, each.new_ones(*each.shape[:2], 1)], 2)

        counted = None if counted is None else counted[samples]
        return Outer(
            g, inputs, counted if counted is None or counted.shape == g.shape[:2] else None
        )

    def dense(self, calls: Sequence[RowsCall], reached: Sequence[Tensor]) -> Tensor:
        """Gradients of samples that have no such form, shape (n, r, D)."""
        total: Tensor | None = None
        for call, each in zip(calls, reached, strict=True):
            args, kwargs = map_tensors(Tensor.detach, (call.args, call.kwargs))
            call = replace(call, args=args, kwargs=kwargs, value=each)
            own = Factors(call, each, self.entries).dense()
            total = own if total is None else total + own
        assert total is not None
        return total.reshape(len(total), *self.places.shape)


def plan_blocks(masked: MaskedModel) -> list[BlockPlan]:
    """The blocks of a model's selected parameters, in their order."""
    numbers = torch.arange(masked.size, device=masked.device)

    def index(name: str) -> Tensor:
        own = masked.entries[name].take(numbers)
        return own.reshape(len(own), -1)

    for name, entries in masked.entries.items():
        if not entries.complete:
            raise ValueError(
                f"the selection has single entries of rows of parameter {name!r}, on which the "
                "curvature has no Kronecker factors: select all entries of each row, as a "
                "UnitSelection does, or take another operator, GaussNewtonOperator for instance"
            )
    layers = {name: masked.layer_rows(name) for name in masked.entries}
    biases = _joined_biases(layers)
    plans = []
    for name, entries in masked.entries.items():
        if name in biases.values():
            continue
        parameters = (name, biases[name]) if name in biases else (name,)
        forms = {_form(rows) for rows in layers[name]} or {"diagonal"}
        kronecker = "diagonal" not in forms
        places = Places.of([index(each) for each in parameters])
        plans.append(
            BlockPlan(
                parameters,
                places,
                entries,
                kronecker and "outer" in forms,
                kronecker and "lookup" in forms,
            )
        )
    return plans


def _form(rows: LayerRows) -> str:
    module = rows.module
    if rows.is_bias:
        return "diagonal" if isinstance(module, NORMS) else "outer"
    if rows.is_product or (is_convolution(module) and module.groups == 1):
        return "outer"
    return "lookup" if isinstance(module, nn.Embedding) else "diagonal"


def _joined_biases(layers: dict[str, list[LayerRows]]) -> dict[str, str]:
    """For each weight the bias that is selected with the same rows of the same layer."""
    weights: dict[nn.Module, list[LayerRows]] = {}
    for rows in layers.values():
        if len(rows) == 1 and not rows[0].is_bias and _form(rows[0]) == "outer":
            weights.setdefault(rows[0].module, []).append(rows[0])
    found = {}
    for name, rows in layers.items():
        if len(rows) != 1 or not rows[0].is_bias:
            continue
        for weight in weights.get(rows[0].module, ()):
            if torch.equal(weight.places, rows[0].places):  # type: ignore[arg-type]
                found[weight.parameter] = name
    return found
