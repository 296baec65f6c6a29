"""Every number on a page of findings is one of the files that are committed beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from studies.modules.pages import FINDINGS
from studies.write_findings import TABLES, filled
from tests.support import toys

PAGES = sorted(page for page in (toys.ROOT / FINDINGS).glob("*.md") if page.name != "README.md")
HEADINGS = ["Verdict", "The claim", "What was run", "What was found", "Limits"]
WORDS = ("confirmed", "not confirmed", "cannot tell here")
_TABLE = re.compile(r"<!-- table: (\w+)(?: (\w+))? -->\n(.*?)<!-- end -->", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.\d+(?:e[+-]\d+)?(?!\.\d)")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are made at the root of the repository."""
    monkeypatch.chdir(toys.ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_those_of_its_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    kinds = {kind for kind, _, _ in _TABLE.findall(text)}
    assert kinds
    assert kinds <= set(TABLES)
    assert filled(text, page.stem) == text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_decimal_number_of_the_text_is_in_a_table(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tables = " ".join(table for _, _, table in _TABLE.findall(text))
    prose = re.sub(r"`[^`]*`|https?://\S+|\(#[^)]*\)", "", _TABLE.sub("", text))
    made = re.search(r"^## What was run\n(.*?)^## ", prose, re.DOTALL | re.MULTILINE)
    assert made, "a page says what was run"
    # Versions and settings are not results.
    for number in _NUMBER.findall(prose.replace(made[1], "")):
        assert number in tables, number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_a_verdict_a_claim_with_its_source_and_what_would_tell(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == HEADINGS
    claim = text.partition("## The claim")[2].partition("## ")[0]
    assert "https://" in claim
    verdict = re.search(r"## Verdict\n\n\*\*(.+?)\.\*\*", text)
    assert verdict
    assert verdict[1].lower() in WORDS
    assert "would tell" in text.partition("## Limits")[2]


def test_the_index_has_every_page_with_its_verdict() -> None:
    index = (toys.ROOT / FINDINGS / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        verdict = re.search(r"## Verdict\n\n\*\*(.+?)\.\*\*", page.read_text(encoding="utf-8"))
        assert verdict
        (line,) = [line for line in index.splitlines() if f"({page.name})" in line]
        assert verdict[1].lower() in line


def test_reports_are_small() -> None:
    reports = list((toys.ROOT / FINDINGS).rglob("report.html"))
    assert reports
    assert all(report.stat().st_size < 300_000 for report in reports)
