import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext.unlearning.stream import checkpoints, ledger
from lcodec_ext.unlearning.stream.checkpoints import (
    Checkpoints,
    LedgerError,
    checkpoint_name,
    with_state,
)
from lcodec_ext.unlearning.stream.history import History
from lcodec_ext.unlearning.stream.ledger import FIRST, FORMAT, Ledger


def write(path, n=4):
    written = Ledger(path)
    for k in range(n):
        kind = "start" if k == 0 else "remove"
        written.append(kind, {"ids": [k, k + 1], "loss": k / 3}, {"time": f"2026-01-0{k + 1}"})
    return written


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


# ---------------------------------------------------------------------------------------------
# The chain


def test_lines_are_canonical_json_sealed_by_the_line_before(path):
    write(path)
    previous = FIRST
    for number, line in enumerate(path.read_text().splitlines()):
        values = json.loads(line)
        sealed = values.pop("hash")
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        assert sealed == hashlib.sha256(canonical.encode()).hexdigest()
        assert values.pop("previous") == previous
        assert values.pop("number") == number
        assert values.keys() == {"kind", "record", "environment"}
        previous = sealed
    assert Ledger(path).head == previous


def test_a_ledger_in_memory_is_that_on_disk(path):
    on_disk, in_memory = write(path), write(None)
    assert list(on_disk) == list(in_memory) == list(Ledger(path))
    assert on_disk.head == in_memory.head
    assert [entry.number for entry in on_disk] == [0, 1, 2, 3]
    assert on_disk[-1] == on_disk[3] == on_disk[2:][1]
    with pytest.raises(IndexError):
        on_disk[4]


def test_records_take_what_measurements_are_made_of(path):
    record = {"a": np.float64(0.1), "b": np.int64(3), 1: (math.nan, -math.inf), "c": [None, True]}
    entry = Ledger(path).append("start", record, {})
    assert entry.record == {"a": 0.1, "b": 3, "1": ["nan", "-inf"], "c": [None, True]}
    assert Ledger(path)[0] == entry


def test_a_reopened_ledger_goes_on(path):
    write(path, 2)
    again = Ledger(path)
    again.append("remove", {"ids": [9]}, {})
    assert [entry.kind for entry in Ledger(path)] == ["start", "remove", "remove"]
    assert Ledger(path)[2].previous == Ledger(path)[1].hash


def history(n):
    """A ledger with the start of a stream on n samples, and what it amounts to."""
    written, so_far = Ledger(None), History()
    start = {"format": FORMAT, "keep": 5, "train": {"n": n}, "budget": None}
    so_far.add(written.append("start", start | counts(0, 0, FIRST), {}))
    return written, so_far


def counts(number, n_removed, sha256, n_pending=0):
    checkpoint = {"file": checkpoint_name(number), "sha256": sha256}
    return {"n_removed": n_removed, "n_pending": n_pending, "checkpoint": checkpoint}


@pytest.mark.timeout(30)  # a second for each; hours if each sample were looked up in a list
@pytest.mark.parametrize("n_skipped", [0, 100_000])
def test_a_large_request_takes_linear_time(n_skipped):
    n = 200_000
    written, so_far = history(n + 1)
    ids = list(range(n))
    record = {"ids": ids, "skipped": ids[:n_skipped], "hashes": ["a"] * n}
    record |= counts(1, n - n_skipped, "b" * 64, n_skipped)
    so_far.add(written.append("remove", record, {}))
    assert len(so_far.removed) == n - n_skipped
    assert len(so_far.pending) == n_skipped


def test_a_request_cannot_name_a_sample_twice():
    written, so_far = history(9)
    record = {"ids": [3, 4, 3], "skipped": [], "hashes": ["a", "b", "a"]}
    entry = written.append("remove", record | counts(1, 2, "b" * 64), {})
    with pytest.raises(LedgerError, match="line 2 .* removes sample 3, which is not retained"):
        so_far.add(entry)


# ---------------------------------------------------------------------------------------------
# What a killed process leaves, and what nobody may change


def test_a_last_line_cut_anywhere_is_dropped(path):
    write(path)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    expected = list(Ledger(path))[:3]
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        cut = Ledger(path)
        assert list(cut) == expected
        assert cut.torn == whole[start:end]
        cut.repair()
        assert path.read_bytes() == whole[:start]
    cut.append("remove", {"ids": [9]}, {})
    assert len(Ledger(path)) == 4


def test_a_last_line_that_lacks_only_its_end_is_completed(path):
    write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    found = Ledger(path)
    assert len(found) == 4
    assert found.torn == b""
    found.repair()
    assert path.read_bytes() == whole
    found.append("remove", {"ids": [9]}, {})
    assert len(Ledger(path)) == 5


def reseal(values):
    values = {key: value for key, value in values.items() if key != "hash"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return values | {"hash": hashlib.sha256(canonical.encode()).hexdigest()}


def dump(values):
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        {"number": 7},
        {"kind": "skip"},
        {"record": {"ids": [1], "loss": 1 / 3}},
        {"record": {"ids": [1, 2], "loss": 0.3333333333333334}},
        {"environment": {"time": "2025-01-02"}},
        {"previous": FIRST},
        {"hash": FIRST},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("sealed", [False, True])
def test_no_field_can_be_changed(path, change, number, sealed):
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    values = json.loads(lines[number]) | change
    lines[number] = dump(reseal(values) if sealed and "hash" not in change else values)
    path.write_bytes(b"".join(lines))
    if sealed and number == 3 and change.keys() <= {"kind", "record", "environment"}:
        # The last hash is another one: who noted it knows, and the file cannot.
        assert len(Ledger(path)) == 4
        return
    # If an entry is changed and sealed again, the next entry reveals it.
    line = number + 1
    if sealed and change.keys() <= {"kind", "record", "environment"}:
        line += 1
    with pytest.raises(LedgerError, match=f"line {line} of the ledger: "):
        Ledger(path)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], 2),
        (lambda lines: [*lines[:2], *lines[1:]], 3),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3),
        (lambda lines: [lines[0], lines[1][:-20] + b"\n", *lines[2:]], 2),
        (lambda lines: [lines[0], lines[1].replace(b",", b", ", 1), *lines[2:]], 2),
        (lambda lines: [lines[0], b"\xff\xfe\n", *lines[2:]], 2),
        (lambda lines: [lines[0], b"[]\n", *lines[2:]], 2),
        (lambda lines: [*lines, b"what is this\n"], 5),
        (lambda lines: [*lines[:3], lines[3].replace(b'"ids":[3', b'"ids":[5')[:-1]], 4),
    ],
)
def test_no_line_can_be_taken_out_moved_or_added(path, edit, line):
    write(path)
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(LedgerError, match=f"line {line} of the ledger: "):
        Ledger(path)


def test_an_entry_that_cannot_be_written_is_not_there(path, monkeypatch):
    written = write(path)
    before, head = path.read_bytes(), written.head

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            written.append("remove", {"ids": [9]}, {})
    assert path.read_bytes() == before
    assert (len(written), written.head) == (4, head)
    written.append("remove", {"ids": [9]}, {})
    assert len(Ledger(path)) == 5


def test_short_writes_are_completed(path, monkeypatch):
    actual = os.write
    monkeypatch.setattr(ledger.os, "write", lambda fd, data: actual(fd, data[:7]))
    written = write(path)
    assert list(Ledger(path)) == list(written)


def test_a_file_changed_from_outside_is_not_appended_to(path):
    written = write(path)
    write_anew = path.read_bytes()[:-10]
    path.write_bytes(write_anew)
    with pytest.raises(LedgerError, match="changed from outside"):
        written.append("remove", {"ids": [9]}, {})
    assert path.read_bytes() == write_anew


# ---------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).bfloat16()


def test_the_hash_is_of_names_types_shapes_and_bits(model):
    state = state_of(model)
    assert state_hash(state) == state_hash(dict(reversed(state.items())))
    weight = state["0.weight"]
    others = [
        state | {"0.weight": weight.T},
        state | {"0.weight": weight.view(torch.int16)},
        state | {"0.weight": weight + 2**-6},
        {key.replace("0", "2"): value for key, value in state.items()},
        {key: state[key] for key in list(state)[1:]},
        state | {"1.num_batches_tracked": torch.tensor(1)},
        state | {"1.num_batches_tracked": torch.tensor([0])},
    ]
    hashes = {state_hash(other) for other in [state, *others]}
    assert len(hashes) == 1 + len(others)
    zeros = [{"w": torch.tensor([zero])} for zero in (0.0, -0.0)]
    assert state_hash(zeros[0]) != state_hash(zeros[1])


def test_a_state_is_a_copy_that_any_model_of_the_kind_loads(model, tmp_path):
    state = state_of(model)
    folder = Checkpoints(tmp_path / "checkpoints")
    folder.write(checkpoint_name(3), state)
    with torch.no_grad():
        model[0].weight.zero_()
    assert state["0.weight"].any()
    found = folder.read("000003.pt", state_hash(state))
    assert state_hash(found) == state_hash(state)
    loaded = torch.load(tmp_path / "checkpoints" / "000003.pt", weights_only=True)
    model.load_state_dict(loaded)
    assert state_hash(state_of(model)) == state_hash(state)


def test_a_checkpoint_holds_no_more_than_its_tensors(tmp_path):
    flat = torch.zeros(1_000_000)
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(flat[:6].view(2, 3))
    Checkpoints(tmp_path / "checkpoints").write("000000.pt", state_of(layer))
    assert (tmp_path / "checkpoints" / "000000.pt").stat().st_size < 10_000


@pytest.mark.parametrize("place", ["folder", "resumed", "memory"])
def test_of_a_model_that_hardly_changes_the_changes_are_kept(tmp_path, place):
    frozen = {"base": torch.randn(1000), "mask": torch.ones(3, dtype=torch.bool)}
    states = [frozen | {"adapter": torch.full((100,), float(k))} for k in range(3)]
    states[2]["base"] = -frozen["base"]  # more than half
    folder = None if place == "memory" else tmp_path
    there = Checkpoints(folder)
    for number, state in enumerate(states):
        there.write(checkpoint_name(number), state)
        if place == "resumed":
            there = Checkpoints(folder)
    for number, state in enumerate(states):
        found = there.read(checkpoint_name(number), state_hash(state))
        assert state_hash(found) == state_hash(state)
        assert found.keys() == state.keys()
    if place == "memory":
        assert [len(kept) for kept in there._states.values()] == [3, 1, 3]
        return
    sizes = [(tmp_path / checkpoint_name(number)).stat().st_size for number in range(3)]
    assert sizes[1] < sizes[0] / 2 < sizes[2]
    with pytest.raises(LedgerError, match="000001.pt holds other tensors than the ledger says"):
        there.read("000001.pt", state_hash(states[0]))
    torch.save(states[2], tmp_path / "000000.pt")  # what the changes belong to counts
    with pytest.raises(LedgerError, match="000001.pt holds other tensors than the ledger says"):
        there.read("000001.pt", state_hash(states[1]))
    (tmp_path / "000000.pt").unlink()
    match = (
        "000001.pt has only what differs from the first one, and checkpoint 000000.pt is missing"
    )
    with pytest.raises(LedgerError, match=match):
        there.read("000001.pt", state_hash(states[1]))
    Checkpoints(tmp_path).write("000003.pt", states[1])  # the whole, where the first is gone
    Checkpoints(tmp_path).read("000003.pt", state_hash(states[1]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "checkpoint 000001.pt is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-200]), "cannot be read"),
        (lambda file: file.write_bytes(b""), "cannot be read"),
        (lambda file: torch.save([print], file), "cannot be read"),
        (lambda file: torch.save([1], file), "cannot be read"),
        (lambda file: torch.save({"w": torch.ones(2)}, file), "other tensors than the ledger says"),
    ],
)
def test_a_spoilt_checkpoint_is_refused(tmp_path, spoil, message):
    state = {"w": torch.zeros(2)}
    folder = Checkpoints(tmp_path)
    folder.write("000001.pt", state)
    spoil(tmp_path / "000001.pt")
    with pytest.raises(LedgerError, match=message):
        folder.read("000001.pt", state_hash(state))


def test_only_checkpoints_and_their_remains_are_deleted(tmp_path):
    folder = Checkpoints(tmp_path)
    for name in ("000001.pt", "000002.pt", "1000000.pt", "mine.pt", ".x.tmp"):
        (tmp_path / name).write_bytes(b"")
    for name in (".000003.pt.tmp", ".000003.pt.0a1b2c3d.tmp"):  # earlier versions wrote the first
        (tmp_path / name).write_bytes(b"")
    assert folder.names() == {"000001.pt", "000002.pt", "1000000.pt"}
    folder.keep_only({"000002.pt"})
    assert {file.name for file in tmp_path.iterdir()} == {"000002.pt", "mine.pt", ".x.tmp"}


def test_a_model_of_another_kind_is_refused(model):
    state = state_of(model)
    restored = with_state(model, {key: torch.zeros_like(value) for key, value in state.items()})
    assert not restored[0].weight.any()
    assert model[0].weight.any()
    for other, message in (
        (model[0], "model has no '0.bias'"),
        (nn.Sequential(model[0], model[1], nn.Linear(2, 2)), "the checkpoint has no '2.bias'"),
        (nn.Sequential(nn.Linear(4, 2), model[1]), "its '0.weight' is torch.float32 of shape"),
        (nn.Sequential(nn.Linear(3, 2), model[1]), "its '0.weight' is torch.float32 of shape"),
    ):
        with pytest.raises(ValueError, match=f"model is not the one that was saved: {message}"):
            with_state(other, state)


def test_a_state_that_is_no_tensor_is_refused():
    class Other(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="'_extra_state' is of type dict"):
        state_of(Other(2, 2))


def test_a_directory_is_locked_until_its_lock_is_released_or_gone(tmp_path):
    lock = checkpoints.DirectoryLock(tmp_path)
    with pytest.raises(RuntimeError, match=rf"in use by an Unlearner \(process {os.getpid()}\)"):
        checkpoints.DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    second = checkpoints.DirectoryLock(tmp_path)
    del second
    checkpoints.DirectoryLock(tmp_path).release()
