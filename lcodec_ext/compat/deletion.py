"""The deletion step of :mod:`~lcodec_ext.compat.scrub`, without the published code's defects."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_integer, check_real
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.loss import (
    LossFunction,
    is_much_worse,
    mean_gradient,
    mean_loss,
    named_trainable,
)
from lcodec_ext._torch.modes import evaluating, place
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of
from lcodec_ext.compat.epoch_files import Measured, backward, file_name, of_root, read_epoch
from lcodec_ext.compat.switch import SWITCH
from lcodec_ext.unlearning import (
    Settings,
    TokenReplacement,
    TrainingStatistics,
    UnitSelection,
    unlearn,
)
from lcodec_ext.unlearning.privacy import Guarantee, add_noise, warn_of_noise
from lcodec_ext.unlearning.record import record
from lcodec_ext.unlearning.select import (
    ZeroLossError,
    find_candidates,
    select_cheap,
    select_lfoci,
    take,
)

CURVATURES = {"FD": "secant", "Fisher": "fisher", "GaussNewton": "gauss_newton"}
_BERT_UNCASED, _FIRST_WORD = 30522, 999  # before it: special and unused tokens, and characters


def step(
    model: nn.Module, request: Any, retained: Any, loss_fn: LossFunction, params: Any, stem: str
) -> Measured:
    """Change a model in place; return losses and gradient norms of the request, before and after.

    The request is a batch (inputs, targets), or a dict of tensors with "labels". "Fisher" and
    "GaussNewton" need `retained`, a Dataset; "FD" reads the files that begin with `stem`.
    """
    samples = as_samples(request, "dataset", *place(model))
    batch = samples.fetch(slice(None))

    def measure() -> tuple[Tensor, float]:
        model.zero_grad()
        return backward(loss_fn(outputs_of(model, batch), batch.targets), model)

    with evaluating(model):
        try:
            loss_before, norm_before = measure()
            seed = int(torch.randint(2**62, ()))  # manual_seed governs it
            try:
                selection = _select(model, samples, loss_fn, params, seed)
            except ZeroLossError as error:
                warn(f"{error}: no unit is selected and changed")
                return loss_before, loss_before, norm_before, norm_before
            if params.order == "BP":
                gradient = {
                    name: torch.zeros_like(p) if p.grad is None else p.grad
                    for name, p in model.named_parameters()
                }
                ascent = selection.gather(gradient, model=model)
                selection.add_(model, check_real(params.lr, "params.lr", 0) * ascent)
            else:
                _newton(model, samples, retained, loss_fn, params, selection, stem, seed)
            loss_after, norm_after = measure()
        finally:
            model.zero_grad()
    return loss_before, loss_after, norm_before, norm_after


# ---------------------------------------------------------------------------------------------
# Which units


def _select(
    model: nn.Module, samples: Samples, loss_fn: LossFunction, params: Any, seed: int
) -> UnitSelection:
    if params.selectionType == "Full":
        return UnitSelection.all(model)
    settings = Settings.preset("paper")
    candidates = find_candidates(model, settings)
    selected = [("", 0)]  # "One"
    if params.selectionType != "One":
        batch, perturb = samples.fetch(slice(None)), None
        if batch.kwargs:
            perturb = word_replacement(model, batch, params.n_tokens_to_replace)
        recording = record(
            model,
            samples,
            loss_fn,
            n_perturbations=params.n_perturbations,
            perturb=perturb,
            units=candidates.selection,
            seed=seed,
        )
        if params.selectionType == "FOCI" and params.FOCIType == "cheap":
            selected, _ = select_cheap(recording)
        else:
            selected, _ = select_lfoci(recording, seed=seed)
    if params.selectionType != "FOCI":  # as many, at random
        units = [(layer, k) for layer, units in candidates.selection.units.items() for k in units]
        chosen = np.random.default_rng(seed).choice(len(units), len(selected), replace=False)
        selected = [units[k] for k in chosen]
    return take(selected, candidates, settings, 0)


def word_replacement(model: nn.Module, texts: Batch, n_tokens: int) -> TokenReplacement:
    """Replace words by words. Padding and the first and the last token of each text stay."""
    ids, mask = texts.kwargs["input_ids"], texts.kwargs["attention_mask"] != 0
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    special = torch.cat([ids[:, 0], ids.gather(1, last).flatten(), ids[~mask]])
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not embeddings:
        raise ValueError("is_nlp=True needs a model with an nn.Embedding of tokens; it has none")
    # The largest one: there are more tokens than positions or token types.
    n = max(embedding.num_embeddings for embedding in embeddings)
    words = range(_FIRST_WORD, n) if n == _BERT_UNCASED else range(n)
    return TokenReplacement(
        token_ids=words, special_ids=sorted(set(special.tolist())), n_tokens=n_tokens
    )


# ---------------------------------------------------------------------------------------------
# The Newton step


def _newton(
    model: nn.Module,
    samples: Samples,
    retained: Any,
    loss_fn: LossFunction,
    params: Any,
    selection: UnitSelection,
    stem: str,
    seed: int,
) -> None:
    n = check_integer(params.orig_trainset_size, "params.orig_trainset_size", len(samples) + 1)
    approx = approx_type(params)
    secant = approx == "FD"
    options: dict[str, Any] = {}
    if secant:
        check_integer(params.train_epochs, "params.train_epochs", 2)
        snapshots = _snapshots(model, samples, retained, loss_fn, stem, params.train_epochs)
        options["statistics"] = TrainingStatistics.from_epochs(snapshots, n)
    elif retained is None:
        raise ValueError(
            f"approxType={approx!r} needs the training samples that stay: pass retained=, a "
            "dataset like that of the samples to delete. Scripts do without where they delete a "
            "Subset of the dataset from which they make a SubsetDataWrapper of the others"
        )
    if params.HessType == "Sekhari" and params.delta < 1:  # with delta = 1 any release will do
        options |= {"epsilon": params.epsilon, "delta": params.delta}
    before = copy_of(model)
    result = unlearn(
        model,
        samples,
        None if secant else retained,
        loss_fn,
        preset="paper",
        selection=selection,
        curvature=CURVATURES[approx],
        weight_decay=params.l2_reg,
        damping=0.0,
        seed=seed,
        inplace=True,
        **options,
    )
    if secant:  # with retained samples, `unlearn` warns
        _warn_of_noise(before, samples, loss_fn, result.guarantee)
    _warn_of_sums(before, samples, loss_fn, result.guarantee, params)


def _warn_of_noise(
    before: nn.Module, samples: Samples, loss_fn: LossFunction, guarantee: Guarantee
) -> None:
    """Warn where noise alone, on the weights before the step, spoils the model.

    Only the samples to delete are known, and the step is meant to raise their loss.
    """
    if guarantee.sigma > 0:
        noisy = add_noise(before, guarantee.sigma)
        was, now = (mean_loss(model, samples, loss_fn, len(samples)) for model in (before, noisy))
        warn_of_noise(was, now, guarantee, "the samples to delete, without a step,")


def _warn_of_sums(
    before: nn.Module, samples: Samples, loss_fn: LossFunction, guarantee: Guarantee, params: Any
) -> None:
    """Say at the first noise that noise adds up, and later where it spoils the model."""
    if guarantee.sigma == 0:
        return
    again = _NOISE["params"] is params
    times = _NOISE["times"] + 1 if again else 1
    variance = guarantee.sigma**2 + (_NOISE["variance"] if again else 0.0)
    _NOISE.update(params=params, times=times, variance=variance)
    if times == 1:
        warn(
            "HessType='Sekhari' puts noise on every parameter at each request, here with standard "
            f"deviation {guarantee.sigma:.3g}. It adds up: after k requests it is sqrt(k) times as "
            "much. lcodec_ext.unlearning.Unlearner puts noise on releases alone",
        )
    elif times in _TOLD:
        noisy = add_noise(before, variance**0.5)
        was, now = (mean_loss(model, samples, loss_fn, len(samples)) for model in (before, noisy))
        if is_much_worse(was, now):
            warn(
                f"the noise of {times} requests together has a standard deviation of "
                f"{variance**0.5:.3g}; as much again raises the mean loss of the samples to delete "
                f"from {was:.3g} to {now:.3g}",
            )


#: Of the last request with noise: its params, how many there were with these, and the sum of their
#: variances.
_NOISE: dict[str, Any] = {"params": None, "times": 0, "variance": 0.0}
_TOLD = (10, 30, 100, 300, 1000)


def approx_type(params: Any) -> str:
    """What `install` was told, else what the script says."""
    return SWITCH.approx_type or params.approxType


Snapshot = tuple[dict[str, Tensor], dict[str, Tensor]]  # parameters and gradient
_COMPUTED: dict[Any, list[Snapshot]] = {}  # of the files that were last found without a gradient


def _snapshots(
    model: nn.Module,
    samples: Samples,
    retained: Any,
    loss_fn: LossFunction,
    stem: str,
    epochs: int,
) -> list[Snapshot]:
    """Weights and gradients of the last two epochs, of positive curvature.

    They come from the files. Gradients that are zero or cannot be those of the training set are
    computed at the weights in the files, once, if the samples that stay are known.
    """
    device = next(model.parameters()).device
    snapshots: list[Snapshot] = []
    for epoch in (epochs - 2, epochs - 1):
        gradients, parameters = (
            of_root(bank, model, file_name(stem, epoch, what))
            for bank, what in zip(read_epoch(stem, epoch, device), ("grads", "params"), strict=True)
        )
        snapshots.append((parameters, gradients))
    curvature = _curvature(snapshots)
    if curvature > 0:
        return snapshots
    names = [file_name(stem, epoch, "params") for epoch in (epochs - 2, epochs - 1)]
    found = "no positive curvature: the change of the gradient times that of the parameters is "
    if retained is not None:
        key = tuple((os.path.abspath(name), os.stat(name).st_mtime_ns) for name in names)
        if key not in _COMPUTED:
            warn(
                f"the files {names[0]} and {names[1]} belong to gradients that hold {found}"
                f"{curvature:.3g}. They are computed at the weights in these files, over the "
                "samples that stay and those to delete",
            )
            data = [as_samples(retained, "retained", *place(model)), samples]
            computed = [(at, _gradient(model, at, data, loss_fn)) for at, _ in snapshots]
            _COMPUTED.clear()
            _COMPUTED[key] = computed
        snapshots = _COMPUTED[key]
        curvature = _curvature(snapshots)
        if curvature > 0:
            return snapshots
    raise ValueError(
        f"the files {file_name(stem, epochs - 2, '*')} and {file_name(stem, epochs - 1, '*')} "
        f"hold {found}{curvature:.3g}. Gradients that the published code wrote are not those of "
        "the training set; or the training has not settled. Write the files with do_epoch of this "
        "module and train longer, or pass retained= and params.approxType='GaussNewton'"
    )


def _curvature(snapshots: list[Snapshot]) -> float:
    (w1, g1), (w2, g2) = snapshots
    return sum(float(((w2[k] - w1[k]) * (g2[k] - g1[k])).sum()) for k in w1)


def _gradient(
    model: nn.Module, weights: dict[str, Tensor], data: list[Samples], loss_fn: LossFunction
) -> dict[str, Tensor]:
    """The mean gradient over samples in parts, at other weights."""
    other, n = copy_of(model), sum(map(len, data))
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
    trained = named_trainable(other)
    gradient = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    for samples in data:
        for name, g in mean_gradient(other, samples, loss_fn, trained, 256)[1].items():
            gradient[name] += g * (len(samples) / n)
    return gradient
