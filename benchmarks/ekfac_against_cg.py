"""Compare deletions by EK-FAC with those by the Gauss-Newton matrix and its products.

    python benchmarks/ekfac_against_cg.py [--models mlp,cnn,resnet] [--sets mislabelled,random]
        [--split 3] [--starts 2] [--cache FOLDER] [--output FILE]

The networks and requests of benchmarks/unlearning.py. Of each curvature the step alone is compared,
with its strength found by control groups or with given dampings, and the whole deletion. "products"
says how many products a Gauss-Newton step takes for each column: 8 are the default of a calibrated
one. Times are CPU seconds of one thread.

Split 0 is for choosing settings. The record is of split 3 for the networks on Fashion-MNIST and of
split 4 for the perceptron, on which nothing was chosen.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment

DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
SAMPLES = (256, 2048)  # that EK-FAC reads
PERCEPTRON = 1  # splits that it is ahead of the others
FIGURES = ("js_forget", "loss_forget", "accuracy_retain", "accuracy_test")
TITLES = {
    "mlp": "digits, MLP",
    "cnn": "Fashion-MNIST, CNN",
    "resnet": "Fashion-MNIST, ResNet",
}
ALONE: Mapping[str, Any] = {"validation": True, "finish": 0}
PLAIN: Mapping[str, Any] = {
    "calibrate": False,
    "output_damping": 0.0,
    "max_drop": None,
    "halvings": 0,
    "retries": 0,
    "repair_epochs": 0,
    "repair_drop": None,
    "n_recalibrate": None,
}


def ways() -> dict[str, dict[str, Any]]:
    """Return the options of `unlearn` by name."""
    found: dict[str, dict[str, Any]] = {"Gauss-Newton, calibrated": dict(ALONE)}
    for n in SAMPLES:
        found[f"EK-FAC of {n}, calibrated"] = ALONE | {"curvature": "ekfac", "n_curvature": n}
    for damping in DAMPINGS:
        given = PLAIN | {"damping": damping}
        found[f"Gauss-Newton, {damping:g}"] = given | {"lengthen": None}
        found[f"EK-FAC, {damping:g}"] = given | {"curvature": "ekfac"}
    found["Gauss-Newton, with finish"] = {"validation": True}
    found["EK-FAC, with finish"] = {"validation": True, "curvature": "ekfac"}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,cnn,resnet", help="separated by commas")
    parser.add_argument("--sets", default="mislabelled,random", help="separated by commas")
    parser.add_argument("--split", type=int, default=3, help="the perceptron's is the next one")
    parser.add_argument("--starts", type=int, default=2, help="models trained on everything")
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/trained"
    )
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/ekfac_against_cg.json"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(1)
    import torch
    from unlearning import head, measure, recipe_of, written
    from unlearning_models import RECIPES

    torch.set_num_threads(1)
    pairs = [(n, w) for n in options.models.split(",") for w in options.sets.split(",")]
    result: dict[str, Any] = head("ekfac-1") | {
        "settings": {
            "threads": 1,
            "split": options.split,
            "ways": ways(),
            "recipes": {name: recipe_of(RECIPES[name]) for name, _ in pairs},
        },
        "runs": [],
    }
    for name, which in pairs:
        split = options.split + PERCEPTRON * (name == "mlp")
        for start in range(options.starts):
            run = measure(name, which, start, split, options.cache, {}, ways())
            result["runs"].append(run | {"split": split})
            written(options.output, result | {"load_after": environment.load()})
    print(tables(result["runs"]))
    return 0


def of(runs: Sequence[Mapping[str, Any]], way: str, *path: str) -> float | None:
    """Return the mean over runs of one figure; None where one is missing."""
    values = []
    for run in runs:
        value: Any = run["methods"][way]
        for key in path:
            value = None if value is None else value.get(key)
        if path == ("time",) and value is not None:
            value *= run["retraining_cpu_seconds"]
        if value is None:
            return None
        values.append(value)
    return statistics.fmean(values)


def tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table for each network and request, of means over the starts."""
    lines = []
    for name, which in dict.fromkeys((run["model"], run["forget"]) for run in runs):
        group = [run for run in runs if (run["model"], run["forget"]) == (name, which)]
        lines += [
            f"**{TITLES[name]}, {group[0]['n_forget']} {which} samples of "
            f"{group[0]['n_forget'] + group[0]['n_retain']:,}**",
            "",
            "| | JS | JS gap closed | loss | loss gap closed | retained | test | CPU seconds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for way in group[0]["methods"]:
            js, loss, retained, test = (of(group, way, figure) for figure in FIGURES)
            closed = [of(group, way, "closed", key) for key in ("js_forget", "loss_forget")]
            seconds = of(group, way, "time")
            cells = [
                _cell(js, ".3f"),
                _cell(closed[0], ".0%"),
                _cell(loss, ".3g"),
                _cell(closed[1], ".0%"),
                _cell(retained, ".1%"),
                _cell(test, ".1%"),
                _cell(seconds, ".2g"),
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def load(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a record."""
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
