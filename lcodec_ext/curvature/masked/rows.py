"""What the selected rows of a layer add to its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from lcodec_ext.curvature.layers import (
    CONVOLUTIONS,
    EMBEDDINGS,
    NORMS,
    OVER_FEATURES,
    TRANSPOSED,
    is_linear,
    is_transformers_conv1d,
    unit_axis,
)


@dataclass(frozen=True)
class LayerRows:
    """What selected entries of one parameter of one layer add to its output.

    Attributes
    ----------
    module : Module
        The layer.
    key : str
        What the layer calls the parameter: "weight" or "bias", or its like.
    parameter : str
        The name of the parameter that the entries belong to.
    axis, merged : int
        Where the output has the units, as `unit_axis` says.
    places : Tensor of int64 or None
        On that axis, one for each entry; None where an entry, as the row of an embedding, adds to
        all of it.
    of : callable(args, kwargs, displacement, axis) -> Tensor
        Linear in the displacement, which has one entry for each unit along its first axis. The
        result has the shape of the output, with these places only. Its axis is negative.
    """

    module: Any
    key: str
    parameter: str
    axis: int
    merged: int
    places: Tensor | None
    of: Callable[[tuple[Any, ...], dict[str, Any], Tensor, int], Tensor]

    @property
    def is_bias(self) -> bool:
        """Whether they are added as they are."""
        return self.key.endswith("bias")

    @property
    def is_product(self) -> bool:
        """Whether they multiply the last axis of the input."""
        of_attention = isinstance(self.module, nn.MultiheadAttention)
        return not self.is_bias and (is_linear(self.module) or of_attention)

    @property
    def part(self) -> slice | None:
        """Which of the entries these are, if they are not all that are selected."""
        return self.of.part if isinstance(self.of, PartRows) else None


@dataclass(frozen=True)
class PartRows:
    """Entries that are some of those that are selected; see `LayerRows.of`.

    Attributes
    ----------
    of : callable
        All of them.
    part : slice
        Which these are.
    """

    of: Callable[..., Tensor]
    part: slice

    def __call__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int
    ) -> Tensor:
        return self.of(args, kwargs, d[self.part], axis)


def row_module(
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
        self._transposed = isinstance(module, TRANSPOSED)
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
        rows = row_module(
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
        plain = row_module(self._module, {"weight": None, "bias": None})
        standardized = type(self._module).forward(plain, *args, **kwargs)
        if isinstance(self._module, OVER_FEATURES):
            standardized = standardized.flatten(-len(self._module.normalized_shape))
        return standardized.index_select(axis, self._units) * _along(axis, d)


def _bias_rows(args: tuple[Any, ...], kwargs: dict[str, Any], d: Tensor, axis: int) -> Tensor:
    return _along(axis, d)  # broadcast over samples and positions


def _along(axis: int, d: Tensor) -> Tensor:
    return d.reshape(-1, *[1] * (-1 - axis))


_BASES: tuple[Any, ...] = (
    nn.Linear,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    *OVER_FEATURES,
)


def _keeps_forward(module: nn.Module) -> bool:
    """Whether the layer computes what its kind says: no subclass has changed its forward pass."""
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return False
    helpers = ("_conv_forward", "_output_padding", "_apply_instance_norm", "_handle_no_batch_input")
    if any(
        h in vars(kind) for kind in type(module).__mro__ if not _is_torchs(kind) for h in helpers
    ):
        return False
    forward = type(module).forward
    if is_transformers_conv1d(module):
        return forward.__module__ == "transformers.pytorch_utils"
    return any(
        forward in (base.forward, *(b.forward for b in base.__subclasses__() if _is_torchs(b)))
        for base in _BASES
        if isinstance(module, base)
    )


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules.")


def is_convolution(module: nn.Module) -> bool:
    """Whether the layer is a convolution, and not a transposed one."""
    return isinstance(module, CONVOLUTIONS)


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


def keeps_attention(module: nn.Module) -> bool:
    """Whether an attention has the forward pass of its kind."""
    return "forward" not in vars(module) and (type(module).forward is nn.MultiheadAttention.forward)


def rows_of(
    module: Any, key: str, parameter: str, units: Tensor, first: int = 0
) -> LayerRows | None:
    """The rows of a layer for entries of a parameter; None if the layer has no such form.

    The first unit that has an entry in it is that of an attention's projections.
    """
    of: Callable[..., Tensor]
    places: Tensor | None = units
    if isinstance(module, nn.MultiheadAttention):
        if not keeps_attention(module):
            return None
        of = _bias_rows if key.endswith("bias") else _linear_rows
        return LayerRows(module, key, parameter, -1, 1, units + first, of)
    if not _keeps_forward(module):
        return None
    if is_linear(module):
        of = _linear_rows
    elif isinstance(module, CONVOLUTIONS + TRANSPOSED):
        of = _ConvolutionRows(module, units)
    elif isinstance(module, EMBEDDINGS) and getattr(module, "mode", "") != "max":
        of, places = _EmbeddingRows(module, units), None
    elif isinstance(module, NORMS):
        of = _ScaleRows(module, units)
    else:
        return None
    axis, merged = unit_axis(module)
    return LayerRows(
        module, key, parameter, axis, merged, places, of if key == "weight" else _bias_rows
    )


@dataclass(frozen=True)
class RowsCall:
    """Rows in one call of their layer, and what they added to its output: zero, so far."""

    rows: LayerRows
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Tensor  # what the output was given, of its shape but for the places
    axis: int  # negative
    versions: tuple[int, ...]  # of the tensors in args and kwargs

    @property
    def input(self) -> Tensor:
        """What the layer multiplies with its weight."""
        return _input(self.args, self.kwargs)
