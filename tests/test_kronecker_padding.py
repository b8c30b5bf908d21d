"""EK-FAC whatever the padding of texts, and what it refuses."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lcodec_ext._torch.batches import as_batch
from lcodec_ext.curvature import GaussNewtonOperator, UnitSelection, all_trainable
from lcodec_ext.curvature.kronecker import EKFACOperator, KroneckerFactors
from lcodec_ext.curvature.kronecker.draws import content, signs_of_texts
from lcodec_ext.unlearning import TrainingStatistics, per_token_loss, unlearn

CLASSES, LENGTHS = 6, (6, 3, 5, 4, 4)  # more than 16 outputs for each, so that signs are drawn


class Reader(nn.Module):
    """Logits of each word, by the word and the mean of all of its text."""

    def __init__(self, of_text: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 4)
        self.hidden = nn.Linear(4, 5)
        self.out = nn.Linear(5, 20 if of_text else CLASSES)
        self._of_text = of_text

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        counted = attention_mask[..., None].to(self.out.weight.dtype)
        each = torch.tanh(self.hidden(self.words(input_ids)))
        mean = (each * counted).sum(1) / counted.sum(1)
        return self.out(mean if self._of_text else each + mean[:, None])


def texts(length: int, *, left: bool, some: slice = slice(None)) -> dict[str, Tensor]:
    """Texts of unequal length, padded on either side."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for n in LENGTHS:
        ids, labels = torch.randint(1, CLASSES, (2, n), generator=generator)
        padding = (length - n, 0) if left else (0, length - n)
        values = (ids, torch.ones_like(ids), labels)
        pads = (7, 0, -100)
        rows.append(
            [nn.functional.pad(v, padding, value=p) for v, p in zip(values, pads, strict=True)]
        )
    ids, mask, labels = (torch.stack(column)[some] for column in zip(*rows, strict=True))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def assert_same(one: KroneckerFactors, other: KroneckerFactors) -> None:
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert torch.allclose(a.values, b.values, rtol=0, atol=1e-6 * float(a.values.max()))


@pytest.mark.parametrize("left", [True, False])
def test_factors_are_those_of_texts_without_padding(left: bool) -> None:
    torch.manual_seed(0)
    model = Reader().double()
    selection, loss_fn = all_trainable(model), per_token_loss().of_mean(4.0)
    matrix = EKFACOperator(model, loss_fn, texts(6, left=False), selection).to_dense()
    for length in (6, 9):
        padded = EKFACOperator(model, loss_fn, texts(length, left=left), selection)
        own = KroneckerFactors.from_dict(padded.factors.to_dict())
        assert torch.allclose(padded.to_dense(), matrix, rtol=0, atol=1e-7)
        # taken out one by one, each without padding
        for k, n in enumerate(LENGTHS[:-1]):
            alone = texts(6, left=False, some=slice(k, k + 1))
            alone = {key: t[:, :n] for key, t in alone.items()}
            options = {"basis": own}
            own = own.minus(EKFACOperator(model, loss_fn, alone, selection, **options).factors)
        last = {k: t[4:] for k, t in texts(6, left=False).items()}
        rest = EKFACOperator(model, loss_fn, last, selection, basis=padded.factors)
        assert_same(own, rest.factors)


def test_bases_leave_padding_out() -> None:
    torch.manual_seed(0)
    model = Reader(of_text=True).double()
    selection, labels = UnitSelection.all(model), torch.arange(5)
    matrices = []
    for length in (6, 30):
        data = texts(length, left=False) | {"labels": labels}
        matrices.append(EKFACOperator(model, cross_entropy, data, selection).to_dense())
    assert torch.allclose(*matrices, rtol=0, atol=1e-7)


@pytest.mark.parametrize("of_text", [True, False])
def test_a_mask_is_known_by_its_position(of_text: bool) -> None:
    """The factors are those of the same texts whose inputs are passed by name."""
    torch.manual_seed(0)
    model, data = Reader(of_text).double(), texts(9, left=True)
    loss_fn = cross_entropy if of_text else per_token_loss().of_mean(4.0)
    labels = torch.arange(5) if of_text else data["labels"]
    found = []
    for given in (data | {"labels": labels}, (data["input_ids"], data["attention_mask"], labels)):
        found.append(EKFACOperator(model, loss_fn, given, all_trainable(model)).to_dense())
    assert torch.equal(*found)


def test_signs_of_classes_along_the_second_axis() -> None:
    ids, labels = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[2, 1, -100, -100]])
    found = []
    for length in (4, 2):
        batch = as_batch((ids[:, :length], labels[:, :length]), 1, "data")
        like, hashes = torch.zeros(1, 7, length), torch.tensor([5])
        found.append(signs_of_texts(hashes, like, batch, 0, 0))
        assert found[-1].shape == like.shape
    assert torch.equal(found[0][..., :2], found[1])


def test_content_leaves_out_padding_of_labels_and_of_a_decoder() -> None:
    ids, labels = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[2, 9, -100, -100]])
    data = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 2, 7, 7]]), "labels": labels}
    short = {key: t if key == "input_ids" else t[:, :2] for key, t in data.items()}
    other = short | {"labels": torch.tensor([[2, 8]])}
    found = [int(content(as_batch(each, 1, "data"))) for each in (data, short, other)]
    assert found[0] == found[1] != found[2]
    ignored = {key: t.where(t != -100, 1) if key == "labels" else t for key, t in data.items()}
    assert int(content(as_batch(ignored, 1, "data"), ignored=1)) == found[0]


# ---------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))


def test_samples_that_are_not_among_those_of_the_factors_are_refused(problem) -> None:
    model, x, y = problem
    statistics = TrainingStatistics.collect(model, (x, y), cross_entropy, curvature="ekfac")
    others = 2 * torch.randn(30, 6, dtype=torch.float64), y[:30]
    with pytest.raises(ValueError, match="are not among theirs or were taken out before"):
        statistics.without(model, cross_entropy, others)
    less = statistics.without(model, cross_entropy, (x[:20], y[:20]))
    with pytest.raises(ValueError, match="are not among theirs or were taken out before"):
        less.without(model, cross_entropy, (x[1:20], y[1:20]))


def test_targets_that_are_no_distributions_weigh_the_cross_entropy(problem) -> None:
    model, x, _ = problem
    data, selection = (x, torch.rand(40, 3, dtype=torch.float64)), all_trainable(model)
    found = EKFACOperator(model, cross_entropy, data, selection).diagonal().sum()
    exact = GaussNewtonOperator(model, cross_entropy, data, selection).to_dense().trace()
    assert torch.isclose(found, exact, rtol=1e-10)


@pytest.mark.parametrize("kind", ["model", "empirical"])
def test_ignored_labels_of_later_batches_are_refused(problem, kind) -> None:
    model, x, y = problem
    y[-1] = -100
    data = [(x[:20], y[:20]), (x[20:39], y[20:39]), (x[39:], y[39:])]
    with pytest.raises(ValueError, match="ignores 1 of the 1 labels of a batch"):
        EKFACOperator(model, cross_entropy, data, all_trainable(model), kind=kind)


def test_what_has_no_root_is_told_what_a_deletion_takes(problem) -> None:
    _, x, y = problem

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": super().forward(x), "b": x}

    def of_a(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return cross_entropy(outputs["a"], targets)

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets)

    for model, loss_fn in ((Two(6, 3), of_a), (nn.Linear(6, 70), own)):
        given = (x[:5], y[:5]), (x[5:], y[5:]), loss_fn
        with pytest.raises(ValueError, match="curvature='fisher' in place of 'ekfac'"):
            unlearn(model.double(), *given, curvature="ekfac", calibrate=False)


def test_blocks_that_keep_all_rows_stay_as_they_are(problem) -> None:
    model, x, y = problem
    whole, part = UnitSelection.all(model), UnitSelection({"2": [0, 1, 2]})
    factors = EKFACOperator(model, cross_entropy, (x, y), whole).factors
    columns = part.layout(model).numbers_in(whole.layout(model))
    (block,) = factors.restrict(columns).blocks
    assert block.rows is factors.blocks[1].rows
    assert block.values is factors.blocks[1].values


def test_units_of_tied_layers_are_counted_in_both() -> None:
    torch.manual_seed(0)
    model = Reader()
    model.out = nn.Linear(4, 12, bias=False)
    model.hidden = nn.Linear(4, 4)
    model.out.weight = model.words.weight
    data = texts(6, left=False)
    forget, retain = ({k: t[some] for k, t in data.items()} for some in (slice(1), slice(1, 5)))
    result = unlearn(model, forget, retain, per_token_loss(), damping=0.1, calibrate=False)
    assert result.n_units == len(result.selection) == 12 + 12 + 4
