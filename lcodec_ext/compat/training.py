"""What scripts import from ``nn_utils`` and ``data_utils`` of the published code."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset

from lcodec_ext._checks import check_bool
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext.compat.defects import GradientBank
from lcodec_ext.compat.epoch_files import backward, getGradObjs, write_epoch


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
        One of the two. `include_indices` keeps its order and takes precedence.
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
    criterion: LossFunction,
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
    """Train for an epoch, or evaluate. Training writes the files of its last two epochs.

    Parameters
    ----------
    model : Module
        Put in training mode with `optim`, in evaluation mode without.
    dataloader : DataLoader
        Of pairs (inputs, class indices), which are moved to `device`.
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
    reference_bugs : bool
        Write the published code's sums of gradients, and return its means of batch means and of
        batch norms.

    Returns
    -------
    mean_loss, mean_accuracy : float
        Means over the samples; in training, each batch counts at the weights that it met.
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
    check_bool(reference_bugs, "reference_bugs")
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
    for x, y in dataloader:
        x, y = x.to(device), y.to(device)
        outputs = model(x)
        loss = criterion(outputs, y)
        after(loss, len(y))
        batches.append((len(y), loss.item(), int((outputs.max(1)[1] == y).sum())))
    return batches


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
