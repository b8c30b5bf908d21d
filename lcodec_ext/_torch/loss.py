"""Losses: what is asked of them, which are known, their mean and gradient over samples."""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._torch.adapters import check_trainable
from lcodec_ext._torch.batches import Batch, InputsError, map_tensors, part_of, tensors_of
from lcodec_ext._torch.copies import THE_LOSS, Watched, check_followed, work_copy
from lcodec_ext._torch.decay import Decay, each_decay
from lcodec_ext._torch.faults import check_labels, fault_of
from lcodec_ext._torch.modes import evaluating, twice_differentiable
from lcodec_ext._torch.samples import Samples, outputs_of
from lcodec_ext._torch.token_loss import TokenLoss

#: From outputs and targets of a batch to the loss of the batch.
LossFunction = Callable[[Any, Any], Tensor]
Gradient = dict[str, Tensor]


_PART = 2**22  # numbers of a tensor that are in float64 at a time
_NUMBER = [torch.zeros((), dtype=torch.float64)]  # what a sum of losses is like


class NotFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite."""


@dataclass(frozen=True)
class KnownLoss:
    """A loss whose second derivative by the outputs has a known formula.

    Attributes
    ----------
    kind : {"cross_entropy", "bce_with_logits", "mse"}
    reduction : {"mean", "sum"}
    ignore_index : int
        Of cross-entropy: the target that counts for nothing.
    """

    kind: str
    reduction: str
    ignore_index: int = -100


_MODULES: dict[type, str] = {
    torch.nn.CrossEntropyLoss: "cross_entropy",
    torch.nn.BCEWithLogitsLoss: "bce_with_logits",
    torch.nn.MSELoss: "mse",
}

_FUNCTIONS: dict[Any, str] = {
    torch.nn.functional.cross_entropy: "cross_entropy",
    torch.nn.functional.binary_cross_entropy_with_logits: "bce_with_logits",
    torch.nn.functional.mse_loss: "mse",
}


def known_loss(loss_fn: Any) -> KnownLoss | None:
    """Recognise softmax cross-entropy, BCE with logits and squared error, without weights."""
    options: dict[str, Any]
    if type(loss_fn) in _MODULES:
        if getattr(loss_fn, "weight", None) is not None:
            return None
        if getattr(loss_fn, "pos_weight", None) is not None:
            return None
        kind, options = _MODULES[type(loss_fn)], vars(loss_fn)
    else:
        options = {}
        while isinstance(loss_fn, functools.partial) and not loss_fn.args:
            options = loss_fn.keywords | options
            loss_fn = loss_fn.func
        try:
            kind = _FUNCTIONS[loss_fn]
        except (KeyError, TypeError):
            return None
        if options.keys() - {"reduction", "label_smoothing", "ignore_index"}:
            return None
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum"):
        return None
    return KnownLoss(kind, reduction, options.get("ignore_index", -100))


# ---------------------------------------------------------------------------------------------
# What is asked of a loss


def check_loss_fn(loss_fn: object) -> None:
    """Refuse what is not callable on outputs and targets."""
    if isinstance(loss_fn, type):
        raise TypeError(
            "loss_fn must be callable on outputs and targets; got the class "
            f"{loss_fn.__name__}: pass an instance, {loss_fn.__name__}()"
        )
    if not callable(loss_fn):
        raise TypeError(
            "loss_fn must be callable on outputs and targets; got an object of type "
            f"{type(loss_fn).__name__}"
        )


def check_copy(model: nn.Module, samples: Samples, loss_fn: LossFunction) -> None:
    """Refuse a model whose copies, or their loss, compute with its own parameters."""
    watched: Watched = {}
    work = work_copy(model, samples.dtype, watched)
    batch = samples.fetch([0])
    try:
        with twice_differentiable(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those who use the model warn
            outputs = outputs_of(work, batch)
            found = [*tensors_of(outputs)]
            loss = loss_in(samples.dtype, loss_fn)(
                map_tensors(Tensor.detach, outputs), batch.targets
            )
    except InputsError:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError, KeyError):
        return  # those who use the model tell
    check_followed([t for t in found if t.requires_grad], watched, "the model")
    check_followed([*tensors_of(loss)], watched, THE_LOSS)


def loss_in(dtype: torch.dtype, loss_fn: LossFunction) -> LossFunction:
    """A loss for outputs of a dtype: of a module a copy in it."""
    if isinstance(loss_fn, TokenLoss) and isinstance(loss_fn.loss_fn, nn.Module):
        return replace(loss_fn, loss_fn=loss_in(dtype, loss_fn.loss_fn))
    return copy.deepcopy(loss_fn).to(dtype) if isinstance(loss_fn, nn.Module) else loss_fn


_ELEMENTWISE: tuple[Any, ...] = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    torch.nn.functional.mse_loss,
    torch.nn.functional.l1_loss,
    torch.nn.functional.smooth_l1_loss,
    torch.nn.functional.huber_loss,
)


_ONE_SHAPE: tuple[Any, ...] = (  # that refuse others by themselves
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    torch.nn.functional.binary_cross_entropy,
    torch.nn.functional.binary_cross_entropy_with_logits,
)


def differ_in_shape(outputs: Any, targets: Any) -> bool:
    """Whether one of both would be repeated to be compared with the other."""
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return both and targets.is_floating_point() and outputs.shape != targets.shape


def _check_shapes(loss_fn: LossFunction, outputs: Any, targets: Any) -> None:
    """Refuse outputs and targets of different shapes where each entry is compared with one."""
    if not differ_in_shape(outputs, targets):
        return
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    if loss_fn in _ELEMENTWISE or type(loss_fn) in _ELEMENTWISE:
        raise ValueError(shapes_differ(outputs, targets))
    if loss_fn in _ONE_SHAPE or type(loss_fn) in _ONE_SHAPE:
        raise ValueError(shapes_differ(outputs, targets, "and takes both of one shape"))


def shapes_differ(
    outputs: Tensor,
    targets: Tensor,
    why: str = "and would compare every output with every target",
) -> str:
    """What to do with outputs and targets of different shapes."""
    ways = "give both one shape"
    if outputs.shape == (*targets.shape, 1):
        ways = "pass the targets as targets[:, None], or let the model return outputs.squeeze(-1)"
    elif targets.shape == (*outputs.shape, 1):
        ways = "pass the targets as targets.squeeze(-1), or let the model return outputs[:, None]"
    return (
        f"loss_fn compares outputs of shape {tuple(outputs.shape)} with targets of shape "
        f"{tuple(targets.shape)}, {why}: {ways}"
    )


def scalar_loss(loss_fn: LossFunction, outputs: Any, targets: Any) -> Tensor:
    """The loss of a batch; refuse what is not a scalar tensor."""
    _check_shapes(loss_fn, outputs, targets)
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the mean loss; got {given}")
    return loss


def loss_in_parts(
    loss_fn: LossFunction, outputs: Any, targets: Any, n: int, step: int, reduction: str = "mean"
) -> Tensor:
    """The mean (or sum) over n samples, from the losses of parts of at most step samples."""
    total: Any = 0.0
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        loss = scalar_loss(loss_fn, part_of(outputs, n, part), part_of(targets, n, part))
        total = total + loss * ((part.stop - part.start) / n if reduction == "mean" else 1)
    return total


def same_loss(of_parts: Tensor, whole: Tensor) -> bool:
    """Whether two ways to a loss agree up to rounding.

    In float32 a relative difference of 2e-5 passes, or 1e-6 of losses near zero; in float64 1e-8,
    or 1e-12.
    """
    rtol, atol = (1e-8, 1e-12) if whole.dtype == torch.float64 else (2e-5, 1e-6)
    return bool(torch.isclose(of_parts, whole, rtol=rtol, atol=atol))


def check_reduction(
    whole: Tensor,
    of_parts: Tensor,
    n: int,
    *,
    reduction: str = "mean",
    why: str = "",
    of: tuple[Any, Any] = (None, None),
) -> None:
    """Refuse a loss of n samples that is not the mean (or sum) of the losses of its parts.

    `of` are its outputs and targets: where they differ in shape, that is why.
    """
    if not same_loss(of_parts, whole):
        if differ_in_shape(*of):
            raise ValueError(shapes_differ(*of))
        raise ValueError(
            f"loss_fn must be the plain {reduction} over the samples of a batch{why} "
            f"(reduction={reduction!r}, no class weights, no ignored targets), or the mean over "
            f"the tokens of a batch; on {n} samples it is {whole.item():.6g}, and the "
            f"{reduction} of the losses of its parts is {of_parts.item():.6g}{_by_sample(of[1])}"
        )


def _by_sample(targets: Any) -> str:
    """What to do with samples of several labels each."""
    several = isinstance(targets, Tensor) and targets.ndim > 1 and not targets.is_floating_point()
    advice = (
        ". Where it is a mean over tokens, per_token_loss(loss_fn) says so, with causal=True where "
        "labels are shifted by one and ignore_index where it is not -100; else take the mean over "
        "the labels of each sample first, then the mean over the samples"
    )
    return advice if several else ""


def check_parts(
    loss_fn: LossFunction,
    outputs: Any,
    targets: Any,
    n: int,
    step: int,
    *,
    reduction: str = "mean",
    why: str = "",
) -> None:
    """`check_reduction` for the parts of at most step samples."""
    if step >= n:
        return
    with torch.no_grad():
        outputs = map_tensors(Tensor.detach, outputs)
        whole = scalar_loss(loss_fn, outputs, targets)
        total = loss_in_parts(loss_fn, outputs, targets, n, step, reduction)
    check_reduction(whole, total, n, reduction=reduction, why=why, of=(outputs, targets))


# ---------------------------------------------------------------------------------------------
# Over samples


def mean_loss(model: nn.Module, samples: Samples, loss_fn: LossFunction, batch_size: int) -> float:
    """Mean loss without the regulariser, in evaluation mode; it may be NaN or infinite.

    Of a loss over tokens that is the mean over those of the samples.
    """

    def own() -> list[Tensor]:
        total, weight = 0.0, 0.0
        with evaluating(model), torch.no_grad():
            for batch in samples.batches(batch_size):
                loss = loss_of(loss_fn, outputs_of(model, batch), batch, samples.name)
                total += loss.item() * batch.size / len(samples)
                weight += weight_of(loss_fn, batch)
        return [torch.tensor(each, dtype=torch.float64) for each in (total, weight)]

    total, weight = samples.summed(f"the loss of the {samples.name} samples", own, _NUMBER * 2)
    return float(total) / share_of(loss_fn, float(weight), len(samples))


def weight_of(loss_fn: LossFunction, batch: Batch) -> float:
    """The counted tokens of a batch, of a loss over tokens; 0 of others."""
    return float(loss_fn.counted(batch.targets).sum()) if isinstance(loss_fn, TokenLoss) else 0.0


def share_of(loss_fn: LossFunction, tokens: float, n: int) -> float:
    """What n samples with so many tokens count for, on average; 1 where each counts for one.

    The regulariser counts as much: all tokens share it, as they share the mean.
    """
    if not isinstance(loss_fn, TokenLoss) or loss_fn.mean_tokens is None:
        return 1.0
    return tokens / n / loss_fn.mean_tokens


def is_much_worse(before: float, after: float, unit: float = 1.0) -> bool:
    """Whether a mean loss rose by so much that a warning is due; NaN counts as worse.

    unit is what counts as 1 for the loss; it is 1 for a cross-entropy.
    """
    return math.isfinite(before) and not after <= before + abs(before) / 2 + 0.05 * unit


def mean_gradient(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    parameters: Mapping[str, Tensor],
    batch_size: int,
    *,
    weight_decay: float | Mapping[str, float | Tensor] = 0.0,
    keep_unused: bool = False,
    dtype: torch.dtype | None = None,
    check: bool = False,
) -> tuple[float, Gradient]:
    """Mean loss of samples, and the gradient of it plus (weight_decay / 2) |w|^2.

    Of a loss over tokens the first is the mean over the tokens of the samples; the gradient is the
    mean over samples of what each contributes, the regulariser shared out by tokens.

    Parameters
    ----------
    model, samples, loss_fn
        The model is called in the mode it is in.
    parameters : mapping of str to Tensor
        Of the model: the gradient is by these.
    batch_size : int
        Samples in a backward pass.
    weight_decay : float or mapping of str to float or Tensor, default 0.0
        A mapping has it for each parameter, or for each of its entries.
    keep_unused : bool, default False
        Whether it counts for parameters that the loss does not use, too: optimizers do not change
        them.
        Samples that are spread over ranks need it, and no dtype.
    dtype : torch.dtype, optional
        In which gradients are summed; by default each parameter's own.
    check : bool, default False
        Whether to refuse a loss that is not the mean over the samples of its batches.

    Raises
    ------
    NotFiniteError
        If the loss or the gradient is NaN or infinite.
    ValueError
        If the loss does not depend on the parameters of the model.
    """
    decay = weight_decay
    each = decay if isinstance(decay, Mapping) else dict.fromkeys(parameters, decay)
    unused = set() if keep_unused else set(parameters)
    by_tokens = isinstance(loss_fn, TokenLoss)

    def own() -> list[Tensor]:
        once = 1.0 if samples.first and not by_tokens else 0.0
        gradient = {
            k: each[k] * p.detach().to(dtype or p.dtype) * once for k, p in parameters.items()
        }
        total = tokens = 0.0
        for batch in samples.batches(batch_size):
            outputs = outputs_of(model, batch)
            loss = finite_loss(loss_fn, outputs, batch, samples.name)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on the parameters of the model; is its forward pass "
                    "under torch.no_grad?"
                )
            if check:
                check_parts(loss_fn, outputs, batch.targets, batch.size, -(-batch.size // 2))
            share = batch.size / len(samples)
            total += loss.item() * share
            tokens += weight_of(loss_fn, batch)
            parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for k, part in zip(parameters, parts, strict=True):
                if part is not None:
                    gradient[k] += part * share
                    unused.discard(k)
        if by_tokens:
            for k, p in parameters.items():
                decayed = each[k] * p.detach().to(gradient[k].dtype)
                gradient[k] += decayed * share_of(loss_fn, tokens, len(samples))
        numbers = [torch.tensor(number, dtype=torch.float64) for number in (total, tokens)]
        return [*numbers, *gradient.values()]

    what, given = f"the gradient of the {samples.name} samples", list(parameters.values())
    found = samples.summed(what, own, [*_NUMBER * 2, *given], given=given, same=(NotFiniteError,))
    total = float(found[0]) / share_of(loss_fn, float(found[1]), len(samples))
    gradient = dict(zip(parameters, found[2:], strict=True))
    for k in unused:
        gradient[k].zero_()
    for k, g in gradient.items():
        if not torch.isfinite(g).all():
            raise NotFiniteError(
                f"the gradient of the {samples.name} samples by {k!r} holds NaN or infinity"
            )
    return total, gradient


def check_classes(
    loss_fn: LossFunction, outputs: Any, batch: Batch, name: str, *, ignored: bool = False
) -> None:
    """Refuse labels of cross-entropy outside the classes, and ignored ones unless they may be."""
    known = known_loss(loss_fn)
    if known is None or known.kind != "cross_entropy":
        return
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        check_labels(batch, outputs.shape[1], known.ignore_index, name, ignored=ignored)


def ignored_labels(loss_fn: LossFunction, outputs: Any, targets: Any) -> tuple[int, int]:
    """How many of a batch's labels a loss ignores, and of how many.

    A loss that is not known is taken to ignore -100 where outputs are scores of classes.
    """
    if isinstance(loss_fn, TokenLoss):
        return 0, 1  # samples count by their tokens, however many are ignored
    known = known_loss(loss_fn)
    labels = isinstance(targets, Tensor) and not targets.is_floating_point()
    if not labels or not isinstance(outputs, Tensor) or outputs.numel() <= targets.numel():
        return 0, 1
    index = getattr(loss_fn, "ignore_index", -100) if known is None else known.ignore_index
    return int((targets == index).sum()), targets.numel()


def loss_of(
    loss_fn: LossFunction, outputs: Any, batch: Batch, name: str, *, ignored: bool = False
) -> Tensor:
    """The loss of a batch of a set, as a scalar; where it fails, the message names the sample."""
    check_classes(loss_fn, outputs, batch, name, ignored=ignored)
    _check_shapes(loss_fn, outputs, batch.targets)
    try:
        return scalar_loss(loss_fn, outputs, batch.targets)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        at = _as_classes(loss_fn, outputs, batch.targets) or _of_logits(error)
        if not at and (found := fault_of(loss_fn, outputs, batch, name)):
            at = f" ({found})"
        raise ValueError(
            f"loss_fn fails on the model's outputs for samples of {name} and their targets: "
            f"{error}{at}"
        ) from error


def _of_logits(error: Exception) -> str:
    """What a loss gets, where it looks for something else in the model's outputs."""
    if not isinstance(error, AttributeError) or error.obj.__class__ is not Tensor:
        return ""
    return (
        ". loss_fn is called with the logits and the labels, in the place of a model's outputs, "
        "which have the loss of their own batch: pass cross_entropy for a classifier, "
        "per_token_loss(causal=True) for a causal language model, else per_token_loss()"
    )


def _as_classes(loss_fn: LossFunction, outputs: Any, targets: Any) -> str:
    """How to make classes of targets that cross-entropy does not take for such."""
    known = known_loss(loss_fn)
    if known is None or known.kind != "cross_entropy" or not isinstance(outputs, Tensor):
        return ""
    if isinstance(targets, Tensor) and outputs.ndim > 2 and outputs.shape[:-1] == targets.shape:
        return (
            ". Outputs have the classes along the last axis, as those of language models: pass "
            "loss_fn=per_token_loss(causal=True) for a causal language model, else "
            "per_token_loss()"
        )
    if not isinstance(targets, Tensor) or outputs.ndim != 2 or targets.is_complex():
        return ""
    if targets.numel() != len(outputs) or bool((targets.double() % 1 != 0).any()):
        return ""
    ways = ".flatten()" * (targets.ndim > 1) + ".long()" * (targets.dtype != torch.int64)
    return f". Pass the targets as targets{ways}" if ways else ""


def finite_loss(loss_fn: LossFunction, outputs: Any, batch: Batch, name: str) -> Tensor:
    """`loss_of`; refuse NaN and infinity."""
    loss = loss_of(loss_fn, outputs, batch, name)
    if not torch.isfinite(loss):
        found = fault_of(loss_fn, outputs, batch, name)
        at = f": {found}" if found else ""
        raise NotFiniteError(f"the loss of the {name} samples is NaN or infinite{at}")
    return loss


def objective(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    weight_decay: Decay,
    batch_size: int,
) -> tuple[float, list[Tensor]]:
    """`mean_gradient` by every trainable parameter, summed in float64."""
    check_loss_fn(loss_fn)
    weights = named_trainable(model)
    decay = each_decay(weight_decay, weights) if isinstance(weight_decay, Mapping) else weight_decay
    loss, gradient = mean_gradient(
        model, samples, loss_fn, weights, batch_size, weight_decay=decay, dtype=torch.float64
    )
    return loss, list(gradient.values())


def euclidean_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all entries together, summed in float64."""
    return math.sqrt(
        sum(float(_square(wide(part)).sum()) for each in tensors for part in in_parts(each))
    )


def in_parts(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor in flat parts: float64 of a large one at once takes twice its memory."""
    tensor = tensor.detach()
    return [tensor] if tensor.numel() <= _PART else torch.split(tensor.reshape(-1), _PART)


def wide(tensor: Tensor) -> Tensor:
    """In float64, or complex128."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _square(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).square()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, at least one."""
    return list(named_trainable(model).values())


def named_trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, at least one."""
    check_trainable(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
