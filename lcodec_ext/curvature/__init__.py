"""Curvature restricted to a few parameters of a PyTorch model.

`UnitSelection` says which units, `ParameterSelection` which single parameters, and in which order
these are the coordinates of vectors and matrices. The operators multiply and solve with matrices
of second derivatives restricted to them, without forming those of the whole model.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.curvature needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

from types import ModuleType as _ModuleType

from lcodec_ext._renamed import renamed_module as _renamed_module
from lcodec_ext.curvature.kronecker import EKFACOperator, KroneckerFactors
from lcodec_ext.curvature.layers import n_units
from lcodec_ext.curvature.layout import Segment
from lcodec_ext.curvature.operators import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SecantOperator,
)
from lcodec_ext.curvature.parameters import (
    ParameterSelection,
    Selection,
    all_trainable,
    selection_from_dict,
)
from lcodec_ext.curvature.per_sample import SampleGradients, per_sample_gradients
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.curvature.solvers import ConvergenceWarning, IndefiniteCurvatureError, SolveResult

__all__ = [
    "ConvergenceWarning",
    "CurvatureOperator",
    "EKFACOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "IndefiniteCurvatureError",
    "KroneckerFactors",
    "ParameterSelection",
    "SampleGradients",
    "SecantOperator",
    "Segment",
    "Selection",
    "SolveResult",
    "UnitSelection",
    "all_trainable",
    "n_units",
    "per_sample_gradients",
    "selection_from_dict",
]


def __getattr__(name: str) -> _ModuleType:
    """Modules of earlier versions."""
    return _renamed_module("lcodec_ext.curvature", name)
