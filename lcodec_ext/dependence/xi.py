"""Chatterjee's coefficient xi and its asymptotic test of independence."""

import math
import warnings
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lcodec_ext._checks import check_bool, check_choice, check_seed
from lcodec_ext._random import tie_seed
from lcodec_ext.dependence.backends.base import TIES, HostBackend, Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve_on_cpu
from lcodec_ext.dependence.exact import ResponseSums
from lcodec_ext.dependence.table import as_response, clean_rows


class XiTestResult(NamedTuple):
    """The result of :func:`xi_test`.

    Attributes
    ----------
    statistic : float
        The coefficient xi.
    pvalue : float
        One-sided asymptotic p-value of independence; large xi speak against it.
    sd : float
        Standard deviation of xi under independence, on which the p-value rests.
    """

    statistic: float
    pvalue: float
    sd: float


def _compute(
    backend: HostBackend, x: ArrayLike, y: ArrayLike, ties: Ties, seed: int | None, nan_policy: str
) -> tuple[float, int, NDArray[np.int64]]:
    """xi, the sum of L (n - L) below it, and the max ranks of y."""
    check_choice(ties, "ties", TIES)
    check_seed(seed)
    rows = clean_rows({"x": as_response(x, "x"), "y": as_response(y, "y")}, nan_policy)
    rows.warn_if_most(stacklevel=3)
    columns = rows.values
    R, L = backend.ranks(columns["y"])
    sums = ResponseSums(R, L)
    if sums.constant:
        warnings.warn("y is constant, so xi is undefined: returning nan", stacklevel=3)
        return math.nan, 0, R
    length = backend.path_length(columns["x"], R, ties, tie_seed(ties, seed))
    value = 1 - Fraction(sums.n, 2 * sums.denominator) * length
    return float(value), sums.denominator, R


def xi(
    x: ArrayLike,
    y: ArrayLike,
    *,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
) -> float:
    """Chatterjee's coefficient xi of y on x.

    With the rows in increasing order of x, R_i the number of y_j <= y_i and L_i the number of
    y_j >= y_i,

        xi = 1 - n sum |R_{i+1} - R_i| / (2 sum L_i (n - L_i)).

    It converges to 0 when y is independent of x and to 1 when y is a function of x; it is not
    symmetric. ``docs/dependence.md`` says how to read values.

    Parameters
    ----------
    x, y : array_like of shape (n,) or (n, 1)
        Real numbers of any dtype, 3 <= n <= 10^6. Only their order counts.
    ties : {"average", "random", "first"}
        How rows with equal x are ordered. "average" (default): the exact expectation over all
        their orders. "random": one order, drawn by `seed`, as in R's XICOR. "first": in the order
        of the rows.
    seed : int in [0, 2**64) or None
        For ``ties="random"``; None (default) draws a fresh one.
    nan_policy : {"raise", "omit"}
        "omit" leaves out rows with a NaN, with a warning if they are more than half.
    backend : {"auto", "cpu", "reference"}
        All give the same bits. "auto" and "cpu" run vectorised NumPy; "reference" is O(n^2). Data
        are on the CPU.

    Returns
    -------
    float
        xi, correctly rounded from its exact rational value; nan, with a warning, for a
        constant y.

    Raises
    ------
    ValueError
        For NaN (unless omitted), infinity, fewer than 3 rows, lengths that differ, more than
        one column, or an unknown option.

    Notes
    -----
    O(n log n). S. Chatterjee, "A new coefficient of correlation", JASA 116 (2021), 2009-2022,
    section 1.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import xi
    >>> x = np.arange(-10, 11)
    >>> round(xi(x, x**2), 4), round(xi(x**2, x), 4)
    (0.7273, -0.125)
    """
    chosen = resolve_on_cpu("xi", backend, x=x, y=y)
    return _compute(chosen, x, y, ties, seed, nan_policy)[0]


def xi_test(
    x: ArrayLike,
    y: ArrayLike,
    *,
    y_continuous: bool = False,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
) -> XiTestResult:
    """Test independence of x and y with Chatterjee's xi.

    Under independence sqrt(n) xi tends to a normal distribution with mean 0. The p-value is
    one-sided, P(Z >= xi / sd), since dependence makes xi large.

    Parameters
    ----------
    x, y, ties, seed, nan_policy, backend
        As in :func:`xi`. With tied x the sd is that of ``ties="random"``; "average" varies less,
        so its p-values are too large rather than too small.
    y_continuous : bool
        If True, sd = sqrt(2 / (5 n)), the limit for a continuous y (Theorem 2.1). If False
        (default), sd is estimated from the ranks of y (Theorem 2.2), which is right for a
        continuous and for a tied y.

    Returns
    -------
    XiTestResult
        ``(statistic, pvalue, sd)``. For a constant y, with a warning, statistic and p-value
        are nan, and so is an estimated sd.

    Raises
    ------
    ValueError, TypeError
        As :func:`xi`, and for a `y_continuous` that is not a bool.

    Notes
    -----
    O(n log n). The normal limit serves from n of about 20 on (Chatterjee 2021); with fewer rows
    use a permutation test. The variance is exact until its one division and square root.
    """
    check_bool(y_continuous, "y_continuous")
    chosen = resolve_on_cpu("xi_test", backend, x=x, y=y)
    value, denominator, R = _compute(chosen, x, y, ties, seed, nan_policy)
    n = len(R)
    if y_continuous:
        sd = math.sqrt(2 / (5 * n))
    elif denominator == 0:
        sd = math.nan
    else:
        sd = math.sqrt(Fraction(chosen.null_variance(R), n * denominator**2))
    return XiTestResult(value, 0.5 * math.erfc(value / sd / math.sqrt(2)), sd)
