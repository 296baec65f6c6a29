"""Run the notebooks and keep what they print and draw.

    python -m docs.notebooks [NAME ...]

tests/test_notebooks.py runs their cells.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook."""
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


def program(notebook: Path) -> str:
    """The code of a notebook, one cell after the other."""
    return "\n".join("".join(cell["source"]) for cell in cells(notebook))


def run(notebook: Path) -> None:
    """Run every cell in an empty folder, and write the notebook with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    page = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(page, timeout=300, resources={"metadata": {"path": folder}}).execute()
    for cell in page.cells:
        cell.metadata.pop("execution", None)
        # Warnings and logs of libraries name folders of the machine.
        for output in cell.get("outputs", []):
            assert output.output_type != "error", output
        said = [each for each in cell.get("outputs", []) if each.get("name") == "stdout"]
        shown = [each for each in cell.get("outputs", []) if each.output_type != "stream"]
        for each in said[1:]:
            said[0].text += each.text
        if cell.cell_type == "code":
            cell["outputs"] = [*said[:1], *shown]
    nbformat.write(page, notebook)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(each.stem for each in FOLDER.glob("*.ipynb")):
        run(FOLDER / f"{name}.ipynb")
