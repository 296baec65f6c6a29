"""What a row holds: a conversation, a plain text, or two conversations of which one is preferred."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""One message as a chat template reads it: ``role``, ``content`` and whatever other keys the row has."""


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them are trained on.

    Args:
        place: File and row, for messages.
        messages: The messages as the chat template reads them, with all their keys.
        untrained: Indices of messages of the assistant that are not trained on.
        variables: Variables of the chat template that this row sets, such as ``tools``.
        weight: Factor of the row's loss; a row of weight 2 counts like the same row twice.
        unused: Names of columns and of keys of messages that nothing reads.
        renamed: The names of `RowSettings.columns` that the row has.
    """

    place: str
    messages: list[Message]
    untrained: frozenset[int] = frozenset()
    variables: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    unused: frozenset[str] = frozenset()
    renamed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Text:
    """A plain text; all of it is trained on.

    Args:
        place: File and row, for messages.
        text: The text.
        weight: Factor of the row's loss.
        unused: Names of columns that nothing reads.
        renamed: The names of `RowSettings.columns` that the row has.
    """

    place: str
    text: str
    weight: float = 1.0
    unused: frozenset[str] = frozenset()
    renamed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pair:
    """Two conversations with the same prompt, of which one is preferred. Only their answers are trained on.

    Args:
        place: File and row, for messages.
        chosen: The preferred conversation, which also holds what is told about the row.
        rejected: The other one.
        margin: How much better the chosen one is, at least 0; None if the row does not say.
    """

    place: str
    chosen: Conversation
    rejected: Conversation
    margin: float | None = None
