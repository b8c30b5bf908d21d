"""What was built and what this machine offers: the answers to "why is it slow here?"."""

from importlib.metadata import version
from typing import TypedDict

try:
    from lcodec_ext import _core
except ImportError as error:
    raise ImportError(
        "lcodec_ext._core, the compiled module, is not beside lcodec_ext/__init__.py. In the root "
        "of the repository Python finds the sources before the installed package: start it in "
        "another folder, or with python -P. If the package is not installed: pip install ."
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

        ``version`` : str
            Version of the package.
        ``compiler`` : str
            C++ compiler and its version, e.g. ``"GNU 12.2.0"``.
        ``build_type`` : str
            CMake's build type, ``"Release"`` unless asked otherwise.
        ``flags`` : str
            Compiler flags that decide about speed and rounding; those of one instruction set and
            the warnings are left out.
        ``sanitizers`` : list of str
            Sanitizers compiled in, e.g. ``["address", "undefined"]``; empty in a normal build.
        ``simd_compiled`` : list of str
            Instruction sets the kernels were compiled for, slowest first. All give the same bits.
        ``simd_supported`` : list of str
            Those of them that this CPU runs. The last one is used unless told otherwise.
        ``hardware_threads`` : int
            Hardware threads of the machine as the C++ library counts them; 0 when it cannot say.
        ``cuda`` : bool
            Whether the CUDA part was compiled; not whether a GPU is there.
        ``cuda_version`` : str or None
            Version of nvcc, e.g. ``"13.0.88"``; None without the CUDA part.
        ``cuda_architectures`` : list of str
            Architectures compiled for in CMake's spelling, e.g. ``"90-real"`` (machine code) or
            ``"90-virtual"`` (PTX, for later GPUs); empty without the CUDA part.

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

    The first call launches a probe kernel on the current device and compares its result, bit by
    bit, with the CPU's; the answer is kept for the life of the process. Where the device has no
    CUDA context yet in this process, that first call creates one (some 100 ms, and memory on the
    device). Importing the package does not.

    Returns
    -------
    bool
        True if the package was built with CUDA, a driver and a device are there and the probe
        kernel gave the right result; False in every other case, never an exception.

    See Also
    --------
    cuda_status : the reason, in words.
    """
    return _core.cuda_probe()[0]


def cuda_status() -> str:
    """Say in one sentence why CUDA is or is not used.

    Runs the same probe, once a process, as :func:`cuda_is_available`.

    Returns
    -------
    str
        For example "CUDA is not used because no NVIDIA driver was found on this machine.", or, on
        a GPU, which device ran the probe kernel and what runs on it in this version.
    """
    return _core.cuda_probe()[1]


def _split(text: str) -> list[str]:
    return text.split(",") if text else []
