"""Systems with one matrix and many shifts, solved in Krylov spaces that are made once."""

import math

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.system import Product

_BREAKDOWN = 10  # units of rounding of the largest |A v|: below, a space has all there is


class Krylov:
    """The Krylov spaces of the columns of b, in which (A + shift I) x = b is solved for any shift.

    Lanczos' iteration with full reorthogonalisation, once, one product for all columns; each
    column has its own space. A solution for a shift then costs no product: it is the one of
    conjugate gradients (in exact arithmetic) after as many iterations.

    Parameters
    ----------
    product : callable
        V to A V, of shape (p, q); A is symmetric.
    b : Tensor of float32 or float64, shape (p, q)
    iterations : int
        Dimensions of each space; fewer where the space has no more.

    Attributes
    ----------
    products : int
        With all columns at once.
    largest, least : float
        Ritz values: inner bounds of the spectrum of A. 0 for b = 0.

    Notes
    -----
    Memory: iterations + 1 times that of b. Lanczos (1950), "An iteration method for the solution of
    the eigenvalue problem"; Frommer and Maass (1999), "Fast CG-based methods for Tikhonov
    regularization", on shifts.
    """

    def __init__(self, product: Product, b: Tensor, iterations: int) -> None:
        self.products = 0
        self._norms = torch.linalg.vector_norm(b, dim=0, dtype=torch.float64)
        p, q = b.shape
        self._basis = b.new_zeros((min(iterations, p), p, q))
        alpha, beta = (torch.zeros(len(self._basis), q, dtype=torch.float64) for _ in range(2))
        v = torch.where(self._norms > 0, b / self._norms.clamp_min(1e-300), 0).to(b.dtype)
        scale = torch.zeros(q, dtype=torch.float64, device=b.device)
        eps = torch.finfo(b.dtype).eps
        for k in range(len(self._basis)):
            self._basis[k] = v
            w = product(v)
            self.products += 1
            alpha[k] = (w * v).sum(0, dtype=torch.float64).cpu()
            scale = torch.maximum(scale, torch.linalg.vector_norm(w, dim=0, dtype=torch.float64))
            for _ in range(2):  # the second pass takes out what rounding left of the first
                parts = torch.einsum("kpq,pq->kq", self._basis[: k + 1], w)
                w = w - torch.einsum("kpq,kq->pq", self._basis[: k + 1], parts)
            size = torch.linalg.vector_norm(w, dim=0, dtype=torch.float64)
            size = size.where(size > _BREAKDOWN * eps * scale, 0)
            beta[k] = size.cpu()
            if not size.any():
                break
            v = torch.where(size > 0, w / size.clamp_min(1e-300), 0).to(b.dtype)
        used = self.products
        self._basis, self._beta = self._basis[:used], beta[:used]
        self._spectra = [
            _spectrum(alpha[:used, c], beta[: used - 1, c], self._norms[c] > 0) for c in range(q)
        ]
        known = [values for values, _ in self._spectra if len(values)]
        self.largest = max((float(values[-1]) for values in known), default=0.0)
        self.least = min((float(values[0]) for values in known), default=0.0)

    def solve(self, shift: float, column: int) -> Tensor:
        """The solution for a shift and a column of b, shape (p,)."""
        coefficients = self._coefficients(shift, column)
        basis = self._basis[: len(coefficients), :, column]
        return coefficients.to(basis.device, basis.dtype) @ basis

    def residual(self, shift: float, column: int) -> float:
        """|(A + shift I) x - b| / |b| of that solution, by the recurrence."""
        coefficients = self._coefficients(shift, column)
        if not len(coefficients):
            return 0.0
        last = self._beta[len(coefficients) - 1, column]
        return float(last * coefficients[-1].abs() / self._norms[column])

    def _coefficients(self, shift: float, column: int) -> Tensor:
        values, vectors = self._spectra[column]
        if not len(values):
            return values
        return vectors @ (vectors[0] / (values + shift)) * float(self._norms[column])


def _spectrum(alpha: Tensor, beta: Tensor, there: Tensor | bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a tridiagonal matrix, up to where it decouples."""
    if not there:
        return alpha[:0], alpha[:0]
    ends = (beta == 0).nonzero()
    size = int(ends[0]) + 1 if len(ends) else len(alpha)
    off = beta[: size - 1]
    values, vectors = torch.linalg.eigh(
        torch.diag(alpha[:size]) + torch.diag(off, 1) + torch.diag(off, -1)
    )
    assert math.isfinite(float(values.abs().max()))
    return values, vectors
