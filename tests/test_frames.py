"""Tables and arrays of other libraries: names go everywhere, and nothing is copied unasked."""

import sys
import types
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import (
    FOCISelector,
    _emulated,
    codec,
    codec_test,
    dependence_graph,
    foci,
    nearest_neighbors,
    stability,
    xi,
    xi_matrix,
)

N = 60
NAMES = ["age", "bmi", "bp"]
RNG = np.random.default_rng(16)
A = RNG.normal(size=(N, 3))
Y = A[:, 0] * A[:, 2]
LABELS = np.array(["low", "mid", "high"])[np.digitize(A[:, 1], [-0.5, 0.5])]


class Frame:
    """As polars, narwhals and others have it: a list of names, columns by name."""

    def __init__(self, array, names):
        self._array, self.columns = array, list(names)

    def __getitem__(self, name):
        return self._array[:, self.columns.index(name)]

    def __len__(self):
        return len(self._array)

    @property
    def shape(self):
        return self._array.shape

    def to_numpy(self):
        return self._array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype=dtype)


class DataArray:
    """As xarray has it: names of dimensions, and labels along them."""

    def __init__(self, array, labels=None):
        self._array, self.dims = array, ("row", "column")[: array.ndim]
        self.coords = {} if labels is None else {"column": np.array(labels)}
        self.dtype, self.shape, self.ndim = array.dtype, array.shape, array.ndim

    def __len__(self):
        return len(self._array)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._array, dtype=dtype)


class DeviceArray:
    """As JAX has it: NumPy reads it, and DLPack says where it lies."""

    where = 1

    def __init__(self, array):
        self._array, self.dtype, self.shape = array, array.dtype, array.shape

    def __len__(self):
        return len(self._array)

    def __array__(self, dtype=None, copy=None):
        assert self.where == 1, "copied unasked"
        return np.asarray(self._array, dtype=dtype)

    def __dlpack_device__(self):
        return self.where, 0

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


class OnGpu(DeviceArray):
    where = 2  # of DLPack: CUDA


class Dictionary(DeviceArray):
    """As pyarrow's before version 22: of a type that DLPack does not know."""

    def __dlpack_device__(self):
        raise TypeError("DataType is not compatible with DLPack spec")


class Elsewhere(DeviceArray):
    where = 8  # of DLPack: Metal


class Capsule:
    """What knows DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


class Dataset(Mapping):
    """As xarray has it: variables by name."""

    def __init__(self, **columns):
        self._columns = columns

    def __getitem__(self, name):
        return self._columns[name]

    def __iter__(self):
        return iter(self._columns)

    def __len__(self):
        return len(self._columns)

    def to_dataframe(self):
        return pd.DataFrame(self._columns)


def named():
    frame = pd.DataFrame(A, columns=NAMES)
    return {
        "pandas": frame,
        "pandas, nullable": frame.convert_dtypes(),
        "pandas, pyarrow": frame.convert_dtypes(dtype_backend="pyarrow"),
        "pandas, mixed": frame.astype({"age": "Float64", "bmi": "double[pyarrow]"}),
        "pyarrow": pa.table(dict(zip(NAMES, A.T, strict=True))),
        "polars and its like": Frame(A, NAMES),
        "xarray": DataArray(A, NAMES),
    }


def nameless():
    return {
        "array": A,
        "rows": A.tolist(),
        "JAX": DeviceArray(A),
        "xarray": DataArray(A),
        "xarray, numbers for labels": DataArray(A, [10, 20, 30]),
        "DLPack": Capsule(A),
    }


@pytest.mark.parametrize("kind", named())
def test_names_go_everywhere(kind):
    X = named()[kind]
    expected = foci(A, Y, stop=False)
    result = foci(X, Y, stop=False)
    assert result.ordering.tolist() == expected.ordering.tolist()
    assert result.cumulative.tolist() == expected.cumulative.tolist()
    assert result.names == [NAMES[k] for k in expected.ordering]
    assert foci(X, Y, preselected=["bmi"]).preselected == (1,)
    assert lcodec_ext.lfoci(X, Y, stop=False).names is not None
    graph = dependence_graph(X, stop=False)
    assert graph.names == NAMES
    assert graph.results[1].names == [NAMES[k] for k in graph.results[1].ordering]
    assert stability(X, Y, n_pairs=2).names == xi_matrix(X).names == NAMES
    assert codec(Y, X) == codec(Y, A)
    assert codec_test(Y, X, n_permutations=9, seed=1).statistic == codec(Y, A)
    assert nearest_neighbors(X).tolist() == nearest_neighbors(A).tolist()
    selector = FOCISelector(max_features=2, stop=False).fit(X, Y)
    assert selector.ordering_.tolist() == expected.ordering[:2].tolist()
    chosen = [NAMES[k] for k in sorted(selector.ordering_)]
    assert selector.get_feature_names_out().tolist() == chosen
    transformed = selector.set_output(transform="pandas").transform(X)
    assert list(transformed.columns) == chosen
    assert np.array_equal(transformed.to_numpy(float), A[:, sorted(selector.ordering_)])


@pytest.mark.parametrize("kind", nameless())
def test_arrays_without_names(kind):
    X = nameless()[kind]
    result = foci(X, Y, stop=False)
    assert result.cumulative.tolist() == foci(A, Y, stop=False).cumulative.tolist()
    assert result.names is dependence_graph(X).names is stability(X, Y, n_pairs=1).names is None
    assert codec(Y, X) == codec(Y, A)
    if kind != "DLPack":
        selector = FOCISelector(stop=False).fit(X, Y)
        assert selector.get_feature_names_out().tolist() == ["x0", "x1", "x2"]
        assert selector.get_feature_names_out(NAMES).tolist() == NAMES


@pytest.mark.parametrize(
    "y",
    [
        pd.Series(Y, name="t"),
        pd.Series(Y, dtype="double[pyarrow]"),
        pa.array(Y),
        DataArray(Y),
        DeviceArray(Y),
        Capsule(Y),
        pd.DataFrame({"t": Y}),
    ],
)
def test_responses_of_other_libraries(y):
    assert foci(A, y).cumulative.tolist() == foci(A, Y).cumulative.tolist()
    assert codec(y, A) == codec(Y, A)
    assert xi(A[:, 0], y) == xi(A[:, 0], Y)
    assert (
        stability(A, y, n_pairs=1).selected.tolist() == stability(A, Y, n_pairs=1).selected.tolist()
    )
    if not isinstance(y, Capsule | pd.DataFrame):
        assert FOCISelector().fit(A, y).ordering_.tolist() == foci(A, Y).ordering.tolist()


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        LABELS.tolist(),
        pd.Series(LABELS),
        pd.Series(LABELS, dtype="string[pyarrow]"),
        pd.Series(LABELS, dtype="category"),
        pa.array(LABELS).dictionary_encode(),
        Dictionary(LABELS),
        DataArray(LABELS),
    ],
)
def test_labels_of_other_libraries(labels):
    expected = foci(A, LABELS, stop=False)
    assert foci(A, labels, stop=False).cumulative.tolist() == expected.cumulative.tolist()
    selector = FOCISelector(stop=False).fit(A, labels)
    assert selector.cumulative_.tolist() == expected.cumulative.tolist()
    assert stability(A, labels, n_pairs=2, max_features=1).frequencies[1] == 1


def test_what_lies_on_a_device_is_not_copied():
    for call in (
        lambda: xi(OnGpu(Y), Y),
        lambda: xi_matrix(OnGpu(A)),
        lambda: FOCISelector().fit(OnGpu(A), Y),
        lambda: FOCISelector().fit(A, OnGpu(Y)),
        lambda: foci(OnGpu(A), OnGpu(Y), backend="cpu"),
    ):
        message = r"is a .*OnGpu on device 'cuda:0', .* pass torch.from_dlpack\([Xxy]\).cpu\(\)"
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: foci(OnGpu(A), Y),
        lambda: foci(A, OnGpu(Y)),
        lambda: codec(Y, OnGpu(A)),
        lambda: stability(OnGpu(A), Y),
    ):
        with pytest.raises(ValueError, match=r"one device; . is on 'cuda:0', . is not a tensor"):
            call()
    with pytest.raises(ValueError, match="Elsewhere on device '8 of DLPack', .* not copied"):
        foci(Elsewhere(A), Y)


def test_arrays_on_a_cuda_device_are_computed_on_there(monkeypatch):
    """Tensors of their memory reach the kernels; results are tensors, which DLPack passes on."""
    cuda, shared = cuda_on_cpu(_emulated.cuda), []

    def from_dlpack(value):
        assert type(value) is OnGpu
        shared.append(torch.as_tensor(value._array))
        return shared[-1]

    monkeypatch.setattr(torch, "from_dlpack", from_dlpack)
    x, y = OnGpu(A), OnGpu(Y)
    assert foci(x, y, backend=cuda).ordering.tolist() == foci(A, Y).ordering.tolist()
    assert codec(y, x, backend=cuda) == codec(Y, A)
    options = {"n_pairs": 2, "max_features": 1, "seed": 3}
    counts = [
        stability(*data, **options, **on).frequencies.tolist()
        for data, on in (((x, y), {"backend": cuda}), ((A, Y), {}))
    ]
    assert counts[0] == counts[1]
    options = {"n_permutations": 9, "seed": 3}
    assert codec_test(y, x, backend=cuda, **options).pvalue == codec_test(Y, A, **options).pvalue
    graphs = [dependence_graph(x, backend=cuda), dependence_graph(A)]
    assert graphs[0].adjacency.tolist() == graphs[1].adjacency.tolist()
    nearest = nearest_neighbors(x, backend=cuda)
    assert np.array_equal(np.from_dlpack(nearest), nearest_neighbors(A))
    assert {each.data_ptr() for each in shared} == {A.ctypes.data, Y.ctypes.data}


def test_arrays_on_a_cuda_device_without_cuda_or_pytorch(monkeypatch):
    with pytest.raises(ValueError, match="OnGpu on device cuda:0, which PyTorch cannot share"):
        nearest_neighbors(OnGpu(A), backend=cuda_on_cpu(_emulated.cuda))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r"passes on to the kernels: install lcodec_ext\[torch\]"):
        nearest_neighbors(OnGpu(A))


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ({"a": Y, "b": Y}, r"X is a dict; expected an array or a data frame: pass DataFrame\(X\)"),
        (Dataset(a=Y), r"X is a Dataset; expected .*: pass X.to_dataframe\(\)"),
        (np.zeros(N, dtype=[("a", "f8"), ("b", "f8")]), "make a data frame of the fields first"),
        (DataArray(A.astype(str), NAMES), "column 'age' .index 0. of X must hold .*; got strings"),
        (
            pd.DataFrame({"a": Y, "c": pd.Categorical(LABELS)}),
            "column 'c' .*get_dummies of pandas",
        ),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(X, message):
    for call in (foci, stability, FOCISelector().fit):
        with pytest.raises(ValueError, match=message):
            call(X, Y)
    with pytest.raises(ValueError, match=message):
        dependence_graph(X)


def test_categories_in_columns_that_are_encoded():
    """The two ways that messages advise."""
    table = pd.DataFrame({"a": A[:, 0], "c": pd.Categorical(LABELS, ["low", "mid", "high"])})
    dummies = pd.get_dummies(table)
    assert foci(dummies, A[:, 1], max_features=1).names[0].startswith("c_")
    ordered = table.assign(c=table["c"].cat.codes)
    assert foci(ordered, A[:, 1], max_features=1).names == ["c"]


# ------------------------------------------------------------------------------------------------
# FOCISelector


def test_the_selector_names_the_column():
    frame = pd.DataFrame(A, columns=NAMES)
    holes = frame.assign(bmi=frame["bmi"].mask(frame["bmi"] > 1))
    message = r"NaN in X at row \d+, column 'bmi' \(index 1\).*; leave out the rows"
    for table in (holes, holes.convert_dtypes(), Frame(holes.to_numpy(), NAMES)):
        with pytest.raises(ValueError, match=message):
            FOCISelector().fit(table, Y)
    with pytest.raises(ValueError, match=r"infinite values .* row 0, column 'bp' \(index 2\)"):
        FOCISelector().fit(frame.assign(bp=np.inf), Y)
    with pytest.warns(UserWarning, match=r"column 'age' \(index 0\) of X is constant"):
        FOCISelector().fit(frame.assign(age=1.0), Y)
    with pytest.raises(ValueError, match=r"overflow float64 with column 'age' \(index 0\)"):
        FOCISelector(standardize=None).fit(frame * 1e200, Y)
    with pytest.raises(ValueError, match="X is a Capsule, .* pass numpy.from_dlpack"):
        FOCISelector().fit(Capsule(A), Y)


def test_labels_that_are_no_text_are_those_of_scikit_learn():
    selector = FOCISelector(stop=False).fit(pd.DataFrame(A), Y)
    assert selector.get_feature_names_out().tolist() == ["x0", "x1", "x2"]


def test_output_in_polars(monkeypatch):
    """scikit-learn makes it; the names are ours. polars is not among the packages of the tests."""

    class DataFrame:
        def __init__(self, data, schema, orient):
            self.data, self.columns = data, schema

    polars = types.ModuleType("polars")
    polars.DataFrame = DataFrame
    polars.Series, polars.LazyFrame = type("Series", (), {}), type("LazyFrame", (), {})
    polars.__version__ = "1.0.0"
    monkeypatch.setitem(sys.modules, "polars", polars)
    for X in (Frame(A, NAMES), DataArray(A, NAMES), pd.DataFrame(A, columns=NAMES)):
        selector = FOCISelector(max_features=2, stop=False).set_output(transform="polars")
        selected = selector.fit(X, Y).transform(X)
        assert type(selected) is DataFrame
        assert list(selected.columns) == [NAMES[k] for k in sorted(selector.ordering_)]


def test_weights_of_samples_go_to_the_model_or_are_refused():
    weights = np.linspace(1, 2, N)
    message = "unexpected keyword argument 'sample_weight'"
    with pytest.raises(TypeError, match=message):
        FOCISelector().fit(A, Y, sample_weight=weights)
    pipeline = make_pipeline(FOCISelector(stop=False), LinearRegression())
    with pytest.raises(TypeError, match=message):
        pipeline.fit(A, Y, fociselector__sample_weight=weights)
    expected = LinearRegression().fit(A, Y, sample_weight=weights).coef_
    pipeline.fit(A, Y, linearregression__sample_weight=weights)
    assert np.allclose(pipeline[1].coef_, expected)
    with sklearn.config_context(enable_metadata_routing=True):
        model = LinearRegression().set_fit_request(sample_weight=True)
        routed = make_pipeline(FOCISelector(stop=False), model).fit(A, Y, sample_weight=weights)
        assert np.allclose(routed[1].coef_, expected)


def test_clones_have_all_options_and_nothing_else():
    options = {
        "max_features": 2, "min_gain": 0.1, "stop": True, "standardize": "bounded",
        "ties": "random", "random_state": 3, "backend": "cpu", "classes": "no", "decimals": 2,
        "alpha": None, "n_permutations": None,
    }  # fmt: skip
    selector = FOCISelector(**options)
    assert selector.get_params() == options  # and so no n_jobs: threads are those of the package
    copy = clone(selector.fit(np.round(A, 2), Y))
    assert copy.get_params() == options
    assert not [name for name in vars(copy) if name not in options]
