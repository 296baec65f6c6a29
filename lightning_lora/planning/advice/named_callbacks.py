"""Callbacks among the settings of a Trainer, as objects or as a config names them; what `LoRA` makes of a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningModule

from lightning_lora.callbacks import LoRA, TargetBatchSize
from lightning_lora.errors import PlanError
from lightning_lora.planning.advice.config_file import plain


def with_lora_callback(module: LightningModule, callbacks: Any) -> LightningModule:
    """A copy of ``module`` with the settings that a `LoRA` callback gives it; ``module`` itself without one.

    The copy shares everything with ``module`` but its attributes, which stay as they are.

    Args:
        callbacks: ``callbacks`` of a Trainer: objects, or mappings with ``class_path`` as in a config.

    Raises:
        ConfigError: As `fit` does, if the module has other settings, or two callbacks differ.
    """
    found = [lora for each in as_list(callbacks) if (lora := lora_callback(each)) is not None]
    if not found:
        return module
    first, *others = found
    if any((first.config, first.root) != (other.config, other.root) for other in others):
        raise PlanError(
            "trainer.callbacks has two LoRA callbacks with different settings: a module has one set of adapters. Keep "
            "one of the two."
        )
    made = copy.copy(module)
    first.give_settings(made)
    return made


def as_list(callbacks: Any) -> list[Any]:
    """The ``callbacks`` of a Trainer, which may also be one or none."""
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [] if callbacks is None else [callbacks]


def lora_callback(callback: Any) -> LoRA | None:
    """The callback if it is a `LoRA`, made of its arguments where a config names it; None for any other."""
    if isinstance(callback, LoRA):
        return callback
    if not isinstance(callback, Mapping):
        return None
    kind = named_class(callback)
    if not (isinstance(kind, type) and issubclass(kind, LoRA)):
        return None
    try:
        return kind(**(callback.get("init_args") or {}))
    except TypeError as error:
        raise PlanError(f"trainer.callbacks: {callback['class_path']}: {error}.") from error


def is_named(callback: Any, kind: type) -> bool:
    """Whether a callback, or the class that a config names for it, is of this kind."""
    made = named_class(callback) if isinstance(callback, Mapping) else type(callback)
    return isinstance(made, type) and issubclass(made, kind)


def target_rows(callbacks: Any) -> int | None:
    """The rows of a step that a `TargetBatchSize` among the callbacks asks for; None without one."""
    for each in as_list(callbacks):
        if is_named(each, TargetBatchSize):
            return each.rows if isinstance(each, TargetBatchSize) else (each.get("init_args") or {}).get("rows", 32)
    return None


def as_named(callback: Any) -> Any:
    """A `LoRA` callback as a config names it; any other as it is."""
    if type(callback) is not LoRA:
        return callback
    arguments = {name: getattr(callback, name) for name in ("root", "allow_other_base", "autocast_base")}
    arguments |= {"config": plain(callback.config), "step_memory": plain(callback.step_memory)}
    return {"class_path": "lightning_lora.callbacks.LoRA", "init_args": arguments}


def named_class(settings: Mapping[str, Any]) -> Any:
    """The class that ``class_path`` names; None if there is no such class."""
    module, _, name = str(settings.get("class_path", "")).rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None
