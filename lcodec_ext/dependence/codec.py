"""The conditional dependence coefficient: CODEC and its randomized form, L-CODEC."""

import warnings
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from lcodec_ext._arrays import array_module
from lcodec_ext._checks import check_choice, check_real, check_seed
from lcodec_ext._random import gaussian_noise
from lcodec_ext.dependence import exact as _exact
from lcodec_ext.dependence.backends.base import (
    TIES,
    Ties,
    constant_columns,
    lay_out,
    make_engine,
    warn_constant_columns,
)
from lcodec_ext.dependence.backends.choice import Backend, resolve
from lcodec_ext.dependence.ranks import ranks
from lcodec_ext.dependence.scaling import Columns, check_overflow, squared_spans, warn_underflow
from lcodec_ext.dependence.table import as_features, as_response, clean_rows

NoiseScale = Literal["absolute", "relative"]


def codec(
    y: Any,
    z: Any,
    x: Any = None,
    *,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: Backend = "auto",
) -> float:
    """Conditional dependence coefficient T(Y, Z) or T(Y, Z | X).

    In the limit of many rows 0 if and only if Y is independent of Z (given X), and 1 if and
    only if Y is a function of Z (given X). On a finite sample it can be negative, far below -1
    where X alone nearly determines Y.

    Parameters
    ----------
    y : array_like of shape (n,) or (n, 1)
        Response. Only its order counts; n is at least 3 and at most 10^6. Rows of all arguments
        belong together by position; the index of a pandas object is not looked at.
    z : array_like of shape (n,) or (n, q)
        Columns whose information about y is measured. float32, float16 and bfloat16 are
        computed in float32, everything else in float64. Columns are not standardised: distances
        mix their units.
    x : array_like of shape (n,) or (n, r), optional
        Columns to condition on.
    ties : {"average", "random", "first"}, default "average"
        What happens where several rows are equally near. "average" takes the mean over them:
        deterministic, and for T(Y, Z) the exact expectation of a random choice (for T(Y, Z | X)
        the ratio of expectations). "random" picks one, a function of the seed and the row
        alone. "first" picks the lowest row.
    seed : int, optional
        In [0, 2^64), for ties="random". None draws a fresh one.
    nan_policy : {"raise", "omit"}, default "raise"
        "omit" leaves out rows that have a NaN anywhere.
    backend : {"auto", "cpu", "cuda", "reference"}, default "auto"
        "auto" runs where the data lies: CUDA tensors on their device, everything else on the CPU.
        "cuda" takes CUDA tensors only. All arguments must be on one device; nothing is copied to
        another. All backends return the same bits.

    Returns
    -------
    float
        The coefficient, computed as an exact rational and rounded once. 1.0, with a warning,
        where its denominator is 0: y is constant, or a function of x on this sample.

    Raises
    ------
    ValueError
        For data that cannot be used: NaN, infinity, no numbers, wrong shapes, fewer than 3
        rows, distances that overflow. The message names argument, row and column.
    TypeError
        For a seed that is no integer.
    RuntimeError
        If CUDA tensors are given and this build or machine has no CUDA backend.
    torch.OutOfMemoryError
        If their device has no room for the computation.

    Notes
    -----
    With max ranks R_i = #{j : y_j <= y_i}, L_i = #{j : y_j >= y_i}, and m_i the mean of
    min(R_i, R_j) over the nearest neighbours j of row i::

        T(Y, Z)     = (n sum m_i - sum L_i^2) / sum L_i (n - L_i)
        T(Y, Z | X) = sum (m_i^XZ - m_i^X) / sum (R_i - m_i^X)

    With d columns in all about O(n^(1 + 1/d)) time on continuous data and O(n log n) where many
    rows share their values; O(d n^2) at worst, and in many columns. O(d n) memory.

    References
    ----------
    M. Azadkia and S. Chatterjee, "A simple measure of conditional dependence", Annals of
    Statistics 49 (2021), section 2.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, z = rng.random((2, 1000))
    >>> y = (x + z) % 1
    >>> codec(y, z) < 0.1 < 0.6 < codec(y, z, x)
    True
    """
    chosen = resolve(backend, y=y, z=z, x=x)
    given = _prepare(y, z, x, ties, seed, nan_policy)
    columns = lay_out(chosen, given.table)
    given.warn_constant_columns(columns)
    return _coefficient(columns, given.r, given.y, ties, seed)


def lcodec(
    y: Any,
    z: Any,
    x: Any = None,
    *,
    noise: float = 0.01,
    noise_scale: NoiseScale = "absolute",
    seed: int = 0,
    ties: Ties = "average",
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: Backend = "auto",
) -> float:
    """L-CODEC: `codec` of the arguments with a little Gaussian noise added to each.

    The noise removes ties, which makes discrete variables as cheap as continuous ones.

    Parameters
    ----------
    y, z, x, ties, nan_policy, backend
        As in `codec`; the computation is in float64.
    noise : float, default 0.01
        Standard deviation of the noise, the paper's value (it uses 0 to 0.1). 0 adds none.
    noise_scale : {"absolute", "relative"}, default "absolute"
        Whether ``noise`` is in the units of each column, as in the paper, or a share of the
        column's own standard deviation.
    seed : int, default 0
        Of the noise, and of ties="random". y draws from stream 0 of Philox(seed), the columns
        of x and then of z from streams 1, 2, ...

    Returns
    -------
    float
        T(Y~, Z~ | X~) of the noisy variables.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `codec`, and for noise that is negative or not finite.

    Notes
    -----
    The noise in y is part of what is to be explained: for a binary y that is a function of z
    the value is near 1/2, where `codec` gives 1. A constant y becomes noise: the value is near
    0, and a warning says so.

    References
    ----------
    R. Mehta, S. Pal, V. Singh and S. Ravi, "Deep Unlearning via Randomized Conditionally
    Independent Hessians", CVPR 2022.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.random.default_rng(0).integers(0, 2, (2, 500))
    >>> lcodec(a ^ b, a) < 0.1 < 0.4 < lcodec(a ^ b, a, b)
    True
    """
    chosen = resolve(backend, y=y, z=z, x=x)
    check_noise(noise, noise_scale, seed)
    given = _prepare(y, z, x, ties, seed, nan_policy)
    columns = lay_out(chosen, given.table)
    given.warn_constant_columns(columns)
    if noise > 0 and (given.y == given.y[0]).all():
        warnings.warn("y is constant: the value measures the added noise alone", stacklevel=2)
    response, table = with_noise(given.y, given.table, columns, noise, noise_scale, seed, chosen)
    return _coefficient(lay_out(chosen, table), given.r, response, ties, seed)


def check_noise(noise: object, noise_scale: object, seed: object) -> None:
    """Refuse bad noise settings of lcodec and lfoci."""
    check_real(noise, "noise", 0)
    check_choice(noise_scale, "noise_scale", ("absolute", "relative"))
    check_seed(seed, optional=False)


def with_noise(
    y: Any, X: Any, columns: Columns, noise: float, noise_scale: str, seed: int, backend: str
) -> tuple[Any, Any]:
    """Response and table with L-CODEC's noise: y from stream 0, columns from 1 on.

    `columns` is X as the backend lays it out. The noise is drawn on the host and added where the
    table is.
    """
    xp = array_module(X)
    X = xp.asarray(X, dtype=xp.float64)
    if noise == 0:
        return y, X
    y = xp.asarray(y, dtype=xp.float64)
    sigmas = np.full(1 + X.shape[1], float(noise))
    if noise_scale == "relative":  # in the written order of additions, for the same bits anywhere
        sigmas[0] *= lay_out(backend, y[:, None]).standard_deviations()[0]
        sigmas[1:] *= columns.standard_deviations()
    added = gaussian_noise(len(X), sigmas, seed)
    if xp is not np:
        added = xp.from_numpy(added).to(X.device)
    return y + added[:, 0], X + added[:, 1:]


class _Arguments(NamedTuple):
    """Validated response, and the columns of x (r of them, or none) and of z side by side."""

    y: Any
    table: Any
    r: int
    x_names: list[str] | None
    z_names: list[str] | None

    def warn_constant_columns(self, columns: Columns) -> None:
        """Warn of constant columns of z and of x, at the caller of codec or lcodec."""
        constant = constant_columns(columns)
        warn_constant_columns(constant[self.r :], "z", self.z_names, stacklevel=3)
        warn_constant_columns(constant[: self.r], "x", self.x_names, stacklevel=3)


def _prepare(y: Any, z: Any, x: Any, ties: str, seed: int | None, nan_policy: str) -> _Arguments:
    check_choice(ties, "ties", TIES)
    check_seed(seed)
    arrays: dict[str, Any] = {"y": as_response(y), "z": as_features(z, "z")}
    if x is not None:
        arrays["x"] = as_features(x, "x")
    clean = clean_rows(arrays, nan_policy)
    names = {name: arrays[name].names for name in arrays if name != "y"}
    if x is None:
        return _Arguments(clean["y"], clean["z"], 0, None, names["z"])
    # conditioning columns first: the order of sums
    table = array_module(clean["z"]).concatenate([clean["x"], clean["z"]], axis=1)
    return _Arguments(clean["y"], table, clean["x"].shape[1], names["x"], names["z"])


def _coefficient(columns: Columns, r: int, y: Any, ties: str, seed: int | None) -> float:
    """T(Y, Z | X) of clean columns: r of x, possibly none, then those of z."""
    p = len(columns.low)
    factors = np.ones(p, dtype=columns.low.dtype)
    with np.errstate(over="ignore"):
        bounds = np.add.accumulate(squared_spans(columns, factors))
    labels = [f"column {k} of x" for k in range(r)] + [f"column {k} of z" for k in range(p - r)]
    check_overflow(bounds, labels.__getitem__)
    warn_underflow(columns, factors, labels.__getitem__, stacklevel=3)
    R, L = ranks(y)
    sums = _exact.ResponseSums(R, L)
    engine = make_engine(columns, factors, R, ties, seed)
    m_x = m_w = Fraction(0)
    for column in range(p):
        if column == r - 1:
            m_x = _exact.total(*engine.row_sums(column))
        if column == p - 1:
            m_w = _exact.total(*engine.row_sums(column))
        else:
            engine.select(column)
    value = sums.conditional(m_w, m_x) if r else sums.unconditional(m_w)
    if value is None:
        reason = "a function of x on this sample" if r and not sums.constant else "constant"
        warnings.warn(f"y is {reason}: the coefficient is 1 by convention", stacklevel=3)
        return 1.0
    return float(value)
