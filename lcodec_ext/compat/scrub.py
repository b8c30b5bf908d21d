"""Drop-in for what scripts import from ``scrub/`` of vsingh-group/LCODEC-deep-unlearning.

That repository has these names in its modules ``scrub_tools``, ``vgg_scrub_tools``, ``nn_utils``,
``grad_utils`` and ``data_utils``. Argument orders, return tuples and files are the same. What it
computes wrongly is computed rightly here, unless you pass ``reference_bugs=True``:
``docs/compat.md`` lists the differences, and the files that training writes.

``params`` is what the scripts' ``argparse`` makes. These of its attributes are read:

=====================  ========================================================================
n_perturbations        perturbations of the request
n_tokens_to_replace    in every text of a perturbation (text only)
selectionType          "Full", "FOCI", "Random" (as many units as FOCI finds) or "One" (at random)
FOCIType               "full" or "cheap", with "FOCI"
order                  "Hessian", a Newton step, or "BP", ``lr`` times the gradient
HessType               "Sekhari", with noise for (epsilon, delta) on the result, or "CR", without
approxType             "FD", the secant of the last two epochs' gradients, from their files;
                       "Fisher", of the retained samples; or "GaussNewton", of the retained
                       samples, which the published code does not have
train_epochs           number of training epochs, for the names of the files ("FD")
orig_trainset_size     n, the number of samples that the model was trained on
l2_reg                 lambda of the trained objective, mean loss + (lambda / 2) |w|^2
epsilon, delta         of the noise ("Sekhari")
lr                     of order "BP"
scrub_batch_size       with `reference_bugs`: None takes the first sample of the request
hessian_device         with `reference_bugs`: where the dense matrix is solved
=====================  ========================================================================
"""

try:
    import torch
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.compat.scrub needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_choice, check_integer
from lcodec_ext._torch.batches import map_tensors
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.states import state_hash
from lcodec_ext.compat import defects, deletion
from lcodec_ext.compat.data import (
    BinaryDatasetWrapper,
    LabelSubsetWrapper,
    SubsetDataWrapper,
    getDatasets,
    residual_set,
)
from lcodec_ext.compat.epoch_files import Measured as Measured
from lcodec_ext.compat.epoch_files import getGradObjs, gradNorm
from lcodec_ext.compat.hooks import ActivationsHook, HyperC, NLP_ActivationsHook
from lcodec_ext.compat.steps import (
    CR_NaiveNewton,
    NewtonScrubStep,
    NoisyReturn,
    getHessian,
    getHyperColumn,
    getOldPandG,
    getVectorizedGrad,
    myFOCI,
    reverseIndexingToLayers,
    reverseLinearIndexingToLayers,
    updateModelParams,
)
from lcodec_ext.compat.switch import SWITCH, bugs
from lcodec_ext.compat.training import (
    DisableBatchNorm,
    do_epoch,
    manual_seed,
    retrain_model,
)

__all__ = [
    "ActivationsHook",
    "BinaryDatasetWrapper",
    "CR_NaiveNewton",
    "DisableBatchNorm",
    "HyperC",
    "LabelSubsetWrapper",
    "NLP_ActivationsHook",
    "NewtonScrubStep",
    "NoisyReturn",
    "SubsetDataWrapper",
    "do_epoch",
    "getDatasets",
    "getGradObjs",
    "getHessian",
    "getHyperColumn",
    "getOldPandG",
    "getVectorizedGrad",
    "gradNorm",
    "inp_perturb",
    "manual_seed",
    "myFOCI",
    "reid_inp_perturb",
    "retrain_model",
    "reverseIndexingToLayers",
    "reverseLinearIndexingToLayers",
    "scrubSample",
    "updateModelParams",
    "vgg_inp_perturb",
]


def scrubSample(*_: Any, **__: Any) -> NoReturn:
    """Refuse. Scripts import this name; the published function ends the process."""
    raise NotImplementedError("scrubSample was withdrawn by the published code; use inp_perturb")


def inp_perturb(
    model: nn.Module,
    dataset: Any,
    criterion: LossFunction,
    params: Any,
    optim: torch.optim.Optimizer | None,
    device: Any,
    outString: str,
    is_nlp: bool = False,
    *,
    retained: Any = None,
    reference_bugs: bool | None = None,
) -> tuple[int, dict[str, Any], Tensor, Tensor, float, float]:
    """Delete samples from a model: perturb them, select units, and step on these units' parameters.

    Parameters
    ----------
    model : Module
        On `device`; changed in place.
    dataset : Dataset
        The samples to delete: pairs (input, target), or with `is_nlp` tuples (input_ids,
        attention_mask, anything, labels).
    criterion : callable
        From (outputs, targets) to the mean loss of a batch.
    params : object
        With the attributes that the module lists.
    optim : Optimizer, optional
        Only used with `reference_bugs`, to set gradients to zero.
    device : device
    outString : str
        What the names of the files with the last two epochs' gradients begin with.
    is_nlp : bool
        Call the model as ``model(input_ids=..., attention_mask=...)``, and perturb by replacing
        tokens instead of adding noise.
    retained : Dataset, optional
        The training samples that stay, in the form of `dataset`; for "Fisher" and "GaussNewton",
        and for "FD" where the files have no gradient. By default the `SubsetDataWrapper` that the
        script made last, if it leaves out these samples of the same dataset.
    reference_bugs : bool, optional
        Do what the published code does, with its defects. By default as `install` was told, else
        False.

    Returns
    -------
    foci_val : int
        Always 0: nothing is left to repeat.
    state_dict : dict
        Of the model; its tensors are the model's own.
    loss_before, loss_after : Tensor
        Mean loss of the samples, 0-d, without the regulariser.
    gradnorm_before, gradnorm_after : float
        Norm of its gradient by all parameters.

    Raises
    ------
    FileNotFoundError
        If a file of the last two epochs is missing.
    ValueError, TypeError, AttributeError
        For params that lack an attribute or have another value than listed, for files of another
        model, and for what `lcodec_ext.unlearning.unlearn` refuses.

    Warns
    -----
    UserWarning
        Where the noise of this request, or of all so far, spoils the model; where there is no step,
        because the loss is the same under all perturbations or a pair has no positive curvature;
        where files without a gradient are made up for by the residual set; and where the script has
        taken back three removals in a row, 10, 30, 100 or 300.

    Notes
    -----
    HessType="Sekhari" puts noise on every trainable parameter at each request, as its guarantee
    needs. A model that goes on from it has the noise of all: after k requests sqrt(k) times as
    much. `Unlearner` keeps the weights without noise, and puts noise on releases alone.
    """
    return _inp_perturb(
        model,
        dataset,
        criterion,
        params,
        optim,
        device,
        outString,
        is_nlp,
        retained=retained,
        reference_bugs=reference_bugs,
    )


def _inp_perturb(
    model: nn.Module,
    dataset: Any,
    criterion: LossFunction,
    params: Any,
    optim: torch.optim.Optimizer | None,
    device: Any,
    outString: str,
    is_nlp: bool,
    model_copy: nn.Module | None = None,
    *,
    retained: Any = None,
    reference_bugs: bool | None = None,
) -> tuple[int, dict[str, Any], Tensor, Tensor, float, float]:
    reference_bugs = bugs(reference_bugs)
    _check(params, reference_bugs)
    _warn_of_rejections(model, params)
    pick = _text if is_nlp else tuple
    if reference_bugs:
        request = _collated(dataset, pick, device, params.scrub_batch_size or 1)
        zero_grad = model.zero_grad if optim is None else optim.zero_grad
        measured = defects.step(
            model, request, criterion, params, zero_grad, outString, stepped=model_copy
        )
    else:
        retained = _made_last(dataset, params) if retained is None else retained
        request, kept = _collated(dataset, pick, device), _picked(retained, pick)
        measured = deletion.step(model, request, kept, criterion, params, outString)
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
    reference_bugs: bool | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor, float, float]:
    """:func:`inp_perturb` for the models of torchreid, which classify in training mode only.

    Parameters
    ----------
    model, params, device, outString, reference_bugs
        As there. The model is called with its root in training mode and everything below in
        evaluation mode.
    dataset, retained : Dataset
        Samples to delete, and those that stay: dicts with "img" and "pid".
    engine : object
        With ``criterion`` and ``compute_loss(criterion, outputs, targets)``.

    Returns
    -------
    state_dict, loss_before, loss_after, gradnorm_before, gradnorm_after
        As there.
    """
    reference_bugs = bugs(reference_bugs)
    _check(params, reference_bugs)
    _warn_of_rejections(model, params)

    loss_fn = functools.partial(engine.compute_loss, engine.criterion)
    if reference_bugs:
        request = _collated(dataset, _person, device, params.scrub_batch_size or 1)
        zero_grad = engine.optimizer.zero_grad
        measured = defects.step(model, request, loss_fn, params, zero_grad, outString, reid=True)
    else:
        retained = _made_last(dataset, params) if retained is None else retained
        request, kept = _collated(dataset, _person, device), _picked(retained, _person)
        hook = model.register_forward_pre_hook(_classify)
        try:
            measured = deletion.step(model, request, kept, loss_fn, params, outString)
        finally:
            hook.remove()
    return model.state_dict(), *measured


def vgg_inp_perturb(
    model: nn.Module,
    model_copy: Any,
    dataset: Any,
    criterion: LossFunction,
    params: Any,
    optim: torch.optim.Optimizer | None,
    device: Any,
    outString: str,
    is_nlp: bool = False,
    **options: Any,
) -> tuple[int, dict[str, Any], Tensor, Tensor, float, float]:
    """:func:`inp_perturb` with one argument more, a copy of the model.

    It is not used, except with `reference_bugs`: there it takes a gradient step of 0.001, from
    which the face code has the sample's Hessian.
    """
    if not bugs(options.get("reference_bugs")):
        model_copy = None
    return _inp_perturb(
        model, dataset, criterion, params, optim, device, outString, is_nlp, model_copy, **options
    )


def _check(params: Any, reference_bugs: bool) -> None:
    for name, choices in (
        ("selectionType", ("Full", "FOCI", "Random", "One")),
        ("order", ("Hessian", "BP")),
        ("HessType", ("Sekhari", "CR")),
        ("approxType", ("FD", "Fisher") if reference_bugs else tuple(deletion.CURVATURES)),
    ):
        given = SWITCH.approx_type if name == "approxType" and not reference_bugs else None
        check_choice(given or getattr(params, name), f"params.{name}", choices)
    if params.selectionType == "FOCI":
        check_choice(params.FOCIType, "params.FOCIType", ("full", "cheap"))
    if params.selectionType in ("FOCI", "Random"):
        check_integer(params.n_perturbations, "params.n_perturbations", 3)


#: What the last removal was asked for and the weights it started from, as text, and how often in a
#: row removals have been asked for thus from these.
_LAST: dict[str, Any] = {"asked": None, "times": 0}
_TOLD = (3, 10, 30, 100, 300)  # rejections in a row


def _made_last(dataset: Any, params: Any) -> SubsetDataWrapper | None:
    """The residual set that the script made; a warning where the curvature is certainly of it."""
    residual = residual_set(dataset)
    if residual is not None and deletion.approx_type(params) != "FD":
        warn(
            f"retained= is not given: the SubsetDataWrapper that was made last, of {len(residual)} "
            "samples, is taken for the samples that stay",
        )
    return residual


def _warn_of_rejections(model: nn.Module, params: Any) -> None:
    """Warn where a script takes every removal back: it would go on until no sample is left."""
    start = state_hash({name: p.detach() for name, p in model.named_parameters()})
    asked = start, repr(params)
    times = _LAST["times"] + 1 if _LAST["asked"] == asked else 0
    _LAST.update(asked=asked, times=times)
    if times in _TOLD:
        how = f"HessType={params.HessType!r}, approxType={params.approxType!r}"
        if params.HessType == "Sekhari":
            how += f", epsilon={params.epsilon:g}, delta={params.delta:g}"
        warn(
            f"{times} removals in a row were taken back by the script: each began from the same "
            f"weights. With {how} they do harm. The noise of HessType='Sekhari' may spoil the "
            "model whatever is removed, and approxType='FD' makes steps that are too long: take "
            "HessType='CR', a larger epsilon, or approxType='GaussNewton' with retained=",
        )


# ---------------------------------------------------------------------------------------------
# Samples


def _text(sample: Any) -> dict[str, Tensor]:
    ids, mask, _, labels = sample
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _person(sample: Any) -> tuple[Any, Any]:
    return sample["img"], sample["pid"]


def _classify(model: nn.Module, _: Any) -> None:
    model.training = True  # of the root alone


class _Picked(Dataset):
    """A dataset with each sample in another form."""

    def __init__(self, dataset: Any, pick: Callable[[Any], Any]) -> None:
        self.dataset, self._pick = dataset, pick

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self._pick(self.dataset[index])


def _picked(dataset: Any, pick: Callable[[Any], Any]) -> _Picked | None:
    return None if dataset is None else _Picked(dataset, pick)


def _collated(
    dataset: Any, pick: Callable[[Any], Any], device: Any, most: int | None = None
) -> Any:
    """All samples, or the first ones, as one batch: (inputs, targets) or a dict with labels."""
    n = len(dataset)
    if not n:
        raise ValueError("dataset must have samples to delete; it is empty")
    batch = default_collate([pick(dataset[i]) for i in range(n if most is None else min(most, n))])
    return map_tensors(lambda tensor: tensor.to(device), batch)
