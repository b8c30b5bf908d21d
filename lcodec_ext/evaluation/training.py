"""What baselines train with: parts of data, batches of epochs, steps, and copies of models."""

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset

from lcodec_ext._checks import at_most, check_integer, check_real, check_seed, counted
from lcodec_ext._torch.batches import (
    Batch,
    check_not_columns,
    described,
    is_dataset,
    is_list_of_samples,
    n_samples,
    part_of,
    tensors_of,
)
from lcodec_ext._torch.copies import copy_of
from lcodec_ext._torch.decay import Decay, decay_of, groups_of
from lcodec_ext._torch.loss import LossFunction, check_copy, check_loss_fn, named_trainable
from lcodec_ext._torch.modes import check_module, place
from lcodec_ext._torch.samples import Samples, as_samples, outputs_in_training
from lcodec_ext._torch.wrapped import unwrapped


def count(data: Any, name: str = "data") -> int:
    """How many samples tensors, a dict of tensors or a Dataset hold; refuse anything else."""
    check_not_columns(data, name)
    if _is_numbered(data):
        return len(data)
    if isinstance(data, Mapping) or (
        isinstance(data, tuple | list) and next(tensors_of(data), None) is not None
    ):
        return n_samples(data, name)
    raise TypeError(
        f"{name} must be a pair (inputs, targets) of tensors, a dict of tensors with 'labels', or "
        f"a Dataset or list of samples (input, target); got {described(data)}. Of a DataLoader "
        "pass its dataset, of samples with more entries [(x, y) for x, y, *_ in data]"
    )


def _is_numbered(data: Any) -> bool:
    """Whether data have samples by number: a Dataset, what is indexed so, or a list of samples."""
    if isinstance(data, IterableDataset):
        return False
    return isinstance(data, Dataset) or is_dataset(data) or is_list_of_samples(data)


def take(data: Any, numbers: Sequence[int]) -> Any:
    """Some samples, of the kind of the data: tensors, a dict of tensors, or a Subset."""
    if _is_numbered(data):
        return Subset(data, [int(i) for i in numbers])
    return part_of(data, count(data), torch.as_tensor(np.asarray(numbers, dtype=np.int64)))


def check_numbers(numbers: Any, name: str, n: int) -> list[int]:
    """Numbers of some of n samples, ascending; refuse none, all, repeated ones and others."""
    if isinstance(numbers, Tensor | np.ndarray):
        if numbers.dtype in (torch.bool, np.dtype(bool)):
            raise TypeError(
                f"{name} must be numbers of samples; got a mask of bool: pass its nonzero()"
            )
        numbers = numbers.tolist()
    try:
        found = sorted(
            check_integer(number, name, 0, n - 1) for number in at_most(numbers, n, name)
        )
    except TypeError:
        given = reprlib.repr(numbers)
        raise TypeError(f"{name} must be numbers of samples, integers; got {given}") from None
    if not found or len(set(found)) < len(found) or len(found) == n:
        raise ValueError(
            f"{name} must be different numbers of some of the {n} samples, at least one and not "
            f"all; got {counted(len(found), 'number')}, {len(set(found))} different"
        )
    return found


def retained_set(model: nn.Module, retain: Any, loss_fn: LossFunction | None) -> Samples:
    """The retained samples, for copies of a model; refuse a loss that computes with its own."""
    samples = as_samples(retain, "retain", *place(model))
    if loss_fn is not None:
        check_loss_fn(loss_fn)
        check_copy(model, samples, loss_fn)
    return samples


def both_sets(
    model: nn.Module, forget: Any, retain: Any, loss_fn: LossFunction | None
) -> tuple[Samples, Samples]:
    """The removed samples, and `retained_set`."""
    return as_samples(forget, "forget", *place(model)), retained_set(model, retain, loss_fn)


def check_part(value: float, name: str) -> None:
    """Refuse what is not a share of something."""
    if not 0 < check_real(value, name, 0) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1; got {value}")


def checked_budget(
    model: nn.Module,
    seed: int,
    epochs: int,
    batch_size: int,
    weight_decay: Any,
    learning_rate: float = 0.0,
) -> Decay:
    """Refuse what no baseline can do; the weight decay of the model's parameters."""
    check_real(learning_rate, "learning_rate", 0)
    check_seed(seed, optional=False)
    check_integer(epochs, "epochs", 0)
    check_integer(batch_size, "batch_size", 1)
    check_module(model)
    return decay_of(weight_decay, model)


def epochs_of(
    samples: Samples, epochs: int, batch_size: int, seed: int | Sequence[int]
) -> Iterator[Batch]:
    """Batches of so many epochs, shuffled; full ones where there are as many samples."""
    rng = np.random.default_rng(seed)
    n = len(samples)
    for _ in range(epochs):
        order: Sequence[int] = rng.permutation(n).tolist()
        yield from samples.batches(batch_size, order[: n // batch_size * batch_size or n])


def sgd(model: nn.Module, learning_rate: float, weight_decay: Decay) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    groups = groups_of(weight_decay, named_trainable(model))
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)


def adam(model: nn.Module, learning_rate: float, weight_decay: Decay) -> torch.optim.Optimizer:
    """Adam, with weight decay in the gradient."""
    return torch.optim.Adam(groups_of(weight_decay, named_trainable(model)), lr=learning_rate)


def batch_loss(model: nn.Module, batch: Batch, loss_fn: LossFunction) -> Tensor:
    """The loss of a batch."""
    return loss_fn(outputs_in_training(model, batch), batch.targets)


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down a loss."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse:  # of embeddings; not all optimizers take it
                p.grad = p.grad.to_dense()
    optimizer.step()


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
) -> None:
    """One step down the loss of each batch."""
    for batch in batches:
        take_step(optimizer, batch_loss(model, batch, loss_fn))


def trained_copy(model: nn.Module, *, training: bool) -> nn.Module:
    """A copy of a model in training or evaluation mode, to be trained."""
    copied = copy_of(model)
    copied.train(training)
    return copied


def finished(tuned: nn.Module, model: nn.Module) -> nn.Module:
    """The new model without gradients, in the modes of the given one."""
    tuned.zero_grad()
    for new, old in zip(tuned.modules(), unwrapped(model).modules(), strict=True):
        new.training = old.training
    return tuned


@torch.no_grad()
def start_again(module: nn.Module) -> None:
    """Draw the parameters of a layer and of all in it at random, as before a training.

    Layers do it by their `reset_parameters`. The entries of other parameters are shuffled: that
    keeps their size and loses what they have learnt.
    """
    for part in module.modules():
        reset = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
        if callable(reset):
            reset()
            continue
        for parameter in part.parameters(recurse=False):
            order = torch.randperm(parameter.numel()).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
