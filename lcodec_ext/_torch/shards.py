"""Samples that are spread over the ranks of a process group."""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from lcodec_ext._torch.batches import Batch, NoSamplesError, map_tensors, part_of, tensors_of
from lcodec_ext._torch.group import Ranks
from lcodec_ext._torch.samples import Indices, Samples, as_samples

_COMPARED = 64  # samples of a shard, at first


@dataclass(frozen=True, eq=False)
class ShardedSamples(Samples):
    """Samples of which each rank has some, in one numbering.

    What is read from single ones is read where they are, and then added or stacked over ranks. So
    every rank has the same numbers, and takes the same decisions. All but `own`, `places` and
    `batches` without an order is asked for by all ranks at the same time.
    """

    held: Samples | None = None  # by this rank
    at: NDArray[np.int64] | None = None  # the numbers of these among all
    ranks: Ranks | None = None
    all_of: Samples | None = None  # where every rank has all
    like: Batch | None = None  # a batch of the same structure, of one sample

    @classmethod
    def of(cls, own: Samples, ranks: Ranks, like: Batch) -> "ShardedSamples":
        """The samples of all ranks, numbered in rank order."""
        told = np.array([len(own), own.in_memory or not len(own)], np.int64)
        counts, memory = ranks.gather(told).T
        at = counts[: ranks.rank].sum() + np.arange(len(own))
        return _spread(own, int(counts.sum()), at, ranks, bool(memory.all()), None, like)

    @classmethod
    def shared(cls, every: Samples, ranks: Ranks) -> "ShardedSamples":
        """Samples that every rank has, of which each reads a part."""
        n, r = len(every), ranks.rank
        memory = bool(ranks.gather(np.array([every.in_memory], np.uint8)).all())
        at = np.arange(n * r // ranks.size, n * (r + 1) // ranks.size)
        return _spread(every.subset(at.tolist()), n, at, ranks, memory, every, None)

    @property
    def own(self) -> Samples:
        return cast(Samples, self.held)

    @property
    def _ranks(self) -> Ranks:
        return cast(Ranks, self.ranks)

    @property
    def places(self) -> NDArray[np.int64]:
        return cast("NDArray[np.int64]", self.at)

    @property
    def first(self) -> bool:
        return self._ranks.rank == 0

    def fetch(self, indices: Indices) -> Batch:
        """Fetch some samples, from the ranks that have them."""
        if isinstance(indices, slice):
            indices = range(self.n)[indices]
        if self.all_of is not None:
            return self.all_of.fetch(indices)
        return self.subset(indices).whole().fetch(slice(None))

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Batch]:
        """The samples of this rank in batches; with an order, those of all ranks in it."""
        return self.own.batches(size) if order is None else super().batches(size, order)

    def subset(self, indices: Indices) -> "ShardedSamples":
        numbers = range(self.n)[indices] if isinstance(indices, slice) else indices
        chosen = np.asarray(numbers, dtype=np.int64)
        here = np.full(self.n, -1)
        here[self.places] = np.arange(len(self.places))
        own = here[chosen]
        at = np.flatnonzero(own >= 0)
        every = None if self.all_of is None else self.all_of.subset(chosen.tolist())
        held = self.own.subset(own[at].tolist())
        return replace(self, n=len(chosen), held=held, at=at, all_of=every)

    def loaded(self) -> "ShardedSamples":
        if self.in_memory:
            return self
        with self._ranks.alone(f"reading {self.name}"):
            held = self.own.loaded()
            every = None if self.all_of is None else self.all_of.loaded()
        return replace(self, held=held, all_of=every, in_memory=True, resident=True)

    def kept(self, size: int, most: int) -> "ShardedSamples":
        with self._ranks.alone(f"reading {self.name}"):
            held = self.own.kept(size, most)
        return replace(self, held=held)

    def and_others(self, others: Samples) -> "ShardedSamples":
        pairs = [(self.own, self.places), (others.own, self.n + others.places)]
        some = [own for own, _ in pairs if len(own)] or [self.own]
        at = np.concatenate([at for _, at in pairs])
        memory = self.in_memory and others.in_memory
        held = Samples.joined(some)
        return replace(
            self, n=self.n + len(others), held=held, at=at, all_of=None, in_memory=memory
        )

    def whole(self) -> Samples:
        """All of them, on every rank; those that are not here are sent."""
        if self.all_of is not None:
            return self.all_of
        tree = (self._like.args, self._like.kwargs, self._like.targets)
        n_tensors = len(list(tensors_of(tree)))

        def own() -> list[Tensor | None]:
            batch = self.own.fetch(slice(None))
            return [t.cpu() for t in tensors_of((batch.args, batch.kwargs, batch.targets))]

        found = self.stacked(f"reading {self.name}", own)
        if len(found) != n_tensors:
            raise ValueError(
                f"the samples of {self.name} have {len(found)} tensors, and others {n_tensors}"
            )
        columns = iter(found)
        args, kwargs, targets = map_tensors(
            lambda t: cast(Tensor, next(columns)).to(t.device), tree
        )
        data = ((kwargs or args), targets)
        return Samples(
            self.n,
            lambda some: part_of(data, self.n, torch.as_tensor(some)),
            self.device,
            self.dtype,
            self.name,
            in_memory=True,
            resident=True,
        )

    @property
    def _like(self) -> Batch:
        return cast(Batch, self.like)

    def told(self, measure: Callable[[Samples], float]) -> float:
        """As rank 0 measures it."""
        every = self.whole()
        with self._ranks.alone(f"measuring {self.name}"):
            found = measure(every)
        return float(self._ranks.gather(np.array([found]))[0, 0])

    def summed(
        self,
        what: str,
        own: Callable[[], Sequence[Tensor]],
        like: Sequence[Tensor],
        *,
        given: Sequence[Tensor] = (),
        same: tuple[type[Exception], ...] = (),
    ) -> Sequence[Tensor]:
        return self._ranks.total(what, own, like, given=given, same=same)

    def stacked(
        self,
        what: str,
        own: Callable[[], Sequence[Tensor | None]],
        same: tuple[type[Exception], ...] = (),
    ) -> Sequence[Tensor | None]:
        """Of ranks that have samples; their tensors may differ in the first axis alone."""
        found: Sequence[Tensor | None] = ()
        with self._ranks.alone(what, same):
            if len(self.own):
                found = own()
        sent = _packed([torch.from_numpy(self.places), *found])
        told = [_unpacked(each) for each in self._ranks.gather_bytes(sent)]
        order = torch.cat([cast(Tensor, each[0]) for each in told]).argsort()
        with_samples = [each[1:] for each in told if len(cast(Tensor, each[0]))]
        return [
            None
            if any(each is None for each in column)
            else torch.cat(cast("list[Tensor]", list(column)))[order]
            for column in zip(*with_samples, strict=True)
        ]


def _spread(
    held: Samples,
    n: int,
    at: NDArray[np.int64],
    ranks: Ranks,
    in_memory: bool,
    all_of: Samples | None,
    like: Batch | None,
) -> ShardedSamples:
    """A base's fields are those of what this rank has, but for the number."""
    base = {each.name: getattr(held, each.name) for each in fields(Samples)}
    base |= {"n": n, "in_memory": in_memory, "numbers": None}
    return ShardedSamples(**base, held=held, at=at, ranks=ranks, all_of=all_of, like=like)


def _packed(tensors: Sequence[Tensor | None]) -> bytes:
    file = io.BytesIO()
    torch.save([None if t is None else t.detach().cpu().clone() for t in tensors], file)
    return file.getvalue()


def _unpacked(data: bytes) -> list[Tensor | None]:
    found: list[Tensor | None] = torch.load(io.BytesIO(data), weights_only=True)
    return found


def own_samples(data: Any, name: str, like: Samples, ranks: Ranks) -> Samples:
    """The samples of this rank, in any form; there may be none."""
    try:
        data = without_repeats(data, name, ranks)
        if isinstance(data, list | tuple) and not len(data):
            return replace(like.subset([]), name=name)
        return as_samples(data, name, like.device, like.dtype)
    except NoSamplesError:
        return replace(like.subset([]), name=name)


def check_shards(own: Samples, data: Any, ranks: Ranks) -> None:
    """Refuse samples that were not dealt out: two ranks that have the same, or deal differently.

    `data` are what `own` was made of. Of shards of one size that agree in some samples, all are
    compared: of any others, up to 64 are read.
    """
    n, what = len(own), f"reading {own.name}"
    some = np.unique(np.linspace(0, n - 1, min(n, _COMPARED)).astype(np.int64)).tolist()
    told = ranks.share_out(ranks.size, what, lambda _: (_dealt(data), _digest(own, some)))
    dealt = {rank: each for rank, (each, _) in enumerate(told) if each is not None}
    first = next(iter(dealt), 0)
    for rank, each in dealt.items():
        for name, value in each.items():
            if value != (one := dealt[first][name]):
                raise ValueError(
                    f"the DistributedSamplers of {own.name} must deal out alike, or samples are "
                    f"lost and doubled: {name} is {one} on rank {first} of the group, and {value} "
                    f"on rank {rank}"
                )
    if _equal([digest for _, digest in told]) is None:
        return
    all_told = ranks.share_out(ranks.size, what, lambda _: _digest(own, slice(None)))
    pair = _equal(all_told)
    if pair is not None:
        raise ValueError(
            f"rank {pair[0]} and rank {pair[1]} of the group have the same {n:,} samples of "
            f"{own.name}, each of which would count twice: pass on every rank samples that no "
            f"other has, Subset(dataset, range(rank, len(dataset), {ranks.size}))"
        )


def _digest(samples: Samples, some: Indices) -> str:
    """Of a number of samples, and of some of them; empty without samples."""
    if not len(samples):
        return ""
    digest = hashlib.sha256(str(len(samples)).encode())
    for each in samples.each_hash(some):
        digest.update(each.encode())
    return digest.hexdigest()


def _equal(digests: Sequence[str]) -> tuple[int, int] | None:
    """The first two ranks with samples whose digests are equal."""
    seen: dict[str, int] = {}
    for rank, each in enumerate(digests):
        if each and each in seen:
            return seen[each], rank
        seen[each] = rank
    return None


def _sampler_of(data: Any) -> Any:
    """The DistributedSampler of a loader; None of anything else."""
    if not isinstance(data, DataLoader):
        return None
    batches = data.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else data.sampler
    return sampler if type(sampler) is DistributedSampler else None


def _dealt(data: Any) -> dict[str, Any] | None:
    """What makes ranks deal out the same samples."""
    sampler = _sampler_of(data)
    if sampler is None:
        return None
    told = {"the number of samples": len(data.dataset)}
    return told | {name: getattr(sampler, name) for name in ("shuffle", "seed", "epoch")}


def without_repeats(data: Any, name: str, ranks: Ranks, size: int = 1) -> Any:
    """Data; of a loader with a DistributedSampler one without the samples that it repeats.

    Its batches have `size` samples.
    """
    sampler = _sampler_of(data)
    if sampler is None:
        return data
    if (sampler.rank, sampler.num_replicas) != (ranks.rank, ranks.size):
        raise ValueError(
            f"the DistributedSampler of {name} is of rank {sampler.rank} of "
            f"{sampler.num_replicas}, and this is rank {ranks.rank} of {ranks.size} of the group"
        )
    n = len(data.dataset)
    if sampler.total_size < n:
        raise ValueError(
            f"the DistributedSampler of {name} leaves out {n - sampler.total_size} samples "
            "(drop_last=True), which count, too: pass drop_last=False"
        )
    # The order of all samples, and the first ones of it again, are dealt out in turn.
    own = list(sampler)[: len(range(sampler.rank, n, sampler.num_replicas))]
    return DataLoader(
        Subset(data.dataset, own), batch_size=size, shuffle=False, collate_fn=data.collate_fn
    )
