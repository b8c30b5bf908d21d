"""The example of a thousand removals: its reduced form, its parts, its data and its page."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import common
import pytest
import removals
import torch
from torch import nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
SIZE = replace(
    removals.REDUCED, epochs=30, removals=(20, 20, 20), perturbations=60, checkpoint=10, measured=10
)
SIZE = replace(SIZE, again=(10, 10, 10))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # ten samples are few to judge by


@pytest.fixture(scope="module")
def found():
    data = removals.load(None, SIZE, 0, full=False)
    made = removals.models(SIZE, data.x.shape[1])
    models = []
    for which, (name, make) in enumerate(made.items()):
        runs = [removals.experiment(name, make, which, data, SIZE, 0)]
        if which == 1:
            runs.append(removals.experiment(name, make, which, data, SIZE, 10_000, first=False))
        models.append({"model": name, "n": len(data.y), "runs": runs})
    return {"data": data.name, "size": vars(SIZE), "models": models}


def test_the_default_comes_nearest_to_retraining(found):
    logistic = found["models"][0]["runs"][0]
    ends = {way: of["points"][-1] for way, of in logistic["ways"].items()}
    before = logistic["no_op"][-1]["gradient_norm"]
    assert ends["default"]["gradient_norm"] < before / 2
    assert ends["full"]["gradient_norm"] > 2 * ends["default"]["gradient_norm"]
    js = {way: of[-1]["js_removed"] for way, of in logistic["distances"].items()}
    assert js["default"] < js["no-op"] / 2
    assert js["default"] < js["full"] / 2
    for model in found["models"]:
        run = model["runs"][0]
        assert run["ways"]["default"]["points"][-1]["accuracy"] > 0.85
        assert all(len(way["points"]) == 3 for way in run["ways"].values())


def test_every_model_has_its_ways(found):
    ways = [set(model["runs"][0]["ways"]) for model in found["models"]]
    plain = {"full", "L-FOCI", "random units", "default"}
    assert ways == [plain, plain | set(removals.NOISY), {"full", "L-FOCI", "K-FAC", "default"}]
    again = found["models"][1]["runs"][1]
    assert set(again["ways"]) == plain
    assert again["removals"] == 10


def test_figure_and_table(found, tmp_path):
    removals.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    table = removals.show(found)
    assert "logistic regression, trained on 900 samples" in table
    assert "| way | test accuracy (10) | loss (10) | JS, removed (10) | gradient (20) |" in table
    assert "K-FAC" in table
    for way in removals.ways(found["models"][1]):
        noisy = way in removals.NOISY
        assert removals.row(found["models"][1], way).count("±") == 3 * (not noisy), way
    json.loads(common.as_json(found), parse_constant=pytest.fail)


def test_what_grew_beyond_all_measure_has_a_range():
    assert removals.number([0.5, 0.7], 2) == "0.60 ± 0.14"
    assert removals.number([3e16, float("inf")], 2) == "3e+16 to inf"
    assert removals.number([3e16], 2) == "3e+16"


def test_kfac_is_exact_for_one_sample():
    torch.manual_seed(0)
    model, x, damping = nn.Linear(3, 4), torch.randn(1, 3), 0.1
    g = torch.randn(4, 4)
    p = model(x).softmax(1)[0].detach()
    one = nn.functional.pad(x[0], (0, 1), value=1.0)
    fisher = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(one, one))
    expected = torch.linalg.solve(fisher + damping * torch.eye(16), g.flatten()).reshape(4, 4)
    (step,) = removals.Kfac(model, x, damping).solve([g])
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


def test_gradient_norms():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.arange(5) % 4
    norms = []
    for i in range(5):
        parts = torch.autograd.grad(
            cross_entropy(model(x[i : i + 1]), y[i : i + 1]), [*model.parameters()]
        )
        norms.append(float(sum(part.square().sum() for part in parts)) ** 0.5)
    assert removals.sample_gradient_norm(model, x, y) == pytest.approx(sum(norms) / 5, rel=1e-5)
    decayed = cross_entropy(model(x), y) + 0.005 * sum(p.square().sum() for p in model.parameters())
    parts = torch.autograd.grad(decayed, [*model.parameters()])
    norm = float(sum(part.square().sum() for part in parts)) ** 0.5
    assert removals.gradient_norm(model, x, y) == pytest.approx(norm, rel=1e-5)


def test_the_papers_noise():
    assert removals.noise(60_000) == pytest.approx(0.00432, rel=1e-2)
    assert removals.noise(10_000) == pytest.approx(36 * removals.noise(60_000))


def test_noise_on_chosen_units_alone():
    model = nn.Sequential(nn.Linear(3, 4))
    before = model[0].weight.detach().clone()
    common.add_noise_on(model, {"0": (1, 3)}, 1.0, torch.Generator().manual_seed(0))
    moved = (model[0].weight != before).any(1)
    assert moved.tolist() == [False, True, False, True]


def write_idx(folder, name, values):
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = bytes([0, 0, 8, values.ndim]) + sizes + bytes(values.flatten().tolist())
    (folder / f"{name}.gz").write_bytes(gzip.compress(content))


def test_mnist_as_published(tmp_path):
    for part, n in (("train", 40), ("t10k", 6)):
        write_idx(
            tmp_path, f"{part}-images-idx3-ubyte", torch.arange(n * 784).reshape(n, 28, 28) % 256
        )
        write_idx(tmp_path, f"{part}-labels-idx1-ubyte", torch.arange(n) % 10)
    data = removals.load(tmp_path, replace(SIZE, n=20), 0, full=False)
    assert data.x.shape == (20, 784)
    assert len(data.validation[1]) == 20
    assert data.test[1].tolist() == [0, 1, 2, 3, 4, 5]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(SystemExit, match=r"lacks t10k-labels-idx1-ubyte.gz. It should hold MNIST"):
        removals.load(tmp_path, SIZE, 0, full=False)


def test_the_page_has_the_figures_of_the_record():
    record = json.loads((ROOT / "examples/results/removals.json").read_text())
    page = (ROOT / "docs/experiments/removals.md").read_text()
    assert record["dirty"] is False
    for found in record["models"]:
        assert removals.heading(found) in page
        for way in removals.ways(found):
            assert removals.row(found, way) in page


def test_the_prose_has_the_figures_of_the_record():
    record = json.loads((ROOT / "examples/results/removals.json").read_text())
    page = " ".join((ROOT / "docs/experiments/removals.md").read_text().split())
    gallery = " ".join((ROOT / "docs/experiments.md").read_text().split())

    def has(text):
        assert text in page, text

    runs = [found["runs"][0] for found in record["models"]]
    ends = [
        {way: removals.at(run, way, run["removals"]) for way in removals.ways(found)}
        for run, found in zip(runs, record["models"], strict=True)
    ]
    losses = [
        [short(end[way]["loss_removed"]) for way in ("no-op", "default", "retrained")]
        for end in ends
    ]
    apart = [[short(end[way]["js_removed"]) for way in ("default", "no-op")] for end in ends]
    (a, b, c), (d, e, f), (g, h, i) = losses
    has(f"from {a} to {b} (retrained: {c}), from {d} to {e} ({f}) and from {g} to {h} ({i})")
    has("JS " + ", ".join(f"{default} instead of {before}" for default, before in apart))
    norms = [p["gradient_norm"] for run in runs for p in run["ways"]["default"]["points"][1:]]
    has(f"between {short(min(norms), 1)} and {short(max(norms), 1)} with the first requests")
    kfac, seconds = ends[2]["K-FAC"], runs[2]["ways"]["K-FAC"]["cpu_seconds_per_sample"]
    again = [short(end["retrained"]["js_removed"]) for end in ends]
    has(f"loss {short(kfac['loss_removed'])} next to retraining's {i}, at a JS of ")
    has(f"{short(kfac['js_removed'])} where retrained networks are {again[2]} apart")
    has(f"in {short(seconds)} s a sample")
    has(f"JS of {apart[1][1]} and {apart[2][1]} from retraining, where retrained networks are ")
    has(f"{again[1]} and {again[2]} apart")
    has(f"ends at {record['models'][0]['gradient_norm_at_constant_rate']:.1f}")
    sigmas = record["settings"]
    has(f"sigma = {sigmas['sigma']:.4f} for 60,000")
    has(f"gives {sigmas['sigma_for_this_n']:.3f}")
    x, y, z = (f"{run['accuracy_after_one_noise_for_this_n']:.3f}" for run in runs)
    has(f"accuracy to {x}, {y} and {z}")
    for end in ends:
        assert abs(end["default"]["accuracy"] - end["retrained"]["accuracy"]) < 0.01
    lost = [
        end["no-op"]["accuracy"] - end[way]["accuracy"]
        for end in ends[1:]
        for way in ("full", "L-FOCI")
    ]
    assert f"{100 * min(lost):.0f} to {100 * max(lost):.0f} points of accuracy" in gallery


def short(value, digits=3):
    """As the prose writes it, without the 0 in front."""
    return f"{value:.{digits}f}".lstrip("0")
