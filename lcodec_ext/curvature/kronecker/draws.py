"""Random signs that are functions of a seed and of what a sample contains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, tensors_of

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 32  # signs of one hash


def _signed(value: int) -> int:
    """A number modulo 2^64 as an int64."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, bit for bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    return z ^ ((z >> 31) & (2**33 - 1))


def content(batch: Batch) -> Tensor:
    """A hash of every sample of a batch, int64, shape (n,).

    What an ``attention_mask`` leaves out does not count: padding on the right may differ.
    """
    n, mask = batch.size, batch.kwargs.get("attention_mask")
    total = torch.zeros((), dtype=torch.int64)
    for number, tensor in enumerate(_by_sample(batch, n)):
        bits = tensor.detach().reshape(n, -1)
        if bits.is_floating_point():
            bits = (bits.float() + 0.0).view(torch.int32)  # one zero
        bits = bits.to(torch.int64)
        place = torch.arange(bits.shape[1], device=bits.device) + (number << 40)
        hashes = _mixed(bits ^ _mixed(place * _signed(_GOLDEN)))
        if isinstance(mask, Tensor) and tensor.shape == mask.shape:
            hashes = hashes * (mask.reshape(n, -1) != 0)
        total = total.to(hashes.device) + hashes.sum(1)
    return total.expand(n)


def _by_sample(batch: Batch, n: int) -> Iterator[Tensor]:
    given: list[Any] = [batch.args, batch.kwargs, batch.targets]
    for tensor in tensors_of(given):
        if tensor.ndim and len(tensor) == n and not tensor.is_complex():
            yield tensor


def signs(hashes: Tensor, shape: torch.Size, seed: int, draw: int, dtype: torch.dtype) -> Tensor:
    """Signs of the shape (n, ...) for samples of these hashes: +-1, fair and independent.

    The first signs of a sample are the same ones for any shape.
    """
    n, numel = len(hashes), shape[1:].numel()
    words = torch.arange(-(-numel // _WORD), device=hashes.device)
    start = _signed(_GOLDEN * (2 * seed + 1) + 0xD1342543DE82EF95 * (draw + 1))
    mixed = _mixed(_mixed(hashes + start)[:, None] + words * _signed(_GOLDEN))
    out = torch.empty(n, numel, dtype=dtype, device=hashes.device)
    bit = torch.arange(_WORD, device=hashes.device)
    for row, word in zip(out, mixed, strict=True):
        row.copy_((((word[:, None] >> bit) & 1) * 2 - 1).flatten()[:numel])
    return out.reshape(shape)
