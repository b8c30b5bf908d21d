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
    own = tmp_path / "wrong_labels" / "ledger"
    own.parent.mkdir()
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
        demo.run(tmp_path, 1, people=4, shorten=12)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_its_own_folder_is_made_anew(demo, tmp_path):
    folder = demo.fresh_folder(tmp_path / "a" / "ledger")
    (folder / "ledger.jsonl").write_text("of the last time")
    assert demo.fresh_folder(folder) == folder
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # short trainings may be doubted
def test_small_run_and_again(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # those of other tests
    folder = tmp_path / "new" / "folder"
    found = demo.run(folder, 1, people=8)
    assert list(found) == list(demo.REQUESTS)
    evaluation, report = found["wrong labels"]
    metrics = {method.name: method.metrics for method in evaluation.methods}
    assert list(metrics) == ["no-op", "retrained", "lcodec_ext", "L-BFGS", "fine-tuning"]
    aim = metrics["retrained"]["loss_forget"]
    assert metrics["no-op"]["loss_forget"] < 0.1 * aim
    # A fifth of the people: on so few samples L-BFGS finishes, and there is less to lead it.
    assert 0.15 * aim < metrics["lcodec_ext"]["loss_forget"] < 2 * aim
    assert evaluation["lcodec_ext"].gap_closed["js_forget"] > 0.4
    assert metrics["lcodec_ext"]["accuracy_test"] > metrics["no-op"]["accuracy_test"] - 0.02
    for name, (evaluation, report) in found.items():
        assert report.delivered == "lcodec_ext"
        text = report.files["report.md"].read_text()
        assert "Verified | yes, when this report was written" in text
        assert 'is "lcodec\\_ext" of the evaluation: it has the weights of the ledger' in text
        written = json.loads(report.files["report.json"].read_text())
        assert written["evaluations"][0] == json.loads(json.dumps(evaluation.to_dict()))
        assert len([file for file in report.files if file.endswith(".png")]) == 1
        tensors, _, asked, *_ = demo.data(name, 1, 8)
        ledger = folder / demo.slug(name) / "ledger"
        verification = verify_ledger(ledger, train=tensors)
        assert verification.ok, verification.problems
        assert verification.removed == tuple(torch.nonzero(asked).flatten().tolist())
    shown = capsys.readouterr().out
    for word in (*metrics, *demo.COLUMNS):
        assert word.replace("no-op", "before") in shown
    for _, report in found.values():
        assert str(report.files["report.md"]) in shown
    demo.run(folder, 2, people=4, shorten=10)  # over what the first one left


def test_a_users_samples_are_all_asked_for(demo):
    (_, targets), owners, asked, validation, test = demo.data("a user", 3, demo.PEOPLE)
    (user,) = set(owners[asked.numpy()])
    assert user not in owners[~asked.numpy()]
    assert int(asked.sum()) == demo.ASKED
    assert len(targets) == demo.PEOPLE * demo.ASKED
    assert len(set(owners)) == demo.PEOPLE
    assert len(validation[1]) == len(test[1]) == demo.HELD * demo.ASKED


def test_labels_are_wrong_where_they_are_asked_for(demo):
    (inputs, targets), owners, asked, *_ = demo.data("wrong labels", 3, 8)
    (same, truth), whose, *_ = demo.data("a user", 3, 8)
    assert torch.equal(inputs, same)
    assert list(owners) == list(whose)
    assert torch.equal(targets != truth, asked)
    assert int(asked.sum()) == demo.ASKED
