"""Delete a person from a re-identification network, and measure how well it finds the others.

The paper (Mehta et al., CVPR 2022) deletes images of one identity from ResNet-50, MobileNet-V2,
OSNet and MLFN that were trained on Market1501, by softmax with label smoothing and a triplet loss.
This example trains narrow networks on generated pedestrians of 64 x 32 pixels: a ResNet with
bottlenecks, and with --full OSNet; --network mobilenet takes MobileNet-V2. It deletes all images of
a person, of three persons one at a time with --full, in the paper's way and with the calibrated
default. Retrained networks are the yardstick. Retrieval is judged as on Market1501, by mAP and CMC.

The reduced form takes about a minute, --full a quarter of an hour of CPU time. --data DIR reads
Market1501 itself; with --width 1 --height 256 networks and images have the paper's size, for which
CPUs are slow.
"""

import base64
import copy
import functools
import math
import time
import warnings
from dataclasses import dataclass

import common
import numpy as np
import torch
from reid_data import DISTRACTOR, JUNK, generated, market, pixels_of, split
from reid_networks import NETWORKS, TITLES
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from lcodec_ext.curvature import IndefiniteCurvatureError
from lcodec_ext.evaluation.figures import BLUE, DARK, ORANGE, PALE
from lcodec_ext.unlearning import unlearn

MARGIN, SMOOTHING = 0.3, 0.1  # of the triplet loss; of the labels
WEIGHT_DECAY, RATE, BATCH = 5e-4, 2e-3, 32
LAMBDA, EPSILON, DELTA = 0.01, 5e-4, 0.01  # the paper's
LIPSCHITZ, HESSIAN_LIPSCHITZ = 1.0, 0.25  # assumed by the published code
CURVATURE = 256  # retained images that the paper's step reads
RANKS = (1, 5, 10)
METHODS = {
    "before": DARK,
    "calibrated": BLUE,
    "paper": ORANGE,
    "retrained": PALE,
}


@dataclass
class Form:
    """How large an experiment is."""

    networks: tuple[str, ...] = ("resnet",)
    persons: int = 1  # who are deleted, one at a time, each from the network that knows all
    depths: tuple[int, ...] = (1, 1, 1, 1)  # blocks in a stage of the ResNet
    trained: int = 16  # identities, generated
    tested: int = 20
    per_camera: int = 10  # images of a training identity
    epochs: int = 12
    perturbations: int = 30


FULL = Form(
    networks=("resnet", "osnet"),
    persons=3,
    depths=(2, 2, 2, 2),
    trained=32,
    tested=40,
    epochs=20,
    perturbations=60,
)
LONGER = {"mobilenet": 2}  # times the epochs, for a network that learns slowly


# ---------------------------------------------------------------------------------------------
# Networks and loss


class Identifier(nn.Module):
    """Scores of the training identities, and squared distances to their centres.

    The centres are parameters. They stand in the model, not in the loss, so that the loss of an
    image depends on nothing but the parameters, its own outputs and its own identity.
    """

    def __init__(self, body: nn.Module, size: int, identities: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(size, identities)
        self.centres = nn.Parameter(torch.randn(identities, size))

    def maps(self, images):
        """The last feature map, (n, channels, height, width)."""
        found = self.body(images)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    def features(self, images):
        """What retrieval compares, of length 1."""
        return normalize(self.maps(images).mean((2, 3)))

    def forward(self, images):
        pooled = self.maps(images).mean((2, 3))
        distances = 2 - 2 * normalize(pooled) @ normalize(self.centres).T
        return self.head(pooled), distances


def loss_fn(outputs, targets):
    """Softmax with smoothed labels, plus the triplet loss of each image against the centres.

    The triplet of an image is its own identity's centre and the nearest of the others.
    """
    scores, distances = outputs
    own = distances.gather(1, targets[:, None])[:, 0]
    other = distances.scatter(1, targets[:, None], torch.inf).min(1).values
    triplet = (MARGIN + own - other).relu().mean()
    return cross_entropy(scores, targets, label_smoothing=SMOOTHING) + triplet


def coupled_loss_fn(outputs, targets):
    """The usual triplet loss, against the hardest images of the batch. `unlearn` refuses it."""
    scores, features = outputs
    distances = torch.cdist(features, features)
    same = targets[:, None] == targets
    farthest = distances.masked_fill(~same, -torch.inf).max(1).values
    nearest = distances.masked_fill(same, torch.inf).min(1).values
    triplet = (MARGIN + farthest - nearest).relu().mean()
    return cross_entropy(scores, targets, label_smoothing=SMOOTHING) + triplet


def right(outputs, targets):
    """Whether the network names the person, for each image."""
    return (outputs[0].argmax(1) == targets).float()


def trained(samples, form: Form, network: str, width: float, identities: int, seed: int, what: str):
    """A network after `form.epochs` of Adam, whose rate follows a cosine."""
    torch.manual_seed(seed)
    model = Identifier(*NETWORKS[network](width, form.depths), identities)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    epochs = form.epochs * LONGER.get(network, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images, targets = samples
    for _ in common.progress(range(epochs), what, "epoch"):
        for some in torch.randperm(len(images)).split(BATCH):
            if len(some) == 1:
                continue
            optimizer.zero_grad()
            loss_fn(model(images[some]), targets[some]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


# ---------------------------------------------------------------------------------------------
# Retrieval


@torch.no_grad()
def in_parts(function, images):
    """A function of images, on 256 at a time."""
    return torch.cat([function(part) for part in images.split(256)])


def retrieval(distances: np.ndarray, query, gallery) -> dict:
    """MAP and CMC by Market1501's protocol; `query` and `gallery` have `person` and `camera`.

    Left out for each query: junk, and images of the same person by the same camera. Distractors
    stay. Queries without a right answer do not count. AP is the mean precision at right answers.
    """
    precisions, ranks = [], []
    for k, order in enumerate(np.argsort(distances, 1, kind="stable")):
        same = gallery.person[order] == query.person[k]
        counts = gallery.person[order] != JUNK
        counts &= ~(same & (gallery.camera[order] == query.camera[k]))
        hits = np.flatnonzero(same[counts])
        if len(hits):
            precisions.append(np.mean(np.arange(1, len(hits) + 1) / (hits + 1)))
            ranks.append(hits[0])
    if not precisions:
        raise ValueError("no query has a right answer in the gallery by another camera")
    cmc = {f"rank{r}": float(np.mean(np.array(ranks) < r)) for r in RANKS}
    return {"queries": len(ranks), "mAP": float(np.mean(precisions)), **cmc}


def found_by(model, query, gallery) -> dict:
    """What a network finds."""
    features = [in_parts(model.features, part.images) for part in (query, gallery)]
    return retrieval((1 - features[0] @ features[1].T).numpy(), query, gallery)


@torch.no_grad()
def mean_loss(model, samples) -> float:
    """The mean loss of samples, in evaluation mode."""
    parts = zip(samples[0].split(256), samples[1].split(256), strict=True)
    return sum(float(loss_fn(model(x), y)) * len(y) for x, y in parts) / len(samples[1])


def judged(model, task: "Task") -> dict:
    """Retrieval of the test's people and of the deleted person, and losses."""
    own = task.held[np.flatnonzero(task.held.person == task.person)]
    with torch.no_grad():
        named = model(own.images)[0].argmax(1) == task.label
    return {
        "others": found_by(model, task.query, task.gallery),
        "person": found_by(model, own, own + task.gallery),
        "named": float(named.float().mean()),
        "loss_deleted": mean_loss(model, task.forget),
        "loss_retained": mean_loss(model, task.retain),
    }


# ---------------------------------------------------------------------------------------------
# A request


@dataclass
class Task:
    """One request: images of one training identity, and what it is judged on."""

    person: int
    label: int
    identities: int
    samples: tuple  # all of the training
    forget: tuple
    retain: tuple
    validation: tuple
    held: object  # images of training identities that no network is trained on
    query: object
    gallery: object


def tasks(parts: dict, form: Form, seed: int) -> list[Task]:
    """The requests: all images of a person, for each of some persons drawn at random."""
    train, held = split(parts["train"])
    people, labels = np.unique(train.person, return_inverse=True)
    samples = train.images, torch.tensor(labels)
    unseen = torch.tensor(np.searchsorted(people, held.person))
    several = [p for p in people if len(np.unique(held.camera[held.person == p])) > 1]
    if not several:
        raise SystemExit(
            "no training identity has held-out images by two cameras: --data needs identities "
            "with ten images or more"
        )
    drawn = np.random.default_rng(seed).permutation(several)[: form.persons]
    found = []
    for label in np.searchsorted(people, drawn).tolist():
        gone = torch.tensor(labels == label)
        found.append(
            Task(
                person=int(people[label]),
                label=label,
                identities=len(people),
                samples=samples,
                forget=(samples[0][gone], samples[1][gone]),
                retain=(samples[0][~gone], samples[1][~gone]),
                validation=(held.images, unseen),
                held=held,
                query=parts["query"],
                gallery=parts["gallery"],
            )
        )
    return found


def deletion(model, task: Task, form: Form, method: str, seed: int) -> tuple[nn.Module, dict]:
    """The model after a deletion, and what to record of it."""
    began = time.process_time()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if method == "paper":
            changed, found = papers_way(model, task, form, seed)
        else:
            result = unlearn(
                model,
                task.forget,
                task.retain,
                loss_fn,
                validation=task.validation,
                score=right,
                weight_decay=WEIGHT_DECAY,
                seed=seed,
            )
            changed = result.model
            found = {"changed": result.n_parameters, "strength": str(result.calibration)}
    found |= {"cpu_seconds": time.process_time() - began}
    return changed, found | {"warnings": [str(each.message) for each in heard]}


def papers_way(model, task: Task, form: Form, seed: int) -> tuple[nn.Module, dict]:
    """Delete the images one after another; an image whose secant is not positive is skipped."""
    changed, skipped = [], 0
    for k, image in enumerate(common.progress(list(zip(*task.forget, strict=True)), "paper")):
        try:
            result = unlearn(
                model,
                tuple(each[None] for each in image),
                task.retain,
                loss_fn,
                preset="paper",
                damping=LAMBDA,
                n_perturbations=form.perturbations,
                n_curvature=CURVATURE,
                weight_decay=WEIGHT_DECAY,
                seed=seed + k,
            )
        except IndefiniteCurvatureError:
            skipped += 1
            continue
        model = result.model
        changed.append(result.n_parameters)
    return model, {"changed": float(np.mean(changed)) if changed else 0.0, "skipped": skipped}


def noise(model, n: int, images) -> dict:
    """The paper's noise for one image of n, and whether the network survives it."""
    gamma = 2 * HESSIAN_LIPSCHITZ * LIPSCHITZ**2 / (n**2 * LAMBDA**3)
    sigma = gamma / EPSILON * math.sqrt(2 * math.log(1.25 / DELTA))
    noisy, draws = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        weights = torch.cat([p.flatten() for p in model.parameters()])
        for parameter in noisy.parameters():
            parameter += sigma * torch.randn(parameter.shape, generator=draws)
        finite = bool(torch.isfinite(noisy(images)[0]).all())
    return {"sigma": sigma, "weights": float(weights.square().mean().sqrt()), "finite": finite}


def one_network(parts: dict, form: Form, network: str, width: float, seed: int) -> dict:
    """Train; delete each person in every way, and retrain without; judge."""
    asked = tasks(parts, form, seed)
    learn = functools.partial(
        trained, form=form, network=network, width=width, identities=asked[0].identities
    )
    began = time.process_time()
    model = learn(asked[0].samples, seed=seed, what=f"{TITLES[network]}, training")
    found = {"training_cpu_seconds": time.process_time() - began, "persons": []}
    found |= {"parameters": sum(p.numel() for p in model.parameters())}
    for k, task in enumerate(asked):
        models, rows = {"before": model}, {"before": judged(model, task)}
        for method in ("calibrated", "paper"):
            models[method], told = deletion(model, task, form, method, seed)
            rows[method] = judged(models[method], task) | told
            print(f"{network}, {task.person}, {method}: {line_of(rows[method])}", flush=True)
        again = learn(task.retain, seed=seed + 1000 + k, what="retraining")
        models["retrained"], rows["retrained"] = again, judged(again, task)
        deleted = len(task.forget[1])
        found["persons"].append({"person": task.person, "deleted": deleted, "methods": rows})
        if k == 0:
            found["noise"] = noise(models["paper"], len(task.samples[1]), task.query.images[:8])
            found["maps"] = activation_maps(models, task)
    return found | {"change": {m: change(found["persons"], m) for m in METHODS if m != "before"}}


def change(persons: list[dict], method: str) -> dict:
    """By how much the others' mAP changed: the mean over the persons, and its standard error."""
    rows = [each["methods"] for each in persons]
    each = [row[method]["others"]["mAP"] - row["before"]["others"]["mAP"] for row in rows]
    many = len(each) > 1
    error = float(np.std(each, ddof=1) / math.sqrt(len(each))) if many else None
    return {"mean": float(np.mean(each)), "error": error, "each": each}


def line_of(row: dict) -> str:
    """A row of the table in words."""
    person, others = row["person"], row["others"]
    return (
        f"mAP of others {others['mAP']:.3f}, of the person {person['mAP']:.3f}, deleted images "
        f"lose {row['loss_deleted']:.3g}"
    )


# ---------------------------------------------------------------------------------------------
# Activation maps


def activation_maps(models: dict, task: Task) -> dict:
    """Mean absolute last feature maps of images of the deleted person and of two others."""
    own = task.held[np.flatnonzero(task.held.person == task.person)]
    real = np.flatnonzero(~np.isin(task.query.person, (JUNK, DISTRACTOR)))
    _, first = np.unique(task.query.person[real], return_index=True)
    chosen = [own.images[:1], own.images[-1:], task.query.images[real[first[:2]]]]
    images = torch.cat(chosen)
    pixels = np.rint(255 * pixels_of(images)).astype(np.uint8)
    found = {"shape": list(pixels.shape), "images": packed(pixels), "methods": {}}
    for name, model in models.items():
        with torch.no_grad():
            maps = attention(model, images)
        found["methods"][name] = {"shape": list(maps.shape), "maps": packed(maps)}
    return found


def attention(model, images) -> np.ndarray:
    """The mean absolute last feature map of each image, from 0 to 255."""
    maps = model.maps(images).abs().mean(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (255 * (maps - low) / (high - low).clamp(min=1e-12)).round().byte().numpy()


def packed(array: np.ndarray) -> str:
    """Bytes as text, which takes less room in a record than a list."""
    return base64.b64encode(array.tobytes()).decode()


def unpacked(text: str, shape) -> np.ndarray:
    """What `packed` wrote."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


# ---------------------------------------------------------------------------------------------
# The example


def run(arguments) -> dict:
    """All networks."""
    form = FULL if arguments.full else Form()
    if arguments.network:
        form.networks = (arguments.network,)
    if arguments.data is None:
        parts = generated(
            arguments.seed, form.trained, form.tested, form.per_camera, arguments.height
        )
    else:
        parts = market(arguments.data, arguments.height)
    found = {
        "form": vars(form),
        "data": {
            name: {"images": len(part), "people": len(np.unique(part.person))}
            for name, part in parts.items()
        },
        "networks": {
            network: one_network(parts, form, network, arguments.width, arguments.seed)
            for network in form.networks
        },
    }
    return found


def show(record: dict) -> str:
    """The table."""
    lines = [
        f"{'':<18}{'others':>8}{'rank 1':>8}{'person':>8}{'named':>8}{'deleted':>9}{'kept':>9}",
        f"{'':<18}{'mAP':>8}{'':>8}{'mAP':>8}{'':>8}{'loss':>9}{'loss':>9}",
    ]
    for network, found in record["networks"].items():
        for asked in found["persons"]:
            lines.append(
                f"{TITLES[network]}, {asked['deleted']} images of person {asked['person']}"
            )
            for name, row in asked["methods"].items():
                others, person = row["others"], row["person"]
                lines.append(
                    f"  {name:<16}{others['mAP']:>8.3f}{others['rank1']:>8.3f}"
                    f"{person['mAP']:>8.3f}{row['named']:>8.2f}{row['loss_deleted']:>9.3g}"
                    f"{row['loss_retained']:>9.3g}"
                )
        told = [f"{name} {in_points(each)}" for name, each in found["change"].items()]
        lines.append(f"  change of the others' mAP, in points: {', '.join(told)}")
    lines.append(
        "others: people of the test. person: the deleted one, by held-out images among the test's "
        "gallery.\nnamed: share of these that the classifier names. Aim: near the retrained rows."
    )
    return "\n".join(lines)


def in_points(found: dict) -> str:
    """A change of mAP in points, with its standard error where there is one."""
    error = "" if found["error"] is None else f" +- {100 * found['error']:.1f}"
    return f"{100 * found['mean']:+.1f}{error}"


def draw(record: dict, file) -> None:
    """Bars of all networks, and activation maps of the first."""
    with common.figure(file, size=(9, 6.6)) as axes:
        whole = axes.figure
        axes.remove()
        top, bottom = whole.subfigures(2, 1, height_ratios=[1, 1.35])
        bars(top, record)
        network, found = next(iter(record["networks"].items()))
        shown_maps(bottom, found["maps"], TITLES[network])


def bars(part, record: dict) -> None:
    """How the others are found, and the loss of the deleted images; a dot for each person."""
    panels = {
        "Others: change of mAP, in points": lambda row, before: (
            100 * (row["others"]["mAP"] - before["others"]["mAP"])
        ),
        "mAP of the deleted person": lambda row, before: row["person"]["mAP"],
        "Loss of the deleted images": lambda row, before: row["loss_deleted"],
    }
    panes = part.subplots(1, len(panels))
    for axes, (title, value) in zip(panes, panels.items(), strict=True):
        for k, (method, colour) in enumerate(METHODS.items()):
            at = np.arange(len(record["networks"])) + 0.2 * (k - 1.5)
            values = [
                [value(each["methods"][method], each["methods"]["before"]) for each in persons]
                for persons in (found["persons"] for found in record["networks"].values())
            ]
            edge = DARK if colour == PALE else colour
            means = [np.mean(each) for each in values]
            axes.bar(at, means, 0.18, color=colour, edgecolor=edge, linewidth=0.6, label=method)
            for x, each in zip(at, values, strict=True):
                axes.plot([x] * len(each), each, ".", color="white", markeredgecolor="black", ms=5)
        names = [TITLES[network].removesuffix("-V2") for network in record["networks"]]
        axes.set_xticks(range(len(names)), names, fontsize=7)
        axes.set_title(title)
        if title.startswith("mAP"):
            axes.set_ylim(0, 1)
        if title.startswith("Others"):
            axes.axhspan(-1, 1, color=PALE, alpha=0.5, zorder=0)
            axes.axhline(0, color="grey", linewidth=0.8)
    part.legend(*panes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)


def shown_maps(part, maps: dict, title: str) -> None:
    """The images, and the maps of every network over them."""
    images = unpacked(maps["images"], maps["shape"])
    grey = images.mean(3) / 255
    height, width = grey.shape[1:]
    columns = 1 + len(maps["methods"])
    panes = part.subplots(2, 2 * columns)
    for k, image in enumerate(images):
        row = panes[k // 2][columns * (k % 2) :][:columns]
        row[0].imshow(image)
        row[0].set_title("deleted" if k < 2 else "other", fontsize=8)
        for axes, (method, found) in zip(row[1:], maps["methods"].items(), strict=True):
            axes.imshow(grey[k], cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
            axes.imshow(
                unpacked(found["maps"], found["shape"])[k],
                cmap="inferno",
                alpha=0.6,
                interpolation="bilinear",
                extent=(0, width, height, 0),
            )
            axes.set_title(method, fontsize=8)
    for axes in panes.flat:
        axes.set_axis_off()
    part.suptitle(f"Where the {title}'s last feature map is large, before and after", fontsize=9)


def options():
    """The example's options."""
    parser = common.options(
        __doc__,
        data="the unpacked Market-1501-v15.09.15, with bounding_box_train, query and "
        "bounding_box_test",
    )
    parser.add_argument("--network", choices=NETWORKS, help="only one of the networks")
    parser.add_argument(
        "--width", type=float, default=0.125, help="share of ResNet-50's channels, default 0.125"
    )
    parser.add_argument("--height", type=int, default=64, help="of images, default 64; paper: 256")
    return parser


if __name__ == "__main__":
    common.main("reid", options(), run, draw, show)
