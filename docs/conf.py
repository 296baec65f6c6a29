"""Sphinx configuration: Markdown pages and notebooks through MyST, the API from docstrings."""

import copy
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

project = "lightning-lora"
html_title = "lightning-lora"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "monokai"
html_show_copyright = False
html_use_index = html_domain_indices = False
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


def stack_tables_of_sentences(app: Sphinx, document: nodes.document) -> None:
    """On a phone a row of sentences is read from top to bottom, each under its heading: see `stacked` in site.css."""
    for table in document.findall(nodes.table):
        heads = [entry.astext() for head in table.findall(nodes.thead) for entry in head.findall(nodes.entry)]
        rows = [
            list(row.findall(nodes.entry)) for body in table.findall(nodes.tbody) for row in body.findall(nodes.row)
        ]
        longest = [max(len(entry.astext()) for entry in column) for column in zip(*rows, strict=True)]
        if len(longest) < 3 or max(longest) < 24 or sum(longest) < 70:
            continue
        table["classes"].append("stacked")
        for row in rows:
            for head, entry in zip(heads, row, strict=True):
                if head and entry is not row[0] and isinstance(cell := next(iter(entry.children), None), nodes.Element):
                    cell.insert(0, nodes.inline("", f"{head}: ", classes=["heading-of-cell"]))


def show_dark_twins(app: Sphinx, document: nodes.document) -> None:
    """Beside a picture NAME.png with a twin NAME_dark.png, the twin, which furo shows on dark pages in its place."""
    folder = Path(app.env.doc2path(app.env.docname)).parent
    for image in list(document.findall(nodes.image)):
        name = Path(image["uri"])
        twin, parent = name.with_stem(f"{name.stem}_dark"), image.parent
        if (folder / twin).is_file() and isinstance(parent, nodes.Element):
            other = copy.copy(image)
            other.attributes = {**image.attributes, "uri": str(twin), "classes": ["only-dark"]}
            image["classes"] = ["only-light"]
            parent.insert(parent.index(image) + 1, other)


def let_keys_scroll(app: Sphinx, page: str, template: str, context: dict[str, Any], document: nodes.document) -> None:
    """What may be wider than the page can be scrolled without a mouse."""
    context["body"] = re.sub(
        r'<(?=pre>|div class="table-wrapper|p><img)(\w+)', r'<\1 tabindex="0"', context.get("body", "")
    )


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("doctree-read", stack_tables_of_sentences)
    # Before Sphinx collects the pictures of a page.
    app.connect("doctree-read", show_dark_twins, priority=100)
    # After furo has wrapped the tables.
    app.connect("html-page-context", let_keys_scroll, priority=900)
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("autodoc-process-docstring", leave_out_rooms)
