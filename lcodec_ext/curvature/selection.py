"""Selections of units as data."""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lcodec_ext._checks import check_integer
from lcodec_ext._torch.names import unwrapped_name
from lcodec_ext.curvature.coordinates import Coordinates
from lcodec_ext.curvature.layers import Cut, find_unit_layers, listed
from lcodec_ext.curvature.layout import Segment, UnitLayout

_REASONS = 12  # in an error message


class UnitSelection(Coordinates):
    """Units of a model as data: for each layer the indices of its selected units.

    A selection is independent of any model. Methods that take one, or tensors by parameter name,
    lay out the selected parameters as one vector of ``size(model)`` coordinates: for each layer in
    the order of `named_modules`, for each selected unit ascending, its slice of the weight,
    flattened, then its entry of the bias. docs/curvature.md lists the slices of every kind of
    layer, and what becomes of frozen and tied parameters.

    Parameters
    ----------
    units : mapping of str to iterable of int
        For each layer, by its qualified module name ("" is the model itself, if it is a layer),
        the indices of the selected units, at least one, in any order. An empty mapping is the
        empty selection.

    Raises
    ------
    ValueError, TypeError
        For a layer without a unit, repeated or negative indices, or wrong types.

    Notes
    -----
    Immutable and hashable. ``|``, ``&`` and ``-`` are set operations on units, ``len`` is their
    number. Methods that take a model raise ValueError, by name and with the reason, for selected
    layers and units that the model does not have, that are frozen or not yet initialised, whose
    weights are computed from others or share memory with others, or whose gradients are no
    derivatives. Layers that are not selected never matter.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> selection = UnitSelection({"2": [0], "0": [7, 2]})
    >>> len(selection), selection.units["0"], selection.size(model)
    (3, (2, 7), 15)
    >>> UnitSelection.from_json(selection.to_json()) == selection
    True
    >>> (UnitSelection.all(model) - selection).units
    {'0': (0, 1, 3, 4, 5, 6), '2': (1, 2)}
    >>> vector = selection.gather(model).detach()
    >>> selection.add_(model, vector, alpha=-1)
    >>> model[0].bias[2].item(), selection.gather(model).norm().item()
    (0.0, 0.0)
    """

    __slots__ = ("_units",)

    def __init__(self, units: Mapping[str, Iterable[int]]) -> None:
        if not isinstance(units, Mapping):
            raise TypeError(
                "units must map layer names to unit indices; got an object of type "
                f"{type(units).__name__}"
            )
        self._units: dict[str, tuple[int, ...]] = {}
        for name, indices in units.items():
            if not isinstance(name, str):
                raise TypeError(f"layer names must be strings; got {name!r}")
            if isinstance(indices, Tensor):
                indices = indices.tolist()
            if not isinstance(indices, Iterable):
                raise TypeError(f"the units of layer {name!r} must be integers; got {indices!r}")
            chosen = [check_integer(index, f"a unit of layer {name!r}", 0) for index in indices]
            if not chosen:
                raise ValueError(f"no units are given for layer {name!r}; leave the layer out")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"units of layer {name!r} are repeated: {sorted(chosen)}")
            if (plain := unwrapped_name(name)) in self._units:
                raise ValueError(f"layer {plain!r} is named twice, as one that is wrapped, too")
            self._units[plain] = tuple(sorted(chosen))

    # -----------------------------------------------------------------------------------------
    # Other ways to make one

    @classmethod
    def all(cls, model: nn.Module) -> "UnitSelection":
        """Select every unit of a model that can be selected.

        What the class refuses is left out: frozen layers, computed weights, padding rows and so
        on. Of two layers that cut a tied parameter in different ways, the first is taken.
        """
        layers, _ = find_unit_layers(model)
        cuts: dict[str, Cut] = {}
        chosen = {}
        for name, layer in layers.items():
            parts = [part for each in layer.ranges for part in each.parameters]
            if all(cuts.get(part.name, part.cut) == part.cut for part in parts):
                cuts |= {part.name: part.cut for part in parts}
                chosen[name] = layer.selectable()
        return cls(chosen)

    @classmethod
    def from_globs(cls, model: nn.Module, *patterns: str) -> "UnitSelection":
        """Select all units of the layers whose names match a pattern.

        Parameters
        ----------
        model : Module
        *patterns : str
            Shell patterns, as in `fnmatch.fnmatchcase`: "encoder.*", "layer[34].?.conv2". ``*``
            also matches dots. At least one.

        Raises
        ------
        ValueError
            For a pattern that matches no layer with units that can be selected, or layers that
            cannot be selected together.
        """
        if not patterns:
            raise ValueError("patterns must have at least one pattern; got none")
        layers, without = find_unit_layers(model)
        chosen: dict[str, None] = {}
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"patterns must be strings; got {pattern!r}")
            matched = [name for name in layers if fnmatchcase(name, pattern)]
            if not matched:
                reasons = [
                    f"layer {name!r}: {reason}"
                    for name, reason in without.items()
                    if fnmatchcase(name, pattern)
                ]
                why = "; ".join(reasons[:_REASONS]) or listed(layers)
                raise ValueError(f"the pattern {pattern!r} matches no layer with units; {why}")
            chosen |= dict.fromkeys(matched)
        selection = cls({name: layers[name].selectable() for name in layers if name in chosen})
        UnitLayout(selection, model)  # refuses layers that do not go together
        return selection

    def to_dict(self) -> dict[str, list[int]]:
        """Return `units` with lists for tuples, JSON serialisable."""
        return {name: list(indices) for name, indices in self._units.items()}

    @classmethod
    def from_dict(cls, units: Mapping[str, Iterable[int]]) -> "UnitSelection":
        """Make the selection that `to_dict` wrote."""
        return cls(units)

    def to_json(self) -> str:
        """Write the selection as a JSON object: {"layer": [unit, ...], ...}."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> "UnitSelection":
        """Make the selection that `to_json` wrote; ValueError if it cannot be read."""
        try:
            units = json.loads(text)
        except ValueError as error:
            raise ValueError(f"text must be the JSON of a UnitSelection: {error}") from error
        if not isinstance(units, dict):
            raise ValueError(
                f"text must be the JSON of a UnitSelection, an object; got {text[:40]!r}"
            )
        return cls(units)

    # -----------------------------------------------------------------------------------------
    # A set of units

    @property
    def units(self) -> dict[str, tuple[int, ...]]:
        """For each layer its selected units, ascending; a copy."""
        return dict(self._units)

    def __len__(self) -> int:
        return sum(map(len, self._units.values()))

    def __eq__(self, other: object) -> bool:
        return self._units == other._units if isinstance(other, UnitSelection) else NotImplemented

    def __hash__(self) -> int:
        return hash(frozenset(self._units.items()))

    def __repr__(self) -> str:
        return f"UnitSelection({self.to_dict()})"

    def __or__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.union)

    def __and__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.intersection)

    def __sub__(self, other: "UnitSelection") -> "UnitSelection":
        return self._combine(other, set.difference)

    def _combine(self, other: object, operation: Any) -> "UnitSelection":
        if not isinstance(other, UnitSelection):
            return NotImplemented
        combined = {
            name: operation(set(self._units.get(name, ())), other._units.get(name, ()))
            for name in self._units | other._units
        }
        return UnitSelection({name: units for name, units in combined.items() if units})

    # -----------------------------------------------------------------------------------------
    # The vector of its parameters

    def layout(self, model: nn.Module) -> UnitLayout:
        """Find the units in a model; for many calls of `gather` and its like."""
        return UnitLayout(self, model)

    def segments(self, model: nn.Module) -> tuple[Segment, ...]:
        """List the slices of parameters that the units own, in the order of the coordinates."""
        return UnitLayout(self, model).segments()
