"""The public functions on CUDA tensors give the bits that they give on the CPU.

Nothing here runs without a GPU; what a CPU can show of the kernels is shown under emulation. The
strategies and the golden cases are those of test_backends.py and test_golden.py.
"""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import lcodec_ext
import test_backends as backends
import test_golden as golden
from lcodec_ext import ops
from lcodec_ext.curvature import kernels
from lcodec_ext.dependence.backends.cpu import CpuBackend

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore::UserWarning")]

TIES = backends.TIES
seeds = st.integers(0, 2**64 - 1)


def cuda(array):
    return torch.as_tensor(array).cuda()


def arrays(value):
    """A result's numbers as arrays, wherever they lie."""
    if isinstance(value, lcodec_ext.FociResult):
        numbers = value.ordering, value.cumulative, value.conditional, value.base
        return [*arrays(numbers), value.stop_reason]
    if isinstance(value, tuple):
        return [array for part in value for array in arrays(part)]
    return [value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)]


def outcome(call):
    """What a call returns, or the message with which it refuses."""
    try:
        return arrays(call())
    except ValueError as error:
        return [str(error)]


def same(got, expected):
    assert len(got) == len(expected), (got, expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.asarray(a).dtype == np.asarray(b).dtype


def same_on_cuda(function, *data, **options):
    """Check function(*data) on the device against the CPU; returns what both gave."""
    expected = outcome(lambda: function(*data, backend="cpu", **options))
    tensors = [None if array is None else cuda(array) for array in data]
    for backend in ("auto", "cuda"):
        same(outcome(lambda b=backend: function(*tensors, backend=b, **options)), expected)
    return expected


# Generated tables


@given(
    table=backends.tables(),
    ties=st.sampled_from(TIES),
    seed=seeds,
    standardize=st.sampled_from(["scale", "bounded", None]),
    stop=st.booleans(),
    data=st.data(),
)
def test_foci(table, ties, seed, standardize, stop, data):
    X, y = table
    chosen = st.lists(st.integers(0, X.shape[1] - 1), max_size=2, unique=True)
    options = {"ties": ties, "seed": seed, "standardize": standardize, "stop": stop}
    options |= {"max_features": 4, "preselected": data.draw(chosen)}
    same_on_cuda(lcodec_ext.foci, X, y, **options)


@given(table=backends.tables(), ties=st.sampled_from(TIES), seed=seeds)
def test_codec(table, ties, seed):
    X, y = table
    split = X.shape[1] // 2
    given_columns = X[:, :split].copy() if split else None
    same_on_cuda(lcodec_ext.codec, y, X, ties=ties, seed=seed)
    same_on_cuda(lcodec_ext.codec, y, X[:, split:].copy(), given_columns, ties=ties, seed=seed)


@given(table=backends.tables(), ties=st.sampled_from(["first", "random", "all"]), seed=seeds)
def test_nearest_neighbors(table, ties, seed):
    same_on_cuda(lcodec_ext.nearest_neighbors, table[0], ties=ties, seed=seed)


@given(table=backends.tables(), q=st.integers(1, 3), k=st.integers(1, 2))
def test_several_responses_and_neighbors(table, q, k):
    X, y = table[0][:, :5].copy(), table[1]
    Y = np.column_stack([np.roll(y, i) * (i + 1) % 7 for i in range(q)])
    for order in ("given", "average"):
        options = {"n_neighbors": k, "y_order": order}
        same_on_cuda(lcodec_ext.codec, Y, X, **options)
        same_on_cuda(lcodec_ext.foci, X, Y, **options)


# Golden values


@golden.cases("codec")
def test_codec_is_the_exact_value_correctly_rounded(case):
    exact = case["exact"]
    (value,) = same_on_cuda(lcodec_ext.codec, *golden.columns(case))
    rounded = 1.0 if exact.get("den_zero") else Fraction(exact["num"]) / Fraction(exact["den"])
    assert value == float(rounded)


@golden.cases("foci")
def test_foci_takes_the_golden_path(case):
    ordering, cumulative, *_ = same_on_cuda(
        lcodec_ext.foci,
        *golden.load(case["data"]),
        stop=case["stop"],
        max_features=case["num_features"],
        standardize=golden.STANDARDIZE[case["standardize"]],
    )
    if "exact_foci" in case:
        exact = case["exact_foci"]
        assert (ordering + 1).tolist() == exact.get("selected_1based", [])
        for T, expected in zip(cumulative, exact["T"], strict=True):
            assert abs(T - expected) <= 4 * math.ulp(expected)


# Sizes


def table_of(kind, rng, n, p, dtype):
    X = rng.normal(size=(n, p))
    if kind == "heavy-tailed":
        X = rng.standard_cauchy((n, p))
    if kind == "binary":
        X = (X > rng.normal(size=p)).astype(float)
    if kind == "mixed":
        X[:, ::2] = np.floor(2 * X[:, ::2])
        X[:, 1::4] += 1e7
    y = X[:, 0] + np.round(X[:, p // 2]) + rng.normal(size=n)
    return X.astype(dtype), np.floor(3 * y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kind", ["continuous", "heavy-tailed", "binary", "mixed"])
@pytest.mark.parametrize(
    ("n", "p"),
    [(3, 2), (31, 33), (32, 32), (33, 31), (65, 129), (257, 64), (1023, 40), (1025, 9), (5000, 6)],
)
def test_foci_at_awkward_sizes(n, p, kind, ties, dtype, rng):
    X, y = table_of(kind, rng, n, p, dtype)
    same_on_cuda(lcodec_ext.foci, X, y, ties=ties, seed=11, stop=False, max_features=4)


@pytest.mark.parametrize(
    ("kind", "n", "p"), [("binary", 20_000, 39), ("mixed", 20_000, 20), ("continuous", 2000, 3000)]
)
def test_foci_on_many_rows_and_columns(kind, n, p, rng):
    X, y = table_of(kind, rng, n, p, np.float32)
    same_on_cuda(lcodec_ext.foci, X, y, stop=False, max_features=4)


def test_many_steps(rng):
    X, y = table_of("continuous", rng, 300, 40, np.float32)
    (ordering, *_) = same_on_cuda(lcodec_ext.foci, X, y, stop=False)
    assert sorted(ordering) == list(range(40))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (33, 3), (1000, 40), (9000, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_neighbors_and_codec_at_awkward_sizes(n, d, dtype, rng):
    X, y = table_of("mixed", rng, n, d, dtype)
    for ties in ("first", "random", "all"):
        same_on_cuda(lcodec_ext.nearest_neighbors, X, ties=ties, seed=2)
    if n > 2:
        for ties in TIES:
            same_on_cuda(lcodec_ext.codec, y, X[:, :1], X[:, 1:], ties=ties, seed=2)


def test_large_ranks_and_one_group_of_all_rows():
    n = 70_000
    X, y = np.zeros((n, 2), np.float32), np.arange(n)
    X[:, 1] = np.arange(n) % 2
    same_on_cuda(lcodec_ext.foci, X, y, stop=False)


# Tensors


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
)
def test_dtypes(dtype, rng):
    X = torch.from_numpy(np.round(rng.normal(size=(200, 9)), 1) * 8).to(dtype)
    y = (X[:, 3] + X[:, 5]).clone()
    for function, data in ((lcodec_ext.foci, (X, y)), (lcodec_ext.nearest_neighbors, (X,))):
        same_on_cuda(function, *data)


def test_tensors_need_not_be_contiguous(rng):
    whole = torch.from_numpy(rng.normal(size=(40, 300))).cuda()
    X, y = whole.T[::2, 1::3], whole.T[::2, 0]
    assert not X.is_contiguous()
    expected = outcome(lambda: lcodec_ext.foci(X.cpu().numpy(), y.cpu().numpy()))
    same(outcome(lambda: lcodec_ext.foci(X, y)), expected)


def test_tensors_are_left_as_they_are(rng):
    X, y = (cuda(array) for array in table_of("mixed", rng, 100, 5, np.float64))
    X.requires_grad_()
    before = X.detach().clone(), y.clone()
    lcodec_ext.foci(X, y)
    assert torch.equal(X, before[0])
    assert torch.equal(y, before[1])


def recorded(call):
    """A CUDA graph of a call, and the outputs that its replays write."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()  # what is made once, as handles and the kernels' attributes, is made now
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize("n", [200, 1500])
def test_score_of_a_first_step_is_captured_in_a_graph(n, rng):
    ones = torch.ones(40)
    tables = []
    for kind in ("mixed", "continuous"):
        X, y = table_of(kind, rng, n, 40, np.float32)
        tables.append((torch.from_numpy(X), torch.from_numpy(CpuBackend().ranks(y)[0])))
    X, R = (tensor.cuda() for tensor in tables[0])
    factors = ones.cuda()
    graph, outputs = recorded(lambda: ops.score(X, R, [], factors))
    for table, ranks in tables:
        X.copy_(table)
        R.copy_(ranks)
        graph.replay()
        same(arrays(tuple(outputs)), arrays(tuple(ops.score(table, ranks, [], ones))))


def test_products_with_curvature_are_captured_in_a_graph(rng):
    G, v = (torch.from_numpy(rng.normal(size=shape)).cuda() for shape in ((300, 50), (40, 2)))
    P = torch.from_numpy(rng.dirichlet(np.ones(4), size=300)).cuda()
    V = torch.from_numpy(rng.normal(size=(4, 50))).cuda()
    segments = torch.tensor([[2, 10], [20, 30]], device="cuda")

    def products():
        return (
            kernels.masked_gram_product(G, v, segments, damping=0.1),
            kernels.softmax_rows_product(G, P, V),
            kernels.factored_gram(P, G),
        )

    graph, outputs = recorded(products)
    for _ in range(2):
        graph.replay()
        same(arrays(outputs), arrays(products()))
        G.mul_(1.5)
        v.add_(1)


def test_work_waits_for_the_current_stream(rng):
    """The data are made by work that is still queued when the function is called."""
    X, y = table_of("continuous", rng, 1000, 40, np.float32)
    expected = outcome(lambda: lcodec_ext.foci(X, y))
    target, source, response = (cuda(array) for array in (np.zeros_like(X), X, y))
    heavy = torch.rand(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            heavy @ heavy
        target.copy_(source)
        got = outcome(lambda: lcodec_ext.foci(target, response))
    torch.cuda.synchronize()
    same(got, expected)


def test_nothing_is_kept_on_the_device(rng):
    X, y = (cuda(array) for array in table_of("mixed", rng, 500, 30, np.float32))
    taken = []
    for _ in range(3):
        lcodec_ext.foci(X, y)
        lcodec_ext.codec(y, X)
        lcodec_ext.nearest_neighbors(X)
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert taken[0] == taken[1] == taken[2]


def test_calls_do_not_differ_from_one_another(rng):
    """A race would show as a result that changes."""
    X, y = (cuda(array) for array in table_of("mixed", rng, 3000, 200, np.float32))
    first = outcome(lambda: lcodec_ext.foci(X, y, stop=False, max_features=4))
    for _ in range(10):
        same(outcome(lambda: lcodec_ext.foci(X, y, stop=False, max_features=4)), first)


def test_the_paper_codes_names(rng):
    from lcodec_ext.compat import codec as compat

    X, y = table_of("mixed", rng, 100, 5, np.float64)
    ordering, values = compat.torch_foci(cuda(X), cuda(y))
    assert (ordering, values) == compat.foci(X, y)
    assert all(value.is_cuda for value in values)
    assert compat.codec3(*map(cuda, (X[:, 0], y, X[:, 1]))) == compat.codec3(X[:, 0], y, X[:, 1])
    found = compat.OneNN_Torch(cuda(X))
    assert found.is_cuda
    np.testing.assert_array_equal(found.cpu(), compat.OneNN_Scikit(X))
    np.testing.assert_array_equal(compat.createFOCIGraph(cuda(X)), compat.createFOCIGraph(X))


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named_as_on_the_cpu(value, rng):
    X, y = rng.normal(size=(50, 4)), rng.normal(size=50)
    X[17, 2] = value
    (message,) = same_on_cuda(lcodec_ext.foci, X, y)
    assert "17" in message
    if math.isnan(value):
        same_on_cuda(lcodec_ext.foci, X, y, nan_policy="omit")


def test_distances_that_overflow_are_refused_as_on_the_cpu(rng):
    X, y = (rng.normal(size=(50, 4)) * 1e30).astype(np.float32), rng.normal(size=50)
    (message,) = same_on_cuda(lcodec_ext.foci, X, y, standardize=None)
    assert "of X" in message


def test_cuda_tensors_are_not_copied_to_the_cpu_unasked(rng):
    X, y = cuda(rng.normal(size=(50, 4))), rng.normal(size=50)
    with pytest.raises(ValueError, match="device"):
        lcodec_ext.foci(X, cuda(y), backend="cpu")
    with pytest.raises(ValueError, match="device"):
        lcodec_ext.foci(X, y)
