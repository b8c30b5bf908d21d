"""What `unlearn` and `Unlearner` do, as data: presets, and options on top of them."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lcodec_ext._checks import check_choice, check_integer, check_real, check_seed
from lcodec_ext.curvature.selection import UnitSelection

SELECTIONS = (
    "full",
    "lfoci",
    "cheap",
    "gradient",
    "fisher_ratio",
    "expected_decrease",
    "last",
    "random",
)
CURVATURES = ("gauss_newton", "hessian", "fisher", "secant")
UPDATES = ("newton", "gradient", "lbfgs", "certified")
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a deletion.

    ``Settings.preset("recommended", damping=0.1)`` makes one; `unlearn` and `Unlearner` take the
    same names as keywords. Every option is a value: `to_dict` and `from_dict` go through JSON
    (but for a `perturb` that is a function).

    **Which units change**

    Attributes
    ----------
    selection : str or UnitSelection
        "full": all units. "lfoci": the paper's, units that are a Markov blanket of the loss when
        the inputs of the removed samples are perturbed. "cheap": the paper's cheap variant, of
        which only the top unit counts, again and again. "gradient": largest removal gradient,
        "fisher_ratio": largest quotient of the removed samples' Fisher diagonal and the retained
        ones', "expected_decrease": largest decrease of the objective that a diagonal model of it
        predicts; "last": from the output backwards; "random". Or the units themselves.
    candidates : {"all", "weights"} or tuple of str
        Units to select from: "all" kinds that `UnitSelection` knows, "weights" those of linear
        and convolution layers and attention projections, as in the paper, or shell patterns of
        layer names.
    n_units : int, optional
        How many units to select; with "cheap", at most, one in each round.
    max_parameters : int or float, optional
        Instead: units are taken while their parameters stay within this number, or within this
        share (a float up to 1) of the trainable ones. With neither, "lfoci" and "cheap" stop by
        their own rule, "last" takes one layer, and the others need one of the two.

    **Perturbation, for "lfoci" and "cheap"**

    n_perturbations : int
        The paper's 1000.
    noise_std : float
        Of the Gaussian noise on inputs; the paper's 0.1, for inputs scaled to about 1.
    perturb : callable, optional
        `TokenReplacement` for text, or ``perturb(inputs, rng)``.
    foci_rows : {"batch", "samples"}
        A row of FOCI's table: a perturbation of the request, activations averaged over it, as in
        the paper; or a perturbation of a single sample.

    **The step**

    update : {"newton", "gradient", "lbfgs", "certified"}
        "newton": solve with the curvature. "gradient": steps of `learning_rate` along the gradient
        (the paper's "BP"). "lbfgs": `max_iterations` of L-BFGS on the retained samples.
        "certified": one Newton step with the exact Hessian and a guarantee, or an error that says
        what it lacks; the options that it needs then are the presets' defaults.
    curvature : {"gauss_newton", "hessian", "fisher", "secant"}
        "secant" compares gradients along the step, or takes the pairs of `statistics`.
    gradient : {"removal", "residual"}
        What the step follows. "removal": the removed samples' gradient, the paper's, which takes
        the training to have converged; further steps are Newton's on the retained objective, less
        the gradient that training had left. "residual": the retained objective's own gradient.
    weight_decay : float
        lambda of the trained objective, (lambda / 2) |w|^2 over all trainable parameters.
    damping : float
        Added to the curvature's diagonal.
    output_damping : float
        Of curvature="gauss_newton": added to the diagonal of the loss's second derivative by the
        outputs of a sample. Where the model is sure, a loss is flat in the outputs, and nothing
        else would hold them in place.
    n_curvature : int, optional
        Retained samples that the step reads, drawn at random; None for all.
    n_monitor : int, optional
        Retained samples on which losses and gradient norms are measured before and after, at most
        those that the step reads; None for all of these.
    steps : int
    rtol : float, optional
        Relative residual at which conjugate gradients end; 1e-5 in float32 and 1e-10 in float64.
    max_iterations : int, optional
        Of conjugate gradients, or of L-BFGS (20 by default). Stopping early is regularisation
        here, not an error: no warning is given where it is set.
    learning_rate : float
        Of update="gradient".
    order : {"batch", "sequential"}
        All samples of the request at once, or one after the other, each with a selection of its
        own.

    **Guard and repair**

    max_drop : float, optional
        Most that accuracy on `validation` (without it, on retained samples that the step has not
        read, if it has not read all) may fall. Where there is no accuracy, most that the mean loss
        may rise. Past it the step is taken back.
    halvings : int
        How often the step is then halved, until it is within that.
    lengthen : float, optional
        A step by conjugate gradients that `max_iterations` ended while the residual was above
        |gradient| falls short, and is lengthened, up to eightfold, until the mean loss of retained
        samples that the step has not read (of others, where it has read all) has risen by this for
        each removed sample. Not where it is repaired.
    retries : int
        How often a step that still is past it is tried again, with ten times the damping. After
        that the model is left as it was and `UnlearnResult.skipped` lists the samples: the
        paper's validation-gap skip.
    n_recalibrate : int, optional
        Retained samples over which the running statistics of batch norms are taken anew after the
        step: they belong to the old weights.
    repair_epochs : int
        Epochs of SGD on the retained samples afterwards, on the selected units, as networks are
        trained: in training mode, with Nesterov momentum 0.9, a learning rate that rises to
        `repair_learning_rate` in the first 30% and falls to 0 in a cosine.
    repair_drop : float, optional
        Repair only where the step, before it was halved, made what the guard watches fall by more
        than this; always, without it. (Where nothing is broken, repair only brings back what was
        forgotten.) A repair that makes it fall, and past `max_drop`, is itself taken back.
    repair_learning_rate : float
        Its peak, near that of training, for batches of this size: small ones repair little.
    repair_batch_size : int

    **Privacy**

    epsilon, delta : float, optional
        Adds noise for (epsilon, delta) to every trainable parameter of the result; what that
        guarantees is in `UnlearnResult.guarantee`.
    lipschitz, hessian_lipschitz : float, optional
        L and M: bounds on the gradient of a sample's loss, and on the change of its Hessian, for
        every sample there could be (`logistic_constants`).
    radius : float, optional
        L and M hold for weights of at most this norm; infinity: for all.
    strong_convexity : float, optional
        Of the retained objective; with convex losses it is the weight decay.
    gradient_bound : float, optional
        On the gradient norm that training ends with; its effect is part of the guarantee.

    **Computation**

    batch_size : int
        Most samples in a forward pass.
    dtype : torch.float32 or torch.float64, optional
        In which all is computed; by default float64 for models in float64, else float32.
    seed : int
        Of all draws but the privacy noise, whose seed nobody may know.
    """

    selection: str | UnitSelection = "full"
    candidates: str | tuple[str, ...] = "all"
    n_units: int | None = None
    max_parameters: int | float | None = None
    n_perturbations: int = 1000
    noise_std: float = 0.1
    perturb: Callable[..., Any] | None = None
    foci_rows: Literal["batch", "samples"] = "batch"
    update: Literal["newton", "gradient", "lbfgs", "certified"] = "newton"
    curvature: Literal["gauss_newton", "hessian", "fisher", "secant"] = "gauss_newton"
    gradient: Literal["removal", "residual"] = "removal"
    weight_decay: float = 0.0
    damping: float = 1e-3
    output_damping: float = 0.0
    n_curvature: int | None = None
    n_monitor: int | None = None
    steps: int = 1
    rtol: float | None = None
    max_iterations: int | None = None
    learning_rate: float = 0.1
    order: Literal["batch", "sequential"] = "batch"
    max_drop: float | None = None
    halvings: int = 0
    lengthen: float | None = None
    retries: int = 0
    n_recalibrate: int | None = None
    repair_epochs: int = 0
    repair_drop: float | None = None
    repair_learning_rate: float = 0.2
    repair_batch_size: int = 128
    epsilon: float | None = None
    delta: float | None = None
    lipschitz: float | None = None
    hessian_lipschitz: float | None = None
    radius: float | None = None
    strong_convexity: float | None = None
    gradient_bound: float | None = None
    batch_size: int = 256
    dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.selection, UnitSelection):
            check_choice(self.selection, "selection", SELECTIONS)
        if not isinstance(self.candidates, tuple):
            check_choice(self.candidates, "candidates", ("all", "weights"))
        elif not self.candidates or not all(isinstance(p, str) for p in self.candidates):
            raise TypeError(
                "candidates must be 'all', 'weights' or a tuple of patterns of layer names; got "
                f"{self.candidates!r}"
            )
        for name, choices in (
            ("foci_rows", ("batch", "samples")),
            ("update", UPDATES),
            ("curvature", CURVATURES),
            ("gradient", ("removal", "residual")),
            ("order", ("batch", "sequential")),
        ):
            check_choice(getattr(self, name), name, choices)
        checked: dict[str, Any] = {}  # NumPy's numbers as Python's, which JSON takes
        for name, least in (
            ("n_perturbations", 3),
            ("steps", 1),
            ("halvings", 0),
            ("retries", 0),
            ("repair_epochs", 0),
            ("repair_batch_size", 1),
            ("batch_size", 1),
        ):
            checked[name] = check_integer(getattr(self, name), name, least)
        for name in ("n_units", "n_curvature", "n_monitor", "n_recalibrate", "max_iterations"):
            if getattr(self, name) is not None:
                checked[name] = check_integer(getattr(self, name), name, 1)
        for name in (
            "noise_std",
            "weight_decay",
            "damping",
            "output_damping",
            "learning_rate",
            "repair_learning_rate",
        ):
            checked[name] = check_real(getattr(self, name), name, 0)
        for name in (
            "rtol",
            "max_drop",
            "lengthen",
            "repair_drop",
            "epsilon",
            "delta",
            "lipschitz",
            "hessian_lipschitz",
            "strong_convexity",
            "gradient_bound",
        ):
            if getattr(self, name) is not None:
                checked[name] = check_real(getattr(self, name), name, 0)
        if self.radius is not None and self.radius != math.inf:
            checked["radius"] = check_real(self.radius, "radius", 0)
        checked["seed"] = check_seed(self.seed, optional=False)
        if self.perturb is not None and not callable(self.perturb):
            raise TypeError(f"perturb must be callable; got {type(self.perturb).__name__}")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.float64; got {self.dtype!r}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.output_damping and (self.update, self.curvature) != ("newton", "gauss_newton"):
            raise ValueError(
                "output_damping belongs to update='newton' with curvature='gauss_newton'; got "
                f"update={self.update!r} and curvature={self.curvature!r}, which take "
                "output_damping=0"
            )
        self._check_size()
        self._check_privacy()

    def _check_size(self) -> None:
        limit = self.max_parameters
        if limit is not None:
            if isinstance(limit, float):
                if not 0 < limit <= 1:
                    raise ValueError(
                        "max_parameters must be an integer, or a share above 0 and up to 1.0; got "
                        f"{limit!r}"
                    )
                limit = float(limit)
            else:
                limit = check_integer(limit, "max_parameters", 1)
            object.__setattr__(self, "max_parameters", limit)
        sized = self.n_units is not None or limit is not None
        if self.n_units is not None and limit is not None:
            raise ValueError("n_units and max_parameters cannot both be given")
        name = "a UnitSelection" if isinstance(self.selection, UnitSelection) else self.selection
        if sized and name in ("full", "a UnitSelection"):
            raise ValueError(
                f"selection={name if name[0] == 'a' else repr(name)} says how many units there "
                "are; n_units and max_parameters belong to the other selections"
            )
        if not sized and name in ("gradient", "fisher_ratio", "expected_decrease", "random"):
            raise ValueError(
                f"selection={name!r} needs n_units or max_parameters: a ranking has no end of "
                "its own"
            )

    def _check_privacy(self) -> None:
        if (self.epsilon is None) != (self.delta is None):
            raise ValueError("epsilon and delta belong together; got only one of them")
        if self.epsilon is not None and self.epsilon <= 0:
            raise ValueError(f"epsilon must be positive; got {self.epsilon!r}")
        if self.update == "certified" and self.epsilon is None:
            raise ValueError("update='certified' needs epsilon and delta: noise makes it private")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1; got {self.delta!r}")

    @classmethod
    def preset(cls, name: str, **options: Any) -> "Settings":
        """Make the settings of a preset, with some options changed.

        Parameters
        ----------
        name : {"recommended", "paper"}
            "paper": Algorithm 1 of Mehta et al. (CVPR 2022) without the defects of its published
            code. "recommended": what closed most of the gap to retraining in the experiments of
            docs/unlearning.md.
        **options
            Attributes of the class.

        Raises
        ------
        ValueError, TypeError
            For an unknown preset, and options that are unknown or cannot be.
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
            made = defaults | PLAIN_DAMPING | options
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
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if isinstance(self.selection, UnitSelection):
            values["selection"] = self.selection.to_dict()
        if self.dtype is not None:
            values["dtype"] = _DTYPES[self.dtype]
        if self.radius == math.inf:
            values["radius"] = "inf"
        if self.perturb is not None:
            to_dict = getattr(self.perturb, "to_dict", None)
            values["perturb"] = to_dict() if to_dict else repr(self.perturb)
        values["candidates"] = (
            list(self.candidates) if isinstance(self.candidates, tuple) else self.candidates
        )
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Make the settings that `to_dict` wrote.

        Raises
        ------
        ValueError
            For a `perturb` that was a function of the user's: only its name was kept.
        """
        from lcodec_ext.unlearning.record.perturbation import TokenReplacement

        made = dict(values)
        if isinstance(made.get("selection"), Mapping):
            made["selection"] = UnitSelection.from_dict(made["selection"])
        if isinstance(made.get("candidates"), list):
            made["candidates"] = tuple(made["candidates"])
        if made.get("radius") == "inf":
            made["radius"] = math.inf
        if made.get("dtype") is not None:
            check_choice(made["dtype"], "dtype", tuple(_DTYPES.values()))
            made["dtype"] = {name: dtype for dtype, name in _DTYPES.items()}[made["dtype"]]
        if isinstance(made.get("perturb"), Mapping):
            made["perturb"] = TokenReplacement.from_dict(made["perturb"])
        elif made.get("perturb") is not None:
            raise ValueError(
                f"perturb was a function, {made['perturb']}, which settings do not store; pass it "
                "again"
            )
        return cls(**made)

    def budget(self, n_trainable: int) -> float:
        """Most parameters that may be selected, infinite where nothing is said."""
        if self.max_parameters is None:
            return math.inf
        if isinstance(self.max_parameters, float):
            return self.max_parameters * n_trainable
        return self.max_parameters


def resolve(
    preset: "str | Settings",
    options: Mapping[str, Any],
    *,
    retained: bool,
    validation: bool,
    statistics: bool = False,
) -> Settings:
    """The settings that a preset and options make, with the data that are there.

    Without retained samples a preset's repair and recalibration are off, and without validation
    samples either its guard, unless they are asked for. Statistics hold a curvature without
    output_damping.
    """
    if isinstance(preset, Settings):
        return preset.replace(**options)
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
    return Settings.preset(preset, **(defaults | dict(options)))


def _check_names(options: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Settings)]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; is it {near[0]!r}?" if near else f"; options are {', '.join(known)}"
            raise TypeError(f"there is no option {key!r}{hint}")


def _check_used(options: Mapping[str, Any], settings: Settings) -> None:
    """Refuse options that were asked for and that the settings leave without effect."""
    update, guarded = settings.update, settings.max_drop is not None
    for names, used, owner in (
        (("learning_rate",), update == "gradient", f"update='gradient'; update is {update!r}"),
        (("rtol",), update in ("newton", "certified"), f"update='newton'; update is {update!r}"),
        (("steps",), update != "lbfgs", "the other updates; of L-BFGS it is max_iterations"),
        (("halvings", "retries"), guarded, "a guard, and max_drop is None"),
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
