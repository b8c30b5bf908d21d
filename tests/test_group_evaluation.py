"""evaluate and evaluate_population over a process group give what one process does."""

import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcodec_ext.evaluation import evaluate, evaluate_population
from lcodec_ext.evaluation.methods import Baseline, fine_tune, lbfgs
from lcodec_ext.evaluation.metrics import weight_distance
from lcodec_ext.evaluation.shared import Weights
from test_unlearning_evaluation import DECAY, FORGET, MODEL, RETAIN, RETRAINED, TEST, mlp, train

SETS = (FORGET, RETAIN, TEST)
TUNED = Baseline(fine_tune, {"epochs": 1})
BOTH = tuple(torch.cat(each) for each in zip(FORGET, RETAIN, strict=True))


def timeless(value):
    """Without what clocks say: all else is equal to the bit."""
    if isinstance(value, dict):
        clocks = {key for key in value if "seconds" in key or key == "phases"}
        return {key: timeless(each) for key, each in value.items() if key not in clocks}
    if isinstance(value, list | tuple):
        return [timeless(each) for each in value]
    return value.hex() if isinstance(value, float) else value


def fails(model, forget, retain, loss_fn, seed):
    raise ZeroDivisionError("of no use")


def random_step(model, forget, retain, loss_fn, seed):
    """What draws from torch's random numbers, which are those of the seed on any rank."""
    for p in model.parameters():
        p.data.add_(0.01 * torch.randn_like(p))
    return model


def other_width(seed):
    return train(seed, model=mlp(seed, width=5 + (seed == 1)))


CASES = {
    "models": {
        "retrained": RETRAINED,
        "methods": {
            "unlearn": {"seed": 3, "calibrate": False},
            "tuned": TUNED,
            "L-BFGS": Baseline(lbfgs),
            "x": MODEL,
        },
    },
    "trained here": {
        "retrained": train,
        "methods": {"random": random_step, "broken": fails, "tuned": TUNED},
        "weight_decay": {"0.weight": DECAY},
        "seed": 5,
    },
    "more ranks than work": {"retrained": None, "methods": {"tuned": TUNED}},
    "no methods": {"retrained": RETRAINED[:2], "methods": []},
    "of another width": {
        "retrained": other_width,
        "methods": {"tuned": TUNED, "broken": fails},
        "relearn": False,
        "n_retrain": 4,
    },
}


def evaluated(case, group=None):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        options = {"weight_decay": DECAY, **CASES[case]}
        found = evaluate(MODEL, *SETS, F.cross_entropy, **options, group=group)
    failures = [str(each.message) for each in said if "failed" in str(each.message)]
    return timeless(found.to_dict()), failures, repr(found)


def on_rank(rank, size, group, case):
    return evaluated(case, group)


@pytest.mark.parametrize("case", CASES)
def test_evaluate(ranks, case):
    expected, warned, _ = evaluated(case)
    answers = ranks.run(on_rank, case)
    assert [found for found, _, _ in answers] == [expected] * ranks.size
    assert [each for _, failures, _ in answers for each in failures] == warned  # of one rank each
    assert len({text for _, _, text in answers}) == 1


def equal_weights(rank, size, group, strict=False):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("error" if strict and rank == size - 1 else "always")
        evaluate(
            MODEL, *SETS, F.cross_entropy, retrained=always_the_same, n_retrain=2, methods=[],
            relearn=False, group=group,
        )  # fmt: skip
    return [str(each.message) for each in said]


def always_the_same(seed):
    return train(1, steps=2)


def test_models_of_other_ranks_with_equal_weights_are_noticed(ranks):
    for said in ranks.run(equal_weights):
        assert sum("retrained(0) and retrained(1) have equal weights" in each for each in said) == 1


# ---------------------------------------------------------------------------------------------
# What is refused


def test_a_warning_that_is_an_error_on_one_rank_ends_all(ranks):
    *others, last = ranks.failures(equal_weights, True)
    assert last.kind == "UserWarning"
    for failure in others:
        assert "a warning failed on rank" in failure.message


def differ(rank, size, group, name):
    last = rank == size - 1
    forget, retain, test = SETS
    options = {"methods": {"tuned": TUNED}, "relearn": False}
    model = MODEL
    if last and name == "model":
        model = RETRAINED[0]
    elif last and name == "retain":
        retain = tuple(each[1:] for each in retain)
    elif last and name == "methods":
        options["methods"] = {"tuned": Baseline(fine_tune, {"epochs": 2})}
    elif last and name == "retrained":
        options["retrained"] = RETRAINED
    elif last and name == "validation":
        options["validation"] = TEST
    elif last and name == "groups":
        options["groups"] = np.arange(50)
    elif last and name == "seed":
        options["seed"] = 1
    evaluate(model, forget, retain, test, F.cross_entropy, **options, group=group)


@pytest.mark.parametrize(
    "name", ["model", "retain", "methods", "retrained", "validation", "groups", "seed"]
)
def test_what_differs_is_named(ranks, name):
    told = ": rank 0 has "
    if name == "retain":
        told = (
            " (evaluate takes all retained samples on every rank, where unlearn takes shards): "
            "rank 0 has '50 samples, digest "
        )
    for failure in ranks.failures(differ, name):
        assert failure.kind == "ValueError"
        assert f"all ranks must call evaluate with the same {name}{told}" in failure.message
        assert len(failure.message) < 300


def break_one(rank, size, group, where):
    last = rank == size - 1
    if where == "progress" and rank == 0:
        with mock.patch.dict("sys.modules", {"tqdm.auto": None}):
            evaluate(MODEL, *SETS, F.cross_entropy, methods=[], progress=True, group=group)
    if where == "training":
        retrained = (lambda seed: 1 / 0) if last else train
        retrained.__qualname__ = "train"
        evaluate(MODEL, *SETS, F.cross_entropy, methods=[], retrained=retrained, group=group)
    if where == "samples":
        test = [1, 2, 3] if last else TEST
        evaluate(MODEL, FORGET, RETAIN, test, F.cross_entropy, methods=[], group=group)
    evaluate(MODEL, *SETS, F.cross_entropy, methods=[], progress=True, group=group)


@pytest.mark.parametrize(
    ("where", "broken", "said"),
    [
        ("progress", 0, "the check of the arguments failed on rank 0 of the group: ImportError"),
        ("training", -1, "the measurement of the retrained models failed on rank {last} of the"),
        ("samples", -1, "the check of the arguments failed on rank {last} of the group: "),
    ],
)
def test_a_rank_that_fails_ends_all(ranks, where, broken, said):
    failures = ranks.failures(break_one, where)
    assert failures.pop(broken).kind in ("ImportError", "ZeroDivisionError", "TypeError")
    for failure in failures:
        assert failure.kind == "RuntimeError"
        assert failure.message.startswith(said.format(last=ranks.size - 1))


# ---------------------------------------------------------------------------------------------
# Populations

POPULATION = {"n_models": 5, "draws": 3, "weight_decay": DECAY, "max_samples": 20}
METHODS = {"tuned": TUNED, "L-BFGS": Baseline(lbfgs)}


def train_one(samples, seed):
    return train(seed % 1000, (samples,), steps=8)


def sometimes(model, forget, retain, loss_fn):
    if float(next(model.parameters()).sum()) > 0:
        raise ZeroDivisionError("of no use")
    return model


def population(group=None, directory=None, train=train_one, n_models=5):
    options = {**POPULATION, "n_models": n_models, "directory": directory}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = evaluate_population(
            train, {**METHODS, "sometimes": sometimes}, BOTH, range(10), TEST, F.cross_entropy,
            **options, group=group,
        )  # fmt: skip
    failures = [str(each.message) for each in said if "failed" in str(each.message)]
    return timeless(found.to_dict()), failures


def population_on_rank(rank, size, group, directory, apart, n_models):
    folder = None
    if directory is not None:
        folder = f"{directory}/{rank}" if apart else directory
    return population(group, folder, n_models=n_models)


def test_a_population(ranks):
    expected, warned = population()
    answers = ranks.run(population_on_rank, None, False, 5)
    assert [found for found, _ in answers] == [expected] * ranks.size
    assert [failures for _, failures in answers] == [warned] + [[]] * (ranks.size - 1)
    assert len(warned) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_a_population_goes_on_from_one_directory_or_several(ranks, tmp_path, apart):
    (first, _), *_ = ranks.run(population_on_rank, str(tmp_path), apart, 4)
    files = sorted(tmp_path.rglob("seed-*.npz"))
    assert [file.name for file in sorted(files, key=lambda file: file.name)] == [
        f"seed-{k:05d}.npz" for k in range(4)
    ]
    assert len({file.parent for file in files}) == (ranks.size if apart else 1)
    times = [file.stat().st_mtime_ns for file in files]
    files[0].unlink()
    answers = ranks.run(population_on_rank, str(tmp_path), apart, 5)
    assert [found for found, _ in answers] == [population()[0]] * ranks.size
    assert [file.stat().st_mtime_ns for file in files[1:]] == times[1:]
    assert first["n_models"] == 4


def population_differs(rank, size, group, name):
    last = rank == size - 1
    test = tuple(each[: 20 - last] for each in TEST)
    if name == "test":
        evaluate_population(
            train_one, ["L-BFGS"], BOTH, range(10), test, F.cross_entropy, group=group
        )
    if name == "train" and last:
        population(group, train=failing)
    population(group, n_models=5 + (last and name == "n_models"))


def failing(samples, seed):
    raise OSError("no disk")


failing.__qualname__ = "train_one"


def test_populations_that_differ_are_named(ranks):
    for name in ("test", "n_models"):
        for failure in ranks.failures(population_differs, name):
            assert failure.kind == "ValueError"
            said = f"all ranks must call evaluate_population with the same {name}: rank 0 has "
            assert failure.message.startswith(said)


def test_a_training_that_fails_on_one_rank_ends_all(ranks):
    *others, last = ranks.failures(population_differs, "train")
    assert (last.kind, last.message) == ("OSError", "no disk")
    said = f"the training of models failed on rank {ranks.size - 1} of the group: OSError: no disk"
    assert {failure.message for failure in others} == {said}


def test_weights_of_other_ranks_are_parameters_by_name():
    one, other = RETRAINED[:2]
    assert weight_distance(one, Weights(other)) == weight_distance(one, other) > 0
    assert isinstance(Weights(one), nn.Module)
