"""What `_torch.group.Ranks` is of a process group, for a call without one: this process alone."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Piece = TypeVar("Piece")


class OneRank:
    """The only rank there is: it does everything, and has nobody to talk to."""

    rank, size = 0, 1

    def agree(self, arguments: Mapping[str, Any]) -> None:
        """Nobody disagrees."""

    def alone(self, what: str) -> AbstractContextManager[None]:
        """A failure is told by itself."""
        return nullcontext()

    def share(self, count: int) -> range:
        """All of it."""
        return range(count)

    def share_out(self, count: int, what: str, work: Callable[[range], Piece]) -> list[Piece]:
        """All of the work, in one piece."""
        return [work(range(count))]


ONE_RANK = OneRank()
