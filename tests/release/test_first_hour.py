"""The first hour: every command and block of its page, as printed, from the wheel in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.release.conftest import Installed
from tests.support.warm import ROOT

pytestmark = pytest.mark.slow

(PAGE,) = (ROOT / "docs").rglob("first_hour.md")
END = "## The same hour on a real model"
"""From here on the page needs a model that is not in the package."""
NUMBER = re.compile(r"\d[\d.,]*(?:e[-+]?\d+)?")


def blocks() -> list[tuple[str, str]]:
    """Language and text of each block."""
    text, _, _ = PAGE.read_text(encoding="utf-8").partition(END)
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def sessions(console: str) -> list[tuple[str, list[str]]]:
    """Each command of a block, and the lines that the page shows below it."""
    _, *parts = re.split(r"^\$ ", re.sub(r"\\\n\s*", "", console), flags=re.MULTILINE)
    return [(part.splitlines()[0], part.splitlines()[1:]) for part in parts]


def assert_shown(lines: list[str], printed: str) -> None:
    """Each line of the page is printed, with numbers of its own; ``...`` stands for anything."""
    printed = NUMBER.sub("#", printed)
    for line in lines:
        pattern = ".*".join(map(re.escape, NUMBER.sub("#", line.strip()).split("...")))
        assert re.search(pattern, printed), f"the page shows {line!r}, which is not in:\n{printed}"


def run_page(installed: Installed, folder: Path) -> dict[str, str]:
    """Do what the page says; returns what each command has printed."""
    printed = {}
    for language, text in blocks():
        if language == "python":
            installed.python("-c", text, cwd=folder)
        elif language == "yaml":
            (folder / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
        else:
            assert language == "console", language
            for command, lines in sessions(text):
                program, *arguments = shlex.split(command)
                assert program == "lightning-lora"
                code = 2 if any(line.startswith("error:") for line in lines) else 0
                printed[command] = installed.python("-m", "lightning_lora", *arguments, cwd=folder, code=code)
                assert_shown(lines, printed[command])
    return printed


def test_every_command_of_the_page_runs_and_prints_what_the_page_shows(installed: Installed, tmp_path: Path) -> None:
    printed = run_page(installed, tmp_path)
    asked = {command.split()[1] for command in printed}
    assert asked == {"recipes", "preview", "plan", "fit", "generate", "merge", "export", "study", "inspect"}
    (fitted,) = (text for command, text in printed.items() if command.split()[1] == "fit")
    for command in re.findall(r"^  (lightning-lora .*)$", fitted[fitted.index("Next:") :], flags=re.MULTILINE):
        assert command in printed, "the page leaves out a command that fit proposes"
    place = installed.python("-c", "import lightning_lora; print(lightning_lora.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.site)
