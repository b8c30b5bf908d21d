import copy
import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector as flat
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import unlearner_process
from lcodec_ext import _files
from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext.curvature import UnitSelection
from lcodec_ext.unlearning.privacy import PrivacyBudget, PrivacyBudgetExceeded
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream import checkpoints, ledger, steps, unlearner, verify_ledger
from lcodec_ext.unlearning.stream.checkpoints import LedgerError
from lcodec_ext.unlearning.stream.ledger import Ledger
from lcodec_ext.unlearning.stream.steps import compact, request_seed
from lcodec_ext.unlearning.stream.unlearner import Unlearner
from lcodec_ext.unlearning.unlearn import unlearn
from unlearner_process import N, begin_or_resume, go_on, make_data, make_model, step

calls = []
noise_is_large = pytest.mark.filterwarnings("ignore:the noise for epsilon")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A cheap step in the place of `unlearn`; what it was called with is in calls."""
    calls.clear()

    def record(model, forget, retain, loss_fn, **options):
        refuse = getattr(record, "refuse", ())
        calls.append({"model": model, "forget": forget, "retain": retain, **options})
        return step(model, forget, retain, loss_fn, refuse=refuse, **options)

    monkeypatch.setattr(unlearner, "unlearn", record)
    return record


def make(directory=None, data=None, **options):
    return Unlearner(
        make_model(), data or make_data(), cross_entropy, directory=directory, **options
    )


def resume(directory, model=None, data=None, **options):
    return Unlearner.resume(
        directory, model or make_model(), data or make_data(), cross_entropy, **options
    )


def weights(stream):
    return state_hash(state_of(stream.model))


def records(stream):
    return [(entry.kind, entry.record) for entry in stream.ledger]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "stream"


@pytest.fixture(params=["in memory", "on disk"])
def place(request, folder):
    return None if request.param == "in memory" else folder


# ---------------------------------------------------------------------------------------------
# Requests


def test_requests_add_up(place):
    with make(place) as stream:
        before = weights(stream)
        result = stream.remove([3, 1], note="by the person")
        assert stream.removed == (3, 1)
        assert state_hash(state_of(result.model)) == weights(stream) != before
        stream.remove(7)
        stream.remove(np.array([0, 5]))
        stream.remove(torch.tensor([8]))
        stream.remove(range(10, 12))
        assert stream.removed == (3, 1, 7, 0, 5, 8, 10, 11)
        assert stream.pending == ()
        assert stream.retained.tolist() == [i for i in range(N) if i not in stream.removed]
        x, _ = make_data()
        for call, ids in zip(calls, ([3, 1], [7], [0, 5], [8], [10, 11]), strict=True):
            torch.testing.assert_close(call["forget"].fetch(slice(None)).args[0], x[ids])
        retained = calls[-1]["retain"].fetch(slice(None)).args[0]
        torch.testing.assert_close(retained, x[stream.retained])
        kinds = [entry.kind for entry in stream.ledger]
        assert kinds == ["start", *["remove"] * 5]
        record = stream.ledger[1].record
        assert record["ids"] == [3, 1]
        assert record["note"] == "by the person"
        assert stream.ledger[2].record["note"] is None
        assert [e.record["n_removed"] for e in stream.ledger] == [0, 2, 3, 5, 6, 8]
        assert [e.record["n_retained"] for e in stream.ledger] == [
            N - k for k in (0, 2, 3, 5, 6, 8)
        ]


def test_an_entry_says_what_was_done(place):
    with make(place, seed=11, damping=0.5) as stream:
        stream.remove([3, 1])
        start, entry = stream.ledger
        assert Settings.from_dict(start.record["settings"]) == stream.settings
        assert stream.settings == Settings.preset("recommended", seed=11, damping=0.5)
        assert start.record["train"]["n"] == N
        assert start.record["loss_fn"] == "cross_entropy"
        x, y = make_data()
        for i, found in zip((3, 1), entry.record["hashes"], strict=True):
            digest = hashlib.sha256(b"torch.float64 (3,);" + x[i].numpy().tobytes())
            digest.update(b"torch.int64 ();" + y[i].numpy().tobytes())
            assert found == digest.hexdigest()
        assert entry.record["selection"] == {"0": "0-1", "1": "0-1"}
        result = entry.record["result"]
        assert (result["solve_method"], result["solve_iterations"]) == ("cg", 3)
        assert result["solve_residual"] == 1e-12
        assert result["gradient_norm"][0] > 0
        assert result["loss_forget"][1] == "nan"
        assert result.keys().isdisjoint({"settings", "selection", "seconds", "skipped"})
        assert entry.record["checkpoint"] == {"file": "000001.pt", "sha256": weights(stream)}
        environment = entry.environment
        assert environment["time"].endswith("+00:00")
        assert environment["versions"]["torch"] == torch.__version__
        assert environment["versions"].keys() == {"lcodec_ext", "torch", "numpy", "python"}
        assert environment["seconds"]["total"] > 0


def test_seeds_follow_from_the_base_seed_and_the_number():
    streams = [make(seed=5), make(seed=5), make(seed=6)]
    for stream in streams:
        stream.remove(1)
        stream.remove(2)
    seeds = [[entry.record["seed"] for entry in stream.ledger[1:]] for stream in streams]
    assert seeds[0] == seeds[1] == [request_seed(5, 1), request_seed(5, 2)]
    assert len({*seeds[0], *seeds[2]}) == 4
    assert [call["preset"].seed for call in calls] == [*seeds[0], *seeds[1], *seeds[2]]
    assert weights(streams[0]) == weights(streams[1]) != weights(streams[2])


def test_all_there_is_reaches_the_step():
    validation = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64))

    def score(outputs, targets):
        return outputs[:, 0]

    stream = make(
        validation=validation,
        score=score,
        preset="paper",
        epsilon=0.1,
        delta=1e-5,
        damping=0.3,
        weight_decay=0.2,
    )
    stream.remove(1)
    (call,) = calls
    torch.testing.assert_close(call["validation"].fetch(slice(None)).args[0], validation[0])
    assert call["score"] is score
    assert call["statistics"] is None
    assert call["progress"] is False
    # Noise is for releases: the weights that later requests start from have none.
    expected = Settings.preset("paper", damping=0.3, weight_decay=0.2, seed=request_seed(0, 1))
    assert call["preset"] == expected
    settings = Settings.preset("recommended", damping=7.0)
    assert make(preset=settings, steps=2).settings == dataclasses.replace(settings, steps=2)


def test_models_are_never_shared():
    model = make_model()
    before = state_hash(state_of(model))
    stream = Unlearner(model, make_data(), cross_entropy)
    result = stream.remove(1)
    assert state_hash(state_of(model)) == before
    after = weights(stream)
    with torch.no_grad():
        for one in (model, result.model, stream.model):
            for p in one.parameters():
                p.zero_()
    assert weights(stream) == after
    stream.remove(2)
    stream.rollback(1)
    assert weights(stream) == after


def test_a_dataset_is_fetched_by_number(folder):
    data = TensorDataset(*make_data())
    with make(folder, data) as stream, make() as other:
        stream.remove([3, 1])
        other.remove([3, 1])
        assert weights(stream) == weights(other)
        # A record is of the contents, however they were given.
        assert records(stream)[1] == records(other)[1]
    with resume(folder, data=data) as stream:
        assert stream.removed == (3, 1)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([], ValueError, "ids must have at least one sample"),
        (40, ValueError, r"ids\[0\] must be an integer from 0 to 39; got 40"),
        ([1, -1], ValueError, r"ids\[1\] must be an integer from 0 to 39; got -1"),
        ([1, 2, 1, 2], ValueError, "ids must differ; given more than once: 1, 2$"),
        ([4, 3], ValueError, "ids must be samples that are not removed; removed already: 3$"),
        (torch.arange(5) > 3, TypeError, "got a mask of bool: pass its nonzero"),
        (np.arange(5) > 3, TypeError, "got a mask of bool: pass its nonzero"),
        (1.0, TypeError, r"ids\[0\] must be an integer"),
        ("1", TypeError, r"ids\[0\] must be an integer"),
        (None, TypeError, "remove needs ids, numbers of samples, or groups"),
        ([True], TypeError, r"ids\[0\] must be an integer"),
        ([0, 1, 2, *range(4, N)], ValueError, "ids name all remaining samples; leave at least one"),
    ],
)
def test_wrong_ids_change_nothing(ids, error, message):
    stream = make()
    stream.remove(3)
    before = weights(stream), records(stream)
    with pytest.raises(error, match=message):
        stream.remove(ids)
    assert (weights(stream), records(stream)) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep must be an integer >= 1"),
        ({"dampin": 1}, TypeError, "is it 'damping'"),
        ({"preset": "best"}, ValueError, "preset must be one of"),
        ({"progress": 1}, TypeError, "progress must be True or False"),
        ({"epsilon_budget": 1.0}, ValueError, "epsilon_budget belongs to the options epsilon"),
        (
            {"epsilon": 1.0, "delta": 0.1, "delta_budget": 2.0},
            ValueError,
            "delta must be between 0 and 1",
        ),
        ({"epsilon": 1.0}, ValueError, "epsilon and delta belong together"),
    ],
)
def test_wrong_options_leave_no_directory_behind(folder, options, error, message):
    with pytest.raises(error, match=message):
        make(folder, **options)
    assert not folder.exists()


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got int"):
        Unlearner(3, make_data(), cross_entropy)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        Unlearner(make_model(), make_data(), None)
    with pytest.raises(TypeError, match="train must be"):
        Unlearner(make_model(), 3, cross_entropy)
    with pytest.raises(ValueError, match="the model has no parameter"):
        Unlearner(nn.ReLU(), make_data(), cross_entropy)
    with pytest.raises(TypeError, match="note must be a string or None; got int"):
        make().remove(1, note=3)


# ---------------------------------------------------------------------------------------------
# What the guard takes back


def test_skipped_samples_are_pending_and_stay_retained(place, stand_in):
    x, _ = make_data()
    with make(place) as stream:
        stream.remove(1)
        before = weights(stream)
        stand_in.refuse = x[[4, 5]]
        assert stream.remove([5, 4]).skipped == (0, 1)
        assert weights(stream) == before
        assert (stream.removed, stream.pending) == ((1,), (5, 4))
        assert {4, 5} <= set(stream.retained.tolist())
        entry = stream.ledger[-1]
        assert entry.kind == "skip"
        assert entry.record["skipped"] == [5, 4]
        assert entry.record["n_pending"] == 2
        assert entry.record["n_retained"] == N - 1
        assert entry.record["checkpoint"] == stream.ledger[1].record["checkpoint"]

        # Some of a request, as with order="sequential".
        assert stream.remove([6, 5, 7]).skipped == (1,)
        assert (stream.removed, stream.pending) == ((1, 6, 7), (5, 4))
        assert stream.ledger[-1].kind == "remove"
        assert stream.ledger[-1].record["n_pending"] == 2
        assert len(calls[-1]["retain"]) == N - 4  # asked for, 4 is retained

        # Asked for again.
        stand_in.refuse = x[[4]]
        stream.remove(5)
        assert (stream.removed, stream.pending) == ((1, 6, 7, 5), (4,))
        stream.rollback(2)
        assert (stream.removed, stream.pending) == ((1,), (5, 4))
        assert weights(stream) == before
        expected = records(stream)
    if place is not None:
        assert verify_ledger(place, train=make_data())
        with resume(place) as stream:
            assert (stream.removed, stream.pending) == ((1,), (5, 4))
            assert records(stream) == expected


# ---------------------------------------------------------------------------------------------
# Rollback


def test_a_rollback_is_an_entry(place):
    with make(place, keep=4) as stream:
        seen = [(weights(stream), stream.removed)]
        for ids in ([1, 2], 3, 4):
            stream.remove(ids)
            seen.append((weights(stream), stream.removed))
        stream.rollback(1, note="a mistake")
        assert (weights(stream), stream.removed) == seen[1]
        entry = stream.ledger[-1]
        assert (entry.kind, entry.record["to"], entry.record["note"]) == (
            "rollback",
            1,
            "a mistake",
        )
        assert entry.record["checkpoint"]["file"] == "000004.pt"
        stream.rollback(3)  # and back
        assert (weights(stream), stream.removed) == seen[3]
        stream.rollback()
        assert (weights(stream), stream.removed) == seen[2]
        stream.rollback(0)
        assert (weights(stream), stream.removed) == seen[0]
        with pytest.raises(ValueError, match="there is no request to roll back"):
            stream.rollback()
        stream.remove(2)
        assert stream.removed == (2,)
        # Another request from the same weights has another number, and another seed.
        assert stream.ledger[-1].record["seed"] == request_seed(0, 8)


@noise_is_large
def test_without_a_number_requests_are_taken_back_one_by_one():
    stream = make(keep=9, epsilon=0.5, delta=1e-3, weight_decay=0.1)
    stream.remove(1)
    stream.remove(2)
    stream.release()
    stream.rollback()
    assert stream.removed == (1,)
    stream.rollback()
    assert stream.removed == ()


def test_rollback_goes_as_far_as_checkpoints_are_kept(place):
    with make(place, keep=2) as stream:
        for i in range(5):
            stream.remove(i)
        with pytest.raises(
            ValueError, match=r"entry 3 are no longer kept .*; those of entries 0, 4"
        ):
            stream.rollback(3)
        for number in (5, 6, -1):
            with pytest.raises(ValueError, match="to must be an integer from 0 to 4"):
                stream.rollback(number)
        if place is not None:
            files = sorted(file.name for file in (place / "checkpoints").iterdir())
            assert files == ["000000.pt", "000004.pt", "000005.pt"]
        stream.rollback(4)
        assert stream.removed == (0, 1, 2, 3)
        stream.rollback(0)
        assert stream.removed == ()
    with make() as stream, pytest.raises(ValueError, match="nothing to roll back"):
        stream.rollback(0)


# ---------------------------------------------------------------------------------------------
# Interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_request_that_fails_leaves_all_as_it_was(place, monkeypatch, error):
    with make(place) as stream:
        stream.remove(1)
        before = weights(stream), records(stream)
        with monkeypatch.context() as patch:

            def fail(*arguments, **options):
                step(*arguments, **options)
                raise error

            patch.setattr(unlearner, "unlearn", fail)
            with pytest.raises(error):
                stream.remove(2)
        assert (weights(stream), records(stream)) == before
        assert (stream.removed, stream.pending) == ((1,), ())
        stream.remove(2)
        other = make()
        other.remove(1)
        other.remove(2)
        assert weights(stream) == weights(other)
        assert records(stream) == records(other)


def test_a_full_disk_leaves_all_as_it_was(folder, monkeypatch):
    with make(folder) as stream:
        stream.remove(1)
        before = weights(stream), records(stream), sorted(os.listdir(folder / "checkpoints"))

        def full(*arguments):
            raise OSError(28, "No space left on device")

        for module, name in ((_files, "replace"), (ledger, "write"), (ledger, "fsync")):
            with monkeypatch.context() as patch:
                patch.setattr(module.os, name, full)
                with pytest.raises(OSError, match="No space"):
                    stream.remove(2)
            now = weights(stream), records(stream), sorted(os.listdir(folder / "checkpoints"))
            assert now == before
        stream.remove(2)
    assert verify_ledger(folder, train=make_data()).notes == ()


def test_an_interrupt_waits_for_an_entry_that_is_being_written(folder, monkeypatch, request):
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, outside))
    handler = signal.getsignal(signal.SIGINT)
    with make(folder) as stream:
        actual = Ledger.append

        def interrupted(self, *arguments):
            signal.raise_signal(signal.SIGINT)
            return actual(self, *arguments)

        monkeypatch.setattr(Ledger, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.remove(1)
        assert stream.removed == (1,)
        assert stream.ledger[-1].record["checkpoint"]["sha256"] == weights(stream)
        assert signal.getsignal(signal.SIGINT) is handler
        monkeypatch.undo()
    assert verify_ledger(folder, stream.model)


def test_requests_can_come_from_another_thread(folder):
    with make(folder) as stream:
        thread = threading.Thread(target=stream.remove, args=(1,))
        thread.start()
        thread.join()
        assert stream.removed == (1,)


# ---------------------------------------------------------------------------------------------
# Killed and resumed


class Killed(BaseException):
    pass


class DyingSystem:
    """The os module of a process that is killed at its k-th call: nothing after that works."""

    FATAL = ("open", "write", "fsync", "replace", "ftruncate", "pwrite")

    def __init__(self, calls_left):
        self.calls_left = calls_left

    def __getattr__(self, name):
        actual = getattr(os, name)
        if name == "fsync":
            actual = int  # this disk loses nothing, and need not be waited for
        elif name not in self.FATAL:
            return actual

        def call(*arguments, **options):
            self.live(lambda: name == "write" and actual(arguments[0], arguments[1][:100]))
            return actual(*arguments, **options)

        return call

    def live(self, last_breath=lambda: None):
        self.calls_left -= 1
        if self.calls_left == 0:
            last_breath()
        if self.calls_left <= 0:
            raise Killed


@pytest.fixture(scope="module")
def uninterrupted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearner, "unlearn", step)
        stream = begin_or_resume(None)
        go_on(stream)
        return weights(stream), records(stream)


def test_killed_at_every_system_call_it_resumes_to_the_same_bits(
    tmp_path, monkeypatch, uninterrupted
):
    acknowledged = []

    def live(directory, calls_left):
        system = DyingSystem(calls_left)
        with monkeypatch.context() as patch:
            patch.setattr(_files, "os", system)
            patch.setattr(checkpoints, "os", system)
            patch.setattr(ledger, "os", system)
            patch.setattr(Path, "unlink", lambda *a, **o: (system.live(), unlink(*a, **o)))
            with begin_or_resume(directory) as stream:
                assert len(stream.ledger) - 1 >= max(acknowledged, default=0)
                go_on(stream, acknowledged.append)
                return weights(stream), records(stream)

    unlink = Path.unlink
    for k in range(1, 1000):
        acknowledged.clear()
        directory = tmp_path / str(k)
        try:
            assert live(directory, k) == uninterrupted
            break
        except Killed:
            pass
        found = verify_ledger(directory) if acknowledged else None
        assert found is None or found.ok, str(found)
        assert live(directory, math.inf) == uninterrupted
        assert verify_ledger(directory, train=make_data()).notes == ()
    assert k > 50  # calls that an uninterrupted life makes


@pytest.mark.parametrize("seed", range(3))
def test_killed_by_the_system_it_resumes_to_the_same_bits(folder, uninterrupted, seed):
    rng = np.random.default_rng(seed)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, unlearner_process.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        said = [int(process.stdout.readline())]
        for _ in range(rng.integers(0, 3)):
            said.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0, 0.2))
        with pytest.raises(RuntimeError, match=f"in use by an Unlearner .process {process.pid}."):
            resume(folder)
        process.kill()
        said += map(int, process.stdout.read().split())
    assert process.returncode == -signal.SIGKILL
    assert said == list(range(len(said)))
    with begin_or_resume(folder) as stream:
        assert len(stream.ledger) - 1 >= said[-1]
        go_on(stream)
        assert (weights(stream), records(stream)) == uninterrupted


def test_resume_goes_on_where_it_was(folder):
    with make(folder, seed=3, keep=2, damping=0.7) as stream:
        stream.remove([1, 2])
    with resume(folder) as stream:
        assert stream.settings == Settings.preset("recommended", seed=3, damping=0.7)
        assert stream.removed == (1, 2)
        stream.remove(5)
        found = weights(stream)
    with make(seed=3, damping=0.7) as other:
        other.remove([1, 2])
        other.remove(5)
        assert weights(other) == found


def test_a_function_that_perturbs_is_given_again(folder):
    def perturb(inputs, rng):
        return inputs

    with make(folder, perturb=perturb):
        pass
    with pytest.raises(ValueError, match="perturb was a function"):
        resume(folder)
    with resume(folder, perturb=perturb) as stream:
        assert stream.settings.perturb is perturb


def test_only_the_same_can_be_resumed(folder):
    validation = (torch.ones(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64))
    with make(folder, validation=validation) as stream:
        stream.remove([3, 9])
    x, y = make_data()
    other = x.clone()
    other[3, 0] += 1
    frozen = make_model()
    frozen[0].bias.requires_grad_(False)
    tests = [
        ({"data": (x[:-1], y[:-1])}, "train has 39 samples, on record are 40"),
        ({"data": (x.flip(0), y.flip(0))}, "train has other contents, or another order"),
        ({"data": (other, y)}, "train has other contents, or another order"),
        ({"validation": None}, "validation must be what was given at the start"),
        ({"validation": (x, y)}, "validation must be what was given at the start"),
        ({"model": make_model().float()}, "train|model is not the one that was saved"),
        ({"model": nn.Linear(3, 2).double()}, "model must have the same parameters"),
        ({"model": frozen}, "another one is '0.bias'"),
    ]
    for changed, message in tests:
        with pytest.raises(ValueError, match=message):
            resume(folder, **{"validation": validation} | changed)
    with resume(folder, validation=validation) as stream:  # nothing holds a lock
        assert stream.removed == (3, 9)


class Lazy(Dataset):
    """Samples that are not known to be in memory; counts what is read."""

    def __init__(self, x, y):
        self.rows, self.read = (x, y), []

    def __len__(self):
        return len(self.rows[1])

    def __getitem__(self, i):
        self.read.append(i)
        return tuple(t[i] for t in self.rows)


def as_earlier_versions_wrote(folder):
    """Take out of a ledger what the first version did not record."""
    path = folder / "ledger.jsonl"
    entries = list(Ledger(path))
    path.unlink()
    written = Ledger(path)
    for entry in entries:
        record = dict(entry.record)
        if entry.kind == "start":
            del record["score"], record["options"]
            for name in ("train", "validation"):
                record[name] = record[name] and {k: record[name][k] for k in ("n", "sha256")}
        written.append(entry.kind, record, entry.environment)


def test_removed_samples_are_recognised_beyond_the_probe(folder):
    n = 200
    x, y = make_data(n)
    with make(folder, (x, y)) as stream:
        stream.remove(101)
    x[101] += 1
    with pytest.raises(ValueError, match="train has other contents"):
        resume(folder, data=(x, y))
    with pytest.raises(ValueError, match="sample 101 of train has another content"):
        resume(folder, data=Lazy(x, y))


@pytest.mark.parametrize("given_as", ["tensors", "dataset", "subset", "loader"])
def test_all_samples_are_on_record_and_not_a_few(folder, given_as):
    n = 1000
    x, y = make_data(n)
    probed = [k * n // 64 for k in range(64)]
    others = x.clone()
    others[[i for i in range(n) if i not in probed]] = 0.0
    one = x.clone()
    one[999, 2] += 1e-9
    give = {
        "tensors": lambda *data: data,
        "dataset": TensorDataset,
        "subset": lambda *data: Subset(TensorDataset(*data), range(n)),
        "loader": lambda *data: DataLoader(TensorDataset(*data), 7, shuffle=True),
    }[given_as]
    with make(folder, give(x, y)) as stream:
        stream.remove(0)
    for wrong in (others, one):
        with pytest.raises(ValueError, match="train has other contents, or another order"):
            resume(folder, data=give(wrong, y))
        (problem,) = verify_ledger(folder, train=give(wrong, y)).problems
        assert "train has other contents, or another order" in problem
    assert verify_ledger(folder, train=give(x, y))
    with resume(folder, data=give(x, y)) as stream:
        assert stream.removed == (0,)
    # However they are given.
    with resume(folder, data=Lazy(x, y)):
        pass
    assert verify_ledger(folder, train=Lazy(x, y))


def test_a_dataset_that_may_be_slow_is_read_whole_by_start_and_verification_only(folder):
    n = 1000
    x, y = make_data(n)
    data = Lazy(x, y)
    with make(folder, data):
        assert set(data.read) == set(range(n))
    data.read.clear()
    with resume(folder, data=data) as stream:
        assert 64 <= len(set(data.read)) <= 64 + 32  # compared, and read again
        stream.remove(5)
    data.read.clear()
    assert verify_ledger(folder, train=data)
    assert len(data.read) == n + 3 * 32  # and some of them thrice, whether they stay the same
    x[999] = 0.0
    with resume(folder, data=data):  # as said of resume
        pass
    (problem,) = verify_ledger(folder, train=data).problems
    assert "train has other contents" in problem


def test_validation_is_compared_as_a_whole(folder):
    x, y = make_data(200)
    with make(folder, validation=(x, y)):
        pass
    with resume(folder, validation=(x, y)):
        pass
    other = x.clone()
    other[199] = 0.0
    with pytest.raises(ValueError, match="validation must be what was given at the start"):
        resume(folder, validation=(other, y))


def test_ledgers_of_earlier_versions_go_on(folder):
    x, y = make_data(200)
    options = {"validation": make_data()}
    with make(folder, (x, y), **options) as stream:
        stream.remove([3, 101])
        model = stream.model
    as_earlier_versions_wrote(folder)
    assert verify_ledger(folder, model, (x, y))
    with resume(folder, data=(x, y), score=sum, **options) as stream:  # was not on record
        assert stream.removed == (3, 101)
        stream.remove(8)
    with pytest.raises(ValueError, match="given is mse_loss, on record is cross_entropy"):
        Unlearner.resume(folder, make_model(), (x, y), nn.functional.mse_loss, **options)
    other = x.clone()
    other[0] += 1
    with pytest.raises(ValueError, match="train has other contents"):
        resume(folder, data=(other, y), **options)
    other = x.clone()
    other[101] += 1
    (problem,) = verify_ledger(folder, train=(other, y)).problems
    assert "sample 101 of train has another content" in problem


def one_score(outputs, targets):
    return outputs[:, 0]


class Smooth(nn.Module):
    def __init__(self, beta):
        super().__init__()
        self.inner = nn.SmoothL1Loss(beta=beta)


@pytest.mark.parametrize(
    ("start", "other", "message"),
    [
        (cross_entropy, nn.functional.mse_loss, "given is mse_loss, on record is cross_entropy"),
        (
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            r"given is CrossEntropyLoss with label_smoothing=0.1, .* label_smoothing=0.0",
        ),
        (
            functools.partial(cross_entropy, label_smoothing=0.1),
            functools.partial(cross_entropy),
            "partial with no label_smoothing, on record is label_smoothing=0.1",
        ),
        (
            functools.partial(cross_entropy),
            functools.partial(nn.functional.mse_loss),
            "partial with function='mse_loss', on record is function='cross_entropy'",
        ),
        (Smooth(0.5), Smooth(1.0), "Smooth with inner.beta=1.0, on record is inner.beta=0.5"),
        (nn.HuberLoss(delta=math.inf), nn.HuberLoss(), "delta=1.0, on record is delta='inf'"),
    ],
)
def test_another_loss_is_refused(folder, start, other, message):
    with Unlearner(make_model(), make_data(), start, directory=folder):
        pass
    with pytest.raises(ValueError, match=f"loss_fn must be what was given at the .*{message}"):
        Unlearner.resume(folder, make_model(), make_data(), other)
    with Unlearner.resume(folder, make_model(), make_data(), copy.deepcopy(start)):
        pass


def test_another_score_is_refused(tmp_path):
    def other(outputs, targets):
        return outputs[:, 1]

    for k, (start, given) in enumerate([(one_score, other), (one_score, None), (None, other)]):
        folder = tmp_path / str(k)
        with make(folder, score=start):
            pass
        with pytest.raises(ValueError, match="score must be what was given at the start: given is"):
            resume(folder, score=given)
        with resume(folder, score=start) as stream:
            name = None if start is None else "one_score"
            assert stream.ledger[0].record["score"] == name


def test_a_directory_has_one_stream(folder):
    with make(folder) as stream:
        with pytest.raises(RuntimeError, match=f"in use by an Unlearner .process {os.getpid()}."):
            make(folder)
        with pytest.raises(RuntimeError, match="in use"):
            resume(folder)
        stream.remove(1)
    with pytest.raises(FileExistsError, match="has a ledger already"):
        make(folder)
    with pytest.raises(RuntimeError, match="the Unlearner is closed"):
        stream.remove(2)
    for request in (stream.rollback, stream.release):
        with pytest.raises(RuntimeError, match="the Unlearner is closed"):
            request()
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(FileExistsError, match="has checkpoints and no ledger"):
        make(folder)
    with pytest.raises(FileNotFoundError, match="has no ledger"):
        resume(folder)
    del stream
    with pytest.raises(FileNotFoundError, match="has no ledger"):
        resume(folder / "nowhere")


def test_only_the_owner_may_read(folder):
    with make(folder / "deep") as stream:
        stream.remove(1)
    modes = {path.name: path.stat().st_mode & 0o77 for path in [folder / "deep"]}
    assert modes == {"deep": 0}
    assert (folder / "deep" / "ledger.jsonl").stat().st_mode & 0o77 == 0


# ---------------------------------------------------------------------------------------------
# Many requests


def test_memory_does_not_grow(folder, monkeypatch):
    """What a request leaves is its samples' numbers and hashes: about 1 kB."""
    monkeypatch.setattr(unlearner, "unlearn", step)
    monkeypatch.setattr(os, "fsync", int)  # minutes, on a slow disk
    data = make_data(200)
    with make(folder, data) as stream:

        def memory_after(numbers):
            for i in numbers:
                stream.remove(i)
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            memory_after(range(20))
            first, second = memory_after(range(20, 40)), memory_after(range(40, 100))
        finally:
            tracemalloc.stop()
        assert second - first < 60 * 2500  # a model left behind would be 20 kB
        assert len(list((folder / "checkpoints").iterdir())) == 6
    assert verify_ledger(folder, stream.model, data)


def test_copies_in_memory_are_as_many_as_are_kept():
    stream = make(keep=3)
    for i in range(10):
        stream.remove(i)
    assert stream._store.checkpoints.names() == {"000000.pt", "000008.pt", "000009.pt", "000010.pt"}


# ---------------------------------------------------------------------------------------------
# Releases


OPTIONS = {"epsilon": 0.5, "delta": 1e-3, "weight_decay": 0.1}


def release_until_refused(stream, most=20):
    for count in range(most):
        before = stream.budget.to_dict(), len(stream.ledger)
        try:
            stream.release()
        except PrivacyBudgetExceeded:
            assert (stream.budget.to_dict(), len(stream.ledger)) == before
            return count
    raise AssertionError("the budget has no end")


@noise_is_large
def test_a_release_has_fresh_noise_everywhere_and_is_paid_for(place):
    with make(place, **OPTIONS, epsilon_budget=1.0, delta_budget=0.01) as stream:
        stream.remove([1, 2])
        before = weights(stream)
        released = [stream.release(note="for the customer"), stream.release()]
        assert weights(stream) == before
        own = stream.model
        for one in released:
            for p, q in zip(one.parameters(), own.parameters(), strict=True):
                assert (p != q).all()
        assert state_hash(state_of(released[0])) != state_hash(state_of(released[1]))
        entry = stream.ledger[2]
        assert (entry.kind, entry.record["note"]) == ("release", "for the customer")
        assert entry.record["guarantee"]["kind"] == "heuristic"
        assert entry.record["guarantee"]["assumptions"]["m"] == 2
        assert entry.record["checkpoint"] == stream.ledger[1].record["checkpoint"]
        assert entry.environment["released"] == state_hash(state_of(released[0]))
        noise = [flat(one.parameters()) - flat(own.parameters()) for one in released]
        scaled = torch.cat(noise).detach().double() / entry.record["guarantee"]["sigma"]
        # Nobody may seed this noise: the bounds fail by chance in two runs of 10^9.
        low, high = chi2.ppf([1e-9, 1 - 1e-9], len(scaled))
        assert low < float(scaled.square().sum()) < high
        assert stream.budget.spent == (1.0, 0.002)
        assert entry.record["budget"]["epsilon_sum"] == 0.5
        n_releases = 2 + release_until_refused(stream)
        assert [entry.kind for entry in stream.ledger].count("release") == n_releases
        # What is given away stays given away.
        stream.rollback(0)
        stream.remove(3)
        with pytest.raises(PrivacyBudgetExceeded):
            stream.release()
    if place is not None:
        assert verify_ledger(place)
        with resume(place) as stream:
            assert stream.budget.n_releases == n_releases
            with pytest.raises(PrivacyBudgetExceeded):
                stream.release()


@noise_is_large
def test_noise_grows_with_all_that_is_removed():
    stream = make(**OPTIONS, epsilon_budget=9.0, delta_budget=0.1)
    sigmas = []
    for ids in ([1, 2], [3, 4]):
        stream.remove(ids)
        stream.release()
        sigmas.append(stream.ledger[-1].record["guarantee"]["sigma"])
    assert sigmas[1] == pytest.approx(4 * sigmas[0])


@noise_is_large
def test_by_default_the_budget_is_that_of_one_release():
    stream = make(**OPTIONS)
    assert stream.budget.to_dict() == PrivacyBudget(0.5, 1e-3).to_dict()
    stream.remove(1)
    # Gaussians compose better than their epsilons add up, so that a second one may be allowed.
    assert 1 <= release_until_refused(stream) <= 3


@pytest.mark.parametrize("action", ["default", "ignore", "error"])
def test_what_a_removal_warns_of_is_on_record(folder, monkeypatch, action):
    def warning(*given, **options):
        warnings.warn("it went too far", stacklevel=2)
        warnings.warn("an old name", DeprecationWarning, stacklevel=2)  # of no use to a reader
        return step(*given, **options)

    stream = make(folder)
    monkeypatch.setattr(unlearner, "unlearn", warning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        if action == "error":
            with pytest.raises(UserWarning, match="it went too far"):
                stream.remove(1)
            assert (len(stream.ledger), stream.removed) == (1, ())
            return
        stream.remove(1)
    assert stream.ledger[-1].environment["warnings"] == ["it went too far"]
    assert len(caught) == (2 if action == "default" else 0)
    monkeypatch.setattr(unlearner, "unlearn", step)
    stream.remove(2)
    assert stream.ledger[-1].environment["warnings"] == []


def test_a_release_warns_where_its_noise_spoils_the_model(folder):
    x, y = make_data()
    stream = make(folder, **OPTIONS, epsilon_budget=9.0, delta_budget=0.1, n_monitor=10)
    stream.remove([1, 2, 3, 4])
    said = "epsilon=0.5, delta=0.001, whose standard deviation is .* the mean loss of the retained"
    with pytest.warns(UserWarning, match=said) as caught:
        released = stream.release()
    assert caught[0].filename == __file__
    entry = stream.ledger[-1]
    found = entry.environment["retained_loss"]
    assert found["n"] == 10
    assert found["after"] > 1.5 * found["before"] + 0.05
    message = str(caught[0].message)
    assert f"from {found['before']:.3g} to {found['after']:.3g}. A larger epsilon" in message
    assert f"deviation is {entry.record['guarantee']['sigma']:.3g}," in message
    assert released.training == stream.model.training  # as it was, and measured as it is used
    # It costs budget even if the warning is an error: nobody draws noise again for free.
    with pytest.raises(UserWarning, match="raised the mean loss"):
        stream.release()
    assert stream.budget.n_releases == 2

    quiet = make(**(OPTIONS | {"epsilon": 1e9}))
    quiet.remove([1, 2, 3, 4])
    released = quiet.release()  # warnings are errors here
    found = quiet.ledger[-1].environment["retained_loss"]
    stays = quiet.retained
    assert found["n"] == len(stays)  # 36, fewer than 256
    for model, loss in ((quiet.model, found["before"]), (released, found["after"])):
        with torch.no_grad():
            wanted = cross_entropy(model.eval()(x[stays]), y[stays]).item()
        assert loss == pytest.approx(wanted, rel=1e-9)


def test_releases_need_noise_and_removals():
    stream = make()
    assert stream.budget is None
    with pytest.raises(ValueError, match="give the options epsilon and delta"):
        stream.release()
    with pytest.raises(ValueError, match="nothing is removed"):
        make(**OPTIONS).release()


CERTIFIED = {
    "update": "certified",
    "epsilon": 1.0,
    "delta": 1e-4,
    "weight_decay": 0.1,
    "strong_convexity": 0.1,
    "lipschitz": 2.0,
    "hessian_lipschitz": 1e-3,
    "radius": math.inf,
    "gradient_bound": 1e-6,
}


def make_linear(directory=None, **options):
    """Softmax regression, trained until its gradient is below 1e-6."""
    x, y = make_data(300)
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(), tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        squares = sum(p.square().sum() for p in model.parameters())
        loss = cross_entropy(model(x), y) + 0.05 * squares
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return Unlearner(model, (x, y), cross_entropy, directory=directory, **options)


def test_a_certified_stream_starts_from_the_original_weights(place):
    with make_linear(place, **CERTIFIED) as stream:
        original = weights(stream)
        for ids in ([1, 2], 7, [5, 6]):
            stream.remove(ids)
            if ids == 7:
                stream.rollback()
        x, _ = make_data(300)
        for call, ids in zip(calls, ([1, 2], [1, 2, 7], [1, 2, 5, 6]), strict=True):
            assert state_hash(state_of(call["model"])) == original
            torch.testing.assert_close(call["forget"].fetch(slice(None)).args[0], x[ids])
            assert len(call["retain"]) == 300 - len(ids)
            assert (call["preset"].update, call["preset"].epsilon) == ("newton", None)
        assert stream.removed == (1, 2, 5, 6)
        assert stream.ledger[-1].record["ids"] == [5, 6]


def test_a_certificate_that_cannot_be_had_is_no_removal():
    with pytest.raises(ValueError, match="update='certified' .* here: max_drop"):
        make_linear(**CERTIFIED, max_drop=0.1)
    stream = make(**CERTIFIED)
    before = weights(stream)
    with pytest.raises(ValueError, match="buffers are released without noise: '1.running_mean'"):
        stream.remove(1)
    assert (weights(stream), stream.removed, len(stream.ledger)) == (before, (), 1)


# ---------------------------------------------------------------------------------------------
# Statistics of the training


@dataclasses.dataclass
class Statistics:
    """Replaces TrainingStatistics: sums the inputs that stay, in the order of removal."""

    n: int
    matrix: torch.Tensor
    kind: str = "gauss_newton"
    steps: tuple = ()
    changes: tuple = ()

    def at(self, model):
        return self

    def tensors(self):
        return {"matrix": self.matrix}

    def without(self, model, loss_fn, forget, *, batch_size, dtype):
        x = forget.fetch(slice(None)).args[0]
        scale = next(model.parameters()).detach().sum()
        return dataclasses.replace(
            self, n=self.n - len(x), matrix=(self.matrix - x.sum(0)) * (1 + 1e-3 * scale)
        )


def test_statistics_lose_what_is_removed(folder, monkeypatch):
    def read_retained(*arguments, **options):
        seen.append(options["statistics"])
        return step(
            arguments[0], arguments[1], [0] * options["statistics"].n, *arguments[3:], **options
        )

    seen = []
    monkeypatch.setattr(unlearner, "unlearn", read_retained)
    x, _ = make_data()
    given = Statistics(N, x.sum(0))
    options = {"statistics": given}
    with make(folder, **options) as stream:
        assert stream.ledger[0].record["train"] == {"n": N, "sha256": None}
        for ids in ([1, 2], 3, [4, 5]):
            stream.remove(ids)
        stream.rollback(2)
        stream.remove(6)
        assert [s.n for s in seen] == [N, N - 2, N - 3, N - 3]
        torch.testing.assert_close(seen[3].matrix, seen[2].matrix, rtol=0, atol=0)
        stream.remove(7)
    with resume(folder, **options) as stream:
        stream.rollback(5)
        stream.remove(7)
        torch.testing.assert_close(seen[-1].matrix, seen[-2].matrix, rtol=0, atol=0)
    for wrong in (None, Statistics(N, x.sum(0) + 1)):
        with pytest.raises(ValueError, match="statistics must be what was given at the start"):
            resume(folder, statistics=wrong)
    with pytest.raises(ValueError, match="statistics must be of the training samples, 40"):
        make(statistics=Statistics(N - 1, x.sum(0)))


def test_a_release_with_statistics_reads_no_retained_sample(monkeypatch):
    def without(model, forget, _, *arguments, **options):
        return step(model, forget, [0] * options["statistics"].n, *arguments, **options)

    monkeypatch.setattr(unlearner, "unlearn", without)
    x, _ = make_data()
    stream = make(statistics=Statistics(N, x.sum(0)), **OPTIONS)
    stream.remove([1, 2])
    stream.release()  # without a warning
    assert "retained_loss" not in stream.ledger[-1].environment


# ---------------------------------------------------------------------------------------------
# With unlearn itself


@pytest.fixture
def in_earnest(monkeypatch):
    monkeypatch.setattr(unlearner, "unlearn", unlearn)


def test_a_certified_stream_releases_what_one_request_for_all_would(folder, in_earnest):
    with make_linear(folder, **CERTIFIED, epsilon_budget=2.0, delta_budget=1e-3) as stream:
        original = stream.model
        stream.remove([1, 2])
        stream.release()
        stream.remove([7, 11])
        stream.release()
        model = stream.model
        guarantees = [e.record["guarantee"] for e in stream.ledger if e.kind == "release"]
    x, y = make_data(300)
    rest = [i for i in range(300) if i not in (1, 2, 7, 11)]
    forget = (x[[1, 2, 7, 11]], y[[1, 2, 7, 11]])
    at_once = unlearn(original, forget, (x[rest], y[rest]), cross_entropy, **CERTIFIED)
    assert [guarantee["kind"] for guarantee in guarantees] == ["certified", "certified"]
    assert [guarantee["assumptions"]["m"] for guarantee in guarantees] == [2, 4]
    assert guarantees[1] == at_once.guarantee.to_dict()
    noiseless = CERTIFIED | {"update": "newton", "epsilon": None, "delta": None}
    options = Settings.preset("recommended", **CERTIFIED).replace(**noiseless)
    expected = unlearn(original, forget, (x[rest], y[rest]), cross_entropy, preset=options)
    torch.testing.assert_close(model.weight, expected.model.weight, rtol=1e-12, atol=1e-14)
    assert verify_ledger(folder, model, (x, y))


def test_newton_steps_in_a_row_are_no_certificate(in_earnest):
    settings = Settings(
        **CERTIFIED | {"update": "newton"}, curvature="hessian", damping=0.0, rtol=1e-8
    )
    with make_linear(preset=settings) as stream:
        stream.remove([1, 2])
        stream.remove(7)
        first, second = (entry.record["guarantee"] for entry in stream.ledger[1:])
        assert first["kind"] == "certified"
        assert second["kind"] == "heuristic"
        assert "all removals must be one step from the training end" in second["reasons"][0]


def test_a_stream_of_a_normed_model_resumes_to_the_same_bits(folder, in_earnest):
    x, y = make_data(120)
    settings = Settings(weight_decay=1e-2, damping=1.0, n_curvature=50, max_drop=0.5)

    def go(stream, requests):
        for ids in requests:
            stream.remove(ids)
        return weights(stream), records(stream)

    expected = go(make(data=(x, y), preset=settings), ([1, 2], 3, [9, 8], 20))
    with make(folder, (x, y), preset=settings) as stream:
        go(stream, ([1, 2],))
    with resume(folder, data=(x, y)) as stream:
        go(stream, (3, [9, 8]))
    with resume(folder, data=(x, y)) as stream:
        assert go(stream, (20,)) == expected
        model = stream.model
    assert verify_ledger(folder, model, (x, y))
    result = stream.ledger[1].record["result"]
    assert result["solve_residual"] < 1e-2
    assert result["n_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("own_weights", [True, False])
def test_all_requests_take_curvature_out_at_the_original_weights(
    folder, in_earnest, monkeypatch, own_weights
):
    """Of softmax regression, whose curvature is another one at other weights."""
    x, y = make_data()
    torch.manual_seed(5)
    model = nn.Linear(3, 2).double()
    kept = TrainingStatistics.collect(model, (x, y), cross_entropy)
    if not own_weights:  # as in files of earlier versions
        kept = dataclasses.replace(kept, weights=None)
    made = []
    operator = TrainingStatistics.operator

    def record(*arguments, **options):
        made.append(operator(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(TrainingStatistics, "operator", record)
    # A rank off the matrix is left to weight decay, and steps are long.
    settings = Settings(weight_decay=0.05, damping=0.0)
    requests = ([3, 1, 8, 9, 11, 20], [7, 2, 6], [0, 5])
    matrices = []
    with Unlearner(
        model, (x, y), cross_entropy, directory=folder, statistics=kept, preset=settings
    ) as stream:
        for ids in requests[:2]:
            made.clear()
            stream.remove(ids)
            matrices.append(made[0].to_dense())
    with Unlearner.resume(folder, model, (x, y), cross_entropy, statistics=kept) as stream:
        moved = stream.model.weight - model.weight
        assert moved.norm() > 0.1
        made.clear()
        stream.remove(requests[2])
        matrices.append(made[0].to_dense())
    gone = []
    eye = 0.05 * torch.eye(8, dtype=torch.float64)  # weight decay
    for ids, matrix in zip(requests, matrices, strict=True):
        gone += ids
        without = kept.without(model, cross_entropy, (x[gone], y[gone]))
        torch.testing.assert_close(matrix, without.matrix + eye, rtol=1e-10, atol=1e-12)
        rest = [i for i in range(N) if i not in gone]
        alone = TrainingStatistics.collect(model, (x[rest], y[rest]), cross_entropy)
        torch.testing.assert_close(matrix, alone.matrix + eye, rtol=1e-10, atol=1e-12)


def test_a_stream_can_do_without_the_retained_samples(folder, in_earnest):
    """Except for squared error of a linear model, whose curvature is the same everywhere."""
    n = 60
    x, _ = make_data(n)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64) + 0.1 * x[:, :1] ** 2
    whitened = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)

    def fit(rows):
        a, b = whitened[rows], y[rows]
        eye = torch.eye(4, dtype=torch.float64)
        w = torch.linalg.solve(a.T @ a / len(a) * 2 + 0.1 * eye, a.T @ b / len(a) * 2)
        model = nn.Linear(3, 1).double()
        with torch.no_grad():
            model.weight.copy_(w[:3].T)
            model.bias.copy_(w[3])
        return model

    loss_fn = nn.MSELoss()
    model = fit(list(range(n)))
    statistics = TrainingStatistics.collect(model, (x, y), loss_fn)
    settings = Settings(weight_decay=0.1, damping=0.0, rtol=1e-12)
    only = TensorDataset(x.clone(), y)
    only.tensors[0][10:] = math.nan  # what is not asked for is not read
    arguments = (model, only, loss_fn)
    with Unlearner(*arguments, directory=folder, statistics=statistics, preset=settings) as stream:
        stream.remove([3, 1])
        stream.remove(7)
    with Unlearner.resume(folder, *arguments, statistics=statistics) as stream:
        stream.remove([2, 9])
        expected = fit([i for i in range(n) if i not in (3, 1, 7, 2, 9)])
        torch.testing.assert_close(stream.model.weight, expected.weight, rtol=1e-9, atol=1e-9)
        stream.rollback(1)
        stream.remove(7)
        expected = fit([i for i in range(n) if i not in (3, 1, 7)])
        torch.testing.assert_close(stream.model.weight, expected.weight, rtol=1e-9, atol=1e-9)


def test_the_guard_watches_the_same_samples_in_all_requests(monkeypatch):
    """A fall is counted from the stream's start: of other samples it would be chance."""
    x, y = make_data()
    monkeypatch.setattr(unlearner, "unlearn", unlearn)
    monkeypatch.setattr(steps, "GUARD_SIZE", 20)
    options = {"update": "gradient", "learning_rate": 0.0, "max_drop": 0.1, "repair_drop": 0.005}
    model = make_model()
    with Unlearner(model, (x, y), cross_entropy, preset=Settings(seed=3, **options)) as stream:
        for k in range(6):
            stream.remove(k)
        before = {entry.record["result"]["guard"][0] for entry in stream.ledger[1:]}
    order = np.random.default_rng([3, 5]).permutation(len(y))
    right = (model.eval()(x).argmax(1) == y).double()
    expected = {right[[int(i) for i in order if i > k][:20]].mean().item() for k in range(6)}
    assert before == expected
    with make(validation=(x[:9], y[:9]), **options) as stream:
        stream.remove(11)
        assert stream.ledger[1].record["result"]["guard"][0] == right[:9].mean().item()


def test_the_recommended_preset_with_statistics(monkeypatch):
    """They hold a curvature without output_damping, which the preset then does without."""
    monkeypatch.setattr(unlearner, "unlearn", unlearn)
    model, data = make_model(), make_data()
    kept = TrainingStatistics.collect(model, data, cross_entropy, curvature="gauss_newton")
    with Unlearner(model, data, cross_entropy, statistics=kept, weight_decay=0.1) as stream:
        stream.remove([2, 5])
        assert stream.removed == (2, 5)
        assert stream.settings.output_damping == 0 < stream.settings.damping


# ---------------------------------------------------------------------------------------------
# Verification


@pytest.fixture
def finished(folder):
    with make(folder, **OPTIONS, keep=2, epsilon_budget=3.0, delta_budget=0.5) as stream:
        stream.remove([1, 2])
        stream.remove(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the noise
            stream.release()
        stream.rollback()
        stream.remove(8)
    return folder, stream.model, stream.ledger.head


def test_what_was_written_verifies(finished):
    folder, model, head = finished
    found = verify_ledger(folder, model, make_data(), head=head)
    assert found
    assert found.ok
    assert (found.problems, found.notes) == ((), ())
    assert (found.entries, found.head) == (6, head)
    assert (found.removed, found.pending) == ((1, 2, 8), ())
    assert str(found).startswith("The ledger verifies: 6 entries, 3 samples removed, 0 pending")


def test_a_ledger_is_a_frame(finished):
    folder, _, head = finished
    ledger = Ledger(folder / "ledger.jsonl")
    frame = ledger.to_frame()
    assert frame.index.tolist() == list(range(6))
    assert frame["kind"].tolist() == ["start", "remove", "remove", "release", "rollback", "remove"]
    assert frame["n_removed"].tolist() == [0, 2, 3, 3, 2, 3]
    assert frame.loc[1, "ids"] == [1, 2]
    assert frame.loc[4, "to"] == 1
    assert frame["note"].isna().all()
    assert frame["seconds"].notna().tolist() == [kind == "remove" for kind in frame["kind"]]
    guarantee = ledger[3].record["guarantee"]
    assert frame.loc[3, "sigma"] == guarantee["sigma"]
    assert frame.loc[3, "guarantee"] == guarantee["kind"]
    before, after = ledger[1].record["result"]["loss_forget"]
    assert frame.loc[1, "forget_loss_before"] == before
    assert after == "nan"
    assert np.isnan(frame.loc[1, "forget_loss_after"])
    assert frame["hash"].iloc[-1] == head
    assert len(Ledger(None).to_frame()) == 0


def test_a_frame_needs_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="Ledger.to_frame needs pandas: pip install pandas"):
        Ledger(None).to_frame()


def test_a_ledger_in_use_can_be_verified(folder):
    with make(folder) as stream:
        stream.remove(1)
        assert verify_ledger(folder, stream.model, make_data())
        stream.remove(2)


def rewrite(folder, change):
    """Write the ledger again with right hashes, as anyone could who may write the file."""
    path = folder / "ledger.jsonl"
    lines, previous = [], "0" * 64
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    change(entries)
    for entry in entries:
        del entry["hash"]
        entry["previous"] = previous
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        previous = hashlib.sha256(text.encode()).hexdigest()
        lines.append(json.dumps(entry | {"hash": previous}, sort_keys=True, separators=(",", ":")))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[2]["record"].update(ids=[1]), "removes sample 1, which is not retained"),
        (lambda e: e[2]["record"].update(ids=[40]), "removes sample 40, which is not retained"),
        (lambda e: e[2]["record"].update(ids=[3, 3], hashes=["", ""]), "removes sample 3"),
        (lambda e: e[2]["record"].update(ids=[4, 5]), "its record lacks something"),
        (lambda e: e[2]["record"].update(ids=[]), "as skipped, but asked for"),
        (lambda e: e[2]["record"].pop("checkpoint"), "its record lacks something"),
        (lambda e: e[2].update(record=[]), "its record lacks something"),
        (lambda e: e[2]["record"].update(skipped=[3]), "as skipped, but asked for"),
        (lambda e: e[2]["record"].update(n_removed=2), "3 samples are removed and 0 pending"),
        (lambda e: e[2]["record"].update(n_pending=1), "it says 3 and 1"),
        (lambda e: e[2].update(kind="start"), "an entry 2 cannot be of kind 'start'"),
        (lambda e: e[2].update(kind="thing"), "an entry 2 cannot be of kind 'thing'"),
        (lambda e: e[0].update(kind="remove"), "an entry 0 cannot be of kind 'remove'"),
        (lambda e: e[0]["record"].update(format=9), "its format is 9; this version reads 1"),
        (lambda e: e[4]["record"].update(to=4), "it goes back to entry 4, which does not precede"),
        (lambda e: e[4]["record"].update(to=0), "its weights differ from those of entry 0"),
        (
            lambda e: e[2]["record"]["checkpoint"].update(file="000001.pt"),
            "it cannot have the checkpoint '000001.pt'",
        ),
        (
            lambda e: e[3]["record"]["checkpoint"].update(sha256=""),
            "its weights differ from those of entry 2",
        ),
        (
            lambda e: e[3]["record"]["guarantee"].update(epsilon=0.4),
            "what is left of the privacy budget is not|its record lacks",
        ),
        (
            lambda e: e[3]["record"]["budget"].update(epsilon_sum=0.0),
            "what is left of the privacy budget is not",
        ),
        (lambda e: e[0]["record"].update(budget=None), "there is no budget for a release"),
    ],
)
def test_entries_that_cannot_follow_are_found(finished, change, message):
    folder, _, head = finished
    rewrite(folder, change)
    found = verify_ledger(folder)
    assert not found
    assert len(found.problems) == 1
    assert "of the ledger: " in found.problems[0]
    assert re.search(message, found.problems[0])
    assert "does NOT verify" in str(found)
    with pytest.raises(LedgerError, match=message):
        resume(folder)
    assert any(head in problem for problem in verify_ledger(folder, head=head).problems)


def test_a_ledger_written_anew_is_found_by_what_was_noted(finished):
    folder, _, head = finished
    seal = Ledger(folder / "ledger.jsonl")[2].hash
    rewrite(folder, lambda entries: entries[1]["record"].update(note="innocent"))
    assert verify_ledger(folder)
    for noted in (head, seal):
        (problem,) = verify_ledger(folder, head=noted).problems
        assert problem == f"no entry has the hash {noted} that was noted earlier"


def test_a_ledger_cut_short_is_found_by_what_was_noted(finished):
    folder, model, head = finished
    path = folder / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    found = verify_ledger(folder)
    assert any("line 6 of the ledger" in note and "cut short" in note for note in found.notes)
    assert any("000005.pt" in note for note in found.notes)
    assert any(head in problem for problem in verify_ledger(folder, head=head).problems)
    assert any("weights of model" in problem for problem in verify_ledger(folder, model).problems)


def test_lines_that_do_not_verify_are_listed(finished):
    folder, _, _ = finished
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"ids":[1,2]', b'"ids":[1,4]')
    lines[4] = b"{}\n"
    path.write_bytes(b"".join(lines))
    problems = verify_ledger(folder).problems
    assert [problem.split(":")[0] for problem in problems][:2] == [
        "line 2 of the ledger",
        "line 5 of the ledger",
    ]


def test_what_can_be_read_is_counted_where_something_does_not_verify(finished):
    folder, _, _ = finished
    whole = verify_ledger(folder)
    found = verify_ledger(folder, head="abc")
    counts = "6 entries, 3 samples removed, 0 pending, head "
    assert str(found).startswith(f"The ledger does NOT verify: {counts}")
    assert (found.removed, found.counted) == (whole.removed, whole.counted) == ((1, 2, 8), None)
    (folder / "checkpoints" / "000000.pt").unlink()  # that, too, is looked at
    assert len(verify_ledger(folder, head="abc").problems) == 2

    path = folder / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{}\n", *lines[4:]]))
    found = verify_ledger(folder)
    assert ((1, 2, 3), 3) == (found.removed, found.counted)
    assert "3 samples removed, 0 pending after entry 2 (what follows is not counted)" in str(found)
    path.write_bytes(b"".join([b"{}\n", *lines[1:]]))
    found = verify_ledger(folder)
    assert ((), 0) == (found.removed, found.counted)
    assert "samples not counted, head " in str(found)


def test_checkpoints_are_verified(finished):
    folder, _, _ = finished
    checkpoint = folder / "checkpoints"
    assert sorted(os.listdir(checkpoint)) == ["000000.pt", "000004.pt", "000005.pt"]
    state = torch.load(checkpoint / "000004.pt", weights_only=True)
    state["0.weight"][0, 0] += 1e-12
    torch.save(state, checkpoint / "000004.pt")
    (checkpoint / "000000.pt").unlink()
    (checkpoint / "000009.pt").write_bytes(b"")
    found = verify_ledger(folder)
    assert [problem[:20] for problem in found.problems] == [
        "checkpoint 000000.pt",
        "checkpoint 000004.pt",
    ]
    assert any("000009.pt" in note for note in found.notes)
    with resume(folder) as stream:
        with pytest.raises(LedgerError, match=r"checkpoint 000004.pt holds other tensors"):
            stream.rollback(4)
        assert stream.removed == (1, 2, 8)
    assert not (checkpoint / "000009.pt").exists()
    (checkpoint / "000005.pt").write_bytes(b"")
    with pytest.raises(LedgerError, match=r"checkpoint 000005.pt cannot be read"):
        resume(folder)


def test_a_model_is_verified(finished):
    folder, model, _ = finished
    assert verify_ledger(folder, model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[1].bias[0] = np.nextafter(changed[1].bias[0].item(), 9)
    for other in (changed, model.float(), make_model()):
        (problem,) = verify_ledger(folder, other).problems
        assert problem.startswith("the weights of model are not those of the last entry")


def test_data_are_verified(finished):
    folder, _, _ = finished
    x, y = make_data()
    assert verify_ledger(folder, train=TensorDataset(x, y))
    y[2] = 1 - y[2]
    (problem,) = verify_ledger(folder, train=(x, y)).problems
    assert "train has other contents" in problem
    (problem,) = verify_ledger(folder, train=(x[1:], y[1:])).problems
    assert "train has 39 samples, on record are 40" in problem


def test_a_twin_of_a_removed_sample_is_noted(folder):
    x, y = make_data()
    x[20], y[20] = x[5], y[5]
    x[21] = x[5]
    y[21] = 1 - y[5]
    with make(folder, (x, y)) as stream:
        stream.remove([1, 5])
    found = verify_ledger(folder, train=(x, y))
    assert found.ok
    assert found.notes == (
        "sample 20 is retained and has the content of sample 5, which is removed",
    )


def test_nothing_to_verify(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no ledger.jsonl"):
        verify_ledger(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(b'{"number":')
    found = verify_ledger(tmp_path)
    assert found.problems == ("the ledger has no entry",)


def test_units_are_listed_as_ranges():
    selection = UnitSelection({"a": [0, 1, 2, 5, 7, 8], "": [3]})
    assert compact(selection) == {"a": "0-2,5,7-8", "": "3"}
    assert compact(UnitSelection({})) == {}


def test_the_guard_counts_from_the_start_of_the_stream(in_earnest):
    """Small losses add up to `max_drop`, and then nothing more is removed."""
    x, y = make_data(120)
    model = nn.Linear(3, 2).double()
    y = (x[:, 0] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    options = {"update": "gradient", "learning_rate": 3000.0, "halvings": 12, "retries": 0}
    options |= {"repair_epochs": 0, "n_recalibrate": None, "max_drop": 0.1}
    stream = Unlearner(model, (x, y), cross_entropy, validation=(x, y), **options)
    start = (model(x).argmax(1) == y).double().mean().item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for k in range(40):
            stream.remove(k)
    end = (stream.model(x).argmax(1) == y).double().mean().item()
    assert 0.02 < start - end <= 0.1 + 1e-9
