"""The command line: info, bench, the commands on tables, and what all commands share."""

import csv
import importlib.util
import io
import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lcodec_ext
from lcodec_ext import _threads
from lcodec_ext.cli import bench, main, tables
from lcodec_ext.cli.import_path import ImportPathError, call, load_object

GUIDE = Path(__file__).parent.parent / "docs" / "cli.md"
COMMANDS = ("info", "codec", "foci", "xi", "graph", "unlearn", "evaluate", "report", "bench")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Work in an empty folder; --threads ends with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_threads, "_threads", None)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run a command line; exit status, stdout and stderr."""

    def call_main(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call_main


@pytest.fixture
def refused(run):
    """The one line that a refused command line gives."""

    def message(*arguments, status=2):
        got, out, err = run(*arguments)
        assert (got, out) == (status, "")
        assert err.count("\n") == 1, err
        assert err.endswith("\n")
        assert "Traceback" not in err
        return err

    return message


def write_csv(path, names, columns, **options):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **options)
        if names:
            writer.writerow(names)
        writer.writerows(zip(*columns, strict=True))
    return path


@pytest.fixture
def data(rng):
    X = rng.normal(size=(400, 6))
    return X, X[:, 1] * X[:, 4]


@pytest.fixture
def table(data):
    """400 rows; y is x1 times x4."""
    X, y = data
    names = [*(f"x{k}" for k in range(6)), "y"]
    return write_csv("table.csv", names, [*X.T.tolist(), y.tolist()])


# ---------------------------------------------------------------------------------------------
# What all commands share


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert f"lcodec-ext {command}" in out.partition("examples:")[2], "an example"
    assert "--json" in out
    assert "--quiet" in out
    assert max(map(len, out.splitlines())) <= 100


def test_help_lists_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    for command in COMMANDS:
        assert re.search(rf"^    {command} ", out, re.MULTILINE)
    assert run("--version") == (0, f"lcodec-ext {lcodec_ext.__version__}\n", "")


def test_usage_errors_are_one_line(refused):
    assert "COMMAND" in refused()
    for command in ("'fcoi'", *COMMANDS):
        assert command in refused("fcoi")
    assert "--y" in refused("foci", "t.csv")
    assert "'average'" in refused("codec", "t.csv", "--y", "a", "--z", "b", "--ties", "mean")
    assert "an integer >= 1; got '0'" in refused("foci", "t", "--y", "a", "--max-features", "0")
    assert "number >= 0; got '-1'" in refused("foci", "t", "--y", "a", "--min-gain", "-1")
    assert "2**64); got 'x'" in refused("foci", "t", "--y", "a", "--seed", "x")
    assert "1 to 1024; got '0'" in refused("bench", "--threads", "0")


@pytest.mark.parametrize("command", ["unlearn", "foci t.csv --y y", "bench"])
def test_unknown_options_are_told_by_their_command(refused, command):
    name = command.split()[0]
    message = refused(*command.split(), "--wd", "1e-3")
    assert message.startswith(f"lcodec-ext {name}: error: unrecognized arguments: --wd 1e-3")
    assert message.endswith(f"(see lcodec-ext {name} --help)\n")


def test_options_are_not_abbreviated(refused, table):
    assert "--max" in refused("foci", table, "--y", "y", "--max", "2")


def test_debug_shows_the_traceback(run):
    with pytest.raises(tables.TableError, match="does not exist"):
        run("foci", "none.csv", "--y", "y", "--debug")


def test_unexpected_errors_are_told_from_bad_input(refused, table, monkeypatch):
    def broken(*_, **__):
        raise KeyError("slip")

    monkeypatch.setattr(lcodec_ext, "foci", broken)
    assert "KeyError: 'slip' (--debug shows where)" in refused("foci", table, "--y", "y", status=1)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(lcodec_ext, "foci", full)
    assert "not enough memory" in refused("foci", table, "--y", "y", status=1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lcodec_ext, "foci", interrupted)
    assert "interrupted" in refused("foci", table, "--y", "y", status=130)


def test_module_and_pipe(table):
    command = [sys.executable, "-m", "lcodec_ext", "foci", "-", "--y", "y", "--json"]
    text = Path(table).read_bytes()
    done = subprocess.run(command, input=text, capture_output=True, check=True)
    assert done.stderr == b""
    assert {s["column"] for s in json.loads(done.stdout)["selected"]} >= {"x1", "x4"}
    # Nobody reads the answer; that is not an error.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    _, err = process.communicate(text)
    assert err == b""


def test_dependence_commands_do_without_torch(table):
    code = f"""
import sys
from lcodec_ext.cli import main
for arguments in (["--help"], ["info"], ["codec", {table!r}, "--y", "y", "--z", "x1"],
                  ["foci", {table!r}, "--y", "y"], ["xi", {table!r}], ["graph", {table!r}]):
    main(arguments)
print([n for n in ("torch", "sklearn", "scipy", "matplotlib") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_info(run):
    status, out, err = run("info", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["command"] == "info"
    assert found["build"] == lcodec_ext.build_info()
    assert found["threads"] == lcodec_ext.get_num_threads()
    assert found["cuda_status"] == lcodec_ext.cuda_status()
    assert found["versions"]["numpy"] == np.__version__
    _, out, _ = run("info")
    for text in (lcodec_ext.__version__, lcodec_ext.cuda_status(), found["machine"]["cpu"]):
        assert text in out


# ---------------------------------------------------------------------------------------------
# codec and foci


def test_codec_is_codec(run, table, data):
    X, y = data
    status, out, err = run("codec", table, "--y", "y", "--z", "x1,x2", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["T"] == lcodec_ext.codec(y, X[:, [1, 2]])
    assert (found["y"], found["z"], found["x"], found["n_samples"]) == ("y", ["x1", "x2"], [], 400)
    status, out, _ = run("codec", table, "--y", "y", "--z", "x1", "--x", "x4")
    value = lcodec_ext.codec(y, X[:, 1], X[:, 4])
    assert out == f"T(y, x1 | x4) = {value:.6g}   (400 rows)\n"


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--ties", "random", "--seed", "5"], {"ties": "random", "seed": 5}),
        (["--ties", "first"], {"ties": "first"}),
    ],
)
def test_codec_options(run, rng, options, settings):
    y, z = rng.integers(0, 3, (2, 200))
    path = write_csv("ties.csv", ["y", "z"], [y, z])
    _, out, _ = run("codec", path, "--y", "y", "--z", "z", "--json", *options)
    assert json.loads(out)["T"] == lcodec_ext.codec(y, z, **settings)


def test_decimals_make_ties_of_the_unit_on_paper(run, rng):
    counts = rng.integers(20, 60, (3, 90))
    y = counts.sum(axis=0)
    path = write_csv("mm.csv", ["y", "a", "b", "c"], [y, *counts / 10])
    command = ["codec", path, "--y", "y", "--z", "a,b", "--x", "c", "--json"]
    _, out, _ = run(*command, "--decimals", "1")
    found = json.loads(out)
    assert found["T"] == lcodec_ext.codec(y, counts[:2].T, counts[2])
    assert found["options"]["decimals"] == 1
    assert json.loads(run(*command)[1])["T"] != found["T"]
    _, out, _ = run("foci", path, "--y", "y", "--json", "--decimals", "1")
    expected = lcodec_ext.foci(counts.T, y)
    assert [step["T"] for step in json.loads(out)["selected"]] == expected.cumulative.tolist()
    status, _, error = run(*command, "--decimals", "0")
    assert status == 2
    assert "has more than 0 decimals" in error


def test_several_neighbors(run, table, data):
    X, y = data
    _, out, _ = run("codec", table, "--y", "y", "--z", "x1,x2", "--json", "--n-neighbors", "4")
    assert json.loads(out)["T"] == lcodec_ext.codec(y, X[:, [1, 2]], n_neighbors=4)
    assert json.loads(out)["options"]["n_neighbors"] == 4
    _, out, _ = run("foci", table, "--y", "y", "--json", "--n-neighbors", "4")
    expected = lcodec_ext.foci(X, y, n_neighbors=4)
    assert [step["T"] for step in json.loads(out)["selected"]] == expected.cumulative.tolist()


def test_noise_makes_it_lcodec(run, table, data):
    X, y = data
    command = ["codec", table, "--y", "y", "--z", "x1", "--x", "x4", "--json", "--noise", "0.1"]
    _, out, _ = run(*command, "--noise-scale", "relative", "--seed", "3")
    expected = lcodec_ext.lcodec(y, X[:, 1], X[:, 4], noise=0.1, noise_scale="relative", seed=3)
    assert json.loads(out)["T"] == expected
    assert expected != lcodec_ext.codec(y, X[:, 1], X[:, 4])


def test_foci_is_foci(run, table, data):
    X, y = data
    status, out, err = run("foci", table, "--y", "y", "--json")
    assert (status, err) == (0, "")
    found, expected = json.loads(out), lcodec_ext.foci(X, y)
    assert [s["column"] for s in found["selected"]] == [f"x{k}" for k in expected.ordering]
    assert [s["T"] for s in found["selected"]] == expected.cumulative.tolist()
    assert [s["conditional_T"] for s in found["selected"]] == expected.conditional.tolist()
    assert found["stop_reason"] == expected.stop_reason
    assert (found["n_samples"], found["n_features"], found["warnings"]) == (400, 6, [])


def test_foci_options(run, table, data):
    X, y = data
    command = ["foci", table, "--y", "y", "--json"]

    def columns(*options):
        status, out, err = run(*command, *options)
        assert status == 0, err
        return [int(s["column"][1:]) for s in json.loads(out)["selected"]]

    def expected(subset=(0, 1, 2, 3, 4, 5), function=lcodec_ext.foci, **settings):
        subset = np.array(subset)
        return subset[function(X[:, subset], y, **settings).ordering].tolist()

    assert columns("--exclude", "x4, x0") == expected([1, 2, 3, 5])
    assert columns("--columns", "x5,x0,x4") == expected([5, 0, 4])
    assert columns("--max-features", "1") == expected(max_features=1)
    assert columns("--no-stop") == expected(stop=False)
    assert len(expected(stop=False)) == 6 > len(expected())
    assert columns("--min-gain", "0.9") == expected(min_gain=0.9) == []
    assert columns("--preselected", "x2,x1") == expected(preselected=[2, 1])
    assert columns("--columns", "x0,x4", "--preselected", "x1") == expected(
        [0, 4, 1], preselected=[2]
    )
    assert columns("--no-stop", "--standardize", "none") == expected(stop=False, standardize=None)
    assert columns("--no-stop", "--noise", "2", "--seed", "1") == expected(
        function=lcodec_ext.lfoci, noise=2.0, seed=1, stop=False
    )


def test_foci_says_what_it_found(run, table):
    _, out, _ = run("foci", table, "--y", "y", "--preselected", "x0")
    first, second, third, *steps = out.splitlines()
    assert first == "2 of 5 columns selected for y on 400 rows; no further column raises T"
    assert second.startswith("given x0: T = ")
    assert third.split() == ["rank", "column", "T", "conditional", "T"]
    assert [step.split()[1] for step in steps] in (["x1", "x4"], ["x4", "x1"])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_foci_output_file(run, table, suffix):
    name = f"chosen{suffix}"
    status, out, err = run("foci", table, "--y", "y", "--output", name, "--json")
    assert (status, err) == (0, f"wrote {name}\n")
    text = Path(name).read_text(encoding="utf-8")
    if suffix == ".json":
        assert text == out
    else:
        rows = list(csv.DictReader(io.StringIO(text)))
        chosen = json.loads(out)["selected"]
        assert [row["column"] for row in rows] == [s["column"] for s in chosen]
        assert [float(row["T"]) for row in rows] == [s["T"] for s in chosen]
    assert not list(Path().glob("*.part"))
    assert run("foci", table, "--y", "y", "--output", name, "--quiet")[2] == ""


def test_graph_is_dependence_graph(run, table, data):
    X, y = data
    names = [*(f"x{k}" for k in range(6)), "y"]
    status, out, err = run("graph", table, "--json", "--max-features", "2")
    assert (status, err) == (0, "")
    found = json.loads(out)
    graph = lcodec_ext.dependence_graph(np.column_stack([X, y]), max_features=2)
    assert found["columns"] == names
    assert len(found["edges"]) == graph.adjacency.sum()
    for edge in found["edges"]:
        i, j = names.index(edge["response"]), names.index(edge["column"])
        assert edge["conditional_T"] == graph.weights[i, j]
        assert graph.results[i].ordering[edge["rank"] - 1] == j
        assert graph.results[i].cumulative[edge["rank"] - 1] == edge["T"]
    _, out, _ = run("graph", table, "--alpha", "0.1", "--permutations", "19", "--json")
    options = {"stop": "permutation", "alpha": 0.1, "n_permutations": 19, "seed": 0}
    graph = lcodec_ext.dependence_graph(np.column_stack([X, y]), **options)
    pvalues = [p for r in graph.results for p in r.pvalues[: len(r.ordering)].tolist()]
    assert [edge["pvalue"] for edge in json.loads(out)["edges"]] == pvalues
    _, out, _ = run("graph", table, "--columns", "y,x1,x4", "--standardize", "none")
    first, second, *lines = out.splitlines()
    graph = lcodec_ext.dependence_graph(np.column_stack([y, X[:, [1, 4]]]), standardize=None)
    n_edges = graph.adjacency.sum()
    assert first == f"{n_edges} of 6 dependences between 3 columns on 400 rows"
    assert second.split() == ["column", "depends", "on", "(conditional", "T)"]
    assert [line.split()[0] for line in lines] == ["y", "x1", "x4"]
    assert f"x1 ({graph.weights[0, 1]:.4f})" in lines[0]


def test_graph_of_columns_that_cannot_be_used(run, refused, rng):
    columns = [rng.random(40), rng.random(40), ["red", "blue"] * 20]
    path = write_csv("mixed.csv", ["a", "b", "c"], columns)
    message = refused("graph", path)
    assert "row 1, column 'c': 'red' is not a number" in message
    assert "or leave it out: --numeric-only, or --exclude c" in message
    assert run("graph", path, "--numeric-only")[0] == 0
    assert "a graph needs two columns; got 'a'" in refused("graph", path, "--columns", "a")
    assert "no candidate is left" in refused("graph", path, "--exclude", "a,b,c")


def test_codec_test_is_codec_test(run, table, data):
    X, y = data
    command = ["codec", table, "--y", "y", "--z", "x1", "--test", "--permutations", "99"]
    status, out, err = run(*command, "--json", "--seed", "4")
    assert (status, err) == (0, "")
    found, expected = json.loads(out), lcodec_ext.codec_test(y, X[:, 1], n_permutations=99, seed=4)
    assert (found["T"], found["test"]["pvalue"]) == (expected.statistic, expected.pvalue)
    assert found["test"]["method"] == "permutation"
    assert (found["test"]["seed"], found["test"]["exchangeability_pvalue"]) == (4, None)
    assert "null_distribution" not in found["test"]
    quantiles = found["test"]["null_quantiles"]
    assert quantiles["0.95"] == np.quantile(expected.null_distribution, 0.95)
    assert list(quantiles.values()) == sorted(quantiles.values())
    assert len(out.splitlines()) < 60
    assert found["options"]["n_permutations"] == 99
    _, out, _ = run(*command, "--x", "x4", "--k-perm", "4")
    expected = lcodec_ext.codec_test(y, X[:, 1], X[:, 4], n_permutations=99, k_perm=4, seed=0)
    first, second, third, fourth = out.splitlines()
    assert third.startswith(f"p-value {expected.exchangeability_pvalue:.4g} that z is exchangeable")
    assert fourth.startswith("0.95 interval: ")
    assert first == f"T(y, x1 | x4) = {expected.statistic:.6g}   (400 rows)"
    assert second.startswith(f"p-value {expected.pvalue:.4g} of independence; 99 permutations of z")
    assert json.loads(run(*command[:6], "--json")[1])["test"] is None
    level = ["--method", "asymptotic", "--confidence-level", "0.9"]
    _, out, _ = run(*command[:7], *level)
    options = {"method": "asymptotic", "confidence_level": 0.9, "seed": 0}
    expected = lcodec_ext.codec_test(y, X[:, 1], **options)
    low, high = expected.confidence_interval
    assert f"p-value {expected.pvalue:.4g} of independence; all permutations of y" in out
    assert out.endswith(f"0.9 interval: {low:.4f} to {high:.4f}\n")
    found = json.loads(run(*command[:7], *level, "--json")[1])["test"]
    assert found["confidence_interval"] == [low, high]
    assert found["null_sd"] == expected.null_sd
    assert found["null_quantiles"] is None
    assert run(*command[:7], *level, "--plot", "a.png")[0] == 0
    assert Path("a.png").exists()


def test_options_of_tests_that_do_not_go_together(refused, table):
    codec = ["codec", table, "--y", "y", "--z", "x1"]
    foci = ["foci", table, "--y", "y"]
    for command, message in (
        ([*codec, "--permutations", "9"], "--permutations 9 needs --test"),
        ([*codec, "--plot", "a.png"], "--plot a.png needs --test"),
        ([*codec, "--method", "asymptotic"], "--method asymptotic needs --test"),
        ([*codec, "--confidence-level", "0.9"], "--confidence-level 0.9 needs --test"),
        (
            [*codec, "--test", "--method", "asymptotic", "--permutations", "9"],
            "--permutations 9 goes without --method asymptotic",
        ),
        (
            [*codec, "--test", "--method", "permutation", "--x", "x2"],
            "--method permutation goes without --x",
        ),
        (
            [*codec, "--test", "--method", "asymptotic", "--x", "x2"],
            "--method asymptotic goes without --x",
        ),
        (
            [*codec, "--test", "--method", "local_permutation"],
            "--method local_permutation needs --x",
        ),
        ([*foci, "--alpha", "0.1", "--n-neighbors", "3"], "--n-neighbors 3 goes without --alpha"),
        (
            [*foci, "--alpha", "0.01", "--permutations", "98"],
            "--alpha 0.01 needs --permutations 99 or more",
        ),
        ([*foci, "--x", "x1"], "--columns names the columns here"),
        (["xi", table, "--x", "x1"], "--columns names the columns here"),
        ([*codec, "--k-perm", "9"], "--k-perm 9 needs --test and --x"),
        ([*codec, "--test", "--k-perm", "9"], "--k-perm 9 needs --test and --x"),
        ([*codec, "--test", "--noise", "1"], "--test goes without --noise"),
        ([*foci, "--permutations", "9"], "--permutations 9 needs --alpha"),
        ([*foci, "--alpha", "0.1", "--no-stop"], "--alpha 0.1 goes without --no-stop"),
        ([*foci, "--alpha", "0.1", "--noise", "1"], "--alpha 0.1 goes without --noise"),
        (["graph", table, "--permutations", "9"], "--permutations 9 needs --alpha"),
        ([*foci, "--alpha", "1"], "a number between 0 and 1; got '1'"),
        ([*foci, "--alpha", "x"], "a number between 0 and 1; got 'x'"),
        (["xi", table, "--confidence-level", "0.9"], "--confidence-level 0.9 needs --y"),
        (["xi", table, "--columns", "x1"], "xi needs two columns; got 'x1'"),
        (["xi", table, "--y", "y", "--exclude", "y"], "--exclude names 'y', which is the response"),
    ):
        assert message in refused(*command)
    assert not Path("a.png").exists()


def test_the_normal_limit_takes_no_classes(run, table):
    options = ["--y", "y", "--z", "x1", "--test", "--method", "asymptotic", "--classes"]
    status, _, err = run("codec", table, *options)
    assert status == 2
    assert "--method asymptotic takes numbers, and y holds classes" in err.splitlines()[-1]


def test_foci_stops_by_permutations(run, data):
    X, _ = data
    y = X[:, 1] + X[:, 4]
    table = write_csv("sum.csv", [*(f"x{k}" for k in range(6)), "y"], [*X.T.tolist(), y.tolist()])
    command = ["foci", table, "--y", "y", "--alpha", "0.05", "--permutations", "99", "--seed", "2"]
    status, out, err = run(*command, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    options = {"stop": "permutation", "alpha": 0.05, "n_permutations": 99, "seed": 2}
    expected = lcodec_ext.foci(X, y, **options)
    assert [s["T"] for s in found["selected"]] == expected.cumulative.tolist()
    n_steps = len(expected.ordering)
    assert n_steps > 0
    assert [s["pvalue"] for s in found["selected"]] == expected.pvalues[:n_steps].tolist()
    assert found["stop_reason"] == expected.stop_reason
    assert found["pvalues"] == expected.pvalues.tolist()  # that of the step that ended it, too
    assert found["threshold"] == expected.threshold.tolist()
    assert (found["seed"], found["not_taken"]) == (2, f"x{expected.not_taken}")
    assert {name: found["options"][name] for name in options} == options
    _, out, _ = run(*command, "--output", "chosen.csv")
    assert out.splitlines()[1].endswith("p-value")
    last = f"the best of the others, x{expected.not_taken}, has p-value {expected.pvalues[-1]:.4g}"
    assert out.splitlines()[-1] == last
    if expected.stop_reason == "not_significant":
        head = out.splitlines()[0]
        assert "; no other column does better than chance (--alpha 0.05)" in head
    rows = list(csv.DictReader(io.StringIO(Path("chosen.csv").read_text(encoding="utf-8"))))
    assert [float(row["pvalue"]) for row in rows] == [s["pvalue"] for s in found["selected"]]


def test_xi_of_one_response_is_xi_test(run, table, data):
    X, y = data
    command = ["xi", table, "--y", "y", "--columns", "x4,x1,x0", "--seed", "1"]
    status, out, err = run(*command, "--json", "--confidence-level", "0.9")
    assert (status, err) == (0, "")
    found = json.loads(out)
    expected = lcodec_ext.xi_test(X[:, [4, 1, 0]], y, confidence_level=0.9, seed=1)
    places = {"x4": 0, "x1": 1, "x0": 2}
    assert [step["xi"] for step in found["columns"]] == sorted(expected.statistic, reverse=True)
    for step in found["columns"]:
        k = places[step["column"]]
        assert (step["xi"], step["pvalue"]) == (expected.statistic[k], expected.pvalue[k])
        assert step["confidence_interval"] == [end[k] for end in expected.confidence_interval]
        assert step["pvalue"] <= step["adjusted"] <= 1
    assert run(*command, "--confidence-level", "0.9", "--plot", "xi.png")[0] == 0
    _, out, _ = run(*command)
    lines = out.splitlines()
    assert lines[0] == "xi of y on 3 columns, on 400 rows"
    assert lines[1].split() == ["column", "xi", "p-value", "adjusted"]
    assert [line.split()[0] for line in lines[2:]] == [s["column"] for s in found["columns"]]
    _, out, _ = run(*command, "--json", "--permutations", "99")
    found = json.loads(out)
    expected = lcodec_ext.xi_test(
        X[:, [4, 1, 0]], y, method="permutation", n_permutations=99, seed=1
    )
    assert (found["method"], found["seed"]) == ("permutation", 1)
    assert sorted(s["pvalue"] for s in found["columns"]) == sorted(expected.pvalue.tolist())


def test_xi_of_all_pairs_is_xi_matrix(run, table, data):
    X, y = data
    status, out, err = run("xi", table, "--columns", "x0,x1,y", "--json")
    assert (status, err) == (0, "")
    found, expected = json.loads(out), lcodec_ext.xi_matrix(np.column_stack([X[:, :2], y]))
    assert found["columns"] == ["x0", "x1", "y"]
    assert found["xi"] == expected.statistic.tolist()
    assert found["adjusted"][0][1] == expected.adjusted[0, 1]
    assert found["pvalue"][0][0] is None
    _, out, _ = run("xi", table)
    lines = out.splitlines()
    assert lines[0] == "42 pairs of 7 columns, on 400 rows"
    assert lines[1].split() == ["y", "x", "xi", "p-value", "adjusted"]
    assert len(lines) == 23
    assert lines[-1] == "... and 22 more; --json has all"


def test_xi_takes_numbers(run, refused, rng):
    columns = [rng.random(40), rng.random(40), ["red", "blue"] * 20]
    path = write_csv("mixed.csv", ["a", "b{}", "c"], columns)
    assert "column 'c': 'red' is not a number" in refused("xi", path, "--y", "c")
    assert run("xi", path, "--y", "b{}", "--columns", "a")[0] == 0
    assert run("xi", path, "--numeric-only")[0] == 0


PLOTS = {
    "codec": ["--y", "y", "--z", "x1", "--test", "--permutations", "19"],
    "foci": ["--y", "y"],
    "xi": [],
    "xi of one": ["--y", "y"],
    "graph": [],
}


@pytest.mark.parametrize("command", PLOTS)
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plots_are_written(run, table, command, suffix):
    name = f"picture.{suffix}"
    given = [command.split()[0], table, *PLOTS[command], "--json"]
    status, out, err = run(*given, "--plot", name)
    assert (status, err) == (0, f"wrote {name}\n")
    assert json.loads(out)["plot"] == name
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert Path(name).read_bytes().startswith(start)
    assert "plot" not in json.loads(run(*given)[1])


@pytest.mark.parametrize("command", PLOTS)
def test_plots_are_refused_before_anything_is_read(refused, command, here, monkeypatch):
    given = [command.split()[0], "none.csv", *PLOTS[command], "--plot"]  # there is no such table
    assert "name ending in .png or .svg or .pdf; got 'a.jpg'" in refused(*given, "a.jpg")
    (here / "folder.png").mkdir()
    assert "folder.png is a folder; expected the name of a file" in refused(*given, "folder.png")
    for place in ("nowhere/a.png", "none.csv/a.png"):
        assert "a folder that can be written" in refused(*given, place)
    assert "none.csv" in refused(*given, "a.png")
    assert not Path("a.png").exists()
    find = importlib.util.find_spec
    for missing in ("matplotlib", "networkx") if command == "graph" else ("matplotlib",):
        with monkeypatch.context() as patch:
            patch.setattr(
                "lcodec_ext.cli.dependence.find_spec",
                lambda name, missing=missing: None if name == missing else find(name),
            )
            message = refused(*given, "a.png")
            assert f"--plot needs {missing}: pip install 'lcodec_ext[plot]'" in message


def test_warnings_go_to_stderr_and_json(run, rng):
    path = write_csv("c.csv", ["y", "a", "b"], [rng.random(50), [1] * 50, rng.random(50)])
    status, out, err = run("foci", path, "--y", "y", "--json", "--quiet")
    assert status == 0
    (warning,) = json.loads(out)["warnings"]
    assert "'a'" in warning
    assert "constant" in warning
    assert err == f"lcodec-ext foci: warning: {warning}\n"


def test_threads(run, table):
    assert run("foci", table, "--y", "y", "--threads", "3")[0] == 0
    assert lcodec_ext.get_num_threads() == 3


def test_columns_that_are_not_there(refused, table):
    message = refused("foci", table, "--y", "x01")
    assert "--y names column 'x01'" in message
    assert "nearest names are 'x1', 'x0'" in message
    assert "--z names column 'age'" in refused("codec", table, "--y", "y", "--z", "age")
    assert "--exclude names column 'b'" in refused("foci", table, "--y", "y", "--exclude", "b")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("codec table.csv --y y --z y", "--z and --y both name column 'y'"),
        ("codec table.csv --y y --z x1 --x x1", "--z and --x both name column 'x1'"),
        ("codec table.csv --y y --z x1 --x y", "--x and --y both name column 'y'"),
        ("codec table.csv --y y --z x1,x1", "names column 'x1' twice"),
        ("codec table.csv --y y --z x1,", "expected names of columns"),
        ("codec table.csv --y y --z x1 --noise-scale relative", "needs --noise SD"),
        ("codec table.csv --y y --z x1 --noise 1 --decimals 1", "--decimals goes without --noise"),
        ("foci table.csv --y y --noise 1 --n-neighbors 2", "--n-neighbors goes without --noise"),
        ("codec table.csv --y y --z x1 --test --n-neighbors 2", "T of one neighbour"),
        ("codec table.csv --y y --z x1 --n-neighbors 0", "expected an integer"),
        ("codec table.csv --y y --z x1 --n-neighbors 3 --ties first", "pass ties='average'"),
        ("foci table.csv --y y --decimals 1.5", "expected an integer from 0 to 15; got '1.5'"),
        ("foci table.csv --y y --columns y,x1", "--columns names 'y', which is the response"),
        ("foci table.csv --y y --columns x1 --exclude x2", "not allowed with"),
        ("foci table.csv --y y --exclude x1 --preselected x1", "both name column 'x1'"),
        ("foci table.csv --y y --exclude x0,x1,x2,x3,x4,x5", "no candidate is left"),
        ("foci table.csv --y y --min-gain 0.1 --no-stop", "--min-gain 0.1"),
        ("foci table.csv --y y --output a.txt", ".csv or .json; got 'a.txt'"),
        ("foci table.csv --y y --output no/a.csv", "folder that can be written; got 'no/a.csv'"),
    ],
)
def test_options_that_cannot_be(refused, table, command, text):
    assert text in refused(*command.split())


# ---------------------------------------------------------------------------------------------
# Tables


def read(path, *wanted, **options):
    table = tables.read_table(str(path), lambda names: list(wanted or names), **options)
    return table.to_numpy().tolist()


def write(name, text):
    Path(name).write_bytes(text.encode())
    return name


PLAIN = [[1.0, -2.5], [3e10, 0.1]]


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,-2.5\n3e10,.1\n",
        "a,b\n1,-2.5\n3e10,.1",
        "a,b\r\n1,-2.5\r\n3e10,.1\r\n",
        "\ufeffa,b\n1,-2.5\n3e10,.1\n",
        "a,b\n\n1,-2.5\n3e10,.1\n\n",
        'a,b\n"1", -2.5\n3e10," .1"\n',
        '"a","b"\n1,-2.5\n3e10,.1\n',
    ],
)
def test_csv_dialects(text):
    assert read(write("a.csv", text)) == PLAIN


def test_csv_quotes_and_names():
    path = write("a.csv", 'a,"b, of ""all""",c d,\n1,2,3,4\n')
    names = []
    tables.read_table(path, lambda known: names.extend(known) or known)
    assert names == ["a", 'b, of "all"', "c d", "column 3"]
    assert read(path, "c d", 'b, of "all"') == [[3, 2]]
    for text in ('"a", " b c "\n1,2\n', '"a"\t"b c"\n1\t2\n', " a\t b c \n1\t2\n"):
        assert read(write("a.tsv", text), "b c", delimiter="," if "," in text else None) == [[2]]


def test_only_wanted_columns_must_be_numbers():
    path = write("a.csv", "id,x,y\nk7,1,2\nk8,3,4\n")
    assert read(path, "y", "x") == [[2, 1], [4, 3]]
    with pytest.raises(tables.TableError, match=r"a.csv, row 1, column 'id': 'k7' is not a number"):
        read(path)


def test_names_that_repeat_matter_where_they_are_used(refused):
    path = write("a.csv", "note,x,note,y\n1,1,a,2\n2,3,b,5\n3,4,c,1\n")
    assert read(path, "x", "y") == [[1, 2], [3, 5], [4, 1]]
    assert "2 columns are named 'note'" in refused("foci", path, "--y", "y")


def test_missing_and_true():
    path = write("a.csv", "x,y\n,True\nNA,false\n null ,TRUE\n1,0\n")
    expected = [[np.nan, 1], [np.nan, 0], [np.nan, 1], [1, 0]]
    np.testing.assert_array_equal(read(path), expected)


def test_fast_and_careful_reading_agree(rng):
    values = rng.normal(size=(300, 4)) * 10.0 ** rng.integers(-300, 300, size=(300, 4))
    names = ["a", "b", "c", "d"]
    plain = read(write_csv("a.csv", names, values.T.tolist()))
    quoted = read(write_csv("b.csv", names, values.T.tolist(), quoting=csv.QUOTE_ALL))
    assert plain == quoted == values.tolist()


def test_other_delimiters():
    assert read(write("a.tsv", "a\tb\n1\t-2.5\n3e10\t.1\n")) == PLAIN
    assert read(write("a.csv", "a;b\n1;-2.5\n3e10;.1\n"), delimiter=";") == PLAIN
    assert read(write("a.txt", "a|b\n1|-2.5\n3e10|.1\n"), delimiter="|") == PLAIN


STAMP = "1577134800018164904"  # float64 has steps of 256 there


@pytest.mark.parametrize(
    "written",
    [
        STAMP,
        f"+{STAMP}.",
        f"{STAMP}.0",
        f'"{STAMP}.000"',
        f"0{STAMP}.0",
        "1.577134800018164904e18",
        "1.577134800018164904E+18",
        "157713480001816490.4e1",
        "9007199254740993.0",
        "-9007199254740993.0",
    ],
)
def test_integers_that_float64_rounds_are_refused_however_written(written):
    with pytest.raises(tables.TableError, match="row 2, column 'b': .* is beyond 2"):
        read(write("a.csv", f"a,b\n1,0\n2,{written}\n"))
    comma = written.replace(".", ",")
    with pytest.raises(tables.TableError, match="row 2, column 'b': .* is beyond 2"):
        read(write("a.csv", f"a;b\n1;0\n2;{comma}\n"), delimiter=";", decimal=",")


def test_numbers_beyond_2_53_that_are_floats_go_on():
    values = [6.022e23, 1e23, 1.2345678901234567e20, 2.0**60, 9007199254740992.0, -1e300]
    for form in ("{!r}", "{:.18e}", "{:.17e}", "{:.16e}", "{:.15E}"):
        text = "a\n" + "".join(form.format(value) + "\n" for value in values)
        rounded = [float(form.format(value)) for value in values]
        assert read(write("a.csv", text)) == [[value] for value in rounded]
    text = f"a\n{2**60}\n{2**60}.0\n1e23\ninf\n"
    assert read(write("a.csv", text)) == [[2.0**60], [2.0**60], [1e23], [math.inf]]


def test_no_header():
    path = write("a.csv", "1,-2.5\n3e10,.1\n")
    assert read(path, header=False) == PLAIN
    assert read(path, "1", header=False) == [[-2.5], [0.1]]
    with pytest.raises(tables.TableError, match="row 1: 'a' is not a number.*; a header"):
        read(write("b.csv", "a,b\n1,2\n"), header=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b,a\n1,2,3\n", "2 columns are named 'a'"),
        ("a,b\n1,2\n3,4,5\n", "row 2: 3 cells; expected 2.*row names"),
        ("a,b,c\n1,2,3\n3\n", "row 2: 1 cell; expected 3"),
        ("a;b\n1;2\n", "if ';' separates its columns, pass --delimiter ';'"),
        ("a\tb\n1\t2\n", "pass --delimiter tab"),
        ('a,b\n"1,5",2\n', "'1,5' is not a number; decimals need a point"),
        ("a,b\nred,2\n", "'red' is not a number; encode categories"),
        ("a,b\n1_000,2\n", "'1_000' is not a number"),
        ('a,b\n"1,2\n', "line 2: a quoted cell .* no quote closes it|row 1: 1 cell; expected 2"),
        ("a,b\n1,9007199254740993\n", "row 1, column 'b': 9007199254740993 is beyond 2"),
        ("a,b\n,1\n-9007199254740993,\n", "row 2, column 'a': -9007199254740993 is beyond 2"),
        ("a\n1\n18446744073709551617\n", "row 2, column 'a': 18446744073709551617 is beyond 2"),
        ("a\n1\n2020-01-01\n", "row 2, column 'a': '2020-01-01' is not a number"),
        ("a\n2020-01-01\n", "row 1, column 'a': '2020-01-01' is not a number"),
        ("a,b\n1,2\n3,0x10\n", "row 2, column 'b': '0x10' is not a number"),
        (
            'a,b\n1,2\n3,"4\n5,6\n7,8\n',
            "line 3: a quoted cell goes on to line 5, and no quote closes it",
        ),
    ],
)
def test_text_that_is_no_table(text, message):
    with pytest.raises(tables.TableError, match=message):
        read(write("a.csv", text))


def test_large_integers_that_are_exact():
    text = f"a,b\n1,{2**60}\n,{2**53}\n"
    np.testing.assert_array_equal(read(write("a.csv", text)), [[1, 2.0**60], [np.nan, 2.0**53]])


def test_not_utf8():
    for text in ("a,größe\n1,2\n", "a\ngröße\n"):
        Path("a.csv").write_bytes(text.encode("latin1"))
        with pytest.raises(tables.TableError, match="not UTF-8.*iconv"):
            read("a.csv")
    Path("a.csv").write_bytes('a,note\n1,größe\n2,"ä"\n'.encode("latin1"))
    assert read("a.csv", "a") == [[1], [2]], "a column that is not used"


def test_stdin(run, table, data, monkeypatch):
    X, y = data
    quoted = Path(table).read_bytes().replace(b"x1", b'"x1"', 1)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(quoted)))
    _, out, _ = run("codec", "-", "--y", "y", "--z", "x1", "--json")
    assert json.loads(out)["T"] == lcodec_ext.codec(y, X[:, 1])


def test_missing_values_need_a_decision(run, refused):
    path = write("a.csv", "y,z,w\n1,2,\n2,,3\n3,5,1\n4,6,inf\n5,9,2\n")
    command = ["codec", path, "--y", "y", "--z", "z"]
    message = refused(*command)
    assert "a.csv, row 2, column 'z': a missing value" in message
    assert "--nan-policy omit" in message
    status, out, _ = run(*command, "--nan-policy", "omit", "--json")
    expected = lcodec_ext.codec([1, 3, 4, 5], [2, 5, 6, 9])
    assert (status, json.loads(out)["T"], json.loads(out)["n_samples"]) == (0, expected, 4)
    message = refused("foci", path, "--y", "y", "--nan-policy", "omit")
    assert "a.csv, row 4, column 'w': an infinite value" in message
    assert "at least 3 rows" in refused("codec", write("b.csv", "y,z\n"), "--y", "y", "--z", "z")


@pytest.mark.parametrize(
    "text", ["y,z\n1,2\n2,3\n3,CELL\n4,5\n", 'y,"z"\n1,2\n\n"2",3\n\n3,CELL\n4,5\n']
)
def test_a_cell_is_told_by_its_row(refused, text):
    command = ["codec", "a.csv", "--y", "y", "--z", "z"]
    for cell in ("nan", ""):
        write("a.csv", text.replace("CELL", cell))
        assert "a.csv, row 3, column 'z': a missing value" in refused(*command)
    write("a.csv", text.replace("CELL", "one"))
    assert "a.csv, row 3, column 'z': 'one' is not a number" in refused(*command)


def test_a_missing_value_of_an_array_is_told_by_its_row(refused, monkeypatch):
    np.save("a.npy", np.array([[1.0, 2.0], [3.0, np.nan], [4.0, 5.0]]))
    assert "a.npy, row 2, column '1': a missing value" in refused(
        "codec", "a.npy", "--y", "0", "--z", "1"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y,z\n1,2\n3,nan\n4,5\n")))
    message = refused("codec", "-", "--y", "y", "--z", "z")
    assert "standard input, row 2, column 'z': a missing value" in message


def test_an_unnamed_column_is_pointed_out(run, rng):
    path = write_csv("a.csv", ["", "a", "y"], [range(60), rng.random(60), rng.random(60)])
    _, out, err = run("foci", path, "--y", "y", "--json")
    assert "--exclude 'column 0'" in err
    assert json.loads(out)["n_features"] == 2
    _, out, err = run("foci", path, "--y", "y", "--json", "--exclude", "column 0")
    assert (err, json.loads(out)["n_features"]) == ("", 1)


def test_npz(run, data):
    X, y = data
    np.savez("a.npz", X=X.astype(np.float32), y=y, w=X[:, 1])
    _, out, _ = run("foci", "a.npz", "--y", "y", "--exclude", "w", "--json")
    expected = lcodec_ext.foci(X.astype(np.float32), y)
    found = json.loads(out)["selected"]
    assert [s["column"] for s in found] == [f"X{k}" for k in expected.ordering]
    assert [s["T"] for s in found] == expected.cumulative.tolist(), "float32 stays float32"
    assert read("a.npz", "w", "X4") == np.column_stack([X[:, 1], X[:, 4].astype("f")]).tolist()


def test_npy(run, data):
    X, y = data
    np.save("a.npy", np.column_stack([X, y]))
    _, out, _ = run("codec", "a.npy", "--y", "6", "--z", "1,4", "--json")
    assert json.loads(out)["T"] == lcodec_ext.codec(y, X[:, [1, 4]])


def test_arrays_that_are_no_table(refused):
    np.savez("a.npz", a=np.zeros(3), b=np.zeros(4), c=np.zeros((2, 2, 2)))
    np.savez("b.npz", a=np.zeros(3), b=np.zeros((3, 1)), b0=[1, 2, 3])
    np.savez("c.npz", a=np.zeros(3), b=np.array([None] * 3), allow_pickle=True)
    np.savez("d.npz", a=np.zeros(3), b=np.zeros(4))
    np.savez("e.npz", a=np.zeros(3), b=np.array(["x", "y", "z"]))
    write("f.npz", "no")
    write("f.npy", "no")
    for path, message in {
        "a.npz": "column 'b' has 4 rows and 'a' has 3",
        "b.npz": "2 columns are named 'b0'",
        "c.npz": "column 'b' is of dtype object; expected numbers",
        "d.npz": "column 'b' has 4 rows and 'a' has 3; columns must have one length",
        "e.npz": "column 'b' is of dtype <U1; expected numbers",
        "f.npz": "cannot be read as NPZ",
        "f.npy": "cannot be read as NPY",
    }.items():
        z = "b0" if path == "b.npz" else "b"
        assert message in refused("codec", path, "--y", "a", "--z", z), path


def test_paths_that_are_no_table(refused, here):
    command = ["--y", "a", "--z", "b"]
    assert "does not exist" in refused("codec", "a.csv", *command)
    assert "is a directory" in refused("codec", here, *command)
    assert "ends in '.xlsx'" in refused("codec", write("a.xlsx", ""), *command)
    message = refused("codec", write("a.npz", ""), *command, "--no-header")
    assert "--no-header is for CSV and TSV" in message
    assert "one character, tab or space; got '::'" in refused(
        "codec", "a", *command, "--delimiter", "::"
    )


def test_csv_and_parquet_need_pyarrow(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("a.parquet", "a.csv"):
        message = refused("codec", write(name, ""), "--y", "a", "--z", "b")
        assert f"{name}: CSV and Parquet need pyarrow: pip install 'lcodec_ext[tables]'" in message


def test_parquet():
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        "i": [1, None, 3],
        "f": pa.array([0.5, None, 2.5], pa.float32()),
        "b": [True, None, False],
        "s": ["x", "y", "z"],
        "c": pa.array(["x", "y", "z"]).dictionary_encode(),
        "large": [2**60 + 1, None, 3],
    }
    parquet.write_table(pa.table(columns), "a.parquet")
    expected = [[1, 0.5, 1], [np.nan] * 3, [3, 2.5, 0]]
    np.testing.assert_array_equal(read("a.parquet", "i", "f", "b"), expected)
    table = tables.read_table("a.parquet", lambda _: ["f"])
    assert table["f"].dtype == np.float32
    for name, message in (("s", "string"), ("c", "dictionary"), ("large", "beyond 2")):
        with pytest.raises(tables.TableError, match=f"column '{name}'.*{message}"):
            read("a.parquet", name)
    with pytest.raises(tables.TableError, match="cannot be read as Parquet"):
        read(write("b.parquet", "no"))


def test_tsv_has_no_quoting(run, data):
    """A lone quote is a letter; rows are never swallowed."""
    X, y = data
    rows = [f"{a!r}\t{b!r}\tnote" for a, b in zip(X[:, 1].tolist(), y.tolist(), strict=True)]
    rows[20] = rows[20].replace("note", '"open')
    rows[300] = rows[300].replace("note", 'shut"')
    rows[310] = rows[310].replace("note", '6" pipe')
    for path, more in (("a.tsv", []), ("a.tab", []), ("a.txt", ["--delimiter", "tab"])):
        write(path, "\n".join(["x1\ty\tnote", *rows]))
        status, out, err = run("codec", path, "--y", "y", "--z", "x1", "--json", *more)
        assert (status, err, json.loads(out)["n_samples"]) == (0, "", 400)
        assert json.loads(out)["T"] == lcodec_ext.codec(y, X[:, 1])


@pytest.mark.parametrize("delimiter", [",", ";", "|"])
@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ('"open', 'shut"', "line 22: a quoted cell goes on to line 302, and the lines between"),
        ('"open', '"shut', "line 22: .* to line 302, and the quote that ends it, on line 302"),
        ('"open', "plain", "line 22: .* to line 401, and no quote closes it"),
        ("plain", '"open', "line 302: .* to line 401, and no quote closes it"),
    ],
)
def test_a_quote_that_swallows_rows_is_refused(data, delimiter, first, last, message):
    X, y = data
    cells = [[repr(v) for v in row] + ["note"] for row in np.column_stack([X, y]).tolist()]
    cells[20][-1], cells[300][-1] = first, last
    names = [*(f"x{k}" for k in range(6)), "y", "note"]
    text = "\n".join(delimiter.join(row) for row in [names, *cells])
    for more in ("", "\n"):
        with pytest.raises(tables.TableError, match=f"a.csv, {message}"):
            read(write("a.csv", text + more), "x1", "y", delimiter=delimiter)


def test_a_cell_that_spans_lines_is_warned_of():
    text = 'x,note\n1,"two\r\nlines, and ""quotes"""\n\n2,plain\n3,"a\n\nb"\n'
    with pytest.warns(UserWarning, match="line 2: .* goes on to line 3, and 1 more cell like it"):
        assert read(write("a.csv", text), "x") == [[1], [2], [3]]
    with pytest.warns(UserWarning, match="line 1: a quoted cell goes on to line 2"):
        assert read(write("a.csv", 'a,"b\nc"\n1,2\n'), "b\nc") == [[2]]
    prose = '"one, two\nthree, four\nfive, six"'
    with pytest.warns(UserWarning, match="line 2: .* to line 4"):
        assert read(write("a.csv", f"note,x\n{prose},1\nno,2\n"), "x") == [[1], [2]]
    swallowed = "\n".join(["note,x", '"a,1', *(f"b{k},{k}" for k in range(9)), 'c",2', "d,3"])
    with pytest.raises(tables.TableError, match="line 2: .* to line 12, and the lines between"):
        read(write("a.csv", swallowed), "x")
    with pytest.raises(tables.TableError, match="line 1: .* no quote closes it"):
        read(write("a.csv", 'a,"b\n1,2\n'), "a")
    text = 'x,note\n1,"one line"\n\n2,say "hi"\n3,"""quoted"""\n'
    assert read(write("a.csv", text), "x") == [[1], [2], [3]], "and no warning"


def compressed(text):
    import bz2
    import gzip
    import lzma

    import pyarrow as pa

    data = text.encode()
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        yield suffix, pack(data)
    for suffix, kind in ((".zst", "zstd"), (".lz4", "lz4")):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, kind) as stream:
            stream.write(data)
        yield suffix, sink.getvalue().to_pybytes()


def test_compressed_files():
    for suffix, data in compressed("a,b\n1,-2.5\n3e10,.1\n"):
        for path, more in (("a.csv" + suffix, {}), ("a" + suffix, {"delimiter": ","})):
            Path(path).write_bytes(data)
            assert read(path, **more) == PLAIN
        Path("misnamed.csv").write_bytes(data)
        assert read("misnamed.csv") == PLAIN
    for suffix, data in compressed("a\tb\n1\t-2.5\n3e10\t.1\n"):
        Path("a.tsv" + suffix).write_bytes(data)
        assert read("a.tsv" + suffix) == PLAIN
        Path("cut.tsv" + suffix).write_bytes(data[:-9])
        with pytest.raises(tables.TableError, match=f"cut.tsv{suffix} cannot be decompressed"):
            read("cut.tsv" + suffix)


@pytest.mark.parametrize("suffix", ["xlsx", "ods", "json", "pkl", "dta"])
def test_files_of_other_kinds_say_how_to_convert_them(refused, suffix):
    """Also an Excel file, which is a ZIP archive as an NPZ is."""
    with zipfile.ZipFile(f"a.{suffix}", "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    kind = {"xlsx": "excel", "ods": "excel", "pkl": "pickle", "dta": "stata"}.get(suffix, suffix)
    message = refused("codec", f"a.{suffix}", "--y", "a", "--z", "b")
    assert f"pandas.read_{kind}('a.{suffix}').to_parquet('table.parquet')" in message


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("-0.7%", "take the signs beside the number out first"),
        ("$1", "take the signs beside the number out first"),
        ("17 °", "take the signs beside the number out first"),
        ("2020-01-31", "make it a number first, for instance days since a date"),
        ("31.1.2020 17:00", "make it a number first, for instance days since a date"),
        ("17:05", "make it a number first, for instance days since a date"),
        ("red", "encode categories as numbers first"),
        ("17 apples", "encode categories as numbers first"),
    ],
)
def test_cells_that_are_no_numbers_say_what_to_do(refused, cell, advice):
    path = write("a.csv", f"y,a,b\n1,2,3\n2,{cell},4\n3,1,4\n")
    message = refused("foci", path, "--y", "y")
    assert f"{cell!r} is not a number; {advice}" in message


def test_a_column_is_left_out_in_one_way(refused):
    for cells, what in ((["", "", ""], "missing"), ([2**60 + 1, 2, 3], "apart")):
        rows = "\n".join(f"{k},{cell},4" for k, cell in enumerate(cells))
        message = refused("foci", write("a.csv", f"y,a,b\n{rows}\n"), "--y", "y")
        assert what in message
        assert message.count("leave") == 1


def test_files_without_a_known_suffix(refused):
    for path in ("iris.data", "iris", "iris.v2.all-data"):
        assert read(write(path, "a;b\n1;-2.5\n3e10;.1\n"), delimiter=";") == PLAIN
        with pytest.raises(tables.TableError, match=r"ends in '\.|has no suffix.*--delimiter"):
            read(path)
    np.save("plain.npy", PLAIN)
    Path("plain").write_bytes(Path("plain.npy").read_bytes())
    assert read("plain") == PLAIN, "the first bytes say what it is"
    np.savez("a.npz", a=[1.0])
    Path("book.xlsx").write_bytes(Path("a.npz").read_bytes())
    Path("book.csv").write_bytes(Path("a.npz").read_bytes())
    with pytest.raises(tables.TableError, match="holds no text but a ZIP archive, as .npz and .xl"):
        read("book.csv")


def test_columns_aligned_by_blanks(run):
    text = ' a   b  note\n 1  -2.5\t"a b  c"\r\n3e10\t .1   "d e" \n\n'
    assert read(write("a.data", text), "a", "b", delimiter=" ") == PLAIN
    path = write("b.data", "  0.5  1  2\n 10.25 2  1 \n  7.0  3 10\n")
    status, _, err = run("codec", path, "--y", "0", "--z", "1", "--delimiter", "space")
    assert status == 2
    assert "its columns are '0.5', '1', '2' (no header? pass --no-header)" in err
    command = ["codec", path, "--y", "0", "--z", "1", "--delimiter", "space", "--no-header"]
    assert run(*command)[0] == 0


def test_pipes(run):
    import os
    import threading

    from_pipe = []
    for name, text in (("p", "a,b\n1,-2.5\n3e10,.1\n"), ("p.tsv", "a\tb\n1\t-2.5\n3e10\t.1\n")):
        os.mkfifo(name)
        writer = threading.Thread(target=Path(name).write_text, args=(text,))
        writer.start()
        from_pipe.append(read(name))
        writer.join()
    assert from_pipe == [PLAIN, PLAIN]
    assert "does not exist" in run("codec", "none", "--y", "a", "--z", "b")[2]


def test_dev_stdin_and_compressed_stdin(table, data):
    X, y = data
    import gzip

    plain = Path(table).read_bytes()
    np.savez("a.npz", y=y, x1=X[:, 1])
    expected = f"T(y, x1) = {lcodec_ext.codec(y, X[:, 1]):.6g}   (400 rows)\n"
    Path("table.gz").write_bytes(gzip.compress(plain))
    for path in ("-", "/dev/stdin"):
        command = [sys.executable, "-m", "lcodec_ext", "codec", path, "--y", "y", "--z", "x1"]
        for text in (plain, gzip.compress(plain), Path("a.npz").read_bytes()):
            done = subprocess.run(command, input=text, capture_output=True, check=True)
            assert done.stdout == expected.encode()
        with open("table.gz", "rb") as file:
            again = subprocess.run(command, stdin=file, capture_output=True, check=True)
        assert again.stdout == done.stdout


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "utf-8"]
)
def test_encodings_are_told_apart(encoding):
    text = "a,größe\n1,-2.5\n3e10,.1\n"
    for path, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        Path(path).write_bytes(text.replace(",", delimiter).encode(encoding))
        assert read(path, "a", "größe") == PLAIN
    Path("a.csv").write_bytes("a,b\n1,2\n".encode("utf-16")[:-1])
    with pytest.raises(tables.TableError, match="a.csv is not UTF-16"):
        read("a.csv")


def test_names_with_blanks(run, rng):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {" y": rng.random(50), "sepal length (cm) ": rng.random(50), "b  c": rng.random(50)}
    write_csv("a.csv", list(columns), columns.values())
    write_csv("a.tsv", list(columns), columns.values(), delimiter="\t")
    np.savez("a.npz", **columns)
    parquet.write_table(pa.table(columns), "a.parquet")
    y, first, second = columns.values()
    expected = lcodec_ext.codec(y, np.column_stack([first, second]))
    for path in ("a.csv", "a.tsv", "a.npz", "a.parquet"):
        command = ["codec", path, "--y", " y ", "--z", "sepal length (cm), b  c", "--json"]
        status, out, err = run(*command)
        assert (status, err) == (0, "")
        assert json.loads(out)["T"] == expected
    _, _, err = run("codec", "a.csv", "--y", "sepal", "length", "--z", "y")
    assert "unrecognized arguments: length; a name with blanks needs quotes" in err


def test_numbers_as_other_countries_write_them():
    text = "a;b\n1.234,5;-0,5\n12;1.234.567\n"
    expected = [[1234.5, -0.5], [12, 1234567]]
    options = {"delimiter": ";", "decimal": ",", "thousands": "."}
    assert read(write("a.csv", text), **options) == expected
    text = 'a,b\n"1,234.5",-.5\n12,"1,234,567"\n'
    assert read(write("a.csv", text), thousands=",") == expected
    text = "a\tb\n1'234.5\t-.5\n12\t1'234'567\n"
    assert read(write("a.tsv", text), thousands="'") == expected
    assert read(write("a.csv", "a;b\n1,5;2\n"), delimiter=";", decimal=",") == [[1.5, 2]]
    for cell in ("1.5", "1,234.5", "12.34,5", "1.234.56"):
        with pytest.raises(tables.TableError, match="is not a number"):
            read(write("a.csv", f"a\n7\n{cell}\n"), delimiter=";", decimal=",", thousands=".")
    with pytest.raises(tables.TableError, match=f"{2**53 + 1:,} is beyond"):
        read(write("a.csv", f"a\n{2**53 + 1:,}\n"), delimiter=";", thousands=",")


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("1,5", "or --decimal ,"),
        ("1,234,567", "pass --thousands ,"),
        ("1.234,5", "pass --thousands . --decimal ,"),
        ("1'234", "if it has thousands, pass --thousands"),
        ("?", "if it marks a missing value, pass --na '?'"),
        ("..", "pass --na .."),
        ("unknown", "pass --na unknown"),
        ("red", "encode categories"),
    ],
)
def test_advice_names_the_option(refused, cell, advice):
    path = write("a.csv", f"a;b\n1;2\n{cell};3\n")
    assert advice in refused("codec", path, "--y", "a", "--z", "b", "--delimiter", ";")


def test_markers_of_missing_values(run, refused):
    path = write("a.csv", "y,z\n?,1\n2,-999\n3,-999.0\n4,n.a.\n5,5\n6,7\n7,4\n")
    command = ["codec", path, "--y", "y", "--z", "z"]
    assert "'?' is not a number" in refused(*command)
    message = refused(*command, "--na", "?,-999", "--na", "n.a.")
    assert "row 1, column 'y': a missing value" in message
    assert "4 of 7: missing in z (3), y (1)" in message
    status, out, _ = run(*command, "--na", "?,-999,n.a.", "--nan-policy", "omit")
    assert status == 0
    assert out.endswith("(3 rows; 4 of 7 left out: missing in z (3), y (1))\n")
    message = refused("codec", write("a.npz", ""), "--y", "y", "--z", "z", "--na", "?")
    assert "a.npz: --na is for CSV and TSV files" in message
    assert "--thousands . needs another decimal point" in refused(*command, "--thousands", ".")
    assert "expected one character" in refused(*command, "--decimal", ",.")


def test_a_long_cell_in_an_unused_column():
    text = f"x,note\n1,{'long ' * 700_000}\n2,short\n"
    assert read(write("a.csv", text), "x") == [[1], [2]]
    with pytest.raises(tables.TableError, match="row 1, column 'note': 'long long"):
        read("a.csv")


def test_all_unusable_columns_are_told_at_once(run, refused, rng):
    import pandas as pd

    frame = pd.DataFrame({"y": rng.random(60), "x": rng.random(60)})
    frame["maker"], frame["big, type"], frame["empty"] = "Acura", ["a", "b"] * 30, np.nan
    frame["id"] = 2**53 + 1 + 2 * np.arange(60)
    unusable = ["maker", "big, type", "empty", "id"]
    frame.to_csv("a.csv", index=False)
    frame.to_parquet("a.parquet")
    arrays = {name: frame[name].to_numpy() for name in ("y", "x", "empty")}
    arrays |= {"maker": np.array([None]), "id": np.zeros((2, 2, 2)), "big, type": ["a"]}
    np.savez("a.npz", **arrays)
    for path in ("a.csv", "a.parquet", "a.npz"):
        message = refused("foci", path, "--y", "y")
        assert "4 columns cannot be used" in message
        exclude = re.search("--exclude '(.*)'", message)[1]
        for name in unusable:
            assert repr(name) in message
        assert run("foci", path, "--y", "y", "--exclude", exclude)[0] == 0
        status, out, err = run("foci", path, "--y", "y", "--numeric-only", "--json")
        assert (status, sorted(json.loads(out)["left_out"])) == (0, sorted(unusable))
        assert "--numeric-only leaves out 4 columns" in err
        assert json.loads(out)["n_features"] == 1
        assert "column 'id'" in refused("foci", path, "--y", "id", "--numeric-only")
        message = refused("foci", path, "--y", "y", "--preselected", "empty", "--numeric-only")
        assert "column 'empty' is empty: all its values are missing" in message
        _, _, err = run("foci", path, "--y", "y", "--columns", "empty,id", "--numeric-only")
        assert "no candidate is left" in err
        assert run("codec", path, "--y", "y", "--z", "x")[0] == 0, "they are not used"
        message = refused("codec", path, "--y", "y", "--z", "empty", "--nan-policy", "omit")
        assert "column 'empty' is empty" in message
    assert "'maker' (row 1: 'Acura' is not a number)" in refused("foci", "a.csv", "--y", "y")


def test_text_in_y_is_classes(run, refused, rng):
    import pandas as pd

    x = rng.random(90)
    kind = np.array(["ant", "bee", "cow"])[(3 * x).astype(int)]
    frame = pd.DataFrame({"x": x, "kind": kind, "code": (3 * x).astype(int)})
    frame.to_csv("a.csv", index=False)
    frame.to_csv("a.tsv", index=False, sep="\t", quoting=csv.QUOTE_NONNUMERIC)
    frame.to_parquet("text.parquet")
    frame.astype({"kind": "category"}).to_parquet("a.parquet")
    np.savez("a.npz", x=x, kind=kind)
    expected = lcodec_ext.codec(kind, x)
    assert expected != lcodec_ext.codec(frame["code"], x)
    for path in ("a.csv", "a.tsv", "a.parquet", "text.parquet", "a.npz"):
        status, out, err = run("codec", path, "--y", "kind", "--z", "x", "--json")
        assert (status, json.loads(out)["T"]) == (0, expected)
        assert json.loads(out)["classes"] == ["ant", "bee", "cow"]
        assert err == "kind holds 3 classes without an order: ant, bee, cow\n"
        assert "column 'kind'" in refused("codec", path, "--y", "x", "--z", "kind")
        _, out, _ = run("foci", path, "--y", "kind", "--columns", "x", "--json")
        assert json.loads(out)["selected"][0]["T"] == expected
    command = ["codec", "a.csv", "--y", "code", "--z", "x", "--json"]
    assert json.loads(run(*command)[1])["T"] == lcodec_ext.codec(frame["code"], x)
    status, out, err = run(*command, "--classes")
    assert json.loads(out)["T"] == expected
    assert err == "code holds 3 classes without an order: 0, 1, 2\n"


def test_missing_labels(run, refused):
    text = "kind,x\n" + "".join(f"{'ab'[k % 2]},{k % 7}\n" for k in range(20))
    path = write("a.csv", text + "NA,3\n,4\n ? ,5\n")
    command = ["codec", path, "--y", "kind", "--z", "x"]
    assert "row 21, column 'kind': a missing value" in refused(*command)
    _, out, _ = run(*command, "--nan-policy", "omit", "--na", "?", "--json")
    found = json.loads(out)
    assert (found["classes"], found["n_samples"], found["n_omitted"]) == (["a", "b"], 20, 3)
    _, out, err = run(*command, "--nan-policy", "omit", "--json")
    assert "3 classes without an order: ?, a, b" in err


def test_a_typo_among_numbers_makes_no_classes(refused):
    path = write("a.csv", "y,x\n1,1\n2,2\n?,3\n1,4\n2,5\n")
    assert "row 3, column 'y': '?' is not a number" in refused(
        "codec", path, "--y", "y", "--z", "x"
    )


def test_the_index_of_a_pandas_frame_is_no_candidate(run, rng):
    import pandas as pd

    frame = pd.DataFrame({"x": rng.random(80), "y": rng.random(80), "t": rng.random(80)})
    frame[frame["x"] > 0.2].to_parquet("filtered.parquet")
    frame.set_index("t").to_parquet("named.parquet")
    frame.set_index(["t", "x"]).to_parquet("two.parquet")
    frame.to_parquet("range.parquet")
    for path, index in (
        ("filtered.parquet", ["__index_level_0__"]),
        ("named.parquet", ["t"]),
        ("range.parquet", []),
    ):
        status, out, err = run("foci", path, "--y", "y", "--no-stop", "--json")
        names = {"x", "t"}.difference(index)
        assert (status, {s["column"] for s in json.loads(out)["selected"]}) == (0, names)
        for name in index:
            assert f"not a candidate: '{name}', the index of the pandas frame" in err
            assert run("codec", path, "--y", "y", "--z", name)[0] == 0, "it can be named"
            _, out, _ = run("foci", path, "--y", "y", "--columns", name, "--no-stop", "--json")
            assert json.loads(out)["selected"][0]["column"] == name
    assert "no candidate is left" in run("foci", "two.parquet", "--y", "y")[2]


@pytest.mark.parametrize("name", ["Unnamed: 0", "__index_level_0__", ""])
def test_row_numbers_of_pandas_are_pointed_out(run, rng, name):
    path = write_csv("a.csv", [name, "a", "y"], [range(60), rng.random(60), rng.random(60)])
    _, _, err = run("foci", path, "--y", "y")
    shown = name or "column 0"
    assert f"{shown} has no name in the header" in err
    assert run("foci", path, "--y", "y", "--exclude", shown)[2] == ""


def test_reading_is_linear_in_columns(rng):
    """Twenty times the columns take about twenty times as long; quadratic would be 400 times."""
    import time

    seconds = []
    for p in (5_000, 100_000):
        names = ",".join(f"a-long-name-{k}" for k in range(p))
        row = ",".join(map(str, range(p)))
        write("wide.csv", f"{names}\n{row}\n{row}\n")
        start = time.process_time()
        table = tables.read_table("wide.csv", lambda known: known)
        seconds.append(time.process_time() - start)
        assert table.to_numpy().tolist() == [list(range(p))] * 2
    assert seconds[1] < 100 * seconds[0]


# ---------------------------------------------------------------------------------------------
# bench


def test_bench_times_and_checks(run):
    command = ["bench", "--cases", "neighbors,masked_product", "--repeats", "2"]
    status, out, err = run(*command, "--json", "--output", "b.json", "--threads", "1")
    assert status == 0
    assert err.splitlines() == ["neighbors ...", "masked_product ...", "wrote b.json"]
    found = json.loads(out)
    assert found == json.loads(Path("b.json").read_text(encoding="utf-8"))
    assert list(found["cases"]) == ["neighbors", "masked_product"]
    for case in found["cases"].values():
        assert case["right"]
        assert len(case["samples"]) == 2
        assert case["median_seconds"] > 0
    assert (found["threads"], found["repeats"]) == (1, 2)
    assert found["machine"]["cores"] >= 1


def test_bench_answers(simd_level, threads):
    for name in ("foci", "codec"):
        assert bench.measure(bench.CASES[name], 1)["right"], name


def test_bench_fails_on_a_wrong_answer(run, monkeypatch):
    wrong = bench.CASES["neighbors"]._replace(answer="0")
    monkeypatch.setattr(bench, "CASES", {"neighbors": wrong})
    status, out, err = run("bench", "--repeats", "1", "--quiet")
    assert status == 1
    assert "WRONG ANSWER" in out
    assert "warning: the answer of neighbors" in err


def test_bench_leaves_out_what_it_cannot_run(run, refused, monkeypatch):
    case = bench.CASES["masked_product"]._replace(needs="no_such_package")
    monkeypatch.setattr(bench, "CASES", {"masked_product": case})
    status, out, _ = run("bench", "--json", "--quiet")
    found = json.loads(out)
    assert (status, found["cases"]) == (0, {})
    assert found["left_out"] == {"masked_product": "needs no_such_package"}
    assert "left out  masked_product" in run("bench", "--quiet")[1]
    assert "--cases names 'xi'; expected some of masked_product" in refused(
        "bench", "--cases", "xi"
    )


# ---------------------------------------------------------------------------------------------
# Import paths


def test_import_paths(here, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (here / "parts").mkdir()
    write("parts/own_models.py", "import own_helper\nclass A:\n    made = own_helper.made\n")
    write("parts/own_helper.py", "count = 0\ndef made():\n    return 7\n")
    write("own_module.py", "def build():\n    return 'built'\nnumber = 3\n")
    assert call("parts/own_models.py:A.made", "--model") == 7
    assert call("own_module:build", "--model") == "built"
    assert load_object("own_module:number", "--model") == 3
    # One file is one module, however it is named.
    first = load_object("parts/own_models.py:A", "--model")
    assert load_object(f"{here}/parts/../parts/own_models.py:A", "--data") is first
    assert load_object("own_helper:made", "--data") is first.__dict__["made"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_broken", "--model must be package.module:name or path/to/file.py:name; got"),
        (":build", "got ':build'"),
        ("no_such.py:build", "--model: no_such.py does not exist"),
        ("no_such_module:build", "no module named 'no_such_module'"),
        ("own_fine.py:bild", "own_fine.py has no 'bild'; it defines build, fail"),
        ("own_fine.py:number", "must lead to a callable; own_fine.py:number is of type int"),
        ("own_fine.py:fail", r"own_fine.py:fail\(\) raised KeyError: 'x'"),
        ("own_import.py:build", "importing own_import.py raised ModuleNotFoundError: .*'nothing_'"),
        ("own_syntax.py:build", "importing own_syntax.py raised SyntaxError"),
        ("own_text.txt/:build", "does not exist"),
    ],
)
def test_import_paths_that_fail(monkeypatch, path, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write(
        "own_fine.py", "def build():\n    return 1\ndef fail():\n    return {}['x']\nnumber = 3\n"
    )
    write("own_import.py", "import nothing_\n")
    write("own_syntax.py", "def build(:\n")
    with pytest.raises(ImportPathError, match=message):
        call(path, "--model")
    assert "own_syntax" not in sys.modules


# ---------------------------------------------------------------------------------------------
# The guide


def test_shell_examples_of_the_guide(run, rng):
    X = rng.normal(size=(300, 3))
    names = ["age", "income", "region", "target"]
    write_csv("table.csv", names, [*X.T.tolist(), (X[:, 0] * X[:, 1]).tolist()])
    np.savez("data.npz", X=X, y=X[:, 0])
    text = GUIDE.read_text(encoding="utf-8")
    commands = re.findall(
        r"^lcodec-ext (?:info|codec|foci|xi|graph) .*$|^lcodec-ext info$", text, re.M
    )
    assert len(commands) >= 5
    n_shown = 0
    for command in commands:
        words = re.sub(r"\s+#.*", "", command).split()[1:]
        status, out, err = run(*words)
        assert (status, err.count("error")) == (0, 0), (command, err)
        if f"$ {command}\n" in text:
            shown = text.partition(f"$ {command}\n")[2].partition("```")[0]
            assert out == shown
            n_shown += 1
    assert n_shown == 1
