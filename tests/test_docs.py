"""Every Python block of README and docs runs, page by page, in an empty folder."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import pytest

from docs import blocks, layer_picture, pictures, plan_page, rooms
from docs.blocks import PAGES, ROOT
from tests.support import warm

PACKAGE = ROOT / "lightning_lora"
# Of four learning rates the page chooses these, one for each method: without the others it computes the same.
SHORTER = {"image_classifier.md": ("RATES, SEEDS = (1e-3, 3e-3, 1e-2, 3e-2), ", "RATES, SEEDS = (3e-3, 1e-2), ")}
PLAIN = {path.name for folder in ("lightning_lora", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
"""Names of files."""


_PYTHON = (block for block in blocks.ALL if block.language == "python" and not block.reason)
PROGRAMS = {
    page: "\n".join(block.text for block in of_page) for page, of_page in groupby(_PYTHON, key=lambda block: block.page)
}
"""The Python blocks of each page, one after the other."""


@pytest.mark.slow
@pytest.mark.parametrize("page", list(PROGRAMS))
def test_code_blocks_run(page: str, tmp_path: Path) -> None:
    program = PROGRAMS[page]
    long, short = SHORTER.get(Path(page).name, ("", ""))
    assert long in program, f"{page} has changed: what is it that takes long now?"
    done = warm.run("-W", "ignore", "-c", program.replace(long, short) if long else program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


def test_pictures_are_used_and_below_200_kilobytes() -> None:
    """A twin for dark pages is shown in the place of its picture."""
    text = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs" / "images").iterdir():
        light = picture.with_stem(picture.stem.removesuffix("_dark"))
        assert f"images/{light.name}" in text, picture.name
        assert light.is_file()
        assert picture.stat().st_size < 200_000, picture.name


def test_the_page_of_commands_has_their_options_as_they_are() -> None:
    from docs import commands

    assert commands.tables() in commands.PAGE.read_text(), "options have changed: run python -m docs.commands"


def test_the_picture_of_the_rooms_shows_the_imports_as_they_are() -> None:
    assert rooms.PICTURE.read_text() == rooms.picture(), "the imports have changed: run python -m docs.rooms"


@pytest.mark.slow
def test_the_example_of_a_plan_has_the_capacity_and_memory_that_plan_prints() -> None:
    """The rest of the page names the machine and the time of the day it was printed on."""
    rows = re.compile(r"^ +(?:\d+ +[\d,]+|lora|qlora|full) +\d.*$", flags=re.MULTILINE)
    page = plan_page.PAGE.read_text().partition(plan_page.BEGIN)[2].partition(plan_page.END)[0]
    assert len(rows.findall(page)) == 8
    assert rows.findall(page) == rows.findall(plan_page.printed()), "run python -m docs.plan_page"


def test_the_picture_of_a_layer_is_what_its_script_draws() -> None:
    assert layer_picture.PICTURE.read_text() == layer_picture.picture(), "run python -m docs.layer_picture"


@pytest.mark.parametrize(("path", "drawn"), list(pictures.files()), ids=lambda value: getattr(value, "name", ""))
def test_a_picture_of_a_page_is_what_its_numbers_draw(path: Path, drawn: str) -> None:
    assert path.read_text() == drawn, "run python -m docs.pictures"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_a_page_exist(page: Path) -> None:
    """A name with a folder counts from the repository or the package; one without may be any file's."""
    named = re.findall(r"`([\w/]+\.py)`", page.read_text())
    missing = [
        name for name in named if name not in PLAIN and not (ROOT / name).is_file() and not (PACKAGE / name).is_file()
    ]
    assert not missing
