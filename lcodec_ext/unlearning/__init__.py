"""Delete training samples from a trained PyTorch model by a Newton step on selected parameters.

`unlearn` perturbs the samples to delete, records the activation of every unit, selects the units
on which the loss depends (`lcodec_ext.lfoci`), and steps their parameters towards the weights
that training without the samples would have given.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.unlearning needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

from lcodec_ext._renamed import renamed_module as _renamed_module
from lcodec_ext._torch.loss import NotFiniteError
from lcodec_ext._torch.tokens import per_token_loss
from lcodec_ext.curvature import ParameterSelection, UnitSelection
from lcodec_ext.curvature.solvers import IndefiniteCurvatureError
from lcodec_ext.unlearning.calibrate import Calibration
from lcodec_ext.unlearning.estimate import Estimate, estimate
from lcodec_ext.unlearning.groups import samples_of
from lcodec_ext.unlearning.influence import Influence, SelfInfluence, influence, self_influence
from lcodec_ext.unlearning.patch import PatchedTensor, WeightPatch
from lcodec_ext.unlearning.privacy import (
    Guarantee,
    PrivacyBudget,
    PrivacyBudgetExceeded,
    add_noise,
    gaussian_delta,
    gaussian_sigma,
    logistic_constants,
    removal_bound,
)
from lcodec_ext.unlearning.privacy.linear import CertifiedLinear, RemovalRecord
from lcodec_ext.unlearning.record import TokenReplacement
from lcodec_ext.unlearning.request import random_samples
from lcodec_ext.unlearning.result import BeforeAfter, UnlearnResult
from lcodec_ext.unlearning.select import NothingSelectedError
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.stream import (
    Ledger,
    LedgerError,
    Unlearner,
    Verification,
    verify_ledger,
)
from lcodec_ext.unlearning.unlearn import unlearn

if TYPE_CHECKING:
    from lcodec_ext.evaluation import (
        BASELINES,
        Baseline,
        Evaluation,
        MethodEvaluation,
        Report,
        evaluate,
        write_report,
    )

__all__ = [
    "BASELINES",
    "Baseline",
    "BeforeAfter",
    "Calibration",
    "CertifiedLinear",
    "Estimate",
    "Evaluation",
    "Guarantee",
    "IndefiniteCurvatureError",
    "Influence",
    "Ledger",
    "LedgerError",
    "MethodEvaluation",
    "NotFiniteError",
    "NothingSelectedError",
    "ParameterSelection",
    "PatchedTensor",
    "PrivacyBudget",
    "PrivacyBudgetExceeded",
    "RemovalRecord",
    "Report",
    "SelfInfluence",
    "Settings",
    "TokenReplacement",
    "TrainingStatistics",
    "UnitSelection",
    "UnlearnResult",
    "Unlearner",
    "Verification",
    "WeightPatch",
    "add_noise",
    "estimate",
    "evaluate",
    "gaussian_delta",
    "gaussian_sigma",
    "influence",
    "logistic_constants",
    "per_token_loss",
    "random_samples",
    "removal_bound",
    "samples_of",
    "self_influence",
    "unlearn",
    "verify_ledger",
    "write_report",
]

_OF_EVALUATION = {
    "BASELINES",
    "Baseline",
    "Evaluation",
    "MethodEvaluation",
    "Report",
    "evaluate",
    "write_report",
}


def __getattr__(name: str) -> Any:
    """What earlier versions had here: names of `lcodec_ext.evaluation`, and modules."""
    if name in _OF_EVALUATION:
        return getattr(importlib.import_module("lcodec_ext.evaluation"), name)
    return _renamed_module("lcodec_ext.unlearning", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
