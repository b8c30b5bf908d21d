"""Where the entries of a block are among the coordinates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Consecutive columns of a block: entry (i, j) is coordinate start + i * row + j * column.

    Or, where they lie irregularly, index[i, j].
    """

    shape: tuple[int, int]
    start: int = 0
    row: int = 0
    column: int = 0
    index: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor) -> "Piece":
        """The piece of coordinates, shape (r, width)."""
        r, width = index.shape
        start = int(index[0, 0])
        row = int(index[1, 0]) - start if r > 1 else 0
        column = int(index[0, 1]) - start if width > 1 else 0
        steps = torch.arange(r, device=index.device)[:, None] * row
        steps = steps + torch.arange(width, device=index.device) * column
        if torch.equal(start + steps, index):
            return cls((r, width), start, row, column)
        return cls((r, width), index=index)

    def numbers(self, device: torch.device) -> Tensor:
        """The coordinates, int64, shape (r, width)."""
        if self.index is not None:
            return self.index.to(device)
        r, width = self.shape
        rows = torch.arange(r, device=device)[:, None] * self.row
        return self.start + rows + torch.arange(width, device=device) * self.column

    def view(self, V: Tensor) -> Tensor:
        """The entries in vectors, shape (p, m), as (r, width, m); a view where they are regular."""
        if self.index is not None:
            return V[self.index]
        first, second = V.stride()
        return V.as_strided(
            (*self.shape, V.shape[1]),
            (self.row * first, self.column * first, second),
            V.storage_offset() + self.start * first,
        )

    def write(self, V: Tensor, entries: Tensor) -> None:
        """Write entries, shape (r, width, m), to vectors."""
        if self.index is not None:
            V[self.index] = entries
        else:
            self.view(V).copy_(entries)


@dataclass(frozen=True)
class Places:
    """Where a block of r rows and D columns has its entries: pieces side by side."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, indices: Sequence[Tensor]) -> "Places":
        """From the coordinates of each piece, shape (r, width)."""
        return cls(tuple(Piece.of(index) for index in indices))

    @property
    def shape(self) -> tuple[int, int]:
        """(r, D)."""
        return self.pieces[0].shape[0], sum(piece.shape[1] for piece in self.pieces)

    def take(self, V: Tensor) -> Tensor:
        """The entries of vectors of all coordinates, shape (p, m), as (r, D, m)."""
        return torch.cat([piece.view(V) for piece in self.pieces], 1)

    def put(self, V: Tensor, entries: Tensor) -> None:
        """Write entries, shape (r, D, m), to vectors of all coordinates."""
        widths = [piece.shape[1] for piece in self.pieces]
        for piece, part in zip(self.pieces, torch.split(entries, widths, 1), strict=True):
            piece.write(V, part)

    def numbers(self, device: torch.device) -> Tensor:
        """The coordinates, int64, shape (r, D)."""
        return torch.cat([piece.numbers(device) for piece in self.pieces], 1)
