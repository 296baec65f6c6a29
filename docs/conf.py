"""Sphinx configuration: Markdown pages and notebooks through MyST, the API from docstrings."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "lightning-lora"
html_title = "lightning-lora"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["cards.css"]
html_show_copyright = False
myst_enable_extensions = ["colon_fence"]
# Links to headings of other pages are checked.
myst_heading_anchors = 3
# Outputs are committed; tests/test_notebooks.py runs the cells.
nb_execution_mode = "off"
# Single backticks in docstrings are code.
default_role = "code"
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "groupwise"
SURFACE = (Path(__file__).parents[1] / "tests" / "public_surface.txt").read_text()


def skip_hooks(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what classes override of torch and Lightning: the API is the names of public_surface.txt."""
    member = member.fget if isinstance(member, property) else member
    path = getattr(member, "__qualname__", name)
    return None if "." not in path or f".{path}" in SURFACE else True


def leave_out_rooms(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """The docstring of a room lists its files, for those who change it."""
    if what == "module":
        lines.clear()


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("autodoc-process-docstring", leave_out_rooms)
