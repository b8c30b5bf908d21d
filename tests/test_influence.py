"""Influence and self-influence: the size of leaving one out, and their definition."""

import functools
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcodec_ext.curvature import HessianOperator, ParameterSelection, UnitSelection
from lcodec_ext.unlearning import (
    Influence,
    TrainingStatistics,
    Unlearner,
    influence,
    per_token_loss,
    self_influence,
)

MODULE = importlib.import_module("lcodec_ext.unlearning.influence")  # a function has its name
EXACT = {"curvature": "gauss_newton", "damping": 0.0, "rtol": 1e-10}


# ---------------------------------------------------------------------------------------------
# Leaving one out of convex models


def digits():
    x, y = load_digits(return_X_y=True)
    x = (x[:800] - x[:800].mean(0)) / 16
    x = x @ np.linalg.svd(x, full_matrices=False)[2][:8].T
    return torch.tensor(x), torch.tensor(y[:800]), nn.Linear(8, 10), F.cross_entropy, 0.02


def breast_cancer():
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    y = torch.tensor(y[:, None]).double()
    return torch.tensor(x[:, :6]), y, nn.Linear(6, 1), F.binary_cross_entropy_with_logits, 0.1


def diabetes():
    x, y = load_diabetes(return_X_y=True)
    y = torch.tensor((y - y.mean()) / y.std())[:, None]
    return torch.tensor(x * 20), y, nn.Linear(10, 1), F.mse_loss, 0.05


CONVEX = {"softmax": digits, "logistic": breast_cancer, "ridge": diabetes}


class Trained:
    """A linear model at the minimum of its objective, by Newton's method."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.x, self.y, layer, self.loss_fn, self.decay = CONVEX[name]()
        self.model = layer.double()
        start = nn.utils.parameters_to_vector(self.model.parameters()).detach() * 0
        self.w = self.fit(slice(None), start)
        nn.utils.vector_to_parameters(self.w, self.model.parameters())

    @property
    def data(self):
        return self.x, self.y

    def outputs(self, w, x):
        split = self.model.weight.numel()
        return F.linear(x, w[:split].view_as(self.model.weight), w[split:])

    def fit(self, some, w):
        x, y = self.x[some], self.y[some]

        def objective(w):
            return self.loss_fn(self.outputs(w, x), y) + self.decay / 2 * w.square().sum()

        for _ in range(30):
            gradient = torch.func.grad(objective)(w)
            if gradient.norm() < 1e-12:
                return w
            w = w - torch.linalg.solve(torch.func.jacrev(torch.func.grad(objective))(w), gradient)
        raise AssertionError("Newton's method did not converge")

    def losses(self, w):
        with torch.no_grad():
            each = self.loss_fn(self.outputs(w, self.x), self.y, reduction="none")
        return each.flatten()

    def left_out(self, numbers):
        """By how much all losses change when each sample is left out, shape (n, numbers)."""
        everyone, before = torch.arange(len(self.x)), self.losses(self.w)
        fits = [self.fit(everyone != k, self.w) for k in numbers]
        return torch.stack([self.losses(w) - before for w in fits], 1)


def agreement(predicted, true):
    r = np.corrcoef(predicted.flatten(), true.flatten())[0, 1]
    return r, float((predicted * true).sum() / predicted.square().sum())


@pytest.fixture(scope="module", params=CONVEX)
def convex(request):
    return Trained(request.param)


def test_influences_are_what_leaving_one_out_does(convex):
    n = len(convex.x)
    asked = slice(1, None, 40)
    queries = convex.x[asked], convex.y[asked]
    found = influence(
        convex.model, convex.data, queries, convex.loss_fn, weight_decay=convex.decay, **EXACT
    )
    own = self_influence(
        convex.model,
        convex.data,
        convex.loss_fn,
        weight_decay=convex.decay,
        curvature="gauss_newton",
        damping=0.0,
    )
    numbers = sorted({*range(0, n, n // 25), *own.samples(5)})
    true = convex.left_out(numbers)
    for predicted, changes in (
        (found.values[:, numbers], true[asked]),
        (found.mean[numbers], true[asked].mean(0)),
        (own.values[numbers], true[numbers].diagonal()),
    ):
        r, slope = agreement(predicted, changes)
        assert r > 0.99
        assert 0.95 < slope < 1.15


def test_the_term_of_the_weight_decay_is_that_of_the_other_samples(convex):
    """At the minimum weight_decay w is minus the mean gradient: influences on a query sum to 0."""
    queries = convex.x[:3], convex.y[:3]
    found = influence(
        convex.model, convex.data, queries, convex.loss_fn, weight_decay=convex.decay, **EXACT
    )
    assert found.values.sum(1).abs().max() < 1e-8 * found.values.abs().sum(1).min()


def test_means_over_tokens_without_a_sample():
    """The objective is the mean over all tokens: a sample takes its tokens with it."""
    torch.manual_seed(4)
    x, length = torch.randn(300, 5, 3).double(), torch.randint(0, 6, (300,))
    y = (x @ torch.randn(3, 4).double() + torch.randn(300, 5, 4)).argmax(2)
    y[torch.arange(5) >= length[:, None]] = -100
    layer, decay = nn.Linear(3, 4).double(), 0.05

    def sums(w, some=slice(None)):
        logits = F.linear(x[some], w[:12].view(4, 3), w[12:])
        return F.cross_entropy(logits.movedim(2, 1), y[some], reduction="none").sum(1)

    def fit(some, w):
        def objective(w):
            return sums(w, some).sum() / length[some].sum() + decay / 2 * w.square().sum()

        for _ in range(8):
            gradient = torch.func.grad(objective)
            w = w - torch.linalg.solve(torch.func.jacrev(gradient)(w), gradient(w))
        assert gradient(w).norm() < 1e-12
        return w

    everyone = torch.arange(300)
    w = fit(everyone, torch.zeros(16).double())
    nn.utils.vector_to_parameters(w, layer.parameters())
    numbers = [*range(0, 300, 12), int(length.argmin())]
    changes = torch.stack([sums(fit(everyone != k, w)) - sums(w) for k in numbers], 1)
    queries, options = slice(0, 40), {"weight_decay": decay}
    for loss_fn in (per_token_loss(), F.cross_entropy):  # of the second it is found out
        model = layer if loss_fn is not F.cross_entropy else Swapped(layer)
        asked = x[queries], y[queries]
        found = influence(model, (x, y), asked, loss_fn, **EXACT, **options)
        own = self_influence(
            model, (x, y), loss_fn, curvature="gauss_newton", damping=0.0, **options
        )
        once = influence(model, (x, y), asked, loss_fn, aggregate=True, **EXACT, **options)
        torch.testing.assert_close(once.mean, found.mean)
        each = changes[queries] / length[queries, None].clamp(min=1)
        mean = changes[queries].sum(0) / length[queries].sum()
        alone = torch.stack([changes[k, j] for j, k in enumerate(numbers)])
        for predicted, true in (
            (found.values[:, numbers], each),
            (found.mean[numbers], mean),
            (own.values[numbers], alone / length[numbers].clamp(min=1)),
        ):
            r, slope = agreement(predicted, true)
            assert r > 0.99
            assert 0.95 < slope < 1.1
        assert (found.values[length[queries] == 0] == 0).all()
        assert own.values[numbers[-1]] == 0
    statistics = TrainingStatistics.collect(layer, (x, y), per_token_loss())
    there = influence(
        layer, (x, y), asked, per_token_loss(), statistics=statistics, damping=0.0, **options
    )
    torch.testing.assert_close(there.values, found.values)
    plain = TrainingStatistics.collect(layer, (x[:, 0], y[:, 0].clamp(min=0)), F.cross_entropy)
    with pytest.raises(ValueError, match="statistics are of a plain mean over samples"):
        influence(layer, (x, y), asked, per_token_loss(), statistics=plain)


class Swapped(nn.Module):
    """Logits with the classes along the second axis."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).movedim(2, 1)


# ---------------------------------------------------------------------------------------------
# The definition, on a small network


@pytest.fixture(scope="module")
def network():
    """A model with a mask, weight decays by parameter, and all that a definition needs."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)
    ).double()
    x, y = torch.randn(41, 1, 4, 4).double(), torch.randint(0, 4, (41,))
    return model, (x, y), (torch.randn(7, 1, 4, 4).double(), torch.randint(0, 4, (7,)))


def gradients(model, data, selection):
    rows = []
    for x, y in zip(*data, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        rows.append(selection.gather({k: p.grad for k, p in model.named_parameters()}, model=model))
    model.zero_grad()
    return torch.stack(rows)


DECAY = {"0.weight": 0.02, "3.weight": 0.05, "5.weight": 0.1, "5.bias": 0.01}


def by_definition(model, data, queries, selection, A, decay=DECAY):
    weights = {k: p.detach() * decay.get(k, 0.0) for k, p in model.named_parameters()}
    removed = gradients(model, data, selection) + selection.gather(weights, model=model)
    solved = torch.linalg.solve(A, removed.T) / (len(data[1]) - 1)
    return gradients(model, queries, selection) @ solved


@pytest.mark.parametrize("selection", [None, UnitSelection({"0": [1], "5": [0, 2, 3]})])
@pytest.mark.parametrize("curvature", ["ekfac", "gauss_newton", "fisher"])
def test_definition(network, curvature, selection):
    model, data, queries = network
    options = {"curvature": curvature, "damping": 0.03, "weight_decay": DECAY}
    options["selection"] = selection
    found = influence(model, data, queries, F.cross_entropy, rtol=1e-12, **options)
    chosen = selection or UnitSelection.all(model)
    given = {"damping": 0.03, "weight_decay": DECAY}
    operator = MODULE.OPERATORS[curvature](model, F.cross_entropy, data, chosen, **given)
    expected = by_definition(model, data, queries, chosen, operator.to_dense())
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)
    assert found.n_parameters == chosen.size(model)
    assert found.residual < 1e-8
    both = by_definition(model, data, data, chosen, operator.to_dense())
    own = self_influence(model, data, F.cross_entropy, **options)
    torch.testing.assert_close(own.values, both.diagonal(), rtol=1e-7, atol=1e-10)


def test_hessian(network):
    model, data, queries = network
    options = {"curvature": "hessian", "damping": 2.0}
    found = influence(model, data, queries, F.cross_entropy, rtol=1e-12, **options)
    chosen = UnitSelection.all(model)
    A = HessianOperator(model, F.cross_entropy, data, chosen, damping=2.0).to_dense()
    expected = by_definition(model, data, queries, chosen, A, {})
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)


def test_single_parameters(network):
    model, data, queries = network
    some = ParameterSelection({"5.weight": [0, 3, 7, 19], "0.bias": [1]})
    options = {"curvature": "gauss_newton", "selection": some, "damping": 0.1}
    found = influence(model, data, queries, F.cross_entropy, **options)
    operator = MODULE.OPERATORS["gauss_newton"](model, F.cross_entropy, data, some, damping=0.1)
    expected = by_definition(model, data, queries, some, operator.to_dense(), {})
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)


def test_the_largest_of_each_query_are_found_in_batches(network):
    model, data, queries = network
    found = influence(model, data, queries, F.cross_entropy, top_k=6, batch_size=4)
    assert found.helpful.indices.shape == found.harmful.values.shape == (7, 6)
    order = torch.sort(found.values, dim=1, stable=True).indices
    assert torch.equal(found.harmful.indices, order[:, :6])
    assert torch.equal(found.harmful.values, found.values.gather(1, order[:, :6]))
    down = torch.sort(found.values, dim=1, descending=True, stable=True).indices
    assert torch.equal(found.helpful.indices, down[:, :6])
    torch.testing.assert_close(found.mean, found.values.mean(0))
    several = influence(model, data, queries, F.cross_entropy, top_k=100, batch_size=100)
    assert several.helpful.indices.shape == (7, 41)
    torch.testing.assert_close(several.values, found.values)


def test_samples_of_equal_influence_are_in_their_own_order(network):
    model, (x, y), queries = network
    same = x[:1].expand(20, -1, -1, -1).clone(), y[:1].expand(20).clone()
    found = influence(model, same, queries, F.cross_entropy, top_k=5, batch_size=3)
    rounded = found.values.round(decimals=10)
    assert (rounded == rounded[:, :1]).all()
    best = MODULE._Best(3, 1)
    for start in (0, 4):
        best.add(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), start)
    assert best.ranked.indices.tolist() == [[1, 2, 5]]


def test_parts_of_the_work_do_not_show(network, monkeypatch):
    """Queries by blocks, gradients as factors, and pairs that are not kept."""
    model, data, queries = network
    whole = influence(model, data, queries, F.cross_entropy)
    row = 8 * UnitSelection.all(model).size(model)
    monkeypatch.setattr(MODULE, "QUERY_BYTES", 3 * row)
    monkeypatch.setattr(MODULE, "DENSE_BYTES", 1)
    found = influence(model, data, queries, F.cross_entropy)
    torch.testing.assert_close(found.values, whole.values)
    assert torch.equal(found.harmful.indices, whole.harmful.indices)
    monkeypatch.setattr(MODULE, "VALUES_BYTES", 8 * 7 * 41 - 1)
    found = influence(model, data, queries, F.cross_entropy)
    torch.testing.assert_close(found.mean, whole.mean)
    assert torch.equal(found.helpful.indices, whole.helpful.indices)
    with pytest.raises(ValueError, match=r"41 training samples on 7 queries .* larger top_k"):
        _ = found.values
    own = self_influence(model, data, F.cross_entropy)
    monkeypatch.undo()
    torch.testing.assert_close(own.values, self_influence(model, data, F.cross_entropy).values)


class Recurrent(nn.Module):
    """Its gradients of samples have no factors."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(4, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def test_gradients_without_factors(network):
    _, data, queries = network
    torch.manual_seed(2)
    model = Recurrent().double()
    options = {"curvature": "gauss_newton", "damping": 0.1, "weight_decay": 0.05}
    found = influence(model, data, queries, F.cross_entropy, batch_size=8, **options)
    chosen = ParameterSelection.of(model)
    operator = MODULE.OPERATORS["gauss_newton"](
        model, F.cross_entropy, data, chosen, damping=0.1, weight_decay=0.05
    )
    decay = {name: 0.05 for name, _ in model.named_parameters()}
    expected = by_definition(model, data, queries, chosen, operator.to_dense(), decay)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)


def test_the_mean_loss_of_queries_is_one_query(network):
    model, data, queries = network
    each = influence(model, data, queries, F.cross_entropy)
    found = influence(model, data, queries, F.cross_entropy, aggregate=True)
    assert found.values.shape == (1, 41)
    torch.testing.assert_close(found.mean, each.mean)
    assert found.samples(4) == found.samples(4, query=0) == each.samples(4)


def test_data_of_every_form_and_unchanged_model(network):
    model, (x, y), queries = network
    before = {k: t.clone() for k, t in model.state_dict().items()}
    model.train()
    whole = influence(model, (x, y), queries, F.cross_entropy)
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    for train in (TensorDataset(x, y), loader, list(zip(x, y, strict=True))):
        found = influence(model, train, DataLoader(TensorDataset(*queries)), F.cross_entropy)
        torch.testing.assert_close(found.values, whole.values)
    assert model.training
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        return self.a(x), self.b(x)


def test_losses_of_several_outputs():
    torch.manual_seed(3)
    model, x = Both().double(), torch.randn(30, 4).double()
    y = torch.randint(0, 3, (30,)), torch.randn(30, 1).double()

    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    few = x[:4], tuple(t[:4] for t in y)
    options = {"curvature": "gauss_newton", "damping": 0.1}
    found = influence(model, (x, y), few, loss_fn, **options)
    own = self_influence(model, (x, y), loss_fn, **options)
    torch.testing.assert_close(found.values[:, :4].diagonal(), own.values[:4])
    assert (own.values > 0).all()


# ---------------------------------------------------------------------------------------------
# Curvature of training time


@pytest.mark.parametrize("kind", ["gauss_newton", "fisher", "ekfac"])
def test_statistics_stand_for_the_curvature(network, kind, monkeypatch):
    model, data, queries = network
    statistics = TrainingStatistics.collect(model, data, F.cross_entropy, curvature=kind)
    options = {"damping": 0.02, "weight_decay": DECAY}
    units = UnitSelection({"0": [0, 2], "5": [1]})
    for selection in (None, units):
        there = {**options, "statistics": statistics, "selection": selection}
        found = influence(model, data, queries, F.cross_entropy, **there)
        A = statistics.operator(
            model, F.cross_entropy, None, selection or UnitSelection.all(model), **options
        ).to_dense()
        chosen = selection or UnitSelection.all(model)
        expected = by_definition(model, data, queries, chosen, A)
        torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)
        assert found.curvature == kind
        own = self_influence(model, data, F.cross_entropy, **there)
        both = by_definition(model, data, data, chosen, A)
        torch.testing.assert_close(own.values, both.diagonal(), rtol=1e-7, atol=1e-10)
    if kind != "ekfac":  # whose draws are other ones
        here = influence(
            model, data, queries, F.cross_entropy, curvature=kind, rtol=1e-12, **options
        )
        whole = influence(model, data, queries, F.cross_entropy, statistics=statistics, **options)
        torch.testing.assert_close(whole.values, here.values, rtol=1e-7, atol=1e-10)
    monkeypatch.setattr(MODULE, "OPERATORS", {})  # no curvature is made
    some = data[0][:10], data[1][:10]
    monkeypatch.setattr(MODULE, "check_choice", lambda *_: None)
    part = influence(model, some, queries, F.cross_entropy, statistics=statistics, **options)
    monkeypatch.undo()
    whole = influence(model, data, queries, F.cross_entropy, statistics=statistics, **options)
    torch.testing.assert_close(part.values, whole.values[:, :10])


def test_statistics_of_epochs(network):
    _, data, queries = network
    work = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).double()
    snapshots = []
    for _ in range(3):
        snapshots.append(TrainingStatistics.snapshot(work, data, F.cross_entropy))
        with torch.no_grad():
            for p in work.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    snapshots.append(TrainingStatistics.snapshot(work, data, F.cross_entropy))
    statistics = TrainingStatistics.from_epochs(snapshots, len(data[1]))
    options = {"statistics": statistics, "damping": 0.1}
    found = influence(work, data, queries, F.cross_entropy, **options)
    chosen = UnitSelection.all(work)
    A = statistics.operator(work, F.cross_entropy, None, chosen, damping=0.1).to_dense()
    expected = by_definition(work, data, queries, chosen, A, {})
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-9)
    own = self_influence(work, data, F.cross_entropy, **options)
    both = by_definition(work, data, data, chosen, A, {})
    torch.testing.assert_close(own.values, both.diagonal(), rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# What results are used for


@pytest.fixture(scope="module")
def mislabelled():
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x, y = x[:500].float() / 16, y[:500].clone()
    wrong = torch.arange(500) % 20 == 0
    y[wrong] = (y[wrong] + 3) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer, (x, y), wrong


def test_wrong_labels_are_found_and_deleted(mislabelled):
    model, optimizer, data, wrong = mislabelled
    found = self_influence(model, data, F.cross_entropy, weight_decay=optimizer)
    assert roc_auc_score(wrong, found.values) > 0.98
    numbers = found.samples(25)
    assert found.values[numbers].tolist() == sorted(found.values.tolist(), reverse=True)[:25]
    stream = Unlearner(model, data, F.cross_entropy, weight_decay=1e-3, damping=0.03)
    assert stream.remove(found.samples(10)).n_forget == 10


def test_samples_are_those_of_negative_influence(mislabelled):
    model, optimizer, data, _ = mislabelled
    queries = data[0][:5], data[1][:5]
    found = influence(model, data, queries, F.cross_entropy, weight_decay=optimizer, top_k=20)
    numbers = found.samples(10_000)
    assert numbers == [i for i in torch.argsort(found.mean).tolist() if found.mean[i] < 0]
    assert found.samples(3) == numbers[:3]
    own = found.samples(4, query=2)
    assert own == found.harmful.indices[2, :4].tolist()
    assert (found.values[2, own] < 0).all()
    with pytest.raises(ValueError, match="k must be at most 20, the top_k"):
        found.samples(21, query=2)
    with pytest.raises(ValueError, match="query must be an integer from 0 to 4; got 5"):
        found.samples(3, query=5)
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        found.samples(0)
    positive = Influence(found.mean.abs(), found.helpful, found.helpful, 1, "ekfac", "", 0.0, 0.0)
    assert positive.samples(5) == positive.samples(5, query=0) == []


def test_frames_and_representations(mislabelled):
    model, _, data, _ = mislabelled
    queries = data[0][:3], data[1][:3]
    found = influence(model, data, queries, F.cross_entropy, top_k=4)
    frame = found.to_frame()
    assert list(frame.columns) == ["query", "sample", "influence"]
    assert frame["query"].value_counts().to_dict() == {0: 8, 1: 8, 2: 8}
    first = frame[frame["query"] == 0]
    assert first["influence"].is_monotonic_increasing
    assert first["sample"].tolist()[:4] == found.harmful.indices[0].tolist()
    assert first["sample"].tolist()[:-5:-1] == found.helpful.indices[0].tolist()
    few = influence(model, (data[0][:3], data[1][:3]), queries, F.cross_entropy).to_frame()
    assert few["sample"].value_counts().to_dict() == {0: 3, 1: 3, 2: 3}
    most = int(found.mean.argmin())
    assert "Influence of 500 training samples on 3 queries: ekfac of 1,210 par" in repr(found)
    assert f"most harmful, on the mean loss: {most} (" in repr(found)
    own = self_influence(model, data, F.cross_entropy)
    assert own.to_frame()["sample"].tolist() == own.samples(500)
    assert own.to_frame()["influence"].is_monotonic_decreasing
    assert f"largest: {own.samples(1)[0]} (" in repr(own)


# ---------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "kfac"}, "curvature must be one of 'gauss_newton', .*got 'kfac'"),
        ({"damping": -1.0}, "damping must be a finite number >= 0; got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0"),
        ({"top_k": 0}, "top_k must be an integer >= 1; got 0"),
        ({"rtol": 0.0}, "rtol must be a positive, finite number; got 0.0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"aggregate": 1}, "aggregate must be True or False"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"statistics": 3}, "statistics must be TrainingStatistics; got int"),
        ({"queries": (torch.zeros(2, 3), torch.zeros(2))}, "queries must be like the samples"),
        ({"queries": [1, 2]}, "queries must give pairs"),
        ({"train": (torch.zeros(1, 16).double(), torch.tensor([1]))}, "at least 2 samples"),
        ({"loss_fn": nn.CrossEntropyLoss}, "pass an instance, CrossEntropyLoss"),
        ({"loss_fn": functools.partial(F.cross_entropy, reduction="sum")}, "must be the mean"),
    ],
)
def test_refusals(options, message):
    torch.manual_seed(0)
    data = torch.randn(9, 16).double(), torch.arange(9) % 4
    given = {"model": nn.Linear(16, 4).double(), "train": data, "queries": data}
    given = {"loss_fn": F.cross_entropy, **given, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        influence(**given)


def test_refusals_of_statistics(network):
    model, (x, y), queries = network
    statistics = TrainingStatistics.collect(model, (x[:20], y[:20]), F.cross_entropy)
    with pytest.raises(ValueError, match="statistics are of 20 training samples, and train has 41"):
        influence(model, (x, y), queries, F.cross_entropy, statistics=statistics)


def test_self_influence_by_iterations_is_refused(network, monkeypatch):
    model, data, _ = network
    monkeypatch.setattr(MODULE, "FORMED_UP_TO", 50)
    with pytest.raises(ValueError, match=r"at most 50 are formed; .* take 41 solves. Use curv"):
        self_influence(model, data, F.cross_entropy, curvature="gauss_newton")
    assert self_influence(model, data, F.cross_entropy).curvature == "ekfac"


def test_singular_curvature_is_refused(network):
    model, data, queries = network
    with pytest.raises(ValueError, match="more damping"):
        influence(model, data, queries, F.cross_entropy, damping=0.0)
    assert math.isfinite(influence(model, data, queries, F.cross_entropy).residual)


@pytest.mark.parametrize("curvature", ["gauss_newton", "ekfac"])
def test_queries_tell_a_mean_over_tokens(curvature):
    """The training samples are equally long, and the queries are not: each loses its own mean."""
    torch.manual_seed(0)
    model = nn.Conv1d(3, 4, 1).double()
    train = torch.randn(20, 3, 5).double(), torch.randint(0, 4, (20, 5))
    x, y = torch.randn(3, 3, 5).double(), torch.randint(0, 4, (3, 5))
    y[1, 2:] = y[2, 1:] = -100
    options = {"curvature": curvature, "damping": 1e-2, "rtol": 1e-10}
    found = influence(model, train, (x, y), F.cross_entropy, **options).values
    for k in range(3):
        alone = x[k : k + 1], y[k : k + 1]
        (one,) = influence(model, train, alone, F.cross_entropy, **options).values
        assert torch.allclose(found[k], one, rtol=1e-8, atol=1e-14)
