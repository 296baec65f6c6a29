"""Every Python block of README and docs runs, page by page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import warm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    done = warm.run("-W", "ignore", "-c", python_blocks(page), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_table_of_faults_has_every_fault_and_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "fault_tests.md").read_text()
    assert {f"F{number:02d}" for number in range(1, 29)} <= set(re.findall(r"F\d\d", text))
    source, count = "", 0
    for file, test in re.findall(r"`((?:[\w/]+\.py)?)(?:::(\w+))?`", text):
        if file:
            source = (ROOT / "tests" / file).read_text()
        if test:
            count += 1
            assert f"def {test}(" in source, test
    assert count > 20
