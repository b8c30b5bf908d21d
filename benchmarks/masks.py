"""Deletions restricted to few parameters: which ones keep most of the effect.

    python benchmarks/masks.py [--quick] [--sets mislabelled random] [--cache FOLDER]
        [--output FILE]

The digits network of benchmarks/unlearning.py, three trainings on everything and three retrained
models for each, split 0. The step is one Gauss-Newton step on all retained samples, solved to the
end, with damping 1e-4: without guard and finish, so that what is compared is the mask alone. The
masks have 5% or 10% of the parameters:

- step: the single parameters that the full step moves most, solved again on them;
- truncated: the same parameters, with their part of the full step;
- step units: the units that the full step moves most per parameter, solved again;
- gradient units, random units, L-FOCI units: solved on them;
- shortened: a part of the full step, of all parameters, after which the removed samples lose as
  much as after "step". "disturbed" compares what both do to others: the divergence of outputs for
  retained samples from those before.

The same comparison of "step" with "shortened" is made for the deletion of a whole class.
"""

import argparse
import copy
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from results import SCHEMA
from run import save
from torch import nn
from torch.nn.functional import cross_entropy
from unlearning_models import RECIPES, task, trained

from lcodec_ext.unlearning import ParameterSelection, UnlearnResult, evaluate, unlearn

SHARES = (0.05, 0.1)
DAMPING = 1e-4
SETS = ("mislabelled", "random")
CLASSES = (3, 8)
STARTS = 3
FULL = "all parameters"
OPTIONS: dict[str, Any] = {
    "weight_decay": RECIPES["mlp"].weight_decay,
    "damping": DAMPING,
    "output_damping": 0.0,
    "n_curvature": None,
    "max_iterations": None,
    "rtol": 1e-5,
    "max_drop": None,
    "halvings": 0,
    "lengthen": None,
    "retries": 0,
    "repair_epochs": 0,
    "repair_drop": None,
    "n_recalibrate": None,
}
RULES = {
    "step": "step",
    "step units": "step_units",
    "gradient units": "gradient",
    "random units": "random",
    "L-FOCI units": "lfoci",
}


def deletions(which: str, start: int, cache: Path) -> tuple[dict[str, Any], Any, dict[str, float]]:
    """Return the models of every mask, against retraining, and what they do to retained samples."""
    data = task("mlp", which, start)
    forget, retain = data.part(True), data.part(False)
    model = trained(cache, "mlp", which, start, None)
    again = [trained(cache, "mlp", which, start, k) for k in range(3)]

    def deleted(**options: Any) -> UnlearnResult:
        return unlearn(model, forget, retain, cross_entropy, **OPTIONS, seed=start, **options)

    full = deleted()
    made: dict[str, Any] = {FULL: full}
    for share in SHARES:
        for name, rule in RULES.items():
            made[key(name, share)] = deleted(selection=rule, max_parameters=share)
        mask = made[key("step", share)].selection
        made[key("truncated", share)] = truncated(model, full.model, mask)
        loss = loss_of(made[key("step", share)].model, forget)
        made[key("shortened", share)] = shortened(model, full.model, forget, loss)
    measured = evaluate(
        model,
        forget,
        retain,
        data.test,
        cross_entropy,
        retrained=again,
        methods=made,
        weight_decay=OPTIONS["weight_decay"],
        seed=start,
        relearn=False,
    )
    disturbed = {
        name: divergence(model, getattr(how, "model", how), retain[0]) for name, how in made.items()
    }
    return made, measured, disturbed


def of_class(number: int, start: int, cache: Path) -> dict[str, Any]:
    """Compare masks with a shortened step for the deletion of a class."""
    data = task("mlp", "random", start)
    gone = data.y == number
    forget, retain = (data.X[gone], data.y[gone]), (data.X[~gone], data.y[~gone])
    model = trained(cache, "mlp", "random", start, None)

    def deleted(**options: Any) -> nn.Module:
        return unlearn(model, forget, retain, cross_entropy, **OPTIONS, seed=start, **options).model

    full = deleted()
    made = {FULL: full}
    for share in SHARES:
        made[key("step", share)] = deleted(selection="step", max_parameters=share)
        loss = loss_of(made[key("step", share)], forget)
        made[key("shortened", share)] = shortened(model, full, forget, loss)
    return {
        "class": number,
        "start": start,
        "methods": {
            name: {
                "loss_forget": loss_of(how, forget),
                "disturbed": divergence(model, how, retain[0]),
            }
            for name, how in made.items()
        },
    }


def truncated(model: nn.Module, full: nn.Module, mask: ParameterSelection) -> nn.Module:
    """Return the model with what a full step did to the parameters of a mask, and no more."""
    some = copy.deepcopy(model)
    mask.scatter_(some, mask.gather(full).detach())
    return some


def shortened(model: nn.Module, full: nn.Module, forget: Any, loss: float) -> nn.Module:
    """Return the model after the part of a full step that gives the removed samples a loss."""
    start, end = (nn.utils.parameters_to_vector(each.parameters()) for each in (model, full))
    some = copy.deepcopy(model)
    low, high = 0.0, 1.0
    for _ in range(30):
        length = (low + high) / 2
        nn.utils.vector_to_parameters(
            torch.lerp(start, end, length).detach().clone(), some.parameters()
        )
        low, high = (length, high) if loss_of(some, forget) < loss else (low, length)
    return some


@torch.no_grad()
def loss_of(model: nn.Module, samples: Any) -> float:
    return float(cross_entropy(model(samples[0]), samples[1]))


@torch.no_grad()
def divergence(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Return the mean Jensen-Shannon divergence of the outputs of two models, in bits."""
    p, q = one(x).softmax(1), other(x).softmax(1)
    mid = (p + q) / 2

    def relative(a: torch.Tensor) -> torch.Tensor:
        return torch.special.xlogy(a, a / mid).sum(1)

    return float((relative(p) + relative(q)).mean()) / 2 / math.log(2)


def key(name: str, share: float) -> str:
    return f"{name}, {share:.0%}"


def record(which: str, start: int, cache: Path) -> dict[str, Any]:
    made, measured, disturbed = deletions(which, start, cache)
    rows = {}
    for entry in measured.methods:
        rows[entry.name] = {
            "closed_js": entry.gap_closed.get("js_forget"),
            "closed_loss": entry.gap_closed.get("loss_forget"),
            **{
                name: entry.metrics[name]
                for name in ("js_forget", "accuracy_test", "accuracy_retain")
            },
            "disturbed": disturbed.get(entry.name),
            "parameters": getattr(made.get(entry.name), "n_parameters", None),
        }
    return {"set": which, "start": start, "methods": rows}


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over the starts, for each forget set and mask."""
    found: dict[str, Any] = {}
    for which in dict.fromkeys(point["set"] for point in points):
        group = [point["methods"] for point in points if point["set"] == which]
        found[which] = {
            name: {
                figure: statistics.fmean(values)
                for figure in group[0][name]
                if None not in (values := [methods[name][figure] for methods in group])
            }
            for name in group[0]
        }
    return found


def table(found: dict[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    sets = list(found)
    heads = [
        f"{which}: {what}"
        for which in sets
        for what in ("JS gap closed", "test accuracy", "retained outputs moved")
    ]
    lines = [f"| parameters that change | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name in found[sets[0]]:
        if name == "retrained":
            continue
        cells = []
        for which in sets:
            row = found[which][name]
            moved = f"{1000 * row['disturbed']:.2f}" if "disturbed" in row else ""
            cells += [f"{row['closed_js']:.0%}", f"{row['accuracy_test']:.1%}", moved]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def classes(points: list[dict[str, Any]]) -> str:
    """Say how masks compare with a shortened step where a class is deleted."""
    told = []
    for share in SHARES:
        masked, short = (
            [point["methods"][key(name, share)]["disturbed"] for point in points]
            for name in ("step", "shortened")
        )
        fewer = sum(a < b for a, b in zip(masked, short, strict=True))
        told.append(
            f"{1000 * statistics.fmean(masked):.2f} against {1000 * statistics.fmean(short):.2f} "
            f"for {share:.0%} of the parameters (less in {fewer} of {len(points)} cases)"
        )
    return " and ".join(told)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one start")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/trained"
    )
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/masks.json"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # what the table shows
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": OPTIONS | {"shares": SHARES},
        "cases": {},
        "masks": {"points": []},
    }
    for which in options.sets:
        for start in range(1 if options.quick else STARTS):
            result["masks"]["points"].append(record(which, start, options.cache))
            result["masks"]["summary"] = summary(result["masks"]["points"])
            save(result, options.output)
    print(table(result["masks"]["summary"]))
    result["masks"]["classes"] = [
        of_class(number, start, options.cache)
        for start in range(1 if options.quick else STARTS)
        for number in CLASSES
    ]
    save(result, options.output)
    print(classes(result["masks"]["classes"]))


if __name__ == "__main__":
    main()
