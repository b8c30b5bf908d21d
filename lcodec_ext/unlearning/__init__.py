"""Delete training samples from a trained PyTorch model by a Newton step on selected units.

`unlearn` perturbs the samples to delete, records the activation of every unit, selects the units
on which the loss depends (`lcodec_ext.lfoci`), and steps their parameters towards the weights
that training without the samples would have given.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.unlearning needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

from lcodec_ext.curvature.solvers import IndefiniteCurvatureError
from lcodec_ext.curvature.units import UnitSelection
from lcodec_ext.unlearning.baselines import Baseline
from lcodec_ext.unlearning.certified import CertifiedLinear, RemovalRecord
from lcodec_ext.unlearning.checkpoints import LedgerError
from lcodec_ext.unlearning.evaluation import BASELINES, Evaluation, MethodEvaluation, evaluate
from lcodec_ext.unlearning.ledger import Ledger, Verification, verify_ledger
from lcodec_ext.unlearning.perturbation import TokenReplacement
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
from lcodec_ext.unlearning.report import Report, write_report
from lcodec_ext.unlearning.samples import random_samples, samples_of
from lcodec_ext.unlearning.settings import Settings
from lcodec_ext.unlearning.statistics import TrainingStatistics
from lcodec_ext.unlearning.unlearner import Unlearner
from lcodec_ext.unlearning.update import BeforeAfter, UnlearnResult, unlearn

__all__ = [
    "BASELINES",
    "Baseline",
    "BeforeAfter",
    "CertifiedLinear",
    "Evaluation",
    "Guarantee",
    "IndefiniteCurvatureError",
    "Ledger",
    "LedgerError",
    "MethodEvaluation",
    "PrivacyBudget",
    "PrivacyBudgetExceeded",
    "RemovalRecord",
    "Report",
    "Settings",
    "TokenReplacement",
    "TrainingStatistics",
    "UnitSelection",
    "UnlearnResult",
    "Unlearner",
    "Verification",
    "add_noise",
    "evaluate",
    "gaussian_delta",
    "gaussian_sigma",
    "logistic_constants",
    "random_samples",
    "removal_bound",
    "samples_of",
    "unlearn",
    "verify_ledger",
    "write_report",
]
