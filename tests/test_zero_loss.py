"""Samples whose loss is exactly 0 under all perturbations: nothing depends, nothing is selected."""

import pytest
import torch
from torch import nn

from lcodec_ext.unlearning import Unlearner, unlearn

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
    with pytest.warns(UserWarning, match="it depends on no unit, so none was selected"):
        stream.remove(0)
    assert (stream.removed, stream.pending) == ((0,), ())
    stream.remove(last)
    assert stream.removed == (0, last)
    assert not all(map(torch.equal, stream.model.parameters(), model.parameters()))
