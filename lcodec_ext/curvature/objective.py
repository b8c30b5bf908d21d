"""The function whose curvature is taken: the loss on some data, by the selected parameters."""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_bool, check_choice
from lcodec_ext._progress import progress_bar
from lcodec_ext._torch.batches import (
    SAMPLES,
    Batch,
    Batches,
    NoSamplesError,
    joined,
    map_tensors,
)
from lcodec_ext._torch.faults import fault_of
from lcodec_ext._torch.loss import (
    LossFunction,
    check_classes,
    check_loss_fn,
    check_reduction,
    differ_in_shape,
    ignored_labels,
    loss_in,
    loss_in_parts,
    loss_of,
    same_loss,
    shapes_differ,
)
from lcodec_ext._torch.modes import check_module, plain_arithmetic, twice_differentiable
from lcodec_ext._torch.token_loss import TokenLoss
from lcodec_ext._torch.tokens import check_counted, found_in, has_tokens
from lcodec_ext.curvature.masked.model import ForwardPass, MaskedModel
from lcodec_ext.curvature.parameters import Selection


class _OwnRandom:
    """Random numbers of torch, and of generators, that start where the caller's stand."""

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

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """While entered, these are drawn; the caller's stay as they were."""
        outside = self._state()
        self._set(self._now)
        try:
            yield
        finally:
            self._now = self._state()
            self._set(outside)


class Objective:
    """The loss of a model on some data, summed or averaged, by its selected parameters.

    Parameters
    ----------
    model, loss_fn, data, selection, dtype, reduction, progress, cache_bytes
        As `HessianOperator` takes them.
    shared : bool, default False
        Whether other ranks have samples of the same objective: then there may be none here.

    Attributes
    ----------
    masked : MaskedModel
    ignored : tuple of int, or None
        How many labels of a batch the loss ignores, and of how many; None where it was not asked.
    """

    @plain_arithmetic()
    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        selection: Selection,
        *,
        dtype: torch.dtype | None,
        reduction: str,
        progress: bool,
        cache_bytes: int | None = None,
        shared: bool = False,
    ) -> None:
        check_module(model)
        check_loss_fn(loss_fn)
        self.reduction = check_choice(reduction, "reduction", ("mean", "sum"))
        self.progress = check_bool(progress, "progress")
        self.cache_bytes = cache_bytes
        self.masked = MaskedModel(model, selection, dtype)
        self.selection = selection
        self.loss_fn = loss_in(self.masked.dtype, loss_fn)
        self._shared = shared
        try:
            self.batches = Batches(data, self.masked.device, self.masked.dtype)
        except NoSamplesError:
            if not shared:
                raise
            self.batches = Batches([], self.masked.device, self.masked.dtype)
        self._random = _OwnRandom(self.masked.device, self.batches.generators)
        #: Counted tokens, and samples, of a loss over tokens whose mean is taken over these data.
        self.tokens: tuple[int, int] | None = None
        if shared or isinstance(self.loss_fn, TokenLoss):
            self._take_tokens()
        self._sizes: list[int] = []
        self._reduction_checked = False
        self.ignored: tuple[int, int] | None = None
        self._first: tuple[Any, Batch] | None = None
        self._plain: dict[tuple[int, int], bool] = {}
        #: Whether the gradients of a piece of a batch have factors, by batch and first sample.
        self.factored: dict[tuple[int, int], bool] = {}

    def _take_tokens(self) -> None:
        """Make a mean over tokens, told or found out, a plain mean over samples.

        Found out where labels are many to a sample: others are not read once more.
        """
        now = self._random._now
        try:
            self._by_tokens()
        finally:
            self._random._now = now

    def _by_tokens(self) -> None:
        if self.reduction == "sum":
            if isinstance(self.loss_fn, TokenLoss):
                raise ValueError(
                    "reduction='sum' is of a loss that sums, and loss_fn is a mean over tokens: "
                    "leave reduction out for the mean over all of them"
                )
            return
        if not isinstance(self.loss_fn, TokenLoss):
            self._random.restart()
            with self._random.drawn():
                found = found_in(self.loss_fn, self.masked.model, self.batches)
            if found is None:
                return
            self.loss_fn = found
        if self.loss_fn.mean_tokens is None:
            tokens = n = 0
            self._random.restart()
            with self._random.drawn():
                for batch in self.batches:
                    tokens += int(self.loss_fn.counted(batch.targets).sum())
                    n += batch.size
            self.tokens = tokens, n
            if not self._shared:
                self.count_tokens(tokens, n)

    def count_tokens(self, tokens: int, n: int) -> None:
        """Take the mean over so many tokens of so many samples."""
        assert isinstance(self.loss_fn, TokenLoss)
        if n:
            check_counted(tokens, "data", self.loss_fn)
            self.loss_fn = self.loss_fn.of_mean(tokens / n)

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
        """Iterate over the numbered batches, the same ones every time, without those to skip."""
        first = not self._sizes
        self._random.restart()
        with progress_bar(self.progress and bool(what), desc=what, unit="batch") as bar:
            with self._random.drawn():
                batches = iter(self.batches)
            sizes: list[int] = []
            while True:
                with self._random.drawn():
                    batch = next(batches, None)
                if batch is None:
                    break
                if first and not sizes and has_tokens(batch):
                    self._take_tokens()
                sizes.append(batch.size)
                if not first and sizes != self._sizes[: len(sizes)]:
                    break
                if len(sizes) - 1 not in skip:
                    yield len(sizes) - 1, batch
                bar.update()
        if first and sizes:
            self._sizes = sizes
        elif not sizes:
            raise NoSamplesError("data is empty: it has no batch")
        if sizes != self._sizes:
            raise ValueError(
                "data must give the same batches each time it is read; batches had "
                f"{self._sizes[:8]} samples at first, and {sizes[:8]} later"
            )

    def run(self, batch: Batch) -> ForwardPass:
        """Call the model, with random numbers of its own."""
        with self._random.drawn(), twice_differentiable():
            return self.masked.run(batch)

    @plain_arithmetic()
    def gradient(self) -> Tensor:
        """The gradient by the selected parameters, shape (p,)."""
        total = self.masked.zeros()
        for _, batch in self.passes("gradient"):
            run = self.run(batch)
            with twice_differentiable():
                self.check_cut(run.outputs, batch)
                size = batch.size if self.reduction == "mean" else 1
                total += self.derivative(self.loss(run.outputs, batch), run) * size
        return total / self.n_samples if self.reduction == "mean" else total

    def derivative(self, loss: Tensor, run: ForwardPass) -> Tensor:
        """The gradient of the loss of a run, shape (p,); zeros where nothing depends."""
        if not loss.requires_grad:
            return self.masked.zeros()
        parts = torch.autograd.grad(loss, run.displacements, materialize_grads=True)
        return self.masked.join(parts)

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Call the loss and check what it returns."""
        loss = loss_of(self.loss_fn, outputs, batch, "data", ignored=True)
        if not torch.isfinite(loss):
            found = fault_of(self.loss_fn, outputs, batch, "data")
            raise ValueError("the loss is NaN or infinite" + (f": {found}" if found else ""))
        if loss.requires_grad:
            self.masked.check_loss(loss)
        return loss

    def check_cut(self, outputs: Any, batch: Batch) -> None:
        """Refuse a loss for which it matters how the package cuts samples into batches.

        Halves of the first batch, and the first half of it together with every other batch, must
        give the mean of what they give alone. A loss that fails is refused here, too.
        """
        self.loss(map_tensors(Tensor.detach, outputs), batch)
        if not self._reduction_checked:
            self._check_reduction(outputs, batch)
            self._reduction_checked = True
        if self._shared or not self.batches.cut_here:
            self.check_ignored(outputs, batch)
        if not self.batches.cut_here:
            return
        why = f"since data is cut into batches of {SAMPLES}; or pass batches of your own"
        outputs = map_tensors(Tensor.detach, outputs)
        if self._first is None:
            self._first = outputs, batch
            if batch.size == SAMPLES:
                self.check_plain(outputs, batch, -(-batch.size // 2), why)
            return
        some, of = self._first
        sizes = [batch.size, of.size]
        both, targets = joined([(outputs, batch.targets), (some, of.targets)], sizes)
        numbers = [*batch.numbers, *of.numbers]
        self.check_plain(both, Batch((), {}, targets, sum(sizes), numbers), batch.size, why)

    def check_ignored(self, outputs: Any, batch: Batch) -> None:
        """Refuse a mean over valid labels whose batches have unequal shares of them."""
        if self.reduction == "sum":
            return
        ignored, labels = ignored_labels(self.loss_fn, outputs, batch.targets)
        self.ignored = before, of = self.ignored or (ignored, labels)
        if ignored * of != before * labels:
            raise ValueError(
                f"loss_fn ignores {ignored:,} of the {labels:,} labels of a batch of data, and "
                f"{before:,} of {of:,} in the first one: batches count by their samples, which is "
                "not the mean over the valid labels. Pass per_token_loss(loss_fn), or "
                "reduction='sum' with a loss that sums, and multiply the operator with 1 / (number "
                "of valid labels)"
            )

    def _check_reduction(self, outputs: Any, batch: Batch) -> None:
        """Refuse a loss that is a sum where a mean was said to be one, and the other way round."""
        n = batch.size
        if n < 2:
            return
        targets = batch.targets
        if differ_in_shape(outputs, targets) and outputs.numel() == targets.numel():
            whole, total = self._in_parts(outputs, batch, -(-n // 2), self.reduction)
            if not same_loss(total, whole):
                raise ValueError(shapes_differ(outputs, targets))
        other = "sum" if self.reduction == "mean" else "mean"
        try:
            whole, total = self._in_parts(outputs, batch, -(-n // 2), other)
        except (RuntimeError, ValueError, IndexError):  # it takes no half of a batch
            return
        # A loss near zero is both up to rounding.
        if same_loss(total, whole) and not same_loss(
            self._in_parts(outputs, batch, -(-n // 2), self.reduction)[1], whole
        ):
            raise ValueError(
                f"loss_fn must be the {self.reduction} over the samples of a batch, as "
                f"reduction={self.reduction!r} says; on a batch of {n} samples it is the {other} "
                f"of what it is on its halves: pass reduction={other!r}"
            )

    def _in_parts(
        self, outputs: Any, batch: Batch, step: int, reduction: str
    ) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the mean or sum of those of parts of some samples."""
        with torch.no_grad():
            outputs = map_tensors(Tensor.detach, outputs)
            whole = self.loss(outputs, batch)
            n = batch.size
            return whole, loss_in_parts(self.loss_fn, outputs, batch.targets, n, step, reduction)

    def is_plain(self, outputs: Any, batch: Batch, key: tuple[int, int]) -> bool:
        """Whether the loss of a batch is the mean, or sum, of the losses of its samples.

        Found out once for each batch; key says which it is.
        """
        if key not in self._plain:
            try:
                self.check_plain(outputs, batch, 1, "")
            except ValueError:
                self._plain[key] = False
            else:
                self._plain[key] = True
        return self._plain[key]

    def check_plain(self, outputs: Any, batch: Batch, step: int, why: str) -> None:
        """Refuse a loss of a batch that is not the mean, or sum, of those of parts of it."""
        whole, total = self._in_parts(outputs, batch, step, self.reduction)
        if not same_loss(total, whole):
            check_classes(self.loss_fn, outputs, batch, "data")  # ignored ones
        why = f", {why}" if why else ""
        of = outputs, batch.targets
        check_reduction(whole, total, batch.size, reduction=self.reduction, why=why, of=of)
