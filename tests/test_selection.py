"""What foci, lfoci, lcodec, nearest_neighbors and dependence_graph promise."""

import itertools
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from numpy.random import Generator, Philox

import lcodec_ext
from lcodec_ext._random import pick, tie_hash

pytestmark = pytest.mark.native


@pytest.fixture
def problem(rng):
    X = rng.normal(size=(400, 8))
    return X, X[:, 2] * X[:, 5] + np.sin(X[:, 7])


def test_selects_the_markov_blanket(problem):
    X, y = problem
    result = lcodec_ext.foci(X, y)
    assert set(result.ordering) == {2, 5, 7}
    assert result.stop_reason == "no_gain"
    assert result.ordering.dtype == np.int64
    assert result.cumulative.dtype == result.conditional.dtype == np.float64
    assert (result.n_samples, result.n_features) == X.shape
    assert (np.diff(result.cumulative) > 0).all()
    ordering, values = result
    assert ordering is result.ordering
    assert values is result.cumulative
    assert "3 of 8 columns selected on 400 rows, stopped by 'no_gain'" in repr(result)


def test_values_are_those_of_codec_on_standardised_columns(problem, rng):
    """As docs/dependence.md says."""
    X, y = problem
    X = X * rng.permutation([0.01, 0.1, 0.5, 1.0, 2.0, 3.0, 10.0, 100.0])
    result = lcodec_ext.foci(X, y, stop=False, max_features=4)
    scaled = X / X.std(axis=0)
    chosen = result.ordering.tolist()
    for k in range(1, 4):
        got = lcodec_ext.codec(y, scaled[:, chosen[k]], scaled[:, chosen[:k]])
        assert got == pytest.approx(result.conditional[k], rel=1e-9)
        assert lcodec_ext.codec(y, X[:, chosen[k]], X[:, chosen[:k]]) != got


def test_values_are_those_of_codec_on_raw_columns(problem):
    X, y = problem
    result = lcodec_ext.foci(X, y, standardize=None, stop=False)
    assert result.stop_reason == "exhausted"
    assert sorted(result.ordering) == list(range(8))
    for k in range(8):
        chosen = X[:, result.ordering[: k + 1]]
        assert result.cumulative[k] == lcodec_ext.codec(y, chosen)
        if k:
            assert result.conditional[k] == lcodec_ext.codec(y, chosen[:, k:], chosen[:, :k])
    assert result.conditional[0] == result.cumulative[0]


def test_standardisation_divides_by_sd_or_range(problem):
    X, y = problem
    X = X * 10.0 ** np.arange(-4, 4)
    for name, spread in [("scale", X.std(axis=0, ddof=1)), ("bounded", np.ptp(X, axis=0))]:
        result = lcodec_ext.foci(X, y, standardize=name)
        raw = lcodec_ext.foci(X / spread, y, standardize=None)
        assert result.ordering.tolist() == raw.ordering.tolist()
        np.testing.assert_allclose(result.cumulative, raw.cumulative, atol=0.01)


def test_max_features_caps(problem):
    X, y = problem
    everything = lcodec_ext.foci(X, y, stop=False)
    for cap in (1, 2, 7):
        result = lcodec_ext.foci(X, y, stop=False, max_features=cap)
        assert result.ordering.tolist() == everything.ordering[:cap].tolist()
        assert result.stop_reason == "max_features"
    assert lcodec_ext.foci(X, y, stop=False, max_features=99).stop_reason == "exhausted"


def test_min_gain_is_in_cumulative_T(problem):
    X, y = problem
    free = lcodec_ext.foci(X, y)
    gains = np.diff(free.cumulative, prepend=0.0)
    threshold = float(gains.min()) + 1e-9
    result = lcodec_ext.foci(X, y, min_gain=threshold)
    assert len(result.ordering) == int(np.argmax(gains < threshold))
    assert result.stop_reason == "min_gain"
    assert lcodec_ext.foci(X, y, min_gain=2.0).ordering.tolist() == []


def test_nothing_is_selected_from_noise(rng):
    X = rng.normal(size=(60, 3))
    for _ in range(20):
        result = lcodec_ext.foci(X, rng.normal(size=60))
        if len(result.ordering) == 0:
            break
    assert result.stop_reason == "no_gain"
    assert result.cumulative.shape == (0,)
    assert X[:, result.ordering].shape == (60, 0)


def test_preselected_columns_are_the_conditioning_set(problem):
    X, y = problem
    full = lcodec_ext.foci(X, y, standardize=None)
    first, *rest = full.ordering.tolist()
    result = lcodec_ext.foci(X, y, standardize=None, preselected=[first])
    assert result.ordering.tolist() == rest
    assert result.base == full.cumulative[0] == lcodec_ext.codec(y, X[:, first])
    assert result.cumulative.tolist() == full.cumulative[1:].tolist()
    assert result.conditional.tolist() == full.conditional[1:].tolist()
    everything = lcodec_ext.foci(X, y, preselected=range(8))
    assert (everything.ordering.tolist(), everything.stop_reason) == ([], "exhausted")
    named = lcodec_ext.foci(pd.DataFrame(X, columns=list("abcdefgh")), y, preselected=["c", 0])
    assert named.preselected == (2, 0)


def test_progress_changes_nothing(problem, capfd):
    X, y = problem
    silent = lcodec_ext.foci(X, y)
    assert capfd.readouterr().err == ""
    shown = lcodec_ext.foci(X, y, progress=True)
    assert "FOCI step 1" in capfd.readouterr().err
    assert shown.cumulative.tolist() == silent.cumulative.tolist()


def test_y_that_is_a_function_of_the_selected(rng):
    X = np.column_stack([np.repeat(np.arange(20), 3), rng.normal(size=60)])
    with pytest.warns(UserWarning, match="y is a function of the columns selected so far"):
        result = lcodec_ext.foci(X, X[:, 0], stop=False)
    assert result.cumulative[0] == 1.0
    assert result.conditional[1] == 1.0


def test_random_ties_follow_the_seed(rng):
    X = rng.integers(0, 2, (80, 5))
    y = rng.normal(size=80)

    def run(seed):
        return lcodec_ext.foci(X, y, ties="random", seed=seed, stop=False).cumulative.tolist()

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)
    values = [lcodec_ext.codec(y, X[:, 0], ties="random", seed=s) for s in range(400)]
    exact = lcodec_ext.codec(y, X[:, 0])
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - exact) < 4 * standard_error


def test_tie_hash_is_written_down():
    """The words themselves: changing them would change everybody's results."""
    assert tie_hash(0, 3).tolist() == [
        int(word) for word in (_splitmix(_splitmix(_GAMMA) + k * _GAMMA) for k in (1, 2, 3))
    ]
    assert [pick(word, 7) for word in (0, 2**63, 2**64 - 1)] == [0, 3, 6]
    assert 0.45 < np.mean(tie_hash(5, 10_000) / 2**64) < 0.55


_GAMMA = 0x9E3779B97F4A7C15


def _splitmix(word):
    word &= 2**64 - 1
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def test_lcodec_is_codec_of_noisy_arguments(rng):
    y, z, x = rng.integers(0, 3, (3, 100))
    noisy = [
        column + 0.25 * Generator(Philox(9).jumped(k)).standard_normal(100)
        for k, column in enumerate([y, x, z])
    ]
    value = lcodec_ext.lcodec(y, z, x, noise=0.25, seed=9)
    assert value == lcodec_ext.codec(noisy[0], noisy[2], noisy[1])
    # powers of two scale without rounding, so relative noise must give the same ranks
    options = {"noise": 0.1, "noise_scale": "relative"}
    assert lcodec_ext.lcodec(y * 64, z * 8, **options) == lcodec_ext.lcodec(y, z, **options)
    assert lcodec_ext.lcodec(y * 64, z * 8, noise=5) != lcodec_ext.lcodec(y, z, noise=5)
    assert lcodec_ext.lcodec(y, z, x, noise=0) == lcodec_ext.codec(y, z, x)
    assert lcodec_ext.lcodec(y, z, x, seed=1) != lcodec_ext.lcodec(y, z, x, seed=2)
    float32 = [column.astype(np.float32) for column in (y, z, x)]
    assert lcodec_ext.lcodec(*float32) == lcodec_ext.lcodec(y, z, x)


def test_lfoci_is_foci_of_noisy_arguments(rng):
    X = rng.integers(0, 2, (300, 5))
    y = X[:, 1] + 2 * X[:, 4]
    noisy = [
        column + 0.01 * Generator(Philox(3).jumped(k)).standard_normal(300)
        for k, column in enumerate([y, *X.T])
    ]
    result = lcodec_ext.lfoci(X, y, seed=3)
    expected = lcodec_ext.foci(np.column_stack(noisy[1:]), noisy[0])
    assert result.cumulative.tolist() == expected.cumulative.tolist()
    assert set(result.ordering[:2]) == {1, 4}
    names = lcodec_ext.lfoci(pd.DataFrame(X, columns=list("abcde")), y, seed=3).names
    assert names == ["abcde"[k] for k in expected.ordering]


def test_nearest_neighbors_of_duplicates_are_other_rows():
    X = np.array([[0.0], [0.0], [0.0], [5.0], [6.0], [4.0]])
    assert lcodec_ext.nearest_neighbors(X).tolist() == [1, 0, 0, 4, 3, 3]
    indptr, indices = lcodec_ext.nearest_neighbors(X, ties="all")
    assert [indices[a:b].tolist() for a, b in pairwise(indptr)] == [
        [1, 2], [0, 2], [0, 1], [4, 5], [3], [3]
    ]  # fmt: skip
    drawn = {tuple(lcodec_ext.nearest_neighbors(X, ties="random", seed=s)) for s in range(200)}
    assert len(drawn) == 16  # four rows with two tied neighbours each
    assert lcodec_ext.nearest_neighbors([[1.0], [2.0]]).tolist() == [1, 0]
    with pytest.raises(ValueError, match="X must have at least 2 rows; got 1"):
        lcodec_ext.nearest_neighbors([[1.0]])
    with pytest.raises(ValueError, match="ties must be one of 'first', 'random', 'all'"):
        lcodec_ext.nearest_neighbors(X, ties="average")


def test_nearest_neighbors_in_many_columns(rng):
    from scipy.spatial.distance import cdist

    X = rng.integers(-4, 5, (50, 700)).astype(float)  # integers: any order of sums is exact
    distance = cdist(X, X, "sqeuclidean")
    np.fill_diagonal(distance, np.inf)
    assert lcodec_ext.nearest_neighbors(X).tolist() == distance.argmin(axis=1).tolist()


def test_dependence_graph(rng):
    a, b, c = rng.normal(size=(3, 300))
    frame = pd.DataFrame({"a": a, "b": b, "ab": a * b, "c": c})
    graph = lcodec_ext.dependence_graph(frame)
    assert graph.names == ["a", "b", "ab", "c"]
    assert graph.adjacency[2].tolist() == [True, True, False, False]
    assert not graph.adjacency.diagonal().any()
    assert ((graph.weights != 0) == graph.adjacency).all()
    for i, result in enumerate(graph.results):
        others = [k for k in range(4) if k != i]
        alone = lcodec_ext.foci(frame.iloc[:, others], frame.iloc[:, i])
        assert result.names == alone.names
        assert [frame.columns[k] for k in result.ordering] == alone.names
        assert result.cumulative.tolist() == alone.cumulative.tolist()
        assert graph.weights[i, result.ordering].tolist() == alone.conditional.tolist()
    with pytest.raises(ValueError, match="at least two columns for a graph; got 1"):
        lcodec_ext.dependence_graph(frame[["a"]])
    with pytest.raises(ValueError, match="standardize must be one of"):
        lcodec_ext.dependence_graph(frame, standardize="no")


@pytest.mark.parametrize(
    "options",
    [
        {"ties": "average"},
        {"ties": "first", "stop": False, "max_features": 3},
        {"ties": "random", "seed": 7, "standardize": None},
        {"stop": "permutation", "n_permutations": 19, "seed": 3, "max_features": 2},
        {"stop": False},
    ],
)
@pytest.mark.filterwarnings("ignore:.*function")  # a > 0 is one of a
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_graph_is_foci_for_each_column_however_rows_tie(rng, threads, dtype, options):
    a, b = rng.normal(size=(2, 500))
    hundredths, halves = np.round(a * b, 2), np.round(2 * b) / 2  # more and less than 256 values
    zeros = np.where(rng.random(500) < 0.3, rng.choice([0.0, -0.0], 500), hundredths)
    X = np.column_stack([a, b, hundredths, halves, a > 0, zeros]).astype(dtype)
    graph = lcodec_ext.dependence_graph(X, **options)
    for i, result in enumerate(graph.results):
        others = np.delete(np.arange(6), i)
        alone = lcodec_ext.foci(X[:, others], X[:, i], **options)
        assert result.ordering.tolist() == others[alone.ordering].tolist()
        assert result.cumulative.tolist() == alone.cumulative.tolist()
        assert result.conditional.tolist() == alone.conditional.tolist()
        assert (result.stop_reason, result.seed) == (alone.stop_reason, alone.seed)
        if alone.pvalues is not None:
            assert result.pvalues.tolist() == alone.pvalues.tolist()


def test_a_graph_says_once_that_columns_determine_others(rng):
    bits = rng.integers(0, 2, (200, 2))
    X = np.column_stack([bits, bits[:, 0] ^ bits[:, 1], rng.random(200)])
    with pytest.warns(UserWarning, match="3 of 4 columns are functions of columns") as caught:
        lcodec_ext.dependence_graph(X, stop=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_graph_prints_what_depends_on_what(rng):
    a, b = rng.normal(size=(2, 300))
    table = pd.DataFrame({"a": a, "b": b, "a b": a * b, "noise": rng.normal(size=300)})
    graph = lcodec_ext.dependence_graph(table, min_gain=0.1)
    head, *lines = repr(graph).split("\n")
    count = int(graph.adjacency.sum())
    assert head == (f"DependenceGraph: {count} of 12 dependences between 4 columns, on 300 rows")
    assert [line.split(" depends on ")[0].strip() for line in lines] == list(
        map(repr, table.columns)
    )
    result = graph.results[2]
    assert lines[2].startswith(f"  'a b' depends on {table.columns[result.ordering[0]]!r} (")
    assert f"({result.conditional[0]:.4f})" in lines[2]
    assert lines[3] == "  'noise' depends on none"
    wide = repr(lcodec_ext.dependence_graph(rng.normal(size=(30, 25))))
    assert "column 3 depends on " in wide
    assert wide.endswith("  ... and 5 more columns")
    assert len(wide.split("\n")) == 22


def test_dependence_graph_with_a_constant_column(rng):
    X = np.column_stack([rng.normal(size=(40, 2)), np.ones(40)])
    with pytest.warns(UserWarning, match="column 2 of X is constant") as caught:
        graph = lcodec_ext.dependence_graph(X)
    assert len(caught) == 1
    assert not graph.adjacency[2].any()
    assert not graph.adjacency[:, 2].any()


# ------------------------------------------------------------------------------------------------
# Classes as y

LABELS = ["ash", "birch", "cedar", "doum"]


@pytest.fixture
def species(rng):
    X = np.round(8 * rng.normal(size=(120, 5)))
    return X, (X[:, 1] > 3).astype(int) + 2 * (X[:, 3] * X[:, 1] > 0)


def test_classes_are_averaged_one_against_the_rest(species):
    X, y = species
    names = np.array(LABELS)[y]
    for conditioned in (None, X[:, 3:]):
        for ties in ("average", "first", "random"):
            options = {"ties": ties, "seed": 5}
            expected = [
                lcodec_ext.codec(y == c, X[:, :2], conditioned, **options) for c in range(4)
            ]
            value = lcodec_ext.codec(names, X[:, :2], conditioned, **options)
            assert value == pytest.approx(np.mean(expected), abs=1e-14)
    for backend in ("cpu", "reference"):
        assert lcodec_ext.codec(names, X[:, :2], backend=backend) == lcodec_ext.codec(
            names, X[:, :2]
        )


@pytest.mark.parametrize("options", [{}, {"stop": False}, {"progress": True}, {"preselected": [2]}])
def test_names_and_numbers_of_classes_change_nothing(species, options):
    X, y = species
    results = []
    for order in itertools.permutations(range(4)):
        result = lcodec_ext.foci(X, np.array(LABELS)[list(order)][y], standardize=None, **options)
        results.append((result.ordering.tolist(), result.cumulative.tolist()))
    assert all(result == results[0] for result in results)
    ordering, cumulative = results[0]
    for k, T in enumerate(cumulative):
        columns = [*options.get("preselected", []), *ordering[: k + 1]]
        assert lcodec_ext.codec(np.array(LABELS)[y], X[:, columns]) == T
    # numbers have an order, and three numberings are three responses
    assert len({lcodec_ext.codec(np.array(o)[y], X) for o in itertools.permutations(range(4))}) > 1


def test_the_best_column_of_classes_is_found_exactly(rng):
    """Against a search through all columns with rational sums, on columns that tie."""
    for _ in range(20):
        X = rng.integers(0, 3, (24, 6)).astype(float)
        X[:, 5] = X[:, 2]
        names = np.array(LABELS)[rng.integers(0, 3, 24)]
        T = [lcodec_ext.codec(names, X[:, k], backend="reference") for k in range(6)]
        first = lcodec_ext.foci(X, names, stop=False, max_features=1, standardize=None)
        assert T[int(first.ordering[0])] == max(T)
        assert int(first.ordering[0]) == int(np.argmax(T))


@pytest.mark.parametrize(
    "made",
    [
        list,
        np.ndarray.tolist,
        lambda y: y[:, np.newaxis],
        lambda y: y.astype(object),
        lambda y: y.astype("S"),
        pd.Series,
        pd.Categorical,
        pd.Index,
        lambda y: pd.Series(y, dtype="category"),
        lambda y: pd.Series(y, dtype="string"),
        lambda y: pd.Series(np.searchsorted(LABELS, y), dtype="category"),
        lambda y: pd.DataFrame({"y": y}),
        pa.array,
        lambda y: pa.array(y).dictionary_encode(),
        lambda y: pa.table({"y": y}),
    ],
)
def test_strings_and_categories_of_every_library(species, made):
    X, y = species
    names = np.array(LABELS)[y]
    assert lcodec_ext.codec(made(names), X) == lcodec_ext.codec(names, X)


def test_ordered_categories_keep_their_order(species):
    X, y = species
    grades = pd.Categorical(np.array(LABELS)[y], categories=LABELS, ordered=True)
    assert lcodec_ext.codec(grades, X) == lcodec_ext.codec(y, X)
    assert lcodec_ext.lcodec(grades, X) == lcodec_ext.lcodec(y, X)
    with_gap = pd.Series(grades)
    with_gap[3] = np.nan
    rest = np.arange(120) != 3
    value = lcodec_ext.codec(with_gap, X, nan_policy="omit")
    assert value == lcodec_ext.codec(y[rest], X[rest])


def test_missing_classes_and_responses_without_classes(species):
    X, y = species
    names = np.array(LABELS)[y].astype(object)
    for missing in (None, np.nan, pd.NA):
        names[7] = missing
        with pytest.raises(ValueError, match="NaN in y at row 7; pass nan_policy='omit'"):
            lcodec_ext.codec(names, X)
        rest = np.arange(120) != 7
        value = lcodec_ext.codec(names, X, nan_policy="omit")
        assert value == lcodec_ext.codec(names[rest], X[rest])
    for function, arguments in ((lcodec_ext.lcodec, (names, X)), (lcodec_ext.lfoci, (X, names))):
        with pytest.raises(
            ValueError, match="adds noise to y, and y holds classes without an order"
        ):
            function(*arguments, nan_policy="omit")
    with pytest.raises(ValueError, match="y has 120 classes on 120 rows"):
        lcodec_ext.foci(X, [f"sample {k}" for k in range(120)])
    with pytest.warns(UserWarning, match="y is constant"):
        assert lcodec_ext.codec(["oak"] * 120, X) == 1


@pytest.mark.parametrize("missing", [float("nan"), np.float32("nan"), None])
def test_what_is_missing_in_a_list_of_classes_is_no_class(species, missing):
    X, y = species
    names = np.array(LABELS)[y].tolist()
    rest = np.arange(120) != 7
    expected = lcodec_ext.codec(np.array(names)[rest], X[rest])
    masked = np.ma.masked_array(names, mask=~rest)
    names[7] = missing
    column = [[name] for name in names]
    for given in (names, tuple(names), column, masked, masked.astype(object)):
        with pytest.raises(ValueError, match="NaN in y at row 7; pass nan_policy='omit'"):
            lcodec_ext.codec(given, X)
        assert lcodec_ext.codec(given, X, nan_policy="omit") == expected
    assert masked.data[7] == np.array(LABELS)[y[7]]  # what is below a mask stays as it is
    for given in (names, masked):
        with pytest.raises(ValueError, match="NaN"):
            lcodec_ext.FOCISelector().fit(X, given)


@pytest.mark.parametrize("make", [list, tuple, pd.Series, lambda y: np.array(y, dtype=object)])
def test_numbers_beside_text_are_no_classes(species, make):
    X, y = species
    given = make([*y[:-1].tolist(), "?"])
    for call in (lambda: lcodec_ext.codec(given, X), lambda: lcodec_ext.foci(X, given)):
        with pytest.raises(ValueError, match="y must .* got objects .int, str.; put NaN for text"):
            call()
    with pytest.raises(ValueError, match=r"'\?'"):
        lcodec_ext.FOCISelector().fit(X, given)


def test_every_type_of_text_of_numpy_is_classes(species):
    X, y = species
    names = np.array(LABELS)[y]
    expected = lcodec_ext.codec(names, X)
    kinds = [names, names.astype("S"), names.astype(object), names.tolist()]
    if hasattr(np.dtypes, "StringDType"):  # since NumPy 2
        kinds += [names.astype(np.dtypes.StringDType())]
        gap = names.astype(np.dtypes.StringDType(na_object=np.nan))
        gap[7] = np.nan
        rest = np.arange(120) != 7
        value = lcodec_ext.codec(gap, X, nan_policy="omit")
        assert value == lcodec_ext.codec(names[rest], X[rest])
    for given in kinds:
        assert lcodec_ext.codec(given, X) == expected
        selector = lcodec_ext.FOCISelector().fit(X, given)
        assert selector.cumulative_.tolist() == lcodec_ext.foci(X, names).cumulative.tolist()


# ------------------------------------------------------------------------------------------------
# Decimal data


@pytest.fixture
def grid(rng):
    """Counts of millimetres, as centimetres with one decimal, and a response."""
    counts = rng.integers(20, 80, (150, 4))
    return counts, counts / 10, (counts[:, 1] // 9 + counts[:, 2]).astype(float)


def test_decimals_make_ties_the_same_in_every_unit(grid):
    counts, cm, y = grid
    expected = lcodec_ext.codec(y, counts[:, :2], counts[:, 2:])
    assert lcodec_ext.codec(y, cm[:, :2], cm[:, 2:]) != expected  # rounding splits ties
    for table, decimals in ((cm, 1), (cm, 3), (counts, 0), (counts / 100, 2), (counts / 1000, 3)):
        value = lcodec_ext.codec(y, table[:, :2], table[:, 2:], decimals=decimals)
        assert value == expected
    for table in (
        cm.astype(np.float32),
        pd.DataFrame(cm),
        pd.DataFrame(cm).astype("Float32"),
        cm.tolist(),
    ):
        result = lcodec_ext.foci(table, y, stop=False, decimals=1)
        assert (
            result.cumulative.tolist() == lcodec_ext.foci(counts, y, stop=False).cumulative.tolist()
        )
    nearest = lcodec_ext.nearest_neighbors(cm[:, :2], ties="all", decimals=1)
    for found, wanted in zip(
        nearest, lcodec_ext.nearest_neighbors(counts[:, :2], ties="all"), strict=True
    ):
        assert found.tolist() == wanted.tolist()
    graph = lcodec_ext.dependence_graph(cm, decimals=1)
    assert graph.weights.tolist() == lcodec_ext.dependence_graph(counts).weights.tolist()
    selector = lcodec_ext.FOCISelector(decimals=1, stop=False).fit(cm, y)
    assert selector.cumulative_.tolist() == (
        lcodec_ext.foci(counts, y, stop=False).cumulative.tolist()
    )


def test_decimals_forgive_what_arithmetic_adds(grid):
    counts, cm, y = grid
    sums = cm + 0.1 - 0.3 + 0.2  # 5.699999999999999 and the like
    assert (sums != cm).any()
    assert lcodec_ext.codec(y, sums, decimals=1) == lcodec_ext.codec(y, counts)


@pytest.mark.parametrize(
    ("value", "decimals", "error", "message"),
    [
        (2.25, 1, ValueError, "column 'c' .index 2. of X holds 2.25 in row 7, which has"),
        (
            np.pi,
            4,
            ValueError,
            "holds 3.14159.* in row 7, which has more than 4 decimals; pass more",
        ),
        (
            1e12,
            6,
            ValueError,
            "holds 1000000000000.0 in row 7, which is beyond 2..51 units of 1e-6; pass fewer",
        ),
        (1.0, -1, ValueError, "decimals must be an integer from 0 to 15; got -1"),
        (1.0, 1.0, TypeError, "decimals must be an integer from 0 to 15; got 1.0"),
        (np.nan, 1, ValueError, "NaN in X at row 7"),
        (np.inf, 1, ValueError, "infinite values"),
    ],
)
def test_what_decimals_refuse(grid, value, decimals, error, message):
    _, cm, y = grid
    cm[7, 2] = value
    with pytest.raises(error, match=message):
        lcodec_ext.foci(pd.DataFrame(cm, columns=list("abcd")), y, decimals=decimals)


@pytest.mark.parametrize(
    ("start", "step", "dtype", "decimals", "message"),
    [
        (1.6e9, 1e-3, "float64", 0, "has more than 0 decimals"),  # seconds with milliseconds
        (1.6e9, 1e-3, "float64", 2, "has more than 2 decimals"),
        (1.6e9, 1e-3, "float64", 3, None),
        (1.6e9, 1e-6, "float64", 6, None),
        (1.6e9, 1e-6, "float64", 7, "is beyond 2..51 units of 1e-7; pass fewer"),
        (5e8, 0.25, "float64", 0, "has more than 0 decimals"),
        (6e5, 0.5, "float32", 0, "has more than 0 decimals"),
        (1e5, 0.1, "float32", 1, None),
        (5e5, 0.1, "float32", 1, "is beyond 2..22 units of 1e-1; pass float64 or fewer"),
        (1.2e7, 1, "float32", 0, None),
        (2e7, 2, "float32", 0, "is beyond 2..24 units of 1e-0"),
        (2**52, 1, "float64", 0, None),
        (2**52, 1, "int64", 0, None),
    ],
)
def test_decimals_round_nothing_however_large(rng, start, step, dtype, decimals, message):
    counts = rng.integers(0, 1000, 200)
    y = counts + rng.normal(size=200)
    z = start + step * counts
    if step < 1:  # correctly rounded
        z = (round(start / step) + counts) / round(1 / step)
    z = z.astype(dtype)
    if message is None:
        assert lcodec_ext.codec(y, z, decimals=decimals) == lcodec_ext.codec(y, counts)
    else:
        with pytest.raises(ValueError, match=f"column 0 of z holds .* in row .*{message}"):
            lcodec_ext.codec(y, z, decimals=decimals)


def test_missing_values_beside_decimals(grid):
    counts, cm, y = grid
    cm[7, 2] = np.nan
    rest = np.arange(150) != 7
    value = lcodec_ext.codec(y, cm, decimals=1, nan_policy="omit")
    assert value == lcodec_ext.codec(y[rest], counts[rest])


def test_underflow_goes_by_rows_not_by_columns(rng):
    """2000 columns of 50 rows, whose squared differences a float32 still tells apart."""
    X = (rng.random((50, 2000)) * 1.5e-17).astype(np.float32)
    lcodec_ext.foci(X, rng.random(50), standardize=None, max_features=1)  # no warning
    with pytest.warns(UserWarning, match="underflow float32"):
        lcodec_ext.foci(X * np.float32(0.1), rng.random(50), standardize=None, max_features=1)
