"""Characters that are not seen and change what is seen, written out: control characters, and those that turn text."""

from __future__ import annotations

_HIDDEN = (
    *range(0x00, 0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    *(0x061C, 0x200E, 0x200F),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
    *(0xFFFE, 0xFFFF),
)
_WRITTEN = {code: f"[U+{code:04X}]" for code in _HIDDEN} | {0x0D: " "}


def visible(text: str) -> str:
    r"""The text with such characters as ``[U+202E]``; a name cannot turn the words beside it around.

    >>> visible("rank 8 \u202egnp")
    'rank 8 [U+202E]gnp'
    """
    return text.translate(_WRITTEN)
