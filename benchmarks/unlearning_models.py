"""Data sets, networks and trainings of the unlearning experiment, with a cache of trained models.

Networks are trained in a usual way: SGD with Nesterov momentum, coupled weight decay and a cosine
schedule. Retraining is the same training, without the forget set, from another seed.
"""

import gzip
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from networks import BasicBlock, InvertedResidual
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

VALIDATION = 1000  # samples, or what the data set leaves
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


def resnet() -> nn.Module:
    """A stem of stride 4, three blocks, global average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, 2, padding=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        BasicBlock(12, 12, 1),
        BasicBlock(12, 24, 2),
        BasicBlock(24, 48, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def cnn() -> nn.Module:
    """Two convolutions of stride 2 with batch norm, two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def mobilenet() -> nn.Module:
    """A stem of stride 2, five inverted residuals, global average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        InvertedResidual(12, 16, 2, 3),
        InvertedResidual(16, 16, 1, 3),
        InvertedResidual(16, 32, 2, 3),
        InvertedResidual(32, 32, 1, 3),
        InvertedResidual(32, 48, 1, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def mlp() -> nn.Module:
    """64 - 128 - 10 for digits."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained."""

    network: Callable[[], nn.Module]
    data: str
    n: int
    mislabelled: int
    random: int
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    momentum: float = 0.9


RECIPES = {
    "mlp": Recipe(mlp, "digits", 1197, 40, 100, 300, 32, 0.1, 5e-4),
    "cnn": Recipe(cnn, "fashion_mnist", 20_000, 400, 400, 80, 128, 0.1, 5e-4),
    "resnet": Recipe(resnet, "fashion_mnist", 20_000, 400, 400, 80, 128, 0.1, 5e-4),
    # No setting was chosen with this one, of the package or of a baseline.
    "mobilenet": Recipe(mobilenet, "fashion_mnist", 10_000, 200, 400, 20, 128, 0.1, 5e-4),
}


@dataclass(frozen=True)
class Task:
    """Data of one experiment: the training samples, and which of them are to be forgotten."""

    X: Tensor
    y: Tensor
    forget: list[int]
    validation: tuple[Tensor, Tensor]  # neither trained on nor tested with
    test: tuple[Tensor, Tensor]
    true: Tensor  # the labels before some were changed

    def part(self, forget: bool) -> tuple[Tensor, Tensor]:
        wanted = torch.zeros(len(self.y), dtype=torch.bool)
        wanted[self.forget] = True
        wanted = wanted if forget else ~wanted
        return self.X[wanted], self.y[wanted]


def fashion_mnist(folder: Path = FASHION_MNIST) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def read(name: str) -> Tensor:
        if not (folder / f"{name}.gz").is_file():
            raise SystemExit(
                f"{folder} has no {name}.gz, a file of Fashion-MNIST. On Debian: "
                "apt-get install dataset-fashion-mnist"
            )
        with gzip.open(folder / f"{name}.gz") as file:
            raw = bytearray(file.read())
        axes = raw[3]
        shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
        return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * axes).reshape(shape)

    def images(name: str) -> Tensor:
        return ((read(name)[:, None] / 255) - 0.286) / 0.353

    return (
        images("train-images-idx3-ubyte"),
        read("train-labels-idx1-ubyte").long(),
        images("t10k-images-idx3-ubyte"),
        read("t10k-labels-idx1-ubyte").long(),
    )


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:-400], order[-400:]
    return X[train], y[train], X[test], y[test]


def task(name: str, which: str, seed: int) -> Task:
    recipe = RECIPES[name]
    if recipe.data == "digits":
        X, y, *test = _digits(seed)
    else:
        X, y, *test = fashion_mnist()
    generator = torch.Generator().manual_seed(10 + seed)
    order = torch.randperm(len(y), generator=generator)
    kept, held = order[: recipe.n], order[recipe.n :][:VALIDATION]
    validation = X[held], y[held]
    X, y = X[kept], y[kept]
    true = y.clone()
    m = getattr(recipe, which)
    forget = torch.randperm(recipe.n, generator=generator)[:m].sort().values
    if which == "mislabelled":
        shift = torch.randint(1, 10, (m,), generator=generator)
        y[forget] = (y[forget] + shift) % 10
    return Task(X, y, forget.tolist(), validation, (test[0], test[1]), true)


def train(
    name: str, X: Tensor, y: Tensor, seed: int, epochs: int | None = None
) -> tuple[nn.Module, float]:
    """Train from scratch. Returns the model in evaluation mode, and CPU seconds."""
    recipe = RECIPES[name]
    epochs = recipe.epochs if epochs is None else epochs
    torch.manual_seed(seed)
    model = recipe.network().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    n, size = len(y), recipe.batch_size
    total = epochs * math.ceil(n / size)
    begin = time.process_time()
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(n, generator=generator).split(size):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.zero_grad()
            cross_entropy(model(X[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
    return model.eval(), time.process_time() - begin


def retraining_seconds(name: str, X: Tensor, y: Tensor) -> float:
    """Extrapolate the CPU seconds of a training from a tenth of it; all epochs cost the same."""
    epochs = RECIPES[name].epochs
    part = epochs // 10
    return train(name, X, y, 0, part)[1] * epochs / part


def trained(
    cache: Path, name: str, which: str, seed: int, retrain: int | None, start: int = 0
) -> nn.Module:
    """Return a model trained on everything (retrain None) or retrained without the forget set.

    It comes from the cache if the cache has this very training. There are several models trained on
    everything, from different starts.
    """
    recipe = asdict(RECIPES[name]) | {"network": str(RECIPES[name].network())}
    parts = [recipe, which, seed, retrain, torch.__version__, *([start] * (start > 0))]
    key = json.dumps(parts, sort_keys=True)
    stem = f"{name}-{which}-{seed}-{'all' if retrain is None else retrain}"
    path = cache / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.pt"
    if path.exists():
        model = RECIPES[name].network()
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        return model.eval()
    data = task(name, which, seed)
    X, y = (data.X, data.y) if retrain is None else data.part(forget=False)
    own = 1000 * (seed + 1) + (0 if retrain is None else 1 + retrain) + 100 * start
    model, _ = train(name, X, y, own)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save({"model": model.state_dict()}, temporary)
    os.replace(temporary, path)
    return model
