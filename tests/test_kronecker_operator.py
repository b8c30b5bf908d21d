"""What the EK-FAC operator does: solve, draw, subtract, restrict, refuse."""

import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lcodec_ext.curvature import (
    EKFACOperator,
    FisherOperator,
    GaussNewtonOperator,
    IndefiniteCurvatureError,
    KroneckerFactors,
    ParameterSelection,
    UnitSelection,
    all_trainable,
)
from lcodec_ext.curvature.kronecker import KroneckerOperator, draws, passes

N = 20
double = torch.float64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp(*, outputs=3):
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, outputs)
    ).double()


def samples(n=N, classes=3):
    return torch.randn(n, 5, dtype=double), torch.randint(0, classes, (n,))


def same(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------
# Where it is exact


def test_it_is_the_gauss_newton_matrix_of_a_linear_model_with_squared_error():
    """A (x) 2/C I has no other approximation in it."""
    model = nn.Linear(5, 3).double()
    data = torch.randn(N, 5, dtype=double), torch.randn(N, 3, dtype=double)
    for selection in (UnitSelection.all(model), UnitSelection({"": [0, 2]})):
        exact = GaussNewtonOperator(model, F.mse_loss, data, selection, damping=0.1)
        operator = EKFACOperator(model, F.mse_loss, data, selection, damping=0.1)
        same(operator.to_dense(), exact.to_dense(), 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", "smoothed", "soft", "positions", "bce", "mse", "huber", "weighted"],
)
def test_square_roots_of_the_outputs_hessian(loss, reduction):
    """The diagonal of any block is that of Gauss-Newton: of a norm, where there is no basis."""
    X, y = samples()
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)).double()
    made = {
        "cross_entropy": (F.cross_entropy, torch.randint(0, 6, (N,))),
        "smoothed": (functools.partial(F.cross_entropy, label_smoothing=0.2), y),
        "soft": (F.cross_entropy, torch.rand(N, 6, dtype=double).softmax(1)),
        "positions": (F.cross_entropy, torch.randint(0, 3, (N, 2))),
        "bce": (F.binary_cross_entropy_with_logits, torch.rand(N, 6, dtype=double)),
        "mse": (F.mse_loss, torch.randn(N, 6, dtype=double)),
        "huber": (functools.partial(F.huber_loss, delta=2.0), torch.randn(N, 6, dtype=double)),
        "weighted": (lambda z, t, reduction: own_weights(z, t, reduction), y),
    }
    loss_fn, targets = made[loss]
    loss_fn = functools.partial(loss_fn, reduction=reduction)
    if loss == "positions":
        model = nn.Sequential(model, nn.Unflatten(1, (3, 2)))
    names = ["1", "0.1"]
    selection = UnitSelection({names[loss == "positions"]: range(6)})
    options = {"reduction": reduction}
    exact = GaussNewtonOperator(model, loss_fn, (X, targets), selection, **options)
    operator = EKFACOperator(model, loss_fn, (X, targets), selection, **options)
    same(operator.diagonal(), exact.to_dense().diagonal())


def own_weights(z, y, reduction):
    each = F.cross_entropy(z, y, reduction="none") * (1 + y)
    return each.mean() if reduction == "mean" else each.sum()


# ---------------------------------------------------------------------------------------------
# Solving


@pytest.mark.parametrize("columns", [(), (3,)])
def test_solves_in_closed_form(columns):
    model, data = mlp(), samples()
    operator = EKFACOperator(model, F.cross_entropy, data, UnitSelection.all(model), damping=0.01)
    dense = operator.to_dense()
    b = torch.randn(len(dense), *columns, dtype=double)
    result = operator.solve(b)
    assert result.method == "ekfac"
    assert result.residual < 1e-12
    same(dense @ result.x, b)
    same(operator @ b, dense @ b)
    more = operator.solve_shifted(b, 0.5)
    same(dense @ more + 0.5 * more, b)
    if not columns:  # one vector, for several shifts
        parts = operator.coordinates(b)
        assert torch.equal(operator.solve_coordinates(parts, 0.5), more)
        assert torch.equal(operator.solve_coordinates(parts), operator.solve_shifted(b))
    assert operator.solve(b, method="cg").method == "cg"
    same(operator.solve(b, method="cg").x, result.x, 1e-6)
    assert operator.solve(torch.zeros_like(b)).residual == 0


def test_weight_decay_that_differs_adds_its_diagonal_in_the_basis():
    model, data = mlp(), samples()
    selection = UnitSelection({"0": [1, 4], "3": [0, 2]})
    plain = EKFACOperator(model, F.cross_entropy, data, selection)
    by_layer = {"0.weight": 0.3, "0.bias": 0.3, "3.weight": 0.1, "3.bias": 0.1}
    operator = EKFACOperator(model, F.cross_entropy, data, selection, weight_decay=by_layer)
    decay = torch.tensor([0.3] * 12 + [0.1] * 16, dtype=double)
    same(operator.to_dense(), plain.to_dense() + decay.diag())  # constant in each block: exact
    weights = {"0.weight": 0.3, "3.weight": 0.1}
    operator = EKFACOperator(model, F.cross_entropy, data, selection, weight_decay=weights)
    decay[[5, 11, 19, 27]] = 0
    added = operator.to_dense() - plain.to_dense()
    assert abs(added.trace() - decay.sum()) < 1e-12
    for block in operator.factors.blocks:
        place = block.places.numbers(torch.device("cpu")).flatten()
        Q = torch.kron(block.rows, block.columns)
        expected = Q @ (Q.T @ decay[place].diag() @ Q).diagonal().diag() @ Q.T
        same(added[place][:, place], expected)
    b = torch.randn(28, dtype=double)
    assert operator.solve(b).residual < 1e-9
    assert operator.least == plain.least


def test_a_singular_matrix_is_refused():
    model, data = mlp(), samples(4)
    operator = EKFACOperator(model, F.cross_entropy, data, UnitSelection.all(model))
    b = torch.ones(operator.shape[0], dtype=double)
    with pytest.raises(IndefiniteCurvatureError, match="singular within rounding.*more damping"):
        operator.solve(b)
    assert torch.isfinite(operator.solve_shifted(b, 1e-3)).all()


def test_sums_with_other_operators():
    model, data = mlp(), samples()
    selection = UnitSelection({"0": [1, 4]})
    A = EKFACOperator(model, F.cross_entropy, data, selection, damping=0.1)
    B = GaussNewtonOperator(model, F.cross_entropy, data, selection, damping=0.2)
    same((2 * A + B).to_dense(), 2 * A.to_dense() + B.to_dense())


# ---------------------------------------------------------------------------------------------
# Random combinations of outputs


def many_outputs():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 24)).double()
    return model, samples(classes=24)


def test_combinations_have_the_square_root_in_the_mean():
    model, data = many_outputs()
    selection = UnitSelection({"0": [0, 3]})
    exact = GaussNewtonOperator(model, F.cross_entropy, data, selection)
    one = EKFACOperator(model, F.cross_entropy, data, selection)
    many = EKFACOperator(model, F.cross_entropy, data, selection, draws=64)
    assert one.factors.draws is None
    assert 0.01 < abs(one.trace() / exact.trace() - 1) < 0.5
    assert abs(many.trace() / exact.trace() - 1) < 0.03
    other = EKFACOperator(model, F.cross_entropy, data, selection, seed=1)
    assert other.trace() != one.trace()


def test_draws_are_functions_of_the_sample():
    model, (X, y) = many_outputs()
    selection = UnitSelection({"0": [0, 3], "2": [5]})
    whole = EKFACOperator(model, F.cross_entropy, (X, y), selection)
    order = torch.randperm(N)
    loader = DataLoader(TensorDataset(X[order], y[order]), 3)
    again = EKFACOperator(model, F.cross_entropy, loader, selection)
    same(again.to_dense(), whole.to_dense())


def test_draws_of_padded_texts():
    """What the attention mask leaves out does not count, nor do places after a sample's end."""
    ids, mask = torch.tensor([[5, 3, 9]]), torch.ones(1, 3, dtype=torch.int64)
    long, short = torch.tensor([[5, 3, 9, 7, 7]]), torch.tensor([[1, 1, 1, 0, 0]])

    def hashed(ids, mask, labels):
        batch = draws.Batch((), {"input_ids": ids, "attention_mask": mask}, labels, len(ids))
        return draws.content(batch)

    a = hashed(ids, mask, torch.tensor([1]))
    assert a == hashed(long, short, torch.tensor([1]))
    assert a != hashed(ids, mask, torch.tensor([0]))
    assert a != hashed(ids.flip(1), mask, torch.tensor([1]))
    first = draws.signs(a, torch.Size((1, 3, 50)), 0, 0, double)
    then = draws.signs(a, torch.Size((1, 5, 50)), 0, 0, double)
    assert torch.equal(first, then[:, :3])
    assert set(first.flatten().tolist()) == {1.0, -1.0}


def test_signs_are_fair_and_independent():
    hashes = torch.arange(400)
    one = draws.signs(hashes, torch.Size((400, 100)), 0, 0, double)
    for other in (
        one.roll(1, 0),
        one.roll(1, 1),
        draws.signs(hashes, torch.Size((400, 100)), 1, 0, double),
        draws.signs(hashes, torch.Size((400, 100)), 0, 1, double),
        torch.ones_like(one),
    ):
        assert abs((one * other).mean()) < 4 / 200


# ---------------------------------------------------------------------------------------------
# Factors: saved, subtracted, restricted


@pytest.mark.parametrize("kind", ["model", "empirical"])
def test_taking_samples_out(kind):
    model, (X, y) = many_outputs()
    selection = UnitSelection({"0": [0, 3, 5], "2": [5, 7]})
    options = {"kind": kind, "damping": 0.1}
    whole = EKFACOperator(model, F.cross_entropy, (X, y), selection, **options)
    basis = whole.factors
    removed = EKFACOperator(model, F.cross_entropy, (X[:6], y[:6]), selection, basis=basis)
    assert removed.kind == kind
    left = basis.minus(removed.factors)
    direct = EKFACOperator(model, F.cross_entropy, (X[6:], y[6:]), selection, basis=basis)
    assert left.n == direct.factors.n == 14
    for a, b in zip(left.blocks, direct.factors.blocks, strict=True):
        same(a.values, b.values, 1e-13)
        assert torch.equal(a.rows, b.rows)
    retained = KroneckerOperator(left, 1 / 14, shift=0.1)
    exact = {"model": GaussNewtonOperator, "empirical": FisherOperator}[kind]
    if kind == "empirical":
        trace = exact(model, F.cross_entropy, (X[6:], y[6:]), selection, damping=0.1).trace()
        assert abs(retained.trace() - trace) < 1e-12
    b = torch.randn(retained.shape[0], dtype=double)
    same(retained.to_dense() @ retained.solve(b).x, b)


def test_factors_of_another_basis_are_not_subtracted():
    model, (X, y) = mlp(), samples()
    made = functools.partial(EKFACOperator, model, F.cross_entropy)
    selection = UnitSelection({"0": [0, 3]})
    whole, part = made((X, y), selection), made((X[:5], y[:5]), selection)
    with pytest.raises(ValueError, match="basis=factors"):
        whole.factors.minus(part.factors)
    with pytest.raises(ValueError, match="other has 20 samples"):
        whole.factors.minus(whole.factors)
    drawn = made((X[:5], y[:5]), selection, seed=3)
    with pytest.raises(ValueError, match="the seed of these factors, 0; it has 3"):
        whole.factors.minus(drawn.factors)
    with pytest.raises(TypeError, match="KroneckerFactors"):
        whole.factors.minus(whole)
    with pytest.raises(ValueError, match="same model and selection"):
        made((X, y), UnitSelection({"0": [0]}), basis=whole.factors)
    with pytest.raises(TypeError, match="basis must be KroneckerFactors"):
        made((X, y), selection, basis=whole)


def numbers(model, selection, whole):
    return selection.layout(model).numbers_in(whole.layout(model))


def test_fewer_rows_of_saved_factors():
    model, data = mlp(), samples()
    whole = UnitSelection.all(model)
    part = UnitSelection({"0": [1, 4, 6], "2": [0, 2], "3": [0, 2]})
    factors = EKFACOperator(model, F.cross_entropy, data, whole).factors
    fewer = factors.restrict(numbers(model, part, whole))
    saved = KroneckerOperator(fewer, 1 / N)
    direct = EKFACOperator(model, F.cross_entropy, data, part)
    assert saved.shape == direct.shape
    # the basis is that of the rows, and eigenvalues are the diagonal of the saved matrix in it
    dense, index = KroneckerOperator(factors, 1 / N).to_dense(), numbers(model, part, whole)
    dense = dense[index][:, index]
    for block, own in zip(fewer.blocks, direct.factors.blocks, strict=True):
        place = block.places.numbers(torch.device("cpu")).flatten()
        assert torch.equal(place, own.places.numbers(torch.device("cpu")).flatten())
        if block.rows is None:
            same(block.values, own.values)
            continue
        same(block.row_values, own.row_values)
        Q = torch.kron(block.rows, block.columns)
        same((Q.T @ dense[place][:, place] @ Q).diagonal(), block.values.flatten() / N)
    with pytest.raises(ValueError, match="lack 1 of the 2"):
        factors.restrict(torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="parts of rows"):
        factors.restrict(torch.tensor([0, 1]))


def test_a_product_restricts_exactly():
    """A (x) G without correction, as the definition restricts it."""
    model, data = mlp(), samples()
    whole, part = UnitSelection({"0": range(7)}), UnitSelection({"0": [1, 4, 6]})
    factors = EKFACOperator(model, F.cross_entropy, data, whole).factors
    (block,) = factors.blocks
    inputs = torch.rand(6, dtype=double)
    values = block.row_values[:, None] * inputs
    object.__setattr__(block, "values", values)
    dense = KroneckerOperator(factors, 1.0).to_dense()
    index = numbers(model, part, whole)
    fewer = factors.restrict(index)
    same(KroneckerOperator(fewer, 1.0).to_dense(), dense[index][:, index])


def test_factors_are_saved_as_plain_tensors():
    model, data = mlp(), samples()
    operator = EKFACOperator(model, F.cross_entropy, data, UnitSelection.all(model), damping=0.1)
    file = io.BytesIO()
    torch.save(operator.factors.to_dict(), file)
    file.seek(0)
    factors = KroneckerFactors.from_dict(torch.load(file, weights_only=True))
    assert repr(factors) == repr(operator.factors)
    assert factors.nbytes == operator.factors.nbytes
    loaded = KroneckerOperator(factors, 1 / N, shift=0.1)
    assert torch.equal(loaded.to_dense(), operator.to_dense())
    with pytest.raises(ValueError, match="kronecker factors 1"):
        KroneckerFactors.from_dict({"format": "another"})


# ---------------------------------------------------------------------------------------------
# Models of other forms


class Recurrent(nn.Module):
    """One layer called at every step."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.step(h + x[:, t]))
        return self.head(h)


class Tied(nn.Module):
    """A matrix that looks up and multiplies, positions that a batch shares, a raw parameter."""

    def __init__(self, positions="embedding"):
        super().__init__()
        self.tokens, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Embedding(5, 4)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None])
        x = torch.cat([self.start.expand(len(ids), -1, -1), x], 1)
        return self.head(torch.tanh(self.mix(x))).mean(1)


class TimeFirst(nn.Module):
    """Samples along the second axis of a layer's input."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.mix(x.transpose(0, 1)))).mean(0))


def blocks_of(operator):
    return {name: block for block in operator.factors.blocks for name in block.parameters}


@pytest.mark.parametrize("kind", ["model", "empirical"])
@pytest.mark.parametrize("name", ["recurrent", "tied", "time first"])
def test_models_of_other_forms_have_the_exact_diagonal_in_the_basis(name, kind):
    if name == "tied":
        model, X = Tied().double(), torch.randint(0, 7, (N, 5))
    else:
        model = {"recurrent": Recurrent, "time first": TimeFirst}[name]().double()
        X = torch.randn(N, 6, 4, dtype=double)
    y = torch.randint(0, 3, (N,))
    selection = all_trainable(model)
    operator = EKFACOperator(
        model, F.cross_entropy, DataLoader(TensorDataset(X, y), 8), selection, kind=kind
    )
    assert ("one by one" in operator.plan) == (name == "time first")
    made = {"model": GaussNewtonOperator, "empirical": FisherOperator}[kind]
    exact = made(model, F.cross_entropy, (X, y), selection).to_dense()
    for block in operator.factors.blocks:
        place = block.places.numbers(torch.device("cpu")).flatten()
        r, D = block.places.shape
        rows = torch.eye(r, dtype=double) if block.rows is None else block.rows
        columns = torch.eye(D, dtype=double) if block.columns is None else block.columns
        Q = torch.kron(rows.contiguous(), columns.contiguous())
        expected = (Q.T @ exact[place][:, place] @ Q).diagonal()
        same(block.values.flatten() / N, expected)
    found = blocks_of(operator)
    if name == "tied":
        assert found["tokens.weight"].columns is not None  # rows are looked up, too
        assert found["tokens.weight"].rows is None
        assert found["places.weight"].columns is not None
        assert found["start"].rows is found["start"].columns is None
        assert found["mix.weight"] is found["mix.bias"]


class Picked(Tied):
    """The parameter that a batch shares is taken by its first entry, which samples cannot share."""

    def forward(self, ids):
        x = self.tokens(ids) + self.start[0]
        return self.head(torch.tanh(self.mix(x))).mean(1)


class EachAlone(nn.Module):
    """A convolution that is called for each sample, without an axis of samples."""

    def __init__(self):
        super().__init__()
        self.filter, self.head = nn.Conv1d(1, 2, 2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(torch.stack([self.filter(each) for each in x])).flatten(1))


@pytest.mark.parametrize("name", ["picked", "each alone"])
def test_samples_without_an_axis_are_passed_one_by_one(name):
    if name == "picked":
        model, X = Picked().double(), torch.randint(0, 7, (N, 5))
        model.places.requires_grad_(False)
    else:
        model, X = EachAlone().double(), torch.randn(N, 1, 4, dtype=double)
    y = torch.randint(0, 3, (N,))
    operator = EKFACOperator(model, F.cross_entropy, (X, y), all_trainable(model))
    exact = GaussNewtonOperator(model, F.cross_entropy, (X, y), all_trainable(model)).to_dense()
    assert "samples were passed one by one" in operator.plan
    for block in operator.factors.blocks:
        place = block.places.numbers(torch.device("cpu")).flatten()
        assert abs(block.values.sum() / N - exact.diagonal()[place].sum()) < 1e-12


def test_large_layers_have_a_basis_on_one_side_or_none(monkeypatch):
    model, data = mlp(), samples()
    for largest, expected in ((6, (False, True)), (5, (False, False)), (7, (True, True))):
        monkeypatch.setattr(passes, "LARGEST", largest)
        selection = UnitSelection({"0": range(7)})
        operator = EKFACOperator(model, F.cross_entropy, data, selection)
        (block,) = operator.factors.blocks
        assert (block.rows is not None, block.columns is not None) == expected
        exact = GaussNewtonOperator(model, F.cross_entropy, data, selection)
        assert abs(operator.trace() - exact.trace()) < 1e-12
        if largest == 5:
            same(operator.to_dense(), exact.to_dense().diagonal().diag())


class Sometimes(nn.Module):
    """The weight is used outside of its layer for long inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        return self.head(h + F.linear(x, self.a.weight) if x.shape[1] > 4 else h).mean(1)


def test_weights_that_are_used_elsewhere_for_some_batches():
    model, y = Sometimes().double(), torch.randint(0, 3, (10,))
    short, long = ((torch.randn(10, length, 5, dtype=double), y) for length in (3, 5))
    selection = UnitSelection({"a": [0], "head": [1]})
    with pytest.raises(ValueError, match="outside of their layers for some batches only"):
        EKFACOperator(model, F.cross_entropy, [short, long], selection)
    operator = EKFACOperator(model, F.cross_entropy, [long, short], selection)
    exact = GaussNewtonOperator(model, F.cross_entropy, [long, short], selection)
    assert abs(operator.trace() / exact.trace() - 1) < 1e-10


def test_moments_of_a_layer_that_is_called_several_times():
    """Its calls are positions."""
    model, X, y = Recurrent().double(), torch.randn(N, 3, 4, dtype=double), samples()[1]
    operator = EKFACOperator(model, F.cross_entropy, (X, y), UnitSelection({"step": range(4)}))
    xs = []
    handle = model.step.register_forward_hook(lambda module, args, out: xs.append(args[0]))
    with torch.no_grad():
        model(X)
    handle.remove()
    x = torch.cat([*xs])
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    (block,) = operator.factors.blocks
    turned = block.columns.T @ (x.T @ x) @ block.columns
    same(turned, turned.diagonal().diag(), 1e-9)


def test_single_parameters():
    model, data = mlp(), samples()
    units = EKFACOperator(model, F.cross_entropy, data, UnitSelection.all(model), damping=0.1)
    chosen = ParameterSelection.of(model)
    operator = EKFACOperator(model, F.cross_entropy, data, chosen, damping=0.1)
    order = numbers(model, chosen, UnitSelection.all(model))
    same(operator.to_dense(), units.to_dense()[order][:, order])
    rows = ParameterSelection({"3.weight": range(7, 21), "3.bias": [1, 2]})
    some = EKFACOperator(model, F.cross_entropy, data, rows)
    part = EKFACOperator(model, F.cross_entropy, data, UnitSelection({"3": [1, 2]}))
    order = numbers(model, rows, UnitSelection({"3": [1, 2]}))
    same(some.to_dense(), part.to_dense()[order][:, order])
    apart = ParameterSelection({"3.weight": range(7, 21), "3.bias": [0, 1]})
    operator = EKFACOperator(model, F.cross_entropy, data, apart)
    assert [block.parameters for block in operator.factors.blocks] == [("3.weight",), ("3.bias",)]
    with pytest.raises(ValueError, match="single entries of rows of parameter '3.weight'"):
        EKFACOperator(model, F.cross_entropy, data, ParameterSelection({"3.weight": [0, 9]}))


def test_half_models_are_computed_in_float32():
    model, (X, y) = mlp().to(torch.bfloat16), samples()
    X = X.to(torch.bfloat16)
    operator = EKFACOperator(model, F.cross_entropy, (X, y), UnitSelection.all(model), damping=0.1)
    assert operator.dtype == torch.float32
    wide = EKFACOperator(
        model, F.cross_entropy, (X, y), UnitSelection.all(model), damping=0.1, dtype=double
    )
    torch.testing.assert_close(operator.to_dense().double(), wide.to_dense(), rtol=1e-4, atol=1e-6)


def test_batches_do_not_matter():
    model, (X, y) = mlp(), samples()
    selection = UnitSelection({"0": [1, 2], "2": [3], "3": [0]})
    one = EKFACOperator(model, F.cross_entropy, (X, y), selection)
    sizes = [(0, 1), (1, 8), (8, 9), (9, 20)]
    parts = [(X[a:b], y[a:b]) for a, b in sizes]
    same(EKFACOperator(model, F.cross_entropy, parts, selection).to_dense(), one.to_dense())


# ---------------------------------------------------------------------------------------------
# What is refused


def test_refusals():
    model, (X, y) = mlp(outputs=70), samples(classes=70)
    selection = UnitSelection({"0": [0]})

    def made(loss=F.cross_entropy, data=(X, y), **options):
        return EKFACOperator(model, loss, data, selection, **options)

    with pytest.raises(ValueError, match="by the 70 outputs of a sample, at most 64.*'empirical'"):
        made(lambda z, t: F.cross_entropy(z, t) * 1)
    assert made(lambda z, t: F.cross_entropy(z, t) * 1, kind="empirical").kind == "empirical"
    with pytest.raises(ValueError, match="kind must be"):
        made(kind="exact")
    with pytest.raises((ValueError, TypeError), match="draws"):
        made(draws=0)
    with pytest.raises((ValueError, TypeError), match="seed"):
        made(seed=-1)
    with pytest.raises(ValueError, match="plain mean"):
        made(lambda z, t: F.cross_entropy(z, t, weight=torch.arange(1.0, 71.0).double()))
    small, data = mlp(), samples()
    with pytest.raises(ValueError, match="convex in the outputs"):
        EKFACOperator(small, lambda z, t: -F.cross_entropy(z, t), data, selection)
    pair = Pair().double()
    with pytest.raises(ValueError, match="returns a tuple: .* kind='empirical'"):
        EKFACOperator(pair, lambda z, t: F.cross_entropy(z[0], t), data, UnitSelection({"a": [0]}))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return self.a(x), x
