"""The documentation site: `make docs` builds it into build/docs with warnings as errors."""

import re

import lcodec_ext

project = "lcodec_ext"
author = "the lcodec_ext developers"
release = version = lcodec_ext.__version__
html_title = f"lcodec_ext {version}"

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = False

# Pages are Markdown that reads well without the site, too: headings give anchors as they do there.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # pages of the changelog begin below the first level

# Docstrings: types as they are written in the text, members in the order of the source.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
default_role = "py:obj"
nitpicky = False


# Docstrings are plain text with backticks: |w| is a norm there, and n_features_in_ a name.

_CODE = re.compile(r"(`+[^`]*`+_?)")


def _as_text(line: str) -> str:
    parts = _CODE.split(line)
    parts[::2] = [re.sub(r"(\w)_(?!\w)", r"\1\\_", p.replace("|", r"\|")) for p in parts[::2]]
    return "".join(parts)


def escape(app, what, name, obj, options, lines: list[str]) -> None:
    """Take bars and final underscores for themselves, except in literal blocks and examples."""
    literal: int | None = None  # the indent of what stands above such a block
    for k, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and (not line.strip() or indent > literal):
            continue
        literal = None
        if not line.lstrip().startswith((">>>", "...", "..", ":")):
            lines[k] = _as_text(line)
        if line.rstrip().endswith("::"):
            literal = indent


def setup(app) -> None:
    """Escape after numpydoc has read the sections."""
    app.connect("autodoc-process-docstring", escape, priority=900)
