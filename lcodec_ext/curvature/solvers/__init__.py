"""Solvers of symmetric systems ``A x = b`` with curvature matrices, given as functions or dense.

Every solver returns a `SolveResult`, whose residual is that of the x in it, from a product of its
own: what a recurrence believes is never reported. Every one takes ``b`` as one column of shape (p,)
or as several of shape (p, m), in float32 or float64. ``product`` is called with tensors of as many
dimensions as b has, (p,) or (p, k) with k <= m, scaled by powers of 2; it may use autograd, and
must not write to them. ``describe`` names the matrix in messages, as "the Hessian on 12 selected
parameters, with damping=0.001 included".
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._checks import check_integer, check_real
from lcodec_ext._progress import progress_bar

__all__ = [
    "ConvergenceWarning",
    "IndefiniteCurvatureError",
    "SolveResult",
    "cholesky",
    "conjugate_gradient",
    "minres",
    "woodbury",
]

Product = Callable[[Tensor], Tensor]

_State = tuple[Tensor, ...]
_Start = Callable[[Tensor, Tensor], _State]
_Step = Callable[[_State], tuple[_State, Tensor, Tensor]]

_EPS = torch.finfo(torch.float64).eps
_ROUNDING = 16.0  # curvature below this many eps ||A|| is no more than rounding
_FLOOR = 4.0  # residuals below this many eps ||A|| ||x|| are rounding errors of A x
_RESTARTS = 3


class IndefiniteCurvatureError(ValueError):
    """The matrix is not positive definite: its Newton step may go anywhere.

    Attributes
    ----------
    rayleigh : float
        d^T A d / d^T d of a direction d that was found, not positive beyond rounding; the smallest
        eigenvalue where eigenvalues were computed.
    least_damping : float or None
        Damping to add so that this quotient is no longer negative; where it is no eigenvalue,
        others may take more. None for a matrix that is singular within rounding.
    """

    def __init__(
        self, message: str, rayleigh: float = math.nan, least_damping: float | None = None
    ) -> None:
        super().__init__(message)
        self.rayleigh = rayleigh
        self.least_damping = least_damping


class ConvergenceWarning(UserWarning):
    """An iterative solver ended with a residual above the one that was asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class SolveResult:
    """Solution of a linear system, and how good it is.

    Attributes
    ----------
    x : Tensor
        Shape, dtype and device of b.
    residual : float
        ||b - A x|| / ||b|| of this x, the largest over the columns; 0 for b = 0.
    iterations : int
        The largest over the columns; 0 for direct methods.
    method : {"cg", "minres", "cholesky", "woodbury"}
    """

    x: Tensor
    residual: float
    iterations: int
    method: str

    def __repr__(self) -> str:
        return (
            f"SolveResult(x=<{self.x.dtype}, shape {tuple(self.x.shape)}>, "
            f"residual={self.residual:.3g}, iterations={self.iterations}, method={self.method!r})"
        )


def conjugate_gradient(
    product: Product,
    b: Tensor,
    *,
    diagonal: Tensor | None = None,
    rtol: float,
    max_iterations: int,
    describe: str,
    advice: str | None = None,
    progress: bool = False,
) -> SolveResult:
    """Solve with a positive definite matrix by (preconditioned) conjugate gradients.

    Columns run in lock-step, one product for all of them; one that has converged takes no further
    part. Where the true residual is above rtol although the recurrence's is at rtol, or below the
    rounding errors of A x, the iteration is restarted from x, as long as that halves the true
    residual, at most three times.

    Parameters
    ----------
    product : callable
        v to A v, of the shape, dtype and device of v.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    diagonal : Tensor, shape (p,), optional
        That of A, or one like it, positive: the Jacobi preconditioner.
    rtol : float
        Relative residual to reach, in every column.
    max_iterations : int
        For each column, restarts included.
    describe : str
    advice : str, optional
        What else than more damping to use where the matrix is indefinite.
    progress : bool
        Show a progress bar.

    Returns
    -------
    SolveResult

    Raises
    ------
    IndefiniteCurvatureError
        If a direction d has d^T A d <= 16 eps ||A|| d^T d, in the norm of the preconditioner and
        with ||A|| the largest ||A d|| / ||d|| so far, and the residual is no rounding error. Not
        every indefinite matrix is found out: b may have no part in its negative directions.
    ValueError
        For a diagonal that is not positive, arguments of wrong shapes, NaN or infinity in them or
        in a product.

    Warns
    -----
    ConvergenceWarning
        If the true residual is above rtol at the end.

    Notes
    -----
    One product and O(p) for each iteration and column; about 10 vectors of length p a column.
    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems" (1952).
    """
    system = _System(product, b, describe)
    weight = b.new_ones(1, 1) if diagonal is None else _checked_diagonal(diagonal, b)
    eps = torch.finfo(b.dtype).eps
    rounding, floor = _ROUNDING * eps, _FLOOR * eps
    norm = b.new_zeros((), dtype=torch.float64)  # of D^-1/2 A D^-1/2, from below

    def start(x: Tensor, r: Tensor) -> _State:
        d = r / weight
        rho = _dots(r, d)
        return torch.zeros_like(r), r, d, rho, rho.sqrt(), _dots(weight * x, x).sqrt()

    def step(state: _State) -> tuple[_State, Tensor, Tensor]:
        nonlocal norm
        y, r, d, rho, least, before = state
        q = system.apply(d)
        curvature, length = _dots(d, q), _dots(weight * d, d)
        norm = torch.maximum(norm, (_dots(q / weight, q) / length).max().sqrt())
        flat = curvature <= rounding * norm * length
        if flat.any():
            size = before + _dots(weight * y, y).sqrt()
            refused = flat & (least > rounding * norm * size)  # else it has converged
            if refused.any():
                quotients = curvature / _dots(d, d)
                worst = quotients.where(refused, math.inf).argmin()
                quotient = quotients[worst].item()
                negative = bool(curvature[worst] < -rounding * norm * length[worst])
                found = f"d^T A d / d^T d is {quotient:.4g} for a direction d of the iteration"
                raise _refusal(describe, found, quotient, negative, advice)
        alpha = (rho / curvature).where(~flat, 0)
        y, r = _add(y, alpha, d), _add(r, -alpha, q)
        z = r / weight
        rho, last = _dots(r, z), rho
        least = torch.minimum(least, rho.sqrt())
        ended = flat | (rho.sqrt() <= floor * norm * _dots(weight * y, y).sqrt())
        return (y, r, _add(z, rho / last, d), rho, least, before), _norms(r), ended

    return _iterate("cg", system, start, step, rtol, max_iterations, progress)


def minres(
    product: Product,
    b: Tensor,
    *,
    rtol: float,
    max_iterations: int,
    describe: str,
    progress: bool = False,
) -> SolveResult:
    """Solve with a symmetric matrix, indefinite or not, by minimal residuals.

    Parameters, columns, restarts, results, errors and warnings are those of `conjugate_gradient`,
    except that no matrix is refused. Where A is singular and b outside of its range, a warning
    tells the residual, which cannot reach rtol; it is at most 1.

    Notes
    -----
    One product and O(p) for each iteration and column; about 13 vectors of length p a column.
    Paige and Saunders, "Solution of sparse indefinite systems of linear equations" (1975).
    """
    system = _System(product, b, describe)
    eps, tiny = torch.finfo(b.dtype).eps, torch.finfo(b.dtype).tiny
    norm = b.new_zeros((), dtype=torch.float64)  # of A, from below

    def start(x: Tensor, r: Tensor) -> _State:
        zero, size = torch.zeros_like(r), _norms(r)
        flat = torch.zeros_like(size)
        return zero, zero, r / size.to(r.dtype), zero, zero, flat, flat, flat, flat - 1, flat, size

    def step(state: _State) -> tuple[_State, Tensor, Tensor]:
        # Lanczos: A V = V T with T tridiagonal (alpha, beta), and the QR factorisation of T by
        # rotations (c, s) to an upper triangle with rows (gamma, delta, epsilon).
        nonlocal norm
        y, u, v, w_older, w_old, beta, dbar, epsilon, c, s, size = state
        q = system.apply(v)
        norm = torch.maximum(norm, _norms(q).max())
        alpha = _dots(v, q)
        q = _add(_add(q, -alpha, v), -beta, u)
        beta = _norms(q)
        delta, gbar = c * dbar + s * alpha, s * dbar - c * alpha
        w = _add(_add(v, -epsilon, w_older), -delta, w_old)
        epsilon, dbar = s * beta, -c * beta
        gamma = torch.hypot(gbar, beta).clamp_min(tiny)
        c, s = gbar / gamma, beta / gamma
        w = w / gamma.to(w.dtype)
        longer = _add(y, c * size, w)
        # size hypot(gbar, dbar) is ||A r|| of the r before this step: if 0, r is the least.
        least = torch.hypot(gbar, dbar) <= _ROUNDING * eps * norm
        y, size = y.where(least, longer), s * size
        ended = least | (size <= _FLOOR * eps * norm * _norms(y))
        v, u = q / beta.clamp_min(tiny).to(q.dtype), v
        return (y, u, v, w_old, w, beta, dbar, epsilon, c, s, size), size, ended

    return _iterate("minres", system, start, step, rtol, max_iterations, progress)


def cholesky(matrix: Tensor, b: Tensor, *, describe: str, advice: str | None = None) -> SolveResult:
    """Solve with a dense positive definite matrix by its Cholesky factorisation, in float64.

    Parameters
    ----------
    matrix : Tensor of the dtype of b, shape (p, p)
        Symmetric: the lower triangle is factorised.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    describe, advice
        As in `conjugate_gradient`.

    Returns
    -------
    SolveResult
        With a step of iterative refinement in the columns where that lowers the residual.

    Raises
    ------
    IndefiniteCurvatureError
        If the smallest eigenvalue is at most p eps times the largest (with the eps of float64; for
        float32, whose entries resolve no more, at least eps of float32 times the largest).
    ValueError
        For arguments of wrong shapes or dtypes, NaN or infinity in them.

    Notes
    -----
    p^3 / 3 multiplications for the factor and 2 p^3 / 3 for the inverse, whose norm bounds the
    smallest eigenvalue from below. Eigenvalues are computed only where that does not tell.
    """
    system = _System(None, b, describe)
    p = len(b)
    _check("matrix", matrix, (p, p), b)
    A = matrix.detach().double()
    if system.zero:
        return system.result("cholesky")
    factor, failed = torch.linalg.cholesky_ex(A)
    unit = max(p * _EPS, torch.finfo(b.dtype).eps)
    if failed or unit * A.norm() * torch.cholesky_inverse(factor).norm() >= 1:
        smallest, largest = torch.linalg.eigvalsh(A)[[0, -1]].tolist()
        rounding = unit * max(largest, -smallest)
        if failed or smallest <= rounding:
            found = f"its smallest eigenvalue is {smallest:.4g}, the largest {largest:.4g}"
            raise _refusal(describe, found, smallest, smallest < -rounding, advice)
    return _refine(
        "cholesky",
        system,
        lambda r: torch.cholesky_solve(r.double(), factor),
        lambda x: A @ x.double(),
        steps=1,
    )


def woodbury(
    gram: Tensor,
    weights: Tensor,
    damping: float,
    project: Product,
    lift: Product,
    b: Tensor,
    *,
    product: Product,
    describe: str,
) -> SolveResult:
    """Solve with a matrix of low rank plus damping, ``A = damping I + R^T diag(weights) R``.

    ::

        x = (b - R^T (damping I + C K)^-1 C R b) / damping,   K = R R^T,  C = diag(weights)

    Parameters
    ----------
    gram : Tensor, shape (k, k)
        K; best in float64, if R is not.
    weights : Tensor, shape (k,)
        Of any sign.
    damping : float
        Positive.
    project, lift : callable
        B to R B, (p, m) to (k, m), and C to R^T C, (k, m) to (p, m), in the dtype of b.
    b : Tensor of float32 or float64, shape (p,) or (p, m)
    product : callable
        v to A v, for the residual.
    describe : str

    Returns
    -------
    SolveResult
        With up to two steps of iterative refinement in the columns where they lower the residual.

    Raises
    ------
    IndefiniteCurvatureError
        For weights of both signs, if damping plus the smallest eigenvalue of C K is at most k eps
        times the largest in size: these are the eigenvalues of A, but for damping itself.
    ValueError
        For damping that is not positive, arguments of wrong shapes, NaN or infinity in them or in
        what a function returns.

    Notes
    -----
    O(k^3 + k^2 m), in float64, one call of project and lift and one product, and the same again for
    each refinement. Numbers of the size of b / damping cancel: the residual is about
    eps ||A|| / damping, with the eps of the dtype of b. That is what rounding of x alone does if b
    has a part in the null space of R; refinement lowers it where x is small.

    Woodbury, "Inverting modified matrices" (1950).
    """
    system = _System(product, b, describe)
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be finite and > 0 for Woodbury's formula; got {damping!r}")
    k = len(weights)
    _check("weights", weights, (k,))
    _check("gram", gram, (k, k))
    if system.zero:
        return system.result("woodbury")
    K, C = gram.detach().to(b.device, torch.float64), weights.detach().to(b.device, torch.float64)
    inner = _woodbury_inner((K + K.T) / 2, C, damping, describe)

    def solve(r: Tensor) -> Tensor:
        m = r.shape[1]
        projected = _check("project", project(r), (k, m), b)
        lifted = _check("lift", lift(inner(projected.double()).to(b.dtype)), tuple(r.shape), b)
        return (r - lifted) / damping

    return _refine("woodbury", system, solve, system.apply, steps=2)


def _woodbury_inner(K: Tensor, C: Tensor, damping: float, describe: str) -> Product:
    """B to (damping I + C K)^-1 C B."""
    identity = torch.eye(len(C), dtype=K.dtype, device=K.device)
    if (C >= 0).all():
        root = C.sqrt()[:, None]
        factor, failed = torch.linalg.cholesky_ex(damping * identity + root * K * root.T)
        if not failed:
            return lambda B: root * torch.cholesky_solve(root * B, factor)
        # Rounding of K beyond the damping: its eigenvalues are not negative.
        values, vectors = torch.linalg.eigh(root * K * root.T)
        values = damping + values.clamp_min(0)[:, None]
        return lambda B: root * (vectors @ (vectors.T @ (root * B) / values))
    values, vectors = torch.linalg.eigh(K)
    half = vectors * values.clamp_min(0).sqrt()  # K = half half^T: C K and half^T C half agree
    smallest, largest = torch.linalg.eigvalsh(half.T @ (C[:, None] * half))[[0, -1]].tolist()
    smallest, largest = damping + smallest, damping + largest
    rounding = len(C) * _EPS * max(largest, -smallest)
    if smallest <= rounding:
        found = f"its smallest eigenvalue is {smallest:.4g}, the largest {largest:.4g}"
        raise _refusal(describe, found, smallest, smallest < -rounding, None)
    lu, pivots = torch.linalg.lu_factor(damping * identity + C[:, None] * K)
    return lambda B: torch.linalg.lu_solve(lu, pivots, C[:, None] * B)


# ---------------------------------------------------------------------------------------------
# What the solvers share


class _System:
    """A right-hand side as a block of columns, scaled by powers of 2, and checked products.

    Largest entries are from 1 to 2, so that no square of a residual underflows in float32.
    """

    def __init__(self, product: Product | None, b: Tensor, describe: str) -> None:
        if not isinstance(b, Tensor):
            raise TypeError(f"b must be a tensor; got an object of type {type(b).__name__}")
        if b.dtype not in (torch.float32, torch.float64) or b.ndim not in (1, 2):
            raise ValueError(
                "b must be a tensor of float32 or float64 of shape (p,) or (p, m); got "
                f"{b.dtype}, shape {tuple(b.shape)}"
            )
        _check("b", b, tuple(b.shape))
        self._product, self.describe, self.given = product, describe, b.detach()
        block = self.given[:, None] if b.ndim == 1 else self.given
        self.zero = not block.any()
        self.b = block
        if not self.zero:
            largest = block.abs().amax(0)
            exponents = (torch.frexp(largest).exponent - 1).where(largest > 0, 0)
            self._scale = torch.ldexp(torch.ones_like(largest), exponents)
            self.b = block / self._scale
            self.size = _norms(self.b)

    def apply(self, block: Tensor) -> Tensor:
        """A times a block."""
        assert self._product is not None
        argument = block[:, 0] if self.given.ndim == 1 else block
        result = self._product(argument)
        name = f"the product with {self.describe}"
        return _check(name, result, tuple(argument.shape), block).reshape(block.shape)

    def residuals(self, r: Tensor) -> Tensor:
        """Relative norms of residuals; 0 for columns of zeros."""
        return _norms(r) / self.size.where(self.size > 0, 1)

    def result(
        self, method: str, x: Tensor | None = None, residual: float = 0.0, iterations: int = 0
    ) -> SolveResult:
        x = torch.zeros_like(self.given) if x is None else x * self._scale
        return SolveResult(x.reshape(self.given.shape), residual, iterations, method)


def _iterate(
    method: str,
    system: _System,
    start: _Start,
    step: _Step,
    rtol: float,
    max_iterations: int,
    progress: bool,
) -> SolveResult:
    """Run a method, and again from where it ends as long as that halves the true residual.

    ``start`` makes the state of a method from x and its residual r; the last axis of every tensor
    in it goes over columns, and the first one is y, for A y = r. ``step`` gives the next state, the
    norms of its residuals by the recurrence, and which columns can go no further.
    """
    rtol = check_real(rtol, "rtol", 0.0)
    max_iterations = check_integer(max_iterations, "max_iterations", 1)
    if system.zero:
        return system.result(method)
    x, r = torch.zeros_like(system.b), system.b
    residual = torch.zeros_like(system.size).masked_fill(system.size > 0, math.inf)
    used = torch.zeros_like(residual, dtype=torch.int64)
    todo = residual.nonzero()[:, 0]
    with progress_bar(progress, total=max_iterations, desc=method, unit="iteration") as bar:
        for _ in range(1 + _RESTARTS):
            goals = rtol * system.size[todo], max_iterations - used[todo]
            y, count = _run(start, step, x[:, todo], r[:, todo], *goals, bar)
            new = x[:, todo] + y
            left = system.b[:, todo] - system.apply(new)
            reached = _norms(left) / system.size[todo]
            used[todo] += count
            better = reached < residual[todo]
            halved = 2 * reached < residual[todo]
            kept = todo[better]
            x[:, kept], residual[kept] = new[:, better], reached[better]
            r = r.index_copy(1, kept, left[:, better])
            todo = todo[halved & (reached > rtol) & (used[todo] < max_iterations)]
            if not len(todo):
                break
    if method == "minres":  # which lowers the residual at every step, but for rounding
        x, residual = x.masked_fill(residual > 1, 0), residual.clamp_max(1)
    largest, iterations = residual.max().item(), int(used.max())
    if largest > rtol:
        if used[residual > rtol].max() >= max_iterations:
            why, remedy = f"at max_iterations={max_iterations}", "more iterations or more damping"
        else:
            dtype = str(x.dtype).removeprefix("torch.")
            why = f"after {iterations} iterations, where rounding in {dtype} ends progress"
            remedy = "float64, or " * (dtype != "float64") + "more damping or a larger rtol"
        if largest >= 1:
            remedy += "; x = 0 would do as well, as where a singular matrix has no damping"
        warnings.warn(
            f"{system.describe}: {method} ended {why}, with a relative residual of {largest:.3g} "
            f"above rtol={rtol:.3g}. Use {remedy}",
            ConvergenceWarning,
            stacklevel=3,
        )
    return system.result(method, x, largest, iterations)


def _run(
    start: _Start,
    step: _Step,
    x: Tensor,
    r: Tensor,
    target: Tensor,
    limit: Tensor,
    bar: Any,
) -> tuple[Tensor, Tensor]:
    """Columns in lock-step, each until its target or limit: y for A y = r, and iterations."""
    y, state = torch.zeros_like(r), start(x, r)
    count = torch.zeros_like(limit)
    columns = torch.arange(len(limit), device=limit.device)
    while len(columns):
        state, norms, ended = step(state)
        bar.update()
        count[columns] += 1
        going = (norms > target[columns]) & ~ended & (count < limit)[columns]
        if not going.all():
            y[:, columns[~going]] = state[0][:, ~going]
            columns, state = columns[going], tuple(part[..., going] for part in state)
    return y, count


def _refine(
    method: str, system: _System, solve: Product, apply: Product, *, steps: int
) -> SolveResult:
    """Solve directly, then refine the columns in which that lowers the true residual."""
    x = solve(system.b).to(system.b.dtype)
    r = system.b - apply(x)
    residual = system.residuals(r)
    for _ in range(steps):
        refined = (x + solve(r)).to(x.dtype)
        left = system.b - apply(refined)
        reached = system.residuals(left)
        better = reached < residual
        if not better.any():
            break
        x, r = refined.where(better, x), left.where(better, r)
        residual = reached.where(better, residual)
    return system.result(method, x, residual.max().item())


def _refusal(
    describe: str, found: str, quotient: float, negative: bool, advice: str | None
) -> IndefiniteCurvatureError:
    least = -quotient if negative else None
    state, remedy = "singular within rounding", "more damping"
    if negative:  # 5% cover the rounding to two digits
        state, remedy = "indefinite", f"at least {-1.05 * quotient:.2g} more damping"
        if advice is not None:
            remedy = f"{advice}, or {remedy}"
    message = f"{describe}: the matrix is {state}, {found}. Use {remedy}"
    return IndefiniteCurvatureError(message, quotient, least)


def _check(name: str, value: object, shape: tuple[int, ...], like: Tensor | None = None) -> Tensor:
    """value without its gradient, if finite, of the shape, and of the dtype and device of like."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got an object of type {type(value).__name__}")
    wanted = (like.dtype, like.device) if like is not None else (value.dtype, value.device)
    if (value.shape, value.dtype, value.device) != (shape, *wanted):
        raise ValueError(
            f"{name} must have shape {shape}, {wanted[0]} on {wanted[1]}; got shape "
            f"{tuple(value.shape)}, {value.dtype} on {value.device}"
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return value.detach()


def _checked_diagonal(diagonal: Tensor, b: Tensor) -> Tensor:
    _check("diagonal", diagonal, (len(b),), b)
    if len(b) and not diagonal.min() > 0:
        i = int(diagonal.argmin())
        raise ValueError(f"diagonal must be positive; entry {i} is {diagonal[i].item():.4g}")
    return diagonal.detach()[:, None]


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of columns, added in float64."""
    return (a * b).sum(0, dtype=torch.float64)


def _norms(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a, dim=0, dtype=torch.float64)


def _add(x: Tensor, factors: Tensor, y: Tensor) -> Tensor:
    """x plus columns of y times factors."""
    return torch.addcmul(x, y, factors.to(x.dtype))
