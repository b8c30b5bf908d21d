"""Weight decay: of parameters that nothing uses, and of groups of parameters."""

import copy
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from lcodec_ext._torch.loss import objective
from lcodec_ext._torch.samples import as_samples
from lcodec_ext.curvature import (
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ParameterSelection,
    SecantOperator,
    UnitSelection,
)
from lcodec_ext.evaluation import evaluate, evaluate_population, literature, methods
from lcodec_ext.evaluation.methods import Baseline, fine_tune, lbfgs
from lcodec_ext.evaluation.tune import tune
from lcodec_ext.unlearning import (
    Settings,
    TrainingStatistics,
    Unlearner,
    estimate,
    unlearn,
    verify_ledger,
)

N, M, D = 60, 6, 4
PLAIN = {"damping": 0.0, "output_damping": 0.0, "n_curvature": None, "calibrate": False}
EXACT = {**PLAIN, "dtype": torch.float64, "max_iterations": None, "rtol": None}
STEP = {**EXACT, "max_drop": None, "repair_epochs": 0, "repair_drop": None, "lengthen": None}
STEP |= {"n_recalibrate": None, "halvings": 0, "retries": 0}


def data(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64) + 2
    y = (x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=torch.float64)) + 5
    return x, y + 0.1 * torch.randn(n, 1, generator=generator, dtype=torch.float64)


def parts(x, y, m=M):
    return (x[:m], y[:m]), (x[m:], y[m:])


# ---------------------------------------------------------------------------------------------
# What nothing uses


class Parts(nn.Module):
    """A network with a head, a table's row, a unit and a factor that no sample uses."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)  # rows 0 to 4 are used
        self.hidden = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)
        self.other = nn.Linear(6, 2)
        self.factor = nn.Parameter(torch.tensor([1.5]))
        with torch.no_grad():
            self.hidden.bias[2] = -100.0  # a dead unit

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.table(tokens).mean(1))))


def tokens(n=N):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 5, (n, 9), generator=generator), torch.arange(n) % 3


@pytest.mark.parametrize("curvature", ["gauss_newton", "fisher"])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("n", [N, 400])
def test_what_nothing_uses_stays(curvature, damping, n):
    torch.manual_seed(0)
    model = Parts()
    forget, retain = parts(*tokens(n), n // 10)
    options = {**STEP, "weight_decay": 0.1, "damping": damping, "n_monitor": 50}
    result = unlearn(model, forget, retain, cross_entropy, **{**options, "curvature": curvature})
    old, new = (dict(each.named_parameters()) for each in (model, result.model))
    for name in ("other.weight", "other.bias", "factor"):
        assert torch.equal(old[name], new[name]), name
    assert torch.equal(old["table.weight"][5:], new["table.weight"][5:])
    assert torch.equal(old["hidden.weight"][2], new["hidden.weight"][2])
    for name in ("table.weight", "hidden.weight", "head.weight", "head.bias"):
        assert not torch.equal(old[name], new[name]), name


@pytest.mark.parametrize("steps", [{"steps": 2}, {"gradient": "residual"}, {"update": "gradient"}])
def test_what_nothing_uses_stays_in_every_kind_of_step(steps):
    torch.manual_seed(0)
    model, options = Parts(), {**STEP, "weight_decay": 0.1, **steps}
    if "update" in steps:
        options.pop("rtol")
    result = unlearn(model, *parts(*tokens()), cross_entropy, **options)
    assert torch.equal(model.other.weight, result.model.other.weight)
    assert torch.equal(model.table.weight[5:], result.model.table.weight[5:])


def test_a_repair_leaves_what_nothing_uses():
    torch.manual_seed(0)
    model = Parts()
    options = {**STEP, "repair_epochs": 2, "weight_decay": 0.1, "repair_learning_rate": 0.01}
    result = unlearn(model, *parts(*tokens()), cross_entropy, **options)
    assert torch.equal(model.other.weight, result.model.other.weight)
    assert torch.equal(model.factor, result.model.factor)
    assert not torch.equal(model.head.weight, result.model.head.weight)


class TwoHeads(nn.Module):
    """Each sample uses the head that it names."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(D, 1, bias=False) for _ in range(3))

    def forward(self, x, which):
        out = x.new_zeros(len(x), 1)
        for k, head in enumerate(self.heads):
            rows = which == k
            if rows.any():
                out = out.index_put((rows.nonzero()[:, 0],), head(x[rows]))
        return out


def test_what_only_retained_samples_use_has_its_regulariser():
    """A Newton step to the retained optimum, from where training converged."""
    x, y = data()
    which = (torch.arange(N) >= M).long()  # the removed samples use head 0, the others head 1
    decay = 0.3

    def trained(rows):
        model = TwoHeads().double()
        with torch.no_grad():
            for k, head in enumerate(model.heads):
                own = x[rows][which[rows] == k], y[rows][which[rows] == k]
                n = len(x[rows])
                matrix = 2 * own[0].T @ own[0] / n + decay * torch.eye(D, dtype=x.dtype)
                head.weight.copy_(torch.linalg.solve(matrix, 2 * own[0].T @ own[1] / n).T)
        return model

    model, wanted = trained(slice(None)), trained(slice(M, None))
    forget, retain = (x[:M], which[:M], y[:M]), (x[M:], which[M:], y[M:])
    result = unlearn(model, forget, retain, mse_loss, weight_decay=decay, **STEP)
    for new, old in zip(result.model.heads[1:], wanted.heads[1:], strict=True):
        torch.testing.assert_close(new.weight, old.weight, rtol=1e-8, atol=1e-10)


def test_statistics_tell_what_is_used():
    """A head that only the retained samples use, without the retained samples."""
    torch.manual_seed(0)
    x, y = data()
    which = (torch.arange(N) >= M).long()
    model = TwoHeads().double()
    forget = x[:M], which[:M], y[:M]
    statistics = TrainingStatistics.collect(model, (x, which, y), mse_loss)
    options = {**STEP, "weight_decay": 0.3}
    result = unlearn(model, forget, None, mse_loss, statistics=statistics, **options)
    assert not torch.equal(model.heads[1].weight, result.model.heads[1].weight)
    assert torch.equal(model.heads[2].weight, result.model.heads[2].weight)


# ---------------------------------------------------------------------------------------------
# Groups of parameters


def ridge(x, y, decay):
    """The minimum of the mean square plus (decay / 2) |w|^2, with a free intercept."""
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    penalty = torch.diag(torch.tensor([decay] * D + [0.0], dtype=x.dtype))
    found = torch.linalg.solve(2 * rows.T @ rows / len(x) + penalty, 2 * rows.T @ y / len(x))
    model = nn.Linear(D, 1).double()
    with torch.no_grad():
        model.weight.copy_(found[:D].T)
        model.bias.copy_(found[D])
    return model


def groups(model, decay):
    return torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.ndim < 2]},
        ],
        lr=0.1,
    )


@pytest.mark.parametrize("kind", ["optimizer", "names"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_ridge_with_a_free_intercept(kind, curvature):
    x, y = data()
    model, wanted = ridge(x, y, 0.5), ridge(x[M:], y[M:], 0.5)
    decay = groups(model, 0.5) if kind == "optimizer" else {"weight": 0.5}
    options = {**STEP, "curvature": curvature, "weight_decay": decay}
    result = unlearn(model, *parts(x, y), mse_loss, **options)
    for new, old in zip(result.model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-10)
    assert result.settings.weight_decay == {"weight": 0.5, "bias": 0.0}
    with_one = unlearn(model, *parts(x, y), mse_loss, **{**options, "weight_decay": 0.5})
    assert (with_one.model.bias - wanted.bias).abs() > 0.01


def test_an_optimizer_of_one_group_is_its_number():
    x, y = data()
    model = ridge(x, y, 0.5)
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.5)
    results = [
        unlearn(model, *parts(x, y), mse_loss, weight_decay=decay, **STEP)
        for decay in (0.5, optimizer)
    ]
    assert results[1].settings.weight_decay == 0.5
    assert torch.equal(*(each.model.weight for each in results))


def test_decoupled_decay_is_told_of():
    """AdamW decays weights outside of the objective: its number is an approximation here."""
    model = nn.Linear(3, 2)
    data = torch.randn(20, 3, generator=torch.manual_seed(0)), torch.arange(20) % 2
    sets = tuple(t[:2] for t in data), tuple(t[2:] for t in data)

    def told(weight_decay):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            result = unlearn(model, *sets, cross_entropy, damping=0.1, weight_decay=weight_decay)
        assert all(each.filename == __file__ for each in found)
        return result.settings.weight_decay, [str(each.message) for each in found]

    decay, (message,) = told(torch.optim.AdamW(model.parameters(), weight_decay=0.02))
    assert decay == 0.02
    assert message.startswith("AdamW decays weights apart from the loss")
    assert "Its weight_decay 0.02 is taken as that of an L2 penalty" in message
    assert told(0.02) == (0.02, [])
    assert told(torch.optim.AdamW(model.parameters(), weight_decay=0.0)) == (0.0, [])
    assert told(torch.optim.Adam(model.parameters(), weight_decay=0.02)) == (0.02, [])


def test_statistics_take_groups():
    x, y = data()
    model, wanted = ridge(x, y, 0.5), ridge(x[M:], y[M:], 0.5)
    statistics = TrainingStatistics.collect(model, (x, y), mse_loss)
    options = {**STEP, "weight_decay": groups(model, 0.5), "statistics": statistics}
    result = unlearn(model, (x[:M], y[:M]), None, mse_loss, **options)
    torch.testing.assert_close(result.model.bias, wanted.bias, rtol=1e-9, atol=1e-10)


def test_a_stream_keeps_the_groups(tmp_path):
    x, y = data()
    model, wanted = ridge(x, y, 0.5), ridge(x[M:], y[M:], 0.5)
    options = {**STEP, "weight_decay": groups(model, 0.5)}
    with Unlearner(model, (x, y), mse_loss, directory=tmp_path, **options) as stream:
        stream.remove([0, 1])
    with Unlearner.resume(tmp_path, model, (x, y), mse_loss) as stream:
        assert stream.settings.weight_decay == {"weight": 0.5, "bias": 0.0}
        stream.estimate(range(2, M))
        stream.remove(range(2, M))
        torch.testing.assert_close(stream.model.weight, wanted.weight, rtol=1e-8, atol=1e-9)
        assert verify_ledger(tmp_path, stream.model, (x, y)).ok


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(0)
    return model, (torch.randn(N, D, generator=generator), torch.arange(N) % 3)


@pytest.mark.parametrize("selection", ["units", "parameters"])
@pytest.mark.parametrize("operator", [HessianOperator, GaussNewtonOperator, FisherOperator])
def test_operators_add_each_parameters_own(operator, selection):
    model, samples = network()
    chosen = (
        UnitSelection({"0": [1, 3], "2": [0]})
        if selection == "units"
        else ParameterSelection({"0.weight": [1, 7], "2.bias": [0, 2]})
    )
    decay = groups(model, 0.5)
    made, plain = (
        operator(model, cross_entropy, samples, chosen, weight_decay=each, damping=0.1)
        for each in (decay, 0.0)
    )
    own = {k: torch.full_like(p, 0.5 * (p.ndim > 1)) for k, p in model.named_parameters()}
    diagonal = chosen.gather(own, model=model)
    wanted = plain.to_dense() + torch.diag(diagonal)
    torch.testing.assert_close(made.to_dense(), wanted)
    torch.testing.assert_close(made.diagonal(), wanted.diagonal())
    V = torch.randn(len(wanted), 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made @ V, wanted @ V, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((2 * made - plain) @ V, (wanted + torch.diag(diagonal)) @ V)
    if operator is not HessianOperator:
        for method in ("auto", "cg", "cholesky"):
            found = made.solve(wanted @ V, method=method)
            torch.testing.assert_close(found.x, V, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="one number on the diagonal"):
        made.solve(V, method="woodbury")


def test_secant_and_restricted_operators_add_each_parameters_own():
    model, samples = network()
    chosen, decay = UnitSelection.all(model), groups(model, 0.5)
    steps = torch.randn(chosen.size(model), generator=torch.Generator().manual_seed(3))
    options = {"steps": 0.01 * steps}
    made, plain = (
        SecantOperator(model, cross_entropy, samples, chosen, weight_decay=each, **options)
        for each in (decay, 0.0)
    )
    own = {k: torch.full_like(p, 0.5 * (p.ndim > 1)) for k, p in model.named_parameters()}
    added = torch.diag(chosen.gather(own, model=model))
    torch.testing.assert_close(made.to_dense(), plain.to_dense() + added)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    chosen, some = UnitSelection.all(model), UnitSelection({"0": [0, 2], "3": [1]})
    made, plain = (
        FisherOperator(
            model, cross_entropy, (samples[0][:, None], samples[1]), chosen, weight_decay=each
        ).restrict(some)
        for each in (groups(model, 0.5), 0.0)
    )
    own = {k: torch.full_like(p, 0.5 * (p.ndim > 1)) for k, p in model.named_parameters()}
    added = torch.diag(some.gather(own, model=model))
    torch.testing.assert_close(made.to_dense(), plain.to_dense() + added)


def test_what_cannot_be_a_weight_decay():
    x, y = data()
    model = ridge(x, y, 0.5)
    other = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1, weight_decay=0.1)
    tests = [
        (other, ValueError, "optimizer of other parameters than the model's"),
        ({"wieght": 0.1}, ValueError, "'wieght', which the model does not have; is it 'weight'"),
        ({"weight": -1.0}, ValueError, r"weight_decay\['weight'\] must be a finite number >= 0"),
        ("0.1", TypeError, "weight_decay must be a number >= 0"),
    ]
    for given, kind, message in tests:
        for call in (unlearn, estimate):
            with pytest.raises(kind, match=message):
                call(model, *parts(x, y), mse_loss, weight_decay=given)
        with pytest.raises(kind, match=message):
            HessianOperator(model, mse_loss, (x, y), UnitSelection.all(model), weight_decay=given)
    with pytest.raises(
        TypeError, match="to `unlearn`, `Unlearner` or `estimate` weight_decay=optimizer"
    ):
        Settings.preset("recommended", weight_decay=groups(model, 0.5))
    options = {"update": "certified", "epsilon": 1.0, "delta": 1e-5, "lipschitz": 1.0}
    with pytest.raises(ValueError, match="one number for all parameters|strongly convex"):
        unlearn(model, *parts(x, y), mse_loss, weight_decay={"weight": 0.5}, **options)


def test_certified_says_which_weight_decay_was_given():
    with pytest.raises(ValueError, match="got weight_decay=0 to 0.1 by parameter, of which the le"):
        unlearn(
            nn.Linear(D, 1),
            *parts(*(t.float() for t in data())),
            nn.MSELoss(),
            weight_decay={"weight": 0.1},
            update="certified",
            epsilon=1.0,
            delta=1e-5,
        )


def test_names_of_a_compiled_models_parameters():
    model = nn.Linear(D, 1)
    compiled = torch.compile(model, backend="eager")
    samples = parts(*(t.float() for t in data()))
    settings = [
        unlearn(each, *samples, nn.MSELoss(), **STEP | {"dtype": None}, weight_decay={key: 0.1})
        for each, key in ((compiled, "weight"), (compiled, "_orig_mod.weight"), (model, "weight"))
    ]
    assert torch.equal(settings[0].model.weight, settings[1].model.weight)
    torch.testing.assert_close(settings[0].model.weight, settings[2].model.weight)


def test_an_objective_leaves_out_what_nothing_uses_whatever_the_decay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 1))
    model.unused = nn.Linear(3, 3)
    model.forward = types.MethodType(lambda self, x: self[0](x), model)
    samples = as_samples(
        tuple(t.float() for t in data()), "data", torch.device("cpu"), torch.float32
    )
    names = [name for name, _ in model.named_parameters()]
    with torch.enable_grad():
        (_, one), (_, each) = (
            objective(model, samples, mse_loss, decay, 16)
            for decay in (0.1, dict.fromkeys(names, 0.1))
        )
    for name, a, b in zip(names, one, each, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.any()) != name.startswith("unused")


def test_an_evaluation_takes_an_optimizer():
    """Its baselines decay each group as training did; its gradient norm is of that objective."""
    x, y = data()
    models = [ridge(x, y, 0.5), *(ridge(x[M:], y[M:], 0.5) for _ in range(3))]
    model = models[0]
    with torch.no_grad():
        for k, each in enumerate(models[1:]):
            each.weight.add_(1e-7 * k)
    found = evaluate(
        model,
        *parts(x, y),
        test=data(seed=5),
        loss_fn=mse_loss,
        retrained=models[1:],
        methods={"lbfgs": Baseline(lbfgs, {"iterations": 40}), "step": STEP},
        weight_decay=groups(model, 0.5),
    )
    assert found.settings["weight_decay"] == {"weight": 0.5, "bias": 0.0}
    norms = {each.name: each.metrics["gradient_norm"] for each in found.methods}
    assert norms["retrained"] < 1e-4
    assert norms["step"] < 1e-9
    assert norms["lbfgs"] < 1e-4 * norms["no-op"]
    tuned = fine_tune(
        model,
        None,
        (x[M:], y[M:]),
        mse_loss,
        learning_rate=0.02,
        epochs=400,
        batch_size=N,
        weight_decay={"weight": 0.5},
    )
    torch.testing.assert_close(tuned.bias, models[1].bias, rtol=1e-3, atol=1e-3)


RUNS = {
    **{name: getattr(methods, name) for name in ("fine_tune", "gradient_ascent", "neg_grad_plus")},
    "lbfgs": lbfgs,
    **{name: getattr(literature, name) for name in ("scrub", "selective_dampening", "salun")},
    **{name: getattr(literature, name) for name in ("random_labels", "bad_teacher", "cf_k")},
    **{name: getattr(literature, name) for name in ("eu_k", "l1_sparse")},
}


@pytest.mark.parametrize("name", RUNS)
def test_baselines_take_the_weight_decay_in_every_form(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = data()[0].float(), torch.arange(N) % 3
    optimizer = groups(model, 0.5)
    named = {"0.weight": 0.5, "2.weight": 0.5}
    found = [
        RUNS[name](model, *parts(x, y), cross_entropy, 1, weight_decay=each).state_dict()
        for each in (optimizer, named, 0.0)
    ]
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    changed = any(not torch.equal(found[0][key], found[2][key]) for key in found[0])
    assert changed == (name != "selective_dampening")  # trains nothing
    with pytest.raises(ValueError, match="'0.wieght', which the model does not have; is it '0.we"):
        RUNS[name](model, *parts(x, y), cross_entropy, weight_decay={"0.wieght": 0.5})
    other = groups(copy.deepcopy(model), 0.5)
    with pytest.raises(ValueError, match="optimizer of other parameters than the model's"):
        RUNS[name](model, *parts(x, y), cross_entropy, weight_decay=other)


def test_methods_of_an_evaluation_have_optimizers_of_their_own():
    x, y = data()
    model = ridge(x, y, 0.5)
    own = {"weight_decay": groups(model, 0.5)}
    found = evaluate(
        model,
        *parts(x, y),
        test=data(seed=5),
        loss_fn=mse_loss,
        retrained=[ridge(x[M:], y[M:], 0.5)],
        methods={"lbfgs": Baseline(lbfgs, {"iterations": 40, **own}), "step": {**STEP, **own}},
        weight_decay=groups(model, 0.5),
    )
    for each in found.methods[2:]:
        used = found.settings["methods"][each.name]
        assert used["weight_decay"] == {"weight": 0.5, "bias": 0.0}
        assert each.metrics["gradient_norm"] < 1e-4


def test_where_models_are_made_the_weight_decay_has_names():
    x, y = data()

    def train(part, seed):
        return ridge(*part, 0.5)

    decay = {"weight": 0.5}
    named = evaluate_population(
        train, ["L-BFGS"], (x, y), range(M), data(seed=5), mse_loss, n_models=4, draws=2,
        weight_decay=decay,
    )  # fmt: skip
    assert named.settings["weight_decay"] == decay
    tuned = tune(train, (x, y), M, mse_loss, methods=["L-BFGS"], n_settings=1, weight_decay=decay)
    assert tuned.settings["weight_decay"] == decay
    optimizer = groups(ridge(x, y, 0.5), 0.5)
    for call in (
        lambda: evaluate_population(
            train, ["L-BFGS"], (x, y), [0], (x, y), mse_loss, weight_decay=optimizer
        ),
        lambda: tune(train, (x, y), M, mse_loss, weight_decay=optimizer),
    ):
        with pytest.raises(TypeError, match="its model is not known here: pass the numbers by"):
            call()
