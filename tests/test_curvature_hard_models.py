"""Models, losses and data for which a product on selected rows is easily wrong: right, or refused.

The oracle differentiates the model itself twice, by its own parameters.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    UnitSelection,
    per_sample_gradients,
)
from lcodec_ext.curvature.routes import base as _routes

N = 9
HEAD = UnitSelection({"head": [0]})
BODY = UnitSelection({"body": [0, 2]})
BOTH = BODY | HEAD


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def by_rows(gradient, parameters, chosen):
    rows = []
    for g in gradient[chosen]:
        parts = torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts])[chosen])
    return torch.stack(rows).detach()


def chosen_entries(model, selection):
    parameters = dict(model.named_parameters())
    marks, start = {}, 0
    for name, p in parameters.items():
        marks[name] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    return [*parameters.values()], selection.gather(marks, model=model)


def dense_hessian(model, loss_fn, batches, selection):
    """Of the mean over batches, weighted with their samples."""
    model = model.eval()
    parameters, chosen = chosen_entries(model, selection)
    total, n = 0, sum(len(X) for X, _ in batches)
    for X, y in batches:
        loss = loss_fn(model(X), y) * (len(X) / n)
        parts = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
        total = total + by_rows(torch.cat([g.flatten() for g in parts]), parameters, chosen)
    return total


def sample_gradients(model, loss_fn, X, y, selection):
    model = model.eval()
    parameters, chosen = chosen_entries(model, selection)
    rows = []
    for i in range(len(X)):
        loss = loss_fn(model(X)[i : i + 1], y[i : i + 1])
        parts = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in parts])[chosen])
    return torch.stack(rows)


class Base(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, outputs)
        self.double()

    def features(self, x):
        return torch.tanh(self.body(x))


class Pointer(Base):
    """Scores of positions: the softmax runs over these, not over the outputs of the head."""

    def __init__(self):
        super().__init__(outputs=1)

    def forward(self, x):
        return self.head(self.features(x)).squeeze(-1)


class Scaled(Base):
    """The head's outputs are changed in place."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        z = self.head(self.features(x))
        self.change(z)
        return z


def first_to_zero(z):
    z[:, 0] = 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cube(Base):
    def forward(self, x):
        h = self.body(x)
        return self.head(Once.apply(h) + torch.tanh(h))


class StandardizedConvolution(nn.Conv1d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.norm(), bias)


class WithConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = StandardizedConvolution(1, 3, 2)
        self.head = nn.Linear(9, 3)
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x[:, None])).flatten(1))


class CalledWithOthers(Base):
    """The layer is called with its own parameters, and with frozen ones."""

    def forward(self, x):
        frozen = {name: p.detach() * 2 for name, p in self.body.named_parameters()}
        return self.head(self.features(x) + functional_call(self.body, frozen, (x,)))


class PartlyWithoutGradients(Base):
    def forward(self, x):
        with torch.no_grad():
            target = self.body(x)
        return self.head(self.features(x) * target)


class Sorted(Base):
    """Samples pass through the layers in an order of their own."""

    def forward(self, x):
        order = torch.argsort(x[:, 0], descending=True)
        h = self.features(x[order])
        return self.head(h)[torch.argsort(order)]


class Experts(Base):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(4, 5).double()

    def forward(self, x):
        first = x[:, 0] > 0
        h = x.new_zeros(len(x), 5)
        h[first] = torch.tanh(self.body(x[first]))
        h[~first] = torch.tanh(self.other(x[~first]))
        return self.head(h)


class Centred(Base):
    def forward(self, x):
        h = self.features(x)
        return self.head(h - h.mean(0))


class Filter(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.randn(3, dtype=torch.cdouble))

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(self.features(x)) * self.phase, n=5))


class TiedPadding(nn.Module):
    """Its row 0 is padding in the embedding, and a class in the output."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(6, 4, padding_idx=0)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.tokens.weight
        self.double()

    def forward(self, ids):
        return self.out(torch.tanh(self.body(self.tokens(ids).sum(1))))


class Leaky(Base):
    def forward(self, x):
        return F.leaky_relu_(self.head(self.features(x)), 0.3)


def plain(n=N):
    return torch.randn(n, 4).double(), torch.arange(n) % 3


def pointer(n=N):
    return torch.randn(n, 5, 4).double(), torch.arange(n) % 5


def with_hook(make_hook):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 5))
    model.add_module("tanh", nn.Tanh())
    model.add_module("head", nn.Linear(5, 3))
    model.double().head.register_forward_hook(make_hook)
    return model


HARD = {
    "pointer": (Pointer, pointer, HEAD),
    "multiplied": (lambda: Scaled(lambda z: z.mul_(3)), plain, HEAD),
    "divided": (lambda: Scaled(lambda z: z.div_(2)), plain, BOTH),
    "assigned": (lambda: Scaled(first_to_zero), plain, UnitSelection({"head": [0, 1]})),
    "squashed": (lambda: Scaled(torch.tanh_), plain, HEAD),
    "leaky": (Leaky, plain, HEAD),
    "hook in place": (lambda: with_hook(lambda m, i, o: o.mul_(3)), plain, HEAD),
    "hook": (lambda: with_hook(lambda m, i, o: o**2), plain, HEAD),
    "standardized": (WithConvolution, plain, UnitSelection({"body": [1]})),
    "other parameters": (CalledWithOthers, plain, BODY),
    "no_grad": (PartlyWithoutGradients, plain, BOTH),
    "sorted": (Sorted, plain, BOTH),
    "experts": (Experts, plain, BODY),
    "complex buffer": (Filter, plain, BODY),
    "tied padding": (
        TiedPadding,
        lambda: (torch.randint(0, 6, (N, 3)), torch.arange(N) % 6),
        UnitSelection({"out": [0, 1, 4]}),
    ),
}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("case", HARD)
def test_hard_models(case, batches):
    make, data, selection = HARD[case]
    model, (X, y) = make(), data()
    pairs = [(X, y)] if batches == 1 else [(X[:2], y[:2]), (X[2:], y[2:])]
    expected = dense_hessian(model, F.cross_entropy, pairs, selection)
    H = HessianOperator(model, F.cross_entropy, pairs, selection)
    assert off(H.to_dense(), expected) < 1e-12
    if case == "experts":  # the output of a sample depends on the order of the others
        return
    G = sample_gradients(model, F.cross_entropy, X, y, selection)
    A = FisherOperator(model, F.cross_entropy, pairs, selection, damping=0.1)
    fisher = G.T @ G / N + 0.1 * torch.eye(G.shape[1], dtype=torch.float64)
    assert off(A.to_dense(), fisher) < 1e-12
    assert off(A.diagonal(), fisher.diagonal()) < 1e-12
    b = torch.randn(len(fisher)).double()
    assert off(A.solve(b).x, torch.linalg.solve(fisher, b)) < 1e-9
    found = torch.cat(
        [g.dense() for g in per_sample_gradients(model, F.cross_entropy, pairs, selection)]
    )
    assert off(found, G) < 1e-12
    B = GaussNewtonOperator(model, F.cross_entropy, pairs, selection)
    assert off(B.diagonal(), B.to_dense().diagonal()) < 1e-12


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.BatchNorm1d])
def test_scales_of_norms_on_vectors_are_not_taken_for_factors(kind):
    model = nn.Sequential(nn.Linear(4, 5), kind(5), nn.Tanh(), nn.Linear(5, 3)).double()
    X, y = plain()
    A = FisherOperator(
        model, F.cross_entropy, (X, y), UnitSelection({"0": [1], "1": [0, 3]}), damping=0.05
    )
    b = torch.randn(A.shape[0]).double()
    exact = torch.linalg.solve(A.to_dense(), b)
    for method in ("woodbury", "cg", "cholesky"):
        assert off(A.solve(b, method=method).x, exact) < 1e-8


def test_samples_that_depend_on_each_other_have_no_factors():
    X, y = plain()
    model = Centred()
    A = GaussNewtonOperator(model, F.cross_entropy, [(X, y)], BODY)
    assert off(A.diagonal(), A.to_dense().diagonal()) < 1e-12


def test_batches_of_unequal_numbers_of_positions_have_their_own_shares():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    selection = UnitSelection({"2": [0, 1]})
    pairs = [(torch.randn(4, n, 4).double(), torch.randn(4, n, 2).double()) for n in (5, 3)]
    A = HessianOperator(model, F.mse_loss, pairs, selection)
    assert off(A.to_dense(), dense_hessian(model, F.mse_loss, pairs, selection)) < 1e-12


def test_functions_that_are_differentiable_once_are_refused():
    with pytest.raises(ValueError, match="once_differentiable"):
        HessianOperator(Cube(), F.cross_entropy, plain(), BODY)


def by_lambda():
    model = Base()
    model.run = lambda x: model.head(torch.tanh(model.body(x)))
    model.forward = model.run
    return model


def by_bound_method():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 2
    return model


class InAList(Base):
    def __init__(self):
        super().__init__()
        self.weights = [self.body.weight]

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.weights[0])))


class ReturnsItsWeight(Base):
    def forward(self, x):
        return self.head(self.features(x)), self.body.weight


@pytest.mark.parametrize(
    ("make", "selection"),
    [
        (by_lambda, BODY),
        (by_lambda, HEAD),
        (by_bound_method, UnitSelection({"0": [1]})),
        (InAList, BODY),
    ],
)
def test_references_that_a_copy_does_not_follow_are_refused(make, selection):
    with pytest.raises(ValueError, match="the model computes with parameter .*closure"):
        HessianOperator(make(), F.cross_entropy, plain(), selection)


def test_a_parameter_among_the_outputs_is_differentiated():
    model, (X, y) = ReturnsItsWeight(), plain()

    def loss(outputs, y):
        return F.cross_entropy(outputs[0], y) + outputs[1].pow(4).sum()

    expected = dense_hessian(model, loss, [(X, y)], BODY)
    assert off(HessianOperator(model, loss, (X, y), BODY).to_dense(), expected) < 1e-12


def test_an_attribute_computed_from_a_selected_weight_is_refused():
    class Used(Base):
        def forward(self, x):
            z = self.head(self.features(x))
            return z + self.tied.mean() if self.use else z

    model = Used()
    model.tied, model.use = model.body.weight.t(), True
    with pytest.raises(ValueError, match="'tied' of a Used, .* computed from .*'body.weight'"):
        HessianOperator(model, F.cross_entropy, plain(), BODY)
    model.use = False  # then it does not matter
    HessianOperator(model, F.cross_entropy, plain(), BODY)


class Plain(Base):
    def forward(self, x):
        return self.head(self.features(x))


def test_losses_that_compute_with_parameters_are_refused():
    model, (X, y) = Plain(), plain()

    def decayed(z, y):
        return F.cross_entropy(z, y) + sum(p.pow(2).sum() for p in model.parameters())

    for kind in (HessianOperator, GaussNewtonOperator, FisherOperator):
        with pytest.raises(ValueError, match=r"the loss \(weight_decay is an argument"):
            kind(model, decayed, (X, y), BODY)


def test_outputs_that_are_not_seen_are_refused():
    class Box:
        pass

    class Boxed(Base):
        def forward(self, x):
            box = Box()
            box.z = self.head(self.features(x))
            return x, box

    with pytest.raises(ValueError, match="through the tensors, tuples, lists and dicts"):
        GaussNewtonOperator(Boxed(), lambda o, y: F.cross_entropy(o[1].z, y), plain(), BODY)


def test_models_that_cannot_be_copied_are_refused():
    model = Plain()
    model.file = memoryview(b"bytes")
    with pytest.raises(ValueError, match="model cannot be copied by copy.deepcopy: cannot pickle"):
        HessianOperator(model, F.cross_entropy, plain(), BODY)


@pytest.mark.parametrize("sampler", [False, True])
def test_loaders_with_generators_of_their_own(sampler, monkeypatch):
    monkeypatch.setattr(_routes, "CACHE_BYTES", 0)
    X, y = plain(30)
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(X, y)
    if sampler:
        loader = DataLoader(data, 7, sampler=RandomSampler(data, generator=generator))
    else:
        loader = DataLoader(data, 7, shuffle=True, generator=generator)
    state = generator.get_state()
    A = HessianOperator(Plain(), F.cross_entropy, loader, BOTH)
    torch.manual_seed(5)
    expected = dense_hessian(Plain(), F.cross_entropy, [(X, y)], BOTH)
    assert off(A.to_dense(), expected) > 0.1  # another model: the seed is spent
    torch.manual_seed(5)
    A = HessianOperator(Plain(), F.cross_entropy, loader, BOTH)
    assert off(A.to_dense(), expected) < 1e-12
    assert torch.equal(generator.get_state(), state)


def weighted(z, y):
    return F.cross_entropy(z, y, weight=torch.tensor([0.1, 1.0, 3.0]).double())


def test_cutting_data_is_checked_across_batches():
    X, y = plain(512)
    y = torch.sort(y).values  # within halves of a batch the weights are nearly the same
    with pytest.raises(ValueError, match="plain mean over the samples of a batch, since data is"):
        HessianOperator(Plain(), weighted, (X, y), BODY)
    X, y = plain(300)
    y[260:290] = -100
    with pytest.raises(
        ValueError, match="sample 260 of data has target -100, which loss_fn ignores"
    ):
        HessianOperator(Plain(), F.cross_entropy, (X, y), BODY)
    A = HessianOperator(model := Plain(), F.cross_entropy, plain(300), BODY)
    assert A.shape[0] == BODY.size(model)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
@pytest.mark.parametrize("selection", [HEAD, BODY])
def test_data_may_change_afterwards(kind, selection):
    X, y = plain()
    model = Plain()
    expected = kind(model, F.cross_entropy, (X.clone(), y.clone()), selection).to_dense()
    A = kind(model, F.cross_entropy, (X, y), selection)
    X.mul_(2)
    y.zero_()
    assert off(A @ torch.eye(len(expected)), expected) < 1e-12  # what is kept
    if kind is GaussNewtonOperator and selection is BODY:
        with pytest.raises(ValueError, match="data were changed in place after"):
            A.to_dense()


def test_operators_of_different_units_are_not_added():
    model, data = Plain(), plain()
    A = HessianOperator(model, F.cross_entropy, data, UnitSelection({"body": [0]}))
    B = HessianOperator(model, F.cross_entropy, data, UnitSelection({"body": [1]}))
    with pytest.raises(ValueError, match="one selection of units"):
        A + B
    single = HessianOperator(model, F.cross_entropy, data, A.selection, dtype=torch.float32)
    assert off((A + single).to_dense(), 2 * A.to_dense()) < 1e-5
    with pytest.raises(ValueError, match="divided by 0"):
        A / 0


def test_a_convolution_called_by_keywords():
    model = nn.ModuleDict({"t": nn.ConvTranspose1d(2, 2, 3, groups=2)}).double()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            return self.layers["t"](output_size=[6], input=x).flatten(1)

    X, y = torch.randn(5, 2, 4).double(), torch.arange(5) % 3
    selection = UnitSelection({"layers.t": [1]})
    G = sample_gradients(Model(), F.cross_entropy, X, y, selection)
    A = FisherOperator(Model(), F.cross_entropy, (X, y), selection)
    assert off(A.to_dense(), G.T @ G / 5) < 1e-12


def test_the_loss_is_called_once_for_each_sample_and_no_more():
    calls = []

    def counted(z, y):
        calls.append(len(y))
        return F.cross_entropy(z, y)

    X, y = plain()
    A = GaussNewtonOperator(Plain(), counted, (X, y), BOTH, damping=0.1)
    A.solve(torch.ones(A.shape[0]).double(), method="woodbury")
    before = len(calls)
    A.solve(torch.ones(A.shape[0]).double(), method="woodbury")
    assert len(calls) == before  # rows and their checks are kept


def test_targets_of_a_dict_are_as_many_as_its_inputs():
    X, y = plain()
    with pytest.raises(ValueError, match="9 inputs and 3 targets"):
        HessianOperator(Plain(), F.cross_entropy, {"x": X, "labels": y[:3]}, BODY)


def test_restrict_takes_a_selection():
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(9, 3)).double()
    X, y = torch.randn(5, 1, 4).double(), torch.arange(5) % 3
    A = FisherOperator(model, F.cross_entropy, (X, y), UnitSelection({"0": [0, 1]}))
    for wrong in ({"0": [0]}, UnitSelection({})):
        with pytest.raises(
            ValueError,
            match="must be a UnitSelection or ParameterSelection with at least one entry",
        ):
            A.restrict(wrong)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("selection", [HEAD, BODY])
def test_a_sum_is_not_taken_for_a_mean(kind, selection):
    X, y = plain(10)
    summed = nn.CrossEntropyLoss(reduction="sum")
    batches = [(X[:6], y[:6]), (X[6:], y[6:])]
    with pytest.raises(ValueError, match="on a batch of 6 samples it is the sum.*reduction='sum'"):
        kind(Plain(), summed, batches, selection)
    with pytest.raises(ValueError, match="it is the mean .*: pass reduction='mean'"):
        kind(Plain(), F.cross_entropy, batches, selection, reduction="sum")
    kind(Plain(), summed, batches, selection, reduction="sum")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_near_zero_is_not_taken_for_the_other_reduction(reduction):
    X, y = plain(10)

    def tiny(outputs, targets):
        return 1e-14 * F.cross_entropy(outputs, targets, reduction=reduction)

    HessianOperator(Plain(), tiny, [(X[:6], y[:6]), (X[6:], y[6:])], HEAD, reduction=reduction)


def test_a_class_for_a_loss_and_arrays_for_data():
    X, y = plain()
    with pytest.raises(TypeError, match="got the class CrossEntropyLoss: pass an instance"):
        HessianOperator(Plain(), nn.CrossEntropyLoss, (X, y), BODY)
    with pytest.raises(TypeError, match="torch.as_tensor makes them of arrays"):
        HessianOperator(Plain(), F.cross_entropy, (X.numpy(), y.numpy()), BODY)


def test_gradients_are_shown_in_one_line():
    (chunk,) = per_sample_gradients(Plain(), F.cross_entropy, plain(), BODY)
    assert repr(chunk) == "SampleGradients(9 samples x 10 parameters, 2 factors)"


def test_stored_gradients_are_not_overwritten():
    """A first batch with factors, and a later one whose samples are differentiated one by one."""
    X, y = plain(12)
    X[:4, 0] = X[:4, 0].abs()  # all of the first batch go to one expert, in their own order
    pairs = [(X[:4], y[:4]), (X[4:], y[4:])]
    A = FisherOperator(Experts(), F.cross_entropy, pairs, BODY)
    v = torch.randn(A.shape[0]).double()
    before = A @ v
    assert off(A.diagonal(), A.to_dense().diagonal()) < 1e-12
    assert torch.equal(A @ v, before)
    for chunk in per_sample_gradients(Experts(), F.cross_entropy, pairs, BODY):
        G, weights = chunk.dense().clone(), torch.rand(chunk.n).double()
        assert off(chunk.combine_squares(weights), weights @ G**2) < 1e-12
        assert torch.equal(chunk.dense(), G)
