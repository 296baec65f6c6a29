"""Every cell of the notebooks runs, and what they print and draw is committed with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import notebooks
from tests.support import warm

NOTEBOOKS = sorted(notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_cells_run(notebook: Path, tmp_path: Path) -> None:
    done = warm.run("-W", "ignore", "-c", notebooks.program(notebook), cwd=tmp_path, MPLBACKEND="agg")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_outputs_are_committed_in_order_and_without_errors(notebook: Path) -> None:
    cells = notebooks.cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run python -m docs.notebooks"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs) or notebook.stem == "small_study"
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert str(Path.home()) not in json.dumps(outputs)


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4
