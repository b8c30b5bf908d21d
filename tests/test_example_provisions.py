"""The example that deletes texts of one class from a DistilBERT."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import provisions
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "experiments" / "provisions.md"
RECORD = ROOT / "examples" / "results" / "provisions.json"
LINES = [
    {"provision": "This lease ends in May.", "label": ["term"], "source": "a.htm"},
    {"provision": "The law of Ohio applies to all of it.", "label": ["law", "term"], "source": "b"},
    {"provision": "Nobody knows.", "label": ["rare"], "source": "c"},
    {"provision": "The law of Iowa applies.", "label": ["law"], "source": "d"},
]


def parsed(*given):
    return provisions.options().parse_args([str(each) for each in given])


@pytest.mark.filterwarnings("ignore:the step raised:UserWarning")  # noise breaks the network
@pytest.mark.filterwarnings("ignore:.*validation:UserWarning")  # the network is hardly trained
@pytest.mark.filterwarnings("ignore:.*control groups:UserWarning")
def test_the_noise_of_small_epsilons_breaks_the_network(tmp_path):
    form = dataclasses.replace(
        provisions.REDUCED, n=360, removals=6, perturbations=20, rows=64, epochs=8
    )
    found = provisions.run(parsed("--seed", 3), form)
    assert found["n"] == 360
    assert found["n_deleted"] == 6
    start = found["start"]["macro_f1"]
    assert start > 0.5  # a third would be chance
    for way in (provisions.DEFAULT, provisions.NOISELESS, provisions.label(0.1)):
        (stream,) = found["ways"][way]
        assert stream["points"][-1]["removed"] == 6
        assert stream["macro_f1"] > start - 0.15, way
    (broken,) = found["ways"][provisions.label(0.0005)]
    assert broken["broken_after"] is not None
    assert broken["macro_f1"] < start - provisions.FALL
    assert found["sigma"][provisions.label(0.01)] == pytest.approx(0.0468, rel=1e-2)
    text = provisions.show(found)
    assert "calibrated default" in text
    assert "> 6" in text
    provisions.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    json.dumps(found)


def ledgar(folder, lines=LINES):
    (folder / "LEDGAR.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def test_ledgar_is_read(tmp_path):
    texts, targets, classes = provisions.provisions(ledgar(tmp_path), most=2)
    assert classes == ("law", "term")  # "rare" is rarer, and its text is left out
    assert texts == [LINES[i]["provision"] for i in (0, 1, 3)]
    assert targets.tolist() == [[0, 1], [1, 1], [1, 0]]


def test_ledgar_is_split_as_in_the_paper(tmp_path):
    many = [dict(LINES[k % 2], provision=f"number {k} of them") for k in range(100)]
    data = provisions.load(parsed("--data", ledgar(tmp_path, many)), provisions.REDUCED)
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [72, 8, 20]
    tokens = torch.cat([part[0] for part in (data.train, data.validation, data.test)])
    assert tokens.shape == (100, provisions.PAPER_LENGTH)
    assert len({tuple(row) for row in tokens.tolist()}) > 90
    changed = data.replacement(tokens, np.random.default_rng(0))
    assert ((changed != tokens).sum(1) == 1).all()  # one token of each text
    assert ((changed > 0) == (tokens > 0)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no \*\.jsonl"),
        ("{}\n", "line 1 of .*KeyError"),
        ('{"provision": "a", "label": ["b"]}\nno JSON\n', "line 2 of .*JSONDecodeError"),
        ('{"provision": "a", "label": "b"}\n', "label a list of names"),
    ],
)
def test_what_is_not_ledgar_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=message):
        provisions.provisions(tmp_path)


def test_a_class_without_positives_has_no_part_in_f1():
    logits = torch.tensor([[1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert provisions.f1(logits, targets).tolist() == pytest.approx([2 / 3, 0, 0])


def test_when_f1_has_fallen():
    points = [{"removed": k, "macro_f1": v} for k, v in ((0, 0.8), (1, 0.79), (5, 0.74), (9, 0.8))]
    assert provisions.broken_after(points) == 1
    assert provisions.broken_after(points[:2]) is None


def test_the_balanced_loss_weighs_both_answers_alike():
    targets = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    assert provisions.balanced_loss(targets).pos_weight.tolist() == [3.0]


def test_a_published_model_is_loaded(tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=50, n_layers=1, n_heads=2, dim=8, hidden_dim=8)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    tokens, targets = torch.ones(2, 4, dtype=torch.int64), torch.eye(3)[:2]
    part = (tokens, targets)
    data = provisions.Data(part, part, part, ("a", "b", "c"), "", None)
    assert provisions.Classifier(data, 8, tmp_path)(tokens).shape == (2, 3)


def test_the_page_has_the_figures_of_the_record():
    record, page = json.loads(RECORD.read_text()), PAGE.read_text()
    assert record["dirty"] is False
    for way, streams in record["ways"].items():
        f1 = np.mean([s["macro_f1"] for s in streams])
        loss = np.mean([s["loss_deleted"] for s in streams])
        falls = provisions.falls(streams, record)
        seconds = np.mean([s["cpu_seconds_per_text"] for s in streams])
        assert f"| {way} | {falls} | {f1:.3f} | {loss:.2f} | {seconds:.1f} |" in page
    for name, rows in (("nothing done", [record["start"]]), ("retrained", record["retrained"])):
        f1, loss = (np.mean([s[key] for s in rows]) for key in ("macro_f1", "loss_deleted"))
        assert f"| {name} | | {f1:.3f} | {loss:.2f} | |" in page
    for each in ("sigma", "sigma_for_this_n"):
        assert f"{record[each][provisions.label(0.1)]:.2g}" in page
