"""Who speaks in a message: the names that data sets give, to the roles that chat templates read."""

from __future__ import annotations

from lightning_lora.data.bad_rows import RowError
from lightning_lora.errors import did_you_mean

CALL = "call"
"""A turn that holds nothing but calls of tools: a message of the assistant, for templates."""

_NAMES = {
    # Templates that know `developer` (gpt-oss) read both alike; others leave it out or print the word.
    "system": ("developer",),
    "user": ("human", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    "tool": ("observation", "tool_response", "function_response", "tool_result", "function", "ipython"),
    CALL: ("function_call", "tool_call", "tool_calls"),
}
ROLES = {role: role for role in _NAMES if role != CALL} | {
    name: role for role, names in _NAMES.items() for name in names
}
"""Known names of roles, to ``system``, ``user``, ``assistant``, ``tool`` and `CALL`."""


def find_role(name: str, place: str) -> str:
    """The role that a name stands for; upper and lower case count the same.

    Raises:
        RowError: If the name is unknown. The message suggests the nearest one.
    """
    role = ROLES.get(name) or ROLES.get(name.strip().lower())
    if role is None:
        hint = did_you_mean(name, ROLES)
        raise RowError(place, "unknown role", f" {name!r}{hint} Known roles: {', '.join(ROLES)}.")
    return role
