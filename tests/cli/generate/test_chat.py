"""A conversation in a real process: its history, its commands, its end, and what an interrupt stops."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_lora import disable_lora
from lightning_lora.cli.embedded import MODEL
from lightning_lora.cli.generate.answers import END_OF_TURN, generate
from lightning_lora.cli.generate.decoding import Sampling
from lightning_lora.cli.generate.view import printable
from lightning_lora.data.records import Conversation
from tests.support import warm
from tests.support.commands import COMMAND

MOST = 6


def chat(source: Path, folder: Path, text: str, *options: str) -> tuple[int, str, str]:
    """Exit code, output and notes of a conversation in which ``text`` is typed, then Ctrl-D."""
    (folder / "in").write_text(text)
    arguments = ["generate", source, "--chat", "--device=cpu", f"--max_new_tokens={MOST}", *options]
    files = {name: folder / name for name in ("stdout", "stderr")}
    code = warm.Process(*COMMAND, *arguments, cwd=folder, stdin=folder / "in", **files).wait(60)
    return code, files["stdout"].read_text(), files["stderr"].read_text()


def answer(model: Any, tokenizer: Any, *turns: str, system: str | None = None) -> tuple[str, str]:
    """The answer to turns of user and assistant, as it is remembered, and as it is shown."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    (found,) = generate(model, tokenizer, [Conversation("", messages)], None, Sampling(MOST))
    return found.text, printable(found.text) + "\n" + ("" if found.stop == END_OF_TURN else f"({found.stop})\n")


def test_what_was_said_is_remembered_until_reset(adapter: Path, tuned: Any, tokenizer: Any, tmp_path: Path) -> None:
    code, printed, notes = chat(adapter, tmp_path, "Hi\n\nWhy?\n/reset\nHi\n/nope\n/quit\nnot read\n")
    first, first_shown = answer(tuned, tokenizer, "Hi")
    second = answer(tuned, tokenizer, "Hi", first, "Why?")[1]
    assert code == 0, notes
    expected = f"you> tuned> {first_shown}you> you> tuned> {second}you> you> tuned> {first_shown}you> you> "
    assert printed == expected
    assert second != answer(tuned, tokenizer, "Why?")[1]
    assert notes.count("/compare: both answer") == 2  # at the start, and for an unknown command
    assert "the conversation starts anew" in notes


def test_the_base_answers_too_when_it_is_asked_to(adapter: Path, tuned: Any, tokenizer: Any, tmp_path: Path) -> None:
    code, printed, notes = chat(
        adapter, tmp_path, "Hi\n/compare\nAgain\n/base\nHi\n/reset\n/base\nHi\n", "--compare", "--system=be brief"
    )
    tuned_first, tuned_shown = answer(tuned, tokenizer, "Hi", system="be brief")
    after = answer(tuned, tokenizer, "Hi", tuned_first, "Again", system="be brief")
    with disable_lora(tuned):
        base_shown = answer(tuned, tokenizer, "Hi", system="be brief")[1]
        base_after = answer(tuned, tokenizer, "Hi", tuned_first, "Again", after[0], "Hi", system="be brief")[1]
    assert code == 0, notes
    assert printed == (
        f"you> base> {base_shown}tuned> {tuned_shown}you> you> tuned> {after[1]}you> you> base> {base_after}"
        f"you> you> you> tuned> {tuned_shown}you> \n"
    )
    assert base_shown != tuned_shown
    assert "now answering: base" in notes


def test_a_model_without_a_base_says_so(tmp_path: Path) -> None:
    code, printed, notes = chat(MODEL, tmp_path, "/compare\nHi\n")
    assert code == 0, notes
    assert "there is no base to ask" in notes
    assert printed.startswith("you> you> answer> ")


def test_a_conversation_that_is_too_long_goes_on_after_it_is_told(
    adapter: Path, tuned: Any, tokenizer: Any, tmp_path: Path
) -> None:
    code, printed, notes = chat(adapter, tmp_path, "word " * 2000 + "\nHi\n")
    assert code == 0, notes
    assert "error: this conversation: the prompt has" in notes
    assert "/reset starts anew" in notes
    assert printed.endswith(f"you> tuned> {answer(tuned, tokenizer, 'Hi')[1]}you> \n")


@pytest.mark.slow
def test_an_interrupt_ends_the_answer_and_not_the_conversation(adapter: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    # Open for both, so that neither side waits for the other.
    keyboard = os.open(tmp_path / "in", os.O_RDWR)
    files = {name: tmp_path / name for name in ("stdout", "stderr")}
    files["stdout"].touch()
    draws = ["--temperature=3", "--seed=1", "--max_new_tokens=1000"]  # an answer that does not end for a while
    arguments = ["generate", adapter, "--chat", "--device=cpu", *draws]
    process = warm.Process(*COMMAND, *arguments, cwd=tmp_path, stdin=tmp_path / "in", **files)

    def printed(words: str, count: int = 1) -> str:
        deadline = time.monotonic() + 60
        while (text := files["stdout"].read_text()).count(words) < count and time.monotonic() < deadline:
            assert process.poll() is None, files["stderr"].read_text()
            time.sleep(0.02)
        assert text.count(words) >= count, text
        return text

    os.write(keyboard, b"Hi\n")
    while len(printed("tuned> ").partition("tuned> ")[2]) < 20:  # it comes word by word
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert printed("(interrupted)\nyou> ").count("(interrupted)") == 1
    process.send_signal(signal.SIGINT)  # at the prompt it only leaves the line
    deadline = time.monotonic() + 60
    while "/quit or Ctrl-D to end" not in files["stderr"].read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.write(keyboard, b"Again\n")
    printed("tuned> ", 2)
    process.send_signal(signal.SIGINT)
    printed("(interrupted)", 2)
    os.write(keyboard, b"/quit\n")
    assert process.wait(60) == 0
    os.close(keyboard)
