"""The deletion step of :mod:`~lcodec_ext.compat.scrub`, without the published code's defects."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_integer, check_real
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.loss import LossFunction, mean_loss
from lcodec_ext._torch.modes import evaluating, place
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of
from lcodec_ext.compat.epoch_files import Measured, backward, file_name, of_root, read_epoch
from lcodec_ext.unlearning import (
    Settings,
    TokenReplacement,
    TrainingStatistics,
    UnitSelection,
    unlearn,
)
from lcodec_ext.unlearning.privacy import Guarantee, add_noise, warn_of_noise
from lcodec_ext.unlearning.record import record
from lcodec_ext.unlearning.select import find_candidates, select_cheap, select_lfoci, take

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
            selection = _select(model, samples, loss_fn, params, seed)
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
    secant = params.approxType == "FD"
    options: dict[str, Any] = {}
    if secant:
        check_integer(params.train_epochs, "params.train_epochs", 2)
        options["statistics"] = _statistics(model, stem, params.train_epochs, n)
    elif retained is None:
        raise ValueError(
            f"params.approxType={params.approxType!r} needs the training samples that stay: pass "
            "retained=, a dataset like that of the samples to delete"
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
        curvature=CURVATURES[params.approxType],
        weight_decay=params.l2_reg,
        damping=0.0,
        seed=seed,
        inplace=True,
        **options,
    )
    if secant:  # with retained samples, `unlearn` warns
        _warn_of_noise(before, samples, loss_fn, result.guarantee)


def _warn_of_noise(
    before: nn.Module, samples: Samples, loss_fn: LossFunction, guarantee: Guarantee
) -> None:
    """Warn where noise alone, on the weights before the step, spoils the model.

    Only the samples to delete are known, and the step is meant to raise their loss.
    """
    if guarantee.sigma > 0:
        noisy = add_noise(before, guarantee.sigma)
        was, now = (mean_loss(model, samples, loss_fn, len(samples)) for model in (before, noisy))
        warn_of_noise(was, now, guarantee, "the samples to delete, without a step,", stacklevel=5)


def _statistics(model: nn.Module, stem: str, epochs: int, n: int) -> TrainingStatistics:
    """The secant pair that the files of the last two epochs determine."""
    device = next(model.parameters()).device
    snapshots = []
    for epoch in (epochs - 2, epochs - 1):
        gradients, parameters = (
            of_root(bank, model, file_name(stem, epoch, what))
            for bank, what in zip(read_epoch(stem, epoch, device), ("grads", "params"), strict=True)
        )
        snapshots.append((parameters, gradients))
    (w1, g1), (w2, g2) = snapshots
    curvature = sum(float(((w2[k] - w1[k]) * (g2[k] - g1[k])).sum()) for k in w1)
    if not curvature > 0:
        raise ValueError(
            f"the files {file_name(stem, epochs - 2, '*')} and {file_name(stem, epochs - 1, '*')} "
            "hold no positive curvature: the change of the gradient times that of the parameters "
            f"is {curvature:.3g}. Gradients that the published code wrote are not those of the "
            "training set; or the training has not settled. Write the files with do_epoch of this "
            "module and train longer, or pass retained= and params.approxType='GaussNewton'"
        )
    return TrainingStatistics.from_epochs(snapshots, n)
