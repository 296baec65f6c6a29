"""The fastest of several ways to make a training step's choices (`StepMemory`) that a device has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning.pytorch import LightningModule

from lightning_lora.lora.layers.adapted import lora_layers
from lightning_lora.memory.other_settings import could_recompute
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.memory_settings import settings_of
from lightning_lora.step_memory import AUTO, GATES, StepMemory

HEAD_ROWS = (4096, 2048, 512)
"""Rows of a chunk of the head that are tried; the last is how a run trains without a choice."""
MARGIN = 0.1
"""Share of the room that a step leaves free if it holds more than it must: runs on a GPU took up to 5.5 % more than
their trace (docs/evidence/gpu.md), and an allocator loses some of the rest."""


@dataclass(frozen=True)
class Choice:
    """A way to train, and what a traced step takes with it.

    Args:
        memory: The choices.
        place: Its place among the candidates.
        traced: Bytes of the step by what they are for.
        room: Bytes that the device has for a step.
    """

    memory: StepMemory
    place: int
    traced: MemoryParts
    room: int

    @property
    def growth(self) -> float:
        """By what factor a batch may grow until its step could take more than may be filled, at least 1.

        Weights, adapters and the optimizer's state stay; all else grows with the square of a batch's size at most, as
        attention does with the length of its rows.
        """
        fixed = self.traced.weights + self.traced.adapters + self.traced.optimizer
        left = self.room * (1 - MARGIN) - fixed
        return max(1.0, left / max(1, self.traced.total - fixed)) ** 0.5


def candidates(settings: StepMemory, able: Sequence[str], can_recompute: bool = True) -> list[StepMemory]:
    """The ways to make the choices that are open, the fastest first; the last ones hold least."""
    gates = GATES if settings.gate == AUTO and "gate" in able else (settings.gate,)
    rows = HEAD_ROWS if settings.head_rows == AUTO and "head_rows" in able else (settings.head_rows,)
    again = settings.activation_checkpointing
    if again is True:
        gates = gates[-1:]  # what a block holds is computed again anyway
    first = False if again == AUTO and "activation_checkpointing" in able else again
    found = [StepMemory(gate, most, first) for gate in gates for most in rows]
    if first != again and can_recompute:
        found.append(StepMemory(gates[-1], rows[-1], True))
    return found


def frugal(memory: StepMemory) -> StepMemory:
    """The same choices with gates computed again, and chunks of the head as short as any candidate's."""
    gate = GATES[-1] if memory.gate == GATES[0] else memory.gate
    rows = memory.head_rows if memory.chunk_rows is None else min(memory.chunk_rows, HEAD_ROWS[-1])
    return StepMemory(gate, rows, memory.activation_checkpointing)


def open_candidates(module: LightningModule, can_recompute: bool = True) -> Sequence[StepMemory]:
    """The ways to make the choices that a module leaves open, the fastest first; empty if nothing is open."""
    if not isinstance(module, LoRAMixin):
        return ()
    able = [name for name in module.step_memory_choices if name != "gate" or lora_layers(module)]
    could = can_recompute and any(map(could_recompute, module.modules()))
    ways = candidates(settings_of(module), able, could)
    return ways if len(ways) > 1 else ()


def fastest_that_fits(
    ways: Sequence[StepMemory],
    trace: Callable[[StepMemory], MemoryParts],
    room: int,
    first: int = 0,
    is_kept: bool = False,
) -> Choice:
    """The first candidate whose traced step fits into ``room`` bytes; the last one if none does.

    A candidate must leave `MARGIN` of the room free. The last before blocks are computed again need not, for so a run
    without any choice trains: where that fits, nothing slower is taken.

    Args:
        first: The place to begin at.
        is_kept: Whether the run has trained with that candidate on such a device, so that it needs no margin either.

    Raises:
        TraceError: If a step cannot be traced.
    """
    adds_blocks = ways[-1].activation_checkpointing is not ways[0].activation_checkpointing
    usual = len(ways) - (2 if adds_blocks else 1)
    for place in range(first, len(ways)):
        traced = trace(ways[place])
        may_fill = place >= usual or (is_kept and place == first)
        if traced.total <= room * (1 if may_fill else 1 - MARGIN) or place == len(ways) - 1:
            return Choice(ways[place], place, traced, room)
    raise AssertionError("there is always a candidate")
