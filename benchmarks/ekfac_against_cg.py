"""Compare deletions by EK-FAC with those by the Gauss-Newton matrix and its products.

    python benchmarks/ekfac_against_cg.py [--models mlp,cnn,resnet] [--sets mislabelled,random]
        [--split 0] [--starts 1] [--cache FOLDER] [--output FILE]

The networks and requests of benchmarks/unlearning.py. Of each curvature the step alone is compared,
with its strength found by control groups or with given dampings, and the whole deletion. Without
retained samples EK-FAC takes its factors from statistics of all training samples. Its damping is
then the constant of the preset, or what a trial found when the training samples were still there:
the calibrated deletion of as many random ones. Times are CPU seconds of one thread, without those
of the statistics and of the trial, which belong to training ("prepared").

Split 0 is for choosing settings. The record is of split 4 for the perceptron and 3 for the CNN, on
which nothing was chosen, and of the ResNet's in the record of benchmarks/unlearning.py, on which
nothing of EK-FAC was.
"""

import argparse
import json
import statistics as averages
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment

DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
SAMPLES = (256, 2048)  # that EK-FAC reads
SPLITS = {"mlp": (4, 4), "cnn": (3, 3), "resnet": (1, 2)}  # with wrong labels, random
FIGURES = ("js_forget", "loss_forget", "accuracy_retain", "accuracy_test")
TITLES = {
    "mlp": "digits, MLP",
    "cnn": "Fashion-MNIST, CNN",
    "resnet": "Fashion-MNIST, ResNet",
}
SMALL = 0.25  # of what retrained networks differ by: a smaller gap in JS says nothing
WITHOUT = ("EK-FAC without retained samples", "EK-FAC without retained samples, after a trial")
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
    for way in WITHOUT:
        found[way] = {"validation": True, "curvature": "ekfac"}
    found["Gauss-Newton, with finish"] = {"validation": True}
    found["EK-FAC, with finish"] = {"validation": True, "curvature": "ekfac"}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,cnn,resnet", help="separated by commas")
    parser.add_argument("--sets", default="mislabelled,random", help="separated by commas")
    parser.add_argument("--split", type=int, help="one for all networks")
    parser.add_argument("--starts", type=int, default=1, help="models; of the perceptron three")
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
            "splits": SPLITS,
            "ways": ways(),
            "recipes": {name: recipe_of(RECIPES[name]) for name, _ in pairs},
        },
        "runs": [],
    }
    for name, which in pairs:
        split = SPLITS[name][which == "random"] if options.split is None else options.split
        for start in range(3 if name == "mlp" else options.starts):
            here, told = prepared(name, which, start, split, options.cache)
            run = measure(name, which, start, split, options.cache, {}, here)
            result["runs"].append(run | {"split": split, "prepared": told})
            written(options.output, result | {"load_after": environment.load()})
    print(table(result["runs"]))
    return 0


def prepared(
    name: str, which: str, start: int, split: int, cache: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the ways with statistics of the training samples, and what these took."""
    import torch
    from torch.nn.functional import cross_entropy
    from unlearning_models import RECIPES, task, trained

    from lcodec_ext.unlearning import TrainingStatistics, random_samples, unlearn

    recipe = RECIPES[name]
    seed, own = (3 * split + start, 0) if recipe.data == "digits" else (split, start)
    data = task(name, which, seed)
    model = trained(cache, name, which, seed, None, own)
    begin = time.process_time()
    statistics = TrainingStatistics.collect(
        model, (data.X, data.y), cross_entropy, curvature="ekfac"
    )
    seconds = {"statistics": time.process_time() - begin}
    few = torch.zeros(len(data.y), dtype=torch.bool)
    few[random_samples(len(data.y), len(data.forget), seed=100 + start)] = True
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trial = unlearn(
            model,
            (data.X[few], data.y[few]),
            (data.X[~few], data.y[~few]),
            cross_entropy,
            curvature="ekfac",
            weight_decay=recipe.weight_decay,
            seed=start,
            **ALONE | {"validation": data.validation},
        )
    seconds["trial"] = time.process_time() - begin
    assert trial.calibration is not None
    found = ways()
    for way in WITHOUT:
        found[way]["statistics"] = statistics
    found[WITHOUT[1]]["damping"] = trial.calibration.strength
    told = {"cpu_seconds": seconds, "trial": trial.calibration.to_dict()}
    return found, told


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
    return averages.fmean(values)


def table(runs: Sequence[Mapping[str, Any]], ways: Sequence[str] | None = None) -> str:
    """Return a Markdown table with means over the starts, of all ways or of some."""
    lines = [
        "| | JS | JS gap closed | loss | loss gap closed | retained | test | CPU seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, which in dict.fromkeys((run["model"], run["forget"]) for run in runs):
        group = [run for run in runs if (run["model"], run["forget"]) == (name, which)]
        total = group[0]["n_forget"] + group[0]["n_retain"]
        title = f"{TITLES[name]}: {group[0]['n_forget']} {which} samples of {total:,}"
        lines.append(f"| **{title}** |" + " |" * 7)
        floor, before = (of(group, each, "js_forget") for each in ("retrained", "no-op"))
        says = floor is not None and before is not None and before > (1 + SMALL) * floor
        for way in group[0]["methods"] if ways is None else ways:
            js, loss, retained, test = (of(group, way, figure) for figure in FIGURES)
            closed = [of(group, way, "closed", key) for key in ("js_forget", "loss_forget")]
            cells = [
                _cell(js, ".3f"),
                _cell(closed[0] if says else None, ".0%"),
                _cell(loss, ".3g"),
                _cell(closed[1], ".0%"),
                _cell(retained, ".1%"),
                _cell(test, ".1%"),
                _cell(of(group, way, "time"), ".2g"),
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


#: What the guide shows.
SHOWN = (
    "no-op",
    "retrained",
    "Gauss-Newton, calibrated",
    "EK-FAC of 2048, calibrated",
    *WITHOUT,
    "Gauss-Newton, with finish",
    "EK-FAC, with finish",
)


def load(path: Path) -> list[dict[str, Any]]:
    """Return the runs of a record."""
    runs: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return runs


if __name__ == "__main__":
    raise SystemExit(main())
