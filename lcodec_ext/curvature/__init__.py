"""Curvature restricted to a few units of a PyTorch model.

`UnitSelection` says which units, and in which order their parameters are the coordinates of
vectors and matrices.
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:  # the core package does without it
    raise ImportError(
        "lcodec_ext.curvature needs PyTorch: pip install 'lcodec_ext[torch]'"
    ) from error

from lcodec_ext.curvature.units import Segment, UnitSelection, n_units

__all__ = ["Segment", "UnitSelection", "n_units"]
