"""Objects of the user's own code, by import path, for the command line."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class ImportPathError(ValueError):
    """An import path does not lead to what was asked for, or its code fails."""


def load_object(path: str, option: str) -> Any:
    """Import "package.module:name" or "path/to/file.py:name".

    A module is looked for in the working directory first. The directory of a file joins the
    module search path, as it does for a script.

    Parameters
    ----------
    path : str
    option : str
        Of the command line, for messages.

    Raises
    ------
    ImportPathError
        If the module or name does not exist, or importing it fails.
    """
    place, colon, name = path.rpartition(":")
    if not colon or not place or not name:
        raise ImportPathError(
            f"{option} must be package.module:name or path/to/file.py:name; got {path!r}"
        )
    try:
        is_file = place.endswith(".py") or os.sep in place
        module = _load_file(place, option) if is_file else _load_module(place, option)
    except ImportPathError:
        raise
    except Exception as error:
        raise ImportPathError(f"{option}: importing {place} {_said(error)}") from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            own = [
                key
                for key, item in vars(module).items()
                if getattr(item, "__module__", None) == module.__name__
            ]
            raise ImportPathError(
                f"{option}: {place} has no {name!r}; it defines {', '.join(own) or 'nothing'}"
            )
        value = getattr(value, part)
    return value


def call(path: str, option: str) -> Any:
    """What the callable at an import path returns when it is called without arguments."""
    function = load_object(path, option)
    if not callable(function):
        raise ImportPathError(
            f"{option} must lead to a callable; {path} is of type {type(function).__name__}"
        )
    try:
        return function()
    except Exception as error:
        raise ImportPathError(f"{option}: {path}() {_said(error)}") from error


def _said(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}"


def _load_module(name: str, option: str) -> ModuleType:
    _search_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise  # the module exists; something that it imports does not
        raise ImportPathError(
            f"{option}: no module named {missing!r} in the working directory or installed; a file "
            "is named by its path, ending in .py"
        ) from None


def _load_file(name: str, option: str) -> ModuleType:
    file = Path(name).resolve()
    if not file.is_file():
        raise ImportPathError(f"{option}: {name} does not exist")
    for module in list(sys.modules.values()):  # a file that is named twice is one module
        if getattr(module, "__file__", None) == str(file):
            return module
    key = file.stem if file.stem not in sys.modules else f"_lcodec_ext_{file.stem}"
    spec = importlib.util.spec_from_file_location(key, file)
    if spec is None or spec.loader is None:
        raise ImportPathError(
            f"{option}: {name} is not a Python file; expected a name ending in .py"
        )
    _search_first(file.parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
