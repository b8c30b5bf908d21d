"""Which attributes of a face does each attribute depend on? Exact FOCI against randomised L-FOCI.

The paper takes 20,000 faces of CelebA with 40 attributes, -1 or 1, and selects for each attribute
among the other 39. The rows have countless ties, which its code cannot average. It adds noise
instead (L-FOCI), and saves time by it. This package averages ties exactly. The script measures what
that costs, and how far selections agree: exact ones for all attributes, those with noise for some,
with two seeds, and on other rows. Attributes are generated, in CelebA's layout and with its
frequencies, unless --data has the real ones. It takes about 10 seconds, and with --full about two
minutes.
"""

import time
import warnings
from pathlib import Path

import attributes_data
import common
import numpy as np
import peers
from numpy.typing import NDArray

from lcodec_ext import codec, foci, lfoci

EXACT, TESTED = "exact", "exact, by a test"
NOISE = (0.001, 0.01, 0.1)
BETWEEN = 0.01  # the noise of selections on other rows, and without a limit of columns
SIZES = {  # rows, most columns, seeds; attributes compared with noise, without a limit, published
    False: {"rows": 2000, "columns": 4, "seeds": 2, "noisy": 8, "whole": 1, "published": 1},
    True: {"rows": 20_000, "columns": 4, "seeds": 2, "noisy": 10, "whole": 1, "published": 1},
}


def select(table: NDArray, k: int, noise: float, seed: int, most: int | None):
    """Columns selected for attribute k among the others, as attributes, and CPU seconds."""
    others = np.delete(np.arange(table.shape[1]), k)
    X, y = table[:, others], table[:, k]
    began = time.process_time()
    if noise == 0:  # all columns share their unit, so none is scaled
        found = foci(X, y, max_features=most, standardize=None)
    else:
        found = lfoci(X, y, noise=noise, seed=seed, max_features=most, standardize=None)
    seconds = time.process_time() - began
    return others[found.ordering].tolist(), seconds


def jaccard(one: list[int], other: list[int]) -> float:
    """Share of common columns among all that either has."""
    union = set(one) | set(other)
    return len(set(one) & set(other)) / len(union) if union else 1.0


def told(table: NDArray, k: int, columns: list[int]) -> float:
    """T of attribute k and the selected ones, on rows that did not select them."""
    return codec(table[:, k], table[:, columns]) if columns else 0.0


def responses(count: int, table: NDArray) -> list[int]:
    """So many attributes, spread evenly over those that are not constant."""
    usable = np.flatnonzero(table.min(axis=0) < table.max(axis=0))
    places = np.linspace(0, len(usable), min(count, len(usable)), endpoint=False)
    return usable[places.astype(int)].tolist()


def exactly(table: NDArray, other: NDArray, k: int, most: int) -> dict:
    """The exact selection for one attribute, and that of other rows."""
    columns, seconds = select(table, k, 0, 0, most)
    there, _ = select(other, k, 0, 0, most)
    return {
        "columns": [columns],
        "seconds": seconds,
        "on other rows": jaccard(columns, there),
        "T": told(other, k, columns),
    }


def one_attribute(table: NDArray, other: NDArray, k: int, size: dict, seed: int) -> dict:
    """Every method's selection for one attribute, compared with the exact one."""
    most = size["columns"]
    found: dict = {EXACT: exactly(table, other, k, most)}
    exact = found[EXACT]["columns"][0]
    for number, noise in enumerate(NOISE):  # every level draws its own
        seeds = [1000 * seed + 10 * number + s for s in range(size["seeds"] + 1)]
        sets, times = zip(*(select(table, k, noise, s, most) for s in seeds[:-1]), strict=True)
        one = found[f"noise {noise:g}"] = {
            "columns": list(sets),
            "seconds": float(np.mean(times)),
            "with the exact": float(np.mean([jaccard(exact, of) for of in sets])),
            "between seeds": jaccard(*sets[:2]),
            "T": float(np.mean([told(other, k, of) for of in sets])),
        }
        if noise == BETWEEN:
            there, _ = select(other, k, noise, seeds[-1], most)
            one["on other rows"] = jaccard(sets[0], there)
    return found


def without_a_limit(table: NDArray, other: NDArray, k: int, seed: int) -> dict:
    """Selections that end by themselves: where nothing gains, or by a permutation test."""
    found: dict = {}
    for method, noise in ((EXACT, 0.0), (f"noise {BETWEEN:g}", BETWEEN), (TESTED, 0.0)):
        if method == TESTED:
            columns, seconds = tested(table, k, seed)
        else:
            columns, seconds = select(table, k, noise, 1000 * seed, None)
        found[method] = {
            "columns": len(columns), "seconds": seconds, "T": told(other, k, columns)
        }  # fmt: skip
    return found


def tested(table: NDArray, k: int, seed: int) -> tuple[list[int], float]:
    others = np.delete(np.arange(table.shape[1]), k)
    began = time.process_time()
    with warnings.catch_warnings():  # that late steps are approximate
        warnings.simplefilter("ignore", UserWarning)
        found = foci(table[:, others], table[:, k], standardize=None, stop="permutation",
                     n_permutations=99, seed=seed)  # fmt: skip
    return others[found.ordering].tolist(), time.process_time() - began


def published(table: NDArray, k: int, steps: int) -> float:
    """CPU seconds of the published algorithm's selection, from one candidate of each step."""
    import torch

    noisy = table + BETWEEN * np.random.default_rng(k).standard_normal(table.shape)
    columns = torch.as_tensor(np.delete(noisy, k, axis=1)).float()
    y = torch.as_tensor(noisy[:, k]).float()
    total, p = 0.0, columns.shape[1]
    with peers.torch_threads(1):
        for given in range(steps):
            began = time.process_time()
            peers.published_gains(columns, y, range(given), [given])
            total += (p - given) * (time.process_time() - began)
    return total


def mean(values: list[float]) -> list[float]:
    """Mean and its standard error over attributes."""
    several = len(values) > 1
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if several else float("nan")
    return [float(np.mean(values)), float(error) if several else 0.0]


def run(options) -> dict:
    size = SIZES[options.full]
    names, table, other = attributes_data.halves(options.data, size["rows"], options.seed)
    chosen = responses(size["noisy"], table)
    every = [
        exactly(table, other, k, size["columns"])
        for k in common.progress(responses(len(names), table), EXACT, "attribute")
    ]
    each = {
        names[k]: one_attribute(table, other, k, size, options.seed)
        for k in common.progress(chosen, "selections", "attribute")
    }
    methods: dict = {}
    for method in (EXACT, *(f"noise {noise:g}" for noise in NOISE)):
        of = [found[method] for found in each.values()]
        methods[method] = {key: mean([one[key] for one in of]) for key in of[0] if key != "columns"}
        methods[method]["columns"] = mean([len(one) for found in of for one in found["columns"]])
    whole = [
        {"attribute": names[k]} | without_a_limit(table, other, k, options.seed)
        for k in common.progress(responses(size["whole"], table), "no limit", "attribute")
    ]
    some = common.progress(responses(size["published"], table), "published", "attribute")
    cost = mean([published(table, k, size["columns"]) for k in some])
    return {
        "size": size,
        "rows": [len(table), len(other)],
        "distinct_rows": len(np.unique(table, axis=0)),
        "all_attributes": {
            key: mean([one[key] for one in every]) for key in ("seconds", "on other rows", "T")
        },
        "attributes": len(every),
        "methods": methods,
        "published_seconds": cost,
        "published_ratio": cost[0] / methods[EXACT]["seconds"][0],
        "without_a_limit": whole,
        "each": {
            name: {method: one["columns"] for method, one in found.items()}
            for name, found in each.items()
        },
    }


def show(record: dict) -> str:
    size, rows = record["size"], record["rows"][0]
    keys = ("seconds", "with the exact", "between seeds", "on other rows", "T")
    heads = ("CPU s", "with the exact", "between seeds", "on other rows", "T on other rows")
    lines = [
        f"{rows:,} rows, {record['distinct_rows']:,} of them distinct; "
        f"{len(record['each'])} attributes, {size['columns']} columns at most",
        f"{'':12}{'columns':>9}" + "".join(f"{head:>17}" for head in heads),
    ]
    for method, found in record["methods"].items():
        cells = "".join(
            f"{found[key][0]:>10.3f} ± {found[key][1]:.2f}" if key in found else f"{'-':>17}"
            for key in keys
        )
        lines.append(f"{method:<12}{found['columns'][0]:>9.1f}{cells}")
    of_all = record["all_attributes"]
    lines.append(
        f"exact, all {record['attributes']} attributes: {of_all['seconds'][0]:.3f} CPU s each, "
        f"{of_all['on other rows'][0]:.2f} on other rows, T {of_all['T'][0]:.3f}"
    )
    lines.append(
        f"published algorithm: about {record['published_seconds'][0]:,.0f} CPU s an attribute, "
        f"{record['published_ratio']:,.0f} times the exact one's"
    )
    for one in record["without_a_limit"]:
        parts = (
            f"{method} {found['columns']} columns, {found['seconds']:.2f} s, T {found['T']:.3f}"
            for method, found in one.items()
            if method != "attribute"
        )
        lines.append(f"without a limit, {one['attribute']}: {'; '.join(parts)}")
    lines.append(
        "Columns 4 to 6: common columns as a share of those in either selection.\n"
        "T on other rows: what the selected columns tell. ± one standard error over attributes"
    )
    return "\n".join(lines)


def draw(record: dict, file: Path) -> None:
    from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PURPLE

    methods = record["methods"]
    with common.figure(file, columns=3, size=(10.5, 3.2)) as (left, middle, right):
        times = {method: found["seconds"] for method, found in methods.items()}
        times["published\nalgorithm"] = record["published_seconds"]
        places, values = range(len(times)), [value for value, _ in times.values()]
        colors = [BLUE, *[ORANGE] * len(NOISE), DARK]
        left.barh(places, values, 0.65, color=colors)
        for place, value in zip(places, values, strict=True):
            left.text(value * 1.3, place, f"{value:,.2g} s" if value < 10 else f"{value:,.0f} s",
                      va="center")  # fmt: skip
        left.set_yticks(places, list(times))
        left.invert_yaxis()
        left.set(xscale="log", title="CPU time of an attribute", xlabel="seconds")
        left.set_xlim(min(values) / 3, max(values) * 30)
        left.xaxis.set_major_formatter("{x:g}")

        noisy, looks = list(methods)[1:], {"with the exact": BLUE, "between seeds": ORANGE}
        for offset, (key, color) in zip((-0.08, 0.08), looks.items(), strict=True):
            points = np.array([methods[method][key] for method in noisy])
            middle.errorbar(np.arange(len(noisy)) + offset, points[:, 0], points[:, 1], fmt="o",
                            color=color, capsize=3, label=key)  # fmt: skip
        middle.axhline(1, color=PURPLE, linewidth=1.2, label="exact: no seed")
        middle.set_xticks(range(len(noisy)), noisy)
        middle.set(title="Agreement of selections", ylabel="common columns (Jaccard)")
        middle.set(ylim=(0, 1.05), xlim=(-0.5, len(noisy) - 0.5))
        middle.legend(loc="center right", bbox_to_anchor=(1, 0.75))

        points = np.array([found["T"] for found in methods.values()])
        right.bar(range(len(methods)), points[:, 0], 0.6, color=colors[:-1])
        for place, value in enumerate(points[:, 0]):
            right.text(place, value + 0.005, f"{value:.3f}", ha="center")
        right.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods])
        right.set(title="What the selected columns tell", ylabel="T on other rows, mean")


if __name__ == "__main__":
    common.main(
        "attributes",
        common.options(__doc__, f"{attributes_data.FILES[0]} or {attributes_data.FILES[1]}"),
        run,
        draw,
        show,
    )
