"""The whole deletion: against exact steps and retraining; what it must leave alone or refuse."""

import copy
import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn
from torch.func import functional_call
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lcodec_ext import unlearning
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.curvature import ConvergenceWarning, GaussNewtonOperator
from lcodec_ext.unlearning import BeforeAfter, IndefiniteCurvatureError, Settings, UnitSelection
from lcodec_ext.unlearning.request import warn_of_overlap

DOUBLE = torch.float64

#: Without the presets' limits: all retained samples, solved to rounding, no guard.
unlearn = functools.partial(unlearning.unlearn, preset=Settings())


def mlp(seed=0, dtype=DOUBLE, dropout=0.0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, width),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(width, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).to(dtype)


def samples(n, m=9, dtype=DOUBLE, shape=(4,)):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, *shape, dtype=dtype, generator=generator)
    y = torch.arange(n) % 3
    return (x[:m], y[:m]), (x[m:], y[m:])


FORGET, RETAIN = samples(80)
QUICK = {"n_perturbations": 200, "noise_std": 0.5, "weight_decay": 0.01, "damping": 0.05}


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model, expected):
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


# ---------------------------------------------------------------------------------------------
# Convex models: the exact step, and retraining

LAMBDA = 0.01


class Softmax:
    """L2-regularised softmax regression by dense formulas; parameters (classes, features + 1)."""

    def __init__(self, x, y, n_classes):
        self.a = np.hstack([x, np.ones((len(x), 1))])
        self.onehot = np.eye(n_classes)[y]

    def probabilities(self, w):
        z = self.a @ w.T
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def objective(self, w):
        likelihood = np.log((self.probabilities(w) * self.onehot).sum(1))
        return -likelihood.mean() + LAMBDA / 2 * (w**2).sum()

    def gradient_sum(self, w):
        return (self.probabilities(w) - self.onehot).T @ self.a

    def hessian(self, w):
        p = self.probabilities(w)
        c, d = w.shape
        blocks = np.empty((c, d, c, d))
        for i in range(c):
            for j in range(c):
                weight = p[:, i] * ((i == j) - p[:, j])
                blocks[i, :, j] = self.a.T @ (weight[:, None] * self.a) / len(self.a)
        return blocks.reshape(c * d, c * d) + LAMBDA * np.eye(c * d)

    def fit(self, w):
        """Newton's method to rounding."""
        for _ in range(40):
            gradient = self.gradient_sum(w) / len(self.a) + LAMBDA * w
            if np.linalg.norm(gradient) < 1e-13:
                return w
            step = np.linalg.solve(self.hessian(w), gradient.ravel()).reshape(w.shape)
            length = 1.0
            while self.objective(w - length * step) > self.objective(w) + 1e-13:
                length /= 2
            w = w - length * step
        raise AssertionError("Newton's method did not converge")


class Regression:
    def __init__(self, load, n):
        x, y = load(return_X_y=True)
        rows = np.random.default_rng(0).permutation(len(y))[:n]
        x, self.y = x[rows], y[rows]
        self.x = x / 16 if load is load_digits else (x - x.mean(0)) / x.std(0)
        self.n_classes = int(self.y.max()) + 1
        start = np.zeros((self.n_classes, self.x.shape[1] + 1))
        self.trained = Softmax(self.x, self.y, self.n_classes).fit(start)

    def split(self, m):
        x, y = torch.from_numpy(self.x), torch.from_numpy(self.y)
        return (x[:m], y[:m]), (x[m:], y[m:])

    def exact_step(self, m):
        removed = Softmax(self.x[:m], self.y[:m], self.n_classes)
        retained = Softmax(self.x[m:], self.y[m:], self.n_classes)
        w = self.trained
        gradient = (removed.gradient_sum(w) + m * LAMBDA * w) / len(retained.a)
        step = np.linalg.solve(retained.hessian(w), gradient.ravel())
        return w + step.reshape(w.shape), retained.fit(w)

    def unlearn(self, m, **options):
        model = nn.Linear(self.x.shape[1], self.n_classes).double()
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(self.trained[:, :-1]))
            model.bias.copy_(torch.from_numpy(self.trained[:, -1]))
        result = unlearn(model, *self.split(m), F.cross_entropy, **options)
        new = result.model
        return result, torch.cat([new.weight, new.bias[:, None]], 1).detach().numpy()


@pytest.fixture(scope="module")
def regressions():
    return {
        "digits": Regression(load_digits, 1500),
        "breast cancer": Regression(load_breast_cancer, 455),
        "wine": Regression(load_wine, 178),
    }


@pytest.mark.parametrize(
    ("data", "m", "share"),
    [
        ("digits", 1, 0.002),
        ("digits", 20, 0.004),
        ("digits", 150, 0.02),
        ("breast cancer", 1, 0.004),
        ("breast cancer", 20, 0.05),
        ("breast cancer", 150, 0.2),
        ("wine", 1, 0.01),
        ("wine", 20, 0.1),
    ],
)
def test_convex_removal_is_the_exact_step_and_near_retraining(regressions, data, m, share):
    regression = regressions[data]
    exact, retrained = regression.exact_step(m)
    result, weights = regression.unlearn(m, curvature="hessian", weight_decay=LAMBDA, damping=0.0)
    step = np.linalg.norm(exact - regression.trained)
    assert np.linalg.norm(weights - exact) < 1e-10 * step
    assert result.step_norm == pytest.approx(step, rel=1e-10)
    assert result.training_gradient_norm < 1e-12

    no_op = np.linalg.norm(regression.trained - retrained)
    distance = np.linalg.norm(weights - retrained)
    assert distance < share * no_op
    # The same matrix, but the removed samples' share of the regulariser left out of the gradient.
    _, careless = regression.unlearn(m, curvature="hessian", weight_decay=0.0, damping=LAMBDA)
    assert np.linalg.norm(careless - retrained) > distance + 0.1 * no_op


def test_convex_gauss_newton_is_newton(regressions):
    options = {"weight_decay": LAMBDA, "damping": 0.0}
    _, exact = regressions["digits"].unlearn(20, curvature="hessian", **options)
    _, gauss_newton = regressions["digits"].unlearn(20, curvature="gauss_newton", **options)
    step = np.linalg.norm(exact - regressions["digits"].trained)
    assert np.linalg.norm(exact - gauss_newton) < 1e-10 * step


def test_convex_removal_reaches_a_stationary_point(regressions):
    regression = regressions["breast cancer"]
    result, _ = regression.unlearn(1, curvature="hessian", weight_decay=LAMBDA, damping=0.0)
    assert result.gradient_norm.after < 0.01 * result.gradient_norm.before
    # All units, all parameters: norms of the same numbers, which are added in another order.
    assert result.gradient_norm == pytest.approx(result.gradient_norm_selected, rel=1e-12)


@pytest.mark.parametrize("gradient", ["removal", "residual"])
@pytest.mark.parametrize(("data", "m"), [("digits", 150), ("breast cancer", 150), ("wine", 20)])
def test_repeated_steps_reach_the_retrained_weights(regressions, data, m, gradient):
    _, retrained = regressions[data].exact_step(m)
    options = {"curvature": "hessian", "weight_decay": LAMBDA, "damping": 0.0}
    result, weights = regressions[data].unlearn(m, steps=6, gradient=gradient, **options)
    assert np.abs(weights - retrained).max() < 1e-8
    assert result.gradient_norm.after < 1e-8
    assert result.solve_residual <= 1e-10


def test_influence_is_that_of_leaving_one_out(regressions):
    """Of 40 samples: the loss of each after its removal, by one step and by training without it."""
    regression = regressions["breast cancer"]
    x, y = torch.from_numpy(regression.x), torch.from_numpy(regression.y)
    model = nn.Linear(x.shape[1], 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(regression.trained[:, :-1]))
        model.bias.copy_(torch.from_numpy(regression.trained[:, -1]))
    true, influence = [], []
    for k in range(0, 440, 11):
        rest = np.arange(len(y)) != k
        retrained = Softmax(regression.x[rest], regression.y[rest], 2).fit(regression.trained)
        alone = Softmax(regression.x[k : k + 1], regression.y[k : k + 1], 2)
        loss = -np.log((alone.probabilities(retrained) * alone.onehot).sum())
        before = -np.log((alone.probabilities(regression.trained) * alone.onehot).sum())
        result = unlearn(
            model,
            (x[k : k + 1], y[k : k + 1]),
            (x[rest], y[rest]),
            F.cross_entropy,
            curvature="hessian",
            weight_decay=LAMBDA,
            damping=0.0,
        )
        true.append(loss - before)
        influence.append(result.loss_forget.after - result.loss_forget.before)
    assert np.corrcoef(true, influence)[0, 1] > 0.99
    assert np.abs(np.subtract(true, influence)).max() < 0.1 * np.abs(true).max()


# ---------------------------------------------------------------------------------------------
# What the step is, on any model


@pytest.mark.parametrize(
    ("curvature", "method", "width", "first_rows", "n_retain"),
    [
        ("gauss_newton", "cholesky", 6, [1, 4], 71),
        ("hessian", "cholesky", 6, [1, 4], 71),
        ("gauss_newton", "woodbury", 6, [1, 4], 4),
        ("gauss_newton", "cg", 60, list(range(1, 60)), 110),
        ("hessian", "cg", 60, list(range(1, 60)), 71),
    ],
)
def test_step_formula_on_selected_rows(curvature, method, width, first_rows, n_retain):
    """Rows of the first layer and row 2 of the last, by autograd on explicit tensors."""
    model = mlp(width=width)
    forget, retain = samples(9 + n_retain)
    chosen = UnitSelection({"0": first_rows, "5": [2]})
    result = unlearn(
        model,
        forget,
        retain,
        F.cross_entropy,
        selection=chosen,
        curvature=curvature,
        weight_decay=0.3,
        damping=0.7,
    )
    rows = ((0, first_rows), (5, [2]))
    theta = torch.cat(
        [t[index].flatten() for k, index in rows for t in (model[k].weight, model[k].bias)]
    ).detach()

    def outputs(vector, x):
        pieces = iter(vector.split([4 * len(first_rows), len(first_rows), 5, 1]))
        for k, layer in enumerate(model):
            if k in dict(rows):
                index = torch.tensor(dict(rows)[k])
                weight = layer.weight.index_put((index,), next(pieces).view(len(index), -1))
                x = F.linear(x, weight, layer.bias.index_put((index,), next(pieces)))
            else:
                x = layer(x)
        return x

    def loss(vector, data):
        return F.cross_entropy(outputs(vector, data[0]), data[1])

    if curvature == "hessian":
        matrix = torch.autograd.functional.hessian(lambda v: loss(v, retain), theta)
    else:
        jacobian = torch.autograd.functional.jacobian(lambda v: outputs(v, retain[0]), theta)
        p = outputs(theta, retain[0]).softmax(1).detach()
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("icd,ick,ike->de", jacobian, middle, jacobian) / len(retain[0])
    gradient = torch.autograd.functional.jacobian(lambda v: loss(v, forget), theta)
    step = torch.linalg.solve(
        matrix + torch.eye(len(theta)), (gradient + 0.3 * theta) * len(forget[0]) / len(retain[0])
    )

    got = torch.cat(
        [
            (new[index] - old[index]).flatten()
            for k, index in rows
            for new, old in zip(result.model[k].parameters(), model[k].parameters(), strict=True)
        ]
    )
    atol = 1e-9 * step.abs().max().item() if method == "cg" else 1e-13
    torch.testing.assert_close(got.detach(), step, rtol=1e-9, atol=atol)
    assert result.n_parameters == len(theta) == chosen.size(model)
    assert result.step_norm == pytest.approx(step.norm().item(), rel=1e-10)
    assert result.solve_method == method
    assert (result.solve_iterations > 0) == (method == "cg")
    assert result.solve_residual <= (1e-10 if method == "cg" else 1e-12)
    # Nothing else has changed.
    changed = torch.zeros_like(vector(model), dtype=torch.bool)
    changed |= vector(result.model) != vector(model)
    assert changed.sum() == len(theta)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


def alias():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Softplus(), nn.Linear(4, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


@pytest.mark.parametrize("batch_size", [4, 100])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize(
    ("build", "shape", "units"),
    [
        (Reused, (4,), {"body": [0, 2], "head": [1]}),
        (alias, (4,), {"0": [1, 3], "4": [0]}),
        (convolutions, (2, 6, 6), {"0": [0, 3], "4": [1], "7": [0, 2]}),
    ],
)
def test_step_by_the_whole_models_curvature(build, shape, units, curvature, batch_size):
    """The block of the selected parameters, found by marking them."""
    torch.manual_seed(7)
    model = build().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    forget, retain = samples(20, shape=shape)
    chosen = UnitSelection(units)
    result = unlearn(
        model,
        forget,
        retain,
        F.cross_entropy,
        selection=chosen,
        curvature=curvature,
        weight_decay=0.4,
        damping=0.6,
        batch_size=batch_size,
    )
    flat = vector(model)
    sizes = [p.numel() for p in model.parameters()]

    def named(values):
        pieces = zip(model.named_parameters(), values.split(sizes), strict=True)
        return {name: piece.view(p.shape) for (name, p), piece in pieces}

    def outputs(weights, x):
        return functional_call(model, named(weights), (x,))

    def loss(weights, data):
        return F.cross_entropy(outputs(weights, data[0]), data[1])

    marked = chosen.gather(named(torch.arange(len(flat))), model=model)
    if curvature == "hessian":
        matrix = torch.autograd.functional.hessian(lambda v: loss(v, retain), flat)
    else:
        jacobian = torch.autograd.functional.jacobian(lambda v: outputs(v, retain[0]), flat)
        p = outputs(flat, retain[0]).softmax(1).detach()
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("icd,ick,ike->de", jacobian, middle, jacobian) / len(retain[0])
    gradient = torch.autograd.functional.jacobian(lambda v: loss(v, forget), flat) + 0.4 * flat
    step = torch.linalg.solve(
        matrix[marked][:, marked] + torch.eye(len(marked)), gradient[marked] * 9 / 11
    )
    expected = flat.index_add(0, marked, step)
    assert torch.equal(vector(result.model) != flat, expected != flat)
    torch.testing.assert_close(vector(result.model), expected, rtol=1e-12, atol=1e-14)


def test_more_parameters_than_a_matrix_could_have():
    model = mlp(width=5000)
    result = unlearn(model, FORGET, RETAIN, F.cross_entropy, selection="full", damping=0.5)
    assert result.n_parameters == 50_023
    assert (result.solve_method, result.solve_iterations) == ("woodbury", 0)
    assert result.solve_residual < 1e-12


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_report(batch_size):
    model = mlp()
    result = unlearn(
        model, FORGET, RETAIN, F.cross_entropy, selection="full", batch_size=batch_size, **QUICK
    )

    def norm(m, data):
        objective = F.cross_entropy(m(data[0]), data[1])
        objective = objective + 0.01 / 2 * sum((p * p).sum() for p in m.parameters())
        gradient = torch.autograd.grad(objective, list(m.parameters()))
        return torch.cat([g.flatten() for g in gradient]).norm().item()

    after = result.model
    everything = (torch.cat([FORGET[0], RETAIN[0]]), torch.cat([FORGET[1], RETAIN[1]]))
    assert result.gradient_norm == pytest.approx((norm(model, RETAIN), norm(after, RETAIN)))
    assert result.training_gradient_norm == pytest.approx(norm(model, everything))
    for data, losses in ((FORGET, result.loss_forget), (RETAIN, result.loss_retain)):
        expected = [F.cross_entropy(m(data[0]), data[1]).item() for m in (model, after)]
        assert losses == pytest.approx(expected)
    assert isinstance(result.loss_forget, BeforeAfter)
    assert (result.n_forget, result.n_retain) == (9, 71)
    assert (result.n_units, len(result.selection)) == (14, 14)
    assert result.n_parameters == result.n_trainable == len(vector(model))
    assert result.solve_residual < 1e-12
    assert (result.solve_method, result.solve_iterations) == ("cholesky", 0)
    assert result.curvature_plan.startswith("delta hook")
    assert result.foci is None
    phases = {"monitoring", "gradients", "selection", "curvature", "solve", "total"}
    assert set(result.seconds) == phases
    text = repr(result)
    for part in (
        "9 of 80 samples",
        "14 of 14, full (0: 6, 3: 5, 5: 3), ",
        "gauss_newton, damping 0.05, cholesky, residual ",
    ):
        assert part in text


def test_selection_by_lfoci():
    model = mlp()
    options = QUICK | {"selection": "lfoci", "seed": 3}
    result = unlearn(model, FORGET, RETAIN, F.cross_entropy, **options)
    assert 0 < len(result.selection) < 14
    named = {name.split()[0] for name in result.foci.names}
    units = result.selection.units
    assert named == {f"{layer}[{unit}]" for layer in units for unit in units[layer]}
    assert {"perturbation", "selection"} <= set(result.seconds)
    one = unlearn(model, FORGET, RETAIN, F.cross_entropy, n_units=1, **options)
    assert len(one.selection) == 1
    given = unlearn(model, FORGET, RETAIN, F.cross_entropy, selection=result.selection, **QUICK)
    assert torch.equal(vector(given.model), vector(result.model))


@pytest.mark.parametrize("selection", ["lfoci", "random"])
def test_the_same_seed_gives_the_same_bits(selection):
    options = {"selection": selection, "n_units": 4 if selection == "random" else None}
    first, again, other = (
        unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, seed=seed, **options, **QUICK)
        for seed in (1, 1, 2)
    )
    assert first.selection == again.selection
    assert torch.equal(vector(first.model), vector(again.model))
    assert first.selection != other.selection


def test_random_units():
    result = unlearn(
        mlp(), FORGET, RETAIN, F.cross_entropy, selection="random", n_units=14, **QUICK
    )
    assert result.selection == UnitSelection({"0": range(6), "3": range(5), "5": range(3)})
    drawn = {
        str(
            unlearn(
                mlp(), FORGET, RETAIN, F.cross_entropy, selection="random", n_units=3, seed=seed
            ).selection
        )
        for seed in range(5)
    }
    assert len(drawn) > 2


# ---------------------------------------------------------------------------------------------
# What must not be touched


def batch_norm_model():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    model(torch.randn(8, 2, 6, 6))
    return model


def snapshot(model):
    return (
        [
            (name, module.training, dict(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        [(p.requires_grad, p.grad) for p in model.parameters()],
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_given_model(inplace, fails, monkeypatch):
    """Untouched without inplace and on errors; flags, hooks and statistics always."""
    model = batch_norm_model()
    model[1].eval()
    model[1].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones(3, 64)
    before, flags = state(model), snapshot(model)
    forget, retain = samples(60, dtype=torch.float32, shape=(2, 6, 6))
    if fails:
        monkeypatch.setattr(GaussNewtonOperator, "solve", lambda *_, **__: 1 / 0)
    try:
        result = unlearn(model, forget, retain, F.cross_entropy, inplace=inplace, **QUICK)
    except ZeroDivisionError:
        assert fails
        assert_same_state(model, before)
    else:
        assert not fails
        assert (result.model is model) == inplace
        changed = {k for k, v in result.model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed
        assert changed <= {"0.weight", "0.bias", "1.weight", "5.weight", "5.bias"}
        if not inplace:
            assert_same_state(model, before)
            assert snapshot(result.model)[0] == flags[0]
        assert [p.dtype for p in result.model.parameters()] == [torch.float32] * 6
    assert snapshot(model) == flags


def test_inplace_gives_the_same_weights():
    model = mlp()
    apart = unlearn(model, FORGET, RETAIN, F.cross_entropy, **QUICK)
    unlearn(model, FORGET, RETAIN, F.cross_entropy, inplace=True, **QUICK)
    assert torch.equal(vector(model), vector(apart.model))


def test_dropout_and_batch_norm_are_off():
    models = [mlp(dropout=dropout).train(mode) for dropout, mode in ((0.9, True), (0.0, False))]
    first, second = (unlearn(m, FORGET, RETAIN, F.cross_entropy, **QUICK) for m in models)
    assert torch.equal(vector(first.model), vector(second.model))


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # untrained models
def test_global_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        unlearn(mlp(seed=5), FORGET, RETAIN, F.cross_entropy, **QUICK)
        assert not torch.is_grad_enabled()
    torch.manual_seed(5)
    unlearn(nn.Linear(4, 3), *samples(30, dtype=torch.float32), F.cross_entropy, selection="full")
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), expected)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_in_inference_mode():
    model = mlp()
    expected = unlearn(model, FORGET, RETAIN, F.cross_entropy, **QUICK)
    with torch.inference_mode():
        result = unlearn(model, FORGET, RETAIN, F.cross_entropy, **QUICK)
    assert torch.equal(vector(result.model), vector(expected.model))
    assert not any(p.is_inference() for p in result.model.parameters())


# ---------------------------------------------------------------------------------------------
# Models and data of many kinds


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.time = int(batch_first)

    def forward(self, x):
        x = self.embed(x if self.time else x.transpose(0, 1))
        return self.head(self.block(x).mean(self.time))


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention(batch_first, curvature):
    torch.manual_seed(0)
    result = unlearn(
        Attention(batch_first).double(),
        *samples(40, shape=(5, 3)),
        F.cross_entropy,
        selection="lfoci",
        curvature=curvature,
        n_perturbations=100,
        noise_std=0.5,
        damping=5.0,
    )
    # embed, in_proj, out_proj, both linear layers, two norms, head
    assert result.n_units == 4 + 12 + 4 + 5 + 4 + 4 + 4 + 3


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.gru = nn.GRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(self.embed(x))[0][:, -1])


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_recurrent_layers_without_noise(curvature):
    torch.manual_seed(0)
    model = Recurrent().double()
    data = samples(40, shape=(6, 3))
    options = {"curvature": curvature, "damping": 1.0}
    result = unlearn(model, *data, F.cross_entropy, selection="full", **options)
    assert result.n_parameters == result.n_trainable  # those of the GRU, which has no units, too
    assert result.solve_residual < 1e-9  # by conjugate gradients, to rtol 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_models(dtype):
    model = mlp(dtype=dtype)
    exact = unlearn(
        copy.deepcopy(model).double(), FORGET, RETAIN, F.cross_entropy, selection="full", **QUICK
    )
    forget, retain = ((x.to(dtype), y) for x, y in (FORGET, RETAIN))
    result = unlearn(model, forget, retain, F.cross_entropy, selection="full", **QUICK)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        vector(result.model).double(), vector(exact.model), rtol=20 * rounding, atol=20 * rounding
    )


def test_weights_that_overflow_are_not_written():
    model = nn.Linear(1, 2, bias=False).half()
    with torch.no_grad():
        model.weight.fill_(60_000)
    forget = (torch.ones(1, 1).half(), torch.ones(1, 2).half())
    retain = (torch.zeros(1, 1).half(), torch.ones(1, 2).half())
    with pytest.raises(ValueError, match="overflow the dtype"):
        unlearn(model, forget, retain, nn.MSELoss(), selection="full", damping=0.5, inplace=True)
    assert (model.weight == 60_000).all()


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(zip(*self.data, strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda data: TensorDataset(*data),
        lambda data: Subset(TensorDataset(*data), range(len(data[0]))),
        Stream,
        lambda data: DataLoader(TensorDataset(*data), batch_size=4),
        lambda data: DataLoader(TensorDataset(*data), shuffle=True, batch_size=4, drop_last=True),
        lambda data: DataLoader(Stream(data), batch_size=4),
        lambda data: DataLoader(
            TensorDataset(*data), sampler=SubsetRandomSampler(range(len(data[0])))
        ),
        list,
    ],
)
def test_ways_to_give_samples(wrap):
    expected = unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, **QUICK)
    result = unlearn(mlp(), wrap(FORGET), wrap(RETAIN), F.cross_entropy, **QUICK)
    assert torch.equal(vector(result.model), vector(expected.model))


def test_inputs_that_require_grad():
    forget = (FORGET[0].clone().requires_grad_(), FORGET[1])
    expected = unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, **QUICK)
    result = unlearn(mlp(), forget, RETAIN, F.cross_entropy, **QUICK)
    assert torch.equal(vector(result.model), vector(expected.model))
    assert forget[0].grad is None


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), F.mse_loss, nn.HuberLoss()])
def test_regression(loss_fn):
    model = mlp(dtype=torch.float32)
    targets = torch.randn(80, 3, generator=torch.manual_seed(0))
    x = torch.cat([FORGET[0], RETAIN[0]]).float()
    result = unlearn(model, (x[:9], targets[:9]), (x[9:], targets[9:]), loss_fn, **QUICK)
    assert result.step_norm > 0


def test_loss_module_with_tensors():
    """They are float32, as the model is; the computation is not."""
    targets = torch.eye(3)[torch.arange(80) % 3]
    x = torch.cat([FORGET[0], RETAIN[0]]).float()
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]))
    result = unlearn(
        mlp(dtype=torch.float32), (x[:9], targets[:9]), (x[9:], targets[9:]), loss_fn, **QUICK
    )
    assert result.step_norm > 0
    assert loss_fn.pos_weight.dtype == torch.float32


def test_token_ids_without_noise():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)).double()
    ids = torch.randint(0, 7, (60, 3))
    y = torch.arange(60) % 3
    data = (ids[:5], y[:5]), (ids[5:], y[5:])
    result = unlearn(model, *data, F.cross_entropy, selection="full")
    assert result.n_units == 7 + 3


# ---------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # untrained models
@pytest.mark.parametrize("weight_decay", [1e-3, 0.05])
def test_indefinite_hessian_is_refused_with_the_damping_it_takes(weight_decay):
    model = mlp()
    options = {"selection": "full", "curvature": "hessian", "weight_decay": weight_decay}
    with pytest.raises(IndefiniteCurvatureError, match="curvature='gauss_newton'") as caught:
        unlearn(model, FORGET, RETAIN, F.cross_entropy, damping=0.02, inplace=True, **options)
    assert torch.equal(vector(model), vector(mlp()))
    message = str(caught.value)
    assert "indefinite on the 83 selected parameters" in message
    assert f"{caught.value.rayleigh:.4g}" in message
    assert f"weight_decay={weight_decay:g} and damping=0.02" in message
    advised = float(message.rsplit("damping above ", 1)[1])
    unlearn(model, FORGET, RETAIN, F.cross_entropy, damping=advised, **options)
    with pytest.raises(IndefiniteCurvatureError):
        unlearn(model, FORGET, RETAIN, F.cross_entropy, damping=0.89 * advised, **options)


@pytest.mark.parametrize("damping", [0.02, 100.0])
def test_secant_without_positive_curvature_says_what_helps(damping):
    model, selection = mlp(), UnitSelection({"0": [0]})
    options = {"selection": selection, "damping": damping, "inplace": True}
    with pytest.raises(IndefiniteCurvatureError, match="Damping does not help.*'gauss_newton'"):
        unlearn(model, FORGET, RETAIN, F.cross_entropy, curvature="secant", **options)
    assert torch.equal(vector(model), vector(mlp()))
    unlearn(model, FORGET, RETAIN, F.cross_entropy, curvature="gauss_newton", **options)


@pytest.mark.parametrize("width", [6, 60])
@pytest.mark.parametrize("n", [30, 200])
def test_loss_that_is_not_convex_in_the_outputs(width, n):
    def loss_fn(outputs, targets):
        return torch.sin(outputs).mean()

    model, data = mlp(width=width), samples(n)
    with pytest.raises(
        IndefiniteCurvatureError,
        match=r"gauss_newton .* indefinite.*convex in the outputs, curvature='fisher' or damping",
    ) as caught:
        unlearn(model, *data, loss_fn, selection="full")
    assert "Gauss-Newton" not in str(caught.value)
    advised = float(str(caught.value).rsplit("damping above ", 1)[1])
    assert advised > caught.value.least_damping > 0


def test_singular_matrix_is_refused():
    with pytest.raises(IndefiniteCurvatureError, match=r"singular.*larger damping.* 0\.0001$"):
        unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, selection="full", damping=0.0)


def test_iterations_that_do_not_converge():
    data = samples(300)
    common = {"damping": 1e-2}
    result = unlearn(mlp(width=60), *data, F.cross_entropy, max_iterations=5, **common)
    assert (result.solve_method, result.solve_iterations) == ("cg", 5)
    assert result.solve_residual > 1e-10
    assert f"cg of 5 iterations, residual {result.solve_residual:.1e}" in repr(result)
    # A limit that the user did not set is worth a warning.
    with pytest.warns(ConvergenceWarning, match="where rounding in float64 ends progress"):
        unlearn(mlp(width=60), *data, F.cross_entropy, rtol=1e-30, **common)


def refuse(error, match, **arguments):
    defaults = {"forget": FORGET, "retain": RETAIN, "loss_fn": F.cross_entropy}
    model = arguments.pop("model", None) or mlp()
    with pytest.raises(error, match=match):
        unlearn(model, **defaults | arguments)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"selection": "foci"}, ValueError, "selection must be one of 'full', 'lfoci'"),
        ({"selection": {"0": [1]}}, ValueError, "selection must be one of"),
        ({"slection": "full"}, TypeError, "unknown option 'slection'; is it 'selection'"),
        ({"selection": None}, ValueError, "selection must be"),
        ({"curvature": "kfac"}, ValueError, "curvature must be one of"),
        ({"damping": -1.0}, ValueError, "damping must be a finite number >= 0"),
        ({"damping": float("nan")}, ValueError, "damping must be"),
        ({"damping": "1"}, TypeError, "damping must be"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be"),
        ({"weight_decay": None}, TypeError, "weight_decay must be"),
        ({"n_perturbations": 2}, ValueError, "n_perturbations must be an integer >= 3"),
        ({"n_perturbations": 10.0}, TypeError, "n_perturbations must be"),
        ({"noise_std": -0.1}, ValueError, "noise_std must be"),
        ({"noise_std": 0.0, "selection": "lfoci"}, ValueError, "noise_std is too small"),
        ({"noise_std": float("inf")}, ValueError, "noise_std must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"seed": True}, TypeError, "seed must be"),
        ({"seed": 1.0}, TypeError, "seed must be"),
        ({"seed": None}, TypeError, "seed must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"inplace": 1}, TypeError, "inplace must be"),
        ({"progress": "yes"}, TypeError, "progress must be"),
        ({"n_units": 0, "selection": "random"}, ValueError, "n_units must be"),
        ({"n_units": 2}, ValueError, "selection='full' says how many units there are"),
        (
            {"selection": UnitSelection({"0": [1]}), "n_units": 2},
            ValueError,
            "a UnitSelection says",
        ),
        ({"selection": "random"}, ValueError, "needs n_units or max_parameters"),
        ({"selection": "gradient", "max_parameters": 1.5}, ValueError, "share above 0 and up to 1"),
        (
            {"selection": "gradient", "max_parameters": 3},
            ValueError,
            "allows no unit.* has 5 param",
        ),
        ({"selection": "gradient", "max_parameters": 9, "n_units": 1}, ValueError, "cannot both"),
        ({"epsilon": 0.1}, ValueError, "epsilon and delta belong together"),
        ({"epsilon": 0.1, "delta": 1.0}, ValueError, "delta must be between 0 and 1"),
        ({"perturb": 3}, TypeError, "perturb must be callable"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 or"),
        (
            {"candidates": ("nothing*",)},
            ValueError,
            "'nothing.' matches no layer",
        ),
        ({"candidates": ()}, TypeError, "candidates must be"),
        ({"score": "accuracy"}, TypeError, "score must be callable"),
        ({"statistics": 3}, TypeError, "statistics must be TrainingStatistics"),
        ({"selection": UnitSelection({})}, ValueError, "at least one unit"),
        ({"selection": UnitSelection({"9": [0]})}, ValueError, "names layer '9'"),
        ({"selection": UnitSelection({"0": [6]})}, ValueError, "names unit 6 of layer '0'"),
    ],
)
def test_bad_options(options, error, match):
    refuse(error, match, **options)


X, Y = FORGET


class Restless(Dataset):
    """Augmented at random."""

    def __len__(self):
        return 9

    def __getitem__(self, k):
        return X[k] + torch.rand(4), Y[k]


@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (X, TypeError, "{} must be a pair"),
        ((X,), TypeError, "pairs .inputs, targets. of tensors; got .Tensor."),
        ((X.numpy(), Y.numpy()), TypeError, "got .ndarray, ndarray."),
        ((X[:0], Y[:0]), ValueError, "{} is empty"),
        ((X, Y[:-1]), ValueError, "{} has 9 inputs and 8 targets"),
        ((X[0, 0], Y), ValueError, "{} must hold tensors with samples along"),
        ((X * float("nan"), Y), ValueError, "{} holds NaN"),
        ((X + 0j, Y), TypeError, "{} must be real"),
        ((X.to("meta"), Y), ValueError, "a tensor of {} is on meta and the model is on cpu"),
        ((X[:, :3], Y), ValueError, "the model fails on samples of {}: mat1 and mat2"),
        ((X, Y.double()), ValueError, "samples of forget and retain must be alike|loss_fn fails"),
        (TensorDataset(X), TypeError, "Dataset of pairs"),
        (TensorDataset(X[:0], Y[:0]), ValueError, "{} is empty"),
        (Restless(), ValueError, "sample 0 of {} differs when it is read again"),
        (
            DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 9, 9)),
            ValueError,
            "the sampler of {}, a WeightedRandomSampler",
        ),
    ],
)
def test_bad_samples(data, error, match, name):
    refuse(error, match.format(name), **{name: data})


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body = mlp()
        self.function = function

    def forward(self, x):
        return self.function(self.body(x))


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (lambda: F.relu, TypeError, "model must be a torch.nn.Module"),
        (nn.Identity, ValueError, "no trainable parameter"),
        (lambda: mlp().requires_grad_(False), ValueError, "no trainable parameter"),
        (lambda: nn.LazyLinear(3), ValueError, "not initialised"),
        (lambda: Wrapped(lambda z: (z, z)), ValueError, "loss_fn fails on the model's outputs"),
        (lambda: Wrapped(lambda z: "z"), ValueError, "must return tensors; it returned str"),
        (lambda: Wrapped(lambda z: z.mean()), ValueError, "must return tensors with samples"),
        (lambda: Wrapped(lambda z: z.T), ValueError, "must return tensors with samples"),
        (lambda: Wrapped(lambda z: z / 0), ValueError, "samples of forget hold NaN"),
        (lambda: Wrapped(lambda z: z - z.mean(0)), ValueError, "changes with the other samples"),
        (lambda: Wrapped(lambda z: F.dropout(z)), ValueError, "or at random"),
        (lambda: Wrapped(lambda z: z.detach()), ValueError, "does not depend on the parameters"),
    ],
)
def test_bad_models(model, error, match):
    refuse(error, match, model=model(), selection="full")


def test_rules_of_units_need_layers_with_units():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3).double())
    match = "no layer whose units can be selected"
    refuse(ValueError, match, model=model, selection="gradient", n_units=1)


def test_parameters_that_are_not_finite():
    model = mlp()
    with torch.no_grad():
        model[3].bias[2] = float("inf")
    refuse(ValueError, "parameter '3.bias' of the model holds NaN or infinity", model=model)


@pytest.mark.parametrize(
    ("loss_fn", "error", "match"),
    [
        ("cross_entropy", TypeError, "loss_fn must be callable"),
        (nn.CrossEntropyLoss(reduction="sum"), ValueError, "plain mean"),
        (nn.CrossEntropyLoss(reduction="none"), ValueError, "scalar tensor"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 9.0])), ValueError, "plain mean"),
        (nn.CrossEntropyLoss(ignore_index=1), ValueError, "has target 1, which loss_fn ignores"),
        (lambda z, t: 0.5, ValueError, "scalar tensor"),
        (lambda z, t: z.mean() / 0, ValueError, "loss of the forget samples is NaN or infinite"),
        (lambda z, t: (z - z.detach()).abs().pow(1.5).mean(), ValueError, "NaN or infinite"),
    ],
)
def test_bad_losses(loss_fn, error, match):
    refuse(error, match, loss_fn=loss_fn, selection="full")


def test_progress_is_shown_on_request(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm without IPython widgets
        unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, progress=True, selection="lfoci", **QUICK)
    shown = capsys.readouterr().err
    for phase in ("perturbations", "FOCI"):
        assert phase in shown
    for part in ("primal", "inputs of the head", "batch/s"):  # of which there are many
        assert part not in shown
    unlearn(mlp(), FORGET, RETAIN, F.cross_entropy, **QUICK)
    assert capsys.readouterr() == ("", "")


def test_warns_of_a_step_that_goes_too_far_and_of_overlapping_sets():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(0, 3, (60,))
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    options = {"loss_fn": torch.nn.functional.cross_entropy, "selection": "full"}
    with pytest.warns(UserWarning, match="raised the mean loss of the retained") as caught:
        unlearn(model, (x[:40], y[:40]), (x[40:], y[40:]), damping=1e-4, **options)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="5 of 5 samples of forget are also among") as caught:
        unlearn(model, (x[:5], y[:5]), (x, y), damping=100.0, **options)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "numbers",
    [list(range(200)), (3, 5), range(200), {3, 5}, 7, np.arange(9), torch.arange(9), FORGET[1] > 0],
    ids=["list", "tuple", "range", "set", "int", "array", "tensor", "mask"],
)
def test_samples_by_number_are_told_where_to_go(numbers):
    with pytest.raises(TypeError, match="forget must .*; here pass their tensors") as caught:
        unlearn(mlp(), numbers, RETAIN, F.cross_entropy)
    assert "Samples by number are for Unlearner.remove" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("arrays", [(True, True), (True, False), (False, True)])
def test_arrays_are_told_how_to_become_tensors(arrays):
    parts = [t.numpy() if array else t for t, array in zip(FORGET, arrays, strict=True)]
    for given in (tuple(parts), list(parts), FORGET[0].numpy()):
        with pytest.raises(TypeError, match="got .*; torch.from_numpy makes tensors of arrays"):
            unlearn(mlp(), given, RETAIN, F.cross_entropy)


def test_long_lists_are_shortened_in_messages():
    with pytest.raises(TypeError, match=r"got \(str, str, str, str, ... 300 values\)$"):
        unlearn(mlp(), ["a"] * 300, RETAIN, F.cross_entropy)


def tokens(n, dtype=torch.int64):
    return torch.randint(0, 50, (n, 6), generator=torch.manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(60, 5, generator=torch.manual_seed(0)),
        torch.randn(60, 2, 3, dtype=DOUBLE, generator=torch.manual_seed(0)),
        torch.arange(60 * 4).reshape(60, 4).double(),  # bits, nearly all of them zero
        torch.arange(60.0),
        tokens(60),
        tokens(60, torch.uint8),
        {"input_ids": tokens(60), "attention_mask": torch.ones(60, 6, dtype=torch.bool)},
    ],
    ids=["float", "double", "whole", "one", "tokens", "bytes", "dict"],
)
def test_overlap_is_found_wherever_it_is(inputs):
    labels = torch.arange(60) % 3

    def some(numbers, shift=0):
        y = (labels[numbers] + shift) % 3
        if isinstance(inputs, dict):
            x = {k: t[numbers] for k, t in inputs.items()} | {"labels": y}
        else:
            x = (inputs[numbers], y)
        return as_samples(x, "samples", torch.device("cpu"), torch.float64)

    def warnings_of(forget, retain):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_overlap(forget, retain)
        return [str(warning.message) for warning in caught]

    forget = some(list(range(20)))
    found = "{} of 20 samples of forget are also among those of retain: pass as retain the"
    for shared in (20, 19, 10):  # the last of forget, in any order
        retain = some([*range(59, 19, -1), *range(20 - shared, 20)])
        (message,) = warnings_of(forget, retain)
        assert message.startswith(found.format(shared))
    for shared in (9, 1, 0):  # as true duplicates may be
        assert not warnings_of(forget, some([*range(20, 60), *range(shared)]))
    assert not warnings_of(forget, some(list(range(60)), shift=1))  # other targets
    doubled = some([*range(20), *range(20)])
    assert warnings_of(doubled, some(list(range(60))))[0].startswith("40 of 40 samples")


def test_ignored_targets_are_refused_wherever_they_stand():
    torch.manual_seed(0)
    x, y = torch.randn(500, 5), torch.randint(0, 3, (500,))
    y[251] = -100
    model = torch.nn.Linear(5, 3)
    with pytest.raises(ValueError, match="sample 246 of retain has target -100, which loss_fn ign"):
        unlearn(
            model,
            (x[:5], y[:5]),
            (x[5:], y[5:]),
            torch.nn.functional.cross_entropy,
            selection="full",
        )
