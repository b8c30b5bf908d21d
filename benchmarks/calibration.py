"""Deletions with control groups on networks whose settings were chosen elsewhere.

    python benchmarks/calibration.py [--quick] [--seeds 10 11 ...] [--output FILE]

Small networks learn scikit-learn's digits: a convolutional one with batch norm and dropout by
AdamW, a small vision transformer by AdamW, a perceptron by SGD with coupled weight decay. The
samples of a few pseudo-users (runs of twelve in the data set, which is in the order of its
writers), random ones, or ones with wrong labels are deleted: with the constants of "recommended"
("before"), with a cautious constant ("uncalibrated"), and calibrated by 300 validation samples; for
users' samples also with control groups of other users ("calibrated by users").
Each case is compared with three retrained networks. Constants of the procedure were chosen on seeds
0 to 2; seeds from 10 on judge it.
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from results import SCHEMA
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from lcodec_ext.unlearning import unlearn

RETRAINED = 3
N, VALIDATION = 1000, 300
WAYS = {
    "before": {"damping": 1e-5, "output_damping": 2e-3},
    "uncalibrated": {"damping": 0.03, "output_damping": 0.0},
    "calibrated": {"calibrate": True, "validation": None},  # filled in
}
BY_USERS = "calibrated by users"  # the same with control groups of other users


def cnn() -> nn.Module:
    """Two convolutions with batch norm, two fully connected layers with dropout."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    """64 - 128 - 10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        shape = n, tokens, 3, self.heads, width // self.heads
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Sixteen patches of 2 x 2, two blocks of width 32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, width, 2, 2), nn.Linear(16, width)
        self.register_buffer("each", torch.eye(16))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2) + self.places(self.each)
        return self.head(self.norm(self.blocks(x)).mean(1))


NETWORKS = {"cnn": cnn, "mlp": mlp, "vit": ViT}
WEIGHT_DECAY = {"cnn": 0.0, "mlp": 5e-4, "vit": 0.0}  # AdamW's is no part of an objective
EPOCHS = {"cnn": 12, "mlp": 300, "vit": 25}
CASES = ("cnn users", "cnn wrong", "mlp random", "mlp wrong", "vit 15", "vit 40")
Data = tuple[Tensor, Tensor]


def task(name: str, seed: int) -> tuple[Data, Tensor, Tensor, Data, Data]:
    """Training samples, their users, which of them are deleted, validation and test samples."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    users = torch.arange(len(y)) // 12
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train, validation, test = order.split([N, VALIDATION, len(y) - N - VALIDATION])
    targets, kind = y[train].clone(), name.split()[1]
    if kind == "users":
        some = torch.randperm(int(users.max()) + 1, generator=generator)[: 3 + seed % 3]
        forget = torch.isin(users[train], some)
    else:
        m = {"random": 100, "wrong": 40}.get(kind) or int(kind)
        drawn = torch.randperm(N, generator=generator)[:m]
        forget = torch.zeros(N, dtype=torch.bool)
        forget[drawn] = True
        if kind == "wrong":
            shift = torch.randint(1, 10, (m,), generator=generator)
            targets[drawn] = (targets[drawn] + shift) % 10
    held, unseen = ((x[some], y[some]) for some in (validation, test))
    return (x[train], targets), users[train], forget, held, unseen


def fit(network: str, data: Data, seed: int, epochs: int) -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(seed)
    model, generator = NETWORKS[network](), torch.Generator().manual_seed(seed)
    rate = {"cnn": 2e-3, "mlp": 0.1, "vit": 3e-3}[network]
    optimizer: torch.optim.Optimizer
    if network == "mlp":
        decay = WEIGHT_DECAY[network]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    total, step = epochs * math.ceil(len(data[1]) / 32), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(32):
            if network != "cnn":
                for group in optimizer.param_groups:
                    group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.zero_grad()
            cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def measured(
    model: nn.Module, forget: Data, test: Data, peers: list[nn.Module]
) -> dict[str, float]:
    """Loss of the deleted samples, test accuracy, distance of outputs to retrained networks."""
    loss = cross_entropy(model(forget[0]), forget[1]).item()
    accuracy = (model(test[0]).argmax(1) == test[1]).float().mean().item()
    distances = [_js(model, peer, forget[0]) for peer in peers if peer is not model]
    return {"loss_forget": loss, "accuracy_test": accuracy, "js": statistics.fmean(distances)}


def _js(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """Mean Jensen-Shannon divergence of outputs, in bits."""
    p, q = (model(x).double().softmax(1) for model in (a, b))
    mean = (p + q) / 2
    both = [(r * (r.clamp_min(1e-300) / mean).log2()).sum(1) for r in (p, q)]
    return float((both[0] + both[1]).mean() / 2)


def record(name: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train, retrain, and delete in each way."""
    network = name.split()[0]
    data, users, wanted, validation, test = task(name, seed)
    forget, retain = (tuple(t[mask] for t in data) for mask in (wanted, ~wanted))
    epochs = epochs or EPOCHS[network]
    begin = time.process_time()
    model = fit(network, data, 1000 * seed, epochs)
    seconds = time.process_time() - begin
    peers = [fit(network, retain, 1000 * seed + 1 + k, epochs) for k in range(RETRAINED)]
    found: dict[str, Any] = {
        "seed": seed,
        "m": len(forget[1]),
        "training_seconds": seconds,
        "no-op": measured(model, forget, test, peers),
        "retrained": [measured(peer, forget, test, peers) for peer in peers],
    }
    ways = dict(WAYS)
    if name.endswith("users"):
        ways[BY_USERS] = WAYS["calibrated"] | {"groups": users[~wanted]}
    for way, options in ways.items():
        given = {key: validation if value is None else value for key, value in options.items()}
        given["weight_decay"] = WEIGHT_DECAY[network]
        found[way] = deletion(model, forget, retain, test, peers, given)
    return found


def deletion(
    model: nn.Module,
    forget: Data,
    retain: Data,
    test: Data,
    peers: list[nn.Module],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Delete with options of `unlearn`, and measure."""
    begin = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearn(model, forget, retain, cross_entropy, **options)
    spent = time.process_time() - begin
    return measured(result.model, forget, test, peers) | {
        "seconds": spent,
        "damping": result.damping,
        "skipped": len(result.skipped),
        "calibration": result.calibration and result.calibration.to_dict(),
        "warnings": [str(each.message)[:80] for each in caught],
    }


def summary(
    points: list[dict[str, Any]], ways: Iterable[str] = ("no-op", *WAYS, BY_USERS)
) -> dict[str, Any]:
    """Geometric means over seeds of deleted loss over retrained, and arithmetic ones of others."""
    found: dict[str, Any] = {}
    for way in ways:
        if way not in points[0]:
            continue
        ratios, drops, gaps = [], [], []
        for point in points:
            loss = statistics.fmean(each["loss_forget"] for each in point["retrained"])
            ratios.append(point[way]["loss_forget"] / loss)
            drops.append(point[way]["accuracy_test"] - point["no-op"]["accuracy_test"])
            floor = statistics.fmean(each["js"] for each in point["retrained"])
            gaps.append((point[way]["js"], floor))
        within = sum(0.4 <= ratio <= 2.5 for ratio in ratios)
        found[way] = {
            "loss_ratio": statistics.geometric_mean(ratios),
            "loss_ratios": ratios,
            "within_2.5": within,
            "of": len(ratios),
            "accuracy_test_change": statistics.fmean(drops),
            "accuracy_test_worst": min(drops),
            "js": statistics.fmean(gap[0] for gap in gaps),
            "js_floor": statistics.fmean(gap[1] for gap in gaps),
        }
    return found


def table(cases: dict[str, Any]) -> str:
    """The table of docs/unlearning.md."""
    lines = [
        "| tried | no-op | before | without validation | calibrated | within 2.5 | test, before | "
        "test, calibrated | JS, no-op | JS, calibrated | JS, retrained |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, case in cases.items():
        s = case["summary"]
        ratios = " | ".join(f"{s[way]['loss_ratio']:.2f}" for way in ("no-op", *WAYS))
        points = " | ".join(
            f"{100 * s[way]['accuracy_test_worst']:+.1f}" for way in ("before", "calibrated")
        )
        js = f"{s['no-op']['js']:.3f} | {s['calibrated']['js']:.3f} | {s['no-op']['js_floor']:.3f}"
        within = f"{s['calibrated']['within_2.5']} of {s['calibrated']['of']}"
        lines.append(f"| {name} | {ratios} | {within} | {points} | {js} |")
    return "\n".join(lines)


def begun(settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result file."""
    return {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": settings,
        "cases": {},
        "calibration": {},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 15)))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/calibration.json"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, epochs = (options.seeds[:1], 2) if options.quick else (options.seeds, None)
    result = begun({"quick": options.quick, "seeds": seeds, "retrained": RETRAINED})
    for name in options.cases:
        points = []
        for seed in seeds:
            points.append(record(name, seed, epochs))
            print(
                name,
                seed,
                {
                    way: round(points[-1][way]["loss_forget"], 4)
                    for way in (*WAYS, BY_USERS)
                    if way in points[-1]
                },
                flush=True,
            )
        result["calibration"][name] = {"points": points, "summary": summary(points)}
        save(result, options.output)
    print(table(result["calibration"]))


if __name__ == "__main__":
    main()
