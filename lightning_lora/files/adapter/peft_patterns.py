"""PEFT's rules for names in its settings: lists of names, and tables of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from lightning_lora.errors import AdapterFileError

# Letters, dots that match any character, and escaped characters that match themselves.
_SIMPLE = re.compile(r"(\^?)((?:[\w-]|\.|\\\W)+?)(\(\\\.weight\)\?)?", re.ASCII)
_PIECE = re.compile(r"\\(.)|(\.)|(.)")

# The modules that PEFT trains in full for a kind of task.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class PatternTable:
    """The table ``rank_pattern`` or ``alpha_pattern``. A key is a regular expression for the end of a name.

    The first key that matches counts. Most keys are names of single layers. These are looked up, as trying one after
    the other would take time quadratic in the number of layers.

    Args:
        patterns: Key to value.

    Raises:
        re.error: If a key is not a regular expression.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        self._values = list(patterns.values())
        self._others: list[tuple[int, re.Pattern[str]]] = []
        # (is anchored, length, positions of dots) -> text of the key -> number of the first such key.
        self._simple: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
        for number, key in enumerate(patterns):
            parsed = _SIMPLE.fullmatch(key)
            if parsed is None:
                self._others.append((number, re.compile(rf"(.*\.)?({key})$")))
                continue
            text, free = _literal(parsed[2])
            for ending in ("", ".weight") if parsed[3] else ("",):
                kind = (bool(parsed[1]), len(text + ending), free)
                self._simple.setdefault(kind, {}).setdefault(text + ending, number)

    def value(self, name: str, default: Any) -> Any:
        """The value of the first key that matches ``name``, or ``default``."""
        numbers = [
            table[masked]
            for (anchored, length, free), table in self._simple.items()
            if (start := len(name) - length) == 0 or (start > 0 and not anchored and name[start - 1] == ".")
            if (masked := _masked(name[start:], free)) in table
        ]
        first = min(numbers, default=len(self._values))
        other = next((number for number, key in self._others if number < first and key.match(name)), first)
        return self._values[other] if other < len(self._values) else default


class TargetedNames:
    """The names that PEFT's settings mean by ``target_modules``; empty if the settings depend on more than names.

    Args:
        peft: Contents of ``adapter_config.json``.

    Raises:
        AdapterFileError: If a setting is not a regular expression.
    """

    def __init__(self, peft: Mapping[str, Any]) -> None:
        vague = peft.get("layers_to_transform") is not None
        self._targets = _entries(None if vague else peft.get("target_modules"))
        self._excluded = _entries(peft.get("exclude_modules"))
        self._saved = frozenset(peft.get("modules_to_save") or ())

    def __contains__(self, name: str) -> bool:
        return _is_meant(name, self._targets) and not _is_meant(name, self._excluded) and not self._is_saved(name)

    def _is_saved(self, name: str) -> bool:
        """Whether the layer is in a module trained in full, whose name ends the layer's name or is some parts of it."""
        parts = name.split(".")
        runs = (".".join(parts[start:stop]) for stop in range(len(parts) + 1) for start in range(stop))
        ends = (name[start:] for start in range(len(name) + 1))
        return any(part in self._saved for part in chain(runs, ends)) if self._saved else False


def is_saved_in_full(module: str, peft: Mapping[str, Any]) -> bool:
    """Whether PEFT's settings say that a module is trained in full, by itself or with a module around it.

    Args:
        module: Dotted name of the module.
        peft: Contents of ``adapter_config.json``.
    """
    saved = peft.get("modules_to_save")
    if not saved:
        # PEFT trains the head of these tasks without being told so, and older versions did not write that down.
        saved = _HEADS.get(str(peft.get("task_type")), ())
    parts = module.split(".")
    around = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
    return any(name.endswith(str(entry)) for name in around for entry in saved)


def _entries(setting: str | list[str] | None) -> re.Pattern[str] | frozenset[str]:
    """A setting as a regular expression or as a list of names."""
    try:
        return re.compile(setting) if isinstance(setting, str) and setting else frozenset(setting or ())
    except re.error as error:
        raise AdapterFileError(f"{setting!r} is not a regular expression for names: {error}.") from error


def _is_meant(name: str, entries: re.Pattern[str] | frozenset[str]) -> bool:
    if isinstance(entries, frozenset):
        return is_listed(name, entries)
    return entries.fullmatch(name) is not None


def is_listed(name: str, entries: Collection[str]) -> bool:
    """Whether a list of names means ``name``. An entry means the name it equals, and names it ends after a dot."""
    return any(ending in entries for ending in endings(name))


def endings(name: str) -> Iterator[str]:
    """A dotted name, then the same without its first part, without its first two, and so on.

    >>> list(endings("layers.0.up_proj"))
    ['layers.0.up_proj', '0.up_proj', 'up_proj']
    """
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _literal(key: str) -> tuple[str, tuple[int, ...]]:
    """The text of a simple key, and the positions of the dots in it that match any character."""
    text, free = "", []
    for escaped, point, character in _PIECE.findall(key):
        if point:
            free.append(len(text))
        text += escaped or point or character
    return text, tuple(free)


def _masked(text: str, free: tuple[int, ...]) -> str:
    for position in free:
        if text[position] != ".":
            text = f"{text[:position]}.{text[position + 1 :]}"
    return text
