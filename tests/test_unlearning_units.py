"""The layers of an unlearning, and what is recorded of their units under perturbation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcodec_ext.curvature.units import UnitLayout
from lcodec_ext.unlearning import UnitSelection, perturbation
from lcodec_ext.unlearning.perturbation import (
    ActivationRecorder,
    Call,
    perturbed_inputs,
    record_perturbations,
    select_units,
)
from lcodec_ext.unlearning.samples import Samples
from lcodec_ext.unlearning.units import check_selection, find_layers


def seeded(module_seed, *modules):
    torch.manual_seed(module_seed)
    for module in modules:
        module.double().eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return modules if len(modules) > 1 else modules[0]


class Reused(nn.Module):
    """Calls a layer twice, and its layers in another order than they are registered."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class SequenceFirst(nn.Module):
    """Its layers see (time, sample, feature)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x.transpose(0, 1))).mean(0))


def record(model, request, **options):
    layers, _ = find_layers(model)
    with ActivationRecorder(layers) as recorder, torch.no_grad():
        model(request.inputs)
        calls = list(recorder.take())
    settings = {"n_perturbations": 7, "noise_std": 0.3, "batch_size": 64, "seed": 5}
    recorded = record_perturbations(
        model, layers, calls, request, F.cross_entropy, progress=False, **settings | options
    )
    return layers, calls, *recorded


def request_of(m, *shape, classes=3):
    generator = torch.Generator().manual_seed(m)
    inputs = torch.randn(m, *shape, dtype=torch.float64, generator=generator)
    return Samples(inputs, torch.arange(m) % classes)


# ---------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({}, "at least one unit"),
        ({"fc": [0]}, "names layer 'fc', which has no units .*'0', '3'"),
        ({"1": [0]}, "names layer '1'"),
        ({"2": [0]}, "names layer '2'"),
    ],
)
def test_selections_of_other_layers(units, message):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    layers, _ = find_layers(model)
    with pytest.raises(ValueError, match=message):
        check_selection(UnitSelection(units), layers)
    check_selection(UnitSelection({"3": [1]}), layers)


def test_layers_of_equal_description_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert len({str(module) for module in model}) == 1
    layers, _ = find_layers(model)
    assert [layers[name].module for name in ("0", "1", "2")] == list(model)


def test_layers_without_units_say_why():
    model = nn.ModuleDict(
        {
            "up": nn.ConvTranspose2d(2, 3, 2),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            "weight_only": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
        }
    )
    model["weight_only"].bias.requires_grad_(False)
    model["frozen_norm"] = nn.LayerNorm(2).requires_grad_(False)
    layers, without = find_layers(model)
    assert list(layers) == ["weight_only"]
    assert {name: reason.split()[0] for name, reason in without.items()} == {
        "up": "transposed",
        "frozen": "its",
        "normed": "its",
    }


@pytest.mark.parametrize("tie", ["linear", "embedding"])
def test_tied_parameters_are_refused_by_name(tie):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Embedding(3, 3)})
    model["b" if tie == "linear" else "c"].weight = model["a"].weight
    other = "b" if tie == "linear" else "c"
    with pytest.raises(ValueError, match=f"tied parameters: a.weight is {other}.weight"):
        find_layers(model)


def test_a_module_under_two_names_is_one_layer():
    shared = nn.Linear(3, 3)
    layers, _ = find_layers(nn.Sequential(shared, nn.Tanh(), shared))
    assert list(layers) == ["0"]


def test_substituted_parameters():
    model = seeded(
        0, nn.Sequential(nn.Linear(3, 4), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.LayerNorm(4))
    )
    selection = UnitSelection({"1": [2, 4], "0": [1, 3], "2": [0]})
    layout = UnitLayout(selection, model)
    vector = torch.arange(layout.size, dtype=torch.float64).requires_grad_()
    replaced = layout.substituted(vector)
    assert set(replaced) == {name for name, _ in model.named_parameters()}
    assert torch.equal(layout.gather(replaced), vector)
    (gradient,) = torch.autograd.grad(sum(t.sum() for t in replaced.values()), vector)
    assert torch.equal(gradient, torch.ones(layout.size, dtype=torch.float64))
    selection.scatter_(model, vector)
    assert all(torch.equal(model.get_parameter(k), v) for k, v in replaced.items())


# ---------------------------------------------------------------------------------------------
# Perturbations


def test_noise_depends_on_seed_and_index_alone():
    inputs = torch.zeros(5, 4, dtype=torch.float64)
    noise = perturbed_inputs(inputs, 1.0, 3, 8)
    assert torch.equal(noise, perturbed_inputs(inputs, 1.0, 3, 8))
    assert torch.equal(2 + noise * 0.25, perturbed_inputs(inputs + 2, 0.25, 3, 8))
    assert not torch.equal(noise, perturbed_inputs(inputs, 1.0, 3, 9))
    assert not torch.equal(noise, perturbed_inputs(inputs, 1.0, 4, 8))


def test_noise_has_the_given_spread():
    noise = perturbed_inputs(torch.zeros(20_000, dtype=torch.float64), 0.1, 0, 0)
    assert abs(noise.mean().item()) < 0.1 * 4 / 20_000**0.5
    assert noise.std().item() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 13, 1000])
def test_batch_size_changes_nothing(batch_size, monkeypatch):
    model = seeded(1, nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    largest = 0
    seen = []

    def spy(*arguments):
        seen.append(perturbed_inputs(*arguments))
        return seen[-1]

    def count(module, inputs):
        nonlocal largest
        value = inputs[0]
        while torch._C._functorch.is_batchedtensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        largest = max(largest, value.numel() // 4)

    request = request_of(6, 4)
    expected = record(model, request)
    monkeypatch.setattr(perturbation, "perturbed_inputs", spy)
    model[0].register_forward_pre_hook(count)
    got = record(model, request, batch_size=batch_size)
    assert largest <= max(batch_size, len(request))
    for index, inputs in enumerate(seen):
        assert torch.equal(inputs, perturbed_inputs(request.inputs, 0.3, 5, index))
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-12)
    np.testing.assert_allclose(got[3], expected[3], rtol=1e-12)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_recorded_activations_are_those_of_single_passes(batch_size):
    model = seeded(2, nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten()))
    model.append(seeded(3, nn.Linear(16, 3)))
    request = request_of(5, 2, 4, 4)
    _, calls, activations, losses = record(model, request, batch_size=batch_size)
    assert calls == [Call("0", 0), Call("3", 0)]
    for k in range(7):
        x = perturbed_inputs(request.inputs, 0.3, 5, k)
        with torch.no_grad():
            expected = torch.cat([model[0](x).mean((0, 2, 3)), model(x).mean(0)])
            loss = F.cross_entropy(model(x), request.targets)
        np.testing.assert_allclose(activations[k], expected.numpy(), rtol=1e-12)
        assert losses[k] == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_samples_need_not_be_the_first_axis_of_a_layer(batch_size):
    model = seeded(4, SequenceFirst())
    request = request_of(4, 5, 3, classes=2)
    _, _, activations, _ = record(model, request, batch_size=batch_size)
    x = perturbed_inputs(request.inputs, 0.3, 5, 6)
    with torch.no_grad():
        expected = torch.cat([model.embed(x).mean((0, 1)), model(x).mean(0)])
    np.testing.assert_allclose(activations[6], expected.numpy(), rtol=1e-12)


def test_every_call_of_a_reused_module_has_its_columns():
    model = seeded(5, Reused())
    request = request_of(4, 4)
    _, calls, activations, _ = record(model, request)
    assert calls == [Call("body", 0), Call("body", 1), Call("head", 0)]
    x = perturbed_inputs(request.inputs, 0.3, 5, 0)
    with torch.no_grad():
        first = model.body(x)
        second = model.body(torch.tanh(first))
    np.testing.assert_allclose(activations[0, :4], first.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(activations[0, 4:8], second.mean(0).numpy(), rtol=1e-12)


def test_hooks_are_removed_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), ActivationRecorder(find_layers(model)[0]):
        model(torch.zeros(1, 3))
    assert not model[0]._forward_hooks


def test_calls_that_change_are_refused():
    model = seeded(6, Reused())
    layers, _ = find_layers(model)
    with pytest.raises(ValueError, match="change from input to input"):
        record_perturbations(
            model,
            layers,
            [Call("body", 0), Call("head", 0)],
            request_of(4, 4),
            F.cross_entropy,
            n_perturbations=3,
            noise_std=0.1,
            batch_size=8,
            seed=0,
            progress=False,
        )


# ---------------------------------------------------------------------------------------------
# Selection by L-FOCI


@pytest.fixture
def planted(rng):
    """Activations of a reused layer of 4 units, 2 calls; the loss hangs on units 1 and 3."""
    layers, _ = find_layers(nn.ModuleDict({"fc": nn.Linear(4, 4)}))
    activations = rng.normal(size=(400, 8)) * 1e-4  # far below the paper's absolute noise
    losses = activations[:, 1] ** 2 + activations[:, 1] * activations[:, 7]
    return layers, [Call("fc", 0), Call("fc", 1)], activations, losses


OPTIONS = {"max_units": None, "seed": 0, "progress": False}


def test_the_units_that_matter_are_selected(planted):
    units, result = select_units(*planted, **OPTIONS)
    assert units == {("fc", 1), ("fc", 3)}
    assert set(result.ordering) == {1, 7}
    assert set(result.names) == {"fc[1] call 0", "fc[3] call 1"}
    assert result.n_features == 8


def test_a_unit_selected_by_two_calls_counts_once(planted):
    layers, calls, activations, _ = planted
    losses = activations[:, 1] * activations[:, 5]
    units, result = select_units(layers, calls, activations, losses, **OPTIONS)
    assert set(result.ordering) >= {1, 5}
    assert ("fc", 1) in units
    assert len(units) < len(result.ordering)


def test_max_units_is_a_cap(planted):
    units, result = select_units(*planted, **OPTIONS | {"max_units": 1})
    assert len(units) == 1
    assert result.stop_reason == "max_features"


def test_dead_units_are_left_out(planted):
    layers, calls, activations, losses = planted
    activations[:, [0, 2]] = 0.0  # lfoci would warn of constant columns
    units, result = select_units(layers, calls, activations, losses, **OPTIONS)
    assert units == {("fc", 1), ("fc", 3)}
    assert set(result.ordering) == {1, 7}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, y: (a, y * 0), "same under all perturbations"),
        (lambda a, y: (a * 0, y), "selects no unit from 400 perturbations.*selection='all'"),
        (lambda a, y: (a, y + np.nan), "loss of the perturbed request is NaN"),
        (lambda a, y: (np.where(np.arange(8) == 6, np.inf, a), y), "unit 2 of layer 'fc'"),
    ],
)
def test_what_cannot_be_selected_from(planted, spoil, message):
    layers, calls, activations, losses = planted
    with pytest.raises(ValueError, match=message):
        select_units(layers, calls, *spoil(activations, losses), **OPTIONS)
