"""What the tests of formats share: a row read, and a template that prints every key."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from lightning_lora.data.formats.find import find_format
from lightning_lora.data.reading import Row
from lightning_lora.data.records import Conversation, Text
from lightning_lora.data.settings import RowSettings

EVERYTHING = (
    "{% if tools %}tools={{ tools | tojson }} {% endif %}"
    "{% for m in messages %}{% for key, value in m.items() %}"
    "{{ key }}={{ value if value is string else value | tojson }} {% endfor %}| {% endfor %}"
)
"""Prints each message with all its keys, in their order."""


def read(row: dict[str, Any], **settings: Any) -> Conversation | Text:
    source = Row("rows, row 0", row)
    options = RowSettings(**{"max_length": 64, **settings})
    return find_format(source, options).read(source)


def conversation(row: dict[str, Any], **settings: Any) -> Conversation:
    record = read(row, **settings)
    assert isinstance(record, Conversation)
    return record


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def rendered(record: Conversation, template: str = EVERYTHING) -> str:
    texts, _ = render_jinja_template([record.messages], chat_template=template, **record.variables)
    return texts[0].strip()
