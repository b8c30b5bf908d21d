"""The dependence functions as PyTorch operators, for `torch.compile` and the like; needs PyTorch.

Importing this module registers ``torch.ops.lcodec_ext.codec``, ``foci``, ``nearest_neighbors`` and
``score``; the functions here call them. They take CPU and CUDA tensors, all on one device, and
return new tensors there, of sizes that depend on shapes and options alone: `torch.compile` traces
them without a break of the graph. Values, errors and warnings are those of the functions of the
same names in `lcodec_ext`, and ``seed`` is in [0, 2^63). There are no gradients: results never
require one.

``score`` of a first step, with no column selected, waits for nothing on CUDA and can be captured in
a CUDA graph. Later steps and the other operators read from the device and cannot.
``docs/dependence.md`` has more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcodec_ext import dependence
from lcodec_ext._checks import check_choice, check_integer, check_seed
from lcodec_ext._torch.library import register
from lcodec_ext.dependence.backends.base import TIES, Backend
from lcodec_ext.dependence.backends.resolve import resolve
from lcodec_ext.dependence.table import MAX_ROWS

__all__ = ["codec", "foci", "nearest_neighbors", "score"]


def codec(
    y: Tensor, z: Tensor, x: Tensor | None = None, ties: str = "average", seed: int = 0
) -> Tensor:
    """T(Y, Z), or T(Y, Z | X): `lcodec_ext.codec` as an operator.

    Parameters
    ----------
    y, z, x : Tensor
        Of shapes (n,) or (n, 1), (n,) or (n, q), and (n,) or (n, r).
    ties : {"average", "random", "first"}
    seed : int
        For ties="random".

    Returns
    -------
    Tensor of float64, shape ()

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext import ops
    >>> x, z = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0))
    >>> bool(ops.codec((x + z) % 1, z) < 0.1 < 0.6 < ops.codec((x + z) % 1, z, x))
    True
    """
    return torch.ops.lcodec_ext.codec(y, z, x, ties, seed)


def foci(
    X: Tensor,
    y: Tensor,
    max_features: int,
    stop: bool = True,
    standardize: str | None = "scale",
    ties: str = "average",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Columns on which y depends: `lcodec_ext.foci` as an operator.

    Parameters
    ----------
    X, y : Tensor
        Of shapes (n, p) and (n,) or (n, 1).
    max_features : int
        The most columns to select, and the size of the results; it may exceed p.
    stop, standardize, ties, seed
        As in `lcodec_ext.foci`.

    Returns
    -------
    ordering : Tensor of int64, shape (max_features,)
        Selected columns, in the order of selection, then -1.
    cumulative : Tensor of float64, shape (max_features,)
        T(Y, X_S) after each step, then nan.
    count : Tensor of int64, shape ()
        How many columns are selected.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext import ops
    >>> X = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    >>> ordering, _, count = ops.foci(X, X[:, 1] * X[:, 4], max_features=4)
    >>> ordering[:count].sort().values, ordering[count:]
    (tensor([1, 4]), tensor([-1, -1]))
    """
    return torch.ops.lcodec_ext.foci(X, y, max_features, stop, standardize, ties, seed)


def nearest_neighbors(X: Tensor, ties: str = "first", seed: int = 0) -> Tensor:
    """Nearest other row of every row: `lcodec_ext.nearest_neighbors` as an operator.

    Parameters
    ----------
    X : Tensor of shape (n,) or (n, d)
    ties : {"first", "random"}
    seed : int
        For ties="random".

    Returns
    -------
    Tensor of int64, shape (n,)
    """
    return torch.ops.lcodec_ext.nearest_neighbors(X, ties, seed)


def score(
    X: Tensor,
    R: Tensor,
    selected: Sequence[int],
    factors: Tensor,
    ties: str = "average",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Score all columns in one step of FOCI, given those that are selected.

    A column's score is the sum over rows of m_i, the mean of min(R_i, R_j) over the nearest
    neighbours j of row i in the selected columns and this one; the largest wins the step. It is in
    fixed point: each row's whole part, and its remainder in units of 2^-43 rounded down, are
    added up separately.

    Parameters
    ----------
    X : Tensor of float32 or float64, shape (n, p)
        Finite; 3 <= n <= 10^6. On CUDA the values of all arguments are taken on trust, so that no
        check waits for the device.
    R : Tensor of int32 or int64, shape (n,)
        Max ranks of the response, #{j : y_j <= y_i}.
    selected : sequence of int
        Different columns, in the order in which distances add them up.
    factors : Tensor of shape (p,)
        Of the dtype of X; multiply the distances along each column. Squared distances must not
        overflow.
    ties : {"average", "random", "first"}
    seed : int
        For ties="random".

    Returns
    -------
    whole, fraction : Tensor of int64, shape (p,)
        -1 for selected columns.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext import ops
    >>> X = torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0], [4.0, 2.0]])
    >>> whole, fraction = ops.score(X, torch.tensor([1, 2, 3, 4]), [], torch.ones(2))
    >>> whole + fraction / 2**43
    tensor([8., 7.])
    """
    return torch.ops.lcodec_ext.score(X, R, selected, factors, ties, seed)


def _codec(y: Tensor, z: Tensor, x: Tensor | None, ties: Any, seed: int) -> Tensor:
    value = dependence.codec(y, z, x, ties=ties, seed=seed)
    return y.new_tensor(value, dtype=torch.float64)


def _fake_codec(y: Tensor, z: Tensor, x: Tensor | None, ties: str, seed: int) -> Tensor:
    return y.new_empty((), dtype=torch.float64)


def _foci(
    X: Tensor, y: Tensor, max_features: int, stop: bool, standardize: Any, ties: Any, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    options = {"stop": stop, "standardize": standardize, "ties": ties, "seed": seed}
    result = dependence.foci(X, y, max_features=max_features, **options)
    count = len(result.ordering)
    ordering = np.full(max_features, -1)
    ordering[:count] = result.ordering
    cumulative = np.full(max_features, np.nan)
    cumulative[:count] = result.cumulative
    return (
        torch.from_numpy(ordering).to(X.device),
        torch.from_numpy(cumulative).to(X.device),
        torch.tensor(count, device=X.device),
    )


def _fake_foci(
    X: Tensor, y: Tensor, max_features: int, stop: bool, standardize: Any, ties: Any, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_integer(max_features, "max_features", 1)
    return (
        X.new_empty(max_features, dtype=torch.int64),
        X.new_empty(max_features, dtype=torch.float64),
        X.new_empty((), dtype=torch.int64),
    )


def _nearest_neighbors(X: Tensor, ties: Any, seed: int) -> Tensor:
    check_choice(ties, "ties", ("first", "random"))
    return torch.as_tensor(dependence.nearest_neighbors(X, ties=ties, seed=seed))


def _fake_nearest_neighbors(X: Tensor, ties: str, seed: int) -> Tensor:
    return X.new_empty(X.shape[0], dtype=torch.int64)


def _score(
    X: Tensor, R: Tensor, selected: list[int], factors: Tensor, ties: Any, seed: int
) -> tuple[Tensor, Tensor]:
    _check_step(X, R, selected, factors, ties, seed)
    return _scored(resolve("auto", X=X), X, R, selected, factors, ties, seed)


def _scored(
    backend: Backend,
    X: Tensor,
    R: Tensor,
    selected: list[int],
    factors: Tensor,
    ties: Any,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """The step's scores by a backend; values are checked on the CPU only."""
    n = len(X)
    data: list[Any] = [tensor.detach().resolve_neg() for tensor in (X, R, factors)]
    if backend.tensors:
        data[1] = data[1].clamp(1, n)  # wrong ranks must not lead the kernels out of bounds
    else:
        for tensor, name in ((X, "X"), (factors, "factors")):
            if not tensor.isfinite().all():
                raise ValueError(f"{name} must be finite")
        if R.min() < 1 or R.max() > n:
            raise ValueError(f"R must hold max ranks, from 1 to {n}")
        data = [tensor.numpy() for tensor in data]
    table, ranks, scales = data
    engine = backend.engine(backend.lay_out(table), scales, ranks, ties, seed)
    for column in selected:
        engine.select(column)
    whole, fraction = (torch.as_tensor(sums) for sums in engine.score_all())
    return whole, torch.where(whole < 0, whole, fraction)


def _fake_score(
    X: Tensor, R: Tensor, selected: list[int], factors: Tensor, ties: Any, seed: int
) -> tuple[Tensor, Tensor]:
    _check_step(X, R, selected, factors, ties, seed)
    p = X.shape[1]
    return X.new_empty(p, dtype=torch.int64), X.new_empty(p, dtype=torch.int64)


def _check_step(
    X: Tensor, R: Tensor, selected: list[int], factors: Tensor, ties: object, seed: object
) -> None:
    """Refuse arguments of score whose shapes, dtypes, devices or options do not fit."""
    check_choice(ties, "ties", TIES)
    check_seed(seed, optional=False)
    if X.dtype not in (torch.float32, torch.float64) or X.ndim != 2 or X.shape[1] == 0:
        raise ValueError(f"X must be float32 or float64 of shape (n, p), p >= 1; got {_shown(X)}")
    n, p = X.shape
    if not 3 <= n <= MAX_ROWS:
        raise ValueError(f"X must have from 3 to {MAX_ROWS:,} rows; got {n}")
    if R.dtype not in (torch.int32, torch.int64) or R.shape != (n,):
        raise ValueError(f"R must be int32 or int64 of shape ({n},); got {_shown(R)}")
    if factors.dtype != X.dtype or factors.shape != (p,):
        raise ValueError(f"factors must be {X.dtype} of shape ({p},); got {_shown(factors)}")
    for tensor, name in ((R, "R"), (factors, "factors")):
        if tensor.device != X.device:
            raise ValueError(
                f"all arguments must be on one device; X is on '{X.device}', {name} is on "
                f"'{tensor.device}'"
            )
    for column in selected:
        check_integer(column, "selected column", 0, p - 1)
    if len(set(selected)) < len(selected):
        raise ValueError(f"selected columns must differ; got {list(selected)}")


def _shown(tensor: Tensor) -> str:
    return f"a tensor of {tensor.dtype}, shape {tuple(tensor.shape)}"


for _schema, _kernel, _fake in (
    ("codec(Tensor y, Tensor z, Tensor? x, str ties, int seed) -> Tensor", _codec, _fake_codec),
    (
        "foci(Tensor X, Tensor y, int max_features, bool stop, str? standardize, str ties,"
        " int seed) -> (Tensor ordering, Tensor cumulative, Tensor count)",
        _foci,
        _fake_foci,
    ),
    (
        "nearest_neighbors(Tensor X, str ties, int seed) -> Tensor",
        _nearest_neighbors,
        _fake_nearest_neighbors,
    ),
    (
        "score(Tensor X, Tensor R, int[] selected, Tensor factors, str ties, int seed)"
        " -> (Tensor whole, Tensor fraction)",
        _score,
        _fake_score,
    ),
):
    register(_schema, _kernel, _fake)
