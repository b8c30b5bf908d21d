"""Networks as people train them: data, architectures and trainings of `ordinary.py`.

Five networks that no setting of the package was chosen with: AdamW, batch norm, dropout,
augmentation, few epochs, a recurrent network, two transformers. Everything that they learn from
comes with Python, scikit-learn or Debian's package dataset-fashion-mnist; nothing is downloaded.
"""

import ast
import functools
import hashlib
import math
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from calibration import Block
from calibration import cnn as digits_cnn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from unlearning_models import fashion_mnist

VALIDATION = 1000
WORDS, LENGTH = 2048, 24  # the vocabulary of hashed words; words of a docstring that are read
#: Packages whose docstrings are told apart; a user is a module of one of them.
LIBRARIES = ("(standard library)", "numpy", "scipy", "sklearn", "sympy", "networkx")
Data = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Pool:
    """All samples of a data set: those to learn from and to validate with, and test samples."""

    data: Data
    users: Tensor  # of each sample of data
    test: Data | None  # None: what data leaves


def digits() -> Pool:
    """scikit-learn's digits; a user is a run of twelve, since they are in their writers' order."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    return Pool((x, y), torch.arange(len(y)) // 12, None)


def fashion() -> Pool:
    """12,000 images of Fashion-MNIST's training set and all 10,000 of its test set.

    Nobody knows who made an image. A "user" is a cluster of k-means, 250 on 20 principal
    components: images that are more alike than those of a person would be.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.decomposition import PCA

    x, y, *test = fashion_mnist()
    x, y = x[:12_000], y[:12_000]
    found = PCA(20, random_state=0).fit_transform(x.flatten(1).numpy())
    clusters = MiniBatchKMeans(250, n_init=1, random_state=0).fit_predict(found)
    return Pool((x, y), torch.tensor(clusters, dtype=torch.int64), (test[0], test[1]))


def docstrings(
    length: int = LENGTH, libraries: tuple[str, ...] = LIBRARIES, most: int = 1500
) -> Pool:
    """The first words of docstrings of functions and classes, by hash; the class is the library.

    A user is a module. Which texts there are depends on the versions that are installed.
    """
    rows, labels, users = [], [], []
    for label, library in enumerate(libraries):
        paths = {name: Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")}
        folder = paths["stdlib"] if library == LIBRARIES[0] else paths["purelib"] / library
        files = [f for f in sorted(folder.rglob("*.py")) if _is_source(f.relative_to(folder))]
        found: dict[str, int] = {}
        for number in torch.randperm(
            len(files), generator=torch.Generator().manual_seed(label)
        ).tolist():
            for text in _texts(files[number], length):
                found.setdefault(text, 1000 * label + number)
            if len(found) >= most:
                break
        rows += [hashed_words(text, length) for text in found]
        labels += [label] * len(found)
        users += list(found.values())
    return Pool((torch.stack(rows), torch.tensor(labels)), torch.tensor(users), None)


def _is_source(path: Path) -> bool:
    return not {"site-packages", "tests", "test", "idlelib"} & set(path.parts)


def _texts(path: Path, length: int) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except SyntaxError:
        return []
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [" ".join(text.split()[:length]) for text in texts if len(text.split()) >= 8]


def hashed_words(text: str, length: int) -> Tensor:
    """Numbers of its words from 1 on, behind them zeros."""
    words = [1 + zlib.crc32(word.lower().encode()) % (WORDS - 1) for word in text.split()]
    return torch.tensor(words + [0] * (length - len(words)))


# ---------------------------------------------------------------------------------------------
# Networks


def augmented_cnn() -> nn.Module:
    """Two convolutions of stride 2 with batch norm, dropout before each linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, 2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(24 * 7 * 7, 48),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(48, 10),
    )


class Rows(nn.Module):
    """A GRU of 48 that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(28, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x[:, 0])[0][:, -1])


class Patches(nn.Module):
    """A vision transformer: sixteen patches of 7 x 7, two blocks of width 32."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, width, 7, 7), nn.Linear(16, width)
        self.register_buffer("each", torch.eye(16))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places(self.each)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Docstrings(nn.Module):
    """A DistilBERT of two layers and width 48 from random weights, as a plain classifier."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        config = DistilBertConfig(
            vocab_size=WORDS,
            max_position_embeddings=LENGTH,
            n_layers=2,
            n_heads=4,
            dim=48,
            hidden_dim=96,
            num_labels=len(LIBRARIES),
            attn_implementation="eager",
        )
        self.bert = DistilBertForSequenceClassification(config)

    def forward(self, words: Tensor) -> Tensor:
        return self.bert(input_ids=words, attention_mask=(words > 0).long()).logits


# ---------------------------------------------------------------------------------------------
# Trainings


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to two pixels and flipped at random."""
    dy, dx = torch.randint(-2, 3, (2, len(x)), generator=generator)
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=float(x.min()))
    rows, columns = torch.arange(28) + 2 + dy[:, None], torch.arange(28) + 2 + dx[:, None]
    flipped = torch.rand(len(x), generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    number = torch.arange(len(x))[:, None, None]
    return padded[number, 0, rows[:, :, None], columns[:, None, :]][:, None]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: by AdamW, as its weight decay here and everywhere is .01."""

    title: str
    network: Callable[[], nn.Module]
    pool: Callable[[], Pool]
    n: int
    epochs: int
    rate: float
    batch_size: int = 32
    cosine: bool = True
    warm: float = 0.05  # share of the steps in which the rate rises
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    shared: bool = True  # retrained networks leave out all requests of a training at once

    def described(self) -> str:
        """What a trained network depends on."""
        numbers = (self.epochs, self.rate, self.batch_size, self.cosine, self.warm)
        augment = self.augment and self.augment.__name__
        return repr((str(self.network()), *numbers, augment))


RECIPES = {
    "adamw": Recipe(
        "digits, CNN with batch norm and dropout, AdamW, 12 epochs",
        digits_cnn, digits, 1000, 12, 2e-3, cosine=False, warm=0.0, shared=False,
    ),
    "augmented": Recipe(
        "Fashion-MNIST, CNN with dropout and augmentation, 6 epochs",
        augmented_cnn, fashion, 6000, 6, 2e-3, augment=shifted,
    ),
    "gru": Recipe("Fashion-MNIST by rows, GRU", Rows, fashion, 4000, 10, 4e-3),
    "vit": Recipe("Fashion-MNIST, vision transformer", Patches, fashion, 4000, 12, 3e-3),
    "distilbert": Recipe(
        "docstrings of six libraries, small DistilBERT", Docstrings, docstrings, 2500, 6, 1e-3
    ),
}  # fmt: skip


def fit(recipe: Recipe, data: Data, seed: int, epochs: int | None = None) -> nn.Module:
    """Train from scratch."""
    torch.manual_seed(seed)
    model, generator = recipe.network().train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=1e-2)
    epochs = epochs or recipe.epochs
    total, step = epochs * math.ceil(len(data[1]) / recipe.batch_size), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(data[1]), generator=generator).split(recipe.batch_size):
            share = step / total
            scale = (1 + math.cos(math.pi * share)) / 2 if recipe.cosine else 1.0
            if share < recipe.warm:
                scale = (step + 1) / (recipe.warm * total)
            optimizer.param_groups[0]["lr"] = recipe.rate * min(scale, 1.0)
            x = data[0][batch]
            if recipe.augment is not None:
                x = recipe.augment(x, generator)
            optimizer.zero_grad()
            cross_entropy(model(x), data[1][batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


def fitted(
    cache: Path, name: str, data: Data, seed: int, epochs: int | None
) -> tuple[nn.Module, float]:
    """The network that `fit` makes, from the cache if that has it, and its CPU seconds."""
    recipe = RECIPES[name]
    digest = hashlib.sha256(repr((recipe.described(), seed, epochs, torch.__version__)).encode())
    for tensor in data:
        digest.update(tensor.contiguous().numpy().tobytes())
    path = cache / f"{name}-{seed}-{digest.hexdigest()[:12]}.pt"
    if path.exists():
        found = torch.load(path, weights_only=True)
        model = recipe.network()
        model.load_state_dict(found["model"])
        return model.eval(), found["seconds"]
    begin = time.process_time()
    model = fit(recipe, data, seed, epochs)
    seconds = time.process_time() - begin
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "seconds": seconds}, unfinished)
    unfinished.replace(path)
    return model, seconds


# ---------------------------------------------------------------------------------------------
# Tasks


@dataclass(frozen=True)
class Request:
    """Samples that someone asks to delete, by their numbers in the training samples."""

    kind: str
    numbers: list[int]
    users: tuple[int, ...] = ()  # all of whose samples these are


@dataclass(frozen=True)
class Task:
    """A training, and five requests that are apart from one another."""

    data: Data
    users: Tensor
    requests: list[Request]
    validation: Data
    test: Data

    def parts(self, numbers: list[int]) -> tuple[Data, Data]:
        """The samples of these numbers, and the others."""
        wanted = torch.zeros(len(self.data[1]), dtype=torch.bool)
        wanted[numbers] = True
        forget, retain = ((self.data[0][mask], self.data[1][mask]) for mask in (wanted, ~wanted))
        return forget, retain


pool = functools.cache(lambda made: made())  # each data set is read once


def task(name: str, seed: int) -> Task:
    """Draw a training and requests: of two users, of random samples, of wrong labels."""
    recipe, all_of_it = RECIPES[name], pool(RECIPES[name].pool)
    (x, y), generator = all_of_it.data, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    held = min(VALIDATION, (len(y) - recipe.n) * 3 // 8)
    train, validation, rest = order.split([recipe.n, held, len(y) - recipe.n - held])
    test = all_of_it.test or (x[rest], y[rest])
    targets, users = y[train].clone(), all_of_it.users[train]
    requests = [Request("user", *found) for found in _some_users(users, generator)]
    taken = {i for request in requests for i in request.numbers}
    free = [i for i in torch.randperm(recipe.n, generator=generator).tolist() if i not in taken]
    sizes = (5, 10, 20, 40) if seed % 2 else (8, 15, 30, 40)
    for kind, size in (
        ("random", sizes[seed // 2 % 2]),
        ("random", sizes[2 + seed // 2 % 2]),
        ("wrong", (12, 20)[seed % 2]),
    ):
        requests.append(Request(kind, sorted(free[:size])))
        free = free[size:]
    wrong = torch.tensor(requests[-1].numbers)
    classes = int(y.max()) + 1
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    targets[wrong] = (targets[wrong] + shift) % classes
    return Task((x[train], targets), users, requests, (x[validation], y[validation]), test)


def _some_users(
    users: Tensor, generator: torch.Generator
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Samples of two users who have from 5 to 40; of the digits' small users several together."""
    names, counts = users.unique(return_counts=True)
    drawn = names[(counts >= 5) & (counts <= 40)]
    drawn = drawn[torch.randperm(len(drawn), generator=generator)].tolist()
    few = int(counts.max()) <= 12
    found = (drawn[:1], drawn[1:4]) if few else (drawn[:1], drawn[1:2])
    return [
        (torch.isin(users, torch.tensor(some)).nonzero().flatten().tolist(), tuple(some))
        for some in found
    ]
