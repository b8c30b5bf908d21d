"""Time an older version of the package and this one in turns, and compare their answers.

    python benchmarks/versions.py OLD [--cases NAME ...] [--rounds N] [--output FILE]

OLD is a folder in which the older version is installed:

    pip install --no-deps --target OLD FOLDER_OF_ITS_SOURCE

In every round each version runs each case in a process of its own, in changing order. Seconds are
CPU time of one thread; cases about threads take wall-clock time, with as many threads as CPUs.
Times are medians of the rounds, and the ratio is that of the medians. The answers of both must have
the same bits.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import environment
import numpy as np
from results import SCHEMA
from run import save

Make = Callable[[np.random.Generator], Callable[[], Any]]
VERSIONS = ("before", "after")


class Case(NamedTuple):
    title: str
    make: Make
    calls: int = 1
    threads: bool = False


def steps(n: int, p: int, most: int) -> Make:
    """FOCI on a table of which three columns tell about y."""

    def make(rng: np.random.Generator) -> Callable[[], Any]:
        from lcodec_ext import foci

        X = rng.normal(size=(n, p))
        y = X[:, 3 % p] * X[:, 1] + X[:, 0] + rng.normal(size=n)
        return lambda: foci(X, y, max_features=most, stop=False).cumulative

    return make


def graph(rng: np.random.Generator) -> Callable[[], Any]:
    from lcodec_ext import dependence_graph

    X = rng.normal(size=(1000, 200))
    X[:, 100:] += X[:, :100]
    return lambda: dependence_graph(X).weights


def coefficient(n: int, d: int) -> Make:
    def make(rng: np.random.Generator) -> Callable[[], Any]:
        from lcodec_ext import codec

        X = rng.normal(size=(n, d))
        y = X[:, 0] * X[:, -1] + rng.normal(size=n)
        return lambda: codec(y, X)

    return make


def neighbors(rng: np.random.Generator) -> Callable[[], Any]:
    from lcodec_ext import nearest_neighbors

    X = rng.normal(size=(2000, 1000))
    return lambda: nearest_neighbors(X)


def from_threads(rng: np.random.Generator) -> Callable[[], Any]:
    from lcodec_ext import codec

    tables = rng.normal(size=(64, 2000, 3))

    def call() -> list[float]:
        with ThreadPoolExecutor(8) as pool:
            return [*pool.map(lambda each: codec(each[:, 0], each[:, 1:]), tables)]

    return call


CASES = {
    "first_step": Case("FOCI, first step, n = 1,000, p = 10,000", steps(1000, 10_000, 1)),
    "four_steps": Case("FOCI, four steps, n = 1,000, p = 10,000", steps(1000, 10_000, 4)),
    "long_columns": Case("FOCI, two steps, n = 50,000, p = 100", steps(50_000, 100, 2)),
    "many_columns": Case("codec, n = 1,000, 500 columns", coefficient(1000, 500)),
    "neighbors": Case("nearest neighbours, n = 2,000, 1,000 columns", neighbors),
    "small_codec": Case("codec, n = 50, 1,000 calls", coefficient(50, 1), 1000),
    "small_foci": Case("FOCI, n = 50, p = 5, 300 calls", steps(50, 5, 5), 300),
    "graph": Case("dependence graph, n = 1,000, p = 200", graph),
    "short_call": Case("FOCI, n = 300, p = 20, 100 calls", steps(300, 20, 3), 100, threads=True),
    "python_threads": Case("codec, n = 2,000, eight Python threads", from_threads, threads=True),
}


def one(name: str) -> dict[str, Any]:
    """Seconds and answer of a case, in this process."""
    import lcodec_ext

    case = CASES[name]
    call = case.make(np.random.default_rng(0))
    digest = hashlib.sha256(np.ascontiguousarray(call()).tobytes()).hexdigest()
    clock = time.perf_counter if case.threads else time.process_time
    started = clock()
    for _ in range(case.calls):
        call()
    found: dict[str, Any] = {"seconds": clock() - started, "answer": digest[:16]}
    return found | {
        "version": lcodec_ext.__version__,
        "folder": str(Path(lcodec_ext.__file__).parent),
    }


def measured(name: str, folder: Path | None) -> dict[str, Any]:
    """The same in a process of its own, with the version in the folder or the installed one."""
    threads = environment.cores() if CASES[name].threads else 1
    count = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LCODEC_NUM_THREADS")
    variables = os.environ | dict.fromkeys(count, str(threads))
    variables.pop("PYTHONPATH", None)
    if folder is not None:
        variables["PYTHONPATH"] = str(folder)
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if folder is not None and folder not in Path(found["folder"]).parents:
        raise SystemExit(f"{folder} has no lcodec_ext: {found['folder']} was imported")
    return found


def compared(name: str, old: Path, rounds: int) -> dict[str, Any]:
    """Both versions in turns."""
    samples: dict[str, list[dict[str, Any]]] = {version: [] for version in VERSIONS}
    folders = dict(zip(VERSIONS, (old, None), strict=True))
    for k in range(rounds):
        for version in VERSIONS[:: -1 if k % 2 else 1]:
            samples[version].append(measured(name, folders[version]))
    if len({each["answer"] for found in samples.values() for each in found}) != 1:
        raise SystemExit(f"{name}: the answers differ: {samples}")
    seconds = {v: [round(each["seconds"], 5) for each in samples[v]] for v in VERSIONS}
    before, after = (statistics.median(seconds[version]) for version in VERSIONS)
    return {
        "title": CASES[name].title,
        "clock": "wall" if CASES[name].threads else "CPU",
        "versions": {version: samples[version][0]["version"] for version in VERSIONS},
        "samples": seconds,
        "before": before,
        "after": after,
        "ratio": round(after / before, 3),
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| case | before | after | after / before |", "|---|--:|--:|--:|"]
    for case in cases.values():
        before, after = (f"{1000 * case[version]:,.0f} ms" for version in VERSIONS)
        clock = ", wall-clock" if case["clock"] == "wall" else ""
        lines.append(f"| {case['title']}{clock} | {before} | {after} | {case['ratio']:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", nargs="?", type=Path)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/versions.json"
    )
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one(options.one)))
        return 0
    if options.old is None:
        parser.error("name the folder of the older version")
    result: dict[str, Any] = {"schema": SCHEMA, **environment.heading(), "cases": {}}
    for name in options.cases:
        result["cases"][name] = compared(name, options.old.resolve(), options.rounds)
        save(result, options.output)
        print(table({name: result["cases"][name]}).splitlines()[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
