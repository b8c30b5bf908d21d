"""Compare deletions from networks with retraining: the package, its presets, and tuned baselines.

    python benchmarks/unlearning.py [--models mlp,cnn,resnet,mobilenet] [--sets mislabelled,random]
        [--split 1] [--starts 3] [--cache FOLDER] [--output FILE]
    python benchmarks/unlearning.py --tune [--models mlp,cnn] [--cache FOLDER]

For each network and each forget set (mislabelled or random samples), models are trained on
everything from three starts, and other models are retrained without the forget set.
`lcodec_ext.unlearning.evaluate` measures what every method leaves. Everything runs on one thread.
Times are CPU seconds, as a share of those of retraining the same network; these are extrapolated
from a tenth of a training just before. Trained networks are kept in the cache, and so is what each
baseline gave, by its options: a run that was stopped goes on, and one with another version of the
package compares it with the same baselines.

Split 0 is for development: settings of the package were chosen on its draws of samples, and --tune
chooses those of the baselines there (unlearning_baselines.py). Split 1 judges.
"""

import argparse
import hashlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment
import unlearning_baselines
from unlearning_baselines import BUDGET, NAMES

AHEAD = 0.02  # of the gaps in JS and in loss, at once: a baseline that is better
SMALL = 0.25  # of the floor: a smaller gap in JS says nothing
KEYS = (
    "accuracy_forget",
    "accuracy_retain",
    "accuracy_test",
    "loss_forget",
    "loss_retain",
    "loss_test",
    "mia_auc",
    "mia_tpr",
    "js_forget",
    "js_test",
)
GAPS = ("js_forget", "loss_forget", "js_test", "activation_forget")
TITLES = {
    "mlp": "digits, MLP 64-128-10",
    "cnn": "Fashion-MNIST, small CNN",
    "resnet": "Fashion-MNIST, small ResNet",
    "mobilenet": "Fashion-MNIST, MobileNet",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlp,cnn,resnet", help="separated by commas")
    parser.add_argument("--sets", default="mislabelled,random", help="separated by commas")
    parser.add_argument(
        "--split", type=int, default=1, help="another draw of samples, forget sets and trainings"
    )
    parser.add_argument("--starts", type=int, default=3, help="models trained on everything")
    parser.add_argument("--tune", action="store_true", help="choose the baselines' options")
    parser.add_argument("--skip-package", action="store_true", help="baselines alone, to keep them")
    parser.add_argument("--settings", type=int, default=12, help="of each baseline, with --tune")
    parser.add_argument("--tuned", type=Path, default=unlearning_baselines.RESULTS)
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/trained"
    )
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/unlearning.json"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(1)
    import torch

    torch.set_num_threads(1)
    pairs = [(n, w) for n in options.models.split(",") for w in options.sets.split(",")]
    return tune(pairs, options) if options.tune else judge(pairs, options)


def head(schema: str) -> dict[str, Any]:
    return {
        "schema": schema,
        **environment.heading(),
    }


def written(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def tune(pairs: Sequence[tuple[str, str]], options: argparse.Namespace) -> int:
    """Write the chosen options of baselines; searches of other networks stay in the file."""
    known = json.loads(options.tuned.read_text()) if options.tuned.exists() else {}
    searches = known.get("searches", {})
    for name, which in pairs:
        made = head("tuned-1")
        kept = ("created", "commit", "dirty", "machine", "versions", "load_before")
        found = unlearning_baselines.search(name, which, options.cache, options.settings)
        searches.setdefault(name, {})[which] = {key: made[key] for key in kept} | found
        written(options.tuned, {"schema": "tuned-1", "searches": searches})
    return 0


def judge(pairs: Sequence[tuple[str, str]], options: argparse.Namespace) -> int:
    from unlearning_models import RECIPES

    result: dict[str, Any] = head("unlearning-2") | {
        "settings": {
            "threads": 1,
            "split": options.split,
            "recommended": recommended(),
            "recipes": {name: recipe_of(RECIPES[name]) for name, _ in pairs},
        },
        "runs": [],
    }
    for name, which in pairs:
        baselines = unlearning_baselines.tuned(name, which, options.tuned)
        ours = {} if options.skip_package else OURS
        for start in range(options.starts):
            run = measure(name, which, start, options.split, options.cache, baselines, ours)
            result["runs"].append(run)
            show(run)
            result["claims"] = claims(result["runs"])
            written(options.output, result)
    for claim in result["claims"]:
        print(claim)
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


def recommended() -> dict[str, Any]:
    """Return what the default is where validation samples are given."""
    from lcodec_ext.unlearning.settings import resolve

    return resolve("recommended", {}, retained=True, validation=True)[0].to_dict()


def recipe_of(given: Any) -> dict[str, Any]:
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


#: What the package does. "validation" says whether it is given these samples.
OURS: Mapping[str, Mapping[str, Any]] = {
    "recommended": {"validation": True},
    "recommended, no validation": {},
    "half the parameters, by gradient": {
        "validation": True,
        "selection": "gradient",
        "max_parameters": 0.5,
    },
    "a tenth of the parameters, by step": {
        "validation": True,
        "selection": "step",
        "max_parameters": 0.1,
    },
    "the paper's preset": {"preset": "paper"},
}


def measure(
    name: str,
    which: str,
    start: int,
    split: int,
    cache: Path,
    baselines: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> dict[str, Any]:
    """Run what was not kept on one model, and measure it."""
    import torch
    from torch.nn.functional import cross_entropy
    from unlearning_models import RECIPES, retraining_seconds, task, trained

    from lcodec_ext.unlearning import evaluate, unlearn

    recipe = RECIPES[name]
    # The small network has its own split and forget set from each start; the others share one,
    # and the models retrained on it.
    seed, own = (3 * split + start, 0) if recipe.data == "digits" else (split, start)
    data = task(name, which, seed)
    forget, retain = data.part(True), data.part(False)
    model = trained(cache, name, which, seed, None, own)
    again = [trained(cache, name, which, seed, k) for k in range(3)]
    kept = Kept(cache / "baselines", (name, which, seed, start), recipe_of(recipe), baselines)
    few = [tuple(t[:40] for t in part) for part in (forget, retain)]
    unlearn(model, *few, cross_entropy, damping=1.0)  # imports, and first calls
    retraining = retraining_seconds(name, *retain)
    made: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    for method, how in {**ours, **baselines}.items():
        if method in kept.rows:
            continue
        torch.manual_seed(start)
        begin = time.process_time()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            error = None
            try:
                made[method] = carried_out(how, model, data, recipe.weight_decay, start)
            except (ValueError, RuntimeError) as caught:
                error = f"{type(caught).__name__}: {caught}"
        about[method] = {
            "time": (time.process_time() - begin) / retraining,
            **deletion(made.get(method)),
            "warned": [str(each.message) for each in found],
            "error": error,
        }
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
    measured = {
        entry.name: {
            **{key: entry.metrics.get(key) for key in KEYS},
            "closed": {key: entry.gap_closed.get(key) for key in GAPS},
            "time": None,
            "error": entry.error,
            **about.get(entry.name, {}),
        }
        for entry in evaluation.methods
    }
    failed = {method: row for method, row in about.items() if row["error"]}
    kept.take(measured | failed)
    order = ("no-op", "retrained", *ours, *baselines)
    return {
        "model": name,
        "forget": which,
        "start": start,
        "n_forget": len(forget[1]),
        "n_retain": len(retain[1]),
        "retraining_cpu_seconds": retraining,
        "retrained": len(again),
        "floor": {key: evaluation.floor.get(key) for key in GAPS},
        "methods": {each: (failed | measured | kept.rows)[each] for each in order},
    }


def carried_out(how: Any, model: Any, data: Any, weight_decay: float, seed: int) -> Any:
    """Return what a baseline or options of `unlearn` make of a model."""
    from torch.nn.functional import cross_entropy

    from lcodec_ext.unlearning import Baseline, unlearn

    forget, retain = data.part(True), data.part(False)
    if isinstance(how, Baseline):
        options = {"weight_decay": weight_decay, **how.options}
        return how.run(model, forget, retain, cross_entropy, seed, **options)
    options = {"weight_decay": weight_decay, "seed": seed, **how}
    if options.pop("validation", False):
        options["validation"] = data.validation
    if "statistics" in options:  # saved at training time, in the place of the retained samples
        retain = None
    return unlearn(model, forget, retain, cross_entropy, **options)


class Kept:
    """What each baseline gave on one model, in files that have its options in their names."""

    def __init__(
        self, folder: Path, where: Sequence[Any], recipe: Any, baselines: Mapping[str, Any]
    ) -> None:
        self._paths = {}
        for name, how in baselines.items():
            what = json.dumps([*where, name, how.options, recipe], sort_keys=True, default=list)
            stem = "-".join(map(str, where)) + f"-{name.replace(' ', '_')}"
            digest = hashlib.sha256(what.encode()).hexdigest()[:8]
            self._paths[name] = folder / f"{stem}-{digest}.json"
        self.rows: dict[str, Any] = {
            name: json.loads(path.read_text())
            for name, path in self._paths.items()
            if path.exists()
        }

    def take(self, rows: Mapping[str, Any]) -> None:
        """Keep the new rows of baselines, with the commit that they come from."""
        for name in self._paths.keys() & rows.keys() - self.rows.keys():
            self.rows[name] = {**rows[name], **environment.commit()}
            written(self._paths[name], self.rows[name])


def deletion(result: Any) -> dict[str, Any]:
    """Return what a result of `unlearn` says of itself; nothing of a model."""
    if not hasattr(result, "selection"):
        return {}
    calibrated = result.calibration
    return {
        "parameters": result.n_parameters,
        "skipped": bool(result.skipped),
        "repaired": result.repaired,
        "length": result.length,
        "seconds": dict(result.seconds),
        "calibration": None if calibrated is None else calibrated.to_dict(),
    }


def show(run: Mapping[str, Any]) -> None:
    print(f"{run['model']}, {run['forget']}, start {run['start']}")
    for name, row in run["methods"].items():
        if row.get("closed") is None or row["accuracy_test"] is None:
            print(f"  {name:34s} failed: {str(row['error'])[:90]}")
            continue
        closed = [row["closed"][key] for key in ("js_forget", "loss_forget")]
        shares = " ".join("    -" if v is None else f"{v:5.2f}" for v in closed)
        spent = "     -" if row["time"] is None else f"{row['time']:6.1%}"
        print(
            f"  {name:34s} JS {row['js_forget']:.3f} closed JS, loss {shares}  "
            f"test {row['accuracy_test']:.4f}  retain {row['accuracy_retain']:.4f}  "
            f"AUC {row['mia_auc']:.3f}  time {spent}",
            flush=True,
        )


def mean(runs: Sequence[Mapping[str, Any]], method: str, *path: str) -> float | None:
    """Return the mean over runs of one figure of a method; None if it is missing."""
    values = []
    for run in runs:
        value: Any = run["methods"].get(method)
        for key in path:
            value = None if value is None else value.get(key)
        if value is None:
            return None
        values.append(float(value))
    return statistics.fmean(values) if values else None


def closeness(runs: Sequence[Mapping[str, Any]], method: str) -> tuple[float, float] | None:
    """Return how near a method comes in JS and in loss, from 0 (before) to 1 (retrained).

    Nearer than retrained models are to each other counts as 1. Where the gap in JS is small
    compared with the floor, what is left of it counts in units of the floor.
    """
    js, loss = mean(runs, method, "js_forget"), mean(runs, method, "closed", "loss_forget")
    before, floor = mean(runs, "no-op", "js_forget"), mean(runs, "retrained", "js_forget")
    if js is None or before is None or floor is None or loss is None:
        return None
    unit = max(before - floor, SMALL * floor)
    return min(1.0, 1 - (js - floor) / unit), min(1.0, loss)


def ahead(runs: Sequence[Mapping[str, Any]], method: str = "recommended") -> list[str]:
    """Return the baselines that are nearer to retraining in JS and in loss at once."""
    ours = closeness(runs, method)
    found = []
    for name in NAMES:
        theirs = closeness(runs, name)
        if theirs is None:
            continue
        if ours is None or all(b > a + AHEAD for a, b in zip(ours, theirs, strict=True)):
            found.append(name)
    return found


def claims(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets and what was reached, over the starts of each network and forget set."""
    found = []
    groups = dict.fromkeys((run["model"], run["forget"]) for run in runs)
    for name, which in groups:
        group = [run for run in runs if (run["model"], run["forget"]) == (name, which)]
        case = {"model": name, "forget": which, "starts": len(group)}
        for quantity, value, least, most in targets(group, which):
            good = value is not None
            good = good and (least is None or value >= least) and (most is None or value <= most)
            limits = {"at_least": least, "at_most": most}
            found.append(
                {
                    **case,
                    "quantity": quantity,
                    "value": value,
                    **{bound: limit for bound, limit in limits.items() if limit is not None},
                    "met": good,
                }
            )
        better = ahead(group)
        found.append(
            {
                **case,
                "quantity": "baselines ahead in JS and loss",
                "value": len(better),
                "at_most": 0,
                "which": better,
                "met": not better,
            }
        )
    return found


def targets(
    group: Sequence[Mapping[str, Any]], which: str
) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return quantity, value, least and most of what "recommended" should reach."""

    def ours(*path: str) -> float | None:
        return mean(group, "recommended", *path)

    def off(key: str) -> float | None:
        """The distance from retraining, on average over the starts."""
        mine, theirs = ours(key), mean(group, "retrained", key)
        return None if mine is None or theirs is None else abs(mine - theirs)

    if which == "mislabelled":
        return [
            ("time", ours("time"), None, BUDGET),
            ("JS gap closed", ours("closed", "js_forget"), 0.95, None),
            ("loss gap closed", ours("closed", "loss_forget"), 0.8, None),
            ("retained accuracy", ours("accuracy_retain"), 0.985, None),
            ("test accuracy off retraining", off("accuracy_test"), None, 0.01),
        ]
    return [
        ("time", ours("time"), None, BUDGET),
        ("membership AUC off retraining", off("mia_auc"), None, 0.02),
        ("loss reached, share of the gap", reached(group, "recommended"), 0.7, 1.3),
        ("retained accuracy", ours("accuracy_retain"), 0.995, None),
        ("test accuracy off retraining", off("accuracy_test"), None, 0.005),
    ]


def reached(group: Sequence[Mapping[str, Any]], method: str) -> float | None:
    """Return how far the deleted loss went, from 0 (before) to 1 (retrained); more: too far."""
    before, after, goal = (
        mean(group, name, "loss_forget") for name in ("no-op", method, "retrained")
    )
    if before is None or after is None or goal is None or goal == before:
        return None
    return (after - before) / (goal - before)


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
            "| | JS | JS gap closed | loss | loss gap closed | accuracy, deleted | retained | test "
            "| membership AUC | time |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        before, floor = (mean(group, each, "js_forget") for each in ("no-op", "retrained"))
        says = before is not None and floor is not None and before - floor >= SMALL * floor
        for method in group[0]["methods"]:
            cells = [
                number(mean(group, method, "js_forget")),
                share(mean(group, method, "closed", "js_forget")) if says else "",
                number(mean(group, method, "loss_forget")),
                share(mean(group, method, "closed", "loss_forget")),
                *(
                    share(mean(group, method, f"accuracy_{part}"), 1)
                    for part in ("forget", "retain", "test")
                ),
                number(mean(group, method, "mia_auc")),
                share(mean(group, method, "time"), 1),
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines += ["", summary(group), ""]
    return "\n".join(lines)


def summary(group: Sequence[Mapping[str, Any]]) -> str:
    """Say which targets "recommended" reached, and which it missed."""
    told: dict[bool, list[str]] = {True: [], False: []}
    for claim in claims(group):
        value = claim["value"]
        if "which" in claim:
            names = ", ".join(claim["which"]) or "none"
            told[claim["met"]].append(f"{claim['quantity']}: {names}")
            continue
        bounds = [
            f"{words} {claim[key]:.3g}"
            for key, words in (("at_least", "at least"), ("at_most", "at most"))
            if key in claim
        ]
        found = "unknown" if value is None else f"{value:.3f}"
        told[claim["met"]].append(f"{claim['quantity']} {found} ({' and '.join(bounds)})")
    starts = "one start" if len(group) == 1 else f"{len(group)} starts"
    reached, missed = ("; ".join(told[met]) or "none" for met in (True, False))
    return f'Targets of "recommended", {starts}. Reached: {reached}. Missed: {missed}.'


def share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
