"""Columns beside messages or a question: the system prompt, variables of the chat template, the weight of the row."""

from __future__ import annotations

from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.tools import read_tools
from lightning_lora.data.formats.turns import Turn
from lightning_lora.data.formats.values import factor, read_text, short, structure

_RESERVED = ("messages", "add_generation_prompt", "continue_final_message")


def with_system(row: NamedRow, turns: list[Turn]) -> list[Turn]:
    """The turns after a system message from the column ``system``.

    Turns that begin with a system message keep it, and the column is not used; it counts as unused if its text differs.
    """
    if row.take("system") is None:
        return turns
    text = read_text(row.columns, "system", row.place)
    if turns and turns[0].message["role"] == "system":
        if turns[0].message["content"] != text:
            row.leave("system")
        return turns
    return [Turn({"role": "system", "content": text}), *turns]


def read_variables(row: NamedRow) -> dict[str, Any]:
    """Variables of the chat template: ``tools``, ``documents`` and those of ``chat_template_kwargs``.

    Raises:
        RowError: If a column does not hold what its name says.
    """
    variables = _template_variables(row)
    for column in ("functions", "tools"):
        if (given := row.take(column)) is not None and (tools := read_tools(given, column, row.place)):
            variables["tools"] = tools
    if (given := row.take("documents")) is not None and (documents := _documents(row, given)):
        variables["documents"] = documents
    return variables


def read_weight(row: NamedRow) -> float:
    """The factor of the row's loss from the column ``weight``, 1 without it.

    Raises:
        RowError: If it is not a finite number of at least 0.
    """
    value = row.take("weight")
    return 1.0 if value is None else factor(value, "weight", row.place)


def _documents(row: NamedRow, given: Any) -> list[dict[str, Any]]:
    """Documents as objects, which is what templates read; a text becomes the ``text`` of one."""
    found = structure(given, "documents", row.place)
    listed = found if isinstance(found, list) else [None]
    documents: list[Any] = [{"text": item} if isinstance(item, str) else item for item in listed]
    if not all(isinstance(item, dict) for item in documents):
        kind = "'documents' must be a list of objects or texts, or its JSON text"
        raise RowError(row.place, kind, f", got {short(given)}.")
    return documents


def _template_variables(row: NamedRow) -> dict[str, Any]:
    given = row.take("chat_template_kwargs")
    variables = {} if given is None else structure(given, "chat_template_kwargs", row.place)
    if not isinstance(variables, dict):
        kind = "'chat_template_kwargs' must be an object, or its JSON text"
        raise RowError(row.place, kind, f", got {short(given)}.")
    for name in _RESERVED:
        if name in variables:
            raise RowError(row.place, f"'chat_template_kwargs' may not set {name!r}, which the conversation decides")
    return variables
