"""Every error has a code, a page and an example that is raised; the page of errors says what they say."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import sys
from pathlib import Path

import pytest

from docs import errors_page
from docs.error_examples import EXAMPLES
from lightning_lora import ConfigError, LoRAConfig, errors
from lightning_lora.cli import main as cli
from lightning_lora.data.bad_rows import RowError
from lightning_lora.errors import LoRAError

ROOT = Path(__file__).parents[2]
KINDS = list(errors_page.error_classes())
BROAD = (errors.ConfigError, errors.AdapterFileError, errors.DataError)
# Signals between our own functions, which have the code of the error that they are kinds of.
INTERNAL = {"DamagedManifestError", "ApartError", "ServerGoneError"}


def headings(page: Path) -> set[str]:
    """What a link to a heading of a page may name."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


def test_codes_are_unique_and_pages_exist() -> None:
    codes = [kind.code for kind in KINDS]
    assert len(set(codes)) == len(codes) > 40
    for kind in KINDS:
        assert re.fullmatch(r"LL\d{3}", kind.code)
        name, _, anchor = kind.page.partition("#")
        page = ROOT / "docs" / name
        assert page.is_file(), kind.page
        assert not anchor or anchor in headings(page), kind.page


def test_no_class_of_errors_is_left_out() -> None:
    known = {kind.__name__ for kind in KINDS} | INTERNAL
    below = {"LoRAError", *known}
    for file in (ROOT / "lightning_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and below & {ast.unparse(base) for base in node.bases}:
                assert node.name in known, f"{file}: {node.name} has no code"
    assert known == {kind.__name__ for kind in EXAMPLES} | INTERNAL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
def test_the_example_of_the_page_is_raised(kind: type[LoRAError]) -> None:
    error = errors_page.example(EXAMPLES[kind])
    assert isinstance(error, kind)
    assert type(error) is kind or kind in BROAD
    assert str(error).count(f"[{error.code} {error.page}]") == 1
    section = errors_page.PAGE.read_text().partition(f"## {kind.code}\n")[2].partition("\n## ")[0]
    assert f"```text\n{errors_page.shown(error)}\n```" in section


@pytest.mark.filterwarnings("ignore")
def test_the_page_says_what_the_classes_say() -> None:
    assert errors_page.PAGE.read_text() == errors_page.page(), "run python -m docs.errors_page"


def test_a_code_is_told_once_and_survives_copies() -> None:
    inner = errors.LoRASettingError("rank must be at least 1, got 0.")
    outer = errors.StudySettingError(f"study.yaml: {inner}")
    assert str(outer) == "study.yaml: rank must be at least 1, got 0. [LL800 understand/study.md#the-study-file]"
    assert outer.message == "study.yaml: rank must be at least 1, got 0."
    assert str(inner) == "rank must be at least 1, got 0. [LL101 use/hyperparameters.md]"
    for error in (outer, inner, RowError("a.jsonl, row 0", "'text' is empty", ".")):
        assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == str(error)


def test_broad_classes_still_catch_the_narrow_ones() -> None:
    with pytest.raises(ConfigError, match=r"^rank must be at least 1, got 0\. \[LL101 use/hyperparameters\.md\]$"):
        LoRAConfig(rank=0)
    for kind in KINDS:
        assert issubclass(kind, ValueError | RuntimeError | ImportError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["mrege"], "LL900"),
        (["inspect"], "LL900"),
        (["inspect", "nowhere"], "LL305"),
        (["merge", "nowhere", "nowhere", "out"], "LL30"),
        (["fit", "--config=nowhere.yaml"], "LL900"),
        (["fit", "--no_such_option=1"], "LL900"),
        (["study", "nowhere.yaml", "--out=out"], "LL800"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_a_command_prints_has_one_code(
    arguments: list[str], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-lora"])
    try:
        ended: object = cli.main(arguments)
    except SystemExit as exit:
        ended = exit.code
    assert ended == 2
    (found,) = re.findall(r"\[(LL\d+) [\w./#-]+\]", capsys.readouterr().err)
    assert found.startswith(code)
