"""Rank samples with wrong labels by influence, and compare influences with leaving samples out.

    python benchmarks/influence.py [--networks mlp adamw ...] [--seeds 10 11 ...] [--output FILE]

A tenth of the training samples get a wrong label, drawn evenly from the others; a network learns
from all. Then every training sample gets a score: its loss, its self-influence (by EK-FAC on all
parameters, and by the Gauss-Newton matrix of the last layer), and minus its influence on the mean
loss of 300 validation samples. The record has the area under the ROC curve of the wrong labels for
each score (random scores have .5), and the share of wrong labels among as many samples of the
highest scores as there are wrong labels. The samples that self-influence ranks highest are deleted,
by default settings, and test accuracy is measured before and after.

`leave_one_out` compares influences on 20 samples, and self-influences, with Newton trainings to
rounding without single samples, of softmax regressions.

The default damping and curvature were chosen with seeds 0 to 2 of the first three networks. A
record that was stopped goes on with the trainings it lacks. `--table FILE` prints the tables of
docs/models.md.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import calibration
import convex
import torch
from ordinary_models import RECIPES, Data, digits, docstrings, fashion, fit, pool
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lcodec_ext.curvature import UnitSelection
from lcodec_ext.unlearning import Unlearner, influence, self_influence

SHARE = 0.1  # of wrong labels
VALIDATION = 300
SEEDS = (10, 11, 12, 13, 14)
#: Title, data, training samples, weight decay of the objective (AdamW's is none).
NETWORKS: dict[str, tuple[str, Any, int, float]] = {
    "mlp": ("digits, perceptron, SGD, 300 epochs", digits, 1000, 5e-4),
    "adamw": (RECIPES["adamw"].title, digits, 1000, 0.0),
    "augmented": (RECIPES["augmented"].title, fashion, 3000, 0.0),
    "distilbert": (RECIPES["distilbert"].title, docstrings, 2500, 0.0),
}
SCORES = ("loss", "self-influence", "self-influence, last layer", "influence on validation")


def task(name: str, seed: int) -> tuple[Data, Tensor, Data, Data]:
    """Training samples, which of them have a wrong label, validation and test samples."""
    _, made, n, _ = NETWORKS[name]
    (x, y), generator = pool(made).data, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train, validation, rest = order.split([n, VALIDATION, len(y) - n - VALIDATION])
    targets, classes = y[train].clone(), int(y.max()) + 1
    some = torch.randperm(n, generator=generator)[: int(SHARE * n)]
    shift = torch.randint(1, classes, (len(some),), generator=generator)
    targets[some] = (targets[some] + shift) % classes
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[some] = True
    test = pool(made).test or (x[rest], y[rest])
    return (x[train], targets), wrong, (x[validation], y[validation]), test


def trained(name: str, data: Data, seed: int) -> nn.Module:
    if name == "mlp":
        return calibration.fit("mlp", data, seed, calibration.EPOCHS["mlp"])
    return fit(RECIPES[name], data, seed)


def last_layer(model: nn.Module) -> UnitSelection:
    layers = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.Linear)]
    name, layer = layers[-1]
    return UnitSelection({name: range(layer.out_features)})


def scores(model: nn.Module, data: Data, validation: Data, decay: float) -> dict[str, Any]:
    """Every score of every training sample, the higher the more suspicious, and CPU seconds."""
    found: dict[str, Any] = {}

    def scored(name: str, values: Any) -> None:
        begin = time.process_time()
        found[name] = values().double(), time.process_time() - begin

    def losses() -> Tensor:
        with torch.no_grad():
            parts = [
                cross_entropy(model(x), y, reduction="none")
                for x, y in zip(data[0].split(256), data[1].split(256), strict=True)
            ]
        return torch.cat(parts)

    options = {"weight_decay": decay}
    exact = {"curvature": "gauss_newton", "selection": last_layer(model), **options}
    scored("loss", losses)
    scored("self-influence", lambda: self_influence(model, data, cross_entropy, **options).values)
    scored(
        "self-influence, last layer",
        lambda: self_influence(model, data, cross_entropy, **exact).values,
    )
    scored(
        "influence on validation",
        lambda: -influence(model, data, validation, cross_entropy, aggregate=True, **options).mean,
    )
    return found


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    parts = zip(data[0].split(1000), data[1].split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return right / len(data[1])


def record(name: str, seed: int) -> dict[str, Any]:
    """One training: how well each score finds the wrong labels, and what their deletion does."""
    from sklearn.metrics import roc_auc_score

    data, wrong, validation, test = task(name, seed)
    begin = time.process_time()
    model = trained(name, data, 1000 * seed)
    m, decay = int(wrong.sum()), NETWORKS[name][3]
    found: dict[str, Any] = {
        "network": name,
        "seed": seed,
        "n": len(wrong),
        "wrong": m,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": time.process_time() - begin,
        "accuracy_train": accuracy(model, data),
        "scores": {},
    }
    every = scores(model, data, validation, decay)
    for each, (values, seconds) in every.items():
        found["scores"][each] = {
            "auc": float(roc_auc_score(wrong, values)),
            "precision": float(wrong[values.topk(m).indices].double().mean()),
            "seconds": seconds,
        }
    numbers = every["self-influence"][0].topk(m).indices.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stream = Unlearner(model, data, cross_entropy, validation=validation, weight_decay=decay)
        begin = time.process_time()
        stream.remove(numbers)
    found["deletion"] = {
        "samples": m,
        "accuracy_test_before": accuracy(model, test),
        "accuracy_test_after": accuracy(stream.model, test),
        "seconds": time.process_time() - begin,
    }
    return found


def agreement(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Correlation, and the slope of the least-squares line through 0."""
    r = torch.corrcoef(torch.stack([predicted.flatten(), true.flatten()]))[0, 1]
    slope = (predicted * true).sum() / predicted.square().sum()
    return {"correlation": float(r), "slope": float(slope)}


def leave_one_out(count: int = 40) -> list[dict[str, Any]]:
    """Influences of evenly spaced samples of convex models, and trainings without them."""
    found = []
    for name, x, y, classes in convex.data_sets(quick=True):
        regression = convex.Regression(x, y, classes)
        n, w = len(y), regression.trained

        def losses(w: Tensor, of: convex.Regression = regression) -> Tensor:
            return cross_entropy(of.rows @ w.T, of.y, reduction="none")

        numbers = list(range(0, n, n // count))
        everyone, before = torch.arange(n), losses(w)
        true = torch.stack(
            [losses(regression.fit(everyone[everyone != k], w)) - before for k in numbers], 1
        )
        data = regression.x, regression.y
        for curvature in ("gauss_newton", "ekfac"):
            options = {
                "curvature": curvature,
                "damping": 0.0,
                "weight_decay": convex.LAMBDA,
            }
            queries = data[0][:20], data[1][:20]
            model = regression.module()
            pairs = influence(model, data, queries, cross_entropy, rtol=1e-8, **options)
            own = self_influence(model, data, cross_entropy, **options)
            found.append(
                {
                    "data": name,
                    "n": n,
                    "parameters": w.numel(),
                    "curvature": curvature,
                    "samples": len(numbers),
                    "influence": agreement(pairs.values[:, numbers], true[:20]),
                    "self_influence": agreement(own.values[numbers], true[numbers].diagonal()),
                }
            )
            print(found[-1], flush=True)
    return found


def summary(trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each network the mean, least and largest of what was found."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(each["network"] for each in trainings):
        some = [each for each in trainings if each["network"] == name]
        before, after = (
            [each["deletion"][f"accuracy_test_{when}"] for each in some]
            for when in ("before", "after")
        )
        found[name] = {
            "title": NETWORKS[name][0],
            "trainings": len(some),
            **{
                score: {
                    what: _spread([each["scores"][score][what] for each in some])
                    for what in ("auc", "precision", "seconds")
                }
                for score in SCORES
            },
            "self_influence_over_loss": _spread(
                [
                    each["scores"]["self-influence"]["auc"] - each["scores"]["loss"]["auc"]
                    for each in some
                ]
            ),
            "accuracy_test_before": _spread(before),
            "accuracy_test_after": _spread(after),
            "accuracy_test_rose": sum(b < a for b, a in zip(before, after, strict=True)),
        }
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "least": min(values), "largest": max(values)}


def tables(result: dict[str, Any]) -> list[str]:
    """Of leaving one out, and of wrong labels, as docs/models.md has them."""
    lines = [
        "| data | samples, parameters | curvature | influence: r | slope | self-influence: r "
        "| slope |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    for each in result["leave_one_out"]:
        cells = [each["data"], f"{each['n']:,}, {each['parameters']}", each["curvature"]]
        for name in ("influence", "self_influence"):
            cells += [f"{each[name]['correlation']:.4f}", f"{each[name]['slope']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    first = "\n".join(lines)
    lines = [
        "| network | trainings | loss | self-influence | its last layer | influence on validation "
        "| test accuracy before | after deletion |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in result["summary"].values():
        cells = [each["title"], str(each["trainings"])]
        cells += [f"{each[score]['auc']['mean']:.3f}" for score in SCORES]
        cells += [f"{each[f'accuracy_test_{when}']['mean']:.1%}" for when in ("before", "after")]
        lines.append(f"| {' | '.join(cells)} |")
    return [first, "\n".join(lines)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=NETWORKS)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    output = environment.ROOT / "benchmarks/output/influence.json"
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--table", type=Path, help="print the tables of a record")
    options = parser.parse_args(arguments)
    if options.table is not None:
        print("\n\n".join(tables(json.loads(options.table.read_text()))))
        return 0
    torch.set_num_threads(1)
    if options.output.exists():
        result: dict[str, Any] = json.loads(options.output.read_text())
    else:
        result = {
            "schema": "influence-1",
            **environment.heading(),
            "leave_one_out": leave_one_out(),
            "trainings": [],
        }
    known = {(each["network"], each["seed"]) for each in result["trainings"]}
    for seed in options.seeds:
        for name in options.networks:
            if (name, seed) in known:
                continue
            result["trainings"].append(found := record(name, seed))
            aucs = {k: round(v["auc"], 4) for k, v in found["scores"].items()}
            print(name, seed, aucs, found["deletion"], flush=True)
            result["summary"] = summary(result["trainings"])
            save(result, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
