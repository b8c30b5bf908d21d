"""Write the fixtures of tests/test_before_redesign.py: ledgers, and golden results of the presets.

They were written once, by version 0.1.0 before its modules were moved and split, so that later
versions can be held against it. `python tests/data/before_redesign/make.py DIRECTORY` writes the
same set with the version that is installed, into another directory: to compare, not to replace.

inputs.pt         data as uint8 images, labels, and the trained weights of the models
statistics.pt     `TrainingStatistics` of the smallest model, in use by one of the streams
pairs.pt          `TrainingStatistics` from the ends of epochs
streams/NAME/     directories of `Unlearner`, from `STREAMS`, and what became of each in ...
streams.json      ... hashes of the weights as recorded, and after one more request
results.json      for each of `GOLDEN`: the result's scalars, selection, and the hash of ...
results.pt        ... its weights
machine.json      what the bits depend on
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lcodec_ext.unlearning import TrainingStatistics, Unlearner, unlearn

HERE = Path(__file__).parent
N = 300
FORGET = {  # of the golden results
    "mlp": [3, 41, 77, 120, 200, 201],
    "cnn": [3, 41, 77, 120, 200, 201],
    "wide": list(range(0, 180, 3)),
}
ONE_MORE = [17, 90]  # the request with which every stream goes on


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))


def small():
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def wide():
    """So many parameters that the step is by conjugate gradients."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


MODELS = {"mlp": mlp, "cnn": cnn, "small": small, "wide": wide}
DTYPES = {"float64": torch.float64, "float32": torch.float32}
WEIGHT_DECAY = {"mlp": 1e-3, "cnn": 1e-3, "small": 1e-3, "wide": 0.03}
GOLDEN = [
    (preset, model, dtype)
    for preset, model in (
        ("recommended", "mlp"),
        ("recommended", "cnn"),
        ("recommended", "wide"),
        ("paper", "mlp"),
        ("paper", "cnn"),
    )
    for dtype in DTYPES
]
CONSTANTS = {"damping": 1e-5, "output_damping": 2e-3}  # of "recommended" in that version
OPTIONS = {"wide": {"repair_drop": None}}  # repairs, whatever the step did
# Name: model, options of the stream, requests. All in float64. "guarded" takes back a request.
STREAMS = {
    "recommended": (
        "cnn",
        {"epsilon": 50.0, "delta": 1e-3, "epsilon_budget": 150.0, "delta_budget": 0.1, "keep": 3}
        | CONSTANTS,
        [
            lambda u: u.remove([5, 2], note="first"),
            lambda u: u.remove(8),
            lambda u: u.release(note="given away"),
            lambda u: u.remove(range(30, 36)),
            lambda u: u.rollback(note="as it was"),
            lambda u: u.release(),
            lambda u: u.remove([40, 31]),
        ],
    ),
    "paper": (
        "mlp",
        {"preset": "paper", "n_perturbations": 200, "seed": 3},
        [lambda u: u.remove([7, 1, 12]), lambda u: u.remove(44)],
    ),
    "statistics": (
        "small",
        {"seed": 1},
        [lambda u: u.remove([9]), lambda u: u.remove([60, 61]), lambda u: u.rollback(1)],
    ),
    "guarded": (
        "mlp",
        {"max_drop": 0.0, "repair_epochs": 0, "repair_drop": None, "retries": 1, "halvings": 1}
        | CONSTANTS,
        [
            lambda u: u.remove([4]),
            lambda u: u.remove(range(100, 180)),
            lambda u: u.remove([5, 100]),
        ],
    ),
}
VALIDATED = ("guarded", "statistics")


def make_inputs():
    """Images of three classes, and models trained on them."""
    rng = torch.Generator().manual_seed(20220619)
    targets = torch.arange(N) % 3
    centers = torch.randint(60, 196, (3, 1, 4, 4), generator=rng)
    noise = torch.randint(-60, 61, (N, 1, 4, 4), generator=rng)
    flipped = torch.randperm(N, generator=rng)[: N // 10]  # labels that must be learnt by heart
    pixels = (centers[targets] + noise).clamp(0, 255).to(torch.uint8)
    targets[flipped] = (targets[flipped] + 1) % 3
    weights = {}
    for name, build in MODELS.items():
        torch.manual_seed(1)
        model = build().double().train()
        x = images(pixels, torch.float64)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.2, momentum=0.9, weight_decay=WEIGHT_DECAY[name]
        )
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(model(x), targets).backward()
            optimizer.step()
        weights[name] = model.float().state_dict()
    return {"pixels": pixels, "targets": targets, "weights": weights}


def images(pixels, dtype):
    return (pixels.to(dtype) - 128) / 64  # exact


def trained(inputs, name, dtype):
    model = MODELS[name]()
    model.load_state_dict(inputs["weights"][name])
    return model.to(dtype).eval()


def golden(inputs, preset, model, dtype):
    x, y = images(inputs["pixels"], DTYPES[dtype]), inputs["targets"]
    stays = torch.ones(N, dtype=torch.bool)
    forget = FORGET[model]
    stays[forget] = False
    return unlearn(
        trained(inputs, model, DTYPES[dtype]),
        (x[forget], y[forget]),
        (x[stays], y[stays]),
        cross_entropy,
        preset=preset,
        weight_decay=WEIGHT_DECAY[model],
        seed=4,
        **(CONSTANTS if preset == "recommended" else {}),
        **OPTIONS.get(model, {}),
    )


def arguments(folder, inputs, name):
    """What a stream was begun with and is resumed with: model, train, loss_fn; keywords."""
    x, y = images(inputs["pixels"], torch.float64), inputs["targets"]
    keywords = {}
    if name in VALIDATED:
        keywords["validation"] = (x[200:], y[200:])
    if name == "statistics":
        keywords["statistics"] = TrainingStatistics.load(folder / "statistics.pt")
    return (trained(inputs, STREAMS[name][0], torch.float64), (x, y), cross_entropy), keywords


def state_hash(state):
    """As a ledger hashes it: of name, dtype, shape and bytes of each tensor, by increasing name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def machine():
    """What the bits of the results depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    identity = ("vendor_id", "cpu family", "model", "model name", "stepping")
    cpu = {k.strip(): v.strip() for k, v in (line.split(":", 1) for line in lines if ":" in line)}
    return {
        "cpu": {k: cpu.get(k) for k in identity},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": platform.machine(),
        "paths": {k: os.environ.get(k) for k in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")},
    }


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    inputs = make_inputs()
    torch.save(inputs, folder / "inputs.pt")
    inputs = torch.load(folder / "inputs.pt", weights_only=True)
    x, y = images(inputs["pixels"], torch.float64), inputs["targets"]
    model = trained(inputs, "small", torch.float64)
    TrainingStatistics.collect(model, (x, y), cross_entropy).save(folder / "statistics.pt")
    snapshots = []
    for step in range(4):
        moved = trained(inputs, "small", torch.float64)
        with torch.no_grad():
            for p in moved.parameters():
                p.mul_(1 - 0.01 * (3 - step))
        snapshots.append(TrainingStatistics.snapshot(moved, (x, y), cross_entropy))
    TrainingStatistics.from_epochs(snapshots, N).save(folder / "pairs.pt")

    streams = {}
    for name, (kind, options, requests) in STREAMS.items():
        given, keywords = arguments(folder, inputs, name)
        directory = folder / "streams" / name
        with Unlearner(
            *given, directory=directory, weight_decay=WEIGHT_DECAY[kind], **keywords, **options
        ) as stream:
            for request in requests:
                request(stream)
            record = {
                "entries": [entry.kind for entry in stream.ledger],
                "head": stream.ledger.head,
                "removed": list(stream.removed),
                "pending": list(stream.pending),
                "sha256": state_hash(stream.model.state_dict()),
                "budget": stream.budget and stream.budget.to_dict(),
            }
        streams[name] = record
    for path in folder.glob("streams/*/lock"):
        path.unlink()
    _write_json(folder / "streams.json", streams)
    for name in STREAMS:
        streams[name]["next"] = go_on(folder, inputs, name, folder / "copy")
    _write_json(folder / "streams.json", streams)

    results, weights = {}, {}
    for case in GOLDEN:
        result = golden(inputs, *case)
        values = result.to_dict()
        values.pop("seconds")
        state = result.model.state_dict()
        weights["-".join(case)] = state
        results["-".join(case)] = values | {"sha256": state_hash(state)}
    _write_json(folder / "results.json", results)
    torch.save(weights, folder / "results.pt")
    _write_json(folder / "machine.json", machine())


def go_on(folder, inputs, name, directory):
    """Resume a copy of a stream and take one more request; the weights as lists, and their hash."""
    shutil.copytree(folder / "streams" / name, directory)
    try:
        given, keywords = arguments(folder, inputs, name)
        with Unlearner.resume(directory, *given, **keywords) as stream:
            stream.remove(ONE_MORE)
            state = stream.model.state_dict()
            selection = stream.ledger[-1].record["selection"]
    finally:
        shutil.rmtree(directory)
    weights = {k: t.flatten().tolist() for k, t in state.items()}
    return {"sha256": state_hash(state), "selection": selection, "weights": weights}


def _write_json(path, values):
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # small models; some steps do harm
        write(Path(sys.argv[1]))
