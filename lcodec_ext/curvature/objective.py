"""The function whose curvature is taken: the loss on some data, by the selected parameters."""

import copy
from collections.abc import Container, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_choice
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import SAMPLES, Batch, Batches, map_tensors, part_of, tensors_of
from lcodec_ext._torch.loss import LossFunction
from lcodec_ext._torch.modes import plain_arithmetic, twice_differentiable
from lcodec_ext.curvature.masked.model import ForwardPass, MaskedModel
from lcodec_ext.curvature.selection import UnitSelection


class _OwnRandom:
    """While entered, torch's random numbers are its own; they start where the caller stands.

    Those of generators, too, which loaders and samplers have.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._device = device if device.type == "cuda" else None
        self._generators = generators
        self._start = self._now = self._state()

    def _state(self) -> list[Tensor]:
        state = [torch.get_rng_state(), *(g.get_state() for g in self._generators)]
        return state if self._device is None else [*state, torch.cuda.get_rng_state(self._device)]

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        for generator, each in zip(self._generators, state[1:], strict=False):
            generator.set_state(each)
        if self._device is not None:
            torch.cuda.set_rng_state(state[-1], self._device)

    def restart(self) -> None:
        """Begin the same random numbers again."""
        self._now = self._start

    def __enter__(self) -> None:
        self._outside = self._state()
        self._set(self._now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._now = self._state()
        self._set(self._outside)


class Objective:
    """The loss of a model on some data, summed or averaged, by its selected parameters.

    Parameters
    ----------
    model, loss_fn, data, selection, dtype, reduction, progress
        As `HessianOperator` takes them.

    Attributes
    ----------
    masked : MaskedModel
    """

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: UnitSelection,
        *,
        dtype: torch.dtype | None,
        reduction: str,
        progress: bool,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if isinstance(loss_fn, type):
            raise TypeError(
                f"loss_fn must be callable on outputs and targets; got the class {loss_fn.__name__}"
                ", of which it takes an instance"
            )
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}")
        self.reduction = check_choice(reduction, "reduction", ("mean", "sum"))
        self.progress = check_bool(progress, "progress")
        self.masked = MaskedModel(model, selection, dtype)
        self.selection = selection
        if isinstance(loss_fn, nn.Module):
            loss_fn = copy.deepcopy(loss_fn).to(self.masked.dtype)
        self.loss_fn = loss_fn
        self.batches = Batches(data, self.masked.device, self.masked.dtype)
        self._random = _OwnRandom(self.masked.device, self.batches.generators)
        self._sizes: list[int] = []
        self._reduction_checked = False
        self._first: tuple[Any, Batch] | None = None
        self._plain: dict[tuple[int, int], bool] = {}
        #: Whether the gradients of a piece of a batch have factors, by batch and first sample.
        self.factored: dict[tuple[int, int], bool] = {}

    @property
    def n_samples(self) -> int:
        """Known after the first pass, and so is n_batches."""
        return sum(self._sizes)

    @property
    def n_batches(self) -> int:
        return len(self._sizes)

    def share(self, batch: Batch) -> float:
        """What the loss of a batch is multiplied with in the objective."""
        return batch.size / self.n_samples if self.reduction == "mean" else 1.0

    @property
    def sample_share(self) -> float:
        """What the loss of a sample is multiplied with in the objective, where it is plain."""
        return 1 / self.n_samples if self.reduction == "mean" else 1.0

    def sum_of_losses(self, run: ForwardPass, batch: Batch) -> Tensor:
        """The sum of the losses of a batch's samples, of a loss that is plain."""
        loss = self.loss(run.outputs, batch)
        return loss * batch.size if self.reduction == "mean" else loss

    def passes(self, what: str = "", skip: Container[int] = ()) -> Iterator[tuple[int, Batch]]:
        """Go through the numbered batches, but for some; the same ones every time."""
        first = not self._sizes
        self._random.restart()
        with progress_bar(self.progress and bool(what), desc=what, unit="batch") as bar:
            with self._random:
                batches = iter(self.batches)
            sizes: list[int] = []
            while True:
                with self._random:
                    batch = next(batches, None)
                if batch is None:
                    break
                sizes.append(batch.size)
                if not first and sizes != self._sizes[: len(sizes)]:
                    break
                if len(sizes) - 1 not in skip:
                    yield len(sizes) - 1, batch
                bar.update()
        if first and sizes:
            self._sizes = sizes
        elif not sizes:
            raise ValueError("data is empty: it has no batch")
        if sizes != self._sizes:
            raise ValueError(
                "data must give the same batches each time it is read; batches had "
                f"{self._sizes[:8]} samples at first, and {sizes[:8]} later"
            )

    def run(self, batch: Batch) -> ForwardPass:
        """Call the model, with random numbers of its own."""
        with self._random, twice_differentiable():
            return self.masked.run(batch)

    @plain_arithmetic()
    def gradient(self) -> Tensor:
        """The gradient by the selected parameters, shape (p,)."""
        total = torch.zeros_like(self.masked.theta)
        for _, batch in self.passes("gradient"):
            run = self.run(batch)
            with twice_differentiable():
                self.check_cut(run.outputs, batch)
                loss = self.loss(run.outputs, batch)
                if loss.requires_grad:
                    parts = torch.autograd.grad(loss, run.displacements, materialize_grads=True)
                    size = batch.size if self.reduction == "mean" else 1
                    total += self.masked.join(parts) * size
        return total / self.n_samples if self.reduction == "mean" else total

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Call the loss and check what it returns."""
        loss = self.loss_fn(outputs, batch.targets)
        if not isinstance(loss, Tensor) or loss.ndim > 0:
            given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
            raise ValueError(f"loss_fn must return a scalar tensor; got {given}")
        if not torch.isfinite(loss):
            raise ValueError("the loss is NaN or infinite")
        if loss.requires_grad:
            self.masked.check_loss(loss)
        return loss

    def check_cut(self, outputs: Any, batch: Batch) -> None:
        """Refuse a loss for which it matters how the package cuts samples into batches.

        Halves of the first batch, and the first half of it together with every other batch, must
        give the mean of what they give alone.
        """
        if not self._reduction_checked:
            self._check_reduction(outputs, batch)
            self._reduction_checked = True
        if not self.batches.cut_here:
            return
        why = f"since data is cut into batches of {SAMPLES}; or pass batches of your own"
        outputs = map_tensors(torch.Tensor.detach, outputs)
        if self._first is None:
            self._first = outputs, batch
            if batch.size == SAMPLES:
                self.check_plain(outputs, batch, 2, why)
            return
        some, of = self._first
        both = ((outputs, batch.targets), (some, of.targets))
        joined, targets = _joined(*both, batch.size, of.size)
        n = batch.size + of.size
        self.check_plain(joined, Batch((), {}, targets, n), -(-n // batch.size), why, batch.size)

    def _check_reduction(self, outputs: Any, batch: Batch) -> None:
        """Refuse a loss that is a sum where a mean was said to be one, and the other way round."""
        n = batch.size
        if n < 2:
            return
        other = "sum" if self.reduction == "mean" else "mean"
        with torch.no_grad():
            outputs = map_tensors(torch.Tensor.detach, outputs)
            try:
                whole, total = self._in_parts(outputs, batch, -(-n // 2), other)
            except (RuntimeError, ValueError, IndexError):  # it takes no half of a batch
                return
        if whole != 0 and torch.isclose(total, whole, rtol=_within(whole)):
            raise ValueError(
                f"loss_fn must be the {self.reduction} over the samples of a batch, as "
                f"reduction={self.reduction!r} says; on a batch of {n} samples it is the {other} "
                f"of what it is on its halves: pass reduction={other!r}"
            )

    def _in_parts(
        self, outputs: Any, batch: Batch, step: int, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the mean or sum of those of its parts."""
        n = batch.size
        whole = self.loss(outputs, batch)
        total = torch.zeros_like(whole)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            loss = self.loss_fn(part_of(outputs, n, part), part_of(batch.targets, n, part))
            total += loss * ((part.stop - part.start) / n if reduction == "mean" else 1)
        return whole, total

    def is_plain(self, outputs: Any, batch: Batch, key: tuple[int, int]) -> bool:
        """Whether the loss of a batch is the mean, or sum, of the losses of its samples.

        Found out once for each batch; key says which it is.
        """
        if key not in self._plain:
            try:
                self.check_plain(outputs, batch, batch.size, "")
            except ValueError:
                self._plain[key] = False
            else:
                self._plain[key] = True
        return self._plain[key]

    def check_plain(
        self, outputs: Any, batch: Batch, parts: int, why: str, step: int | None = None
    ) -> None:
        """Refuse a loss of a batch that is not the mean, or sum, of the losses of its parts."""
        n = batch.size
        step = step or -(-n // min(parts, n))
        with torch.no_grad():
            outputs = map_tensors(torch.Tensor.detach, outputs)
            whole, total = self._in_parts(outputs, batch, step, self.reduction)
        if not torch.isclose(total, whole, rtol=_within(whole)):
            raise ValueError(
                f"loss_fn must be the plain {self.reduction} over the samples of a batch, {why} "
                "(no class weights, no ignored targets, no mean over tokens of samples of unequal "
                f"length); on {n} samples it is {whole.item():.6g}, and the {self.reduction} of "
                f"the losses of its parts {total.item():.6g}"
            )


def _within(loss: Tensor) -> float:
    return 1e-4 if loss.dtype == torch.float32 else 1e-8


def _joined(a: Any, b: Any, n_a: int, n_b: int) -> Any:
    """Nested tensors with the samples of both, those of a first."""
    others = tensors_of(b)

    def join(tensor: Tensor) -> Tensor:
        other = next(others)
        if tensor.ndim and len(tensor) == n_a and len(other) == n_b:
            return torch.cat([tensor, other])
        return tensor

    return map_tensors(join, a)
