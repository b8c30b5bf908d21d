"""The comparison of deletions with retrained models: floors, gaps, baselines, what is refused."""

import copy
import functools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcodec_ext.evaluation import metrics
from lcodec_ext.evaluation.evaluate import Evaluation, evaluate, gap_closed
from lcodec_ext.evaluation.methods import (
    BASELINES,
    Baseline,
    fine_tune,
    gradient_ascent,
    lbfgs,
    neg_grad_plus,
)
from lcodec_ext.evaluation.report import write_report
from lcodec_ext.unlearning import unlearn

DOUBLE = torch.float64
DECAY = 0.01


def mlp(seed=0, width=6, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
        ).double()


def data(n=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=DOUBLE, generator=generator)
    return x, (x @ torch.randn(4, 3, dtype=DOUBLE, generator=generator)).argmax(1)


X, Y = data()
Y[:10] = (Y[:10] + 1) % 3  # mislabelled
FORGET, RETAIN, TEST = (X[:10], Y[:10]), (X[10:60], Y[10:60]), (X[60:], Y[60:])
SETS = (FORGET, RETAIN, TEST)
QUICK = {"relearn": False, "weight_decay": DECAY}


def train(seed=0, sets=(RETAIN,), steps=60, model=None):
    x, y = (torch.cat(each) for each in zip(*sets, strict=True))
    model = mlp(seed) if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


MODEL = train(0, (FORGET, RETAIN))
RETRAINED = [train(seed) for seed in (0, 1, 2)]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------------------------
# Floor and gap

distances = st.integers(0, 10**10).map(lambda k: k / 1e9)


@given(distances, distances, distances)
def test_gap_closed(distance, original, floor):
    closed = gap_closed(distance, original, floor)
    if original <= floor:
        assert closed is None
        return
    assert gap_closed(original, original, floor) == 0.0
    assert gap_closed(floor, original, floor) == 1.0
    assert (closed > 1) <= (distance < floor)
    assert (closed < 0) <= (distance > original)
    # what is left of the gap, put back, is the distance
    back = floor + (1 - closed) * (original - floor)
    assert math.isclose(back, distance, rel_tol=1e-6, abs_tol=1e-6)


def test_gap_closed_of_nothing():
    assert gap_closed(None, 1.0, 0.0) is gap_closed(1.0, None, 0.0) is None
    assert gap_closed(1.0, 1.0, None) is gap_closed(0.5, 0.2, 0.2) is None
    assert gap_closed(0.3, 0.5, 0.1) == pytest.approx(0.5)
    assert gap_closed(0.7, 0.5, 0.1) == pytest.approx(-0.5)  # not clipped


def pairs(function):
    """Mean of function over the ordered pairs of retrained models."""
    values = [function(a, b) for a in RETRAINED for b in RETRAINED if a is not b]
    return float(np.mean(values))


def test_numbers_by_hand():
    tuned = fine_tune(MODEL, *SETS[:2], F.cross_entropy, weight_decay=DECAY)
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods={"tuned": tuned}, **QUICK
    )
    assert [m.name for m in found.methods] == ["no-op", "retrained", "tuned"]
    assert (found.n_forget, found.n_retain, found.n_test, found.n_retrained) == (10, 50, 30, 3)
    measures = {
        "js_forget": lambda a, b: metrics.js_distance(a, b, FORGET),
        "js_test": lambda a, b: metrics.js_distance(a, b, TEST),
        "activation_forget": lambda a, b: metrics.activation_distance(a, b, FORGET),
        "activation_test": lambda a, b: metrics.activation_distance(a, b, TEST),
        "weight_distance": metrics.weight_distance,
    }
    for name, measure in measures.items():
        floor = pairs(measure)
        assert found.floor[name] == pytest.approx(floor), name
        assert found["retrained"].metrics[name] == pytest.approx(floor), name
        d, original = (np.mean([measure(m, r) for r in RETRAINED]) for m in (tuned, MODEL))
        assert found["tuned"].metrics[name] == pytest.approx(d), name
        assert found["no-op"].metrics[name] == pytest.approx(original), name
        expected = gap_closed(d, original, floor)
        assert found["tuned"].gap_closed[name] == pytest.approx(expected), name
    scalars = {
        "accuracy_forget": lambda m: metrics.accuracy(m, FORGET, F.cross_entropy),
        "accuracy_test": lambda m: metrics.accuracy(m, TEST, F.cross_entropy),
        "loss_forget": lambda m: metrics.sample_losses(m, FORGET, F.cross_entropy).mean().item(),
        "loss_retain": lambda m: metrics.sample_losses(m, RETAIN, F.cross_entropy).mean().item(),
        "mia_auc": lambda m: metrics.membership_inference(m, *SETS, F.cross_entropy).auc,
        "mia_tpr": lambda m: metrics.membership_inference(m, *SETS, F.cross_entropy).tpr,
        "mia_accuracy": lambda m: metrics.membership_inference(m, *SETS, F.cross_entropy).accuracy,
    }
    for name, measure in scalars.items():
        values = [measure(r) for r in RETRAINED]
        floor = pairs(lambda a, b, measure=measure: abs(measure(a) - measure(b)))
        assert found.floor[name] == pytest.approx(floor), name
        assert found["retrained"].metrics[name] == pytest.approx(np.mean(values)), name
        assert found["retrained"].spread[name] == pytest.approx(np.std(values, ddof=1)), name
        assert found["tuned"].metrics[name] == pytest.approx(measure(tuned)), name
        d, original = (np.mean([abs(measure(m) - v) for v in values]) for m in (tuned, MODEL))
        expected = gap_closed(d, original, floor)
        assert found["tuned"].gap_closed[name] == (
            None if expected is None else pytest.approx(expected)
        ), name
    accuracies = [
        [metrics.accuracy(m, part, F.cross_entropy) for part in SETS] for m in (tuned, *RETRAINED)
    ]
    tow = np.mean([np.prod(1 - np.abs(np.subtract(accuracies[0], a))) for a in accuracies[1:]])
    assert found["tuned"].metrics["tow"] == pytest.approx(tow)
    assert "tow" not in found["tuned"].gap_closed
    norm = metrics.gradient_norm(tuned, RETAIN, F.cross_entropy, weight_decay=DECAY)
    assert found["tuned"].metrics["gradient_norm"] == pytest.approx(norm)
    relative = np.mean([metrics.weight_distance(tuned, r, relative=True) for r in RETRAINED])
    assert found["tuned"].metrics["weight_distance_relative"] == pytest.approx(relative)
    expected = metrics.sample_losses(tuned, FORGET, F.cross_entropy).tolist()
    assert found["tuned"].losses["forget"] == pytest.approx(expected)
    assert len(found["tuned"].losses["test"]) == 30


def test_retraining_that_does_not_use_its_seed_is_pointed_out():
    seeds = []

    def retrain(seed):
        seeds.append(seed)
        return RETRAINED[0]

    with pytest.warns(UserWarning, match=r"retrained\(5\) and retrained\(6\) have equal") as caught:
        evaluate(MODEL, *SETS, F.cross_entropy, retrained=retrain, methods={}, seed=5, **QUICK)
    assert caught[0].filename == __file__
    assert seeds == [5, 6, 7]


def test_retrained_models_in_a_module_list():
    options = {"methods": {"same": MODEL}, **QUICK}
    listed, given = (
        evaluate(MODEL, *SETS, F.cross_entropy, retrained=models, **options)
        for models in (RETRAINED, nn.ModuleList(RETRAINED))
    )
    assert given["same"].metrics == listed["same"].metrics
    assert given.n_retrained == len(RETRAINED)


def test_original_is_0_and_retrained_is_1():
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods={"same": MODEL}, **QUICK
    )
    for name, floor in found.floor.items():
        gap = name != "relearn_steps" and found["no-op"].gap_closed[name] is not None
        assert found["no-op"].gap_closed[name] == (0.0 if gap else None)
        assert found["retrained"].gap_closed[name] == (1.0 if gap else None)
        assert found["same"].gap_closed[name] == found["no-op"].gap_closed[name]
        assert floor is None or floor >= 0
    assert found["no-op"].gap_closed["js_forget"] == 0.0
    assert found["no-op"].gap_closed["loss_forget"] == 0.0
    # On average over fresh retrained models the gap that is closed is 1: leave each one out.
    closed = []
    for k, left_out in enumerate(RETRAINED):
        others = [r for j, r in enumerate(RETRAINED) if j != k]
        d = np.mean([metrics.js_distance(left_out, r, FORGET) for r in others])
        original = found["no-op"].metrics["js_forget"]
        closed.append(gap_closed(float(d), original, found.floor["js_forget"]))
    assert np.mean(closed) == pytest.approx(1.0)


def test_a_model_within_the_floor_has_no_gap():
    found = evaluate(
        train(7), *SETS, F.cross_entropy, retrained=RETRAINED, methods={"tuned": MODEL}, **QUICK
    )
    found_same = evaluate(
        RETRAINED[0], *SETS, F.cross_entropy, retrained=RETRAINED, methods={}, **QUICK
    )
    assert set(found_same["no-op"].gap_closed.values()) == {None}
    assert "No gap in JS" in repr(found), "1.1 times the floor: chance takes a model that far"
    told = repr(found_same).splitlines()[-3:]
    raw, floor = found_same["no-op"].metrics["js_forget"], found_same.floor["js_forget"]
    assert told[0] == (
        f"No gap in JS to close: the original is {raw:.3f} from the retrained models, which are "
        f"{floor:.3f} from each other (the floor)."
    )
    assert told[1].split() == ["no-op", "JS", f"{raw:.3f},", "floor", f"{raw - floor:+.3f}"]
    assert told[2].split() == ["retrained", "JS", f"{floor:.3f},", "floor", "+0.000"]
    assert found["tuned"].metrics["js_forget"] > found.floor["js_forget"]


def test_a_gap_is_clearer_than_chance():
    """No method gets "511%" because the original is a hair beyond the floor."""
    rng = np.random.default_rng(0)
    for seed in range(7, 13):
        found = evaluate(
            train(seed),
            *SETS,
            F.cross_entropy,
            retrained=RETRAINED,
            methods={"other": train(seed + 10), "noise": noisy(rng)},
            **QUICK,
        )
        for method in found.methods:
            closed = [gap for gap in method.gap_closed.values() if gap is not None]
            assert all(gap <= 5 for gap in closed)
        for name, gap in found["no-op"].gap_closed.items():
            d, floor = found["no-op"].metrics.get(name), found.floor[name]
            if gap is not None and name in metrics.DISTANCES:
                assert d > 1.25 * floor


def noisy(rng):
    model = copy.deepcopy(RETRAINED[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.from_numpy(rng.normal(size=parameter.shape))
    return model


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_retrained_models(n, tmp_path):
    """What can be said is said, and no gap is."""
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED[:n], methods={"same": MODEL}, **QUICK
    )
    full = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods={"same": MODEL}, **QUICK
    )
    names = ["no-op", "retrained", "same"] if n else ["no-op", "same"]
    assert [method.name for method in found.methods] == names
    assert found.n_retrained == n
    for method in found.methods:
        assert set(method.gap_closed.values()) == {None}
    for name in ("accuracy_test", "loss_forget", "mia_auc", "gradient_norm"):
        assert found["same"].metrics[name] == full["same"].metrics[name]
    js = [metrics.js_distance(MODEL, other, FORGET) for other in RETRAINED[:n]]
    expected = pytest.approx(np.mean(js)) if n else None
    assert found["no-op"].metrics["js_forget"] == expected
    floor = metrics.js_distance(*RETRAINED[:2], FORGET) if n == 2 else None
    assert found.floor["js_forget"] == (None if floor is None else pytest.approx(floor))
    if n:
        assert found["retrained"].metrics["loss_forget"] is not None
        assert (found["retrained"].spread["loss_forget"] is None) == (n == 1)
    text = repr(found)
    assert "closed" not in text
    assert ("JS" in text.splitlines()[1]) == bool(n)
    assert "give at least 3 of them" in text
    assert f"{n} retrained model{'' if n == 1 else 's'}\n" in text
    assert Evaluation.from_dict(found.to_dict()).methods == found.methods
    write_report(tmp_path / "report", evaluation=found, figures=False)
    report = (tmp_path / "report" / "report.md").read_text()
    assert "losed" not in report
    assert "give at least 3 of them" in report
    assert (report.count("retrained") > 2) == bool(n)


def test_no_retrained_models_by_default():
    found = evaluate(MODEL, *SETS, F.cross_entropy, methods={"same": MODEL})
    assert found.n_retrained == 0
    assert found["same"].metrics["relearn_steps"] == found["no-op"].metrics["relearn_steps"]
    repr(found)


# ---------------------------------------------------------------------------------------------
# Methods of every kind


def test_methods_of_every_kind():
    seen = []

    def by_hand(model, forget, retain, loss_fn, seed):
        seen.append((model is MODEL, forget is FORGET, retain is RETAIN, loss_fn, seed))
        with torch.no_grad():
            model[0].weight.zero_()  # of a copy
        return model

    def by_unlearn(model, forget, retain, loss_fn, seed):
        return unlearn(model, forget, retain, loss_fn, weight_decay=DECAY, seed=seed)

    result = unlearn(MODEL, FORGET, RETAIN, F.cross_entropy, weight_decay=DECAY)
    before = state(MODEL)
    found = evaluate(
        MODEL,
        *SETS,
        F.cross_entropy,
        retrained=RETRAINED,
        methods={
            "model": RETRAINED[0],
            "result": result,
            "options": {"selection": "random", "n_units": 3},
            "baseline": Baseline(fine_tune, {"epochs": 1}),
            "partial": Baseline(functools.partial(fine_tune, epochs=1)),
            "function": by_hand,
            "function of unlearn": by_unlearn,
        },
        seed=3,
        **QUICK,
    )
    assert same(MODEL, before)
    assert seen == [(False, True, True, F.cross_entropy, 3)]
    assert found["model"].seconds is None
    assert found["no-op"].seconds == 0.0
    assert found["result"].seconds == result.seconds["total"]
    assert found["function"].seconds > 0
    for name in ("result", "options", "function of unlearn"):
        assert found[name].phases
        assert "total" not in found[name].phases
        assert found.settings["methods"][name]["weight_decay"] == DECAY
        assert not found[name].skipped
    assert found["result"].units_per_layer == {"0": [6, 6], "3": [3, 3]}
    counts = found["options"].units_per_layer
    assert counts.keys() == {"0", "3"}
    assert sum(selected for selected, _ in counts.values()) == 3
    assert found.settings["methods"]["options"]["seed"] == 3
    assert found.settings["methods"]["baseline"] == {
        "baseline": "fine_tune",
        "weight_decay": DECAY,
        "epochs": 1,
    }
    assert "fine_tune" in found.settings["methods"]["partial"]["baseline"]
    assert found["partial"].metrics["js_test"] == found["baseline"].metrics["js_test"]
    for name in ("model", "baseline", "partial", "function"):
        assert found[name].phases is found[name].units_per_layer is None
    expected = fine_tune(MODEL, *SETS[:2], F.cross_entropy, 3, weight_decay=DECAY, epochs=1)
    assert found["baseline"].metrics["js_test"] == pytest.approx(
        np.mean([metrics.js_distance(expected, r, TEST) for r in RETRAINED])
    )


def test_a_step_that_was_taken_back_is_skipped():
    with pytest.warns(UserWarning, match="was taken back"):
        found = evaluate(
            MODEL,
            *SETS,
            F.cross_entropy,
            retrained=RETRAINED,
            methods={
                "much": {
                    "update": "gradient",
                    "learning_rate": 1e4,
                    "max_drop": 0.0,
                    "halvings": 0,
                    "repair_epochs": 0,
                }
            },
            **QUICK,
        )
    assert found["much"].skipped
    assert found["much"].metrics["loss_forget"] == found["no-op"].metrics["loss_forget"]
    assert "taken back" in repr(found)


def test_retraining_is_timed_and_seeded():
    seeds = []

    def retrain(seed):
        seeds.append(seed)
        assert torch.initial_seed() == seed
        return train(seed, steps=10)

    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=retrain, n_retrain=4, seed=5, methods={}, **QUICK
    )
    assert seeds == [5, 6, 7, 8] == found.settings["retrained_seeds"]
    assert found["retrained"].seconds > 0
    assert found.n_retrained == 4


def test_relearning_takes_longer_the_more_was_forgotten():
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods={}, weight_decay=DECAY
    )
    assert found["no-op"].metrics["relearn_steps"] == 0.0
    assert found["no-op"].metrics["relearn_reached"] == 1.0
    steps = found["retrained"].metrics["relearn_steps"]
    assert steps > 10
    options = found.settings["relearn"]
    losses = [found[name].metrics["loss_forget"] for name in ("no-op", "retrained")]
    assert options["level"] == pytest.approx(losses[0] + 0.05 * (losses[1] - losses[0]), rel=1e-5)
    each = [
        metrics.relearn_time(r, FORGET, F.cross_entropy, options["level"]).steps for r in RETRAINED
    ]
    assert steps == pytest.approx(np.mean(each))


def test_failures_are_recorded_and_the_others_go_on():
    def broken(model, forget, retain, loss_fn, seed):
        raise RuntimeError("no luck")

    def diverged(model, forget, retain, loss_fn, seed):
        nn.init.constant_(model[3].bias, torch.nan)
        return model

    def nothing(model, forget, retain, loss_fn, seed):
        pass

    with pytest.warns(UserWarning, match="method .* failed") as caught:
        found = evaluate(
            MODEL,
            *SETS,
            F.cross_entropy,
            retrained=RETRAINED,
            methods={"a": broken, "b": diverged, "c": nothing, "d": MODEL},
            **QUICK,
        )
    assert len(caught) == 3
    assert found["a"].error == "RuntimeError: no luck"
    assert "outputs of the model hold NaN" in found["b"].error
    assert "must return a model or an UnlearnResult; got NoneType" in found["c"].error
    assert set(found["a"].metrics.values()) == {None} == set(found["a"].gap_closed.values())
    assert found["a"].metrics.keys() == found["d"].metrics.keys()
    assert found["d"].error is None
    assert "no luck" in repr(found)


# ---------------------------------------------------------------------------------------------
# What comes out


def test_json_round_trip():
    found = evaluate(
        MODEL,
        *SETS,
        F.cross_entropy,
        retrained=RETRAINED,
        methods={"options": {"selection": "random", "n_units": 3}, "tuned": Baseline(lbfgs)},
        weight_decay=DECAY,
    )
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(values) == found
    assert values["format"] == 1
    expected = {
        f"{what}_{where}" for what in ("accuracy", "loss") for where in ("forget", "retain", "test")
    }
    expected |= {"mia_auc", "js_forget", "js_test", "activation_forget", "weight_distance"}
    expected |= {"gradient_norm", "relearn_steps", "relearn_seconds"}
    for method in values["methods"]:
        assert expected <= method["metrics"].keys()
        assert ("spread" in method) == (method["name"] == "retrained")
    with pytest.raises(ValueError, match="of format 1; got format 2"):
        Evaluation.from_dict({**values, "format": 2})
    with pytest.raises(KeyError, match="no method 'x'; there are 'no-op', 'retrained', 'options'"):
        found["x"]
    lines = repr(found).splitlines()
    assert lines[0].startswith("Evaluation: 10 samples removed, 50 retained, 30 for the test; 3")
    assert [line.split()[0] for line in lines[3:]] == ["no-op", "retrained", "options", "tuned"]


def test_frame_has_a_row_for_each_method():
    found = evaluate(
        MODEL,
        *SETS,
        F.cross_entropy,
        retrained=RETRAINED,
        methods={"options": {"selection": "gradient", "n_units": 3}},
        **QUICK,
    )
    frame = found.to_frame()
    assert list(frame.index) == ["no-op", "retrained", "options"]
    for method in found.methods:
        row = frame.loc[method.name]
        for name, value in method.metrics.items():
            assert row[name] == value or (value is None and np.isnan(row[name]))
    options = found["options"]
    row = frame.loc["options"]
    assert row["gap_closed_js_forget"] == options.gap_closed["js_forget"]
    assert (row["units"], row["units_of"]) == (3, 9)
    assert row["seconds_solve"] == options.phases["solve"]
    assert frame.loc["retrained", "spread_loss_test"] == found["retrained"].spread["loss_test"]


def test_frame_needs_pandas(monkeypatch):
    found = evaluate(MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods={}, **QUICK)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas: pip install 'lcodec_ext\[eval"):
        found.to_frame()


def test_scikit_learn_is_missed_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="evaluate, needs scikit-learn"):
        evaluate(MODEL, *SETS, F.cross_entropy, retrained=never)


def test_at_most_1000_losses_are_kept():
    x, y = data(2500, seed=1)
    found = evaluate(
        MODEL, FORGET, RETAIN, (x, y), F.cross_entropy, retrained=RETRAINED, methods={}, **QUICK
    )
    kept = found["no-op"].losses["test"]
    every = metrics.sample_losses(MODEL, (x, y), F.cross_entropy)
    assert len(kept) == 1000
    assert set(kept) <= set(every.tolist())


class TwoHeads(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.body, self.value = mlp(seed), nn.Linear(4, 1).double()

    def forward(self, x):
        return self.body(x), self.value(x)[:, 0]


def test_two_outputs_with_a_composite_loss():
    def loss_fn(outputs, targets):
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    def score(outputs, targets):
        return outputs[0].argmax(1) == targets[0]

    sets = [(x, (y, x.sum(1))) for x, y in SETS]
    models = [TwoHeads(seed) for seed in range(4)]
    found = evaluate(
        models[0],
        *sets,
        loss_fn,
        retrained=models[1:],
        methods=["L-BFGS", "fine-tune Adam"],
        score=score,
        **QUICK,
    )
    for method in found.methods:
        assert method.metrics["js_forget"] is method.metrics["activation_test"] is None
        assert method.gap_closed["js_forget"] is None
        assert 0 <= method.metrics["accuracy_test"] <= 1
        assert method.metrics["mia_auc"] is not None
    assert found["L-BFGS"].metrics["loss_retain"] < found["no-op"].metrics["loss_retain"]
    repr(found)


def test_datasets_and_loaders_give_the_same():
    def run(wrap):
        return evaluate(
            MODEL,
            *map(wrap, SETS),
            F.cross_entropy,
            retrained=RETRAINED,
            methods=["fine-tune SGD", "NegGrad+"],
            batch_size=16,
            **QUICK,
        )

    plain = run(lambda pair: pair)
    for wrap in (
        lambda pair: TensorDataset(*pair),
        lambda pair: DataLoader(TensorDataset(*pair), batch_size=7, shuffle=True),
    ):
        other = run(wrap)
        for a, b in zip(plain.methods, other.methods, strict=True):
            assert a.metrics == pytest.approx(b.metrics)


class TextOutput(dict):
    """As transformers return it."""

    @property
    def logits(self):
        return self["logits"]


class TextModel(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.table, self.body = nn.Embedding(20, 4), mlp(seed).float()

    def forward(self, input_ids, attention_mask):
        words = self.table(input_ids) * attention_mask[..., None]
        return TextOutput(logits=self.body(words.mean(1)))


def test_text_models_with_dicts():
    ids = torch.randint(20, (60, 5), generator=torch.Generator().manual_seed(0))
    mask, labels = (ids > 3).long(), ids[:, 0] % 3
    sets = [
        {"input_ids": ids[a:b], "attention_mask": mask[a:b], "labels": labels[a:b]}
        for a, b in ((0, 8), (8, 40), (40, 60))
    ]
    models = [TextModel(seed) for seed in range(4)]
    found = evaluate(
        models[0],
        *sets,
        F.cross_entropy,
        retrained=models[1:],
        methods=["recommended", "fine-tune Adam", "gradient ascent", "NegGrad+", "L-BFGS"],
        **QUICK,
    )
    outputs = models[0](ids[40:], mask[40:]).logits.argmax(1)
    expected = (outputs == labels[40:]).double().mean().item()
    assert found["no-op"].metrics["accuracy_test"] == pytest.approx(expected)
    assert all(m.error is None and m.metrics["js_test"] is not None for m in found.methods)


def test_models_and_random_numbers_are_left_as_they_were():
    model = copy.deepcopy(MODEL).train()
    model[3].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, random = state(model), torch.get_rng_state()
    first, second = (
        evaluate(
            model,
            *SETS,
            F.cross_entropy,
            retrained=lambda seed: train(seed, steps=5, model=mlp(seed, dropout=0.5)),
            methods=["fine-tune SGD", "gradient ascent", "L-BFGS"],
            **QUICK,
        )
        for _ in range(2)
    )
    assert same(model, before)
    assert [m.training for m in model] == [True, True, True, False]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip(first.methods, second.methods, strict=True):
        assert a.metrics == b.metrics


# ---------------------------------------------------------------------------------------------
# Baselines


def objective(model, sets=RETAIN):
    penalty = sum(p.square().sum() for p in model.parameters()).item()
    return F.cross_entropy(model(sets[0]), sets[1]).item() + DECAY / 2 * penalty


@pytest.mark.parametrize("baseline", [fine_tune, gradient_ascent, neg_grad_plus, lbfgs])
def test_baselines_return_a_new_model_and_repeat(baseline):
    model = mlp(dropout=0.5).train()
    model[1].eval()
    before, random = state(model), torch.get_rng_state()
    run = [
        baseline(model, FORGET, RETAIN, F.cross_entropy, seed, weight_decay=DECAY, batch_size=16)
        for seed in (1, 1, 2)
    ]
    assert same(model, before)
    assert same(run[0], state(run[1]))
    assert not same(run[0], before)
    assert same(run[0], state(run[2])) == (baseline is lbfgs)  # of all samples: nothing is random
    assert [m.training for m in run[0]] == [m.training for m in model]
    assert all(p.grad is None for p in [*model.parameters(), *run[0].parameters()])
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        again = baseline(
            model, FORGET, RETAIN, F.cross_entropy, 1, weight_decay=DECAY, batch_size=16
        )
    assert same(again, state(run[0]))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_fine_tuning_lowers_the_retained_objective(optimizer):
    tuned = fine_tune(
        MODEL,
        None,
        RETAIN,
        F.cross_entropy,
        optimizer=optimizer,
        weight_decay=DECAY,
        epochs=20,
        batch_size=25,
    )
    assert objective(tuned) < objective(MODEL)
    loss = [F.cross_entropy(m(FORGET[0]), FORGET[1]).item() for m in (MODEL, tuned)]
    assert loss[1] > loss[0]


def test_one_epoch_of_sgd_by_hand():
    tuned = fine_tune(
        MODEL, None, RETAIN, F.cross_entropy, 4, weight_decay=DECAY, epochs=1, batch_size=20
    )
    expected = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01, momentum=0.9, weight_decay=DECAY)
    order = np.random.default_rng(4).permutation(50)
    for start in (0, 20):  # the last 10 do not fill a batch
        some = torch.as_tensor(order[start : start + 20])
        optimizer.zero_grad()
        F.cross_entropy(expected(RETAIN[0][some]), RETAIN[1][some]).backward()
        optimizer.step()
    for a, b in zip(tuned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_batches_larger_than_the_data_take_all():
    options = {"weight_decay": DECAY, "epochs": 1, "learning_rate": 0.1}
    tuned = fine_tune(MODEL, None, RETAIN, F.cross_entropy, batch_size=1000, **options)
    expected = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=DECAY)
    F.cross_entropy(expected(RETAIN[0]), RETAIN[1]).backward()
    optimizer.step()
    for a, b in zip(tuned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_lbfgs_minimises_the_retained_objective():
    convex = nn.Linear(4, 3).double()
    found = lbfgs(convex, None, RETAIN, F.cross_entropy, weight_decay=DECAY, iterations=100)
    assert metrics.gradient_norm(found, RETAIN, F.cross_entropy, weight_decay=DECAY) < 1e-7
    # batches bound the memory only
    few = [
        lbfgs(MODEL, None, RETAIN, F.cross_entropy, weight_decay=DECAY, batch_size=size)
        for size in (7, 256)
    ]
    assert objective(few[0]) == pytest.approx(objective(few[1]), rel=1e-6)
    assert objective(few[0]) < objective(MODEL) - 0.01
    some = lbfgs(MODEL, None, RETAIN, F.cross_entropy, 1, weight_decay=DECAY, n_samples=20)
    other = lbfgs(MODEL, None, RETAIN, F.cross_entropy, 2, weight_decay=DECAY, n_samples=20)
    assert objective(few[0]) < objective(some) != objective(other)
    none = lbfgs(MODEL, None, RETAIN, F.cross_entropy, iterations=0)
    assert same(none, state(MODEL))


def test_gradient_ascent_stops_before_it_harms():
    def losses(model):
        return [F.cross_entropy(model(x), y).item() for x, y in (FORGET, RETAIN)]

    slow = gradient_ascent(MODEL, *SETS[:2], F.cross_entropy)
    assert losses(slow)[0] > losses(MODEL)[0]
    fast = gradient_ascent(MODEL, *SETS[:2], F.cross_entropy, learning_rate=0.3, epochs=200)
    limit = 1.5 * losses(MODEL)[1] + 0.05
    assert losses(MODEL)[1] < losses(fast)[1] <= limit
    # the next step would have passed the limit
    step = copy.deepcopy(fast)
    optimizer = torch.optim.SGD(step.parameters(), lr=0.3, maximize=True)
    F.cross_entropy(step(FORGET[0]), FORGET[1]).backward()
    optimizer.step()
    assert losses(step)[1] > limit
    # at once: nothing is left of the step
    mad = gradient_ascent(MODEL, *SETS[:2], F.cross_entropy, learning_rate=1e300)
    assert same(mad, state(MODEL))


def test_neg_grad_plus_weighs_the_two_losses():
    options = {"weight_decay": DECAY, "epochs": 1, "batch_size": 1000, "learning_rate": 0.1}
    tuned = neg_grad_plus(MODEL, *SETS[:2], F.cross_entropy, retain_weight=0.7, **options)
    expected = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=DECAY)
    down, up = (F.cross_entropy(expected(x), y) for x, y in (RETAIN, FORGET))
    (0.7 * down - 0.3 * up).backward()
    optimizer.step()
    for a, b in zip(tuned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    only = neg_grad_plus(MODEL, *SETS[:2], F.cross_entropy, retain_weight=1.0, **options)
    plain = fine_tune(MODEL, *SETS[:2], F.cross_entropy, **options)
    assert same(only, state(plain))
    # many retained batches for each one of the removed
    neg_grad_plus(MODEL, *SETS[:2], F.cross_entropy, epochs=3, batch_size=8)


@pytest.mark.parametrize(
    ("baseline", "options", "message"),
    [
        (fine_tune, {"optimizer": "rmsprop"}, "optimizer must be one of 'sgd', 'adam'"),
        (fine_tune, {"epochs": -1}, "epochs must be an integer >= 0"),
        (fine_tune, {"learning_rate": -1.0}, "learning_rate must be"),
        (gradient_ascent, {"batch_size": 0}, "batch_size must be an integer >= 1"),
        (neg_grad_plus, {"retain_weight": 1.5}, "retain_weight must be between 0 and 1; got 1.5"),
        (lbfgs, {"n_samples": 0}, "n_samples must be an integer >= 1"),
        (lbfgs, {"weight_decay": -0.1}, "weight_decay must be"),
    ],
)
def test_baselines_check_their_options(baseline, options, message):
    with pytest.raises(ValueError, match=message):
        baseline(MODEL, FORGET, RETAIN, F.cross_entropy, **options)


# ---------------------------------------------------------------------------------------------
# Refusals, before anything is trained


def never(seed):
    raise AssertionError("trained")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"retrained": MODEL}, TypeError, "retrained must be a list.*Sequential"),
        (
            {"retrained": [RETRAINED[0], RETRAINED[1], RETRAINED[0]]},
            ValueError,
            r"retrained\[0\] and retrained\[2\] are the same model",
        ),
        (
            {"retrained": [*RETRAINED, copy.deepcopy(RETRAINED[1])]},
            ValueError,
            r"retrained\[1\] and retrained\[3\] have equal weights",
        ),
        ({"retrained": lambda: MODEL}, TypeError, r"retrained is called with a seed"),
        ({"retrained": 3}, TypeError, "retrained must be a list of models.*of type int"),
        ({"retrained": [*RETRAINED, None]}, TypeError, "retrained must give models.*NoneType"),
        ({"n_retrain": 0}, ValueError, "n_retrain must be an integer >= 1; got 0"),
        (
            {"methods": ["SISA"]},
            ValueError,
            "names of BASELINES or LITERATURE .*'L-BFGS'.*; got 'SISA'",
        ),
        ({"methods": "L-BFGS"}, TypeError, "methods must be a mapping"),
        ({"methods": {"no-op": MODEL}}, ValueError, "names of methods must be strings other"),
        ({"methods": {"x": 3}}, TypeError, "method 'x' must be a model.*of type int"),
        ({"methods": {"x": {"dampig": 1}}}, TypeError, "method 'x': .*is it 'damping'"),
        ({"methods": {"x": {"damping": -1}}}, ValueError, "method 'x': damping must be"),
        ({"methods": {"x": {"preset": "best"}}}, ValueError, "method 'x': preset must be one of"),
        ({"methods": {"x": {"inplace": True}}}, ValueError, "method 'x' must not have inplace"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be"),
        ({"seed": None}, TypeError, "seed must be"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"relearn": 1}, TypeError, "relearn must be True or False"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        evaluate(MODEL, *SETS, F.cross_entropy, **{"retrained": never, **options})


def test_samples_and_loss_are_checked():
    with pytest.raises(TypeError, match="loss_fn must be callable .* got an object of type str"):
        evaluate(MODEL, *SETS, "cross_entropy", retrained=never)
    few = (TEST[0][:3], TEST[1][:3])
    with pytest.raises(ValueError, match="test must have at least 4 samples"):
        evaluate(MODEL, FORGET, RETAIN, few, F.cross_entropy, retrained=never)
    with pytest.raises(TypeError, match="test must be a pair"):
        evaluate(MODEL, FORGET, RETAIN, None, F.cross_entropy, retrained=never)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        evaluate(None, *SETS, F.cross_entropy, retrained=never)


# ---------------------------------------------------------------------------------------------
# All in one call


@pytest.mark.filterwarnings("ignore:the step raised the mean loss")  # the paper's preset
def test_all_baselines_in_one_call():
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, weight_decay=DECAY, batch_size=32
    )
    assert [m.name for m in found.methods] == ["no-op", "retrained", *BASELINES]
    for method in found.methods:
        assert method.error is None
        assert 0 <= method.metrics["js_forget"] <= 1
        assert method.metrics["relearn_steps"] >= 0
    share = found["random units"].units_per_layer
    assert 0 < sum(n for n, _ in share.values()) < sum(of for _, of in share.values())
    assert found["recommended"].gap_closed["js_forget"] > 0.3
    assert found["L-BFGS"].gap_closed["js_forget"] > 0.3


def test_the_names_of_the_methods_are_documented():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.partition("\n## Methods")[2].partition("\n### ")[0]
    assert re.findall(r'^\| `"(.+?)"` \|', section, re.MULTILINE) == list(BASELINES)
