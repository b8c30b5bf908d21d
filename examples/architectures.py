"""Delete a hundred images from networks of four architectures, and compare with training again.

The paper removes CIFAR-10 images from ResNet-18 and -50, MobileNet, DenseNet and a network of two
layers, and plots the accuracy that remains. Here one request of 100 images is deleted from a narrow
ResNet-18, a MobileNet, a DenseNet and a network of two layers, by the default of this package and
by the paper's preset. Networks trained again without these images are the yardstick.

Reduced: scikit-learn's digits at 16 x 16 and very narrow networks, in half a minute. --full: 3000
images of Fashion-MNIST at 32 x 32, or of CIFAR-10 if --data has them, with three seeds, in 14
minutes of CPU time.
"""

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch
from networks import InvertedResidual, ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad
from unlearning_models import fashion_mnist

from lcodec_ext.evaluation import evaluate
from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, RED
from lcodec_ext.unlearning import IndefiniteCurvatureError, NothingSelectedError, unlearn

CIFAR = "cifar-10-batches-py"
DATA = f"the Python version of CIFAR-10 as published: {CIFAR}, or the folder that holds it"
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
MEAN, SCALE = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
DEFAULT, PAPER = "default", "the paper's preset"
KEPT = (
    "loss_forget",
    "loss_retain",
    "accuracy_forget",
    "accuracy_retain",
    "accuracy_test",
    "js_forget",
    "mia_auc",
)


@dataclass(frozen=True)
class Size:
    """How much is trained and deleted."""

    n: int
    held: int  # validation samples, and the most of the test samples
    removed: int
    epochs: int
    batch_size: int
    width: int
    retrained: int
    perturbations: int  # of the paper's preset
    seeds: int  # of data, networks and draws


FULL = Size(3000, 1000, 100, 8, 64, 8, 2, 100, 3)
REDUCED = Size(1000, 300, 40, 10, 64, 4, 2, 50, 1)


class Unpickler(pickle.Unpickler):
    """Reads arrays and plain values, and refuses everything else: a pickle can run any code."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not read")
        return super().find_class(module, name)


def read_batch(file: Path) -> tuple[Tensor, Tensor]:
    """Images, uint8 (n, 3, 32, 32), and labels of a file of CIFAR-10."""
    try:
        with file.open("rb") as opened:
            batch = Unpickler(opened, encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[b"labels"]
        fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)
    except FileNotFoundError:
        raise SystemExit(f"--data: {file} is missing. It should hold {DATA}") from None
    except Exception as error:
        raise SystemExit(f"--data: {file} is not a batch of CIFAR-10: {error!r}") from None
    if not fits:
        raise SystemExit(f"--data: {file} has data of shape {pixels.shape}, not (n, 3072) of uint8")
    return torch.tensor(pixels).reshape(-1, 3, 32, 32), torch.tensor(labels)


def cifar(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    folder = folder / CIFAR if (folder / CIFAR).is_dir() else folder
    parts = [read_batch(folder / name) for name in BATCHES]
    images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    mean, scale = (torch.tensor(each).reshape(3, 1, 1) for each in (MEAN, SCALE))
    held = read_batch(folder / "test_batch")
    return (images / 255 - mean) / scale, labels, (held[0] / 255 - mean) / scale, held[1]


@dataclass(frozen=True)
class Data:
    """The first `removed` of the training samples are to be deleted."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    name: str


def load(folder: Path | None, size: Size, seed: int, full: bool) -> Data:
    """Colour images: CIFAR-10, grey ones repeated, or digits enlarged; split by the seed."""
    test = None
    if folder is not None:
        x, y, *test = cifar(folder)
        name = "CIFAR-10"
    elif full:
        x, y, *test = (
            pad(each, (2, 2, 2, 2), value=-0.81).expand(-1, 3, -1, -1) if each.ndim == 4 else each
            for each in fashion_mnist()
        )
        name = "Fashion-MNIST, 32 x 32"
    else:
        from sklearn.datasets import load_digits

        x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
        x = interpolate((x.float().reshape(-1, 1, 8, 8) - 4.9) / 6, scale_factor=2)
        x, name = x.expand(-1, 3, -1, -1), "scikit-learn's digits, 16 x 16"
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    n = min(size.n, len(y) // 2)
    train, held, rest = order[:n], order[n : n + size.held], order[n + size.held :]
    test = (x[rest], y[rest]) if test is None else test
    most = 2 * size.held
    return Data((x[train], y[train]), (x[held], y[held]), (test[0][:most], test[1][:most]), name)


class Dense(nn.Module):
    """DenseNet's layer: what it computes is appended to what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 2 * growth, 1, bias=False),
            nn.BatchNorm2d(2 * growth),
            nn.ReLU(),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def densenet(width: int) -> nn.Module:
    """Three blocks of three layers; between two of them half as many channels and pixels."""
    channels = 2 * width
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, padding=1, bias=False)]
    for block in range(3):
        for _ in range(3):
            layers.append(Dense(channels, width))
            channels += width
        if block < 2:
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), *_head(channels))


def mobilenet(width: int) -> nn.Module:
    """A stem of stride 2, five inverted residuals."""
    stem = (nn.Conv2d(3, width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
    blocks = (
        InvertedResidual(width, 2 * width, 2, 3),
        InvertedResidual(2 * width, 2 * width, 1, 3),
        InvertedResidual(2 * width, 4 * width, 2, 3),
        InvertedResidual(4 * width, 4 * width, 1, 3),
        InvertedResidual(4 * width, 6 * width, 1, 3),
    )
    return nn.Sequential(*stem, *blocks, *_head(6 * width))


def _head(channels: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)


def networks(size: Size, pixels: int) -> dict[str, Callable[[], nn.Module]]:
    width = size.width
    inputs = 3 * pixels * pixels
    return {
        "ResNet-18": lambda: ResNet((width, 2 * width, 4 * width, 8 * width), 10),
        "MobileNet": lambda: mobilenet(width),
        "DenseNet": lambda: densenet(width),
        "two layers": lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(inputs, 16 * width), nn.ReLU(), nn.Linear(16 * width, 10)
        ),
    }


def train(make, x: Tensor, y: Tensor, size: Size, seed: int, rate: float) -> nn.Module:
    torch.manual_seed(seed)
    model, generator = make().train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    whole = len(y) // size.batch_size * size.batch_size  # batch norm needs batches of full size
    step, steps = 0, size.epochs * whole // size.batch_size
    for _ in range(size.epochs):
        order = torch.randperm(len(y), generator=generator)[:whole]
        for batch in order.split(size.batch_size):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


def experiment(name: str, make, data: Data, size: Size, seed: int) -> dict:
    """Train, delete in both ways, and compare with retraining."""
    rate = RATE / 5 if name == "two layers" else RATE
    x, y = data.train
    forget, retain = (x[: size.removed], y[: size.removed]), (x[size.removed :], y[size.removed :])
    began = time.process_time()
    model = train(make, x, y, size, seed, rate)
    took, seconds = time.process_time() - began, {}
    methods, refused, common_options = {}, "", {"weight_decay": DECAY, "seed": seed}
    for way, options in (
        (DEFAULT, {"validation": data.validation}),
        (PAPER, {"preset": "paper", "n_perturbations": size.perturbations, "n_curvature": 500}),
    ):
        began = time.process_time()
        try:
            methods[way] = unlearn(
                model, forget, retain, cross_entropy, **common_options, **options
            ).model
        except (IndefiniteCurvatureError, NothingSelectedError) as error:
            if way == DEFAULT:
                raise
            refused = str(error)
        seconds[way] = time.process_time() - began
    evaluation = evaluate(
        model,
        forget,
        retain,
        data.test,
        cross_entropy,
        retrained=lambda k: train(make, *retain, size, seed + 1000 + k, rate),
        n_retrain=size.retrained,
        methods=methods,
        weight_decay=DECAY,
        seed=seed,
        relearn=False,
    )
    return {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_cpu_seconds": took,
        "refused": refused,
        "methods": {
            method.name: {key: method.metrics.get(key) for key in KEPT}
            | {"cpu_seconds": seconds.get(method.name)}
            for method in evaluation.methods
        },
    }


def run(arguments) -> dict:
    size = FULL if arguments.full else REDUCED
    seeds = [10_000 * k + arguments.seed for k in range(size.seeds)]
    splits = [load(arguments.data, size, seed, arguments.full) for seed in seeds]
    made = networks(size, splits[0].train[0].shape[-1])
    found: dict[str, list[dict]] = {name: [] for name in made}
    work = [(k, name) for k in range(size.seeds) for name in made]
    for k, name in common.progress(work, "networks", "network"):
        found[name].append(experiment(name, made[name], splits[k], size, seeds[k]))
    return {
        "data": splits[0].name,
        "size": vars(size),
        "settings": {"rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY},
        "networks": [{"network": name, "runs": runs} for name, runs in found.items()],
    }


def values(network: dict, method: str, key: str) -> list[float]:
    """A quantity over the runs in which the method was not refused."""
    runs = network["runs"]
    if key == "seconds":
        if method == "no-op":
            return []
        if method == "retrained":
            return [run["training_cpu_seconds"] for run in runs]
        key = "cpu_seconds"
    return [run["methods"][method][key] for run in runs if method in run["methods"]]


LOOKS = {
    "no-op": ("nothing done", ORANGE),
    PAPER: (PAPER, RED),
    DEFAULT: (DEFAULT, BLUE),
    "retrained": ("retrained", DARK),
}
PANELS = {
    "loss_forget": "mean loss of the deleted images",
    "js_forget": "distance to retrained (JS)",
    "accuracy_test": "test accuracy",
}


def draw(record: dict, file: Path) -> None:
    with common.figure(file, 1, len(PANELS), (10, 3.6)) as axes:
        names = [found["network"] for found in record["networks"]]
        for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
            for i, (method, (label, colour)) in enumerate(LOOKS.items()):
                places = [k + 0.2 * (i - 1.5) for k in range(len(names))]
                runs = [
                    values(network, method, key) or [math.nan] for network in record["networks"]
                ]
                axis.bar(places, [np.mean(each) for each in runs], 0.18, color=colour, label=label)
                for place, each in zip(places, runs, strict=True):
                    axis.plot([place] * len(each), each, ".", color="white", markersize=5, mew=0.7,
                              markeredgecolor="black")  # fmt: skip
            axis.set_title(title)
            axis.set_xticks(range(len(names)), names)
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOOKS)
        )


COLUMNS = {"loss_forget": 3, "js_forget": 3, "accuracy_retain": 3, "accuracy_test": 3, "mia_auc": 3}


def cells(network: dict, method: str) -> list[str]:
    """What the tables have of a method: mean and standard deviation over the runs."""
    found = {key: values(network, method, key) for key in (*COLUMNS, "seconds")}
    digits = COLUMNS | {"seconds": 1}
    return [common.spread(each, digits[key]) if each else "" for key, each in found.items()]


def refusals(network: dict) -> int:
    return sum(bool(run["refused"]) for run in network["runs"])


def row(network: dict, method: str) -> str:
    """A row of the page's table."""
    return (
        f"| {network['network']} | {LOOKS[method][0]} | "
        + " | ".join(cells(network, method))
        + " |"
    )


def show(record: dict) -> str:
    lines = [f"Data: {record['data']}, {record['size']['removed']} images deleted", ""]
    heads = ("loss", "JS", "retained", "test", "attack", "seconds")
    for network in record["networks"]:
        lines.append(f"{network['network']:<20}" + "".join(f"{head:>16}" for head in heads))
        for method, (label, _) in LOOKS.items():
            if method == PAPER and refusals(network):
                times = f"{refusals(network)} of {len(network['runs'])}"
                lines.append(f"  {label:<18} refused in {times}")
            if values(network, method, "loss_forget"):
                lines.append(
                    f"  {label:<18}" + "".join(f"{each:>16}" for each in cells(network, method))
                )
    lines.append(
        "Means and standard deviations over the seeds. loss, JS: of the deleted images; JS is the\n"
        "distance of outputs to those of retrained networks (of these, to each other). attack:\n"
        "its AUC in telling deleted images from test images. seconds: CPU time; of one retraining."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    common.main("architectures", common.options(__doc__, data=DATA), run, draw, show)
