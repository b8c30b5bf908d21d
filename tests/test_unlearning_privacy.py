"""Noise and what it guarantees: known values, bounds against true distances, what is refused."""

import json
import math
import re
import secrets

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lcodec_ext.unlearning.privacy import (
    Guarantee,
    PrivacyBudget,
    PrivacyBudgetExceeded,
    add_noise,
    gaussian_delta,
    gaussian_sigma,
    logistic_constants,
    removal_bound,
    removal_guarantee,
    sekhari_sensitivity,
    standard_normals,
)

# ---------------------------------------------------------------------------------------------
# The Gaussian mechanism


def integrated_delta(ratio, epsilon):
    """By its definition: the integral of (p - e^epsilon q)+ over two unit normals."""
    with mpmath.workdps(40):
        ratio, epsilon = mpmath.mpf(ratio), mpmath.mpf(epsilon)
        start = ratio / 2 + epsilon / ratio  # where p = e^epsilon q

        def excess(x):
            return mpmath.npdf(x, ratio) - mpmath.exp(epsilon) * mpmath.npdf(x)

        points = [start + width for width in (0, 0.5, 1, 2, 4, 8, 16, 40)]
        return mpmath.quad(excess, points)


def precise_delta(ratio, epsilon):
    with mpmath.workdps(60):
        ratio, epsilon = mpmath.mpf(ratio), mpmath.mpf(epsilon)
        a, b = ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio
        return mpmath.ncdf(a) - mpmath.exp(epsilon) * mpmath.ncdf(b)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 2.5])
def test_delta_is_the_integral_of_its_definition(ratio, epsilon):
    expected = float(integrated_delta(ratio, epsilon))
    assert gaussian_delta(2.0, 2.0 * ratio, epsilon) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1.0, 30.0, 700.0, 1e4, 1e6])
def test_delta_where_its_terms_overflow_or_vanish(epsilon):
    for ratio in (1e-3, 0.1, 1.0, 10.0, 40.0, 150.0, 1500.0):
        expected = precise_delta(ratio, epsilon)
        value = gaussian_delta(1.0, ratio, epsilon)
        if expected > 1e-290:
            assert abs(value - expected) <= max(1e-11 * expected, 1e-15)
        else:
            assert value <= 1e-280


def test_delta_without_noise_or_without_difference():
    assert gaussian_delta(0.0, 1.0, 1.0) == 1.0
    assert gaussian_delta(0.0, 0.0, 1.0) == 0.0
    assert gaussian_delta(1e-320, 1e10, 1.0) == 1.0


@pytest.mark.parametrize("epsilon", [1.0, 1.5, 10.0, 700.0, 1000.0, 1e6])
@pytest.mark.parametrize("delta", [1e-300, 1e-12, 1e-5, 0.1, 0.9])
def test_from_epsilon_1_sigma_is_the_smallest_there_is(epsilon, delta):
    sigma = gaussian_sigma(3.0, epsilon, delta)
    assert precise_delta(3.0 / sigma, epsilon) <= delta
    assert precise_delta(3.0 / (sigma * (1 - 1e-6)), epsilon) > delta


def test_sigma_known_values():
    # the root of the integral above, found by mpmath alone
    with mpmath.workdps(30):
        ratio = mpmath.findroot(lambda r: precise_delta(r, 1) - mpmath.mpf("1e-5"), 0.27)
    assert gaussian_sigma(1.0, 1.0, 1e-5) == pytest.approx(float(1 / ratio), rel=1e-9)
    assert gaussian_sigma(1.0, 1.0, 1e-5) == pytest.approx(3.730631634816464, rel=1e-9)
    assert gaussian_sigma(2.0, 0.5, 1e-5) == pytest.approx(
        2.0 * math.sqrt(2 * math.log(1.25e5)) / 0.5, rel=1e-14
    )


def test_below_epsilon_1_the_classical_sigma_holds():
    for epsilon in (1e-9, 1e-3, 0.1, 0.5, 0.9, 0.999):
        for delta in (1e-300, 1e-50, 1e-8, 1e-3, 0.3, 0.9, 0.999):
            assert gaussian_delta(gaussian_sigma(1.0, epsilon, delta), 1.0, epsilon) <= delta


def test_the_classical_sigma_would_be_wrong_for_a_large_epsilon():
    classical = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10.0
    assert gaussian_delta(classical, 1.0, 10.0) > 1.5e-5
    assert gaussian_sigma(1.0, 10.0, 1e-5) > classical


def test_sigma_at_the_ends():
    assert gaussian_sigma(0.0, 0.5, 1e-5) == 0.0
    assert gaussian_sigma(1.0, 1e300, 1e-5) == pytest.approx(math.sqrt(0.5) * 1e-150)
    with pytest.raises(ValueError, match="sigma overflows for sensitivity=1e\\+200"):
        gaussian_sigma(1e200, 1e-200, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 1.0, 0.1), "sensitivity must be a finite number >= 0"),
        ((1.0, 0.0, 0.1), "epsilon must be positive; got 0.0"),
        ((1.0, math.inf, 0.1), "epsilon must be a finite number"),
        ((1.0, 1.0, 0.0), "delta must be positive"),
        ((1.0, 1.0, 1.0), "delta must be between 0 and 1, both excluded; got 1.0"),
    ],
)
def test_sigma_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_sigma(*arguments)


# ---------------------------------------------------------------------------------------------
# The distance to retraining


class Logistic:
    """Binary logistic regression with inputs in the unit ball, mean loss and weight decay."""

    def __init__(self, rng, n, d, decay):
        x = rng.normal(size=(n, d))
        self.x = x / np.linalg.norm(x, axis=1, keepdims=True) * rng.uniform(0.3, 1.0, (n, 1))
        self.y = (self.x @ rng.normal(size=d) + 0.3 * rng.normal(size=n) > 0).astype(float)
        self.decay = decay

    def gradients(self, w, rows):
        """Of each sample's loss plus regulariser."""
        x = self.x[rows]
        return (1 / (1 + np.exp(-x @ w)) - self.y[rows])[:, None] * x + self.decay * w

    def gradient(self, w, rows):
        return self.gradients(w, rows).mean(0)

    def hessian(self, w, rows):
        x = self.x[rows]
        p = 1 / (1 + np.exp(-x @ w))
        return (x.T * (p * (1 - p))) @ x / len(x) + self.decay * np.eye(x.shape[1])

    def minimise(self, rows, steps=30):
        w = np.zeros(self.x.shape[1])
        for _ in range(steps):
            w = w - np.linalg.solve(self.hessian(w, rows), self.gradient(w, rows))
        return w

    def remove(self, w, forget, retain, gradient="removal"):
        right = self.gradients(w, forget).sum(0) / len(retain)
        if gradient == "residual":
            right = -self.gradient(w, retain)
        return np.linalg.solve(self.hessian(w, retain), right), right


def split(n, m):
    return np.arange(m), np.arange(m, n)


@pytest.mark.parametrize("gradient", ["removal", "residual"])
@pytest.mark.parametrize("decay", [0.003, 0.03, 0.3])
def test_true_distances_are_below_the_bound(rng, gradient, decay):
    """Also from weights that are not stationary and with steps that are not exact."""
    for trial in range(40):
        n, d = int(rng.integers(20, 300)), int(rng.integers(1, 12))
        m = int(rng.integers(1, n // 2))
        problem = Logistic(rng, n, d, decay)
        forget, retain = split(n, m)
        everything = np.arange(n)
        w = problem.minimise(everything)
        if trial % 2:
            w = w + 0.1 * rng.normal(size=d) * rng.uniform()
        g = np.linalg.norm(problem.gradient(w, everything))
        step, right = problem.remove(w, forget, retain, gradient)
        if trial % 3:
            step = step + 0.02 * np.linalg.norm(step) * rng.normal(size=d) / math.sqrt(d)
        error = problem.hessian(w, retain) @ step - right
        rtol = np.linalg.norm(error) / np.linalg.norm(right)
        bound = removal_bound(
            n,
            m,
            **logistic_constants(1.0)._asdict(),
            strong_convexity=decay,
            weight_decay=decay,
            gradient_bound=g,
            rtol=rtol,
            gradient=gradient,
        )
        optimum = problem.minimise(retain)
        assert np.linalg.norm(w + step - optimum) <= bound.distance
        direction = rng.normal(size=d)
        retrained = optimum + direction / np.linalg.norm(direction) * g / decay * 0.1
        if np.linalg.norm(problem.gradient(retrained, retain)) <= g:
            assert np.linalg.norm(w + step - retrained) <= bound.sensitivity


def test_leaving_the_training_gradient_out_would_not_hold(rng):
    problem = Logistic(rng, 200, 4, 0.1)
    forget, retain = split(200, 2)
    w = problem.minimise(np.arange(200)) + 0.3
    step, _ = problem.remove(w, forget, retain)
    distance = np.linalg.norm(w + step - problem.minimise(retain))
    constants = {
        **logistic_constants(1.0)._asdict(),
        "strong_convexity": 0.1,
        "weight_decay": 0.1,
    }
    g = np.linalg.norm(problem.gradient(w, np.arange(200)))
    assert distance > removal_bound(200, 2, **constants).sensitivity
    assert distance <= removal_bound(200, 2, **constants, gradient_bound=g).distance


def test_a_removed_sample_may_pull_twice_as_much_as_its_loss():
    """Its gradient has the regulariser's part, which the others balance and it does not."""
    # losses -L w, and +L w for the removed sample; F is minimal at w = (n - 2) L / (n decay)
    n, decay, lipschitz = 100, 0.5, 3.0
    w = (n - 2) * lipschitz / (n * decay)
    pull = lipschitz + decay * w

    def largest_pull(**domain):
        bound = removal_bound(
            n,
            1,
            lipschitz=lipschitz,
            hessian_lipschitz=1.0,
            strong_convexity=decay,
            weight_decay=decay,
            **domain,
        )
        return math.sqrt(bound.curvature * 2 * decay**3) * (n - 1)

    assert 1.9 * lipschitz < pull <= largest_pull()
    assert largest_pull() == pytest.approx(2 * lipschitz)
    assert pull <= largest_pull(radius=w) == pytest.approx(pull)


def test_each_term_is_attained():
    """Problems in one dimension in which the bound is the distance: none of it can be left out."""
    n, m, c, g, lipschitz, rtol = 10, 3, 0.5, 0.02, 2.0, 0.25
    rest = n - m
    # quadratic retained objective c w^2 / 2; removed losses are linear with slope s each
    slope = lipschitz
    w = 0.1
    full_gradient = (rest * c * w + m * slope) / n  # no regulariser
    step = m * slope / rest / c
    distance = abs(w + step)
    bound = removal_bound(
        n,
        m,
        lipschitz=lipschitz,
        hessian_lipschitz=0.0,
        strong_convexity=c,
        gradient_bound=full_gradient,
    )
    assert distance == pytest.approx(bound.distance, rel=1e-12)
    assert bound.curvature == bound.solve == 0.0
    # from a stationary w, a solve that is off by rtol
    w = -m * slope / (rest * c)
    bound = removal_bound(
        n, m, lipschitz=lipschitz, hessian_lipschitz=0.0, strong_convexity=c, rtol=rtol
    )
    assert abs(w + (1 + rtol) * step) == pytest.approx(bound.distance, rel=1e-12)
    # the retrained model ends on the other side
    bound = removal_bound(
        n, m, lipschitz=lipschitz, hessian_lipschitz=0.0, strong_convexity=c, gradient_bound=g
    )
    assert bound.retraining == g / c
    assert bound.sensitivity - bound.distance == pytest.approx(g / c)
    # retained c w^2 / 2 + M |w - w0|^3 / 6, stationary with the removed at w0: up the cubic
    m_hessian, slope = 3.0, 1e-3
    w0 = -m * slope / (rest * c)
    step = m * slope / rest / c

    def gradient(v):
        return c * v + m_hessian / 2 * (v - w0) ** 2

    low, high = w0, w0 + step
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) < 0 else (low, middle)
    bound = removal_bound(n, m, lipschitz=slope, hessian_lipschitz=m_hessian, strong_convexity=c)
    assert 0.99 * bound.curvature < w0 + step - low <= bound.curvature


def test_the_bound_is_at_most_that_of_sekhari_and_others():
    constants = {"lipschitz": 1.3, "hessian_lipschitz": 0.7, "strong_convexity": 0.02}
    for n, m in ((10, 1), (10, 5), (1000, 500), (1000, 3)):
        bound = removal_bound(n, m, **constants)
        assert bound.sensitivity <= sekhari_sensitivity(n, m, **constants) * (1 + 1e-12)
    assert sekhari_sensitivity(1000, 2, **constants) == pytest.approx(
        2 * 0.7 * 1.3**2 * 4 / (1e6 * 0.02**3)
    )


def third_derivative(loss, w, direction):
    """Of t -> loss(w + t direction) at 0."""

    def along(t):
        return loss(w + t * direction)

    for _ in range(3):
        along = torch.func.grad(along)
    return abs(float(along(torch.zeros((), dtype=torch.float64))))


@pytest.mark.parametrize("n_outputs", [1, 2, 5])
def test_constants_of_logistic_regression(n_outputs):
    generator = torch.Generator().manual_seed(n_outputs)
    reach = 1.7
    constants = logistic_constants(reach, n_outputs)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for _ in range(60):
        x = draw(3)
        x = reach * x / x.norm()
        label = int(torch.randint(max(n_outputs, 2), (), generator=generator))

        def loss(w, x=x, label=label):
            z = w @ x
            if n_outputs == 1:
                return nn.functional.softplus(z[0], threshold=100) - label * z[0]
            return torch.logsumexp(z, 0) - z[label]

        w, direction = draw(n_outputs, 3), draw(n_outputs, 3)
        gradient = torch.func.grad(loss)(5 * w)
        assert gradient.norm() <= constants.lipschitz * (1 + 1e-12)
        assert third_derivative(loss, w, direction / direction.norm()) <= (
            constants.hessian_lipschitz * (1 + 1e-12)
        )


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_constants_of_logistic_regression_are_attained(n_outputs):
    probability = (3 - math.sqrt(3)) / 6
    logit = math.log(probability / (1 - probability))
    x = torch.tensor([2.0], dtype=torch.float64)
    if n_outputs == 1:
        w, direction = torch.tensor([[logit / 2]]), torch.tensor([[1.0]])
    else:
        w = torch.tensor([[logit / 2], [0.0]])
        direction = torch.tensor([[1.0], [-1.0]]) / math.sqrt(2)

    def loss(w):
        z = w @ x
        return nn.functional.softplus(z[0]) if n_outputs == 1 else torch.logsumexp(z, 0)

    value = third_derivative(loss, w.double(), direction.double())
    assert value == pytest.approx(logistic_constants(2.0, n_outputs).hessian_lipschitz, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": 10}, "m must be less than n, the training samples; got m=10 and n=10"),
        ({"m": 0}, "m must be an integer >= 1"),
        ({"strong_convexity": 0.0}, "strong_convexity must be positive"),
        ({"lipschitz": -1.0}, "lipschitz must be a finite number >= 0"),
        ({"radius": 0.0}, "radius must be positive"),
        ({"gradient": "fisher"}, "gradient must be one of 'removal', 'residual'"),
    ],
)
def test_bound_refuses(change, message):
    arguments = {
        "n": 10,
        "m": 1,
        "lipschitz": 1.0,
        "hessian_lipschitz": 1.0,
        "strong_convexity": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        removal_bound(**{**arguments, **change})


# ---------------------------------------------------------------------------------------------
# What is guaranteed

LINEAR = nn.Linear(4, 1).double()
FACTS = {
    "n": 200,
    "m": 2,
    "epsilon": 0.5,
    "delta": 1e-5,
    "n_selected": 5,
    "weight_decay": 0.1,
    "training_gradient_norm": 1e-9,
    "solve_residual": 1e-12,
    "parameter_norm": 3.0,
    "lipschitz": 1.0,
    "hessian_lipschitz": 0.1,
    "strong_convexity": 0.1,
    "radius": math.inf,
    "gradient_bound": 1e-6,
    "rtol": 1e-8,
}


def test_certified_noise_covers_the_true_distance(rng):
    problem = Logistic(rng, 200, 4, 0.1)
    forget, retain = split(200, 2)
    everything = np.arange(200)
    w = problem.minimise(everything)
    step, right = problem.remove(w, forget, retain)
    residual = np.linalg.norm(problem.hessian(w, retain) @ step - right) / np.linalg.norm(right)
    guarantee = removal_guarantee(
        nn.Linear(4, 1, bias=False).double(),
        **{
            **FACTS,
            **logistic_constants(1.0)._asdict(),
            "n_selected": 4,
            "training_gradient_norm": np.linalg.norm(problem.gradient(w, everything)),
            "solve_residual": residual,
            "parameter_norm": max(np.linalg.norm(w), np.linalg.norm(w + step)),
        },
    )
    assert guarantee.certified
    assert guarantee.reasons == ()
    distance = np.linalg.norm(w + step - problem.minimise(retain))
    assert 0 < distance <= guarantee.sensitivity
    assert gaussian_delta(guarantee.sigma, guarantee.sensitivity, 0.5) <= 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_selected": 4}, "the step changed 4 of 5 trainable parameters"),
        ({"update": "gradient"}, "update='gradient'"),
        ({"curvature": "gauss_newton"}, "curvature='gauss_newton'"),
        ({"damping": 1e-3}, "damping=0.001"),
        ({"steps": 2}, "steps=2"),
        ({"n_curvature": 100}, "n_curvature=100: the Hessian is not that of all 198"),
        ({"order": "sequential"}, "order='sequential'"),
        ({"repair_epochs": 1}, "repair_epochs=1"),
        ({"training_gradient_norm": 1e-5}, "training_gradient_norm is 1e-05, above gradient_bound"),
        ({"training_gradient_norm": math.nan}, "training_gradient_norm is nan"),
        ({"solve_residual": 1e-7}, "solve_residual is 1e-07, above rtol=1e-08"),
        ({"radius": 2.0}, "parameter_norm is 3, above radius=2"),
        ({"lipschitz": None}, "lipschitz is not given"),
        ({"hessian_lipschitz": None}, "hessian_lipschitz is not given"),
        ({"strong_convexity": None}, "strong_convexity is not given"),
        ({"radius": None}, "radius is not given"),
        ({"gradient_bound": None}, "gradient_bound is not given"),
        ({"rtol": None}, "rtol is not given"),
    ],
)
def test_every_condition_of_the_certificate_is_looked_at(change, reason):
    assert removal_guarantee(LINEAR, **FACTS).certified
    guarantee = removal_guarantee(LINEAR, **{**FACTS, **change})
    assert guarantee.kind == "heuristic"
    assert [found for found in guarantee.reasons if found.startswith(reason)], guarantee.reasons
    assert len(guarantee.reasons) == 1
    assert reason in str(guarantee)


def test_buffers_that_training_filled_are_a_reason():
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
    guarantee = removal_guarantee(model.double(), **FACTS)
    assert guarantee.reasons == (
        "buffers are released without noise: '0.running_mean', '0.running_var'",
    )


def test_rounding_to_float32_is_a_reason():
    """The bound is of a step that is solved to rtol, which is far below that rounding."""
    guarantee = removal_guarantee(nn.Linear(4, 1), **FACTS)
    assert guarantee.kind == "heuristic"
    (reason,) = guarantee.reasons
    assert reason.startswith("the weights are torch.float32, to which the step is rounded")


def test_frozen_parameters_need_not_be_selected():
    model = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    guarantee = removal_guarantee(model.double(), **FACTS)
    assert guarantee.certified
    assert "frozen_parameters" in guarantee.assumptions


class Own(nn.Module):
    """Its forward may be anything."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def hooked(module):
    module.register_forward_hook(lambda module, inputs, outputs: outputs**2)
    return module


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, layer)


def tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight = model[1].weight
    return model


def overridden():
    layer = nn.Linear(4, 1)
    layer.forward = lambda x: layer.weight.square().sum() * x
    return layer


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)),
            r"2 modules have some \('0', '2'\)",
        ),
        (
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
            r"4 modules .*\('0', '1', '2' and 1 more\)",
        ),
        (
            nn.Sequential(nn.Linear(4, 1), nn.Sequential(nn.Tanh())),
            "'0' is followed by '1.0', a Tanh",
        ),
        (nn.Sequential(nn.Linear(4, 1), Own()), "'0' is followed by '1', a Own"),
        (
            nn.Sequential(nn.Linear(4, 1), hooked(nn.Identity())),
            "'0' is followed by '1', a Identity",
        ),
        (shared(), "'0' is followed by '1', a Linear"),
        (tied(), "2 modules have some"),
        (nn.Sequential(nn.Tanh(), Own(fc=nn.Linear(4, 1))), "'1.fc' is called by '1', a Own"),
        (Own(fc=nn.Linear(4, 1)), "'fc' is called by '', a Own"),
        (hooked(nn.Sequential(nn.Linear(4, 1))), "'0' is called by '', a Sequential"),
        (
            hooked(nn.Linear(4, 1)),
            "'' is a Linear with bias, weight, not a plain Linear or convolution layer",
        ),
        (overridden(), "'' is a Linear with bias, weight, not a plain Linear or convolution layer"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 1)), "modules have some|not a plain"),
        (nn.LayerNorm(4), "'' is a LayerNorm with bias, weight, not a plain"),
        (nn.PReLU(), "'' is a PReLU with weight, not a plain"),
    ],
)
def test_a_model_that_is_not_linear_is_not_certified(model, reason):
    n_parameters = sum(p.numel() for p in model.parameters())
    guarantee = removal_guarantee(model.double(), **{**FACTS, "n_selected": n_parameters})
    assert guarantee.kind == "heuristic"
    (found,) = guarantee.reasons
    assert found.startswith("the model is not linear in its trainable parameters")
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 1, bias=False),
        nn.Sequential(nn.Linear(4, 1)),
        nn.Sequential(nn.Sequential(nn.Linear(4, 3)).requires_grad_(False), nn.Linear(3, 1)),
        nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Sequential(nn.Linear(4, 1), nn.Identity())),
        nn.Sequential(Own(fc=nn.Linear(4, 3)).requires_grad_(False), nn.Linear(3, 1), nn.Flatten()),
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()),
    ],
)
def test_a_linear_model_is_certified(model):
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    guarantee = removal_guarantee(model.double(), **{**FACTS, "n_selected": n_parameters})
    assert guarantee.reasons == ()
    assert guarantee.certified
    assert guarantee.assumptions["convexity"].startswith(
        "the retained objective is strongly convex"
    )


def test_the_noise_does_not_depend_on_what_was_measured():
    one = removal_guarantee(LINEAR, **FACTS)
    two = removal_guarantee(
        LINEAR,
        **{**FACTS, "training_gradient_norm": 0.0, "solve_residual": 0.0, "parameter_norm": 0.1},
    )
    assert one == two


def test_heuristic_noise_is_the_papers():
    """gamma = 2 M L^2 m^2 / (n^2 lambda^3), sigma = gamma sqrt(2 ln(1.25/delta)) / epsilon."""
    facts = {**FACTS, "curvature": "gauss_newton"}
    facts |= dict.fromkeys(("lipschitz", "hessian_lipschitz", "strong_convexity"))
    guarantee = removal_guarantee(LINEAR, **facts)
    gamma = 2 * 0.25 * 1.0 * 4 / (200**2 * 0.1**3)
    assert guarantee.sensitivity == pytest.approx(gamma)
    assert guarantee.sigma == pytest.approx(gamma / 0.5 * math.sqrt(2 * math.log(1.25e5)))
    assert guarantee.assumptions["assumed_without_evidence"] == [
        "lipschitz",
        "hessian_lipschitz",
        "strong_convexity",
    ]


def test_without_epsilon_nothing_is_guaranteed():
    guarantee = removal_guarantee(LINEAR, **{**FACTS, "epsilon": None, "delta": None})
    assert (guarantee.kind, guarantee.sigma, guarantee.epsilon) == ("none", 0.0, None)
    assert "no guarantee" in str(guarantee)


def test_guarantee_refuses():
    with pytest.raises(ValueError, match="epsilon and delta go together; got epsilon=1.0 and"):
        removal_guarantee(LINEAR, **{**FACTS, "epsilon": 1.0, "delta": None})
    with pytest.raises(ValueError, match="epsilon needs a strongly convex objective"):
        removal_guarantee(LINEAR, **{**FACTS, "strong_convexity": None, "weight_decay": 0.0})


@pytest.mark.parametrize("change", [{}, {"steps": 2}, {"epsilon": None, "delta": None}])
def test_guarantee_survives_json(change):
    guarantee = removal_guarantee(LINEAR, **{**FACTS, **change})
    text = json.dumps(guarantee.to_dict(), allow_nan=False)
    assert Guarantee.from_dict(json.loads(text)) == guarantee


# ---------------------------------------------------------------------------------------------
# Composition


def test_basic_composition():
    budget = PrivacyBudget(1.0, 1e-5)
    for _ in range(10):
        budget.spend(0.1, 1e-6)
    assert budget.spent == pytest.approx((1.0, 1e-5))
    assert budget.spent_epsilon == pytest.approx(1.0)
    before = budget.to_dict()
    with pytest.raises(PrivacyBudgetExceeded, match="epsilon=0.001, delta=0 does not fit") as why:
        budget.spend(0.001, 0.0)
    assert str(why.value).endswith(
        "with it the sums are epsilon=1.001, delta=1e-05. The budget is epsilon=1, delta=1e-05, of "
        "which 10 releases so far took epsilon=1, delta=1e-05, by sums; train again for a new "
        "budget"
    )
    with pytest.raises(PrivacyBudgetExceeded):
        budget.spend(0.0, 1e-9)
    assert issubclass(PrivacyBudgetExceeded, ValueError)
    assert budget.to_dict() == before
    assert budget.n_releases == 10


def test_a_refusal_names_what_was_spent_by_the_measure_that_allowed_it():
    """Sums of more than the budget would contradict that these releases were allowed."""
    budget = PrivacyBudget(2.0, 1e-4)
    ratio = 1 / gaussian_sigma(1.0, 1.0, 1e-5)
    with pytest.raises(PrivacyBudgetExceeded, match="delta=0.0001, of which nothing is spent;"):
        budget.spend(3.0, 1e-5)
    for _ in range(4):
        budget.spend(1.0, 1e-5, ratio=ratio)
    with pytest.raises(PrivacyBudgetExceeded) as why:
        budget.spend(1.0, 1e-5, ratio=ratio)
    n = budget.n_releases
    assert budget.spent[0] > 2  # by sums more than there is
    spent = budget.spent_epsilon
    needed = PrivacyBudget(99.0, 1e-4)
    for _ in range(n + 1):
        needed.spend(1.0, 1e-5, ratio=ratio)
    assert str(why.value) == (
        f"epsilon=1, delta=1e-05 does not fit: with it the sums are epsilon={n + 1}, "
        f"delta={1e-5 * (n + 1):.4g}, and by the composition of Gaussians it is "
        f"epsilon={needed.spent_epsilon:.4g} at delta=0.0001. The budget is epsilon=2, "
        f"delta=0.0001, of which {n} releases so far took epsilon={spent:.4g} at delta=0.0001, by "
        "the composition of Gaussians; train again for a new budget"
    )
    assert spent <= 2 < needed.spent_epsilon


def test_gaussian_releases_compose_exactly():
    """As many as one mechanism with root-of-squares sensitivity allows, more than basic."""
    epsilon, delta = 1.0, 1e-5
    ratio = 1 / gaussian_sigma(1.0, 0.1, 1e-6)
    budget = PrivacyBudget(epsilon, delta)
    for _ in range(1000):
        try:
            budget.spend(0.1, 1e-6, ratio=ratio)
        except PrivacyBudgetExceeded:
            break
    k = budget.n_releases
    assert 30 < k < 1000
    assert precise_delta(ratio * math.sqrt(k), epsilon) <= delta
    assert precise_delta(ratio * math.sqrt(k + 1), epsilon) > delta
    assert budget.spent_epsilon <= epsilon
    assert precise_delta(ratio * math.sqrt(k), budget.spent_epsilon) <= delta * (1 + 1e-9)
    assert precise_delta(ratio * math.sqrt(k), budget.spent_epsilon * 0.999) > delta
    with pytest.raises(PrivacyBudgetExceeded):  # one that is not Gaussian leaves basic composition
        budget.spend(0.01, 0.0)


def test_composition_of_gaussians_against_simulation(rng):
    """delta = E max(0, 1 - e^(epsilon - log-likelihood ratio)), over four unequal releases."""
    ratios, epsilon = np.array([0.3, 0.5, 0.2, 0.6]), 0.4
    z = rng.normal(size=(400_000, 4)) + ratios
    log_ratio = z @ ratios - ratios @ ratios / 2
    gain = np.maximum(0.0, -np.expm1(epsilon - log_ratio))
    spread = gain.std() / math.sqrt(len(gain))
    expected = gaussian_delta(1.0, float(np.linalg.norm(ratios)), epsilon)
    assert abs(gain.mean() - expected) < 5 * spread
    budget = PrivacyBudget(epsilon, expected * 1.0001)
    for ratio in ratios:
        budget.spend(epsilon, gaussian_delta(1.0, ratio, epsilon), ratio=ratio)
    assert budget.n_releases == 4
    with pytest.raises(PrivacyBudgetExceeded):
        budget.spend(epsilon, 0.5, ratio=0.05)


def test_a_release_must_be_what_it_says():
    with pytest.raises(ValueError, match="ratio=1.0 does not give epsilon=0.1"):
        PrivacyBudget(1.0, 0.1).spend(0.1, 1e-6, ratio=1.0)
    with pytest.raises(ValueError, match="epsilon must be a finite number >= 0"):
        PrivacyBudget(1.0, 0.1).spend(-0.5, 0.0)


def test_a_guarantee_can_be_spent():
    guarantee = removal_guarantee(LINEAR, **FACTS)
    budget = PrivacyBudget(2.0, 1e-4)
    ratio = guarantee.sensitivity / guarantee.sigma
    budget.spend(guarantee.epsilon, guarantee.delta, ratio=ratio)
    assert 0 < budget.spent_epsilon < guarantee.epsilon


def test_budget_survives_json_to_the_bit():
    budget = PrivacyBudget(1.0, 1e-5)
    ratio = 1 / gaussian_sigma(1.0, 0.1, 1e-6)
    for _ in range(7):
        budget.spend(0.1, 1e-6, ratio=ratio)
    again = PrivacyBudget.from_dict(json.loads(json.dumps(budget.to_dict())))
    for each in (budget, again):
        each.spend(0.1, 1e-6, ratio=ratio)
    assert again.to_dict() == budget.to_dict()
    assert repr(again) == repr(budget)
    with pytest.raises(ValueError, match="state must have"):
        PrivacyBudget.from_dict({"epsilon": 1.0})


# ---------------------------------------------------------------------------------------------
# Noise


def noisy_model():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight.requires_grad_(False)
    return model


def test_every_trainable_coordinate_gets_noise_and_nothing_else():
    model = noisy_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    released = add_noise(model, 0.1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in released.state_dict().items():
        assert value.dtype == before[name].dtype
        assert (value != before[name]).all() == (name in trainable)
        assert (value == before[name]).all() == (name not in trainable)


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    released = add_noise(model, 1.0)
    assert released[1].weight is released[0].weight


@pytest.mark.parametrize("seed", [None, 5])
def test_noise_is_normal(seed):
    noise = standard_normals(torch.empty(50_001), seed).numpy()
    assert abs(noise.mean()) < 6 / math.sqrt(50_001)
    assert abs(noise.std() - 1) < 6 / math.sqrt(2 * 50_001)
    assert abs(np.corrcoef(noise[:25_000], noise[25_001:])[0, 1]) < 6 / math.sqrt(25_000)
    assert stats.kstest(noise, "norm").pvalue > 1e-6


def test_releases_do_not_share_their_noise():
    vector = torch.zeros(100)
    one, two = add_noise(vector, 1.0), add_noise(vector, 1.0)
    assert (one != two).all()
    assert torch.equal(add_noise(vector, 1.0, seed=3), add_noise(vector, 1.0, seed=3))
    assert (add_noise(vector, 1.0, seed=3) != add_noise(vector, 1.0, seed=4)).all()


def test_noise_comes_from_the_operating_system_alone(monkeypatch):
    """Seeds of torch and NumPy, which may be known, do not decide it."""
    asked = []

    def token_bytes(n):
        asked.append(n)
        return bytes(range(256)) * (n // 256 + 1)

    torch.manual_seed(0)
    first = add_noise(torch.zeros(40), 1.0)
    torch.manual_seed(0)
    assert (add_noise(torch.zeros(40), 1.0) != first).all()
    monkeypatch.setattr(secrets, "token_bytes", lambda n: token_bytes(n)[:n])
    add_noise(torch.zeros(41), 1.0)
    assert asked == [8 * 42]
    add_noise(torch.zeros(41), 1.0, seed=1)
    assert len(asked) == 1


def test_noise_is_scaled():
    vector = torch.full((20_000,), 2.0, dtype=torch.float64)
    noise = (add_noise(vector, 0.25, seed=0) - vector).numpy()
    assert noise.std() == pytest.approx(0.25, rel=0.03)
    assert torch.equal(add_noise(vector, 0.0), vector)


def test_noise_refuses():
    with pytest.raises(
        TypeError, match="target must be a model or a tensor; got an object of type"
    ):
        add_noise([1.0], 1.0)
    with pytest.raises(TypeError, match="target must be real to take noise"):
        add_noise(torch.arange(3), 1.0)
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0"):
        add_noise(torch.zeros(3), -1.0)


def test_noise_is_that_of_box_and_muller():
    words = np.random.Philox(5).random_raw(8) >> np.uint64(11)
    uniform = (words + 0.5) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log(uniform[:4])), 2 * math.pi * uniform[4:]
    expected = np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:7]
    drawn = add_noise(torch.zeros(7, dtype=torch.float64), 1.0, seed=5)
    np.testing.assert_allclose(drawn, expected, rtol=1e-12, atol=1e-12)
