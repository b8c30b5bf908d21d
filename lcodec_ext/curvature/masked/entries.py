"""Where the selected entries of a parameter are among the coordinates."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lcodec_ext.curvature.layers import Cut, UnitParameter
from lcodec_ext.curvature.layout import Layout, UnitLayout
from lcodec_ext.curvature.parameters import ParameterLayout, view_order


class Entries(Protocol):
    """The selected entries of one parameter, and the displacement by which it is differentiated.

    Attributes
    ----------
    cut : Cut or None
        Into units, of which a displacement has some; None where it has single entries.
    units : Tensor, shape (n,)
        Places in the cut.
    shape : tuple of int
        Of a displacement, (n, *slice).
    complete : bool
        Whether every entry of a displacement is a coordinate.
    """

    @property
    def cut(self) -> Cut | None: ...

    @property
    def units(self) -> Tensor: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def complete(self) -> bool: ...

    def take(self, vector: Tensor) -> Tensor:
        """The displacement of this parameter that a vector of all coordinates is."""

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        """Add displacements, shape (..., *shape), to vectors of all coordinates, shape (..., p)."""

    def add_products(self, vectors: Tensor, D: Tensor, x: Tensor) -> None:
        """Add displacements that are products D_in x_im for n units, m entries of each, by row i.

        Where few entries are selected only their products are formed.
        """

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        """The parameter, displaced."""


@dataclass(frozen=True)
class ParameterEntries:
    """The entries of selected units in one parameter, in ascending order; see `Entries`.

    Attributes
    ----------
    cut : Cut
    units : Tensor, shape (n,)
        Places in the cut.
    positions : tuple of Tensor
        The same, axis by axis of the view of the cut.
    starts : Tensor, shape (n,)
        The first coordinate of each unit.
    length : int
        Coordinates of a unit, which are consecutive.
    shape : tuple of int
        Of a displacement, (n, *slice).
    first : int
        The first coordinate.
    step : int or None
        From unit to unit, if these are evenly spaced.
    """

    cut: Cut
    units: Tensor
    positions: tuple[Tensor, ...]
    starts: Tensor
    length: int
    shape: tuple[int, ...]
    first: int
    step: int | None
    complete = True

    @property
    def coordinates(self) -> Tensor:
        """Of each unit, shape (n, length): twice the memory of the parameter, so it is not kept."""
        return self.starts[:, None] + torch.arange(self.length, device=self.starts.device)

    def _view(self, vectors: Tensor) -> Tensor | None:
        """The coordinates in vectors, shape (..., p), without a copy if they lie regularly."""
        if self.step is None:
            return None
        *strides, stride = vectors.stride()
        return vectors.as_strided(
            (*vectors.shape[:-1], len(self.starts), self.length),
            (*strides, self.step * stride, stride),
            vectors.storage_offset() + self.first * stride,
        )

    def take(self, vector: Tensor) -> Tensor:
        """The displacement of this parameter that a vector of all coordinates is."""
        view = self._view(vector)
        return (vector[self.coordinates] if view is None else view).reshape(self.shape)

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        """Add displacements, shape (..., *shape), to vectors of all coordinates, shape (..., p)."""
        shape = *vectors.shape[:-1], len(self.starts), self.length
        displacements = displacements.reshape(shape)
        view = self._view(vectors)
        if view is None:
            vectors[..., self.coordinates] += displacements
        else:
            view += displacements

    def add_products(self, vectors: Tensor, D: Tensor, x: Tensor) -> None:
        self.add_to(vectors, D[:, :, None] * x[:, None])

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        return _units_displaced(self.cut, self.positions, base, displacement)


def _units_displaced(
    cut: Cut, positions: tuple[Tensor, ...], base: Tensor, displacement: Tensor
) -> Tensor:
    view = cut.view(base)
    moved = view[positions] + displacement
    return cut.unview(view.index_put(positions, moved))


@dataclass(frozen=True)
class MaskedEntries:
    """Single entries of a parameter that its layer cuts into units; see `Entries`.

    A displacement has all of every unit with a selected entry, so that layers add it as rows; what
    of it is not selected is zero in `take`, and dropped in `add_to`.

    Attributes
    ----------
    positions : tuple of Tensor
        Of the units, axis by axis of the view of the cut.
    first, count : int
        The coordinates, one after the other.
    inner : Tensor or None
        For each coordinate its place in the flattened displacement; None where they are all of it.
    """

    cut: Cut
    units: Tensor
    positions: tuple[Tensor, ...]
    shape: tuple[int, ...]
    first: int
    count: int
    inner: Tensor | None
    complete: bool

    def take(self, vector: Tensor) -> Tensor:
        part = vector[self.first : self.first + self.count]
        if self.inner is None:
            return part.reshape(self.shape)
        whole = part.new_zeros(torch.Size(self.shape).numel())
        return whole.index_copy(0, self.inner, part).reshape(self.shape)

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        parts = displacements.reshape(*vectors.shape[:-1], -1)
        if self.inner is not None:
            parts = parts.index_select(-1, self.inner)
        vectors[..., self.first : self.first + self.count] += parts

    def add_products(self, vectors: Tensor, D: Tensor, x: Tensor) -> None:
        if self.inner is None:
            self.add_to(vectors, D[:, :, None] * x[:, None])
            return
        length = x.shape[1]
        parts = D[:, self.inner // length] * x[:, self.inner % length]
        vectors[..., self.first : self.first + self.count] += parts

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        return _units_displaced(self.cut, self.positions, base, displacement)


@dataclass(frozen=True)
class RawEntries:
    """Single entries of a parameter that no layer cuts into units; see `Entries`."""

    place: Tensor | slice  # flat indices
    shape: tuple[int, ...]
    first: int
    count: int
    cut = None
    complete = True

    @property
    def units(self) -> Tensor:
        """None of them."""
        return torch.empty(0, dtype=torch.int64)

    def take(self, vector: Tensor) -> Tensor:
        return vector[self.first : self.first + self.count]

    def add_to(self, vectors: Tensor, displacements: Tensor) -> None:
        vectors[..., self.first : self.first + self.count] += displacements

    def add_products(self, vectors: Tensor, D: Tensor, x: Tensor) -> None:
        raise NotImplementedError  # what has no units has no rows either

    def displaced(self, base: Tensor, displacement: Tensor) -> Tensor:
        if self.count == base.numel():
            return base + displacement.reshape(base.shape)
        place = self.place
        if isinstance(place, slice):
            place = torch.arange(place.start, place.stop, device=base.device)
        flat = base.reshape(-1)
        return flat.index_add(0, place, displacement).reshape(base.shape)


def parameter_entries(layout: Layout, device: torch.device) -> dict[str, Entries]:
    """The entries of every parameter of a layout, by name, on a device."""
    if isinstance(layout, ParameterLayout):
        return dict(_single_entries(layout, device))
    assert isinstance(layout, UnitLayout)
    found: dict[str, tuple[UnitParameter, list[Tensor], list[Tensor]]] = {}
    for parameter, entries, starts in layout.places():
        _, units, numbers = found.setdefault(parameter.name, (parameter, [], []))
        units.append(torch.as_tensor(entries))
        numbers.append(torch.as_tensor(starts))
    return {name: _sorted_entries(*each, device) for name, each in found.items()}


def _single_entries(layout: ParameterLayout, device: torch.device) -> Iterator[tuple[str, Entries]]:
    for name, (first, place, cut) in layout.parts.items():
        shape = tuple(layout.parameters[name].shape)
        flat = torch.arange(place.start, place.stop) if isinstance(place, slice) else place
        n = len(flat)
        if cut is None:
            yield name, RawEntries(layout.place(name, device), (n,), first, n)
            continue
        order = view_order(cut, shape)
        if order is not None:  # where the view has each entry
            flat = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))[flat]
        counts = cut.counts(shape)
        rest = cut.view(torch.empty(shape, device="meta")).shape[len(counts) :]
        length = rest.numel()
        units, row = torch.unique(flat // length, return_inverse=True)
        inner = row * length + flat % length
        whole = torch.equal(inner, torch.arange(len(units) * length))
        yield (
            name,
            MaskedEntries(
                cut,
                units.to(device),
                torch.unravel_index(units.to(device), counts),
                (len(units), *rest),
                first,
                n,
                None if whole else inner.to(device),
                n == len(units) * length,
            ),
        )


def _sorted_entries(
    parameter: UnitParameter, units: list[Tensor], numbers: list[Tensor], device: torch.device
) -> ParameterEntries:
    every = torch.cat(units)
    order = torch.argsort(every)
    every, where = every[order].to(device), torch.cat(numbers)[order]
    counts = parameter.cut.counts(parameter.shape)
    rest = parameter.cut.view(torch.empty(parameter.shape, device="meta")).shape[len(counts) :]
    first, step = int(where[0]), int(where[-1] - where[0]) // max(1, len(where) - 1)
    regular = first + step * torch.arange(len(where))
    return ParameterEntries(
        parameter.cut,
        every,
        torch.unravel_index(every, counts),
        where.to(device),
        parameter.length,
        (len(every), *rest),
        first,
        step if torch.equal(where, regular) else None,
    )
