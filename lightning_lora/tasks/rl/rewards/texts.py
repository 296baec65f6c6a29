"""Completions as texts, whatever shape a reward was given them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or what its messages say.

    >>> text_of([{"role": "assistant", "content": "42"}])
    '42'
    """
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)
