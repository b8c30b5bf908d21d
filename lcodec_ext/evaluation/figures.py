"""The figures of a report. Each is a `Figure` of its own; pyplot's state is not touched."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from lcodec_ext.evaluation.report_data import (
    MINUS_LOSS,
    RETRAINED,
    Band,
    Comparison,
    Method,
    Request,
    Stat,
    band,
    curve,
    detours,
    guarded,
)
from lcodec_ext.evaluation.report_text import duration, percent, sentence_case, shorten

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, DARK, PALE = "#56B4E9", "#CC79A7", "#9A9A9A", "#222222", "#ECECEC"
OLIVE, BROWN = "#B8A500", "#7F5B45"
_PHASES = {  # those of `unlearn`, in the order of the bars
    "perturbation": BLUE,
    "selection": ORANGE,
    "gradients": GREEN,
    "curvature": PURPLE,
    "solve": SKY,
    "repair": RED,
    "guard": OLIVE,
    "monitoring": BROWN,
}

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
}

_MAX_LAYERS = 24  # rows of a figure of layers; more are put into groups
_MAX_BARS = 40  # requests that have a bar each; more are averaged in groups
_MAX_PANELS = 12  # methods with a histogram
_MAX_COLUMNS = 4  # methods with bars for every layer; more become a map of colours
_ROLLED_BACK = "rolled back since"
_TOP_GAP, _BOTTOM_GAP = 1.15, -0.5  # limits of the axis of closed gaps

GAPS = {
    "js_forget": "outputs on deleted samples\n(Jensen-Shannon distance)",
    "loss_forget": "loss on deleted samples",
    "mia_auc": "membership inference (AUC)",
    "js_test": "outputs on test samples\n(Jensen-Shannon distance)",
}


def draw_all(
    comparison: Comparison | None, ledgers: Sequence[Sequence[Request]]
) -> dict[str, bytes]:
    """PNG files by name, of those figures for which there are data."""
    with style():
        figures: dict[str, Figure | None] = {}
        if comparison is not None:
            figures["figure_gap.png"] = gap(comparison)
            figures["figure_methods.png"] = methods(comparison)
            figures["figure_losses.png"] = losses(comparison)
            figures["figure_units.png"] = units(comparison)
            figures["figure_time.png"] = time(comparison)
        if ledgers:
            figures["figure_removals.png"] = removals(ledgers)
            figures["figure_request_units.png"] = request_units(ledgers)
            figures["figure_request_time.png"] = request_time(ledgers)
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


def _widen(figure: Figure) -> None:
    """Keep tick labels of neighbouring panels apart."""
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(w_pad=0.1)


def plain(text: str) -> str:
    """The text as it is, without mathematics between dollar signs."""
    return text.replace("$", r"\$")


def _percent_tick(share: float) -> str:
    return f"{100 * share:.10g}%"


def group_layers(layers: Sequence[str], most: int = _MAX_LAYERS) -> list[tuple[str, list[str]]]:
    """Rows of at most `most` layers or groups of neighbours, with their labels.

    Groups are the modules that contain the layers, at the greatest depth that gives few enough;
    where the names do not nest that way, runs of neighbours of about the same length.
    """
    if len(layers) <= most:
        return [(layer, [layer]) for layer in layers]
    for depth in range(max(layer.count(".") for layer in layers), 0, -1):
        groups: list[tuple[str, list[str]]] = []
        for layer in layers:
            prefix = ".".join(layer.split(".")[:depth])
            if groups and groups[-1][0] == prefix:
                groups[-1][1].append(layer)
            else:
                groups.append((prefix, [layer]))
        if most // 4 <= len(groups) <= most:
            return [
                (found[0] if len(found) == 1 else f"{prefix}.* ({len(found)} layers)", found)
                for prefix, found in groups
            ]
    runs = [list(run) for run in np.array_split(np.array(layers, dtype=object), most)]
    return [(run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}", run) for run in runs]


def _layer_label(label: str) -> str:
    if " … " in label:
        return plain(" … ".join(_tail(name, 20) for name in label.split(" … ")))
    return plain(_tail(label or "(model)", 38))


def _tail(name: str, most: int) -> str:
    """The end of a module's name, which tells it from its neighbours, from a dot if it can be."""
    if len(name) <= most:
        return name
    end = name[1 - most :]
    dot = end.find(".")
    return "…" + (end[dot + 1 :] if 0 <= dot <= most // 2 else end)


# --- streams of requests -------------------------------------------------------------------------


def removals(ledgers: Sequence[Sequence[Request]]) -> Figure | None:
    """Accuracy and gradient norm of the model against the number of removed samples."""

    def of(name: str) -> Band:
        return band([curve(requests, name) for requests in ledgers])

    where = {
        "validation" if requests[0].record.get("validation") else "retained" for requests in ledgers
    }
    on = f"on {' or '.join(sorted(where))} samples"
    watched, guard = guarded(ledgers), of("guard")
    panels: list[tuple[str, Band, str]] = []
    if watched == MINUS_LOSS and guard.removed:
        swapped = ([-y for y in values] for values in (guard.mean, guard.high, guard.low))
        panels.append((f"Mean loss {on}", Band(guard.removed, *swapped), "guard"))
    elif watched is not None and guard.removed:
        panels.append((f"{sentence_case(watched)} {on}", guard, "guard"))
    else:
        panels.append(("Mean loss on retained samples", of("loss_retain"), "loss_retain"))
    norm = "gradient_norm"
    panels.append(("Gradient norm of the retained objective", of(norm), norm))
    panels = [panel for panel in panels if panel[1].removed]
    if not panels:
        return None

    figure = _figure(8, 0.6 + 2.4 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines, name) in zip(grid, panels, strict=True):
        accuracy = title.startswith("Accuracy")
        axes.plot(
            lines.removed,
            lines.mean,
            color=BLUE,
            marker="o" if len(lines.removed) <= 30 else None,
            markersize=3.5,
            clip_on=not accuracy,  # whose limit may go through points
            zorder=3,
        )
        sign = -1 if name == "guard" and watched == MINUS_LOSS else 1
        back = [points for requests in ledgers for points in detours(requests, name)]
        heights = [sign * y for points in back for _, y in points]
        for k, points in enumerate(back):
            axes.plot(
                [m for m, _ in points],
                [sign * y for _, y in points],
                color=GREY,
                linestyle=(0, (3, 2)),
                linewidth=1,
                marker="o" if len(back) <= 30 else None,
                markersize=2.5,
                clip_on=not accuracy,
                label="_" if k else _ROLLED_BACK,
            )
        if len(ledgers) > 1:
            axes.fill_between(
                lines.removed, lines.low, lines.high, color=BLUE, alpha=0.2, linewidth=0
            )
        axes.set_title(title)
        axes.grid(axis="y", color=PALE)
        if accuracy:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _percent_tick(y)))
            axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
        else:
            _log_if_wide(axes, [*lines.low, *heights], [*lines.high, *heights])
    grid[-1].set_xlabel("removed samples")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_events(figure, grid[0], ledgers)
    note = f"line: mean of {len(ledgers)} ledgers; band: lowest to highest"
    figure.suptitle(
        "The model after each removal" + (f"  ({note})" if len(ledgers) > 1 else ""),
        x=0.01,
        ha="left",
    )
    return figure


def _log_if_wide(axes: Axes, low: Sequence[float], high: Sequence[float]) -> None:
    if min(low) > 0 and max(high) > 10 * min(low):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        wide = max(high) > 100 * min(low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())


def _mark_events(figure: Figure, axes: Axes, ledgers: Sequence[Sequence[Request]]) -> None:
    marks = {
        "skip": ("X", RED, "request skipped"),
        "part": ("X", ORANGE, "request skipped in part"),
        "rollback": ("<", PURPLE, "rolled back to here"),
        "release": ("^", DARK, "released with noise"),
    }
    found: dict[str, set[int]] = {kind: set() for kind in marks}
    for request in (request for requests in ledgers for request in requests):
        kind = "part" if request.kind == "remove" and request.skipped else request.kind
        if kind in found:
            found[kind].add(request.n_removed)
    for kind, (marker, colour, label) in marks.items():
        at = sorted(found[kind])
        if at:
            axes.plot(
                at,
                [0.03] * len(at),
                marker,
                color=colour,
                markersize=6 if len(at) <= 30 else 4,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=5,
                label=label,
            )
    handles, labels = axes.get_legend_handles_labels()
    known = {label for _, _, label in marks.values()} | {_ROLLED_BACK}
    chosen = [(h, text) for h, text in zip(handles, labels, strict=True) if text in known]
    if chosen:
        figure.legend(
            [h for h, _ in chosen],
            [text for _, text in chosen],
            loc="outside lower left",
            ncols=3 if len(chosen) == 5 else len(chosen),
            columnspacing=1.2,
            handletextpad=0.4,
        )


def request_units(ledgers: Sequence[Sequence[Request]]) -> Figure | None:
    """How many units of each layer the requests have changed, unless all have changed all."""
    n_requests = n_whole = 0
    changed: list[dict[str, set[int]]] = []
    uses: dict[str, int] = {}
    for requests in ledgers:
        union: dict[str, set[int]] = {}
        for request in requests:
            if request.kind == "remove" and request.units is not None:
                n_requests += 1
                n_chosen = sum(map(len, request.units.values()))
                n_whole += n_chosen == request.result.get("n_units")
                for layer, chosen in request.units.items():
                    union.setdefault(layer, set()).update(chosen)
                    uses[layer] = uses.get(layer, 0) + bool(chosen)
        changed.append(union)
    layers = [layer for layer in uses if uses[layer]]
    if not layers or n_whole == n_requests:
        return None
    rows = group_layers(layers)
    values = [
        sum(len(union.get(layer, ())) for union in changed for layer in members) / len(ledgers)
        for _, members in rows
    ]
    figure = _figure(7.5, 1.0 + 0.27 * len(rows))
    axes = figure.subplots()
    axes.barh(range(len(rows)), values, color=BLUE)
    explained = n_requests > 1 and len(rows) == len(layers)
    for row, ((_, members), value) in enumerate(zip(rows, values, strict=True)):
        text = f" {value:.3g}"
        if explained and len(members) == 1:
            text += f"  (selected in {uses[members[0]]} of {n_requests} requests)"
        axes.annotate(text, (value, row), va="center", color=DARK)
    _layer_axis(axes, rows)
    axes.tick_params(axis="y", length=0)
    ticks = MaxNLocator(5, integer=True).tick_values(0, max(values))
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= max(values)])
    axes.set_xlim(0, max(values) * (1.75 if explained else 1.15))  # room for the texts
    axes.set_title("Units changed so far, by layer")
    axes.set_xlabel("different units" + (f" (mean of {len(ledgers)} ledgers)" * (len(ledgers) > 1)))
    return figure


def _layer_axis(axes: Axes, rows: Sequence[tuple[str, list[str]]]) -> None:
    axes.set_yticks(range(len(rows)), [_layer_label(label) for label, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def request_time(ledgers: Sequence[Sequence[Request]]) -> Figure | None:
    """Seconds of each request, by phase, in the order of the requests."""
    columns: list[list[dict[str, float]]] = []
    for requests in ledgers:
        timed = [request for request in requests if request.asks and request.phases]
        for k, request in enumerate(timed):
            if k == len(columns):
                columns.append([])
            columns[k].append(request.phases)
    if not columns:
        return None
    size = math.ceil(len(columns) / _MAX_BARS)
    groups = [
        [split for column in columns[k : k + size] for split in column]
        for k in range(0, len(columns), size)
    ]
    means = [
        {
            phase: sum(split.get(phase, 0.0) for split in group) / len(group)
            for phase in dict.fromkeys(key for split in group for key in split)
        }
        for group in groups
    ]
    phases = _rank_phases(means)
    means = [_merge_phases(split, phases) for split in means]
    figure = _figure(8, 3.2)
    axes = figure.subplots()
    starts = np.arange(len(groups)) * size + 1
    centres = starts + (size - 1) / 2
    bottom = np.zeros(len(groups))
    for phase, colour in phases.items():
        heights = np.array([split.get(phase, 0.0) for split in means])
        axes.bar(
            centres,
            heights,
            width=0.82 * size,
            bottom=bottom,
            color=colour,
            label=plain(phase),
        )
        bottom += heights
    top = float(bottom.max())
    factor, unit = (1000, "ms") if top < 0.1 else (1, "s") if top < 120 else (1 / 60, "min")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * factor:g}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=PALE)
    if len(groups) == 1:
        axes.set(xlim=(-1.5, 3.5), xticks=[1])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_xlabel("request" + (f" (bars: means of {size})" if size > 1 else ""))
    axes.set_ylabel(f"time ({unit})")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right upper", handlelength=1, handleheight=1
    )
    many = f", mean of {len(ledgers)} ledgers" if len(ledgers) > 1 else ""
    axes.set_title(f"Time of each request{many}")
    return figure


# --- methods -------------------------------------------------------------------------------------


def gap(comparison: Comparison) -> Figure | None:
    """The closed gap against the time as a share of retraining."""
    methods = comparison.candidates()
    shown = [
        metric
        for metric in GAPS
        if any(metric in method.gap_closed and _share(method) for method in methods)
    ][:2]
    if not shown:
        return None
    figure = _figure(5.2 * len(shown) + 0.6, 4.6)
    grid = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    shares = [_share(m) for m in methods if _share(m) and any(g in m.gap_closed for g in shown)]
    low, high = min(shares), max(1.0, *shares)
    negative = any(
        m.gap_closed[g].mean < -0.05 for m in methods for g in shown if g in m.gap_closed
    )
    labels: list[list[_Label]] = [[] for _ in shown]
    for axes, metric, own in zip(grid, shown, labels, strict=True):
        points = [m for m in methods if metric in m.gap_closed and _share(m)]
        axes.axhline(1, color=DARK, linewidth=1)
        axes.axhline(0, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
        for method in points:
            stat = method.gap_closed[metric]
            at = min(max(stat.mean, _BOTTOM_GAP), _TOP_GAP)
            inside = at == stat.mean
            marker = "o" if inside else "v" if at < stat.mean or at == _BOTTOM_GAP else "^"
            axes.errorbar(
                _share(method),
                at,
                yerr=stat.sd if inside and stat.sd else None,
                fmt=marker,
                color=RED if stat.mean < 0 else BLUE,
                markersize=7,
                capsize=2,
                linewidth=1,
                zorder=3,
                label=plain(method.name),
            )
            text = shorten(method.name, 26) + ("" if inside else f" ({percent(stat.mean)})")
            own.append(
                _Label(_share(method), at, stat.sd if inside and stat.sd else 0.0, plain(text))
            )
        axes.set_xscale("log")
        axes.set_ylim(_BOTTOM_GAP - 0.1 if negative else -0.1, _TOP_GAP + 0.1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _percent_tick(y)))
        axes.set_title("Closed gap: " + GAPS[metric])
        axes.set_xlabel("time, as a share of retraining")
        axes.grid(color=PALE)
    grid[0].set_xlim(
        10 ** math.floor(math.log10(low) - 0.15), 10 ** (math.ceil(math.log10(high) - 1e-9) + 0.25)
    )
    grid[0].xaxis.set_major_locator(LogLocator(numticks=8))
    grid[0].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.6g}%"))
    grid[0].xaxis.set_minor_locator(NullLocator())
    for axes in grid:
        for height, text in ((1, "as retrained"), (0, "as without deletion")):
            axes.annotate(
                text,
                (1, height),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color=DARK,
                fontsize=8,
            ).set_gid("line")
    figure.draw_without_rendering()
    for axes, own in zip(grid, labels, strict=True):
        _place_labels(axes, own)
    return figure


def _share(method: Method) -> float:
    """The share of the time of retraining; 0 where it is not known."""
    return method.share.mean if method.share is not None and method.share.mean > 0 else 0.0


# Where a label may be put, seen from its point, in units of half its size.
_DIRECTIONS = (
    *((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)),
    *((0, 1), (0, -1), (0.5, 1), (0.5, -1), (-0.5, 1), (-0.5, -1)),
)


class _Label(NamedTuple):
    """A point with a bar of `sd` up and down, and the text that names it."""

    x: float
    y: float
    sd: float
    text: str


def _place_labels(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write texts beside their points, where they cover neither points nor bars nor texts."""
    taken = [text.get_window_extent().padded(1) for text in axes.texts]
    points = [axes.transData.transform((label.x, label.y)) for label in labels]
    bars = [
        axes.transData.transform((label.x, min(max(label.y + part, _BOTTOM_GAP), _TOP_GAP)))
        for label in labels
        for part in np.linspace(-label.sd, label.sd, 9)
    ]
    lines = [axes.transData.transform((1, height))[1] for height in (0, 1)]
    scale = axes.get_figure().dpi / 72  # type: ignore[union-attr]
    near, radius = 8 * scale, 5 * scale

    def cost(box: Bbox, k: int) -> float:
        wide = box.padded(radius)
        return (
            50 * (not all(axes.bbox.contains(*corner) for corner in box.corners()))
            + 10 * box.count_overlaps(taken)
            + 6 * sum(wide.contains(*point) for j, point in enumerate(points) if j != k)
            + 0.5 * sum(box.contains(*point) for point in bars)
            + 0.5 * sum(box.y0 < line < box.y1 for line in lines)
        )

    for k in sorted(range(len(labels)), key=lambda k: -points[k][1]):
        at = (labels[k].x, labels[k].y)
        text = axes.annotate(
            labels[k].text,
            at,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8.5,
            ha="center",
            va="center",
            zorder=4,
        )
        text.set_in_layout(False)  # the axes stay where they were when the place was found
        box = text.get_window_extent()
        best = (math.inf, 0.0, 0.0, False)
        for distance in (0, 6, 14, 24, 36, 50, 66, 84):
            for right, up in _DIRECTIONS:
                dx = right * (box.width / 2 + (near if up == 0 else 0) + distance * scale)
                dy = up * (box.height / 2 + radius + distance * scale)
                aside = distance > 0 or up != 0
                total = cost(box.translated(dx, dy), k) + 0.02 * distance + 0.1 * aside
                if total < best[0]:
                    best = (total, dx, dy, aside)
        _, dx, dy, aside = best
        text.set_position((dx / scale, dy / scale))
        taken.append(box.translated(dx, dy).padded(1))
        if aside:
            x, y = np.clip(points[k], taken[-1].min, taken[-1].max)  # the nearest of the box
            leader = axes.annotate(
                "",
                at,
                xytext=((x - points[k][0]) / scale, (y - points[k][1]) / scale),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": GREY,
                    "linewidth": 0.7,
                    "shrinkA": 0,
                    "shrinkB": 3,
                },
            )
            leader.set_in_layout(False)


def methods(comparison: Comparison) -> Figure | None:
    """Distances, accuracies and membership inference of every method, one row each."""
    rows = [method for method in comparison.methods if method.metrics]
    series = {
        "Distance of outputs to retraining\n(Jensen-Shannon)": [
            ("js_forget", "deleted samples", RED, "o"),
            ("js_test", "test samples", BLUE, "s"),
        ],
        "Accuracy": [
            ("accuracy_forget", "deleted samples", RED, "o"),
            ("accuracy_retain", "retained samples", GREEN, "D"),
            ("accuracy_test", "test samples", BLUE, "s"),
        ],
        "Membership inference\n(AUC)": [("mia_auc", "deleted against test samples", RED, "o")],
    }
    panels = [
        (title, [one for one in found if any(one[0] in m.metrics for m in rows)])
        for title, found in series.items()
    ]
    panels = [(title, found) for title, found in panels if found]
    if not panels:
        return None
    figure = _figure(2.6 + 2.8 * len(panels), 1.5 + 0.3 * len(rows))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, found) in zip(grid, panels, strict=True):
        for metric, label, colour, marker in found:
            at = [(row, m.metrics[metric]) for row, m in enumerate(rows) if metric in m.metrics]
            for row, stat in at:
                if stat.sd:
                    axes.plot(
                        [stat.mean - stat.sd, stat.mean + stat.sd],
                        [row, row],
                        color=colour,
                        linewidth=4,
                        alpha=0.35,
                        solid_capstyle="butt",
                    )
            axes.plot(
                [stat.mean for _, stat in at],
                [row for row, _ in at],
                marker,
                color=colour,
                markersize=6,
                alpha=0.9,
                label=label,
            )
            reference = _reference(comparison, metric)
            if reference is not None:
                axes.axvline(reference, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_title(title)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", color=PALE)
        axes.tick_params(axis="y", length=0)
        if found[0][0].startswith("js"):
            axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _percent_tick(x)))
        low, high = axes.get_xlim()
        if found[0][0] == "mia_auc" and low <= 0.5 <= high:
            axes.set_title(title.replace("AUC", "AUC; 50% is chance"))
    grid[0].set_yticks(range(len(rows)), [plain(shorten(m.name, 32)) for m in rows])
    handles = [
        axes.get_legend_handles_labels()[0][k]
        for axes, (_, found) in zip(grid, panels, strict=True)
        for k in range(len(found))
    ]
    labels = {h.get_label(): h for h in handles if "against" not in str(h.get_label())}
    line = Patch(alpha=0)
    figure.legend(
        [*labels.values(), line],
        [*map(str, labels), "dashed: retrained (distances: their floor)"],
        loc="outside lower left",
        ncols=len(labels) + 1,
        handletextpad=0.2,
    )
    return figure


def _reference(comparison: Comparison, metric: str) -> float | None:
    """Where retraining stands: for distances the spread between retrained models."""
    if metric.startswith("js"):
        floor = comparison.floor.get(metric)
        return None if floor is None else floor.mean
    retrained = comparison.find(RETRAINED)
    stat: Stat | None = None if retrained is None else retrained.metrics.get(metric)
    return None if stat is None else stat.mean


def losses(comparison: Comparison) -> Figure | None:
    """Histograms of the losses of deleted and test samples, a panel for each method."""
    rows = [m for m in comparison.methods if m.losses.get("forget") or m.losses.get("test")]
    if not rows:
        return None
    rows = rows[:_MAX_PANELS]
    retrained = comparison.find(RETRAINED)
    reference = retrained.losses.get("forget", []) if retrained is not None else []
    every = np.concatenate([np.array(v) for m in rows for v in m.losses.values()] + [reference])
    logarithmic = bool((every >= 0).all() and (every > 0).any())
    if logarithmic:
        positive = every[every > 0]
        smallest = max(float(np.quantile(positive, 0.005)), 1e-6)
        first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(positive.max()) + 1e-9)
        edges = np.logspace(first, max(last, first + 1), 31)
    else:
        low, high = float(every.min()), float(every.max())
        edges = np.linspace(low, high if high > low else low + 1, 31)

    def shares(values: Sequence[float]) -> np.ndarray:
        clipped = np.clip(values, edges[0], edges[-1])
        return np.histogram(clipped, edges)[0] / len(values)

    n_columns = min(4, len(rows)) if len(rows) != 4 else 2
    n_lines = math.ceil(len(rows) / n_columns)
    figure = _figure(max(2.6 * n_columns, 5.2) + 0.4, 1.75 * n_lines + 0.7)
    grid = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, method in zip(grid, rows, strict=False):
        if method.losses.get("forget"):
            axes.stairs(
                shares(method.losses["forget"]), edges, fill=True, color=ORANGE, label="forget"
            )
        if method.losses.get("test"):
            axes.stairs(
                shares(method.losses["test"]), edges, color=BLUE, linewidth=1.3, label="test"
            )
        if reference and method.name != RETRAINED:
            axes.stairs(
                shares(reference),
                edges,
                color=DARK,
                linewidth=1.3,
                linestyle=(0, (3, 1.5)),
                label="retrained",
            )
        axes.set_title(plain(textwrap.fill(shorten(method.name, 52), 30)), fontsize=9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
    for k, axes in enumerate(grid):
        if k >= len(rows):
            axes.set_visible(False)
            grid[k - n_columns].xaxis.set_tick_params(labelbottom=True)
    grid[0].set_ylim(bottom=0)
    _widen(figure)
    names = [
        (Patch(color=ORANGE), "deleted samples"),
        (Patch(facecolor="none", edgecolor=BLUE, linewidth=1.3), "test samples"),
    ]
    if reference:
        dashed = Patch(facecolor="none", edgecolor=DARK, linewidth=1.3, linestyle=(0, (3, 1.5)))
        names.append((dashed, "deleted samples, retrained"))
    figure.legend(
        [handle for handle, _ in names],
        [name for _, name in names],
        loc="outside upper left",
        ncols=len(names),
        title="Loss of single samples (height: share of the samples)",
        alignment="left",
    )
    return figure


def units(comparison: Comparison) -> Figure | None:
    """The share of each layer's units that masked methods change."""
    rows = [method for method in comparison.methods if method.is_masked]
    if not rows:
        return None
    layers = list(dict.fromkeys(layer for method in rows for layer in method.units))
    groups = group_layers(layers)
    chosen = np.zeros((len(groups), len(rows)))
    of = np.zeros((len(groups), len(rows)))
    for column, method in enumerate(rows):
        for line, (_, members) in enumerate(groups):
            found = [method.units[layer] for layer in members if layer in method.units]
            chosen[line, column] = sum(part for part, _ in found)
            of[line, column] = sum(whole for _, whole in found)
    share = np.divide(chosen, of, out=np.zeros_like(chosen), where=of > 0)
    if len(rows) > _MAX_COLUMNS:
        return _unit_map(rows, groups, share, of)
    figure = _figure(2.6 + 2.2 * len(rows), 1.1 + 0.27 * len(groups))
    grid = figure.subplots(1, len(rows), sharey=True, sharex=True, squeeze=False)[0]
    for column, (axes, method) in enumerate(zip(grid, rows, strict=True)):
        axes.barh(range(len(groups)), of[:, column] > 0, color=PALE)
        axes.barh(range(len(groups)), share[:, column], color=BLUE)
        for line in range(len(groups)):
            right = share[line, column] > 0.55
            axes.annotate(
                f"{chosen[line, column]:.4g} of {of[line, column]:.4g}"
                if of[line, column]
                else "not recorded",
                (share[line, column], line),
                xytext=(-3 if right else 3, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                va="center",
                fontsize=8,
                color="white" if right else DARK,
            )
        axes.set_title(plain(textwrap.fill(shorten(method.name, 52), 28)), fontsize=9)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _percent_tick(x)))
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    _layer_axis(grid[0], groups)
    _widen(figure)
    figure.suptitle("Units that are changed, by layer", x=0.01, ha="left", fontsize=10)
    return figure


def _unit_map(
    rows: Sequence[Method],
    groups: Sequence[tuple[str, list[str]]],
    share: np.ndarray,
    of: np.ndarray,
) -> Figure:
    figure = _figure(3.4 + 0.62 * len(rows), 1.9 + 0.25 * len(groups))
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for line, column in np.ndindex(*share.shape):
        axes.text(
            column,
            line,
            percent(float(share[line, column])) if of[line, column] else "-",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if share[line, column] > 0.6 else DARK if share[line, column] else GREY,
        )
    axes.set_xticks(
        range(len(rows)),
        [plain(textwrap.fill(shorten(m.name, 40), 22)) for m in rows],
        rotation=45,
        ha="left",
        rotation_mode="anchor",
    )
    axes.xaxis.tick_top()
    _layer_axis(axes, groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("share of the layer's units that is changed")
    return figure


def time(comparison: Comparison) -> Figure | None:
    """How the time of each method divides among its phases."""
    rows = [m for m in comparison.candidates() if sum(m.phases.values()) > 0]
    if not rows:
        return None
    phases = _rank_phases([method.phases for method in rows])
    splits = [_merge_phases(method.phases, phases) for method in rows]
    totals = np.array([sum(split.values()) for split in splits])
    figure = _figure(8, 1.3 + 0.32 * len(rows))
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for phase, colour in phases.items():
        widths = np.array([split.get(phase, 0.0) for split in splits]) / totals
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=plain(phase))
        for row, width in enumerate(widths):
            if width >= 0.05:
                axes.text(
                    left[row] + width / 2,
                    row,
                    f"{width:.0%}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=DARK if colour in (ORANGE, SKY, PURPLE, OLIVE, GREY) else "white",
                )
        left += widths
    for row, (method, total) in enumerate(zip(rows, totals, strict=True)):
        text = duration(method.seconds.mean if method.seconds is not None else float(total))
        if _share(method):
            text += f"  ({percent(_share(method))} of retraining)"
        axes.annotate(text, (1, row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [plain(shorten(m.name, 32)) for m in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    figure.legend(
        loc="outside upper left",
        ncols=min(4, len(phases)),
        handlelength=1,
        handleheight=1,
        title="Where the time went",
        alignment="left",
    )
    return figure


def _rank_phases(splits: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Phases with a colour each, those that took longest; the rest is "other", in grey."""
    weight: dict[str, float] = {}
    for split in splits:
        total = sum(split.values()) or 1.0
        for phase, seconds in split.items():
            weight[phase] = weight.get(phase, 0.0) + seconds / total
    named = [*(p for p in _PHASES if p in weight), *(p for p in weight if p not in _PHASES)]
    named = [phase for phase in named if phase != "other"]
    longest = sorted(named, key=lambda phase: -weight[phase])[: len(_PHASES)]
    kept = [phase for phase in named if phase in longest]
    free = [colour for phase, colour in _PHASES.items() if phase not in kept]
    colours = {phase: _PHASES[phase] if phase in _PHASES else free.pop() for phase in kept}
    if len(kept) < len(weight):
        colours["other"] = GREY
    return colours


def _merge_phases(split: Mapping[str, float], phases: Mapping[str, str]) -> dict[str, float]:
    merged = {phase: split[phase] for phase in phases if phase in split}
    rest = sum(seconds for phase, seconds in split.items() if phase not in phases)
    if rest:
        merged["other"] = merged.get("other", 0.0) + rest
    return merged
