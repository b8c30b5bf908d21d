"""What scripts import from ``nn_utils`` and ``data_utils`` of the published code."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lcodec_ext._torch.batches import map_tensors
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext.compat.defects import GradientBank
from lcodec_ext.compat.epoch_files import backward, getGradObjs, write_epoch
from lcodec_ext.compat.switch import bugs


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


def do_epoch(
    model: nn.Module,
    dataloader: Any,
    criterion: LossFunction,
    epoch: int,
    nepochs: int,
    optim: torch.optim.Optimizer | None = None,
    device: Any = "cpu",
    outString: str = "",
    compute_grads: bool = False,
    retrain: bool = False,
    *,
    reference_bugs: bool | None = None,
) -> tuple[float, ...]:
    """Train for an epoch, or evaluate. Training writes the files of its last two epochs.

    Parameters
    ----------
    model : Module
        Put in training mode with `optim`, in evaluation mode without.
    dataloader : DataLoader
        Of pairs (inputs, targets), which are moved to `device`; of four tensors (input_ids,
        attention_mask, anything, labels) or dicts with "labels", whose others the model takes by
        name; or of dicts with "img" and "pid". Targets are class indices, or rows of 0 and 1.
    criterion : callable
        From (outputs, targets) to the mean loss of a batch.
    epoch, nepochs : int
        The number of this epoch, counted from 0, and the number of epochs.
    optim : Optimizer, optional
        Without one the model is evaluated.
    device : device
    outString : str
        What the names of the files begin with.
    compute_grads : bool
        In an evaluation, measure the gradient too.
    retrain : bool
        Write no files.
    reference_bugs : bool, optional
        Write the published code's sums of gradients, and return its means of batch means and of
        batch norms. By default as `install` was told, else False.

    Returns
    -------
    mean_loss, mean_accuracy : float
        Means over the samples; in training, each batch counts at the weights that it met. With
        several labels a prediction is right if the largest output is one of them.
    mean_gradnorm : float
        With `compute_grads`: the norm of the mean loss's gradient.

    Raises
    ------
    ValueError
        If dataloader has no samples, as at the end of a script that rejected every removal.

    Notes
    -----
    The files hold the weights and the gradient of the mean loss at these weights, in evaluation
    mode. This takes one more pass over `dataloader`, which leaves PyTorch's random state as it was.
    """
    reference_bugs = bugs(reference_bugs)
    saves = optim is not None and not retrain and epoch >= nepochs - 2
    bank = GradientBank(model) if saves and reference_bugs else None
    gradient = _MeanGradient(model) if optim is None and compute_grads else None

    def after(loss: Tensor, size: int) -> None:
        if optim is not None:
            optim.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optim.step()
            if bank is not None:
                bank.add()
        elif gradient is not None:
            gradient.add(loss, size)

    model.train(optim is not None)
    batches = _one_pass(model, dataloader, criterion, device, after)
    n = sum(size for size, _, _ in batches)
    if not n:
        raise ValueError(
            "dataloader must have samples; it has none. Scripts take samples out of the residual "
            "set also where they reject the removal (val_gap_skip): if all were rejected, none is "
            "left. See what inp_perturb warned of: the noise of HessType='Sekhari' may spoil the "
            "model whatever is removed. Take HessType='CR', a larger epsilon, or "
            "approxType='GaussNewton' with retained="
        )
    if bank is not None:
        bank.write(outString, epoch, n)
    elif saves:
        _write_gradient(model, dataloader, criterion, device, outString, epoch)
    accuracy = sum(correct for _, _, correct in batches) / n
    loss = sum(loss * size for size, loss, _ in batches) / n
    if reference_bugs:
        loss = sum(loss for _, loss, _ in batches) / len(batches)
    if not compute_grads:
        return loss, accuracy
    model.zero_grad()
    return loss, accuracy, 0.0 if gradient is None else gradient.norm(of_batches=reference_bugs)


def _one_pass(
    model: nn.Module,
    dataloader: Any,
    criterion: LossFunction,
    device: Any,
    after: Callable[[Tensor, int], None],
) -> list[tuple[int, float, int]]:
    """Size, mean loss and number of correct predictions of each batch; `after` gets its loss."""
    batches = []
    for batch in dataloader:
        x, y = map_tensors(lambda tensor: tensor.to(device), inputs_and_targets(batch))
        outputs = model(**x) if isinstance(x, Mapping) else model(x)
        outputs = getattr(outputs, "logits", outputs)
        loss = criterion(outputs, y)
        after(loss, len(y))
        predicted = outputs.max(1)[1]
        right = predicted == y if y.ndim == 1 else y.gather(1, predicted[:, None]) > 0
        batches.append((len(y), loss.item(), int(right.sum())))
    return batches


def inputs_and_targets(batch: Any) -> tuple[Any, Tensor]:
    """Both parts of a batch of a script's loader, inputs as a dict where the model takes names."""
    if isinstance(batch, Mapping) and "pid" in batch:
        return batch["img"], batch["pid"]
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 4:
        return {"input_ids": batch[0], "attention_mask": batch[1]}, batch[3]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    has = f"keys {sorted(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} parts"
    raise ValueError(
        "batches must be (inputs, targets), four tensors (input_ids, attention_mask, anything, "
        f"labels), or dicts with 'labels' or with 'img' and 'pid'; got one of {has}"
    )


class _MeanGradient:
    """The mean gradient over the samples of a pass."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._n = model, 0
        self._sums = [torch.zeros_like(p) for p in model.parameters()]
        self._norms: list[float] = []  # of the batches' gradients

    def add(self, loss: Tensor, size: int) -> None:
        """Add the gradient of a batch's mean loss."""
        self._model.zero_grad()
        self._norms.append(backward(loss, self._model)[1])
        self._n += size
        for total, p in zip(self._sums, self._model.parameters(), strict=True):
            if p.grad is not None:
                total += size * p.grad

    def mean(self) -> list[Tensor]:
        return [total / self._n for total in self._sums]

    def norm(self, *, of_batches: bool) -> float:
        """Of the mean gradient, or the mean of the batches' norms."""
        if of_batches:
            return sum(self._norms) / len(self._norms)
        return float(sum(g.double().norm() ** 2 for g in self.mean())) ** 0.5


def _write_gradient(
    model: nn.Module, dataloader: Any, criterion: LossFunction, device: Any, stem: str, epoch: int
) -> None:
    """Write the gradient of the mean loss at the model's weights, and the weights."""
    gradient = _MeanGradient(model)
    generator = getattr(dataloader, "generator", None)
    state = None if generator is None else generator.get_state()
    model.eval()
    with torch.random.fork_rng(devices=[]):
        _one_pass(model, dataloader, criterion, device, gradient.add)
    if generator is not None:
        generator.set_state(state)
    for p, mean in zip(model.parameters(), gradient.mean(), strict=True):
        p.grad = mean if p.requires_grad else None
    write_epoch(stem, epoch, *getGradObjs(model))
    model.zero_grad()
    model.train()


def retrain_model(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    criterion: LossFunction,
    nepochs: int,
    optim: torch.optim.Optimizer,
    device: Any = "cpu",
    *,
    reference_bugs: bool | None = None,
) -> tuple[float, float, float, float, float]:
    """Train a model with a cosine schedule of period 200, and evaluate it.

    Returns
    -------
    val_loss, val_accuracy, train_loss, train_accuracy, train_gradnorm : float
        As :func:`do_epoch` measures them after training.
    """
    bugs_here = bugs(reference_bugs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=200)
    for epoch in range(nepochs):
        do_epoch(model, train_loader, criterion, epoch, nepochs, optim, device, retrain=True)
        schedule.step()

    def measured(loader: Any, *, compute_grads: bool = False) -> tuple[float, ...]:
        return do_epoch(
            model,
            loader,
            criterion,
            0,
            0,
            device=device,
            compute_grads=compute_grads,
            reference_bugs=bugs_here,
        )

    with torch.no_grad():
        val_loss, val_accuracy = measured(val_loader)
    loss, accuracy, norm = measured(train_loader, compute_grads=True)
    return val_loss, val_accuracy, loss, accuracy, norm
