"""What version 0.1.0 wrote before its modules were moved: it loads, goes on, and comes out again.

tests/data/before_redesign/make.py made it and says what there is.
"""

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lcodec_ext.curvature import UnitSelection
from lcodec_ext.unlearning import (
    Ledger,
    Settings,
    TrainingStatistics,
    Unlearner,
    unlearn,
    verify_ledger,
)

FOLDER = Path(__file__).parent / "data" / "before_redesign"
made = SimpleNamespace(**runpy.run_path(str(FOLDER / "make.py")))
STREAMS = json.loads((FOLDER / "streams.json").read_text())
RESULTS = json.loads((FOLDER / "results.json").read_text())
# The same bits are demanded of the machine that recorded them, and of the code alone: elsewhere
# BLAS and vectorised functions round otherwise.
SAME_MACHINE = made.machine() == json.loads((FOLDER / "machine.json").read_text())
CURVATURE = 2.0  # largest eigenvalue of a model's curvature is 1.85, of "cnn"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # steps that do harm, large noise


@pytest.fixture(scope="module")
def inputs():
    return torch.load(FOLDER / "inputs.pt", weights_only=True)


@pytest.fixture
def copied(tmp_path):
    """A copy of the fixtures, to be written to."""
    shutil.copytree(FOLDER, tmp_path / "fixtures")
    return tmp_path / "fixtures"


def resumed(folder, inputs, name):
    given, keywords = made.arguments(folder, inputs, name)
    return Unlearner.resume(folder / "streams" / name, *given, **keywords)


def kept(folder, name, number):
    path = folder / "streams" / name / "checkpoints" / f"{number:06d}.pt"
    return torch.load(path, weights_only=True)


def rounding(model, dtype, step, damping, residual):
    """Bound on the change of weights that other roundings make of a step.

    A backward stable solve has a relative error of some eps times the condition of the matrix, to
    which the gradient's adds as much; conjugate gradients end with a residual, which is divided by
    the smallest eigenvalue, too.
    """
    condition = CURVATURE / (made.WEIGHT_DECAY[model] + damping)
    return (64 * torch.finfo(dtype).eps + 2 * residual) * condition * step


# ---------------------------------------------------------------------------------------------
# Ledgers and checkpoints


@pytest.mark.parametrize("name", made.STREAMS)
def test_a_stream_resumes_to_the_same_bits(copied, inputs, name):
    record = STREAMS[name]
    with resumed(copied, inputs, name) as stream:
        assert [entry.kind for entry in stream.ledger] == record["entries"]
        assert stream.ledger.head == record["head"]
        assert list(stream.removed) == record["removed"]
        assert list(stream.pending) == record["pending"]
        assert len(stream.retained) == made.N - len(record["removed"])
        assert (stream.budget and stream.budget.to_dict()) == record["budget"]
        state = stream.model.state_dict()
        assert made.state_hash(state) == record["sha256"]
        last = stream.ledger[-1].record["checkpoint"]
        assert last["sha256"] == record["sha256"]
        stored = kept(copied, name, int(Path(last["file"]).stem))
        assert stored.keys() == state.keys()
        for key, tensor in stored.items():
            assert tensor.dtype == state[key].dtype
            assert torch.equal(tensor, state[key]), key
        assert Settings.from_dict(stream.ledger[0].record["settings"]) == stream.settings


@pytest.mark.parametrize("name", made.STREAMS)
def test_a_stream_verifies(copied, inputs, name):
    record = STREAMS[name]
    directory = copied / "streams" / name
    with resumed(copied, inputs, name) as stream:
        model = stream.model
    _, train, _ = made.arguments(copied, inputs, name)[0]
    found = verify_ledger(directory, model, train, head=record["head"])
    assert found.ok, found
    assert found.entries == len(record["entries"])
    assert found.head == record["head"]
    assert list(found.removed) == record["removed"]
    assert len(Ledger(directory / "ledger.jsonl")) == len(record["entries"])

    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-9
    assert not verify_ledger(directory, model)
    changed = (train[0], (train[1] + 1) % 3)
    assert not verify_ledger(directory, train=changed)


@pytest.mark.parametrize("name", made.STREAMS)
def test_a_stream_goes_on(copied, inputs, name):
    model = made.STREAMS[name][0]
    with resumed(copied, inputs, name) as stream:
        before = stream.model.state_dict()
        result = stream.remove(made.ONE_MORE)
        state = stream.model.state_dict()
        entry = stream.ledger[-1].record
    record = STREAMS[name]["next"]
    assert entry["selection"] == record["selection"]
    if SAME_MACHINE:
        assert made.state_hash(state) == record["sha256"]
    bound = rounding(model, torch.float64, result.step_norm, result.damping, result.solve_residual)
    moved = False
    for key, tensor in state.items():
        expected = torch.tensor(record["weights"][key], dtype=tensor.dtype).reshape(tensor.shape)
        assert (tensor - expected).abs().max() <= bound, key
        moved |= bool((expected - before[key]).abs().max() > 1e6 * bound)
    assert moved
    assert verify_ledger(copied / "streams" / name, stream.model)


def test_what_a_stream_has_kept_is_restored(copied, inputs):
    with resumed(copied, inputs, "recommended") as stream:
        stream.rollback()
        assert list(stream.removed) == [5, 2, 8]
        point = stream.ledger[-1].record["checkpoint"]
        stored = kept(copied, "recommended", int(Path(point["file"]).stem))
        assert made.state_hash(stored) == made.state_hash(stream.model.state_dict())
        stream.rollback(0)
        original = made.trained(inputs, "cnn", torch.float64).state_dict()
        assert made.state_hash(original) == made.state_hash(stream.model.state_dict())
        stream.remove(5)
        released = stream.release()
        assert stream.budget.n_releases == 3
        assert made.state_hash(released.state_dict()) != made.state_hash(stream.model.state_dict())


def test_a_changed_ledger_or_checkpoint_is_found(copied, inputs):
    path = copied / "streams" / "recommended" / "ledger.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"note":"first"', '"note":"other"'))
    assert path.read_text() != text
    assert not verify_ledger(path.parent)
    state = kept(copied, "paper", 2)
    state["1.bias"][0] += 1e-12
    torch.save(state, copied / "streams" / "paper" / "checkpoints" / "000002.pt")
    assert not verify_ledger(copied / "streams" / "paper")


# ---------------------------------------------------------------------------------------------
# Statistics


def test_saved_statistics_load(inputs):
    x, y = made.images(inputs["pixels"], torch.float64), inputs["targets"]
    model = made.trained(inputs, "small", torch.float64)
    loaded = TrainingStatistics.load(FOLDER / "statistics.pt")
    now = TrainingStatistics.collect(model, (x, y), cross_entropy)
    assert (loaded.n, loaded.kind, loaded.selection) == (now.n, now.kind, now.selection)
    # Sums of N products of the Jacobians' entries: N eps times the largest, CURVATURE at most.
    bound = made.N * np.finfo(float).eps * CURVATURE
    assert (loaded.matrix - now.matrix).abs().max() <= bound
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.weights[key], tensor)


def test_saved_pairs_load_and_step(inputs):
    x, y = made.images(inputs["pixels"], torch.float64), inputs["targets"]
    model = made.trained(inputs, "small", torch.float64)
    pairs = TrainingStatistics.load(FOLDER / "pairs.pt")
    assert (pairs.n, pairs.kind, len(pairs.steps)) == (made.N, "secant", 3)
    result = unlearn(
        model,
        (x[:3], y[:3]),
        None,
        cross_entropy,
        statistics=pairs,
        curvature="secant",
        damping=0.1,
    )
    assert result.solve_residual < 1e-12
    assert 0 < result.step_norm < 1


# ---------------------------------------------------------------------------------------------
# Results of both presets

EXACT = [
    "n_forget",
    "n_retain",
    "n_monitored",
    "n_parameters",
    "n_trainable",
    "n_units",
    "n_dead",
    "skipped",
    "attempts",
    "length",
    "repaired",
    "damping",
    "solve_method",
    "solve_iterations",
    "watched",
]
PAIRS = ["gradient_norm", "gradient_norm_selected", "loss_forget", "loss_retain"]


@pytest.mark.parametrize("case", made.GOLDEN, ids="-".join)
def test_a_result_is_as_before(inputs, case):
    _, model, kind = case
    record, dtype = RESULTS["-".join(case)], made.DTYPES[kind]
    result = made.golden(inputs, *case)
    state = result.model.state_dict()
    if SAME_MACHINE:
        assert made.state_hash(state) == record["sha256"]
    for name in EXACT:
        value = getattr(result, name)
        assert (list(value) if isinstance(value, tuple) else value) == record[name], name
    assert result.selection == UnitSelection.from_dict(record["selection"])
    assert result.settings == Settings.from_dict(record["settings"])
    if record["foci"] is None:
        assert result.foci is None
    else:
        assert list(result.foci.names) == record["foci"]["names"]
        # Comparisons of distances alone make T: a near tie that falls otherwise moves it by 1 / K.
        np.testing.assert_allclose(result.foci.cumulative, record["foci"]["T"], rtol=0, atol=0.01)

    residual = max(record["solve_residual"], result.solve_residual)
    bound = rounding(model, dtype, record["step_norm"], record["damping"], residual)
    weights = torch.load(FOLDER / "results.pt", weights_only=True)["-".join(case)]
    assert weights.keys() == state.keys()
    for key, tensor in weights.items():
        assert (state[key] - tensor).abs().max() <= bound, key
    assert bound < 2e-2 * record["step_norm"]  # in float32; it is worth something
    assert abs(result.step_norm - record["step_norm"]) <= 2 * bound
    # Norms of gradients move with the weights by the curvature, mean losses by the gradient, which
    # is below 1; of their own they have roundings of sums of terms of about 1.
    own = 64 * torch.finfo(dtype).eps
    norm = record["training_gradient_norm"]
    assert abs(result.training_gradient_norm - norm) <= own
    for name in PAIRS:
        for value, expected in zip(getattr(result, name), record[name], strict=True):
            assert abs(value - expected) <= own + CURVATURE * bound * len(state) ** 0.5, name
    for value, expected in zip(result.guard, record["guard"], strict=True):
        assert np.isnan(value) if expected is None else abs(value - expected) <= 1e-12
