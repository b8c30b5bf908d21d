"""Columns of one table that are spread over the ranks of a process group.

Every rank has some columns, which may be none; in the order of ranks they are the table. A rank
scores its own columns, and hears of the others' only what is selected.
"""

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._arrays import array_module, is_tensor
from lcodec_ext._callers import warn
from lcodec_ext._files import short_digest
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import Laid, Leaders
from lcodec_ext.dependence.candidates import Candidates, Make
from lcodec_ext.dependence.foci_null import StepNull, StepTest
from lcodec_ext.dependence.table import Features, Missing

if TYPE_CHECKING:
    from lcodec_ext._torch.group import Ranks

ROOM = 16  # places behind a shard's columns for those of other shards, at first


class Shard:
    """Which columns of the whole table this rank has.

    Parameters
    ----------
    ranks : Ranks
    features : Features
        The own columns.
    asked : dict
        What must be equal on all ranks, for `Ranks.agree`.

    Attributes
    ----------
    features : Features
        The own columns, with the index of the first one in the whole table.
    p : int
        Columns of the whole table.
    names : list of str or None
        Their names.
    """

    def __init__(self, ranks: "Ranks", features: Features, asked: Mapping[str, Any]) -> None:
        self.ranks = ranks
        p = features.values.shape[1]
        ranks.agree(asked)
        dtype = str(features.values.dtype).removeprefix("torch.")
        own = {"p": int(p), "dtype": dtype, "names": features.names}
        told = [json.loads(text) for text in ranks.gather_bytes(json.dumps(own).encode())]
        used = [r for r, each in enumerate(told) if each["p"]]
        if not used:
            raise ValueError("X must have at least one column on some rank; got none on all ranks")
        for r in used[1:]:
            self._expect_alike("dtype", used[0], r, *(told[k]["dtype"] for k in (used[0], r)))
            named = ["names" if told[k]["names"] else "no names" for k in (used[0], r)]
            self._expect_alike("kind of columns", used[0], r, *named)
        self._ends = np.cumsum([each["p"] for each in told])
        self.p = int(self._ends[-1])
        self.names: list[str] | None = None
        if told[used[0]]["names"]:
            self.names = [name for r in used for name in told[r]["names"]]
        values, dtype = features.values, told[used[0]]["dtype"]
        if p == 0:
            values = array_module(values).asarray(
                values, dtype=getattr(array_module(values), dtype)
            )
        first = int(self._ends[ranks.rank]) - p
        self.features = features._replace(values=values, first=first)

    @staticmethod
    def _expect_alike(what: str, one: int, other: int, a: str, b: str) -> None:
        if a != b:
            raise ValueError(
                f"X must have the same {what} on all ranks that have columns: rank {one} has {a}, "
                f"rank {other} has {b}"
            )

    def owner(self, column: int) -> int:
        """The rank that has a column."""
        return int(np.searchsorted(self._ends, column, side="right"))

    def label(self, column: int) -> str:
        """A column of the whole table in a message."""
        return Features(None, self.names, self.features.argument).label(column)

    def warn_of_copies(self, laid: Laid) -> None:
        """Warn where two ranks have the same columns, which then count twice.

        Ranges and factors of all are compared, and the values of the first. One gather.
        """
        own = b""
        with self.ranks.alone("comparing the shards"):
            if p := self.features.values.shape[1]:
                columns = laid.columns
                first = columns.take([0])
                first = first.cpu().numpy() if is_tensor(first) else first
                parts = [columns.low[:p], columns.high[:p], laid.factors[:p], first[:, 0]]
                own = short_digest(np.concatenate(parts)).encode()
        told = self.ranks.gather_bytes(own)
        for rank, word in enumerate(told):
            if word and told.index(word) < rank:
                with self.ranks.alone("a warning"):
                    warn(
                        f"ranks {told.index(word)} and {rank} of the group have the same columns "
                        "of X, which count twice: pass each rank its own part of the table"
                    )
                return

    def missing(self, own: Missing) -> Missing:
        """Rows with a NaN in the columns of any rank, and how many NaN those of all ranks have."""
        told = self.ranks.gather_bytes(json.dumps(own.counts).encode() if own.counts else b"")
        if not any(told):
            return own
        values = self.features.values
        flags = np.zeros(len(values), dtype=np.uint8)
        if own.rows is not None:
            flags[:] = own.rows.cpu().numpy() if is_tensor(own.rows) else own.rows
        rows: Any = self.ranks.gather(flags).any(axis=0)
        if is_tensor(values):
            rows = array_module(values).from_numpy(rows).to(values.device)
        counts: dict[str, int] = {}
        for text in told:
            counts |= json.loads(text or b"{}")
        return Missing(rows, counts)

    def total(self, word: int) -> int:
        """The sum over ranks of words of 64 bits, as such a word."""
        words = np.array([word], dtype=np.uint64).view(np.int64)
        return int(self.ranks.gather(words).view(np.uint64).sum())


class ShardedCandidates(Candidates):
    """The columns of all ranks: each scores its own, and conditions on those of all.

    A column that is selected takes a place behind the own columns of the ranks that do not have it.

    Parameters
    ----------
    shard : Shard
    lay_out : callable
        The own table with so many places behind the columns of X.
    make, laid, given
        As in `Candidates`; `laid` has ROOM places.
    label : callable
        What messages call a column of y that is in distances.
    """

    def __init__(
        self,
        shard: Shard,
        lay_out: Callable[[int], Any],
        make: Make,
        laid: Laid,
        given: int,
        label: Callable[[int], str],
    ) -> None:
        self._shard, self._ranks, self._lay_out = shard, shard.ranks, lay_out
        self._p = shard.features.values.shape[1]
        self._room = ROOM
        self._foreign: list[tuple[int, NDArray]] = []  # of the places: index in the table, values
        self._due: list[tuple[int, NDArray]] = []  # columns heard of, and not yet conditioned on
        self._of_all = shard.p
        self._label_of_y = label
        super().__init__(make, laid, self._p, given, self._label)

    def _label(self, place: int) -> str:
        if place < self._p:
            return self._shard.features.label(place)
        if place < self._p + self._room:
            return self._shard.label(self._foreign[place - self._p][0])
        return self._label_of_y(place - self._p - self._room)

    @property
    def count(self) -> int:
        """How many columns of all ranks are left to select from."""
        return self._of_all

    def add(self, column: int, *, measure: bool = False) -> Any:
        """See `Candidates`, by the index in the whole table. One broadcast of n + 1 numbers."""
        owner = self._shard.owner(column)
        columns, factors, _ = self.laid
        told = np.full(len(self._shard.features.values) + 1, np.nan, dtype=factors.dtype)
        failure: Exception | None = None
        if owner == self._ranks.rank:
            place = column - self._shard.features.first
            try:
                values = columns.take([place])[:, 0]
                told[:-1] = values.cpu().numpy() if is_tensor(values) else values
                told[-1] = factors[place]
            except Exception as error:  # told to all by a factor that is not a number
                failure = error
        told = self._ranks.broadcast_array(told, owner)
        if np.isnan(told[-1]):
            with self._ranks.alone("reading a column"):
                if failure is not None:
                    raise failure
        self._due.append((column, told))
        self._of_all -= 1
        if not measure:
            return None
        with self._ranks.alone("conditioning on a column"):
            return self._catch_up(measure=True)

    def _catch_up(self, *, measure: bool = False) -> Any:
        """Condition on the columns that were heard of; the exact sum beside the last one."""
        found = None
        while self._due:
            column, told = self._due.pop(0)
            own = column - self._shard.features.first
            place = own if 0 <= own < self._p else self._put(column, told)
            found = super().add(place, measure=measure and not self._due)
        return found

    def _put(self, column: int, told: NDArray) -> int:
        """Give a column of another rank a place; the place."""
        if len(self._foreign) == self._room:
            self._enlarge()
        place = self._p + len(self._foreign)
        values, factor = told[:-1], told[-1]
        self._foreign.append((column, values))
        with np.errstate(over="ignore", under="ignore"):
            scaled = (values.max() - values.min()) * factor
            self._reach.spans[place] = scaled * scaled
        self._reach.far = False
        self.laid.factors[place] = factor
        if not self.laid.columns.put(place, values):
            self.replace(self.laid)
        return place

    def _enlarge(self) -> None:
        """Lay out the table with twice as many places."""
        more, end = np.zeros(self._room, dtype=self.laid.factors.dtype), self._p + self._room
        self._room *= 2
        factors = self.laid.factors
        columns = self._lay_out(self._room)
        for place, (_, values) in enumerate(self._foreign, self._p):
            columns.put(place, values)
        self._reach.spans = np.concatenate([self._reach.spans, more])
        factors = np.concatenate([factors[:end], more, factors[end:]])
        self.replace(Laid(columns, factors, self._reach.spans))

    def best(self, floor: int, bar: Any, step: int) -> tuple[int, Any] | None:
        """See `Candidates`, over all ranks: one gather of four integers.

        Where these do not hold the largest sums exactly, those of the ranks that may have the
        largest one are compared, as text.
        """
        failure, leaders = None, None
        told = np.full(4, -1, dtype=np.int64)
        try:
            self._catch_up()
            leaders = self.leaders(floor, bar, step)
            told[:] = 0, *self._leader(leaders)
        except Exception as error:  # told to all by a state of -1
            failure = error
        state, column, whole, fraction = self._ranks.gather(told).T
        if (state < 0).any():
            with self._ranks.alone("scoring the columns"):
                if failure is not None:
                    raise failure
        ahead, whole, fraction = exact.contenders(np.arange(len(whole)), whole, fraction)
        if len(ahead) == 0:
            return None
        if (fraction == 0).all():  # exact, and so equal
            return int(column[ahead[0]]), Fraction(int(whole[0]))
        return self._compared(ahead.tolist(), leaders)

    def _leader(self, leaders: Leaders) -> tuple[int, int, int]:
        """The first of the leaders that are ahead, and its score: (-1, -1, -1) without any.

        A fraction is not 0 if that of any leader is not.
        """
        columns, whole, fraction = leaders
        if len(columns) == 0:
            return -1, -1, -1
        unit = 1 << exact.FRACTION_BITS
        high, low = whole + (fraction >> exact.FRACTION_BITS), fraction & (unit - 1)
        top = np.lexsort((-columns, low, high))[-1]
        column = self._shard.features.first + int(columns[top])
        return column, int(whole[top]), int(fraction[top]) or int((fraction != 0).any())

    def _compared(self, ahead: list[int], leaders: Leaders | None) -> tuple[int, Any] | None:
        """The best of some ranks' leaders, by their exact sums."""
        own = b""
        with self._ranks.alone("comparing the leaders"):
            if self._ranks.rank in ahead and leaders is not None:
                found = self.exact_best(leaders)
                if found is not None:
                    column = self._shard.features.first + found[0]
                    own = json.dumps([column, exact.written(found[1])]).encode()
        told = [json.loads(text) for text in self._ranks.gather_bytes(own) if text]
        sums = {column: exact.read(text) for column, text in told}
        if not sums:
            return None
        best = max(sums, key=lambda column: self.response.unconditional(sums[column]))
        return best, sums[best]

    def test(self, null: StepNull, gain: Fraction) -> StepTest:
        """See `Candidates`, over all ranks: gathers of 8 bytes and of 1 byte a permutation."""
        with self._ranks.alone("permuting y"):
            own = self.chance(null, gain)
        largest = self._ranks.gather(own.largest).max(axis=0)
        reached = self._ranks.gather(own.reached.view(np.uint8)).max(axis=0)
        return null.judge(own._replace(largest=largest, reached=reached > 0))
