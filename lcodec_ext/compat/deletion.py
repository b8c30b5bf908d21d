"""The deletion step of :mod:`~lcodec_ext.compat.scrub`, without the published code's defects."""

import functools
import weakref
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
from lcodec_ext._torch.states import state_hash
from lcodec_ext.compat.epoch_files import Measured, backward, file_name, of_root, read_epoch
from lcodec_ext.compat.switch import SWITCH
from lcodec_ext.unlearning import (
    IndefiniteCurvatureError,
    Settings,
    TokenReplacement,
    TrainingStatistics,
    UnitSelection,
    unlearn,
)
from lcodec_ext.unlearning.privacy import Guarantee, add_noise, warn_of_noise
from lcodec_ext.unlearning.record import record
from lcodec_ext.unlearning.select import (
    NothingSelectedError,
    ZeroLossError,
    find_candidates,
    select_cheap,
    select_lfoci,
    take,
)

CURVATURES = {"FD": "secant", "Fisher": "fisher", "GaussNewton": "gauss_newton"}
_DRAWS = 16  # of noise
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
            try:
                _change(model, samples, retained, loss_fn, params, stem)
            except (NothingSelectedError, IndefiniteCurvatureError) as error:
                if isinstance(error, IndefiniteCurvatureError) and approx_type(params) != "FD":
                    raise
                what = f"{error}, and the weights stay"
                if not isinstance(error, ZeroLossError):
                    what = f"no step was found for the request, which stays in the model: {error}"
                warn(what)
                return loss_before, loss_before, norm_before, norm_before
            loss_after, norm_after = measure()
        finally:
            model.zero_grad()
    return loss_before, loss_after, norm_before, norm_after


def _change(
    model: nn.Module,
    samples: Samples,
    retained: Any,
    loss_fn: LossFunction,
    params: Any,
    stem: str,
) -> None:
    """Select and step; the parameters have the gradient of the samples."""
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
    _warn_of_sums(before, model, samples, loss_fn, result.guarantee.sigma)


def _warn_of_noise(
    before: nn.Module, samples: Samples, loss_fn: LossFunction, guarantee: Guarantee
) -> None:
    """Warn where noise alone, on the weights before the step, spoils the model.

    Only the samples to delete are known, and the step is meant to raise their loss. There may be
    one, which large noise classifies rightly by chance: the mean over several draws counts.
    """
    if guarantee.sigma > 0:
        was = mean_loss(before, samples, loss_fn, len(samples))
        drawn = [add_noise(before, guarantee.sigma) for _ in range(_DRAWS)]
        now = sum(mean_loss(noisy, samples, loss_fn, len(samples)) for noisy in drawn) / _DRAWS
        warn_of_noise(was, now, guarantee, "the samples to delete, without a step,")


def _warn_of_sums(
    before: nn.Module, after: nn.Module, samples: Samples, loss_fn: LossFunction, sigma: float
) -> None:
    """Say at the first noise that noise adds up, and later where it spoils the model.

    A request that starts where the last one ended has its noise, too. One that starts where the
    last one did is in its place: the script took that back.
    """
    if sigma == 0:
        return
    start, end = (state_hash(dict(model.named_parameters())) for model in (before, after))
    last = _NOISE.get("end"), _NOISE.get("start")
    goes_on = start == last[0]
    times, had = (_NOISE["times"] + 1, _NOISE["sum"]) if goes_on else (1, 0.0)
    if start == last[1]:
        times, had = _NOISE["times"], _NOISE["had"]
    variance = had + sigma**2
    _NOISE.update(start=start, end=end, times=times, had=had, sum=variance)
    if start not in last:
        warn(
            "HessType='Sekhari' puts noise on every parameter at each request, here with standard "
            f"deviation {sigma:.3g}. It adds up: after k requests it is sqrt(k) times as much. "
            "lcodec_ext.unlearning.Unlearner puts noise on releases alone"
        )
    elif goes_on and times in _TOLD:
        noisy = add_noise(before, variance**0.5)
        was, now = (mean_loss(model, samples, loss_fn, len(samples)) for model in (before, noisy))
        if is_much_worse(was, now):
            warn(
                f"the noise of {times} requests together has a standard deviation of "
                f"{variance**0.5:.3g}; as much again raises the mean loss of the samples to delete "
                f"from {was:.3g} to {now:.3g}"
            )


#: Of the last request with noise: hashes of the weights it started from and ended at, how many
#: requests led there, and the sum of the variances of their noise, without its own and with it.
_NOISE: dict[str, Any] = {}
_TOLD = (10, 30, 100, 300, 1000)


def approx_type(params: Any) -> str:
    """What `install` was told, else what the script says."""
    return SWITCH.approx_type or params.approxType


Snapshot = tuple[dict[str, Tensor], dict[str, Tensor]]  # parameters and gradient


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
    found = "no positive curvature: the change of the gradient times that of the parameters is "
    if retained is not None:
        names = [file_name(stem, epoch, "params") for epoch in (epochs - 2, epochs - 1)]
        about = f"{names[0]} and {names[1]} belong to gradients that hold {found}{curvature:.3g}"
        snapshots = _computed(model, samples, retained, loss_fn, snapshots, about)
        curvature = _curvature(snapshots)
        if curvature > 0:
            return snapshots
    raise ValueError(
        f"the files {file_name(stem, epochs - 2, '*')} and {file_name(stem, epochs - 1, '*')} "
        f"hold {found}{curvature:.3g}. Gradients that the published code wrote are not those of "
        "the training set; or the training has not settled. Write the files with do_epoch of this "
        "module and train longer, or pass retained= and params.approxType='GaussNewton'"
    )


def _computed(
    model: nn.Module,
    samples: Samples,
    retained: Any,
    loss_fn: LossFunction,
    snapshots: list[Snapshot],
    about: str,
) -> list[Snapshot]:
    """The same weights with gradients over the samples that stay and those to delete.

    Those of the last training set are remembered, as far as a secant needs them: later removals of
    a script are from the same one.
    """
    weights = [parameters for parameters, _ in snapshots]
    hashes = [state_hash(each) for each in (*weights, dict(model.named_buffers()))]
    owners = [_owner_of_data(retained), *_owners_of_loss(loss_fn)]
    if hashes != _COMPUTED.get("hashes") or not _are(owners, _COMPUTED["owners"]):
        warn(
            f"the files {about}. They are computed at the weights in these files, over the samples "
            "that stay and those to delete"
        )
        data = [as_samples(retained, "retained", *place(model)), samples]
        first, second = (_gradient(model, at, data, loss_fn) for at in weights)
        change = {name: (second[name] - g).cpu() for name, g in first.items()}
        _COMPUTED.update(hashes=hashes, owners=[_weak(each) for each in owners], change=change)
    device = next(model.parameters()).device
    change = {name: g.to(device) for name, g in _COMPUTED["change"].items()}
    none = {name: torch.zeros_like(g) for name, g in change.items()}
    return [(weights[0], none), (weights[1], change)]


#: The last that was computed: hashes of both weights and of the buffers, weak references to the
#: training set and the loss, and the change of the gradient, on the CPU.
_COMPUTED: dict[str, Any] = {}


def _owner_of_data(retained: Any) -> Any:
    """The training set that samples are a part of, or by what `getDatasets` reads it."""
    while (whole := getattr(retained, "dataset", None)) is not None:
        retained = whole
    return getattr(retained, "_origin", retained)


def _owners_of_loss(loss_fn: LossFunction) -> list[Any]:
    """The criterion, and the engine that computes it."""
    if isinstance(loss_fn, functools.partial):
        return [*_owners_of_loss(loss_fn.func), *loss_fn.args]
    return [getattr(loss_fn, "__self__", loss_fn)]


def _weak(thing: Any) -> Any:
    """A function that returns it while it is alive; a tuple is kept."""
    if isinstance(thing, tuple):
        return lambda: thing
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: None


def _are(things: list[Any], weak: list[Any]) -> bool:
    """Whether these are the things that are referred to."""
    known = [reference() for reference in weak]
    return len(known) == len(things) and all(
        a is not None and (a is b or (isinstance(a, tuple) and a == b))
        for a, b in zip(known, things, strict=True)
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
