"""Pictures of results, on matplotlib's axes.

matplotlib, and networkx for graphs, are loaded when a picture is drawn. Names are drawn as they are
written: a dollar sign is no formula. Sizes of letters follow the space that there is.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcodec_ext._checks import counted
from lcodec_ext.dependence.limits import upper_tail

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#8A8A8A", "#D9D9D9"
_MOST = 60  # columns that a picture has room for
_LONGEST = 28  # letters of a name
_WRITTEN = 15  # columns of a matrix whose values are written
_LEVEL = 0.05  # of the p-values that are marked
_SMALLEST, _LARGEST = 5.5, 9.0  # points
_HORIZONTAL = 20  # names around a circle that fit without being turned
_ENDS = {  # of a selection
    "no_gain": "no other raises T",
    "min_gain": "no other raises T enough",
    "not_significant": "no other is significant",
    "max_features": "max_features is reached",
    "exhausted": "none is left",
    "constant_y": "y is constant",
}


def plot_path(result: Any, ax: Any = None) -> Any:
    """What `FociResult.plot` draws: T after each step, from top to bottom."""
    steps = min(len(result.ordering), _MOST)
    first = 0 if result.preselected else 1  # a row for the columns that were given
    names = result.names or [f"column {k}" for k in result.ordering]
    labels = [f"{k}. {name}" for k, name in enumerate(_distinct(names[:steps], _LONGEST), 1)]
    T = [float(value) for value in result.cumulative[:steps]]
    rows = list(range(1, steps + 1))
    if not first:
        given = counted(len(result.preselected), "given column")
        labels, T, rows = [given, *labels], [result.base, *T], [0, *rows]
    reached = [] if result.threshold is None else list(result.threshold)
    if steps == len(result.ordering) < len(reached):  # the step that ended the selection
        labels.append(f"{'next' if steps else 'best'}: p-value {result.pvalues[-1]:.3g}")
        rows.append(steps + 1)
    else:
        reached = reached[:steps]
    ax = _axes(ax, 6.4, 1.7 + 0.23 * max(len(rows), 3))
    ax.plot(T, rows[: len(T)], "o-", color=BLUE, markersize=4, label="cumulative T" if T else None)
    ax.plot(
        result.conditional[:steps],
        range(1, steps + 1),
        "D",
        color=ORANGE,
        markersize=3.5,
        markerfacecolor="white",
        label="conditional T" if steps else None,
    )
    if reached:
        at = range(1, len(reached) + 1)
        mark = {"markersize": 13, "markeredgewidth": 2, "color": GREY}
        ax.plot(reached, at, "|", label="cumulative T by chance", zorder=1, **mark)
    _name(ax.yaxis, rows, labels)
    ax.set_ylim(max(rows, default=1) + 0.6, min(rows, default=0) - 0.6)
    _room_for_zero(ax)
    more = f", the first {steps} shown" if steps < len(result.ordering) else ""
    what = f"{len(result.ordering)} of {counted(result.n_features, 'column')} selected"
    end = _ENDS[result.stop_reason]
    if first and not steps:
        end = end.replace("no other", "none")
    _title(ax, f"{what}{more}; {end}", 20)
    _plain(ax)
    if rows:
        _legend(ax)
    else:
        ax.set_xlim(0, 1)
        _say(ax, "no column is selected")
    return ax


def plot_stability(result: Any, ax: Any = None, threshold: float = 0.75) -> Any:
    """What `StabilityResult.plot` draws: a bar for each column that was ever selected."""
    frequencies = result.frequencies
    ever = [k for k in _descending(frequencies) if frequencies[k] > 0]
    names = [_column(result.names, k) for k in ever]
    ax = plot_bars(names, frequencies[ever], frequencies[ever] >= threshold, ax)
    dashes = {"color": ORANGE, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    ax.axvline(threshold, label=f"threshold {threshold:g}", **dashes)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel(f"share of the {len(result.selected):,} halves on which a column is selected")
    more = f" (the first {_MOST} shown)" if len(ever) > _MOST else ""
    n_columns = counted(len(frequencies), "column")
    _title(ax, f"{len(ever)} of {n_columns} were ever selected{more}", 20)
    _legend(ax)
    if not ever:
        _say(ax, "no column was selected")
    return ax


def plot_bars(
    names: Sequence[str],
    lengths: NDArray[np.float64],
    marked: NDArray[np.bool_],
    ax: Any = None,
    *,
    ends: NDArray[np.float64] | None = None,
) -> Any:
    """Horizontal bars from top to bottom, 60 at most; marked ones are blue.

    `ends`, of shape (2, number of bars), are intervals, drawn as lines.
    """
    n = min(len(names), _MOST)
    ax = _axes(ax, 6.4, 1.5 + 0.22 * max(n, 3))
    colours = [BLUE if each else PALE for each in marked[:n]]
    ax.barh(range(n), lengths[:n], color=colours, height=0.7)
    if ends is not None:
        ax.hlines(range(n), ends[0, :n], ends[1, :n], color="#222222", linewidth=1.2)
    _name(ax.yaxis, range(n), _distinct(names[:n], _LONGEST))
    ax.set_ylim(max(n, 1) - 0.4, -0.6)
    _plain(ax)
    return ax


def _descending(values: NDArray[np.float64]) -> list[int]:
    return [int(k) for k in np.argsort(-values, kind="stable")]


def plot_null(result: Any, ax: Any = None) -> Any:
    """What `CodecTestResult.plot` draws: T by chance, T of the data, and its interval."""
    ax = _axes(ax, 6.4, 3.2)
    values = np.asarray(result.null_distribution)
    if len(values):
        low, high = min(values.min(), result.statistic), max(values.max(), result.statistic)
        bins = np.linspace(low, high if high > low else low + 1, 61)
        ax.hist(values, bins, color=PALE, label=f"{counted(len(values), 'permutation')}")
    elif result.null_sd > 0:
        ends = np.linspace(-4, 5, 181)  # in standard deviations
        heights = -np.diff([upper_tail(float(end), result.null_skewness) for end in ends])
        places = result.null_mean + result.null_sd * (ends[1:] + ends[:-1]) / 2
        ax.fill_between(places, heights, color=PALE, label="the limit of many rows")
    if result.confidence_interval is not None and np.isfinite(result.confidence_interval).all():
        ax.axvspan(*result.confidence_interval, color=BLUE, alpha=0.15, lw=0, label="interval")
    ax.axvline(result.statistic, color=BLUE, linewidth=2, label="the data")
    ax.set_xlabel("T")
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    _title(ax, f"T = {result.statistic:.4f}, p-value {result.pvalue:.3g}", 20)
    _plain(ax)
    _legend(ax)
    return ax


def plot_matrix(matrix: Any, ax: Any = None) -> Any:
    """What `XiMatrix.plot` draws: a heat map, y across and x down."""
    p = len(matrix.statistic)
    side = min(12.0, max(4.2, 3.0 + 0.25 * p))
    ax = _axes(ax, side + 1.2, side)
    off_diagonal = np.where(np.eye(p, dtype=bool), np.nan, matrix.statistic)
    ax.set_facecolor(PALE)  # the diagonal, and what is undefined
    image = ax.imshow(
        off_diagonal, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
    )
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    labels = _distinct([_column(matrix.names, k) for k in range(p)], 20)
    _name(ax.yaxis, range(p), labels)
    _name(ax.xaxis, range(p), labels, 90)
    ax.set(xlabel="y", ylabel="x")
    for side_name in ax.spines:
        ax.spines[side_name].set_visible(False)
    title = f"xi of y on x, {counted(matrix.n, 'row')}"
    marked = np.asarray(matrix.adjusted) <= _LEVEL
    if p <= _WRITTEN and _write_cells(ax, off_diagonal, marked) and marked.any():
        stars = f"*: {'adjusted ' if matrix.adjust else ''}p ≤ {_LEVEL:g}"
        room = 72 * ax.get_window_extent().width / ax.figure.dpi
        title += f"; {stars}" if 4.5 * len(f"{title}; {stars}") < room else f"\n{stars}"
    _title(ax, title)
    return ax


def _write_cells(ax: Any, values: NDArray[np.float64], marked: NDArray[np.bool_]) -> bool:
    """Whether there was room."""
    box = ax.get_window_extent()
    cell = 72 * min(box.width, box.height) / ax.figure.dpi / len(values)
    size = min(8.0, 0.3 * cell)
    if size < _SMALLEST - 1:
        return False
    for i, j in np.argwhere(np.isfinite(values)):
        text = f"{values[i, j]:.2f}".replace("-0.00", "0.00") + "*" * bool(marked[i, j])
        colour = "white" if values[i, j] > 0.6 else "#222222"
        ax.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    return True


def plot_graph(graph: Any, ax: Any = None) -> Any:
    """What `DependenceGraph.plot` draws: columns on a circle, arrows to what they tell about."""
    networkx = _networkx()
    weights = np.where(graph.adjacency, np.clip(graph.weights, 0, 1), 0)
    shown = _busiest(graph.adjacency, weights)
    p = len(shown)
    side = min(11.0, 5.4 + 0.1 * p)
    ax = _axes(ax, side, side)
    box = ax.get_window_extent()
    room = 72 * min(box.width, box.height) / ax.figure.dpi  # points
    # the circle is about half as wide; its longest names take a quarter on each side
    size = max(_SMALLEST, min(_LARGEST, 0.8 * math.pi * 0.5 * room / p))
    labels = _distinct([_column(graph.names, k) for k in shown], int(room / 4 / (0.55 * size)))
    drawn = networkx.DiGraph()
    drawn.add_nodes_from(range(p))
    # weak ones first, so that strong ones lie on top
    edges = sorted(
        (
            (b, a, weights[i, j])
            for a, i in enumerate(shown)
            for b, j in enumerate(shown)
            if graph.adjacency[i, j]
        ),
        key=lambda edge: edge[2],
    )
    drawn.add_weighted_edges_from(edges)
    angles = 2 * math.pi * (np.arange(p) + (0.5 if p % 4 == 0 else 0)) / p  # none at a pole
    places = np.column_stack([np.cos(angles), np.sin(angles)])
    dot = 30.0 if p <= 30 else 14.0
    strength = np.array([weight for _, _, weight in edges])
    widths = 0.6 + (4.0 if p <= 30 else 2.4) * strength
    networkx.draw_networkx_edges(
        drawn,
        dict(enumerate(places)),
        ax=ax,
        edgelist=[(b, a) for b, a, _ in edges],
        width=widths.tolist(),
        edge_color=[(*_rgb(BLUE), 0.3 + 0.65 * weight) for weight in strength],
        arrowsize=(7 + 2.5 * widths).tolist(),
        node_size=3 * dot,
        connectionstyle="arc3,rad=0.14",
    )
    joined = graph.adjacency[np.ix_(shown, shown)]
    joined = joined.any(axis=0) | joined.any(axis=1)
    colours = [BLUE if each else PALE for each in joined]
    ax.scatter(*np.transpose(places), s=dot, c=colours, zorder=3)
    _names_around(ax, list(places), labels, size)
    shares = [0.55 * size * max(len(label), 3) / room for label in labels]
    reach = 1.15
    for (across, up), share in zip(np.abs(places), shares, strict=True):
        turned = p > _HORIZONTAL
        far = max(across, up) if turned else across
        reach = max(reach, 1.1 * far / max(1 - 2 * share * (far if turned else 1), 0.3))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.set_axis_off()
    of = f"{p} of {counted(len(graph.adjacency), 'column')}: " if p < len(graph.adjacency) else ""
    _title(ax, f"{of}an arrow leads from a selected column to its response; width: conditional T")
    return ax


def _names_around(ax: Any, places: Sequence[Any], labels: Sequence[str], size: float) -> None:
    """Names outside the circle; where they are many each on the ray to its place."""
    turned = len(labels) > _HORIZONTAL
    for place, label in zip(places, labels, strict=True):
        angle = math.degrees(math.atan2(place[1], place[0]))
        left = abs(angle) > 90.5
        ax.text(
            *(1.07 * place),
            label,
            rotation=(angle + 180 if left else angle) if turned else 0,
            rotation_mode="anchor",
            ha="right" if left else "left",
            va="center",
            fontsize=size,
            parse_math=False,
        )


def _busiest(adjacency: NDArray[np.bool_], weights: NDArray[np.float64]) -> list[int]:
    """All columns, or those with the most weight, as many as there is room for."""
    weight = weights.sum(axis=0) + weights.sum(axis=1)
    return sorted(_descending(weight)[:_MOST])


# ---------------------------------------------------------------------------------------------
# What pictures share


def _axes(ax: Any, width: float, height: float) -> Any:
    """The axes that were given, or those of a new figure, in inches."""
    if ax is not None:
        if not hasattr(ax, "get_window_extent") or not hasattr(ax, "barh"):
            raise TypeError(f"ax must be matplotlib axes or None; got {type(ax).__name__}")
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install 'lcodec_ext[plot]'") from None
    figure, ax = pyplot.subplots(figsize=(width, height), layout="constrained")
    figure.draw_without_rendering()  # lays out, so that one knows how much room there is
    return ax


def _networkx() -> Any:
    try:
        import networkx
    except ImportError:
        raise ImportError(
            "plot of a graph needs networkx: pip install 'lcodec_ext[plot]'"
        ) from None
    return networkx


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def _column(names: Sequence[str] | None, index: int) -> str:
    return f"column {index}" if names is None else str(names[index])


def _short(text: str, most: int) -> str:
    """The text, without its middle if it is longer."""
    tail = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def _distinct(names: Sequence[str], most: int) -> list[str]:
    """Names on one line, shortened; of those that would be equal, the part that differs."""
    most = max(8, min(most, _LONGEST))
    names = [" ".join(name.split()) for name in names]
    short = [_short(name, most) for name in names]
    for label, count in Counter(short).items():
        alike = [k for k, each in enumerate(short) if each == label]
        if count == 1 or len({names[k] for k in alike}) == 1:
            continue
        head = _common([names[k] for k in alike])
        tail = _common([names[k][head:][::-1] for k in alike])
        for k in alike:
            room = max(0, most - 2 - (len(names[k]) - head - tail))
            before = min(head, room - min(tail, room // 3))
            start, end = head - before, len(names[k]) - tail + min(tail, room - before)
            short[k] = "…" * (start > 0) + names[k][start:end] + "…" * (end < len(names[k]))
    return short


def _common(texts: Sequence[str]) -> int:
    """How many letters all of them start with."""
    low, high = min(texts), max(texts)
    differ = (k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return next(differ, min(len(low), len(high)))


def _name(axis: Any, places: Sequence[int], labels: Sequence[str], rotation: float = 0) -> None:
    """Names at an axis; where there is little room, in small letters, then only some of them."""
    box = axis.axes.get_window_extent()
    length = 72 * (box.height if axis.axis_name == "y" else box.width) / axis.axes.figure.dpi
    each = length / (len(places) + 1)
    size = max(_SMALLEST, min(_LARGEST, 0.85 * each))
    every = max(1, math.ceil(size / 0.95 / max(each, 0.1)))
    axis.set_ticks(list(places)[::every])
    axis.set_ticklabels(list(labels)[::every])
    for label in axis.get_ticklabels():
        label.set(fontsize=size, parse_math=False, rotation=rotation)
    axis.set_tick_params(length=0)


def _room_for_zero(ax: Any) -> None:
    low, high = ax.get_xlim()
    ax.axvline(0, color=PALE, linewidth=0.8, zorder=0)
    ax.set_xlim(min(low, -0.02 * high), high)
    ax.set_xlabel("T")


def _title(ax: Any, text: str, pad: float = 6) -> None:
    ax.set_title(text, fontsize=9, loc="left", parse_math=False, pad=pad)


def _plain(ax: Any) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="x", color="#ECECEC", linewidth=0.8)
    ax.set_axisbelow(True)


def _legend(ax: Any) -> None:
    """Above the picture, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 0.99), "borderaxespad": 0}
    ax.legend(fontsize=8, frameon=False, ncols=3, columnspacing=1.2, **place)


def _say(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=GREY)
