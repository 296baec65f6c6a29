"""LoRA, QLoRA and full fine-tuning of one module, each traced for its memory and operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import LightningModule

from lightning_lora.batch.division import divisors
from lightning_lora.errors import first_line
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.memory.candidates import Choice, fastest_that_fits, open_candidates
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.micro_batch import largest_micro_batch
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.step_trace import StepTrace, StepTracer
from lightning_lora.memory.strategies import divide_memory
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.mixin.memory_settings import settings_of
from lightning_lora.planning.advice.method import Placement
from lightning_lora.step_memory import StepMemory
from lightning_lora.tasks.pretrained import PretrainedTask
from lightning_lora.tasks.variants import variant


class TracedMethods:
    """Traces of the three methods, each made once for a number of rows and a rank.

    Args:
        module: The module as the user gave it; it is not changed.
        config: The LoRA settings; the rank is given with each trace.
        batch: A function from a number of rows to the batch that needs the most memory.
        precision: The Trainer's precision for each method.
        clip: The Trainer's ``gradient_clip_val``.
        devices: Devices that train together.
        context: Bytes of each that nobody allocates, which count as overhead.
    """

    def __init__(
        self,
        module: LightningModule,
        config: LoRAConfig,
        batch: Callable[[int], Any],
        precision: Mapping[str, str],
        clip: float | None,
        devices: int,
        context: int = 0,
    ) -> None:
        self.module, self.config = module, config
        # Finding the longest rows may read a thousand of them.
        self.batch = functools.cache(batch)
        self.precision, self.clip, self.devices, self.context = precision, clip, devices, context
        self.failed: dict[str, str] = {}
        self._tracers: dict[tuple[str, int | None], StepTracer] = {}
        self._traces: dict[tuple[str, int, int | None], StepTrace] = {}

    @property
    def names(self) -> list[str]:
        """The methods that this module can be trained by: only our tasks load a base in 4 bits."""
        return ["lora", "qlora", "full"] if isinstance(self.module, PretrainedTask) else ["lora", "full"]

    def trace(self, name: str, rows: int, rank: int | None) -> StepTrace:
        """The trace of a method with ``rows`` rows in a micro-batch."""
        key = name, rows, None if name == "full" else rank
        if key not in self._traces:
            self._traces[key] = self.tracer(name, rank).trace(self.batch(rows))
        return self._traces[key]

    def tracer(self, name: str, rank: int | None) -> StepTracer:
        """The module of a method, built once for all numbers of rows."""
        key = name, None if name == "full" else rank
        if key not in self._tracers:
            self._tracers[key] = StepTracer(self.variant(name, rank), self.precision[name], self.clip)
        return self._tracers[key]

    def memory(self, name: str, rows: int, rank: int | None, strategy: str) -> MemoryParts:
        """Bytes on one device."""
        return self._divided(self.trace(name, rows, rank), strategy, self.devices)

    def known_memory(self, name: str, rows: int, rank: int | None, strategy: str) -> MemoryParts | None:
        """Bytes on one device; None if the method cannot be traced, which `failed` then explains."""
        if name in self.failed:
            return None
        try:
            return self.memory(name, rows, rank, strategy)
        except (TraceError, RuntimeError, ImportError) as error:
            if name != "qlora" and not isinstance(error, TraceError):
                raise
            self.failed[name] = first_line(error)
            return None

    def choose_step_memory(
        self, name: str, rows: int, rank: int | None, strategy: str, budget: int, can_recompute: bool
    ) -> Choice | None:
        """Choose what a step of a method keeps, and trace it so from now on; None if nothing is open, or not traced."""
        tracer, key = self.tracer(name, rank), (name, rows, None if name == "full" else rank)
        usual, module = self.trace(name, rows, rank), tracer.module

        def trace(memory: StepMemory) -> MemoryParts:
            cast(LoRAMixin, module).use_step_memory(memory)
            self._traces[key] = tracer.trace(self.batch(rows))
            return self.memory(name, rows, rank, strategy)

        candidates = open_candidates(module, can_recompute)
        try:
            return fastest_that_fits(candidates, trace, budget) if candidates else None
        except TraceError:
            cast(LoRAMixin, module).use_step_memory(settings_of(module))
            self._traces[key] = usual
            return None

    def placements(self, rank: int, share: int, budget: int) -> Mapping[str, Sequence[Placement]]:
        """The ways to place each method, best first, traced when they are asked for.

        Args:
            share: Rows of a step on one device. Where so many fit at once, fewer are not traced.
        """
        return _Placements(self, rank, share, budget)

    def sharded(self, name: str, rank: int | None) -> dict[int, MemoryParts]:
        """Bytes on each of more devices under FSDP2, with one row on each."""
        if name == "qlora":
            return {}
        counts = [2**power for power in range(1, 7) if 2**power > self.devices]
        trace = self.trace(name, 1, rank)
        return {count: self._divided(trace, "fsdp2", count) for count in counts}

    def largest_micro_batch(self, name: str, rank: int | None, strategy: str, share: int, budget: int) -> int:
        """The most rows of a micro-batch that fit, of those that divide a device's ``share`` of a step's rows, or 1."""
        return max(
            1, largest_micro_batch(lambda rows: self.memory(name, rows, rank, strategy), budget, divisors(share))
        )

    def _divided(self, trace: StepTrace, strategy: str, devices: int) -> MemoryParts:
        found = divide_memory(trace.memory, strategy, devices, layer=trace.largest_layer)
        return replace(found, overhead=found.overhead + self.context)

    def variant(self, name: str, rank: int | None) -> LightningModule:
        """The module as a method trains it, not built yet."""
        if name == "full":
            return variant(self.module, None)
        config = replace(self.config, rank=rank or self.config.rank)
        return variant(self.module, config, "nf4" if name == "qlora" else None)


class _Placements(Mapping[str, Sequence[Placement]]):
    """The placements of each method; a trace takes seconds, so a method is traced only if it is asked for."""

    def __init__(self, methods: TracedMethods, rank: int, share: int, budget: int) -> None:
        self.methods, self.rank, self.share, self.budget = methods, rank, share, budget

    def __getitem__(self, name: str) -> Sequence[Placement]:
        methods = self.methods
        if name not in methods.names:
            return []
        ways = ["single"] if methods.devices == 1 else ["ddp", "fsdp2"]
        traced = None if name == "full" else self.rank
        # bitsandbytes weights cannot be sharded
        found = [(way, self._memory(name, way)) for way in (ways[:1] if name == "qlora" else ways)]
        return [Placement(way, memory, traced) for way, memory in found if memory is not None]

    def __iter__(self) -> Iterator[str]:
        return iter(("lora", "qlora", "full"))

    def __len__(self) -> int:
        return 3

    def _memory(self, name: str, way: str) -> MemoryParts | None:
        memory = self.methods.known_memory(name, self.share, self.rank, way)
        if memory is not None and memory.total > self.budget:
            return self.methods.known_memory(name, 1, self.rank, way)
        return memory
