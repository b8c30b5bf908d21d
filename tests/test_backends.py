"""The backends against each other, with ==, and against an oracle written from the definitions."""

import warnings
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import lcodec_ext
import oracle
from lcodec_ext import _threads
from lcodec_ext.dependence import exact
from lcodec_ext.dependence.backends.base import HostEngine, Laid
from lcodec_ext.dependence.backends.cpu import CpuBackend, CpuColumns, CpuEngine
from lcodec_ext.dependence.backends.reference import ReferenceColumns, ReferenceEngine
from lcodec_ext.dependence.backends.resolve import HOST

ranks = CpuBackend().ranks
pytestmark = pytest.mark.native

TIES = ["average", "random", "first"]


def columns(dtype):
    """Feature values that make ties, duplicates, offsets and tiny differences."""
    width = np.dtype(dtype).itemsize * 8
    return st.one_of(
        st.integers(0, 2).map(float),
        st.sampled_from([1e7, 1e7 + 1, 1e7 + 2, -1e7]),
        st.sampled_from([0.0, -0.0, 1e-40, 2e-40, 5e-324 if width == 64 else 1e-45]),
        st.floats(-100, 100, width=width, allow_subnormal=True),
    )


@st.composite
def tables(draw, dtype=None):
    dtype = draw(st.sampled_from([np.float32, np.float64])) if dtype is None else dtype
    n = draw(st.integers(3, 40))
    p = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 33]))
    pool = draw(st.lists(columns(dtype), min_size=1, max_size=6))
    values = st.one_of(st.sampled_from(pool), columns(dtype))
    X = draw(hnp.arrays(dtype, (n, p), elements=values, fill=st.sampled_from(pool)))
    y = draw(hnp.arrays(np.int64, n, elements=st.integers(0, draw(st.sampled_from([1, 2, 50])))))
    return X, y


def same_result(a, b):
    assert a.ordering.tolist() == b.ordering.tolist()
    assert a.cumulative.tolist() == b.cumulative.tolist()
    assert a.conditional.tolist() == b.conditional.tolist()
    assert a.stop_reason == b.stop_reason
    assert a.base == b.base


@given(table=tables(), ties=st.sampled_from(TIES), seed=st.integers(0, 2**64 - 1), data=st.data())
def test_engine_equals_reference(table, ties, seed, data):
    X, y = table
    p = X.shape[1]
    R, _ = ranks(y)
    factors = data.draw(hnp.arrays(X.dtype, p, elements=st.sampled_from([1.0, 0.0, 0.3, 7.0])))
    engines = [
        CpuEngine(CpuColumns(X), factors, R, ties, seed),
        ReferenceEngine(ReferenceColumns(X), factors, R, ties, seed),
    ]
    chosen = data.draw(st.lists(st.integers(0, p - 1), max_size=3, unique=True))
    everything = np.arange(p)
    for column in [*chosen, None]:
        cpu, reference = (engine.score(everything) for engine in engines)
        np.testing.assert_array_equal(cpu[0], reference[0])
        np.testing.assert_array_equal(cpu[1], reference[1])
        for row in zip(*(engine.row_sums(p - 1) for engine in engines), strict=True):
            np.testing.assert_array_equal(*row)
        if column is not None:
            for engine in engines:
                engine.select(column)


@given(
    table=tables(),
    ties=st.sampled_from(TIES),
    seed=st.integers(0, 2**64 - 1),
    standardize=st.sampled_from(["scale", "bounded", None]),
    stop=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # constant columns and responses are drawn
def test_foci_equals_reference(table, ties, seed, standardize, stop):
    X, y = table
    options = {"ties": ties, "seed": seed, "standardize": standardize, "stop": stop}
    options["max_features"] = 4
    results = []
    for backend in HOST:
        try:
            results.append(lcodec_ext.foci(X, y, backend=backend, **options))
        except ValueError as error:  # a spread beyond float32: both must refuse it alike
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
        assert "cannot be standardised" in results[0]
    else:
        same_result(*results)


@given(table=tables(), ties=st.sampled_from(TIES), seed=st.integers(0, 2**64 - 1))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_codec_equals_reference(table, ties, seed):
    X, y = table
    split = X.shape[1] // 2
    for z, x in [(X, None), (X[:, split:], X[:, :split] if split else None)]:
        values = [
            lcodec_ext.codec(y, z, x, ties=ties, seed=seed, backend=backend) for backend in HOST
        ]
        assert values[0] == values[1]


@given(table=tables())
def test_columns_equal_reference(table):
    X, _ = table
    cpu, reference = CpuColumns(X), ReferenceColumns(X)
    np.testing.assert_array_equal(cpu.values, X.T)
    np.testing.assert_array_equal(cpu.low, reference.low)
    np.testing.assert_array_equal(cpu.high, reference.high)
    np.testing.assert_array_equal(cpu.standard_deviations(), reference.standard_deviations())


@pytest.mark.parametrize("n", [63, 64, 65, 127, 129, 1000])
def test_columns_of_many_rows_equal_reference(n, rng, simd_level):
    X = rng.normal(size=(n, 70)) * 10.0 ** rng.integers(-20, 20, 70)
    for table in (X, X.astype(np.float32)):
        cpu, reference = CpuColumns(table), ReferenceColumns(table)
        np.testing.assert_array_equal(cpu.values, table.T)
        np.testing.assert_array_equal(cpu.low, reference.low)
        np.testing.assert_array_equal(cpu.high, reference.high)
        np.testing.assert_array_equal(cpu.standard_deviations(), reference.standard_deviations())


@given(table=tables(), ties=st.sampled_from(["first", "random", "all"]), seed=st.integers(0, 99))
def test_neighbors_equal_reference(table, ties, seed):
    X, _ = table
    cpu, reference = (
        lcodec_ext.nearest_neighbors(X, ties=ties, seed=seed, backend=backend) for backend in HOST
    )
    for a, b in zip(*((r if ties == "all" else (r,)) for r in (cpu, reference)), strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    X=hnp.arrays(
        np.int64, st.tuples(st.integers(3, 9), st.integers(1, 4)), elements=st.integers(0, 3)
    ),
    data=st.data(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_against_the_definitions(X, data):
    n, p = X.shape
    y = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 4)))
    if len(set(y.tolist())) == 1:
        return
    listed = [column.tolist() for column in X.T]
    assert lcodec_ext.codec(y, X) == float(oracle.T(listed, y.tolist()))
    for stop in (True, False):
        ordering, values = oracle.foci(listed, y.tolist(), stop)
        result = lcodec_ext.foci(X, y, standardize=None, stop=stop)
        assert result.ordering.tolist() == ordering
        assert result.cumulative.tolist() == [float(value) for value in values]
    if p > 1:
        R, _ = ranks(y)
        if oracle.mean_minima(listed[:1], y.tolist()) != int(R.sum()):
            expected = float(oracle.conditional_T(listed[1:], listed[:1], y.tolist()))
            assert lcodec_ext.codec(y, X[:, 1:], X[:, :1]) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("n", [3, 17, 2046, 2047, 2048, 4095])
def test_settings_do_not_change_bits(n, ties, dtype, monkeypatch, rng):
    """Every SIMD level and thread count, at sizes around a block of the scan."""
    p = 5 if n > 100 else 40
    X = np.hstack([rng.integers(0, 3, (n, p)), rng.normal(size=(n, p)) + 1e7]).astype(dtype)
    R, _ = ranks(rng.integers(0, n, n))
    factors = np.ones(2 * p, dtype=dtype)
    engine = CpuEngine(CpuColumns(X), factors, R, ties, 5)
    outcomes = []
    for level in lcodec_ext.build_info()["simd_supported"]:
        for threads in (1, 2, 3):
            monkeypatch.setenv("LCODEC_SIMD", level)
            monkeypatch.setenv("LCODEC_NUM_THREADS", str(threads))
            fresh = CpuEngine(CpuColumns(X), factors, R, ties, 5)
            first = fresh.score(np.arange(2 * p))
            fresh.select(0)
            second = fresh.score(np.arange(1, 2 * p))
            sums = fresh.row_sums(p)
            outcomes.append(np.concatenate([*first, *second, *sums]))
    for a, b in pairwise(outcomes):
        np.testing.assert_array_equal(a, b)
    sample = np.array([0, p])
    sums = [exact.fixed_point(*engine.row_sums(int(c))) for c in sample]
    np.testing.assert_array_equal(np.array(sums).T, engine.score(sample))


def test_big_ties_do_not_overflow(rng):
    """One group of all rows: rank sums far beyond 32 bits."""
    n = 70_000
    R = np.arange(1, n + 1)
    engine = CpuEngine(
        CpuColumns(np.zeros((n, 1), np.float32)), np.ones(1, np.float32), R, "average", 0
    )
    # sum_j min(i, j) over j != i, for ranks 1..n
    sums = R * (R - 1) // 2 + R * (n - R)
    whole, fraction = engine.score(np.array([0]))
    assert (int(whole[0]), int(fraction[0])) == exact.fixed_point(sums, np.full(n, n - 1))


def test_ctrl_c_ends_a_long_call(rng):
    import signal
    import threading
    import time

    X, y = rng.random((20_000, 64)).astype(np.float32), rng.random(20_000)
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    # ignored where the tests were started in the background
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lcodec_ext.foci(X, y, stop=False)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - started < 20


def test_exact_ties_between_candidates_take_the_lowest_index(rng):
    X = rng.integers(0, 3, (60, 4)).astype(float)
    X = np.hstack([X[:, [3]] * 2 - 1, X, X[:, ::-1] * 3])  # the same columns, told differently
    y = X[:, 4] * X[:, 3]
    result = lcodec_ext.foci(X, y, standardize="bounded")
    twins = {0: 4, 5: 4, 6: 3, 7: 2, 8: 1}
    assert not set(result.ordering.tolist()) & (set(twins) - {0})
    assert 0 in result.ordering  # and not its twin 4, of a higher index


def test_near_ties_are_decided_by_rationals(monkeypatch, rng):
    """Candidates closer than fixed point resolves: rationals must have the last word."""
    from lcodec_ext.dependence.candidates import Candidates

    def best(engine, *leaders):
        response, table = SimpleNamespace(unconditional=Fraction), np.zeros((3, 2))
        columns = CpuColumns(table)
        choice = Candidates(
            lambda laid: (response, engine),
            Laid(columns, np.ones(2), np.ones(2)),
            2,
            0,
            lambda k: f"column {k}",
        )
        return choice.exact_best(leaders)

    class Engine(HostEngine):
        def __init__(self):
            super().__init__(2)

        def score(self, columns, floor=None):
            raise AssertionError("scores are given")

        def row_sums(self, column):
            # 1/3 + 1/3 + 1/3 rounds down in fixed point, below the 1 of the other candidate
            thirds = (np.array([1, 1, 1]), np.array([3, 3, 3]))
            return thirds if column == 0 else (np.array([1, 0, 0]), np.array([2, 1, 1]))

    whole, fraction = np.array([exact.fixed_point(*Engine().row_sums(c)) for c in (0, 1)]).T
    assert best(Engine(), np.array([0, 1]), whole, fraction) == (0, 1)
    exact_one = np.array([1]), np.array([0])
    both = np.append(whole[:1], exact_one[0]), np.append(fraction[:1], exact_one[1])

    class Mixed(Engine):
        def row_sums(self, column):
            return super().row_sums(0) if column == 0 else (np.array([1, 0]), np.array([1, 1]))

    assert best(Mixed(), np.array([0, 1]), *both) == (0, 1)  # equal: the lower index


def test_threads_and_simd_settings(monkeypatch):
    monkeypatch.setattr(_threads, "_threads", None)
    monkeypatch.setenv("LCODEC_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="LCODEC_NUM_THREADS must be an integer from 1 to 1024"):
        lcodec_ext.get_num_threads()
    monkeypatch.setenv("LCODEC_NUM_THREADS", "5")
    assert lcodec_ext.get_num_threads() == 5
    lcodec_ext.set_num_threads(2)
    assert lcodec_ext.get_num_threads() == 2
    with pytest.raises(ValueError, match="threads must be an integer from 1 to 1024; got 0"):
        lcodec_ext.set_num_threads(0)
    monkeypatch.setenv("LCODEC_SIMD", "sse9")
    with pytest.raises(ValueError, match="unknown SIMD level 'sse9'; expected auto, baseline"):
        lcodec_ext.codec([1, 2, 3], [1, 2, 3])


def test_the_callers_floating_point_mode_does_not_matter(rng):
    """A thread that flushes denormals (as torch can ask for) gets the same values."""
    import torch

    X = (rng.normal(size=(400, 3)) * 1e-20).astype(np.float32)
    y = X[:, 0]

    def values():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # squares this small are warned about
            return lcodec_ext.codec(y, X[:, :2]), lcodec_ext.codec(y, X[:, 2], X[:, 1])

    expected = values()
    if not torch.set_flush_denormal(True):
        pytest.fail("this CPU cannot flush denormals")
    try:
        assert values() == expected
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.filterwarnings("error")
def test_no_warning_on_ordinary_data(rng):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcodec_ext.foci(rng.normal(size=(50, 4)), rng.normal(size=50))
