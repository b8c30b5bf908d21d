"""Stability selection: how often FOCI selects each column on random halves of the rows."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_integer, check_seed
from lcodec_ext._progress import counted
from lcodec_ext._random import random_order, tie_hash
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.foci import _check_preselected, foci
from lcodec_ext.dependence.ranks import ranks_of
from lcodec_ext.dependence.scaling import constant_columns
from lcodec_ext.dependence.side_by_side import side_by_side
from lcodec_ext.dependence.table import (
    Target,
    as_features,
    as_target,
    check_classes,
    clean_rows,
    refuse_swapped,
    said_columns,
)

_OPTIONS = (  # of `foci`
    "stop", "alpha", "n_permutations", "max_features", "min_gain", "standardize", "ties",
    "n_neighbors", "y_order",
)  # fmt: skip
_SHOWN = 20  # columns that are printed


@dataclass(frozen=True, eq=False)
class StabilityResult:
    """How often each column was selected. Prints the columns with the highest frequencies.

    Attributes
    ----------
    selected : ndarray of bool, shape (2 n_pairs, p)
        Which columns were selected on which half. Rows 2k and 2k + 1 are a complementary pair.
    names : list of str or None
        Column names of X.
    preselected : tuple of int
        The conditioning columns that were given.
    n_samples, n_omitted : int
        Rows of which halves were drawn, and rows left out by nan_policy="omit".
    """

    selected: NDArray[np.bool_]
    names: list[str] | None
    preselected: tuple[int, ...]
    n_samples: int
    n_omitted: int = 0

    @property
    def frequencies(self) -> NDArray[np.float64]:
        """Share of the halves on which each column was selected, shape (p,)."""
        return np.asarray(self.selected.mean(axis=0))

    @property
    def mean_selected(self) -> float:
        """How many columns were selected on a half, on average."""
        return float(self.selected.sum(axis=1).mean())

    def stable(self, threshold: float = 0.75) -> list[int]:
        """Columns with at least this frequency, the most frequent first.

        Parameters
        ----------
        threshold : float, default 0.75
            Above 0.5 and at most 1. Meinshausen and Buehlmann advise 0.6 to 0.9.

        Raises
        ------
        TypeError, ValueError
            For any other threshold.
        """
        _check_threshold(threshold)
        frequencies = self.frequencies
        order = np.argsort(-frequencies, kind="stable")
        return [int(k) for k in order if frequencies[k] >= threshold]

    def expected_false(self, threshold: float = 0.75) -> float:
        """Bound on how many columns `stable` is expected to return by chance.

        q^2 / ((2 threshold - 1) p) for q columns selected on average from p candidates. A column is
        there by chance if its probability of selection on a half is at most q / p, that of a draw
        which ignores the data. The bound holds without further assumptions for the true q, which
        `mean_selected` estimates (Shah and Samworth 2013, theorem 1). Limit q with max_features,
        or with min_gain, where it is too large.

        Parameters
        ----------
        threshold : float, default 0.75
            As in `stable`.
        """
        _check_threshold(threshold)
        p = self.selected.shape[1] - len(self.preselected)
        return self.mean_selected**2 / ((2 * threshold - 1) * p) if p else 0.0

    def plot(self, ax: Any = None, *, threshold: float = 0.75) -> Any:
        """Draw the frequencies of the columns that were ever selected, and a threshold.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            What to draw on; a new figure by default.
        threshold : float, default 0.75
            Where the line is.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib.
        """
        from lcodec_ext.dependence.plots import plot_stability

        _check_threshold(threshold)
        return plot_stability(self, ax, threshold)

    def __repr__(self) -> str:
        halves, p = self.selected.shape
        columns = "column" if p == 1 else "columns"
        lines = [
            f"StabilityResult: {p:,} {columns} on {halves:,} halves of {self.n_samples:,} rows, "
            f"{self.mean_selected:.1f} selected on average"
        ]
        if self.n_omitted:
            lines.append(f"  {self.n_omitted:,} more rows left out: NaN")
        if self.preselected:
            names = self.names and [self.names[k] for k in self.preselected]
            lines.append(f"  given {said_columns(self.preselected, names)}")
        frequencies = self.frequencies
        order = np.argsort(-frequencies, kind="stable")
        ever = [int(k) for k in order if frequencies[k] > 0]
        lines += [f"  {frequencies[k]:4.0%}  {self._label(k)}" for k in ever[:_SHOWN]]
        if len(ever) > _SHOWN:
            lines.append(f"  ... and {len(ever) - _SHOWN:,} more columns that were ever selected")
        return "\n".join(lines)

    def _label(self, column: int) -> str:
        return f"column {column}" if self.names is None else f"{self.names[column]!r} ({column})"


def stability(
    X: Any,
    y: Any,
    *,
    n_pairs: int = 50,
    seed: int = 0,
    preselected: Sequence[int | str] | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
    progress: bool = False,
    decimals: int | None = None,
    group: Any = None,
    **options: Any,
) -> StabilityResult:
    """Stability selection: run `foci` on random halves of the rows, and count what it selects.

    Every pair splits the rows at random into two halves, and `foci` selects columns on each. A
    column that y depends on is selected on most halves; one that was selected by chance is not.

    Parameters
    ----------
    X, y, preselected, nan_policy, backend, decimals
        As in `foci`, for at least 6 rows.
    n_pairs : int, default 50
        Pairs of halves, so that there are 100 halves, as Shah and Samworth advise. With an odd
        number of rows each pair leaves out another one.
    seed : int in [0, 2**64), default 0
        Of the halves, and of whatever the options draw at random. Pair k is a function of the
        seed, k and the number of rows.
    progress : bool, default False
        Show a progress bar of the halves; needs tqdm.
    group : torch.distributed.ProcessGroup, optional
        All its ranks call this function with equal arguments. Each selects on a share of the
        halves, and has the whole result, that of one process. A progress bar is that of rank 0 and
        of its halves. Warnings come on every rank. See ``docs/distributed.md``.
    **options
        Further options of `foci`: stop, alpha, n_permutations, max_features, min_gain, standardize,
        ties, n_neighbors, y_order.

    Returns
    -------
    StabilityResult

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `foci`. With a group also for arguments that differ between ranks, and where another
        rank failed.

    Notes
    -----
    2 n_pairs runs of `foci` on n/2 rows, as many at a time as there are threads (`set_num_threads`)
    while tables are small. The result does not depend on it.

    References
    ----------
    N. Meinshausen and P. Buehlmann, "Stability selection", Journal of the Royal Statistical Society
    B 72 (2010). R. D. Shah and R. J. Samworth, "Variable selection with error control: another
    look at stability selection", the same journal 75 (2013), section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from lcodec_ext import stability
    >>> X = np.random.default_rng(0).normal(size=(400, 6))
    >>> result = stability(X, X[:, 1] * X[:, 4], n_pairs=10)
    >>> sorted(result.stable())
    [1, 4]
    """
    ranks = ranks_of(group, "stability")
    with ranks.alone("the check of the arguments"):
        chosen = resolve(backend, X=X, y=y)
        _check_options(options)
        check_bool(progress, "progress")
        n_halves = 2 * check_integer(n_pairs, "n_pairs", 1, 10**6)
        check_seed(seed, optional=False)
        refuse_swapped(X, y)
        features = as_features(X, "X", allow_1d=False, tensors=chosen.tensors, decimals=decimals)
        order = options.get("y_order", "given")
        response = as_target(y, tensors=chosen.tensors, y_order=order, decimals=decimals)
        rows = clean_rows({"X": features, "y": response.values}, nan_policy, minimum=6)
        values, target = rows.values["X"], rows.values["y"]
        given = _check_preselected(preselected, values.shape[1], features.names)
        _check_halves(options, target, response.nominal)
        features.warn_constant(constant_columns(chosen.lay_out(values)))
    own = {"n_pairs": n_pairs, "seed": seed, "preselected": given, "names": features.names}
    ranks.agree({"X": values, "y": target, "classes": response.nominal, **own, **options})
    seeds = tie_hash(seed, n_halves)

    def select(half: int) -> tuple[NDArray[np.int64], bool]:
        chosen_rows = _half(half, len(target), seed)
        part = target[chosen_rows]
        found = foci(
            values[chosen_rows],
            Target(part, nominal=True) if response.nominal else part,
            preselected=given,
            seed=int(seeds[half]),
            backend=chosen,
            **options,
        )
        return found.ordering, found.stop_reason == "constant_y"

    def on(some: range) -> list[tuple[NDArray[np.int64], bool]]:
        shown = progress and ranks.rank == 0
        with warnings.catch_warnings():  # those of a half: the whole has been checked
            warnings.simplefilter("ignore", UserWarning)
            each = 2 * getattr(values, "nbytes", 0)  # the engine has about three copies of a half
            halves = side_by_side(select, some, values, each)
            return [*counted(shown, halves, total=len(some), desc="halves", unit="half")]

    selected = np.zeros((n_halves, values.shape[1]), dtype=bool)
    pieces = ranks.share_out(n_halves, "the selection on some halves", on)
    results = [result for piece in pieces for result in piece]
    for half, (ordering, _) in enumerate(results):
        selected[half, ordering] = True
    constant = sum(is_constant for _, is_constant in results)
    if constant:
        warn(
            f"y is constant on {constant} of {n_halves} halves of the rows: nothing is selected "
            "there",
        )
    return StabilityResult(selected, features.names, given, len(target), rows.n_omitted)


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            hint = "; result.stable(threshold) and result.plot(threshold=...) take it"
            raise TypeError(
                f"stability() got an unexpected keyword argument {name!r}"
                f"{hint if name == 'threshold' else ': its options are those of foci'}"
            )


def _check_halves(options: dict[str, Any], y: Any, nominal: bool) -> None:
    """Refuse classes that most rows have for themselves, and more neighbours than a half has."""
    check_classes(y, nominal)
    n_neighbors, half = options.get("n_neighbors", 1), len(y) // 2
    if check_integer(n_neighbors, "n_neighbors", 1) >= half:
        raise ValueError(
            f"n_neighbors must be below the number of rows of a half, {half:,} of {len(y):,}; got "
            f"{n_neighbors:,}"
        )


def _half(half: int, n: int, seed: int) -> NDArray[np.int64]:
    """Rows of a half in increasing order; halves 2k and 2k + 1 have none in common."""
    order, size = random_order(n, seed, half // 2), n // 2
    start = size * (half % 2)
    return np.sort(order[start : start + size])


def _check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool | np.bool_) or not isinstance(threshold, int | float | np.number):
        raise TypeError(
            f"threshold must be a number above 0.5 and at most 1; got {threshold!r} "
            f"({type(threshold).__name__})"
        )
    if not 0.5 < threshold <= 1:
        raise ValueError(f"threshold must be above 0.5 and at most 1; got {threshold!r}")
