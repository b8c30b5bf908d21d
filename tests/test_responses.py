"""Several response columns, and several neighbours: the definitions, R's didec, all backends."""

import json
import math
import warnings
from fractions import Fraction
from functools import partial

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given

import oracle
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import _emulated, codec, foci, lcodec, lfoci
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuColumns
from lcodec_ext.dependence.backends.reference import ReferenceBackend, ReferenceColumns
from lcodec_ext.dependence.k_nearest import NeighborsEngine
from test_backends import same_result, tables
from test_golden import DATA, load

pytestmark = pytest.mark.native

EMULATED = cuda_on_cpu(_emulated.cuda)
ORDERS = ("given", "average")


def on_every_backend(call, *arrays):
    """Results of a call on NumPy arrays by the CPU and the reference, and emulated on tensors."""
    tensors = [None if array is None else torch.tensor(np.array(array)) for array in arrays]
    return [
        call(*arrays, backend="cpu"),
        call(*arrays, backend="reference"),
        call(*tensors, backend=EMULATED),
    ]


def same_paths(X, Y, **options):
    """`foci` selects alike on every backend, or refuses the data alike."""

    def outcome(*arrays, backend):
        try:
            return foci(*arrays, backend=backend, **options)
        except ValueError as error:  # a spread beyond float32
            return str(error)

    first, *others = on_every_backend(outcome, X, Y)
    for other in others:
        if isinstance(first, str):
            assert first == other
            assert "cannot be standardised" in first
        else:
            same_result(first, other)


# --------------------------------------------------------------------------------------------
# Several responses

DIDEC = json.loads((DATA / "kpc_didec.json").read_text())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", DIDEC, ids=[case["data"] for case in DIDEC])
def test_two_responses_agree_with_didec(case, backend):
    """didec leaves ties to R's FOCI, which draws; these data have none."""
    X, y = load(case["data"])
    Y, X = np.column_stack([y, X[:, -1]]), X[:, :-1]
    expected = case["didec_Codec.Tq_Y_is_y_and_xp__X_is_rest"]
    assert codec(Y, X, backend=backend) == pytest.approx(expected, abs=1e-15)
    path = foci(X, Y, standardize=None, stop=False, backend=backend)
    assert path.cumulative[-1] == pytest.approx(expected, abs=1e-12)


@st.composite
def small(draw, most=3):
    """Columns and responses of small integers, in which float distances are exact."""
    n, p, q = (
        draw(st.integers(3, 8)),
        draw(st.integers(1, 3)),
        draw(st.integers(min(most, 2), most)),
    )
    X = draw(hnp.arrays(np.int64, (n, p), elements=st.integers(0, 3)))
    return X, draw(hnp.arrays(np.int64, (n, q), elements=st.integers(0, 4)))


def listed(table):
    return [column.tolist() for column in table.T]


@given(table=small(), k=st.integers(1, 2))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_several_responses_against_the_definitions(table, k):
    X, Y = table
    xs, ys = listed(X), listed(Y)
    varying = [y for y in ys if len(set(y)) > 1]
    if not varying:
        return
    assert codec(Y, X, n_neighbors=k) == float(oracle.Tq(xs, ys, k))
    assert codec(Y, X, n_neighbors=k, y_order="average") == float(oracle.mean_Tq(xs, ys, k))
    if len(xs) > 1 and oracle.Tq(xs[:1], ys, k) != 1:
        expected = oracle.conditional_Tq(xs[1:], xs[:1], ys, k)
        assert codec(Y, X[:, 1:], X[:, :1], n_neighbors=k) == float(expected)
    for order, T in zip(ORDERS, (oracle.Tq, oracle.mean_Tq), strict=True):
        ordering, values = oracle.foci(xs, ys, T=partial(T, k=k))
        result = foci(X, Y, standardize=None, n_neighbors=k, y_order=order)
        assert result.ordering.tolist() == ordering
        assert result.cumulative.tolist() == [float(value) for value in values]


@given(
    table=tables(),
    q=st.integers(2, 3),
    order=st.sampled_from(ORDERS),
    standardize=st.sampled_from(["scale", "bounded", None]),
    k=st.integers(1, 2),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # constant columns and underflow are drawn
def test_backends_agree_on_several_responses(table, q, order, standardize, k):
    X, y = table
    X = X[:, :5]
    Y = np.column_stack([np.roll(y, i) * (i + 1) % 7 for i in range(q)])
    options = {"y_order": order, "n_neighbors": k}
    for z, x in [(X, None), (X[:, 1:], X[:, :1])]:
        if z.shape[1]:
            values = on_every_backend(partial(codec, **options), Y, z, x)
            assert values[0] == values[1] == values[2]
    same_paths(X, Y, standardize=standardize, **options)


def test_a_part_of_the_responses_may_be_all_there_is_to_learn(rng):
    """T^q is 1 if X determines all of Y, near 0 without dependence, and between for one of two."""
    X = rng.random((2000, 2))
    unknown = rng.random(2000)
    both = np.column_stack([X[:, 0] + X[:, 1], X[:, 0] - X[:, 1]])
    one = np.column_stack([X.sum(axis=1), unknown])
    none = rng.random((2000, 2))
    assert codec(both, X) > 0.9
    assert 0.35 < codec(one, X) < 0.65
    assert abs(codec(none, X)) < 0.1
    # given X, which determines the first, Y depends on what determines the second
    assert codec(one, unknown, X) > 0.8


def test_one_column_in_a_table_and_constant_ones_change_nothing(rng):
    X, y = rng.normal(size=(60, 3)), rng.normal(size=60)
    constant = np.full(60, 7.0)
    for order in ORDERS:
        assert codec(y[:, None], X, y_order=order) == codec(y, X)
        with pytest.warns(UserWarning, match="column 1 of y is constant and can tell") as caught:
            assert codec(np.column_stack([y, constant]), X, X[:, 0], y_order=order) == codec(
                y, X, X[:, 0]
            )
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="column 0 of y is constant"):
            found = foci(X, np.column_stack([constant, y]), y_order=order)
        assert found.ordering.tolist() == foci(X, y).ordering.tolist()
        with pytest.warns(UserWarning, match="y is constant: the coefficient is 1 by convention"):
            assert codec(np.column_stack([constant, constant]), X, y_order=order) == 1.0
        with pytest.warns(UserWarning, match="y is constant: nothing is selected"):
            assert foci(X, np.column_stack([constant, constant])).stop_reason == "constant_y"
    x = np.repeat(np.arange(20.0), 3)
    with pytest.warns(UserWarning, match="y is a function of x on this sample"):
        assert codec(np.column_stack([x, x**2]), X, x) == 1.0


def test_the_order_of_responses_counts_unless_it_is_averaged(rng):
    X = rng.normal(size=(200, 3))
    Y = np.column_stack([X[:, 0] + rng.normal(size=200), X[:, 1] ** 2, X[:, 0] * X[:, 2]])
    assert len({codec(Y[:, order], X) for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2])}) == 3
    averaged = [codec(Y[:, order], X, y_order="average") for order in ([0, 1, 2], [2, 0, 1])]
    # sums of squares are added in another order
    assert averaged[0] == pytest.approx(averaged[1], abs=1e-12)
    with pytest.raises(ValueError, match="all orders of the columns of y, 5 at most; got 6"):
        codec(np.hstack([Y, Y]), X, y_order="average")
    for order in ("all", None):
        with pytest.raises(ValueError, match="y_order must be one of 'given', 'average'; got"):
            codec(Y, X, y_order=order)
        with pytest.raises(ValueError, match="y_order must be one of 'given', 'average'; got"):
            foci(X, Y, y_order=order)


def test_frames_lists_tensors_and_integers_of_responses(rng):
    X, Y = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    expected, path = codec(Y, X), foci(X, Y, stop=False)
    frame = pd.DataFrame(Y, columns=["left", "right"])
    nullable, across = frame.astype("Float64"), np.asfortranarray(Y)
    for given_y in (frame, nullable, Y.tolist(), torch.tensor(Y), across):
        assert codec(given_y, X) == expected
        same_result(foci(X, given_y, stop=False), path)
    levels = (Y * 3).round().astype(np.int8)
    assert codec(levels, X) == codec(levels.astype(float), X)
    halves = Y.astype(np.float32)
    assert codec(halves, X.astype(np.float32), backend="reference") == codec(
        halves, X.astype(np.float32)
    )
    holes = frame.copy()
    holes.loc[3, "right"] = np.nan
    kept = np.delete(np.arange(50), 3)
    assert codec(holes, X, nan_policy="omit") == codec(Y[kept], X[kept])
    found = foci(X, holes, nan_policy="omit")
    assert found.missing == {"column 'right' (index 1) of y": 1}


def test_bad_responses_are_named(rng):
    X, Y = rng.normal(size=(30, 3)), rng.normal(size=(30, 2))
    frame = pd.DataFrame(Y, columns=["left", "right"])
    holes = frame.copy()
    holes.loc[4, "right"] = np.nan
    for call in (codec, lambda y, z: foci(z, y)):
        with pytest.raises(ValueError, match=r"NaN in y at row 4, column 'right' \(index 1\)"):
            call(holes, X)
        with pytest.raises(ValueError, match="infinite values.* y at row 0, column 1"):
            call(np.where(np.arange(60).reshape(30, 2) == 1, np.inf, Y), X)
        with pytest.raises(ValueError, match=r"y has 29, z has 30|X has 30, y has 29"):
            call(Y[:-1], X)
        with pytest.raises(ValueError, match="'kind' .* of y .*str"):
            call(frame.assign(kind=["a", "b"] * 15), X)
        with pytest.raises(ValueError, match="y holds integers beyond 2\\*\\*53|column 0 of y"):
            call(np.arange(60).reshape(30, 2) + 2**60, X)
        with pytest.raises(ValueError, match=r"y must be one column.*got shape \(1, 30\)"):
            call(Y[:, 0][None], X)
    for call in (lcodec, lambda y, z: lfoci(z, y)):
        with pytest.raises(ValueError, match=r"y must be one column.*got shape \(30, 2\)"):
            call(Y, X)
    with pytest.raises(ValueError, match="overflow float64 with column 0 of y"):
        codec(Y * 1e200, X)
    assert math.isfinite(codec(Y * [1, 1e200], X))  # the last one is in no distance


def test_decimals_of_responses():
    rng = np.random.default_rng(5)
    whole_X, whole_Y = rng.integers(0, 9, (60, 2)), rng.integers(0, 9, (60, 2))
    X, Y = whole_X / 10, whole_Y / 10
    for order in ORDERS:
        expected = codec(whole_Y, whole_X, y_order=order)
        assert codec(Y, X, decimals=1, y_order=order) == expected
        assert codec(10 * Y, 10 * X, decimals=0, y_order=order) == expected
    same_result(foci(X, Y, decimals=1), foci(whole_X, whole_Y))
    last = Y + np.array([0, 0.001])
    assert codec(last, X, decimals=1) == codec(whole_Y, whole_X)
    with pytest.raises(ValueError, match="column 1 of y holds .* which has more than 1 decimals"):
        codec(last, X, decimals=1, y_order="average")


def test_foci_of_several_responses_selects_what_each_needs(rng):
    X = rng.normal(size=(1000, 8))
    Y = X[:, [2, 5]] + 0.1 * rng.normal(size=(1000, 2))
    result = foci(X, Y)
    assert set(result.ordering[:2].tolist()) == {2, 5}
    assert result.cumulative[1] > 0.7
    T = codec(Y / Y.std(axis=0, ddof=1), (X / X.std(axis=0, ddof=1))[:, result.ordering[:2]])
    assert result.cumulative[1] == pytest.approx(T, abs=1e-12)
    given_first = foci(X, Y, preselected=[int(result.ordering[0])])
    assert given_first.base == result.cumulative[0]
    assert given_first.cumulative.tolist() == result.cumulative[1:].tolist()
    assert given_first.conditional[0] == result.conditional[1]
    shown = foci(X, Y, progress=True)
    same_result(result, shown)


# --------------------------------------------------------------------------------------------
# Several neighbours


@given(table=small(1), data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_neighbors_against_the_definitions(table, data):
    X, y = table[0], table[1][:, 0]
    xs, ys = listed(X), y.tolist()
    if len(set(ys)) == 1:
        return
    k = data.draw(st.integers(1, len(y) - 1))
    assert codec(y, X, n_neighbors=k) == float(oracle.T(xs, ys, k))
    ordering, values = oracle.foci(xs, ys, T=partial(oracle.T, k=k))
    result = foci(X, y, standardize=None, n_neighbors=k)
    assert result.ordering.tolist() == ordering
    assert result.cumulative.tolist() == [float(value) for value in values]
    R = sum(int((y <= value).sum()) for value in ys)
    if len(xs) > 1 and oracle.mean_minima(xs[:1], ys, k) != R:
        expected = oracle.conditional_T(xs[1:], xs[:1], ys, k)
        assert codec(y, X[:, 1:], X[:, :1], n_neighbors=k) == float(expected)


@given(table=tables(), data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backends_agree_on_several_neighbors(table, data):
    X, y = table
    n, p = X.shape
    k = data.draw(st.integers(2, n - 1))
    factors = data.draw(hnp.arrays(X.dtype, p, elements=st.sampled_from([1.0, 0.0, 0.3, 7.0])))
    used = data.draw(st.lists(st.integers(0, p - 1), min_size=1, max_size=15, unique=True))
    R, _ = CpuBackend().ranks(y)
    tensor = torch.tensor(X)
    found = [
        CpuBackend().nearest_minima(CpuColumns(X), factors, used, R, k),
        ReferenceBackend().nearest_minima(ReferenceColumns(X), factors, used, R, k),
        EMULATED.nearest_minima(EMULATED.lay_out(tensor), factors, used, torch.tensor(R), k),
    ]
    for parts in zip(*found, strict=True):
        np.testing.assert_array_equal(parts[0], parts[1])
        np.testing.assert_array_equal(parts[0], parts[2])


@given(table=tables(), k=st.integers(2, 9), standardize=st.sampled_from(["scale", None]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backends_agree_on_foci_of_several_neighbors(table, k, standardize):
    X, y = table
    k = min(k, len(y) - 1)
    same_paths(X[:, :6], y, n_neighbors=k, standardize=standardize, max_features=3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [5, 300, 1025])
def test_settings_do_not_change_sums_over_neighbors(n, dtype, monkeypatch, rng, simd_level):
    X = np.hstack([rng.integers(0, 3, (n, 3)), rng.normal(size=(n, 12)) + 1e7]).astype(dtype)
    R, _ = CpuBackend().ranks(rng.integers(0, n, n))
    factors = np.ones(15, dtype=dtype)
    for used in ([0], [0, 1, 2], [4, 1], list(range(15))):
        expected = ReferenceBackend().nearest_minima(ReferenceColumns(X), factors, used, R, 4)
        for threads in (1, 3):
            monkeypatch.setenv("LCODEC_NUM_THREADS", str(threads))
            found = CpuBackend().nearest_minima(CpuColumns(X), factors, used, R, 4)
            np.testing.assert_array_equal(found, expected)


def test_one_group_of_all_rows_is_averaged_exactly():
    """Rank sums far beyond 32 bits, times the places that are left."""
    n, k = 50_000, 30_000
    R = np.arange(1, n + 1)
    backend = CpuBackend()
    columns = CpuColumns(np.zeros((n, 1), np.float32))
    whole, rest, tied = backend.nearest_minima(columns, np.ones(1, np.float32), [0], R, k)
    sums = [i * (i - 1) // 2 + i * (n - i) for i in range(1, n + 1)]  # over j != i
    assert (tied == n - 1).all()
    assert whole.tolist() == [k * total // (n - 1) for total in sums]
    assert rest.tolist() == [k * total % (n - 1) for total in sums]
    engine = NeighborsEngine(backend, columns, np.ones(1, np.float32), R, k)
    assert engine.exact_sum(0) == Fraction(sum(sums), n - 1)
    (high,), (low,) = engine.score(np.array([0]))
    assert int(high) + Fraction(int(low), 2**exact.FRACTION_BITS) <= engine.exact_sum(0)


def test_more_neighbors_vary_less(rng):
    """Under independence the variance falls about as 1 / k; the mean stays near 0."""
    values = {1: [], 8: []}
    for _ in range(100):
        x, y = rng.random((2, 100))
        for k, found in values.items():
            found.append(codec(y, x, n_neighbors=k))
    for found in values.values():
        assert abs(np.mean(found)) < 0.02 + 4 * np.std(found) / 10
    assert np.std(values[8]) < 0.6 * np.std(values[1])


def test_all_rows_as_neighbors_tell_nothing(rng):
    x, y = rng.normal(size=(2, 40))
    assert codec(x, x, n_neighbors=39) == codec(x, y, n_neighbors=39)


def test_several_neighbors_of_classes_and_preselected_columns(rng):
    X = rng.integers(0, 4, (90, 4)).astype(float)
    y = np.array(["a", "b", "c"])[(X[:, 0] + X[:, 2]).astype(int) % 3]
    parts = [float(codec(y == name, X[:, [0, 2]], n_neighbors=3)) for name in "abc"]
    assert codec(y, X[:, [0, 2]], n_neighbors=3) == pytest.approx(np.mean(parts), abs=1e-15)
    results = [
        foci(X, y, n_neighbors=3, preselected=[1], backend=backend)
        for backend in ("cpu", "reference")
    ]
    same_result(*results)


def test_bad_numbers_of_neighbors(rng):
    X, y = rng.normal(size=(20, 2)), rng.normal(size=20)
    for call in (codec, lambda y, z, **options: foci(z, y, **options)):
        with pytest.raises(ValueError, match="n_neighbors must be an integer >= 1; got 0"):
            call(y, X, n_neighbors=0)
        with pytest.raises(TypeError, match="n_neighbors must be an integer >= 1; got 2.0"):
            call(y, X, n_neighbors=2.0)
        with pytest.raises(ValueError, match="n_neighbors must be below the number of rows, 20"):
            call(y, X, n_neighbors=20)
        with pytest.raises(ValueError, match="n_neighbors=3 .* got ties='random': pass ties='ave"):
            call(y, X, n_neighbors=3, ties="random")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(y, X, n_neighbors=19)
            call(y, X, n_neighbors=np.int64(1), ties="first")


def test_steps_compare_and_report_the_exact_coefficient(rng):
    """T and gains without fractions are those of fractions, also where a gain is just the least."""
    sums = exact.ResponseSums(*CpuBackend().ranks(rng.integers(0, 9, 40)))
    for least in (0, Fraction(1, 8)):
        level = sums.start + Fraction(least) * sums.denominator / sums.n
        for m in (level, level + Fraction(1, 2**80), 5, 800, Fraction(1801, 3)):
            T = sums.unconditional(m)
            assert sums.value(m) == float(T)
            assert sums.gains(m, sums.start, least) == (T > least)
    assert sums.unconditional(sums.start) == 0
