"""Measure streams of deletion requests: memory, time per request, and killed processes.

    python benchmarks/stream.py [--requests 1000] [--kills 10] [--output FILE]

One sample after the other is removed from a logistic regression and a small network on
scikit-learn's digits, with ledger and checkpoints. The first stream runs in one go. The second runs
in processes that are killed in requests drawn at random; after each, another process resumes. Both
streams must end in the same bits.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment

KINDS = ("logistic regression", "MLP 64-32-10")
LEAST_KILLS = 3  # in the midst of a stream, for its claim
POLL = 0.005  # seconds between looks at the ledger
OPTIONS: dict[str, Any] = {"n_curvature": 256, "n_monitor": 256}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10, help="of the second stream of each model")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/stream.json"
    )
    options = parser.parse_args(arguments)
    if not options.worker and not LEAST_KILLS <= options.kills <= options.requests // 2:
        parser.error(f"--kills must be from {LEAST_KILLS} to half of the number of requests")
    environment.limit_threads(1)
    if options.worker:
        work(*options.worker, options.requests)
        return 0
    result: dict[str, Any] = {
        "schema": "stream-1",
        **environment.heading(),
        "settings": {"requests": options.requests, "options": OPTIONS, "threads": 1},
        "streams": [],
    }
    for kind in KINDS:
        result["streams"].append(measure(kind, options.requests, options.kills))
        print(json.dumps(result["streams"][-1], indent=1), flush=True)
    result["claims"] = claims(result["streams"])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


def claims(streams: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for stream in streams:
        kills = sum(1 <= lines <= stream["requests"] for lines in stream["killed_after_lines"])
        growth = stream["growth_mib"]
        for name, value, met in (
            (f"kills, at least {LEAST_KILLS}", kills, kills >= LEAST_KILLS),
            (
                "same bits after kills",
                stream["same_bits"],
                stream["same_bits"] and kills >= LEAST_KILLS,
            ),
            ("growth of memory in MiB after a tenth of the stream", growth, growth < 16),
            ("ledger and checkpoints verify", stream["verified"], stream["verified"]),
        ):
            found.append({"quantity": f"{stream['model']}: {name}", "value": value, "met": met})
    return found


def problem(kind: str) -> tuple[Any, tuple[Any, Any], float]:
    """Return a trained model, its training samples and weight decay; equal in every process."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn.functional import cross_entropy

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    decay = 1e-2 if kind == KINDS[0] else 1e-3
    model = (
        nn.Linear(64, 10)
        if kind == KINDS[0]
        else nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=decay)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y), decay


def opened(kind: str, folder: str) -> Any:
    from torch.nn.functional import cross_entropy

    from lcodec_ext.unlearning import Unlearner

    model, train, decay = problem(kind)
    if (Path(folder) / "ledger.jsonl").exists():
        return Unlearner.resume(folder, model, train, cross_entropy)
    return Unlearner(model, train, cross_entropy, directory=folder, weight_decay=decay, **OPTIONS)


def work(kind: str, folder: str, requests: int) -> None:
    """Remove the samples 0, 1, 2, ... that are still there; print a line for each."""
    unlearner = opened(kind, folder)
    for sample in range(len(unlearner.ledger) - 1, requests):
        begin = time.perf_counter()
        result = unlearner.remove(sample)
        seconds = time.perf_counter() - begin
        line = {"sample": sample, "seconds": seconds, "mib": rss_mib()}
        line["skipped"] = bool(result.skipped)
        print(json.dumps(line), flush=True)


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def n_lines(ledger: Path) -> int:
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def kill(command: Sequence[str], ledger: Path, after: int, wait: float) -> bool:
    """Kill a worker a while after its ledger has this many lines; False if it ended before that.

    By then the worker has written a line itself, so it is killed at work and not while it starts.
    """
    after = max(after, n_lines(ledger) + 1)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and n_lines(ledger) < after:
            time.sleep(POLL)
        time.sleep(wait)
        process.kill()
        status = process.wait()
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a worker ended with status {status}")
    return status != 0


def interrupted(
    command: Sequence[str], folder: str, requests: int, kills: int, typical: float
) -> list[int]:
    """Run a stream by workers that are killed; return the ledger's lines at each kill.

    `typical` is the time of a request. Each worker is killed at a random moment within it.
    """
    rng, killed, ledger = random.Random(0), [], Path(folder) / "ledger.jsonl"
    last = requests * 9 // 10  # so that the stream is not over before the kill
    for after in sorted(rng.sample(range(1, last + 1), kills)):
        if kill(command, ledger, after, rng.random() * typical):
            killed.append(n_lines(ledger))
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return killed


def measure(kind: str, requests: int, kills: int) -> dict[str, Any]:
    from lcodec_ext._torch.states import state_hash, state_of
    from lcodec_ext.unlearning import verify_ledger

    command = [sys.executable, __file__, "--requests", str(requests), "--worker", kind]
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as broken:
        begin = time.perf_counter()
        done = subprocess.run([*command, whole], stdout=subprocess.PIPE, check=True, text=True)
        total = time.perf_counter() - begin
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        typical = statistics.median(line["seconds"] for line in lines)
        killed = interrupted([*command, broken], broken, requests, kills, typical)
        ends = []
        for folder in (whole, broken):
            unlearner = opened(kind, folder)
            ends.append(state_hash(state_of(unlearner.model)))
            n_removed = len(unlearner.removed)
            unlearner.close()
        _, train, _ = problem(kind)
        verified = verify_ledger(broken, model=unlearner.model, train=train).ok
        disk = sum(f.stat().st_size for f in Path(whole).rglob("*") if f.is_file())
    tenth = max(1, len(lines) // 10)
    return {
        "model": kind,
        "requests": requests,
        "removed": n_removed,
        "skipped": sum(line["skipped"] for line in lines),
        "seconds_total": total,
        "seconds_first_tenth": statistics.median(line["seconds"] for line in lines[:tenth]),
        "seconds_last_tenth": statistics.median(line["seconds"] for line in lines[-tenth:]),
        "mib_after_a_tenth": lines[tenth - 1]["mib"],
        "mib_at_the_end": lines[-1]["mib"],
        "growth_mib": lines[-1]["mib"] - lines[tenth - 1]["mib"],
        "disk_mib": disk / 2**20,
        "killed_after_lines": killed,
        "same_bits": ends[0] == ends[1],
        "verified": verified,
    }


if __name__ == "__main__":
    raise SystemExit(main())
