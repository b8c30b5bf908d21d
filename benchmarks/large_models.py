"""The memory of a deletion from a transformer of 100 million parameters, by phase.

    python benchmarks/large_models.py [--quick] [--ways WAY ...] [--output FILE]

A BERT classifier (12 layers of width 768, 20,000 tokens; random weights, and a few steps of SGD on
sequences of 8 tokens) loses 4 samples: calibrated by the defaults, and with curvature="ekfac". Each
deletion runs in a process of its own, on one thread, within LIMIT bytes of address space, and
without a max_memory: the default holds. The peak of each phase is the kernel's (VmHWM,
set back where a phase begins), above what the process had before with model and data. Seconds are
of the CPU. The figures are of memory and time alone: the model has learnt next to nothing. --quick
takes a tiny model. With --ways the others stay in the file as they are.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)

import torch
from resnet18 import present, use_cpu_clock
from results import SCHEMA
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lcodec_ext.unlearning import unlearn
from lcodec_ext.unlearning.workplace import Workplace

LAYERS, WIDTH, VOCABULARY, TOKENS = 12, 768, 20_000, 8
FORGET, RETAIN, VALIDATION, CLASSES, STEPS = 4, 24, 16, 4, 6
LIMIT = 24 * 2**30  # bytes of address space
WAYS: dict[str, dict[str, Any]] = {
    "gauss_newton": {"n_curvature": 4, "finish": 2},
    "ekfac": {"n_curvature": 4, "finish": 2, "curvature": "ekfac"},
}
Data = dict[str, Tensor]


def network(quick: bool) -> nn.Module:
    """A BERT classifier with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    layers, width, vocabulary = (2, 32, 200) if quick else (LAYERS, WIDTH, VOCABULARY)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=64,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config).eval()


def data(quick: bool) -> list[Data]:
    """Samples to delete, retained and validation samples; each class prefers tokens of its own."""
    generator = torch.Generator().manual_seed(0)
    n = FORGET + RETAIN + VALIDATION
    y, vocabulary = torch.arange(n) % CLASSES, 200 if quick else VOCABULARY
    x = torch.randint(1, vocabulary, (n, TOKENS), generator=generator)
    own = 1 + 40 * y[:, None] + torch.randint(0, 40, (n, TOKENS), generator=generator)
    x = torch.where(torch.rand(n, TOKENS, generator=generator) < 0.5, own, x)
    parts = torch.arange(n).split([FORGET, RETAIN, VALIDATION])
    return [{"input_ids": x[part], "labels": y[part]} for part in parts]


def trained(model: nn.Module, parts: list[Data]) -> None:
    """A few steps on the training samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, y = (torch.cat([each[k] for each in parts[:2]]) for k in ("input_ids", "labels"))
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(model(input_ids=x).logits, y).backward()
        optimizer.step()
    optimizer.zero_grad()


def _kept(name: str) -> int:
    status = Path("/proc/self/status").read_text().split()
    return 1024 * int(status[status.index(name + ":") + 1])


@contextlib.contextmanager
def peaks_by_phase(before: int) -> Iterator[dict[str, int]]:
    """Bytes above `before` in each phase, at most; "between" is what no phase has."""
    found: dict[str, int] = {}
    within, timed = ["between"], Workplace.timed

    def note() -> None:
        name = within[-1]
        found[name] = max(found.get(name, 0), _kept("VmHWM") - before)
        Path("/proc/self/clear_refs").write_text("5")

    @contextlib.contextmanager
    def watched(self: Workplace, phase: str) -> Iterator[None]:
        note()
        within.append(phase)
        try:
            with timed(self, phase):
                yield
        finally:
            note()
            within.pop()

    Path("/proc/self/clear_refs").write_text("5")
    Workplace.timed = watched  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        Workplace.timed = timed  # type: ignore[method-assign]
        note()


def one(way: str, quick: bool) -> dict[str, Any]:
    """A deletion: what was expected of it, and what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    use_cpu_clock()
    model, parts = network(quick), data(quick)
    trained(model, parts)
    warm = network(True)  # what libraries take
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = data(True)
        unlearn(warm, *given[:2], cross_entropy, validation=given[2], **WAYS[way], progress=True)
    del warm
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before, begin = present(), time.process_time()
        with peaks_by_phase(before) as phases:
            result = unlearn(
                model, *parts[:2], cross_entropy, validation=parts[2], **WAYS[way], progress=True
            )
        spent = time.process_time() - begin
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "before": before,
        "peak": max(phases.values()),
        "peak_rss": before + max(phases.values()),
        "peaks": phases,
        "seconds": spent,
        "phases": result.seconds,
        "expected": None if result.estimate is None else result.estimate.to_dict(),
        "chosen": result.chosen,
        "method": result.solve_method,
        "iterations": result.solve_iterations,
        "skipped": len(result.skipped),
        "limit_as": LIMIT,
        "warnings": [str(each.message)[:400] for each in caught],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/large_models.json"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(one(options.one, options.quick)))
        return
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    same = known.get("settings", {}).get("quick") == options.quick
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {
            "quick": options.quick,
            "layers": LAYERS,
            "width": WIDTH,
            "vocabulary": VOCABULARY,
            "tokens": TOKENS,
            "samples": [FORGET, RETAIN, VALIDATION],
        },
        "cases": {},
        "large_models": known.get("large_models", {}) if same else {},
    }
    for way in options.ways:
        command = [sys.executable, __file__, "--one", way, *["--quick"] * options.quick]
        version = environment.commit() | {"load_before": environment.load()}
        done = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        found = json.loads(done.stdout.splitlines()[-1]) | version
        result["large_models"][way] = found
        print(way, {k: found[k] for k in ("seconds", "peak", "peak_rss")}, flush=True)
        save(result, options.output)


if __name__ == "__main__":
    main()
