"""FOCISelector as scikit-learn and pandas users meet it."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import lcodec_ext
from lcodec_ext import FOCISelector, foci

NAMES = ["age", "sex", "bmi", "bp", "s1", "s2"]


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 6))
    return X, X[:, 4] * X[:, 1] + X[:, 4]


# scikit-learn's tables are small and may have constant columns, which is said in warnings
@pytest.mark.filterwarnings(
    "ignore:.*constant and can tell nothing",
    "ignore:y is a function of the columns",
    "ignore:No features were selected",
)
@parametrize_with_checks(
    [
        FOCISelector(),
        FOCISelector(max_features=2, stop=False, standardize=None, ties="random", random_state=0),
    ]
)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_selects_what_foci_selects(data):
    X, y = data
    selector = FOCISelector().fit(X, y)
    expected = foci(X, y)
    assert selector.ordering_.tolist() == expected.ordering.tolist() == [4, 1]
    assert selector.cumulative_.tolist() == expected.cumulative.tolist()
    assert selector.conditional_.tolist() == expected.conditional.tolist()
    assert selector.support_.tolist() == [False, True, False, False, True, False]
    # columns come out in the order of the input; ordering_ has the order of selection
    assert selector.get_support(indices=True).tolist() == [1, 4]
    assert np.array_equal(selector.transform(X), X[:, [1, 4]])
    assert np.array_equal(selector.inverse_transform(X[:, [1, 4]])[:, [1, 4]], X[:, [1, 4]])


@pytest.mark.parametrize(
    "options",
    [
        {"max_features": 3, "stop": False},
        {"min_gain": 0.2},
        {"standardize": None},
        {"standardize": "bounded", "ties": "first"},
        {"backend": "reference"},
    ],
)
def test_options_are_those_of_foci(data, options):
    X, y = data
    X = np.round(X * [1, 2, 3, 4, 5, 60])
    selector = FOCISelector(**options).fit(X, y)
    expected = foci(X, y, **options)
    assert selector.ordering_.tolist() == expected.ordering.tolist()
    assert selector.cumulative_.tolist() == expected.cumulative.tolist()


def test_a_step_may_be_tested(data):
    X, y = data
    options = {"stop": "permutation", "alpha": 0.2, "n_permutations": 19}
    seed = int(np.random.RandomState(3).randint(2**31))
    expected = foci(X, y, seed=seed, **options)
    for _ in range(2):
        selector = FOCISelector(random_state=3, **options).fit(X, y)
        assert selector.ordering_.tolist() == expected.ordering.tolist()
    with pytest.raises(ValueError, match="alpha"):
        FOCISelector(alpha=0.2).fit(X, y)


def test_float32_is_computed_in_float32(data):
    X, y = data
    X = (X * 1e-3 + 1).astype(np.float32)
    selector = FOCISelector(standardize=None, stop=False).fit(X, y)
    expected = foci(X, y, standardize=None, stop=False)
    assert selector.cumulative_.tolist() == expected.cumulative.tolist()
    assert selector.transform(X).dtype == np.float32


def test_names_in_and_out(data):
    X, y = data
    table = pd.DataFrame(X, columns=NAMES)
    selector = FOCISelector().set_output(transform="pandas").fit(table, pd.Series(y))
    assert selector.feature_names_in_.tolist() == NAMES
    assert selector.get_feature_names_out().tolist() == ["sex", "s1"]
    selected = selector.transform(table)
    assert isinstance(selected, pd.DataFrame)
    pd.testing.assert_frame_equal(selected, table[["sex", "s1"]])
    with pytest.raises(ValueError, match="feature names should match"):
        selector.transform(table[NAMES[::-1]])
    mixed = table.assign(sex=table["sex"] > 0, age=range(200))
    assert FOCISelector().fit(mixed, y).n_features_in_ == 6


def test_pipeline_grid_search_clone_and_pickle(data):
    X, y = data
    pipeline = make_pipeline(FOCISelector(stop=False), LinearRegression())
    search = GridSearchCV(pipeline, {"fociselector__max_features": [1, 2, 6]}, cv=3).fit(X, y)
    selector = search.best_estimator_[0]
    assert len(selector.ordering_) == search.best_params_["fociselector__max_features"]
    again = pickle.loads(pickle.dumps(selector))
    assert np.array_equal(again.transform(X), selector.transform(X))
    copy = clone(selector)
    assert copy.get_params() == selector.get_params()
    with pytest.raises(NotFittedError):
        copy.get_support()


def test_nothing_to_select():
    rng = np.random.default_rng(1)
    X, y = rng.random((60, 1)), rng.random(60)
    selector = FOCISelector().fit(X, y)
    assert selector.ordering_.shape == selector.cumulative_.shape == (0,)
    assert not selector.support_.any()
    with pytest.warns(UserWarning, match="No features were selected"):
        assert selector.transform(X).shape == (60, 0)
    with pytest.warns(UserWarning, match="y is constant"):
        FOCISelector().fit(X, np.ones(60))


def test_constant_column(data):
    X, y = data
    X[:, 2] = 7
    with pytest.warns(UserWarning, match="constant"):
        selector = FOCISelector().fit(X, y)
    assert selector.ordering_.tolist() == [4, 1]


def test_random_state():
    rng = np.random.default_rng(8)
    X, y = rng.integers(0, 3, (100, 4)), rng.integers(0, 3, 100)

    def fit(random_state):
        options = {"stop": False, "ties": "random", "random_state": random_state}
        return FOCISelector(**options).fit(X, y).cumulative_.tolist()

    assert fit(1) == fit(1) != fit(2)
    assert fit(np.random.RandomState(1)) == fit(1)
    assert fit(None) != fit(None)


def test_bad_input(data):
    X, y = data
    with pytest.raises(ValueError, match="NaN in X at row 13, column 1 and"):
        FOCISelector().fit(np.ma.masked_greater(X, 2), y)  # what is below a mask is no data
    with pytest.raises(ValueError, match="Input y contains NaN"):
        FOCISelector().fit(X, np.ma.masked_greater(y, 2))
    with pytest.raises(ValueError, match="NaN"):
        FOCISelector().fit(np.where(X > 2, np.nan, X), y)
    with pytest.raises(ValueError, match="requires y"):
        FOCISelector().fit(X, None)
    with pytest.raises(ValueError, match="minimum of 3"):
        FOCISelector().fit(X[:2], y[:2])
    with pytest.raises(ValueError, match="standardize must be one of"):
        FOCISelector(standardize="minmax").fit(X, y)
    with pytest.raises(ValueError, match="max_features"):
        FOCISelector(max_features=0).fit(X, y)


def test_scikit_learn_is_loaded_on_demand():
    code = (
        "import sys, lcodec_ext; assert 'sklearn' not in sys.modules; "
        "lcodec_ext.FOCISelector; assert 'sklearn' in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert "FOCISelector" in dir(lcodec_ext)


def test_without_scikit_learn_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = None; import lcodec_ext\n"
        "try: lcodec_ext.FOCISelector\n"
        "except ImportError as error: assert 'lcodec-ext[sklearn]' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_class_labels_are_taken_without_an_order():
    X, y = load_wine(return_X_y=True)
    names = np.array(["barolo", "grignolino", "barbera"])
    expected = foci(X, names[y])
    for order in itertools.permutations(range(3)):
        numbers = np.array(order)[y]
        for labels in (
            numbers,
            numbers.astype(np.uint8),
            numbers.astype(object),
            pd.Series(numbers, dtype="Int64"),
            pd.Series(numbers, dtype="int8[pyarrow]"),
            torch.tensor(numbers),
            names[numbers],
            names[numbers].tolist(),
        ):
            selector = FOCISelector().fit(X, labels)
            assert selector.ordering_.tolist() == expected.ordering.tolist()
            assert selector.cumulative_.tolist() == expected.cumulative.tolist()
    frame = pd.Series(names[y], dtype="category")
    assert FOCISelector().fit(X, frame).ordering_.tolist() == expected.ordering.tolist()
    pipeline = make_pipeline(FOCISelector(max_features=3), LogisticRegression(max_iter=10_000))
    assert pipeline.fit(X, names[y]).score(X, names[y]) > 0.8


def test_classes_can_be_asked_for_and_refused(data):
    X, _ = data
    grades = np.clip(np.round(X[:, 4] + X[:, 1]), -2, 2)  # with 0.0 and -0.0, which are equal
    for y, classes, nominal in (
        (grades, "auto", False),  # floats have an order
        (grades, "yes", True),
        (grades.astype(int), "no", False),
        (grades.astype(int), "auto", True),
        (grades > 0, "auto", False),  # two classes: any two numbers
        (np.round(X[:, 4] * 9).astype(int), "auto", False),  # more values than classes have
    ):
        selector = FOCISelector(classes=classes, stop=False).fit(X, y)
        expected = foci(X, (y + 0).astype(str) if nominal else y, stop=False)
        assert selector.cumulative_.tolist() == expected.cumulative.tolist()
    with pytest.raises(ValueError, match="classes must be one of 'auto', 'yes', 'no'; got True"):
        FOCISelector(classes=True).fit(X, grades)
    with pytest.raises(ValueError, match="y holds strings or categories, and classes='no' expects"):
        FOCISelector(classes="no").fit(X, grades.astype(str))
    with pytest.raises(ValueError, match="NaN"):
        FOCISelector().fit(X, ["a", "b", None, "c"] * 50)


def other_columns():
    """Tables with a column that is not numbers, by what messages say of it."""
    import datetime

    import pyarrow as pa

    x = np.arange(40.0)
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=k % 7) for k in range(40)]
    lasting = [datetime.timedelta(seconds=k) for k in range(40)]
    return {
        "objects .date.": pd.DataFrame({"x": x, "c": days}),
        "datetime64": pd.DataFrame({"x": x, "c": pd.to_datetime(days)}),
        "timedelta64": pd.DataFrame({"x": x, "c": pd.to_timedelta(lasting)}),
        "Sparse": pd.DataFrame({"x": x, "c": pd.arrays.SparseArray(x)}),
        "date32": pa.table({"x": x, "c": days}),
        "duration": pa.table({"x": x, "c": lasting}),
        "decimal128": pa.table({"x": x, "c": pa.array(range(40)).cast(pa.decimal128(21, 2))}),
        "string": pa.table({"x": x, "c": ["a", "b"] * 20}),
        "categorical": pd.DataFrame({"x": x, "c": pd.Categorical(["a", "b"] * 20)}),
    }


@pytest.mark.parametrize("what", other_columns())
def test_columns_that_are_not_numbers_are_named(what):
    """scikit-learn would take dates, durations and decimals for numbers."""
    table, y = other_columns()[what], np.arange(40)
    for call in (
        lambda: FOCISelector().fit(table, y),
        lambda: foci(table, y),
        lambda: lcodec_ext.codec(y, table),
        lambda: lcodec_ext.nearest_neighbors(table),
        lambda: lcodec_ext.dependence_graph(table),
    ):
        with pytest.raises(ValueError, match=f"column 'c' .index 1. of [Xz] .*{what}.*(; |: ).*"):
            call()


def text_columns():
    """Tables of no columns with text among numbers, by their kind."""
    x = np.random.default_rng(0).normal(size=(40, 2))
    mixed = np.column_stack([x.astype(object), ["red", "blue"] * 20])
    return {"objects": mixed, "lists": mixed.tolist(), "strings": mixed.astype(str)}


@pytest.mark.parametrize("kind", text_columns())
def test_text_among_numbers_is_told_by_its_column(kind):
    table, y = text_columns()[kind], np.arange(40.0)
    for call in (
        lambda: FOCISelector().fit(table, y),
        lambda: foci(table, y),
        lambda: lcodec_ext.codec(y, table),
        lambda: lcodec_ext.nearest_neighbors(table),
    ):
        with pytest.raises(ValueError, match=r"column 2 of [Xz] .*strings \('red'\); encode categ"):
            call()
    table = [[*row[:2], float(k)] for k, row in enumerate(text_columns()["lists"])]
    table[7][1] = "n/a"
    match = r"column 1 of X must hold .*objects \(float, str\) \('n/a'\); put NaN for text that"
    for call in (lambda: FOCISelector().fit(table, y), lambda: foci(table, y)):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize(("value", "kind"), [(1.5, "float"), (2**60 + 1, "int64")])
def test_text_of_numbers_is_to_be_converted(value, kind):
    table = np.full((40, 2), str(value))
    for given in (table, table.astype(object), table.tolist()):
        with pytest.raises(ValueError, match=f"got strings; convert them .* astype.{kind}.$"):
            foci(given, np.arange(40.0))


class LazyFrame:
    """As polars has it, without data."""

    def collect_schema(self):
        return {"x": "Float64"}


def test_a_lazy_frame_is_to_be_collected():
    for call in (
        lambda: FOCISelector().fit(LazyFrame(), np.arange(40)),
        lambda: foci(LazyFrame(), np.arange(40)),
        lambda: lcodec_ext.codec(LazyFrame(), np.arange(40)),
    ):
        with pytest.raises(ValueError, match=r"[Xy] is a LazyFrame.*pass [Xy].collect\(\)"):
            call()


def test_the_test_of_every_step_is_kept(rng):
    X = rng.normal(size=(200, 4))
    y = X[:, 1] + 0.1 * rng.normal(size=200)
    selector = FOCISelector(stop="permutation", n_permutations=99, random_state=0).fit(X, y)
    assert selector.ordering_[0] == 1
    assert len(selector.pvalues_) == len(selector.threshold_) >= 1
    assert selector.pvalues_[0] == 0.01
    assert selector.threshold_[0] < selector.cumulative_[0]
    selector.set_params(stop=True, n_permutations=None).fit(X, y)
    assert selector.pvalues_ is None
    assert selector.threshold_ is None


def test_a_pipeline_that_must_go_on(rng):
    X, y = rng.normal(size=(100, 4)), rng.normal(size=100)
    selector = FOCISelector(stop=False, max_features=1)
    assert make_pipeline(selector, LinearRegression()).fit(X, y).predict(X).shape == (100,)
