"""Find the Markov blanket of y in the Bullseye network, by tests of conditional independence.

The paper judges its coefficients by this network: six variables, each a point on a sphere in three
dimensions, and a response y that depends on the radii of four of them. A search of PC type keeps
the variables that no test finds independent of y, and compares them with the truth. The script runs
that search with permutation tests of T (CODEC), of T with the paper's noise (L-CODEC) and of a
nearest-neighbour estimate of the conditional mutual information (CMI), on the points and on their
radii. It takes about ten seconds, and with --full about ten minutes.
"""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import numpy as np
from numpy.typing import NDArray

from lcodec_ext import codec, codec_test

TRUTH, VARIABLES, DIMENSIONS = (2, 3, 4, 5), 6, 3
LEVELS = (0.05, 0.1, 0.5, 0.9)  # the paper's: independent if p >= 1 - level, or T <= level
NEIGHBOURS = (3, 5, 10)  # of the CMI
NEAR = 5  # rows among which values change places, given others
NOISE = 0.01  # of L-CODEC
SIZES = {  # samples, runs, permutations, most variables to condition on
    "reduced": {"n": 200, "runs": 2, "permutations": 9, "given": 1},
    "full": {"n": 1000, "runs": 6, "permutations": 19, "given": 2},
    "paper's n": {"n": 5000, "runs": 3, "permutations": 19, "given": 1},
}


def bullseye(n: int, rng: np.random.Generator) -> tuple[NDArray, list[NDArray]]:
    """y, and the points of the six variables, in half precision and then standardised."""

    def near(r: NDArray) -> NDArray:
        return r + rng.uniform(-0.075, 0.075, n)

    inner = rng.random(n) < 0.5
    r1 = np.where(inner, rng.uniform(0.25, 0.5, n), rng.uniform(0.75, 1, n))
    r2, r3 = near(r1), near(r1)
    r4 = near(r3)
    r5 = near((r2 + r4) / 2)
    y = near((r3 + r5) / 2)
    r6 = near((r4 + y) / 2)
    points = []
    for radius in (r1, r2, r3, r4, r5, r6):
        direction = rng.standard_normal((n, DIMENSIONS))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        points.append(standardised(radius[:, None] * direction))
    return standardised(y), points


def standardised(values: NDArray) -> NDArray:
    values = values.astype(np.float16).astype(np.float64)
    return (values - values.mean(0)) / values.std(0)


def noisy(values: NDArray, rng: np.random.Generator) -> NDArray:
    return values + NOISE * rng.standard_normal(values.shape)


# ---------------------------------------------------------------------------------------------
# Tests: p-values of "y is independent of z, given x"


def t_pvalue(y: NDArray, z: NDArray, x: NDArray | None, permutations: int, seed: int) -> float:
    with warnings.catch_warnings():  # of inexact exchangeability, which every test here shares
        warnings.simplefilter("ignore", UserWarning)
        return codec_test(
            y,
            z,
            x,
            n_permutations=permutations,
            k_perm=None if x is None else NEAR,
            confidence_level=None,
            seed=seed,
        ).pvalue


def distances(values: NDArray) -> NDArray:
    """Between all rows, in the maximum norm: at these sizes faster than trees."""
    return np.abs(values[:, None] - values[None]).max(2).astype(np.float32)


def cmi(y: NDArray, z: NDArray, x: NDArray | None) -> NDArray:
    """I(y; z | x) by nearest neighbours, for each number of them, from distances.

    Kraskov, Stögbauer and Grassberger (2004); given x, Frenzel and Pompe (2007).
    """
    from scipy.special import digamma

    n = len(y)
    sides = [side if x is None else np.maximum(side, x) for side in (y, z)]
    nearest = np.partition(np.maximum(*sides), NEIGHBOURS, axis=1)  # a row is its own, at 0

    def mean_digamma(table: NDArray, radius: NDArray) -> float:
        return float(digamma(np.maximum((table < radius).sum(1), 1)).mean())

    found = []
    for k in NEIGHBOURS:
        radius = nearest[:, k, None]
        rest = digamma(n) if x is None else mean_digamma(x, radius)
        found.append(digamma(k) + rest - sum(mean_digamma(side, radius) for side in sides))
    return np.array(found)


def local_permutation(x: NDArray, rng: np.random.Generator) -> NDArray:
    """A row near each row in x, no row twice where that is possible (Runge, 2018)."""
    from scipy.spatial import cKDTree

    near = cKDTree(x).query(x, NEAR, p=math.inf)[1]
    rng.permuted(near, axis=1, out=near)
    used, chosen = np.zeros(len(x), bool), np.empty(len(x), np.int64)
    for row in rng.permutation(len(x)):
        free = near[row][~used[near[row]]]
        chosen[row] = free[0] if len(free) else near[row][0]
        used[chosen[row]] = True
    return chosen


def cmi_pvalues(
    y: NDArray, z: NDArray, x: NDArray | None, permutations: int, rng: np.random.Generator
) -> NDArray:
    tables = [None if part is None else distances(part) for part in (y[:, None], z, x)]
    observed, as_large = cmi(*tables), np.ones(len(NEIGHBOURS))
    for _ in range(permutations):
        order = rng.permutation(len(y)) if x is None else local_permutation(x, rng)
        as_large += cmi(tables[0], tables[1][np.ix_(order, order)], tables[2]) >= observed
    return as_large / (permutations + 1)


# ---------------------------------------------------------------------------------------------
# The search


def blanket(independent: Callable[[int, Sequence[int]], bool], most: int) -> set[int]:
    """Variables next to y, then those that y is independent of only until a common child is given.

    `most` limits the variables that a test conditions on while it looks for neighbours.
    """
    near, apart = set(range(VARIABLES)), {}
    for size in range(most + 1):
        level = sorted(near)
        for i in level:
            others = [j for j in level if j != i]
            for given in itertools.combinations(others, size):
                if independent(i, given):
                    near.discard(i)
                    apart[i] = given
                    break
    return near | {
        i
        for i, given in apart.items()
        for child in near - set(given)
        if not independent(i, (*given, child))
    }


class Tests:
    """P-values of one run and kind of variables, computed when asked for, and their seconds."""

    def __init__(self, y, variables, size, seed):
        self.y, self.variables, self.size, self.seed = y, variables, size, seed
        rng = np.random.default_rng([seed, 1])
        self.noisy_y, self.noisy = noisy(y, rng), [noisy(z, rng) for z in variables]
        self.known: dict[tuple, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}

    def __call__(self, kind: str, i: int, given: Sequence[int]) -> float:
        at = kind.partition(",")[0], i, tuple(sorted(given))
        if at not in self.known:
            began = time.process_time()
            self.known[at] = self._measure(*at)
            spent = time.process_time() - began
            self.seconds[at[0]] = self.seconds.get(at[0], 0.0) + spent
        return self.known[at][kind]

    def _measure(self, group: str, i: int, given: tuple[int, ...]) -> dict[str, float]:
        ours = self.noisy if group == "L-CODEC" else self.variables
        y = self.noisy_y if group == "L-CODEC" else self.y
        x = np.hstack([ours[j] for j in given]) if given else None
        count = self.size["permutations"]
        if group == "CMI":
            rng = np.random.default_rng([self.seed, 2, i, *given])
            found = cmi_pvalues(y, ours[i], x, count, rng)
            return {f"CMI, k = {k}": p for k, p in zip(NEIGHBOURS, found.tolist(), strict=True)}
        if group == "T alone":
            return {group: -codec(y, ours[i], x)}
        return {group: t_pvalue(y, ours[i], x, count, self.seed)}


def rates(found: set[int]) -> tuple[float, float]:
    """True and false positives, as shares."""
    right, wrong = len(found & set(TRUTH)), len(found - set(TRUTH))
    return right / len(TRUTH), wrong / (VARIABLES - len(TRUTH))


def roc(tests: Tests, kind: str) -> dict:
    """Rates over all thresholds, the area below them, and the blanket at the paper's levels."""
    most = tests.size["given"]
    if kind == "T alone":
        thresholds = [-level for level in np.linspace(-0.1, 1.0, 111)]
        named = [-level for level in LEVELS]
    else:
        count = tests.size["permutations"] + 1
        thresholds = [(k + 0.5) / count for k in range(count + 1)]
        named = [1 - level for level in LEVELS]

    def at(threshold: float) -> set[int]:
        return blanket(lambda i, given: tests(kind, i, given) >= threshold, most)

    curve = sorted({(0.0, 0.0), (1.0, 1.0)} | {rates(at(t))[::-1] for t in thresholds})
    false, true = np.array(curve).T
    true = np.maximum.accumulate(true)
    return {
        "auc": float(np.trapezoid(true, false)),
        "curve": [[float(a), float(b)] for a, b in zip(false, true, strict=True)],
        "found": {str(level): sorted(at(t)) for level, t in zip(LEVELS, named, strict=True)},
    }


# ---------------------------------------------------------------------------------------------
# What is run


def one_size(name: str, kinds: Sequence[str], seed: int) -> dict:
    """Areas and seconds of all kinds of tests, on points and on radii, over several runs."""
    size = SIZES[name]
    result: dict = {"size": size, "points": {}, "radii": {}}
    for run in common.progress(range(size["runs"]), f"n = {size['n']}", "run"):
        y, points = bullseye(size["n"], np.random.default_rng([seed, run]))
        radii = [standardised(np.linalg.norm(z, axis=1, keepdims=True)) for z in points]
        for what, variables in (("points", points), ("radii", radii)):
            tests = Tests(y, variables, size, 1000 * seed + run)
            for kind in kinds:
                result[what].setdefault(kind, []).append(roc(tests, kind))
            for kind in kinds:  # the CMI's neighbours share one computation
                result[what][kind][-1]["seconds"] = tests.seconds[kind.partition(",")[0]]
    return result


def summary(runs: list[dict]) -> dict:
    areas = np.array([run["auc"] for run in runs])
    shares = {
        str(level): [
            float(np.mean([rates(set(run["found"][str(level)]))[side] for run in runs]))
            for side in (0, 1)
        ]
        for level in LEVELS
    }
    grid = np.linspace(0, 1, 101)
    curves = [np.interp(grid, *np.array(run["curve"]).T) for run in runs]
    return {
        "auc": float(areas.mean()),
        "standard_error": float(areas.std(ddof=1) / math.sqrt(len(areas))),
        "seconds": float(np.mean([run["seconds"] for run in runs])),
        "rates": shares,  # true, false
        "curve": np.mean(curves, axis=0).round(4).tolist(),
        "whole": float(
            max(
                np.mean([run["found"][str(level)] == list(TRUTH) for run in runs])
                for level in LEVELS
            )
        ),
    }


def run(options) -> dict:
    kinds = ("CODEC", "L-CODEC", "T alone", *(f"CMI, k = {k}" for k in NEIGHBOURS))
    parts = {"full": kinds, "paper's n": kinds[:3]} if options.full else {"reduced": kinds}
    result: dict = {"truth": TRUTH, "noise": NOISE, "near": NEAR, "parts": {}}
    for name, some in parts.items():
        found = one_size(name, some, options.seed)
        result["parts"][name] = {"size": found["size"]} | {
            what: {kind: summary(found[what][kind]) for kind in some}
            for what in ("points", "radii")
        }
    return result


def show(record: dict) -> str:
    lines = []
    for part in record["parts"].values():
        size = part["size"]
        lines.append(
            f"{size['runs']} runs of n = {size['n']:,}, {size['permutations']} permutations a test"
        )
        lines.append(
            f"{'':20}{'AUC on points':>18}{'seconds':>9}{'AUC on radii':>18}{'seconds':>9}"
        )
        for kind, found in part["points"].items():
            cells = ""
            for one in (found, part["radii"][kind]):
                cells += f"{one['auc']:>7.2f} ± {one['standard_error']:.2f}{one['seconds']:>14.2f}"
            lines.append(f"{kind:<20}{cells}")
    lines.append("AUC: of true against false positives over all thresholds; ± one standard error")
    return "\n".join(lines)


def draw(record: dict, file: Path) -> None:
    from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PURPLE

    part = next(iter(record["parts"].values()))
    looks = {
        "CODEC": (BLUE, "-"),
        "L-CODEC": (PURPLE, "--"),
        "T alone": (DARK, ":"),
        "CMI, k = 5": (ORANGE, "-"),
    }
    grid = np.linspace(0, 1, 101)
    with common.figure(file, columns=3, size=(10, 3.4)) as (left, middle, right):
        titles = {"points": "Points in three dimensions", "radii": "Radii (known to matter)"}
        for axes, what in ((left, "points"), (middle, "radii")):
            for kind, (color, line) in looks.items():
                found = part[what][kind]
                label = f"{kind}: {found['auc']:.2f} ± {found['standard_error']:.2f}"
                axes.plot(grid, found["curve"], line, color=color, label=label, linewidth=1.8)
            axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, zorder=0)
            axes.set(title=titles[what], xlabel="false members kept", ylabel="true members kept")
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axes.legend(loc="lower right", fontsize=8, title="area below", title_fontsize=8)
        names = list(looks)
        for offset, what, alpha in ((-0.2, "points", 1.0), (0.2, "radii", 0.5)):
            seconds = [part[what][kind]["seconds"] for kind in names]
            places = np.arange(len(names)) + offset
            right.barh(places, seconds, 0.38, color=[looks[k][0] for k in names], alpha=alpha)
            for place, value in zip(places, seconds, strict=True):
                right.text(value * 1.15, place, f"{value:.2g} s", va="center", fontsize=8)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.set(xscale="log", title="CPU time of a search (pale: radii)", xlabel="seconds")
        right.set_xlim(right=right.get_xlim()[1] * 8)


if __name__ == "__main__":
    common.main("bullseye", common.options(__doc__, None), run, draw, show)
