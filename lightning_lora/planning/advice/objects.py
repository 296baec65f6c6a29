"""Model and data as a config names them, from objects that keep the arguments they were made with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.data import SFTDataModule
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.advice.config_file import class_settings, taken_arguments

Settings = dict[str, Any]
_LORA = ("lora", "lora_root")


def objects_as_config(module: LightningModule, data: LightningDataModule) -> Settings | None:
    """Classes and arguments of objects; None if one does not keep them, or a config cannot name its class."""
    parts = {
        "model": (type(module), _module_arguments(module)),
        "data": (type(data), data_arguments(data)),
    }
    made = {}
    for name, (kind, arguments) in parts.items():
        if arguments is None or not _can_be_named(kind) or not all(map(_is_plain, arguments.values())):
            return None
        made[name] = class_settings(kind, arguments)
    return made


def _module_arguments(module: LightningModule) -> Settings | None:
    """The arguments of a module; LoRA settings are known without being kept."""
    known = taken_arguments(type(module))
    if not module.hparams and set(known) - set(_LORA):
        return None
    own = {name: value for name, value in module.hparams.items() if name in known}
    if isinstance(module, LoRAMixin):
        own |= {name: getattr(module, name) for name in _LORA if name in known and name in vars(module)}
    return own


def data_arguments(data: LightningDataModule) -> Settings | None:
    """The arguments that a data module was made with; None if it does not keep them."""
    if data.hparams:
        return dict(data.hparams.items())
    if not isinstance(data, SFTDataModule):
        return None if taken_arguments(type(data)) else {}
    own = vars(data) | data.sources | vars(data.settings)
    own |= {
        "max_rows": data.limits["train"],
        "validation_rows": data.limits["validation"],
        "max_length": data.max_length,
    }
    names = inspect.signature(SFTDataModule).parameters
    if own["tokenizer"] is not None and not isinstance(own["tokenizer"], str):
        return None
    if data.shares is not None:
        own["train"] = dict(data.sources["train"])  # type: ignore[arg-type]
    return {name: own[name] for name in names if name in own}


def _can_be_named(kind: type) -> bool:
    """Whether a config can name a class: not one that is made inside a function, or in the script that runs."""
    return kind.__module__ != "__main__" and "<locals>" not in kind.__qualname__


def _is_plain(value: Any) -> bool:
    """Whether a config can hold a value."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    is_settings = is_dataclass(value) and not isinstance(value, type)
    return value is None or is_settings or isinstance(value, (str, int, float, bool, Path))
