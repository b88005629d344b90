"""Sphinx's configuration; `make docs` builds."""

from importlib.metadata import version as installed_version

project = "fusedrnn"
copyright = "fusedrnn's authors"
version = release = installed_version("fusedrnn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True

html_theme = "furo"
exclude_patterns = ["images"]
