"""Which of the executions answers a call: the one place that decides it."""

import sys
from typing import Literal

from lcodec_ext._build import cuda_status

Backend = Literal["auto", "cpu", "cuda", "reference"]
BACKENDS = ("auto", "cpu", "cuda", "reference")


def is_tensor(value: object) -> bool:
    """Whether value is a torch tensor, without importing torch to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def resolve(backend: str, **arrays: object) -> Literal["cpu", "reference"]:
    """The backend to run, from the one that was asked for and where the data lies.

    "auto" follows the data: NumPy arrays and CPU tensors run on the CPU. A tensor on another
    device is never copied to the CPU unasked, and a backend that was named is never replaced.

    Raises
    ------
    ValueError
        For an unknown name, or for data on a device that the backend does not run on.
    RuntimeError
        If the CUDA backend is named and is not there.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "cuda":
        raise RuntimeError(
            "backend='cuda' is not there: this version has no CUDA kernels for the dependence "
            f"functions ({cuda_status()}) Use backend='auto' or 'cpu' on CPU data."
        )
    for name, array in arrays.items():
        if is_tensor(array) and array.device.type != "cpu":  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} is a tensor on device '{array.device}', and "  # type: ignore[attr-defined]
                "this version computes on the CPU only; it does not copy data between devices "
                f"unasked: pass {name}.cpu()"
            )
    return "reference" if backend == "reference" else "cpu"
