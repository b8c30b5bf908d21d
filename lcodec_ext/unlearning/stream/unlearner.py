"""Streams of deletion requests: what is removed, in which order, and what it left."""

import copy
import functools
import math
import os
import platform
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._build import __version__
from lcodec_ext._checks import check_bool, check_integer, check_real
from lcodec_ext._torch.loss import LossFunction, mean_loss
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.samples import Samples, as_samples
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.unlearning.privacy import Guarantee, PrivacyBudget, add_noise
from lcodec_ext.unlearning.privacy.noise import warn_of_noise
from lcodec_ext.unlearning.release import GUARDED, guarantee_of
from lcodec_ext.unlearning.request import GUARD_SIZE
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream.checkpoints import (
    Checkpoints,
    DirectoryLock,
    checkpoint_name,
    state_hash,
    state_of,
    with_state,
)
from lcodec_ext.unlearning.stream.ledger import (
    CHECKPOINT_FOLDER,
    FORMAT,
    LEDGER_FILE,
    History,
    Ledger,
    data_record,
    recordable,
    same_data,
    spend,
)
from lcodec_ext.unlearning.unlearn import unlearn

_LISTED = 10  # sample numbers in an error message
_MEASURED = 256  # retained samples on which the noise of a release is measured, unless n_monitor


class Unlearner:
    """Deletes training samples from a model, request after request, and keeps a ledger of it.

    Parameters
    ----------
    model : Module
        The trained model. It is copied and never changed.
    train : tensors, Dataset or DataLoader
        The data it was trained on, as for `unlearn`, in an order that stays. Samples go by their
        number in it, in every request. At the start all of them are read once and hashed, but not
        with `statistics`.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch.
    directory : str or path, optional
        Where ledger and checkpoints go; made if it does not exist, readable by its owner only.
        Without one, both are in memory and end with the process.
    validation : tensors, Dataset or DataLoader, optional
        For the guard of `max_drop`.
    statistics : TrainingStatistics, optional
        Curvature saved at training time. Of train, only the samples to delete are then read. Each
        request is taken out of the statistics, at the weights that they are of: their own, or
        where they have none those of model.
    score : callable, optional
        What the guard takes for accuracy, as for `unlearn`.
    preset : {"recommended", "paper"} or Settings, default "recommended"
    epsilon_budget, delta_budget : float, optional
        What all releases together may spend, by default what one of them takes: the options
        `epsilon` and `delta`.
    keep : int, default 5
        How many of the newest checkpoints are kept, that of the present weights among them: so far
        back `rollback` goes. The original weights are always kept. Each takes the space of the
        model.
    progress : bool, default False
        Show progress bars; needs tqdm.
    **options
        Any option of `Settings`. `seed` is where the seeds of the requests come from.

    Raises
    ------
    FileExistsError
        If the directory has a ledger: `Unlearner.resume` goes on with it.
    RuntimeError
        If the directory is in use, by this or another process.
    ValueError, TypeError
        For a model, data or options that cannot be used; the message names them.

    Notes
    -----
    **Requests.** `remove` takes the step of `unlearn` from the present weights, the samples of
    the request being removed and all others that are not removed yet being retained. A request
    that the guard takes back is recorded as skipped: the weights stay as they were, and its
    samples are *pending*, which means that the model must be retrained without them, or that they
    are asked for again. The weights still know them, so in later requests they count as retained:
    a step that left them out would take the objective for another one than the model is at.

    **The guard** counts from the start of the stream: what accuracy earlier requests have cost is
    no longer there for later ones, which are repaired or, in the end, skipped.

    **The ledger** has an entry for each request; `lcodec_ext.unlearning.ledger` describes its
    lines. On record are: of the start, the settings, the names of loss_fn and score with options
    that can be told, and sizes and hashes of the data; of a
    request, the samples' numbers and the SHA-256 of their contents, its seed, the selection, the
    solver and what was measured, as in `UnlearnResult.to_dict`; of a release, its guarantee and the
    budget; of all, how many samples are then removed, pending and retained, and the checkpoint with
    the SHA-256 of its tensors (`lcodec_ext.unlearning.checkpoints.state_hash`).

    **Durability.** A request is done when its line is on the disk, before `remove` returns. The
    checkpoint is written before that, so a process that is killed, at any moment, has lost
    nothing that was acknowledged: `resume` drops what was begun. The seed of a request is a
    function of `seed` and of the number of its entry, so after `resume` the same requests give
    the same bits, on the same machine with the same versions and number of threads. Ctrl-C during
    a request leaves all as it was before it; in the moment in which the entry is written, it
    waits for that.

    **Confidentiality.** Checkpoints and `model` are weights without noise, the older ones with all
    that was deleted since, and the ledger tells who was deleted. Both are for those who may see
    the training data.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.randn(100, 4, generator=torch.manual_seed(0)), torch.arange(100) % 3
    >>> model = torch.nn.Linear(4, 3)
    >>> unlearner = Unlearner(model, (x, y), torch.nn.functional.cross_entropy, weight_decay=0.01)
    >>> result = unlearner.remove([3, 7])
    >>> result = unlearner.remove(11)
    >>> unlearner.removed, len(unlearner.retained), len(unlearner.ledger)
    ((3, 7, 11), 97, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        *,
        directory: str | os.PathLike[str] | None = None,
        validation: Any = None,
        statistics: TrainingStatistics | None = None,
        score: Score | None = None,
        preset: str | Settings = "recommended",
        epsilon_budget: float | None = None,
        delta_budget: float | None = None,
        keep: int = 5,
        progress: bool = False,
        **options: Any,
    ) -> None:
        check_integer(keep, "keep", 1)
        settings = resolve(
            preset,
            options,
            retained=statistics is None,
            validation=validation is not None,
            statistics=statistics is not None,
        )
        if settings.update == "certified" and settings.max_drop is not None:
            raise ValueError(f"update='certified' cannot be had here: {GUARDED}")
        budget = _budget(settings, epsilon_budget, delta_budget)
        self._take(model, train, loss_fn, validation, statistics, score, settings, progress)
        state = state_of(model)
        self._model = copy.deepcopy(model)
        folder = None
        if directory is not None:
            folder = Path(directory)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        statistics = self._place_statistics(model)
        with self._locked(folder):
            self._open(folder)
            if len(self._ledger):
                raise FileExistsError(
                    f"directory {str(directory)!r} has a ledger already: go on with "
                    "Unlearner.resume, or give another directory"
                )
            if self._checkpoints.names() - {checkpoint_name(0)}:  # that of a start cut short
                raise FileExistsError(
                    f"directory {str(directory)!r} has checkpoints and no ledger to them; give "
                    "another directory"
                )
            self._ledger.repair()
            self._commit(
                "start",
                {
                    "format": FORMAT,
                    "settings": settings.to_dict(),
                    "keep": keep,
                    "budget": budget and budget.to_dict(),
                    "model": _name_of(model),
                    "trainable": [k for k, p in model.named_parameters() if p.requires_grad],
                    "loss_fn": _name_of(loss_fn),
                    "score": None if score is None else _name_of(score),
                    "options": {"loss_fn": _options_of(loss_fn), "score": _options_of(score)},
                    "train": data_record(
                        self._train, read=statistics is None, progress=self._progress
                    ),
                    "validation": self._validation
                    and data_record(self._validation, progress=self._progress),
                    "statistics": statistics and _statistics_record(statistics),
                    **self._counts((), ()),
                },
                model=self._model,
                state=state,
                statistics=statistics,
            )

    @classmethod
    def resume(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        *,
        validation: Any = None,
        statistics: TrainingStatistics | None = None,
        score: Score | None = None,
        progress: bool = False,
        perturb: Any = None,
    ) -> "Unlearner":
        """Go on with the ledger in a directory, from its last entry.

        What a killed process had begun is dropped: a torn last line and checkpoints without an
        entry. Settings are those on record.

        Parameters
        ----------
        directory : str or path
        model : Module
            A model of the same architecture and types; its weights do not count.
        train, loss_fn, validation, statistics, score
            As they were given at the start. Compared are: the names of loss_fn and score, and the
            options of torch's loss modules and of partials; of tensors and TensorDatasets all
            contents. Of other Datasets and of DataLoaders of them, which may take long to read, the
            number of samples is, and the contents of 64 across them and of all that were asked
            for: `verify_ledger` reads all.
        progress : bool, default False
        perturb : callable, optional
            The option `perturb`, if it was a function: the ledger has only its name.

        Raises
        ------
        LedgerError
            If the ledger or the last checkpoint does not verify.
        FileNotFoundError
            If the directory has no ledger, or one in which nothing was acknowledged.
        RuntimeError
            If the directory is in use.
        ValueError
            For data, a function or a model that are found not to be those on record.
        """
        folder = Path(directory)
        if not (folder / LEDGER_FILE).is_file():
            raise FileNotFoundError(f"directory {str(directory)!r} has no ledger")
        self = cls.__new__(cls)
        with self._locked(folder):
            self._open(folder)
            if not len(self._ledger):
                raise FileNotFoundError(
                    f"the ledger in directory {str(directory)!r} has no entry: begin anew with "
                    "Unlearner(..., directory=...)"
                )
            start = self._history.start
            recorded = dict(start["settings"])
            if perturb is not None:
                recorded["perturb"] = None
            settings = Settings.from_dict(recorded)
            if perturb is not None:
                settings = settings.replace(perturb=perturb)
            self._take(model, train, loss_fn, validation, statistics, score, settings, progress)
            _check_function("loss_fn", loss_fn, start)
            _check_function("score", score, start)
            self._check_data()
            trainable = [k for k, p in model.named_parameters() if p.requires_grad]
            if trainable != start["trainable"]:
                changed = sorted(set(trainable) ^ set(start["trainable"]))
                raise ValueError(
                    "model must have the same parameters that require gradients as at the start; "
                    f"another one is {(changed or trainable)[0]!r}"
                )
            last = self._history.points[-1]
            state = self._checkpoints.read(last.checkpoint, last.sha256)
            self._model = with_state(model, state)
            if statistics is not None:
                self._place_statistics(self._original())
            self._statistics = self._statistics_at(len(self._ledger) - 1)
            self._ledger.repair()
            self._prune()
        return self

    # -----------------------------------------------------------------------------------------
    # What there is

    @property
    def model(self) -> nn.Module:
        """The model without the removed samples: a copy, without noise, not to be given away."""
        return copy.deepcopy(self._model)

    @property
    def removed(self) -> tuple[int, ...]:
        """Numbers of the samples that are removed, in the order of the requests."""
        return tuple(self._history.removed)

    @property
    def pending(self) -> tuple[int, ...]:
        """Numbers of the samples asked for whose removal the guard took back: retrain for them."""
        return tuple(self._history.pending)

    @property
    def retained(self) -> NDArray[np.int64]:
        """Numbers of the samples that are not removed, ascending; the pending ones among them."""
        return self._without(self._history.removed)

    @property
    def ledger(self) -> Ledger:
        """The entries."""
        return self._ledger

    @property
    def budget(self) -> PrivacyBudget | None:
        """The privacy budget and what releases have spent of it; None without `epsilon`."""
        return copy.deepcopy(self._history.budget)

    @property
    def settings(self) -> Settings:
        """The settings of all requests."""
        return self._settings

    def __repr__(self) -> str:
        return (
            f"Unlearner({len(self.removed)} of {len(self._train)} samples removed, "
            f"{len(self.pending)} pending, {self._ledger!r})"
        )

    # -----------------------------------------------------------------------------------------
    # Requests

    def remove(self, ids: int | Iterable[int], *, note: str | None = None) -> UnlearnResult:
        """Delete samples from the model.

        Parameters
        ----------
        ids : int or iterable of int
            Numbers of training samples, at least one, none of them removed already.
        note : str, optional
            Goes into the ledger: who asked for it, say.

        Returns
        -------
        UnlearnResult
            The samples that the guard did not let go, `skipped`, are pending.

        Raises
        ------
        ValueError, TypeError
            For numbers that are not those of samples, repeated or removed already, and whatever
            `unlearn` raises. Then nothing has changed.
        """
        self._check_open()
        numbers = self._check_ids(ids)
        note = _check_note(note)
        number = len(self._ledger)
        seed = request_seed(self._settings.seed, number)
        retain = self._without([*self._history.removed, *numbers])
        if not len(retain):
            raise ValueError("ids must leave at least one sample; these are all that there are")
        result = self._step(numbers, retain, seed)
        skipped = [numbers[k] for k in result.skipped]
        gone = [i for i in numbers if i not in skipped]
        removed = [*self._history.removed, *gone]
        pending = (self._history.pending.keys() - gone) | set(skipped)
        record: dict[str, Any] = {
            "ids": numbers,
            "hashes": self._train.hashes(numbers),
            "skipped": skipped,
            "note": note,
            "seed": seed,
            **self._counts(removed, pending),
            "selection": compact(result.selection),
            "result": _result_record(result),
        }
        if not gone:
            self._commit("skip", record, seconds=result.seconds)
            return result
        guarantee = self._guarantee(result, removed)
        record["guarantee"] = guarantee and guarantee.to_dict()
        statistics = self._statistics
        if statistics is not None:
            statistics = self._without_samples(statistics, self._original(), gone)
        changed = copy.deepcopy(result.model)
        self._commit("remove", record, model=changed, statistics=statistics, seconds=result.seconds)
        return result

    def rollback(self, to: int | None = None, *, note: str | None = None) -> None:
        """Restore weights and removed samples as they were after an earlier entry.

        An entry of the ledger says so; none is taken out. What was released stays released, and
        what it spent of the privacy budget stays spent.

        Parameters
        ----------
        to : int, optional
            Number of that entry. By default the one before the last request.
        note : str, optional
            Goes into the ledger.

        Raises
        ------
        ValueError
            If there is no such entry, or its checkpoint is no longer kept.
        """
        self._check_open()
        note = _check_note(note)
        points = self._history.points
        if to is None:
            to = len(points) - 1
            while not points[to].is_request:
                to = points[to].parent
                if to < 0:
                    raise ValueError("there is no request to roll back")
            to = points[to].parent
        last = len(points) - 2
        if last < 0:
            raise ValueError("there is no entry to roll back to but the present one")
        check_integer(to, "to", 0, last)
        point = points[to]
        if point.checkpoint not in self._history.kept():
            there = ", ".join(map(str, self._history.restorable()))
            raise ValueError(
                f"the weights of entry {to} are no longer kept (keep={self._history.start['keep']})"
                f"; those of entries {there} are"
            )
        state = self._checkpoints.read(point.checkpoint, point.sha256)
        removed, pending = self._history.at(to)
        record: dict[str, Any] = {
            "to": to,
            "note": note,
            **self._counts(removed, pending),
        }
        self._commit(
            "rollback",
            record,
            model=with_state(self._model, state),
            state=state,
            statistics=self._statistics_at(to),
        )

    def release(self, *, note: str | None = None) -> nn.Module:
        """Make a copy of the model that may be given away: with fresh noise on every coordinate.

        The entry that pays for it is on the disk before this returns; it has the guarantee
        (`Guarantee.to_dict`) under "guarantee" and what is then spent and left under "budget". The
        noise comes from the operating system and is not on record.

        What the noise does is measured on `n_monitor` retained samples (256 by default): the
        entry's environment has their number and their mean loss before and after it under
        "retained_loss". With `statistics` it is not, for no retained sample is read then.

        Parameters
        ----------
        note : str, optional
            Goes into the ledger.

        Returns
        -------
        Module

        Raises
        ------
        PrivacyBudgetExceeded
            If the budget does not allow it. Nothing is released and nothing spent.
        ValueError
            Without the option `epsilon`, and where nothing is removed.

        Warns
        -----
        UserWarning
            If the noise raises the mean loss of the retained samples by much. The release is paid
            for then, also where warnings are errors: who could draw the noise again without
            paying, until it pleases, would not have the noise that the guarantee is of.
        """
        self._check_open()
        note = _check_note(note)
        budget = self.budget
        if budget is None:
            raise ValueError(
                "release adds noise: give the options epsilon and delta. Unlearner.model is the "
                "model without"
            )
        steps = self._history.steps(len(self._ledger) - 1)
        if not steps:
            raise ValueError("release hides what is removed, and nothing is removed")
        guarantee = Guarantee.from_dict(self._ledger[steps[-1]].record["guarantee"])
        spend(budget, guarantee)
        released = add_noise(self._model, guarantee.sigma)
        record: dict[str, Any] = {
            "note": note,
            "guarantee": guarantee.to_dict(),
            "budget": budget.to_dict(),
            **self._counts(self._history.removed, self._history.pending),
        }
        circumstances: dict[str, Any] = {"released": state_hash(state_of(released))}
        loss = self._losses_around_noise(released)
        if loss is not None:
            circumstances["retained_loss"] = loss
        self._commit("release", record, **circumstances)
        if loss is not None:
            warn_of_noise(
                loss["before"], loss["after"], guarantee, "the retained samples", stacklevel=2
            )
        return released

    def close(self) -> None:
        """Let go of the directory; no request is taken afterwards."""
        self._closed = True
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -----------------------------------------------------------------------------------------

    def _take(
        self,
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        validation: Any,
        statistics: TrainingStatistics | None,
        score: Score | None,
        settings: Settings,
        progress: bool,
    ) -> None:
        """Check and keep what a ledger cannot hold."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}")
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError("the model has no parameter")
        double = any(p.dtype == torch.float64 for p in model.parameters() if p.requires_grad)
        dtype = settings.dtype or (torch.float64 if double else torch.float32)
        self._train = as_samples(train, "train", parameter.device, dtype)
        self._validation = None
        if validation is not None:
            self._validation = as_samples(validation, "validation", parameter.device, dtype)
        if statistics is not None and statistics.n != len(self._train):
            raise ValueError(
                f"statistics must be of the training samples, {len(self._train)}; they are of "
                f"{statistics.n}"
            )
        self._loss_fn, self._score, self._settings = loss_fn, score, settings
        self._given_statistics = self._statistics = statistics
        self._progress = check_bool(progress, "progress")
        self._closed = False

    def _place_statistics(self, original: nn.Module) -> TrainingStatistics | None:
        """Have the statistics taken at the original weights: the model moves, they do not."""
        statistics = self._given_statistics
        if statistics is not None:
            statistics = statistics.at(original)
        self._given_statistics = self._statistics = statistics
        return statistics

    @contextmanager
    def _locked(self, folder: Path | None) -> Iterator[None]:
        """Lock a directory, and let go of it if what follows fails."""
        self._lock = None if folder is None else DirectoryLock(folder)
        try:
            yield
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def _open(self, folder: Path | None) -> None:
        self._ledger = Ledger(None if folder is None else folder / LEDGER_FILE)
        self._history = History()
        for entry in self._ledger:
            self._history.add(entry)
        self._checkpoints = Checkpoints(None if folder is None else folder / CHECKPOINT_FOLDER)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the Unlearner is closed; Unlearner.resume opens it again")

    def _check_data(self) -> None:
        problem = self._history.mismatch(self._train)
        if problem is not None:
            raise ValueError(problem)
        if not same_data(self._validation, self._history.start["validation"]):
            raise ValueError(
                "validation must be what was given at the start: it decides which requests are "
                "skipped"
            )
        given = self._given_statistics
        if (given and _statistics_record(given)) != self._history.start["statistics"]:
            raise ValueError("statistics must be what was given at the start")

    def _check_ids(self, ids: Any) -> list[int]:
        if isinstance(ids, Tensor | np.ndarray):
            if ids.dtype in (torch.bool, np.dtype(bool)):
                raise TypeError(
                    "ids must be numbers of samples; got a mask of bool: pass its nonzero()"
                )
            ids = ids.tolist()
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            ids = [ids]
        last = len(self._train) - 1
        numbers = [check_integer(i, f"ids[{k}]", 0, last) for k, i in enumerate(ids)]
        if not numbers:
            raise ValueError("ids must have at least one sample; got none")
        if len(set(numbers)) < len(numbers):
            twice = sorted(i for i, times in Counter(numbers).items() if times > 1)
            raise ValueError(f"ids must differ; {_list(twice)} is there more than once")
        gone = [i for i in numbers if i in self._history.removed]
        if gone:
            raise ValueError(f"ids must be samples that are not removed; {_list(gone)} already is")
        return numbers

    def _losses_around_noise(self, released: nn.Module) -> dict[str, Any] | None:
        """Mean loss of some retained samples without noise and with it; None with statistics."""
        if self._given_statistics is not None:  # only what is removed is read then
            return None
        retained = self.retained
        rng = np.random.default_rng(request_seed(self._settings.seed, len(self._ledger)))
        few = rng.permutation(len(retained))[: self._settings.n_monitor or _MEASURED]
        samples = self._train.subset(np.sort(retained[few]).tolist()).loaded()
        before, after = (
            mean_loss(model, samples, self._loss_fn, self._settings.batch_size)
            for model in (self._model, released)
        )
        return {"n": len(samples), "before": before, "after": after}

    def _without(self, gone: Iterable[int]) -> NDArray[np.int64]:
        stays = np.ones(len(self._train), dtype=bool)
        stays[list(gone)] = False
        return np.flatnonzero(stays)

    def _statistics_at(self, number: int) -> TrainingStatistics | None:
        """Those without what was removed up to an entry, to the bit as the requests left them."""
        statistics = self._given_statistics
        if statistics is not None:
            original = self._original()
            for k in self._history.steps(number):
                statistics = self._without_samples(
                    statistics, original, self._history.points[k].removed
                )
        return statistics

    def _without_samples(
        self, statistics: TrainingStatistics, original: nn.Module, numbers: Sequence[int]
    ) -> TrainingStatistics:
        return statistics.without(
            original,
            self._loss_fn,
            self._train.subset(numbers),
            batch_size=self._settings.batch_size,
            dtype=self._settings.dtype,
        )

    def _step(self, numbers: list[int], retain: NDArray[np.int64], seed: int) -> UnlearnResult:
        model, statistics = self._model, self._statistics
        changed: dict[str, Any] = self._allowed()
        if self._certified:  # the theorem is of one step from where training ended
            changed = {"update": "newton"}  # and noise is for releases
            model, statistics = self._original(), self._given_statistics
            numbers = [*self._history.removed, *numbers]
        validation = self._validation
        guarded = self._settings.max_drop is not None or self._settings.repair_drop is not None
        if guarded and validation is None and statistics is None:
            validation = self._watched(retain)
        return unlearn(
            model,
            self._train.subset(numbers),
            None if statistics is not None else self._train.subset(retain.tolist()),
            self._loss_fn,
            preset=self._settings.replace(seed=seed, epsilon=None, delta=None, **changed),
            validation=validation,
            statistics=statistics,
            score=self._score,
            progress=self._progress,
        )

    def _watched(self, retain: NDArray[np.int64]) -> Samples:
        """Retained samples for the guard: the same in all requests, but for those removed since."""
        order = np.random.default_rng([self._settings.seed, 5]).permutation(len(self._train))
        kept = np.zeros(len(order), bool)
        kept[retain] = True
        return self._train.subset(np.sort(order[kept[order]][:GUARD_SIZE]).tolist())

    def _allowed(self) -> dict[str, float]:
        """How far this request may let fall what the guard watches: all together, the settings."""
        steps = self._history.steps(len(self._ledger) - 1)
        if not steps:
            return {}
        first, last = (self._ledger[k].record["result"].get("guard") for k in (steps[0], steps[-1]))
        if not first or not last or first[0] is None or last[1] is None:
            return {}
        fallen = max(0.0, first[0] - last[1])
        return {
            name: max(0.0, limit - fallen)
            for name in ("max_drop", "repair_drop")
            if (limit := getattr(self._settings, name)) is not None
        }

    @property
    def _certified(self) -> bool:
        return self._settings.update == "certified"

    def _counts(self, removed: Sized, pending: Sized) -> dict[str, int]:
        return {
            "n_removed": len(removed),
            "n_pending": len(pending),
            "n_retained": len(self._train) - len(removed),
        }

    def _original(self) -> nn.Module:
        point = self._history.points[0]
        return with_state(self._model, self._checkpoints.read(point.checkpoint, point.sha256))

    def _guarantee(self, result: UnlearnResult, removed: Sequence[int]) -> Guarantee | None:
        """What the weights of a result would guarantee if they were released with noise.

        ValueError if the settings ask for a certificate and there is none.
        """
        settings = self._settings
        if settings.epsilon is None:
            return None
        earlier = self._history.steps(len(self._ledger) - 1)
        one_step = self._certified or not earlier
        gradient_norm = (
            result.training_gradient_norm if result.n_monitored == result.n_retain else math.nan
        )
        if not one_step:
            first = self._ledger[earlier[0]].record["result"]["training_gradient_norm"]
            gradient_norm = math.nan if first is None else first
        return guarantee_of(
            settings,
            result.model,
            n=len(self._train),
            m=len(removed),
            n_selected=result.n_parameters,
            training_gradient_norm=gradient_norm,
            solve_residual=result.solve_residual,
            parameter_norm=max(_norm(self._original()), _norm(result.model)),
            damping=result.damping,
            order=settings.order if one_step else "sequential",
        )

    def _commit(
        self,
        kind: str,
        record: dict[str, Any],
        *,
        model: nn.Module | None = None,
        state: dict[str, Tensor] | None = None,
        statistics: TrainingStatistics | None = None,
        **circumstances: Any,
    ) -> None:
        """Write a checkpoint, if there are new weights, and then the entry; all or nothing."""
        if model is None:
            last = self._history.points[-1]
            checkpoint = {"file": last.checkpoint, "sha256": last.sha256}
        else:
            state = state_of(model) if state is None else state
            checkpoint = {"file": checkpoint_name(len(self._ledger)), "sha256": state_hash(state)}
            self._checkpoints.write(checkpoint["file"], state)
        environment = {"time": _now(), "versions": versions(), **circumstances}
        with _interrupt_held_back():
            try:
                entry = self._ledger.append(kind, record | {"checkpoint": checkpoint}, environment)
            except BaseException:
                self._prune()
                raise
            self._history.add(entry)
            if model is not None:
                self._model, self._statistics = model, statistics
            self._prune()

    def _prune(self) -> None:
        with suppress(OSError):  # what cannot be deleted now is tried again with the next entry
            self._checkpoints.keep_only(self._history.kept())


# ---------------------------------------------------------------------------------------------


def request_seed(seed: int, number: int) -> int:
    """The seed of the request of entry `number`, of a stream with a base seed."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0])


def compact(selection: UnitSelection | None) -> dict[str, str] | None:
    """The units of each layer as ranges, "0-15,17"."""
    if selection is None:
        return None
    return {layer: _ranges(units) for layer, units in selection.units.items()}


def _ranges(numbers: tuple[int, ...]) -> str:
    array = np.asarray(numbers)
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def versions() -> dict[str, str]:
    """Of what the bits may depend on."""
    return {
        "lcodec_ext": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _result_record(result: UnlearnResult) -> dict[str, Any]:
    # What is on record elsewhere in the entry or at the start, and what the time decides.
    return {
        key: value
        for key, value in result.to_dict().items()
        if key not in ("settings", "selection", "seconds", "skipped", "guarantee")
    }


def _budget(settings: Settings, epsilon: float | None, delta: float | None) -> PrivacyBudget | None:
    if settings.epsilon is None or settings.delta is None:
        for name, value in (("epsilon_budget", epsilon), ("delta_budget", delta)):
            if value is not None:
                raise ValueError(f"{name} belongs to the options epsilon and delta, of a release")
        return None
    return PrivacyBudget(
        settings.epsilon if epsilon is None else check_real(epsilon, "epsilon_budget", 0),
        settings.delta if delta is None else check_real(delta, "delta_budget", 0),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _statistics_record(statistics: TrainingStatistics) -> dict[str, Any]:
    tensors = {} if statistics.matrix is None else {"matrix": statistics.matrix}
    for part, pairs in (("step", statistics.steps), ("change", statistics.changes)):
        tensors |= {
            f"{part} {k} {name}": t for k, one in enumerate(pairs) for name, t in one.items()
        }
    return {"n": statistics.n, "kind": statistics.kind, "sha256": state_hash(tensors)}


def _norm(model: nn.Module) -> float:
    squares = [p.detach().double().square().sum() for p in model.parameters() if p.requires_grad]
    return float(sum(squares)) ** 0.5


def _name_of(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def _options_of(value: Any) -> dict[str, Any]:
    """What is easily told of a function beside its name: a partial's arguments, torch's losses."""
    if isinstance(value, functools.partial):
        given = {str(k): v for k, v in enumerate(value.args)} | value.keywords
        return {"function": _name_of(value.func)} | _plain(given)
    options: dict[str, Any] = {}
    if isinstance(value, nn.Module):
        for name, module in value.named_modules():
            prefix = f"{name}." if name else ""
            if name:
                options[name] = _name_of(module)
            if type(module).__module__.startswith("torch."):
                options |= {prefix + k: v for k, v in _plain(vars(module)).items()}
    return options


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_")
        and key != "training"
        and (value is None or isinstance(value, bool | int | float | str))
    }


def _check_function(argument: str, given: Any, start: Mapping[str, Any]) -> None:
    """Refuse a function that is not the one on record; earlier versions recorded less."""
    if argument in start:
        name, known = (None if given is None else _name_of(given)), start[argument]
        if name != known:
            raise ValueError(
                f"{argument} must be what was given at the start: given is {name}, on record is "
                f"{known}"
            )
    if "options" in start:
        options, known = recordable(_options_of(given)), start["options"][argument]
        for key in sorted(options.keys() | known.keys()):
            if (key in options, options.get(key)) != (key in known, known.get(key)):
                raise ValueError(
                    f"{argument} must be what was given at the start: given is "
                    f"{_name_of(given)} with {_option(key, options)}, on record is "
                    f"{_option(key, known)}"
                )


def _option(key: str, options: Mapping[str, Any]) -> str:
    return f"{key}={options[key]!r}" if key in options else f"no {key}"


def _check_note(note: object) -> str | None:
    if note is not None and not isinstance(note, str):
        raise TypeError(f"note must be a string or None; got {type(note).__name__}")
    return note


def _list(numbers: list[int]) -> str:
    more = f" and {len(numbers) - _LISTED} more" if len(numbers) > _LISTED else ""
    return ", ".join(map(str, numbers[:_LISTED])) + more


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is None:
        yield  # no other thread gets a KeyboardInterrupt
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
