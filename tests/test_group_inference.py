"""codec_test, dependence_graph and stability over a process group give what one process does."""

import dataclasses
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from lcodec_ext import codec_test, dependence_graph, stability
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext.dependence.backends.cpu import CpuBackend

GOLDEN = Path(__file__).parent / "data" / "golden"
TIES = ["average", "random", "first"]


def plain(value):
    """A result as what == compares, all bits of it."""
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def told(function, *arguments, **options):
    """What a call returns and warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = plain(function(*arguments, **options))
    return result, [str(each.message) for each in said]


def on_rank(rank, size, group, name, case):
    function, arguments, options = {"test": a_test, "graph": a_graph, "halves": halves}[name](case)
    return told(function, *arguments, **options, group=group)


def same_as_one_process(ranks, name, make, case):
    function, arguments, options = make(case)
    expected = told(function, *arguments, **options)
    assert ranks.run(on_rank, name, case) == [expected] * ranks.size


def golden(name):
    table = np.loadtxt(GOLDEN / f"{name}.csv", delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1]


# ---------------------------------------------------------------------------------------------
# codec_test


def _tests():
    rng = np.random.default_rng(5)
    y, z, few = rng.normal(size=50), rng.normal(size=(50, 2)), rng.integers(0, 4, (50, 3)) * 1.0
    letters = np.array(list("abc"))[rng.integers(0, 3, 50)]
    by_x = {"n_permutations": 20, "confidence_level": None}
    cases = {
        "continuous": ((y, z), {}),
        "one permutation": ((y, z), {"n_permutations": 1}),
        "classes": ((letters, few[:, 0]), {"n_permutations": 30}),
        "constant y": ((np.ones(30), z[:30]), {"n_permutations": 5}),
        "few rows": ((y[:5], z[:5]), {"n_permutations": 40}),
        "asymptotic": ((y, z), {"method": "asymptotic"}),
        "the limit is skewed": ((few[:, 1], few[:, 0]), {"method": "asymptotic"}),
        "given x": ((y, z[:, 0], z[:, 1]), {"n_permutations": 40}),
        "two columns given x": ((y, few[:, :2], few[:, 2]), by_x),
        "two permutations given x": ((y, z[:, 0], few), {"n_permutations": 2}),
        "classes given x": ((letters, few[:, 0], z[:, 0]), by_x),
        "x determines y": ((few[:, 0], z[:, 0], few[:, 0]), {"n_permutations": 9}),
        "blocks of 4": ((y, y + z[:, 0], z[:, 1]), {**by_x, "k_perm": 4}),
    }
    for ties in TIES:
        options = {"ties": ties, "n_permutations": 25}
        cases[f"ties {ties}"] = ((few[:, 0], few[:, 1:]), options)
        cases[f"ties {ties} given x"] = ((few[:, 0], few[:, 1], few[:, 2]), options)
    for name in ("t05_pairs_n200", "t07_mixed_n200", "c17_binary_y_n200", "r01_breast_class"):
        X, of = golden(name)
        cases[name] = ((of, X[:, :2]), {"n_permutations": 10, "confidence_level": None})
    return cases


TESTS = _tests()


def a_test(case):
    arguments, options = TESTS[case]
    return codec_test, arguments, {"seed": 2**64 - 3, **options}


@pytest.mark.parametrize("case", TESTS)
def test_codec_test(ranks, case):
    same_as_one_process(ranks, "test", a_test, case)


def without_a_seed(rank, size, group):
    (y, z), _ = TESTS["continuous"]
    found = codec_test(y, z, n_permutations=9, group=group)
    again = codec_test(y, z, n_permutations=9, seed=found.seed)
    return found.seed, plain(found) == plain(again)


def test_all_ranks_draw_from_one_seed(ranks):
    seeds, equal = zip(*ranks.run(without_a_seed), strict=True)
    assert len(set(seeds)) == 1
    assert all(equal)


# ---------------------------------------------------------------------------------------------
# dependence_graph and stability


def _graphs():
    rng = np.random.default_rng(6)
    z, few = rng.normal(size=(60, 5)), rng.integers(0, 3, (60, 5)) * 1.0
    gaps = z.copy()
    gaps[3, 2] = np.nan
    tested = {"stop": "permutation", "n_permutations": 19}
    return {
        "continuous": (np.column_stack([z, z[:, 0] * z[:, 1]]), {}),
        "two columns": (z[:, :2], {"stop": False}),
        "missing": (gaps, {"nan_policy": "omit", "max_features": 1}),
        "a constant column": (np.column_stack([z[:, :3], np.ones(60)]), {"min_gain": 0.01}),
        "tested": (np.column_stack([few[:, :3], few[:, 0] + few[:, 1]]), {**tested, "seed": 3}),
        **{f"ties {ties}": (few, {"ties": ties, "seed": 1}) for ties in TIES},
        "t07_mixed_n200": (np.column_stack(golden("t07_mixed_n200")), {"max_features": 2}),
    }


GRAPHS = _graphs()


def a_graph(case):
    X, options = GRAPHS[case]
    return dependence_graph, (X,), options


@pytest.mark.parametrize("case", GRAPHS)
def test_dependence_graph(ranks, case):
    same_as_one_process(ranks, "graph", a_graph, case)


def a_graph_of_names(rank, size, group):
    import pandas as pd

    X = pd.DataFrame(GRAPHS["tested"][0], columns=list("abcd"))
    found = dependence_graph(X, stop="permutation", n_permutations=19, group=group)
    again = dependence_graph(X, stop="permutation", n_permutations=19, seed=found.seed)
    return repr(found), repr(again), [each.not_taken_name for each in found.results]


def test_a_graph_has_names_and_one_seed(ranks):
    found = ranks.run(a_graph_of_names)
    assert found == [found[0]] * ranks.size
    text, again, names = found[0]
    assert text == again
    assert "'d' depends on" in text
    assert set(names) & set("abcd")


def halves(case):
    X, options = GRAPHS[case]
    given = {k: v for k, v in options.items() if k not in ("seed", "alpha")}
    return stability, (X[:, :-1], X[:, -1]), {"n_pairs": 2 + (case == "tested"), **given}


@pytest.mark.parametrize("case", [case for case in GRAPHS if case != "t07_mixed_n200"])
def test_stability(ranks, case):
    same_as_one_process(ranks, "halves", halves, case)


# ---------------------------------------------------------------------------------------------
# What is refused


def differ(rank, size, group, name):
    last = rank == size - 1
    y, z, x = np.random.default_rng(0).normal(size=(3, 40))
    X = np.column_stack([y, z, x])
    if name == "y":
        codec_test(y + last, z, group=group)
    elif name == "x":
        codec_test(y, z, x if last else None, group=group)
    elif name == "n_permutations":
        codec_test(y, z, n_permutations=20 + last, group=group)
    elif name == "X":
        dependence_graph(X[:, : 3 - last], group=group)
    elif name == "stop":
        dependence_graph(X, stop=bool(last), group=group)
    elif name == "max_features":
        stability(X, y, **({"max_features": 1} if last else {}), group=group)
    elif last:
        stability(X, y, group=group)
    else:
        dependence_graph(X, group=group)


@pytest.mark.parametrize(
    "name", ["y", "x", "n_permutations", "X", "stop", "max_features", "function"]
)
def test_what_differs_is_named(ranks, name):
    for failure in ranks.failures(differ, name):
        assert failure.kind == "ValueError"
        same = (
            "the same function: rank 0 called" if name == "function" else f"with the same {name}:"
        )
        assert same in failure.message


def refuse(rank, size, group, where):
    y, z = np.random.default_rng(0).normal(size=(2, 40))
    X = np.column_stack([y, z, y * z])
    if where == "arguments":
        codec_test(np.full(40, np.nan) if rank else y, z, group=group)
    error = MemoryError("no room")
    broken = {"side_effect": error} if rank == size - 1 else {"wraps": getattr(CpuBackend(), where)}
    with mock.patch.object(CpuBackend, where, **broken):
        if where == "permuted_sums":
            codec_test(y, z, group=group)
        elif where == "engine":
            dependence_graph(X, group=group)
        else:
            codec_test(y, z, method="asymptotic", group=group)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("permuted_sums", "the permutations failed on rank {last} of the group: MemoryError: no"),
        ("engine", "the selection for some columns failed on rank {last} of the group: Memory"),
        ("nearest", "the limit of many rows failed on rank {last} of the group: MemoryError: no"),
    ],
)
def test_a_rank_that_fails_midway_ends_all(ranks, where, said):
    *others, last = ranks.failures(refuse, where)
    assert (last.kind, last.message) == ("MemoryError", "no room")
    for failure in others:
        assert failure.kind == "RuntimeError"
        assert failure.message.startswith(said.format(last=ranks.size - 1))


def test_a_bad_argument_on_one_rank_ends_all(ranks):
    first, *others = ranks.failures(refuse, "arguments")
    assert "the check of the arguments failed on rank 1 of the group: ValueError: y " in (
        first.message
    )
    assert {failure.kind for failure in others} == {"ValueError"}


def shares(rank, size, group, count):
    from lcodec_ext._torch.group import Ranks

    return Ranks(group, "shares").share_out(count, "nothing", list)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_shares_are_contiguous_and_even(ranks, count):
    for pieces in ranks.run(shares, count):
        assert len(pieces) == ranks.size
        assert [k for piece in pieces for k in piece] == list(range(count))
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1
    assert ONE_RANK.share_out(count, "nothing", list) == [list(range(count))]
