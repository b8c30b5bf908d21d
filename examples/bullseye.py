"""Find the Markov blanket of y in the Bullseye network, by tests of conditional independence.

The paper judges its coefficients by this network: six variables, each a point on a sphere in three
dimensions, and a response y that depends on the radii of four of them. A search of PC type keeps
the variables that no test finds independent of y, and compares them with the truth. The script runs
that search with permutation tests of T (CODEC), of T with the paper's noise (L-CODEC) and of a
nearest-neighbour estimate of the conditional mutual information (CMI), on the points and on their
radii. It takes a few seconds, and with --full about eight minutes of CPU time.
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
BOTH = ("points", "radii")
SIZES = {  # samples, runs, permutations, most variables to condition on, where the CMI is computed
    "reduced": {"n": 200, "runs": 2, "permutations": 9, "given": 1, "cmi": BOTH},
    "full": {"n": 1000, "runs": 3, "permutations": 19, "given": 1, "cmi": BOTH},
    "paper's n": {"n": 5000, "runs": 2, "permutations": 19, "given": 1, "cmi": BOTH[:1]},
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


AT_A_TIME = 40_000  # distances of a block of rows: what stays in the caches


def cmi(
    y: NDArray, z: NDArray, x: NDArray | None, neighbours: Sequence[int] = NEIGHBOURS
) -> NDArray:
    """I(y; z | x) of columns by nearest neighbours in the maximum norm, for each number of them.

    Kraskov, Stögbauer and Grassberger (2004); given x, Frenzel and Pompe (2007). All distances are
    computed, a few rows at a time, which is faster than trees in more than three dimensions.
    """
    from scipy.special import digamma

    n, most = len(y), max(neighbours)
    rows = max(1, AT_A_TIME // n)
    columns = [np.float32(part.T) for part in (y, z, x) if part is not None]
    of_count = digamma(np.maximum(np.arange(n + 1), 1))
    sums = np.zeros((3, len(neighbours)))
    for start in range(0, n, rows):
        tables = [from_rows(part, slice(start, start + rows)) for part in columns]
        if x is not None:
            for side in tables[:2]:
                np.maximum(side, tables[2], out=side)
        joint = np.maximum(*tables[:2])
        joint.partition(most, axis=1)
        nearest = np.sort(joint[:, : most + 1], axis=1)  # a row is its own, at 0
        for i, k in enumerate(neighbours):
            for j, table in enumerate(tables):
                count = (table < nearest[:, k, None]).sum(1, dtype=np.uint32)
                sums[j, i] += of_count[count].sum()
    of_y, of_z, rest = sums / n
    return digamma(neighbours) + (digamma(n) if x is None else rest) - of_y - of_z


def from_rows(columns: NDArray, rows: slice) -> NDArray:
    """Distances between some rows and all, in the maximum norm."""
    found: NDArray | None = None
    for column in columns:
        apart = np.subtract(column[rows, None], column)
        np.abs(apart, out=apart)
        found = apart if found is None else np.maximum(found, apart, out=found)
    return found


def near_rows(x: NDArray) -> NDArray:
    """The rows among which a row may change places."""
    from scipy.spatial import cKDTree

    return cKDTree(x).query(x, NEAR, p=math.inf)[1]


def local_permutation(near: NDArray, rng: np.random.Generator) -> NDArray:
    """A row near each row, no row twice where that is possible (Runge, 2018)."""
    near = rng.permuted(near, axis=1)
    used, chosen = np.zeros(len(near), bool), np.empty(len(near), np.int64)
    for row in rng.permutation(len(near)):
        free = near[row][~used[near[row]]]
        chosen[row] = free[0] if len(free) else near[row][0]
        used[chosen[row]] = True
    return chosen


def cmi_pvalues(
    y: NDArray, z: NDArray, x: NDArray | None, permutations: int, rng: np.random.Generator
) -> NDArray:
    y = y[:, None]
    observed, as_large = cmi(y, z, x), np.ones(len(NEIGHBOURS))
    near = None if x is None else near_rows(x)
    for _ in range(permutations):
        order = rng.permutation(len(y)) if near is None else local_permutation(near, rng)
        as_large += cmi(y, z[order], x) >= observed
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

    def count(self, kind: str) -> int:
        return sum(at[0] == kind.partition(",")[0] for at in self.known)

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

    def seconds(neighbours: Sequence[int]) -> float:
        began = time.process_time()
        cmi(y[:, None], points[2], points[3], neighbours)
        return time.process_time() - began

    size = SIZES[name]
    result: dict = {"size": size, "points": {}, "radii": {}}
    for run in common.progress(range(size["runs"]), f"n = {size['n']}", "run"):
        y, points = bullseye(size["n"], np.random.default_rng([seed, run]))
        radii = [standardised(np.linalg.norm(z, axis=1, keepdims=True)) for z in points]
        for what, variables in (("points", points), ("radii", radii)):
            tests = Tests(y, variables, size, 1000 * seed + run)
            some = [kind for kind in kinds if "CMI" not in kind or what in size["cmi"]]
            for kind in some:
                result[what].setdefault(kind, []).append(roc(tests, kind))
            for kind in some:  # the CMI's neighbours share one computation
                result[what][kind][-1]["seconds"] = tests.seconds[kind.partition(",")[0]]
                result[what][kind][-1]["tests"] = tests.count(kind)
    result["one_k"] = seconds(NEIGHBOURS[1:2]) / seconds(NEIGHBOURS)
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
        "tests": float(np.mean([run["tests"] for run in runs])),
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
    result: dict = {"truth": TRUTH, "noise": NOISE, "near": NEAR, "parts": {}}
    for name in ("full", "paper's n") if options.full else ("reduced",):
        found = one_size(name, kinds, options.seed)
        result["parts"][name] = {"size": found["size"], "one_k": found["one_k"]} | {
            what: {kind: summary(runs) for kind, runs in found[what].items()} for what in BOTH
        }
    return result


def share(part: dict, what: str, of_a_test: bool = False) -> float:
    """CPU time of a search by T as a share of the CMI's, or of one of its tests."""
    ours, other = part[what]["CODEC"], part[what]["CMI, k = 5"]
    found = ours["seconds"] / other["seconds"]
    return found * other["tests"] / ours["tests"] if of_a_test else found


def rounded(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.2g}"


def row(part: dict, kind: str) -> str:
    """A row of the page's table."""
    cells = ""
    for what in BOTH:
        found = part[what].get(kind)
        if found is None:
            cells += " | |"
            continue
        cells += (
            f" {found['auc']:.2f} ± {found['standard_error']:.2f} | {rounded(found['seconds'])} |"
        )
    return f"| {kind} |{cells}"


def show(record: dict) -> str:
    lines = []
    for part in record["parts"].values():
        size = part["size"]
        lines += [
            f"{size['runs']} runs of n = {size['n']:,}, {size['permutations']} permutations a test",
            "| test | points: AUC | CPU s | radii: AUC | CPU s |",
            *(row(part, kind) for kind in part["points"]),
        ]
    lines.append("AUC: of true against false positives over all thresholds; ± one standard error")
    return "\n".join(lines)


def draw(record: dict, file: Path) -> None:
    parts = list(record["parts"].values())
    with common.figure(file, len(parts), 3, size=(11, 0.7 + 3.2 * len(parts))) as axes:
        for part, row_of_axes in zip(parts, np.reshape(axes, (-1, 3)), strict=True):
            draw_part(row_of_axes, part)


def draw_part(axes, part: dict) -> None:
    from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PURPLE

    looks = {
        "CODEC": (BLUE, "-"),
        "L-CODEC": (PURPLE, "--"),
        "T alone": (DARK, ":"),
        "CMI, k = 5": (ORANGE, "-"),
    }
    grid, n = np.linspace(0, 1, 101), f"n = {part['size']['n']:,}"
    titles = {"points": f"Points, {n}", "radii": f"Radii (known to matter), {n}"}
    for curves, what in zip(axes, titles, strict=False):
        for kind, (color, line) in looks.items():
            found = part[what].get(kind)
            if found is None:
                continue
            label = f"{kind}: {found['auc']:.2f} ± {found['standard_error']:.2f}"
            curves.plot(grid, found["curve"], line, color=color, label=label, linewidth=1.8)
        curves.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, zorder=0)
        curves.set(title=titles[what], xlabel="false members kept", ylabel="true members kept")
        curves.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        curves.legend(fontsize=8, title="area below", title_fontsize=8, **below)
    names, bars = list(looks), axes[2]
    for offset, what, alpha in ((-0.2, "points", 1.0), (0.2, "radii", 0.5)):
        known = [kind for kind in names if kind in part[what]]
        seconds = [part[what][kind]["seconds"] for kind in known]
        places = np.arange(len(known)) + offset
        bars.barh(places, seconds, 0.38, color=[looks[k][0] for k in known], alpha=alpha)
        for place, value in zip(places, seconds, strict=True):
            bars.text(value * 1.15, place, f"{rounded(value)} s", va="center", fontsize=8)
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set(xscale="log", title="CPU time of a search", xlabel="seconds (pale: radii)")
    bars.set_xlim(right=bars.get_xlim()[1] * 8)
    bars.xaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    common.main("bullseye", common.options(__doc__, None), run, draw, show)
