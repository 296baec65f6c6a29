"""Checks of single values: text, JSON in text, numbers, and the gaps that Arrow leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lightning_lora.data.bad_rows import RowError
from lightning_lora.errors import first_five


def read_text(values: Mapping[str, Any], name: str, place: str, empty: bool = False) -> str:
    """The text of a column or key.

    Args:
        values: The columns of a row, or the keys of a message.
        name: The column or key.
        place: The row and the part of it, for messages.
        empty: Whether the text may be empty.

    Raises:
        RowError: If it is absent, not text, empty, or holds half a character.
    """
    if name not in values:
        raise RowError(place, f"no {name!r}", f"; it has {first_five(map(repr, values)) or 'nothing'}.")
    value = values[name]
    if not isinstance(value, str):
        raise RowError(place, f"{name!r} must be text", f", got {short(value)}.")
    if not empty and not value.strip():
        raise RowError(place, f"{name!r} is empty", f" ({value[:20]!r}); fill it or remove the row.")
    check_text(value, name, place)
    return value


def check_text(value: str, name: str, place: str) -> None:
    """Check that a text can be encoded.

    Raises:
        RowError: If it holds half a character.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        where = f" at {error.start} ({short(value)})."
        raise RowError(place, f"{name!r} has half a character (a lone surrogate)", where) from error


def parsed(value: Any) -> Any:
    """The list or object in a JSON text; anything else as it is.

    Lists and objects come as text from CSV files, and from datasets whose columns must have one type.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def structure(value: Any, name: str, place: str) -> Any:
    """A list or object, given as such or as JSON text, without the gaps of Arrow.

    In Arrow all objects of a list have the same keys; the keys of other objects are None, and templates would print
    them. Nulls in a JSON text are kept: somebody wrote them.

    Raises:
        RowError: If a text in it holds half a character.
    """
    return cleaned(parsed(value), name, place, nulls=isinstance(value, str))


def cleaned(value: Any, name: str, place: str, nulls: bool = False) -> Any:
    """A value without the keys that are None, at every depth, unless ``nulls`` keeps them.

    Raises:
        RowError: If a text in it holds half a character.
    """
    if isinstance(value, str):
        check_text(value, name, place)
    elif isinstance(value, dict):
        kept = ((key, inner) for key, inner in value.items() if nulls or inner is not None)
        return {key: cleaned(inner, name, place, nulls) for key, inner in kept}
    elif isinstance(value, (list, tuple)):
        return [cleaned(inner, name, place, nulls) for inner in value]
    return value


def factor(value: Any, name: str, place: str) -> float:
    """A finite number of at least 0, which may be written as text.

    Raises:
        RowError: If it is anything else.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise RowError(place, f"{name!r} must be a finite number of at least 0", f", got {short(value)}.")
    return number


def short(value: Any) -> str:
    """A value and its type, for messages; long ones are cut."""
    shown = repr(value)
    return f"{shown[:60]}... ({type(value).__name__})" if len(shown) > 60 else f"{shown} ({type(value).__name__})"
