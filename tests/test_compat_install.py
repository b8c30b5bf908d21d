"""Unmodified scripts of the published code's shape, and the names that they import."""

import copy
import gc
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lcodec_ext import compat
from lcodec_ext.compat import deletion, scrub
from lcodec_ext.compat.data import residual_set
from lcodec_ext.compat.switch import SWITCH

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _clean():
    yield
    compat.uninstall()


def test_install_and_uninstall():
    before = dict(sys.modules)
    installed = compat.install(reference_bugs=True)
    assert {"codec", "codec.foci", "scrub_tools", "vgg_scrub_tools", "nn_utils"} <= set(
        installed.modules
    )
    import codec
    from codec.torch_codec import codec3
    from codec.torch_foci import cheap_foci
    from scrub_tools import inp_perturb, scrubSample  # noqa: F401

    assert codec.torch_codec3 is codec3
    assert cheap_foci is codec.cheap_torch_foci
    assert inp_perturb is scrub.inp_perturb
    x = np.random.default_rng(0).random((50, 2))
    assert codec.foci(x, x[:, 1])[0][0] == 1  # the function, as there
    assert codec.codec.codec2(x[:, 0], x[:, 0]) > 0.8
    assert SWITCH.reference_bugs
    installed.uninstall()
    installed.uninstall()
    assert not SWITCH.reference_bugs
    assert "codec" not in sys.modules or sys.modules["codec"] is before.get("codec")
    with compat.install(keep=["data_utils"], approxType="GaussNewton") as context:
        assert "data_utils" not in context.modules
        assert SWITCH.approx_type == "GaussNewton"
        assert "scrub_tools" in sys.modules
    assert SWITCH.approx_type is None
    assert "scrub_tools" not in sys.modules


def test_names_of_the_modules_of_codec():
    """As they are there; functions for tensors have the names of the package in theirs, too."""
    page = (Path(__file__).parent.parent / "docs" / "compat.md").read_text(encoding="utf-8")
    with compat.install():
        import codec
        from codec import OneNN_Torch
        from codec.torch_foci import cheap_torch_foci, foci, torch_foci

        assert OneNN_Torch is codec.neighbors.OneNN_Torch
        assert torch_foci is foci is codec.torch_foci
        assert cheap_torch_foci is codec.cheap_torch_foci
        assert codec.torch_codec.torch_codec2 is codec.torch_codec.codec2
        with pytest.raises(
            AttributeError, match="'codec' has no 'codec4': .* has chattCorr, codec2"
        ):
            codec.codec4  # noqa: B018
        for name in compat.installed._CODEC:
            (row,) = re.findall(rf"\| `{re.escape(name)}` \| (.*) \|", page)
            there = {each for each in vars(sys.modules[name]) if not each.startswith("__")}
            modules = {
                each for each in there if isinstance(getattr(codec, each, 0), types.ModuleType)
            }
            assert there - (modules if name == "codec" else set()) <= set(
                re.findall(r"`(\w+)`", row)
            )


def test_the_command_says_what_it_takes(tmp_path, monkeypatch, capsys):
    from lcodec_ext.compat.__main__ import main

    def said(*arguments):
        with pytest.raises(SystemExit):
            main(arguments)
        return capsys.readouterr().err

    assert said().endswith("error: the following arguments are required: SCRIPT\n")
    assert "write --keep before each of them" in said("--keep", "codec", "data_utils", "x.py")


def test_large_noise_is_said_at_the_first_request(tmp_path):
    """One sample, which a model of noise alone classifies rightly in one of three draws."""
    for _ in range(3):
        (told,) = noisy_removals(tmp_path, lambda model, _: model, 1, epsilon=1e-6)
        assert "without a step, from" in told


def test_install_refuses_to_hide(tmp_path, monkeypatch):
    other = types.ModuleType("hypercolumn")
    monkeypatch.setitem(sys.modules, "hypercolumn", other)
    with pytest.raises(ImportError, match="a module 'hypercolumn' is loaded already"):
        compat.install()
    with compat.install(replace=True):
        assert sys.modules["hypercolumn"] is not other
    assert sys.modules["hypercolumn"] is other
    monkeypatch.delitem(sys.modules, "hypercolumn")
    (tmp_path / "data_utils.py").write_text("MINE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=r"install\(\) would hide .*data_utils.py: leave it with"):
        compat.install()
    assert "scrub_tools" not in sys.modules
    with compat.install(keep="data_utils"):
        import data_utils

        assert data_utils.MINE == 1
    sys.modules.pop("data_utils")
    for options, error in (
        ({"keep": ["models"]}, "keep must be one of"),
        ({"approxType": "KFAC"}, "approxType must be one of"),
        ({"approxType": "FD", "reference_bugs": True}, "approxType is for the default mode"),
    ):
        with pytest.raises(ValueError, match=error):
            compat.install(**options)


# --------------------------------------------------------------------------------------------
# Scripts as they are started

IMAGES = """
    import argparse, os, sys, time
    import numpy as np, torch
    from torch.utils.data import DataLoader, Subset
    from data_utils import getDatasets
    from nn_utils import do_epoch, manual_seed, retrain_model
    from scrub_tools import scrubSample, inp_perturb
    from grad_utils import getGradObjs

    parser = argparse.ArgumentParser()
    parser.add_argument("--mode")
    for name, default in dict(train_epochs=4, orig_trainset_size=120, n_perturbations=30,
                              n_removals=2, epsilon=1e9, delta=.5, l2_reg=.05, lr=.01).items():
        parser.add_argument("--" + name, type=type(default), default=default)
    for name, default in dict(HessType="CR", approxType="FD", order="Hessian",
                              selectionType="FOCI", FOCIType="full", hessian_device="cpu").items():
        parser.add_argument("--" + name, default=default)
    parser.add_argument("--scrub_batch_size", type=int, default=None)
    args = parser.parse_args()
    manual_seed(1)
    exec("from models import Net")
    model = eval("Net")()
    criterion = torch.nn.CrossEntropyLoss()
    full, val = getDatasets(name="mnist", data_augment=False)
    loader = DataLoader(full, batch_size=40, shuffle=True)
    if args.mode == "train":
        optim = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9, weight_decay=.05)
        for epoch in range(args.train_epochs):
            do_epoch(model, loader, criterion, epoch, args.train_epochs, optim=optim,
                     device="cpu", outString="stem")
        torch.save(model.state_dict(), "stem.pt")
        sys.exit()
    model.load_state_dict(torch.load("stem.pt"))
    gone = []
    for scrubee in np.random.permutation(args.orig_trainset_size)[:args.n_removals]:
        scrub_dataset = Subset(full, [scrubee])
        gone.append(scrubee)
        residual, _ = getDatasets(name="mnist", val_also=False, exclude_indices=gone)
        optim = torch.optim.SGD(model.parameters(), lr=args.lr)
        foci_val, sd, before, after, norm1, norm2 = inp_perturb(
            model, scrub_dataset, criterion, args, optim, "cpu", outString="stem")
        model = eval("Net")()
        model.load_state_dict(sd)
        _, accuracy, norm = do_epoch(model, DataLoader(residual, 64), criterion, 0, 0,
                                     optim=None, compute_grads=True)
        print(len(residual), "changed" if before.item() != after.item() else "same", accuracy)
"""
MODELS = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.linear(x.flatten(1))
"""


def mnist(folder, n=120):
    """Digits of scikit-learn in the files of MNIST."""
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True)
    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)
    for part, rows in (("train", slice(0, n)), ("t10k", slice(n, 2 * n))):
        head = bytes([0, 0, 8, 3]) + np.array([n, 8, 8], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images[rows].tobytes())
        head = bytes([0, 0, 8, 1]) + np.array([n], ">i4").tobytes()
        labels = digits.target[rows].astype(np.uint8).tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)


def start(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lcodec_ext.compat", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("mode", ["default", "bugs", "GaussNewton"])
def test_an_unmodified_script_of_images(tmp_path, mode):
    for name, text in (("multi.py", IMAGES), ("models.py", MODELS)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    (tmp_path / "scrub_tools.py").write_text("raise RuntimeError('the published file')\n")
    mnist(tmp_path / "data/MNIST/raw")
    options = {"default": (), "bugs": ("--reference-bugs",)}.get(mode, ("--approxType", mode))
    start(tmp_path, *options, "multi.py", "--mode", "train")
    lines = start(tmp_path, *options, "multi.py", "--mode", "scrub", "--selectionType", "Full")
    assert [line.split()[:2] for line in lines[-2:]] == [["119", "changed"], ["118", "changed"]]


# --------------------------------------------------------------------------------------------
# Text, people and faces, as their scripts call


def params(**changes):
    values = {
        "train_epochs": 2,
        "orig_trainset_size": 40,
        "n_perturbations": 30,
        "n_tokens_to_replace": 1,
        "selectionType": "Full",
        "FOCIType": "full",
        "order": "Hessian",
        "HessType": "CR",
        "approxType": "FD",
        "l2_reg": 0.1,
        "epsilon": 1e9,
        "delta": 0.5,
        "lr": 0.1,
        "scrub_batch_size": None,
        "hessian_device": "cpu",
        "sec_device": "cpu",
    }
    return types.SimpleNamespace(**(values | changes))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 6)
        self.classifier = nn.Linear(6, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.words(input_ids) * attention_mask[..., None]
        return self.classifier(torch.tanh(x.sum(1)))


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (40, 8), generator=generator)
    labels = nn.functional.one_hot(torch.arange(40) % 4, 4).float()
    return TensorDataset(ids, torch.ones_like(ids), torch.zeros_like(ids), labels)


def zeroed_training(model, texts, stem, criterion):
    """Two epochs as the script trains: gradients are zero before they are added up."""
    optim = torch.optim.AdamW(model.parameters(), lr=0.02)
    for epoch in range(2):
        bank = None
        for ids, mask, _, labels in DataLoader(texts, 20):
            criterion(model(ids, mask), labels).backward()
            optim.step()
            model.zero_grad()
            batch, weights = scrub.getGradObjs(model)
            if bank is None:
                bank = batch
            else:
                for key in bank:
                    bank[key] += batch[key]
        torch.save(weights, f"{stem}_epoch_{epoch}_params.pt")
        torch.save({key: g / 40 for key, g in bank.items()}, f"{stem}_epoch_{epoch}_grads.pt")


def right_gradients(model, texts, stem, criterion):
    """The same two epochs' files under another name, with gradients at their weights."""
    at, right = copy.deepcopy(model), f"{stem}_right"
    for epoch in range(2):
        bank = torch.load(f"{stem}_epoch_{epoch}_params.pt", weights_only=True)
        at.load_state_dict({name: bank[str(at), name] for name, _ in at.named_parameters()})
        at.zero_grad()
        ids, mask, _, labels = texts[:]
        criterion(at(ids, mask), labels).backward()
        torch.save(scrub.getGradObjs(at)[0], f"{right}_epoch_{epoch}_grads.pt")
        torch.save(bank, f"{right}_epoch_{epoch}_params.pt")
    return right


def deleted(model, texts, gone, criterion, stem, *, approx="FD", whole=None, **options):
    """A copy of a model after removals one after the other, and what was said."""
    model, told, gone = copy.deepcopy(model), [], list(gone)
    for k in range(len(gone)):
        whole = texts if whole is None else whole
        scrub.SubsetDataWrapper(whole, exclude_indices=gone[: k + 1])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scrub.inp_perturb(
                model, Subset(whole, [gone[k]]), criterion, params(approxType=approx), None, "cpu",
                stem, is_nlp=True, **options,
            )  # fmt: skip
        assert {each.filename for each in caught} <= {__file__}
        told.append([str(each.message) for each in caught])
    return model, told


@pytest.fixture
def zeroed(texts, tmp_path):
    torch.manual_seed(0)
    stem, criterion, model = str(tmp_path / "Ledgar"), nn.BCEWithLogitsLoss(), Words()
    zeroed_training(model, texts, stem, criterion)
    return model, criterion, stem


def test_text_whose_gradients_were_zeroed(texts, zeroed):
    """The step is that from files with the right gradients, which are computed once."""
    model, criterion, stem = zeroed
    model, told = deleted(model, texts, (3, 5), criterion, stem)
    assert [len(each) for each in told] == [1, 0]
    assert "They are computed at the weights in these files" in told[0][0]
    right = right_gradients(zeroed[0], texts, stem, criterion)
    expected, told = deleted(zeroed[0], texts, (3, 5), criterion, right)
    assert told == [[], []]
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        if name != "words.weight":  # whose rows only some texts use
            assert (p - zeroed[0].get_parameter(name)).norm() > 1e-3


def test_what_computed_gradients_are_remembered_by(texts, zeroed):
    model, criterion, stem = zeroed

    def computes(whole=texts, criterion=criterion, stem=stem):
        return bool(deleted(model, texts, (3,), criterion, stem, whole=whole)[1][0])

    assert computes()
    assert not computes()
    for epoch in range(2):  # other files with the same weights
        for what in ("params", "grads"):
            bank = torch.load(f"{stem}_epoch_{epoch}_{what}.pt", weights_only=True)
            torch.save(bank, f"{stem}_copy_epoch_{epoch}_{what}.pt")
    assert not computes(stem=f"{stem}_copy")
    other = TensorDataset(texts.tensors[0].flip(0), *texts.tensors[1:])
    assert computes(whole=other)
    assert not computes(whole=other)
    assert computes(whole=other, criterion=nn.BCEWithLogitsLoss(pos_weight=torch.full((4,), 3.0)))
    w = torch.load(f"{stem}_epoch_1_params.pt", weights_only=True)  # the same file, other weights
    torch.save({key: 1.01 * value for key, value in w.items()}, f"{stem}_epoch_1_params.pt")
    assert computes()
    kept = deletion._COMPUTED["change"].values()
    assert sum(t.numel() for t in kept) == sum(p.numel() for p in model.parameters())
    assert not any(isinstance(each, nn.Module) for each in gc.get_referents(deletion._COMPUTED))


def test_text_by_fisher_takes_the_residual_set(texts, zeroed):
    model, criterion, stem = zeroed
    taken, told = deleted(model, texts, (3,), criterion, stem, approx="Fisher")
    assert "made last, of 39 samples, is taken" in told[0][0]
    stay = Subset(texts, [k for k in range(40) if k != 3])
    passed, told = deleted(model, texts, (3,), criterion, stem, approx="Fisher", retained=stay)
    assert told == [[]]
    assert all(map(torch.equal, taken.parameters(), passed.parameters()))
    assert not torch.equal(taken.classifier.weight, model.classifier.weight)
    before, after = (
        scrub.do_epoch(each, DataLoader(texts, 16), criterion, 0, 0)[0] for each in (model, taken)
    )
    assert after < before + 0.1


def test_residual_set_is_that_of_the_request(texts):
    residual = scrub.SubsetDataWrapper(texts, exclude_indices=[1, 2])
    assert residual_set(Subset(texts, [2])) is residual
    assert residual_set(Subset(texts, [3])) is None  # which it has
    assert residual_set(Subset(list(range(40)), [2])) is None  # of another dataset
    assert residual_set(texts) is None


def test_a_residual_set_of_other_samples_is_not_taken(monkeypatch, tmp_path):
    samples = TensorDataset(torch.randn(40, 2), torch.arange(40) % 2)
    other = TensorDataset(torch.randn(40, 2), torch.arange(40) % 2)  # as many, of the same class
    scrub.SubsetDataWrapper(other, exclude_indices=[2])
    assert residual_set(Subset(samples, [2])) is None
    scrub.SubsetDataWrapper(samples, exclude_indices=[2])
    assert residual_set(Subset(samples, [2])) is not None
    assert residual_set(Subset(samples, [-1])) is None  # which is sample 39
    # A training set that is read again is the same one; a validation set is another.
    made = [TensorDataset(torch.randn(40, 2), torch.arange(40) % 2) for _ in range(4)]
    parts = iter(made)
    monkeypatch.setattr("lcodec_ext.compat.data._mnist", lambda part: next(parts))
    train, validation = scrub.getDatasets("mnist")
    residual, _ = scrub.getDatasets("mnist", exclude_indices=[5])
    assert residual_set(Subset(train, [5])) is residual
    assert residual_set(Subset(validation, [5])) is None


def test_uninstalled_in_any_order():
    before = sys.modules.get("scrub_tools")
    first = compat.install(reference_bugs=True)
    second = compat.install(approxType="GaussNewton", keep=["codec"])
    own = sys.modules["scrub_tools"]
    first.uninstall()
    assert (SWITCH.reference_bugs, SWITCH.approx_type) == (False, "GaussNewton")
    assert sys.modules["scrub_tools"] is own
    assert "codec" not in sys.modules
    second.uninstall()
    assert (SWITCH.reference_bugs, SWITCH.approx_type) == (False, None)
    assert sys.modules.get("scrub_tools") is before
    with compat.install(reference_bugs=True):
        with compat.install():
            assert not SWITCH.reference_bugs
        assert SWITCH.reference_bugs
    assert not SWITCH.reference_bugs


def test_batches_of_people_and_what_is_no_batch():
    class People(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, k):
            return {"img": torch.full((3,), float(k)), "pid": k % 2, "camid": 0}

    model = nn.Linear(3, 2)
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(People(), 6)
    measured = scrub.retrain_model(model, loader, loader, CE, 2, optim)
    buggy = scrub.retrain_model(model, loader, loader, CE, 0, optim, reference_bugs=True)
    again = scrub.retrain_model(model, loader, loader, CE, 0, optim)
    assert again == measured
    assert buggy[4] >= again[4]  # a mean of batch norms
    with compat.install(reference_bugs=True):
        assert scrub.retrain_model(model, loader, loader, CE, 0, optim) == buggy
    with pytest.raises(ValueError, match="batches must be .*; got one of 3 parts"):
        scrub.do_epoch(model, [(torch.zeros(1, 3),) * 3], CE, 0, 0)


def test_fisher_without_the_samples_that_stay_says_how(tmp_path):
    data = TensorDataset(torch.randn(40, 5), torch.arange(40) % 3)
    with pytest.raises(ValueError, match="pass retained=, a dataset like .*Scripts do without"):
        scrub.inp_perturb(
            nn.Linear(5, 3),
            data,
            CE,
            params(approxType="Fisher", orig_trainset_size=99),
            None,
            "cpu",
            "stem",
        )
    (tmp_path / "faces_ntp_9_epoch_0_params.pt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="That folder has faces_ntp_9_epoch_0_params.pt"):
        scrub.inp_perturb(
            nn.Linear(5, 3), data, CE, params(orig_trainset_size=99), None, "cpu",
            str(tmp_path / "faces"),
        )  # fmt: skip


def test_faces_with_reference_bugs_take_the_hessian_of_a_gradient_step():
    """CR: (y y^T / |s|_1 + lambda I)^-1 g, y and s from a gradient step of a copy."""
    torch.manual_seed(0)
    model, copy = nn.Linear(4, 3), nn.Linear(4, 3)
    copy.load_state_dict(model.state_dict())
    x, y = torch.randn(1, 4), torch.tensor([1])
    data = TensorDataset(x, y)

    def gradient(module):
        parts = torch.autograd.grad(CE(module(x), y), list(module.parameters()))
        return torch.cat([torch.cat([w, b[None]]) for w, b in zip(*parts, strict=True)])

    def weights(module):
        return torch.cat([module.weight, module.bias[:, None]], 1).flatten().detach()

    g, w = gradient(model), weights(model)
    stepped = w - 1e-3 * g
    with torch.no_grad():
        other = nn.Linear(4, 3)
        other.weight.copy_(stepped.view(3, 5)[:, :4])
        other.bias.copy_(stepped.view(3, 5)[:, 4])
    change, length = g - gradient(other), (w - stepped).abs().sum()
    matrix = torch.outer(change, change) / length + 0.1 * torch.eye(15)
    scrub.vgg_inp_perturb(model, copy, data, CE, params(), None, "cpu", "stem", reference_bugs=True)
    torch.testing.assert_close(
        weights(model), w + torch.linalg.solve(matrix, g), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(weights(copy), stepped)


@pytest.mark.parametrize("foci", ["full", "cheap"])
@pytest.mark.parametrize("reference_bugs", [False, True])
@pytest.mark.parametrize(("loss", "weight"), [("0 under", 999.0), ("the same under", 0.0)])
@pytest.mark.filterwarnings(  # FOCI's words, with the bugs
    "ignore:y is constant:UserWarning", "ignore:.*of X are constant:UserWarning"
)
def test_a_loss_that_depends_on_nothing_is_skipped(reference_bugs, foci, loss, weight):
    """It is 0 of a sample that is fitted, and log(2) of a dead network."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[weight, 0.0], [-weight, 0.0]]))
    before = model.weight.detach().clone()
    data = TensorDataset(torch.tensor([[9.0, 0.0]] * 3), torch.tensor([0] * 3))
    arguments = params(selectionType="FOCI", FOCIType=foci, scrub_batch_size=3)
    with pytest.warns(UserWarning, match=f"loss of the request is {loss} all perturbations"):
        measured = scrub.inp_perturb(
            model, data, CE, arguments, None, "cpu", "stem", reference_bugs=reference_bugs
        )
    assert torch.equal(model.weight, before)
    assert measured[2] == measured[3] == pytest.approx(0 if weight else np.log(2))


def test_a_pair_that_is_not_positive_without_the_request(tmp_path):
    """That of all samples is, barely; the script goes on, with a word."""
    torch.manual_seed(0)
    data, model = TensorDataset(torch.randn(40, 5), torch.arange(40) % 3), nn.Linear(5, 3)
    stem = str(tmp_path / "x")
    for epoch, factor in ((0, 0.9), (1, 1.0)):
        for p in model.parameters():
            p.grad = 1e-4 * factor * p.detach()
        gradients, weights = scrub.getGradObjs(model)
        torch.save(gradients, f"{stem}_epoch_{epoch}_grads.pt")
        weights = {key: factor * w for key, w in weights.items()}
        torch.save(weights, f"{stem}_epoch_{epoch}_params.pt")
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="no step was found for the request, which stays") as told:
        measured = scrub.inp_perturb(model, Subset(data, [4]), CE, params(), None, "cpu", stem)
    assert [each.filename for each in told] == [__file__]
    assert "positive curvature" in str(told[0].message)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert measured[2] == measured[3]


def noisy_removals(tmp_path, then, n=10, epsilon=0.02):
    """What each of some removals with noise says; `then` is done to the model after each."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 5), torch.arange(40) % 3)
    model, stem = nn.Linear(5, 3), str(tmp_path / "x")
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        scrub.do_epoch(model, DataLoader(data, 20), CE, epoch, 2, optim, "cpu", stem)
    told = []
    for k in range(n):
        options = params(HessType="Sekhari", epsilon=epsilon, l2_reg=0.2, selectionType="One")
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scrub.inp_perturb(model, Subset(data, [k]), CE, options, None, "cpu", stem)
        told.append(" ".join(str(each.message) for each in caught))
        model = then(model, before)
    return told


@pytest.fixture
def _noise_spoils(monkeypatch):
    """It is from the system's entropy: whether it spoils one sample is chance."""
    monkeypatch.setattr("lcodec_ext.compat.deletion.is_much_worse", lambda was, now: True)


@pytest.mark.usefixtures("_noise_spoils")
def test_noise_adds_up_is_said(tmp_path):
    def reloaded(model, _):
        other = nn.Linear(5, 3)
        other.load_state_dict(model.state_dict())
        return other

    told = noisy_removals(tmp_path, reloaded)
    assert "It adds up: after k requests it is sqrt(k) times" in told[0]
    assert "the noise of 10 requests together has a standard deviation of" in told[9]
    assert not any("together" in text or "adds up" in text for text in told[1:9])
    ((one, together),) = re.findall(r"deviation (\S+)\..*deviation of (\S+);", told[0] + told[9])
    assert float(together) == pytest.approx(float(one) * 10**0.5, rel=0.01)
    assert deletion._NOISE.keys() == {"start", "end", "times", "had", "sum"}


@pytest.mark.usefixtures("_noise_spoils")
def test_noise_that_is_taken_back_does_not_add_up(tmp_path):
    def taken_back(model, before):
        model.load_state_dict(before)
        return model

    told = noisy_removals(tmp_path, taken_back)
    assert "It adds up" in told[0]
    assert not any("together" in text or "adds up" in text for text in told[1:])
    assert deletion._NOISE["times"] == 1
    assert deletion._NOISE["had"] == 0
    told = noisy_removals(tmp_path, lambda model, _: nn.Linear(5, 3), 3)  # other models
    assert all("It adds up" in text for text in told[1:])
