"""Systems with one matrix and many shifts, solved in a Krylov space that is made once."""

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.system import Product

_BREAKDOWN = 10  # units of rounding of |A v|: what is below adds no dimension
_WORKING = 4  # vectors for each that is multiplied: its parts, their sums, what they are joined to
_AGAIN = 0.5  # of a vector that has to be left by the space, else it is made orthogonal again


class Krylov:
    """The block Krylov space of all columns of b, in which (A + shift I) x = b is solved.

    Each step multiplies a block of as many vectors as b has columns, and all of the space serves
    each column and every shift: a solution for another shift costs no product. Columns of one kind
    (gradients of samples) share the large eigenvalues: eight steps of five columns, 40 products of
    a vector, solved the systems of small networks as well as 13 iterations of conjugate gradients
    on each column, 65 products.

    Parameters
    ----------
    product : callable
        V to A V, of shape (p, k) for k up to q; A is symmetric.
    b : Tensor of float32 or float64, shape (p, q); or list of q tensors, each of shape (p,)
        A list is emptied as its columns are taken, so that their memory is free.
    steps : int
        Blocks; fewer where the space has no more dimensions.
    at_once : int, optional
        Most vectors that are multiplied at once; all of a block by default. One takes less memory.

    Attributes
    ----------
    products : int
        Of single vectors: at most q times steps.
    largest, least : float
        Ritz values: inner bounds of the spectrum of A. 0 for b = 0.

    Notes
    -----
    The Galerkin solution, with full reorthogonalisation: for one column that of conjugate gradients
    after as many iterations. Memory: `bytes_of`. O'Leary (1980), "The block conjugate gradient
    algorithm and related methods"; Frommer and Maass (1999), "Fast CG-based methods for Tikhonov
    regularization", on shifts.
    """

    method = "lanczos"
    lengthens: tuple[str, ...] = ("residual",)
    floor = 0.0

    def __init__(
        self,
        product: Product,
        b: Tensor | list[Tensor],
        steps: int,
        at_once: int | None = None,
    ) -> None:
        columns = list(b.T) if isinstance(b, Tensor) else b
        q, p = len(columns), len(columns[0])
        self.products = 0
        self._basis = columns[0].new_empty((min(q * steps, p), p))
        self._size = 0
        start = self._started(columns)
        width = len(start)
        T = torch.zeros(len(self._basis), len(self._basis), dtype=torch.float64)
        self._left = torch.zeros(0, 0, dtype=torch.float64)
        while width:
            new = slice(self._size - width, self._size)
            W = self._products(product, self._basis[new], at_once or q)
            sizes = torch.tensor([float(torch.linalg.vector_norm(row)) for row in W])
            parts = self._basis[: self._size] @ W.T
            upper = parts.double().cpu()
            T[: self._size, new], T[new, : self._size] = upper, upper.T
            W.addmm_(parts.T, self._basis[: self._size], alpha=-1)
            self._left = (W @ W.T).double().cpu()
            if self._size + min(width, p - self._size) > len(self._basis):
                break
            width = self._append(W, sizes)
            del W
        self._basis = self._basis[: self._size]
        self._values, self._vectors = torch.linalg.eigh(T[: self._size, : self._size])
        self._rotated = self._vectors[: len(start)].T @ start  # (k, q)
        self.largest = float(self._values[-1]) if self._size else 0.0
        self.least = float(self._values[0]) if self._size else 0.0

    def _started(self, columns: list[Tensor]) -> Tensor:
        """Take the columns into the basis; their coefficients in it, scaled, shape (width, q)."""
        found, norms = [], []
        while columns:
            column = columns.pop(0)
            norms.append(float(torch.linalg.vector_norm(column, dtype=torch.float64)))
            scaled = column / max(norms[-1], 1e-300)
            self._append(scaled[None].clone(), torch.ones(1, dtype=torch.float64))
            found.append((self._basis[: self._size] @ scaled).double().cpu())
        self._norms = torch.tensor(norms, dtype=torch.float64)
        start = torch.zeros(self._size, len(found), dtype=torch.float64)
        for k, each in enumerate(found):  # later vectors are orthogonal to it
            start[: len(each), k] = each
        return start

    def _products(self, product: Product, block: Tensor, at_once: int) -> Tensor:
        """The matrix times the rows of a block."""
        W = torch.empty_like(block)
        for k in range(0, len(block), at_once):
            W[k : k + at_once] = product(block[k : k + at_once].T).T
        self.products += len(block)
        return W

    def _append(self, rows: Tensor, scales: Tensor) -> int:
        """Add what vectors have outside of the space to its basis; how many. Writes to them."""
        before, eps = self._size, torch.finfo(rows.dtype).eps
        for row, scale in zip(rows, scales.tolist(), strict=True):
            if self._size == len(self._basis):
                break
            size = float(torch.linalg.vector_norm(row, dtype=torch.float64))
            while size > _BREAKDOWN * eps * scale:
                last, known = size, self._basis[: self._size]
                row.addmv_(known.T, known @ row, alpha=-1)
                size = float(torch.linalg.vector_norm(row, dtype=torch.float64))
                if size >= _AGAIN * last:
                    torch.div(row, size, out=self._basis[self._size])
                    self._size += 1
                    break
        return self._size - before

    def solve(self, shift: float, column: int | None = None) -> Tensor:
        """The solutions for a shift and each column of b, shape (p, q); or for one, shape (p,)."""
        coefficients = self._coefficients(shift).to(self._basis.device, self._basis.dtype)
        if column is not None:
            return coefficients[:, column] @ self._basis
        return (coefficients.T @ self._basis).T

    def residuals(self, shift: float) -> Tensor:
        """|(A + shift I) x - b| / |b| of these solutions, shape (q,); 0 for columns of zeros."""
        last = self._coefficients(shift)[self._size - len(self._left) :]
        squares = (last * (self._left @ last)).sum(0).clamp_min(0)
        return torch.where(self._norms > 0, squares.sqrt() / self._norms.clamp_min(1e-300), 0)

    def _coefficients(self, shift: float) -> Tensor:
        found = self._vectors @ (self._rotated / (self._values + shift)[:, None])
        return found * self._norms

    @staticmethod
    def bytes_of(p: int, q: int, steps: int, at_once: int, itemsize: int) -> int:
        """Memory at its peak, b left out: basis, a block of products, what a product works with."""
        return itemsize * p * (min(q * steps, p) + q + _WORKING * at_once)
