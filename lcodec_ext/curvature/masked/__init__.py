"""A copy of a model that is a function of the parameters of its selected units alone."""

from lcodec_ext.curvature.masked.model import Entries, MaskedModel, Run, graph_nodes
from lcodec_ext.curvature.masked.rows import Added, Rows, is_convolution, is_linear, patches

__all__ = [
    "Added",
    "Entries",
    "MaskedModel",
    "Rows",
    "Run",
    "graph_nodes",
    "is_convolution",
    "is_linear",
    "patches",
]
