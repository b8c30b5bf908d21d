import json
from pathlib import Path

import numpy as np
import pytest
import reid
import torch
from PIL import Image
from reid_data import Crops, generated, market, split

from lcodec_ext.unlearning import unlearn

ROOT = Path(__file__).parent.parent
SMALL = reid.Form(trained=8, tested=6, per_camera=5, epochs=6, perturbations=10)


@pytest.fixture(scope="module")
def record():
    """What the example finds at a size for tests."""
    parts = generated(3, SMALL.trained, SMALL.tested, SMALL.per_camera, height=32)
    found = reid.one_network(parts, SMALL, "resnet", 0.125, seed=3)
    return {"networks": {"resnet": found}}


def test_a_deletion_leaves_the_others_to_be_found(record):
    found = record["networks"]["resnet"]
    rows = found["persons"][0]["methods"]
    before, after = rows["before"], rows["calibrated"]
    assert set(rows) == set(reid.METHODS)
    assert before["others"]["queries"] == 18
    assert after["others"]["mAP"] > before["others"]["mAP"] - 0.1
    assert found["change"]["calibrated"]["mean"] > -0.1
    assert after["loss_deleted"] > before["loss_deleted"]
    assert rows["retrained"]["named"] == 0  # it has no image of that person
    assert rows["paper"]["changed"] < after["changed"]


def test_changes_have_a_standard_error():
    def person(before, after):
        return {"methods": {"before": {"others": {"mAP": before}}, "x": {"others": {"mAP": after}}}}

    one = reid.change([person(0.5, 0.49)], "x")
    assert reid.in_points(one) == "-1.0"
    both = reid.change([person(0.5, 0.49), person(0.6, 0.57)], "x")
    assert reid.in_points(both) == "-2.0 +- 1.0"


def test_the_papers_noise_drowns_the_weights(record):
    noise = record["networks"]["resnet"]["noise"]
    assert noise["sigma"] > 100 * noise["weights"]


def test_table_and_figure(record, tmp_path):
    json.dumps(record)
    assert "calibrated" in reid.show(record)
    reid.draw(record, tmp_path / "reid.png")
    with Image.open(tmp_path / "reid.png") as image:
        assert image.size[0] > 1000


def test_a_run_starts_from_the_options(monkeypatch):
    monkeypatch.setattr(reid, "one_network", lambda parts, form, *rest: rest)
    found = reid.run(reid.options().parse_args(["--network", "mobilenet", "--height", "32"]))
    assert found["networks"] == {"mobilenet": ("mobilenet", 0.125, 0)}
    assert found["data"]["train"] == {"images": 480, "people": 16}
    assert found["data"]["gallery"]["people"] == 22  # with junk and distractors


@pytest.mark.parametrize("network", reid.NETWORKS)
def test_all_networks(network):
    model = reid.Identifier(*reid.NETWORKS[network](0.125, (1, 1, 1, 1)), 5).eval()
    images = torch.randn(3, 3, 64, 32)
    scores, distances = model(images)
    assert scores.shape == distances.shape == (3, 5)
    assert model.maps(images).shape[2] >= 4
    assert model.features(images).shape == (3, model.centres.shape[1])


def test_osnet_has_its_papers_size():
    model, size = reid.NETWORKS["osnet"](1.0, ())
    assert size == 512
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.9e6, rel=0.05)
    block = model[4]
    maps = torch.zeros(1, 64, 21, 21, requires_grad=True)
    for t, stream in enumerate(block.eval().streams, start=1):  # sees 2t + 1 pixels each way
        (seen,) = torch.autograd.grad(stream(block.first(maps))[0, :, 10, 10].sum(), maps)
        assert int((seen[0].abs().sum((0, 2)) > 0).sum()) <= 2 * t + 1


# --- the loss --------------------------------------------------------------------------------


class Flat(torch.nn.Module):
    """Scores, and features that a triplet loss compares within a batch."""

    def __init__(self):
        super().__init__()
        self.features, self.head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 3)

    def forward(self, inputs):
        features = self.features(inputs)
        return self.head(features), features


def test_the_triplet_loss_is_a_mean_over_images():
    generator = torch.Generator().manual_seed(0)
    outputs = tuple(torch.randn(12, 5, generator=generator) for _ in range(2))
    targets = torch.arange(12) % 5
    each = [
        reid.loss_fn([part[k : k + 1] for part in outputs], targets[k : k + 1]) for k in range(12)
    ]
    assert torch.allclose(reid.loss_fn(outputs, targets), torch.stack(each).mean())
    own = outputs[1][0, 0]
    other = outputs[1][0, 1:].min()
    plain = torch.nn.functional.cross_entropy(outputs[0][:1], targets[:1], label_smoothing=0.1)
    assert torch.allclose(each[0], plain + (0.3 + own - other).clamp(min=0))


def test_a_triplet_loss_within_the_batch_is_refused():
    torch.manual_seed(0)
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    with pytest.raises(ValueError, match="plain mean over the samples"):
        unlearn(Flat(), (x[:6], y[:6]), (x[6:], y[6:]), reid.coupled_loss_fn, calibrate=False)


# --- Market1501's protocol -------------------------------------------------------------------


def crops(person, camera):
    return Crops(torch.zeros(len(person), 1), np.array(person), np.array(camera))


def test_the_protocol_leaves_out_junk_and_the_same_camera():
    query = crops([7], [1])
    #         junk, same camera, distractor, right, another, right
    gallery = crops([-1, 7, 0, 7, 8, 7], [2, 1, 2, 2, 1, 3])
    found = reid.retrieval(np.arange(6.0)[None], query, gallery)
    assert found["mAP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert (found["rank1"], found["rank5"], found["queries"]) == (0, 1, 1)


def test_queries_without_an_answer_do_not_count():
    query, gallery = crops([7, 8], [1, 1]), crops([7, 8], [2, 1])
    assert reid.retrieval(np.zeros((2, 2)), query, gallery)["queries"] == 1
    with pytest.raises(ValueError, match="no query has a right answer"):
        reid.retrieval(np.zeros((1, 1)), crops([9], [1]), crops([8], [1]))


def test_held_out_images_are_of_every_identity_and_of_several_cameras():
    train, held = split(generated(0, 4, 2, 10, height=16)["train"])
    assert np.bincount(train.person)[1:].tolist() == [24] * 4
    assert all(len(set(held.camera[held.person == p])) == 3 for p in range(1, 5))


def test_generated_people_are_the_same_for_a_seed():
    one, two, other = (generated(seed, 2, 2, 2, height=16) for seed in (5, 5, 6))
    assert torch.equal(one["query"].images, two["query"].images)
    assert not torch.equal(one["query"].images, other["query"].images)
    assert not set(one["train"].person) & set(one["query"].person)


# --- Market1501's folders --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three people in training, one in the test, a distractor and a junk box."""
    names = {
        "bounding_box_train": [f"000{p}_c{c}s1_00000{k}_01.jpg" for p, c, k in people((2, 5, 9))],
        "query": ["0011_c1s1_000451_00.jpg", "0011_c2s1_000452_00.jpg"],
        "bounding_box_test": [
            *("-1_c1s1_000401_03.jpg", "0000_c2s1_000401_03.jpg"),
            *("0011_c1s1_000453_01.jpg", "0011_c3s2_000454_01.jpg"),
        ],
    }
    for part, files in names.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "Thumbs.db").touch()
        for k, name in enumerate(files):
            Image.new("RGB", (64, 128), (k, 100, 200)).save(tmp_path / part / name)
    return tmp_path


def people(numbers):
    return [(p, c, k) for p in numbers for c in (1, 2) for k in range(5)]


def test_the_loader_reads_names_and_images(folder):
    parts = market(folder, 32)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 30,
        "query": 2,
        "gallery": 4,
    }
    assert parts["train"].images.shape == (30, 3, 32, 16)
    assert parts["gallery"].person.tolist() == [-1, 0, 11, 11]
    assert parts["gallery"].camera.tolist() == [1, 2, 1, 3]
    assert reid.pixels_of(parts["query"].images)[0, 0, 0, 2] == pytest.approx(200 / 255, abs=0.02)
    asked = reid.tasks(parts, reid.FULL, seed=0)
    assert sorted(task.person for task in asked) == [2, 5, 9]
    for task in asked:
        assert len(task.retain[1]) == 16
        assert task.forget[1].tolist() == 8 * [task.label]


def test_errors_name_what_is_missing(folder):
    (folder / "query" / "person.jpg").touch()
    with pytest.raises(SystemExit, match=r"not of the form 0002_c1s1_000451_03.jpg.*person.jpg"):
        market(folder, 32)
    for file in (folder / "query").iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match="query has no .jpg file"):
        market(folder, 32)
    (folder / "query").rename(folder / "queries")
    with pytest.raises(SystemExit, match="lacks query. It has to be the unpacked folder Market"):
        market(folder, 32)


def test_one_camera_is_too_few(folder):
    parts = market(folder, 32)
    parts["train"].camera[:] = 1
    with pytest.raises(SystemExit, match="two cameras"):
        reid.tasks(parts, reid.Form(), seed=0)


# --- the page --------------------------------------------------------------------------------


def test_the_pages_figures_are_those_of_the_record():
    record = json.loads((ROOT / "examples/results/reid.json").read_text())
    page = " ".join((ROOT / "docs/experiments/reid.md").read_text().split())
    assert record["dirty"] is False
    assert record["options"]["full"] is True
    assert (ROOT / "examples/results/reid.png").stat().st_size > 10_000
    for network, found in record["networks"].items():
        for asked in found["persons"]:
            for name, row in asked["methods"].items():
                cells = [row["others"][key] for key in ("mAP", "rank1", "rank5", "rank10")]
                cells += [row["person"]["mAP"], row["named"]]
                losses = [row["loss_deleted"], row["loss_retained"]]
                told = [f"{100 * x:.1f}" for x in cells] + [f"{x:.2f}" for x in losses]
                where = f"{reid.TITLES[network]} | {asked['person']}"
                assert f"| {where} | {name} | {' | '.join(told)} |" in page
        told = [reid.in_points(found["change"][name]) for name in reid.METHODS if name != "before"]
        assert f"| {reid.TITLES[network]} | {' | '.join(told)} |" in page
        assert abs(found["change"]["calibrated"]["mean"]) < 0.01  # within a point
    noise = record["networks"]["resnet"]["noise"]
    told = f"{noise['sigma']:,.0f}", f"{noise['weights']:.2f}"
    assert "a standard deviation of {} next to weights of {}".format(*told) in page
    assert f"{record['cpu_seconds'] / 60:.0f} minutes of CPU time" in page
