"""Compare deletions from networks with retraining: presets, masks and baselines.

    python benchmarks/unlearning.py [--models mlp,cnn,resnet] [--sets mislabelled,random]
        [--split 0] [--starts 3] [--cache FOLDER] [--output FILE]

For each network and each forget set (mislabelled or random samples), models are trained on
everything from three starts, and other models are retrained without the forget set.
`lcodec_ext.unlearning.evaluate` measures what every method leaves. Everything runs on one thread.
Times are CPU seconds, as a share of those of retraining the same network; these are extrapolated
from a tenth of a training just before. Trained networks are kept in the cache, so a run that was
stopped can go on.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import environment

BUDGET = 0.05  # of retraining
KEYS = (
    "accuracy_forget",
    "accuracy_retain",
    "accuracy_test",
    "loss_forget",
    "mia_auc",
    "js_forget",
    "js_test",
)
GAPS = ("js_forget", "loss_forget", "js_test", "activation_forget")
TITLES = {
    "mlp": "digits, MLP 64-128-10",
    "cnn": "Fashion-MNIST, small CNN",
    "resnet": "Fashion-MNIST, small ResNet",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,cnn,resnet", help="separated by commas")
    parser.add_argument("--sets", default="mislabelled,random", help="separated by commas")
    parser.add_argument(
        "--split", type=int, default=0, help="another draw of samples, forget sets and trainings"
    )
    parser.add_argument("--starts", type=int, default=3, help="models trained on everything")
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/trained"
    )
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/unlearning.json"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(1)
    import torch
    from unlearning_models import RECIPES

    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "schema": "unlearning-1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment.commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "load_before": os.getloadavg()[0],
        "settings": {
            "threads": 1,
            "split": options.split,
            "recommended": recommended(),
            "recipes": {},
        },
        "runs": [],
    }
    names = options.models.split(",")
    for name in names:
        result["settings"]["recipes"][name] = recipe(RECIPES[name])
        for which in options.sets.split(","):
            for start in range(options.starts):
                run = measure(name, which, start, options.split, options.cache)
                result["runs"].append(run)
                show(run)
                result["claims"] = claims(result["runs"])
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    for claim in result["claims"]:
        print(claim)
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


def recommended() -> dict[str, Any]:
    from lcodec_ext.unlearning import Settings

    return Settings.preset("recommended").to_dict()


def recipe(given: Any) -> dict[str, Any]:
    network = given.network()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_samples": given.n,
        "mislabelled": given.mislabelled,
        "random": given.random,
        "epochs": given.epochs,
        "batch_size": given.batch_size,
        "learning_rate": given.learning_rate,
        "weight_decay": given.weight_decay,
    }


def methods(epochs: int) -> dict[str, Any]:
    """Return the methods to compare; the baselines have the epochs that the budget allows."""
    from lcodec_ext.evaluation.methods import fine_tune, gradient_ascent, lbfgs, neg_grad_plus
    from lcodec_ext.unlearning import Baseline

    allowed = max(1, int(BUDGET * epochs))
    half = {"max_parameters": 0.5}
    return {
        "recommended": {},
        "step alone, no repair": {"repair_epochs": 0},
        "repair alone": {
            "update": "gradient",
            "learning_rate": 0.0,
            "repair_drop": None,
            "retries": 0,
        },
        "half the parameters, by gradient": {"selection": "gradient", **half},
        "half the parameters, at random": {"selection": "random", **half},
        "the paper's preset": {"preset": "paper"},
        "fine-tune, SGD": Baseline(fine_tune, {"optimizer": "sgd", "epochs": allowed}),
        "fine-tune, Adam": Baseline(fine_tune, {"optimizer": "adam", "epochs": allowed}),
        "L-BFGS": Baseline(lbfgs, {"iterations": 20, "n_samples": 2500}),
        "gradient ascent": Baseline(gradient_ascent),
        "NegGrad+": Baseline(neg_grad_plus, {"epochs": allowed}),
    }


def measure(name: str, which: str, start: int, split: int, cache: Path) -> dict[str, Any]:
    import torch
    from torch.nn.functional import cross_entropy
    from unlearning_models import RECIPES, retraining_seconds, task, trained

    from lcodec_ext.unlearning import Baseline, evaluate, unlearn

    recipe = RECIPES[name]
    # The small network has its own split and forget set from each start; the others share one,
    # and the models retrained on it.
    seed, own = (3 * split + start, 0) if recipe.data == "digits" else (split, start)
    data = task(name, which, seed)
    forget, retain = data.part(True), data.part(False)
    model = trained(cache, name, which, seed, None, own)
    again = [trained(cache, name, which, seed, k) for k in range(3)]
    few = [tuple(t[:40] for t in part) for part in (forget, retain)]
    unlearn(model, *few, cross_entropy, n_perturbations=10)  # imports, and first calls
    retraining = retraining_seconds(name, *retain)
    made: dict[str, Any] = {}
    cpu: dict[str, float] = {}
    failed: dict[str, str] = {}
    for method, how in methods(recipe.epochs).items():
        torch.manual_seed(start)
        begin = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                if isinstance(how, Baseline):
                    options = {"weight_decay": recipe.weight_decay, **how.options}
                    made[method] = how.run(model, forget, retain, cross_entropy, start, **options)
                else:
                    options = {"weight_decay": recipe.weight_decay, "seed": start, **how}
                    made[method] = unlearn(model, forget, retain, cross_entropy, **options)
        except ValueError as error:
            failed[method] = str(error)
        cpu[method] = time.process_time() - begin
    evaluation = evaluate(
        model,
        forget,
        retain,
        data.test,
        cross_entropy,
        retrained=again,
        methods=made,
        weight_decay=recipe.weight_decay,
        seed=start,
        relearn=False,
    )
    rows = {}
    for entry in evaluation.methods:
        result = made.get(entry.name)
        rows[entry.name] = {
            **{key: entry.metrics[key] for key in KEYS},
            "closed": {key: entry.gap_closed.get(key) for key in GAPS},
            "time": cpu[entry.name] / retraining if entry.name in cpu else None,
            "parameters": getattr(result, "n_parameters", None),
            "units": len(result.selection) if hasattr(result, "selection") else None,
            "skipped": bool(getattr(result, "skipped", ())),
            "repaired": getattr(result, "repaired", None),
            "attempts": getattr(result, "attempts", None),
            "length": getattr(result, "length", None),
            "error": entry.error,
        }
    return {
        "model": name,
        "forget": which,
        "start": start,
        "n_forget": len(forget[1]),
        "n_retain": len(retain[1]),
        "retraining_cpu_seconds": retraining,
        "retrained": len(again),
        "floor": {key: evaluation.floor.get(key) for key in GAPS},
        "methods": rows,
        "failed": failed,
    }


def show(run: Mapping[str, Any]) -> None:
    print(f"{run['model']}, {run['forget']}, start {run['start']}")
    for name, row in run["methods"].items():
        closed = [row["closed"][key] for key in ("js_forget", "loss_forget")]
        shares = " ".join("    -" if v is None else f"{v:5.2f}" for v in closed)
        spent = "     -" if row["time"] is None else f"{row['time']:6.1%}"
        print(
            f"  {name:34s} closed JS, loss {shares}  test {row['accuracy_test']:.4f}  "
            f"retain {row['accuracy_retain']:.4f}  AUC {row['mia_auc']:.3f}  time {spent}",
            flush=True,
        )
    for name, why in run["failed"].items():
        print(f"  {name:34s} failed: {why[:90]}")


def mean(runs: Sequence[Mapping[str, Any]], method: str, *path: str) -> float | None:
    """Return the mean over runs of one figure of a method; None if it is missing."""
    values = []
    for run in runs:
        value: Any = run["methods"].get(method)
        for key in path:
            value = None if value is None else value[key]
        if value is None:
            return None
        values.append(float(value))
    return statistics.fmean(values) if values else None


def claims(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets and what was reached, over the starts of each network and forget set."""
    found = []
    groups = dict.fromkeys((run["model"], run["forget"]) for run in runs)
    for name, which in groups:
        group = [run for run in runs if (run["model"], run["forget"]) == (name, which)]

        def gap(key: str, method: str = "recommended", group: Any = group) -> float:
            """Return the distance from retraining, on average over the starts."""
            return abs((mean(group, method, key) or 0) - (mean(group, "retrained", key) or 0))

        rows: list[tuple[str, float | None, str, float]] = [
            ("time", mean(group, "recommended", "time"), "at_most", BUDGET)
        ]
        if which == "mislabelled":
            rows += [
                (
                    "JS gap closed",
                    mean(group, "recommended", "closed", "js_forget"),
                    "at_least",
                    0.9,
                ),
                ("test accuracy off retraining", gap("accuracy_test"), "at_most", 0.01),
                (
                    "JS gap closed, half the parameters",
                    mean(group, "half the parameters, by gradient", "closed", "js_forget"),
                    "at_least",
                    0.75,
                ),
            ]
        else:
            rows += [
                (
                    "loss gap closed",
                    mean(group, "recommended", "closed", "loss_forget"),
                    "at_least",
                    0.85,
                ),
                ("membership AUC off retraining", gap("mia_auc"), "at_most", 0.02),
                ("test accuracy off retraining", gap("accuracy_test"), "at_most", 0.005),
            ]
        for quantity, value, bound, limit in rows:
            good = value is not None and (value >= limit if bound == "at_least" else value <= limit)
            found.append(
                {
                    "model": name,
                    "forget": which,
                    "starts": len(group),
                    "quantity": quantity,
                    "value": value,
                    bound: limit,
                    "met": good,
                }
            )
    return found


def tables(result: Mapping[str, Any]) -> str:
    """Return a Markdown table for each network and forget set, with means over the starts."""
    lines = []
    for name, which in dict.fromkeys((run["model"], run["forget"]) for run in result["runs"]):
        group = [r for r in result["runs"] if (r["model"], r["forget"]) == (name, which)]
        recipe = result["settings"]["recipes"][name]
        lines += [
            f"**{TITLES[name]}: {group[0]['n_forget']} {which} samples of "
            f"{recipe['training_samples']:,}**, {recipe['epochs']} epochs, "
            f"{recipe['parameters']:,} parameters",
            "",
            "| | JS gap closed | loss gap closed | accuracy, deleted | retained | test | "
            "membership AUC | time |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for method in group[0]["methods"]:
            cells = [
                share(mean(group, method, "closed", "js_forget")),
                share(mean(group, method, "closed", "loss_forget")),
                *(
                    share(mean(group, method, f"accuracy_{part}"), 1)
                    for part in ("forget", "retain", "test")
                ),
                number(mean(group, method, "mia_auc")),
                share(mean(group, method, "time"), 1),
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
