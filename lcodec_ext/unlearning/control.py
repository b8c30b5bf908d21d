"""Who is in a control group, and which samples harm is looked for on."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcodec_ext._torch.predict import classes_of
from lcodec_ext._torch.samples import Samples
from lcodec_ext.unlearning.request import GUARD_SIZE
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.step import Block

MEASURED = 1000  # samples of a set whose loss is taken, at most


def measured(settings: Settings) -> int:
    """Validation samples, and samples of all control groups, whose loss is taken."""
    return MEASURED if settings.n_guard is None else min(MEASURED, settings.n_guard)


class Control(NamedTuple):
    """Groups of retained samples that are deleted virtually."""

    groups: list[Samples]
    of: Literal["users", "samples", "classes"]  # what the groups are of

    @property
    def size(self) -> int:
        """Samples in a group, of groups of users in the mean."""
        return round(sum(map(len, self.groups)) / len(self.groups))


def control_groups(block: Block, rng: np.random.Generator, count: int) -> Control:
    """So many groups of retained samples as the request, none of which the step reads.

    Where the request came with groups, and there are enough of them, these are other whole users
    with about as many samples (`draw_users`). Else they are random samples, as many as the request
    and of each label as many if there are; they share samples only where the pool has too few for
    all of them. A class that is deleted as a whole has groups of samples of other classes.
    """
    forget, pool = block.part.forget, block.retained.pool
    assert pool is not None  # settings that calibrate have one
    if block.retained.users is not None:
        return Control([pool.subset(own).loaded() for own in block.retained.users[:count]], "users")
    size = min(len(forget), len(pool))
    labels, wanted = labels_of(pool), labels_of(forget)
    free = np.arange(0)
    groups = []
    for _ in range(count):
        if len(free) < size:
            free = rng.permutation(len(pool))
        group = _drawn(free, labels, wanted, size)
        free = free[~np.isin(free, group)]
        groups.append(pool.subset(np.sort(group).tolist()).loaded())
    gone = labels is not None and wanted is not None and not np.isin(wanted, labels).any()
    return Control(groups, "classes" if gone else "samples")


def _drawn(
    free: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    wanted: NDArray[np.int64] | None,
    size: int,
) -> NDArray[np.int64]:
    """The first of free that have the labels wanted, and the first of all for what is lacking."""
    group = free[:0]
    if labels is not None and wanted is not None:
        for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
            group = np.append(group, free[labels[free] == label][:count])
    group = group[:size]
    return np.append(group, free[~np.isin(free, group)][: size - len(group)])


def known_classes(held: Samples, block: Block, rng: np.random.Generator) -> Samples:
    """At most 1000 validation samples, of classes of which samples are retained if there are."""
    some = few(held, rng, measured(block.work.settings))
    pool = block.retained.pool
    assert pool is not None
    return of_classes_that_stay(some, pool)


def of_classes_that_stay(held: Samples, pool: Samples) -> Samples:
    """Those of validation samples of whose class samples are retained; all if there are none.

    The others may have been deleted, now or in a request before.
    """
    here, kept = labels_of(held), labels_of(pool)
    if here is None or kept is None:
        return held
    known = np.isin(here, kept)
    return held.subset(np.flatnonzero(known).tolist()) if known.any() else held


def few(samples: Samples, rng: np.random.Generator, most: int) -> Samples:
    """All samples, or a draw of at most so many, in memory."""
    if len(samples) <= most:
        return samples.loaded()
    return samples.subset(np.sort(rng.permutation(len(samples))[:most]).tolist()).loaded()


def labels_of(samples: Samples) -> NDArray[np.int64] | None:
    """The classes of samples, where the targets are one integer each, or their probabilities."""

    def own() -> list[Tensor | None]:
        found = [classes_of(batch.targets) for batch in samples.batches(GUARD_SIZE)]
        known = [labels.cpu() for labels in found if labels is not None]
        return [torch.cat(known) if len(known) == len(found) else None]

    (labels,) = samples.stacked(f"the labels of {samples.name}", own)
    return None if labels is None else labels.numpy()


def some_of_pool(block: Block, rng: np.random.Generator) -> Samples:
    """At most 500 retained samples that the step does not read."""
    pool = block.retained.pool
    assert pool is not None
    return few(pool, rng, max(1, measured(block.work.settings) // 2))
