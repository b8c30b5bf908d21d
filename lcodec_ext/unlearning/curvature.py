"""Curvature of the mean loss on the parameters of selected units, formed exactly by autograd."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lcodec_ext._progress import progress_bar
from lcodec_ext.curvature.units import UnitLayout
from lcodec_ext.unlearning.perturbation import LossFunction
from lcodec_ext.unlearning.samples import Samples

Curvature = Literal["gauss_newton", "hessian"]

#: Most parameters that a selection may own. Some four d x d matrices of float64 are alive at
#: once, 2 GB at this size, and the eigenvalues take minutes.
MAX_PARAMETERS = 8192

_JACOBIAN_BYTES = 2**28


class IndefiniteCurvatureError(ValueError):
    """The damped curvature is not positive definite, so that its Newton step may go anywhere."""


def curvature_matrix(
    kind: Curvature,
    model: nn.Module,
    layout: UnitLayout,
    samples: Samples,
    loss_fn: LossFunction,
    *,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Hessian or generalised Gauss-Newton matrix of the mean loss, by the selected parameters.

    ::

        hessian:       (1/N) sum_i d2 l_i / dw dw
        gauss_newton:  (1/N) sum_i J_i^T (d2 l_i / dz dz) J_i,   z the output, J_i = dz_i / dw

    Parameters
    ----------
    kind : {"gauss_newton", "hessian"}
    model : Module
        In evaluation mode.
    layout : UnitLayout
        Of the d parameters to differentiate by.
    samples : Samples
        N of them.
    loss_fn : callable
        Mean loss of a batch.
    batch_size : int
        Samples in one forward pass; fewer where their Jacobians would take much memory.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor of float64, shape (d, d)
        Symmetric, without regulariser and damping.

    Raises
    ------
    ValueError
        For "gauss_newton", if the loss is not convex in the outputs: the matrix, then, has no
        definite sign either. If the result is not finite.

    Notes
    -----
    "gauss_newton" takes N C d^2 multiplications for C outputs, "hessian" d backward passes over the
    samples. Both form gradients of whole weights on the way to those of the selected rows.
    """
    d = layout.size
    n = len(samples)
    theta = layout.gather(layout.parameters).detach()
    if kind == "gauss_newton":
        with torch.no_grad():
            n_outputs = model(samples.inputs[:1]).numel()
        # Differentiating by slices forms the gradients of whole tensors on the way.
        touched = sum(parameter.numel() for parameter in layout.parameters.values())
        per_sample = 8 * n_outputs * max(d, touched)
        batch_size = max(1, min(batch_size, _JACOBIAN_BYTES // per_sample))
        form = _gauss_newton
    else:
        form = _hessian
    matrix = theta.new_zeros(d, d)
    with progress_bar(progress, total=n, desc=kind, unit="sample") as bar:
        for chunk in samples.chunks(batch_size):
            matrix += form(model, layout, theta, chunk, loss_fn) * (len(chunk) / n)
            bar.update(len(chunk))
    if not torch.isfinite(matrix).all():
        raise ValueError(f"the {kind} matrix of the retained samples holds NaN or infinity")
    return (matrix + matrix.T) / 2


def _call(model: nn.Module, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    # No parameter has two owners. A module under two names would be swapped twice and break.
    outputs: Tensor = functional_call(model, parameters, (inputs,), tie_weights=False)
    return outputs


def _gauss_newton(
    model: nn.Module,
    layout: UnitLayout,
    theta: Tensor,
    samples: Samples,
    loss_fn: LossFunction,
) -> Tensor:
    def single(vector: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        output = _call(model, layout.substituted(vector), x[None])[0]
        return output.flatten(), output

    jacobian, outputs = vmap(jacrev(single, has_aux=True), (None, 0))(theta, samples.inputs)
    curvature = output_hessians(loss_fn, outputs, samples.targets)
    weighted = (curvature @ jacobian).flatten(0, 1)
    matrix: Tensor = jacobian.flatten(0, 1).T @ weighted
    return matrix / len(samples)


def output_hessians(loss_fn: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """Hessian of every sample's loss by its own output, shape (B, C, C), C outputs flattened.

    The mean loss of a batch is separable, so that one backward pass gives a row of every block.
    """
    z = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(len(z) * loss_fn(z, targets), z, create_graph=True)
    gradient = gradient.flatten(1)
    blocks = gradient.new_zeros(*gradient.shape, gradient.shape[1])
    if gradient.requires_grad:  # else the loss is linear in the outputs
        for c in range(gradient.shape[1]):
            (row,) = torch.autograd.grad(gradient[:, c].sum(), z, retain_graph=True)
            blocks[:, c] = row.flatten(1)
    if not torch.isfinite(blocks).all():
        raise ValueError("the second derivative of the loss by the outputs is NaN or infinite")
    eigenvalues = torch.linalg.eigvalsh(blocks)
    smallest, largest = eigenvalues.min().item(), eigenvalues.abs().max().item()
    if smallest < -1e-10 * largest:
        raise ValueError(
            "curvature='gauss_newton' needs a loss that is convex in the outputs; its second "
            f"derivative by them has the eigenvalue {smallest:.3g}. Use curvature='hessian'"
        )
    return blocks


def _hessian(
    model: nn.Module,
    layout: UnitLayout,
    theta: Tensor,
    samples: Samples,
    loss_fn: LossFunction,
) -> Tensor:
    # Row by row: vectorised over rows, the double backward of a convolution takes gigabytes.
    vector = theta.detach().requires_grad_()
    outputs = _call(model, layout.substituted(vector), samples.inputs)
    (gradient,) = torch.autograd.grad(loss_fn(outputs, samples.targets), vector, create_graph=True)
    if not gradient.requires_grad:  # a loss that is linear in these parameters
        return torch.zeros(len(vector), len(vector), dtype=vector.dtype, device=vector.device)
    rows = [
        torch.autograd.grad(g, vector, retain_graph=True, materialize_grads=True)[0]
        for g in gradient
    ]
    return torch.stack(rows)


def solve(
    matrix: Tensor, gradient: Tensor, *, kind: Curvature, weight_decay: float, damping: float
) -> tuple[Tensor, float, float, float]:
    """Compute the damped Newton step by a Cholesky factorisation.

    Parameters
    ----------
    matrix : Tensor of float64, shape (d, d)
        Curvature with regulariser and damping.
    gradient : Tensor of float64, shape (d,)
    kind, weight_decay, damping
        For the message of an error.

    Returns
    -------
    step : Tensor of float64, shape (d,)
    smallest, largest : float
        Extreme eigenvalues of the matrix.
    residual : float
        |matrix @ step - gradient| / |gradient|.

    Raises
    ------
    IndefiniteCurvatureError
        If an eigenvalue is negative, or zero within rounding.
    """
    eigenvalues = torch.linalg.eigvalsh(matrix)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * max(largest, -smallest)
    if smallest <= rounding:
        least = damping - smallest
        if smallest < -rounding:
            advice = f"damping above {_rounded_up(least)}"
            if kind == "hessian":
                advice = f"curvature='gauss_newton', which never is indefinite, or {advice}"
            state = "indefinite"
        else:
            advice = "a larger damping, for instance 1e-4"
            state = "singular"
        raise IndefiniteCurvatureError(
            f"the {kind} matrix of the retained objective is {state} on the {len(matrix)} selected "
            f"parameters: its smallest eigenvalue is {smallest:.4g}, the largest {largest:.4g}, "
            f"with weight_decay={weight_decay:g} and damping={damping:g} included. Use {advice}"
        )
    factor = torch.linalg.cholesky(matrix)
    step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
    size = gradient.norm().item()
    residual = (matrix @ step - gradient).norm().item() / size if size else 0.0
    return step, smallest, largest, residual


def _rounded_up(value: float) -> str:
    """Write a positive number with two significant digits, never less than it is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"
