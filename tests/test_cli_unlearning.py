"""The command line: unlearn, evaluate and report, with models and data by import path."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from lcodec_ext.cli import main
from lcodec_ext.cli.import_path import load_object
from lcodec_ext.cli.problem import parse_ids
from lcodec_ext.cli.unlearn import PRESETS
from lcodec_ext.evaluation import methods
from lcodec_ext.unlearning import ParameterSelection, UnitSelection, WeightPatch, unlearn
from lcodec_ext.unlearning.settings import PRESETS as KNOWN_PRESETS

CODE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

generator = torch.Generator().manual_seed(0)
x = torch.randn(90, 4, generator=generator, dtype=torch.float64)
y = (x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)).argmax(1)
wrong = [3, 17, 20, 21, 22]
y[wrong] = (y[wrong] + 1) % 3
train, test = (x[:60], y[:60]), (x[60:], y[60:])

def build():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()

def fit(samples, seed):
    model = build()
    torch.manual_seed(seed)
    nn.init.normal_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(samples[0]), samples[1])
        loss = loss + 0.005 * sum((p ** 2).sum() for p in model.parameters())
        loss.backward()
        return loss
    optimizer.step(closure)
    return model

def load():
    return {"train": train, "test": test, "loss_fn": cross_entropy, "retrain": fit}

def with_users():
    return load() | {"groups": [f"user {k % 12}" for k in range(60)]}

def with_users_and_validation():
    return with_users() | {"test": (x[60:75], y[60:75]), "validation": (x[75:], y[75:])}

def with_numbers():
    return load() | {"groups": [k % 12 for k in range(60)]}

def with_data():
    return build(), load()

class Parts:
    train = torch.utils.data.TensorDataset(*train)
    test = torch.utils.data.TensorDataset(*test)
    loss_fn = staticmethod(cross_entropy)
    def retrain(samples, seed):
        return fit(tuple(torch.stack(column) for column in zip(*samples)), seed)

def objects():
    return Parts

def nothing():
    return 3

def misspelt():
    return {"trian": train, "loss_fn": cross_entropy}

def concave():
    return {"train": train, "loss_fn": lambda outputs, targets: -cross_entropy(outputs, targets)}

def broken():
    raise RuntimeError("no such table")
"""
MODEL = ["--model", "own_problem.py:build"]
DATA = ["--data", "own_problem.py:load"]
WEIGHTS = ["--weights", "net.pt"]
DECAY = ["--weight-decay", "0.01"]
STRENGTH = ["--damping", "1e-3"]


@pytest.fixture(autouse=True)
def problem(tmp_path, monkeypatch):
    """A folder with own_problem.py and net.pt, the weights of its trained model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_problem.py").write_text(CODE, encoding="utf-8")
    fit = load_object("own_problem.py:fit", "--model")
    module = sys.modules[fit.__module__]
    torch.save(fit(module.train, 0).state_dict(), "net.pt")
    yield module
    sys.modules.pop(module.__name__, None)


@pytest.fixture
def run(capsys):
    def call_main(*arguments):
        status = main([*map(str, arguments), "--quiet"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call_main


@pytest.fixture
def refused(run):
    def message(*arguments, status=2):
        got, out, err = run(*arguments)
        assert (got, out, err.count("\n")) == (status, "", 1), err
        return err

    return message


def weights(file):
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------------------------
# unlearn


def test_unlearn_is_unlearn(run, problem):
    status, out, err = run(
        "unlearn",
        *MODEL,
        *WEIGHTS,
        *DATA,
        *DECAY,
        "--forget",
        "3,20-22",
        "--output",
        "new.pt",
        "--damping",
        "0.001",
        "--set",
        "n_curvature=null",
        "--json",
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["ids"], found["not_removed"], found["n_removed"]) == ([3, 20, 21, 22], [], 4)
    assert (found["output"], found["directory"], found["release"]) == ("new.pt", None, None)
    ids = torch.tensor(found["ids"])
    keep = torch.ones(60, dtype=torch.bool)
    keep[ids] = False
    model = problem.build()
    model.load_state_dict(weights("net.pt"))
    x, y = problem.train
    result = unlearn(
        model,
        (x[ids], y[ids]),
        (x[keep], y[keep]),
        cross_entropy,
        weight_decay=0.01,
        damping=0.001,
        n_curvature=None,
        seed=found["result"]["settings"]["seed"],
    )
    for key, value in result.model.state_dict().items():
        torch.testing.assert_close(weights("new.pt")[key], value, rtol=1e-9, atol=1e-12)
    assert found["result"]["settings"]["weight_decay"] == 0.01
    assert found["result"]["n_forget"] == 4


def test_unlearn_says_what_it_did(run):
    command = ["unlearn", "--model", "own_problem.py:with_data", *WEIGHTS, *DECAY, *STRENGTH]
    status, out, err = run(*command, "--forget", "3", "--output", "new.safetensors")
    assert (status, err) == (0, "")
    assert out.startswith("UnlearnResult: 1 of 60 samples removed")
    assert "written to    new.safetensors" in out
    from safetensors.torch import load_file

    assert load_file("new.safetensors").keys() == weights("net.pt").keys()
    assert not list(Path().glob("*.part"))
    # And back in, as weights.
    command[4] = "new.safetensors"
    assert run(*command, "--forget", "5", "--output", "newer.pt")[0] == 0


def test_settings_reach_the_deletion(run, problem):
    def settings(*options):
        status, out, err = run(
            "unlearn", *MODEL, *DATA, "--forget", "1", "--output", "new.pt", "--json", *options
        )
        assert status == 0, err
        return json.loads(out)["result"]["settings"]

    Path("units.json").write_text(json.dumps(UnitSelection({"": [2]}).to_dict()), encoding="utf-8")
    found = settings("--selection", "units.json", "--set", "dtype=float64", "--seed", "7")
    assert found["selection"] == UnitSelection({"": [2]}).to_dict()
    assert found["dtype"] == "float64"
    mask = ParameterSelection({"weight": [0, 2], "bias": [1]}).to_dict()
    Path("mask.json").write_text(json.dumps(mask), encoding="utf-8")
    assert settings("--selection", "mask.json")["selection"] == mask
    found = settings("--selection", "step", "--set", "max_parameters=0.2")
    assert (found["selection"], found["max_parameters"]) == ("step", 0.2)
    found = settings(
        "--selection",
        "random",
        "--set",
        "n_units=2",
        "--curvature",
        "fisher",
        "--set",
        'candidates=["*"]',
    )
    assert (found["selection"], found["n_units"], found["curvature"]) == ("random", 2, "fisher")
    assert found["candidates"] == ["*"]


def test_ledger_resume_and_verify(run, refused):
    unlearn_ = ["unlearn", *MODEL, *DATA, "--directory", "run", "--json"]
    status, out, err = run(*unlearn_, *WEIGHTS, *DECAY, "--forget", "3", "--note", "case 7")
    assert status == 0, err
    first = json.loads(out)
    assert refused(*unlearn_, *WEIGHTS, "--forget", "5").endswith("--resume goes on with it\n")
    assert "--damping cannot change" in refused(
        *unlearn_, "--resume", "--forget", "5", "--damping", "1"
    )
    assert "--set steps=2 cannot change" in refused(
        *unlearn_, "--resume", "--forget", "5", "--set", "steps=2"
    )
    assert "--weights goes without" in refused(*unlearn_, *WEIGHTS, "--resume", "--forget", "5")
    assert "sample 3, which is removed already" in refused(*unlearn_, "--resume", "--forget", "3")
    status, out, err = run(*unlearn_, "--resume", "--forget", "17,20", "--output", "new.pt")
    assert status == 0, err
    second = json.loads(out)
    assert (second["ids"], second["n_removed"]) == ([17, 20], 3)
    assert second["result"]["settings"]["weight_decay"] == 0.01

    verify = ["unlearn", "--verify", "--directory", "run", "--json"]
    status, out, _ = run(*verify, *DATA, *MODEL, "--weights", "new.pt", "--head", first["head"])
    found = json.loads(out)
    assert (status, found["ok"], found["head"]) == (0, True, second["head"])
    assert (found["entries"], found["removed"]) == (3, [3, 17, 20])
    status, out, _ = run(*verify, *MODEL, *WEIGHTS)
    assert (status, json.loads(out)["ok"]) == (1, False)
    assert "weights" in json.loads(out)["problems"][0]
    ledger = Path("run/ledger.jsonl")
    ledger.write_text(ledger.read_text().replace("case 7", "case 8"))
    status, out, _ = run("unlearn", "--verify", "--directory", "run")
    assert status == 1
    assert "does NOT verify" in out


def test_a_folder_on_a_file_system_without_locks(run, refused, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    command = ["unlearn", *MODEL, *DATA, "--directory", "run"]
    message = refused(*command, *WEIGHTS, "--forget", "3", status=1)
    assert "has no file locks" in message
    assert "--no-lock on the command line" in message
    assert run(*command, *WEIGHTS, "--forget", "3", "--no-lock")[0] == 0
    assert "has no file locks" in refused(*command, "--resume", "--forget", "5", status=1)
    assert run(*command, "--resume", "--forget", "5", "--no-lock")[0] == 0
    assert run("unlearn", "--verify", "--directory", "run")[0] == 0
    assert "does not go" in refused("unlearn", "--verify", "--directory", "run", "--no-lock")
    lost = refused("unlearn", *MODEL, *DATA, "--forget", "3", "--output", "n.pt", "--no-lock")
    assert "--no-lock needs --directory" in lost


def test_whole_groups(run, refused):
    users = ["--data", "own_problem.py:with_users"]
    command = ["unlearn", *MODEL, *users, "--directory", "run", "--json"]
    wrong = refused(*command, *WEIGHTS, "--forget-group", "user 12")
    assert "--forget-group: no sample is of group 'user 12'; close to it: 'user 2'" in wrong
    assert not Path("run").exists()
    status, out, err = run(*command, *WEIGHTS, *DECAY, "--forget-group", "user 3, user 4")
    assert (status, err.count("warning")) == (0, 1), err  # that it is not calibrated
    found = json.loads(out)
    three, four = ([k + 12 * j for j in range(5)] for k in (3, 4))
    assert found["ids"] == sorted([*three, *four])
    assert found["groups"] == [
        {"id": "user 3", "samples": three, "before": []},
        {"id": "user 4", "samples": four, "before": []},
    ]
    again = refused(*command, "--resume", "--forget-group", "user 3")
    assert "--forget-group names group 'user 3', which is removed already" in again
    Path("who.txt").write_text("user 7\n\nuser 8 \n", encoding="utf-8")
    Path("who.json").write_text('["user 9"]', encoding="utf-8")
    command = [*command, "--resume"]
    status, out, err = run(*command, "--forget", "8,1", "--forget-group", "@who.txt")
    assert status == 0, err
    found = json.loads(out)
    assert [each["id"] for each in found["groups"]] == ["user 7", "user 8"]
    assert (found["n_removed"], len(found["ids"])) == (21, 11)
    status, out, err = run(*command[:-2], "--resume", "--forget-group", "who.json")
    assert "  groups        'user 9' (5 samples)" in out
    status, out, err = run(*command, "--forget-group", "user 1")
    assert "1 of the 5 samples of group 'user 1' were removed by earlier requests" in err
    assert refused("unlearn", *MODEL, *DATA, *command[5:], "--forget", "0").count("groups must be")
    verify = ["unlearn", "--verify", "--directory", "run"]
    assert run(*verify, *users)[0] == 0
    status, out, _ = run(*verify, "--data", "own_problem.py:with_numbers")
    assert (status, out.count("groups must be what was given at the start")) == (1, 1)


def test_groups_by_integers(run, refused):
    command = ["unlearn", *MODEL, *WEIGHTS, "--data", "own_problem.py:with_numbers", *STRENGTH]
    status, out, _ = run(*command, "--forget-group", "11", "--output", "new.pt", "--json")
    assert (status, json.loads(out)["ids"]) == (0, [11, 23, 35, 47, 59])
    message = refused(*command, "--forget-group", "u1", "--output", "new.pt")
    assert "no sample is of group 'u1'; the ids of this data are integers, as 0" in message
    every = ",".join(map(str, range(12)))
    message = refused(*command, "--forget-group", every, "--output", "new.pt")
    assert "the request names all remaining samples" in message


def test_a_step_that_is_taken_back(run):
    # Twenty removals, without a retry and with next to no damping; no fall is small enough.
    status, out, err = run(
        "unlearn",
        *MODEL,
        *WEIGHTS,
        *DATA,
        "--forget",
        "0-19",
        "--output",
        "new.pt",
        "--json",
        "--set",
        "update=gradient",
        "--set",
        "learning_rate=1e4",
        "--set",
        "max_drop=0.0",
        "--set",
        "retries=0",
    )
    assert status == 1, err
    found = json.loads(out)
    assert found["not_removed"] == found["pending"] == list(range(20))
    assert found["output"] is None
    assert not Path("new.pt").exists()
    assert "retrain without them" in err
    assert found["warnings"]


def test_releases_are_paid_for(run, refused):
    privacy = ["--epsilon", "0.5", "--delta", "1e-5", "--epsilon-budget", "0.5"]
    constants = ["--set", "lipschitz=2", "--set", "hessian_lipschitz=1"]
    command = ["unlearn", *MODEL, *DATA, "--directory", "run", "--json"]
    status, out, err = run(
        *command, *WEIGHTS, *DECAY, *privacy, *constants, "--forget", "3", "--output", "new.pt"
    )
    assert status == 0, err
    release = json.loads(out)["release"]
    assert (release["epsilon"], release["delta"]) == (0.5, 1e-5)
    assert release["kind"] == "heuristic"
    # What is given away has noise, and is not what the ledger keeps.
    assert run("unlearn", "--verify", "--directory", "run", *MODEL, "--weights", "new.pt")[0] == 1
    # The budget is spent: the sample is removed, and nothing given away.
    before = Path("new.pt").read_bytes()
    message = refused(*command, "--resume", "--forget", "5", "--output", "new.pt", status=1)
    assert "budget" in message
    assert Path("new.pt").read_bytes() == before
    status, out, _ = run("unlearn", "--verify", "--directory", "run", "--json")
    assert json.loads(out)["removed"] == [3, 5]


def test_a_model_without_weights_is_pointed_out(capsys):
    note = "no --weights: the model as own_problem.py:build makes it\n"
    command = ["unlearn", *MODEL, *DATA, *DECAY, "--forget", "3", "--output", "new.pt"]
    parts = ["--methods", "none", "--candidate", "mine=net.pt", "--forget", "3", "--no-relearn"]
    evaluate = ["evaluate", *MODEL, *DATA, *DECAY, *parts]
    for one in (command, evaluate):
        assert main(one) == 0
        assert capsys.readouterr().err.count(note) == 1
        assert main([*one, "--quiet"]) == 0
        assert note not in capsys.readouterr().err
        assert main([*one, *WEIGHTS]) == 0
        assert note not in capsys.readouterr().err
    assert main([*RUN, *WEIGHTS, *DECAY, "--forget", "3"]) == 0
    assert main([*RUN, "--resume", "--forget", "5"]) == 0  # the weights are those on record
    assert note not in capsys.readouterr().err


def test_a_release_says_what_is_written(run, problem):
    command = ["unlearn", *MODEL, *DATA, *WEIGHTS, *DECAY, "--forget", "3", "--output", "new.pt"]
    privacy = [*STRENGTH, "--delta", "1e-5", "--set", "lipschitz=2", "--set", "hessian_lipschitz=1"]
    x, y = problem.train
    stays = [i for i in range(60) if i != 3]

    def loss():
        model = problem.build()
        model.load_state_dict(weights("new.pt"))
        return cross_entropy(model(x[stays]), y[stays]).item()

    status, out, err = run(*command, *privacy, "--epsilon", "1")
    assert status == 0
    line = re.search(r"mean loss of retained samples (\S+) -> (\S+) as written \(on 59\)", out)
    assert float(line[2]) == pytest.approx(loss(), rel=1e-3)
    assert float(line[2]) > 10 * float(line[1])
    assert "warning: the noise for epsilon=1, delta=1e-05" in err
    status, out, err = run(*command, *privacy, "--epsilon", "1e15", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)["retained_loss"]
    assert found["n"] == 59
    assert found["after"] == pytest.approx(loss(), rel=1e-9)
    assert json.loads(run(*command, "--json")[1])["retained_loss"] is None


PRIVATE = ["--epsilon", "0.5", "--delta", "1e-5", "--set", "lipschitz=2"]
PRIVATE += ["--set", "hessian_lipschitz=1"]
RUN = ["unlearn", *MODEL, *DATA, "--directory", "run"]


def kinds():
    lines = Path("run/ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["kind"] for line in lines]


def test_a_patch_is_what_the_request_changes(run, refused, problem):
    """Applied to the weights before it gives those that --output has."""
    unlearn_ = ["unlearn", *MODEL, *DATA, *DECAY]
    first = [*unlearn_, *WEIGHTS, "--forget", "3,17", "--patch", "a.safetensors", "--json"]
    status, out, err = run(*first, "--output", "new.pt")
    assert status == 0, err
    assert json.loads(out)["patch"] == "a.safetensors"
    model = torch.nn.Linear(4, 3).double()
    model.load_state_dict(torch.load("net.pt", weights_only=True))
    assert WeightPatch.load("a.safetensors").apply(model)
    for name, tensor in torch.load("new.pt", weights_only=True).items():
        assert torch.equal(tensor, model.state_dict()[name])
    status, out, err = run(*unlearn_, *WEIGHTS, "--forget", "3", "--patch", "b.safetensors")
    assert status == 0, err
    assert "patch         b.safetensors" in out
    assert "--patch needs --forget" in refused(
        "unlearn", *MODEL, *DATA, "--directory", "x", "--resume", "--output", "n.pt", "--patch",
        "c.safetensors",
    )  # fmt: skip
    release = ["--epsilon", "1", "--delta", "1e-5", "--output", "n.pt"]
    assert "--patch has no noise" in refused(*first, *release)
    assert "does not go with --estimate" in refused(*first, "--estimate")


def test_weights_are_written_after_a_removal_without_output(run, refused):
    status, out, err = run(*RUN, *WEIGHTS, *DECAY, *STRENGTH, "--forget", "3,17", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["output"] is None
    before = Path("run/ledger.jsonl").read_bytes()
    write = [*RUN, "--resume", "--output", "new.pt"]
    status, out, err = run(*write, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["ids"], found["result"], found["release"]) == ([], None, None)
    assert (found["n_removed"], found["output"]) == (2, "new.pt")
    verify = ["unlearn", "--verify", "--directory", "run", *MODEL, "--weights", "new.pt"]
    assert run(*verify)[0] == 0
    status, out, _ = run(*write)
    assert status == 0
    assert "2 of 60 samples removed" in out
    assert "written to    new.pt" in out
    assert "--note goes into the ledger" in refused(*write, "--note", "again")
    assert "got ''" in refused(*write, "--forget", "")  # a variable that was not set
    assert Path("run/ledger.jsonl").read_bytes() == before


def test_what_nothing_was_removed_from_is_not_written(run, refused):
    taken_back = ["--set", "update=gradient", "--set", "learning_rate=1e4", "--set", "max_drop=0.0"]
    assert run(*RUN, *WEIGHTS, *taken_back, "--set", "retries=0", "--forget", "0-19")[0] == 1
    message = refused(*RUN, "--resume", "--output", "new.pt")
    assert "this ledger has no removal yet" in message
    assert not Path("new.pt").exists()


def test_pending_samples_are_named_when_weights_are_written(run):
    assert run(*RUN, *WEIGHTS, *DECAY, "--set", "max_drop=0.0", "--forget", "3")[0] == 0
    path = Path("run/ledger.jsonl")
    # The guard of another request takes it back: its samples count as retained.
    from lcodec_ext.unlearning import Unlearner

    build, load = (load_object(f"own_problem.py:{name}", "--model") for name in ("build", "load"))
    parts = load()
    with Unlearner.resume("run", build(), parts["train"], parts["loss_fn"]) as stream:
        harmful = stream.settings.replace(
            update="gradient",
            learning_rate=1e4,
            output_damping=0.0,
            retries=0,
            weight_decay=0.0,
        )
        stream._given = dataclasses.replace(stream._given, settings=harmful)
        with pytest.warns(UserWarning, match="was taken back"):
            stream.remove(range(10, 30))
        assert stream.pending
    before = path.read_bytes()
    status, out, err = run(*RUN, "--resume", "--output", "new.pt", "--json")
    assert status == 0
    assert "removal of 20 samples back earlier" in err
    assert json.loads(out)["pending"] == list(range(10, 30))
    assert path.read_bytes() == before


def test_a_release_is_written_later_and_paid_for_once_more_if_it_was_lost(run, refused):
    budget = ["--epsilon-budget", "1", "--delta-budget", "2e-5"]
    assert run(*RUN, *WEIGHTS, *DECAY, *PRIVATE, *budget, "--forget", "3")[0] == 0
    assert kinds() == ["start", "remove"]
    write = [*RUN, "--resume", "--output", "new.pt", "--note", "to the archive"]
    status, out, err = run(*write, "--json")
    assert (status, err.count("\n")) == (0, 1)
    assert "the noise for epsilon=0.5" in err
    assert kinds() == ["start", "remove", "release"]
    first, release = weights("new.pt"), json.loads(out)["release"]
    assert (release["epsilon"], release["kind"]) == (0.5, "heuristic")
    status, out, err = run(*write, "--json")
    assert status == 0
    assert "these weights were released once before; what was released is not kept" in err
    assert "one more release" in json.loads(out)["warnings"][1]
    assert not torch.equal(first["weight"], weights("new.pt")["weight"])
    last = json.loads(Path("run/ledger.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["record"]["note"] == "to the archive"
    n_releases = 2
    while run(*write)[0] == 0:  # they add up to less than their sum
        n_releases += 1
        assert n_releases < 8
    written = Path("new.pt").read_bytes()
    assert "budget" in refused(*write, status=1)
    assert kinds() == ["start", "remove"] + n_releases * ["release"]
    assert Path("new.pt").read_bytes() == written


def without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)


def failing_writer(monkeypatch):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


@pytest.mark.parametrize(
    ("output", "before", "message"),
    [
        ("new.safetensors", without_safetensors, "needs safetensors: pip install safetensors"),
        ("new.pt", failing_writer, "new.pt cannot be written: OSError: [Errno 28] No space left"),
        ("new.pt", lambda _: Path("new.pt").mkdir(), "new.pt is a folder; expected the name of a"),
    ],
)
def test_what_cannot_be_written_costs_nothing(refused, run, monkeypatch, output, before, message):
    with monkeypatch.context() as patch:
        before(patch)
        first = [*RUN, *WEIGHTS, *DECAY, *PRIVATE, "--forget", "3", "--output", output]
        assert message in refused(*first)
        assert not Path("run").exists()
    assert run(*RUN, *WEIGHTS, *DECAY, *PRIVATE, "--forget", "3")[0] == 0
    with monkeypatch.context() as patch:
        if not (Path("new.pt").exists() or Path("new.pt.part").exists()):
            before(patch)
        for more in ([], ["--forget", "5"]):
            assert message in refused(*RUN, "--resume", "--output", output, *more)
    assert kinds() == ["start", "remove"]
    assert not Path(f"{output}.part").is_file()


def test_infinity_is_a_setting(run):
    command = ["unlearn", *MODEL, *DATA, *WEIGHTS, *DECAY, *PRIVATE, "--forget", "3", "--json"]
    status, out, _ = run(*command, "--set", "radius=inf", "--output", "new.pt")
    assert status == 0
    assert json.loads(out)["result"]["settings"]["radius"] == "inf"


def test_a_ledger_that_was_begun_is_pointed_out(capsys):
    data = ["--data", "own_problem.py:concave"]
    status = main(["unlearn", *MODEL, *data, "--forget", "1", "--directory", "run", "--damping=0"])
    err = capsys.readouterr().err
    assert status == 1
    assert "indefinite" in err
    assert "run has the start of a ledger now" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("3", [3]),
        ("3,17, 20-22", [3, 17, 20, 21, 22]),
        ("5 3,3-5", [3, 4, 5]),
        ("@ids.txt", [1, 2, 9]),
        ("ids.json", [4, 7]),
        ("@ids.json", [4, 7]),
    ],
)
def test_requests(text, ids):
    Path("ids.txt").write_text("9\n1-2\n", encoding="utf-8")
    Path("ids.json").write_text("[7, 4]", encoding="utf-8")
    assert parse_ids(text) == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--forget 3-1", "expected numbers and ranges, as 3,17,20-40; got '3-1'"),
        ("--forget x", "got 'x'"),
        ("--forget -1", "--forget"),
        ("--forget @none.txt", "none.txt does not exist"),
        ("--forget bad.json", "must be a list of integers"),
        ("--forget 60", "--forget names sample 60; train has the numbers 0 to 59"),
        ("--forget 0-59", "leave at least one"),
        ("--forget 1 --set dampin=1", "is it 'damping'?"),
        ("--forget 1 --set damping", "--set must be KEY=VALUE; got 'damping'"),
        ("--forget 1 --damping 1 --set damping=2", "damping is given already"),
        ("--forget 1 --set dtype=int8", "--set dtype must be float32 or float64; got 'int8'"),
        ("--forget 1 --set steps=0", "steps must be an integer >= 1; got 0"),
        ("--forget 1 --selection none.json", "must be the JSON of UnitSelection.to_dict()"),
        ("--forget 1 --selection some", "selection must be one of"),
        ("--forget 1 --resume", "--resume needs --directory"),
        ("--forget 1 --head a", "--head belongs to --verify"),
        ("", "--forget or --forget-group is needed"),
        ("--forget-group u1", "--data own_problem.py:load must give 'groups'"),
        ("--forget-group @none.txt", "none.txt does not exist"),
        ("--forget-group bad.json", "bad.json must be a list of integers or strings"),
        ("--forget-group ,", "--forget-group , names no group"),
        ("--verify --directory a --forget-group u1", "--forget-group does not go with --verify"),
        ("--resume --directory a", "a has no ledger to --resume"),
        ("--verify", "--verify needs --directory"),
        ("--verify --directory a --forget 1", "--forget does not go with --verify"),
        ("--verify --directory a", "needs both --model and --weights"),
    ],
)
def test_requests_that_cannot_be(refused, options, message):
    Path("bad.json").write_text("[1, 2.5]", encoding="utf-8")
    output = [] if "--verify" in options else ["--output", "new.pt"]
    assert message in refused("unlearn", *MODEL, *DATA, *output, *options.split())


def test_what_would_not_be_kept(refused):
    message = refused("unlearn", *MODEL, *DATA, "--forget", "1")
    assert "--output or --directory is needed" in message
    message = refused("unlearn", *MODEL, *DATA, "--forget", "1", "--directory", "a", "--resume")
    assert "a has no ledger to --resume" in message
    assert "no ledger" in refused("unlearn", "--verify", "--directory", "a")
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model own_problem.py:nothing", "--model must return a torch.nn.Module"),
        (
            "--model own_problem.py:build",
            "build must give 'train'; it gives none of the parts",
        ),
        ("--data own_problem.py:nothing", "must return a dict, or an object, with some of train"),
        ("--data own_problem.py:misspelt", "gives 'trian'; the parts are train, test"),
        ("--data own_problem.py:broken", "own_problem.py:broken() raised RuntimeError: no such"),
        ("--data own_problem.py:none", "has no 'none'; it defines build"),
        ("--weights none.pt", "--weights: none.pt does not exist"),
        ("--weights own_problem.py", "must be a file ending in .pt or .pth or .safetensors"),
        ("--weights text.pt", "cannot be read as tensors: torch.save did not write it"),
        ("--weights empty.pt", "cannot be read as tensors"),
        ("--weights text.safetensors", "cannot be read as tensors"),
        ("--weights code.pt", "it holds pickled Python objects, perhaps a whole model"),
        ("--weights code.pt", "tensors alone: torch.save(model.state_dict(), file)\n"),
        ("--weights old.pt", "it holds pickled Python objects, perhaps a whole model"),
        ("--weights list.pt", "must hold a state_dict; got an object of type list"),
        ("--weights other.pt", "does not fit the model"),
    ],
)
def test_models_and_data_that_cannot_be(refused, options, message):
    Path("text.pt").write_text("no", encoding="utf-8")
    Path("text.safetensors").write_text("no", encoding="utf-8")
    Path("empty.pt").write_bytes(b"")
    torch.save(torch.nn.Linear(4, 3), "code.pt")
    torch.save(torch.nn.Linear(4, 3), "old.pt", _use_new_zipfile_serialization=False)
    torch.save([1], "list.pt")
    torch.save(torch.nn.Linear(5, 3).state_dict(), "other.pt")
    given = options.split()
    rest = [*MODEL, *DATA]
    if given[0] == "--model":
        rest = []
    elif given[0] == "--data":
        rest = MODEL
    assert message in refused("unlearn", *rest, *given, "--forget", "1", "--output", "new.pt")


@pytest.mark.parametrize(("key", "prefix"), [("state_dict", ""), ("model", "module._orig_mod.")])
def test_weights_in_a_checkpoint(run, refused, key, prefix):
    named = {prefix + name: tensor for name, tensor in weights("net.pt").items()}
    torch.save({"epoch": 3, key: named}, "checkpoint.pt")
    command = ["unlearn", *MODEL, *DATA, *DECAY, "--forget", "1", "--output"]
    assert run(*command, "a.pt", *WEIGHTS)[0] == 0
    status, _, err = run(*command, "b.pt", "--weights", "checkpoint.pt")
    assert (status, "left out" in err) == (0, False)
    assert weights("b.pt").keys() == weights("a.pt").keys()
    assert torch.equal(weights("a.pt")["weight"], weights("b.pt")["weight"])


def test_weights_of_more_than_the_model(run, refused):
    """The state of a Lightning module: its model has a prefix, and other modules have others."""
    named = {f"model.{name}": tensor for name, tensor in weights("net.pt").items()}
    torch.save({"state_dict": {**named, "metric.total": torch.zeros(())}}, "lit.ckpt")
    command = ["unlearn", *MODEL, *DATA, *DECAY, "--forget", "1", "--output", "a.pt", "--weights"]
    status, _, err = run(*command, "lit.ckpt")
    assert status == 0
    assert "lit.ckpt also holds 1 tensor that the model does not have, left out" in err
    assert "metric.total" in err
    average = {f"average.{name}": tensor for name, tensor in named.items()}
    torch.save({**named, **average}, "both.pt")
    assert "--weights both.pt holds the model 2 times, under 'model.' and" in refused(
        *command, "both.pt"
    )


def test_presets_are_those_of_the_package():
    assert set(PRESETS) == set(KNOWN_PRESETS)


# ---------------------------------------------------------------------------------------------
# evaluate and report


def test_evaluate_and_report(run):
    parts = ["--data", "own_problem.py:objects"]
    evaluate = ["evaluate", *MODEL, *WEIGHTS, *parts, *DECAY, "--forget", "3,17,20-22"]
    unlearn_ = ["unlearn", *MODEL, *WEIGHTS, *DATA, *DECAY, "--forget", "3,17,20-22"]
    assert run(*unlearn_, "--directory", "run", "--output", "new.pt")[0] == 0
    status, out, err = run(
        *evaluate,
        "--methods",
        "recommended",
        "--candidate",
        "mine=new.pt",
        "--no-relearn",
        "--output",
        "evaluation.json",
        "--json",
    )
    assert status == 0, err
    found = json.loads(out)
    methods = {method["name"]: method for method in found["methods"]}
    assert list(methods) == ["no-op", "retrained", "recommended", "mine"]
    assert (found["n_forget"], found["n_retain"], found["n_test"]) == (5, 55, 30)
    # One step for a twelfth of the samples, the same by either way.
    closed = {name: method["gap_closed"]["js_forget"] for name, method in methods.items()}
    assert closed["recommended"] > 0.6
    assert closed["mine"] == pytest.approx(closed["recommended"], rel=1e-3)
    status, out, err = run("report", "run", "evaluation.json", "--output", "report", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["summary"]
    for file in ("report.md", "report.json", "methods.csv", "requests.csv"):
        assert str(Path("report", file)) in found["files"]
        assert Path("report", file).is_file()


def test_evaluate_with_retrained_weights(run, refused, problem):
    keep = [i for i in range(60) if i not in problem.wrong]
    for k in range(3):
        model = problem.fit((problem.x[keep], problem.y[keep]), k + 1)
        torch.save(model.state_dict(), f"r{k}.pt")
    evaluate = ["evaluate", *MODEL, *WEIGHTS, *DATA, *DECAY, "--forget", "3,17,20-22"]
    status, out, err = run(
        *evaluate,
        "--retrained",
        "r0.pt",
        "r1.pt",
        "r2.pt",
        "--methods",
        "none",
        "--candidate",
        "same=r0.pt",
        "--no-relearn",
    )
    assert status == 0, err
    assert out.startswith("Evaluation: 5 samples removed, 55 retained, 30 for the test; 3 retr")
    assert "same" in out
    none = ["--methods", "none", "--candidate", "same=r0.pt", "--no-relearn"]
    status, out, err = run(*evaluate, "--retrained", "r0.pt", "r1.pt", *none)
    assert (status, err) == (0, "")
    assert "; 2 retrained models" in out
    assert "closed" not in out


def test_evaluate_whole_groups(run, refused, monkeypatch):
    calls = []

    def record(*arguments, **options):
        calls.append(options)
        return unlearn(*arguments, **options)

    monkeypatch.setattr(methods, "unlearn", record)
    evaluate = ["evaluate", *MODEL, *WEIGHTS, *DECAY, "--methods", "recommended", "--no-relearn"]
    users = ["--data", "own_problem.py:with_users"]
    status, out, err = run(*evaluate, *users, "--forget-group", "user 3", "--json")
    assert status == 0, err
    assert json.loads(out)["n_forget"] == 5
    (options,) = calls
    assert options["groups"] is None  # without validation samples they would have no effect
    users = ["--data", "own_problem.py:with_users_and_validation"]
    status, out, err = run(*evaluate, *users, "--forget-group", "user 3", "--json")
    assert status == 0, err
    groups = calls[-1]["groups"]
    assert [groups.ids[k] for k in groups.members] == [
        f"user {k % 12}" for k in range(60) if k % 12 != 3
    ]
    message = "one of --forget and --forget-group is needed"
    assert message in refused(*evaluate, *users)
    assert message in refused(*evaluate, *users, "--forget", "1", "--forget-group", "user 3")
    assert "must give 'groups'" in refused(*evaluate, *DATA, "--forget-group", "user 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods L-BFGZ", "--methods names 'L-BFGZ'; expected some of recommended"),
        ("--methods none", "leaves nothing to evaluate"),
        ("--candidate a", "--candidate must be NAME=FILE; got 'a'"),
        ("--candidate a=r.pt --candidate a=s.pt", "names 'a' twice"),
        ("--candidate a=r.pt", "--candidate a: r.pt does not exist"),
        ("--candidate paper=net.pt", "has the name of a method"),
        ("--n-retrain -1", "expected an integer >= 0; got '-1'"),
        ("--output a.csv", "expected a name ending in .json; got 'a.csv'"),
        ("--forget 99", "train has the numbers 0 to 59"),
    ],
)
def test_evaluations_that_cannot_be(refused, options, message):
    command = ["evaluate", *MODEL, *WEIGHTS, *DATA, "--forget", "3", *options.split()]
    assert message in refused(*command)


def test_evaluate_without_retrained_models(run, problem, monkeypatch):
    command = ["evaluate", *MODEL, "--data", "own_problem.py:objects", "--forget", "3"]
    command += ["--methods", "fine-tune SGD", "--no-relearn"]
    status, out, err = run(*command, "--n-retrain", "0")
    assert status == 0
    assert "retrain'" not in err
    assert out.startswith("Evaluation: 1 sample removed, 59 retained")
    assert "Without retrained models" in out
    assert "; 1 retrained model\n" in run(*command, "--n-retrain", "1")[1]
    monkeypatch.delattr(problem.Parts, "retrain")
    status, again, err = run(*command)
    assert status == 0
    assert "gives no 'retrain', and there is no --retrained" in err
    assert again.splitlines()[-1] == out.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--forget", "3"], "deleting 1 sample ..."),
        (["--forget", "3,4"], "deleting 2 samples ..."),
        (["--forget-group", "user 1"], "deleting 1 group ..."),
        (["--forget", "3", "--forget-group", "user 1,user 2"], "1 sample and 2 groups ..."),
    ],
)
def test_one_thing_is_not_several(capsys, options, said):
    users = ["--data", "own_problem.py:with_users"]
    status = main(["unlearn", *MODEL, *WEIGHTS, *users, *DECAY, *options, "--output", "new.pt"])
    out, err = capsys.readouterr()
    assert status == 0
    assert said in err
    assert not re.search(r"\b1 [a-z]+s\b", out + err), out + err


def test_reports_that_cannot_be(refused):
    assert "none does not exist" in refused("report", "none", "--output", "report")
    message = refused("report", "own_problem.py", "--output", "report")
    assert "is neither a folder nor a .json file" in message
    Path("empty").mkdir()
    assert "ledger.jsonl" in refused("report", "empty", "--output", "report")
    Path("other.json").write_text("{}", encoding="utf-8")
    assert "other.json" in refused("report", "other.json", "--output", "report")
    assert not Path("report").exists()


# ---------------------------------------------------------------------------------------------
# The guide


def test_examples_of_the_guide(run):
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# problem.py\n.*?)```", text, re.DOTALL)
    Path("problem.py").write_text(code, encoding="utf-8")
    runpy.run_path("problem.py", run_name="__main__")
    commands = re.findall(r"^lcodec-ext ((?:unlearn|evaluate|report) -?.*)$", text, re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        status, out, err = run(*command.split())
        assert (status, err) == (0, ""), command
        assert out
    assert Path("report/report.md").is_file()


def test_an_estimate_deletes_nothing(run, refused):
    command = ["unlearn", *MODEL, *DATA, *WEIGHTS, *DECAY, "--estimate"]
    status, out, err = run(*command, "--forget", "3,17", "--directory", "run", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["ids"] == [3, 17]
    assert found["estimate"]["passes"]["gradients"] == {"gradient": 2}
    assert not Path("run").exists()
    status, out, _ = run(*command, "--forget", "3", "--max-seconds", "1000")
    assert status == 0
    assert "total" in out
    assert "memory" in out
    assert "--forget-group is needed" in refused(*command)
    assert "--output does not go with --estimate" in refused(
        *command, "--forget", "3", "--output", "new.pt"
    )
    assert "--estimate does not go with --verify" in refused(
        "unlearn", "--verify", "--directory", "run", "--estimate"
    )
