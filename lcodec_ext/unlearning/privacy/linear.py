"""Certified removal from linear models (Guo, Goldstein, Hannun & van der Maaten 2020).

`CertifiedLinear` trains with a random linear term in the objective, which hides what a removal by
one Newton step leaves of the removed samples, and refuses a removal that would leave more than it
hides. docs/privacy.md has the derivation.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_integer,
    check_real,
    check_seed,
    counted,
)
from lcodec_ext._files import json_ready
from lcodec_ext.dependence.table import as_features, as_response
from lcodec_ext.unlearning.privacy.bounds import LOGISTIC_THIRD_DERIVATIVE
from lcodec_ext.unlearning.privacy.budget import PrivacyBudgetExceeded
from lcodec_ext.unlearning.privacy.gaussian import check_positive, gaussian_sigma
from lcodec_ext.unlearning.privacy.guarantee import STATEMENTS, Guarantee
from lcodec_ext.unlearning.privacy.noise import standard_normals

_MAX_ITERATIONS = 100
_THIRD_DERIVATIVE = {"logistic": LOGISTIC_THIRD_DERIVATIVE, "squared": 0.0}
_CHUNK = 1 << 22  # numbers of a weighted copy of X
_SEEDED = "b came from a seed, and who has the seed has b"


@dataclass(frozen=True)
class RemovalRecord:
    """What one call of `CertifiedLinear.remove` did.

    Attributes
    ----------
    indices, n_retained : tuple of int, int
        Samples that were removed, and how many are left.
    residual_bound : float
        Bound on the change of the retained objective's gradient by this removal.
    residual, spent : float
        Norm of that gradient afterwards, all removals and training together: measured, and the
        bound on it that is taken from the budget. Only the bound decides on a removal.
    budget : float
        What the random term hides.
    """

    indices: tuple[int, ...]
    residual_bound: float
    residual: float
    spent: float
    budget: float
    n_retained: int

    @property
    def budget_left(self) -> float:
        """What further removals may take."""
        return self.budget - self.spent

    def to_dict(self) -> dict[str, Any]:
        """Give all of it in types that JSON knows."""
        return json_ready({**asdict(self), "budget_left": self.budget_left})


@dataclass(frozen=True)
class LinearObjective:
    """The sum of one output's losses over samples, plus (decay/2) |w|^2.

    x has shape (n, d), target (n,): real numbers, or 0 and 1 for the logistic loss.
    """

    loss: str
    x: Tensor
    target: Tensor
    decay: float

    def value(self, w: Tensor) -> Tensor:
        """Compute the sum, a 0-d tensor."""
        scores = self.x @ w
        if self.loss == "squared":
            losses = (scores - self.target).square() / 2
        else:
            losses = (1 - self.target) * scores - logsigmoid(scores)
        return losses.sum() + self.decay / 2 * w @ w

    def gradient(self, w: Tensor) -> Tensor:
        """Compute the gradient, shape (d,)."""
        scores = self.x @ w
        predicted = scores if self.loss == "squared" else torch.sigmoid(scores)
        return self.x.T @ (predicted - self.target) + self.decay * w

    def hessian(self, w: Tensor) -> Tensor:
        """Compute the Hessian, shape (d, d)."""
        scores = self.x @ w
        if self.loss == "squared":
            curvatures = torch.ones_like(scores)
        else:
            curvatures = torch.sigmoid(scores) * torch.sigmoid(-scores)
        hessian = self.decay * torch.eye(len(w), dtype=w.dtype, device=w.device)
        rows = max(1, _CHUNK // len(w))
        for start in range(0, len(self.x), rows):
            part = self.x[start : start + rows]
            hessian += part.T @ (curvatures[start : start + rows, None] * part)
        return hessian


def minimise(objective: LinearObjective, linear: Tensor, tolerance: float) -> Tensor:
    """Minimise an objective plus ``linear @ w`` by Newton's method with backtracking.

    It ends at a gradient of at most the tolerance, or with a RuntimeError.
    """

    def value(w: Tensor) -> float:
        return float(objective.value(w) + linear @ w)

    w = torch.zeros_like(linear)
    now, previous = value(w), math.inf
    for _ in range(_MAX_ITERATIONS):
        gradient = objective.gradient(w) + linear
        norm = float(gradient.norm())
        if norm <= tolerance:
            return w
        step = -_solve(objective.hessian(w), gradient)
        descent = -float(gradient @ step)
        rounding = 1e-15 * abs(now)
        if descent <= rounding and norm >= previous / 2:
            break
        length = 1.0
        while value(w + length * step) > now - 1e-4 * length * descent + 10 * rounding:
            length /= 2
        w = w + length * step
        now, previous = value(w), norm
    raise RuntimeError(
        f"training reached a gradient norm of {norm:.2g}, above the tolerance of {tolerance:.2g} "
        "for each output; give a larger tolerance, or more noise_std: the tolerance is taken from "
        "its budget"
    )


class CertifiedLinear:
    """A linear model from which samples can be removed with a certificate.

    Training minimises, for n samples of features x_i, in float64 and for each output separately,

        sum_i l(w . x_i, y_i) + (lambda n / 2) |w|^2 + b . w,        b ~ N(0, noise_std^2 I).

    A removal is one Newton step on the objective of the retained samples, with their exact Hessian.

    Parameters
    ----------
    loss : {"logistic", "squared"}
        "logistic": labels 0 ... K-1; one output for K = 2, one output for each class against the
        rest for more. "squared": (w . x - y)^2 / 2 of real y.
    weight_decay : float
        lambda, positive; of the mean loss, as that of `torch.optim.SGD`.
    epsilon, delta : float
        Of the certificate: with or without the removed samples in training, no event's probability
        differs by more than a factor e^epsilon, apart from delta.
    noise_std : float
        Standard deviation of each entry of b. A larger one allows more removals and costs accuracy.
        The sum of n losses outweighs the term b . w as n grows.
    bias : bool
        Append a constant 1 to the features. Its weight is regularised as the others are.
    n_classes : int, optional
        K. By default the largest label plus one. The certificate takes K for public: give it if a
        removed sample may be the only one of its class.
    tolerance : float, optional
        Norm of the gradient at which training ends. By default a thousandth of the budget: twice
        that is counted as spent, once for this training and once for the retraining it is
        compared with.
    seed : int, optional
        Of b, for tests alone: `guarantee` is then heuristic, because whoever knows b sees what it
        hides. By default b comes from the operating system's cryptographic generator.

    Attributes
    ----------
    budget : float
        Largest norm of the residual gradient that b hides: noise_std epsilon / c with
        c = sqrt(2 ln(1.5 / delta)) for epsilon < 1, and noise_std / `gaussian_sigma` (1, epsilon,
        delta) from there on, where the paper's c is not proven.
    spent : float
        Bound on that norm now.
    weights : Tensor, shape (n_features + bias, n_outputs), float64
    retained : Tensor, shape (n_retained,), int64
        Numbers of the samples that are left, ascending.

    Examples
    --------
    >>> X = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    >>> y = (X[:, 0] > 0.1).long()
    >>> model = CertifiedLinear(weight_decay=0.01, epsilon=1, delta=1e-4, noise_std=2, seed=0)
    >>> record = model.fit(X, y).remove([3, 17])
    >>> record.n_retained, record.residual <= record.spent <= record.budget
    (198, True)
    >>> model.to_module()
    Linear(in_features=1, out_features=1, bias=True)
    """

    budget: float
    spent: float
    weights: Tensor
    retained: Tensor

    def __init__(
        self,
        loss: str = "logistic",
        *,
        weight_decay: float,
        epsilon: float,
        delta: float,
        noise_std: float,
        bias: bool = True,
        n_classes: int | None = None,
        tolerance: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.loss: str = check_choice(loss, "loss", tuple(_THIRD_DERIVATIVE))
        self.weight_decay = check_positive(weight_decay, "weight_decay")
        self.noise_std = check_positive(noise_std, "noise_std")
        self.bias = check_bool(bias, "bias")
        if n_classes is not None:
            if loss == "squared":
                raise ValueError("n_classes is for loss='logistic'; loss is 'squared'")
            n_classes = check_integer(n_classes, "n_classes", 2)
        self.n_classes = n_classes
        sigma = gaussian_sigma(1.0, epsilon, delta)  # checks both
        self.epsilon, self.delta = float(epsilon), float(delta)
        if epsilon < 1:
            sigma = math.sqrt(2 * math.log(1.5 / self.delta)) / self.epsilon
        self.budget = self.noise_std / sigma
        if tolerance is None:
            tolerance = self.budget / 1000
        self.tolerance = check_positive(tolerance, "tolerance")
        if 2 * self.tolerance > self.budget:
            raise ValueError(
                f"tolerance must be at most half the budget, {self.budget / 2:.3g}; got "
                f"{self.tolerance!r}"
            )
        self._seed = check_seed(seed)
        # Of a trained model; weights, retained and spent come with it.
        self._data: tuple[Tensor, Tensor] | None = None  # of the retained samples
        self._n: int | None = None  # of fit; unknown in states of earlier versions
        self._noise = torch.empty(0)  # b of each output
        self._seeded = False
        self._spectral_norm = 0.0  # at least that of the retained samples' inputs
        self._left_by_output: list[float] = []  # bounds on what removals left of the gradient

    def __repr__(self) -> str:
        head = f"CertifiedLinear({self.loss!r}, weight_decay={self.weight_decay:g}"
        head += f", epsilon={self.epsilon:g}, delta={self.delta:g}"
        if self._data is None:
            return f"{head}, not trained)"
        rows, outputs = self.weights.shape
        n = len(self.retained)
        removed = "" if self._n is None else f", {self._n - n:,} removed"
        return (
            f"{head}; {counted(rows - self.bias, 'feature')}, {counted(outputs, 'output')}; "
            f"{counted(n, 'sample')}{removed}; {self.spent:.3g} of a budget of "
            f"{self.budget:.3g} spent)"
        )

    def fit(self, X: Any, y: Any) -> "CertifiedLinear":
        """Train, with a fresh b. A sample's number is its row.

        Parameters
        ----------
        X, y : array_like or Tensor, shapes (n, n_features) and (n,)
            y has labels 0 ... K-1, or real numbers for the squared loss; ValueError for others.

        Raises
        ------
        RuntimeError
            If rounding keeps the gradient above the tolerance.
        """
        x, target, n_outputs = self._checked(X, y)
        self._train(x, target, torch.arange(len(x), device=x.device), n_outputs)
        self._n = len(x)
        return self

    def retrain(self, without: Any = ()) -> "CertifiedLinear":
        """Train again with a fresh b, which gives a new budget. Samples keep their numbers.

        Parameters
        ----------
        without : sequence of int, array or Tensor
            Numbers of samples to remove at the same time; by default none.

        Raises
        ------
        ValueError
            For numbers of samples that are not retained, or if no sample would be left.
        """
        x, target = self._fitted()
        _, keep = self._split(without, "without", 0)
        if self._seed is not None:
            self._seed = (self._seed + 1) % 2**64  # not the same b again
        self._train(x[keep], target[keep], self.retained[keep], self.weights.shape[1])
        return self

    def _train(self, x: Tensor, target: Tensor, retained: Tensor, n_outputs: int) -> None:
        like = x.new_empty(x.shape[1], n_outputs)
        noise = self.noise_std * standard_normals(like, self._seed)
        self._seeded = self._seed is not None
        tolerance = self.tolerance / math.sqrt(n_outputs)
        columns = [
            minimise(objective, noise[:, k], tolerance)
            for k, objective in enumerate(self._objectives(x, target, n_outputs))
        ]
        self.weights, self._noise = torch.stack(columns, dim=1), noise
        self._data, self.retained = (x, target), retained
        # An upper bound from here on: taking rows away lowers the norm. The factor is above the
        # rounding errors.
        largest = float(torch.linalg.eigvalsh(x.T @ x)[-1])
        self._spectral_norm = math.sqrt(max(largest, 0.0)) * (1 + 1e-9)
        self._left_by_output = [0.0] * n_outputs
        self.spent = self._spent(self._left_by_output)

    def _objectives(self, x: Tensor, target: Tensor, n_outputs: int) -> Iterator[LinearObjective]:
        """The objective of each output over some samples."""
        for k in range(n_outputs) if n_outputs > 1 else [1]:
            own = target if self.loss == "squared" else (target == k).double()
            yield LinearObjective(self.loss, x, own, self.weight_decay * len(x))

    # -- removal

    def remove(self, indices: Any) -> RemovalRecord:
        """Remove samples by one Newton step, if the budget allows it.

        The rows of the removed samples are no longer held afterwards.

        Parameters
        ----------
        indices : sequence of int, array or Tensor
            Numbers of retained samples. The budget that similar samples cost grows with the square
            of their number in one call; in a call each it grows with their number.

        Raises
        ------
        PrivacyBudgetExceeded
            If b would not hide what the removal leaves. Nothing is changed then; `retrain` removes
            the samples, and gives a new budget.
        ValueError
            For numbers of samples that are not retained, or if no sample would be left.
        """
        x, target = self._fitted()
        numbers, keep = self._split(indices, "indices", 1)
        rest, rest_target = x[keep], target[keep]
        weights, n_outputs = self.weights.clone(), self.weights.shape[1]
        left, bounds = list(self._left_by_output), []
        removed = self._objectives(x[~keep], target[~keep], n_outputs)
        retained = self._objectives(rest, rest_target, n_outputs)
        for k, (gone, stays) in enumerate(zip(removed, retained, strict=True)):
            step, bound = self._step(self.weights[:, k], gone, stays)
            weights[:, k] += step
            left[k] += bound
            bounds.append(bound)
        spent = self._spent(left)
        if not spent <= self.budget:
            raise PrivacyBudgetExceeded(
                f"removing {counted(len(numbers), 'sample')} would bring the bound on the residual "
                f"gradient to {spent:.3g}, and the random term hides {self.budget:.3g}, of which "
                f"{self.spent:.3g} is spent; train again without them"
            )
        self.weights, self._left_by_output, self.spent = weights, left, spent
        self._data, self.retained = (rest, rest_target), self.retained[keep]
        return RemovalRecord(
            indices=tuple(numbers),
            residual_bound=math.hypot(*bounds),
            residual=self._residual(),
            spent=spent,
            budget=self.budget,
            n_retained=len(rest),
        )

    def _step(
        self, w: Tensor, removed: LinearObjective, retained: LinearObjective
    ) -> tuple[Tensor, float]:
        """One output's step, and a bound on what it leaves of the gradient."""
        right, hessian = removed.gradient(w), retained.hessian(w)
        step = _solve(hessian, right)
        change = float((retained.x @ step).square().norm())
        bound = _THIRD_DERIVATIVE[self.loss] / 2 * self._spectral_norm * change
        return step, bound + float((hessian @ step - right).norm())

    def _spent(self, left: list[float]) -> float:
        """Training error counts twice: in this model and in the retrained one."""
        return 2 * self.tolerance + math.hypot(*left)

    def _residual(self) -> float:
        """Norm of the gradient of the retained objective, b included, over all outputs."""
        objectives = self._objectives(*self._fitted(), self.weights.shape[1])
        columns = [each.gradient(self.weights[:, k]) for k, each in enumerate(objectives)]
        return float((torch.stack(columns, dim=1) + self._noise).norm())

    def _split(self, given: Any, name: str, least: int) -> tuple[list[int], Tensor]:
        """The numbers to remove, ascending, and which of the retained samples stay."""
        array = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
        is_integer = array.dtype.kind in "iu" or array.shape == (0,)
        if array.ndim != 1 or len(array) < least or not is_integer:
            expected = "a sequence of at least one integer" if least else "a sequence of integers"
            raise ValueError(
                f"{name} must be {expected}; got shape {array.shape} and dtype {array.dtype}"
            )
        numbers = sorted(array.tolist())
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must not name a sample twice")
        retained = self.retained.cpu().numpy()
        missing = np.setdiff1d(numbers, retained)
        if len(missing):
            raise ValueError(f"{name} has {missing[0]}, which is not among the retained samples")
        keep = np.isin(retained, numbers, invert=True)
        if not keep.any():
            raise ValueError(f"{name} must leave a sample; got all of them")
        return numbers, torch.as_tensor(keep, device=self.retained.device)

    # -- what was passed in

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self._data is None:
            raise RuntimeError("the model is not trained; call fit first")
        return self._data

    def _inputs(self, X: Any) -> Tensor:
        x = torch.as_tensor(as_features(X, "X", allow_1d=False).values).double()
        if not torch.isfinite(x).all():
            raise ValueError("X holds NaN or infinity")
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1) if self.bias else x

    def _checked(self, X: Any, y: Any) -> tuple[Tensor, Tensor, int]:
        x, target = self._inputs(X), torch.as_tensor(as_response(y))
        if len(x) != len(target) or not len(x):
            raise ValueError(
                f"X and y must have as many rows, at least one; got {len(x)} and {len(target)}"
            )
        if x.device != target.device:
            raise ValueError(f"X and y must be on one device; got {x.device} and {target.device}")
        target = target.double()
        if not torch.isfinite(target).all():
            raise ValueError("y holds NaN or infinity")
        if self.loss == "squared":
            return x, target, 1
        lowest, highest = float(target.min()), float(target.max())
        n_classes = self.n_classes or max(int(highest) + 1, 2)
        if (target != target.round()).any() or lowest < 0 or highest >= n_classes:
            raise ValueError(
                f"y must hold labels 0 ... K-1{f' with K={n_classes}' if self.n_classes else ''}; "
                f"got values from {lowest:g} to {highest:g}"
            )
        return x, target, 1 if n_classes == 2 else n_classes

    # -- what comes out

    def predict(self, X: Any) -> Tensor:
        """Predict labels, int64, or real values for the squared loss; X (n, n_features) to (n,)."""
        self._fitted()
        x = self._inputs(X)
        if x.shape[1] != len(self.weights):
            raise ValueError(
                f"X must have {counted(len(self.weights) - self.bias, 'column')}, as in training; "
                f"got {x.shape[1] - self.bias}"
            )
        scores = x @ self.weights
        if self.loss == "squared":
            return scores[:, 0]
        return scores.argmax(dim=1) if scores.shape[1] > 1 else (scores[:, 0] > 0).long()

    def to_module(self) -> nn.Linear:
        """Make a float64 module that gives the scores. This is what may be released.

        The scores are logits, of class 1 where there are two classes.
        """
        self._fitted()
        n_features = len(self.weights) - self.bias
        weights = self.weights.T
        module = nn.Linear(
            n_features,
            len(weights),
            bias=self.bias,
            device=weights.device,
            dtype=weights.dtype,
        )
        with torch.no_grad():
            module.weight.copy_(weights[:, :n_features])
            if self.bias:
                module.bias.copy_(weights[:, n_features])
        return module

    def guarantee(self) -> Guarantee:
        """Say what releasing `to_module` guarantees.

        sigma and sensitivity are those of b and of the gradient that it hides; the weights need no
        further noise. It is certified unless b came from `seed`.
        """
        self._fitted()
        assumptions: dict[str, Any] = {
            "loss": self.loss,
            "weight_decay": self.weight_decay,
            "gradient_bound": self.tolerance,
            **{name: STATEMENTS[name] for name in ("retraining", "preprocessing", "requests")},
            "releases": "one release for each training: two models with the same b tell about it",
            "secrecy": "b, and so the state of this object, stays secret",
        }
        if self.loss == "logistic":
            assumptions["classes"] = "their number is public"
            assumptions["independence"] = (
                "as in the published proof, the residual gradient counts as independent of b"
            )
        reasons = (_SEEDED,) if self._seeded else ()
        return Guarantee(
            "heuristic" if reasons else "certified",
            self.epsilon,
            self.delta,
            self.noise_std,
            self.budget,
            assumptions,
            reasons,
        )

    def to_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give all but the samples: a dict for JSON, and tensors.

        It contains b. Keep it as private as the training data.
        """
        x, target = self._fitted()
        n_outputs = self.weights.shape[1]
        options = ("loss", "weight_decay", "epsilon", "delta", "noise_std", "bias", "tolerance")
        meta = {
            **{name: getattr(self, name) for name in options},
            "n_classes": None if self.loss == "squared" else max(n_outputs, 2),
            "seeded": self._seeded,
            "left_by_output": list(self._left_by_output),
            "spectral_norm": self._spectral_norm,
            "n_samples": self._n,
            "samples_sha256": _sha256(x, target),
        }
        tensors = {"weights": self.weights, "noise": self._noise, "retained": self.retained}
        return meta, {name: tensor.clone() for name, tensor in tensors.items()}

    @classmethod
    def from_state(
        cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor], X: Any, y: Any
    ) -> "CertifiedLinear":
        """Make the model from `to_state` and the samples that it was left with.

        X and y are the retained samples alone, in the order of ``tensors["retained"]``; ValueError
        for others.
        """
        rest = dict(meta)
        left, norm = rest.pop("left_by_output"), rest.pop("spectral_norm")
        digest, n = rest.pop("samples_sha256"), rest.pop("n_samples", None)
        seeded = check_bool(rest.pop("seeded"), "seeded")
        model = cls(**rest)
        x, target, _ = model._checked(X, y)
        if _sha256(x, target) != digest:
            raise ValueError(
                "X and y must be the retained samples, in the order of tensors['retained'], "
                f"{len(tensors['retained'])} of them; the {len(x)} that were given differ"
            )
        model._data, model._seeded, model._n = (x, target), seeded, n
        model.weights, model._noise, model.retained = (
            tensors[name].to(x.device, copy=True) for name in ("weights", "noise", "retained")
        )
        model._left_by_output = [check_real(value, "left_by_output", 0.0) for value in left]
        model._spectral_norm = check_real(norm, "spectral_norm", 0.0)
        model.spent = model._spent(model._left_by_output)
        return model


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
