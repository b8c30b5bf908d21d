"""What a backend offers: a laid-out table, an engine for the FOCI loop, neighbours and ranks."""

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.path_sums import PathSums, RankSums

Ties = Literal["average", "random", "first"]
TIES: tuple[Ties, ...] = ("average", "random", "first")  # a rule's position is its number in _core

Scores = tuple[NDArray[np.int64], NDArray[np.int64]]
Leaders = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


RowNumbers = NDArray[np.int32]


class Pairs(NamedTuple):
    """Pairs of rows in segments, and groups of rows all of whose pairs count.

    The sum of a segment is that of min(R_i, R_j) over its pairs (i, j), and over the pairs of all
    rows of each of its groups.

    Attributes
    ----------
    begin : int64 of shape (segments + 1,)
        Segment s has the pairs ``begin[s]`` to ``begin[s + 1] - 1``.
    owner : int32 of shape (pairs,)
        First row of each pair. Empty: pair t of a segment is of row t.
    other : int32 of shape (pairs,)
        Second row.
    label : int32 of shape (labelings, n)
        Group of each row in each labeling, or -1.
    size, segment : int32 of shape (groups,)
        Rows of each group, and the segment that its sum belongs to.
    """

    begin: NDArray[np.int64]
    owner: RowNumbers
    other: RowNumbers
    label: RowNumbers
    size: RowNumbers
    segment: RowNumbers


class Columns(Protocol):
    """A table as a backend lays it out."""

    @property
    def values(self) -> Any:
        """The table: an array, or a tensor on a device."""

    @property
    def low(self) -> NDArray:
        """Smallest value of every column."""

    @property
    def high(self) -> NDArray:
        """Largest value of every column."""

    def standard_deviations(self) -> NDArray[np.float64]:
        """Standard deviations (n - 1) in double, the same bits on every backend."""

    def take(self, columns: list[int]) -> Any:
        """Some of the columns, an array or tensor of shape (n, k)."""

    def put(self, column: int, values: NDArray) -> bool:
        """Put other values in a column's place; whether engines made before see them."""


class Laid(NamedTuple):
    """A table that a backend has laid out, and what each column is multiplied by.

    ``spans`` are the squared distances along each column from its smallest value to its largest.
    """

    columns: Columns
    factors: NDArray
    spans: NDArray


class Engine(ABC):
    """Scores candidate columns given the selected ones; the loop around it stays in Python."""

    piece: int  # how many candidates are scored at a time where a progress bar shows them

    @abstractmethod
    def select(self, column: int) -> None:
        """Add a column to the conditioning set, behind those already there."""

    @abstractmethod
    def row_sums(self, column: int) -> tuple[Any, Any]:
        """Per row: sum of min(R_i, R_j) over the neighbours used, and how many they are.

        The neighbours are those in the selected columns and ``column`` behind them. Arrays, or
        tensors on the columns' device.
        """

    @abstractmethod
    def exact_sum(self, column: int) -> Fraction:
        """The total over rows of the mean of min(R_i, R_j)."""

    @abstractmethod
    def score(self, columns: NDArray[np.int64], floor: int | None = None) -> Scores:
        """For every candidate `exact_sum` in fixed point, whole and fraction.

        With a floor, an engine may report -1 as the whole of a candidate that cannot win: one that
        is not above the floor, or is below another candidate.
        """

    @abstractmethod
    def score_all(self) -> tuple[Any, Any]:
        """The scores of all p columns, -1 as the whole of selected ones.

        Arrays, or tensors on the columns' device.
        """

    @abstractmethod
    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        """The candidates that may have the largest exact sum, in any order, and their scores.

        All candidates with the largest sum are among them, and possibly a few others. The result
        may be empty if no sum exceeds the floor.
        """


class HostEngine(Engine):
    """An engine whose sums are NumPy arrays."""

    piece = 1024  # each piece looks up the rows' neighbours again, which must stay cheap

    def __init__(self, p: int) -> None:
        self._p = p
        self._selected: list[int] = []

    def select(self, column: int) -> None:
        self._selected.append(column)

    def exact_sum(self, column: int) -> Fraction:
        return exact.total(*self.row_sums(column))

    def score_all(self) -> Scores:
        left = np.setdiff1d(np.arange(self._p), self._selected)
        scores = np.full((2, self._p), -1, dtype=np.int64)
        scores[:, left] = self.score(left)
        return scores[0], scores[1]

    def leaders(self, columns: NDArray[np.int64], floor: int | None = None) -> Leaders:
        return exact.contenders(columns, *self.score(columns, floor))


class Backend(ABC):
    """One execution of the dependence measures. All of them return the same bits."""

    tensors: bool  # whether data stay tensors, or are made NumPy arrays

    @abstractmethod
    def lay_out(self, X: Any) -> Columns:
        """The columns of a clean (n, p) table."""

    def share(self, columns: Any) -> None:  # noqa: B027
        """Prepare columns for engines of several responses, where that saves time."""

    @abstractmethod
    def engine(self, columns: Any, factors: Any, R: Any, ties: Ties, seed: int) -> Engine:
        """An engine for columns that this backend laid out.

        Parameters
        ----------
        columns : Columns
        factors : array of shape (p,)
            Scaling factor of every column, in the columns' dtype.
        R : integers of shape (n,)
            Max ranks of the response, from 1 to n.
        ties : {"average", "random", "first"}
        seed : int
            Used by ties="random".
        """

    @abstractmethod
    def nearest(self, columns: Any, ties: Ties, seed: int, factors: Any = None) -> tuple[Any, Any]:
        """(indptr, indices) of the nearest other rows that the tie rule uses.

        Distances along every column are multiplied by its factor, if there are factors.
        """

    @abstractmethod
    def permuted_sums(
        self, pairs: Pairs, R: Any, start: RowNumbers | None, seed: int, count: int, first: int = 0
    ) -> NDArray[np.int64]:
        """Sums of minima under permutations of a response, shape (count, segments).

        Parameters
        ----------
        pairs : Pairs
        R : integers of shape (n,)
            Max ranks of the response.
        start : int32 of shape (n,), optional
            Where the block of each row begins; rows change places within their blocks.
        seed, count, first : int
            `count` permutations of `_random.permutation` from the `first` one on; 0 leaves the rows
            as they are.
        """

    @abstractmethod
    def permutations(
        self, n: int, start: RowNumbers | None, seed: int, first: int, count: int
    ) -> NDArray:
        """Whose value every row gets under `count` permutations from the `first` one on.

        int32 or int64 of shape (count, n), on the host.
        """

    @abstractmethod
    def nearest_minima(
        self, columns: Any, factors: Any, used: list[int], R: Any, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(whole, rest, tied): of each row the sum of min(R_i, R_j) over the k nearest rows.

        Distances are those of the columns `used`, in their order. ``tied`` rows are at the k-th
        smallest distance; if r of them are wanted besides the nearer ones, each counts
        r / tied. The sum is ``whole + rest / tied``, with rest < tied; k < n.
        """

    @abstractmethod
    def ranks(self, y: Any) -> tuple[Any, Any]:
        """Max ranks of a response: all that the coefficients know of y.

        Parameters
        ----------
        y : array of shape (n,)
            Finite numbers of any real dtype; compared as they are, never converted.

        Returns
        -------
        R, L : int64 of shape (n,)
            ``R[i] = #{j : y[j] <= y[i]}`` and ``L[i] = #{j : y[j] >= y[i]}``. Tied values share a
            rank; an ordinal rank from ``argsort`` would jitter them (0.626 for 0.960 on three
            classes).
        """


class HostBackend(Backend):
    """A backend on NumPy arrays, which also has the sums behind xi."""

    tensors = False

    @abstractmethod
    def xi_sums(
        self, X: NDArray[np.float64], Y: NDArray[np.float64], ties: Ties, seed: int
    ) -> tuple[list[PathSums], list[RankSums]] | None:
        """The sums behind xi of every column x and every response y.

        Parameters
        ----------
        X, Y : float64 of shape (n,), or (k, n) and (m, n)
            C-contiguous. None is returned if a value is not finite.
        ties : {"average", "random", "first"}
            In what order rows of equal x come; with "average" in all of them.
        seed : int
            For ties="random": rows of equal x come in the order of their `tie_hash`.
        """
