"""Lists of messages: OpenAI's, ShareGPT's, and those of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.data.formats.content import read_content, read_results
from lightning_lora.data.formats.names import CONTENT_KEYS, ROLE_KEYS, THINKING, TRAINED
from lightning_lora.data.formats.roles import CALL, find_role
from lightning_lora.data.formats.row import NamedRow
from lightning_lora.data.formats.tools import read_calls
from lightning_lora.data.formats.values import cleaned, parsed, read_text, short
from lightning_lora.errors import first_five


@dataclass
class Turn:
    """One message as a chat template reads it, and whether the row wants it trained on.

    Args:
        message: The message: ``role``, ``content`` and whatever other keys it has.
        trained: False if the row excludes it.
        joins: Whether the turn is nothing but calls, so that it belongs to the assistant's turn before it.
    """

    message: dict[str, Any]
    trained: bool = True
    joins: bool = False


def read_turns(row: NamedRow, column: str, keys: tuple[str, str] = ("role", "content")) -> list[Turn]:
    """The messages in a column. Role and content are found under their names in OpenAI's and in ShareGPT's format.

    Args:
        row: The row.
        column: The column: a list of messages, its JSON text, or an object of equally long lists.
        keys: Names of role and content in this column, for messages about their absence.

    Raises:
        RowError: If it is not a list of messages, or a message cannot be read.
    """
    value = parsed(row.take(column))
    if isinstance(value, dict) and all(isinstance(inner, list) for inner in value.values()):
        # Older versions of `datasets` turned lists of objects into objects of lists.
        value = [dict(zip(value, inner, strict=True)) for inner in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        kind = f"{column!r} must be a list of turns with at least one"
        raise RowError(row.place, kind, f", got {short(row.columns.get(column))}.{_hint(value)}")
    turns: list[Turn] = []
    for number, item in enumerate(value):
        for turn in _read_turn(row, f"{row.place}, {column}[{number}]", keys, parsed(item)):
            if turn.joins and turns and _takes_calls(turns[-1], turn):
                calls = [*turns[-1].message.get("tool_calls", []), *turn.message.pop("tool_calls")]
                turns[-1].message = {**turn.message, **turns[-1].message, "tool_calls": calls}
            else:
                turns.append(turn)
    return turns


def _takes_calls(before: Turn, turn: Turn) -> bool:
    # ShareGPT has no turn with text and calls, nor with several calls: they are one turn of the assistant, cut up.
    shared = before.message.keys() & turn.message.keys()
    return (
        before.message["role"] == "assistant"
        and before.trained == turn.trained
        and shared <= {"role", "content", "tool_calls"}
    )


def _read_turn(row: NamedRow, place: str, keys: tuple[str, str], turn: Any) -> list[Turn]:
    if not isinstance(turn, dict):
        raise RowError(place, f"a turn has {keys[0]!r} and {keys[1]!r}", f", got {short(turn)}.")
    turn = row.message_keys(turn, place)
    role_key, content_key = _present(turn, ROLE_KEYS, keys[0]), _present(turn, CONTENT_KEYS, keys[1])
    role = find_role(read_text(turn, role_key, place), place)
    trained = _trained(row, turn, role, place)
    rest = _rest(row, turn, (role_key, content_key), place)
    if role == CALL:
        rest["tool_calls"] = _only_calls(turn, content_key, place)
        return [Turn({"role": "assistant", "content": "", **rest}, trained, joins=True)]
    if role == "tool":
        results = read_results(turn, content_key, place)
        return [Turn({"role": role, "content": result, **rest}) for result in results]
    writes = bool(rest) and role == "assistant" and any(rest.get(key) for key in ("tool_calls", *THINKING))
    if writes and turn.get(content_key) is None:
        content = ""  # not None, which templates without a check for it would print
    else:
        # An empty system prompt is common, and deliberate.
        content = read_content(turn, content_key, place, empty=writes or role == "system")
    return [Turn({"role": role, "content": content, **rest}, trained)]


def _present(turn: dict[str, Any], keys: tuple[str, ...], usual: str) -> str:
    """The first of the keys that has a value, beginning with the usual one."""
    if turn.get(usual) is not None:
        return usual
    return next((key for key in keys if turn.get(key) is not None), usual)


def _trained(row: NamedRow, turn: dict[str, Any], role: str, place: str) -> bool:
    """Whether the keys of a message leave it in the loss."""
    flags: dict[str, bool] = {}
    for key in turn.keys() & TRAINED:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(place, f"{key!r} of a message must be 0, 1, true or false", f", got {short(value)}.")
        flags[key] = bool(value)
    if not flags:
        return True
    if len(set(flags.values())) > 1:
        raise RowError(place, "its keys contradict each other about training", f": {flags}.")
    if role not in ("assistant", CALL):  # nothing of others is trained on, whatever their key says
        row.unused.update(f"{key} of {role} turns" for key, value in flags.items() if value)
    return all(flags.values())


def _rest(row: NamedRow, turn: dict[str, Any], read: tuple[str, str], place: str) -> dict[str, Any]:
    """All other keys, calls in the shape that templates read."""
    rest = {}
    for key, value in turn.items():
        if key in read or key in TRAINED or value is None:
            continue
        if key in ("role", "content"):  # beside those of the other format, which were read
            row.unused.add(key)
        elif key in ("tool_calls", "function_call"):
            # Templates ask whether there is such a key, so an empty list must not stay.
            if value not in ([], {}, ""):
                rest["tool_calls"] = rest.get("tool_calls", []) + read_calls(value, key, place)
        else:
            rest[key] = cleaned(value, key, place)
    return rest


def _only_calls(turn: dict[str, Any], key: str, place: str) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls") or turn.get("function_call") or turn.get(key)
    if calls is None:
        raise RowError(place, f"no {key!r}", f"; it has {first_five(map(repr, turn))}.")
    return read_calls(calls, key, place)


def _hint(value: Any) -> str:
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "{'"):
        return " Text must be JSON, with double quotes: write it with json.dumps, not with str."
    return ""
