"""One request of a stream: which samples, its seed, its step and its guarantee."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._callers import give, held_back, warn
from lcodec_ext._checks import at_most, check_integer, first_few
from lcodec_ext._files import ranges_of
from lcodec_ext._torch.loss import euclidean_norm, mean_loss, trainable
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature import ParameterSelection, Selection
from lcodec_ext.unlearning.estimate import Estimate
from lcodec_ext.unlearning.groups import Groups
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.release import guarantee_of
from lcodec_ext.unlearning.request import GUARD_SIZE
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream.given import Given
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import Ledger

#: What is done with a request.
Done = TypeVar("Done", UnlearnResult, Estimate)

_LISTED = 10  # sample numbers in an error message
_MEASURED = 256  # retained samples on which the noise of a release is measured, unless n_monitor


class Asked(NamedTuple):
    """What a request asks for."""

    numbers: list[int]  # those that were given first, then those of groups
    groups: list[dict[str, Any]]  # of each group named: its id, its samples, those removed before

    @property
    def record(self) -> dict[str, Any]:
        """What the ledger says of it."""
        return {"ids": self.numbers} | ({"groups": self.groups} if self.groups else {})


def check_request(ids: Any, groups: Any, given: Given, removed: Mapping[int, Any]) -> Asked:
    """What a request asks for, if samples are left to remove and some stay."""
    if ids is None and groups is None:
        raise TypeError("remove needs ids, numbers of samples, or groups; got neither")
    n = len(given.train)
    numbers = [] if ids is None else _check_numbers(ids, n, removed, given.groups)
    named = [] if groups is None else _check_named(groups, given.groups, removed)
    every = list(dict.fromkeys([*numbers, *(i for each in named for i in each["samples"])]))
    if len(removed) + len(every) == n:
        what = "ids" if groups is None else "the request"
        raise ValueError(
            f"{what} name{'s' * bool(named)} all remaining samples; leave at least one"
        )
    _tell_of_rest(named)
    return Asked(every, named)


def _check_numbers(
    ids: Any, n: int, removed: Mapping[int, Any], groups: Groups | None
) -> list[int]:
    if isinstance(ids, Tensor | np.ndarray):
        if ids.dtype in (torch.bool, np.dtype(bool)):
            raise TypeError(
                "ids must be numbers of samples; got a mask of bool: pass its nonzero()"
            )
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        ids = [ids]
    ids = at_most(ids, n, "ids")
    if groups is not None and any(isinstance(i, str) for i in ids):
        raise TypeError(f"ids must be numbers of samples; got {ids[0]!r}: pass it as groups=")
    numbers = [check_integer(i, f"ids[{k}]", 0, n - 1) for k, i in enumerate(ids)]
    if not numbers:
        raise ValueError("ids must have at least one sample; got none")
    twice = sorted(i for i, times in Counter(numbers).items() if times > 1)
    if twice:
        raise ValueError(f"ids must differ; given more than once: {first_few(twice, _LISTED)}")
    gone = [i for i in numbers if i in removed]
    if gone:
        raise ValueError(
            "ids must be samples that are not removed; removed already: " + first_few(gone, _LISTED)
        )
    return numbers


def _check_named(
    given: Any, groups: Groups | None, removed: Mapping[int, Any]
) -> list[dict[str, Any]]:
    """Of each group that is named: its id, its samples that stay, and those removed before."""
    if groups is None:
        raise ValueError(
            "requests by group need the ids of all samples: give groups= to Unlearner, or to "
            "Unlearner.resume if the stream has had them from the start"
        )
    named = []
    for one in groups.named(given):
        own = groups.samples(one)
        stay, before = ([i for i in own if (i in removed) == gone] for gone in (False, True))
        named.append({"id": one, "samples": stay, "before": before})
    gone = [repr(each["id"]) for each in named if not each["samples"]]
    if gone:
        raise ValueError(
            "groups must have samples that are not removed; removed already: "
            + first_few(gone, _LISTED)
        )
    return named


def _tell_of_rest(named: Sequence[Mapping[str, Any]]) -> None:
    for each in named:
        k, rest = len(each["before"]), len(each["samples"])
        if k:
            warn(
                f"{k:,} of the {k + rest:,} samples of group {each['id']!r} were removed by "
                f"earlier requests; this one removes the other {rest:,}",
            )


def check_note(note: object) -> str | None:
    """A note, if it is a string or None."""
    if note is not None and not isinstance(note, str):
        raise TypeError(f"note must be a string or None; got {type(note).__name__}")
    return note


def request_seed(seed: int, number: int) -> int:
    """The seed of the request of entry `number`, of a stream with a base seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0])


def all_but(n: int, gone: Iterable[int]) -> NDArray[np.int64]:
    """The numbers below n that are not gone, ascending."""
    stays = np.ones(n, dtype=bool)
    stays[list(gone)] = False
    return np.flatnonzero(stays)


def take_step(
    given: Given,
    model: nn.Module,
    statistics: TrainingStatistics | None,
    numbers: Sequence[int],
    retain: NDArray[np.int64],
    *,
    do: Callable[..., Done],
    by_group: bool = False,
    **changed: Any,
) -> Done:
    """Remove samples with the settings of a stream, or estimate it; `changed` overrides some.

    Where whole groups are asked for, `by_group`, groups are what the request is compared with. The
    result has no noise, which is for releases.
    """
    settings, validation = given.settings, given.validation
    guarded = settings.max_drop is not None or settings.repair_drop is not None
    if guarded and validation is None and statistics is None:
        validation = _watched(given, retain)
    groups = given.groups if by_group and settings.calibrate else None
    return do(
        model,
        given.train.subset(numbers),
        None if statistics is not None else given.train.subset(retain.tolist()),
        given.loss_fn,
        preset=settings.replace(**changed, epsilon=None, delta=None),
        validation=validation,
        groups=None if groups is None else groups.subset(retain),
        statistics=statistics,
        score=given.score,
        progress=given.progress,
    )


def _watched(given: Given, retain: NDArray[np.int64]) -> Samples:
    """Retained samples for the guard: the same in all requests, except those removed since."""
    order = np.random.default_rng([given.settings.seed, 5]).permutation(len(given.train))
    kept = np.isin(order, retain)
    return given.train.subset(np.sort(order[kept][:GUARD_SIZE]).tolist())


def allowed_drops(
    settings: Settings, ledger: Ledger, steps: Sequence[int], score: Score | None
) -> dict[str, float]:
    """How far the next request may lower the watched value, and raise the validation loss.

    All requests together stay within the settings. `steps` are the entries whose steps led to the
    present weights.
    """
    if not steps:
        return {}
    results = [ledger[k].record["result"] for k in steps]
    allowed = {} if not settings.calibrate else {"max_rise": _rise_left(settings, results)}
    first, last = (result.get("guard") for result in (results[0], results[-1]))
    if not first or not last or first[0] is None or last[1] is None:
        return allowed
    # Earlier versions counted losses above 1 in their size, and did not record it.
    unit = max(1.0, abs(first[0])) if score is None else 1.0
    fallen = max(0.0, first[0] - last[1]) / results[0].get("guard_unit", unit)
    return allowed | {
        name: max(0.0, limit - fallen)
        for name in ("max_drop", "repair_drop")
        if (limit := getattr(settings, name)) is not None
    }


def _rise_left(settings: Settings, results: Sequence[Mapping[str, Any]]) -> float:
    """What is left of `max_rise`, against the validation loss at the start of the stream.

    Each request's rise is measured on the same samples before and after; the product of these
    factors is that of all. A loss that fell allows no more than `max_rise` for one request.
    """
    risen = 1.0
    for result in results:
        found = result.get("calibration") or {}
        before, after = found.get("validation_before"), found.get("validation_after")
        if before and after:
            risen *= after / before
    return min(settings.max_rise, max(0.0, (1 + settings.max_rise) / risen - 1))


@contextmanager
def heard() -> Iterator[list[str]]:
    """The texts of what the block warns of; at its end the warnings go on to whoever listens.

    Also those that filters would hide: a ledger has them all. Filters that make errors of warnings
    raise them at the end.
    """
    texts: list[str] = []
    caught: list[warnings.WarningMessage] = []
    try:
        with held_back() as caught:
            yield texts
    finally:
        texts += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
        give(caught)


def guarantee_after(
    given: Given,
    result: UnlearnResult,
    original: nn.Module,
    n_removed: int,
    ledger: Ledger,
    steps: Sequence[int],
) -> Guarantee:
    """What the weights of a result would guarantee if they were released with noise.

    steps are the entries whose steps led to the weights that the result started from; none if it
    is one step from the original ones. ValueError if the settings ask for a certificate and there
    is none.
    """
    gradient_norm: float | None = result.training_gradient_norm
    if steps:
        gradient_norm = ledger[steps[0]].record["result"]["training_gradient_norm"]
    elif result.n_monitored != result.n_retain:
        gradient_norm = None
    return guarantee_of(
        given.settings,
        result.model,
        n=len(given.train),
        m=n_removed,
        n_selected=result.n_parameters,
        training_gradient_norm=math.nan if gradient_norm is None else gradient_norm,
        solve_residual=result.solve_residual,
        parameter_norm=max(euclidean_norm(trainable(each)) for each in (original, result.model)),
        damping=result.damping,
        order="sequential" if steps else given.settings.order,
    )


def statistics_after(
    given: Given, history: History, number: int, original: nn.Module
) -> TrainingStatistics | None:
    """The statistics after an entry, bit for bit as the requests left them."""
    statistics = given.statistics
    if statistics is not None:
        for k in history.steps(number):
            statistics = given.without(statistics, original, history.points[k].removed)
    return statistics


def losses_around_noise(
    given: Given, model: nn.Module, released: nn.Module, retained: NDArray[np.int64], number: int
) -> dict[str, Any]:
    """Mean loss of some retained samples without the noise of entry `number` and with it."""
    settings = given.settings
    rng = np.random.default_rng(request_seed(settings.seed, number))
    few = rng.permutation(len(retained))[: settings.n_monitor or _MEASURED]
    samples = given.train.subset(np.sort(retained[few]).tolist()).loaded()
    before, after = (
        mean_loss(each, samples, given.loss_fn, settings.batch_size) for each in (model, released)
    )
    return {"n": len(samples), "before": before, "after": after}


# ---------------------------------------------------------------------------------------------
# What a ledger records of it


def result_record(result: UnlearnResult) -> dict[str, Any]:
    """A result without what is on record elsewhere, and without times."""
    elsewhere = ("settings", "selection", "seconds", "skipped", "guarantee", "estimate")
    return {key: value for key, value in result.to_dict().items() if key not in elsewhere}


def compact(selection: Selection | None) -> dict[str, Any] | None:
    """The units of each layer as ranges, "0-15,17"; single parameters as `to_dict` has them."""
    if selection is None:
        return None
    if isinstance(selection, ParameterSelection):
        return selection.to_dict()
    return {layer: ranges_of(units) for layer, units in selection.units.items()}
