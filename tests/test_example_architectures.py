"""The example of four architectures: its reduced form, its reader of CIFAR-10, and its page."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import architectures
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SIZE = replace(architectures.REDUCED, n=500, epochs=6, perturbations=20)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # short trainings may be doubted


@pytest.fixture(scope="module")
def found():
    data = architectures.load(None, SIZE, 0, full=False)
    made = architectures.networks(SIZE, data.train[0].shape[-1])
    networks = [
        {"network": name, "runs": [architectures.experiment(name, made[name], data, SIZE, 0)]}
        for name in ("MobileNet", "two layers")
    ]
    return {"data": data.name, "size": vars(SIZE), "networks": networks}


def test_the_deleted_images_lose_more_and_others_no_accuracy(found):
    for network in found["networks"]:
        before, after = (network["runs"][0]["methods"][name] for name in ("no-op", "default"))
        assert after["loss_forget"] > before["loss_forget"]
        assert after["accuracy_test"] > before["accuracy_test"] - 0.03


def test_figure_and_table(found, tmp_path):
    architectures.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "MobileNet" in architectures.show(found)


@pytest.mark.parametrize("pixels", [16, 32])
def test_all_networks_take_images_of_both_sizes(pixels):
    for make in architectures.networks(SIZE, pixels).values():
        assert make().eval()(torch.zeros(2, 3, pixels, pixels)).shape == (2, 10)


def write_cifar(folder, n=12):
    folder.mkdir()
    for i, name in enumerate([*architectures.BATCHES, "test_batch"]):
        data = np.full((n, 3072), i, np.uint8)
        data[:, :1024] = 255  # all red
        content = {b"data": data, b"labels": [k % 10 for k in range(n)], b"filenames": [b"a"] * n}
        (folder / name).write_bytes(pickle.dumps(content, protocol=4))


@pytest.mark.parametrize("inner", [True, False])
def test_cifar_as_published(tmp_path, inner):
    folder = tmp_path / architectures.CIFAR
    write_cifar(folder)
    data = architectures.load(tmp_path if inner else folder, SIZE, 0, full=False)
    assert data.name == "CIFAR-10"
    assert data.train[0].shape == (30, 3, 32, 32)
    assert data.test[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    red = (1 - architectures.MEAN[0]) / architectures.SCALE[0]
    assert torch.allclose(data.test[0][:, 0], torch.tensor(red))
    assert torch.allclose(
        data.test[0][:, 1], torch.tensor((5 / 255 - architectures.MEAN[1]) / architectures.SCALE[1])
    )


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "d")
    (tmp_path / "d" / "data_batch_3").write_bytes(pickle.dumps({b"data": Harmful()}))
    with pytest.raises(SystemExit, match="data_batch_3 is not a batch of CIFAR-10: .*which is not"):
        architectures.load(tmp_path / "d", SIZE, 0, full=False)
    assert not Path("ran").exists()


def test_errors_name_the_file(tmp_path):
    with pytest.raises(SystemExit, match=r"data_batch_1 is missing. It should hold the Python"):
        architectures.load(tmp_path, SIZE, 0, full=False)
    write_cifar(tmp_path / "d")
    wrong = {b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}
    (tmp_path / "d" / "test_batch").write_bytes(pickle.dumps(wrong))
    with pytest.raises(SystemExit, match=r"test_batch has data of shape \(2, 5\)"):
        architectures.load(tmp_path / "d", SIZE, 0, full=False)


def test_the_page_has_the_figures_of_the_record():
    record = json.loads((ROOT / "examples/results/architectures.json").read_text())
    page = (ROOT / "docs/experiments/architectures.md").read_text()
    assert record["dirty"] is False
    for network in record["networks"]:
        for method in architectures.LOOKS:
            if architectures.values(network, method, "loss_forget"):
                assert architectures.row(network, method) in page


def test_the_prose_has_the_figures_of_the_record():
    record = json.loads((ROOT / "examples/results/architectures.json").read_text())
    page = " ".join((ROOT / "docs/experiments/architectures.md").read_text().split())
    gallery = " ".join((ROOT / "docs/experiments.md").read_text().split())
    networks = {network["network"]: network for network in record["networks"]}

    def mean(network, method, key="loss_forget"):
        return float(np.mean(architectures.values(networks[network], method, key)))

    sizes = [f"{name} {of['runs'][0]['parameters']:,}" for name, of in networks.items()]
    assert f"({', '.join(sizes)} parameters)" in page
    ways = []
    for name in networks:
        before, after, aim = (mean(name, way) for way in ("no-op", "default", "retrained"))
        ways.append(f"{100 * (after - before) / (aim - before):.0f}%")
        assert mean(name, "default", "js_forget") < mean(name, "no-op", "js_forget")
        lost = mean(name, "no-op", "accuracy_test") - mean(name, "default", "accuracy_test")
        assert lost <= 0.0015, "at most a tenth of a point"
    assert f"goes {', '.join(ways[:3])} and {ways[3]} of the way" in page
    least, most = sorted(ways, key=lambda way: int(way[:-1]))[:: len(ways) - 1]
    assert f"goes {least} to {most} of the way" in gallery
    dense, again = (f"{mean('DenseNet', way):.3f}"[1:] for way in ("default", "retrained"))
    assert f"DenseNet stops at {dense}, and retraining has {again}" in page
    rises = [
        f"{mean(name, architectures.PAPER) - mean(name, 'no-op'):.3f}"[1:]
        for name in list(networks)[:3]
    ]
    assert f"the loss rises by {min(rises)} to {max(rises)}" in page
    assert architectures.refusals(networks["two layers"]) == record["size"]["seeds"]
    for name in list(networks)[:3]:
        assert mean(name, "retrained", "seconds") < 0.5 * mean(name, "default", "seconds")
