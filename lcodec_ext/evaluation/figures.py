"""The figures of a report. Each is a `Figure` of its own; pyplot's state is not touched."""

import io
import math
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
from lcodec_ext.evaluation.records import (
    CombinedMethod,
    ReportLedger,
    as_number,
    curve,
    finite_of,
    standing,
    watched,
)

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, RED = "#0072B2", "#E69F00", "#D55E00"
PURPLE, DARK, PALE = "#CC79A7", "#222222", "#ECECEC"
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
_MAX_PANELS = 5  # methods with a histogram
_LOOKS: dict[str, dict[str, Any]] = {
    "deleted samples": {"facecolor": ORANGE, "fill": True},
    "test samples": {"edgecolor": BLUE, "linewidth": 1.3},
    "deleted samples, retrained": {"edgecolor": DARK, "linewidth": 1.3, "linestyle": _DASHED},
}


def draw_all(
    methods: Sequence[CombinedMethod],
    ledgers: Sequence[ReportLedger],
    delivered: str | None = None,
) -> dict[str, bytes]:
    """PNG files by name, of those figures for which there are data; a table shows one removal."""
    streams = [one for one in ledgers if sum(r.kind == "remove" for r in one) > 1]
    with style():
        figures = {
            "figure_losses.png": losses(methods, ledgers, delivered),
            "figure_removals.png": removals(streams),
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


def removals(ledgers: Sequence[ReportLedger]) -> Figure | None:
    """Accuracy (or what the guard watched) and gradient norm against removed samples."""
    seen = watched(ledgers)
    panels = {"Mean loss on retained samples": "loss_retain"}
    if seen is not None:
        panels = {f"{seen[0][:1].upper()}{seen[0][1:]} on {seen[1]} samples": "watched"}
    panels["Gradient norm of the retained objective"] = "gradient_norm"
    lines = {title: [curve(one, name) for one in ledgers] for title, name in panels.items()}
    lines = {title: curves for title, curves in lines.items() if any(curves)}
    if not lines:
        return None
    figure = _figure(8, 0.9 + 2.3 * len(lines))
    grid = figure.subplots(len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(grid, lines.items(), strict=True):
        accuracy = title.startswith("Accuracy")
        for points in curves:
            marker = "o" if len(points) <= 30 else None
            look = {"alpha": 1 if len(ledgers) == 1 else 0.5, "clip_on": not accuracy}
            axes.plot(*zip(*points.items(), strict=True), color=BLUE, marker=marker, ms=3.5, **look)
        values = [value for points in curves for value in points.values()]
        axes.set_title(title)
        axes.grid(axis="y", color=PALE)
        if accuracy:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
        elif min(values) > 0 and max(values) > 10 * min(values):
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
    _mark_events(grid[0], ledgers)
    handles, labels = grid[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
    grid[-1].set_xlabel("removed samples")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    note = f"  ({len(ledgers)} ledgers, a line each)"
    figure.suptitle("The model after each removal" + note * (len(ledgers) > 1), x=0.01, ha="left")
    return figure


def _mark_events(axes: Axes, ledgers: Sequence[ReportLedger]) -> None:
    every = [request for requests in ledgers for request in requests]
    marks = {
        "skipped by the guard": ("X", RED, {r.n_removed for r in every if r.skipped}),
        "rolled back to here": ("<", PURPLE, {r.n_removed for r in every if r.kind == "rollback"}),
        "released with noise": ("^", DARK, {r.n_removed for r in every if r.kind == "release"}),
    }
    look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
    for k, (label, (marker, colour, at)) in enumerate(marks.items()):
        if at:
            height = [0.04 + 0.07 * k] * len(at)
            axes.plot(sorted(at), height, marker, color=colour, label=label, ms=5, **look)


# ---------------------------------------------------------------------------------------------
# Losses


def losses(
    methods: Sequence[CombinedMethod],
    ledgers: Sequence[ReportLedger] = (),
    delivered: str | None = None,
) -> Figure | None:
    """Losses of single samples before, delivered and retrained; and of control groups."""
    rows = [m for m in methods if m.losses.get("forget") or m.losses.get("test")]
    reference = next((m.losses.get("forget", []) for m in rows if m.name == RETRAINED), [])
    if delivered is not None:
        rows = [m for m in rows if m.name in (NO_OP, delivered, RETRAINED)]
    rows = rows if len(rows) <= _MAX_PANELS else [*rows[: _MAX_PANELS - 1], rows[-1]]
    found = _calibration(ledgers)
    control = [finite_of(found.get(f"control_{when}")) for when in ("before", "after")]
    n = len(rows) + any(control)
    if not n:
        return None
    every = [reference, *control, *(values for m in rows for values in m.losses.values())]
    edges, scale = _bins([loss for values in every for loss in values])
    n_columns = min(2, n)
    n_lines = math.ceil(n / n_columns)
    figure = _figure(max(3.6 * n_columns, 5.6) + 0.4, 1.75 * n_lines + 0.7)
    grid = figure.subplots(n_lines, n_columns, sharex=True, squeeze=False).ravel()
    for axes, method in zip(grid, rows, strict=False):
        parts = [method.losses.get("forget"), method.losses.get("test")]
        parts.append(reference if method.name != RETRAINED else None)
        for values, (label, look) in zip(parts, _LOOKS.items(), strict=True):
            if values:
                counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
                axes.stairs(counts / len(values), edges, label=label, **look)
        axes.set_title(_short(method.name, 30) + " (delivered)" * (method.name == delivered))
        axes.set_yticks([])
    top = max((axes.get_ylim()[1] for axes in grid[: len(rows)]), default=1)
    for axes in grid:
        axes.set_ylim(0, top)
        axes.spines["left"].set_visible(False)
        axes.set_xscale(scale)
        if scale == "log":
            _plain_log(axes.xaxis)
    if any(control):
        _groups(grid[len(rows)], control, as_number(found.get("validation_before")))
    for axes in grid[n:]:
        axes.set_visible(False)
    figure.legend(
        [Patch(**{"facecolor": "none", **look}) for look in _LOOKS.values()],
        list(_LOOKS),
        loc="outside upper left",
        ncols=3,
        title="Loss of single samples (height: share of the samples)",
        alignment="left",
    )
    return figure


def _calibration(ledgers: Sequence[ReportLedger]) -> Mapping[str, Any]:
    """That of the last request that stands and has one."""
    every = [r for one in ledgers for r in standing(one) if r.kind == "remove" and r.calibration]
    return every[-1].calibration if every else {}


def _groups(axes: Axes, control: Sequence[Sequence[float]], validation: float | None) -> None:
    """Mean losses of control groups, before and after their virtual deletion."""
    for line, values in enumerate(control):
        fill = BLUE if line else "none"
        axes.plot(values, [line] * len(values), "o", color=BLUE, markerfacecolor=fill)
    if validation is not None:
        axes.axvline(validation, color=RED, linewidth=1.3)
        axes.text(validation, 0.5, " never seen", color=RED, va="center")
    axes.set_yticks([0, 1], ["before", "after"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(1.6, -0.6)
    axes.set_title("control groups, mean losses")


def _bins(values: Sequence[float]) -> tuple[np.ndarray, str]:
    """Edges of 30 bins, and the scale of their axis: "log" for losses that allow it."""
    every = np.array(values)
    low, high = float(every.min()), float(every.max())
    if low < 0 or high <= 0:
        return np.linspace(low, high if high > low else low + 1, 31), "linear"
    smallest = max(float(np.quantile(every[every > 0], 0.005)), 1e-6)
    first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(high) + 1e-9)
    return np.logspace(first, max(last, first + 1), 31), "log"
