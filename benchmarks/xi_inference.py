"""What a small call of xi costs, how often its tests err, and how often its intervals cover.

    python benchmarks/xi_inference.py [--parts cost,level,coverage] [--quick] [--output FILE]

Times are microseconds of CPU of one thread for a call: the median over batches of calls, which take
turns with SciPy's. A part that is not measured stays in the file as it was.
"""

import argparse
import json
import math
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
from results import SCHEMA
from run import save

from lcodec_ext import xi, xi_matrix, xi_test

MOST = 15  # microseconds that a call on 50 rows may take
ROWS = 50
ALPHAS = (0.05, 0.01)


def columns(kind: str, n: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Independent x and y: "continuous", "tied y" (4 values), "tied x" (5), "both tied"."""
    x, y = rng.normal(size=(2, n))
    if kind in ("tied x", "both tied"):
        x = np.floor(5 * rng.random(n))
    if kind in ("tied y", "both tied"):
        y = np.floor(4 * rng.random(n))
    return x, y


KINDS = ("continuous", "tied y", "tied x", "both tied")


def in_turns(calls: dict[str, Callable[[], Any]], batch: int, rounds: int) -> dict[str, float]:
    """Median microseconds of a call; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begun = time.thread_time()
            for _ in range(batch):
                call()
            taken[name].append((time.thread_time() - begun) / batch * 1e6)
    return {name: round(statistics.median(values[1:]), 2) for name, values in taken.items()}


def cost(quick: bool) -> dict[str, Any]:
    from scipy.stats import chatterjeexi

    batch, rounds = (20, 3) if quick else (200, 41)
    found: dict[str, Any] = {"rows": ROWS, "at_most_us": MOST, "calls": {}}
    for kind in KINDS:
        x, y = columns(kind, ROWS, np.random.default_rng(0))
        us = in_turns(
            {
                "xi": lambda x=x, y=y: xi(x, y),
                "xi_test": lambda x=x, y=y: xi_test(x, y),
                "scipy chatterjeexi": lambda x=x, y=y: chatterjeexi(x, y),
            },
            batch,
            rounds,
        )
        found["calls"][kind] = us
        print(f"{kind:12}", us)
    n, p = (200, 10) if quick else (1000, 100)
    X = np.random.default_rng(0).normal(size=(n, p))
    us = in_turns({"matrix": lambda: xi_matrix(X)}, 1, 3)["matrix"]
    found["matrix"] = {"n": n, "columns": p, "us_a_pair": round(us / (p * p), 2)}
    x, y = X[:, 0].copy(), X[:, 1].copy()
    us = in_turns({"test": lambda: xi_test(x, y, method="permutation", seed=0)}, 1, 5)["test"]
    found["permutation"] = {"n": n, "permutations": 999, "us": us}
    print("matrix", found["matrix"], "permutation", found["permutation"])
    return found


def level(quick: bool) -> list[dict[str, Any]]:
    """Shares of p-values up to alpha under independence, with their standard errors."""
    runs = 100 if quick else 4000
    rows = []
    for n in (20, 50, 200):
        for kind in KINDS:
            for method in ("asymptotic", "permutation"):
                if method == "permutation" and n > 50:
                    continue
                pvalues = []
                for run in range(runs):
                    x, y = columns(kind, n, np.random.default_rng([n, run]))
                    if np.ptp(y) > 0:
                        result = xi_test(
                            x,
                            y,
                            method=method,
                            seed=run,
                            n_permutations=199 if method == "permutation" else None,
                        )
                        pvalues.append(result.pvalue)
                shares = {alpha: float((np.array(pvalues) <= alpha).mean()) for alpha in ALPHAS}
                rows.append(
                    {"n": n, "kind": kind, "method": method, "runs": len(pvalues)}
                    | {f"share_{alpha}": round(share, 4) for alpha, share in shares.items()}
                    | {
                        f"error_{alpha}": round(math.sqrt(alpha * (1 - alpha) / runs), 4)
                        for alpha in ALPHAS
                    }
                )
                print(rows[-1])
    return rows


def model(kind: str, n: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """Dependent x and y."""
    x, e = rng.normal(size=(2, n))
    if kind == "independent":
        return x, e
    if kind == "linear":
        return x, x + e
    if kind == "little noise":
        return x, x + 0.2 * e
    if kind == "sine":
        return x, np.sin(2 * x) + 0.5 * e
    if kind == "binary y":
        return x, (x + e > 0).astype(float)
    if kind == "rounded y":
        return x, np.round(x + e)
    values = np.floor(5 * rng.random(n))
    return values, (values + 2 * e if kind == "tied x" else np.round(values + 2 * e))


MODELS = (
    "independent",
    "linear",
    "little noise",
    "sine",
    "binary y",
    "rounded y",
    "tied x",
    "both tied",
)


def coverage(quick: bool) -> list[dict[str, Any]]:
    """How often the 95% interval holds the xi of the population, the mean over 10^6 rows."""
    runs = 20 if quick else 1000
    rows = []
    for kind in MODELS:
        rng = np.random.default_rng(7)
        large = 20_000 if quick else 250_000
        truth = float(np.mean([xi(*model(kind, large, rng)) for _ in range(4)]))
        for n in (50, 200, 1000):
            covered, widths = 0, []
            for run in range(runs):
                x, y = model(kind, n, np.random.default_rng([n, run]))
                result = xi_test(x, y, confidence_level=0.95, seed=run)
                low, high = result.confidence_interval or (math.nan, math.nan)
                covered += low <= truth <= high
                widths.append(high - low)
            rows.append(
                {
                    "kind": kind,
                    "n": n,
                    "runs": runs,
                    "xi": round(truth, 4),
                    "covered": covered / runs,
                    "error": round(math.sqrt(0.95 * 0.05 / runs), 4),
                    "mean_width": round(statistics.fmean(widths), 4),
                }
            )
            print(rows[-1])
    return rows


PARTS = {"cost": cost, "level": level, "coverage": coverage}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = environment.ROOT / "benchmarks/results/xi_inference.json"
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, with commas")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args(arguments)
    names = options.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    old = json.loads(options.output.read_text()) if options.output.exists() else {}
    result = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {"quick": options.quick, "threads": 1},
    } | {part: old[part] for part in PARTS if part in old and part not in names}
    warnings.simplefilter("error")
    for name in names:
        result[name] = PARTS[name](options.quick)
        save(result, options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
