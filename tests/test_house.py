"""The rules of the house that no linter holds: sizes, and whose private names are whose."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {str(path.relative_to(ROOT)): path for path in (ROOT / "lcodec_ext").rglob("*.py")}
LONGEST_FUNCTION, LONGEST_FILE = 80, 700  # lines of code


def code_lines(source):
    """Numbers of the lines that hold code: no docstrings, comments or blank lines."""
    found = set(range(1, source.count("\n") + 2))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found -= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    return {
        k
        for k in found
        if k <= len(lines) and lines[k - 1].strip() and lines[k - 1].strip()[0] != "#"
    }


@pytest.mark.parametrize("name", FILES)
def test_sizes(name):
    source = FILES[name].read_text(encoding="utf-8")
    code = code_lines(source)
    assert len(code) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert size <= LONGEST_FUNCTION, f"{node.name} has {size} lines of code"


@pytest.mark.parametrize("name", FILES)
def test_private_names_stay_in_their_package(name):
    here = ".".join(Path(name).with_suffix("").parts)
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "lcodec_ext."
        ):
            continue
        package = node.module.rpartition(".")[0]
        for alias in node.names:
            private = alias.name.startswith("_") and not alias.name.startswith("__")
            assert not private or here.startswith(package + "."), f"{node.module}.{alias.name}"
