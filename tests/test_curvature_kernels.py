"""The kernels of masked curvature: the bits of their written trees, and the bounds that follow."""

import numpy as np
import pytest
import torch

from cuda_on_cpu import DeviceOnCpu
from devices import GPU, ORDERS
from lcodec_ext import _core, _emulated
from lcodec_ext.curvature import kernels, reference
from lcodec_ext.curvature.reference import CpuTree, CudaTree, select

pytestmark = pytest.mark.native

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CHUNK_BYTES = 1 << 12  # on emulated devices: several chunks of few rows

# ------------------------------------------------------------------------------------------------
# Where kernels run


class Cpu:
    name = "cpu"

    def tree(self, G):
        return CpuTree(torch.finfo(kernels._COMPUTED[G.dtype]).bits // 8)

    def run(self, function, *arguments, **options):
        return function(*arguments, **options)


class Emulated:
    """The CUDA kernels on CPU tensors, in an order of threads and blocks."""

    def __init__(self, order, seed):
        self.order, self.name = (order, seed), f"{order}{seed}"

    def tree(self, G):
        return CudaTree(G.element_size(), CHUNK_BYTES)

    def run(self, function, *arguments, **options):
        _emulated.configure(*self.order)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "device_of", lambda tensor: DeviceOnCpu(_emulated.cuda))
                patch.setattr(_emulated.cuda, "CHUNK_BYTES", CHUNK_BYTES)
                return function(*arguments, **options)
        finally:
            _emulated.configure("forward")


class OnGpu(Emulated):
    """The CUDA kernels on a GPU."""

    name = "cuda"

    def __init__(self):
        pass

    def run(self, function, *arguments, **options):
        moved = [place(argument, "cuda") for argument in arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_core.cuda, "CHUNK_BYTES", CHUNK_BYTES)
            return place(function(*moved, **options), "cpu")


def place(value, where):
    """On another device with the same strides: `to` would lay a view out side by side."""
    if not torch.is_tensor(value):
        return value
    memory = value.untyped_storage()
    words = torch.empty(0, dtype=value.dtype).set_(memory).to(where)
    return words.as_strided(value.shape, value.stride(), value.storage_offset())


def test_a_tensor_keeps_its_strides_on_another_device():
    memory = torch.arange(40.0)
    for value in (memory.as_strided((3, 4), (7, 1), 2), memory.reshape(5, 8).T, memory[:0]):
        moved = place(value, "meta")
        assert (moved.shape, moved.stride()) == (value.shape, value.stride())
        assert moved.storage_offset() == value.storage_offset()
        same(place(value, "cpu"), value.numpy())


CPU = Cpu()
EMULATED = [Emulated(*order) for order in ORDERS]
GPUS = [pytest.param(OnGpu(), marks=pytest.mark.cuda) for _ in GPU]


@pytest.fixture(params=[CPU, *EMULATED, *GPUS], ids=lambda device: device.name)
def device(request):
    return request.param


def numpy(tensor):
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def same(got, expected):
    np.testing.assert_array_equal(got.numpy(), expected, strict=True)


# ------------------------------------------------------------------------------------------------
# masked_gram_product

SHAPES = [
    # rows, columns, segments
    (0, 7, [(1, 3)]),
    (1, 1, [(0, 1)]),
    (5, 40, []),
    (3, 9, [(2, 0), (3, 2), (5, 0)]),
    (31, 70, [(0, 70)]),
    (32, 90, [(1, 31), (33, 33), (70, 16)]),
    (33, 140, [(3, 32), (40, 64), (139, 1)]),
    (70, 60, [(k, 1) for k in range(1, 60, 3)]),
    (129, 31, [(5, 17)]),
]


def gram_case(rng, shape, dtype, m=None, weighted=True):
    """G with NaN beside the selected columns, and rows that lie apart; v; weights."""
    n, d, segments = shape
    computed = kernels._COMPUTED[dtype]
    G = torch.full((n, d + 3), float("nan"), dtype=dtype)[:, :d]
    for start, length in segments:
        G[:, start : start + length] = torch.from_numpy(rng.normal(size=(n, length)))
    size = sum(length for _, length in segments)
    v = torch.from_numpy(rng.normal(size=(size, m or 1))).to(computed)
    weights = torch.from_numpy(rng.uniform(0.5, 2, size=n)).to(computed) if weighted else None
    return (
        G,
        v if m else v[:, 0].clone(),
        torch.tensor(segments, dtype=torch.int64).reshape(-1, 2),
        weights,
    )


def expected_gram(device, G, v, segments, weights, damping):
    V = numpy(v if v.ndim == 2 else v[:, None]).T
    w = None if weights is None else weights.numpy()
    out = reference.masked_gram_product(device.tree(G), numpy(G), V, segments.tolist(), w, damping)
    return np.ascontiguousarray(out.T).reshape(v.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_product_has_the_bits_of_its_tree(device, shape, dtype, rng):
    for m, weights in ((None, True), (1, False), (3, True), (6, False)):
        case = gram_case(rng, shape, dtype, m, weights)
        got = device.run(kernels.masked_gram_product, *case, damping=0.3)
        same(got, expected_gram(device, *case, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_product_of_several_tiles(device, dtype, rng):
    case = gram_case(rng, (41, 5200, [(10, 4090), (4200, 5), (4300, 800)]), dtype, 2)
    got = device.run(kernels.masked_gram_product, *case, damping=0.0)
    same(got, expected_gram(device, *case, 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 7])
def test_no_thread_or_vector_width_changes_a_bit(simd_level, threads, dtype, m, rng):
    wide = (150, 3400, [(0, 3), (7, 255), (270, 3024), (3399, 1)])  # several blocks of columns
    for shape in (*SHAPES, wide):
        case = gram_case(rng, shape, dtype, m)
        same(kernels.masked_gram_product(*case, 0.3), expected_gram(CPU, *case, 0.3))


@pytest.mark.parametrize("n", [290, 513, 700, 1000, 2300])
def test_a_piece_of_work_is_a_subtree(threads, n, rng):
    case = gram_case(rng, (n, 2500, [(1, 9), (12, 2400)]), torch.float32)  # work for 3 threads
    same(kernels.masked_gram_product(*case, 2.0), expected_gram(CPU, *case, 2.0))


def test_a_tile_is_a_tile_at_any_width(simd_level, rng):
    """Rows so wide that only the least number of them is taken at once."""
    case = gram_case(rng, (39, 40_000, [(3, 39_900)]), torch.float32)
    same(kernels.masked_gram_product(*case, 0.0), expected_gram(CPU, *case, 0.0))


def test_columns_do_not_depend_on_each_other(device, rng):
    G, v, segments, weights = gram_case(rng, SHAPES[6], torch.float32, 5)
    together = device.run(kernels.masked_gram_product, G, v, segments, weights, 0.1)
    for j in range(5):
        alone = device.run(kernels.masked_gram_product, G, v[:, j], segments, weights, 0.1)
        same(alone, together[:, j].numpy())


@pytest.mark.parametrize("stride", [0, 61, 200])
def test_rows_may_lie_anyhow(device, stride, rng):
    n, d, segments = 20, 60, torch.tensor([[4, 30], [40, 20]])
    memory = torch.from_numpy(rng.normal(size=n * 200 + d))
    G = memory.as_strided((n, d), (stride, 1))
    case = (G, memory[:50].clone(), segments, None)
    same(device.run(kernels.masked_gram_product, *case), expected_gram(device, *case, 0.0))


# The bound


def gamma(q, dtype):
    u = torch.finfo(dtype).eps / 2
    return q * u / (1 - q * u)


def cancelling(rng, n, d):
    """Rows whose dots with ones, and columns whose sums over rows, cancel almost wholly."""
    half = rng.normal(size=(n, d // 2)) * 10.0 ** rng.integers(-3, 6, size=(n, d // 2))
    x = np.concatenate([half, -half], axis=1)
    x[: n // 2] = -x[n // 2 : 2 * (n // 2)]
    return (x + rng.normal(size=(n, d)) * 1e-3)[:, rng.permutation(d)].copy(order="C")


def as_long(tensor):
    return tensor.double().numpy().astype(np.longdouble)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cancels", [False, True])
def test_gram_product_is_within_its_bound(device, dtype, cancels, rng):
    n, d, segments = 96, 300, [(0, 130), (140, 160)]
    computed = kernels._COMPUTED[dtype]
    values = rng.normal(size=(n, d))
    if cancels:
        columns = np.r_[0:130, 140:300]
        values[:, columns] = cancelling(rng, n, len(columns))
    G = torch.from_numpy(values).to(dtype)
    v = torch.ones(290, dtype=computed) if cancels else torch.randn(290).to(computed)
    weights = torch.from_numpy(rng.normal(size=n)).to(computed)
    damping = 0.25
    got = device.run(kernels.masked_gram_product, G, v, segments, weights, damping)
    g, x, w = select(as_long(G), segments), as_long(v), as_long(weights)
    exact = (w * (g @ x)) @ g / n + damping * x
    size = (abs(w) * (abs(g) @ abs(x))) @ abs(g) / n + damping * abs(x)
    bound = gamma(device.tree(G).roundings(n, segments), computed) * size
    error = abs(as_long(got) - exact)
    assert (error <= bound).all()
    assert bound.max() < 1e-3 * size.max()
    assert error.max() > 0
    if cancels:
        assert abs(exact).max() < 1e-2 * size.max()


# ------------------------------------------------------------------------------------------------
# softmax_rows_product


def softmax_case(rng, n, d, r, dtype, weighted=True):
    computed = kernels._COMPUTED[dtype]
    A = torch.from_numpy(rng.normal(size=(n, d + 2))).to(dtype)[:, 1 : d + 1]
    P = torch.from_numpy(rng.normal(size=(n, r + 2))).softmax(1)[:, :r].to(computed)
    V = torch.from_numpy(rng.normal(size=(r, d))).to(computed)
    weights = torch.from_numpy(rng.uniform(0.5, 2, size=n)).to(computed) if weighted else None
    return A, P, V, weights


def expected_softmax(device, A, P, V, weights, damping):
    w = None if weights is None else weights.numpy()
    return reference.softmax_rows_product(
        device.tree(A), numpy(A), P.numpy(), V.numpy(), w, damping
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d", "r"), [(0, 3, 2), (1, 1, 1), (33, 65, 3), (40, 300, 6), (70, 17, 9), (5, 4, 0)]
)
def test_softmax_product_has_the_bits_of_its_tree(device, n, d, r, dtype, rng):
    for with_weights in (False, True):
        A, P, V, weights = softmax_case(rng, n, d, r, dtype, with_weights)
        got = device.run(kernels.softmax_rows_product, A, P, V, weights, 0.2)
        same(got, expected_softmax(device, A, P, V, weights, 0.2))


def test_softmax_product_at_every_level_and_thread_count(simd_level, threads, rng):
    for dtype in DTYPES:
        A, P, V, weights = softmax_case(rng, 70, 2030, 5, dtype)  # work for 3 threads
        got = kernels.softmax_rows_product(A, P, V, weights, 0.2)
        same(got, expected_softmax(CPU, A, P, V, weights, 0.2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_product_is_within_its_bound(device, dtype, rng):
    n, d, r = 64, 150, 4
    A, P, V, weights = softmax_case(rng, n, d, r, dtype)
    A = torch.from_numpy(cancelling(rng, n, d)).to(dtype)
    got = device.run(kernels.softmax_rows_product, A, P, V, weights, 0.5)
    a, p, x, w = (as_long(t) for t in (A, P, V, weights))
    u, abs_u = a @ x.T, abs(a) @ abs(x).T
    q = w[:, None] * p * (u - (p * u).sum(1, keepdims=True))
    abs_q = w[:, None] * p * (abs_u + (p * abs_u).sum(1, keepdims=True))
    exact = q.T @ a / n + 0.5 * x
    size = abs_q.T @ abs(a) / n + 0.5 * abs(x)
    q = device.tree(A).roundings(n, [(0, d)]) + r + 2
    error = abs(as_long(got) - exact)
    assert (error <= gamma(q, V.dtype) * size).all()
    assert error.max() > 0


def test_softmax_product_is_the_hessian(device, rng):
    n, d, classes, selected_rows = 30, 6, 5, [0, 3]
    A, W = (
        torch.from_numpy(rng.normal(size=(n, d))),
        torch.from_numpy(rng.normal(size=(classes, d))),
    )
    y = torch.from_numpy(rng.integers(0, classes, n))

    def loss(selected):
        weight = W.index_put((torch.tensor(selected_rows),), selected)
        return torch.nn.functional.cross_entropy(A @ weight.T, y)

    V = torch.from_numpy(rng.normal(size=(2, d)))
    H = torch.autograd.functional.hessian(loss, W[selected_rows]).reshape(2 * d, 2 * d)
    P = (A @ W.T).softmax(1)[:, selected_rows]
    got = device.run(kernels.softmax_rows_product, A, P, V, None, 0.1)
    torch.testing.assert_close(
        got.flatten(), H @ V.flatten() + 0.1 * V.flatten(), rtol=1e-12, atol=1e-14
    )


# ------------------------------------------------------------------------------------------------
# factored_gram


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("n", "r", "d"), [(1, 1, 1), (4, 3, 33), (5, 0, 2), (33, 2, 64), (40, 40, 70), (66, 1, 5)]
)
def test_factored_gram(device, n, r, d, dtype, rng):
    Delta = torch.from_numpy(rng.normal(size=(n, r + 1))).to(dtype)[:, :r]
    A = torch.from_numpy(rng.normal(size=(n, d + 5))).to(dtype)[:, 2 : d + 2]
    got = device.run(kernels.factored_gram, Delta, A)
    same(got, reference.factored_gram(Delta.numpy(), A.numpy(), cuda=device is not CPU))
    assert torch.equal(got, got.T)
    delta, a = as_long(Delta), as_long(A)
    size = (abs(delta) @ abs(delta).T) * (abs(a) @ abs(a).T)
    lanes = 128 // A.element_size()
    q = 3 + -(-r // lanes) + -(-d // lanes) + 2 * np.log2(lanes)
    if device is not CPU:
        q = 3 + min(32, r) + -(-r // 32) + min(32, d) + -(-d // 32)
    error = abs(as_long(got) - (delta @ delta.T) * (a @ a.T))
    assert (error <= gamma(q, dtype) * size).all()


def test_factored_gram_at_every_level_and_thread_count(simd_level, threads, rng):
    # the second in larger tiles, the third in several blocks of columns
    for n, r, d in ((23, 5, 100), (330, 5, 100), (70, 600, 1300)):
        Delta, A = rng.normal(size=(n, r)), rng.normal(size=(n, d))
        got = kernels.factored_gram(torch.from_numpy(Delta), torch.from_numpy(A))
        same(got, reference.factored_gram(Delta, A))


# ------------------------------------------------------------------------------------------------
# Memory, on devices whose arrays have nothing behind them


@pytest.mark.parametrize("order", EMULATED, ids=lambda order: order.name)
def test_wrong_segments_stay_within_the_arrays(order, rng):
    """On CUDA they are taken on trust; the sanitizers watch this."""
    G = torch.from_numpy(rng.normal(size=(9, 20)))
    huge, least = 2**63 - 1, -(2**63)
    for segments in (
        [(-5, 10)],
        [(15, 10)],
        [(0, 3)],
        [(0, 30)],
        [(3, -4), (0, 10)],
        [(huge, 10)],
        [(least, huge), (huge, huge), (0, huge), (huge, huge), (0, 10)],
    ):
        out = order.run(kernels.masked_gram_product, G, torch.ones(10, dtype=G.dtype), segments)
        assert out.isfinite().all()


def product(**given):
    """Arguments of a compiled product: those given, and zeros for the others."""
    names = "x n d stride segments count size p weight v m damping out"
    return {"dtype": "float32"} | dict.fromkeys(names.split(), 0) | given


def test_workspace_is_what_is_used(rng):
    """A product writes nothing behind its workspace or its output."""
    n, size, m = 70, 600, 3
    G, v = rng.normal(size=(n, size)).astype(np.float32), np.ones((m, size), np.float32)
    segments = np.array([[0, size]])
    need = _emulated.cuda.rows_product_bytes(n, size, m, 4, CHUNK_BYTES)
    workspace, out = np.full(need + 64, 0xA5, np.uint8), np.zeros(m * size + 16, np.float32)
    given = product(
        x=G.ctypes.data, n=n, d=size, stride=size, segments=segments.ctypes.data, count=1,
        size=size, v=v.ctypes.data, m=m, out=out.ctypes.data,
    )  # fmt: skip
    _emulated.cuda.masked_gram_product(given, workspace.ctypes.data, CHUNK_BYTES, 0)
    assert (workspace[need:] == 0xA5).all()
    assert (out[m * size :] == 0).all()
    np.testing.assert_allclose(out[:size], G.sum(1) @ G / n, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------
# What PyTorch asks of an operator

registered = torch.ops.lcodec_ext


def calls():
    rng = np.random.default_rng(3)
    gram = gram_case(rng, SHAPES[5], torch.float32, 2)
    bf16 = gram_case(rng, SHAPES[5], torch.bfloat16)
    factors = torch.randn(7, 2), torch.randn(7, 5)
    return [
        (registered.masked_gram_product, (*gram, 0.1)),
        (registered.masked_gram_product, (*bf16[:3], None, 0.0)),
        (registered.softmax_rows_product, (*softmax_case(rng, 9, 8, 2, torch.float64), 0.5)),
        (registered.factored_gram, factors),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(number, requires_grad):
    op, arguments = calls()[number]
    if requires_grad:
        for argument in arguments:
            if torch.is_tensor(argument) and argument.is_floating_point():
                argument.requires_grad_()
    torch.library.opcheck(op.default, arguments)


def test_compile_without_a_graph_break(rng):
    G, v, segments, weights = gram_case(rng, SHAPES[5], torch.float32, 2)

    def function(G, v, weights):
        product = registered.masked_gram_product(G, v * 2, segments, weights, 0.1)
        rows = kernels.softmax_rows_product(product, product.softmax(1), product[:2] + 1)
        return kernels.factored_gram(product, product) + 1, rows * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(G, v, weights), function(G, v, weights), strict=True):
        assert torch.equal(got, expected)


def test_no_gradients(rng):
    G, v, segments, weights = gram_case(rng, SHAPES[5], torch.float64)
    out = kernels.masked_gram_product(G, v.requires_grad_(), segments, weights)
    assert not out.requires_grad
    (out * v).sum().backward()  # as a constant
    assert torch.equal(v.grad, out)


def test_the_other_operators_are_registered_beside_these():
    from lcodec_ext import ops

    assert ops.nearest_neighbors(torch.tensor([0.0, 1.0, 3.0])).tolist() == [1, 0, 1]


# ------------------------------------------------------------------------------------------------
# Errors

G = torch.ones(4, 6)
V = torch.ones(3)
SEGMENTS = [(1, 2), (4, 1)]
gram = kernels.masked_gram_product
softmax = kernels.softmax_rows_product
P = torch.full((4, 2), 0.25)
ROWS = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gram(G.half(), V, SEGMENTS), "G must be float32, float64 or bfloat16.*float16"),
        (lambda: gram(G[0], V, SEGMENTS), r"G must .* two dimensions; got .*shape \(6,\)"),
        (lambda: gram(torch.ones(6, 4).T, V, SEGMENTS), r"G must have .* side by side.*contiguous"),
        (lambda: gram(G, V.double(), SEGMENTS), "v must be torch.float32 .*; got .*float64"),
        (lambda: gram(G.bfloat16(), V.bfloat16(), SEGMENTS), "v must be torch.float32"),
        (lambda: gram(G, torch.ones(3, 1, 1), SEGMENTS), r"v must .*\(size, m\); got"),
        (lambda: gram(G, V, [(1, 2)]), "segments have 2 elements in all; expected 3, as v has"),
        (lambda: gram(G, V, [(1, -3), (2, 6)]), "segments must not be negative; got -3"),
        (lambda: gram(G, V, [(4, 3)]), "segment 0 ends at 7, and G has 6 columns"),
        (lambda: gram(G, V, [(4, 1), (1, 2)]), "segments must ascend.*segment 1 starts at 1"),
        (lambda: gram(G, V, torch.ones(2, 2)), r"segments must be int64.*got .*float32"),
        (lambda: gram(G, V, [(1, 2, 3)]), r"segments must be int64 of shape \(count, 2\)"),
        (lambda: gram(G, V, [(1, 2), (4,)]), r"a sequence of 2 integers each; got \[\(1, 2"),
        (lambda: gram(G, V, [(1.5, 2), (4, 1)]), r"a sequence of 2 integers each; got"),
        (lambda: gram(G, V, [1, 2]), r"a sequence of 2 integers each; got \[1, 2\]"),
        (lambda: gram(G, V, [(2**63 - 1, 3)]), "segment 0 ends at 9223372036854775810, and"),
        (lambda: gram(G, V, [(0, 2**62)] * 4 + [(0, 3)]), "segment 0 ends at 46.*, and G has 6"),
        (lambda: gram(G, V, SEGMENTS, torch.ones(3)), r"weights must be .*shape \(4,\)"),
        (lambda: gram(G, V.to("meta"), SEGMENTS), "one device; G is on 'cpu', v is on 'meta'"),
        (lambda: softmax(G, P[:, 0], ROWS), r"P must have shape \(N, r\)"),
        (lambda: softmax(G, P[1:], ROWS), r"P must be .* of shape \(4, 2\)"),
        (lambda: softmax(G, P, ROWS[:, 1:]), r"V must be .* of shape \(2, 6\)"),
        (lambda: softmax(G, P, ROWS, torch.ones(4).double()), "weights must be torch.float32"),
        (lambda: kernels.factored_gram(G, G.double()), "Delta and A must have one dtype"),
        (lambda: kernels.factored_gram(G, G[1:]), "Delta and A .*the same number of rows"),
        (lambda: kernels.factored_gram(G[:0], G[:0]), "Delta and A .*at least one"),
        (lambda: kernels.factored_gram(G.bfloat16(), G), "Delta must be float32 or float64"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_module_refuses_what_is_no_segment():
    with pytest.raises(ValueError, match="segments do not fit"):
        _core.curvature.masked_gram_product(product(stride=1, size=1, m=1), "auto", 1)
    with pytest.raises(ValueError, match="dtype must be"):
        _core.curvature.masked_gram_product(product(dtype="int8", m=1), "auto", 1)


def test_module_wants_every_argument_and_no_other():
    given = product()
    del given["weight"]
    with pytest.raises(TypeError, match="missing argument 'weight'"):
        _core.curvature.masked_gram_product(given, "auto", 1)
    with pytest.raises(TypeError, match="more arguments than are known"):
        _core.curvature.softmax_rows_product(product(y=0), "auto", 1)
