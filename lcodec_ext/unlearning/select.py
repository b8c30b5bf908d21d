"""Which parameters a step changes: a table of rules, and how many units are taken."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, check_real, counted
from lcodec_ext._torch.loss import Gradient, NotFiniteError
from lcodec_ext.curvature import ParameterSelection, Selection, UnitSelection, all_trainable
from lcodec_ext.curvature.layers import CONVOLUTIONS, TRANSPOSED, is_linear
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.dependence import FociResult, first_step_scores, lfoci
from lcodec_ext.unlearning.record import Recording, record
from lcodec_ext.unlearning.request import Part
from lcodec_ext.unlearning.rules import RULES, Rule
from lcodec_ext.unlearning.settings import SelectSettings
from lcodec_ext.unlearning.step import Block, take_steps
from lcodec_ext.unlearning.workplace import Workplace

Unit = tuple[str, int]


class NothingSelectedError(ValueError):
    """A rule that perturbs finds no unit on which the loss depends."""


class ZeroLossError(NothingSelectedError):
    """It is always 0, as of a sample that is fitted: it depends on nothing."""


def no_unit(samples: str, loss: float = 0.0) -> str:
    """Why nothing is selected for samples whose loss is the same under all perturbations."""
    same = f"the same under all perturbations, {loss:.3g}" if loss else "0 under all perturbations"
    return f"the loss of {samples} is {same}: it depends on no unit, so none is selected"


CHEAP_THRESHOLD = 0.05  # the T below which "cheap" stops, as in the published code


@dataclass(frozen=True, eq=False)
class Candidates:
    """The units to select from, and how many parameters each one has.

    Attributes
    ----------
    selection : UnitSelection
        All of them.
    units : list of (str, int)
        In the order of their coordinates.
    sizes : ndarray of int, shape (units,)
    """

    selection: UnitSelection
    units: list[Unit]
    sizes: NDArray[np.int64]
    _stretches: tuple[NDArray[np.int64], NDArray[np.int64]]  # units and lengths, by coordinate

    @cached_property
    def owner(self) -> Tensor:
        """The unit of each coordinate, int64, shape (p,)."""
        return torch.from_numpy(np.repeat(*self._stretches))

    def sums(self, vector: Tensor) -> NDArray[np.float64]:
        """Add up a vector over the coordinates of each unit."""
        total = torch.zeros(len(self.units), dtype=torch.float64, device=vector.device)
        owner = self.owner.to(vector.device)
        return total.index_add_(0, owner, vector.double()).cpu().numpy()


def find_candidates(model: nn.Module, settings: SelectSettings) -> Candidates:
    """Find the units that `Settings.candidates` names, or that were given."""
    if isinstance(settings.selection, UnitSelection):
        selection = settings.selection
        if not selection:
            raise ValueError("the selection must have at least one unit; it is empty")
    elif settings.candidates == "all":
        selection = UnitSelection.all(model)
    elif settings.candidates == "weights":
        modules = dict(model.named_modules())
        every = UnitSelection.all(model)
        selection = UnitSelection(
            {name: units for name, units in every.units.items() if _has_weights(name, modules)}
        )
    else:
        selection = UnitSelection.from_globs(model, *settings.candidates)
    if not selection:
        raise ValueError(
            "the model has no layer whose units can be selected"
            + (" among linear and convolution layers" if settings.candidates == "weights" else "")
        )
    place: dict[Unit, int] = {}
    numbers, lengths = [], []
    for block in UnitLayout(selection, model).blocks:
        numbers += [place.setdefault((block.module, unit), len(place)) for unit in block.units]
        lengths += [block.width] * len(block.units)
    stretches = np.array(numbers, dtype=np.int64), np.array(lengths, dtype=np.int64)
    sizes = np.zeros(len(place), dtype=np.int64)
    np.add.at(sizes, *stretches)
    return Candidates(selection, list(place), sizes, stretches)


def _has_weights(name: str, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(name)
    if module is None:  # the input projections of an attention
        return True
    return is_linear(module) or isinstance(module, CONVOLUTIONS + TRANSPOSED)


def take(
    ranked: Sequence[Unit], candidates: Candidates, settings: SelectSettings, n_trainable: int
) -> UnitSelection:
    """Take units from the first on, up to the number or the parameters that are allowed.

    A unit that no longer fits is passed over.

    Raises
    ------
    ValueError
        If no unit is ranked, or none fits.
    """
    if not ranked:
        raise ValueError(f"selection={settings.selection!r} finds no unit to change")
    sizes = dict(zip(candidates.units, candidates.sizes.tolist(), strict=True))
    left = settings.parameters_allowed(n_trainable)
    most = settings.n_units or len(candidates.units)
    chosen: dict[str, list[int]] = {}
    count = 0
    for unit in ranked:
        if count == most:
            break
        if sizes[unit] <= left:
            left -= sizes[unit]
            count += 1
            chosen.setdefault(unit[0], []).append(unit[1])
    if not chosen:
        raise ValueError(
            f"max_parameters={settings.max_parameters!r} allows no unit: the smallest one that is "
            f"ranked has {min(sizes[unit] for unit in ranked)} parameters, of {n_trainable:,} "
            "trainable ones"
        )
    order = {name: k for k, name in enumerate(candidates.selection.units)}
    return UnitSelection({name: chosen[name] for name in sorted(chosen, key=order.__getitem__)})


# ---------------------------------------------------------------------------------------------
# Rules


@dataclass(frozen=True, eq=False)
class Question:
    """What a rule selects from, and what it may look at."""

    work: Workplace  # model, loss and settings
    part: Part  # the samples that are removed, and those that stay
    gradient: Gradient  # of the removed samples' objective, by parameter
    taken: UnitSelection  # what a repeated rule has selected before

    @cached_property
    def candidates(self) -> Candidates:
        """The units to select from."""
        return find_candidates(self.work.model, self.work.settings)

    def recorded(self) -> Recording:
        """Perturb the removed samples, and record units and loss."""
        settings = self.work.settings
        with self.work.timed("perturbation"):
            return record(
                self.work.model,
                self.part.forget,
                self.work.loss_fn,
                n_perturbations=settings.n_perturbations,
                noise_std=settings.noise_std,
                perturb=settings.perturb,
                rows=settings.foci_rows,
                units=self.candidates.selection,
                batch_size=settings.batch_size,
                seed=settings.seed,
                progress=self.work.progress,
                ranks=self.work.ranks,
            )

    def take(self, ranked: Sequence[Unit]) -> UnitSelection:
        """As many of the units, from the first on, as the settings allow."""
        return take(ranked, self.candidates, self.work.settings, self.work.n_trainable)


@dataclass(frozen=True, eq=False)
class Choice:
    """What a rule selected."""

    selection: Selection  # empty if a repeated rule finds nothing more, or `zero_loss`
    n_units: int  # or single parameters, that it could have selected
    n_dead: int = 0  # of these, units that no perturbation moved
    foci: FociResult | None = None
    zero_loss: bool = False  # under all perturbations: no unit can be selected


def choose(
    work: Workplace, part: Part, gradient: Gradient, taken: Selection | None = None
) -> Choice:
    """What a step changes, by the rule of the settings."""
    with work.timed("selection"):
        selection = work.settings.selection
        if isinstance(selection, ParameterSelection):
            return Choice(selection, work.n_trainable)
        if isinstance(selection, UnitSelection):
            candidates = find_candidates(work.model, work.settings)
            return Choice(candidates.selection, len(candidates.selection))
        before = taken if isinstance(taken, UnitSelection) else UnitSelection({})
        return RULES[selection].select(Question(work, part, gradient, before))


def joined(one: Selection | None, other: Selection) -> Selection:
    """Both selections, which are of one kind."""
    if isinstance(one, UnitSelection) and isinstance(other, UnitSelection):
        return one | other
    if isinstance(one, ParameterSelection) and isinstance(other, ParameterSelection):
        return one | other
    return other


def _full(question: Question) -> Choice:
    """All trainable parameters, or the units among candidates that are given."""
    if question.work.settings.candidates == "all":
        every = all_trainable(question.work.model)
        if isinstance(every, ParameterSelection):
            return Choice(every, len(every))
    selection = question.candidates.selection  # with both of two layers that share a weight
    return Choice(selection, len(selection))


def _step(question: Question, selection: Selection) -> tuple[Block, Tensor]:
    """The step on a selection, and where it would go; the weights stay."""
    work, settings = question.work, question.work.settings
    block = Block.of(work, question.part, selection, question.gradient)
    steps = take_steps(block, settings.damping, settings.learning_rate)
    if steps.failure is not None:
        raise steps.failure
    moved = block.now() - block.start
    block.restore(block.start, block.buffers)
    return block, moved


def _by_step(question: Question) -> Choice:
    """The single parameters that the step on all candidates moves most.

    The step is solved again on them: what the others would have done is made up for. Parameters
    that it does not move are left out.
    """
    settings = question.work.settings
    if settings.candidates == "all":
        every = all_trainable(question.work.model)
    else:
        every = question.candidates.selection
    block, moved = _step(question, every)
    most = int(settings.parameters_allowed(question.work.n_trainable))
    count = min(most, int(torch.count_nonzero(moved)))
    if not count:
        raise ValueError(
            f"max_parameters={settings.max_parameters!r} allows no parameter, of "
            f"{question.work.n_trainable:,} trainable ones"
            if not most
            else "selection='step' finds no parameter: the step on all candidates is zero"
        )
    sizes = {k: torch.zeros_like(p) for k, p in block.layout.parameters.items()}
    block.layout.scatter_(sizes, moved)
    return Choice(ParameterSelection.top(sizes, count), block.layout.size)


def _by_step_units(question: Question) -> Choice:
    """The units that the step on all candidates moves most per parameter, in squares."""
    candidates = question.candidates
    _, moved = _step(question, candidates.selection)
    score = candidates.sums(moved.double().square()) / candidates.sizes
    order = np.argsort(-score, kind="stable")
    ranked = [candidates.units[k] for k in order if score[k] > 0]
    return Choice(question.take(ranked), len(candidates.units))


def _random(question: Question) -> Choice:
    units = question.candidates.units
    order = np.random.default_rng(question.part.seed).permutation(len(units))
    return Choice(question.take([units[k] for k in order]), len(units))


def _by_gradient(question: Question) -> Choice:
    """The largest squared gradients, summed over a unit; per parameter where these are limited.

    Units whose gradient vanishes are left out.
    """
    candidates = question.candidates
    at = UnitLayout(candidates.selection, question.work.model).gather(question.gradient)
    score = candidates.sums(at.double().square())
    if question.work.settings.max_parameters is not None:
        score = score / candidates.sizes
    order = np.argsort(-score, kind="stable")
    ranked = [candidates.units[k] for k in order if score[k] > 0]
    if not ranked:
        raise ValueError(
            "selection='gradient' finds no unit: the gradient of the removed samples vanishes on "
            "all candidates"
        )
    return Choice(question.take(ranked), len(candidates.units))


def _by_lfoci(question: Question) -> Choice:
    """A Markov blanket of the loss under perturbation, the paper's selection."""
    work, settings, candidates = question.work, question.work.settings, question.candidates
    recording = question.recorded()
    nothing = Choice(UnitSelection({}), len(candidates.units), len(recording.dead))
    most = settings.n_units
    budget = settings.parameters_allowed(work.n_trainable)
    if budget < math.inf:
        fit = np.searchsorted(np.cumsum(np.sort(candidates.sizes)), budget, side="right")
        most = max(1, int(fit))
    try:
        ranked, foci = select_lfoci(
            recording,
            max_units=most,
            stop=most is None,
            seed=settings.seed,
            progress=work.progress,
        )
    except ZeroLossError:
        return dataclasses.replace(nothing, zero_loss=True)
    return dataclasses.replace(nothing, selection=question.take(ranked), foci=foci)


def _by_cheap(question: Question) -> Choice:
    """The unit with the largest T that the budget allows; nothing if a later T is too small."""
    work, settings, taken = question.work, question.work.settings, question.taken
    recording = question.recorded()
    nothing = Choice(UnitSelection({}), len(question.candidates.units), len(recording.dead))
    most = None if settings.max_parameters is not None else 1
    try:
        ranked, values = select_cheap(recording, max_units=most)
    except ZeroLossError:
        return dataclasses.replace(nothing, zero_loss=True)
    except ValueError:
        if not taken or not recording.finite:
            raise
        return nothing  # the loss depends on no further unit
    budget = settings.parameters_allowed(work.n_trainable)
    for (layer, unit), T in zip(ranked, values, strict=True):
        chosen = UnitSelection({layer: [unit]})
        fits = (taken | chosen).size(work.model) <= budget
        if fits and (not taken or T > CHEAP_THRESHOLD):
            return dataclasses.replace(nothing, selection=chosen)
    if not taken:
        question.take(ranked)  # raises the error that says what does not fit
    return nothing


#: To add a rule, write a function and name it here.
RULES.update(
    {
        "full": Rule(_full, "given"),
        "lfoci": Rule(_by_lfoci, "optional"),
        "cheap": Rule(_by_cheap, "optional", repeated=True),
        "gradient": Rule(_by_gradient, "needed"),
        "random": Rule(_random, "needed"),
        "step": Rule(_by_step, "share"),
        "step_units": Rule(_by_step_units, "needed"),
    }
)


# ---------------------------------------------------------------------------------------------
# From a recording


def select_lfoci(
    recording: Recording,
    *,
    noise: float = 0.01,
    max_units: int | None = None,
    stop: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> tuple[list[tuple[str, int]], FociResult]:
    """Find the units on which the loss depends, by L-FOCI; ValueError if there are none.

    Dead units are left out beforehand. A unit is selected if any of its calls is.

    Parameters
    ----------
    recording : Recording
    noise : float, default 0.01
        Of L-FOCI, as a share of each column's standard deviation: means over a request vary by far
        less than the paper's absolute 0.01.
    max_units, stop
        `max_features` and `stop` of `lfoci`.
    seed, progress
        Of the noise; for each step.

    Returns
    -------
    units : list of (str, int)
        Layer and unit, in the order of selection, each once.
    result : FociResult
        Its `ordering` are columns of the recording; `names` tell unit and call.
    """
    alive = _alive(recording)
    result = lfoci(
        recording.activations[:, alive],
        recording.losses,
        noise=noise,
        noise_scale="relative",
        seed=seed,
        max_features=max_units,
        stop=stop,
        progress=progress,
    )
    if not len(result.ordering):
        raise _nothing(recording, "L-FOCI selects no unit")
    columns = alive[result.ordering]
    chosen = [recording.owners[column] for column in columns]
    result = dataclasses.replace(
        result,
        ordering=columns,
        names=[f"{owner.layer}[{owner.unit}] call {owner.call}" for owner in chosen],
        n_features=len(recording.owners),
    )
    units = list(dict.fromkeys((owner.layer, owner.unit) for owner in chosen))
    return units, result


def select_cheap(
    recording: Recording, *, max_units: int | None = 1, threshold: float = CHEAP_THRESHOLD
) -> tuple[list[tuple[str, int]], NDArray[np.float64]]:
    """Take the units with the largest T(loss, activation), each by itself; ValueError without any.

    With max_units=1 this is the paper's cheap FOCI, which removes a sample with one unit, and again
    with another one at the changed weights while T exceeds 0.05; the caller repeats it.

    Parameters
    ----------
    recording : Recording
    max_units : int, optional
        How many; 1 by default. None: all above the threshold.
    threshold : float, default 0.05
        T that every unit after the first must exceed. Of the calls of a unit the largest counts.

    Returns
    -------
    units : list of (str, int)
        Layer and unit, by decreasing T; ties stay in the order of the recording.
    values : ndarray of float64, shape (len(units),)
        Their T, to within 1e-9.
    """
    if max_units is not None:
        check_integer(max_units, "max_units", 1)
    check_real(threshold, "threshold", -np.inf)
    alive = _alive(recording)
    values = first_step_scores(recording.activations[:, alive], recording.losses)
    order = np.argsort(-values, kind="stable")
    if values[order[0]] <= 0:
        raise _nothing(recording, "no unit has T(loss, activation) > 0")
    best: dict[tuple[str, int], float] = {}
    for column in order:
        if best and values[column] <= threshold:
            break
        owner = recording.owners[alive[column]]
        best.setdefault((owner.layer, owner.unit), float(values[column]))
        if len(best) == max_units:
            break
    return list(best), np.array(list(best.values()))


def _alive(recording: Recording) -> NDArray[np.int64]:
    """The columns to select from; refuse recordings without any, or with a constant loss."""
    if not np.isfinite(recording.losses).all():
        raise NotFiniteError("the loss of the perturbed request is NaN or infinite")
    for column in np.flatnonzero(~np.isfinite(recording.activations.sum(0)))[:1]:
        owner = recording.owners[column]
        raise NotFiniteError(
            f"unit {owner.unit} of layer {owner.layer!r} has activations NaN or infinite"
        )
    noise = recording.resolution * np.abs(recording.losses).max() + 2 * recording.loss_rounding
    if not recording.losses.any():
        raise ZeroLossError(no_unit("the request"))
    if np.ptp(recording.losses) <= noise:
        raise NothingSelectedError(
            f"{no_unit('the request', float(recording.losses[0]))}. noise_std is too small for the "
            "inputs, or perturb changes nothing, or the network is dead there"
        )
    if not len(recording.alive):
        raise _nothing(recording, "no unit can be selected because all are dead")
    return recording.alive


def _nothing(recording: Recording, what: str) -> NothingSelectedError:
    return NothingSelectedError(
        f"{what}: in {counted(len(recording.losses), 'row')} the loss depends on no unit "
        "measurably. Pass more n_perturbations, a larger noise_std or another perturb, or "
        "selection='full'"
    )
