"""Which backend answers a call: the one place that decides it."""

from typing import Any, Literal

from lcodec_ext._arrays import device_of, is_tensor, kind_of, on_cuda, torch_for
from lcodec_ext._checks import check_choice
from lcodec_ext.dependence.backends.base import Backend, HostBackend
from lcodec_ext.dependence.backends.cpu import CpuBackend
from lcodec_ext.dependence.backends.reference import ReferenceBackend

BackendName = Literal["auto", "cpu", "cuda", "reference"]
BackendLike = BackendName | Backend

#: Backends on NumPy arrays. To add one, name it here and in `BackendName`.
HOST: dict[str, HostBackend] = {"cpu": CpuBackend(), "reference": ReferenceBackend()}
_NAMES = ("auto", *HOST, "cuda")


def resolve(backend: BackendLike, **arrays: Any) -> Backend:
    """The backend to run, from the one that was asked for and where the data lie.

    "auto" follows the data: NumPy arrays and CPU tensors run on the CPU, CUDA tensors, and other
    arrays on a CUDA device, there. Data are never copied between devices unasked, and a backend
    that was named is never replaced. A `Backend` is taken as it is: its arrays have been resolved.

    Raises
    ------
    ValueError
        For an unknown name, data on a device that the backend does not run on, or on several.
    RuntimeError
        If CUDA tensors are given and this build or machine cannot compute on them.
    """
    if isinstance(backend, Backend):
        return backend
    check_choice(backend, "backend", _NAMES)
    if backend != "cuda" and not any(map(device_of, arrays.values())):
        return HOST["cpu" if backend == "auto" else backend]
    given = {name: array for name, array in arrays.items() if array is not None}
    first = next((name for name, array in given.items() if on_cuda(array)), None)
    if backend == "cuda":
        for name, array in given.items():
            if not on_cuda(array):
                raise ValueError(
                    f"backend='cuda' computes on CUDA tensors, and {name} is {_place(array)}: "
                    f"pass {_tensor(name, array)}.cuda()"
                )
    elif backend != "auto" or first is None:
        where = "the CPU and on CUDA devices" if backend == "auto" else "the CPU"
        _refuse_devices(given, f"backend={backend!r} computes on {where}")  # one is on a device
    if first is None:  # all arguments are None, which their own check refuses
        return HOST["cpu"]
    device = device_of(given[first])
    to = f"{first}.device" if is_tensor(given[first]) else repr(device)
    for name, array in given.items():
        if device_of(array) != device:
            raise ValueError(
                f"all arguments must be on one device; {first} is on '{device}', {name} is "
                f"{_place(array)}: pass {_tensor(name, array)}.to({to})"
            )
    torch = torch_for(given[first], first)
    from lcodec_ext._torch.device import Device
    from lcodec_ext.dependence.backends.cuda import CudaBackend  # needs torch

    return CudaBackend(Device(torch.device(str(device))))


def resolve_on_cpu(function: str, backend: BackendLike, **arrays: Any) -> HostBackend:
    """`resolve` for a function that has no CUDA kernels."""
    if isinstance(backend, HostBackend):
        return backend
    name: str = check_choice(backend, "backend", _NAMES)
    if name == "cuda":
        raise ValueError(
            f"{function} computes on the CPU only; got backend='cuda': pass backend='auto'"
        )
    _refuse_devices(arrays, f"{function} computes on the CPU only")
    return HOST["cpu" if name == "auto" else name]


def _refuse_devices(arrays: dict[str, Any], reason: str) -> None:
    for name, array in arrays.items():
        if device_of(array) is not None:
            what, copy = f"a {kind_of(array)}", f"torch.from_dlpack({name}).cpu()"
            if is_tensor(array):
                what, copy = "a tensor", f"{name}.cpu()"
            raise ValueError(
                f"{name} is {what} on device '{device_of(array)}', and {reason}; data are not "
                f"copied between devices unasked: pass {copy}"
            )


def _place(array: Any) -> str:
    if is_tensor(array):
        return f"a tensor on device '{array.device}'"
    return "not a tensor" if device_of(array) is None else f"on '{device_of(array)}'"


def _tensor(name: str, array: Any) -> str:
    if is_tensor(array):
        return name
    return f"torch.{'as_tensor' if device_of(array) is None else 'from_dlpack'}({name})"
