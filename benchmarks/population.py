"""Compare populations of unlearned and retrained models: U-LiRA, KLoM, the challenge's epsilon.

    python benchmarks/population.py [--models 64] [--sets mislabelled,random] [--split 2]
        [--processes 1] [--folder FOLDER] [--output FILE]

The network is the digits MLP of unlearning.py, on a draw of samples and forget sets that no setting
was chosen with. For each seed it is trained on everything and again without the forget set. Of the
former delete: the package with validation samples, without them, and with a constant damping; and
of the baselines those five that came nearest to retraining when unlearning.py tuned them, with the
options that it chose. "no-op" leaves it. Each process uses one thread. Trained networks are kept in
the folder, and so is what each seed gave, by commit: a run that was stopped goes on.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment
from unlearning_baselines import RESULTS

NAME = "mlp"
BEST = 5  # baselines: those that came nearest to retraining when they were tuned


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, default=64, help="seeds of each population")
    parser.add_argument("--sets", default="mislabelled,random", help="separated by commas")
    parser.add_argument(
        "--split",
        type=int,
        default=2,
        help="draw of samples and forget sets; 0 and 1 chose settings",
    )
    parser.add_argument("--epochs", type=int, help="of training (default: those of the recipe)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tuned", type=Path, default=RESULTS, help="options of the baselines")
    parser.add_argument(
        "--folder", type=Path, default=environment.ROOT / "benchmarks/output/population"
    )
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/population.json"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(1)
    import unlearning
    from unlearning_models import RECIPES

    recipe = RECIPES[NAME]
    result: dict[str, Any] = {
        "schema": "population-1",
        **environment.heading(),
        "settings": {
            "threads": 1,
            "split": options.split,
            "models": options.models,
            "processes": options.processes,
            "epochs": options.epochs or recipe.epochs,
            "recommended": unlearning.recommended(),
            "recipe": unlearning.recipe_of(recipe),
        },
        "runs": [],
    }
    for which in options.sets.split(","):
        result["runs"].append(measure(which, options))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def train(samples: Any, seed: int, epochs: int | None = None, folder: Path | None = None) -> Any:
    """Train the network as in unlearning.py, or take it from a folder."""
    import torch
    import unlearning_models

    recipe = unlearning_models.RECIPES[NAME]
    plain = dataclasses.replace(recipe, network=str(recipe.network()))  # type: ignore[arg-type]
    digest = hashlib.sha256(repr((plain, epochs, torch.__version__)).encode())
    for tensor in samples:
        digest.update(tensor.numpy().tobytes())
    path = folder and folder / f"{seed}-{digest.hexdigest()[:12]}.pt"
    if path and path.exists():
        model = recipe.network()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model, _ = unlearning_models.train(NAME, *samples, seed, epochs)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        torch.save(model.state_dict(), temporary)
        os.replace(temporary, path)
    return model


def methods(which: str, validation: Any, tuned: Path) -> dict[str, Any]:
    """Return what deletes."""
    from unlearning_baselines import tuned as with_options

    return {
        "recommended": {"validation": validation},
        "recommended, no validation": {},
        "constant damping": {"damping": 1e-3, "output_damping": 0.0},
        **with_options(NAME, which, tuned, BEST),
    }


def measure(which: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the populations of one forget set, print the table, and return its numbers."""
    from torch.nn.functional import cross_entropy
    from unlearning_models import RECIPES, task

    from lcodec_ext.evaluation import evaluate_population

    known = environment.commit()
    parts = [NAME, which, options.split, options.epochs or "all", str(known["commit"])[:10]]
    parts += ["changed"] * bool(known["dirty"])
    # Draws of the digits in unlearning.py have the seeds 3 split + start.
    data = task(NAME, which, 3 * options.split)
    begin = time.perf_counter()
    warnings.simplefilter("ignore", UserWarning)  # that a deletion is not calibrated
    found = evaluate_population(
        functools.partial(train, epochs=options.epochs, folder=options.folder / "trained"),
        methods(which, data.validation, options.tuned),
        (data.X, data.y),
        data.forget,
        data.test,
        cross_entropy,
        n_models=options.models,
        processes=options.processes,
        directory=options.folder / "-".join(map(str, parts)),
        weight_decay=RECIPES[NAME].weight_decay,
    )
    print(f"{NAME}, {which}\n{found}", flush=True)
    return {
        "model": NAME,
        "forget": which,
        "seconds": time.perf_counter() - begin,
        **found.to_dict(),
    }


COLUMNS = (
    ("U-LiRA AUC", "ulira_auc", ".3f"),
    ("TPR at 1% FPR", "ulira_tpr", ".1%"),
    ("KLoM, deleted", "klom_forget", ".2f"),
    ("KLoM, retained", "klom_retain", ".2f"),
    ("KLoM, test", "klom_test", ".2f"),
    ("median epsilon", "epsilon", ".2f"),
    ("forgetting quality", "forgetting_quality", ".3f"),
    ("challenge score", "challenge_score", ".3f"),
    ("accuracy, deleted", "accuracy_forget", ".1%"),
    ("test", "accuracy_test", ".1%"),
)


def tables(result: dict[str, Any]) -> str:
    """Return a Markdown table for each forget set."""
    lines = []
    for run in result["runs"]:
        lines += [
            f"**Digits MLP, {run['n_forget']} {run['forget']} samples deleted, populations of "
            f"{run['n_models']} models**",
            "",
            f"| | {' | '.join(name for name, _, _ in COLUMNS)} |",
            f"|---|{'--:|' * len(COLUMNS)}",
        ]
        for method in run["methods"]:
            cells = [shown(method["scores"][key], form) for _, key, form in COLUMNS]
            lines.append(f"| {method['name']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def shown(value: float | None, form: str) -> str:
    """Return a number; infinite ones are null in a file."""
    return "infinite" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
