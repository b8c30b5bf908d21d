"""Delete mislabelled training samples from a small network, and see what became of them.

A network learns scikit-learn's digits, some with a wrong label, until it has memorised those.
They are then deleted by one Newton step on the units that L-FOCI selects, on as many units drawn
at random, and on all units, and each is compared with training again without them. Prints a
table and writes digits_deletion.png and digits_deletion.json.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import lcodec_ext
from lcodec_ext.unlearning import unlearn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WEIGHT_DECAY = 3e-4
BEFORE, LFOCI, RANDOM, ALL, RETRAINED = "no-op", "L-FOCI", "random", "all units", "retrained"
OTHER_START = "retrained, other start"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for PNG and JSON"
    )
    parser.add_argument("--seed", type=int, default=0, help="of split, wrong labels and network")
    arguments = parser.parse_args()
    run(arguments.output, arguments.seed)


def run(output, seed, *, n_train=1200, n_wrong=80, n_hidden=24, iterations=1500, draws=20):
    """Train, delete, retrain, compare; returns what the JSON holds."""
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread
    data = Data(seed, n_train, n_wrong)
    print(
        f"{n_train} training samples, {n_wrong} of them with a wrong label; network "
        f"64-{n_hidden}-10 in float64, weight decay {WEIGHT_DECAY:g}"
    )
    both = (
        torch.cat([data.forget[0], data.retain[0]]),
        torch.cat([data.forget[1], data.retain[1]]),
    )
    trained, _ = train(network(n_hidden, seed), *both, iterations, "training")
    retrained, retrain_seconds = train(
        network(n_hidden, seed), *data.retain, iterations, "retraining"
    )
    other, other_seconds = train(
        network(n_hidden, seed + 10_000), *data.retain, iterations, "retraining, other start"
    )

    def delete(model=trained, retain=data.retain, **options):
        return unlearn(
            model, data.forget, retain, F.cross_entropy, weight_decay=WEIGHT_DECAY, **options
        )

    # The first call imports much; that is not part of any method's time.
    delete(retain=tuple(tensor[:20] for tensor in data.retain), selection="random", n_units=1)
    lfoci = delete(seed=seed, progress=True)
    whole = delete(selection="all", progress=True)
    n_units = len(lfoci.selection)
    random = [
        delete(selection="random", n_units=n_units, seed=draw)
        for draw in tqdm(range(draws), desc="random units", unit="draw")
    ]
    print(f"\n{lfoci}\n\n{whole}\n")

    def row(method, model, seconds, result=None):
        return {
            "method": method,
            "units": len(result.selection) if result else 0,
            "parameters": result.n_parameters if result else 0,
            **measure(model, retrained, data),
            "seconds": seconds,
        }

    random_rows = [row(RANDOM, r.model, r.seconds["total"], r) for r in random]
    numbers = [key for key in random_rows[0] if key != "method"]
    rows = [
        row(BEFORE, trained, 0.0),
        row(LFOCI, lfoci.model, lfoci.seconds["total"], lfoci),
        {"method": RANDOM} | {k: float(np.mean([r[k] for r in random_rows])) for k in numbers},
        row(ALL, whole.model, whole.seconds["total"], whole),
        row(RETRAINED, retrained, retrain_seconds),
        row(OTHER_START, other, other_seconds),
    ]
    spread = {k: float(np.std([r[k] for r in random_rows], ddof=1)) for k in numbers}
    print_table(rows, spread, draws)
    findings = conclude(rows, random_rows, n_wrong, lfoci.n_units)
    print("\n" + "\n".join(f"- {finding}" for finding in findings))

    record = {
        "seed": seed,
        "settings": {
            "network": [64, n_hidden, 10],
            "n_train": n_train,
            "n_wrong": n_wrong,
            "weight_decay": WEIGHT_DECAY,
            "damping": whole.damping,
            "curvature": whole.curvature,
        },
        "versions": {
            "lcodec_ext": lcodec_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "training_gradient_norm": whole.training_gradient_norm,
        "rows": rows,
        "random_standard_deviation": spread,
        "random_draws": random_rows,
        "lfoci_units": lfoci.selection.to_dict(),
        "lfoci_cumulative": lfoci.foci.cumulative.tolist(),
        "findings": findings,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "digits_deletion.json").write_text(json.dumps(record, indent=1) + "\n")
    models = {BEFORE: trained, LFOCI: lfoci.model, ALL: whole.model, RETRAINED: retrained}
    draw(rows, random_rows, models, data, output / "digits_deletion.png")
    print(f"\nWritten: {output / 'digits_deletion.png'} and {output / 'digits_deletion.json'}")
    return record


class Data:
    """Digits in [0, 1]: forget (with wrong labels) and retain, true labels of forget, and test."""

    def __init__(self, seed, n_train, n_wrong):
        pixels, labels = load_digits(return_X_y=True)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))
        x, y = torch.tensor(pixels[order] / 16), torch.tensor(labels[order])
        wrong = (y[:n_wrong] + torch.tensor(rng.integers(1, 10, n_wrong))) % 10
        self.forget, self.true = (x[:n_wrong], wrong), y[:n_wrong]
        self.retain = x[n_wrong:n_train], y[n_wrong:n_train]
        self.test = x[n_train:], y[n_train:]


def network(n_hidden, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, n_hidden), nn.Tanh(), nn.Linear(n_hidden, 10)).double()


def train(model, inputs, targets, iterations, name):
    """Minimise mean loss + (WEIGHT_DECAY / 2) |w|^2 to near stationarity, as deletion assumes."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=20,
        history_size=50,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        penalty = sum((p * p).sum() for p in model.parameters())
        loss = F.cross_entropy(model(inputs), targets) + WEIGHT_DECAY / 2 * penalty
        loss.backward()
        return loss

    begin = time.perf_counter()
    with tqdm(total=iterations, desc=name, unit="step") as bar:
        done = 0
        while done < iterations:
            loss = optimizer.step(closure).item()
            reached = optimizer.state[next(model.parameters())]["n_iter"]
            if reached == done:  # converged
                break
            bar.update(reached - done)
            bar.set_postfix_str(f"objective {loss:.5f}")
            done = reached
    optimizer.zero_grad()
    return model, time.perf_counter() - begin


@torch.no_grad()
def measure(model, retrained, data):
    def accuracy(inputs, targets):
        return (model(inputs).argmax(1) == targets).double().mean().item()

    def weights(m):
        return nn.utils.parameters_to_vector(m.parameters())

    return {
        "forget_accuracy": accuracy(*data.forget),
        "forget_true_accuracy": accuracy(data.forget[0], data.true),
        "retain_accuracy": accuracy(*data.retain),
        "test_accuracy": accuracy(*data.test),
        "forget_loss": F.cross_entropy(model(data.forget[0]), data.forget[1]).item(),
        "retain_loss": F.cross_entropy(model(data.retain[0]), data.retain[1]).item(),
        "forget_distance": output_distance(model, retrained, data.forget[0]),
        "test_distance": output_distance(model, retrained, data.test[0]),
        "weight_distance": (weights(model) - weights(retrained)).norm().item(),
    }


def output_distance(model, other, inputs):
    """Mean Jensen-Shannon distance (base 2, 0 to 1) of the predicted distributions."""
    p, q = model(inputs).softmax(1), other(inputs).softmax(1)
    middle = (p + q) / 2
    divergence = torch.special.entr(middle) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return (divergence.sum(1) / np.log(2)).clamp(min=0).sqrt().mean().item()


def print_table(rows, spread, draws):
    columns = [
        ("units", "units", ".0f"),
        ("param.", "parameters", ".0f"),
        ("wrong", "forget_accuracy", ".1%"),
        ("true", "forget_true_accuracy", ".1%"),
        ("retain", "retain_accuracy", ".1%"),
        ("test", "test_accuracy", ".1%"),
        ("forget", "forget_loss", ".3f"),
        ("retain", "retain_loss", ".4f"),
        ("forget", "forget_distance", ".3f"),
        ("test", "test_distance", ".3f"),
        ("weights", "weight_distance", ".2f"),
        ("seconds", "seconds", ".2f"),
    ]
    labels = {RANDOM: f"random (mean of {draws})"}
    lines = [(labels.get(row["method"], row["method"]), row) for row in rows]
    lines.insert(3, ("  standard deviation", spread))
    print(f"{'':24}{'changed':>16}{'labels of the':>16}{'accuracy':>16}{'mean loss':>16}", end="")
    print(f"{'distance to retrained':>24}")
    print(f"{'':24}{'':16}{'deleted samples':>16}{'':16}{'':16}{'outputs':>16}")
    print(" " * 24 + "".join(f"{head:>8}" for head, _, _ in columns))
    for label, row in lines:
        print(f"{label:24}" + "".join(f"{row[key]:8{form}}" for _, key, form in columns))


def conclude(rows, random_rows, n_wrong, all_units):
    """Say in words what the numbers show."""
    by_method = {row["method"]: row for row in rows}
    before, lfoci, random, whole, again = (
        by_method[method] for method in (BEFORE, LFOCI, RANDOM, ALL, RETRAINED)
    )

    def closed(row, key):
        gap = before[key] - again[key]
        return f"{(before[key] - row[key]) / gap:.0%}" if gap > 0 else "none"

    def count(row):
        return round(row["forget_accuracy"] * n_wrong)

    nearer = sum(lfoci["forget_distance"] < row["forget_distance"] for row in random_rows)
    share = nearer / len(random_rows)
    if share >= 0.95:
        verdict = "better than chance"
    elif share <= 0.05:
        verdict = "worse than chance"
    else:
        verdict = "which chance explains"
    return [
        f"The network predicts {count(before)} of the {n_wrong} wrong labels, retrained without "
        f"them {count(again)}; test accuracy {before['test_accuracy']:.1%} and "
        f"{again['test_accuracy']:.1%}.",
        f"One step on all {all_units} units leaves {count(whole)} of them and closes "
        f"{closed(whole, 'forget_distance')} of the distance to the retrained outputs on the "
        f"deleted samples, {closed(whole, 'test_distance')} on test samples, in "
        f"{whole['seconds'] / again['seconds']:.0%} of the time of retraining.",
        f"On the {units(lfoci['units'])} that L-FOCI selects it leaves {count(lfoci)} and closes "
        f"{closed(lfoci, 'forget_distance')}, on as many random units {count(random)} and "
        f"{closed(random, 'forget_distance')} (means): nearer to retraining than {nearer} of "
        f"{len(random_rows)} random draws, {verdict}.",
    ]


def units(number):
    return f"{number} unit{'' if number == 1 else 's'}"


def draw(rows, random_rows, models, data, path):
    blue, red, grey, light = "#2166ac", "#c8452f", "#8c8c8c", "#d9d9d9"
    dark, green = "#333333", "#1b9e77"
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.0, wspace=0.06)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1), hspace=0.06)

    n_shown = 12
    top.suptitle(
        "Twelve of the deleted samples: the wrong label they had, and the predictions",
        x=0.01,
        ha="left",
    )
    grid = top.subplots(2, n_shown, height_ratios=(0.62, 1.25))
    names = ["label given", *models]
    for k in range(n_shown):
        image, cells = grid[:, k]
        image.imshow(data.forget[0][k].reshape(8, 8).numpy(), cmap="gray_r")
        image.set(xticks=[], yticks=[], anchor="S")
        given, true = int(data.forget[1][k]), int(data.true[k])
        with torch.no_grad():
            seen = [int(m(data.forget[0][k : k + 1]).argmax()) for m in models.values()]
        cells.set(xlim=(-1, 1), ylim=(len(names) - 0.5, -0.5))
        cells.axis("off")
        for line, digit in enumerate([given, *seen]):
            colour = red if digit == given else blue if digit == true else grey
            weight = "normal" if digit == given else "bold"
            cells.text(
                0, line, digit, color=colour, weight=weight, ha="center", va="center", fontsize=12
            )
    for line, name in enumerate(names):
        grid[1, 0].text(-1.6, line, name, ha="right", va="center")

    order = [row["method"] for row in rows if row["method"] != OTHER_START]
    rows = [row for row in rows if row["method"] in order]
    y = np.arange(len(rows))
    left, middle, right = bottom.subplots(1, 3, sharey=True, width_ratios=(1.25, 1.25, 1))
    wrong = np.array([row["forget_accuracy"] for row in rows])
    true = np.array([row["forget_true_accuracy"] for row in rows])
    left.barh(y, wrong, color=red, label="the wrong label")
    left.barh(y, true, left=wrong, color=blue, label="the true label")
    left.barh(y, 1 - wrong - true, left=wrong + true, color=light, label="another")
    left.set(xlim=(0, 1), title="Deleted samples predicted as")
    left.xaxis.set_major_formatter("{x:.0%}")
    for key, colour, marker, label in (
        ("forget_distance", dark, "o", "deleted samples"),
        ("test_distance", green, "s", "test samples"),
    ):
        dots(middle, rows, random_rows, key, colour, marker, label)
    middle.plot([], [], "o", color=dark, alpha=0.2, markeredgewidth=0, label="single draws")
    middle.set(xlim=(-0.03, 1), title="Distance of outputs to retraining (JS)")
    dots(right, rows, random_rows, "test_accuracy", green, "s", None)
    right.margins(x=0.08)
    right.set(title="Test accuracy")
    right.xaxis.set_major_formatter("{x:.0%}")
    masked = units(rows[1]["units"])
    left.set_yticks(y, [f"{m} ({masked})" if m in (LFOCI, RANDOM) else m for m in order])
    left.invert_yaxis()
    for axes in (middle, right):
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=3, frameon=False)
    middle.legend(loc="lower right", frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def dots(axes, rows, random_rows, key, colour, marker, label):
    """One mark for a method; faint ones for the random draws, whose mean the mark is."""
    for line, row in enumerate(rows):
        if row["method"] == RANDOM:
            axes.plot(
                [r[key] for r in random_rows],
                [line] * len(random_rows),
                marker,
                color=colour,
                alpha=0.2,
                markeredgewidth=0,
            )
    axes.plot([row[key] for row in rows], range(len(rows)), marker, color=colour, label=label)


if __name__ == "__main__":
    main()
