"""The deletion step of the paper's code: its interface, its files, its defects on request."""

import argparse
import copy
import inspect
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import scrub_driver
from lcodec_ext._torch.batches import Batch
from lcodec_ext.compat import scrub
from lcodec_ext.compat.deletion import word_replacement
from lcodec_ext.compat.scrub import do_epoch, inp_perturb, manual_seed, reid_inp_perturb

# The word at the first noise, that noise adds up, has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:HessType='Sekhari' puts noise:UserWarning")

CE = nn.CrossEntropyLoss()
DEVICE = torch.device("cpu")


class Logistic(nn.Module):
    def __init__(self, n_inputs=64, n_classes=10):
        super().__init__()
        self.n_inputs = n_inputs
        self.linear = nn.Linear(n_inputs, n_classes)

    def forward(self, x):
        return self.linear(x.view(-1, self.n_inputs))


class Twins(nn.Module):
    """Two hidden layers that look alike."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.middle = nn.Linear(8, 8)
        self.twin = nn.Linear(8, 8)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        x = torch.relu(self.middle(x))
        return self.last(torch.relu(self.twin(x)))


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Linear(4 * 9, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 8, 8))))
        return self.last(nn.functional.max_pool2d(x, 2).flatten(1))


def digits(n):
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images[:n] / 16, dtype=torch.float32)
    return TensorDataset(x, torch.tensor(data.target[:n]))


def parameters(**changes):
    values = {
        "train_epochs": 4,
        "orig_trainset_size": 300,
        "n_perturbations": 40,
        "selectionType": "FOCI",
        "FOCIType": "full",
        "order": "Hessian",
        "HessType": "Sekhari",
        "approxType": "FD",
        "l2_reg": 0.01,
        "epsilon": 0.1,
        "delta": 0.01,
        "lr": 1.0,
        "scrub_batch_size": None,
        "hessian_device": "cpu",
        "cheap_foci_thresh": 0.05,
    }
    return argparse.Namespace(**(values | changes))


def train(model, data, stem, *, epochs=4, lr=0.2, seed=0, **options):
    torch.manual_seed(seed)
    loader = DataLoader(data, 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optim = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.01)
    for epoch in range(epochs):
        do_epoch(model, loader, CE, epoch, epochs, optim, DEVICE, stem, **options)
    return model


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # and so again at the end
    manual_seed(0)


@pytest.fixture(scope="module")
def data():
    return digits(300)


@pytest.fixture
def stem(tmp_path):
    return str(tmp_path / "digits")


def gradient(model, data, indices):
    """Mean gradient by parameter name, the model in evaluation mode."""
    x, y = data[indices]
    x = x.to(next(model.parameters()).dtype)
    loss = CE(model.eval()(x), y)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), parts, strict=True))


def flat(tensors):
    return torch.cat([t.detach().flatten().double() for t in tensors.values()])


def change(before, after):
    return flat(dict(after.named_parameters())) - flat(dict(before.named_parameters()))


# --------------------------------------------------------------------------------------------
# Names


def test_signatures():
    expected = {
        "DisableBatchNorm": "model",
        "SubsetDataWrapper": "dataset, exclude_indices=None, include_indices=None",
        "do_epoch": "model, dataloader, criterion, epoch, nepochs, optim=None, device='cpu', "
        "outString='', compute_grads=False, retrain=False, *, reference_bugs=None",
        "getGradObjs": "model, *, reference_bugs=None",
        "gradNorm": "model",
        "inp_perturb": "model, dataset, criterion, params, optim, device, outString, "
        "is_nlp=False, *, retained=None, reference_bugs=None",
        "manual_seed": "seed",
        "reid_inp_perturb": "model, dataset, engine, params, device, outString, *, retained=None, "
        "reference_bugs=None",
        "retrain_model": "model, train_loader, val_loader, criterion, nepochs, optim, "
        "device='cpu', *, reference_bugs=None",
        "scrubSample": "*_, **__",
        "vgg_inp_perturb": "model, model_copy, dataset, criterion, params, optim, device, "
        "outString, is_nlp=False, **options",
    }
    assert set(expected) <= set(scrub.__all__)
    for name, wanted in expected.items():
        given = inspect.signature(getattr(scrub, name)).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in given]
        assert str(inspect.Signature(bare)) == f"({wanted})"


def test_scrub_sample_says_what_to_use():
    with pytest.raises(NotImplementedError, match="inp_perturb"):
        scrub.scrubSample(None, None)


def test_disable_batch_norm_goes_by_type():
    model = nn.Sequential(SmallCNN(), nn.Dropout()).train()
    assert scrub.DisableBatchNorm(model) is model
    assert not model[0].norm.training
    assert model[0].training
    assert model[0].conv.training
    assert model[1].training


def test_subset_data_wrapper():
    data = list("abcde")
    assert list(scrub.SubsetDataWrapper(data, exclude_indices=[1, np.int64(3)])) == list("ace")
    assert list(scrub.SubsetDataWrapper(data, include_indices=[4, 0])) == list("ea")
    assert len(scrub.SubsetDataWrapper(data, include_indices=[4, 0])) == 2
    with pytest.raises(ValueError, match="exclude_indices or include_indices"):
        scrub.SubsetDataWrapper(data)


def test_manual_seed():
    drawn = []
    for _ in range(2):
        manual_seed(3)
        drawn.append((np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]


# --------------------------------------------------------------------------------------------
# Training and its files


def test_files_hold_gradients_at_their_weights(data, stem):
    model = train(Twins(), data, stem)
    names = [name for name, _ in model.named_parameters()]
    for epoch in (2, 3):
        params = torch.load(f"{stem}_epoch_{epoch}_params.pt", weights_only=True)
        grads = torch.load(f"{stem}_epoch_{epoch}_grads.pt", weights_only=True)
        at = Twins()
        at.load_state_dict({name: params[str(model), name] for name in names})
        expected = gradient(at, data, range(300))
        for name in names:
            torch.testing.assert_close(grads[str(model), name], expected[name])
        # the published keys, every module's; of twins the last one's
        assert params.keys() == grads.keys()
        assert len(params) == len(names) + 2 * len({str(m) for m in model.children()})
        torch.testing.assert_close(
            grads["Linear(in_features=8, out_features=8, bias=True)", "bias"],
            grads[str(model), "twin.bias"],
        )
    torch.testing.assert_close(params[str(model), "last.bias"], model.last.bias.detach())
    assert all(p.grad is None for p in model.parameters())


def test_files_do_not_change_the_training(data, stem, tmp_path):
    start = SmallCNN()
    model, other = (
        train(copy.deepcopy(start), data, stem + name, retrain=retrain)
        for name, retrain in (("a", False), ("b", True))
    )
    assert len(list(tmp_path.iterdir())) == 4
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert model.training


def test_epoch_measures(data):
    model = Logistic()
    loader = DataLoader(data, 128)  # batches of 128, 128 and 44
    loss, accuracy, norm = do_epoch(model, loader, CE, 0, 0, device=DEVICE, compute_grads=True)
    x, y = data[:]
    expected = CE(model(x), y).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert accuracy == (model(x).argmax(1) == y).sum().item() / 300
    assert norm == pytest.approx(flat(gradient(model, data, range(300))).norm().item(), rel=1e-5)
    assert do_epoch(model, loader, CE, 0, 0) == pytest.approx((loss, accuracy))

    means = [
        (CE(model(x), y).item(), flat(gradient(model, data, rows)).norm().item())
        for rows in (range(128), range(128, 256), range(256, 300))
        for x, y in [data[rows]]
    ]
    published = do_epoch(
        model, loader, CE, 0, 0, device=DEVICE, compute_grads=True, reference_bugs=True
    )
    assert published == pytest.approx((*np.mean(means, 0)[:1], accuracy, np.mean(means, 0)[1]))


def test_gradient_bank_of_the_published_code(data, stem):
    """First batch once, the others once for every module that has the parameter, over samples."""
    wrapped = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 10)))
    by_depth = {"1.0.weight": 3, "1.0.bias": 3}
    batches = [data[range(k, k + 100)] for k in (0, 100, 200)]
    optim = torch.optim.SGD(wrapped.parameters(), lr=0.3)
    twin = copy.deepcopy(wrapped)
    expected = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for number, (x, y) in enumerate(batches):
        loss = CE(twin(x), y)
        parts = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(twin.named_parameters(), parts, strict=True):
                expected[name] += g * (1 if number == 0 else by_depth[name])
                p -= 0.3 * g
    do_epoch(wrapped, batches, CE, 0, 1, optim, DEVICE, stem, reference_bugs=True)
    grads = torch.load(f"{stem}_epoch_0_grads.pt", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(grads[str(wrapped), name], value / 300)


def test_retrain_model(data):
    torch.manual_seed(0)
    model = Logistic()
    loader = DataLoader(data, 50, shuffle=True)
    optim = torch.optim.SGD(model.parameters(), lr=0.3)
    measured = scrub.retrain_model(model, loader, loader, CE, 3, optim, DEVICE)
    assert len(measured) == 5
    assert all(type(value) is float for value in measured)
    assert measured[0] == pytest.approx(measured[2])
    assert measured[3] > 0.7


# --------------------------------------------------------------------------------------------
# The published behaviour


class Doubled(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return x.double(), y


def published(model, request, params, stem, **options):
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    return inp_perturb(
        model, request, CE, params, optim, DEVICE, stem, reference_bugs=True, **options
    )


def test_published_newton_step_is_gradient_ascent(stem):
    """Its step is g / ((n - 1) lambda): the secant is tiny and the sample's Hessian zero."""
    data = digits(1500)
    model = train(Logistic(), data, stem, epochs=20, lr=0.1, reference_bugs=True).double()
    n, l2_reg = 1500, 0.01
    expected = flat(gradient(model, data, [7])) / ((n - 1) * l2_reg)
    params = parameters(train_epochs=20, orig_trainset_size=n, selectionType="Full", epsilon=1e15)
    before = copy.deepcopy(model)
    published(model, Doubled(Subset(data, [7])), params, stem)
    error = (change(before, model) - expected).norm() / expected.norm()
    assert error.item() < 2e-6


def test_published_step_in_full(data, stem):
    """The Newton step of all units, by its formula: matrix, order of draws, noise."""
    model = train(Logistic(), data, stem, reference_bugs=True)
    params = parameters(selectionType="Full", l2_reg=0.1)
    n, l2_reg, request = 300, 0.1, Subset(data, [7])
    weight, bias = ("linear.weight", "linear.bias")

    def rows(tensors):  # class by class, its weights and then its bias
        return torch.cat(
            [torch.cat([tensors[weight][k], tensors[bias][k : k + 1]]) for k in range(10)]
        )

    g = rows(gradient(model, data, [7]))
    banks = []
    for epoch in (2, 3):
        for what in ("params", "grads"):
            bank = torch.load(f"{stem}_epoch_{epoch}_{what}.pt", weights_only=True)
            banks.append(rows({key: bank[str(model), key] for key in (weight, bias)}))
    w1, g1, w2, g2 = banks
    hessian = n / (n - 1) * torch.outer(g1 - g2, g1 - g2) / (w1 - w2 + 1e-6).abs().sum()
    step = torch.linalg.solve(hessian + l2_reg * torch.eye(650), g) / (n - 1)
    before = rows({name: p.detach().clone() for name, p in model.named_parameters()})

    manual_seed(1)
    for _ in range(params.n_perturbations):
        torch.randn(1, 8, 8)
    sigma = 2 * 0.25 / (n**2 * l2_reg**3) / 0.1 * math.sqrt(2 * math.log(1.25 / 0.01))
    noise = torch.normal(torch.zeros(650), sigma)

    manual_seed(1)
    returned = published(model, request, params, stem)
    after = rows({name: p.detach() for name, p in model.named_parameters()})
    assert noise.norm() > 0.1 * step.norm()  # neither hides the other
    torch.testing.assert_close(after, before + step + noise, rtol=1e-4, atol=1e-5)

    foci_val, state, loss_before, loss_after, norm_before, norm_after = returned
    assert foci_val == 0
    assert state["linear.weight"].data_ptr() == model.linear.weight.data_ptr()
    x, y = data[[7]]
    assert loss_before.shape == loss_after.shape == ()
    assert loss_after.item() == pytest.approx(CE(model(x), y).item(), rel=1e-5)
    assert norm_before == pytest.approx(g.norm().item(), rel=1e-5)
    assert type(norm_after) is float
    assert all(p.grad is None for p in model.parameters())


def test_published_layers_collide(data, stem):
    """Of layers that print the same only the last is changed, by its own gradient."""
    model = train(Twins(), data, stem, reference_bugs=True)
    before, g = copy.deepcopy(model), gradient(model, data, [3])
    params = parameters(selectionType="Full", order="BP", lr=0.5)
    published(model, Subset(data, [3]), params, stem)
    for name, p in model.named_parameters():
        old = before.get_parameter(name)
        expected = old if name.startswith("middle") else old + 0.5 * g[name]
        torch.testing.assert_close(p, expected)
    assert g["middle.weight"].norm() > 0


def test_published_certified_removal(data, stem):
    """The sample's Hessian is zero and no 1 / (n - 1) is taken: g / lambda."""
    model = train(Logistic(), data, stem, reference_bugs=True)
    before, g = copy.deepcopy(model), flat(gradient(model, data, [3]))
    params = parameters(selectionType="Full", HessType="CR", l2_reg=0.5)
    published(model, Subset(data, [3]), params, stem)
    torch.testing.assert_close(change(before, model), g / 0.5, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "kept"), [(None, [3]), (2, [3, 4])])
def test_published_request_is_cut(data, stem, size, kept):
    model = Logistic()
    before, g = copy.deepcopy(model), flat(gradient(model, data, kept))
    params = parameters(selectionType="Full", order="BP", scrub_batch_size=size)
    published(model, Subset(data, [3, 4, 5]), params, stem)
    torch.testing.assert_close(change(before, model), g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("selection", "foci", "n_units"),
    [("One", None, 1), ("FOCI", "cheap", 1), ("FOCI", "full", None), ("Random", None, None)],
)
def test_published_selection(data, stem, selection, foci, n_units):
    model = train(Twins(), data, stem, reference_bugs=True)
    params = parameters(selectionType=selection, FOCIType=foci, order="BP")
    before, g = copy.deepcopy(model), gradient(model, data, [3])
    manual_seed(0)
    published(model, Subset(data, [3]), params, stem)
    changed = {
        (name, unit)
        for name, module in model.named_children()
        for unit in range(len(module.bias))
        if not torch.equal(module.weight[unit], before.get_submodule(name).weight[unit])
        or not torch.equal(module.bias[unit], before.get_submodule(name).bias[unit])
    }
    assert 0 < len(changed) <= (n_units or 33)
    for name, unit in changed:
        step = model.get_submodule(name).bias[unit] - before.get_submodule(name).bias[unit]
        owner = "twin" if name == "middle" else name  # whose gradient the key has
        assert step.item() == pytest.approx(g[f"{owner}.bias"][unit].item(), abs=1e-6)


def test_published_modes(data, stem):
    """Batch norm that an attribute calls so stays in training mode; all else goes to evaluation."""

    class Named(SmallCNN):
        def __init__(self):
            super().__init__()
            self.BatchNorm, self.norm = self.norm, nn.Identity()

        def forward(self, x):
            x = torch.relu(self.BatchNorm(self.conv(x.view(-1, 1, 8, 8))))
            return self.last(nn.functional.max_pool2d(x, 2).flatten(1))

    model = train(Named(), data, stem, reference_bugs=True)
    seen = model.BatchNorm.num_batches_tracked.item()
    published(model, Subset(data, [3]), parameters(selectionType="One", order="BP"), stem)
    assert model.training
    assert model.BatchNorm.training
    assert not model.conv.training
    assert model.BatchNorm.num_batches_tracked.item() == seen + 2


def test_published_reused_layer_ends_in_an_error(data, stem):
    class Reused(Twins):
        def forward(self, x):
            x = torch.relu(self.first(x.flatten(1)))
            return self.last(self.middle(self.middle(self.twin(x))))

    model = train(Reused(), data, stem, reference_bugs=True)
    with pytest.raises(IndexError, match="called more than once"):
        published(model, Subset(data, [3]), parameters(selectionType="Full"), stem)


# --------------------------------------------------------------------------------------------
# What is right


def dense_step(model, data, stem, forget, *, l2_reg, n=300, epochs=4):
    """The step by the retained objective's secant, dense, in float64, from the retained samples.

    Also the step without the secant, and the secant's direction.
    """
    names = [name for name, _ in model.named_parameters()]
    kept = [k for k in range(n) if k not in forget]
    w, g = [], []
    at = copy.deepcopy(model).double()
    for epoch in (epochs - 2, epochs - 1):
        bank = torch.load(f"{stem}_epoch_{epoch}_params.pt", weights_only=True)
        at.load_state_dict({name: bank[str(model), name] for name in names}, strict=False)
        w.append(flat({name: bank[str(model), name] for name in names}))
        g.append(flat(gradient(at, data, kept)))
    y, s = g[1] - g[0], w[1] - w[0]
    matrix = torch.outer(y, y) / (y @ s) + l2_reg * torch.eye(len(y), dtype=torch.float64)
    at.load_state_dict(model.state_dict())
    m = len(forget)
    removed = flat(gradient(at, data, forget)) + l2_reg * flat(dict(at.named_parameters()))
    return torch.linalg.solve(matrix, removed * m / (n - m)), removed * m / (n - m) / l2_reg, y


def scrubbed(model, request, params, stem, **options):
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    return inp_perturb(model, request, CE, params, optim, DEVICE, stem, **options)


@pytest.mark.parametrize("forget", [[7], [3, 30, 201]])
def test_step_is_that_of_the_retained_secant(data, stem, forget):
    model = train(Logistic(), data, stem).double()
    expected, ascent, direction = dense_step(model, data, stem, forget, l2_reg=0.01)
    before = copy.deepcopy(model)
    x, y = data[forget]
    loss, norm = CE(model(x.double()), y).item(), flat(gradient(model, data, forget)).norm().item()
    params = parameters(selectionType="Full", HessType="CR")
    model.train()
    returned = scrubbed(model, Subset(data, forget), params, stem)
    # The pair is the difference of gradients in float32, of a few times its size, and the step's
    # relative error is the pair's; along the pair, where the step is small, no less in size.
    bound = 32 * torch.finfo(torch.float32).eps * expected.norm()
    assert (change(before, model) - expected).norm() < bound
    along, without = (change(before, model) @ direction).abs(), (ascent @ direction).abs()
    assert along < 0.5 * without  # the pair's curvature is of rank one, and it counts there
    assert (along - (expected @ direction).abs()).abs() < bound * direction.norm()
    assert returned[0] == 0
    assert returned[1]["linear.bias"].data_ptr() == model.linear.bias.data_ptr()
    assert returned[2].item() == pytest.approx(loss)
    assert returned[3].item() == pytest.approx(CE(model(x.double()), y).item())
    assert returned[4] == pytest.approx(norm)
    assert type(returned[5]) is float
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def write_pair(model, stem, epochs, sign=1):
    """Files of two epochs whose secant has the curvature of the squared weights."""
    for epoch, factor in ((epochs - 2, 0.9), (epochs - 1, 1.0)):
        for p in model.parameters():
            p.grad = sign * factor * p.detach()
        grads, params = scrub.getGradObjs(model)
        params = {key: factor * value for key, value in params.items()}
        torch.save(grads, f"{stem}_epoch_{epoch}_grads.pt")
        torch.save(params, f"{stem}_epoch_{epoch}_params.pt")
    model.zero_grad()


def changed_units(before, after):
    return {
        (name, unit)
        for name, module in after.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        for unit in range(len(module.weight))
        if not torch.equal(module.weight[unit], before.get_submodule(name).weight[unit])
    }


def test_layers_that_look_alike_are_told_apart(data, stem):
    model = train(Twins(), data, stem)
    before, g = copy.deepcopy(model), gradient(model, data, [3])
    params = parameters(selectionType="Full", order="BP", lr=0.5)
    scrubbed(model, Subset(data, [3]), params, stem)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before.get_parameter(name) + 0.5 * g[name])


@pytest.mark.parametrize("model_of", [Twins, SmallCNN])
@pytest.mark.parametrize("order", ["BP", "Hessian"])
def test_selected_units_change_and_nothing_else(data, stem, model_of, order):
    start = train(model_of(), data, stem)
    write_pair(start, stem, 4)
    sizes = {}
    for selection, foci in [("FOCI", "full"), ("Random", None), ("One", None), ("FOCI", "cheap")]:
        model = copy.deepcopy(start)
        params = parameters(selectionType=selection, FOCIType=foci, order=order, HessType="CR")
        manual_seed(0)
        scrubbed(model, Subset(data, [3, 4]), params, stem)
        found = changed_units(start, model)
        sizes[selection, foci] = len(found)
        for name, p in model.named_parameters():
            rows = [unit for layer, unit in found if name.startswith(f"{layer}.")]
            kept = torch.ones(len(p), dtype=torch.bool)
            kept[rows] = False
            assert torch.equal(p[kept], start.get_parameter(name)[kept])
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, start.get_buffer(name))
        again = copy.deepcopy(start)
        manual_seed(0)
        scrubbed(again, Subset(data, [3, 4]), params, stem)
        assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert sizes["One", None] == sizes["FOCI", "cheap"] == 1
    if order == "Hessian":  # whose regulariser moves units without a gradient, too
        assert sizes["Random", None] == sizes["FOCI", "full"] >= 1


def test_regulariser_and_noise(data, stem):
    """HessType "Sekhari" is "CR" and noise on every trainable parameter, for all m samples."""
    start = train(SmallCNN(), data, stem)
    write_pair(start, stem, 4)
    forget, l2_reg = [3, 4, 5], 0.5
    params = parameters(selectionType="One", HessType="CR", l2_reg=l2_reg)
    model = copy.deepcopy(start)
    manual_seed(0)
    scrubbed(model, Subset(data, forget), params, stem)
    noisy = copy.deepcopy(start)
    params.HessType = "Sekhari"
    manual_seed(0)
    scrubbed(noisy, Subset(data, forget), params, stem)
    noise = change(model, noisy)
    assert (noise != 0).all()
    gamma = 2 * 0.25 * 3**2 / (300**2 * l2_reg**3)
    sigma = gamma / 0.1 * math.sqrt(2 * math.log(1.25 / 0.01))
    assert noise.std().item() == pytest.approx(sigma, rel=0.25)  # of 418 draws

    params.delta = 1.0  # as the published defaults are: holds of anything, and needs no noise
    silent = copy.deepcopy(start)
    manual_seed(0)
    scrubbed(silent, Subset(data, forget), params, stem)
    assert all(map(torch.equal, model.parameters(), silent.parameters()))


def test_noise_that_spoils_the_model_is_warned_of(data, stem):
    start = train(SmallCNN(), data, stem)
    write_pair(start, stem, 4)
    params = parameters(selectionType="One", l2_reg=0.03, epsilon=1.0)
    with pytest.warns(UserWarning, match="the noise for epsilon=1, .* samples to delete") as caught:
        scrubbed(copy.deepcopy(start), Subset(data, [3, 4, 5]), params, stem)
    assert {each.filename for each in caught} == {__file__}
    params.epsilon = 1e9
    scrubbed(copy.deepcopy(start), Subset(data, [3, 4, 5]), params, stem)  # without a warning


def fisher(model, data, retained):
    rows = torch.stack([flat(gradient(model, data, [k])) for k in retained])
    return rows.T @ rows / len(rows)


def softmax_hessian(model, data, retained):
    """The dense Hessian of logistic regression, by autograd."""
    x, y = data[retained]
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(vector):
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        tensors = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return CE(torch.func.functional_call(model, tensors, (x.double(),)), y)

    return torch.autograd.functional.hessian(loss, flat(dict(model.named_parameters())))


@pytest.mark.parametrize(
    ("model_of", "kind", "matrix_of", "l2_reg"),
    [
        (Logistic, "Fisher", fisher, 0.01),
        (SmallCNN, "Fisher", fisher, 0.5),
        (Logistic, "GaussNewton", softmax_hessian, 0.01),
    ],
)
def test_curvature_of_the_retained_samples(data, stem, model_of, kind, matrix_of, l2_reg):
    """The dense exact step: of logistic regression, Newton's on the retained objective."""
    model = train(model_of(), data, stem).double().eval()
    forget = [3, 30]
    retained = [k for k in range(60) if k not in forget]
    params = parameters(
        selectionType="Full",
        HessType="CR",
        approxType=kind,
        orig_trainset_size=60,
        l2_reg=l2_reg,
    )
    w = flat(dict(model.named_parameters()))
    matrix = matrix_of(model, data, retained) + l2_reg * torch.eye(len(w), dtype=torch.float64)
    expected = torch.linalg.solve(
        matrix, (flat(gradient(model, data, forget)) + l2_reg * w) * 2 / 58
    )
    before = copy.deepcopy(model)
    forget_set, retained_set = (Doubled(Subset(data, part)) for part in (forget, retained))
    scrubbed(model, forget_set, params, stem, retained=retained_set)
    assert (change(before, model) - expected).norm() < 1e-7 * expected.norm()


def test_errors_name_what_is_wrong(data, stem):
    model = train(Logistic(), data, stem)
    request = Subset(data, [1])
    for changes, kind, message in [
        ({"selectionType": "All"}, ValueError, "params.selectionType must be one of 'Full'"),
        ({"FOCIType": "fast"}, ValueError, "params.FOCIType must be one of"),
        ({"order": "Newton"}, ValueError, "params.order must be one of"),
        ({"HessType": "none"}, ValueError, "params.HessType must be one of"),
        ({"approxType": "KFAC"}, ValueError, "params.approxType must be one of"),
        ({"approxType": "Fisher"}, ValueError, "pass retained="),
        ({"n_perturbations": 2}, ValueError, "params.n_perturbations must be an integer >= 3"),
        ({"orig_trainset_size": 1}, ValueError, "params.orig_trainset_size must be"),
        ({"train_epochs": 1}, ValueError, "params.train_epochs must be an integer >= 2"),
        ({"train_epochs": 9}, FileNotFoundError, "approxType='FD' reads"),
    ]:
        with pytest.raises(kind, match=message):
            scrubbed(model, request, parameters(**changes), stem)
    lacking = parameters(selectionType="Full")
    del lacking.l2_reg
    with pytest.raises(AttributeError, match="l2_reg"):
        scrubbed(model, request, lacking, stem)
    with pytest.raises(ValueError, match="dataset must have samples"):
        scrubbed(model, Subset(data, []), parameters(), stem)
    with pytest.raises(TypeError, match="reference_bugs must be True or False"):
        scrubbed(model, request, parameters(), stem, reference_bugs=1)
    with pytest.raises(ValueError, match="must be a file of this model"):
        scrubbed(Twins(), request, parameters(), stem)


def test_files_of_the_published_code_are_read(data, stem):
    """Their gradients are off by a factor or more, and used as they are: same keys, same names."""
    model = train(Twins(), data, stem, reference_bugs=True)
    before = copy.deepcopy(model)
    params = parameters(selectionType="Full", HessType="CR")
    scrubbed(model, Subset(data, [3]), params, stem)
    assert (change(before, model) != 0).any()


def test_files_without_positive_curvature(data, stem):
    model = train(Twins(), data, stem)
    write_pair(model, stem, 4, sign=-1)
    with pytest.raises(ValueError, match="hold no positive curvature"):
        scrubbed(model, Subset(data, [3]), parameters(), stem)


# --------------------------------------------------------------------------------------------
# Text, and re-identification


class Texts(nn.Module):
    """A classifier as the published script defines it, of a tiny DistilBERT."""

    def __init__(self, n_labels=5):
        super().__init__()
        config = transformers.DistilBertConfig(
            vocab_size=30522,
            dim=16,
            hidden_dim=32,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=12,
        )
        self.distilbert = transformers.DistilBertModel(config)
        self.pre_classifier = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, n_labels)
        self.dropout = nn.Dropout(0.2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        state = self.distilbert(input_ids=input_ids, attention_mask=attention_mask)[0][:, 0]
        return self.classifier(self.dropout(torch.relu(self.pre_classifier(state))))


@pytest.fixture(scope="module")
def texts():
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (24, 10), generator=rng)
    lengths = torch.randint(5, 11, (24,), generator=rng)
    mask = (torch.arange(10) < lengths[:, None]).long()
    ids[:, 0] = 1
    ids[torch.arange(24), lengths - 1] = 2
    labels = torch.nn.functional.one_hot(torch.arange(24) % 5, 5).float()
    return TensorDataset(ids * mask, mask, torch.zeros_like(ids), labels)


@pytest.mark.parametrize("reference_bugs", [False, True])
@pytest.mark.parametrize("size", [None, 3])
def test_text(texts, stem, reference_bugs, size):
    torch.manual_seed(0)
    model = Texts()
    write_pair(model, stem, 4)
    before = copy.deepcopy(model).eval()
    request = Subset(texts, [4] if size is None else [4, 5, 6])
    params = parameters(
        n_tokens_to_replace=2,
        n_perturbations=30,
        scrub_batch_size=size,
        orig_trainset_size=24,
        HessType="Sekhari" if reference_bugs else "CR",
        epsilon=1e9,
        delta=0.5,
    )
    criterion = nn.BCEWithLogitsLoss()
    manual_seed(0)
    returned = inp_perturb(
        model,
        request,
        criterion,
        params,
        torch.optim.AdamW(model.parameters()),
        DEVICE,
        stem,
        is_nlp=True,
        reference_bugs=reference_bugs,
    )
    changed = {name.split(".")[0] for name, _ in changed_units(before, model)}
    assert changed <= {"distilbert", "pre_classifier", "classifier"}
    assert changed
    ids, mask, _, labels = next(iter(DataLoader(request, len(request))))
    assert returned[2].item() == pytest.approx(
        criterion(before(ids, mask), labels).item(), rel=1e-5
    )
    assert returned[3].item() == pytest.approx(
        criterion(model.eval()(ids, mask), labels).item(), rel=1e-5
    )


@pytest.mark.parametrize(("vocabulary", "first"), [(30522, 999), (100, 3)])
def test_words_are_replaced_by_words(texts, vocabulary, first):
    model = nn.ModuleList([nn.Embedding(12, 4), nn.Embedding(vocabulary, 4)])
    ids, mask, _, _ = texts[:]
    batch = Batch((), {"input_ids": ids, "attention_mask": mask}, None, len(ids))
    replace = word_replacement(model, batch, 2)
    changed = replace(batch.kwargs, np.random.default_rng(0))["input_ids"]
    differs = changed != ids
    assert (differs.sum(1) == 2).all()
    assert changed[differs].min() >= first
    assert not differs[:, 0].any()
    assert not differs[mask == 0].any()
    assert (changed[torch.arange(24), mask.sum(1) - 1] == 2).all()


class Person(SmallCNN):
    """As torchreid's models: logits in training mode, features otherwise."""

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 8, 8))))
        features = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.last(features) if self.training else features


class Engine:
    def __init__(self, model):
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.optimizer = torch.optim.Adam(model.parameters())

    def compute_loss(self, criterion, outputs, targets):
        return criterion(outputs, targets)


class People(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return {"img": x, "pid": int(y), "camid": 0, "impath": "a.jpg"}


@pytest.mark.parametrize("reference_bugs", [False, True])
@pytest.mark.parametrize("selection", ["FOCI", "Random", "Full"])
def test_reid(data, stem, reference_bugs, selection):
    torch.manual_seed(0)
    model = Person()
    write_pair(model, stem, 4)
    start, engine = copy.deepcopy(model), Engine(model)
    request = Subset(People(data), [2, 12])
    params = parameters(selectionType=selection, scrub_batch_size=2, HessType="CR", l2_reg=2.0)
    manual_seed(0)
    returned = reid_inp_perturb(
        model, request, engine, params, DEVICE, stem, reference_bugs=reference_bugs
    )
    assert len(returned) == 5
    start.eval()
    start.training = True
    x, y = data[[2, 12]]
    assert returned[1].item() == pytest.approx(engine.criterion(start(x), y).item(), rel=1e-5)
    changed = changed_units(start, model)
    assert changed
    if selection == "Random" and reference_bugs:
        assert len(changed) == 10
    assert not model._forward_pre_hooks
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, start.get_buffer(name))


def test_device_may_be_named_with_or_without_its_number(data, stem):
    model = train(Logistic(), data, stem)  # "cpu" and "cpu:0" differ as "cuda" and "cuda:0" do
    for device in ("cpu", "cpu:0"):
        params = parameters(selectionType="One", HessType="CR")
        inp_perturb(copy.deepcopy(model), Subset(data, [1]), CE, params, None, device, stem)


def test_vgg_takes_a_copy_of_the_model(data, stem):
    model = train(Logistic(), data, stem)
    other = copy.deepcopy(model)
    params = parameters(selectionType="Full", HessType="CR")
    optim = torch.optim.SGD(model.parameters(), lr=1.0)
    request = Subset(data, [1])
    untouched = copy.deepcopy(model)
    scrub.vgg_inp_perturb(model, untouched, request, CE, params, optim, DEVICE, stem)
    inp_perturb(other, request, CE, params, optim, DEVICE, stem)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not torch.equal(model.linear.weight, untouched.linear.weight)


# --------------------------------------------------------------------------------------------
# A script written for the published code


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("LogisticRegressor", ["--selectionType", "Full", "--HessType", "CR"]),
        ("Logistic2NN", ["--HessType", "CR", "--scrub_batch_size", "2", "--removal_class", "3"]),
        ("SmallConvNet", ["--order", "BP", "--lr", "0.01"]),
        ("LogisticRegressor", ["--epsilon", "100", "--l2_reg", "0.1"]),
    ],
)
def test_script(tmp_path, monkeypatch, model, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained_models").mkdir()
    scrub_driver.main(["--mode", "train", "--model", model])
    trained = list((tmp_path / "trained_models").iterdir())
    assert len(trained) == 5  # the model, and two epochs' parameters and gradients
    scrub_driver.main(["--model", model, *options])
    table = pd.read_csv("scrub_ablate_results.csv")
    done = table[table.bad_sample == 0]
    assert len(done) == (2 if "--scrub_batch_size" in options else 3)
    assert np.isfinite(table.select_dtypes("number").to_numpy()).all()
    assert (table.sample_loss_after != table.sample_loss_before).all()
    if "CR" in options or "BP" in options:  # no noise
        assert table.sample_loss_after.mean() > table.sample_loss_before.mean()


def test_a_script_that_rejects_every_removal_says_what_happened(tmp_path):
    """Started as people start it, with the published defaults."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, scrub_driver.__file__]

    def start(*options):
        return subprocess.run(
            [*command, *options], capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    trained = start("--mode", "train")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.startswith("trained: trained_models/")
    done = start("--selectionType", "Full", "--val_gap_skip", "-2")  # no accuracy is high enough
    assert done.returncode == 1
    assert "ZeroDivisionError" not in done.stderr
    assert "3 removals in a row were taken back by the script" in done.stderr
    assert "300 removals in a row were taken back by the script" in done.stderr
    assert "ValueError: dataloader must have samples; it has none" in done.stderr


def test_rejections_in_a_row_are_told(data, stem):
    model = train(Logistic(), data, stem)
    params = parameters(HessType="CR", selectionType="Full", orig_trainset_size=60)
    state = copy.deepcopy(model.state_dict())
    for number in range(12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scrubbed(model, Doubled(Subset(data, [number])), params, stem)
        told = [str(each.message) for each in caught if "taken back" in str(each.message)]
        assert len(told) == (number in (3, 10))
        if told:
            assert f"{number} removals in a row were taken back by the script" in told[0]
        model.load_state_dict(state)


def test_an_epoch_without_samples_says_so():
    loader = DataLoader(TensorDataset(torch.zeros(0, 64), torch.zeros(0, dtype=torch.long)))
    for options in ({}, {"reference_bugs": True}):
        with pytest.raises(ValueError, match="dataloader must have samples; it has none. Scripts"):
            do_epoch(Logistic(), loader, CE, 0, 0, **options)
