"""Units of every kind of layer, selections of them, and their parameters as one vector."""

import copy
import json
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lcodec_ext.curvature import Segment, UnitSelection, n_units


class Conv1D(nn.Module):
    """As transformers.pytorch_utils.Conv1D holds its parameters: inputs first."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


@pytest.fixture
def transformers(monkeypatch):
    """A package of that name with this Conv1D."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


def numbered(model, dtype=torch.float64):
    """All entries of all parameters different: entry e of parameter k is 100 000 k + e."""
    model.to(dtype)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 100_000 * k)
    return model


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def flat(*tensors):
    return torch.cat([torch.empty(0), *(tensor.detach().flatten() for tensor in tensors)])


# ---------------------------------------------------------------------------------------------
# Selections as data


def test_a_selection_is_data():
    selection = UnitSelection({"b.1": [5, 2], "a": np.array([3]), "": torch.tensor([1, 0])})
    assert selection.units == {"b.1": (2, 5), "a": (3,), "": (0, 1)}
    assert len(selection) == 5
    assert repr(selection) == "UnitSelection({'b.1': [2, 5], 'a': [3], '': [0, 1]})"
    assert selection != UnitSelection({"b.1": [5], "a": [3], "": [0, 1]})
    assert selection != selection.units


def test_a_selection_is_immutable():
    selection = UnitSelection({"a": [3]})
    selection.units["a"] = (4,)
    selection.units["b"] = (4,)
    selection.to_dict()["a"].append(5)
    assert selection.units == {"a": (3,)}
    with pytest.raises(AttributeError):
        selection.units = {}
    with pytest.raises(AttributeError):
        selection.other = 1


def test_the_order_of_layers_means_nothing():
    one, other = UnitSelection({"a": [1, 2], "b": [3]}), UnitSelection({"b": (3,), "a": {2, 1}})
    assert one == other
    assert hash(one) == hash(other)
    assert {one: "found"}[other] == "found"


def test_round_trips():
    selection = UnitSelection({"b.1": [5, 2], "": np.array([3])})
    empty = UnitSelection({})
    for one in (selection, empty):
        assert UnitSelection.from_dict(one.to_dict()) == one
        assert UnitSelection.from_json(one.to_json()) == one
        assert json.loads(one.to_json()) == one.to_dict()
        assert pickle.loads(pickle.dumps(one)) == one
        assert copy.deepcopy(one) == one
    assert selection.to_json() == '{"b.1": [2, 5], "": [3]}'


def test_set_operations():
    one = UnitSelection({"a": [1, 2, 3], "b": [0]})
    other = UnitSelection({"c": [7], "a": [3, 4]})
    assert one | other == UnitSelection({"a": [1, 2, 3, 4], "b": [0], "c": [7]})
    assert one & other == UnitSelection({"a": [3]})
    assert one - other == UnitSelection({"a": [1, 2], "b": [0]})
    assert other - one == UnitSelection({"a": [4], "c": [7]})
    empty = UnitSelection({})
    assert one - one == one & UnitSelection({"d": [0]}) == empty
    assert one | empty == one
    assert len(empty) == 0
    assert not empty
    for operation in ("__or__", "__and__", "__sub__"):
        assert getattr(one, operation)({"a": [1]}) is NotImplemented
    with pytest.raises(TypeError):
        one | {"a": [1]}


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        ([("a", [1])], TypeError, "map layer names to unit indices; got .* list"),
        ({"a": []}, ValueError, "no units are given for layer 'a'; leave the layer out"),
        ({"a": [1, 1]}, ValueError, r"units of layer 'a' are repeated: \[1, 1\]"),
        ({"a": [-1]}, ValueError, "a unit of layer 'a' must be an integer >= 0; got -1"),
        ({"a": [1.0]}, TypeError, "a unit of layer 'a' must be an integer"),
        ({"a": [True]}, TypeError, "a unit of layer 'a'"),
        ({"a": torch.tensor([True])}, TypeError, "a unit of layer 'a'"),
        ({"a": torch.tensor(1)}, TypeError, "the units of layer 'a' must be integers; got 1"),
        ({"a": "12"}, TypeError, "a unit of layer 'a'"),
        ({"a": 1}, TypeError, "the units of layer 'a'"),
        ({1: [1]}, TypeError, "layer names must be strings; got 1"),
    ],
)
def test_bad_selections(units, error, message):
    with pytest.raises(error, match=message):
        UnitSelection(units)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "text must be the JSON of a UnitSelection: "),
        ("[1]", r"text must be the JSON of a UnitSelection, an object; got '\[1\]'"),
        ('{"a": [-1]}', "layer 'a'"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        UnitSelection.from_json(text)


# ---------------------------------------------------------------------------------------------
# The coordinates of every kind of layer, written out by hand


def rows(layer, *units):
    return [t[u] for u in units for t in (layer.weight, layer.bias) if t is not None]


def transposed(layer, *units):
    """Output channel by channel, through the groups' own weights."""
    pieces = []
    n_inputs = layer.in_channels // layer.groups
    n_outputs = layer.out_channels // layer.groups
    for unit in units:
        for i in range(layer.in_channels):
            for o in range(n_outputs):
                if (i // n_inputs) * n_outputs + o == unit:
                    pieces.append(layer.weight[i, o])
        if layer.bias is not None:
            pieces.append(layer.bias[unit])
    return pieces


def columns(layer, *units):
    return [t for u in units for t in (layer.weight[:, u], layer.bias[u])]


def entries(layer, *units):
    tensors = (layer.weight, getattr(layer, "bias", None))
    return [t.flatten()[u] for u in units for t in tensors if t is not None]


def weights(layer, *units):
    return [layer.weight[u] for u in units]


def packed(layer, *units):
    biases = [None] * 99 if layer.in_proj_bias is None else layer.in_proj_bias
    return [t for u in units for t in (layer.in_proj_weight[u], biases[u]) if t is not None]


def separate(layer, *units):
    e = layer.embed_dim
    pieces = []
    for unit in units:
        if unit < e:
            pieces.append(layer.q_proj_weight[unit])
        elif unit < 2 * e:
            pieces.append(layer.k_proj_weight[unit - e])
        else:
            pieces.append(layer.v_proj_weight[unit - 2 * e])
        pieces.append(layer.in_proj_bias[unit])
    return pieces


KINDS = {
    "linear": (lambda: nn.Linear(3, 5), 5, rows, [4, 0, 2]),
    "linear without bias": (lambda: nn.Linear(3, 5, bias=False), 5, rows, [1]),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), 4, rows, [0, 3]),
    "conv2d": (lambda: nn.Conv2d(2, 4, (2, 3)), 4, rows, [3, 1]),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), 4, rows, [0, 3]),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), 8, rows, [7]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), 3, rows, [2]),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 2), 4, transposed, [3, 0]),
    "transposed 2d": (lambda: nn.ConvTranspose2d(3, 2, (2, 3)), 2, transposed, [1]),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(6, 9, 2, groups=3),
        9,
        transposed,
        [8, 0, 4, 5],
    ),
    "transposed, depthwise": (
        lambda: nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False),
        4,
        transposed,
        [2],
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), 6, transposed, [1, 4]),
    "transformers conv1d": (lambda: Conv1D(5, 3), 5, columns, [4, 1]),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=2), 7, weights, [6, 0]),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), 7, weights, [5]),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), 4, entries, [3, 0]),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), 4, entries, [1]),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), 4, entries, [1]),
    "synchronised batch norm": (lambda: nn.SyncBatchNorm(4), 4, entries, [2]),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), 4, entries, [0, 2]),
    "group norm": (lambda: nn.GroupNorm(2, 6), 6, entries, [5, 2]),
    "layer norm": (lambda: nn.LayerNorm(5), 5, entries, [4, 3]),
    "layer norm over two axes": (lambda: nn.LayerNorm((2, 3)), 6, entries, [4, 0, 5]),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), 5, entries, [2]),
    "RMS norm": (lambda: nn.RMSNorm((2, 2)), 4, entries, [3, 1]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        12,
        packed,
        [0, 5, 11],
    ),
    "attention without bias": (lambda: nn.MultiheadAttention(4, 2, bias=False), 12, packed, [7]),
    "attention, separate weights": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        12,
        separate,
        [10, 2, 3, 4, 8],
    ),
}


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_of(kind, nested):
    build, n, coordinates, units = KINDS[kind]
    layer = build()
    assert n_units(layer) == n
    model = numbered(
        nn.ModuleDict({"before": nn.Linear(2, 2), "layer": layer}) if nested else layer
    )
    name = "layer" if nested else ""
    if isinstance(layer, nn.MultiheadAttention):
        name = f"{name}.in_proj".lstrip(".")
    selection = UnitSelection({name: units})
    expected = flat(*coordinates(layer, *sorted(units)))
    assert torch.equal(selection.gather(model).detach(), expected)
    assert selection.size(model) == len(expected)
    check_segments(selection, model)
    check_writing(selection, model)

    every = UnitSelection.all(model)
    skipped = {layer.padding_idx} if kind.startswith("embedding") else set()
    assert every.units[name] == tuple(u for u in range(n) if u not in skipped)
    with pytest.raises(ValueError, match=f"names unit {n} of layer {name!r}.* 0 to {n - 1}"):
        UnitSelection({name: [n]}).size(model)


def check_segments(selection, model):
    """They are in the order of the coordinates, and are views of the parameters."""
    parameters = state(model)
    segments = selection.segments(model)
    position = 0
    for segment in segments:
        assert segment.start == position
        view = parameters[segment.parameter][segment.index]
        assert view.numel() == segment.length
        assert view.untyped_storage().data_ptr() == (
            parameters[segment.parameter].untyped_storage().data_ptr()
        )
        assert segment.unit in selection.units[segment.module]
        position += segment.length
    assert position == selection.size(model)
    assert len(set(segments)) == len(segments)  # hashable on every version
    pieces = [parameters[segment.parameter][segment.index] for segment in segments]
    assert torch.equal(flat(*pieces), selection.gather(model).detach())


def check_writing(selection, model):
    """scatter_ and add_ change what is selected, and nothing else; to models and mappings."""
    before = state(model)
    size = selection.size(model)
    vector = -1.0 - torch.arange(size, dtype=torch.float64)

    def selected():
        marks = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in before.items()}
        for segment in selection.segments(model):
            marks[segment.parameter][segment.index] = True
        return marks

    marks = selected()
    assert sum(int(mark.sum()) for mark in marks.values()) == size
    buffers = copy.deepcopy(dict(model.named_buffers()))
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]

    selection.scatter_(model, vector)
    assert torch.equal(selection.gather(model).detach(), vector)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~marks[name]], before[name][~marks[name]])
        assert (parameter[marks[name]] < 0).all()

    values = selection.gather(before, model=model)
    selection.scatter_(model, values)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    selection.add_(model, vector, alpha=-2)
    assert torch.equal(selection.gather(model).detach(), values - 2 * vector)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~marks[name]], before[name][~marks[name]])

    tensors = {name: torch.zeros_like(t) for name, t in before.items()} | {"extra": None}
    selection.add_(tensors, vector, model=model)
    selection.add_(tensors, vector, model=model)
    assert torch.equal(selection.gather(tensors, model=model), 2 * vector)
    selection.scatter_(tensors, vector, model=model)
    assert torch.equal(selection.gather(tensors, model=model), vector)
    assert all((tensors[name][~mark] == 0).all() for name, mark in marks.items())

    selection.scatter_(model, values)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_order_of_layers_and_units():
    """The model's order, not the selection's; weight and bias of one unit side by side."""
    model = numbered(
        nn.Sequential(nn.Linear(3, 4), nn.Conv1d(2, 3, 2, bias=False), nn.LayerNorm(4))
    )
    linear, conv, norm = model
    selection = UnitSelection({"2": [1], "1": [2], "0": [3, 1]})
    expected = flat(
        linear.weight[1],
        linear.bias[1],
        linear.weight[3],
        linear.bias[3],
        conv.weight[2],
        norm.weight[1],
        norm.bias[1],
    )
    assert torch.equal(selection.gather(model).detach(), expected)
    assert selection.segments(model)[:5] == (
        Segment("0.weight", "0", 1, 0, 3, (1,)),
        Segment("0.bias", "0", 1, 3, 1, (1,)),
        Segment("0.weight", "0", 3, 4, 3, (3,)),
        Segment("0.bias", "0", 3, 7, 1, (3,)),
        Segment("1.weight", "1", 2, 8, 4, (2,)),
    )


def test_segments_that_are_not_contiguous():
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 2, groups=2))
    assert UnitSelection({"0": [4]}).segments(model) == (
        Segment("0.weight", "0", 4, 0, 4, (slice(2, 4), 1)),
        Segment("0.bias", "0", 4, 4, 1, (4,)),
    )


def test_order_of_an_attentions_projections():
    model = numbered(nn.TransformerEncoderLayer(4, 2, 8))
    attention = model.self_attn
    selection = UnitSelection(
        {"linear1": [7], "self_attn.out_proj": [0, 3], "self_attn.in_proj": [5]}
    )
    expected = [
        *packed(attention, 5),
        *rows(attention.out_proj, 0, 3),
        *rows(model.linear1, 7),
    ]
    assert torch.equal(selection.gather(model).detach(), flat(*expected))
    every = UnitSelection.all(model)
    assert every.size(model) == sum(p.numel() for p in model.parameters())
    assert list(every.units) == [
        "self_attn.in_proj",
        "self_attn.out_proj",
        "linear1",
        "linear2",
        "norm1",
        "norm2",
    ]


def test_parameters_without_gradients_are_no_coordinates():
    model = numbered(nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)}))
    model["a"].weight.requires_grad_(False)
    model["b"].bias.requires_grad_(False)
    selection = UnitSelection({"a": [1, 2], "b": [3]})
    expected = flat(model["a"].bias[1:3], model["b"].weight[3])
    assert torch.equal(selection.gather(model).detach(), expected)
    check_writing(selection, model)


def test_a_reused_module():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

        def forward(self, x):
            return self.body(self.body(x))

    model = numbered(Reused())
    selection = UnitSelection({"body": [2]})
    assert torch.equal(selection.gather(model).detach(), flat(*rows(model.body, 2)))


def test_the_transformers_package_is_not_imported(monkeypatch):
    code = "transformers.pytorch_utils"
    monkeypatch.delitem(sys.modules, code, raising=False)  # other tests may import it
    with pytest.raises(ValueError, match="a module of type Conv1D has no units"):
        n_units(Conv1D(5, 3))  # looks like it, and is another class
    assert code not in sys.modules


# ---------------------------------------------------------------------------------------------
# Tied parameters


class LanguageModel(nn.Module):
    """An embedding and a head with one weight."""

    def __init__(self, padding_idx=None):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=padding_idx)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_tied_parameter_by_one_of_its_names(name):
    model = numbered(LanguageModel())
    selection = UnitSelection({name: [1, 4]})
    bias = [model.head.bias[[1, 4]].unsqueeze(1)] * (name == "head")
    expected = flat(torch.cat([model.embed.weight[[1, 4]], *bias], 1))
    assert torch.equal(selection.gather(model).detach(), expected)
    assert {s.parameter for s in selection.segments(model)} <= {"embed.weight", "head.bias"}
    check_segments(selection, model)
    check_writing(selection, model)


def test_a_tied_entry_is_one_coordinate():
    model = numbered(LanguageModel())
    weight, bias = model.embed.weight, model.head.bias
    selection = UnitSelection({"head": [1, 2, 3, 5], "embed": [2, 3, 4]})
    expected = flat(
        weight[2:5], weight[1], bias[1], bias[2], bias[3], weight[5], bias[5]
    )  # each entry at its first place
    assert torch.equal(selection.gather(model).detach(), expected)
    assert selection.size(model) == len(expected)
    check_segments(selection, model)
    check_writing(selection, model)
    every = UnitSelection.all(model)
    assert every.size(model) == sum(p.numel() for p in model.parameters())


def test_the_head_may_own_the_padding_row():
    model = numbered(LanguageModel(padding_idx=0))
    every = UnitSelection.all(model)
    assert every.units["embed"] == (1, 2, 3, 4, 5)
    assert every.size(model) == sum(p.numel() for p in model.parameters())


def test_tied_biases_and_norms():
    model = numbered(nn.ModuleDict({"a": nn.LayerNorm(3), "b": nn.Linear(2, 3)}))
    model["b"].bias = model["a"].bias
    selection = UnitSelection({"a": [1], "b": [0, 1]})
    expected = flat(
        model["a"].weight[1],
        model["a"].bias[1],
        model["b"].weight[0],
        model["a"].bias[0],
        model["b"].weight[1],
    )
    assert torch.equal(selection.gather(model).detach(), expected)
    check_writing(selection, model)


def test_projections_tied_to_each_other():
    model = numbered(nn.MultiheadAttention(4, 2, kdim=4, vdim=3))
    model.k_proj_weight = model.q_proj_weight
    selection = UnitSelection({"in_proj": [1, 5, 6]})
    q, bias = model.q_proj_weight, model.in_proj_bias
    expected = flat(q[1], bias[1], bias[5], q[2], bias[6])
    assert torch.equal(selection.gather(model).detach(), expected)
    check_writing(selection, model)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("kind", ["convolutions", "transformers"])
def test_a_tied_parameter_cut_in_two_ways(kind):
    if kind == "convolutions":
        first, second = nn.Conv2d(3, 3, 2), nn.ConvTranspose2d(3, 3, 2)
    else:
        first, second = nn.Linear(3, 3), Conv1D(3, 3)
    second.weight = first.weight
    model = numbered(nn.ModuleDict({"a": first, "b": second, "c": nn.Linear(2, 2)}))
    alone = UnitSelection({"b": [1]})
    assert torch.equal(alone.gather(model).detach(), flat(first.weight[:, 1], second.bias[1]))
    assert {s.parameter for s in alone.segments(model)} == {"a.weight", "b.bias"}
    check_writing(alone, model)
    message = "layers 'a' and 'b' cut the parameter 'a.weight', which is tied, .*one of them only"
    with pytest.raises(ValueError, match=message):
        UnitSelection({"b": [0], "a": [0]}).size(model)
    with pytest.raises(ValueError, match=message):
        UnitSelection.from_globs(model, "[ab]")
    assert list(UnitSelection.all(model).units) == ["a", "c"]


# ---------------------------------------------------------------------------------------------
# Refusals


def tied_by_memory():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())
    return model, "a"


def overlapping():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    memory = torch.zeros(15)
    model["a"].weight = nn.Parameter(memory[:9].view(3, 3))
    model["b"].weight = nn.Parameter(memory[6:].view(3, 3))
    return model, "b"


def expanded():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False)})
    model["a"].weight = nn.Parameter(torch.zeros(3, 1).expand(3, 3))
    return model, "a"


def parametrized_bias():
    layer = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return nn.ModuleDict({"a": layer}), "a"


def one_layer(build):
    return lambda: (nn.ModuleDict({"a": build()}), "a")


def attention_with_a_child():
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj = nn.Linear(4, 4)
    return nn.ModuleDict({"a": attention}), "a.in_proj"


def parametrized_attention():
    attention = nn.MultiheadAttention(4, 2)
    nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", nn.Tanh())
    return nn.ModuleDict({"a": attention}), "a.in_proj"


def buffer():
    layer = nn.Linear(3, 3)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


# What gets in the way, the reason, and whether `all` leaves the layer out.
REFUSALS = {
    "weight norm": (
        one_layer(lambda: parametrizations.weight_norm(nn.Linear(3, 3))),
        "its weight is computed from other parameters, by a parametrization",
        True,
    ),
    "parametrized bias": (
        parametrized_bias,
        "its bias is computed from other parameters, by a parametrization",
        True,
    ),
    "spectral norm by hooks": (
        one_layer(lambda: spectral_norm(nn.Linear(3, 3))),
        "its weight is computed from other parameters, or is a buffer",
        True,
    ),
    "pruned": (
        one_layer(lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)),
        "its weight is computed from other parameters, or is a buffer",
        True,
    ),
    "buffer": (
        one_layer(buffer),
        "its weight is computed from other parameters, or is a buffer",
        True,
    ),
    "lazy linear": (
        one_layer(lambda: nn.LazyLinear(3)),
        "its weight is not initialised; run the model once",
        True,
    ),
    "lazy batch norm": (one_layer(nn.LazyBatchNorm1d), "its weight is not initialised", True),
    "lazy transposed": (
        one_layer(lambda: nn.LazyConvTranspose2d(3, 2)),
        "its weight is not initialised",
        True,
    ),
    "frozen": (
        one_layer(lambda: nn.Linear(3, 3).requires_grad_(False)),
        "its parameters do not require gradients",
        True,
    ),
    "frozen embedding": (
        one_layer(lambda: nn.Embedding(3, 3, padding_idx=0).requires_grad_(False)),
        "its parameters do not require gradients",
        True,
    ),
    "no affine parameters": (
        one_layer(lambda: nn.BatchNorm1d(3, affine=False)),
        "it has no parameters",
        True,
    ),
    "max_norm": (
        one_layer(lambda: nn.Embedding(3, 3, max_norm=1.0)),
        "max_norm: its forward pass overwrites its weight",
        True,
    ),
    "scale_grad_by_freq": (
        one_layer(lambda: nn.EmbeddingBag(3, 3, scale_grad_by_freq=True)),
        "scale_grad_by_freq: its gradients are not derivatives of the loss",
        True,
    ),
    "padding only": (one_layer(lambda: nn.Embedding(1, 3, padding_idx=0)), "it is padding", True),
    "no units": (
        one_layer(lambda: nn.BatchNorm1d(0)),
        "whose units cannot be selected: it has none",
        True,
    ),
    "attention with a child of that name": (
        attention_with_a_child,
        "it names a module and the input projections of its attention",
        True,
    ),
    "parametrized attention": (parametrized_attention, "its in_proj_weight is computed", True),
    "shared memory": (
        tied_by_memory,
        "parameters 'a.weight' and 'b.weight' share memory without being one object",
        False,
    ),
    "overlap": (
        overlapping,
        "parameters 'a.weight' and 'b.weight' share memory without being one object",
        False,
    ),
    "expanded": (expanded, "parameter 'a.weight' is expanded", False),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm`")
def test_refused_by_name(case):
    build, reason, left_out = REFUSALS[case]
    model, name = build()
    model["fine"] = nn.Linear(2, 3)
    selection = UnitSelection({name: [1], "fine": [0]})
    message = reason if reason.startswith("parameter") else f"layer '{name}', .*{reason}"
    for method in (selection.size, selection.segments, selection.gather):
        with pytest.raises(ValueError, match=message):
            method(model)
    before = state(model["fine"])
    for method in (selection.scatter_, selection.add_):
        with pytest.raises(ValueError, match=message):
            method(model, torch.zeros(6))
    assert all(torch.equal(p, before[key]) for key, p in model["fine"].named_parameters())

    # The others are as usable as ever.
    other = UnitSelection({"fine": [0, 2]})
    assert torch.equal(other.gather(model).detach(), flat(*rows(model["fine"], 0, 2)))
    assert UnitSelection.from_globs(model, "f*") == UnitSelection({"fine": range(3)})
    if left_out:
        every = UnitSelection.all(model)
        assert name not in every.units
        assert every.units["fine"] == (0, 1, 2)
        assert every.size(model) > 0
        reason = reason.removeprefix("whose units cannot be selected: ")
        with pytest.raises(ValueError, match=f"pattern '{name}' matches no layer .*{reason}"):
            UnitSelection.from_globs(model, name)


def test_parameters_side_by_side_in_memory_are_fine():
    """As flattened weights are: no overlap, and they may be selected together."""
    memory = torch.arange(18, dtype=torch.float64)
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["a"].weight = nn.Parameter(memory[:9].view(3, 3))
    model["b"].weight = nn.Parameter(memory[9:].view(3, 3))
    assert torch.equal(UnitSelection({"a": [2], "b": [0]}).gather(model).detach(), memory[6:12])


def test_the_padding_row_is_refused():
    model = nn.ModuleDict({"e": nn.Embedding(5, 2, padding_idx=-1)})
    message = "unit 4 of layer 'e', which cannot be selected: it is padding_idx, whose gradient"
    with pytest.raises(ValueError, match=message):
        UnitSelection({"e": [0, 4]}).size(model)
    assert UnitSelection.from_globs(model, "*") == UnitSelection({"e": range(4)})


def test_a_frozen_projection_is_refused():
    model = nn.MultiheadAttention(4, 2, bias=False, kdim=3)
    model.k_proj_weight.requires_grad_(False)
    with pytest.raises(ValueError, match="unit 5 of layer 'in_proj', .* not require gradients"):
        UnitSelection({"in_proj": [1, 5]}).size(model)
    assert UnitSelection.all(model).units["in_proj"] == (0, 1, 2, 3, 8, 9, 10, 11)


def two_names():
    shared = nn.Linear(3, 3)
    attention = nn.MultiheadAttention(4, 2)
    return nn.ModuleDict(
        {
            "a": nn.Sequential(shared),
            "b": nn.Sequential(nn.ReLU(), shared),
            "c": attention,
            "d": attention,
            "lstm": nn.LSTM(2, 2),
        }
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b.1", "layer 'b.1', which is 'a.0' under another name; take that one"),
        ("d.in_proj", "layer 'd.in_proj', which is 'c.in_proj' under another name"),
        ("d.out_proj", "layer 'd.out_proj', which is 'c.out_proj' under another name"),
        ("c", "'c', a MultiheadAttention; its units are those of 'c.in_proj' and 'c.out_proj'"),
        ("lstm", r"'lstm', which has no units in this model \(a LSTM\); layers with units: 'a.0'"),
        ("b.0", r"'b.0', which has no units in this model \(a ReLU\)"),
        ("b", r"no units in this model \(a Sequential\); .*'a.0', 'c.in_proj', 'c.out_proj'$"),
        ("b.0.in_proj", "'b.0.in_proj', which has no units in this model; layers with"),
        ("nowhere", "'nowhere', which has no units in this model; layers with units: 'a.0'"),
        ("", r"layer '', which has no units in this model \(a ModuleDict\)"),
    ],
)
def test_names_that_have_no_units(name, message):
    with pytest.raises(ValueError, match=message):
        UnitSelection({name: [0]}).size(two_names())


def test_long_lists_of_layers_are_cut():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])
    with pytest.raises(ValueError, match="'10', '11' and 8 more$"):
        UnitSelection({"x": [0]}).size(model)
    with pytest.raises(ValueError, match="layers with units: none"):
        UnitSelection({"x": [0]}).size(nn.ReLU())


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.ReLU(), ValueError, "a module of type ReLU has no units"),
        (nn.LayerNorm(3, elementwise_affine=False), ValueError, "LayerNorm .*it has no parameters"),
        ("linear", TypeError, "model must be a torch.nn.Module; got str"),
    ],
)
def test_modules_without_units(module, error, message):
    with pytest.raises(error, match=message):
        n_units(module)


def test_units_of_frozen_layers_can_be_counted():
    assert n_units(nn.Linear(3, 5).requires_grad_(False)) == 5


MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
ZEROS = {name: torch.zeros_like(p) for name, p in MODEL.named_parameters()}
SELECTION = UnitSelection({"0": [1]})  # 4 coordinates


@pytest.mark.parametrize(
    ("source", "model", "error", "message"),
    [
        (MODEL, MODEL, TypeError, "model is given with a mapping only; {} is a model itself"),
        (ZEROS, None, TypeError, "model must be given where {} is a mapping"),
        (ZEROS, "model", TypeError, "model must be a torch.nn.Module; got str"),
        ([1.0], MODEL, TypeError, "{} must be a torch.nn.Module or a mapping .* type list"),
        ({}, MODEL, ValueError, "{} must have a tensor for parameter '0.weight'"),
        (
            ZEROS | {"0.bias": None},
            MODEL,
            TypeError,
            r"{}\['0.bias'\] must be a tensor; .*NoneType",
        ),
        (
            ZEROS | {"0.bias": torch.zeros(3)},
            MODEL,
            ValueError,
            r"{}\['0.bias'\] must be .* shape \(4,\); got shape \(3,\)",
        ),
        (
            ZEROS | {"0.weight": torch.zeros(4, 3).to_sparse()},
            MODEL,
            ValueError,
            r"{}\['0.weight'\] must be a dense tensor .*got shape \(4, 3\), torch.sparse_coo",
        ),
    ],
)
def test_bad_sources_and_targets(source, model, error, message):
    with pytest.raises(error, match=message.format("source")):
        SELECTION.gather(source, model=model)
    vector = torch.ones(4, dtype=torch.float64)
    for write in (SELECTION.scatter_, SELECTION.add_):
        with pytest.raises(error, match=message.format("target")):
            write(source, vector, model=model)
    assert all((tensor == 0).all() for tensor in ZEROS.values())


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        ([0.0] * 4, TypeError, "vector must be a tensor; got an object of type list"),
        (torch.zeros(5), ValueError, r"vector must have .* shape \(4,\); got shape \(5,\)"),
        (torch.zeros(4, 1), ValueError, r"got shape \(4, 1\)"),
        (torch.tensor(0.0), ValueError, r"got shape \(\)"),
        (
            torch.zeros(4, dtype=torch.complex128),
            TypeError,
            r"vector must convert to torch.float64, the dtype of target\['0.weight'\]; got "
            "torch.complex128",
        ),
    ],
)
def test_bad_vectors(vector, error, message):
    for write in (SELECTION.scatter_, SELECTION.add_):
        with pytest.raises(error, match=message):
            write(MODEL, vector)


@pytest.mark.parametrize("alpha", ["1", True, 1j, None, torch.tensor(1.0)])
def test_bad_alpha(alpha):
    with pytest.raises(TypeError, match="alpha must be a real number; got"):
        SELECTION.add_(MODEL, torch.zeros(4), alpha)


def test_nothing_is_written_if_anything_is_wrong():
    tensors = {name: t.clone() for name, t in ZEROS.items()}
    tensors["0.bias"] = tensors["0.bias"].long()  # the second of the two
    with pytest.raises(TypeError, match=r"target\['0.bias'\]"):
        SELECTION.scatter_(tensors, torch.ones(4), model=MODEL)
    tensors["0.bias"] = torch.zeros(1).expand(4)
    with pytest.raises(ValueError, match=r"target\['0.bias'\] is expanded"):
        SELECTION.add_(tensors, torch.ones(4), model=MODEL)
    assert all((tensor == 0).all() for tensor in tensors.values())


def test_tensors_on_several_devices():
    tensors = ZEROS | {"0.bias": torch.zeros(4, device="meta")}
    with pytest.raises(ValueError, match="on one device; they are on cpu, meta"):
        SELECTION.gather(tensors, model=MODEL)


# ---------------------------------------------------------------------------------------------
# Choosing


def small():
    return nn.ModuleDict(
        {
            "stem": nn.Conv1d(2, 3, 1),
            "block": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)),
            "head": nn.Linear(2, 2),
            "gate": nn.Linear(2, 2).requires_grad_(False),
        }
    )


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("*",), ["stem", "block.0", "block.2", "head"]),
        (("block.*",), ["block.0", "block.2"]),
        (("block.[!0]", "ste?"), ["stem", "block.2"]),
        (("head", "h*", "head"), ["head"]),
        (("*e*",), ["stem", "head"]),  # and "gate", which is frozen
    ],
)
def test_globs(patterns, names):
    model = small()
    selection = UnitSelection.from_globs(model, *patterns)
    every = UnitSelection.all(model)
    assert list(selection.units) == names
    assert selection.units == {name: every.units[name] for name in names}


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ((), ValueError, "patterns must have at least one pattern"),
        (("head", "tail*"), ValueError, "'tail\\*' matches no layer with units; layers with .*'st"),
        (("Head",), ValueError, "'Head' matches no layer"),
        (("gat*",), ValueError, "'gat\\*' matches no .*'gate': its parameters do not require"),
        (("head", 3), TypeError, "patterns must be strings; got 3"),
    ],
)
def test_bad_globs(patterns, error, message):
    with pytest.raises(error, match=message):
        UnitSelection.from_globs(small(), *patterns)


def test_all_of_nothing():
    assert UnitSelection.all(nn.ReLU()) == UnitSelection({})
    assert UnitSelection.all(nn.Linear(3, 2)) == UnitSelection({"": [0, 1]})
    assert UnitSelection.from_globs(nn.Linear(3, 2), "*") == UnitSelection({"": [0, 1]})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module; got dict"):
        UnitSelection.all({})


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_of_no_units_or_no_inputs():
    model = nn.ModuleDict(
        {"none": nn.Linear(3, 0), "empty": nn.Linear(0, 2), "fc": nn.Linear(2, 2)}
    )
    selection = UnitSelection.all(model)
    assert selection == UnitSelection({"empty": [0, 1], "fc": [0, 1]})
    numbered(model)
    assert selection.size(model) == 2 + 6
    check_segments(selection, model)
    check_writing(selection, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_empty_selection(dtype):
    model = small().to(dtype)
    empty = UnitSelection({})
    assert empty.size(model) == 0
    assert empty.segments(model) == ()
    vector = empty.gather(model)
    assert vector.shape == (0,)
    assert vector.dtype == dtype
    before = state(model)
    empty.scatter_(model, vector)
    empty.add_(model, vector)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert empty.gather(nn.ReLU()).shape == (0,)
    assert empty.gather({}, model=model).dtype == dtype


# ---------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(2, 4, 2, groups=2)).to(dtype)
    selection = UnitSelection({"0": [1, 3], "1": [2]})
    values = selection.gather(model).detach()
    assert values.dtype == dtype
    vector = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    selection.scatter_(model, vector)
    assert torch.equal(selection.gather(model), vector.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}

    # The sum is formed in the wider dtype and rounded once.
    step = 1e-3 * torch.linspace(1, 2, len(values), dtype=torch.float64)
    expected = (selection.gather(model).double() + 3 * step).to(dtype)
    selection.add_(model, step, alpha=3)
    assert torch.equal(selection.gather(model), expected)
    selection.add_(model, vector.to(dtype))
    expected = (expected + vector.to(dtype)).detach()
    assert torch.equal(selection.gather(model).detach(), expected)


def test_parameters_of_mixed_dtypes():
    model = nn.Sequential(nn.Linear(3, 4).bfloat16(), nn.Linear(3, 2))
    selection = UnitSelection({"0": [0], "1": [1]})
    values = selection.gather(model).detach()
    assert values.dtype == torch.float32
    assert torch.equal(values[:4], flat(*rows(model[0], 0)).float())
    before = state(model)
    selection.scatter_(model, values)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gradients_and_marks_by_name():
    model = numbered(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    loss = model(torch.ones(2, 3, dtype=torch.float64)).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    selection = UnitSelection({"2": [1]})
    expected = flat(gradients[2][1], gradients[3][1])
    assert torch.equal(selection.gather(named, model=model), expected)
    marks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    selection.scatter_(marks, torch.ones(5, dtype=torch.bool), model=model)
    assert [int(mark.sum()) for mark in marks.values()] == [0, 0, 4, 1]


def test_memory_formats_and_strides():
    """Parameters and targets that are not contiguous are read and written in place."""
    model = numbered(nn.Sequential(nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 6, 2, groups=2)))
    expected = UnitSelection.all(model).gather(model).detach()
    model.to(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    selection = UnitSelection.all(model)
    assert torch.equal(selection.gather(model).detach(), expected)
    check_segments(selection, model)
    check_writing(selection, model)

    linear = nn.ModuleDict({"a": nn.Linear(3, 4)})
    tensors = {"a.weight": torch.zeros(3, 8)[:, ::2].T, "a.bias": torch.zeros(8)[::2]}
    chosen = UnitSelection({"a": [1, 2]})
    vector = torch.arange(1.0, 9.0)
    chosen.scatter_(tensors, torch.arange(1.0, 17.0)[::2], model=linear)  # strided, too
    assert torch.equal(chosen.gather(tensors, model=linear), 2 * vector - 1)
    assert torch.equal(tensors["a.weight"][1], torch.tensor([1.0, 3.0, 5.0]))


def test_models_without_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(4, 2, 3))
    selection = UnitSelection.all(model)
    assert selection.size(model) == sum(p.numel() for p in model.parameters())
    assert len(selection.segments(model)) == 2 * len(selection)
    assert selection.gather(model).is_meta
    zeros = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    assert torch.equal(selection.gather(zeros, model=model), torch.zeros(selection.size(model)))


def test_gather_is_a_copy_and_differentiable():
    model = numbered(nn.Sequential(nn.Linear(3, 4)))
    selection = UnitSelection.all(model)
    before = state(model)
    vector = selection.gather(model)
    (vector**2).sum().backward()
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, 2 * parameter)
    vector.detach().zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_gather_under_function_transforms():
    """Per-sample gradients, gathered inside vmap."""
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    selection = UnitSelection({"": [1]})

    def single(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample,)).square().sum()

    def gradient(sample):
        tensors = torch.func.grad(single)(dict(model.named_parameters()), sample)
        return selection.gather(tensors, model=model)

    got = torch.func.vmap(gradient)(x)
    outputs = model(x).detach()[:, 1:]
    torch.testing.assert_close(got, 2 * outputs * torch.cat([x, torch.ones(5, 1)], 1))


def test_writing_under_grad_mode_leaves_leaves():
    model = nn.Linear(3, 2)
    selection = UnitSelection({"": [1]})
    with torch.enable_grad():
        selection.add_(model, torch.ones(4, requires_grad=True))
        selection.scatter_(model, selection.gather(model))
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in model.parameters())


@pytest.mark.parametrize("package", ["curvature", "unlearning"])
def test_without_torch(package):
    code = f"import sys; sys.modules['torch'] = None; import lcodec_ext.{package}"
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"ImportError: lcodec_ext.{package} needs PyTorch: pip install" in run.stderr


@pytest.mark.cuda
def test_on_a_gpu():
    """There and back; vectors come from any device."""
    layers = [nn.Linear(3, 5), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.LayerNorm((2, 3))]
    host = numbered(nn.Sequential(*layers))
    model = copy.deepcopy(host).cuda()
    selection = UnitSelection({"0": [4, 1], "1": [0, 3, 5], "2": [2, 4]})
    values = selection.gather(model).detach()
    assert values.is_cuda
    assert torch.equal(values.cpu(), selection.gather(host).detach())
    for vector in (-values, -values.cpu()):
        selection.scatter_(model, values)
        selection.add_(model, vector, alpha=0.5)
        assert torch.equal(selection.gather(model), values / 2)
        selection.scatter_(model, vector)
        assert torch.equal(selection.gather(model), -values)
    selection.scatter_(model, values)
    assert all(torch.equal(p.cpu(), state(host)[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------
# Random models


def layer_strategies():
    size = st.integers(1, 4)
    bias = st.booleans()

    def transpose(kind, groups, i, o, kernel, with_bias):
        return kind(i * groups, o * groups, kernel, groups=groups, bias=with_bias)

    convolutions = [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d]
    return st.one_of(
        st.builds(lambda i, o, b: nn.Linear(i, o, bias=b), size, size, bias),
        st.builds(transpose, st.sampled_from(convolutions), size, size, size, size, bias),
        st.builds(nn.Embedding, size, size),
        st.builds(nn.BatchNorm1d, size),
        st.builds(lambda a, b: nn.LayerNorm((a, b)), size, size),
        st.builds(
            lambda heads, kdim: nn.MultiheadAttention(2 * heads, heads, kdim=kdim), size, size
        ),
        st.just(nn.ReLU()),
    )


@st.composite
def models_and_selections(draw):
    layers = draw(st.lists(layer_strategies(), min_size=1, max_size=4))
    model = nn.Sequential(*layers)
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    if draw(st.booleans()):  # an alias
        model.append(layers[0])
    candidates = UnitSelection.all(model).units
    units = {}
    for name in draw(st.permutations(sorted(candidates))):
        chosen = draw(st.sets(st.sampled_from(candidates[name])))
        if chosen:
            units[name] = chosen
    return numbered(model), UnitSelection(units)


def enumerated(model, selection):
    """(parameter name, flat index) of every coordinate, entry by entry from the definitions."""
    coordinates = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            name = f"{name}.in_proj"
        for unit in selection.units.get(name, ()):
            for key, parameter in module.named_parameters(recurse=False):
                for flat_index in range(parameter.numel()):
                    position = np.unravel_index(flat_index, parameter.shape)
                    if parameter.requires_grad and owner_of(module, key, position) == unit:
                        coordinates.append((f"{name}.{key}".replace("in_proj.", ""), flat_index))
    return coordinates


def owner_of(module, key, position):
    """The unit that has an entry of a module's parameter."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)) and key == "weight":
        n_inputs = module.in_channels // module.groups
        n_outputs = module.out_channels // module.groups
        return position[0] // n_inputs * n_outputs + position[1]
    if isinstance(module, nn.LayerNorm):
        return np.ravel_multi_index(position, module.normalized_shape)
    shift = {"q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}.get(key, 0)
    return position[0] + shift * getattr(module, "embed_dim", 0)


@given(models_and_selections())
def test_random_models(drawn):
    model, selection = drawn
    parameters = dict(model.named_parameters())
    coordinates = enumerated(model, selection)
    expected = [parameters[name].flatten()[index].item() for name, index in coordinates]
    assert selection.gather(model).tolist() == expected
    assert selection.size(model) == len(coordinates)
    check_segments(selection, model)
    check_writing(selection, model)
    assert UnitSelection.from_json(selection.to_json()) == selection

    every = UnitSelection.all(model)
    assert selection | every == every
    assert selection & every == selection
    rest = every - selection
    assert rest & selection == UnitSelection({})
    assert rest | selection == every
    assert rest.size(model) + selection.size(model) == every.size(model)


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 5), min_size=1)),
        min_size=2,
        max_size=2,
    )
)
def test_set_operations_are_those_of_sets(units):
    one, other = map(UnitSelection, units)

    def pairs(selection):
        return {(name, unit) for name, chosen in selection.units.items() for unit in chosen}

    assert pairs(one | other) == pairs(one) | pairs(other)
    assert pairs(one & other) == pairs(one) & pairs(other)
    assert pairs(one - other) == pairs(one) - pairs(other)
    assert len(one) == len(pairs(one))
    assert (one == other) == (pairs(one) == pairs(other))
    if one == other:
        assert hash(one) == hash(other)
