"""Puts the published module names into ``sys.modules``, so that unmodified scripts import them."""

import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NoReturn, Self

from lcodec_ext._checks import check_bool, check_choice
from lcodec_ext.compat.switch import SWITCH, Switch

#: What each published module has: its name here, or "name there=name here". Functions for tensors
#: have the names that they have in ``codec``, too.
_CODEC = {
    "codec": "chattCorr codec2 codec3 foci cheap_foci createFOCIGraph OneNN_Scikit torch_codec2 "
    "torch_codec3 torch_foci cheap_torch_foci OneNN_Torch",
    "codec.codec": "chattCorr codec2 codec3 OneNN_Scikit",
    "codec.foci": "foci cheap_foci createFOCIGraph codec2 codec3",
    "codec.neighbors": "OneNN_Scikit OneNN_Torch",
    "codec.torch_codec": "codec2=torch_codec2 codec3=torch_codec3 OneNN_Torch torch_codec2 "
    "torch_codec3",
    "codec.torch_foci": "foci=torch_foci cheap_foci=cheap_torch_foci createFOCIGraph "
    "codec2=torch_codec2 codec3=torch_codec3 sci_foci=foci torch_foci cheap_torch_foci",
}
_GRADIENTS = "getGradObjs gradNorm getHessian getOldPandG getVectorizedGrad"
_HOOKS = "ActivationsHook NLP_ActivationsHook HyperC"
_STEPS = (
    "DisableBatchNorm myFOCI reverseLinearIndexingToLayers updateModelParams NewtonScrubStep "
    "CR_NaiveNewton NoisyReturn"
)
_SCRUB = {
    "scrub_tools": f"inp_perturb reid_inp_perturb scrubSample getHyperColumn "
    f"reverseIndexingToLayers {_STEPS} {_GRADIENTS} {_HOOKS}",
    "vgg_scrub_tools": f"vgg_inp_perturb {_STEPS} {_GRADIENTS} {_HOOKS}",
    "nn_utils": "do_epoch retrain_model manual_seed getGradObjs gradNorm",
    "grad_utils": _GRADIENTS,
    "data_utils": "getDatasets LabelSubsetWrapper BinaryDatasetWrapper SubsetDataWrapper",
    "hypercolumn": _HOOKS,
}
#: Names of the modules that can be left out.
MODULES = ("codec", *_SCRUB)


class Installed:
    """What `install` put in place; a context manager that takes it out again at its end.

    Attributes
    ----------
    modules : tuple of str
        Names of the modules, submodules of ``codec`` among them.
    """

    def __init__(self, modules: dict[str, ModuleType], switch: Switch) -> None:
        self.modules = tuple(modules)
        self._own, self._switch = modules, switch
        for name in modules:
            _BEFORE.setdefault(name, sys.modules.get(name))
        sys.modules.update(modules)
        vars(SWITCH).update(vars(switch))
        _STACK.append(self)

    def uninstall(self) -> None:
        """Restore the modules and settings of before; a second call does nothing.

        Where `install` was called several times, those that are left stay in force, in any order.
        """
        if self not in _STACK:
            return
        _STACK.remove(self)
        for name, own in self._own.items():
            if sys.modules.get(name) is not own:
                continue
            below = [each._own[name] for each in _STACK if name in each._own]
            found = below[-1] if below else _BEFORE[name]
            if found is None:
                del sys.modules[name]
            else:
                sys.modules[name] = found
        vars(SWITCH).update(vars(_STACK[-1]._switch if _STACK else Switch()))
        if not _STACK:
            _BEFORE.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"Installed({', '.join(self.modules)})"


_STACK: list[Installed] = []  # in force
_BEFORE: dict[str, ModuleType | None] = {}  # modules of these names before all of them


def install(
    *,
    reference_bugs: bool = False,
    approxType: str | None = None,
    keep: Iterable[str] = (),
    replace: bool = False,
) -> Installed:
    """Let ``import codec``, ``import scrub_tools``, ... find this package.

    Parameters
    ----------
    reference_bugs : bool, default False
        What calls that do not pass it do: the published code with its defects, or what is right.
    approxType : {"FD", "Fisher", "GaussNewton"}, optional
        Instead of that of the scripts' params, which offer no "GaussNewton"; not with
        `reference_bugs`.
    keep : iterable of str
        Modules to leave as they are: ``["data_utils"]`` for a loader of your own.
    replace : bool, default False
        Also where a module of that name is loaded, or a file of that name would be found.

    Returns
    -------
    Installed
        With `modules`, their names, and `uninstall`; also a context manager.

    Raises
    ------
    ImportError
        If another module of one of the names is loaded, or would be found on ``sys.path``, unless
        `replace`. Nothing is installed then.
    ValueError, TypeError
        For options that cannot be used.

    Notes
    -----
    Without PyTorch only ``codec`` is installed. Modules that a script has imported from keep what
    they imported.
    """
    check_bool(reference_bugs, "reference_bugs")
    check_bool(replace, "replace")
    if approxType is not None:
        check_choice(approxType, "approxType", ("FD", "Fisher", "GaussNewton"))
        if reference_bugs:
            raise ValueError("approxType is for the default mode: reference_bugs has the scripts'")
    kept = [keep] if isinstance(keep, str) else list(keep)
    for name in kept:
        check_choice(name, "keep", MODULES)
    modules = {k: m for k, m in _made().items() if k.split(".")[0] not in kept}
    if not replace:
        _refuse_others(name for name in modules if "." not in name)
    return Installed(modules, Switch(reference_bugs, approxType))


def uninstall() -> None:
    """Take out all that `install` put in place; restore the modules and settings of before."""
    while _STACK:
        _STACK[-1].uninstall()


def _made() -> dict[str, ModuleType]:
    from lcodec_ext.compat import codec

    modules = {name: _module(name, names, codec) for name, names in _CODEC.items()}
    modules["codec"].__path__ = []  # a package
    for name in ("codec", "neighbors", "torch_codec"):  # functions have the names of the others
        setattr(modules["codec"], name, modules[f"codec.{name}"])
    if importlib.util.find_spec("torch") is not None:
        from lcodec_ext.compat import scrub

        modules |= {name: _module(name, names, scrub) for name, names in _SCRUB.items()}
    return modules


def _module(name: str, names: str, source: ModuleType) -> ModuleType:
    module: Any = ModuleType(name, f"``{name}`` of the published code, by {source.__name__}.")
    module.__lcodec_ext__ = source.__name__
    module.__getattr__ = functools.partial(_refuse_name, name, names)
    for each in names.split():
        there, _, here = each.partition("=")
        setattr(module, there, getattr(source, here or there))
    return module


def _refuse_name(module: str, names: str, name: str) -> NoReturn:
    there = ", ".join(each.partition("=")[0] for each in names.split())
    raise AttributeError(f"module {module!r} has no {name!r}: the published code's has {there}")


def _refuse_others(names: Iterable[str]) -> None:
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is not None and not hasattr(loaded, "__lcodec_ext__"):
            where = getattr(loaded, "__file__", None) or "built in"
            raise ImportError(
                f"a module {name!r} is loaded already ({where}): install() first, or leave it with "
                f"keep=[{name!r}], or replace it with replace=True",
                name=name,
            )
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is not None and spec.origin is not None:
            raise ImportError(
                f"install() would hide {spec.origin}: leave it with keep=[{name!r}], or hide it "
                "with replace=True, as is meant for the published files",
                name=name,
            )
