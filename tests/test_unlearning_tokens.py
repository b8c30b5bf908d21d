"""Deletions and evaluations with losses that are means over tokens."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from lcodec_ext._torch.batches import as_batch
from lcodec_ext._torch.predict import predict
from lcodec_ext._torch.samples import as_samples
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import by_tokens
from lcodec_ext.curvature import FisherOperator, UnitSelection
from lcodec_ext.evaluation.metrics import js_distances
from lcodec_ext.unlearning import (
    BASELINES,
    TokenReplacement,
    TrainingStatistics,
    Unlearner,
    estimate,
    evaluate,
    influence,
    per_token_loss,
    self_influence,
    unlearn,
    verify_ledger,
)
from test_language_models import (
    BOS,
    PAD,
    VOCABULARY,
    causal_lm,
    of_transformers,
    seq2seq,
    t5,
    texts,
)

CPU = torch.device("cpu")


def part(data, numbers):
    return {key: t[numbers] for key, t in data.items()}


# ---------------------------------------------------------------------------------------------
# A convex model, whose retraining is known


class Table(nn.Module):
    """Outputs for each token by a table: a quadratic objective with squares, a convex one else."""

    def __init__(self, classes=3):
        super().__init__()
        self.table = nn.Linear(4, classes, dtype=torch.float64)

    def forward(self, x):
        return self.table(x)


def sequences(n=24, seed=0):
    """Sequences of 1 to 5 tokens; the first six are the longest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, 4, generator=generator, dtype=torch.float64)
    y = (x[..., :3] + torch.randn(n, 5, 3, generator=generator, dtype=torch.float64)).argmax(-1)
    lengths = torch.randint(1, 4, (n,), generator=generator)
    lengths[:6] = 5
    lengths[7] = 0  # no token of this one counts
    return x, torch.where(torch.arange(5) < lengths[:, None], y, -100)


def squares(outputs, targets):
    """The mean over tokens of squared distances from one-hot labels."""
    counted = targets != -100
    wanted = F.one_hot(targets.clamp(min=0), 3).to(outputs.dtype)
    each = (outputs - wanted).square().sum(-1)
    return (each * counted).sum() / counted.sum()


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def trained(loss_fn, x, y, weight_decay):
    """The minimum of the mean over all tokens plus the penalty, to rounding."""
    torch.manual_seed(0)
    model = Table()
    steps = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-14, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        steps.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters()) * weight_decay / 2
        loss = loss_fn(model(x), y) + penalty
        loss.backward()
        return loss

    for _ in range(3):
        steps.step(closure)
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def objective(v):
        parts = v.split([shape.numel() for shape in shapes.values()])
        named = {
            k: part.view(shape) for (k, shape), part in zip(shapes.items(), parts, strict=True)
        }
        outputs = torch.func.functional_call(model, named, (x,))
        return loss_fn(outputs, y) + weight_decay / 2 * v.square().sum()

    # On some code paths the line search stops short of rounding: Newton steps go on from there.
    v = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(2):
        H = torch.autograd.functional.hessian(objective, v)
        v = v - torch.linalg.solve(H, torch.autograd.functional.jacobian(objective, v))
    torch.nn.utils.vector_to_parameters(v, model.parameters())
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("told", [True, False])
def test_one_step_retrains_where_the_objective_is_quadratic(told):
    x, y = sequences()
    decay = 0.3
    before, again = (trained(squares, x[k:], y[k:], decay) for k in (0, 6))
    loss_fn = per_token_loss(squares) if told else squares
    result = unlearn(
        before, (x[:6], y[:6]), (x[6:], y[6:]), loss_fn, preset="paper", selection="full",
        damping=0.0, weight_decay=decay, curvature="hessian", rtol=1e-13,
    )  # fmt: skip
    moved = float((weights(again) - weights(before)).norm())
    assert moved > 0.01
    assert float((weights(result.model) - weights(again)).norm()) < 1e-9 * moved
    # The regulariser goes with the tokens. By samples, as of a plain mean, it would be far off.
    bound = per_token_loss(squares).of_mean((y >= 0).sum().item() / len(y))
    plain = unlearn(
        before, (x[:6], y[:6]), (x[6:], y[6:]), lambda z, t: bound(z, t), preset="paper",
        selection="full", damping=0.0, weight_decay=decay, curvature="hessian",
    )  # fmt: skip
    assert plain.mean_over == "samples"
    assert float((weights(plain.model) - weights(again)).norm()) > 0.1 * moved
    assert result.mean_over == "tokens"
    assert "mean over tokens" in repr(result)
    assert result.loss_retain.before == pytest.approx(squares(before(x[6:]), y[6:]).item())
    assert result.loss_forget.after == pytest.approx(squares(again(x[:6]), y[:6]).item())
    assert result.training_gradient_norm < 1e-9


def test_statistics_stand_for_the_retained_samples(tmp_path):
    x, y = sequences()
    before, again = (trained(squares, x[k:], y[k:], 0.3) for k in (0, 6))
    saved = TrainingStatistics.collect(before, (x, y), squares)
    assert saved.mean_tokens == (y >= 0).sum().item() / len(y)
    saved.save(tmp_path / "statistics")
    loaded = TrainingStatistics.load(tmp_path / "statistics")
    options = {
        "preset": "paper", "selection": "full", "damping": 0.0, "weight_decay": 0.3,
        "curvature": "gauss_newton", "max_drop": None, "repair_drop": None,
    }  # fmt: skip
    result = unlearn(before, (x[:6], y[:6]), None, squares, statistics=loaded, **options)
    moved = float((weights(again) - weights(before)).norm())
    assert float((weights(result.model) - weights(again)).norm()) < 1e-6 * moved
    rest = loaded.without(before, squares, (x[:6], y[:6]))
    alone = TrainingStatistics.collect(before, (x[6:], y[6:]), per_token_loss(squares))
    share = alone.mean_tokens / saved.mean_tokens
    torch.testing.assert_close(rest.matrix, alone.matrix * share)
    plain = TrainingStatistics.collect(before, (x[:, :1], y[:, :1].clamp(min=0)), cross_entropy)
    given = per_token_loss(squares)
    with pytest.raises(ValueError, match="statistics are of a plain mean"):
        unlearn(before, (x[:6], y[:6]), None, given, statistics=plain, **options)


def test_influence_counts_tokens():
    x, y = sequences()
    model = trained(squares, x, y, 0.3)
    query, wanted = (x[10:12], y[10:12]), []
    before = [squares(model(x[k : k + 1]), y[k : k + 1]).item() for k in (10, 11)]
    for k in range(len(y)):
        rest = [i for i in range(len(y)) if i != k]
        again = trained(squares, x[rest], y[rest], 0.3)
        after = [squares(again(x[k : k + 1]), y[k : k + 1]).item() for k in (10, 11)]
        wanted.append(np.subtract(after, before))
    found = influence(model, (x, y), query, squares, weight_decay=0.3, curvature="hessian", top_k=3)
    values = found.values.numpy().T
    assert not values[7].any()  # no token of this one counts
    assert np.corrcoef(values.ravel(), np.ravel(wanted))[0, 1] > 0.99
    slope = (values * wanted).sum() / np.square(wanted).sum()
    assert slope == pytest.approx(1, abs=0.15)
    both = influence(
        model, (x, y), query, squares, weight_decay=0.3, curvature="hessian", aggregate=True
    )
    share = (y[10:12] >= 0).sum(1).numpy()
    np.testing.assert_allclose(both.values[0], values @ share / share.sum(), rtol=1e-9)
    itself = self_influence(model, (x, y), squares, weight_decay=0.3, curvature="hessian")
    mine = influence(model, (x, y), (x[:1], y[:1]), squares, weight_decay=0.3, curvature="hessian")
    assert itself.values[0] == pytest.approx(mine.values[0, 0].item(), rel=1e-9)
    assert itself.values[7] == 0


# ---------------------------------------------------------------------------------------------
# Found out


def by_sample(outputs, targets):
    """The mean over samples of the means over their tokens: a plain mean."""
    counted = targets != -100
    each = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")
    return ((each * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()


def weighted(outputs, targets):
    """Neither a plain mean nor one over tokens: long samples count by the square."""
    counted = (targets != -100).sum(1)
    each = F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none").sum(1)
    return (each * counted).sum() / counted.square().sum()


def shifted(outputs, targets):
    return cross_entropy(outputs[:, :-1], targets[:, 1:])


def test_a_mean_over_tokens_is_found_out():
    x, y = sequences()
    model = Table()
    samples = as_samples((x, y), "retain", CPU, torch.float64)
    kinds = {}
    for loss_fn in (cross_entropy, shifted, by_sample, weighted, squares):
        found = by_tokens(loss_fn, model, samples)
        kinds[loss_fn.__name__] = found.causal if isinstance(found, TokenLoss) else None
    assert kinds == {
        "cross_entropy": False, "shifted": True, "by_sample": None, "weighted": None,
        "squares": False,
    }  # fmt: skip
    # samples of one length: both means are the same, and it is a plain one
    same = as_samples((x[:6], y[:6]), "retain", CPU, torch.float64)
    assert by_tokens(cross_entropy, model, same) is cross_entropy
    # but one without a token tells; and the value tells whether labels are shifted
    few = [0, 1, 7]
    for loss_fn in (cross_entropy, shifted):
        some = as_samples((x[few], y[few]), "retain", CPU, torch.float64)
        assert by_tokens(loss_fn, model, some).causal == (loss_fn is shifted)
    # PyTorch's own form, classes along the second axis, with another label to ignore
    other = nn.CrossEntropyLoss(ignore_index=0)
    found = by_tokens(other, nn.Sequential(model, Transposed()), samples_of(x, y))
    assert (found.ignore_index, found.mean_tokens) == (0, (y > 0).sum().item() / len(y))
    # one that is told stays, and so does one whose mean is known
    told = per_token_loss(causal=True)
    assert by_tokens(told, model, samples).mean_tokens == (y[:, 1:] >= 0).sum().item() / len(y)
    assert by_tokens(found, model, samples) is found


class Transposed(nn.Module):
    def forward(self, z):
        return z.transpose(1, 2)


def samples_of(x, y):
    return as_samples((x, y.clamp(min=0)), "retain", CPU, torch.float64)


def test_what_is_neither_mean_says_what_to_do():
    x, y = sequences()
    with pytest.raises(ValueError, match=r"per_token_loss\(loss_fn\) says so.*causal=True"):
        unlearn(Table(), (x[:3], y[:3]), (x[3:], y[3:]), weighted, preset="paper")
    # told, but not true
    with pytest.raises(ValueError, match="must be the plain mean"):
        unlearn(Table(), (x[:9], y[:9]), (x[9:], y[9:]), per_token_loss(weighted), preset="paper")
    with pytest.raises(ValueError, match=r"per_token_loss\(causal=True\) for a causal"):
        unlearn(Table(), (x[:3], y[:3]), (x[3:], y[3:]), F.cross_entropy, preset="paper")
    nothing = torch.full_like(y[:3], -100)
    with pytest.raises(ValueError, match="no token of forget counts: all labels are -100"):
        unlearn(Table(), (x[:3], nothing), (x[3:], y[3:]), per_token_loss(), preset="paper")
    with pytest.raises(ValueError, match="got targets that are a tensor of torch.float64"):
        per_token_loss()(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"labels of shape \(n, T\); got \(3,\)"):
        per_token_loss(causal=True)(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="compares logits of shape"):
        per_token_loss()(torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="without class weights"):
        per_token_loss(nn.CrossEntropyLoss(weight=torch.ones(3)))
    with pytest.raises(TypeError, match="over tokens already"):
        per_token_loss(per_token_loss())
    with pytest.raises(ValueError, match="mean over tokens, in which a long sample"):
        unlearn(
            Table(), (x[:3], y[:3]), (x[3:], y[3:]), cross_entropy, preset="paper",
            update="certified", selection="full", weight_decay=0.1, epsilon=1.0, delta=1e-5,
            lipschitz=1.0, hessian_lipschitz=1.0,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Language models


@functools.cache
def language_model():
    """A causal model that knows its 60 texts better than others, its data, and unseen texts."""
    torch.manual_seed(0)
    model, data, unseen = causal_lm(1), texts(60, 1), texts(160, 2)
    chain = torch.arange(9).roll(-2)  # mostly the next but one token follows
    for each in (data, unseen):
        ids, mask = each["input_ids"], each["attention_mask"] == 1
        start = ids[:, 1].clamp(max=8)
        for place in range(1, ids.shape[1]):
            often = torch.rand(len(ids)) < 0.8
            old = start if place == 1 else ids[:, place - 1].clamp(max=8)
            follows = torch.where(often, chain[old], ids[:, place].clamp(max=8))
            ids[:, place] = torch.where(mask[:, place], follows, PAD)
        each["labels"] = torch.where(mask, ids, -100)
    steps = torch.optim.Adam(model.parameters(), 0.02, weight_decay=1e-3)
    for _ in range(150):
        steps.zero_grad()
        model(**data).loss.backward()
        steps.step()
    return model, data, unseen


def inputs(data):
    return {key: t for key, t in data.items() if key != "labels"}


@functools.cache
def deleted(told):
    model, data, unseen = language_model()
    loss_fn = per_token_loss(causal=True) if told else causal_loss
    few, rest = part(data, slice(6)), part(data, slice(6, None))
    options = {"weight_decay": 1e-3, "max_iterations": 3, "control_groups": 4, "finish": 0}
    return unlearn(model, few, rest, loss_fn, validation=unseen, **options)


def causal_loss(logits, labels):
    """As the models of transformers have it, in the dtype of the logits."""
    return of_transformers(True, logits, labels)


@pytest.mark.filterwarnings("ignore")
def test_a_deletion_from_a_causal_model():
    model, data, unseen = language_model()
    result, other = deleted(True), deleted(False)
    assert result.mean_over == other.mean_over == "tokens, labels shifted by one"
    torch.testing.assert_close(weights(other.model), weights(result.model), rtol=0, atol=1e-7)
    assert result.watched == "token accuracy"
    assert result.step_norm > 0
    few, rest = part(data, slice(6)), part(data, slice(6, None))
    for pair, texts_ in ((result.loss_forget, few), (result.loss_retain, rest)):
        for found, each in zip((pair.before, pair.after), (model, result.model), strict=True):
            wanted = causal_loss(each(**texts_).logits, texts_["labels"]).item()
            assert found == pytest.approx(wanted, rel=1e-9)
    assert result.loss_forget.after > result.loss_forget.before
    logits = model(**unseen).logits[:, :-1]
    labels = unseen["labels"][:, 1:]
    right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum() / (labels >= 0).sum()
    assert result.guard.before == pytest.approx(right.item(), abs=1e-6)
    calibration = result.calibration
    assert calibration.validation_before == pytest.approx(
        causal_loss(model(**unseen).logits, unseen["labels"]).item(), rel=1e-9
    )


@pytest.mark.filterwarnings("ignore")
def test_requests_one_after_the_other(tmp_path):
    model, data, _ = language_model()
    options = {"preset": "paper", "damping": 1.0, "weight_decay": 1e-3, "selection": "random",
               "n_units": 8}  # fmt: skip
    stream = Unlearner(model, data, causal_loss, directory=tmp_path, **options)
    first = stream.remove([0, 1])
    stream.close()
    assert first.mean_over == "tokens, labels shifted by one"
    again = Unlearner.resume(tmp_path, model, data, causal_loss)
    again.remove([2])
    again.close()
    assert verify_ledger(tmp_path, again.model, data).ok
    told = tmp_path / "told"
    other = Unlearner(model, data, per_token_loss(causal=True), directory=told, **options)
    torch.testing.assert_close(weights(other.remove([0, 1]).model), weights(first.model))
    other.close()
    with pytest.raises(ValueError, match="causal=False, on record is causal=True"):
        Unlearner.resume(told, model, data, per_token_loss())
    with pytest.raises(ValueError, match="given is causal_loss, on record is per_token_loss"):
        Unlearner.resume(told, model, data, causal_loss)


@pytest.mark.filterwarnings("ignore")
def test_estimate_and_bounds():
    model, data, unseen = language_model()
    few, rest = part(data, slice(6)), part(data, slice(6, None))
    found = estimate(model, few, rest, causal_loss, validation=unseen, weight_decay=1e-3)
    assert found.seconds["total"] > 0


@pytest.mark.filterwarnings("ignore")
def test_an_evaluation():
    model, data, unseen = language_model()
    few, rest, test = part(data, slice(6)), part(data, slice(6, None)), part(unseen, slice(40))
    again = []
    for seed in (3, 4):
        other = causal_lm(seed)
        steps = torch.optim.Adam(other.parameters(), 0.02)
        for _ in range(40):
            steps.zero_grad()
            other(**rest).loss.backward()
            steps.step()
        again.append(other)
    given = []

    def own(model, forget, retain, loss_fn, seed):
        given.append(loss_fn)
        return model

    options = {"preset": "paper", "selection": "random", "n_units": 8, "damping": 1.0}
    methods = {"ours": deleted(True), "options": options, "L-BFGS": BASELINES["L-BFGS"], "own": own}
    found = evaluate(
        model, few, rest, test, causal_loss, retrained=again, methods=methods, relearn=False
    )
    assert given == [causal_loss]
    assert [method.error for method in found.methods] == [None] * 6
    metrics = found["no-op"].metrics

    def log_p(each, data):
        labels = data["labels"][:, 1:]
        return each(**data).logits[:, :-1].detach().log_softmax(-1), labels, labels >= 0

    for name, data_ in (("forget", few), ("retain", rest), ("test", test)):
        rows, labels, counted = log_p(model, data_)
        right = (rows.argmax(-1) == labels)[counted].double().mean().item()
        likely = rows.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        assert metrics[f"token_accuracy_{name}"] == pytest.approx(right, rel=1e-12)
        assert metrics[f"accuracy_{name}"] is None
        loss = -likely[counted].mean().item()
        assert metrics[f"loss_{name}"] == pytest.approx(loss, rel=1e-12)
        assert metrics[f"perplexity_{name}"] == pytest.approx(math.exp(loss), rel=1e-12)
    for name, data_ in (("forget", few), ("test", test)):
        wanted = []
        for other in again:
            rows, _, counted = log_p(model, data_)
            theirs = log_p(other, data_)[0]
            wanted.append(js_distances(rows[counted], theirs[counted]).mean().item())
        assert metrics[f"js_{name}"] == pytest.approx(np.mean(wanted), rel=1e-12)
    assert "token_accuracy_test" in found.floor
    assert "perplexity_forget" in found.floor
    assert found["no-op"].metrics["tow"] is not None
    assert "accuracy" in repr(found)
    assert 0 <= metrics["mia_min_k_auc"] <= 1


def test_losses_and_least_likely_tokens_of_samples():
    model, data, _ = language_model()
    samples = as_samples(data, "data", CPU, torch.float64)
    found = predict(model, samples, per_token_loss(causal=True), 7)
    labels = data["labels"][:, 1:]
    rows = model(**inputs(data)).logits[:, :-1].detach().log_softmax(-1)
    likely = rows.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    for k in range(len(labels)):
        own = likely[k][labels[k] >= 0].sort().values
        if not len(own):
            assert found.losses[k] == found.least_likely[k] == found.counted[k] == 0
            continue
        assert found.losses[k] == pytest.approx(-own.mean().item(), rel=1e-12)
        few = own[: max(1, len(own) // 5)]
        assert found.least_likely[k] == pytest.approx(few.mean().item(), rel=1e-12)
    assert found.loss == pytest.approx(-likely[labels >= 0].mean().item(), rel=1e-12)
    assert found.log_probabilities is None
    assert not any(t is None for t in (found.scores, found.likelihoods, found.counted))
    # a loss of one's own is taken sample by sample, with the same values
    other = predict(model, samples, per_token_loss(causal_loss, causal=True), 7)
    torch.testing.assert_close(other.losses, found.losses)
    # and the caller's score takes the place of the accuracy
    scored = predict(
        model, samples, causal_loss, 7, lambda z, y: torch.full((len(y),), 0.25), of_tokens=True
    )
    assert scored.accuracy == 0.25
    assert scored.log_probabilities.shape == (int((labels >= 0).sum()), VOCABULARY)


# ---------------------------------------------------------------------------------------------
# Inputs


def test_decoders_get_the_labels_as_their_inputs():
    data = seq2seq(4)
    model = t5()
    wanted = model(**data).logits
    batch = as_batch(data, 4, "data")
    torch.testing.assert_close(batch.outputs(model).logits, wanted, rtol=0, atol=0)
    shifted_ = model.prepare_decoder_input_ids_from_labels(labels=data["labels"])
    given = as_batch({**data, "decoder_input_ids": shifted_.roll(1, 0)}, 4, "data")
    assert not torch.equal(given.outputs(model).logits, wanted)  # those that are given count
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=4, encoder_layers=1, decoder_layers=1, dropout=0.0,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=4, decoder_ffn_dim=4,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=BOS, decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(config).eval()
    torch.testing.assert_close(batch.outputs(bart).logits, bart(**data).logits, rtol=0, atol=0)


class WithoutShift(T5ForConditionalGeneration):
    @property
    def prepare_decoder_input_ids_from_labels(self):
        raise AttributeError


def test_decoders_that_cannot_make_their_inputs_say_how():
    model = WithoutShift(t5().config)
    with pytest.raises(
        TypeError,
        match="WithoutShift is an encoder-decoder and has no prepare_.*put 'decoder_input_ids'",
    ):
        as_batch(seq2seq(4), 4, "data").outputs(model)


class Unequal(torch.utils.data.Dataset):
    """Texts without their padding, as tokenizers give them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data["labels"])

    def __getitem__(self, k):
        n = int(self.data["attention_mask"][k].sum())
        return {key: t[k, :n] for key, t in self.data.items()}


def padded(rows):
    """As the collators of transformers do: to the longest text of the batch."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    return {
        key: nn.utils.rnn.pad_sequence([row[key] for row in rows], True, fill[key]) for key in fill
    }


@pytest.mark.filterwarnings("ignore")
def test_texts_that_are_padded_by_batch_give_the_same():
    model, data, _ = language_model()
    options = {"preset": "paper", "damping": 1.0, "selection": "lfoci", "n_units": 3,
               "n_perturbations": 20, "weight_decay": 1e-3,
               "perturb": TokenReplacement(VOCABULARY, special_ids=(BOS, PAD))}  # fmt: skip
    sets = part(data, slice(6)), part(data, slice(6, None))
    loaded = [DataLoader(Unequal(each), 5, collate_fn=padded) for each in sets]
    found = [unlearn(model, *each, causal_loss, **options) for each in (sets, loaded)]
    assert found[0].step_norm > 0
    assert found[0].selection == found[1].selection
    torch.testing.assert_close(*(weights(each.model) for each in found), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# Over ranks


def on_ranks(rank, size, group):
    x, y = sequences()
    bounds = [6, 9, len(y)] if size == 2 else [6, 6, 15, len(y)]  # the first of three has none
    own = slice(bounds[rank], bounds[rank + 1])
    result = unlearn(
        trained(squares, x, y, 0.3), (x[:6], y[:6]), (x[own], y[own]), squares, preset="paper",
        selection="full", damping=0.0, weight_decay=0.3, curvature="hessian", rtol=1e-13,
        group=group,
    )  # fmt: skip
    return weights(result.model).numpy(), result.loss_retain.before, fisher(own, group)


def fisher(own, group=None):
    """Whose rows count by the squares of the tokens' shares."""
    torch.manual_seed(0)
    data, units = tuple(t[own] for t in sequences()), UnitSelection({"table": [0, 2]})
    return FisherOperator(Table(), per_token_loss(), data, units, group=group).to_dense().numpy()


def test_ranks_count_the_tokens_of_all(ranks):
    x, y = sequences()
    before, again = (trained(squares, x[k:], y[k:], 0.3) for k in (0, 6))
    one = fisher(slice(6, None))
    for found, loss, matrix in ranks.run(on_ranks):
        np.testing.assert_allclose(matrix, one, atol=1e-12)
        moved = float((weights(again) - weights(before)).norm())
        assert np.linalg.norm(found - weights(again).numpy()) < 1e-9 * moved
        assert loss == pytest.approx(squares(before(x[6:]), y[6:]).item())
