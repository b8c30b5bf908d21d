"""A copy of a model that is a function of the parameters of its selected units alone.

The layers of selected units add what a displacement of these units' parameters would add to their
outputs: layer(x; w + d) = layer(x; w) + layer(x; d), with only the selected rows of d. The
displacement is zero, and everything is differentiated by it: autograd records nothing before the
first selected layer, and forms the rows of the selected units only.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from lcodec_ext._torch.batches import Batch, tensors_of
from lcodec_ext.curvature.selection import (
    _NORMS,
    UnitLayout,
    UnitSelection,
    _Cut,
    _is_layer,
    _is_transformers_conv1d,
    _NoUnitsError,
    _Part,
    _pieces,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OVER_FEATURES = (nn.LayerNorm, nn.RMSNorm)


# ---------------------------------------------------------------------------------------------
# Rows of layers


@dataclass(frozen=True)
class Rows:
    """What selected entries of one parameter of one layer add to its output.

    Attributes
    ----------
    module : Module
        The layer.
    key : {"weight", "bias"}
    parameter : str
        The name of the parameter, of which the entries are.
    axis : int
        Of the output, the one that counts units: from the front, or, negative, from the end.
    merged : int
        So many of the output's last axes count units together.
    places : Tensor of int64 or None
        On that axis, one for each entry; None where an entry, as the row of an embedding, adds to
        all of it.
    of : callable(args, kwargs, displacement, axis) -> Tensor
        Linear in the displacement, which has an entry along its first axis for each unit; its
        result has the shape of the output, but for these places only. Its axis is negative.
    """

    module: Any
    key: str
    parameter: str
    axis: int
    merged: int
    places: Tensor | None
    of: Callable[[tuple[Any, ...], dict[str, Any], Tensor, int], Tensor]


def _row_module(
    module: nn.Module, parameters: Mapping[str, Tensor | None], **attributes: Any
) -> Any:
    """The layer with other parameters, to call `forward` of its type on."""
    rows = object.__new__(type(module))
    rows.__dict__ = module.__dict__ | attributes
    rows.__dict__["_parameters"] = {**module._parameters, **parameters}
    return rows


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a layer multiplies with its weight; transformers' Conv1D calls it x."""
    x: Tensor = args[0] if args else kwargs["x" if "x" in kwargs else "input"]
    return x


def _linear_rows(args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int) -> Tensor:
    return linear(_input(args, kwargs), d)


class _ConvolutionRows:
    """Selected channels of a convolution, grouped and transposed ones too.

    The groups with selected channels become a convolution of these groups, each with as many
    channels as the fullest has; channels that nobody selected are zero, and dropped.
    """

    def __init__(self, module: Any, units: Tensor) -> None:
        self._module = module
        self._transposed = isinstance(module, _TRANSPOSED)
        per_group = module.out_channels // module.groups
        groups, which = torch.unique(units // per_group, return_inverse=True)
        counts = torch.bincount(which)
        self._most = int(counts.max())
        first = torch.cumsum(counts, 0) - counts  # units are ascending, so are their groups
        slot = torch.arange(len(units), device=units.device) - first[which]
        self._places = which * self._most + slot
        self._groups = len(groups)
        self._padded = self._groups * self._most > len(units)
        self._channels: Tensor | None = None
        if self._groups < module.groups:
            n = module.in_channels // module.groups
            channels = torch.arange(n, device=units.device)
            self._channels = (groups[:, None] * n + channels).flatten()

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int
    ) -> Tensor:
        positions = len(self._module.kernel_size)
        x = _input(args, kwargs)
        options = {key: value for key, value in kwargs.items() if key != "input"}
        if self._channels is not None:
            x = x.index_select(-1 - positions, self._channels)
        weight = d
        if self._padded:
            weight = d.new_zeros(self._groups * self._most, *d.shape[1:])
            weight = weight.index_copy(0, self._places, d)
        if self._transposed:  # entries have [inputs of the group, kernel]
            weight = weight.view(self._groups, self._most, *d.shape[1:])
            weight = weight.transpose(1, 2).flatten(0, 1)
        rows = _row_module(
            self._module,
            {"weight": weight, "bias": None},
            groups=self._groups,
            in_channels=x.shape[-1 - positions],
            out_channels=self._groups * self._most,
        )
        out: Tensor = type(self._module).forward(rows, x, *args[1:], **options)
        return out.index_select(-1 - positions, self._places) if self._padded else out


class _EmbeddingRows:
    """Selected rows of an embedding, or of a bag of embeddings that adds or averages."""

    def __init__(self, module: Any, units: Tensor) -> None:
        self._module = module
        self.place = torch.full((module.num_embeddings,), len(units), device=units.device)
        self.place[units] = torch.arange(len(units), device=units.device)
        if module.padding_idx is not None:  # autograd has no gradient there, tied or not
            self.place[module.padding_idx] = len(units)

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int
    ) -> Tensor:
        d = torch.cat([d, d.new_zeros(1, d.shape[1])])
        if isinstance(self._module, nn.Embedding):
            return embedding(self.place[_input(args, kwargs)], d)
        return self._bags(d, *args, **kwargs)

    def _bags(
        self,
        d: Tensor,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        rows = embedding(self.place[input.flatten()], d)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.flatten()[:, None]
        n = input.numel()
        if input.ndim == 2:
            n_bags, length = input.shape
            bag = torch.arange(n_bags, device=input.device).repeat_interleave(length)
        else:
            assert offsets is not None  # the layer's own forward pass has checked it
            starts = offsets[:-1] if self._module.include_last_offset else offsets
            n_bags = len(starts)
            ends = torch.cat([starts[1:], starts.new_tensor([n])])
            bag = torch.arange(n_bags, device=input.device).repeat_interleave(ends - starts)
        counted = torch.ones(n, dtype=d.dtype, device=d.device)
        if self._module.padding_idx is not None:
            counted = (input.flatten() != self._module.padding_idx).to(d.dtype)
            rows = rows * counted[:, None]
        sums = d.new_zeros(n_bags, d.shape[1]).index_add(0, bag, rows)
        if self._module.mode == "sum":
            return sums
        counts = counted.new_zeros(n_bags).index_add(0, bag, counted)
        return sums / counts.clamp(min=1)[:, None]


class _ScaleRows:
    """Selected entries of the scale of a norm."""

    def __init__(self, module: nn.Module, units: Tensor) -> None:
        self._module, self._units = module, units

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int
    ) -> Tensor:
        plain = _row_module(self._module, {"weight": None, "bias": None})
        standardized = type(self._module).forward(plain, *args, **kwargs)
        if isinstance(self._module, _OVER_FEATURES):
            standardized = standardized.flatten(-len(self._module.normalized_shape))
        return standardized.index_select(axis, self._units) * _along(axis, d)


def _bias_rows(args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int) -> Tensor:
    return _along(axis, d)  # broadcast over samples and positions


def _along(axis: int, d: Tensor) -> Tensor:
    return d.reshape(-1, *[1] * (-1 - axis))


_BASES: tuple[Any, ...] = (
    nn.Linear,
    *_CONVOLUTIONS,
    *_TRANSPOSED,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    *_OVER_FEATURES,
)


def _keeps_forward(module: nn.Module) -> bool:
    """Whether the layer computes what its kind says: no subclass has changed its forward pass."""
    if "forward" in vars(module):
        return False
    helpers = ("_conv_forward", "_output_padding", "_apply_instance_norm", "_handle_no_batch_input")
    if any(
        h in vars(kind) for kind in type(module).__mro__ if not _is_torchs(kind) for h in helpers
    ):
        return False
    forward = type(module).forward
    if _is_transformers_conv1d(module):
        return forward.__module__ == "transformers.pytorch_utils"
    return any(
        forward in (base.forward, *(b.forward for b in base.__subclasses__() if _is_torchs(b)))
        for base in _BASES
        if isinstance(module, base)
    )


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def is_linear(module: nn.Module) -> bool:
    """Whether the layer multiplies the last axis of its input, rows of its weight being units."""
    return isinstance(module, nn.Linear) or _is_transformers_conv1d(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether the layer is a convolution, and not a transposed one."""
    return isinstance(module, _CONVOLUTIONS)


def patches(module: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies with its weight, shape (n, in_channels * kernel, positions)."""
    mode = module.padding_mode
    x = pad(
        x, module._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode
    )
    n_axes = len(module.kernel_size)
    for axis in range(n_axes):
        reach = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])
        x = x[..., :: module.dilation[axis]]
    spatial = range(2, 2 + n_axes)
    x = x.permute(0, 1, *(axis + n_axes for axis in spatial), *spatial)
    return x.reshape(len(x), x.shape[1 : 2 + n_axes].numel(), -1)


def _rows_of(module: Any, key: str, parameter: str, units: Tensor) -> Rows | None:
    """The rows that entries of a parameter have in a layer; None where there is no such form."""
    axis, merged = -1, 1
    of: Callable[..., Tensor]
    if not _keeps_forward(module):
        return None
    if is_linear(module):
        of = _linear_rows
    elif is_convolution(module) or isinstance(module, _TRANSPOSED):
        axis = -1 - len(module.kernel_size)
        of = _ConvolutionRows(module, units)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if getattr(module, "mode", "") == "max":
            return None
        return Rows(module, key, parameter, axis, merged, None, _EmbeddingRows(module, units))
    elif isinstance(module, _NORMS):
        if isinstance(module, _OVER_FEATURES):
            merged = len(module.normalized_shape)
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            n_axes = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}
            axis = -1 - next(n for kind, n in n_axes.items() if isinstance(module, kind))
        else:
            axis = 1
        of = _ScaleRows(module, units)
    else:
        return None
    return Rows(module, key, parameter, axis, merged, units, of if key == "weight" else _bias_rows)


@dataclass(frozen=True)
class Added:
    """Rows in one call of their layer, and what they added to its output: zero, so far."""

    rows: Rows
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor  # what the output was given, of its shape but for the places
    axis: int  # negative
    versions: tuple[int, ...]  # of the tensors in args and kwargs

    @property
    def input(self) -> Tensor:
        """What the layer multiplies with its weight."""
        return _input(self.args, self.kwargs)


@dataclass(frozen=True)
class Run:
    """A forward pass by the displaced parameters.

    Attributes
    ----------
    outputs : tensor, or tuple, list or mapping of them
        As the loss takes them.
    values : list of Tensor
        Those that depend on the displacement.
    displacements : list of Tensor
        Zeros that require gradients, one for each parameter.
    added : list of Added
    layer_outputs : list of (Tensor, int)
        Of the calls of layers with rows, with their versions when these returned.
    """

    outputs: Any
    values: list[Tensor]
    displacements: list[Tensor]
    added: list[Added]
    layer_outputs: list[tuple[Tensor, int]]


class _UsedElsewhereError(Exception):
    """Parameters that something else than the forward pass of their layers computes with."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(names)
        self.names = names


class MaskedModel:
    """A copy of a model, in evaluation mode, as a function of its selected parameters.

    It is a snapshot: what becomes of the model afterwards does not matter.

    Parameters
    ----------
    model : Module
    selection : UnitSelection
    dtype : torch.dtype or None
        In which to compute. By default the widest of the selected parameters', at least float32.

    Attributes
    ----------
    size : int
        Number p of coordinates.
    whole : dict of str to str
        Parameters that are displaced as a whole, since there are no rows for them, and why:
        autograd forms their whole gradient.
    theta : Tensor, shape (p,)
        The selected parameters.
    """

    def __init__(
        self, model: nn.Module, selection: UnitSelection, dtype: torch.dtype | None
    ) -> None:
        if not isinstance(selection, UnitSelection):
            raise TypeError(
                f"selection must be a UnitSelection; got an object of type "
                f"{type(selection).__name__}"
            )
        layout = UnitLayout(selection, model)
        if not layout.size:
            raise ValueError("the selection must have at least one unit; it is empty")
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
        self.dtype, self.device = dtype, devices.pop()
        self.size = layout.size
        self.layout = layout
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.model = _copy_of(model, layout).eval().requires_grad_(False)
        self.model._apply(lambda t: _in_dtype(t, dtype))  # type: ignore[no-untyped-call]
        self.entries = _entries(layout, self.device)
        self._base = {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if name in self.entries
        }
        self.theta = layout.gather(self._base)
        # Parameters that nothing may compute with: a run replaces those of the copy.
        self._outside: dict[int, tuple[weakref.ref[Tensor], str]] = {
            id(p): (weakref.ref(p), name) for name, p in model.named_parameters()
        }
        for name in self.entries:
            own = self.model.get_parameter(name).requires_grad_()
            self._outside[id(own)] = weakref.ref(own), name
        self.whole: dict[str, str] = {}
        self._watched: list[tuple[Tensor, str]] = []
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in self.entries}
        ids = {id(self.model.get_parameter(name)): name for name in self.entries}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                if id(parameter) in ids:
                    self._owners[ids[id(parameter)]].append((module, key))
        self._rows: dict[nn.Module, list[list[Rows]]] = {}
        for name, owners in self._owners.items():
            found = [(module, self._find_rows(module, key, name)) for module, key in owners]
            for module, rows in found:
                if rows is None:
                    self._displace_whole(name, f"a {type(module).__name__} computes with it")
            if name not in self.whole:
                for module, rows in found:
                    assert rows is not None
                    groups = self._rows.setdefault(module, [])
                    for group in groups:  # what is added at the same places is added at once
                        if _at_the_same_places(group[0], rows):
                            group.append(rows)
                            break
                    else:
                        groups.append([rows])

    def _displace_whole(self, name: str, why: str) -> None:
        for module, _ in self._owners[name]:
            if isinstance(module, nn.EmbeddingBag):
                raise ValueError(
                    f"units of an EmbeddingBag with mode={module.mode!r} whose weight {name!r} "
                    f"has no rows that are added ({why}) cannot be differentiated twice"
                )
        self.whole[name] = why

    def _find_rows(self, module: nn.Module, key: str, name: str) -> Rows | None:
        entries = self.entries[name]
        if not _is_layer(module) or isinstance(module, nn.MultiheadAttention):
            return None
        try:
            ((_, _, attributes),) = _pieces(module)
        except _NoUnitsError:
            return None
        if key not in attributes or attributes[key][0] != entries.cut:
            return None  # tied to a layer that cuts it in another way
        return _rows_of(module, key, name, entries.units)

    # ------------------------------------------------------------------------------------------
    # Vectors

    def split(self, vector: Tensor) -> list[Tensor]:
        """The displacements of the parameters that a vector of coordinates is."""
        return [entries.take(vector) for entries in self.entries.values()]

    def join(self, displacements: Sequence[Tensor]) -> Tensor:
        """The vector of displacements of the parameters; the reverse of `split`."""
        out = displacements[0].new_zeros(self.size)
        for entries, displacement in zip(self.entries.values(), displacements, strict=True):
            entries.add_to(out, displacement)
        return out

    def columns(self, selection: UnitSelection) -> Tensor:
        """The coordinates that the coordinates of a part of the selection are."""
        before = {name: p.requires_grad for name, p in self.model.named_parameters()}
        for name, trainable in self._trainable.items():
            self.model.get_parameter(name).requires_grad_(trainable)
        layout = UnitLayout(selection, self.model)
        for name, required in before.items():
            self.model.get_parameter(name).requires_grad_(required)
        out = torch.empty(layout.size, dtype=torch.int64, device=self.device)
        for name, part in _entries(layout, self.device).items():
            whole = self.entries[name]
            out[part.coordinates] = whole.coordinates[torch.searchsorted(whole.units, part.units)]
        return out

    @contextmanager
    def moved(self, step: Tensor) -> Iterator[None]:
        """While entered, the selected parameters are displaced by a vector."""
        before = self._base
        self._base = {
            name: entries.displaced(before[name], part)
            for (name, entries), part in zip(self.entries.items(), self.split(step), strict=True)
        }
        try:
            yield
        finally:
            self._base = before

    # ------------------------------------------------------------------------------------------
    # The forward pass

    def run(self, batch: Batch) -> Run:
        """Call the model on a batch, differentiably by a displacement of zero."""
        while True:
            try:
                return self._run(batch)
            except _UsedElsewhereError as error:
                for name in error.names:
                    self._displace_whole(
                        name, "it is used outside of its layer's forward pass, too"
                    )
                for module, groups in self._rows.items():
                    kept = [[r for r in group if r.parameter not in self.whole] for group in groups]
                    self._rows[module] = [group for group in kept if group]

    def _check_outside(self, leaves: dict[int, Tensor], what: str) -> None:
        for key, leaf in leaves.items():
            reference, name = self._outside.get(key, (None, ""))
            if reference is not None and reference() is leaf:
                raise ValueError(
                    f"{what} computes with parameter {name!r} in a way that a copy of the model "
                    "does not follow: through a lambda, a closure, a bound method or a list that "
                    "holds it, or as the parameter itself"
                )

    def check_loss(self, loss: Tensor, displacements: Sequence[Tensor] = ()) -> None:
        """Refuse a loss that depends on parameters other than through the outputs that are seen.

        The displacements are given where the loss is one of outputs without their graphs.
        """
        leaves = _leaves([loss])
        self._check_outside(leaves, "the loss (weight_decay is an argument of its own)")
        hidden = [value for value, _ in self._watched] + list(displacements)
        if any(leaves.get(id(value)) is value for value in hidden):
            raise ValueError(
                "the loss must depend on the selected parameters through the tensors, tuples, "
                "lists and dicts that the model returns, and through nothing else"
            )

    def _run(self, batch: Batch) -> Run:
        displacements = {
            name: torch.zeros(e.shape, dtype=self.dtype, device=self.device, requires_grad=True)
            for name, e in self.entries.items()
        }
        added: list[Added] = []
        layer_outputs: list[tuple[Tensor, int]] = []
        watched: list[tuple[Tensor, str]] = []
        with ExitStack() as stack:
            for name, owners in self._owners.items():
                value = self._base[name]
                if name in self.whole:
                    value = self.entries[name].displaced(value, displacements[name])
                else:
                    value = value.detach().requires_grad_()
                    watched.append((value, name))
                for module, key in owners:
                    stack.enter_context(_replaced(module._parameters, key, value))
            for module, groups in self._rows.items():
                if groups:
                    given = {name: value for value, name in watched}
                    forward = _forward(module, groups, given, displacements, added, layer_outputs)
                    stack.enter_context(_replaced(vars(module), "forward", forward))
            outputs = self.model(*batch.args, **batch.kwargs)
        logits = getattr(outputs, "logits", None)
        outputs = logits if isinstance(logits, Tensor) else outputs
        if next(tensors_of(outputs), None) is None:
            raise TypeError(
                "the model must return a tensor, or tuples, lists or dicts of them; got an object "
                f"of type {type(outputs).__name__}"
            )
        values = [t for t in tensors_of(outputs) if t.requires_grad]
        leaves = _leaves(values)
        self._check_outside(leaves, "the model")
        self._watched = watched
        elsewhere = {name for value, name in watched if id(value) in leaves}
        if elsewhere:
            raise _UsedElsewhereError(elsewhere)
        return Run(outputs, values, list(displacements.values()), added, layer_outputs)


@dataclass(frozen=True)
class Entries:
    """The selected entries of one parameter, in ascending order."""

    cut: _Cut
    units: Tensor  # (entries,), places in the cut
    positions: tuple[Tensor, ...]  # the same, axis by axis of the view of the cut
    coordinates: Tensor  # (entries, length)
    shape: tuple[int, ...]  # of a displacement: (entries, *slice)
    first: int  # the first coordinate
    step: int | None  # from entry to entry, if coordinates are so far apart, and consecutive in one

    def _view(self, vectors: Tensor) -> Tensor | None:
        """The coordinates in vectors, shape (..., p), without a copy if they lie regularly."""
        if self.step is None:
            return None
        *strides, stride = vectors.stride()
        return vectors.as_strided(
            (*vectors.shape[:-1], *self.coordinates.shape),
            (*strides, self.step * stride, stride),
            vectors.storage_offset() + self.first * stride,
        )

    def take(self, vector: Tensor) -> Tensor:
        """The displacement of this parameter that a vector of all coordinates is."""
        view = self._view(vector)
        return (vector[self.coordinates] if view is None else view).reshape(self.shape)

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        """Add displacements, shape (..., *shape), to vectors of all coordinates, shape (..., p)."""
        displacements = displacements.reshape(*vectors.shape[:-1], *self.coordinates.shape)
        view = self._view(vectors)
        if view is None:
            vectors[..., self.coordinates] += displacements
        else:
            view += displacements

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        view = self.cut.view(base)
        moved = view[self.positions] + displacement
        return self.cut.unview(view.index_put(self.positions, moved))


def _entries(layout: UnitLayout, device: torch.device) -> dict[str, Entries]:
    units: dict[str, list[Tensor]] = {}
    coordinates: dict[str, list[Tensor]] = {}
    parts: dict[str, _Part] = {}
    for part, places, numbers in layout.places():
        units.setdefault(part.parameter, []).append(torch.as_tensor(places))
        coordinates.setdefault(part.parameter, []).append(torch.as_tensor(numbers))
        parts[part.parameter] = part
    found = {}
    for name, part in parts.items():
        every = torch.cat(units[name])
        order = torch.argsort(every)
        every, where = every[order], torch.cat(coordinates[name])[order]
        counts = part.cut.counts(part.shape)
        positions: tuple[Tensor, ...] = torch.unravel_index(every.to(device), counts)
        rest = part.cut.view(torch.empty(part.shape, device="meta")).shape[len(counts) :]
        first, step = int(where[0, 0]), int(where[-1, 0] - where[0, 0]) // max(1, len(where) - 1)
        regular = first + step * torch.arange(len(where))[:, None] + torch.arange(where.shape[1])
        found[name] = Entries(
            part.cut,
            every.to(device),
            positions,
            where.to(device),
            (len(every), *rest),
            first,
            step if torch.equal(where, regular) else None,
        )
    return found


def _copy_of(model: nn.Module, layout: UnitLayout) -> nn.Module:
    memo: dict[int, Any] = {}
    selected = {id(parameter): name for name, parameter in layout.parameters.items()}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                for leaf in _leaves([value]):
                    if leaf in selected:
                        raise ValueError(
                            f"attribute {key!r} of a {type(module).__name__} was computed from the "
                            f"selected parameter {selected[leaf]!r} beforehand; compute it in the "
                            "forward pass"
                        )
                memo[id(value)] = value.detach().clone()  # deepcopy refuses these
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(f"model cannot be copied by copy.deepcopy: {error}") from error


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        dtype = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype]
    elif not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


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
    groups: list[list[Rows]],
    given: dict[str, Tensor],
    displacements: dict[str, Tensor],
    added: list[Added],
    layer_outputs: list[tuple[Tensor, int]],
) -> Callable[..., Tensor]:
    """The forward pass of a layer that adds its rows."""
    merged = groups[0][0].merged

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        # But for parameters that are displaced as a whole: these are no leaves.
        fixed = {
            key: parameter.detach()
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.is_leaf
        }
        out: Tensor = type(module).forward(_row_module(module, fixed), *args, **kwargs)
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
                if value.requires_grad:  # not under no_grad
                    versions = tuple(t._version for t in tensors_of([args, kwargs]))
                    added.append(Added(rows, args, kwargs, value, axis, versions))
                values.append(value)
            if not values:
                continue
            total = sum(values[1:], values[0])
            places = group[0].places
            out = out + total if places is None else out.index_add(axis, places, total)
        out = out.reshape(shape)
        layer_outputs.append((out, out._version))
        return out

    return forward


def _at_the_same_places(a: Rows, b: Rows) -> bool:
    return a.places is not None and b.places is not None and torch.equal(a.places, b.places)


def graph_nodes(values: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph of some values, each once."""
    seen = set()
    waiting = [value.grad_fn for value in values]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(parent for parent, _ in node.next_functions)


def _leaves(values: Sequence[Tensor]) -> dict[int, Tensor]:
    """The tensors, by id, at which the graph of some values ends."""
    ends = [v for v in values if v.requires_grad and v.grad_fn is None]
    nodes = (getattr(node, "variable", None) for node in graph_nodes(values))
    return {id(leaf): leaf for leaf in (*ends, *nodes) if leaf is not None}
