"""EK-FAC in large networks, and as a preconditioner of conjugate gradients.

    python benchmarks/ekfac.py [--quick] [--parts PART ...] [--cache FOLDER] [--output FILE]

"preconditioner": systems with the Gauss-Newton matrix of the Fashion-MNIST CNN of
benchmarks/unlearning.py, on a tenth of its units and on all of them, by conjugate gradients without
a preconditioner, with the diagonal, and with EK-FAC of the same samples.

"resnet50", "vit": transformers' ResNet-50 (23.7 million parameters) and a ViT-small (384 wide, 12
layers, 21.4 million), with random weights, 100 classes and images of noise, 64 x 64 pixels: the
time of each phase and the peak memory of one deletion by EK-FAC, with the retained samples and
without them (from statistics that were saved), and a product with the Gauss-Newton matrix of a
twentieth of the units beside that of curvlinops. Each runs in a process of its own.

One thread; seconds are of the CPU, so that other work on the machine does not count. --quick takes
tiny networks.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from resnet18 import peak, present, use_cpu_clock
from results import SCHEMA
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lcodec_ext.curvature import EKFACOperator, GaussNewtonOperator, UnitSelection
from lcodec_ext.unlearning import TrainingStatistics, unlearn

PARTS = ("preconditioner", "resnet50", "vit")
RUNS = ("retained", "statistics", "products")  # of a large network
FORGET, RETAIN, CLASSES, BATCH = 8, 32, 100, 8
DAMPINGS = (1e-1, 1e-2, 1e-3)
RTOLS = (1e-1, 1e-3)
SAMPLES, MOST = 256, 150  # of a system, and iterations
DELETION: dict[str, Any] = {
    "curvature": "ekfac",
    "weight_decay": 1e-4,
    "finish": 0,
    "batch_size": BATCH,
    "max_drop": None,
    "calibrate": False,
}
#: For a network that has learnt nothing; a step with less makes the outputs of ResNet-50 infinite.
DAMPED = {"vit": 0.01, "resnet50": 1.0}
Solve = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------------
# A preconditioner


def preconditioned(
    product: Solve, b: Tensor, inverse: Solve, rtols: tuple[float, ...]
) -> dict[float, int | None]:
    """Iterations of conjugate gradients to each relative residual; None beyond the most."""
    x, r = torch.zeros_like(b), b.clone()
    z = inverse(r)
    d, rho = z.clone(), r @ z
    found: dict[float, int | None] = dict.fromkeys(rtols)
    for k in range(1, MOST + 1):
        q = product(d)
        alpha = rho / (d @ q)
        x, r = x + alpha * d, r - alpha * q
        for rtol in rtols:
            if found[rtol] is None and r.norm() <= rtol * b.norm():
                found[rtol] = k
        if all(found.values()):
            break
        z = inverse(r)
        rho, last = r @ z, rho
        d = z + (rho / last) * d
    return found


def systems(cache: Path, quick: bool) -> list[dict[str, Any]]:
    """Iterations and seconds for each selection, damping and preconditioner."""
    model, X, y = cnn(cache, quick)
    every = UnitSelection.all(model)
    some = UnitSelection({name: units[::10] for name, units in every.units.items()})
    rows = []
    for which, selection in (("a tenth of the units", some), ("all units", every)):
        system = System(model, X, y, selection)
        rows += [
            {"selection": which, "parameters": len(system.b), "damping": damping}
            | {"preconditioner": way}
            | system.solved(way, damping)
            for damping in DAMPINGS
            for way in ("none", "diagonal", "EK-FAC")
        ]
    return rows


class System:
    """A Gauss-Newton matrix, its preconditioners, and a gradient of some samples."""

    def __init__(self, model: nn.Module, X: Tensor, y: Tensor, selection: UnitSelection) -> None:
        begin = time.process_time()
        self.kronecker = EKFACOperator(model, cross_entropy, (X, y), selection)
        middle = time.process_time()
        self.exact = GaussNewtonOperator(model, cross_entropy, (X, y), selection)
        between = time.process_time()
        self.diagonal = self.exact.diagonal()
        self.made = {
            "none": 0.0,
            "diagonal": time.process_time() - between,
            "EK-FAC": middle - begin,
        }
        model.zero_grad()
        cross_entropy(model(X[:20]), y[:20].roll(1)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.b = selection.gather(grads, model=model)

    def solved(self, way: str, damping: float) -> dict[str, Any]:
        """Iterations and seconds of a solve."""

        def inverse(r: Tensor) -> Tensor:
            if way == "EK-FAC":
                return self.kronecker.solve_shifted(r, damping)
            return r if way == "none" else r / (self.diagonal + damping)

        begin = time.process_time()
        found = preconditioned(lambda v: self.exact @ v + damping * v, self.b, inverse, RTOLS)
        return {
            "iterations": {str(rtol): found[rtol] for rtol in RTOLS},
            "seconds": time.process_time() - begin,
            "seconds_to_make": self.made[way],
        }


def cnn(cache: Path, quick: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained network, and samples of its training."""
    if quick:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        return model.eval(), torch.randn(40, 1, 8, 8), torch.arange(40) % 10
    from unlearning_models import task, trained

    data = task("cnn", "mislabelled", 0)
    model = trained(cache, "cnn", "mislabelled", 0, None)
    return model, data.X[:SAMPLES], data.y[:SAMPLES]


def won(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds to the smallest residual with EK-FAC, as a share of the best other way's."""
    found = []
    for which in dict.fromkeys(row["selection"] for row in rows):
        for damping in DAMPINGS:
            taken = {
                row["preconditioner"]: row["seconds"] + row["seconds_to_make"]
                for row in rows
                if (row["selection"], row["damping"]) == (which, damping)
                and row["iterations"][str(RTOLS[-1])] is not None
            }
            others = [seconds for way, seconds in taken.items() if way != "EK-FAC"]
            share = taken["EK-FAC"] / min(others) if "EK-FAC" in taken and others else None
            found.append({"selection": which, "damping": damping, "share_of_seconds": share})
    return found


# ---------------------------------------------------------------------------------------------
# Large networks


def network(part: str, quick: bool) -> nn.Module:
    """The network, with random weights."""
    import transformers

    torch.manual_seed(0)
    if part == "vit":
        width, layers = (16, 1) if quick else (384, 12)
        config = transformers.ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 8 if quick else 6,
            intermediate_size=4 * width,
            image_size=64,
            patch_size=8,
            num_labels=CLASSES,
        )
        return transformers.ViTForImageClassification(config).eval()
    small = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]} if quick else {}
    config = transformers.ResNetConfig(num_labels=CLASSES, **small)
    return settled(transformers.ResNetForImageClassification(config)).eval()


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """With the batch norms' running statistics of images; with the initial ones outputs explode."""
    pixels = torch.stack([sample["pixel_values"] for sample in noise(32, 5)])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over the passes
    model.train()(pixel_values=pixels)
    for norm in norms:
        norm.momentum = 0.1
    return model


def noise(n: int, seed: int) -> list[dict[str, Any]]:
    """Images of noise, with labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, 64, 64, generator=generator)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return [
        {"pixel_values": x, "labels": int(label)}
        for x, label in zip(pixels, labels.tolist(), strict=True)
    ]


def deletion(part: str, run: str, quick: bool) -> dict[str, Any]:
    """A deletion: seconds of its phases, and memory."""
    model, forget, retain = network(part, quick), noise(FORGET, 1), noise(RETAIN, 2)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    options = DELETION | {"damping": DAMPED[part]}
    before, begin = present(), time.process_time()
    if run == "statistics":
        statistics = TrainingStatistics.collect(
            model, forget + retain, cross_entropy, curvature="ekfac", batch_size=BATCH
        )
        found |= {
            "collect_seconds": time.process_time() - begin,
            "collect_memory": peak() - before,
        }
        options["statistics"] = statistics
        begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a network that has learnt nothing
        given = None if run == "statistics" else retain
        result = unlearn(model, forget, given, cross_entropy, **options)
    return found | {
        "seconds": time.process_time() - begin,
        "phases": result.seconds,
        "memory": peak() - before,
        "method": result.solve_method,
        "selected_parameters": result.selection.size(model),
        "loss_forget": [result.loss_forget.before, result.loss_forget.after],
    }


def products(part: str, quick: bool) -> dict[str, Any]:
    """A product with the Gauss-Newton matrix of a twentieth of the units, and of curvlinops."""
    import numpy as np
    from peers import curvlinops_product

    use = network(part, quick)
    model = Logits(use)
    samples = noise(BATCH, 3)
    X = torch.stack([sample["pixel_values"] for sample in samples])
    y = torch.tensor([sample["labels"] for sample in samples])
    every = UnitSelection.all(model)
    chosen = UnitSelection({name: units[::20] for name, units in every.units.items()})
    operator = GaussNewtonOperator(model, cross_entropy, (X, y), chosen)
    v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(4))
    own, peer = [], []
    expected = np.empty(0)
    for _ in range(2):
        begin = time.process_time()
        got = operator @ v
        own.append(time.process_time() - begin)
        begin = time.process_time()
        expected = curvlinops_product(
            "Gauss-Newton", model, nn.CrossEntropyLoss(), X, y, chosen, v.numpy(), 1
        )
        peer.append(time.process_time() - begin)
    off = np.linalg.norm(got.numpy() - expected) / np.linalg.norm(expected)
    return {
        "selected_parameters": len(v),
        "seconds": min(own),
        "curvlinops_seconds": min(peer),
        "relative_difference": float(off),
    }


class Logits(nn.Module):
    """A model of transformers that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixels).logits
        return logits


def apart(part: str, run: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--one", part, run, "--cache", str(options.cache)]
    command += ["--quick"] * options.quick
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | environment.commit()


def one(part: str, run: str, options: argparse.Namespace) -> Any:
    """What a process of its own computes."""
    if part == "preconditioner":
        rows = systems(options.cache, options.quick)
        return {"systems": rows, "won": won(rows)}
    if run == "products":
        return products(part, options.quick)
    return deletion(part, run, options.quick)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny networks")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cache", type=Path, default=environment.ROOT / "benchmarks/output/trained"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/ekfac.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        use_cpu_clock()
        print(json.dumps(one(*options.one, options)))
        return
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    same = known.get("settings", {}).get("quick") == options.quick
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {
            "quick": options.quick,
            "forget": FORGET,
            "retain": RETAIN,
            "batch": BATCH,
            "classes": CLASSES,
            "samples_of_a_system": SAMPLES,
            "deletion": DELETION | {"damping": DAMPED},
        },
        "cases": {},
        "ekfac": known.get("ekfac", {}) if same else {},
    }
    for part in options.parts:
        for run in RUNS if part != "preconditioner" else ("systems",):
            result["ekfac"].setdefault(part, {})[run] = apart(part, run, options)
            save(result | {"load_after": environment.load()}, options.output)
            print(part, run, flush=True)


if __name__ == "__main__":
    main()
