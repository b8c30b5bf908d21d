"""The Bullseye example: its network, its search, its estimates, and what its page says."""

import json
from itertools import combinations
from pathlib import Path

import bullseye
import numpy as np
import pytest
from scipy.special import digamma

ROOT = Path(__file__).parent.parent


def test_the_network():
    y, points = bullseye.bullseye(4000, np.random.default_rng(0))
    assert y.shape == (4000,)
    assert [z.shape for z in points] == [(4000, 3)] * 6
    for values in (y, *points):
        assert values.mean(0) == pytest.approx(0, abs=1e-9)
        assert values.std(0) == pytest.approx(1, abs=1e-9)
    radii = [np.linalg.norm(z, axis=1) for z in points]
    correlations = [np.corrcoef(y, radius)[0, 1] for radius in radii]
    assert min(correlations) > 0.9
    assert abs(np.corrcoef(y, points[5][:, 0])[0, 1]) < 0.1  # the direction says nothing


def test_the_search_finds_the_blanket_if_the_tests_are_right():
    near, parents_of_child = {2, 4, 5}, (3,)

    def independent(i, given):
        if i in near:
            return False
        if i in parents_of_child and 5 in given:
            return False  # a common child makes them dependent
        return set(given) >= {2, 4} - {i}

    assert bullseye.blanket(independent, 2) == {2, 3, 4, 5}
    assert bullseye.blanket(lambda i, given: True, 2) == set()
    assert bullseye.blanket(lambda i, given: False, 2) == set(range(6))
    asked = []
    bullseye.blanket(lambda i, given: asked.append((i, given)) or False, 1)
    assert sorted(asked) == sorted(
        (i, given)
        for i in range(6)
        for size in (0, 1)
        for given in combinations([j for j in range(6) if j != i], size)
    )


def test_the_estimates_of_information():
    rng = np.random.default_rng(0)
    z, noise, x = rng.standard_normal((3, 800, 1))
    linear = 0.8 * z + 0.6 * noise
    known = -0.5 * np.log(1 - 0.64)
    assert bullseye.cmi(linear, z, None) == pytest.approx(known, abs=0.12)
    assert bullseye.cmi(linear, z, x) == pytest.approx(known, abs=0.2)
    assert np.abs(bullseye.cmi(linear, x, None)).max() < 0.12


def test_the_estimate_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    y, z, x = rng.standard_normal((90, 1)), rng.standard_normal((90, 3)), rng.random((90, 2))

    def apart(*parts):
        values = np.hstack(parts)
        return np.abs(values[:, None] - values).max(2)

    for given in (None, x):
        beside = [] if given is None else [given]
        radius = np.sort(apart(y, z, *beside), axis=1)[:, 4, None]
        of_y, of_z = ((apart(each, *beside) < radius).sum(1) for each in (y, z))
        rest = 90 if given is None else (apart(x) < radius).sum(1)
        psi = [digamma(count).mean() for count in (4, rest, of_y, of_z)]
        expected = psi[0] + psi[1] - psi[2] - psi[3]
        assert bullseye.cmi(y, z, given, (4,)) == pytest.approx(expected, abs=1e-9)


def test_local_permutations_stay_near():
    x = np.arange(60.0)[:, None]
    order = bullseye.local_permutation(bullseye.near_rows(x), np.random.default_rng(0))
    assert np.abs(order - np.arange(60)).max() < bullseye.NEAR
    assert len(set(order)) > 40
    assert (order != np.arange(60)).sum() > 30


def test_the_tests_tell_dependence():
    rng = np.random.default_rng(1)
    z, other = rng.standard_normal((2, 300, 1))
    y = z[:, 0] ** 2
    assert bullseye.t_pvalue(y, z, None, 19, 0) == 0.05
    assert bullseye.t_pvalue(y, other, None, 99, 0) > 0.02
    assert (bullseye.cmi_pvalues(y, z, None, 19, rng) == 0.05).all()


def test_rates_and_areas(monkeypatch):
    assert bullseye.rates({2, 3, 4, 5}) == (1.0, 0.0)
    assert bullseye.rates({0, 2}) == (0.25, 0.5)
    monkeypatch.setitem(
        bullseye.SIZES,
        "tiny",
        {"n": 120, "runs": 2, "permutations": 19, "given": 0, "cmi": ("points", "radii")},
    )
    kinds = ("CODEC", "T alone", "CMI, k = 5")
    found = bullseye.one_size("tiny", kinds, 3)
    for what in ("points", "radii"):
        for kind in kinds:
            assert len(found[what][kind]) == 2
            summary = bullseye.summary(found[what][kind])
            assert 0 <= summary["auc"] <= 1
            assert summary["seconds"] > 0
            assert len(summary["rates"]) == len(bullseye.LEVELS)
    # Of all variables by a marginal test: dependent, the false ones as well.
    assert found["radii"]["CODEC"][0]["found"]["0.9"] == [0, 1, 2, 3, 4, 5]


def test_the_page_has_the_figures_on_record():
    record = json.loads((ROOT / "examples/results/bullseye.json").read_text())
    page = (ROOT / "docs/experiments/bullseye.md").read_text(encoding="utf-8")
    assert record["dirty"] is False
    for part in record["parts"].values():
        for kind in part["points"]:
            assert bullseye.row(part, kind) in page
    page = " ".join(page.split())
    small, large = record["parts"]["full"], record["parts"]["paper's n"]
    t, cmi = (large["points"][kind]["tests"] for kind in ("CODEC", "CMI, k = 5"))
    for text in (
        f"takes {bullseye.share(large, 'points'):.0%} of the CMI's time",
        f"and {bullseye.share(large, 'points') / large['one_k']:.0%} of that for one number",
        f"a test takes {bullseye.share(large, 'points', of_a_test=True):.0%} of a test's time",
        f"takes {bullseye.share(small, 'points'):.0%} on points and "
        f"{bullseye.share(small, 'radii'):.0%} on radii",
        f"{large['one_k']:.0%} of the time of all three",
        f"asks {t:.0f} tests, and that of the CMI {cmi:.0f}",
    ):
        assert text in page, text
    for kind in ("CODEC", "L-CODEC"):  # it keeps all six variables at every level
        assert set(map(tuple, large["points"][kind]["rates"].values())) == {(1.0, 1.0)}
    assert large["points"]["CMI, k = 3"]["rates"]["0.5"] == [0.75, 0.0]
    assert not any(found["whole"] for found in large["points"].values())
    assert small["points"]["CMI, k = 5"]["whole"] == pytest.approx(1 / 3)
