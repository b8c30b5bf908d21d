"""foci and lfoci over a process group: the same results as of one process."""

import dataclasses
import importlib
import os
import signal
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import _emulated
from lcodec_ext._torch import group as talking
from processes import Failure, Group, Processes


def shards_of(X, ends):
    return [X[:, a:b] for a, b in zip([0, *ends], [*ends, X.shape[1]], strict=True)]


def select(rank, size, group, function, shards, y, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(lcodec_ext, function)(shards[rank], y, group=group, **options)


def alone(function, X, y, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(lcodec_ext, function)(X, y, **options)


def assert_same(a, b):
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert type(one) is type(other), field.name
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name


def ends_of(p, size):
    """Uneven shards, one of which is empty where there are three."""
    return [[p // 3], [p // 3, p // 3]][size - 2]


def compare(ranks, X, y, options, function="foci", ends=None):
    expected = alone(function, X, y, options)
    shards = shards_of(X, ends or ends_of(X.shape[1], ranks.size))
    for found in ranks.run(select, function, shards, y, options):
        assert_same(found, expected)
    return expected


@pytest.fixture
def tied(rng):
    X = rng.integers(0, 4, size=(120, 9)).astype(float)
    y = X[:, 1] + 2 * (X[:, 4] > 1) + X[:, 7] + rng.integers(0, 2, 120)
    X[:, 8] = X[:, 4]  # equal columns on different ranks: the lower index wins
    X[:, 6] = 3.0
    return X, y


@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ties(ranks, tied, ties, backend):
    X, y = tied
    options = {"ties": ties, "seed": 3, "backend": backend, "max_features": 3}
    assert len(compare(ranks, X, y, options).ordering)


def select_on_kernels(rank, size, group, shards, y, options):
    options = {**options, "backend": cuda_on_cpu(_emulated.cuda)}
    X, y = (torch.from_numpy(np.ascontiguousarray(each)) for each in (shards[rank], y))
    return select(rank, size, group, "foci", [X] * size, y, options)


def test_emulated_cuda_kernels(ranks, tied, rng):
    """An engine on CUDA is made again for a column of another rank."""
    X, y = tied
    X[5, 7] = np.nan
    for table, options in [
        (X[:60], {"nan_policy": "omit", "preselected": [7], "max_features": 2}),
        (X[:60].astype(np.float32), {"nan_policy": "omit", "ties": "random", "seed": 2}),
        (rng.normal(size=(12, 30)), {"stop": False}),
        (X[:40, :5], {"stop": "permutation", "n_permutations": 19, "seed": 0, "preselected": [4]}),
    ]:
        expected = alone("foci", table, y[: len(table)], options)
        shards = shards_of(table, ends_of(table.shape[1], ranks.size))
        for found in ranks.run(select_on_kernels, shards, y[: len(table)], options):
            assert_same(found, expected)


def test_uneven_and_empty_shards(processes, rng):
    X = rng.normal(size=(80, 7))
    y = X[:, 2] * X[:, 5] + X[:, 6]
    for ends in ([0, 0], [0, 7], [7, 7], [1, 6]):
        compare(Group(processes, 3), X, y, {"stop": False}, ends=ends)


def test_more_columns_than_places(ranks, rng):
    """The table is laid out again with room for more columns of other ranks, twice."""
    X = rng.normal(size=(60, 60)).astype(np.float32)
    y = X @ rng.normal(size=60)
    result = compare(ranks, X, y, {"stop": False, "max_features": 55})
    assert result.stop_reason == "max_features"
    q = X[:, :25]
    response = np.column_stack([y, y**2])
    options = {"stop": False, "standardize": "bounded", "y_order": "average"}
    compare(ranks, q, response, options, ends=[25, 25][: ranks.size - 1])


@pytest.mark.parametrize(
    "options",
    [
        {"standardize": "bounded", "min_gain": 0.02},
        {"standardize": None, "preselected": [6, 0]},
        {"n_neighbors": 3, "max_features": 2},
        {"decimals": 2, "preselected": [8]},
        {"progress": True, "max_features": 2},
    ],
)
def test_options(ranks, rng, options):
    X = rng.normal(size=(90, 9)).round(2)
    y = X[:, 0] + X[:, 4] * X[:, 8]
    assert len(compare(ranks, X, y, options).ordering)


def test_kinds_of_responses(ranks, tied):
    X, y = tied
    classes = np.array(["a", "b", "c"])[np.searchsorted(np.quantile(y, [0.3, 0.6]), y)]
    for response, options in [
        (classes, {"max_features": 3}),
        (np.column_stack([y, X[:, 1]]), {"max_features": 3}),
        (np.column_stack([y, X[:, 1]]), {"max_features": 2, "y_order": "average", "decimals": 0}),
        (np.zeros(len(y)), {}),
        (X[:, 1] + 4 * X[:, 4], {"stop": False}),  # a function of two columns
    ]:
        compare(ranks, X, response, options)


def test_permutations(ranks, rng):
    X = rng.normal(size=(150, 7))
    X[:, 3] = rng.integers(0, 3, 150)
    y = X[:, 3] + np.sin(X[:, 5])
    for options in ({}, {"preselected": [5]}, {"ties": "random"}):
        options |= {"stop": "permutation", "n_permutations": 39, "seed": 7, "alpha": 0.1}
        assert len(compare(ranks, X, y, options).pvalues)
    classes = np.where(y > 1, "high", "low")
    compare(ranks, X, classes, {"stop": "permutation", "n_permutations": 39, "seed": 7})


def test_a_drawn_seed_is_that_of_the_first_rank(ranks, tied):
    X, y = tied
    shards = shards_of(X, ends_of(9, ranks.size))
    first, *others = ranks.run(select, "foci", shards, y, {"ties": "random"})
    for other in others:
        assert_same(first, other)
    assert_same(alone("foci", X, y, {"ties": "random", "seed": first.seed}), first)


def test_names_and_missing_values(ranks, rng):
    X = rng.normal(size=(100, 6))
    y = X[:, 1] * X[:, 4]
    X[3, 0] = X[50, 4] = X[51, 4] = X[3, 5] = np.nan
    y[7] = np.nan
    frame = pd.DataFrame(X, columns=[f"c{k}" for k in range(6)])
    options = {"nan_policy": "omit", "preselected": ["c5"]}
    expected = alone("foci", frame, y, options)
    assert expected.missing == {
        "column 'c0' (index 0) of X": 1,
        "column 'c4' (index 4) of X": 2,
        "column 'c5' (index 5) of X": 1,
        "y": 1,
    }
    ends = ends_of(6, ranks.size)
    shards = [frame.iloc[:, a:b] for a, b in zip([0, *ends], [*ends, 6], strict=True)]
    for found in ranks.run(select, "foci", shards, y, options):
        assert_same(found, expected)
        assert list(found.missing) == list(expected.missing)
    compare(ranks, X, y, {"nan_policy": "omit"})


@pytest.mark.parametrize(
    "options",
    [{}, {"noise": 0.1, "noise_scale": "relative", "seed": 4}, {"noise": 0}, {"ties": "random"}],
)
def test_lfoci(ranks, tied, options):
    X, y = tied
    compare(ranks, X, y, {"max_features": 3, **options}, "lfoci")


def fail(rank, size, group, shards, ys, every):
    select(rank, size, group, "foci", shards, ys[rank], every[rank])


def refused(ranks, X, y, said, options=None, kind="ValueError"):
    """What is said on every rank where X, y or options of a rank are those given here."""
    size = ranks.size
    X, y, options = (
        [each] * size if not isinstance(each, list) else each for each in (X, y, options or {})
    )
    failures = ranks.failures(fail, X, y, options)
    for failure in failures:
        assert said in failure.message
    assert failures[-1].kind == kind


def test_differences_are_named(ranks, rng):
    size = ranks.size
    X = rng.normal(size=(30, 3))
    y = X[:, 0]
    other = [*[X] * (size - 1), X[:29]]
    refused(ranks, other, y, f"the same number of rows of X: rank 0 has 30, rank {size - 1} has 29")
    other = [*[X] * (size - 1), X.astype(np.float32)]
    said = f"the same dtype on all ranks that have columns: rank 0 has float64, rank {size - 1}"
    refused(ranks, other, y, said)
    other = [*[X] * (size - 1), pd.DataFrame(X, columns=list("abc"))]
    said = f"rank 0 has no names, rank {size - 1} has names"
    refused(ranks, other, y, said)
    refused(ranks, X, [*[y] * (size - 1), -y], "foci with the same y: rank 0 has float64")
    options = [*[{}] * (size - 1), {"stop": False}]
    refused(ranks, X, y, f"the same stop: rank 0 has True, rank {size - 1} has False", options)
    refused(ranks, X[:, :0], y, "X must have at least one column on some rank")
    refused(ranks, X, y, "preselected columns must be in 0 .. ", {"preselected": [3 * size]})


def test_a_failure_of_one_rank_ends_all(ranks, rng):
    size = ranks.size
    X = rng.normal(size=(30, 3))
    y = X[:, 0]
    bad = X.copy()
    bad[4, 1] = np.inf
    k = 3 * (size - 1) + 1
    said = f"infinite values are not allowed; got X at row 4, column {k}"
    refused(ranks, [*[X] * (size - 1), bad], y, said)
    bad[4, 1] = 1e200
    said = f"squared distances overflow float64 with column {k} of X"
    refused(ranks, [*[X] * (size - 1), bad], y, said, {"standardize": None})
    options = [*[{"max_features": 2}] * (size - 1), {"max_features": 0}]
    refused(ranks, X, y, "max_features must be an integer >= 1", options)


def fail_alone(rank, size, group, shards, y, where):
    """One rank lacks memory, or makes errors of warnings."""
    options = {}
    if rank == size - 1 and where == "rows":

        def lacking(*arguments, **options):
            raise MemoryError("no memory for the rows")

        options = {"clean_rows": lacking}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        for name, value in options.items():
            patch.setattr(importlib.import_module("lcodec_ext.dependence.foci"), name, value)
        warnings.simplefilter("ignore")
        if rank == size - 1 and where == "warning":
            warnings.filterwarnings("error", "y is a function")
        lcodec_ext.foci(shards[rank], y, stop=False, nan_policy="omit", group=group)


@pytest.mark.parametrize(
    ("where", "said"), [("rows", "no memory for the rows"), ("warning", "y is a function of the")]
)
def test_what_fails_on_one_rank_alone_ends_all(rng, where, said):
    X = rng.integers(0, 2, (60, 4)).astype(float)
    y = X[:, 1] + 2 * X[:, 3]
    processes = Processes(2, timeout=20)
    try:
        for failure in processes.failures(fail_alone, shards_of(X, [2]), y, where):
            assert said in failure.message
            assert "stopped answering" not in failure.message
    finally:
        processes.stop()


def messages(rank, size, group, shards, y, options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            lcodec_ext.foci(shards[rank], y, group=group, **options)
        except ValueError as error:
            return [str(error)]
    return [str(each.message) for each in caught]


def test_columns_of_y_have_their_names_in_messages(ranks, rng):
    X, y = rng.normal(size=(40, 7)), rng.normal(size=(40, 3))
    for scale in (1e-320, 1e-156):  # no factor, and squares that lose digits
        for column in (0, 1):
            spoilt = y.copy()
            spoilt[:, column] *= scale
            frame = pd.DataFrame(spoilt, columns=["one", "two", "three"])
            for given in (spoilt, frame):
                options = {"standardize": "scale" if scale < 1e-300 else None, "max_features": 1}
                expected = messages(0, 1, None, [X], given, options)
                assert "of y" in expected[0]
                for found in ranks.run(
                    messages, shards_of(X, ends_of(7, ranks.size)), given, options
                ):
                    assert found == expected
    wide = pd.DataFrame(y * [1, 1e200, 1], columns=["one", "two", "three"])
    expected = messages(0, 1, None, [X], wide, {"standardize": None})
    assert "'two' (index 1) of y" in expected[0]
    for found in ranks.run(
        messages, shards_of(X, ends_of(7, ranks.size)), wide, {"standardize": None}
    ):
        assert found == expected


def die_midway(rank, size, group, shards, y):
    engine = lcodec_ext.dependence.backends.cpu.CpuEngine
    score, steps = engine.score, []

    def dying(self, *arguments):
        steps.append(0)
        if rank == 1 and len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, *arguments)

    engine.score = dying
    lcodec_ext.foci(shards[rank], y, stop=False, group=group)


def test_a_rank_killed_midway_ends_the_others(rng):
    X = rng.normal(size=(50, 8))
    processes = Processes(2, timeout=10)
    try:
        begin = time.monotonic()
        processes.start(die_midway, shards_of(X, [4]), X[:, 0])
        survivor, dead = processes.finish()
        assert time.monotonic() - begin < 60
        assert isinstance(survivor, Failure)
        assert "foci: a rank of the group stopped answering rank 0" in survivor.message
        assert dead.kind == "died"
    finally:
        processes.stop()


def bytes_of_steps(rank, size, group, shards, y):
    """What the selection of one more column sends."""
    made = []

    class Counted(talking.Ranks):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    kept, talking.Ranks = talking.Ranks, Counted
    try:
        for steps in (3, 4, 6):
            lcodec_ext.foci(shards[rank], y, stop=False, max_features=steps, group=group)
    finally:
        talking.Ranks = kept
    a, b, c = (each.bytes_sent for each in made)
    assert c - b == 2 * (b - a)
    return b - a


def test_bytes_of_a_step_are_those_of_the_guide(ranks, rng):
    """And of the docstring: 32 and n + 1 numbers."""
    X = rng.normal(size=(70, 8))
    for dtype, s in ((np.float32, 4), (np.float64, 8)):
        shards = shards_of(X.astype(dtype), ends_of(8, ranks.size))
        assert ranks.run(bytes_of_steps, shards, X[:, 3]) == [32 + 71 * s] * ranks.size


def told(rank, size, group, shards, y):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lcodec_ext.foci(shards[rank], y, group=group, max_features=1)
    return [str(each.message) for each in caught]


def test_ranks_with_the_same_columns_are_warned(ranks, rng):
    X, y = rng.normal(size=(40, 4)), rng.normal(size=40)
    said = "ranks 0 and 1 of the group have the same columns of X, which count twice"
    for caught in ranks.run(told, [X] * ranks.size, y):
        assert len(caught) == 1
        assert said in caught[0]
    assert ranks.run(told, shards_of(X, ends_of(4, ranks.size)), y) == [[]] * ranks.size


def test_a_world_without_a_group_is_warned_of(monkeypatch, rng):
    X, y = rng.normal(size=(40, 4)), rng.normal(size=40)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torch.distributed.group.WORLD is None
    with pytest.warns(UserWarning, match="WORLD_SIZE is 2, and there is no process group"):
        lcodec_ext.foci(X, y, group=torch.distributed.group.WORLD)
    monkeypatch.setenv("WORLD_SIZE", "1")
    lcodec_ext.foci(X, y, group=torch.distributed.group.WORLD)
