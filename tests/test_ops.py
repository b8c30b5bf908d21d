"""torch.ops.lcodec_ext: the functions' values as tensors, and what PyTorch asks of an operator."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import lcodec_ext
from lcodec_ext import ops
from lcodec_ext.dependence.backends.cpu import CpuBackend
from lcodec_ext.dependence.backends.reference import ReferenceColumns, ReferenceEngine

N = 50
generator = torch.Generator().manual_seed(4)
X = torch.randn(N, 5, generator=generator)
Y = X[:, 1] * X[:, 3]
COARSE = (X * 2).round()
ranks = CpuBackend().ranks
R = torch.from_numpy(ranks(Y.numpy())[0])
FACTORS = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5])

registered = torch.ops.lcodec_ext
CALLS = [
    (registered.codec, (Y, X[:, 1], None, "average", 0)),
    (registered.codec, (Y[:, None], COARSE[:, 1:3], X[:, :1], "random", 7)),
    (registered.foci, (X, Y, 2, False, "scale", "average", 0)),
    (registered.foci, (COARSE, Y, 3, False, None, "random", 2**63 - 1)),
    (registered.nearest_neighbors, (COARSE, "random", 3)),
    (registered.nearest_neighbors, (X[:, 0], "first", 0)),
    (registered.score, (X, R, [], FACTORS, "average", 0)),
    (registered.score, (COARSE.double(), R.int(), [4, 0], FACTORS.double(), "first", 0)),
]
calls = pytest.mark.parametrize(("op", "arguments"), CALLS)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def same(got, expected):
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("ties", ["average", "random", "first"])
def test_codec(ties):
    for x in (None, COARSE[:, 2:]):
        got = ops.codec(Y, COARSE[:, :2], x, ties, seed=5)
        assert (got.shape, got.dtype) == ((), torch.float64)
        assert got.item() == lcodec_ext.codec(Y, COARSE[:, :2], x, ties=ties, seed=5)


@pytest.mark.parametrize("table", [X, COARSE])
@pytest.mark.parametrize("max_features", [1, 3, 9])
@pytest.mark.parametrize("stop", [True, False])
def test_foci(table, max_features, stop):
    ordering, cumulative, count = ops.foci(table, Y, max_features, stop, "bounded", "random", 3)
    expected = lcodec_ext.foci(
        table, Y, max_features=max_features, stop=stop, standardize="bounded", ties="random", seed=3
    )
    k = len(expected.ordering)
    assert count.item() == k
    assert count.shape == ()
    assert ordering.tolist() == [*expected.ordering, *[-1] * (max_features - k)]
    assert ordering.dtype == count.dtype == torch.int64
    assert cumulative.dtype == torch.float64
    np.testing.assert_array_equal(
        cumulative, [*expected.cumulative, *[np.nan] * (max_features - k)]
    )


def test_nearest_neighbors():
    for ties in ("first", "random"):
        got = ops.nearest_neighbors(COARSE, ties, 8)
        assert got.tolist() == lcodec_ext.nearest_neighbors(COARSE, ties=ties, seed=8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ties", ["average", "random", "first"])
@pytest.mark.parametrize("selected", [[], [3], [4, 0]])
def test_score(dtype, ties, selected):
    for table in (COARSE.to(dtype), COARSE.to(dtype).T.contiguous().T):
        whole, fraction = ops.score(table, R, selected, FACTORS.to(dtype), ties, 11)
        engine = ReferenceEngine(
            ReferenceColumns(table.numpy()), FACTORS.to(dtype).numpy(), R.numpy(), ties, 11
        )
        for column in selected:
            engine.select(column)
        others = np.setdiff1d(np.arange(5), selected)
        expected = np.full((2, 5), -1)
        expected[:, others] = engine.score(others)
        np.testing.assert_array_equal(np.stack([whole, fraction]), expected, strict=True)


def test_steps_add_up_to_foci():
    factors = torch.ones(5)
    selected = []
    for _ in range(3):
        whole, fraction = ops.score(COARSE, R, selected, factors)
        selected.append(int((whole + fraction * 2.0**-43).argmax()))
    ordering, _, _ = ops.foci(COARSE, Y, 3, stop=False, standardize=None)
    assert ordering.tolist() == selected


# ------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator


@calls
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(op, arguments, requires_grad):
    if requires_grad:
        arguments = tuple(
            a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
            for a in arguments
        )
    torch.library.opcheck(op.default, arguments)


@calls
def test_no_gradients_and_no_complaints_about_them(op, arguments):
    expected = op(*arguments)
    with_grad = [
        a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
        for a in arguments
    ]
    got = op(*with_grad)
    same(got, expected)
    assert not any(tensor.requires_grad for tensor in flat(got))
    for tensor in with_grad:
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            (tensor.sum() * flat(got)[0]).sum().backward()  # as a weight, say


@calls
def test_inference_mode_and_autocast_change_nothing(op, arguments):
    expected = op(*arguments)
    with torch.inference_mode():
        same(op(*arguments), expected)
        same(op(*(a.clone() if torch.is_tensor(a) else a for a in arguments)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(op(*arguments), expected)
    with torch.no_grad():
        same(op(*arguments), expected)


def everything(X, y, R):
    """All operators in one graph, on and beside other operations."""
    neighbors = ops.nearest_neighbors(X * 2)
    whole, fraction = ops.score(X, R, [2], torch.ones(5), "random", 1)
    return (
        ops.codec(y, X[:, :2] + 1, X[:, 2:]) + 1,
        *ops.foci(X, y[neighbors], 3),
        y[neighbors],
        whole + fraction * 2.0**-43,
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
# of inductor's own modules
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_without_a_graph_break(backend, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # inductor appends its cache
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    same(compiled(X, Y, R), everything(X, Y, R))
    for n in (30, 41):  # a second size makes the rows dynamic
        few = torch.from_numpy(ranks(Y[:n].numpy())[0])
        same(compiled(X[:n], Y[:n], few), everything(X[:n], Y[:n], few))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, X, y):
            return ops.foci(X, y, 3, stop=False)

    exported = torch.export.export(Module(), (X, Y))
    same(exported.module()(X, Y), ops.foci(X, Y, 3, stop=False))


def test_meta_tensors_get_shapes():
    table, response = X.to("meta"), Y.to("meta")
    shapes = [
        (result.shape, result.dtype)
        for result in (
            ops.codec(response, table),
            *ops.foci(table, response, 4),
            ops.nearest_neighbors(table),
            *ops.score(table, R.to("meta"), [1], FACTORS.to("meta")),
        )
    ]
    assert shapes == [
        ((), torch.float64), ((4,), torch.int64), ((4,), torch.float64), ((), torch.int64),
        ((N,), torch.int64), ((5,), torch.int64), ((5,), torch.int64),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Errors and imports


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.codec(Y, X, ties="mean"), "ties must be one of .*; got 'mean'"),
        (lambda: ops.codec(Y, X[1:]), "same number of rows"),
        (lambda: ops.codec(Y, X, seed=-1), "seed must be an integer"),
        (lambda: ops.foci(X, Y, 0), "max_features must be an integer >= 1; got 0"),
        (lambda: ops.foci(X, Y, 2, standardize="z"), "standardize must be one of"),
        (lambda: ops.foci(X.where(X != X[0, 0], torch.nan), Y, 2), "NaN in X at row 0, column 0"),
        (lambda: ops.nearest_neighbors(X, "all"), "ties must be one of 'first', 'random'; got"),
        (lambda: ops.score(X.half(), R, [], FACTORS), "X must be float32 or float64 of shape"),
        (lambda: ops.score(X[0], R, [], FACTORS), r"X must .*torch.float32, shape \(5,\)"),
        (lambda: ops.score(X[:2], R[:2], [], FACTORS), "X must have from 3 to 1,000,000 rows"),
        (lambda: ops.score(X, R[1:], [], FACTORS), r"R must be .* of shape \(50,\); got.*\(49,\)"),
        (lambda: ops.score(X, R.float(), [], FACTORS), "R must be int32 or int64"),
        (lambda: ops.score(X, R - 1, [], FACTORS), "R must hold max ranks, from 1 to 50"),
        (lambda: ops.score(X, R + 50, [], FACTORS), "R must hold max ranks, from 1 to 50"),
        (lambda: ops.score(X, R, [], FACTORS.double()), "factors must be torch.float32 of shape"),
        (lambda: ops.score(X, R, [], FACTORS[1:]), r"factors must be .* of shape \(5,\)"),
        (lambda: ops.score(X, R, [], FACTORS / 0), "factors must be finite"),
        (lambda: ops.score(X / 0, R, [], FACTORS), "X must be finite"),
        (lambda: ops.score(X, R, [5], FACTORS), "selected column must be an integer from 0 to 4"),
        (lambda: ops.score(X, R, [1, 1], FACTORS), r"selected columns must differ; got \[1, 1\]"),
        (lambda: ops.score(X, R, [], FACTORS, "all"), "ties must be one of"),
        (lambda: ops.score(X, R, [], FACTORS, seed=-1), "seed must be an integer"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_warnings_are_the_functions():
    with pytest.warns(UserWarning, match="y is constant: the coefficient is 1 by convention"):
        assert ops.codec(torch.ones(N), X).item() == 1.0
    with pytest.warns(UserWarning, match="y is constant: nothing is selected"):
        _, _, count = ops.foci(X, torch.ones(N), 2)
    assert count.item() == 0


def test_torch_is_imported_by_the_operators_alone():
    code = (
        "import sys, numpy, lcodec_ext\n"
        "X = numpy.arange(12.0).reshape(6, 2) ** 2 % 7\n"
        "lcodec_ext.foci(X, X[:, 1]), lcodec_ext.nearest_neighbors(X)\n"
        "assert 'torch' not in sys.modules\n"
        "import lcodec_ext.ops, torch\n"
        "assert 'lcodec_ext._cuda' not in sys.modules\n"
        "x = torch.arange(6)\n"
        "assert torch.ops.lcodec_ext.nearest_neighbors(x, 'first', 0).tolist()[0] == 1\n"
        "lcodec_ext.codec(x, x)\n"
        "assert 'lcodec_ext._cuda' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
