"""Perturbations of a request, what is recorded of units and losses, and the selection from it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from lcodec_ext import codec
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.unlearning import NotFiniteError, NothingSelectedError
from lcodec_ext.unlearning.record import (
    Recording,
    TokenReplacement,
    passes,
    perturbed,
    record,
)
from lcodec_ext.unlearning.record.activations import Recorder, UnitCall
from lcodec_ext.unlearning.select import select_cheap, select_lfoci

CPU = torch.device("cpu")
K = 7  # perturbations


def seeded(seed, module):
    torch.manual_seed(seed)
    module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def samples_of(inputs, classes=3):
    targets = torch.arange(len(inputs)) % classes
    return as_samples((inputs, targets), "forget", CPU, torch.float64)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def tokens(*shape, vocab=11, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs.flatten(1)[:, :3], targets)


def recorded(model, request, loss_fn=cross_entropy, **options):
    settings = {"n_perturbations": K, "noise_std": 0.3, "seed": 5}
    return record(model, request, loss_fn, **settings | options)


def columns_of(recording, layer, call=0):
    return [k for k, owner in enumerate(recording.owners) if owner[:2] == (layer, call)]


def drawn(request, index, **options):
    """The inputs of one perturbation of the whole request."""
    settings = {"noise_std": 0.3} | options
    batch = perturbed(request.fetch(slice(None)), 5, index, **settings)
    return batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)


class Head(nn.Module):
    """A body and a linear layer on the mean of what it puts out over everything but samples."""

    def __init__(self, body, features, take=lambda x: x):
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, 3)
        self.take = take

    def forward(self, x):
        x = self.take(self.body(x))
        return self.head(torch.tanh(x.flatten(1)))


# ---------------------------------------------------------------------------------------------
# Every kind of unit


def over(axes):
    return lambda layer, x: layer(x).mean(axes)


KINDS = {
    "linear": (nn.Linear(4, 5), normal(4, 4), 5, over(0)),
    "linear of sequences": (nn.Linear(4, 5), normal(4, 6, 4), 30, over((0, 1))),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2), normal(4, 4, 5), 18, over((0, 2))),
    "conv2d": (nn.Conv2d(2, 3, 2), normal(4, 2, 3, 4), 18, over((0, 2, 3))),
    "conv3d": (nn.Conv3d(2, 3, 2), normal(4, 2, 2, 3, 3), 12, over((0, 2, 3, 4))),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 2, groups=2), normal(4, 4, 3), 24, over((0, 2))),
    "transposed2d": (nn.ConvTranspose2d(2, 3, 2), normal(4, 2, 2, 2), 27, over((0, 2, 3))),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 1), normal(4, 2, 2, 2, 1), 12, over((0, 2, 3, 4))),
    "batch norm": (nn.BatchNorm2d(3), normal(4, 3, 2, 2), 12, over((0, 2, 3))),
    "batch norm of vectors": (nn.BatchNorm1d(3), normal(4, 3), 3, over(0)),
    "instance norm": (
        nn.InstanceNorm1d(3, affine=True),
        normal(4, 3, 5),
        15,
        over((0, 2)),
    ),
    "group norm": (nn.GroupNorm(2, 4), normal(4, 4, 3), 12, over((0, 2))),
    "layer norm": (nn.LayerNorm(4), normal(4, 3, 4), 12, over((0, 1))),
    "layer norm of planes": (
        nn.LayerNorm((3, 4)),
        normal(4, 2, 3, 4),
        24,
        lambda layer, x: layer(x).mean((0, 1)).flatten(),
    ),
    "rms norm": (nn.RMSNorm(4), normal(4, 3, 4), 12, over((0, 1))),
}


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_activation_of_a_unit_is_the_mean_of_its_output(kind, rows):
    layer, inputs, features, expected = KINDS[kind]
    model = seeded(1, Head(layer, features))
    request = samples_of(inputs)
    recording = recorded(model, request, rows=rows)
    assert recording.together > 1
    assert not recording.without
    for k in range(K):
        x = drawn(request, k)
        with torch.no_grad():
            if rows == "batch":
                wanted = {k: expected(layer, x)}
                losses = {k: cross_entropy(model(x), torch.arange(4) % 3)}
            else:
                each = [x[i : i + 1] for i in range(4)]
                wanted = {4 * k + i: expected(layer, one) for i, one in enumerate(each)}
                losses = {
                    4 * k + i: cross_entropy(model(one), torch.tensor([i % 3]))
                    for i, one in enumerate(each)
                }
        for row, value in wanted.items():
            got = recording.activations[row, columns_of(recording, "body")]
            np.testing.assert_allclose(got, value.numpy(), rtol=1e-9, atol=1e-12)
            assert recording.losses[row] == pytest.approx(losses[row].item(), rel=1e-12)
    assert recording.activations.shape == (len(recording.losses), len(recording.owners))


@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize("rows", ["batch", "samples"])
def test_rows_of_an_embedding_have_the_share_of_tokens_that_they_are(rows, batch_size):
    model = seeded(2, Head(nn.Embedding(11, 2, padding_idx=4), 12))
    request = samples_of(tokens(3, 6))
    replace = TokenReplacement(11, n_tokens=2)
    recording = recorded(model, request, rows=rows, perturb=replace, batch_size=batch_size)
    assert recording.units.units["body"] == (0, 1, 2, 3, 5, 6, 7, 8, 9, 10)
    shares = np.zeros((len(recording.losses), 11))
    for k in range(K):
        x = drawn(request, k, perturb=replace).numpy()
        for unit in range(11):
            there = (x == unit).mean(1)
            if rows == "batch":
                shares[k, unit] = there.mean()
            else:
                shares[3 * k : 3 * k + 3, unit] = there
    shares[:, 4] = 0
    owners = [owner for owner in recording.owners if owner.layer == "body"]
    assert [owner.unit for owner in owners] == np.flatnonzero(shares.any(0)).tolist()
    for owner, column in zip(owners, columns_of(recording, "body"), strict=True):
        np.testing.assert_allclose(
            recording.activations[:, column], shares[:, owner.unit], atol=1e-12
        )


def test_rows_that_do_not_occur_are_dead_without_a_column():
    model = seeded(2, Head(nn.Embedding(40, 2), 12))
    replace = TokenReplacement(token_ids=[3, 5, 7])
    recording = recorded(model, samples_of(tokens(2, 6, vocab=9)), perturb=replace)
    dead = recording.dead.units["body"]
    assert set(dead) >= set(range(9, 40))
    assert not {3, 5, 7} & set(dead)
    assert max(owner.unit for owner in recording.owners if owner.layer == "body") < 9
    assert len(recording.dead) + len(recording.alive) == len(recording.units) == 43


class Bags(nn.Module):
    """Calls its bag of embeddings with offsets: the last sample's bag lacks its first token."""

    def __init__(self, offsets, last):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="mean", include_last_offset=last)
        self.head = nn.Linear(4, 3)
        self.offsets = offsets

    def forward(self, x):
        if not self.offsets:
            return self.head(self.bag(x))
        ends = [len(row) * (i + 1) for i, row in enumerate(x)]
        starts = [0, *ends[:-1]]
        flat = x.flatten()
        if self.bag.include_last_offset:
            return self.head(self.bag(flat, torch.tensor([*starts, ends[-1]])))
        return self.head(self.bag(flat, torch.tensor(starts)))


@pytest.mark.parametrize(("offsets", "last"), [(False, False), (True, False), (True, True)])
def test_embedding_bags(offsets, last):
    model = seeded(3, Bags(offsets, last))
    request = samples_of(tokens(4, 3, vocab=9))
    recording = recorded(model, request, perturb=TokenReplacement(9))
    assert recording.together > 1
    x = drawn(request, 3, perturb=TokenReplacement(9)).numpy()
    for column in columns_of(recording, "bag"):
        unit = recording.owners[column].unit
        assert recording.activations[3, column] == pytest.approx((x == unit).mean())


class Bag(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.words = kind(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        made = self.words(x)
        return self.head(made if made.ndim == 2 else made.mean(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("batch_size", [2, 256])
def test_tokens_that_the_model_has_not(kind, batch_size):
    model, request = seeded(0, Bag(kind)), samples_of(tokens(4, 3, vocab=9))

    def message(perturb):
        with pytest.raises(ValueError, match="the model fails on perturbed inputs: ") as caught:
            recorded(model, request, perturb=perturb, batch_size=batch_size)
        assert isinstance(caught.value.__cause__, IndexError | RuntimeError)
        return str(caught.value)

    assert (
        "model does not have: vocab_size=1000; rows of the model's embeddings: 'words' 10"
        in message(TokenReplacement(1000))
    )
    assert "tokens up to 900 in token_ids" in message(TokenReplacement(token_ids=[899, 900]))
    assert "perturb must return inputs that it takes" in message(lambda x, rng: x + 500)
    recorded(model, request, perturb=TokenReplacement(10), batch_size=batch_size)


def test_bags_of_different_sizes():
    class Ragged(Bags):
        def forward(self, x):
            flat = torch.cat([row[: 1 + int(row[0]) % 3] for row in x])
            sizes = torch.tensor([1 + int(row[0]) % 3 for row in x])
            return self.head(self.bag(flat, sizes.cumsum(0) - sizes))

    model = seeded(3, Ragged(True, False))
    request = samples_of(torch.tensor([[0, 1, 2], [1, 1, 2], [5, 6, 7], [4, 4, 8]]))
    recording = recorded(model, request, perturb=TokenReplacement(9))
    x = drawn(request, 3, perturb=TokenReplacement(9)).tolist()
    bags = [row[: 1 + row[0] % 3] for row in x]
    assert len({len(bag) for bag in bags}) > 1
    for column in columns_of(recording, "bag"):
        unit = recording.owners[column].unit
        share = np.mean([np.mean([token == unit for token in bag]) for bag in bags])
        assert recording.activations[3, column] == pytest.approx(share)


def test_transformers_conv1d():
    layer = transformers.pytorch_utils.Conv1D(5, 4)
    model = seeded(1, Head(layer, 15))
    request = samples_of(normal(2, 3, 4))
    recording = recorded(model, request)
    with torch.no_grad():
        wanted = (drawn(request, 2) @ layer.weight + layer.bias).mean((0, 1))
    got = recording.activations[2, columns_of(recording, "body")]
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-12)


class Attention(nn.Module):
    def __init__(self, batch_first, cross, **options):
        super().__init__()
        options |= {"kdim": 6, "vdim": 5} if cross else {}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.head = nn.Linear(12, 3)
        self.batch_first, self.cross = batch_first, cross

    def qkv(self, x):
        if not self.batch_first:
            x = x.transpose(0, 1)
        if self.cross:
            wide = torch.cat([x, x[..., :2].sin()], -1).repeat_interleave(2, int(self.batch_first))
            return x, wide, wide[..., 1:].cos()
        return x, x, x

    def forward(self, x):
        q, k, v = self.qkv(x)
        out, _ = self.attention(q, key=k, value=v)
        return self.head(torch.tanh(out if self.batch_first else out.transpose(0, 1)).flatten(1))


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_projections_of_an_attention(batch_first, cross, bias, rows):
    model = seeded(4, Attention(batch_first, cross, bias=bias))
    attention = model.attention
    request = samples_of(normal(4, 3, 4))
    recording = recorded(model, request, rows=rows)
    assert recording.together > 1
    x = drawn(request, 1)
    if rows == "samples":
        x = x[2:3]
    with torch.no_grad():
        if cross:
            weights = [getattr(attention, f"{name}_proj_weight") for name in "qkv"]
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = attention.in_proj_bias.chunk(3) if bias else [0, 0, 0]
        wanted = torch.cat(
            [
                (part @ weight.T + shift).mean((0, 1))
                for part, weight, shift in zip(model.qkv(x), weights, biases, strict=True)
            ]
        )
        put_out, _ = attention(*model.qkv(x))
    row = recording.activations[1 if rows == "batch" else 6]
    got = row[columns_of(recording, "attention.in_proj")]
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-10)
    got = row[columns_of(recording, "attention.out_proj")]
    np.testing.assert_allclose(got, put_out.mean((0, 1)).numpy(), rtol=1e-10)


def test_an_encoder_of_torch_in_evaluation_mode_calls_its_layers():
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = seeded(4, Head(nn.TransformerEncoder(layer, 2), 12))
    recording = recorded(model, samples_of(normal(4, 3, 4)))
    names = {owner.layer for owner in recording.owners}
    assert names == set(UnitSelection.all(model).units)
    assert "body.layers.1.self_attn.in_proj" in names
    assert torch.backends.mha.get_fastpath_enabled()


# ---------------------------------------------------------------------------------------------
# Which layers


class Reused(nn.Module):
    """Calls a layer twice, and its layers in another order than they are registered."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


def test_every_call_of_a_reused_module_has_its_columns():
    model = seeded(5, Reused())
    request = samples_of(normal(4, 4))
    recording = recorded(model, request)
    expected = [("body", 0, k) for k in range(4)] + [("body", 1, k) for k in range(4)]
    assert recording.owners == expected + [("head", 0, k) for k in range(3)]
    with torch.no_grad():
        first = model.body(drawn(request, 0))
        second = model.body(torch.tanh(first))
    np.testing.assert_allclose(recording.activations[0, :4], first.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(recording.activations[0, 4:8], second.mean(0).numpy(), rtol=1e-12)
    assert recording.without == {"idle": "the forward pass does not call it"}


def test_layers_of_equal_description_are_told_apart():
    model = seeded(5, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)))
    assert len({str(module) for module in model}) == 1
    assert recorded(model, samples_of(normal(1, 3))).owners == [
        UnitCall(name, 0, unit) for name in "012" for unit in range(3)
    ]


def test_layers_that_cannot_be_recorded_say_why():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
            self.pair = Pair(3, 3)
            self.weight_only = nn.Linear(3, 3)
            self.weight_only.bias.requires_grad_(False)

        def forward(self, x):
            return self.weight_only(self.pair(self.normed(self.frozen(x)))[0])

    model = Model().double().eval()
    recording = recorded(model, samples_of(normal(2, 3)))
    assert {owner.layer for owner in recording.owners} == {"weight_only"}
    assert recording.without == {
        "frozen": "its parameters do not require gradients",
        "normed": "its weight is computed from other parameters, by a parametrization",
        "pair": "its output is not a tensor but a tuple",
    }
    with pytest.raises(ValueError, match="no layer whose units can be recorded; 'pair': its outp"):
        recorded(model, samples_of(normal(2, 3)), units=UnitSelection({"pair": [0]}))


def test_only_the_units_asked_for_are_recorded():
    model = seeded(6, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    request = samples_of(normal(4, 4))
    every = recorded(model, request)
    some = recorded(model, request, units=UnitSelection({"0": [1, 4], "2": [0]}))
    assert some.owners == [("0", 0, 1), ("0", 0, 4), ("2", 0, 0)]
    np.testing.assert_array_equal(some.activations, every.activations[:, [1, 4, 5]])
    assert some.units == UnitSelection({"0": [1, 4], "2": [0]})
    with pytest.raises(ValueError, match="unit 5 of layer '0'"):
        recorded(model, request, units=UnitSelection({"0": [5]}))


def test_tied_layers_are_recorded_both():
    model = seeded(6, nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    model[2].weight = model[0].weight
    recording = recorded(model, samples_of(normal(4, 4)))
    assert len(recording.owners) == 8


# ---------------------------------------------------------------------------------------------
# Several perturbations at once


class Arrangement(nn.Module):
    """Where the samples are for `layer`: "second" axis, "rows" with positions, "columns"."""

    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.place = nn.Embedding(5, 4)
        self.head = nn.Linear(20, 3)
        self.kind = kind

    def forward(self, x):
        n = len(x)
        if self.kind == "second":
            h = self.layer(x.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "rows":
            h = self.layer(x.reshape(n * 5, 3)).view(n, 5, 4)
        else:
            h = self.layer(x.transpose(0, 1).reshape(5 * n, 3)).view(5, n, 4).transpose(0, 1)
        return self.head(torch.tanh(h + self.place(torch.arange(5))).flatten(1))


def test_memory_limits_what_goes_together(monkeypatch):
    model = seeded(7, nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    request = samples_of(normal(2, 5))
    free = recorded(model, request)
    assert free.together == 128
    for most in (3, 1):
        monkeypatch.setattr(passes, "_PASS_BYTES", most * 2 * 8 * 8 + 1)
        limited = recorded(model, request)
        assert limited.together == most
        np.testing.assert_allclose(limited.activations, free.activations, rtol=1e-11)
        np.testing.assert_allclose(limited.losses, free.losses, rtol=1e-12)


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("kind", ["second", "rows", "columns"])
def test_samples_may_lie_anywhere_in_a_layer(kind, m, rows):
    model = seeded(7, Arrangement(kind))
    request = samples_of(normal(m, 5, 3))
    recording = recorded(model, request, rows=rows)
    assert recording.together > 1
    alone = recorded(model, request, rows=rows, batch_size=1 if rows == "samples" else m)
    assert alone.together == 1
    np.testing.assert_allclose(recording.activations, alone.activations, rtol=1e-11)
    np.testing.assert_allclose(recording.losses, alone.losses, rtol=1e-12)
    with torch.no_grad():
        x = drawn(request, 6)
        wanted = model.layer(x if rows == "batch" else x[-1:]).mean((0, 1))
    columns = columns_of(recording, "layer")
    np.testing.assert_allclose(recording.activations[-1, columns], wanted.numpy(), rtol=1e-11)
    places = columns_of(recording, "place")
    np.testing.assert_allclose(recording.activations[:, places], 0.2, rtol=1e-12)
    assert recording.dead == UnitSelection({"place": range(5)})


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("batch_size", [1, 4, 6, 13, 1000])
def test_batch_size_changes_nothing(batch_size, rows, monkeypatch):
    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    request = samples_of(normal(6, 4))
    expected = recorded(model, request, rows=rows)
    largest = 0
    seen = {}
    original = perturbed

    def spy(batch, seed, index, **options):
        seen.setdefault(index, []).append(original(batch, seed, index, **options).args[0])
        return original(batch, seed, index, **options)

    def count(module, inputs):
        nonlocal largest
        largest = max(largest, len(inputs[0]))

    monkeypatch.setattr("lcodec_ext.unlearning.record.recording.perturbed", spy)
    model[0].register_forward_pre_hook(count)
    got = recorded(model, request, rows=rows, batch_size=batch_size)
    assert largest <= batch_size
    assert list(seen) == list(range(K))
    for index, inputs in seen.items():
        assert all(torch.equal(x, drawn(request, index)) for x in inputs)
    assert got.owners == expected.owners
    np.testing.assert_allclose(got.activations, expected.activations, rtol=1e-11)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-12)


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.cells = kind(4, 4, batch_first=batch_first)
        self.head = nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.embed(x)
        out, _ = self.cells(x if self.batch_first else x.transpose(0, 1))
        return self.head(out[:, -1] if self.batch_first else out[-1])


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_networks(kind, batch_first, rows):
    model = seeded(8, Recurrent(kind, batch_first))
    request = samples_of(normal(2, 5, 3))
    recording = recorded(model, request, rows=rows)
    assert recording.together > 1
    x = drawn(request, 3)
    with torch.no_grad():
        if rows == "samples":
            x = x[1:]
        embedded, out = model.embed(x).mean((0, 1)), model(x)
    row = 3 if rows == "batch" else 7
    np.testing.assert_allclose(recording.activations[row, :4], embedded.numpy(), rtol=1e-11)
    np.testing.assert_allclose(recording.activations[row, 4:], out.mean(0).numpy(), rtol=1e-11)


class OneByOne(nn.Module):
    """Models that perturbations cannot share a pass of; each is right on one request alone."""

    def __init__(self, kind):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)
        self.kind = kind

    def forward(self, x):
        h = self.layer(x)
        if self.kind == "centred":
            h = h - h.mean(0)
        elif self.kind == "fixed size":
            h = h.view(2, 4)
        elif self.kind == "sorted":
            h = self.layer(x[x[:, 0].argsort()])
        return self.head(torch.tanh(h + 1))


@pytest.mark.parametrize("kind", ["centred", "fixed size", "sorted"])
def test_what_cannot_go_together_goes_one_by_one(kind):
    model = seeded(9, OneByOne(kind))
    request = samples_of(normal(2, 3))
    recording = recorded(model, request)
    assert recording.together == 1
    for k in range(K):
        x = drawn(request, k)
        with torch.no_grad():
            loss = cross_entropy(model(x), torch.arange(2))
            wanted = model.layer(x).mean(0)
        np.testing.assert_allclose(
            recording.activations[k, columns_of(recording, "layer")], wanted.numpy(), rtol=1e-12
        )
        assert recording.losses[k] == pytest.approx(loss.item(), rel=1e-12)


def test_losses_that_vmap_cannot_run():
    def branching(outputs, targets):
        loss = cross_entropy(outputs, targets)
        return loss * 2 if loss.item() > 1 else loss

    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    request = samples_of(normal(3, 4))
    recording = recorded(model, request, branching)
    assert recording.together > 1
    losses = recorded(model, request).losses
    np.testing.assert_allclose(recording.losses, np.where(losses > 1, 2 * losses, losses))


def test_trees_of_outputs_and_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x):
            h = torch.tanh(self.body(x))
            return {"class": self.a(h), "place": (self.b(h), h)}

    def loss_fn(outputs, targets):
        label, place = targets
        far = F.mse_loss(outputs["place"][0], place)
        return F.cross_entropy(outputs["class"], label) + far + outputs["place"][1].mean()

    model = seeded(10, Two())
    x, label, place = normal(4, 4), torch.arange(4) % 3, normal(4, 2, seed=3)
    request = as_samples((x, (label, place)), "forget", CPU, torch.float64)
    recording = recorded(model, request, loss_fn)
    assert recording.together > 1
    with torch.no_grad():
        loss = loss_fn(model(drawn(request, 4)), (label, place))
    assert recording.losses[4] == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_runs_in_its_own_dtype(dtype):
    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).to(dtype)
    seen = set()
    model[0].register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    request = as_samples((normal(2, 4).to(dtype), torch.arange(2)), "forget", CPU, dtype)
    recording = recorded(model, request)
    assert seen == {dtype}
    assert recording.activations.dtype == recording.losses.dtype == np.float64
    assert recording.together > 1


def test_gradients_are_not_recorded_and_the_model_is_left_alone():
    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recorded(model, samples_of(normal(2, 4)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---------------------------------------------------------------------------------------------
# Errors


def test_hooks_are_removed_after_an_error():
    model = seeded(4, Attention(True, False))

    def broken(outputs, targets):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        recorded(model, samples_of(normal(4, 3, 4)), broken)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), Recorder([]):
        raise KeyError


def test_calls_that_change_are_refused():
    class Varying(Reused):
        def forward(self, x):
            return super().forward(self.body(x) if x.sum() > 0 else x)

    with pytest.raises(ValueError, match="change from input to input"):
        recorded(seeded(6, Varying()), samples_of(normal(1, 4) * 0.01), batch_size=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_perturbations": 2}, ValueError, "n_perturbations must be .* from 3 to 1000000; got 2"),
        ({"noise_std": -1}, ValueError, "noise_std must be"),
        ({"rows": "all"}, ValueError, "rows must be one of 'batch', 'samples'"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"perturb": 0.1}, TypeError, "perturb must be a callable"),
        (
            {"rows": "samples", "n_perturbations": 10**6},
            ValueError,
            r"makes 4,000,000 rows of 4 samples .* take n_perturbations=250000 or rows='batch'",
        ),
        ({"n_perturbations": 10**9}, ValueError, "n_perturbations must be .* got 10*"),
        ({"loss_fn": lambda a, b: a}, ValueError, r"loss_fn must return a scalar .* \(4, 3\)"),
    ],
)
def test_options_are_checked(options, error, message):
    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with pytest.raises(error, match=message):
        recorded(model, samples_of(normal(4, 4)), **options)


def test_recordings_that_do_not_fit_are_refused():
    model = seeded(1, nn.Sequential(nn.Linear(1, 2200)))
    message = r"1,000,000 rows of activations of 2,200 units would take 16 GiB: take fewer"
    with pytest.raises(ValueError, match=message):
        recorded(model, samples_of(normal(1, 1)), n_perturbations=10**6)


# ---------------------------------------------------------------------------------------------
# Perturbations


def test_noise_depends_on_seed_and_index_alone():
    def noise(scale, offset, seed, index):
        batch = samples_of(torch.full((5, 4), offset, dtype=torch.float64)).fetch(slice(None))
        return perturbed(batch, seed, index, noise_std=scale).args[0]

    one = noise(1.0, 0.0, 3, 8)
    assert torch.equal(one, noise(1.0, 0.0, 3, 8))
    assert torch.equal(2 + one * 0.25, noise(0.25, 2.0, 3, 8))
    assert not torch.equal(one, noise(1.0, 0.0, 3, 9))
    assert not torch.equal(one, noise(1.0, 0.0, 4, 8))


def test_noise_has_the_given_spread():
    batch = samples_of(torch.zeros(100, 200, dtype=torch.float64)).fetch(slice(None))
    noise = perturbed(batch, 0, 0).args[0]
    assert abs(noise.mean().item()) < 0.1 * 4 / 20_000**0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)


def test_every_floating_input_gets_noise_of_its_own_and_targets_none():
    a, ids, b = normal(3, 4), tokens(3, 2), normal(3, 4)
    batch = as_samples((a, ids, b, normal(3)), "forget", CPU, torch.float64).fetch(slice(None))
    x, same, y = perturbed(batch, 0, 1).args
    assert torch.equal(same, ids)
    noise = torch.cat([x - a, y - b])
    assert (noise != 0).all()
    assert not torch.allclose(noise[:3], noise[3:])
    assert perturbed(batch, 0, 1).targets is batch.targets


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_integer_inputs_need_a_perturbation(form):
    ids = tokens(3, 4)
    data = (ids, torch.arange(3)) if form == "tensor" else {"input_ids": ids, "labels": ids[:, 0]}
    batch = as_samples(data, "forget", CPU, torch.float64).fetch(slice(None))
    with pytest.raises(TypeError, match="give perturb=TokenReplacement.* or a callable"):
        perturbed(batch, 0, 0)


def test_a_callable_perturbs_what_the_model_takes():
    def swap(inputs, rng):
        inputs["b"] *= rng.choice([1.0, -1.0])  # in place: it has a copy
        return {"b": inputs["b"], "a": inputs["a"] + 1}

    data = {"a": tokens(3, 4), "b": normal(3, 2), "labels": torch.arange(3)}
    batch = as_samples(data, "forget", CPU, torch.float64).fetch(slice(None))
    given = batch.kwargs["b"].clone()
    signs = set()
    for index in range(20):
        made = perturbed(batch, 0, index, perturb=swap).kwargs
        assert torch.equal(made["a"], data["a"] + 1)
        assert torch.equal(made["b"].abs(), given.abs())
        signs.add((made["b"] / given).mean().item())
    assert signs == {1.0, -1.0}
    assert torch.equal(batch.kwargs["b"], given)


@pytest.mark.parametrize(
    ("perturb", "message"),
    [
        (lambda x, rng: (x["a"], x["b"]), r"expected a dict with \['a', 'b'\], got 2 values"),
        (lambda x, rng: {"a": x["a"]}, r"expected a dict .* got a dict with \['a'\]"),
        (lambda x, rng: x | {"b": x["b"].float()}, r"at \['b'\]: .*float64.* got .*float32"),
        (lambda x, rng: x | {"a": x["a"][:2]}, r"at \['a'\]: .*shape \(3, 4\).* got .*\(2, 4\)"),
        (lambda x, rng: None, "got NoneType"),
    ],
)
def test_what_a_callable_returns_is_checked(perturb, message):
    data = {"a": tokens(3, 4), "b": normal(3, 2), "labels": torch.arange(3)}
    batch = as_samples(data, "forget", CPU, torch.float64).fetch(slice(None))
    with pytest.raises(ValueError, match=f"perturb must return inputs of the same.*{message}"):
        perturbed(batch, 0, 0, perturb=perturb)


# ---------------------------------------------------------------------------------------------
# Token replacement


def rng_of(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_tokens_that_count_are_replaced_by_other_ordinary_ones(n_tokens):
    special = (0, 1, 2)
    replace = TokenReplacement(30, n_tokens=n_tokens, special_ids=special)
    ids = tokens(50, 12, vocab=30, seed=4)
    ids[:, 0], ids[:, 9:] = 1, 0
    mask = (torch.arange(12) < 10).long().expand(50, 12).clone()
    mask[::2, 5:] = 0
    counts = torch.zeros(50, 12)
    drawn = set()
    for seed in range(200):
        inputs = {"input_ids": ids, "attention_mask": mask, "other": ids}
        made = replace(inputs, rng_of(seed))
        assert made["attention_mask"] is mask
        assert made["other"] is ids
        changed = made["input_ids"] != ids
        free = (mask == 1) & ~torch.isin(ids, torch.tensor(special))
        assert not (changed & ~free).any()
        assert torch.equal(changed.sum(1), free.sum(1).clamp(max=n_tokens))
        drawn |= set(made["input_ids"][changed].tolist())
        counts += changed
    assert drawn == set(range(3, 30))
    expected = 200 * n_tokens / free.sum(1, keepdim=True)
    plenty = free & (free.sum(1, keepdim=True) > n_tokens)
    assert (counts[plenty] / expected.expand_as(counts)[plenty] - 1).abs().max() < 0.9
    assert counts[plenty].sum() == (200 * n_tokens * (free.sum(1) > n_tokens)).sum()


def test_the_new_token_is_uniform_among_the_others():
    replace = TokenReplacement(token_ids=[3, 5, 8], special_ids=[9])
    made = replace(torch.full((4000, 1), 5), rng_of(0))
    values, counts = made.unique(return_counts=True)
    assert values.tolist() == [3, 8]
    assert abs(counts[0].item() - 2000) < 4 * 1000**0.5
    made = replace(torch.full((6000, 1), 7), rng_of(0))  # outside of the vocabulary
    values, counts = made.unique(return_counts=True)
    assert values.tolist() == [3, 5, 8]
    assert (counts - 2000).abs().max() < 4 * 1334**0.5


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict without mask", "one token a sample"])
def test_forms_of_inputs(form):
    ids = tokens(6, 5, vocab=9).int()
    if form == "tensor":
        made = TokenReplacement(9)(ids, rng_of(1))
        assert made.dtype == torch.int32
    elif form == "tuple":
        mask = (torch.arange(5) == 2).expand(6, 5)
        replace = TokenReplacement(9, input_key=1, mask_key=2)
        _, made, same = replace((normal(6, 1), ids, mask), rng_of(1))
        assert same is mask
        assert ((made != ids) == mask).all()
    elif form == "one token a sample":
        made = TokenReplacement(9)(ids[:, 0], rng_of(1))
        assert (made != ids[:, 0]).all()
        return
    else:
        made = TokenReplacement(9)({"input_ids": ids}, rng_of(1))["input_ids"]
    assert ((made != ids).sum(1) == 1).all()


def test_samples_without_a_token_to_replace_stay():
    ids = torch.tensor([[0, 0], [0, 4]])
    made = TokenReplacement(9, n_tokens=2, special_ids=[0])(ids, rng_of(0))
    assert made[0].tolist() == [0, 0]
    assert made[1, 0] == 0
    assert made[1, 1] not in (0, 4)


def test_a_token_replacement_is_data():
    replace = TokenReplacement(token_ids=range(5), special_ids=[np.int64(0)], n_tokens=2)
    again = TokenReplacement(**dataclasses.asdict(replace))
    assert again == replace
    assert hash(again) == hash(replace)
    assert dataclasses.asdict(replace)["token_ids"] == (0, 1, 2, 3, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        replace.n_tokens = 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TokenReplacement(), ValueError, "either vocab_size or token_ids"),
        (lambda: TokenReplacement(5, [1, 2]), ValueError, "vocab_size=5 and 2 token_ids"),
        (lambda: TokenReplacement(2, special_ids=[1]), ValueError, "two tokens .* it has 1"),
        (lambda: TokenReplacement(token_ids=[1, 2.5]), TypeError, "a token of token_ids"),
        (lambda: TokenReplacement(9, n_tokens=0), ValueError, "n_tokens must be"),
        (lambda: TokenReplacement(9, input_key=None), TypeError, "input_key must be a name"),
        (
            lambda: TokenReplacement(9)({"ids": tokens(2, 3)}, rng_of(0)),
            ValueError,
            r"input_key='input_ids' names none of the inputs of the model: \['ids'\]",
        ),
        (
            lambda: TokenReplacement(9)((tokens(2, 3), tokens(2, 3)), rng_of(0)),
            ValueError,
            "input_key='input_ids' names none of the inputs of the model: 2 tensors",
        ),
        (lambda: TokenReplacement(9)(normal(2, 3), rng_of(0)), TypeError, "must be integers"),
        (
            lambda: TokenReplacement(9)(
                {"input_ids": tokens(2, 3), "attention_mask": tokens(2, 4)}, rng_of(0)
            ),
            ValueError,
            r"shape of the tokens, \(2, 3\); got \(2, 4\)",
        ),
    ],
)
def test_token_replacements_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=60, max_position_embeddings=12, n_layers=2, n_heads=2, dim=8, hidden_dim=16
    )
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    ids = tokens(3, 10, vocab=60)
    ids[:, 0] = 1
    mask = (torch.arange(10) < torch.tensor([[10], [7], [5]])).long()
    data = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    request = as_samples(data, "forget", CPU, torch.float32)
    replace = TokenReplacement(60, special_ids=[0, 1])
    recording = recorded(model, request, F.cross_entropy, perturb=replace, batch_size=7)
    assert recording.together == 2
    assert {owner.layer for owner in recording.owners} == set(UnitSelection.all(model).units)
    layer = model.distilbert.transformer.layer[1].attention.q_lin
    seen = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    inputs = drawn(request, 4, perturb=replace)
    assert ((inputs["input_ids"] != ids).sum(1) == 1).all()
    with torch.no_grad():
        loss = F.cross_entropy(model(**inputs).logits, data["labels"])
    handle.remove()
    columns = columns_of(recording, "distilbert.transformer.layer.1.attention.q_lin")
    np.testing.assert_allclose(
        recording.activations[4, columns], seen[0].mean((0, 1)).numpy(), rtol=1e-4, atol=1e-6
    )
    assert recording.losses[4] == pytest.approx(loss.item(), rel=1e-5)
    dead = recording.dead.units
    assert dead["distilbert.embeddings.position_embeddings"] == tuple(range(12))
    assert set(dead) == {
        "distilbert.embeddings.position_embeddings",
        "distilbert.embeddings.word_embeddings",
    }


# ---------------------------------------------------------------------------------------------
# Selection


def recording_of(activations, losses, owners=None, units=None):
    owners = owners or [UnitCall("fc", k // 4, k % 4) for k in range(activations.shape[1])]
    units = units or UnitSelection({"fc": range(4)})
    return Recording(activations, losses, owners, units, {}, 1, 1e-15)


@pytest.fixture
def planted(rng):
    """Activations of a layer of 4 units with 2 calls; the loss hangs on units 1 and 3."""
    activations = rng.normal(size=(400, 8)) * 1e-4  # far below the paper's absolute noise
    losses = activations[:, 1] ** 2 + activations[:, 1] * activations[:, 7]
    return activations, losses


def test_the_units_that_matter_are_selected(planted):
    units, result = select_lfoci(recording_of(*planted))
    assert set(units) == {("fc", 1), ("fc", 3)}
    assert set(result.ordering) == {1, 7}
    assert set(result.names) == {"fc[1] call 0", "fc[3] call 1"}
    assert [f"fc[{unit}]" for _, unit in units] == [name[:5] for name in result.names]
    assert result.n_features == 8


def test_a_unit_selected_by_two_calls_counts_once(planted):
    activations, _ = planted
    losses = activations[:, 1] * activations[:, 5]
    units, result = select_lfoci(recording_of(activations, losses))
    assert set(result.ordering) >= {1, 5}
    assert units.count(("fc", 1)) == 1
    assert len(units) < len(result.ordering)


def test_max_units_is_a_cap(planted):
    units, result = select_lfoci(recording_of(*planted), max_units=1)
    assert len(units) == 1
    assert result.stop_reason == "max_features"


def test_the_noise_of_lfoci_is_seeded(planted):
    def values(**options):
        return select_lfoci(recording_of(*planted), **options)[1].cumulative.tolist()

    assert values(noise=0.3) == values(noise=0.3) != values(noise=0.3, seed=1)
    assert values(noise=0) == values(noise=0, seed=1)


@pytest.mark.parametrize("select", [select_lfoci, select_cheap])
def test_dead_units_are_left_out_and_reported(planted, select):
    activations, losses = planted
    activations[:, [0, 4]] = 0.0  # lfoci would warn of constant columns
    activations[:, 2] = 1.0
    activations[::2, 6] = 1 + 2.0**-52  # rounding
    activations[1::2, 6] = 1.0
    recording = dataclasses.replace(recording_of(activations, losses), resolution=1e-14)
    units, _ = select(recording)
    assert set(units) <= {("fc", 1), ("fc", 3)}
    assert recording.alive.tolist() == [1, 3, 5, 7]
    assert recording.dead == UnitSelection({"fc": [0, 2]})
    assert "4 dead units" not in repr(recording)
    assert "2 dead units" in repr(recording)


class ConstantBranch(nn.Module):
    """Two layers that see the same for every sample, whatever is perturbed, and one that does not.

    The constants cancel: what remains of a sum is far smaller than its terms and their rounding.
    """

    def __init__(self, convolution):
        super().__init__()
        if convolution:
            self.constant, self.deeper = nn.Conv2d(64, 40, 3), nn.Conv2d(40, 40, 1)
            self.layer = nn.Conv2d(1, 40, 3)
            constant = torch.linspace(-1, 1, 64)[:, None, None].expand(64, 6, 6)
        else:
            self.constant, self.deeper = nn.Linear(64, 40), nn.Linear(40, 40)
            self.layer = nn.Linear(36, 40)
            constant = torch.linspace(-1, 1, 64)
        self.register_buffer("seen", constant)
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        seen = self.seen.expand(len(x), *self.seen.shape)
        hidden = self.deeper(torch.tanh(self.constant(seen)))
        x = x if isinstance(self.layer, nn.Conv2d) else x.flatten(1)
        hidden = torch.tanh(hidden + self.layer(x))
        return self.head(hidden.flatten(2).mean(2) if hidden.ndim > 2 else hidden)


@pytest.mark.parametrize("rows", ["batch", "samples"])
@pytest.mark.parametrize("batch_size", [1, 2, 13, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
def test_rounding_is_no_life(convolution, dtype, batch_size, rows):
    model = seeded(11, ConstantBranch(convolution)).to(dtype)
    with torch.no_grad():  # the first unit cancels to nothing but rounding
        model.constant.bias[0] -= model.constant(model.seen[None])[0, 0].mean()
    inputs = normal(2, 1, 6, 6).to(dtype)
    request = as_samples((inputs, torch.arange(2)), "f", CPU, dtype)
    recording = recorded(model, request, n_perturbations=50, batch_size=batch_size, rows=rows)
    assert recording.dead == UnitSelection({"constant": range(40), "deeper": range(40)})
    # What moves is left alone: rounding is far below it.
    differences = np.ptp(recording.activations, axis=0)
    assert (recording.rounding[recording.alive] < 1e-3 * differences[recording.alive]).all()


@pytest.mark.parametrize("batch_size", [13, 16, 50])
def test_rounding_of_the_loss_is_no_life(batch_size):
    """A small loss is the difference of logits that are far larger, and so is its rounding."""
    model = seeded(11, ConstantBranch(False)).float()
    with torch.no_grad():
        model.layer.weight.zero_()  # but the table has a column that varies
        model.layer.weight[0, 0] = 1
        model.head.weight[:, 0] = 0
        logits = model(torch.zeros(1, 1, 6, 6))[0]
        model.head.bias += torch.tensor([12.0, 0, 0]) - logits
    inputs = normal(1, 1, 6, 6).float()
    request = as_samples((inputs, torch.zeros(1).long()), "f", CPU, torch.float32)
    recording = recorded(model, request, n_perturbations=50, batch_size=batch_size)
    assert 0 < recording.losses.max() < 1e-4
    assert [recording.owners[k] for k in recording.alive] == [UnitCall("layer", 0, 0)]
    with pytest.raises(ValueError, match="the same under all perturbations"):
        select_lfoci(recording)


def test_cheap_foci_takes_the_unit_with_the_largest_coefficient(rng):
    activations = rng.normal(size=(300, 8))
    losses = activations[:, 6] + 0.3 * activations[:, 1] + 0.1 * rng.normal(size=300)
    recording = recording_of(activations, losses)
    values = np.array([codec(losses, activations[:, k]) for k in range(8)])
    units, got = select_cheap(recording)
    assert units == [("fc", 2)]
    assert got == pytest.approx([values[6]], rel=1e-9)
    best = np.maximum(values[:4], values[4:])
    order = [unit for unit in np.argsort(-best) if best[unit] > 0.01]
    units, got = select_cheap(recording, max_units=None, threshold=0.01)
    assert units == [("fc", unit) for unit in order]
    np.testing.assert_allclose(got, best[order], rtol=1e-9)
    units, _ = select_cheap(recording, max_units=4, threshold=-1)
    assert units == [("fc", unit) for unit in np.argsort(-best)]
    units, got = select_cheap(recording, max_units=None, threshold=0.99)
    assert units == [("fc", 2)]  # the first, whatever the threshold
    assert got[0] < 0.99


def test_a_recording_is_selected_from():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    data = normal(1, 4).float(), torch.tensor([1])
    request = as_samples(data, "forget", CPU, torch.float32)
    recording = record(model, request, F.cross_entropy, n_perturbations=300)
    units, result = select_lfoci(recording)
    assert ("2", 1) in units  # the logit of the class itself
    assert result.cumulative[-1] > 0.8
    values = [codec(recording.losses, column) for column in recording.activations.T]
    best = recording.owners[int(np.argmax(values))]
    assert select_cheap(recording)[0] == [(best.layer, best.unit)]


@pytest.mark.parametrize("select", [select_lfoci, select_cheap])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a, y: (a, y * 0), NothingSelectedError, "is 0 under all perturbations: it depends"),
        (lambda a, y: (a, y * 0 + 1), NothingSelectedError, "same under all.*noise_std is too sma"),
        (lambda a, y: (a * 0, y), NothingSelectedError, "all are dead: in 400 rows.*'full'"),
        (lambda a, y: (a, y + np.nan), NotFiniteError, "loss of the perturbed request is NaN"),
        (
            lambda a, y: (np.where(np.arange(8) == 6, np.inf, a), y),
            NotFiniteError,
            "unit 2 of layer 'fc'",
        ),
    ],
)
def test_what_cannot_be_selected_from(planted, spoil, error, message, select):
    assert issubclass(error, ValueError)
    with pytest.raises(error, match=message):
        select(recording_of(*spoil(*planted)))


@pytest.mark.parametrize("select", [select_lfoci, select_cheap])
def test_nothing_to_select(select):
    losses = np.tile(np.arange(200.0), 2)
    activations = (np.arange(400) % 2).astype(float)[:, None]
    recording = recording_of(
        activations, losses, [UnitCall("fc", 0, 0)], UnitSelection({"fc": [0]})
    )
    assert codec(losses, activations[:, 0]) <= 0
    options = {"noise": 0.0} if select is select_lfoci else {}
    with pytest.raises(NothingSelectedError, match=r"selects no unit|no unit has T.*Pass more n_"):
        select(recording, **options)
