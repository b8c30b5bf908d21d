"""A stream of requests that can be killed, and the cheap step that stands in for `unlearn` in it.

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
from lcodec_ext.unlearning import unlearner
from lcodec_ext.unlearning.ledger import LEDGER_FILE
from lcodec_ext.unlearning.unlearner import Unlearner

N = 40
WEIGHT_DECAY = 0.1


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_data(n=N):
    x = torch.randn(n, 3, generator=torch.manual_seed(2), dtype=torch.float64)
    return x, torch.arange(n) % 2


@dataclass
class Result:
    model: nn.Module
    selection: UnitSelection
    skipped: bool
    seconds: dict[str, float]
    record: dict[str, Any]

    def to_dict(self):
        return self.record


def step(model, forget, retain, loss_fn, *, seed, skip=(), pause=0.0, **options):
    """One step of gradient ascent, and noise by the seed; a request for a sample of skip fails."""
    time.sleep(pause)
    changed = copy.deepcopy(model).eval()
    batch = forget.fetch(slice(None))
    norm = 0.0
    skipped = bool(set(forget.hashes()) & set(skip))
    loss = loss_fn(changed(*batch.args), batch.targets)
    loss.backward()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed % 2**63)
        for p in changed.parameters():
            norm += p.grad.square().sum().item()
            if not skipped:
                noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                p += 0.1 * p.grad + 1e-3 * noise * len(retain)
            p.grad = None
    changed.train(model.training)
    record = {
        "n_forget": len(forget),
        "n_retain": None if retain is None else len(retain),
        "n_parameters": sum(p.numel() for p in changed.parameters()),
        "damping": options["damping"],
        "training_gradient_norm": 0.0,
        "solve_method": "cg",
        "solve_iterations": 3,
        "solve_residual": 1e-12,
        "gradient_norm": norm**0.5,
        "loss_forget": loss.item(),
        "loss_validation": float("nan"),
        "seconds": {"total": time.perf_counter()},
    }
    selection = UnitSelection.all(changed)
    return Result(changed, selection, skipped, {"total": time.perf_counter()}, record)


# Each makes one entry, so that the length of the ledger tells which comes next.
REQUESTS = [
    lambda u: u.remove([3, 1]),
    lambda u: u.remove(7),
    lambda u: u.remove([5, 6]),
    lambda u: u.rollback(2),
    lambda u: u.remove([8, 5]),
    lambda u: u.rollback(),
    lambda u: u.remove([9, 10, 11]),
    lambda u: u.remove(0),
]


def begin_or_resume(directory, **options):
    arguments = (make_model(), make_data(), nn.functional.cross_entropy)
    path = Path(directory) / LEDGER_FILE
    if path.is_file() and b"\n" in path.read_bytes():
        return Unlearner.resume(directory, *arguments)
    return Unlearner(*arguments, directory=directory, seed=4, keep=3, **options)


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
