"""Curvature saved at training time: deletions then need no retained samples."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_integer,
    check_positive,
    check_real,
    counted,
    first_few,
)
from lcodec_ext._files import file_to_read, write_atomically
from lcodec_ext._torch.copies import work_copy
from lcodec_ext._torch.decay import decay_of, vector_of
from lcodec_ext._torch.loss import LossFunction, check_copy, mean_gradient, mean_loss
from lcodec_ext._torch.modes import twice_differentiable
from lcodec_ext._torch.names import own_name
from lcodec_ext._torch.samples import Samples, as_samples, working_dtype
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens, of_kind
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature import Selection, UnitSelection, all_trainable, selection_from_dict
from lcodec_ext.curvature.kronecker import EKFACOperator, KroneckerFactors, KroneckerOperator
from lcodec_ext.curvature.layout import Layout
from lcodec_ext.curvature.operators import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    MatrixOperator,
    SecantOperator,
)

Tensors = dict[str, Tensor]

_KINDS = {
    "gauss_newton": GaussNewtonOperator,
    "hessian": HessianOperator,
    "fisher": FisherOperator,
}
_MOST = 8192  # coordinates of a matrix that is formed: 0.5 GB in float64
_BATCH = 256
LARGE = 2_000_000  # numbers in a model, which is then called large
_FEW = 512  # samples up to which all of their outputs are sent back for Kronecker factors
_REACHED = 1e-12  # of the largest: less on a diagonal is rounding of the eigenvectors
_FORMAT, _WITH_FACTORS = 1, 2
_LATER = ("weight_decay", "damping", "output_damping")  # which are added to the curvature


@dataclass(frozen=True, eq=False, repr=False)
class TrainingStatistics:
    """What is kept of the training data for deletions: curvature, or pairs that determine it.

    `collect` keeps the matrix of a few thousand parameters: the step for the first request is then
    exactly that with all retained data. For models of any size it keeps the Kronecker factors of
    EK-FAC (curvature="ekfac"), and `from_epochs` steps of training and the changes of the gradient
    along them: a secant matrix, which is never exact.

    Of the factors, the removed samples are taken out of what is a sum over samples: the mean
    squares of gradients along the eigenvectors. That is exact, whatever the order of requests. The
    eigenvectors stay those of all training samples: a matrix formed from the retained samples alone
    has slightly other ones. docs/models.md says by how much that matters.

    Matrix and factors belong to the weights at which they were collected, and these are kept with
    them. The removed samples' part is computed at the same weights and taken out. After a request
    the model has moved and the matrix has not, so later steps are Newton steps with an older
    matrix; they stay exact only for losses whose curvature does not depend on the weights. Only
    Newton steps can be made, and the guard needs validation samples. docs/unlearning.md says more.

    Attributes
    ----------
    n : int
        Training samples.
    kind : {"gauss_newton", "hessian", "fisher", "secant", "ekfac"}
    selection : UnitSelection, ParameterSelection or None
        The parameters of a matrix or of factors; pairs are of all trainable parameters.
    matrix : Tensor, shape (p, p), or None
        Mean over the training samples, without weight decay.
    steps, changes : list of dict of str to Tensor
        The pairs, by parameter name.
    weights : dict of str to Tensor or None
        Parameters and buffers that the statistics are of, by name; of pairs, the parameters of the
        last snapshot. Those that are missing are taken from the given model, until `at` fills them.
    factors : KroneckerFactors or None
        Of "ekfac": the eigenvectors of each layer's factors, and sums over the training samples.
    mean_tokens : float or None
        Of a loss over tokens (`per_token_loss`): the counted ones of a training sample on average.
    causal : bool
        Whether labels are then shifted by one.
    """

    n: int
    kind: Literal["gauss_newton", "hessian", "fisher", "secant", "ekfac"]
    selection: Selection | None
    matrix: Tensor | None
    steps: list[Tensors]
    changes: list[Tensors]
    weights: Tensors | None = None
    factors: KroneckerFactors | None = None
    mean_tokens: float | None = None
    causal: bool = False

    def __repr__(self) -> str:
        if self.n_parameters is not None:
            return (
                f"TrainingStatistics({self.kind} of {counted(self.n, 'sample')}, "
                f"{counted(self.n_parameters, 'parameter')})"
            )
        return (
            f"TrainingStatistics({counted(self.n, 'sample')}, {counted(len(self.steps), 'pair')})"
        )

    @property
    def n_parameters(self) -> int | None:
        """Parameters of the matrix or of the factors; None of pairs."""
        if self.factors is not None:
            return self.factors.size
        return None if self.matrix is None else len(self.matrix)

    @classmethod
    @twice_differentiable()
    def collect(
        cls,
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        *,
        curvature: Literal["gauss_newton", "hessian", "fisher", "ekfac"] = "gauss_newton",
        selection: Selection | None = None,
        batch_size: int = _BATCH,
        dtype: torch.dtype | None = None,
        progress: bool = False,
        **others: Any,
    ) -> "TrainingStatistics":
        """Form the matrix of a trained model on its training samples, or its Kronecker factors.

        Both are of the loss alone: damping and weight decay are added when a deletion uses them.
        Time is p products with the matrix, memory p^2 numbers. With curvature="ekfac" time is two
        passes over the samples, and memory the eigenvectors of each layer, of (inputs + 1)^2 and
        outputs^2 numbers, and p eigenvalues; then any number of parameters will do.

        Parameters
        ----------
        model, train, loss_fn
            As `unlearn` takes model, retain and loss_fn.
        curvature : {"gauss_newton", "hessian", "fisher", "ekfac"}, default "gauss_newton"
        selection : UnitSelection or ParameterSelection, optional
            What may be asked for later; all trainable parameters by default.
        batch_size, dtype, progress
            As `unlearn` takes them.
        others
            Refused, with where they belong.

        Raises
        ------
        ValueError
            For more than 8192 parameters, except with "ekfac".
        TypeError
            For other options.
        """
        for name in others:
            raise TypeError(
                f"TrainingStatistics.collect takes no {name}"
                + (
                    f": the statistics are of the loss alone. Pass {name} where they are used, "
                    "unlearn(..., statistics=...) for instance"
                )
                * (name in _LATER)
            )
        check_choice(curvature, "curvature", (*_KINDS, "ekfac"))
        check_integer(batch_size, "batch_size", 1)
        model = unwrapped(model)
        chosen = all_trainable(model) if selection is None else selection
        p = chosen.size(model)
        if p > _MOST and curvature != "ekfac":
            raise ValueError(
                f"the selection has {p:,} parameters and at most {_MOST:,} can be kept as a "
                "matrix; keep Kronecker factors, curvature='ekfac', or select fewer units"
            )
        samples = _samples(model, train, "train", dtype)
        loss_fn = by_tokens(loss_fn, model, samples)
        given: tuple[Any, ...] = (model, loss_fn, samples.data(batch_size), chosen)
        options: dict[str, Any] = {"dtype": samples.dtype, "progress": progress}
        matrix, factors = None, None
        if curvature == "ekfac":
            size = sum(t.numel() for _, t in _named(model))
            draws = draws_of(len(samples), size)
            factors = EKFACOperator(*given, draws=draws, **options).factors
        else:
            matrix = _KINDS[curvature](*given, **options).to_dense()
        weights = {k: t.detach().clone() for k, t in _named(model)}
        made = cls(len(samples), curvature, chosen, matrix, [], [], weights, factors)
        if not isinstance(loss_fn, TokenLoss):
            return made
        return dataclasses.replace(made, mean_tokens=loss_fn.mean_tokens, causal=loss_fn.causal)

    @classmethod
    def from_epochs(
        cls,
        snapshots: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        n: int,
        *,
        mean_tokens: float | None = None,
        causal: bool = False,
    ) -> "TrainingStatistics":
        """Keep pairs from the ends of the last epochs, as the paper does.

        Parameters
        ----------
        snapshots : sequence of (weights, gradient)
            At least two, in the order of training: what `snapshot` returned. The last is of the
            trained model.
        n : int
            Training samples.
        mean_tokens : float, optional
            Of a loss over tokens: the counted ones of a training sample on average.
        causal : bool, default False
            Whether its labels are shifted by one.
        """
        check_integer(n, "n", 1)
        if mean_tokens is not None:
            check_positive(mean_tokens, "mean_tokens")
        check_bool(causal, "causal")
        if len(snapshots) < 2:
            raise ValueError(
                "pass at least two snapshots, because their differences are used; got "
                f"{len(snapshots)}"
            )

        def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensors:
            if a.keys() != b.keys():
                raise ValueError("snapshots must be of one model; their parameters differ")
            return {k: (b[k] - a[k]).detach().clone() for k in a}

        pairs = list(pairwise(snapshots))
        return cls(
            n,
            "secant",
            None,
            None,
            [difference(a[0], b[0]) for a, b in pairs],
            [difference(a[1], b[1]) for a, b in pairs],
            {k: t.detach().clone() for k, t in snapshots[-1][0].items()},
            mean_tokens=mean_tokens,
            causal=causal,
        )

    @staticmethod
    @twice_differentiable()
    def snapshot(
        model: nn.Module, train: Any, loss_fn: LossFunction, *, batch_size: int = _BATCH
    ) -> tuple[Tensors, Tensors]:
        """Weights, and the mean gradient of the loss there over all training samples.

        For `from_epochs`, at the end of an epoch. In evaluation mode, as deletions are.
        """
        model = unwrapped(model)
        work = work_copy(model, working_dtype(model))
        parameters = {k: p for k, p in work.named_parameters() if p.requires_grad}
        samples = _samples(work, train, "train", None)
        loss_fn = by_tokens(loss_fn, work, samples)
        return (
            {k: p.detach().clone() for k, p in parameters.items()},
            mean_gradient(work, samples, loss_fn, parameters, batch_size)[1],
        )

    def at(self, model: nn.Module) -> "TrainingStatistics":
        """The same statistics, with the weights of a model where they have none of their own."""
        model = unwrapped(model)
        named = self._named_as(model)
        own = named.weights or {}
        missing = {k: t for k, t in _named(model) if k not in own}
        if not missing:
            return named
        copies = {k: t.detach().clone() for k, t in missing.items()}
        return dataclasses.replace(named, weights={**own, **copies})

    def _named_as(self, model: nn.Module) -> "TrainingStatistics":
        """The same, where names are those of a wrapped model, under those of the model itself."""
        own = dict(_named(model)).keys()

        def named(tensors: Tensors) -> Tensors:
            return {own_name(key, own): tensor for key, tensor in tensors.items()}

        if all(key in own for key in (self.weights or {})):
            return self
        return dataclasses.replace(
            self,
            weights=named(self.weights or {}),
            steps=[named(each) for each in self.steps],
            changes=[named(each) for each in self.changes],
        )

    def _placed(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """A copy of a model with the weights that the statistics are of."""
        placed = work_copy(model, dtype)
        weights = self.weights or {}
        with torch.no_grad():
            for name, tensor in _named(placed):
                if name not in weights:
                    continue
                if weights[name].shape != tensor.shape:
                    raise ValueError(
                        f"the statistics are of another model: their {name!r} has shape "
                        f"{tuple(weights[name].shape)}; in this model it is {tuple(tensor.shape)}"
                    )
                tensor.copy_(weights[name])
        return placed

    def mean_loss(
        self, model: nn.Module, samples: Samples, loss_fn: LossFunction, batch_size: int = _BATCH
    ) -> float:
        """Mean loss of samples at the weights of the statistics."""
        return mean_loss(self._placed(model, samples.dtype), samples, loss_fn, batch_size)

    @twice_differentiable()
    def operator(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        forget: Any,
        selection: Selection,
        *,
        damping: float = 0.0,
        weight_decay: Any = 0.0,
        batch_size: int = _BATCH,
        dtype: torch.dtype | None = None,
    ) -> CurvatureOperator:
        """The retained objective's curvature: (n H - sum of the removed samples' H) / (n - m).

        All of it is taken at the weights of the statistics.

        Parameters
        ----------
        model, loss_fn, forget, damping, weight_decay, batch_size, dtype
            As `unlearn` takes them; forget may be None, for the curvature of all samples. The
            model's weights count only where `weights` lack them.
        selection : UnitSelection or ParameterSelection
            Part of the statistics' own.
        """
        check_real(damping, "damping", 0)
        model = unwrapped(model)
        weight_decay = decay_of(weight_decay, model)
        loss_fn = self.by_tokens(loss_fn)
        samples = None if forget is None else _samples(model, forget, "forget", dtype)
        if samples is not None:
            self.n_left(len(samples))
            check_copy(model, samples, loss_fn)
        dtype = working_dtype(model) if dtype is None else dtype
        device = next(model.parameters()).device
        layout = selection.layout(model)
        decay = vector_of(weight_decay, layout, layout.parameters)
        uniform = weight_decay if decay is None else 0.0
        decay = decay if decay is None else decay.to(dtype)
        if self.factors is not None:
            factors = self.factors.to(device, dtype)
            if samples is not None:
                factors = self._retained_factors(model, loss_fn, samples, batch_size)
            share = 1 / factors.n
            factors = factors.restrict(self._coordinates(model, layout, selection))
            shift, origin = damping + uniform, "; saved at training time"
            return KroneckerOperator(factors, share, shift=shift, decay=decay, origin=origin)
        if self.matrix is not None:
            index = self._coordinates(model, layout, selection).to(self.matrix.device)
            matrix = self.matrix.to(device, dtype)[index][:, index]
            if samples is not None:
                n, m = self.n, len(samples)
                removed = _KINDS[self.kind](
                    self._placed(model, dtype),
                    loss_fn,
                    samples.data(batch_size),
                    selection,
                    dtype=dtype,
                ).to_dense()
                matrix = (n * matrix - m * removed) / (n - m)
            made = MatrixOperator(matrix, damping + uniform, "saved at training time")
            made.decay = decay
            return made
        if samples is None:
            steps, changes = (_moved(each, device, dtype) for each in (self.steps, self.changes))
        else:
            steps, changes = self._retained_pairs(model, loss_fn, samples, batch_size)
        S, Y = (torch.stack([layout.gather(one) for one in pairs], 1) for pairs in (steps, changes))
        whole_S, whole_Y = (
            torch.stack([torch.cat([t.flatten() for t in one.values()]) for one in pairs], 1)
            for pairs in (steps, changes)
        )
        pairs = SecantOperator.from_pairs(
            S, Y, inner=whole_S.T @ whole_Y, damping=damping, weight_decay=uniform
        )
        pairs.decay = decay
        return pairs

    def by_tokens(self, loss_fn: LossFunction) -> LossFunction:
        """A mean over tokens with the mean number of those of the training samples."""
        if self.mean_tokens is None:
            return loss_fn
        found = loss_fn if isinstance(loss_fn, TokenLoss) else of_kind(loss_fn, self.causal)
        return found.of_mean(self.mean_tokens)

    def n_left(self, m: int) -> int:
        """The number of samples without m of them, at least one."""
        if m >= self.n:
            raise ValueError(f"statistics are of {self.n} training samples, and forget has {m}")
        return self.n - m

    def _retained_pairs(
        self, model: nn.Module, loss_fn: LossFunction, samples: Samples, batch_size: int
    ) -> tuple[list[Tensors], list[Tensors]]:
        """The steps, and the changes of the retained gradient along them.

        From the changes of all, without those of the removed samples.
        """
        n, m = self.n, len(samples)
        steps = _moved(self.steps, samples.device, samples.dtype)
        work = self._placed(model, samples.dtype)
        parameters = {k: p for k, p in work.named_parameters() if p.requires_grad}
        if parameters.keys() != steps[0].keys():
            raise ValueError(
                "the statistics are of another model: only one of the two has the parameters "
                f"{sorted(steps[0].keys() ^ parameters.keys())[:4]}"
            )
        end = mean_gradient(work, samples, loss_fn, parameters, batch_size)[1]
        made: list[Tensors] = []
        # Back from where training ended: a pair ends where the one after it begins.
        for step, change in zip(reversed(steps), reversed(self.changes), strict=True):
            with torch.no_grad():
                for k, p in parameters.items():
                    p.sub_(step[k])
            begin = mean_gradient(work, samples, loss_fn, parameters, batch_size)[1]
            made.append(
                {
                    k: (n * change[k].to(end[k]) - m * (end[k] - begin[k])) / (n - m)
                    for k in parameters
                }
            )
            end = begin
        return steps, made[::-1]

    def _retained_factors(
        self, model: nn.Module, loss_fn: LossFunction, samples: Samples, batch_size: int
    ) -> KroneckerFactors:
        """The factors without some samples, whose part is formed in the same basis."""
        assert self.factors is not None
        assert self.selection is not None
        whole = self.factors.to(samples.device, samples.dtype)
        removed = EKFACOperator(
            self._placed(model, samples.dtype),
            loss_fn,
            samples.data(batch_size),
            self.selection,
            kind=whole.kind,  # type: ignore[arg-type]
            seed=whole.seed,
            draws=whole.draws,
            basis=whole,
            dtype=samples.dtype,
        )
        return whole.minus(removed.factors)

    def _coordinates(self, model: nn.Module, layout: Layout, selection: Selection) -> Tensor:
        """Where the coordinates of a selection are among those of the matrix or the factors."""
        assert self.selection is not None
        if isinstance(selection, UnitSelection) and isinstance(self.selection, UnitSelection):
            others = selection - self.selection
        else:
            others = UnitSelection({})
        if others:
            layers = first_few([*map(repr, others.units)], 3)
            raise ValueError(
                "the statistics are of another model or of another selection: they have no "
                f"curvature of {len(others):,} of the {len(selection):,} units that are asked for, "
                f"in {layers}; collect them with these units"
            )
        own = self.selection.layout(model)
        if own.size != self.n_parameters:
            raise ValueError(
                f"the statistics are of another model: their units have {self.n_parameters:,} "
                f"parameters; this model has {own.size:,}"
            )
        numbers = layout.numbers_in(own)
        if (numbers < 0).any():
            raise ValueError(
                f"the statistics have no curvature of {int((numbers < 0).sum()):,} of the "
                f"{len(numbers):,} parameters that are asked for; collect them with these"
            )
        return numbers

    @twice_differentiable()
    def without(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        forget: Any,
        *,
        batch_size: int = _BATCH,
        dtype: torch.dtype | None = None,
    ) -> "TrainingStatistics":
        """The statistics of the samples that stay, for the next request.

        Parameters
        ----------
        model : Module
            Of the same architecture. Its weights count as for `operator`.
        loss_fn, forget, batch_size, dtype
            As for `operator`.
        """
        model = unwrapped(model)
        samples = _samples(model, forget, "forget", dtype)
        loss_fn = self.by_tokens(loss_fn)
        left = self.n_left(len(samples))
        if self.factors is not None:
            factors = self._retained_factors(model, loss_fn, samples, batch_size)
            return dataclasses.replace(self, n=left, factors=factors)
        if self.matrix is not None:
            assert self.selection is not None
            operator = self.operator(
                model, loss_fn, samples, self.selection, batch_size=batch_size, dtype=dtype
            )
            assert isinstance(operator, MatrixOperator)
            matrix = operator.matrix.to(self.matrix)
            return dataclasses.replace(self, n=left, matrix=matrix)
        _, changes = self._retained_pairs(model, loss_fn, samples, batch_size)
        return dataclasses.replace(self, n=left, changes=changes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to a file that `load` reads, with `torch.load(weights_only=True)`."""
        state = {
            "format": _FORMAT if self.factors is None else _WITH_FACTORS,
            "n": self.n,
            "kind": self.kind,
            "selection": None if self.selection is None else self.selection.to_dict(),
            "matrix": self.matrix,
            "steps": self.steps,
            "changes": self.changes,
            "weights": self.weights,
            "mean_tokens": self.mean_tokens,
            "causal": self.causal,
        }
        if self.factors is not None:
            state["factors"] = self.factors.to_dict()
        write_atomically(path, lambda file: torch.save(state, file))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "TrainingStatistics":
        """Read what `save` wrote; ValueError if it is something else."""
        file_to_read(path)
        try:
            with open(path, "rb") as file:  # a path is read by its ending, whatever it holds
                state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # of many kinds, on files that are not torch's
            raise ValueError(
                f"{path!s} holds no training statistics, which TrainingStatistics.save writes"
            ) from error
        known = (_FORMAT, _WITH_FACTORS)
        if not isinstance(state, dict) or state.get("format") not in known:
            raise ValueError(
                f"{path!s} holds no training statistics of formats up to {_WITH_FACTORS}"
            )
        selection, factors = state["selection"], state.get("factors")
        return cls(
            state["n"],
            state["kind"],
            None if selection is None else selection_from_dict(selection),
            state["matrix"],
            state["steps"],
            state["changes"],
            state.get("weights"),
            None if factors is None else KroneckerFactors.from_dict(factors),
            state.get("mean_tokens"),
            state.get("causal", False),
        )

    def tensors(self) -> Tensors:
        """Curvature or pairs, by names that ledgers know them by."""
        found = {} if self.matrix is None else {"matrix": self.matrix}
        for part, pairs in (("step", self.steps), ("change", self.changes)):
            found |= {
                f"{part} {k} {name}": t for k, one in enumerate(pairs) for name, t in one.items()
            }
        for k, block in enumerate(self.factors.blocks if self.factors is not None else ()):
            for name in ("rows", "columns", "values"):
                if (t := getattr(block, name)) is not None:
                    found[f"factors {k} {name}"] = t
        return found

    def diagonal(self) -> Tensor | None:
        """That of the curvature, with zeros where no sample reaches a parameter; None of pairs."""
        if self.matrix is not None:
            return self.matrix.diagonal()
        if self.factors is None:
            return None
        found = KroneckerOperator(self.factors, 1.0).diagonal()
        return torch.where(found > _REACHED * found.max(), found, 0.0)


def _moved(pairs: list[Tensors], device: torch.device, dtype: torch.dtype) -> list[Tensors]:
    return [{k: t.to(device, dtype) for k, t in each.items()} for each in pairs]


def draws_of(n: int, n_parameters: int) -> int | None:
    """Random combinations of outputs in the Kronecker factors of n samples; None for each output.

    Where there are many samples one combination of each does: of 2048 it gave what all ten outputs
    did on the networks that this was tried on, in two fifths of the time. Of a large model one is
    taken in any case: a pass back costs as much as one of training, and more samples tell more than
    more outputs of the same.
    """
    return None if n <= _FEW and n_parameters <= LARGE else 1


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each tensor once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _samples(model: nn.Module, data: Any, name: str, dtype: torch.dtype | None) -> Samples:
    device = next(model.parameters()).device
    return as_samples(data, name, device, working_dtype(model) if dtype is None else dtype)
