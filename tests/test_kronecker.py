"""EK-FAC against its definition, layer by layer, and against curvlinops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from kronecker_definition import corrected, gradients, moments
from lcodec_ext.curvature import (
    EKFACOperator,
    FisherOperator,
    GaussNewtonOperator,
    UnitSelection,
    all_trainable,
)

N = 9
KINDS = ("model", "empirical")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def exact(kind):
    """The operator whose blocks these approximate."""
    return {"model": GaussNewtonOperator, "empirical": FisherOperator}[kind]


class Tokens(nn.Module):
    """Layers over positions, whose outputs are averaged."""

    def __init__(self, first, *rest):
        super().__init__()
        self.first, self.rest = first, nn.Sequential(*rest)

    def forward(self, x):
        return self.rest(self.first(x)).flatten(1, -2).mean(1)


def spread(x, width):
    """(positions, width) of a tensor with features last."""
    return x.reshape(-1, width)


def linear(x, g):
    return spread(x, x.shape[-1]), spread(g, g.shape[-1])


def conv2d(layer):
    def unfold(x, g):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        return spread(patches.transpose(1, 2), patches.shape[1]), spread(
            g.movedim(1, -1), g.shape[1]
        )

    return unfold


def conv1d(layer):
    two = nn.Conv2d(
        1, 1, (1, *layer.kernel_size), (1, *layer.stride), (0, *layer.padding), (1, *layer.dilation)
    )
    return lambda x, g: conv2d(two)(x[:, :, None], g[:, :, None])


def embedded(x, g):
    return torch.ones(x.numel(), 1, dtype=g.dtype), spread(g, g.shape[-1])


def small(name):
    """A model, the name of its layer, how that unfolds, inputs, and how rows are found."""
    double = torch.float64
    if name == "linear":
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        return model, "0", linear, torch.randn(N, 4, dtype=double)
    if name == "linear over positions":
        model = Tokens(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        return model, "first", linear, torch.randn(N, 5, 4, dtype=double)
    if name == "more positions than rows":
        model = Tokens(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        return model, "first", linear, torch.randn(N, 2, 6, 4, dtype=double)
    if name == "no bias":
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3))
        return model, "0", linear, torch.randn(N, 4, dtype=double)
    if name == "Conv1D of transformers":
        model = Tokens(Conv1D(6, 4), nn.Tanh(), nn.Linear(6, 3))
        return model, "first", linear, torch.randn(N, 5, 4, dtype=double)
    if name == "conv2d":
        layer = nn.Conv2d(2, 6, 3, stride=2, padding=1, dilation=1)
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
        return model, "0", conv2d(layer), torch.randn(N, 2, 4, 4, dtype=double)
    if name == "conv1d":
        layer = nn.Conv1d(2, 6, 2, dilation=2)
        model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
        return model, "0", conv1d(layer), torch.randn(N, 2, 6, dtype=double)
    model = Tokens(nn.Embedding(6, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, "first", embedded, torch.randint(0, 6, (N, 5))


LAYERS = (
    "linear",
    "linear over positions",
    "more positions than rows",
    "no bias",
    "Conv1D of transformers",
    "conv2d",
    "conv1d",
    "embedding",
)


def row_gradients(model, name, rows, each):
    """The gradient by the rows of a layer and their bias, (r, D)."""
    weight = each[f"{name}.weight"]
    weight = weight.T if isinstance(model.get_submodule(name), Conv1D) else weight
    weight = weight.flatten(1)[rows]
    bias = each.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias[rows, None]], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [range(6), (1, 3, 4), (2,)], ids=["all", "some", "one"])
@pytest.mark.parametrize("name", LAYERS)
def test_definition(name, rows, kind):
    model, layer, unfold, X = small(name)
    model, rows = model.double(), [*rows]
    y = torch.randint(0, 3, (N,))
    operator = EKFACOperator(
        model,
        F.cross_entropy,
        [(X[:4], y[:4]), (X[4:], y[4:])],
        UnitSelection({layer: rows}),
        kind=kind,
    )
    matrices = [
        row_gradients(model, layer, rows, each)
        for each in gradients(model, F.cross_entropy, X, y, kind)
    ]
    A, G = moments(model, model.get_submodule(layer), F.cross_entropy, X, y, kind, unfold)
    if name == "embedding":  # rows are counted, and what reaches them has moments
        A, G = G, torch.eye(len(rows), dtype=torch.float64)
    else:
        if "bias" in dict(model.get_submodule(layer).named_parameters()):
            A = with_ones(model, layer, unfold, X, y)
        G = G[rows][:, rows]
    expected = corrected(A, G, matrices) / N
    dense = operator.to_dense()
    torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-12)
    trace = exact(kind)(model, F.cross_entropy, (X, y), UnitSelection({layer: rows})).trace()
    assert abs(operator.trace() - trace) < 1e-12
    values = torch.linalg.eigvalsh(expected)
    assert abs(operator.largest - values[-1]) < 1e-12
    assert abs(operator.least - values[0]) < 1e-12


def with_ones(model, layer, unfold, X, y):
    """The moments of the inputs, a one among them."""

    def augmented(x, g):
        x, g = unfold(x, g)
        return torch.cat([x, x.new_ones(len(x), 1)], 1), g

    return moments(
        model, model.get_submodule(layer), F.cross_entropy, X, y, "empirical", augmented
    )[0]


def diagonal_cases():
    yield "layer norm", nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4,)
    yield "group norm", nn.Sequential(nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 3)), (4, 2)
    yield "batch norm", nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 3)), (4, 2)
    yield "groups", nn.Sequential(nn.Conv1d(4, 6, 2, groups=2, bias=False), nn.Flatten()), (4, 2)
    layer = nn.ConvTranspose1d(4, 3, 2, bias=False)
    yield "transposed", nn.Sequential(layer, nn.Flatten()), (4, 1)
    yield "raw", Raw(), (5, 4)


class Raw(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4, 3))

    def forward(self, x):
        return (x @ self.scale).tanh().sum(1)


DIAGONAL = {
    "layer norm": "1",
    "group norm": "0",
    "batch norm": "0",
    "groups": "0",
    "transposed": "0",
    "raw": None,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DIAGONAL)
def test_diagonal(name, kind):
    """Layers without such factors have the exact diagonal alone."""
    _, model, shape = next(case for case in diagonal_cases() if case[0] == name)
    model = model.double()
    X, y = torch.randn(N, *shape, dtype=torch.float64), torch.randint(0, 3, (N,))
    layer = DIAGONAL[name]
    selection = all_trainable(model) if layer is None else UnitSelection.from_globs(model, layer)
    operator = EKFACOperator(model, F.cross_entropy, (X, y), selection, kind=kind)
    dense = exact(kind)(model, F.cross_entropy, (X, y), selection).to_dense()
    torch.testing.assert_close(operator.to_dense(), dense.diagonal().diag(), rtol=1e-10, atol=1e-13)
    assert ("one by one" in operator.plan) == (name == "raw")
    assert "0 Kronecker blocks" in operator.plan


class Attention(nn.Module):
    """Self-attention, or other inputs for keys and values, with a mask."""

    def __init__(self, other=False, **options):
        super().__init__()
        self.attention, self.other = nn.MultiheadAttention(4, 2, batch_first=True, **options), other
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if not self.other:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
        keys, values = x[:, 1:, : self.attention.kdim], x[:, 1:, : self.attention.vdim]
        mask = torch.triu(torch.ones(x.shape[1], keys.shape[1], dtype=torch.bool), 1)
        found, weights = self.attention(x, keys, values, attn_mask=mask)
        assert weights.shape[:2] == x.shape[:2]
        return self.head(found.mean(1))


ATTENTION = {
    "self": {},
    "without bias": {"bias": False},
    "other inputs": {"other": True},
    "other widths": {"other": True, "kdim": 3, "vdim": 2},
    "more keys": {"other": True, "add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ATTENTION)
def test_projections_of_attention(name, kind):
    """The rows of queries, keys and values, and the gradients of samples by them."""
    model = Attention(**ATTENTION[name]).double()
    X, y = torch.randn(N, 5, 4, dtype=torch.float64), torch.randint(0, 3, (N,))
    selection = UnitSelection({"attention.in_proj": [1, 2, 5, 10, 11], "attention.out_proj": [3]})
    operator = EKFACOperator(model, F.cross_entropy, (X, y), selection, kind=kind)
    made = [selection.gather(g, model=model) for g in gradients(model, F.cross_entropy, X, y, kind)]
    expected = torch.stack(made).T @ torch.stack(made) / N
    for block in operator.factors.blocks:
        place = block.places.numbers(torch.device("cpu")).flatten()
        rows = torch.eye(1, dtype=torch.float64) if block.rows is None else block.rows
        columns = torch.eye(1, dtype=torch.float64) if block.columns is None else block.columns
        Q = torch.kron(rows.contiguous(), columns.contiguous())
        values = (Q.T @ expected[place][:, place] @ Q).diagonal()
        torch.testing.assert_close(block.values.flatten() / N, values, rtol=1e-10, atol=1e-13)
    exactly = exact(kind)(model, F.cross_entropy, (X, y), selection)
    torch.testing.assert_close(exactly.to_dense(), expected, rtol=1e-10, atol=1e-13)
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(exactly @ v, expected @ v, rtol=1e-10, atol=1e-13)
    assert "one by one" not in operator.plan
    assert "whole gradients" not in exactly.plan


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_curvlinops(name, kind):
    """The same matrix, of all parameters, as another implementation makes it."""
    curvlinops = pytest.importorskip("curvlinops")
    model, _, _, X = small(name)
    model, y = model.double(), torch.randint(0, 3, (N,))
    operator = EKFACOperator(model, F.cross_entropy, (X, y), all_trainable(model), kind=kind)
    peer = curvlinops.EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        [*model.parameters()],
        [(X, y)],
        fisher_type={"model": "type-2", "empirical": "empirical"}[kind],
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    selection = all_trainable(model)
    v = torch.randn(selection.size(model), dtype=torch.float64)
    tangent = {key: torch.zeros_like(p) for key, p in model.named_parameters()}
    selection.scatter_(tangent, v, model=model)
    product = dict(zip(tangent, peer @ [*tangent.values()], strict=True))
    expected = selection.gather(product, model=model)
    torch.testing.assert_close(operator @ v, expected, rtol=1e-9, atol=1e-12)
