"""Characters that a terminal obeys, as escapes: what rows and models hold must not act on it."""

from __future__ import annotations

import unicodedata

_JOINERS = "\u200c\u200d"
"""Invisible characters that belong to words and to emoji."""


def acts_on_terminal(character: str) -> bool:
    r"""Whether a character is a control character, turns the direction of writing, or breaks a line.

    >>> [acts_on_terminal(character) for character in "a\x1b\u202e"]
    [False, True, True]
    """
    # Cc: control characters; Cf: among others those that turn the direction; Cs: halves of characters.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def escaped(character: str) -> str:
    r"""Write a character as Python does in a text.

    >>> escaped("\x1b")
    '\\x1b'
    """
    return character.encode("unicode_escape").decode()
