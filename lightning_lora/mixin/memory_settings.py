"""What a module keeps in memory in a training step: its settings, and the choices of the run."""

from __future__ import annotations

from typing import Any

from lightning_lora.errors import TaskSettingError
from lightning_lora.step_memory import StepMemory

# The class imports this file.
LoRAMixin = Any


def settings_of(module: LoRAMixin) -> StepMemory:
    """``step_memory`` of a module.

    Raises:
        ConfigError: If a value is refused, or a choice is made that its class cannot follow.
    """
    settings, able = StepMemory.from_dict(module.step_memory), module.step_memory_choices
    if others := [name for name in settings.made() if name not in able]:
        raise TaskSettingError(
            f"step_memory: {type(module).__name__} cannot follow {', '.join(others)}, only {', '.join(able)}. A loss "
            f"of your own takes head_loss(..., chunk_rows=...), and a model recomputes its blocks by a method of its "
            f"own, called in configure_model."
        )
    return settings


def choices_of(module: LoRAMixin) -> StepMemory:
    """The choices by which a module trains: those of its run, or else its settings."""
    return module._step_memory_in_use or settings_of(module)
