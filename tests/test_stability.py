"""Stability selection: halves of the rows, frequencies, and that threads change nothing."""

import sys
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

import lcodec_ext
from cuda_on_cpu import cuda_on_cpu
from lcodec_ext import _emulated, _threads, foci, stability
from lcodec_ext._random import random_order, tie_hash
from lcodec_ext.dependence.side_by_side import StoppedError, go_on, side_by_side
from lcodec_ext.dependence.stability import _half

N, P = 61, 5  # an odd number of rows: a pair leaves one out


@pytest.fixture
def data(rng):
    X = rng.normal(size=(N, P))
    return X, X[:, 1] * X[:, 3] + 0.1 * rng.normal(size=N)


@pytest.fixture
def set_threads(monkeypatch):
    monkeypatch.setattr(_threads, "_threads", None)
    return lcodec_ext.set_num_threads


def halves(n, n_pairs, seed):
    for pair in range(n_pairs):
        order = random_order(n, seed, pair)
        yield np.sort(order[: n // 2])
        yield np.sort(order[n // 2 : 2 * (n // 2)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ties": "random"},
        {"max_features": 1, "stop": False},
        {"preselected": [3, 0]},
        {"n_neighbors": 3},
        {"stop": "permutation", "alpha": 0.3, "n_permutations": 19},
    ],
)
def test_each_half_is_a_run_of_foci(data, options):
    X, y = data
    X = np.round(X)  # ties, so that the seed of every half counts
    result = stability(X, y, n_pairs=4, seed=7, **options)
    assert result.selected.shape == (8, P)
    for half, rows in enumerate(halves(N, 4, 7)):
        seed = int(tie_hash(7, 8)[half])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = foci(X[rows], y[rows], seed=seed, **options).ordering
        assert np.flatnonzero(result.selected[half]).tolist() == sorted(expected.tolist())
    assert result.frequencies.tolist() == (result.selected.sum(axis=0) / 8).tolist()
    assert result.preselected == tuple(options.get("preselected", ()))
    assert not result.selected[:, list(result.preselected)].any()


def test_pairs_are_complementary_and_do_not_depend_on_their_number():
    three, two = (list(halves(N, pairs, 1)) for pairs in (3, 2))
    for first, second in zip(three[::2], three[1::2], strict=True):
        assert len(first) == len(second) == N // 2
        assert len(np.union1d(first, second)) == N - 1
        assert (np.diff(first) > 0).all()
    assert all(np.array_equal(a, b) for a, b in zip(two, three, strict=False))
    assert not np.array_equal(three[0], three[2])
    # the order is that of Philox's words, which NumPy does not change
    words = np.random.Philox(1).jumped(2).random_raw(N)
    assert random_order(N, 1, 2).tolist() == sorted(range(N), key=lambda k: words[k])


def test_threads_change_nothing(data, set_threads):
    X, y = data
    seen = set()
    for threads in (1, 2, 5, 40):
        set_threads(threads)
        result = stability(X, y, n_pairs=10, ties="random")
        seen.add(result.selected.tobytes())
        assert lcodec_ext.get_num_threads() == threads
    assert len(seen) == 1
    assert stability(X, y, n_pairs=10, seed=1).selected.tobytes() not in seen
    plain = stability(X, y, n_pairs=3, backend="reference")
    assert np.array_equal(plain.selected, stability(X, y, n_pairs=3).selected)


def test_threads_are_shared_among_the_halves(data, set_threads, monkeypatch):
    """Four threads: four halves at a time with one each, or one with four where X is large."""
    used = []

    def watched(*arguments, **options):
        used.append((threading.current_thread() is main, lcodec_ext.get_num_threads()))
        return foci(*arguments, **options)

    main = threading.current_thread()
    monkeypatch.setattr(sys.modules["lcodec_ext.dependence.stability"], "foci", watched)
    set_threads(4)
    stability(*data, n_pairs=4)
    assert used == [(False, 1)] * 8
    used.clear()
    stability(*data, n_pairs=1)
    assert used == [(False, 2)] * 2
    used.clear()
    monkeypatch.setattr("lcodec_ext.dependence.side_by_side._BESIDE", 100)
    stability(*data, n_pairs=4)
    assert used == [(True, 4)] * 8


def test_no_thread_is_lost(set_threads):
    set_threads(3)
    both = threading.Barrier(2, timeout=60)

    def work(_):
        both.wait()
        return lcodec_ext.get_num_threads()

    assert sorted(side_by_side(work, range(2), np.empty(1), 1)) == [1, 2]


def test_what_nobody_waits_for_any_more_ends(set_threads):
    """As after Ctrl-C, of which Python tells the main thread alone."""
    set_threads(2)
    begun, ended = threading.Event(), []

    def work(number):
        if number == 0:
            begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        try:
            for _ in range(1000):
                go_on()
                time.sleep(0.01)
        except StoppedError:
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(work, range(2), np.empty(1), 1))
    assert ended == [1]
    go_on()  # here nothing was stopped


def test_an_error_of_a_half_is_told(data, set_threads):
    set_threads(3)
    for option, error in (({"max_features": 0}, ValueError), ({"nonsense": 1}, TypeError)):
        with pytest.raises(error, match=next(iter(option))):
            stability(*data, **option)


def test_names_and_what_is_printed(data):
    X, y = data
    table = pd.DataFrame(X, columns=["a", "b", "c", "d", "e"])
    result = stability(table, y, n_pairs=5, preselected=["c"])
    assert result.names == list("abcde")
    assert result.preselected == (2,)
    lines = repr(result).splitlines()
    assert lines[0].startswith("StabilityResult: 5 columns on 10 halves of 61 rows, ")
    assert lines[1] == "  given 'c' (2)"
    best = int(np.argmax(result.frequencies))
    assert lines[2].split() == [
        f"{result.frequencies[best]:.0%}",
        f"'{'abcde'[best]}'",
        f"({best})",
    ]
    many = stability(np.random.default_rng(0).normal(size=(40, 60)), y[:40], n_pairs=30)
    assert "more columns that were ever selected" in repr(many)
    assert len(repr(many).splitlines()) == 22


def test_missing_values_are_left_out_before_halves_are_drawn(data):
    X, y = data
    holes = X.copy()
    holes[[3, 8], 2] = np.nan
    keep = ~np.isnan(holes).any(axis=1)
    result = stability(holes, y, n_pairs=4, nan_policy="omit")
    assert np.array_equal(result.selected, stability(X[keep], y[keep], n_pairs=4).selected)
    assert (result.n_samples, result.n_omitted) == (N - 2, 2)
    assert "  2 more rows left out: NaN" in repr(result)


def test_classes_and_decimals(data):
    X, _ = data
    labels = np.array(["low", "mid", "high"])[np.digitize(X[:, 2], [-0.4, 0.4])]
    result = stability(X, labels, n_pairs=4, max_features=1)
    assert result.frequencies[2] == 1
    scaled = np.round(X, 1)
    again = stability(10 * scaled, labels, n_pairs=4, decimals=0).selected
    assert np.array_equal(stability(scaled, labels, n_pairs=4, decimals=1).selected, again)
    tensor = stability(torch.from_numpy(X), labels, n_pairs=4, max_features=1)
    assert np.array_equal(tensor.selected, result.selected)


@pytest.mark.parametrize("order", ["given", "average"])
def test_several_responses(data, order):
    X, y = data
    both = np.column_stack([np.round(y, 1), np.round(X[:, 0], 1)])
    options = {"n_pairs": 2, "max_features": 2, "y_order": order}
    result = stability(X, both, decimals=None, **options)
    for half, rows in enumerate(halves(N, 2, 0)):
        expected = foci(X[rows], both[rows], max_features=2, y_order=order).ordering
        assert np.flatnonzero(result.selected[half]).tolist() == sorted(expected.tolist())
    scaled = stability(np.round(X, 1), both, decimals=1, **options)
    counts = stability(np.round(10 * X), np.round(10 * both), **options)
    assert np.array_equal(scaled.selected, counts.selected)


def test_tensors_on_a_device(data):
    X, y = np.round(data[0]), data[1]
    options = {"n_pairs": 2, "seed": 3, "ties": "random"}
    tensors = [torch.from_numpy(array) for array in (X, y)]
    result = stability(*tensors, backend=cuda_on_cpu(_emulated.cuda), **options)
    assert np.array_equal(result.selected, stability(X, y, **options).selected)


def test_stable_columns_and_the_bound():
    selected = np.zeros((4, 6), dtype=bool)
    selected[:, 5] = selected[:3, 0] = selected[:2, 3] = True
    result = lcodec_ext.StabilityResult(selected, None, (1,), 20)
    assert result.stable() == [5, 0]
    assert result.stable(0.51) == [5, 0]
    assert result.stable(1) == [5]
    assert result.mean_selected == 9 / 4
    assert result.expected_false(0.75) == pytest.approx((9 / 4) ** 2 / (0.5 * 5), rel=1e-12)
    for threshold, error in ((0.5, ValueError), (1.1, ValueError), ("0.6", TypeError)):
        for call in (result.stable, result.expected_false):
            with pytest.raises(error, match=r"threshold must be.* above 0.5 and at most 1; got"):
                call(threshold)


def test_noise_is_rarely_stable(rng):
    """The bound on columns that are stable by chance holds where all columns are noise."""
    found, bounds = [], []
    for _ in range(12):
        X = rng.normal(size=(60, 20))
        result = stability(X, rng.normal(size=60), n_pairs=10, max_features=3)
        found.append(len(result.stable(0.9)))
        bounds.append(result.expected_false(0.9))
    # a Poisson count has at most the bound for its variance
    assert sum(found) <= sum(bounds) + 4 * np.sqrt(sum(bounds))
    assert sum(bounds) < 12 * 9 / 16 + 1e-9  # at most 3 of 20 columns are selected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_pairs": 0}, ValueError, "n_pairs must be an integer from 1 to 1000000; got 0"),
        ({"n_pairs": 2.0}, TypeError, "n_pairs must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"X": np.ones((5, 2)), "y": np.arange(5)}, ValueError, "at least 6 rows; got 5"),
        ({"X": np.ones((N, 0))}, ValueError, "at least one column"),
        ({"X": np.ones(N)}, ValueError, "shape"),
        ({"y": np.full(N, np.nan)}, ValueError, "all values are NaN"),
        ({"X": [["a", "b"]] * N}, ValueError, "real numbers; got strings"),
        ({"preselected": [P]}, ValueError, "preselected columns must be in 0 .. 4"),
        ({"preselected": ["a"]}, ValueError, "no column names"),
        ({"backend": "cuda"}, ValueError, "cuda"),
        ({"threshold": 0.6}, TypeError, r"stability\(\) got .* 'threshold'; result.stable"),
        ({"tresh": 0.6}, TypeError, r"stability\(\) got .* 'tresh': its options are"),
        ({"n_neighbors": N // 2}, ValueError, "below the number of rows of a half"),
        ({"n_neighbors": 1.5}, TypeError, "n_neighbors"),
        ({"y": [f"class {k}" for k in range(N)]}, ValueError, f"{N} classes on {N} rows"),
    ],
)
def test_bad_input(data, change, error, message):
    X, y = data
    given = {"X": X, "y": y, **change}
    with pytest.raises(error, match=message):
        stability(given.pop("X"), given.pop("y"), **given)


def test_classes_that_foci_takes_may_be_rare_on_a_half(rng):
    y = np.repeat([f"class {k}" for k in range(20)], 2)
    X = rng.normal(size=(40, 3))
    foci(X, y)
    halves = [y[_half(k, 40, 0)] for k in range(10)]
    assert any(2 * len(set(half)) > len(half) for half in halves)
    assert stability(X, y, n_pairs=5).selected.shape == (10, 3)


def test_what_is_constant_is_said_once(data):
    X, y = data
    X[:, 2] = 1
    with pytest.warns(UserWarning, match="column 2 of X is constant") as caught:
        stability(X, y, n_pairs=3)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    rare = np.zeros(N)
    rare[4] = 1
    with pytest.warns(UserWarning, match="y is constant on 3 of 6 halves of the rows") as caught:
        result = stability(data[0][:, :2], rare, n_pairs=3)
    assert caught[0].filename == __file__
    assert result.selected.any(axis=1).sum() <= 3
