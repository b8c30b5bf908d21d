"""A copy of a model that is a function of the parameters of its selected parameters alone.

The layers of selected units add what a displacement of these units' parameters would add to their
outputs: layer(x; w + d) = layer(x; w) + layer(x; d), with only the selected rows of d. The
displacement is zero, and everything is differentiated by it: autograd records nothing before the
first selected layer, and forms the rows of the selected units only.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._torch.adapters import check_adapters
from lcodec_ext._torch.batches import Batch, map_tensors, tensors_of, widened
from lcodec_ext._torch.copies import (
    THE_LOSS,
    Watched,
    check_followed,
    check_has_values,
    graph_nodes,
    leaves_of,
    leaves_of_nodes,
    work_copy,
)
from lcodec_ext._torch.detours import cast_dtype
from lcodec_ext.curvature.layers import NoUnitsError, is_unit_layer, unit_cuts
from lcodec_ext.curvature.layout import Layout
from lcodec_ext.curvature.masked.attention import attention_forward
from lcodec_ext.curvature.masked.entries import parameter_entries
from lcodec_ext.curvature.masked.rows import LayerRows, RowsCall, row_module, rows_of
from lcodec_ext.curvature.parameters import ParameterSelection, Selection
from lcodec_ext.curvature.selection import UnitSelection


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass by the displaced parameters.

    Attributes
    ----------
    outputs : tensor, or tuple, list or mapping of them
        As the loss takes them.
    values : list of Tensor
        Those that depend on the displacement.
    displacements : list of Tensor
        Zeros that require gradients, one for each parameter.
    calls : list of RowsCall
    layer_outputs : list of (Tensor, int)
        Of the calls of layers with rows, with their versions when these returned.
    """

    outputs: Any
    values: list[Tensor]
    displacements: list[Tensor]
    calls: list[RowsCall]
    layer_outputs: list[tuple[Tensor, int]]


class _UsedElsewhereError(Exception):
    """Parameters that something else than the forward pass of their layers computes with."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self.names = names


class MaskedModel:
    """A copy of a model, in evaluation mode, as a function of its selected parameters.

    It is a snapshot: what becomes of the model afterwards does not matter.

    Parameters
    ----------
    model : Module
    selection : UnitSelection or ParameterSelection
    dtype : torch.dtype or None
        In which to compute. By default the widest of the selected parameters', at least float32.

    Attributes
    ----------
    size : int
        Number p of coordinates.
    whole : dict of str to str
        Parameters whose whole gradient autograd forms, because their layers have no rows that
        could be added, and why.
    base : dict of str to Tensor
        The selected parameters, whole.
    spread : set of str or None
        Where it is not None, what has one entry for a whole batch has one for each of its samples:
        tensors that layers with rows are called with, and these parameters, which have a first axis
        of length one. Their displacements then are (samples, ...).
    """

    def __init__(self, model: nn.Module, selection: Selection, dtype: torch.dtype | None) -> None:
        if not isinstance(selection, UnitSelection | ParameterSelection):
            raise TypeError(
                f"selection must be a UnitSelection or ParameterSelection; got an object of type "
                f"{type(selection).__name__}"
            )
        check_has_values(model)
        layout = selection.layout(model)
        if not layout.size:
            kind = "unit" if isinstance(selection, UnitSelection) else "parameter"
            raise ValueError(f"the selection must have at least one {kind}; it is empty")
        self.dtype, self.device = _place(layout, dtype)
        self.size = layout.size
        self.spread: set[str] | None = None
        self.layout = layout
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        # Parameters that nothing may compute with: a run replaces those of the copy.
        self._outside: Watched = {}
        selected = {id(parameter) for parameter in layout.parameters.values()}
        check_adapters(model, selected)
        self.model = work_copy(model, self.dtype, self._outside, selected)
        self.model.requires_grad_(False)
        self.entries = parameter_entries(layout, self.device)
        self.base = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if name in self.entries
        }
        #: Of the gradient of a sample while it is formed, in bytes.
        self.row_bytes = self.dtype.itemsize * sum(
            math.prod(each.shape) for each in self.entries.values()
        )
        self._watched: list[tuple[Tensor, str]] = []
        self._dense = False  # whether its gradients were found to be
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        names = {}
        for name in self.entries:
            own = self.model.get_parameter(name).requires_grad_()
            self._outside[id(own)] = weakref.ref(own), name
            self._owners[name], names[id(own)] = [], name
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in names:
                    self._owners[names[id(parameter)]].append((module, key))
        self.whole: dict[str, str] = {}
        self._rows: dict[nn.Module, list[list[LayerRows]]] = {}
        for name, owners in self._owners.items():
            self._add_rows(name, owners)

    def _add_rows(self, name: str, owners: list[tuple[nn.Module, str]]) -> None:
        """Displace a parameter by rows of all its layers, or as a whole where one has none."""
        found = []
        for module, key in owners:
            rows = self._find_rows(module, key, name)
            if rows is None:
                self.displace_whole(name, f"a {type(module).__name__} computes with it")
            else:
                found.append((module, rows))
        if name in self.whole:
            return
        for module, rows in found:
            groups = self._rows.setdefault(module, [])
            for group in groups:  # what is added at the same places is added at once
                if _at_the_same_places(group[0], rows):
                    group.append(rows)
                    break
            else:
                groups.append([rows])

    def layer_rows(self, name: str) -> list[LayerRows]:
        """The rows of all layers that add what a parameter is displaced by; none if it is whole."""
        groups = [group for groups in self._rows.values() for group in groups]
        return [rows for group in groups for rows in group if rows.parameter == name]

    def displace_whole(self, name: str, why: str) -> None:
        """Let autograd form the whole gradient of a parameter."""
        for module, _ in self._owners[name]:
            if isinstance(module, nn.EmbeddingBag):
                raise ValueError(
                    f"units of an EmbeddingBag with mode={module.mode!r} whose weight {name!r} "
                    f"has no rows that are added ({why}) cannot be differentiated twice"
                )
        self.whole[name] = why
        for module, groups in self._rows.items():
            kept = [[r for r in group if r.parameter not in self.whole] for group in groups]
            self._rows[module] = [group for group in kept if group]

    def _find_rows(self, module: nn.Module, key: str, name: str) -> LayerRows | None:
        entries = self.entries[name]
        if not is_unit_layer(module):
            return None
        try:
            attributes = {k: each for _, _, cuts in unit_cuts(module) for k, each in cuts.items()}
        except NoUnitsError:
            return None
        if key not in attributes or attributes[key][0] != entries.cut:
            return None  # tied to a layer that cuts it in another way
        return rows_of(module, key, name, entries.units, attributes[key][1])

    # ------------------------------------------------------------------------------------------
    # Vectors

    @property
    def theta(self) -> Tensor:
        """The selected entries of the parameters, shape (p,), a copy."""
        return self.layout.gather(self.base)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the dtype of the computation; a vector of coordinates by default."""
        return torch.zeros(shape or (self.size,), dtype=self.dtype, device=self.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split a vector of coordinates into one displacement per parameter."""
        return [entries.take(vector) for entries in self.entries.values()]

    def join(self, displacements: Iterable[Tensor]) -> Tensor:
        """The vector of displacements of the parameters; the reverse of `split`."""
        out = self.zeros()
        for entries, displacement in zip(self.entries.values(), displacements, strict=True):
            entries.add_to(out, displacement)
        return out

    def columns(self, selection: Selection) -> Tensor:
        """For each coordinate of another selection, its index among ours; -1 where it has none."""
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for name, trainable in self._trainable.items():
            self.model.get_parameter(name).requires_grad_(trainable)
        layout = selection.layout(self.model)
        for name, required in before.items():
            self.model.get_parameter(name).requires_grad_(required)
        return layout.numbers_in(self.layout)

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        """While entered, the selected parameters are displaced by a vector."""
        before = self.base
        self.base = {
            name: entries.displaced(before[name], part)
            for (name, entries), part in zip(self.entries.items(), self.split(step), strict=True)
        }
        try:
            yield
        finally:
            self.base = before

    # ------------------------------------------------------------------------------------------
    # The forward pass

    def run(self, batch: Batch) -> ForwardPass:
        """Call the model on a batch, differentiably by a displacement of zero."""
        while True:
            try:
                return self._run(batch)
            except _UsedElsewhereError as error:
                for name in error.names:
                    self.displace_whole(name, "it is used outside of its layer's forward pass, too")

    def check_loss(self, loss: Tensor, displacements: Sequence[Tensor] = ()) -> None:
        """Refuse a loss that depends on parameters other than through the outputs that are seen.

        The displacements are given where the loss is one of outputs without their graphs.
        """
        check_followed([loss], self._outside, THE_LOSS)
        leaves = leaves_of([loss])
        hidden = [value for value, _ in self._watched] + list(displacements)
        if any(leaves.get(id(value)) is value for value in hidden):
            raise ValueError(
                "the loss must depend on the selected parameters through the tensors, tuples, "
                "lists and dicts that the model returns, and through nothing else"
            )

    def _run(self, batch: Batch) -> ForwardPass:
        n = None if self.spread is None else batch.size
        shapes = {name: entries.shape for name, entries in self.entries.items()}
        for name in self.spread or ():
            shapes[name] = (batch.size, *self.base[name].shape[1:])
        displacements = {
            name: torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=True)
            for name, shape in shapes.items()
        }
        calls: list[RowsCall] = []
        layer_outputs: list[tuple[Tensor, int]] = []
        watched: list[tuple[Tensor, str]] = []
        with ExitStack() as stack:
            for name, owners in self._owners.items():
                value = self.base[name]
                if name in (self.spread or ()):
                    value = value + displacements[name]
                elif name in self.whole:
                    value = self.entries[name].displaced(value, displacements[name])
                else:
                    value = value.detach().requires_grad_()
                    watched.append((value, name))
                for module, key in owners:
                    stack.enter_context(_replaced(module._parameters, key, value))
            for module, groups in self._rows.items():
                if groups:
                    given = {name: value for value, name in watched}
                    forward = (
                        attention_forward(module, groups, given, displacements, calls)
                        if isinstance(module, nn.MultiheadAttention)
                        else _forward(module, groups, given, displacements, calls, layer_outputs, n)
                    )
                    stack.enter_context(_replaced(vars(module), "forward", forward))
            outputs = batch.outputs(self.model)
        logits = getattr(outputs, "logits", None)
        outputs = logits if isinstance(logits, Tensor) else outputs
        if next(tensors_of(outputs), None) is None:
            raise TypeError(
                "the model must return a tensor, or tuples, lists or dicts of them; got an object "
                f"of type {type(outputs).__name__}"
            )
        values = [t for t in tensors_of(outputs) if t.requires_grad]
        check_followed(values, self._outside, "the model")
        leaves = leaves_of(values)
        self._watched = watched
        if not self._dense:
            _check_dense(values, displacements, watched)
            self._dense = True
        elsewhere = [name for value, name in watched if id(value) in leaves]
        if elsewhere:
            raise _UsedElsewhereError(elsewhere)
        return ForwardPass(outputs, values, list(displacements.values()), calls, layer_outputs)


def _place(layout: Layout, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.device]:
    """In which dtype to compute, and where."""
    dtypes = {parameter.dtype for parameter in layout.parameters.values()}
    if dtype is None:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32, torch.float64 or None; got {dtype}")
    devices = {parameter.device for parameter in layout.parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"the selected units must be on one device; they are on "
            f"{', '.join(sorted(map(str, devices)))}"
        )
    return dtype, devices.pop()


def _check_dense(
    values: Sequence[Tensor],
    displacements: Mapping[str, Tensor],
    watched: Sequence[tuple[Tensor, str]],
) -> None:
    """Refuse sparse gradients of functions, which cannot be differentiated again."""
    for node in graph_nodes(values):
        if not getattr(node, "_saved_sparse", False):
            continue
        ends = {id(leaf) for leaf in leaves_of_nodes([node])}
        own = [*((d, name) for name, d in displacements.items()), *watched]
        names = [repr(name) for tensor, name in own if id(tensor) in ends]
        raise ValueError(
            f"the model looks up rows of parameter {', '.join(names) or 'one'} by a function with "
            "sparse=True, and sparse gradients cannot be differentiated again: pass sparse=False"
        )


@contextmanager
def _replaced(values: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    had, before = key in values, values.get(key)
    values[key] = value
    try:
        yield
    finally:
        if had:
            values[key] = before
        else:
            del values[key]


def _forward(
    module: nn.Module,
    groups: list[list[LayerRows]],
    given: dict[str, Tensor],
    displacements: dict[str, Tensor],
    calls: list[RowsCall],
    layer_outputs: list[tuple[Tensor, int]],
    n: int | None,
) -> Callable[..., Tensor]:
    """The forward pass of a layer that adds its rows; for n samples apart, if they are given."""
    merged = groups[0][0].merged

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if n is not None and all(t.shape[:1] == (1,) for t in tensors_of([args, kwargs])):
            args, kwargs = map_tensors(lambda t: t.expand(n, *t.shape[1:]), (args, kwargs))
        # Parameters that are displaced as a whole are not leaves.
        fixed = {
            key: parameter.detach()
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.is_leaf
        }
        out: Tensor = type(module).forward(row_module(module, fixed), *args, **kwargs)
        given_args, given_kwargs = args, kwargs
        if cast_dtype() is not None:  # what is kept, and differentiated, is in the dtype of sums
            out = widened(out)
            given_args, given_kwargs = map_tensors(widened, (args, kwargs))
        shape = out.shape
        if merged > 1:
            out = out.flatten(-merged)
        for group in groups:
            values = []
            for rows in group:
                if module._parameters.get(rows.key) is not given[rows.parameter]:
                    continue  # called with other parameters
                axis = rows.axis if rows.axis < 0 else rows.axis - out.ndim
                sizes = list(out.shape)
                if rows.places is not None:
                    sizes[axis] = len(rows.places)
                value = rows.of(args, kwargs, displacements[rows.parameter], axis).expand(sizes)
                if cast_dtype() is not None:
                    value = widened(value)
                if value.requires_grad:  # not under no_grad
                    versions = tuple(t._version for t in tensors_of([given_args, given_kwargs]))
                    calls.append(RowsCall(rows, given_args, given_kwargs, value, axis, versions))
                values.append(value)
            if not values:
                continue
            total = sum(values[1:], values[0])
            places = group[0].places
            out = out + total if places is None else out.index_add(axis, places, total)
        out = out.reshape(shape)
        if not out.is_inference():  # of which the pass is refused in the end
            layer_outputs.append((out, out._version))
        return out

    return forward


def _at_the_same_places(a: LayerRows, b: LayerRows) -> bool:
    return a.places is not None and b.places is not None and torch.equal(a.places, b.places)
