"""The published code's deletion step with its defects, for ``reference_bugs=True``.

Here on purpose: layers and files by ``str(module)``, activations by order of registration, a sample
Hessian of the difference of a gradient with itself, a secant divided by the 1-norm of the step, a
gradient without the regulariser's, noise on the selected weights for one sample, samples beyond
the first (or the first batch) left out. What the code does on PyTorch 2 is what is done; only where
it always ends in an exception is the evident intention taken. ``docs/compat.md`` tells which.
"""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext.compat._scrub_files import getGradObjs, gradNorm, read_epoch
from lcodec_ext.compat.codec import cheap_torch_foci, torch_foci

Slices = list[tuple[nn.Module, int]]
Places = dict[tuple[str, str, int], tuple[slice, nn.Parameter]]
_TOKENS = (999, 30521)  # of DistilBERT's uncased vocabulary, whatever the model's is


def disable_batch_norm(model: nn.Module) -> None:
    """Put all below the model in evaluation mode, but what an attribute calls BatchNorm."""
    for name, child in model.named_children():
        if "BatchNorm" not in name:
            child.eval()
            child.track_running_stats = False  # type: ignore[assignment]


def step(
    model: nn.Module,
    request: Any,
    loss_fn: Callable[[Any, Tensor], Tensor],
    params: Any,
    zero_grad: Callable[[], object],
    stem: str,
    *,
    reid: bool = False,
) -> tuple[Tensor, Tensor, float, float]:
    """Change a model in place; return losses and gradient norms of the request, before and after.

    Parameters
    ----------
    request : tuple or dict
        (inputs, targets), or for text a dict with "input_ids", "attention_mask" and "labels".
    zero_grad : callable
        The optimizer's.
    stem : str
        Of the file names of the training's last two epochs.
    reid : bool
        As for re-identification: activations are taken with the root in training mode, and
        "Random" takes 10 units.
    """
    if isinstance(request, dict):
        inputs: Any = {key: value for key, value in request.items() if key != "labels"}
        targets = request["labels"]
    else:
        inputs, targets = request

    def loss_of(inputs: Any) -> Tensor:
        outputs = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        return loss_fn(getattr(outputs, "logits", outputs), targets)

    if reid:
        model.train()
        disable_batch_norm(model)
    else:
        model.eval()
    layers, activations, losses = _record(model, inputs, loss_of, params)
    slices = _slices(_select(activations, losses, params, 10 if reid else None), layers)

    model.train()
    disable_batch_norm(model)

    def measure() -> tuple[Tensor, float]:
        zero_grad()
        loss = loss_of(inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), gradNorm(model)

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
    """Find the layers, in order of registration, and activations, in order of the calls."""
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
    ends = np.cumsum([len(layer.weight) for layer in layers])  # type: ignore[arg-type]
    found = []
    for column in selected:
        layer = int(np.searchsorted(ends, column, side="right"))
        if layer == len(layers):
            raise IndexError(
                f"column {column} of the activations is beyond the {ends[-1]} units of the layers: "
                "a layer is called more than once, and the published code ends here"
            )
        found.append((layers[layer], column - int(ends[layer] - len(layers[layer].weight))))  # type: ignore[arg-type]
    return found


def _vectors(
    gradients: dict, slices: Slices, parameters: dict | None = None
) -> tuple[Tensor, Tensor, Places]:
    """Collect gradients and weights under str(layer); of slices that collide the last one stays."""
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


def _newton(
    gradient: Tensor,
    weights: Tensor,
    slices: Slices,
    params: Any,
    stem: str,
) -> Tensor:
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
    if params.HessType == "Sekhari":
        sigma = noise_std(1, n, params.l2_reg, params.epsilon, params.delta)
        changed = changed + torch.normal(torch.zeros(len(changed)), sigma).to(changed.device)
    return changed


def noise_std(
    m: int, n: int, l2_reg: float, epsilon: float, delta: float, M: float = 0.25, L: float = 1.0
) -> float:
    """Standard deviation of the noise of Sekhari et al. (2021), by the Gaussian mechanism."""
    gamma = 2 * M * L**2 * m**2 / (n**2 * l2_reg**3)
    return gamma / epsilon * math.sqrt(2 * math.log(1.25 / delta))
