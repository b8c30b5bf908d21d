"""Solvers of curvature systems against dense solutions, and what they say of bad matrices."""

import pickle
import re

import pytest
import torch

from lcodec_ext.curvature.solvers import (
    ConvergenceWarning,
    IndefiniteCurvatureError,
    SolveResult,
    cholesky,
    conjugate_gradient,
    minres,
    woodbury,
)

F32, F64 = torch.float32, torch.float64
WHERE = "the Hessian on 7 selected parameters, with damping=0.25 included"
OPTIONS = {"rtol": 1e-12, "max_iterations": 1000, "describe": WHERE}


def normal(*shape, seed=1, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def symmetric(eigenvalues, dtype=F64, seed=0):
    """A dense matrix with these eigenvalues."""
    values = torch.as_tensor(eigenvalues, dtype=F64)
    q = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    matrix = (q * values) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def logspaced(condition, p=40):
    return torch.logspace(0, -torch.log10(torch.tensor(float(condition))).item(), p, dtype=F64)


class Counted:
    """The product with a matrix, which counts its calls and columns."""

    def __init__(self, matrix):
        self.matrix, self.shapes = matrix, []

    def __call__(self, v):
        self.shapes.append(tuple(v.shape))
        return self.matrix @ v


def true_residual(matrix, b, x):
    left, size = (b - matrix @ x).double(), b.double()
    if b.ndim == 1:
        left, size = left[:, None], size[:, None]
    return (left.norm(dim=0) / size.norm(dim=0)).max().item()


def iterative(method, matrix, b, **options):
    return method(lambda v: matrix @ v, b, **(OPTIONS | options))


def low_rank(k=6, p=30, dtype=F64, weights=None, scale=1.0):
    """R, weights and what `woodbury` takes, for a damping."""
    R = scale * normal(k, p, seed=3, dtype=dtype)
    C = normal(k, seed=4, dtype=dtype).abs() if weights is None else weights.to(dtype)

    def solve(b, damping, **options):
        A = damping * torch.eye(p, dtype=dtype) + R.T @ (C[:, None] * R)
        functions = {"project": lambda B: R @ B, "lift": lambda B: R.T @ B}
        arguments = {"gram": R.double() @ R.double().T, "weights": C, **functions} | options
        result = woodbury(
            damping=damping, b=b, product=lambda v: A @ v, describe=WHERE, **arguments
        )
        return A, result

    return solve


# ---------------------------------------------------------------------------------------------
# Solutions


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
@pytest.mark.parametrize("condition", [1, 1e2, 1e4])
def test_definite_systems_agree_with_a_dense_solution(condition, shape):
    A, b = symmetric(logspaced(condition)), normal(*shape)
    expected = torch.linalg.solve(A, b)
    for result in (
        iterative(conjugate_gradient, A, b),
        iterative(minres, A, b),
        cholesky(A, b, describe=WHERE),
    ):
        assert result.x.shape == b.shape
        assert result.x.dtype == F64
        assert torch.linalg.norm(result.x - expected) <= 1e-10 * torch.linalg.norm(expected)
        assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.5, abs=1e-15)
        assert (result.iterations == 0) == (result.method == "cholesky")


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_iterations_end_early_on_few_eigenvalues(method):
    A, b = symmetric([1.0] * 20 + [2.0] * 20 + [5.0] * 20), normal(60)
    result = iterative(method, A, b)
    assert result.iterations == 3
    assert result.residual <= 1e-12


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_reported_residual_is_that_of_x(method, dtype):
    A, b = symmetric(logspaced(100), dtype), normal(40, 3, dtype=dtype)
    result = iterative(method, A, b, rtol=1e-4)
    assert result.residual <= 1e-4
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=1e-2)
    assert result.residual > 1e-6  # it does no more than asked


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_reported_residual_is_exact_for_integers(method):
    A = torch.diag(torch.tensor([2.0, 4.0, 8.0], dtype=F64))
    with pytest.warns(ConvergenceWarning):
        result = iterative(method, A, torch.tensor([4.0, 8.0, 16.0], dtype=F64), max_iterations=1)
    assert result.residual == true_residual(A, torch.tensor([4.0, 8.0, 16.0], dtype=F64), result.x)


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_columns_are_solved_as_alone_and_leave_the_block_when_done(method):
    A = symmetric(torch.cat([torch.linspace(1, 9, 30, dtype=F64), torch.tensor([50.0])]))
    vector = torch.linalg.eigh(A)[1][:, 3]
    B = torch.stack([normal(31), vector, torch.zeros(31, dtype=F64), 1e-30 * normal(31)], 1)
    B = torch.cat([B, 1e30 * normal(31, 1, seed=9)], 1)
    product = Counted(A)
    together = method(product, B, **OPTIONS)
    alone = [iterative(method, A, column) for column in B.T]
    for j, one in enumerate(alone):
        size = one.x.norm()
        assert (together.x[:, j] - one.x).norm() <= 1e-11 * size
    assert not together.x[:, 2].any()
    assert together.iterations == max(one.iterations for one in alone)
    assert alone[1].iterations <= 2
    widths = [width for _, width in product.shapes]
    assert widths[0] == 4  # without the column of zeros
    assert widths[alone[1].iterations] == 3  # and without the eigenvector
    assert sum(widths[:-1]) == sum(one.iterations for one in alone)
    assert len(widths) == together.iterations + 1


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_tiny_and_huge_right_hand_sides_in_float32(method):
    A = symmetric(logspaced(50), F32)
    x = iterative(method, A, normal(40, dtype=F32), rtol=1e-5).x
    for power in (-100, 100):
        b = normal(40, dtype=F32) * 2.0**power
        result = iterative(method, A, b, rtol=1e-5)
        assert torch.equal(result.x, x * 2.0**power)
        assert result.residual <= 1e-5


@pytest.mark.parametrize(("dtype", "rtol"), [(F32, 1e-4), (F64, 1e-10)])
def test_preconditioning_lowers_iterations_of_a_badly_scaled_matrix(dtype, rtol):
    p = 60
    scale = torch.logspace(-1.5, 1.5, p, dtype=F64)
    mixed = normal(p, p, seed=5)
    dominant = torch.eye(p, dtype=F64) + 0.02 * (mixed + mixed.T) / 2
    A = (scale[:, None] * dominant * scale).to(dtype)
    b = normal(p, dtype=dtype)
    better = iterative(conjugate_gradient, A, b, rtol=rtol, diagonal=A.diagonal())
    assert better.iterations <= 25
    assert better.residual <= rtol
    assert true_residual(A.double(), b.double(), better.x.double()) <= 1.1 * rtol
    with pytest.warns(ConvergenceWarning):
        worse = iterative(conjugate_gradient, A, b, rtol=rtol, max_iterations=100)
    assert worse.residual > 100 * rtol


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_a_restart_makes_the_tolerance_honest(method):
    """The updated residual never learns what a product got wrong; the true one tells."""
    A, b = symmetric(logspaced(100)), normal(40)
    calls = 0

    def product(v):
        nonlocal calls
        calls += 1
        return (1 + 1e-4 * (calls == 5)) * (A @ v)

    result = method(product, b, **(OPTIONS | {"rtol": 1e-9}))
    assert result.residual <= 1e-9
    assert true_residual(A, b, result.x) <= 1e-9 + 1e-13  # rounding of the residual, cond(A) eps


def test_minres_solves_what_conjugate_gradients_refuse():
    eigenvalues = torch.cat([-logspaced(30, p=15), logspaced(100, p=25)])
    A, b = symmetric(eigenvalues), normal(40, 2)
    with pytest.raises(IndefiniteCurvatureError):
        iterative(conjugate_gradient, A, b)
    result = iterative(minres, A, b)
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.5)
    assert result.method == "minres"


def test_minres_of_an_eigenvector_and_of_a_swap():
    A = torch.diag(torch.tensor([1.0, -3.0], dtype=F64))
    result = iterative(minres, A, torch.tensor([0.0, 6.0], dtype=F64))
    assert result.x.tolist() == [0.0, -2.0]
    assert (result.iterations, result.residual) == (1, 0.0)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=F64)  # alpha = 0: no LDL^T of T
    result = iterative(minres, swap, torch.tensor([2.0, 0.0], dtype=F64))
    torch.testing.assert_close(result.x, torch.tensor([0.0, 2.0], dtype=F64))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("p", [3, 30, 300])
@pytest.mark.parametrize("seed", range(3))
def test_minres_without_a_solution_says_so(seed, p, dtype):
    eigenvalues = torch.linspace(1, 3, p)
    eigenvalues[: p // 3] = 0
    A, b = symmetric(eigenvalues, dtype, seed=seed), normal(p, dtype=dtype, seed=seed + 9)
    with pytest.warns(ConvergenceWarning, match="minres"):
        result = iterative(minres, A, b)
    vectors = torch.linalg.eigh(A.double())[1][:, : p // 3]
    least = ((vectors.T @ b.double()).norm() / b.double().norm()).item()
    assert 0.5 * least <= result.residual <= 1  # rounding made zeros 1e-16: x = 1e16 may help
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.05)


def test_minres_does_not_divide_by_rounding_errors():
    A = torch.diag(torch.tensor([1.0, 1e-17], dtype=F64))
    with pytest.warns(ConvergenceWarning):
        result = iterative(minres, A, torch.tensor([3.0, 4.0], dtype=F64))
    torch.testing.assert_close(result.x[0], torch.tensor(3.0, dtype=F64))
    assert result.x[1].abs() < 100
    assert result.residual == pytest.approx(0.8)


def test_conjugate_gradients_stop_where_rounding_errors_are_left():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    b = torch.tensor([1.0, 1e-15], dtype=F64)
    with pytest.warns(ConvergenceWarning, match="after 3 iterations, where rounding in float64"):
        result = iterative(conjugate_gradient, A, b, rtol=0.0)
    assert result.x.tolist() == [1.0, 1e-15]
    assert result.residual == pytest.approx(1e-15)


def test_restarts_that_do_not_help_are_few():
    A = symmetric(logspaced(100), F32)
    b = normal(40, dtype=F32)
    enough = iterative(conjugate_gradient, A, b, rtol=1e-5).iterations
    with pytest.warns(ConvergenceWarning, match="rounding in float32"):
        result = iterative(conjugate_gradient, A, b, rtol=0.0)
    assert result.iterations < 3.5 * enough


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_singular_systems_with_a_solution(method, dtype):
    eigenvalues = torch.linspace(1, 3, 50)
    eigenvalues[:10] = 0
    A = symmetric(eigenvalues, dtype)
    b = A @ normal(50, dtype=dtype)
    rtol = 1e-5 if dtype == F32 else 1e-12
    assert iterative(method, A, b, rtol=rtol).residual <= rtol
    # Below rounding errors, directions of no curvature are what is left: no reason to refuse.
    with pytest.warns(ConvergenceWarning, match="rounding in float"):
        result = iterative(method, A, b, rtol=0.0)
    assert result.residual <= 10 * torch.finfo(dtype).eps


def test_products_may_use_autograd_and_right_hand_sides_may_need_gradients():
    A, b = symmetric(logspaced(10, p=8)), normal(8).requires_grad_()

    def product(v):
        w = torch.zeros(8, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(w @ A @ w / 2 + (w**4).sum(), w, create_graph=True)
        return torch.autograd.grad(gradient @ v, w, create_graph=True)[0]

    result = conjugate_gradient(product, b, **OPTIONS)
    assert not result.x.requires_grad
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b.detach()))


# ---------------------------------------------------------------------------------------------
# Direct methods


def test_cholesky_in_float32_is_that_of_float64_rounded():
    A, b = symmetric(logspaced(1e5, p=30), F32), normal(30, 2, dtype=F32)
    result = cholesky(A, b, describe=WHERE)
    expected = torch.linalg.solve(A.double(), b.double())
    torch.testing.assert_close(result.x, expected.float(), rtol=1e-5, atol=0.1)
    honest = true_residual(A.double(), b.double(), result.x.double())
    assert result.residual == pytest.approx(honest, rel=1e-6)
    assert result.x.dtype == F32
    # what rounding the exact solution to float32 leaves, and not what factors in float32 would
    assert result.residual <= 1.01 * true_residual(
        A.double(), b.double(), expected.float().double()
    )


def test_cholesky_accepts_what_is_ill_conditioned_but_regular():
    A, b = symmetric(logspaced(1e12, p=20)), normal(20)
    result = cholesky(A, b, describe=WHERE)
    assert result.residual <= 1e-4
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.5)


def test_cholesky_refines_where_that_helps():
    helped = 0
    for seed in range(8):
        A, b = symmetric(logspaced(1e3, p=60), seed=seed), normal(60, seed=seed)
        plain = torch.cholesky_solve(b[:, None], torch.linalg.cholesky(A))[:, 0]
        result = cholesky(A, b, describe=WHERE)
        assert result.residual <= 1.01 * true_residual(A, b, plain)
        helped += result.residual < 0.9 * true_residual(A, b, plain)
    assert helped > 0


@pytest.mark.parametrize("shape", [(30,), (30, 4)])
@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_woodbury_cholesky_and_conjugate_gradients_agree(damping, shape):
    b = normal(*shape)
    A, result = low_rank()(b, damping)
    direct = cholesky(A, b, describe=WHERE)
    iterated = iterative(conjugate_gradient, A, b, rtol=1e-13 if damping > 1e-3 else 1e-10)
    expected = torch.linalg.solve(A, b)
    for one in (result, direct, iterated):
        assert one.x.shape == b.shape
        assert (one.x - expected).norm() <= 1e-9 * expected.norm()
        assert one.residual == pytest.approx(true_residual(A, b, one.x), rel=0.5, abs=1e-14)
    assert (result.method, result.iterations) == ("woodbury", 0)


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-7])
def test_woodbury_in_float32_reports_its_residual(damping):
    b = normal(30, 2, dtype=F32)
    A, result = low_rank(dtype=F32)(b, damping)
    assert result.x.dtype == F32
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.2)
    if damping > 1e-3:
        assert result.residual < 1e-3
        expected = cholesky(A, b, describe=WHERE).x
        assert (result.x - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("helps", [False, True])
def test_woodbury_refines_where_that_helps(helps):
    R, damping = 10 * normal(6, 30, seed=3, dtype=F32), 1e-2
    A = damping * torch.eye(30) + R.T @ R
    # in the range of R^T, x is much less than the numbers b / damping that cancel
    b = R.T @ normal(6, dtype=F32) if helps else normal(30, dtype=F32)
    b *= 1.5 / b.abs().max()  # else the product sees x and b times a power of 2
    seen = []

    def product(v):
        seen.append(true_residual(A, b, v))
        return A @ v

    functions = {"project": lambda B: R @ B, "lift": lambda B: R.T @ B, "product": product}
    gram = R.double() @ R.double().T
    result = woodbury(gram, torch.ones(6), damping, b=b, describe=WHERE, **functions)
    assert 2 <= len(seen) <= 3
    assert result.residual == pytest.approx(min(seen), rel=1e-3)
    # Where it does not help, rounding of x makes the residual, which refinement may lower a little.
    assert (result.residual < seen[0] / 10) == helps


def test_woodbury_with_a_gram_that_rounding_made_indefinite():
    p, k, damping = 12, 30, 1e-2  # rank 12 of 30: eigenvalues of K that are 0
    R, b = normal(k, p, seed=3, dtype=F32), normal(p, dtype=F32)
    A = damping * torch.eye(p) + R.T @ R
    K = R.double() @ R.double().T
    null = torch.eye(k) - K @ torch.linalg.pinv(K, rtol=1e-10)
    functions = {"project": lambda B: R @ B, "lift": lambda B: R.T @ B, "product": lambda v: A @ v}
    gram = K - (damping + 1e-11) * null
    result = woodbury(gram, torch.ones(k), damping, b=b, describe=WHERE, **functions)
    assert result.residual <= 1e-4
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=0.5)


def test_woodbury_with_weights_of_both_signs():
    weights = torch.tensor([1.0, 0.5, -0.01, 2.0, 0.0, -0.02], dtype=F64)
    b = normal(30, 2)
    A, result = low_rank(weights=weights)(b, 2.0)
    assert torch.linalg.eigvalsh(A)[0] > 0
    assert torch.linalg.eigvalsh(A)[0] < 2.0 - 0.1  # the negative weights matter
    expected = torch.linalg.solve(A, b)
    assert (result.x - expected).norm() <= 1e-12 * expected.norm()


def test_woodbury_of_rank_zero_is_a_division():
    b = normal(5)
    _, result = low_rank(k=0, p=5)(b, 4.0)
    assert torch.equal(result.x, b / 4)
    assert result.residual == 0


# ---------------------------------------------------------------------------------------------
# Zero, indefinite, singular


def never(_):
    raise AssertionError("a product was formed")


@pytest.mark.parametrize("shape", [(7,), (7, 2), (0,), (7, 0)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_zero_is_solved_without_a_product(shape, dtype):
    b = torch.zeros(shape, dtype=dtype)
    p = len(b)
    for result in (
        conjugate_gradient(never, b, diagonal=torch.ones(p, dtype=dtype), **OPTIONS),
        minres(never, b, **OPTIONS),
        cholesky(torch.eye(p, dtype=dtype), b, describe=WHERE),
        woodbury(torch.eye(2), torch.ones(2), 1.0, never, never, b, product=never, describe=WHERE),
    ):
        assert torch.equal(result.x, b)
        assert result.x is not b
        assert result.x.dtype == dtype
        assert (result.residual, result.iterations) == (0.0, 0)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("lowest", [-0.3, -5.0])
def test_negative_curvature_is_found_with_its_quotient(lowest, dtype, preconditioned):
    A = symmetric([lowest, *torch.linspace(0.5, 3, 30).tolist()], dtype)
    b = normal(31, 2, dtype=dtype)
    diagonal = torch.linspace(1, 2, 31, dtype=dtype) if preconditioned else None
    with pytest.raises(IndefiniteCurvatureError) as caught:
        iterative(conjugate_gradient, A, b, diagonal=diagonal, rtol=1e-5)
    error = caught.value
    eigenvalues = torch.linalg.eigvalsh(A.double())
    assert eigenvalues[0] * (1 + 1e-5) <= error.rayleigh < 0
    assert error.least_damping == -error.rayleigh
    message = str(error)
    assert message.startswith(f"{WHERE}: the matrix is indefinite, d^T A d / d^T d is ")
    assert f"{error.rayleigh:.4g} for" in message
    assert "Use at least" in message
    advised = float(re.search(r"at least (\S+) more damping", message)[1])
    assert -error.rayleigh <= advised <= -1.2 * error.rayleigh


def test_the_quotient_is_that_of_the_first_direction():
    A = torch.diag(torch.tensor([1.0, -3.0], dtype=F64))
    with pytest.raises(IndefiniteCurvatureError) as caught:
        iterative(conjugate_gradient, A, torch.tensor([1.0, 2.0], dtype=F64), advice="a walk")
    assert caught.value.rayleigh == pytest.approx((1 - 12) / 5)
    assert str(caught.value).endswith("Use a walk, or at least 2.3 more damping")


def test_the_quotient_is_the_worst_of_the_columns():
    A = torch.diag(torch.tensor([1.0, -1.0, -3.0, -2.0], dtype=F64))
    with pytest.raises(IndefiniteCurvatureError) as caught:
        iterative(conjugate_gradient, A, torch.eye(4, dtype=F64))
    assert caught.value.rayleigh == -3


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("p", [30, 300])
def test_singular_matrices_are_found(p, dtype):
    eigenvalues = torch.linspace(0.5, 3, p)
    eigenvalues[: p // 4] = 0
    A, b = symmetric(eigenvalues, dtype), normal(p, dtype=dtype)
    rounding = 16 * torch.finfo(dtype).eps * 3.1
    for solve, bound in (
        (lambda: iterative(conjugate_gradient, A, b, rtol=1e-5), rounding),
        (lambda: cholesky(A, b, describe=WHERE), rounding),
    ):
        with pytest.raises(IndefiniteCurvatureError, match="singular.*Use more damping") as caught:
            solve()
        assert abs(caught.value.rayleigh) <= bound
        assert caught.value.least_damping is None


def test_zero_curvature_is_singular():
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    with pytest.raises(IndefiniteCurvatureError, match="singular") as caught:
        iterative(conjugate_gradient, A, torch.tensor([0.0, 1.0], dtype=F64))
    assert caught.value.rayleigh == 0


def test_small_curvature_is_not_singular():
    """Damping that is small beside the largest eigenvalue, in float32."""
    eigenvalues = torch.full((400,), 1e-3)
    eigenvalues[:20] = torch.linspace(1, 100, 20)
    A, b = symmetric(eigenvalues, F32), normal(400, dtype=F32)
    result = iterative(conjugate_gradient, A, b, rtol=0.1)
    assert result.residual <= 0.1


@pytest.mark.parametrize("smallest", [-3.21, -1e-6])
def test_cholesky_tells_the_smallest_eigenvalue(smallest):
    A, b = symmetric([2.0, smallest, 1.0]), normal(3)
    with pytest.raises(IndefiniteCurvatureError) as caught:
        cholesky(A, b, describe=WHERE)
    error = caught.value
    assert error.rayleigh == pytest.approx(smallest, rel=1e-8)
    assert error.least_damping == -error.rayleigh
    expected = f"{WHERE}: the matrix is indefinite, its smallest eigenvalue is {smallest:.4g}, "
    assert str(error).startswith(expected + "the largest 2. Use at least ")
    with pytest.raises(IndefiniteCurvatureError, match="the largest 2. Use a walk, or at least "):
        cholesky(A, b, describe=WHERE, advice="a walk")
    lifted = A + (error.least_damping + 1e-7) * torch.eye(3)
    assert cholesky(lifted, b, describe=WHERE).residual < 1e-6


def test_cholesky_refuses_what_is_singular_only_in_numbers():
    A = torch.diag(torch.tensor([1.0, 1e-17], dtype=F64))
    torch.linalg.cholesky(A)  # has a factor all the same
    with pytest.raises(IndefiniteCurvatureError, match="singular.*eigenvalue is 1e-17") as caught:
        cholesky(A, normal(2), describe=WHERE)
    assert caught.value.rayleigh == 1e-17
    assert caught.value.least_damping is None


def test_woodbury_refuses_what_is_indefinite():
    weights = torch.tensor([1.0, 0.5, -0.3, 2.0, 0.0, -0.2], dtype=F64)
    R = normal(6, 30, seed=3)
    smallest = torch.linalg.eigvalsh(R.T @ (weights[:, None] * R))[0].item()
    assert smallest < -1
    with pytest.raises(IndefiniteCurvatureError, match="indefinite, its smallest") as caught:
        low_rank(weights=weights)(normal(30), 0.5)
    assert caught.value.rayleigh == pytest.approx(0.5 + smallest)
    assert caught.value.least_damping == pytest.approx(-0.5 - smallest)
    with pytest.raises(IndefiniteCurvatureError, match="singular") as caught:
        low_rank(weights=weights)(normal(30), -smallest)
    assert caught.value.rayleigh == pytest.approx(0, abs=1e-12)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(IndefiniteCurvatureError("text", -2.0, 2.0)))
    assert (str(error), error.rayleigh, error.least_damping) == ("text", -2.0, 2.0)
    assert isinstance(error, ValueError)


# ---------------------------------------------------------------------------------------------
# Warnings, results and refused arguments


@pytest.mark.parametrize(("method", "name"), [(conjugate_gradient, "cg"), (minres, "minres")])
def test_too_few_iterations_are_told(method, name):
    A, b = symmetric(logspaced(1e4)), normal(40)
    with pytest.warns(ConvergenceWarning) as caught:
        result = iterative(method, A, b, rtol=1e-8, max_iterations=5)
    assert len(caught) == 1
    assert caught[0].filename == __file__.replace(".pyc", ".py")
    assert str(caught[0].message) == (
        f"{WHERE}: {name} ended at max_iterations=5, with a relative residual of "
        f"{result.residual:.3g} above rtol=1e-08. Use more iterations or more damping"
        + "; x = 0 would do as well, as where a singular matrix has no damping"
        * (result.residual >= 1)
    )
    assert result.iterations == 5
    assert result.residual == pytest.approx(true_residual(A, b, result.x), rel=1e-6)
    assert result.residual > 1e-8


def test_a_tolerance_below_rounding_is_told():
    A, b = symmetric(logspaced(1e4), F32), normal(40, dtype=F32)
    with pytest.warns(ConvergenceWarning, match="rounding in float32.*Use float64, or more damp"):
        result = iterative(conjugate_gradient, A, b, rtol=1e-9, max_iterations=10_000)
    assert 1e-9 < result.residual < 1e-2
    assert result.iterations < 10_000


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_progress_is_shown_on_request(method, capsys):
    A, b = symmetric(logspaced(10)), normal(40)
    quiet = iterative(method, A, b, rtol=1e-6)
    assert capsys.readouterr().err == ""
    shown = iterative(method, A, b, rtol=1e-6, progress=True)
    assert shown.method in capsys.readouterr().err
    assert torch.equal(shown.x, quiet.x)


def test_a_result_is_printed_without_its_entries():
    result = SolveResult(torch.zeros(1000, 2), 0.125, 7, "cg")
    assert repr(result) == (
        "SolveResult(x=<torch.float32, shape (1000, 2)>, residual=0.125, iterations=7, method='cg')"
    )
    assert result != SolveResult(result.x, 0.125, 7, "cg")  # compared as objects
    with pytest.raises(AttributeError):
        result.residual = 0.0


SOLVERS = {
    "cg": lambda b: conjugate_gradient(lambda v: v, b, **OPTIONS),
    "minres": lambda b: minres(lambda v: v, b, **OPTIONS),
    "cholesky": lambda b: cholesky(torch.eye(3, dtype=F64), b, describe=WHERE),
    "woodbury": lambda b: woodbury(
        torch.eye(1),
        torch.ones(1),
        1.0,
        lambda B: B[:1],
        lambda B: torch.cat([B, torch.zeros(2, B.shape[1], dtype=F64)]),
        b,
        product=lambda v: v * torch.tensor([2.0, 1.0, 1.0], dtype=F64),
        describe=WHERE,
    ),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_refused_right_hand_sides(solver):
    solve = SOLVERS[solver]
    assert solve(torch.ones(3, dtype=F64)).residual <= 1e-15
    with pytest.raises(TypeError, match="b must be a tensor; got an object of type list"):
        solve([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"b must be .* got torch.float16, shape \(3,\)"):
        solve(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"b must be .* got torch.float64, shape \(3, 1, 1\)"):
        solve(torch.ones(3, 1, 1, dtype=F64))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="b holds NaN or infinity"):
            solve(torch.tensor([1.0, bad, 0.0], dtype=F64))


@pytest.mark.parametrize("method", [conjugate_gradient, minres])
def test_refused_products_and_options(method):
    b = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=f"the product with {WHERE} holds NaN or infinity"):
        method(lambda v: v / 0, b, **OPTIONS)
    with pytest.raises(ValueError, match=r"must have shape \(3,\).* got shape \(3, 1\)"):
        method(lambda v: v[:, None], b, **OPTIONS)
    with pytest.raises(ValueError, match=r"torch.float64 on cpu; got .*torch.float32 on cpu"):
        method(lambda v: v.float(), b, **OPTIONS)
    with pytest.raises(TypeError, match="must be a tensor; got an object of type NoneType"):
        method(lambda v: None, b, **OPTIONS)
    with pytest.raises(ValueError, match="rtol must be a finite number >= 0; got -1.0"):
        method(never, b, **(OPTIONS | {"rtol": -1.0}))
    with pytest.raises(ValueError, match="max_iterations must be an integer >= 1; got 0"):
        method(never, b, **(OPTIONS | {"max_iterations": 0}))


def test_refused_diagonals():
    b = torch.ones(3, dtype=F64)
    for diagonal, match in (
        ([1.0, 0.0, 2.0], "diagonal must be positive; entry 1 is 0"),
        ([1.0, 1.0, -2.5], "diagonal must be positive; entry 2 is -2.5"),
        ([1.0, 1.0], r"diagonal must have shape \(3,\)"),
        ([1.0, 1.0, float("nan")], "diagonal holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=match):
            conjugate_gradient(never, b, diagonal=torch.tensor(diagonal, dtype=F64), **OPTIONS)


def test_refused_matrices():
    b = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=r"matrix must have shape \(3, 3\)"):
        cholesky(torch.eye(2, dtype=F64), b, describe=WHERE)
    with pytest.raises(ValueError, match=r"matrix must have .*float64.* got .*float32"):
        cholesky(torch.eye(3), b, describe=WHERE)
    with pytest.raises(ValueError, match="matrix holds NaN or infinity"):
        cholesky(torch.full((3, 3), float("nan"), dtype=F64), b, describe=WHERE)


def test_refused_arguments_of_woodbury():
    b, solve = normal(30), low_rank()
    for damping in (0.0, -1.0, float("inf"), float("nan")):
        match = f"damping must be finite and > 0 for Woodbury's formula; got {damping!r}"
        with pytest.raises(ValueError, match=match):
            solve(b, damping)
    with pytest.raises(ValueError, match=r"gram must have shape \(6, 6\)"):
        solve(b, 1.0, gram=torch.eye(5))
    with pytest.raises(ValueError, match="gram holds NaN or infinity"):
        solve(b, 1.0, gram=torch.full((6, 6), float("nan")))
    with pytest.raises(ValueError, match="weights holds NaN or infinity"):
        solve(b, 1.0, weights=torch.full((6,), float("inf")))
    with pytest.raises(ValueError, match=r"project must have shape \(6, 1\)"):
        solve(b, 1.0, project=lambda B: B)
    with pytest.raises(ValueError, match=r"lift must have shape \(30, 1\)"):
        solve(b, 1.0, lift=lambda B: B)
