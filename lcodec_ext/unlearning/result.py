"""What `unlearn` returns."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lcodec_ext._checks import counted
from lcodec_ext._files import json_ready
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext.curvature import ParameterSelection, Selection, SolveResult
from lcodec_ext.dependence import FociResult
from lcodec_ext.unlearning.calibrate import Calibration
from lcodec_ext.unlearning.deletion import Deletion
from lcodec_ext.unlearning.estimate import Estimate
from lcodec_ext.unlearning.guard import Guard
from lcodec_ext.unlearning.patch import WeightPatch
from lcodec_ext.unlearning.privacy import Guarantee
from lcodec_ext.unlearning.request import Request
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.workplace import Measured, Workplace

_LAYERS = 6  # that a representation lists


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
    selection : UnitSelection or ParameterSelection
        The units, or single parameters, that were changed; where all was taken back, those that
        were tried.
    foci : FociResult or None
        The selection by L-FOCI: T of the loss, and in `names` the unit and call ("fc1[3] call 0")
        of every step.
    n_forget, n_retain, n_monitored : int
        Samples removed and retained, and those of the latter that were measured.
    n_parameters, n_trainable : int
        Selected parameters, and trainable ones of the model.
    n_without_units : int
        Trainable parameters that belong to no unit (of RNNs, raw ones), which a selection of units
        leaves as they are; "full" and single parameters do not.
    n_units : int
        Units, or single parameters, that could have been selected.
    n_dead : int
        Of these, units that no perturbation moved, left out by "lfoci" and "cheap".
    skipped : tuple of int
        Samples of the request, by position, whose removal did harm and was taken back, or for which
        no step was found: all of them or none, but with order="sequential". They are still in the
        model, and need retraining.
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
        "cholesky", "cg" or "woodbury": see `CurvatureOperator.solve`; "none" where a finish alone
        did; else the update.
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
    guard_unit : float
        What `Settings.max_drop` and `repair_drop` count in: 1, or of losses what they would rise by
        if outputs were those of other samples.
    watched : str
        What that is: "accuracy", "the score" or, where there is neither, "minus the mean loss".
    calibration : Calibration or None
        How the strength was found with control groups; None where it was not.
    guarantee : Guarantee
        What (epsilon, delta) mean for this result: certified, heuristic, or nothing.
    seconds : dict of str to float
        Time taken by each phase, and in "total".
    chosen : dict of str to Any
        Settings that `max_seconds`, `budget` and `max_memory` lowered; `settings` has them too.
    estimate : Estimate or None
        What was expected beforehand, with these options or progress=True.
    mean_over : str
        What the loss is a mean over: "samples", or "tokens", or "tokens, labels shifted by one",
        whether `per_token_loss` said so or it was found out. Mean losses are then over the tokens
        of each set.
    """

    model: nn.Module
    settings: Settings
    selection: Selection
    foci: FociResult | None
    n_forget: int
    n_retain: int
    n_monitored: int
    n_parameters: int
    n_trainable: int
    n_without_units: int
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
    guard_unit: float
    watched: str
    calibration: Calibration | None
    guarantee: Guarantee
    seconds: dict[str, float]
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    estimate: Estimate | None = None
    mean_over: str = "samples"
    _patch: WeightPatch | None = None

    def patch(self) -> WeightPatch:
        """What the deletion changed, to be saved and applied to other copies of the given model.

        Raises
        ------
        ValueError
            For a model whose state holds more than dense tensors.
        """
        if self._patch is None:
            raise ValueError(
                "the state_dict of the model holds what is not a dense tensor; there is no patch"
            )
        return self._patch

    def to_dict(self) -> dict[str, Any]:
        """All but the model, as JSON takes it; nan becomes None."""
        fields = [
            each.name for each in dataclasses.fields(self) if each.name not in ("model", "_patch")
        ]
        values = {name: getattr(self, name) for name in fields}
        if self.foci is not None:
            values["foci"] = {"names": self.foci.names, "T": self.foci.cumulative}
        if self.estimate is not None:
            values["estimate"] = self.estimate.to_dict()
        return json_ready(values)

    def __repr__(self) -> str:
        def change(pair: BeforeAfter) -> str:
            return f"{pair.before:.4g} -> {pair.after:.4g}"

        s = self.settings
        method = s.selection if isinstance(s.selection, str) else "given"
        masked = isinstance(self.selection, ParameterSelection)
        counts = _counts(self.selection)
        layers = [f"{name or '(model)'}: {count:,}" for name, count in counts.items()]
        if len(layers) > _LAYERS:
            layers = [*layers[: _LAYERS - 1], f"{len(layers) - _LAYERS + 1} layers more"]
        asked = self.n_forget - len(self.skipped)
        unchanged = bool(asked) and self.step_norm == 0 and self.guarantee.sigma == 0
        lines = [
            "UnlearnResult: "
            + "THE MODEL IS UNCHANGED; asked for were " * unchanged
            + f"{asked} of {counted(self.n_forget + self.n_retain, 'sample')}"
            + (" in " if unchanged else " removed in ")
            + f"{self.seconds['total']:.2f} s",
            (
                f"  parameters    {self.n_parameters:,} of {self.n_trainable:,}, {method} "
                f"({', '.join(layers)})"
                if masked
                else f"  units         {len(self.selection)} of {self.n_units}, {method} "
                f"({', '.join(layers)}), {self.n_parameters:,} of {self.n_trainable:,} parameters"
                + (f", {self.n_without_units:,} are in no unit" if self.n_without_units else "")
            ),
            f"  step          {self._step()}",
            f"  forget loss   {change(self.loss_forget)}",
            *(
                (
                    f"  retain loss   {change(self.loss_retain)}",
                    f"  gradient norm {change(self.gradient_norm)} retained",
                )
                if self.n_monitored
                else ("  retain loss   not measured: no retained samples were given",)
            ),
        ]
        if self.mean_over != "samples":
            lines.insert(3, f"  loss          mean over {self.mean_over}")
        if s.max_drop is not None:
            lines.append(
                f"  guard         {self.watched} {change(self.guard)}, "
                + counted(self.attempts, "attempt")
                + ", repaired" * self.repaired
            )
        if self.estimate is not None and self.settings.bounded:
            lines.append(f"  cost          {self.estimate.line()} expected")
        if self.calibration is not None:
            lines.append(f"  calibration   {self.calibration}")
        if self.guarantee.kind != "none":
            privacy = str(self.guarantee).replace("\n  ", "\n" + " " * 16)
            lines.append(f"  privacy       {privacy}")
        if self.skipped:
            need = "needs" if len(self.skipped) == 1 else "need"
            samples = counted(len(self.skipped), "sample")
            lines.append(f"  NOT REMOVED   {samples}, which {need} retraining")
        return "\n".join(lines)

    def _step(self) -> str:
        """How it was solved, in a few words."""
        if math.isinf(self.damping):
            return f"none{', a finish alone' * (self.step_norm > 0)}, norm {self.step_norm:.4g}"
        parts = [f"damping {self.damping:g}", self.solve_method]
        if self.solve_iterations:
            parts[1] += f" of {counted(self.solve_iterations, 'iteration')}"
        if self.curvature_plan:
            parts.insert(0, self.settings.curvature)
        if not math.isnan(self.solve_residual):
            parts.append(f"residual {self.solve_residual:.1e}")
        parts.append(f"norm {self.step_norm:.4g}")
        if self.length != 1:
            parts.append(f"{self.length:.3g} of the step")
        return ", ".join(parts)


def _counts(selection: Selection) -> dict[str, int]:
    """How many are selected of each layer, or of each parameter."""
    if isinstance(selection, ParameterSelection):
        return selection.counts
    return {name: len(units) for name, units in selection.units.items()}


class Outcome(NamedTuple):
    """What was measured of deletions, and what their noise guarantees."""

    before: Measured
    after: Measured
    selection: Selection
    step_norm: float
    guarantee: Guarantee
    patch: WeightPatch | None
    estimate: Estimate | None


def result_of(
    model: nn.Module,
    work: Workplace,
    request: Request,
    deletions: Sequence[Deletion],
    guard: Guard | None,
    outcome: Outcome,
) -> UnlearnResult:
    """Put together what there is to say of deletions."""
    before, after, selection, step_norm, guarantee, patch, cost = outcome
    last = deletions[-1]
    layout = selection.layout(work.model)
    solves = [solve for deletion in deletions for solve in deletion.solves]
    return UnlearnResult(
        model=model,
        settings=work.settings,
        selection=selection,
        foci=last.choice.foci,
        n_forget=request.m,
        n_retain=request.n_retain,
        n_monitored=0 if request.monitored is None else len(request.monitored),
        n_parameters=layout.size,
        n_trainable=work.n_trainable,
        n_without_units=sum(work.without_units.values()),
        n_units=last.choice.n_units,
        n_dead=last.choice.n_dead,
        skipped=tuple(k for d in deletions if d.skipped for k in d.numbers),
        attempts=sum(1 for d in deletions for _ in d.attempts),
        length=last.last.length,
        repaired=any(d.last.repaired for d in deletions),
        damping=last.last.damping,
        curvature_plan=last.plan,
        solve_method=_method(last, solves, work.settings),
        solve_iterations=sum(s.iterations for s in solves) if solves else last.n_gradient,
        solve_residual=max((s.residual for s in solves), default=math.nan),
        step_norm=step_norm,
        training_gradient_norm=before.training_norm,
        gradient_norm=BeforeAfter(before.retained_norm, after.retained_norm),
        gradient_norm_selected=BeforeAfter(before.norm_on(layout), after.norm_on(layout)),
        loss_forget=BeforeAfter(before.forget_loss, after.forget_loss),
        loss_retain=BeforeAfter(before.retained_loss, after.retained_loss),
        guard=_guarded(guard, deletions),
        guard_unit=1.0 if guard is None else guard.unit,
        watched="" if guard is None else guard.watched,
        calibration=last.last.calibration,
        guarantee=guarantee,
        seconds=work.clock.seconds,
        chosen={} if cost is None else cost.chosen,
        estimate=cost,
        mean_over=_mean_over(work.loss_fn),
        _patch=patch,
    )


def _mean_over(loss_fn: LossFunction) -> str:
    if not isinstance(loss_fn, TokenLoss):
        return "samples"
    return "tokens, labels shifted by one" if loss_fn.causal else "tokens"


def _method(deletion: Deletion, solves: Sequence[SolveResult], settings: Settings) -> str:
    """How the step was solved; that there was none, where a finish did."""
    if solves:
        return solves[-1].method
    found = deletion.last.calibration
    return settings.update if found is None or math.isfinite(found.strength) else "none"


def _guarded(guard: Guard | None, deletions: Sequence[Deletion]) -> BeforeAfter:
    """What the guard watched, at the start and after the last step that it accepted."""
    if guard is None:
        return BeforeAfter(math.nan, math.nan)
    values = [a.value for d in deletions for a in d.attempts if a.accepted]
    return BeforeAfter(guard.before, values[-1] if values else guard.before)
