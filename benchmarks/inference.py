"""What a test of dependence costs; how often it errs, and how often it finds what is there.

    python benchmarks/inference.py [--parts cost,simulation,given] [--quick] [--output FILE]

"cost": codec_test with 999 permutations beside what it must do at the least, a bare loop that draws
999 permutations and adds the minima of n pairs, and beside 999 calls of codec. Times are seconds of
CPU of one thread, in turns; the build must have LCODEC_INSTRUMENTS, as that of the Makefile has.
"simulation" and, given x, "given": shares of runs in which tests reject, and intervals cover
(`inference_levels.py`); docs/inference.png is their picture. A part that is not measured stays in
the file as it was.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import numpy as np
from inference_levels import figure, given, simulation
from results import SCHEMA, load
from run import save

from lcodec_ext import _core, codec, codec_test
from lcodec_ext.dependence.backends.resolve import HOST

PERMUTATIONS = 999
MOST, LEAST = 1.5, 50  # of the bare loop's time; of codec_test's, for as many calls of codec
FLOOR_NS = 4.5  # 3 to draw an element, 1.5 to add it: what the bare loop was expected to take


def samples(n: int) -> dict[str, tuple[Any, Any]]:
    """Responses and columns: continuous in one and in three columns, and tied."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n, 3))
    y = rng.normal(size=n)
    return {
        "one column": (y, z[:, 0]),
        "three columns": (y, z),
        "ten values": (y, np.floor(10 * rng.random(n))),
        "binary": ((y > 0).astype(float), (z[:, 0] > 0).astype(float)),
    }


def bare_loop(y: Any, n: int) -> Callable[[], Any]:
    """The permutations and sums alone, of pairs that are as far apart as neighbours are."""
    rank = HOST["cpu"].ranks(y)[0].astype(np.int32)
    other = np.random.default_rng(1).permutation(n).astype(np.int32)
    return lambda: _core.dependence.bare_permutations(rank, other, 0, PERMUTATIONS)


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of this thread for each call, in every round once; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begun = time.thread_time()
            call()
            taken[name].append(time.thread_time() - begun)
    return {name: seconds[1:] for name, seconds in taken.items()}


def cost_of(kind: str, n: int, y: Any, z: Any, rounds: int) -> dict[str, Any]:
    taken = in_turns(
        {
            "codec_test": lambda: codec_test(
                y, z, n_permutations=PERMUTATIONS, confidence_level=None, seed=0
            ),
            "bare loop": bare_loop(y, n),
            "codec": lambda: codec(y, z),
        },
        rounds,
    )
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    ours = seconds["codec_test"]
    elements = n * PERMUTATIONS
    found = {
        "kind": kind,
        "n": n,
        "samples": taken,
        "seconds": seconds,
        "ns_an_element": {
            name: seconds[name] / elements * 1e9 for name in ("codec_test", "bare loop")
        },
        "over_bare_loop": ours / seconds["bare loop"],
        "codec_calls_over_test": PERMUTATIONS * seconds["codec"] / ours,
    }
    if kind == "one column":  # the others are for comparison
        over, calls = found["over_bare_loop"], found["codec_calls_over_test"]
        found["claims"] = [
            {"quantity": "over_bare_loop", "at_most": MOST, "value": over, "met": over <= MOST},
            {
                "quantity": "codec_calls_over_test",
                "at_least": LEAST,
                "value": calls,
                "met": calls >= LEAST,
            },
        ]
    return found


def cost(quick: bool) -> dict[str, Any]:
    points = []
    for n, rounds in ((200, 1),) if quick else ((1000, 31), (100_000, 5)):
        for kind, (y, z) in samples(n).items():
            points.append(cost_of(kind, n, y, z, rounds))
            point = points[-1]
            print(
                f"{kind}, n = {n:,}: {point['seconds']['codec_test'] * 1e3:.1f} ms, "
                f"{point['over_bare_loop']:.2f} of the bare loop, {PERMUTATIONS} calls of codec "
                f"take {point['codec_calls_over_test']:.0f} times as long",
                flush=True,
            )
    return {"permutations": PERMUTATIONS, "floor_ns_an_element": FLOOR_NS, "points": points}


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "cost": cost,
    "simulation": simulation,
    "given": given,
}


def begun(previous: Path, quick: bool) -> dict[str, Any]:
    """The head of a result file, with the parts of an earlier one."""
    kept = load(previous)["inference"] if previous.exists() else {}
    return {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {"quick": quick, "threads": 1, "clock": "CPU seconds of one thread"},
        "cases": {},
        "inference": kept,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, with commas")
    parser.add_argument("--quick", action="store_true", help="a small size: does everything run?")
    default = Path(__file__).parent / "results/inference.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts takes {', '.join(PARTS)}; got {', '.join(unknown)}")
    result = begun(options.output, options.quick)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for part in parts:
            found = PARTS[part](options.quick)
            result["inference"][part] = {"commit": result["commit"]} | found
            save(result, options.output)
    if {"simulation", "given"} <= set(result["inference"]) and not options.quick:
        points = [result["inference"][part]["points"] for part in ("simulation", "given")]
        picture = environment.ROOT / "docs/inference.png"
        figure([*points[0], *points[1]]).savefig(picture, dpi=110)
    claims = [
        claim
        for part in result["inference"].values()
        for point in part.get("points", ())
        for claim in point.get("claims", ())
    ]
    for claim in claims:
        if not claim["met"]:
            print("not met:", json.dumps(claim))
    return 0 if all(claim["met"] for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
