"""The system that a solver is given: checked, scaled, and refused where it is not positive."""

from collections.abc import Callable

import torch
from torch import Tensor

from lcodec_ext.curvature.solvers.result import IndefiniteCurvatureError, SolveResult

Product = Callable[[Tensor], Tensor]

EPS = torch.finfo(torch.float64).eps
ROUNDING = 16.0  # curvature below this many eps ||A|| is no more than rounding
FLOOR = 4.0  # residuals below this many eps ||A|| ||x|| are rounding errors of A x


class System:
    """A right-hand side as a block of columns, scaled by powers of 2, and checked products.

    Largest entries are from 1 to 2, so that no square of a residual underflows in float32.
    """

    def __init__(
        self, product: Product | None, b: Tensor, describe: str, advice: str | None = None
    ) -> None:
        if not isinstance(b, Tensor):
            raise TypeError(f"b must be a tensor; got an object of type {type(b).__name__}")
        if b.dtype not in (torch.float32, torch.float64) or b.ndim not in (1, 2):
            raise ValueError(
                "b must be a tensor of float32 or float64 of shape (p,) or (p, m); got "
                f"{b.dtype}, shape {tuple(b.shape)}"
            )
        check_tensor("b", b, tuple(b.shape))
        self._product, self.describe, self._advice = product, describe, advice
        self.given = b.detach()
        block = self.given[:, None] if b.ndim == 1 else self.given
        self.zero = not block.any()
        self.b = block
        if not self.zero:
            largest = block.abs().amax(0)
            exponents = (torch.frexp(largest).exponent - 1).where(largest > 0, 0)
            self._scale = torch.ldexp(torch.ones_like(largest), exponents)
            self.b = block / self._scale
            self.size = norms(self.b)

    def apply(self, block: Tensor) -> Tensor:
        """A times a block."""
        assert self._product is not None
        argument = block[:, 0] if self.given.ndim == 1 else block
        result = self._product(argument)
        name = f"the product with {self.describe}"
        return check_tensor(name, result, tuple(argument.shape), block).reshape(block.shape)

    def residuals(self, r: Tensor) -> Tensor:
        """Relative norms of residuals; 0 for columns of zeros."""
        return norms(r) / self.size.where(self.size > 0, 1)

    def result(
        self, method: str, x: Tensor | None = None, residual: float = 0.0, iterations: int = 0
    ) -> SolveResult:
        """The result for an x of the scaled system; without one, for b = 0."""
        x = torch.zeros_like(self.given) if x is None else x * self._scale
        return SolveResult(x.reshape(self.given.shape), residual, iterations, method)

    def refusal(self, found: str, quotient: float, negative: bool) -> IndefiniteCurvatureError:
        """The error for a matrix that is not positive: what was found, and what to do."""
        least = -quotient if negative else None
        state, remedy = "singular within rounding", "more damping"
        if negative:  # 5% cover the rounding to two digits
            state, remedy = "indefinite", f"at least {-1.05 * quotient:.2g} more damping"
            if self._advice is not None:
                remedy = f"{self._advice}, or {remedy}"
        message = f"{self.describe}: the matrix is {state}, {found}. Use {remedy}"
        return IndefiniteCurvatureError(message, quotient, least)

    def check_spectrum(
        self, smallest: float, largest: float, unit: float, failed: bool = False
    ) -> None:
        """Refuse a smallest eigenvalue of at most unit times the largest, or what failed."""
        rounding = unit * max(largest, -smallest)
        if failed or smallest <= rounding:
            found = f"its smallest eigenvalue is {smallest:.4g}, the largest {largest:.4g}"
            raise self.refusal(found, smallest, smallest < -rounding)


def refine(
    method: str, system: System, solve: Product, apply: Product, *, steps: int
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


def check_tensor(
    name: str, value: object, shape: tuple[int, ...], like: Tensor | None = None
) -> Tensor:
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


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of columns, added in float64."""
    return (a * b).sum(0, dtype=torch.float64)


def norms(a: Tensor) -> Tensor:
    """Norms of columns, in float64."""
    return torch.linalg.vector_norm(a, dim=0, dtype=torch.float64)


def plus(x: Tensor, factors: Tensor, y: Tensor) -> Tensor:
    """x plus columns of y times factors."""
    return torch.addcmul(x, y, factors.to(x.dtype))
