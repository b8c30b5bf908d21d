"""Ranks of a torch.distributed process group: what a call over a group says and hears.

Every function with ``group=`` checks its own arguments in `Ranks.alone`, and then calls
`Ranks.agree`: ranks that call different functions, or one with different arguments, all end at
once, with a message that names what differs.
What one rank computes alone runs in `Ranks.alone`: if it fails there, the others end, too, instead
of waiting for it.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar
from warnings import WarningMessage

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lcodec_ext._build import build_info
from lcodec_ext._callers import give, held_back
from lcodec_ext._files import short_digest
from lcodec_ext._one_rank import OneRank, one_rank

Piece = TypeVar("Piece")

_SHOWN = 120  # characters of a value in a message
_MIX = 0x9E3779B97F4A7C15  # odd, of many bits: the upper ones of a product depend on all others
_UNLIKE = (
    "A vector that was passed may differ between ranks, as a gradient of one rank's own samples "
    "does: pass that of all samples, added over ranks. Otherwise ranks compute unlike: give them "
    "the same kind of processor or GPU, version of PyTorch and number of threads"
)


class Ranks:
    """The ranks of a process group, and the few ways in which they talk.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Its own rank must be one of it. Messages travel in CPU tensors, with NCCL in tensors on the
        current CUDA device.
    function : str
        What is called, for messages.

    Attributes
    ----------
    rank, size : int
        The own rank within the group, and how many there are.
    bytes_sent : int
        Bytes that this rank has passed to collectives so far.

    Raises
    ------
    TypeError
        For anything but a process group.
    RuntimeError
        If torch.distributed is not initialised.
    ValueError
        If this process is not in the group.
    """

    def __init__(self, group: Any, function: str) -> None:
        if not dist.is_available():
            raise RuntimeError(
                "group= needs torch.distributed, which this build of PyTorch does not have"
            )
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"this process is not in the group: only its ranks call {function}(group=...)"
            )
        if not dist.is_initialized():
            raise RuntimeError(
                "group= needs a process group: call torch.distributed.init_process_group() first "
                f"(torchrun sets its environment); got group={_shown(repr(group))}"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed process group, such as "
                f"torch.distributed.group.WORLD; got {_shown(repr(group))} ({type(group).__name__})"
            )
        self._group, self._function = group, function
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_cuda = str(dist.get_backend(group)) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else None
        self.bytes_sent = 0

    @property
    def group(self) -> Any:
        """As it was given."""
        return self._group

    def agree(self, arguments: Mapping[str, Any]) -> None:
        """Check that all ranks call the same function, version and arguments.

        Parameters
        ----------
        arguments : dict
            Of every argument that must be equal on all ranks what is compared: a value of JSON, or
            an array, of which shape, dtype and a digest are.

        Raises
        ------
        ValueError
            On every rank, naming the first argument that differs, and two ranks.
        """
        own: dict[str, Any] = {"function": self._function, "lcodec_ext": build_info()["version"]}
        own = {name: _compared(value) for name, value in {**own, **arguments}.items()}
        # values are compared, and shown, as text
        told = [json.loads(text) for text in self.gather_bytes(json.dumps(own).encode())]
        for name in [*own, *(name for other in told for name in other)]:
            values = [other.get(name) for other in told]
            different = next((r for r, value in enumerate(values) if value != values[0]), None)
            if different is not None and name == "function":
                raise ValueError(
                    f"all ranks must call the same function: rank 0 called {values[0]}, rank "
                    f"{different} called {values[different]}"
                )
            if different is not None:
                raise ValueError(
                    f"all ranks must call {self._function} with the same "
                    f"{'version' if name == 'lcodec_ext' else name}: rank 0 has "
                    f"{_shown(values[0])}, rank {different} has {_shown(values[different])}"
                )

    @contextmanager
    def alone(self, what: str, same: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Work that this rank does by itself; a failure here ends all ranks.

        Parameters
        ----------
        what : str
            That failed, for messages.
        same : tuple of types, optional
            Errors that the caller goes on after: the others raise the same type, so that they go on
            in the same way.

        Raises
        ------
        RuntimeError
            On the ranks that did not fail, naming the first that did and its error.
        """
        try:
            yield
        except Exception as error:
            self._end(what, error, same)
        else:
            self._end(what, None, same)

    def _end(self, what: str, error: Exception | None, same: tuple[type[Exception], ...]) -> None:
        """Raise what the first rank that failed did, of whatever type it is there."""
        kind = next((k for k, each in enumerate(same) if isinstance(error, each)), len(same))
        own = "" if error is None else f"{kind} {type(error).__name__}: {error}"
        for rank, told in enumerate(self.gather_bytes(own.encode())):
            if not told:
                continue
            number, _, failure = told.decode().partition(" ")
            as_here = error is not None and int(number) == kind
            if as_here and (kind == len(same) or type(error) is same[kind]):
                assert error is not None
                raise error
            message = f"{what} failed on rank {rank} of the group: {failure}"
            raise (*same, RuntimeError)[int(number)](message) from error

    @contextmanager
    def warning_last(self) -> Iterator[None]:
        """Work of all ranks, of which they warn at the end.

        Filters make an error of a warning on some ranks, perhaps: it then ends all, and none waits
        in the middle of the work for one that has left it.
        """
        caught: list[WarningMessage] = []
        try:
            with held_back() as caught:
                yield
        except BaseException:
            give(caught)
            raise
        with self.alone("a warning"):
            give(caught)

    def equal(
        self, what: str, own: Callable[[], Tensor], options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """A tensor that each rank takes alone, the same on all; one gather of 32 bytes.

        Parameters
        ----------
        what : str
            It is, for messages.
        own : callable
            To the tensor. It checks the options, too.
        options : dict, optional
            What else must be equal, as for `agree`.

        Raises
        ------
        ValueError
            On every rank, naming what differs: an option, the shape, or a number in any bit.
        RuntimeError
            As `alone`.
        """
        error: Exception | None = None
        options = options or {}
        told = [-1, -1, 0, 0]
        try:
            found = own()
            text = json.dumps({name: _compared(value) for name, value in options.items()})
            digests = (short_digest(each) for each in (found.numpy(force=True), text))
            told = [found.ndim, found.numel(), *(int(each, 16) - 2**63 for each in digests)]
        except Exception as failed:
            error = failed
        seen = self.gather(np.array(told, np.int64))
        if (seen[:, 0] < 0).any():
            self._end(what, error, ())
        different = (seen != seen[0]).any(axis=1)
        if different.any():
            self.agree({**options, f"shape of {what}": str(tuple(found.shape))})
            raise ValueError(
                f"{self._function}: {what} has different numbers on rank 0 and on rank "
                f"{int(different.argmax())}. {_UNLIKE}"
            )
        return found

    def total(
        self,
        what: str,
        own: Callable[[], Sequence[Tensor]],
        like: Sequence[Tensor],
        *,
        given: Sequence[Tensor] = (),
        same: tuple[type[Exception], ...] = (),
    ) -> list[Tensor]:
        """The sums over ranks of tensors that each works out alone; a failure ends all.

        One reduction for each dtype and device. The first one also carries a number for each rank:
        a checksum of what must be equal there, or that it failed.

        Parameters
        ----------
        what, same
            As for `alone`.
        own : callable
            To this rank's tensors.
        like : sequence of Tensor
            Shapes, dtypes (float32 or float64) and devices of these.
        given : sequence of Tensor, optional
            What they are worked out from, and all ranks must have.

        Raises
        ------
        RuntimeError
            As `alone`; and on all ranks if they were given different numbers.
        """
        error: Exception | None = None
        status = 0
        parts: Sequence[Tensor] = ()
        try:
            parts = own()
            mixed = sum(map(_bits, given)) * _MIX
            status = (mixed >> 40) & 0xFFFFFF  # as many bits as float32 holds
        except Exception as failed:
            error, status, parts = failed, -1, [torch.zeros_like(each) for each in like]
        seats = torch.zeros(self.size, dtype=like[0].dtype, device=like[0].device)
        seats[self.rank] = status
        found = [torch.empty(0)] * len(like)
        for kind in dict.fromkeys((each.dtype, each.device) for each in like):
            chosen = [k for k, each in enumerate(like) if (each.dtype, each.device) == kind]
            sent = [parts[k].detach().to(like[k]).reshape(-1) for k in chosen]
            sent += [seats] * (chosen[0] == 0)
            summed = torch.split(self.add(torch.cat(sent)), [each.numel() for each in sent])
            for k, each in zip(chosen, summed, strict=False):
                found[k] = each.reshape(like[k].shape)
            seats = summed[-1] if chosen[0] == 0 else seats
        seen = seats.tolist()
        if -1 in seen:
            self._end(what, error, same)
        other = next((r for r, each in enumerate(seen) if each != seen[0]), None)
        if other is not None:
            raise RuntimeError(
                f"{self._function}: {what} is worked out from different numbers on rank 0 and on "
                f"rank {other}. {_UNLIKE}"
            )
        return found

    def gather(self, values: NDArray) -> NDArray:
        """Arrays of one shape and dtype, stacked by rank: shape (size, ...)."""
        sent = torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        self._talk(lambda: dist.all_gather(received, sent, group=self._group), sent)
        return torch.stack(received).cpu().numpy()

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """What every rank says, by rank; lengths may differ. One collective more than `gather`."""
        lengths = self.gather(np.array([len(own)], dtype=np.int64))[:, 0]
        longest = int(lengths.max())
        if longest == 0:
            return [b""] * self.size
        padded = np.zeros(longest, dtype=np.uint8)
        padded[: len(own)] = np.frombuffer(own, dtype=np.uint8)
        told = self.gather(padded)
        return [told[r, : lengths[r]].tobytes() for r in range(self.size)]

    def share(self, count: int) -> range:
        """Which of the numbers below `count` are this rank's: contiguous ones, or none."""
        least, more = divmod(count, self.size)
        first = self.rank * least + min(self.rank, more)
        return range(first, first + least + (self.rank < more))

    def share_out(self, count: int, what: str, work: Callable[[range], Piece]) -> list[Piece]:
        """What `work` makes of the numbers below `count`, its own `share` on each rank.

        Every rank has all pieces, by rank, and so in the order of the numbers. They are pickled:
        ranks trust each other. A failure on one rank ends all.
        """
        with self.alone(what):
            own = pickle.dumps(work(self.share(count)))
        return [pickle.loads(told) for told in self.gather_bytes(own)]

    def broadcast(self, values: Tensor, source: int) -> Tensor:
        """A tensor of rank `source`, on every rank; in place where it can be."""
        sent = values.contiguous() if self._device is None else values.to(self._device).contiguous()
        root = dist.get_global_rank(self._group, source)
        self._talk(lambda: dist.broadcast(sent, root, group=self._group), sent)
        return sent.to(values.device)

    def as_first(self, values: Tensor) -> Tensor:
        """A copy of a tensor of rank 0, of any dtype, on every rank."""
        flat = values.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        return self.broadcast(flat.view(torch.uint8), 0).view(values.dtype).reshape(values.shape)

    def broadcast_array(self, values: NDArray, source: int) -> NDArray:
        """An array of rank `source`, on every rank; of one shape and dtype on all."""
        return self.broadcast(torch.from_numpy(values), source).cpu().numpy()

    def add(self, values: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape, on every rank, with the same bits on each.

        At a fixed number of ranks the order of addition is fixed, and with it the bits.
        """
        if values.is_complex():
            return torch.view_as_complex(self.add(torch.view_as_real(values)))
        sent = values.detach().clone(memory_format=torch.contiguous_format)
        if self._device is not None:
            sent = sent.to(self._device)
        self._talk(lambda: dist.all_reduce(sent, group=self._group), sent)
        return sent.to(values.device)

    def _talk(self, collective: Callable[[], Any], sent: Tensor) -> None:
        """A collective, whose failure is told as what it means."""
        self.bytes_sent += sent.nbytes
        try:
            collective()
        except RuntimeError as error:  # DistBackendError, among others
            raise RuntimeError(
                f"{self._function}: a rank of the group stopped answering rank {self.rank} (it "
                "failed, was killed, or took longer than the group's timeout, which timeout= of "
                "torch.distributed.init_process_group sets). The group cannot be used any more; "
                f"start all ranks again. {error}"
            ) from error


AnyRanks: TypeAlias = Ranks | OneRank


def ranks_of(group: Any, function: str) -> AnyRanks:
    """The ranks of a group that a user passed; this process alone for None."""
    return one_rank() if group is None else Ranks(group, function)


def _compared(value: Any) -> Any:
    """A value, or shape, dtype and digest of an array, as JSON keeps it.

    Numbers are equal whatever their types are.
    """
    if isinstance(value, np.ndarray | Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return f"{dtype} of shape {value.shape}, digest {short_digest(value)}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool | int | float | str | None):
        return repr(value)  # NaN is equal to itself
    if isinstance(value, list | tuple):
        return [_compared(each) for each in value]
    return repr(value)


def _bits(values: Tensor) -> int:
    """The sum of a tensor's bits as integers: exact, in any order, where the tensor is."""
    real = torch.view_as_real(values) if values.is_complex() else values
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
    return int(real.detach().contiguous().view(kind).sum(dtype=torch.int64))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
