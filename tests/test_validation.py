"""Bad input gets an error that names it; odd input just works."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sparse
import torch

import lcodec_ext

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
    ({"y": X[:, :2]}, ValueError, r"y must be one column.*got shape \(30, 2\)"),
    ({"y": Y[np.newaxis]}, ValueError, r"y must be one column.*got shape \(1, 30\)"),
    ({"y": Y.astype(str)}, ValueError, "y must hold real numbers; got strings; encode"),
    ({"y": ["a"] * N}, ValueError, "y must hold real numbers; got strings; encode"),
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
    ({"y": pd.Series(["u", "v"] * 15, dtype="category")}, ValueError, "y is categorical.*encode"),
    ({"y": pd.Series(["u", "v"] * 15)}, ValueError, "y .*str.*"),
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
        ({"preselected": 1}, TypeError, "preselected must be a sequence"),
        ({"preselected": "x1"}, TypeError, "preselected must be a sequence"),
        ({"preselected": ["age"]}, ValueError, "column 'age': X has no column names"),
        ({"max_features": -1}, ValueError, "max_features must be an integer >= 1; got -1"),
        ({"max_features": 0}, ValueError, "max_features must be an integer >= 1; got 0"),
        ({"max_features": 2.0}, TypeError, "max_features must be an integer >= 1; got 2.0"),
        ({"min_gain": -0.1}, ValueError, "min_gain must be a finite number >= 0; got -0.1"),
        ({"min_gain": np.nan}, ValueError, "min_gain must be a finite number >= 0; got nan"),
        ({"min_gain": "0"}, TypeError, "min_gain must be a number"),
        ({"min_gain": 0.1, "stop": False}, ValueError, "min_gain=0.1 needs stop=True"),
        ({"stop": 1}, TypeError, "stop must be True or False; got 1"),
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
