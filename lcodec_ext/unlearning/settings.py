"""What `unlearn` and `Unlearner` do, as data: presets, and options on top of them."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from lcodec_ext._checks import (
    check_bool,
    check_choice,
    check_integer,
    check_positive,
    check_real,
    check_seed,
)
from lcodec_ext._torch.decay import Decay, check_decay
from lcodec_ext.curvature import ParameterSelection, Selection, UnitSelection, selection_from_dict
from lcodec_ext.unlearning.record import TokenReplacement
from lcodec_ext.unlearning.rules import RULES

CURVATURES = ("gauss_newton", "hessian", "fisher", "secant", "ekfac")
UPDATES = ("newton", "gradient", "certified")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

#: Values of earlier versions: ledgers that name them load and verify, new requests are refused.
WITHDRAWN = {
    "selection": dict.fromkeys(
        ("last", "fisher_ratio", "expected_decrease"), 'selection="gradient"'
    ),
    "update": {"lbfgs": 'update="newton" with steps=..., or lcodec_ext.evaluation.methods.lbfgs'},
}


# Every field has a function check(value, name), which returns the value to be kept. None passes
# where it is the default.


def _integer(default: int | None, least: int) -> Any:
    return field(
        default=default,
        metadata={"check": lambda value, name: check_integer(value, name, least)},
    )


def _real(default: float | None) -> Any:
    return field(
        default=default, metadata={"check": lambda value, name: check_real(value, name, 0)}
    )


def _cost() -> Any:
    return field(default=None, metadata={"check": check_positive})


def _choice(default: str, choices: tuple[str, ...]) -> Any:
    return field(
        default=default, metadata={"check": lambda value, name: _known(value, name, choices)}
    )


def _known(value: Any, name: str, choices: tuple[str, ...]) -> Any:
    if isinstance(value, str) and value in WITHDRAWN.get(name, ()):
        return value
    return check_choice(value, name, choices)


def _check_selection(value: Any, name: str) -> Any:
    given = isinstance(value, UnitSelection | ParameterSelection)
    return value if given else _known(value, name, tuple(RULES))


def _check_candidates(value: Any, name: str) -> Any:
    if not isinstance(value, tuple):
        return check_choice(value, name, ("all", "weights"))
    if not value or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(
            "candidates must be 'all', 'weights' or a tuple of patterns of layer names; got "
            f"{value!r}"
        )
    return value


def _check_finish(value: Any, name: str) -> int | None:
    return None if value is None else check_integer(value, name, 0)


def _check_share(value: Any, name: str) -> int | float:
    if not isinstance(value, float):
        return check_integer(value, name, 1)
    if not 0 < value <= 1:
        raise ValueError(
            f"{name} must be an integer, or a share above 0 and up to 1.0; got {value!r}"
        )
    return float(value)


def _check_perturb(value: Any, name: str) -> Any:
    if not callable(value):
        raise TypeError(f"{name} must be callable; got {type(value).__name__}")
    return value


def _check_radius(value: Any, name: str) -> float:
    return math.inf if value == math.inf else check_real(value, name, 0)


def _check_seed(value: Any, name: str) -> Any:
    return check_seed(value, optional=False)


def _check_autocast(value: Any, name: str) -> Any:
    if value != torch.bfloat16:
        raise ValueError(
            f"{name} must be torch.bfloat16 or None; got {value!r} (gradients in float16 vanish "
            "without a scale, which curvature has none of)"
        )
    return value


def _check_dtype(value: Any, name: str) -> Any:
    if value not in _DTYPES:
        raise ValueError(f"{name} must be torch.float32 or torch.float64; got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Which parameters change.

    Attributes
    ----------
    selection : str, UnitSelection or ParameterSelection
        The units, the single parameters, or the name of a rule that selects them:
        docs/unlearning.md lists the rules.
    candidates : {"all", "weights"} or tuple of str
        Units to select from: all, those of linear layers and convolutions, or layer name patterns.
    n_units : int, optional
        How many units to select; with "cheap", the most that are selected.
    max_parameters : int or float, optional
        Instead: take units while their parameters stay within this number or share; with "step",
        how many single parameters.
    """

    selection: str | Selection = field(default="full", metadata={"check": _check_selection})
    candidates: str | tuple[str, ...] = field(default="all", metadata={"check": _check_candidates})
    n_units: int | None = _integer(None, 1)
    max_parameters: int | float | None = field(default=None, metadata={"check": _check_share})

    def parameters_allowed(self, n_trainable: int) -> float:
        """Most parameters that may be selected; infinite without a limit."""
        if self.max_parameters is None:
            return math.inf
        if isinstance(self.max_parameters, float):
            return self.max_parameters * n_trainable
        return self.max_parameters

    def _check_size(self) -> None:
        sized = self.n_units is not None or self.max_parameters is not None
        if self.n_units is not None and self.max_parameters is not None:
            raise ValueError("n_units and max_parameters cannot both be given; give one of them")
        named = isinstance(self.selection, str)
        name = repr(self.selection) if named else f"a {type(self.selection).__name__}"
        size = _size_of(self.selection) if isinstance(self.selection, str) else "given"
        if self.n_units is not None and size == "share":
            raise ValueError(
                f"selection={name} selects single parameters, not units: give max_parameters in "
                "place of n_units"
            )
        if not sized and size == "share":
            raise ValueError(
                f"selection={name} needs max_parameters, for instance 0.1: how many single "
                "parameters change"
            )
        if sized and size == "given":
            raise ValueError(
                f"selection={name} says how many units there are; n_units and max_parameters "
                "belong to the other selections"
            )
        if not sized and size == "needed":
            raise ValueError(
                f"selection={name} needs n_units or max_parameters: this rule ranks units and does "
                "not stop by itself"
            )


def _size_of(selection: str) -> str:
    return RULES[selection].size if selection in RULES else "optional"


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """How the request is perturbed, for selection="lfoci" and "cheap".

    Attributes
    ----------
    n_perturbations : int
        Perturbations of the request; the paper's 1000.
    noise_std : float
        Standard deviation of the noise on inputs; the paper's 0.1, for inputs of size about 1.
    perturb : callable, optional
        Instead of noise: `TokenReplacement` for text, or ``perturb(inputs, rng)``.
    foci_rows : {"batch", "samples"}
        What a row of FOCI's table is: the mean of a perturbed request, or one perturbed sample.
    """

    n_perturbations: int = _integer(1000, 3)
    noise_std: float = _real(0.1)
    perturb: Callable[..., Any] | None = field(default=None, metadata={"check": _check_perturb})
    foci_rows: Literal["batch", "samples"] = _choice("batch", ("batch", "samples"))


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The step.

    Attributes
    ----------
    update : {"newton", "gradient", "certified"}
        Solve with the curvature; or follow the gradient; or a Newton step with a guarantee.
    curvature : {"gauss_newton", "hessian", "fisher", "secant", "ekfac"}
        The matrix; "secant" compares gradients along the step, or takes pairs of `statistics`;
        "ekfac" is a Gauss-Newton matrix of Kronecker products, solved without iterations.
    gradient : {"removal", "residual"}
        Follow the removed samples' gradient, or that of the retained objective.
    weight_decay : float or dict of str to float
        lambda of the objective that was trained, (lambda / 2) |w|^2 over all trainable parameters;
        or one for each parameter by its name. `unlearn` and `Unlearner` also take the optimizer.
    damping : float
        Added to the diagonal of the curvature.
    output_damping : float
        Added to the diagonal of the loss's second derivative by the outputs (Gauss-Newton only).
    n_curvature : int, optional
        Retained samples that the step reads, drawn at random; None for all.
    n_monitor : int, optional
        How many of these losses and gradient norms are measured on; None for all of them.
    steps : int
        Steps of the update.
    rtol : float, optional
        Relative residual that ends conjugate gradients; 1e-5 in float32, 1e-10 in float64.
    max_iterations : int, optional
        Of conjugate gradients. Stopping early regularises, so it gives no warning where set.
    learning_rate : float
        Of update="gradient".
    order : {"batch", "sequential"}
        Remove the samples of a request at once, or one by one, each with its own selection.
    """

    update: Literal["newton", "gradient", "certified"] = _choice("newton", UPDATES)
    curvature: Literal["gauss_newton", "hessian", "fisher", "secant", "ekfac"] = _choice(
        "gauss_newton", CURVATURES
    )
    gradient: Literal["removal", "residual"] = _choice("removal", ("removal", "residual"))
    weight_decay: Decay = field(default=0.0, metadata={"check": check_decay})
    damping: float = _real(1e-3)
    output_damping: float = _real(0.0)
    n_curvature: int | None = _integer(None, 1)
    n_monitor: int | None = _integer(None, 1)
    steps: int = _integer(1, 1)
    rtol: float | None = _real(None)
    max_iterations: int | None = _integer(None, 1)
    learning_rate: float = _real(0.1)
    order: Literal["batch", "sequential"] = _choice("batch", ("batch", "sequential"))


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """How the strength of the step is found, and what follows it (docs/unlearning.md).

    Attributes
    ----------
    calibrate : bool
        Instead of `damping`, take the one after which control groups of retained samples, deleted
        in the same way, have the mean loss of the validation samples. `max_iterations` are then
        steps of one Krylov space for all, 8 by default.
    control_groups : int
        How many, each as large as the request; at least four.
    max_rise : float
        How far the validation loss may rise, as a share of it. With an `Unlearner`, that of all
        requests together.
    finish : int, optional
        Training on the retained samples, after the step or in its place. None: mini-batches where
        5000 samples or more are retained, else at most 32 iterations of L-BFGS for models of up to
        2 million parameters. 0: none. A number: at most so many iterations of L-BFGS.
    """

    calibrate: bool = field(default=False, metadata={"check": check_bool})
    control_groups: int = _integer(4, 4)
    max_rise: float = _real(0.1)
    finish: int | None = field(default=0, metadata={"check": _check_finish})

    def _check_calibrated(self: Any) -> None:
        """Refuse what has no single strength."""
        if not self.calibrate:
            return
        for name, value in CALIBRATABLE.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"calibrate=True belongs to {name}={value!r}; got {getattr(self, name)!r}"
                )
        if self.curvature == "secant":
            raise ValueError(
                "calibrate=True belongs to curvature='gauss_newton', 'ekfac', 'hessian' or "
                "'fisher'; got 'secant'"
            )


#: What a step must be like to be calibrated: one solve.
CALIBRATABLE: dict[str, Any] = {
    "update": "newton",
    "gradient": "removal",
    "steps": 1,
    "order": "batch",
}


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What is done about a step that does harm, or does too little.

    Attributes
    ----------
    n_guard : int, optional
        Most validation samples that are used, and most retained ones on which harm is looked for.
    max_drop : float, optional
        How far accuracy may fall, or without one the mean loss may rise, as a share of what it
        would rise by if outputs were those of other samples, whatever the unit of the targets;
        beyond it, the step is halved or undone. `repair_drop` counts alike.
    halvings : int
        How often a step beyond max_drop is halved.
    lengthen : float, optional
        Lengthen a step that ended early, until the retained loss has risen by this much per removed
        sample.
    retries : int
        How often a step that is still beyond it is tried again, with ten times the damping.
    """

    n_guard: int | None = _integer(None, 1)
    max_drop: float | None = _real(None)
    halvings: int = _integer(0, 0)
    lengthen: float | None = _real(None)
    retries: int = _integer(0, 0)


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """What follows a step.

    Attributes
    ----------
    n_recalibrate : int, optional
        Retained samples over which the running statistics of batch norms are computed again.
    repair_epochs : int
        Epochs of SGD on the retained samples, on the selected units.
    repair_drop : float, optional
        Repair only if the step made what the guard watches fall by more; None: always.
    repair_learning_rate : float
        Its peak, near that of training, for batches of this size.
    repair_batch_size : int
        Samples in a batch; small ones repair little.
    """

    n_recalibrate: int | None = _integer(None, 1)
    repair_epochs: int = _integer(0, 0)
    repair_drop: float | None = _real(None)
    repair_learning_rate: float = _real(0.2)
    repair_batch_size: int = _integer(128, 1)


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Noise on the result, and what a guarantee assumes (docs/privacy.md).

    Attributes
    ----------
    epsilon, delta : float, optional
        Add noise for (epsilon, delta) to every trainable parameter of the result.
    lipschitz, hessian_lipschitz : float, optional
        Bounds on the gradient of any sample's loss, and on the change of its Hessian.
    radius : float, optional
        Largest norm of weights for which these hold; infinity: for all weights.
    strong_convexity : float, optional
        Of the retained objective; with convex losses it is the weight decay.
    gradient_bound : float, optional
        On the gradient norm that training ends with; the guarantee covers its effect.
    """

    epsilon: float | None = _real(None)
    delta: float | None = _real(None)
    lipschitz: float | None = _real(None)
    hessian_lipschitz: float | None = _real(None)
    radius: float | None = field(default=None, metadata={"check": _check_radius})
    strong_convexity: float | None = _real(None)
    gradient_bound: float | None = _real(None)

    def _check_noise(self) -> None:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta belong together; got only one of them")
        if self.epsilon is not None and self.epsilon <= 0:
            raise ValueError(f"epsilon must be positive; got {self.epsilon!r}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1; got {self.delta!r}")


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """How all of it is computed.

    Attributes
    ----------
    batch_size : int
        Most samples in a forward pass.
    cache_bytes : int
        Of graphs that are kept from one product with the curvature to the next.
    dtype : torch.float32 or torch.float64, optional
        Of all computations; by default float64 for models in float64, else float32.
    autocast : torch.bfloat16, optional
        Of forward passes through which gradients go, as in a training under autocast: faster where
        the machine has it, with gradients off by a few percent (docs/models.md). Losses, sums,
        solves and all that is measured stay in float32.
    seed : int
        Of all draws but the privacy noise, whose seed nobody may know.
    """

    batch_size: int = _integer(256, 1)
    cache_bytes: int = _integer(2**29, 0)
    dtype: torch.dtype | None = field(default=None, metadata={"check": _check_dtype})
    autocast: torch.dtype | None = field(default=None, metadata={"check": _check_autocast})
    seed: int = field(default=0, metadata={"check": _check_seed})

    def _check_cast(self: Any) -> None:
        if self.autocast is None:
            return
        if self.update == "certified":
            raise ValueError(
                "autocast is not possible with update='certified', whose theorem is of exact "
                "gradients"
            )
        if self.dtype == torch.float64:
            raise ValueError("autocast is of models that compute in float32; got dtype=float64")


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """What a deletion may cost; `lcodec_ext.unlearning.estimate` says what it will.

    With any of these, other settings are lowered until the deletion fits (docs/unlearning.md says
    in which order), and no solution with a residual above 1 is taken.

    Attributes
    ----------
    max_seconds : float, optional
        The most seconds that a deletion may take on this machine.
    budget, training_seconds : float, optional
        Instead: a share of what training took, in seconds on this machine.
    max_memory : int, optional
        Bytes that a deletion may take in addition to the given model and data. By default three
        quarters of the memory that is available when it begins, where the system tells: then
        nothing changes for a deletion that takes less, and a warning says what was lowered for
        others. None is lowered with update="certified", or over a group.
    """

    max_seconds: float | None = _cost()
    budget: float | None = _cost()
    training_seconds: float | None = _cost()
    max_memory: int | None = _integer(None, 1)

    @property
    def seconds_allowed(self) -> float:
        """Infinite without a limit."""
        if self.budget is not None and self.training_seconds is not None:
            return self.budget * self.training_seconds
        return math.inf if self.max_seconds is None else self.max_seconds

    @property
    def bounded(self) -> bool:
        """Whether time or memory is limited."""
        return self.seconds_allowed < math.inf or self.max_memory is not None

    def _check_cost(self: Any) -> None:
        if (self.budget is None) != (self.training_seconds is None):
            raise ValueError(
                "budget, a share, and training_seconds, what it is a share of, belong together; "
                f"got budget={self.budget!r} and training_seconds={self.training_seconds!r}"
            )
        if self.budget is not None and self.max_seconds is not None:
            raise ValueError(
                f"max_seconds={self.max_seconds:g} and budget={self.budget:g} both limit the time; "
                "give one of them"
            )
        if self.update == "certified" and self.bounded:
            raise ValueError(
                "update='certified' has a theorem for the whole step and cannot be made cheaper; "
                "leave out max_seconds, budget and max_memory"
            )


@dataclass(frozen=True, kw_only=True)
class Settings(
    CostSettings,
    ComputeSettings,
    PrivacySettings,
    RepairSettings,
    GuardSettings,
    CalibrateSettings,
    StepSettings,
    RecordSettings,
    SelectSettings,
):
    """The options of a deletion, of all its phases.

    ``Settings.preset("recommended", damping=0.1)`` makes one; `unlearn` and `Unlearner` take the
    same names as keywords. Each phase has a class of its own, which describes its options:
    `SelectSettings`, `RecordSettings`, `StepSettings`, `CalibrateSettings`, `GuardSettings`,
    `RepairSettings`, `PrivacySettings`, `ComputeSettings` and `CostSettings`. `to_dict` and
    `from_dict` go through
    JSON, all but a `perturb` that is a function.
    """

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                # NumPy's numbers become Python's, which JSON takes.
                object.__setattr__(self, each.name, each.metadata["check"](value, each.name))
        if self.output_damping and (self.update, self.curvature) != ("newton", "gauss_newton"):
            raise ValueError(
                "output_damping belongs to update='newton' with curvature='gauss_newton'; got "
                f"update={self.update!r} and curvature={self.curvature!r}, which take "
                "output_damping=0"
            )
        if (self.curvature, self.selection) == ("ekfac", "step"):
            raise ValueError(
                "selection='step' takes single parameters, on which curvature='ekfac' has no "
                "Kronecker factors: take selection='step_units', or curvature='gauss_newton'"
            )
        self._check_size()
        self._check_calibrated()
        self._check_noise()
        self._check_cost()
        self._check_cast()
        if self.update == "certified" and self.epsilon is None:
            raise ValueError("update='certified' needs epsilon and delta: noise makes it private")

    @classmethod
    def preset(cls, name: str, **options: Any) -> "Settings":
        """Make the settings of a preset, with some options changed.

        Parameters
        ----------
        name : {"recommended", "paper"}
            "paper": Algorithm 1 of Mehta et al. (CVPR 2022) without the defects of its published
            code. "recommended": what closed most of the gap to retraining in the experiments of
            docs/evaluation.md.
        **options
            Attributes of the class.

        Raises
        ------
        ValueError, TypeError
            For an unknown preset, and options that are unknown or not allowed.
        """
        check_choice(name, "preset", tuple(PRESETS))
        _check_names(options)
        defaults = PRESETS[name]
        made = defaults | options
        if made["update"] == "certified":
            made = defaults | CERTIFIED | options
        elif defaults.get("output_damping") and (made["update"], made["curvature"]) != (
            "newton",
            "gauss_newton",
        ):
            closed = CLOSED_FORM if made["curvature"] == "ekfac" else {}
            made = defaults | PLAIN_DAMPING | closed | options
        settings = cls(**made)
        _check_used(options, settings)
        return settings

    def replace(self, **options: Any) -> "Settings":
        """Make the same settings with some options changed; errors as for `preset`."""
        _check_names(options)
        settings = dataclasses.replace(self, **options)
        _check_used(options, settings)
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON takes them."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        if not isinstance(self.selection, str):
            values["selection"] = self.selection.to_dict()
        if self.dtype is not None:
            values["dtype"] = _DTYPES[self.dtype]
        if self.autocast is not None:
            values["autocast"] = "bfloat16"
        if self.radius == math.inf:
            values["radius"] = "inf"
        if self.perturb is not None:
            to_dict = getattr(self.perturb, "to_dict", None)
            values["perturb"] = to_dict() if to_dict else repr(self.perturb)
        if isinstance(self.candidates, tuple):
            values["candidates"] = list(self.candidates)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Make the settings that `to_dict` wrote.

        Raises
        ------
        ValueError
            For a `perturb` that was a function of the user's: only its name was kept.
        """
        made = dict(values)
        if isinstance(made.get("selection"), Mapping):
            made["selection"] = selection_from_dict(made["selection"])
        if isinstance(made.get("candidates"), list):
            made["candidates"] = tuple(made["candidates"])
        if made.get("radius") == "inf":
            made["radius"] = math.inf
        if made.get("dtype") is not None:
            check_choice(made["dtype"], "dtype", tuple(_DTYPES.values()))
            made["dtype"] = {name: dtype for dtype, name in _DTYPES.items()}[made["dtype"]]
        if made.get("autocast") is not None:
            check_choice(made["autocast"], "autocast", ("bfloat16",))
            made["autocast"] = torch.bfloat16
        if isinstance(made.get("perturb"), Mapping):
            made["perturb"] = TokenReplacement.from_dict(made["perturb"])
        elif made.get("perturb") is not None:
            raise ValueError(
                f"perturb was a function, {made['perturb']}, which settings do not store; pass it "
                "again"
            )
        return cls(**made)

    def __repr__(self) -> str:
        changed = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in dataclasses.fields(self)
            if getattr(self, each.name) != each.default
        ]
        return f"Settings({', '.join(changed)})"


def resolve(
    preset: "str | Settings",
    options: Mapping[str, Any],
    *,
    retained: bool,
    validation: bool,
    statistics: bool = False,
) -> tuple[Settings, str]:
    """The settings that a preset and options make, and what to warn of once all has been checked.

    Without retained samples a preset's repair and recalibration are off, and without validation
    samples either its guard, unless they are asked for. Statistics hold a curvature without
    output_damping. With both kinds of samples "recommended" calibrates its step, unless the
    options say how strong it is or make it a step that cannot be calibrated; what is then neither
    calibrated nor said is a constant, and without validation samples its guard is a strict one.
    Both are warned of, unless calibrate=False is given.
    """
    if isinstance(preset, Settings):
        return preset.replace(**options), ""
    defaults: dict[str, Any] = {}
    if not retained:
        defaults |= {
            "n_recalibrate": None,
            "repair_epochs": 0,
            "repair_drop": None,
            "lengthen": None,
        }
        if not validation:
            defaults |= {"max_drop": None}
    if statistics and PRESETS.get(preset, {}).get("output_damping"):
        defaults |= PLAIN_DAMPING
    strength, doubt = _strength(preset, options, retained and not statistics, validation)
    if strength == UNCALIBRATED and retained and not validation:
        strength = UNCALIBRATED | UNSEEN
    return Settings.preset(preset, **(defaults | strength | dict(options))), doubt


def _strength(
    preset: str, options: Mapping[str, Any], retained: bool, validation: bool
) -> tuple[dict[str, Any], str]:
    """What "recommended" takes for the strength of the step, where the options do not say it.

    And what the user may not know of: that nothing is calibrated.
    """
    if options.get("calibrate"):
        if options.get("damping") is not None:
            raise ValueError(
                "calibrate=True finds the damping by itself; leave damping out, or take "
                "calibrate=False"
            )
        return _calibrated(preset, options), ""
    if preset != "recommended" or options.get("update", "newton") != "newton":
        return {}, ""
    given = [n for n in ("damping", "output_damping", "lengthen") if options.get(n) is not None]
    if given:
        doubt = ""
        if retained and validation and "calibrate" not in options:
            doubt = (
                f"this deletion is not calibrated: {given[0]}={options[given[0]]!r} says how "
                "strong it is, so the guard alone looks at the validation samples, and no finish "
                f"follows. Leave {given[0]} out to have the strength found by control groups, or "
                "pass calibrate=False to hear no more of it"
            )
        return {}, doubt
    if "calibrate" in options:
        return UNCALIBRATED, ""
    made = CALIBRATABLE | dict(options)
    other = [name for name, value in CALIBRATABLE.items() if made[name] != value]
    other += ["curvature"] * (made.get("curvature") == "secant")
    other += ["selection"] * (made.get("selection") == "cheap")
    if retained and validation and not other:
        return _calibrated(preset, options), ""
    advice = "Pass validation, samples that the model was not trained on, or a damping of your own"
    if other:
        advice = f"With {other[0]}={made[other[0]]!r} it cannot be: pass a damping of your own"
    elif not retained:
        advice = (
            "Without retained samples it cannot be: pass a damping of your own, which a calibrated "
            "deletion of as many random samples can find at training time"
        )
    return UNCALIBRATED, (
        "this deletion is not calibrated: its damping is a constant, which forgets too little on "
        f"most networks and too much on some. {advice}, or calibrate=False to hear no more of it"
    )


def _calibrated(preset: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What calibration takes for a preset's means of finding a strength."""
    defaults = PRESETS.get(preset, {})
    made = [options.get(name, defaults.get(name)) for name in ("update", "curvature")]
    if made == ["newton", "gauss_newton"]:
        return CALIBRATED
    closed = CLOSED_FORM if made[1] == "ekfac" else {}
    return CALIBRATED | {"output_damping": 0.0} | closed


def _check_names(options: Mapping[str, Any]) -> None:
    known = [each.name for each in dataclasses.fields(Settings)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"is it {near[0]!r}?" if near else _elsewhere(key, known)
            raise TypeError(f"unknown option {key!r}; {hint}")


def _elsewhere(key: str, known: Sequence[str]) -> str:
    """What to say of a name that is like no option's: where it belongs, or what is nearest."""
    if key == "device":
        return "everything runs where the model is: move the model, as by model.to('cuda')"
    near = ["learning_rate", "repair_learning_rate"] if key == "lr" else []
    near = near or difflib.get_close_matches(key, known, 3, cutoff=0.3)
    nearest = f"the nearest are {', '.join(map(repr, near))}; " * bool(near)
    return f"{nearest}help(lcodec_ext.unlearning.Settings) describes all"


def _check_used(options: Mapping[str, Any], settings: Settings) -> None:
    """Refuse what was withdrawn, and options that would have no effect."""
    for name, instead in WITHDRAWN.items():
        value = getattr(settings, name)
        if isinstance(value, str) and value in instead:
            raise ValueError(
                f"{name}={value!r} was withdrawn: no recorded experiment speaks for it. Use "
                f"{instead[value]}"
            )
    update, guarded = settings.update, settings.max_drop is not None
    for names, used, owner in (
        (("learning_rate",), update == "gradient", f"update='gradient'; update is {update!r}"),
        (("rtol",), update != "gradient", f"update='newton'; update is {update!r}"),
        (
            ("rtol", "max_iterations", "lengthen"),
            settings.curvature != "ekfac",
            "a solve by iterations; curvature='ekfac' has a closed form",
        ),
        (("halvings", "retries"), guarded, "a guard, and max_drop is None"),
        (
            ("finish", "control_groups", "max_rise"),
            settings.calibrate,
            "calibrate=True, the default of 'recommended' with validation samples; this deletion "
            "is not calibrated",
        ),
    ):
        for name in names:
            if not used and name in options and options[name] != getattr(Settings, name):
                raise ValueError(f"{name}={options[name]!r} belongs to {owner}")


PRESETS: dict[str, dict[str, Any]] = {
    "recommended": {
        "selection": "full",
        "update": "newton",
        "curvature": "gauss_newton",
        "gradient": "removal",
        "damping": 1e-5,
        "output_damping": 2e-3,
        "n_curvature": 256,
        "n_monitor": 256,
        "max_iterations": 30,
        "rtol": 0.0,
        "n_recalibrate": 1000,
        "max_drop": 0.1,
        "halvings": 6,
        "lengthen": 8e-6,
        "retries": 2,
        "repair_epochs": 2,
        "repair_drop": 0.005,
    },
    "paper": {
        "selection": "lfoci",
        "candidates": "weights",
        "n_perturbations": 1000,
        "noise_std": 0.1,
        "foci_rows": "batch",
        "update": "newton",
        "curvature": "secant",
        "gradient": "removal",
        "damping": 0.01,
        "n_monitor": 100,
    },
}

#: Of a preset, where there is no output_damping.
PLAIN_DAMPING: dict[str, Any] = {"output_damping": 0.0, "damping": 2e-4}

#: Of a preset, with curvature="ekfac": what iterations take has no meaning, and samples are cheap.
CLOSED_FORM: dict[str, Any] = {
    "max_iterations": None,
    "rtol": None,
    "lengthen": None,
    "n_curvature": 2048,
}

#: Of "recommended", where there are none and no strength is given: weaker than the best strength
#: was on every network trained by AdamW in the experiments that constants were chosen on.
UNCALIBRATED: dict[str, Any] = {"damping": 3e-2, "output_damping": 0.0}

#: With these, where the guard watches retained samples. The network knows most of them by heart: on
#: convolutional networks that lost half a point on them, samples never seen lost no more, and those
#: that lost two points lost two to four. Ten points, as the preset allows, are no guard there.
UNSEEN: dict[str, Any] = {"max_drop": 5e-3}

#: Of "recommended", where there are validation samples to find the strength by.
CALIBRATED: dict[str, Any] = {
    "calibrate": True,
    "max_iterations": 8,
    "output_damping": 2e-3,
    "lengthen": None,
    "n_recalibrate": None,
    "repair_epochs": 0,
    "repair_drop": None,
    "finish": None,
}

#: Defaults of a preset with update="certified": what a guarantee needs.
CERTIFIED: dict[str, Any] = {
    "selection": "full",
    "candidates": "all",
    "curvature": "hessian",
    "damping": 0.0,
    "output_damping": 0.0,
    "n_curvature": None,
    "n_monitor": None,
    "max_iterations": None,
    "rtol": 1e-8,
    "max_drop": None,
    "halvings": 0,
    "lengthen": None,
    "retries": 0,
    "n_recalibrate": None,
    "repair_epochs": 0,
    "repair_drop": None,
    "dtype": torch.float64,
}
