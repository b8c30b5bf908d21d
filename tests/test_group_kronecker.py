"""EK-FAC over the ranks of a process group, against one process with all samples."""

import functools

import pytest
import torch
import torch.nn.functional as F

from lcodec_ext.curvature import EKFACOperator, UnitSelection
from processes import Failure
from test_group_curvature import conv, mlp, samples, shard


def made(kind, model, selected, data, group=None, **options):
    model = model(data[0].dtype)
    selection = UnitSelection.all(model) if selected is None else UnitSelection(selected)
    loss = F.cross_entropy
    if options.get("reduction") == "sum":
        loss = functools.partial(loss, reduction="sum")
    return EKFACOperator(
        model, loss, data, selection, kind=kind, damping=0.3, group=group, **options
    )


MODELS = {"mlp": mlp, "conv": conv}


def on_ranks(rank, size, group, kind, name, selected, empty, options):
    data = shard(samples(name), rank, size, empty)
    A = made(kind, MODELS[name], selected, data, group, **options)
    return A.to_dense(), A.solve(torch.ones(A.shape[0], dtype=A.dtype)).x, A.factors.n


@pytest.mark.parametrize(
    ("kind", "name", "selected", "empty", "options"),
    [
        ("model", "mlp", None, None, {}),
        ("model", "conv", {"0": [0, 2], "4": [1]}, 0, {"reduction": "sum"}),
        ("empirical", "conv", None, 1, {}),
        ("model", "mlp", {"0": [1]}, None, {"draws": 2}),
    ],
)
def test_ranks_have_the_matrix_of_one_process(ranks, kind, name, selected, empty, options):
    one = made(kind, MODELS[name], selected, samples(name), **options)
    found = ranks.run(on_ranks, kind, name, selected, empty, options)
    for dense, solution, n in found:
        assert n == one.factors.n
        assert torch.equal(dense, found[0][0])
        assert torch.equal(solution, found[0][1])
        torch.testing.assert_close(dense, one.to_dense(), rtol=1e-9, atol=1e-12)


def differing(rank, size, group, what):
    data = shard(samples("mlp"), rank, size)
    if what == "empty":
        data = tuple(t[:0] for t in data)
    options = {"seed": rank} if what == "seed" else {}
    if what == "draws" and rank:
        options = {"draws": 0}
    return made("model", mlp, None, data, group, **options)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("seed", "same seed"),
        ("draws", "draws must be"),
        ("empty", "data is empty on every rank"),
    ],
)
def test_what_is_told_on_all_ranks(ranks, what, message):
    with pytest.raises(Failure, match=message):
        ranks.run(differing, what)
