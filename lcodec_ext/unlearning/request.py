"""What is asked: the samples to delete, those that stay, and the statistics that replace these."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_integer, check_seed
from lcodec_ext._one_rank import OneRank
from lcodec_ext._torch.batches import (
    SAMPLES_ARE,
    Batch,
    InputsError,
    NoSamplesError,
    map_tensors,
    tensors_of,
)
from lcodec_ext._torch.copies import THE_LOSS, check_followed, quantised
from lcodec_ext._torch.group import Ranks
from lcodec_ext._torch.inputs import TextsError
from lcodec_ext._torch.loss import (
    LossFunction,
    check_classes,
    check_parts,
    finite_loss,
    known_loss,
)
from lcodec_ext._torch.modes import undisturbed
from lcodec_ext._torch.padding import moved_to_front, padded_length
from lcodec_ext._torch.samples import (
    NotTrainedError,
    Samples,
    as_samples,
    outputs_in_training,
    outputs_of,
)
from lcodec_ext._torch.shards import ShardedSamples, check_shards, own_samples
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens, doubt_of_shift, of_kind, of_sets
from lcodec_ext.unlearning.groups import Groups, draw_users
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.workplace import Workplace

GUARD_SIZE = 1000  # retained samples on which harm is looked for
_PROBE = 32  # samples on which model and loss are checked, of either set
_LABELS = 4096  # samples whose labels are looked at together
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError)


def random_samples(n: int, m: int, seed: int = 0) -> list[int]:
    """Draw m of n sample numbers without replacement, ascending."""
    check_integer(n, "n", 1)
    if check_integer(m, "m", 1) > n:
        raise ValueError(f"m must be at most n, the number of samples; got m={m} and n={n}")
    check_seed(seed, optional=False)
    return sorted(np.random.default_rng(seed).choice(n, m, replace=False).tolist())


class Retained(NamedTuple):
    """The samples that a deletion retains, and those of them that its step reads."""

    all: Samples
    read: Samples
    pool: Samples | None = None  # of control groups; none of them is read
    users: list[list[int]] | None = None  # groups of whole users in the pool


@dataclass(frozen=True, eq=False)
class Kept:
    """The retained samples of a request, and the draws from them, each drawn and fetched once."""

    all: Samples
    read: Samples  # by steps
    monitored: Samples  # that losses and gradients are measured on; of those, if there is no pool
    pool: Samples | None  # for control groups
    users: list[list[int]] | None  # groups of whole users in the pool
    _settings: Settings
    _order: NDArray[np.int64]
    _groups: Groups | None

    @classmethod
    def drawn(
        cls, samples: Samples, settings: Settings, m: int, groups: Groups | None = None
    ) -> "Kept":
        """Draw those that are read, those that are measured, and a pool of control groups of m.

        With groups the pool has whole users, if there are enough of them.
        """
        n = len(samples)
        order = _rng(settings).permutation(n)
        most, pool, users = settings.n_curvature, None, None
        if settings.calibrate:
            size = control_pool(n, m, settings.control_groups)
            rng = np.random.default_rng([settings.seed, 7])
            count = settings.control_groups
            drawn = None if groups is None else draw_users(groups, m, count, size, n // 2, rng)
            if drawn is not None:
                size, users = len(drawn.pool), drawn.places()
                order = np.concatenate([order[~np.isin(order, drawn.pool)], drawn.pool])
            most = min(n - size, most or n)
            pool = samples.subset(np.sort(order[n - size :]).tolist())
        read = samples if most is None else _some(samples, order[:most])
        monitored = read if pool is None else samples
        if settings.n_monitor is not None and settings.n_monitor < len(monitored):
            few = _rng(settings).permutation(len(monitored))[: settings.n_monitor]
            monitored = _some(monitored, few)
        return cls(samples, read, monitored, pool, users, settings, order, groups)

    def drawn_again(self, settings: Settings, m: int) -> "Kept":
        """The same samples, drawn from as other settings say."""
        return Kept.drawn(self.all, settings, m, self._groups)

    def unread(self) -> Samples:
        """Samples that no step reads, or where all are read, of all."""
        unread = self._order[len(self.read) :]
        most = min(GUARD_SIZE, self._settings.n_guard or GUARD_SIZE)
        return _some(self.all, (unread if len(unread) else self._order)[:most])

    def with_samples(self, others: Samples) -> Retained:
        """Retain also others, the samples of the request whose turn comes later."""
        n, m = len(self.all), len(others)
        if not m:
            return Retained(self.all, self.read, self.pool, self.users)
        both = self.all.and_others(others)
        if self._settings.n_curvature is None:
            return Retained(both, both)
        # A draw from both, of which the part from the retained ones was fetched before.
        rng = _rng(self._settings, m)
        size = min(self._settings.n_curvature, n + m)
        few = int(rng.hypergeometric(m, n, size))
        parts = [
            _some(samples, rng.permutation(len(samples))[:count])
            for samples, count in ((self.read, size - few), (others, few))
            if count
        ]
        read = parts[0] if len(parts) == 1 else parts[0].and_others(parts[1])
        return Retained(both, read)


def control_pool(n: int, m: int, groups: int) -> int:
    """How many of n retained samples are kept for control groups of m: at most half of them."""
    return min(n // 2, 2 * groups * m + 200)


def _rng(settings: Settings, *stream: int) -> np.random.Generator:
    return np.random.default_rng([settings.seed, 0, *stream])


def _some(samples: Samples, numbers: NDArray[np.int64]) -> Samples:
    return samples.subset(np.sort(numbers).tolist()).loaded()


class Part(NamedTuple):
    """Samples that are removed at once: all of a request, or one of them."""

    numbers: list[int]  # their positions in the request
    forget: Samples
    retained: Retained | None
    statistics: TrainingStatistics | None
    n_retain: int
    seed: list[int]  # of random selections


@dataclass(frozen=True, eq=False)
class Request:
    """Samples to remove, and the data that the deletion may look at; all checked."""

    forget: Samples
    kept: Kept | None  # None where statistics stand for the retained samples
    validation: Samples | None
    statistics: TrainingStatistics | None
    n_retain: int

    @property
    def m(self) -> int:
        """Samples to remove."""
        return len(self.forget)

    def drawn_again(self, settings: Settings) -> "Request":
        """The same request, its samples drawn as other settings say."""
        kept = self.kept and self.kept.drawn_again(settings, self.m)
        return replace(self, kept=kept, validation=_at_most(self.validation, settings))

    @property
    def monitored(self) -> Samples | None:
        """Retained samples on which losses and gradients are measured."""
        return None if self.kept is None else self.kept.monitored

    def parts(self, work: Workplace) -> Iterator[Part]:
        """The samples that are removed at once, one part after the other."""
        sequential = work.settings.order == "sequential"
        numbers = [[k] for k in range(self.m)] if sequential else [list(range(self.m))]
        for count, part in enumerate(numbers):
            rest = self.forget.subset(range(part[-1] + 1, self.m))
            retained = None if self.kept is None else self.kept.with_samples(rest)
            n_retain = self.n_retain if retained is None else len(retained.all)
            # at these weights: "cheap" changes the model's before its next step
            statistics = None if self.statistics is None else self.statistics.at(work.model)
            seed = [work.settings.seed, 2, count]
            yield Part(part, self.forget.subset(part), retained, statistics, n_retain, seed)


def checked_request(
    work: Workplace,
    forget: Any,
    retain: Any,
    validation: Any,
    statistics: TrainingStatistics | None,
    groups: Any,
) -> tuple[Workplace, Request]:
    """Take the samples as they were given; refuse what cannot be done with them.

    The workplace is returned with the loss as it is used: of a mean over tokens what each sample
    contributes to it.
    """
    ranks = work.ranks
    given = work.loss_fn
    if isinstance(ranks, OneRank):
        work, removed, kept, held = _taken(work, forget, retain, validation, statistics)
    else:
        with ranks.alone("the samples"):
            refuse_over_ranks(work.settings, retain, statistics)
            work, removed, kept, held = _taken(work, forget, retain, validation, statistics)
            if groups is not None:
                groups = Groups.of(groups, 0 if kept is None else len(kept), "retain").each()
        assert kept is not None  # refused before
        check_shards(kept, retain, ranks)
        removed, kept, held, groups = _over_ranks(ranks, removed, kept, held, groups)
        work = replace(work, loss_fn=_of_all_ranks(ranks, given, work.loss_fn, removed, kept))
    if kept is not None and kept.in_memory:
        warn_of_overlap(removed, kept)
    m = len(removed)
    if kept is not None:
        n_retain = len(kept)
    else:
        assert statistics is not None
        n_retain = statistics.n_left(m)
    if statistics is not None and statistics.n != m + n_retain:
        raise ValueError(
            f"statistics are of {statistics.n} training samples; forget and retain have "
            f"{m} + {n_retain}. retain must be all that stay, or None"
        )
    if groups is not None:
        if kept is None:
            raise ValueError("groups are ids of the retained samples, and retain is None")
        if not work.settings.calibrate:
            raise ValueError(
                "groups say whose samples make a control group, and this deletion is not "
                "calibrated, so it has none: leave groups out, or have the deletion calibrated "
                "(preset='recommended' with validation, and no damping of your own)"
            )
        groups = Groups.of(groups, len(kept), "retain")
    drawn = None
    if kept is not None:
        with work.timed("monitoring"):
            drawn = Kept.drawn(kept, work.settings, m, groups)
    return work, Request(removed, drawn, _at_most(held, work.settings), statistics, n_retain)


def _taken(
    work: Workplace,
    forget: Any,
    retain: Any,
    validation: Any,
    statistics: TrainingStatistics | None,
) -> tuple[Workplace, Samples, Samples | None, Samples | None]:
    """The samples that are here, checked by themselves and on the model."""
    removed = as_samples(forget, "forget", work.device, work.dtype).loaded()
    kept: Samples | None = None
    if retain is not None and isinstance(work.ranks, Ranks):
        kept = own_samples(retain, "retain", removed, work.ranks)
    elif retain is not None:
        kept = as_samples(retain, "retain", work.device, work.dtype)
    held = None
    if validation is not None:
        held = as_samples(validation, "validation", work.device, work.dtype)
    _check_roles(work.settings, kept, held, statistics)
    told = work.loss_fn
    work = replace(work, loss_fn=_by_tokens(work, removed, kept, statistics))
    if held and isinstance(work.loss_fn, TokenLoss):
        of_sets(work.loss_fn, held)  # refuses samples without a token
    _probe(work, [samples for samples in (removed, kept, held) if samples])
    if isinstance(told, TokenLoss) and (doubt := doubt_of_shift(told, work.model, removed)):
        warn(doubt)
    if kept and work.settings.repair_epochs:
        _check_repair(work, kept.fetch(slice(4)))
    return work, removed, kept, held


def _by_tokens(
    work: Workplace,
    removed: Samples,
    kept: Samples | None,
    statistics: TrainingStatistics | None,
) -> LossFunction:
    """A mean over tokens as a plain mean over samples; other losses as they are."""
    if not isinstance(statistics, TrainingStatistics):
        return by_tokens(work.loss_fn, work.model, removed, kept)
    if statistics.mean_tokens is None:
        if isinstance(work.loss_fn, TokenLoss):
            raise ValueError(
                "the statistics are of a plain mean over samples, and loss_fn is a mean over "
                f"tokens, {work.loss_fn!r}: collect them with this loss, or give mean_tokens to "
                "TrainingStatistics.from_epochs"
            )
        return work.loss_fn
    return statistics.by_tokens(work.loss_fn)


def _of_all_ranks(
    ranks: Ranks,
    given: LossFunction,
    found: LossFunction,
    removed: Samples,
    kept: Samples | None,
) -> LossFunction:
    """The loss that one rank has found to be a mean over tokens, with those of all ranks."""
    if isinstance(given, TokenLoss):
        return found if given.mean_tokens is not None else of_sets(given, removed, kept)
    kind = str(int(found.causal)) if isinstance(found, TokenLoss) else ""
    told = [each.decode() for each in ranks.gather_bytes(kind.encode())]
    causal = next((bool(int(each)) for each in told if each), None)
    return given if causal is None else of_sets(of_kind(given, causal), removed, kept)


def refuse_over_ranks(
    settings: Settings, retain: Any, statistics: TrainingStatistics | None
) -> None:
    """Refuse what a deletion over a process group does not do."""
    if statistics is not None or retain is None:
        raise ValueError(
            "group= spreads the retained samples over ranks; a deletion with statistics in their "
            "place is for one process: leave group out"
        )
    if settings.bounded:
        raise ValueError(
            "max_seconds, budget and max_memory are for one process: ranks would time different "
            "plans. Over a group leave them out, and set n_curvature, n_guard, finish and "
            "control_groups by yourself"
        )


def told_of_given(**given: Any) -> dict[str, Any]:
    """What `Ranks.agree` compares first: what is there, from which settings follow."""
    return {name: None if each is None else "samples" for name, each in given.items()}


def told_of_settings(settings: Settings) -> dict[str, Any]:
    """What `Ranks.agree` compares of settings: each by its name, functions by theirs."""
    told = settings.to_dict()
    if settings.perturb is not None and not isinstance(told["perturb"], Mapping):
        told["perturb"] = getattr(settings.perturb, "__qualname__", type(settings.perturb).__name__)
    if isinstance(told["selection"], Mapping):
        digest = hashlib.sha256(repr(told["selection"]).encode()).hexdigest()[:16]
        told["selection"] = f"{settings.selection!r}, digest {digest}"
    return told


def _over_ranks(
    ranks: Ranks,
    removed: Samples,
    kept: Samples,
    held: Samples | None,
    groups: list[Any] | None,
) -> tuple[Samples, Samples, Samples | None, list[Any] | None]:
    """The samples of all ranks: those to delete and validation are on every one."""
    with ranks.alone("reading the samples"):
        told = {
            each.name: hashlib.sha256("".join(each.each_hash()).encode()).hexdigest()[:16]
            for each in (removed, held)
            if each is not None
        }
        like = removed.fetch([0])
    ranks.agree(told | {"groups": groups is None, "kinds of samples": str(like.kinds)})
    every = ShardedSamples.of(kept, ranks, like)
    if not len(every):
        raise NoSamplesError("retain is empty on every rank of the group")
    if groups is not None:
        groups = [
            one
            for text in ranks.gather_bytes(json.dumps(groups).encode())
            for one in json.loads(text)
        ]
    shared = None if held is None else ShardedSamples.shared(held, ranks)
    return ShardedSamples.shared(removed, ranks), every, shared, groups


def _at_most(held: Samples | None, settings: Settings) -> Samples | None:
    """Validation samples, drawn from where there are more than the settings allow."""
    if held is None or settings.n_guard is None or len(held) <= settings.n_guard:
        return held
    order = np.random.default_rng([settings.seed, 8]).permutation(len(held))
    return _some(held, order[: settings.n_guard])


def _check_roles(
    settings: Settings,
    retain: Samples | None,
    held: Samples | None,
    statistics: TrainingStatistics | None,
) -> None:
    """Refuse what cannot be done with the data that are given."""
    if statistics is not None and settings.autocast is not None:
        raise ValueError(
            "autocast does not go with statistics: they were collected in float32, and what the "
            "removed samples have in them must be the same number; leave autocast out"
        )
    if statistics is not None:
        _check_statistics(settings, statistics)
    if settings.calibrate and (held is None or retain is None):
        raise ValueError(
            "calibrate=True needs retain and validation: samples that the model was not trained on"
        )
    if retain is not None:
        return
    if statistics is None:
        raise ValueError(
            "retain is None: pass the retained training samples, or statistics that were saved "
            "when the model was trained"
        )
    if held is None and (settings.max_drop is not None or settings.repair_drop is not None):
        raise ValueError(
            "the guard needs samples: pass validation, or max_drop=None and repair_drop=None to do "
            "without a guard"
        )
    if settings.repair_epochs or settings.n_recalibrate or settings.lengthen is not None:
        raise ValueError(
            "repair_epochs, n_recalibrate and lengthen need retained samples, and retain is None"
        )


def _check_statistics(settings: Settings, statistics: object) -> None:
    if not isinstance(statistics, TrainingStatistics):
        raise TypeError(f"statistics must be TrainingStatistics; got {type(statistics).__name__}")
    for refused, message in (
        (
            settings.update not in ("newton", "certified"),
            f"statistics hold a curvature, which update={settings.update!r} does not use",
        ),
        (
            (settings.order, settings.steps, settings.gradient) != ("batch", 1, "removal"),
            "statistics are of the weights that training ended with: they serve one step, "
            "order='batch', steps=1 and gradient='removal'",
        ),
        (
            settings.output_damping > 0,
            "statistics hold a curvature without output_damping; got "
            f"output_damping={settings.output_damping:g}. Use damping",
        ),
        (
            settings.curvature != statistics.kind,
            f"the statistics are for curvature={statistics.kind!r}; got "
            f"curvature={settings.curvature!r}. Pass curvature={statistics.kind!r}",
        ),
    ):
        if refused:
            raise ValueError(message)


def _probe(work: Workplace, sets: list[Samples]) -> None:
    """Check model and loss on a few samples of each set, and that the sets are alike."""
    known = None
    for samples in sets:
        step = max(1, len(samples) // _PROBE)
        batch = samples.fetch(range(0, len(samples), step)[:_PROBE])
        known = known or batch.kinds
        if batch.kinds != known:
            raise ValueError(
                f"the samples of {sets[0].name} and {samples.name} must be alike; those of "
                f"{sets[0].name} have tensors of (dimensions, dtype) {known}, of "
                f"{samples.name} {batch.kinds}"
                + (f". {SAMPLES_ARE}" if len(batch.kinds) != len(known) else "")
            )
        outputs = _checked_outputs(work, batch, samples.name)
        _check_loss(work, batch, outputs, samples.name)
        _check_labels(work, samples, outputs)


def _checked_outputs(work: Workplace, batch: Batch, name: str) -> Any:
    """The model's outputs for a few samples, which must be theirs alone."""
    try:
        with torch.no_grad():
            outputs = outputs_of(work.model, batch)
            with torch.enable_grad():
                followed = [*tensors_of(outputs_of(work.model, batch.part(slice(2))))]
            single = outputs_of(work.model, batch.part(slice(1)))
    except _FAILURES as error:
        several = len(batch.args) > 1 and not isinstance(error, InputsError | TextsError)
        why = f". It was called with {len(batch.args)} inputs. {SAMPLES_ARE}" if several else ""
        raise ValueError(f"the model fails on samples of {name}: {error}{why}") from error
    own = set(map(id, work.parameters.values()))
    check_followed([t for t in followed if t.requires_grad], work.watched, "the model", own)
    tensors = list(tensors_of(outputs))
    if not tensors:
        raise ValueError(f"the model must return tensors; it returned {type(outputs).__name__}")
    for tensor, alone in zip(tensors, tensors_of(single), strict=True):
        if tensor.ndim == 0 or len(tensor) != batch.size:
            raise ValueError(
                "the model must return tensors with samples along their first axis; from "
                f"{batch.size} samples it returned shape {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the outputs of the model for samples of {name} hold NaN or infinity")
        scale = float(tensor.abs().max())
        rtol, atol = (1e-6, 1e-9) if work.dtype == torch.float64 else (1e-3, 1e-4 * scale)
        if not torch.allclose(alone, tensor[:1], rtol=rtol, atol=atol):
            raise ValueError(
                "the output of a sample changes with the other samples in its batch, or at "
                f"random; then the loss is not a mean over samples{quantised(work.model)}"
            )
    return outputs


def _check_repair(work: Workplace, batch: Batch) -> None:
    """Refuse a model that a repair could not train, before anything is done."""
    try:
        with undisturbed(work.model):
            work.model.train()
            outputs_in_training(work.model, batch)
    except NotTrainedError as error:
        raise ValueError(
            f"a repair trains the model, and {error}. Or pass repair_epochs=0"
        ) from error


def _check_loss(work: Workplace, batch: Batch, outputs: Any, name: str) -> None:
    """Refuse a loss that fails, is not finite, or is not the mean over the samples."""
    with torch.enable_grad():
        loss = finite_loss(work.loss_fn, outputs, batch, name)
    check_followed([loss], work.watched, THE_LOSS)
    check_parts(work.loss_fn, outputs, batch.targets, batch.size, 1)
    if work.settings.curvature in ("gauss_newton", "hessian", "ekfac"):
        _check_curvature(work, batch, outputs)


def _check_labels(work: Workplace, samples: Samples, outputs: Any) -> None:
    """Look at all labels of samples in memory: a late one would stop the deletion amid it."""
    known = known_loss(work.loss_fn)
    if known is not None and known.kind == "cross_entropy" and samples.in_memory:
        for batch in samples.batches(_LABELS):
            check_classes(work.loss_fn, outputs, batch, samples.name)


def _check_curvature(work: Workplace, batch: Batch, outputs: Any) -> None:
    """Refuse a loss whose second derivative by the outputs PyTorch does not know."""
    if work.settings.update == "gradient":
        return
    with torch.enable_grad():
        outputs = map_tensors(_with_gradient, outputs)
        inputs = [t for t in tensors_of(outputs) if t.requires_grad]
        loss = work.loss_fn(outputs, batch.targets)
        if not loss.requires_grad:
            return  # refused with the gradients
        first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        total = sum(g.sum() for g in first if g is not None)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return  # linear in the outputs
        try:
            torch.autograd.grad(total, inputs, allow_unused=True)
        except RuntimeError as error:
            raise ValueError(
                "loss_fn cannot be differentiated twice by the model's outputs, as "
                f"curvature={work.settings.curvature!r} does: {error}. Use curvature='fisher'"
            ) from error


def _with_gradient(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def warn_of_overlap(forget: Samples, retain: Samples) -> None:
    """Warn if half of the samples to delete, or more, are also among those to retain.

    Fewer may be true duplicates.
    """
    m, k = len(forget), n_shared(forget, retain)
    if 2 * k >= m:
        warn(
            f"{k:,} of {m:,} samples of forget are also among those of retain: pass as retain the "
            "training samples that stay, without the deleted ones",
        )


def n_shared(few: Samples, many: Samples) -> int:
    """How many of a few samples are also among many."""
    every = few.whole()
    like = torch.zeros(len(every), dtype=torch.float64)
    (found,) = many.summed(
        f"comparing samples with those of {many.name}",
        lambda: [_shared(every, many.own) if len(many.own) else like],
        [like],
    )
    return int((found > 0).sum())


def _shared(few: Samples, many: Samples) -> Tensor:
    """Ones for those of a few samples that are also among many, float64.

    One pass over the many hashes the bits of every sample, and what has the hash of one of the few
    is compared with it. How texts are padded does not matter.
    """
    shared = torch.zeros(len(few), dtype=torch.float64)
    length = max(padded_length(samples.fetch([0])) for samples in (few, many))

    def columns(samples: Samples, indices: list[int]) -> list[Tensor]:
        tensors = moved_to_front(samples.fetch(indices), length)
        return [t.reshape(len(indices), math.prod(t.shape[1:])).contiguous() for t in tensors]

    widths = [t.shape[1] for t in columns(few, [0])]
    if widths != [t.shape[1] for t in columns(many, [0])]:
        return shared
    rows = max(1, 2**18 // max(1, sum(widths)))  # at a time: what stays in the caches
    rng = np.random.default_rng(0)
    factors: dict[int, Tensor] = {}

    def keys(samples: Samples) -> NDArray[np.int64]:
        """The bits of each sample as integers of at most 32, times random ones, modulo 2^64."""
        found = []
        for start in range(0, len(samples), rows):
            some = list(range(start, min(start + rows, len(samples))))
            total = torch.zeros(len(some), dtype=torch.int64)
            for k, column in enumerate(columns(samples, some)):
                bits = column.view(torch.int32) if column.element_size() >= 4 else column
                if k not in factors:
                    drawn = rng.integers(-(2**63), 2**63, bits.shape[1])
                    factors[k] = torch.from_numpy(drawn).to(bits.device)
                total += (bits * factors[k]).sum(1).cpu()
            found.append(total.numpy())
        return np.concatenate(found)

    known, first = np.unique(keys(many), return_index=True)
    wanted = keys(few)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    likely = np.flatnonzero(known[at] == wanted)
    for start in range(0, len(likely), rows):
        some = likely[start : start + rows]
        pairs = zip(
            columns(few, some.tolist()), columns(many, first[at[some]].tolist()), strict=True
        )
        same = torch.stack([(a == b).all(1) for a, b in pairs]).all(0)
        shared[torch.from_numpy(some)] = same.double().cpu()
    return shared
