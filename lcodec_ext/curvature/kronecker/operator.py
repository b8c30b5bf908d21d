"""The EK-FAC matrix: products and solves in closed form."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_choice, check_integer, check_real, counted
from lcodec_ext._torch.decay import decay_text
from lcodec_ext._torch.group import Ranks, ranks_of
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import plain_arithmetic
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
        self.factors, self.shift, self._share = factors, shift, share
        first = factors.blocks[0]
        bases = [t for b in factors.blocks for t in (b.rows, b.columns) if t is not None]
        self.dtype = bases[0].dtype if bases else first.values.dtype
        self.device = first.values.device
        self.shape = (factors.size, factors.size)
        self.formed_up_to = 0
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
        return self._rounded(min(float(block.values.min()) for block in self.factors.blocks))

    @property
    def largest(self) -> float:
        """The largest eigenvalue, without damping and weight decay."""
        return self._rounded(max(float(block.values.max()) for block in self.factors.blocks))

    def _rounded(self, value: float) -> float:
        """An eigenvalue of a sum over samples as `_spectrum` has it."""
        return float(torch.tensor(value * self._share, dtype=self.dtype))

    def _spectrum(self, number: int, shift: float = 0.0) -> Tensor:
        """Eigenvalues of a block, formed where they are needed: the factors have them already."""
        values = (self.factors.blocks[number].values * self._share).to(self.dtype)
        return (values if self._decays is None else values + self._decays[number]) + shift

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
        V, total = self._vectors(b, "b"), self._solvable(shift)

        def divided(block: BlockFactors, number: int, part: Tensor) -> Tensor:
            return part / self._spectrum(number, total)[:, :, None]

        return self.factors.apply(V if V.ndim == 2 else V[:, None], divided).reshape(V.shape)

    @plain_arithmetic()
    def coordinates(self, b: Tensor) -> list[Tensor]:
        """A vector, shape (p,), in the eigenvectors: of each block a tensor of shape (r, D)."""
        V = self._vectors(b, "b")[:, None]
        return [each.rotated(each.places.take(V))[..., 0] for each in self.factors.blocks]

    @plain_arithmetic()
    def solve_coordinates(self, b: Sequence[Tensor], shift: float = 0.0) -> Tensor:
        """`solve_shifted` of a vector by its `coordinates`, in half the time, shape (p,)."""
        out = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        total = self._solvable(shift)
        for number, (block, part) in enumerate(zip(self.factors.blocks, b, strict=True)):
            block.places.put(out, block.back((part / self._spectrum(number, total))[..., None]))
        return out[:, 0]

    def _solvable(self, shift: float) -> float:
        """What is added to all eigenvalues; refused if one of them is then zero or less."""
        total = self.shift + check_real(shift, "shift", 0)
        ends = [
            self._spectrum(number, total).aminmax() for number in range(len(self.factors.blocks))
        ]
        least = min(float(end.min) for end in ends)
        largest = max(float(end.max) for end in ends)
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
        return total

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
    """The Kronecker-factored Gauss-Newton or Fisher matrix with corrected eigenvalues (EK-FAC).

    The gradient of a sample by the rows P of a layer is a sum over positions of g x^T: x is the
    layer's input, with a one for the bias if it is selected with these rows, and g what reaches
    the outputs P. For each layer::

        (Q_G (x) Q_A) diag(lambda) (Q_G (x) Q_A)^T + (weight_decay + damping) I

    where Q_A has the eigenvectors of A, the mean of x x^T over samples and positions, Q_G those of
    G[P, P], the sum of g g^T over positions, and lambda the exact mean squares of the samples'
    gradients along these. Blocks of different layers are apart. The trace is that of the matrix
    which is approximated, and so is the diagonal in the basis.

    Parameters
    ----------
    model, loss_fn, data, selection, damping, weight_decay, reduction, dtype, progress, group
        As for `HessianOperator`. loss_fn must be a plain mean or sum over samples. A
        ParameterSelection must have whole rows of each layer, as units are. A weight decay that
        differs within a block adds its diagonal in the basis of the block; one that is constant in
        each block is exact.
    kind : {"model", "empirical"}, default "model"
        "model": of the Gauss-Newton matrix: g are columns of a square root of the second derivative
        of each sample's loss by its outputs, sent back. It is known for cross-entropy, BCE with
        logits and squared error, and formed for other losses of at most 64 outputs, which must be
        convex in these. "empirical": of the mean of g g^T over samples, for any loss.
    seed : int, default 0
        Of random combinations of outputs.
    draws : int, optional
        How many random combinations, with signs of +-1, of a sample's columns are sent back, for
        kind="model". By default all columns of up to 16 outputs, which is exact, and one
        combination of more. Signs are functions of the seed and of what the sample contains.
    basis : KroneckerFactors, optional
        Of other samples of the same model and selection: their basis, kind, seed and draws are
        taken, as `KroneckerFactors.minus` needs it. One pass then makes the eigenvalues.

    Attributes
    ----------
    factors : KroneckerFactors
        What can be saved, subtracted and restricted to fewer rows.
    least, largest : float
        Eigenvalues without damping and weight decay.

    Raises
    ------
    ValueError, TypeError
        As `HessianOperator`; for a loss whose second derivative is not known and that has more than
        64 outputs, or is not convex in them; for single entries of rows.

    Notes
    -----
    Two passes over the data, each of a forward pass for a batch and a backward pass for each column
    to the selected layers; then an eigendecomposition for each layer, D^3 for its D inputs and
    |P|^3, in float64. Products and solves take p (D + |P|) operations and no pass over the data.
    Memory: the matrix's p eigenvalues and, for each layer, D^2 + |P|^2 numbers.

    Linear layers, Conv1D of transformers, projections of attention and convolutions (patches are
    inputs) have this form. The rows of an embedding are apart, its columns have a basis. Norms,
    grouped and transposed convolutions and parameters of no layer have their exact diagonal; rows
    or columns beyond 8192 have no basis. A layer that is called several times has all calls as
    positions.

    Every position counts as a sample for A and G ("expand" of Eschenhagen et al.), without padding,
    which is told by the input that the forward pass calls ``attention_mask``, or a decoder's labels
    of -100. That is exact for linear networks with a loss at every position, as of language models.
    The eigenvalues are those of whole samples in either case.

    Where a layer's input has no axis of samples, or single parameters belong to no layer, samples
    are passed one by one, which is slow (`plan` says so); what a batch shares along a first axis of
    length one, as positions in transformers, is told apart without that.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis. NeurIPS. Eschenhagen, Immer, Turner, Schneider and
    Hennig (2023), Kronecker-factored approximate curvature for modern neural network
    architectures. NeurIPS.
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
            of = check_choice(kind, "kind", ("model", "empirical"))
            check_integer(seed, "seed", 0)
            if draws is not None:
                check_integer(draws, "draws", 1)
            if basis is not None:
                if not isinstance(basis, KroneckerFactors):
                    raise TypeError(f"basis must be KroneckerFactors; got {type(basis).__name__}")
                of, seed, draws = basis.kind, basis.seed, basis.draws
            self.kind, self.damping = of, check_real(damping, "damping", 0)
            options: dict[str, Any] = {"dtype": dtype, "reduction": reduction, "progress": progress}
            model, self.weight_decay, objective = own_objective(
                ranks, model, loss_fn, data, selection, weight_decay, **options
            )
        if isinstance(ranks, Ranks):
            options = {"kind": of, "seed": seed, "draws": draws, "reduction": reduction}
            agree(ranks, model, objective, self.weight_decay, {"damping": damping, **options})
        factors, by_sample = collect(ranks, objective, Seeds(of, seed, draws), basis)
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
