"""Plot cost against columns and rows from a result file.

    python benchmarks/plots.py benchmarks/results/cost.json

The exponents in the legend are fitted to the upper half of the sizes (on the logarithmic axis),
where fixed costs no longer matter. The script needs Matplotlib.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from results import OURS, load

ROOT = Path(__file__).resolve().parent.parent
STYLE = {  # short name, marker and line
    OURS: (OURS, "o-"),
    "published algorithm": ("published algorithm", "s:"),
    "k-d tree per candidate, ties drawn": ("k-d tree per candidate", "^--"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/cost.png")
    options = parser.parse_args(arguments)
    draw(load(options.result), options.output)
    return 0


def draw(result: dict[str, Any], output: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6), layout="constrained")
    columns = result["cases"]["cost_columns"]
    for index, name in enumerate(STYLE):
        add_line(left, columns, name, "", f"C{index}")
    add_bound(left, columns, "", "C0")
    left.set(xlabel="columns p", title=columns["points"][0]["title"])
    for name in STYLE:
        for k in (1, 2, 3):
            add_line(right, result["cases"][f"cost_rows_{k}"], name, f"k = {k}, ", f"C{k - 1}")
    for k in (1, 2, 3):
        add_bound(right, result["cases"][f"cost_rows_{k}"], f"k = {k}, ", f"C{k - 1}")
    p = result["cases"]["cost_rows_1"]["points"][0]["size"]["p"]
    right.set(xlabel="rows n", title=f"FOCI, the step after k selected columns, p = {p}")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", ylabel="seconds")
        axes.grid(which="major", alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11)}
        axes.legend(fontsize=9, ncols=2 if axes is right else 1, frameon=False, **below)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def add_line(axes: Axes, case: dict[str, Any], name: str, prefix: str, color: str) -> None:
    """Plot the times of one implementation over a sweep, if it took part."""
    taken = [
        (point["size"][case["sweep"]], point["results"][name]["seconds"])
        for point in case["points"]
        if name in point["results"]
    ]
    if not taken:
        return
    sizes, seconds = np.array(taken).T
    short, style = STYLE[name]
    label = f"{prefix}{short}: ${case['sweep']}^{{{exponent(sizes, seconds):.2f}}}$"
    alpha = 1.0 if name == OURS else 0.45
    axes.plot(sizes, seconds, style, color=color, label=label, alpha=alpha, markersize=4)


def add_bound(axes: Axes, case: dict[str, Any], prefix: str, color: str) -> None:
    """Plot the counted instructions of the scans, at the rate at which the machine issues them."""
    sizes = [point["size"][case["sweep"]] for point in case["points"]]
    seconds = [point["metrics"]["scan_bound_seconds"] for point in case["points"]]
    label = f"{prefix}counted bound of the scans"
    axes.plot(sizes, seconds, ":", color=color, label=label, linewidth=1)


def exponent(sizes: np.ndarray, seconds: np.ndarray) -> float:
    """Fit the slope of the logarithms over the upper half of the sizes (at least two)."""
    upper = sizes >= min(np.sqrt(sizes.min() * sizes.max()), np.sort(sizes)[-2])
    return float(np.polyfit(np.log(sizes[upper]), np.log(seconds[upper]), 1)[0])


if __name__ == "__main__":
    sys.exit(main())
