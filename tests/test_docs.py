"""Every Python block of README and docs runs, page by page, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import rooms
from tests.support import warm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_lora"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Of four learning rates the page chooses these, one for each method: without the others it computes the same.
SHORTER = {"image_classifier.md": ("RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), ", "RATES, SEEDS = (3e-3, 1e-2), ")}


def python_blocks(page: Path) -> str:
    blocks = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    long, short = SHORTER.get(page.name, ("", ""))
    assert long in blocks, f"{page.name} has changed: what is it that takes long now?"
    return blocks.replace(long, short) if long else blocks


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    done = warm.run("-W", "ignore", "-c", python_blocks(page), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    """Every page is listed, and every link to a page or a heading leads there."""
    done = warm.run("-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy", ROOT / "docs", tmp_path / "built")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    for link in links:
        assert (page.parent / link).exists(), link


def test_the_table_of_faults_has_every_fault_and_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "evidence" / "fault_tests.md").read_text()
    assert {f"F{number:02d}" for number in range(1, 29)} <= set(re.findall(r"F\d\d", text))
    source, count = "", 0
    for file, test in re.findall(r"`((?:[\w/]+\.py)?)(?:::(\w+))?`", text):
        if file:
            source = (ROOT / file).read_text()
        if test:
            count += 1
            assert f"def {test}(" in source, test
    assert count > 20


def test_the_picture_of_the_rooms_shows_the_imports_as_they_are() -> None:
    assert rooms.PICTURE.read_text() == rooms.picture(), "the imports have changed: run python -m docs.rooms"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_page_exist(page: Path) -> None:
    """A name with a folder counts from the repository or the package; one without may be any file's."""
    named = re.findall(r"`([\w/]+\.py)`", page.read_text())
    plain = {
        path.name for folder in ("lightning_lora", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    }
    missing = [
        name for name in named if name not in plain and not (ROOT / name).is_file() and not (PACKAGE / name).is_file()
    ]
    assert not missing
