"""Delete samples from a network on request, and see what the deletions did.

Two networks with batch norm learn 5440 images of digits, by 34 people, each digit scanned four
times. The first one is trained by SGD until it knows 160 wrong labels by heart, and is asked to
forget them. The second one is trained with dropout by AdamW, and is asked to forget the images of
one user. Each deletion has a ledger, and is compared with training again without the samples and
with two plain tools, which take about as long. The script prints a table for each
request, and writes a report. It takes one to three minutes.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lcodec_ext.evaluation import Baseline, evaluate, write_report
from lcodec_ext.evaluation.methods import lbfgs
from lcodec_ext.unlearning import Unlearner

REQUESTS = {
    "wrong labels": "images with wrong labels, from a network that knows them by heart",
    "a user": "the images of one user, from a network trained with dropout by AdamW",
}
WEIGHT_DECAY = 5e-4
PEOPLE, HELD = 34, 5  # whose images are for training; and for validation, as many for the test
DIGITS, SCANS = 40, 4  # of a person; of a digit
ASKED = DIGITS * SCANS  # images of a user, and wrong labels
SIZE, NOISE = 12, 0.2  # pixels of a side; standard deviation
EPOCHS = {"wrong labels": 40, "a user": 30}
TUNED, ITERATIONS = 10, 20  # epochs of fine-tuning, iterations of L-BFGS
MARKER = "made_by_digits_deletion"  # marks a folder that the next run may delete
COLUMNS = {
    "loss": "mean loss of the deleted samples. Less than retraining has: still remembered",
    "ratio": "that loss as a multiple of retraining's. The aim is 1",
    "JS": "distance of the outputs on the deleted samples to those of retrained networks, 0 to 1.\n"
    "            Retrained networks have theirs to each other: below that it says nothing",
    "known": "how often a deleted sample has a lower loss than an unseen one. Compare retraining's",
    "retained": "mean loss of the samples that stay. It should be near retraining's",
    "test": "accuracy on samples that nobody has used. It should not fall",
    "seconds": "time taken; of retraining, for one network",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for the reports"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split, the requests and the networks"
    )
    arguments = parser.parse_args()
    run(arguments.output, arguments.seed)


def run(output, seed, *, people=PEOPLE, shorten=1):
    """Handle both requests; returns the evaluation and the report of each."""
    ledgers = {name: fresh_folder(output / slug(name) / "ledger") for name in REQUESTS}
    torch.set_num_threads(1)  # two threads gain little on networks this small
    found = {}
    for name, ledger in ledgers.items():
        print(f"\n=== Delete {REQUESTS[name]} ===\n", flush=True)
        found[name] = one_request(name, ledger, seed, people, EPOCHS[name] // shorten)
    print("\nThe columns:")
    for column, meaning in COLUMNS.items():
        print(f"  {column:<9} {meaning}.")
    print("\nWhere to go next:")
    for _, report in found.values():
        print(f"  {report.files['report.md']}")
    print(
        "    who asked, what was deleted, and on what evidence: a report on each request\n"
        "  docs/unlearning.md\n    how to delete samples from your own model, and what to expect\n"
        "  docs/evaluation.md\n    how to compare a deletion with retraining\n"
        "  lcodec-ext unlearn --help\n    the same from the command line"
    )
    return found


def one_request(name, ledger, seed, people, epochs):
    """Train, delete, compare, report."""
    train_set, owners, asked, validation, test = data(name, seed, people)
    forget = tuple(tensor[asked] for tensor in train_set)
    retain = tuple(tensor[~asked] for tensor in train_set)
    learn = {"wrong labels": plain, "a user": modern}[name]
    # AdamW's weight decay is not part of the objective.
    decay = WEIGHT_DECAY if learn is plain else 0.0
    model = learn(train_set, seed, epochs, "training")
    with Unlearner(
        model,
        train_set,
        cross_entropy,
        directory=ledger,
        validation=validation,
        groups=owners,
        weight_decay=decay,
        seed=seed,
        progress=True,
    ) as unlearner:
        if name == "a user":
            result = unlearner.remove(groups=owners[asked][0], note="the user, by e-mail")
        else:
            result = unlearner.remove(asked.nonzero()[:, 0], note="a check of the labels")
        evaluation = evaluate(
            model,
            forget,
            retain,
            test,
            cross_entropy,
            retrained=lambda k: learn(retain, seed + 1000 + k, epochs, "retraining"),
            methods={
                "lcodec_ext": result,
                "L-BFGS": Baseline(lbfgs, {"iterations": ITERATIONS}),
                "fine-tuning": lambda model, forget, retain, loss_fn, k: learn(
                    retain, k, min(epochs, TUNED), "fine-tuning", model
                ),
            },
            weight_decay=decay,
            seed=seed,
            validation=validation,
            relearn=False,
        )
        report = write_report(
            ledger.parent, evaluation=evaluation, ledger=unlearner, title=f"Deleted: {name}"
        )
    print(f"\n{len(forget[1])} of {len(owners):,} samples deleted.\n\n{table(evaluation)}\n")
    print(f"How the strength was found: {result.calibration}.")
    print(
        "Retrained: the mean of three networks, trained without the samples.\n"
        f"L-BFGS: {ITERATIONS} iterations on the samples that stay. Fine-tuning: "
        f"{min(epochs, TUNED)} of {epochs} epochs on them, as in training."
    )
    return evaluation, report


def table(evaluation):
    """The columns that `COLUMNS` explains."""
    lines = [" " * 12 + "".join(f"{column:>10}" for column in COLUMNS)]
    aim = evaluation["retrained"].metrics["loss_forget"]
    for method in evaluation.methods:
        found = method.metrics
        loss = found["loss_forget"]
        cells = [f"{loss:.3f}", f"{loss / aim:.2f}", f"{found['js_forget']:.3f}"]
        cells += [f"{found['mia_auc']:.3f}", f"{found['loss_retain']:.4f}"]
        cells += [f"{found['accuracy_test']:.1%}", f"{method.seconds:.1f}"]
        name = {"no-op": "before"}.get(method.name, method.name)
        lines.append(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def slug(name):
    """The name of a request as that of a folder."""
    return name.replace(" ", "_")


def fresh_folder(folder):
    """Make an empty folder. Replace it only if an earlier run of this example made it."""
    if folder.is_symlink() or folder.exists():
        if folder.is_symlink() or not (folder / MARKER).is_file():
            raise SystemExit(
                f"{folder} was not made by this example, which would delete it: choose "
                "another --output, or move the folder away"
            )
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700, parents=True)
    (folder / MARKER).write_text("Made by digits_deletion.py, which may delete this folder.\n")
    return folder


def data(name, seed, people):
    """Return images of digits, whose they are, and which are to be deleted.

    These are training samples, owners, deleted or not, validation and test samples. scikit-learn's
    digits are in the order of their writers, which are not named: 40 in a row count as one
    person's. Each digit is seen four times, somewhere in a larger image, with noise. Nobody's
    images are in two of the sets.
    """
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    x = rng.normal(0, NOISE, (SCANS * len(labels), SIZE, SIZE))
    corners = rng.integers(0, SIZE - 7, (len(x), 2))
    for k, (row, column) in enumerate(corners):
        x[k, row : row + 8, column : column + 8] += pixels[k // SCANS].reshape(8, 8) / 16
    x = torch.tensor(x[:, None], dtype=torch.float32)
    y = torch.tensor(labels).repeat_interleave(SCANS)
    owners = np.arange(len(y)) // ASKED
    order = rng.permutation(len(labels) // DIGITS)  # of the people
    who = order[:people], order[-2 * HELD : -HELD], order[-HELD:]
    train, validation, test = (np.flatnonzero(np.isin(owners, some)) for some in who)
    targets = y[train].clone()
    asked = torch.tensor(owners[train] == order[0])
    if name == "wrong labels":
        asked = torch.zeros(len(train), dtype=torch.bool)
        asked[rng.permutation(len(train))[:ASKED]] = True
        targets[asked] = (targets[asked] + torch.tensor(rng.integers(1, 10, ASKED))) % 10
    sets = ((x[some], y[some]) for some in (validation, test))
    return (x[train], targets), owners[train], asked, *sets


def plain(samples, seed, epochs, name, model=None):
    """Train by SGD with momentum and coupled weight decay, from scratch or from a model on."""
    torch.manual_seed(seed)
    model = model or network(dropout=0.0)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=WEIGHT_DECAY
    )
    return trained(model, optimizer, samples, epochs, name)


def modern(samples, seed, epochs, name, model=None):
    """Train with dropout before the last layer, by AdamW."""
    torch.manual_seed(seed)
    model = model or network(dropout=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    return trained(model, optimizer, samples, epochs, name)


def network(dropout):
    """Two convolutions with batch norm, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (SIZE // 4) ** 2, 64),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(64, 10),
    )


def trained(model, optimizer, samples, epochs, name):
    """The model after some epochs in batches of 64, with a cosine schedule."""
    inputs, targets = samples
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    main()
