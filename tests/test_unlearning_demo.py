"""The demonstration runs, and says in words what its numbers show."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_deletion.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("digits_deletion", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # hardly trained
def test_small_run(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # those of other tests
    folder = tmp_path / "new" / "folder"
    sizes = {"n_train": 300, "n_wrong": 20, "n_hidden": 8, "iterations": 200, "draws": 3}
    record = demo.run(folder, 1, **sizes)
    assert json.loads((folder / "digits_deletion.json").read_text()) == record
    assert (folder / "digits_deletion.png").stat().st_size > 20_000

    rows = {row["method"]: row for row in record["rows"]}
    assert rows["no-op"]["forget_accuracy"] > 0.8
    assert rows["retrained"]["forget_accuracy"] < 0.2
    assert rows["all units"]["forget_distance"] < 0.8 * rows["no-op"]["forget_distance"]
    assert rows["retrained"]["test_distance"] == 0
    assert rows["random"]["units"] == rows["L-FOCI"]["units"]
    shown = capsys.readouterr()
    for method in rows:
        assert method in shown.out
    assert "training" in shown.err  # progress


def rows_of(distances):
    methods = ["no-op", "L-FOCI", "random", "all units", "retrained"]
    return [
        {
            "method": method,
            "forget_accuracy": distance,
            "forget_distance": distance,
            "test_distance": distance,
            "test_accuracy": 0.9,
            "units": 3,
            "seconds": 1.0,
        }
        for method, distance in zip(methods, distances, strict=True)
    ]


@pytest.mark.parametrize(
    ("lfoci", "verdict"),
    [(0.1, "better than chance"), (0.5, "which chance explains"), (0.9, "worse than chance")],
)
def test_conclusions_follow_the_numbers(demo, lfoci, verdict):
    random_rows = [{"forget_distance": 0.4 + 0.01 * k} for k in range(20)]
    findings = demo.conclude(rows_of([1.0, lfoci, 0.5, 0.25, 0.0]), random_rows, 8, 10)
    assert findings[2].endswith(f"{verdict}.")
    assert "predicts 8 of the 8" in findings[0]
    assert "leaves 2 of them and closes 75%" in findings[1]


def test_output_distance_is_the_jensen_shannon_distance(demo):
    inputs = torch.eye(2, dtype=torch.float64)
    same = demo.output_distance(lambda x: 50 * x, lambda x: 50 * x, inputs)
    opposite = demo.output_distance(lambda x: 50 * x, lambda x: 50 * (1 - x), inputs)
    assert same == 0
    assert opposite == pytest.approx(1.0, abs=1e-6)
