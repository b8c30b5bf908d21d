"""The published code with its defects, for ``reference_bugs=True``.

Everything here is on purpose: layers and files by ``str(module)``, activations in the order of
registration, a sample Hessian of the difference of a gradient with itself, a secant divided by the
1-norm of the step, no gradient of the regulariser, noise for one sample on the selected weights, a
request cut to its first sample or batch. ``docs/compat.md`` has the list. It does what that code
does on PyTorch 2; where that always ends in an exception, it does what is evidently intended.
"""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._torch.loss import LossFunction
from lcodec_ext.compat.codec import cheap_torch_foci, torch_foci
from lcodec_ext.compat.epoch_files import (
    Bank,
    Measured,
    backward,
    getGradObjs,
    read_epoch,
    write_epoch,
)

Slices = list[tuple[nn.Module, int]]
Places = dict[tuple[str, str, int], tuple[slice, nn.Parameter]]
_TOKENS = (999, 30521)  # of DistilBERT's uncased vocabulary, whatever the model's is


class GradientBank:
    """The gradients that training adds up: each batch's once for every key of its parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._bank: Bank = {}

    def add(self) -> None:
        """Add the gradients that the model has now."""
        of_batch = getGradObjs(self._model)[0]
        if not self._bank:
            self._bank = of_batch
            return
        for key in self._bank:
            self._bank[key] += of_batch[key]  # in place, and keys share their tensors

    def write(self, stem: str, epoch: int, n: int) -> None:
        """Write the sums over n samples, and the parameters."""
        means = {key: g / n for key, g in self._bank.items()}
        write_epoch(stem, epoch, means, getGradObjs(self._model)[1])


def disable_batch_norm(model: nn.Module) -> None:
    """Put all children in evaluation mode, except those that an attribute calls BatchNorm."""
    for name, child in model.named_children():
        if "BatchNorm" not in name:
            child.eval()
            child.track_running_stats = False  # type: ignore[assignment]


def step(
    model: nn.Module,
    request: Any,
    loss_fn: LossFunction,
    params: Any,
    zero_grad: Callable[[], object],
    stem: str,
    *,
    reid: bool = False,
) -> Measured:
    """Change a model in place; return losses and gradient norms of the request, before and after.

    The request is a batch (inputs, targets), or a dict of tensors with "labels". `zero_grad` is the
    optimizer's. `reid` means re-identification: activations are recorded with the root in training
    mode, and "Random" takes 10 units.
    """
    if isinstance(request, dict):
        inputs: Any = {key: value for key, value in request.items() if key != "labels"}
        targets = request["labels"]
    else:
        inputs, targets = request

    def loss_of(inputs: Any) -> Tensor:
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return loss_fn(getattr(outputs, "logits", outputs), targets)

    def measure() -> tuple[Tensor, float]:
        zero_grad()
        return backward(loss_of(inputs), model)

    model.train(reid)
    if reid:
        disable_batch_norm(model)
    layers, activations, losses = _record(model, inputs, loss_of, params)
    slices = _slices(_select(activations, losses, params, 10 if reid else None), layers)

    model.train()
    disable_batch_norm(model)
    loss_before, norm_before = measure()
    gradient, weights, places = _vectors(getGradObjs(model)[0], slices)
    model.zero_grad()
    if params.order == "Hessian":
        changed = _newton(gradient, weights, slices, params, stem)
    else:
        changed = weights + params.lr * gradient
    with torch.no_grad():
        for (_, _, unit), (place, parameter) in places.items():
            parameter[unit] = changed[place].reshape(parameter[unit].shape)
    loss_after, norm_after = measure()
    model.zero_grad()
    return loss_before, loss_after, norm_before, norm_after


def _draws(inputs: Any, params: Any) -> Iterator[Any]:
    for _ in range(params.n_perturbations):
        if isinstance(inputs, Tensor):
            yield inputs + 0.1 * torch.randn(inputs.shape).to(inputs.device)
            continue
        ids = inputs["input_ids"].clone()
        for row, mask in zip(ids, inputs["attention_mask"], strict=True):
            span = int(torch.count_nonzero(mask))
            for token in random.sample(range(1, span), params.n_tokens_to_replace):
                row[token] = random.randint(*_TOKENS)
        yield inputs | {"input_ids": ids}


def _record(
    model: nn.Module, inputs: Any, loss_of: Callable[[Any], Tensor], params: Any
) -> tuple[list[nn.Module], Tensor, Tensor]:
    """Layers in the order of registration; activations in the order of calls; losses."""
    text = not isinstance(inputs, Tensor)
    kinds = (nn.Linear,) if text else (nn.Linear, nn.Conv2d)
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, kinds)]
    called: list[Tensor] = []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            called.append(output.mean([0, 2, 3]))
        else:
            called.append(output.mean([0, 1] if text and output.ndim == 3 else 0).flatten())

    hooks = [layer.register_forward_hook(record) for layer in layers]
    rows, losses = [], []
    try:
        with torch.no_grad():
            for draw in _draws(inputs, params):
                called.clear()
                losses.append(loss_of(draw))
                rows.append(torch.cat(called))
    finally:
        for hook in hooks:
            hook.remove()
    return layers, torch.stack(rows), torch.stack(losses)


def _select(activations: Tensor, losses: Tensor, params: Any, n_random: int | None) -> list[int]:
    n_units = activations.shape[1]
    if params.selectionType == "Full":
        return list(range(n_units))
    if params.selectionType == "FOCI":
        find = torch_foci if params.FOCIType == "full" else cheap_torch_foci
        return find(activations, losses)[0]
    n = 1
    if params.selectionType == "Random":
        n = len(torch_foci(activations, losses)[0]) if n_random is None else n_random
    return np.random.permutation(n_units)[:n].tolist()  # noqa: NPY002, the scripts seed this


def _slices(selected: list[int], layers: list[nn.Module]) -> Slices:
    units: Slices = [(layer, k) for layer in layers for k in range(len(layer.weight))]  # type: ignore[arg-type]
    for column in selected:
        if column >= len(units):
            raise IndexError(
                f"column {column} of the activations is beyond the {len(units)} units of the "
                "layers: a layer is called more than once, and the published code ends here"
            )
    return [units[column] for column in selected]


def _vectors(
    gradients: dict, slices: Slices, parameters: dict | None = None
) -> tuple[Tensor, Tensor, Places]:
    """Collect gradients and weights under str(layer); where slices collide, the last one stays."""
    gradient, weights = [], []
    places: Places = {}
    start = 0
    for layer, unit in slices:
        for name, parameter in layer.named_parameters():
            key = str(layer), name
            stored = parameter if parameters is None else parameters[key]
            weights.append(stored[unit].detach().flatten())
            gradient.append(gradients[key][unit].detach().flatten())
            end = start + len(weights[-1])
            places[(*key, unit)] = slice(start, end), parameter
            start = end
    return torch.cat(gradient), torch.cat(weights), places


def _hessian(g: Tensor, g2: Tensor, w: Tensor, w2: Tensor, params: Any) -> Tensor:
    if params.approxType == "Fisher":
        return torch.outer(g, g)
    # PairwiseDistance adds 1e-6 to every difference: not 0 where the weights are the same.
    length = nn.PairwiseDistance(p=1)(w[None], w2[None])
    return torch.outer(g - g2, g - g2) / length


def _newton(gradient: Tensor, weights: Tensor, slices: Slices, params: Any, stem: str) -> Tensor:
    device = torch.device(params.hessian_device)
    g, w = gradient.to(device), weights.to(device)
    n = params.orig_trainset_size
    matrix = _hessian(g, g, w, w, params)  # zero for "FD"
    scale = 1.0
    if params.HessType == "Sekhari":
        (g1, w1), (g2, w2) = (
            _vectors(gradients, slices, parameters)[:2]
            for epoch in (params.train_epochs - 2, params.train_epochs - 1)
            for gradients, parameters in [read_epoch(stem, epoch, device)]
        )
        matrix = (n * _hessian(g1, g2, w1, w2, params) - matrix) / (n - 1)
        scale = 1 / (n - 1)
    matrix = matrix + params.l2_reg * torch.eye(len(matrix), device=device)
    changed = weights + scale * torch.linalg.solve(matrix, g).to(weights.device)
    if params.HessType == "Sekhari":  # for one sample, with L = 1 and M = 0.25
        gamma = 2 * 0.25 / (n**2 * params.l2_reg**3)
        sigma = gamma / params.epsilon * math.sqrt(2 * math.log(1.25 / params.delta))
        changed = changed + torch.normal(torch.zeros(len(changed)), sigma).to(changed.device)
    return changed
