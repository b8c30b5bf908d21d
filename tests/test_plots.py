"""Pictures of results: what is drawn, that names are legible, and axes in and out."""

import itertools
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lcodec_ext import codec_test, dependence_graph, foci, stability, xi_matrix
from lcodec_ext.dependence import plots

NAMES = ["age", "price in $ of the first and $ of the second year", "b\nmi", "ä", "x_1^2", "$z$"]


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.fixture
def table(rng):
    return pd.DataFrame(rng.normal(size=(300, len(NAMES))), columns=NAMES)


@pytest.fixture
def y(table):
    return table["age"] * table["$z$"]


def results(table, y):
    return {
        "foci": foci(table, y),
        "foci, all": foci(table, y, stop=False, preselected=["ä"]),
        "graph": dependence_graph(table.assign(product=y)),
        "stability": stability(table, y, n_pairs=4),
        "matrix": xi_matrix(table),
        "test": codec_test(y, table["age"], n_permutations=99, seed=0),
    }


def texts(ax):
    labels = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
    return [text.get_text() for text in labels if text.get_text()]


def assert_legible(ax):
    """Names lie on the figure, none on another, in letters of at least 5 points."""
    figure = ax.figure
    FigureCanvasAgg(figure).draw()
    names = [*ax.get_yticklabels(), *ax.texts]
    names = [text for text in names if text.get_visible() and text.get_text()]
    assert all(text.get_fontsize() >= 5 for text in names)
    boxes = [text.get_window_extent() for text in names if text.get_rotation() % 180 == 0]
    for one, other in itertools.combinations(boxes, 2):
        across = min(one.x1, other.x1) - max(one.x0, other.x0)
        down = min(one.y1, other.y1) - max(one.y0, other.y0)
        assert across <= 0 or down <= 1.5, "names lie on one another"
    for text in [*names, *filter(Text.get_text, (ax.title, ax.xaxis.label))]:
        box = text.get_window_extent()
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text


@pytest.mark.parametrize("kind", ["foci", "foci, all", "graph", "stability", "matrix", "test"])
def test_axes_in_and_out(table, y, kind):
    result = results(table, y)[kind]
    figure = Figure(figsize=(8, 8), layout="constrained")  # pyplot does not know of it
    ax = figure.add_subplot()
    before = dict(matplotlib.rcParams)
    assert result.plot(ax) is ax
    assert result.plot(ax=ax) is ax
    assert not pyplot.get_fignums()
    assert dict(matplotlib.rcParams) == before
    own = result.plot()
    assert pyplot.get_fignums() == [own.figure.number]
    assert_legible(own)
    for wrong in (figure, "ax", [ax]):
        with pytest.raises(TypeError, match="ax must be matplotlib axes or None; got"):
            result.plot(wrong)


@pytest.mark.parametrize("p", [2, 12, 70])
@pytest.mark.parametrize("long", [False, True])
def test_names_are_legible(rng, p, long):
    X = rng.normal(size=(60, p))
    names = [
        f"measurement {k:02d} of the very first visit, in mmol" if long else f"v{k}"
        for k in range(p)
    ]
    table = pd.DataFrame(X, columns=names)
    y = X[:, 0] + X[:, 1]
    graph = dependence_graph(table, max_features=2, stop=False)
    matrix = xi_matrix(table)
    for result in (foci(table, y, stop=False), stability(table, y, n_pairs=3), graph, matrix):
        ax = result.plot()
        assert_legible(ax)
        shown = texts(ax)
        if result is graph:
            assert len(shown) == len(set(shown)) == min(p, 60)
            for name in shown:  # what tells them apart is there
                assert any(f"{k:02d}" in name or f"v{k}" == name for k in range(p))
        pyplot.close(ax.figure)


def test_small_axes_name_fewer_columns(rng):
    X = rng.normal(size=(60, 50))
    figure = Figure(figsize=(4, 3), layout="constrained")
    ax = foci(X, X[:, 0], stop=False).plot(figure.add_subplot())
    assert 5 < len(ax.get_yticklabels()) < 50
    assert ax.get_yticklabels()[0].get_text().startswith("1. column ")
    assert_legible(ax)


def test_path_of_foci(table, y):
    result = foci(table, y, stop=False, preselected=["ä"])
    ax = result.plot()
    path, steps = ax.get_lines()[:2]
    assert path.get_xdata().tolist() == [result.base, *result.cumulative]
    assert path.get_ydata().tolist() == list(range(6))
    assert list(steps.get_xdata()) == result.conditional.tolist()
    assert list(steps.get_ydata()) == list(range(1, 6))
    assert ax.get_yticklabels()[0].get_text() == "1 given column"
    assert ax.yaxis_inverted()
    assert "5 of 6 columns selected; none is left" in ax.get_title(loc="left")


def test_nothing_selected_is_said(table):
    with pytest.warns(UserWarning, match="constant"):
        result = foci(table, np.ones(300))
    assert "no column is selected" in texts(result.plot())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = stability(table, np.ones(300), n_pairs=1)
    assert "no column was selected" in texts(nothing.plot())


def test_bars_of_stability(table, y):
    result = stability(table, y, n_pairs=5)
    ax = result.plot(threshold=0.6)
    ever = np.sort(result.frequencies[result.frequencies > 0])[::-1]
    assert [bar.get_width() for bar in ax.patches] == ever.tolist()
    blue = matplotlib.colors.to_rgba(plots.BLUE)
    assert [bar.get_facecolor() == blue for bar in ax.patches] == (ever >= 0.6).tolist()
    assert list(ax.get_lines()[0].get_xdata()) == [0.6, 0.6]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["threshold 0.6"]
    with pytest.raises(ValueError, match="threshold"):
        result.plot(threshold=0.4)


def test_arrows_of_a_graph(table, y):
    graph = dependence_graph(table.assign(product=y))
    ax = graph.plot()
    arrows = [patch for patch in ax.patches if hasattr(patch, "get_arrowstyle")]
    assert len(arrows) == graph.adjacency.sum()
    places = ax.collections[-1].get_offsets()
    weights = np.sort(graph.weights[graph.adjacency])
    widths = [arrow.get_linewidth() for arrow in arrows]
    assert widths == sorted(widths)  # the strongest lie on top
    assert np.allclose(widths, 0.6 + 4 * np.clip(weights, 0, 1))
    i, j = np.unravel_index(np.argmax(graph.weights), graph.weights.shape)
    ends = arrows[-1].get_path().vertices
    from_, to = (np.linalg.norm(places - end, axis=1).argmin() for end in (ends[0], ends[2]))
    assert (from_, to) == (j, i)  # from the selected column to its response
    again = graph.plot()
    assert np.array_equal(again.collections[-1].get_offsets(), places)


def test_heat_map_of_xi(table, y):
    table["y"], table["one"] = y, 1.0
    with pytest.warns(UserWarning, match="constant"):
        matrix = xi_matrix(table)
    ax = matrix.plot()
    shown = ax.get_images()[0].get_array()
    assert np.array_equal(shown.mask, np.eye(8, dtype=bool) | np.isnan(matrix.statistic))
    assert np.array_equal(shown.compressed(), matrix.statistic[~shown.mask])
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert len(written) == (~shown.mask).sum()
    for (i, j), text in written.items():
        assert float(text.rstrip("*")) == pytest.approx(matrix.statistic[i, j], abs=0.0051)
        assert text.endswith("*") == (matrix.adjusted[i, j] <= 0.05)
    assert [ax.get_xlabel(), ax.get_ylabel()] == ["y", "x"]
    small = Figure(figsize=(1, 1)).add_subplot()
    assert not matrix.plot(small).texts  # no room for numbers
    many = xi_matrix(np.random.default_rng(0).normal(size=(20, 16)))
    assert not many.plot().texts


def test_chance_beside_the_data(table, y):
    options = {"confidence_level": None, "seed": 1}
    result = codec_test(y, table[["age", "$z$"]], n_permutations=49, **options)
    ax = result.plot()
    assert sum(bar.get_height() for bar in ax.patches) == 49
    assert list(ax.get_lines()[0].get_xdata()) == [result.statistic] * 2
    with pytest.warns(UserWarning, match="constant"):
        nothing = codec_test(np.ones(300), table["age"], n_permutations=9, **options)
    nothing.plot().figure.canvas.draw()


def test_the_limit_and_an_interval_beside_the_data(table, y):
    z = table["age"].round()  # few values: the limit is no normal one
    for column, ties in ((table["age"], False), (z, True)):
        result = codec_test(y, column, method="asymptotic", confidence_level=0.9, seed=1)
        assert (result.null_skewness > 0.02) == ties
        ax = result.plot()
        (curve,) = ax.collections
        assert curve.get_label() == "the limit of many rows"
        across, up = curve.get_paths()[0].vertices.T
        mode = across[np.argmax(up)]
        if ties:
            assert mode < result.null_mean - 0.01 * result.null_sd
        else:
            assert abs(mode - result.null_mean) < 0.1 * result.null_sd
        assert across.min() < result.null_mean < across.max()
        (interval,) = ax.patches
        box = interval.get_extents().transformed(ax.transData.inverted())
        assert np.allclose([box.x0, box.x1], result.confidence_interval)
        assert_legible(ax)
    with pytest.warns(UserWarning, match="constant"):
        nothing = codec_test(y, np.ones(300), method="asymptotic", confidence_level=None)
    nothing.plot().figure.canvas.draw()


def test_intervals_of_bars():
    ends = np.array([[0.1, -0.2], [0.9, 0.3]])
    ax = plots.plot_bars(["a", "b"], np.array([0.5, 0.1]), np.array([True, False]), ends=ends)
    (lines,) = ax.collections
    assert [segment[:, 0].tolist() for segment in lines.get_segments()] == ends.T.tolist()


def test_what_chance_reaches_at_each_step(table):
    y = table["age"] + table["$z$"]
    result = foci(table, y, stop="permutation", n_permutations=49, seed=0)
    ax = result.plot()
    steps = len(result.ordering)
    assert steps > 0
    marks = next(line for line in ax.get_lines() if "chance" in str(line.get_label()))
    assert list(marks.get_xdata()) == result.threshold.tolist()
    assert list(marks.get_ydata()) == list(range(1, steps + 2))
    assert ax.get_yticklabels()[-1].get_text() == f"next: p-value {result.pvalues[-1]:.3g}"
    assert not ax.patches  # no bar around the conditional T, which the threshold is not of
    assert_legible(ax)
    capped = foci(table, y, stop="permutation", n_permutations=49, seed=0, max_features=1)
    assert len(capped.plot().get_yticklabels()) == 1


def test_where_nothing_is_significant_the_threshold_is_drawn(table, rng):
    result = foci(table, rng.normal(size=300), stop="permutation", n_permutations=49, seed=3)
    assert result.stop_reason == "not_significant"
    assert len(result.ordering) == 0
    ax = result.plot()
    assert "0 of 6 columns selected; no other is significant" not in ax.get_title(loc="left")
    assert "0 of 6 columns selected; none is significant" in ax.get_title(loc="left")
    (label,) = ax.get_yticklabels()
    assert label.get_text() == f"best: p-value {result.pvalues[0]:.3g}"
    marks = next(line for line in ax.get_lines() if "chance" in str(line.get_label()))
    assert list(marks.get_xdata()) == result.threshold.tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["cumulative T by chance"]
    assert not ax.texts


@pytest.mark.parametrize("p", [2, 4, 7, 8, 12, 16, 20])
def test_names_around_a_graph_are_horizontal(rng, p):
    table = pd.DataFrame(rng.normal(size=(40, p)), columns=[f"measurement {k}" for k in range(p)])
    ax = dependence_graph(table, max_features=1, stop=False).plot()
    assert len(ax.texts) == p
    assert {text.get_rotation() for text in ax.texts} == {0}
    assert_legible(ax)


def test_of_many_columns_those_with_most_weight_are_drawn():
    p = 70
    adjacency = np.zeros((p, p), dtype=bool)
    adjacency[66, 69] = adjacency[3, 64] = True
    graph = type(dependence_graph(np.eye(4) + np.arange(4)))(
        adjacency, 0.5 * adjacency, [], [f"v{k}" for k in range(p)]
    )
    ax = graph.plot()
    assert {"v3", "v64", "v66", "v69"} < set(texts(ax))
    assert ax.get_title(loc="left").startswith("60 of 70 columns: ")


def test_names_are_drawn_as_they_are(rng):
    names = ["$", "a$b$c", "\\frac", "x_{", "%", "\n", "", " "]
    table = pd.DataFrame(rng.normal(size=(40, len(names))), columns=names)
    y = table.iloc[:, 0] + table.iloc[:, 1]
    graph = dependence_graph(table)
    for result in (foci(table, y, stop=False), stability(table, y, n_pairs=2), graph):
        result.plot().figure.canvas.draw()
    drawn = [text.get_text() for text in graph.plot().texts]
    assert drawn[:5] == names[:5]


def test_short_names_stay_distinct():
    names = [f"the mean of sensor {k} in the hall" for k in range(12)]
    short = plots._distinct(names, 16)
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 16
    assert plots._distinct(["a", "b" * 30], 10) == ["a", "bbbbb…bbbb"]
    assert plots._distinct(["same" * 9] * 2, 10)[0] == plots._distinct(["same" * 9] * 2, 10)[1]


@pytest.mark.parametrize(
    ("missing", "name"), [("matplotlib", "matplotlib"), ("networkx", "networkx")]
)
def test_without_a_library_the_error_says_what_to_install(missing, name):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import numpy as np, lcodec_ext\n"
        "assert 'pyplot' not in str(sys.modules)\n"
        "X = np.random.default_rng(0).normal(size=(40, 3))\n"
        "try: lcodec_ext.dependence_graph(X).plot()\n"
        "except ImportError as error: text = str(error)\n"
        f"assert {missing!r} in text and '[plot]' in text"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_matrix_explains_stars_where_there_are_some():
    X = np.random.default_rng(0).normal(size=(100, 4))
    assert "*" not in xi_matrix(X, seed=0).plot().get_title(loc="left")
    X[:, 1] = X[:, 0] ** 2
    assert xi_matrix(X).plot().get_title(loc="left").endswith("*: adjusted p ≤ 0.05")
    title = xi_matrix(X, adjust=None).plot().get_title(loc="left")
    assert title.endswith("*: p ≤ 0.05")
    many = np.column_stack([X] * 10)
    assert "*" not in xi_matrix(many).plot().get_title(loc="left")
