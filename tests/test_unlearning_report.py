"""Reports: the files parse and have the numbers given; findings and figures follow them."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lcodec_ext import _files
from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext.evaluation import BASELINES, evaluate, figures
from lcodec_ext.evaluation import records as data
from lcodec_ext.evaluation.report import write_report
from lcodec_ext.unlearning import Unlearner

STYLED = pytest.mark.usefixtures("styled")
LAYERS = {"fc1": 16, "fc2": 8, "head": 4}


def method(name, js=0.4, seconds=1.0, **changes):
    gap = 1 - (js - 0.05) / (0.4 - 0.05)
    return {
        "name": name,
        "seconds": seconds,
        "metrics": {
            "accuracy_forget": 0.9 * js / 0.4,
            "accuracy_retain": 0.99,
            "accuracy_test": 0.95,
            "loss_forget": 3 - 7 * js,
            "loss_retain": 0.01,
            "loss_test": 0.2,
            "mia_auc": 0.5 + js,
            "js_forget": js,
            "js_test": js / 4,
            "gradient_norm": 0.02,
            "relearn_steps": None,
        },
        "gap_closed": {"js_forget": gap, "loss_forget": gap - 0.05, "mia_auc": None},
        "units_per_layer": None,
        "phases": None,
        "skipped": False,
        "losses": {"forget": [0.01, 0.1, 1.0, 1.0], "test": [0.001, 0.1]},
        **changes,
    }


def masked(name, chosen, **changes):
    units = {layer: [k, LAYERS[layer]] for layer, k in zip(LAYERS, chosen, strict=True)}
    return method(name, units_per_layer=units, **changes)


def evaluation(*methods, **changes):
    if not methods:
        methods = (
            masked(
                "all units", (16, 8, 4), js=0.07, seconds=2.0, phases={"solve": 1.5, "guard": 0.5}
            ),
            masked("random units", (8, 4, 2), js=0.2, seconds=1.5, phases={"solve": 1.5}),
            masked("gradient units", (4, 8, 0), js=0.15, seconds=1.0, phases={"selection": 1.0}),
            method("ascent", js=0.8, seconds=0.5),
        )
    retrained = method("retrained", js=0.05, seconds=100.0, gap_closed={"js_forget": 1.0})
    retrained["spread"] = {"accuracy_test": 0.01}
    no_op = method("no-op", seconds=0.0, gap_closed={"js_forget": 0.0, "loss_forget": 0.0})
    return {
        "format": 1,
        "n_forget": 40,
        "n_retain": 160,
        "n_test": 100,
        "n_retrained": 3,
        "floor": {"js_forget": 0.05, "js_test": 0.02, "loss_forget": 0.1, "weight_distance": None},
        "methods": [no_op, retrained, *methods],
        "settings": {"weight_decay": 0.001, "methods": {"all units": {"selection": "full"}}},
        **changes,
    }


class Stream:
    """A ledger in the making."""

    def __init__(self, n=100, validation=True, watched="accuracy"):
        self.entries, self.n, self.removed, self.pending = [], n, 0, 0
        self.accuracy, self.norm, self.watched = 0.9, 0.01, watched
        self.add("start", {"settings": {"seed": 7}, "validation": {"n": 9} if validation else None})

    def add(self, kind, record, seconds=None):
        number = len(self.entries)
        counts = {
            "checkpoint": {"file": "0.pt", "sha256": f"{'abcdef'[number % 6]}" * 64},
            "n_removed": self.removed,
            "n_pending": self.pending,
            "n_retained": self.n - self.removed,
        }
        environment = {"time": f"2030-01-01T00:00:{number:02d}.000+00:00", "versions": {}}
        if seconds is not None:
            environment["seconds"] = seconds
        self.entries.append(
            {
                "number": number,
                "kind": kind,
                "record": counts | record,
                "environment": environment,
                "previous": "0" * 64,
                "hash": f"{number:x}" * 64,
            }
        )
        return self

    def request(
        self,
        ids,
        *,
        note=None,
        warned=(),
        skip=False,
        skipped=(),
        selection=None,
        accuracy=None,
        norm=None,
        **result,
    ):
        before = (self.accuracy, self.norm)
        skipped = list(ids) if skip else list(skipped)
        self.pending += len(skipped)
        if not skip:
            self.removed += len(ids) - len(skipped)
            self.accuracy = self.accuracy - 0.01 if accuracy is None else accuracy
            self.norm = 2 * self.norm if norm is None else norm
        record = {
            "ids": list(ids),
            "skipped": skipped,
            "note": note,
            "selection": {"fc1": "0-2,5", "head": "1"} if selection is None else selection,
            "result": {
                "loss_forget": [0.1, 2.0],
                "loss_retain": [0.01, 0.02],
                "gradient_norm": [before[1], self.norm],
                "guard": [before[0], self.accuracy],
                "watched": self.watched,
                "n_units": 28,
                "solve_residual": 0.001,
                "guarantee": {"kind": "none"},
                **result,
            },
        }
        seconds = {"selection": 0.1, "solve": 0.3, "total": 0.5}
        self.add("skip" if skip else "remove", record, seconds)
        if warned is not None:
            self.entries[-1]["environment"]["warnings"] = list(warned)
        return self

    def rollback(self, to):
        self.removed = self.entries[to]["record"]["n_removed"]
        self.pending = self.entries[to]["record"]["n_pending"]
        return self.add("rollback", {"to": to})

    def release(self, kind, **guarantee):
        guarantee = {"kind": kind, "epsilon": 1.0, "delta": 1e-5, "sigma": 0.1, **guarantee}
        budget = {"epsilon": 2.0, "delta": 1e-4, "epsilon_sum": 1.0, "delta_sum": 1e-5}
        return self.add("release", {"guarantee": guarantee, "budget": budget})


def text_of(report):
    return report.files["report.md"].read_text(encoding="utf-8")


def rows_of(report, name):
    with open(report.files[name], newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tables_of(text):
    """Tables of a Markdown text, each a list of rows by heading."""
    tables, lines = [], []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif lines:
            head, _, *rows = lines
            tables.append([dict(zip(head, row, strict=True)) for row in rows])
            lines = []
    return tables


def shown(figure):
    """All texts of a figure that are to be seen."""
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts]
    ticks = [t for axes in figure.axes for t in [*axes.get_xticklabels(), *axes.get_yticklabels()]]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    return [t.get_text() for t in [*texts, *ticks] if t.get_text()] + titles


# --- files -------------------------------------------------------------------------------------


def test_all_files_of_an_evaluation_and_a_ledger(tmp_path):
    stream = Stream().request([3, 4]).request([9], skip=True).request([5]).release("heuristic")
    report = write_report(
        tmp_path / "new" / "folder", evaluation=evaluation(), ledger=stream.entries, title="Digits"
    )
    assert report.directory == tmp_path / "new" / "folder"
    expected = {"report.md", "report.json", "methods.csv", "requests.csv"}
    expected |= {f"figure_{name}.png" for name in ("removals", "losses")}
    assert set(report.files) == expected
    assert {path.name for path in report.directory.iterdir()} == expected  # no temporary files
    for name, path in report.files.items():
        assert path == report.directory / name
        if name.endswith(".png"):
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
            assert f"]({name})" in text_of(report)
    assert text_of(report).startswith("# Digits\n")
    assert str(report).count("\n") == len(report.summary)
    assert report.delivered is None


def test_json_has_everything(tmp_path):
    given, entries = evaluation(), Stream().request([1]).entries
    report = write_report(tmp_path, evaluation=given, ledger=entries, figures=False)
    content = json.loads(report.files["report.json"].read_text())
    assert content["format"] == 2
    assert content["evaluations"] == [given]
    assert content["ledgers"] == [entries]
    assert content["summary"] == list(report.summary)
    assert content["files"] == list(report.files)
    assert content["floor"]["js_forget"] == {"mean": 0.05, "sd": None, "n": 1}
    assert "weight_distance" not in content["floor"]
    combined = {m["name"]: m for m in content["methods"]}
    assert next(iter(combined)) == "no-op"
    assert list(combined)[-1] == "retrained"
    found = combined["all units"]
    assert found["metrics"]["js_forget"] == {"mean": 0.07, "sd": None, "n": 1}
    assert found["share_of_retraining"]["mean"] == pytest.approx(0.02)
    assert found["units_per_layer"] == {"fc1": [16, 16], "fc2": [8, 8], "head": [4, 4]}
    assert found["phases"] == {"solve": 1.5, "guard": 0.5}
    assert "relearn_steps" not in found["metrics"]
    assert combined["retrained"]["metrics"]["accuracy_test"]["sd"] == 0.01


def test_methods_csv_equals_the_evaluations(tmp_path):
    given = [evaluation(), evaluation(method("ascent", js=0.6))]
    report = write_report(tmp_path, evaluation=given, figures=False)
    rows = rows_of(report, "methods.csv")
    assert [(row["evaluation"], row["method"]) for row in rows] == [
        (str(k), m["name"]) for k, one in enumerate(given) for m in one["methods"]
    ]
    for row in rows:
        expected = next(
            m for m in given[int(row["evaluation"])]["methods"] if m["name"] == row["method"]
        )
        for prefix, field in (("", "metrics"), ("gap_closed_", "gap_closed")):
            for key, value in expected[field].items():
                assert row[prefix + key] == ("" if value is None else repr(value))
        assert float(row["share_of_retraining"]) == expected["seconds"] / 100
    gradient = next(row for row in rows if row["method"] == "gradient units")
    assert (gradient["units"], gradient["units_of"]) == ("12", "28")
    assert gradient["seconds_selection"] == "1.0"
    assert gradient["seconds_solve"] == ""


def test_requests_csv_equals_the_ledger(tmp_path):
    stream = Stream().request([3, 4], damping=0.01).request([9], skip=True).rollback(0)
    stream.request([5], selection={}).release("certified")
    report = write_report(tmp_path, ledger=[stream.entries, Stream().entries], figures=False)
    rows = rows_of(report, "requests.csv")
    assert [row["kind"] for row in rows] == [
        *("start", "remove", "skip", "rollback", "remove", "release"),
        "start",
    ]
    assert [row["ledger"] for row in rows] == ["0"] * 6 + ["1"]
    first, skipped, back, last, release = rows[1:6]
    assert (first["ids"], first["n_ids"], first["n_removed"]) == ("3 4", "2", "2")
    assert (first["units"], first["units_of"]) == ("5", "28")
    assert (float(first["gradient_norm_before"]), float(first["gradient_norm_after"])) == (
        0.01,
        0.02,
    )
    assert float(first["guard_after"]) == pytest.approx(0.89)
    assert (first["damping"], first["seconds"], first["seconds_solve"]) == ("0.01", "0.5", "0.3")
    assert float(first["seconds_other"]) == pytest.approx(0.1)
    assert (skipped["n_pending"], skipped["n_removed"]) == ("1", "2")
    assert (back["rolled_back_to"], back["n_removed"]) == ("0", "0")
    assert (last["units"], last["n_removed"]) == ("0", "1")
    assert (release["guarantee"], release["epsilon"], release["ids"]) == ("certified", "1.0", "")


def test_markdown_tables_have_the_numbers(tmp_path):
    stream = Stream().request([3, 4]).request([9], skip=True).rollback(1).request(range(10, 15))
    report = write_report(tmp_path, evaluation=evaluation(), ledger=stream.entries, figures=False)
    methods, requests = tables_of(text_of(report))[1:3]
    by_name = {row["method"]: row for row in methods}
    assert by_name["no-op"]["accuracy, deleted"] == "90.0%"
    assert by_name["retrained"]["accuracy, test"] == "95.0% ± 1.0%"
    assert by_name["all units"] == {
        "method": "all units",
        "loss, deleted": "2.51",
        "loss, retained": "0.01",
        "loss, test": "0.2",
        "accuracy, deleted": "15.8%",
        "accuracy, retained": "99.0%",
        "accuracy, test": "95.0%",
        "JS": "0.070",
        "closed, JS": "94%",
        "closed, loss": "89%",
        "attack, AUC": "0.570",
        "time": "2 s",
        "of retraining": "2%",
    }
    assert by_name["retrained"]["closed, JS"] == "100%"
    assert by_name["floor"]["JS"] == "0.050"
    assert by_name["floor"]["time"] == "-"
    assert [row["kind"] for row in requests] == [
        *("start", "remove", "SKIPPED (rolled back)", "rollback to 1", "remove")
    ]
    assert requests[4]["samples"] == "10, 11, 12 and 2 more"
    assert requests[1]["loss deleted"] == "0.1 → 2"
    assert requests[1]["time"] == "2030-01-01 00:00:01 UTC"
    assert requests[1]["took"] == "0.5 s"


def test_long_ledgers_are_cut_in_the_table_only(tmp_path):
    stream = Stream(n=1000)
    for k in range(100):
        stream.request([k])
    report = write_report(tmp_path, ledger=stream.entries, figures=False)
    requests = next(table for table in tables_of(text_of(report)) if "entry" in table[0])
    numbers = [int(row["entry"]) for row in requests]
    assert numbers == [*range(10), *range(81, 101)]
    assert "of 101 entries" in text_of(report)
    assert len(rows_of(report, "requests.csv")) == 101


def test_markdown_shows_names_as_they_are(tmp_path):
    name = "a|b *c* [d](e) <f> `g` $x^2$ _h_"
    report = write_report(tmp_path, evaluation=evaluation(method(name)), title="T # _t_")
    text = text_of(report)
    assert r"a\|b \*c\* \[d](e) \<f> \`g\` $x^2$ \_h\_" in text
    assert text.startswith("# T \\# \\_t\\_\n")
    assert rows_of(report, "methods.csv")[2]["method"] == name


def test_inputs_may_be_objects_files_and_folders(tmp_path):
    class Evaluation:
        def to_dict(self):
            return evaluation()

    class Entry:
        def __init__(self, entry):
            vars(self).update(entry)

    class Unlearner:
        ledger = tuple(map(Entry, Stream().request([1]).entries))

    saved = tmp_path / "evaluation.json"
    saved.write_text(json.dumps(evaluation()))
    folder = tmp_path / "unlearner"
    folder.mkdir()
    entries = Stream().request([1]).entries
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "ledger.jsonl").write_text(lines + '{"number":2,"ki')  # killed while it was written
    reports = [
        write_report(tmp_path / str(k), evaluation=one, ledger=ledger, figures=False)
        for k, (one, ledger) in enumerate(
            [
                (Evaluation(), Unlearner()),
                (saved, folder),
                (str(saved), folder / "ledger.jsonl"),
                (evaluation(), entries),
            ]
        )
    ]
    contents = [json.loads(r.files["report.json"].read_text()) for r in reports]
    for content in contents[:3]:
        assert content["evaluations"] == contents[3]["evaluations"]
        assert content["ledgers"] == contents[3]["ledgers"]


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"number":0\n{"number":1}\n')
    with pytest.raises(ValueError, match="line 1 of .* is not JSON"):
        write_report(tmp_path / "report", ledger=tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_report_replaces_the_one_before_and_nothing_else(tmp_path):
    (tmp_path / "figure_losses.png").write_text("mine")  # no report.json names it
    (tmp_path / "notes.txt").write_text("mine")
    write_report(tmp_path, ledger=Stream().request([1]).request([2]).entries)
    assert (tmp_path / "figure_losses.png").read_text() == "mine"
    assert (tmp_path / "figure_removals.png").exists()
    assert (tmp_path / "requests.csv").exists()
    report = write_report(tmp_path, evaluation=evaluation(), figures=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("report.md", "report.json", "methods.csv"),
        *("figure_losses.png", "notes.txt"),
    }
    assert "figure" not in text_of(report)


def test_figures_of_earlier_versions_go(tmp_path):
    for name in ("figure_gap.png", "figure_methods.png"):
        (tmp_path / name).write_text("of an earlier version")
    (tmp_path / "report.json").write_text('{"files": ["figure_gap.png", "report.json"]}')
    write_report(tmp_path, evaluation=evaluation(), figures=False)
    assert not (tmp_path / "figure_gap.png").exists()
    assert (tmp_path / "figure_methods.png").exists()  # it was not among the report's files


def test_a_foreign_report_json_deletes_nothing(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / "report.json").write_text('{"files": ["precious.txt", "../x", 3]}')
    write_report(tmp_path, evaluation=evaluation(), figures=False)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_failed_write_leaves_the_former_report(tmp_path, monkeypatch):
    first = write_report(tmp_path, evaluation=evaluation(), figures=False, title="First")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(_files.os, "fsync", fsync)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, evaluation=evaluation(), figures=False, title="Second")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert text_of(first).startswith("# First")


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "evaluation or ledger must be given"),
        ({"evaluation": 3}, ValueError, "evaluation must be an Evaluation.*got int"),
        ({"evaluation": []}, ValueError, "evaluation must have at least one"),
        ({"evaluation": {}}, ValueError, "evaluation must be .* which has 'methods'"),
        ({"evaluation": [evaluation(), {}]}, ValueError, r"evaluation\[1\] must be"),
        ({"evaluation": evaluation(format=2)}, ValueError, "has format 2; this version reads .* 1"),
        ({"evaluation": evaluation(methods=[])}, ValueError, "must be a list of dicts"),
        ({"evaluation": evaluation(methods=[{}])}, ValueError, "each with a 'name'"),
        ({"evaluation": evaluation(method("a"), method("a"))}, ValueError, r"twice: \['a'\]"),
        ({"evaluation": "nowhere.json"}, FileNotFoundError, "there is none at nowhere.json"),
        ({"ledger": []}, ValueError, "ledger must have at least one entry"),
        ({"ledger": [[]]}, ValueError, r"ledger\[0\] must have at least one entry"),
        ({"ledger": 3}, ValueError, "ledger must be an Unlearner.*got int"),
        ({"ledger": {"kind": "start"}}, ValueError, "ledger must be an Unlearner.*got dict"),
        ({"ledger": Stream().request([1]).entries[1:]}, ValueError, "entry 0 has the number 1"),
        ({"ledger": "nowhere"}, FileNotFoundError, "with ledger.jsonl"),
        ({"evaluation": evaluation(), "title": " "}, ValueError, "title must be"),
        ({"evaluation": evaluation(), "figures": 1}, TypeError, "figures"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        write_report(tmp_path / "report", **arguments)
    assert not (tmp_path / "report").exists()


def test_the_directory_must_not_be_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError, match="directory must be a folder"):
        write_report(path, evaluation=evaluation(), figures=False)


def test_without_matplotlib(tmp_path):
    script = f"""
import sys
sys.modules["matplotlib"] = None
from lcodec_ext.unlearning.report import write_report
evaluation = {{"format": 1, "methods": [{{"name": "no-op", "metrics": {{"js_forget": 0.1}}}}]}}
try:
    write_report({str(tmp_path / "a")!r}, evaluation=evaluation)
except ImportError as error:
    print(error)
write_report({str(tmp_path / "b")!r}, evaluation=evaluation, figures=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert "lcodec_ext[plot]" in done.stdout
    assert "figures=False" in done.stdout
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b" / "report.md").exists()


def test_pyplot_and_its_settings_are_left_alone(tmp_path):
    script = f"""
import json, sys
import matplotlib
matplotlib.rcParams["font.size"] = 17
keys = [key for key in matplotlib.rcParams if "backend" not in key]  # reading it loads pyplot
before = [matplotlib.rcParams[key] for key in keys]
from lcodec_ext.unlearning.report import write_report
evaluation = json.loads({json.dumps(json.dumps(evaluation()))})
write_report({str(tmp_path / "a")!r}, evaluation=evaluation)
assert "matplotlib.pyplot" not in sys.modules
assert [matplotlib.rcParams[key] for key in keys] == before
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    alone = write_report(tmp_path / "b", evaluation=evaluation())
    for name, path in alone.files.items():
        if name.endswith(".png"):  # whatever the user's settings are
            assert path.read_bytes() == (tmp_path / "a" / name).read_bytes()


# --- findings ----------------------------------------------------------------------------------


def said(tmp_path, **arguments):
    return "\n".join(write_report(tmp_path, figures=False, **arguments).summary)


def test_findings_name_what_failed(tmp_path):
    broken = method("diverged", js=0.3)
    broken["metrics"] |= {"loss_test": math.inf, "loss_retain": math.nan}
    broken["losses"]["forget"] = [math.nan, 1.0]
    failing = method("broken", error="ValueError: no step", metrics={}, gap_closed={}, losses={})
    given = evaluation(method("guarded", skipped=True), failing, broken)
    text = said(tmp_path, evaluation=given)
    assert "FAILED: broken: ValueError: no step\n" in text
    assert "SKIPPED: guarded, in 1 of 1 evaluation: the guard took its step back" in text
    assert "means: diverged (loss_retain, loss_test, losses of forget samples)" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["evaluations"][0]["methods"][4]["metrics"]["loss_test"] is None
    with open(tmp_path / "methods.csv", newline="", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["diverged"]["loss_test"] == "inf"
    assert rows["broken"]["error"] == "ValueError: no step"
    table = {row["method"]: row for row in tables_of((tmp_path / "report.md").read_text())[0]}
    assert table["diverged"]["loss, test"] == "-"
    assert table["guarded (skipped)"]["loss, test"] == "0.2"
    assert table["broken (failed)"]["loss, test"] == "-"


def test_several_evaluations_are_combined(tmp_path):
    given = [
        evaluation(method("a", js=js, seconds=2.0, skipped=js == 0.3)) for js in (0.1, 0.2, 0.3)
    ]
    report = write_report(tmp_path, evaluation=given, figures=False)
    content = json.loads(report.files["report.json"].read_text())
    found = next(m for m in content["methods"] if m["name"] == "a")
    assert found["metrics"]["js_forget"] == {
        "mean": pytest.approx(0.2),
        "sd": pytest.approx(0.1),
        "n": 3,
    }
    text = "\n".join(report.summary)
    assert "3 evaluations" in text
    assert "SKIPPED: a, in 1 of 3 evaluations" in text
    row = tables_of(text_of(report))[0][1]
    assert (row["JS"], row["closed, JS"]) == ("0.200 ± 0.100", "57% ± 29%")


def test_a_request_skipped_in_part_is_named_too(tmp_path):
    stream = Stream().request([3, 4]).request([9, 8, 7], skipped=[9, 7])
    report = write_report(tmp_path / "a", ledger=stream.entries, figures=False)
    text = "\n".join(report.summary)
    assert "In short: 3 of 100 training samples were deleted, by 2 requests. 2 that were" in text
    assert "Samples: numbers 3, 4, 8\nStill in the model: 9, 7; deleting these did harm" in text
    rows = rows_of(report, "requests.csv")
    assert [(row["ids"], row["skipped"]) for row in rows[1:]] == [("3 4", ""), ("9 8 7", "9 7")]
    assert "remove, 2 SKIPPED" in text_of(report)
    text = said(tmp_path / "b", ledger=stream.request([6], skip=True).request([9]).entries)
    assert "Still in the model: 7, 6;" in text


def test_the_least_that_can_be_reported(tmp_path):
    least = {"format": 1, "methods": [{"name": "no-op"}]}
    report = write_report(tmp_path, evaluation=least, ledger=Stream().entries)
    assert set(report.files) == {"report.md", "report.json", "methods.csv", "requests.csv"}
    assert report.summary[0] == "In short: 0 of 100 training samples were deleted, by 0 requests"


# --- what is said of a deletion ----------------------------------------------------------------


CALIBRATION = {
    "strength": 0.03,
    "stopped_by": "control",
    "cap": 3.0,
    "trained": 0.025,
    "unseen": 0.24,
    "control_before": [0.01, 0.02, 0.03, 0.04],
    "control_after": [0.1, 0.2, 0.3, 0.4],
    "control": 0.25,
    "spread": 0.064,
    "validation_before": 0.26,
    "validation_after": 0.27,
    "finish": 0,
    "group_size": 2,
    "groups_of": "users",
}


def bold(report):
    """The first sentence that a reader sees."""
    (line,) = (line for line in text_of(report).split("\n") if line.startswith("**"))
    return line


def test_the_summary_says_who_what_when_and_with_what_guarantee(tmp_path):
    stream = Stream(n=2000).request(range(12), note="user 7, by letter").request([30])
    assert said(tmp_path, ledger=stream.entries).split("\n") == [
        "In short: 13 of 2,000 training samples were deleted, by 2 requests. There is no "
        "mathematical guarantee that nothing of them is left in the model: the deletion is "
        "heuristic; this report has no evidence either",
        "Asked for by: user 7, by letter (entry 1)",
        "Samples: numbers 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more; requests.csv beside this report "
        "has all of them, in the column ids",
        "When: 2030-01-01 00:00:01 UTC to 2030-01-01 00:00:02 UTC",
        "Time taken: 1 s for 2 requests",
        f"Model before: weights with SHA-256 {'a' * 64}",
        f"Model after: weights with SHA-256 {'c' * 64}",
        f"Ledger: entries 0 to 2, head {'2' * 64}",
        "Verified: no: the report was given entries, and not the folder of their ledger",
        "Guarantee: There is no mathematical guarantee that nothing of them is left in the model: "
        "the deletion is heuristic; this report has no evidence either",
    ]
    text = said(tmp_path, ledger=[stream.entries, Stream().request([1]).entries])
    assert "Ledger 0. In short: 13 of 2,000" in text
    assert "Ledger 1. In short: 1 of 100 training samples was deleted, by 1 request." in text


def test_users_are_named(tmp_path):
    stream = Stream().request([3, 4])
    stream.entries[1]["record"]["groups"] = [{"id": "u17", "samples": [3, 4], "before": []}]
    report = write_report(tmp_path, ledger=stream.entries, figures=False)
    assert "Groups: u17" in report.summary
    assert [row["groups"] for row in rows_of(report, "requests.csv")] == ["", "u17"]


@pytest.mark.parametrize("released", ["nothing", "heuristic", "certified", "both", "unknown"])
@pytest.mark.parametrize("measured", [False, True])
def test_the_first_line_and_the_guarantee_are_one(tmp_path, released, measured):
    stream = Stream().request([1], **({"calibration": CALIBRATION} if measured else {}))
    for kind in {"nothing": [], "both": ["certified", "heuristic"]}.get(released, [released]):
        stream.release(kind, assumptions={"lipschitz": 1.5}, reasons=["r"] * (kind != "certified"))
    report = write_report(tmp_path, ledger=stream.entries, figures=False)
    facts = dict(line.split(": ", 1) for line in report.summary)
    first = facts["Guarantee"].partition(". ")[0]
    assert bold(report) == f"**1 of 100 training samples was deleted, by 1 request. {first}.**"
    text = text_of(report)
    if released == "certified":
        assert first.startswith(
            "Released copies carry a mathematical guarantee, if the assumptions"
        )
        assert "stays here, carries none" in first
        assert facts["Assumptions"] == '{"lipschitz": 1.5}'
        assert "There is no mathematical guarantee" not in text
        assert "heuristic" not in text
    else:
        assert first.startswith("There is no mathematical guarantee")
        assert ("evidence below" in first) == measured
        assert ("no evidence" in first) == (not measured)
        assert ". " not in facts["Guarantee"]  # one sentence
        assert "heuristic" in facts["Guarantee"]
        assert "carry a mathematical guarantee" not in text
        assert "certified" not in text
        assert "Assumptions" not in facts


def test_terms_of_releases_are_repeated(tmp_path):
    certified = Stream().request([1]).release("certified")
    text = said(tmp_path / "a", ledger=certified.entries)
    assert "Noise of the newest release: epsilon 1, delta 1e-05\n" in text
    assert text.endswith("Privacy budget: epsilon 1 of 2, delta 1e-05 of 0.0001")
    mixed = certified.release("heuristic", reasons=[f"reason {k}" for k in range(6)])
    text = said(tmp_path / "b", ledger=mixed.entries)
    assert "heuristic, no theorem stands behind 1 of 2 releases; " in text
    assert "Heuristic because: reason 0; reason 1; reason 2; reason 3 and 2 more\n" in text


def test_what_was_rolled_back_does_not_count(tmp_path):
    stream = Stream().request([3, 4]).request([5]).request([9], skip=True).rollback(1).request([6])
    text = said(tmp_path, ledger=stream.entries)
    assert "3 of 100 training samples were deleted, by 2 requests." in text
    assert "Samples: numbers 3, 4, 6\nRolled back: 1 time;" in text
    assert "REMAIN" not in text
    entries = data.read_ledgers(stream.entries)[0]
    assert [request.number for request in data.standing(entries)] == [0, 1, 4, 5]


def test_what_remains_is_in_the_first_line(tmp_path):
    stream = Stream().request([3, 4]).request([9, 8], skip=True)
    report = write_report(tmp_path, ledger=stream.entries, figures=False)
    first = bold(report)
    assert first.startswith("**2 of 100 training samples were deleted, by 1 request. 2 that were ")
    assert "asked for, too, REMAIN in the model. There is no mathematical guarantee" in first
    stream.pending = 0
    assert "REMAIN" not in said(tmp_path, ledger=stream.request([9, 8]).entries)


def test_a_ledger_with_a_folder_is_verified(tmp_path):
    data = torch.randn(60, 4, generator=torch.manual_seed(0)), torch.arange(60) % 3
    options = {"directory": tmp_path / "run", "groups": [k // 2 for k in range(60)]}
    with Unlearner(nn.Linear(4, 3), data, cross_entropy, **options) as unlearner:
        unlearner.remove(3)
        with pytest.warns(UserWarning, match="1 of the 2 samples of group 1 were removed"):
            unlearner.remove(7, groups=1, note="a user")
        reports = [
            write_report(tmp_path / str(k), ledger=ledger, figures=False)
            for k, ledger in enumerate([unlearner, tmp_path / "run", list(unlearner.ledger)])
        ]
        head, weights = unlearner.ledger.head, state_hash(state_of(unlearner.model))
    for report, answer in zip(reports, ["yes, when", "yes, when", "no: the"], strict=True):
        facts = dict(line.split(": ", 1) for line in report.summary)
        assert facts["Verified"].startswith(answer)
        assert facts["Ledger"] == f"entries 0 to 2, head {head}"
        assert facts["Model after"] == f"weights with SHA-256 {weights}"
        assert facts["Model before"] != facts["Model after"]
        assert "- entry 2: 1 of the 2 samples of group 1 were removed" in text_of(report)
    assert "says nothing about traces of the samples in the model" in reports[0].summary[-2]
    path = tmp_path / "run" / "ledger.jsonl"
    path.write_text(path.read_text().replace("a user", "no one"))
    report = write_report(tmp_path / "3", ledger=tmp_path / "run", figures=False)
    assert bold(report).startswith("**THE LEDGER DOES NOT VERIFY: do not rely on it. 3 of 60")
    assert (
        "hash is not that of its content"
        in dict(line.split(": ", 1) for line in report.summary)["Verified"]
    )


# --- the delivered model -----------------------------------------------------------------------


def delivered(ratio=1.0, **changes):
    """An evaluation with two methods, and a ledger whose last weights are those of "mine"."""
    loss = (3 - 7 * 0.05) * ratio
    mine = method("mine", js=0.06, sha256="b" * 64)
    mine["metrics"]["loss_forget"] = loss
    given = evaluation(mine, method("other", js=0.3, sha256="d" * 64), **changes)
    return given, Stream().request([1], calibration=CALIBRATION)


def test_the_delivered_model_is_known_by_its_weights(tmp_path):
    given, stream = delivered()
    report = write_report(tmp_path, evaluation=given, ledger=stream.entries, figures=False)
    text = text_of(report)
    assert report.delivered == "mine"
    assert 'The delivered model is "mine" of the evaluation: it has the weights of the led' in text
    assert "ledger. It was measured on 40 of the 1 deleted samples." in text  # as it was given
    near, every = tables_of(text)[1:3]
    assert list(near[0]) == ["", "before", "delivered", "retrained"]
    by_name = {row[""]: row for row in near}
    assert by_name["JS"] == {
        "": "JS",
        "before": "0.400",
        "delivered": "0.060",
        "retrained": "0.050",
    }
    assert by_name["time"]["delivered"] == "1 s"
    whole = {row["method"]: row for row in every}
    for row in near:  # the same numbers
        assert whole["mine (delivered)"][row[""]] == row["delivered"]
    assert "## Other methods, for comparison" in text
    assert "other (delivered)" not in text
    assert "it is evidence, not\na guarantee" in text


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        (0.3, "0.3 times that. It still knows them better than a model that was trained without"),
        (0.6, "0.6 times that. That is within a factor of 2"),
        (1.9, "1.9 times that. That is within a factor of 2"),
        (3.0, "3 times that. It was moved further from them than a training without them moves it"),
    ],
)
def test_the_verdict_follows_the_losses(tmp_path, ratio, sentence):
    given, stream = delivered(ratio)
    text = said(tmp_path, evaluation=given, ledger=stream.entries)
    assert (
        "Mean loss on the deleted samples: 0.2 before, 2.65 after a training without them" in text
    )
    assert sentence in text
    assert text.count("times that") == 1


def test_another_models_numbers_are_not_claimed(tmp_path):
    given, stream = delivered()
    stream.request([2])  # the ledger went on
    report = write_report(tmp_path, evaluation=given, ledger=stream.entries, figures=False)
    assert report.delivered is None
    text = text_of(report)
    assert (
        "not measured for the delivered model: no model of the evaluation has its weights" in text
    )
    assert "(delivered)" not in text
    assert "Mean loss on the deleted samples" not in text
    alone = write_report(tmp_path, ledger=stream.entries, figures=False)
    assert "not measured for the delivered model: give an evaluation" in text_of(alone)


def test_delivered_may_be_named(tmp_path):
    given, stream = delivered()
    report = write_report(tmp_path, evaluation=given, delivered="other", figures=False)
    assert report.delivered == "other"
    assert '"other" of the evaluation: as the report was told. It was meas' in text_of(report)
    with pytest.raises(ValueError, match=r"delivered='other' must have the weights of the ledger"):
        write_report(tmp_path, evaluation=given, ledger=stream.entries, delivered="other")
    for name in ("mien", "no-op"):
        with pytest.raises(ValueError, match="delivered must be a method of the eval.*mine, other"):
            write_report(tmp_path, evaluation=given, delivered=name)


def test_a_released_copy_may_be_the_delivered_one(tmp_path):
    given, stream = delivered()
    stream.request([2]).release("heuristic")
    stream.entries[-1]["environment"]["released"] = "d" * 64
    report = write_report(tmp_path, evaluation=given, ledger=stream.entries, figures=False)
    assert report.delivered == "other"
    assert f"Released copies: SHA-256 {'d' * 64}" in report.summary


@pytest.mark.filterwarnings("ignore:the model tells")  # labels and inputs have nothing in common
def test_evaluate_knows_the_weights_of_a_result(tmp_path):
    x, y = torch.randn(90, 4, generator=torch.manual_seed(0)), torch.arange(90) % 3

    def train(seed):
        torch.manual_seed(seed)
        return nn.Linear(4, 3)

    model = train(9)
    unlearner = Unlearner(model, (x[:60], y[:60]), cross_entropy, validation=(x[60:], y[60:]))
    result = unlearner.remove([3, 7])
    found = evaluate(
        model,
        (x[[3, 7]], y[[3, 7]]),
        (x[8:60], y[8:60]),
        (x[60:], y[60:]),
        cross_entropy,
        retrained=train,
        methods={"mine": result, "L-BFGS": BASELINES["L-BFGS"]},
        relearn=False,
    )
    assert found["mine"].sha256 == state_hash(state_of(unlearner.model))
    assert found["L-BFGS"].sha256 not in (None, found["mine"].sha256, found["no-op"].sha256)
    assert found["retrained"].sha256 is None
    report = write_report(tmp_path, evaluation=found, ledger=unlearner, figures=False)
    assert report.delivered == "mine"


# --- strength and warnings ---------------------------------------------------------------------


def test_calibration_is_told(tmp_path):
    stream = Stream().request([1, 2], calibration=CALIBRATION)
    text = text_of(write_report(tmp_path, ledger=stream.entries, figures=False))
    assert "(4 of 2 retained samples, each of other users) were deleted by the same step" in text
    assert "That point was reached." in text
    rows = {row["mean loss"]: row for row in tables_of(text)[1]}
    assert rows["control groups"] == {
        "mean loss": "control groups",
        "before": "0.025",
        "after": "0.25 ± 0.064",
    }
    assert (rows["validation samples"]["before"], rows["validation samples"]["after"]) == (
        "0.26",
        "0.27",
    )
    assert (rows["deleted samples"]["before"], rows["deleted samples"]["after"]) == ("0.1", "2")
    assert "*finish*" not in text
    finish = {"finish": 7, "finish_by": "mini-batches"}
    stream.request([3], calibration=CALIBRATION | finish | {"stopped_by": "retained"})
    text = text_of(write_report(tmp_path, ledger=stream.entries, figures=False))
    assert "where retained samples began to lose more" in text
    assert "A *finish* of 7 iterations followed: mini-batches." in text
    assert "This is of entry 2; requests.csv has the others." in text
    stream.request([4])
    text = text_of(write_report(tmp_path, ledger=stream.entries, figures=False))
    assert "The strength of entries 3 was not calibrated" in text


def test_outliers_have_no_groups_to_go_by(tmp_path):
    outliers = CALIBRATION | {"stopped_by": "outliers", "unlike": 0.97, "control": None}
    given = outliers | {"control_before": [], "control_after": [], "finish": 30}
    stream = Stream().request([1], calibration=given)
    text = text_of(write_report(tmp_path, ledger=stream.entries))
    assert "in 97% of pairs one had a higher loss than a\nretained sample" in text
    assert "A *finish* of 30 iterations followed: training on the retained samples." in text
    assert "Control groups" not in text
    assert [row["mean loss"] for row in tables_of(text)[1]] == [
        "validation samples",
        "deleted samples",
    ]


def test_warnings_are_listed(tmp_path):
    stream = Stream().request([1], warned=["it went too far"]).request([2], solve_residual=0.4)
    text = text_of(write_report(tmp_path / "a", ledger=stream.entries, figures=False))
    assert "- entry 1: it went too far\n- entry 2: far from the Newton step, with a resid" in text
    quiet = Stream().request([1], solve_residual=None)
    text = text_of(write_report(tmp_path / "b", ledger=quiet.entries, figures=False))
    assert "## Warnings\n\nNone." in text
    old = Stream().request([1], warned=None)
    text = text_of(write_report(tmp_path / "c", ledger=old.entries, figures=False))
    assert "- entry 1: a version made it that did not record warnings" in text


# --- figures -----------------------------------------------------------------------------------


@pytest.fixture
def styled():
    with figures.style():
        yield


def combined(*methods, **changes):
    return data.combine([evaluation(*methods, **changes)])


@STYLED
def test_losses_of_the_delivered_model_and_control_groups():
    given, stream = delivered()
    found, requests = data.combine([given]), ledgers(stream)
    figure = figures.losses(found, requests, "mine")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["no-op", "mine (delivered)", "retrained", "control groups, mean losses"]
    groups = figure.axes[3]
    before, after, level = groups.get_lines()
    assert list(before.get_xdata()) == CALIBRATION["control_before"]
    assert list(after.get_xdata()) == CALIBRATION["control_after"]
    assert list(level.get_xdata()) == [0.26, 0.26]
    alone = figures.losses([], requests)
    assert [axes.get_title(loc="left") for axes in alone.axes] == ["control groups, mean losses"]
    assert figures.losses([], ledgers(Stream())) is None


@STYLED
def test_at_most_five_panels_of_losses():
    figure = figures.losses(combined(*(method(f"m{k}") for k in range(20))))
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["no-op", "m0", "m1", "m2", "retrained"]


@STYLED
def test_several_ledgers_have_a_line_each():
    first = Stream().request([1], norm=0.03).request([2, 3], norm=0.05)
    figure = figures.removals(ledgers(first, Stream().request([1, 2], norm=0.05)))
    one, other = figure.axes[1].get_lines()
    assert list(one.get_xdata()) == [0, 1, 3]
    assert list(other.get_ydata()) == [0.01, 0.05]


@STYLED
def test_figure_of_losses():
    found = combined(method("a", losses={"forget": [1.0, 1.0, 10.0, 0.0], "test": [0.1, 0.1]}))
    figure = figures.losses(found)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["no-op", "a", "retrained"]
    parts = {patch.get_label(): patch.get_data() for patch in panels[1].patches}
    values, edges, _ = parts["deleted samples"]
    assert values.sum() == pytest.approx(1)
    assert values[np.searchsorted(edges, 1.0, side="right") - 1] == pytest.approx(0.5)
    assert values[0] == pytest.approx(0.25)  # a loss of 0 is in the lowest bin
    assert parts["test samples"].values.max() == pytest.approx(1)
    retrained = found[-1].losses["forget"]
    expected = np.histogram(retrained, edges)[0] / len(retrained)
    assert parts["deleted samples, retrained"].values == pytest.approx(expected)
    assert "deleted samples, retrained" not in {patch.get_label() for patch in panels[2].patches}


@pytest.mark.parametrize("losses", [[-3.0, -1.0, 2.0], [0.0, 0.0], [1.0]])
@STYLED
def test_losses_may_be_negative_or_all_the_same(losses):
    figure = figures.losses(combined(method("a", losses={"forget": losses, "test": []})))
    values, edges, _ = figure.axes[1].patches[0].get_data()
    assert values.sum() == pytest.approx(1)
    assert np.isfinite(edges).all()
    assert (np.diff(edges) > 0).all()


def test_phases_leave_what_total_has_beyond_them():
    assert data.without_total({"solve": 1.0, "total": 1.5}) == {"solve": 1.0, "other": 0.5}
    assert data.without_total({"solve": 1.0, "total": 1.001}) == {"solve": 1.0}
    assert data.without_total({"solve": math.nan, "total": None}) == {}


def ledgers(*streams):
    return data.read_ledgers([stream.entries for stream in streams])


@STYLED
def test_figure_of_removals():
    stream = Stream().request([1, 2]).request([9], skip=True).request([3])
    figure = figures.removals(ledgers(stream.release("heuristic")))
    accuracy, norm = figure.axes
    assert accuracy.get_title(loc="left") == "Accuracy on validation samples"
    line = accuracy.get_lines()[0]
    assert list(line.get_xdata()) == [0, 2, 3]
    assert line.get_ydata() == pytest.approx([0.9, 0.89, 0.88])
    assert list(norm.get_lines()[0].get_ydata()) == [0.01, 0.02, 0.04]
    marks = {mark.get_label(): list(mark.get_xdata()) for mark in accuracy.get_lines()[1:]}
    assert marks == {"skipped by the guard": [2], "released with noise": [3]}
    assert not accuracy.collections  # no band of one ledger
    figure = figures.removals(ledgers(stream.request([5, 6], skipped=[6])))
    marks = {mark.get_label(): list(mark.get_xdata()) for mark in figure.axes[0].get_lines()[1:]}
    assert marks["skipped by the guard"] == [2, 4]


@STYLED
def test_removals_that_were_rolled_back_are_left_out():
    stream = Stream().request([1, 2]).request([3], accuracy=0.1).rollback(1)
    stream.accuracy, stream.norm = 0.89, 0.02
    figure = figures.removals(ledgers(stream.request([4, 5])))
    line, mark = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0, 2, 4]
    assert line.get_ydata() == pytest.approx([0.9, 0.89, 0.88])
    assert (list(mark.get_xdata()), mark.get_label()) == ([2], "rolled back to here")
    assert "rolled back to here" in [t.get_text() for t in figure.legends[0].get_texts()]


@STYLED
def test_accuracy_ends_at_100_percent():
    stream = Stream()
    stream.accuracy = 1.0
    figure = figures.removals(ledgers(stream.request([1], accuracy=1.0).request([2], accuracy=0.9)))
    assert figure.axes[0].get_ylim()[1] == 1.0
    assert figure.axes[0].get_ylim()[0] < 0.9
    assert not figure.axes[0].get_lines()[0].get_clip_on()  # points there are whole
    loss = Stream(validation=False, watched="minus the mean loss").request([1], accuracy=-3.0)
    assert figures.removals(ledgers(loss)).axes[0].get_ylim()[1] > 1


@STYLED
def test_removals_without_guard_show_the_loss():
    stream = Stream()
    stream.accuracy = None
    stream.request([1], accuracy=math.nan)
    stream.entries[1]["record"]["result"]["guard"] = [None, None]
    figure = figures.removals(ledgers(stream))
    assert figure.axes[0].get_title(loc="left") == "Mean loss on retained samples"
    assert list(figure.axes[0].get_lines()[0].get_ydata()) == [0.01, 0.02]
    assert figures.removals(ledgers(Stream())) is None


@STYLED
def test_a_guarded_loss_is_drawn_as_loss():
    stream = Stream(validation=False, watched="minus the mean loss")
    stream.accuracy = -0.5
    figure = figures.removals(ledgers(stream.request([1], accuracy=-0.75)))
    assert figure.axes[0].get_title(loc="left") == "Mean loss on retained samples"
    assert list(figure.axes[0].get_lines()[0].get_ydata()) == [0.5, 0.75]


@STYLED
def test_a_guarded_score_is_drawn_as_it_is():
    stream = Stream(watched="the score")
    stream.accuracy = 4.855
    figure = figures.removals(ledgers(stream.request([1], accuracy=-1.5)))
    (axes, _) = figure.axes
    assert axes.get_title(loc="left") == "The score on validation samples"
    assert list(axes.get_lines()[0].get_ydata()) == [4.855, -1.5]
    assert not any("%" in text for text in shown(figure))


@pytest.mark.parametrize("n", [1, 20])
def test_figures_can_be_drawn_of_few_and_many(tmp_path, n):
    layers = {f"m.{k}.lin": [k % 5, 8] for k in range(5 * n)}
    many = [
        method(f"method {k}", js=0.3 - 0.02 * k, units_per_layer=layers, phases={"solve": 1.0})
        for k in range(n)
    ]
    stream = Stream()
    for k in range(n):
        stream.request([k])
    report = write_report(tmp_path, evaluation=evaluation(*many), ledger=stream.entries)
    assert len(report.files) == (6 if n > 1 else 5)
