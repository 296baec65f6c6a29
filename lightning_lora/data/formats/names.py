"""Known names of columns and of keys of messages, and a user's own names for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.errors import DataError, DataSettingError, did_you_mean

FORMATS = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text",),
)
"""Columns of the known formats. A row with the columns of several formats is read by the first of them."""
PAIRS = (("prompt", "chosen", "rejected"), ("question", "chosen", "rejected"), ("chosen", "rejected"))
"""Columns of the known formats of pairs, the preferred answer first."""

BESIDE = frozenset(("system", "tools", "functions", "documents", "chat_template_kwargs", "weight"))
"""Columns that a conversation may have in any format."""
QUESTION = frozenset(("input", "context", "options", "choices", "history"))
"""Columns that a question may have."""
COLUMNS = frozenset(name for names in (*FORMATS, *PAIRS, BESIDE, QUESTION, ("margin",)) for name in names)

TRAINED = frozenset(("weight", "train", "training", "loss", "loss_weight", "loss_mask"))
"""Keys of a message that say whether it is trained on: OpenAI's; axolotl's; ms-swift's, XTuner's, LLaMA-Factory's."""
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
THINKING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what the assistant thinks before it answers."""
KEYS = frozenset(
    (*ROLE_KEYS, *CONTENT_KEYS, *THINKING, *TRAINED, "tool_calls", "function_call", "tool_call_id", "name")
)
"""Keys of a message with a meaning; other keys are given to the template as they are."""


def check_names(columns: Mapping[str, str]) -> None:
    """Check that a user's names are mapped to known ones.

    Raises:
        ConfigError: If one is not. The message suggests the nearest known name.
    """
    for own, known in columns.items():
        if known not in COLUMNS | KEYS:
            names = f"Columns: {', '.join(sorted(COLUMNS))}. Keys of messages: {', '.join(sorted(KEYS))}."
            hint = did_you_mean(str(known), sorted(COLUMNS | KEYS))
            raise DataSettingError(f"columns maps {own!r} to {known!r}, which is no known column or key{hint} {names}")


def check_renamed(columns: Mapping[str, str], renamed: set[str], seen: set[str], where: str) -> None:
    """Check that every name of a mapping was met in a row.

    Args:
        columns: A user's names to known ones.
        renamed: The user's names that a row had.
        seen: Names that rows have and nothing reads, to suggest one.
        where: The rows that were read, for the message.

    Raises:
        DataError: If a name was not met.
    """
    for own in sorted(set(columns) - renamed):
        hint = did_you_mean(own, sorted(seen))
        others = f" Names that nothing reads: {', '.join(sorted(seen))}." if seen else ""
        raise DataError(f"columns maps {own!r} to {columns[own]!r}, but no row of {where} has {own!r}{hint}{others}")


def rename(values: Mapping[str, Any], names: Mapping[str, str], place: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Put columns or keys under their known names.

    Args:
        values: Columns of a row or keys of a message.
        names: A user's names to known ones.
        place: The row and the part of it, for messages.

    Returns:
        The values, and the user's name of each renamed one.

    Raises:
        RowError: If two filled ones have the same known name.
    """
    own: dict[str, str] = {}
    for name, known in names.items():
        if name not in values or (known in own and values[name] is None):
            continue
        if known in own and values[own[known]] is not None:
            raise RowError(place, f"columns maps both {own[known]!r} and {name!r} to {known!r}, and the row has both")
        own[known] = name
    kept = {name: value for name, value in values.items() if name not in names and name not in own}
    return {**kept, **{known: values[name] for known, name in own.items()}}, own
