"""Losses that are means over tokens: what they are made of, exactly, on tiny models."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    per_sample_gradients,
)
from lcodec_ext.curvature.kronecker import EKFACOperator
from lcodec_ext.curvature.kronecker.outputs import square_root
from lcodec_ext.curvature.objective import Objective
from lcodec_ext.curvature.routes.gauss_newton import output_hessians
from lcodec_ext.unlearning import per_token_loss

VOCABULARY = 11
BOS, PAD = 9, 10


def causal_lm(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=4, n_layer=1, n_head=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=BOS, eos_token_id=BOS,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    for p in model.parameters():  # far from symmetric
        p.data += 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return model.eval()


def texts(n, seed=0, length=6):
    """Sentences of 2 to `length` tokens, padded; one has a single token, which never counts."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, n)
    lengths[n // 2] = 1
    ids = rng.integers(0, 9, (n, length))
    ids[:, 0] = BOS
    mask = np.arange(length) < lengths[:, None]
    ids = np.where(mask, ids, PAD)
    labels = np.where(mask, ids, -100)
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask).long(),
        "labels": torch.from_numpy(labels),
    }


def seq2seq(n, seed=0):
    data = texts(n, seed)
    rng = np.random.default_rng(seed + 100)
    lengths = rng.integers(1, 5, n)
    labels = rng.integers(0, 9, (n, 4))
    data["labels"] = torch.from_numpy(np.where(np.arange(4) < lengths[:, None], labels, -100))
    return data


def t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=BOS,
        attn_implementation="eager",
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "T5LayerNorm":  # which computes in float32
            model.set_submodule(name, nn.RMSNorm(4, eps=1e-6, dtype=torch.float64))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, dtype=p.dtype)
    return model.eval()


def masked_lm(seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=5, max_position_embeddings=8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=PAD,
        attn_implementation="eager",
    )  # fmt: skip
    model = BertForMaskedLM(config).double()
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, dtype=p.dtype)
    return model.eval()


def masked_texts(n, seed=0):
    data = texts(n, seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(data["labels"].shape, generator=generator) < 0.4) & (data["labels"] >= 0)
    data["labels"] = torch.where(hidden, data["labels"], -100)
    data["input_ids"] = torch.where(hidden, PAD - 2, data["input_ids"])
    return data


MODELS = {  # with data, and whether labels are shifted
    "GPT-2": (causal_lm, texts, True),
    "T5": (t5, seq2seq, False),
    "BERT": (masked_lm, masked_texts, False),
}


def parameters_of(model, names):
    named = dict(model.named_parameters())
    return {name: named[name] for name in named if not names or name in names}


def value_of(model, data, names, causal):
    """The mean over all counted tokens as a function of a vector; or the logits.

    From the logits, as transformers converts these to float32 for its loss.
    """
    own = parameters_of(model, names)
    sizes = [p.numel() for p in own.values()]

    def call(theta, key=""):
        parts = [p.view(own[k].shape) for k, p in zip(own, theta.split(sizes), strict=True)]
        found = torch.func.functional_call(model, dict(zip(own, parts, strict=True)), (), data)
        return found[key] if key else of_transformers(causal, found["logits"], data["labels"])

    return call, torch.cat([p.detach().flatten() for p in own.values()])


def selected(model, names):
    own = parameters_of(model, names)
    return ParameterSelection({name: range(p.numel()) for name, p in own.items()})


def of_transformers(causal, logits, labels):
    """The loss of transformers' models, from logits."""
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))


FEW = {
    "GPT-2": ["transformer.wte.weight", "transformer.h.0.attn.c_attn.bias",
              "transformer.h.0.mlp.c_proj.weight", "transformer.ln_f.weight"],
    "T5": ["shared.weight", "decoder.final_layer_norm.weight",
           "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "BERT": ["cls.predictions.bias", "cls.predictions.transform.dense.weight",
             "bert.embeddings.position_embeddings.weight"],
}  # fmt: skip


def close(found, wanted):
    assert float(wanted.abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_operators_are_those_of_the_mean_over_all_tokens(name, told):
    make, draw, causal = MODELS[name]
    model, data, selection = make(), draw(9), selected(make(), FEW[name])
    loss_fn = functools.partial(of_transformers, causal)
    if told:
        loss_fn = per_token_loss(causal=causal)
    value, start = value_of(model, data, FEW[name], causal)
    hessian = torch.autograd.functional.hessian(value, start)
    # batches of their own, of which one has other numbers of tokens than another
    batches = [{k: t[some] for k, t in data.items()} for some in (slice(4), slice(4, 9))]
    given = batches if told else data
    close(HessianOperator(model, loss_fn, given, selection).to_dense(), hessian)

    logits = value(start, "logits").detach()
    J = torch.autograd.functional.jacobian(lambda t: value(t, "logits"), start).flatten(0, -2)
    rest = functools.partial(of_transformers, causal, labels=data["labels"])
    H = torch.autograd.functional.hessian(rest, logits).reshape(len(J), len(J))
    close(GaussNewtonOperator(model, loss_fn, given, selection).to_dense(), J.T @ H @ J)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_samples_add_up_to_that_of_all_tokens(name):
    make, draw, causal = MODELS[name]
    model, data, selection = make(), draw(9), selected(make(), FEW[name])
    value, start = value_of(model, data, FEW[name], causal)
    gradient = torch.autograd.functional.jacobian(value, start)
    loss_fn = per_token_loss(causal=causal)
    rows = torch.cat([g.dense() for g in per_sample_gradients(model, loss_fn, data, selection)])
    close(rows.mean(0), gradient)
    counted = loss_fn.counted(data["labels"])
    alone = {k: t[:1] for k, t in data.items()}
    own, _ = value_of(model, alone, FEW[name], causal)
    share = counted[0] / counted.double().mean()
    close(rows[0], torch.autograd.functional.jacobian(own, start) * share)
    if causal:
        assert counted.min() == 0 < counted.max()
        assert not rows[counted.argmin()].any()  # nothing to learn from, and no division by zero
    fisher = FisherOperator(model, loss_fn, data, selection)
    close(fisher.to_dense(), rows.T @ rows / len(rows))
    model_kind = FisherOperator(model, loss_fn, data, selection, kind="model")
    close(model_kind.to_dense(), GaussNewtonOperator(model, loss_fn, data, selection).to_dense())


@pytest.mark.parametrize("own", [True, False])
def test_kronecker_factors_start_from_the_hessian_by_the_logits(own):
    model, data = causal_lm(), texts(3)
    loss_fn = per_token_loss(causal=True)
    if own:  # a loss of the user's that is the same
        loss_fn = per_token_loss(functools.partial(of_transformers, True), causal=True)
    objective = Objective(
        model, loss_fn, data, selected(model, FEW["GPT-2"]), dtype=None, reduction="mean",
        progress=False,
    )  # fmt: skip
    _, batch = next(objective.passes())
    outputs = objective.run(batch).outputs.detach()
    n, each = len(outputs), outputs[0].numel()
    root = square_root(objective, outputs, batch)
    columns = []
    for k in range(each):
        unit = torch.zeros(n, each, dtype=outputs.dtype)
        unit[:, k] = 1
        columns.append(root(unit.reshape(outputs.shape)).reshape(n, each))
    L = torch.stack(columns, 2)
    close(L @ L.transpose(1, 2), output_hessians(objective, outputs, batch))
    EKFACOperator(model, loss_fn, data, selected(model, FEW["GPT-2"]), damping=0.1)
