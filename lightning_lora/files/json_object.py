"""JSON objects that somebody else may have written: every failure is one error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_lora.errors import DamagedFileError

MAX_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 64 MiB from a file.

    Raises:
        AdapterFileError: If the file is missing, larger, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DamagedFileError(f"{path} is larger than {MAX_BYTES} bytes, which no adapter setting needs.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} must hold a JSON object, found {type(content).__name__}.")
    return content


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object from UTF-8 bytes, and refuse duplicate keys.

    Raises:
        ValueError: If it is anything else, with the reason.
    """
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"its JSON is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON cannot be parsed ({error}).") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"its JSON is a {type(parsed).__name__}, not an object.")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"its JSON has the key {key[:80]!r} twice.")
        entries[key] = value
    return entries
