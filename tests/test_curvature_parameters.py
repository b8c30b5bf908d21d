"""Selections of single parameters, and operators on them against dense blocks in float64."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    SecantOperator,
    UnitSelection,
    all_trainable,
    per_sample_gradients,
    selection_from_dict,
)
from test_curvature_operators import CASES as UNIT_CASES
from test_curvature_operators import OPERATORS, WITHIN, Dense, Functional, off, some, vectors


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, batch_first=True, bidirectional=kind is nn.RNN)
        self.head = nn.Linear(8 if kind is nn.RNN else 4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Raw(nn.Module):
    """Parameters of no layer: a scale without dimensions, a LoRA, a list, one never used."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 5)
        self.lora_a = nn.Parameter(torch.randn(2, 4))
        self.lora_b = nn.Parameter(torch.randn(5, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shifts = nn.ParameterList([torch.randn(5), torch.randn(5)])
        self.unused = nn.Parameter(torch.randn(3))
        self.head = weight_norm(nn.Linear(5, 3))

    def forward(self, x):
        x = self.base(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T) + self.shifts[0]
        return self.head(torch.tanh(x) * self.shifts[1])


class Tied(nn.Module):
    """One matrix for an embedding and an output, and once more outside of both."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.tokens(ids).mean(1)) @ self.out.weight[:4].T)


def sequences(n):
    return torch.randn(n, 5, 3, dtype=torch.float64)


def padded():
    return nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 3))


def tokens(n):
    return torch.randint(7, (n, 5))


CASES = {name: (build, inputs, n) for name, (build, inputs, n, _) in UNIT_CASES.items()} | {
    "gru": (lambda: Recurrent(nn.GRU), sequences, 3),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences, 3),
    "rnn": (lambda: Recurrent(nn.RNN), sequences, 3),
    "raw": (Raw, vectors, 3),
    "tied": (Tied, tokens, 7),
    "padded": (padded, tokens, 3),
}


def setting(case, n=11):
    build, inputs, n_classes = CASES[case]
    torch.manual_seed(7)
    model = build().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    for parameter in model.parameters():  # also those that start at 0 or 1
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    rng = np.random.default_rng(3)
    mask = {}
    for name, parameter in model.named_parameters():
        n_entries = parameter.numel()
        mask[name] = rng.permutation(n_entries)[: max(1, min(n_entries // 3, 7))]
    last = [*mask][-1]
    mask[last] = range(model.get_parameter(last).numel())  # all of it
    return model, inputs(n), torch.arange(n) % n_classes, ParameterSelection(mask)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # jacrev of the weight norm
@pytest.mark.parametrize("case", CASES)
def test_block_of_the_whole_models_curvature(case):
    model, X, y, mask = setting(case)
    whole = Dense(model, X, y, mask)
    p = len(mask)
    V = some(p, 3)
    for kind, operator in OPERATORS.items():
        if case == "raw" and kind == "hessian":
            continue  # refused, see below
        A, expected = operator(model, F.cross_entropy, (X, y), mask), getattr(whole, kind)()
        assert A.shape == (p, p)
        assert A.selection == mask
        assert off(A @ V, expected @ V) < WITHIN, kind
        assert off(A.to_dense(), expected) < WITHIN, kind
        assert off(A.diagonal(), expected.diagonal()) < WITHIN, kind
        damped = operator(model, F.cross_entropy, (X, y), mask, damping=0.5)
        solution = torch.linalg.solve(expected + 0.5 * torch.eye(p), V[:, 0])
        if kind != "hessian":  # which may be indefinite
            assert off(damped.solve(V[:, 0]).x, solution) < 1e-9, kind
            assert off(damped.solve(V[:, 0], method="cg").x, solution) < 1e-8, kind


@pytest.mark.parametrize("case", ["mlp", "convolutions", "block", "norms", "gru", "raw", "tied"])
def test_secant_block(case):
    model, X, y, mask = setting(case)
    kind = GaussNewtonOperator if case == "raw" else HessianOperator
    curvature = kind(model, F.cross_entropy, (X, y), mask).to_dense()
    step = (
        torch.linalg.eigh(curvature).eigenvectors[:, -3:] @ some(3) / 100
    )  # of positive curvature
    A = SecantOperator(model, F.cross_entropy, (X, y), mask, steps=step, tolerance=0.0)

    def gradient(model):
        loss = F.cross_entropy(model(X), y)
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(loss, parameters.values(), materialize_grads=True)
        return mask.gather(dict(zip(parameters, found, strict=True)), model=model)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        moved = copy.deepcopy(model)
        mask.add_(moved, step)
        change = gradient(moved) - gradient(model)
    v = some(len(mask), seed=4)
    # The change is a difference of gradients, as exact as a hundredth of them.
    assert off(A @ v, change * (change @ v) / (change @ step)) < 1e-9
    assert off(A @ step, change) < 1e-9


@pytest.mark.parametrize("case", ["mlp", "block", "convolutions", "gru"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_all_parameters_of_units_are_the_block_of_the_units(kind, case):
    model, X, y, _ = setting(case)
    units = UnitSelection.all(model)
    mask = ParameterSelection.from_units(units, model)
    by_unit = OPERATORS[kind](model, F.cross_entropy, (X, y), units).to_dense()
    by_entry = OPERATORS[kind](model, F.cross_entropy, (X, y), mask).to_dense()
    where = mask.layout(model).numbers_in(units.layout(model))
    assert sorted(where.tolist()) == list(range(len(by_unit)))
    assert off(by_entry, by_unit[where][:, where]) < WITHIN


@pytest.mark.parametrize("case", ["mlp", "convolutions", "gru", "padded"])
def test_gradients_of_samples(case):
    model, X, y, mask = setting(case)
    expected = Dense(model, X, y, mask).gradients()
    found = list(per_sample_gradients(model, F.cross_entropy, (X, y), mask, max_bytes=2000))
    assert sum(each.n for each in found) == len(X)
    v, w = some(len(mask)), some(len(X))
    assert off(torch.cat([each.dense() for each in found]), expected) < WITHIN
    assert off(torch.cat([each.dot(v) for each in found]), expected @ v) < WITHIN
    parts = torch.split(w, [each.n for each in found])
    pairs = list(zip(found, parts, strict=True))
    assert off(sum(g.combine(part) for g, part in pairs), w @ expected) < WITHIN
    assert off(sum(g.combine_squares(part) for g, part in pairs), w @ expected**2) < WITHIN


def test_hessian_of_raw_parameters():
    model, X, y, mask = setting("raw")
    normed = {n: i for n, i in mask.indices.items() if "parametrizations" in n}
    with pytest.raises(ValueError, match="second derivatives PyTorch computes wrongly"):
        HessianOperator(model, F.cross_entropy, (X, y), ParameterSelection(normed))
    mask -= ParameterSelection(normed)
    A = HessianOperator(model, F.cross_entropy, (X, y), mask)
    assert off(A.to_dense(), Dense(model, X, y, mask).hessian()) < WITHIN


@pytest.mark.parametrize("runs", ["scattered", "long"])
def test_restricted_fisher(runs):
    model, X, y, _ = setting("convolutions")
    whole = FisherOperator(model, F.cross_entropy, (X, y), UnitSelection.all(model), damping=0.1)
    every = ParameterSelection.of(model)
    if runs == "scattered":
        few = ParameterSelection({n: i[::3] for n, i in every.indices.items()})
    else:
        few = ParameterSelection({"grouped.weight": range(20, 70), "head.bias": [0, 2]})
    part = whole.restrict(few)
    alone = FisherOperator(model, F.cross_entropy, (X, y), few, damping=0.1)
    v = some(len(few))
    assert off(part @ v, alone @ v) < WITHIN
    assert off(part.to_dense(), alone.to_dense()) < WITHIN
    assert off(part.diagonal(), alone.diagonal()) < WITHIN
    one = FisherOperator(model, F.cross_entropy, (X, y), UnitSelection({"first": [0]}))
    with pytest.raises(ValueError, match=r"part of the operator's; that lacks \d+ of its"):
        one.restrict(few)


def test_units_outside_of_their_layers_forward_pass_are_displaced_as_a_whole():
    torch.manual_seed(0)
    model, X, y = Functional().double(), vectors(9), torch.arange(9) % 3
    mask = ParameterSelection({"a.weight": [1, 7, 8], "b.weight": [0], "b.bias": [2]})
    A = HessianOperator(model, F.cross_entropy, (X, y), mask)
    assert "whole gradients of a.weight" in A.plan
    assert off(A.to_dense(), Dense(model, X, y, mask).hessian()) < WITHIN


# ---------------------------------------------------------------------------------------------
# The selection


def test_a_set_of_entries():
    a = ParameterSelection({"w": [4, 0, 2], "b": range(3)})
    b = ParameterSelection({"w": torch.tensor([2, 3]), "c": np.array([1])})
    assert a.indices["w"].tolist() == [0, 2, 4]
    assert a.indices["w"].dtype == np.int64
    assert len(a) == 6
    assert a.counts == {"w": 3, "b": 3}
    assert (a | b).to_dict() == {"parameters": {"w": "0,2-4", "b": "0-2", "c": "1"}}
    assert (a & b).to_dict() == {"parameters": {"w": "2"}}
    assert (a - b).to_dict() == {"parameters": {"w": "0,4", "b": "0-2"}}
    assert ("w", 2) in a
    assert ("w", 3) not in a
    assert ("w", 9) not in a
    assert ("b", 2) in a
    assert ("b", 3) not in a
    assert ("c", 0) not in a
    assert "w" not in a
    assert a == ParameterSelection({"b": [2, 0, 1], "w": [0, 2, 4]})
    assert hash(a) == hash(ParameterSelection({"b": [2, 0, 1], "w": [0, 2, 4]}))
    assert a != b
    assert a != ParameterSelection({"w": [0, 2, 5], "b": range(3)})
    assert a != "w"
    assert not ParameterSelection({})
    assert repr(a) == "ParameterSelection(6 entries of 2 parameters)"
    with pytest.raises(TypeError):
        a | UnitSelection({"w": [0]})
    with pytest.raises(ValueError):  # read-only
        a.indices["w"][0] = 1


def test_it_goes_through_json_and_files(tmp_path):
    mask = ParameterSelection({"a.w": [3, 4, 5, 9], "b": range(7), "c.0": [0]})
    assert ParameterSelection.from_dict(mask.to_dict()) == mask
    assert selection_from_dict(mask.to_dict()) == mask
    units = UnitSelection({"parameters": [1]})
    assert selection_from_dict(units.to_dict()) == units
    mask.save(tmp_path / "mask.safetensors")
    assert ParameterSelection.load(tmp_path / "mask.safetensors") == mask
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no parameter selection 1"):
        ParameterSelection.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        ParameterSelection.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        ParameterSelection.load(tmp_path / "none")
    for broken in ({"parameters": {"w": [1]}}, {"parameters": {"w": "a-b"}}):
        with pytest.raises(ValueError, match="must be ranges"):
            ParameterSelection.from_dict(broken)
    with pytest.raises(ValueError, match="must be the dict of a ParameterSelection"):
        ParameterSelection.from_dict({"w": [1]})


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([("w", [0])], TypeError, "must map parameter names"),
        ({3: [0]}, TypeError, "names must be strings"),
        ({"w": 3}, TypeError, "must be integers"),
        ({"w": "0-3"}, TypeError, "must be integers"),
        ({"w": [0.5]}, TypeError, "must be integers in one dimension; got float64"),
        ({"w": [[0, 1]]}, TypeError, "in one dimension"),
        ({"w": [True]}, TypeError, "got bool"),
        ({"w": []}, ValueError, "no indices are given for parameter 'w'"),
        ({"w": range(0)}, ValueError, "no indices are given for parameter 'w'"),
        ({"w": [1, -2]}, ValueError, "at least 0; got -2"),
        ({"w": [1, 2, 1]}, ValueError, "repeated, 1 for instance"),
    ],
)
def test_what_is_no_selection(indices, error, message):
    with pytest.raises(error, match=message):
        ParameterSelection(indices)


def test_gather_and_scatter():
    model, *_, mask = setting("convolutions")
    layout = mask.layout(model)
    vector = mask.gather(model).detach()
    flat = {n: p.detach().flatten() for n, p in model.named_parameters()}
    parts = [flat[n][torch.tensor(i)] for n, i in mask.indices.items()]
    assert torch.equal(vector, torch.cat(parts))
    assert mask.size(model) == layout.size == len(mask)
    assert list(layout.parameters) == [n for n, _ in model.named_parameters()]
    rest = ParameterSelection.of(model) - mask
    before = rest.gather(model).detach().clone()
    mask.scatter_(model, torch.arange(len(mask)))
    assert mask.gather(model).tolist() == list(range(len(mask)))
    mask.add_(model, torch.ones(len(mask)), alpha=-2)
    assert mask.gather(model).tolist() == [k - 2.0 for k in range(len(mask))]
    assert torch.equal(rest.gather(model), before)
    gradients = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    assert mask.gather(gradients, model=model).sum() == len(mask)
    across = {"first.weight": torch.zeros(3, 2, 4, 3).transpose(0, 2)}  # not contiguous
    some_entries = ParameterSelection({"first.weight": [0, 5, 71]})
    some_entries.scatter_(across, torch.tensor([1.0, 2, 3]), model=model)
    some_entries.add_(across, torch.ones(3), model=model)
    assert across["first.weight"].flatten()[[0, 5, 71]].tolist() == [2, 3, 4]
    assert across["first.weight"].sum() == 9
    with pytest.raises(ValueError, match="one entry for each coordinate"):
        mask.scatter_(model, torch.zeros(2))
    with pytest.raises(TypeError, match="model must be given where source is a mapping"):
        mask.gather(gradients)
    empty = ParameterSelection({}).gather(model)
    assert empty.shape == (0,)


def test_all_of_a_model():
    model, *_ = setting("raw")
    every = ParameterSelection.of(model)
    assert every.counts == {n: p.numel() for n, p in model.named_parameters()}
    assert all_trainable(model) == every
    model.lora_a.requires_grad_(False)
    assert "lora_a" not in ParameterSelection.of(model).counts
    tied, *_ = setting("tied")
    assert ParameterSelection.of(tied).counts == {"tokens.weight": 28, "out.bias": 7}
    assert all_trainable(tied) == UnitSelection.all(tied)
    padding, *_ = setting("padded")
    assert "0.weight" in ParameterSelection.of(padding).counts
    assert ("0.weight", 8) not in ParameterSelection.of(padding)  # of row 2
    assert ("0.weight", 12) in ParameterSelection.of(padding)
    assert all_trainable(padding) == UnitSelection.all(padding)
    held = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3))
    assert list(ParameterSelection.of(held).counts) == ["1.weight", "1.bias"]
    assert all_trainable(held) == UnitSelection.all(held)


def test_from_units():
    model, *_ = setting("block")
    units = UnitSelection({"wide": [0, 4], "tokens": [1], "norm": [2], "attention.in_proj": [3]})
    mask = ParameterSelection.from_units(units, model)
    marks = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    units.scatter_(marks, torch.ones(units.size(model)), model=model)
    assert {n: i.tolist() for n, i in mask.indices.items()} == {
        n: found for n, t in marks.items() if (found := t.flatten().nonzero()[:, 0].tolist())
    }
    with pytest.raises(TypeError, match="must be a UnitSelection"):
        ParameterSelection.from_units(mask, model)


def test_the_largest_entries():
    values = {"a": torch.tensor([[1.0, -3.0], [2.0, 2.0]]), "b": torch.tensor([-2.0, 0.0])}
    chosen = [ParameterSelection.top(values, k).to_dict()["parameters"] for k in range(1, 7)]
    assert chosen == [
        {"a": "1"},
        {"a": "1-2"},
        {"a": "1-3"},
        {"a": "1-3", "b": "0"},
        {"a": "0-3", "b": "0"},
        {"a": "0-3", "b": "0-1"},
    ]
    with pytest.raises(ValueError, match="k must be"):
        ParameterSelection.top(values, 7)
    with pytest.raises(ValueError, match="NaN"):
        ParameterSelection.top({"a": torch.tensor([np.nan])}, 1)
    with pytest.raises(TypeError, match="must map"):
        ParameterSelection.top(torch.ones(3), 1)


def test_what_a_model_does_not_have():
    model, *_ = setting("raw")
    tied, *_ = setting("tied")
    norm = nn.Sequential(nn.BatchNorm1d(2))
    held = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0))
    shared = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared[1].weight = nn.Parameter(shared[0].weight.data)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for owner, indices, message in (
        (model, {"lora": [0]}, "which this model does not have; is it 'lora_.'"),
        (model, {"scale": [1]}, r"entry 1 of parameter 'scale', which has 1, of shape \(\)"),
        (tied, {"out.weight": [0]}, "which is 'tokens.weight' under another name; take that one"),
        (norm, {"0.running_mean": [0]}, "which is a buffer"),
        (held, {"0.weight": [0]}, "cannot be selected: max_norm"),
        (frozen, {"bias": [0]}, "cannot be selected: it does not require gradients"),
        (nn.LazyLinear(3), {"weight": [0]}, "cannot be selected: it is not initialised"),
        (shared, {"0.weight": [0]}, "share memory without being one object"),
    ):
        with pytest.raises(ValueError, match=message):
            ParameterSelection(indices).size(owner)
    with pytest.raises(ValueError, match="at least one parameter; it is empty"):
        GaussNewtonOperator(
            model,
            F.cross_entropy,
            (torch.zeros(2, 4), torch.zeros(2).long()),
            ParameterSelection({}),
        )
