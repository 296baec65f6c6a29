"""Dotted options in the config of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def has_option(config: Mapping[str, Any], option: str) -> bool:
    """Whether a config has a dotted option, set or by default."""
    *above, name = option.split(".")
    place: Any = config
    for key in above:
        place = place.get(key) if isinstance(place, Mapping) else None
    return isinstance(place, Mapping) and name in place


def option_of(config: Mapping[str, Any], option: str, default: Any = None) -> Any:
    """The value of a dotted option."""
    place: Any = config
    for key in option.split("."):
        if not isinstance(place, Mapping) or key not in place:
            return default
        place = place[key]
    return place


def set_option(config: dict[str, Any], option: str, value: Any) -> None:
    """Set a dotted option whose group exists."""
    *above, name = option.split(".")
    place: Any = config
    for key in above:
        place = place[key]
    place[name] = value
