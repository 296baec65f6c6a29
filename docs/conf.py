"""Sphinx configuration: Markdown pages through MyST, the API from docstrings."""

project = "lightning-lora"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
# Links to headings of other pages are checked.
myst_heading_anchors = 3
