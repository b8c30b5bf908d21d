"""Methods to compare deletions with: which, and the options that a search chose for each.

`search` tunes them on the development draw of the data (split 0) with the same budget each:
`lcodec_ext.evaluation.tune` tries at most twelve settings of a method on the forget set of that
draw and takes the one nearest to retraining. Epochs are what 5% of a training allows. A network
without a search of its own takes the options of another.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment

BUDGET = 0.05  # of retraining
DEVELOPMENT = 0  # the split that methods are tuned on
RESULTS = environment.ROOT / "benchmarks/results/tuned.json"
#: By network, the one whose options it takes.
TUNED_ON = {"mlp": "mlp", "cnn": "cnn", "resnet": "cnn", "mobilenet": "cnn"}
NAMES = (
    "L-BFGS",
    "fine-tune SGD",
    "fine-tune Adam",
    "gradient ascent",
    "NegGrad+",
    "SCRUB",
    "SSD",
    "SalUn",
    "random labels",
    "bad teacher",
    "CF-k",
    "EU-k",
    "L1-sparse",
)


def allowed_epochs(recipe: Any) -> int:
    return max(1, int(BUDGET * recipe.epochs))


def grids(recipe: Any) -> dict[str, dict[str, Sequence[Any]]]:
    """Return the values to try where those of the package leave the budget."""
    from lcodec_ext.evaluation.tune import GRIDS

    sizes = (recipe.batch_size, 4 * recipe.batch_size)
    found: dict[str, dict[str, Sequence[Any]]] = {
        name: {**GRIDS[name], "batch_size": sizes} for name in NAMES if "batch_size" in GRIDS[name]
    }
    if recipe.n > 2500:
        found["L-BFGS"] = {"n_samples": (2500, 5000), "iterations": (5, 8, 10, 15, 20, 30)}
    else:
        found["L-BFGS"] = {"iterations": (2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 60)}
    return found


def search(name: str, which: str, cache: Path, n_settings: int = 12) -> dict[str, Any]:
    """Tune all methods on the development draw of a network and a forget set."""
    from torch.nn.functional import cross_entropy
    from unlearning_models import RECIPES, task, trained

    from lcodec_ext.evaluation import tune

    recipe = RECIPES[name]
    seed = 3 * DEVELOPMENT if recipe.data == "digits" else DEVELOPMENT
    data = task(name, which, seed)

    def train(samples: Any, own: int) -> Any:
        """The networks that are compared: of everything, and without the forget set."""
        everything = len(samples[1]) == len(data.y)
        return trained(cache, name, which, seed, None if everything else own - 1)

    found = tune(
        train,
        (data.X, data.y),
        data.forget,
        cross_entropy,
        methods=NAMES,
        grids=grids(recipe),
        n_settings=n_settings,
        epochs=allowed_epochs(recipe),
        validation=data.validation,
        weight_decay=recipe.weight_decay,
    )
    print(f"{name}, {which}\n{found}", flush=True)
    return found.to_dict()


def tuned(name: str, which: str, path: Path = RESULTS, best: int | None = None) -> dict[str, Any]:
    """Return the methods with the options that the search chose for a network.

    With `best` only so many: those that came nearest to retraining in the search.
    """
    from unlearning_models import RECIPES

    from lcodec_ext.evaluation.methods import BASELINES, LITERATURE, Baseline

    found = json.loads(path.read_text())["searches"][TUNED_ON[name]][which]
    chosen = found["chosen"]
    nearest = {
        method: min(t["distance"] for t in found["trials"] if t["name"] == method and t["distance"])
        for method in NAMES
        if best is not None
    }
    names = sorted(sorted(nearest, key=nearest.__getitem__)[:best], key=NAMES.index) or NAMES
    known: Mapping[str, Any] = {**BASELINES, **LITERATURE}
    methods = {}
    for method in names:
        run, options = known[method].run, dict(known[method].options)
        if "epochs" in inspect.signature(run).parameters:
            options["epochs"] = allowed_epochs(RECIPES[name])
        methods[method] = Baseline(run, {**options, **chosen[method]})
    return methods
