"""Curvature blocks of selected units against dense computations of the whole model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call, jacrev

from lcodec_ext.curvature.units import UnitLayout
from lcodec_ext.unlearning import IndefiniteCurvatureError, UnitSelection
from lcodec_ext.unlearning.curvature import curvature_matrix, output_hessians, solve
from lcodec_ext.unlearning.samples import Samples


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


def alias():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Softplus(), nn.Linear(4, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.SiLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 3, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)),
        (4,),
        {"0": [1, 4], "2": [0, 3], "3": [2]},
    ),
    "convolutions": (convolutions, (2, 6, 6), {"0": [0, 3], "4": [1], "7": [0, 2]}),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(9, 3)
        ),
        (2, 4),
        {"0": [0, 2], "3": [1]},
    ),
    "reused": (Reused, (4,), {"body": [0, 2], "head": [1]}),
    "alias": (alias, (4,), {"0": [1, 3], "4": [0]}),
}


def setting(case, n=11):
    build, shape, units = CASES[case]
    torch.manual_seed(7)
    model = build().double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    samples = Samples(torch.randn(n, *shape, dtype=torch.float64), torch.arange(n) % 3)
    parameters = UnitLayout(UnitSelection(units), model)
    return model, parameters, samples


def block_of(model, parameters, samples, dense):
    """Curvature by all parameters at once, and of it the block of the selected ones.

    Which entries those are is found by marking them.
    """
    names = [name for name, _ in model.named_parameters()]
    marks = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    position = 0
    for mark in marks.values():
        mark.copy_(torch.arange(position, position + mark.numel()).view(mark.shape))
        position += mark.numel()
    chosen = parameters.gather(marks).long()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    shapes = [p.shape for p in model.parameters()]

    def outputs(vector, x):
        pieces = vector.split([shape.numel() for shape in shapes])
        tensors = {k: v.view(s) for k, v, s in zip(names, pieces, shapes, strict=True)}
        return functional_call(model, tensors, (x,), tie_weights=False)

    return dense(outputs, flat, samples)[chosen][:, chosen]


def dense_hessian(outputs, flat, samples):
    return hessian(lambda v: F.cross_entropy(outputs(v, samples.inputs), samples.targets), flat)


def dense_gauss_newton(outputs, flat, samples):
    jacobian = jacrev(lambda v: outputs(v, samples.inputs))(flat)
    p = outputs(flat, samples.inputs).softmax(1)
    softmax_hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ica,icd,idb->ab", jacobian, softmax_hessian, jacobian) / len(samples)


@pytest.mark.parametrize("batch_size", [4, 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("kind", "dense"), [("hessian", dense_hessian), ("gauss_newton", dense_gauss_newton)]
)
def test_block_of_the_whole_models_curvature(kind, dense, case, batch_size):
    model, parameters, samples = setting(case)
    got = curvature_matrix(
        kind, model, parameters, samples, F.cross_entropy, batch_size=batch_size, progress=False
    )
    expected = block_of(model, parameters, samples, dense)
    assert got.shape == (parameters.size, parameters.size)
    assert torch.equal(got, got.T)
    assert torch.linalg.norm(got - expected) <= 1e-12 * torch.linalg.norm(expected)
    assert expected.abs().max() > 1e-3


def test_hessian_and_gauss_newton_differ_on_a_network():
    model, parameters, samples = setting("mlp")
    options = {"batch_size": 100, "progress": False}
    exact = curvature_matrix("hessian", model, parameters, samples, F.cross_entropy, **options)
    gauss_newton = curvature_matrix(
        "gauss_newton", model, parameters, samples, F.cross_entropy, **options
    )
    assert torch.linalg.norm(exact - gauss_newton) > 0.01 * torch.linalg.norm(exact)
    assert torch.linalg.eigvalsh(gauss_newton)[0] > -1e-14


@pytest.mark.parametrize("memory", [1, 2**28])
def test_jacobians_are_formed_in_pieces(memory, monkeypatch):
    monkeypatch.setattr("lcodec_ext.unlearning.curvature._JACOBIAN_BYTES", memory)
    model, parameters, samples = setting("mlp")
    got = curvature_matrix(
        "gauss_newton", model, parameters, samples, F.cross_entropy, batch_size=8, progress=False
    )
    expected = block_of(model, parameters, samples, dense_gauss_newton)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


LOSSES = [
    (F.cross_entropy, torch.tensor([0, 2, 1, 2])),
    (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 2, 1, 2])),
    (F.mse_loss, torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)),
    (F.binary_cross_entropy_with_logits, torch.eye(4, 3, dtype=torch.float64)),
    (lambda z, t: z.mean(), torch.zeros(4)),
]


@pytest.mark.parametrize(("loss_fn", "targets"), LOSSES)
def test_output_hessians_of_single_samples(loss_fn, targets):
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(1))
    expected = torch.stack(
        [
            hessian(lambda o, i=i: loss_fn(o, targets[i : i + 1]), z[i : i + 1]).view(3, 3)
            for i in range(4)
        ]
    )
    got = output_hessians(loss_fn, z, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_outputs_of_any_shape():
    torch.manual_seed(3)
    model = nn.Conv1d(2, 3, 2).double()
    samples = Samples(torch.randn(5, 2, 4, dtype=torch.float64), torch.randint(0, 3, (5, 3)))
    parameters = UnitLayout(UnitSelection({"": [0, 1, 2]}), model)
    options = {"batch_size": 2, "progress": False}
    both = [
        curvature_matrix(kind, model, parameters, samples, F.cross_entropy, **options)
        for kind in ("hessian", "gauss_newton")
    ]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)  # the outputs are linear


def test_a_loss_that_is_not_convex_in_the_outputs():
    model, parameters, samples = setting("mlp")

    def loss_fn(outputs, targets):
        return torch.sin(outputs).mean()

    with pytest.raises(ValueError, match=r"convex in the outputs.*curvature='hessian'"):
        curvature_matrix(
            "gauss_newton", model, parameters, samples, loss_fn, batch_size=100, progress=False
        )
    curvature_matrix("hessian", model, parameters, samples, loss_fn, batch_size=100, progress=False)


def test_solve_reports_what_it_did():
    generator = torch.manual_seed(4)
    a = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix, gradient = a @ a.T + torch.eye(6), a[0]
    step, smallest, largest, residual = solve(
        matrix, gradient, kind="hessian", weight_decay=0.0, damping=1.0
    )
    torch.testing.assert_close(step, torch.linalg.solve(matrix, gradient))
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (smallest, largest) == (eigenvalues[0].item(), eigenvalues[-1].item())
    assert residual < 1e-13


def test_no_gradient_is_no_step():
    step, *_, residual = solve(
        torch.eye(3), torch.zeros(3), kind="hessian", weight_decay=0.0, damping=0.0
    )
    assert not step.any()
    assert residual == 0


@pytest.mark.parametrize("smallest", [-3.21, -1e-6])
def test_indefinite_is_refused_with_the_damping_it_takes(smallest):
    matrix = torch.diag(torch.tensor([2.0, smallest + 0.5, 1.0], dtype=torch.float64))
    shifted = matrix - 0.5 * torch.eye(3)
    with pytest.raises(IndefiniteCurvatureError) as caught:
        solve(shifted, torch.ones(3), kind="hessian", weight_decay=0.25, damping=0.25)
    message = str(caught.value)
    assert f"{smallest:.4g}" in message
    assert "gauss_newton" in message
    assert "weight_decay=0.25" in message
    advised = float(message.rsplit("damping above ", 1)[1])
    assert 0.25 - smallest <= advised <= (0.25 - smallest) * 1.11


def test_singular_is_refused():
    matrix = torch.diag(torch.tensor([1.0, 1e-17], dtype=torch.float64))
    with pytest.raises(IndefiniteCurvatureError, match=r"singular.*larger damping"):
        solve(matrix, torch.ones(2), kind="gauss_newton", weight_decay=0.0, damping=0.0)
