"""The README's examples and the docstrings' examples do what they say."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import lcodec_ext

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(lcodec_ext.__path__, "lcodec_ext.")
    if not name.endswith("._core")
]


def test_every_readme_example_shows_its_output():
    assert len(EXAMPLES) == README.count("```python") == 3


@pytest.mark.parametrize(("code", "expected"), EXAMPLES)
def test_readme_example(code, expected):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert output.getvalue() == expected


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        if "://" not in link:
            assert (Path(__file__).parent.parent / link).exists(), link


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.failed == 0


def test_public_functions_have_examples():
    for name in ("codec", "lcodec", "foci", "lfoci", "nearest_neighbors", "dependence_graph"):
        assert ">>>" in getattr(lcodec_ext, name).__doc__, name
