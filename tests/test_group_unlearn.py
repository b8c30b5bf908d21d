"""Deletions over the ranks of a process group, against one process with all samples."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lcodec_ext._torch.group import Ranks
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.unlearning import TokenReplacement, unlearn
from lcodec_ext.unlearning.record import record

N, M, HELD = 90, 6, 60


def data(kind="mlp", n=N):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 5) if kind == "conv" else (6,)
    x = torch.randn((n + M + HELD, *shape), generator=generator)
    w = torch.randn((x[0].numel(), 3), generator=generator)
    y = (x.flatten(1) @ w + 1.5 * torch.randn((len(x), 3), generator=generator)).argmax(1)
    return (x[:M], y[:M]), (x[M : M + n], y[M : M + n]), (x[M + n :], y[M + n :])


def trained(kind="mlp", n=N, steps=60):
    torch.manual_seed(3)
    model = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)),
        "conv": lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        ),
    }[kind]()
    gone, kept, _ = data(kind, n)
    x, y = (torch.cat(each) for each in zip(gone, kept, strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def shard(samples, rank, size, empty=None):
    n = len(samples[0])
    bounds = {1: [0, n], 2: [0, n // 3, n], 3: [0, n // 2, n // 2 + 5, n]}[size]
    if empty is not None:
        bounds = {2: [[0, 0, n], [0, n, n]], 3: [[0, 0, 9, n], [0, 9, 9, n], [0, 9, n, n]]}
        bounds = bounds[size][empty]
    return tuple(t[bounds[rank] : bounds[rank + 1]] for t in samples)


CASES = {
    "given damping": {"damping": 1e-2, "weight_decay": 1e-3},
    "hessian": {"curvature": "hessian", "damping": 0.5, "output_damping": 0.0, "n_curvature": None},
    "fisher": {
        "curvature": "fisher", "damping": 0.1, "output_damping": 0.0, "selection": "gradient",
        "n_units": 4,
    },
    "paper": {"preset": "paper", "n_perturbations": 60, "n_units": 3, "damping": 0.1},
    "rows": {
        "preset": "paper", "n_perturbations": 20, "n_units": 3, "damping": 0.1,
        "foci_rows": "samples",
    },
    "no validation": {"damping": 1e-2},
    "sequential": {"damping": 1e-2, "order": "sequential", "repair_epochs": 0, "repair_drop": None},
    "steps": {"damping": 0.1, "steps": 2, "n_curvature": 40},
    "gradient": {"update": "gradient", "learning_rate": 0.1},
    "calibrated": {"weight_decay": 1e-3, "control_groups": 4},
    "calibrated, no finish": {"weight_decay": 1e-3, "control_groups": 4, "finish": 0},
    "ekfac": {"curvature": "ekfac", "weight_decay": 1e-3, "finish": 0},
    "users": {"weight_decay": 1e-3, "control_groups": 4, "finish": 0},
    "noise": {
        "preset": "paper", "selection": "full", "curvature": "gauss_newton", "damping": 0.1,
        "epsilon": 1.0, "delta": 1e-3, "weight_decay": 0.1, "lipschitz": 1.0,
        "hessian_lipschitz": 1.0,
    },
    "repair": {"damping": 1e-4, "repair_drop": None, "repair_epochs": 1, "repair_batch_size": 32},
    "step": {"selection": "step", "max_parameters": 20, "damping": 1e-2},
}  # fmt: skip


def deletion(rank, size, group, name, kind="mlp", empty=None, wrap=False, n=N, **more):
    torch.manual_seed(7)
    gone, kept, held = data(kind, n)
    model = trained(kind, n)
    if wrap:
        model = DistributedDataParallel(model, process_group=group)
        model.register_forward_hook(lambda *_: 1 / 0)
    options = CASES[name] | more
    if name != "no validation" and options.get("preset") != "paper":
        options["validation"] = held
    if name == "users":
        options["groups"] = shard([np.arange(n) // 6], rank, size, empty)[0]
    if group is not None:
        options["group"] = group
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = unlearn(model, gone, shard(kept, rank, size, empty), F.cross_entropy, **options)
    values = found.to_dict()
    for each in ("seconds", "curvature_plan", "estimate"):
        values.pop(each, None)
    return (
        {k: v.numpy() for k, v in found.model.state_dict().items()},
        values,
        [str(each.message) for each in caught],
    )


def close(a, b, where=""):
    """Whether what was found is the same up to rounding."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, pair in enumerate(zip(a, b, strict=True)):
            close(*pair, f"{where}[{k}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4), where
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("name", "kind", "empty"),
    [
        ("given damping", "mlp", None),
        ("given damping", "conv", 1),
        ("hessian", "mlp", 0),
        ("fisher", "conv", None),
        ("paper", "mlp", None),
        ("paper", "conv", 1),
        ("rows", "mlp", None),
        ("no validation", "mlp", None),
        ("sequential", "mlp", 1),
        ("steps", "mlp", None),
        ("gradient", "mlp", 0),
        ("step", "mlp", None),
        ("calibrated", "mlp", None),
        ("calibrated, no finish", "conv", 1),
        ("ekfac", "conv", 0),
        ("users", "mlp", None),
        ("repair", "conv", 0),
    ],
)
def test_ranks_delete_as_one_process(ranks, name, kind, empty):
    weights, values, warned = deletion(0, 1, None, name, kind)
    found = ranks.run(deletion, name, kind, empty, empty is None)
    for own, told, heard in found:
        assert told == found[0][1]
        assert heard == found[0][2]
        assert len(heard) == len(warned)
        close(told, values)
        for key, value in own.items():
            np.testing.assert_array_equal(value, found[0][0][key])
            np.testing.assert_allclose(value, weights[key], rtol=2e-3, atol=2e-4)


def test_mini_batches_finish(ranks):
    """From 5000 retained samples on; those of a batch come from all ranks."""
    more = {"n": 5000}
    weights, values, _ = deletion(0, 1, None, "calibrated", **more)
    assert "mini-batches" in values["calibration"]["finish_by"]
    found = ranks.run(with_more, "calibrated", more)
    for own, told, _ in found:
        assert told == found[0][1]
        assert told["calibration"]["finish_by"] == values["calibration"]["finish_by"]
        for key, value in own.items():
            np.testing.assert_array_equal(value, found[0][0][key])
            np.testing.assert_allclose(value, weights[key], rtol=0.02, atol=0.02)


def with_more(rank, size, group, name, more, *arguments):
    return deletion(rank, size, group, name, *arguments, **more)


def test_noise_is_drawn_once(ranks):
    (weights, values, _), *others = ranks.run(deletion, "noise")
    assert values["guarantee"]["sigma"] > 0
    for own, told, _ in others:
        assert told == values
        assert all((own[key] == value).all() for key, value in weights.items())


def regression(rank, size, group, held):
    (x, _), (xs, _), (xv, _) = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    kept = shard((xs, xs.sum(1, keepdim=True)), rank, size)
    options = {"validation": (xv, xv.sum(1, keepdim=True))} if held else {}
    if group is not None:
        options["group"] = group
    found = unlearn(
        model, (x, x.sum(1, keepdim=True)), kept, F.mse_loss, damping=0.1, calibrate=False,
        inplace=True, **options,
    )  # fmt: skip
    assert found.model is model
    return found.guard_unit, found.guard.after, model[0].weight.detach().numpy()


@pytest.mark.parametrize("held", [True, False])
def test_regression(ranks, held):
    one = regression(0, 1, None, held)
    for found in ranks.run(regression, held):
        assert found[:2] == pytest.approx(one[:2], rel=1e-4)
        np.testing.assert_allclose(found[2], one[2], rtol=1e-3, atol=1e-5)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1))


def recorded(rank, size, group, rows, words):
    if words:
        model = Words().eval()
        x = torch.randint(0, 20, (5, 7), generator=torch.Generator().manual_seed(0))
        more = {"perturb": TokenReplacement(20, n_tokens=2)}
    else:
        model, x, more = trained("conv").eval(), data("conv")[0][0], {}
    samples = as_samples((x, torch.arange(len(x)) % 2), "forget", torch.device("cpu"), x.dtype)
    options = {"n_perturbations": 25, "rows": rows, "batch_size": 17, "seed": 4, **more}
    one = record(model, samples, F.cross_entropy, **options)
    over = record(model, samples, F.cross_entropy, ranks=Ranks(group, "unlearn"), **options)
    assert over.owners == one.owners
    np.testing.assert_array_equal(over.activations, one.activations)
    np.testing.assert_array_equal(over.losses, one.losses)
    np.testing.assert_array_equal(over.rounding, one.rounding)
    return over.activations, over.losses


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("words", [False, True])
def test_the_recording_is_that_of_one_process(ranks, rows, words):
    first, *others = ranks.run(recorded, rows, words)
    assert np.ptp(first[1]) > 0
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


def from_loader(rank, size, group, drop):
    gone, kept, held = data()
    dataset = TensorDataset(*(t[:89] for t in kept))
    others = size + (drop == "others")
    sampler = DistributedSampler(
        dataset, others, rank, shuffle=True, seed=5, drop_last=drop is True
    )
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    found = unlearn(
        trained(), gone, loader, F.cross_entropy, validation=held, damping=0.01,
        n_monitor=None, group=group, calibrate=False,
    )  # fmt: skip
    return found.n_retain, found.loss_retain.before


def test_a_distributed_sampler_repeats_nothing(ranks):
    gone, kept, held = data()
    kept = tuple(t[:89] for t in kept)
    one = unlearn(
        trained(), gone, kept, F.cross_entropy, validation=held, damping=0.01, n_monitor=None,
        calibrate=False,
    )  # fmt: skip
    for n, loss in ranks.run(from_loader, False):
        assert n == 89  # of 90 that the sampler deals out
        assert loss == pytest.approx(one.loss_retain.before, rel=1e-6)
    for failure in ranks.failures(from_loader, True):
        assert "of retain leaves out" in failure.message
    for failure in ranks.failures(from_loader, "others"):
        assert f"of {ranks.size + 1}, and this is rank" in failure.message


def dealt(rank, size, group, what):
    gone, kept, _ = data()
    if what == "whole":
        return unlearn(trained(), gone, kept, F.cross_entropy, damping=0.01, group=group)
    if what == "like":  # of one size, and equal in the samples that are looked at first
        kept = tuple(t.repeat(3, *[1] * (t.ndim - 1))[: 2 * N] for t in kept)
        kept[0][1] += rank
        return unlearn(trained(), gone, kept, F.cross_entropy, damping=0.01, group=group)
    last = rank == size - 1
    options = {what: 1} if last and what == "seed" else {}
    if what == "shuffle":
        options["shuffle"] = not last
    dataset = TensorDataset(*(t[: N - (last and what == "samples")] for t in kept))
    sampler = DistributedSampler(dataset, size, rank, **options)
    if what == "epoch":
        sampler.set_epoch(rank)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    return unlearn(trained(), gone, loader, F.cross_entropy, damping=0.01, group=group)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("whole", "rank 0 and rank 1 of the group have the same 90 samples of retain"),
        ("seed", "deal out alike, or samples are lost and doubled: seed is 0 on rank 0 of the"),
        ("epoch", "epoch is 0 on rank 0 of the group, and 1 on rank 1"),
        ("shuffle", "shuffle is True on rank 0 of the group, and False on rank"),
        ("samples", "the number of samples is 90 on rank 0 of the group, and 89 on rank"),
    ],
)
def test_samples_that_were_not_dealt_out_are_refused(ranks, what, said):
    for failure in ranks.failures(dealt, what):
        assert failure.kind == "ValueError"
        assert said in failure.message


def test_shards_that_agree_in_some_samples_are_taken(ranks):
    assert {found.n_retain for found in ranks.run(dealt, "like")} == {2 * N * ranks.size}


class Failing(nn.Module):
    """Cross-entropy that fails or is infinite on one rank, from some call on."""

    def __init__(self, after, how):
        super().__init__()
        self.left, self.how = after, how

    def forward(self, outputs, targets):
        self.left -= 1
        loss = F.cross_entropy(outputs, targets)
        if self.left > 0:
            return loss
        return loss * math.nan if self.how == "nan" else 1 / 0

    def __deepcopy__(self, memo):
        return self


def failing(rank, size, group, what, after=0):
    gone, kept, held = data()
    kept, last = shard(kept, rank, size), rank == size - 1
    model, loss, options = trained(), F.cross_entropy, {"validation": held}
    if what == "model" and last:
        model[0].bias.data += 1e-6
    if what == "forget" and last:
        gone = gone[0] + 1, gone[1]
    if what == "validation" and last:
        options["validation"] = held[0][1:], held[1][1:]
    if what in ("seed", "strange") and last:
        options |= {"seed": 1} if what == "seed" else {"strange": 1}
    if what == "empty":
        kept = tuple(t[:0] for t in kept)
    if what == "retain" and last:
        kept = None
    if what == "no validation" and last:
        options = {}
    if what == "budget":
        options["max_seconds"] = 10
    if what == "reading" and last:
        kept = Broken(kept)
    if what in ("fails", "nan") and last:
        loss = Failing(after, what)
    elif what in ("fails", "nan"):
        loss = Failing(10**9, what)
    return unlearn(model, gone, kept, loss, group=group, **options)


class Norm(nn.BatchNorm1d):
    """A batch norm that, in training mode and on one rank, fails after some calls, or drifts."""

    left, drift = math.inf, 0.0  # of the process

    def forward(self, x):
        if self.training:
            Norm.left -= 1
            if Norm.left < 0:
                raise MemoryError("no memory left")
            x = x * (1 + Norm.drift)
        return super().forward(x)


def with_norm(rank, size, group, left, drift, **options):
    gone, kept, held = data()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Norm(8), nn.ReLU(), nn.Linear(8, 3))
    if rank == size - 1:
        Norm.left, Norm.drift = left, drift
    options = {"damping": 0.1, "repair_drop": None, "repair_epochs": 0} | options
    try:
        found = unlearn(
            model, gone, shard(kept, rank, size), F.cross_entropy, validation=held,
            calibrate=False, group=group, **options,
        )  # fmt: skip
    finally:
        Norm.left, Norm.drift = math.inf, 0.0
    return {k: v.numpy() for k, v in found.model.state_dict().items()}


def repaired(rank, size, group, left, drift):
    return with_norm(rank, size, group, left, drift, repair_epochs=1, n_recalibrate=None)


def recalibrated(rank, size, group, left, drift):
    return with_norm(rank, size, group, left, drift, n_recalibrate=40)


@pytest.mark.parametrize("function", [repaired, recalibrated])
def test_a_failure_in_what_every_rank_computes_ends_all(ranks, function):
    left = 2 if function is repaired else 0  # behind the check of the model
    *others, last = ranks.failures(function, left, 0.0)
    assert last.kind == "MemoryError"
    what = "a batch of the repair" if function is repaired else "recalibration"
    for failure in others:
        assert failure.message.startswith(f"{what} failed on rank {ranks.size - 1} of the group")


@pytest.mark.parametrize("function", [repaired, recalibrated])
def test_what_every_rank_computes_does_not_drift_apart(ranks, function):
    first, *others = ranks.run(function, math.inf, 1e-4)
    for other in others:
        for key, value in first.items():
            np.testing.assert_array_equal(other[key], value)


def warned(rank, size, group):
    gone, kept, _ = data()
    model, kept = trained(), shard(kept, rank, size)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if rank == size - 1 else "ignore")
        try:
            unlearn(model, gone, kept, F.cross_entropy, inplace=True, group=group)
        except (UserWarning, RuntimeError) as error:
            same = zip(model.parameters(), trained().parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in same)
            return type(error).__name__, str(error)


def test_a_warning_that_is_an_error_on_one_rank_ends_all(ranks):
    *others, last = ranks.run(warned)
    assert last[0] == "UserWarning"
    for kind, message in others:
        assert kind == "RuntimeError"
        assert f"a warning failed on rank {ranks.size - 1} of the group: UserWarning" in message


class Broken(torch.utils.data.Dataset):
    """Samples that cannot be read any more after a while."""

    def __init__(self, samples):
        self.samples, self.left = samples, 60

    def __len__(self):
        return len(self.samples[0])

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return self.samples[0][i], self.samples[1][i]


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("model", "ValueError", "the same parameters of model: rank 0 has"),
        ("forget", "ValueError", "the same forget: rank 0 has"),
        ("validation", "ValueError", "the same validation: rank 0 has"),
        ("retain", "ValueError", "the same retain: rank 0 has 'samples', rank"),
        ("no validation", "ValueError", "the same validation: rank 0 has 'samples', rank"),
        ("seed", "ValueError", "the same seed: rank 0 has 0, rank"),
        ("empty", "NoSamplesError", "retain is empty on every rank"),
        ("budget", "ValueError", "max_seconds, budget and max_memory are for one process"),
    ],
)
def test_differences_are_named(ranks, what, kind, said):
    for failure in ranks.failures(failing, what):
        assert failure.kind == kind
        assert said in failure.message


@pytest.mark.parametrize(
    ("what", "after", "kind", "others"),
    [
        ("strange", 0, "TypeError", "RuntimeError"),
        ("reading", 0, "OSError", "RuntimeError"),
        ("fails", 150, "ZeroDivisionError", "RuntimeError"),
        ("fails", 250, "ZeroDivisionError", "RuntimeError"),
    ],
)
def test_a_failure_on_one_rank_ends_all(ranks, what, after, kind, others):
    *first, last = ranks.failures(failing, what, after)
    assert last.kind == kind
    for failure in first:
        assert failure.kind == others
        assert f"failed on rank {ranks.size - 1} of the group: {kind}" in failure.message


@pytest.mark.parametrize("after", [40, 150])
def test_nan_on_one_rank_is_met_by_all(ranks, after):
    *first, last = ranks.failures(failing, "nan", after)
    assert last.kind in ("ValueError", "NotFiniteError")
    assert {failure.kind for failure in first} <= {"RuntimeError", last.kind}


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x, scale):
        return self.body(x) * scale[:, None]


def named(samples):
    return [{"x": x, "scale": torch.ones(()), "labels": y} for x, y in zip(*samples, strict=True)]


def of_datasets(rank, size, group):
    gone, kept, held = data()
    own = named(shard(kept, rank, size, None if group is None else 0))
    options = {"repair_epochs": 1, "repair_drop": None, "n_recalibrate": 40}
    found = unlearn(
        Named(), named(gone), own, F.cross_entropy, validation=named(held), damping=0.1,
        calibrate=False, order="sequential", n_curvature=None, group=group, **options,
    )  # fmt: skip
    return {k: v.numpy() for k, v in found.model.state_dict().items()}, found.n_retain


def test_datasets_of_dicts_and_a_rank_without_any(ranks):
    weights, n = of_datasets(0, 1, None)
    found = ranks.run(of_datasets)
    for own, told in found:
        assert told == n == N
        for key, value in own.items():
            np.testing.assert_array_equal(value, found[0][0][key])
            np.testing.assert_allclose(value, weights[key], rtol=5e-3, atol=5e-4)
