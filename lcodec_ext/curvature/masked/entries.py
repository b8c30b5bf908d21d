"""Where the selected entries of a parameter are among the coordinates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lcodec_ext.curvature.layers import Cut, UnitParameter
from lcodec_ext.curvature.layout import UnitLayout


@dataclass(frozen=True)
class ParameterEntries:
    """The selected entries of one parameter, in ascending order.

    Attributes
    ----------
    cut : Cut
    units : Tensor, shape (n,)
        Places in the cut.
    positions : tuple of Tensor
        The same, axis by axis of the view of the cut.
    coordinates : Tensor, shape (n, length)
    shape : tuple of int
        Of a displacement, (n, *slice).
    first : int
        The first coordinate.
    step : int or None
        From entry to entry, if coordinates are evenly spaced, and consecutive within each.
    """

    cut: Cut
    units: Tensor
    positions: tuple[Tensor, ...]
    coordinates: Tensor
    shape: tuple[int, ...]
    first: int
    step: int | None

    def _view(self, vectors: Tensor) -> Tensor | None:
        """The coordinates in vectors, shape (..., p), without a copy if they lie regularly."""
        if self.step is None:
            return None
        *strides, stride = vectors.stride()
        return vectors.as_strided(
            (*vectors.shape[:-1], *self.coordinates.shape),
            (*strides, self.step * stride, stride),
            vectors.storage_offset() + self.first * stride,
        )

    def take(self, vector: Tensor) -> Tensor:
        """The displacement of this parameter that a vector of all coordinates is."""
        view = self._view(vector)
        return (vector[self.coordinates] if view is None else view).reshape(self.shape)

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        """Add displacements, shape (..., *shape), to vectors of all coordinates, shape (..., p)."""
        displacements = displacements.reshape(*vectors.shape[:-1], *self.coordinates.shape)
        view = self._view(vectors)
        if view is None:
            vectors[..., self.coordinates] += displacements
        else:
            view += displacements

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        view = self.cut.view(base)
        moved = view[self.positions] + displacement
        return self.cut.unview(view.index_put(self.positions, moved))


def parameter_entries(layout: UnitLayout, device: torch.device) -> dict[str, ParameterEntries]:
    """The entries of every parameter of a layout, by name, on a device."""
    found: dict[str, tuple[UnitParameter, list[Tensor], list[Tensor]]] = {}
    for parameter, entries, coordinates in layout.places():
        _, units, numbers = found.setdefault(parameter.name, (parameter, [], []))
        units.append(torch.as_tensor(entries))
        numbers.append(torch.as_tensor(coordinates))
    return {name: _sorted_entries(*each, device) for name, each in found.items()}


def _sorted_entries(
    parameter: UnitParameter, units: list[Tensor], numbers: list[Tensor], device: torch.device
) -> ParameterEntries:
    every = torch.cat(units)
    order = torch.argsort(every)
    every, where = every[order].to(device), torch.cat(numbers)[order]
    counts = parameter.cut.counts(parameter.shape)
    rest = parameter.cut.view(torch.empty(parameter.shape, device="meta")).shape[len(counts) :]
    first, step = int(where[0, 0]), int(where[-1, 0] - where[0, 0]) // max(1, len(where) - 1)
    regular = first + step * torch.arange(len(where))[:, None] + torch.arange(where.shape[1])
    return ParameterEntries(
        parameter.cut,
        every,
        torch.unravel_index(every, counts),
        where.to(device),
        (len(every), *rest),
        first,
        step if torch.equal(where, regular) else None,
    )
