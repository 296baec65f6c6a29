"""Prompts from texts and files: what is asked, what is set aside, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.cli.generate.prompts import read_prompts, with_system
from lightning_lora.data.prompts.read_prompts import Prompt, read_prompt, text_prompt
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.errors import DataError

SETTINGS = RowSettings(max_length=64)
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, AGAIN = {"role": "system", "content": "s"}, {"role": "user", "content": "q2"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


def read(**columns: Any) -> Prompt:
    return read_prompt(Row("row 0", columns), SETTINGS)


def messages(prompt: Prompt) -> list[dict[str, Any]]:
    assert isinstance(prompt.record, Conversation)
    return prompt.record.messages


@pytest.mark.parametrize(
    ("columns", "expected", "reference"),
    [
        ({"messages": [USER, ASSISTANT]}, [USER], "a"),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER], None),
        ({"messages": [USER, ASSISTANT, AGAIN]}, [USER, ASSISTANT, AGAIN], None),
        ({"messages": [USER, ASSISTANT, AGAIN, ASSISTANT]}, [USER, ASSISTANT, AGAIN], "a"),
        ({"conversations": [HUMAN, GPT]}, [USER], "a"),
        ({"conversations": [HUMAN]}, [USER], None),
        ({"question": "q", "answer": "a"}, [USER], "a"),
        ({"question": "q"}, [USER], None),
        ({"question": "q", "answer": ""}, [USER], None),
        ({"prompt": "q", "completion": "a"}, [USER], "a"),
        ({"prompt": "q"}, [USER], None),
        ({"instruction": "q", "output": "a"}, [USER], "a"),
        ({"instruction": "q", "response": "a"}, [USER], "a"),
        ({"instruction": "q"}, [USER], None),
        ({"instruction": "q", "input": "x"}, [{"role": "user", "content": "q\n\nx"}], None),
    ],
)
def test_a_row_is_asked_up_to_its_last_answer(
    columns: dict[str, Any], expected: list[dict[str, Any]], reference: str | None
) -> None:
    prompt = read(**columns)
    assert messages(prompt) == expected
    assert prompt.reference == reference


def test_a_text_is_to_be_continued() -> None:
    prompt = read(text="Once upon")
    assert isinstance(prompt.record, Text)
    assert (prompt.record.text, prompt.reference) == ("Once upon", None)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"messages": [{"role": "usr", "content": "q"}]}, "unknown role 'usr'"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": [ASSISTANT]}, "nothing comes before the answer"),
        ({"question": ""}, "row 0"),
        ({"colour": "red"}, "fit no known format"),
    ],
)
def test_a_row_without_a_prompt_is_refused_for_what_is_wrong_with_it(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(**columns)


def test_every_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffone?\n\n two \n", encoding="utf-8")
    prompts = read_prompts(str(file), SETTINGS)
    assert [messages(prompt)[0]["content"] for prompt in prompts] == ["one?", " two "]
    assert prompts[1].record.place == f"{file}, line 3"
    assert read_prompts(str(tmp_path / "*.txt"), SETTINGS) == prompts


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
def test_a_text_file_without_lines_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"prompts.txt"):
        read_prompts(str(tmp_path / "prompts.txt"), SETTINGS)


def test_files_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        lines = [json.dumps({"question": f"{name}{i}"}) for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl")]
    asked = [messages(prompt)[0]["content"] for prompt in read_prompts(files, SETTINGS, 5)]
    assert asked == ["b0", "b1", "b2", "a0", "a1"]


def test_columns_of_the_run_are_renamed_where_the_file_has_them() -> None:
    settings = RowSettings(max_length=64, columns={"frage": "question", "antwort": "answer"})
    assert read_prompt(Row("row", {"question": "q"}), settings).reference is None


def test_a_system_message_replaces_that_of_the_row() -> None:
    other = with_system(read(messages=[SYSTEM, USER]), "be brief")
    assert messages(other) == [{"role": "system", "content": "be brief"}, USER]
    with pytest.raises(DataError, match="a text to be continued"):
        with_system(read(text="Once"), "be brief")


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="--prompt 2 is empty"):
        text_prompt(" \n", "--prompt 2")
