"""Deletions with Kronecker-factored curvature: the step, its strength, statistics of any size."""

import copy
import dataclasses
import functools
import json
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lcodec_ext import unlearning
from lcodec_ext.curvature import (
    GaussNewtonOperator,
    ParameterSelection,
    UnitSelection,
    all_trainable,
)
from lcodec_ext.curvature.kronecker import EKFACOperator
from lcodec_ext.unlearning import Settings, TrainingStatistics, Unlearner, estimate, verify_ledger
from lcodec_ext.unlearning import calibrate as calibrating
from lcodec_ext.unlearning import statistics as keeping
from lcodec_ext.unlearning.solutions import plan_of

DOUBLE = torch.float64
DECAY = 0.02
PLAIN = functools.partial(unlearning.unlearn, preset=Settings(curvature="ekfac"))


def vector(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def samples(n, seed=0, classes=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, dtype=DOUBLE, generator=generator)
    noise = torch.randn(n, classes, dtype=DOUBLE, generator=generator)
    return x, (x[:, :classes] + 0.5 * noise).argmax(1)


TRAIN, HELD = samples(120), samples(60, 1)
FORGET, RETAIN = tuple(t[:8] for t in TRAIN), tuple(t[8:] for t in TRAIN)


def trained(build, data=TRAIN, loss_fn=cross_entropy, decay=DECAY):
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=300,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        size = sum(p.square().sum() for p in model.parameters())
        loss = loss_fn(model(data[0]), data[1]) + decay / 2 * size
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return model.eval()


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def linear():
    return nn.Linear(4, 2)


@pytest.fixture(scope="module")
def model():
    return trained(mlp)


@pytest.fixture(scope="module")
def ridge():
    """A linear model of two outputs by squared error, on which EK-FAC is exact."""
    x = TRAIN[0]
    generator = torch.Generator().manual_seed(3)
    y = x @ torch.randn(4, 2, dtype=DOUBLE, generator=generator)
    y = y + torch.randn(len(x), 2, dtype=DOUBLE, generator=generator)
    return trained(linear, (x, y), mse_loss), (x, y)


def gradient(model, data, decay=DECAY, loss_fn=cross_entropy):
    size = sum(p.square().sum() for p in model.parameters())
    loss = loss_fn(model(data[0]), data[1]) + decay / 2 * size
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# ---------------------------------------------------------------------------------------------
# The step


def test_a_linear_model_is_retrained_exactly(ridge):
    """There the factors are those of the Hessian: one step is the retrained model."""
    model, (x, y) = ridge
    result = PLAIN(model, (x[:8], y[:8]), (x[8:], y[8:]), mse_loss, weight_decay=DECAY, damping=0.0)
    expected = trained(linear, (x[8:], y[8:]), mse_loss)
    assert torch.allclose(vector(result.model), vector(expected), rtol=0, atol=1e-8)
    assert (vector(model) - vector(expected)).abs().max() > 1e-2
    assert result.solve_method == "ekfac"
    assert result.solve_residual < 1e-12


@pytest.mark.parametrize("units", [None, {"0": [1, 4], "2": [0, 2]}])
def test_the_step_is_that_of_the_matrix(model, units, monkeypatch):
    """On all parameters and on units, with the draws that the seed says."""
    chosen = UnitSelection({"0": range(6), "2": range(3)} if units is None else units)
    result = PLAIN(
        model,
        FORGET,
        RETAIN,
        cross_entropy,
        selection=chosen,
        weight_decay=DECAY,
        damping=0.05,
        seed=5,
    )
    matrix = EKFACOperator(
        model, cross_entropy, RETAIN, chosen, damping=0.05, weight_decay=DECAY, seed=5
    ).to_dense()
    parts = copy.deepcopy(model)
    nn.utils.vector_to_parameters(gradient(model, FORGET) * (8 / 112), parts.parameters())
    removal = chosen.gather(parts)
    moved = chosen.gather(result.model) - chosen.gather(model)
    assert torch.allclose(moved, torch.linalg.solve(matrix, removal), rtol=0, atol=1e-10)
    monkeypatch.setattr(keeping, "_FEW", 0)  # random combinations of outputs
    others = PLAIN(
        model,
        FORGET,
        RETAIN,
        cross_entropy,
        selection=chosen,
        weight_decay=DECAY,
        damping=0.05,
        seed=6,
    )
    assert not torch.equal(vector(others.model), vector(result.model))


# ---------------------------------------------------------------------------------------------
# The strength


@pytest.fixture(scope="module")
def overfit():
    """A network that loses much less on what it was trained on."""
    return trained(lambda: nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 3)), decay=1e-3)


def calibrated(model, **options):
    given = {"validation": HELD, "weight_decay": 1e-3, "curvature": "ekfac", "finish": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return unlearning.unlearn(model, FORGET, RETAIN, cross_entropy, **given | options)


def test_calibration_takes_no_product(overfit, monkeypatch):
    """The step is the closed form's at the strength that was found, times its length."""
    made = []
    monkeypatch.setattr(
        calibrating,
        "operator_of",
        lambda *given, make=calibrating.operator_of: made.append(make(*given)) or made[-1],
    )
    counted = []
    product = EKFACOperator._product
    monkeypatch.setattr(
        EKFACOperator, "_product", lambda self, V: counted.append(V.shape[1]) or product(self, V)
    )
    result = calibrated(overfit)
    found = result.calibration
    assert found.products == 0
    assert found.tried > 1
    assert counted == [1]  # the residual of the step that was taken
    assert result.solve_method == "ekfac"
    (operator,) = made
    chosen, parts = all_trainable(overfit), copy.deepcopy(overfit)
    nn.utils.vector_to_parameters(gradient(overfit, FORGET, 1e-3) * (8 / 112), parts.parameters())
    expected = found.length * operator.solve_shifted(chosen.gather(parts), found.strength)
    moved = chosen.gather(result.model) - chosen.gather(overfit)
    assert torch.allclose(moved, expected, rtol=1e-6, atol=1e-10)
    assert found.control <= max(found.unseen, 1.1 * found.trained) * (1 + 1e-9)


def test_without_damping_left_the_step_is_lengthened(overfit, monkeypatch):
    """The factors overestimate the curvature in some directions; groups say how far to go."""
    monkeypatch.setattr(calibrating._Trial, "_most_of_own", math.inf)
    harmless = {"max_rise": 1e9, "max_drop": None, "halvings": 0, "retries": 0}
    monkeypatch.setattr(calibrating.Harm, "broken", lambda *given, **options: "")
    monkeypatch.setattr(calibrating.Harm, "costs_accuracy", lambda self: False)
    solve = EKFACOperator.solve_coordinates
    monkeypatch.setattr(
        EKFACOperator, "solve_coordinates", lambda self, b, shift: 0.1 * solve(self, b, shift)
    )
    found = calibrated(overfit, **harmless).calibration
    assert found.length > 1
    assert found.stopped_by in ("control", "range")
    assert found.strength < 1e-2


def test_dampings_end_above_the_rounding(overfit, monkeypatch):
    """Without weight decay a factor of zero has no solution with as little damping as that."""
    dead = copy.deepcopy(overfit).float()
    with torch.no_grad():
        dead[2].weight[:, :9] = 0.0  # of these units nothing comes back
    tried = []
    solve = EKFACOperator.solve_coordinates
    monkeypatch.setattr(
        EKFACOperator,
        "solve_coordinates",
        lambda self, b, shift: (
            tried.append((shift, self.largest, self.least)) or solve(self, b, shift)
        ),
    )
    monkeypatch.setattr(calibrating._Trial, "_try", easy(calibrating._Trial._try))
    calibrated(dead, weight_decay=0.0, dtype=torch.float32)
    least = min(shift for shift, _, _ in tried)
    assert tried[0][2] < 1e-9
    assert 1e-6 * tried[0][1] < least < 1e-4 * tried[0][1]


def easy(attempt):
    """Tries to which nothing is objected, but for lengths."""

    def tried(self, damping, length=1.0):
        found = attempt(self, damping, length)
        return dataclasses.replace(found, objection="validation" if length > 1 else "")

    return tried


@pytest.mark.parametrize("memory", [10**9, 3 * 10**5])
def test_vectors_are_planned(memory):
    """There are fewer groups, never below four, where vectors take too much; and no steps."""
    settings = Settings.preset("recommended", curvature="ekfac", calibrate=True, control_groups=9)
    plan = plan_of(settings, 10_000, 4, memory)
    assert plan[:3] == ((9 if memory > 10**6 else 4), 0, 1)
    assert plan.bytes == 4 * 10_000 * (plan.groups + 1 + 4)


def test_limits_lower_what_counts(overfit):
    """Iterations are no part of it; a limit is kept, and the estimate has the factors' memory."""
    free = calibrated(overfit, max_memory=10**9)
    assert free.chosen == {}
    assert free.estimate.memory["factors"] > 0
    assert free.estimate.passes["calibration"]["gradient"] == 4 * 8 + 2 * 3 * 56
    assert "products" not in free.estimate.passes["calibration"]
    tight = calibrated(overfit, max_memory=free.estimate.memory["peak"] * 9 // 10)
    assert tight.chosen
    assert "max_iterations" not in tight.chosen
    plain = estimate(
        overfit, FORGET, RETAIN, cross_entropy, curvature="ekfac", damping=1.0, weight_decay=1e-3
    )
    assert plain.passes["curvature"] == {"gradient": 2 * 3 * 112}


# ---------------------------------------------------------------------------------------------
# Settings


def test_settings_go_through_json():
    made = Settings.preset("recommended", curvature="ekfac")
    assert (made.output_damping, made.max_iterations, made.lengthen) == (0.0, None, None)
    assert Settings.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_damping": 1e-3}, "output_damping belongs to update='newton' with curvature='ga"),
        ({"max_iterations": 10}, "max_iterations=10 belongs to a solve by iterations"),
        ({"rtol": 1e-3}, "rtol=0.001 belongs to a solve by iterations"),
        ({"selection": "step", "max_parameters": 0.1}, "take selection='step_units'"),
        ({"update": "certified", "epsilon": 1.0, "delta": 1e-5}, "it takes the exact 'hessian'"),
        ({"selection": ParameterSelection({"0.weight": [0, 5]})}, "single entries of rows"),
    ],
)
def test_what_has_no_factors_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        unlearning.unlearn(
            model,
            FORGET,
            RETAIN,
            cross_entropy,
            curvature="ekfac",
            weight_decay=DECAY,
            calibrate=False,
            **options,
        )


# ---------------------------------------------------------------------------------------------
# Statistics


def collected(model, data=TRAIN, loss_fn=cross_entropy, **options):
    return TrainingStatistics.collect(model, data, loss_fn, curvature="ekfac", **options)


def in_basis(statistics):
    """The eigenvectors of all blocks as columns, for a model whose blocks are its layers."""
    size, columns = statistics.n_parameters, []
    for k in range(size):
        unit = torch.zeros(size, 1, dtype=DOUBLE)
        unit[k] = 1
        own = []
        for block in statistics.factors.blocks:
            own.append(block.rotated(block.places.take(unit))[..., 0].flatten())
        columns.append(torch.cat(own))
    return torch.stack(columns)  # row k: coordinates of unit vector k


@pytest.mark.parametrize("limit", [512, 0])
def test_removed_samples_are_taken_out(model, limit, monkeypatch):
    """What is left has the sums of the samples that stay, in the eigenvectors of all of them.

    Sums are those of the exact Gauss-Newton blocks along the eigenvectors, or of what the draws
    make of them: a sample has the same ones when it is taken out.
    """
    monkeypatch.setattr(keeping, "_FEW", limit)
    kept = collected(model)
    chosen = kept.selection
    operator = kept.operator(model, cross_entropy, FORGET, chosen)
    exact = EKFACOperator(
        model, cross_entropy, RETAIN, chosen, basis=kept.factors, draws=kept.factors.draws
    )
    assert torch.allclose(operator.to_dense(), exact.to_dense(), rtol=0, atol=1e-12)
    others = tuple(t[-12:] for t in TRAIN)
    assert (
        operator.to_dense() - kept.operator(model, cross_entropy, others, chosen).to_dense()
    ).norm() > 1e-3
    if limit:
        matrix = GaussNewtonOperator(model, cross_entropy, RETAIN, chosen).to_dense()
        basis = in_basis(kept)
        assert torch.allclose(basis.T @ basis, torch.eye(len(basis), dtype=DOUBLE), atol=1e-12)
        rotated = basis.T @ operator.to_dense() @ basis
        wanted = (basis.T @ matrix @ basis).diagonal()
        assert torch.allclose(rotated, wanted.diag(), rtol=0, atol=1e-12)


def test_requests_one_after_another(model, tmp_path):
    """In any order, from a file too, sums are those of the samples that stay."""
    kept = collected(model)
    kept.save(tmp_path / "statistics.pt")
    loaded = TrainingStatistics.load(tmp_path / "statistics.pt")
    assert repr(loaded) == repr(kept) == "TrainingStatistics(ekfac of 120 samples, 51 parameters)"
    first, second = (tuple(t[a:b] for t in TRAIN) for a, b in ((0, 8), (8, 20)))
    one = loaded.without(model, cross_entropy, first).without(model, cross_entropy, second)
    other = kept.without(model, cross_entropy, second).without(model, cross_entropy, first)
    both = kept.without(model, cross_entropy, tuple(t[:20] for t in TRAIN))
    for each in (one, other):
        assert each.n == each.factors.n == 100
        for a, b in zip(each.factors.blocks, both.factors.blocks, strict=True):
            assert torch.allclose(a.values, b.values, rtol=0, atol=1e-12)
    rest = tuple(t[20:] for t in TRAIN)
    made = both.operator(model, cross_entropy, first, kept.selection)
    assert made.shape == (51, 51)
    with pytest.raises(ValueError, match="statistics are of 100 training samples, and forget has"):
        both.operator(model, cross_entropy, rest, kept.selection)


def test_units_of_a_selection(model):
    """Rows that are asked for later; others, and parts of rows, are refused."""
    kept = collected(model, selection=UnitSelection({"0": [0, 1, 2], "2": [0, 1]}))
    some = UnitSelection({"0": [1], "2": [0, 1]})
    operator = kept.operator(model, cross_entropy, FORGET, some, damping=0.1, weight_decay=0.2)
    assert operator.shape == (5 + 14, 5 + 14)
    assert torch.linalg.eigvalsh(operator.to_dense()).min() >= 0.3 - 1e-12
    with pytest.raises(ValueError, match="of another selection"):
        kept.operator(model, cross_entropy, FORGET, UnitSelection({"0": [5]}))


def test_a_deletion_without_the_training_data(ridge, tmp_path):
    """From statistics the step is the retained data's but for the eigenvectors."""
    model, data = ridge
    forget, retain = tuple(t[:8] for t in data), tuple(t[8:] for t in data)
    kept = collected(model, data, mse_loss)
    options = {"weight_decay": DECAY, "damping": 0.0}
    result = PLAIN(model, forget, None, mse_loss, statistics=kept, **options)
    expected = trained(linear, retain, mse_loss)
    before, after = ((vector(each) - vector(expected)).norm() for each in (model, result.model))
    assert 0 < after < 0.2 * before
    assert result.curvature_plan.endswith("saved at training time")
    whole = PLAIN(model, forget, retain, mse_loss, statistics=kept, **options)
    assert torch.equal(vector(whole.model), vector(result.model))


def test_any_size():
    """Where a matrix would have too many entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 95), nn.Linear(95, 95), nn.Linear(95, 3)).double()
    with pytest.raises(ValueError, match="9,883 parameters and at most 8,192 .* curvature='ekfac'"):
        TrainingStatistics.collect(model, TRAIN, cross_entropy)
    kept = collected(model, selection=UnitSelection({"1": range(95), "2": [0, 1]}))
    assert kept.n_parameters == 9120 + 192
    result = PLAIN(
        model, FORGET, None, cross_entropy, statistics=kept, damping=0.1, selection=kept.selection
    )
    assert not result.skipped


def test_parameters_that_no_sample_uses(model):
    """Where the factors know of no gradient the regulariser alone does not move a row."""
    wide = copy.deepcopy(model)
    with torch.no_grad():
        wide[0].weight[0], wide[0].bias[0], wide[2].weight[:, 0] = 0.0, 0.0, 0.0
        wide[2].weight[:, 0] = 0.0
        wide[0].weight[0] = 1.0
    kept = collected(wide)
    result = PLAIN(wide, FORGET, None, cross_entropy, statistics=kept, weight_decay=DECAY)
    assert "retain loss   not measured: no retained samples" in repr(result)
    assert "nan" not in repr(result)
    assert torch.equal(result.model[0].weight[0], wide[0].weight[0])
    assert not torch.equal(result.model[0].weight[1], wide[0].weight[1])


def test_a_stream_with_statistics(overfit, tmp_path):
    """Its ledger verifies, and it goes on with the statistics that its requests left."""
    kept = collected(overfit)
    given = (overfit, TRAIN, cross_entropy)
    options = {"statistics": kept, "validation": HELD}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with Unlearner(
            *given, directory=tmp_path, curvature="ekfac", damping=0.1, weight_decay=1e-3, **options
        ) as stream:
            assert stream.ledger[0].record["settings"]["curvature"] == "ekfac"
            assert stream.ledger[0].record["statistics"]["kind"] == "ekfac"
            stream.remove([1, 2, 3])
            stream.remove([7, 9])
            model = stream.model
        with Unlearner.resume(tmp_path, *given, **options) as stream:
            assert torch.equal(vector(stream.model), vector(model))
            stream.rollback(to=1)
            result = stream.remove([7, 9])
            assert torch.equal(vector(stream.model), vector(model))
        assert result.solve_method == "ekfac"
        assert verify_ledger(tmp_path, model=model, train=TRAIN).ok
        with pytest.raises(ValueError, match="statistics must be what was given at the start"):
            Unlearner.resume(
                tmp_path, *given, validation=HELD, statistics=collected(overfit, samples(120, 5))
            )


def test_statistics_of_other_weights_are_told(overfit):
    """Those of before the training: the deleted samples lose more there. Trained ones are not."""
    torch.manual_seed(1)
    before = copy.deepcopy(overfit)
    for module in before:
        getattr(module, "reset_parameters", lambda: None)()
    given = (overfit, FORGET, None, cross_entropy)
    with pytest.warns(UserWarning, match="statistics are of other weights .* the deleted samples"):
        PLAIN(*given, statistics=collected(before), damping=0.1)
    PLAIN(*given, statistics=collected(overfit), damping=0.1)


def test_a_model_that_was_never_trained_is_told():
    torch.manual_seed(0)
    untrained = nn.Linear(4, 3).double()
    with torch.no_grad():
        untrained.weight.mul_(0.1)
    options = {"statistics": collected(untrained), "damping": 0.1, "validation": HELD}
    with pytest.warns(UserWarning, match="the model was hardly trained"):
        unlearning.unlearn(
            untrained, FORGET, None, cross_entropy, curvature="ekfac", max_drop=0.9, **options
        )


def test_a_stream_needs_the_training_data_and_says_what_does_not(model):
    with pytest.raises(ValueError, match=r"train is None.*unlearn\(model, forget, None"):
        Unlearner(model, None, cross_entropy, statistics=collected(model), curvature="ekfac")


def test_weight_decay_is_no_part_of_statistics(model):
    message = "collect takes no weight_decay: .* loss alone. Pass weight_decay where they are used"
    with pytest.raises(TypeError, match=message):
        collected(model, weight_decay=1e-3)
    with pytest.raises(TypeError, match="collect takes no batchsize$"):
        collected(model, batchsize=3)
