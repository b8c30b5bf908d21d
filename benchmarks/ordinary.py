"""Deletions by default from networks as people train them, one request at a time.

    python benchmarks/ordinary.py [--networks adamw gru ...] [--seeds 14 15 16 17] [--output FILE]
        [--cache FOLDER]

Five networks (`ordinary_models.py`) learn from four draws of their data; from each training five
requests are deleted, each from the trained network: two of users, two of random samples, one of
wrong labels, of 5 to 40 samples. An `Unlearner` gets validation samples, the users' ids and no
option. Each deletion is compared with three networks trained without the request (of the larger
data sets: without all five requests of a training, at most 4% of the samples).

What counts as harm is said in `harms`. Where a deletion did harm, it is asked for again with
warnings as errors: a ledger that gets a line then did silent harm. Settings were
chosen on other networks, and while these were looked at with seeds 0 to 2. Seeds 10 to 13 judged
earlier versions, and those from 14 on the present one.
A record that was stopped goes on with the trainings it lacks; trained networks are kept in the
cache.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import environment

if __name__ == "__main__":
    environment.limit_threads(1)


import torch
from ordinary_models import RECIPES, Data, Request, Task, fitted, task
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lcodec_ext.unlearning import Unlearner, UnlearnResult

RETRAINED = 3
FACTOR = 2.0  # of the retrained networks' mean
POINTS = 0.005  # of test accuracy
SEEDS = (14, 15, 16, 17)


# ---------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measured(model: nn.Module, forget: Data, retain: Data, test: Data) -> dict[str, Any]:
    """Losses of deleted, retained and test samples, and which test samples are told right."""
    losses = [float(cross_entropy(model(x), y)) for x, y in (forget, retain, test)]
    right = model(test[0]).argmax(1) == test[1]
    names = ("loss_forget", "loss_retain", "loss_test")
    return dict(zip(names, losses, strict=True)) | {"right": right}


def public(found: dict[str, Any]) -> dict[str, float]:
    """The same with the accuracy instead of single samples."""
    rest = {name: value for name, value in found.items() if name != "right"}
    return rest | {"accuracy_test": float(found["right"].double().mean())}


def change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """By how much accuracy changed, and the standard error of that: the samples are the same."""
    moved = after.double() - before.double()
    return float(moved.mean()), float(moved.std(correction=0)) / math.sqrt(len(moved))


def harms(point: dict[str, Any]) -> list[str]:
    """What harm a deletion did.

    over-forgotten: deleted samples lose more than twice what they do on average in networks that
        never saw them, more than in any of these, and more than twice what validation samples do.
        Wrong labels do not count: a network that is surer of the right ones rejects them.
    test: test accuracy fell by more than half a point.
    test, beyond chance: by more than that and two standard errors.
    retained: the mean loss of all retained samples rose by more than half and .02, and more than
        that of test samples fell.
    """
    before, after, found = point["before"], point["after"], []
    peers = [each["loss_forget"] for each in point["retrained"]]
    most = max(FACTOR * statistics.fmean(peers), *peers, FACTOR * point["loss_validation"])
    if after["loss_forget"] > most and point["kind"] != "wrong":
        found.append("over-forgotten")
    fall, error = -point["accuracy_change"], point["accuracy_change_error"]
    if fall > POINTS:
        found.append("test")
    if fall > POINTS + 2 * error:
        found.append("test, beyond chance")
    rise = after["loss_retain"] - before["loss_retain"]
    gained = max(0.0, before["loss_test"] - after["loss_test"])
    if not rise <= max(before["loss_retain"] / 2 + 0.02, gained):
        found.append("retained")
    return found


def delete(
    model: nn.Module, work: Task, request: Request, action: Literal["always", "error"] = "always"
) -> tuple[UnlearnResult | None, list[str], float]:
    """One request to a new stream: the result if the ledger has it, warnings, CPU seconds.

    Where warnings are errors (action "error") nothing is to be written.
    """
    begin, result = time.process_time(), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream = Unlearner(
            model, work.data, cross_entropy, validation=work.validation, groups=work.users
        )
        warnings.simplefilter(action)
        with contextlib.suppress(UserWarning):
            if request.users:
                result = stream.remove(groups=request.users)
            else:
                result = stream.remove(request.numbers)
    if len(stream.ledger) != (1 if result is None else 2):
        raise AssertionError("the ledger has a line for a request that failed, or lacks one")
    return result, [str(each.message) for each in caught], time.process_time() - begin


def networks(
    name: str, work: Task, seed: int, cache: Path, epochs: int | None = None
) -> tuple[nn.Module, float, list[list[nn.Module]]]:
    """The trained network, CPU seconds of its training, and retrained ones for each request."""
    model, seconds = fitted(cache, name, work.data, 1000 * seed, epochs)

    def retrained(numbers: list[int]) -> list[nn.Module]:
        _, rest = work.parts(numbers)
        seeds = [1000 * seed + 1 + k for k in range(RETRAINED)]
        return [fitted(cache, name, rest, each, epochs)[0] for each in seeds]

    if not RECIPES[name].shared:
        return model, seconds, [retrained(request.numbers) for request in work.requests]
    everyone = retrained([i for request in work.requests for i in request.numbers])
    return model, seconds, [everyone for _ in work.requests]


def record(name: str, seed: int, cache: Path, epochs: int | None = None) -> dict[str, Any]:
    """Train, retrain, and delete each of five requests."""
    work = task(name, seed)
    model, seconds, retrained = networks(name, work, seed, cache, epochs)
    found: dict[str, Any] = {
        "network": name,
        "seed": seed,
        "training_seconds": seconds,
        "n": len(work.data[1]),
        "n_validation": len(work.validation[1]),
        "n_test": len(work.test[1]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_validation": measured(model, *[work.validation] * 3)["loss_test"],
        "requests": [],
    }
    for request, own in zip(work.requests, retrained, strict=True):
        forget, retain = work.parts(request.numbers)
        before = measured(model, forget, retain, work.test)
        result, told, seconds = delete(model, work, request)
        assert result is not None
        after = measured(result.model, forget, retain, work.test)
        moved, error = change(before["right"], after["right"])
        point = {
            "kind": request.kind,
            "loss_validation": found["loss_validation"],
            "m": len(request.numbers),
            "before": public(before),
            "after": public(after),
            "retrained": [public(measured(each, forget, retain, work.test)) for each in own],
            "accuracy_change": moved,
            "accuracy_change_error": error,
            "skipped": len(result.skipped),
            "damping": result.damping,
            "calibration": result.calibration and result.calibration.to_dict(),
            "warnings": told,
            "seconds": seconds,
        }
        mean = statistics.fmean(each["loss_forget"] for each in point["retrained"])
        point |= {
            "ratio": after["loss_forget"] / mean,
            "ratio_before": before["loss_forget"] / mean,
        }
        point["harm"] = harms(point)
        point["silent"] = (
            bool(point["harm"]) and delete(model, work, request, "error")[0] is not None
        )
        found["requests"].append(point)
        show(name, seed, point)
    return found


def show(name: str, seed: int, point: dict[str, Any]) -> None:
    peers = "/".join(f"{each['loss_forget']:.3g}" for each in point["retrained"])
    losses = " -> ".join(f"{point[when]['loss_forget']:.3g}" for when in ("before", "after"))
    kept = " -> ".join(f"{point[when]['loss_retain']:.3g}" for when in ("before", "after"))
    by = (point["calibration"] or {}).get("stopped_by", "")
    print(
        f"{name:10s} {seed:3d} {point['kind']:6s} {point['m']:3d} deleted {losses} (retrained "
        f"{peers}; {point['ratio']:.2f}) test {100 * point['accuracy_change']:+.2f} +- "
        f"{100 * point['accuracy_change_error']:.2f} retained {kept} damping "
        f"{point['damping']:.2g} {by} {point['seconds']:.1f} s {point['harm']}"
        + " SILENT" * point["silent"]
        + f" {len(point['warnings'])} warnings" * bool(point["warnings"]),
        flush=True,
    )


# ---------------------------------------------------------------------------------------------
# Judging


def summary(trainings: list[dict[str, Any]]) -> dict[str, Any]:
    """What the requests of a network's trainings came to."""
    points = [point for each in trainings for point in each["requests"]]
    ratios = [point["ratio"] for point in points]
    alone = [ratio for point in points for ratio in _each_retrained(point)]
    accuracy = [point["accuracy_change"] for point in points]
    harmed = [point for point in points if point["harm"]]
    return {
        "requests": len(points),
        "within_factor": sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios),
        "over": sum(ratio > FACTOR for ratio in ratios),
        "under": sum(ratio < 1 / FACTOR for ratio in ratios),
        "ratio": statistics.geometric_mean(ratios),
        "ratio_before": statistics.geometric_mean(point["ratio_before"] for point in points),
        "before_within_factor": sum(
            1 / FACTOR <= point["ratio_before"] <= FACTOR for point in points
        ),
        "retrained_within_factor": sum(1 / FACTOR <= ratio <= FACTOR for ratio in alone)
        / len(alone),
        "accuracy_change": statistics.fmean(accuracy),
        "accuracy_change_worst": min(accuracy),
        "accuracy_change_error": max(point["accuracy_change_error"] for point in points),
        "harmed": {kind: sum(kind in p["harm"] for p in points) for kind in HARMS},
        "silent": sum(point["silent"] for point in harmed),
        "skipped": sum(point["skipped"] > 0 for point in points),
        "warned": sum(bool(point["warnings"]) for point in points),
        "seconds": statistics.fmean(point["seconds"] for point in points),
        "training_seconds": statistics.fmean(each["training_seconds"] for each in trainings),
    }


HARMS = ("over-forgotten", "test", "test, beyond chance", "retained")


def _each_retrained(point: dict[str, Any]) -> list[float]:
    """The deleted loss of each retrained network over the mean of the others: how good is good."""
    losses = [each["loss_forget"] for each in point["retrained"]]
    rest = [statistics.fmean(losses[:k] + losses[k + 1 :]) for k in range(len(losses))]
    return [one / other for one, other in zip(losses, rest, strict=True)]


def claims(summaries: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, and what was reached."""
    found = []
    for name, s in summaries.items():
        rows = (
            ("requests whose deleted loss is within a factor 2 of the retrained networks' mean",
             s["within_factor"] / s["requests"], "at_least", 1.0),
            ("worst change of test accuracy", s["accuracy_change_worst"], "at_least", -POINTS),
            ("requests with silent harm", s["silent"], "at_most", 0),
        )  # fmt: skip
        for quantity, value, bound, limit in rows:
            met = value >= limit if bound == "at_least" else value <= limit
            row = {"network": name, "quantity": quantity, "value": value, bound: limit, "met": met}
            found.append(row)
    return found


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """The table of docs/unlearning.md."""
    lines = [
        "| network | deleted loss over retraining's, before | after | within a factor 2 | more | a "
        "retrained network itself | test, mean | worst | harm warned of | silent harm | seconds, "
        "training | deletion |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, s in summaries.items():
        harmed = sum(s["harmed"][kind] for kind in HARMS if kind != "test, beyond chance")
        cells = (
            f"{s['ratio_before']:.2f}",
            f"{s['ratio']:.2f}",
            f"{s['within_factor']} of {s['requests']}",
            f"{s['over']}",
            f"{s['retrained_within_factor']:.0%}",
            f"{100 * s['accuracy_change']:+.2f}",
            f"{100 * s['accuracy_change_worst']:+.2f}",
            f"{harmed - s['silent']}",
            f"{s['silent']}",
            f"{s['training_seconds']:.1f}",
            f"{s['seconds']:.1f}",
        )
        lines.append(f"| {RECIPES[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def readme_table(summaries: dict[str, dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| network | near retraining | forgot less | more | a retrained network is as near | "
        "test accuracy at worst |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, s in summaries.items():
        cells = (
            f"{s['within_factor']} of {s['requests']}",
            f"{s['under']}",
            f"{s['over']}",
            f"{s['retrained_within_factor']:.0%}",
            f"{100 * s['accuracy_change_worst']:+.2f} points",
        )
        lines.append(f"| {RECIPES[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/ordinary.json"
    )
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/ordinary"
    )
    parser.add_argument("--train-only", action="store_true", help="fill the cache")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, epochs = (options.seeds[:1], 1) if options.quick else (options.seeds, None)
    if options.train_only:
        for name in options.networks:
            for seed in seeds:
                networks(name, task(name, seed), seed, options.cache, epochs)
        return 0
    settings = {"quick": options.quick, "retrained": RETRAINED, "factor": FACTOR}
    here = environment.commit()
    known: dict[str, Any] = {}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        if (known.get("commit"), known.get("settings")) != (here["commit"], settings):
            known = {}
    result: dict[str, Any] = {
        "schema": "ordinary-1",
        **environment.heading(),
        "settings": settings,
        "trainings": known.get("trainings", []),
    }
    for name in options.networks:
        for seed in seeds:
            done = [(each["network"], each["seed"]) for each in result["trainings"]]
            if (name, seed) not in done:
                result["trainings"].append(record(name, seed, options.cache, epochs))
            names = dict.fromkeys(each["network"] for each in result["trainings"])
            result["summary"] = {
                one: summary([each for each in result["trainings"] if each["network"] == one])
                for one in names
            }
            result["claims"] = claims(result["summary"])
            save(result, options.output)
    print(table(result["summary"]))
    for claim in result["claims"]:
        print(claim)
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
