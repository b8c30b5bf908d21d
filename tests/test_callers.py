"""Warnings point at the user's line, however deep they arise."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lcodec_ext
from lcodec_ext import FOCISelector
from lcodec_ext.compat import codec, scrub

X, CONSTANT = np.random.default_rng(0).random((20, 2)), np.ones(20)


def zero_loss(function, **options):
    """A request whose loss is 0; the three functions are of different depths."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[999.0, 0.0], [-999.0, 0.0]]))
    params = SimpleNamespace(
        selectionType="FOCI", FOCIType="full", order="BP", HessType="CR", approxType="FD",
        n_perturbations=9, scrub_batch_size=1, lr=1.0,
    )  # fmt: skip
    x = torch.tensor([9.0, 0.0])
    criterion = nn.CrossEntropyLoss()
    if function is scrub.reid_inp_perturb:
        engine = SimpleNamespace(
            criterion=criterion,
            compute_loss=lambda criterion, outputs, targets: criterion(outputs, targets),
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        )
        return function(model, [{"img": x, "pid": 0}], engine, params, "cpu", "stem", **options)
    copy = (model,) if function is scrub.vgg_inp_perturb else ()
    data = TensorDataset(x[None], torch.tensor([0]))
    return function(model, *copy, data, criterion, params, None, "cpu", "stem", **options)


@pytest.mark.parametrize("bugs", [False, True])
@pytest.mark.parametrize(
    "function",
    [scrub.inp_perturb, scrub.reid_inp_perturb, scrub.vgg_inp_perturb],
)
@pytest.mark.filterwarnings("ignore:y is constant:UserWarning")  # FOCI's word, with the bugs
def test_of_scripts(function, bugs):
    with pytest.warns(UserWarning, match="the loss of the request is 0") as told:
        zero_loss(function, reference_bugs=bugs)
    assert {each.filename for each in told} == {__file__}


@pytest.mark.parametrize(
    "call",
    [
        lambda: lcodec_ext.codec(CONSTANT, X),
        lambda: lcodec_ext.codec_test(CONSTANT, X, n_permutations=9),
        lambda: lcodec_ext.xi(X[:, 0], CONSTANT),
        lambda: codec.codec2(X, CONSTANT),
        lambda: codec.foci(X, CONSTANT),
        lambda: codec.cheap_torch_foci(torch.tensor(X), torch.tensor(CONSTANT)),
        lambda: torch.no_grad()(codec.torch_codec3)(X[:, :1], CONSTANT, X[:, 1:]),
        lambda: FOCISelector().fit(np.c_[X, CONSTANT], X[:, 0]),
    ],
)
def test_of_functions(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert told
    assert {(each.filename, each.lineno) for each in told} == {
        (__file__, call.__code__.co_firstlineno)
    }
