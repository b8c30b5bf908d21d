"""Copies of models that compute with parameters of their own."""

import contextlib
import copy
import copyreg
import io
import os
import threading
import types
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lcodec_ext._torch.batches import tensors_of
from lcodec_ext._torch.names import inside

#: What a copy must not compute with: of each tensor, by id, itself and what it is.
Watched = dict[int, tuple[weakref.ref[Tensor], str]]
#: What computes with something, for `check_followed`.
THE_LOSS = "the loss (weight_decay is an argument of its own)"


def copy_of(
    model: nn.Module,
    watched: Watched | None = None,
    of: Container[int] | None = None,
    *,
    sharing: bool = False,
) -> nn.Module:
    """A deep copy of a model, also of one that holds what deepcopy refuses.

    What torch.compile or DistributedDataParallel has wrapped is copied without the wrapper. Locks
    are new ones, open files and Python's modules are shared, and tensors that were computed from
    parameters (stored features, the weight of an old weight_norm) become constants, until a forward
    pass computes them again.

    Parameters
    ----------
    model : Module
        It is left as it was.
    watched : dict, optional
        Is filled with what the copy must not compute with: `check_followed` then tells whether it
        does. These are the parameters of the model, and the constants named above.
    of : container of int, optional
        Constants are watched if they were computed from parameters with these ids; by default from
        any.
    sharing : bool, default False
        Whether the copy has the tensors of the model itself.
    """
    memo: dict[int, Any] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, io.IOBase):  # of any class
                memo[id(value)] = value
            for tensor in tensors_of(value):
                if sharing:
                    memo[id(tensor)] = tensor
                if tensor.grad_fn is None or id(tensor) in memo:
                    continue
                constant = tensor.detach().clone()
                memo[id(tensor)] = constant
                leaves = leaves_of([tensor])
                known = names if of is None else of
                own = [repr(names[leaf]) for leaf in leaves if leaf in known and leaf in names]
                if watched is not None and own:
                    constant.requires_grad_()
                    what = (
                        f"attribute {_name_in(key, value, tensor)!r} of a {type(module).__name__}, "
                        f"which was computed from parameter {own[0]}"
                    )
                    watched[id(constant)] = (weakref.ref(constant), what)
    try:
        with _copyable():
            for module in reversed(list(model.modules())):  # wrappers within others first
                if (held := inside(module)) is not None:
                    memo[id(module)] = copy.deepcopy(held, memo)
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"model cannot be copied by copy.deepcopy: {error}. Remove the attribute that holds "
            "this, or give its class a __deepcopy__"
        ) from error
    _run_as_written(copied)
    if watched is not None:
        for name, p in model.named_parameters():
            watched[id(p)] = (weakref.ref(p), name)
    return copied


def _run_as_written(copied: nn.Module) -> None:
    """Give the modules of a copy their forward passes in place of what torch.compile made of them.

    ``model.forward = torch.compile(model.forward)`` goes on with the model that it was made for.
    """
    for module in copied.modules():
        own = vars(module).get("forward")
        given: Any = getattr(own, "_torchdynamo_orig_callable", None)
        while not hasattr(given, "__self__") and hasattr(given, "__wrapped__"):
            given = given.__wrapped__  # of layers of torch, a function that calls it
        if isinstance(getattr(given, "__self__", None), type(module)):
            del module.forward
            if given.__func__ is not type(module).forward:
                module.forward = types.MethodType(given.__func__, module)


def quantised(model: nn.Module) -> str:
    """What to do with a model that has quantised layers, for messages; empty for others."""
    kinds = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
    found = [name for name, m in model.named_modules() if type(m).__module__.startswith(kinds)]
    if not found:
        return ""
    return (
        f". Layer {found[0]!r} is quantised, and has no weights that could be changed: delete from "
        "the model as it was trained, and quantise the result"
    )


def _check_not_scripted(model: nn.Module) -> None:
    """Refuse TorchScript that is trained: its copies compute with the original's parameters."""
    for name, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        if scripted and any(p.requires_grad for p in module.parameters()):
            where = f"model.{name}" if name else "model"
            raise ValueError(
                f"{where} is a TorchScript module (of torch.jit.script or trace), whose copies "
                "compute with its own parameters: pass the module that it was made from, with the "
                "same weights (load_state_dict), and script the result"
            )


def work_copy(
    model: nn.Module,
    dtype: torch.dtype,
    watched: Watched | None = None,
    of: Container[int] | None = None,
) -> nn.Module:
    """A copy in evaluation mode to compute with, its real tensors in a dtype.

    Tensors that are wider than dtype stay, where no trainable parameter is: a model that computes
    in float32 may hold constants in float64. Gradients of embeddings are dense, and observers of a
    quantisation are at rest.
    """
    _check_not_scripted(model)
    work = copy_of(model, watched, of)
    convert(work, dtype)
    for module in work.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False
        if callable(disable := getattr(module, "disable_observer", None)):
            disable()
    work.eval()
    return work


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters and buffers of a model; complex ones stay complex."""
    trainable = {p.dtype for p in model.parameters() if p.requires_grad}

    def converted(tensor: Tensor) -> Tensor:
        wanted = dtype
        if tensor.is_complex():
            wanted = {torch.float32: torch.complex64, torch.float64: torch.complex128}[dtype]
        elif not tensor.is_floating_point() or tensor.dtype.itemsize == 1:  # float8 has no sums
            return tensor
        wider = torch.promote_types(tensor.dtype, wanted) != wanted
        return tensor if wider and tensor.dtype not in trainable else tensor.to(wanted)

    model._apply(converted)  # type: ignore[no-untyped-call]


def check_followed(
    values: Sequence[Tensor], watched: Watched, what: str, own: Container[int] | None = None
) -> None:
    """Refuse values that were computed with what their copy must not compute with.

    With the ids of its own parameters, also with parameters of any other model.
    """
    for key, leaf in leaves_of(values).items():
        reference, name = watched.get(key, (None, ""))
        if reference is None or reference() is not leaf:
            if own is None or key in own or not isinstance(leaf, nn.Parameter):
                continue
            raise ValueError(
                f"{what} computes with a parameter of shape {tuple(leaf.shape)} that is none of "
                "its own: a forward pass that was replaced by a function, or a function that the "
                "model holds, still has the model that this one was copied from"
            )
        if name.startswith("attribute "):
            raise ValueError(
                f"{what} computes with {name} beforehand; compute it in the forward pass"
            )
        raise ValueError(
            f"{what} computes with parameter {name!r} in a way that a copy of the model "
            "does not follow: through a lambda, a closure, a bound method or a list that "
            "holds it, or as the parameter itself"
        )


def graph_nodes(values: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph of some values, each once."""
    return _reached([value.grad_fn for value in values])


def _reached(nodes: Sequence[Any]) -> Iterator[Any]:
    seen = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(parent for parent, _ in node.next_functions)


def leaves_of(values: Sequence[Tensor]) -> dict[int, Tensor]:
    """The tensors, by id, at which the graph of some values ends."""
    ends = [v for v in values if v.requires_grad and v.grad_fn is None]
    nodes = (getattr(node, "variable", None) for node in graph_nodes(values))
    return {id(leaf): leaf for leaf in (*ends, *nodes) if leaf is not None}


def writable(model: nn.Module) -> None:
    """Give buffers that are expanded memory of their own, so that they can be written to."""
    for buffer in model.buffers():
        if buffer.numel() > 1 and 0 in buffer.stride():
            buffer.data = buffer.detach().clone()


def leaves_of_nodes(nodes: Sequence[Any]) -> list[Tensor]:
    """The tensors at which the graph of some nodes ends."""
    found = (getattr(node, "variable", None) for node in _reached(nodes))
    return [leaf for leaf in found if leaf is not None]


def check_has_values(model: nn.Module) -> None:
    """Refuse parameters and buffers that are not initialised, or without values."""
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
                raise ValueError(f"{kind} {name!r} is not initialised; run the model once")
            if tensor.is_meta and any("_hf_hook" in vars(m) for m in model.modules()):
                raise ValueError(
                    f"{kind} {name!r} is offloaded by accelerate (device_map, cpu_offload), and "
                    "comes back for single calls only: load the model without device_map, or "
                    "bring all of it back with accelerate.hooks.remove_hook_from_module(model, "
                    "recurse=True)"
                )
            if tensor.is_meta:
                raise ValueError(
                    f"{kind} {name!r} is on the meta device, which holds no values: load the "
                    "weights first, with load_state_dict(..., assign=True) for instance"
                )


def _name_in(key: str, value: Any, tensor: Tensor) -> str:
    if isinstance(value, Mapping):
        return next((str(k) for k, part in value.items() if part is tensor), key)
    return key


def _lock() -> Any:
    return threading.Lock()


def _rlock() -> Any:
    return threading.RLock()


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _reduced_generator(generator: torch.Generator) -> Any:
    state = generator.get_state().numpy().tobytes()
    return _generator, (str(generator.device), state)


def _shared(value: Any) -> str:
    return ""  # for copy.deepcopy: the object itself


_REDUCERS: dict[type, Callable[[Any], Any]] = {
    type(threading.Lock()): lambda lock: (_lock, ()),
    type(threading.RLock()): lambda lock: (_rlock, ()),
    torch.Generator: _reduced_generator,
    **dict.fromkeys(
        (
            types.ModuleType,
            types.GeneratorType,
            io.TextIOWrapper,
            io.BufferedReader,
            io.BufferedWriter,
            io.FileIO,
        ),
        _shared,
    ),
}


# One copy at a time: the table below is everybody's.
_turn = threading.RLock()


def _in_child() -> None:
    """A thread that the parent left behind does not hold the lock of a forked process."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextlib.contextmanager
def _copyable() -> Iterator[None]:
    """Ways to copy what deepcopy refuses, for as long as this is entered."""
    with _turn:
        known = copyreg.dispatch_table
        added = {kind: each for kind, each in _REDUCERS.items() if kind not in known}
        known.update(added)
        try:
            yield
        finally:
            for kind in added:
                known.pop(kind, None)
