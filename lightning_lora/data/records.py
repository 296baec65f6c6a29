"""Row formats: from the columns of a file to conversations or plain texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_lora.errors import DataError, did_you_mean, first_five

from .reading import Row

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Turns with ``role`` (system, user or assistant) and ``content``; the assistant's are trained on."""

    place: str
    messages: list[Message]


@dataclass(frozen=True)
class Text:
    """A plain text, trained on from end to end."""

    place: str
    text: str


@dataclass(frozen=True)
class Format:
    """One way to write a training example.

    Args:
        columns: Columns that must be there; others are ignored.
        read: From a row to what is trained on.
    """

    columns: tuple[str, ...]
    read: Callable[[Row], Conversation | Text]


def find_format(row: Row) -> Format:
    """The first format in the order of `FORMATS` whose columns the row has.

    Raises:
        DataError: If no format fits, naming the columns found and the formats known.
    """
    for known in FORMATS:
        if all(column in row.columns for column in known.columns):
            return known
    formats = "; ".join(" + ".join(known.columns) for known in FORMATS)
    raise DataError(
        f"{row.place}: the columns {first_five(map(repr, row.columns)) or '(none)'} fit no known format. "
        f"Known are: {formats}. Rename the columns."
    )


def _turns(column: str, role_key: str, text_key: str, roles: dict[str, str]) -> Callable[[Row], Conversation]:
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
                raise DataError(f"{place}: unknown role {role!r}{did_you_mean(role, roles)} Known are {known}.")
            # An empty system prompt is common and means what it says.
            content = _text(turn, text_key, place, empty=roles[role] == "system")
            messages.append({"role": roles[role], "content": content})
        return _checked(Conversation(row.place, messages))

    return read


def _checked(conversation: Conversation) -> Conversation:
    roles = [message["role"] for message in conversation.messages]
    if "assistant" not in roles:
        raise DataError(
            f"{conversation.place}: no turn of the assistant, so nothing to train on; its roles are {roles}."
        )
    for number, pair in enumerate(pairwise(roles)):
        if pair == ("assistant", "assistant"):
            raise DataError(
                f"{conversation.place}: turns {number} and {number + 1} are both the assistant's; join them."
            )
    return conversation


def _pair(prompt: str, completion: str, context: str | None = None) -> Callable[[Row], Conversation]:
    def read(row: Row) -> Conversation:
        asked = _text(row.columns, prompt, row.place)
        if context is not None and row.columns.get(context) is not None:
            extra = _text(row.columns, context, row.place, empty=True)
            asked = f"{asked}\n\n{extra}" if extra.strip() else asked
        answer = _text(row.columns, completion, row.place)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return Conversation(row.place, messages)

    return read


def _plain(row: Row) -> Text:
    return Text(row.place, _text(row.columns, "text", row.place))


def _text(columns: dict[str, Any], column: str, place: str, empty: bool = False) -> str:
    if column not in columns:
        raise DataError(f"{place}: no {column!r}; it has {first_five(map(repr, columns)) or 'nothing'}.")
    value = columns[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column!r} must be text, got {_short(value)}.")
    if not empty and not value.strip():
        raise DataError(f"{place}: {column!r} is empty ({value[:20]!r}); fill it or take the row out.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {column!r} holds half a character at {error.start} ({_short(value)}).") from error
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:60]}... ({type(value).__name__})" if len(shown) > 60 else f"{shown} ({type(value).__name__})"


_OPENAI_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_OPENAI_ROLES, "human": "user", "gpt": "assistant", "model": "assistant"}

FORMATS = (
    Format(("messages",), _turns("messages", "role", "content", _OPENAI_ROLES)),
    Format(("conversations",), _turns("conversations", "from", "value", _SHAREGPT_ROLES)),
    Format(("instruction", "output"), _pair("instruction", "output", context="input")),
    Format(("instruction", "response"), _pair("instruction", "response", context="input")),
    Format(("prompt", "completion"), _pair("prompt", "completion")),
    Format(("question", "answer"), _pair("question", "answer")),
    Format(("text",), _plain),
)
"""Known formats; a file with the columns of several is read by the first."""
