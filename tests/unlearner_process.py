"""A stream of requests that can be killed, with a cheap step in place of `unlearn`.

As a script: ``python unlearner_process.py DIRECTORY``, with a pause in every step.
"""

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcodec_ext.curvature import UnitSelection
from lcodec_ext.unlearning.stream import unlearner
from lcodec_ext.unlearning.stream.ledger import LEDGER_FILE
from lcodec_ext.unlearning.stream.unlearner import Unlearner

N = 40
WEIGHT_DECAY = 0.1


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()


def make_data(n=N):
    x = torch.randn(n, 3, generator=torch.manual_seed(2), dtype=torch.float64)
    return x, torch.arange(n) % 2


@dataclass
class Result:
    model: nn.Module
    selection: UnitSelection
    skipped: tuple[int, ...]
    seconds: dict[str, float]
    record: dict[str, Any]
    n_retain: int
    n_monitored: int
    n_parameters: int
    damping: float
    training_gradient_norm: float = 0.0
    solve_residual: float = 1e-12

    def to_dict(self):
        return self.record


def step(model, forget, retain, loss_fn, *, preset, refuse=(), pause=0.0, **_):
    """One step of gradient ascent, and noise by the seed.

    Samples whose inputs are among `refuse` are not let go; if there are any, only the others are.
    """
    if pause:
        time.sleep(pause)
    changed = copy.deepcopy(model).eval()
    batch = forget.fetch(slice(None))
    inputs = batch.args[0]
    skipped = tuple(k for k, x in enumerate(inputs) if any(torch.equal(x, one) for one in refuse))
    kept = [k for k in range(len(forget)) if k not in skipped]
    norm, loss = 0.0, torch.tensor(0.0)
    if kept:
        loss = loss_fn(changed(inputs[kept]), batch.targets[kept])
        loss.backward()
        generator = torch.Generator().manual_seed(preset.seed % 2**63)
        with torch.no_grad():
            for p in changed.parameters():
                norm += p.grad.square().sum().item()
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p += 0.1 * p.grad + 1e-3 * noise * len(retain)
                p.grad = None
    changed.train(model.training)
    record = {
        "settings": preset.to_dict(),
        "selection": {},
        "skipped": list(skipped),
        "guarantee": None,
        "training_gradient_norm": 0.0,
        "solve_method": "cg",
        "solve_iterations": 3,
        "solve_residual": 1e-12,
        "gradient_norm": [norm**0.5, None],
        "loss_forget": [loss.item(), float("nan")],
        "seconds": {"total": time.perf_counter()},
    }
    selection = UnitSelection.all(changed)
    seconds = {"total": time.perf_counter()}
    n = len(retain)
    size = sum(p.numel() for p in changed.parameters())
    return Result(changed, selection, skipped, seconds, record, n, n, size, preset.damping)


# Each makes one entry, so that the length of the ledger tells which comes next.
REQUESTS = [
    lambda u: u.remove([3, 1]),
    lambda u: u.remove(7),
    lambda u: u.rollback(1),
    lambda u: u.remove([8, 7]),
    lambda u: u.rollback(),
    lambda u: u.remove(0),
]


def begin_or_resume(directory, **options):
    arguments = (make_model(), make_data(), nn.functional.cross_entropy)
    if directory is None:
        return Unlearner(*arguments, seed=4, keep=2, **options)
    path = Path(directory) / LEDGER_FILE
    if path.is_file() and b"\n" in path.read_bytes():
        return Unlearner.resume(directory, *arguments)
    return Unlearner(*arguments, directory=directory, seed=4, keep=2, **options)


def go_on(stream, done=lambda number: None):
    for number in range(len(stream.ledger), len(REQUESTS) + 1):
        REQUESTS[number - 1](stream)
        done(number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    unlearner.unlearn = lambda *args, **options: step(*args, pause=0.1, **options)
    with begin_or_resume(sys.argv[1]) as stream:
        print(len(stream.ledger) - 1, flush=True)
        go_on(stream, lambda number: print(number, flush=True))
        time.sleep(60)  # with the lock held, until it is killed
