"""Delete texts of one class one by one from a DistilBERT, and count how many it bears.

The paper (Mehta et al., CVPR 2022) fine-tunes DistilBERT on LEDGAR, provisions of contracts with
several labels, and deletes up to 100 provisions of one class, each by a step on the units that
L-FOCI selects and noise for (epsilon, delta). Its table says after how many deletions F1 falls.
Here a small DistilBERT from random weights learns which library a docstring is from. The same
streams run for the paper's four epsilons and without noise, next to this package's calibrated
default, to the network as it was, and to networks trained again without the texts.

Reduced: three libraries, 12 deletions, in half a minute. --full: six libraries, 100 deletions,
in 20 minutes of CPU time. --data DIR reads LEDGAR, --model DIR a DistilBERT as published.
"""

import copy
import itertools
import json
import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import torch
from ordinary_models import LIBRARIES, WORDS, docstrings, hashed_words
from torch import Tensor, nn

from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PALE, PURPLE, RED
from lcodec_ext.unlearning import TokenReplacement, Unlearner

LAMBDA, DELTA = 0.01, 0.01  # the paper's
EPSILONS = (0.1, 0.01, 0.001, 0.0005)
OFTEN = 0.001  # epsilons up to this have several streams, which cost little as they break soon
PAPER_N = 57_600  # 80% and of that 90% of the 80,000 provisions of LEDGAR in LexGLUE
PAPER_LENGTH = 128
FALL = 0.05  # of macro F1: by how much it has fallen when a stream counts as broken
GIVEN_UP = 0.75  # of the macro F1 at the start: a stream that falls below this share ends
PUBLISHED_TOKENS = range(999, 30_522)  # that the published code replaces a token by
CLASSES = 100  # of LEDGAR, the most frequent ones
DATA = 'LEDGAR: *.jsonl with {"provision": text, "label": [names], "source": ...} in each line'
NOISELESS, DEFAULT = "paper, no noise", "calibrated default"


@dataclass(frozen=True)
class Form:
    """How large an experiment is."""

    libraries: tuple[str, ...]
    n: int  # texts to train with
    length: int  # tokens of a text
    dim: int
    epochs: int
    removals: int
    request: int  # texts of a request to the default
    perturbations: int
    rows: int  # retained texts that the paper's step reads
    repeats: int  # streams, with other noise, of each epsilon whose streams break soon
    retrainings: int


FULL = Form(LIBRARIES, 3600, PAPER_LENGTH, 48, 8, 100, 20, 100, 128, 3, 2)
REDUCED = Form(("numpy", "sympy", "networkx"), 576, 32, 32, 6, 12, 6, 40, 128, 1, 1)


# ---------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class Data:
    """Token ids (0 is padding) and 0/1 targets by class, split as the paper does."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    name: str
    replacement: TokenReplacement


def split(tokens: Tensor, targets: Tensor, n: int | None, seed: int) -> list[tuple[Tensor, Tensor]]:
    """80% and 20% for the test; of the 80%, 90% for training and 10% for validation."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    if n is not None:
        order = order[: round(n / 0.72)]
    learnt, test = order.tensor_split([len(order) * 8 // 10])
    train, validation = learnt.tensor_split([len(learnt) * 9 // 10])
    return [(tokens[part], targets[part]) for part in (train, validation, test)]


def provisions(folder: Path, most: int = CLASSES) -> tuple[list[str], Tensor, tuple[str, ...]]:
    """Texts, 0/1 targets and class names of LEDGAR; texts without a frequent label are left out."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise SystemExit(f"--data: {folder} has no *.jsonl. It should hold {DATA}")
    texts, labels = [], []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text, names = entry["provision"], entry["label"]
                if not isinstance(text, str) or not isinstance(names, list):
                    raise TypeError("provision must be a text and label a list of names")
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"--data: line {number} of {file} is no provision ({error!r}). It should "
                    f"hold {DATA}"
                ) from None
            texts.append(text)
            labels.append(set(names))
    counts = Counter(name for names in labels for name in names)
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[:most]
    classes = tuple(sorted(frequent))
    kept = [i for i, names in enumerate(labels) if names & set(classes)]
    targets = torch.tensor([[float(c in labels[i]) for c in classes] for i in kept])
    return [texts[i] for i in kept], targets, classes


def hashed(texts: list[str], length: int) -> Tensor:
    """Numbers of words from 1 on, by hash; behind a text zeros."""
    return torch.stack([hashed_words(" ".join(t.split()[:length]), length) for t in texts])


def load(arguments, form: Form) -> Data:
    """Docstrings, or what the folder holds; with `--model`, by that model's tokens."""
    tokenizer = None
    replacement = TokenReplacement(vocab_size=WORDS, special_ids=(0,))
    if arguments.model is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        tokens = [t for t in PUBLISHED_TOKENS if t < len(tokenizer)]
        replacement = TokenReplacement(token_ids=tokens, special_ids=tokenizer.all_special_ids)
        if arguments.data is None:
            raise SystemExit("--model belongs to --data: docstrings are read as hashed words")
    if arguments.data is None:
        pool = docstrings(form.length, form.libraries, math.ceil(form.n / 0.72 / 3))
        tokens, classes = pool.data[0], form.libraries
        targets = nn.functional.one_hot(pool.data[1], len(classes)).float()
        name = "docstrings of installed libraries"
    else:
        texts, targets, classes = provisions(arguments.data)
        name = arguments.data.name
        if tokenizer is None:
            tokens = hashed(texts, PAPER_LENGTH)
        else:
            tokens = tokenizer(
                texts,
                padding="max_length",
                truncation=True,
                max_length=PAPER_LENGTH,
                return_tensors="pt",
            )["input_ids"]
    parts = split(tokens, targets, arguments.samples or form.n, arguments.seed)
    return Data(*parts, classes, name, replacement)


# ---------------------------------------------------------------------------------------------
# Network


class Classifier(nn.Module):
    """DistilBERT with one logit a class, from random weights or a published folder."""

    def __init__(self, data: Data, dim: int, folder: Path | None) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        if folder is not None:
            self.bert = DistilBertForSequenceClassification.from_pretrained(
                folder,
                num_labels=len(data.classes),
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # of the last layer of a model with other classes
            )
            return
        config = DistilBertConfig(
            vocab_size=WORDS,
            max_position_embeddings=data.train[0].shape[1],
            n_layers=2,
            n_heads=4,
            dim=dim,
            hidden_dim=2 * dim,
            num_labels=len(data.classes),
            attn_implementation="eager",
        )
        self.bert = DistilBertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens, attention_mask=(tokens > 0).long()).logits


def balanced_loss(targets: Tensor) -> nn.BCEWithLogitsLoss:
    """Binary cross-entropy in which a class's positives weigh as much as its negatives."""
    positive = targets.sum(0)
    return nn.BCEWithLogitsLoss(pos_weight=(len(targets) - positive) / positive.clamp(min=1))


def train(data: Data, part: tuple[Tensor, Tensor], form: Form, arguments, seed: int) -> nn.Module:
    """AdamW with a rise over the first twentieth of the steps and a cosine down to 0."""
    torch.manual_seed(seed)
    model = Classifier(data, form.dim, arguments.model).train()
    generator = torch.Generator().manual_seed(seed)
    rate, epochs, batch_size = (1e-3, form.epochs, 32) if arguments.model is None else (5e-5, 1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=LAMBDA)
    loss_fn, n = balanced_loss(data.train[1]), len(part[0])
    step, steps = 0, epochs * math.ceil(n / batch_size)
    for _ in common.progress(range(epochs), "training", "epoch"):
        for batch in torch.randperm(n, generator=generator).split(batch_size):
            scale = min((step + 1) / (0.05 * steps), (1 + math.cos(math.pi * step / steps)) / 2)
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.zero_grad()
            loss_fn(model(part[0][batch]), part[1][batch]).backward()
            optimizer.step()
            step += 1
    return model.eval()


# ---------------------------------------------------------------------------------------------
# Measures


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in tokens.split(256)])


def f1(found: Tensor, targets: Tensor) -> Tensor:
    """F1 of each class; 0 for a class that nothing is said of."""
    said, true = found > 0, targets > 0.5
    return 2 * (said & true).sum(0) / (said.sum(0) + true.sum(0)).clamp(min=1)


def point(model: nn.Module, data: Data, removed: int) -> dict:
    each = f1(logits(model, data.test[0]), data.test[1])
    return {"removed": removed, "macro_f1": float(each.mean())}


def loss_of(model: nn.Module, data: Data, asked: Tensor) -> float:
    """Mean loss of the texts that are deleted."""
    loss_fn = balanced_loss(data.train[1])
    return float(loss_fn(logits(model, data.train[0][asked]), data.train[1][asked]))


def measured(removed: int) -> bool:
    """Each of the first ten, then one in five: most streams that break do it early."""
    return removed <= 10 or removed % 5 == 0


def broken_after(points: list[dict]) -> int | None:
    """Deletions before the one by which macro F1 has fallen by FALL; None if it never has."""
    start = points[0]["macro_f1"]
    for before, now in itertools.pairwise(points):
        if now["macro_f1"] <= start - FALL:
            return before["removed"]
    return None


# ---------------------------------------------------------------------------------------------
# Streams


def sigma(epsilon: float, n: int = PAPER_N) -> float:
    """The paper's noise for one text of n, by default of LEDGAR's."""
    return common.paper_noise(n, LAMBDA, epsilon, DELTA)


def end(points: list[dict], model: nn.Module, data: Data, asked: Tensor) -> dict:
    removed = asked[: points[-1]["removed"]]
    return {"points": points, "broken_after": broken_after(points)} | {
        "loss_deleted": loss_of(model, data, removed),
        "macro_f1": points[-1]["macro_f1"],
    }


def paper_stream(
    start: nn.Module, data: Data, asked: Tensor, form: Form, seed: int, noise: float, what: str
) -> dict:
    """One text after the other by Algorithm 1; a text for which no step comes about is skipped."""
    model, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
    (x, y), loss_fn = data.train, balanced_loss(data.train[1])
    points, kept = [point(model, data, 0)], torch.ones(len(x)).bool()
    counts: list[int] = []
    refused: Counter[str] = Counter()
    began = time.process_time()
    for k in common.progress(range(len(asked)), what, "text"):
        i = asked[k : k + 1]
        kept[i] = False
        units = common.paper_removal(
            model,
            (x[i], y[i]),
            (x[kept], y[kept]),
            loss_fn,
            refused,
            noise,
            generator,
            perturb=data.replacement,
            n_perturbations=form.perturbations,
            n_curvature=form.rows,
            weight_decay=LAMBDA,
            seed=1000 * seed + k,
        )
        if units is not None:
            counts.append(sum(len(rows) for rows in units.values()))
        if measured(k + 1) or k + 1 == len(asked):
            points.append(point(model, data, k + 1))
            if points[-1]["macro_f1"] < GIVEN_UP * points[0]["macro_f1"]:
                break
    seconds = (time.process_time() - began) / points[-1]["removed"]
    return end(points, model, data, asked) | {
        "refused": refused.total(),
        "reasons": refused,
        "units": float(np.median(counts)) if counts else None,
        "cpu_seconds_per_text": seconds,
    }


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for each text of which all labels are told right."""
    return ((outputs > 0) == (targets > 0.5)).all(1).to(torch.float64)


def default_stream(start: nn.Module, data: Data, asked: Tensor, form: Form, seed: int) -> dict:
    """Small requests by the calibrated default, in a stream with a ledger in memory."""
    points, skipped, began = [point(start, data, 0)], 0, time.process_time()
    with Unlearner(
        start,
        data.train,
        balanced_loss(data.train[1]),
        validation=data.validation,
        score=right,
        weight_decay=LAMBDA,
        seed=seed,
    ) as unlearner:
        requests = asked.split(form.request)
        for k, request in enumerate(common.progress(requests, DEFAULT, "request")):
            skipped += len(unlearner.remove(request).skipped)
            points.append(point(unlearner.model, data, form.request * k + len(request)))
        seconds = (time.process_time() - began) / len(asked)
        found = end(points, unlearner.model, data, asked)
    return found | {"refused": skipped, "units": None, "cpu_seconds_per_text": seconds}


def run(arguments, form: Form | None = None) -> dict:
    """Train, delete texts of one class in all ways, and train again without them."""
    form = form or (FULL if arguments.full else REDUCED)
    seed, data = arguments.seed, load(arguments, form)
    target = min(11, len(data.classes) - 1)  # the paper's class 11
    asked = (data.train[1][:, target] > 0.5).nonzero()[: form.removals, 0]
    model = train(data, data.train, form, arguments, seed)
    ways: dict[str, list[dict]] = {DEFAULT: [default_stream(model, data, asked, form, seed)]}
    ways[NOISELESS] = [paper_stream(model, data, asked, form, seed, 0.0, NOISELESS)]
    for epsilon in EPSILONS:
        ways[label(epsilon)] = [
            paper_stream(model, data, asked, form, seed + k, sigma(epsilon), label(epsilon))
            for k in range(form.repeats if epsilon <= OFTEN else 1)
        ]
    kept = torch.ones(len(data.train[0])).bool()
    kept[asked] = False
    again = [
        train(data, tuple(t[kept] for t in data.train), form, arguments, seed + 1000 + k)
        for k in range(form.retrainings)
    ]
    return {
        "data": data.name,
        "classes": data.classes,
        "deleted_class": data.classes[target],
        "n": len(kept),
        "n_validation": len(data.validation[0]),
        "n_test": len(data.test[0]),
        "n_deleted": len(asked),
        "form": asdict(form),
        "fall": FALL,
        "sigma": {label(epsilon): sigma(epsilon) for epsilon in EPSILONS},
        "sigma_for_this_n": {label(epsilon): sigma(epsilon, len(kept)) for epsilon in EPSILONS},
        "start": point(model, data, 0) | {"loss_deleted": loss_of(model, data, asked)},
        "ways": ways,
        "retrained": [
            point(one, data, len(asked)) | {"loss_deleted": loss_of(one, data, asked)}
            for one in again
        ],
    }


def label(epsilon: float) -> str:
    return f"paper, epsilon {epsilon:g}"


# ---------------------------------------------------------------------------------------------
# What is shown

GREEN = "#009E73"
LOOKS = dict(
    zip(
        (DEFAULT, NOISELESS, *map(label, EPSILONS)),
        ((BLUE, 2.2), (DARK, 1.3), (GREEN, 1.3), (PURPLE, 1.3), (ORANGE, 1.3), (RED, 1.3)),
        strict=True,
    )
)


def draw(record: dict, file: Path) -> None:
    with common.figure(file, 1, 2, (9.5, 3.6)) as (left, right_one):
        for way, streams in record["ways"].items():
            colour, width = LOOKS[way]
            for k, stream in enumerate(streams):
                xs = [p["removed"] for p in stream["points"]]
                ys = [p["macro_f1"] for p in stream["points"]]
                name = way if k == 0 else None
                left.plot(xs, ys, color=colour, linewidth=width, label=name)
                if xs[-1] < record["n_deleted"]:
                    left.plot(xs[-1], ys[-1], "x", color=colour, markersize=6)
        again = record["retrained"]
        dots = {"color": DARK, "linestyle": "none", "markersize": 5, "zorder": 5, "clip_on": False}
        left.plot(
            [p["removed"] for p in again], [p["macro_f1"] for p in again], "o", label="retrained",
            **dots,
        )  # fmt: skip
        left.axhline(record["start"]["macro_f1"] - FALL, color="grey", linewidth=0.8, linestyle=":")
        left.set(xlabel="texts deleted, one after the other", ylabel="macro F1 on the test")
        left.set_title("What the network can do")
        left.set_ylim(0, 1)
        bars(right_one, record)
        left.figure.legend(loc="outside lower center", ncols=4)


def bars(axis, record: dict) -> None:
    """Loss of the deleted texts at the end, of the streams that reached it."""
    rows = [("nothing done", "grey", [record["start"]["loss_deleted"]])]
    rows += [
        (way, LOOKS[way][0], [s["loss_deleted"] for s in streams])
        for way, streams in record["ways"].items()
        if all(s["broken_after"] is None for s in streams)
    ]
    rows.append(("retrained", PALE, [p["loss_deleted"] for p in record["retrained"]]))
    for k, (_, colour, values) in enumerate(rows):
        axis.barh(k, np.mean(values), color=colour, height=0.6, edgecolor=DARK, linewidth=0.5)
        axis.plot(values, [k] * len(values), ".", color="white", markeredgecolor="black")
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.invert_yaxis()
    axis.set(xlabel="mean loss of the deleted texts")
    axis.set_title("What it knows of them, unless broken")


def show(record: dict) -> str:
    lines = [
        f"{record['data']}: {record['n_deleted']} of {record['n']} texts deleted, all of class "
        f"{record['deleted_class']}",
        "",
        f"{'':<24}{'before F1 falls':>16}{'macro F1':>10}{'loss deleted':>14}{'s/text':>8}"
        f"{'refused':>9}",
    ]
    rows = {"nothing done": [record["start"]]} | record["ways"]
    for way, streams in (rows | {"retrained": record["retrained"]}).items():
        cells = f"{way:<24}"
        cells += f"{falls(streams, record) if way in record['ways'] else '':>16}"
        for key, width in (("macro_f1", 10), ("loss_deleted", 14)):
            cells += f"{np.mean([s[key] for s in streams]):>{width}.3f}"
        if way in record["ways"]:
            cells += f"{np.mean([s['cpu_seconds_per_text'] for s in streams]):>8.2f}"
            cells += f"{sum(s['refused'] for s in streams):>9}"
        lines.append(cells)
    lines += ["", f"before F1 falls: deletions before macro F1 has fallen by {FALL}."]
    return "\n".join(lines)


def falls(streams: list[dict], record: dict) -> str:
    """Numbers of deletions before F1 falls, as the table and the page have them."""
    numbers = [s["broken_after"] for s in streams]
    return " / ".join(f"> {record['n_deleted']}" if n is None else str(n) for n in numbers)


def options():
    parser = common.options(__doc__, data=DATA)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a DistilBERT with its tokenizer")
    parser.add_argument("--samples", type=int, metavar="N", help="texts to train with")
    return parser


if __name__ == "__main__":
    common.main("provisions", options(), run, draw, show)
