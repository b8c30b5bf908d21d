"""Whom samples belong to, and control groups of whole users."""

import difflib
import hashlib
import json
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lcodec_ext._checks import at_most, first_few

Id = int | str  # of a user, a device, a source: whoever may ask

FEWEST = 4  # control groups
_OFF = 0.25  # of a request's size, that a control group of whole users may be off
_LISTED = 10  # ids in an error message
_COMPARED = 100_000  # ids that a wrong one is compared with


def samples_of(labels: Any, value: Any) -> list[int]:
    """The numbers of the samples that have a label: all of a class, or of one identity.

    Parameters
    ----------
    labels : array_like or Tensor, shape (n,)
        Of every training sample: its class, the person it shows, the user it came from.
    value : object
        The one to delete.
    """
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if array.ndim != 1:
        raise ValueError(f"labels must have one entry per sample; got shape {array.shape}")
    found = np.flatnonzero(array == value)
    if not len(found):
        raise ValueError(f"no sample has the label {value!r}")
    return found.tolist()


@dataclass(frozen=True, eq=False)
class Groups:
    """Ids of those whom samples belong to: all integers or all strings."""

    ids: tuple[Id, ...]  # in the order in which they first appear
    members: NDArray[np.int64]  # (n,): for each sample, the place of its id in ids

    @classmethod
    def of(cls, given: Any, n: int, whose: str) -> "Groups":
        """Take the ids of n samples as they were given, one for each, and check them."""
        if isinstance(given, Groups):
            return given
        values = _listed(given, n)
        if len(values) != n:
            raise ValueError(
                f"groups must have one id for each sample of {whose}, {n:,}; got {len(values):,}"
            )
        places: dict[Id, int] = {}
        members = np.empty(n, np.int64)
        for k, value in enumerate(values):
            members[k] = places.setdefault(_checked(value, f"groups[{k}]"), len(places))
        ids = tuple(places)
        if len({type(each) for each in ids}) > 1:
            raise TypeError(
                "groups must be all integers or all strings, or 17 and '17' would be two users; "
                f"got {_two_kinds(ids)}"
            )
        return cls(ids, members)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.ids)

    def each(self) -> list[Id]:
        """The id of each sample."""
        return [self.ids[place] for place in self.members.tolist()]

    def sha256(self) -> str:
        """A hash of the id of every sample, in their order."""
        digest = hashlib.sha256()
        lines = [json.dumps(each).encode() + b"\n" for each in self.ids]
        for place in self.members.tolist():
            digest.update(lines[place])
        return digest.hexdigest()

    def samples(self, one: Id) -> list[int]:
        """The numbers of the samples of a group, ascending."""
        return samples_of(self.members, self._places[one])

    @cached_property
    def _places(self) -> dict[Id, int]:
        return {one: k for k, one in enumerate(self.ids)}

    def subset(self, some: Sequence[int] | NDArray[np.int64]) -> "Groups":
        """Of some of the samples, numbered from 0."""
        return Groups(self.ids, self.members[np.asarray(some, np.int64)])

    def gone(self, removed: Iterable[int]) -> tuple[Id, ...]:
        """The groups all of whose samples are removed."""
        left = np.bincount(self.members, minlength=len(self))
        left -= np.bincount(self.members[list(removed)], minlength=len(self))
        return tuple(self.ids[k] for k in np.flatnonzero(left == 0).tolist())

    def named(self, given: Any) -> list[Id]:
        """The groups of a request, each once, if they exist."""
        single = isinstance(given, str | numbers.Integral)
        wanted = [given] if single else _listed(given, len(self.ids))
        if not wanted:
            raise ValueError("groups must name at least one group; got none")
        found = [_checked(each, f"groups[{k}]") for k, each in enumerate(wanted)]
        for each in found:
            if each not in self._places:
                raise ValueError(self._unknown(each))
        return list(dict.fromkeys(found))

    def _unknown(self, one: Id) -> str:
        message = f"no sample is of group {one!r}"
        if type(one) is not type(self.ids[0]):
            kind = "integers" if isinstance(self.ids[0], int) else "strings"
            message += f"; the ids of this data are {kind}, as {self.ids[0]!r}"
        names = {str(each).casefold(): each for each in self.ids[:_COMPARED]}
        close = difflib.get_close_matches(str(one).casefold(), names, 3)
        if close:
            return f"{message}; close to it: {', '.join(repr(names[each]) for each in close)}"
        return f"{message}. There are {len(self):,}: {first_few([*map(repr, self.ids)], _LISTED)}"


def _listed(given: Any, most: int) -> list[Any]:
    """Values of an array, list, series of pandas or polars, or tensor."""
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(
            "groups must be an array, list, series or tensor of ids; got "
            f"{type(given).__name__} {given!r}"
        )
    for name in ("tolist", "to_list", "to_pylist"):
        if hasattr(given, name):
            found = getattr(given, name)()
            return found if isinstance(found, list) else [found]
    return at_most(given, most, "groups")


def _checked(value: object, name: str) -> Id:
    if isinstance(value, str):
        return str(value)
    if type(value) is not bool and isinstance(value, numbers.Integral):
        return int(value)
    advice = "; give every sample an id" if value is None or value != value else ""
    raise TypeError(
        f"{name} must be an integer or a string; got {value!r} ({type(value).__name__}){advice}"
    )


def _two_kinds(ids: Sequence[Id]) -> str:
    kinds = {type(each): each for each in reversed(ids)}
    return " and ".join(repr(each) for each in kinds.values())


# ---------------------------------------------------------------------------------------------
# Control groups of users


class Users(NamedTuple):
    """Control groups of whole users."""

    groups: list[list[int]]  # samples of each, ascending
    pool: NDArray[np.int64]  # all samples of these users and of some more, ascending

    def places(self) -> list[list[int]]:
        """The groups by their places in the pool."""
        return [np.searchsorted(self.pool, group).tolist() for group in self.groups]


def draw_users(
    groups: Groups, m: int, count: int, size: int, most: int, rng: np.random.Generator
) -> Users | None:
    """Draw users at random into control groups of about m samples; None if fewer than four result.

    A group is complete where one more user brings it to m. That user is taken whole, or left for
    the next group, whichever comes nearer to m, if that is within a quarter of m; else as many of
    its samples are drawn as are lacking. No user is in two groups. More users follow until `size`
    samples are drawn, for measurements; all of them have at most `most`.
    """
    order = np.argsort(groups.members, kind="stable")
    present, starts = np.unique(groups.members[order], return_index=True)
    owned = np.split(order, starts[1:])
    taken: list[NDArray[np.int64]] = []
    found: list[list[int]] = []
    used, group = 0, np.empty(0, np.int64)
    for user in rng.permutation(len(present)).tolist():
        own = owned[user]
        if len(found) == count and used >= size:
            break
        if used + len(own) > most:
            continue
        used += len(own)
        taken.append(own)
        lacking, over = m - len(group), len(group) + len(own) - m
        if len(group) and lacking < over and lacking <= _OFF * m:
            found.append(np.sort(group).tolist())
            group, lacking, over = group[:0], m, len(own) - m
        if len(found) == count:
            continue
        if over > _OFF * m:
            own = rng.permutation(own)[:lacking]
        group = np.concatenate([group, own])
        if over >= 0:
            found.append(np.sort(group).tolist())
            group = group[:0]
    if len(found) < FEWEST:
        return None
    return Users(found, np.sort(np.concatenate(taken)))
