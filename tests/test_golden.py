"""Values of R, of an exact rational computation and of other packages (data/golden)."""

import contextlib
import functools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lcodec_ext import codec, foci, nearest_neighbors, xi, xi_test

DATA = Path(__file__).parent / "data" / "golden"
CASES = json.loads((DATA / "expected.json").read_text())["cases"]
PEERS = {case["id"]: case for case in json.loads((DATA / "peers.json").read_text())["cases"]}
STANDARDIZE = {"scale": "scale", "bounded": "bounded", "none": None}

backends = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=pytest.mark.native)]
)


def cases(kind, condition=lambda case: True):
    chosen = [case for case in CASES if case["kind"] == kind and condition(case)]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=[case["id"] for case in chosen])


@functools.cache
def load(name):
    table = np.loadtxt(DATA / f"{name}.csv", delimiter=",", skiprows=1, ndmin=2)
    return np.ascontiguousarray(table[:, :-1]), np.ascontiguousarray(table[:, -1])


def columns(case):
    """y, Z and X (or None) of a codec case."""
    X, y = load(case["data"])
    z, x = ([k - 1 for k in case[name]] for name in ("z", "x"))
    return y, X[:, z], X[:, x] if x else None


@contextlib.contextmanager
def expected_warnings(*patterns):
    with contextlib.ExitStack() as stack:
        for pattern in patterns:
            stack.enter_context(pytest.warns(UserWarning, match=pattern))
        yield


def codec_warnings(case):
    _, Z, X = columns(case)
    patterns = [
        f"of {name} (is|are) constant"
        for name, array in (("z", Z), ("x", X))
        if array is not None and (np.ptp(array, axis=0) == 0).any()
    ]
    if case["exact"].get("den_zero"):
        patterns.append("by convention")
    return expected_warnings(*patterns)


def run_codec(case, **options):
    with codec_warnings(case):
        return codec(*columns(case), **options)


def run_foci(case, **options):
    """The result on a case, and its 1-based ordering as R prints it."""
    X, y = load(case["data"])
    patterns = []
    if (np.ptp(X, axis=0) == 0).any():
        patterns.append("of X is constant")
    if np.ptp(y) == 0:
        patterns.append("y is constant")
    options = {"stop": case["stop"], "max_features": case["num_features"], **options}
    with expected_warnings(*patterns):
        result = foci(X, y, standardize=STANDARDIZE[case["standardize"]], **options)
    return result, (result.ordering + 1).tolist()


def tied(case):
    """Rows whose neighbours in W = (x, z) or in x tie, duplicates included."""
    return sum(case["R"][f"nn_{what}_{where}"] for what in ("ties", "repeats") for where in "wx")


def is_random(case):
    return case["exact"].get("random", case["exact"].get("sd", 0) > 0)


# --------------------------------------------------------------------------------------------
# CODEC


@backends
@cases("codec")
def test_codec_is_the_exact_value_correctly_rounded(case, backend):
    value = run_codec(case, backend=backend)
    exact = case["exact"]
    if exact.get("den_zero"):
        assert value == 1.0
    else:
        assert value == float(Fraction(exact["num"]) / Fraction(exact["den"]))


@cases("codec", lambda case: "value" in case["R"])
def test_codec_agrees_with_R_where_R_does_not_draw(case):
    assert run_codec(case, backend="reference") == pytest.approx(case["R"]["value"], abs=1e-12)


@pytest.mark.native
@cases("codec", lambda case: not case["x"] and is_random(case))
def test_random_ties_have_the_exact_mean_and_sd(case):
    draws = [run_codec(case, ties="random", seed=seed) for seed in range(200)]
    exact = case["exact"]
    assert abs(np.mean(draws) - exact["mean"]) < 5 * exact["sd"] / math.sqrt(len(draws))
    assert 0.75 < np.std(draws, ddof=1) / exact["sd"] < 1.3
    for seed in range(2):
        assert run_codec(case, ties="random", seed=seed, backend="reference") == draws[seed]


@backends
@cases("codec", lambda case: case["x"] and is_random(case))
def test_conditional_random_ties_use_one_neighbour_each(case, backend):
    # R draws the neighbours in x twice and takes those of (x, z) by their distance in x; here
    # the sums above and below the line are over the same neighbours
    y, Z, X = columns(case)
    R = np.searchsorted(np.sort(y), y, side="right")
    m_x, m_w = (
        np.minimum(R, R[nearest_neighbors(array, ties="random", seed=3, backend=backend)]).sum()
        for array in (X, np.hstack([X, Z]))
    )
    expected = float(Fraction(int(m_w - m_x), int(R.sum() - m_x)))
    assert run_codec(case, ties="random", seed=3, backend=backend) == expected


@pytest.mark.native
@cases("codec", lambda case: case["x"] and "value" not in case["R"])
def test_conditional_averaged_ties_are_near_the_mean_of_R(case):
    R = case["R"]
    sds = abs(run_codec(case) - R["mean"]) / R["sd"]
    if R["nn_ties_w"] == 0:  # what is left is the mean of ratios against the ratio of means
        assert sds < 0.25
    else:  # R resolves ties of (x, z) with distances in x alone, and is far off on these two
        assert (sds > 3) == (case["id"] in ("t01_levels4_n200/012", "t03_grid12_n144/004"))


# --------------------------------------------------------------------------------------------
# FOCI


@backends
@cases("foci", lambda case: "exact_foci" in case)
def test_foci_takes_the_exact_path_on_raw_columns(case, backend):
    result, ordering = run_foci(case, backend=backend)
    exact = case["exact_foci"]
    assert ordering == exact.get("selected_1based", [])
    for T, expected in zip(result.cumulative, exact["T"], strict=True):
        assert abs(T - expected) <= 4 * math.ulp(expected)


@backends
@cases("foci", lambda case: case["R"].get("deterministic"))
def test_foci_takes_the_path_of_R_where_R_does_not_draw(case, backend):
    result, ordering = run_foci(case, backend=backend)
    if case["data"] == "t11_constY_n50":  # with stop=FALSE R lists all columns with T = NaN
        assert ordering == []
        assert result.stop_reason == "constant_y"
    else:
        assert ordering == case["R"]["selected_1based"]
        assert result.cumulative == pytest.approx(case["R"]["stepT"], abs=1e-12)


@backends
@cases("foci", lambda case: "top_paths" in case["R"])
def test_foci_with_averaged_ties_takes_a_path_that_R_draws(case, backend):
    _, ordering = run_foci(case, backend=backend)
    assert ",".join(map(str, ordering)) in case["R"]["top_paths"]


@pytest.mark.native
@cases("foci", lambda case: "top_paths" in case["R"])
def test_foci_with_random_ties_draws_as_R_does(case):
    runs = [run_foci(case, ties="random", seed=seed, max_features=1)[0] for seed in range(100)]
    first = [run.cumulative[0] for run in runs]
    R = case["R"]
    standard_error = R["step1_sd"] * math.sqrt(1 / len(first) + 1 / R["n_seeds"])
    assert abs(np.mean(first) - R["step1_mean"]) < 5 * standard_error


@backends
@cases("foci", lambda case: "error" in case["R"])
def test_foci_goes_on_where_R_refuses_a_constant_column(case, backend):
    result, ordering = run_foci(case, backend=backend)
    X, y = load(case["data"])
    assert np.ptp(X[:, 1]) == 0
    varying, T = foci(
        X[:, [0, 2]], y, stop=case["stop"], standardize=case["standardize"], backend=backend
    )
    without = [k for k in ordering if k != 2]
    assert without == [[1, 3][k] for k in varying]
    assert [v for k, v in zip(ordering, result.cumulative, strict=True) if k != 2] == list(T)


# --------------------------------------------------------------------------------------------
# xi


@backends
@cases("xi", lambda case: not case["R"]["x_tied"] and case["data"] != "t11_constY_n50")
def test_xi_agrees_with_R(case, backend):
    X, y = load(case["data"])
    x, R = X[:, case["z"][0] - 1], case["R"]
    ties = xi_test(x, y, backend=backend)
    noties = xi_test(x, y, y_continuous=True, backend=backend)
    assert xi(x, y, backend=backend) == ties.statistic == noties.statistic
    assert ties.statistic == pytest.approx(R["value"], abs=1e-12)
    assert (ties.sd, noties.sd) == pytest.approx((R["sd_ties"], R["sd_noties"]), rel=1e-12)
    pvalues = ties.pvalue, noties.pvalue
    assert pvalues == pytest.approx((R["p_ties"], R["p_noties"]), abs=1e-12)


@backends
@cases("xi", lambda case: case["R"]["x_tied"])
def test_xi_with_averaged_ties_is_the_mean_of_R(case, backend):
    X, y = load(case["data"])
    x, R = X[:, case["z"][0] - 1], case["R"]
    average = xi(x, y, backend=backend)
    assert abs(average - R["mean"]) < 5 * R["sd"] / math.sqrt(R["n_seeds"])
    draws = [xi(x, y, ties="random", seed=seed) for seed in range(200)]
    assert abs(average - np.mean(draws)) < 5 * R["sd"] / math.sqrt(len(draws))
    assert 0.75 < np.std(draws, ddof=1) / R["sd"] < 1.3


@backends
@cases("xi", lambda case: case["data"] == "t11_constY_n50")
def test_xi_of_a_constant_y_is_nan_as_in_R(case, backend):
    X, y = load(case["data"])
    with pytest.warns(UserWarning, match="y is constant"):
        result = xi_test(X[:, case["z"][0] - 1], y, backend=backend)
    assert case["R"]["value"] == case["R"]["p_ties"] == case["R"]["sd_ties"] == "NaN"
    assert all(map(math.isnan, result))


@cases("xi", lambda case: not case["R"]["x_tied"] and case["data"] != "t11_constY_n50")
def test_xi_agrees_with_scipy(case):
    X, y = load(case["data"])
    result = xi_test(X[:, case["z"][0] - 1], y)
    peer = PEERS[case["id"]]
    assert result.statistic == pytest.approx(peer["scipy"], abs=1e-12)
    assert result.pvalue == pytest.approx(peer["scipy_p"], abs=1e-12)


# --------------------------------------------------------------------------------------------
# Other packages, where nothing ties


@pytest.mark.native
@cases(
    "codec",
    lambda case: "value" in case["R"] and not tied(case) and case["data"] != "t11_constY_n50",
)
def test_codec_agrees_with_other_packages(case):
    T, peer = run_codec(case), PEERS[case["id"]]
    values = [*peer.get("pyFOCI", {}).values(), peer["mfoci"], peer["xicorpy"]]
    assert values == pytest.approx([T] * len(values), abs=1e-12)


@pytest.mark.native
@cases(
    "foci",
    lambda case: case["R"].get("deterministic") and "pyFOCI" in PEERS.get(case["id"], {}),
)
def test_foci_agrees_with_pyfoci(case):
    result, _ = run_foci(case)
    selected = result.ordering.tolist()
    for peer in PEERS[case["id"]]["pyFOCI"].values():
        if case["data"] == "c17_binary_y_n200":
            # columns 0 and 1 have the same exact T, and pyFOCI does not take the lowest index
            assert peer["selected_0based"][:2] == [1, 0] == selected[1::-1]
            X, y = load(case["data"])
            assert codec(y, X[:, 0]) == codec(y, X[:, 1])
        else:
            assert selected == peer["selected_0based"]
            assert result.cumulative == pytest.approx(peer["score"], abs=1e-12)
