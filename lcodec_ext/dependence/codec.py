"""The conditional dependence coefficient: CODEC and its randomized form, L-CODEC."""

from typing import Any, Literal, NamedTuple

from lcodec_ext._arrays import array_module, class_codes
from lcodec_ext._callers import warn
from lcodec_ext._checks import check_choice, check_seed
from lcodec_ext._random import tie_seed
from lcodec_ext.dependence.backends.base import TIES, Backend, Columns, Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.classes import response_engine
from lcodec_ext.dependence.k_nearest import check_neighbors
from lcodec_ext.dependence.noise import NoiseScale, check_noise, with_noise
from lcodec_ext.dependence.scaling import check_distances, constant_columns
from lcodec_ext.dependence.table import (
    Y_ORDERS,
    Features,
    Target,
    as_features,
    as_target,
    check_classes,
    clean_rows,
    refuse_classes,
)


def codec(
    y: Any,
    z: Any,
    x: Any = None,
    *,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
    decimals: int | None = None,
    n_neighbors: int = 1,
    y_order: Literal["given", "average"] = "given",
) -> float:
    """Conditional dependence coefficient T(Y, Z) or T(Y, Z | X).

    In the limit of many rows 0 if and only if Y is independent of Z (given X), and 1 if and
    only if Y is a function of Z (given X). On a finite sample it can be negative.
    ``docs/dependence.md`` has the formulas, what ties do, and how to read values.

    Parameters
    ----------
    y : array_like of shape (n,) or (n, q)
        Response, 3 <= n <= 10^6. Only its order counts. Strings and categories are classes
        without an order: the result is the mean over the classes c of ``codec(y == c, z, x)``.
        Several columns of numbers are one response together, T^q. Those before a column are
        conditioned on, so they enter distances, in the units of x and z.
        Rows of all arguments belong together by position, also in pandas objects.
    z : array_like of shape (n,) or (n, q)
        Columns whose information about y is measured. Not standardised: distances mix their
        units. float32, float16 and bfloat16 are computed in float32, everything else in float64.
    x : array_like of shape (n,) or (n, r), optional
        Columns to condition on.
    ties : {"average", "random", "first"}, default "average"
        Among equally near rows take the mean over them (deterministic), one drawn by the seed,
        or the lowest.
    seed : int, optional
        In [0, 2^64), for ties="random". None draws a fresh one.
    nan_policy : {"raise", "omit"}, default "raise"
        "omit" leaves out rows that have a NaN anywhere, with a warning if they are more than half.
    backend : {"auto", "cpu", "cuda", "reference"}, default "auto"
        "auto" runs where the data lie: CUDA tensors on their device, everything else on the CPU.
        "cuda" takes CUDA tensors only. Nothing is copied to another device, and all backends
        return the same bits.
    decimals : int, optional
        How many decimals z and x have, 0 to 15. They are then computed as integers, so that
        equal distances are equal: 0.3 - 0.2 and 0.2 - 0.1 differ as floats, and ties of decimal
        data depend on their unit. Values with more decimals are an error. Columns of y that
        enter distances have them, too.
    n_neighbors : int, default 1
        How many of a row's nearest rows count. The default is the coefficient as published.
        More vary less under independence, which finds weak dependence, and see less detail.
        Equally near rows at the last place share what is left of it; needs ties="average".
    y_order : {"given", "average"}, default "given"
        Of several columns of y: their order, as in T^q, or the mean over all orders of at most 5
        columns, in which none of them comes first. T^q tends to 0 and 1 for either.

    Returns
    -------
    float
        The coefficient, computed as an exact rational from the computed distances, and rounded
        once. 1.0, with a warning,
        where its denominator is 0: y is constant, or a function of x on this sample.

    Raises
    ------
    ValueError
        For data that cannot be used: NaN, infinity, not numbers, wrong shapes, fewer than 3
        rows, distances that overflow, as many neighbours as rows. The message names argument,
        row and column.
    TypeError
        For a seed or a number of neighbours that is not an integer.
    RuntimeError
        If CUDA tensors are given and this build or machine cannot compute on them.
    torch.OutOfMemoryError
        If their device has too little memory for the computation.

    Notes
    -----
    With d columns in all about O(n^(1 + 1/d)) time on continuous data, O(n log n) where many rows
    share their values, O(d n^2) at worst; O(d n) memory. q columns of y take q of these, and
    q 2^(q - 1) with y_order="average". k neighbours take k times as long; on CUDA they take
    O(d n^2).

    References
    ----------
    M. Azadkia and S. Chatterjee, "A simple measure of conditional dependence", Annals of
    Statistics 49 (2021), section 2. For several columns J. Ansari and S. Fuchs, "A direct
    extension of Azadkia & Chatterjee's rank correlation to multi-response vectors",
    arXiv:2212.01621.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x, z = rng.random((2, 1000))
    >>> y = (x + z) % 1
    >>> codec(y, z) < 0.1 < 0.6 < codec(y, z, x)
    True
    >>> both = np.column_stack([x + z, x - z])
    >>> codec(both, x) < 0.7 < 0.8 < codec(both, np.column_stack([x, z]))
    True
    """
    chosen = resolve(backend, y=y, z=z, x=x)
    check_neighbors(n_neighbors, ties)
    check_choice(y_order, "y_order", Y_ORDERS)
    given = _prepare(chosen, y, z, x, ties, seed, nan_policy, decimals, y_order)
    columns = given.lay_out(chosen)
    return _coefficient(chosen, columns, given.y, given, ties, seed, n_neighbors)


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
    backend: BackendLike = "auto",
) -> float:
    """L-CODEC: `codec` of the arguments with a little Gaussian noise added to each.

    The noise removes ties, which makes discrete variables as cheap as continuous ones.
    ``docs/dependence.md`` says what it does to the value.

    Parameters
    ----------
    y, z, x, ties, nan_policy, backend
        As in `codec`; the computation is in float64. y holds numbers.
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
        T(Y~, Z~ | X~) of the noisy variables. For a binary y that is a function of z it is near
        1/2, where `codec` gives 1. For a constant y it is near 0, and a warning says so.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `codec`, and for noise that is negative or not finite.

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
    given = _prepare(chosen, y, z, x, ties, seed, nan_policy)
    refuse_classes(given.target.nominal, "lcodec", "codec")
    columns = given.lay_out(chosen)
    if noise > 0 and (given.y == given.y[0]).all():
        warn("y is constant: the value measures the added noise alone")
    response, table = with_noise(chosen, given.y, given.table, columns, noise, noise_scale, seed)
    return _coefficient(chosen, chosen.lay_out(table), response, given, ties, seed)


class _Arguments(NamedTuple):
    """Clean response; the columns of x (r of them, or none), of z and some of y side by side."""

    y: Any
    table: Any
    x: Features | None
    z: Features
    target: Target

    @property
    def r(self) -> int:
        return 0 if self.x is None else self.x.values.shape[1]

    @property
    def p(self) -> int:
        """How many columns x and z have."""
        return self.r + self.z.values.shape[1]

    def label(self, k: int) -> str:
        """A column of the table in a message."""
        if k >= self.p:
            return self.target.values.label(k - self.p)
        return self.x.label(k) if self.x and k < self.r else self.z.label(k - self.r)

    def lay_out(self, backend: Backend) -> Columns:
        """The table's columns; warns the caller of codec or lcodec of constant ones."""
        columns = backend.lay_out(self.table)
        constant = constant_columns(columns)
        self.z.warn_constant(constant[self.r : self.p])
        if self.x is not None:
            self.x.warn_constant(constant[: self.r])
        self.target.warn_constant(self.y)
        return columns


def _prepare(
    backend: Backend,
    y: Any,
    z: Any,
    x: Any,
    ties: str,
    seed: int | None,
    nan_policy: str,
    decimals: int | None = None,
    y_order: str | None = None,
) -> _Arguments:
    check_choice(ties, "ties", TIES)
    check_seed(seed)
    tensors = backend.tensors
    target = as_target(y, tensors=tensors, y_order=y_order, decimals=decimals)
    features = as_features(z, "z", tensors=tensors, decimals=decimals)
    if x is None:
        rows = clean_rows({"y": target.values, "z": features}, nan_policy)
        rows.warn_if_most()
        check_classes(rows.values["y"], target.nominal)
        table = target.beside(rows.values["z"], rows.values["y"])
        return _Arguments(rows.values["y"], table, None, features, target)
    if class_codes(x) is not None:
        raise ValueError(
            "x holds categories or strings; expected numbers: pass its codes, x.cat.codes, or a "
            "column of 0 and 1 for each category, pandas.get_dummies(x): rows of equal x are then "
            "strata"
        )
    given = as_features(x, "x", tensors=tensors, decimals=decimals)
    rows = clean_rows({"y": target.values, "z": features, "x": given}, nan_policy)
    rows.warn_if_most()
    check_classes(rows.values["y"], target.nominal)
    clean = rows.values
    # conditioning columns first: the order of sums
    table = array_module(clean["z"]).concatenate([clean["x"], clean["z"]], axis=1)
    return _Arguments(clean["y"], target.beside(table, clean["y"]), given, features, target)


def _coefficient(
    backend: Backend,
    columns: Columns,
    y: Any,
    given: _Arguments,
    ties: Ties,
    seed: int | None,
    n_neighbors: int = 1,
) -> float:
    """T(Y, Z | X) of columns laid out from the given ones, or from these with noise."""
    factors = check_distances(columns, given.label, len(given.table))
    target = given.target
    sums, engine = response_engine(
        backend, columns, factors, y, target.nominal, ties, tie_seed(ties, seed), n_neighbors,
        target.average,
    )  # fmt: skip
    r, last = given.r, given.p - 1
    m_x: Any = None
    for column in range(last):
        if column == r - 1:
            m_x = engine.exact_sum(column)
        engine.select(column)
    m_w: Any = engine.exact_sum(last)
    value = None
    if not sums.constant:
        value = sums.conditional(m_w, m_x) if r else sums.unconditional(m_w)
    if value is None:
        reason = "constant" if sums.constant else "a function of x on this sample"
        warn(f"y is {reason}: the coefficient is 1 by convention")
        return 1.0
    return float(value)
