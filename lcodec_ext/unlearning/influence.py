"""Influence: what the removal of each training sample would do to the loss of others, or its own.

The sign, size and unit are those of leaving one out: the predicted change of a loss, when a model
is trained again without a sample.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_integer,
    check_positive,
    check_real,
    counted,
)
from lcodec_ext._torch.decay import Decay, decay_of, least_decay, vector_of, with_decay
from lcodec_ext._torch.loss import LossFunction, check_copy, check_loss_fn
from lcodec_ext._torch.modes import check_module, plain_arithmetic, twice_differentiable
from lcodec_ext._torch.samples import Samples, as_samples, working_dtype
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens, check_counted, of_sets
from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature import (
    CurvatureOperator,
    SampleGradients,
    SecantOperator,
    Selection,
    all_trainable,
    per_sample_gradients,
)
from lcodec_ext.curvature.kronecker import KroneckerOperator
from lcodec_ext.curvature.operators import MatrixOperator
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.step import OPERATORS

Curvature = Literal["ekfac", "gauss_newton", "hessian", "fisher"]

DENSE_BYTES = 2**27  # of gradients of single samples that are formed at a time
QUERY_BYTES = 2**28  # of gradients of queries that are solved at a time
VALUES_BYTES = 2**28  # of all pairs of a query and a training sample, up to which they are kept
_LABELS = 1024  # samples whose tokens are counted at a time
FORMED_UP_TO = 8192  # parameters whose matrix is formed for self-influence


class Ranked(NamedTuple):
    """Training samples in order, for each query.

    Attributes
    ----------
    indices : Tensor of int64, shape (n_queries, k)
        Their numbers in the training samples.
    values : Tensor of float64, shape (n_queries, k)
        Their influence.
    """

    indices: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """What `influence` found. All tensors are on the CPU, in float64 or int64.

    An influence is the predicted change of a query's loss when a training sample is removed:
    positive for samples that help the query, negative for those that harm it.

    Attributes
    ----------
    mean : Tensor, shape (n_train,)
        Influence of each training sample on the mean loss of all queries.
    helpful, harmful : Ranked
        For each query the `top_k` samples of largest influence, and those of the most negative one.
        Samples of equal influence are in their own order.
    values : Tensor, shape (n_queries, n_train)
        All of them; a ValueError where they would have taken more than 256 MiB.
    n_parameters : int
    curvature, plan : str
        Which matrix, and how products with it were computed.
    damping : float
    residual : float
        ||A x - g|| / ||g|| of the solves, the largest over the queries.
    """

    mean: Tensor
    helpful: Ranked
    harmful: Ranked
    n_parameters: int
    curvature: str
    plan: str
    damping: float
    residual: float
    _values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The influence of every training sample on each query, shape (n_queries, n_train)."""
        if self._values is None:
            raise ValueError(
                f"the influence of {len(self.mean):,} training samples on "
                f"{len(self.helpful.indices):,} queries takes more than {VALUES_BYTES >> 20} MiB "
                "and was not kept: use mean, helpful and harmful (with a larger top_k), or pass "
                "fewer queries at a time"
            )
        return self._values

    def samples(self, k: int, query: int | None = None) -> list[int]:
        """Numbers of the samples to look at first: whose removal lowers the loss most.

        Parameters
        ----------
        k : int
            At most so many. Only samples of negative influence are among them.
        query : int, optional
            Of which query; by default of the mean loss of all. k is then at most `top_k`.

        Returns
        -------
        list of int
            The most harmful first: what `Unlearner.remove` takes.
        """
        check_integer(k, "k", 1)
        if query is None:
            order = torch.sort(self.mean, stable=True).indices[:k]
            return order[self.mean[order] < 0].tolist()
        indices, values = self.harmful
        check_integer(query, "query", 0, len(indices) - 1)
        if k > indices.shape[1] and indices.shape[1] < len(self.mean):
            raise ValueError(
                f"k must be at most {indices.shape[1]}, the top_k of `influence`, for a single "
                f"query; got {k}: pass a larger top_k to `influence`"
            )
        return indices[query, :k][values[query, :k] < 0].tolist()

    def to_frame(self) -> Any:
        """Make a `pandas.DataFrame` with a row for each of `helpful` and `harmful` of each query.

        Columns: "query" and "sample", numbers, and "influence". Rows of a query go from the most
        negative to the largest. ImportError without pandas.
        """
        rows = []
        for query in range(len(self.helpful.indices)):
            pairs: dict[int, float] = {}
            for indices, values in (self.harmful, self.helpful):
                pairs |= zip(indices[query].tolist(), values[query].tolist(), strict=True)
            ordered = sorted(pairs.items(), key=lambda pair: pair[1])
            rows += [(query, sample, value) for sample, value in ordered]
        return _frame(rows, ["query", "sample", "influence"], "Influence")

    def __repr__(self) -> str:
        queries = counted(len(self.helpful.indices), "query", "queries")
        lines = [
            f"Influence of {len(self.mean):,} training samples on {queries}: {self.curvature} of "
            f"{counted(self.n_parameters, 'parameter')}, damping {self.damping:.3g}"
        ]
        order = torch.sort(self.mean, stable=True).indices
        for name, some in (("harmful", order[:5]), ("helpful", order.flip(0)[:5])):
            shown = ", ".join(f"{i} ({self.mean[i]:+.2g})" for i in some.tolist())
            lines.append(f"  most {name}, on the mean loss: {shown}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence:
    """What `self_influence` found.

    Attributes
    ----------
    values : Tensor of float64, shape (n_train,), on the CPU
        Predicted change of each training sample's own loss when it is removed.
    n_parameters, curvature, plan, damping
        As of `Influence`.
    """

    values: Tensor
    n_parameters: int
    curvature: str
    plan: str
    damping: float

    def samples(self, k: int) -> list[int]:
        """Numbers of the k samples to look at first: of the largest self-influence."""
        check_integer(k, "k", 1)
        return torch.sort(self.values, descending=True, stable=True).indices[:k].tolist()

    def to_frame(self) -> Any:
        """Make a `pandas.DataFrame` with columns "sample" and "influence", the largest first.

        ImportError without pandas.
        """
        order = self.samples(len(self.values))
        rows = zip(order, self.values[order].tolist(), strict=True)
        return _frame(list(rows), ["sample", "influence"], "SelfInfluence")

    def __repr__(self) -> str:
        shown = ", ".join(f"{i} ({self.values[i]:+.2g})" for i in self.samples(5))
        return (
            f"SelfInfluence of {len(self.values):,} training samples: {self.curvature} of "
            f"{counted(self.n_parameters, 'parameter')}, damping {self.damping:.3g}\n"
            f"  largest: {shown}"
        )


def _frame(rows: list[Any], columns: list[str], name: str) -> Any:
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"{name}.to_frame needs pandas: pip install pandas") from error
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------------------------------------


@twice_differentiable()
@plain_arithmetic()
def influence(
    model: nn.Module,
    train: Any,
    queries: Any,
    loss_fn: LossFunction,
    *,
    curvature: Curvature = "ekfac",
    damping: float = 1e-3,
    weight_decay: Any = 0.0,
    selection: Selection | None = None,
    statistics: TrainingStatistics | None = None,
    aggregate: bool = False,
    top_k: int = 10,
    rtol: float = 1e-3,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Influence:
    """Which training samples help or harm predictions.

    The model is taken to minimise the mean loss of n training samples plus
    (weight_decay / 2) |w|^2. Training without sample i then changes the loss of query q by

    ::

        g_q^T (H + damping I)^-1 (g_i + weight_decay w) / (n - 1)

    in first order, where g are gradients of single losses and H is the curvature of the objective,
    weight decay included. That is the influence of i on q: positive if the removal of i raises
    the loss of q. The term with w stands for the other samples, which count for more when i is
    gone; it is the same for all i.

    Parameters
    ----------
    model : Module
        The trained model; left as it is. It is evaluated in evaluation mode.
    train, queries : tensors, Dataset or DataLoader
        Training samples, all of them unless there are `statistics`, and the samples whose loss is
        asked about, with their targets. As `unlearn` takes retain and validation.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the plain mean loss of a batch, or a mean over tokens
        (`per_token_loss`). The loss of a query is then the mean over its own tokens, and the
        mean of all queries that over all their tokens.
    curvature : {"ekfac", "gauss_newton", "hessian", "fisher"}, default "ekfac"
        "ekfac" is made in two passes over the training samples and solved in closed form, at any
        size; it approximates "gauss_newton", which is solved by iterations and is exact for convex
        models of moderate size: with it and damping=0 influences have the size of leaving one out.
        "hessian" is refused where it is indefinite, as for nearly all networks.
    damping : float, default 1e-3
        Added to the diagonal. On a convex model 0 is right, with the weight decay of training. A
        network's curvature is all but singular: without damping its flat directions would decide.
    weight_decay : float, optimizer, or mapping of str to float, default 0.0
        That of training, as `unlearn` takes it.
    selection : UnitSelection or ParameterSelection, optional
        The parameters that a training without the sample could change; all trainable by default.
    statistics : TrainingStatistics, optional
        Curvature saved when the model was trained: no pass over the training samples is made for
        it, and `curvature` is that of the statistics. train may then be some of the training
        samples only.
    aggregate : bool, default False
        Whether the mean loss of the queries is the one query that is asked about: one solve and one
        inner product with each training sample, whatever the number of queries.
    top_k : int, default 10
        Samples that are kept for each query, on either side.
    rtol : float, default 1e-3
        |A x - g| / |g| at which conjugate gradients end; small matrices are solved directly.
    batch_size : int, default 256
        Samples in a pass of the model.
    dtype : torch.dtype, optional
        float64 for more digits; by default that of the trainable parameters.
    progress : bool, default False
        Show a bar for each phase; needs tqdm.

    Returns
    -------
    Influence
        Of all pairs up to 256 MiB of them; `top_k` for each query, and the mean over the queries.

    Raises
    ------
    IndefiniteCurvatureError
        If the damped curvature is not positive definite.
    ValueError, TypeError
        For samples, a model or options that cannot be used; the message names them.

    Notes
    -----
    One solve for each query, then one pass over the training samples for as many queries as have
    gradients of 256 MiB together: the inner products are taken batch by batch, and the gradients
    of all training samples are never in memory together. Predictions are of first order: for a
    sample that carries much of its own fit the true change is larger.

    References
    ----------
    P. W. Koh and P. Liang, "Understanding black-box predictions via influence functions", ICML
    2017. R. Grosse et al., "Studying large language model generalization with influence functions",
    2023.

    Examples
    --------
    >>> import torch
    >>> from lcodec_ext.unlearning import influence
    >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0], [1.5]])
    >>> y = torch.tensor([0, 0, 1, 1, 0])  # the last one is wrong
    >>> model = torch.nn.Linear(1, 2)
    >>> loss_fn = torch.nn.functional.cross_entropy
    >>> found = influence(model, (x, y), (x[:4], y[:4]), loss_fn)
    >>> found.values.shape, found.samples(1)
    (torch.Size([4, 5]), [4])
    """
    check_bool(aggregate, "aggregate")
    check_integer(top_k, "top_k", 1)
    check_positive(rtol, "rtol")
    trained = _Trained.of(
        model,
        train,
        loss_fn,
        curvature=curvature,
        damping=damping,
        weight_decay=weight_decay,
        selection=selection,
        statistics=statistics,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
    )
    asked = as_samples(queries, "queries", trained.samples.device, trained.samples.dtype)
    trained.check_alike(asked)
    trained = trained.told_by(asked)
    operator = trained.operator()
    shares = _shares(trained.loss_fn, asked)
    n, q = len(trained.samples), 1 if aggregate else len(asked)
    weights = torch.ones(1, dtype=torch.float64) if aggregate else shares / shares.sum()
    values = torch.empty(q, n, dtype=torch.float64) if 8 * n * q <= VALUES_BYTES else None
    mean, residual, done = torch.zeros(n, dtype=torch.float64), 0.0, 0
    best: list[tuple[Ranked, Ranked]] = []
    for block in trained.columns(asked, shares, aggregate):
        solution = operator.solve(block, rtol=rtol)
        residual = max(residual, solution.residual)
        helpful, harmful = _Best(min(top_k, n), 1), _Best(min(top_k, n), -1)
        rows, start = slice(done, done + block.shape[1]), 0
        for scores in trained.scores(solution.x):
            some = slice(start, start + scores.shape[1])
            helpful.add(scores, start)
            harmful.add(scores, start)
            mean[some] += weights[rows] @ scores
            if values is not None:
                values[rows, some] = scores
            start = some.stop
        best.append((helpful.ranked, harmful.ranked))
        done = rows.stop
    return Influence(
        mean,
        _joined([each for each, _ in best]),
        _joined([each for _, each in best]),
        *trained.told(operator),
        residual,
        values,
    )


@twice_differentiable()
@plain_arithmetic()
def self_influence(
    model: nn.Module,
    train: Any,
    loss_fn: LossFunction,
    *,
    curvature: Curvature = "ekfac",
    damping: float = 1e-3,
    weight_decay: Any = 0.0,
    selection: Selection | None = None,
    statistics: TrainingStatistics | None = None,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> SelfInfluence:
    """How much each training sample is needed for its own fit.

    The influence of a sample on its own loss, as `influence` defines it: the predicted rise of the
    loss when the sample is removed. It is large for samples that the others contradict, wrong
    labels among them.

    Parameters
    ----------
    model, train, loss_fn, curvature, damping, weight_decay, selection, statistics, batch_size, \
dtype, progress
        As for `influence`.

    Returns
    -------
    SelfInfluence

    Raises
    ------
    IndefiniteCurvatureError
        If the damped curvature is not positive definite.
    ValueError, TypeError
        As `influence`, and for more than 8192 parameters with another curvature than "ekfac": a
        solve by iterations for each training sample would take too long.

    Notes
    -----
    By "ekfac" each sample's gradient is turned into the eigenvectors of every layer and back: as
    many operations as four products of the gradient with these. Other matrices of p parameters are
    formed once, and each sample then takes 2 p^2 operations.
    """
    trained = _Trained.of(
        model,
        train,
        loss_fn,
        curvature=curvature,
        damping=damping,
        weight_decay=weight_decay,
        selection=selection,
        statistics=statistics,
        batch_size=batch_size,
        dtype=dtype,
        progress=progress,
    )
    operator = _direct(trained.operator(), len(trained.samples))
    found, start = [], 0
    for gradients in trained.gradients(trained.samples, DENSE_BYTES):
        G, share = gradients.dense(), trained.shares[start : start + gradients.n]
        start += gradients.n
        if isinstance(operator, KroneckerOperator):  # without its residuals
            solved = operator.solve_shifted(G.T)
        else:
            solved = operator.solve(G.T.contiguous()).x
        removed = G + share.to(G)[:, None] * trained.pull
        scores = (removed * solved.T).sum(1, dtype=torch.float64).cpu()
        found.append(scores * _inverse(share) / (trained.n - share))
    return SelfInfluence(torch.cat(found), *trained.told(operator))


def _direct(operator: CurvatureOperator, n: int) -> CurvatureOperator:
    """The operator, or its matrix, with which n systems are solved without iterations."""
    if isinstance(operator, KroneckerOperator | MatrixOperator | SecantOperator):
        return operator
    p = operator.shape[0]
    if p > FORMED_UP_TO:
        raise ValueError(
            f"self-influence by this curvature needs the matrix of the {p:,} parameters, and at "
            f"most {FORMED_UP_TO:,} are formed; iterations would take {n:,} solves. Use "
            "curvature='ekfac', select fewer units, for instance those of the last layer "
            "(selection=), or ask for the influence on a few queries: influence()"
        )
    return MatrixOperator(operator.to_dense(), 0.0, f"formed: {operator.plan}")


def _joined(parts: list[Ranked]) -> Ranked:
    return Ranked(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))


class _Best:
    """The k samples of largest (sign 1) or smallest (sign -1) scores of each query so far."""

    def __init__(self, k: int, sign: int) -> None:
        self._k, self._sign = k, sign
        self.ranked = Ranked(torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0))

    def add(self, scores: Tensor, start: int) -> None:
        """Take scores of shape (q, c), of the samples numbered from start."""
        q, c = scores.shape
        numbers = torch.arange(start, start + c).expand(q, c)
        indices, values = self.ranked
        if start:  # those so far first: of equal scores the first sample stays first
            numbers, scores = torch.cat([indices, numbers], 1), torch.cat([values, scores], 1)
        order = torch.sort(self._sign * scores, dim=1, descending=True, stable=True).indices
        order = order[:, : self._k]
        self.ranked = Ranked(numbers.gather(1, order), scores.gather(1, order))


@dataclass(frozen=True, eq=False)
class _Trained:
    """A trained model with the samples that it was trained on, checked."""

    model: nn.Module
    loss_fn: LossFunction
    samples: Samples
    n: int  # of training
    selection: Selection
    statistics: TrainingStatistics | None
    curvature: str
    damping: float
    weight_decay: Decay
    pull: Tensor  # (p,): the gradient of the regulariser
    shares: Tensor  # (samples,) of float64: what each counts for in the mean loss, 1 on average
    batch_size: int
    progress: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        train: Any,
        loss_fn: LossFunction,
        *,
        curvature: str,
        damping: float,
        weight_decay: Any,
        selection: Selection | None,
        statistics: TrainingStatistics | None,
        batch_size: int,
        dtype: torch.dtype | None,
        progress: bool,
    ) -> "_Trained":
        """Check what was given."""
        check_choice(curvature, "curvature", tuple(OPERATORS))
        check_integer(batch_size, "batch_size", 1)
        check_bool(progress, "progress")
        check_loss_fn(loss_fn)
        model = unwrapped(model)
        check_module(model)
        decay = decay_of(with_decay({"": weight_decay}, model)[""], model)
        if selection is None and statistics is not None:
            selection = _checked(statistics).selection
        selection = all_trainable(model) if selection is None else selection
        layout = selection.layout(model)
        wanted = working_dtype(model) if dtype is None else dtype
        samples = as_samples(train, "train", next(model.parameters()).device, wanted)
        n = len(samples) if statistics is None else _checked(statistics).n
        if n < 2:
            raise ValueError("train must have at least 2 samples, so that one can be left out")
        if len(samples) > n:
            raise ValueError(
                f"statistics are of {n:,} training samples, and train has {len(samples):,}: pass "
                "those that the statistics are of, or some of them"
            )
        check_copy(model, samples, loss_fn)
        loss_fn = _by_tokens(loss_fn, model, samples, statistics)
        theta = layout.gather(layout.parameters).detach().to(samples.device, wanted)
        each = vector_of(decay, layout, layout.parameters)
        pull = theta * (least_decay(decay) if each is None else each.to(theta))
        return cls(
            model,
            loss_fn,
            samples,
            n,
            selection,
            statistics,
            curvature if statistics is None else statistics.kind,
            check_real(damping, "damping", 0),
            decay,
            pull,
            _shares(loss_fn, samples),
            batch_size,
            progress,
        )

    def check_alike(self, queries: Samples) -> None:
        """Refuse queries that are of another form than the training samples."""
        kinds, own = (samples.fetch([0]).kinds for samples in (queries, self.samples))
        if kinds != own:
            raise ValueError(
                "queries must be like the samples of train, whose tensors have (dimensions, dtype) "
                f"{own}; those of queries have {kinds}"
            )

    def told_by(self, queries: Samples) -> "_Trained":
        """With a mean over tokens, where queries tell and training samples are equally long."""
        found = by_tokens(self.loss_fn, self.model, queries)
        if isinstance(self.loss_fn, TokenLoss) or not isinstance(found, TokenLoss):
            return self
        loss_fn = of_sets(found, self.samples)
        return replace(self, loss_fn=loss_fn, shares=_shares(loss_fn, self.samples))

    def operator(self) -> CurvatureOperator:
        """The damped curvature of the objective."""
        options: dict[str, Any] = {"damping": self.damping, "weight_decay": self.weight_decay}
        options["dtype"] = self.samples.dtype
        if self.statistics is not None:
            return self.statistics.operator(
                self.model, self.loss_fn, None, self.selection, **options
            )
        data = self.samples.data(self.batch_size)
        options["progress"] = self.progress
        made: CurvatureOperator = OPERATORS[self.curvature](
            self.model, self.loss_fn, data, self.selection, **options
        )
        return made

    def columns(self, queries: Samples, shares: Tensor, aggregate: bool) -> Iterator[Tensor]:
        """Gradients of the queries' losses, or of their mean loss, as blocks of shape (p, q)."""
        total, done = torch.zeros_like(self.pull), 0
        for gradients in self.gradients(queries, QUERY_BYTES):
            some = shares[done : done + gradients.n].to(total)
            if aggregate:
                total += gradients.combine(torch.ones_like(some))
            else:
                yield (gradients.dense() * _inverse(some)[:, None]).T.contiguous()
            done += gradients.n
        if aggregate:
            yield total[:, None] / shares.sum().to(total)

    def gradients(self, samples: Samples, max_bytes: int) -> Iterator[SampleGradients]:
        """Gradients of single samples."""
        return per_sample_gradients(
            self.model,
            self.loss_fn,
            samples.data(self.batch_size),
            self.selection,
            dtype=samples.dtype,
            max_bytes=max_bytes,
            progress=self.progress,
        )

    def scores(self, V: Tensor) -> Iterator[Tensor]:
        """Influences of consecutive training samples, from solutions of shape (p, q).

        In float64 on the CPU, shape (q, samples).
        """
        others = (V.T @ self.pull).double().cpu()
        # Whole batches where gradients have factors, which take little memory.
        two = self.samples.subset(range(2)) if len(self.samples) > 1 else self.samples
        factored = bool(next(self.gradients(two, sys.maxsize)).factors)
        most = sys.maxsize if factored else DENSE_BYTES
        start = 0
        for gradients in self.gradients(self.samples, most):
            if gradients.n * V.nbytes // V.shape[1] <= DENSE_BYTES:
                found = gradients.dense() @ V
            else:
                found = torch.stack([gradients.dot(column) for column in V.T], 1)
            share = self.shares[start : start + gradients.n]
            start += gradients.n
            yield (found.T.double().cpu() + others[:, None] * share) / (self.n - share)

    def told(self, operator: CurvatureOperator) -> tuple[int, str, str, float]:
        """What results say of the matrix."""
        return operator.shape[0], self.curvature, operator.plan, self.damping


def _by_tokens(
    loss_fn: LossFunction, model: nn.Module, samples: Samples, statistics: TrainingStatistics | None
) -> LossFunction:
    """A mean over tokens as a plain mean over samples; other losses as they are."""
    if statistics is None:
        return by_tokens(loss_fn, model, samples)
    if isinstance(loss_fn, TokenLoss) and statistics.mean_tokens is None:
        raise ValueError(
            "the statistics are of a plain mean over samples, and loss_fn is a mean over tokens: "
            "collect them with this loss"
        )
    return statistics.by_tokens(loss_fn)


def _shares(loss_fn: LossFunction, samples: Samples) -> Tensor:
    """What each sample counts for in the mean loss, shape (n,), of float64 on the CPU."""
    if not isinstance(loss_fn, TokenLoss):
        return torch.ones(len(samples), dtype=torch.float64)
    shares = [loss_fn.weights(batch.targets).cpu() for batch in samples.batches(_LABELS)]
    check_counted(float(torch.cat(shares).sum()), samples.name, loss_fn)
    return torch.cat(shares)


def _inverse(shares: Tensor) -> Tensor:
    """1 / shares; 0 for samples without a counted token, which lose nothing."""
    return torch.where(shares > 0, 1 / shares, 0.0)


def _checked(statistics: object) -> TrainingStatistics:
    if not isinstance(statistics, TrainingStatistics):
        raise TypeError(f"statistics must be TrainingStatistics; got {type(statistics).__name__}")
    return statistics
