"""Time deletions with the paper's preset and the published procedure, phase by phase.

    python benchmarks/deletion.py [--quick] [--threads N] [--output FILE] [--state FILE]

A ResNet-18 for images of 32 x 32 is trained for two epochs on 2000 images of Fashion-MNIST. It is
kept in the state file, from which a second run starts. Two epochs do not train it well; the times
depend on that only through what L-FOCI selects. Then single samples are removed, each from the
trained network: by `unlearn` from the statistics of the two epochs, and by the published procedure
for the same number of units. The search and the dense solve of that procedure are timed in part and
scaled. One sample is also removed with the retained samples instead of statistics. Fashion-MNIST is
read from the Debian package dataset-fashion-mnist; --quick uses noise and a tiny network.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import environment
from results import SCHEMA
from run import save

WEIGHT_DECAY = 5e-4
EPOCHS = 2
PHASES = ("perturbation", "selection", "gradients", "curvature", "solve", "monitoring")
NAMES = ("lcodec_ext", "published")
CLAIMS = ({"quantity": "ratio", "at_least": 20}, {"quantity": "selection_share", "at_most": 0.05})


class Sizes(NamedTuple):
    """The size of a deletion, and how much of the published procedure is timed."""

    tiny: bool
    n: int
    perturbations: int
    requests: int  # the first samples, each removed alone
    candidates: int  # scored in every step of the search
    parameters: int  # of the dense matrix


FULL = Sizes(False, 2000, 1000, 5, 100, 8000)
QUICK = Sizes(True, 40, 60, 2, 10, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny network: does everything run?")
    parser.add_argument("--threads", type=int, default=environment.cores(), help="for everything")
    output = environment.ROOT / "benchmarks/output"
    parser.add_argument("--output", type=Path, default=output / "deletion.json")
    parser.add_argument(
        "--state", type=Path, help="trained network (default: deletion.pt next to the output)"
    )
    options = parser.parse_args(arguments)
    environment.limit_threads(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else FULL
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **environment.heading(),
        "settings": {
            "quick": options.quick,
            "threads": options.threads,
            "weight_decay": WEIGHT_DECAY,
            "epochs": EPOCHS,
        },
        "cases": {},
    }
    if result["load_before"] > 0.5:
        print(f"note: other work is running here (load {result['load_before']})")
    state = options.state or options.output.with_suffix(".pt")
    result["deletion"] = deletion(sizes, None if options.quick else state)
    save(result, options.output)
    print(f"\nwrote {options.output}")
    return 0


# --------------------------------------------------------------------------------------------
# Training


class Trained(NamedTuple):
    model: Any
    x: Any
    y: Any
    snapshots: list[tuple[dict[str, Any], dict[str, Any]]]  # at the ends of the epochs
    accuracy: float


def samples(sizes: Sizes) -> tuple[Any, Any]:
    import torch
    import torch.nn.functional as F

    if sizes.tiny:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(sizes.n) % 10
        return torch.randn(sizes.n, 3, 16, 16, generator=generator), labels
    from convex import fashion_mnist

    pixels, labels = fashion_mnist(sizes.n)
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), torch.from_numpy(labels)


def trained(sizes: Sizes, state: Path | None) -> Trained:
    """Return the network from the state file, or train it now."""
    import networks
    import torch
    import torch.nn.functional as F

    from lcodec_ext.unlearning import TrainingStatistics

    x, y = samples(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = networks.make("ResNet-18", 32, sizes.tiny, seed=0)[0]
        if state is not None and state.exists():
            kept = torch.load(state, weights_only=True)
            model.load_state_dict(kept["weights"])
            return Trained(model.eval(), x, y, kept["snapshots"], kept["accuracy"])
        print("training", flush=True)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.02, momentum=0.9, weight_decay=WEIGHT_DECAY
        )
        snapshots = []
        for _ in range(EPOCHS):
            model.train()
            for batch in torch.randperm(sizes.n).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
            snapshots.append(
                TrainingStatistics.snapshot(model, (x, y), F.cross_entropy, batch_size=50)
            )
        with torch.no_grad():
            model.eval()
            found = torch.cat([model(part).argmax(1) for part in x.split(50)])
    accuracy = float((found == y).float().mean())
    if state is not None:
        state.parent.mkdir(parents=True, exist_ok=True)
        kept = {"weights": model.state_dict(), "snapshots": snapshots, "accuracy": accuracy}
        torch.save(kept, state)
    return Trained(model, x, y, snapshots, accuracy)


# --------------------------------------------------------------------------------------------
# The deletion


def deletion(sizes: Sizes, state: Path | None) -> dict[str, Any]:
    """Remove samples in all ways; return what to record."""
    import torch.nn.functional as F

    from lcodec_ext.unlearning import TrainingStatistics, unlearn

    given = trained(sizes, state)
    saved = TrainingStatistics.from_epochs(given.snapshots, sizes.n)

    def ours(sample: int, **options: Any) -> Any:
        forget = given.x[[sample]], given.y[[sample]]
        retain = None if options else (without(given.x, sample), without(given.y, sample))
        return unlearn(
            given.model,
            forget,
            retain,
            F.cross_entropy,
            preset="paper",
            weight_decay=WEIGHT_DECAY,
            n_perturbations=sizes.perturbations,
            **options,
        )

    ours(0, statistics=saved)  # warms up
    results = [ours(sample, statistics=saved) for sample in range(sizes.requests)]
    published = Published(given, sizes)
    requests = [request_of(sample, result, published) for sample, result in enumerate(results)]
    both = {
        name: {
            phase: statistics.fmean(request[name][phase] for request in requests)
            for phase in requests[0][name]
        }
        for name in NAMES
    }
    found = {
        "size": {
            "pixels": given.x.shape[-1],
            "n": sizes.n,
            "perturbations": sizes.perturbations,
            "candidates": results[0].n_units,
            "trainable": results[0].n_trainable,
        },
        "training_accuracy": given.accuracy,
        "requests": requests,
        "mean": both,
        "measured": published.measured,
        "from_retained": from_retained(lambda: ours(0)),
        "ratio": both["published"]["total"] / both["lcodec_ext"]["total"],
        "selection_share": both["lcodec_ext"]["selection"] / both["lcodec_ext"]["total"],
    }
    found["claims"] = [] if sizes.tiny else [judged(claim, found) for claim in CLAIMS]
    show(found)
    return found


def request_of(sample: int, result: Any, published: "Published") -> dict[str, Any]:
    """One request, by both."""
    request = {
        "sample": sample,
        "units": len(result.selection),
        "steps": len(result.foci.ordering),
        "parameters": result.n_parameters,
        "matrix_gb": 4e-9 * result.n_parameters**2,  # one dense matrix of the procedure
        "lcodec_ext": split(result.seconds),
        "published": published.split(result),
    }
    request["ratio"] = request["published"]["total"] / request["lcodec_ext"]["total"]
    return request


def from_retained(remove: Callable[[], Any]) -> dict[str, Any]:
    """A deletion from the retained samples, or why it is refused."""
    try:
        result = remove()
    except ValueError as error:  # far from a minimum the curvature along the step may be negative
        return {"refused": str(error)}
    return {
        "units": len(result.selection),
        "parameters": result.n_parameters,
        "n_monitored": result.n_monitored,
        "split": split(result.seconds),
    }


def show(found: dict[str, Any]) -> None:
    requests, retained = found["requests"], found["from_retained"]
    for name in NAMES:
        print_split(f"{name}, mean of {len(requests)}", found["mean"][name])
    if "split" in retained:
        print_split("lcodec_ext, from the retained samples", retained["split"])
    else:
        print(f"\nlcodec_ext, from the retained samples: refused: {retained['refused']}")
    for request in requests:
        print({key: value for key, value in request.items() if key not in NAMES})
    for claim in found["claims"]:
        print(claim)


def without(tensor: Any, row: int) -> Any:
    import torch

    return torch.cat([tensor[:row], tensor[row + 1 :]])


def split(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds by phase, and the rest that belongs to none of them."""
    phases = {phase: seconds.get(phase, 0.0) for phase in PHASES}
    return {**phases, "rest": seconds["total"] - sum(phases.values()), "total": seconds["total"]}


def judged(claim: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    value = found[claim["quantity"]]
    met = claim.get("at_least", value) <= value <= claim.get("at_most", value)
    return {**claim, "value": value, "met": met}


def print_split(name: str, phases: dict[str, float]) -> None:
    print(f"\n{name}")
    for phase, seconds in phases.items():
        print(f"  {phase:14} {seconds:10.3f} s {seconds / phases['total']:7.1%}")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------
# The published procedure


class Published:
    """The published procedure, measured once; its time for a selection follows by scaling."""

    def __init__(self, given: Trained, sizes: Sizes) -> None:
        import peers
        import torch
        import torch.nn.functional as F

        self._given, self._sizes = given, sizes
        x, y = given.x[:1], given.y[:1]
        model = copy.deepcopy(given.model)
        noisy = (x + 0.1 * torch.randn(x.shape) for _ in range(sizes.perturbations))
        begin = time.perf_counter()
        self._rows, self._losses = peers.published_perturbations(model, F.cross_entropy, noisy, y)
        perturbation = time.perf_counter() - begin

        def gradients() -> float:
            return peers.published_gradients(model, F.cross_entropy, x, y)

        gradients()
        size = sizes.parameters
        generator = torch.Generator().manual_seed(0)
        step, change, moved, gradient = torch.randn(4, size, generator=generator)
        begin = time.perf_counter()
        matrix = peers.published_matrix((step, change), (moved, change), sizes.n)
        middle = time.perf_counter()
        peers.published_solve(matrix, gradient, WEIGHT_DECAY, sizes.n)
        end = time.perf_counter()
        self.measured: dict[str, Any] = {
            "perturbation": perturbation,
            "copy": seconds_of(lambda: copy.deepcopy(given.model)),
            "gradient": seconds_of(gradients),
            "parameters": size,
            "matrix": middle - begin,
            "solve": end - middle,
            "candidates": sizes.candidates,
            "search": [],  # seconds of a candidate after 0, 1, ... selected columns
        }

    def split(self, result: Any) -> dict[str, float]:
        """Seconds by phase, for the steps of the search and the parameters of the result."""
        measured = self.measured
        steps = len(result.foci.ordering) + 1  # the last one finds that it must stop
        while len(measured["search"]) < steps:
            measured["search"].append(self._search(len(measured["search"])))
        p = self._rows.shape[1]
        factor = result.n_parameters / measured["parameters"]
        seconds = {
            "perturbation": measured["perturbation"],
            "selection": sum(each * (p - k) for k, each in enumerate(measured["search"][:steps])),
            "gradients": measured["gradient"],
            # the sample's before and after a step of SGD, and the matrices
            "curvature": 2 * measured["gradient"] + measured["matrix"] * factor**2,
            "solve": measured["solve"] * factor**3,
            "monitoring": measured["gradient"],  # the sample's loss and gradient norm afterwards
        }
        return split({**seconds, "total": sum(seconds.values()) + measured["copy"]})

    def _search(self, k: int) -> float:
        """Seconds of a candidate after k selected columns."""
        import numpy as np
        import peers

        order = np.random.default_rng(k).permutation(self._rows.shape[1]).tolist()
        candidates = order[k : k + self._sizes.candidates]
        part = seconds_of(
            lambda: peers.published_gains(self._rows, self._losses, order[:k], candidates)
        )
        return part / len(candidates)


def seconds_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
