"""Operators on selected units against dense computations of the whole model in float64."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

from lcodec_ext.curvature import (
    ConvergenceWarning,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    IndefiniteCurvatureError,
    SecantOperator,
    UnitSelection,
    per_sample_gradients,
)
from lcodec_ext.curvature.routes import base as _routes
from lcodec_ext.curvature.routes import gauss_newton

WITHIN = 1e-12  # relative, in float64


class Convolutions(nn.Module):
    """Groups, a transposed convolution with groups, strides, dilation, padding modes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.last = nn.Conv2d(4, 3, 2, stride=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)), inplace=True)
        x = torch.tanh(self.grouped(x))
        x = F.softplus(self.up(x, output_size=[x.shape[2] * 2 + 2, x.shape[3] * 2 + 1]))
        return self.head(torch.tanh(self.last(x)).mean((2, 3)))


class Block(nn.Module):
    """A transformer's block with attention, and one matrix for embedding and output."""

    def __init__(self, tied=True):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.wide = Conv1D(6, 4)
        self.narrow = nn.Linear(6, 4)
        self.out = nn.Linear(4, 7, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = x + self.narrow(F.gelu(self.wide(x)))
        return self.out(x[:, -1])


class Fused(nn.Module):
    """Attention by the fused function, which has no second derivative."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v).mean(1))


class Functional(nn.Module):
    """Weights that are used outside the forward pass of their layer as well."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + F.linear(F.linear(x, self.a.weight), self.b.weight)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.spread = nn.Conv1d(2, 4, 3, padding=1)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.layer = nn.LayerNorm((4, 6))
        self.rms = nn.RMSNorm(6)
        self.volume = nn.Conv3d(2, 2, 2)
        self.batch = nn.BatchNorm1d(3)
        self.head = nn.Linear(15, 3)

    def forward(self, x):
        x = torch.tanh(self.group(self.spread(x)))
        x = torch.tanh(self.layer(self.instance(x)))
        x = self.rms(x).reshape(len(x), 2, 2, 2, 3)
        x = torch.tanh(self.volume(x)).flatten(1)
        x = torch.cat([x, torch.ones(len(x), 11, dtype=x.dtype)], 1)
        return self.batch(self.head(x))


class Bags(nn.Module):
    def __init__(self, mode="mean"):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.bag(ids)))


class PlainBags(Bags):
    """Bags from operations that have second derivatives."""

    def forward(self, ids):
        kept = (ids != self.bag.padding_idx)[..., None]
        sums = (F.embedding(ids, self.bag.weight) * kept).sum(1)
        if self.bag.mode == "mean":
            sums = sums / kept.sum(1)
        return self.head(torch.tanh(sums))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.same = self.body
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.same(torch.tanh(self.body(x)))))


def images(n):
    return torch.randn(n, 2, 5, 6, dtype=torch.float64)


def vectors(n):
    return torch.randn(n, 4, dtype=torch.float64)


def tokens(n):
    return torch.randint(7, (n, 5))


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def pooled():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


CASES = {
    "mlp": (mlp, vectors, 3, {"0": [1, 4], "2": [0, 3], "4": [2]}),
    "one layer": (mlp, vectors, 3, {"2": [0, 3]}),
    "head": (mlp, vectors, 3, {"4": [0, 2]}),
    "pooled head": (pooled, images, 3, {"2": [0, 2]}),
    "convolutions": (
        Convolutions,
        images,
        3,
        {"first": [1, 2], "norm": [0, 3], "grouped": [0, 1, 5], "up": [0, 1, 2], "last": [2]},
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
        ),
        images,
        3,
        {"0": [3]},
    ),
    "block": (
        Block,
        tokens,
        7,
        {
            "tokens": [1, 6],
            "attention.in_proj": [0, 5, 11],
            "attention.out_proj": [2],
            "norm": [1],
            "wide": [0, 4],
            "narrow": [3],
            "out": [1, 2],
        },
    ),
    "block, tied rows": (Block, tokens, 7, {"tokens": [0, 3], "wide": [1]}),
    "block, untied": (
        functools.partial(Block, False),
        tokens,
        7,
        {"tokens": [1, 6], "norm": [0, 2], "wide": [5], "narrow": [0, 1]},
    ),
    "fused attention": (
        Fused,
        lambda n: torch.randn(n, 3, 4, dtype=torch.float64),
        3,
        {"qkv": [0, 5, 9], "out": [1]},
    ),
    "functional": (Functional, vectors, 3, {"a": [0, 2], "b": [1]}),
    "norms": (
        Norms,
        lambda n: torch.randn(n, 2, 6, dtype=torch.float64),
        3,
        {
            "spread": [1],
            "group": [0, 3],
            "instance": [1, 2],
            "layer": [0, 23, 7],
            "rms": [5, 0],
            "volume": [1],
            "batch": [2],
        },
    ),
    "bags": (Bags, tokens, 3, {"bag": [0, 1, 4], "head": [0]}),
    "bags, sum": (functools.partial(Bags, "sum"), tokens, 3, {"bag": [0, 5], "head": [1]}),
    "reused": (Reused, vectors, 3, {"body": [0, 2], "head": [1]}),
}


def setting(case, n=11):
    build, inputs, n_classes, units = CASES[case]
    torch.manual_seed(7)
    model = build().double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    for parameter in model.parameters():  # also those that start at 0 or 1
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, inputs(n), torch.arange(n) % n_classes, UnitSelection(units)


class Dense:
    """Curvature by all parameters at once, and of it the block of the selected ones.

    Which entries those are is found by marking them.
    """

    def __init__(self, model, X, y, selection):
        self.model, self.X, self.y = copy.deepcopy(model).eval(), X, y
        if isinstance(model, Bags):
            self.model.__class__ = PlainBags
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        total = sum(shape.numel() for shape in self.shapes)
        marks = dict(zip(self.names, self._pieces(torch.arange(total)), strict=True))
        self.chosen = selection.gather(marks, model=model)
        self.flat = nn.utils.parameters_to_vector(model.parameters()).detach()

    def _pieces(self, vector):
        parts = vector.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def outputs(self, vector, X):
        tensors = dict(zip(self.names, self._pieces(vector), strict=True))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(self.model, tensors, (X,))

    def block(self, matrix):
        return matrix[self.chosen][:, self.chosen]

    def hessian(self, loss=F.cross_entropy):
        return self.block(hessian(lambda v: loss(self.outputs(v, self.X), self.y), self.flat))

    def jacobian(self):
        return jacrev(lambda v: self.outputs(v, self.X))(self.flat)[..., self.chosen]

    def gauss_newton(self):
        J, p = self.jacobian(), self.outputs(self.flat, self.X).softmax(1)
        by_output = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ica,icd,idb->ab", J, by_output, J) / len(self.X)

    def gradients(self):
        J, p = self.jacobian(), self.outputs(self.flat, self.X).softmax(1)
        return torch.einsum("ica,ic->ia", J, p - F.one_hot(self.y, p.shape[1]))

    def fisher(self):
        G = self.gradients()
        return G.T @ G / len(G)


@functools.cache
def dense(case, kind):
    return getattr(Dense(*setting(case)), kind)()


OPERATORS = {
    "hessian": HessianOperator,
    "gauss_newton": GaussNewtonOperator,
    "fisher": FisherOperator,
}


def operator(kind, case, **options):
    model, X, y, selection = setting(case)
    return OPERATORS[kind](model, F.cross_entropy, (X, y), selection, **options)


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def some(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_block_of_the_whole_models_curvature(kind, case):
    A, expected = operator(kind, case), dense(case, kind)
    p = len(expected)
    assert A.shape == (p, p)
    assert A.dtype == torch.float64
    V = some(p, 3)
    assert off(A @ V, expected @ V) < WITHIN
    assert off(A.to_dense(), expected) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    assert A.trace() == pytest.approx(expected.trace().item(), rel=1e-11)
    assert off(torch.stack([A @ V[:, k] for k in range(3)], 1), A @ V) < WITHIN


@pytest.mark.parametrize("case", ["mlp", "head", "convolutions", "block"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_symmetry(kind, case):
    A = operator(kind, case, damping=0.3)
    U, V = some(A.shape[0], 4), some(A.shape[0], 4, seed=2)
    assert off(U.T @ (A @ V), (A @ U).T @ V) < WITHIN


@pytest.mark.parametrize("kind", OPERATORS)
def test_damping_and_weight_decay_are_on_the_diagonal(kind):
    A = operator(kind, "mlp", damping=0.25, weight_decay=0.5)
    expected = dense("mlp", kind) + 0.75 * torch.eye(A.shape[0], dtype=torch.float64)
    v = some(A.shape[0])
    assert off(A @ v, expected @ v) < WITHIN
    assert off(A.to_dense(), expected) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    assert off(A.solve(v).x, torch.linalg.solve(expected, v)) < 1e-9


# ---------------------------------------------------------------------------------------------
# Routes


@pytest.mark.parametrize(
    ("kind", "case", "plan"),
    [
        ("hessian", "mlp", "delta hook"),
        ("gauss_newton", "mlp", "delta hook"),
        ("hessian", "head", "factored rows: 2 rows"),
        ("gauss_newton", "pooled head", "factored rows: 2 rows"),
        ("hessian", "block", "to the first selected layer, for the selected rows only"),
        ("hessian", "functional", "whole gradients of a.weight: it is used outside of"),
        ("fisher", "mlp", "factored rows: the gradients of 11 samples are outer products"),
        ("fisher", "convolutions", "stored gradients: 11 samples"),
    ],
)
def test_the_plan_says_which_way_and_why(kind, case, plan):
    A = operator(kind, case)
    assert plan in A.plan
    assert A.plan in repr(A)


def weighted(z, y):
    return F.cross_entropy(z, y, weight=torch.tensor([0.2, 1.0, 2.0], dtype=z.dtype))


def cubic(z, y):
    return ((z - F.one_hot(y, 3)) ** 4).sum() / len(z)


def bce(z, y):
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).to(z))


def squares(z, y):
    return F.mse_loss(z, F.one_hot(y, 3).to(z))


LOSSES = {
    "cross_entropy": F.cross_entropy,
    "smoothed": functools.partial(F.cross_entropy, label_smoothing=0.2),
    "module": nn.CrossEntropyLoss(),
    "weighted": weighted,
    "weighted module": nn.CrossEntropyLoss(torch.tensor([0.2, 1.0, 2.0])),
    "of no name": cubic,
    "bce": bce,
    "mse": squares,
}


@pytest.mark.parametrize("case", ["head", "pooled head", "one layer"])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, case):
    model, X, y, selection = setting(case)
    loss_fn = LOSSES[loss]
    A = HessianOperator(model, loss_fn, (X, y), selection)
    in_double = copy.deepcopy(loss_fn).double() if isinstance(loss_fn, nn.Module) else loss_fn
    expected = Dense(model, X, y, selection).hessian(in_double)
    assert off(A @ some(*A.shape), expected @ some(*A.shape)) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    B = GaussNewtonOperator(model, loss_fn, (X, y), selection)
    if case != "one layer":
        assert off(B.to_dense(), expected) < WITHIN  # linear in the parameters
    assert torch.linalg.eigvalsh(B.to_dense()).min() > -1e-12


@pytest.mark.parametrize(
    ("loss_fn", "targets"),
    [
        (F.cross_entropy, lambda y: y),
        (nn.BCEWithLogitsLoss(), lambda y: F.one_hot(y, 3).double()),
        (nn.MSELoss(reduction="sum"), lambda y: F.one_hot(y, 3).double()),
        (F.mse_loss, lambda y: F.one_hot(y, 3).double()),
    ],
)
def test_closed_forms_of_the_head(loss_fn, targets):
    model, X, y, selection = setting("head")
    y = targets(y)
    reduction = getattr(loss_fn, "reduction", "mean")
    A = HessianOperator(model, loss_fn, (X, y), selection, reduction=reduction)
    assert "closed form" in A.plan
    expected = Dense(model, X, y, selection).hessian(loss_fn)
    assert off(A @ some(*A.shape), expected @ some(*A.shape)) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    low = A._low_rank(10**6)
    R = low.project(torch.eye(len(expected), dtype=torch.float64))
    assert off(R.T @ (low.weights[:, None] * R), expected) < WITHIN
    assert off(low.gram(), R @ R.T) < WITHIN
    assert off(low.lift(some(len(R), 2)), R.T @ some(len(R), 2)) < WITHIN


def test_a_single_output_without_an_axis_of_its_own():
    torch.manual_seed(0)
    layer = nn.Linear(4, 1).double()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), layer, nn.Flatten(0)).double()
    X, y = vectors(9), (torch.arange(9) % 2).double()
    selection = UnitSelection({"2": [0]})
    A = HessianOperator(model, F.binary_cross_entropy_with_logits, (X, y), selection)
    assert "closed form" in A.plan
    expected = Dense(model, X, y, selection).hessian(F.binary_cross_entropy_with_logits)
    assert off(A.to_dense(), expected) < WITHIN


@pytest.mark.parametrize("ignored", [-100, 0])
@pytest.mark.parametrize("module", [False, True])
def test_ignored_targets_have_no_closed_form(ignored, module):
    model, X, y, selection = setting("head")
    y = y.clone()
    y[3] = ignored
    loss = functools.partial(F.cross_entropy, ignore_index=ignored)
    if module:
        loss = nn.CrossEntropyLoss(ignore_index=ignored)
    A = HessianOperator(model, loss, (X, y), selection)
    assert "by autograd" in A.plan
    expected = Dense(model, X, y, selection).hessian(loss)
    assert off(A.to_dense(), expected) < WITHIN


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_targets_that_would_be_broadcast_are_refused(batches, turned):
    torch.manual_seed(0)
    model, X, y = nn.Linear(4, 1).double(), vectors(6), some(6)
    advice = r"targets\[:, None\]"
    if turned:
        model, y, advice = nn.Sequential(model, nn.Flatten(0)), y[:, None], r"targets.squeeze\(-1\)"
    selection, data = UnitSelection({"0" if turned else "": [0]}), (X, y)
    shapes = [r"\(6, 1\)", r"\(6,\)"][:: -1 if turned else 1]
    message = rf"outputs of shape {shapes[0]} with targets of shape {shapes[1]}, .*{advice}"
    losses = [F.mse_loss, nn.L1Loss(), functools.partial(F.huber_loss, delta=2.0)]
    for loss in [*losses, lambda z, y: (z - y).square().mean()]:
        for operator in (HessianOperator, GaussNewtonOperator, FisherOperator):
            with pytest.raises(ValueError, match=message):
                operator(model, loss, [data] if batches else data, selection)
        options = {"steps": torch.ones(5, dtype=torch.float64)}
        with pytest.raises(ValueError, match=message):
            SecantOperator(model, loss, [data] if batches else data, selection, **options)


def test_a_head_over_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = torch.randn(5, 6, 4, dtype=torch.float64), torch.arange(30).reshape(5, 6) % 3

    def loss(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    selection = UnitSelection({"2": [0, 2]})
    A = HessianOperator(model, loss, (X, y), selection)
    assert A.plan.startswith("factored rows: 2 rows of the layer that gives the outputs, 30 inputs")
    assert off(A.to_dense(), Dense(model, X, y, selection).hessian(loss)) < WITHIN


def test_model_fisher_is_gauss_newton():
    for case in ("head", "mlp", "convolutions"):
        model, X, y, selection = setting(case)
        A = FisherOperator(model, F.cross_entropy, (X, y), selection, kind="model")
        assert off(A.to_dense(), dense(case, "gauss_newton")) < WITHIN
    with pytest.raises(ValueError, match="kind='model' needs a loss"):
        FisherOperator(model, cubic, (X, y), selection, kind="model")


@pytest.mark.parametrize("cache_bytes", [0, 20_000])
@pytest.mark.parametrize("case", ["mlp", "convolutions", "block, untied"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_what_cannot_be_kept_is_formed_again(kind, case, cache_bytes, monkeypatch):
    monkeypatch.setattr(_routes, "CACHE_BYTES", cache_bytes)
    model, X, y, selection = setting(case)
    batches = [(X[:4], y[:4]), (X[4:6], y[4:6]), (X[6:], y[6:])]
    A = OPERATORS[kind](model, F.cross_entropy, batches, selection)
    if cache_bytes == 0:
        again = "1 of 3 batches" if kind != "fisher" else "formed again"
        assert again in A.plan
    expected = dense(case, kind)
    few = some(A.shape[0], 3)
    assert off(A @ few, expected @ few) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    b = some(A.shape[0])
    damped = expected + 20 * torch.eye(len(b), dtype=torch.float64)
    solution = OPERATORS[kind](model, F.cross_entropy, batches, selection, damping=20.0).solve(b)
    assert off(solution.x, torch.linalg.solve(damped, b)) < 1e-9


def test_factors_by_position_where_gradients_are_too_large_to_store(monkeypatch):
    monkeypatch.setattr(_routes, "CACHE_BYTES", 3000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 3, 4), nn.Tanh(), nn.Flatten()).double()
    X, y = torch.randn(6, 8, 5, dtype=torch.float64), torch.arange(6) % 6
    selection = UnitSelection({"0": [0, 2]})
    A = FisherOperator(model, F.cross_entropy, (X, y), selection)
    assert "sums of outer products over positions" in A.plan
    expected = Dense(model, X, y, selection).fisher()
    assert off(A @ some(*A.shape), expected @ some(*A.shape)) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN


def test_restricting_stored_gradients():
    model, X, y, selection = setting("convolutions")
    whole = FisherOperator(model, F.cross_entropy, (X, y), selection, damping=0.1)
    part = UnitSelection({"first": [2], "grouped": [0, 5], "up": [1]})
    A = whole.restrict(part)
    B = FisherOperator(model, F.cross_entropy, (X, y), part, damping=0.1)
    assert "4 segments of stored gradients" in A.plan
    V = some(A.shape[0], 2)
    assert off(A @ V, B @ V) < WITHIN
    assert off(A.to_dense(), B.to_dense()) < WITHIN
    assert off(A.diagonal(), B.diagonal()) < WITHIN
    assert off(A.solve(V).x, B.solve(V).x) < 1e-9
    with pytest.raises(ValueError, match="part of the operator's; that lacks .*'last'"):
        whole.restrict(UnitSelection({"last": [0]}))
    with pytest.raises(ValueError, match="needs stored gradients"):
        operator("fisher", "mlp").restrict(UnitSelection({"0": [1]}))


def test_restricting_to_tied_rows_in_another_order():
    model, X, y, _ = setting("block, tied rows")
    both = UnitSelection({"tokens": [0, 3], "out": [1]})
    whole = FisherOperator(model, F.cross_entropy, (X, y), both)
    part = UnitSelection({"out": [1, 3]})
    with pytest.raises(ValueError, match="part of the operator's"):
        whole.restrict(part)
    A = whole.restrict(UnitSelection({"out": [1]}))
    B = FisherOperator(model, F.cross_entropy, (X, y), UnitSelection({"out": [1]}))
    assert off(A.to_dense(), B.to_dense()) < WITHIN


# ---------------------------------------------------------------------------------------------
# Data


def test_ways_to_give_data():
    model, X, y, selection = setting("mlp", n=20)
    loss = F.cross_entropy
    expected = HessianOperator(model, loss, (X, y), selection).to_dense()
    pairs = [(X[:7], y[:7]), [X[7:], y[7:]]]
    for data in (
        [X, y],
        ((X,), y),
        pairs,
        lambda: iter(pairs),
        TensorDataset(X, y),
        DataLoader(TensorDataset(X, y), 6),
        DataLoader(TensorDataset(X, y), 6, shuffle=True),
        {"input": X, "labels": y},
        [{"input": X[:7], "labels": y[:7]}, {"input": X[7:], "label": y[7:]}],
        ({"input": X}, y),
        (X.numpy() if False else X.requires_grad_(), y),
    ):
        A = HessianOperator(model, loss, data, selection)
        assert off(A.to_dense(), expected) < WITHIN


def test_tensors_are_cut_into_batches():
    model, X, y, selection = setting("mlp", n=600)
    A = HessianOperator(model, F.cross_entropy, (X, y), selection)
    assert "5 of 5 batches" in A.plan
    assert off(A.to_dense(), Dense(model, X, y, selection).hessian()) < WITHIN
    with pytest.raises(ValueError, match="plain mean over the samples of a batch, since data is"):
        HessianOperator(model, weighted, (X, y), selection)
    A = HessianOperator(model, weighted, [(X, y)], selection)  # one batch, the caller's
    assert off(A.to_dense(), Dense(model, X, y, selection).hessian(weighted)) < WITHIN


@pytest.mark.parametrize("case", ["mlp", "head", "convolutions"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_sums_over_samples(kind, case):
    model, X, y, selection = setting(case)
    loss = functools.partial(F.cross_entropy, reduction="sum")
    batches = [(X[:5], y[:5]), (X[5:], y[5:])]
    A = OPERATORS[kind](model, loss, batches, selection, reduction="sum", damping=9.0)
    expected = 11 * dense(case, kind) + 9 * torch.eye(A.shape[0], dtype=torch.float64)
    assert off(A.to_dense(), expected) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    v = some(A.shape[0])
    assert off(A.solve(v).x, torch.linalg.solve(expected, v)) < 1e-9


def test_outputs_of_several_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return {"class": self.a(h), "place": (self.b(h), x)}

    torch.manual_seed(0)
    model, X, y = Two().double(), vectors(8), torch.arange(8) % 3

    def loss(outputs, y):
        return F.cross_entropy(outputs["class"], y) + outputs["place"][0].pow(2).sum(1).mean()

    selection = UnitSelection({"body": [0, 3], "b": [1]})
    expected = Dense(model, X, y, selection).hessian(loss)
    A = HessianOperator(model, loss, (X, y), selection)
    assert off(A.to_dense(), expected) < WITHIN
    G = GaussNewtonOperator(model, loss, (X, y), selection).to_dense()
    plain = Dense(model, X, y, selection)
    J = jacrev(lambda v: plain.outputs(v, X)["class"])(plain.flat)[..., plain.chosen]
    K = jacrev(lambda v: plain.outputs(v, X)["place"][0])(plain.flat)[..., plain.chosen]
    p = plain.outputs(plain.flat, X)["class"].softmax(1)
    by_output = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("ica,icd,idb->ab", J, by_output, J) + 2 * torch.einsum(
        "ica,icb->ab", K, K
    )
    assert off(G, expected / 8) < WITHIN


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=12,
        num_labels=3,
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config).double()
    batch = {
        "input_ids": torch.randint(1, 40, (6, 9)),
        "attention_mask": (torch.arange(9) < torch.tensor([9, 5, 7, 9, 3, 8])[:, None]).long(),
        "labels": torch.arange(6) % 3,
    }
    return model, batch


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_model_of_transformers(kind):
    model, batch = distilbert()
    selection = UnitSelection(
        {
            "distilbert.embeddings.word_embeddings": [3, 8],
            "distilbert.transformer.layer.0.attention.q_lin": [5],
            "distilbert.transformer.layer.1.ffn.lin2": [0, 7],
            "distilbert.transformer.layer.1.output_layer_norm": [2],
            "classifier": [1],
        }
    )
    A = OPERATORS[kind](model, F.cross_entropy, batch, selection)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    layout = {k: p.detach() for k, p in model.named_parameters()}

    def outputs(vector):
        tensors = {k: v.clone() for k, v in layout.items()}
        start = 0
        for segment in selection.segments(model):
            part = vector[start : start + segment.length]
            tensors[segment.parameter] = tensors[segment.parameter].index_put(
                tuple(torch.tensor(i) for i in segment.index), part.squeeze()
            )
            start += segment.length
        model.eval()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(model, tensors, (), inputs).logits

    theta = selection.gather(model).detach()
    if kind == "hessian":
        expected = hessian(lambda v: F.cross_entropy(outputs(v), batch["labels"]), theta)
    else:
        J, p = jacrev(outputs)(theta), outputs(theta).softmax(1)
        residual = p - F.one_hot(batch["labels"], 3)
        by_output = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        if kind == "fisher":
            by_output = residual[:, :, None] * residual[:, None, :]
        expected = torch.einsum("ica,icd,idb->ab", J, by_output, J) / 6
    assert off(A @ some(*A.shape), expected @ some(*A.shape)) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN


# ---------------------------------------------------------------------------------------------
# Solutions


@pytest.mark.parametrize("case", ["mlp", "head", "pooled head", "convolutions", "block, untied"])
@pytest.mark.parametrize("kind", ["gauss_newton", "fisher"])
def test_methods_agree(kind, case):
    A = operator(kind, case, damping=0.05)
    p = A.shape[0]
    expected = dense(case, kind) + 0.05 * torch.eye(p, dtype=torch.float64)
    b = some(p, 2)
    exact = torch.linalg.solve(expected, b)
    for method in ("woodbury", "cholesky", "cg", "minres", "auto"):
        result = A.solve(b, method=method)
        assert off(result.x, exact) < 1e-8, method
        assert result.method == method or method == "auto"
        worst = ((b - expected @ result.x).norm(dim=0) / b.norm(dim=0)).max().item()
        assert result.residual == pytest.approx(worst, rel=0.1, abs=1e-13)
        assert (result.iterations > 0) == (method in ("cg", "minres"))
    single = A.solve(b[:, 0]).x
    assert single.shape == (p,)
    assert off(single, exact[:, 0]) < 1e-8


def test_the_method_fits_the_case():
    A = operator("fisher", "convolutions", damping=0.1)
    assert A.solve(some(A.shape[0])).method == "woodbury"
    A = operator("fisher", "convolutions")  # without damping, of rank 11: singular
    with pytest.raises(IndefiniteCurvatureError, match="singular"):
        A.solve(some(A.shape[0]))
    A = operator("hessian", "mlp", damping=9.0)
    assert A.solve(some(A.shape[0])).method == "cholesky"
    model, X, y, _ = setting("mlp", n=600)
    everything = UnitSelection.all(model)
    A = GaussNewtonOperator(model, F.cross_entropy, (X, y), everything, damping=0.01)
    assert A.solve(some(A.shape[0]), method="cg").method == "cg"


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("case", ["one layer", "head"])
def test_a_diagonal_preconditioner_leads_to_the_same_solution(kind, case):
    A = operator(kind, case, damping=2.0)
    b = some(A.shape[0])
    result = A.solve(b, method="cg", preconditioner="diagonal")
    assert off(result.x, torch.linalg.solve(A.to_dense(), b)) < 1e-9
    with pytest.raises(ValueError, match="preconditioner must be one of 'diagonal', None"):
        A.solve(b, preconditioner="jacobi")


def test_a_diagonal_preconditioner_helps_where_scales_differ():
    torch.manual_seed(0)
    X, y = some(200, 20) * torch.logspace(-2, 2, 20).double(), some(200, 3, seed=2)
    model, selection = nn.Linear(20, 3).double(), UnitSelection({"": [0, 1, 2]})
    A = GaussNewtonOperator(model, F.mse_loss, (X, y), selection, damping=1e-3)
    b = some(A.shape[0])
    plain = A.solve(b, method="cg", rtol=1e-3)
    scaled = A.solve(b, method="cg", rtol=1e-3, preconditioner="diagonal")
    assert scaled.iterations < plain.iterations / 3


def test_an_indefinite_hessian_is_refused():
    A = operator("hessian", "mlp")
    eigenvalues = torch.linalg.eigvalsh(dense("mlp", "hessian"))
    assert eigenvalues[0] < 0
    for method in ("cholesky", "cg"):
        with pytest.raises(IndefiniteCurvatureError, match="GaussNewtonOperator") as error:
            A.solve(some(A.shape[0]), method=method)
        assert eigenvalues[0] - 1e-12 <= error.value.rayleigh <= 1e-12
    solution = A.solve(some(A.shape[0]), method="minres").x
    assert off(dense("mlp", "hessian") @ solution, some(A.shape[0])) < 1e-6


def test_what_solve_refuses():
    A = operator("hessian", "mlp", damping=1.0)
    with pytest.raises(ValueError, match="method='woodbury' needs a matrix by at most"):
        A.solve(some(A.shape[0]), method="woodbury")
    with pytest.raises(ValueError, match="method must be one of"):
        A.solve(some(A.shape[0]), method="lu")
    with pytest.raises(ValueError, match=r"b must be floating-point of shape \(28,\)"):
        A.solve(some(27))
    with pytest.raises(ValueError, match="rtol"):
        A.solve(some(28), rtol=-1)
    with pytest.warns(ConvergenceWarning):
        assert A.solve(some(28), method="cg", rtol=1e-14, max_iterations=2).residual > 1e-14


def test_sums_and_multiples():
    H, G, F_ = (
        operator(kind, "mlp", damping=d) for kind, d in zip(OPERATORS, (0.1, 0, 0), strict=True)
    )
    p = H.shape[0]
    eye = torch.eye(p, dtype=torch.float64)
    expected = (
        3 * (dense("mlp", "hessian") + 0.1 * eye)
        - dense("mlp", "gauss_newton") / 2
        + 2 * dense("mlp", "fisher")
    )
    A = 3 * H - G / 2 + F_ * 2
    V = some(p, 2)
    assert off(A @ V, expected @ V) < WITHIN
    assert off(A.to_dense(), expected) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    assert off((-G).to_dense(), -dense("mlp", "gauss_newton")) < WITHIN
    assert "3 * (delta hook" in A.plan
    B = 2 * operator("fisher", "mlp", damping=0.2) + operator("gauss_newton", "mlp")
    low = B.solve(V, method="woodbury")
    assert off(low.x, B.solve(V, method="cholesky").x) < 1e-9
    with pytest.raises(ValueError, match="one shape and device"):
        H + operator("hessian", "head")
    with pytest.raises(ValueError, match="finite"):
        H * float("nan")
    for wrong in (lambda: H + 1, lambda: H * "2", lambda: H * H, lambda: H / H, lambda: H - 1):
        with pytest.raises(TypeError):
            wrong()


def test_the_retained_objective_is_a_combination():
    model, X, y, selection = setting("mlp", n=20)
    whole = HessianOperator(model, F.cross_entropy, (X, y), selection)
    removed = HessianOperator(model, F.cross_entropy, (X[:3], y[:3]), selection)
    retained = HessianOperator(model, F.cross_entropy, (X[3:], y[3:]), selection)
    A = (20 * whole - 3 * removed) / 17
    assert off(A.to_dense(), retained.to_dense()) < WITHIN


def test_to_scipy():
    A = operator("gauss_newton", "mlp", damping=0.1)
    L = A.to_scipy()
    v = some(A.shape[0], 2)
    assert L.shape == A.shape
    assert L.dtype == np.float64
    assert np.array_equal(L @ v.numpy(), (A @ v).numpy())
    assert np.array_equal(L.H @ v[:, 0].numpy(), (A @ v[:, 0]).numpy())


def test_a_dense_matrix_that_is_too_large_is_refused():
    A = operator("hessian", "mlp")
    with pytest.raises(ValueError, match="28 selected parameters takes 6,272 bytes, more than max"):
        A.to_dense(max_bytes=6271)
    assert A.to_dense(max_bytes=6272).shape == (28, 28)


# ---------------------------------------------------------------------------------------------
# Secants


def quadratic():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = vectors(30), some(30, 3, seed=3)
    return model, X, y, UnitSelection({"2": [0, 1, 2]})


def test_secants_of_a_quadratic_loss_are_met():
    model, X, y, selection = quadratic()
    H = HessianOperator(model, F.mse_loss, (X, y), selection).to_dense()
    S = some(15, 4)
    A = SecantOperator(model, F.mse_loss, (X, y), selection, steps=S)
    assert off(A.Y, H @ S) < 1e-10
    assert off(A @ S, H @ S) < 1e-9
    assert A.rank == 4
    every = SecantOperator(model, F.mse_loss, (X, y), selection, steps=some(15, 15))
    assert off(every.to_dense(), H) < 1e-7


def test_one_pair_is_of_rank_one():
    s, y = some(6), some(6, seed=2)
    y = y if s @ y > 0 else -y
    A = SecantOperator.from_pairs(s, y, damping=0.5, weight_decay=0.25)
    expected = torch.outer(y, y) / (y @ s) + 0.75 * torch.eye(6, dtype=torch.float64)
    assert off(A.to_dense(), expected) < WITHIN
    assert off(A.diagonal(), expected.diagonal()) < WITHIN
    result = A.solve(some(6, 2))
    assert result.method == "woodbury"
    assert off(result.x, torch.linalg.solve(expected, some(6, 2))) < 1e-12


def test_pairs_without_positive_curvature_are_left_out():
    S, Y = some(6, 3), some(6, 3, seed=4)
    Y = Y * torch.sign((S * Y).sum(0)) * torch.tensor([1.0, -1.0, 1.0])
    A = SecantOperator.from_pairs(S, Y)
    assert A.skipped == (1,)
    assert "1 without positive curvature left out" in A.plan
    assert torch.linalg.eigvalsh(A.to_dense()).min() > -1e-12
    with pytest.raises(IndefiniteCurvatureError, match="none of 1 pairs has positive") as caught:
        SecantOperator.from_pairs(S[:, 0], -Y[:, 0], damping=1e6)
    s, y = S[:, 0], -Y[:, 0]
    assert caught.value.rayleigh == pytest.approx(float(s @ y / (s @ s)))
    assert caught.value.least_damping is None  # none helps
    message = str(caught.value)
    assert "a step s of the weights and the change y of the gradient along it" in message
    assert f"s.y is {s @ y:.3g} at most" in message
    assert "Use curvature='gauss_newton'" in message
    with pytest.raises(ValueError, match="none of 1 pairs"):
        SecantOperator.from_pairs(0 * S[:, 0], Y[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        SecantOperator.from_pairs(S[:, 0], float("nan") * Y[:, 0])
    with pytest.raises(ValueError, match="one shape"):
        SecantOperator.from_pairs(S, Y[:, 0])
    with pytest.raises(TypeError, match="S must be a tensor"):
        SecantOperator.from_pairs([1.0], Y[:, 0])


def test_what_secants_refuse():
    model, X, y, selection = quadratic()
    for steps, error in ((some(14), ValueError), ([1.0] * 15, TypeError)):
        with pytest.raises(error, match="steps must be"):
            SecantOperator(model, F.mse_loss, (X, y), selection, steps=steps)


# ---------------------------------------------------------------------------------------------
# Gradients of single samples


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_single_samples(case):
    model, X, y, selection = setting(case)
    expected = dense(case, "gradients")
    (chunk,) = per_sample_gradients(model, F.cross_entropy, (X, y), selection)
    n, p = expected.shape
    assert (chunk.n, chunk.size) == (n, p)
    assert off(chunk.dense(), expected) < WITHIN
    assert off(chunk.dot(some(p)), expected @ some(p)) < WITHIN
    assert off(chunk.combine(some(n)), some(n) @ expected) < WITHIN
    one_by_one = case.startswith(("functional", "bags"))
    assert bool(chunk.factors) == (not one_by_one)


def test_chunks_of_gradients_stay_below_a_cap():
    model, X, y, selection = setting("convolutions")
    expected = dense("convolutions", "gradients")
    p = expected.shape[1]
    chunks = list(
        per_sample_gradients(
            model, F.cross_entropy, [(X[:7], y[:7]), (X[7:], y[7:])], selection,
            max_bytes=3 * 8 * p + 7,
        )
    )  # fmt: skip
    assert [chunk.n for chunk in chunks] == [3, 3, 1, 3, 1]
    assert off(torch.cat([chunk.dense() for chunk in chunks]), expected) < WITHIN
    with pytest.raises(ValueError, match="max_bytes"):
        per_sample_gradients(model, F.cross_entropy, (X, y), selection, max_bytes=0)


def test_an_axis_as_long_as_the_batch_is_not_taken_for_samples():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = torch.tanh(self.body(x.transpose(0, 1)))  # (positions, samples, 5)
            return self.head(x.mean(0))

    torch.manual_seed(0)
    model, n = SequenceFirst().double(), 6
    X, y = torch.randn(n, n, 4, dtype=torch.float64), torch.arange(n) % 3
    selection = UnitSelection({"body": [0, 3]})
    (chunk,) = per_sample_gradients(model, F.cross_entropy, (X, y), selection)
    assert not chunk.factors
    expected = Dense(model, X, y, selection).gradients()
    assert off(chunk.dense(), expected) < WITHIN


@pytest.mark.parametrize("loss_fn", [weighted, lambda z, y: F.cross_entropy(z, y, reduction="sum")])
def test_losses_that_are_no_means_have_no_gradients_of_single_samples(loss_fn):
    model, X, y, selection = setting("mlp")
    with pytest.raises(ValueError, match="plain mean over the samples of a batch, since gradients"):
        FisherOperator(model, loss_fn, (X, y), selection)
    with pytest.raises(ValueError, match="plain mean"):
        list(per_sample_gradients(model, loss_fn, (X, y), selection))


# ---------------------------------------------------------------------------------------------
# What is left as it was


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_model_is_left_as_it_was(kind):
    model, X, y, selection = setting("convolutions")
    model.train()
    model.norm.eval()
    model.head.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {k: module.training for k, module in model.named_modules()}
    trainable = {k: p.requires_grad for k, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    data = DataLoader(TensorDataset(X, y), 4, shuffle=True)
    A = OPERATORS[kind](model, F.cross_entropy, data, selection, damping=9.0)
    A.solve(A @ some(A.shape[0]))
    A.diagonal()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {k: module.training for k, module in model.named_modules()} == modes
    assert {k: p.requires_grad for k, p in model.named_parameters()} == trainable
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", OPERATORS)
def test_an_operator_is_of_the_model_as_it_was(kind):
    model, X, y, selection = setting("mlp")
    A = OPERATORS[kind](model, F.cross_entropy, (X, y), selection)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert off(A.to_dense(), dense("mlp", kind)) < WITHIN


def test_ambient_modes_do_not_matter():
    expected = dense("block", "hessian")
    model, X, y, selection = setting("block")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        A = HessianOperator(model, F.cross_entropy, (X, y), selection)
        assert off(A.to_dense(), expected) < WITHIN
        head, X_, y_, units = setting("head")
        B = HessianOperator(head.float(), F.cross_entropy, (X_, y_), units)
        assert off(B.to_dense().double(), dense("head", "hessian")) < 1e-5  # not in bfloat16
    with torch.inference_mode():
        A = HessianOperator(model, F.cross_entropy, (X.clone(), y.clone()), selection)
        assert off(A @ some(*A.shape), expected @ some(*A.shape)) < WITHIN
    product = A @ some(*A.shape)
    assert not product.requires_grad


def test_randomness_in_the_data_is_repeated():
    model, X, y, selection = setting("mlp")

    def noisy():
        for k in range(0, 11, 4):
            yield X[k : k + 4] + torch.randn(4, 4)[: len(X[k : k + 4])], y[k : k + 4]

    A = HessianOperator(model, F.cross_entropy, noisy, selection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_routes, "CACHE_BYTES", 0)
        B = HessianOperator(model, F.cross_entropy, noisy, selection)
    v = some(A.shape[0])
    assert torch.equal(A @ v, A @ v)
    assert torch.equal(B @ v, B @ v)


def test_old_weight_norm_elsewhere_in_the_model():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        normed = nn.utils.weight_norm(nn.Linear(4, 4).double())
    model = nn.Sequential(normed, nn.Tanh(), nn.Linear(4, 3).double())
    X, y = vectors(5), torch.arange(5) % 3
    A = HessianOperator(model, F.cross_entropy, (X, y), UnitSelection({"2": [0]}))
    assert isinstance(normed.weight, torch.Tensor)
    plain = nn.Sequential(nn.Linear(4, 4).double(), nn.Tanh(), model[2])
    plain[0].weight.data, plain[0].bias.data = normed.weight.detach(), normed.bias.detach()
    B = HessianOperator(plain, F.cross_entropy, (X, y), UnitSelection({"2": [0]}))
    assert off(A.to_dense(), B.to_dense()) < WITHIN


# ---------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("case", ["mlp", "head", "convolutions", "block"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_single_precision(kind, case):
    model, X, y, selection = setting(case)
    model = model.float()
    expected = OPERATORS[kind](model, F.cross_entropy, (X, y), selection, dtype=torch.float64)
    assert expected.dtype == torch.float64
    A = OPERATORS[kind](model, F.cross_entropy, (X, y), selection)
    assert A.dtype == torch.float32
    v = some(A.shape[0]).float()
    assert (A @ v).dtype == torch.float32
    assert off((A @ v).double(), expected @ v) < 1e-5
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", OPERATORS)
def test_bfloat16_weights(kind):
    model, X, y, selection = setting("mlp")
    model = model.bfloat16()
    A = OPERATORS[kind](model, F.cross_entropy, (X.bfloat16(), y), selection)
    assert A.dtype == torch.float32
    wide = copy.deepcopy(model).double()
    B = OPERATORS[kind](wide, F.cross_entropy, (X.bfloat16(), y), selection)
    v = some(A.shape[0])
    assert off((A @ v).double(), B @ v) < 1e-5


# ---------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_on_a_gpu(kind, case):
    model, X, y, selection = setting(case)
    A = OPERATORS[kind](model.cuda(), F.cross_entropy, (X, y), selection, damping=2.0)
    expected = dense(case, kind) + 2.0 * torch.eye(A.shape[0], dtype=torch.float64)
    V = some(A.shape[0], 2)
    assert A.device.type == "cuda"
    assert off((A @ V.cuda()).cpu(), expected @ V) < 1e-11
    assert off(A.diagonal().cpu(), expected.diagonal()) < 1e-11
    if kind != "hessian":
        assert off(A.solve(V.cuda()).x.cpu(), torch.linalg.solve(expected, V)) < 1e-8


# ---------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"model": len}, TypeError, "model must be a torch.nn.Module"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable"),
        ({"loss_fn": lambda z, y: z}, ValueError, r"scalar tensor.*; got shape \(11, 3\)"),
        ({"loss_fn": lambda z, y: z.sum() * float("nan")}, ValueError, "the loss is NaN"),
        ({"loss_fn": lambda z, y: 1.0}, ValueError, "scalar tensor.*; got float"),
        ({"data": 3}, TypeError, "data must be a pair"),
        ({"data": iter([])}, TypeError, "data is an iterator, which can be read only once"),
        ({"data": []}, ValueError, "data is empty"),
        ({"data": [3]}, TypeError, "batch 0 of data must be a pair"),
        ({"data": [torch.ones(3)]}, TypeError, "batch 0 of data must be a pair"),
        ({"data": (torch.ones(0, 4), torch.ones(0))}, ValueError, "data is empty"),
        ({"data": {"x": torch.ones(2, 4)}}, ValueError, "data must have 'labels' among its keys"),
        ({"data": (torch.ones(2, 4), torch.ones(3))}, ValueError, "2 inputs and 3 targets"),
        ({"data": (torch.ones(2, 4, dtype=torch.cfloat), torch.ones(2))}, TypeError, "real"),
        ({"selection": {"0": [1]}}, TypeError, "selection must be a UnitSelection"),
        ({"selection": UnitSelection({})}, ValueError, "at least one unit"),
        ({"selection": UnitSelection({"9": [1]})}, ValueError, "names layer '9'"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"weight_decay": "a"}, TypeError, "weight_decay"),
        ({"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32, torch.float64"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
    ],
)
@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_bad_arguments(kind, change, error, match):
    model, X, y, selection = setting("mlp")
    arguments = {"model": model, "loss_fn": F.cross_entropy, "data": (X, y), "selection": selection}
    with pytest.raises(error, match=match):
        OPERATORS[kind](**arguments | change)


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        (np.ones(28), TypeError, r"right factor must be a tensor; got .* ndarray"),
        (torch.ones(27), ValueError, r"shape \(28,\) or \(28, m\)"),
        (torch.ones(28, 2, 2), ValueError, r"shape \(28, 2, 2\)"),
        (torch.ones(28, dtype=torch.int64), ValueError, "floating-point"),
        (torch.ones(28, device="meta"), ValueError, "is on meta and the operator on cpu"),
    ],
)
def test_bad_vectors(other, error, match):
    with pytest.raises(error, match=match):
        operator("hessian", "mlp") @ other


def test_models_that_cannot_be_used():
    X, y = tokens(5), torch.arange(5) % 3
    with pytest.raises(ValueError, match="mode='max'"):
        HessianOperator(Bags("max").double(), F.cross_entropy, (X, y), UnitSelection({"bag": [0]}))

    class Strange(nn.Linear):
        def forward(self, x):
            return object()

    with pytest.raises(TypeError, match="the model must return a tensor"):
        HessianOperator(
            Strange(4, 3), lambda z, y: torch.zeros(()), (vectors(5), y), UnitSelection({"": [0]})
        )


def test_data_that_changes_is_noticed(monkeypatch):
    monkeypatch.setattr(_routes, "CACHE_BYTES", 0)
    model, X, y, selection = setting("mlp")
    rounds = iter([[4, 4, 3], [4, 4, 3], [4, 7]])

    def changing():
        return iter(list(zip(X.split(s := next(rounds)), y.split(s), strict=True)))

    A = HessianOperator(model, F.cross_entropy, changing, selection)
    with pytest.raises(ValueError, match="the same batches each time"):
        A @ some(A.shape[0])


def test_a_loss_that_does_not_depend_on_the_units():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            self.layers["b"](x)
            return self.layers["a"](x)

    X, y = vectors(5), torch.arange(5) % 3
    for kind, make in OPERATORS.items():
        A = make(Model(), F.cross_entropy, (X, y), UnitSelection({"layers.b": [0, 1]}), damping=0.5)
        v = some(A.shape[0])
        assert torch.equal(A @ v, 0.5 * v), kind
        assert torch.equal(A.diagonal(), torch.full_like(v, 0.5))
        assert off(A.solve(v).x, 2 * v) < WITHIN


def test_an_empty_block_of_vectors():
    A = operator("hessian", "mlp")
    assert (A @ torch.ones(A.shape[0], 0)).shape == (A.shape[0], 0)


def test_progress_is_shown_on_request(capsys):
    operator("hessian", "mlp", progress=True)
    assert "primal" in capsys.readouterr().err
    operator("hessian", "mlp")
    assert capsys.readouterr().err == ""


def test_a_diagonal_of_a_large_selection_takes_no_product_for_each_entry(monkeypatch):
    monkeypatch.setattr(gauss_newton, "MAX_BYTES", 1000)  # three samples at once
    A = operator("gauss_newton", "mlp")
    monkeypatch.setattr(A, "_product", None)
    assert off(A.diagonal(), dense("mlp", "gauss_newton").diagonal()) < WITHIN
    assert A._low_rank(20) is None  # 33 rows
    B = operator("gauss_newton", "mlp", damping=0.5)
    low = B._low_rank(33)
    R = low.project(torch.eye(B.shape[0], dtype=torch.float64))
    assert off(R.T @ (low.weights[:, None] * R), dense("mlp", "gauss_newton")) < WITHIN
