"""Secant matrices."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_real
from lcodec_ext._torch.group import Ranks, ranks_of
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import plain_arithmetic
from lcodec_ext.curvature.operators.base import CurvatureOperator
from lcodec_ext.curvature.operators.on_model import agree, decayed, own_objective
from lcodec_ext.curvature.parameters import Selection
from lcodec_ext.curvature.routes.low_rank import LowRank, StoredRows
from lcodec_ext.curvature.routes.sharded import gradient as gradient_over
from lcodec_ext.curvature.solvers import IndefiniteCurvatureError


class _PairsOperator(CurvatureOperator):
    """The matrix of pairs that are there; see `SecantOperator`."""

    _kind = "secant matrix"

    @plain_arithmetic()
    def __init__(
        self,
        S: Tensor,
        Y: Tensor,
        tolerance: float,
        damping: float,
        weight_decay: float,
        inner: Tensor | None = None,
        decay: Tensor | None = None,
    ) -> None:
        self.shape, self.dtype, self.device = (len(S),) * 2, S.dtype, S.device
        self.damping = check_real(damping, "damping", 0)
        self.weight_decay = check_real(weight_decay, "weight_decay", 0)
        self.shift = self.damping + self.weight_decay
        self.decay = decay
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
                "is never indefinite for a loss that is convex in the outputs, or other steps",
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
        left_out = f"; {len(self.skipped)} without positive curvature left out" * bool(self.skipped)
        self.plan = f"low rank: {self.rank} of {S.shape[1]} pairs{left_out}"

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


class SecantOperator(_PairsOperator):
    """The matrix that pairs of steps and changes of the gradient determine.

    ::

        B = Y M^-1 Y^T + (weight_decay + damping) I,   M = (S^T Y + Y^T S) / 2

    where the columns of S are steps of the selected parameters and those of Y the changes of the
    gradient along them: ``B S = Y`` where S^T Y is symmetric, as it is for a quadratic loss.

    It is kept positive: pairs without positive curvature, ``s.y <= tolerance |s| |y|``, are left
    out, and so are combinations of the others in which M is not positive by as much.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress, group
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

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: Selection,
        *,
        steps: Tensor,
        tolerance: float = 1e-8,
        damping: float = 0.0,
        weight_decay: Any = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        progress: bool = False,
        group: Any = None,
    ) -> None:
        ranks = ranks_of(group, "SecantOperator")
        with ranks.alone("the arguments"):
            options: dict[str, Any] = {"dtype": dtype, "reduction": reduction, "progress": progress}
            model, weight_decay, objective = own_objective(
                ranks, model, loss_fn, data, selection, weight_decay, **options
            )
        masked = objective.masked
        self.shape, self.dtype, self.device = (masked.size,) * 2, masked.dtype, masked.device
        self.selection, self._ranks = selection, ranks
        with ranks.alone("the arguments"):
            S = self._vectors(steps, "steps")
            S = S if S.ndim == 2 else S[:, None]
            if not S.shape[1] or not torch.isfinite(S).all():
                raise ValueError("steps must be one or more vectors, without NaN and infinity")
        if isinstance(ranks, Ranks):
            options = {"steps": S, "tolerance": tolerance, "damping": damping}
            agree(ranks, model, objective, weight_decay, options | {"reduction": reduction})

        def gradient() -> Tensor:
            if isinstance(ranks, Ranks):
                return gradient_over(ranks, objective)
            return objective.gradient()

        start = gradient()
        changes = []
        for step in S.T:
            with masked.moved(step):
                changes.append(gradient() - start)
        _, decay = decayed(0.0, weight_decay, masked)
        uniform = weight_decay if decay is None else 0.0
        super().__init__(S, torch.stack(changes, 1), tolerance, damping, uniform, decay=decay)

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
        """Make the operator from given pairs, of training for instance.

        Parameters
        ----------
        S, Y : Tensor of float32 or float64, shape (p,) or (p, k)
            Steps, and changes of the gradient without weight decay.
        inner : Tensor, shape (k, k), optional
            S^T Y of whole pairs, where S and Y are their rows of some parameters only: the operator
            is then that block of the whole matrix. (These rows' own S^T Y is not a curvature where
            the steps moved other parameters, too.)
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
        S, Y = (t.detach().reshape(len(t), -1) for t in (S, Y))
        k = S.shape[1]
        if inner is not None and (not isinstance(inner, Tensor) or inner.numel() != k * k):
            given = tuple(inner.shape) if isinstance(inner, Tensor) else type(inner)
            raise ValueError(f"inner must be a tensor of shape ({k}, {k}); got {given}")
        inner = None if inner is None else inner.detach().reshape(k, k)
        operator = cls.__new__(cls)
        _PairsOperator.__init__(operator, S, Y, tolerance, damping, weight_decay, inner)
        return operator
