"""A selection that is interrupted goes on to the same bits."""

import json

import numpy as np
import pytest

import lcodec_ext
from lcodec_ext.dependence.backends.block_table import BlockTable
from lcodec_ext.dependence.backends.cpu import CpuEngine
from lcodec_ext.dependence.candidates import Candidates
from test_foci_group import assert_same, select, shards_of


class Interruption(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """Stops a selection when its step number `at` is scored, from 0 on."""
    score, steps = CpuEngine.score, []

    def begin(at):
        steps.clear()

        def counted(self, *arguments):
            steps.append(0)
            if len(steps) > at:
                raise Interruption
            return score(self, *arguments)

        monkeypatch.setattr(CpuEngine, "score", counted)
        return steps

    return begin


@pytest.fixture
def problem(rng):
    X = rng.integers(0, 5, (120, 8)).astype(float)
    return X, X[:, 1] * X[:, 4] + X[:, 6] + rng.normal(size=120)


@pytest.mark.filterwarnings("ignore:y follows the selected columns")
@pytest.mark.parametrize(
    "options",
    [
        {"stop": False},
        {"preselected": [3], "min_gain": 0.001},
        {"ties": "random"},  # of a seed that is drawn
        {"stop": "permutation", "n_permutations": 39, "alpha": 0.5},
    ],
)
def test_resumed_to_the_same_bits(problem, interrupt, tmp_path, options):
    X, y = problem
    path = tmp_path / "selection.json"
    interrupt(2)
    with pytest.raises(Interruption):
        lcodec_ext.foci(X, y, checkpoint=path, **options)
    assert len(json.loads(path.read_text())["steps"]) == 2
    steps = interrupt(100)
    resumed = lcodec_ext.foci(X, y, checkpoint=path, **options)
    assert_same(resumed, lcodec_ext.foci(X, y, **{**options, "seed": resumed.seed}))
    assert len(resumed.ordering) > 2
    steps.clear()
    assert_same(lcodec_ext.foci(X, y, checkpoint=str(path), **options), resumed)
    assert not steps  # it had ended
    assert list(tmp_path.iterdir()) == [path]


def test_several_responses_and_classes(problem, interrupt, tmp_path):
    X, y = problem
    for k, response in enumerate((np.column_stack([y, X[:, 0]]), np.where(y > 5, "high", "low"))):
        path = tmp_path / f"{k}.json"
        interrupt(4)
        with pytest.raises(Interruption):
            lcodec_ext.foci(X, response, checkpoint=path, stop=False)
        interrupt(1000)
        resumed = lcodec_ext.foci(X, response, checkpoint=path, stop=False)
        assert_same(resumed, lcodec_ext.foci(X, response, stop=False))


def test_another_selection_is_refused(problem, tmp_path):
    X, y = problem
    path = tmp_path / "selection.json"
    options = {"max_features": 2, "seed": 1, "ties": "random"}
    lcodec_ext.foci(X, y, checkpoint=path, **options)
    other = X.copy()
    other[5, 2] += 0.5
    for X_, y_, changed, said in [
        (other, y, {}, "its X is '120 rows and 8 columns of float64, digest"),
        (X[:, ::-1], y, {}, "its X is "),
        (X, y[::-1], {}, "its y is "),
        (X, y, {"seed": 2}, "its seed is 1, and that of this call is 2"),
        (X, y, {"standardize": None}, "its standardize is 'scale', and that of this call is None"),
        (X, y, {"preselected": [1]}, r"its preselected is \[\], and that of this call is \[1\]"),
    ]:
        with pytest.raises(ValueError, match=said):
            lcodec_ext.foci(X_, y_, checkpoint=path, **{**options, **changed})
    saved = json.loads(path.read_text())
    lacking = [json.dumps({k: v for k, v in saved.items() if k != name}) for name in saved]
    lacking += [json.dumps(saved | {name: None}) for name in ("steps", "tests", "m")]
    lacking += [json.dumps(saved | {"steps": [[1, 2]]}), json.dumps(saved | {"m": "1/0"})]
    for text in ("", "{}", "[1]", "null", '{"format": 2, "of": {}}', "no JSON", *lacking):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a checkpoint that this version can read"):
            lcodec_ext.foci(X, y, checkpoint=path, **options)
    path.write_text(json.dumps(saved | {"of": saved["of"] | {"lcodec_ext": "0.0.9"}}))
    with pytest.raises(ValueError, match="its lcodec_ext is '0.0.9', and that of this call is"):
        lcodec_ext.foci(X, y, checkpoint=path, **options)


@pytest.mark.parametrize("standardize", ["scale", "bounded", None])
@pytest.mark.parametrize("kind", ["bits", "rows", "interior", "columns", "float32"])
def test_all_values_are_compared(rng, tmp_path, monkeypatch, standardize, kind):
    """Those that keep range and deviation, too."""
    X = rng.integers(0, 2, (120, 8)).astype(float)
    other = np.ascontiguousarray(rng.permuted(X, axis=0))
    if kind == "rows":
        X = rng.normal(size=(120, 8))
        other = X.copy()
        other[[3, 4]] = X[[4, 3]]
    elif kind in ("interior", "float32"):
        X = rng.normal(size=(120, 8))
        X[:, 2] = np.arange(120)
        other = X.copy()
        other[[50, 60], 2] = 51, 59  # the same sum; of squares another
        if kind == "float32":
            X, other = X.astype(np.float32), other.astype(np.float32)
    elif kind == "columns":
        other = X[:, [1, 0, *range(2, 8)]]
    y = X[:, 1] + 2 * X[:, 4] + X[:, 6]
    options = {"standardize": standardize, "checkpoint": tmp_path / "selection.json"}
    options["stop"] = False
    found = lcodec_ext.foci(X, y, **options, max_features=3)
    for width in (None, 3):
        if width:
            monkeypatch.setattr(BlockTable, "width", width)
        with pytest.raises(ValueError, match="its X is '120 rows and 8 columns of float"):
            lcodec_ext.foci(other, y, **options, max_features=3, max_memory=1 << 30)
        same = lcodec_ext.foci(X.copy("F"), y, **options, max_features=3, max_memory=1 << 30)
        assert_same(same, found)


def test_a_cap_may_change(problem, tmp_path, monkeypatch):
    X, y = problem
    path = tmp_path / "selection.json"
    whole = lcodec_ext.foci(X, y, stop=False, max_features=4)
    for cap in (2, 4, 3, 1, 4):
        found = lcodec_ext.foci(X, y, stop=False, max_features=cap, checkpoint=path)
        assert found.ordering.tolist() == whole.ordering[:cap].tolist()
        assert found.cumulative.tolist() == whole.cumulative[:cap].tolist()
        assert found.stop_reason == "max_features"
    monkeypatch.setattr(Candidates, "best", None)  # nothing is searched for
    found = lcodec_ext.foci(X, y, stop=False, max_features=4, checkpoint=path)
    assert found.ordering.tolist() == whole.ordering.tolist()


def test_paths(problem, tmp_path):
    X, y = problem
    with pytest.raises(IsADirectoryError, match="is a folder"):
        lcodec_ext.foci(X, y, checkpoint=tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        lcodec_ext.foci(X, y, checkpoint=tmp_path / "missing" / "selection.json")
    with pytest.raises(TypeError, match="path must be a string or a path; got int"):
        lcodec_ext.foci(X, y, checkpoint=3)


def begun(rank, size, group, shards, y, path, at):
    score, steps = CpuEngine.score, []

    def counted(self, *arguments):
        steps.append(0)
        if rank == size - 1 and len(steps) > at:
            raise Interruption
        return score(self, *arguments)

    CpuEngine.score = counted
    try:
        return select(rank, size, group, "foci", shards, y, {"checkpoint": path, "stop": False})
    finally:
        CpuEngine.score = score


def test_with_another_number_of_processes(ranks, problem, tmp_path):
    """What some processes began, one goes on with, or as many."""
    X, y = problem
    path = str(tmp_path / "selection.json")
    shards = shards_of(X, [3, 6][: ranks.size - 1])
    for failure in ranks.failures(begun, shards, y, path, 3):
        assert "Interruption" in failure.trace or "scoring the columns failed" in failure.message
    kept = json.loads((tmp_path / "selection.json").read_text())
    assert len(kept["steps"]) == 3
    expected = lcodec_ext.foci(X, y, stop=False)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(kept))
    assert_same(lcodec_ext.foci(X, y, stop=False, checkpoint=other), expected)
    for found in ranks.run(begun, shards, y, path, 100):
        assert_same(found, expected)


def test_a_file_that_cannot_be_written_ends_all(ranks, problem, tmp_path):
    X, y = problem
    path = str(tmp_path / "missing" / "selection.json")
    for failure in ranks.failures(begun, shards_of(X, [3, 6][: ranks.size - 1]), y, path, 100):
        assert "make it first" in failure.message
