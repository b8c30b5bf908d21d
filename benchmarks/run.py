"""Time the package and its peers side by side in one process, and record it as JSON.

    python benchmarks/run.py [--quick] [--cases foci_wide,xi] [--device cuda] [--output FILE]

Every implementation runs once to warm up, and these answers are compared. Then all take turns, one
sample each, until `--repeats` rounds are done. An implementation whose samples add up to `--budget`
seconds sits out the remaining rounds. Medians are reported, and all samples recorded. The exit
status is 1 if an answer that had to agree did not, or if a case could not be run. The file is
written after every case, so a run that is stopped leaves the cases that it finished.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment
from results import OURS, SCHEMA

if TYPE_CHECKING:
    from cases import Case, Claim, Peer, Size


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--cases", help="names, separated by commas (default: all)")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--repeats", type=int, help="samples of each implementation (default: 7; quick: 1)"
    )
    parser.add_argument(
        "--budget", type=float, default=20, help="seconds of samples for each (default: 20)"
    )
    parser.add_argument("--threads", type=int, default=environment.cores(), help="for everything")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="device of the package's data; each device has its own cases (default: cpu)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=environment.ROOT / "benchmarks/output/latest.json",
        help="result file (default: benchmarks/output/latest.json)",
    )
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 7)
    environment.limit_threads(options.threads)
    # with NumPy and all else, now that the threads are settled
    if options.device == "cuda":
        from gpu_cases import CASES
    else:
        from cases import CASES

    if options.list:
        for case in CASES.values():
            print(f"{case.name:18} {case.title}")
        return 0
    names = options.cases.split(",") if options.cases else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {
            "quick": options.quick,
            "threads": options.threads,
            "repeats": options.repeats,
            "budget_seconds": options.budget,
        },
        "cases": {},
        "left_out": {},
        "broken": {},
    }
    if options.device == "cuda":
        import accelerator

        result["machine"]["device"] = accelerator.description()
        result["versions"] |= accelerator.versions()
        result["rates"] = accelerator.rates()._asdict()
    if result["load_before"] > 0.5:
        print(f"note: other work is running here (load {result['load_before']})")
    for name in names:
        try:
            if needed := missing(CASES[name]):
                result["left_out"][name] = f"no usable {needed}"
                print(f"\n{name} left out: no usable {needed}")
            else:
                result["cases"][name] = run_case(CASES[name], options)
        except Exception as error:  # the other cases may be right
            traceback.print_exc()
            result["broken"][name] = f"{type(error).__name__}: {error}"[:400]
        save(result, options.output)
    print(f"\nwrote {options.output}")
    wrong = disagreements(result)
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result file atomically: a reader, also after an interruption, finds a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def missing(case: "Case") -> str | None:
    """The module that the case needs, if it is not installed."""
    return case.needs if case.needs and find_spec(case.needs) is None else None


def run_case(case: "Case", options: argparse.Namespace) -> dict[str, Any]:
    """Verify a case, then measure all its points."""
    case.verify(options.device)
    points = []
    for size in case.quick if options.quick else case.full:
        point = run_point(case, size, options)
        if not options.quick:
            point["claims"] = [judge(claim, point) for claim in case.claims]
        points.append(point)
        print_point(point)
    return {"sweep": case.sweep, "points": points}


def run_point(case: "Case", size: "Size", options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, compare answers, and time everything in turns."""
    import accelerator
    from cases import NoInstrumentsError, same_bits

    data = case.data(size)
    placed = accelerator.place(data, options.device)
    runs: dict[str, Callable[[], Any]] = {OURS: lambda: case.ours(placed, "auto")}
    results: dict[str, dict[str, Any]] = {OURS: {}}
    left_out: dict[str, str] = {}
    answer = runs[OURS]()
    for peer in case.peers:
        if not peer.fits(size):
            left_out[peer.name] = "takes too long or too much memory at this size"
            continue
        run, entry, expected = prepare(case, peer, data, placed, options, answer)
        try:
            theirs = run()
        except ImportError as error:
            left_out[peer.name] = f"no usable {error.name}"
            continue
        if peer.answers != "other":
            entry |= case.compare(expected, theirs, data)
        if peer.answers == "identical" and not same_bits(expected, theirs):
            entry |= {"agrees": False, "answer": "other bits"}
        runs[peer.name], results[peer.name] = run, entry
    samples = take_turns(runs, options.repeats, options.budget, options.device)
    for name, entry in results.items():
        entry["samples"] = samples[name]
        entry["seconds"] = statistics.median(samples[name]) * entry.get("factor", 1)
        entry["ratio"] = entry["seconds"] / results[OURS]["seconds"]
    seconds = results[OURS]["seconds"]
    metrics: dict[str, float] = {}
    try:
        metrics = case.metrics(size, seconds) if case.metrics else {}
    except NoInstrumentsError as error:
        left_out["metrics"] = str(error)
    return {
        "title": case.title.format(**size),
        "size": size,
        "results": results,
        "left_out": left_out,
        "metrics": metrics,
    }


def prepare(
    case: "Case",
    peer: "Peer",
    data: dict,
    placed: dict,
    options: argparse.Namespace,
    answer: Any,
) -> tuple[Callable[[], Any], dict[str, Any], Any]:
    """A peer's call, what to record of it, and the package's answer to the same task."""
    import accelerator
    from cases import first_columns

    entry: dict[str, Any] = {"answers": peer.answers}
    if peer.part is not None and peer.part < (p := data["X"].shape[1]):
        data = first_columns(data, peer.part)
        placed = accelerator.place(data, options.device)
        answer = case.ours(placed, "auto")
        entry |= {"measured_columns": peer.part, "factor": p / peer.part}
    given = placed if peer.on_device else data
    return lambda: peer.run(given, options.threads), entry, answer


def take_turns(
    runs: dict[str, Callable[[], Any]], repeats: int, budget: float, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each sample, until the device has finished; at least one per implementation."""
    import accelerator

    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(samples[name]) >= budget:
                continue
            gc.collect()
            accelerator.wake(device)
            start = time.perf_counter()
            run()
            accelerator.wait(device)
            samples[name].append(time.perf_counter() - start)
    return samples


def judge(claim: "Claim", point: dict[str, Any]) -> dict[str, Any]:
    """A claim and what was measured; "met" is None if its peer was left out."""
    entry = point["results"].get(claim.quantity)
    value = entry["ratio"] if entry else point["metrics"].get(claim.quantity)
    met = None if value is None else claim.at_least <= value <= claim.at_most
    below = claim.at_least == -float("inf")
    bound = {"at_most": claim.at_most} if below else {"at_least": claim.at_least}
    return {"quantity": claim.quantity, **bound, "value": value, "met": met}


def disagreements(result: dict[str, Any]) -> list[str]:
    """Peers that had to agree and did not, and cases that could not be run."""
    broken = [f"{name}: {error}" for name, error in result.get("broken", {}).items()]
    return broken + [
        f"{point['title']}: {name}: {entry['answer']}"
        for case in result["cases"].values()
        for point in case["points"]
        for name, entry in point["results"].items()
        if entry.get("answers") in ("identical", "asserted") and not entry["agrees"]
    ]


def print_point(point: dict[str, Any]) -> None:
    print(f"\n{point['title']}  {point['size']}")
    for name, entry in point["results"].items():
        seconds = f"{entry['seconds']:11.4g} s"
        ratio = "" if name == OURS else f"{entry['ratio']:9.1f} x"
        columns = entry.get("measured_columns")
        notes = [entry.get("answer", ""), f"from {columns} columns" if columns else ""]
        print(f"  {name:40} {seconds} {ratio}  {', '.join(filter(None, notes))}")
    for name, reason in point["left_out"].items():
        print(f"  {name:40} left out: {reason}")
    for name, value in point["metrics"].items():
        print(f"  {name:40} {value:11.4g}")
    for claim in point.get("claims", ()):
        verdict = {True: "met", False: "MISSED", None: "not measured"}[claim["met"]]
        bound = ", ".join(f"{k} {claim[k]:g}" for k in ("at_least", "at_most") if k in claim)
        print(f"  claim: {claim['quantity']}: {bound}: {verdict}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
