"""Streams of deletion requests: what is removed, in which order, and what it left."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool, check_integer, check_real
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.decay import with_decay
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.states import state_hash, state_of, tensors_of_state
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.unlearning.estimate import Estimate, estimate
from lcodec_ext.unlearning.privacy import Guarantee, PrivacyBudget, add_noise, warn_of_noise
from lcodec_ext.unlearning.release import GUARDED
from lcodec_ext.unlearning.result import UnlearnResult
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream.checkpoints import checkpoint_name, with_state
from lcodec_ext.unlearning.stream.given import (
    check_given,
    circumstances,
    receive,
    settings_on_record,
    start_record,
)
from lcodec_ext.unlearning.stream.history import spend
from lcodec_ext.unlearning.stream.ledger import LEDGER_FILE, Ledger
from lcodec_ext.unlearning.stream.steps import (
    Asked,
    Done,
    all_but,
    allowed_drops,
    check_note,
    check_request,
    compact,
    guarantee_after,
    heard,
    losses_around_noise,
    request_seed,
    result_record,
    statistics_after,
    take_step,
)
from lcodec_ext.unlearning.stream.store import Store, interrupt_held_back
from lcodec_ext.unlearning.unlearn import unlearn_or_skip as unlearn

_PROBE = 32  # retained samples that are compared with those of the start at each request


class Unlearner:
    """Deletes training samples from a model, request after request, and keeps a ledger of it.

    A request is done when `remove` returns: its checkpoint and its line are then on the disk.
    Samples that the guard takes back, or for which the paper's way finds no step, are *pending*.
    Checkpoints and `model` are weights without noise: they are as confidential as the training
    data. docs/unlearning.md, "Streams of requests", has the ledger, durability, the guard and
    confidentiality in full.

    Parameters
    ----------
    model : Module
        The trained model. It is copied and never changed.
    train : tensors, Dataset or DataLoader
        The data it was trained on, as for `unlearn`, in an order that stays: requests name samples
        by their number in it. All are read once and hashed at the start, except with `statistics`.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch, over samples or over tokens.
    directory : str or path, optional
        Where ledger and checkpoints go; made readable by its owner only. By default both are in
        memory and end with the process.
    validation : tensors, Dataset or DataLoader, optional
        For the guard of `max_drop`.
    groups : array_like, Series or Tensor of int or str, shape (n,), optional
        Whom each sample belongs to, a user for instance: `remove` then takes these ids, too. The
        ledger has the ids of those who were deleted as they are given here: give pseudonyms if it
        should not tell who they are.
    statistics : TrainingStatistics, optional
        Curvature saved at training time: only the samples to delete are then read, and taken out
        of the statistics at the weights that they belong to (their own, else those of model).
    score : callable, optional
        What the guard takes for accuracy, as for `unlearn`.
    preset : {"recommended", "paper"} or Settings, default "recommended"
    epsilon_budget, delta_budget : float, optional
        What all releases together may spend, by default what one of them takes: the options
        `epsilon` and `delta`.
    lock : bool, default True
        Keep other processes out of the directory. False is for file systems without file locks:
        see to it that one process at a time uses the directory.
    keep : int, default 5
        How many of the newest checkpoints are kept, the present one included. This limits
        `rollback`. The original weights are always kept. Each takes the space of the model, or,
        where that is less than half of it, of the tensors that differ from the original ones: of
        a model with adapters that of the adapters.
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
        groups: Any = None,
        statistics: TrainingStatistics | None = None,
        score: Score | None = None,
        preset: str | Settings = "recommended",
        epsilon_budget: float | None = None,
        delta_budget: float | None = None,
        lock: bool = True,
        keep: int = 5,
        progress: bool = False,
        **options: Any,
    ) -> None:
        check_integer(keep, "keep", 1)
        check_bool(lock, "lock")
        model = unwrapped(model)
        settings, doubt = resolve(
            preset,
            with_decay(options, model),
            retained=statistics is None,
            validation=validation is not None,
            statistics=statistics is not None,
        )
        if settings.update == "certified" and settings.max_drop is not None:
            raise ValueError(f"update='certified' is not possible here: {GUARDED}")
        budget = _budget(settings, epsilon_budget, delta_budget)
        given = receive(
            model, train, loss_fn, validation, statistics, score, progress, settings, groups
        )
        state = state_of(model)
        self._model, self._closed = copy_of(model), False
        folder = None if directory is None else Path(directory).absolute()
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._given = given.with_statistics_at(model)
        self._statistics = self._given.statistics
        self._store = Store(folder, lock=lock)
        with self._store.closed_on_failure():
            _check_new(self._store, directory)
            if doubt:
                warn(doubt)
            self._store.ledger.repair()
            record = start_record(self._given, model)
            record |= {"keep": keep, "budget": budget and budget.to_dict(), **self._counts((), ())}
            self._commit("start", record, self._model, state, self._given.statistics)

    @classmethod
    def resume(
        cls,
        directory: str | os.PathLike[str],
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        *,
        validation: Any = None,
        groups: Any = None,
        statistics: TrainingStatistics | None = None,
        score: Score | None = None,
        progress: bool = False,
        perturb: Any = None,
        lock: bool = True,
    ) -> "Unlearner":
        """Go on with the ledger in a directory, from its last entry.

        What a killed process had begun is dropped: a torn last line and checkpoints without an
        entry. Settings are those on record.

        Parameters
        ----------
        directory : str or path
        model : Module
            A model of the same architecture and types; its weights do not count.
        train, loss_fn, validation, groups, statistics, score
            As they were given at the start. loss_fn and score are compared by their names and the
            options of torch's loss modules and of partials, tensors and TensorDatasets by all
            contents. Other Datasets and DataLoaders may take long to read: of them only 64 samples
            and those that were asked for are compared; `verify_ledger` reads all.
        progress : bool, default False
        perturb : callable, optional
            The option `perturb`, if it was a function: the ledger has only its name.
        lock : bool, default True
            As for the class.

        Raises
        ------
        LedgerError
            If the ledger or the last checkpoint does not verify.
        FileNotFoundError
            If the directory has no ledger, or one without an entry.
        RuntimeError
            If the directory is in use.
        ValueError
            For data, a function or a model that differ from those on record.
        """
        check_bool(lock, "lock")
        model = unwrapped(model)
        folder = Path(directory).absolute()
        if not (folder / LEDGER_FILE).is_file():
            raise FileNotFoundError(f"directory {str(directory)!r} has no ledger")
        self = cls.__new__(cls)
        self._closed = False
        self._store = store = Store(folder, lock=lock)
        with store.closed_on_failure():
            if not len(store.ledger):
                raise FileNotFoundError(
                    f"the ledger in directory {str(directory)!r} has no entry: start again with "
                    "Unlearner(..., directory=...)"
                )
            settings = settings_on_record(store.history, perturb)
            given = receive(
                model, train, loss_fn, validation, statistics, score, progress, settings, groups
            )
            check_given(given, model, store.history)
            self._model = with_state(model, store.state(-1))
            if statistics is not None:
                given = given.with_statistics_at(self._original())
            self._given = given
            self._statistics = self._statistics_at(len(store.ledger) - 1)
            store.ledger.repair()
            store.prune()
        return self

    # -----------------------------------------------------------------------------------------
    # What there is

    @property
    def model(self) -> nn.Module:
        """A copy of the model without the removed samples. It has no noise: do not give it away."""
        return copy_of(self._model)

    @property
    def removed(self) -> tuple[int, ...]:
        """Numbers of the samples that are removed, in the order of the requests."""
        return tuple(self._store.history.removed)

    @property
    def removed_groups(self) -> tuple[int | str, ...]:
        """The groups all of whose samples are removed; none without `groups`."""
        groups = self._given.groups
        return () if groups is None else groups.gone(self._store.history.removed)

    @property
    def pending(self) -> tuple[int, ...]:
        """Numbers of the samples whose removal the guard took back: retrain to remove them."""
        return tuple(self._store.history.pending)

    @property
    def retained(self) -> NDArray[np.int64]:
        """Numbers of the samples that are not removed, ascending; the pending ones among them."""
        return all_but(len(self._given.train), self._store.history.removed)

    @property
    def ledger(self) -> Ledger:
        """The entries."""
        return self._store.ledger

    @property
    def budget(self) -> PrivacyBudget | None:
        """The privacy budget and what releases have spent of it; None without `epsilon`."""
        return copy.deepcopy(self._store.history.budget)

    @property
    def settings(self) -> Settings:
        """The settings of all requests."""
        return self._given.settings

    def __repr__(self) -> str:
        return (
            f"Unlearner({len(self.removed)} of {len(self._given.train)} samples removed, "
            f"{len(self.pending)} pending, {self.ledger!r})"
        )

    # -----------------------------------------------------------------------------------------
    # Requests

    def remove(
        self,
        ids: int | Iterable[int] | None = None,
        *,
        groups: int | str | Iterable[int | str] | None = None,
        note: str | None = None,
    ) -> UnlearnResult:
        """Delete samples from the model: by their numbers, by whom they belong to, or both.

        Parameters
        ----------
        ids : int or iterable of int, optional
            Numbers of training samples, at least one, none of them removed already.
        groups : int, str or iterable of these, optional
            Ids of groups, as in `Unlearner(..., groups=)`: all of their samples are deleted that
            are not removed already. The control groups of such a request are other groups.
        note : str, optional
            Goes into the ledger: who asked for it, for instance.

        Returns
        -------
        UnlearnResult
            Samples whose removal the guard took back, or for which there is no step, `skipped`, are
            pending.

        Raises
        ------
        ValueError, TypeError
            For numbers that are not those of samples, repeated or removed already, for groups that
            do not exist or are removed already, and whatever `unlearn` raises. Then nothing has
            changed.

        Warns
        -----
        UserWarning
            If some samples of a group were removed earlier, and what `unlearn` warns about.
        """
        with self._turn():
            return self._remove(ids, groups, check_note(note))

    def _remove(self, ids: Any, groups: Any, note: str | None) -> UnlearnResult:
        history, n = self._store.history, len(self._given.train)
        seed = request_seed(self.settings.seed, len(self.ledger))
        with heard() as texts:
            asked = check_request(ids, groups, self._given, history.removed)
            numbers = asked.numbers
            retain = all_but(n, [*history.removed, *numbers])
            probe = retain[:: max(1, len(retain) // _PROBE)][:_PROBE].tolist()
            self._given.contents.check(self._given.train, [*numbers, *probe], "train")
            result = self._step(asked, retain, seed, unlearn)
        skipped = [numbers[k] for k in result.skipped]
        gone = [i for i in numbers if i not in skipped]
        removed = [*history.removed, *gone]
        record: dict[str, Any] = {
            **asked.record,
            "hashes": self._given.train.hashes(numbers),
            "skipped": skipped,
            "note": note,
            "seed": seed,
            **self._counts(removed, (history.pending.keys() - gone) | set(skipped)),
            "selection": compact(result.selection),
            "result": result_record(result),
        }
        if not gone:
            self._commit("skip", record, seconds=result.seconds, warnings=texts)
            return result
        guarantee = self._guarantee(result, len(removed))
        record["guarantee"] = guarantee and guarantee.to_dict()
        statistics = self._statistics
        if statistics is not None:
            statistics = self._given.without(statistics, self._original(), gone)
        model = copy_of(result.model)
        state = state_of(model)
        environment = {"seconds": result.seconds, "warnings": texts}
        self._commit("remove", record, model, state, statistics, **environment)
        return result

    def estimate(
        self,
        ids: int | Iterable[int] | None = None,
        *,
        groups: int | str | Iterable[int | str] | None = None,
    ) -> Estimate:
        """Say what `remove` will cost, without removing or recording anything.

        Parameters
        ----------
        ids, groups
            As `remove` takes them.

        Returns
        -------
        Estimate
            Of the step; writing a checkpoint and the ledger's line comes on top.
        """
        with self._turn():
            return self._estimate(ids, groups)

    def _estimate(self, ids: Any, groups: Any) -> Estimate:
        removed = self._store.history.removed
        asked = check_request(ids, groups, self._given, removed)
        retain = all_but(len(self._given.train), [*removed, *asked.numbers])
        seed = request_seed(self.settings.seed, len(self.ledger))
        return self._step(asked, retain, seed, estimate)

    def rollback(self, to: int | None = None, *, note: str | None = None) -> None:
        """Restore weights and removed samples as they were after an earlier entry.

        The ledger gets an entry for it and loses none. What was released stays released, and what
        it spent of the privacy budget stays spent.

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
        with self._turn():
            self._rollback(to, check_note(note))

    def _rollback(self, to: int | None, note: str | None) -> None:
        history = self._store.history
        if to is None:
            to = history.before_last_request()
        if len(history.points) < 2:
            raise ValueError("nothing to roll back: the present entry is the only one")
        check_integer(to, "to", 0, len(history.points) - 2)
        history.check_kept(to)
        state = self._store.state(to)
        record = {"to": to, "note": note, **self._counts(*history.at(to))}
        model = with_state(self._model, state)
        self._commit("rollback", record, model, state, self._statistics_at(to))

    def release(self, *, note: str | None = None) -> nn.Module:
        """Make a copy of the model that may be given away: with fresh noise on every coordinate.

        The entry that pays for it is on the disk before this returns. Its record has "guarantee"
        (`Guarantee.to_dict`) and "budget" after it. The noise comes from the operating system and
        is not recorded. Its environment has "retained_loss": the mean loss of `n_monitor` retained
        samples (256 by default) before and after the noise, except with `statistics`.

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
            Without the option `epsilon`, and as long as nothing is removed.

        Warns
        -----
        UserWarning
            If the noise raises that loss by much. The release is paid for all the same: noise that
            is drawn again until it pleases is not the noise of the guarantee.
        """
        with self._turn():
            released, guarantee, loss = self._release(check_note(note))
        if loss is not None:
            warn_of_noise(loss["before"], loss["after"], guarantee, "the retained samples")
        return released

    def _release(self, note: str | None) -> tuple[nn.Module, Guarantee, dict[str, Any] | None]:
        history, budget = self._store.history, self.budget
        if budget is None:
            raise ValueError(
                "release adds noise: give the options epsilon and delta. Unlearner.model is the "
                "model without noise"
            )
        steps = history.steps(len(self.ledger) - 1)
        if not steps:
            raise ValueError("release hides what is removed, and nothing is removed")
        guarantee = Guarantee.from_dict(self.ledger[steps[-1]].record["guarantee"])
        spend(budget, guarantee)
        released = add_noise(self._model, guarantee.sigma)
        record: dict[str, Any] = {
            "note": note,
            "guarantee": guarantee.to_dict(),
            "budget": budget.to_dict(),
            **self._counts(history.removed, history.pending),
        }
        environment: dict[str, Any] = {"released": state_hash(tensors_of_state(released))}
        loss = None
        if self._given.statistics is None:  # with them only what is removed is read
            loss = losses_around_noise(
                self._given, self._model, released, self.retained, len(self.ledger)
            )
            environment["retained_loss"] = loss
        self._commit("release", record, **environment)
        return released, guarantee, loss

    def close(self) -> None:
        """Release the directory; no request is taken afterwards.

        Waits for the end of another thread's request.
        """
        self._closed = True
        self._store.close()

    def __getstate__(self) -> Any:
        raise TypeError(
            "an Unlearner has a lock and open files, and is of one process: it cannot be copied or "
            "pickled. Copy its model, or give it a directory and call Unlearner.resume in the "
            "other process once this one has closed it"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -----------------------------------------------------------------------------------------

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One request at a time, of an Unlearner that is open."""
        self._check_open()
        with self._store.turn():
            self._check_open()  # another thread may have closed it meanwhile
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the Unlearner is closed; Unlearner.resume opens it again")

    def _counts(self, removed: Sized, pending: Sized) -> dict[str, int]:
        return {
            "n_removed": len(removed),
            "n_pending": len(pending),
            "n_retained": len(self._given.train) - len(removed),
        }

    def _original(self) -> nn.Module:
        return with_state(self._model, self._store.state(0))

    def _statistics_at(self, number: int) -> TrainingStatistics | None:
        if self._given.statistics is None:
            return None
        return statistics_after(self._given, self._store.history, number, self._original())

    def _steps(self) -> list[int]:
        """The entries whose steps led to where the next one starts."""
        if self.settings.update == "certified":  # the theorem is of one step from training's end
            return []
        return self._store.history.steps(len(self.ledger) - 1)

    def _step(
        self,
        asked: Asked,
        retain: NDArray[np.int64],
        seed: int,
        do: Callable[..., Done],
    ) -> Done:
        if self.settings.update == "certified":  # noise is for releases
            every = [*self._store.history.removed, *asked.numbers]
            original, statistics = self._original(), self._given.statistics
            options: dict[str, Any] = {"seed": seed, "update": "newton"}
            return take_step(self._given, original, statistics, every, retain, do=do, **options)
        allowed = allowed_drops(self.settings, self.ledger, self._steps(), self._given.score)
        return take_step(
            self._given,
            self._model,
            self._statistics,
            asked.numbers,
            retain,
            do=do,
            by_group=bool(asked.groups),
            seed=seed,
            **allowed,
        )

    def _guarantee(self, result: UnlearnResult, n_removed: int) -> Guarantee | None:
        if self.settings.epsilon is None:
            return None
        return guarantee_after(
            self._given, result, self._original(), n_removed, self.ledger, self._steps()
        )

    def _commit(
        self,
        kind: str,
        record: dict[str, Any],
        model: nn.Module | None = None,
        state: dict[str, Tensor] | None = None,
        statistics: TrainingStatistics | None = None,
        **environment: Any,
    ) -> None:
        """Write the checkpoint of a new model, if there is one, then the entry; all or nothing."""
        if state is not None:
            record = record | {"checkpoint": self._store.write(state)}
        environment = circumstances() | environment
        with interrupt_held_back():
            self._store.append(kind, record, environment)
            if model is not None:
                self._model, self._statistics = model, statistics
            self._store.prune()


def _check_new(store: Store, directory: Any) -> None:
    """Refuse a directory that another stream has written to."""
    if len(store.ledger):
        raise FileExistsError(
            f"directory {str(directory)!r} has a ledger already: go on with Unlearner.resume, or "
            "give another directory"
        )
    if store.checkpoints.names() - {checkpoint_name(0)}:  # that of a start cut short
        raise FileExistsError(
            f"directory {str(directory)!r} has checkpoints and no ledger to them; give another "
            "directory"
        )


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
