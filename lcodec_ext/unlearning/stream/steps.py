"""One request of a stream: which samples, its seed, its step and its guarantee."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, first_few
from lcodec_ext._files import ranges_of
from lcodec_ext._torch.loss import euclidean_norm, mean_loss, trainable
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature import ParameterSelection, Selection
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.release import guarantee_of
from lcodec_ext.unlearning.request import GUARD_SIZE
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream.given import Given
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import Ledger
from lcodec_ext.unlearning.unlearn import unlearn

_LISTED = 10  # sample numbers in an error message
_MEASURED = 256  # retained samples on which the noise of a release is measured, unless n_monitor


def check_ids(ids: Any, n: int, removed: Mapping[int, Any]) -> list[int]:
    """The numbers of a request, if they are those of samples that are not removed."""
    if isinstance(ids, Tensor | np.ndarray):
        if ids.dtype in (torch.bool, np.dtype(bool)):
            raise TypeError(
                "ids must be numbers of samples; got a mask of bool: pass its nonzero()"
            )
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        ids = [ids]
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
    if len(removed) + len(numbers) == n:
        raise ValueError("ids name all remaining samples; leave at least one")
    return numbers


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
    **changed: Any,
) -> UnlearnResult:
    """Remove samples with the settings of a stream; `changed` overrides some.

    The result has no noise, which is for releases.
    """
    settings, validation = given.settings, given.validation
    guarded = settings.max_drop is not None or settings.repair_drop is not None
    if guarded and validation is None and statistics is None:
        validation = _watched(given, retain)
    return unlearn(
        model,
        given.train.subset(numbers),
        None if statistics is not None else given.train.subset(retain.tolist()),
        given.loss_fn,
        preset=settings.replace(**changed, epsilon=None, delta=None),
        validation=validation,
        statistics=statistics,
        score=given.score,
        progress=given.progress,
    )


def _watched(given: Given, retain: NDArray[np.int64]) -> Samples:
    """Retained samples for the guard: the same in all requests, except those removed since."""
    order = np.random.default_rng([given.settings.seed, 5]).permutation(len(given.train))
    kept = np.isin(order, retain)
    return given.train.subset(np.sort(order[kept][:GUARD_SIZE]).tolist())


def allowed_drops(settings: Settings, ledger: Ledger, steps: Sequence[int]) -> dict[str, float]:
    """How far the next request may lower the watched value.

    All requests together stay within the settings. `steps` are the entries whose steps led to the
    present weights.
    """
    if not steps:
        return {}
    first, last = (ledger[k].record["result"].get("guard") for k in (steps[0], steps[-1]))
    if not first or not last or first[0] is None or last[1] is None:
        return {}
    fallen = max(0.0, first[0] - last[1])
    return {
        name: max(0.0, limit - fallen)
        for name in ("max_drop", "repair_drop")
        if (limit := getattr(settings, name)) is not None
    }


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
    elsewhere = ("settings", "selection", "seconds", "skipped", "guarantee")
    return {key: value for key, value in result.to_dict().items() if key not in elsewhere}


def compact(selection: Selection | None) -> dict[str, Any] | None:
    """The units of each layer as ranges, "0-15,17"; single parameters as `to_dict` has them."""
    if selection is None:
        return None
    if isinstance(selection, ParameterSelection):
        return selection.to_dict()
    return {layer: ranges_of(units) for layer, units in selection.units.items()}
