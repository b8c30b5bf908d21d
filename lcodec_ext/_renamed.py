"""Modules of earlier versions: code and pickles that name them find what they held.

Old names are for running code only. Type checkers do not see them: new code imports from the
modules of today.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any

#: For every module that has gone, the modules in which its names are looked up, in this order.
RENAMED: dict[str, tuple[str, ...]] = {
    "selection": ("dependence", "dependence.foci", "dependence.scaling"),
    "neighbors": ("dependence", "dependence.neighbors"),
    "_sklearn": ("dependence.sklearn",),
    "reference": (),
    "reference.columns": ("dependence.backends.reference",),
    "reference.curvature": ("curvature.reference",),
    "reference.engine": ("dependence.backends.reference",),
    "reference.xi": ("dependence.backends.path_sums",),
    "curvature.units": ("curvature", "curvature.layers", "curvature.layout", "curvature.selection"),
    "unlearning.activations": ("unlearning.record.activations",),
    "unlearning.baselines": ("evaluation.methods",),
    "unlearning.certified": ("unlearning.privacy.linear",),
    "unlearning.checkpoints": ("unlearning.stream.checkpoints", "_torch.states", "_files"),
    "unlearning.evaluation": ("evaluation.evaluate", "evaluation.methods", "evaluation.metrics"),
    "unlearning.ledger": (
        "unlearning.stream.ledger",
        "unlearning.stream",
        "unlearning.stream.contents",
        "unlearning.stream.history",
    ),
    "unlearning.metrics": (
        "evaluation.metrics",
        "_torch.predict",
        "_torch.loss",
        "_torch.modes",
    ),
    "unlearning.perturbation": (
        "unlearning.record",
        "unlearning.record.perturb",
        "unlearning.record.recording",
        "unlearning.select",
        "_torch.loss",
    ),
    "unlearning.report": ("evaluation.report",),
    "unlearning.samples": ("unlearning.request", "unlearning.groups", "_torch.samples"),
    "unlearning.selection": ("unlearning.select",),
    "unlearning.unlearner": ("unlearning.stream.unlearner", "unlearning.stream.steps"),
    "unlearning.update": (
        "unlearning",
        "unlearning.release",
        "unlearning.request",
        "_torch.loss",
    ),
}

#: Names that changed with their module.
_NAMES = {
    "unlearning.activations.recording_arithmetic": ("_torch.modes", "hooked_arithmetic"),
    "unlearning.ledger.plain": ("unlearning.stream.ledger", "recordable"),
    "unlearning.ledger.same_data": ("unlearning.stream.contents", "is_data"),
    "unlearning.metrics.Run": ("_torch.predict", "Prediction"),
    "unlearning.metrics.features": ("evaluation.metrics", "features_of"),
    "unlearning.samples.Rows": ("_torch.samples", "Source"),
    "unlearning.samples.as_data": ("_torch.batches", "Batch.data.fget"),
    "unlearning.samples.joined": ("_torch.samples", "Samples.joined"),
}


def renamed_module(package: str, name: str) -> ModuleType:
    """The module `name` that the package held in earlier versions, for its `__getattr__`."""
    module = f"{package}.{name}"
    if module.removeprefix("lcodec_ext.") not in RENAMED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(module)


class _Loader(Loader):
    def __init__(self, old: str) -> None:
        self._old = old

    def exec_module(self, module: ModuleType) -> None:
        old = self._old
        places = [importlib.import_module(f"lcodec_ext.{place}") for place in RENAMED[old]]

        def find(name: str) -> Any:
            if name.startswith("__"):  # the module's own, which it lacks
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            if f"{old}.{name}" in RENAMED:
                return importlib.import_module(f"{module.__name__}.{name}")
            if f"{old}.{name}" in _NAMES:
                now, path = _NAMES[f"{old}.{name}"]
                return attrgetter(path)(importlib.import_module(f"lcodec_ext.{now}"))
            for place in places:
                if hasattr(place, name):
                    return getattr(place, name)
            looked = ", ".join(place.__name__ for place in places)
            raise AttributeError(
                f"{module.__name__} of earlier versions has no {name!r} any more; its names are "
                f"now in {looked}"
            )

        module.__doc__ = f"Names of {module.__name__} of earlier versions, where they are now."
        module.__dict__["__all__"] = [name for place in places for name in _public(place)]
        module.__dict__["__getattr__"] = find


def _public(module: ModuleType) -> list[str]:
    return getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "lcodec_ext" or old not in RENAMED:
            return None
        holds_others = any(other.startswith(f"{old}.") for other in RENAMED)
        return ModuleSpec(fullname, _Loader(old), is_package=holds_others)


sys.meta_path.append(_Finder())
