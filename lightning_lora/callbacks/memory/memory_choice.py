"""Chooses what a training step keeps in memory to be faster, by what the device has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_lora.batch.counting import count_rows
from lightning_lora.memory.candidates import Choice, fastest_that_fits, open_candidates
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.room import Room
from lightning_lora.memory.run_step import RunStep, gigabytes, room_of_run
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.memory_settings import settings_of
from lightning_lora.sharding.collectives import largest_of_ranks
from lightning_lora.step_memory import StepMemory
from lightning_lora.trainer_access import found

from ..batch_size_monitor import BatchSizeMonitor
from ..capacity_monitor import CapacityMonitor
from ..rank_growth import RankGrowth

READ_ROWS = (BatchSizeMonitor, CapacityMonitor, RankGrowth)
"""Callbacks that read gradients by rows, which they cannot where blocks are computed again."""


class MemoryChoice(Callback):
    """Makes the choices of ``step_memory`` that are left open: the fastest that fit, by traces of the first step.

    Before the first training step a step with the batch at hand is traced (`lightning_lora.memory`), first with all
    that is fast: gates kept, chunks of 4,096 rows of the head. While it does not leave a tenth of the device's memory
    for a step free, a slower candidate is traced (`lightning_lora.memory.candidates`), down to how a run without this
    callback trains, which need only fit, and, if not even that does, to activation checkpointing. One line says
    what was chosen, what a step takes with it, and what the device has. Nothing else changes: random numbers, weights
    and the run's own settings stay, gradients are equal but for the rounding of other chunks, and a resumed run keeps
    what was chosen.

    Ranks of DDP all take the choice of the one that has the least room. A batch so large that its step might not fit is
    traced before it is trained on, and the choice lowered for the rest of the run, on the rank that meets it; it is
    never raised. If a trace fails, the run trains as without this callback, and a line says why.

    Nothing is chosen on a CPU, where a device does not tell its memory, and where a strategy divides the step (FSDP):
    there `lightning-lora plan --write-config` writes the choices. Blocks are never computed again beside callbacks that
    read gradients by rows (`BatchSizeMonitor`, `CapacityMonitor`, `RankGrowth`), which could not read them.

    Attributes:
        choice: What was chosen, a `lightning_lora.memory.candidates.Choice`; None before, and where nothing is.
    """

    def __init__(self) -> None:
        self.choice: Choice | None = None
        self._candidates: Sequence[StepMemory] = ()
        self._resumed: StepMemory | None = None
        self._most = 0.0  # numbers in the largest batch that surely fits; infinite if nothing is to be chosen

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run before, and its choice."""
        if stage != "fit":
            return
        self.choice, self._candidates, self._resumed, self._most = None, (), None, 0.0
        if isinstance(pl_module, LoRAMixin):
            pl_module.use_step_memory(settings_of(pl_module))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose before the first step; look again at a batch that is much larger than those before."""
        if self._most == math.inf or (size := _numbers(batch)) <= self._most:
            return
        is_first = not self._candidates
        if is_first:
            self._candidates = open_candidates(pl_module, can_recompute=found(trainer, *READ_ROWS) is None)
        room = _room(trainer, pl_module) if self._candidates else None
        self._most = math.inf
        if room is not None and isinstance(pl_module, LoRAMixin):
            self._choose(trainer, pl_module, batch, room, is_first)
            if self.choice is not None and self.choice.place < len(self._candidates) - 1:
                self._most = size * self.choice.growth

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {} if self.choice is None else self.choice.memory.to_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what the run of the checkpoint has chosen, if it fits here too."""
        self._resumed = StepMemory.from_dict(state_dict)

    def _choose(self, trainer: Trainer, module: LoRAMixin, batch: Any, room: Room, is_first: bool) -> None:
        ways, before, trace = self._candidates, self.choice, _traces(trainer, module, batch)
        if is_first:
            chosen, why = _agreed(trainer, ways, trace, room.bytes, self._resumed)
        else:
            # Each rank looks at its own batches: not all of them meet a large one at once.
            chosen, why = _tried(ways, trace, room.bytes, 0 if before is None else before.place)
        self.choice = chosen
        if chosen is None:
            module.use_step_memory(settings_of(module))
            rank_zero_info(f"step memory: nothing is chosen, for {why}")
        elif before is None or before.place != chosen.place:
            module.use_step_memory(chosen.memory)
            rank_zero_info(_line(chosen, count_rows(batch), is_first))


_Ways = Sequence[StepMemory]
_Trace = Callable[[StepMemory], MemoryParts]


def _agreed(
    trainer: Trainer, ways: _Ways, trace: _Trace, room: int, resumed: StepMemory | None
) -> tuple[Choice | None, str]:
    """The fastest way that fits on every rank, or None and why; all ranks must call it."""
    is_kept = resumed in ways
    first = ways.index(resumed) if resumed is not None and is_kept else 0
    while True:
        chosen, why = _tried(ways, trace, room, first, is_kept)
        place = len(ways) if chosen is None else chosen.place
        most, least = largest_of_ranks(trainer, torch.tensor([place, -place])).tolist()
        if most == len(ways):
            return None, why or "a step of another rank cannot be traced"
        if most == -least:
            return chosen, why
        first, is_kept = most, False


def _tried(ways: _Ways, trace: _Trace, room: int, first: int, is_kept: bool = False) -> tuple[Choice | None, str]:
    try:
        return fastest_that_fits(ways, trace, room, first, is_kept), ""
    except TraceError as error:
        return None, str(error)


def _traces(trainer: Trainer, module: LightningModule, batch: Any) -> _Trace:
    """A function from choices to the memory of a step with ``batch``."""
    step = RunStep(trainer, lambda: module, lambda _: batch)

    def trace(memory: StepMemory) -> MemoryParts:
        step.change(lambda made: cast(LoRAMixin, made).use_step_memory(memory))
        return step.memory(count_rows(batch), trainer.accumulate_grad_batches)

    return trace


def _room(trainer: Trainer, module: LightningModule) -> Room | None:
    """Memory of the device for a step; None where it is a CPU, whose memory has other uses."""
    return room_of_run(trainer, module) if trainer.strategy.root_device.type == "cuda" else None


def _numbers(batch: Any) -> int:
    """Numbers in the tensors of a batch, told without waiting for the device."""
    return sum(each.numel() for each in tree_leaves(batch) if isinstance(each, Tensor))


def _line(choice: Choice, rows: int, is_first: bool) -> str:
    why = "the fastest that fits" if is_first else "lowered for a larger batch"
    return (
        f"step memory: {choice.memory}, {why}: a traced step of {rows} row{'' if rows == 1 else 's'} takes "
        f"{gigabytes(choice.traced.total)}, and the device has {gigabytes(choice.room)} for it"
    )
