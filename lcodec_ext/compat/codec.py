"""Drop-in for the ``codec`` package of the repository vsingh-group/LCODEC-deep-unlearning.

Names, argument orders, return types and the rules of selection are those of that package. The
values are those of :mod:`lcodec_ext`; ``docs/compat.md`` lists where and why they differ. `n_jobs`
is accepted and has no effect: the environment variable ``LCODEC_NUM_THREADS`` sets the threads.

Everywhere, X and Z are array_like or tensors of shape (n, q), or (n,) for Z and the conditioning X;
Y has shape (n,) or (n, 1), and 3 <= n <= 10^6. Nearest neighbours that tie are averaged over. Bad
input raises ValueError, as in the functions of :mod:`lcodec_ext`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import lcodec_ext
from lcodec_ext.dependence.table import as_features, as_response

if TYPE_CHECKING:
    import torch

__all__ = [
    "OneNN_Scikit",
    "OneNN_Torch",
    "chattCorr",
    "cheap_foci",
    "cheap_torch_foci",
    "codec2",
    "codec3",
    "createFOCIGraph",
    "foci",
    "torch_codec2",
    "torch_codec3",
    "torch_foci",
]


def _like(value: Any, given: Any) -> "torch.Tensor":
    """A tensor of value, on the device of what the user gave."""
    import torch

    return torch.as_tensor(value, device=given.device if torch.is_tensor(given) else None)


def _scalars(values: list[float], given: Any) -> list["torch.Tensor"]:
    """0-d float64 tensors: float32 would lose what the exact sums kept."""
    return list(_like(np.array(values, dtype=np.float64), given))


def _one(values: Any, name: str = "Y") -> Any:
    """The values, unless they are several columns, which `codec` and `xi` take in another way."""
    if len(getattr(values, "shape", ())) > 1:
        as_response(values, name)
    return values


def codec2(Z: Any, Y: Any, n_jobs: Any = None) -> float:
    """T(Y, Z), the dependence of Y on Z: ``lcodec_ext.codec(Y, Z)``.

    1.0 with a warning where it is undefined (Y constant).
    """
    return lcodec_ext.codec(_one(Y), Z)


def codec3(Z: Any, Y: Any, X: Any, n_jobs: Any = None) -> float:
    """T(Y, Z | X), the dependence of Y on Z given X: ``lcodec_ext.codec(Y, Z, X)``.

    1.0 with a warning where it is undefined (Y a function of X in the sample).
    """
    return lcodec_ext.codec(_one(Y), Z, X)


def torch_codec2(Z: Any, Y: Any) -> "torch.Tensor":
    """:func:`codec2` as a 0-d float64 tensor on the device of Z, without a gradient."""
    return _scalars([codec2(Z, Y)], Z)[0]


def torch_codec3(Z: Any, Y: Any, X: Any) -> "torch.Tensor":
    """:func:`codec3` as a 0-d float64 tensor on the device of Z, without a gradient."""
    return _scalars([codec3(Z, Y, X)], Z)[0]


def foci(
    X: Any, Y: Any, earlyStop: bool = True, verbose: bool = False, n_jobs: Any = None
) -> tuple[list[int], list[float]]:
    """Order the columns of X by what they add to the dependence of Y, without standardising them.

    The best single column comes first, even if its T is negative. Then columns are added while the
    best conditional T is positive.

    Parameters
    ----------
    X : array_like of shape (n, p)
    Y : array_like of shape (n,) or (n, 1)
    earlyStop : bool
        If False, all p columns are ordered.
    verbose : bool
        Print a line for each selected column.
    n_jobs : object
        Ignored.

    Returns
    -------
    ordering : list of int
        Column indices in the order of selection.
    codecVals : list of float
        T(Y, Z) of the first column, T(Y, Z | those before) of every later one. Both lists are
        empty, with a warning, for a constant Y.

    Notes
    -----
    But for the first column, this is ``lcodec_ext.foci`` with ``standardize=None``, at its cost.
    """
    ordering, values = cheap_foci(X, Y)
    if ordering:
        rest = lcodec_ext.foci(X, Y, stop=bool(earlyStop), preselected=ordering, standardize=None)
        ordering += rest.ordering.tolist()
        values += rest.conditional.tolist()
    if verbose:
        for step, (column, T) in enumerate(zip(ordering, values, strict=True), 1):
            print(f"step {step}: column {column}, T = {T:.6g}", flush=True)
    return ordering, values


def cheap_foci(X: Any, Y: Any, n_jobs: Any = None) -> tuple[list[int], list[float]]:
    """Find the column that Y depends on most; it and its T(Y, Z) as lists of length 1.

    Both lists are empty, with a warning, for a constant Y.
    """
    result = lcodec_ext.foci(X, _one(Y), stop=False, max_features=1, standardize=None)
    return result.ordering.tolist(), result.cumulative.tolist()


def torch_foci(
    X: Any, Y: Any, earlyStop: bool = True, verbose: bool = False
) -> tuple[list[int], list["torch.Tensor"]]:
    """:func:`foci` with its values as 0-d float64 tensors on the device of X."""
    ordering, values = foci(X, Y, earlyStop, verbose)
    return ordering, _scalars(values, X)


def cheap_torch_foci(X: Any, Y: Any, n_jobs: Any = None) -> tuple[list[int], list["torch.Tensor"]]:
    """:func:`cheap_foci` with its value as a 0-d float64 tensor on the device of X."""
    ordering, values = cheap_foci(X, Y)
    return ordering, _scalars(values, X)


def createFOCIGraph(X: Any) -> NDArray[np.float64]:
    """Which columns make up the Markov blanket of each column, by FOCI.

    Parameters
    ----------
    X : array_like of shape (n, p)

    Returns
    -------
    graph : ndarray of float64, shape (p, p)
        Ones on the diagonal; in row i the value of :func:`foci` for each column selected for
        column i, where it is positive, and 0 elsewhere. Not symmetric.
    """
    columns = as_features(X, "X", allow_1d=False).values
    p = columns.shape[1]
    graph = np.eye(p)
    for i in range(p) if p > 1 else ():
        others = np.delete(np.arange(p), i)
        ordering, values = foci(columns[:, others], columns[:, i])
        graph[i, others[ordering]] = np.maximum(values, 0.0)
    return graph


def chattCorr(Z: Any, Y: Any) -> float:
    """Chatterjee's coefficient of Y on the single column Z: ``lcodec_ext.xi(Z, Y)``."""
    return lcodec_ext.xi(_one(Z, "Z"), _one(Y))


def OneNN_Scikit(X: Any, p: int = 2) -> Any:
    """Index of the nearest other row, the lowest of those that tie.

    Parameters
    ----------
    X : array_like of shape (n, q)
    p : int
        Order of the norm; must be 2, the Euclidean.

    Returns
    -------
    ndarray of int64, shape (n,)
        A CUDA tensor for a CUDA tensor.
    """
    if p != 2:
        raise ValueError(f"p must be 2: CODEC is defined with the Euclidean norm; got {p!r}")
    return lcodec_ext.nearest_neighbors(X, ties="first")


def OneNN_Torch(X: Any, p: int = 2) -> "torch.Tensor":
    """:func:`OneNN_Scikit` as an int64 tensor on the device of X."""
    return _like(OneNN_Scikit(X, p), X)
