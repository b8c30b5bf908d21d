"""CODEC, L-CODEC, xi and FOCI, exact and fast; unlearning for PyTorch models built on them."""

from typing import TYPE_CHECKING, Any

from lcodec_ext._build import __version__ as __version__
from lcodec_ext._build import build_info, cuda_is_available, cuda_status
from lcodec_ext._renamed import renamed_module as _renamed_module
from lcodec_ext._threads import get_num_threads, set_num_threads
from lcodec_ext.dependence import (
    CodecTestResult,
    ColumnBlocks,
    DependenceGraph,
    FociResult,
    StabilityResult,
    XiMatrix,
    XiTestResult,
    codec,
    codec_test,
    dependence_graph,
    foci,
    lcodec,
    lfoci,
    nearest_neighbors,
    stability,
    xi,
    xi_matrix,
    xi_test,
)

if TYPE_CHECKING:
    from lcodec_ext.dependence.sklearn import FOCISelector

__all__ = [
    "CodecTestResult",
    "ColumnBlocks",
    "DependenceGraph",
    "FOCISelector",
    "FociResult",
    "StabilityResult",
    "XiMatrix",
    "XiTestResult",
    "build_info",
    "codec",
    "codec_test",
    "cuda_is_available",
    "cuda_status",
    "dependence_graph",
    "foci",
    "get_num_threads",
    "lcodec",
    "lfoci",
    "nearest_neighbors",
    "set_num_threads",
    "stability",
    "xi",
    "xi_matrix",
    "xi_test",
]


def __getattr__(name: str) -> Any:
    if name == "FOCISelector":  # scikit-learn is needed here and nowhere else
        from lcodec_ext.dependence.sklearn import FOCISelector

        return FOCISelector
    return _renamed_module("lcodec_ext", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
