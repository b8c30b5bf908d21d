"""The noise of a release: how it is drawn, and a warning of what it does to a model."""

import math
import secrets
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_real, check_seed
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext.unlearning.privacy.guarantee import Guarantee

_Target = TypeVar("_Target", Tensor, nn.Module)
_CHUNK = 1 << 17  # a megabyte, which stays in the cache


class _Normals:
    """Standard normals, two from every two 64-bit words by the method of Box and Muller.

    The words come from the operating system's cryptographic generator, or for tests from a seed:
    whoever knows the seed can subtract the noise. (torch's CPU generator uses 32 bits of a seed,
    few enough to try them all.)
    """

    def __init__(self, seed: int | None) -> None:
        self._philox = None if seed is None else np.random.Philox(seed)

    def _words(self, n: int) -> NDArray[np.uint64]:
        if self._philox is None:
            return np.frombuffer(secrets.token_bytes(8 * n), dtype=np.uint64)
        return np.asarray(self._philox.random_raw(n), dtype=np.uint64)

    def like(self, tensor: Tensor) -> Tensor:
        noise = torch.empty(tensor.numel(), dtype=torch.float64)
        for start in range(0, len(noise), _CHUNK):  # by torch's kernels, which are vectorised
            part = noise[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            words = self._words(2 * half) >> np.uint64(11)
            # in (0, 1), both excluded
            uniform = torch.from_numpy(words.view(np.int64)).double().add_(0.5).mul_(2.0**-53)
            length = uniform[:half].log_().mul_(-2).sqrt_()
            angle = uniform[half:].mul_(2 * math.pi)
            torch.mul(length, angle.cos(), out=part[:half])
            part[half:] = (length * angle.sin_())[: len(part) - half]
        return noise.view(tensor.shape).to(tensor.device)


def standard_normals(like: Tensor, seed: int | None = None) -> Tensor:
    """Draw float64 standard normals of a tensor's shape, on its device, as `add_noise` does."""
    return _Normals(seed).like(like)


def add_noise(target: _Target, sigma: float, *, seed: int | None = None) -> _Target:
    """Add independent N(0, sigma^2) noise to every trainable parameter.

    Parameters
    ----------
    target : nn.Module or Tensor
        A model, or a vector of weights. It is not changed.
    sigma : float
        Standard deviation, the same for all coordinates.
    seed : int, optional
        For tests alone. By default the noise comes from the operating system's cryptographic
        generator, without a seed: whoever knows or guesses the seed of a release can subtract its
        noise. Two releases must not share their noise either: their difference shows the change.

    Returns
    -------
    nn.Module or Tensor
        A copy with noise, which is added in float64 and then rounded. Buffers and parameters that
        need no gradient stay the same; tied parameters get one noise.

    Raises
    ------
    TypeError
        If target is something else, or holds trainable parameters that are not real.
    """
    sigma = check_real(sigma, "sigma", 0.0)
    normals = _Normals(check_seed(seed))

    def noisy(tensor: Tensor, name: str) -> Tensor:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be real to take noise; it has dtype {tensor.dtype}")
        value = tensor.detach()
        return (value.double() + sigma * normals.like(value)).to(value.dtype)

    if isinstance(target, Tensor):
        return noisy(target, "target")
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"target must be a model or a tensor; got an object of type {type(target).__name__}"
        )
    released = copy_of(target)
    with torch.no_grad():
        for name, parameter in released.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(noisy(parameter, name))
    return released


def warn_of_noise(before: float, after: float, guarantee: Guarantee, samples: str) -> None:
    """Warn where noise raises a mean loss by much."""
    if is_much_worse(before, after):
        warn(
            f"the noise for epsilon={guarantee.epsilon:g}, delta={guarantee.delta:g}, whose "
            f"standard deviation is {guarantee.sigma:.3g}, raised the mean loss of {samples} from "
            f"{before:.3g} to {after:.3g}. A larger epsilon or weight decay takes less noise",
        )
