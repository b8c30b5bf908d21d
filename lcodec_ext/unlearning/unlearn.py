"""The deletion: which units, which step, whether it did harm, and what came of it."""

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcodec_ext._checks import check_bool
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import Batch, tensors_of
from lcodec_ext._torch.loss import (
    Gradient,
    LossFunction,
    NotFiniteError,
    check_loss_fn,
    check_parts,
    finite_loss,
    is_much_worse,
    loss_in,
    mean_gradient,
    mean_loss,
    scalar_loss,
)
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.predict import Score, predict
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.curvature.operators import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SecantOperator,
)
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.curvature.solvers import (
    ConvergenceWarning,
    IndefiniteCurvatureError,
    SolveResult,
)
from lcodec_ext.dependence import FociResult
from lcodec_ext.unlearning.privacy import Guarantee, add_noise, removal_guarantee
from lcodec_ext.unlearning.privacy.linear import CertifiedLinear
from lcodec_ext.unlearning.record.activations import find_calls
from lcodec_ext.unlearning.record.perturbation import (
    CHEAP_THRESHOLD,
    Recording,
    record,
    select_cheap,
    select_lfoci,
)
from lcodec_ext.unlearning.select import (
    Candidates,
    find_candidates,
    rank_by_score,
    rank_last,
    rank_random,
    take,
)
from lcodec_ext.unlearning.settings import Settings, resolve
from lcodec_ext.unlearning.statistics import TrainingStatistics

_PROBE = 32  # samples on which model and loss are checked, of either set
GUARD_SIZE = 1000  # retained samples on which harm is looked for
_LBFGS = 20  # iterations
_LONGEST = 8.0  # multiple of a step, by lengthening it
_LENGTHS = 6  # that are tried
_SHORT = 1.0  # relative residual of a step that falls short
GUARDED = "max_drop: a guard looks at the data and tells what it saw"
_CHEAP_ROUNDS = 100  # after which "cheap" ends in any case; the paper has no such end
_OPERATORS = {
    "gauss_newton": GaussNewtonOperator,
    "hessian": HessianOperator,
    "fisher": FisherOperator,
}


class BeforeAfter(NamedTuple):
    """A quantity before and after the deletion."""

    before: float
    after: float


@dataclass(frozen=True, eq=False, repr=False)
class UnlearnResult:
    """The model after `unlearn`, and what was done to it.

    The retained objective is the mean loss of retained samples plus (weight_decay / 2) |w|^2, w
    being all trainable parameters. What is said of it was measured on `n_monitored` of them, with
    the model in evaluation mode.

    Attributes
    ----------
    model : Module
        A new model, or with inplace=True the one that was given.
    settings : Settings
        As used.
    selection : UnitSelection
        The units whose parameters were changed; where all was taken back, those that were tried.
    foci : FociResult or None
        The selection by L-FOCI: T of the loss, and in `names` the unit and call ("fc1[3] call 0")
        of every step.
    n_forget, n_retain, n_monitored : int
        Samples removed and retained, and those of the latter that were measured.
    n_parameters, n_trainable : int
        Parameters of the selected units, and trainable ones of the model.
    n_units : int
        Units that could have been selected.
    n_dead : int
        Of these, units that no perturbation moved, left out by "lfoci" and "cheap".
    skipped : tuple of int
        Samples of the request, by position, whose removal did harm and was taken back: all of
        them or none, but with order="sequential". They are still in the model, and need retraining.
    attempts : int
        Steps that were tried, the retries included.
    length : float
        What multiple of the step was taken in the last attempt, by `Settings.halvings` and
        `Settings.lengthen`.
    repaired : bool
        Whether repair epochs followed a step.
    damping : float
        As used in the last attempt.
    curvature_plan : str
        Which way products with the matrix were computed, and why; empty for updates without one.
    solve_method : str
        "cholesky", "cg" or "woodbury": see `CurvatureOperator.solve`; else the update.
    solve_iterations : int
    solve_residual : float
        |matrix @ step - gradient| / |gradient|, the largest of all steps; nan without a matrix.
    step_norm : float
        Euclidean norm of the change of the weights.
    training_gradient_norm : float
        Gradient norm, before, of the objective on removed and retained samples together; nan
        without retained samples. The removal gradient takes it for zero: compare
        `gradient_norm.before`.
    gradient_norm, gradient_norm_selected : BeforeAfter
        Of the retained objective, over all trainable parameters and over those selected.
    loss_forget, loss_retain : BeforeAfter
        Mean losses, without the regulariser.
    guard : BeforeAfter
        What the guard watched, of the given model and of the result before noise; nan where
        `Settings.max_drop` is None.
    watched : str
        What that is: "accuracy", "the score" or, where there is neither, "minus the mean loss".
    guarantee : Guarantee
        What (epsilon, delta) mean for this result: certified, heuristic, or nothing.
    seconds : dict of str to float
        Time taken by each phase, and in "total".
    """

    model: nn.Module
    settings: Settings
    selection: UnitSelection
    foci: FociResult | None
    n_forget: int
    n_retain: int
    n_monitored: int
    n_parameters: int
    n_trainable: int
    n_units: int
    n_dead: int
    skipped: tuple[int, ...]
    attempts: int
    length: float
    repaired: bool
    damping: float
    curvature_plan: str
    solve_method: str
    solve_iterations: int
    solve_residual: float
    step_norm: float
    training_gradient_norm: float
    gradient_norm: BeforeAfter
    gradient_norm_selected: BeforeAfter
    loss_forget: BeforeAfter
    loss_retain: BeforeAfter
    guard: BeforeAfter
    watched: str
    guarantee: Guarantee
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as JSON takes it; nan becomes None."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "model":
                continue
            if isinstance(value, Settings | UnitSelection | Guarantee):
                value = value.to_dict()
            elif isinstance(value, FociResult):
                value = {"names": value.names, "T": [float(t) for t in value.cumulative]}
            elif isinstance(value, BeforeAfter):
                value = [_json(value.before), _json(value.after)]
            elif isinstance(value, float):
                value = _json(value)
            elif isinstance(value, tuple):
                value = list(value)
            values[field.name] = value
        return values

    def __repr__(self) -> str:
        def change(pair: BeforeAfter) -> str:
            return f"{pair.before:.4g} -> {pair.after:.4g}"

        s = self.settings
        method = s.selection if isinstance(s.selection, str) else "given"
        layers = [f"{name or '(model)'}: {len(u)}" for name, u in self.selection.units.items()]
        if len(layers) > 6:
            layers = [*layers[:5], f"{len(layers) - 5} layers more"]
        iterations = f" of {self.solve_iterations} iterations" * (self.solve_iterations > 0)
        solved = f"{self.solve_method}{iterations}"
        if not math.isnan(self.solve_residual):
            solved += f", residual {self.solve_residual:.1e}"
        matrix = f"{s.curvature}, " * bool(self.curvature_plan)
        damping = f"damping {self.damping:g}"
        if s.output_damping:
            damping += f", of outputs {s.output_damping:g}"
        lines = [
            f"UnlearnResult: {self.n_forget - len(self.skipped)} of "
            f"{self.n_forget + self.n_retain} samples removed in {self.seconds['total']:.2f} s",
            f"  units         {len(self.selection)} of {self.n_units}, {method} "
            f"({', '.join(layers)})",
            f"  parameters    {self.n_parameters:,} of {self.n_trainable:,}",
            f"  step          {matrix}weight decay {s.weight_decay:g}, {damping}, "
            f"{solved}, norm {self.step_norm:.4g}"
            + f", {self.length:.3g} of the step"
            * (self.length != 1),
            f"  forget loss   {change(self.loss_forget)}",
            f"  retain loss   {change(self.loss_retain)}",
            f"  gradient norm {change(self.gradient_norm)} retained, on the selection "
            f"{change(self.gradient_norm_selected)}, {self.training_gradient_norm:.2g} of training",
        ]
        if s.max_drop is not None:
            lines.append(
                f"  guard         {self.watched} {change(self.guard)}, {self.attempts} attempt"
                + "s" * (self.attempts > 1)
                + ", repaired" * self.repaired
            )
        if self.guarantee.kind != "none":
            privacy = str(self.guarantee).replace("\n  ", "\n" + " " * 16)
            lines.append(f"  privacy       {privacy}")
        if self.skipped:
            lines.append(f"  TAKEN BACK    {len(self.skipped)} samples, which need retraining")
        return "\n".join(lines)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


@twice_differentiable()
def unlearn(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    *,
    preset: str | Settings = "recommended",
    validation: Any = None,
    statistics: TrainingStatistics | None = None,
    score: Score | None = None,
    inplace: bool = False,
    progress: bool = False,
    **options: Any,
) -> UnlearnResult:
    """Remove samples from a trained model.

    The model is taken to minimise, over the m removed and the n - m retained samples, the mean
    loss plus (weight_decay / 2) |w|^2. On the parameters w_P of the selected units,

    ::

        w_P += (H_P + damping I)^-1 (sum over removed of grad_P (l_i + (weight_decay / 2) |w|^2))
               / (n - m)

    with H_P the curvature of the retained objective. Where training has converged this is a damped
    Newton step of that objective. It is a heuristic on anything but a convex model with all units
    selected: compare it with retraining (`evaluate`).

    Parameters
    ----------
    model : Module
        Left as it is, but with inplace=True.
    forget, retain : tensors, Dataset or DataLoader
        Removed and retained training samples, disjoint: (inputs, targets), several inputs before
        the targets, a dict of tensors with "labels" as for models of transformers, a Dataset of
        samples, or a DataLoader of one, whose order does not matter. retain may be None where
        `statistics` stand for it: a preset's repair is then off, and its guard without validation.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch: ``F.cross_entropy``,
        ``nn.MSELoss()``. The outputs are what the model returns, a tensor or several; of the
        outputs of transformers, the logits. Class weights and ignored targets are no means over
        samples, and refused.
    preset : {"recommended", "paper"} or Settings, default "recommended"
        Where the options start from. "recommended": one Gauss-Newton step by conjugate gradients
        on all units, watched by a guard. "paper": Algorithm 1 of Mehta et al., units by L-FOCI.
    validation : tensors, Dataset or DataLoader, optional
        On which the guard watches accuracy, where `max_drop` is set; by default on retained samples
        that the step has not read, if it has not read all.
    statistics : TrainingStatistics, optional
        Curvature saved when the model was trained, for use without the training data. If retain is
        given, too, it must be all the samples that stay: losses and the guard are measured on it.
    score : callable, optional
        ``score(outputs, targets)``, a tensor of one number a sample whose mean the guard takes for
        accuracy. By default whether the largest of a classifier's outputs is the target.
    inplace : bool, default False
        Change the given model instead of a copy. It stays as it was if anything fails.
    progress : bool, default False
        Show progress bars; needs tqdm.
    **options
        Attributes of `Settings`: ``selection="lfoci"``, ``damping=0.1``, ``weight_decay=1e-3``.
        **weight_decay is that of the training**, 0 by default.

    Returns
    -------
    UnlearnResult

    Raises
    ------
    IndefiniteCurvatureError
        If the damped curvature is found not to be positive definite, as it is where it is
        factorised, and by conjugate gradients where they meet such a direction. If these do not
        converge, with neither weight decay nor damping.
    ValueError
        For samples, a model or options that cannot be used, for L-FOCI selecting nothing, and
        wherever a NaN or infinity turns up; the message names it.
    TypeError
        For arguments of the wrong type, and unknown options.

    Warns
    -----
    ConvergenceWarning
        If conjugate gradients do not converge, and `max_iterations` was not set.
    UserWarning
        If the step was taken back; if it raises the loss of the retained samples by much; if half
        of the removed samples or more are among those; if there are fewer units than `n_units`.

    Notes
    -----
    Works on a copy of the model in evaluation mode: dropout is off, batch norm uses its running
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
    begin = time.perf_counter()
    settings = resolve(
        preset,
        options,
        retained=retain is not None,
        validation=validation is not None,
        statistics=statistics is not None,
    )
    check_bool(inplace, "inplace")
    check_bool(progress, "progress")
    work = _Workplace(model, loss_fn, settings, score, progress)
    removed = as_samples(forget, "forget", work.device, work.dtype).loaded()
    kept = None if retain is None else as_samples(retain, "retain", work.device, work.dtype)
    held = None
    if validation is not None:
        held = as_samples(validation, "validation", work.device, work.dtype)
    _check_roles(settings, kept, held, statistics)
    work.probe(removed, kept, held)
    if kept is not None and kept.in_memory:
        _warn_of_overlap(removed, kept)

    m = len(removed)
    n_retain = len(kept) if kept is not None else work.n_retained(statistics, m)
    if statistics is not None and statistics.n != m + n_retain:
        raise ValueError(
            f"statistics are of {statistics.n} training samples; forget and retain have "
            f"{m} + {n_retain}. retain must be all that stay, or None"
        )
    if settings.update == "certified":  # what is lacking, before anything is computed
        guarantee_of(
            settings,
            model,
            n=m + n_retain,
            m=m,
            n_selected=work.n_trainable,
            training_gradient_norm=0.0,
            solve_residual=0.0,
            parameter_norm=0.0,
            damping=settings.damping,
            order=settings.order,
        )
    with work.timed("monitoring"):
        drawn = None if kept is None else _Drawn(work, kept)
        monitored = None if drawn is None else drawn.monitored
        before = work.measure(removed, monitored)
    guarded = settings.max_drop is not None or settings.repair_drop is not None
    unread = None
    if drawn is not None and (settings.lengthen is not None or (guarded and held is None)):
        unread = drawn.watched()
    guard = None
    if guarded:
        held = unread if held is None else held
        assert held is not None  # said beforehand
        guard = _Guard(work, held)
    parts = [[k] for k in range(m)] if settings.order == "sequential" else [list(range(m))]
    deletions: list[_Deletion] = []
    start = {k: p.detach().clone() for k, p in work.parameters.items()}
    for part in parts:
        rest = None if drawn is None else drawn.with_samples(removed.subset(range(part[-1] + 1, m)))
        deletion = _Deletion(
            work, removed.subset(part), rest, statistics, guard, unread, len(deletions)
        )
        deletion.run()
        deletions.append(deletion)
    skipped = tuple(k for part, d in zip(parts, deletions, strict=True) if d.skipped for k in part)
    if guard is not None and skipped:
        warnings.warn(
            f"the removal of {len(skipped)} of {m} samples was taken back: it changed "
            f"{guard.watched} by {guard.worst:.3g}, more than max_drop={settings.max_drop:g} "
            "allows, in every attempt. They need retraining",
            stacklevel=3,  # behind the decorator
        )
    fewest = min(len(d.selection) for d in deletions)
    if settings.selection != "cheap" and settings.n_units is not None and fewest < settings.n_units:
        warnings.warn(
            f"n_units is {settings.n_units}, and only {fewest} units can be ranked: the others are "
            "dead, or there are no more",
            stacklevel=3,
        )
    applied, tried = UnitSelection({}), UnitSelection({})
    for deletion in deletions:
        tried |= deletion.selection
        if not deletion.skipped:
            applied |= deletion.selection
    selection = applied or tried
    layout = UnitLayout(selection, work.model)

    step = math.sqrt(
        sum(
            float((p.detach().double() - start[k].double()).square().sum())
            for k, p in work.parameters.items()
        )
    )
    with work.timed("monitoring"):
        # Into a copy first, also in place: the given model changes only when all has gone well.
        # What is measured are the new weights as the model's dtype and the noise leave them.
        changed = copy.deepcopy(model)
        if applied:
            work.hand_over(changed, applied)
        guarantee = _guarantee(
            work, changed, before, start, deletions, layout, m, n_retain, monitored
        )
        if guarantee.sigma > 0:
            changed = add_noise(changed, guarantee.sigma)
            work.take_over(changed)
        done = work.measure(removed, monitored)
    if is_much_worse(before.retained_loss, done.retained_loss):
        if guarantee.sigma > 0:
            why = (
                f", the noise for epsilon={settings.epsilon:g} included, whose standard deviation "
                f"is {guarantee.sigma:.3g}. A larger epsilon or weight decay takes less noise"
            )
        else:
            why = (
                ": it went too far, as it does where the model was not trained to a stationary "
                f"point. Take a larger damping (it was {deletions[-1].damping:.3g}); 10 to 1000 "
                "times as much is not unusual for networks"
            )
        warnings.warn(
            "the step raised the mean loss of the retained samples from "
            f"{before.retained_loss:.3g} to {done.retained_loss:.3g}{why}",
            stacklevel=3,
        )
    if inplace:  # last, behind warnings that may be errors
        with torch.no_grad():
            new = dict(changed.named_parameters())
            for name, parameter in model.named_parameters():
                parameter.copy_(new[name])
            for buffer, value in zip(model.buffers(), changed.buffers(), strict=True):
                buffer.copy_(value)
        changed = model
    work.seconds["total"] = time.perf_counter() - begin
    solves = [s for d in deletions for s in d.solves]
    residuals = [s.residual for s in solves]
    return UnlearnResult(
        model=changed,
        settings=settings,
        selection=selection,
        foci=deletions[-1].foci,
        n_forget=m,
        n_retain=n_retain,
        n_monitored=0 if monitored is None else len(monitored),
        n_parameters=layout.size,
        n_trainable=work.n_trainable,
        n_units=deletions[-1].n_units,
        n_dead=deletions[-1].n_dead,
        skipped=skipped,
        attempts=sum(d.attempts for d in deletions),
        length=deletions[-1].length,
        repaired=any(d.repaired for d in deletions),
        damping=deletions[-1].damping,
        curvature_plan=deletions[-1].plan,
        solve_method=solves[-1].method if solves else settings.update,
        solve_iterations=sum(s.iterations for s in solves) if solves else deletions[-1].iterations,
        solve_residual=max(residuals) if residuals else math.nan,
        step_norm=step,
        training_gradient_norm=_training_norm(before, m, n_retain),
        gradient_norm=BeforeAfter(_norm(before.retained), _norm(done.retained)),
        gradient_norm_selected=BeforeAfter(
            _norm(before.retained, layout), _norm(done.retained, layout)
        ),
        loss_forget=BeforeAfter(before.forget_loss, done.forget_loss),
        loss_retain=BeforeAfter(before.retained_loss, done.retained_loss),
        guard=BeforeAfter(math.nan, math.nan) if guard is None else guard.quality,
        watched="" if guard is None else guard.watched,
        guarantee=guarantee,
        seconds=work.seconds,
    )


class _Measured(NamedTuple):
    forget_loss: float
    forget: Gradient
    retained_loss: float
    retained: Gradient | None


class _Workplace:
    """A copy of the model in evaluation mode, and what is asked of it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        settings: Settings,
        score: Score | None,
        progress: bool,
    ) -> None:
        self.device = _check_model(model)
        check_loss_fn(loss_fn)
        if score is not None and not callable(score):
            raise TypeError(f"score must be callable; got {type(score).__name__}")
        trainable = [p for p in model.parameters() if p.requires_grad]
        double = any(p.dtype == torch.float64 for p in trainable)
        self.dtype = settings.dtype or (torch.float64 if double else torch.float32)
        self.model = copy.deepcopy(model).to(self.dtype).eval()
        self.loss_fn = loss_in(self.dtype, loss_fn)
        self.settings, self.score, self.progress = settings, score, progress
        self.parameters = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.n_trainable = sum(p.numel() for p in self.parameters.values())
        self.seconds: dict[str, float] = {}
        self._checked: set[Samples] = set()  # whose loss has been found to be a mean

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def n_retained(self, statistics: TrainingStatistics | None, m: int) -> int:
        """The number of retained samples, where they are not at hand."""
        if statistics is None:
            raise ValueError("retain is None, and no statistics stand for it")
        if statistics.n <= m:
            raise ValueError(
                f"statistics are of {statistics.n} training samples, and forget has {m}"
            )
        return statistics.n - m

    def loss(self, batch: Batch, name: str) -> Tensor:
        return finite_loss(self.loss_fn, outputs_of(self.model, batch), batch.targets, name)

    def gradient(
        self, samples: Samples, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[float, Gradient]:
        """Mean loss, and the gradient of it and the regulariser by parameters."""
        first = samples not in self._checked
        self._checked.add(samples)
        return mean_gradient(
            self.model,
            samples,
            self.loss_fn,
            self.parameters if parameters is None else parameters,
            self.settings.batch_size,
            weight_decay=self.settings.weight_decay,
            check=first,
        )

    def measure(self, forget: Samples, retained: Samples | None) -> _Measured:
        """Losses and gradients of both sets at the present weights."""
        forget_loss, forget_gradient = self.gradient(forget)
        if retained is None:
            return _Measured(forget_loss, forget_gradient, math.nan, None)
        return _Measured(forget_loss, forget_gradient, *self.gradient(retained))

    def mean_loss(self, samples: Samples) -> float:
        """Without the regulariser; NaN or infinity where it is."""
        return mean_loss(self.model, samples, self.loss_fn, self.settings.batch_size)

    def quality(self, samples: Samples) -> tuple[str, float]:
        """Accuracy, or minus the mean loss where there is none, and what it is called."""
        run = predict(self.model, samples, self.loss_fn, self.settings.batch_size, self.score)
        if run.accuracy is None:
            return "minus the mean loss", -float(run.losses.mean())
        return ("accuracy" if self.score is None else "the score"), run.accuracy

    def probe(self, forget: Samples, retain: Samples | None, held: Samples | None) -> None:
        """Check model and loss on a few samples of each set."""
        known: tuple[str, list[tuple[int, torch.dtype]]] | None = None
        for samples in (forget, retain, held):
            if samples is None:
                continue
            step = max(1, len(samples) // _PROBE)
            batch = samples.fetch(range(0, len(samples), step)[:_PROBE])
            tensors = tensors_of((batch.args, batch.kwargs, batch.targets))
            kinds = [(t.ndim, t.dtype) for t in tensors]
            if known is not None and known[1] != kinds:
                raise ValueError(
                    f"the samples of {known[0]} and {samples.name} must be alike; those of "
                    f"{known[0]} have tensors of (dimensions, dtype) {known[1]}, of "
                    f"{samples.name} {kinds}"
                )
            known = known or (samples.name, kinds)
            self._probe(batch, samples.name)

    def _probe(self, batch: Batch, name: str) -> None:
        try:
            with torch.no_grad():
                outputs = outputs_of(self.model, batch)
                single = outputs_of(self.model, batch.part(slice(1)))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"the model fails on samples of {name}: {error}") from error
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
                raise ValueError(
                    f"the outputs of the model for samples of {name} hold NaN or infinity"
                )
            scale = float(tensor.abs().max())
            rtol, atol = (1e-6, 1e-9) if self.dtype == torch.float64 else (1e-3, 1e-4 * scale)
            if not torch.allclose(alone, tensor[:1], rtol=rtol, atol=atol):
                raise ValueError(
                    "the output of a sample changes with the other samples in its batch, or at "
                    "random; the loss, then, is not a mean over samples"
                )
        try:
            loss = scalar_loss(self.loss_fn, outputs, batch.targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(
                f"loss_fn fails on the model's outputs for samples of {name} and their targets: "
                f"{error}"
            ) from error
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the {name} samples is NaN or infinite")
        check_parts(self.loss_fn, outputs, batch.targets, batch.size, 1)

    def hand_over(self, model: nn.Module, selection: UnitSelection) -> None:
        """Write selection and buffers to a model, and take the weights back as it rounds them."""
        if self.settings.n_recalibrate or self.settings.repair_epochs:
            with torch.no_grad():
                for new, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
                    buffer.copy_(new)
        selection.scatter_(model, selection.gather(self.model).detach())
        rounded = selection.gather(model).detach()
        if not torch.isfinite(rounded).all():
            raise ValueError("the new weights overflow the dtype of the model")
        selection.scatter_(self.model, rounded)

    def take_over(self, model: nn.Module) -> None:
        """Take all weights from a model."""
        with torch.no_grad():
            for parameter, new in zip(self.model.parameters(), model.parameters(), strict=True):
                parameter.copy_(new)


def _guarantee(
    work: _Workplace,
    model: nn.Module,
    before: _Measured,
    start: Gradient,
    deletions: "list[_Deletion]",
    layout: UnitLayout,
    m: int,
    n_retain: int,
    monitored: Samples | None,
) -> Guarantee:
    """What noise the result takes, and what that guarantees; refuse what is not certified."""
    s = work.settings
    whole = monitored is not None and len(monitored) == n_retain
    guarantee = guarantee_of(
        s,
        model,
        n=m + n_retain,
        m=m,
        n_selected=layout.size,
        training_gradient_norm=_training_norm(before, m, n_retain) if whole else math.nan,
        solve_residual=max((v.residual for d in deletions for v in d.solves), default=math.nan),
        parameter_norm=max(
            _norm(start), _norm({k: p.detach() for k, p in work.parameters.items()})
        ),
        damping=deletions[-1].damping,
        order=s.order,
    )
    if guarantee.kind == "none" or not any(d.skipped for d in deletions):
        return guarantee
    why = "samples of the request were not removed: their removal was taken back"
    return dataclasses.replace(guarantee, kind="heuristic", reasons=(*guarantee.reasons, why))


def guarantee_of(
    settings: Settings, model: nn.Module, *, damping: float, order: str, **measured: Any
) -> Guarantee:
    """What the noise of the settings guarantees for a deletion with them, guard and all.

    Parameters
    ----------
    settings, model : Settings, Module
    damping, order
        As the step had them.
    **measured
        n, m, n_selected, training_gradient_norm, solve_residual and parameter_norm, as
        `removal_guarantee` takes them.

    Raises
    ------
    ValueError
        If the settings ask for a certificate and there is none.
    """
    s = settings
    guarantee = removal_guarantee(
        model,
        **measured,
        epsilon=s.epsilon,
        delta=s.delta,
        weight_decay=s.weight_decay,
        update="newton" if s.update == "certified" else s.update,
        curvature=s.curvature,
        gradient=s.gradient,
        damping=damping,
        steps=s.steps,
        n_curvature=s.n_curvature,
        order=order,
        repair_epochs=s.repair_epochs,
        lipschitz=s.lipschitz,
        hessian_lipschitz=s.hessian_lipschitz,
        strong_convexity=s.strong_convexity,
        radius=s.radius,
        gradient_bound=s.gradient_bound,
        rtol=s.rtol,
    )
    reasons = guarantee.reasons
    if s.max_drop is not None:
        reasons = (*reasons, GUARDED)
    if s.lengthen is not None:
        reasons = (*reasons, "lengthen: the length of the step depends on the data")
    if s.update == "certified" and reasons:
        raise ValueError(
            "update='certified' cannot be had here: "
            + "; ".join(reasons)
            + ". Ask for update='newton' to get the same step with heuristic noise"
        )
    if guarantee.kind == "none" or not reasons:
        return guarantee
    return dataclasses.replace(guarantee, kind="heuristic", reasons=reasons)


class _Retained(NamedTuple):
    """The samples that a deletion retains, and those of them that its step reads."""

    all: Samples
    read: Samples


class _Drawn:
    """Retained samples: those that steps read, that are measured, and that the guard watches.

    Each is drawn, and fetched, once.
    """

    def __init__(self, work: _Workplace, kept: Samples) -> None:
        settings = work.settings
        self._seed, self._most, self._kept = settings.seed, settings.n_curvature, kept
        self._order = self._rng().permutation(len(kept))
        self.read = kept if self._most is None else self._some(self._order[: self._most])
        self.monitored = self.read
        if settings.n_monitor is not None and settings.n_monitor < len(self.read):
            few = self._rng().permutation(len(self.read))[: settings.n_monitor]
            self.monitored = self.read.subset(np.sort(few).tolist()).loaded()

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 0, *stream])

    def _some(self, numbers: NDArray[np.int64]) -> Samples:
        return self._kept.subset(np.sort(numbers).tolist()).loaded()

    def watched(self) -> Samples:
        """For a guard without validation samples: samples that no step reads, if there are any."""
        unread = self._order[len(self.read) :]
        return self._some((unread if len(unread) else self._order)[:GUARD_SIZE])

    def with_samples(self, others: Samples) -> _Retained:
        """Retain others, too: those of a request whose turn comes later."""
        n, m = len(self._kept), len(others)
        if not m:
            return _Retained(self._kept, self.read)
        both = Samples.joined([self._kept, others])
        if self._most is None:
            return _Retained(both, both)
        # A draw from both, of which the part from the retained ones was fetched before.
        rng = self._rng(m)
        size = min(self._most, n + m)
        few = int(rng.hypergeometric(m, n, size))
        parts = [
            samples.subset(np.sort(rng.permutation(len(samples))[:count]).tolist())
            for samples, count in ((self.read, size - few), (others, few))
            if count
        ]
        return _Retained(both, Samples.joined(parts))


class _Guard:
    """What is watched for harm: its value at the start, and now."""

    def __init__(self, work: _Workplace, samples: Samples) -> None:
        self._work, self._samples = work, samples
        with work.timed("guard"):
            self.watched, value = work.quality(samples)
        self.quality = BeforeAfter(value, value)
        self.worst = 0.0

    def now(self) -> float:
        """Its present value, minus infinity where the model's outputs are not finite."""
        with self._work.timed("guard"):
            try:
                return self._work.quality(self._samples)[1]
            except ValueError:  # all else would have failed at the start
                return -math.inf

    def accepts(self) -> bool:
        """Whether the present weights have lost no more than is allowed."""
        most, value = self._work.settings.max_drop, self.now()
        if most is None or self.quality.before - value <= most:
            self.quality = BeforeAfter(self.quality.before, value)
            return True
        self.worst = value - self.quality.before
        return False


class _Deletion:
    """The removal of some samples at once: selection, step, guard, retries."""

    def __init__(
        self,
        work: _Workplace,
        forget: Samples,
        retained: _Retained | None,
        statistics: TrainingStatistics | None,
        guard: _Guard | None,
        unread: Samples | None,
        number: int,
    ) -> None:
        self._work, self._settings = work, work.settings
        self._forget, self._guard, self._unread = forget, guard, unread
        self._retain = None if retained is None else retained.all
        self._read = None if retained is None else retained.read
        # At these weights for good: "cheap" steps more than once.
        self._statistics = None if statistics is None else statistics.at(work.model)
        self._seed = [work.settings.seed, 2, number]
        m = len(forget)
        self._n_retain = (
            len(self._retain) if self._retain is not None else work.n_retained(statistics, m)
        )
        self.selection = UnitSelection({})
        self.foci: FociResult | None = None
        self.skipped = False
        self.repaired = False
        self.length = 1.0
        self.n_dead = 0
        self.attempts = 0
        self.iterations = 0
        self.damping = work.settings.damping
        self.plan = ""
        self.solves: list[SolveResult] = []

    def run(self) -> None:
        """Remove the samples; "cheap" takes one unit after the other."""
        if self._settings.selection != "cheap":
            gradient = self._gradient()
            self.selection = self._choose(gradient)
            self.skipped = not self._round(self.selection, gradient)
            return
        for number in range(self._settings.n_units or _CHEAP_ROUNDS):
            gradient = self._gradient()
            unit = self._choose(gradient)
            if number and not unit:
                return
            if not self._round(unit, gradient):
                if not number:  # what a later unit would have done is taken back alone
                    self.selection, self.skipped = unit, True
                return
            self.selection |= unit

    def _gradient(self) -> Gradient:
        with self._work.timed("gradients"):
            return self._work.gradient(self._forget)[1]

    def _round(self, selection: UnitSelection, gradient: Gradient) -> bool:
        """Step, look whether it did harm, try again; whether a step was left to stand."""
        work, settings = self._work, self._settings
        self._stepped = selection
        self._layout = UnitLayout(selection, work.model)
        share = len(self._forget) / self._n_retain
        self._removal = self._layout.gather(gradient) * share
        self._start = self._layout.gather(work.parameters).detach().clone()
        buffers = {k: b.clone() for k, b in work.model.named_buffers()}
        self.damping = settings.damping
        if settings.lengthen is not None and self._unread is not None:
            self._unread_loss = work.mean_loss(self._unread)
        rate = settings.learning_rate
        done = self.solves, self.iterations  # in earlier rounds
        for attempt in range(settings.retries + 1):
            self.attempts += 1
            self.length, self.repaired = 1.0, False
            self.solves, self.iterations = list(done[0]), done[1]
            if self._accepted(rate):
                return True
            self._set(self._start)
            for name, buffer in work.model.named_buffers():
                buffer.copy_(buffers[name])
            if attempt == settings.retries:
                break
            self.damping = max(10 * self.damping, 1e-4)
            rate /= 10
        return False

    def _accepted(self, rate: float) -> bool:
        """Step and repair; whether the guard, if there is one, lets it stand."""
        try:
            self._move(rate)
            self._recalibrate()
            harmed = self._adjust()
            if self._settings.repair_epochs and harmed:
                self._repair_unless_worse()
        except NotFiniteError:
            if self._guard is None:
                raise
            self._guard.worst = -math.inf
            return False
        return self._guard is None or self._guard.accepts()

    def _choose(self, gradient: Gradient) -> UnitSelection:
        """The units to change; by "cheap" the next one, or none."""
        work, settings = self._work, self._settings
        with work.timed("selection"):
            candidates = find_candidates(work.model, settings)
        self.n_units = len(candidates.units)
        if isinstance(settings.selection, UnitSelection) or settings.selection == "full":
            return candidates.selection
        if settings.selection == "cheap":
            return self._cheap(candidates)
        if settings.selection == "lfoci":
            ranked = self._lfoci(candidates)
        else:
            with work.timed("selection"):
                ranked = self._ranked(candidates, gradient)
        return take(ranked, candidates, settings, work.n_trainable)

    def _ranked(self, candidates: Candidates, gradient: Gradient) -> list[tuple[str, int]]:
        work, settings = self._work, self._settings
        if settings.selection == "random":
            return rank_random(candidates, self._seed)
        if settings.selection == "last":
            calls, _ = find_calls(work.model, self._forget.fetch([0]), candidates.selection)
            return rank_last(candidates, settings, (call.layer for call in calls))
        at = UnitLayout(candidates.selection, work.model).gather(gradient)
        return rank_by_score(
            work.model, candidates, settings, self._forget, self._retain, at, work.loss_fn
        )

    def _record(self, candidates: Candidates) -> Recording:
        work, settings = self._work, self._settings
        with work.timed("perturbation"):
            recording = record(
                work.model,
                self._forget,
                work.loss_fn,
                n_perturbations=settings.n_perturbations,
                noise_std=settings.noise_std,
                perturb=settings.perturb,
                rows=settings.foci_rows,
                units=candidates.selection,
                batch_size=settings.batch_size,
                seed=settings.seed,
                progress=work.progress,
            )
        self.n_dead = len(recording.dead)
        return recording

    def _lfoci(self, candidates: Candidates) -> list[tuple[str, int]]:
        work, settings = self._work, self._settings
        recording = self._record(candidates)
        with work.timed("selection"):
            most = settings.n_units
            budget = settings.budget(work.n_trainable)
            if budget < math.inf:
                fit = np.searchsorted(np.cumsum(np.sort(candidates.sizes)), budget, side="right")
                most = max(1, int(fit))
            ranked, self.foci = select_lfoci(
                recording,
                max_units=most,
                stop=most is None,
                seed=settings.seed,
                progress=work.progress,
            )
        return ranked

    def _cheap(self, candidates: Candidates) -> UnitSelection:
        """The unit with the largest T of those that the budget allows; none if T is too small."""
        work, settings = self._work, self._settings
        recording = self._record(candidates)
        limited = settings.max_parameters is not None
        first = not self.selection
        try:
            with work.timed("selection"):
                ranked, values = select_cheap(recording, max_units=None if limited else 1)
        except ValueError:
            finite = (
                np.isfinite(recording.losses).all() and np.isfinite(recording.activations).all()
            )
            if first or not finite:
                raise
            return UnitSelection({})  # nothing is left that the loss depends on
        budget = settings.budget(work.n_trainable)
        for (layer, unit), T in zip(ranked, values, strict=True):
            chosen = UnitSelection({layer: [unit]})
            fits = (self.selection | chosen).size(work.model) <= budget
            if fits and (first or T > CHEAP_THRESHOLD):
                return chosen
        if first:
            take(ranked, candidates, settings, work.n_trainable)  # its refusal
        return UnitSelection({})

    # -----------------------------------------------------------------------------------------
    # Steps

    def _set(self, theta: Tensor) -> None:
        self._layout.scatter_(self._work.parameters, theta)

    def _retained_gradient(self) -> Tensor:
        """The retained objective's gradient by the selection, on the samples that are read."""
        assert self._read is not None
        with self._work.timed("gradients"):
            parameters = {k: self._work.parameters[k] for k in self._layout.parameters}
            _, gradient = self._work.gradient(self._read, parameters)
        return self._layout.gather(gradient)

    def _move(self, rate: float) -> None:
        """Take the steps of the update from where the weights are."""
        settings = self._settings
        if settings.update == "lbfgs":
            self._lbfgs()
            return
        theta, offset = self._start.clone(), None
        for step in range(settings.steps):
            if settings.gradient == "residual":
                direction = -self._retained_gradient()
            elif step == 0:
                direction = self._removal
                if settings.steps > 1:
                    offset = self._retained_gradient() + self._removal
            else:
                assert offset is not None
                direction = offset - self._retained_gradient()
            if settings.update == "gradient":
                theta += rate * direction
                self.iterations += 1
            else:
                theta += self._newton(direction)
            self._set(theta)

    def _newton(self, direction: Tensor) -> Tensor:
        work = self._work
        if self._settings.curvature == "secant" and not direction.any():
            return direction  # which has no line to compare gradients along
        with work.timed("curvature"):
            operator = self._operator(direction)
        with work.timed("solve"):
            solution = _solve(operator, direction, self._settings, self.damping)
        self.plan = operator.plan
        self.solves.append(solution)
        return solution.x

    def _operator(self, direction: Tensor) -> CurvatureOperator:
        work, settings = self._work, self._settings
        shift = {"damping": self.damping, "weight_decay": settings.weight_decay}
        if self._statistics is not None:
            return self._statistics.operator(
                work.model,
                work.loss_fn,
                self._forget,
                self._stepped,
                batch_size=settings.batch_size,
                dtype=work.dtype,
                **shift,
            )
        assert self._read is not None
        data = self._read.data(settings.batch_size)
        common: dict[str, Any] = {**shift, "dtype": work.dtype, "progress": work.progress}
        loss_fn = work.loss_fn
        if settings.output_damping:
            loss_fn = _held_outputs(loss_fn, settings.output_damping)
        arguments = (work.model, loss_fn, data, self._stepped)
        if settings.curvature == "secant":
            # Along the gradient, as far as a hundredth of the weights: short enough to be a
            # derivative, long enough for float32.
            length = 0.01 * float(self._start.norm()) or 0.01
            steps = direction * (length / float(direction.norm()))
            return SecantOperator(*arguments, steps=steps, **common)
        return _OPERATORS[settings.curvature](*arguments, **common)

    def _lbfgs(self) -> None:
        """Minimise the retained objective, less the gradient that training had left.

        Damping keeps the weights near their start: (damping / 2) |w - start|^2.
        """
        work, settings, read = self._work, self._settings, self._read
        assert read is not None
        tilt = torch.zeros_like(self._start)
        if settings.gradient == "removal":
            tilt = self._retained_gradient() + self._removal
        parameters = {k: work.parameters[k] for k in self._layout.parameters}
        theta = self._start.clone().requires_grad_()
        iterations, decay = settings.max_iterations or _LBFGS, settings.weight_decay
        optimizer = torch.optim.LBFGS(
            [theta],
            max_iter=iterations,
            history_size=20,
            tolerance_grad=1e-10 if work.dtype == torch.float64 else 1e-7,
            tolerance_change=0.0,  # of the loss, which is flat long before the weights are right
            line_search_fn="strong_wolfe",
        )

        batches = list(read.batches(settings.batch_size)) if read.in_memory else None

        def closure() -> float:
            selected = theta.detach()
            self._set(selected)
            moved = selected - self._start
            loss, parts = 0.0, [torch.zeros_like(p) for p in parameters.values()]
            for batch in batches or read.batches(settings.batch_size):
                share = batch.size / len(read)
                part = work.loss(batch, "retain") * share
                loss += part.item()
                for total, gradient in zip(
                    parts,
                    torch.autograd.grad(
                        part, list(parameters.values()), allow_unused=True, materialize_grads=True
                    ),
                    strict=True,
                ):
                    total += gradient
            gradient = self._layout.gather(dict(zip(parameters, parts, strict=True)))
            theta.grad = gradient - tilt + decay * selected + self.damping * moved
            return loss + float(
                decay / 2 * selected.square().sum()
                + self.damping / 2 * moved.square().sum()
                - moved @ tilt
            )

        with work.timed("solve"):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        self.iterations += optimizer.state[theta]["n_iter"]
        if not torch.isfinite(theta).all():
            raise NotFiniteError("L-BFGS arrived at weights that are NaN or infinite")
        self._set(theta.detach())

    def _adjust(self) -> bool:
        """Halve a step that does harm, lengthen one that does little; whether to repair."""
        settings, guard = self._settings, self._guard
        whole = self._layout.gather(self._work.parameters).detach() - self._start

        def take(length: float) -> None:
            self.length = length
            self._set(self._start + length * whole)
            self._recalibrate()

        if guard is None:
            self._lengthen(take)
            return True
        fall = guard.quality.before - guard.now()
        harmed = settings.repair_drop is None or fall > settings.repair_drop
        for halving in range(1, settings.halvings + 1):
            if fall <= self._most():
                break
            take(0.5**halving)
            fall = guard.quality.before - guard.now()
        if not harmed:
            self._lengthen(take)
        return harmed

    def _lengthen(self, take: Callable[[float], None]) -> None:
        """Lengthen a step that was ended early until the retained samples notice."""
        settings, unread = self._settings, self._unread
        if settings.lengthen is None or unread is None:
            return
        if not self.solves or self.solves[-1].residual <= _SHORT:
            return
        most = settings.lengthen * len(self._forget)

        def small() -> bool:
            rise = self._work.mean_loss(unread) - self._unread_loss
            return rise <= most  # false for nan

        low, high = 1.0, math.inf
        if not small():
            return
        for _ in range(_LENGTHS):
            take(2 * low if high == math.inf else (low + high) / 2)
            low, high = (self.length, high) if small() else (low, self.length)
            if low == _LONGEST:
                return
        take(low)

    def _most(self) -> float:
        """How far what the guard watches may fall."""
        return math.inf if self._settings.max_drop is None else self._settings.max_drop

    def _recalibrate(self) -> None:
        """Take the running statistics of batch norms anew, over retained samples."""
        if self._settings.n_recalibrate:
            with self._work.timed("recalibration"):
                self._run_norms()

    def _run_norms(self) -> None:
        model, settings = self._work.model, self._settings
        assert self._retain is not None
        norms = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        ]
        if not norms:
            return
        order = np.random.default_rng([settings.seed, 4]).permutation(len(self._retain))
        some = self._retain.subset(np.sort(order[: settings.n_recalibrate]).tolist())
        momenta = [module.momentum for module in norms]
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum = None  # the mean of all batches
                module.train()
            with torch.no_grad():
                for batch in some.batches(settings.batch_size):
                    if batch.size > 1 or len(some) == 1:
                        outputs_of(model, batch)
        finally:
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
                module.eval()

    def _repair_unless_worse(self) -> None:
        """Repair; take that back alone if it does harm itself, as a large rate may.

        That is more than some accuracy on samples that the model knew by heart.
        """
        model, guard = self._work.model, self._guard
        theta = self._layout.gather(self._work.parameters).detach().clone()
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        before = math.nan if guard is None else guard.now()
        failed = False
        with self._work.timed("repair"):
            try:
                self._repair()
            except NotFiniteError:
                if guard is None:
                    raise
                failed = True
        self.repaired = True
        if guard is None:
            return
        after = -math.inf if failed else guard.now()
        most = self._settings.max_drop or 0.0
        if after < before and guard.quality.before - after > most:
            self.repaired = False
            self._set(theta)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

    def _repair(self) -> None:
        """Epochs of SGD on the retained samples as networks are trained, on the selection."""
        work, settings = self._work, self._settings
        assert self._retain is not None
        size, n, decay = settings.repair_batch_size, len(self._retain), settings.weight_decay
        total = settings.repair_epochs * -(-n // size)
        rng = np.random.default_rng([settings.seed, 3])
        parameters = [work.parameters[k] for k in self._layout.parameters]
        masks: list[Tensor] | None = None
        if self._layout.size < sum(p.numel() for p in parameters):
            made = {k: torch.zeros_like(p) for k, p in self._layout.parameters.items()}
            self._layout.scatter_(made, torch.ones_like(self._start))
            masks = list(made.values())
        optimizer = torch.optim.SGD(
            parameters, lr=settings.repair_learning_rate, momentum=0.9, nesterov=True
        )
        warm = 0.3 * total  # from a sharp minimum a large first step would destroy

        def share(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        devices = [work.device] if work.device.type == "cuda" else []
        work.model.train()
        try:
            with (
                progress_bar(work.progress, total=total, desc="repair", unit="batch") as bar,
                torch.random.fork_rng(devices),
            ):
                torch.manual_seed(int(rng.integers(2**63)))  # of dropout
                for _ in range(settings.repair_epochs):
                    for batch in self._retain.batches(size, rng.permutation(n).tolist()):
                        if batch.size > 1 or n == 1:  # batch norm takes no single sample
                            gradients = torch.autograd.grad(
                                work.loss(batch, "retain"),
                                parameters,
                                allow_unused=True,
                                materialize_grads=True,
                            )
                            decayed = torch._foreach_add(
                                gradients, [p.detach() for p in parameters], alpha=decay
                            )
                            if masks is not None:
                                torch._foreach_mul_(decayed, masks)
                            for p, g in zip(parameters, decayed, strict=True):
                                p.grad = g
                            optimizer.step()
                        schedule.step()
                        bar.update()
        finally:
            work.model.eval()
            for p in parameters:
                p.grad = None


def _check_roles(
    settings: Settings,
    retain: Samples | None,
    held: Samples | None,
    statistics: TrainingStatistics | None,
) -> None:
    """Refuse what cannot be done with the data that are there."""
    if statistics is not None:
        if not isinstance(statistics, TrainingStatistics):
            raise TypeError(
                f"statistics must be TrainingStatistics; got {type(statistics).__name__}"
            )
        if settings.update not in ("newton", "certified"):
            raise ValueError(
                f"statistics hold a curvature, which update={settings.update!r} does not use"
            )
        if settings.order == "sequential" or settings.steps > 1 or settings.gradient != "removal":
            raise ValueError(
                "statistics are of the weights that training ended with: they serve one step, "
                "order='batch', steps=1 and gradient='removal'"
            )
        if settings.output_damping:
            raise ValueError(
                "statistics hold a curvature without output_damping; got "
                f"output_damping={settings.output_damping:g}. Use damping"
            )
        if settings.curvature != statistics.kind:
            raise ValueError(
                f"the statistics are for curvature={statistics.kind!r}; got "
                f"curvature={settings.curvature!r}"
            )
    if retain is not None:
        return
    if statistics is None:
        raise ValueError(
            "retain is None: pass the retained training samples, or statistics that were saved "
            "when the model was trained"
        )
    if settings.max_drop is not None and held is None:
        raise ValueError(
            "the guard needs samples: pass validation, or max_drop=None to do without a guard"
        )
    if settings.repair_epochs or settings.n_recalibrate or settings.lengthen is not None:
        raise ValueError(
            "repair_epochs, n_recalibrate and lengthen need retained samples, and retain is None"
        )


def _check_model(model: object) -> torch.device:
    """Find the device of a model; refuse parameters that are missing or not finite."""
    if isinstance(model, CertifiedLinear):
        raise TypeError(
            "model must be a torch.nn.Module; a CertifiedLinear removes samples by itself: "
            "model.remove(indices)"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    devices = set()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised; run the model once")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} of the model holds NaN or infinity")
        devices.add(parameter.device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameter")
    if len(devices) > 1:
        raise ValueError(
            f"the model must be on one device; it is on {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()


def _warn_of_overlap(forget: Samples, retain: Samples) -> None:
    """Warn if half of the samples to delete, or more, are also among those to retain.

    Fewer may be true duplicates. One pass over retain hashes the bits of every sample, and what
    has the hash of a sample to delete is compared with it.
    """

    def columns(samples: Samples, indices: list[int]) -> list[Tensor]:
        batch = samples.fetch(indices)
        tensors = tensors_of((batch.args, batch.kwargs, batch.targets))
        return [t.reshape(len(indices), math.prod(t.shape[1:])).contiguous() for t in tensors]

    widths = [t.shape[1] for t in columns(forget, [0])]
    if widths != [t.shape[1] for t in columns(retain, [0])]:
        return
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

    known, first = np.unique(keys(retain), return_index=True)
    wanted = keys(forget)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    likely = np.flatnonzero(known[at] == wanted)
    m, k = len(forget), 0
    for start in range(0, len(likely), rows):
        some = likely[start : start + rows]
        pairs = zip(
            columns(forget, some.tolist()), columns(retain, first[at[some]].tolist()), strict=True
        )
        k += int(torch.stack([(a == b).all(1) for a, b in pairs]).all(0).sum())
    if 2 * k >= m:
        warnings.warn(
            f"{k:,} of {m:,} samples of forget are also among those of retain: pass as retain the "
            "training samples that stay, without the deleted ones",
            stacklevel=4,  # behind unlearn and its decorator
        )


def _held_outputs(loss_fn: LossFunction, damping: float) -> LossFunction:
    """A loss with the same values and gradients, and damping added to its second derivative."""

    def held(outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = loss_fn(outputs, targets)
        for z in tensors_of(outputs):
            if z.is_floating_point():
                moved = (z - z.detach()).square()
                loss = loss + damping / 2 * (moved.sum(-1) if z.ndim > 1 else moved).mean()
        return loss

    return held


def _solve(
    operator: CurvatureOperator, gradient: Tensor, settings: Settings, damping: float
) -> SolveResult:
    """Solve for the step; refuse, with advice, a matrix that is not positive definite."""
    curvature = settings.curvature
    shift = operator.shift
    rayleigh, least = math.nan, None
    limited = settings.max_iterations is not None
    try:
        with warnings.catch_warnings():
            if limited:
                warnings.simplefilter("ignore", ConvergenceWarning)
            solution = operator.solve(
                gradient, rtol=settings.rtol, max_iterations=settings.max_iterations
            )
        rtol = settings.rtol or (1e-5 if operator.dtype == torch.float32 else 1e-10)
        if solution.method != "cg" or limited or solution.residual <= rtol or shift > 0:
            return solution
        found = f"the residual is {solution.residual:.2g} after {solution.iterations} iterations"
    except IndefiniteCurvatureError as error:
        rayleigh, least = error.rayleigh, error.least_damping
        found = f"its smallest eigenvalue is at most {rayleigh:.4g}"
    if least is None:
        state = "singular or nearly so"
        advice = f"a larger damping, for instance {max(1e-4, 10 * damping):g}"
    else:
        state = "indefinite"
        # 5% cover the rounding. Iterations know one direction: others may take more.
        factor = 1.05 if len(gradient) <= operator.formed_up_to else 2.0
        advice = f"damping above {factor * (damping + least):.2g}"
        if curvature in ("hessian", "secant"):
            advice = (
                "curvature='gauss_newton', which never is indefinite for a loss that is convex in "
                f"the outputs, or {advice}"
            )
        else:
            advice = f"a loss that is convex in the outputs, curvature='fisher' or {advice}"
    raise IndefiniteCurvatureError(
        f"the {curvature} matrix of the retained objective is {state} on the {len(gradient):,} "
        f"selected parameters: {found}, with weight_decay={settings.weight_decay:g} and "
        f"damping={damping:g} included. Use {advice}",
        rayleigh,
        least,
    )


def _norm(gradient: Gradient | None, layout: UnitLayout | None = None) -> float:
    if gradient is None:
        return math.nan
    if layout is not None:
        return float(layout.gather(gradient).double().norm())
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))


def _training_norm(measured: _Measured, m: int, n_retain: int) -> float:
    if measured.retained is None:
        return math.nan
    n = m + n_retain
    return _norm(
        {k: (m * measured.forget[k] + n_retain * g) / n for k, g in measured.retained.items()}
    )
