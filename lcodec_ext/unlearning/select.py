"""Which units a step changes: rankings of units, and how many of them are taken."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.samples import Samples
from lcodec_ext.curvature.layout import UnitLayout
from lcodec_ext.curvature.operators import FisherOperator, GaussNewtonOperator
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.unlearning.settings import Settings

Unit = tuple[str, int]

# Layers whose weights map inputs to units; attention projections are found by their names.
_WEIGHTS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_DIAGONAL_SAMPLES = 256  # retained ones on which a diagonal is taken


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


def find_candidates(model: nn.Module, settings: Settings) -> Candidates:
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
    return isinstance(module, _WEIGHTS) or type(module).__name__ == "Conv1D"


def take(
    ranked: Sequence[Unit], candidates: Candidates, settings: Settings, n_trainable: int
) -> UnitSelection:
    """Take units from the first on, up to the number or the parameters that are allowed.

    A unit that no longer fits is passed over.

    Raises
    ------
    ValueError
        If no unit is ranked, or none fits.
    """
    if not ranked:
        raise ValueError(
            f"selection={settings.selection!r} finds no unit: the gradient of the removed samples "
            "vanishes at all candidates"
        )
    sizes = dict(zip(candidates.units, candidates.sizes.tolist(), strict=True))
    left = settings.budget(n_trainable)
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


def rank_random(candidates: Candidates, seed: Sequence[int]) -> list[Unit]:
    """All candidates in random order."""
    order = np.random.default_rng(list(seed)).permutation(len(candidates.units))
    return [candidates.units[k] for k in order]


def rank_last(candidates: Candidates, settings: Settings, calls: Iterable[str]) -> list[Unit]:
    """The candidates by layer from the output backwards; of one layer only, if no size is given.

    Parameters
    ----------
    calls : iterable of str
        Layers in the order in which the forward pass calls them, some of them several times. Those
        that it does not call come last.
    """
    called = {name: k for k, name in enumerate(calls)}
    layers = list(candidates.selection.units.items())[::-1]
    layers.sort(key=lambda layer: -called.get(layer[0], -1))
    if settings.n_units is None and settings.max_parameters is None:
        layers = layers[:1]
    return [(name, unit) for name, units in layers for unit in units]


def rank_by_score(
    model: nn.Module,
    candidates: Candidates,
    settings: Settings,
    forget: Samples,
    retain: Samples | None,
    gradient: Tensor,
    loss_fn: LossFunction,
) -> list[Unit]:
    """Rank units by what the removed samples' gradient says of their parameters.

    Scores are sums over a unit's parameters. Where parameters are limited and not units, they
    count per parameter: what is wanted is most for its price. Units with score 0, whose gradient
    vanishes, are dead and left out.

    Parameters
    ----------
    gradient : Tensor, shape (p,)
        Of the removed samples, at the coordinates of the candidates.
    """
    name = settings.selection
    if name != "gradient" and retain is None:
        raise ValueError(f"selection={name!r} needs retained samples, and retain is None")
    if name == "gradient":
        score = candidates.sums(gradient.double().square())
    else:
        assert retain is not None
        rng = np.random.default_rng([settings.seed, 1])
        few = np.sort(rng.permutation(len(retain))[:_DIAGONAL_SAMPLES])
        retained = retain.subset(few.tolist()).loaded().data(settings.batch_size)
        options: dict[str, Any] = {"dtype": settings.dtype}
        if name == "fisher_ratio":
            removed = forget.data(settings.batch_size)
            above, below = (
                candidates.sums(
                    FisherOperator(model, loss_fn, data, candidates.selection, **options).diagonal()
                )
                for data in (removed, retained)
            )
            score = above / (below + 1e-12 * max(below.max(), 1e-300))
            score[above == 0] = 0
        else:
            operator = GaussNewtonOperator(
                model, loss_fn, retained, candidates.selection, **options
            )
            diagonal = operator.diagonal_by_outputs()
            if diagonal is None:  # too many outputs
                diagonal = FisherOperator(
                    model, loss_fn, retained, candidates.selection, **options
                ).diagonal()
            shift = max(settings.weight_decay + settings.damping, 1e-12)
            score = candidates.sums(gradient.double().square() / (diagonal.double() + shift))
    if settings.max_parameters is not None and name != "fisher_ratio":
        score = score / candidates.sizes
    order = np.argsort(-score, kind="stable")
    return [candidates.units[k] for k in order if score[k] > 0]
