"""Which of the executions answers a call: the one place that decides it."""

from typing import Any, Literal

from lcodec_ext._arrays import is_tensor, on_device

Backend = Literal["auto", "cpu", "cuda", "reference"]
BACKENDS = ("auto", "cpu", "cuda", "reference")


def resolve(backend: str, **arrays: Any) -> Literal["cpu", "cuda", "reference"]:
    """The backend to run, from the one that was asked for and where the data lies.

    "auto" follows the data: NumPy arrays and CPU tensors run on the CPU, CUDA tensors on their
    device. Data are never copied between devices unasked, and a backend that was named is never
    replaced.

    Raises
    ------
    ValueError
        For an unknown name, data on a device that the backend does not run on, or on several.
    RuntimeError
        If there are CUDA tensors and the CUDA backend is not there.
    """
    _check_name(backend)
    arrays = {name: array for name, array in arrays.items() if array is not None}
    devices = {name: array.device for name, array in arrays.items() if on_device(array)}
    if backend in ("cpu", "reference") or (backend == "auto" and not devices):
        where = "the CPU and on CUDA devices" if backend == "auto" else "the CPU"
        _refuse_devices(arrays, f"backend={backend!r} computes on {where}")
        return "reference" if backend == "reference" else "cpu"
    for name, array in arrays.items():
        if name in devices:
            continue
        where = f"a tensor on device '{array.device}'" if is_tensor(array) else "not a tensor"
        tensor = name if is_tensor(array) else f"torch.as_tensor({name})"
        if backend == "cuda":
            raise ValueError(
                f"backend='cuda' computes on CUDA tensors, and {name} is {where}: "
                f"pass {tensor}.cuda()"
            )
        other, device = next(iter(devices.items()))
        raise ValueError(
            f"all arguments must be on one device; {other} is on '{device}', {name} is {where}: "
            f"pass {tensor}.to({other}.device)"
        )
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} is on '{device}'" for name, device in devices.items())
        raise ValueError(f"all arguments must be on one device; {given}")
    if devices:
        from lcodec_ext._torch import device as _device

        _device.Device(next(iter(devices.values())))  # says so if it cannot be used
    return "cuda"


def resolve_on_cpu(function: str, backend: str, **arrays: Any) -> Literal["cpu", "reference"]:
    """`resolve` for a function that has no CUDA kernels."""
    _check_name(backend)
    if backend == "cuda":
        raise ValueError(f"{function} computes on the CPU only: backend='cuda' is not there")
    _refuse_devices(arrays, f"{function} computes on the CPU only")
    return "reference" if backend == "reference" else "cpu"


def _check_name(backend: object) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")


def _refuse_devices(arrays: dict[str, Any], reason: str) -> None:
    """Refuse tensors that are not the CPU's, or that tests take for CUDA tensors."""
    for name, array in arrays.items():
        if is_tensor(array) and (array.device.type != "cpu" or on_device(array)):
            raise ValueError(
                f"{name} is a tensor on device '{array.device}', and {reason}; data are not "
                f"copied between devices unasked: pass {name}.cpu()"
            )
