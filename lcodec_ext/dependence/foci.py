"""FOCI and L-FOCI: greedy selection of the columns on which a response depends."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from os import PathLike
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor
from lcodec_ext._build import __version__
from lcodec_ext._callers import warn
from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_integer,
    check_real,
    check_seed,
    first_few,
)
from lcodec_ext._files import json_ready
from lcodec_ext._one_rank import OneRank
from lcodec_ext._progress import progress_bar
from lcodec_ext._random import fresh_seed, tie_seed
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import TIES, Columns, Laid, Ties
from lcodec_ext.dependence.backends.block_table import BlockTable
from lcodec_ext.dependence.backends.blocks import in_blocks
from lcodec_ext.dependence.backends.resolve import BackendLike, resolve
from lcodec_ext.dependence.candidates import Candidates
from lcodec_ext.dependence.checkpoint import Checkpoint, Progress, digest, saved_text, word_of
from lcodec_ext.dependence.classes import response_engine, responses
from lcodec_ext.dependence.exchangeable import DOUBTFUL
from lcodec_ext.dependence.foci_null import PERMUTATION_BYTES, StepNull, StepTest, check_level
from lcodec_ext.dependence.k_nearest import check_neighbors
from lcodec_ext.dependence.noise import NoiseScale, check_noise, with_noise
from lcodec_ext.dependence.ranks import AnyRanks, ranks_of
from lcodec_ext.dependence.scaling import (
    STANDARDIZE,
    Standardize,
    check_overflow,
    constant_columns,
    scaled,
)
from lcodec_ext.dependence.shards import ROOM, Shard, ShardedCandidates
from lcodec_ext.dependence.side_by_side import go_on
from lcodec_ext.dependence.table import (
    Y_ORDERS,
    Features,
    Rows,
    Target,
    as_features,
    as_response,
    as_target,
    check_classes,
    clean_rows,
    missing_rows,
    refuse_classes,
    refuse_swapped,
    said_columns,
)

DETERMINED = (
    "y is a function of the columns selected so far: the conditional coefficient of this step is 1 "
    "by convention"
)

StopReason = Literal[
    "no_gain", "min_gain", "not_significant", "max_features", "exhausted", "constant_y"
]


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
        "no_gain", "min_gain": no column raises T, or none by more than min_gain;
        "not_significant": the best column's gain is one that chance makes, too; "max_features": the
        cap is reached; "exhausted": every column is selected; "constant_y": nothing to explain.
    names : list of str or None
        Names of the selected columns, if X has names.
    preselected : tuple of int
        The conditioning columns that were given.
    preselected_names : list of str or None
        Their names, if X has names.
    n_samples, n_features : int
        Rows used (after omitting NaN) and columns of X.
    n_omitted : int
        Rows left out by nan_policy="omit".
    missing : dict
        How many NaN the columns with any have, by what messages call them.
    threshold : ndarray of float64, or None
        With stop="permutation", of every step, and last of the one that ended the selection: the T
        that chance reaches, which the cumulative T had to exceed.
    pvalues : ndarray of float64, or None
        With stop="permutation", the p-values of these steps.
    exchangeability_pvalues : ndarray of float64, or None
        With stop="permutation", p-values of what these steps assume: that y is exchangeable among
        rows that are near in the columns selected before. nan where none were.
    not_taken : int or None
        With stop="permutation", the best of the other columns in the step that ended the selection,
        which has the last p-value; `not_taken_name` is its name, if X has names.
    seed : int or None
        What permutations, random ties and noise were drawn from: with it the selection is the same
        again. None where nothing was drawn.
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
    n_omitted: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    threshold: NDArray[np.float64] | None = None
    pvalues: NDArray[np.float64] | None = None
    preselected_names: list[str] | None = None
    exchangeability_pvalues: NDArray[np.float64] | None = None
    not_taken: int | None = None
    not_taken_name: str | None = None
    seed: int | None = None

    def __iter__(self) -> Iterator[NDArray]:
        return iter((self.ordering, self.cumulative))

    @property
    def _doubtful(self) -> list[int]:
        """Steps that were taken by a test whose assumption does not hold."""
        kept = self.exchangeability_pvalues
        return (
            [] if kept is None else np.flatnonzero(kept[: len(self.ordering)] <= DOUBTFUL).tolist()
        )

    def plot(self, ax: Any = None) -> Any:
        """Draw the cumulative and the conditional T of every step, of the first 60 at most.

        With stop="permutation" also the cumulative T that chance reaches, and the p-value of the
        step that ended the selection.

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
        from lcodec_ext.dependence.plots import plot_path

        return plot_path(self, ax)

    def __repr__(self) -> str:
        columns = "column" if self.n_features == 1 else "columns"
        head = (
            f"FociResult: {len(self.ordering)} of {self.n_features} {columns} selected on "
            f"{self.n_samples} rows, stopped by {self.stop_reason!r}"
        )
        if self.n_omitted:
            n = self.n_samples + self.n_omitted
            head += f"\n  {Rows({}, n, self.n_omitted, self.missing).said()}"
        if self.preselected:
            given = said_columns(self.preselected, self.preselected_names)
            head += f"\n  given {given}: T = {self.base:.4f}"
        lines = [
            f"  {k + 1:3d}. {self._label(k)}: T = {self.cumulative[k]:.4f}, "
            f"conditional T = {self.conditional[k]:.4f}"
            + ("" if self.pvalues is None else f", p-value {self.pvalues[k]:.4g}")
            for k in range(min(len(self.ordering), 20))
        ]
        if len(self.ordering) > 20:
            lines.append(f"  ... and {len(self.ordering) - 20} more")
        if self.not_taken is not None and self.pvalues is not None:
            name = self.not_taken_name
            best = f"column {self.not_taken}" if name is None else f"{name!r} ({self.not_taken})"
            lines.append(
                f"  stopped: the best of the others, {best}, has p-value {self.pvalues[-1]:.4g}"
            )
        return "\n".join([head, *lines])

    def _label(self, k: int) -> str:
        column = int(self.ordering[k])
        return f"column {column}" if self.names is None else f"{self.names[k]!r} ({column})"


def foci(
    X: Any,
    y: Any,
    *,
    stop: bool | Literal["permutation"] = True,
    max_features: int | None = None,
    min_gain: float = 0.0,
    preselected: Sequence[int | str] | None = None,
    standardize: Standardize | None = "scale",
    ties: Ties = "average",
    seed: int | None = None,
    nan_policy: Literal["raise", "omit"] = "raise",
    backend: BackendLike = "auto",
    progress: bool = False,
    decimals: int | None = None,
    n_neighbors: int = 1,
    y_order: Literal["given", "average"] = "given",
    alpha: float | None = None,
    n_permutations: int | None = None,
    max_memory: float | None = None,
    checkpoint: str | PathLike[str] | None = None,
    group: Any = None,
) -> FociResult:
    """FOCI: forward selection of the columns on which y depends.

    Every step adds the column l that makes T(Y, X_S + l) largest, compared exactly; on equality
    the lowest index wins. It stops by itself when no column raises T. That is not a test: on noise
    some columns do, a little. stop="permutation" is a test: a step must also beat the best that
    chance makes of the remaining columns.

    Parameters
    ----------
    X : array_like of shape (n, p)
        Candidate columns. float32, float16 and bfloat16 are computed in float32, everything
        else in float64. n is at least 3 and at most 10^6. pandas column names are kept.
        What may be larger than memory is read in blocks of columns, again in every step, for the
        same bits: a `numpy.memmap`, the path of a Parquet file or of a folder of them (in the order
        of the numbers in their names), a ParquetFile or Dataset of pyarrow, and `ColumnBlocks` of
        these and of arrays.
        ``docs/distributed.md`` says what that costs.
    y : array_like of shape (n,) or (n, q)
        Response. Only its order counts. Strings and categories are classes without an order: T
        is the mean over the classes c of the T of ``y == c``. Several columns of numbers are one
        response together, T^q: columns of X are selected that tell about all of them. Columns of
        y that enter distances are standardised as those of X are.
    stop : bool or "permutation", default True
        Stop when no column gains; False goes on to max_features or to the last column.
        "permutation" stops, too, when the largest gain has a p-value above alpha: among the
        permutations of y, how often the largest gain of all remaining columns is as large. The
        first step is an exact test that y is independent of X: if it is, something is selected with
        probability alpha at most. Later steps permute y in blocks of rows with near ranks in the
        selected columns, which is approximate; a warning says where the data speak against it.
        ``docs/inference.md`` says what that assumes.
    max_features : int, optional
        Cap on the number of columns selected (preselected ones not counted).
    min_gain : float, default 0.0
        A step must raise the cumulative T by more than this. Not with stop=False.
    preselected : sequence of int or str, optional
        Columns of X to condition on from the start, by position or name, in the order in which
        distances add them up; not part of the result's ordering.
    standardize : {"scale", "bounded", None}, default "scale"
        Divide distances along each column by its standard deviation (as R's FOCI does), by its
        range, or not at all. `codec` never does, so on raw columns its values can differ.
    ties, nan_policy, backend
        As in `codec`.
    seed : int, optional
        In [0, 2^64), for ties="random" and for the permutations. None draws a fresh one, which is
        in the result.
    progress : bool, default False
        Show a progress bar for each step; needs tqdm.
    decimals : int, optional
        How many decimals the columns of X have, as in `codec`.
    n_neighbors, y_order
        As in `codec`.
    alpha : float, optional
        With stop="permutation": level of each step, above 0 and below 1; 0.05 by default.
    n_permutations : int, optional
        With stop="permutation": from 1 / alpha - 1 to 10^6; 999 by default.
    max_memory : number, optional
        Bytes that a table which is read in blocks may take with all work on it; 2^30 by default,
        for blocks that are large (40 000 columns of 1000 rows) and a part of common machines.
        Given, an array or a data frame in memory is worked on in blocks, too, instead of copying it
        as a whole. The least that will do grows with the table, and is in the message of less.
    checkpoint : str or path, optional
        A file that has the steps so far, written whole after each. If it is there when the call
        begins, the selection goes on behind its last step, with the same bits as without an
        interruption; one that had ended is returned at once. `max_features` may change; the
        file is refused for other values of X or y, other options or another version of the
        package. A seed that was drawn is in it.
    group : torch.distributed.ProcessGroup, optional
        Spread the columns over the ranks of a group, ``torch.distributed.group.WORLD`` for all.
        X is the own columns, with all rows; in the order of ranks they are the whole table, in
        which the result, `preselected` and messages count. A rank may have none, an array of shape
        (n, 0). All arguments but `backend`, `progress`, `max_memory` must be equal. Every rank
        returns the same result, that of one process with the whole table, bit for bit. A step
        sends 32 bytes and one broadcast of n + 1 numbers in the precision of X; with tied
        neighbours some hundred bytes more; with stop="permutation" 8 and 9 a permutation more; with
        a checkpoint 8 more. Each rank warns of its own columns, and of the result; rank 0 alone
        shows the progress and writes the checkpoint. ``docs/distributed.md`` has an example.

    Returns
    -------
    FociResult

    Raises
    ------
    ValueError, TypeError, RuntimeError, torch.OutOfMemoryError
        As `codec`, and for options that cannot be used. A constant y, for which nothing is
        selected, and constant columns get a warning. With a group a ValueError on every rank names
        what differs between ranks. A rank that fails ends all, by a RuntimeError that names it; one
        that dies does so within the group's timeout. A RuntimeError, too, if a file that is read in
        blocks is written meanwhile.
    OSError
        If the checkpoint cannot be read or written.
    ImportError
        For Parquet without pyarrow.

    Notes
    -----
    A step with k columns selected takes O(p n^(1 + 1/(k+1))) on continuous data, O(p n log n)
    where many rows share the selected values and in the first step, O(p n^2) at worst. Memory:
    three times X and O(n) for each thread; on CUDA a workspace of up to 256 MiB more. q columns of
    y take q times as much, and all candidates are scored to the end. With several neighbours
    every candidate is searched for by itself, in about the time of `codec`.
    stop="permutation" adds one search of neighbours for each candidate and step, and about 1 ns a
    row, candidate and permutation.

    References
    ----------
    M. Azadkia and S. Chatterjee, "A simple measure of conditional dependence", Annals of
    Statistics 49 (2021), section 5. For several columns of y the MFOCI of J. Ansari and S. Fuchs,
    arXiv:2212.01621.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(500, 6))
    >>> result = foci(X, X[:, 1] * X[:, 4])
    >>> sorted(int(column) for column in result.ordering)
    [1, 4]
    """
    options = {
        "stop": stop, "max_features": max_features, "min_gain": min_gain,
        "preselected": preselected, "standardize": standardize, "ties": ties,
        "nan_policy": nan_policy, "decimals": decimals, "n_neighbors": n_neighbors,
        "y_order": y_order, "alpha": alpha, "n_permutations": n_permutations,
    }  # fmt: skip
    ranks = ranks_of(group, "foci")
    with ranks.alone("checking the arguments"):
        check_seed(seed)
        check_choice(y_order, "y_order", Y_ORDERS)
        task = _Task(*in_blocks(backend, X, y, max_memory), y, options, progress, ranks)
    task.begin(seed, checkpoint)
    with ranks.alone("laying out X"):
        columns = task.lay_out()
        task.warn_constant(columns)
    return task.run(columns, task.y, seed)


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
    backend: BackendLike = "auto",
    progress: bool = False,
    group: Any = None,
) -> FociResult:
    """L-FOCI: `foci` after a little Gaussian noise is added to y and to every column.

    The noise removes ties, which makes discrete columns as cheap as continuous ones.

    Parameters
    ----------
    X, y, stop, max_features, min_gain, preselected, standardize, ties, nan_policy, backend,
    progress
        As in `foci`; the computation is in float64. y holds numbers.
    noise : float, default 0.01
        Standard deviation of the noise, the paper's value (it uses 0 to 0.1). 0 adds none.
    noise_scale : {"absolute", "relative"}, default "absolute"
        Whether ``noise`` is in the units of each column, as in the paper, or a share of the
        column's own standard deviation. Mind columns that vary by less than the noise.
    seed : int, default 0
        Of the noise, and of ties="random". y draws from stream 0 of Philox(seed), column k of X
        from stream k + 1.
    group : torch.distributed.ProcessGroup, optional
        Spread the columns over the ranks of a group, as in `foci`, with the same noise.

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
    options = {
        "noise": noise, "noise_scale": noise_scale, "stop": stop, "max_features": max_features,
        "min_gain": min_gain, "preselected": preselected, "standardize": standardize, "ties": ties,
        "nan_policy": nan_policy,
    }  # fmt: skip
    ranks = ranks_of(group, "lfoci")
    with ranks.alone("checking the arguments"):
        check_noise(noise, noise_scale, seed)
        task = _Task(backend, X, y, options, progress, ranks)
        refuse_classes(task.target.nominal, "lfoci", "foci")
    task.begin(seed)
    with ranks.alone("laying out X"):
        columns, response = task.lay_out(), task.y
        task.warn_constant(columns)
        if not (response == response[0]).all():  # noise would turn a constant into a response
            features = task.features
            response, noisy = with_noise(
                task.backend, response, features.values, columns, noise, noise_scale, seed,
                features.first,
            )  # fmt: skip
            task.features = features._replace(values=noisy)
            columns = task.lay_out()
            task.seed = int(seed) if noise else None
    return task.run(columns, response, seed)


def first_step_scores(X: Any, y: Any) -> NDArray[np.float64]:
    """T(y, column) of every column of X, as `foci` scores them in its first step.

    Parameters
    ----------
    X : array_like of shape (n, p)
    y : array_like of shape (n,)
        Not constant.

    Returns
    -------
    ndarray of float64, shape (p,)
        To within 1e-9; `foci` decides between nearly equal columns exactly.

    Raises
    ------
    ValueError
        As `foci`, and for a constant y.
    """
    backend = resolve("auto", X=X, y=y)
    tensors = backend.tensors
    features = as_features(X, "X", allow_1d=False, tensors=tensors)
    clean = clean_rows({"X": features, "y": as_response(y, tensors=tensors)}, "raise").values
    columns = backend.lay_out(clean["X"])
    R, L = backend.ranks(clean["y"])
    response = exact.ResponseSums(R, L)
    if response.constant:
        raise ValueError("y is constant, so T(y, column) is undefined; pass a y that varies")
    _, factors, spans = scaled(columns, "scale", features.label)
    check_overflow(spans, features.label)
    engine = backend.engine(columns, factors, R, "average", 0)
    whole, fraction = engine.score(np.arange(len(factors)))
    sums = whole + fraction / 2.0**exact.FRACTION_BITS
    return (response.n * sums - response.sum_L2) / response.denominator


class _Task:
    """Validated arguments of one selection, and the FOCI loop over an engine."""

    def __init__(
        self,
        backend: BackendLike,
        X: Any,
        y: Any,
        options: dict[str, Any],
        progress: object,
        ranks: AnyRanks,
    ) -> None:
        self.options, self.ranks = options, ranks
        self.backend = resolve(backend, X=X, y=y)
        self.seed: int | None = None  # once something is drawn
        decimals, y_order = options.get("decimals"), options.get("y_order")
        self.level = check_level(
            options["stop"], options.get("alpha"), options.get("n_permutations")
        )
        self.ties: Ties = check_choice(options["ties"], "ties", TIES)
        self.n_neighbors = options.get("n_neighbors", 1)
        check_neighbors(self.n_neighbors, self.ties)
        if self.level is not None and self.n_neighbors > 1:
            raise ValueError(
                f"stop='permutation' takes one neighbour; got n_neighbors={self.n_neighbors}: pass "
                "n_neighbors=1, or another stop"
            )
        self.standardize = check_choice(options["standardize"], "standardize", STANDARDIZE)
        self.progress = check_bool(progress, "progress") and ranks.rank == 0
        self.stop = self.level is not None or check_bool(options["stop"], "stop")
        min_gain = check_real(options["min_gain"], "min_gain", 0)
        self.min_gain = Fraction(min_gain) if min_gain else 0
        if min_gain and not self.stop:
            raise ValueError(
                f"min_gain={min_gain:g} needs stop=True: with stop=False nothing is left out"
            )
        if options["max_features"] is not None:
            check_integer(options["max_features"], "max_features", 1)
        refuse_swapped(X, y)
        if self.level is not None and isinstance(X, BlockTable):
            X = X.beside_work_of(PERMUTATION_BYTES * self.level.n_permutations)
        tensors = self.backend.tensors
        self.features = as_features(
            X,
            "X",
            allow_1d=False,
            tensors=tensors,
            decimals=decimals,
            allow_empty=not isinstance(ranks, OneRank),
        )
        self.target = as_target(y, tensors=tensors, y_order=y_order, decimals=decimals)
        if self.level is not None and self.target.given:
            raise ValueError(
                "stop='permutation' takes one column of y, and y has several: pass one of them, or "
                "another stop"
            )
        self._classes = self.target.nominal and not isinstance(y, Target)

    def begin(self, seed: int | None, checkpoint: Any = None, *, among: bool = False) -> None:
        """Join the ranks of a group, leave rows out, and look for a checkpoint.

        ``among``: every response is going to be a column of X, see `select_for`.
        """
        p, names, options = self.features.values.shape[1], self.features.names, self.options
        self.shard: Shard | None = None
        if not isinstance(self.ranks, OneRank):
            of_y = self.target.values
            y = of_y.values if isinstance(of_y, Features) else of_y
            asked = {**options, "seed": seed, "checkpoint": checkpoint and str(checkpoint), "y": y}
            asked["number of rows of X"] = len(self.features.values)
            if isinstance(options["preselected"], np.ndarray):
                asked["preselected"] = options["preselected"].tolist()
            self.shard = Shard(self.ranks, self.features, asked)
            self.features, p, names = self.shard.features, self.shard.p, self.shard.names
        self.names, self.n_features = names, int(p)
        self.preselected = _check_preselected(options["preselected"], self.n_features, names)
        self.cap = self._most = self.n_features - len(self.preselected) - among
        if options["max_features"] is not None:
            self.cap = min(self.cap, int(options["max_features"]))
        self._leave_out(options["nan_policy"])
        self.checkpoint: Checkpoint | None = None
        if checkpoint is not None:
            text = self.ranks.share_out(
                1, "reading the checkpoint", lambda own: saved_text(checkpoint) if own else None
            )[0]
            self.checkpoint = Checkpoint(checkpoint, text)

    def _leave_out(self, nan_policy: str) -> None:
        """Rows without NaN, in any rank's columns, are left."""
        of_X, of_y = {"X": self.features}, {"y": self.target.values}
        missing = None
        if self.shard is not None:
            with self.ranks.alone("looking for NaN"):
                own = missing_rows(of_X, nan_policy)
            missing = self.shard.missing(own)
        with self.ranks.alone("leaving rows out"):
            if missing is not None:
                missing = missing.beside(missing_rows(of_y, nan_policy))
            self.rows = clean_rows(of_X | of_y, nan_policy, missing=missing)
            if self.rows.n_omitted:
                self.features = self.features._replace(values=self.rows.values["X"])
            self.y = self.rows.values["y"]
            if self._classes:
                check_classes(self.y, True)

    @property
    def p(self) -> int:
        """How many columns X has here."""
        return int(self.features.values.shape[1])

    @property
    def _room(self) -> int:
        """Places for columns of other ranks, at first."""
        return 0 if self.shard is None else ROOM

    def lay_out(self, room: int | None = None) -> Columns:
        """The columns of X, places for those of other ranks, and of y those in distances."""
        X, xp = self.features.values, array_module(self.features.values)
        room = self._room if room is None else room
        if room and isinstance(X, BlockTable):
            X = X.beside(np.zeros((len(X), room), dtype=X.dtype))
        elif room:
            device = {"device": X.device} if is_tensor(X) else {}
            places = xp.zeros((len(X), room), dtype=X.dtype, **device)
            X = xp.concatenate([X, places], axis=1)
        return self.backend.lay_out(self.target.beside(X, self.y))

    def warn_constant(self, columns: Columns) -> None:
        """Warn the caller of constant columns."""
        self.features.warn_constant(constant_columns(columns)[: self.p])
        self.target.warn_constant(self.y)

    def label(self, k: int) -> str:
        """A column of `lay_out()` in a message."""
        if k < self.p:
            return self.features.label(k)
        return self._label_of_y(k - self.p - self._room)

    def _label_of_y(self, k: int) -> str:
        return str(self.target.values.label(k))

    def run(self, columns: Columns, y: Any, seed: int | None) -> FociResult:
        """Select from columns that are X, or X with noise."""
        if (y == y[0]).all():
            warn("y is constant: nothing is selected")
            return self._result(Progress(None, reason="constant_y"), 0.0)
        if self.checkpoint is not None:
            seed = self.checkpoint.seed(seed)
        if self.level is not None or self.ties == "random":
            if seed is None:
                seed = self.ranks.share_out(1, "the seed", lambda _: fresh_seed())[0]
            self.seed = int(seed)
        with self.ranks.alone("scaling the columns"):
            laid = self.scaled(columns)
            candidates, null = self._candidates(laid, y), self._null(y)
        if self.shard is not None:
            self.shard.warn_of_copies(laid)
        progress, base = self._search(candidates, null, self._resume(laid, y))
        if progress.determined:
            with self.ranks.alone("a warning"):
                warn(DETERMINED)
        result = self._result(progress, base)
        _warn_of_blocks(result)
        return result

    def select_for(self, column: int, laid: Laid) -> tuple[FociResult, bool]:
        """Select for a column of X among the others, and say what a warning would.

        `laid` are the columns of X. Several threads may call this at a time. The second value is
        `Progress.determined`.
        """
        y = self.features.values[:, column]
        if (y == y[0]).all():
            return replace(self._result(Progress(None, reason="constant_y"), 0.0), seed=None), False
        candidates, null = self._candidates(laid, y), self._null(y)
        candidates.leave_out(column)
        progress, base = self._search(candidates, null, None)
        return self._result(progress, base), progress.determined

    def scaled(self, columns: Columns) -> Laid:
        """Columns and their factors; warns the caller of columns whose squares underflow."""
        return scaled(columns, self.standardize, self.label, len(self.y))

    def _null(self, y: Any) -> StepNull | None:
        """Permutations of y, where steps are tested by them."""
        if self.level is None or self.seed is None:
            return None
        found = responses(self.backend, y, self.target.nominal)
        in_blocks = isinstance(self.features.values, BlockTable)
        return StepNull(self.backend, found, self.ties, self.seed, self.level, in_blocks)

    def _candidates(self, laid: Laid, y: Any) -> Candidates:
        def make(laid: Laid) -> tuple[Any, Any]:
            return response_engine(
                self.backend, laid.columns, laid.factors, y, self.target.nominal, self.ties,
                tie_seed(self.ties, self.seed), self.n_neighbors, self.target.average,
            )  # fmt: skip

        given = self.target.given
        if self.shard is None:
            return Candidates(make, laid, self.p, given, self.label)
        self.shard.features = self.features
        return ShardedCandidates(self.shard, self.lay_out, make, laid, given, self._label_of_y)

    def _resume(self, laid: Laid, y: Any) -> Progress | None:
        """How far an earlier call came that had a checkpoint."""
        if self.checkpoint is None:
            return None
        with self.ranks.alone("reading X"):
            word = word_of(laid.columns, len(y), self.p, self.features.first)
            of_y = digest(y)
        word = word if self.shard is None else self.shard.total(word)
        later = ("nan_policy", "max_features")  # which steps do not depend on
        asked = {name: value for name, value in self.options.items() if name not in later}
        asked["preselected"] = list(self.preselected)
        shape = f"{len(y)} rows and {self.n_features} columns of {laid.factors.dtype}"
        of = {
            "lcodec_ext": __version__,
            **asked,
            "seed": self.seed,
            "X": f"{shape}, digest {word:016x}",
            "y": of_y,
        }
        before = self.checkpoint.resume(json_ready(of))
        if before is not None and (len(before.steps) > self.cap or before.reason == "max_features"):
            del before.steps[self.cap :], before.tests[self.cap :]
            before.reason = before.not_taken = None
        return before

    def _search(
        self, candidates: Candidates, null: StepNull | None, before: Progress | None
    ) -> tuple[Progress, float]:
        """The greedy loop: score all candidates, decide exactly, go on or stop.

        Returns how it ended, and T of the preselected columns.
        """
        response = candidates.response
        m = response.start
        for column in self.preselected:
            m = candidates.add(column, measure=column == self.preselected[-1])
        base = response.value(m)
        progress = Progress(m) if before is None else before
        if progress.reason is None:
            for column, _, _ in progress.steps:
                candidates.add(column)
        with self.ranks.alone("showing the progress"):
            shown = progress_bar(self.progress, total=candidates.count, unit="column")
        with shown as bar:
            self._look_at_cap(progress)
            while progress.reason is None:
                go_on()
                self._step(candidates, null, progress, bar if self.progress else None)
                self._save(progress)
        return progress, base

    def _save(self, progress: Progress) -> None:
        if self.checkpoint is not None:
            with self.ranks.alone("writing the checkpoint"):
                if self.ranks.rank == 0:
                    self.checkpoint.write(progress)

    def _step(
        self, candidates: Candidates, null: StepNull | None, progress: Progress, bar: Any
    ) -> None:
        """Take the best column, or end."""
        response, m = candidates.response, progress.m
        # columns without a gain are compared only if one of them must be taken
        floor = response.floor(m) if self.stop and null is None else 0
        best, m_best = candidates.best(floor, bar, len(progress.steps) + 1) or (-1, m)
        if null is not None:
            test = candidates.test(null, response.unconditional(m_best) - response.unconditional(m))
            reached = response.value(m) + test.threshold
            progress.tests.append(test._replace(threshold=reached))
        progress.reason = self._ending(response, m_best, progress)
        if progress.reason is not None:
            progress.not_taken = best
            return
        T = response.value(m_best)
        conditioned = bool(self.preselected or progress.steps)
        step = response.conditional(m_best, m) if conditioned else T
        progress.determined |= step is None
        progress.steps.append((best, T, 1.0 if step is None else float(step)))
        progress.m = m_best
        self._look_at_cap(progress)
        if progress.reason is None:
            candidates.add(best)

    def _look_at_cap(self, progress: Progress) -> None:
        """End where no further step may be taken."""
        if len(progress.steps) >= self.cap and progress.reason is None:
            progress.reason = "exhausted" if self.cap == self._most else "max_features"

    def _ending(self, response: Any, m_best: Any, progress: Progress) -> StopReason | None:
        """Why the best step is not taken; None if it is."""
        if self.stop and not response.gains(m_best, progress.m, self.min_gain):
            return "min_gain" if response.gains(m_best, progress.m, 0) else "no_gain"
        if self.level is not None and progress.tests[-1].pvalue > self.level.alpha:
            return "not_significant"
        return None

    def _result(self, progress: Progress, base: float) -> FociResult:
        steps, tests, names = progress.steps, progress.tests, self.names
        # without tests it was compared with nothing
        not_taken = None if self.level is None else progress.not_taken
        ordering = [column for column, _, _ in steps]
        return FociResult(
            ordering=np.array(ordering, dtype=np.int64),
            cumulative=np.array([T for _, T, _ in steps], dtype=np.float64),
            conditional=np.array([T for _, _, T in steps], dtype=np.float64),
            base=base,
            stop_reason=progress.reason,
            names=None if names is None else [names[column] for column in ordering],
            preselected=self.preselected,
            preselected_names=None if names is None else [names[k] for k in self.preselected],
            n_samples=self.features.values.shape[0],
            n_features=self.n_features,
            n_omitted=self.rows.n_omitted,
            missing=self.rows.missing,
            threshold=self._of_tests(tests, "threshold"),
            pvalues=self._of_tests(tests, "pvalue"),
            exchangeability_pvalues=self._of_tests(tests, "exchangeability"),
            not_taken=not_taken,
            not_taken_name=None if names is None or not_taken is None else names[not_taken],
            seed=self.seed,
        )

    def _of_tests(self, tests: Sequence[StepTest], name: str) -> NDArray[np.float64] | None:
        return None if self.level is None else np.array([getattr(each, name) for each in tests])


def _warn_of_blocks(result: FociResult) -> None:
    """Say once that steps were taken by a test whose assumption does not hold."""
    kept, doubtful = result.exchangeability_pvalues, result._doubtful
    if kept is None or not doubtful:
        return
    which = first_few([result._label(k) for k in doubtful], 5)
    warn(
        "y follows the selected columns even within the blocks of near rows in which it is "
        f"permuted (p-value {kept[doubtful[0]]:.3g} that it does not), when {which} "
        f"{'was' if len(doubtful) == 1 else 'were'} selected: chance may take such a step more "
        "often than alpha says; pass more rows, or look at these columns by `stability`",
    )


def _check_preselected(
    preselected: Sequence[int | str] | None, p: int, names: list[str] | None
) -> tuple[int, ...]:
    """Indices of the preselected columns, distinct and in range."""
    if preselected is None:
        return ()
    if isinstance(preselected, str | bytes) or not isinstance(preselected, Sequence | np.ndarray):
        raise TypeError(
            "preselected must be a list of column indices or names; got "
            f"{preselected!r} ({type(preselected).__name__}): pass [{preselected!r}] for one column"
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
