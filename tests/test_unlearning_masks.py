"""Deletions on single parameters and on parameters of no unit, and patches of what they change."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcodec_ext._torch.states import state_hash, state_of
from lcodec_ext._torch.tensor_files import write_tensors
from lcodec_ext.curvature import ParameterSelection, UnitSelection, all_trainable
from lcodec_ext.unlearning import (
    Settings,
    TrainingStatistics,
    Unlearner,
    WeightPatch,
    unlearn,
    verify_ledger,
)

DECAY = 1e-2
PLAIN = {
    "weight_decay": DECAY,
    "damping": 0.0,
    "output_damping": 0.0,
    "n_curvature": None,
    "max_drop": None,
    "halvings": 0,
    "lengthen": None,
    "retries": 0,
    "repair_epochs": 0,
    "repair_drop": None,
    "n_recalibrate": None,
    "rtol": 1e-12,
    "max_iterations": None,
    "dtype": torch.float64,
}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Raw(nn.Module):
    """No layer at all."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 15) / 4)
        self.b = nn.Parameter(torch.randn(3, 5) / 2)

    def forward(self, x):
        return torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T


class Tied(nn.Module):
    """One matrix in two layers, which is also used outside of them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(15, 3, bias=False)
        self.same = nn.Linear(15, 3)
        self.same.weight = self.down.weight

    def forward(self, x):
        x = x.flatten(1)
        return self.down(x) + torch.tanh(self.same(F.softplus(x))) @ self.down.weight[:, :3]


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS = {
    "gru": lambda: Recurrent(nn.GRU),
    "lstm": lambda: Recurrent(nn.LSTM),
    "raw": Raw,
    "tied": Tied,
    "mlp": mlp,
}


def data(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 5, 3, dtype=torch.float64, generator=generator)
    return X, (X[:, :, 0].sum(1) > 0).long() + (X[:, :, 1].sum(1) > 1).long()


def trained(name):
    """At a stationary point of the objective on all samples."""
    torch.manual_seed(1)
    model = MODELS[name]().double()
    X, y = data()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        norm = sum(p.square().sum() for p in model.parameters())
        loss = F.cross_entropy(model(X), y) + DECAY / 2 * norm
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad()
    return model.eval()


FORGET, RETAIN = tuple(t[:4] for t in data()), tuple(t[4:] for t in data())


def deleted(model, **options):
    return unlearn(model, FORGET, RETAIN, F.cross_entropy, **(PLAIN | options))


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def step_by_hand(model, chosen):
    """The Gauss-Newton step on flat indices of all parameters, from dense matrices."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes = [p.numel() for p in parameters]

    def outputs(v, X):
        parts = zip(v.split(sizes), parameters, strict=True)
        tensors = {n: part.view_as(p) for n, (part, p) in zip(names, parts, strict=True)}
        return torch.func.functional_call(model, tensors, (X,))

    w = flat(model)
    J = torch.autograd.functional.jacobian(lambda v: outputs(v, RETAIN[0]), w)[..., chosen]
    p = outputs(w, RETAIN[0]).softmax(1)
    by_output = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("ica,icd,idb->ab", J, by_output, J) / len(p)
    gradient = torch.autograd.functional.jacobian(
        lambda v: F.cross_entropy(outputs(v, FORGET[0]), FORGET[1]), w
    )
    share = len(FORGET[1]) / len(RETAIN[1])
    removal = (gradient + DECAY * w)[chosen] * share
    return torch.linalg.solve(
        matrix + DECAY * torch.eye(len(removal), dtype=torch.float64), removal
    )


def flat_indices(model, selection):
    marks, start = {}, 0
    for name, parameter in model.named_parameters():
        marks[name] = torch.arange(start, start + parameter.numel()).view(parameter.shape)
        start += parameter.numel()
    return selection.gather(marks, model=model)


# ---------------------------------------------------------------------------------------------
# All trainable parameters


@pytest.mark.parametrize("name", MODELS)
def test_full_changes_every_trainable_parameter(name):
    model = trained(name)
    before = flat(model)
    result = deleted(model)
    moved = flat(result.model) - before
    expected = step_by_hand(model, torch.arange(len(before)))
    assert (moved - expected).norm() < 1e-8 * expected.norm()
    for key, parameter in result.model.named_parameters():
        assert (parameter != model.get_parameter(key)).any(), key
    assert result.n_parameters == result.n_trainable == len(before)
    assert result.loss_forget.after > result.loss_forget.before
    if name in ("mlp", "tied"):  # every parameter belongs to units
        assert result.selection == UnitSelection.all(model)
    else:
        assert result.selection == ParameterSelection.of(model)
        assert f"parameters    {len(before)} of {len(before)}, full" in repr(result)


def test_rules_of_units_go_on_where_others_have_none():
    model = trained("gru")
    with pytest.warns(UserWarning, match="108 of 123 trainable parameters belong to none: 'rnn.w"):
        result = deleted(model, selection="gradient", n_units=2)
    assert isinstance(result.selection, UnitSelection)
    assert torch.equal(result.model.rnn.weight_ih_l0, model.rnn.weight_ih_l0)
    with pytest.raises(ValueError, match="no layer whose units can be selected"):
        deleted(trained("raw"), selection="gradient", n_units=2)
    heads = deleted(model, candidates=("head",))
    assert heads.selection == UnitSelection({"head": [0, 1, 2]})


def test_calibration_finds_a_strength_for_an_rnn():
    model = trained("gru")
    result = unlearn(
        model, FORGET, RETAIN, F.cross_entropy, weight_decay=DECAY, validation=data(30, seed=1)
    )
    assert result.calibration is not None
    assert result.skipped or (result.model.rnn.weight_hh_l0 != model.rnn.weight_hh_l0).any()


# ---------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.1, 7])
def test_the_largest_steps_solved_again(name, share):
    model = trained(name)
    w = flat(model)
    full = step_by_hand(model, torch.arange(len(w)))
    count = share if share == 7 else int(0.1 * len(w))
    chosen = full.abs().argsort(descending=True, stable=True)[:count].sort().values
    result = deleted(model, selection="step", max_parameters=share)
    assert result.n_parameters == len(result.selection) == count
    assert flat_indices(model, result.selection).tolist() == chosen.tolist()
    moved = flat(result.model) - w
    expected = step_by_hand(model, chosen)
    assert (moved[chosen] - expected).norm() < 1e-8 * expected.norm()
    rest = torch.ones(len(w), dtype=torch.bool)
    rest[chosen] = False
    assert not moved[rest].any()
    assert f"parameters    {count} of {len(w)}, step (" in repr(result)
    json.dumps(result.to_dict())


def test_units_by_their_share_of_the_step():
    model = trained("mlp")
    units = UnitSelection.all(model)
    full = step_by_hand(model, torch.arange(flat(model).numel()))
    score = {}
    for layer, numbers in units.units.items():
        for unit in numbers:
            one = UnitSelection({layer: [unit]})
            where = flat_indices(model, one)
            score[layer, unit] = float(full[where].square().sum() / len(where))
    best = sorted(score, key=score.get, reverse=True)[:3]
    result = deleted(model, selection="step_units", n_units=3)
    assert result.selection == UnitSelection(
        {layer: [u for name, u in best if name == layer] for layer in {name for name, _ in best}}
    )
    few = deleted(model, selection="step_units", max_parameters=0.3)
    assert few.n_parameters <= 0.3 * few.n_trainable


def test_a_given_mask_and_candidates():
    model = trained("mlp")
    mask = ParameterSelection({"1.weight": [0, 50, 119], "3.bias": range(3)})
    result = deleted(model, selection=mask)
    assert result.selection == mask
    chosen = flat_indices(model, mask)
    moved = flat(result.model) - flat(model)
    expected = step_by_hand(model, chosen)
    assert (moved[chosen] - expected).norm() < 1e-8 * expected.norm()
    inside = deleted(model, selection="step", max_parameters=5, candidates=("3",))
    assert set(inside.selection.counts) <= {"3.weight", "3.bias"}
    assert len(inside.selection) == 5


def test_masks_through_all_phases():
    """Calibration, guard, repair and noise know nothing of units."""
    model = trained("mlp").float()
    forget, retain = ((X.float(), y) for X, y in (FORGET, RETAIN))
    held = data(40, seed=3)[0].float(), data(40, seed=3)[1]
    common = {"weight_decay": DECAY, "selection": "step", "max_parameters": 0.2}
    for options in (
        {"validation": held},
        {"validation": held, "calibrate": False, "repair_epochs": 1, "repair_drop": None},
        {"update": "gradient", "learning_rate": 0.1, "calibrate": False},
        {"curvature": "secant", "calibrate": False},
        {"curvature": "hessian", "damping": 1.0},
        {"curvature": "fisher", "damping": 1e-2},
        {"order": "sequential", "damping": 1e-2},
        {"steps": 2, "gradient": "residual", "damping": 1e-1},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            result = unlearn(model, forget, retain, F.cross_entropy, **common, **options)
        mask = result.selection
        assert isinstance(mask, ParameterSelection)
        moved = flat(result.model) != flat(model)
        chosen = torch.zeros_like(moved)
        chosen[flat_indices(model, mask)] = True
        assert not (moved & ~chosen).any(), options
        assert result.skipped or moved.any(), options


def test_statistics_serve_masks():
    model = trained("gru")
    train = tuple(torch.cat(parts) for parts in zip(FORGET, RETAIN, strict=True))
    statistics = TrainingStatistics.collect(model, train, F.cross_entropy)
    assert statistics.selection == all_trainable(model)
    assert isinstance(statistics.selection, ParameterSelection)
    options = PLAIN | {"selection": "step", "max_parameters": 9}
    with_data = deleted(model, **options)
    without = unlearn(model, FORGET, None, F.cross_entropy, statistics=statistics, **options)
    assert without.selection == with_data.selection
    a, b = flat(without.model) - flat(model), flat(with_data.model) - flat(model)
    assert (a - b).norm() < 1e-8 * b.norm()
    after = statistics.without(model, F.cross_entropy, FORGET)
    assert after.n == len(RETAIN[1])
    few = TrainingStatistics.collect(
        model, train, F.cross_entropy, selection=UnitSelection.all(model)
    )
    with pytest.raises(ValueError, match=r"no curvature of \d+ of the \d+ parameters"):
        unlearn(model, FORGET, None, F.cross_entropy, statistics=few, **PLAIN)


def test_statistics_of_masks_go_through_files(tmp_path):
    model = trained("gru")
    mask = ParameterSelection({"rnn.weight_ih_l0": [0, 3, 7], "head.bias": range(3)})
    statistics = TrainingStatistics.collect(model, RETAIN, F.cross_entropy, selection=mask)
    statistics.save(tmp_path / "statistics.pt")
    assert TrainingStatistics.load(tmp_path / "statistics.pt").selection == mask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "step"}, "selection='step' needs max_parameters"),
        ({"selection": "step", "n_units": 3}, "selects single parameters, not units"),
        ({"selection": "step_units"}, "needs n_units or max_parameters"),
        ({"selection": ParameterSelection({"a": [0]}), "n_units": 1}, "a ParameterSelection says"),
        ({"selection": "step", "max_parameters": 1e-4}, "allows no parameter, of 155"),
        ({"selection": ParameterSelection({"a": [0]})}, "which this model does not have"),
        ({"selection": ParameterSelection({})}, "at least one parameter"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        deleted(trained("mlp"), **options)


def test_settings_go_through_json():
    for selection in ("step", ParameterSelection({"w": [1, 4], "b": range(3)})):
        size = {"max_parameters": 0.1} if selection == "step" else {}
        settings = Settings.preset("recommended", selection=selection, **size)
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_a_stream_of_masked_deletions(tmp_path):
    model = trained("gru")
    train = tuple(torch.cat(parts) for parts in zip(FORGET, RETAIN, strict=True))
    options = PLAIN | {"selection": "step", "max_parameters": 9}
    with Unlearner(
        model, train, F.cross_entropy, directory=tmp_path / "run", **options
    ) as unlearner:
        first = unlearner.remove([0, 1])
        second = unlearner.remove([5])
        record = unlearner.ledger[1].record
        assert record["selection"] == first.selection.to_dict()
        assert ParameterSelection.from_dict(record["selection"]) == first.selection
    assert verify_ledger(tmp_path / "run", second.model, train)
    resumed = Unlearner.resume(tmp_path / "run", MODELS["gru"]().double(), train, F.cross_entropy)
    assert resumed.settings == unlearner.settings
    resumed.close()
    # What was sent on: patches apply in their order, and their hashes are those of the ledger.
    copied = copy.deepcopy(model)
    for k, result in ((1, first), (2, second)):
        patch = result.patch()
        assert patch.apply(copied)
        assert patch.after == unlearner.ledger[k].record["checkpoint"]["sha256"]
    assert state_hash(state_of(copied)) == state_hash(state_of(second.model))


# ---------------------------------------------------------------------------------------------
# Patches


def bits(model):
    return state_hash(state_of(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("selection", ["full", "step"])
def test_patches_give_the_same_bits(dtype, selection, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(15, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model = model.to(dtype).eval()
    X, y = data()
    X = X.to(dtype)
    size = {"max_parameters": 0.1} if selection == "step" else {}
    options = PLAIN | {"selection": selection, "damping": 1.0, "dtype": None, "rtol": None} | size
    options |= {"n_recalibrate": 30}  # buffers change, too
    result = unlearn(model, (X[:4], y[:4]), (X[4:], y[4:]), F.cross_entropy, **options)
    patch = result.patch()
    assert patch.before == bits(model)
    assert patch.after == bits(result.model)
    patch.save(tmp_path / "patch.safetensors")
    loaded = WeightPatch.load(tmp_path / "patch.safetensors")
    assert repr(loaded) == repr(patch)
    assert loaded.nbytes <= sum(t.nbytes for t in model.state_dict().values())
    for one in (patch, loaded):
        target = copy.deepcopy(model)
        assert one.apply(target)
        assert bits(target) == bits(result.model)
        with pytest.warns(UserWarning, match="has this patch already"):
            assert not one.apply(target)
        assert bits(target) == bits(result.model)
    moved = sum(
        int((p != q).sum())
        for p, q in zip(model.parameters(), result.model.parameters(), strict=True)
    )
    kept = [t for k, t in patch.tensors.items() if "running" not in k]
    assert 0 < moved <= sum(t.values.numel() for t in kept)
    if selection == "step":
        assert moved <= 0.1 * result.n_trainable


def test_patch_of_a_change_in_place():
    model = trained("mlp")
    original = copy.deepcopy(model)
    result = deleted(model, inplace=True)
    assert result.model is model
    assert result.patch().apply(original)
    assert bits(original) == bits(model)


def test_special_values_and_buffers_of_all_kinds(tmp_path):
    class Kinds(nn.Module):
        def __init__(self, shift):
            super().__init__()
            values = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45, 1.0])
            self.register_buffer("floats", values.roll(shift))
            self.register_buffer("scalar", torch.tensor(1.5 + shift))
            self.register_buffer("counts", torch.arange(50) + torch.eye(50).long()[7] * shift)
            self.register_buffer("flags", torch.tensor([True, bool(shift)]))
            self.register_buffer("complex", torch.tensor([1 + 2j, 3 + shift * 1j]))
            self.register_buffer("wide", torch.ones(3, dtype=torch.complex128) * (1 + shift))
            self.register_buffer("across", torch.arange(20.0).view(4, 5).T.clone().T)
            self.across[1, 2] += shift
            self.register_buffer("none", torch.empty(0))
            self.register_buffer(
                "small",
                torch.ones(4).to(torch.float8_e4m3fn)
                if shift
                else torch.zeros(4).to(torch.float8_e4m3fn),
            )

    old, new = Kinds(0), Kinds(1)
    patch = WeightPatch.between(old, new)
    assert patch.tensors["counts"].indices.tolist() == [7]
    assert patch.tensors["counts"].values.tolist() == [8]
    assert "none" not in patch.tensors
    patch.save(tmp_path / "p.safetensors")
    WeightPatch.load(tmp_path / "p.safetensors").apply(old)
    assert bits(old) == bits(new)
    same = WeightPatch.between(new, new)
    assert same.n_changed == 0


def test_patches_refuse_other_models(tmp_path):
    model = trained("mlp")
    patch = deleted(model, selection="step", max_parameters=4).patch()
    assert patch.n_changed == 4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].weight[0, 0] += 1
    before = bits(other)
    with pytest.raises(ValueError, match="the patch is for weights whose SHA-256 is"):
        patch.apply(other)
    assert bits(other) == before
    assert patch.apply(other, strict=False)
    half = copy.deepcopy(model).half()
    with pytest.raises(ValueError, match=r"torch\.float64; in model it has shape .*float16"):
        patch.apply(half)
    assert patch.apply(half, strict=False)
    for strict in (True, False):
        with pytest.raises(ValueError, match="which model does not have"):
            patch.apply(nn.Linear(3, 2), strict=strict)
        wide = nn.Sequential(nn.Flatten(), nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        with pytest.raises(ValueError, match="the patch is for"):
            patch.apply(wide, strict=strict)
    with pytest.raises(ValueError, match="must be of one architecture"):
        WeightPatch.between(model, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="must be of one architecture"):
        WeightPatch.between(model, half)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        WeightPatch.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        WeightPatch.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="none' is not a folder; make it first"):
        patch.save(tmp_path / "none" / "patch.safetensors")
    with pytest.raises(TypeError, match="path must be a string or a path; got dict"):
        WeightPatch.load(patch.tensors)
    for listed in ({}, {"tensors": "{"}, {"tensors": '{"w": ["torch.float32", [2]]}'}):
        text = {"format": "weight patch 1", "before": "a", "after": "b"} | listed
        write_tensors(tmp_path / "torn.safetensors", {"v": torch.ones(2)}, text)
        with pytest.raises(ValueError, match="is damaged"):
            WeightPatch.load(tmp_path / "torn.safetensors")
    ParameterSelection({"w": [0]}).save(tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match="holds no weight patch 1"):
        WeightPatch.load(tmp_path / "mask.safetensors")


def test_a_model_that_ties_what_the_patch_tells_apart_stays_as_it_is():
    def pair(tied):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        for p in model.parameters():
            nn.init.ones_(p)
        if tied:
            model[1].weight = model[0].weight
        return model

    apart, tied = pair(False), pair(True)
    changed = copy.deepcopy(apart)
    nn.init.zeros_(changed[0].weight)
    patch = WeightPatch.between(apart, changed)
    before = bits(tied)
    with pytest.raises(ValueError, match="does not take the patch: it ties tensors"):
        patch.apply(tied)
    assert bits(tied) == before


def test_states_that_are_no_tensors_have_no_patch():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return "text"

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    model = Extra(3, 3)
    X = torch.randn(20, 3)
    result = unlearn(
        model, (X[:2], torch.arange(2)), (X[2:], torch.arange(18) % 3), F.cross_entropy, damping=1.0
    )
    with pytest.raises(ValueError, match="there is no patch"):
        result.patch()


class Partly(nn.Module):
    """An RNN and a factor have no units, and the head has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.scale = nn.LSTM(4, 8, batch_first=True), nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x[:, None])[0][:, -1] * self.scale)


RULES_OF_UNITS = {
    "gradient": {"n_units": 2},
    "random": {"n_units": 2},
    "step_units": {"n_units": 2},
    "lfoci": {},
    "cheap": {"steps": 1},
}


@pytest.mark.parametrize("rule", [*RULES_OF_UNITS, "full", "step", "given"])
def test_what_no_unit_covers_is_counted(rule):
    """By the result always, and by a warning where a rule selects units."""
    model, x, y = Partly(), torch.randn(60, 4), torch.arange(60) % 3
    options = {"damping": 1.0, "max_drop": None, "calibrate": False}
    options |= RULES_OF_UNITS.get(rule, {"max_parameters": 0.2} if rule == "step" else {})
    selection = UnitSelection.all(model) if rule == "given" else rule
    total = sum(p.numel() for p in model.parameters())
    without = total - model.head.weight.numel() - 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = unlearn(
            model, (x[:5], y[:5]), (x[5:], y[5:]), F.cross_entropy, selection=selection, **options
        )
    assert (result.n_trainable, result.n_without_units) == (total, without)
    told = [str(each.message) for each in caught if "belong to none" in str(each.message)]
    assert len(told) == (rule in RULES_OF_UNITS)
    for text in told:
        assert f"{without:,} of {total:,} trainable parameters" in text
        assert "'scale', 'rnn.weight_ih_l0'" in text
    units = isinstance(result.selection, UnitSelection)
    assert (f"{without:,} are in no unit" in repr(result)) == units
    covered = unlearn(model.head, *[(torch.randn(k, 8), y[:k]) for k in (5, 40)], F.cross_entropy)
    assert covered.n_without_units == 0
    assert "in no unit" not in repr(covered)
