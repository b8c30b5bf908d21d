"""What every operator does: multiply, solve, and be added to others."""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lcodec_ext._checks import check_bool, check_choice, check_integer, check_real
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.group import AnyRanks
from lcodec_ext._torch.modes import plain_arithmetic
from lcodec_ext.curvature.parameters import Selection
from lcodec_ext.curvature.routes.base import FEW_ROWS
from lcodec_ext.curvature.routes.low_rank import LowRank, StackedRows
from lcodec_ext.curvature.solvers import SolveResult, cholesky, conjugate_gradient, minres, woodbury

Method = Literal["auto", "cg", "minres", "cholesky", "woodbury"]

SMALL = 256  # coordinates up to which `solve` forms a matrix by p products
SMALL_CHEAP = 2048  # and one that costs less
_MAX_BYTES = 2**30


class CurvatureOperator(ABC):
    """A symmetric matrix of shape (p, p) that multiplies and solves; base of all of these.

    ``A @ v`` takes a tensor of shape (p,) or (p, m) on the operator's device; it is converted to
    the operator's dtype. Operators of one size can be added and subtracted, and multiplied with
    real numbers, damping included: ``(n * H - H_removed) / (n - m)``.

    Attributes
    ----------
    shape : tuple of int
    dtype : torch.dtype
    device : torch.device
    selection : UnitSelection, ParameterSelection or None
    shift : float
        What is added to the diagonal: damping and weight decay.
    decay : Tensor, shape (p,), or None
        What is added to the diagonal besides: a weight decay that differs between parameters.
    formed_up_to : int
        Coordinates up to which `solve` forms the matrix where the method is "auto".
    plan : str
        Which way products are computed, and why.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    selection: Selection | None = None
    shift: float
    decay: Tensor | None = None
    formed_up_to: int = SMALL
    plan: str
    _kind = "matrix"
    _progress = False
    _ranks: AnyRanks = ONE_RANK  # that multiply together

    @abstractmethod
    def _product(self, V: Tensor) -> Tensor:
        """The matrix without the shift times V, shape (p, m)."""

    @abstractmethod
    def _diagonal(self) -> Tensor | None:
        """The diagonal without the shift, or None if it costs as much as p products."""

    @abstractmethod
    def _low_rank(self, most: int) -> LowRank | None:
        """The matrix without the shift, as at most so many rows; None if it takes more."""

    def _advice(self) -> str | None:
        """Advice for the case that the matrix is indefinite."""
        return None

    def _dense(self) -> Tensor | None:
        """The dense matrix without the shift, or None if it costs as much as p products."""
        return None

    def _describe(self) -> str:
        return (
            f"the {self._kind} on {self.shape[0]:,} selected parameters, with {self.shift:g} on "
            "its diagonal"
        )

    # ------------------------------------------------------------------------------------------

    @plain_arithmetic()
    def __matmul__(self, other: Tensor) -> Tensor:
        name = "the right factor"
        return self._apply(self._ranks.equal(name, lambda: self._vectors(other, name)))

    def _apply(self, V: Tensor) -> Tensor:
        """The product with vectors that have been checked, shape (p,) or (p, m)."""
        return self._times(V if V.ndim == 2 else V[:, None]).reshape(V.shape)

    def _vectors(self, V: object, name: str) -> Tensor:
        if not isinstance(V, Tensor):
            raise TypeError(
                f"{name} must be a tensor; got an object of type {type(V).__name__}"
                " (to_scipy() takes NumPy arrays)"
            )
        p = self.shape[0]
        if V.ndim not in (1, 2) or len(V) != p or not V.is_floating_point():
            raise ValueError(
                f"{name} must be floating-point of shape ({p},) or ({p}, m); got {V.dtype}, shape "
                f"{tuple(V.shape)}"
            )
        if V.device != self.device:
            raise ValueError(f"{name} is on {V.device} and the operator on {self.device}")
        V = V.detach().clone() if V.is_inference() else V.detach()
        return V.to(self.dtype)

    def _times(self, V: Tensor) -> Tensor:
        if not V.shape[1]:
            return V.clone()
        product = self._product(V).add_(V, alpha=self.shift)
        return product if self.decay is None else product.addcmul_(V, self.decay[:, None])

    @plain_arithmetic()
    def solve(
        self,
        b: Tensor,
        *,
        method: Method = "auto",
        rtol: float | None = None,
        max_iterations: int | None = None,
        preconditioner: Literal["diagonal"] | None = None,
        progress: bool | None = None,
    ) -> SolveResult:
        """Solve A x = b.

        Parameters
        ----------
        b : Tensor, shape (p,) or (p, m)
        method : {"auto", "cg", "minres", "cholesky", "woodbury"}, default "auto"
            "cg": conjugate gradients. "cholesky" forms the matrix. "woodbury" solves in the rows
            of a matrix of low rank plus damping. "minres" also solves indefinite matrices. "auto"
            is "woodbury" where there is such a form with fewer rows than p and damping, else
            "cholesky" for p up to 256 (2048 where forming it is cheap), else "cg".
        rtol : float, optional
            |A x - b| / |b| at which iterations end, 1e-5 for float32 and 1e-10 for float64 by
            default.
        max_iterations : int, optional
            10 p, at most 1000, by default; reaching it warns.
        preconditioner : {"diagonal", None}, default None
            Of "cg". The diagonal helps where parameters are of very different scale; on small
            networks it took 1.2 to 3.3 times as many iterations as none. For a Hessian it is that
            of the Gauss-Newton matrix, which is positive.
        progress : bool, optional
            Show a bar of iterations; by default as the operator was made.

        Returns
        -------
        SolveResult
            With the true residual.

        Raises
        ------
        IndefiniteCurvatureError
            Where "cg", "cholesky" or "woodbury" meet a direction in which the matrix is not
            positive.
        ValueError
            For "woodbury" without a form of low rank, or without damping; for a matrix too large
            for "cholesky". Over a group also where b, or an option but `progress`, differs between
            ranks.
        """
        p = self.shape[0]
        if rtol is None:
            rtol = 1e-5 if self.dtype == torch.float32 else 1e-10
        if max_iterations is None:
            max_iterations = min(10 * p, 1000)
        progress = self._progress if progress is None else progress
        compared: dict[str, Any] = {"method": method, "rtol": rtol}
        compared |= {"max_iterations": max_iterations, "preconditioner": preconditioner}

        def given() -> Tensor:
            check_choice(method, "method", ("auto", "cg", "minres", "cholesky", "woodbury"))
            check_real(rtol, "rtol", 0)
            check_integer(max_iterations, "max_iterations", 1)
            check_choice(preconditioner, "preconditioner", ("diagonal", None))
            check_bool(progress, "progress")
            return self._vectors(b, "b")

        b = self._ranks.equal("b", given, compared)
        describe, advice = self._describe(), self._advice()

        low = None
        uniform = self.decay is None
        if uniform and (method == "woodbury" or (method == "auto" and self.shift > 0 and p > 1)):
            low = self._low_rank(FEW_ROWS if method == "woodbury" else min(FEW_ROWS, p - 1))
        if low is None and method == "woodbury":
            raise ValueError(
                f"method='woodbury' needs a matrix by at most {FEW_ROWS} rows and one number on "
                f"the diagonal, which {describe} is not; take method='cg'"
            )
        if low is not None:
            result = woodbury(
                low.gram(),
                low.weights,
                self.shift,
                low.project,
                low.lift,
                b if b.ndim == 2 else b[:, None],
                product=self._times,
                describe=describe,
            )
            return replace(result, x=result.x.reshape(b.shape))
        if method == "cholesky" or (method == "auto" and p <= self.formed_up_to):
            return cholesky(self.to_dense(), b, describe=describe, advice=advice)

        options: dict[str, Any] = {
            "rtol": rtol,
            "max_iterations": max_iterations,
            "describe": describe,
            "progress": progress,
        }
        with self._ranks.warning_last():
            if method == "minres":
                return minres(self._apply, b, **options)
            diagonal = None if preconditioner is None else self._preconditioner()
            return conjugate_gradient(self._apply, b, diagonal=diagonal, advice=advice, **options)

    def _preconditioner(self) -> Tensor:
        return positive(self.diagonal())

    @plain_arithmetic()
    def diagonal(self) -> Tensor:
        """The diagonal, shape (p,).

        Exact. For Fisher matrices and factored rows from what they keep, for Gauss-Newton matrices
        of up to 64 outputs by a backward pass for each, otherwise by p products.
        """
        diagonal = self._diagonal()
        if diagonal is not None:
            return self._shifted(diagonal)
        p = self.shape[0]
        out = torch.empty(p, dtype=self.dtype, device=self.device)
        for start, block in self._identity(p, "diagonal"):
            k = block.shape[1]
            out[start : start + k] = self._times(block)[start : start + k].diagonal()
        return out

    def _shifted(self, diagonal: Tensor) -> Tensor:
        shifted = diagonal + self.shift
        return shifted if self.decay is None else shifted + self.decay

    def trace(self) -> float:
        """The sum of the diagonal, exact; costs what `diagonal` does."""
        return float(self.diagonal().sum())

    @plain_arithmetic()
    def to_dense(self, *, max_bytes: int = _MAX_BYTES) -> Tensor:
        """The matrix, shape (p, p), symmetrised.

        From gradients of samples for Fisher matrices, and for Gauss-Newton matrices of up to 64
        outputs; by p products otherwise.

        Raises
        ------
        ValueError
            If it takes more than max_bytes, 1 GiB by default, or holds NaN or infinity.
        """
        p = self.shape[0]
        with self._ranks.alone("the matrix"):
            check_integer(max_bytes, "max_bytes", 1)
            needed = p * p * torch.finfo(self.dtype).bits // 8
            if needed > max_bytes:
                raise ValueError(
                    f"the dense matrix of {p:,} selected parameters takes {needed:,} bytes, more "
                    f"than max_bytes={max_bytes:,}; products and solve() do not need it"
                )
        dense = self._dense()
        if dense is not None:
            dense.diagonal().copy_(self._shifted(dense.diagonal()))
        else:
            dense = torch.empty(p, p, dtype=self.dtype, device=self.device)
            for start, block in self._identity(p, "matrix"):
                dense[:, start : start + block.shape[1]] = self._times(block)
        if not torch.isfinite(dense).all():
            raise ValueError(
                f"{self._describe()}, holds values that are NaN or infinite: the second derivative "
                "of the model or of the loss is"
            )
        return (dense + dense.T).mul_(0.5)

    def _identity(self, p: int, what: str) -> Iterator[tuple[int, Tensor]]:
        with progress_bar(self._progress, total=p, desc=what, unit="product") as bar:
            for start in range(0, p, 64):
                k = min(64, p - start)
                block = torch.zeros(p, k, dtype=self.dtype, device=self.device)
                block[start : start + k].fill_diagonal_(1)
                yield start, block
                bar.update(k)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` that takes NumPy arrays; needs SciPy."""
        from scipy.sparse.linalg import LinearOperator

        def product(x: Any) -> Any:
            V = torch.as_tensor(x, dtype=self.dtype, device=self.device)
            return (self @ V).cpu().numpy()

        products = dict.fromkeys(("matvec", "rmatvec", "matmat", "rmatmat"), product)
        return LinearOperator(self.shape, dtype=str(self.dtype).removeprefix("torch."), **products)

    # ------------------------------------------------------------------------------------------

    def __add__(self, other: "CurvatureOperator") -> "CurvatureOperator":
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _Sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: "CurvatureOperator") -> "CurvatureOperator":
        if not isinstance(other, CurvatureOperator):
            return NotImplemented
        return _Sum([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: Any) -> "CurvatureOperator":
        if not _is_number(factor):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"the factor of an operator must be finite; got {factor}")
        return _Sum([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "CurvatureOperator":
        if not _is_number(divisor):
            return NotImplemented
        if divisor == 0:
            raise ValueError("an operator cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> "CurvatureOperator":
        return self * -1.0

    def __repr__(self) -> str:
        p = self.shape[0]
        return f"{type(self).__name__}({p} x {p}, {self.dtype}, {self.device}: {self.plan})"


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class _Sum(CurvatureOperator):
    """A linear combination of operators."""

    _kind = "sum of matrices"

    def __init__(self, terms: Sequence[tuple[float, CurvatureOperator]]) -> None:
        self._terms: list[tuple[float, CurvatureOperator]] = []
        for factor, term in terms:
            if isinstance(term, _Sum):
                self._terms += [(factor * f, t) for f, t in term._terms]
            else:
                self._terms.append((factor, term))
        first = self._terms[0][1]
        for _, term in self._terms:
            if term.shape != first.shape or term.device != first.device:
                raise ValueError(
                    f"operators must have one shape and device to be added; got {first.shape} on "
                    f"{first.device} and {term.shape} on {term.device}"
                )
        selections = {term.selection for _, term in self._terms} - {None}
        if len(selections) > 1:
            raise ValueError("operators must be of one selection of units to be added")
        self.shape, self.device = first.shape, first.device
        self.dtype = first.dtype
        self.selection = next(iter(selections), None)
        self.plan = " + ".join(f"{factor:g} * ({term.plan})" for factor, term in self._terms)
        self.shift = math.fsum(factor * term.shift for factor, term in self._terms)
        for factor, term in self._terms:
            self.dtype = torch.promote_types(self.dtype, term.dtype)
            self._progress |= term._progress
            self._ranks = term._ranks if self._ranks is ONE_RANK else self._ranks
            if term.decay is not None:
                own = factor * term.decay
                self.decay = own if self.decay is None else self.decay + own

    def _product(self, V: Tensor) -> Tensor:
        total = torch.zeros_like(V)
        for factor, term in self._terms:
            total.add_(term._product(V.to(term.dtype)), alpha=factor)
        return total

    def _diagonal(self) -> Tensor | None:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for factor, term in self._terms:
            diagonal = term._diagonal()
            if diagonal is None:
                return None
            total.add_(diagonal, alpha=factor)
        return total

    def _low_rank(self, most: int) -> LowRank | None:
        found = []
        for factor, term in self._terms:
            low = term._low_rank(most) if term.dtype == self.dtype else None
            if low is None or len(low.weights) > most:
                return None
            most -= len(low.weights)
            found.append((factor, low))
        return StackedRows(found)

    def _advice(self) -> str | None:
        return next((a for _, term in self._terms if (a := term._advice())), None)


def positive(diagonal: Tensor) -> Tensor:
    """A diagonal as a preconditioner: bounded away from zero."""
    least = diagonal.abs().max() * torch.finfo(diagonal.dtype).eps
    return diagonal.clamp(min=float(least) or 1.0)
