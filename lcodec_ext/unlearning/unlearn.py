"""The deletion: which units, which step, whether it did harm, and what came of it."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_bool
from lcodec_ext._one_rank import OneRank
from lcodec_ext._torch.decay import with_decay
from lcodec_ext._torch.detours import autocasting
from lcodec_ext._torch.group import Ranks, ranks_of
from lcodec_ext._torch.loss import LossFunction, NotFiniteError, euclidean_norm, in_parts, wide
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.predict import Score
from lcodec_ext._torch.states import state_hash
from lcodec_ext._torch.wrapped import told_of, unwrapped
from lcodec_ext.curvature import Selection, UnitSelection
from lcodec_ext.unlearning.deletion import Deletion, delete
from lcodec_ext.unlearning.doubts import warn_of_doubts, warn_of_shortfall, warn_of_statistics
from lcodec_ext.unlearning.estimate import planned
from lcodec_ext.unlearning.guard import Watch
from lcodec_ext.unlearning.idle import measured_first
from lcodec_ext.unlearning.patch import WeightPatch
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.release import (
    check_certifiable,
    guarantee_of_deletions,
    with_noise,
)
from lcodec_ext.unlearning.request import Request, checked_request, told_of_given, told_of_settings
from lcodec_ext.unlearning.result import Outcome, UnlearnResult, result_of
from lcodec_ext.unlearning.select import joined
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.warn import warn_of_harm, warn_of_left_out, warn_of_skipped
from lcodec_ext.unlearning.workplace import Measured, Workplace, copy_state, norm


@twice_differentiable()
def unlearn(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    *,
    preset: str | Settings = "recommended",
    validation: Any = None,
    groups: Any = None,
    statistics: TrainingStatistics | None = None,
    score: Score | None = None,
    inplace: bool = False,
    progress: bool = False,
    group: Any = None,
    **options: Any,
) -> UnlearnResult:
    """Remove samples from a trained model.

    The model is taken to minimise, over the m removed and the n - m retained samples, the mean
    loss plus (weight_decay / 2) |w|^2. On the parameters w_P of the selected units,

    ::

        w_P += (H_P + damping I)^-1 (sum over removed of grad_P (l_i + (weight_decay / 2) |w|^2))
               / (n - m)

    with H_P the curvature of the retained objective: where training has converged, a damped Newton
    step of that objective. Except on a convex model with all units selected this is a heuristic:
    compare it with retraining (`evaluate`). docs/unlearning.md describes each phase.

    Parameters
    ----------
    model : Module
        Left as it is, unless inplace=True. Of one that is compiled or wrapped (DDP and others) it
        is the module inside that is copied, by its own names.
    forget, retain : tensors, Dataset or DataLoader
        Removed and retained training samples, disjoint: (inputs, targets), several inputs before
        the targets, a dict of tensors with "labels" as for models of transformers, a Dataset of
        samples, or a DataLoader of one, whose order does not matter. retain may be None if
        `statistics` stand for it: a preset's repair is then off, and its guard without validation.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the plain mean loss of a batch: ``F.cross_entropy``,
        ``nn.MSELoss()``; or the mean over its tokens, `per_token_loss`, which is also found out.
        The outputs are what the model returns, a tensor or several, or the logits of the outputs of
        transformers. Class weights, and ignored targets of samples with one each, are refused.
    preset : {"recommended", "paper"} or Settings, default "recommended"
        Where the options start from. "recommended": one Gauss-Newton step by conjugate gradients
        on all units, watched by a guard. "paper": Algorithm 1 of Mehta et al., units by L-FOCI.
    validation : tensors, Dataset or DataLoader, optional
        What the strength is found by, and the guard watches accuracy on, with `max_drop`. Without
        them the strength is a constant, and the guard watches retained samples, those that the step
        has not read if there are any; the preset's max_drop is then 0.005.
    groups : array_like, Series or Tensor of int or str, shape (n_retained,), optional
        Where forget has all samples of one user or of several: the id of each retained sample's
        user. The control groups of a calibrated step are then other users, with about as many
        samples together (`Calibration.groups_of`). Refused where nothing is calibrated.
    statistics : TrainingStatistics, optional
        Curvature saved when the model was trained, for use without the training data. If retain is
        given, too, it must be all the samples that stay.
    score : callable, optional
        ``score(outputs, targets)``, one number per sample. Guard and calibration take its mean for
        accuracy. By default whether the largest output is the target.
    inplace : bool, default False
        Change the given model instead of a copy. It stays as it was if anything fails.
    progress : bool, default False
        Say what the deletion will cost, and show a bar for each phase; needs tqdm.
    group : torch.distributed.ProcessGroup, optional
        Over whose ranks the retained samples are spread: retain (and groups) are those of this
        rank, any number or none, numbered in rank order; two ranks with the same ones are refused.
        Everything else is the same on all ranks: model, samples to delete, validation, options. All
        get the same result, bit for bit but for `seconds`. docs/distributed.md says what is spread
        and sent, and what is refused.
    **options
        Attributes of `Settings`: ``selection="lfoci"``, ``damping=0.1``, ``weight_decay=1e-3``.
        **weight_decay is that of the training**, 0 by default: a number, the optimizer that trained
        the model (``weight_decay=optimizer`` takes it from the groups of parameters), or numbers by
        parameter name, 0 for the others.

    Returns
    -------
    UnlearnResult

    Raises
    ------
    IndefiniteCurvatureError
        If the damped curvature is found not to be positive definite, or conjugate gradients do not
        converge with neither weight decay nor damping.
    NothingSelectedError
        If L-FOCI or another rule that perturbs finds no unit on which the loss depends.
    NotFiniteError
        If a loss, a gradient or an activation is NaN or infinite.
    ValueError
        For samples, a model or options that cannot be used, and if the deletion takes more memory
        than there is; the message names them. The errors above are ValueErrors, too.
    TypeError
        For arguments of the wrong type, and unknown options.
    RuntimeError
        Over a group, where another rank failed, or ranks do not compute alike.

    Warns
    -----
    ConvergenceWarning
        If conjugate gradients do not converge, and `max_iterations` was not set.
    UserWarning
        If the deletion would take more than three quarters of the memory that is available, and
        settings were lowered for it; if the deletion is not calibrated, unless calibrate=False says
        that this is meant; if the step was taken back; if with order="sequential" there is none for
        a sample; if it raises the retained loss by much; if half of the removed samples or more are
        also retained; if there are fewer units than `n_units`; if validation samples are few,
        unlike the training ones or among them; if a calibrated step stayed far from its aim or cost
        accuracy; if statistics are of other weights than those that training ended with.

    Notes
    -----
    The model is evaluated in evaluation mode: dropout is off, batch norm uses its running
    statistics. Apart from the selection, the cost is that of `n_curvature` samples: a product with
    the curvature is two or three backward passes over them, on graphs of which up to 512 MiB are
    kept.

    References
    ----------
    R. Mehta, S. Pal, V. Singh and S. Ravi, "Deep Unlearning via Randomized Conditionally
    Independent Hessians", CVPR 2022: Algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.unlearning import unlearn
    >>> x, y = torch.randn(100, 4, generator=torch.manual_seed(0)), torch.arange(100) % 3
    >>> model = torch.nn.Linear(4, 3)
    >>> loss_fn = torch.nn.functional.cross_entropy
    >>> result = unlearn(model, (x[:5], y[:5]), (x[5:], y[5:]), loss_fn, weight_decay=0.01)
    >>> result.n_parameters, result.n_units, result.skipped
    (15, 3, ())
    """
    return _carried_out(
        model,
        forget,
        retain,
        loss_fn,
        preset=preset,
        validation=validation,
        groups=groups,
        statistics=statistics,
        score=score,
        inplace=inplace,
        progress=progress,
        group=group,
        **options,
    )


@twice_differentiable()
def unlearn_or_skip(model: nn.Module, *data: Any, **options: Any) -> UnlearnResult:
    """`unlearn` for one request of many: samples for which it finds no step are skipped."""
    return _carried_out(model, *data, goes_on=True, **options)


def _carried_out(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    *,
    preset: str | Settings,
    validation: Any,
    groups: Any,
    statistics: TrainingStatistics | None,
    score: Score | None,
    progress: bool,
    inplace: bool = False,
    goes_on: bool = False,
    group: Any = None,
    **options: Any,
) -> UnlearnResult:
    begin = time.perf_counter()
    ranks = ranks_of(group, "unlearn")
    with ranks.warning_last(), ExitStack() as modes:
        with ranks.alone("the arguments"):
            check_bool(inplace, "inplace")
            given, model = model, unwrapped(model)
            settings, doubt = resolve(
                preset,
                with_decay(options, model),
                retained=retain is not None,
                validation=validation is not None,
                statistics=statistics is not None,
            )
            work = Workplace.of(model, loss_fn, settings, score, progress, ranks)
            modes.enter_context(autocasting(settings.autocast))
        if isinstance(ranks, Ranks):
            told = told_of_given(retain=retain, validation=validation, statistics=statistics)
            ranks.agree(told | told_of(model) | told_of_settings(settings) | {"inplace": inplace})
        work, request = checked_request(work, forget, retain, validation, statistics, groups)
        check_certifiable(work, model, request)
        if doubt:
            warn(doubt)
        cost = None
        if isinstance(ranks, OneRank):  # others would time different plans
            work, request, cost = planned(work, request, time.perf_counter() - begin)
        with work.timed("monitoring"):
            before = measured_first(work, request)
        start = {k: p.detach() for k, p in model.named_parameters() if k in work.parameters}
        watch = Watch.of(work, request, before)
        warn_of_left_out(work)
        warn_of_doubts(request, watch.guard, settings)
        warn_of_statistics(work, request, before, watch.guard)
        goes_on = goes_on or (settings.order == "sequential" and request.m > 1)
        # Each part: perturb and record, select, step, guard.
        deletions = [delete(work, part, watch, goes_on=goes_on) for part in request.parts(work)]
        warn_of_skipped(deletions, watch.guard, work.settings, request.m)
        applied, selection = _selections(deletions)
        step_norm = _distance(work, start)
        with work.timed("monitoring"):
            # Into a copy first, also in place: the given model changes only when all has gone well.
            changed = work.handed_over(model, applied)
            size = selection.size(work.model)
            guarantee = guarantee_of_deletions(
                work, changed, request, deletions, before, norm(start), size
            )
            changed = with_noise(work, changed, guarantee)
            after = _measured(work, request, guarantee)
        warn_of_harm(before, after, guarantee, deletions, watch.guard)
        warn_of_shortfall(before, after, deletions, watch.guard, step_norm)
        if isinstance(ranks, Ranks):
            _check_alike(ranks, changed)
        patch = _patch_of(model, changed)
    if inplace:  # last, behind warnings that may be errors
        copy_state(changed, model)
        changed = given
    work.clock.seconds["total"] = time.perf_counter() - begin
    measured = Outcome(before, after, selection, step_norm, guarantee, patch, cost)
    return result_of(changed, work, request, deletions, watch.guard, measured)


def _distance(work: Workplace, start: Mapping[str, Tensor]) -> float:
    """Norm of the step that was taken, from where the parameters were."""
    return euclidean_norm(
        wide(new) - wide(old)
        for k, p in work.parameters.items()
        for new, old in zip(in_parts(p), in_parts(start[k]), strict=True)
    )


def _check_alike(ranks: Ranks, changed: nn.Module) -> None:
    """Refuse results that differ between ranks in a bit."""
    state = {**dict(changed.named_parameters()), **dict(changed.named_buffers())}
    told = ranks.gather_bytes(state_hash(state).encode())
    other = next((r for r, each in enumerate(told) if each != told[0]), None)
    if other is not None:
        raise RuntimeError(
            f"unlearn: rank 0 and rank {other} have come to different parameters, and none is "
            "delivered. Ranks must compute alike: give them the same kind of processor or GPU, "
            "version of PyTorch and number of threads"
        )


def _measured(work: Workplace, request: Request, guarantee: Guarantee) -> Measured:
    """Losses and gradients at the end; if there are none, say that noise did it."""
    try:
        found = work.measure(request.forget, request.monitored)
        return found.kept(request.m, request.n_retain)
    except NotFiniteError as error:
        if guarantee.sigma == 0:
            raise
        raise NotFiniteError(
            f"{error}. The noise for epsilon={guarantee.epsilon:g}, delta={guarantee.delta:g}, "
            f"whose standard deviation is {guarantee.sigma:.3g}, is too much for this model: a "
            "larger epsilon or weight decay takes less noise"
        ) from error


def _patch_of(before: nn.Module, after: nn.Module) -> WeightPatch | None:
    try:
        return WeightPatch.between(before, after)
    except TypeError:  # a state that holds more than dense tensors
        return None


def _selections(deletions: Sequence[Deletion]) -> tuple[Selection, Selection]:
    """What was changed, and this or, where all was taken back, what was tried."""
    applied: Selection | None = None
    tried: Selection | None = None
    for deletion in deletions:
        tried = joined(tried, deletion.selection)
        if not deletion.skipped:
            applied = joined(applied, deletion.selection)
    assert tried is not None  # there is at least one deletion
    return applied or UnitSelection({}), applied or tried
