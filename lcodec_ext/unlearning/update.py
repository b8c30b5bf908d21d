"""The deletion: a damped Newton step of the retained objective on selected units."""

import copy
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lcodec_ext import FociResult
from lcodec_ext._validation import check_bool, check_choice, check_integer, check_real, check_seed
from lcodec_ext.curvature._masked import twice_differentiable
from lcodec_ext.curvature.operators import GaussNewtonOperator, HessianOperator
from lcodec_ext.curvature.solvers import IndefiniteCurvatureError, SolveResult
from lcodec_ext.curvature.units import UnitLayout, UnitSelection
from lcodec_ext.unlearning.perturbation import (
    ActivationRecorder,
    Call,
    LossFunction,
    record_perturbations,
    select_units,
)
from lcodec_ext.unlearning.samples import Samples, as_samples
from lcodec_ext.unlearning.units import Layer, check_selection, find_layers

Curvature = Literal["gauss_newton", "hessian"]

_PROBE = 32  # samples on which model and loss are checked, of either set
_RTOL = 1e-10  # of the residual at which conjugate gradients end


class BeforeAfter(NamedTuple):
    """A quantity before and after the step."""

    before: float
    after: float


@dataclass(frozen=True, eq=False, repr=False)
class UnlearnResult:
    """The model after `unlearn`, and what was done to it.

    Gradients and losses are of the data and weights in float64, the model in evaluation mode.
    The retained objective is the mean loss of the retained samples plus (weight_decay / 2) |w|^2,
    w being all trainable parameters.

    Attributes
    ----------
    model : Module
        A new model, or with inplace=True the one that was given.
    selection : UnitSelection
        The units whose parameters were changed.
    selection_method : {"lfoci", "all", "random", "given"}
    foci : FociResult or None
        The selection by L-FOCI: T of the loss, and in `names` the unit and call ("fc1[3] call 0")
        of every step.
    curvature : {"gauss_newton", "hessian"}
    curvature_plan : str
        Which way products with the matrix were computed, and why.
    damping, weight_decay : float
        As used.
    n_forget, n_retain : int
        Samples removed and retained.
    n_parameters : int
        Parameters of the selected units.
    n_trainable : int
        Trainable parameters of the model.
    n_units : int
        Units of the model that can be selected.
    layers_without_units : dict of str to str
        Linear and convolution layers that could not be selected, and why.
    step_norm : float
        Euclidean norm of the change of the weights.
    solve_method : {"cholesky", "cg", "woodbury"}
        How the step was solved for; see `CurvatureOperator.solve`.
    solve_iterations : int
        Of conjugate gradients; 0 for the direct methods.
    solve_residual : float
        |matrix @ step - gradient| / |gradient|, of the step itself.
    training_gradient_norm : float
        Gradient norm, before, of the objective on removed and retained samples together. The
        step takes it for zero: far from that (compare `gradient_norm.before`), it is wrong.
    gradient_norm, gradient_norm_selected : BeforeAfter
        Of the retained objective, over all trainable parameters and over those selected.
    loss_forget, loss_retain : BeforeAfter
        Mean losses, without the regulariser.
    seconds : dict of str to float
        Time taken by "perturbation", "selection", "gradients", "curvature", "solve", "evaluation"
        and in "total".
    seed : int
    """

    model: nn.Module
    selection: UnitSelection
    selection_method: str
    foci: FociResult | None
    curvature: str
    curvature_plan: str
    damping: float
    weight_decay: float
    n_forget: int
    n_retain: int
    n_parameters: int
    n_trainable: int
    n_units: int
    layers_without_units: dict[str, str]
    step_norm: float
    solve_method: str
    solve_iterations: int
    solve_residual: float
    training_gradient_norm: float
    gradient_norm: BeforeAfter
    gradient_norm_selected: BeforeAfter
    loss_forget: BeforeAfter
    loss_retain: BeforeAfter
    seconds: dict[str, float]
    seed: int

    def __repr__(self) -> str:
        def change(pair: BeforeAfter) -> str:
            return f"{pair.before:.4g} -> {pair.after:.4g}"

        iterations = f" of {self.solve_iterations} iterations" * (self.solve_iterations > 0)
        layers = ", ".join(
            f"{name or '(model)'}: {len(units)}" for name, units in self.selection.units.items()
        )
        return "\n".join(
            [
                f"UnlearnResult: {self.n_forget} of {self.n_forget + self.n_retain} samples "
                f"removed in {self.seconds['total']:.2f} s",
                f"  units         {len(self.selection)} of {self.n_units}, "
                f"{self.selection_method} ({layers})",
                f"  parameters    {self.n_parameters:,} of {self.n_trainable:,}",
                f"  curvature     {self.curvature}, weight decay {self.weight_decay:g}, damping "
                f"{self.damping:g}, {self.solve_method}{iterations}, residual "
                f"{self.solve_residual:.1e}",
                f"  step          norm {self.step_norm:.4g}",
                f"  forget loss   {change(self.loss_forget)}",
                f"  retain loss   {change(self.loss_retain)}",
                f"  gradient norm {change(self.gradient_norm)} retained, on the selection "
                f"{change(self.gradient_norm_selected)}, "
                f"{self.training_gradient_norm:.2g} of training",
            ]
        )


@twice_differentiable()
def unlearn(
    model: nn.Module,
    forget: Any,
    retain: Any,
    loss_fn: LossFunction,
    *,
    selection: UnitSelection | Literal["lfoci", "all", "random"] = "lfoci",
    curvature: Curvature = "gauss_newton",
    weight_decay: float = 0.0,
    damping: float | None = None,
    n_perturbations: int = 1000,
    noise_std: float = 0.1,
    max_units: int | None = None,
    n_units: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    inplace: bool = False,
    progress: bool = False,
) -> UnlearnResult:
    """Remove samples from a trained model by one Newton step on the units they matter to.

    The model is taken to minimise, over the m removed and the n - m retained samples, the mean
    loss plus (weight_decay / 2) |w|^2. On the parameters w_P of the selected units,

    ::

        w_P += (H_P + damping I)^-1 (sum over removed of grad_P (l_i + (weight_decay / 2) |w|^2))
               / (n - m)

    with H_P the Hessian, or the Gauss-Newton matrix, of the retained objective. Where training
    has converged this is a damped Newton step of that objective. It is a heuristic on anything
    but a convex model with all units selected: compare it with retraining.

    Parameters
    ----------
    model : Module
        Its layers `nn.Linear` and `nn.Conv1d`, `Conv2d`, `Conv3d` have the units, one for each
        output feature or channel. Other parameters (norms, embeddings) are never changed. It maps
        one tensor to one tensor, samples along the first axis of both.
    forget, retain : tuple of two tensors, torch Dataset or torch DataLoader
        Removed and retained training samples, disjoint, as (inputs, targets). A DataLoader must
        not shuffle or drop. All on the model's device.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, the mean loss of a batch: ``F.cross_entropy``,
        ``nn.MSELoss()``. Class weights and ignored targets are no means over samples, and
        refused.
    selection : {"lfoci", "all", "random"} or UnitSelection, default "lfoci"
        "lfoci", the paper's: the Markov blanket of the loss among the units' activations, when
        noise perturbs the inputs of the removed samples. "all": every unit. "random": n_units
        drawn without replacement. Or the units themselves.
    curvature : {"gauss_newton", "hessian"}, default "gauss_newton"
        The Hessian is exact, and at the solutions of networks usually indefinite: then it is
        refused. The generalised Gauss-Newton matrix never is indefinite where the loss is convex
        in the outputs, and equals the Hessian where the outputs are linear in w.
    weight_decay : float, default 0.0
        lambda of the objective that was trained, (lambda / 2) |w|^2 over all trainable
        parameters. `torch.optim.SGD` and `Adam` mean this by their weight_decay; AdamW decouples
        it and has no such objective.
    damping : float, optional
        Added to the diagonal. By default max(weight_decay, 1e-4): on small networks with weight
        decays of 1e-4 to 3e-3 the damping that came closest to retraining was about the weight
        decay, and without either the Gauss-Newton matrix is singular. 0 gives the plain Newton
        step, right for a convex model.
    n_perturbations : int, default 1000
        Noise draws for "lfoci", the paper's number. At least 3.
    noise_std : float, default 0.1
        Standard deviation of that noise, in the units of the inputs; the paper's value, for
        inputs scaled to about 1.
    max_units : int, optional
        Most units that "lfoci" may select.
    n_units : int, optional
        How many units "random" draws; needed there.
    batch_size : int, default 256
        Most samples in one forward pass. It bounds the memory, but for what is kept of the
        curvature, and does not change the noise.
    seed : int, default 0
        Of the perturbations, of L-FOCI's noise and of "random".
    inplace : bool, default False
        Change the given model instead of a copy. It stays as it was if anything fails.
    progress : bool, default False
        Show progress bars; needs tqdm.

    Returns
    -------
    UnlearnResult

    Raises
    ------
    IndefiniteCurvatureError
        If the damped curvature is found not to be positive definite, as it is where it is
        factorised, and by conjugate gradients where they meet such a direction. If these do not
        converge, with neither weight decay nor damping.
    ValueError
        For samples, a model or options that cannot be used, for L-FOCI selecting nothing, and
        wherever a NaN or infinity turns up; the message names it.
    TypeError
        For arguments of the wrong type.

    Warns
    -----
    ConvergenceWarning
        If conjugate gradients end above a relative residual of 1e-10.
    UserWarning
        If the step raises the loss of the retained samples by much, and if all removed samples are
        among those.

    Notes
    -----
    Works on a float64 copy of the model in evaluation mode: dropout is off, batch norm uses its
    running statistics. The matrix is a `GaussNewtonOperator` or `HessianOperator` of
    `lcodec_ext.curvature`. On d selected parameters, N retained samples and C outputs, it is solved
    in N C rows where these are fewer than d and at most 2048 (Gauss-Newton); formed and factorised
    for d up to 256, or 2048 where all units are of the layer that gives the outputs; and solved by
    conjugate gradients otherwise, in at most 1000 products. A product is two or three backward
    passes over the retained samples, from the loss to the first selected layer, on graphs of which
    up to 512 MiB are kept.

    References
    ----------
    R. Mehta, S. Pal, V. Singh and S. Ravi, "Deep Unlearning via Randomized Conditionally
    Independent Hessians", CVPR 2022: Algorithm 1, without its final noise.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.randn(100, 4, generator=torch.manual_seed(0)), torch.arange(100) % 3
    >>> model = torch.nn.Linear(4, 3)
    >>> loss_fn = torch.nn.functional.cross_entropy
    >>> result = unlearn(model, (x[:5], y[:5]), (x[5:], y[5:]), loss_fn, selection="all")
    >>> result.n_parameters, result.n_units
    (15, 3)
    """
    check_choice(curvature, "curvature", ("gauss_newton", "hessian"))
    check_real(weight_decay, "weight_decay", 0)
    damping = max(weight_decay, 1e-4) if damping is None else check_real(damping, "damping", 0)
    check_integer(n_perturbations, "n_perturbations", 3)
    check_real(noise_std, "noise_std", 0)
    check_integer(batch_size, "batch_size", 1)
    check_seed(seed, optional=False)
    check_bool(inplace, "inplace")
    check_bool(progress, "progress")
    method = _check_selection(selection, max_units, n_units)
    device = _check_model(model)
    forget = as_samples(forget, "forget", device)
    retain = as_samples(retain, "retain", device)
    _warn_of_overlap(forget, retain)
    if method == "lfoci" and not forget.inputs.is_floating_point():
        raise ValueError(
            f"the inputs of forget are integers ({forget.inputs.dtype}) and cannot be perturbed by "
            "Gaussian noise. Convert images to floating point; for token ids take selection='all', "
            "'random' or a UnitSelection"
        )
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable; got an object of type {type(loss_fn).__name__}")
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).double()
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    work = copy.deepcopy(model).double().eval()
    layers, without = find_layers(work)
    calls = _probe(work, layers, forget, retain, loss_fn)
    for name in layers.keys() - {call.layer for call in calls}:
        without[name] = "the forward pass does not call it"
        del layers[name]
    if not layers:
        reasons = "".join(f"; {name!r}: {reason}" for name, reason in without.items())
        raise ValueError(
            f"the model has no Linear or convolution layer whose units can be selected{reasons}"
        )
    all_units = [(name, unit) for name, layer in layers.items() for unit in range(layer.n_units)]

    foci = None
    if isinstance(selection, UnitSelection):
        chosen = selection
    elif selection == "all":
        chosen = _select(all_units)
    elif selection == "random":
        chosen = _random_units(all_units, n_units, seed)
    else:
        with _timed(seconds, "perturbation"):
            activations, losses = record_perturbations(
                work,
                layers,
                calls,
                forget,
                loss_fn,
                n_perturbations=n_perturbations,
                noise_std=noise_std,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        with _timed(seconds, "selection"):
            found, foci = select_units(
                layers,
                calls,
                activations,
                losses,
                max_units=max_units,
                seed=seed,
                progress=progress,
            )
            chosen = _select([unit for unit in all_units if unit in found])
    check_selection(chosen, layers)
    layout = UnitLayout(chosen, work)

    m, n = len(forget), len(forget) + len(retain)
    weights = {k: p.detach() for k, p in work.named_parameters() if p.requires_grad}
    theta = layout.gather(weights)
    with _timed(seconds, "gradients"):
        removed = _objective(work, forget, loss_fn, weight_decay, batch_size, "forget")
        retained = _objective(work, retain, loss_fn, weight_decay, batch_size, "retain")
        training = {
            k: (m * g + (n - m) * retained.gradient[k]) / n for k, g in removed.gradient.items()
        }
    with _timed(seconds, "curvature"):
        kind = GaussNewtonOperator if curvature == "gauss_newton" else HessianOperator
        # Plain pairs, whose length is not that of the samples in them.
        batches = [(inputs, targets) for inputs, targets in retain.chunks(batch_size)]
        operator = kind(
            work,
            loss_fn,
            batches,
            chosen,
            damping=damping,
            weight_decay=weight_decay,
            progress=progress,
        )
    with _timed(seconds, "solve"):
        solution = _solve(operator, layout.gather(removed.gradient) * (m / (n - m)), curvature)
    plan = operator.plan
    del operator  # and the graphs that it keeps
    with _timed(seconds, "evaluation"):
        # Into a copy first, also in place: the given model changes only when all has gone well.
        # What is evaluated are the new weights as rounded to the model's dtype.
        changed = copy.deepcopy(model)
        chosen.scatter_(changed, theta + solution.x)
        rounded = chosen.gather(changed).detach()
        if not torch.isfinite(rounded).all():
            raise ValueError("the new weights overflow the dtype of the model")
        chosen.scatter_(work, rounded)
        removed_after = _objective(work, forget, loss_fn, weight_decay, batch_size, "forget")
        retained_after = _objective(work, retain, loss_fn, weight_decay, batch_size, "retain")
    if inplace:
        chosen.scatter_(model, rounded)
        changed = model
    if retained_after.loss > 1.5 * retained.loss + 0.05:
        warnings.warn(
            f"the step raised the mean loss of the retained samples from {retained.loss:.3g} to "
            f"{retained_after.loss:.3g}: it went too far, as it does where the model was not "
            f"trained to a stationary point. Take a larger damping (it was {damping:.3g}); 10 to "
            "1000 times as much is not unusual for networks",
            stacklevel=3,  # behind the decorator
        )
    seconds["total"] = time.perf_counter() - begin
    return UnlearnResult(
        model=changed,
        selection=chosen,
        selection_method=method,
        foci=foci,
        curvature=curvature,
        curvature_plan=plan,
        damping=damping,
        weight_decay=float(weight_decay),
        n_forget=m,
        n_retain=n - m,
        n_parameters=layout.size,
        n_trainable=sum(w.numel() for w in weights.values()),
        n_units=len(all_units),
        layers_without_units=without,
        step_norm=solution.x.norm().item(),
        solve_method=solution.method,
        solve_iterations=solution.iterations,
        solve_residual=solution.residual,
        training_gradient_norm=_norm(training),
        gradient_norm=BeforeAfter(_norm(retained.gradient), _norm(retained_after.gradient)),
        gradient_norm_selected=BeforeAfter(
            layout.gather(retained.gradient).norm().item(),
            layout.gather(retained_after.gradient).norm().item(),
        ),
        loss_forget=BeforeAfter(removed.loss, removed_after.loss),
        loss_retain=BeforeAfter(retained.loss, retained_after.loss),
        seconds=seconds,
        seed=int(seed),
    )


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - begin


def _check_selection(selection: object, max_units: object, n_units: object) -> str:
    """Name the selection method; refuse options that belong to another one."""
    method = "given" if isinstance(selection, UnitSelection) else selection
    if method not in ("given", "lfoci", "all", "random"):
        raise ValueError(
            "selection must be 'lfoci', 'all', 'random' or a UnitSelection; got "
            f"{selection!r} ({type(selection).__name__})"
        )
    for value, name, owner in ((max_units, "max_units", "lfoci"), (n_units, "n_units", "random")):
        if value is not None:
            check_integer(value, name, 1)
            if method != owner:
                raise ValueError(f"{name} belongs to selection={owner!r}; got selection={method!r}")
    if method == "random" and n_units is None:
        raise ValueError("selection='random' needs n_units, the number of units to draw")
    return str(method)


def _check_model(model: object) -> torch.device:
    """Find the device of a model; refuse parameters that are missing or not finite."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    devices = set()
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"parameter {name!r} is not initialised; run the model once")
        if not torch.isfinite(parameter).all():
            raise ValueError(f"parameter {name!r} of the model holds NaN or infinity")
        devices.add(parameter.device)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameter")
    if len(devices) > 1:
        raise ValueError(
            f"the model must be on one device; it is on {', '.join(sorted(map(str, devices)))}"
        )
    return devices.pop()


def _probe(
    model: nn.Module,
    layers: dict[str, Layer],
    forget: Samples,
    retain: Samples,
    loss_fn: LossFunction,
) -> list[Call]:
    """Check model and loss on a few samples; return the calls of the layers, in order."""
    parts = [
        Samples(*(tensor[:: max(1, len(tensor) // _PROBE)][:_PROBE] for tensor in samples))
        for samples in (forget, retain)
    ]
    for what, (a, b) in zip(("inputs", "targets"), zip(*parts, strict=True), strict=True):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ValueError(
                f"the {what} of forget and retain must be alike; one of forget has shape "
                f"{tuple(a.shape[1:])} and {a.dtype}, of retain {tuple(b.shape[1:])} and {b.dtype}"
            )
    inputs, targets = (torch.cat(pair) for pair in zip(*parts, strict=True))
    with ActivationRecorder(layers) as recorder, torch.no_grad():
        outputs = model(inputs)
        calls = list(recorder.take())
        single = model(inputs[:1])
    if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != len(inputs):
        given = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs)
        raise ValueError(
            "the model must return one tensor with samples along its first axis; from "
            f"{len(inputs)} samples it returned {given}"
        )
    if not torch.isfinite(outputs).all():
        raise ValueError("the outputs of the model hold NaN or infinity")
    if not torch.allclose(single, outputs[:1], rtol=1e-6, atol=1e-9):
        raise ValueError(
            "the output of a sample changes with the other samples in its batch, or at random; "
            "the loss, then, is not a mean over samples"
        )
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, Tensor) or loss.ndim > 0:
        given = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss)
        raise ValueError(f"loss_fn must return a scalar tensor, the mean loss; got {given}")
    if not torch.isfinite(loss):
        raise ValueError("the loss is NaN or infinite")
    _check_mean(loss_fn, outputs, targets, loss)
    return calls


def _warn_of_overlap(forget: Samples, retain: Samples) -> None:
    """Warn if every sample to delete is also among those to retain."""

    def keys(samples: Samples) -> set[bytes]:
        inputs, targets = (t.detach().cpu().contiguous().numpy() for t in samples)
        return {x.tobytes() + y.tobytes() for x, y in zip(inputs, targets, strict=True)}

    if keys(forget) <= keys(retain):
        warnings.warn(
            "every sample of forget is among those of retain: pass as retain the training samples "
            "that stay, without the deleted ones",
            stacklevel=4,  # behind unlearn and its decorator
        )


def _check_mean(loss_fn: LossFunction, outputs: Tensor, targets: Tensor, loss: Tensor) -> None:
    """Refuse a loss of a batch that is not the mean of its samples' losses."""
    pairs = zip(torch.split(outputs, 1), torch.split(targets, 1), strict=True)
    with torch.no_grad():
        mean = torch.stack([loss_fn(output, target) for output, target in pairs]).mean()
    if not torch.isclose(loss, mean, rtol=1e-6, atol=1e-12):
        raise ValueError(
            "loss_fn must be the plain mean over the samples of a batch (reduction='mean', no "
            f"class weights, no ignored targets); on {len(outputs)} samples it is "
            f"{loss.item():.6g} and the mean of their single losses {mean.item():.6g}"
        )


def _select(units: list[tuple[str, int]]) -> UnitSelection:
    """Make a selection from pairs of layer and unit; layers in their order of appearance."""
    by_layer: dict[str, list[int]] = {}
    for name, unit in units:
        by_layer.setdefault(name, []).append(unit)
    return UnitSelection(by_layer)


def _random_units(units: list[tuple[str, int]], n_units: int | None, seed: int) -> UnitSelection:
    assert n_units is not None  # checked with the other arguments
    if n_units > len(units):
        raise ValueError(f"n_units is {n_units}; the model has {len(units)} units")
    drawn = np.random.default_rng(seed).choice(len(units), n_units, replace=False)
    return _select([units[i] for i in np.sort(drawn)])


class _Objective(NamedTuple):
    loss: float  # mean, without the regulariser
    gradient: dict[str, Tensor]  # with it, by parameter name


def _objective(
    model: nn.Module,
    samples: Samples,
    loss_fn: LossFunction,
    weight_decay: float,
    batch_size: int,
    name: str,
) -> _Objective:
    """Compute the mean loss, and the gradient of the objective by every trainable parameter."""
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    gradient = {k: weight_decay * p.detach() for k, p in weights.items()}
    total = 0.0
    for inputs, targets in samples.chunks(batch_size):
        outputs = model(inputs)
        mean = loss_fn(outputs, targets)
        loss = mean * (len(inputs) / len(samples))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss of the {name} samples is NaN or infinite")
        if not loss.requires_grad:
            raise ValueError("the loss does not depend on the parameters of the model")
        _check_mean(loss_fn, outputs.detach(), targets, mean.detach())
        total += loss.item()
        parts = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for k, part in zip(weights, parts, strict=True):
            if part is not None:
                gradient[k] += part
    for k, g in gradient.items():
        if not torch.isfinite(g).all():
            raise ValueError(f"the gradient of the {name} samples by {k!r} holds NaN or infinity")
    return _Objective(total, gradient)


def _solve(
    operator: GaussNewtonOperator | HessianOperator, gradient: Tensor, curvature: Curvature
) -> SolveResult:
    """Solve for the step; refuse, with advice, a matrix that is not positive definite."""
    damping, weight_decay = operator.damping, operator.weight_decay
    rayleigh, least = math.nan, None
    try:
        solution = operator.solve(gradient, rtol=_RTOL)
        if solution.method != "cg" or solution.residual <= _RTOL or damping + weight_decay > 0:
            return solution
        found = f"the residual is {solution.residual:.2g} after {solution.iterations} iterations"
    except IndefiniteCurvatureError as error:
        rayleigh, least = error.rayleigh, error.least_damping
        found = f"its smallest eigenvalue is at most {rayleigh:.4g}"
    if least is None:
        state = "singular or nearly so"
        advice = f"a larger damping, for instance {max(1e-4, 10 * damping):g}"
    else:
        state = "indefinite"
        advice = f"damping above {1.05 * (damping + least):.2g}"  # 5% cover the rounding
        if curvature == "hessian":
            advice = (
                "curvature='gauss_newton', which never is indefinite for a loss that is convex in "
                f"the outputs, or {advice}"
            )
        else:
            advice = f"a loss that is convex in the outputs, curvature='hessian' or {advice}"
    raise IndefiniteCurvatureError(
        f"the {curvature} matrix of the retained objective is {state} on the {len(gradient):,} "
        f"selected parameters: {found}, with weight_decay={weight_decay:g} and "
        f"damping={damping:g} included. Use {advice}",
        rayleigh,
        least,
    )


def _norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradient.values()]).norm())
