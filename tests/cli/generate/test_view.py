"""How answers look: columns where there is room, colour where it is wanted, and nothing that acts on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from lightning_lora.cli.generate.answers import Answer
from lightning_lora.cli.generate.view import printable, show, terminal
from lightning_lora.data.prompts.read_prompts import Prompt
from lightning_lora.data.records import Conversation, Text
from tests.support import warm

ASKED = Prompt(Conversation("data/val.jsonl, row 3", [{"role": "user", "content": "how many ducks?"}]), "sixteen")
TUNED = Answer("tuned " * 30, "end of turn", 31)
BASE = Answer("base " * 30, "max_new_tokens", 16)


def shown(width: int, prompt: Prompt = ASKED, tuned: Answer = TUNED, base: Answer | None = BASE) -> list[str]:
    file = io.StringIO()
    show(Console(file=file, width=width, highlight=False, markup=False), 1, prompt, tuned, base)
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [20, 80, 99, 100, 160])
def test_answers_stand_side_by_side_from_100_columns_and_no_line_is_longer(width: int) -> None:
    lines = shown(width)
    assert max(map(cell_len, lines)) <= width
    beside = [line for line in lines if "base base" in line and "tuned tuned" in line]
    assert bool(beside) == (width >= 100)
    text = " ".join(lines)
    assert text.count("tuned") == 31
    assert text.count("base") == 31
    for words in ("how many ducks?", "sixteen", *(["val.jsonl, row 3"] if width >= 80 else [])):
        assert words in text


def test_notes_say_how_an_answer_ended() -> None:
    text = " ".join(" ".join(shown(80)).split())
    assert "31 tokens, end of turn" in text
    assert "16 tokens, stopped by max_new_tokens" in text


@pytest.mark.parametrize("width", [80, 120])
def test_wide_characters_and_long_words_stay_inside_their_column(width: int) -> None:
    lines = shown(width, tuned=Answer("鴨" * 200, "end of turn", 9), base=Answer("x" * 200, "end of turn", 9))
    assert max(map(cell_len, lines)) <= width
    assert "".join(lines).count("鴨") == 200
    assert "".join(lines).count("x") >= 200


HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x08\x08 a\rb \x9b2J \u202egnp\u2066 \x00 \ud800 \x7f [bold]b[/bold] \u2028."


def test_nothing_in_a_text_acts_on_the_terminal() -> None:
    lines = shown(
        80,
        Prompt(Conversation(HOSTILE, [{"role": HOSTILE, "content": HOSTILE, "name": HOSTILE}]), HOSTILE),
        Answer(HOSTILE, "end of turn", 3),
        Answer(HOSTILE, "end of turn", 3),
    )
    text = "".join(lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\ud800-\udfff]", text)
    assert text.count("[bold]b[/bold]") >= 4
    assert "\\x1b[31mred" in text


def test_ordinary_text_stays_as_it_is() -> None:
    text = "Ünïcode, 鴨, emoji 👩\u200d👧, line\nbreak and a \\x1b that was written out"
    assert printable(text) == text
    assert printable("a\tb\r\nc") == "a    b\nc"


def test_nothing_written_is_said() -> None:
    assert "(nothing)" in " ".join(shown(80, tuned=Answer("  ", "end of turn", 1), base=None))


def test_a_text_to_be_continued_is_shown() -> None:
    assert "Once upon" in " ".join(shown(80, Prompt(Text("row", "Once upon")), base=None))


SHOW = """
from lightning_lora.cli.generate.answers import Answer
from lightning_lora.data.prompts.read_prompts import text_prompt
from lightning_lora.cli.generate.view import show, terminal
answers = [Answer(name, "end of turn", 2) for name in ("tuned", "base")]
show(terminal(), 1, text_prompt("question", "--prompt 1"), *answers)
"""


@pytest.mark.parametrize(
    ("where", "variables", "coloured"),
    [
        ("terminal", {}, True),
        ("terminal", {"NO_COLOR": "1"}, False),
        ("file", {}, False),
    ],
)
def test_colour_on_a_terminal_only_and_never_under_no_color(
    where: str, variables: dict[str, str], coloured: bool, tmp_path: Path
) -> None:
    environment = {name: value for name, value in warm.environment().items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "90"} | variables
    controller, terminal_end = pty.openpty()
    out = os.ttyname(terminal_end) if where == "terminal" else tmp_path / "out"
    process = warm.Process("-W", "ignore", "-c", SHOW, env=environment, stdout=out, stderr=tmp_path / "err")
    assert process.wait() == 0, (tmp_path / "err").read_text()
    printed = os.read(controller, 65536).decode() if where == "terminal" else (tmp_path / "out").read_text()
    os.close(terminal_end)
    os.close(controller)
    assert "tuned" in printed
    # Bold type is no colour.
    assert bool(re.search(r"\x1b\[[\d;]*3\dm", printed)) == coloured
    if where == "file":
        assert "\x1b" not in printed


def test_the_terminal_is_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    terminal().print("[bold]as it is[/bold] :smile:")
    assert capsys.readouterr().out == "[bold]as it is[/bold] :smile:\n"
