"""What users of transformers get wrong, and what they are told before anything is done."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lcodec_ext._torch.batches import Batch
from lcodec_ext.unlearning import TrainingStatistics, per_token_loss, unlearn
from test_language_models import causal_lm, seq2seq, t5, texts


def part(data, numbers):
    return {key: t[numbers] for key, t in data.items()}


@functools.cache
def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    data = {"input_ids": torch.randint(1, 20, (24, 6)), "labels": torch.arange(24) % 2}
    return BertForSequenceClassification(config).eval(), data


PLAIN = {"calibrate": False, "max_drop": None, "finish": 0, "max_iterations": 2}


def test_the_loss_of_the_models_output_is_no_loss_function():
    model, data = classifier()
    few, rest = part(data, slice(4)), part(data, slice(4, None))
    with pytest.raises(ValueError, match="logits and the labels.*cross_entropy for a classifier"):
        unlearn(model, few, rest, lambda out, labels: out.loss, **PLAIN)
    with pytest.raises(ValueError, match="no attribute 'nothing'") as found:
        unlearn(model, few, rest, lambda out, labels: functools.nothing, **PLAIN)
    assert "labels" not in str(found.value).partition("'nothing'")[2]


def test_tokens_of_another_tokenizer_are_named():
    model, data = classifier()
    few, rest = part(data, slice(4)), part(data, slice(4, None))
    few["input_ids"] = few["input_ids"].index_fill(0, torch.tensor([2]), 77)
    with pytest.raises(ValueError, match="input_ids go from .* to 77, .* tokens 0 to 19"):
        unlearn(model, few, rest, cross_entropy, **PLAIN)


SMALL = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
READERS = {  # of 8 positions each: RoBERTa leaves two of its rows out, BART keeps two more
    "bert": lambda: classifier()[0],
    "roberta": lambda: RobertaForSequenceClassification(
        RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=10)
    ),
    "bart": lambda: BartForSequenceClassification(
        BartConfig(
            vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
            decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=8, num_labels=2,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_texts_that_are_longer_than_the_positions_are_named(name, by_name):
    model, ids, labels = READERS[name]().eval(), torch.full((6, 9), 3), torch.arange(6) % 2
    ids[:, -1] = 2  # the end of a text
    data = {"input_ids": ids, "labels": labels} if by_name else (ids, labels)
    message = "input_ids have 9 tokens to a text, and the model has positions for 8: .*max_length=8"
    with pytest.raises(ValueError, match=message):
        TrainingStatistics.collect(model, data, cross_entropy, curvature="ekfac")
    few, rest = (
        part(data, s) if by_name else (ids[s], labels[s]) for s in (slice(2), slice(2, None))
    )
    with pytest.raises(ValueError, match=f"fails on samples of forget.*{message}") as found:
        unlearn(model, few, rest, cross_entropy, **PLAIN)
    assert "embeddings of tokens" not in str(found.value)
    assert "A sample is a pair" not in str(found.value)


class OutOfMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.position_embeddings = nn.Embedding(8, 2)

    def forward(self, input_ids):
        raise torch.cuda.OutOfMemoryError("no room")


def test_memory_that_long_texts_take_is_not_taken_for_their_length():
    with pytest.raises(torch.cuda.OutOfMemoryError, match="^no room$"):
        Batch((), {"input_ids": torch.ones(2, 9, dtype=int)}, None, 2).outputs(OutOfMemory())


@pytest.mark.filterwarnings("ignore")
def test_shifted_labels_are_those_of_the_model():
    model, data = causal_lm(1), texts(20, 1)
    few, rest = part(data, slice(4)), part(data, slice(4, None))
    with pytest.warns(UserWarning, match="own input_ids.*causal=True"):
        unlearn(model, few, rest, per_token_loss(), **PLAIN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(input_ids|encoder)")
        unlearn(model, few, rest, per_token_loss(causal=True), **PLAIN)
        model, data = t5(), seq2seq(20)
        few, rest = part(data, slice(4)), part(data, slice(4, None))
        unlearn(model, few, rest, per_token_loss(), **PLAIN)
    with pytest.warns(UserWarning, match="T5.*is an encoder-decoder.*pass per_token_loss"):
        unlearn(model, few, rest, per_token_loss(causal=True), **PLAIN)


@pytest.mark.filterwarnings("ignore")
def test_no_more_units_are_selected_than_there_are():
    model, data = causal_lm(1), texts(20, 1)
    few, rest = part(data, slice(4)), part(data, slice(4, None))
    result = unlearn(model, few, rest, per_token_loss(causal=True), **PLAIN)
    assert len(result.selection) == result.n_units


def test_statistics_are_read_whatever_the_ending(tmp_path):
    model, data = classifier()
    kept = TrainingStatistics.collect(model, data, cross_entropy, curvature="ekfac")
    kept.save(tmp_path / "kept.safetensors")
    assert TrainingStatistics.load(tmp_path / "kept.safetensors").n == 24
    (tmp_path / "other.txt").write_text("words")
    with pytest.raises(ValueError, match="holds no training statistics") as found:
        TrainingStatistics.load(tmp_path / "other.txt")
    assert "weights_only" not in str(found.value)  # unpickling it would run what it holds


@pytest.mark.filterwarnings("ignore")
def test_accuracy_that_an_uncalibrated_step_costs_is_told():
    torch.manual_seed(0)
    y = torch.arange(300) % 3
    x = nn.functional.one_hot(y, 3) + 0.3 * torch.randn(300, 3)
    model = nn.Linear(3, 3)
    steps = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def closure():
        steps.zero_grad()
        loss = cross_entropy(model(x[:150]), y[:150])
        loss.backward()
        return loss

    steps.step(closure)
    few, rest, held = ((x[s], y[s]) for s in (slice(30), slice(30, 150), slice(150, None)))
    given = {"calibrate": False, "validation": held, "max_drop": 0.9}
    few = 20 * few[0], 0 * few[1] + 1  # a gradient that leads far
    with pytest.warns(UserWarning, match="the deletion costs accuracy: on 150 samples"):
        result = unlearn(model, few, rest, cross_entropy, damping=1e-4, **given)
    assert result.guard.after < result.guard.before - 0.05
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*costs accuracy")
        unlearn(model, few, rest, cross_entropy, damping=1e3, **given)
