"""Matrices of second derivatives, restricted to the parameters of selected units.

Nothing here forms a matrix of the whole model, or pays for parameters outside of the selection.
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.loss import LossFunction, known_loss
from lcodec_ext._torch.modes import plain_arithmetic
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.routes import (
    FEW_ROWS,
    DeltaRoute,
    FisherRoute,
    Form,
    GaussNewtonForm,
    HeadRoute,
    HessianForm,
    LowRank,
    NotAHeadError,
    Route,
    StoredRows,
    gauss_newton_diagonal,
    stored_product,
)
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.curvature.solvers import (
    IndefiniteCurvatureError,
    SolveResult,
    cholesky,
    conjugate_gradient,
    minres,
    woodbury,
)

Method = Literal["auto", "cg", "minres", "cholesky", "woodbury"]

#: Coordinates up to which `solve` forms the matrix: by p products, or from what is at hand.
_SMALL, _SMALL_CHEAP = 256, 2048
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
    plan : str
        Which way products are computed, and why.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    selection: UnitSelection | None = None
    _kind = "matrix"
    _progress = False

    @property
    @abstractmethod
    def plan(self) -> str:
        """Which way products are computed, and why."""

    @property
    @abstractmethod
    def _shift(self) -> float:
        """What is added to the diagonal."""

    @abstractmethod
    def _product(self, V: Tensor) -> Tensor:
        """The matrix without the shift times V, shape (p, m)."""

    @abstractmethod
    def _diagonal(self) -> Tensor | None:
        """Its diagonal without the shift, where it costs less than p products."""

    @abstractmethod
    def _low_rank(self, most: int) -> LowRank | None:
        """Itself without the shift, by at most so many rows."""

    def _advice(self) -> str | None:
        """What else to do where it is indefinite."""
        return None

    def _dense(self) -> Tensor | None:
        """Itself without the shift as a matrix, where that costs less than p products."""
        return None

    def _describe(self) -> str:
        return (
            f"the {self._kind} on {self.shape[0]:,} selected parameters, with {self._shift:g} on "
            "its diagonal"
        )

    # ------------------------------------------------------------------------------------------

    @plain_arithmetic()
    def __matmul__(self, other: Tensor) -> Tensor:
        V = self._vectors(other, "the right factor")
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
        return self._product(V).add_(V, alpha=self._shift)

    @plain_arithmetic()
    def solve(
        self,
        b: Tensor,
        *,
        method: Method = "auto",
        rtol: float | None = None,
        max_iterations: int | None = None,
        preconditioner: Literal["diagonal"] | None = None,
    ) -> SolveResult:
        """Solve A x = b.

        Parameters
        ----------
        b : Tensor, shape (p,) or (p, m)
        method : {"auto", "cg", "minres", "cholesky", "woodbury"}, default "auto"
            "cg": conjugate gradients. "cholesky" forms the matrix. "woodbury" solves in the rows
            of a matrix of low rank plus damping. "minres" also solves indefinite matrices. "auto"
            is "woodbury" where there is such a form with fewer rows than p and damping, else
            "cholesky" for p up to 256 (2048 where the matrix is at hand), else "cg".
        rtol : float, optional
            |A x - b| / |b| at which iterations end, 1e-5 for float32 and 1e-10 for float64 by
            default.
        max_iterations : int, optional
            10 p, at most 1000, by default; reaching it warns.
        preconditioner : {"diagonal", None}, default None
            Of "cg". The diagonal helps where parameters are of very different scale. It is not the
            default: on small networks it took 1.2 to 3.3 times as many iterations as none. For a
            Hessian it is that of the Gauss-Newton matrix, which is positive.

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
            for "cholesky".
        """
        b = self._vectors(b, "b")
        check_choice(method, "method", ("auto", "cg", "minres", "cholesky", "woodbury"))
        p = self.shape[0]
        single = self.dtype == torch.float32
        rtol = (1e-5 if single else 1e-10) if rtol is None else check_real(rtol, "rtol", 0)
        if max_iterations is None:
            max_iterations = min(10 * p, 1000)
        check_integer(max_iterations, "max_iterations", 1)
        check_choice(preconditioner, "preconditioner", ("diagonal", None))
        describe, advice = self._describe(), self._advice()

        low = None
        if method == "woodbury" or (method == "auto" and self._shift > 0 and p > 1):
            low = self._low_rank(FEW_ROWS if method == "woodbury" else min(FEW_ROWS, p - 1))
            if low is None and method == "woodbury":
                raise ValueError(
                    f"method='woodbury' needs a matrix by at most {FEW_ROWS} rows, which {describe}"
                    " is not; take method='cg'"
                )
        if low is not None:
            result = woodbury(
                low.gram(),
                low.weights,
                self._shift,
                low.project,
                low.lift,
                b if b.ndim == 2 else b[:, None],
                product=self._times,
                describe=describe,
            )
            return replace(result, x=result.x.reshape(b.shape))
        if method == "cholesky" or (method == "auto" and p <= self._small):
            return cholesky(self.to_dense(), b, describe=describe, advice=advice)

        def product(v: Tensor) -> Tensor:
            return self @ v

        if method == "minres":
            return minres(
                product,
                b,
                rtol=rtol,
                max_iterations=max_iterations,
                describe=describe,
                progress=self._progress,
            )
        return conjugate_gradient(
            product,
            b,
            diagonal=None if preconditioner is None else self._preconditioner(),
            rtol=rtol,
            max_iterations=max_iterations,
            describe=describe,
            advice=advice,
            progress=self._progress,
        )

    @property
    def _small(self) -> int:
        return _SMALL

    def _preconditioner(self) -> Tensor:
        return _positive(self.diagonal())

    @plain_arithmetic()
    def diagonal(self) -> Tensor:
        """The diagonal, shape (p,).

        Exact. From what is at hand for Fisher matrices and factored rows; by a backward pass for
        each output for Gauss-Newton matrices of up to 64; by p products otherwise.
        """
        diagonal = self._diagonal()
        if diagonal is not None:
            return diagonal + self._shift
        p = self.shape[0]
        out = torch.empty(p, dtype=self.dtype, device=self.device)
        for start, block in self._identity(p, "diagonal"):
            k = block.shape[1]
            out[start : start + k] = self._times(block)[start : start + k].diagonal()
        return out

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
        check_integer(max_bytes, "max_bytes", 1)
        p = self.shape[0]
        needed = p * p * torch.finfo(self.dtype).bits // 8
        if needed > max_bytes:
            raise ValueError(
                f"the dense matrix of {p:,} selected parameters takes {needed:,} bytes, more than "
                f"max_bytes={max_bytes:,}; products and solve() do without it"
            )
        formed = self._dense()
        if formed is not None:
            dense = formed
            dense.diagonal().add_(self._shift)
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

        return LinearOperator(
            self.shape,
            matvec=product,
            rmatvec=product,
            matmat=product,
            rmatmat=product,
            dtype=str(self.dtype).removeprefix("torch."),
        )

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
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"the factor of an operator must be finite; got {factor}")
        return _Sum([(float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> "CurvatureOperator":
        if isinstance(divisor, bool) or not isinstance(divisor, numbers.Real):
            return NotImplemented
        if divisor == 0:
            raise ValueError("an operator cannot be divided by 0")
        return self * (1 / divisor)

    def __neg__(self) -> "CurvatureOperator":
        return self * -1.0

    def __repr__(self) -> str:
        p = self.shape[0]
        return f"{type(self).__name__}({p} x {p}, {self.dtype}, {self.device}: {self.plan})"


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
        for _, term in self._terms:
            self.dtype = torch.promote_types(self.dtype, term.dtype)
            self._progress |= term._progress

    @property
    def plan(self) -> str:
        return " + ".join(f"{factor:g} * ({term.plan})" for factor, term in self._terms)

    @property
    def _shift(self) -> float:
        return math.fsum(factor * term._shift for factor, term in self._terms)

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
        return _Stacked(found)

    def _advice(self) -> str | None:
        return next((a for _, term in self._terms if (a := term._advice())), None)


class _Stacked(LowRank):
    """A linear combination of matrices of low rank, their rows one after another."""

    def __init__(self, terms: Sequence[tuple[float, LowRank]]) -> None:
        self._lows = [low for _, low in terms]
        self.weights = torch.cat([factor * low.weights for factor, low in terms])

    def gram(self) -> Tensor:
        blocks = [
            [low.gram() if i == j else None for j, _ in enumerate(self._lows)]
            for i, low in enumerate(self._lows)
        ]
        for j, right in enumerate(self._lows):
            k = len(right.weights)
            for i, left in enumerate(self._lows[:j]):
                block = left.weights.new_empty(len(left.weights), k)
                for start in range(0, k, 64):
                    unit = block.new_zeros(k, min(64, k - start))
                    unit[start:].fill_diagonal_(1)
                    block[:, start : start + 64] = left.project(right.lift(unit))
                blocks[i][j], blocks[j][i] = block, block.T
        return torch.cat([torch.cat(row, 1) for row in blocks])  # type: ignore[arg-type]

    def project(self, B: Tensor) -> Tensor:
        return torch.cat([low.project(B) for low in self._lows])

    def lift(self, C: Tensor) -> Tensor:
        parts = torch.split(C, [len(low.weights) for low in self._lows])
        return torch.stack(
            [low.lift(part) for low, part in zip(self._lows, parts, strict=True)]
        ).sum(0)


# ---------------------------------------------------------------------------------------------


class _OnModel(CurvatureOperator):
    """What the operators have in common that a model, a loss and data make."""

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: UnitSelection,
        *,
        damping: float = 0.0,
        weight_decay: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        self.damping = check_real(damping, "damping", 0)
        self.weight_decay = check_real(weight_decay, "weight_decay", 0)
        objective = Objective(
            model, loss_fn, data, selection, dtype=dtype, reduction=reduction, progress=progress
        )
        self._progress = objective.progress
        self.selection = objective.selection
        p = objective.masked.size
        self.shape, self.dtype, self.device = (
            (p, p),
            objective.masked.dtype,
            objective.masked.device,
        )
        self._objective = objective
        self._route = self._choose(objective)

    @abstractmethod
    def _choose(self, objective: Objective) -> Route:
        """The route for the case."""

    @property
    def plan(self) -> str:
        return self._route.plan

    @property
    def _shift(self) -> float:
        return self.damping + self.weight_decay

    @property
    def _small(self) -> int:
        return _SMALL if isinstance(self._route, DeltaRoute) else _SMALL_CHEAP

    def _describe(self) -> str:
        return (
            f"the {self._kind} on {self.shape[0]:,} selected parameters, with weight_decay="
            f"{self.weight_decay:g} and damping={self.damping:g} included"
        )

    def _product(self, V: Tensor) -> Tensor:
        return self._route.product(V)

    def _diagonal(self) -> Tensor | None:
        return self._route.diagonal()

    def _low_rank(self, most: int) -> LowRank | None:
        return self._route.low_rank(most)

    def _dense(self) -> Tensor | None:
        return self._route.dense()


def _head_or_delta(objective: Objective, form: type[Form]) -> Route:
    try:
        return HeadRoute(objective)
    except NotAHeadError as reason:
        return DeltaRoute(objective, form, str(reason))


class HessianOperator(_OnModel):
    """The Hessian of a loss by the parameters of selected units.

    ::

        H = (1/N) sum_b n_b d2 loss_b / dw dw + (weight_decay + damping) I

    over batches b of n_b samples, N in all; without 1/N and n_b for ``reduction="sum"``. Where
    loss_fn is a mean over samples, this is the Hessian of the mean loss however they are batched.

    Parameters
    ----------
    model : Module
        Any that PyTorch differentiates twice; evaluated in evaluation mode. The operator keeps a
        copy: the model is left as it is, and may change afterwards without changing the operator.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, a scalar tensor. Of outputs with `logits`, as the models of
        transformers return them, it is given these.
    data : tensors, Dataset, DataLoader, iterable of batches, or callable
        A batch is (inputs, ..., targets), with the last entry for the loss and the others for the
        model (a tuple or dict of inputs is unpacked), or a dict of the model's keywords with the
        targets as "labels". Tensors are one such batch, cut into batches of 128, as a Dataset is;
        the loss must then be a plain mean, or sum, over samples. A callable returns an iterable of
        batches, each time anew. What is read must be the same every time; torch's random numbers
        are, and are left to the caller as they were. Tensors are moved to the model's device.
    selection : UnitSelection
        The coordinates, in its order.
    damping, weight_decay : float, default 0.0
        Added to the diagonal: damping, and lambda of the objective's (lambda / 2) |w|^2.
    reduction : {"mean", "sum"}, default "mean"
        Of loss_fn, and of the matrix.
    dtype : torch.float32 or torch.float64, optional
        In which model and data are converted and all is computed. By default float64 where a
        selected parameter is, float32 otherwise, as for bfloat16 weights.
    progress : bool, default False
        Show progress bars; needs tqdm.

    Attributes
    ----------
    shape, dtype, device, plan
        As for every `CurvatureOperator`.
    selection, damping, weight_decay
        As given.

    Raises
    ------
    ValueError, TypeError
        For units that cannot be selected, data or options that cannot be used, and a loss that is
        not finite; the message names it.

    Notes
    -----
    Two ways, both exact; `plan` says which. If the units are of one layer whose outputs are the
    model's (a Linear, or a convolution under global average pooling), its inputs are kept, and a
    product is two matrix products of N x r x D. Otherwise the rows are displaced by zero and the
    gradient's graph is kept for up to 512 MiB; a product is two passes from the loss back to the
    first selected layer, whatever comes before it. Attention is computed from elementary
    operations, since fused ones have no second derivatives.

    The Hessian of a network is usually indefinite, and `solve` then raises
    `IndefiniteCurvatureError`: see `GaussNewtonOperator`. Its diagonal takes p products.

    References
    ----------
    Pearlmutter (1994), Fast exact multiplication by the Hessian. Neural Computation 6.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.curvature import HessianOperator, UnitSelection
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> X, y = torch.randn(50, 4), torch.randint(0, 3, (50,))
    >>> H = HessianOperator(
    ...     model, torch.nn.functional.cross_entropy, (X, y), UnitSelection({"2": [0, 1]}),
    ...     damping=0.1,
    ... )
    >>> H.shape, (H @ torch.ones(18)).shape
    ((18, 18), torch.Size([18]))
    >>> H.solve(torch.ones(18)).method
    'cholesky'
    """

    _kind = "hessian"
    _scale: Tensor | None = None

    def _choose(self, objective: Objective) -> Route:
        return _head_or_delta(objective, HessianForm)

    def _preconditioner(self) -> Tensor:
        if isinstance(self._route, DeltaRoute):
            if self._scale is None:
                self._scale = gauss_newton_diagonal(self._objective)
            if self._scale is not None:
                return _positive(self._scale + self._shift)
        return super()._preconditioner()

    def _advice(self) -> str | None:
        return "GaussNewtonOperator, which never is indefinite for a convex loss"


class GaussNewtonOperator(_OnModel):
    """The generalised Gauss-Newton matrix of a loss by the parameters of selected units.

    ::

        G = (1/N) sum_b n_b J_b^T (d2 loss_b / dz dz) J_b + (weight_decay + damping) I

    with z the model's outputs and J their derivative by the parameters. Never indefinite where the
    loss is convex in the outputs, as cross-entropy and squared error are, and the Hessian where the
    outputs are linear in the parameters.

    Parameters, errors and routes are those of `HessianOperator`. A product on kept graphs is
    two backward passes. Where loss_fn is a plain mean or sum and a sample has at most 64 outputs,
    the diagonal takes a backward pass for each of them, and few samples are solved in the rows
    of J ("woodbury").

    References
    ----------
    Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.
    Neural Computation 14.
    """

    _kind = "gauss_newton matrix"

    def _choose(self, objective: Objective) -> Route:
        return _head_or_delta(objective, GaussNewtonForm)


class FisherOperator(_OnModel):
    """The Fisher matrix of a loss by the parameters of selected units.

    ::

        kind="empirical":  F = (1/N) sum_i g_i g_i^T + (weight_decay + damping) I
        kind="model":      the same with the expectation over targets that the model predicts

    where g_i is the gradient of sample i's loss. The model's Fisher matrix is the Gauss-Newton
    matrix of the losses that are negative log likelihoods in their natural parameter; these are
    accepted: softmax cross-entropy, BCE with logits, squared error.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress
        As for `HessianOperator`. loss_fn must be a plain mean or sum over samples.
    kind : {"empirical", "model"}, default "empirical"

    Raises
    ------
    ValueError, TypeError
        As `HessianOperator`, for a loss that is no plain mean or sum, and for kind="model" with a
        loss other than these.

    Notes
    -----
    Gradients of samples are kept: as factors where they are outer products (a Linear layer without
    positions), else stored, N p numbers read once by a product; above 512 MiB as factors by
    position, or they are formed again for every product. Up to 2048 samples are solved in
    their rows, with an N x N matrix.

    References
    ----------
    Martens (2020), New insights and perspectives on the natural gradient method. JMLR 21.
    """

    _kind = "Fisher matrix"

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: UnitSelection,
        *,
        kind: Literal["empirical", "model"] = "empirical",
        damping: float = 0.0,
        weight_decay: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        self.kind = check_choice(kind, "kind", ("empirical", "model"))
        if kind == "model" and known_loss(loss_fn) is None:
            raise ValueError(
                "kind='model' needs a loss that is a negative log likelihood: cross_entropy, "
                "binary_cross_entropy_with_logits or mse_loss of torch.nn.functional, a "
                "functools.partial of them, or CrossEntropyLoss, BCEWithLogitsLoss or MSELoss, "
                f"without class weights; got {loss_fn!r}"
            )
        super().__init__(
            model,
            loss_fn,
            data,
            selection,
            damping=damping,
            weight_decay=weight_decay,
            reduction=reduction,
            dtype=dtype,
            progress=progress,
        )

    def _choose(self, objective: Objective) -> Route:
        if self.kind == "empirical":
            return FisherRoute(objective)
        return _head_or_delta(objective, GaussNewtonForm)

    def restrict(self, selection: UnitSelection) -> "RestrictedFisher":
        """The operator of fewer units, on the gradients that are stored for these.

        Nothing is copied: a product reads the columns of the selected units where they lie.

        Parameters
        ----------
        selection : UnitSelection
            Part of the operator's own.

        Raises
        ------
        ValueError
            For units that this operator does not have, and where no gradients are stored (see
            `plan`).
        """
        stored = self._route.stored if isinstance(self._route, FisherRoute) else ()
        if not stored:
            raise ValueError(f"restrict() needs stored gradients; this operator has {self.plan}")
        return RestrictedFisher(self, selection, stored)


class RestrictedFisher(CurvatureOperator):
    """What `FisherOperator.restrict` returns."""

    _kind = "Fisher matrix"

    def __init__(
        self, whole: FisherOperator, selection: UnitSelection, stored: Sequence[Tensor]
    ) -> None:
        if not isinstance(selection, UnitSelection) or not selection:
            raise ValueError(
                f"selection must be a UnitSelection of at least one unit; got {selection!r}"
            )
        others = selection - whole._objective.selection
        if others:
            raise ValueError(f"selection must be part of the operator's; it has {others} besides")
        columns = whole._objective.masked.columns(selection)
        breaks = (columns.diff() != 1).nonzero()[:, 0] + 1
        starts = torch.cat([breaks.new_zeros(1), breaks])
        lengths = torch.cat([breaks, breaks.new_tensor([len(columns)])]) - starts
        if (columns.diff() <= 0).any():  # tied parameters that come in another order
            stored = [G[:, columns] for G in stored]
            columns, starts = torch.arange(len(columns), device=columns.device), starts[:1]
            lengths = lengths.new_tensor([len(columns)])
        self._stored, self._columns = stored, columns
        self._segments = torch.stack([columns[starts], lengths], 1)
        self._share = whole._objective.sample_share
        self._whole, self.selection = whole, selection
        self.shape = (len(columns), len(columns))
        self.dtype, self.device = whole.dtype, whole.device

    @property
    def plan(self) -> str:
        """Which way products are computed, and why."""
        return f"{len(self._segments)} segments of {self._whole.plan}"

    @property
    def _shift(self) -> float:
        return self._whole._shift

    @property
    def _small(self) -> int:
        return _SMALL_CHEAP

    def _product(self, V: Tensor) -> Tensor:
        return stored_product(self._stored, V, self._segments, self._share)

    def _diagonal(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for G in self._stored:
            total += G[:, self._columns].square().sum(0)
        return total * self._share

    def _low_rank(self, most: int) -> LowRank | None:
        n = sum(map(len, self._stored))
        if n > most:
            return None
        weights = torch.full((n,), self._share, dtype=self.dtype, device=self.device)
        return StoredRows(tuple(G[:, self._columns] for G in self._stored), weights)


class SecantOperator(CurvatureOperator):
    """The matrix that pairs of steps and changes of the gradient determine.

    ::

        B = Y M^-1 Y^T + (weight_decay + damping) I,   M = (S^T Y + Y^T S) / 2

    where the columns of S are steps of the selected parameters and those of Y the changes of the
    gradient along them: ``B S = Y`` where S^T Y is symmetric, as it is for a quadratic loss. For
    one pair it is y y^T / (y^T s), of rank one.

    It is kept positive: pairs without positive curvature, ``s.y <= tolerance |s| |y|``, are left
    out, and so are combinations of the others in which M is not positive by as much.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress
        As for `HessianOperator`.
    steps : Tensor, shape (p,) or (p, k)
        The displacements s of the selected parameters along which gradients are compared.
    tolerance : float, default 1e-8
        Relative curvature up to which a pair is left out: the safeguard of Nocedal & Wright.

    Attributes
    ----------
    S, Y : Tensor, shape (p, k)
        The pairs that were given, those left out included.
    skipped : tuple of int
        Pairs that were left out.
    rank : int

    Raises
    ------
    ValueError, TypeError
        As `HessianOperator`, and for steps of another shape or not finite.
    IndefiniteCurvatureError
        If no pair is left.

    Notes
    -----
    k + 1 gradients once; a product takes 4 k p operations, and so does a solution.

    References
    ----------
    Mehta et al. (CVPR 2022), the secant approximation; Nocedal & Wright (2006), section 7.2;
    Schnabel (1983), Quasi-Newton methods using multiple secant equations.
    """

    _kind = "secant matrix"

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: UnitSelection,
        *,
        steps: Tensor,
        tolerance: float = 1e-8,
        damping: float = 0.0,
        weight_decay: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        objective = Objective(
            model, loss_fn, data, selection, dtype=dtype, reduction=reduction, progress=progress
        )
        masked = objective.masked
        self.shape, self.dtype, self.device = (masked.size,) * 2, masked.dtype, masked.device
        self.selection = selection
        S = self._vectors(steps, "steps")
        S = S if S.ndim == 2 else S[:, None]
        if not S.shape[1] or not torch.isfinite(S).all():
            raise ValueError("steps must be one or more vectors, without NaN and infinity")
        start = objective.gradient()
        changes = []
        for step in S.T:
            with masked.moved(step):
                changes.append(objective.gradient() - start)
        self._set_pairs(S, torch.stack(changes, 1), tolerance, damping, weight_decay)

    @classmethod
    def from_pairs(
        cls,
        S: Tensor,
        Y: Tensor,
        *,
        inner: Tensor | None = None,
        tolerance: float = 1e-8,
        damping: float = 0.0,
        weight_decay: float = 0.0,
    ) -> "SecantOperator":
        """Make the operator of pairs that are at hand, from training for instance.

        Parameters
        ----------
        S, Y : Tensor of float32 or float64, shape (p,) or (p, k)
            Steps, and changes of the gradient without weight decay.
        inner : Tensor, shape (k, k), optional
            S^T Y of whole pairs, where S and Y are only their rows of some parameters: the operator
            is then the block of the whole matrix. Steps that moved other parameters, too, are no
            steps of these alone, and their own S^T Y is no curvature.
        tolerance, damping, weight_decay
            As for the class.
        """
        for name, pairs in (("S", S), ("Y", Y)):
            if not isinstance(pairs, Tensor) or pairs.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name} must be a tensor of float32 or float64; got {type(pairs)}")
        if S.shape != Y.shape or S.dtype != Y.dtype or S.device != Y.device or S.ndim not in (1, 2):
            raise ValueError(
                "S and Y must be of one shape (p,) or (p, k), dtype and device; got "
                f"{tuple(S.shape)}, {S.dtype}, {S.device} and {tuple(Y.shape)}, {Y.dtype}, "
                f"{Y.device}"
            )
        operator = cls.__new__(cls)
        operator.shape, operator.dtype, operator.device = (len(S),) * 2, S.dtype, S.device
        S, Y = (t.detach().reshape(len(t), -1) for t in (S, Y))
        k = S.shape[1]
        if inner is not None and (not isinstance(inner, Tensor) or inner.numel() != k * k):
            given = tuple(inner.shape) if isinstance(inner, Tensor) else type(inner)
            raise ValueError(f"inner must be a tensor of shape ({k}, {k}); got {given}")
        inner = None if inner is None else inner.detach().reshape(k, k)
        operator._set_pairs(S, Y, tolerance, damping, weight_decay, inner)
        return operator

    @plain_arithmetic()
    def _set_pairs(
        self,
        S: Tensor,
        Y: Tensor,
        tolerance: float,
        damping: float,
        weight_decay: float,
        inner: Tensor | None = None,
    ) -> None:
        self.damping = check_real(damping, "damping", 0)
        self.weight_decay = check_real(weight_decay, "weight_decay", 0)
        check_real(tolerance, "tolerance", 0)
        if not (torch.isfinite(S).all() and torch.isfinite(Y).all()):
            raise ValueError("the steps or the changes of the gradient hold NaN or infinity")
        self.S, self.Y = S, Y
        # in units of every step's length, so that M is a matrix of relative curvatures
        lengths = S.double().norm(dim=0)
        products = S.double().T @ Y.double() if inner is None else inner.double()
        curvature = products.diagonal()
        good = curvature > tolerance * lengths * Y.double().norm(dim=0)
        self.skipped = tuple((~good).nonzero()[:, 0].tolist())
        if not good.any():
            quotients = curvature / lengths.square()
            raise IndefiniteCurvatureError(
                f"none of {S.shape[1]} pairs has positive curvature. A pair is a step s of the "
                "weights and the change y of the gradient along it, and s.y is "
                f"{curvature.max().item():.3g} at most. Damping does not help: it is added to "
                "what the pairs give. Use curvature='gauss_newton', the GaussNewtonOperator, which "
                "never is indefinite for a loss that is convex in the outputs, or other steps",
                quotients.max().item() if inner is None else math.nan,
            )
        scale = (lengths if inner is None else curvature.sqrt())[good]
        unit_Y = Y.double()[:, good] / scale
        M = products[good][:, good] / (scale[:, None] * scale)
        values, vectors = torch.linalg.eigh((M + M.T) / 2)
        kept = values > tolerance * values[-1]
        self.rank = int(kept.sum())
        scaled = vectors[:, kept] / values[kept].sqrt()
        self._R = (unit_Y @ scaled).T.to(self.dtype).contiguous()  # (rank, p)

    @property
    def plan(self) -> str:
        """Which way products are computed, and why."""
        k = self.S.shape[1]
        left_out = f"; {len(self.skipped)} without positive curvature left out" * bool(self.skipped)
        return f"low rank: {self.rank} of {k} pairs{left_out}"

    @property
    def _shift(self) -> float:
        return self.damping + self.weight_decay

    def _product(self, V: Tensor) -> Tensor:
        return self._R.T @ (self._R @ V)

    def _dense(self) -> Tensor:
        return self._R.T @ self._R

    def _diagonal(self) -> Tensor:
        return self._R.square().sum(0)

    def _low_rank(self, most: int) -> LowRank | None:
        if self.rank > most:
            return None
        return StoredRows((self._R,), self._R.new_ones(self.rank))


def _positive(diagonal: Tensor) -> Tensor:
    """A diagonal as a preconditioner: bounded away from zero."""
    least = diagonal.abs().max() * torch.finfo(diagonal.dtype).eps
    return diagonal.clamp(min=float(least) or 1.0)
