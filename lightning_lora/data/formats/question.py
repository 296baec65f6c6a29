"""A question and its answer in columns, and what belongs to the question: passage, options, earlier questions."""

from __future__ import annotations

from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.names import QUESTION
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.turns import Turn, read_turns
from lightning_lora.data.formats.values import parsed, read_text, short


def read_question(row: NamedRow, column: str) -> list[Turn]:
    """The turns before an answer: ``history``, then the question with its options and its passage.

    Options follow the question, one on a line; a passage (``context``, and ``input`` beside ``instruction``) follows
    after an empty line. A question may be a list of messages; nothing of it is trained on.

    Raises:
        RowError: If a column does not hold what its name says.
    """
    if _is_messages(row, column):
        return [Turn(turn.message, trained=False) for turn in read_turns(row, column)]
    row.take(column)
    asked = read_text(row.columns, column, row.place)
    if QUESTION.isdisjoint(row.columns):
        return [Turn({"role": "user", "content": asked})]
    options = [option for name in ("options", "choices") for option in _options(row, name)]
    passages = [_passage(row, name) for name in (("input", "context") if column == "instruction" else ("context",))]
    asked = "\n\n".join(text for text in ("\n".join([asked, *options]), *passages) if text)
    return [*_history(row), Turn({"role": "user", "content": asked})]


def read_answer(row: NamedRow, column: str) -> list[Turn]:
    """The turns of an answer: one message of the assistant, or a list of messages.

    Raises:
        RowError: If the column is absent, empty or neither.
    """
    if _is_messages(row, column):
        return read_turns(row, column)
    row.take(column)
    return [Turn({"role": "assistant", "content": read_text(row.columns, column, row.place)})]


def _is_messages(row: NamedRow, column: str) -> bool:
    value = row.columns.get(column)
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _passage(row: NamedRow, column: str) -> str:
    return "" if row.take(column) is None else read_text(row.columns, column, row.place)


def _history(row: NamedRow) -> list[Turn]:
    """The turns of earlier questions and answers, a list of pairs as LLaMA-Factory's alpaca rows have."""
    given = row.take("history")
    pairs = [] if given is None else parsed(given)
    turns = []
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [None]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            kind = "'history' must be a list of pairs of question and answer, or its JSON text"
            raise RowError(row.place, kind, f", got {short(given)}.")
        sides = {"question": pair[0], "answer": pair[1]}
        place = f"{row.place}, history[{number}]"
        turns.append(Turn({"role": "user", "content": read_text(sides, "question", place)}))
        turns.append(Turn({"role": "assistant", "content": read_text(sides, "answer", place)}))
    return turns


def _options(row: NamedRow, column: str) -> list[str]:
    """The options of a question: texts, labels with texts in any of their usual shapes, or one text as it is."""
    given = row.take(column)
    options = parsed(given)
    if options is None:
        return []
    if isinstance(options, str):
        return [read_text({column: options}, column, row.place)]
    return [_option(row, column, option) for option in _listed(options)]


def _listed(options: Any) -> list[Any]:
    if isinstance(options, dict) and isinstance(texts := options.get("text"), list):
        labels = options.get("label")
        return list(zip(labels, texts, strict=False)) if isinstance(labels, list) else texts
    if isinstance(options, dict):
        return [(label, text) for label, text in options.items() if text is not None]
    return options if isinstance(options, list) else [options]


def _option(row: NamedRow, column: str, option: Any) -> str:
    if isinstance(option, dict) and "text" in option:
        option = (option["label"], option["text"]) if option.get("label") is not None else option["text"]
    parts = option if isinstance(option, tuple) else (option,)
    if not all(isinstance(part, (str, int, float)) for part in parts):
        kind = f"{column!r} must be a list of texts, or of labels and texts"
        raise RowError(row.place, kind, f", got {short(row.columns[column])}.")
    return read_text({column: ". ".join(map(str, parts))}, column, row.place)
