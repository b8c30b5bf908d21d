"""The graph of which columns FOCI selects for which."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_choice, check_seed, first_few
from lcodec_ext._progress import progress_bar
from lcodec_ext._random import fresh_seed
from lcodec_ext.dependence.backends.base import Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.foci import FociResult, foci
from lcodec_ext.dependence.scaling import (
    STANDARDIZE,
    Standardize,
    check_overflow,
    constant_columns,
    scale_factors,
    squared_spans,
)
from lcodec_ext.dependence.table import as_features, clean_rows

_SHOWN = 20  # columns that are printed


@dataclass(frozen=True, eq=False)
class DependenceGraph:
    """Which columns FOCI selects for which. Prints a line for each response column.

    Attributes
    ----------
    adjacency : ndarray of bool, shape (p, p)
        ``adjacency[i, j]``: column j was selected for the response column i. Not symmetric.
    weights : ndarray of float64, shape (p, p)
        The conditional T with which it was selected; 0 elsewhere.
    results : list of FociResult
        One for each column as the response; their indices are those of X.
    names : list of str or None
        Column names of X.
    seed : int or None
        What permutations and random ties of all responses were drawn from; None without any.
    """

    adjacency: NDArray[np.bool_]
    weights: NDArray[np.float64]
    results: list[FociResult]
    names: list[str] | None
    seed: int | None = None

    def plot(self, ax: Any = None) -> Any:
        """Draw the columns on a circle, and an arrow from each selected column to its response.

        Widths are weights. Of more than 60 columns those with most weight are drawn.

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
            Without matplotlib or networkx.
        """
        from lcodec_ext.dependence.plots import plot_graph

        return plot_graph(self, ax)

    def __repr__(self) -> str:
        p, n = len(self.results), self.results[0].n_samples
        lines = [
            f"DependenceGraph: {int(self.adjacency.sum()):,} of {p * (p - 1):,} dependences "
            f"between {p:,} columns, on {n:,} rows"
        ]
        for i, result in enumerate(self.results[:_SHOWN]):
            found = [
                f"{self._label(j)} ({T:.4f})"
                for j, T in zip(result.ordering, result.conditional, strict=True)
            ]
            lines.append(
                f"  {self._label(i)} depends on {first_few(found, 8) if found else 'none'}"
            )
        if p > _SHOWN:
            lines.append(f"  ... and {p - _SHOWN:,} more columns")
        return "\n".join(lines)

    def _label(self, column: int) -> str:
        return f"column {column}" if self.names is None else repr(self.names[column])


def dependence_graph(
    X: Any,
    *,
    stop: bool | Literal["permutation"] = True,
    max_features: int | None = None,
    min_gain: float = 0.0,
    standardize: Standardize | None = "scale",
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
    progress: bool = False,
    decimals: int | None = None,
    alpha: float | None = None,
    n_permutations: int | None = None,
) -> DependenceGraph:
    """Run `foci` with every column in turn as the response and the others as candidates.

    Parameters
    ----------
    X : array_like of shape (n, p)
        At least two columns.
    stop, max_features, min_gain, standardize, ties, seed, nan_policy, backend, progress, decimals,
    alpha, n_permutations
        As in `foci`. With nan_policy="omit" a row with a NaN in any column is left out for all. The
        level alpha is that of each step of each response: of p responses that depend on nothing,
        about alpha p have an arrow. Divide alpha by p where there should be none.

    Returns
    -------
    DependenceGraph

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `foci`.

    Notes
    -----
    p runs of `foci`.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.random.default_rng(0).normal(size=(2, 400))
    >>> graph = dependence_graph(np.column_stack([a, b, a * b]))
    >>> graph.adjacency[2].tolist()
    [True, True, False]
    """
    chosen = resolve(backend, X=X)
    check_bool(progress, "progress")
    check_seed(seed)
    if stop != "permutation" and ties != "random":
        seed = None  # nothing is drawn
    elif seed is None:
        seed = fresh_seed()
    check_choice(standardize, "standardize", STANDARDIZE)
    features = as_features(X, "X", allow_1d=False, tensors=chosen.tensors, decimals=decimals)
    p, names = features.values.shape[1], features.names
    if p < 2:
        raise ValueError(f"X must have at least two columns for a graph; got {p}")
    rows = clean_rows({"X": features}, nan_policy)
    values = rows.values["X"]
    columns = chosen.lay_out(values)
    features.warn_constant(constant_columns(columns))
    spans = squared_spans(columns, scale_factors(columns, standardize, features.label))
    check_overflow(spans, features.label)
    adjacency = np.zeros((p, p), dtype=bool)
    weights = np.zeros((p, p))
    results = []
    with progress_bar(progress, total=p, desc="columns", unit="column") as bar:
        for i in range(p):
            others = np.delete(np.arange(p), i)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* constant")  # said once above
                warnings.filterwarnings("ignore", "y follows the selected")  # and below
                result = foci(
                    values[:, others],
                    values[:, i],
                    stop=stop,
                    max_features=max_features,
                    min_gain=min_gain,
                    standardize=standardize,
                    ties=ties,
                    seed=seed,
                    backend=chosen,
                    alpha=alpha,
                    n_permutations=n_permutations,
                )
            selected = others[result.ordering]
            adjacency[i, selected] = True
            weights[i, selected] = result.conditional
            chosen_names = None if names is None else [names[k] for k in selected]
            result = replace(result, ordering=selected, names=chosen_names, n_features=p)
            if result.not_taken is not None:
                best = int(others[result.not_taken])
                name = None if names is None else names[best]
                result = replace(result, not_taken=best, not_taken_name=name)
            results.append(replace(result, n_omitted=rows.n_omitted, missing=rows.missing))
            bar.update()
    doubtful = sum(bool(result._doubtful) for result in results)
    if doubtful:
        warn(
            f"for {doubtful} of {p} columns, the column follows those selected for it even within "
            "the blocks of near rows in which it is permuted: chance may take its later steps more "
            "often than alpha says; exchangeability_pvalues in `results` say which",
        )
    return DependenceGraph(adjacency, weights, results, names, None if seed is None else int(seed))
