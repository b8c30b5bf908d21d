"""No silent harm: whatever is asked of a default deletion, it is harmless, refused or warned of."""

import copy
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_nll_loss,
    l1_loss,
    mse_loss,
    multi_margin_loss,
    one_hot,
    poisson_nll_loss,
    softplus,
)

from lcodec_ext._torch.loss import is_much_worse
from lcodec_ext._torch.predict import predict, size_of_losses
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.unlearning import Unlearner, calibrate, doubts, finish, unlearn

M = 12  # samples to delete
FAST = {"max_iterations": 12}  # of the Krylov spaces; 30 by default


def digits(n=300):
    """Training, validation and test samples."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return tuple((x[some], y[some]) for some in order.split([n, 300, len(y) - n - 300]))


def mlp(inputs=64, outputs=10):
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, outputs))


def fit(model, data, epochs=60, loss=cross_entropy, rate=1e-2):
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(32):
            optimizer.zero_grad()
            loss(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
    return model.eval()


def started(make=mlp, *arguments):
    torch.manual_seed(0)
    return make(*arguments)


@torch.no_grad()
def quality(model, data, loss=cross_entropy):
    """Mean loss, and accuracy where there are classes."""
    outputs = model(data[0])
    classes = outputs.ndim == 2 and data[1].ndim == 1 and not data[1].is_floating_point()
    right = float((outputs.argmax(1) == data[1]).double().mean()) if classes else math.nan
    return float(loss(outputs, data[1])), right


def deleted(model, train, validation, m=M, loss=cross_entropy, **options):
    """A default deletion of the first m samples: the model after it and what it warned of."""
    forget, retain = (tuple(t[part] for t in train) for part in (slice(m), slice(m, None)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearn(model, forget, retain, loss, **{"validation": validation} | FAST | options)
    return result, [str(each.message) for each in caught]


def harmed(before, after, train, test, m=M, loss=cross_entropy):
    """Whether retained or test samples suffered: losses by a quarter, accuracy by a point."""
    retain = tuple(t[m:] for t in train)
    (old, _), (new, _) = quality(before, retain, loss), quality(after, retain, loss)
    (loss_before, right), (loss_after, right_after) = (
        quality(model, test, loss) for model in (before, after)
    )
    worse = new > old + abs(old) / 2 + 0.02 or loss_after > loss_before + abs(loss_before) / 4
    return worse or right_after < right - 0.01


@pytest.fixture(scope="module")
def known():
    train, validation, test = digits()
    return fit(started(), train), train, validation, test


# ---------------------------------------------------------------------------------------------
# Validation samples


def test_a_usual_deletion_is_silent_and_harmless(known):
    model, train, validation, test = known
    result, told = deleted(model, train, validation)
    assert told == []
    assert not harmed(model, result.model, train, test)
    assert result.loss_forget.after > 1.5 * result.loss_forget.before


@pytest.mark.parametrize("size", [1, 5, 20])
def test_few_validation_samples_are_warned_of(known, size):
    model, train, validation, _ = known
    _, told = deleted(model, train, tuple(t[:size] for t in validation))
    samples = "1 validation sample" if size == 1 else f"{size} validation samples"
    assert any(f"the mean loss of {samples} is" in each for each in told)


def test_chosen_validation_samples_are_warned_of(known):
    """The hardest ones: their loss is no measure, and the deletion goes too far."""
    model, train, validation, _ = known
    losses = cross_entropy(model(validation[0]), validation[1], reduction="none")
    few = losses.argsort(descending=True)[:25]
    _, told = deleted(model, train, tuple(t[few] for t in validation))
    assert any("validation samples is" in each and "as unsure" in each for each in told)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_trained_validation_samples_are_warned_of(known, share):
    model, train, validation, _ = known
    k = round(share * 200)
    mixed = tuple(
        torch.cat([t[50 : 50 + k], v[: 200 - k]]) for t, v in zip(train, validation, strict=True)
    )
    _, told = deleted(model, train, mixed)
    assert any(f"{k} of 200 validation samples are training samples" in each for each in told)
    _, told = deleted(model, train, tuple(t[:M] for t in train))
    assert any(f"{M} of {M} validation samples are training samples" in each for each in told)


def test_validation_samples_of_another_kind_are_warned_of(known):
    model, train, (x, y), _ = known
    generator = torch.Generator().manual_seed(0)
    noise, shuffled = torch.rand(x.shape, generator=generator), y[torch.randperm(300)]
    cases = (
        ((x, torch.randint(10, y.shape, generator=generator)), "guessing"),
        ((noise, shuffled), "the inputs of validation samples are others"),
        ((x * 5, y), "the inputs of validation samples are others"),
        ((x[y == 3], y[y == 3]), "the labels of validation samples are others"),
    )
    for validation, message in cases:
        _, told = deleted(model, train, validation)
        assert any(message in each for each in told), message


def test_differences_by_chance_are_not_warned_of():
    """Draws from one distribution, of few and of many classes."""
    rng = np.random.default_rng(0)
    for classes in (2, 10, 1000):
        for n, k in ((256, 300), (256, 40), (40, 1000)):
            a, b = (rng.integers(classes, size=size) for size in (n, k))
            shares = doubts._shares(a, b, a[:5], 0.02)
            assert not doubts._far(*shares, n, k)
    for _ in range(50):
        a, b = rng.standard_normal(256), rng.standard_normal(300)
        chance = doubts._CHANCE * math.sqrt(1 / 256 + 1 / 300)
        assert doubts._kolmogorov(a, b) < doubts._UNLIKE + chance
        assert doubts._kolmogorov(a, b + 1.5) > doubts._UNLIKE + chance


def test_distances_of_distributions():
    assert doubts._kolmogorov(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0
    assert doubts._kolmogorov(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert doubts._kolmogorov(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.5])) == 0.5
    shares = doubts._shares(np.array([0, 0, 1]), np.array([1]), np.array([2]), 0.25)
    assert shares[0] == pytest.approx([0.5, 0.25, 0.25])
    assert shares[1] == pytest.approx([0.0, 1.0, 0.0])


# ---------------------------------------------------------------------------------------------
# Requests and classes


def test_large_requests_are_warned_of(known):
    model, train, validation, _ = known
    _, told = deleted(model, train, validation, m=150)
    assert any("150 of 300 training samples" in each for each in told)
    _, told = deleted(model, train, validation, m=290)
    assert any("290 of 300 training samples" in each for each in told)


def test_a_class_as_a_whole(known):
    """Its validation samples do not count; what groups of other classes cannot tell is said."""
    model, train, validation, test = known
    order = (train[1] != 3).to(torch.int8).argsort(stable=True)
    train, m = tuple(t[order] for t in train), int((train[1] == 3).sum())
    result, told = deleted(model, train, validation, m)
    others = tuple(t[test[1] != 3] for t in test)
    assert not harmed(model, result.model, train, others, m)
    assert (
        result.guard.before == quality(model, tuple(t[validation[1] != 3] for t in validation))[1]
        or result.skipped
    )
    assert any("a class was deleted as a whole" in each for each in told)


def test_a_rare_class(known):
    """Two of its four samples, and all four."""
    _, train, validation, test = known
    kept = (train[1] != 3) | (torch.cumsum(train[1] == 3, 0) <= 4)
    train = tuple(t[kept] for t in train)
    train = tuple(t[(train[1] != 3).to(torch.int8).argsort(stable=True)] for t in train)
    model = fit(started(), train)
    for m in (2, 4):
        result, told = deleted(model, train, validation, m)
        assert told or not harmed(model, result.model, train, test, m)


def test_accuracy_that_falls_is_warned_of(known):
    """After few epochs losses hardly rise where accuracy already falls; and there is no gap."""
    _, train, validation, test = known
    for epochs in (0, 1):
        model = fit(started(), train, epochs, rate=5e-3)
        result, told = deleted(model, train, validation)
        assert told or not harmed(model, result.model, train, test)


def test_a_step_ends_where_accuracy_falls(known, monkeypatch):
    """Whatever losses say."""
    model, train, validation, _ = known
    whole = deleted(model, train, validation)[0].calibration
    asked = []

    def costs(harm):
        asked.append(harm.now()[0])
        return asked[-1] > harm.validation_before + 1e-4

    monkeypatch.setattr(calibrate.Harm, "costs_accuracy", costs)
    found = deleted(model, train, validation)[0].calibration
    assert asked
    if found.stopped_by == "accuracy":
        assert found.strength > whole.strength
        assert found.validation_after <= found.validation_before + 1e-4
    monkeypatch.setattr(calibrate.Harm, "costs_accuracy", lambda harm: True)
    result, told = deleted(model, train, validation)
    assert result.calibration.stopped_by == "accuracy"
    assert result.loss_forget.after == pytest.approx(result.loss_forget.before, rel=0.1)
    assert any("stopped by accuracy on validation samples" in each for each in told)


def test_a_score_ends_steps_as_accuracy_does(known):
    """Of a model with several outputs, whose accuracy nothing but the score tells."""

    class Pair(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.start = model, copy.deepcopy(model).requires_grad_(False)

        def forward(self, x):
            return self.model(x), self.start(x)

    def unmoved(outputs, targets):
        return -1e6 * (outputs[0] - outputs[1]).abs().sum(1)

    model, train, validation, _ = known
    options = {"loss": lambda outputs, targets: cross_entropy(outputs[0], targets), "finish": 0}
    whole = deleted(Pair(model), train, validation, **options)[0].calibration
    result, told = deleted(Pair(model), train, validation, score=unmoved, max_drop=1e9, **options)
    assert whole.stopped_by != "accuracy"
    assert result.calibration.stopped_by == "accuracy"
    assert result.calibration.strength > 100 * whole.strength
    assert any("stopped by accuracy on validation samples" in each for each in told)


LEVELS = calibrate.Levels(cap=9.0, trained=0.0, unseen=1.0)  # which accuracy does not go by


def test_how_far_accuracy_may_fall():
    """More than one sample, 0.3% and a standard error of what changed."""

    class Held:
        def __init__(self, right):
            self.right = right

    def costs(n, lost, won):
        before, after = torch.ones(n), torch.ones(n)
        after[:lost] = 0
        before[lost : lost + won] = 0
        held = Held(before)
        harm = calibrate.Harm(held, None, 1.0, 1.0, LEVELS)
        held.right = after
        return harm.costs_accuracy()

    assert [costs(300, lost, 0) for lost in (0, 2, 3)] == [False, False, True]
    assert [costs(1000, lost, 0) for lost in (3, 4)] == [False, True]
    assert [costs(300, lost, 17) for lost in (19, 20, 21)] == [False, False, True]
    assert not costs(300, 0, 5)
    assert not calibrate.Harm(Held(None), None, 1.0, 1.0, LEVELS).costs_accuracy()


# ---------------------------------------------------------------------------------------------
# Losses, weights and trainings


def test_nothing_forgotten_is_warned_of(known):
    """A weight decay that training did not have, losses of exactly 0, all but a bias frozen."""
    model, train, validation, _ = known
    for decay in (0.1, 10.0):
        result, told = deleted(model, train, validation, weight_decay=decay)
        assert result.loss_forget.after < 2 * result.loss_forget.before
        assert any("forgets little" in each for each in told)
    sure = fit(started(), train, 150)
    with torch.no_grad():
        for p in sure[2].parameters():
            p.mul_(60)
    result, told = deleted(sure, train, validation)
    assert result.loss_forget.after == 0
    assert any("forgets little" in each for each in told)
    frozen = fit(started(), train)
    for p in (*frozen[0].parameters(), frozen[2].weight):
        p.requires_grad_(False)
    _, told = deleted(frozen, train, validation)
    assert any("forgets little" in each for each in told)


def test_losses_of_any_kind(known):
    """Soft labels, several labels, one logit, absolute differences; in float64; frozen layers."""
    _, train, validation, test = known

    def smooth(outputs, targets):
        return cross_entropy(outputs, targets, label_smoothing=0.1)

    def one_logit(outputs, targets):
        return binary_cross_entropy_with_logits(outputs[:, 0], targets)

    def coded(data):
        return data[0], one_hot(data[1], 10).float()

    def odd(data):
        return data[0], (data[1] % 2).float()

    def double(data):
        return data[0].double(), data[1]

    def half_frozen():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    cases = (
        (smooth, lambda data: data, mlp),
        (binary_cross_entropy_with_logits, coded, mlp),
        (one_logit, odd, lambda: mlp(64, 1)),
        (l1_loss, coded, mlp),
        (cross_entropy, double, lambda: mlp().double()),
        (cross_entropy, lambda data: data, half_frozen),
    )
    for loss, prepared, make in cases:
        data, held, others = map(prepared, (train, validation, test))
        model = fit(started(make), data, 60, loss)
        result, told = deleted(model, data, held, loss=loss)
        assert told or not harmed(model, result.model, data, others, loss=loss)
        assert result.loss_forget.after > result.loss_forget.before


def test_a_loss_without_a_second_derivative_is_refused(known):
    model, train, validation, _ = known
    with pytest.raises(ValueError, match=r"differentiated twice .* Use curvature='fisher'"):
        deleted(model, train, validation, loss=multi_margin_loss)


def test_regression():
    x, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) * 20, torch.tensor(y, dtype=torch.float32)[:, None]
    train, validation, test = zip(x.split([250, 90, 102]), y.split([250, 90, 102]), strict=True)
    for scale, epochs in ((1.0, 30), (100.0, 200)):
        data, held, others = ((a, b / scale) for a, b in (train, validation, test))
        model = fit(started(mlp, 10, 1), data, epochs, mse_loss)
        result, told = deleted(model, data, held, loss=mse_loss)
        assert told or not harmed(model, result.model, data, others, loss=mse_loss)
        assert result.loss_forget.after > result.loss_forget.before


def test_losses_below_zero(known):
    """The likelihood of a density: a rise is measured against its size, not its sign."""
    for before in (-5.0, -0.1, 0.0, 0.1, 5.0):
        assert not is_much_worse(before, before)
        assert not is_much_worse(before, before - 1)
        assert is_much_worse(before, before + abs(before) / 2 + 0.051)
        assert is_much_worse(before, math.nan)

    _, train, validation, _ = known

    def below(outputs, targets):
        return cross_entropy(outputs, targets) - 5

    plain, _ = deleted(known[0], train, validation, finish=0)
    shifted, told = deleted(known[0], train, validation, loss=below, finish=0)
    assert told == []
    assert shifted.damping == pytest.approx(plain.damping, rel=0.2)
    assert shifted.loss_forget.after + 5 == pytest.approx(plain.loss_forget.after, rel=0.1)

    def density(outputs, targets):
        return gaussian_nll_loss(outputs[:, :1], targets, softplus(outputs[:, 1:]) + 1e-2)

    x, y = load_diabetes(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32) * 20
    y = torch.tensor(y, dtype=torch.float32)[:, None] / 500
    train, validation, test = zip(x.split([250, 90, 102]), y.split([250, 90, 102]), strict=True)
    model = fit(started(mlp, 10, 2), train, 60, density)
    assert quality(model, train, density)[0] < 0
    result, told = deleted(model, train, validation, loss=density)
    assert told or not harmed(model, result.model, train, test, loss=density)


def test_what_was_learnt_by_heart(known):
    """Labels at random, and a few samples in all."""
    _, (x, y), validation, test = known
    generator = torch.Generator().manual_seed(0)
    random = x, torch.randint(10, y.shape, generator=generator)
    model = fit(started(), random, 200)
    result, told = deleted(model, random, (validation[0], random[1]))
    assert any("guessing" in each for each in told)
    few = x[:40], y[:40]
    model = fit(started(), few, 100)
    result, told = deleted(model, few, validation, 5)
    assert told or not harmed(model, result.model, few, test, 5)


def test_a_finish_does_not_go_on_with_training(known, monkeypatch):
    """Of a network that was trained for few epochs, without weight decay."""
    _, train, validation, _ = known
    targets = train[1].clone()
    targets[:M] = (targets[:M] + 1) % 10
    data = train[0], targets
    model = fit(started(), data, 60)
    whole, _ = deleted(model, data, validation)
    monkeypatch.setattr(finish, "_TRAINED", 0.2)
    ended, _ = deleted(model, data, validation)
    for each in (ended, whole):
        assert each.calibration.outliers
        assert each.loss_forget.after > 2 * each.loss_forget.before
    assert ended.calibration.finish < whole.calibration.finish
    assert ended.loss_retain.after > whole.loss_retain.after


# ---------------------------------------------------------------------------------------------
# Ledgers


def test_nothing_is_written_where_a_warning_is_an_error(known, tmp_path):
    """Every warning comes before the ledger's line."""
    model, train, validation, _ = known
    few = tuple(t[:5] for t in validation)
    weights = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Unlearner(
            model, train, cross_entropy, directory=tmp_path, validation=few, **FAST
        ) as stream:
            with pytest.raises(UserWarning, match="mean loss of 5 validation samples"):
                stream.remove(range(M))
            assert (len(stream.ledger), stream.removed) == (1, ())
            for new, old in zip(stream.model.parameters(), weights, strict=True):
                assert torch.equal(new, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Unlearner(
            model, train, cross_entropy, validation=validation, weight_decay=0.1, **FAST
        ) as stream:
            with pytest.raises(UserWarning, match="forgets little"):
                stream.remove(range(M))
            assert (len(stream.ledger), stream.removed) == (1, ())


# ---------------------------------------------------------------------------------------------
# What validation samples leave open


def lost(n, fewer, more):
    """What is said of n validation samples of which some are no longer right, and others now."""
    changes = [1.0] * fewer + [-1.0] * more + [0.0] * (n - fewer - more)
    falls = torch.tensor(changes, dtype=torch.float64)
    return doubts._accuracy_lost(
        SimpleNamespace(watched="accuracy", before=0.9, falls=lambda: falls)
    )


@pytest.mark.parametrize(
    ("n", "fewer", "more"),
    [
        (1000, 0, 0),
        (1000, 2, 0),
        (1000, 4, 4),
        (1000, 10, 30),
        (10000, 60, 40),
        (100000, 500, 200),
        (300, 1, 1),
        (50, 2, 1),
    ],
)
def test_accuracy_that_held_is_not_warned_of(n, fewer, more):
    assert lost(n, fewer, more) == []


@pytest.mark.parametrize(
    ("n", "fewer", "more", "told"),
    [
        (1000, 4, 0, "went from 90.00% to 89.60%, where 4 changed: on other samples it may .* 0.7"),
        (
            1000,
            12,
            12,
            "stayed at 90.00%, where 24 changed: on other samples it may .* by 0.8 points",
        ),
        (300, 6, 5, "went from 90.00% to 89.67%, where 11 changed"),
        (1000, 20, 22, "went from 90.00% to 90.20%, where 42 changed"),
        (10000, 90, 40, "went from 90.00% to 89.50%"),
    ],
)
def test_half_a_point_of_accuracy_that_may_be_lost_is_warned_of(n, fewer, more, told):
    """By the bound on a paired difference, whatever the mean of these samples happens to be."""
    (message,) = lost(n, fewer, more)
    assert re.search(told, message)
    assert message.startswith(f"accuracy on {n:,} validation samples")


def test_a_stream_says_it_before_it_writes():
    """A step let go far changes many answers; where warnings are errors nothing is written."""
    train, held, _ = digits()
    model = fit(started(), train)
    stream = Unlearner(model, train, cross_entropy, validation=held, max_drop=0.5, **FAST)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "accuracy on 300 validation samples")
        warnings.filterwarnings("ignore", "the ")
        with pytest.raises(UserWarning, match="on other samples it may have fallen"):
            stream.remove(range(40))
    assert stream.removed == ()
    assert len(stream.ledger) == 1


# ---------------------------------------------------------------------------------------------
# The unit of the targets


def of_counts(kind, factor, far):
    """A linear model, its loss and samples, in a unit of the targets; `far` from its optimum."""
    draws = torch.Generator().manual_seed(3)
    options = {"generator": draws, "dtype": torch.float64}
    x, w = torch.randn(120, 5, **options), torch.randn(5, 1, **options)
    if kind == "one-hot":
        y = one_hot((x @ torch.randn(5, 3, **options)).argmax(1), 3).double()
    elif kind == "Poisson":
        y = torch.poisson((0.3 * x @ w).exp() * 4, generator=draws)
    else:
        y = x @ w + 1 + 0.3 * torch.randn(120, 1, **options)
    model = nn.Linear(5, y.shape[1]).double()
    whole = torch.cat([x, torch.ones(120, 1, dtype=torch.float64)], 1)
    wanted = (y + 1).log() if kind == "Poisson" else y
    solution = torch.linalg.lstsq(whole, wanted).solution
    solution += far * torch.randn(solution.shape, **options)
    with torch.no_grad():
        model.weight.copy_(solution[:5].T)
        model.bias.copy_(solution[5])
        if kind == "Poisson":
            model.bias += math.log(factor)
        else:
            model.weight *= factor
            model.bias *= factor
    loss_fn = poisson_nll_loss if kind == "Poisson" else mse_loss
    return model, loss_fn, (x[:30], factor * y[:30]), (x[30:], factor * y[30:])


@pytest.mark.parametrize("kind", ["squares", "one-hot", "Poisson"])
@pytest.mark.filterwarnings("ignore:the removal of 30 of 30 samples", "ignore:the step raised")
def test_decisions_are_those_in_any_unit_of_the_targets(kind):
    """Lengths, attempts and repairs, where accuracy cannot be watched."""
    lengths = set()
    for far, drop in ((0.0, 0.1), (0.3, 0.01), (0.3, 0.001), (1.0, 0.05)):
        found = []
        for factor in (1.0, 1e-3, 100.0):
            model, loss_fn, *both = of_counts(kind, factor, far)
            result = unlearn(
                model, *both, loss_fn, calibrate=False, damping=0.0, output_damping=0.0,
                max_drop=drop, repair_drop=drop / 4, repair_epochs=int(kind != "Poisson"),
            )  # fmt: skip
            assert result.watched == "minus the mean loss"
            size = factor if kind == "Poisson" else factor**2
            found.append((result.length, result.attempts, result.repaired, len(result.skipped)))
            assert found[-1] == found[0]
            if factor == 1:
                unit, fall = result.guard_unit, result.guard.before - result.guard.after
                assert fall <= drop * unit * (1 + 1e-9)
            assert math.isclose(result.guard_unit, unit * size, rel_tol=1e-6)
            lengths.add(result.length)
    assert len(lengths) > 1  # so that there was something to decide


def test_the_size_of_losses():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=draws, dtype=torch.float64)
    y = x @ torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    model = nn.Linear(2, 1).double()

    def size(weight, bias=0.0, n=500, loss_fn=mse_loss):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([weight]))
            model.bias.fill_(bias)
        data = as_samples((x[:n], y[:n]), "data", torch.device("cpu"), torch.float64)
        losses = predict(model, data, loss_fn, 64).losses
        return size_of_losses(model, data, loss_fn, 64, losses), losses

    found, _ = size([3.0, 4.0])  # of two samples' targets, the mean squared difference: 2 x 25
    assert 42 < found < 58
    shifted, _ = size([3.0, 4.0], loss_fn=lambda z, t: mse_loss(z, t) + 7)
    assert math.isclose(shifted, found)
    found, losses = size([0.0, 0.0])  # all outputs are the same
    assert math.isclose(found, float(losses.std(correction=0)))
    assert size([-3.0, -4.0])[0] > 0  # worse than those of others
    assert math.isclose(size([0.0, 0.0], n=1)[0], float(y[0] ** 2))
    assert size([3.0, 4.0], n=1)[0] == 1.0


def test_accuracy_is_counted_in_itself(known):
    model, train, validation, _ = known
    result, _ = deleted(model, train, validation, calibrate=False)
    assert result.watched == "accuracy"
    assert result.guard_unit == 1.0


def test_streams_decide_alike_in_any_unit_of_the_targets():
    """What is left of max_drop after a request is counted in the unit that it has recorded."""
    lengths, left = [], []
    for factor in (1.0, 1e-3, 100.0):
        model, loss_fn, (x, y), (others, theirs) = of_counts("squares", factor, 0.3)
        data = torch.cat([x, others]), torch.cat([y, theirs])
        options = {"calibrate": False, "damping": 0.0, "output_damping": 0.0, "max_drop": 0.02}
        options |= {"repair_epochs": 0, "repair_drop": None}
        with Unlearner(model, data, loss_fn, **options) as stream:
            results = [stream.remove(some) for some in (range(20), range(20, 40), range(40, 60))]
            recorded = [entry.record["result"] for entry in stream.ledger[1:]]
        assert [each["guard_unit"] for each in recorded] == [each.guard_unit for each in results]
        fallen = results[0].guard.before - results[0].guard.after
        expected = 0.02 - fallen / results[0].guard_unit
        assert math.isclose(results[1].settings.max_drop, expected)
        lengths.append([each.length for each in results])
        left.append([each.settings.max_drop for each in results])
    assert lengths[0] == lengths[1] == lengths[2]
    assert min(lengths[0]) < 1
    assert np.allclose(left[1:], left[0], rtol=1e-6)
