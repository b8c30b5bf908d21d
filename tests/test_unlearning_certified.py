"""Certified removal from linear models: against autograd, retraining, and the paper's bounds."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_breast_cancer, load_digits
from torch.nn.functional import binary_cross_entropy_with_logits

from lcodec_ext.unlearning import unlearn
from lcodec_ext.unlearning.privacy import PrivacyBudgetExceeded, gaussian_delta
from lcodec_ext.unlearning.privacy.linear import CertifiedLinear, minimise

OPTIONS = {"weight_decay": 0.01, "epsilon": 1.0, "delta": 1e-4, "noise_std": 2.0}


def draw(rng, n=150, d=4, n_classes=2, largest=1.0):
    x = rng.normal(size=(n, d))
    x *= largest / np.linalg.norm(x, axis=1).max()
    scores = x @ rng.normal(size=(d, n_classes)) + 0.1 * rng.normal(size=(n, n_classes))
    return torch.tensor(x), torch.tensor(scores.argmax(1))


def with_bias(model, x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if model.bias else x


def objective(model, x, y, weights):
    """The training objective for all outputs, written again independently."""
    scores = with_bias(model, x) @ weights
    if model.loss == "squared":
        losses = (scores[:, 0] - y).square().sum() / 2
    else:
        targets = y[:, None] == (
            torch.arange(weights.shape[1]) if weights.shape[1] > 1 else torch.ones(1)
        )
        losses = binary_cross_entropy_with_logits(scores, targets.double(), reduction="sum")
    decay = model.weight_decay * len(x) / 2 * weights.square().sum()
    return losses + decay + (model._noise * weights).sum()


def gradient(model, x, y):
    return torch.func.grad(lambda w: objective(model, x, y, w))(model.weights)


def hessian(model, x, y, weights):
    """By two reverse passes."""
    of_objective = torch.func.grad(lambda w: objective(model, x, y, w))
    return torch.func.jacrev(of_objective)(weights).reshape(weights.numel(), -1)


def without_limit(model):
    """The same model with a budget that no removal exceeds."""
    model.budget = math.inf
    return model


def retrained(model, x, y):
    """Weights for the same b, trained to rounding."""
    w = model.weights.clone()
    for _ in range(6):
        g = torch.func.grad(lambda w: objective(model, x, y, w))(w)
        h = hessian(model, x, y, w)
        w -= torch.linalg.solve(h, g.flatten()).view_as(w)
    return w


KINDS = {
    "binary": ({}, 2),
    "no bias": ({"bias": False}, 2),
    "one against the rest": ({"noise_std": 6.0}, 4),
    "squared": ({"loss": "squared"}, None),
}


def make(rng, kind, **options):
    own, n_classes = KINDS[kind]
    x, y = draw(rng, n_classes=n_classes or 2)
    if n_classes is None:
        y = x @ torch.tensor(rng.normal(size=4)) + 0.3
    model = CertifiedLinear(**{**OPTIONS, **own, **options}, seed=int(rng.integers(100)))
    return model.fit(x, y), x, y


# ---------------------------------------------------------------------------------------------
# Training and removal


@pytest.mark.parametrize("kind", KINDS)
def test_training_ends_with_the_stated_gradient(rng, kind):
    model, x, y = make(rng, kind)
    assert gradient(model, x, y).norm() <= model.tolerance
    assert model.spent == 2 * model.tolerance
    model, x, y = make(rng, kind, tolerance=1e-9)
    assert gradient(model, x, y).norm() <= 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [[7], [0, 3, 50, 149]])
def test_removal_is_the_exact_newton_step(rng, kind, indices):
    model, x, y = make(rng, kind)
    without_limit(model)
    before = model.weights.clone()
    keep = torch.ones(len(x), dtype=torch.bool)
    keep[indices] = False

    def of_removed(w):
        return objective(model, x[~keep], y[~keep], w) - (model._noise * w).sum()

    right = torch.func.grad(of_removed)(before)
    step = torch.linalg.solve(hessian(model, x[keep], y[keep], before), right.flatten())
    model.remove(indices)
    assert torch.allclose(model.weights, before + step.view_as(before), rtol=1e-11, atol=1e-12)
    assert model.retained.tolist() == torch.arange(len(x))[keep].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_true_residual_is_below_the_bound(rng, kind):
    for largest in (0.3, 1.0, 5.0):  # inputs need not lie in the unit ball
        model, x, y = make(rng, kind, tolerance=1e-9)
        without_limit(model).fit(x * largest, y)
        keep = torch.ones(len(x), dtype=torch.bool)
        for indices in ([3], [10, 11, 12], [100], list(range(20, 40))):
            spent = model.spent
            record = model.remove(indices)
            keep[indices] = False
            residual = float(gradient(model, x[keep] * largest, y[keep]).norm())
            assert record.residual == pytest.approx(residual, rel=1e-6, abs=1e-9)
            assert residual <= record.spent - model.tolerance + 1e-11
            assert record.spent <= spent + record.residual_bound + 1e-9 * record.spent
            assert record.n_retained == int(keep.sum())


def test_the_bound_is_attained():
    """Where all scores are at the steepest point of the second derivative; half of it fails."""
    n, probability = 10_000, (3 - math.sqrt(3)) / 6
    x = torch.ones(n, 1, dtype=torch.float64)
    y = (torch.arange(n) < probability * n).long()
    model = CertifiedLinear(
        weight_decay=1e-9,
        epsilon=0.5,
        delta=1e-4,
        noise_std=1e-3,
        tolerance=1e-9,
        bias=False,
        seed=0,
    )
    record = without_limit(model).fit(x, y).remove(range(40))
    assert 0.95 * record.residual_bound < record.residual < record.residual_bound


def test_the_bound_is_at_most_that_of_the_paper(rng):
    """Corollary 1 and theorem 1, for inputs in the unit ball and |third derivative| <= 1/4."""
    for decay in (1e-3, 1e-2, 0.1):
        x, y = draw(rng)
        model = CertifiedLinear(**{**OPTIONS, "weight_decay": decay}, bias=False, seed=1).fit(x, y)
        without_limit(model)
        before = model.weights[:, 0].clone()
        record = model.remove([5])
        step = model.weights[:, 0] - before
        rest = torch.cat([x[:5], x[6:]])
        corollary = 0.25 * torch.linalg.norm(rest, 2) * step.norm() * (rest @ step).norm()
        assert record.residual_bound <= corollary / 2
        assert record.residual_bound <= 4 * 0.25 / (decay**2 * (len(x) - 1))


def test_squared_loss_is_removed_exactly(rng):
    model, x, y = make(rng, "squared", tolerance=1e-10)
    spent = model.spent
    for i in range(60):
        model.remove([i])
    assert torch.allclose(model.weights, retrained(model, x[60:], y[60:]), rtol=1e-10, atol=1e-12)
    assert model.spent < spent + 1e-9


def test_logistic_removals_stay_near_retraining(rng):
    model, x, y = make(rng, "binary", tolerance=1e-9)
    without_limit(model)
    start = model.weights.clone()
    for i in range(10):
        model.remove([i])
    target = retrained(model, x[10:], y[10:])
    assert (model.weights - target).norm() < 0.02 * (start - target).norm()


def test_one_against_the_rest_is_binary_for_each_class(rng):
    """With the joint noise and a joint budget, not one for each class."""
    model, x, y = make(rng, "one against the rest")
    without_limit(model)
    record = model.remove([3, 4])
    bounds = []
    for k in range(4):
        single = CertifiedLinear(**OPTIONS, tolerance=model.tolerance / 2, seed=0)
        without_limit(single).fit(x, (y == k).long())
        single._noise = model._noise[:, k : k + 1]
        single.weights = retrained(single, x, (y == k).long())
        bounds.append(single.remove([3, 4]).residual_bound)
        assert torch.allclose(single.weights[:, 0], model.weights[:, k], atol=1e-4)
    assert record.residual_bound == pytest.approx(math.hypot(*bounds), rel=1e-2)
    assert record.spent == pytest.approx(2 * model.tolerance + record.residual_bound)


def test_digits_by_ten_classifiers():
    x, y = load_digits(return_X_y=True)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    model = CertifiedLinear(weight_decay=1e-3, epsilon=1, delta=1e-4, noise_std=5.0, seed=0)
    model.fit(x[:1200], y[:1200])
    for i in range(5):
        record = model.remove([i])
    assert record.residual < record.spent < model.budget
    assert (model.predict(x[1200:]).numpy() == y[1200:]).mean() > 0.7


# ---------------------------------------------------------------------------------------------
# The budget


@pytest.mark.parametrize("epsilon", [0.1, 0.99, 1.0, 5.0, 20.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-3, 0.3])
def test_b_hides_the_budget(epsilon, delta):
    model = CertifiedLinear(weight_decay=0.1, epsilon=epsilon, delta=delta, noise_std=3.0)
    assert gaussian_delta(3.0, model.budget, epsilon) <= delta
    papers = 3.0 * epsilon / math.sqrt(2 * math.log(1.5 / delta))
    if epsilon < 1:
        assert model.budget == pytest.approx(papers)
    if epsilon == 20.0:  # where the paper's constant does not hold
        assert gaussian_delta(3.0, papers, epsilon) > delta


def pushed(model, x, y, index, grid):
    """For values of b, the b with which retraining would give the weights after the removal."""
    effective = []
    keep = torch.arange(len(x)) != index
    for b in grid:
        noise = torch.tensor([b], dtype=torch.float64)
        ((all_of,), (removed,), (rest,)) = (
            model._objectives(x[of], y[of], 1) for of in (slice(None), ~keep, keep)
        )
        w = minimise(all_of, noise, model.tolerance)
        step, _ = model._step(w, removed, rest)
        effective.append(-float(rest.gradient(w + step)))
    return np.array(effective)


def hockey_stick(p, q, epsilon):
    return np.maximum(0.0, p - math.exp(epsilon) * q).sum()


@pytest.mark.parametrize("noise_std", [1.0, 0.001])
def test_removed_and_retrained_cannot_be_told_apart(noise_std):
    """In one dimension, by the distributions themselves, with the residual's dependence on b.

    Weights and b determine each other, so b with which retraining would give the same weights
    stands for them. Too little noise, with the bound far above the budget, fails.
    """
    epsilon, delta = 0.5, 1e-3
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, generator=generator, dtype=torch.float64) - 0.3
    y = (torch.rand(40, generator=generator) < torch.sigmoid(2 * x[:, 0])).long()
    x[0], y[0] = 1.7, 0
    model = CertifiedLinear(
        weight_decay=0.02,
        epsilon=epsilon,
        delta=delta,
        noise_std=noise_std,
        bias=False,
        tolerance=1e-10,
    ).fit(x, y)
    grid = noise_std * np.linspace(-5, 5, 401)
    effective = pushed(model, x, y, 0, grid)
    assert (np.diff(effective) > 0).all()
    removed = np.diff(stats.norm.cdf(grid / noise_std), prepend=0.0, append=1.0)
    fresh = np.diff(stats.norm.cdf(effective / noise_std), prepend=0.0, append=1.0)
    measured = max(hockey_stick(removed, fresh, epsilon), hockey_stick(fresh, removed, epsilon))
    largest = np.abs(effective - grid).max()
    if noise_std == 1.0:
        assert 1e-3 < largest < model.budget
        assert measured <= delta
    else:
        assert largest > model.budget
        assert measured > 10 * delta


def test_a_spent_budget_refuses_and_changes_nothing(rng):
    model, x, y = make(rng, "binary", noise_std=0.05)
    removed = 0
    spent = model.spent
    while True:
        weights = model.weights.clone()
        try:
            record = model.remove([removed])
        except PrivacyBudgetExceeded as error:
            message = str(error)
            break
        assert record.spent == model.spent > spent
        assert record.budget_left == pytest.approx(model.budget - model.spent)
        spent = record.spent
        removed += 1
    assert 1 <= removed < 100
    assert f"the random term hides {model.budget:.3g}" in message
    assert message.endswith("train again without them")
    assert torch.equal(model.weights, weights)
    assert model.spent == spent
    assert len(model.retained) == len(x) - removed
    noise = model._noise
    model.retrain(without=[removed])
    assert model.spent == 2 * model.tolerance
    assert (model._noise != noise).all()
    removed += 1
    assert model.retained.tolist() == list(range(removed, len(x)))
    assert gradient(model, x[removed:], y[removed:]).norm() <= model.tolerance
    model.retrain().remove([removed])
    assert model.retained.tolist() == list(range(removed + 1, len(x)))


def test_removing_alike_samples_together_costs_the_square_of_their_number(rng):
    x, y = draw(rng, n=2000)
    x[:20], y[:20] = torch.tensor([0.5, 0.5, 0.0, 0.0]), 1
    model = without_limit(CertifiedLinear(**OPTIONS, tolerance=1e-9, seed=0)).fit(x, y)
    together = model.remove(range(20)).residual_bound
    model.fit(x, y)
    one_by_one = sum(model.remove([i]).residual_bound for i in range(20))
    assert together / one_by_one == pytest.approx(20, rel=0.15)


def test_guarantee(rng):
    x, y = draw(rng)
    model = CertifiedLinear(**OPTIONS).fit(x, y)
    guarantee = model.guarantee()
    assert guarantee.certified
    assert guarantee.reasons == ()
    assert (guarantee.epsilon, guarantee.delta) == (1.0, 1e-4)
    assert (guarantee.sigma, guarantee.sensitivity) == (2.0, model.budget)
    assert "independent of b" in guarantee.assumptions["independence"]
    assert "independence" not in make(rng, "squared")[0].guarantee().assumptions
    json.dumps(guarantee.to_dict(), allow_nan=False)


def test_a_b_that_anyone_with_the_seed_has_certifies_nothing(rng):
    x, y = draw(rng)
    model = CertifiedLinear(**OPTIONS, seed=4).fit(x, y)
    for seeded in (model, model.retrain([3]), copied(model, x, y)):
        guarantee = seeded.guarantee()
        assert guarantee.kind == "heuristic"
        assert "b came from a seed, and who has the seed has b" in str(guarantee)
        assert guarantee.sensitivity == model.budget
    # Trained again from its state, which has no seed, b is the system's.
    assert copied(model, x, y).retrain().guarantee().certified
    secret = CertifiedLinear(**OPTIONS).fit(x, y)
    assert copied(secret, x, y).guarantee().certified


def copied(model, x, y):
    meta, tensors = model.to_state()
    kept = tensors["retained"]
    return CertifiedLinear.from_state(json.loads(json.dumps(meta)), tensors, x[kept], y[kept])


# ---------------------------------------------------------------------------------------------
# What goes in and comes out


def test_it_prints_what_it_is(rng):
    x, y = draw(rng)
    model = CertifiedLinear(**OPTIONS, seed=0)
    assert repr(model).startswith("CertifiedLinear('logistic', weight_decay=")
    assert repr(model).endswith(", not trained)")
    model.fit(x, y).remove([5, 6, 7])
    n, features = x.shape
    for each in (model, copied(model, x, y)):
        assert f"; {features} features, 1 output; {n - 3:,} samples, 3 removed; " in repr(each)
        assert f"; {model.spent:.3g} of a budget of {model.budget:.3g} spent)" in repr(each)
    model.retrain(without=[0])
    assert f"; {n - 4:,} samples, 4 removed; " in repr(model)
    meta, tensors = model.to_state()
    del meta["n_samples"]  # as earlier versions wrote it
    kept = tensors["retained"]
    old = CertifiedLinear.from_state(meta, tensors, x[kept], y[kept])
    assert f"; {n - 4:,} samples; " in repr(old)


def test_b_is_fresh_unless_seeded(rng):
    x, y = draw(rng)
    noises = [CertifiedLinear(**OPTIONS).fit(x, y)._noise for _ in range(2)]
    assert (noises[0] != noises[1]).all()
    seeded = [CertifiedLinear(**OPTIONS, seed=4).fit(x, y).weights for _ in range(2)]
    assert torch.equal(*seeded)


def test_arrays_and_tensors_give_the_same_bits(rng):
    x, y = draw(rng)
    one = CertifiedLinear(**OPTIONS, seed=0).fit(x, y)
    two = CertifiedLinear(**OPTIONS, seed=0).fit(x.numpy(), y.numpy().astype(float))
    one.remove([1, 2])
    two.remove(np.array([2, 1]))
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.predict(x), two.predict(x.numpy()))


@pytest.mark.parametrize("kind", KINDS)
def test_module_gives_the_scores(rng, kind):
    model, x, _ = make(rng, kind)
    module = model.to_module()
    scores = module(x).detach()
    assert torch.allclose(scores, with_bias(model, x) @ model.weights, rtol=1e-12, atol=1e-13)
    expected = {
        "binary": lambda: (scores[:, 0] > 0).long(),
        "no bias": lambda: (scores[:, 0] > 0).long(),
        "one against the rest": lambda: scores.argmax(1),
        "squared": lambda: scores[:, 0],
    }[kind]()
    assert torch.allclose(model.predict(x), expected, rtol=1e-12, atol=1e-13)
    assert (module.bias is None) == (kind == "no bias")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_to_the_same_bits(rng, kind):
    model, x, y = make(rng, kind)
    model.remove([5, 6])
    meta, tensors = model.to_state()
    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    meta = json.loads(json.dumps(meta, allow_nan=False))
    tensors = torch.load(file, weights_only=True)
    kept = tensors["retained"]
    again = CertifiedLinear.from_state(meta, tensors, x[kept], y[kept])
    records = [each.remove([0, 20]) for each in (model, again)]
    assert records[0] == records[1]
    assert torch.equal(model.weights, again.weights)
    assert again.to_state()[0] == model.to_state()[0]
    with pytest.raises(ValueError, match="X and y must be the retained samples, in the order of"):
        CertifiedLinear.from_state(meta, tensors, x, y)
    changed = x[kept].clone()
    changed[0, 0] += 1e-9
    with pytest.raises(ValueError, match="X and y must be the retained samples"):
        CertifiedLinear.from_state(meta, tensors, changed, y[kept])


def test_removed_rows_are_not_kept(rng):
    x, y = draw(rng)
    x[17] = 0.123456789
    model = CertifiedLinear(**OPTIONS, seed=0).fit(x, y)
    model.remove([17])

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    held = list(tensors(vars(model)))
    assert held
    assert not any((tensor == 0.123456789).any() for tensor in held)


def test_a_class_may_vanish(rng):
    x, y = draw(rng, n_classes=3)
    model = CertifiedLinear(**{**OPTIONS, "noise_std": 5.0}, seed=0).fit(x, y)
    without_limit(model).remove(torch.nonzero(y == 2)[:, 0])
    assert model.weights.shape[1] == 3
    meta, tensors = model.to_state()
    kept = tensors["retained"]
    assert CertifiedLinear.from_state(meta, tensors, x[kept], y[kept]).weights.shape[1] == 3
    assert CertifiedLinear(**OPTIONS, n_classes=5).fit(x, y).weights.shape[1] == 5


def test_breast_cancer_is_still_classified():
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0) / 4
    model = CertifiedLinear(**{**OPTIONS, "noise_std": 10.0}, seed=0).fit(x, y)
    for i in range(20):
        record = model.remove([i])
    assert record.spent < model.budget
    assert (model.predict(x).numpy() == y).mean() > 0.9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss must be one of 'logistic', 'squared'"),
        ({"weight_decay": 0.0}, ValueError, "weight_decay must be positive"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"delta": 1.0}, ValueError, "delta must be between 0 and 1"),
        ({"noise_std": 0}, ValueError, "noise_std must be positive"),
        ({"bias": 1}, TypeError, "bias must be True or False"),
        ({"n_classes": 1}, ValueError, "n_classes must be an integer >= 2"),
        ({"loss": "squared", "n_classes": 2}, ValueError, "n_classes is for loss='logistic'"),
        ({"tolerance": 10.0}, ValueError, "tolerance must be at most half the budget, 0.314"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        CertifiedLinear(**{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 2)), [0, 1, 0], "X and y must have as many rows, at least one; got 4 and 3"),
        (np.zeros((3, 2)), [-1, 1, 1], "y must hold labels 0 ... K-1; got values from -1 to 1"),
        (np.zeros((3, 2)), [0.5, 1, 1], "y must hold labels 0 ... K-1; got values from 0.5 to 1"),
        (np.array([[0.0], [np.nan]]), [0, 1], "X holds NaN or infinity"),
        (np.zeros(3), [0, 1, 1], "X must have shape"),
    ],
)
def test_samples_are_checked(x, y, message):
    with pytest.raises(ValueError, match=message):
        CertifiedLinear(**OPTIONS).fit(x, y)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match="labels 0 ... K-1 with K=2; got values from 0 to 2"):
        CertifiedLinear(**OPTIONS, n_classes=2).fit(np.zeros((3, 2)), [0, 1, 2])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([150], "indices has 150, which is not among the retained samples"),
        ([1, -1], "indices has -1, which is not among"),
        ([9], "indices has 9, which is not among"),
        ([1, 1], "indices must not name a sample twice"),
        ([], "indices must be a sequence of at least one integer; got shape"),
        (3, "indices must be a sequence of at least one integer"),
        ([0.5], "indices must be a sequence .* dtype float64"),
        ([i for i in range(150) if i != 9], "indices must leave a sample; got all of them"),
    ],
)
def test_indices_are_checked(rng, indices, message):
    model, _, _ = make(rng, "binary")
    model.remove([9])
    with pytest.raises(ValueError, match=message):
        model.remove(indices)
    if indices != []:
        before = model.weights
        message = message.replace("indices", "without").replace("at least one integer", "integers")
        with pytest.raises(ValueError, match=message):
            model.retrain(indices)
        assert model.weights is before


@pytest.mark.parametrize("none", [(), [], np.array([]), torch.tensor([])], ids=repr)
def test_nothing_to_remove_is_retrained_without(rng, none):
    model, _, _ = make(rng, "binary")
    model.retrain(without=none)
    assert len(model.retained) == 150


def test_untrained_models_say_so(rng):
    model = CertifiedLinear(**OPTIONS)
    for use in (
        lambda: model.remove([0]),
        lambda: model.predict(np.zeros((1, 2))),
        model.to_module,
        model.to_state,
        model.retrain,
        model.guarantee,
    ):
        with pytest.raises(RuntimeError, match="the model is not trained; call fit first"):
            use()


def test_prediction_wants_the_columns_of_training(rng):
    with pytest.raises(ValueError, match="X must have 4 columns, as in training; got 3"):
        make(rng, "binary")[0].predict(np.zeros((1, 3)))


def test_a_tolerance_below_rounding_is_said(rng):
    x, y = draw(rng)
    model = CertifiedLinear(**OPTIONS, tolerance=1e-40)
    with pytest.raises(RuntimeError, match="above the tolerance of 1e-40 for each output"):
        model.fit(x, y)


def test_records_are_data(rng):
    record = make(rng, "binary")[0].remove(torch.tensor([4, 2]))
    state = json.loads(json.dumps(record.to_dict()))
    assert state["indices"] == [2, 4]
    assert state["budget_left"] == record.budget - record.spent
    assert set(state) == {field.name for field in dataclasses.fields(record)} | {"budget_left"}


def test_unlearn_sends_to_its_own_method(rng):
    X, y = draw(rng)
    model = CertifiedLinear(**OPTIONS).fit(X, y)
    with pytest.raises(TypeError, match=r"a CertifiedLinear removes .* model.remove\(indices\)"):
        unlearn(model, (X[:1], y[:1]), (X[1:], y[1:]), binary_cross_entropy_with_logits)
