"""Ranks of the response: the only thing the coefficients know of y."""

from typing import Any

import numpy as np

from lcodec_ext._arrays import is_tensor


def ranks(y: Any) -> tuple[Any, Any]:
    """Max ranks of a response, from below and from above.

    Parameters
    ----------
    y : ndarray or CUDA tensor of shape (n,)
        Finite numbers of any real dtype; compared as they are, never converted.

    Returns
    -------
    R, L : ndarray or CUDA tensor of int64, shape (n,)
        ``R[i] = #{j : y[j] <= y[i]}`` and ``L[i] = #{j : y[j] >= y[i]}``. Tied values share a
        rank; an ordinal rank from ``argsort`` would jitter them (0.626 for 0.960 on three
        classes). O(n log n).
    """
    if is_tensor(y):
        from lcodec_ext.dependence.backends import cuda as _cuda

        return _cuda.ranks(y)
    n = len(y)
    order = np.argsort(y, kind="stable")
    ascending = y[order]
    first = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    end = np.append(first[1:], n)
    below = np.empty(n, dtype=np.int64)
    above = np.empty(n, dtype=np.int64)
    below[order] = np.repeat(end, end - first)
    above[order] = np.repeat(n - first, end - first)
    return below, above
