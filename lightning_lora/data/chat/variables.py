"""Variables that a user or a row gives to a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

from lightning_lora.errors import ConfigError

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
        raise ConfigError(f"chat_template_kwargs must map names to values, got {given!r}.")
    if taken := sorted(_TAKEN & set(given)):
        raise ConfigError(f"chat_template_kwargs cannot set {taken}: the conversations of the rows do.")
    variables = dict(given)
    if "date" in variables:
        variables["date"] = parse_day(variables["date"]).isoformat()
    try:
        json.dumps(variables)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"chat_template_kwargs must hold texts, numbers, lists and mappings only: {error}") from error
    return variables


def parse_day(given: Any) -> date:
    """A day written as ``YYYY-MM-DD``.

    Raises:
        ConfigError: If it is none.
    """
    try:
        return date.fromisoformat(str(given))
    except ValueError as error:
        raise ConfigError(f"the date of chat_template_kwargs must be a day like 2026-11-26, got {given!r}.") from error
