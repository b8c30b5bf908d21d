"""Samples for which the paper's way has no step: the loss is 0 or constant, or the secant bad."""

import warnings

import pytest
import torch
from torch import nn

from lcodec_ext.unlearning import IndefiniteCurvatureError, Unlearner, unlearn, verify_ledger

CE = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def fitted():
    """A network that is sure of itself, and its samples, those with the loss 0 first."""
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(300):
        optim.zero_grad()
        CE(model(x), y).backward()
        optim.step()
    with torch.no_grad():
        for p in model[2].parameters():
            p *= 30
    surest = x[:, 0].abs().argsort(descending=True)
    assert CE(model(x[surest[:1]]), y[surest[:1]]).item() == 0
    return model, x[surest], y[surest]


@pytest.mark.parametrize("selection", ["lfoci", "cheap"])
def test_is_deleted_without_a_step(fitted, selection):
    model, x, y = fitted
    with pytest.warns(UserWarning, match="the loss of 1 sample is 0 under all perturbations"):
        result = unlearn(
            model,
            (x[:1], y[:1]),
            (x[1:], y[1:]),
            CE,
            preset="paper",
            selection=selection,
            weight_decay=0.01,
            n_perturbations=50,
        )
    assert not result.skipped
    assert result.n_parameters == 0
    assert all(map(torch.equal, result.model.parameters(), model.parameters()))
    assert result.to_dict()["skipped"] == []


def test_a_stream_goes_on(fitted):
    model, x, y = fitted
    last = len(x) - 1
    y = torch.cat([y[:last], 1 - y[last:]])  # with a loss
    stream = Unlearner(model, (x, y), CE, preset="paper", weight_decay=0.01, n_perturbations=50)
    with pytest.warns(UserWarning, match="it depends on no unit, so none is selected"):
        stream.remove(0)
    assert (stream.removed, stream.pending) == ((0,), ())
    stream.remove(last)
    assert stream.removed == (0, last)
    assert not all(map(torch.equal, stream.model.parameters(), model.parameters()))


def stream_of(fitted, directory, **options):
    model, x, y = fitted
    return Unlearner(
        model,
        (x, y),
        CE,
        preset="paper",
        weight_decay=0.01,
        n_perturbations=50,
        directory=directory,
        **options,
    )


def zero(model, x, y):
    """Numbers of samples whose loss is 0, also when they are perturbed."""
    return [k for k in range(len(x)) if not CE(model(x[k : k + 1]), y[k : k + 1])][:3]


def test_is_in_the_ledger_and_can_be_rolled_back(fitted, tmp_path):
    model, x, y = fitted
    last = len(x) - 1
    y = torch.cat([y[:last], 1 - y[last:]])
    stream = stream_of((model, x, y), tmp_path / "stream")
    stream.remove(last)
    after = [p.clone() for p in stream.model.parameters()]
    with pytest.warns(UserWarning, match="the loss of 1 sample is 0 under all perturbations"):
        stream.remove(0, note="of no loss")
    assert all(map(torch.equal, stream.model.parameters(), after))
    entry = stream.ledger[len(stream.ledger) - 1]
    assert (entry.kind, entry.record["ids"], entry.record["skipped"]) == ("remove", [0], [])
    assert (entry.record["n_removed"], entry.record["n_pending"]) == (2, 0)
    assert entry.record["result"]["n_parameters"] == 0
    assert any("none is selected" in text for text in entry.environment["warnings"])
    assert verify_ledger(tmp_path / "stream", stream.model, (x, y))
    stream.rollback()
    assert stream.removed == (last,)
    assert all(map(torch.equal, stream.model.parameters(), after))
    with pytest.warns(UserWarning, match="the loss of 1 sample is 0 under all perturbations"):
        stream.remove(0)
    stream.rollback(0)
    assert stream.removed == ()
    assert all(map(torch.equal, stream.model.parameters(), model.parameters()))


@pytest.mark.parametrize("order", ["batch", "sequential"])
def test_of_several_samples(fitted, order):
    """All of them together, or each by itself, and one with a loss among them."""
    model, x, y = fitted
    last = len(x) - 1
    y = torch.cat([y[:last], 1 - y[last:]])
    idle = zero(model, x, y)
    assert len(idle) == 3

    def delete(numbers):
        stay = [k for k in range(len(x)) if k not in numbers]
        return unlearn(
            model,
            (x[numbers], y[numbers]),
            (x[stay], y[stay]),
            CE,
            preset="paper",
            order=order,
            weight_decay=0.01,
            n_perturbations=50,
        )

    with pytest.warns(UserWarning, match="the loss of 3 samples is 0 under all perturbations"):
        result = delete(idle)
    assert (result.skipped, result.n_parameters, result.step_norm) == ((), 0, 0)
    assert "THE MODEL IS UNCHANGED" in repr(result)
    with warnings.catch_warnings(record=True) as caught:  # of its large loss, too
        warnings.simplefilter("always")
        result = delete([*idle, last])
    told = [str(each.message) for each in caught]
    # A batch has a mean loss, which is that of the one.
    assert any("the loss of 3 samples is 0" in text for text in told) == (order == "sequential")
    assert result.step_norm > 0
    assert result.skipped == ()


# ---------------------------------------------------------------------------------------------
# Where there is no step, and the samples still matter


@pytest.fixture(scope="module")
def partly_dead():
    """Where the first input is far below 0 no unit is active: the loss there is log(2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0] = 2.0
    x = torch.randn(40, 4).abs()
    x[:3, 0] = -50
    y = (x[:, 1] > 0.5).long()
    optim = torch.optim.SGD(model[2].parameters(), lr=0.2, weight_decay=0.05)
    for _ in range(50):
        optim.zero_grad()
        CE(model(x), y).backward()
        optim.step()
    return model, x, y


NO_STEP = (
    "no step was found for {} of {}, which the model still knows.*the same under all perturbations"
)


def test_a_request_alone_is_refused(partly_dead):
    model, x, y = partly_dead
    for order in ("batch", "sequential"):
        with pytest.raises(ValueError, match="the same under all perturbations, 0.693"):
            unlearn(model, (x[:1], y[:1]), (x[1:], y[1:]), CE, preset="paper", order=order)


@pytest.mark.parametrize("selection", ["lfoci", "cheap"])
def test_one_after_the_other_goes_on(partly_dead, selection):
    model, x, y = partly_dead
    options = {"preset": "paper", "damping": 1.0, "n_perturbations": 50}
    stay = [k for k in range(40) if k not in (1, 20, 2, 30)]
    with pytest.warns(UserWarning, match=NO_STEP.format(2, "4 samples")):
        result = unlearn(
            model, (x[[1, 20, 2, 30]], y[[1, 20, 2, 30]]), (x[stay], y[stay]), CE,
            selection=selection, order="sequential", **options,
        )  # fmt: skip
    assert result.skipped == (0, 2)
    assert "NOT REMOVED   2 samples, which need retraining" in repr(result)
    assert result.step_norm > 0
    assert result.n_units > 0


def test_a_stream_has_them_pending(partly_dead, tmp_path):
    model, x, y = partly_dead
    stream = stream_of((model, x, y), tmp_path / "stream")
    with pytest.warns(UserWarning, match=NO_STEP.format(1, "1 sample")):
        result = stream.remove(0)
    assert result.skipped == (0,)
    assert "NOT REMOVED   1 sample, which needs retraining" in repr(result)
    assert (stream.removed, stream.pending) == ((), (0,))
    assert all(map(torch.equal, stream.model.parameters(), model.parameters()))
    entry = stream.ledger[len(stream.ledger) - 1]
    assert (entry.kind, entry.record["skipped"]) == ("skip", [0])
    assert "no step was found" in entry.environment["warnings"][0]
    stream.remove(20)
    assert (stream.removed, stream.pending) == ((20,), (0,))
    assert verify_ledger(tmp_path / "stream", stream.model, (x, y))


def concave(outputs, targets):
    """Far from its target it is concave, and no secant is positive."""
    return (1 - torch.exp(-((outputs[:, 0] - targets) ** 2) / 2)).mean()


def test_a_secant_that_is_not_positive(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(2, 1), torch.randn(30, 2)
    y = model(x).detach()[:, 0] + 2
    options = {"preset": "paper", "selection": "full", "damping": 0.0}
    with pytest.raises(IndefiniteCurvatureError):
        unlearn(model, (x[:1], y[:1]), (x[1:], y[1:]), concave, **options)
    stream = Unlearner(model, (x, y), concave, **options)
    with pytest.warns(UserWarning, match="no step was found for 1 of 1 sample.*None of 1 pairs"):
        stream.remove(3)
    assert stream.pending == (3,)
    assert all(map(torch.equal, stream.model.parameters(), model.parameters()))
    with pytest.raises(IndefiniteCurvatureError):  # another method has no such word
        Unlearner(model, (x, y), concave, **options | {"curvature": "hessian"}).remove(3)
    with pytest.warns(UserWarning, match="no step was found for 2 of 2 samples"):
        result = unlearn(
            model, (x[:2], y[:2]), (x[2:], y[2:]), concave, order="sequential", **options
        )
    assert result.skipped == (0, 1)
