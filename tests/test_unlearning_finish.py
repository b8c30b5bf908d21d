"""The finish: what follows a step or takes its place, and how it is chosen."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lcodec_ext._torch.samples import as_samples
from lcodec_ext.unlearning import calibrate as calibrating
from lcodec_ext.unlearning import distil as distilling
from lcodec_ext.unlearning import estimate, unlearn
from lcodec_ext.unlearning import finish as finishing
from lcodec_ext.unlearning import guard as guarding
from lcodec_ext.unlearning.distil import (
    COPY,
    FOLLOW,
    HOLD,
    NotTrainedError,
    Pass,
    _draws,
    _shrink_and_perturb,
)
from lcodec_ext.unlearning.finish import unlikeness


def blobs(n, seed, spread=0.7):
    """Five classes in ten dimensions, which overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(5, 10, generator=torch.Generator().manual_seed(99))
    y = torch.randint(5, (n,), generator=generator)
    return centres[y] + spread * torch.randn(n, 10, generator=generator), y


def network():
    return nn.Sequential(
        nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.05), nn.Linear(32, 5)
    )


def fit(model, data, epochs, loss_fn=cross_entropy, rate=0.1):
    x, y = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def loss_on(model, data, loss_fn=cross_entropy):
    return loss_fn(model(data[0]), data[1]).item()


@pytest.fixture(scope="module")
def outliers():
    """A network that has learnt forty samples with wrong labels among 640."""
    x, y = blobs(640, 0)
    y[:40] = (y[:40] + 1) % 5
    torch.manual_seed(0)
    model = fit(network(), (x, y), 60)
    return model, (x[:40], y[:40]), (x[40:], y[40:]), blobs(300, 1)


@pytest.fixture
def batches(monkeypatch):
    """As with many samples."""
    monkeypatch.setattr(finishing, "BATCHED", 500)


def run(case, **options):
    model, forget, retain, held = case
    options = {"validation": held, "weight_decay": 5e-4} | options
    return unlearn(model, forget, retain, cross_entropy, **options)


def weights(model):
    return torch.cat([t.detach().flatten().float() for t in model.state_dict().values()])


def test_many_samples_are_finished_by_mini_batches(outliers, batches):
    """A copy that has forgotten the outliers leads them; the given model stays as it was."""
    model, forget, retain, held = outliers
    given = weights(model)
    result = run(outliers)
    found = result.calibration
    assert found.finish_by.startswith("mini-batches, led by a copy")
    assert (found.outliers, found.stopped_by, found.finish) == (True, "outliers", 150)
    assert found.unlike > 0.9
    assert (result.solve_method, result.damping) == ("none", math.inf)
    assert torch.equal(weights(model), given)
    right = (result.model(forget[0]).argmax(1) == forget[1]).double().mean()
    assert right < 0.1
    assert loss_on(result.model, forget) > 3 * loss_on(model, forget)
    assert loss_on(result.model, held) < loss_on(model, held)
    assert loss_on(result.model, retain) < loss_on(model, retain) + 0.05
    # Running statistics are those of retained samples alone.
    assert not torch.equal(result.model[1].running_mean, model[1].running_mean)
    assert "outliers, no step" in repr(result)
    again = run(outliers)
    assert torch.equal(weights(again.model), weights(result.model))
    other = run(outliers, seed=1)
    assert not torch.equal(weights(other.model), weights(result.model))


def test_few_samples_are_finished_by_lbfgs(outliers):
    _, forget, _, held = outliers
    result = run(outliers)
    found = result.calibration
    assert found.finish_by == "L-BFGS on the retained samples"
    assert 1 <= found.finish <= finishing.ITERATIONS
    assert loss_on(result.model, forget) > 3 * loss_on(result.model, held)
    assert found.validation_after <= 1.1 * found.validation_before
    assert found.control_after == ()
    assert len(found.control_before) >= 4
    none = run(outliers, finish=0, max_drop=None).calibration
    assert (none.finish, none.finish_by) == (0, "")
    assert math.isnan(none.unlike)


def test_lbfgs_goes_on_until_it_is_stopped(outliers, monkeypatch):
    """Each iteration lowers the retained objective: the line search has evaluations enough."""
    retain = outliers[2]
    monkeypatch.setattr(finishing, "OUTLIERS", 0.0)
    objectives = []
    for iterations in (1, 10, 20, 40):
        result = run(outliers, finish=iterations)
        assert result.calibration.finish == iterations
        square = sum(float(p.detach().square().sum()) for p in result.model.parameters())
        objectives.append(loss_on(result.model, retain) + 5e-4 / 2 * square)
    # float32 sums of 600 losses are exact to a few 1e-7 of their size.
    assert all(a > b + 1e-6 for a, b in pairwise(objectives))


def test_a_copy_that_is_not_trained_is_told_of(outliers, batches, monkeypatch):
    """Then L-BFGS takes the place of mini-batches."""
    monkeypatch.setattr(distilling, "COPY", Pass(COPY.epochs, 1e4, 0.0, 20, 8))
    found = run(outliers).calibration
    assert found.finish_by.startswith("L-BFGS on the retained samples instead of mini-batches, as")
    assert "on validation samples" in found.finish_by


@pytest.mark.filterwarnings("ignore:the deletion forgets little")
def test_suspects_that_are_no_outliers_get_a_step(batches, monkeypatch):
    """What looked unlike others is lost no more than validation samples by a copy without it."""
    x, y = blobs(640, 0)
    torch.manual_seed(0)
    case = fit(network(), (x, y), 40), (x[:40], y[:40]), (x[40:], y[40:]), blobs(300, 1)
    plain = run(case)
    assert not plain.calibration.outliers
    assert plain.calibration.stopped_by != "outliers"
    monkeypatch.setattr(guarding, "UNLIKE", 0.0)
    suspected = run(case)
    assert torch.equal(weights(suspected.model), weights(plain.model))
    assert suspected.calibration.strength == plain.calibration.strength
    told = "undone: training on the retained samples alone left the deleted ones too low a loss"
    assert told in suspected.calibration.finish_by
    assert told not in plain.calibration.finish_by


@pytest.mark.filterwarnings("ignore:the deletion forgets little")
@pytest.mark.filterwarnings("ignore:the deleted samples lose")
def test_after_a_step_outputs_are_held(batches, monkeypatch):
    """The retained samples gain by the batches, and the deleted ones stay where the step left them.

    Whatever they lose: a request whose step goes far counts as outliers elsewhere.
    """
    monkeypatch.setattr(calibrating, "OUTLIERS", math.inf)
    x, y = blobs(640, 0, spread=1.5)
    torch.manual_seed(0)
    model = fit(network(), (x, y), 60)
    case = model, (x[:40], y[:40]), (x[40:], y[40:]), blobs(300, 1, spread=2.5)
    step, both = run(case, finish=0, max_rise=2.0), run(case, max_rise=2.0)
    found = both.calibration
    assert found.finish_by.startswith("mini-batches, the removed samples' outputs held")
    assert found.finish == HOLD.least
    before, after, held = (loss_on(each.model, case[2]) for each in (step, both, both))
    assert after < before
    forget = [loss_on(each, case[1]) for each in (model, step.model, both.model)]
    assert forget[1] > forget[0]
    assert forget[2] - forget[0] > 0.5 * (forget[1] - forget[0])
    assert held < 1.5 * loss_on(model, case[2]) + 0.05


def test_outputs_that_are_no_logits_are_led_as_they_are(monkeypatch):
    """Squared errors: the copy's outputs are the target, neither centred nor rescaled."""
    x, _ = blobs(640, 0)
    y = x[:, :2] + 0.1 * torch.randn(640, 2, generator=torch.Generator().manual_seed(3))
    y[:20] += 6.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 2))
    model = fit(model, (x[:440], y[:440]), 60, mse_loss, 0.02)
    seen = []
    led = distilling.outputs_led_by

    def watched(block, teacher, *, rescale):
        wanted = led(block, teacher, rescale=rescale)
        with torch.no_grad():
            seen.append((wanted, teacher(x[:20])))
        return wanted

    monkeypatch.setattr(finishing, "outputs_led_by", watched)
    held = x[440:], y[440:]
    data = (x[:20], y[:20]), (x[20:440], y[20:440])
    monkeypatch.setattr(finishing, "BATCHED", 400)
    monkeypatch.setattr(distilling, "COPY", replace(COPY, rate=0.01))
    monkeypatch.setattr(finishing, "FOLLOW", replace(FOLLOW, rate=0.01))
    result = unlearn(model, *data, mse_loss, validation=held, weight_decay=5e-4, max_drop=None)
    assert result.calibration.finish_by.startswith("mini-batches, led by a copy")
    wanted, outputs = seen[0]
    assert torch.allclose(wanted, outputs, rtol=1e-5, atol=1e-6)
    now = result.model(x[:20])
    before = model(x[:20])
    assert mse_loss(now, outputs) < 0.2 * mse_loss(before, outputs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_finish_that_is_undone_is_told_of(outliers, batches, monkeypatch):
    """In place of the step and after it; the result and what prints it say so."""
    finished = guarding._finished

    def strict(block, guard, harm, found, steps, done):
        attempt = finished(block, guard, harm, found, steps, done)
        return replace(attempt, accepted=attempt.accepted and not done.steps)

    monkeypatch.setattr(guarding, "_finished", strict)
    result = run(outliers, max_rise=5.0)
    found = result.calibration
    assert not result.skipped
    assert found.finish == 0
    undone = found.finish_by.split("; before, ")
    assert len(undone) == 2
    assert all(text.startswith("undone: ") and text.endswith("did harm") for text in undone)
    assert f", finish {found.finish_by}" in str(found)
    assert weights(result.model).isfinite().all()


def test_a_finish_that_is_refused_is_mended(outliers, batches, monkeypatch):
    """More mini-batches, with the outputs held, before all is undone."""
    judged = []
    finished = guarding._finished

    def strict(*arguments):
        attempt = finished(*arguments)
        judged.append(attempt)
        return replace(attempt, accepted=False) if len(judged) == 1 else attempt

    monkeypatch.setattr(guarding, "_finished", strict)
    found = run(outliers).calibration
    assert len(judged) == 2
    assert found.stopped_by == "outliers"
    assert found.finish == judged[0].calibration.finish + HOLD.least
    assert found.finish_by.endswith("then held, for retained samples")
    assert found.retained_after < judged[0].calibration.retained_after + 0.01


def test_masks_bound_what_mini_batches_move(outliers, batches):
    model = outliers[0]
    result = run(outliers, selection="random", max_parameters=0.5)
    changed = copy.deepcopy(model)
    result.selection.scatter_(changed, result.selection.gather(result.model).detach())
    for new, expected in zip(result.model.parameters(), changed.parameters(), strict=True):
        assert torch.equal(new, expected)


class Plain(nn.Module):
    """A layer without reset_parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(400, 100))
        self.bias = nn.Parameter(torch.full((400,), 3.0))
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)


def test_copies_are_shrunk_and_perturbed():
    torch.manual_seed(0)
    model = nn.Linear(100, 400)
    given = model.weight.detach().clone()
    _shrink_and_perturb(model, 3)
    noise = (model.weight.detach() - 0.5 * given) / 0.2
    # nn.Linear draws uniformly up to 1 / sqrt(100).
    assert float(noise.abs().max()) <= 0.1 * (1 + 1e-5)
    assert float(noise.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    other = Plain()
    _shrink_and_perturb(other, 3)
    noise = (other.weight.detach() - 0.5) / 0.2
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert torch.allclose(other.bias, torch.full((400,), 0.7 * 3.0))
    assert torch.equal(other.frozen, torch.ones(7))


def test_every_sample_comes_up_before_any_again():
    drawn = list(_draws(10, 4, 5, np.random.default_rng(0)))
    assert [len(each) for each in drawn] == [4] * 5
    first = [i for each in drawn[:2] for i in each]
    assert len(set(first)) == 8
    assert [len(each) for each in _draws(3, 8, 2, np.random.default_rng(0))] == [3, 3]


def test_unlikeness_is_a_rank(outliers):
    """0.5 for equal sets, 1 for ones that lose more than all others; ties count half."""
    model = nn.Identity()

    class Block:
        def __init__(self, forget):
            self.work, self.part, self.settings = self, self, self
            self.model, self.loss_fn, self.batch_size, self.seed = model, mse_loss, 16, 0
            self.forget = forget

    def samples(values):
        x = torch.tensor(values)[:, None]
        place = torch.device("cpu"), torch.float32
        return as_samples((x, torch.zeros_like(x)), "x", *place)

    low, high = samples([1.0, 2.0, 3.0, 4.0]), samples([5.0, 6.0])
    assert unlikeness(Block(low), low) == 0.5
    assert unlikeness(Block(high), low) == 1
    assert unlikeness(Block(low), high) == 0


@pytest.mark.parametrize(
    ("finish", "n", "n_parameters", "how"),
    [
        (None, finishing.BATCHED, 1, "batches"),
        (None, finishing.BATCHED, finishing.LARGE + 1, "batches"),
        (None, finishing.BATCHED - 1, finishing.LARGE, "L-BFGS"),
        (None, finishing.BATCHED - 1, finishing.LARGE + 1, ""),
        (0, finishing.BATCHED, 1, ""),
        (7, finishing.BATCHED, finishing.LARGE + 1, "L-BFGS"),
    ],
)
def test_the_form_of_a_finish(finish, n, n_parameters, how):
    assert finishing.form_of(finish, n, n_parameters) == how


def test_large_models_get_the_step_alone_unless_iterations_are_asked_for(outliers, monkeypatch):
    model, forget, retain, held = outliers
    alone = run(outliers, finish=0, max_drop=None)
    small = estimate(model, forget, retain, cross_entropy, validation=held)
    monkeypatch.setattr(finishing, "LARGE", 100)
    large = run(outliers, max_drop=None)
    assert (large.calibration.finish, large.calibration.finish_by) == (0, "")
    for a, b in zip(alone.model.parameters(), large.model.parameters(), strict=True):
        assert torch.equal(a, b)
    found = estimate(model, forget, retain, cross_entropy, validation=held)
    assert "finish" in small.passes
    assert "finish" not in found.passes
    assert run(outliers, finish=3).calibration.finish_by == "L-BFGS on the retained samples"


def test_large_models_that_mini_batches_do_not_train_get_the_step(outliers, batches, monkeypatch):
    def fails(*_):
        raise NotTrainedError("a copy does not learn")

    monkeypatch.setattr(finishing, "trained_copy", fails)
    small = run(outliers).calibration
    assert small.finish_by.startswith("L-BFGS on the retained samples instead of mini-batches")
    monkeypatch.setattr(finishing, "LARGE", 100)
    large = run(outliers).calibration
    assert large.control_after
    assert "L-BFGS" not in large.finish_by
