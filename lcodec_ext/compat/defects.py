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

from lcodec_ext._callers import warn
from lcodec_ext._torch.batches import map_tensors
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
from lcodec_ext.compat.steps import (
    Slices,
    getHessian,
    getVectorizedGrad,
    reverseLinearIndexingToLayers,
    updateModelParams,
)
from lcodec_ext.unlearning.select import no_unit

_TOKENS = (999, 30521)  # of DistilBERT's uncased vocabulary, whatever the model's is


class GradientBank:
    """The gradients that training adds up: each batch's once for every key of its parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._bank: Bank = {}

    def add(self) -> None:
        """Add the gradients that the model has now."""
        of_batch = getGradObjs(self._model, reference_bugs=True)[0]
        if not self._bank:
            self._bank = of_batch
            return
        for key in self._bank:
            self._bank[key] += of_batch[key]  # in place, and keys share their tensors

    def write(self, stem: str, epoch: int, n: int) -> None:
        """Write the sums over n samples, and the parameters."""
        means = {key: g / n for key, g in self._bank.items()}
        write_epoch(stem, epoch, means, getGradObjs(self._model, reference_bugs=True)[1])


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
    stepped: nn.Module | None = None,
) -> Measured:
    """Change a model in place; return losses and gradient norms of the request, before and after.

    The request is a batch (inputs, targets), or a dict of tensors with "labels". `zero_grad` is the
    optimizer's. `reid` means re-identification: activations are recorded with the root in training
    mode, and "Random" takes 10 units. `stepped` is the face code's copy of the model: it takes a
    gradient step, and the sample's Hessian is the difference of both gradients. Elsewhere that is
    the difference of a gradient with itself.
    """
    if isinstance(request, dict):
        inputs: Any = {key: value for key, value in request.items() if key != "labels"}
        targets = request["labels"]
    else:
        inputs, targets = request

    def loss_of(inputs: Any) -> Tensor:
        return _loss(model, inputs, targets, loss_fn)

    def measure() -> tuple[Tensor, float]:
        zero_grad()
        return backward(loss_of(inputs), model)

    model.train(reid)
    if reid:
        disable_batch_norm(model)
    layers, activations, losses = _record(model, inputs, loss_of, params)
    selected = _select(activations, losses, params, 10 if reid else None)
    slices = reverseLinearIndexingToLayers(selected, layers)

    model.train()
    disable_batch_norm(model)
    loss_before, norm_before = measure()
    if not slices:
        warn(f"{no_unit('the request', float(losses[0]))}, and the weights stay")
        model.zero_grad()
        return loss_before, loss_before, norm_before, norm_before
    gradient, weights, places = _vectors(model, slices, getGradObjs(model, reference_bugs=True)[0])
    model.zero_grad()
    if params.order == "Hessian":
        after = gradient, weights
        if stepped is not None:
            after = _after_a_step(stepped, inputs, targets, loss_fn, selected, weights.device)
        changed = _newton(model, (gradient, weights), after, slices, params, stem)
    else:
        changed = weights + params.lr * gradient
    updateModelParams(changed, places, model)
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


def _loss(model: nn.Module, inputs: Any, targets: Any, loss_fn: LossFunction) -> Tensor:
    outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return loss_fn(getattr(outputs, "logits", outputs), targets)


def _vectors(
    model: nn.Module, slices: Slices, gradients: Bank, parameters: Bank | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Collect gradients and weights under str(layer); where slices collide, the last one stays."""
    device = next(model.parameters()).device
    return getVectorizedGrad(gradients, model, slices, device, parameters, reference_bugs=True)


def _after_a_step(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: LossFunction,
    selected: list[int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Gradient and weights of the selected units of a copy, after a gradient step of 0.001."""
    own = next(model.parameters()).device
    inputs, targets = map_tensors(lambda tensor: tensor.to(own), (inputs, targets))
    model.train()
    disable_batch_norm(model)
    optim = torch.optim.SGD(model.parameters(), lr=1e-3)
    for take in (optim.step, None):
        optim.zero_grad()
        backward(_loss(model, inputs, targets, loss_fn), model)
        if take is not None:
            take()
    kinds = (nn.Linear,) if isinstance(inputs, dict) else (nn.Linear, nn.Conv2d)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    slices = reverseLinearIndexingToLayers(selected, layers)
    gradient, weights, _ = _vectors(model, slices, getGradObjs(model, reference_bugs=True)[0])
    return gradient.to(device), weights.to(device)


def _newton(
    model: nn.Module,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    slices: Slices,
    params: Any,
    stem: str,
) -> Tensor:
    device = torch.device(params.hessian_device)
    (g, w), (gs, ws) = ([each.to(device) for each in pair] for pair in (before, after))
    weights, n = before[1], params.orig_trainset_size

    def hessian(g: Tensor, g2: Tensor, w: Tensor, w2: Tensor) -> Tensor:
        return getHessian(g, g2, params.approxType, w, w2, device, reference_bugs=True)

    matrix = hessian(g, gs, w, ws)  # zero for "FD", but for faces
    scale = 1.0
    if params.HessType == "Sekhari":
        (g1, w1), (g2, w2) = (
            _vectors(model, slices, gradients, parameters)[:2]
            for epoch in (params.train_epochs - 2, params.train_epochs - 1)
            for gradients, parameters in [read_epoch(stem, epoch, weights.device)]
        )
        old = hessian(*(each.to(device) for each in (g1, g2, w1, w2)))
        matrix = (n * old - matrix) / (n - 1)
        scale = 1 / (n - 1)
    matrix = matrix + params.l2_reg * torch.eye(len(matrix), device=device)
    changed = weights + scale * torch.linalg.solve(matrix, g).to(weights.device)
    if params.HessType == "Sekhari":  # for one sample, with L = 1 and M = 0.25
        gamma = 2 * 0.25 / (n**2 * params.l2_reg**3)
        sigma = gamma / params.epsilon * math.sqrt(2 * math.log(1.25 / params.delta))
        changed = changed + torch.normal(torch.zeros(len(changed)), sigma).to(changed.device)
    return changed
