"""The documentation site: `make docs` builds it into build/docs with warnings as errors."""

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
