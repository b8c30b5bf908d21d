"""Attention whose projections are apart, so that selected rows of them can be added."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lcodec_ext._torch.batches import tensors_of, widened
from lcodec_ext._torch.detours import cast_dtype
from lcodec_ext.curvature.masked.rows import LayerRows, PartRows, RowsCall, row_module

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attention_forward(
    module: Any,
    groups: Sequence[Sequence[LayerRows]],
    given: dict[str, Tensor],
    displacements: dict[str, Tensor],
    calls: list[RowsCall],
) -> Callable[..., Any]:
    """The forward pass of an attention that adds rows to its input projections.

    Inputs are projected first. The layer's own forward pass then has identities for projections,
    with which sums of products are exact.
    """
    E = module.embed_dim
    packed = module._qkv_same_embed_dim

    def projected(x: Tensor, weight: Tensor, bias: Tensor | None, first: int) -> Tensor:
        """Some of the 3 E rows of the projections, from the first one on."""
        out, cast = linear(x, weight, bias), cast_dtype() is not None
        kept = widened(x) if cast else x
        out = widened(out) if cast else out
        for each in (rows for group in groups for rows in group):
            if module._parameters.get(each.key) is not given[each.parameter]:
                continue  # called with other parameters
            assert each.places is not None
            bounds = each.places.new_tensor([first, first + len(weight)])
            start, stop = torch.searchsorted(each.places, bounds).tolist()
            if start == stop:
                continue
            places = each.places[start:stop] - first
            own = replace(each, places=places)
            if stop - start < len(each.places):
                own = replace(own, of=PartRows(each.of, slice(start, stop)))
            value = own.of((x,), {}, displacements[each.parameter], -1)
            value = value.expand(*out.shape[:-1], len(places))
            value = widened(value) if cast else value
            if value.requires_grad:  # not under no_grad
                versions = tuple(t._version for t in tensors_of([kept]))
                calls.append(RowsCall(own, (kept,), {}, value, -1, versions))
            out = out.index_add(-1, places, value)
        return out

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        fixed = {
            name: p.detach() if p is not None and p.is_leaf else p
            for name, p in module._parameters.items()
        }
        bias = fixed["in_proj_bias"]
        if packed and query is key and key is value:
            parts = [*projected(query, fixed["in_proj_weight"], bias, 0).chunk(3, -1)]
        else:
            weights = (
                fixed["in_proj_weight"].chunk(3) if packed else [fixed[name] for name in _SEPARATE]
            )
            biases = [None] * 3 if bias is None else bias.chunk(3)
            each = zip((query, key, value), weights, biases, (0, E, 2 * E), strict=True)
            parts = [projected(*one) for one in each]
        eye = torch.eye(E, dtype=parts[0].dtype, device=parts[0].device)
        plain = row_module(
            module,
            {
                **fixed,
                **dict.fromkeys(_SEPARATE, eye),
                "in_proj_weight": None,
                "in_proj_bias": None,
            },
            _qkv_same_embed_dim=False,
            kdim=E,
            vdim=E,
        )
        unprojected = row_module(module.out_proj, {"weight": eye, "bias": None})
        plain.__dict__["_modules"] = {**module._modules, "out_proj": unprojected}
        found, attended = type(module).forward(plain, *parts, *args, **kwargs)
        return module.out_proj(found), attended

    return forward
