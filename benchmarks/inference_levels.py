"""How often tests of dependence err, how often they find what is there; do intervals cover?

The "simulation" of inference.py. Every run has its own seed, so that a part can be repeated. Where
tigramite is installed, its tests of conditional independence judge the same samples: CMIknn, a
permutation test of the mutual information that nearest neighbours estimate, and ParCorr, partial
correlation with Student's t.
"""

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext import codec, codec_test, foci

ALPHA = 0.05
PERMUTATIONS = 199  # 5% of 200 is a whole number: the level of a test is then exact
TRUTH = 10**6  # rows whose T stands for that of the population

Sample = tuple[NDArray, NDArray, NDArray]  # y, z, x

#: The kinds of response: what becomes of a continuous one.
RESPONSES: dict[str, Callable[[NDArray], NDArray]] = {
    "continuous": lambda y: y,
    "tied": lambda y: np.round(y),
    "binary": lambda y: (y > 0).astype(float),
}

#: y as a function of z and noise, for tests without a condition.
SHAPES: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
    "independent": lambda z, e: e,
    "linear": lambda z, e: z + 2 * e,
    "parabola": lambda z, e: z**2 + e,
    "sine": lambda z, e: np.sin(4 * z) + e,
    "noise that grows": lambda z, e: z * e,
}


def share(hits: int, runs: int) -> dict[str, Any]:
    """A share of runs and its standard error."""
    p = hits / runs
    return {"share": p, "error": math.sqrt(max(p * (1 - p), ALPHA * (1 - ALPHA)) / runs)}


def claim(point: dict[str, Any], bound: str, limit: float) -> dict[str, Any]:
    """A claim on a share, for which four of its standard errors are chance."""
    value, chance = point["share"], 4 * point["error"]
    met = value <= limit + chance if bound == "at_most" else value >= limit - chance
    return {"quantity": "share", bound: limit, "chance": chance, "value": value, "met": met}


# ---------------------------------------------------------------------------------------------
# Without a condition


def unconditional(n: int, runs: int) -> list[dict[str, Any]]:
    """Size and power of the permutation test at 5%, of the asymptotic one where it is offered."""
    points = []
    for response, become in RESPONSES.items():
        for shape, of in SHAPES.items():
            for q in (1, 3):
                hits = {"permutation": 0, "asymptotic": 0}
                for run in range(runs):
                    rng = np.random.default_rng([1, run])
                    z, e = rng.normal(size=(n, q)), rng.normal(size=n)
                    y = become(of(z[:, 0], e))
                    for method in hits:
                        found = codec_test(
                            y,
                            z,
                            method=method,
                            n_permutations=PERMUTATIONS if method == "permutation" else None,
                            confidence_level=None,
                            seed=run,
                        )
                        hits[method] += found.pvalue <= ALPHA
                for method, count in hits.items():
                    point = {
                        "part": "unconditional", "test": method, "n": n, "columns": q,
                        "response": response, "shape": shape, "runs": runs, **share(count, runs),
                    }  # fmt: skip
                    if shape == "independent" and method == "permutation":
                        point["claims"] = [claim(point, "at_most", ALPHA)]
                    points.append(point)
    return points


def coverage(n: int, runs: int) -> list[dict[str, Any]]:
    """How often the 95% interval of codec_test covers T of the population."""
    points = []
    for shape, of in SHAPES.items():
        for q in (1, 3):
            big = np.random.default_rng(0)
            z, e = big.normal(size=(TRUTH, q)), big.normal(size=TRUTH)
            # of three columns the first alone tells about y, so T is the same: less bias
            truth = codec(of(z[:, 0], e), z[:, 0])
            hits, widths = 0, []
            for run in range(runs):
                rng = np.random.default_rng([2, run])
                z, e = rng.normal(size=(n, q)), rng.normal(size=n)
                found = codec_test(
                    of(z[:, 0], e), z, n_permutations=1, confidence_level=0.95, seed=run
                )
                low, high = found.confidence_interval
                hits += low <= truth <= high
                widths.append(high - low)
            points.append(
                {"part": "coverage", "n": n, "columns": q, "shape": shape, "truth": truth,
                 "runs": runs, "width": float(np.mean(widths)), **share(hits, runs)}
            )  # fmt: skip
    return points


# ---------------------------------------------------------------------------------------------
# Given x


def conditional_sample(kind: str, n: int, rng: np.random.Generator) -> Sample:
    """y and z, which both depend on x: on nothing else, or on each other given x, too."""
    x, a, b = rng.normal(size=(3, n))
    z = x + a
    if kind == "null, linear":
        return x + b, z, x
    if kind == "null, curved":
        return x**2 + b, np.sin(3 * x) + a, x
    if kind == "null, discrete x":
        x = np.floor(3 * rng.random(n))
        return x + b, x + a, x
    if kind == "null, steep":
        return np.sin(6 * x) + 0.3 * b, np.sin(6 * x) + 0.3 * a, x
    if kind == "null, three columns of x":
        X = rng.normal(size=(n, 3))
        return X.sum(axis=1) + b, X.sum(axis=1) + a, X
    if kind == "linear":
        return x + z + b, z, x
    if kind == "little":
        return x + 0.4 * z + b, z, x
    if kind == "product":
        return a * (1 + x) + b, z, x
    if kind == "parabola":
        return 1.5 * a**2 + x + b, z, x
    raise ValueError(f"kind {kind!r} is unknown")


KINDS = (
    "null, linear", "null, curved", "null, discrete x", "null, steep", "null, three columns of x",
    "linear", "little", "product", "parabola",
)  # fmt: skip


def rivals() -> dict[str, Callable[[Sample, int], float]]:
    """The p-values of other packages' tests; none where tigramite is not installed."""
    try:
        from tigramite.independence_tests.cmiknn import CMIknn
        from tigramite.independence_tests.parcorr import ParCorr
    except ImportError:
        return {}

    def of(test: Any, sample: Sample) -> float:
        y, z, x = (column.reshape(len(column), -1) for column in sample)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own
            return float(test.run_test_raw(y, z, x)[1])

    def cmi_knn(sample: Sample, run: int) -> float:
        test = CMIknn(
            significance="shuffle_test", knn=0.1, shuffle_neighbors=5, sig_samples=PERMUTATIONS,
            workers=1, seed=run, verbosity=0,
        )  # fmt: skip
        return of(test, sample)

    def partial_correlation(sample: Sample, run: int) -> float:
        return of(ParCorr(significance="analytic", verbosity=0), sample)

    return {"CMIknn": cmi_knn, "partial correlation": partial_correlation}


def _y_permuted(sample: Sample, run: int) -> float:
    """The p-value of a step of FOCI from x to z, which permutes y instead of z."""
    y, z, x = sample
    X = np.column_stack([x, z])
    found = foci(
        X, y, preselected=range(X.shape[1] - 1), max_features=1, stop="permutation",
        n_permutations=PERMUTATIONS, seed=run, standardize=None,
    )  # fmt: skip
    return 1.0 if found.pvalues is None or not len(found.pvalues) else float(found.pvalues[0])


def conditional(n: int, runs: int, rival_runs: int) -> list[dict[str, Any]]:
    """Size and power of the local permutation test at 5%, beside the rivals'.

    "warned" is the share of runs that reject, with a warning that the test's assumption fails.
    """
    ours: dict[str, Callable[[Sample, int], float]] = {
        f"local permutation, k_perm={k}": lambda sample, run, k=k: (
            codec_test(
                *sample, k_perm=k, n_permutations=PERMUTATIONS, confidence_level=None, seed=run
            ).pvalue
        )
        for k in (3, 5, 10)
    }
    ours["y permuted, by foci"] = _y_permuted
    points = []
    for kind in KINDS:
        for name, test in (ours | rivals()).items():
            count = rival_runs if name == "CMIknn" else runs
            hits, warned, begun = 0, 0, time.process_time()
            for run in range(count):
                sample = conditional_sample(kind, n, np.random.default_rng([3, run]))
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    rejected = test(sample, run) <= ALPHA
                hits += rejected
                warned += rejected and any("blocks" in str(each.message) for each in told)
            points.append(
                {"part": "conditional", "test": name, "n": n, "kind": kind, "runs": count,
                 "ms": (time.process_time() - begun) / count * 1e3, **share(hits, count),
                 "warned": warned / count}
            )  # fmt: skip
            print(points[-1], flush=True)
    return points


# ---------------------------------------------------------------------------------------------
# Selection


def selection(n: int, runs: int) -> list[dict[str, Any]]:
    """How often FOCI selects a column though y depends on none: by its own stop, and by chance."""
    points = []
    for p in (5, 50):
        for response, become in RESPONSES.items():
            hits = {"no gain": 0, "permutation": 0}
            for run in range(runs):
                rng = np.random.default_rng([4, run])
                X, y = rng.normal(size=(n, p)), become(rng.normal(size=n))
                hits["no gain"] += len(foci(X, y, max_features=1).ordering) > 0
                found = foci(
                    X, y, stop="permutation", alpha=ALPHA, n_permutations=PERMUTATIONS, seed=run,
                    max_features=1,
                )  # fmt: skip
                hits["permutation"] += len(found.ordering) > 0
            for stop, count in hits.items():
                point = {
                    "part": "selection", "stop": stop, "n": n, "columns": p,
                    "response": response, "runs": runs, **share(count, runs),
                }  # fmt: skip
                if stop == "permutation":
                    point["claims"] = [claim(point, "at_most", ALPHA)]
                points.append(point)
    return points


# ---------------------------------------------------------------------------------------------
# All of it


def simulation(quick: bool) -> dict[str, Any]:
    """Tests without a condition, intervals and selections; the claims are those of exact tests."""
    runs, n = (20, 50) if quick else (1000, 200)
    half = max(20, runs // 2)
    points = []
    for part in (unconditional, coverage, selection):
        for point in part(n, runs if part is unconditional else half):
            points.append(point)
            print({key: value for key, value in point.items() if key != "claims"}, flush=True)
    return {"alpha": ALPHA, "permutations": PERMUTATIONS, "points": points}


def given(quick: bool) -> dict[str, Any]:
    """Tests of y and z given x."""
    runs, rival_runs, n = (20, 2, 50) if quick else (500, 50, 200)
    points = conditional(n, runs, rival_runs)
    return {"alpha": ALPHA, "permutations": PERMUTATIONS, "points": points}


def table(points: list[dict[str, Any]]) -> str:
    """The tables of docs/inference.md: shares in percent."""
    found = [*_table("y", _null(points)), ""]
    given = [p for p in points if p["part"] == "conditional"]
    found += _table("y and z, given x", {(p["kind"], p["test"]): _warned(p) for p in given})
    times: dict[str, list[float]] = {}
    for point in given:
        times.setdefault(point["test"], []).append(point["ms"])
    found.append(f"| ms a test | {' | '.join(f'{np.mean(ms):.1f}' for ms in times.values())} |")
    covered = [p for p in points if p["part"] == "coverage"]
    columns = {1: "one column", 3: "three, of which two are needless"}
    cells = {(p["shape"], columns[p["columns"]]): _percent(p) for p in covered}
    return "\n".join([*found, "", *_table("y as a function of z", cells)])


def _null(points: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What tests reject where nothing depends on anything."""
    found = {}
    for p in points:
        columns = f"{p.get('columns')} column{'s' * (p.get('columns') != 1)}"
        if p["part"] == "unconditional" and p["shape"] == "independent":
            found[p["response"], f"{p['test']}, {columns}"] = _percent(p)
        if p["part"] == "selection":
            found[p["response"], f"`foci`, {p['stop']}, {columns}"] = _percent(p)
    return found


def _warned(point: dict[str, Any]) -> str:
    """The share that is rejected, and that with a warning."""
    warned = f" ({100 * point['warned']:.1f} warned of)" if point["warned"] else ""
    return _percent(point) + warned


def _percent(point: dict[str, Any]) -> str:
    return f"{100 * point['share']:.1f}"


def _table(head: str, cells: dict[tuple[str, str], str]) -> list[str]:
    """A table of cells by row and column."""
    columns, rows = (list(dict.fromkeys(key[k] for key in cells)) for k in (1, 0))
    lines = [f"| {head} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    return lines + [
        f"| {row} | {' | '.join(cells.get((row, column), '') for column in columns)} |"
        for row in rows
    ]


def figure(points: list[dict[str, Any]]) -> Any:
    """Levels of tests under independence, power given x, and the coverage of intervals."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 4.2), layout="constrained")
    levels, power, covered = drawn.subplots(1, 3, width_ratios=(1.15, 1.25, 1))
    null = [p for p in points if p["part"] == "unconditional" and p["shape"] == "independent"]
    _dots(
        levels,
        {
            f"{p['test']}, {p['response']} y, {p['columns']} column{'s' * (p['columns'] > 1)}": p
            for p in null
        }
        | {
            f"FOCI, {p['response']} y, {p['columns']} columns": p
            for p in points
            if p["part"] == "selection" and p["stop"] == "permutation"
        },
    )
    levels.axvline(ALPHA, color="0.6", linewidth=1, zorder=0)
    levels.set(title="Rejected under independence (level 5%)", xlim=(0, 0.12))
    for k, test in enumerate(
        dict.fromkeys(p["test"] for p in points if p["part"] == "conditional")
    ):
        own = [p for p in points if p["part"] == "conditional" and p["test"] == test]
        at = np.arange(len(own)) + 0.13 * (k - 2.5)
        power.errorbar(
            [p["share"] for p in own], at, xerr=[2 * p["error"] for p in own], fmt="o", ms=4,
            label=test,
        )  # fmt: skip
    power.set_yticks(range(len(KINDS)), KINDS)
    power.invert_yaxis()
    power.axvline(ALPHA, color="0.6", linewidth=1, zorder=0)
    power.set(title="Rejected, given x (level 5%)", xlim=(-0.03, 1.05))
    power.legend(fontsize=7, loc="upper right")
    _dots(
        covered,
        {
            f"{p['shape']}, {p['columns']} column{'s' * (p['columns'] > 1)}": p
            for p in points
            if p["part"] == "coverage"
        },
    )
    covered.axvline(0.95, color="0.6", linewidth=1, zorder=0)
    covered.set(title="Intervals that cover T (95%)", xlim=(0.5, 1.02))
    for axes in (levels, power, covered):
        axes.title.set_size(10)
        axes.tick_params("both", labelsize=8)
    return drawn


def _dots(axes: Any, points: dict[str, dict[str, Any]]) -> None:
    """Shares with two standard errors, a line of text for each."""
    for k, point in enumerate(points.values()):
        axes.errorbar(point["share"], k, xerr=2 * point["error"], fmt="o", ms=4, color="C0")
    axes.set_yticks(range(len(points)), list(points))
    axes.invert_yaxis()
