"""The EK-FAC matrix: products and solves in closed form."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real, counted
from lcodec_ext._torch.decay import decay_of, decay_text
from lcodec_ext._torch.group import Ranks, ranks_of
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import check_module, plain_arithmetic
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature.kronecker.factors import BlockFactors, KroneckerFactors
from lcodec_ext.curvature.kronecker.outputs import Seeds
from lcodec_ext.curvature.kronecker.passes import collect
from lcodec_ext.curvature.operators.base import CurvatureOperator
from lcodec_ext.curvature.operators.on_model import agree, decayed, own_objective
from lcodec_ext.curvature.parameters import Selection
from lcodec_ext.curvature.routes.low_rank import LowRank
from lcodec_ext.curvature.solvers import IndefiniteCurvatureError, SolveResult


class KroneckerOperator(CurvatureOperator):
    """An EK-FAC matrix of factors that were formed before, plus damping.

    Parameters
    ----------
    factors : KroneckerFactors
    share : float
        What a sample's part is multiplied with: 1 / n for a mean.
    shift : float, default 0.0
        Damping and weight decay.
    decay : Tensor, shape (p,), optional
        A weight decay that differs between parameters. Where it differs within a block, its
        diagonal in the basis of the block is added.
    origin : str
        Where the factors are from, for `plan`.
    """

    _kind = "EK-FAC matrix"

    def __init__(
        self,
        factors: KroneckerFactors,
        share: float,
        *,
        shift: float = 0.0,
        decay: Tensor | None = None,
        origin: str = "",
    ) -> None:
        self.factors, self.shift = factors, shift
        first = factors.blocks[0]
        bases = [t for b in factors.blocks for t in (b.rows, b.columns) if t is not None]
        self.dtype = bases[0].dtype if bases else first.values.dtype
        self.device = first.values.device
        self.shape = (factors.size, factors.size)
        self.formed_up_to = 0
        self._eigenvalues = [(b.values * share).to(self.dtype) for b in factors.blocks]
        self._decays: list[Tensor] | None = None
        if decay is not None:
            diagonal = decay.to(self.device, self.dtype)[:, None]
            self._decays = [b.projected(b.places.take(diagonal)[..., 0]) for b in factors.blocks]
        kinds = sum(b.rows is not None or b.columns is not None for b in factors.blocks)
        self.plan = (
            f"{counted(kinds, 'Kronecker block')} with corrected eigenvalues, "
            f"{len(factors.blocks) - kinds} diagonal{origin}"
        )

    @property
    def least(self) -> float:
        """The smallest eigenvalue, without damping and weight decay."""
        return min(float(values.min()) for values in self._eigenvalues)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, without damping and weight decay."""
        return max(float(values.max()) for values in self._eigenvalues)

    def _spectrum(self, number: int) -> Tensor:
        """Eigenvalues of a block without the shift."""
        values = self._eigenvalues[number]
        return values if self._decays is None else values + self._decays[number]

    def _product(self, V: Tensor) -> Tensor:
        def times(block: BlockFactors, number: int, part: Tensor) -> Tensor:
            return part * self._spectrum(number)[:, :, None]

        return self.factors.apply(V, times)

    @plain_arithmetic()
    def solve_shifted(self, b: Tensor, shift: float = 0.0) -> Tensor:
        """(A + shift I)^-1 b in closed form, with the operator's own damping in A.

        Parameters
        ----------
        b : Tensor, shape (p,) or (p, m)
        shift : float, default 0.0
            More damping.

        Raises
        ------
        IndefiniteCurvatureError
            If an eigenvalue of the shifted matrix is zero within rounding, or below.
        """
        V = self._vectors(b, "b")
        total = self.shift + check_real(shift, "shift", 0)
        spectra = [self._spectrum(number) + total for number in range(len(self.factors.blocks))]
        least = min(float(values.min()) for values in spectra)
        largest = max(float(values.max()) for values in spectra)
        rounding = torch.finfo(self.dtype).eps * max(largest, -least)
        if least <= rounding:
            remedy = "more damping" if least >= -rounding else f"at least {-1.05 * least:.2g} more"
            raise IndefiniteCurvatureError(
                f"{self._describe()}: the matrix is singular within rounding or indefinite, its "
                f"smallest eigenvalue is {least:.4g}, the largest {largest:.4g}. Use {remedy}"
                f"{'' if remedy == 'more damping' else ' damping'}",
                least,
                -least if least < -rounding else None,
            )

        def divided(block: BlockFactors, number: int, part: Tensor) -> Tensor:
            return part / spectra[number][:, :, None]

        return self.factors.apply(V if V.ndim == 2 else V[:, None], divided).reshape(V.shape)

    def solve(self, b: Tensor, **options: Any) -> SolveResult:
        """Solve A x = b in closed form.

        Parameters
        ----------
        b : Tensor, shape (p,) or (p, m)
        options
            method="auto" or "ekfac"; with another method as `CurvatureOperator.solve`.

        Returns
        -------
        SolveResult
            With the true residual, and method "ekfac".

        Raises
        ------
        IndefiniteCurvatureError
            Without damping, where the matrix is singular.
        """
        if options.get("method", "auto") not in ("auto", "ekfac"):
            return super().solve(b, **options)
        x = self.solve_shifted(b)
        given = self._vectors(b, "b")
        with plain_arithmetic():
            left = torch.linalg.vector_norm(given - self._apply(x), dim=0, dtype=torch.float64)
            size = torch.linalg.vector_norm(given, dim=0, dtype=torch.float64)
        return SolveResult(x, float((left / size.where(size > 0, 1)).max()), 0, "ekfac")

    def _diagonal(self) -> Tensor:
        out = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        for number, block in enumerate(self.factors.blocks):
            block.places.put(out, block.diagonal(self._spectrum(number))[..., None])
        return out[:, 0]

    def _low_rank(self, most: int) -> LowRank | None:
        return None


class EKFACOperator(KroneckerOperator):
    """Kronecker-factored Gauss-Newton or Fisher matrix with corrected eigenvalues.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress, group
        As for `HessianOperator`. loss_fn must be a plain mean or sum over samples, and a
        ParameterSelection must have whole rows of layers.
    kind : {"model", "empirical"}, default "model"
        "model" approximates the Gauss-Newton matrix, "empirical" the mean of g g^T over samples.
    seed : int, default 0
        Of random combinations of outputs, for kind="model".
    draws : int, optional
        How many combinations of each sample's outputs are sent back, for kind="model". By default
        all outputs of up to 16, which is exact, and else one combination.
    basis : KroneckerFactors, optional
        Of other samples, whose basis is taken; then one pass over the data makes the eigenvalues.
    """

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: Selection,
        *,
        kind: Literal["model", "empirical"] = "model",
        damping: float = 0.0,
        weight_decay: Any = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        dtype: torch.dtype | None = None,
        seed: int = 0,
        draws: int | None = None,
        basis: KroneckerFactors | None = None,
        progress: bool = False,
        group: Any = None,
    ) -> None:
        ranks = ranks_of(group, type(self).__name__)
        with ranks.alone("the arguments"):
            check_choice(kind, "kind", ("model", "empirical"))
            check_integer(seed, "seed", 0)
            if draws is not None:
                check_integer(draws, "draws", 1)
            if basis is not None:
                if not isinstance(basis, KroneckerFactors):
                    raise TypeError(f"basis must be KroneckerFactors; got {type(basis).__name__}")
                kind, seed, draws = basis.kind, basis.seed, basis.draws
            self.kind, self.damping = kind, check_real(damping, "damping", 0)
            model = unwrapped(model)
            check_module(model)
            self.weight_decay = decay_of(weight_decay, model)
            objective = own_objective(
                ranks,
                model,
                loss_fn,
                data,
                selection,
                dtype=dtype,
                reduction=reduction,
                progress=progress,
            )
        if isinstance(ranks, Ranks):
            options = {"kind": kind, "seed": seed, "draws": draws, "reduction": reduction}
            agree(ranks, model, objective, self.weight_decay, {"damping": damping, **options})
        factors, by_sample = collect(ranks, objective, Seeds(kind, seed, draws), basis)
        shift, decay = decayed(self.damping, self.weight_decay, objective.masked)
        super().__init__(
            factors,
            1 / factors.n if reduction == "mean" else 1.0,
            shift=shift,
            decay=decay,
            origin="; samples were passed one by one" if by_sample else "",
        )
        self._progress, self.selection = objective.progress, objective.selection

    def _describe(self) -> str:
        return (
            f"the {self._kind} on {self.shape[0]:,} selected parameters, with weight_decay="
            f"{decay_text(self.weight_decay)} and damping={self.damping:g} included"
        )
