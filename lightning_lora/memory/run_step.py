"""A training step of a run that has begun, traced for its memory beside the memory of the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lightning_lora.checkpoints.random_state import kept_random_state
from lightning_lora.errors import kind_and_line
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.micro_batch import largest_micro_batch
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.room import Room, bytes_between_steps, room_for_step, tensors_of_step
from lightning_lora.memory.step_trace import StepTracer

TRACE_ERROR = 0.15
"""How much too high activations and logits may be in the trace of a step on a GPU (docs/understand/plan.md)."""
SECONDS = 30.0
"""Seconds of a run after which no further trace is begun."""


class RunStep:
    """Traces the steps of a run, whose module is built, adapted and on its device; nothing of the run is changed.

    Args:
        make: Gives the module to trace: the one that is trained, or one like it with other settings.
        batch: A function from a number of rows to a micro-batch.
        precision: The precision of the Trainer; None for its own.
        prepare: Called with the module as it is traced, which has no values, before the first trace.
        until: Time of ``time.monotonic()`` after which no trace is begun; None gives `SECONDS` from now.
    """

    def __init__(
        self,
        trainer: Trainer,
        make: Callable[[], LightningModule],
        batch: Callable[[int], Any],
        precision: str | None = None,
        prepare: Callable[[LightningModule], None] | None = None,
        until: float | None = None,
    ) -> None:
        self.trainer, self.make, self.batch = trainer, make, batch
        self.precision, self.prepare = precision or trainer.precision, prepare
        self.until = time.monotonic() + SECONDS if until is None else until
        self._tracer: StepTracer | None = None
        self._known: dict[tuple[int, int], MemoryParts] = {}

    def memory(self, rows: int, accumulation: int) -> MemoryParts:
        """Bytes of an optimizer step of ``accumulation`` micro-batches of ``rows`` rows, traced once.

        Raises:
            TraceError: If the step cannot be traced, or time is over.
        """
        key = rows, min(2, accumulation)
        if key not in self._known:
            self._known[key] = self._trace(rows, accumulation)
        return self._known[key]

    def change(self, prepare: Callable[[LightningModule], None]) -> None:
        """Let ``prepare`` change the module as it is traced from now on, which is not built again for that."""
        self._known.clear()
        if self._tracer is not None:
            prepare(self._tracer.module)
        self.prepare = prepare

    def largest_micro_batch(self, limit: int, share: int, sizes: Iterable[int], error: float = 0.0) -> int:
        """The most rows of ``sizes`` whose step fits into ``limit`` bytes; 0 if none does.

        Args:
            share: Rows of an optimizer step on this device, which all sizes divide.
            sizes: Rows of a micro-batch among which to choose.
            error: How much too high activations and logits may have been traced: a step that may fit, fits.

        Raises:
            TraceError: If a step cannot be traced, or time is over.
        """

        def least(rows: int) -> MemoryParts:
            traced = self.memory(rows, share // rows)
            shrunk = {name: int(getattr(traced, name) / (1 + error)) for name in ("activations", "logits")}
            return replace(traced, **shrunk)

        return largest_micro_batch(least, max(1, limit), sizes)

    def _trace(self, rows: int, accumulation: int) -> MemoryParts:
        if time.monotonic() > self.until:
            raise TraceError(f"no trace of {rows} rows was begun: those before took more than {SECONDS:.0f} seconds.")
        try:
            with kept_random_state(self.trainer.strategy.root_device):
                batch = move_data_to_device(self.batch(rows), torch.device("cpu"))
                tracer = self._made(accumulation)
                tracer.module.trainer.accumulate_grad_batches = accumulation
                return tracer.trace(batch).memory
        except TraceError:
            raise
        except Exception as error:
            name = type(self.trainer.lightning_module).__name__
            raise TraceError(f"a step of {name} cannot be traced: {kind_and_line(error)}") from error

    def _made(self, accumulation: int) -> StepTracer:
        if self._tracer is None:
            self._tracer = StepTracer(self.make(), self.precision, self.trainer.gradient_clip_val, accumulation)
            if self.prepare is not None:
                self.prepare(self._tracer.module)
        return self._tracer


def room_of_run(trainer: Trainer, module: LightningModule) -> Room | None:
    """Memory of this process's device for a step; None where nobody tells, or a strategy divides the step."""
    strategy = trainer.strategy
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, DeepSpeedStrategy):
        return None
    return room_for_step(strategy.root_device, tensors_of_step(module, trainer.optimizers))


def fills_device(module: LightningModule, room: Room) -> bool:
    """Whether weights, gradients and optimizer take more than half of the room: then a trace is worth its time."""
    return 2 * bytes_between_steps(module) > room.bytes


def gigabytes(num_bytes: int) -> str:
    """Bytes as a user reads them, with three digits or more.

    >>> gigabytes(1_234_567), gigabytes(7_940_000_000), gigabytes(1_125_900_000_000)
    ('1.23 MB', '7.94 GB', '1,126 GB')
    """
    number, unit = (num_bytes / 1e9, "GB") if num_bytes >= 1e8 else (num_bytes / 1e6, "MB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
