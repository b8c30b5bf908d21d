"""What was built and what this machine offers: the answers to "why is it slow here?"."""

from importlib.metadata import version
from typing import TypedDict

try:
    from lcodec_ext import _core
except ImportError as error:
    raise ImportError(
        "lcodec_ext._core, the compiled module, is missing from the folder of lcodec_ext. In the "
        "root of the repository Python finds the sources before the installed package: start it "
        "in another folder, or with python -P. If the package is not installed: pip install ."
    ) from error

__version__ = version("lcodec_ext")

__all__ = ["BuildInfo", "__version__", "build_info", "cuda_is_available", "cuda_status"]


class BuildInfo(TypedDict):
    """The dictionary that :func:`build_info` returns; see there for the keys."""

    version: str
    compiler: str
    build_type: str
    flags: str
    sanitizers: list[str]
    simd_compiled: list[str]
    simd_supported: list[str]
    hardware_threads: int
    cuda: bool
    cuda_version: str | None
    cuda_architectures: list[str]


def build_info() -> BuildInfo:
    """Say how the compiled module was built and what of it this CPU can run.

    It asks nothing of a GPU or its driver: :func:`cuda_status` does.

    Returns
    -------
    dict
        A new dictionary, JSON serialisable, with the keys

        ``version``, ``compiler``, ``build_type`` : str
            For example ``"0.2.0"``, ``"GNU 12.2.0"`` and ``"Release"``.
        ``flags`` : str
            Compiler flags that decide about speed and rounding.
        ``sanitizers`` : list of str
            Sanitizers compiled in; empty in a normal build.
        ``simd_compiled``, ``simd_supported`` : list of str
            Instruction sets that the kernels were compiled for, slowest first, and those of them
            that this CPU runs. The last of these is used. All give the same bits.
        ``hardware_threads`` : int
            Of the machine; 0 if the C++ library cannot tell.
        ``cuda`` : bool
            Whether the CUDA part was compiled, with or without a GPU in this machine.
        ``cuda_version`` : str or None
            Version of nvcc, None without the CUDA part.
        ``cuda_architectures`` : list of str
            For example ``"90-real"`` (machine code) or ``"90-virtual"`` (PTX, for later GPUs).

    Examples
    --------
    >>> import lcodec_ext
    >>> lcodec_ext.build_info()["simd_compiled"][0]
    'baseline'
    """
    raw = _core.build_info()
    return {
        "version": raw["version"],
        "compiler": raw["compiler"],
        "build_type": raw["build_type"],
        "flags": raw["flags"],
        "sanitizers": _split(raw["sanitize"]),
        "simd_compiled": raw["simd_compiled"],
        "simd_supported": raw["simd_supported"],
        "hardware_threads": raw["hardware_threads"],
        "cuda": bool(raw["cuda_version"]),
        "cuda_version": raw["cuda_version"] or None,
        "cuda_architectures": _split(raw["cuda_architectures"]),
    }


def cuda_is_available() -> bool:
    """Say whether a CUDA kernel of this package ran, and ran right, on this machine.

    The first call in a process launches a probe kernel on the current device and compares its
    result, bit by bit, with the CPU's. It creates the device's CUDA context if there is none yet
    (some 100 ms, and memory on the device). Importing the package does not.

    Returns
    -------
    bool
        False wherever something is missing or wrong; never an exception.

    See Also
    --------
    cuda_status : the reason, in words.
    """
    return _core.cuda_probe()[0]


def cuda_status() -> str:
    """Say in one sentence why CUDA is or is not used.

    Runs the probe of :func:`cuda_is_available`.

    Returns
    -------
    str
        For example "CUDA is not used because no NVIDIA driver was found on this machine.", or
        which device ran the probe kernel.
    """
    return _core.cuda_probe()[1]


def _split(text: str) -> list[str]:
    return text.split(",") if text else []
