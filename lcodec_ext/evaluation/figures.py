"""The figures of a report. Each is a `Figure` of its own; pyplot's state is not touched."""

import io
import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from lcodec_ext.evaluation.methods import NO_OP, RETRAINED
from lcodec_ext.evaluation.records import CombinedMethod, ReportEntry, curve, watched

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, DARK, PALE = "#56B4E9", "#CC79A7", "#9A9A9A", "#222222", "#ECECEC"
_PHASES = {  # those of `unlearn`, in the order of the bars
    "perturbation": BLUE,
    "selection": ORANGE,
    "gradients": GREEN,
    "curvature": PURPLE,
    "solve": SKY,
    "repair": RED,
    "guard": "#B8A500",
    "monitoring": "#7F5B45",
}
_DASHED = (0, (3, 1.5))
_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "text.parse_math": False,  # names may have dollar signs
}
_MAX_LAYERS = 24  # rows of a figure of layers; more are put into runs of neighbours
_MAX_PANELS = 12  # methods with a histogram


def draw_all(
    methods: Sequence[CombinedMethod], ledgers: Sequence[Sequence[ReportEntry]]
) -> dict[str, bytes]:
    """PNG files by name, of those figures for which there are data."""
    with style():
        figures = {
            "figure_removals.png": removals(ledgers),
            "figure_losses.png": losses(methods),
            "figure_units.png": units(methods, ledgers),
            "figure_time.png": time(methods, ledgers),
        }
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def style() -> AbstractContextManager[None]:
    """The context in which figures are made and drawn: the same for all users."""
    return matplotlib.style.context(["default", _STYLE])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_log(axis: Axis) -> None:
    """Ticks as 0.01, 1, 100 on a logarithmic axis."""
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _short(text: str, most: int) -> str:
    """The text, without its middle if it is longer."""
    tail = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[-tail:]}"


# ---------------------------------------------------------------------------------------------
# Removals


def removals(ledgers: Sequence[Sequence[ReportEntry]]) -> Figure | None:
    """Accuracy (or what the guard watched) and gradient norm against removed samples."""
    seen = watched(ledgers)
    panels = {"Mean loss on retained samples": "loss_retain"}
    if seen is not None:
        panels = {f"{seen[0][:1].upper()}{seen[0][1:]} on {seen[1]} samples": "watched"}
    panels["Gradient norm of the retained objective"] = "gradient_norm"
    bands = {title: band([curve(one, name) for one in ledgers]) for title, name in panels.items()}
    bands = {title: found for title, found in bands.items() if found}
    if not bands:
        return None
    figure = _figure(8, 0.9 + 2.3 * len(bands))
    grid = figure.subplots(len(bands), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, points) in zip(grid, bands.items(), strict=True):
        accuracy = title.startswith("Accuracy")
        at = list(points)
        mean, low, high = zip(*points.values(), strict=True)
        marker = "o" if len(at) <= 30 else None
        axes.plot(at, mean, color=BLUE, marker=marker, markersize=3.5, clip_on=not accuracy)
        if len(ledgers) > 1:
            axes.fill_between(at, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.set_title(title)
        axes.grid(axis="y", color=PALE)
        if accuracy:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
        elif min(low) > 0 and max(high) > 10 * min(low):
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
    _mark_events(grid[0], ledgers)
    handles, labels = grid[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
    grid[-1].set_xlabel("removed samples")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    note = f"  (line: mean of {len(ledgers)} ledgers; band: lowest to highest)"
    figure.suptitle("The model after each removal" + note * (len(ledgers) > 1), x=0.01, ha="left")
    return figure


def band(curves: Sequence[Mapping[int, float]]) -> dict[int, tuple[float, float, float]]:
    """Mean, lowest and highest of curves where all have values; between points the last counts."""
    curves = [points for points in curves if points]
    known = [sorted(points) for points in curves]
    first, last = max((at[0] for at in known), default=0), min((at[-1] for at in known), default=0)
    found = {}
    for m in sorted({m for points in curves for m in points if first <= m <= last}):
        values = [
            points[at[bisect_right(at, m) - 1]] for points, at in zip(curves, known, strict=True)
        ]
        found[m] = (statistics.fmean(values), min(values), max(values))
    return found


def _mark_events(axes: Axes, ledgers: Sequence[Sequence[ReportEntry]]) -> None:
    every = [request for requests in ledgers for request in requests]
    marks = {
        "skipped by the guard": ("X", RED, {r.n_removed for r in every if r.skipped}),
        "rolled back to here": ("<", PURPLE, {r.n_removed for r in every if r.kind == "rollback"}),
        "released with noise": ("^", DARK, {r.n_removed for r in every if r.kind == "release"}),
    }
    for k, (label, (marker, colour, at)) in enumerate(marks.items()):
        if at:
            axes.plot(
                sorted(at),
                [0.04 + 0.07 * k] * len(at),
                marker,
                color=colour,
                markersize=5,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                label=label,
            )


# ---------------------------------------------------------------------------------------------
# Losses


def losses(methods: Sequence[CombinedMethod]) -> Figure | None:
    """Histograms of the losses of deleted and test samples, a panel for each method."""
    rows = [m for m in methods if m.losses.get("forget") or m.losses.get("test")]
    if not rows:
        return None
    reference = next((m.losses.get("forget", []) for m in rows if m.name == RETRAINED), [])
    rows = rows[:_MAX_PANELS]
    every = [reference, *(values for m in rows for values in m.losses.values())]
    edges, scale = _bins([loss for values in every for loss in values])
    n_columns = min(4, len(rows)) if len(rows) != 4 else 2
    n_lines = math.ceil(len(rows) / n_columns)
    figure = _figure(max(2.6 * n_columns, 5.6) + 0.4, 1.75 * n_lines + 0.7)
    grid = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    looks: dict[str, dict[str, Any]] = {
        "deleted samples": {"facecolor": ORANGE, "fill": True},
        "test samples": {"edgecolor": BLUE, "linewidth": 1.3},
        "deleted samples, retrained": {"edgecolor": DARK, "linewidth": 1.3, "linestyle": _DASHED},
    }
    for axes, method in zip(grid, rows, strict=False):
        parts = [method.losses.get("forget"), method.losses.get("test")]
        parts.append(reference if method.name != RETRAINED else None)
        for values, (label, look) in zip(parts, looks.items(), strict=True):
            if values:
                counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
                axes.stairs(counts / len(values), edges, label=label, **look)
        axes.set_title(_short(method.name, 30), fontsize=9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xscale(scale)
        if scale == "log":
            _plain_log(axes.xaxis)
    for axes in grid[len(rows) :]:
        axes.set_visible(False)
    grid[0].set_ylim(bottom=0)
    figure.legend(
        [Patch(**{"facecolor": "none", **look}) for look in looks.values()],
        list(looks),
        loc="outside upper left",
        ncols=3,
        title="Loss of single samples (height: share of the samples)",
        alignment="left",
    )
    return figure


def _bins(values: Sequence[float]) -> tuple[np.ndarray, str]:
    """Edges of 30 bins, and the scale of their axis: "log" for losses that allow it."""
    every = np.array(values)
    low, high = float(every.min()), float(every.max())
    if low < 0 or high <= 0:
        return np.linspace(low, high if high > low else low + 1, 31), "linear"
    smallest = max(float(np.quantile(every[every > 0], 0.005)), 1e-6)
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(high) + 1e-9)
    return np.logspace(first, max(last, first + 1), 31), "log"


# ---------------------------------------------------------------------------------------------
# Units


def units(
    methods: Sequence[CombinedMethod], ledgers: Sequence[Sequence[ReportEntry]]
) -> Figure | None:
    """A map of layers: the share of units that masked methods change; the number, of requests."""
    masked = [method for method in methods if method.is_masked]
    changed = _changed_units(ledgers)
    named = [layer for method in masked for layer in method.units_per_layer]
    groups = group_layers(list(dict.fromkeys([*named, *changed])))
    if not groups:
        return None
    columns: dict[str, list[tuple[float, str]]] = {}
    for method in masked:
        pairs = [[method.units_per_layer.get(k, (0, 0)) for k in members] for _, members in groups]
        sums = [(sum(c for c, _ in each), sum(of for _, of in each)) for each in pairs]
        columns[_short(method.name, 28)] = [
            (c / of, f"{c / of:.0%}") if of else (0.0, "-") for c, of in sums
        ]
    if changed:
        counts = [sum(changed.get(layer, 0) for layer in members) for _, members in groups]
        columns["requests so far"] = [(n / max(counts), f"{n:.3g} units") for n in counts]
    figure = _figure(3.6 + 0.62 * len(columns), 2.1 + 0.26 * len(groups))
    axes = figure.subplots()
    shares = np.array([[share for share, _ in cells] for cells in columns.values()]).T
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for column, cells in enumerate(columns.values()):
        for line, (share, text) in enumerate(cells):
            colour = "white" if share > 0.6 else DARK
            axes.text(column, line, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(columns)), list(columns), rotation=45, ha="left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(groups)), [label for label, _ in groups])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("share of the layer's units that is changed")
    return figure


def _changed_units(ledgers: Sequence[Sequence[ReportEntry]]) -> dict[str, float]:
    """How many units of each layer requests have changed; empty if all have changed all."""
    removals = [(k, r) for k, one in enumerate(ledgers) for r in one if r.kind == "remove"]
    found: dict[str, set[tuple[int, int]]] = {}
    whole = True
    for k, request in removals:
        chosen = request.units or {}
        whole &= sum(map(len, chosen.values())) == request.result.get("n_units")
        for layer, numbers in chosen.items():
            found.setdefault(layer, set()).update((k, number) for number in numbers)
    if whole:
        return {}
    return {layer: len(pairs) / len(ledgers) for layer, pairs in found.items() if pairs}


def group_layers(layers: Sequence[str], most: int = _MAX_LAYERS) -> list[tuple[str, list[str]]]:
    """Rows of at most `most` layers, or runs of neighbours, with their labels."""
    runs = [[layer] for layer in layers]
    if len(layers) > most:
        runs = [list(run) for run in np.array_split(np.array(layers, dtype=object), most)]
    return [
        (_tail(run[0], 38) if len(run) == 1 else f"{_tail(run[0], 18)} … {_tail(run[-1], 18)}", run)
        for run in runs
    ]


def _tail(name: str, most: int) -> str:
    """The end of a module's name, which tells it from its neighbours."""
    if not name:
        return "(model)"
    return name if len(name) <= most else "…" + name[1 - most :]


# ---------------------------------------------------------------------------------------------
# Time


def time(
    methods: Sequence[CombinedMethod], ledgers: Sequence[Sequence[ReportEntry]]
) -> Figure | None:
    """How the time of each method, and of the requests of each ledger, divides among phases."""
    splits = {_short(m.name, 32): m.phases for m in methods if m.name not in (NO_OP, RETRAINED)}
    for k, requests in enumerate(ledgers):
        timed = [request.phases for request in requests if request.asks and request.phases]
        name = f"{len(timed)} requests" + f" of ledger {k}" * (len(ledgers) > 1)
        splits[name] = {
            phase: sum(split.get(phase, 0.0) for split in timed)
            for phase in dict.fromkeys(key for split in timed for key in split)
        }
    splits = {name: split for name, split in splits.items() if sum(split.values()) > 0}
    if not splits:
        return None
    known = [phase for phase in _PHASES if any(phase in split for split in splits.values())]
    totals = np.array([sum(split.values()) for split in splits.values()])
    figure = _figure(8, 1.3 + 0.32 * len(splits))
    axes = figure.subplots()
    left = np.zeros(len(splits))
    for phase in [*known, "other"]:
        seconds = [
            split.get(phase, 0.0)
            if phase in known
            else sum(value for key, value in split.items() if key not in known)
            for split in splits.values()
        ]
        if any(seconds):
            widths = np.array(seconds) / totals
            bars = axes.barh(
                range(len(splits)), widths, left=left, color=_PHASES.get(phase, GREY), label=phase
            )
            texts = [f"{width:.0%}" if width >= 0.05 else "" for width in widths]
            axes.bar_label(bars, texts, label_type="center", fontsize=8)
            left += widths
    for row, total in enumerate(totals):
        axes.annotate(
            f"{total:.3g} s", (1, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(splits)), list(splits))
    axes.set_ylim(len(splits) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5, title="Where the time went", alignment="left")
    return figure
