"""What users of the first version import, and where from: it is still there."""

import importlib
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lcodec_ext._renamed import RENAMED

RECORD = Path(__file__).parent / "data" / "before_redesign" / "public_names.json"
NAMES = json.loads(RECORD.read_text(encoding="utf-8"))

#: Public names of the first version that are gone, and why.
WITHDRAWN = {
    "lcodec_ext.curvature.kernels": {
        "segments_add_": "indexing does it",
        "segments_gather": "indexing does it",
    },
    "lcodec_ext.reference.engine": {
        "chosen_neighbors": "a step inside the reference engine",
        "nearest": "a step inside the reference engine",
        "tied_neighbors": "a step inside the reference engine",
    },
    "lcodec_ext.reference.xi": {
        "ranks": "a step inside the reference sums",
        "path_length": "backends deliver all sums of xi at once: HostBackend.xi_sums",
        "null_variance": "the same, with RankSums.limit_variance",
    },
    "lcodec_ext.unlearning.activations": {"activation_units": "find_calls has what it told"},
    "lcodec_ext.unlearning.selection": {
        "rank_by_score": "a rule ranks its own units",
        "rank_last": 'selection="last" is withdrawn',
        "rank_random": "a rule ranks its own units",
    },
    "lcodec_ext.unlearning.settings": {"SELECTIONS": "it listed options that are withdrawn"},
    "lcodec_ext.unlearning.unlearner": {"versions": "entries of a ledger hold them"},
}


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_imports_from_its_old_place(module):
    found = importlib.import_module(module)
    missing = {name for name in NAMES[module] if not hasattr(found, name)}
    assert missing == set(WITHDRAWN.get(module, {}))


@pytest.mark.parametrize(
    "package",
    ["lcodec_ext", "lcodec_ext.curvature", "lcodec_ext.reference", "lcodec_ext.unlearning"],
)
def test_old_modules_are_attributes_of_their_packages(package):
    """In a process that imports only the package, as `import lcodec_ext.unlearning as u` does."""
    old = [f"lcodec_ext.{name}".rpartition(".") for name in RENAMED]
    names = [name for parent, _, name in old if parent == package and name[0] != "_"]
    assert names
    code = f"import {package} as p\nfor name in {names}: assert getattr(p, name).__all__"
    if package == "lcodec_ext":
        code = code.replace("__all__", "__name__")  # one is a package that holds nothing
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_pickles_of_old_classes_load():
    from lcodec_ext.curvature import UnitSelection

    old = pickle.dumps(UnitSelection, protocol=0).replace(
        UnitSelection.__module__.encode(), b"lcodec_ext.curvature.units"
    )
    assert b"curvature.units" in old
    assert pickle.loads(old) is UnitSelection


def test_finding_a_module_does_not_import_it():
    code = (
        "import sys, importlib.util, lcodec_ext\n"
        "assert importlib.util.find_spec('lcodec_ext._sklearn')\n"
        "assert not {'sklearn', 'lcodec_ext._sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_unknown_names_are_refused():
    import lcodec_ext.unlearning.metrics as metrics

    with pytest.raises(AttributeError, match="'nothing'.*evaluation.metrics"):
        _ = metrics.nothing
    for package in ("lcodec_ext", "lcodec_ext.curvature", "lcodec_ext.unlearning"):
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
            _ = importlib.import_module(package).nothing
    assert importlib.util.find_spec("lcodec_ext.nothing") is None
