"""Name patterns, by which settings select modules, and the names that wrappers around modules change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

Value = TypeVar("Value")

# Wrappers put these segments into module names. The state dict leaves the first two out.
_SILENT_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPERS = _SILENT_WRAPPERS | {"_orig_mod"}


def plain_name(name: str) -> str:
    """The dotted name without the segments of torch.compile, activation checkpointing and FSDP.

    >>> plain_name("layers.0._orig_mod.mlp.up_proj")
    'layers.0.mlp.up_proj'
    """
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def state_dict_name(name: str) -> str:
    """The name that a parameter has in the state dict: FSDP and activation checkpointing leave their segments out.

    >>> state_dict_name("net._fsdp_wrapped_module.up._orig_mod.weight")
    'net.up._orig_mod.weight'
    """
    return ".".join(segment for segment in name.split(".") if segment not in _SILENT_WRAPPERS)


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the dotted name itself, a dotted suffix of it, or a glob that fits it.

    >>> matches("layers.0.mlp.up_proj", "up_proj"), matches("layers.0.mlp.up_proj", "*.mlp.*")
    (True, True)
    >>> matches("layers.0.mlp.gate_up_proj", "up_proj")
    False
    """
    name = plain_name(name)
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether at least one of the patterns matches ``name``."""
    return any(matches(name, pattern) for pattern in patterns)


def names_around(name: str) -> Iterator[str]:
    """``name`` itself, and the names of the modules around it, from the inside out.

    >>> list(names_around("head.dense.weight"))
    ['head.dense.weight', 'head.dense', 'head']
    """
    while name:
        yield name
        name = name.rpartition(".")[0]


def first_match(name: str, table: Mapping[str, Value], default: Value) -> Value:
    """The value of the first pattern in ``table`` that matches ``name``, or ``default``."""
    return next((value for pattern, value in table.items() if matches(name, pattern)), default)
