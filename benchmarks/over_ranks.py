"""What a selection over a process group gains, and what its steps send.

    python benchmarks/over_ranks.py [--quick] [--repeats K] [--output FILE]

Every process has one thread. One process with all columns takes turns with two that have half of
them each; seconds are those of the slower one, by the clock, for the whole call. The machine needs
two idle cores. What a step sends is counted where it is handed to torch.distributed.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import numpy as np
from numpy.typing import NDArray
from results import SCHEMA
from run import save

LEAST = 1.7  # times that two processes must be faster
CHUNK = 500  # columns drawn from one seed
STEPS = 8


def shard(n: int, p: int, rank: int, size: int) -> tuple[NDArray, NDArray]:
    """A rank's columns of a table, and y, which depends on columns of all ranks."""

    def chunk(k: int) -> NDArray:
        drawn = np.random.default_rng([7, k]).normal(size=(CHUNK, n))
        return drawn.T.astype(np.float32)

    chunks = p // CHUNK
    own = range(rank * chunks // size, (rank + 1) * chunks // size)
    first, middle = chunk(0), chunk(chunks // 2)
    noise = np.random.default_rng(7).normal(size=n)
    y = first[:, 0] * middle[:, 0] + np.sin(first[:, 1]) + middle[:, 1] + 0.1 * noise
    return np.concatenate([chunk(k) for k in own], axis=1), y


def serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    """Select, or talk only, as often as asked."""
    import torch
    import torch.distributed as dist

    from lcodec_ext import foci
    from lcodec_ext._torch import group as talking

    made = []

    class Counted(talking.Ranks):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    talking.Ranks = Counted  # type: ignore[misc]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    ranks = talking.Ranks(dist.group.WORLD, "benchmark")
    group = dist.group.WORLD if size > 1 else None
    while (asked := pipe.recv()) is not None:
        n, p, steps = asked
        if steps:
            X, y = shard(n, p, rank, size)
            dist.barrier()
            begun, busy = time.perf_counter(), time.process_time()
            found = foci(X, y, stop=False, max_features=steps, group=group)
            told = (time.perf_counter() - begun, time.process_time() - busy)
            pipe.send((*told, found.ordering.tolist(), made[-1].bytes_sent))
            continue
        column = np.zeros(n + 1, dtype=np.float32)
        dist.barrier()
        begun = time.perf_counter()
        for k in range(100):
            ranks.gather(np.zeros(4, dtype=np.int64))
            ranks.broadcast_array(column, k % size)
        pipe.send((time.perf_counter() - begun) / 100)
    dist.destroy_process_group()


class Processes:
    """`size` processes of one group, each with one thread."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, size, meeting, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, n: int, p: int, steps: int) -> list[Any]:
        """What each rank answers: seconds, CPU seconds, columns, bytes; or only seconds."""
        for pipe in self._pipes:
            pipe.send((n, p, steps))
        return [pipe.recv() for pipe in self._pipes]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def point(one: Processes, two: Processes, n: int, p: int, repeats: int) -> dict:
    """Medians of one process and of two, in turns; the first turn warms up."""
    names = {"one": one, "two": two}
    samples: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        columns = []
        for name, processes in names.items():
            found = processes.ask(n, p, STEPS)
            columns += [each[2] for each in found]
            if turn:
                samples[name].append(round(max(each[0] for each in found), 4))
                busy[name].append(round(max(each[1] for each in found), 4))
        assert all(each == columns[0] for each in columns)
    seconds = {name: statistics.median(taken) for name, taken in samples.items()}
    return {
        "n": n,
        "p": p,
        "steps": STEPS,
        "samples": samples,
        "seconds": seconds,
        "cpu_seconds": {name: statistics.median(taken) for name, taken in busy.items()},
        "ratio": round(seconds["one"] / seconds["two"], 2),
    }


def model(large: dict, small: dict, exchange: float) -> dict:
    """What a step takes, on any number of columns and for each.

    From one process with many columns, which has all but the exchange, and from two with few. On R
    ranks a step is expected to take the fixed part and the time of p / R columns; of two with many
    columns the record has both.
    """
    many, few = large["seconds"]["one"] / STEPS, small["seconds"]["two"] / STEPS
    column = (many + exchange - few) / (large["p"] - small["p"] / 2)
    fixed = few - column * small["p"] / 2
    return {
        "n": large["n"],
        "milliseconds_of_a_step": round(1e3 * fixed, 3),
        "microseconds_of_a_column": round(1e6 * column, 3),
        "milliseconds_of_the_exchange": round(1e3 * exchange, 3),
        "columns_that_take_as_long": round(fixed / column),
        "expected_ratio": round(many / (fixed + column * large["p"] / 2), 2),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = environment.ROOT / "benchmarks/results/distributed.json"
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    sizes = [(2000, 20_000), (2000, 1000), (500, 20_000), (500, 1000)]
    if options.quick:
        sizes = [(200, 2000), (200, 1000)]
    result = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {"quick": options.quick, "threads": 1, "repeats": options.repeats},
    }
    one, two = Processes(1), Processes(2)
    try:
        points = [point(one, two, *size, options.repeats) for size in sizes]
        sent = [two.ask(2000, 2000, steps)[0][3] for steps in (2, 3)]
        exchange = {n: statistics.median(two.ask(n, 0, 0)) for n in (200, 500, 2000, 200_000)}
    finally:
        one.stop()
        two.stop()
    ratio = points[0]["ratio"]
    result["points"] = points
    pairs = [points[k : k + 2] for k in range(0, len(points), 2)]
    result["model"] = [model(*pair, exchange[pair[0]["n"]]) for pair in pairs]
    # the last step broadcasts nothing
    result["bytes_a_step"] = {"n": 2000, "measured": sent[1] - sent[0], "counted": 32 + 4 * 2001}
    result["microseconds_of_an_exchange"] = {n: round(1e6 * s, 1) for n, s in exchange.items()}
    result["claims"] = [
        {"quantity": "ratio", "at_least": LEAST, "value": ratio, "met": ratio >= LEAST}
    ]
    save(result, options.output)
    for each in points:
        print({name: each[name] for name in ("n", "p", "steps", "seconds", "cpu_seconds", "ratio")})
    for each in result["model"]:
        print(each)
    print(result["bytes_a_step"], result["microseconds_of_an_exchange"])
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
