"""PEFT's rules for names in its settings: lists of names, and tables of regular expressions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from lightning_lora.errors import AdapterFolderError

# Letters, dots that match any character, and escaped characters that match themselves.
_SIMPLE = re.compile(r"(\^?)((?:[\w-]|\.|\\\W)+?)(\(\\\.weight\)\?)?", re.ASCII)
_PIECE = re.compile(r"\\(.)|(\.)|(.)")

# The modules that PEFT trains in full for a kind of task.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


class PatternTable:
    """The table ``rank_pattern`` or ``alpha_pattern``. A key is a regular expression for the end of a name.

    The first key that matches counts. Most keys are names of single layers. These are looked up, as trying one after
    the other would take time quadratic in the number of layers.

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
    """The names that PEFT's settings mean by ``target_modules``; empty if the settings do not tell them.

    Attributes:
        are_told: Whether the settings tell the names. Otherwise PEFT chooses by the model: ``"all-linear"``, or no
            entry at all.

    Raises:
        AdapterFileError: If a setting is not a regular expression.
    """

    def __init__(self, peft: Mapping[str, Any]) -> None:
        targets = peft.get("target_modules")
        parameters = peft.get("target_parameters")
        self.are_told = targets != "all-linear" and bool(targets or parameters)
        self._targets = _entries(targets if self.are_told else None)
        self._excluded = _entries(peft.get("exclude_modules"))
        self._saved = frozenset(peft.get("modules_to_save") or ())
        self._layers = _LayerNumbers(peft) if isinstance(self._targets, frozenset) else None

    def __contains__(self, name: str) -> bool:
        if not _is_meant(name, self._targets) or _is_meant(name, self._excluded) or self._is_saved(name):
            return False
        # As in PEFT, layer numbers count for endings in a list only, not for full names or an expression.
        return self._layers is None or name in self._targets or name in self._layers  # pyright: ignore[reportOperatorIssue]

    def _is_saved(self, name: str) -> bool:
        """Whether the layer is in a module trained in full, whose name ends the layer's name or is some parts of it."""
        parts = name.split(".")
        runs = (".".join(parts[start:stop]) for stop in range(len(parts) + 1) for start in range(stop))
        ends = (name[start:] for start in range(len(name) + 1))
        return any(part in self._saved for part in chain(runs, ends)) if self._saved else False


class _LayerNumbers:
    """The names in the layers that ``layers_to_transform`` numbers; all names if it numbers none."""

    def __init__(self, peft: Mapping[str, Any]) -> None:
        numbers = peft.get("layers_to_transform")
        self._numbers = [numbers] if isinstance(numbers, int) else list(numbers or ())
        patterns = peft.get("layers_pattern") or ()
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        # The first number counts: those after it may be of experts.
        texts = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
        self._patterns = [re.compile(text) for text in texts]

    def __contains__(self, name: str) -> bool:
        if not self._numbers:
            return True
        found = next((match for pattern in self._patterns if (match := pattern.match(name))), None)
        return found is not None and int(found[1]) in self._numbers


def is_saved_in_full(module: str, peft: Mapping[str, Any]) -> bool:
    """Whether PEFT's settings say that a module is trained in full, by itself or with a module around it."""
    saved = peft.get("modules_to_save")
    if not saved:
        # PEFT trains the head of these tasks without being told so, and older versions did not write that down.
        saved = _HEADS.get(str(peft.get("task_type")), ())
    parts = module.split(".")
    around = [".".join(parts[:stop]) for stop in range(1, len(parts) + 1)]
    return any(name.endswith(tuple(map(str, saved))) for name in around)


def _entries(setting: str | list[str] | None) -> re.Pattern[str] | frozenset[str]:
    """A setting as a regular expression or as a list of names."""
    try:
        return re.compile(setting) if isinstance(setting, str) and setting else frozenset(setting or ())
    except re.error as error:
        raise AdapterFolderError(f"{setting!r} is not a regular expression for names: {error}.") from error


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


def is_base_copy(parameter: str, kind: str, peft: Mapping[str, Any]) -> bool:
    """Whether PEFT stored a parameter of the base, and not one of a module trained in full."""
    in_full = is_saved_in_full(parameter.rpartition(".")[0], peft)
    return kind in ("base_layer", "original_module") or (kind == "" and not in_full)
