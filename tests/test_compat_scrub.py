"""The deletion step of the paper's code: its interface, its files, its defects on request."""

import argparse
import copy
import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lcodec_ext.compat import scrub
from lcodec_ext.compat.scrub import do_epoch, inp_perturb, manual_seed, reid_inp_perturb

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
        "outString='', compute_grads=False, retrain=False, *, reference_bugs=False",
        "getGradObjs": "model",
        "gradNorm": "model",
        "inp_perturb": "model, dataset, criterion, params, optim, device, outString, "
        "is_nlp=False, *, retained=None, reference_bugs=False",
        "manual_seed": "seed",
        "reid_inp_perturb": "model, dataset, engine, params, device, outString, *, retained=None, "
        "reference_bugs=False",
        "retrain_model": "model, train_loader, val_loader, criterion, nepochs, optim, device='cpu'",
        "scrubSample": "*_, **__",
        "vgg_inp_perturb": "model, model_copy, dataset, criterion, params, optim, device, "
        "outString, is_nlp=False, **options",
    }
    assert sorted(expected) == sorted(scrub.__all__)
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


def test_x():
    pass
