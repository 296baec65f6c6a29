"""Name patterns: how settings point at modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

Value = TypeVar("Value")


# Segments that torch.compile, activation checkpointing and FSDP put into the names of what they wrap.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """A dotted name as it is without wrappers around modules.

    >>> plain_name("layers.0._orig_mod.mlp.up_proj")
    'layers.0.mlp.up_proj'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the dotted name itself, a dotted suffix of it, or a glob for it.

    >>> matches("layers.0.mlp.up_proj", "up_proj"), matches("layers.0.mlp.up_proj", "*.mlp.*")
    (True, True)
    >>> matches("layers.0.mlp.gate_up_proj", "up_proj")
    False
    """
    name = plain_name(name)
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the patterns matches."""
    return any(matches(name, pattern) for pattern in patterns)


def first_match(name: str, table: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern in ``table`` that matches, else ``default``."""
    return next((value for pattern, value in table.items() if matches(name, pattern)), default)
