"""Measures of a deletion against independent computations and closed forms."""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import expit, log_expit, softmax
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcodec_ext.evaluation.metrics import (
    accuracy,
    activation_distance,
    gradient_norm,
    js_distance,
    membership_inference,
    modified_entropy,
    relearn_time,
    roc_auc,
    sample_losses,
    tpr_at_fpr,
    tug_of_war,
    weight_distance,
)

DOUBLE = torch.float64


def table(logits):
    """A model that answers sample number i with row i, and data of all the samples."""
    logits = torch.as_tensor(logits)
    model = nn.Embedding.from_pretrained(logits, freeze=False)
    return model, (torch.arange(len(logits)), torch.arange(len(logits)) % logits.shape[1])


def logits(n=30, classes=5, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, classes, dtype=DOUBLE, generator=generator)


def mlp(seed=0, dtype=DOUBLE, n_in=4, width=8, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(n_in, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, classes))
        return nn.Sequential(*layers).to(dtype)


def samples(n=50, seed=0, n_in=4, classes=3, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_in, dtype=dtype, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


# ---------------------------------------------------------------------------------------------
# Distances


@pytest.mark.parametrize("scale", [0.1, 3.0, 200.0])
@pytest.mark.parametrize("batch_size", [7, 256])
def test_js_distance_is_the_mean_of_scipys(scale, batch_size):
    p, q = logits(scale=scale), logits(scale=scale, seed=1)
    expected = [
        jensenshannon(softmax(a), softmax(b), base=2)
        for a, b in zip(p.numpy(), q.numpy(), strict=True)
    ]
    model, data = table(p)
    other, _ = table(q)
    found = js_distance(model, other, data, batch_size=batch_size)
    assert found == pytest.approx(np.mean(expected), rel=1e-10)
    assert js_distance(other, model, data) == pytest.approx(found, rel=1e-14)
    assert js_distance(model, model, data) == 0.0


def test_js_distance_is_summed_over_classes_and_rooted():
    p, q = torch.tensor([[0.0, -800.0]]), torch.tensor([[0.0, 0.0]])
    model, data = table(p)
    # (1, 0) and (1/2, 1/2)
    expected = (1 - 0.75 * np.log2(3) + 0.5) ** 0.5
    assert js_distance(model, table(q)[0], data) == pytest.approx(expected, rel=1e-12)
    assert js_distance(model, table(-p)[0], data) == 1.0


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-10])
def test_small_js_distances_do_not_cancel(size):
    p, change = logits(), size * logits(scale=1.0, seed=1)
    p_, q_ = (softmax(z.numpy(), axis=1) for z in (p, p + change))
    # second order in the change of the logits: Fisher's metric
    centred = change.numpy() - (p_ * change.numpy()).sum(1, keepdims=True)
    expected = np.sqrt((p_ * centred**2).sum(1) / (8 * np.log(2))).mean()
    found = js_distance(table(p)[0], table(p + change)[0], table(p)[1])
    assert found == pytest.approx(expected, rel=max(3 * size, 1e-5))
    assert np.abs(q_ - p_).max() > 0


def test_js_distance_across_the_change_from_series_to_logarithms():
    gaps = torch.linspace(0.055, 0.065, 41, dtype=DOUBLE)  # tanh(gap / 2) about 0.03
    for gap in gaps:
        p = torch.tensor([[0.0, 0.0]], dtype=DOUBLE)
        q = torch.tensor([[float(gap), 0.0]], dtype=DOUBLE)
        expected = jensenshannon(softmax(p.numpy()[0]), softmax(q.numpy()[0]), base=2)
        found = js_distance(table(p)[0], table(q)[0], table(p)[1])
        assert found == pytest.approx(expected, rel=1e-11)


def test_js_distance_is_a_metric():
    models = [table(logits(seed=s))[0] for s in range(3)]
    data = table(logits())[1]
    d = {
        pair: js_distance(*(models[k] for k in pair), data)
        for pair in itertools.permutations(range(3), 2)
    }
    assert d[0, 2] <= d[0, 1] + d[1, 2]
    assert all(0 < value < 1 for value in d.values())


def test_single_logits_are_those_of_class_1():
    z, w = logits(classes=1), logits(classes=1, seed=1)
    pairs = [(torch.cat([torch.zeros_like(each), each], 1)) for each in (z, w)]
    x = torch.arange(len(z))
    data = (x, x % 2)
    for distance in (js_distance, activation_distance):
        single = distance(table(z)[0], table(w)[0], data)
        assert single == pytest.approx(distance(table(pairs[0])[0], table(pairs[1])[0], data))


def test_activation_distance_is_euclidean_between_probabilities():
    p, q = logits(), logits(seed=1)
    expected = np.linalg.norm(softmax(p.numpy(), 1) - softmax(q.numpy(), 1), axis=1).mean()
    model, data = table(p)
    assert activation_distance(model, table(q)[0], data, batch_size=7) == pytest.approx(expected)


def test_distances_refuse_outputs_that_are_no_logits():
    class Two(nn.Linear):
        def forward(self, x):
            return (super().forward(x),) * 2

    x, y = samples()
    with pytest.raises(
        ValueError, match=r"logits of shape \(n, C\), \(n, 1\) or \(n,\); got .*tuple"
    ):
        js_distance(Two(4, 3).double(), mlp(), (x, y))


def test_weight_distance():
    a, b = mlp(0), mlp(1)
    va, vb = (nn.utils.parameters_to_vector(m.parameters()).detach() for m in (a, b))
    assert weight_distance(a, b) == pytest.approx((va - vb).norm().item())
    relative = ((va - vb).norm() / vb.norm()).item()
    assert weight_distance(a, b, relative=True) == pytest.approx(relative)
    assert weight_distance(a, a) == 0.0
    with pytest.raises(ValueError, match=r"same parameters; '.*' has shape \(\d"):
        weight_distance(a, mlp(width=9))
    with pytest.raises(ValueError, match="None"):
        weight_distance(a, nn.Sequential(a[0]))


# ---------------------------------------------------------------------------------------------
# Gradient norm


def test_gradient_norm_is_that_of_the_whole_objective():
    model, (x, y) = mlp().eval(), samples(53)
    objective = F.cross_entropy(model(x), y)
    objective = objective + 0.05 * sum(p.square().sum() for p in model.parameters())
    parts = torch.autograd.grad(objective, list(model.parameters()))
    expected = torch.cat([p.flatten() for p in parts]).norm().item()
    for batch_size in (7, 53, 256):
        found = gradient_norm(
            model, (x, y), F.cross_entropy, weight_decay=0.1, batch_size=batch_size
        )
        assert found == pytest.approx(expected, rel=1e-12)


def test_gradient_norm_is_no_mean_over_batches():
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x, y = (
        torch.ones(4, 1, dtype=DOUBLE),
        torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=DOUBLE),
    )
    assert gradient_norm(model, (x, y), nn.MSELoss(), batch_size=2) == 0.0
    assert gradient_norm(model, (x[:2], y[:2]), nn.MSELoss()) == 2.0


def test_frozen_parameters_have_no_gradient():
    model, data = mlp(), samples()
    whole = gradient_norm(model, data, F.cross_entropy)
    model[0].requires_grad_(False)
    model.eval()
    parts = torch.autograd.grad(
        F.cross_entropy(model(data[0]), data[1]), list(model[3].parameters())
    )
    expected = torch.cat([p.flatten() for p in parts]).norm().item()
    assert gradient_norm(model, data, F.cross_entropy) == pytest.approx(expected)
    assert expected < whole
    with pytest.raises(ValueError, match="no trainable parameter"):
        gradient_norm(model.requires_grad_(False), data, F.cross_entropy)


# ---------------------------------------------------------------------------------------------
# Losses and accuracy


def composite(outputs, targets):
    logits, value = outputs
    classes, numbers = targets
    return F.cross_entropy(logits, classes) + 0.3 * F.mse_loss(value, numbers)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.value = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return self.head(h), self.value(h)[:, 0]


def untraceable(outputs, targets):
    each = [
        F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True) if o.sum().item() < 1e9
    ]
    return torch.stack(each).mean()


@pytest.mark.parametrize(
    ("loss_fn", "alone"),
    [
        (F.cross_entropy, functools.partial(F.cross_entropy, reduction="none")),
        (nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, reduction="none")),
        (
            functools.partial(F.cross_entropy, label_smoothing=0.1),
            functools.partial(F.cross_entropy, reduction="none", label_smoothing=0.1),
        ),
        (untraceable, functools.partial(F.cross_entropy, reduction="none")),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_sample_losses(loss_fn, alone, dtype):
    model, (x, y) = mlp(dtype=dtype).eval(), samples(dtype=dtype)
    expected = alone(model(x).detach().double(), y)
    for data in ((x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), 11, shuffle=True)):
        found = sample_losses(model, data, loss_fn, batch_size=8)
        assert found.dtype == DOUBLE
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_sample_losses_of_two_outputs():
    model, (x, y) = TwoHeads().double(), samples()
    targets = (y, x[:, 0].exp())
    found = sample_losses(model, (x, targets), composite, batch_size=16)
    out, value = model(x)
    expected = F.cross_entropy(out, y, reduction="none") + 0.3 * (value - targets[1]).square()
    torch.testing.assert_close(found, expected.detach())
    assert accuracy(model, (x, targets), composite) is None
    share = accuracy(model, (x, targets), composite, score=lambda o, t: o[0].argmax(1) == t[0])
    assert share == pytest.approx((out.argmax(1) == y).double().mean().item())


def test_losses_of_samples_that_are_well_known_do_not_vanish():
    z = torch.tensor([[20.0, 0.0], [30.0, 0.0]])  # 0 in float32
    model, (x, _) = table(z)
    found = sample_losses(model, (x, torch.zeros(2, dtype=torch.long)), F.cross_entropy)
    np.testing.assert_allclose(found.numpy(), np.exp([-20.0, -30.0]), rtol=1e-2)


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
    ],
)
def test_losses_that_are_no_means_are_refused(loss_fn):
    with pytest.raises(ValueError, match="loss_fn must be the plain mean over the samples"):
        sample_losses(mlp(), samples(), loss_fn)


def test_losses_must_be_scalars_and_finite():
    with pytest.raises(ValueError, match="must return a scalar tensor"):
        sample_losses(mlp(), samples(), functools.partial(F.cross_entropy, reduction="none"))
    model = mlp()
    nn.init.constant_(model[3].bias, torch.inf)
    with pytest.raises(ValueError, match="outputs of the model hold NaN or infinity"):
        sample_losses(model, samples(), F.cross_entropy)


@pytest.mark.parametrize(
    "measure",
    [
        accuracy,
        sample_losses,
        gradient_norm,
        lambda model, data, loss_fn: membership_inference(model, data, data, data, loss_fn),
        functools.partial(relearn_time, level=1.0),
    ],
)
def test_a_class_of_losses_is_refused(measure):
    with pytest.raises(TypeError, match=r"got the class MSELoss: pass an instance, MSELoss\(\)"):
        measure(mlp(), samples(), nn.MSELoss)


def test_accuracy_by_kind():
    z = logits(classes=1)
    x = torch.arange(len(z))
    y = x % 2
    share = ((z[:, 0] > 0) == (y == 1)).double().mean().item()
    bce = F.binary_cross_entropy_with_logits
    single = table(z)[0]
    assert accuracy(single, (x, y[:, None].double()), bce) == pytest.approx(share)
    flat = nn.Sequential(single, nn.Flatten(0))
    assert accuracy(flat, (x, y.double()), bce) == pytest.approx(share)
    # regression on 0 and 1, probabilities, several labels at once
    assert accuracy(single, (x, y[:, None].double()), nn.MSELoss()) is None
    probabilities = nn.Sequential(single, nn.Sigmoid())
    assert accuracy(probabilities, (x, y[:, None].double()), nn.BCELoss()) is None
    assert accuracy(table(logits())[0], (x, torch.ones(30, 5, dtype=DOUBLE)), bce) is None
    model, data = table(logits())
    expected = (logits().argmax(1) == data[1]).double().mean().item()
    assert accuracy(model, data, F.cross_entropy, batch_size=4) == pytest.approx(expected)
    one_hot = F.one_hot(data[1], logits().shape[1]).double()
    for labels in (one_hot, 0.9 * one_hot + 0.1 / one_hot.shape[1]):  # probabilities of classes
        assert accuracy(model, (data[0], labels), F.cross_entropy) == pytest.approx(expected)
        assert accuracy(model, (data[0], labels), F.mse_loss) is None


def test_score_must_be_one_number_a_sample():
    with pytest.raises(ValueError, match=r"score must return one number per sample.*\(50,\)"):
        accuracy(mlp(), samples(), F.cross_entropy, score=lambda o, t: o)


# ---------------------------------------------------------------------------------------------
# Membership inference


def test_modified_entropy_by_its_definition():
    p = softmax(logits().numpy(), axis=1)
    y = np.arange(len(p)) % p.shape[1]
    expected = []
    for row, right in zip(p, y, strict=True):
        value = -(1 - row[right]) * np.log(row[right])
        value -= sum(row[i] * np.log(1 - row[i]) for i in range(len(row)) if i != right)
        expected.append(value)
    found = modified_entropy(torch.tensor(np.log(p)), torch.tensor(y))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_modified_entropy_of_two_classes_stays_exact():
    gaps = np.array([-500.0, -40.0, -1.0, 0.0, 1.0, 40.0, 300.0])
    z = torch.tensor(np.stack([gaps, 0 * gaps], 1))
    found = modified_entropy(z.log_softmax(1), torch.zeros(len(gaps), dtype=torch.long))
    np.testing.assert_allclose(found.numpy(), -2 * expit(-gaps) * log_expit(gaps), rtol=1e-10)
    assert (found.diff() < 0).all()


@pytest.mark.parametrize("levels", [3, 10_000])
def test_roc_auc_is_the_share_of_pairs_in_order(levels, rng):
    a, b = rng.integers(0, levels, 70) / 7, rng.integers(0, levels, 40) / 7 - 0.2
    pairs = a[:, None] - b
    expected = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert roc_auc(a, b) == pytest.approx(expected, rel=1e-12)
    assert roc_auc(torch.tensor(b), torch.tensor(a)) == pytest.approx(1 - expected)
    assert roc_auc(np.ones(5), np.ones(3)) == 0.5
    assert roc_auc([2.0], [1.0]) == 1.0
    for bad in ([], [np.nan]):
        with pytest.raises(ValueError, match="negatives must be finite"):
            roc_auc([1.0], bad)


@given(
    st.integers(1, 300), st.integers(1, 40), st.integers(0, 99), st.randoms(use_true_random=False)
)
def test_tpr_at_fpr_is_the_best_threshold_that_is_allowed(m, n, percent, rng):
    negatives = np.array([rng.randrange(30) for _ in range(m)])
    positives = np.array([rng.randrange(30) for _ in range(n)])
    expected = max(
        (positives > t).mean()
        for t in range(-1, 31)
        if (negatives > t).sum() * 100 <= percent * m  # in whole numbers
    )
    assert tpr_at_fpr(positives, negatives, percent / 100) == expected


def test_tpr_at_fpr_by_hand():
    negatives = np.arange(200)
    assert tpr_at_fpr([500, 198, 197, -1], negatives) == 0.5  # above 197: two of 200
    assert tpr_at_fpr([500, 199, 198], negatives, 0.0) == 1 / 3
    assert tpr_at_fpr(negatives, negatives) == 0.01
    with pytest.raises(ValueError, match="fpr must be from 0 to below 1; got 1"):
        tpr_at_fpr([1], [0], 1)
    with pytest.raises(ValueError, match="negatives must be finite numbers, at least one; got 0"):
        tpr_at_fpr([1], [])


def test_tug_of_war():
    ours = {"accuracy_forget": 0.5, "accuracy_retain": 1.0, "accuracy_test": 0.9}
    theirs = {"accuracy_forget": 0.25, "accuracy_retain": 0.9, "accuracy_test": 0.95}
    assert tug_of_war(ours, ours) == 1
    assert tug_of_war(ours, theirs) == pytest.approx(0.75 * 0.9 * 0.95)
    assert tug_of_war(ours, theirs) == tug_of_war(theirs, ours)
    assert tug_of_war(ours, {**theirs, "accuracy_test": None}) is None


def test_the_attack_needs_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    x, y = samples(40)
    sets = [(x[a:b], y[a:b]) for a, b in ((0, 9), (9, 20), (20, 40))]
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install 'lcodec_ext\[eval"):
        membership_inference(mlp(), *sets, F.cross_entropy)


def fitted(x, y, epochs=300):
    model = mlp(n_in=20, width=200, classes=2, dtype=torch.float32)
    model[2].p = 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_membership_inference_tells_what_was_memorised():
    x, y = samples(600, n_in=20, classes=2, dtype=torch.float32)  # labels without a rule
    sets = [(x[a:b], y[a:b]) for a, b in ((0, 100), (100, 300), (300, 600))]
    memorised = membership_inference(fitted(x[:300], y[:300]), *sets, F.cross_entropy)
    assert memorised.auc > 0.9
    assert memorised.accuracy > 0.8
    assert memorised.calibration_accuracy > 0.8
    assert memorised.member_share > 0.9
    never_seen = membership_inference(fitted(x[100:300], y[100:300]), *sets, F.cross_entropy)
    assert abs(never_seen.auc - 0.5) < 0.1
    assert abs(never_seen.accuracy - 0.5) < 0.1
    assert never_seen.calibration_accuracy > 0.8
    assert (never_seen.n_calibration, never_seen.n_held_out) == (150, 150)


def test_the_attack_is_on_held_out_samples_and_not_tuned_on_the_removed():
    model, (x, y) = mlp(), samples(90)
    forget, other, retain, test = ((x[k::4], y[k::4]) for k in range(4))
    found = membership_inference(model, forget, retain, test, F.cross_entropy, seed=3)
    again = membership_inference(model, other, retain, test, F.cross_entropy, seed=3)
    assert found.calibration_accuracy == again.calibration_accuracy
    assert found.auc != again.auc
    assert found == membership_inference(model, forget, retain, test, F.cross_entropy, seed=3)
    # The AUC, by hand: the held-out half is what the seed leaves.
    held_out = np.sort(np.random.default_rng(3).permutation(len(test[0]))[len(test[0]) // 2 :])
    removed, seen = (sample_losses(model, each, F.cross_entropy).numpy() for each in (forget, test))
    labels = np.repeat([1, 0], [len(removed), len(held_out)])
    expected = roc_auc_score(labels, -np.concatenate([removed, seen[held_out]]))
    assert found.auc == found.auc_by_feature["loss"] == pytest.approx(expected)
    # Confidence orders as cross-entropy does.
    assert found.auc_by_feature["confidence"] == pytest.approx(expected)
    assert set(found.auc_by_feature) == {"loss", "modified_entropy", "confidence", "calibrated"}


def test_models_that_treat_all_samples_alike_reveal_nothing():
    model = mlp()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    x, y = samples(40)
    found = membership_inference(
        model, (x[:9], y[:9]), (x[9:20], y[9:20]), (x[20:], y[20:]), F.cross_entropy
    )
    assert found.auc == found.accuracy == found.member_share == 0.5


def test_membership_inference_without_classes_uses_the_loss():
    model, (x, _) = nn.Linear(4, 1).double(), samples(40)
    target = x.sum(1, keepdim=True)
    parts = [(x[a:b], target[a:b]) for a, b in ((0, 10), (10, 20), (20, 40))]
    found = membership_inference(model, *parts, F.mse_loss)
    assert set(found.auc_by_feature) == {"loss", "calibrated"}
    with pytest.raises(ValueError, match="test must have at least 4 samples.*got 3"):
        membership_inference(model, parts[0], parts[1], (x[:3], target[:3]), F.mse_loss)


# ---------------------------------------------------------------------------------------------
# Relearning


def test_relearn_time_counts_the_steps_of_adam():
    model, (x, y) = mlp(), samples(20)
    by_hand = mlp().eval()
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(by_hand(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = {"learning_rate": 0.01, "max_steps": 30}
    assert losses[12] < losses[11]
    for batch_size in (6, 256):
        level = losses[12] + 1e-9
        found = relearn_time(
            model, (x, y), F.cross_entropy, level, batch_size=batch_size, **options
        )
        assert (found.steps, found.reached) == (12, True)
        assert found.seconds > 0
    start = relearn_time(model, (x, y), F.cross_entropy, losses[0] + 1e-9)
    assert (start.steps, start.reached) == (0, True)
    capped = relearn_time(model, (x, y), F.cross_entropy, -1.0, max_steps=7)
    assert (capped.steps, capped.reached) == (7, False)


# ---------------------------------------------------------------------------------------------
# What must be left alone, and what is refused

DATA = samples()
MEASURES = {
    "accuracy": lambda m: accuracy(m, DATA, F.cross_entropy),
    "sample_losses": lambda m: sample_losses(m, DATA, F.cross_entropy).tolist(),
    "js_distance": lambda m: js_distance(m, mlp(1), DATA),
    "activation_distance": lambda m: activation_distance(m, mlp(1), DATA),
    "gradient_norm": lambda m: gradient_norm(m, DATA, F.cross_entropy),
    "membership_inference": lambda m: membership_inference(m, DATA, DATA, DATA, F.cross_entropy),
    "relearn_time": lambda m: relearn_time(m, DATA, F.cross_entropy, 0.0, max_steps=3).steps,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_models_are_left_as_they_were(measure):
    model = mlp().train()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    found = measure(model)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    with torch.inference_mode(), torch.autocast("cpu"):  # the caller's modes change nothing
        assert measure(model) == found


def test_arguments_are_checked():
    x, y = samples()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got function"):
        accuracy(mlp, (x, y), F.cross_entropy)
    with pytest.raises(TypeError, match="data must be a pair"):
        accuracy(mlp(), x, F.cross_entropy)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1; got 0"):
        accuracy(mlp(), (x, y), F.cross_entropy, batch_size=0)
    with pytest.raises(ValueError, match="weight_decay must be"):
        gradient_norm(mlp(), (x, y), F.cross_entropy, weight_decay=-1)
    with pytest.raises(TypeError, match="relative must be True or False"):
        weight_distance(mlp(), mlp(), relative=1)
    with pytest.raises(ValueError, match="the model has no floating-point parameter"):
        accuracy(nn.Tanh(), (x, y), F.cross_entropy)
    with pytest.raises(TypeError, match="max_steps must be an integer"):
        relearn_time(mlp(), (x, y), F.cross_entropy, 0.0, max_steps=0.5)


@pytest.mark.parametrize("n", [(8, 3, 6), (8, 3, 24), (8, 4, 18)])
def test_attack_on_a_model_that_tells_no_samples_apart(n):
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    sets = [(torch.randn(size, 2), torch.zeros(size, dtype=torch.int64)) for size in n]
    found = membership_inference(model, *sets, F.cross_entropy)
    assert found.auc == 0.5
    assert found.accuracy == pytest.approx(0.5)
