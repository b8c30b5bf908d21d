"""Kronecker factors with corrected eigenvalues: what is kept, multiplied and solved with."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lcodec_ext.curvature.kronecker.places import Piece, Places

_FORMAT = "kronecker factors 1"
_ROUNDING = 1e-3  # of a block's largest eigenvalue: more than all samples have, they cannot lose


@dataclass(frozen=True, eq=False)
class BlockFactors:
    """One block: r rows of a layer by D columns, and its eigenvalues in a Kronecker basis.

    Attributes
    ----------
    parameters : tuple of str
        Whose entries they are.
    places : Places
    rows : Tensor, shape (r, r), or None
        Eigenvectors of G[P, P] as columns; None where they are the unit vectors.
    row_values : Tensor, shape (r,), or None
        Eigenvalues of G[P, P], a sum over samples.
    columns : Tensor, shape (D, D), or None
        Eigenvectors of A as columns; None where they are the unit vectors.
    values : Tensor of float64, shape (r, D)
        For each pair of them the sum of squares of the samples' gradients along it.
    """

    parameters: tuple[str, ...]
    places: Places
    rows: Tensor | None
    row_values: Tensor | None
    columns: Tensor | None
    values: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> "BlockFactors":
        """The block with another form of its basis."""

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else change(t)

        return replace(
            self, rows=of(self.rows), row_values=of(self.row_values), columns=of(self.columns)
        )

    def rotated(self, M: Tensor) -> Tensor:
        """Coordinates of (r, D, m) in the basis."""
        if self.rows is not None:
            M = torch.tensordot(self.rows, M, ([0], [0]))
        if self.columns is not None:
            M = torch.tensordot(M, self.columns, ([1], [0])).movedim(-1, 1)
        return M

    def back(self, M: Tensor) -> Tensor:
        """The reverse of `rotated`."""
        if self.rows is not None:
            M = torch.tensordot(self.rows, M, ([1], [0]))
        if self.columns is not None:
            M = torch.tensordot(M, self.columns, ([1], [1])).movedim(-1, 1)
        return M

    def projected(self, diagonal: Tensor) -> Tensor:
        """The diagonal in the basis of a diagonal matrix, shape (r, D)."""
        if self.rows is not None:
            diagonal = self.rows.square().T @ diagonal
        return diagonal if self.columns is None else diagonal @ self.columns.square()

    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal of the matrix of eigenvalues (r, D), shape (r, D)."""
        if self.rows is not None:
            values = self.rows.square() @ values
        return values if self.columns is None else values @ self.columns.square().T

    def restricted(self, keep: Tensor, places: Places) -> "BlockFactors":
        """The block of some of its rows.

        Its basis is that of the rows' own G; its eigenvalues are the diagonal of this block's
        matrix in that basis, which for A (x) G without correction is the restriction itself.
        """
        if self.rows is None or self.row_values is None:
            return replace(self, places=places, values=self.values[keep])
        part = self.rows[keep].double()
        own = (part * self.row_values.double()) @ part.T
        values, vectors = torch.linalg.eigh((own + own.T) / 2)
        weights = (vectors.T @ part).square()
        return replace(
            self,
            places=places,
            rows=vectors.to(self.rows),
            row_values=values.clamp(min=0).to(self.row_values),
            values=weights @ self.values,
        )


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerFactors:
    """Sums over samples that make an EK-FAC matrix: saved, subtracted, restricted to fewer rows.

    Attributes
    ----------
    size : int
        Number p of coordinates.
    n : int
        Samples.
    kind : {"model", "empirical"}
    seed : int
    draws : int or None
        As the operator was made with.
    blocks : tuple of BlockFactors
        Every coordinate is in one.
    """

    size: int
    n: int
    kind: str
    seed: int
    draws: int | None
    blocks: tuple[BlockFactors, ...]

    def __repr__(self) -> str:
        return (
            f"KroneckerFactors({self.kind}, {self.size:,} parameters in {len(self.blocks)} blocks, "
            f"{self.n:,} samples)"
        )

    @property
    def nbytes(self) -> int:
        """Memory."""
        return sum(
            t.nbytes
            for block in self.blocks
            for t in (block.rows, block.row_values, block.columns, block.values)
            if t is not None
        )

    def apply(self, V: Tensor, change: Callable[[BlockFactors, int, Tensor], Tensor]) -> Tensor:
        """Change vectors, shape (p, m), in the basis of each block: (block, its number, part)."""
        out = torch.empty_like(V, memory_format=torch.contiguous_format)
        for number, block in enumerate(self.blocks):
            part = block.rotated(block.places.take(V))
            block.places.put(out, block.back(change(block, number, part)))
        return out

    def minus(self, other: "KroneckerFactors") -> "KroneckerFactors":
        """Take out samples whose sums were formed in this basis (``basis=`` of the operator).

        Exact for the eigenvalues in this basis. The basis stays that of all samples: the
        eigenvectors of their A and G, not of those that are left.

        Raises
        ------
        ValueError
            For factors of another basis, kind, seed or draws, of as many samples or more, or with
            larger eigenvalues than these, as of samples that are not among these.
        """
        if not isinstance(other, KroneckerFactors):
            raise TypeError(
                f"other must be KroneckerFactors; got an object of type {type(other).__name__}"
            )
        for name in ("size", "kind", "seed", "draws"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"other must have the {name} of these factors, {getattr(self, name)!r}; it has "
                    f"{getattr(other, name)!r}"
                )
        if other.n >= self.n:
            raise ValueError(f"other has {other.n:,} samples, of which {self.n:,} cannot lack all")
        blocks = []
        for block, removed in zip(self.blocks, other.blocks, strict=True):
            if not _same(block, removed):
                raise ValueError(
                    "other must be formed in the basis of these factors: make it by "
                    "EKFACOperator(..., basis=factors).factors"
                )
            left = block.values - removed.values.to(block.values)
            if float(left.min()) < -_ROUNDING * float(block.values.max()):
                raise ValueError(
                    f"other has more of {block.parameters[0]!r} along some eigenvectors than these "
                    "factors have in all: its samples are not among theirs or were taken out "
                    "before, or the weights, the loss or the padding are other ones"
                )
            blocks.append(replace(block, values=left.clamp(min=0)))
        return replace(self, n=self.n - other.n, blocks=tuple(blocks))

    def restrict(self, columns: Tensor) -> "KroneckerFactors":
        """The factors of fewer rows.

        Parameters
        ----------
        columns : Tensor of int64, shape (q,)
            For each coordinate of the new vector its number among these p, as
            `Layout.numbers_in` gives it.

        Raises
        ------
        ValueError
            For coordinates that are not whole rows of the blocks.
        """
        new = torch.full((self.size,), -1, dtype=torch.int64)
        if (columns < 0).any():
            raise ValueError(
                f"the factors lack {int((columns < 0).sum()):,} of the {len(columns):,} parameters "
                "that are asked for"
            )
        new[columns.cpu()] = torch.arange(len(columns))
        blocks = []
        for block in self.blocks:
            numbers = [new[piece.numbers(torch.device("cpu"))] for piece in block.places.pieces]
            chosen = torch.cat([number >= 0 for number in numbers], 1)
            keep = chosen.all(1)
            if not torch.equal(chosen.any(1), keep):
                raise ValueError(
                    "the selection must have whole rows of each layer (all entries of a unit) to "
                    f"be Kronecker-factored; of {block.parameters[0]!r} it has parts of rows"
                )
            if keep.all():
                blocks.append(replace(block, places=Places.of(numbers)))
            elif keep.any():
                places = Places.of([number[keep] for number in numbers])
                blocks.append(
                    block.restricted(keep.nonzero()[:, 0].to(block.values.device), places)
                )
        return replace(self, size=len(columns), blocks=tuple(blocks))

    def to(self, device: torch.device, dtype: torch.dtype) -> "KroneckerFactors":
        """The factors on a device, with bases in a dtype."""

        def placed(block: BlockFactors) -> BlockFactors:
            moved = block.changed(lambda t: t.to(device, dtype))
            return replace(moved, values=block.values.to(device))

        return replace(self, blocks=tuple(map(placed, self.blocks)))

    # ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of numbers, texts and tensors, for ``torch.save``."""
        return {
            "format": _FORMAT,
            "size": self.size,
            "n": self.n,
            "kind": self.kind,
            "seed": self.seed,
            "draws": self.draws,
            "blocks": [_block_dict(block) for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "KroneckerFactors":
        """Make the factors that `to_dict` wrote."""
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise ValueError(f"values must be the dict of {_FORMAT}; got {str(values)[:60]}")
        blocks = tuple(_block_of(block) for block in values["blocks"])
        own = {key: values[key] for key in ("size", "n", "kind", "seed", "draws")}
        return cls(**own, blocks=blocks)


def _same(a: BlockFactors, b: BlockFactors) -> bool:
    if a.parameters != b.parameters or a.values.shape != b.values.shape:
        return False
    for x, y in ((a.rows, b.rows), (a.columns, b.columns)):
        if (x is None) != (y is None):
            return False
        if x is not None and y is not None and not torch.equal(x, y.to(x)):
            return False
    return True


def _block_dict(block: BlockFactors) -> dict[str, Any]:
    def pieces() -> Iterator[dict[str, Any]]:
        for piece in block.places.pieces:
            yield {
                "shape": list(piece.shape),
                "start": piece.start,
                "row": piece.row,
                "column": piece.column,
                "index": piece.index,
            }

    tensors = ("rows", "row_values", "columns", "values")
    return {
        "parameters": list(block.parameters),
        "pieces": list(pieces()),
        **{name: getattr(block, name) for name in tensors},
    }


def _block_of(values: Mapping[str, Any]) -> BlockFactors:
    pieces = tuple(
        Piece((each["shape"][0], each["shape"][1]), **{k: each[k] for k in each if k != "shape"})
        for each in values["pieces"]
    )
    return BlockFactors(
        tuple(values["parameters"]),
        Places(pieces),
        values["rows"],
        values["row_values"],
        values["columns"],
        values["values"],
    )
