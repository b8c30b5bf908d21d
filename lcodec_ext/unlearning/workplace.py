"""Where a deletion is worked out: a copy of the model, its loss, the settings and a clock."""

import contextlib
import ctypes
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lcodec_ext._checks import check_bool
from lcodec_ext._one_rank import ONE_RANK
from lcodec_ext._torch.adapters import check_adapters, check_trainable
from lcodec_ext._torch.copies import Watched, check_has_values, copy_of, work_copy
from lcodec_ext._torch.decay import each_decay
from lcodec_ext._torch.detours import autocasting
from lcodec_ext._torch.group import AnyRanks
from lcodec_ext._torch.loss import (
    Gradient,
    LossFunction,
    check_loss_fn,
    euclidean_norm,
    loss_in,
    mean_gradient,
    mean_loss,
)
from lcodec_ext._torch.modes import check_module
from lcodec_ext._torch.predict import Score, predict, size_of_losses
from lcodec_ext._torch.samples import Samples, working_dtype
from lcodec_ext._torch.tokens import weight_share
from lcodec_ext.curvature import Selection, UnitSelection
from lcodec_ext.curvature.layout import Layout
from lcodec_ext.unlearning.privacy.linear import CertifiedLinear
from lcodec_ext.unlearning.settings import Settings

_LOSS = "minus the mean loss"  # what is watched where there is neither accuracy nor score


class LossesAndGradients(NamedTuple):
    """Mean losses and gradients of removed and of retained samples; nan and None without these."""

    forget_loss: float
    forget: Gradient
    retained_loss: float
    retained: Gradient | None

    def kept(self, m: int, n_retain: int) -> "Measured":
        """What a deletion needs of them later on."""
        both, retained = math.nan, self.retained
        if retained is not None:
            n = m + n_retain
            both = euclidean_norm(
                (m * self.forget[k] + n_retain * g) / n for k, g in retained.items()
            )
        of_each = norm(self.forget), norm(retained)
        return Measured(self.forget_loss, self.retained_loss, *of_each, both, retained)


@dataclass(eq=False)
class Measured:
    """Mean losses and gradient norms of removed and retained samples; nan without the latter.

    Of the gradients, which are as large as the model, that of the retained samples stays until the
    selection is known.
    """

    forget_loss: float
    retained_loss: float
    forget_norm: float
    retained_norm: float
    training_norm: float  # of the objective on removed and retained samples together
    _retained: Gradient | None
    _on_selection: float = math.nan

    def norm_on(self, layout: Layout) -> float:
        """The retained samples' gradient norm on a selection: on one, once it was settled."""
        return self._on_selection if self._retained is None else norm(self._retained, layout)

    def settle(self, layout: Layout) -> None:
        """Take this norm now, and let the gradient go."""
        self._on_selection, self._retained = self.norm_on(layout), None


@dataclass(eq=False)
class Clock:
    """Seconds by phase; a phase within another one counts for itself only."""

    seconds: dict[str, float] = field(default_factory=dict)
    _within: float = 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what happens meanwhile to a phase."""
        begin, before, self._within = time.perf_counter(), self._within, 0.0
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent - self._within
            self._within = before + spent


@dataclass(frozen=True, eq=False)
class Workplace:
    """A copy of the model in evaluation mode, and what all phases of a deletion share."""

    model: nn.Module  # the copy, whose weights the deletion moves
    loss_fn: LossFunction  # in the dtype of the computation
    settings: Settings
    score: Score | None
    progress: bool
    device: torch.device
    dtype: torch.dtype
    parameters: dict[str, nn.Parameter]  # the trainable ones of the copy
    decay: dict[str, float | Tensor]  # of each parameter, or of each entry, in gradients
    buffers: dict[str, Tensor]  # of the copy, as they were
    watched: Watched  # what the copy must not compute with
    ranks: AnyRanks = ONE_RANK  # over which the samples are spread
    space_bytes: int | None = None  # what a Krylov space may take, where memory is limited
    history: int = 10  # of L-BFGS
    clock: Clock = field(default_factory=Clock)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_fn: LossFunction,
        settings: Settings,
        score: Score | None,
        progress: bool,
        ranks: AnyRanks = ONE_RANK,
    ) -> "Workplace":
        """Check model, loss and score, and copy the model."""
        device = _check_model(model)
        check_loss_fn(loss_fn)
        if score is not None and not callable(score):
            raise TypeError(f"score must be callable; got {type(score).__name__}")
        dtype = settings.dtype or working_dtype(model)
        if settings.autocast is not None and dtype != torch.float32:
            raise ValueError(
                "autocast is of models that compute in float32, and this one is in float64: leave "
                "autocast out, or pass dtype=torch.float32"
            )
        watched: Watched = {}
        work = work_copy(model, dtype, watched)
        parameters = {k: p for k, p in work.named_parameters() if p.requires_grad}
        loss_fn = loss_in(dtype, loss_fn)
        decay: dict[str, float | Tensor] = {**each_decay(settings.weight_decay, parameters)}
        buffers = {k: b.detach().clone() for k, b in work.named_buffers()}
        return cls(
            model=work,
            loss_fn=loss_fn,
            settings=settings,
            score=score,
            progress=check_bool(progress, "progress") and ranks.rank == 0,
            device=device,
            dtype=dtype,
            parameters=parameters,
            decay=decay,
            buffers=buffers,
            watched=watched,
            ranks=ranks,
        )

    @property
    def without_units(self) -> dict[str, int]:
        """Sizes of the trainable parameters that belong to no unit, by name."""
        covered = UnitSelection.all(self.model).layout(self.model).parameters
        return {k: p.numel() for k, p in self.parameters.items() if k not in covered}

    @property
    def n_numbers(self) -> int:
        """Parameters and buffers of the model, trainable or not: what a pass goes through."""
        return sum(t.numel() for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def n_trainable(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """As `Clock.timed`."""
        return self.clock.timed(phase)

    def take_from_first(self, model: nn.Module) -> None:
        """Give a model on all ranks the state of the first one's: rounding may have differed."""
        state = [t for t in (*model.parameters(), *model.buffers()) if t.numel()]
        _copy([self.ranks.as_first(tensor) for tensor in state], state)

    def give_back(self) -> None:
        """Return freed memory to the system, where memory is limited: glibc would keep it."""
        if self.settings.max_memory is None or self.device.type != "cpu":
            return
        with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

    def gradient(
        self, samples: Samples, parameters: Mapping[str, Tensor] | None = None
    ) -> tuple[float, Gradient]:
        """Mean loss, and the gradient of it and the regulariser by parameters (all by default)."""
        return mean_gradient(
            self.model,
            samples,
            self.loss_fn,
            self.parameters if parameters is None else parameters,
            self.settings.batch_size,
            weight_decay=self.decay,
            keep_unused=True,  # `idle` sees to them
            check=True,
        )

    def measure(self, forget: Samples, retained: Samples | None) -> LossesAndGradients:
        """Losses and gradients of both sets at the present weights, without autocast."""
        with autocasting(None):
            if retained is None:
                return LossesAndGradients(*self.gradient(forget), math.nan, None)
            return LossesAndGradients(*self.gradient(forget), *self.gradient(retained))

    def share(self, samples: Samples) -> float:
        """What a sample of a set counts for on average: of a loss over tokens not always 1."""
        return weight_share(self.loss_fn, samples)

    def mean_loss(self, samples: Samples) -> float:
        """Mean loss without the regulariser. It may be NaN or infinite."""
        return mean_loss(self.model, samples, self.loss_fn, self.settings.batch_size)

    def quality(self, samples: Samples) -> "Quality":
        """How good the model is on samples: by accuracy, the score or minus the mean loss."""
        found = predict(self.model, samples, self.loss_fn, self.settings.batch_size, self.score)
        if found.accuracy is None:
            return Quality(_LOSS, -found.loss, found.parts, -found.parts)
        assert found.scores is not None
        watched = "accuracy" if found.counted is None else "token accuracy"
        watched = watched if self.score is None else "the score"
        return Quality(watched, found.accuracy, found.parts, found.scores)

    def unit(self, samples: Samples, quality: "Quality") -> float:
        """What a fall of the quality is counted in: 1, or of losses their own size."""
        if quality.watched != _LOSS:
            return 1.0
        options = self.loss_fn, self.settings.batch_size, quality.losses
        return samples.told(lambda every: size_of_losses(self.model, every, *options))

    def handed_over(self, model: nn.Module, selection: Selection) -> nn.Module:
        """A copy of a model with the new weights of a selection, and the buffers that have changed.

        Casting to the model's dtype rounds the weights; the rounded values are copied back.
        """
        changed = copy_of(model)
        if not selection:
            return changed
        own, now = dict(changed.named_buffers()), dict(self.model.named_buffers())
        moved = [k for k, b in self.buffers.items() if k in own and not _same(b, now[k])]
        _copy([now[k] for k in moved], [own[k] for k in moved])
        with torch.no_grad():
            selection.scatter_(changed, selection.gather(self.model))
            rounded = selection.gather(changed)
            if not torch.isfinite(rounded).all():
                raise ValueError("the new weights overflow the dtype of the model")
            selection.scatter_(self.model, rounded)
        return changed

    def take_over(self, model: nn.Module) -> None:
        """Take the parameters of a model."""
        _copy(model.parameters(), self.model.parameters())


class Quality(NamedTuple):
    """A number that tells how good a model is, larger for better, and what it is the mean of."""

    watched: str  # the name of the number
    value: float
    losses: Tensor  # (n,), what each sample contributes to the mean loss
    each: Tensor  # (n,), whose mean the value is


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Write all parameters and buffers of a model to another one."""
    _copy(source.parameters(), target.parameters())
    _copy(source.buffers(), target.buffers())


def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for new, old in zip(source, target, strict=True):
            if _same(new, old):  # also what cannot be written to, such as an expanded buffer
                continue
            if new.shape != old.shape:  # an observer's that has seen its first data
                old.data = new.detach().clone()
                continue
            with torch.inference_mode() if old.is_inference() else nullcontext():
                old.copy_(new)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    return a.dtype == b.dtype and torch.equal(a.detach(), b.detach())


def norm(gradient: Gradient | None, layout: Layout | None = None) -> float:
    """Euclidean norm of all of a gradient, or of what a layout selects of it; nan of None."""
    if gradient is None:
        return math.nan
    if layout is not None:
        return euclidean_norm([layout.gather(gradient)])
    return euclidean_norm(gradient.values())


def _check_model(model: nn.Module) -> torch.device:
    """Find the device of a model; refuse parameters that are missing or not finite."""
    if isinstance(model, CertifiedLinear):
        raise TypeError(
            "model must be a torch.nn.Module; a CertifiedLinear removes samples by itself: "
            "model.remove(indices)"
        )
    check_module(model)
    check_has_values(model)
    devices = set()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            raise ValueError(f"parameter {name!r} of the model holds NaN or infinity")
        devices.add(parameter.device)
    check_trainable(model)
    check_adapters(model, {id(p) for p in model.parameters() if p.requires_grad})
    if len(devices) > 1:
        raise ValueError(
            f"the model must be on one device; it is on {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()
