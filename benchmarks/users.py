"""Whole users deleted: what their control groups are of, and whose samples validate.

    python benchmarks/users.py [--quick] [--seeds 10 11 ...] [--output FILE]

Two cases on scikit-learn's digits, each compared with three retrained networks. "cnn users" is that
of calibration.py. In "mlp habits" users differ more: each of 150 users has twelve random digits, a
background pattern of their own, and two labels that they take for one another. What a network
knows of a habit it has from this user's samples. It is trained on four of five samples of 100
users. Validation samples are of 25 users that training has not seen ("unseen"), or the other
samples of the users trained on ("known"). Another 25 users test. No setting was chosen here; seeds
from 10 on are recorded.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import calibration
import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from calibration import RETRAINED, WEIGHT_DECAY, Data
from run import save
from torch import Tensor

CASES = ("cnn users", "mlp habits")
OF = ("samples", "users")  # what control groups are of
SIZE, TRAINED, HELD = 12, 100, 25  # samples of a user, users trained on, users that validate


class Task(NamedTuple):
    """Samples of users: those deleted, those that stay, whose these are, and others."""

    data: Data
    users: Tensor
    forget: Tensor
    validation: dict[str, Data]  # by whose they are
    test: Data


def task(name: str, seed: int) -> Task:
    if name == "mlp habits":
        return habits(seed)
    data, users, forget, validation, test = calibration.task(name, seed)
    return Task(data, users, forget, {"known": validation}, test)


def habits(seed: int) -> Task:
    """Users with a pattern and a confusion of their own."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    generator = torch.Generator().manual_seed(500 + seed)
    order = torch.randperm(len(y), generator=generator)
    x, y, users = x[order], y[order], torch.arange(len(y)) // SIZE
    n_users = int(users[-1]) + 1
    sparse = torch.rand(n_users, 64, generator=generator) < 0.3
    pattern = 0.6 * torch.rand(n_users, 64, generator=generator) * sparse
    x = (x + pattern[users]).clamp(0, 1)
    pairs = [torch.randperm(10, generator=generator)[:2] for _ in range(n_users)]
    a, b = torch.stack(pairs)[users].T
    y = torch.where(y == a, b, torch.where(y == b, a, y))
    trained = users < TRAINED
    train = trained & (torch.rand(len(y), generator=generator) < 0.8)
    few = torch.randperm(TRAINED, generator=generator)[: 2 + seed % 3]
    gone = torch.isin(users, few)
    unseen = ~trained & (users < TRAINED + HELD)
    known, test = trained & ~train & ~gone, users >= TRAINED + HELD
    validation = {"known": (x[known], y[known]), "unseen": (x[unseen], y[unseen])}
    return Task((x[train], y[train]), users[train], gone[train], validation, (x[test], y[test]))


def ways(whose: Any) -> dict[str, tuple[str, str]]:
    """What is tried: control groups of samples and of users, with the validation samples given."""
    return {f"{of}, {who} validate": (of, who) for who, of in itertools.product(whose, OF)}


def record(name: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """Train, retrain, and delete in each way."""
    network = name.split()[0]
    given = task(name, seed)
    forget, retain = (
        (given.data[0][mask], given.data[1][mask]) for mask in (given.forget, ~given.forget)
    )
    epochs = epochs or calibration.EPOCHS[network]
    model = calibration.fit(network, given.data, 1000 * seed, epochs)
    peers = [
        calibration.fit(network, retain, 1000 * seed + 1 + k, epochs) for k in range(RETRAINED)
    ]
    found: dict[str, Any] = {
        "seed": seed,
        "m": len(forget[1]),
        "no-op": calibration.measured(model, forget, given.test, peers),
        "retrained": [calibration.measured(peer, forget, given.test, peers) for peer in peers],
    }
    for way, (of, whose) in ways(given.validation).items():
        options = {
            "calibrate": True,
            "validation": given.validation[whose],
            "groups": given.users[~given.forget] if of == "users" else None,
            "weight_decay": WEIGHT_DECAY[network],
        }
        found[way] = calibration.deletion(model, forget, retain, given.test, peers, options)
    return found


def summary(points: list[dict[str, Any]]) -> dict[str, Any]:
    return calibration.summary(points, ["no-op", *ways(("known", "unseen"))])


def table(cases: dict[str, Any]) -> str:
    """The table of docs/unlearning.md."""
    lines = [
        "| tried | control groups of | validation of users | loss | least, most | within 2.5 | "
        "test, worst | JS | JS, no-op | JS, retrained |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, case in cases.items():
        every = case["summary"]
        for way, (of, whose) in ways(("known", "unseen")).items():
            if way not in every:
                continue
            s = every[way]
            ends = f"{min(s['loss_ratios']):.2f}, {max(s['loss_ratios']):.2f}"
            lines.append(
                f"| {name} | {of} | {whose} | {s['loss_ratio']:.2f} | {ends} | "
                f"{s['within_2.5']} of {s['of']} | {100 * s['accuracy_test_worst']:+.1f} | "
                f"{s['js']:.3f} | {every['no-op']['js']:.3f} | {s['js_floor']:.3f} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 15)))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/users.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, epochs = (options.seeds[:1], 2) if options.quick else (options.seeds, None)
    settings = {"quick": options.quick, "seeds": seeds, "retrained": RETRAINED}
    result = calibration.begun(settings)
    for name in options.cases:
        points = []
        for seed in seeds:
            points.append(record(name, seed, epochs))
            losses = {way: point["loss_forget"] for way, point in points[-1].items() if "," in way}
            print(name, seed, {way: round(loss, 4) for way, loss in losses.items()}, flush=True)
        result["calibration"][name] = {"points": points, "summary": summary(points)}
        save(result, options.output)
    print(table(result["calibration"]))


if __name__ == "__main__":
    main()
