"""Ranks for tests: processes that stay, joined by gloo, and that run functions of test modules.

With NCCL each has a GPU of its own; benchmarks/gpu.py asks for that.

A test asks for groups of two and of three ranks by the fixture `ranks` (conftest.py). A rank that
fails returns its error. A test that kills ranks starts its own by `Processes`.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
import types
from datetime import timedelta
from pathlib import Path

TIMEOUT = 120  # seconds that a rank waits for another


class Failure(Exception):
    """What a rank raised: its type's name, its message, and the traceback as text."""

    def __init__(self, kind, message, trace):
        super().__init__(kind, message, trace)
        self.kind, self.message, self.trace = kind, message, trace

    def __str__(self):
        return f"{self.kind}: {self.message}\n{self.trace}"


class Processes:
    """`size` processes in one world."""

    def __init__(self, size, timeout=TIMEOUT, backend="gloo"):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="lcodec-ranks-")
        meeting = str(Path(self._folder.name) / "meeting")
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (rank, size, meeting, timeout, backend, theirs, list(sys.path))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function, *arguments, size=None):
        """Begin function(rank, size, group, *arguments) on the first `size` ranks.

        The function must be at the top of a test module; `arguments` are pickled.
        """
        size = len(self._pipes) if size is None else size
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments, size))
        self._asked = size

    def finish(self, timeout=TIMEOUT):
        """What each rank returned, a Failure for one that raised or died."""
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} has not answered for {timeout} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(Failure("died", f"rank {rank}", ""))
        return answers[: self._asked]

    def run(self, function, *arguments, size=None):
        """What each rank returned; raises what the first failing one raised."""
        self.start(function, *arguments, size=size)
        answers = self.finish()
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer
        return answers

    def failures(self, function, *arguments, size=None):
        """The Failure of each rank, all of which must fail."""
        self.start(function, *arguments, size=size)
        answers = self.finish()
        assert all(isinstance(answer, Failure) for answer in answers), answers
        return answers

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


class Group:
    """The first `size` ranks of processes that stay."""

    def __init__(self, processes, size):
        self._processes, self.size = processes, size

    def run(self, function, *arguments):
        return self._processes.run(function, *arguments, size=self.size)

    def failures(self, function, *arguments):
        return self._processes.failures(function, *arguments, size=self.size)


def _serve(rank, size, meeting, timeout, backend, pipe, path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    sys.path[:] = path
    # pytest names test modules so, whose folder is on no path
    tests = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parent)]
    sys.modules["tests"] = tests
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LCODEC_NUM_THREADS"] = "1"
    wait = timedelta(seconds=timeout)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, f"file://{meeting}", timeout=wait, rank=rank, world_size=size)
    groups = {
        k: dist.new_group(range(k), timeout=timedelta(seconds=timeout)) for k in range(1, size)
    }
    groups[size] = dist.group.WORLD
    while True:
        try:
            module, name, arguments, wanted = pipe.recv()
        except EOFError:
            return
        if rank >= wanted:
            pipe.send(None)
            continue
        try:
            function = getattr(importlib.import_module(module), name)
            answer = function(rank, wanted, groups[wanted], *arguments)
        except BaseException as error:  # told to the test
            answer = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(answer)
