"""Random signs that are functions of a seed and of what a sample contains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._torch.batches import Batch, tensors_of
from lcodec_ext._torch.padding import labels_of, words_of

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


def content(batch: Batch, ignored: int = -100) -> Tensor:
    """A hash of every sample of a batch, int64, shape (n,).

    Padding does not count: what an ``attention_mask`` leaves out, and ignored labels.
    """
    n = batch.size
    total = torch.zeros((), dtype=torch.int64)
    for number, (tensor, counted) in enumerate(_by_sample(batch, n, ignored)):
        bits = tensor.detach().reshape(n, -1)
        if bits.is_floating_point():
            bits = (bits.float() + 0.0).view(torch.int32)  # one zero
        bits = bits.to(torch.int64)
        place = torch.arange(bits.shape[1], device=bits.device)
        if counted is not None:
            place = counted.cumsum(1)
        hashes = _mixed(bits ^ _mixed((place + (number << 40)) * _signed(_GOLDEN)))
        if counted is not None:
            hashes = hashes * counted
        total = total.to(hashes.device) + hashes.sum(1)
    return total.expand(n)


def _by_sample(batch: Batch, n: int, ignored: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The tensors of samples, and which places of them count; None for all."""
    words, labels = words_of(batch), labels_of(batch, ignored)
    given: list[tuple[Any, Tensor | None]] = [(batch.args, words)]
    for key, value in batch.kwargs.items():
        given.append((value, labels if key.startswith("decoder_") else words))
    given.append((batch.targets, labels))
    for tree, counted in given:
        for tensor in tensors_of(tree):
            if tensor.ndim and len(tensor) == n and not tensor.is_complex():
                fits = counted is not None and counted.shape == tensor.shape
                yield tensor, counted if fits else None


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


def signs_of_texts(hashes: Tensor, like: Tensor, batch: Batch, seed: int, draw: int) -> Tensor:
    """Signs for each output, which are the same for a text however it is padded.

    Outputs are (n, length, ...), or, where labels have the shape (n, length), (n, classes, length).
    """
    words, labels = words_of(batch), labels_of(batch)
    classes_first = labels is not None and like.ndim == 3 and like.shape[1] != labels.shape[1]
    shape = like.movedim(1, 2).shape if classes_first else like.shape
    found = signs(hashes, shape, seed, draw, like.dtype)
    if words is None or labels is None or not words.shape == labels.shape == shape[:2]:
        words = None
    if words is not None and not bool(words[:, 0].all()):  # behind padding
        place = (words.cumsum(1) - 1).clamp(min=0).view(*words.shape, *[1] * (len(shape) - 2))
        found = found.gather(1, place.expand_as(found))
    return found.movedim(2, 1) if classes_first else found
