"""What `_torch.group.Ranks` is of a process group, for a call without one: this process alone."""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from lcodec_ext._callers import warn

_NOTHING = nullcontext()  # which holds nothing, and so may be entered many times

Piece = TypeVar("Piece")


class OneRank:
    """The only rank there is: it does everything, and has nobody to talk to."""

    rank, size, group = 0, 1, None

    def agree(self, arguments: Mapping[str, Any]) -> None:
        """Nobody disagrees."""

    def alone(
        self, what: str, same: tuple[type[Exception], ...] = ()
    ) -> AbstractContextManager[None]:
        """A failure is told by itself."""
        return _NOTHING

    def warning_last(self) -> AbstractContextManager[None]:
        """Nobody waits: warnings come as they arise."""
        return _NOTHING

    def equal(
        self, what: str, own: Callable[[], Piece], options: Mapping[str, Any] | None = None
    ) -> Piece:
        """There is no other."""
        return own()

    def as_first(self, values: Piece) -> Piece:
        """It is the first."""
        return values

    def share(self, count: int) -> range:
        """All of it."""
        return range(count)

    def share_out(self, count: int, what: str, work: Callable[[range], Piece]) -> list[Piece]:
        """All of the work, in one piece."""
        return [work(range(count))]


def one_rank() -> OneRank:
    """A call without a group; warns where other processes were started, and none joins them."""
    others = os.environ.get("WORLD_SIZE", "1")
    torch = sys.modules.get("torch.distributed")
    joined = torch is None or not torch.is_available() or torch.is_initialized()
    if others not in ("", "1") and not joined:
        warn(
            f"WORLD_SIZE is {others}, and there is no process group: this call works on what this "
            "process has, alone. Call torch.distributed.init_process_group() first: "
            "torch.distributed.group.WORLD is None before"
        )
    return ONE_RANK


ONE_RANK = OneRank()
