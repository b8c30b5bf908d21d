"""Bad input gets an error that names it; odd input just works."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

import lcodec_ext
from lcodec_ext.cli.tables import Table
from lcodec_ext.dependence.table import as_features

N = 30
rng0 = np.random.default_rng(1)
X = rng0.normal(size=(N, 3))
Y = rng0.normal(size=N)


def with_value(array, index, value):
    changed = array.copy()
    changed[index] = value
    return changed


def call_foci(X=X, y=Y, **options):
    return lcodec_ext.foci(X, y, **options)


def call_codec(X=X, y=Y, **options):
    return lcodec_ext.codec(y, X, **options)


BAD_DATA = [
    # arguments, error, what the message must say
    ({"y": with_value(Y, 4, np.nan)}, ValueError, r"NaN in y at row 4.*nan_policy='omit'"),
    ({"X": with_value(X, (7, 1), np.nan)}, ValueError, r"NaN in [Xz] at row 7, column 1"),
    ({"X": with_value(X, (7, slice(None)), np.nan)}, ValueError, "and 2 more"),
    ({"X": with_value(X, (2, 0), np.inf)}, ValueError, r"infinite.*[Xz] at row 2, column 0"),
    ({"y": with_value(Y, 9, -np.inf)}, ValueError, "infinite.*y at row 9"),
    ({"X": X[:2], "y": Y[:2]}, ValueError, "at least 3 rows; got 2"),
    ({"X": X[:0], "y": Y[:0]}, ValueError, "at least 3 rows; got 0"),
    ({"X": X[:, :0]}, ValueError, r"[Xz] must have at least one column; got shape \(30, 0\)"),
    ({"y": Y[:-1]}, ValueError, r"same number of rows; .*30.*29|same number of rows; .*29.*30"),
    ({"y": np.ones((N, 2, 2))}, ValueError, r"y must be one column.*got shape \(30, 2, 2\)"),
    ({"y": Y[np.newaxis]}, ValueError, r"y must be one column.*got shape \(1, 30\)"),
    ({"y": Y.astype(str)}, ValueError, "y has 30 classes on 30 rows; expected classes that repeat"),
    ({"y": ["a", None, 1.5] * 10}, ValueError, "y must hold real numbers; got objects .str, None"),
    (
        {"X": X.astype(str)},
        ValueError,
        "[Xz] must hold real numbers; got strings; convert them first, with astype.float",
    ),
    ({"y": Y.astype(object)}, ValueError, "y must hold real numbers; got objects"),
    ({"X": X.astype(object)}, ValueError, "[Xz] must hold real numbers; got objects"),
    ({"X": X + 0j}, ValueError, "[Xz] must hold real numbers; got complex numbers"),
    ({"y": torch.tensor(Y) + 0j}, ValueError, "y must be real; got a tensor of torch.complex128"),
    ({"X": np.zeros((N, 2, 2))}, ValueError, r"[Xz] must have shape .*; got shape \(30, 2, 2\)"),
    ({"X": np.float64(3)}, ValueError, r"[Xz] must have shape .*; got shape \(\)"),
    ({"X": None}, ValueError, "[Xz] must be an array of numbers; got None"),
    ({"y": None}, ValueError, "y must be an array of numbers; got None"),
    ({"X": [[1, 2], [3]]}, ValueError, "[Xz] cannot be made into an array"),
    ({"y": np.arange(N).astype("datetime64[D]")}, ValueError, r"y must hold real numbers; got.*da"),
    (
        {"X": pd.DataFrame({"c": pd.Categorical(["u", "v"] * 15)})},
        ValueError,
        "'c' .* of [Xz] is categorical; expected numbers: encode categories as numbers",
    ),
    ({"X": pd.DataFrame({"s": ["u", "v"] * 15})}, ValueError, "column 's' .* of [Xz] .*str.*"),
    ({"X": X * 1e200}, ValueError, "overflow|too large or too small"),
    ({"X": np.full((N, 1), 2**60) + np.arange(N)[:, None]}, ValueError, r"integers beyond 2\*\*53"),
    ({"X": torch.eye(N).to_sparse()}, ValueError, "[Xz] must be dense; got a tensor of layout"),
    ({"X": torch.empty(N, 3, device="meta")}, ValueError, "is a tensor on device 'meta'"),
    ({"nan_policy": "drop"}, ValueError, "nan_policy must be one of 'raise', 'omit'; got 'drop'"),
    ({"ties": "mean"}, ValueError, "ties must be one of .*; got 'mean'"),
    ({"ties": None}, ValueError, "ties must be one of .*; got None"),
    ({"backend": "gpu"}, ValueError, "one of 'auto', 'cpu', 'reference', 'cuda'; got 'gpu'"),
    ({"backend": 3}, ValueError, "backend must be one of .*; got 3"),
    (
        {"backend": "cuda"},
        ValueError,
        r"and [Xy] is not a tensor: pass torch.as_tensor\([Xy]\).cuda",
    ),
    (
        {"backend": "cuda", "y": torch.tensor(Y), "X": torch.tensor(X)},
        ValueError,
        r"computes on CUDA tensors, and [Xy] is a tensor on device 'cpu': pass [Xy].cuda\(\)",
    ),
    ({"seed": 1.5}, TypeError, r"seed must be an integer in \[0, 2\*\*64\) or None; got 1.5"),
    ({"seed": "7"}, TypeError, "seed must be an integer.*; got '7'"),
    ({"seed": True}, TypeError, "seed must be an integer.*; got True"),
    ({"seed": -1}, ValueError, "seed must be an integer.*; got -1"),
    ({"seed": 2**64}, ValueError, "seed must be an integer"),
]


@pytest.mark.parametrize("call", [call_foci, call_codec])
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_DATA)
def test_bad_input(call, arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preselected": [3]}, ValueError, r"preselected columns must be in 0 \.\. 2.*got 3"),
        ({"preselected": [-1]}, ValueError, "preselected column must be an integer >= 0; got -1"),
        ({"preselected": [1, 1]}, ValueError, "preselected names column 1 twice"),
        ({"preselected": [0.5]}, TypeError, "preselected column must be an integer"),
        ({"preselected": 1}, TypeError, r"preselected must be a list.*pass \[1\]"),
        ({"preselected": "x1"}, TypeError, r"preselected must be a list.*pass \['x1'\]"),
        ({"preselected": ["age"]}, ValueError, "column 'age': X has no column names"),
        ({"max_features": -1}, ValueError, "max_features must be an integer >= 1; got -1"),
        ({"max_features": 0}, ValueError, "max_features must be an integer >= 1; got 0"),
        ({"max_features": 2.0}, TypeError, "max_features must be an integer >= 1; got 2.0"),
        ({"min_gain": -0.1}, ValueError, "min_gain must be a finite number >= 0; got -0.1"),
        ({"min_gain": np.nan}, ValueError, "min_gain must be a finite number >= 0; got nan"),
        ({"min_gain": "0"}, TypeError, "min_gain must be a number"),
        ({"min_gain": 0.1, "stop": False}, ValueError, "min_gain=0.1 needs stop=True"),
        ({"stop": 1}, TypeError, "stop must be True, False or 'permutation'; got 1"),
        (
            {"standardize": "zscore"},
            ValueError,
            "standardize must be one of 'scale', 'bounded', None",
        ),
        ({"progress": "yes"}, TypeError, "progress must be True or False"),
    ],
)
def test_bad_foci_options(options, error, message):
    with pytest.raises(error, match=message):
        call_foci(**options)


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="num_features"):
        call_foci(num_features=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": -1}, ValueError, "noise must be a finite number >= 0; got -1.0"),
        ({"noise": np.inf}, ValueError, "noise must be a finite number"),
        ({"noise": None}, TypeError, "noise must be a number"),
        ({"noise_scale": "sd"}, ValueError, "noise_scale must be one of 'absolute', 'relative'"),
        ({"seed": None}, TypeError, r"seed must be an integer in \[0, 2\*\*64\); got None"),
    ],
)
def test_bad_noise(options, error, message):
    with pytest.raises(error, match=message):
        lcodec_ext.lcodec(Y, X, **options)
    with pytest.raises(error, match=message):
        lcodec_ext.lfoci(X, Y, **options)


def test_conditioning_columns_are_checked_too():
    with pytest.raises(ValueError, match="NaN in x at row 3, column 0"):
        lcodec_ext.codec(Y, X, with_value(X[:, :1], 3, np.nan))
    with pytest.raises(ValueError, match="y has 30, z has 30, x has 29"):
        lcodec_ext.codec(Y, X, X[1:])
    with pytest.raises(ValueError, match="with column 0 of x: its values are too far apart"):
        lcodec_ext.codec(Y, X, X[:, 0] * 1e160)


def test_foci_wants_a_table():
    with pytest.raises(ValueError, match=r"shape \(30,\); for one feature pass X.reshape\(-1, 1\)"):
        lcodec_ext.foci(Y, Y)


def test_too_many_rows():
    y = np.zeros(1_000_001, dtype=np.int8)
    with pytest.raises(ValueError, match="at most 1,000,000 rows.*got 1,000,001"):
        lcodec_ext.codec(y, y)


def test_names_in_messages_and_results():
    frame = pd.DataFrame(X, columns=["age", "dose", "site"])
    with pytest.raises(ValueError, match=r"row 7, column 'dose' \(index 1\)"):
        lcodec_ext.foci(frame.mask(frame.index.to_numpy()[:, None] == [[-1, 7, -1]]), Y)
    with pytest.raises(ValueError, match=r"column 'site' \(index 2\) of X is str"):
        lcodec_ext.foci(frame.assign(site="here"), Y)
    with pytest.raises(ValueError, match="names column 'sex': not one column of X"):
        lcodec_ext.foci(frame, Y, preselected=["sex"])
    result = lcodec_ext.foci(frame, frame["dose"], preselected=["age"], stop=False)
    assert result.names == [frame.columns[k] for k in result.ordering]
    assert result.names[0] == "dose"
    assert result.preselected == (0,)
    assert "'dose' (1)" in repr(result)


def expected(dtype=np.float64):
    return lcodec_ext.foci(X.astype(dtype), Y, stop=False)


strided = np.empty((2 * N, 9))
strided[::-2, 8::-3] = X
read_only = X.copy()
read_only.flags.writeable = False


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(np.asfortranarray(X), id="fortran"),
        pytest.param(strided[::-2, 8::-3], id="negative strides"),
        pytest.param(read_only, id="read-only"),
        pytest.param(X.astype(">f8"), id="big-endian"),
        pytest.param(X.tolist(), id="lists"),
        pytest.param(tuple(map(tuple, X)), id="tuples"),
        pytest.param(torch.tensor(X), id="tensor"),
        pytest.param(torch.tensor(X, requires_grad=True), id="requires grad"),
        pytest.param(torch.tensor(X.T.copy()).T, id="transposed tensor"),
        pytest.param(torch.nn.Parameter(torch.tensor(X)), id="parameter"),
        pytest.param(pd.DataFrame(X), id="frame"),
        pytest.param(pd.DataFrame(X).astype("Float64"), id="nullable frame"),
        pytest.param(np.ma.masked_array(X), id="masked, nothing masked"),
        pytest.param(X.astype(np.longdouble), id="long double"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_odd_features_just_work(odd, backend):
    result = lcodec_ext.foci(odd, Y, stop=False, backend=backend)
    assert result.ordering.tolist() == expected().ordering.tolist()
    assert result.cumulative.tolist() == expected().cumulative.tolist()


@pytest.mark.parametrize(
    "odd",
    [
        Y[:, np.newaxis],
        Y.tolist(),
        torch.tensor(Y),
        torch.tensor(Y)[:, None].requires_grad_(),
        pd.Series(Y),
        pd.DataFrame(Y),
        np.argsort(np.argsort(Y)).astype(np.uint8),
        np.argsort(np.argsort(Y)) + 2**62,  # beyond float64's integers: ranks need no conversion
    ],
)
def test_odd_responses_just_work(odd):
    assert lcodec_ext.codec(odd, X) == lcodec_ext.codec(Y, X)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_short_floats_compute_in_float32(name):
    tensor = torch.tensor(X).to(getattr(torch, name))
    exact = tensor.float().numpy()
    assert lcodec_ext.codec(Y, tensor) == lcodec_ext.codec(Y, exact)
    assert lcodec_ext.codec(tensor[:, 0], X) == lcodec_ext.codec(exact[:, 0], X)
    if name == "float16":
        assert lcodec_ext.codec(Y, exact.astype(np.float16)) == lcodec_ext.codec(Y, exact)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int32, np.int64, np.uint64])
def test_integers_and_bools(dtype):
    coarse = (X > 0).astype(dtype)
    assert lcodec_ext.codec(Y > 0, coarse) == lcodec_ext.codec(
        (Y > 0).astype(float), coarse.astype(np.float64)
    )


def test_frames_of_mixed_dtypes():
    frame = pd.DataFrame({"a": X[:, 0] > 0, "b": X[:, 1], "c": pd.array(range(N), dtype="Int64")})
    plain = np.column_stack([X[:, 0] > 0, X[:, 1], np.arange(N)])
    assert lcodec_ext.codec(Y, frame) == lcodec_ext.codec(Y, plain)


def test_sparse_matrices_are_refused():
    with pytest.raises(ValueError, match=r"X is sparse .*pass X.toarray\(\)"):
        lcodec_ext.foci(sparse.csr_array(X), Y)


def test_missing_values_can_be_left_out():
    holes = with_value(with_value(X, (3, 1), np.nan), (8, 2), np.nan)
    y = with_value(Y, 5, np.nan)
    kept = np.setdiff1d(np.arange(N), [3, 5, 8])
    for options in ({}, {"ties": "random", "seed": 3}):
        result = lcodec_ext.foci(holes, y, nan_policy="omit", stop=False, **options)
        clean = lcodec_ext.foci(X[kept], Y[kept], stop=False, **options)
        assert result.n_samples == N - 3
        assert result.ordering.tolist() == clean.ordering.tolist()
        assert result.cumulative.tolist() == clean.cumulative.tolist()
    masked = np.ma.masked_invalid(holes)
    assert lcodec_ext.codec(y, masked, nan_policy="omit") == lcodec_ext.codec(Y[kept], X[kept])
    nullable = pd.DataFrame(holes).astype("Float64")
    assert lcodec_ext.codec(y, nullable, nan_policy="omit") == lcodec_ext.codec(Y[kept], X[kept])
    with pytest.raises(ValueError, match="at least 3 rows; got 2 left after omitting NaN"):
        lcodec_ext.codec(with_value(Y, slice(2, None), np.nan), X, nan_policy="omit")


def test_what_is_left_out_is_told():
    holes = with_value(with_value(X, (slice(3, 6), 1), np.nan), (8, 2), np.nan)
    y = with_value(Y, 5, np.nan)
    frame = pd.DataFrame(holes, columns=["age", "dose", "site"])
    missing = {"column 'dose' (index 1) of X": 3, "column 'site' (index 2) of X": 1, "y": 1}
    for call in (lcodec_ext.foci, lcodec_ext.lfoci):
        result = call(frame, y, nan_policy="omit", stop=False)
        assert (result.n_samples, result.n_omitted) == (N - 4, 4)
        assert result.missing == missing
        line = repr(result).splitlines()[1]
        assert line.strip().startswith(f"4 of {N} rows left out: NaN in column 'dose' (index 1) of")
    plain = lcodec_ext.foci(X, Y)
    assert (plain.n_omitted, plain.missing) == (0, {})
    assert "left out" not in repr(plain)
    graph = lcodec_ext.dependence_graph(frame, nan_policy="omit")
    assert {result.n_omitted for result in graph.results} == {4}
    assert graph.results[0].missing.keys() == {*missing} - {"y"}


def test_a_number_from_few_of_the_rows_is_warned_of():
    y = with_value(Y, slice(10, None), np.nan)
    match = f"20 of {N} rows left out: NaN in y \\(20\\)"
    for call in (lcodec_ext.codec, lcodec_ext.lcodec):
        with pytest.warns(UserWarning, match=match) as caught:
            call(y, X, X[:, 0], nan_policy="omit")
        assert caught[0].filename == __file__
    for call in (lcodec_ext.xi, lcodec_ext.xi_test):
        with pytest.warns(UserWarning, match=match) as caught:
            call(X[:, 0], y, nan_policy="omit")
        assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="got 2 left after omitting NaN .28 of 30 .* in y .28"):
        lcodec_ext.codec(with_value(Y, slice(2, None), np.nan), X, nan_policy="omit")


@pytest.mark.parametrize("nan_policy", ["raise", "omit"])
def test_empty_columns_are_named(nan_policy):
    empty = with_value(X, (slice(None), 1), np.nan)
    options = {"nan_policy": nan_policy}
    frame = pd.DataFrame(
        with_value(empty, (slice(None), 2), np.nan), columns=["age", "dose", "site"]
    )
    with pytest.raises(
        ValueError, match="column 1 of z is empty: all values are NaN; leave it out"
    ):
        lcodec_ext.codec(Y, empty, **options)
    for call in (lcodec_ext.foci, lcodec_ext.lfoci):
        with pytest.raises(ValueError, match="'dose' .* 'site' .* of X are empty.*leave them out"):
            call(frame, Y, **options)
    with pytest.raises(ValueError, match="column 1 of X is empty"):
        lcodec_ext.dependence_graph(empty, **options)
    for call in (lcodec_ext.xi, lcodec_ext.codec):
        with pytest.raises(ValueError, match=r"\b[xy] is empty: all values are NaN$"):
            call(Y * np.nan, X[:, 0], **options)


def test_constant_columns_warn_and_are_never_chosen():
    constant = X.copy()
    constant[:, 1] = 2.5
    for standardize in ("scale", "bounded", None):
        with pytest.warns(UserWarning, match="column 1 of X is constant"):
            result = lcodec_ext.foci(constant, X[:, 0], standardize=standardize)
        assert 1 not in result.ordering
    with pytest.warns(UserWarning, match="column 1 of z is constant"):
        value = lcodec_ext.codec(Y, constant)
    assert value == lcodec_ext.codec(Y, constant[:, [0, 2]])


def test_constant_response():
    with pytest.warns(UserWarning, match="y is constant: the coefficient is 1 by convention"):
        assert lcodec_ext.codec(np.ones(N), X) == 1.0
    with pytest.warns(UserWarning, match="y is constant: nothing is selected"):
        result = lcodec_ext.foci(X, np.ones(N))
    assert (result.ordering.tolist(), result.stop_reason) == ([], "constant_y")
    with pytest.warns(UserWarning, match="y is constant: nothing is selected"):
        assert lcodec_ext.lfoci(X, np.ones(N)).stop_reason == "constant_y"
    with pytest.warns(UserWarning, match="measures the added noise alone"):
        lcodec_ext.lcodec(np.ones(N), X)


def test_response_that_is_a_function_of_the_conditioning_columns():
    x = np.repeat(np.arange(10), 3)
    with pytest.warns(UserWarning, match="y is a function of x on this sample"):
        assert lcodec_ext.codec(x**2, X, x) == 1.0


def test_offsets_do_not_break_neighbours():
    """At 1e7 in float64 a matrix-product distance picks 82% wrong neighbours."""
    steps = np.round(X * 1024)  # integers, so that adding the offset loses nothing
    assert lcodec_ext.codec(Y, steps + 1e7) == lcodec_ext.codec(Y, steps)
    moved = lcodec_ext.nearest_neighbors(steps + 1e7)
    assert moved.tolist() == lcodec_ext.nearest_neighbors(steps).tolist()


def test_distances_may_be_large_but_not_infinite():
    far = with_value(X, (0, 0), 1.8e19).astype(np.float32)  # squared 3.24e38, below the largest
    assert np.isfinite(lcodec_ext.codec(Y, far[:, :1]))
    with pytest.raises(ValueError, match="overflow float32 .* column 0 of z.* or pass float64"):
        lcodec_ext.codec(Y, far * np.float32(1.1))
    assert np.isfinite(lcodec_ext.codec(Y, far.astype(np.float64) * 1.1))
    with pytest.raises(ValueError, match="overflow float32 with column 0 of X"):
        lcodec_ext.foci(far * np.float32(1.1), Y, standardize=None)


def test_what_is_refused_is_not_warned_of():
    z = np.zeros((6, 2), np.float32)
    z[1, 0] = 1e-45  # whose square underflows
    z[:2, 1] = 2e19, -2e19
    with pytest.raises(ValueError, match="overflow float32 with column 1 of z"):
        lcodec_ext.codec(np.arange(6.0), z)


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="y is constant") as caught:
        lcodec_ext.codec(np.ones(N), X)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="is constant") as caught:
        lcodec_ext.foci(np.ones((N, 1)), Y)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="is constant") as caught:
        lcodec_ext.lcodec(Y, np.ones(N))
    assert caught[0].filename == __file__


def test_inputs_are_not_changed():
    before = X.copy(), Y.copy()
    lcodec_ext.lfoci(X, Y)
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(Y, before[1])


# ------------------------------------------------------------------------------------------------
# Integers that float64 would merge are refused before anything rounds them

STAMPS = 1_577_134_800_018_164_904 + 37 * np.arange(N)  # nanoseconds: float64 has steps of 256
STAMPS_NA = [int(t) for t in STAMPS[:-1]] + [None]


class Frame:
    """A frame as polars has it: a list of names, columns by name."""

    def __init__(self, columns):
        self._columns = columns
        self.columns = list(columns)

    def __getitem__(self, name):
        return self._columns[name]

    def __len__(self):
        return len(self._columns[self.columns[0]])

    def to_numpy(self):
        return np.column_stack([np.asarray(column) for column in self._columns.values()])

    def __array__(self, dtype=None, copy=None):
        return self.to_numpy()


def containers(t, f):
    """Two columns, integers and floats, in everything that people keep tables in."""
    masked = np.ma.masked_array(np.column_stack([t, np.arange(len(t))]), mask=False)
    masked[2, 1] = np.ma.masked
    return {
        "pandas": pd.DataFrame({"t": t, "f": f}),
        "pandas uint64": pd.DataFrame({"t": t.astype(np.uint64), "f": -np.arange(len(t))}),
        "pandas nullable": pd.DataFrame({"t": pd.array(t, dtype="Int64"), "f": f}),
        "pandas pyarrow": pd.DataFrame({"t": pd.Series(t, dtype="int64[pyarrow]"), "f": f}),
        "pyarrow table": pa.table({"t": t, "f": f}),
        "pyarrow batch": pa.record_batch({"t": pa.array(t), "f": pa.array(f)}),
        "frame of another library": Frame({"t": t, "f": f}),
        "table of the command line": Table(["t", "f"], [t, f]),
        "rows": list(zip(t.tolist(), f.tolist(), strict=True)),
        "rows of tensors": [
            torch.tensor([a, k]) if k else torch.tensor([a, 0]).double()
            for k, a in enumerate(t.tolist())
        ],
        "int64 and uint64": [[-1, 2**63 + k] for k in range(len(t))],
        "masked": masked,
        "long double": np.column_stack([t.astype(np.longdouble), f]),
        "int64": np.column_stack([t, np.arange(len(t))]),
        "tensor": torch.from_numpy(np.column_stack([t, np.arange(len(t))])),
    }


@pytest.mark.parametrize("kind", containers(STAMPS, Y))
def test_integers_are_checked_before_they_are_rounded(kind):
    table, y = containers(STAMPS, Y)[kind], np.arange(N)
    message = "integers beyond 2\\*\\*53|numbers, which float64 cannot tell apart"
    calls = {
        "codec": lambda: lcodec_ext.codec(y, table, nan_policy="omit"),
        "codec x": lambda: lcodec_ext.codec(y, y % 3, table, nan_policy="omit"),
        "lcodec": lambda: lcodec_ext.lcodec(y, table, nan_policy="omit"),
        "foci": lambda: lcodec_ext.foci(table, y, nan_policy="omit"),
        "graph": lambda: lcodec_ext.dependence_graph(table, nan_policy="omit"),
        "neighbors": lambda: lcodec_ext.nearest_neighbors(table),
        "selector": lambda: lcodec_ext.FOCISelector().fit(table, y),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", containers(STAMPS, Y))
def test_integers_up_to_2_53_go_on(kind):
    if kind == "int64 and uint64":
        return  # what makes it is beyond 2**53
    t = STAMPS - STAMPS[0] + 2**53 - 10_000
    table, y = containers(t, Y)[kind], np.arange(N) // 3
    other = {"pandas uint64": -np.arange(N)}.get(kind, np.arange(N))
    second = (
        other if kind in ("masked", "int64", "tensor", "rows of tensors", "pandas uint64") else Y
    )
    keep = np.arange(N) != 2 if kind == "masked" else np.full(N, True)
    plain = np.column_stack([(t - t[0]).astype(float), second])[keep]
    value = lcodec_ext.codec(y, table, nan_policy="omit")
    assert value == lcodec_ext.codec(y[keep], plain)


@pytest.mark.parametrize(
    "column",
    [
        pd.Series(STAMPS_NA, dtype="Int64"),
        pd.Series(STAMPS_NA, dtype="int64[pyarrow]"),
        pd.array(STAMPS_NA, dtype="Int64"),
        pa.array(STAMPS_NA),
        pa.chunked_array([STAMPS_NA]),
        np.ma.masked_array(STAMPS, mask=np.arange(N) == 4),
        [float(Y[0]), *STAMPS.tolist()[1:]],
    ],
)
def test_integers_beside_missing_values_are_not_rounded(column):
    for call in (
        lambda: lcodec_ext.codec(np.arange(N), column, nan_policy="omit"),
        lambda: lcodec_ext.codec(column, np.arange(N), nan_policy="omit"),  # as the response, too
        lambda: lcodec_ext.xi(column, np.arange(N), nan_policy="omit"),
    ):
        with pytest.raises(ValueError, match="integers beyond 2\\*\\*53"):
            call()


def test_large_integers_as_a_response_are_compared_as_they_are():
    value = lcodec_ext.codec(np.arange(N), X)
    for y in (STAMPS, pd.Series(STAMPS, dtype="Int64"), pa.array(STAMPS), STAMPS.tolist()):
        assert lcodec_ext.codec(y, X) == value
    assert lcodec_ext.FOCISelector(stop=False).fit(X, STAMPS).cumulative_.tolist() == (
        lcodec_ext.foci(X, np.arange(N), stop=False).cumulative.tolist()
    )
    with pytest.raises(ValueError, match="y holds integers beyond 2\\*\\*53"):
        lcodec_ext.lcodec(STAMPS, X)  # noise would be lost in the steps of float64
    with pytest.raises(ValueError, match="y holds integers beyond 2\\*\\*53"):
        lcodec_ext.lfoci(X, STAMPS)
    with pytest.raises(ValueError, match="y holds integers beyond 2\\*\\*53"):
        lcodec_ext.FOCISelector().fit(X, STAMPS.astype(object))
    with pytest.raises(ValueError, match="X holds integers beyond 2\\*\\*53"):
        lcodec_ext.FOCISelector().fit(STAMPS[:, None].astype(object), Y)


@pytest.mark.parametrize("wrap", [torch.tensor, np.array])
def test_integers_in_lists_of_arrays_of_one_number_are_not_rounded(wrap):
    rows = [[wrap(t), wrap(y)] for t, y in zip(STAMPS.tolist(), Y.tolist(), strict=True)]
    with pytest.raises(ValueError, match="z holds integers beyond 2\\*\\*53, here 1"):
        lcodec_ext.codec(Y, rows)


@pytest.mark.parametrize("more", [[], [None], [0.5], [True]])
def test_advice_on_objects_does_not_merge_large_integers(more):
    column = pd.Series([*more, *STAMPS.tolist()[len(more) :]], dtype=object)
    for call in (
        lambda: lcodec_ext.codec(Y, column),
        lambda: lcodec_ext.codec(column, Y),
        lambda: lcodec_ext.foci(pd.DataFrame({"f": Y, "t": column}), Y),
    ):
        with pytest.raises(ValueError, match="objects .*int.*astype.'int64'.*would merge integers"):
            call()
    if not more:  # the advice, followed
        t = column.astype("int64")
        with pytest.raises(ValueError, match="subtract an offset first"):
            lcodec_ext.codec(Y, t)
        value = lcodec_ext.codec(Y, np.arange(N))
        assert lcodec_ext.codec(Y, t - t.min()) == value


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_decimals_of_tensors_are_those_of_arrays(dtype):
    """What happens on a CUDA device, with tensors of the CPU."""
    column = (np.arange(-40, 40) / 10).astype(dtype)
    kept = as_features(torch.from_numpy(column), "z", tensors=True, decimals=1).values
    assert kept.tolist() == as_features(column, "z", decimals=1).values.tolist()
    for off in () if dtype == "int64" else (600000.55, 1.6e9 + 0.125, np.pi):
        column[3] = off
        with pytest.raises(ValueError, match="z holds .* in row 3, which"):
            as_features(torch.from_numpy(column), "z", tensors=True, decimals=1)


def test_frames_of_one_type_are_read_at_once(monkeypatch):
    table = pd.DataFrame({"a": Y, "b": np.arange(N) % 7.0, 3: -Y})
    expected = lcodec_ext.foci(table.to_numpy(), Y, stop=False)
    monkeypatch.setattr("lcodec_ext._arrays._column", None)  # column by column takes long
    found = lcodec_ext.foci(table, Y, stop=False)
    assert found.names == [["a", "b", "3"][k] for k in expected.ordering]
    assert found.cumulative.tolist() == expected.cumulative.tolist()


def test_missing_values_in_columns_of_every_library():
    holes = [3, None, 5, 1, 2, 9, 4, 7]
    y = np.array([3.0, 1, 5, 1, 2, 8, 4, 7])
    keep = np.array([value is not None for value in holes])
    plain = np.array([value for value in holes if value is not None], dtype=float)
    for column in (
        pd.Series(holes, dtype="Int64"),
        pd.Series(holes, dtype="int8[pyarrow]"),
        pd.array(holes, dtype="Int16"),
        pa.array(holes),
        pa.chunked_array([holes[:3], holes[3:]]),
        pa.table({"a": holes}),
        np.ma.masked_array([value or 0 for value in holes], mask=~keep),
    ):
        assert lcodec_ext.codec(y, column, nan_policy="omit") == lcodec_ext.codec(y[keep], plain)
        with pytest.raises(ValueError, match="NaN in z at row 1"):
            lcodec_ext.codec(y, column)
    flags = pd.array([True, None, False, True] * 2, dtype="boolean")
    kept = np.array([True, False, True, True] * 2)
    for column in (flags, pa.array([True, None, False, True] * 2)):
        value = lcodec_ext.codec(y, column, nan_policy="omit")
        assert value == lcodec_ext.codec(y[kept], np.array([1.0, 0, 1] * 2))
    table = pa.table({"a": y[keep] % 2, "b": plain})
    assert lcodec_ext.foci(table, plain).names == ["b"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pd.Series(pd.to_datetime(["2020-01-01"] * N)), "got values of dtype datetime64.*days"),
        (pd.Series(pd.to_timedelta(range(N), unit="s")), "timedelta64.*pass the number"),
        (
            pa.array(pd.to_datetime(["2020-01-01"] * N)),
            "is timestamp.*; expected numbers: pass",
        ),
        (pa.array(range(N), pa.duration("s")), "is duration.*; expected numbers: pass"),
        (pa.array(["a"] * N), "is string; expected numbers: encode categories"),
        (pa.array(["a"] * N).dictionary_encode(), "is dictionary<.*expected numbers: encode"),
        (pa.array([1] * N, pa.decimal128(5, 2)), "is decimal128.*: convert them to floats first"),
        (pd.Series([1] * N, dtype="Sparse[int64]"), "is Sparse.*: make the column dense first"),
        (pd.Series([Fraction(1, 3)] * N), "must hold real numbers; got objects .Fraction.; "),
        (pd.Series([1, 2.5] * (N // 2), dtype=object), "objects .int, float.*with astype"),
    ],
)
def test_columns_without_numbers_are_named(column, message):
    with pytest.raises(ValueError, match="z .*" + message):
        lcodec_ext.codec(Y, column)
    table = pa.table({"f": Y, "c": column}) if isinstance(column, pa.Array) else None
    with pytest.raises(ValueError, match="column 'c' .index 1. of X .*" + message):
        lcodec_ext.foci(pd.DataFrame({"f": Y, "c": column}) if table is None else table, Y)


KINDS = ["int64", "uint64", "int16", "float64", "float32", "bool"]


@given(st.data())
def test_tables_of_mixed_types_against_exact_rationals(data):
    """Nearest neighbours are those of the numbers as they were written, or a refusal says why."""
    n = data.draw(st.integers(3, 7))
    columns, types = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        small = st.lists(st.integers(-40, 40), min_size=n, max_size=n)
        kind = data.draw(st.sampled_from(KINDS))
        values = data.draw(small)
        if kind in ("int64", "uint64"):
            offset = data.draw(st.sampled_from([100, 2**31, 2**53 - 40, 2**53 + 60, 2**60, 2**62]))
            values = [offset + value for value in values]
        elif kind == "bool":
            values = [value > 0 for value in values]
        elif kind.startswith("float"):
            values = [value / 8 for value in values]
        columns.append(values)
        types.append(kind)
    names = [f"c{k}" for k in range(len(columns))]
    arrays = [np.array(values, dtype=t) for values, t in zip(columns, types, strict=True)]
    nullable = {"int64": "Int64", "uint64": "UInt64", "int16": "Int16", "bool": "boolean"}
    kept_in = {
        "pandas": lambda: pd.DataFrame(dict(zip(names, arrays, strict=True))),
        "nullable": lambda: pd.DataFrame(
            {
                name: pd.array(array, dtype=nullable.get(t, t.capitalize()))
                for name, array, t in zip(names, arrays, types, strict=True)
            }
        ),
        "arrow": lambda: pa.table(dict(zip(names, arrays, strict=True))),
        "frame": lambda: Frame(dict(zip(names, arrays, strict=True))),
        "command line": lambda: Table(names, arrays),
        "rows": lambda: list(zip(*columns, strict=True)),
        "long double": lambda: np.column_stack([array.astype("g") for array in arrays]),
    }
    table = data.draw(st.sampled_from(list(kept_in.values())))()
    exact = [list(map(Fraction, row)) for row in zip(*columns, strict=True)]
    expected = []
    for i, row in enumerate(exact):
        distances = [
            (sum((a - b) ** 2 for a, b in zip(row, other, strict=True)), j)
            for j, other in enumerate(exact)
            if j != i
        ]
        expected.append(min(distances)[1])
    if all(abs(value) <= 2**53 for values in columns for value in values):
        assert lcodec_ext.nearest_neighbors(table).tolist() == expected
        return
    try:
        found = lcodec_ext.nearest_neighbors(table).tolist()
    except ValueError as error:
        found = expected if "float64 cannot tell" in str(error) else [str(error)]
    assert found == expected


@pytest.mark.parametrize(
    "given",
    [
        lambda v: (each for each in v),
        lambda v: map(float, v),
        set,
        lambda v: zip(v, v, strict=True),
    ],
)
def test_what_is_no_sequence_is_to_be_listed(given):
    values = list(np.random.default_rng(0).normal(size=30))
    for call, name in (
        (lambda: lcodec_ext.codec(given(values), values), "y"),
        (lambda: lcodec_ext.codec(values, given(values)), "z"),
        (lambda: lcodec_ext.foci(given(values), values), "X"),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} must .*(list\({name}\)|order: pass a list)$"
        ):
            call()


def test_fractions_are_to_be_converted():
    values = [Fraction(k, 3) for k in range(30)]
    with pytest.raises(ValueError, match="objects .Fraction.; convert them to floats first"):
        lcodec_ext.codec(values, np.arange(30.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: lcodec_ext.foci(X, "target"),
        lambda: lcodec_ext.lfoci(X, "target"),
        lambda: lcodec_ext.codec("target", X),
        lambda: lcodec_ext.codec(Y, "target"),
        lambda: lcodec_ext.codec_test("target", "bmi", X),
        lambda: lcodec_ext.codec_test(Y, X, "target"),
        lambda: lcodec_ext.xi(Y, "target"),
        lambda: lcodec_ext.xi_test("target", Y),
        lambda: lcodec_ext.xi_matrix("target"),
        lambda: lcodec_ext.stability(X, "target"),
        lambda: lcodec_ext.dependence_graph("target"),
        lambda: lcodec_ext.nearest_neighbors("target"),
        lambda: lcodec_ext.FOCISelector().fit(X, "target"),
    ],
)
def test_the_name_of_a_column_is_not_its_data(call):
    with pytest.raises(ValueError, match=r"[Xyxz] must be .*; got the str 'target': pass the data"):
        call()


@pytest.mark.parametrize("function", [lcodec_ext.foci, lcodec_ext.lfoci, lcodec_ext.stability])
@pytest.mark.parametrize("frame", [False, True])
def test_arguments_in_the_order_of_r(function, frame):
    table, column = (pd.DataFrame(X), pd.Series(Y)) if frame else (X, Y)
    with pytest.raises(ValueError, match=r"X of shape \(30,\).*are the arguments swapped"):
        function(column, table)


def test_one_column_as_x_is_told_how_to_be_a_table():
    with pytest.raises(ValueError, match=r"pass X.to_frame\(\)"):
        lcodec_ext.foci(pd.Series(Y), Y)
    with pytest.raises(ValueError, match=r"pass X.reshape\(-1, 1\)"):
        lcodec_ext.foci(Y, Y)


def test_a_result_names_given_columns():
    table = pd.DataFrame(X, columns=["age", "bmi", "bp"])
    result = lcodec_ext.foci(table, Y, preselected=["bmi", 0])
    assert result.preselected_names == ["bmi", "age"]
    assert "given 'bmi' (1), 'age' (0): T = " in repr(result)
    assert "given columns 1, 0: T = " in repr(lcodec_ext.foci(X, Y, preselected=[1, 0]))
    assert "given column 2: T = " in repr(lcodec_ext.foci(X, Y, preselected=[2]))
