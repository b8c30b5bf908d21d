"""xi of all pairs of columns of a table, with p-values that are adjusted for their number."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import check_choice
from lcodec_ext.dependence.backends.base import Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve_on_cpu
from lcodec_ext.dependence.permutation import check_permutations
from lcodec_ext.dependence.table import as_features
from lcodec_ext.dependence.xi import METHODS, pairs_of, seed_of_test, tested

_SHOWN = 10  # pairs that are printed


@dataclass(frozen=True, eq=False)
class XiMatrix:
    """xi of every column on every other one. Prints the pairs with the largest xi.

    Row i, column j of each matrix is about column j as the response y and column i as x: whether j
    is a function of i. None of them is symmetric.

    Attributes
    ----------
    statistic : ndarray of float64, shape (p, p)
        xi. On the diagonal it is that of a column on itself, the most that its ties allow.
    pvalue : ndarray of float64, shape (p, p)
        Of independence, one-sided; nan on the diagonal, and for a constant response.
    adjusted : ndarray of float64, shape (p, p)
        The p-values, adjusted for the number of pairs; nan where they are.
    names : list of str or None
        Column names of X.
    n : int
        How many rows were used.
    adjust : {"bh", "by", None}
        As it was asked for; with None `adjusted` has the p-values as they are.
    seed : int or None
        What permutations and random ties were drawn from; None where none were.
    """

    statistic: NDArray[np.float64]
    pvalue: NDArray[np.float64]
    adjusted: NDArray[np.float64]
    names: list[str] | None
    n: int
    adjust: Literal["bh", "by"] | None = "bh"
    seed: int | None = None

    def plot(self, ax: Any = None) -> Any:
        """Draw a heat map of xi, y across and x down.

        Of up to 15 columns the values are written, if there is room, with a star where the adjusted
        p-value is 0.05 at most; the p-value itself with adjust=None.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            What to draw on; a new figure by default.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        from lcodec_ext.dependence.plots import plot_matrix

        return plot_matrix(self, ax)

    def __repr__(self) -> str:
        p = len(self.statistic)
        tested = int(np.isfinite(self.pvalue).sum())
        lines = [f"XiMatrix: {tested:,} pairs of {p:,} columns, on {self.n:,} rows"]
        order = np.argsort(-np.where(np.isfinite(self.pvalue), self.statistic, -np.inf), axis=None)
        for k in order[: min(_SHOWN, tested)].tolist():
            i, j = divmod(k, p)
            lines.append(
                f"  {self._label(j)} on {self._label(i)}: xi = {self.statistic[i, j]:.4f}, "
                f"p = {self.pvalue[i, j]:.2g}"
                + (f", adjusted {self.adjusted[i, j]:.2g}" if self.adjust else ", not adjusted")
            )
        if tested > _SHOWN:
            lines.append(f"  ... and {tested - _SHOWN:,} more pairs")
        return "\n".join(lines)

    def _label(self, column: int) -> str:
        return f"column {column}" if self.names is None else repr(self.names[column])


def xi_matrix(
    X: Any,
    *,
    adjust: Literal["bh", "by"] | None = "bh",
    method: Literal["asymptotic", "permutation"] = "asymptotic",
    n_permutations: int | None = None,
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
) -> XiMatrix:
    """Chatterjee's xi of every column of a table on every other one, and its test.

    Parameters
    ----------
    X : array_like of shape (n, p)
        At least two columns, 3 <= n <= 10^6. The names of a data frame are kept.
    adjust : {"bh", "by", None}
        How p-values are adjusted for their number. "bh" (default): Benjamini and Hochberg (1995);
        among the pairs below alpha, a share of at most alpha is expected to be independent, where
        the tests are independent or positively dependent. "by": Benjamini and Yekutieli (2001),
        for tests of any dependence; larger by a factor of about log(p^2). None: not at all.
    method, n_permutations, ties, seed, backend
        As in :func:`xi_test`. With permutations no p-value is below 1 / (1 + n_permutations), and
        none that is adjusted below some p^2 times as much, unless many are: take more of them.
    nan_policy : {"raise", "omit"}
        "omit" leaves out rows with a NaN in any column, with a warning if they are more than half.

    Returns
    -------
    XiMatrix
        With a warning, nan where a constant column is the response.

    Raises
    ------
    ValueError, TypeError
        As :func:`xi_test`, and for fewer than two columns.

    Notes
    -----
    O(p n log n + p^2 n) time, O(p n) memory; threads share the pairs. Every permutation takes
    O(p^2 n) more. Threads share the permutations, which are drawn once for each y: 40 columns of
    500 rows take 1 s with 999 of them on one thread, and up to 10 s where many values are equal.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import xi_matrix
    >>> a, b = np.random.default_rng(0).normal(size=(2, 200))
    >>> result = xi_matrix(np.column_stack([a, a**2, b]))
    >>> (result.adjusted < 0.01).tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    check_choice(adjust, "adjust", ("bh", "by", None))
    check_choice(method, "method", METHODS)
    count = check_permutations(method, n_permutations)
    chosen = resolve_on_cpu("xi_matrix", backend, X=X)
    features = as_features(X, "X", allow_1d=False, tensors=False)
    if features.values.shape[1] < 2:
        raise ValueError("X must have at least two columns; got 1: xi_test tests a single pair")
    drawn = seed_of_test(seed, bool(count), ties)
    pairs = pairs_of(chosen, features, features, ties, drawn, nan_policy)
    pairs.warn_constant()
    test = tested(chosen, pairs, False, method, count, ties, drawn, False)
    pvalue = test.pvalue
    np.fill_diagonal(pvalue, np.nan)
    adjusted = pvalue.copy()
    defined = np.isfinite(pvalue)
    if adjust is not None:
        adjusted[defined] = adjusted_pvalues(pvalue[defined], adjust)
    return XiMatrix(test.statistic, pvalue, adjusted, features.names, test.n, adjust, drawn)


def adjusted_pvalues(
    pvalues: NDArray[np.float64], adjust: Literal["bh", "by"] = "bh"
) -> NDArray[np.float64]:
    """The least q for which the procedure of level q rejects: ``scipy.stats`` has the same."""
    m = len(pvalues)
    order = np.argsort(-pvalues, kind="stable")  # from the largest one down
    places = np.arange(m, 0, -1)
    factor = m if adjust == "bh" else m * (1 / np.arange(1, m + 1)).sum()
    adjusted = np.empty(m)
    adjusted[order] = np.minimum.accumulate(np.minimum(pvalues[order] * (factor / places), 1))
    return adjusted
