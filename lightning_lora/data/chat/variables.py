"""Variables that a user or a row gives to a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from lightning_lora.errors import ChatTemplateError

_TAKEN = {"messages", "conversations", "chat_template", "add_generation_prompt"}
_TAKEN |= {"return_assistant_tokens_mask", "continue_final_message"}
"""Names that rendering itself gives."""


def check_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for a chat template, with a ``date`` as text.

    Raises:
        ConfigError: If they are no mapping of names to plain values, if a name is one that the rows themselves give, or
            if ``date`` is no day.
    """
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ChatTemplateError(f"chat_template_kwargs must map names to values, got {given!r}.")
    variables = check_names(given)
    try:
        json.dumps(variables)
    except (TypeError, ValueError) as error:
        raise ChatTemplateError(
            f"chat_template_kwargs must hold texts, numbers, lists and mappings only: {error}"
        ) from error
    return variables


def check_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of one row or of all rows, with a ``date`` as text.

    Raises:
        ConfigError: If a name is one that rendering itself gives, or if ``date`` is no day.
    """
    if taken := sorted(_TAKEN & given.keys()):
        raise ChatTemplateError(f"chat_template_kwargs cannot set {taken}, which rendering itself gives.")
    if "date" not in given:
        return dict(given)
    return {**given, "date": parse_day(given["date"]).isoformat()}


def parse_day(given: Any) -> date:
    """A day written as ``YYYY-MM-DD``.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return date.fromisoformat(str(given))
    except ValueError as error:
        raise ChatTemplateError(
            f"the date of chat_template_kwargs must be a day like 2026-11-26, got {given!r}."
        ) from error
