"""The text of a message: as text, as a list of parts, or as the result of a tool."""

from __future__ import annotations

import json
import re
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.values import cleaned, read_text, short

_TEXT_PARTS = ("text", "input_text", "output_text")
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


def read_content(turn: dict[str, Any], key: str, place: str, empty: bool) -> str:
    """The text of a message. The texts of several parts are put one after the other, as templates that read parts do.

    Args:
        turn: The message.
        key: The key of its content.
        place: The message, for errors.
        empty: Whether the text may be empty.

    Raises:
        RowError: If the content is absent, empty or not text.
    """
    value = turn.get(key)
    if isinstance(value, list):
        return read_text({key: "".join(_part(part, key, place) for part in value)}, key, place, empty)
    return read_text(turn, key, place, empty)


def read_results(turn: dict[str, Any], key: str, place: str) -> list[str]:
    """What tools answered: one text, or one for each ``<tool_response>`` of Hermes' format.

    Objects, lists and numbers become JSON, as they would be sent to a model. Templates write the tags themselves.

    Raises:
        RowError: If there is no content.
    """
    value = turn.get(key)
    if value is not None and not isinstance(value, str) and not _is_parts(value):
        try:
            return [json.dumps(cleaned(value, key, place), ensure_ascii=False)]
        except (TypeError, ValueError, RecursionError) as error:
            kind = f"{key!r} of a tool must be text or a value of JSON"
            raise RowError(place, kind, f", got {short(value)}.") from error
    text = read_content(turn, key, place, empty=True)
    results = _RESPONSE.findall(text)
    return results if results and not _RESPONSE.sub("", text) else [text]


def _is_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)


def _part(part: Any, key: str, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
        what = part.get("type") if isinstance(part, dict) else part
        raise RowError(place, f"{key!r} has a part that is not text, and only text is read", f": {short(what)}.")
    return read_text(part, "text", place, empty=True)
