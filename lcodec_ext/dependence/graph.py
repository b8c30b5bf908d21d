"""The graph of which columns FOCI selects for which."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_choice, check_seed, first_few
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext._progress import counted
from lcodec_ext._random import fresh_seed
from lcodec_ext.dependence.backends.base import Ties
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.foci import FociResult, _Task
from lcodec_ext.dependence.ranks import ranks_of
from lcodec_ext.dependence.scaling import (
    STANDARDIZE,
    Standardize,
    check_overflow,
    constant_columns,
)
from lcodec_ext.dependence.side_by_side import side_by_side
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
    group: Any = None,
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
    group : torch.distributed.ProcessGroup, optional
        All its ranks call this function with equal arguments, X as well. Each selects for a share
        of the responses, and has the whole graph, that of one process. A progress bar is that of
        rank 0 and of its responses. Warnings come on every rank. See ``docs/distributed.md``.

    Returns
    -------
    DependenceGraph

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `foci`. With a group also for arguments that differ between ranks, and where another
        rank failed.

    Notes
    -----
    p runs of `foci` on one table, which is checked and laid out once. A small one has a response on
    each thread, and a large one all threads on each response.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.random.default_rng(0).normal(size=(2, 400))
    >>> graph = dependence_graph(np.column_stack([a, b, a * b]))
    >>> graph.adjacency[2].tolist()
    [True, True, False]
    """
    ranks = ranks_of(group, "dependence_graph")
    options: dict[str, Any] = {
        "stop": stop,
        "max_features": max_features,
        "min_gain": min_gain,
        "standardize": standardize,
        "ties": ties,
        "alpha": alpha,
        "n_permutations": n_permutations,
    }
    with ranks.alone("the check of the arguments"):
        chosen = resolve(backend, X=X)
        check_bool(progress, "progress")
        check_seed(seed)
        check_choice(standardize, "standardize", STANDARDIZE)
        features = as_features(X, "X", allow_1d=False, tensors=chosen.tensors, decimals=decimals)
        p, names = features.values.shape[1], features.names
        if p < 2:
            raise ValueError(f"X must have at least two columns for a graph; got {p}")
        rows = clean_rows({"X": features}, nan_policy)
        values = rows.values["X"]
        columns = chosen.lay_out(values)
        features.warn_constant(constant_columns(columns))
        task = _Task(
            chosen, features._replace(values=values), values[:, 0],
            {**options, "preselected": None, "nan_policy": None}, False, ONE_RANK,
        )  # fmt: skip
        task.begin(seed, among=True)
        laid, task.rows = task.scaled(columns), rows
        chosen.share(columns)
        check_overflow(laid.spans, features.label)
    ranks.agree({"X": values, "names": names, "seed": seed, **options})
    if stop != "permutation" and ties != "random":
        seed = None  # nothing is drawn
    elif seed is None:
        seed = ranks.share_out(1, "the seed", lambda _: fresh_seed())[0]
    task.seed = None if seed is None else int(seed)

    def select(some: range) -> list[tuple[FociResult, bool]]:
        """What is selected for each of some columns."""
        each = 3 * getattr(values, "nbytes", 0)  # the engine sorts and packs
        found = side_by_side(lambda i: task.select_for(i, laid), some, values, each)
        shown = progress and ranks.rank == 0
        return [*counted(shown, found, total=len(some), desc="columns", unit="column")]

    pieces = ranks.share_out(p, "the selection for some columns", select)
    results = [result for piece in pieces for result, _ in piece]
    adjacency = np.zeros((p, p), dtype=bool)
    weights = np.zeros((p, p))
    for i, result in enumerate(results):
        adjacency[i, result.ordering] = True
        weights[i, result.ordering] = result.conditional
    determined = sum(is_determined for piece in pieces for _, is_determined in piece)
    if determined:
        warn(
            f"{determined} of {p} columns are functions of columns selected for them: the "
            "conditional coefficient of a further step is 1 by convention",
        )
    doubtful = sum(bool(result._doubtful) for result in results)
    if doubtful:
        warn(
            f"for {doubtful} of {p} columns, the column follows those selected for it even within "
            "the blocks of near rows in which it is permuted: chance may take its later steps more "
            "often than alpha says; exchangeability_pvalues in `results` say which",
        )
    return DependenceGraph(adjacency, weights, results, names, task.seed)
