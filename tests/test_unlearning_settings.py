"""Every option does what `Settings` says of it; statistics and samples do what they say."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from lcodec_ext import unlearning
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.unlearning import (
    Settings,
    TokenReplacement,
    TrainingStatistics,
    UnitSelection,
    guard,
    random_samples,
    samples_of,
    select,
)
from lcodec_ext.unlearning.privacy import logistic_constants

DOUBLE = torch.float64
WEIGHT_DECAY = 0.01

#: Without the presets' limits: all retained samples, solved to rounding, no guard.
unlearn = functools.partial(unlearning.unlearn, preset=Settings(), weight_decay=WEIGHT_DECAY)


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def objective(model, data, loss_fn=F.cross_entropy):
    decay = WEIGHT_DECAY / 2 * sum(p.square().sum() for p in model.parameters())
    return loss_fn(model(data[0]), data[1]) + decay


def gradient(model, data, loss_fn=F.cross_entropy):
    parts = torch.autograd.grad(objective(model, data, loss_fn), list(model.parameters()))
    return torch.cat([g.flatten() for g in parts])


def fit(model, data, iterations=200, loss_fn=F.cross_entropy):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=iterations, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(model, data, loss_fn)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return model


def make_data(n=80):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 4, dtype=DOUBLE, generator=generator)
    y = (x[:, :3] + 0.5 * torch.randn(n, 3, dtype=DOUBLE, generator=generator)).argmax(1)
    return x, y


def split(data, m=6):
    return tuple(t[:m] for t in data), tuple(t[m:] for t in data)


TRAIN = make_data()
FORGET, RETAIN = split(TRAIN)
SIZES = {"0": 5, "2": 7, "4": 6}  # parameters of a unit, by layer
UNITS = {"0": range(6), "2": range(5), "4": range(3)}


def untrained(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()


@pytest.fixture(scope="module")
def mlp():
    return fit(untrained(), TRAIN, 60)


def logistic(iterations=200, data=TRAIN):
    torch.manual_seed(1)
    return fit(nn.Linear(data[0].shape[1], 3).double(), data, iterations)


@pytest.fixture(scope="module")
def linear():
    return logistic()


PERTURBED = {"n_perturbations": 100, "noise_std": 0.5}
RANKED = ("gradient", "random")


def run(model, selection="full", **options):
    options = {"damping": 0.1} | PERTURBED | options
    return unlearn(model, FORGET, RETAIN, F.cross_entropy, selection=selection, **options)


# ---------------------------------------------------------------------------------------------
# Which units


@pytest.mark.parametrize("selection", [*RANKED, "lfoci"])
def test_as_many_units_as_asked_for(mlp, selection):
    result = run(mlp, selection, n_units=4)
    assert len(result.selection) == 4
    assert result.n_units == 14


@pytest.mark.parametrize("budget", [5, 33, 0.3, 1.0])
@pytest.mark.parametrize("selection", [*RANKED, "lfoci", "cheap"])
def test_budget_of_parameters(mlp, selection, budget):
    if (selection, budget) == ("lfoci", 5):  # its first unit is larger
        with pytest.raises(ValueError, match="max_parameters=5 allows no unit"):
            run(mlp, selection, max_parameters=budget)
        return
    options = {"n_perturbations": 30, "damping": 1.0}
    result = run(mlp, selection, max_parameters=budget, **options)
    allowed = budget if isinstance(budget, int) else budget * result.n_trainable
    assert 0 < result.n_parameters <= allowed
    if selection in RANKED:  # filled: no unit that was left out would fit
        left = allowed - result.n_parameters
        rest = UnitSelection(UNITS) - result.selection
        assert all(SIZES[layer] > left for layer in rest.units)


def by_unit(values, model):
    """Add up a vector of all parameters over each unit."""
    marks = torch.arange(len(vector(model)))
    sizes = [p.numel() for p in model.parameters()]
    named = {
        k: v.view(p.shape)
        for (k, p), v in zip(model.named_parameters(), marks.split(sizes), strict=True)
    }
    return {
        (layer, unit): values[UnitSelection({layer: [unit]}).gather(named, model=model)].sum()
        for layer, units in UNITS.items()
        for unit in units
    }


def best(scores, count):
    chosen: dict = {}
    for layer, unit in sorted(scores, key=lambda unit: -scores[unit])[:count]:
        chosen.setdefault(layer, []).append(unit)
    return UnitSelection(chosen)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_scores_of_units(mlp, per_parameter):
    score = by_unit(gradient(mlp, FORGET).square(), mlp)
    if not per_parameter:
        assert run(mlp, "gradient", n_units=3).selection == best(score, 3)
        return
    score = {unit: value / SIZES[unit[0]] for unit, value in score.items()}
    layer, unit = max(score, key=score.get)
    chosen = run(mlp, "gradient", max_parameters=SIZES[layer]).selection
    assert chosen == UnitSelection({layer: [unit]})


def with_dead_units(mlp):
    """Unit 2 of the first layer goes nowhere; unit 1 of the second is constant."""
    model = copy.deepcopy(mlp)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
        model[2].weight[1] = 0
        model[4].weight[:, 1] = 0
    return model


def test_dead_units_are_left_out(mlp):
    model = with_dead_units(mlp)
    with pytest.warns(UserWarning, match="n_units is 14, and only 12 units can be") as caught:
        result = run(model, "gradient", n_units=14, weight_decay=0.0)
    assert caught[0].filename == __file__
    units = result.selection.units
    assert 2 not in units["0"]
    assert 1 not in units["2"]
    result = run(model, "lfoci")
    assert result.n_dead == 1  # the other one moves, though for nothing
    assert 1 not in result.selection.units.get("2", ())


def test_no_gradient_is_no_ranking(mlp):
    def flat(outputs, targets):
        return outputs.mean() * 0

    with pytest.raises(ValueError, match="selection='gradient' finds no unit: the gradient"):
        unlearn(mlp, FORGET, RETAIN, flat, selection="gradient", n_units=1, weight_decay=0.0)


def test_a_new_rule_is_a_function_and_an_entry(mlp, monkeypatch):
    def heads(question):
        units = [unit for unit in question.candidates.units if unit[0] == "4"]
        return select.Choice(question.take(units), len(question.candidates.units))

    monkeypatch.setitem(select.RULES, "heads", select.Rule(heads, "optional"))
    assert run(mlp, "heads").selection == UnitSelection({"4": range(3)})
    assert run(mlp, "heads", n_units=2).selection == UnitSelection({"4": [0, 1]})
    assert Settings.from_dict(Settings(selection="heads").to_dict()).selection == "heads"


def test_candidates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    options = {"damping": 1.0, "n_units": 1}
    assert run(model, "random", **options).n_units == 15
    result = run(model, "random", candidates="weights", **options)
    assert result.n_units == 9
    result = run(model, "full", candidates=("1", "3"), damping=1.0)
    assert result.selection == UnitSelection({"1": range(6), "3": range(3)})
    norms = nn.Sequential(nn.LayerNorm(4), nn.Flatten()).double()
    with pytest.raises(ValueError, match="among linear and convolution layers"):
        run(norms, "random", candidates="weights", n_units=1)


def test_rows_of_the_foci_table(mlp, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append(recorded(*args, **kwargs))
        return seen[-1]

    recorded = select.record
    monkeypatch.setattr(select, "record", spy)
    for rows, n in (("batch", 50), ("samples", 300)):
        run(mlp, "lfoci", foci_rows=rows, n_perturbations=50)
        assert len(seen[-1].losses) == n


def test_cheap_is_one_unit_after_the_other(mlp):
    model, units = mlp, UnitSelection({})
    for _ in range(3):
        result = run(model, "cheap", n_units=1)
        assert len(result.selection) == 1
        model, units = result.model, units | result.selection
    together = run(mlp, "cheap", n_units=3)
    assert torch.equal(vector(together.model), vector(model))
    assert together.selection == units
    assert together.attempts == 3
    assert together.solve_residual < 1e-12  # of three solves, by Cholesky


def test_cheap_takes_back_a_later_unit_alone(mlp):
    """The selection has only what was changed, and the guard counts from the start."""
    options = {"damping": 1e-4, "weight_decay": 0.0, "n_units": 6, "score": minus_loss}
    free = harm(mlp, selection="cheap", max_drop=100.0, **options)
    total = free.guard.before - free.guard.after
    assert total > 0
    kept = run(mlp, "cheap", max_drop=total / 2, **options)
    assert kept.skipped == ()
    assert 0 < len(kept.selection)
    assert kept.guard.before - kept.guard.after <= total / 2
    changed = vector(kept.model) != vector(mlp)
    assert int(changed.sum()) == kept.n_parameters


# ---------------------------------------------------------------------------------------------
# Which samples


class Counting(Dataset):
    """Counts how often its samples are read, and can have other ones changed."""

    def __init__(self, data, changed=()):
        self.data, self.changed, self.reads = data, set(changed), [0] * len(data[0])

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, k):
        self.reads[k] += 1
        x, y = self.data[0][k], self.data[1][k]
        return (x + 5.0, (y + 1) % 3) if k in self.changed else (x, y)


def test_only_some_samples_are_read(mlp):
    data = make_data(700)
    forget, retain = split(data)
    options = {"n_curvature": 40, "n_monitor": 15, "damping": 0.5, "max_drop": 1.0}

    def results(changed=(), seed=0, **more):
        dataset = Counting(retain, changed)
        result = unlearn(mlp, forget, dataset, F.cross_entropy, seed=seed, **options | more)
        return result, dataset

    result, dataset = results(max_drop=None)
    assert result.n_monitored == 15
    probed = {0, *range(0, 694, 694 // 32)}
    read = {k for k, count in enumerate(dataset.reads) if count} - probed
    assert 30 <= len(read) <= 40
    assert max(dataset.reads) <= 8  # of the 32 by checks, and 0, by which memory is estimated, too
    assert max(dataset.reads[k] for k in read) <= 2
    # All others may be anything.
    others = [k for k in range(694) if not dataset.reads[k]]
    again, _ = results(others, max_drop=None)
    assert torch.equal(vector(again.model), vector(result.model))
    assert again.loss_retain == result.loss_retain
    # The seed draws them.
    other, other_dataset = results(seed=1, max_drop=None)
    assert other_dataset.reads != dataset.reads
    assert not torch.equal(vector(other.model), vector(result.model))
    # The guard looks at samples that the step has not read, at most 1000.
    guarded, dataset = results()
    assert torch.equal(vector(guarded.model), vector(result.model))
    assert sum(dataset.reads) <= 694 + 3 * 32 + 40


def test_the_guard_reads_other_samples(mlp):
    data = make_data(1300)
    forget, retain = split(data)
    dataset = Counting(retain)
    options = {"n_curvature": 50, "n_monitor": 10, "damping": 0.5, "max_drop": 0.5}
    unlearn(mlp, forget, dataset, F.cross_entropy, **options)
    assert sum(count > 0 for count in dataset.reads) <= 1000 + 50 + 33
    assert sum(dataset.reads) <= 1000 + 50 + 3 * 32 + 38


def test_monitored_are_at_most_those_that_are_read(mlp):
    assert run(mlp, n_curvature=20).n_monitored == 20
    assert run(mlp, n_curvature=20, n_monitor=1000).n_monitored == 20
    assert run(mlp, n_monitor=7).n_monitored == 7
    assert run(mlp).n_monitored == 74


def test_computation_in_another_dtype(mlp):
    single = copy.deepcopy(mlp).float()
    forget, retain = ((x.float(), y) for x, y in (FORGET, RETAIN))
    result = unlearn(
        single, forget, retain, F.cross_entropy, dtype=DOUBLE, damping=0.01, rtol=1e-12
    )
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    double = (
        tuple(t.double() if t.is_floating_point() else t for t in d) for d in (forget, retain)
    )
    exact = unlearn(
        copy.deepcopy(single).double(), *double, F.cross_entropy, damping=0.01, rtol=1e-12
    )
    assert torch.equal(vector(result.model), vector(exact.model).float())


# ---------------------------------------------------------------------------------------------
# The step


def tilted_minimiser(w0, data, tilt):
    """Of the objective on data less tilt . w, by Newton's method."""
    model = copy.deepcopy(w0)
    flat = vector(model)

    def value(w):
        weight, bias = w[:-3].view(3, -1), w[-3:]
        loss = F.cross_entropy(F.linear(data[0], weight, bias), data[1])
        return loss + WEIGHT_DECAY / 2 * w.square().sum() - tilt @ w

    for _ in range(30):
        g = torch.autograd.functional.jacobian(value, flat)
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(value, flat), g)
    assert g.norm() < 1e-13
    return flat


@pytest.mark.parametrize("which", ["removal", "residual"])
def test_repeated_steps_from_training_that_was_stopped(which):
    """They keep the gradient that training had left, or take it out."""
    early = logistic(iterations=6)
    left = gradient(early, TRAIN)
    assert left.norm() > 1e-3
    tilt = left * 80 / 74 if which == "removal" else 0 * left
    expected = tilted_minimiser(early, RETAIN, tilt)
    options = {"gradient": which, "damping": 0.0}
    result = run(early, steps=8, curvature="hessian", **options)
    assert (vector(result.model) - expected).abs().max() < 1e-9
    result = run(early, update="gradient", steps=400, learning_rate=1.0, **options)
    assert (vector(result.model) - expected).norm() < 0.1 * (vector(early) - expected).norm()


@pytest.mark.parametrize("which", ["removal", "residual"])
def test_gradient_steps(mlp, which):
    result = run(mlp, update="gradient", gradient=which, learning_rate=0.3)
    step = gradient(mlp, FORGET) * 6 / 74 if which == "removal" else -gradient(mlp, RETAIN)
    torch.testing.assert_close(vector(result.model), vector(mlp) + 0.3 * step)
    assert (result.solve_method, result.solve_iterations) == ("gradient", 1)
    assert math.isnan(result.solve_residual)


@pytest.mark.parametrize("curvature", ["secant", "gauss_newton"])
def test_no_gradient_is_no_step(curvature):
    model = with_dead_units(untrained())
    options = {"selection": UnitSelection({"0": [2]}), "weight_decay": 0.0, "damping": 0.1}
    result = unlearn(model, FORGET, RETAIN, F.cross_entropy, curvature=curvature, **options)
    assert result.step_norm == 0
    assert torch.equal(vector(result.model), vector(model))


def test_secant_along_the_gradient(mlp):
    """One pair: (y y^T / s.y + shift) x = g, with s along g."""
    result = run(mlp, curvature="secant", damping=0.1)
    g = gradient(mlp, FORGET) * 6 / 74
    s = g * (0.01 * vector(mlp).norm() / g.norm())
    moved = copy.deepcopy(mlp)
    decayless = functools.partial(F.cross_entropy)
    differences = []
    for sign in (0.0, 1.0):
        nn.utils.vector_to_parameters(vector(mlp) + sign * s, moved.parameters())
        parts = torch.autograd.grad(
            decayless(moved(RETAIN[0]), RETAIN[1]), list(moved.parameters())
        )
        differences.append(torch.cat([p.flatten() for p in parts]))
    y = differences[1] - differences[0]
    matrix = y[:, None] * y / (s @ y) + (WEIGHT_DECAY + 0.1) * torch.eye(len(y))
    expected = torch.linalg.solve(matrix, g)
    got = vector(result.model) - vector(mlp)
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert result.solve_method == "woodbury"


@pytest.mark.parametrize("form", ["tensors", "dataset"])
def test_sequential_is_a_loop(mlp, form):
    forget = tuple(t[:3] for t in FORGET)
    model = mlp
    for k in range(3):
        one = tuple(t[k : k + 1] for t in forget)
        rest = tuple(torch.cat([r, f[k + 1 :]]) for r, f in zip(RETAIN, forget, strict=True))
        model = unlearn(model, one, rest, F.cross_entropy, damping=0.1).model
    wrap = (lambda data: data) if form == "tensors" else (lambda data: TensorDataset(*data))
    result = unlearn(
        mlp, wrap(forget), wrap(RETAIN), F.cross_entropy, damping=0.1, order="sequential"
    )
    torch.testing.assert_close(vector(result.model), vector(model), rtol=1e-10, atol=1e-12)
    assert result.attempts == 3


def test_sequential_reads_the_retained_samples_once(mlp):
    dataset = Counting(make_data(700))
    result = unlearn(
        mlp,
        FORGET,
        dataset,
        F.cross_entropy,
        order="sequential",
        n_curvature=30,
        max_drop=1.0,
        damping=0.5,
    )
    assert result.attempts == 6
    assert sum(dataset.reads) <= 700 + 3 * 32 + 38


# ---------------------------------------------------------------------------------------------
# Guard and repair


def test_harm_is_taken_back():
    """Retries with ten times the damping; then the weights are what they were, bit for bit."""
    model = untrained()  # where undamped steps go astray
    before = vector(model)
    # In float32, which has not all bits of the weights.
    options = {"damping": 1e-6, "dtype": torch.float32, "max_drop": 0.0, "weight_decay": 0.0}
    harmful = {"update": "gradient", "learning_rate": 1e4}
    with pytest.warns(UserWarning, match="removal of 6 of 6 samples was taken back") as caught:
        result = run(model, retries=2, inplace=True, **options | harmful)
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert "in the last one by -0." in message
    assert "max_drop=0 allows" in message
    assert "need retraining" in message
    assert result.model is model
    assert torch.equal(vector(model), before)
    assert result.skipped == (0, 1, 2, 3, 4, 5)
    assert result.attempts == 3
    assert result.step_norm == 0
    assert result.guard.before == result.guard.after
    assert result.loss_forget.before == result.loss_forget.after
    assert "NOT REMOVED   6 samples" in repr(result)


def minus_loss(outputs, targets):
    """A score that tells more than accuracy."""
    return -F.cross_entropy(outputs, targets, reduction="none")


def harm(model, **options):
    """A step that nothing stops."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(model, **options)


def test_retries_have_ten_times_the_damping(mlp):
    drops = {}
    for damping in (1e-4, 1e-3, 1e-2, 1e-1):
        result = harm(mlp, damping=damping, max_drop=100.0, weight_decay=0.0, score=minus_loss)
        drops[damping] = result.guard.before - result.guard.after
    assert drops[1e-4] > drops[1e-3] > drops[1e-2] > drops[1e-1]
    most = (drops[1e-2] + drops[1e-3]) / 2
    result = run(mlp, damping=1e-4, max_drop=most, retries=3, weight_decay=0.0, score=minus_loss)
    assert result.attempts == 3
    assert result.damping == pytest.approx(1e-2)
    assert result.skipped == ()
    direct = run(mlp, damping=result.damping, weight_decay=0.0)
    assert torch.equal(vector(direct.model), vector(result.model))
    assert result.guard.before - result.guard.after <= most


@pytest.mark.parametrize("options", [{"learning_rate": 1e308}, {"learning_rate": 1e300}])
def test_a_step_to_infinity_is_taken_back(options, mlp):
    step = {"update": "gradient", "steps": 2, "repair_epochs": 1} | options
    with pytest.warns(UserWarning, match="was taken back: .* changed accuracy by .* -inf"):
        result = run(mlp, max_drop=0.5, retries=1, **step)
    assert result.attempts == 2
    assert torch.equal(vector(result.model), vector(mlp))


def test_validation_is_what_the_guard_watches(mlp):
    """Of the removed samples themselves accuracy falls, of others it does not."""
    options = {"damping": 1e-3, "max_drop": 0.01}
    strange = (FORGET[0], mlp(FORGET[0]).argmin(1))
    model = fit(untrained(), tuple(torch.cat(p) for p in zip(strange, RETAIN, strict=True)), 300)
    run_on = functools.partial(unlearn, model, strange, RETAIN, F.cross_entropy, **options)
    result = run_on(validation=RETAIN, damping=0.01, max_drop=0.1)
    assert result.skipped == ()
    assert result.loss_forget.after > result.loss_forget.before
    assert result.guard.before == (model(RETAIN[0]).argmax(1) == RETAIN[1]).double().mean()
    with pytest.warns(UserWarning, match="taken back"):
        result = run_on(validation=strange)
    assert len(result.skipped) == 6
    # A score that always is content, and one that never is.
    with pytest.warns(UserWarning, match="raised the mean loss of the samples that the guard"):
        result = run_on(validation=strange, score=lambda outputs, targets: torch.ones(len(targets)))
    assert result.skipped == ()
    assert result.guard == (1.0, 1.0)
    with pytest.warns(UserWarning, match="it changed the score by"):
        run_on(score=lambda outputs, targets: -(outputs - model(RETAIN[0])).abs().sum(1))


def test_without_accuracy_the_guard_watches_the_loss():
    torch.manual_seed(0)
    model = untrained()
    targets = torch.randn(80, 3, dtype=DOUBLE)
    forget, retain = split((TRAIN[0], targets))
    options = {"update": "gradient", "learning_rate": 100.0, "max_drop": 0.1}
    with pytest.warns(UserWarning, match="it changed minus the mean loss by .* by -"):
        result = unlearn(model, forget, retain, nn.MSELoss(), **options)
    assert result.guard.before == pytest.approx(-F.mse_loss(model(retain[0]), retain[1]).item())


def test_the_guard_counts_all_samples_of_a_sequence(mlp):
    """It has one limit, however many samples there are; those that would pass it are taken back."""
    options = {"order": "sequential", "damping": 0.003, "weight_decay": 0.0, "score": minus_loss}
    free = harm(mlp, max_drop=100.0, **options)
    most = (free.guard.before - free.guard.after) / 2
    assert most > 0
    with pytest.warns(UserWarning, match="of 6 samples was taken back"):
        result = run(mlp, max_drop=most, **options)
    assert 0 < len(result.skipped) < 6
    assert result.guard.before - result.guard.after <= most
    assert torch.any(vector(result.model) != vector(mlp))
    assert f"{6 - len(result.skipped)} of 80 samples removed" in repr(result)


def test_warnings_as_errors_leave_the_model_alone():
    model = untrained()
    before = vector(model).clone()
    forget, retain = split(TRAIN, 60)
    with pytest.raises(UserWarning, match="raised the mean loss"):
        unlearn(model, forget, retain, F.cross_entropy, damping=1e-5, inplace=True)
    assert torch.equal(vector(model), before)


def test_repair_is_sgd_on_the_selection(mlp):
    """Nesterov's, two full batches: warming up, and then on the cosine."""
    units = UnitSelection({"0": [1], "4": [0]})
    options = {"selection": units, "damping": 0.1}
    plain = run(mlp, **options).model
    more = {"repair_epochs": 2, "repair_learning_rate": 0.05, "repair_batch_size": 100}
    repaired = run(mlp, **more, **options)
    by_hand = copy.deepcopy(plain)
    velocity = 0.0
    for rate in (0.05 / 1.6, 0.05 * (1 + np.cos(np.pi * 0.4 / 1.4)) / 2):
        g = gradient(by_hand, RETAIN)
        named = {
            k: v.view(p.shape)
            for (k, p), v in zip(
                by_hand.named_parameters(),
                g.split([p.numel() for p in by_hand.parameters()]),
                strict=True,
            )
        }
        chosen = units.gather(named, model=by_hand)
        velocity = 0.9 * velocity + chosen
        units.add_(by_hand, chosen + 0.9 * velocity, alpha=-rate)
    torch.testing.assert_close(vector(repaired.model), vector(by_hand), rtol=1e-10, atol=1e-12)
    assert "repair" in repaired.seconds
    assert repaired.repaired
    assert not run(mlp, **options).repaired


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")
@pytest.mark.filterwarnings("ignore:the deletion costs accuracy")
def test_repair_only_where_the_step_did_harm(mlp):
    more = {"repair_epochs": 2, "repair_batch_size": 20, "repair_learning_rate": 0.02}
    gentle = run(mlp, damping=10.0, repair_drop=0.1, **more)
    assert not gentle.repaired
    assert torch.equal(vector(gentle.model), vector(run(mlp, damping=10.0).model))
    assert gentle.watched == "accuracy"
    harmful = {"damping": 1e-6, "weight_decay": 0.0}
    broken = run(mlp, **harmful, repair_drop=0.0)
    assert broken.guard.before - broken.guard.after > 0.05
    assert run(mlp, **harmful, repair_drop=0.0, **more).repaired
    # One that does harm itself is taken back.
    worse = run(mlp, **harmful, repair_drop=0.0, **more | {"repair_learning_rate": 1e3})
    assert not worse.repaired
    assert torch.equal(vector(worse.model), vector(broken.model))


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")
def test_harmful_steps_are_halved(mlp):
    start = vector(mlp)
    options = {"damping": 1e-6, "weight_decay": 0.0}
    whole = vector(run(mlp, **options).model) - start
    result = run(mlp, max_drop=0.02, halvings=12, **options)
    halvings = round(-math.log2(result.length))
    assert 1 <= halvings <= 12
    assert result.length == 0.5**halvings
    assert result.attempts == 1
    assert result.guard.before - result.guard.after <= 0.02
    got = vector(result.model) - start
    torch.testing.assert_close(got, whole * result.length, rtol=1e-9, atol=1e-12)
    assert f"{result.length:.3g} of the step" in repr(result)
    longer = start + 2 * result.length * whole
    again = copy.deepcopy(mlp)
    nn.utils.vector_to_parameters(longer, again.parameters())
    right = (again(RETAIN[0]).argmax(1) == RETAIN[1]).double().mean().item()
    assert result.guard.before - right > 0.02  # one halving fewer was not enough


@pytest.mark.parametrize("outputs", ["tensor", "dict", "scalar"])
def test_output_damping_holds_the_outputs(mlp, outputs):
    """(J^T (H + d I) J / N + lambda I)^-1 of the removal gradient, formed densely."""
    model, loss_fn, forget, retain = mlp, F.cross_entropy, FORGET, RETAIN
    if outputs == "dict":

        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = copy.deepcopy(mlp)

            def forward(self, x):
                return {"logits": self.net(x)}

        model = Named()
        loss_fn = lambda z, y: F.cross_entropy(z["logits"], y)  # noqa: E731
    elif outputs == "scalar":
        model = nn.Sequential(copy.deepcopy(mlp)[:4], nn.Linear(5, 1).double(), nn.Flatten(0))
        loss_fn = F.mse_loss
        forget, retain = ((x, y.double()) for x, y in (FORGET, RETAIN))
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    w = vector(model)

    def run_with(weights):
        parts = weights.split([s.numel() for s in shapes])
        given = {k: v.view(s) for k, v, s in zip(names, parts, shapes, strict=True)}
        z = torch.func.functional_call(model, given, (retain[0],))
        return z["logits"] if outputs == "dict" else z.reshape(len(z), -1)

    J, z, damping = torch.func.jacrev(run_with)(w), run_with(w), 0.3
    if outputs == "scalar":
        H = torch.full((len(z), 1, 1), 2.0, dtype=DOUBLE)
    else:
        p = z.softmax(1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    H = H + damping * torch.eye(H.shape[1], dtype=DOUBLE)
    G = torch.einsum("nia,nij,njb->ab", J, H, J) / len(z)
    G += WEIGHT_DECAY * torch.eye(len(w), dtype=DOUBLE)
    each = torch.autograd.grad(loss_fn(model(forget[0]), forget[1]), list(model.parameters()))
    removal = torch.cat([g.flatten() for g in each]) + WEIGHT_DECAY * w
    removal *= len(forget[1]) / len(retain[1])
    options = {"damping": 0.0, "output_damping": damping, "curvature": "gauss_newton"}
    result = unlearn(model, forget, retain, loss_fn, **options)
    step = vector(result.model) - w
    torch.testing.assert_close(step, torch.linalg.solve(G, removal), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"learning_rate": 9.0},
            "learning_rate=9.0 belongs to update='gradient'; update is 'newton'",
        ),
        (
            {"update": "gradient", "rtol": 0.1},
            "rtol=0.1 belongs to update='newton'; update is 'gradient'",
        ),
        ({"max_drop": None, "halvings": 3}, "halvings=3 belongs to a guard, and max_drop is None"),
        ({"max_drop": None, "retries": 3}, "retries=3 belongs to a guard, and max_drop is None"),
        ({"finish": 5}, "finish=5 belongs to calibrate=True.*this deletion is not calibrated"),
        ({"control_groups": 8}, "control_groups=8 belongs to calibrate=True"),
        ({"max_rise": 0.2}, "max_rise=0.2 belongs to calibrate=True"),
    ],
)
def test_options_without_effect_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Settings.preset("recommended", **options)
    with pytest.raises(ValueError, match=match):
        Settings().replace(**options)


def test_output_damping_belongs_to_gauss_newton(mlp):
    for options in ({"curvature": "hessian"}, {"update": "gradient"}):
        with pytest.raises(ValueError, match="output_damping belongs to update='newton' with"):
            Settings(output_damping=0.1, **options)
        made = Settings.preset("recommended", **options)  # which has none, then
        assert made.output_damping == 0 < made.damping
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy, curvature="gauss_newton")
    with pytest.raises(ValueError, match="statistics hold a curvature without output_damping"):
        unlearn(mlp, FORGET, None, F.cross_entropy, statistics=kept, output_damping=0.1)
    result = unlearning.unlearn(mlp, FORGET, None, F.cross_entropy, statistics=kept)
    assert result.settings.output_damping == 0


def test_steps_that_fall_short_are_lengthened(monkeypatch):
    """Until the samples that the step has not read notice, as bisection finds it."""
    forget, retain = split(make_data(400))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 3)).double()
    fit(model, (torch.cat([forget[0], retain[0]]), torch.cat([forget[1], retain[1]])), 60)
    start = vector(model)
    options = {"damping": 1e-5, "n_curvature": 200, "max_iterations": 4, "rtol": 0.0, "seed": 5}

    def run(**more):
        return unlearn(model, forget, retain, F.cross_entropy, **options | more)

    plain = run()
    whole = vector(plain.model) - start
    assert 0.1 < plain.solve_residual < 1
    order = np.random.default_rng([5, 0]).permutation(len(retain[1]))
    unread = tuple(t[np.sort(order[200:])] for t in retain)

    def rise(length):
        moved = copy.deepcopy(model)
        nn.utils.vector_to_parameters(start + length * whole, moved.parameters())
        with torch.no_grad():
            losses = [F.cross_entropy(m(unread[0]), unread[1]).item() for m in (moved, model)]
        return (losses[0] - losses[1]) / len(forget[1])

    assert 0 < rise(0.9) < rise(1.0) < rise(2.6) < rise(8.0)
    assert run(lengthen=rise(2.6)).length == 1  # the residual is below 1
    monkeypatch.setattr(guard, "_SHORT", 0.1)
    result = run(lengthen=rise(2.6))
    assert 2.5 <= result.length <= 2.6
    got = vector(result.model) - start
    torch.testing.assert_close(got, whole * result.length, rtol=1e-9, atol=1e-12)
    assert f"{result.length:.3g} of the step" in repr(result)
    assert run(lengthen=rise(0.9)).length == 1
    assert run(lengthen=1.01 * rise(8.0)).length == 8
    # What did harm is repaired, not lengthened; what was solved has the length it has.
    assert run(lengthen=1e9, repair_drop=0.0, validation=unread, score=minus_loss).length == 1
    assert run(lengthen=1e9, repair_drop=1.0, validation=unread, score=minus_loss).length == 8
    assert run(lengthen=1e9, max_iterations=None, rtol=1e-9).length == 1
    kept = TrainingStatistics.collect(logistic(), TRAIN, F.cross_entropy, curvature="gauss_newton")
    with pytest.raises(ValueError, match="lengthen need retained samples, and retain is None"):
        unlearn(logistic(), FORGET, None, F.cross_entropy, statistics=kept, lengthen=1.0)


def test_batch_norms_are_recalibrated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model(TRAIN[0])
    before = copy.deepcopy(model.state_dict())
    options = {"damping": 1.0, "n_recalibrate": 1000, "batch_size": 1000}
    for inplace in (False, True):
        given = copy.deepcopy(model)
        result = unlearn(given, FORGET, RETAIN, F.cross_entropy, inplace=inplace, **options)
        inside = result.model[0](RETAIN[0])
        norm = result.model[1]
        torch.testing.assert_close(norm.running_mean, inside.mean(0).detach())
        torch.testing.assert_close(norm.running_var, inside.var(0).detach())
        assert norm.momentum == 0.1
        assert norm.training
        assert (given is result.model) == inplace
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    plain = unlearn(model, FORGET, RETAIN, F.cross_entropy, damping=1.0)
    assert torch.equal(plain.model[1].running_mean, model[1].running_mean)


# ---------------------------------------------------------------------------------------------
# Privacy


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # so much noise
def test_noise_on_every_trainable_parameter():
    torch.manual_seed(0)
    x, y = torch.randn(50, 100), torch.arange(50) % 3
    model = nn.Sequential(nn.Linear(100, 150), nn.Tanh(), nn.Linear(150, 3))
    model[2].bias.requires_grad_(False)
    data = split((x, y))
    options = {"selection": UnitSelection({"0": [5]}), "damping": 0.5, "weight_decay": 0.1}
    plain = unlearn(model, *data, F.cross_entropy, **options)
    first, second = (
        unlearn(model, *data, F.cross_entropy, epsilon=0.5, delta=1e-5, **options) for _ in range(2)
    )
    sigma = first.guarantee.sigma
    assert sigma > 0
    noise = [vector(result.model) - vector(plain.model) for result in (first, second)]
    assert torch.equal(first.model[2].bias, model[2].bias)
    for each in noise:
        each = each[:-3]
        assert (each != 0).all()
        # 15,600 coordinates: six standard errors, as nobody may seed this noise
        assert each.std().item() == pytest.approx(sigma, rel=6 / math.sqrt(2 * len(each)))
        assert abs(each.mean().item()) < 6 * sigma / math.sqrt(len(each))
    correlation = torch.corrcoef(torch.stack([n[:-3] for n in noise]))[0, 1].item()
    assert abs(correlation) < 6 / math.sqrt(15_600)  # fresh, whatever the seed
    assert first.guarantee.kind == "heuristic"
    assert any("changed 101 of 15600" in reason for reason in first.guarantee.reasons)
    assert plain.guarantee.kind == "none"
    # What is reported is of the weights with noise.
    with torch.no_grad():
        loss = F.cross_entropy(first.model(data[0][0]), data[0][1]).item()
    assert first.loss_forget.after == pytest.approx(loss, rel=1e-4)


CONSTANTS = logistic_constants(6.0, 3)
CERTIFIED = {
    "update": "certified",
    "epsilon": 1.0,
    "delta": 1e-5,
    "lipschitz": CONSTANTS.lipschitz,
    "hessian_lipschitz": CONSTANTS.hessian_lipschitz,
    "radius": math.inf,
    "strong_convexity": WEIGHT_DECAY,
    "gradient_bound": 1e-3,
}


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_certified(linear, preset):
    options = {"preset": preset, "weight_decay": WEIGHT_DECAY, **CERTIFIED}
    result = unlearning.unlearn(linear, FORGET, RETAIN, F.cross_entropy, **options)
    assert result.guarantee.kind == "certified"
    assert result.guarantee.reasons == ()
    assert result.settings.candidates == "all"
    assert (vector(result.model) != vector(linear)).all()
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"selection": UnitSelection({"": [0]})}, "the step changed 5 of 15 trainable"),
        ({"curvature": "gauss_newton"}, "curvature='gauss_newton'"),
        ({"damping": 0.1}, "damping=0.1"),
        ({"steps": 2}, "steps=2"),
        ({"n_curvature": 20}, "n_curvature=20"),
        ({"order": "sequential"}, "order='sequential'"),
        ({"repair_epochs": 1}, "repair_epochs=1"),
        ({"max_drop": 0.5}, "max_drop: a guard looks at the data"),
        ({"lengthen": 0.5}, "lengthen: the length of the step depends on the data"),
        ({"lipschitz": None}, "lipschitz is not given"),
        ({"radius": 1e-3}, "above radius=0.001"),
        ({"gradient_bound": 1e-30}, "training_gradient_norm is .* above gradient_bound=1e-30"),
        ({"n_monitor": 10}, "training_gradient_norm is nan"),
    ],
)
def test_certified_is_refused_by_reason(linear, options, reason):
    with pytest.raises(ValueError, match=f"is not possible here: .*{reason}.*update='newton'"):
        unlearning.unlearn(
            linear,
            FORGET,
            RETAIN,
            F.cross_entropy,
            weight_decay=WEIGHT_DECAY,
            **CERTIFIED | options,
        )


def test_a_network_is_not_certified(mlp):
    match = "is not possible here: the model is not linear in its trainable parameters"
    for weight_decay in (1.0, 1e-6):  # also where the Hessian is indefinite
        options = CERTIFIED | {"gradient_bound": 1e3, "weight_decay": weight_decay}
        with pytest.raises(ValueError, match=match):
            unlearning.unlearn(mlp, FORGET, RETAIN, F.cross_entropy, **options)


def test_certified_needs_noise(linear):
    with pytest.raises(ValueError, match="update='certified' needs epsilon and delta"):
        run(linear, update="certified")


def test_noise_on_what_was_not_removed_says_so(mlp):
    with (
        pytest.warns(UserWarning, match="taken back"),
        pytest.warns(UserWarning, match="includes the noise for epsilon=1"),
    ):
        result = run(
            mlp,
            update="gradient",
            learning_rate=1e3,
            max_drop=0.0,
            epsilon=1.0,
            delta=1e-5,
        )
    assert result.guarantee.kind == "heuristic"
    assert any("were not removed" in reason for reason in result.guarantee.reasons)


# ---------------------------------------------------------------------------------------------
# Statistics of training


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian", "fisher"])
def test_the_first_request_from_statistics_is_exact(mlp, curvature, tmp_path):
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy, curvature=curvature)
    assert (kept.n, kept.kind, len(kept.matrix)) == (80, curvature, 83)
    kept.save(tmp_path / "statistics.pt")
    loaded = TrainingStatistics.load(tmp_path / "statistics.pt")
    options = {"curvature": curvature, "damping": 1.0}
    for selection in ("full", UnitSelection({"2": [1, 3], "0": [4]})):
        expected = run(mlp, selection, **options)
        for retain in (None, RETAIN):
            result = unlearn(
                mlp,
                FORGET,
                retain,
                F.cross_entropy,
                statistics=loaded,
                selection=selection,
                **options,
            )
            new = vector(result.model)
            torch.testing.assert_close(new, vector(expected.model), rtol=1e-10, atol=1e-12)
        assert result.n_retain == 74
        assert "saved at training time" in result.curvature_plan
    # With the removed samples out, they are what the others alone would have given.
    without = loaded.without(mlp, F.cross_entropy, FORGET)
    alone = TrainingStatistics.collect(mlp, RETAIN, F.cross_entropy, curvature=curvature)
    assert (without.n, without.kind) == (74, curvature)
    torch.testing.assert_close(without.matrix, alone.matrix, rtol=1e-10, atol=1e-12)


def two_requests(model, data, loss_fn, curvature):
    """Six and six samples; from statistics, and with the retained samples given."""
    options = {"curvature": curvature, "damping": 0.0}
    kept = TrainingStatistics.collect(model, data, loss_fn, curvature=curvature)
    by_statistics = by_data = model
    for m in (0, 6):
        forget = tuple(t[m : m + 6] for t in data)
        retain = tuple(t[m + 6 :] for t in data)
        new = unlearn(by_statistics, forget, None, loss_fn, statistics=kept, **options).model
        kept = kept.without(by_statistics, loss_fn, forget)
        by_statistics = new
        by_data = unlearn(by_data, forget, retain, loss_fn, **options).model
    return vector(by_statistics), vector(by_data)


def test_a_second_request_is_exact_for_squared_errors_only(linear):
    torch.manual_seed(2)
    data = TRAIN[0], torch.randn(80, 3, dtype=DOUBLE)
    model = fit(nn.Linear(4, 3).double(), data, loss_fn=F.mse_loss)
    got, expected = two_requests(model, data, F.mse_loss, "hessian")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    # The weights have moved, the matrix has not.
    got, expected = two_requests(linear, TRAIN, F.cross_entropy, "hessian")
    error, step = (got - expected).norm(), (expected - vector(linear)).norm()
    assert 1e-6 * step < error < 0.5 * step


def test_statistics_are_saved_whole_or_not_at_all(mlp, tmp_path, monkeypatch):
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy)
    kept.save(tmp_path / "statistics.pt")

    def cut_short(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="no space left"):
        kept.save(tmp_path / "statistics.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.pt"]
    loaded = TrainingStatistics.load(tmp_path / "statistics.pt")
    torch.testing.assert_close(loaded.matrix, kept.matrix, rtol=0, atol=0)


def test_pairs_of_the_last_epochs(tmp_path):
    model = untrained()
    snapshots = []
    for iterations in (5, 5):
        fit(model, TRAIN, iterations)
        with torch.no_grad():  # which must not matter
            snapshots.append(TrainingStatistics.snapshot(model, TRAIN, F.cross_entropy))
    torch.testing.assert_close(
        torch.cat([g.flatten() for g in snapshots[1][1].values()]),
        gradient(model, TRAIN) - WEIGHT_DECAY * vector(model),
    )
    kept = TrainingStatistics.from_epochs(snapshots, 80)
    kept.save(tmp_path / "pairs.pt")
    kept = TrainingStatistics.load(tmp_path / "pairs.pt")
    assert (kept.n, kept.kind, len(kept.steps)) == (80, "secant", 1)

    # The removed samples' part is taken out of the change of the gradient.
    others = [
        TrainingStatistics.snapshot(moved, RETAIN, F.cross_entropy)
        for moved in (at(model, snapshots[0][0]), model)
    ]
    expected = flatten(others[1][1]) - flatten(others[0][1])
    without = kept.without(model, F.cross_entropy, FORGET)
    assert without.n == 74
    torch.testing.assert_close(flatten(without.changes[0]), expected, rtol=1e-9, atol=1e-12)
    operator = kept.operator(model, F.cross_entropy, FORGET, UnitSelection.all(model))
    step, change = (
        UnitSelection.all(model).gather(one, model=model)
        for one in (kept.steps[0], without.changes[0])
    )
    torch.testing.assert_close(operator @ step, change, rtol=1e-8, atol=1e-11)
    result = unlearn(
        model, FORGET, None, F.cross_entropy, statistics=kept, curvature="secant", damping=0.5
    )
    assert result.step_norm > 0
    assert result.loss_forget.after > result.loss_forget.before


def test_pairs_of_many_epochs_lose_what_is_removed_each_where_it_was():
    model = untrained()
    whole, retained = [], []
    for _ in range(4):
        fit(model, TRAIN, 4)
        whole.append(TrainingStatistics.snapshot(model, TRAIN, F.cross_entropy))
        retained.append(TrainingStatistics.snapshot(model, RETAIN, F.cross_entropy))
    kept = TrainingStatistics.from_epochs(whole, 80)
    expected = TrainingStatistics.from_epochs(retained, 74)
    assert len(kept.steps) == 3
    assert min(flatten(step).norm() for step in kept.steps) > 1e-3
    with torch.no_grad():  # the model goes on, the pairs stay where they are
        moved = copy.deepcopy(model)
        for p in moved.parameters():
            p.mul_(1.5)
    for given in (model, moved):
        without = kept.without(given, F.cross_entropy, FORGET)
        for got, right in zip(without.changes, expected.changes, strict=True):
            torch.testing.assert_close(flatten(got), flatten(right), rtol=1e-9, atol=1e-12)


def test_statistics_stay_at_their_weights(mlp, tmp_path):
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy)
    expected = kept.without(mlp, F.cross_entropy, FORGET).matrix
    moved = copy.deepcopy(mlp)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.5)
    kept.save(tmp_path / "statistics.pt")
    loaded = TrainingStatistics.load(tmp_path / "statistics.pt")
    for one in (kept, loaded, dataclasses.replace(kept, weights=None).at(mlp)):
        got = one.at(moved).without(moved, F.cross_entropy, FORGET)
        torch.testing.assert_close(got.matrix, expected, rtol=0, atol=0)
        # By hand, request after request.
        first, second = (tuple(t[part] for t in FORGET) for part in (slice(2), slice(2, None)))
        got = one.without(mlp, F.cross_entropy, first).without(moved, F.cross_entropy, second)
        torch.testing.assert_close(got.matrix, expected, rtol=1e-10, atol=1e-12)
    # A file of an earlier version has no weights: then the model's count.
    state = torch.load(tmp_path / "statistics.pt", weights_only=True)
    del state["weights"]
    torch.save(state, tmp_path / "statistics.pt")
    old = TrainingStatistics.load(tmp_path / "statistics.pt")
    got = old.without(mlp, F.cross_entropy, FORGET)
    torch.testing.assert_close(got.matrix, expected, rtol=0, atol=0)
    assert not torch.allclose(old.without(moved, F.cross_entropy, FORGET).matrix, expected)
    last = UnitSelection({"4": [0, 1, 2]})
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy, selection=last)
    wide = copy.deepcopy(mlp)
    wide[0], wide[2] = nn.Linear(4, 7).double(), nn.Linear(7, 5).double()
    with pytest.raises(ValueError, match=r"another model: their '0.weight' has shape \(6, 4\)"):
        kept.without(wide, F.cross_entropy, FORGET)


def test_statistics_of_a_model_that_steps_unit_by_unit(mlp, monkeypatch):
    """Every step is with the matrix at the weights of the statistics."""
    kept = TrainingStatistics.collect(mlp, TRAIN, F.cross_entropy)
    made = []
    operator = TrainingStatistics.operator

    def record(self, model, loss_fn, forget, selection, **options):
        made.append((selection, operator(self, model, loss_fn, forget, selection, **options)))
        return made[-1][1]

    monkeypatch.setattr(TrainingStatistics, "operator", record)
    monkeypatch.setattr(select, "CHEAP_THRESHOLD", -math.inf)
    old = dataclasses.replace(kept, weights=None)
    options = {"selection": "cheap", "n_units": 3, "damping": 0.1}
    unlearn(mlp, FORGET, None, F.cross_entropy, statistics=old, **options)
    assert len(made) > 1
    for selection, got in made:
        expected = operator(
            kept, mlp, F.cross_entropy, FORGET, selection, damping=0.1, weight_decay=WEIGHT_DECAY
        )
        torch.testing.assert_close(got.to_dense(), expected.to_dense(), rtol=0, atol=1e-14)


def flatten(named):
    return torch.cat([t.flatten() for t in named.values()])


def at(model, weights):
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.copy_(weights[name])
    return moved


def test_statistics_of_another_model_are_told_in_a_few_words(linear):
    kept = TrainingStatistics.collect(linear, TRAIN, F.cross_entropy)
    wide = nn.Sequential(
        nn.Linear(4, 3000), *(nn.Linear(3000 if k == 0 else 3, 3) for k in range(5))
    )
    with pytest.raises(ValueError, match="of another model or of another selection") as caught:
        kept.operator(wide.double(), F.cross_entropy, FORGET, UnitSelection.all(wide))
    message = str(caught.value)
    assert "no curvature of 3,015 of the 3,015 units that are asked for" in message
    assert "in '0', '1', '2' and 3 more" in message
    assert len(message) < 250


def test_statistics_that_do_not_fit(linear, mlp, tmp_path):
    kept = TrainingStatistics.collect(linear, TRAIN, F.cross_entropy)
    few = tuple(t[:20] for t in RETAIN)
    match = r"statistics are of 80 training samples; forget and retain have 6 \+ 20"

    def refuse(match, retain=None, model=linear, statistics=kept, **options):
        with pytest.raises(ValueError, match=match):
            unlearn(model, FORGET, retain, F.cross_entropy, statistics=statistics, **options)

    refuse(match, few)
    refuse("curvature='gauss_newton'; got curvature='hessian'", curvature="hessian")
    for options in ({"order": "sequential"}, {"steps": 2}, {"gradient": "residual"}):
        refuse("they serve one step", **options)
    refuse("update='gradient' does not use", update="gradient")
    refuse("the guard needs samples", max_drop=0.1)
    refuse("the guard needs samples", repair_drop=0.1)
    refuse("n_recalibrate and lengthen need retained samples", repair_epochs=1)
    refuse("retain is None: pass the retained", statistics=None)
    refuse("no curvature of [0-9]+ of the [0-9]+ units that are asked for, in '", model=mlp)
    for made in (kept, TrainingStatistics(80, "secant", None, None, [{}], [{}])):
        with pytest.raises(ValueError, match="of 80 training samples, and forget has 80"):
            made.without(linear, F.cross_entropy, TRAIN)
    (tmp_path / "text.pt").write_bytes(b"hello")
    torch.save({"format": 0}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match=f"{name} holds no training statistics"):
            TrainingStatistics.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        TrainingStatistics.load(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="at least two snapshots"):
        TrainingStatistics.from_epochs([], 80)
    with pytest.raises(ValueError, match="has 10,005 parameters and at most 8,192"):
        TrainingStatistics.collect(nn.Linear(2000, 5), TRAIN, F.cross_entropy)


def test_an_operator_from_statistics_stays_as_it_is_when_it_is_solved(linear):
    kept = TrainingStatistics.collect(linear, TRAIN, F.cross_entropy)
    everything = UnitSelection.all(linear)
    operator = kept.operator(linear, F.cross_entropy, FORGET, everything, damping=0.5)
    b = torch.ones(15, dtype=DOUBLE)
    for _ in range(2):
        torch.testing.assert_close(operator @ operator.solve(b).x, b)
    dense = operator.to_dense()
    assert torch.equal(operator.to_dense(), dense)


def test_statistics_are_of_evaluation_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    made = [
        TrainingStatistics.collect(model.train(mode), TRAIN, F.cross_entropy).matrix
        for mode in (True, False)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("most", [1, 100, 1 << 26])
def test_hashes_do_not_depend_on_how_samples_are_read(monkeypatch, most):
    monkeypatch.setattr("lcodec_ext._torch.samples._HASHED", most)
    parts = [
        torch.randn(9, 3, 2),
        torch.randn(9, 2).bfloat16(),
        torch.randn(9, 4).t().contiguous().t(),
        torch.rand(9) < 0.5,
        torch.empty(9, 0),
        torch.arange(9),
    ]
    cpu = torch.device("cpu")
    whole = as_samples(tuple(parts), "train", cpu, DOUBLE)
    lazy = as_samples(TensorDataset(*parts), "train", cpu, DOUBLE)
    expected = []
    for i in range(9):
        digest = hashlib.sha256()
        for part in parts:
            row = part[i].contiguous()
            digest.update(f"{row.dtype} {tuple(row.shape)};".encode())
            digest.update(row.flatten().view(torch.uint8).numpy().tobytes())
        expected.append(digest.hexdigest())
    assert whole.hashes() == lazy.hashes() == list(whole.each_hash()) == expected
    assert whole.hashes([7, 2]) == lazy.hashes([7, 2]) == [expected[7], expected[2]]
    assert whole.subset([4, 1, 3]).hashes() == [expected[k] for k in (4, 1, 3)]
    assert whole.hashes(slice(2, 5)) == expected[2:5]


# ---------------------------------------------------------------------------------------------
# Options of earlier versions


@pytest.mark.parametrize(
    "options",
    [
        {"selection": "last"},
        {"selection": "fisher_ratio", "n_units": 3},
        {"selection": "expected_decrease", "max_parameters": 0.5},
        {"update": "lbfgs"},
    ],
)
def test_withdrawn_options_load_and_are_not_used(mlp, options):
    recorded = Settings.preset("paper").to_dict() | options
    settings = Settings.from_dict(recorded)
    assert settings.to_dict() == recorded
    match = "was withdrawn.* Use (selection|update)="
    with pytest.raises(ValueError, match=match):
        unlearning.unlearn(mlp, FORGET, RETAIN, F.cross_entropy, preset=settings)
    with pytest.raises(ValueError, match=match):
        Settings.preset("recommended", **options)


def test_a_stream_with_withdrawn_options_resumes(mlp, tmp_path, monkeypatch):
    data = (mlp, TRAIN, F.cross_entropy)
    options = {"preset": Settings(), "selection": "fisher_ratio", "n_units": 2}
    with monkeypatch.context() as patch:  # as an earlier version did
        patch.setattr(unlearning.settings, "_check_used", lambda *_: None)
        unlearning.Unlearner(*data, directory=tmp_path / "old", **options).close()
    assert unlearning.verify_ledger(tmp_path / "old").ok
    with unlearning.Unlearner.resume(tmp_path / "old", *data) as stream:
        with pytest.raises(ValueError, match="selection='fisher_ratio' was withdrawn"):
            stream.remove([3])
        assert (stream.settings.selection, len(stream.ledger)) == ("fisher_ratio", 1)


# ---------------------------------------------------------------------------------------------
# Settings as data


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection": UnitSelection({"": [3], "a.b": [0, 2]})},
        {"selection": "random", "n_units": 3, "candidates": ("layer*", "head")},
        {"selection": "gradient", "max_parameters": 0.25, "candidates": "weights"},
        {"selection": "gradient", "max_parameters": 100},
        {"selection": "gradient", "max_parameters": 1.0},
        {"perturb": TokenReplacement(30, special_ids=(0, 1), n_tokens=2)},
        {"perturb": TokenReplacement(token_ids=[4, 7, 9], input_key=0)},
        {"dtype": torch.float64, "radius": math.inf},
        {"dtype": torch.float32, "radius": 3.0, "max_drop": 0.0},
        CERTIFIED,
        {
            "selection": "random",
            "n_units": np.int64(3),
            "damping": np.float32(0.5),
            "max_drop": np.float64(0.1),
            "seed": np.uint32(7),
        },
        {"selection": "random", "max_parameters": np.float64(0.5)},
    ],
)
@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_settings_go_through_json(preset, options):
    settings = Settings.preset(preset, **options)
    written = json.dumps(settings.to_dict(), allow_nan=False)
    again = Settings.from_dict(json.loads(written))
    assert again == settings
    assert again.to_dict() == settings.to_dict()
    assert type(again.max_parameters) is type(settings.max_parameters)  # 1 is not 1.0
    if again.perturb is not None:
        ids = torch.arange(2, 20).repeat(2, 1)
        data = (ids,) if settings.perturb.input_key == 0 else {"input_ids": ids}
        first, second = (
            next(iter(s.perturb(data, np.random.default_rng(0)).values()))
            if isinstance(data, dict)
            else s.perturb(data, np.random.default_rng(0))[0]
            for s in (settings, again)
        )
        assert torch.equal(first, second)


def test_an_unknown_option_is_told_the_nearest():
    """Short: 49 names hide the one that is meant."""
    for key, hint in (
        ("device", "everything runs where the model is: move the model"),
        ("lr", "the nearest are 'learning_rate', 'repair_learning_rate'; help"),
        ("zzz", "help"),
    ):
        with pytest.raises(TypeError, match=f"unknown option '{key}'; {hint}") as caught:
            Settings.preset("recommended", **{key: 1})
        assert len(str(caught.value)) < 200


def test_settings_that_cannot_be_read():
    def jitter(inputs, rng):
        return inputs

    values = Settings(perturb=jitter).to_dict()
    json.dumps(values)
    with pytest.raises(ValueError, match="perturb was a function.*jitter.*pass it again"):
        Settings.from_dict(values)
    with pytest.raises(ValueError, match="dtype must be one of 'float32', 'float64'"):
        Settings.from_dict({"dtype": "float16"})
    with pytest.raises(ValueError, match="preset must be one of 'recommended', 'paper'"):
        Settings.preset("best")
    with pytest.raises(TypeError, match="unknown option 'dampening'; is it 'damping'"):
        Settings().replace(dampening=1)


def test_options_of_a_preset_are_replaced_only_where_given():
    paper = Settings.preset("paper", damping=0.5)
    assert (paper.damping, paper.selection, paper.curvature) == (0.5, "lfoci", "secant")
    assert paper.replace(seed=3) == Settings.preset("paper", damping=0.5, seed=3)
    certified = Settings.preset("recommended", **CERTIFIED)
    assert (certified.curvature, certified.damping, certified.max_drop) == ("hessian", 0.0, None)


# ---------------------------------------------------------------------------------------------
# Samples


def test_sets_of_samples():
    assert random_samples(100, 7, seed=3) == random_samples(100, 7, seed=3)
    assert random_samples(100, 7, seed=3) != random_samples(100, 7, seed=4)
    drawn = random_samples(10, 10)
    assert drawn == list(range(10))
    drawn = random_samples(1000, 500)
    assert drawn == sorted(set(drawn))
    assert 0 <= drawn[0] <= drawn[-1] < 1000
    with pytest.raises(ValueError, match="m must be at most n.*m=4 and n=3"):
        random_samples(3, 4)

    labels = [2, 0, 2, 1]
    for kind in (list, np.array, torch.tensor):
        assert samples_of(kind(labels), 2) == [0, 2]
    assert samples_of(["ann", "bob", "ann"], "ann") == [0, 2]  # an identity
    with pytest.raises(ValueError, match="no sample has the label 3"):
        samples_of(labels, 3)
    with pytest.raises(ValueError, match="one entry per sample; got shape .2, 2."):
        samples_of([[1, 2], [3, 4]], 1)


class Texts(Dataset):
    """Of unequal length."""

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.texts = [torch.from_numpy(rng.integers(1, 9, rng.integers(2, 9))) for _ in range(n)]
        self.reads = 0

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, k):
        self.reads += 1
        return self.texts[k], int(self.texts[k].sum()) % 3


def padded(rows, length=None):
    ids = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    if length is not None:
        ids = F.pad(ids, (0, length - ids.shape[1]))
    return {"ids": ids, "labels": torch.tensor([row[1] for row in rows])}


class BagOfWords(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, ids):
        there = (ids > 0).double()[..., None]
        return self.head(torch.tanh((self.embed(ids) * there).sum(1) / there.sum(1)))


@pytest.mark.parametrize("options", [{}, {"n_curvature": 12}])
@pytest.mark.parametrize("order", ["batch", "sequential"])
def test_texts_of_unequal_length(order, options):
    """Each batch is padded by the loader's collate_fn, as far as it must be."""
    model = BagOfWords().double()
    forget, retain = Texts(4, 0), Texts(40, 1)
    options = {"order": order, "damping": 0.5, "batch_size": 8, **options}
    result = unlearn(
        model,
        DataLoader(forget, collate_fn=padded),
        DataLoader(retain, collate_fn=padded, shuffle=True),
        F.cross_entropy,
        **options,
    )
    whole = [
        padded(list(map(texts.__getitem__, range(len(texts)))), 9) for texts in (forget, retain)
    ]
    expected = unlearn(model, *whole, F.cross_entropy, **options)
    torch.testing.assert_close(vector(result.model), vector(expected.model), rtol=1e-9, atol=1e-12)


def test_tensors_of_unequal_length_in_a_sequence():
    forget, retain = (
        padded([texts[k] for k in range(len(texts))], length)
        for texts, length in ((Texts(4, 0), 10), (Texts(20, 1), 12))
    )
    with pytest.raises(ValueError, match="retain and forget must fit in one batch"):
        unlearn(
            BagOfWords().double(),
            forget,
            retain,
            F.cross_entropy,
            order="sequential",
            damping=0.5,
        )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda d: DataLoader(d, batch_sampler=[[0, 1], [2, 3]]), "sampler of retain, a list"),
        (lambda d: DataLoader(d, sampler=SequentialSampler(range(5))), "a SequentialSampler"),
        (lambda d: DataLoader(d, batch_size=None), "batch_size=None"),
    ],
)
def test_loaders_that_draw_other_samples_are_refused(make, match, linear):
    with pytest.raises(ValueError, match=match):
        unlearn(linear, FORGET, make(TensorDataset(*RETAIN)), F.cross_entropy)


def test_datasets_of_dicts(linear):
    class Dicts(Dataset):
        def __init__(self, data):
            self.data = data

        def __len__(self):
            return len(self.data[0])

        def __getitem__(self, k):
            return {"input": self.data[0][k], "labels": self.data[1][k]}

    expected = run(linear)
    for wrap in (Dicts, lambda data: {"input": data[0], "labels": data[1]}):
        result = unlearn(linear, wrap(FORGET), wrap(RETAIN), F.cross_entropy, damping=0.1)
        assert torch.equal(vector(result.model), vector(expected.model))
