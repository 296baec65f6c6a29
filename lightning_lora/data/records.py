"""Row formats: from the columns of a file to a conversation or a plain text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from lightning_lora.errors import DataError, did_you_mean, first_five

from .bad_rows import RowError
from .reading import Row
from .settings import RowSettings

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
    """

    place: str
    messages: list[Message]
    untrained: frozenset[int] = frozenset()
    variables: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Text:
    """A plain text; all of it is trained on.

    Args:
        place: File and row, for messages.
        text: The text.
        weight: Factor of the row's loss.
        unused: Names of columns that nothing reads.
    """

    place: str
    text: str
    weight: float = 1.0
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Format:
    """A way to write a training example in columns.

    Args:
        columns: Columns that a row must have; other columns are ignored.
        read: Converts a row to a conversation or a text.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Conversation | Text]


def find_format(row: Row, settings: RowSettings) -> Format:
    """The first of the `FORMATS` whose columns the row has.

    Raises:
        DataError: If no format fits. The message names the columns of the row and the known formats.
    """
    for known in FORMATS:
        if all(column in row.columns for column in known.columns):
            return replace(known, read=partial(_with_weight, known.read))
    formats = "; ".join(" + ".join(known.columns) for known in FORMATS)
    raise DataError(
        f"{row.place}: the columns {first_five(map(repr, row.columns)) or '(none)'} fit no known format. "
        f"Known formats: {formats}. Rename the columns."
    )


def _with_weight(read: Callable[[Row], Conversation | Text], row: Row) -> Conversation | Text:
    record, given = read(row), row.columns.get("weight")
    if given is None or given == "":
        return record
    try:
        weight = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise RowError(row.place, "'weight' must be a finite number of at least 0", f", got {_short(given)}.")
    return replace(record, weight=weight)


def _conversation(column: str, role_key: str, text_key: str, roles: dict[str, str]) -> Callable[[Row], Conversation]:
    def read(row: Row) -> Conversation:
        turns = row.columns.get(column)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{row.place}: {column!r} must be a list of turns with at least one, got {_short(turns)}.")
        messages = []
        for number, turn in enumerate(turns):
            place = f"{row.place}, {column}[{number}]"
            if not isinstance(turn, dict):
                raise DataError(f"{place}: a turn has {role_key!r} and {text_key!r}, got {_short(turn)}.")
            role = _text(turn, role_key, place)
            if role not in roles:
                known = ", ".join(roles)
                raise DataError(f"{place}: unknown role {role!r}{did_you_mean(role, roles)} Known roles: {known}.")
            # An empty system prompt is common, and deliberate.
            content = _text(turn, text_key, place, empty=roles[role] == "system")
            messages.append({"role": roles[role], "content": content})
        return _checked(Conversation(row.place, messages))

    return read


def _checked(conversation: Conversation) -> Conversation:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles:
        raise DataError(
            f"{conversation.place}: the assistant has no turn, so there is nothing to train on; the roles are {roles}."
        )
    for number, pair in enumerate(pairwise(roles)):
        if pair == ("assistant", "assistant"):
            raise DataError(
                f"{conversation.place}: turns {number} and {number + 1} are both by the assistant; join them."
            )
    return conversation


def _single_turn(prompt: str, completion: str, context: str | None = None) -> Callable[[Row], Conversation]:
    def read(row: Row) -> Conversation:
        asked = _text(row.columns, prompt, row.place)
        if context is not None and row.columns.get(context) is not None:
            extra = _text(row.columns, context, row.place, empty=True)
            asked = f"{asked}\n\n{extra}" if extra.strip() else asked
        answer = _text(row.columns, completion, row.place)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Conversation(row.place, messages)

    return read


def _plain_text(row: Row) -> Text:
    return Text(row.place, _text(row.columns, "text", row.place))


def _text(columns: dict[str, Any], column: str, place: str, empty: bool = False) -> str:
    if column not in columns:
        raise DataError(f"{place}: no {column!r}; it has {first_five(map(repr, columns)) or 'nothing'}.")
    value = columns[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text, got {_short(value)}.")
    if not empty and not value.strip():
        raise DataError(f"{place}: {column!r} is empty ({value[:20]!r}); fill it or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {column!r} has half a character (a lone surrogate) at {error.start} ({_short(value)})."
        ) from error
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:60]}... ({type(value).__name__})" if len(shown) > 60 else f"{shown} ({type(value).__name__})"


_OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_OPENAI_ROLES, "human": "user", "gpt": "assistant", "model": "assistant"}

FORMATS = (
    Format(("messages",), _conversation("messages", "role", "content", _OPENAI_ROLES)),
    Format(("conversations",), _conversation("conversations", "from", "value", _SHAREGPT_ROLES)),
    Format(("instruction", "output"), _single_turn("instruction", "output", context="input")),
    Format(("instruction", "response"), _single_turn("instruction", "response", context="input")),
    Format(("prompt", "completion"), _single_turn("prompt", "completion")),
    Format(("question", "answer"), _single_turn("question", "answer")),
    Format(("text",), _plain_text),
)
"""The known formats. A file with the columns of several formats is read by the first of them."""
