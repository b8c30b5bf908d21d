"""Where the activations of a model's units are in its forward pass.

The activation of a unit is its output before any non-linearity, averaged over samples, positions
and tokens (padding included: attention masks are ignored). For a row of an embedding it is the
share of tokens that are that row.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.modes import hooked_arithmetic
from lcodec_ext._torch.samples import outputs_of
from lcodec_ext.curvature.layers import find_unit_layers, unit_axis
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.curvature.selection import UnitSelection

_PROJECTED = ("query", "key", "value")

_Taken = TypeVar("_Taken")


class Call(NamedTuple):
    """One call of a layer in a forward pass; a reused layer has several."""

    layer: str
    number: int


class UnitCall(NamedTuple):
    """A unit in one call of its layer: what a column of activations belongs to."""

    layer: str
    call: int
    unit: int


class Shares(NamedTuple):
    """Shares of tokens, where they are not zero: of row `unit` in group `group`."""

    group: NDArray[np.int64]
    unit: NDArray[np.int64]
    share: NDArray[np.float64]


class Layout(NamedTuple):
    """Along which axis of a view the samples are; None: it is the same for all samples.

    outer = 1: sample by sample, each with its positions in a row. outer > 1: that many positions,
    each with all samples in a row.
    """

    axis: int | None
    outer: int = 1


ALL = Layout(None)


@dataclass(frozen=True, eq=False)
class Site:
    """Reads the activations of a layer from its output, as views with the units last."""

    name: str
    module: nn.Module
    n_units: int
    units: NDArray[np.int64]  # those that are recorded

    def hook(self, sink: "Callable[[Site, list[Tensor]], None]") -> RemovableHandle:
        """Give every call's views to a sink."""

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            sink(self, self.views(args, kwargs, output))

        return self.module.register_forward_hook(after, with_kwargs=True)

    def views(self, args: Any, kwargs: Any, output: Any) -> list[Tensor]:
        """What is averaged of one call."""
        module = self.module
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise _UnreadableError(self.name, f"its output is not a tensor but a {kind}")
        axis, merged = unit_axis(module)
        view = output.flatten(-merged) if merged > 1 else output.movedim(axis, -1)
        if view.shape[-1:] != (self.n_units,):
            raise _UnreadableError(
                self.name, f"its output has the unexpected shape {tuple(output.shape)}"
            )
        return [view]

    def means(self, view: Tensor, layout: Layout, groups: int) -> Any:
        """Average a view over each of several groups of samples that follow each other."""
        wide = torch.promote_types(view.dtype, torch.float32)
        if layout.axis is None:
            return view[None].mean(list(range(view.ndim)), dtype=wide).expand(groups, -1)
        view = torch.unflatten(view, layout.axis, (layout.outer, groups, -1))
        others = [axis for axis in range(view.ndim - 1) if axis != layout.axis + 1]
        return view.mean(others, dtype=wide)

    def table(self, means: Any, groups: int) -> Tensor:
        """The means of a view as one row a group."""
        return means

    def finish(self, means: list[Any]) -> Any:
        """Turn the means of the views of a call into those of the recorded units."""
        (mean,) = means
        return mean if len(self.units) == self.n_units else mean[:, self.units]


class _OutProjection(Site):
    """The output projection of an attention. It is not called; its output is the attention's."""

    def views(self, args: Any, kwargs: Any, output: Any) -> list[Tensor]:
        return [output[0] if isinstance(output, tuple) else output]


class _InProjections(Site):
    """The input projections of an attention. They are not called.

    The mean of a projection is the projection of the mean.
    """

    module: nn.MultiheadAttention

    def hook(self, sink: Callable[[Site, list[Tensor]], None]) -> RemovableHandle:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            named = dict(zip(_PROJECTED, args, strict=False)) | kwargs
            if not named.keys() >= set(_PROJECTED):
                raise _UnreadableError(self.name, "it is called without query, key and value")
            sink(self, [named[name] for name in _PROJECTED])

        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def finish(self, means: list[Tensor]) -> Tensor:
        module = self.module
        weights: Iterable[Tensor]
        if module.embed_dim == module.kdim == module.vdim:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases: Iterable[Tensor | None] = [None] * 3
        if module.in_proj_bias is not None:
            biases = module.in_proj_bias.chunk(3)
        parts = [
            F.linear(mean.to(weight.dtype), weight, bias)
            for mean, weight, bias in zip(means, weights, biases, strict=True)
        ]
        return torch.cat(parts, 1)[:, self.units]


class RowsSite(Site):
    """The rows of an embedding. The last axis of the view has the tokens of a bag, -1 for none."""

    def views(self, args: Any, kwargs: Any, output: Any) -> list[Tensor]:
        """The tokens; each of an embedding without bags is a bag of its own."""
        ids = args[0] if args else kwargs["input"]
        if isinstance(self.module, nn.Embedding):
            return [ids[..., None]]
        if ids.ndim == 1:
            offsets = args[1] if len(args) > 1 else kwargs["offsets"]
            bounds = offsets.tolist()
            if not self.module.include_last_offset:
                bounds.append(len(ids))
            bags = [ids[a:b] for a, b in itertools.pairwise(bounds)]
            ids = nn.utils.rnn.pad_sequence(bags, batch_first=True, padding_value=-1)
        return [ids]

    def means(self, view: Tensor, layout: Layout, groups: int) -> Shares:
        """Shares of tokens in each group; of bags of different sizes, the mean of their shares."""
        if layout.axis is None:
            group, unit, share = self.means(view[None], Layout(0), 1)
            return Shares(
                np.arange(groups).repeat(len(unit)), np.tile(unit, groups), np.tile(share, groups)
            )
        view = torch.unflatten(view, layout.axis, (layout.outer, groups, -1))
        bags = view.movedim(layout.axis + 1, 0).reshape(groups, -1, view.shape[-1])
        ids = bags.cpu().numpy().astype(np.int64)
        there = ids >= 0
        weights = 1 / (np.maximum(there.sum(-1, keepdims=True), 1) * ids.shape[1])
        keys = ids + self.n_units * np.arange(groups)[:, None, None]
        found, which = np.unique(keys[there], return_inverse=True)
        shares = np.bincount(which, np.broadcast_to(weights, ids.shape)[there], len(found))
        group, unit = np.divmod(found, self.n_units)
        return Shares(group, unit, shares.astype(np.float64, copy=False))

    def table(self, means: Shares, groups: int) -> Tensor:
        """The shares as one row a group, zeros included."""
        table = torch.zeros(groups, self.n_units, dtype=torch.float64)
        table[means.group, means.unit] = torch.from_numpy(means.share)
        return table

    def finish(self, means: list[Shares]) -> Shares:
        """Keep the shares of the recorded units."""
        (shares,) = means
        recorded = np.isin(shares.unit, self.units)
        return Shares(shares.group[recorded], shares.unit[recorded], shares.share[recorded])


class _UnreadableError(ValueError):
    """Why the activations of a layer cannot be read."""

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"the activations of layer {layer!r} cannot be read: {reason}")
        self.layer, self.reason = layer, reason


def _find_sites(
    model: nn.Module, units: UnitSelection | None
) -> tuple[dict[str, Site], dict[str, str]]:
    """The sites of the layers that have units, and for the other layers the reason why not."""
    layers, without = find_unit_layers(model)
    if units is None:
        chosen = UnitSelection.all(model).units
        for name in layers:
            if name not in chosen:
                without[name] = "a layer before it cuts a tied parameter into units in another way"
    else:
        UnitLayout(units, model)  # its refusals
        chosen, without = units.units, {}
    attention = {
        id(module.out_proj): module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    sites: dict[str, Site] = {}
    for name, layer in layers.items():
        if name not in chosen:
            continue
        module, kind = layer.module, Site
        if isinstance(module, nn.MultiheadAttention):
            kind = _InProjections
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            kind = RowsSite
        elif id(module) in attention:
            module, kind = attention[id(module)], _OutProjection
        sites[name] = kind(name, module, layer.n_units, np.array(chosen[name]))
    return sites, without


class Recorder:
    """Hooks on the sites of a model, while the context is entered."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = list(sites)
        self._handles: list[RemovableHandle] = []
        self._counts: dict[str, int] = {}
        self._take: Callable[[Call, Site, list[Tensor]], None]

    def __enter__(self) -> Self:
        for site in self._sites:
            self._handles.append(site.hook(self._sink))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _sink(self, site: Site, views: list[Tensor]) -> None:
        number = self._counts.get(site.name, 0)
        self._counts[site.name] = number + 1
        self._take(Call(site.name, number), site, views)

    def run(
        self, model: nn.Module, batch: Batch, take: Callable[[Call, Site, list[Tensor]], _Taken]
    ) -> tuple[Any, dict[Call, _Taken]]:
        """Call the model; return its outputs and what take made of every call of a layer."""
        taken: dict[Call, _Taken] = {}

        def keep(call: Call, site: Site, views: list[Tensor]) -> None:
            taken[call] = take(call, site, views)

        self._take = keep
        self._counts.clear()
        return outputs_of(model, batch), taken


def find_calls(
    model: nn.Module, batch: Batch, units: UnitSelection | None
) -> tuple[dict[Call, Site], dict[str, str]]:
    """The calls of layers with units on a batch, in order, and the layers without, with reasons."""
    sites, without = _find_sites(model, units)
    calls: dict[Call, Site] | None = None
    while calls is None:
        try:
            with Recorder(sites.values()) as recorder, hooked_arithmetic():
                _, calls = recorder.run(model, batch, lambda call, site, views: site)
        except _UnreadableError as error:
            without[error.layer] = error.reason
            del sites[error.layer]
    called = {call.layer for call in calls}
    for name in sites:
        if name not in called:
            without[name] = "the forward pass does not call it"
    if not calls:
        reasons = "".join(f"; {name!r}: {reason}" for name, reason in without.items())
        raise ValueError(f"the model has no layer whose units can be recorded{reasons}")
    return calls, without
