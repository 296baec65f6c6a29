"""Sphinx configuration: Markdown pages and notebooks through MyST, the API from docstrings."""

project = "lightning-lora"
html_title = "lightning-lora"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["cards.css"]
myst_enable_extensions = ["colon_fence"]
# Links to headings of other pages are checked.
myst_heading_anchors = 3
# Outputs are committed; tests/test_notebooks.py runs the cells.
nb_execution_mode = "off"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
