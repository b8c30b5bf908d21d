"""Curvature restricted to a few units of a PyTorch model.

`UnitSelection` says which units, and in which order their parameters are the coordinates of
vectors and matrices. The operators multiply and solve with matrices of second derivatives
restricted to them, without forming those of the whole model.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.curvature needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

from types import ModuleType as _ModuleType

from lcodec_ext._renamed import renamed_module as _renamed_module
from lcodec_ext.curvature.layers import n_units
from lcodec_ext.curvature.layout import Segment
from lcodec_ext.curvature.operators import (
    CurvatureOperator,
    FisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    SecantOperator,
)
from lcodec_ext.curvature.per_sample import SampleGradients, per_sample_gradients
from lcodec_ext.curvature.selection import UnitSelection
from lcodec_ext.curvature.solvers import ConvergenceWarning, IndefiniteCurvatureError, SolveResult

__all__ = [
    "ConvergenceWarning",
    "CurvatureOperator",
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "IndefiniteCurvatureError",
    "SampleGradients",
    "SecantOperator",
    "Segment",
    "SolveResult",
    "UnitSelection",
    "n_units",
    "per_sample_gradients",
]


def __getattr__(name: str) -> _ModuleType:
    """Modules of earlier versions."""
    return _renamed_module("lcodec_ext.curvature", name)
