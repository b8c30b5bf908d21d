"""Reports: the files parse and have the numbers given; findings and figures follow them."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from lcodec_ext import _files
from lcodec_ext.evaluation import figures
from lcodec_ext.evaluation import records as data
from lcodec_ext.evaluation.report import write_report

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
                "hash": "1" * 64,
            }
        )
        return self

    def request(
        self, ids, *, skip=False, skipped=(), selection=None, accuracy=None, norm=None, **result
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
            "note": None,
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
        return self.add("skip" if skip else "remove", record, seconds)

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
    stream = Stream().request([3, 4]).request([9], skip=True).release("heuristic")
    report = write_report(
        tmp_path / "new" / "folder", evaluation=evaluation(), ledger=stream.entries, title="Digits"
    )
    assert report.directory == tmp_path / "new" / "folder"
    expected = {"report.md", "report.json", "methods.csv", "requests.csv"}
    expected |= {f"figure_{name}.png" for name in ("removals", "losses", "units", "time")}
    assert set(report.files) == expected
    assert {path.name for path in report.directory.iterdir()} == expected  # no temporary files
    for name, path in report.files.items():
        assert path == report.directory / name
        if name.endswith(".png"):
            assert path.read_bytes().startswith(b"\x89PNG\r\n")
            assert f"]({name})" in text_of(report)
    assert text_of(report).startswith("# Digits\n")
    assert str(report).count("\n") == len(report.summary)


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
    methods, requests = tables_of(text_of(report))
    by_name = {row["method"]: row for row in methods}
    assert by_name["no-op"]["accuracy forget"] == "90.0%"
    assert by_name["retrained"]["accuracy test"] == "95.0% ± 1.0%"
    assert by_name["all units"] == {
        "method": "all units",
        "accuracy forget": "15.8%",
        "accuracy retain": "99.0%",
        "accuracy test": "95.0%",
        "loss forget": "2.51",
        "loss retain": "0.01",
        "loss test": "0.2",
        "MIA AUC": "0.570",
        "JS forget": "0.070",
        "JS test": "0.018",
        "closed, JS forget": "94%",
        "closed, loss forget": "89%",
        "gradient norm": "0.02",
        "time": "2 s",
        "of retraining": "2%",
    }
    assert by_name["retrained"]["closed, JS forget"] == "100%"
    assert by_name["floor"]["JS forget"] == "0.050"
    assert by_name["floor"]["time"] == "-"
    assert [row["kind"] for row in requests] == [
        *("start", "remove", "SKIPPED (rolled back)", "rollback to 1", "remove")
    ]
    assert requests[4]["samples"] == "10, 11, 12 and 2 more"
    assert requests[1]["gradient norm"] == "0.01 → 0.02"
    assert requests[1]["took"] == "0.5 s"


def test_long_ledgers_are_cut_in_the_table_only(tmp_path):
    stream = Stream(n=1000)
    for k in range(100):
        stream.request([k])
    report = write_report(tmp_path, ledger=stream.entries, figures=False)
    (requests,) = tables_of(text_of(report))
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
    write_report(tmp_path, ledger=Stream().request([1]).entries)
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


def test_findings_of_an_evaluation(tmp_path):
    assert said(tmp_path, evaluation=evaluation()).split("\n") == [
        "Compared: 40 samples deleted, 160 retained, 3 retrained models; 1 evaluation",
        "Gap closed, js_forget: all units 94%, gradient units 71%, random units 57%, ascent -114%",
        "Gap closed, loss_forget: all units 89%, gradient units 66%, random units 52%, "
        "ascent -119%",
    ]
    assert "It is evidence, not a guarantee." in (tmp_path / "report.md").read_text()


def test_findings_name_what_failed(tmp_path):
    broken = method("diverged", js=0.3)
    broken["metrics"] |= {"loss_test": math.inf, "loss_retain": math.nan}
    broken["losses"]["forget"] = [math.nan, 1.0]
    failing = method("broken", error="ValueError: no step", metrics={}, gap_closed={}, losses={})
    given = evaluation(method("guarded", skipped=True), failing, broken)
    text = said(tmp_path, evaluation=given)
    assert "FAILED: broken: ValueError: no step\n" in text
    assert "SKIPPED: guarded, in 1 of 1 evaluation: the guard took its step back" in text
    assert "means: diverged (loss_retain, loss_test, losses of forget samples)\n" in text
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["evaluations"][0]["methods"][4]["metrics"]["loss_test"] is None
    with open(tmp_path / "methods.csv", newline="", encoding="utf-8") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["diverged"]["loss_test"] == "inf"
    assert rows["broken"]["error"] == "ValueError: no step"
    table = {row["method"]: row for row in tables_of((tmp_path / "report.md").read_text())[0]}
    assert table["diverged"]["loss test"] == "-"
    assert table["guarded (skipped)"]["loss test"] == "0.2"
    assert table["broken (failed)"]["loss test"] == "-"


def test_no_gap_is_closed_where_there_is_none(tmp_path):
    within = method("within", gap_closed={"js_forget": None, "loss_forget": None})
    assert "losed" not in said(tmp_path, evaluation=evaluation(within))


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
    assert "Gap closed, js_forget: a 57% ± 29%" in text
    assert tables_of(text_of(report))[0][1]["JS forget"] == "0.200 ± 0.100"


def test_without_a_gap_the_raw_distance_stands_beside_its_floor(tmp_path):
    ascent = method("ascent", js=0.2, gap_closed={"js_forget": None})
    report = write_report(tmp_path, evaluation=evaluation(ascent), figures=False)
    text = "\n".join(report.summary)
    assert "No gap to close, js_forget, with a floor of 0.050: ascent 0.200" in text
    assert "Gap closed, js_forget" not in text


def test_findings_of_a_ledger(tmp_path):
    stream = Stream().request([3, 4]).request([9, 8], skip=True).request([5])
    assert said(tmp_path, ledger=stream.entries).split("\n") == [
        "Removed: 3 of 100 training samples, by 2 requests",
        "SKIPPED by the guard, at least in part: entries 2",
        "Still in the model: 9, 8",
        "Guarantee: none, the deletion is heuristic; no model was released with noise",
        "Gradient norm of the retained objective: 0.01 -> 0.04",
        "Guard (accuracy on validation samples): 0.9 -> 0.88",
        "Time: 1.5 s for 3 requests",
    ]
    text = said(tmp_path, ledger=[stream.entries, Stream().request([1]).entries])
    assert "Ledger 0. Removed: 3 of 100" in text
    assert "Ledger 1. Removed: 1 of 100 training samples, by 1 request\n" in text


def test_a_request_skipped_in_part_is_named_too(tmp_path):
    stream = Stream().request([3, 4]).request([9, 8, 7], skipped=[9, 7])
    report = write_report(tmp_path / "a", ledger=stream.entries, figures=False)
    text = "\n".join(report.summary)
    assert "Removed: 3 of 100 training samples, by 2 requests" in text
    assert "in part: entries 2\nStill in the model: 9, 7\n" in text
    rows = rows_of(report, "requests.csv")
    assert [(row["ids"], row["skipped"]) for row in rows[1:]] == [("3 4", ""), ("9 8 7", "9 7")]
    assert "remove, 2 SKIPPED" in text_of(report)
    text = said(tmp_path / "b", ledger=stream.request([6], skip=True).request([9]).entries)
    assert "entries 2, 3\nStill in the model: 7, 6\n" in text


def test_skipped_samples_that_were_removed_later(tmp_path):
    stream = Stream().request([9], skip=True)
    stream.pending = 0
    text = said(tmp_path, ledger=stream.request([9]).entries)
    assert "entries 1\nStill in the model: none, removed by later requests\n" in text


def test_what_was_rolled_back_does_not_count(tmp_path):
    stream = Stream().request([3, 4]).request([5]).request([9], skip=True).rollback(1).request([6])
    text = said(tmp_path, ledger=stream.entries)
    assert "Removed: 3 of 100 training samples, by 2 requests\nRolled back: 1 time;" in text
    assert "SKIPPED" not in text
    entries = data.read_ledgers(stream.entries)[0]
    assert [request.number for request in data.standing(entries)] == [0, 1, 4, 5]


def test_the_guarantee_is_repeated_and_not_strengthened(tmp_path):
    certified = Stream().request([1]).release("certified", assumptions={"lipschitz": 1.5})
    text = said(tmp_path / "a", ledger=certified.entries)
    assert "Guarantee: certified, 1 release, if the assumptions hold; it is of the rel" in text
    assert "Noise of the newest release: epsilon 1, delta 1e-05\n" in text
    assert "Privacy budget: epsilon 1 of 2, delta 1e-05 of 0.0001\n" in text
    assert 'Assumptions of the newest release: {"lipschitz": 1.5}\n' in text
    reasons = [f"reason {k}" for k in range(6)]
    mixed = certified.release("heuristic", reasons=reasons)
    text = said(tmp_path / "b", ledger=mixed.entries)
    assert "Guarantee: heuristic: no theorem stands behind 1 of 2 releases\n" in text
    assert "Heuristic because: reason 0; reason 1; reason 2; reason 3 and 2 more\n" in text
    assert "certified" not in text
    unknown = Stream().request([1]).add("release", {})
    assert "Guarantee: heuristic: no" in said(tmp_path / "c", ledger=unknown.entries)


def test_a_loss_may_be_guarded(tmp_path):
    stream = Stream(validation=False, watched="minus the mean loss")
    stream.accuracy = -0.5
    text = said(tmp_path / "a", ledger=stream.request([1], accuracy=-0.75).entries)
    assert "Guard (mean loss on retained samples): 0.5 -> 0.75" in text
    assert "accuracy" not in text.lower()
    stream.accuracy = 0.5  # a loss may be negative, too
    text = said(tmp_path / "b", ledger=stream.request([2], accuracy=0.25).entries)
    assert "Guard (mean loss on retained samples): 0.5 -> -0.25" in text


def test_a_score_may_be_guarded(tmp_path):
    stream = Stream(watched="the score")
    stream.accuracy = 4.855
    stream.request([1], accuracy=-1.5)
    text = said(tmp_path, ledger=stream.entries)
    assert "Guard (the score on validation samples): 4.86 -> -1.5" in text


def test_a_bad_solve_is_warned_of(tmp_path):
    stream = Stream().request([1], solve_residual=0.4).request([2], solve_residual=None)
    text = said(tmp_path / "a", ledger=stream.request([3], solve_residual=0.05).entries)
    assert "Newton step: relative residuals up to 0.4 in 1 request\n" in text
    stream.entries[0]["record"]["settings"]["max_iterations"] = 30
    text = said(tmp_path / "b", ledger=stream.entries)
    assert "up to 0.4 in 1 request (max_iterations=30)\n" in text


def test_the_least_that_can_be_reported(tmp_path):
    least = {"format": 1, "methods": [{"name": "no-op"}]}
    report = write_report(tmp_path, evaluation=least, ledger=Stream().entries)
    assert set(report.files) == {"report.md", "report.json", "methods.csv", "requests.csv"}
    assert "Removed: 0 of 100 training samples" in report.summary[0]


# --- figures -----------------------------------------------------------------------------------


@pytest.fixture
def styled():
    with figures.style():
        yield


def combined(*methods, **changes):
    return data.combine([evaluation(*methods, **changes)])


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


@STYLED
def test_at_most_twelve_panels_of_losses():
    figure = figures.losses(combined(*(method(f"m{k}") for k in range(20))))
    assert len(figure.axes) == 12


def cells_of(figure):
    """Texts and shares of a map of units, by column and row, and the names of both."""
    (axes,) = figure.axes
    shares = np.asarray(axes.get_images()[0].get_array())
    columns, rows = (
        [label.get_text() for label in labels]
        for labels in (axes.get_xticklabels(), axes.get_yticklabels())
    )
    texts = iter([text.get_text() for text in axes.texts])
    found = {
        (column, row): (next(texts), shares[j, i])
        for i, column in enumerate(columns)
        for j, row in enumerate(rows)
    }
    return columns, rows, found


@STYLED
def test_figure_of_units():
    columns, rows, found = cells_of(figures.units(combined(), []))
    assert columns == ["random units", "gradient units"]
    assert rows == list(LAYERS)
    assert found["gradient units", "fc1"] == ("25%", 0.25)
    assert found["gradient units", "fc2"] == ("100%", 1.0)
    assert found["gradient units", "head"] == ("0%", 0.0)
    assert found["random units", "fc1"] == ("50%", 0.5)
    assert figures.units(combined(masked("all", (16, 8, 4)), method("other")), []) is None


@STYLED
def test_units_of_requests_are_counted():
    stream = Stream().request([1], selection={"a": "0-3,7", "b": ""})
    stream.request([2], selection={"a": "3-4", "c": "0"}).request(
        [3], selection={"a": "9"}, skip=True
    )
    columns, rows, found = cells_of(figures.units([], ledgers(stream)))
    assert (columns, rows) == (["requests so far"], ["a", "c"])
    assert found["requests so far", "a"] == ("6 units", 1.0)  # units 0-4 and 7 of a
    assert found["requests so far", "c"] == ("1 units", 1 / 6)
    columns, rows, found = cells_of(
        figures.units(combined(masked("m", (16, 4, 0))), ledgers(Stream().request([1])))
    )
    assert (columns, rows) == (["m", "requests so far"], list(LAYERS))
    assert found["requests so far", "fc1"] == ("4 units", 1.0)
    assert found["requests so far", "fc2"] == ("0 units", 0.0)
    assert figures.units([], ledgers(Stream().request([1], selection={}))) is None
    whole = Stream().request([1], selection={"a": "0-27"})
    assert figures.units([], ledgers(whole)) is None  # all units: nothing was selected


@STYLED
def test_many_layers_are_put_into_runs():
    layers = [f"net.block.{b}.{part}.{k}" for b in range(10) for part in "ab" for k in range(3)]
    chosen = {layer: [k % 3, 4] for k, layer in enumerate(["stem", *layers])}
    _, rows, found = cells_of(figures.units(combined(method("a", units_per_layer=chosen)), []))
    assert len(rows) == 24
    assert rows[0] == "stem … net.block.0.a.1"
    assert found["a", rows[0]] == ("25%", 3 / 12)
    groups = figures.group_layers([f"layer{k}" for k in range(60)], 24)
    assert len(groups) == 24
    assert [layer for _, found in groups for layer in found] == [f"layer{k}" for k in range(60)]
    assert groups[0] == ("layer0 … layer2", ["layer0", "layer1", "layer2"])
    assert figures.group_layers(["a", ""], 24) == [("a", ["a"]), ("(model)", [""])]


@STYLED
def test_long_names_keep_their_ends():
    name = "very.long.module.name.that.goes.on.and.on.layer.17.attention"
    columns, rows, _ = cells_of(
        figures.units(combined(method("x" * 80, units_per_layer={name: [1, 2]})), [])
    )
    assert rows[0].startswith("…")
    assert rows[0].endswith(".layer.17.attention")
    assert len(rows[0]) <= 38
    assert len(columns[0]) <= 30


def widths_of(figure):
    (axes,) = figure.axes
    return {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}


@STYLED
def test_figure_of_time():
    figure = figures.time(combined(), [])
    assert widths_of(figure) == {
        "selection": [0, 0, 1],
        "solve": [0.75, 1, 0],
        "guard": [0.25, 0, 0],
    }
    assert {"2 s", "75%", "all units"} <= set(shown(figure))
    assert figures.time(combined(method("a"), method("b", phases={})), []) is None


@STYLED
def test_time_of_requests():
    figure = figures.time([], ledgers(Stream().request([1]).request([2], skip=True)))
    widths = widths_of(figure)
    assert widths["selection"] == pytest.approx([0.2])
    assert widths["solve"] == pytest.approx([0.6])
    assert widths["other"] == pytest.approx([0.2])
    assert {"1 s", "2 requests"} <= set(shown(figure))
    assert figures.time([], ledgers(Stream())) is None


@STYLED
def test_phases_have_one_colour_each_and_the_rest_is_other():
    phases = dict.fromkeys(figures._PHASES, 10.0) | {f"phase {k}": float(k) for k in range(5)}
    figure = figures.time(combined(method("a", phases=phases, seconds=200.0)), [])
    bars = {bars.get_label(): bars[0] for bars in figure.axes[0].containers}
    assert len(bars) == 9
    assert len({bar.get_facecolor() for bar in bars.values()}) == 9
    assert sum(bar.get_width() for bar in bars.values()) == pytest.approx(1)
    assert bars["other"].get_width() == pytest.approx(10 / 90)


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
def test_several_ledgers_have_a_band_as_far_as_all_go():
    first = Stream().request([1], norm=0.03).request([2, 3], norm=0.05)
    second = Stream().request([1, 2], norm=0.05).request([3], norm=0.07).request([4], norm=1.0)
    figure = figures.removals(ledgers(first, second))
    norm = figure.axes[1]
    line, band = norm.get_lines()[0], norm.collections[0].get_paths()[0].vertices
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    assert line.get_ydata() == pytest.approx([0.01, 0.02, 0.04, 0.06])
    for m, (low, high) in enumerate([(0.01, 0.01), (0.01, 0.03), (0.03, 0.05), (0.05, 0.07)]):
        at = band[band[:, 0] == m, 1]
        assert (at.min(), at.max()) == pytest.approx((low, high))


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
    assert len(report.files) == 8
