"""The cost of a deletion from ResNet-18, estimated beforehand and measured.

    python benchmarks/resnet18.py [--quick] [--ways WAY ...] [--cache FOLDER] [--output FILE]

ResNet-18 (11 million parameters, the form for 32 x 32 pixels) learns 1000 images of Fashion-MNIST,
padded to 3 x 32 x 32, twenty of them with wrong labels, which are deleted: with the constants of
"recommended", and within 60 CPU seconds and 2 GB, with validation samples and without.
Each deletion runs in a process of its own, whose peak memory is read, and is compared with two
retrained networks. One thread; seconds are of the CPU, those that max_seconds limits too, so that
other work on the machine does not count. --quick takes a tiny network and noise. With --ways
the others stay in the file as they are.
"""

import argparse
import importlib
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from calibration import measured
from networks import ResNet
from results import SCHEMA
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from lcodec_ext.unlearning import estimate, unlearn

N, WRONG, VALIDATION, TEST, RETRAINED, EPOCHS = 1000, 20, 300, 1000, 2, 5
WEIGHT_DECAY = 5e-4
SECONDS, MEMORY = 60.0, 2_000_000_000  # that a deletion is allowed: CPU seconds of one thread
MOST = 2_000_000_000  # of what is measured, without model, data and libraries
WAYS: dict[str, dict[str, Any]] = {
    "constants": {"damping": 1e-5, "output_damping": 2e-3},
    "bounded": {"max_seconds": SECONDS, "max_memory": MEMORY},
    "bounded, no validation": {"max_seconds": SECONDS, "max_memory": MEMORY},
}
Data = tuple[Tensor, Tensor]


def network(quick: bool) -> nn.Module:
    """ResNet-18, or one like it with very few parameters."""
    return ResNet((4, 4, 6, 8) if quick else (64, 128, 256, 512), 10)


def task(quick: bool) -> tuple[Data, Tensor, Data, Data]:
    """Training samples, which of them are deleted, validation and test samples."""
    generator = torch.Generator().manual_seed(0)
    n, held, tested = (120, 40, 40) if quick else (N, VALIDATION, TEST)
    if quick:
        x, y = torch.rand(200, 1, 8, 8, generator=generator), torch.arange(200) % 10
    else:
        from convex import fashion_mnist

        pixels, labels = fashion_mnist(n + held + tested)
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)
        x = pad((x / float(x.max()) - 0.286) / 0.353, (2, 2, 2, 2))
        y = torch.tensor(labels).long()
    x = x.expand(-1, 3, -1, -1).contiguous()
    train, validation, test = torch.arange(len(y)).split([n, held, tested])
    targets, forget = y[train].clone(), torch.zeros(n, dtype=torch.bool)
    forget[torch.randperm(n, generator=generator)[:WRONG]] = True
    shift = torch.randint(1, 10, (WRONG,), generator=generator)
    targets[forget] = (targets[forget] + shift) % 10
    return (x[train], targets), forget, (x[validation], y[validation]), (x[test], y[test])


def fit(data: Data, seed: int, quick: bool) -> tuple[nn.Module, float]:
    """Train from scratch; the model and CPU seconds."""
    torch.manual_seed(seed)
    begin = time.process_time()
    model, generator = network(quick).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    total, step = EPOCHS * math.ceil(len(data[1]) / 50), 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data[1]), generator=generator).split(50):
            share = min(1.0, (step + 1) / (0.2 * total)) * (1 + math.cos(math.pi * step / total))
            optimizer.param_groups[0]["lr"] = 0.05 * share / 2
            optimizer.zero_grad()
            cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            step += 1
    return model.eval(), time.process_time() - begin


def trained(cache: Path, name: str, data: Data, seed: int, quick: bool) -> tuple[nn.Module, float]:
    """`fit`, or what an earlier one has left in the cache."""
    file = cache / f"{'quick' if quick else 'resnet18'}-{name}.pt"
    if not file.exists():
        model, seconds = fit(data, seed, quick)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save({"seconds": seconds, "state": model.state_dict()}, file)
    kept = torch.load(file, weights_only=True)
    model = network(quick)
    model.load_state_dict(kept["state"])
    return model.eval(), kept["seconds"]


def networks(cache: Path, quick: bool) -> tuple[nn.Module, list[nn.Module], float]:
    """The trained network, those retrained, and what training took."""
    (x, y), forget, _, _ = task(quick)
    model, seconds = trained(cache, "trained", (x, y), 0, quick)
    retain = x[~forget], y[~forget]
    peers = [trained(cache, f"peer{k}", retain, 1 + k, quick)[0] for k in range(RETRAINED)]
    return model, peers, seconds


def use_cpu_clock() -> None:
    """Let the package count seconds of the CPU."""
    for name in ("rates", "estimate", "unlearn", "workplace"):
        module = importlib.import_module(f"lcodec_ext.unlearning.{name}")
        if name == "rates":
            module.clock = lambda model: time.process_time()
        else:
            module.time = type("Time", (), {"perf_counter": staticmethod(time.process_time)})


def present() -> int:
    """Bytes that this process has."""
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])


def peak() -> int:
    """Bytes that this process has had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(way: str, cache: Path, quick: bool) -> dict[str, Any]:
    """A deletion: what was expected, and what it took. Its weights go to the cache."""
    use_cpu_clock()
    data, wanted, validation, _ = task(quick)
    model, training = trained(cache, "trained", data, 0, quick)
    forget, retain = (tuple(t[mask] for t in data) for mask in (wanted, ~wanted))
    options = WAYS[way] | {"weight_decay": WEIGHT_DECAY}
    if "no validation" not in way:
        options["validation"] = validation
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, begin, wall = present(), time.process_time(), time.perf_counter()
        result = unlearn(model, forget, retain, cross_entropy, **options)
        spent, wall, top = time.process_time() - begin, time.perf_counter() - wall, peak()
        expected = estimate(model, forget, retain, cross_entropy, **options)
    torch.save(result.model.state_dict(), deleted(cache, way, quick))
    return {
        "training_seconds": training,
        "expected_seconds": expected.seconds["total"],
        "expected_most_seconds": expected.most_seconds,
        "seconds": spent,
        "wall_seconds": wall,
        "expected_memory": expected.memory,
        "memory": top - before,
        "peak_rss": top,
        "chosen": result.chosen,
        "damping": result.damping,
        "residual": None if math.isnan(result.solve_residual) else result.solve_residual,
        "method": result.solve_method,
        "iterations": result.solve_iterations,
        "skipped": len(result.skipped),
        "phases": result.seconds,
        "calibration": result.calibration and result.calibration.to_dict(),
        "warnings": [str(each.message)[:160] for each in caught],
    }


def deleted(cache: Path, way: str, quick: bool) -> Path:
    """Where the weights after a deletion are."""
    return cache / f"{'quick' if quick else 'resnet18'}-after-{way.replace(', ', '-')}.pt"


def compared(result: dict[str, Any], cache: Path, quick: bool) -> None:
    """Add how near to retraining the deletions came."""
    model, peers, _ = networks(cache, quick)
    data, wanted, _, test = task(quick)
    forget = data[0][wanted], data[1][wanted]
    result["no-op"] = measured(model, forget, test, peers)
    result["retrained"] = [measured(peer, forget, test, peers) for peer in peers]
    for way in result["resnet18"]:
        model.load_state_dict(torch.load(deleted(cache, way, quick), weights_only=True))
        result["resnet18"][way] |= measured(model, forget, test, peers)


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is claimed of the bounded deletions."""
    ways, found = result["resnet18"], []
    most = {"seconds": SECONDS, "memory": MOST, "residual": 1.0, "js": result["no-op"]["js"]}
    if "constants" in ways:
        most["js"] = min(most["js"], ways["constants"]["js"])
    for way in ways.keys() - {"constants"}:
        for name, limit in most.items():
            value = ways[way][name] or 0.0
            claim = {"quantity": f"{way}: {name}", "at_most": limit, "value": value}
            found.append(claim | {"met": value <= limit})
    return sorted(found, key=lambda claim: claim["quantity"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network, and noise")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/lcodec_resnet18"))
    parser.add_argument("--train", action="store_true", help="fill the cache, and stop")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/resnet18.json"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(options.one, options.cache, options.quick)))
        return
    if options.train:
        networks(options.cache, options.quick)
        return
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    ways = known.get("resnet18", {})
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {"quick": options.quick, "n": N, "wrong": WRONG, "epochs": EPOCHS},
        "cases": {},
        "resnet18": ways if known.get("settings", {}).get("quick") == options.quick else {},
    }
    for way in options.ways:
        command = [sys.executable, __file__, "--one", way, "--cache", str(options.cache)]
        command += ["--quick"] * options.quick
        version = environment.commit()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout) | version
        result["resnet18"][way] = found
        print(way, {k: found[k] for k in ("expected_seconds", "seconds", "peak_rss")}, flush=True)
        save(result, options.output)
    compared(result, options.cache, options.quick)
    result["claims"] = claims(result)
    save(result, options.output)


if __name__ == "__main__":
    main()
