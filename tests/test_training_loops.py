"""Models as training loops leave them: checkpointed, compiled, wrapped, under autocast."""

import copy
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lcodec_ext._torch.batches import Batches
from lcodec_ext._torch.detours import autocasting
from lcodec_ext._torch.modes import plain_arithmetic, twice_differentiable
from lcodec_ext._torch.names import AmbiguousNamesError, without_prefix
from lcodec_ext.curvature import (
    EKFACOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    UnitSelection,
    per_sample_gradients,
)
from lcodec_ext.evaluation import evaluate, methods
from lcodec_ext.evaluation.metrics import sample_losses, weight_distance
from lcodec_ext.unlearning import Settings, TrainingStatistics, Unlearner, unlearn, verify_ledger

N, M, D, C = 48, 4, 6, 3
OPERATORS = {"hessian": HessianOperator, "ggn": GaussNewtonOperator, "fisher": FisherOperator}
STEP = {"damping": 0.1, "calibrate": False, "max_drop": None, "weight_decay": 0.01}

REPAIR = STEP | {"repair_epochs": 1, "repair_drop": None, "repair_learning_rate": 1e-3}


def data():
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(N) % C


def parts(x=None, y=None):
    x, y = data() if x is None else (x, y)
    return (x[:M], y[:M]), (x[M:], y[M:])


def close(a, b, rtol=1e-5):
    assert (a - b).norm() <= rtol * b.norm(), float((a - b).norm() / b.norm())


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---------------------------------------------------------------------------------------------
# Gradient checkpointing


class Checkpointed(nn.Module):
    """A block of it is computed again in the backward pass, in any mode."""

    def __init__(self, call):
        super().__init__()
        self.first, self.block = nn.Linear(D, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(8, C)
        self.call, self.reruns = call, 0

    def inner(self, h):
        self.reruns += 1
        return self.dropout(self.block(h))

    def forward(self, x):
        return self.head(self.call(self.inner, torch.tanh(self.first(x))))


def directly(function, *args):
    return function(*args)


WAYS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]),
    ),
}


def both(way, seed=0):
    """A checkpointed model, and the same one without."""
    made = []
    for call in (WAYS[way], directly):
        torch.manual_seed(seed)
        made.append(Checkpointed(call))
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_of_a_checkpointed_model(kind, way):
    model, plain = both(way)
    model.train()
    for selection in (
        UnitSelection({"block.0": [1, 5], "head": [0]}),
        ParameterSelection({"block.0.weight": [0, 9, 30], "first.bias": [2]}),
    ):
        A, B = (OPERATORS[kind](m, cross_entropy, data(), selection) for m in (model, plain))
        assert torch.equal(A.to_dense(), B.to_dense())
        a, b = (
            torch.cat(
                [c.dense() for c in per_sample_gradients(m, cross_entropy, data(), selection)]
            )
            for m in (model, plain)
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"selection": "lfoci", "n_perturbations": 30},
        {"selection": "gradient", "n_units": 4},
        {"repair_epochs": 1, "repair_drop": None},
        {"curvature": "secant"},
    ],
    ids=str,
)
def test_a_checkpointed_model_deletes(options, way):
    model, plain = both(way)
    model.train()
    a, b = (unlearn(m, *parts(), cross_entropy, **STEP | options) for m in (model, plain))
    assert torch.equal(weights(a.model), weights(b.model))
    assert a.model.training
    assert a.model.call is model.call or a.model.call.func is checkpoint  # it goes on with it
    assert not torch.equal(weights(a.model), weights(model))


def test_a_calibrated_deletion_and_baselines_of_a_checkpointed_model():
    model, plain = both("not reentrant")
    x, y = data()
    validation = x[40:], y[40:]
    given = (x[:M], y[:M]), (x[M:40], y[M:40])
    found = [
        unlearn(m, *given, cross_entropy, validation=validation, damping=0.1, calibrate=False)
        for m in (model, plain)
    ]
    assert torch.equal(weights(found[0].model), weights(found[1].model))
    for method in (methods.fine_tune, methods.lbfgs):
        a, b = (method(m, *given, cross_entropy) for m in (model, plain))
        assert torch.equal(weights(a), weights(b))
    trained = [Checkpointed(directly) for _ in range(2)]
    methods_ = {"tuned": methods.fine_tune}
    a, b = (
        evaluate(m, *given, validation, cross_entropy, methods=methods_, retrained=trained)
        for m in (model, plain)
    )
    assert any(m.name == "tuned" for m in a.methods)
    for one, other in zip(a.methods, b.methods, strict=True):
        told = one.metrics, other.metrics
        differ = {k for k, v in told[0].items() if told[1][k] != v}
        assert differ <= {"relearn_seconds"}


def tiny_bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            num_labels=C,
            max_position_embeddings=8,
        )
    )


def texts():
    tokens = torch.randint(0, 40, (N, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)} | {
        "labels": torch.arange(N) % C
    }


def text_parts():
    return tuple({k: t[some] for k, t in texts().items()} for some in (slice(M), slice(M, None)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model_of_transformers(reentrant):
    plain = tiny_bert()
    model = copy.deepcopy(plain)
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # its earlier name
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()  # as peft does: a hook on the embeddings
    for each in (model, plain):
        each.train()
    option = STEP | {"repair_epochs": 1, "repair_drop": None, "repair_batch_size": 22}
    a, b = (unlearn(m, *text_parts(), cross_entropy, **option) for m in (model, plain))
    assert torch.equal(weights(a.model), weights(b.model))
    assert any(getattr(m, "gradient_checkpointing", False) for m in a.model.modules())
    layer = "bert.encoder.layer.1.output.dense"
    A, B = (
        HessianOperator(m, cross_entropy, texts(), UnitSelection({layer: [0, 3]}))
        for m in (model, plain)
    )
    close(A.to_dense(), B.to_dense())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_closed_for_the_calling_thread_alone(reentrant):
    calls = []

    def block(x):
        calls.append(threading.current_thread().name)
        return x.sin()

    def train():
        x = torch.ones(2, requires_grad=True)
        with torch.enable_grad():
            checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        return x.grad

    def reruns(run):
        calls.clear()
        run()
        return len(calls) - 1

    def in_a_thread():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    assert reruns(train) == 1
    with twice_differentiable():
        assert reruns(train) == 0
        assert reruns(in_a_thread) == 1
        with plain_arithmetic():
            assert reruns(train) == 0
        assert reruns(train) == 0
    assert reruns(train) == 1
    with pytest.raises(ZeroDivisionError), plain_arithmetic():
        raise ZeroDivisionError
    assert reruns(train) == 1


# ---------------------------------------------------------------------------------------------
# Autocast


class Cast(nn.Module):
    """Its forward pass is under autocast, as one of several GPUs is advised to be."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
        self.kind = kind

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.kind is not None):
            return self.net(x).float()


def test_autocast_within_a_model_and_around_a_call_is_off():
    """What is computed is a function of weights and data, in float32 throughout."""
    model, plain = Cast("within"), Cast(None)
    x, y = data()
    assert not torch.equal(model(x), plain(x))
    selection = UnitSelection.all(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            (
                unlearn(m, *parts(), cross_entropy, **STEP),
                HessianOperator(m, cross_entropy, (x, y), selection).to_dense(),
            )
            for m in (model, plain)
        ]
        assert model.net(x).dtype == torch.bfloat16  # the caller's is on again
    assert torch.equal(weights(found[0][0].model), weights(found[1][0].model))
    assert found[0][0].loss_forget == found[1][0].loss_forget
    assert torch.equal(found[0][1], found[1][1])
    with plain_arithmetic(), ThreadPoolExecutor(1) as threads:
        assert torch.equal(model(x), plain(x))
        others = threads.submit(model, x).result()
    assert torch.equal(others, model(x))  # of another thread it stays on


def digits():
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    return x[:300].float() / 16, y[:300]


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Transformer(nn.Module):
    """The rows of an image are its tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 10)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.view(-1, 8, 8))).mean(1))


@functools.cache
def trained(make):
    torch.manual_seed(0)
    model, (x, y) = make(), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(4):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(epoch))
        for some in order.split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[some]), y[some]).backward()
            optimizer.step()
    return model.eval()


def off(a, b):
    return float((a - b).norm() / b.norm())


CAST = pytest.mark.parametrize("make", [cnn, Transformer])


@CAST
def test_products_and_gradients_under_autocast_are_close(make):
    """docs/models.md states 1 to 5 percent."""
    model, (x, y) = trained(make), digits()
    given = x[:40], y[:40]
    for selection in (
        ParameterSelection.of(model),
        UnitSelection.from_globs(model, "8" if make is cnn else "head"),  # in closed form
    ):

        def found(selection=selection):
            chunks = per_sample_gradients(model, cross_entropy, given, selection)
            rows = torch.cat([chunk.dense() for chunk in chunks])
            v = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0))
            made = [kind(model, cross_entropy, given, selection) @ v for kind in OPERATORS.values()]
            return [*made, rows, rows.mean(0)]

        exact = found()
        with autocasting(torch.bfloat16):
            cast = found()
        for a, b in zip(cast, exact, strict=True):
            assert a.dtype == torch.float32
            assert 1e-4 < off(a, b) < 0.08
        for a, b in zip(found(), exact, strict=True):
            assert torch.equal(a, b)


@CAST
def test_a_deletion_under_autocast_is_close(make):
    model, (x, y) = trained(make), digits()
    given = model, (x[:6], y[:6]), (x[6:100], y[6:100]), cross_entropy
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.dtype)
        return cross_entropy(outputs, targets)

    a, b, c = (
        unlearn(*given[:3], loss_fn, **STEP | {"damping": 0.03, "autocast": dtype})
        for dtype in (torch.bfloat16, None, torch.bfloat16)
    )
    assert set(seen) <= {torch.float32, torch.float64}
    moved, exact = (weights(each.model) - weights(model) for each in (a, b))
    assert 1e-3 < off(moved, exact) < 0.2
    assert torch.equal(weights(c.model), weights(a.model))
    assert a.loss_forget.before == b.loss_forget.before  # measured in float32
    assert abs(a.loss_forget.after / b.loss_forget.after - 1) < 0.1
    # What is reported is of the weights that are handed over.
    after = mean_of(a.model, given[1])
    assert after == pytest.approx(a.loss_forget.after, rel=1e-4)
    validation = x[200:], y[200:]
    for options in (
        {"validation": validation, "finish": 0},
        {**STEP, "selection": "lfoci", "n_perturbations": 30, "damping": 10.0},
        {**REPAIR, "damping": 10.0},
    ):
        done = unlearn(*given, autocast=torch.bfloat16, **options)
        assert torch.isfinite(weights(done.model)).all()
        assert not torch.equal(weights(done.model), weights(model))


def mean_of(model, samples):
    return float(sample_losses(model, samples, cross_entropy).mean())


def test_weights_that_change_are_not_taken_from_the_cache_of_autocast():
    """It is cleared with the outermost autocast, and the package's is off around all calls."""
    model = nn.Linear(D, C)
    x, y = data()
    batch = next(iter(Batches((x, y), torch.device("cpu"), torch.float32)))
    with autocasting(torch.bfloat16), twice_differentiable():
        before = batch.outputs(model)
        with torch.no_grad():
            model.weight.mul_(2)
        after = batch.outputs(model)
    assert (before.dtype, after.dtype) == (torch.float32, torch.float32)
    bias = model.bias.detach()
    assert off(after.detach() - bias, 2 * (before.detach() - bias)) < 0.02


def test_autocast_in_settings():
    settings = Settings.preset("recommended", autocast=torch.bfloat16)
    assert json.loads(json.dumps(settings.to_dict()))["autocast"] == "bfloat16"
    assert Settings.from_dict(settings.to_dict()) == settings
    assert Settings.from_dict(Settings().to_dict()).autocast is None
    old = Settings().to_dict()
    del old["autocast"]  # of an earlier version
    assert Settings.from_dict(old).autocast is None
    for options, message in (
        (
            {"autocast": torch.float16},
            r"or None; got torch.float16 \(gradients in float16",
        ),
        ({"autocast": True}, "autocast must be torch.bfloat16 or None; got True"),
        ({"autocast": torch.bfloat16, "dtype": torch.float64}, "got dtype=float64"),
        (
            {"autocast": torch.bfloat16, "update": "certified", "epsilon": 1.0, "delta": 1e-3},
            "not possible with update='certified'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Settings.preset("recommended", **options)
    x, y = data()
    given, options = parts(x.double(), y), STEP | {"autocast": torch.bfloat16}
    with pytest.raises(ValueError, match="autocast is of models that compute in float32, and this"):
        unlearn(net().double(), *given, cross_entropy, **options)
    kept = TrainingStatistics.collect(net(), data(), cross_entropy)
    with pytest.raises(ValueError, match="autocast does not go with statistics"):
        unlearn(net(), parts()[0], None, cross_entropy, statistics=kept, **options)


def test_weights_in_half_precision():
    """They are computed with in float32, and what changes is rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        half = net().to(dtype)
        wide = copy.deepcopy(half).float()
        a, b = (unlearn(m, *parts(), cross_entropy, **STEP) for m in (half, wide))
        assert {p.dtype for p in a.model.parameters()} == {dtype}
        assert torch.equal(weights(a.model), weights(b.model).to(dtype))
        assert not torch.equal(weights(a.model), weights(half))


# ---------------------------------------------------------------------------------------------
# Compiled and wrapped models


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), inner, nn.Linear(8, C))


def part_compiled():
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    return model


def forward_compiled():
    """As transformers' guide does it."""
    model = Block()
    model.forward = torch.compile(model.forward, backend="eager")
    model.net[0].forward = torch.compile(model.net[0].forward, backend="eager")
    return model


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)


def checkpoint_wrapped():
    model = net()
    model[2] = checkpoint_wrapper(model[2])
    return model


WRAPPED = {
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "a part compiled": part_compiled,
    "a compiled part of a compiled one": lambda: torch.compile(part_compiled(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(net()),
    "compiled, data parallel": lambda: nn.DataParallel(torch.compile(net(), backend="eager")),
    "checkpoint_wrapper": checkpoint_wrapped,
    "a part data parallel": lambda: nn.Sequential(nn.DataParallel(net()[:3]), net()[3]),
}
SAME_NAMES = [name for name in WRAPPED if name != "a part data parallel"]  # one level more


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_model_is_the_model_inside(name):
    wrapped, plain = WRAPPED[name](), net()
    if name not in SAME_NAMES:
        plain = nn.Sequential(net()[:3], net()[3])
    start = weights(wrapped)
    every = UnitSelection.all(plain)
    assert UnitSelection.all(wrapped) == every
    assert ParameterSelection.of(wrapped) == ParameterSelection.of(plain)
    if "parallel" not in name:
        assert named_units(wrapped) == named_units(plain)
    last = "3" if name in SAME_NAMES else "1"
    decays = (
        {k: 0.01 * ("bias" not in k) for k, _ in m.named_parameters()} for m in (wrapped, plain)
    )
    a, b = (
        unlearn(m, *parts(), cross_entropy, **STEP | {"weight_decay": decay})
        for m, decay in zip((wrapped, plain), decays, strict=True)
    )
    assert type(a.model) is nn.Sequential
    assert a.model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(weights(a.model), weights(b.model))
    assert a.selection == b.selection
    assert (a.patch().before, a.patch().after) == (b.patch().before, b.patch().after)
    assert torch.equal(weights(wrapped), start)
    A, B = (
        HessianOperator(m, cross_entropy, data(), UnitSelection({last: [1]}))
        for m in (wrapped, plain)
    )
    assert torch.equal(A.to_dense(), B.to_dense())
    # in place, and by patch: the one that was given has the weights, and still computes
    x, _ = data()
    for made in (WRAPPED[name](), WRAPPED[name]()):
        if made is not None and torch.equal(weights(made), start):
            assert b.patch().apply(made)
        assert torch.equal(weights(made), weights(a.model))
        with torch.no_grad():
            assert torch.equal(made(x), a.model(x))
    result = unlearn(wrapped, *parts(), cross_entropy, inplace=True, **STEP)
    assert result.model is wrapped
    assert not torch.equal(weights(wrapped), start)


def named_units(model):
    named = model.named_modules()
    return UnitSelection({name: [0] for name, m in named if isinstance(m, nn.Linear)})


@pytest.mark.parametrize("name", SAME_NAMES)
def test_a_stream_of_a_wrapped_model_has_the_record_of_the_model_inside(name, tmp_path):
    found = []
    for k, model in enumerate((WRAPPED[name](), net())):
        folder = tmp_path / str(k)
        with Unlearner(model, data(), cross_entropy, directory=folder, **STEP) as stream:
            stream.remove([3, 5])
        with Unlearner.resume(folder, model, data(), cross_entropy) as stream:
            stream.remove(7)
            record = stream.ledger[0].record
            found.append((record["trainable"], [e.record["checkpoint"] for e in stream.ledger]))
            final = stream.model
        wrapper = copy.copy(model) if k else WRAPPED[name]()
        wrapper.load_state_dict(
            dict(zip(wrapper.state_dict(), final.state_dict().values(), strict=True))
        )
        assert verify_ledger(folder, wrapper, data())
    assert found[0] == found[1]
    with Unlearner.resume(tmp_path / "0", net(), data(), cross_entropy) as stream:
        assert stream.removed == (3, 5, 7)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_statistics_of_a_wrapped_model_serve_the_model_inside(name):
    wrapped, plain = WRAPPED[name](), net()
    a, b = (
        TrainingStatistics.collect(m, data(), cross_entropy, selection=UnitSelection({"3": [0, 2]}))
        for m in (wrapped, plain)
    )
    assert torch.equal(a.matrix, b.matrix)
    assert a.weights.keys() == b.weights.keys()
    moved = copy.deepcopy(plain)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.01)
    pairs = []
    for models in ((plain, moved), (plain, moved)):
        shots = [TrainingStatistics.snapshot(m, data(), cross_entropy) for m in models]
        pairs.append(shots)
    prefix = {"compiled": "_orig_mod.", "data parallel": "module."}.get(name, "")
    named = [tuple({prefix + k: t for k, t in each.items()} for each in pair) for pair in pairs[0]]
    option = STEP | {"curvature": "secant"}
    step = [
        unlearn(
            m,
            parts()[0],
            None,
            cross_entropy,
            statistics=TrainingStatistics.from_epochs(shots, N),
            **option,
        )
        for m, shots in ((wrapped, named), (plain, pairs[1]))
    ]
    assert torch.equal(weights(step[0].model), weights(step[1].model))


def test_names_of_a_wrapped_model_in_selections_and_mappings():
    wrapped, plain = WRAPPED["compiled"](), net()
    units = UnitSelection({"_orig_mod.3": [1], "2._orig_mod.0": [0]})
    assert units == UnitSelection({"3": [1], "2.0": [0]})
    mask = ParameterSelection({"_orig_mod.3.weight": [1]})
    assert mask == ParameterSelection({"3.weight": [1]})
    assert UnitSelection.from_globs(wrapped, "3") == UnitSelection.from_globs(plain, "3")
    for model in (wrapped, WRAPPED["data parallel"](), plain):
        values = {k: p.detach() for k, p in model.named_parameters()}
        for chosen in (units, mask):
            assert torch.equal(chosen.gather(values, model=model), chosen.gather(plain))
            chosen.add_(values, torch.ones(chosen.size(model)), model=model)
        assert torch.equal(units.gather(model), units.gather(values, model=model))
    with pytest.raises(ValueError, match="layer '3' is named twice"):
        UnitSelection({"_orig_mod.3": [1], "3": [0]})
    with pytest.raises(ValueError, match="parameter '3.bias' is named twice"):
        ParameterSelection({"_orig_mod.3.bias": [1], "3.bias": [0]})


def test_wrapped_models_are_compared_as_the_models_inside():
    x, y = data()
    given = (x[:M], y[:M]), (x[M:40], y[M:40]), (x[40:], y[40:])
    others = [WRAPPED[n]() for n in ("a part compiled", "data parallel")]
    for other in others:
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1 * torch.randn_like(p))
    table = evaluate(WRAPPED["compiled"](), *given, cross_entropy, retrained=others, relearn=False)
    own = next(m for m in table.methods if m.name == "no-op")
    assert own.metrics["weight_distance"] > 0
    assert weight_distance(WRAPPED["compiled"](), net()) == 0
    for method in (methods.fine_tune, methods.gradient_ascent):
        a, b = (method(m, *given[:2], cross_entropy) for m in (WRAPPED["data parallel"](), net()))
        assert type(a) is nn.Sequential
        assert torch.equal(weights(a), weights(b))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_forward_pass_that_is_compiled_in_place(inplace):
    model, plain = forward_compiled(), Block()
    x, _ = data()
    a, b = (unlearn(m, *parts(), cross_entropy, inplace=inplace, **STEP) for m in (model, plain))
    assert torch.equal(weights(a.model), weights(b.model))
    assert torch.equal(a.model(x), b.model(x))
    assert ("forward" in vars(a.model)) == inplace
    A, B = (
        HessianOperator(m, cross_entropy, data(), UnitSelection({"net.0": [1]}))
        for m in (forward_compiled(), Block())
    )
    assert torch.equal(A.to_dense(), B.to_dense())


# ---------------------------------------------------------------------------------------------
# What cannot be deleted from, said clearly


class Fixed(nn.Module):
    """Converts its inputs to a dtype that is written down."""

    def __init__(self):
        super().__init__()
        self.net = net().bfloat16()

    def forward(self, x):
        return self.net(x.bfloat16()).float()


class Inferring(Block):
    @torch.inference_mode()
    def forward(self, x):
        return self.net(x)


class NotRecording(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fixed, r"must have the same dtype.*x\.to\(self\.layer\.weight\.dtype\)"),
        (Inferring, r"is under torch\.inference_mode, through which no gradient goes"),
    ],
)
def test_forward_passes_without_second_derivatives_are_refused(model, message):
    calls = (
        lambda: unlearn(model(), *parts(), cross_entropy, **STEP),
        lambda: HessianOperator(model(), cross_entropy, data(), UnitSelection({"net.0": [1]})),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_model_in_inference_mode_is_still_measured():
    assert torch.equal(
        sample_losses(Inferring(), data(), cross_entropy),
        sample_losses(Block(), data(), cross_entropy),
    )
    with pytest.raises(ValueError, match=r"is its forward pass under torch\.no_grad\?"):
        unlearn(NotRecording(), *parts(), cross_entropy, **STEP)


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantised_layers_are_named():
    model = quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    mixed = nn.Sequential(model, nn.Tanh(), nn.Linear(C, C))
    advice = "is quantised, and has no weights .* quantise the result"
    for call in (
        lambda: unlearn(model, *parts(), cross_entropy, **STEP),
        lambda: unlearn(mixed, *parts(), cross_entropy, **STEP),
        lambda: UnitSelection({"0": [0]}).layout(model),
    ):
        with pytest.raises(ValueError, match=f"Layer '0(.0)?' {advice}"):
            call()


# ---------------------------------------------------------------------------------------------
# Checkpoints


CHECKPOINTS = {
    "plain": lambda s: s,
    "DDP": lambda s: {f"module.{k}": t for k, t in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": t for k, t in s.items()},
    "compiled DDP": lambda s: {f"module._orig_mod.{k}": t for k, t in s.items()},
    "DDP, compiled": lambda s: {f"_orig_mod.module.{k}": t for k, t in s.items()},
    "part compiled": lambda s: {k.replace("2.0", "2._orig_mod.0"): t for k, t in s.items()},
    "Lightning": lambda s: {f"model.{k}": t for k, t in s.items()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_state_without_its_prefix(kind):
    own = net().state_dict()
    given = CHECKPOINTS[kind](own)
    found, left = without_prefix(given, own)
    assert left == []
    assert list(found) == list(own)
    assert all(found[k] is own[k] for k in own)
    extra = given | {"loss.weight": torch.ones(3)}
    found, left = without_prefix(extra, own)
    if kind in ("plain", "compiled", "part compiled"):  # load_state_dict refuses it by name
        assert found.keys() == own.keys() | {"loss.weight"}
    else:
        assert (found.keys(), left) == (own.keys(), ["loss.weight"])


def test_a_state_that_has_no_model_or_two():
    own = net().state_dict()
    less = {f"module.{k}": t for k, t in own.items() if k != "3.bias"}
    assert without_prefix(less, own) == (less, [])
    both = {f"{which}.{k}": t for k, t in own.items() for which in ("model", "ema.model")}
    with pytest.raises(AmbiguousNamesError, match=r"holds the model 2 times, under 'model\.' and"):
        without_prefix(both, own)
    twins = {"a": 1, "_orig_mod.a": 2}
    assert without_prefix(twins, ["a"]) == (twins, [])


# ---------------------------------------------------------------------------------------------
# accelerate


@pytest.fixture
def prepare():
    """`Accelerator.prepare` with a mixed precision."""
    made = []

    def accelerator(precision):
        AcceleratorState._reset_state(True)
        made.append(Accelerator(cpu=True, mixed_precision=precision))
        return made[-1].prepare

    yield accelerator
    for each in made:
        each.free_memory()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_accelerate_has_prepared(prepare, precision):
    """With mixed precision it puts another forward pass in its place, in autocast."""
    given, expected = prepare(precision), net()
    plain = unlearn(expected, *parts(), cross_entropy, **STEP)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=0.01)
    loader = DataLoader(TensorDataset(*parts()[1]), batch_size=8, shuffle=True)
    model, optimizer, loader = given(expected, optimizer, loader)
    x, _ = data()
    assert torch.equal(model(x), net()(x)) == (precision == "no")
    options = STEP | {"weight_decay": optimizer}
    found = unlearn(model, parts()[0], loader, cross_entropy, **options)
    close(weights(found.model), weights(plain.model))
    assert torch.equal(model(x), net()(x)) == (precision == "no")
    assert ("forward" in vars(found.model)) == (precision == "bf16")  # as the given one
    with plain_arithmetic():
        close(found.model(x), plain.model(x))
    A, B = (
        HessianOperator(m, cross_entropy, data(), UnitSelection({"0": [2]})) for m in (model, net())
    )
    close(A.to_dense(), B.to_dense())


def test_layers_with_hooks_of_accelerate():
    model, plain = net(), net()
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    a, b = (unlearn(m, *parts(), cross_entropy, **STEP) for m in (model, plain))
    close(weights(a.model), weights(b.model))
    x, _ = data()
    assert torch.equal(model(x), plain(x))
    close(a.model(x), b.model(x))


def test_offloaded_weights_are_refused():
    model = net()
    cpu_offload(model, execution_device=torch.device("cpu"))
    for call in (
        lambda: unlearn(model, *parts(), cross_entropy, **STEP),
        lambda: HessianOperator(model, cross_entropy, data(), UnitSelection({"0": [1]})),
    ):
        with pytest.raises(ValueError, match=r"'0.weight' is offloaded by accelerate .*remove_"):
            call()
    remove_hook_from_module(model, recurse=True)
    a, b = (unlearn(m, *parts(), cross_entropy, **STEP) for m in (model, net()))
    assert torch.equal(weights(a.model), weights(b.model))


# ---------------------------------------------------------------------------------------------
# EK-FAC


@pytest.mark.parametrize("way", WAYS)
def test_ekfac_of_a_checkpointed_model(way):
    selection = UnitSelection({"block.0": [1, 5], "head": [0, 2]})
    A, B = (EKFACOperator(m, cross_entropy, data(), selection).to_dense() for m in both(way))
    assert torch.equal(A, B)


@CAST
def test_ekfac_under_autocast_is_close(make):
    model, (x, y) = trained(make), digits()
    every = UnitSelection.all(model)

    def product():
        A = EKFACOperator(model, cross_entropy, (x[:20], y[:20]), every)
        return A @ torch.ones(A.shape[0])

    exact = product()
    with autocasting(torch.bfloat16):
        cast = product()
    assert 1e-4 < off(cast, exact) < 0.08
    if make is Transformer:  # whose samples it passes one by one
        return
    given = (x[:6], y[:6]), (x[6:200], y[6:200]), cross_entropy
    options = {"curvature": "ekfac", "validation": (x[200:], y[200:]), "finish": 0}
    a, b = (unlearn(model, *given, autocast=how, **options) for how in (torch.bfloat16, None))
    assert 1e-4 < off(weights(a.model) - weights(model), weights(b.model) - weights(model)) < 0.5
