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
        demo.run(tmp_path, 1, n_train=300, shorten=12)
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
    found = demo.run(folder, 1, n_train=400, shorten=2)
    assert list(found) == list(demo.REQUESTS)
    evaluation, report = found["wrong labels"]
    metrics = {method.name: method.metrics for method in evaluation.methods}
    assert list(metrics) == ["no-op", "retrained", "lcodec_ext", "L-BFGS", "fine-tuning"]
    aim = metrics["retrained"]["loss_forget"]
    assert metrics["no-op"]["loss_forget"] < 0.1 * aim
    assert 0.5 * aim < metrics["lcodec_ext"]["loss_forget"] < 2 * aim
    assert evaluation["lcodec_ext"].gap_closed["js_forget"] > 0.8
    assert metrics["lcodec_ext"]["accuracy_test"] > metrics["no-op"]["accuracy_test"] - 0.01
    for name, (evaluation, report) in found.items():
        assert report.delivered == "lcodec_ext"
        text = report.files["report.md"].read_text()
        assert "Verified | yes, when this report was written" in text
        assert 'is "lcodec\\_ext" of the evaluation: it has the weights of the ledger' in text
        written = json.loads(report.files["report.json"].read_text())
        assert written["evaluations"][0] == json.loads(json.dumps(evaluation.to_dict()))
        assert len([file for file in report.files if file.endswith(".png")]) == 1
        tensors, _, asked, *_ = demo.data(name, 1, 400)
        ledger = folder / demo.slug(name) / "ledger"
        verification = verify_ledger(ledger, train=tensors)
        assert verification.ok, verification.problems
        assert verification.removed == tuple(torch.nonzero(asked).flatten().tolist())
    shown = capsys.readouterr().out
    for word in (*metrics, *demo.COLUMNS):
        assert word.replace("no-op", "before") in shown
    for _, report in found.values():
        assert str(report.files["report.md"]) in shown
    demo.run(folder, 2, n_train=300, shorten=12)  # over what the first one left


def test_a_users_samples_are_all_asked_for(demo):
    (_, targets), owners, asked, validation, test = demo.data("a user", 3, 1000)
    assert set(owners[asked.numpy()]) == {owners[0]}
    assert owners[0] not in owners[~asked.numpy()]
    assert len(targets) == 1000
    assert len(validation[1]) + len(test[1]) == 797


def test_labels_are_wrong_where_they_are_asked_for(demo):
    (inputs, targets), _, asked, *_ = demo.data("wrong labels", 3, 1000)
    pixels, labels = demo.load_digits(return_X_y=True)
    known = {row.tobytes(): label for row, label in zip(pixels, labels, strict=True)}
    truth = [known[(row.double().numpy() * 16).tobytes()] for row in inputs]
    assert torch.equal(targets != torch.tensor(truth), asked)
