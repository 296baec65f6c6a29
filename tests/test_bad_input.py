"""The table of bad input names every kind, and for each a test that is collected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import warm

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "evidence" / "bad_input.md"


def named_in(page: Path, letter: str) -> dict[str, list[str]]:
    """Number of each row of a table to the tests that it names, each with its file.

    Args:
        page: The page with the table; the first cell of a row is its number, the last one names tests.
        letter: What numbers begin with.
    """
    found: dict[str, list[str]] = {}
    rows = re.findall(rf"^\| ({letter}\d\d) \| .+ \| .+ \| (.+) \|$", page.read_text(), flags=re.MULTILINE)
    for number, cell in rows:
        file = ""
        found[number] = []
        for named, test in re.findall(r"`((?:[\w/]+\.py)?)::(\w+)`", cell):
            file = named or file
            found[number].append(f"{file}::{test}")
    return found


def named_tests() -> dict[str, list[str]]:
    """Number of a kind to the tests that its row names."""
    return named_in(TABLE, "B")


def test_every_kind_has_a_row_with_a_test() -> None:
    assert list(named_tests()) == [f"B{number:02d}" for number in range(1, 89)]
    assert all(named_tests().values())


@pytest.mark.slow
def test_every_test_of_the_table_is_collected(tmp_path: Path) -> None:
    tests = sorted({test for named in named_tests().values() for test in named})
    files = sorted({test.partition("::")[0] for test in tests})
    done = warm.run(
        "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=", *files, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {re.sub(r"\[.*", "", line) for line in done.stdout.splitlines()}
    assert [test for test in tests if test not in collected] == []


def test_tests_of_a_kind_carry_its_number_where_one_test_is_of_many() -> None:
    """A row that names a test of many cases counts only if a case of that file has its number."""
    for number, tests in named_tests().items():
        for test in tests:
            file, _, name = test.partition("::")
            source = (ROOT / file).read_text()
            assert f"def {name}(" in source, test
            numbers = set(re.findall(r"\bB\d\d\b", source))
            if name in ("test_bad_settings_are_refused_by_name", "test_a_refused_target_leaves_the_module_as_it_was"):
                assert number in numbers or number.lower() in source, (number, test)
