"""Find the attributes that are spurious for a target with FOCI, and train without relying on them.

The paper trains MobileNetV2 on 30 000 images of CelebA. FOCI selects binary attributes on which the
target depends in the training set. A penalty then makes the network independent of them: each
selected attribute has a linear head on the network's features, and the gradient of its loss is
reversed on the way into the features.

This example has two classes of small images, and 20 attributes. Two of them are marks in the image
that go with the class in training; six are marks that do not; two are noisy copies of the first
marks, and ten are coin flips. In the test set every image has all four combinations of the first
two marks. The script compares the accuracy on the worst of the eight groups (class and marks) for
networks that are trained with no penalty, with a penalty on FOCI's attributes, on all, and on as
many random ones.

Without --full: digits of scikit-learn, two seeds, half a minute. With --full: T-shirts and
pullovers of Fashion-MNIST, five seeds, four minutes of a CPU. With --data: CelebA.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, interpolate, pad

from lcodec_ext import foci

SPURIOUS, VISIBLE, COPIES, COINS = 2, 6, 2, 10
NAMES = [
    *(f"mark {k + 1}" for k in range(SPURIOUS)),
    *(f"other mark {k + 1}" for k in range(VISIBLE)),
    *(f"copy of mark {k + 1}" for k in range(COPIES)),
    *(f"coin {k + 1}" for k in range(COINS)),
]
AGREE = (0.95, 0.9)  # how often a spurious mark goes with the class in training
COPY = 0.9  # how often a copy has the value of its mark
SIDE, MARK = 32, 4  # pixels of an image, of a mark
PLACES = [(0, 0), (0, 28), (28, 0), (28, 28), (0, 14), (28, 14), (14, 0), (14, 28)]
FEATURES = 64
LAMBDAS = (0.1, 0.2, 0.5, 1.0)
TUNING = (1000, 1001)  # added to --seed: the seeds that choose lambda
CLASSES = {"T-shirt": 0, "pullover": 2}  # of Fashion-MNIST
METHODS = ("none", "FOCI", "all", "random")
SMALLEST = 20  # images of a group whose accuracy counts


# The method: reusable with other networks and data.


class ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -strength."""

    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


class Regularised(nn.Module):
    """A classifier on the features of a network, and a head for each attribute to be unlearned.

    `body` maps a batch to features of shape (n, width). The network's outputs are those of the
    classifier alone; `loss` adds the heads. `strength` is the paper's lambda: it scales the
    reversed gradient, while the heads themselves learn at full rate.
    """

    def __init__(self, body: nn.Module, width: int, attributes: int, strength: float):
        super().__init__()
        self.body, self.classifier = body, nn.Linear(width, 2)
        self.heads = nn.Linear(width, 2 * attributes) if attributes else None
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))

    def loss(self, x: Tensor, target: Tensor, attributes: Tensor) -> Tensor:
        """Cross-entropy of the target, plus that of each attribute behind the reversal."""
        features = self.body(x)
        found = cross_entropy(self.classifier(features), target)
        if self.heads is None:
            return found
        reversed_ = dropout(ReverseGradient.apply(features, self.strength), 0.2, self.training)
        guesses = self.heads(reversed_).reshape(-1, 2)
        count = attributes.shape[1]
        return found + count * cross_entropy(guesses, attributes.reshape(-1))


def spurious_attributes(attributes: Tensor, target: Tensor, most: int | None = None, seed=0):
    """FOCI of the attributes against the target: what the target depends on in these data.

    Each step has to beat chance (`stop="permutation"`). Whether a dependence is causal is for the
    user to say: leave out attributes on which the target may rely.
    """
    table, y = attributes.numpy().astype(float), target.numpy()
    varied = np.flatnonzero(table.min(0) < table.max(0))
    found = foci(table[:, varied], y, stop="permutation", max_features=most, seed=seed)
    return [int(varied[k]) for k in found.ordering]


@dataclass
class Images:
    """Images (float in 0 .. 1, or uint8), their classes 0 and 1, and binary attributes (n, p)."""

    x: Tensor
    y: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.y)


def batch(x: Tensor) -> Tensor:
    """What a network sees of images: 0 .. 255 becomes 0 .. 1."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def fit(
    train: Images,
    selected: Sequence[int],
    strength: float,
    seed: int,
    epochs: int,
    body: Callable[[int], nn.Module] | None = None,
    width: int = FEATURES,
) -> Regularised:
    """A network that is penalised for its dependence on the selected attributes.

    `body(channels)` makes the network of `width` features; a small CNN by default.
    """
    torch.manual_seed(seed)
    model = Regularised((body or small_cnn)(train.x.shape[1]), width, len(selected), strength)
    attributes = train.attributes[:, list(selected)]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    size = 32
    steps = epochs * -(-len(train) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(size):
            if len(rows) > 1:  # batch norm needs two
                loss = model.loss(batch(train.x[rows]), train.y[rows], attributes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return model.eval()


def small_cnn(channels: int) -> nn.Module:
    """Two convolutions and a layer of features that are normalised and bounded.

    Without bounds the penalty can be raised for ever by larger features, and trainings break down.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(8),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, FEATURES),
        nn.BatchNorm1d(FEATURES),
        nn.Tanh(),
    )


@torch.no_grad()
def judge(model: nn.Module, test: Images, judged: Sequence[int], train: Images) -> dict:
    """Accuracy of the worst group and mean of all groups: target and the judged attributes.

    `by_agreement` has the mean accuracy of the groups in which 0, 1, .. of the attributes have the
    value that goes with the class in training: nan where no such group is large enough.
    """
    right = torch.cat([model(batch(x)).argmax(1) for x in test.x.split(500)]) == test.y
    values = test.attributes[:, list(judged)]
    code = test.y + 2 * (values * 2 ** torch.arange(len(judged))).sum(1)
    sign = [
        train.attributes[train.y == 1, j].float().mean()
        >= train.attributes[train.y == 0, j].float().mean()
        for j in judged
    ]
    agree = sum(
        ((values[:, k] == test.y) == s).long() for k, s in enumerate(sign)
    ) + torch.zeros_like(test.y)
    groups = [code == c for c in code.unique() if (code == c).sum() >= SMALLEST]
    accuracy = [right[g].float().mean().item() for g in groups]
    if not groups:
        raise SystemExit(
            f"no group of the target and the judged attributes has {SMALLEST} images for the test; "
            "read more images, with --images"
        )
    counts = [int(agree[g][0]) for g in groups]
    return {
        "worst": min(accuracy),
        "mean": float(np.mean(accuracy)),
        "by_agreement": [
            float(np.mean([a for a, k in zip(accuracy, counts, strict=True) if k == n] or [np.nan]))
            for n in range(len(judged) + 1)
        ],
    }


# The data: planted attributes, or CelebA.


@dataclass
class Problem:
    """Data of one seed. `judged`: which attributes make the groups, None for FOCI's first two."""

    names: list[str]
    train: Images
    validation: Images
    test: Images
    judged: list[int] | None


def planted(x: Tensor, y: Tensor, generator: torch.Generator, agree=AGREE) -> Images:
    """Images with attributes, of which the first eight are marks that can be seen."""

    def coin(chance):
        return (torch.rand(len(y), generator=generator) < chance).long()

    def like(values, chance):
        return torch.where(coin(chance) == 1, values, 1 - values)

    marks = [like(y, chance) for chance in agree]
    columns = [
        *marks,
        *(coin(0.5) for _ in range(VISIBLE)),
        *(like(values, COPY) for values in marks),
        *(coin(0.05 * (k + 1)) for k in range(COINS)),
    ]
    attributes = torch.stack(columns, 1)
    return Images(draw_marks(x, attributes), y, attributes)


def draw_marks(x: Tensor, attributes: Tensor) -> Tensor:
    """The images with a chequered mark for each of the first eight attributes that is 1."""
    x = x.clone()
    mark = (torch.arange(MARK)[:, None] + torch.arange(MARK)) % 2
    for k, (row, column) in enumerate(PLACES):
        x[attributes[:, k] == 1, :, row : row + MARK, column : column + MARK] = 1.0 - mark
    return x


def all_combinations(x: Tensor, y: Tensor, generator: torch.Generator) -> Images:
    """Every image with every combination of the spurious marks: groups of equal size per class."""
    found = []
    for first in (0, 1):
        for second in (0, 1):
            images = planted(x, y, generator)
            images.attributes[:, 0], images.attributes[:, 1] = first, second
            found.append(Images(draw_marks(x, images.attributes), y, images.attributes))
    return Images(*(torch.cat([getattr(f, k) for f in found]) for k in ("x", "y", "attributes")))


def planted_problem(x, y, held, seed, sizes) -> Problem:
    """Planted attributes; `held` = (x, y) of test images that no training of any seed sees."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    train, validation = order[: sizes[0]], order[sizes[0] : sum(sizes)]
    return Problem(
        NAMES,
        planted(x[train], y[train], generator),
        all_combinations(x[validation], y[validation], generator),
        all_combinations(*held, generator),
        list(range(SPURIOUS)),
    )


def digits(seed: int) -> Problem:
    """Digits below five against the others, 24 x 24 in a frame of 4 pixels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    x, y = pad(interpolate(x, scale_factor=3.0), (4, 4, 4, 4)), torch.tensor(y >= 5).long()
    return planted_problem(x[:1400], y[:1400], (x[1400:], y[1400:]), seed, (1100, 300))


def fashion(seed: int) -> Problem:
    """Two classes of Fashion-MNIST in a frame of 2 pixels."""
    from unlearning_models import fashion_mnist

    def two(x, y):
        some = torch.isin(y, torch.tensor(list(CLASSES.values())))
        x = pad(x[some] * 0.353 + 0.286, (2, 2, 2, 2))
        return x, (y[some] == max(CLASSES.values())).long()

    x, y, x_test, y_test = fashion_mnist()
    return planted_problem(*two(x, y), two(x_test, y_test), seed, (4000, 1000))


def read_attributes(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of files and attributes, and a 0/1 table, from list_attr_celeba.csv or .txt."""
    table, text = folder / "list_attr_celeba.csv", folder / "list_attr_celeba.txt"
    if table.is_file():
        with table.open(newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        names = header[1:]
    elif text.is_file():
        lines = text.read_text().splitlines()
        names, rows = lines[1].split(), [line.split() for line in lines[2:] if line.strip()]
    else:
        raise SystemExit(
            f"{folder} has neither list_attr_celeba.csv nor list_attr_celeba.txt, the attributes "
            "of CelebA"
        )
    bad = [row[0] for row in rows if len(row) != len(names) + 1 or set(row[1:]) - {"1", "-1", "0"}]
    if bad or not rows:
        which = f"the row of {bad[0]}" if bad else "the table, which has no rows,"
        raise SystemExit(f"list_attr_celeba: {which} should have {len(names)} values, each 1 or -1")
    values = np.array([[value == "1" for value in row[1:]] for row in rows]).astype(int)
    return [row[0] for row in rows], names, values


def read_images(folder: Path, files: Sequence[str], side: int) -> Tensor:
    """Images of img_align_celeba, uint8, shape (n, 3, side, side)."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("CelebA's images need Pillow: pip install pillow") from None
    inside = folder / "img_align_celeba"
    if (inside / "img_align_celeba").is_dir():  # as Kaggle packs it
        inside = inside / "img_align_celeba"
    missing = [file for file in files if not (inside / file).is_file()]
    if missing:
        raise SystemExit(
            f"{inside} lacks {len(missing)} of {len(files)} images that list_attr_celeba names, "
            f"the first is {missing[0]}"
        )
    found = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    for k, file in enumerate(common.progress(files, "images", "image")):
        with Image.open(inside / file) as image:
            pixels = np.array(image.convert("RGB").resize((side, side)))
        found[k] = torch.from_numpy(pixels).permute(2, 0, 1)
    return found


def celeba(folder: Path, target: str, images: int, side: int = 64) -> Callable[[int], Problem]:
    """Problems of CelebA: as many images with the target as without, in training."""
    files, names, values = read_attributes(folder)
    if target not in names:
        raise SystemExit(f"--target: {target!r} is no attribute of this table; it has {names}")
    column = names.index(target)
    order = np.random.default_rng(0).permutation(len(files))
    halves = [order[values[order, column] == v][: images // 2] for v in (0, 1)]
    size = min(map(len, halves))
    if size < 10:
        raise SystemExit(f"--target: only {size} images with one value of {target!r}")
    chosen = np.stack([half[:size] for half in halves], 1).reshape(-1)  # classes alternate
    x = read_images(folder, [files[k] for k in chosen], side)
    y = torch.tensor(values[chosen, column])
    attributes = torch.tensor(np.delete(values[chosen], column, axis=1))
    names = [name for name in names if name != target]

    def rows(which):
        return Images(x[which], y[which], attributes[which])

    def problem(seed: int) -> Problem:
        rest, test = torch.arange(len(y)).split([len(y) * 7 // 8, len(y) - len(y) * 7 // 8])
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
        part = len(rest) // 7
        return Problem(names, rows(rest[part:]), rows(rest[:part]), rows(test), None)

    return problem


# The comparison.


def selections(problem: Problem, seed: int) -> dict[str, list[int]]:
    """Which attributes each method penalises."""
    found = spurious_attributes(problem.train.attributes, problem.train.y, seed=seed)
    count = len(problem.names)
    random = np.random.default_rng(seed).choice(count, len(found), replace=False).tolist()
    return {"none": [], "FOCI": found, "all": list(range(count)), "random": random}


def trial(problem: Problem, selected, strength: float, seed: int, epochs: int, part: str) -> dict:
    """One training, judged on the validation or the test images."""
    model = fit(problem.train, selected["penalised"], strength, seed, epochs)
    return judge(model, getattr(problem, part), selected["judged"], problem.train)


def compare(problem_of: Callable[[int], Problem], seeds, tuning, lambdas, epochs: int) -> dict:
    """Choose each method's lambda on `tuning` seeds and validation images; test on `seeds`."""
    todo = [(s, m, v) for s in tuning for m in METHODS[1:] for v in lambdas]
    todo += [(s, m, None) for s in seeds for m in METHODS]
    searched = {m: {str(v): [] for v in lambdas} for m in METHODS[1:]}
    chosen = dict.fromkeys(METHODS, lambdas[0])
    found, selected = {m: [] for m in METHODS}, {}
    last = None
    for seed, method, strength in common.progress(todo, "spurious features", "training"):
        if seed != last:
            problem, last = problem_of(seed), seed
            which = selections(problem, seed)
            selected[seed] = [problem.names[k] for k in which["FOCI"]]
            judged = problem.judged if problem.judged is not None else which["FOCI"][:2]
        given = {"penalised": which[method], "judged": judged}
        if strength is not None:
            result = trial(problem, given, strength, seed, epochs, "validation")
            searched[method][str(strength)].append(result["worst"])
            continue
        if method != "none" and tuning:
            means = {v: np.mean(searched[method][str(v)]) for v in lambdas}
            chosen[method] = max(lambdas, key=means.__getitem__)
        found[method].append(trial(problem, given, chosen[method], seed, epochs, "test"))
    return {
        "seeds": list(seeds),
        "tuning_seeds": list(tuning),
        "attributes": problem.names,
        "judged": [problem.names[k] for k in judged],
        "selected_by_foci": [selected[s] for s in seeds],
        "epochs": epochs,
        "images": {part: len(getattr(problem, part)) for part in ("train", "validation", "test")},
        "search": searched,
        "methods": {
            m: summary(found[m]) | {"lambda": None if m == "none" else chosen[m]} for m in METHODS
        },
        "gain_of_foci": gain(found["FOCI"], found["none"]),
        "foci_over_all": gain(found["FOCI"], found["all"]),
    }


def summary(results: list[dict]) -> dict:
    """Means over seeds and their standard errors, in percent."""
    kept = {}
    for key in ("worst", "mean"):
        values = 100 * np.array([r[key] for r in results])
        kept[key] = spread(values) | {"values": values.round(2).tolist()}
    most = min(len(r["by_agreement"]) for r in results)  # seeds of CelebA may select fewer
    table = 100 * np.array([r["by_agreement"][:most] for r in results])
    kept["by_agreement"] = [spread(c[~np.isnan(c)]) for c in table.T]
    return kept


def spread(values: np.ndarray) -> dict | None:
    """Mean and standard error; None without values."""
    if not len(values):
        return None
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": round(float(values.mean()), 2), "error": round(float(error), 2)}


def gain(those: list[dict], others: list[dict]) -> dict:
    """Difference of worst-group accuracies, seed by seed, in points."""
    return spread(
        100 * np.array([a["worst"] - b["worst"] for a, b in zip(those, others, strict=True)])
    )


def run(arguments: argparse.Namespace) -> dict:
    seed, full = arguments.seed, arguments.full
    if arguments.data is not None:
        images = arguments.images or (34000 if full else 2000)
        problem_of, data = celeba(arguments.data, arguments.target, images), "CelebA"
        epochs, count = (10, 3) if full else (3, 1)
    elif full:
        problem_of, data, epochs, count = fashion, "Fashion-MNIST", 8, 5
    else:
        problem_of, data, epochs, count = digits, "digits", 16, 2
    tuning = [seed + k for k in TUNING] if full else []
    lambdas = LAMBDAS if full else (0.2,)
    return {"data": data} | compare(problem_of, range(seed, seed + count), tuning, lambdas, epochs)


def show(record: dict) -> str:
    lines = [
        f"{record['data']}: worst-group accuracy in percent, {len(record['seeds'])} seeds",
        f"{'penalised':<12}{'lambda':>8}{'worst group':>18}{'mean of groups':>18}",
    ]
    for name, found in record["methods"].items():
        cells = [f"{found[k]['mean']:.1f} +- {found[k]['error']:.1f}" for k in ("worst", "mean")]
        lines.append(f"{name:<12}{found['lambda'] or '-':>8}{cells[0]:>18}{cells[1]:>18}")
    lines.append(f"FOCI selected: {'; '.join(map(str, record['selected_by_foci']))}")
    return "\n".join(lines)


def draw(record: dict, file: Path) -> None:
    from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PURPLE

    colours = dict(zip(METHODS, (DARK, BLUE, ORANGE, PURPLE), strict=True))
    with common.figure(file, columns=2) as (left, right):
        for k, (name, found) in enumerate(record["methods"].items()):
            worst = found["worst"]
            left.bar(k, worst["mean"], 0.65, yerr=worst["error"], color=colours[name], capsize=3)
            left.text(k, 2, f"{worst['mean']:.0f}", ha="center", color="white", weight="bold")
            count = len(found["by_agreement"])
            steps = {n: step for n, step in enumerate(found["by_agreement"]) if step}
            right.errorbar(
                list(steps),
                [step["mean"] for step in steps.values()],
                [step["error"] for step in steps.values()],
                color=colours[name],
                marker="o",
                capsize=3,
                label=name,
            )
        left.set_xticks(range(len(METHODS)), METHODS)
        left.set_title("Accuracy of the worst group, %")
        left.set_xlabel("attributes that are penalised")
        left.set_ylim(0, 100)
        right.set_title("Accuracy by group, %")
        right.set_xticks(range(count))
        right.set_xlabel("how many spurious attributes agree with the class")
        right.legend(title="penalised")


def parser() -> argparse.ArgumentParser:
    found = common.options(
        __doc__, data="folder with list_attr_celeba.csv or .txt, and img_align_celeba/*.jpg"
    )
    found.add_argument("--target", default="No_Beard", help="CelebA: the attribute to learn")
    found.add_argument("--images", type=int, help="CelebA: how many images are read")
    return found


if __name__ == "__main__":
    common.main("spurious", parser(), run, draw, show)
