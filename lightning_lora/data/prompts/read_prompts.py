"""Prompts: from a text, or from rows as the data room reads them, each up to its last answer."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.find import find_format
from lightning_lora.data.formats.names import BESIDE, QUESTION
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.values import check_text, parsed
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Message, Text
from lightning_lora.data.settings import RowSettings
from lightning_lora.data.sources import find_sources
from lightning_lora.errors import DataError

_ANSWER_COLUMNS = ("completion", "answer", "output", "response")
_ANY_ANSWER = "?"
"""Stands for the answer of a row that has none, so that it is read as a training row is."""
_ASKED = BESIDE | QUESTION | {"messages", "conversations", "instruction", "prompt", "question", "text"}
"""Columns that a prompt is made of."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        record: The conversation up to the answer that is asked for, or a text to be continued.
        reference: The answer that the row has; None if it has none.
        columns: The other columns of the row, an answer's among them, by known name.
    """

    record: Conversation | Text
    reference: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def text_prompt(text: str, place: str) -> Prompt:
    """A prompt of one question.

    Raises:
        DataError: If the text is empty, or holds half a character.
    """
    if not text.strip():
        raise DataError(f"{place} is empty.")
    check_text(text, "prompt", place)
    return Prompt(Conversation(place, [{"role": "user", "content": text}]))


def prompt_rows(names: str | list[str], settings: RowSettings, split: str) -> Iterator[Prompt | RowError]:
    """Read prompts from files or hub datasets, or what is wrong with a row.

    Every line of a ``.txt`` file is a prompt. Other files are read as training rows are; a row may lack its answer.

    Args:
        names: Files, globs or hub names.
        settings: How rows become tokens.
        split: The split of a hub dataset that does not name one.

    Raises:
        DataError: If a file cannot be read.
    """
    for name in [names] if isinstance(names, str) else names:
        if name.lower().endswith(".txt") and (files := sorted(glob(os.path.expanduser(name), recursive=True))):
            # Unlike in training, where such a file is one long text.
            for file in files:
                yield from _lines(Path(file))
            continue
        for source in find_sources(name, split):
            for row in source.rows():
                yield row if isinstance(row, RowError) else _prompt_or_error(row, settings)


def read_prompt(row: Row, settings: RowSettings) -> Prompt:
    """Read one row, and cut it before its last answer.

    Raises:
        DataError: If the row holds no prompt.
    """
    others = {name: value for name, value in NamedRow(row, settings).columns.items() if name not in _ASKED}
    try:
        record = find_format(row, settings).read(row)
    except DataError as error:
        completed = _read_with_any_answer(row, settings)
        if not isinstance(completed, Conversation):
            raise completed or error from None
        return Prompt(_without_answer(completed), None, others)
    if isinstance(record, Text):
        return Prompt(record, None, others)
    answers = _answers(record)
    if answers and answers[-1] == len(record.messages) - 1:
        return Prompt(_without_answer(record), _reference(record.messages[-1]), others)
    return Prompt(record, None, others)


def _prompt_or_error(row: Row, settings: RowSettings) -> Prompt | RowError:
    try:
        return read_prompt(row, settings)
    except RowError as error:
        return error


def _lines(file: Path) -> Iterator[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}. It must be text in UTF-8.") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not filled:
        raise DataError(f"{file} has no lines with text.")
    for number, line in filled:
        yield text_prompt(line, f"{file}, line {number}")


def _read_with_any_answer(row: Row, settings: RowSettings) -> Conversation | DataError | None:
    """Read a row that lacks its answer, with another one in its place; or say what is wrong with its question."""
    wrong = None
    for columns in _with_any_answer(row.columns):
        completed = dataclasses.replace(row, columns=columns)
        try:
            known = find_format(completed, settings)
        except DataError:
            continue  # the caller tells what is wrong with the row as it is
        try:
            record = known.read(completed)
        except DataError as error:
            wrong = wrong or error
            continue
        if isinstance(record, Conversation) and record.messages[-1].get("content") == _ANY_ANSWER:
            return record
    return wrong


def _with_any_answer(columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in columns.items():
        turns = parsed(value)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            yield columns | {name: [*turns, {"role": "assistant", "content": _ANY_ANSWER}]}
    for name in _ANSWER_COLUMNS:
        yield columns | {name: _ANY_ANSWER}


def _without_answer(record: Conversation) -> Conversation:
    last = _answers(record)[-1]
    if last == 0:
        raise RowError(record.place, "nothing comes before the answer, so there is no prompt.")
    return dataclasses.replace(
        record, messages=record.messages[:last], untrained=frozenset(i for i in record.untrained if i < last)
    )


def _answers(record: Conversation) -> list[int]:
    return [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]


def _reference(answer: Message) -> str:
    """The answer as text; what else it holds, such as calls of tools, as JSON."""
    others = {key: value for key, value in answer.items() if key != "role" and value not in (None, "")}
    if others.keys() == {"content"} and isinstance(others["content"], str):
        return others["content"]
    return json.dumps(others, ensure_ascii=False, default=str)
