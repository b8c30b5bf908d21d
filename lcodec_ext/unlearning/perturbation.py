"""What a deletion request makes the units do: activations and losses under input noise.

The first step of Algorithm 1 of the paper. The loss under perturbation is the response, the
units' activations are the columns, and L-FOCI finds the units on which the loss depends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lcodec_ext import FociResult, lfoci
from lcodec_ext._progress import progress_bar
from lcodec_ext.unlearning.samples import Samples
from lcodec_ext.unlearning.units import Layer

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Call(NamedTuple):
    """One call of a layer in a forward pass; a reused layer has several."""

    layer: str
    number: int


class ActivationRecorder:
    """Records every unit's mean activation in a forward pass, by layer name and call number.

    A context manager: its hooks are removed on the way out.
    """

    def __init__(self, layers: dict[str, Layer]) -> None:
        self._layers = layers
        self._means: dict[Call, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer in self._layers.values():
            self._handles.append(layer.module.register_forward_hook(self._hook(layer)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: Layer) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            number = sum(call.layer == layer.name for call in self._means)
            self._means[Call(layer.name, number)] = layer.mean_activation(output)

        return record

    def take(self) -> dict[Call, Tensor]:
        """Hand over the activations since the last take, in the order of the calls."""
        means, self._means = self._means, {}
        return means


def perturbed_inputs(inputs: Tensor, noise_std: float, seed: int, index: int) -> Tensor:
    """Add the noise of one perturbation, a function of seed and index alone.

    NumPy's Philox under the key `seed`, its counter starting at index * 2**192.
    """
    philox = np.random.Philox(key=seed, counter=[0, 0, 0, index])
    noise = np.random.Generator(philox).standard_normal(tuple(inputs.shape))
    return inputs + noise_std * torch.from_numpy(noise).to(inputs.device)


def record_perturbations(
    model: nn.Module,
    layers: dict[str, Layer],
    calls: list[Call],
    request: Samples,
    loss_fn: LossFunction,
    *,
    n_perturbations: int,
    noise_std: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean activations and mean loss of the whole request under each perturbation.

    Several perturbations go through one forward pass while they fit in batch_size samples; a
    larger request goes through in pieces.

    Returns
    -------
    activations : ndarray of float64, shape (n_perturbations, units of all calls)
        Columns call by call, unit by unit.
    losses : ndarray of float64, shape (n_perturbations,)
    """
    m = len(request)
    together = max(1, batch_size // m)
    activations, losses = [], []
    bar = progress_bar(progress, total=n_perturbations, desc="perturbations", unit="draw")
    with ActivationRecorder(layers) as recorder, torch.no_grad(), bar:

        def forward(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            loss = loss_fn(model(inputs), targets)
            means = recorder.take()
            if list(means) != calls:
                raise ValueError("the layers that the model calls change from input to input")
            return torch.cat([means[call] for call in calls]), loss

        # vmap, and not one large batch: a module may put the samples along any axis.
        forward_each = torch.func.vmap(forward, in_dims=(0, None))
        for start in range(0, n_perturbations, together):
            indices = range(start, min(start + together, n_perturbations))
            noisy = torch.stack(
                [perturbed_inputs(request.inputs, noise_std, seed, index) for index in indices]
            )
            means, loss = torch.tensor(0.0), torch.tensor(0.0)
            for piece, targets in zip(
                torch.split(noisy, batch_size, 1),
                torch.split(request.targets, batch_size),
                strict=True,
            ):
                piece_means, piece_loss = forward_each(piece, targets)
                means = means + piece_means * (len(targets) / m)
                loss = loss + piece_loss * (len(targets) / m)
            activations.append(means.cpu().numpy())
            losses.append(loss.cpu().numpy())
            bar.update(len(indices))
    return np.concatenate(activations), np.concatenate(losses)


def select_units(
    layers: dict[str, Layer],
    calls: list[Call],
    activations: NDArray[np.float64],
    losses: NDArray[np.float64],
    *,
    max_units: int | None,
    seed: int,
    progress: bool,
) -> tuple[set[tuple[str, int]], FociResult]:
    """Find the units, as (layer, unit), on which the loss depends, by L-FOCI.

    A unit is selected if any of its calls is. The noise of L-FOCI is relative to each column: means
    over a request vary by far less than the paper's absolute 0.01. Units whose
    output never changes are left out beforehand.
    """
    if not np.isfinite(losses).all():
        raise ValueError("the loss of the perturbed request is NaN or infinite")
    if np.ptp(losses) == 0:
        raise ValueError(
            "the loss of the request is the same under all perturbations; is noise_std too small "
            "for the inputs?"
        )
    owners = [(call, unit) for call in calls for unit in range(layers[call.layer].n_units)]
    for column in np.flatnonzero(~np.isfinite(activations).all(0))[:1]:
        call, unit = owners[column]
        raise ValueError(f"unit {unit} of layer {call.layer!r} has activations NaN or infinite")
    alive = np.flatnonzero(np.ptp(activations, axis=0) > 0)
    result = None
    if len(alive):
        result = lfoci(
            activations[:, alive],
            losses,
            noise=0.01,
            noise_scale="relative",
            seed=seed,
            max_features=max_units,
            progress=progress,
        )
    if result is None or not len(result.ordering):
        raise ValueError(
            f"L-FOCI selects no unit from {len(losses)} perturbations: the loss depends on none "
            "measurably. Give more n_perturbations or a larger noise_std, or take selection='all'"
        )
    chosen = [owners[column] for column in alive[result.ordering]]
    return {(call.layer, unit) for call, unit in chosen}, dataclasses.replace(
        result,
        ordering=alive[result.ordering],
        names=[f"{call.layer}[{unit}] call {call.number}" for call, unit in chosen],
        n_features=len(owners),
    )
