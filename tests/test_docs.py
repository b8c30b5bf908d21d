"""The README's examples and the docstrings' examples do what they say."""

import contextlib
import doctest
import importlib
import io
import json
import pkgutil
import re
from pathlib import Path

import pytest

import lcodec_ext
from lcodec_ext.cli import _parser

ROOT = Path(__file__).parent.parent
DOCUMENTS = {  # and how many examples each has
    "README.md": 3,
    "docs/curvature.md": 3,
    "docs/dependence.md": 13,
    "docs/evaluation.md": 3,
    "docs/inference.md": 4,
    "docs/models.md": 6,
    "docs/privacy.md": 3,
    "docs/tutorials/engineer.md": 4,
    "docs/tutorials/researcher.md": 3,
    "docs/tutorials/statistician.md": 5,
    "docs/unlearning.md": 7,
}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
EXAMPLES = [
    (name, *example)
    for name, text in TEXTS.items()
    for example in re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(lcodec_ext.__path__, "lcodec_ext.")
    if not name.endswith("._core")
]


@pytest.mark.parametrize(("name", "n_examples"), DOCUMENTS.items())
def test_every_example_shows_its_output(name, n_examples):
    shown = [example for example in EXAMPLES if example[0] == name]
    assert len(shown) == TEXTS[name].count("```python") == n_examples


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}  # a document's examples go on from one to the next
    for document, code, expected in EXAMPLES:
        if document == name:
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(code, name, "exec"), names)
            assert output.getvalue() == expected


def test_the_figures_of_the_readme_are_those_on_record():
    record = json.loads((ROOT / "benchmarks" / "results" / "ordinary.json").read_text())
    found = list(record["summary"].values())
    names = ("requests", "within_factor", "under", "over", "silent")
    total = {name: sum(each[name] for each in found) for name in names}
    fell = sum(each["harmed"]["test"] for each in found)
    worst = -100 * min(each["accuracy_change_worst"] for each in found)
    text = " ".join(TEXTS["README.md"].split())
    assert (total["requests"], len(record["trainings"]), len(found)) == (100, 20, 5)
    assert "Of a hundred deletions from twenty trainings of five networks, " in text
    assert (
        "{within_factor} left the deleted samples a loss within a factor of 2".format(**total)
        in text
    )
    assert "{under} forgot less and {over} more".format(**total) in text
    assert (fell, total["silent"]) == (5, 0)
    assert f"more than half a point in five, by {worst:.1f} points at worst, and each of" in text


def test_the_readme_names_all_commands():
    listed = re.search(r"the command line: (.*) \|", TEXTS["README.md"]).group(1)
    (commands,) = (each for each in _parser()._actions if each.dest == "command")
    assert re.findall(r"`(?:lcodec-ext )?(\w+)`", listed) == list(commands.choices)


def anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("wing", ["dependence", "unlearning", "evaluation", "curvature"])
def test_the_reference_has_every_public_name(wing):
    """All of them on one of the pages: the same object may be offered by two packages."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md")]
    shown = set(re.findall(r"^\.\. auto\w+:: (\w+)$", "\n".join(pages), re.MULTILINE))
    module = lcodec_ext if wing == "dependence" else importlib.import_module(f"lcodec_ext.{wing}")
    assert set(module.__all__) <= shown


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert results.failed == 0


def test_public_functions_have_examples():
    for name in (
        "codec",
        "lcodec",
        "foci",
        "lfoci",
        "nearest_neighbors",
        "dependence_graph",
        "stability",
    ):
        assert ">>>" in getattr(lcodec_ext, name).__doc__, name
