"""Settings that are printed without being made: those that a class would refuse."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

from lightning_lora.callbacks.lora import LoRA
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.step_memory import StepMemory

_GROUPS: dict[type, dict[str, type[LoRAConfig] | type[StepMemory]]] = {
    LoRAMixin: {"lora": LoRAConfig, "step_memory": StepMemory},
    LoRA: {"config": LoRAConfig, "step_memory": StepMemory},
}


def check_printed(settings: Any) -> None:
    """Refuse groups of settings that the class which they are for would refuse; the parser takes any mapping.

    Args:
        settings: Parsed settings, or a part of them.

    Raises:
        ConfigError: If a name in a group of LoRA settings or of ``step_memory`` is unknown, or a value is refused.
    """
    for path, options in _classes(settings):
        module, _, name = path.rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        known = [groups for base, groups in _GROUPS.items() if isinstance(kind, type) and issubclass(kind, base)]
        for option, group in known[0].items() if known else ():
            if isinstance(value := _plain(options.get(option)), Mapping):
                group.from_dict(_plain(value.get("init_args", value)))


def _classes(settings: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The path of every class in ``settings``, with its options."""
    settings = _plain(settings)
    if isinstance(settings, list):
        for each in settings:
            yield from _classes(each)
    elif isinstance(settings, Mapping):
        path, options = settings.get("class_path"), _plain(settings.get("init_args"))
        if isinstance(path, str) and isinstance(options, Mapping):
            yield path, options
        for each in settings.values():
            yield from _classes(each)


def _plain(settings: Any) -> Any:
    return vars(settings) if isinstance(settings, Namespace) else settings
