"""Module names of earlier versions, which still import and unpickle: each is an alias."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "selection": "dependence",
    "neighbors": "dependence",
    "_sklearn": "dependence.sklearn",
    "curvature.units": "curvature",
    "unlearning.activations": "unlearning.record.activations",
    "unlearning.baselines": "evaluation.methods",
    "unlearning.certified": "unlearning.privacy.linear",
    "unlearning.checkpoints": "unlearning.stream.checkpoints",
    "unlearning.evaluation": "evaluation",
    "unlearning.ledger": "unlearning.stream",
    "unlearning.metrics": "evaluation.metrics",
    "unlearning.perturbation": "unlearning.record",
    "unlearning.report": "evaluation.report",
    "unlearning.samples": "unlearning.request",
    "unlearning.selection": "unlearning.select",
    "unlearning.unlearner": "unlearning.stream.unlearner",
    "unlearning.update": "unlearning",
}


class _Alias(Loader):
    def __init__(self, name: str) -> None:
        self._module = importlib.import_module(name)
        self._spec = self._module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the alias's in its place


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != "lcodec_ext" or name not in RENAMED:
            return None
        return ModuleSpec(fullname, _Alias(f"lcodec_ext.{RENAMED[name]}"))


sys.meta_path.append(_Finder())
