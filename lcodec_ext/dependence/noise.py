"""The noise of L-CODEC and L-FOCI."""

from typing import Any, Literal

import numpy as np

from lcodec_ext._arrays import array_module, refuse_merged
from lcodec_ext._checks import check_choice, check_real, check_seed
from lcodec_ext._random import gaussian_noise
from lcodec_ext.dependence.backends.base import Backend, Columns

NoiseScale = Literal["absolute", "relative"]


def check_noise(noise: object, noise_scale: object, seed: object) -> None:
    """Refuse bad noise settings of lcodec and lfoci."""
    check_real(noise, "noise", 0)
    check_choice(noise_scale, "noise_scale", ("absolute", "relative"))
    check_seed(seed, optional=False)


def with_noise(
    backend: Backend,
    y: Any,
    X: Any,
    columns: Columns,
    noise: float,
    noise_scale: NoiseScale,
    seed: int,
    first: int = 0,
) -> tuple[Any, Any]:
    """Response and table in float64 with noise: y from stream 0, column k from stream k + 1.

    `columns` is X as the backend lays it out, or begins with it; `first` is the number of its first
    column. The noise is drawn on the host and added where the table is.
    """
    xp = array_module(X)
    X = xp.asarray(X, dtype=xp.float64)
    if noise == 0:
        return y, X
    refuse_merged(y, "y")
    y = xp.asarray(y, dtype=xp.float64)
    sigmas = np.full(1 + X.shape[1], float(noise))
    if noise_scale == "relative":  # in the written order of additions, for the same bits anywhere
        sigmas[0] *= backend.lay_out(y[:, None]).standard_deviations()[0]
        sigmas[1:] *= columns.standard_deviations()[: X.shape[1]]
    streams = [0, *range(first + 1, first + len(sigmas))]
    added = gaussian_noise(len(X), sigmas, seed, streams)
    if xp is not np:
        added = xp.from_numpy(added).to(X.device)
    return y + added[:, 0], X + added[:, 1:]
