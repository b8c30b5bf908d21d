"""Iterations until the true residual is reached."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lcodec_ext._callers import warn
from lcodec_ext._checks import check_integer, check_real
from lcodec_ext._progress import progress_bar
from lcodec_ext.curvature.solvers.result import ConvergenceWarning, SolveResult
from lcodec_ext.curvature.solvers.system import System, norms

#: Of a method; the last axis of every tensor goes over columns, the first one is y, for A y = r.
State = tuple[Tensor, ...]
#: From x and its residual r to a state.
Start = Callable[[Tensor, Tensor], State]
#: To the next state, its residuals' norms by the recurrence, and which columns can go no further.
Step = Callable[[State], tuple[State, Tensor, Tensor]]

_RESTARTS = 3


def iterate(
    method: str,
    system: System,
    start: Start,
    step: Step,
    rtol: float,
    max_iterations: int,
    progress: bool,
) -> SolveResult:
    """Run a method, and again from where it ends as long as that halves the true residual."""
    rtol = check_real(rtol, "rtol", 0.0)
    max_iterations = check_integer(max_iterations, "max_iterations", 1)
    if system.zero:
        return system.result(method)
    x, r = torch.zeros_like(system.b), system.b
    residual = torch.zeros_like(system.size).masked_fill(system.size > 0, math.inf)
    used = torch.zeros_like(residual, dtype=torch.int64)
    todo = residual.nonzero()[:, 0]
    with progress_bar(progress, total=max_iterations, desc=method, unit="iteration") as bar:
        for _ in range(1 + _RESTARTS):
            goals = rtol * system.size[todo], max_iterations - used[todo]
            y, count = _in_lockstep(start, step, x[:, todo], r[:, todo], *goals, bar)
            new = x[:, todo] + y
            left = system.b[:, todo] - system.apply(new)
            reached = norms(left) / system.size[todo]
            used[todo] += count
            better = reached < residual[todo]
            halved = 2 * reached < residual[todo]
            kept = todo[better]
            x[:, kept], residual[kept] = new[:, better], reached[better]
            r = r.index_copy(1, kept, left[:, better])
            todo = todo[halved & (reached > rtol) & (used[todo] < max_iterations)]
            if not len(todo):
                break
    if method == "minres":  # which lowers the residual at every step, but for rounding
        x, residual = x.masked_fill(residual > 1, 0), residual.clamp_max(1)
    largest, iterations = residual.max().item(), int(used.max())
    if largest > rtol:
        if used[residual > rtol].max() >= max_iterations:
            why, remedy = f"at max_iterations={max_iterations}", "more iterations or more damping"
        else:
            dtype = str(x.dtype).removeprefix("torch.")
            why = f"after {iterations} iterations, where rounding in {dtype} ends progress"
            remedy = "float64, or " * (dtype != "float64") + "more damping or a larger rtol"
        if largest >= 1:
            remedy += "; x = 0 would do as well, as where a singular matrix has no damping"
        warn(
            f"{system.describe}: {method} ended {why}, with a relative residual of {largest:.3g} "
            f"above rtol={rtol:.3g}. Use {remedy}",
            ConvergenceWarning,
        )
    return system.result(method, x, largest, iterations)


def _in_lockstep(
    start: Start, step: Step, x: Tensor, r: Tensor, target: Tensor, limit: Tensor, bar: Any
) -> tuple[Tensor, Tensor]:
    """Iterate each column until its target or limit: y for A y = r, and iterations."""
    y, state = torch.zeros_like(r), start(x, r)
    count = torch.zeros_like(limit)
    columns = torch.arange(len(limit), device=limit.device)
    while len(columns):
        state, reached, ended = step(state)
        bar.update()
        count[columns] += 1
        going = (reached > target[columns]) & ~ended & (count < limit)[columns]
        if not going.all():
            y[:, columns[~going]] = state[0][:, ~going]
            columns, state = columns[going], tuple(part[..., going] for part in state)
    return y, count
