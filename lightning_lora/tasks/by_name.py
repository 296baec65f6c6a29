"""All tasks, and the one that a checkpoint or a config means by a dotted name."""

from __future__ import annotations

from lightning_lora import tasks
from lightning_lora.tasks.pretrained import PretrainedTask

TASKS: tuple[type[PretrainedTask], ...] = tuple(getattr(tasks, name) for name in sorted(tasks.__all__))


def task_named(name: str | None) -> type[PretrainedTask] | None:
    """The task of this name, such as ``lightning_lora.tasks.DPO`` or ``lightning_lora.tasks.rl.dpo.DPO``, or None."""
    names = {f"{place}.{task.__name__}": task for task in TASKS for place in (task.__module__, tasks.__name__)}
    return names.get(name or "")
