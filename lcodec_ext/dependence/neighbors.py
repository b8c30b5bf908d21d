"""Exact nearest neighbours with stated tie rules."""

from typing import Any, Literal, overload

from lcodec_ext._checks import check_choice, check_seed
from lcodec_ext._random import tie_seed
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.scaling import check_distances
from lcodec_ext.dependence.table import as_features, clean_rows


@overload
def nearest_neighbors(
    X: Any,
    *,
    ties: Literal["first", "random"] = "first",
    seed: int | None = None,
    backend: BackendLike = "auto",
    decimals: int | None = None,
) -> Any: ...
@overload
def nearest_neighbors(
    X: Any,
    *,
    ties: Literal["all"],
    seed: int | None = None,
    backend: BackendLike = "auto",
    decimals: int | None = None,
) -> tuple[Any, Any]: ...
def nearest_neighbors(
    X: Any,
    *,
    ties: Literal["first", "random", "all"] = "first",
    seed: int | None = None,
    backend: BackendLike = "auto",
    decimals: int | None = None,
) -> Any:
    """Nearest other row of every row, by computed squared Euclidean distance.

    A row is never its own neighbour, even if it has duplicates. Distances are sums of squared
    differences in column order; ``docs/dependence.md`` says why.

    Parameters
    ----------
    X : array_like of shape (n,) or (n, d)
        At least 2 rows. float32, float16 and bfloat16 are computed in float32, everything else
        in float64.
    ties : {"first", "random", "all"}, default "first"
        Among equally near rows take the lowest, one drawn at random, or all of them.
    seed : int, optional
        In [0, 2^64), for ties="random". None draws a fresh one.
    backend : {"auto", "cpu", "cuda", "reference"}, default "auto"
        As in `codec`. All backends return the same indices.
    decimals : int, optional
        How many decimals X has, as in `codec`.

    Returns
    -------
    indices : ndarray of int64, shape (n,)
        For "first" and "random". A CUDA tensor for a CUDA tensor.
    (indptr, indices) : tuple of ndarray of int64
        For "all": the neighbours of row i are ``indices[indptr[i]:indptr[i + 1]]``, in
        increasing order. CUDA tensors for a CUDA tensor.

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `codec`.

    Notes
    -----
    On the CPU a k-d tree up to 12 columns, about O(n log n) in few of them; O(n^2 d) time with
    more, and on CUDA. O(n d) memory on top of the result. In more than 12 columns a float32 matrix
    product leaves out, with proof, rows that cannot be nearest; distances decide among the rest.

    Examples
    --------
    >>> nearest_neighbors([0.0, 1.0, 3.0, 3.0])
    array([1, 0, 3, 2])
    """
    chosen = resolve(backend, X=X)
    check_choice(ties, "ties", ("first", "random", "all"))
    check_seed(seed)
    features = as_features(X, "X", tensors=chosen.tensors, decimals=decimals)
    columns = chosen.lay_out(clean_rows({"X": features}, None, minimum=2).values["X"])
    check_distances(columns, features.label)
    if ties == "all":
        return chosen.nearest(columns, "average", 0)
    return chosen.nearest(columns, ties, tie_seed(ties, seed))[1]
