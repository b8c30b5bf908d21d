"""Each example has a recorded run, a figure, a page and a place in the gallery."""

import argparse
import json
from pathlib import Path

import common
import pytest

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs/experiments.md"
NAMES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if "common.main(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_recorded_and_shown(name):
    record = json.loads((ROOT / f"examples/results/{name}.json").read_text())
    assert record["example"] == name
    assert record["schema"] == common.SCHEMA
    assert record["options"]["full"] is True
    assert record["dirty"] is False
    text = GALLERY.read_text(encoding="utf-8")
    for shown in (f"examples/{name}.py --full", f"](../examples/results/{name}.png)"):
        assert shown in text
    assert f"](experiments/{name}.md)" in text
    assert f"examples/{name}.py" in (ROOT / f"docs/experiments/{name}.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_strict_json(name):
    text = (ROOT / f"examples/results/{name}.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_what_is_not_finite_is_recorded_as_json():
    found = json.loads(common.as_json({"a": [float("nan"), float("inf"), -float("inf"), 1.5]}))
    assert found == {"a": [None, "inf", "-inf", 1.5]}


def test_means_have_their_spread():
    assert common.spread([0.25], 3) == "0.250"
    assert common.spread([1.0, 3.0], 2) == "2.00 ± 1.41"


def test_the_gallery_shows_nothing_else():
    folder = ROOT / "examples/results"
    assert sorted({path.stem for path in folder.glob("*")}) == NAMES
    assert sorted(path.stem for path in (ROOT / "docs/experiments").glob("*.md")) == NAMES


def run(tmp_path, monkeypatch, *given, data="a folder"):
    monkeypatch.setattr("sys.argv", ["it", "--output", str(tmp_path / "new" / "out"), *given])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # those of other tests
    common.main(
        "it",
        common.options("What it does.", data),
        lambda arguments: {"found": arguments.seed + 1},
        lambda record, file: file.write_bytes(b"drawn"),
        lambda record: f"found {record['found']}",
    )


def test_a_run_is_recorded(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, "--seed", "3", "--data", str(tmp_path))
    record = json.loads((tmp_path / "new/out/it.json").read_text())
    assert record["found"] == 4
    assert record["options"] == {"full": False, "seed": 3, "data": tmp_path.name}
    assert record["cpu_seconds"] >= 0
    assert {"commit", "dirty", "machine", "versions", "created"} <= set(record)
    assert (tmp_path / "new/out/it.png").read_bytes() == b"drawn"
    assert "found 4" in capsys.readouterr().out


def test_data_that_is_not_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--data", str(tmp_path / "elsewhere"))
    assert "elsewhere is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "--data", str(tmp_path), data=None)


def test_options_have_defaults():
    found = common.options("", None).parse_args([])
    assert found == argparse.Namespace(full=False, seed=0, output=Path("demo_output"))
