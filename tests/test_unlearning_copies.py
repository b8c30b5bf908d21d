"""Models that are hard to copy, that hold odd state, or that differ in training mode."""

import contextlib
import copy
import dataclasses
import os
import signal
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.ao.quantization import FakeQuantize, MinMaxObserver
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, prune

from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.modes import plain_arithmetic
from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    UnitSelection,
)
from lcodec_ext.evaluation import evaluate, methods
from lcodec_ext.evaluation import literature as lit
from lcodec_ext.evaluation.metrics import relearn_time
from lcodec_ext.unlearning import TrainingStatistics, Unlearner, unlearn, verify_ledger

N, M, D, C = 48, 4, 6, 3
STEP = {
    "damping": 0.1,
    "output_damping": 0.0,
    "calibrate": False,
    "max_drop": None,
    "n_curvature": None,
    "max_iterations": None,
    "rtol": 1e-10,
    "lengthen": None,
    "repair_epochs": 0,
    "repair_drop": None,
    "n_recalibrate": None,
    "halvings": 0,
    "retries": 0,
    "weight_decay": 0.01,
}
REPAIR = {**STEP, "repair_epochs": 1, "n_recalibrate": 20}


def data(dtype=torch.float32):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.to(dtype), torch.arange(N) % C


def parts(x, y):
    return (x[:M], y[:M]), (x[M:], y[M:])


def remove(model, of=torch.float32, **options):
    return unlearn(model, *parts(*data(of)), cross_entropy, **{**STEP, **options})


def perceptron():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


# ---------------------------------------------------------------------------------------------
# The other state of a model


class State(nn.Module):
    """Complex and wide buffers, an expanded one, and batch norm."""

    def __init__(self, wide=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.net = perceptron()
        self.norm = nn.BatchNorm1d(D)
        generator = torch.Generator().manual_seed(2)
        phase = torch.randn(D, generator=generator, dtype=torch.complex128)
        self.register_buffer("phase", phase.to(torch.complex64))
        self.register_buffer("fine", torch.rand(D, generator=generator, dtype=wide))
        self.register_buffer("same", torch.ones(1).expand(D))
        self.register_buffer("count", torch.tensor(2**60 + 1))
        self.shift = nn.Parameter(torch.zeros(D, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.rand(D, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        turned = ((x + self.shift) * self.phase).imag * self.same
        fine = (x.double() * self.fine + self.frozen).to(x.dtype)
        return self.net(self.norm(x) + turned + fine)


OTHER = ["phase", "fine", "same", "count", "frozen"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", [{}, REPAIR, {"dtype": torch.float64}, {"n_recalibrate": 20}])
@pytest.mark.filterwarnings("ignore:selection=.full. leaves 6 of")
def test_state_that_a_deletion_does_not_change_is_the_same_bits(options, inplace):
    model = State()
    before = copy.deepcopy(model.state_dict())
    wide = options.get("dtype") is not None
    result = remove(model, torch.float64 if wide else torch.float32, inplace=inplace, **options)
    after = result.model.state_dict()
    for name in OTHER:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["net.0.weight"], before["net.0.weight"])
    assert (result.model is model) == inplace
    changed = bool(options.get("n_recalibrate"))
    assert torch.equal(after["norm.running_mean"], before["norm.running_mean"]) != changed


def test_what_full_leaves_out_is_told():
    message = r"selection='full' leaves 6 of 71 trainable parameters as they are: 'shift' \(it is "
    with pytest.warns(UserWarning, match=message + "torch.complex64"):
        remove(State())


@pytest.mark.filterwarnings("ignore:selection=.full. leaves 6 of")
def test_a_stream_keeps_that_state(tmp_path):
    model = State()
    with Unlearner(model, data(), cross_entropy, directory=tmp_path, **REPAIR) as stream:
        stream.remove([0, 1])
    with Unlearner.resume(tmp_path, model, data(), cross_entropy) as stream:
        stream.remove(2)
        for name in OTHER:
            assert torch.equal(stream.model.state_dict()[name], model.state_dict()[name]), name
        assert verify_ledger(tmp_path, stream.model, data()).ok


# ---------------------------------------------------------------------------------------------
# Copies that follow, and those that cannot


class Stored(nn.Module):
    """Keeps its features, in an attribute and in a list."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = perceptron(), []

    def forward(self, x):
        self.features = self.net[1](self.net[0](x))
        self.seen = [{"last": self.features}]
        return self.net[2](self.features)


def old_weight_norm():
    model = perceptron()
    with torch.no_grad():
        model[0].weight.mul_(2)
    return nn.Sequential(nn.utils.weight_norm(model[0]), *model[1:])


def pruned():
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", 0.4)
    return model


def with_locks():
    model = perceptron()
    model.lock, model[0].condition = threading.Lock(), threading.Condition()
    model.numpy, model.out = types, sys.stdout
    model.generator = torch.Generator().manual_seed(3)
    return model


def in_inference():
    with torch.inference_mode():
        return perceptron()


def bound():
    """A forward that is patched by a method, which a copy follows."""
    model = perceptron()

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)

    model[0].forward = types.MethodType(forward, model[0])
    return model


def with_float8():
    model = perceptron()
    model.register_buffer("scale", torch.ones(3).to(torch.float8_e4m3fn))
    return model


COPIED = {
    "float8": with_float8,
    "old weight_norm": old_weight_norm,
    "pruned": pruned,
    "stored": Stored,
    "locks": with_locks,
    "inference": in_inference,
    "bound": bound,
    "compiled": lambda: torch.compile(perceptron(), backend="eager"),
    "compiled part": lambda: nn.Sequential(
        torch.compile(perceptron()[:2], backend="eager"), perceptron()[2]
    ),
}


def plain(model):
    """Its weights by order: the compiled ones have other names."""
    return list(model.parameters())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", COPIED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_copies_follow(name, inplace):
    model, x = COPIED[name](), data()[0]
    with torch.no_grad():
        start = model(x)
    with torch.enable_grad():
        if name != "inference":
            model(x)  # leaves tensors with a graph in the model
    before = [p.detach().clone() for p in plain(model)]
    wanted = remove(perceptron()) if name not in ("old weight_norm", "pruned") else None
    result = remove(model, inplace=inplace)
    for new, old in zip(plain(result.model), before, strict=True):
        assert not torch.equal(new, old)
    if wanted is not None:
        for new, other in zip(plain(result.model), plain(wanted.model), strict=True):
            torch.testing.assert_close(new.detach(), other.detach(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        after, now = result.model(x), model(x)
    assert not torch.equal(after, start)
    assert torch.equal(now, after if inplace else start)
    for kind in (GaussNewtonOperator, FisherOperator):
        operator = kind(model, cross_entropy, (x, data()[1]), ParameterSelection.of(model))
        assert torch.isfinite(operator @ torch.ones(operator.shape[0])).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", COPIED)
def test_other_functions_copy_so_too(name, tmp_path):
    model, samples = COPIED[name](), data()
    if name != "inference":
        model(samples[0])
    forget, retain = parts(*samples)
    if name not in ("compiled", "compiled part"):
        with Unlearner(model, samples, cross_entropy, directory=tmp_path, **STEP) as stream:
            stream.remove(3)
            stream.rollback()
    TrainingStatistics.snapshot(model, samples, cross_entropy)
    if name != "inference":  # nothing can be trained that was made in it
        for method in (methods.fine_tune, methods.gradient_ascent, lit.salun, methods.lbfgs):
            method(model, forget, retain, cross_entropy)
    relearn_time(model, forget, cross_entropy, level=1.0, max_steps=1)


def closed():
    model = perceptron()
    layer = model[0]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)
    return model


def closed_whole():
    model = perceptron()
    inner = model.forward
    model.forward = lambda x: 2 * inner(x)
    return model


class Listed(nn.Module):
    """Hides a layer in a function."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()
        self.call = lambda x, net=self.net: net(x)

    def forward(self, x):
        return self.call(x)


class Precomputed(nn.Module):
    """Computes a weight once."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()
        self.scaled = {"w": self.net[2].weight * 2}

    def forward(self, x):
        return nn.functional.linear(self.net[1](self.net[0](x)), self.scaled["w"])


def test_a_loss_that_holds_the_model_is_refused():
    """Its copies would be trained without the regulariser, which computes with the original."""
    model, (x, y) = perceptron(), data()

    def regularised(outputs, targets):
        return cross_entropy(outputs, targets) + 0.1 * model[0].weight.square().sum()

    for call in (
        lambda: unlearn(model, *parts(x, y), regularised, **STEP),
        lambda: Unlearner(model, (x, y), regularised, **STEP),
        lambda: GaussNewtonOperator(model, regularised, (x, y), UnitSelection({"0": [0]})),
    ):
        with pytest.raises(ValueError, match="the loss .weight_decay is .* parameter '0.weight'"):
            call()


TRAINERS = {
    **{name: getattr(methods, name) for name in ("fine_tune", "gradient_ascent", "neg_grad_plus")},
    "lbfgs": methods.lbfgs,
    **{name: getattr(lit, name) for name in ("scrub", "selective_dampening", "random_labels")},
    **{name: getattr(lit, name) for name in ("salun", "cf_k", "eu_k", "l1_sparse")},
}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("what", ["loss", "model"])
def test_baselines_refuse_what_computes_with_the_original(name, what):
    """Their copies would be trained on something that does not depend on them."""
    model = perceptron() if what == "loss" else Listed()
    weight = dict(model.named_parameters())["0.weight" if what == "loss" else "net.0.weight"]

    def regularised(outputs, targets):
        return cross_entropy(outputs, targets) + 0.1 * weight.square().sum()

    loss_fn = regularised if what == "loss" else cross_entropy
    with pytest.raises(ValueError, match=f"the {what} .*parameter '[a-z.]*[02].weight'"):
        TRAINERS[name](model, *parts(*data()), loss_fn)


@pytest.mark.parametrize("what", ["loss", "model"])
@pytest.mark.parametrize("function", ["collect", "statistics", "pairs", "evaluate", "relearn_time"])
def test_others_refuse_what_computes_with_the_original(function, what):
    model = perceptron() if what == "loss" else Listed()
    weight = dict(model.named_parameters())["0.weight" if what == "loss" else "net.0.weight"]
    x, y = data()
    selection = ParameterSelection({("0.bias" if what == "loss" else "net.0.bias"): [0, 1]})
    state = {name: p.detach() for name, p in model.named_parameters()}

    def regularised(outputs, targets):
        return cross_entropy(outputs, targets) + 0.1 * weight.square().sum()

    def kept():
        collected = TrainingStatistics.collect(perceptron(), (x, y), cross_entropy)
        return dataclasses.replace(collected, selection=ParameterSelection.of(model))

    loss_fn = regularised if what == "loss" else cross_entropy
    moved = {name: p + 0.1 for name, p in state.items()}
    pairs = TrainingStatistics.from_epochs([(state, moved), (moved, state)], N)
    few = (x[:M], y[:M])
    call = {
        "collect": lambda: TrainingStatistics.collect(model, (x, y), loss_fn, selection=selection),
        "statistics": lambda: kept().operator(model, loss_fn, few, selection),
        "pairs": lambda: pairs.operator(model, loss_fn, few, selection),
        "evaluate": lambda: evaluate(model, few, (x, y), (x, y), loss_fn, methods=[]),
        "relearn_time": lambda: relearn_time(model, (x, y), loss_fn, level=1.0),
    }[function]
    with pytest.raises(ValueError, match=f"the {what} .*parameter '[a-z.]*[02].weight'"):
        call()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_named():
    for make in (torch.jit.script, lambda model: torch.jit.trace(model, data()[0])):
        with pytest.raises(ValueError, match=r"model is a TorchScript module"):
            remove(make(perceptron()))
    frozen = nn.Sequential(
        torch.jit.script(perceptron()[:2].requires_grad_(False)), nn.Linear(5, C)
    )
    remove(frozen)


def on_meta():
    return perceptron().to("meta")


def meta_buffer():
    model = perceptron()
    model.register_buffer("table", torch.empty(3, device="meta"))
    return model


class Uncopyable:
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")


def uncopyable():
    model = perceptron()
    model.client = Uncopyable()
    return model


REFUSED = {
    "closure": (closed, "parameter '0.weight' in a way that a copy of the model does not follow"),
    "whole": (closed_whole, "parameter '[02].weight' in a way that a copy .* does not follow"),
    "function": (Listed, "parameter 'net.[02].weight' in a way that a copy .* does not follow"),
    "precomputed": (
        Precomputed,
        "attribute 'w' of a Precomputed, which was computed from parameter 'net.2.weight' be",
    ),
    "meta": (on_meta, "parameter '0.weight' is on the meta device, which holds no values"),
    "meta buffer": (meta_buffer, "buffer 'table' is on the meta device"),
    "uncopyable": (uncopyable, "cannot be copied by copy.deepcopy: cannot be copied. Remove the"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_copies_that_cannot_follow_are_refused(name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        remove(build())
    model = build()
    with pytest.raises(ValueError, match=message):
        GaussNewtonOperator(model, cross_entropy, data(), ParameterSelection.of(model)).to_dense()
    if name not in ("meta", "meta buffer"):
        with (
            pytest.raises(ValueError, match=message),
            Unlearner(build(), data(), cross_entropy, **STEP) as stream,
        ):
            stream.remove(3)


def test_what_a_copy_shares():
    model = with_locks()
    copied = copy_of(model)
    assert copied.lock is not model.lock
    assert copied.numpy is types
    assert copied.out is sys.stdout
    assert torch.equal(
        torch.rand(3, generator=copied.generator), torch.rand(3, generator=model.generator)
    )
    with copied[0].condition:
        assert model[0].condition.acquire(blocking=False)
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.deepcopy(model)  # as before


# ---------------------------------------------------------------------------------------------
# Models that differ in training mode


class Auxiliary(nn.Module):
    """Returns more in training mode, as deeply supervised networks do."""

    def __init__(self, kind=tuple, inner=False):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.kind = perceptron(), kind
        self.helper, self.norm = nn.Linear(5, C), nn.BatchNorm1d(D)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        hidden = self.net[1](self.net[0](self.norm(x)))
        out = self.net[2](self.drop(hidden))
        if not self.training:
            return out
        if self.kind is dict:
            return {"helper": self.helper(hidden), "out": out}
        return self.helper(hidden), out


class Mute(nn.Module):
    """train and eval return nothing."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()

    def forward(self, x):
        return self.net(x)

    def train(self, mode=True):
        super().train(mode)

    def eval(self):
        super().eval()


class Table(nn.Module):
    """Embeddings with sparse gradients, of which one may be a function."""

    def __init__(self, function=False):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 5, sparse=True)
        self.bag = nn.EmbeddingBag(9, 5, mode="sum", sparse=True)
        self.second = nn.Parameter(torch.randn(9, 5))
        self.head, self.function = nn.Linear(5, C), function

    def forward(self, x):
        rows = x.round().clamp(-4, 4).long() + 4
        other = nn.functional.embedding(rows, self.second, sparse=self.function)
        return self.head((self.table(rows) + other).mean(1) + self.bag(rows))


class Observed(nn.Module):
    """As a network is prepared for training with a quantisation."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()
        self.fake = FakeQuantize()
        self.observer = MinMaxObserver()

    def forward(self, x):
        return self.net(self.fake(self.observer(x)))


TRAINED = {
    "auxiliary": Auxiliary,
    "auxiliary dict": lambda: Auxiliary(dict),
    "auxiliary inside": lambda: nn.Sequential(nn.Identity(), Auxiliary()),
    "mute": Mute,
    "sparse": Table,
    "observed": Observed,
}
BASELINES = {
    "fine-tune": (methods.fine_tune, {"epochs": 1}),
    "fine-tune Adam": (methods.fine_tune, {"epochs": 1, "optimizer": "adam"}),
    "ascent": (methods.gradient_ascent, {"epochs": 1}),
    "neg_grad_plus": (methods.neg_grad_plus, {"epochs": 1}),
    "lbfgs": (methods.lbfgs, {"iterations": 2}),
    "salun": (lit.salun, {"epochs": 1}),
    "bad teacher": (lit.bad_teacher, {"epochs": 1}),
    "random labels": (lit.random_labels, {"epochs": 1}),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|must run observer)")
def test_models_that_differ_in_training_are_repaired(name):
    model = TRAINED[name]()
    model.eval()
    with torch.no_grad():
        model(data()[0])  # an observer's first sight
    result = remove(model, **{**REPAIR, "weight_decay": 0.0})
    assert result.repaired
    assert not torch.equal(*(plain(each)[0] for each in (result.model, model)))
    if "auxiliary" in name:
        helper = next(k for k, _ in model.named_parameters() if "helper.weight" in k)
        assert torch.equal(*(each.get_parameter(helper) for each in (result.model, model)))
    if name == "sparse":
        assert result.model.table.sparse


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|must run observer)")
def test_models_that_differ_in_training_serve_baselines(name, baseline):
    model, (forget, retain) = TRAINED[name](), parts(*data())
    model.eval()
    if name == "sparse":
        model.function = True
    method, options = BASELINES[baseline]
    made = method(model, forget, retain, cross_entropy, batch_size=16, **options)
    assert not torch.equal(*(plain(each)[-1] for each in (made, model)))
    assert not made.training


@pytest.mark.parametrize("curvature", ["gauss_newton", "fisher", "hessian"])
def test_a_function_with_sparse_gradients_is_refused_by_name(curvature):
    message = "looks up rows of parameter 'second' by a function with sparse=True"
    with pytest.raises(ValueError, match=message):
        remove(Table(function=True), curvature=curvature)
    remove(Table(), damping=10.0, curvature=curvature if curvature != "hessian" else "fisher")


class Unlike(Auxiliary):
    """What it returns in training mode has nothing of what it returns in evaluation."""

    def forward(self, x):
        out = self.net(x)
        return out if not self.training else (out[:, :2], 2 * out)


class Failing(Auxiliary):
    def forward(self, x):
        if self.training:
            raise RuntimeError("needs boxes")
        return self.net(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Unlike, "a repair trains the model, and the model returns .* none of the former is the"),
        (Failing, "a repair trains the model, and the model fails in training mode.*needs boxes"),
    ],
)
def test_what_cannot_be_repaired_is_said_before_the_step(build, message):
    model = build()
    model.eval()
    with pytest.raises(ValueError, match=f"{message}.*Or pass repair_epochs=0"):
        remove(model, **REPAIR)
    remove(model)
    with pytest.raises(ValueError, match=message.split("and ")[1]):
        methods.fine_tune(model, None, parts(*data())[1], cross_entropy)


def test_looking_at_training_mode_leaves_no_trace():
    """The result of a repair depends on nothing but its own random numbers."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, C))
    model.eval()
    state = torch.get_rng_state()
    results = [remove(model, **REPAIR) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*(each.model[0].weight for each in results))


# ---------------------------------------------------------------------------------------------
# A zoo: every trainable parameter, against dense autograd


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.inner = kind(2, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x.reshape(len(x), 3, 2))[0][:, -1]


class Token(nn.Module):
    """A raw parameter that is prepended."""

    def __init__(self):
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(2)), nn.Linear(D + 2, 4)

    def forward(self, x):
        return self.layer(torch.cat([self.token.expand(len(x), 2), x], 1))


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(D, 4).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(D, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(D, D), nn.Linear(D, D)
        self.two.weight = self.one.weight
        self.out = nn.Linear(D, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.MultiheadAttention(2, 1, batch_first=True), nn.Linear(6, 4)

    def forward(self, x):
        x = x.reshape(len(x), 3, 2)
        return self.out(self.inner(x, x, x)[0].flatten(1))


class Kept(nn.Module):
    """Stores features and holds a lock."""

    def __init__(self):
        super().__init__()
        self.layer, self.lock = nn.Linear(D, 4), threading.RLock()

    def forward(self, x):
        with self.lock:
            self.features = self.layer(x)
        return self.features


ZOO = {
    "linear": lambda: nn.Linear(D, 4),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "token": Token,
    "lora": LoRA,
    "tied": Tied,
    "attention": Attention,
    "kept": Kept,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(D, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(D, 4)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(D, 4)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(D, 4), "weight", 0.3),
    "bilinear": lambda: Doubled(),
    "norms": lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 4), nn.BatchNorm1d(4)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4)
    ),
    "prelu": lambda: nn.Sequential(nn.Linear(D, 4), nn.PReLU(4)),
}


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(D, D, 4)

    def forward(self, x):
        return self.inner(x, x)


def drawn(seed):
    """A model of one or two bodies of the zoo and a head, and their names."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    picked = [list(ZOO)[seed % len(ZOO)]]
    if torch.rand((), generator=generator) < 0.5:
        picked.append(list(ZOO)[int(torch.randint(len(ZOO), (), generator=generator))])
    return Zoo([ZOO[name]() for name in picked]).double().eval(), picked


def parted(J, own):
    """Whether each entry of each parameter has a derivative."""
    return (J.abs().amax((0, 1)) > 0).split([p.numel() for p in own.values()])


def of_rows(used, p):
    """The same of the rows of a parameter, flat."""
    if p.ndim < 2:
        return used
    return used.view(len(p), -1).any(1, keepdim=True).expand(len(p), p[0].numel()).flatten()


class Zoo(nn.Module):
    def __init__(self, bodies):
        super().__init__()
        self.bodies, self.head = nn.ModuleList(bodies), nn.Linear(4 * len(bodies), C)

    def forward(self, x):
        return self.head(torch.tanh(torch.cat([body(x) for body in self.bodies], 1)))


@pytest.mark.parametrize("seed", range(2 * len(ZOO)))
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_full_step_of_any_model_is_that_of_dense_autograd(seed):
    model, picked = drawn(seed)
    x, y = data(torch.float64)
    model(x)
    result = remove(model, torch.float64)
    own = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    twin = copy_of(model)

    def outputs(*values):
        return functional_call(twin, dict(zip(own, values, strict=True)), (x,))

    def flat(values):
        return torch.cat([v.flatten() for v in values.values()])

    J = torch.autograd.functional.jacobian(outputs, tuple(own.values()))
    J = torch.cat([part.flatten(2) for part in J], 2)  # (n, C, p)
    P = outputs(*own.values()).detach().softmax(1)
    H = torch.diag_embed(P) - P[:, :, None] * P[:, None]
    G = torch.einsum("nap,nab,nbq->pq", J[M:], H[M:], J[M:]) / (N - M)
    g = torch.einsum("nap,na->p", J[:M], P[:M] - nn.functional.one_hot(y[:M], C))
    decay = STEP["weight_decay"]
    used = torch.cat([of_rows(u, p) for u, p in zip(parted(J, own), own.values(), strict=True)])
    right = (g + M * decay * flat(own) * used) / (N - M)
    step = torch.linalg.solve(G + (0.1 + decay) * torch.eye(len(g), dtype=g.dtype), right)
    moved = flat({k: result.model.get_parameter(k).detach() - own[k] for k in own})
    assert (moved - step).norm() < 1e-6 * step.norm(), picked
    for name, p in own.items():  # coverage
        index = flat({k: torch.full_like(v, k == name) for k, v in own.items()}) > 0
        if used[index].any():
            assert not torch.equal(result.model.get_parameter(name), p), (picked, name)
    assert result.n_parameters == len(g)


@pytest.mark.parametrize("seed", range(len(ZOO)))
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_units_that_are_not_all_say_what_they_leave_out(seed):
    """A mask of units, beside parameters that no unit owns."""
    model, _ = drawn(seed)
    units = UnitSelection.all(model)
    assert units.size(model) <= ParameterSelection.of(model).size(model)
    operator = HessianOperator(
        model, cross_entropy, data(torch.float64), UnitSelection({"head": [0]})
    )
    assert operator.shape == (1 + 4 * len(model.bodies),) * 2


# --- threads and forks ---------------------------------------------------------------------------


class Slow:
    """An attribute whose copy takes a moment, and says when it began."""

    def __init__(self):
        self.begun = threading.Event()

    def __deepcopy__(self, memo):
        self.begun.set()
        time.sleep(0.05)
        return Slow()


def locked(slow=None):
    model = nn.Linear(2, 2)
    model.slow, model.lock = slow or Slow(), threading.Lock()
    return model


def test_copies_in_two_threads_do_not_disturb_each_other():
    """The end of the first takes nothing from the second, which still has a lock to copy."""
    first, second = locked(), locked()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(copy_of, first)
        first.slow.begun.wait(10)
        two = pool.submit(copy_of, second)
        both = [one.result(60), two.result(60)]
    assert all(not copied.lock.locked() for copied in both)
    with pytest.raises(TypeError, match="pickle"):
        copy.deepcopy(second)  # as ever: only copies of ours take locks


def passes_in_a_fork(check):
    """Whether a forked child passes, and ends at all."""
    child = os.fork()
    if not child:
        failed = 1
        try:
            signal.alarm(30)  # ends a deadlock
            check()
            failed = 0
        finally:
            os._exit(failed)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process")  # has threads, and forks: as it should here
def test_a_fork_during_a_copy_can_copy():
    model = locked()
    thread = threading.Thread(target=copy_of, args=(model,))
    thread.start()
    model.slow.begun.wait(10)
    assert passes_in_a_fork(lambda: copy_of(locked()))
    thread.join()


def compiles():
    """Whether torch.compile's functions run compiled now."""
    return eval_frame._stance.stance == "default"


@contextlib.contextmanager
def another_threads_call():
    """A call of another thread, which goes on until the function that is given is called."""
    inside, done = threading.Event(), threading.Event()

    def call():
        with plain_arithmetic():
            inside.set()
            done.wait(10)

    def end():
        done.set()
        thread.join()

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait(10)
    try:
        yield end
    finally:
        end()


def test_overlapping_calls_leave_torch_compile_as_it_was():
    """Two calls that begin and end one after the other: the stance is the whole process's."""
    with another_threads_call() as end:
        with plain_arithmetic():
            end()
            assert not compiles()
        assert compiles()


@pytest.mark.filterwarnings("ignore:This process")
def test_a_fork_amid_another_threads_call_compiles():
    def check():
        assert compiles()
        with plain_arithmetic():
            assert not compiles()
        assert compiles()

    with another_threads_call():
        assert passes_in_a_fork(check)


def test_older_torch(monkeypatch):
    """Torch 2.4 has no torch.OutOfMemoryError, and set_stance came with 2.6."""
    monkeypatch.delattr(torch, "OutOfMemoryError")
    monkeypatch.delattr(torch.compiler, "set_stance")
    remove(perceptron())
    with pytest.raises(ValueError, match="loss_fn fails on the model's outputs"):
        unlearn(perceptron(), *parts(*data()), lambda a, b: cross_entropy(a, b[:1]), **STEP)
