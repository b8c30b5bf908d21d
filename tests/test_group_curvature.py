"""Operators over the ranks of a process group, against one process with all samples."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lcodec_ext._torch.wrapped import unwrapped
from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SecantOperator,
    UnitSelection,
    per_sample_gradients,
)
from processes import Failure

N = 37


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def conv(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 3)
    ).to(dtype)


def samples(kind, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    shape = (N, 2, 5, 5) if kind == "conv" else (N, 5)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    return x, torch.randint(0, 3, (N,), generator=generator)


def shard(data, rank, size, empty=None):
    """Uneven parts, in rank order; that of rank `empty` has no samples."""
    bounds = {1: [0, N], 2: [0, 9, N], 3: [0, 20, 25, N]}[size]
    if empty is not None:
        bounds = {2: [[0, 0, N], [0, N, N]], 3: [[0, 0, 9, N], [0, 9, 9, N], [0, 9, N, N]]}
        bounds = bounds[size][empty]
    part = slice(bounds[rank], bounds[rank + 1])
    return tuple(t[part] for t in data)


OPERATORS = {
    "hessian": (HessianOperator, {}),
    "gauss_newton": (GaussNewtonOperator, {}),
    "fisher": (FisherOperator, {}),
    "fisher of the model": (FisherOperator, {"kind": "model"}),
    "fisher formed again": (FisherOperator, {"cache_bytes": 0}),
    "hessian of a sum": (HessianOperator, {"reduction": "sum"}),
}


def operator(name, kind, data, chosen, group=None, wrap=False):
    model = {"mlp": mlp, "conv": conv}[kind](data[0].dtype)
    selection = UnitSelection({chosen: range(3)}) if chosen else UnitSelection.all(model)
    if wrap:
        model = DistributedDataParallel(model, process_group=group)
        model.register_forward_hook(lambda *_: 1 / 0)
    cls, options = OPERATORS[name]
    loss = F.cross_entropy
    if options.get("reduction") == "sum":
        loss = nn.CrossEntropyLoss(reduction="sum")
    return cls(model, loss, data, selection, damping=0.3, group=group, **options)


def all_of(A):
    V = torch.linspace(-1, 1, 2 * A.shape[0], dtype=A.dtype).reshape(-1, 2)
    solved = A.solve(V) if A._kind != "hessian" else A.solve(V, method="minres")
    return {
        "product": (A @ V).numpy(),
        "vector": (A @ V[:, 0]).numpy(),
        "diagonal": A.diagonal().numpy(),
        "dense": A.to_dense().numpy(),
        "solution": solved.x.numpy(),
        "method": solved.method,
        "iterative": A.solve(V[:, 0], method="minres", preconditioner="diagonal").x.numpy(),
    }


def on_ranks(rank, size, group, name, kind, chosen, empty, wrap):
    data = shard(samples(kind), rank, size, empty)
    A = operator(name, kind, data, chosen, group, wrap)
    before = A._route._ranks.bytes_sent
    _ = A @ torch.ones(A.shape[0], dtype=A.dtype)
    assert A._route._ranks.bytes_sent - before == 32 + 8 * (A.shape[0] + size)
    return all_of(A)


@pytest.mark.parametrize(
    ("name", "kind", "chosen", "empty"),
    [
        ("hessian", "mlp", "0", None),
        ("hessian", "mlp", "2", 0),
        ("hessian of a sum", "mlp", "0", 1),
        ("gauss_newton", "mlp", "", None),
        ("gauss_newton", "conv", "0", 1),
        ("gauss_newton", "conv", "4", None),
        ("fisher", "mlp", "", 0),
        ("fisher", "conv", "2", None),
        ("fisher formed again", "conv", "2", 1),
        ("fisher of the model", "mlp", "0", None),
    ],
)
def test_ranks_have_the_matrix_of_one_process(ranks, name, kind, chosen, empty):
    one = all_of(operator(name, kind, samples(kind), chosen))
    found = ranks.run(on_ranks, name, kind, chosen, empty, empty is None)
    for each in found:
        assert each["method"] == one["method"]
        for what in ("product", "vector", "diagonal", "dense", "solution", "iterative"):
            np.testing.assert_array_equal(each[what], found[0][what])  # the same bits
            scale = np.abs(one[what]).max()
            np.testing.assert_allclose(each[what], one[what], rtol=0, atol=1e-9 * scale)


def products(rank, size, group):
    data = shard(samples("mlp", torch.float32), rank, size)
    A = operator("fisher", "mlp", data, "", group)
    V = torch.linspace(-1, 1, A.shape[0])
    first = A @ V
    assert all(torch.equal(A @ V, first) for _ in range(3))
    B = operator("fisher", "mlp", data, "", group)
    assert torch.equal(B @ V, first)
    return first.numpy()


def test_a_product_is_within_the_bound(ranks):
    """Of the exact sum, in the roundings of docs/distributed.md; one process is, too."""
    data = samples("mlp", torch.float32)
    A = operator("fisher", "mlp", data, "")
    V = torch.linspace(-1, 1, A.shape[0])
    chunks = per_sample_gradients(mlp(torch.float32), F.cross_entropy, data, A.selection)
    G = torch.cat([each.dense() for each in chunks]).double()
    exact = G.T @ (G @ V.double()) / N + 0.3 * V.double()
    p, eps = len(V), torch.finfo(torch.float32).eps / 2
    terms = (G.abs().T @ (G.abs() @ V.double().abs())) / N + 0.3 * V.double().abs()
    bound = ((p + N + ranks.size + 4) * eps * terms).numpy()
    for found in [*ranks.run(products), (A @ V).numpy()]:
        assert (np.abs(found - exact.numpy()) <= bound).all()


def of_samplers(rank, size, group, drop_last=False):
    data = TensorDataset(*samples("mlp"))
    sampler = DistributedSampler(data, size, rank, drop_last=drop_last)
    loader, model = DataLoader(data, 4, sampler=sampler), mlp()
    A = GaussNewtonOperator(
        model, F.cross_entropy, loader, UnitSelection.all(model), damping=0.3, group=group
    )
    return A.to_dense()


def test_samples_that_a_sampler_repeats_count_once(ranks):
    expected = operator("gauss_newton", "mlp", samples("mlp"), None).to_dense()
    for found in ranks.run(of_samplers):  # 37 samples make no equal shards
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    with pytest.raises(Failure, match="leaves out 1 samples"):
        ranks.run(of_samplers, True)


def secant(rank, size, group, steps, empty):
    data = shard(samples("mlp"), rank, size, empty)
    selection = UnitSelection({"0": [1, 2]})
    A = SecantOperator(
        mlp(),
        F.cross_entropy,
        data,
        selection,
        steps=torch.from_numpy(steps),
        damping=0.1,
        group=group,
    )
    return A.to_dense().numpy(), A.solve(torch.ones(12, dtype=torch.float64)).x.numpy()


@pytest.mark.parametrize("empty", [None, 1])
def test_secant(ranks, rng, empty):
    steps = 1e-3 * rng.standard_normal((12, 2))
    one = secant(0, 1, None, steps, None)
    for found in ranks.run(secant, steps, empty):
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


def sums(rank, size, group):
    data = shard(samples("mlp"), rank, size)
    H = operator("hessian", "mlp", data, "0", group)
    G = operator("gauss_newton", "mlp", data, "0", group)
    A = 2 * G - H / 3
    return (A @ torch.ones(18, dtype=torch.float64)).numpy(), G.to_scipy().matvec(np.ones(18))


def test_sums_and_scipy(ranks):
    one = sums(0, 1, None)
    for found in ranks.run(sums):
        for a, b in zip(found, one, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def failing(rank, size, group, what):
    data = shard(samples("mlp"), rank, size)
    options = {"damping": 0.1}
    model, loss = mlp(), F.cross_entropy
    last = rank == size - 1
    if what == "damping" and last:
        options["damping"] = 0.2
    if what == "negative" and last:
        options["damping"] = -1.0
    if what == "model" and last:
        model[0].weight.data += 1e-9
    if what == "buffers":
        model.append(nn.BatchNorm1d(3).double())
        model[3].running_mean += rank
    if what == "loss" and last:
        loss = lambda z, y: 1 / 0  # noqa: E731
    if what == "empty":
        data = tuple(t[:0] for t in data)
    selection = UnitSelection({"0": [0, 1] if what == "selection" and last else [0]})
    A = HessianOperator(model, loss, data, selection, group=group, **options)
    if what == "vector":
        return A @ torch.full((6,), float(last), dtype=torch.float64)
    if what in ("columns", "columns of a sum"):
        A = A + A if what == "columns of a sum" else A
        return A @ torch.ones((6, 2) if last else (6,), dtype=torch.float64)
    if what == "columns of b":
        return A.solve(torch.ones((6, 2 + last), dtype=torch.float64))
    if what == "shape":
        return A @ torch.ones(5 if last else 6)
    b = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    if what in ("b", "b of a sum", "b of pairs"):
        A = A + A if what == "b of a sum" else A
        if what == "b of pairs":
            b, of = torch.linspace(0.1, 1, 8, dtype=b.dtype), UnitSelection({"2": [0]})
            A = SecantOperator(model, loss, data, of, steps=1e-3 * b, group=group)
        return A.solve(b + last * 1e-12, method="cholesky")
    if what == "places in b":
        return A.solve(torch.eye(6, dtype=torch.float64)[rank], method="cholesky")
    if what == "nan in b":
        return A.solve(b * torch.nan if last else b)
    if what == "length of b":
        return A.solve(b[:5] if last else b)
    if what == "name of a method":
        return A.solve(b, method="foo" if last else "auto")
    if what == "bytes":
        return A.to_dense(max_bytes=1 if last else 1000)
    if what == "method":
        return A.solve(b, method="cg" if last else "minres")
    if what == "rtol":
        return A.solve(b, method="minres", rtol=0.1 if last else None)
    if what == "later":
        A._route._own.product = lambda V: 1 / (0 if last else 1) * V
        A @ torch.ones(6, dtype=torch.float64)
    return A


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("damping", "ValueError", "the same damping: rank 0 has 0.1, rank"),
        ("selection", "ValueError", "the same selection: rank 0 has"),
        ("model", "ValueError", "the same parameters of model: rank 0 has"),
        ("buffers", "ValueError", "the same buffers of model (torch.distributed.broadcast those"),
        ("empty", "NoSamplesError", "data is empty on every rank"),
        ("columns", "ValueError", "the same shape of the right factor: rank 0 has '(6,)', rank"),
        ("columns of a sum", "ValueError", "the same shape of the right factor: rank 0 has"),
        ("columns of b", "ValueError", "the same shape of b: rank 0 has '(6, 2)', rank"),
        ("vector", "ValueError", "the right factor has different numbers on rank 0 and on rank"),
        ("b", "ValueError", ". A vector that was passed may differ between ranks, as a gradient"),
        ("b of a sum", "ValueError", "HessianOperator: b has different numbers on rank 0 and on"),
        ("b of pairs", "ValueError", "SecantOperator: b has different numbers on rank 0 and on"),
        ("places in b", "ValueError", "HessianOperator: b has different numbers on rank 0 and"),
        ("nan in b", "ValueError", "HessianOperator: b has different numbers on rank 0 and on"),
        ("method", "ValueError", "the same method: rank 0 has 'minres', rank"),
        ("rtol", "ValueError", "the same rtol: rank 0 has 1e-10, rank"),
    ],
)
def test_differences_are_named(ranks, what, kind, said):
    for failure in ranks.failures(failing, what):
        assert failure.kind == kind
        assert said in failure.message


@pytest.mark.parametrize(
    "what", ["negative", "loss", "later", "shape", "length of b", "name of a method", "bytes"]
)
def test_a_failure_on_one_rank_ends_all(ranks, what):
    *others, last = ranks.failures(failing, what)
    assert last.kind == ("ZeroDivisionError" if what in ("loss", "later") else "ValueError")
    for failure in others:
        assert failure.kind == "RuntimeError"
        assert f"failed on rank {ranks.size - 1} of the group" in failure.message


def drifting(rank, size, group):
    A = operator("hessian", "mlp", shard(samples("mlp"), rank, size), "0", group)
    return A._apply(torch.full((18,), float(rank), dtype=A.dtype))  # as of a solver


def test_the_checksum_of_a_product(ranks):
    for failure in ranks.failures(drifting):
        assert failure.kind == "RuntimeError"
        said = failure.message
        assert "a product is worked out from different numbers on rank 0 and on rank 1" in said
        assert said.index("A vector that was passed may differ") < said.index("processor")


def warned(rank, size, group):
    A = operator("hessian", "mlp", shard(samples("mlp"), rank, size), "0", group)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank == size - 1 else "ignore")
        A.solve(torch.linspace(-1, 1, 18, dtype=A.dtype), method="minres", max_iterations=1)


def test_a_warning_that_is_an_error_on_one_rank_ends_all(ranks):
    *others, last = ranks.failures(warned)
    assert last.kind == "ConvergenceWarning"
    for failure in others:
        assert "a warning failed on rank" in failure.message


def failing_rows(rank, size, group):
    A = operator("fisher", "mlp", shard(samples("mlp"), rank, size), "0", group)
    rows = A._low_rank(50)
    if rank == 0:
        rows._own.project = lambda V: 1 / 0
    return rows.gram()


def test_a_failure_with_the_rows_of_others_ends_all(ranks):
    first, *others = ranks.failures(failing_rows)
    assert first.kind == "ZeroDivisionError"
    for failure in others:
        assert "the products of rows failed on rank 0 of the group" in failure.message


def ignored(rank, size, group):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)))
    y = torch.tensor([[0, 1], [1, 0]])
    if rank:
        y[:, 0] = -100
    return HessianOperator(
        model, F.cross_entropy, (torch.ones(2, 2), y), UnitSelection({"0": [0]}), group=group
    )


def test_labels_that_are_ignored_unequally(ranks):
    for failure in ranks.failures(ignored):
        assert "loss_fn ignores 0 of 4 labels of a batch on one rank" in failure.message


def restricted(rank, size, group):
    data = shard(samples("mlp"), rank, size)
    operator("fisher", "conv", shard(samples("conv"), rank, size), "0", group)
    operator("fisher", "mlp", data, "", group).restrict(UnitSelection({"0": [0]}))


def test_restrict_is_refused(ranks):
    for failure in ranks.failures(restricted):
        assert failure.kind == "ValueError"
        assert "restrict() needs stored gradients" in failure.message


class Sharded(nn.Module):
    pass


def test_sharded_models_are_refused(monkeypatch):
    from torch.distributed import fsdp

    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Sharded)
    with pytest.raises(TypeError, match=r"model.0 is sharded \(FullyShardedDataParallel"):
        unwrapped(nn.Sequential(Sharded()))


def fully_sharded(rank, size, group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_tensor

    model = mlp()
    mesh = DeviceMesh.from_group(group, "cpu")
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.data, mesh))
    GaussNewtonOperator(
        model,
        F.cross_entropy,
        shard(samples("mlp"), rank, size),
        UnitSelection({"0": [0]}),
        group=group,
    )


def test_parts_of_parameters_are_refused(ranks):
    for failure in ranks.failures(fully_sharded):
        assert failure.kind == "TypeError"
        assert "model.0 is sharded" in failure.message
