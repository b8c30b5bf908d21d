"""Remove a thousand samples one after the other, and compare with training again.

The paper removes 1000 MNIST samples from a logistic regression and from a 784-100-10 network, each
by one Newton step on units that L-FOCI selects, and plots gradient norms and accuracies against
removals. It also compares with retraining, and with K-FAC on 784-20-10. Here the same streams run
with all units ("full"), with those of L-FOCI, with as many units drawn at random, and with the
default of this package, which finds its strength by control groups. Networks trained again without
the removed samples are the yardstick.

Reduced: scikit-learn's digits, smaller networks, 40 removals, in half a minute. --full: 10,000
images of Fashion-MNIST, 1000 removals (500 of the K-FAC network) with one seed, and 400 (300) with
two more, about 25 minutes of CPU time.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from unlearning_models import FASHION_MNIST, fashion_mnist

from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PURPLE, RED
from lcodec_ext.evaluation.metrics import js_distance
from lcodec_ext.unlearning import Unlearner, add_noise

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DATA = f"MNIST or Fashion-MNIST as published: {', '.join(f'{name}.gz' for name in FILES)}"
DECAY, DAMPING = 0.01, 0.01  # lambda of the paper; what its code adds to the diagonal
EPSILON, DELTA = 0.1, 0.01
PAPER_N = 60_000  # samples of MNIST
WAYS = {
    "full": {"selection": "full"},
    "L-FOCI": {"selection": "lfoci"},
    "random units": {"selection": "random"},
}
NOISY = {"full, with noise": "full", "L-FOCI, with noise": "L-FOCI"}
DEFAULT, KFAC, NO_OP = "default", "K-FAC", "no-op"


@dataclass(frozen=True)
class Size:
    """How much of the paper's experiment is run."""

    n: int
    epochs: int
    batch_size: int
    hidden: tuple[int, int]
    removals: tuple[int, int, int]  # of each model
    perturbations: int
    checkpoint: int  # removals between two retrainings
    measured: int  # removals between two points of a curve
    request: int  # samples of a request to the default
    rows: int  # retained samples that a curvature reads
    again: tuple[int, int, int]  # removals of each model with the further seeds; a checkpoint
    seeds: int  # of data, networks and draws


FULL = Size(
    10_000, 50, 256, (100, 20), (1000, 1000, 500), 1000, 100, 20, 10, 1000, (400, 400, 300), 3
)
REDUCED = Size(900, 50, 64, (24, 12), (40, 40, 40), 200, 20, 10, 10, 500, (20, 20, 20), 1)


@dataclass(frozen=True)
class Data:
    x: Tensor
    y: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    name: str


def load(folder: Path | None, size: Size, seed: int, full: bool) -> Data:
    """Digits, Fashion-MNIST, or what the folder holds; split by the seed."""
    if folder is None and not full:
        from sklearn.datasets import load_digits

        x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
        x, name = (x.float() - 4.9) / 6, "scikit-learn's digits"
        test = None
    else:
        if folder is not None:
            missing = [f"{file}.gz" for file in FILES if not (folder / f"{file}.gz").is_file()]
            if missing:
                raise SystemExit(
                    f"--data: {folder} lacks {', '.join(missing)}. It should hold {DATA}"
                )
        x, y, *held = fashion_mnist(folder or FASHION_MNIST)
        x, test = x.flatten(1), (held[0].flatten(1), held[1])
        name = "Fashion-MNIST" if folder is None else folder.name
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    n = min(size.n, len(y) * 2 // 3)
    train, validation, rest = order[:n], order[n:][:1000], order[n + 1000 :]
    if test is None:
        validation, rest = order[n : n + 400], order[n + 400 :]
        test = x[rest], y[rest]
    return Data(x[train], y[train], (x[validation], y[validation]), test, name)


def models(size: Size, inputs: int) -> dict[str, Callable[[], nn.Module]]:
    def network(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    large, small = size.hidden
    return {
        "logistic regression": lambda: nn.Linear(inputs, 10),
        f"{inputs}-{large}-10": lambda: network(large),
        f"{inputs}-{small}-10": lambda: network(small),
    }


def train(make, x: Tensor, y: Tensor, size: Size, seed: int, constant: bool = False) -> nn.Module:
    """Train as the paper does, SGD at rate .1, but for the cosine by which the rate falls to 0."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=DECAY)
    step, steps = 0, size.epochs * math.ceil(len(y) / size.batch_size)
    for _ in range(size.epochs):
        for batch in torch.randperm(len(y), generator=generator).split(size.batch_size):
            if not constant:
                optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the objective on all samples given, weight decay included."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(x), y), parameters)
    parts = (g + DECAY * p.detach() for g, p in zip(gradients, parameters, strict=True))
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def sample_gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean over samples of the norm of the loss's gradient: what the paper plots."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, one, target):
        return cross_entropy(functional_call(model, weights, (one[None],)), target[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    squares = sum(each.flatten(1).square().sum(1) for each in found.values())
    return float(squares.sqrt().mean())


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


def point(model: nn.Module, data: Data, removed: int, last: int) -> dict:
    """What is measured of a model after the first samples were removed."""
    found = {
        "removed": removed,
        "accuracy": accuracy(model, data.test),
        "gradient_norm": gradient_norm(model, data.x[removed:], data.y[removed:]),
    }
    if removed:
        recent = slice(max(0, removed - last), removed)
        with torch.no_grad():
            loss = cross_entropy(model(data.x[:removed]), data.y[:removed])
        found["loss_removed"] = float(loss)
        found["sample_gradient_norm"] = sample_gradient_norm(model, data.x[recent], data.y[recent])
    return found


@dataclass
class Stream:
    """A curve, and the models at the checkpoints."""

    points: list[dict]
    models: dict[int, nn.Module]
    seconds: float = 0.0  # CPU time of the removals alone
    refused: int = 0  # removals for which no step came about
    units: float | None = None  # that a removal changes; the median
    reasons: Counter = field(default_factory=Counter)  # of refusals: how the messages begin


def noise(n: int) -> float:
    return common.paper_noise(n, DECAY, EPSILON, DELTA)


def paper_stream(
    model: nn.Module, data: Data, size: Size, removals: int, way: str, seed: int, **options
) -> Stream:
    """One sample after the other, by Algorithm 1 with its preset; without step where it refuses."""
    model, sigma = copy.deepcopy(model), options.pop("sigma", 0.0)
    generator = torch.Generator().manual_seed(seed)
    stream = Stream([point(model, data, 0, 0)], {})
    settings = {"weight_decay": DECAY, "damping": DAMPING, "n_curvature": size.rows} | options
    if settings["selection"] == "lfoci":
        settings["n_perturbations"] = size.perturbations
    counts = []
    for i in common.progress(range(removals), way):
        began = time.process_time()
        forget, retain = (data.x[i : i + 1], data.y[i : i + 1]), (data.x[i + 1 :], data.y[i + 1 :])
        units = common.paper_removal(
            model,
            forget,
            retain,
            cross_entropy,
            stream.reasons,
            sigma,
            generator,
            seed=seed + i,
            **settings,
        )
        if units is not None:
            counts.append(sum(len(rows) for rows in units.values()))
        stream.seconds += time.process_time() - began
        record_point(stream, model, data, size, i + 1)
    stream.refused = stream.reasons.total()
    if counts:
        stream.units = float(torch.tensor(counts, dtype=torch.float64).median())
    return stream


def record_point(stream: Stream, model: nn.Module, data: Data, size: Size, removed: int) -> None:
    if removed % size.measured == 0:
        stream.points.append(point(model, data, removed, size.measured))
    if removed % size.checkpoint == 0:
        stream.models[removed] = copy.deepcopy(model)


def default_stream(model: nn.Module, data: Data, size: Size, removals: int, seed: int) -> Stream:
    """Requests of several samples each: the strength is found by groups of that size."""
    stream = Stream([point(model, data, 0, 0)], {})
    with Unlearner(
        model,
        (data.x, data.y),
        cross_entropy,
        validation=data.validation,
        weight_decay=DECAY,
        seed=seed,
    ) as unlearner:
        for first in common.progress(range(0, removals, size.request), DEFAULT, "request"):
            began = time.process_time()
            result = unlearner.remove(range(first, first + size.request))
            stream.refused += len(result.skipped)
            stream.seconds += time.process_time() - began
            record_point(stream, unlearner.model, data, size, first + size.request)
    return stream


class Kfac:
    """(F + damping)^-1 on the gradient of a network of linear layers, F Kronecker-factored.

    F is the Fisher matrix of the softmax. Its factors are the second moments of a layer's inputs, 1
    appended for the bias, and of the gradients by its outputs, in expectation over the labels.
    """

    def __init__(self, model: nn.Module, x: Tensor, damping: float) -> None:
        self.layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.damping, seen = damping, {}

        def keep(layer, inputs, output):
            seen[layer] = inputs[0].detach(), output

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        logits = model(x)
        for hook in hooks:
            hook.remove()
        p = logits.softmax(1).detach()
        outputs = [seen[layer][1] for layer in self.layers]
        gradients = [torch.zeros(o.shape[1], o.shape[1]) for o in outputs]
        for c in range(p.shape[1]):
            seed = (nn.functional.one_hot(torch.full((len(p),), c), p.shape[1]) - p).mul(
                p[:, c : c + 1].sqrt()
            )
            parts = torch.autograd.grad(logits, outputs, seed, retain_graph=True)
            for total, part in zip(gradients, parts, strict=True):
                total += part.T @ part / len(x)
        self.factors = []
        for layer, moment in zip(self.layers, gradients, strict=True):
            a = nn.functional.pad(seen[layer][0], (0, 1), value=1.0)
            self.factors.append((torch.linalg.eigh(moment), torch.linalg.eigh(a.T @ a / len(x))))

    @torch.no_grad()
    def solve(self, gradients: list[Tensor]) -> list[Tensor]:
        """Of each layer the gradient by (weight, bias) in one matrix."""
        found = []
        for g, ((s, u), (t, v)) in zip(gradients, self.factors, strict=True):
            found.append(u @ ((u.T @ g @ v) / (torch.outer(s, t) + self.damping)) @ v.T)
        return found


def kfac_stream(model: nn.Module, data: Data, size: Size, removals: int) -> Stream:
    """The same step with K-FAC in place of the secant; its factors are renewed at checkpoints."""
    model = copy.deepcopy(model)
    stream = Stream([point(model, data, 0, 0)], {})
    n = len(data.y)
    for i in common.progress(range(removals), KFAC):
        began = time.process_time()
        if i % size.checkpoint == 0:
            rows = data.x[max(size.removals) :][: size.rows]
            curvature = Kfac(model, rows, DECAY + DAMPING)
        model.zero_grad()
        cross_entropy(model(data.x[i : i + 1]), data.y[i : i + 1]).backward()
        with torch.no_grad():
            weights = [torch.cat([a.weight, a.bias[:, None]], 1) for a in curvature.layers]
            loss = [torch.cat([a.weight.grad, a.bias.grad[:, None]], 1) for a in curvature.layers]
            removal = [g + DECAY * w for g, w in zip(loss, weights, strict=True)]
            for layer, step in zip(curvature.layers, curvature.solve(removal), strict=True):
                layer.weight += step[:, :-1] / (n - i - 1)
                layer.bias += step[:, -1] / (n - i - 1)
        stream.seconds += time.process_time() - began
        record_point(stream, model, data, size, i + 1)
    return stream


def streams(
    name: str, model: nn.Module, data: Data, size: Size, which: int, seed: int, first: bool
) -> dict[str, Stream]:
    """All ways for a model: K-FAC for the last one, the paper's noise for the one in the middle.

    With further seeds than the first there are fewer removals, and no noise.
    """
    found: dict[str, Stream] = {}
    removals = (size.removals if first else size.again)[which]
    for way, options in WAYS.items():
        if way == "random units":
            if which == 2:
                continue
            options = options | {"n_units": max(1, round(found["L-FOCI"].units or 1))}
        label = f"{name}, {way}"
        found[way] = paper_stream(model, data, size, removals, label, seed, **options)
    if which == 1 and first:
        for way, of in NOISY.items():
            options = WAYS[of] | {"sigma": noise(PAPER_N)}
            label = f"{name}, {way}"
            found[way] = paper_stream(model, data, size, removals, label, seed, **options)
    if which == 2:
        found[KFAC] = kfac_stream(model, data, size, removals)
    found[DEFAULT] = default_stream(model, data, size, removals, seed)
    return found


def experiment(
    name: str, make, which: int, data: Data, size: Size, seed: int, first: bool = True
) -> dict:
    """Train, remove in all ways, and compare with retraining at the checkpoints."""
    model = train(make, data.x, data.y, size, seed)
    ways = streams(name, model, data, size, which, seed, first)
    removals = ways[DEFAULT].points[-1]["removed"]
    marks = range(size.checkpoint, removals + 1, size.checkpoint)
    retrained, distances = [], {way: [] for way in (NO_OP, *ways, "retrained")}
    for mark in common.progress(marks, f"{name}, retraining"):
        rest, gone = (data.x[mark:], data.y[mark:]), (data.x[:mark], data.y[:mark])
        again = train(make, *rest, size, seed + 1000 + mark)
        other = train(make, *rest, size, seed + 5000 + mark)
        retrained.append(point(again, data, mark, size.measured))
        candidates = {NO_OP: model, **{way: s.models[mark] for way, s in ways.items()}}
        for way, candidate in (candidates | {"retrained": other}).items():
            distances[way].append(
                {
                    "removed": mark,
                    "js_removed": js_distance(candidate, again, gone),
                    "js_test": js_distance(candidate, again, data.test),
                }
            )
    noisy = add_noise(model, noise(len(data.y)), seed=seed)
    return {
        "seed": seed,
        "removals": removals,
        "accuracy_after_one_noise_for_this_n": accuracy(noisy, data.test),
        "no_op": [point(model, data, mark, size.measured) for mark in marks],
        "retrained": retrained,
        "distances": distances,
        "ways": {
            way: {
                "points": stream.points,
                "cpu_seconds_per_sample": stream.seconds / removals,
                "refused": stream.refused,
                "reasons": stream.reasons,
                "units": stream.units,
            }
            for way, stream in ways.items()
        },
    }


def run(arguments) -> dict:
    size = FULL if arguments.full else REDUCED
    found: list[dict] = []
    for k in range(size.seeds):
        seed = 10_000 * k + arguments.seed
        data = load(arguments.data, size, seed, arguments.full)
        for which, (name, make) in enumerate(models(size, data.x.shape[1]).items()):
            if not k:
                constant = train(make, data.x, data.y, size, seed, constant=True)
                norm = gradient_norm(constant, data.x, data.y)
                found.append({"model": name, "n": len(data.y), "runs": []})
                found[which]["gradient_norm_at_constant_rate"] = norm
            label = f"{name}, seed {seed}"
            found[which]["runs"].append(
                experiment(label, make, which, data, size, seed, first=not k)
            )
    return {
        "data": data.name,
        "size": vars(size),
        "settings": {
            "weight_decay": DECAY,
            "damping": DAMPING,
            "epsilon": EPSILON,
            "delta": DELTA,
            "sigma": noise(PAPER_N),
            "sigma_for_this_n": noise(len(data.y)),
        },
        "models": found,
    }


LOOKS = {
    "full": (ORANGE, "-"),
    "L-FOCI": (RED, "-"),
    "random units": (PURPLE, "-"),
    "full, with noise": (ORANGE, ":"),
    "L-FOCI, with noise": (RED, ":"),
    KFAC: ("#009E73", "-"),
    DEFAULT: (BLUE, "-"),
}
ROWS = {
    "gradient_norm": "gradient norm of the\nretained objective",
    "accuracy": "test accuracy",
    "loss_removed": "mean loss of the\nremoved samples",
}


LIMITS = {"gradient_norm": (0.01, 100.0), "loss_removed": (0, 1.2)}  # what grows beyond is cut


def draw(record: dict, file: Path) -> None:
    columns = len(record["models"])
    with common.figure(file, len(ROWS), columns, (3.3 * columns, 7.2)) as axes:
        for column, found in enumerate(record["models"]):
            axes[0, column].set_title(found["model"])
            axes[-1, column].set_xlabel("samples removed")
            for row, (key, label) in enumerate(ROWS.items()):
                axis = axes[row, column]
                if not column:
                    axis.set_ylabel(label)
                for run in reversed(found["runs"]):
                    curves(axis, run, key, first=run is found["runs"][0])
                limit(axis, key)
        handles = {}
        for axis in axes.flat:
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axes[0, 0].figure.legend(handles.values(), handles, loc="outside lower center", ncols=5)


def curves(axis, run: dict, key: str, first: bool) -> None:
    """One quantity of one run against the number of removals; further seeds are thin and pale."""
    faint = {} if first else {"alpha": 0.45}
    for way, stream in run["ways"].items():
        colour, line = LOOKS[way]
        points = [p for p in stream["points"] if key in p]
        axis.plot(
            [p["removed"] for p in points],
            [float(p[key]) for p in points],
            color=colour,
            linestyle=line,
            linewidth=(2 if way == DEFAULT else 1.3) if first else 0.7,
            label=way if first else None,
            **faint,
        )
    marks = [p["removed"] for p in run["retrained"]]
    look = {"linestyle": "none", "color": DARK, "zorder": 5} | faint
    look["markersize"] = 4.5 if first else 3
    again, before = ([p[key] for p in run[what]] for what in ("retrained", "no_op"))
    axis.plot(marks, again, marker="o", label="retrained" if first else None, **look)
    if key == "loss_removed":
        axis.plot(marks, before, marker="x", label="nothing done" if first else None, **look)


def limit(axis, key: str) -> None:
    if key in LIMITS:
        axis.set_ylim(LIMITS[key])
    if key == "gradient_norm":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())


QUANTITIES = {  # of the tables: heading and decimals
    "gradient_norm": ("gradient", 2),
    "sample_gradient_norm": ("sample's gradient", 1),
    "accuracy": ("test accuracy", 3),
    "loss_removed": ("loss", 3),
    "js_removed": ("JS, removed", 3),
    "js_test": ("JS, test", 3),
}
OF_SEEDS = ("accuracy", "loss_removed", "js_removed")  # what the tables have of all seeds


def at(run: dict, way: str, removed: int) -> dict:
    """What a run measured of a way after so many removals; empty if it has no such point."""
    points = {"retrained": run["retrained"], NO_OP: run["no_op"]}.get(way)
    if points is None:
        points = run["ways"].get(way, {"points": []})["points"]
    found: dict = {}
    for point in (*points, *run["distances"].get(way, ())):
        if point["removed"] == removed:
            found |= {key: float(value) for key, value in point.items() if value is not None}
    return found


def number(values: list[float], digits: int) -> str:
    """Mean and standard deviation, or the range of values that grew beyond all measure."""
    if max(values) < 1000:
        return common.spread(values, digits)
    ends = sorted({f"{value:.0e}" for value in (min(values), max(values))}, key=float)
    return " to ".join(ends)


def row(found: dict, way: str) -> str:
    """A row of the page's table: a way over all seeds, and at the end of the first one."""
    first, cells = found["runs"][0], []
    for runs, quantities in groups(found):
        points = [at(run, way, runs[-1]["removals"]) for run in runs]
        for key in quantities:
            cells.append(number([point[key] for point in points if point], QUANTITIES[key][1]))
    cells += ["", "", ""]
    stream = first["ways"].get(way)
    if stream:
        units = "" if stream["units"] is None else f"{stream['units']:.0f}"
        cells[-3:] = [units, f"{stream['refused']}", f"{stream['cpu_seconds_per_sample']:.3f}"]
    return f"| {way} | " + " | ".join(cells) + " |"


def groups(found: dict) -> list[tuple[list[dict], tuple[str, ...]]]:
    """The runs and quantities of a table's columns: all seeds, if there are several, and one."""
    runs = found["runs"]
    several = [(runs, OF_SEEDS)] if len(runs) > 1 else []
    return [*several, (runs[:1], tuple(QUANTITIES))]


def heading(found: dict) -> str:
    """What is above the rows of a model; with several seeds also after how many removals."""
    heads = []
    for runs, quantities in groups(found):
        after = f" ({runs[-1]['removals']:,})" if len(found["runs"]) > 1 else ""
        heads += [QUANTITIES[key][0] + after for key in quantities]
    return "| way | " + " | ".join([*heads, "units", "refused", "CPU s"]) + " |"


def ways(found: dict) -> tuple[str, ...]:
    return ("retrained", NO_OP, *found["runs"][0]["ways"])


def show(record: dict) -> str:
    lines = [f"Data: {record['data']}"]
    for found in record["models"]:
        lines += ["", f"{found['model']}, trained on {found['n']:,} samples", heading(found)]
        lines += [row(found, way) for way in ways(found)]
    lines += [
        "",
        "A number with a standard deviation is of several seeds, any other of the first. gradient:",
        "norm, of the retained objective; sample's gradient: of the last removed samples' losses.",
        "loss: of the removed samples. JS: distance to the outputs of the retrained network (in",
        "its own row: of another one). CPU s: for a sample.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    common.main("removals", common.options(__doc__, data=DATA), run, draw, show)
