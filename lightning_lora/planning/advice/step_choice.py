"""What a training step is planned to keep in memory to be faster, as `MemoryChoice` chooses it in a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.callbacks.memory.memory_choice import READ_ROWS
from lightning_lora.memory.run_step import gigabytes
from lightning_lora.planning.advice.method import Method
from lightning_lora.planning.advice.named_callbacks import is_named
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.devices import Devices
from lightning_lora.planning.reason import Reason


def planned_step_memory(
    traces: TracedMethods, method: Method, batch: PlannedBatch, devices: Devices, trainer: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, Reason | None]:
    """The choices of `StepMemory` for a method at its batch, and why; None where a run has nothing to choose.

    Afterwards ``traces`` holds the trace with these choices. On a CPU a run trains as without any.
    """
    if devices.device.kind == "cpu" or not method.fits or method.name in traces.failed:
        return None, None
    reads_rows = any(is_named(each, kind) for each in trainer["callbacks"] for kind in READ_ROWS)
    how = method.name, batch.batch_size, method.rank, method.strategy
    choice = traces.choose_step_memory(*how, devices.memory, can_recompute=not reads_rows)
    if choice is None:
        return None, None
    why = f"the fastest that fits: {gigabytes(choice.traced.total)} of {gigabytes(choice.room)}"
    memory = choice.memory.to_dict()
    return {name: memory[name] for name in choice.memory.made()}, Reason("step_memory", why, "traced")
