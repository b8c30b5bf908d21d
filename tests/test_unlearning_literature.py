"""Methods of deletion from the literature, by their definitions, and the search for settings."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcodec_ext._torch.batches import Batch
from lcodec_ext.evaluation import LITERATURE, Baseline, evaluate, metrics, tune
from lcodec_ext.evaluation import literature as lit
from lcodec_ext.evaluation.methods import fine_tune, lbfgs
from lcodec_ext.evaluation.training import count, start_again, take
from lcodec_ext.evaluation.tune import GRIDS
from test_unlearning_evaluation import (
    DECAY,
    DOUBLE,
    FORGET,
    MODEL,
    QUICK,
    RETAIN,
    RETRAINED,
    SETS,
    mlp,
    same,
    state,
    train,
)

ONE_CLASS, OTHERS = (
    tuple(part[mask] for part in RETAIN) for mask in (RETAIN[1] == 0, RETAIN[1] != 0)
)
METHODS = [method.run for method in LITERATURE.values()]


def small(method):
    return {} if method is lit.selective_dampening else {"batch_size": 16}


def loss(model, sets):
    return F.cross_entropy(model(sets[0]), sets[1]).item()


@pytest.mark.parametrize("method", METHODS)
def test_methods_return_a_new_model_and_repeat(method):
    model = mlp(dropout=0.5).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    before, random = state(model), torch.get_rng_state()
    options = {"weight_decay": DECAY, **small(method)}
    if method is lit.selective_dampening:
        options["alpha"] = 1.0
    run = [method(model, FORGET, RETAIN, F.cross_entropy, seed, **options) for seed in (1, 1, 2)]
    assert same(model, before)
    assert same(run[0], state(run[1]))
    assert not same(run[0], before)
    assert torch.equal(run[0][0].bias, before["0.bias"]) or method in (lit.eu_k,)
    if method is not lit.selective_dampening:  # all samples: nothing is random
        assert not same(run[0], state(run[2]))
    assert [m.training for m in run[0].modules()] == [m.training for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in run[0].parameters()] == trained
    assert all(p.grad is None for p in [*model.parameters(), *run[0].parameters()])
    assert torch.equal(torch.get_rng_state(), random)
    with torch.inference_mode():
        again = method(model, FORGET, RETAIN, F.cross_entropy, 1, **options)
    assert same(again, state(run[0]))


@pytest.mark.parametrize("method", [m for m in METHODS if m is not lit.selective_dampening])
def test_without_epochs_nothing_is_trained(method):
    made = method(MODEL, FORGET, RETAIN, F.cross_entropy, epochs=0)
    if method is lit.eu_k:
        assert not same(made, state(MODEL))
    else:
        assert same(made, state(MODEL))


def test_scrub_disobeys_on_the_removed_samples_only():
    made = lit.scrub(
        MODEL,
        FORGET,
        RETAIN,
        F.cross_entropy,
        ascents=10,
        epochs=10,
        learning_rate=3e-3,
        batch_size=16,
    )
    far, near = (metrics.js_distance(made, MODEL, part) for part in (FORGET, RETAIN))
    assert far > 2 * near
    obeying = lit.scrub(MODEL, FORGET, RETAIN, F.cross_entropy, ascents=0, batch_size=16)
    assert metrics.js_distance(obeying, MODEL, FORGET) < far / 2


def test_scrub_at_a_temperature():
    outputs = torch.randn(5, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    expected = (outputs / 2).log_softmax(1)
    assert torch.allclose(lit._softened(outputs, 2.0), expected, rtol=1e-12, atol=1e-12)
    divergence = lit._kl(outputs.log_softmax(1), expected)
    by_torch = F.kl_div(expected, outputs.softmax(1), reduction="batchmean")
    assert torch.allclose(divergence, by_torch, rtol=1e-12)


@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (1.5, 0.2), (0.5, 3.0)])
def test_selective_dampening_by_its_formula(alpha, dampening):
    found = {}
    for name, (x, y) in (("f", FORGET), ("r", RETAIN)):
        rows = []
        for k in range(len(y)):
            grads = torch.autograd.grad(
                F.cross_entropy(MODEL(x[k : k + 1]), y[k : k + 1]), list(MODEL.parameters())
            )
            rows.append([g.square() for g in grads])
        found[name] = [torch.stack(column) for column in zip(*rows, strict=True)]
    made = lit.selective_dampening(
        MODEL, FORGET, RETAIN, F.cross_entropy, alpha=alpha, dampening=dampening
    )
    shrunk = 0
    for new, old, f, r in zip(
        made.parameters(), MODEL.parameters(), found["f"], found["r"], strict=True
    ):
        ours, every = f.mean(0), torch.cat([f, r]).mean(0)
        hit = ours > alpha * every
        factor = torch.minimum(dampening * every / ours, torch.ones_like(ours))
        expected = torch.where(hit, old * factor, old)
        assert torch.allclose(new, expected, rtol=1e-9)
        shrunk += int(hit.sum())
    assert shrunk > 0
    same_model = lit.selective_dampening(MODEL, FORGET, RETAIN, F.cross_entropy, alpha=1e9)
    assert same(same_model, state(MODEL))


def test_selective_dampening_estimates_with_few_samples():
    runs = [
        lit.selective_dampening(
            MODEL, FORGET, RETAIN, F.cross_entropy, seed, alpha=1.0, n_samples=20
        )
        for seed in (0, 0, 1)
    ]
    assert same(runs[0], state(runs[1]))
    assert not same(runs[0], state(runs[2]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_wrong_labels_are_all_the_others_alike(dtype):
    model = nn.Linear(2, 4).double()
    labels = torch.arange(4, dtype=dtype).repeat(500)
    batch = Batch((torch.zeros(2000, 2, dtype=DOUBLE),), {}, labels, 2000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrong = lit._with_wrong_labels(model, batch).targets
    assert wrong.dtype == dtype
    assert not (wrong == labels).any()
    counts = Counter(zip(labels.tolist(), wrong.tolist(), strict=True))
    assert len(counts) == 12
    # 500 draws from three: each is binomial, within five of its standard deviations
    assert all(abs(n - 500 / 3) < 5 * (500 * 2 / 9) ** 0.5 for n in counts.values())


def test_wrong_labels_of_two_classes_are_the_other_one():
    model = nn.Linear(2, 1).double()
    labels = torch.tensor([[0.0], [1.0], [1.0]], dtype=DOUBLE)
    batch = Batch((torch.zeros(3, 2, dtype=DOUBLE),), {}, labels, 3)
    assert torch.equal(lit._with_wrong_labels(model, batch).targets, 1 - labels)


def test_random_labels_unlearn_what_fine_tuning_keeps():
    runs = [
        method(MODEL, ONE_CLASS, OTHERS, F.cross_entropy, epochs=20, batch_size=16)
        for method in (lit.random_labels, fine_tune)
    ]
    assert loss(runs[0], ONE_CLASS) > loss(runs[1], ONE_CLASS) + 1
    assert loss(runs[0], OTHERS) < 0.5


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_salun_changes_the_share_with_the_largest_gradient(share):
    made = lit.salun(
        MODEL, FORGET, RETAIN, F.cross_entropy, share=share, weight_decay=DECAY, batch_size=16
    )
    grads = torch.autograd.grad(
        F.cross_entropy(MODEL(FORGET[0]), FORGET[1]), list(MODEL.parameters())
    )
    salience = torch.cat([g.abs().flatten() for g in grads])
    changed = torch.cat(
        [(a != b).flatten() for a, b in zip(made.parameters(), MODEL.parameters(), strict=True)]
    )
    n = round(share * len(salience))
    assert changed.sum() == n
    assert set(changed.nonzero().flatten().tolist()) == set(salience.topk(n).indices.tolist())


def test_salun_on_all_parameters_is_random_labels():
    runs = [
        method(MODEL, FORGET, RETAIN, F.cross_entropy, 3, batch_size=16, **options)
        for method, options in ((lit.salun, {"share": 1.0}), (lit.random_labels, {}))
    ]
    assert same(runs[0], state(runs[1]))


def test_a_bad_teacher_is_followed_on_the_removed_samples():
    made = lit.bad_teacher(
        MODEL, ONE_CLASS, OTHERS, F.cross_entropy, epochs=60, learning_rate=3e-3, retain_share=1.0
    )
    far, near = (metrics.js_distance(made, MODEL, part) for part in (ONE_CLASS, OTHERS))
    assert far > 2 * near


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, 5.0, dtype=DOUBLE))
        self.first = nn.Linear(4, 6).double()
        self.norm = nn.BatchNorm1d(6).double()
        self.last = nn.Linear(6, 3).double()

    def forward(self, x):
        return self.last(self.norm(self.first(x * self.scale)).relu())


@pytest.mark.parametrize("method", [lit.cf_k, lit.eu_k])
@pytest.mark.parametrize(
    ("layers", "changed"), [(1, {"last"}), (2, {"first", "norm", "last"}), (9, "all")]
)
def test_the_last_layers_change_and_no_others(method, layers, changed):
    torch.manual_seed(0)
    model = Deep().eval()
    made = method(model, None, RETAIN, F.cross_entropy, layers=layers, batch_size=16)
    before = state(model)
    found = {k.split(".")[0] for k, v in made.state_dict().items() if not torch.equal(v, before[k])}
    assert found == ({"scale", "first", "norm", "last"} if changed == "all" else changed)
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert not made.training
    assert loss(made, RETAIN) < loss(model, RETAIN)


def test_starting_again_loses_what_was_learnt():
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj_bias.data.fill_(3.0)
    deep = Deep()
    old = state(deep)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start_again(attention)
        start_again(deep)
        expected = Deep  # the layers are those of a new model
    assert (attention.in_proj_bias == 0).all()
    assert not torch.equal(deep.first.weight, old["first.weight"])
    assert torch.equal(deep.scale.sort().values, old["scale"])
    assert type(deep) is expected


def test_l1_sparse_shrinks_weights_and_is_fine_tuning_without():
    def norm(model):
        return sum(p.abs().sum().item() for p in model.parameters())

    options = {"weight_decay": DECAY, "batch_size": 16}
    plain = fine_tune(MODEL, None, RETAIN, F.cross_entropy, 5, **options)
    runs = [
        lit.l1_sparse(MODEL, None, RETAIN, F.cross_entropy, 5, gamma=gamma, **options)
        for gamma in (0.0, 0.01, 0.1)
    ]
    for ours, theirs in zip(runs[0].parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert norm(runs[2]) < norm(runs[1]) < norm(runs[0])


def test_l1_sparse_by_hand():
    model = nn.Linear(4, 3).double()
    made = lit.l1_sparse(
        model, None, RETAIN, F.cross_entropy, gamma=0.2, epochs=1, learning_rate=0.1, batch_size=50
    )
    gradient = torch.autograd.grad(F.cross_entropy(model(RETAIN[0]), RETAIN[1]), model.weight)[0]
    expected = model.weight - 0.1 * (gradient + 0.2 * model.weight.sign())
    assert torch.allclose(made.weight, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (lit.scrub, {"alpha": -1.0}, "alpha must be a finite number >= 0; got -1"),
        (lit.scrub, {"ascents": -1}, "ascents must be an integer >= 0; got -1"),
        (lit.scrub, {"temperature": 0}, "temperature must be above 0; got 0"),
        (lit.selective_dampening, {"n_samples": 0}, "n_samples must be an integer >= 1; got 0"),
        (lit.selective_dampening, {"dampening": -1}, "dampening must be a finite number >= 0"),
        (lit.salun, {"share": 0.0}, "share must be above 0 and at most 1; got 0.0"),
        (lit.bad_teacher, {"retain_share": 1.5}, "retain_share must be above 0 and at most 1"),
        (lit.cf_k, {"layers": 0}, "layers must be an integer >= 1; got 0"),
        (lit.eu_k, {"learning_rate": -1}, "learning_rate must be a finite number >= 0"),
        (lit.l1_sparse, {"gamma": -1}, "gamma must be a finite number >= 0"),
        (lit.random_labels, {"epochs": -1}, "epochs must be an integer >= 0"),
    ],
)
def test_options_are_checked(method, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        method(MODEL, FORGET, RETAIN, F.cross_entropy, **options)


@pytest.mark.parametrize("method", [lit.scrub, lit.random_labels, lit.bad_teacher])
def test_methods_that_need_classes_say_so(method):
    sets = [(x, x[:, None, :]) for x, _ in (FORGET, RETAIN)]

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4).double()

        def forward(self, x):
            return self.layer(x)[:, None]

    with pytest.raises(ValueError, match=r"needs classes: .* got shape \(1\d, 1, 4\)"):
        method(Rows(), *sets, F.mse_loss, batch_size=16)


def test_all_in_one_evaluation_by_name():
    found = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods=list(LITERATURE), **QUICK
    )
    assert [m.name for m in found.methods] == ["no-op", "retrained", *LITERATURE]
    assert [m.error for m in found.methods] == [None] * (2 + len(LITERATURE))


def test_the_names_are_documented_and_have_grids():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.partition("### Methods from the literature")[2].partition("\n## ")[0]
    assert re.findall(r'^\| `"(.+?)"` \|', section, re.MULTILINE) == list(LITERATURE)
    assert set(LITERATURE) < set(GRIDS)
    sizes = {name: np.prod([len(v) for v in grid.values()]) for name, grid in GRIDS.items()}
    assert min(sizes.values()) >= 12  # so all have the same budget


# ---------------------------------------------------------------------------------------------
# The search

X, Y = (torch.cat([a, b]) for a, b in zip(FORGET, RETAIN, strict=True))
CONTROL = list(range(10))  # those with wrong labels


def fit(samples, seed):
    return train(seed, (samples,))


def test_tuning_chooses_the_nearest_to_retraining_and_trains_on_no_validation_sample():
    seen = []

    def spy(samples, seed):
        seen.append((samples[0], seed))
        return fit(samples, seed)

    methods = ["L-BFGS", "fine-tune SGD"]
    found = tune(spy, (X, Y), CONTROL, F.cross_entropy, methods=methods, weight_decay=DECAY)
    assert [(len(x), seed) for x, seed in seen] == [(50, 0), (40, 1), (40, 2), (40, 3)]
    rows = [{tuple(row.tolist()) for row in x} for x, _ in seen]
    assert rows[1] == rows[2] == rows[3] < rows[0]
    assert rows[0] - rows[1] == {tuple(row.tolist()) for row in X[CONTROL]}
    for name in methods:
        trials = [t for t in found.trials if t.name == name]
        assert len(trials) == 12
        best = found.best(name)
        assert best.distance == min(t.distance for t in trials)
        assert best.options in [t.options for t in trials]
        assert found.methods[name].options.items() >= best.options.items()
    assert found.best("L-BFGS").distance < found.original
    assert 0 < found.floor < found.original
    # ... which is what `evaluate` measures on the same parts
    again = tune(fit, (X, Y), CONTROL, F.cross_entropy, methods=methods, weight_decay=DECAY)
    assert [t.distance for t in again.trials] == [t.distance for t in found.trials]
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["chosen"]["L-BFGS"] == found.best("L-BFGS").options
    assert values["settings"]["n_control"] == 10
    assert len(values["trials"]) == 24
    lines = repr(found).splitlines()
    assert lines[0] == "Tuned on 10 control samples and 10 for validation, at most 12 settings each"
    assert lines[2].startswith("L-BFGS")
    assert "iterations=" in lines[2]
    evaluated = evaluate(
        MODEL, *SETS, F.cross_entropy, retrained=RETRAINED, methods=found.methods, **QUICK
    )
    assert evaluated["L-BFGS"].error is None


def test_tuning_draws_from_larger_grids_and_takes_own_methods():
    found = tune(
        fit,
        (X, Y),
        12,
        F.cross_entropy,
        methods={"mine": Baseline(lbfgs, {"n_samples": 20}), "step": {"selection": "full"}},
        grids={"mine": {"iterations": range(1, 30)}, "step": {"damping": [1e-3, 1e-2]}},
        n_settings=3,
        weight_decay=DECAY,
        seed=4,
    )
    counts = Counter(t.name for t in found.trials)
    assert counts == {"mine": 3, "step": 2}
    assert "epochs" not in found.methods["mine"].options
    assert found.methods["mine"].options["n_samples"] == 20
    assert found.methods["step"]["selection"] == "full"
    assert found.settings["n_control"] == 12


def test_tuning_looks_beside_the_best_setting_and_then_draws_again():
    found = tune(
        fit,
        (X, Y),
        CONTROL,
        F.cross_entropy,
        methods=["L-BFGS", "L1-sparse"],
        grids={"L-BFGS": {"iterations": range(1, 40)}},
        n_settings=9,
        weight_decay=DECAY,
    )
    tried = [t.options["iterations"] for t in found.trials if t.name == "L-BFGS"]
    assert len(set(tried)) == len(tried) == 9
    first, then = tried[:4], tried[4:6]
    assert first == sorted(first)
    distances = {t.options["iterations"]: t.distance for t in found.trials if t.name == "L-BFGS"}
    nearest = min(first, key=distances.__getitem__)
    assert {abs(k - nearest) for k in then if abs(k - nearest) == 1} == {1}
    assert len([t for t in found.trials if t.name == "L1-sparse"]) == 9


def test_tuning_takes_validation_samples_that_are_apart():
    seen = []

    def spy(samples, seed):
        seen.append(len(samples[1]))
        return fit(samples, seed)

    apart = X[CONTROL] + 1, Y[CONTROL]
    options = {"methods": ["L-BFGS"], "n_settings": 2, "weight_decay": DECAY}
    found = tune(spy, (X, Y), CONTROL, F.cross_entropy, validation=apart, **options)
    assert seen == [60, 50, 50, 50]
    assert found.settings["n_validation"] == 10
    trial = found.trials[0]
    parts = {"js_forget", "loss_forget", "js_test"}
    assert trial.parts.keys() == parts
    other = tune(fit, (X, Y), CONTROL, F.cross_entropy, validation=(X[20:], Y[20:]), **options)
    assert other.trials[0].parts["js_forget"] == trial.parts["js_forget"]
    assert other.trials[0].parts["js_test"] != trial.parts["js_test"]
    with pytest.raises(TypeError, match="validation must be"):
        tune(fit, (X, Y), CONTROL, F.cross_entropy, validation="0.2", **options)


def test_tuning_gives_all_methods_the_same_epochs():
    found = tune(
        fit,
        (X, Y),
        10,
        F.cross_entropy,
        methods={
            "open": Baseline(fine_tune),
            "own": Baseline(fine_tune, {"epochs": 4}),
            "in the grid": Baseline(fine_tune),
        },
        grids={
            "open": {"learning_rate": [0.01]},
            "own": {"learning_rate": [0.01]},
            "in the grid": {"epochs": [1]},
        },
        epochs=2,
    )
    assert [method.options["epochs"] for method in found.methods.values()] == [2, 4, 1]


def test_tuning_without_classes_compares_losses():
    data = (X, X[:, :1] ** 2)

    def regress(samples, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(50):
            optimizer.zero_grad()
            F.mse_loss(model(samples[0]), samples[1]).backward()
            optimizer.step()
        return model

    found = tune(regress, data, 10, F.mse_loss, methods=["fine-tune SGD"], n_settings=2)
    assert all(t.distance > 0 for t in found.trials)
    assert found.floor > 0


def test_a_method_that_fails_everywhere_is_an_error():
    def broken(model, forget, retain, loss_fn, seed, *, weight_decay, knob):
        raise RuntimeError(f"knob {knob}")

    with (
        pytest.warns(UserWarning, match="failed"),
        pytest.raises(ValueError, match="all settings of 'b' failed. RuntimeError: knob 2"),
    ):
        tune(
            fit,
            (X, Y),
            10,
            F.cross_entropy,
            methods={"b": Baseline(broken)},
            grids={"b": {"knob": [1, 2]}},
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"control": 0}, ValueError, "control must be an integer from 1 to 59; got 0"),
        ({"control": [1, 1]}, ValueError, "control must be different numbers of some of the 60"),
        ({"control": [60]}, ValueError, "control must be an integer from 0 to 59; got 60"),
        ({"control": "all"}, TypeError, "control must be numbers of samples, integers; got 'all'"),
        ({"control": 57}, ValueError, "data has 60 samples and control takes 57: too few are left"),
        ({"validation": 1.0}, ValueError, "validation must be between 0 and 1, a share; got 1.0"),
        ({"n_settings": 0}, ValueError, "n_settings must be an integer >= 1; got 0"),
        ({"epochs": -1}, ValueError, "epochs must be an integer >= 0; got -1"),
        ({"n_retrain": 2}, ValueError, "n_retrain must be an integer >= 3; got 2"),
        ({"methods": ["SISA"]}, ValueError, "methods must be names among .*; got 'SISA'"),
        ({"methods": "SCRUB"}, TypeError, "methods must be a mapping of names"),
        ({"methods": ["paper"]}, ValueError, "grids must have the values to try for 'paper'"),
        ({"methods": {"m": MODEL}}, TypeError, "method 'm' must be a Baseline or a dict of opt"),
        (
            {"methods": ["SCRUB"], "grids": {"SCRUB": {"alpha": 1.0}}},
            ValueError,
            r"grids\['SCRUB'\] must map options to sequences of values",
        ),
        ({"data": iter([1])}, TypeError, "data must be a pair"),
        ({"train": 3}, TypeError, r"train must be callable as train\(samples, seed\); got 3"),
    ],
)
def test_arguments_of_the_search_are_checked(changes, error, message):
    given = {"train": fit, "data": (X, Y), "control": 10, "loss_fn": F.cross_entropy, **changes}
    with pytest.raises(error, match=message):
        tune(**given)


def test_parts_of_data_of_every_kind():
    dataset = torch.utils.data.TensorDataset(X, Y)
    for data in ((X, Y), {"x": X, "labels": Y}, dataset):
        assert count(data) == 60
        part = take(data, [3, 1])
        assert count(part) == 2
    assert torch.equal(take((X, Y), [3, 1])[0], X[[3, 1]])
    assert torch.equal(take({"x": X, "labels": Y}, np.array([3, 1]))["labels"], Y[[3, 1]])
    assert torch.equal(take(dataset, [3, 1])[0][0], X[3])
