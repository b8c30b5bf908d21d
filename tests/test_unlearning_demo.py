"""The demonstration runs, and its report says what its numbers show."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lcodec_ext.unlearning import verify_ledger

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_deletion.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("digits_deletion", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("what", ["folder", "ledger", "file", "link"])
def test_what_is_not_its_own_is_not_deleted(demo, tmp_path, what):
    own = tmp_path / "ledger"
    if what == "file":
        own.write_text("mine")
    elif what == "link":
        demo.fresh_folder(tmp_path / "elsewhere")
        own.symlink_to(tmp_path / "elsewhere")
    else:
        own.mkdir()
        (own / ("ledger.jsonl" if what == "ledger" else "accounts")).write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="ledger was not made by this example"):
        demo.run(tmp_path, 1, n_train=300, n_wrong=12, epochs=1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_its_own_folder_is_made_anew(demo, tmp_path):
    folder = demo.fresh_folder(tmp_path / "a" / "ledger")
    (folder / "ledger.jsonl").write_text("of the last time")
    assert demo.fresh_folder(folder) == folder
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # the paper's
def test_small_run_and_again(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # those of other tests
    folder = tmp_path / "new" / "folder"
    evaluation, report = demo.run(folder, 1, n_train=300, n_wrong=12, epochs=150)
    metrics = {method.name: method.metrics for method in evaluation.methods}
    assert metrics["no-op"]["accuracy_forget"] > 0.7
    assert metrics["retrained"]["accuracy_forget"] < 0.2
    closed = {method.name: method.gap_closed for method in evaluation.methods}
    assert closed["recommended"]["js_forget"] > 0.5
    assert metrics["recommended"]["accuracy_retain"] > 0.95

    written = json.loads((folder / "report.json").read_text())
    assert written["evaluations"][0] == json.loads(json.dumps(evaluation.to_dict()))
    assert (folder / "figure_losses.png").stat().st_size > 10_000
    shown = capsys.readouterr()
    for name in metrics:
        assert name in shown.out
    assert str(report) in shown.out
    assert "retraining" in shown.err  # progress

    (tensors, wrong, _), verification = demo.data(1, 300, 12), None
    verification = verify_ledger(folder / "ledger", train=tensors)
    assert verification.ok, verification.problems
    assert int(wrong.sum()) == 12
    demo.run(folder, 2, n_train=300, n_wrong=12, epochs=3)  # over what the first one left
