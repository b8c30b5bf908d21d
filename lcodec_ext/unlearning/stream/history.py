"""What the entries of a ledger add up to: which samples are removed, what can be restored."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lcodec_ext._checks import counted
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.privacy import Guarantee, PrivacyBudget
from lcodec_ext.unlearning.stream.checkpoints import LedgerError, checkpoint_name
from lcodec_ext.unlearning.stream.contents import Contents, has_contents
from lcodec_ext.unlearning.stream.ledger import FORMAT, KINDS, Entry


@dataclass(frozen=True)
class Point:
    """What later entries need to know of one.

    `parent` is the entry to whose removals this one adds its own: the one before, or the one that
    was rolled back to.
    """

    removed: tuple[int, ...]
    skipped: tuple[int, ...]
    parent: int
    checkpoint: str
    sha256: str

    @property
    def is_request(self) -> bool:
        """Whether it asked for samples to be removed."""
        return bool(self.removed or self.skipped)


class History:
    """What the entries so far add up to."""

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}  # the record of the first entry
        self.points: list[Point] = []  # one for each entry
        self.hashes: dict[int, str] = {}  # of the samples that were ever asked for
        self.groups: list[tuple[int, dict[str, Any]]] = []  # asked for, and by which entry
        self._owners: dict[int, int | str] = {}  # the groups of their samples
        self.removed: dict[int, None] = {}  # in the order of the requests
        self.pending: dict[int, None] = {}  # asked for and not removed
        self.budget: PrivacyBudget | None = None  # a rollback brings nothing back

    # -- taking in entries

    def add(self, entry: Entry) -> None:
        """Take in the next entry; LedgerError if it cannot follow those before it."""
        try:
            self._add(entry)
            return
        except LedgerError as error:
            problem = str(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"its record lacks something, or has it of a wrong type ({error!r})"
        raise LedgerError(f"line {entry.number + 1} of the ledger: {problem}")

    def _add(self, entry: Entry) -> None:
        record, number = entry.record, entry.number
        if (entry.kind == "start") != (number == 0) or entry.kind not in KINDS:
            raise LedgerError(f"an entry {number} cannot be of kind {entry.kind!r}")
        if number == 0:
            self._begin(record)
        removed, skipped = self._asked_for(entry)
        parent = record["to"] if entry.kind == "rollback" else number - 1
        if entry.kind == "rollback" and not 0 <= parent < number:
            raise LedgerError(f"it goes back to entry {parent}, which does not precede it")
        if entry.kind == "release":
            self._pay(record)
        checkpoint = record["checkpoint"]
        point = Point(removed, skipped, parent, checkpoint["file"], checkpoint["sha256"])
        self._check_weights(entry, point)
        self.points.append(point)
        if entry.kind == "rollback":
            self.removed, self.pending = self.at(number)
        else:
            _take_in(point, self.removed, self.pending)
        if record["n_removed"] != len(self.removed) or record["n_pending"] != len(self.pending):
            raise LedgerError(
                f"after it {counted(len(self.removed), 'sample')} "
                f"{'is' if len(self.removed) == 1 else 'are'} removed and {len(self.pending)} "
                f"pending; it says {record['n_removed']} and {record['n_pending']}"
            )

    def _begin(self, record: dict[str, Any]) -> None:
        if record["format"] != FORMAT:
            raise LedgerError(f"its format is {record['format']!r}; this version reads {FORMAT}")
        self.start = record
        int(record["keep"]), int(record["train"]["n"])
        if record["budget"] is not None:
            self.budget = PrivacyBudget.from_dict(record["budget"])

    def _asked_for(self, entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The samples that an entry removed, and those that it skipped."""
        record = entry.record
        ids: tuple[int, ...] = ()
        skipped: tuple[int, ...] = ()
        if entry.kind in ("remove", "skip"):
            ids, skipped = tuple(record["ids"]), tuple(record["skipped"])
            if not set(skipped) <= set(ids) or (entry.kind == "skip") != (len(skipped) == len(ids)):
                raise LedgerError(f"it lists {skipped} as skipped, but asked for {ids}")
        times, stay = Counter(ids), set(skipped)
        for i, sha256 in zip(ids, record.get("hashes", ()), strict=True):
            if not 0 <= i < self.start["train"]["n"] or i in self.removed or times[i] > 1:
                raise LedgerError(f"it removes sample {i}, which is not retained")
            if self.hashes.setdefault(i, sha256) != sha256:
                raise LedgerError(f"sample {i} has another content than in an entry before")
        if ids:
            self._check_groups(entry.number, record.get("groups", ()), times)
        return tuple(i for i in ids if i not in stay), skipped

    def _check_groups(self, number: int, groups: Sequence[Any], asked: Counter[int]) -> None:
        """Take note of the groups that an entry names; only `verify_ledger` knows all of one."""
        if groups and self.start.get("groups") is None:
            raise LedgerError("it names groups, and the stream has none")
        seen: set[int] = set()
        for each in groups:
            one, samples, before = each["id"], each["samples"], each["before"]
            if not samples or not all(i in asked for i in samples) or seen & set(samples):
                raise LedgerError(f"group {one!r} has {samples}, which it does not ask for once")
            if not all(i in self.removed for i in before):
                raise LedgerError(f"of group {one!r}, {before} were not removed before")
            for i in (*samples, *before):
                if self._owners.setdefault(i, one) != one:
                    raise LedgerError(f"sample {i} is of another group than in an entry before")
            seen |= set(samples)
            self.groups.append((number, each))

    def _pay(self, record: dict[str, Any]) -> None:
        if self.budget is None:
            raise LedgerError("there is no budget for a release")
        spend(self.budget, Guarantee.from_dict(record["guarantee"]))
        if self.budget.to_dict() != record["budget"]:
            raise LedgerError("what is left of the privacy budget is not what its guarantee leaves")

    def _check_weights(self, entry: Entry, point: Point) -> None:
        new = entry.kind in ("start", "remove", "rollback")
        expected = checkpoint_name(entry.number) if new else self.points[-1].checkpoint
        if point.checkpoint != expected:
            raise LedgerError(f"it cannot have the checkpoint {point.checkpoint!r}")
        same = entry.kind not in ("start", "remove")
        if same and point.sha256 != self.points[point.parent].sha256:
            raise LedgerError(f"its weights differ from those of entry {point.parent}")

    # -- what they add up to

    def _path(self, number: int) -> list[int]:
        """An entry and those it builds on, the first one first."""
        path = []
        while number >= 0:
            path.append(number)
            number = self.points[number].parent
        return path[::-1]

    def at(self, number: int) -> tuple[dict[int, None], dict[int, None]]:
        """The samples removed and pending after an entry."""
        removed: dict[int, None] = {}
        pending: dict[int, None] = {}
        for k in self._path(number):
            _take_in(self.points[k], removed, pending)
        return removed, pending

    def steps(self, number: int) -> list[int]:
        """The entries whose steps led to the weights of an entry, in their order."""
        return [k for k in self._path(number) if self.points[k].removed]

    def kept(self) -> set[str]:
        """The checkpoints that are to be kept: the original and the newest."""
        names: set[str] = set()
        for point in reversed(self.points):
            names.add(point.checkpoint)
            if len(names) == self.start["keep"]:
                break
        return names | {point.checkpoint for point in self.points[:1]}

    def before_last_request(self) -> int:
        """The entry that the newest request started from; ValueError if there is no request."""
        number = len(self.points) - 1
        while number >= 0 and not self.points[number].is_request:
            number = self.points[number].parent
        if number < 0:
            raise ValueError("there is no request to roll back")
        return self.points[number].parent

    def check_kept(self, number: int) -> None:
        """Raise ValueError if the weights of an entry are no longer kept."""
        kept = self.kept()
        if self.points[number].checkpoint not in kept:
            there = [k for k, point in enumerate(self.points[:-1]) if point.checkpoint in kept]
            raise ValueError(
                f"the weights of entry {number} are no longer kept (keep={self.start['keep']}); "
                f"those of entries {', '.join(map(str, there))} are"
            )

    def mismatch(
        self,
        train: Samples,
        hashes: Sequence[str] | None = None,
        contents: Contents | None = None,
    ) -> str | None:
        """Why these are not the training data on record; None if nothing differs.

        All samples are compared if they are in memory, else a probe of them and the removed ones.
        With the hashes of all, these are compared.
        """
        n = self.start["train"]["n"]
        if len(train) != n:
            return (
                f"train has {len(train)} samples, on record are {n}: give the data as they were, "
                "with the removed samples"
            )
        if not has_contents(train, self.start["train"], hashes, contents):
            return "train has other contents, or another order, than the data on record"
        for i, sha256 in self.hashes.items():
            if (train.hashes([i])[0] if hashes is None else hashes[i]) != sha256:
                return f"sample {i} of train has another content than the removed one on record"
        return None


def _take_in(point: Point, removed: dict[int, None], pending: dict[int, None]) -> None:
    for i in point.removed:
        pending.pop(i, None)
        removed[i] = None
    pending.update(dict.fromkeys(point.skipped))


def spend(budget: PrivacyBudget, guarantee: Guarantee) -> None:
    """Pay for a release."""
    epsilon, delta, sensitivity = guarantee.epsilon, guarantee.delta, guarantee.sensitivity
    if epsilon is None or delta is None or sensitivity is None:
        raise ValueError("a release without noise cannot be paid for")
    ratio = sensitivity / guarantee.sigma if guarantee.sigma else None
    budget.spend(epsilon, delta, ratio=ratio)
