"""Drop-in for what scripts import from ``scrub/`` of vsingh-group/LCODEC-deep-unlearning.

That repository has these names in its modules ``scrub_tools``, ``vgg_scrub_tools``, ``nn_utils``,
``grad_utils`` and ``data_utils``; argument orders, return tuples and files are as there. What it
computes wrongly is computed rightly here, unless ``reference_bugs=True`` is passed:
``docs/compat.md`` has the table.

**The parameters object.** ``params`` is what the scripts' ``argparse`` makes. Read from it are

=====================  ========================================================================
n_perturbations        perturbations of the request
n_tokens_to_replace    of every text in a perturbation (text only)
selectionType          "Full", "FOCI", "Random" (as many units as FOCI finds) or "One" (at random)
FOCIType               "full" or "cheap", with "FOCI"
order                  "Hessian", a Newton step, or "BP", ``lr`` times the gradient
HessType               "Sekhari", with noise for (epsilon, delta) on the result, or "CR", without
approxType             "FD", the secant of the last two epochs' gradients, from their files;
                       "Fisher", of the retained samples; or, not known to the published code,
                       "GaussNewton", of the retained samples
train_epochs           number of epochs of the training, for the names of the files ("FD")
orig_trainset_size     n, the number of samples that the model was trained on
l2_reg                 lambda of the trained objective, mean loss + (lambda / 2) |w|^2
epsilon, delta         of the noise ("Sekhari")
lr                     of order "BP"
scrub_batch_size       with `reference_bugs`: None takes the first sample of the request
hessian_device         with `reference_bugs`: where the dense matrix is solved
=====================  ========================================================================

**The files.** Training writes, for each of its last two epochs, counted from 0,
``<outString>_epoch_<epoch>_params.pt`` and ``<outString>_epoch_<epoch>_grads.pt``: dicts from
(str(module), parameter name) to the parameter and to its mean gradient, for every module and every
parameter below it. :func:`do_epoch` writes them.
"""

try:
    import torch
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.compat.scrub needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, default_collate

from lcodec_ext._checks import check_bool, check_choice, check_integer, check_real
from lcodec_ext._torch.batches import Batch
from lcodec_ext._torch.loss import mean_loss
from lcodec_ext._torch.samples import Samples, as_samples, outputs_of
from lcodec_ext.compat import _scrub_defects as defects
from lcodec_ext.compat._scrub_files import (
    file_name,
    getGradObjs,
    gradNorm,
    of_root,
    read_epoch,
    write_epoch,
)
from lcodec_ext.unlearning import (
    Settings,
    TrainingStatistics,
    UnitSelection,
    UnlearnResult,
    unlearn,
)
from lcodec_ext.unlearning.privacy import Guarantee, add_noise
from lcodec_ext.unlearning.privacy.noise import warn_of_noise
from lcodec_ext.unlearning.record import TokenReplacement, record
from lcodec_ext.unlearning.select import find_candidates, select_cheap, select_lfoci

_CURVATURES = {"FD": "secant", "Fisher": "fisher", "GaussNewton": "gauss_newton"}
_BERT_UNCASED, _FIRST_WORD = 30522, 999  # before it are special and unused tokens and characters

Measured = tuple[Tensor, Tensor, float, float]  # loss before and after, gradient norm likewise

__all__ = [
    "DisableBatchNorm",
    "SubsetDataWrapper",
    "do_epoch",
    "getGradObjs",
    "gradNorm",
    "inp_perturb",
    "manual_seed",
    "reid_inp_perturb",
    "retrain_model",
    "scrubSample",
    "vgg_inp_perturb",
]

# ---------------------------------------------------------------------------------------------
# Training


def manual_seed(seed: int) -> None:
    """Seed NumPy's global generator, `random` and PyTorch; make cuDNN deterministic."""
    np.random.seed(seed)  # noqa: NPY002, the scripts draw from it
    random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def DisableBatchNorm(model: nn.Module) -> nn.Module:
    """Put the batch norms of a model, and nothing else, in evaluation mode; return the model."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


class SubsetDataWrapper(Dataset):
    """Some samples of a dataset, or all but some.

    Parameters
    ----------
    dataset : Dataset
    exclude_indices, include_indices : sequence of int, optional
        One of them. `include_indices` is taken in its order, and goes before.
    """

    def __init__(
        self,
        dataset: Any,
        exclude_indices: Iterable[int] | None = None,
        include_indices: Sequence[int] | None = None,
    ) -> None:
        if include_indices is None:
            if exclude_indices is None:
                raise ValueError("exclude_indices or include_indices must be given; both are None")
            left_out = {int(i) for i in exclude_indices}
            include_indices = [i for i in range(len(dataset)) if i not in left_out]
        self.dataset, self.include_indices = dataset, include_indices

    def __len__(self) -> int:
        return len(self.include_indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.include_indices[index]]


def do_epoch(
    model: nn.Module,
    dataloader: Any,
    criterion: Callable[[Any, Any], Tensor],
    epoch: int,
    nepochs: int,
    optim: torch.optim.Optimizer | None = None,
    device: Any = "cpu",
    outString: str = "",
    compute_grads: bool = False,
    retrain: bool = False,
    *,
    reference_bugs: bool = False,
) -> tuple[float, ...]:
    """Train for an epoch, or evaluate; the last two epochs of a training are written to files.

    Parameters
    ----------
    model : Module
        Put in training mode with an optimizer, in evaluation mode without.
    dataloader : DataLoader
        Of pairs (inputs, class indices).
    criterion : callable
        From (outputs, targets) to the mean loss of a batch.
    epoch, nepochs : int
        The number of this epoch, from 0, and of epochs in all.
    optim : Optimizer, optional
        Without one the model is evaluated.
    device : device
        To which batches are moved.
    outString : str
        How the names of the files begin.
    compute_grads : bool
        In an evaluation, measure the gradient too.
    retrain : bool
        Write no files.
    reference_bugs : bool
        As the published code does: the file's gradients are the first batch's plus d times those of
        the others, at weights that move, over the number of samples (d: modules that contain the
        parameter); losses are means of batch means, and the gradient norm is a mean of batch norms.

    Returns
    -------
    mean_loss, mean_accuracy : float
        Means over the samples, while training at the weights that each batch met.
    mean_gradnorm : float
        With `compute_grads`: the norm of the mean loss' gradient.

    Notes
    -----
    The files' gradients are those of the mean loss at the weights in the files, in evaluation mode,
    so that differences between them belong to the differences of the weights. This takes one more
    pass over `dataloader`; PyTorch's random state is kept.
    """
    check_bool(reference_bugs, "reference_bugs")
    saves = optim is not None and not retrain and epoch >= nepochs - 2
    model.train(optim is not None)
    bank: dict[tuple[str, str], Any] | None = None
    gradient = [torch.zeros_like(p) for p in model.parameters()]
    loss_sum, loss_of_batches, norms, correct, n, n_batches = 0.0, 0.0, 0.0, 0.0, 0, 0
    for x, y in dataloader:
        x, y = x.to(device), y.to(device)
        outputs = model(x)
        loss = criterion(outputs, y)
        if optim is not None:
            optim.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optim.step()
            if saves and reference_bugs:
                of_batch = getGradObjs(model)[0]
                if bank is None:
                    bank = of_batch
                else:
                    for key in bank:
                        bank[key] += of_batch[key]  # in place, once for each of its keys
        elif compute_grads:
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norms += gradNorm(model)
            _accumulate(gradient, model, len(y))
        n += len(y)
        n_batches += 1
        loss_of_batches += loss.item()
        loss_sum += loss.item() * len(y)
        correct += (outputs.max(1)[1] == y).sum().item()

    if saves and reference_bugs and bank is not None:
        bank = {key: g / n for key, g in bank.items()}
        write_epoch(outString, epoch, bank, getGradObjs(model)[1])
    elif saves:
        _write_gradient(model, dataloader, criterion, device, outString, epoch)
    measured = (loss_of_batches / n_batches if reference_bugs else loss_sum / n, correct / n)
    if not compute_grads:
        return measured
    model.zero_grad()
    norm = float(sum((g / n).double().norm() ** 2 for g in gradient)) ** 0.5
    return (*measured, norms / n_batches if reference_bugs else norm)


def _accumulate(gradient: list[Tensor], model: nn.Module, size: int) -> None:
    for total, p in zip(gradient, model.parameters(), strict=True):
        if p.grad is not None:
            total += size * p.grad


def _write_gradient(
    model: nn.Module,
    dataloader: Any,
    criterion: Callable[[Any, Any], Tensor],
    device: Any,
    stem: str,
    epoch: int,
) -> None:
    """Write the gradient of the mean loss at the model's weights, and these."""
    model.eval()
    gradient = [torch.zeros_like(p) for p in model.parameters()]
    n = 0
    generators = [g for g in {getattr(dataloader, "generator", None)} if g is not None]
    states = [generator.get_state() for generator in generators]
    with torch.random.fork_rng(devices=[]):
        for x, y in dataloader:
            model.zero_grad()
            loss = criterion(model(x.to(device)), y.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            _accumulate(gradient, model, len(y))
            n += len(y)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    for p, total in zip(model.parameters(), gradient, strict=True):
        p.grad = total / n if p.requires_grad else None
    write_epoch(stem, epoch, *getGradObjs(model))
    model.zero_grad()
    model.train()


def retrain_model(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    criterion: Callable[[Any, Any], Tensor],
    nepochs: int,
    optim: torch.optim.Optimizer,
    device: Any = "cpu",
) -> tuple[float, float, float, float, float]:
    """Train a model with a cosine schedule of period 200, and evaluate it.

    Returns
    -------
    val_loss, val_accuracy, train_loss, train_accuracy, train_gradnorm : float
        As :func:`do_epoch` measures them after training.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=200)
    for epoch in range(nepochs):
        do_epoch(model, train_loader, criterion, epoch, nepochs, optim, device, retrain=True)
        schedule.step()
    with torch.no_grad():
        val_loss, val_accuracy = do_epoch(model, val_loader, criterion, 0, 0, device=device)
    loss, accuracy, norm = do_epoch(
        model, train_loader, criterion, 0, 0, device=device, compute_grads=True
    )
    return val_loss, val_accuracy, loss, accuracy, norm


# ---------------------------------------------------------------------------------------------
# Deletion


def scrubSample(*_: Any, **__: Any) -> NoReturn:
    """Refuse: a name that scripts import, and that ended the process where it came from."""
    raise NotImplementedError("scrubSample was withdrawn by the published code; use inp_perturb")


def inp_perturb(
    model: nn.Module,
    dataset: Any,
    criterion: Callable[[Any, Tensor], Tensor],
    params: Any,
    optim: torch.optim.Optimizer | None,
    device: Any,
    outString: str,
    is_nlp: bool = False,
    *,
    retained: Any = None,
    reference_bugs: bool = False,
) -> tuple[int, dict[str, Any], Tensor, Tensor, float, float]:
    """Delete samples from a model: perturb them, select units, step on these units' parameters.

    Parameters
    ----------
    model : Module
        On `device`; changed in place.
    dataset : Dataset
        The samples to delete, all of them: pairs (input, target), or with `is_nlp` tuples
        (input_ids, attention_mask, anything, labels).
    criterion : callable
        From (outputs, targets) to the mean loss of a batch.
    params : object
        The attributes that the module lists.
    optim : Optimizer, optional
        Not needed; with `reference_bugs` its gradients are set to zero.
    device : device
    outString : str
        How the names of the files begin that hold the last two epochs' gradients.
    is_nlp : bool
        Whether to call the model as ``model(input_ids=..., attention_mask=...)`` and to replace
        tokens for a perturbation, not to add noise.
    retained : Dataset, optional
        The training samples that stay, as `dataset`; for "Fisher" and "GaussNewton".
    reference_bugs : bool
        Do what the published code does, its defects included.

    Returns
    -------
    foci_val : int
        Always 0: there is nothing left to repeat.
    state_dict : dict
        The model's: its tensors are the model's own.
    loss_before, loss_after : Tensor
        Mean loss of the samples, 0-d, without the regulariser.
    gradnorm_before, gradnorm_after : float
        Norm of its gradient by all parameters.

    Raises
    ------
    FileNotFoundError
        If a file of the last two epochs is missing.
    ValueError, TypeError, AttributeError
        For params that lack an attribute or have a value that is not listed, files of another
        model, and what `lcodec_ext.unlearning.unlearn` refuses.
    """
    _check(params, reference_bugs)
    given, kept = (_Picked(samples, _text if is_nlp else tuple) for samples in (dataset, retained))
    if reference_bugs:
        zero_grad = model.zero_grad if optim is None else optim.zero_grad
        request = _collated(given, params.scrub_batch_size or 1, device)
        measured = defects.step(model, request, criterion, params, zero_grad, outString)
    else:
        measured = _delete(model, given, kept, criterion, params, device, outString)
    return 0, model.state_dict(), *measured


def reid_inp_perturb(
    model: nn.Module,
    dataset: Any,
    engine: Any,
    params: Any,
    device: Any,
    outString: str,
    *,
    retained: Any = None,
    reference_bugs: bool = False,
) -> tuple[dict[str, Any], Tensor, Tensor, float, float]:
    """:func:`inp_perturb` for the models of torchreid, which classify in training mode only.

    Parameters
    ----------
    model, params, device, outString, reference_bugs
        As there. The root of the model is in training mode when it is called, all below it in
        evaluation mode.
    dataset : Dataset
        The samples to delete: dicts with "img" and "pid".
    engine : object
        With ``criterion`` and ``compute_loss(criterion, outputs, targets)``.
    retained : Dataset, optional
        As `dataset`.

    Returns
    -------
    state_dict, loss_before, loss_after, gradnorm_before, gradnorm_after
        As there, without `foci_val`.
    """
    _check(params, reference_bugs)

    def loss_fn(outputs: Any, targets: Tensor) -> Tensor:
        return engine.compute_loss(engine.criterion, outputs, targets)

    given, kept = (_Picked(samples, _image_of_person) for samples in (dataset, retained))
    if reference_bugs:
        zero_grad = engine.optimizer.zero_grad
        request = _collated(given, params.scrub_batch_size or 1, device)
        measured = defects.step(model, request, loss_fn, params, zero_grad, outString, reid=True)
    else:
        hook = model.register_forward_pre_hook(_classify)
        try:
            measured = _delete(model, given, kept, loss_fn, params, device, outString)
        finally:
            hook.remove()
    return model.state_dict(), *measured


def vgg_inp_perturb(
    model: nn.Module,
    model_copy: Any,
    dataset: Any,
    criterion: Callable[[Any, Tensor], Tensor],
    params: Any,
    optim: torch.optim.Optimizer | None,
    device: Any,
    outString: str,
    is_nlp: bool = False,
    **options: Any,
) -> tuple[int, dict[str, Any], Tensor, Tensor, float, float]:
    """:func:`inp_perturb` with one argument more, a copy of the model, which it does without."""
    return inp_perturb(
        model, dataset, criterion, params, optim, device, outString, is_nlp, **options
    )


def _classify(model: nn.Module, _: Any) -> None:
    model.training = True  # of the root alone


class _Picked(Dataset):
    """A dataset, each sample in another form."""

    def __init__(self, dataset: Any, pick: Callable[[Any], Any]) -> None:
        self.dataset, self._pick = dataset, pick

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._pick(self.dataset[index])


def _text(sample: Any) -> dict[str, Tensor]:
    ids, mask, _, labels = sample
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _image_of_person(sample: Any) -> tuple[Any, Any]:
    return sample["img"], sample["pid"]


def _collated(samples: _Picked, most: int, device: Any) -> Any:
    """The first samples as one batch, (inputs, targets) or a dict with labels."""
    if not len(samples):
        raise ValueError("dataset must have samples to delete; it is empty")
    batch = default_collate([samples[i] for i in range(min(most, len(samples)))])
    if isinstance(batch, dict):
        return {key: value.to(device) for key, value in batch.items()}
    return tuple(value.to(device) for value in batch)


def _check(params: Any, reference_bugs: object) -> None:
    check_bool(reference_bugs, "reference_bugs")
    for name, choices in (
        ("selectionType", ("Full", "FOCI", "Random", "One")),
        ("order", ("Hessian", "BP")),
        ("HessType", ("Sekhari", "CR")),
        ("approxType", ("FD", "Fisher") if reference_bugs else tuple(_CURVATURES)),
    ):
        check_choice(getattr(params, name), f"params.{name}", choices)
    if params.selectionType == "FOCI":
        check_choice(params.FOCIType, "params.FOCIType", ("full", "cheap"))
    if params.selectionType in ("FOCI", "Random"):
        check_integer(params.n_perturbations, "params.n_perturbations", 3)


def _delete(
    model: nn.Module,
    dataset: _Picked,
    retained: _Picked,
    loss_fn: Callable[[Any, Tensor], Tensor],
    params: Any,
    device: Any,
    stem: str,
) -> Measured:
    """Change a model in place; return losses and gradient norms of the request."""
    request = _collated(dataset, len(dataset), device)
    dtype = next(model.parameters()).dtype
    samples = as_samples(request, "dataset", torch.device(device), dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        loss_before, norm_before = _measure(model, samples, loss_fn)
        seed = int(torch.randint(2**62, ()))  # manual_seed governs it
        selection = _selection(model, samples, loss_fn, params, seed)
        if params.order == "BP":
            step = selection.gather(_gradients(model), model=model)
            selection.add_(model, check_real(params.lr, "params.lr", 0) * step)
        else:
            before = copy.deepcopy(model)
            result = _newton(model, samples, retained, loss_fn, params, selection, stem, seed)
            if params.approxType == "FD":  # else unlearn warns, of the retained samples
                _warn_of_noise(before, samples, loss_fn, result.guarantee)
        loss_after, norm_after = _measure(model, samples, loss_fn)
    finally:
        model.zero_grad()
        for module, mode in modes.items():
            module.training = mode
    return loss_before, loss_after, norm_before, norm_after


def _measure(
    model: nn.Module, samples: Samples, loss_fn: Callable[[Any, Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Mean loss and the norm of its gradient, which the parameters keep."""
    batch = samples.fetch(slice(None))
    model.zero_grad()
    loss = loss_fn(outputs_of(model, batch), batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), gradNorm(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def _selection(
    model: nn.Module,
    samples: Samples,
    loss_fn: Callable[[Any, Tensor], Tensor],
    params: Any,
    seed: int,
) -> UnitSelection:
    if params.selectionType == "Full":
        return UnitSelection.all(model)
    candidates = find_candidates(model, Settings.preset("paper")).selection
    n = 1
    if params.selectionType != "One":
        texts = samples.fetch(slice(None))
        perturb = None
        if texts.kwargs:
            perturb = _replacement(model, texts, params.n_tokens_to_replace)
        recording = record(
            model,
            samples,
            loss_fn,
            n_perturbations=params.n_perturbations,
            perturb=perturb,
            units=candidates,
            seed=seed,
        )
        cheap = params.selectionType == "FOCI" and params.FOCIType == "cheap"
        found = (select_cheap(recording) if cheap else select_lfoci(recording, seed=seed))[0]
        if params.selectionType == "FOCI":
            return _of_units(found)
        n = len(found)
    units = [(layer, unit) for layer, units in candidates.units.items() for unit in units]
    chosen = np.random.default_rng(seed).choice(len(units), n, replace=False)
    return _of_units([units[k] for k in chosen])


def _of_units(units: Iterable[tuple[str, int]]) -> UnitSelection:
    by_layer: dict[str, list[int]] = {}
    for layer, unit in units:
        by_layer.setdefault(layer, []).append(unit)
    return UnitSelection(by_layer)


def _replacement(model: nn.Module, texts: Batch, n_tokens: int) -> TokenReplacement:
    """Replace words by words: neither the first and last token of a text, nor padding."""
    ids, mask = texts.kwargs["input_ids"], texts.kwargs["attention_mask"] != 0
    last = mask.long().cumsum(1).argmax(1, keepdim=True)
    special = torch.cat([ids[:, 0], ids.gather(1, last).flatten(), ids[~mask]])
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if not embeddings:
        raise ValueError("is_nlp=True needs a model with an nn.Embedding of tokens; it has none")
    # Positions and token types are fewer than tokens.
    n = max(embedding.num_embeddings for embedding in embeddings)
    words = range(_FIRST_WORD, n) if n == _BERT_UNCASED else range(n)
    return TokenReplacement(
        token_ids=words, special_ids=sorted(set(special.tolist())), n_tokens=n_tokens
    )


def _newton(
    model: nn.Module,
    samples: Samples,
    retained: _Picked,
    loss_fn: Callable[[Any, Tensor], Tensor],
    params: Any,
    selection: UnitSelection,
    stem: str,
    seed: int,
) -> UnlearnResult:
    n = check_integer(params.orig_trainset_size, "params.orig_trainset_size", len(samples) + 1)
    options: dict[str, Any] = {}
    if params.approxType == "FD":
        check_integer(params.train_epochs, "params.train_epochs", 2)
        options["statistics"] = _statistics(model, stem, params.train_epochs, n)
    elif retained.dataset is None:
        raise ValueError(
            f"params.approxType={params.approxType!r} needs the training samples that stay: pass "
            "retained=, a dataset like that of the samples to delete"
        )
    if params.HessType == "Sekhari" and params.delta < 1:  # (epsilon, 1) holds of anything
        options |= {"epsilon": params.epsilon, "delta": params.delta}
    return unlearn(
        model,
        samples,
        None if params.approxType == "FD" else retained,
        loss_fn,
        preset="paper",
        selection=selection,
        curvature=_CURVATURES[params.approxType],
        weight_decay=params.l2_reg,
        damping=0.0,
        seed=seed,
        inplace=True,
        **options,
    )


def _warn_of_noise(
    before: nn.Module,
    samples: Samples,
    loss_fn: Callable[[Any, Tensor], Tensor],
    guarantee: Guarantee,
) -> None:
    """Warn where noise alone, on the weights as they were, spoils the model.

    The samples to delete are all that is at hand, and the step is to raise their loss.
    """
    if guarantee.sigma > 0:
        noisy = add_noise(before, guarantee.sigma)
        was, now = (mean_loss(model, samples, loss_fn, len(samples)) for model in (before, noisy))
        warn_of_noise(was, now, guarantee, "the samples to delete, without a step,", stacklevel=4)


def _statistics(model: nn.Module, stem: str, epochs: int, n: int) -> TrainingStatistics:
    """The pair that the files of the last two epochs determine."""
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
            f"is {curvature:.3g}. Gradients that the published code wrote may do that, for they "
            "are not the training set's; so may a training that has not settled. Write them with "
            "do_epoch of this module and train longer, or pass retained= and "
            "params.approxType='GaussNewton'"
        )
    return TrainingStatistics.from_epochs(snapshots, n)
