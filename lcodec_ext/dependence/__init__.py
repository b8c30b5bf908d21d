"""Conditional dependence: CODEC and L-CODEC, xi, FOCI and L-FOCI, exact on every backend."""

from lcodec_ext.dependence.codec import codec, lcodec
from lcodec_ext.dependence.foci import FociResult, first_step_scores, foci, lfoci
from lcodec_ext.dependence.graph import DependenceGraph, dependence_graph
from lcodec_ext.dependence.neighbors import nearest_neighbors
from lcodec_ext.dependence.noise import NoiseScale, check_noise, with_noise
from lcodec_ext.dependence.significance import CodecTestResult, codec_test
from lcodec_ext.dependence.sources import ColumnBlocks
from lcodec_ext.dependence.stability import StabilityResult, stability
from lcodec_ext.dependence.xi import XiTestResult, xi, xi_test
from lcodec_ext.dependence.xi_matrix import XiMatrix, xi_matrix

__all__ = [
    "CodecTestResult",
    "ColumnBlocks",
    "DependenceGraph",
    "FociResult",
    "NoiseScale",
    "StabilityResult",
    "XiMatrix",
    "XiTestResult",
    "check_noise",
    "codec",
    "codec_test",
    "dependence_graph",
    "first_step_scores",
    "foci",
    "lcodec",
    "lfoci",
    "nearest_neighbors",
    "stability",
    "with_noise",
    "xi",
    "xi_matrix",
    "xi_test",
]
