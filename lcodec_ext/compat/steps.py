"""The parts of the deletion step that the published ``scrub_tools`` and ``grad_utils`` have.

They form dense matrices, as there: for a few units. `inp_perturb` uses none of them by default.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_choice
from lcodec_ext.compat.codec import foci
from lcodec_ext.compat.epoch_files import Bank, read_epoch
from lcodec_ext.compat.hooks import HyperC
from lcodec_ext.compat.switch import bugs

Slices = Sequence[Sequence[Any]]  # of a layer and the number of a unit
Places = dict[tuple[str, str, int], list[Any]]  # to start, end, shape, parameter


def getHessian(
    dw1: Tensor,
    dw2: Tensor | None = None,
    approxType: str = "FD",
    w1: Tensor | None = None,
    w2: Tensor | None = None,
    hessian_device: Any = "cpu",
    *,
    reference_bugs: bool | None = None,
) -> Tensor:
    """A dense curvature of rank one, on the device of `dw1`.

    "FD": the secant y y^T / (y . s) with y = dw1 - dw2 and s = w1 - w2; ValueError unless y . s is
    positive. With `reference_bugs` y y^T is divided by the 1-norm of s. "Fisher": dw1 dw1^T.
    """
    check_choice(approxType, "approxType", ("FD", "Fisher"))
    device = torch.device(hessian_device)
    g = dw1.to(device)
    if approxType == "Fisher":
        return torch.outer(g, g).to(dw1.device)
    if dw2 is None or w1 is None or w2 is None:
        raise ValueError("approxType='FD' needs dw2, w1 and w2, a second gradient and both weights")
    y, s = g - dw2.to(device), w1.to(device) - w2.to(device)
    if bugs(reference_bugs):
        # PairwiseDistance adds 1e-6 to every difference: not 0 where the weights are the same.
        length = nn.PairwiseDistance(p=1)(w1.to(device)[None], w2.to(device)[None])
        return (torch.outer(y, y) / length).to(dw1.device)
    curvature = float(y @ s)
    if not curvature > 0:
        raise ValueError(
            "approxType='FD' needs positive curvature: (dw1 - dw2) . (w1 - w2) is "
            f"{curvature:.3g}. reference_bugs=True divides by the 1-norm instead"
        )
    return (torch.outer(y, y) / curvature).to(dw1.device)


def getVectorizedGrad(
    gradlist: Bank,
    model: nn.Module,
    slices_to_update: Slices,
    device: Any,
    paramlist: Bank | None = None,
    *,
    reference_bugs: bool | None = None,
) -> tuple[Tensor, Tensor, Places]:
    """Gradients and weights of some units as vectors, and where each unit's are.

    Parameters
    ----------
    gradlist : dict
        As `getGradObjs` collects it.
    model : Module
        Whose layers are in `slices_to_update`.
    slices_to_update : list of [layer, unit]
    device : device
    paramlist : dict, optional
        Weights to take instead of the present ones.
    reference_bugs : bool, optional
        Find layers by ``str(layer)``. By default they are found by their qualified names: layers
        that print the same keep their own gradients.

    Returns
    -------
    gradient, weights : Tensor of shape (p,)
    places : dict
        From layer, parameter and unit to [start, end, shape, parameter].
    """
    names = {} if bugs(reference_bugs) else {each: name for name, each in model.named_modules()}
    places: Places = {}
    gradient, weights, start = [], [], 0
    for layer, unit in slices_to_update:
        for name, parameter in layer.named_parameters():
            key, label = (str(layer), name), str(layer)
            if layer in names:
                label = names[layer]
                own = str(model), f"{label}.{name}" if label else name
                key = own if own in gradlist else key
            stored = parameter if paramlist is None else paramlist[key]
            weights.append(stored[unit].detach().flatten().to(device))
            gradient.append(gradlist[key][unit].detach().flatten().to(device))
            end = start + len(weights[-1])
            places[label, name, int(unit)] = [start, end, parameter[unit].shape, parameter]
            start = end
    if not weights:
        return torch.zeros(0, device=device), torch.zeros(0, device=device), places
    return torch.cat(gradient), torch.cat(weights), places


def getOldPandG(
    outString: str,
    epoch: int,
    model: nn.Module,
    slices_to_update: Slices,
    device: Any,
    *,
    reference_bugs: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient and weights of some units from the files of an epoch, as vectors."""
    gradients, parameters = read_epoch(outString, epoch, torch.device(device))
    return getVectorizedGrad(
        gradients, model, slices_to_update, device, parameters, reference_bugs=reference_bugs
    )[:2]


def NewtonScrubStep(
    weight: Tensor,
    grad: Tensor,
    hessian: Tensor,
    n: int,
    l2lambda: float = 0,
    hessian_device: Any = "cpu",
) -> Tensor:
    """``weight + (hessian + l2lambda I)^-1 grad / (n - 1)``."""
    return weight + _solved(grad, hessian, l2lambda, hessian_device).to(weight.device) / (n - 1)


def CR_NaiveNewton(
    weight: Tensor, grad: Tensor, hessian: Tensor, l2lambda: float = 0, hessian_device: Any = "cpu"
) -> Tensor:
    """``weight + (hessian + l2lambda I)^-1 grad``: a sum's gradient and Hessian belong to it."""
    return weight + _solved(grad, hessian, l2lambda, hessian_device).to(weight.device)


def _solved(grad: Tensor, hessian: Tensor, l2lambda: float, device: Any) -> Tensor:
    matrix = hessian.to(device)
    matrix = matrix + l2lambda * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(matrix, grad.to(device))


def NoisyReturn(
    weights: Tensor,
    epsilon: float = 0.1,
    delta: float = 0.01,
    m: int = 1,
    nsamps: int = 50000,
    M: float = 0.25,
    L: float = 1.0,
    lamb: float = 0.01,
    device: Any = "cpu",
) -> Tensor:
    """Weights with noise of the published standard deviation, from torch's generator.

    Its guarantee is for epsilon < 1, one release, and all weights that are released. Each call
    adds noise to what has noise already: after k calls it is sqrt(k) times as large.
    """
    gamma = 2 * M * L**2 * m**2 / (nsamps**2 * lamb**3)
    sigma = gamma / epsilon * math.sqrt(2 * math.log(1.25 / delta))
    return weights + torch.normal(torch.zeros(len(weights)), sigma).to(device)


def updateModelParams(
    updatedParams: Tensor, reversalDict: Places, model: nn.Module | None = None
) -> None:
    """Write a vector of weights to the units that `getVectorizedGrad` took it from."""
    with torch.no_grad():
        for (_, _, unit), (start, end, shape, parameter) in reversalDict.items():
            parameter[unit] = updatedParams[start:end].detach().reshape(shape).to(parameter.device)


def reverseLinearIndexingToLayers(
    selectedSlices: Iterable[int], torchLayers: Sequence[nn.Module]
) -> list[list[Any]]:
    """[layer, unit] of each number of a unit, counted through all layers; IndexError beyond."""
    units = [[layer, unit] for layer in torchLayers for unit in range(len(layer.weight))]  # type: ignore[arg-type]
    chosen = []
    for column in selectedSlices:
        if column >= len(units):
            raise IndexError(
                f"column {column} of the activations is beyond the {len(units)} units of the "
                "layers: a layer is called more than once, and the published code ends here"
            )
        chosen.append(units[column])
    return chosen


reverseIndexingToLayers = reverseLinearIndexingToLayers  # that of convolutions alone there


def getHyperColumn(
    model: nn.Module, datapoint: Any, params: Any, device: Any
) -> tuple[Tensor, list[nn.Conv2d]]:
    """The maps of all convolutions for one input, at ``params.interp_size``, and the layers."""
    columns = HyperC(model, interp_size=params.interp_size, interpolate=True)
    x = torch.as_tensor(datapoint, dtype=torch.float32)[None].to(device)
    return columns.getHC(x)


def myFOCI(torchInput: Tensor, torchHypercolumn: Tensor) -> tuple[list[int], list[float]]:
    """FOCI of an input's pixels, mean of its channels, on the maps of a hypercolumn."""
    pixels = torchInput.detach().cpu().mean(0).flatten().numpy()
    maps = torchHypercolumn.detach().cpu().flatten(2)[0].T.contiguous().numpy()
    return foci(maps, pixels)
