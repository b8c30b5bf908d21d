"""Delete mislabelled training samples from a small network, and see what the deletion did.

A network learns scikit-learn's digits until it has memorised them, including some wrong labels.
The mislabelled samples are then deleted on request, with a ledger. The result is compared with
other ways to delete and with training again without these samples. The script prints a table and
what it shows, and writes a report.
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

WEIGHT_DECAY = 5e-4
HALVES = slice(0, None, 2), slice(1, None, 2)
MARKER = "made_by_digits_deletion"  # marks a folder that the next run may delete


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for the report"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the split, the wrong labels and the network"
    )
    arguments = parser.parse_args()
    run(arguments.output, arguments.seed)


def run(output, seed, *, n_train=1200, n_wrong=40, epochs=200):
    """Train, delete, compare; returns the evaluation and the report."""
    ledger = fresh_folder(output / "ledger")
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    train_set, wrong, unseen = data(seed, n_train, n_wrong)
    validation, test = (tuple(tensor[part] for tensor in unseen) for part in HALVES)
    forget = tuple(tensor[wrong] for tensor in train_set)
    retain = tuple(tensor[~wrong] for tensor in train_set)
    model = train(train_set, seed, epochs, "training")

    with Unlearner(
        model,
        train_set,
        cross_entropy,
        directory=ledger,
        validation=validation,
        weight_decay=WEIGHT_DECAY,
        seed=seed,
        progress=True,
    ) as unlearner:
        result = unlearner.remove(torch.nonzero(wrong).flatten().tolist(), note="wrong labels")
        print(f"\n{result}\n")
        evaluation = evaluate(
            model,
            forget,
            retain,
            test,
            cross_entropy,
            retrained=lambda k: train(retain, k, epochs, "retraining"),
            methods={
                "recommended": result,
                "half, by gradient": {"selection": "gradient", "max_parameters": 0.5},
                "half, at random": {"selection": "random", "max_parameters": 0.5},
                "the paper's": {"preset": "paper"},
                "L-BFGS": Baseline(lbfgs),
            },
            weight_decay=WEIGHT_DECAY,
            seed=seed,
            validation=validation,
            progress=True,
        )
        report = write_report(
            output, evaluation=evaluation, ledger=unlearner, title="Forty wrong labels deleted"
        )
    print(f"\n{evaluation}\n\n{report}\n\nWritten: {output / 'report.md'} and its figures")
    return evaluation, report


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


def data(seed, n_train, n_wrong):
    """Return digits in [0, 1]: training samples, which labels are wrong, and test samples."""
    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    x = torch.tensor(pixels[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    wrong = torch.zeros(n_train, dtype=torch.bool)
    wrong[rng.choice(n_train, n_wrong, replace=False)] = True
    train_y = y[:n_train].clone()
    train_y[wrong] = (train_y[wrong] + torch.tensor(rng.integers(1, 10, n_wrong))) % 10
    return (x[:n_train], train_y), wrong, (x[n_train:], y[n_train:])


def train(samples, seed, epochs, name):
    """Train by SGD with momentum, a cosine schedule and coupled weight decay."""
    inputs, targets = samples
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        schedule.step()
    return model


if __name__ == "__main__":
    main()
