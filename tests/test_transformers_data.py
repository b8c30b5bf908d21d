"""Data as people of transformers have them: rows of lists, tokenizers, collators, Trainer."""

import re

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lcodec_ext._torch.batches import plain_collate
from lcodec_ext._torch.predict import predict
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.curvature import GaussNewtonOperator, UnitSelection
from lcodec_ext.unlearning import Settings, Unlearner, unlearn, verify_ledger
from lcodec_ext.unlearning.request import n_shared

N, M, C, WORDS = 20, 3, 3, 30
STEP = Settings(curvature="gauss_newton", damping=0.1, weight_decay=1e-2, max_drop=None)
CPU, DOUBLE = torch.device("cpu"), torch.float64


class Rows:
    """A `datasets.Dataset`, as far as anybody looks: rows are dicts, columns can be asked for."""

    def __init__(self, rows):
        self.rows = rows
        self.column_names = list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        if isinstance(which, str):
            return [row[which] for row in self.rows]
        return dict(self.rows[which])

    def __iter__(self):
        return map(dict, self.rows)


def tokenizer():
    words = ["[PAD]", "[UNK]", "[MASK]", *(f"w{k}" for k in range(3, WORDS))]
    made = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )


TOKENIZER = tokenizer()
PADDED = transformers.DataCollatorWithPadding(TOKENIZER)


def texts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (N,), generator=generator).tolist()
    return [
        " ".join(f"w{k}" for k in torch.randint(3, WORDS, (length,), generator=generator))
        for length in lengths
    ]


def classified():
    rows = [dict(TOKENIZER(text)) | {"label": k % C} for k, text in enumerate(texts())]
    return [{k: v for k, v in row.items() if k != "token_type_ids"} for row in rows]


def tagged():
    rows = classified()
    return [row | {"labels": [word % C for word in row["input_ids"]]} for row in map(_bare, rows)]


def _bare(row):
    return {k: v for k, v in row.items() if k != "label"}


def parts(rows, collate=None, size=4):
    """The rows to delete and those to retain, as loaders where there is a collator."""
    some = rows[:M], rows[M:]
    return [DataLoader(Rows(r), size, collate_fn=collate) if collate else Rows(r) for r in some]


SIZES = {"vocab_size": WORDS, "pad_token_id": 0}


def bert(kind="SequenceClassification"):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        **SIZES, max_position_embeddings=10, n_layers=1, n_heads=2, dim=8, hidden_dim=8,
        num_labels=C,
    )  # fmt: skip
    return getattr(transformers, f"DistilBertFor{kind}")(config).double().eval()


def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **SIZES, n_positions=10, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        **SIZES, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).double().eval()


def per_token(outputs, targets):
    """The mean over the words of each sample, then over samples."""
    counted = targets != -100
    each = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return ((each.view_as(targets) * counted).sum(1) / counted.sum(1)).mean()


def next_word(outputs, targets):
    return per_token(outputs[:, :-1], targets[:, 1:])


def collated_by(name):
    """Model, rows, collator and loss of a task."""
    if name == "classes":
        return bert(), classified(), PADDED, cross_entropy
    if name == "words":
        collate = transformers.DataCollatorForTokenClassification(TOKENIZER)
        return bert("TokenClassification"), tagged(), collate, per_token
    if name == "language model":
        collate = transformers.DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
        return gpt(), [_bare(row) for row in classified()], collate, next_word
    model = t5()
    collate = transformers.DataCollatorForSeq2Seq(TOKENIZER, model=model)
    return model, tagged(), collate, per_token


TASKS = ["classes", "words", "language model", "seq2seq"]


def weights(result):
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


@pytest.mark.parametrize("task", TASKS)
def test_padding_to_each_batch_is_padding_to_the_longest(task):
    model, rows, collate, loss_fn = collated_by(task)
    layers = {"language model": "*.c_attn", "seq2seq": "decoder*SelfAttention.[qv]"}.get(
        task, "*.[qv]_lin"
    )
    options = {"preset": STEP, "selection": UnitSelection.from_globs(model, layers)}
    forget, retain = parts(rows, collate)
    found = unlearn(model, forget, retain, loss_fn, validation=retain, **options)
    whole = dict(collate(rows))
    some = [{k: v[at] for k, v in whole.items()} for at in (slice(0, M), slice(M, None))]
    expected = unlearn(model, *some, loss_fn, **options)
    moved, wanted = (weights(each) - weights_of(model) for each in (found, expected))
    assert (moved - wanted).norm() < 1e-10 * wanted.norm()
    assert wanted.norm() > 1e-3


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_loses_the_same_however_it_is_padded(task):
    model, rows, collate, loss_fn = collated_by(task)
    losses, hashes = [], []
    for size in (1, 3, N):
        samples = as_samples(DataLoader(Rows(rows), size, collate_fn=collate), "data", CPU, DOUBLE)
        losses.append(predict(model, samples, loss_fn, size).losses)
        hashes.append(samples.hashes())
    assert all(torch.allclose(each, losses[0], rtol=1e-12) for each in losses)
    assert hashes[0] == hashes[1] == hashes[2]
    widest = max(len(row["input_ids"]) for row in rows)
    assert widest > min(len(row["input_ids"]) for row in rows)


def test_short_texts_do_not_tell_how_much_all_take():
    rows = [{"input_ids": [5] * length, "labels": 0} for length in (1, *[8] * 9)]
    samples = as_samples(DataLoader(Rows(rows), collate_fn=PADDED), "data", CPU, DOUBLE)
    assert samples.kept(4, 10 * 72).cut is None  # as short as the first, they would fit
    assert len(samples.kept(4, 10 * 200).cut) == 3


def test_operators_take_batches_of_any_length():
    model, rows, collate, loss_fn = collated_by("classes")
    selection = UnitSelection.from_globs(model, "*.q_lin", "classifier")
    loader = DataLoader(Rows(rows), 3, collate_fn=collate)
    found = GaussNewtonOperator(model, loss_fn, loader, selection).to_dense()
    whole = GaussNewtonOperator(model, loss_fn, dict(collate(rows)), selection).to_dense()
    assert (found - whole).norm() < 1e-10 * whole.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_duplicates_are_found_however_they_are_padded(side):
    rows = sorted(classified(), key=lambda row: len(row["input_ids"]))
    few, others = ([rows[k] for k in some] for some in ([0, 2, 3], [1, 4, 5]))

    def made(some, side="right"):
        TOKENIZER.padding_side = side
        batch = dict(PADDED(some))
        TOKENIZER.padding_side = "right"
        batch["features"] = batch["input_ids"][..., None] * torch.tensor([1.0, 2.0])
        return as_samples(batch, "data", CPU, DOUBLE)

    assert (
        made(few).fetch([0]).kwargs["input_ids"].shape
        < made(rows).fetch([0]).kwargs["input_ids"].shape
    )
    assert n_shared(made(few), made(rows, side)) == 3
    assert n_shared(made(few), made([*others, *rows[6:]], side)) == 0
    assert n_shared(made([*few, *others]), made(others + rows[6:], side)) == 3
    changed = [row | {"label": (row["label"] + 1) % C} for row in rows]
    assert n_shared(made(few), made(changed, side)) == 0
    with pytest.warns(UserWarning, match="3 of 3 samples of forget are also among"):
        unlearn(bert(), dict(PADDED(few)), dict(PADDED(rows)), cross_entropy, preset=STEP)


PREPARED = {"max_length": 8, "padding": "max_length"}


def of_one_length():
    rows = [dict(TOKENIZER(text, **PREPARED)) for text in texts()]
    return [_without(row, "token_type_ids") | {"label": k % C} for k, row in enumerate(rows)]


def _without(row, key):
    return {k: v for k, v in row.items() if k != key}


@pytest.mark.parametrize("form", ["rows", "list", "encodings", "pairs", "label_ids"])
def test_rows_of_lists_of_one_length_need_no_collator(form):
    rows = of_one_length()
    model, collate = bert(), transformers.default_data_collator
    expected = unlearn(model, *parts(rows, collate), cross_entropy, preset=STEP)
    if form == "encodings":
        rows = [transformers.BatchEncoding(row) for row in rows]
    if form == "pairs":
        rows = [(_without(row, "label"), row["label"]) for row in rows]
    if form == "label_ids":
        rows = [_without(row, "label") | {"label_ids": row["label"]} for row in rows]
    given = parts(rows) if form == "rows" else (rows[:M], rows[M:])
    found = unlearn(model, *given, cross_entropy, preset=STEP)
    assert torch.equal(weights(found), weights(expected))


def test_lists_of_other_things_stay_as_they_are():
    rows = [{"x": [1, 2], "t": [[1.5], [2.5]], "s": "a", "e": [], "r": [1, [2]], "n": 3}]
    made = plain_collate(rows)
    assert torch.equal(made["x"], torch.tensor([[1, 2]]))
    assert torch.equal(made["t"], torch.tensor([[[1.5], [2.5]]], dtype=torch.float32))
    assert made["s"] == ["a"]
    assert made["e"] == []
    assert len(made["r"]) == 2  # taken apart, as by default_collate
    assert torch.equal(made["n"], torch.tensor([3]))
    assert len(plain_collate([([1, 2], 3)])[0]) == 2  # several inputs


def test_what_a_tokenizer_returns_is_a_batch():
    rows, model = of_one_length(), bert()
    batch = TOKENIZER(texts(), return_tensors="pt", **PREPARED)
    batch.pop("token_type_ids", None)
    batch["labels"] = torch.arange(N) % C
    forget, retain = (
        transformers.BatchEncoding({k: v[at] for k, v in batch.items()})
        for at in (slice(0, M), slice(M, None))
    )
    found = unlearn(model, forget, retain, cross_entropy, preset=STEP)
    expected = unlearn(model, rows[:M], rows[M:], cross_entropy, preset=STEP)
    assert torch.equal(weights(found), weights(expected))


def test_rows_of_unequal_length_ask_for_a_collator():
    rows = classified()
    match = r"keys 'input_ids', 'attention_mask', 'label'.*collate_fn=DataCollatorWithPadding"
    for forget, retain in ((rows[:M], rows[M:]), parts(rows)):
        with pytest.raises(ValueError, match=match):
            unlearn(bert(), forget, retain, cross_entropy)
    with pytest.raises(ValueError, match=match):
        GaussNewtonOperator(bert(), cross_entropy, Rows(rows), UnitSelection.all(bert()))


def test_texts_padded_apart_say_how_to_pad_them():
    rows = sorted(classified(), key=lambda row: len(row["input_ids"]))
    with pytest.raises(ValueError, match=r"padding='max_length'.* or a DataLoader whose"):
        unlearn(
            bert(), dict(PADDED(rows[:M])), dict(PADDED(rows[M:])), cross_entropy, preset=STEP,
            order="sequential",
        )  # fmt: skip


def test_words_masked_at_random_are_masked_once():
    collate = transformers.DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.4)
    model, rows = bert("MaskedLM"), [_bare(row) for row in classified()]
    with pytest.raises(ValueError, match=re.escape("pass batch = collate_fn([data[i] for i")):
        unlearn(model, *parts(rows, collate), per_token)
    torch.manual_seed(0)
    batch = collate(rows)
    some = (batch["labels"] != -100).any(1).nonzero()[:, 0]
    forget, retain = ({k: v[at] for k, v in batch.items()} for at in (some[:M], some[M:]))
    result = unlearn(model, forget, retain, per_token, preset=STEP)
    assert result.loss_forget.after > result.loss_forget.before


def with_columns():
    return [row | {"text": "w3 w4", "idx": k} for k, row in enumerate(classified())]


def trained_by(rows, folder):
    how = transformers.TrainingArguments(folder, use_cpu=True, report_to=[])
    return transformers.Trainer(bert(), how, train_dataset=Rows(rows), data_collator=PADDED)


def test_columns_that_are_no_input_say_how_to_leave_them_out(tmp_path):
    rows, model = with_columns(), bert()
    match = "'text', 'idx'.*Take columns out.*trainer.get_eval_dataloader"
    with pytest.raises(ValueError, match=match):
        unlearn(model, *parts(rows, PADDED), cross_entropy)
    trainer = trained_by(rows, tmp_path)
    loaders = [trainer.get_eval_dataloader(part) for part in parts(rows)]
    found = unlearn(model, *loaders, cross_entropy, preset=STEP)
    expected = unlearn(model, *parts(classified(), PADDED), cross_entropy, preset=STEP)
    assert torch.equal(weights(found), weights(expected))

    class Strict(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = bert()

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask).logits

    numbered = [_without(row, "text") for row in rows]
    with pytest.raises(ValueError, match="'idx'.* Leave columns out that it does not take"):
        unlearn(Strict(), *parts(numbered, PADDED), cross_entropy)
    found = unlearn(model, *parts(numbered, PADDED), cross_entropy, preset=STEP)
    assert torch.equal(weights(found), weights(expected))  # which takes any keyword


def test_a_stream_of_the_data_of_a_trainer(tmp_path):
    """Samples are numbered as in the data set, whatever the order of the training was."""
    rows, model = with_columns(), bert()
    loader = trained_by(rows, tmp_path / "trainer").get_train_dataloader()
    options = {"preset": STEP, "directory": tmp_path / "stream"}
    with Unlearner(model, loader, cross_entropy, **options) as stream:
        stream.remove([4, 1])
        last, whole = stream.model, parts(classified(), PADDED)
    expected = Rows(classified()[:1] + classified()[2:4] + classified()[5:])
    forget = Rows([classified()[k] for k in (4, 1)])
    loaders = [DataLoader(part, 4, collate_fn=PADDED) for part in (forget, expected)]
    found = unlearn(model, *loaders, cross_entropy, preset=STEP)
    assert torch.allclose(weights(found), weights_of(last), rtol=1e-9, atol=1e-12)
    other = DataLoader(Rows(classified()), 7, collate_fn=PADDED)
    assert verify_ledger(tmp_path / "stream", last, other)
    assert not verify_ledger(tmp_path / "stream", last, whole[1])
    with Unlearner.resume(tmp_path / "stream", bert(), other, cross_entropy) as stream:
        stream.remove(7)
        assert stream.removed == (4, 1, 7)
