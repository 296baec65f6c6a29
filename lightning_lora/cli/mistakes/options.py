"""Options that do not exist: the known ones that are nearest, by their full names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

from jsonargparse import ArgumentParser

from lightning_lora import data
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.tasks.by_name import TASKS

_OURS = {
    "model.init_args": TASKS,
    "data.init_args": tuple(getattr(data, name) for name in data.__all__),
    "model.init_args.lora": (LoRAConfig,),
}


def nearest(name: str, options: Iterable[str]) -> str:
    """The end of a sentence: the options most like ``name``, of which leading parts may be missing; or a full stop.

    >>> nearest("lora.rnk", ["model.init_args.lora.rank", "model.init_args.lora.alpha"])
    "; did you mean 'model.init_args.lora.rank'?"
    """
    scored = sorted(
        ((_likeness(name, option), option) for option in options), key=lambda item: (-item[0], len(item[1]))
    )
    close = [option for score, option in scored if score >= max(0.6, scored[0][0] - 0.1)]
    return f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else "."


def full_names(known: Iterable[str]) -> set[str]:
    """The options of a parser and, where it takes any model or data module, those of ours.

    Args:
        known: The names that the parser itself knows.
    """
    known = set(known)
    names = set(known)
    for prefix, kinds in _OURS.items():
        first, _, inside = prefix.partition(".init_args")
        if first in known:
            # A command line for one class of model has options such as model.learning_rate.
            is_fixed = any(name.startswith(f"{first}.") and not name.endswith(".help") for name in known)
            place = f"{first}{inside}" if is_fixed else prefix
            names |= {f"{place}.{name}" for kind in kinds for name in arguments_of(kind)}
    return names


def arguments_at(path: str) -> list[str]:
    """Names of the arguments of the class at a path, such as ``package.module.Class``."""
    module, _, name = path.rpartition(".")
    return arguments_of(getattr(importlib.import_module(module), name))


def arguments_of(kind: type) -> list[str]:
    """Names of the arguments of a class; those of its base classes too."""
    # Not inspect.signature: a task passes options on to its base class as **settings.
    return ArgumentParser().add_class_arguments(kind)


def _likeness(name: str, option: str) -> float:
    """How much ``name`` is like the end of ``option`` that has as many parts, from 0 to 1."""
    end = ".".join(option.split(".")[-(name.count(".") + 1) :])
    return difflib.SequenceMatcher(None, name, end).ratio()
