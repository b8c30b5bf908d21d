"""Data as people have them: that change, do not end, are lists, or hold a wrong entry."""

import copy
import itertools
import math
import pickle
import random
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
)

from lcodec_ext._torch import batches
from lcodec_ext._torch.faults import check_finite
from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SecantOperator,
    UnitSelection,
)
from lcodec_ext.evaluation import evaluate, evaluate_population, methods, metrics
from lcodec_ext.evaluation.tune import tune
from lcodec_ext.unlearning import (
    TrainingStatistics,
    Unlearner,
    estimate,
    per_token_loss,
    unlearn,
)

N, D = 60, 4
OPTIONS = {"damping": 0.1, "max_drop": None, "calibrate": False}


def data(n=N):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, D, generator=generator), torch.arange(n) % 3


def make_model():
    torch.manual_seed(0)
    return nn.Linear(D, 3)


def rows(n=N):
    return list(zip(*data(n), strict=True))


def remove(forget, retain, model=None):
    return unlearn(model or make_model(), forget, retain, cross_entropy, **OPTIONS)


# ---------------------------------------------------------------------------------------------
# Data that change


class Flips(Dataset):
    """Each reading turns the sign of a sample with some probability."""

    def __init__(self, seed, p=0.5):
        self.rng, self.p = random.Random(seed), p

    def __len__(self):
        return N

    def __getitem__(self, k):
        x, y = rows()[k]
        return (-x if self.rng.random() < self.p else x), y


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("p", [0.5, 0.2])
def test_flips_are_noticed(seed, p):
    with pytest.raises(ValueError, match="sample [0-9]+ of retain differs when it is read again"):
        remove(tuple(t[:5] for t in data()), Flips(seed, p))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [1, 4])
def test_flips_of_few_samples_are_noticed(seed, n):
    with pytest.raises(ValueError, match="sample [0-9]+ of forget differs when it is read again"):
        remove(Subset(Flips(seed, 0.5), range(n)), data())


@pytest.mark.parametrize("loaded", [False, True])
def test_operators_notice_data_that_change(loaded):
    source = ConcatDataset([Flips(0, 0.5)] * 4)
    source = DataLoader(source, 16) if loaded else source
    model, units = nn.Sequential(nn.Linear(D, 3), nn.Tanh()), UnitSelection({"0": [0]})
    with pytest.raises(ValueError, match="data must give the same batches each time it is read"):
        HessianOperator(model, cross_entropy, source, units, cache_bytes=0).to_dense()


@pytest.mark.parametrize("late", [0, 3, 6])
@pytest.mark.parametrize("form", ["callable", "list", "loader"])
def test_operators_notice_any_batch_that_changes(late, form):
    """One sample of one batch, whichever it is, and after however many readings."""
    parts = [tuple(t[k : k + 8] for t in data()) for k in range(0, N, 8)]
    source = {
        "callable": lambda: iter(parts),
        "list": parts,
        "loader": DataLoader(parts, batch_size=None),
    }[form]
    model = nn.Sequential(nn.Linear(D, 3), nn.Tanh())
    H = HessianOperator(model, cross_entropy, source, UnitSelection({"0": [0]}), cache_bytes=0)
    vector = torch.ones(H.shape[0])
    assert torch.equal(H @ vector, H @ vector)
    parts[late][0][2] *= -1
    with pytest.raises(ValueError, match=f"batch {late} has another content than before"):
        H @ vector


def test_checksums_tell_contents_apart():
    x = torch.tensor([[1.0, math.nan], [0.0, 2.0]])
    others = [x.T, x[:1], x.double(), x.bfloat16(), x.int(), x[0], x > 0, x.roll(1), x[0, 0]]
    contents = [batches.content_of(each) for each in (x, *others)]
    assert len(set(contents)) == len(contents)
    assert batches.content_of(x.clone()) == contents[0]
    sparse = torch.eye(3).to_sparse()
    assert batches.content_of(sparse) == batches.content_of(sparse.clone())
    assert batches.content_of(sparse) != batches.content_of(2 * sparse)


IGNORED = [3, 7, 8, 9, 40]


def summed(outputs, targets):
    return cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator])
@pytest.mark.parametrize("loss_fn", [cross_entropy, lambda z, y: cross_entropy(z, y)])
def test_the_mean_over_valid_labels(kind, loss_fn):
    """In batches with unequal shares of them it is refused; sums are exact, however batched."""
    x, y = data()
    valid = torch.ones(N, dtype=bool).index_fill(0, torch.tensor(IGNORED), False)
    wanted = kind(make_model(), loss_fn, (x[valid], y[valid]), units := UnitSelection({"": [0, 1]}))
    y = y.where(valid, -100)
    whole = kind(make_model(), loss_fn, [(x, y)], units)
    parts = [(x[k : k + 7], y[k : k + 7]) for k in range(0, N, 7)]
    sums = kind(make_model(), summed, parts, units, reduction="sum") * (1 / int(valid.sum()))
    told = kind(make_model(), per_token_loss(loss_fn), parts, units)
    for found in (whole, sums, told):
        assert torch.allclose(found.to_dense(), wanted.to_dense(), atol=1e-6)
    with pytest.raises(ValueError, match="mean over tokens: leave reduction out"):
        kind(make_model(), per_token_loss(), parts, units, reduction="sum")
    with pytest.raises(ValueError, match="ignores 3 of the 7 labels of a batch .* reduction='sum'"):
        kind(make_model(), loss_fn, parts, units).to_dense()
    equal = [(x[[k, k + 1, 3]], y[[k, k + 1, 3]]) for k in (0, 4, 10)]  # a third of each
    kind(make_model(), loss_fn, equal, units).to_dense()


class Tokens(nn.Module):
    """The scores of 5 classes at each of 6 places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, ids):
        return self.out(self.table(ids))


def over_tokens(outputs, targets, reduction="mean"):
    return cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


def test_the_mean_over_valid_tokens():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, (24, 6), generator=generator)
    labels = ids.roll(-1, 1)
    for k in range(24):
        labels[k, : k % 5] = -100
    units, valid = UnitSelection({"out": [0, 3]}), int((labels >= 0).sum())
    parts = [(ids[k : k + 5], labels[k : k + 5]) for k in range(0, 24, 5)]

    def sums(outputs, targets):
        return over_tokens(outputs, targets, "sum")

    wanted = HessianOperator(Tokens(), over_tokens, [(ids, labels)], units).to_dense()
    found = HessianOperator(Tokens(), sums, parts, units, reduction="sum") * (1 / valid)
    assert torch.allclose(found.to_dense(), wanted, atol=1e-6)
    # Found out: batches count by their tokens.
    found = HessianOperator(Tokens(), over_tokens, parts, units)
    assert torch.allclose(found.to_dense(), wanted, atol=1e-6)
    assert unlearn(Tokens(), *parts[:2], over_tokens, **OPTIONS).mean_over == "tokens"

    def squared(outputs, targets):  # neither mean: long samples count for more than their tokens
        counted = (targets >= 0).sum(1)
        each = cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)
        return (each * counted).sum() / counted.square().sum()

    match = "plain mean over the samples .* per_token_loss.* the mean over the labels of each"
    with pytest.raises(ValueError, match=match):
        FisherOperator(Tokens(), squared, parts, units).to_dense()
    with pytest.raises(ValueError, match=match):
        unlearn(Tokens(), *parts[:2], squared, **OPTIONS)

    def by_sample(outputs, targets):
        each = cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return (each.sum(1) / (targets >= 0).sum(1)).mean()

    unlearn(Tokens(), *parts[:2], by_sample, **OPTIONS)


@pytest.mark.parametrize("kind", [HessianOperator, GaussNewtonOperator, FisherOperator])
@pytest.mark.parametrize(
    ("label", "match"),
    [
        (-100, "sample 7 of data has target -100, which loss_fn ignores"),
        (3, "sample 7 of data has target 3; the model has 3 outputs"),
    ],
)
def test_operators_name_labels_that_are_no_class(kind, label, match):
    x, y = (t.repeat(6, *[1] * (t.ndim - 1)) for t in data())  # more than one batch
    y[7] = label
    with pytest.raises(ValueError, match=match):
        kind(make_model(), cross_entropy, (x, y), UnitSelection({"": [0]})).to_dense()


def mixup(rows):
    x, y = default_collate(rows)
    order = torch.arange(len(x)).roll(1)
    return 0.7 * x + 0.3 * x[order], y


def cutmix(rows):
    x, y = default_collate(rows)
    x[:, :2] = x[:, :2].roll(1, 0)
    return x, y


def centred(rows):
    x, y = default_collate(rows)
    return x - x.mean(0), y


def noisy(rows):
    x, y = default_collate(rows)
    return x + 0.01 * torch.randn_like(x), y


@pytest.mark.parametrize("collate", [mixup, cutmix, centred, noisy])
@pytest.mark.parametrize("kind", ["rows", "tensors"])
def test_what_a_collate_fn_mixes_is_noticed(collate, kind):
    source = rows() if kind == "rows" else TensorDataset(*data())
    loader = DataLoader(source, batch_size=8, collate_fn=collate)
    with pytest.raises(ValueError, match="another one in a batch than alone|differs when it is"):
        remove(tuple(t[:5] for t in data()), loader)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_no_change(left):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 9, (3 + k % 4,), generator=generator) for k in range(N)]

    def padded(rows):
        longest = max(len(text) for text, _ in rows)
        x = torch.zeros(len(rows), longest, dtype=torch.int64)
        for k, (text, _) in enumerate(rows):
            x[k, longest - len(text) :] if left else x[k, : len(text)]
            if left:
                x[k, longest - len(text) :] = text
            else:
                x[k, : len(text)] = text
        return x, torch.tensor([y for _, y in rows])

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x).sum(1))

    torch.manual_seed(0)
    pairs = [(text, k % 3) for k, text in enumerate(texts)]
    forget, retain = (
        DataLoader(part, batch_size=4, collate_fn=padded) for part in (pairs[:5], pairs[5:])
    )
    remove(forget, retain, Bag())


class Later(Dataset):
    """Samples that are others once something is switched."""

    def __init__(self):
        self.other = set()

    def __len__(self):
        return N

    def __getitem__(self, k):
        x, y = rows()[k]
        return (x + 1 if k in self.other else x), y


@pytest.mark.parametrize("kind", ["asked for", "retained"])
def test_later_requests_compare_with_the_start(kind):
    source = Later()
    with Unlearner(make_model(), source, cross_entropy, **OPTIONS) as stream:
        stream.remove(3)
        source.other = {7} if kind == "asked for" else set(range(N)) - {7}
        with pytest.raises(ValueError, match="sample [0-9]+ of train has another content than at"):
            stream.remove(7)
        source.other = {3}  # what is removed may be erased
        stream.remove(7)
        assert stream.removed == (3, 7)


def test_tensors_that_are_changed_in_place_are_noticed(tmp_path):
    x, y = data()
    options = {**OPTIONS, "directory": tmp_path}
    with Unlearner(make_model(), (x, y), cross_entropy, **options) as stream:
        stream.remove(3)
    with Unlearner.resume(tmp_path, make_model(), (x, y), cross_entropy) as stream:
        x[3] = 0.0  # erased
        stream.remove(4)
        x[8] += 1.0
        with pytest.raises(ValueError, match="sample 8 of train has another content"):
            stream.remove(8)


# ---------------------------------------------------------------------------------------------
# Data without an end, and of other forms


class Stream(IterableDataset):
    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        return itertools.cycle(rows())


class Sized(Stream):
    def __len__(self):
        return self.length


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits for a million samples here."""
    monkeypatch.setattr(batches, "ENDLESS", 500)


@pytest.mark.parametrize("loaded", [False, True])
def test_data_without_an_end(impatient, loaded):
    endless, short = Stream(), Sized(30)
    if loaded:
        endless, short = DataLoader(endless, 7), DataLoader(short, 7)
    few = tuple(t[:5] for t in data())
    for call in (
        lambda: remove(few, endless),
        lambda: metrics.accuracy(make_model(), endless, cross_entropy),
        lambda: Unlearner(make_model(), endless, cross_entropy, **OPTIONS),
        lambda: GaussNewtonOperator(make_model(), cross_entropy, endless, UnitSelection({"": [0]})),
    ):
        with pytest.raises(ValueError, match="has no length and has not ended after 5[0-9]+ sampl"):
            call()
    for call in (
        lambda: remove(few, short),
        lambda: HessianOperator(make_model(), cross_entropy, short, UnitSelection({"": [0]})),
    ):
        with pytest.raises(ValueError, match="gives more samples than its length, 30"):
            call()


class Batched:
    """Batches that come one after the other, as many as it says and more."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __iter__(self):
        x, y = data()
        return itertools.cycle([(x[:7], y[:7]), (x[7:14], y[7:14])])


class BatchStream(Batched, IterableDataset):
    pass


class Again(Sampler):
    """Draws samples, or lists of them, without an end."""

    def __init__(self, drawn, length):
        self.drawn, self.length = drawn, length

    def __iter__(self):
        return itertools.cycle(self.drawn)

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    ("source", "length"),
    [
        (Batched(5), 5),
        (Batched(1), 1),
        (DataLoader(BatchStream(4), batch_size=None), 4),
        (DataLoader(rows(), 7, sampler=Again(range(N), N)), 9),
        (DataLoader(rows(), batch_sampler=Again([[0, 1], [2]], 3)), 3),
    ],
)
def test_batches_beyond_their_number(impatient, source, length):
    """However a collection of batches says how many it has, nobody reads on after them."""
    match = f"data gives more batches than its length, {length}"
    for kind in (HessianOperator, GaussNewtonOperator, FisherOperator):
        with pytest.raises(ValueError, match=match):
            kind(make_model(), cross_entropy, source, UnitSelection({"": [0]})).to_dense()
    if isinstance(getattr(source, "dataset", None), IterableDataset):
        with pytest.raises(ValueError, match=match.replace("data", "retain")):
            remove(tuple(t[:5] for t in data()), source)


def test_batches_of_a_callable_without_an_end(impatient):
    with pytest.raises(ValueError, match="data has no length and has not ended after 5,0"):
        HessianOperator(
            make_model(), cross_entropy, lambda: iter(Batched(5)), UnitSelection({"": [0]})
        )


def test_as_many_batches_as_there_are_said_to_be():
    x, y = data()

    class Sized(Batched):
        def __iter__(self):
            return iter([(x[k : k + 20], y[k : k + 20]) for k in range(0, N, 20)])

    sources = [Sized(3), Sized(N), DataLoader(rows(), 20), (x, y)]
    found = [
        HessianOperator(make_model(), cross_entropy, each, UnitSelection({"": [0]})).to_dense()
        for each in sources
    ]
    assert all(torch.allclose(each, found[-1], atol=1e-6) for each in found)


@pytest.mark.parametrize("loaded", [False, True])
def test_data_without_an_end_that_are_large(monkeypatch, loaded):
    monkeypatch.setattr(batches, "ENDLESS_BYTES", 5000)
    endless = DataLoader(Stream(), 7) if loaded else Stream()
    with pytest.raises(ValueError, match="not ended after [0-9]+ samples of .* GiB: give it"):
        remove(tuple(t[:5] for t in data()), endless)


def test_lists_of_inputs_and_of_targets_are_no_samples():
    (x, y), few = data(), tuple(t[:5] for t in data())
    for columns in ((x.tolist(), y.tolist()), [[*x], [*y]]):
        for call in (
            lambda columns=columns: remove(few, columns),
            lambda columns=columns: HessianOperator(
                make_model(), cross_entropy, columns, UnitSelection({"": [0]})
            ),
        ):
            with pytest.raises(
                TypeError, match="must give pairs .inputs, targets. of tensors; got"
            ):
                call()


def test_a_late_nan_in_a_dataset_is_not_counted():
    x, y = data()
    x[41, 2] = math.nan
    for retain, match in (
        (list(zip(x, y, strict=True)), r"sample 41 has nan, at \[2\]. Leave"),
        ((x, y), r"sample 41 has nan, at \[2\], 1 of 60 samples have such values. Leave"),
    ):
        with pytest.raises(ValueError, match=match):
            remove(tuple(t[:5] for t in data()), retain)


@pytest.mark.parametrize("loss_fn", [nn.BCEWithLogitsLoss(), nn.BCELoss(), nn.MSELoss()])
def test_outputs_and_targets_of_different_shapes(loss_fn):
    x, y = data()
    y = (y > 0).float()
    model = nn.Sequential(nn.Linear(D, 1), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"shape \(5, 1\) with targets of .* targets\[:, None\]"):
        unlearn(model, (x[:5], y[:5]), (x[5:], y[5:]), loss_fn, **OPTIONS)


class Duck:
    """Indexed as a Dataset is, and of no class of torch's."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return self.rows[k]


class IteratedDuck(Duck):
    def __iter__(self):
        return iter(self.rows)


FORMS = {
    "duck": Duck,
    "iterated duck": IteratedDuck,
    "list of pairs": list,
    "tuple of pairs": tuple,
    "pairs with numbers": lambda rows: [(x, int(y)) for x, y in rows],
    "pairs of arrays": lambda rows: [(x.numpy(), np.int64(y)) for x, y in rows],
    "lists": lambda rows: [[x, y] for x, y in rows],
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_in_other_forms(form):
    x, y = data()
    wanted = remove((x[:5], y[:5]), (x[5:], y[5:]))
    found = remove(*map(FORMS[form], (rows()[:5], rows()[5:])))
    assert torch.equal(found.model.weight, wanted.model.weight)
    with Unlearner(make_model(), FORMS[form](rows()), cross_entropy, **OPTIONS) as stream:
        stream.remove(range(5))
        assert stream.removed == tuple(range(5))
    operators = [
        HessianOperator(make_model(), cross_entropy, each, UnitSelection({"": [0, 2]}))
        for each in (FORMS[form](rows()), (x, y))
    ]
    assert torch.equal(*(each.to_dense() for each in operators))


ADVICE = (
    r"DataLoader\(data, collate_fn=lambda rows: default_collate\(\[\(x, y\) for x, y, \*_"
    r".*\[\(row\['x'\], row\['y'\]\) for row in rows\]"
)
THREE = {
    "numbered": lambda k, x, y: (x, y, k),
    "named": lambda k, x, y: (x, y, f"id {k}"),
    "of a class": lambda k, x, y: (x, y, object()),
    "a dict": lambda k, x, y: {"x": x, "y": y},
    "a dict with another key": lambda k, x, y: {"input": x, "labels": y, "id": k},
}


def three_entries(form, kind):
    wrap = {"list": list, "duck": Duck, "loader": lambda each: DataLoader(each, 7)}[kind]
    named = [THREE[form](k, x, y) for k, (x, y) in enumerate(rows())]
    return wrap(named[:5]), wrap(named[5:]), wrap(named)


@pytest.mark.parametrize("form", THREE)
@pytest.mark.parametrize("kind", ["list", "duck", "loader"])
@pytest.mark.parametrize("function", ["unlearn", "validation", "Unlearner", "estimate", "collect"])
def test_deletions_say_how_to_wrap_samples_of_three_entries(form, kind, function):
    few, most, every = three_entries(form, kind)
    given = [tuple(t[a:b] for t in data()) for a, b in ((0, 5), (5, N))]
    call = {
        "unlearn": lambda: remove(few, most),
        "validation": lambda: unlearn(
            make_model(), *given, cross_entropy, validation=most, damping=0.1
        ),
        "Unlearner": lambda: Unlearner(make_model(), every, cross_entropy, **OPTIONS),
        "estimate": lambda: estimate(make_model(), few, most, cross_entropy, **OPTIONS),
        "collect": lambda: TrainingStatistics.collect(make_model(), every, cross_entropy),
    }[function]
    with pytest.raises((ValueError, TypeError), match=ADVICE):
        call()


@pytest.mark.parametrize("form", THREE)
@pytest.mark.parametrize("kind", ["list", "duck", "loader"])
@pytest.mark.parametrize(
    "function", ["Hessian", "Fisher", "accuracy", "evaluate", "population", "tune", "fine_tune"]
)
def test_others_say_how_to_wrap_samples_of_three_entries(form, kind, function):
    few, most, every = three_entries(form, kind)
    units = UnitSelection({"": [0]})
    call = {
        "Hessian": lambda: HessianOperator(make_model(), cross_entropy, every, units),
        "Fisher": lambda: FisherOperator(make_model(), cross_entropy, every, units).to_dense(),
        "accuracy": lambda: metrics.accuracy(make_model(), every, cross_entropy),
        "evaluate": lambda: evaluate(make_model(), few, most, most, cross_entropy, methods=[]),
        "population": lambda: evaluate_population(
            lambda data, seed: make_model(), ["fine-tune SGD"], every, [0, 1], most, cross_entropy
        ),
        "tune": lambda: tune(
            lambda data, seed: make_model(), every, 3, cross_entropy, methods=["fine-tune SGD"]
        ),
        "fine_tune": lambda: methods.fine_tune(make_model(), few, most, cross_entropy, 0),
    }[function]
    listed = function in ("population", "tune") and kind == "loader"
    advice = r"its dataset, of samples with more entries \[\(x, y\) for x, y, \*_ in data\]"
    with pytest.raises((ValueError, TypeError), match=advice if listed else ADVICE):
        call()


@pytest.mark.parametrize("name", [int, "id {}".format])
@pytest.mark.parametrize("form", [list, Duck])
def test_samples_of_three_entries_are_wrapped_so(name, form):
    named = [(x, y, name(k)) for k, (x, y) in enumerate(rows())]
    wrapped = [
        DataLoader(part, collate_fn=lambda rows: default_collate([(x, y) for x, y, *_ in rows]))
        for part in (form(named[:5]), form(named[5:]))
    ]
    x, y = data()
    wanted = remove((x[:5], y[:5]), (x[5:], y[5:]))
    assert torch.equal(remove(*wrapped).model.weight, wanted.model.weight)
    keyed = [
        DataLoader(
            [{"x": x, "y": y} for x, y in part],
            collate_fn=lambda rows: default_collate([(row["x"], row["y"]) for row in rows]),
        )
        for part in (rows()[:5], rows()[5:])
    ]
    assert torch.equal(remove(*keyed).model.weight, wanted.model.weight)


@pytest.mark.parametrize("form", FORMS)
def test_a_population_takes_samples_in_other_forms(form):
    def train(part, seed):
        fitted = make_model()
        for x, y in zip(*part, strict=True) if len(part) == 2 else part:
            x, y = torch.as_tensor(x), torch.as_tensor(y)
            gradient = torch.autograd.grad(cross_entropy(fitted(x), y), [fitted.weight])[0]
            with torch.no_grad():
                fitted.weight -= 0.1 * gradient
        return fitted

    def score(given):
        found = evaluate_population(
            train, ["fine-tune SGD"], given, [3, 7, 50], data(), cross_entropy, n_models=4, draws=2
        )
        return [method["scores"] for method in found.to_dict()["methods"]]

    assert score(FORMS[form](rows())) == score(data())


class NoLength(Dataset):
    def __getitem__(self, k):
        return rows()[k]


class TooLong(Duck):
    def __len__(self):
        return N + 1


def test_what_cannot_be_read_is_named():
    few = tuple(t[:5] for t in data())
    x, y = data()
    for given, message in (
        (NoLength(), "retain has no length: give its class, NoLength, a __len__"),
        (TooLong(rows()), "sample 60 of retain, a TooLong of 61 samples, cannot be read: IndexErr"),
        ([(x[:30], y[:30]), (x[30:40], y[30:40]), (x[40:], y[40:])], "a list of 3 batches; pass"),
        ([(x[0], None), (x[1], None)], "do not make a batch.*A sample is a pair"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            remove(few, given)


# ---------------------------------------------------------------------------------------------
# Wrong entries, by number and value


def wrong(kind):
    """Samples with a wrong entry late in them, which a look at a few does not see."""
    x, y = data(1000)
    x, y = x.clone(), y.clone()
    if kind == "label":
        y[777] = 3
    elif kind == "negative":
        y[777] = -1
    elif kind == "ignored":
        y[777] = -100
    else:
        x[777, 2] = float(kind)
    return x, y


WRONG = {
    "label": r"sample 777 of {} has target 3; .* targets must be classes 0 to 2",
    "negative": r"sample 777 of {} has target -1; .* targets must be classes 0 to 2",
    "ignored": r"sample 777 of {} has target -100, which loss_fn ignores",
    "nan": r"{} holds NaN or infinity: sample 777 has nan, at \[2\]",
    "inf": r"{} holds NaN or infinity: sample 777 has inf, at \[2\]",
}


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader"])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_entries_are_named(kind, form):
    x, y = wrong(kind)
    given = {
        "tensors": (x, y),
        "dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), 64, shuffle=True),
    }[form]
    few = tuple(t[:5] for t in data())
    with pytest.raises(ValueError, match=WRONG[kind].format("retain")):
        unlearn(make_model(), few, given, cross_entropy, **OPTIONS, n_monitor=None)
    with pytest.raises(ValueError, match=WRONG[kind].format("forget")):
        unlearn(make_model(), given, few, cross_entropy, **OPTIONS)
    with pytest.raises(ValueError, match=WRONG[kind].format("data")):
        metrics.gradient_norm(make_model(), given, cross_entropy)
    with pytest.raises(ValueError, match=WRONG[kind].format("train")):
        Unlearner(make_model(), given, cross_entropy, **OPTIONS).remove([3, 777])


def test_a_sum_that_overflows_is_no_infinite_number():
    large, both = torch.full((3, 2), 3e38), torch.tensor([[1.0], [math.inf], [-math.inf]])
    assert not torch.isfinite(large.sum())
    check_finite([large, torch.full((3,), 60_000.0).half()], range(3), "data")
    with pytest.raises(ValueError, match="data holds NaN or infinity: sample 1 has inf"):
        check_finite([both], range(3), "data")


@pytest.mark.parametrize("kind", ["label", "nan"])
@pytest.mark.parametrize("cut", [True, False])
def test_operators_name_wrong_entries(kind, cut):
    x, y = wrong(kind)
    given = (x, y) if cut else list(zip(x.split(64), y.split(64), strict=True))
    message = {
        "label": "sample 777 of data has target 3; .* classes 0 to 2",
        "nan": "the loss is NaN or infinite: sample 777 of data, with target 0, has the loss nan, "
        "as its outputs are not finite",
    }[kind]
    deep = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), make_model())
    for model, layer in ((make_model(), ""), (deep, "0"), (deep, "2")):
        for operator in (HessianOperator, GaussNewtonOperator, FisherOperator):
            with pytest.raises(ValueError, match=message):
                operator(model, cross_entropy, given, UnitSelection({layer: [0]}))
        options = {"steps": torch.ones(D + 1)}
        with pytest.raises(ValueError, match=message):
            SecantOperator(model, cross_entropy, given, UnitSelection({layer: [0]}), **options)


def test_a_loss_that_fails_on_one_sample_names_it():
    x, y = data(200)

    def loss_fn(outputs, targets):
        if (targets == 7).any():
            raise ValueError("seven")
        return cross_entropy(outputs, targets % 3)

    y = y.clone()
    y[123] = 7
    for given in ((x, y), TensorDataset(x, y)):
        with pytest.raises(ValueError, match=r"seven \(sample 123 of retain, with target 7, fails"):
            unlearn(make_model(), (x[:5] + 1, y[:5]), given, loss_fn, **OPTIONS, n_monitor=None)


def test_numbers_without_an_end():
    """Of samples to remove, of groups, of control samples; generators with an end are taken."""
    train = [lambda part, seed: make_model(), data()]
    with Unlearner(make_model(), data(), cross_entropy, **OPTIONS) as stream:
        for endless in (itertools.count(), itertools.cycle([1, 2])):
            with pytest.raises(ValueError, match="ids goes on after 60 entries.*itertools.islice"):
                stream.remove(endless)
        stream.remove(k for k in range(3))
        assert stream.removed == (0, 1, 2)
    with pytest.raises(ValueError, match="groups goes on after 60 entries"):
        Unlearner(make_model(), data(), cross_entropy, groups=itertools.repeat("u"), **OPTIONS)
    with pytest.raises(ValueError, match="control goes on after 60 entries"):
        tune(*train, itertools.cycle([1, 2]), cross_entropy)
    with pytest.raises(ValueError, match="forget goes on after 60 entries"):
        evaluate_population(
            train[0], ["L-BFGS"], data(), itertools.cycle([1]), data(), cross_entropy
        )
    ids = [f"u{k % 9}" for k in range(N)]
    with Unlearner(make_model(), data(), cross_entropy, groups=iter(ids), **OPTIONS) as stream:
        with pytest.raises(ValueError, match="groups goes on after 9 entries"):
            stream.remove(groups=itertools.cycle(["u1"]))
        stream.remove(groups=(f"u{k}" for k in range(2)))
        assert len(stream.removed) == sum(each in ("u0", "u1") for each in ids)


@pytest.mark.parametrize(
    ("change", "way", "made"),
    [
        (lambda y: y.int(), ".long()", lambda y: y.long()),
        (lambda y: y.float(), ".long()", lambda y: y.long()),
        (lambda y: y > 0, ".long()", lambda y: y.long()),
        (lambda y: y[:, None], ".flatten()", lambda y: y.flatten()),
        (lambda y: y[:, None].float(), ".flatten().long()", lambda y: y.flatten().long()),
    ],
)
def test_targets_that_are_no_classes_say_how_to_make_them(change, way, made):
    x, y = data()
    y, match = change(y), re.escape(f"Pass the targets as targets{way}") + "$"
    with pytest.raises(ValueError, match=match):
        remove((x[:5], y[:5]), (x[5:], y[5:]))
    with pytest.raises(ValueError, match=match):
        HessianOperator(make_model(), cross_entropy, (x, y), UnitSelection({"": [0]}))
    y = made(y)
    assert remove((x[:5], y[:5]), (x[5:], y[5:])).n_forget == 5


def test_a_loss_that_is_no_tensor_is_named_once():
    x, y = data()
    with pytest.raises(ValueError, match="scalar tensor, the mean loss; got float$"):
        unlearn(make_model(), (x[:5], y[:5]), (x[5:], y[5:]), lambda z, t: 1.0, **OPTIONS)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: zip(*data(), strict=True),
            "type zip, which can be read once or .* pass list.data",
        ),
        (
            lambda: (row for row in rows()),
            "type generator, which .*: pass list.data., a list of its",
        ),
        (lambda: Batched(3), "type Batched, which can .*: pass list.data., a list of its samples"),
        (lambda: pd.DataFrame(data()[0]), "DataFrame; torch.from_numpy makes tensors of columns"),
        (lambda: {"input": [[1.0] * D], "labels": [1]}, "torch.as_tensor makes them of lists"),
    ],
)
def test_other_collections_say_what_to_pass(make, match):
    with pytest.raises((TypeError, ValueError), match=match):
        remove(tuple(t[:5] for t in data()), make())
    with pytest.raises((TypeError, ValueError), match=match):
        metrics.accuracy(make_model(), make(), cross_entropy)


def test_a_stream_is_not_copied_nor_pickled():
    with Unlearner(make_model(), data(), cross_entropy, **OPTIONS) as stream:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(
                TypeError, match="an Unlearner has a lock .*Copy its model, or give"
            ):
                call(stream)


def test_numbers_of_a_population():
    arguments = [lambda part, seed: make_model(), ["L-BFGS"], data()]
    for mask in (np.arange(N) < 5, torch.arange(N) < 5):
        with pytest.raises(TypeError, match="forget must be .* a mask of bool: pass its nonzero"):
            evaluate_population(*arguments, mask, data(), cross_entropy)
    with pytest.raises(TypeError, match="forget must be numbers of samples, integers; got .{,90}$"):
        evaluate_population(*arguments, [0.5 * k for k in range(50)], data(), cross_entropy)


def test_models_with_other_classes_are_not_compared():
    x, y = data()
    other, match = nn.Linear(D, 5), "must have the same classes; one has [35] of them for 60 sampl"
    for call in (
        lambda: metrics.js_distance(make_model(), other, (x, y)),
        lambda: metrics.activation_distance(make_model(), other, (x, y)),
        lambda: evaluate(
            make_model(), (x, y), (x, y), (x, y), cross_entropy, methods=[], retrained=[other]
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
