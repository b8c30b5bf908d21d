"""Compare a Newton removal from regularised softmax regressions with dense algebra and retraining.

    python benchmarks/convex.py [--quick] [--output FILE]

For each data set and number of removed samples, the result says how far the step of `unlearn` is
from the dense exact step, how far it is from the retrained weights, and after how many steps it
reaches them. Then it compares the influence of single samples with training without them.
Fashion-MNIST is read from the Debian package dataset-fashion-mnist.
"""

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import environment

LAMBDA = 0.01
REMOVED = (1, 20, 150)
FASHION = Path("/usr/share/datasets/fashion-mnist")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the small data sets only")
    parser.add_argument(
        "--output", type=Path, default=environment.ROOT / "benchmarks/output/convex.json"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(environment.cores())
    result: dict[str, Any] = {
        "schema": "convex-1",
        **environment.heading(),
        "settings": {"weight_decay": LAMBDA, "curvature": "hessian", "damping": 0.0},
        "removals": [],
        "influence": [],
    }
    sets = data_sets(options.quick)
    for name, x, y, classes in sets:
        regression = Regression(x, y, classes)
        for m in REMOVED:
            if m < len(y) // 3:
                result["removals"].append({"data": name, "n": len(y), **removal(regression, m)})
                print(result["removals"][-1], flush=True)
        if len(y) <= 500:
            result["influence"].append({"data": name, "n": len(y), **influence(regression)})
            print(result["influence"][-1], flush=True)
    result["claims"] = claims(result)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    for claim in result["claims"]:
        print(claim)
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


def data_sets(quick: bool) -> list[tuple[str, Any, Any, int]]:
    import numpy as np
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine

    found = []
    for name, load, n in (
        ("wine", load_wine, 178),
        ("breast cancer", load_breast_cancer, 455),
        ("digits", load_digits, 1500),
    ):
        x, y = load(return_X_y=True)
        rows = np.random.default_rng(0).permutation(len(y))[:n]
        x, y = x[rows], y[rows]
        x = x / 16 if name == "digits" else (x - x.mean(0)) / x.std(0)
        found.append((name, x, y, int(y.max()) + 1))
    if not quick:
        pixels, labels = fashion_mnist(2000)
        found.append(("Fashion-MNIST", pixels, labels, 10))
    return found


def fashion_mnist(n: int) -> tuple[Any, Any]:
    """Return the first n training images, as rows of pixels from 0 to 1, and their labels."""
    import numpy as np

    files = [FASHION / f"train-{kind}.gz" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if not all(file.exists() for file in files):
        raise SystemExit(
            f"{files[0]} was not found: apt-get install dataset-fashion-mnist, or use --quick"
        )
    images, labels = (gzip.decompress(file.read_bytes()) for file in files)
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 784)[:n] / 255.0
    return pixels, np.frombuffer(labels, np.uint8, offset=8)[:n].astype(np.int64)


class Regression:
    """Softmax regression with a bias, by dense algebra in float64."""

    def __init__(self, x: Any, y: Any, classes: int) -> None:
        import torch

        self.x, self.y, self.classes = torch.as_tensor(x), torch.as_tensor(y), classes
        self.rows = torch.cat([self.x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        zero = torch.zeros(classes, self.rows.shape[1], dtype=torch.float64)
        self.trained = self.fit(slice(None), zero)

    def gradient_sum(self, w: Any, some: Any) -> Any:
        import torch

        rows, y = self.rows[some], self.y[some]
        p = (rows @ w.T).softmax(1)
        return (p - torch.eye(self.classes, dtype=torch.float64)[y]).T @ rows

    def hessian(self, w: Any, some: Any) -> Any:
        import torch

        rows = self.rows[some]
        p = (rows @ w.T).softmax(1)
        c, d = w.shape
        full = torch.empty(c, d, c, d, dtype=torch.float64)
        for i in range(c):
            for j in range(i, c):
                weight = p[:, i] * (float(i == j) - p[:, j])
                full[i, :, j] = rows.T @ (weight[:, None] * rows) / len(rows)
                full[j, :, i] = full[i, :, j].T
        return full.reshape(c * d, c * d) + LAMBDA * torch.eye(c * d, dtype=torch.float64)

    def objective(self, w: Any, some: Any) -> float:
        import torch.nn.functional as F

        loss = F.cross_entropy(self.rows[some] @ w.T, self.y[some])
        return float(loss + LAMBDA / 2 * w.square().sum())

    def fit(self, some: Any, w: Any) -> Any:
        """Train by Newton's method, down to rounding."""
        import torch

        for _ in range(50):
            gradient = self.gradient_sum(w, some) / len(self.rows[some]) + LAMBDA * w
            if float(gradient.norm()) < 1e-12:
                return w
            step = torch.linalg.solve(self.hessian(w, some), gradient.flatten()).view_as(w)
            length, before = 1.0, self.objective(w, some)
            while self.objective(w - length * step, some) > before + 1e-13:
                length /= 2
            w = w - length * step
        raise AssertionError("Newton's method did not converge")

    def module(self) -> Any:
        import torch
        from torch import nn

        model = nn.Linear(self.x.shape[1], self.classes).double()
        with torch.no_grad():
            model.weight.copy_(self.trained[:, :-1])
            model.bias.copy_(self.trained[:, -1])
        return model

    def unlearn(self, removed: Any, rest: Any, **options: Any) -> tuple[Any, Any]:
        import torch
        from torch.nn.functional import cross_entropy

        from lcodec_ext.unlearning import Settings, unlearn

        result = unlearn(
            self.module(),
            (self.x[removed], self.y[removed]),
            (self.x[rest], self.y[rest]),
            cross_entropy,
            preset=Settings(curvature="hessian", damping=0.0, weight_decay=LAMBDA),
            **options,
        )
        new = result.model
        return result, torch.cat([new.weight, new.bias[:, None]], 1).detach()


def removal(regression: Regression, m: int) -> dict[str, Any]:
    import torch

    some, rest = slice(None, m), slice(m, None)
    n_rest = len(regression.y) - m
    w = regression.trained
    begin = time.perf_counter()
    gradient = (regression.gradient_sum(w, some) + m * LAMBDA * w) / n_rest
    step = torch.linalg.solve(regression.hessian(w, rest), gradient.flatten()).view_as(w)
    dense = time.perf_counter() - begin
    retrained = regression.fit(rest, w)
    begin = time.perf_counter()
    result, weights = regression.unlearn(some, rest)
    seconds = time.perf_counter() - begin
    no_op = float((w - retrained).norm())
    reached, error = 0, no_op
    for steps in range(1, 9):
        _, repeated = regression.unlearn(some, rest, steps=steps)
        error = float((repeated - retrained).abs().max())
        if error < 1e-8:
            reached = steps
            break
    return {
        "m": m,
        "parameters": w.numel(),
        "off_exact_step": float((weights - w - step).norm() / step.norm()),
        "solve": result.solve_method,
        "iterations": result.solve_iterations,
        "residual": result.solve_residual,
        "distance_to_retraining": float((weights - retrained).norm()) / no_op,
        "steps_to_1e-8": reached,
        "error_then": error,
        "seconds": seconds,
        "seconds_dense": dense,
    }


def influence(regression: Regression, count: int = 60) -> dict[str, Any]:
    """Change of a sample's own loss when it is left out: predicted by a step, and by training."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    n = len(regression.y)
    true, predicted = [], []
    for k in np.linspace(0, n - 1, count).astype(int).tolist():
        rest = [i for i in range(n) if i != k]
        retrained = regression.fit(torch.tensor(rest), regression.trained)
        row, target = regression.rows[[k]], regression.y[[k]]
        before = float(F.cross_entropy(row @ regression.trained.T, target))
        true.append(float(F.cross_entropy(row @ retrained.T, target)) - before)
        result, _ = regression.unlearn([k], rest)
        predicted.append(result.loss_forget.after - before)
    return {"samples": count, "correlation": float(np.corrcoef(true, predicted)[0, 1])}


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    rows = result["removals"]
    values = {
        "one step, off the dense exact one": (max(r["off_exact_step"] for r in rows), 1e-8),
        "repeated steps, off the retrained weights": (max(r["error_then"] for r in rows), 1e-8),
        "1 - correlation of influence with leaving one out": (
            1 - min(r["correlation"] for r in result["influence"]),
            0.01,
        ),
    }
    return [
        {"quantity": name, "value": value, "at_most": limit, "met": value <= limit}
        for name, (value, limit) in values.items()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
