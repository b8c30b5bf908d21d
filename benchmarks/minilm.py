"""Deletions from a pretrained transformer that was fine-tuned as people do it.

    python benchmarks/minilm.py [--draw judged] [--kinds full lora] [--requests REQUEST ...]
        [--ways WAY ...] [--cache FOLDER] [--output FILE]

MiniLM (22.7 million parameters, six layers) learns to tell the files of `fortunes` apart: 3000
texts, three epochs of AdamW, all parameters or LoRA adapters (`minilm_models.py`). Two requests are
deleted from each: 60 texts with wrong labels, and all texts of one author. Each way runs in a
process of its own, whose peak memory is read, and is compared with a model that was fine-tuned
without both requests (100 of the 3000 texts). One thread; seconds are of the CPU.

Settings were chosen with --draw development: another split, other wrong labels, another author. A
record that was stopped goes on with the ways that it lacks; --ways runs the named ones again,
others stay in the file as they are, each with its commit.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import environment

if __name__ == "__main__":
    environment.limit_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from minilm_models import DECAY, EPOCHS, RATES, Data, Draw, draw, fitted, parts, rows
from run import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RETRAINED = (1,)  # its seed
KINDS, REQUESTS = ("full", "lora"), ("wrong labels", "author")
#: Options of `unlearn`, all with validation texts and AdamW's weight decay.
DELETIONS: dict[str, dict[str, Any]] = {
    "EK-FAC": {"curvature": "ekfac", "n_curvature": 512, "batch_size": 32},
}
#: One epoch, a fifth of fine-tuning, and L-BFGS for about as long; "rate" is a share of the peak.
#: Without weight decay.
BASELINES: dict[str, dict[str, Any]] = {
    "L-BFGS": {"iterations": 8, "n_samples": 500},
    "fine-tune Adam": {"epochs": 1, "batch_size": 32, "rate": 0.4},
    "NegGrad+": {"epochs": 1, "batch_size": 32, "rate": 40.0},
}
WAYS = (*DELETIONS, *BASELINES)
KEPT = 300  # retained texts that are measured
FACTOR, POINTS, SHARE = 2.0, 0.005, 0.05  # of retraining's loss; test accuracy; fine-tuning's time


# ---------------------------------------------------------------------------------------------
# One way, in a process of its own


def peak() -> int:
    """Bytes that this process has had at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sets(found: Draw, request: str) -> dict[str, Data]:
    """What is measured."""
    forget, retain = parts(found.train, found.requests[request])
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(retain["labels"]), generator=generator)[:KEPT]
    return {"deleted": forget, "retained": rows(retain, some), "test": found.test}


@torch.no_grad()
def logits(model: nn.Module, found: Draw, request: str) -> dict[str, Tensor]:
    model.eval()
    return {
        name: torch.cat(
            [
                model(input_ids=ids, attention_mask=mask).logits
                for ids, mask in zip(
                    data["input_ids"].split(64), data["attention_mask"].split(64), strict=True
                )
            ]
        )
        for name, data in sets(found, request).items()
    }


def deleted(way: str, kind: str, model: nn.Module, found: Draw, request: str) -> tuple[Any, Any]:
    """The new model, and what the package says of the deletion."""
    forget, retain = parts(found.train, found.requests[request])
    if way in DELETIONS:
        from lcodec_ext.unlearning import unlearn

        options = DELETIONS[way] | {"validation": found.validation, "weight_decay": DECAY}
        result = unlearn(model, forget, retain, cross_entropy, **options)
        return result.model, {
            "phases": result.seconds,
            "damping": result.damping,
            "residual": result.solve_residual,
            "skipped": len(result.skipped),
            "calibration": result.calibration and result.calibration.to_dict(),
        }
    from lcodec_ext.evaluation.methods import BASELINES as KNOWN

    options = dict(BASELINES[way])
    if "rate" in options:
        options["learning_rate"] = options.pop("rate") * RATES[kind]
    known = KNOWN[way]
    options = (
        dict(known.options) | options
    )  # AdamW's decay as an L2 penalty would outweigh the loss
    return known.run(model, forget, retain, cross_entropy, 0, **options), {}


def one(way: str, kind: str, name: str, request: str, cache: Path) -> dict[str, Any]:
    """Carry out a way: what it took. Its logits go to the cache."""
    found = draw(name)
    train = found.train
    if way.startswith("retrained"):
        both = [i for numbers in found.requests.values() for i in numbers]
        train = parts(train, both)[1]
        model, seconds = fitted(cache, kind, train, int(way.split()[1]))
        told: dict[str, Any] = {"seconds": seconds}
    else:
        model, seconds = fitted(cache, kind, train, 0)
        told = {"seconds": seconds}
        if way != "trained":
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                before, begin, wall = peak(), time.process_time(), time.perf_counter()
                model, more = deleted(way, kind, model, found, request)
                told = {
                    "seconds": time.process_time() - begin,
                    "wall_seconds": time.perf_counter() - wall,
                    "memory_before": before,
                    "memory": peak(),
                    "warnings": [str(each.message)[:300] for each in caught],
                    **more,
                }
    torch.save(logits(model, found, request), logits_file(cache, name, kind, request, way))
    return told


def logits_file(cache: Path, name: str, kind: str, request: str, way: str) -> Path:
    return cache / f"{name}-{kind}-{request}-{way}.pt".replace(" ", "-")


# ---------------------------------------------------------------------------------------------
# Judging


def compared(
    name: str, kind: str, request: str, ways: dict[str, dict[str, Any]], cache: Path
) -> None:
    """Add losses, accuracies, divergence and the attack to each way."""
    from lcodec_ext.evaluation.metrics import js_distances, roc_auc

    data = sets(draw(name), request)
    found = {
        way: torch.load(logits_file(cache, name, kind, request, way), weights_only=True)
        for way in ways
    }
    peers = [way for way in ways if way.startswith("retrained")]
    training = ways["trained"]["seconds"]
    right = {way: each["test"].argmax(1) == data["test"]["labels"] for way, each in found.items()}
    for way, each in found.items():
        losses = {
            part: cross_entropy(each[part], data[part]["labels"], reduction="none") for part in data
        }
        moved = right[way].double() - right["trained"].double()
        ways[way] |= {
            "mia_auc": roc_auc(-losses["deleted"].numpy(), -losses["test"].numpy()),
            "accuracy_change": float(moved.mean()),
            "accuracy_change_error": float(moved.std(correction=0)) / len(moved) ** 0.5,
            "share": ways[way]["seconds"] / training,
        }
        others = [found[peer] for peer in peers if peer != way]
        for part, values in losses.items():
            ways[way][f"loss_{part}"] = float(values.mean())
            hit = each[part].argmax(1) == data[part]["labels"]
            ways[way][f"accuracy_{part}"] = float(hit.double().mean())
            own = each[part].double().log_softmax(1)
            theirs = [other[part].double().log_softmax(1) for other in others]
            js = [float(js_distances(own, log_p).mean()) for log_p in theirs]
            if js:
                ways[way][f"js_{part}"] = statistics.fmean(js)
    mean = statistics.fmean(ways[peer]["loss_deleted"] for peer in peers)
    for way in ways:
        gap = mean - ways["trained"]["loss_deleted"]
        ways[way]["ratio"] = ways[way]["loss_deleted"] / mean
        ways[way]["closed"] = (ways[way]["loss_deleted"] - mean) / gap + 1


def claims(cases: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates, for the deletions of this package."""
    found = []
    for case, ways in cases.items():
        for way in DELETIONS:
            if "ratio" not in ways.get(way, {}):
                continue
            rows_ = (
                ("deleted loss over retraining's", ways[way]["ratio"], 1 / FACTOR, FACTOR),
                ("change of test accuracy", ways[way]["accuracy_change"], -POINTS, None),
                ("share of fine-tuning's time", ways[way]["share"], None, SHARE),
            )
            for quantity, value, least, most in rows_:
                met = (least is None or value >= least) and (most is None or value <= most)
                row = {"case": case, "way": way, "quantity": quantity, "value": value}
                found.append(row | {"at_least": least, "at_most": most, "met": met})
    return found


def table(ways: Mapping[str, Any]) -> str:
    """The table of a case, for docs/models.md."""
    lines = [
        "| | deleted loss | over retraining's | closed | retained loss | test accuracy "
        "| JS deleted | JS test | attack | seconds | of fine-tuning | GiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for way, w in ways.items():
        cells = (
            f"{w['loss_deleted']:.2f}",
            f"{w['ratio']:.2f}",
            f"{w['closed']:.0%}",
            f"{w['loss_retained']:.3f}",
            f"{w['accuracy_test']:.1%}",
            f"{w['js_deleted']:.3f}" if "js_deleted" in w else "",
            f"{w['js_test']:.3f}" if "js_test" in w else "",
            f"{w['mia_auc']:.2f}",
            f"{w['seconds']:.0f}",
            f"{w['share']:.0%}",
            f"{w['memory'] / 2**30:.1f}" if "memory" in w else "",
        )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plotted(cases: Mapping[str, Any], file: Path) -> None:
    """Deleted loss over retraining's against the share of fine-tuning's time, with the gates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(cases))
    figure, axes = plt.subplots(
        -(-len(cases) // columns), columns, figsize=(10, 8.5), squeeze=False, layout="constrained"
    )
    for axis, (case, ways) in zip(axes.flat, cases.items(), strict=False):
        axis.fill_between([1e-2, SHARE], 1 / FACTOR, FACTOR, color="C2", alpha=0.2)
        axis.axhline(ways["trained"]["ratio"], color="gray", linestyle=":", label="trained")
        for number, (way, w) in enumerate(ways.items()):
            if way != "trained":
                mark = "*" if way in DELETIONS else "o"
                label = f"{way}, test {100 * w['accuracy_change']:+.1f}"
                axis.plot(w["share"], w["ratio"], mark, color=f"C{number}", label=label)
        axis.set(xscale="log", yscale="log", title=case, xlim=(1e-2, 5), ylim=(0.2, 5))
        ticks = (0.25, 0.5, 1, 2, 4)
        axis.set_yticks(ticks, map(str, ticks))
        axis.set_yticks((), minor=True)
        axis.set(xlabel="share of fine-tuning's time", ylabel="deleted loss over retraining's")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        axis.legend(fontsize=8, ncols=3, frameon=False, **below)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draw", default="judged", choices=("judged", "development"))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--requests", nargs="+", default=list(REQUESTS), choices=REQUESTS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="run these, again")
    parser.add_argument("--retrained", type=int, nargs="+", default=list(RETRAINED))
    parser.add_argument("--cache", type=Path, default=environment.ROOT / "benchmarks/output/minilm")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path, help="draw what is recorded, and stop")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        way, kind, request = options.one
        print(json.dumps(one(way, kind, options.draw, request, options.cache)))
        return 0
    folder = environment.ROOT / "benchmarks"
    output = options.output or (
        folder / "results/minilm.json"
        if options.draw == "judged"
        else folder / "output/minilm-development.json"
    )
    known = json.loads(output.read_text()) if output.exists() else {}
    if options.plot:
        plotted(known["cases"], options.plot)
        for case, ways in known["cases"].items():
            print(f"{case}\n{table(ways)}")
        return 0
    result: dict[str, Any] = {
        "schema": "minilm-1",
        **environment.heading(),
        "settings": {"draw": options.draw, "epochs": EPOCHS, "deletions": DELETIONS}
        | {"baselines": BASELINES},
        "cases": known.get("cases", {}),
    }
    for kind in options.kinds:
        for request in options.requests:
            ways = result["cases"].setdefault(f"{kind}, {request}", {})
            peers = [f"retrained {seed}" for seed in options.retrained]
            for way in ("trained", *peers, *(options.ways or WAYS)):
                if way not in ways or way in (options.ways or ()):
                    ways[way] = in_a_process(way, kind, request, options)
                    if any(each.startswith("retrained") for each in ways):
                        compared(options.draw, kind, request, ways, options.cache)
                    result["claims"] = claims(result["cases"])
                    save(result, output)
            print(f"{kind}, {request}\n{table(ways)}", flush=True)
    for claim in result["claims"]:
        print(claim)
    return 0 if all(claim["met"] for claim in result["claims"]) else 1


def in_a_process(way: str, kind: str, request: str, options: Any) -> dict[str, Any]:
    """`one` in a process of its own, with commit and machine."""
    command = [sys.executable, __file__, "--one", way, kind, request]
    command += ["--draw", options.draw, "--cache", str(options.cache)]
    version = environment.commit() | {"load": environment.load(), "machine": environment.machine()}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | version


if __name__ == "__main__":
    sys.exit(main())
