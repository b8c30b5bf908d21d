"""Models as training loops leave them: checkpointed, compiled, wrapped, under autocast."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import BertConfig, BertForSequenceClassification

from lcodec_ext._torch.modes import plain_arithmetic, twice_differentiable
from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    UnitSelection,
    per_sample_gradients,
)
from lcodec_ext.evaluation import evaluate, methods
from lcodec_ext.unlearning import unlearn

N, M, D, C = 48, 4, 6, 3
OPERATORS = {"hessian": HessianOperator, "ggn": GaussNewtonOperator, "fisher": FisherOperator}
STEP = {"damping": 0.1, "calibrate": False, "max_drop": None, "weight_decay": 0.01}


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
