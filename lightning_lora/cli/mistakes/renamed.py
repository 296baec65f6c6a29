"""Options that have another name since: the old one is accepted for two releases, with a message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_lora.files.yaml_text import read_yaml

RENAMED: dict[str, str] = {}
"""The full name of an option, such as ``model.init_args.lora.rank``, to that of today; each for two releases."""


def in_words(words: Sequence[str]) -> list[str]:
    """A command line with the names of today.

    >>> in_words(["fit", "--trainer.max_steps=3"])
    ['fit', '--trainer.max_steps=3']
    """
    changed = list(words)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        for old, new in RENAMED.items():
            if name == f"--{old}" or name.startswith(f"--{old}."):
                changed[place] = f"--{new}{name[len(old) + 2 :]}{equals}{value}"
                _tell(old, new)
    return changed


def in_config(text: str) -> str:
    """The text of a config with the names of today."""
    for old, new in RENAMED.items():
        if old.rpartition(".")[2] in text and isinstance(settings := read_yaml(text), dict):
            value = _taken(settings, old.split("."))
            if value is not None:
                _put(settings, new.split("."), value)
                text = yaml.safe_dump(settings, sort_keys=False)
                _tell(old, new)
    return text


def _taken(settings: Any, path: Sequence[str]) -> Any:
    """The value at a path, which is taken out; None if there is none."""
    *groups, name = path
    for group in groups:
        settings = settings.get(group) if isinstance(settings, Mapping) else None
    return settings.pop(name, None) if isinstance(settings, dict) else None


def _put(settings: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *groups, name = path
    for group in groups:
        settings = settings.setdefault(group, {})
    settings.setdefault(name, value)


def _tell(old: str, new: str) -> None:
    rank_zero_warn(f"{old} is now {new}. The old name works in this release and the next one: change it.")
