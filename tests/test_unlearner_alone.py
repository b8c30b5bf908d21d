"""Threads and processes on one ledger: one request at a time, and nothing of another one's lost."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.nn.functional import cross_entropy

import unlearner_contest
from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext.unlearning.stream import Unlearner, unlearner, verify_ledger
from lcodec_ext.unlearning.stream.checkpoints import LedgerError
from unlearner_process import N, begin_or_resume, make_data, make_model, step


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """A cheap step in the place of `unlearn`, which calls what is in `first` before."""
    first = []

    def cheap(model, forget, *args, **options):
        for each in first:
            each(forget)
        return step(model, forget, *args, **options)

    monkeypatch.setattr(unlearner, "unlearn", cheap)
    return first


def start(directory=None, **options):
    options = {"seed": 4, "keep": 2, "calibrate": False, **options}
    return Unlearner(make_model(), make_data(), cross_entropy, directory=directory, **options)


def resume(directory, **options):
    return Unlearner.resume(directory, make_model(), make_data(), cross_entropy, **options)


def bits(stream):
    return state_hash(state_of(stream.model))


def in_child(action):
    """What an action returns, or raises, in a forked child.

    It computes on one thread: PyTorch's others are the parent's, and OpenMP would wait for them.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            told = repr(action())
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        told = file.read().decode()
    os.waitpid(pid, 0)
    return told


# ---------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("on_disk", [True, False])
def test_requests_of_threads_take_turns(tmp_path, stand_in, on_disk):
    stand_in.append(lambda forget: time.sleep(0.002))
    with start(tmp_path if on_disk else None) as stream:
        own = [list(range(0, 12, 2)), list(range(1, 12, 2))]
        threads = [
            threading.Thread(target=lambda numbers=numbers: [stream.remove(i) for i in numbers])
            for numbers in own
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert set(stream.removed) == set(range(12))
        assert len(stream.ledger) == 13
        found, order = bits(stream), stream.removed
        if on_disk:
            assert verify_ledger(tmp_path, stream.model, make_data()).ok
    with start() as other:  # each request began where the one before had ended
        for number in order:
            other.remove(number)
        assert bits(other) == found


def test_a_request_waits_while_anothers_entry_is_on_its_way_to_the_disk(tmp_path, monkeypatch):
    writing, sync = threading.Event(), os.fsync

    def slow(descriptor):
        sync(descriptor)
        own = os.fstat(descriptor).st_ino == (tmp_path / "ledger.jsonl").stat().st_ino
        if own and threading.current_thread() is thread:
            writing.set()
            time.sleep(0.2)

    with start(tmp_path) as stream:
        thread = threading.Thread(target=stream.remove, args=[3])
        monkeypatch.setattr(os, "fsync", slow)
        thread.start()
        assert writing.wait(10)
        stream.remove(4)
        thread.join()
        assert stream.removed == (3, 4)


def test_a_request_within_a_request_is_refused(stand_in):
    stream = start()
    stand_in.append(lambda forget: stream.rollback(0))
    with pytest.raises(RuntimeError, match="amid a request, and another one came from within it"):
        stream.remove(3)
    stand_in.clear()
    stream.remove(3)
    assert stream.removed == (3,)


def test_close_waits_for_another_threads_request(tmp_path, stand_in):
    stream, begun = start(tmp_path), threading.Event()
    stand_in.append(lambda forget: (begun.set(), time.sleep(0.1)))
    thread = threading.Thread(target=stream.remove, args=[3])
    thread.start()
    begun.wait()
    stream.close()
    assert stream.removed == (3,)
    thread.join()
    with pytest.raises(RuntimeError, match="closed"):
        stream.remove(4)


def test_closed_from_within_a_request_nothing_is_written(tmp_path, stand_in):
    stream = start(tmp_path)
    stand_in.append(lambda forget: stream.close())
    with pytest.raises(RuntimeError, match="closed before the end of the request"):
        stream.remove(3)
    with resume(tmp_path) as stream:
        assert stream.removed == ()


# ---------------------------------------------------------------------------------------------
# Processes


@pytest.mark.parametrize("request_of", ["remove", "rollback"])
def test_a_child_writes_nothing(tmp_path, request_of):
    with start(tmp_path) as stream:
        stream.remove(1)
        stream.remove(2)
        actions = {"remove": lambda: stream.remove(3), "rollback": stream.rollback}
        told = in_child(actions[request_of])
        assert told.startswith("RuntimeError: directory")
        assert f"of process {os.getpid()}, and this is its child" in told
        assert in_child(lambda: stream.removed) == "(1, 2)"  # it may look
        stream.remove(4)
        assert verify_ledger(tmp_path, stream.model, make_data()).ok
    with resume(tmp_path) as stream:
        assert stream.removed == (1, 2, 4)


def test_a_child_of_a_thread_amid_a_request_can_use_a_stream_in_memory(stand_in):
    stream, told = start(), []
    stand_in.append(lambda forget: told or told.append(in_child(lambda: alone(stream))))

    def alone(stream):
        stand_in.clear()
        stream.remove(5)
        return stream.removed

    stream.remove(3)
    assert told == ["(5,)"]
    assert stream.removed == (3,)


def test_the_lock_ends_with_close_though_a_child_lives(tmp_path):
    stream = start(tmp_path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)  # until the parent lets go
        os._exit(0)
    try:
        with pytest.raises(RuntimeError, match="in use by an Unlearner"):
            resume(tmp_path)
        stream.close()
        with resume(tmp_path) as again:
            again.remove(3)
    finally:
        os.close(write)
        os.waitpid(pid, 0)
        os.close(read)


def test_a_child_that_ends_or_closes_leaves_the_lock(tmp_path):
    with start(tmp_path) as stream:
        assert in_child(stream.close) == "None"
        with pytest.raises(RuntimeError, match="in use by an Unlearner"):
            resume(tmp_path)
        stream.remove(3)


# ---------------------------------------------------------------------------------------------
# Directories


@pytest.mark.parametrize("during", [False, True])
def test_what_another_one_wrote_stays(tmp_path, stand_in, during):
    """Without a lock: another process commits before, or during, a request that is refused."""
    stream = start(tmp_path, lock=False)
    stream.remove(1)

    def other(forget):
        stand_in.clear()
        with resume(tmp_path, lock=False) as second:
            second.remove(7)
            other.bits = bits(second)

    if during:
        stand_in.append(other)
    else:
        other(None)
        stand_in.append(lambda forget: pytest.fail("the step was taken in vain"))
    with pytest.raises(LedgerError, match="changed from outside: .* Nothing was written"):
        stream.remove(3)
    with pytest.raises(LedgerError, match="changed from outside"):
        stream.rollback()
    assert stream.removed == (1,)
    assert verify_ledger(tmp_path, train=make_data()).ok
    with resume(tmp_path) as again:
        assert again.removed == (1, 7)
        assert bits(again) == other.bits


def test_a_directory_that_is_gone_is_told_before_the_step(tmp_path, stand_in):
    stream = start(tmp_path / "one")
    os.rename(tmp_path / "one", tmp_path / "two")
    stand_in.append(lambda forget: pytest.fail("the step was taken in vain"))
    with pytest.raises(LedgerError, match="it has 0 bytes"):
        stream.remove(3)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def flock(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RuntimeError, match="has no file locks .*pass lock=False"):
        start(tmp_path)
    with start(tmp_path, lock=False) as stream:
        stream.remove(3)
    with pytest.raises(RuntimeError, match="has no file locks"):
        resume(tmp_path)
    with resume(tmp_path, lock=False) as stream:
        assert stream.removed == (3,)


def test_a_relative_directory_is_that_of_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with start("stream") as stream:
        monkeypatch.chdir(tmp_path / "elsewhere")
        stream.remove(3)
        stream.rollback()
        assert stream.ledger[1].record["ids"] == [3]
        assert not os.listdir(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with resume("stream") as stream:
        monkeypatch.chdir(tmp_path / "elsewhere")
        stream.remove(4)
    assert verify_ledger(tmp_path / "stream", train=make_data()).ok


@pytest.mark.parametrize("seed", range(3))
def test_threads_and_processes_contest_a_directory(tmp_path, seed):
    """What was acknowledged is there; what is there is what one request after the other gives."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, unlearner_contest.__file__, str(tmp_path), str(seed), "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    acknowledged = [int(each) for each in done.stdout.split()]  # and nothing that was raised
    with begin_or_resume(tmp_path) as stream:
        order = stream.removed
        assert set(acknowledged) <= set(order)
        assert len(acknowledged) == len(set(acknowledged))
        assert verify_ledger(tmp_path, stream.model, make_data()).ok
        found = bits(stream)
    with begin_or_resume(None) as other:
        for number in order:
            other.remove(number)
        assert bits(other) == found
    assert len(order) <= N // 2
