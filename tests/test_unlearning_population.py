"""Scores over populations of models, by their definitions, and the run that makes the models."""

import functools
import json
import math
import re
import sys

import cloudpickle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcodec_ext.evaluation import PopulationEvaluation, evaluate_population
from lcodec_ext.evaluation.methods import Baseline, fine_tune, lbfgs
from lcodec_ext.evaluation.metrics import roc_auc
from lcodec_ext.evaluation.population import SCORES
from lcodec_ext.evaluation.scores import (
    forgetting_quality,
    klom,
    of_retraining,
    privacy_degrees,
    ulira,
)
from lcodec_ext.evaluation.seeds import margins
from lcodec_ext.unlearning import unlearn
from test_unlearning_evaluation import DECAY, FORGET, RETAIN, TEST, mlp, train


def normal(n_models, n, shift=0.0, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(shift, scale, (n_models, n))


# ---------------------------------------------------------------------------------------------
# U-LiRA


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_ulira_of_shifted_normals_is_the_closed_form(shift):
    n, N = 30, 400
    found = ulira(normal(N, n, shift, seed=1), normal(N, n, seed=2))
    auc = norm.cdf(abs(shift) / math.sqrt(2))  # of the likelihood ratio, which is monotone
    tpr = norm.sf(norm.isf(0.01) - abs(shift))
    # an AUC of 200 against 200 has a standard error of at most .029; the mean is of 60 of them
    slack = 0.01 + 5 * 0.029 / math.sqrt(60)
    assert abs(found.auc.mean() - auc) < slack
    assert abs(found.pooled_auc - auc) < slack
    assert abs(found.pooled_tpr - tpr) < 0.03
    assert abs(found.tpr.mean() - tpr) < 0.05


def test_ulira_of_unequal_spreads_needs_no_shift():
    found = ulira(normal(400, 30, scale=4.0, seed=1), normal(400, 30, seed=2))
    # log(s) + ... is monotone in |x|: P(|4 z| > |z'|) = 2/pi arctan 4
    assert abs(found.auc.mean() - 2 / math.pi * math.atan(4)) < 0.03


def test_ulira_by_hand():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1, 1, (9, 2)), rng.normal(0, 2, (9, 2))
    auc, pooled = [], []
    for fit, judge in ((0, 1), (1, 0)):
        log_ratio = [
            norm.logpdf(each[judge::2], ours[fit::2].mean(0), ours[fit::2].std(0, ddof=1))
            - norm.logpdf(each[judge::2], theirs[fit::2].mean(0), theirs[fit::2].std(0, ddof=1))
            for each in (ours, theirs)
        ]
        auc.append([roc_auc(log_ratio[0][:, k], log_ratio[1][:, k]) for k in (0, 1)])
        pooled.append(roc_auc(*log_ratio))
    found = ulira(ours, theirs)
    assert found.auc == pytest.approx(np.mean(auc, axis=0))
    assert found.pooled_auc == pytest.approx(np.mean(pooled))


def test_ulira_of_models_that_are_all_alike():
    same = np.tile(normal(1, 5), (8, 1))
    assert (ulira(same, same).auc == 0.5).all()
    assert (ulira(same + 1, same).auc == 1).all()
    assert ulira(same + 1, same).pooled_tpr == 1


# ---------------------------------------------------------------------------------------------
# KLoM


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 25), st.integers(0, 1000))
def test_klom_is_scipys_entropy_of_the_histograms(n_ours, n_theirs, bins, seed):
    ours, theirs = normal(n_ours, 3, 0.7, seed=seed), normal(n_theirs, 3, seed=seed + 1)
    for k, found in enumerate(klom(ours, theirs, bins=bins)):
        edges = np.histogram_bin_edges(np.concatenate([ours[:, k], theirs[:, k]]), bins)
        p, q = (np.histogram(each[:, k], edges)[0] / len(each) for each in (ours, theirs))
        q = np.where(p > 0, np.maximum(q, 1e-5), q)
        assert found == pytest.approx(entropy(p, q), abs=1e-9)
        assert found >= -1e-12


def test_klom_of_the_same_and_of_disjoint_populations():
    ours = normal(64, 10)
    assert np.allclose(klom(ours, ours), 0, atol=1e-12)
    assert np.allclose(klom(np.ones((8, 2)), np.ones((8, 2))), 0)
    far = klom(ours + 50, ours)
    q = 1e-5 * np.count_nonzero(np.histogram(ours[:, 0])[0])
    assert (far > -math.log(q) - 3).all()
    assert (far <= -math.log(1e-5) + 1e-2).all()
    assert np.allclose(klom(ours + 300, ours + 400), 0)  # both are cut to 100


def test_klom_of_many_models_is_the_closed_form():
    found = klom(normal(200_000, 1, 1.0, seed=1), normal(200_000, 1, seed=2), bins=60)
    assert found[0] == pytest.approx(0.5, abs=0.02)  # (shift)^2 / 2


# ---------------------------------------------------------------------------------------------
# The challenge


def test_privacy_degrees_by_every_threshold():
    rng = np.random.default_rng(3)
    ours, theirs = rng.integers(0, 8, (12, 6)) + 2.0, rng.integers(0, 8, (12, 6)) + 0.0
    for k, found in enumerate(privacy_degrees(ours, theirs, delta=0.01)):
        best = 0.0
        for t in np.arange(-0.5, 11):
            for guess in (lambda x, t=t: x > t, lambda x, t=t: x < t):
                a, b = guess(theirs[:, k]).mean(), (~guess(ours[:, k])).mean()
                if a == 0 and b == 0:
                    best = math.inf
                elif a > 0 and b > 0:
                    for one, other in ((a, b), (b, a)):
                        if 1 - 0.01 - one > 0:
                            best = max(best, math.log(1 - 0.01 - one) - math.log(other))
        assert found == pytest.approx(best)


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_privacy_degrees_of_randomised_response_are_its_epsilon(epsilon):
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    rng = np.random.default_rng(0)
    ours, theirs = (rng.random((100_000, 1)) < q for q in (p, 1 - p))
    assert privacy_degrees(ours, theirs, delta=0.0)[0] == pytest.approx(epsilon, abs=0.05)


def test_privacy_degrees_at_the_ends():
    ours = normal(64, 5)
    assert (privacy_degrees(ours + 100, ours) == math.inf).all()
    assert (privacy_degrees(ours - 100, ours) == math.inf).all()
    assert (privacy_degrees(ours, ours) < 0.05).all()
    assert (privacy_degrees(np.ones((8, 2)), np.ones((8, 2))) == 0).all()


def test_forgetting_quality_is_by_bins():
    assert forgetting_quality([0.0, 0.49]) == 1
    assert forgetting_quality([0.5]) == 0.5
    assert forgetting_quality([math.inf]) == forgetting_quality([6.0]) == 2 / 2**13
    assert forgetting_quality([0, math.inf]) == (1 + 2 / 2**13) / 2
    with pytest.raises(ValueError, match="epsilons must be numbers >= 0, at least one; got"):
        forgetting_quality([-1.0])


SUMMARIES = {
    "auc": (lambda a, b: float(ulira(a, b).auc.mean())),
    "klom": (lambda a, b: float(klom(a, b).mean())),
    "quality": (lambda a, b: forgetting_quality(privacy_degrees(a, b))),
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_scores_of_retraining_are_those_of_fresh_populations(name):
    fresh = [
        SUMMARIES[name](normal(64, 50, seed=2 * k), normal(64, 50, seed=2 * k + 1))
        for k in range(10)
    ]
    mean, spread = of_retraining(SUMMARIES[name], normal(64, 50, seed=90))
    assert abs(mean - np.mean(fresh)) < 2 * max(spread, np.std(fresh))


def test_scores_of_retraining_repeat_and_keep_mean_and_variance():
    seen = []

    def score(ours, theirs):
        seen.append(ours)
        return float(theirs.mean())

    given = normal(200, 3, shift=5.0, scale=2.0)
    found = of_retraining(score, given, draws=200, seed=1)
    assert found == of_retraining(score, given, draws=200, seed=1)
    assert found != of_retraining(score, given, draws=200, seed=2)
    drawn = np.stack(seen[:200])
    # standard errors of 2 sqrt(1 / 40000) and 2 sqrt(2 / 40000), and the kernel's little bias
    assert np.abs(drawn.mean((0, 1)) - given.mean(0)).max() < 0.05
    assert np.abs(drawn.std((0, 1)) / given.std(0) - 1).max() < 0.02


def test_a_score_of_retraining_that_is_infinite_says_so():
    mean, spread = of_retraining(
        lambda a, b: float(privacy_degrees(a, b).max()), normal(2, 9), draws=20
    )
    assert mean == math.inf
    assert math.isnan(spread)


@pytest.mark.parametrize("score", [ulira, klom, privacy_degrees])
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (np.ones(5), np.ones((5, 1)), "unlearned must have a row for each of at least"),
        (np.ones((5, 2)), np.ones((5, 3)), "must be of the same samples; got 2 and 3 columns"),
        (np.ones((5, 2)), np.full((5, 2), np.nan), "retrained holds NaN or infinity"),
        (np.ones((5, 2)), np.ones((5, 0)), "retrained must have a row"),
    ],
)
def test_populations_are_checked(score, ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        score(ours, theirs)


def test_options_of_scores_are_checked():
    pair = normal(8, 2), normal(8, 2)
    with pytest.raises(ValueError, match="at least 4 models"):
        ulira(pair[0][:3], pair[1])
    with pytest.raises(ValueError, match="least must be between 0 and 1; got 0"):
        klom(*pair, least=0)
    with pytest.raises(ValueError, match="delta must be from 0 to below 1; got 1"):
        privacy_degrees(*pair, delta=1)
    with pytest.raises(ValueError, match="draws must be an integer >= 2; got 1"):
        of_retraining(lambda a, b: 0.0, pair[0], draws=1)


# ---------------------------------------------------------------------------------------------
# The run

X, Y = (torch.cat([a, b]) for a, b in zip(FORGET, RETAIN, strict=True))
WRONG = list(range(10))


def fit(samples, seed):
    return train(seed, (samples,), steps=120, model=mlp(seed, width=16))


def retrain(model, forget, retain, loss_fn, seed):
    return fit(retain, seed)


def nothing(model, forget, retain, loss_fn):
    return model


SETS = ((X, Y), WRONG, TEST)
run = functools.partial(evaluate_population, loss_fn=F.cross_entropy)


@pytest.fixture(scope="module")
def population():
    methods = {"retrain": retrain, "nothing": nothing, "L-BFGS": Baseline(lbfgs)}
    return run(fit, methods, *SETS, n_models=24, weight_decay=DECAY)


def test_retraining_cannot_be_told_from_retraining(population):
    found = population["retrain"]
    expected = population["retrained"]
    for name in ("ulira_auc", "klom_forget", "klom_retain", "klom_test", "forgetting_quality"):
        distance = abs(found.scores[name] - expected.scores[name])
        assert distance < 5 * expected.spread[name] + 0.02, name
    assert abs(found.scores["ulira_auc"] - 0.5) < 0.12
    assert found.scores["forgetting_quality"] > 0.1
    assert found.scores["ulira_tpr"] < 0.2


def test_nothing_deleted_is_told(population):
    found, no_op = population["nothing"], population["no-op"]
    assert found.scores == no_op.scores
    assert found.examples == no_op.examples
    assert found.scores["ulira_auc"] > 0.95
    assert found.scores["klom_forget"] > 3 * population["retrained"].scores["klom_forget"]
    assert found.scores["klom_test"] < found.scores["klom_forget"]
    assert found.scores["forgetting_quality"] < population["retrain"].scores["forgetting_quality"]
    assert found.scores["accuracy_forget"] > population["retrained"].scores["accuracy_forget"]


def test_scores_stand_in_the_result(population):
    retrained = population["retrained"]
    assert retrained.scores.keys() == population["L-BFGS"].scores.keys()
    assert retrained.spread.keys() == SCORES.keys()
    assert retrained.scores.keys() - SCORES.keys() == {"challenge_score"} | {
        f"{a}_{b}" for a in ("accuracy", "loss") for b in ("forget", "retain", "test")
    }
    assert retrained.scores["challenge_score"] == retrained.scores["forgetting_quality"]
    assert (population.n_models, population.n_forget) == (24, 10)
    assert (population.n_retain, population.n_test) == (50, 30)
    mine = population["L-BFGS"]
    assert mine.examples["number"] == WRONG
    assert mine.scores["ulira_auc"] == pytest.approx(np.mean(mine.examples["auc"]))
    assert mine.scores["klom_forget"] == pytest.approx(np.mean(mine.examples["klom"]))
    ratio = math.prod(
        mine.scores[f"accuracy_{p}"] / retrained.scores[f"accuracy_{p}"] for p in ("retain", "test")
    )
    expected = mine.scores["forgetting_quality"] * ratio
    assert mine.scores["challenge_score"] == pytest.approx(expected)
    assert mine.seconds > 0
    assert retrained.seconds > 0
    with pytest.raises(KeyError, match="no method 'x'; there are 'no-op', 'retrained', 'retrain'"):
        population["x"]


def test_json_frame_and_repr(population):
    values = json.loads(json.dumps(population.to_dict(), allow_nan=False))
    again = PopulationEvaluation.from_dict(values)
    assert again.to_dict() == population.to_dict()
    assert again["nothing"].examples == population["nothing"].examples  # infinities, too
    assert math.inf in population["nothing"].examples["epsilon"]
    with pytest.raises(ValueError, match="of format 1; got format 2"):
        PopulationEvaluation.from_dict({**values, "format": 2})
    frame = population.to_frame()
    assert list(frame.index) == ["no-op", "retrained", "retrain", "nothing", "L-BFGS"]
    assert frame.loc["retrain", "ulira_auc"] == population["retrain"].scores["ulira_auc"]
    spread = population["retrained"].spread["klom_test"]
    assert frame.loc["retrained", "spread_klom_test"] == spread
    examples = population.to_frame(examples=True)
    assert examples.loc[("nothing", 3), "auc"] == population["nothing"].examples["auc"][3]
    lines = repr(population).splitlines()
    assert lines[0] == (
        "Population of 24 models: 10 samples removed; measured on them, on 50 retained and 30 test "
        "samples"
    )
    names = [line.split()[0] for line in lines[3:-1]]
    assert names == ["no-op", "retrained", "retrain", "nothing", "L-BFGS"]
    auc = population["nothing"].scores["ulira_auc"]
    assert lines[6].split()[1] == f"{auc:.3f}"
    assert max(map(len, lines)) < 140
    assert lines[-1] == 'Row "retrained": what as many more retrained models would score.'


def test_frame_needs_pandas(population, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_frame needs pandas: pip install 'lcodec_ext\[eval"):
        population.to_frame()


def test_margins_are_the_log_odds_of_the_right_class():
    from lcodec_ext._torch.predict import predict
    from lcodec_ext._torch.samples import as_samples
    from lcodec_ext.evaluation.metrics import place

    model = mlp(3)
    samples = as_samples(TEST, "test", *place(model))
    p = model(TEST[0]).softmax(1).gather(1, TEST[1][:, None])[:, 0].detach()
    found = margins(predict(model, samples, F.cross_entropy, 7))
    assert torch.allclose(found, torch.log(p / (1 - p)), rtol=1e-9)


def test_processes_give_the_same_numbers_and_take_local_functions():
    for name in (__name__, train.__module__):  # no process can import tests
        cloudpickle.register_pickle_by_value(sys.modules[name])
    shift = 0.0

    def local(samples, seed):
        return fit(samples, seed + int(shift))

    runs = [
        run(local, lambda m, f, r, loss: m, *SETS, n_models=4, processes=p, seed=3) for p in (1, 2)
    ]
    for a, b in zip(*(each.methods for each in runs), strict=True):
        assert (a.name, a.scores, a.examples) == (b.name, b.scores, b.examples)
    assert [m.name for m in runs[0].methods] == ["no-op", "retrained", "unlearn"]
    other = run(local, nothing, *SETS, n_models=4, seed=4)
    assert other["no-op"].scores != runs[0]["no-op"].scores


def test_seeds_are_different_and_reach_training_and_methods():
    seen = []

    def spy(samples, seed):
        seen.append((len(samples[0]), seed, torch.initial_seed()))
        return fit(samples, seed)

    given = []

    def method(model, forget, retain, loss_fn, seed):
        given.append((len(forget[0]), len(retain[0]), seed))
        return model

    run(spy, method, *SETS, n_models=4)
    assert [n for n, _, _ in seen] == [60, 50] * 4
    assert len({seed for _, seed, _ in seen}) == 8
    assert all(seed == torch_seed for _, seed, torch_seed in seen)
    assert given == [(10, 50, seed) for n, seed, _ in seen if n == 60]


@pytest.mark.parametrize(
    "method",
    [
        unlearn,
        functools.partial(fine_tune, epochs=1),
        lambda model, forget, retain, loss_fn, *, seed: fine_tune(
            model, forget, retain, loss_fn, seed, epochs=1
        ),
        lambda model, forget, retain, loss_fn, another: fit(retain, another),
        ["L-BFGS", "SSD"],
        {
            "step": {"selection": "gradient", "n_units": 3},
            "tune": Baseline(fine_tune, {"epochs": 1}),
        },
    ],
)
def test_methods_of_every_kind(method):
    found = run(fit, method, *SETS, n_models=4)
    assert all(m.error is None for m in found.methods)
    assert len(found.methods) >= 3
    assert found.methods[2].scores["ulira_auc"] is not None
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    expected = run(fit, {"mine": nothing}, *SETS, n_models=6)
    seen = []

    def fit_some(samples, seed):
        if len(seen) == 7:  # in the middle of the fourth seed
            raise KeyboardInterrupt
        seen.append(seed)
        return fit(samples, seed)

    fit_some.__qualname__ = "fit"
    folder = tmp_path / "population"
    with pytest.raises(KeyboardInterrupt):
        run(fit_some, {"mine": nothing}, *SETS, n_models=6, directory=folder)
    assert sorted(p.name for p in folder.glob("*.npz")) == [f"seed-0000{k}.npz" for k in range(3)]
    seen.clear()

    def fit_rest(samples, seed):
        seen.append(seed)
        return fit(samples, seed)

    fit_rest.__qualname__ = "fit"
    found = run(fit_rest, {"mine": nothing}, *SETS, n_models=6, directory=folder)
    assert len(seen) == 6
    for a, b in zip(expected.methods, found.methods, strict=True):
        assert (a.name, a.scores, a.spread, a.examples) == (b.name, b.scores, b.spread, b.examples)
    seen.clear()
    more = run(fit_rest, {"mine": nothing}, *SETS, n_models=7, directory=folder)
    assert (len(seen), more.n_models) == (2, 7)
    fewer = run(fit_rest, {"mine": nothing}, *SETS, n_models=4, directory=folder)
    assert (len(seen), fewer.n_models) == (2, 4)
    for changes, what in (
        ({"forget": [1, 2]}, "forget"),
        ({"seed": 1}, "seed"),
        ({"unlearn": {"mine": retrain}}, "methods"),
        ({"unlearn": {"mine": {"selection": "full"}}}, "methods"),
        ({"data": (X, Y.flip(0))}, "data"),
        ({"test": tuple(t[1:] for t in TEST)}, "test"),
    ):
        given = {"unlearn": {"mine": nothing}, "data": (X, Y), "forget": WRONG, "test": TEST}
        with pytest.raises(ValueError, match=f"another evaluation, which differs in {what}; choo"):
            run(fit_rest, **(given | changes), n_models=4, directory=folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="directory must be a folder"):
        run(fit_rest, nothing, *SETS, n_models=4, directory=file)


def test_failures_are_recorded_and_the_others_go_on(tmp_path):
    calls = []

    def broken(model, forget, retain, loss_fn):
        calls.append(1)
        if len(calls) % 2:
            raise RuntimeError("no luck")
        return model

    def broken_numbers(model, forget, retain, loss_fn):
        with torch.no_grad():
            model[0].weight.fill_(math.nan)
        return model

    methods = {"b": broken, "nan": broken_numbers, "fine": nothing}
    for _ in range(2):  # the second time from the folder
        with pytest.warns(UserWarning, match="failed") as told:
            found = run(fit, methods, *SETS, n_models=4, directory=tmp_path)
        assert len(told) == 2
        assert found["b"].error == "RuntimeError: no luck (2 of 4 seeds)"
        assert "the outputs of the model hold NaN or infinity, first for" in found["nan"].error
        assert found["b"].scores == {}
        assert found["fine"].scores["ulira_auc"] is not None
        assert "no luck" in repr(found)
        assert len(found.to_frame()) == 5


def test_regression_and_data_of_other_kinds():
    class Line(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.layer = nn.Linear(4, 1).double()

        def forward(self, x):
            return self.layer(x)

    seen = []

    def regress(samples, seed):
        seen.append(type(samples))
        model = Line(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x, y in DataLoader(samples, 20):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return model

    data = TensorDataset(X, X[:, :1] ** 2)
    test = DataLoader(TensorDataset(TEST[0], TEST[0][:, :1]), 8)
    found = evaluate_population(
        regress, nothing, data, range(5), test, F.mse_loss, n_models=4, max_samples=12, draws=2
    )
    assert seen[1] is torch.utils.data.Subset
    assert found["no-op"].scores["accuracy_test"] is None
    assert found["no-op"].scores["loss_test"] > 0
    assert (found.n_retain, found.n_test) == (12, 12)
    assert "challenge" in repr(found)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": 3}, TypeError, "train must be callable as train(samples, seed); got an object"),
        ({"train": lambda seed: None}, TypeError, "does not take two arguments"),
        ({"train": lambda s, seed: 3}, TypeError, "train must return a model (torch.nn.Module)"),
        ({"unlearn": mlp()}, TypeError, "unlearn must delete from any model"),
        ({"unlearn": "L-BFGS"}, TypeError, "unlearn must be a callable (model, forget, retain, lo"),
        ({"unlearn": {"m": mlp()}}, TypeError, "method 'm' must delete from any model; got one"),
        ({"unlearn": ["SISA"]}, ValueError, "methods must be names of BASELINES or LITERATURE"),
        ({"data": iter(())}, TypeError, "data must be a pair (inputs, targets) of tensors"),
        ({"forget": []}, ValueError, "forget must be different numbers of some of the 60 samples"),
        ({"forget": range(60)}, ValueError, "at least one and not all; got 60 numbers"),
        ({"forget": [70]}, ValueError, "forget must be an integer from 0 to 59; got 70"),
        ({"n_models": 3}, ValueError, "n_models must be an integer >= 4; got 3"),
        ({"processes": 0}, ValueError, "processes must be an integer >= 1; got 0"),
        ({"max_samples": 0}, ValueError, "max_samples must be an integer >= 1; got 0"),
        ({"draws": 1}, ValueError, "draws must be an integer >= 2; got 1"),
        ({"seed": -1}, ValueError, "seed must be an integer in [0, 2**64)"),
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, "pass an instance, CrossEntropyLoss()"),
        ({"progress": 1}, TypeError, "progress must be True or False; got 1"),
    ],
)
def test_arguments_are_checked(changes, error, message):
    given = dict(zip(("data", "forget", "test"), SETS, strict=True))
    given |= {"train": fit, "unlearn": nothing, "loss_fn": F.cross_entropy, "n_models": 4}
    with pytest.raises(error, match=re.escape(message)):
        evaluate_population(**(given | changes))


def test_scikit_learn_is_missed_before_anything_is_trained(monkeypatch):
    def never(samples, seed):
        raise AssertionError("trained")

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="needs scikit-learn"):
        run(never, nothing, *SETS)
