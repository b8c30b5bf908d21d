"""Whole scripts of the published code's shape, unmodified, in both modes: what they leave."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lcodec_ext import compat
from lcodec_ext.compat.__main__ import main
from test_compat_install import mnist

SCRIPTS = Path(__file__).parent / "published_shapes"
MODES = pytest.mark.parametrize("bugs", [False, True], ids=["default", "bugs"])


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a script as the command does, in this process; its warnings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)  # scripts seed, which sets it
    before = set(sys.modules)

    def start(script, *options, bugs=False, approx=None):
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch.setattr(sys, "argv", ["compat"])
            patch.setattr(sys, "path", ["", str(SCRIPTS / "stand_ins"), *sys.path])
            own = ["--reference-bugs"] * bugs + (["--approxType", approx] if approx else [])
            try:
                main([*own, str(SCRIPTS / script), *map(str, options)])
            finally:
                compat.uninstall()
                for name in set(sys.modules) - before:
                    if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
                        del sys.modules[name]
        ours = [each for each in caught if "lcodec_ext" in str(each.filename)]
        assert not ours, [str(each.message) for each in ours]  # they point at the script
        return [str(each.message) for each in caught]

    return start


def equal(file, other):
    one, two = (torch.load(each, weights_only=True) for each in (file, other))
    return all(map(torch.equal, one.values(), two.values()))


# --------------------------------------------------------------------------------------------
# Images


@pytest.fixture
def trained(start, tmp_path):
    """Files of train.py under the names that multi_scrub.py expects."""

    def trained(model="LogisticRegressor", bugs=False):
        mnist(tmp_path / "data/MNIST/raw")
        start("train.py", "--model", model, bugs=bugs)
        written = sorted(path.name for path in (tmp_path / "trained_models").iterdir())
        stem = f"mnist_{model}_ntp_120_seed_1"
        ends = [f"_epoch_{k}_{what}.pt" for k in (6, 7) for what in ("grads", "params")]
        assert written == sorted(stem + end for end in [".pt", *ends])
        for name in written:
            copy = name.replace("ntp_120_seed_1", "epochs_8")
            (tmp_path / "trained_models" / name).rename(tmp_path / "trained_models" / copy)
        return tmp_path / f"trained_models/mnist_{model}_epochs_8"

    return trained


@MODES
def test_the_names_of_training_files_are_not_those_of_removal(start, tmp_path, bugs):
    mnist(tmp_path / "data/MNIST/raw")
    start("train.py", bugs=bugs)
    expected = tmp_path / "trained_models/mnist_LogisticRegressor_epochs_8.pt"
    (tmp_path / "trained_models/mnist_LogisticRegressor_ntp_120_seed_1.pt").rename(expected)
    with pytest.raises(FileNotFoundError, match="That folder has .*_ntp_120_seed_1_epoch_6_params"):
        start("multi_scrub.py", bugs=bugs)


RESIDUAL = "the SubsetDataWrapper that was made last, of {} samples, is taken"
VARIANTS = [  # options, and which shares of the rest the published code still classifies well
    ("Full --HessType CR", False),
    ("Full --HessType Sekhari", True),
    ("FOCI --HessType Sekhari", True),
    ("FOCI --FOCIType cheap --HessType CR", False),
    ("Random --HessType Sekhari", True),
    ("One --HessType CR", True),
    ("Full --order BP", True),
    ("Full --HessType CR --approxType Fisher", False),
    ("FOCI --HessType Sekhari --approxType Fisher", True),
]


def removals(start, trained, variant, **mode):
    stem = trained("Logistic2NN", mode.get("bugs", False))
    options = ["--model", "Logistic2NN", "--epsilon", 1e6, "--val_gap_skip", 2]
    told = start("multi_scrub.py", *options, "--selectionType", *variant.split(), **mode)
    table = pd.read_csv("results.csv")
    assert table.n_residual.tolist() == [119, 118]
    assert (table.bad_sample == 0).all()
    assert np.isfinite(table.to_numpy(float)).all()
    return table, told, equal(f"{stem}.pt", f"{stem}_scrubbed.pt")


@pytest.mark.parametrize("variant", [variant for variant, _ in VARIANTS])
def test_multi_scrub(start, trained, variant):
    table, told, same = removals(start, trained, variant)
    assert not same
    assert (table.residual_acc_after > 0.9).all()
    fisher, noisy = "Fisher" in variant, "Sekhari" in variant
    assert [text for text in told if "adds up" in text] == [t for t in told if "Sekhari" in t]
    assert sum("adds up" in text for text in told) == noisy
    for number in (119, 118):
        assert any(RESIDUAL.format(number) in text for text in told) == fisher
    assert len(told) == noisy + 2 * fisher


@pytest.mark.parametrize(("variant", "unharmed"), VARIANTS)
def test_multi_scrub_as_published(start, trained, variant, unharmed):
    """Its "CR" is g / lambda without 1 / (n - 1), which ruins the model."""
    table, told, same = removals(start, trained, variant, bugs=True)
    assert same == variant.startswith("One")  # dead units, the seed has it
    assert (table.residual_acc_after.iloc[-1] > 0.9) == unharmed
    assert not told


def test_multi_scrub_with_another_curvature(start, trained):
    table, told, same = removals(start, trained, "FOCI --HessType CR", approx="GaussNewton")
    assert not same
    assert (table.residual_acc_after > 0.9).all()
    assert len(told) == 2  # of the residual sets


@MODES
def test_retrain_scrub(start, tmp_path, bugs):
    mnist(tmp_path / "data/MNIST/raw")
    told = start("retrain_scrub.py", bugs=bugs)
    table = pd.read_csv("retrain.csv")
    assert table.retrain_val_acc.notna().tolist() == [False, True, False, True]
    assert (table.retrain_val_acc.dropna() > 0.8).all()
    if not bugs:
        assert table.n_residual.tolist() == [119, 118, 117, 116]
        assert (table.val_acc > 0.8).all()
        assert not told
    else:  # rejected, and the residual set is then everything, as the script has it
        assert table.n_residual.tolist() == [120, 120, 120, 116]
        assert any("3 removals in a row were taken back by the script" in text for text in told)


# --------------------------------------------------------------------------------------------
# Blankets


def bullseye(n, rng):
    def near(r):
        return r + rng.uniform(-0.075, 0.075, n)

    r1 = np.where(rng.random(n) < 0.5, rng.uniform(0.25, 0.5, n), rng.uniform(0.75, 1, n))
    r2, r3 = near(r1), near(r1)
    r4 = near(r3)
    r5 = near((r2 + r4) / 2)
    y = near((r3 + r5) / 2)
    radii = np.stack([r1, r2, r3, r4, r5, near((r4 + y) / 2)], 1)
    points = rng.standard_normal((n, 3, 6))
    return points / np.linalg.norm(points, axis=1, keepdims=True) * radii[:, None], y[:, None]


def test_roc_gen(start):
    """Both modes give the same: of FOCI and T there is one value."""
    rng = np.random.default_rng(0)
    x, y = bullseye(200, rng)
    with open("bullseye.h5", "wb") as file:
        np.savez(file, x_0=x, y_0=y)
    for bugs in (False, True):
        assert not start("roc_gen.py", "--runs", 1, "--outfile", f"roc_{bugs}.npz", bugs=bugs)
    with np.load("roc_False.npz") as one, np.load("roc_True.npz") as other:
        assert sorted(one) == ["cmi", "codec", "codec_perm"]
        for name, rates in one.items():
            assert rates.shape == (4, 2)  # true and false members at each confidence
            assert (np.diff(rates[:, 0]) <= 0).all()
            np.testing.assert_array_equal(rates, other[name])
        # T on raw coordinates keeps one of four, and nothing false.
        np.testing.assert_array_equal(one["codec"], [[0.25, 0]] * 3 + [[0, 0]])
        assert one["codec_perm"][-1].tolist() == [0.25, 0]


def test_celeb_attr_foci(start):
    rng = np.random.default_rng(0)
    values = rng.random((500, 6)) < 0.4
    values[:, 3] = values[:, 1] ^ (rng.random(500) < 0.05)
    table = pd.DataFrame(np.where(values, 1, -1), columns=list("ABCDEF"))
    table.insert(0, "image_id", [f"{k:06}.jpg" for k in range(500)])
    table.to_csv("list_attr_celeba.csv", index=False)
    found = []
    for bugs in (False, True):
        assert not start("celeb_attr_foci.py", "--outfile", f"{bugs}.csv", bugs=bugs)
        found.append(pd.read_csv(f"{bugs}.csv").drop(columns="time"))
    pd.testing.assert_frame_equal(*found)
    for attribute, other in (("B", "D"), ("D", "B")):
        rows = found[0][found[0].attribute == attribute]
        assert rows.noise.tolist() == [0, 1e-5, 1e-3, 0.1]
        assert rows.blanket.str.startswith(other).all()
        assert rows["first"].iloc[0] > 0.7  # of tied values, exactly: 1 - P(E | D) / P(E)
        assert (rows["first"].iloc[1:] < 0.5).all()  # noise draws lots among them


# --------------------------------------------------------------------------------------------
# Text


@pytest.fixture
def provisions(tmp_path, monkeypatch):
    """Of three kinds, with words of their own. The script loads a whole model."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rng = np.random.default_rng(0)
    kinds = {
        "law": ["law", "court", "state"],
        "notices": ["notice", "mail", "address"],
        "taxes": ["tax", "levy", "duty"],
    }
    with (tmp_path / "LEDGAR.jsonl").open("w") as file:
        for k in range(60):
            label = list(kinds)[k % 3]
            words = [*rng.choice(kinds[label], 4), *rng.choice(["the", "party", "shall", "any"], 4)]
            entry = {"provision": " ".join(rng.permutation(words)), "label": [label]}
            file.write(json.dumps(entry | {"source": f"{k}.htm"}) + "\n")


@MODES
@pytest.mark.parametrize("hessian", ["CR", "Sekhari"])
@pytest.mark.parametrize("approx", ["FD", "Fisher"])
def test_ledgar_scrub(start, provisions, hessian, approx, bugs):
    """Its training sets gradients to zero before it adds them up."""
    assert not start("ledgar_scrub.py", "--train_epochs", 4)
    grads = torch.load("Ledgar_epoch_3_grads.pt", weights_only=True)
    assert not any(g.any() for g in grads.values())
    options = ["--mode", "scrub", "--train_epochs", 4, "--HessType", hessian]
    options += ["--approxType", approx]
    told = start("ledgar_scrub.py", *options, bugs=bugs)
    table = pd.read_csv("ledgar.csv")
    assert table.n_residual.tolist() == [42, 41]
    assert np.isfinite(table.to_numpy(float)).all()
    assert table.loss_after.iloc[0] != table.loss_before.iloc[0]
    if not bugs:
        assert (table.f1_after > table.f1_before.iloc[0] - 0.15).all()
    told = [text for text in told if "TORCH_FORCE" not in text]
    if bugs:
        assert not told
    elif approx == "Fisher":
        assert len(told) == 2
        assert all("is taken for the samples that stay" in text for text in told)
    else:  # the delta of 1 asks for no noise
        assert len(told) == 1
        assert "They are computed at the weights in these files" in told[0]


def test_ledgar_training_as_published(start, provisions):
    with pytest.raises(TypeError, match="NoneType"):
        start("ledgar_scrub.py", "--train_epochs", 2, bugs=True)


def test_ledgar_of_one_epoch(start, provisions):
    start("ledgar_scrub.py")
    with pytest.raises(ValueError, match="params.train_epochs must be an integer >= 2"):
        start("ledgar_scrub.py", "--mode", "scrub")


# --------------------------------------------------------------------------------------------
# People and faces


@pytest.fixture
def people(tmp_path):
    rng = np.random.default_rng(0)
    patterns, pids = rng.standard_normal((6, 3, 8, 8)), np.repeat(np.arange(6), 15)
    images = patterns[pids] + 0.8 * rng.standard_normal((90, 3, 8, 8))
    (tmp_path / "reid-data").mkdir()
    np.savez(tmp_path / "reid-data/market1501.npz", images=images.astype(np.float32), pids=pids)


@MODES
@pytest.mark.parametrize("approx", ["FD", "Fisher"])
@pytest.mark.parametrize("hessian", ["CR", "Sekhari"])
def test_reid_scrub(start, people, hessian, approx, bugs):
    assert not start("reid.py", bugs=bugs)
    assert len(list(Path("log").glob("market1501_epoch_[45]_*.pt"))) == 4
    options = ["--HessType", hessian, "--approxType", approx, "--epsilon", 1e13]
    told = start("reid_scrub.py", *options, bugs=bugs)
    table = pd.read_csv("reid.csv")
    assert table.n_residual.tolist() == [29, 28]
    assert np.isfinite(table.to_numpy(float)).all()
    assert (table.loss_after > table.loss_before).all()
    assert (table.rank1_before.iloc[0], table.loss_before.iloc[0]) == (
        1,
        pytest.approx(0.453, 1e-2),
    )
    if bugs:
        assert not told
    else:
        assert (table.rank1_after > 0.95).all()
        assert sum("is taken for the samples that stay" in t for t in told) == 2 * (approx != "FD")
        assert sum("It adds up" in text for text in told) == (hessian == "Sekhari")
        assert len(told) == 2 * (approx != "FD") + (hessian == "Sekhari"), "\n".join(told)


def test_reid_scrub_from_files_without_curvature(start, people):
    """The library adds up gradients of moving weights in place."""
    start("reid.py")
    w4, g4, w5 = (
        torch.load(f"log/market1501_epoch_{name}.pt", weights_only=True)
        for name in ("4_params", "4_grads", "5_params")
    )
    torch.save({k: g4[k] - (w5[k] - w4[k]) for k in g4}, "log/market1501_epoch_5_grads.pt")
    told = start("reid_scrub.py", "--HessType", "CR")
    assert len(told) == 1  # for two removals
    assert "They are computed at the weights in these files" in told[0]
    assert (pd.read_csv("reid.csv").rank1_after > 0.95).all()


def test_noise_that_leaves_no_finite_outputs_is_named(start, people):
    """On every weight it is more than the published code's, which is on the selected ones."""
    start("reid.py")
    with pytest.raises(ValueError, match="The noise for epsilon=0.0005, .*is too much for this"):
        start("reid_scrub.py", "--l2_reg", 0.001)
    start("reid_scrub.py", bugs=True)
    table = pd.read_csv("reid.csv")
    assert np.isfinite(table.to_numpy(float)).all()
    assert table.loss_after.iloc[0] > 1e6
    assert table.rank1_after.iloc[0] < 0.9


@pytest.fixture
def faces(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"person_{k}" for k in range(5)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "faces").mkdir()
    rows = []
    for target, name in enumerate(names):
        pattern = rng.standard_normal((3, 8, 8))
        for k in range(12):
            path = f"faces/{name}_{k}.npy"
            image = pattern + 0.8 * rng.standard_normal((3, 8, 8))
            np.save(tmp_path / path, image.astype(np.float32))
            rows.append({"Person": name, "FilePath": path, "Target": target, "MyCuration": 1})
    pd.DataFrame(rows).to_csv(tmp_path / "dled_vggface.csv", index=False)


@MODES
@pytest.mark.parametrize("foci", ["cheap", "full"])
@pytest.mark.parametrize("hessian", ["CR", "Sekhari"])
def test_vgg_scrub(start, faces, hessian, foci, bugs):
    with pytest.raises(SystemExit):
        start("vgg_scrub.py", "--mode", "train", bugs=bugs)
    options = ["--sec_device", "cpu", "--orig_trainset_size", 60, "--n_perturbations", 30]
    told = start("vgg_scrub.py", *options, "--HessType", hessian, "--FOCIType", foci, bugs=bugs)
    table = pd.read_csv("vgg.csv")
    assert np.isfinite(table.to_numpy(float)).all()
    assert len(table) == 3  # foci_val is 0: cheap FOCI is taken once
    assert table.loss_after.iloc[0] != table.loss_before.iloc[0]
    if not bugs:
        assert table.loss_after.iloc[0] > table.loss_before.iloc[0]
        assert table.residual_acc.iloc[0] > 0.9
        assert table.identity_acc.iloc[-1] < table.residual_acc.iloc[-1]
        assert not told


def test_vgg_scrub_makes_no_residual_set(start, faces):
    with pytest.raises(SystemExit):
        start("vgg_scrub.py", "--mode", "train")
    with pytest.raises(ValueError, match="approxType='Fisher' needs .*pass retained="):
        start("vgg_scrub.py", "--sec_device", "cpu", "--approxType", "Fisher")
