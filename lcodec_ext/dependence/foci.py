"""FOCI and L-FOCI: greedy selection of a Markov blanket, and the graph made of many."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import check_bool, check_choice, check_integer, check_real, check_seed
from lcodec_ext._progress import progress_bar
from lcodec_ext.dependence import exact as _exact
from lcodec_ext.dependence.backends.base import (
    TIES,
    Engine,
    Ties,
    constant_columns,
    lay_out,
    make_engine,
    warn_constant_columns,
)
from lcodec_ext.dependence.backends.choice import Backend, resolve
from lcodec_ext.dependence.codec import NoiseScale, check_noise, with_noise
from lcodec_ext.dependence.ranks import ranks
from lcodec_ext.dependence.scaling import (
    Columns,
    check_overflow,
    scale_factors,
    squared_spans,
    warn_underflow,
)
from lcodec_ext.dependence.table import as_features, as_response, clean_rows, column_label

Standardize = Literal["scale", "bounded"]
StopReason = Literal["no_gain", "min_gain", "max_features", "exhausted", "constant_y"]


@dataclass(frozen=True, eq=False)
class FociResult:
    """What `foci` selected, and what each step gained. Unpacks as (ordering, cumulative).

    Attributes
    ----------
    ordering : ndarray of int64, shape (k,)
        Selected columns, in the order of selection. Empty if no column helps.
    cumulative : ndarray of float64, shape (k,)
        T(Y, X_S) after each step, S being the preselected and the selected columns.
    conditional : ndarray of float64, shape (k,)
        T(Y, X_l | X_S) of each step, S being what was selected before it; of a first step
        without preselected columns T(Y, X_l).
    base : float
        T(Y, X_S) of the preselected columns; 0.0 without any.
    stop_reason : str
        "no_gain": no further column raises T(Y, X_S). "min_gain": none raises it by more than
        min_gain. "max_features": the cap is reached. "exhausted": every column is selected.
        "constant_y": nothing to explain.
    names : list of str or None
        Names of the selected columns, if X has names.
    preselected : tuple of int
        The conditioning columns that were given.
    n_samples, n_features : int
        Rows used (after omitting NaN) and columns of X.
    """

    ordering: NDArray[np.int64]
    cumulative: NDArray[np.float64]
    conditional: NDArray[np.float64]
    base: float
    stop_reason: StopReason
    names: list[str] | None
    preselected: tuple[int, ...]
    n_samples: int
    n_features: int

    def __iter__(self) -> Iterator[NDArray]:
        return iter((self.ordering, self.cumulative))

    def __repr__(self) -> str:
        head = (
            f"FociResult: {len(self.ordering)} of {self.n_features} columns selected on "
            f"{self.n_samples} rows, stopped by {self.stop_reason!r}"
        )
        if self.preselected:
            head += f"\n  given columns {list(self.preselected)}: T = {self.base:.4f}"
        lines = [
            f"  {k + 1:3d}. {self._label(k)}: T = {self.cumulative[k]:.4f}, "
            f"conditional T = {self.conditional[k]:.4f}"
            for k in range(min(len(self.ordering), 20))
        ]
        if len(self.ordering) > 20:
            lines.append(f"  ... and {len(self.ordering) - 20} more")
        return "\n".join([head, *lines])

    def _label(self, k: int) -> str:
        column = int(self.ordering[k])
        return f"column {column}" if self.names is None else f"{self.names[k]!r} ({column})"


def foci(
    X: Any,
    y: Any,
    *,
    stop: bool = True,
    max_features: int | None = None,
    min_gain: float = 0.0,
    preselected: Sequence[int | str] | None = None,
    standardize: Standardize | None = "scale",
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: Backend = "auto",
    progress: bool = False,
) -> FociResult:
    """FOCI: forward selection of the columns on which y depends.

    Every step adds the column l that makes T(Y, X_S + l) largest, compared exactly; on equality
    the lowest index wins. It stops by itself when no column raises T, which is no test: on noise
    some columns do, a little. With y shuffled, T shows what is chance.

    Parameters
    ----------
    X : array_like of shape (n, p)
        Candidate columns. float32, float16 and bfloat16 are computed in float32, everything
        else in float64. n is at least 3 and at most 10^6. pandas column names are kept.
    y : array_like of shape (n,) or (n, 1)
        Response. Only its order counts.
    stop : bool, default True
        Stop when no column gains; False goes on to max_features or to the last column, as a
        ranking of columns.
    max_features : int, optional
        Cap on the number of columns selected (preselected ones not counted).
    min_gain : float, default 0.0
        A step must raise the cumulative T by more than this. Needs stop=True.
    preselected : sequence of int or str, optional
        Columns of X to condition on from the start, by position or by name (a str); not part of
        the result's ordering. Distances add them up in the order given.
    standardize : {"scale", "bounded", None}, default "scale"
        Divide distances along each column by its standard deviation (as R's FOCI does), by its
        range, or not at all. `codec` never does, so on raw columns its values can differ.
    ties, seed, nan_policy, backend
        As in `codec`.
    progress : bool, default False
        Show a progress bar for each step; needs tqdm.

    Returns
    -------
    FociResult

    Raises
    ------
    ValueError
        For data or options that cannot be used; the message names argument, row and column.
    TypeError
        For options of the wrong type.
    RuntimeError, torch.OutOfMemoryError
        As `codec`.

    Warns
    -----
    UserWarning
        If y is constant (nothing is selected) or columns are constant.

    Notes
    -----
    A step with k columns selected compares a row with its nearest rows in these until none can be
    nearest with a candidate: about n^(1/(k+1)) rows on continuous data, so O(p n^(1 + 1/(k+1)))
    for the step. Rows that share their selected values with many others, and all rows in the
    first step, are sorted instead: O(p n log n). O(p n^2) at worst, for rows that are outliers in
    every respect. Memory: X three times over, and O(n) for each thread. On CUDA every column is
    scored in every step, in a workspace that takes up to 256 MiB beside what X asks for, less where
    the device is short of it.

    References
    ----------
    M. Azadkia and S. Chatterjee, "A simple measure of conditional dependence", Annals of
    Statistics 49 (2021), section 5.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(500, 6))
    >>> result = foci(X, X[:, 1] * X[:, 4])
    >>> sorted(int(column) for column in result.ordering)
    [1, 4]
    """
    chosen = resolve(backend, X=X, y=y)
    check_seed(seed)
    task = _Task.prepare(
        X, y, stop, max_features, min_gain, preselected, standardize, ties, nan_policy, progress
    )
    return task.run(task.lay_out(chosen), task.y, seed)


def lfoci(
    X: Any,
    y: Any,
    *,
    noise: float = 0.01,
    noise_scale: NoiseScale = "absolute",
    seed: int = 0,
    stop: bool = True,
    max_features: int | None = None,
    min_gain: float = 0.0,
    preselected: Sequence[int | str] | None = None,
    standardize: Standardize | None = "scale",
    ties: Ties = "average",
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: Backend = "auto",
    progress: bool = False,
) -> FociResult:
    """L-FOCI: `foci` after a little Gaussian noise is added to y and to every column.

    The noise removes ties, which makes discrete columns as cheap as continuous ones.

    Parameters
    ----------
    X, y, stop, max_features, min_gain, preselected, standardize, ties
        As in `foci`; the computation is in float64.
    nan_policy, backend, progress
        As in `foci`.
    noise : float, default 0.01
        Standard deviation of the noise, the paper's value (it uses 0 to 0.1). 0 adds none.
    noise_scale : {"absolute", "relative"}, default "absolute"
        Whether ``noise`` is in the units of each column, as in the paper, or a share of the
        column's own standard deviation. Mind columns that vary by less than the noise.
    seed : int, default 0
        Of the noise, and of ties="random". y draws from stream 0 of Philox(seed), column k of X
        from stream k + 1.

    Returns
    -------
    FociResult

    Raises
    ------
    ValueError, TypeError, RuntimeError
        As `foci`, and for noise that is negative or not finite.

    References
    ----------
    R. Mehta, S. Pal, V. Singh and S. Ravi, "Deep Unlearning via Randomized Conditionally
    Independent Hessians", CVPR 2022.

    Examples
    --------
    >>> import numpy as np
    >>> bits = np.random.default_rng(0).integers(0, 2, (500, 6))
    >>> lfoci(bits, bits[:, 0] + 2 * bits[:, 3], max_features=2).ordering.tolist()
    [3, 0]
    """
    chosen = resolve(backend, X=X, y=y)
    check_noise(noise, noise_scale, seed)
    task = _Task.prepare(
        X, y, stop, max_features, min_gain, preselected, standardize, ties, nan_policy, progress
    )
    columns, response = task.lay_out(chosen), task.y
    if not (response == response[0]).all():  # the noise would make a response of nothing
        response, noisy = with_noise(response, task.X, columns, noise, noise_scale, seed, chosen)
        columns = lay_out(chosen, noisy)
    return task.run(columns, response, seed)


@dataclass(frozen=True, eq=False)
class DependenceGraph:
    """Which columns FOCI selects for which.

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
    """

    adjacency: NDArray[np.bool_]
    weights: NDArray[np.float64]
    results: list[FociResult]
    names: list[str] | None


def dependence_graph(
    X: Any,
    *,
    stop: bool = True,
    max_features: int | None = None,
    min_gain: float = 0.0,
    standardize: Standardize | None = "scale",
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: Backend = "auto",
    progress: bool = False,
) -> DependenceGraph:
    """Run `foci` with every column in turn as the response and the others as candidates.

    Parameters
    ----------
    X : array_like of shape (n, p)
        At least two columns.
    stop, max_features, min_gain, standardize, ties, seed, nan_policy, backend, progress
        As in `foci`. With nan_policy="omit" a row with a NaN in any column is left out for all.

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
    features = as_features(X, "X", allow_1d=False)
    p = features.values.shape[1]
    if p < 2:
        raise ValueError(f"X must have at least two columns for a graph; got {p}")
    values = clean_rows({"X": features}, nan_policy)["X"]
    columns = lay_out(chosen, values)
    warn_constant_columns(constant_columns(columns), "X", features.names, stacklevel=2)
    check_choice(standardize, "standardize", ("scale", "bounded", None))
    spans = squared_spans(columns, scale_factors(columns, standardize, features.names))
    check_overflow(spans, lambda k: f"{column_label(k, features.names)} of X")
    adjacency = np.zeros((p, p), dtype=bool)
    weights = np.zeros((p, p))
    results = []
    with progress_bar(progress, total=p, desc="columns", unit="column") as bar:
        for i in range(p):
            others = np.delete(np.arange(p), i)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* constant")  # said once above
                result = foci(
                    values[:, others],
                    values[:, i],
                    stop=stop,
                    max_features=max_features,
                    min_gain=min_gain,
                    standardize=standardize,
                    ties=ties,
                    seed=seed,
                    backend=backend,
                )
            selected = others[result.ordering]
            adjacency[i, selected] = True
            weights[i, selected] = result.conditional
            results.append(_in_columns_of(result, selected, features.names, p))
            bar.update()
    return DependenceGraph(adjacency, weights, results, features.names)


def _in_columns_of(
    result: FociResult, selected: NDArray[np.int64], names: list[str] | None, p: int
) -> FociResult:
    """A result on some of the columns, told in the indices of all."""
    return FociResult(
        ordering=selected,
        cumulative=result.cumulative,
        conditional=result.conditional,
        base=result.base,
        stop_reason=result.stop_reason,
        names=None if names is None else [names[k] for k in selected],
        preselected=result.preselected,
        n_samples=result.n_samples,
        n_features=p,
    )


@dataclass(frozen=True, eq=False)
class _Task:
    """Validated arguments of one selection, and the FOCI loop over an engine."""

    X: Any  # arrays, or tensors on one device
    y: Any
    names: list[str] | None
    preselected: tuple[int, ...]
    stop: bool
    cap: int
    min_gain: float
    standardize: str | None
    ties: str
    progress: bool

    @staticmethod
    def prepare(
        X: Any,
        y: Any,
        stop: object,
        max_features: object,
        min_gain: object,
        preselected: Sequence[int | str] | None,
        standardize: str | None,
        ties: str,
        nan_policy: str,
        progress: object,
    ) -> "_Task":
        check_choice(ties, "ties", TIES)
        check_choice(standardize, "standardize", ("scale", "bounded", None))
        stop = check_bool(stop, "stop")
        gain = check_real(min_gain, "min_gain", 0)
        if gain > 0 and not stop:
            raise ValueError(
                f"min_gain={gain:g} needs stop=True: with stop=False nothing is left out"
            )
        features = as_features(X, "X", allow_1d=False)
        p = features.values.shape[1]
        given = _check_preselected(preselected, p, features.names)
        cap = p - len(given)
        if max_features is not None:
            cap = min(cap, check_integer(max_features, "max_features", 1))
        clean = clean_rows({"X": features, "y": as_response(y)}, nan_policy)
        return _Task(
            clean["X"],
            clean["y"],
            features.names,
            given,
            stop,
            cap,
            gain,
            standardize,
            ties,
            check_bool(progress, "progress"),
        )

    def lay_out(self, backend: str) -> Columns:
        """The columns of X; a warning says which are constant."""
        columns = lay_out(backend, self.X)
        warn_constant_columns(constant_columns(columns), "X", self.names, stacklevel=3)
        return columns

    def run(self, columns: Columns, y: Any, seed: int | None) -> FociResult:
        """The greedy loop: score all candidates, decide exactly, go on or stop."""
        R, L = ranks(y)
        sums = _exact.ResponseSums(R, L)
        if sums.constant:
            warnings.warn("y is constant: nothing is selected", stacklevel=3)
            return self._result([], [], [], 0.0, "constant_y")
        factors = scale_factors(columns, self.standardize, self.names)
        spans = squared_spans(columns, factors)
        warn_underflow(
            columns, factors, lambda k: f"{column_label(k, self.names)} of X", stacklevel=3
        )
        bound = factors.dtype.type(0)
        engine = make_engine(columns, factors, R, self.ties, seed)
        m = Fraction(sums.sum_L2, sums.n)  # no columns: T(Y, {}) = 0
        base = 0.0
        for column in self.preselected:
            bound = self._add_span(bound, spans[[column]], [column])[0]
            if column == self.preselected[-1]:
                m = _exact.total(*engine.row_sums(column))
                base = float(_defined(sums.unconditional(m)))
            engine.select(column)
        conditioned = bool(self.preselected)
        candidates = sorted(set(range(len(factors))).difference(self.preselected))
        ordering: list[int] = []
        cumulative: list[float] = []
        conditional: list[float] = []
        reason: StopReason = "exhausted" if self.cap == len(candidates) else "max_features"
        with progress_bar(self.progress, total=len(candidates), unit="column") as bar:
            while len(ordering) < self.cap:
                bounds = self._add_span(bound, spans[candidates], candidates)
                bar.set_description(f"FOCI step {len(ordering) + 1}")
                # columns that bring no gain are told from one another only if one must be taken
                floor = int(m) if self.stop else 0
                leaders = _leaders(engine, np.array(candidates), floor, self.progress, bar)
                leader = _best(engine, *leaders)
                best, m_best = leader if leader else (-1, m)
                gain = Fraction(sums.n) * (m_best - m) / sums.denominator
                if self.stop and gain <= Fraction(self.min_gain):
                    reason = "no_gain" if gain <= 0 else "min_gain"
                    break
                step = sums.conditional(m_best, m) if conditioned else sums.unconditional(m_best)
                if step is None:
                    warnings.warn(
                        "y is a function of the columns selected so far: the conditional "
                        "coefficient of this step is 1 by convention",
                        stacklevel=3,
                    )
                bound = bounds[candidates.index(best)]
                engine.select(best)
                candidates.remove(best)
                ordering.append(best)
                cumulative.append(float(_defined(sums.unconditional(m_best))))
                conditional.append(1.0 if step is None else float(step))
                m, conditioned = m_best, True
        return self._result(ordering, cumulative, conditional, base, reason)

    def _add_span(self, bound: Any, spans: NDArray, columns: list[int]) -> NDArray:
        """Bounds on the squared distances with each of the columns added; all must be finite."""
        with np.errstate(over="ignore"):
            bounds = bound + spans
        check_overflow(bounds, lambda k: f"{column_label(columns[k], self.names)} of X")
        return bounds

    def _result(
        self,
        ordering: list[int],
        cumulative: list[float],
        conditional: list[float],
        base: float,
        reason: StopReason,
    ) -> FociResult:
        return FociResult(
            ordering=np.array(ordering, dtype=np.int64),
            cumulative=np.array(cumulative, dtype=np.float64),
            conditional=np.array(conditional, dtype=np.float64),
            base=base,
            stop_reason=reason,
            names=None if self.names is None else [self.names[f] for f in ordering],
            preselected=self.preselected,
            n_samples=self.X.shape[0],
            n_features=self.X.shape[1],
        )


def _defined(value: Fraction | None) -> Fraction:
    """T(Y, X_S), which exists whenever y is not constant."""
    assert value is not None
    return value


def _check_preselected(
    preselected: Sequence[int | str] | None, p: int, names: list[str] | None
) -> tuple[int, ...]:
    """Indices of the preselected columns, distinct and in range."""
    if preselected is None:
        return ()
    if isinstance(preselected, str | bytes) or not isinstance(preselected, Sequence | np.ndarray):
        raise TypeError(
            "preselected must be a sequence of column indices or names; got "
            f"{preselected!r} ({type(preselected).__name__})"
        )
    indices: list[int] = []
    for column in preselected:
        if isinstance(column, str):
            if names is None or names.count(column) != 1:
                known = "X has no column names" if names is None else "not one column of X"
                raise ValueError(f"preselected names column {column!r}: {known}")
            index = names.index(column)
        else:
            index = check_integer(column, "preselected column", 0)
            if index >= p:
                raise ValueError(
                    f"preselected columns must be in 0 .. {p - 1}, as X has {p}; got {index}"
                )
        if index in indices:
            raise ValueError(f"preselected names column {index} twice")
        indices.append(index)
    return tuple(indices)


def _leaders(
    engine: Engine, candidates: NDArray[np.int64], floor: int, progress: bool, bar: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Those that may be the best and their scores, found in pieces where a bar shows them."""
    if not progress:
        return engine.leaders(candidates, floor)
    bar.reset(total=len(candidates))
    found = []
    for start in range(0, len(candidates), engine.piece):
        piece = candidates[start : start + engine.piece]
        found.append(engine.leaders(piece, floor))
        # one that is equal is still wanted
        floor = max(floor, int(found[-1][1].max(initial=0)) - 1)
        bar.update(len(piece))
    columns, whole, fraction = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _exact.contenders(columns, whole, fraction)


def _best(
    engine: Engine,
    columns: NDArray[np.int64],
    whole: NDArray[np.int64],
    fraction: NDArray[np.int64],
) -> tuple[int, Fraction] | None:
    """The candidate with the largest exact sum, the lowest index on equality, and its sum.

    Of those that an engine says may be it, by exact rationals; None if there are none.
    """
    if len(columns) == 0:
        return None
    if (fraction == 0).all():  # exact, and so equal
        return int(columns.min()), Fraction(int(whole[0]))
    best, best_sum = -1, Fraction(-1)
    for column in np.sort(columns):
        exact = _exact.total(*engine.row_sums(int(column)))
        if exact > best_sum:
            best, best_sum = int(column), exact
    return best, best_sum
