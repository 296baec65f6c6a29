"""Puts a plan together: capacity, method, batch, rate, memory and cost, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.callbacks.memory.memory_choice import READ_ROWS
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.memory.failures import TraceError
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.memory.run_step import gigabytes
from lightning_lora.planning.adapter_sizes import AdapterSizes, refused_ranks
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.fit_config import fit_config
from lightning_lora.planning.advice.method import (
    DEFAULT_RANK,
    Method,
    MethodChoices,
    choose_method,
    sensible_rank,
    smallest_change,
)
from lightning_lora.planning.advice.named_callbacks import is_named
from lightning_lora.planning.advice.plan_cost import PlanCost, plan_cost
from lightning_lora.planning.advice.rates import PlannedRate, planned_rate
from lightning_lora.planning.advice.run_tokens import run_tokens
from lightning_lora.planning.advice.settings import PlannedBatch, alarm
from lightning_lora.planning.advice.step_rows import StepRows
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.advice.verdict import beside, notes_on_adapters, notes_on_data, sentence
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import CapacityRow, capacity_rows, highest_rank, needed_rank, target_sizes
from lightning_lora.planning.cost import Parameters
from lightning_lora.planning.data_counts import DataCounts
from lightning_lora.planning.devices import Devices
from lightning_lora.planning.plan import Plan
from lightning_lora.planning.reason import Reason

SURE = (
    "capacity bounds memorising, rules need less; memory is what tensors hold, within 1 % on a CPU in 19 cases, 6 % on "
    "an H100 in 5 (docs, Plan);"
)
SURE_WITHOUT_MEMORY = "capacity bounds memorising, rules need less; memory is not known;"


@dataclass
class PlanParts:
    """Everything that the parts of a plan are made from.

    Args:
        given: The module as the user gave it.
        module: The module as a `LoRA` callback sets it up; ``given`` itself without one.
        ready: The data module, set up.
        bits: The bits of the base, if they were measured.
        batch: A function from a number of rows to the batch that needs the most memory.
    """

    given: LightningModule
    module: LightningModule
    data: LightningDataModule
    ready: LightningDataModule
    lora: LoRAConfig
    counts: DataCounts
    bits: BaseBits | None
    devices: Devices
    epoch: Epoch
    trainer: dict[str, Any]
    batch: Any

    def plan(self, target_rows: int | None, config: Mapping[str, Any] | None, calibrate: bool | None) -> Plan:
        """The plan.

        Args:
            target_rows: Rows of an optimizer step; None recommends a number.
            config: The settings of ``fit`` that module and data came from.
            calibrate: Whether to time some batches; None decides by how long that takes.
        """
        length, traces = RunLength.of(self.trainer), self._traces()
        step_rows = StepRows(self.data, self.epoch, length, self.devices.count)
        whole = _whole(traces)
        adapters, rows = self._capacity(whole)
        most = sensible_rank(highest_rank(adapters), adapters, Parameters.of(whole).total)
        target, batch_reason = step_rows.choose(target_rows, self.trainer)
        method, batch = self._method_and_batch(traces, rows, most, target, step_rows)
        kept, why_kept = planned_step_memory(traces, method, batch, self.devices, self.trainer)
        memory = self._memory(traces, method, batch.batch_size, _default_rank({row.rank for row in rows}))
        rate = planned_rate(self.given, traces, method, self.lora, adapters.trained, config)
        few = alarm(batch.steps, rate.multiplier)
        topics = [("method", reason) for reason in method.reasons]
        topics += [("settings", each) for each in (rate.reason, batch_reason, few, why_kept) if each is not None]
        settings = self._settings(method, batch, rate, traces) | {"step_memory": kept}
        data = self.ready if method.fits else None
        cost = plan_cost(traces, method, batch, self.devices, data, self.epoch, self.trainer, calibrate, adapters)
        in_epoch = {"batches_in_epoch": self.epoch.batches(batch.batch_size, batch.devices, length.limit_train_batches)}
        made, reasons, why_none = fit_config(
            self.given,
            self.data,
            config,
            settings | in_epoch,
            method,
            self.lora,
            self.trainer,
            topics,
            self._planned(cost, batch, length),
        )
        sure = SURE if cost.peak is not None else SURE_WITHOUT_MEMORY
        return Plan(
            model=f"{_name(self.given)}, {cost.parameters.total:,} parameters; {self.devices}",
            data=self.counts,
            capacity=tuple(rows),
            method=method.name,
            fits=method.fits,
            sentence=self._sentence(traces, method, rows, most, batch),
            settings=settings,
            memory=memory,
            seconds=cost.seconds,
            cost=cost.words,
            topics=tuple(topics),
            notes=(
                *([] if why_none is None else [why_none]),
                *notes_on_adapters(adapters, self.lora, method.rank),
                *notes_on_data(self.counts, self.bits),
            ),
            budget=self.devices.memory,
            targets=rows[0].targets,
            lr_multiplier=rate.multiplier,
            length=str(length),
            sureness=f"{sure} {cost.how}",
            config=made,
            config_reasons=reasons,
            numbers=cost.numbers,
            not_traced=dict(traces.failed),
            no_config=why_none,
        )

    def _capacity(self, whole: LightningModule) -> tuple[AdapterSizes, list[CapacityRow]]:
        """Sizes of the adapters as the settings ask for them, and the table of all ranks that are possible."""
        sizes = target_sizes(whole, self.lora)
        rows = capacity_rows(sizes, self.lora.rank, self.counts, self.bits)
        refused = refused_ranks(whole, self.lora, {row.rank for row in rows})
        return next(iter(sizes.values())), [row for row in rows if row.rank not in refused]

    def _sentence(
        self, traces: TracedMethods, method: Method, rows: list[CapacityRow], most: int, batch: PlannedBatch
    ) -> str:
        """The verdict in words; where nothing fits, with the smallest change that would help."""
        is_traced = method.name not in traces.failed
        given = (method, self.counts, rows, self.bits, most, self.devices.memory)
        if method.fits:
            return sentence(*given, None, is_traced) + beside(rows, self.lora.rank, method, batch.steps)
        return sentence(*given, self._change(traces, method), is_traced)

    def _traces(self) -> TracedMethods:
        given = self.trainer.get("precision")
        is_gpu = self.devices.device.kind != "cpu"
        defaults = {"lora": "bf16-true", "qlora": "bf16-true", "full": "bf16-mixed"} if is_gpu else {}
        precision = {name: str(given or defaults.get(name, "32-true")) for name in ("lora", "qlora", "full")}
        clip, context = self.trainer.get("gradient_clip_val"), self.devices.device.context
        return TracedMethods(self.module, self.lora, self.batch, precision, clip, self.devices.count, context)

    def _method_and_batch(
        self, traces: TracedMethods, rows: list[CapacityRow], most: int, target: int, step_rows: StepRows
    ) -> tuple[Method, PlannedBatch]:
        """The method, and its batch; a rank that does not fit when it is traced itself is left out."""
        own = {row.rank: row for row in rows if row.targets == rows[0].targets}
        choices = MethodChoices(
            verdicts={rank: row.verdict for rank, row in own.items()},
            needed=needed_rank(rows),
            most_rank=most,
            placements=traces.placements(_default_rank(own), step_rows.share(target), self.devices.memory),
            budget=self.devices.memory,
            asked_rank=self.lora.rank if self.lora.rank in own else None,
            parameters={rank: row.parameters for rank, row in own.items()},
            not_traced=traces.failed,
            devices=self.devices.count,
        )
        while True:
            method = choose_method(choices)
            batch = step_rows.batch(target, traces, method, self.devices.memory)
            memory = traces.known_memory(method.name, batch.batch_size, method.rank, method.strategy)
            if not method.fits or memory is None or memory.total <= self.devices.memory:
                return method, batch
            choices = replace(choices, too_large=choices.too_large | {(method.name, method.rank)})

    def _settings(
        self, method: Method, batch: PlannedBatch, rate: PlannedRate, traces: TracedMethods
    ) -> dict[str, Any]:
        return {
            "rank": method.rank,
            "learning_rate": rate.value,
            "batch_size": batch.batch_size,
            "accumulate_grad_batches": batch.accumulate_grad_batches,
            "devices": batch.devices,
            "strategy": method.strategy,
            "precision": traces.precision[method.name],
            "rows_per_step": batch.rows,
            "steps": batch.steps,
        }

    def _planned(self, cost: PlanCost, batch: PlannedBatch, length: RunLength) -> dict[str, Any]:
        """What ``fit`` prints beside what it measured."""
        planned = {
            "steps": batch.steps,
            **run_tokens(self.ready, self.counts, self.epoch, length, batch, self.batch(1)),
            "trained_parameters": cost.parameters.trained,
            "peak_bytes": cost.peak,
            "seconds": None if cost.seconds is None else float(f"{cost.seconds:.3g}"),
        }
        return {name: value for name, value in planned.items() if value is not None}

    def _memory(self, traces: TracedMethods, method: Method, micro: int, default: int) -> dict[str, MemoryParts | None]:
        found: dict[str, MemoryParts | None] = {"lora": None, "qlora": None, "full": None}
        for name in traces.names:
            way = "ddp" if name == "qlora" and method.strategy == "fsdp2" else method.strategy
            found[name] = traces.known_memory(name, micro, method.rank or default, way)
        return found

    def _change(self, traces: TracedMethods, method: Method) -> str:
        memory = traces.memory(method.name, 1, method.rank, "single")
        sharded = traces.sharded(method.name, method.rank)
        return smallest_change(memory, self.devices.memory, sharded, self.counts.longest_row)


def _whole(traces: TracedMethods) -> LightningModule:
    """The module without adapters, built without memory; as it was given where that fails.

    Raises:
        TraceError: If a module that is not built yet cannot be built.
    """
    try:
        return traces.tracer("full", None).module
    except TraceError as error:
        if next(traces.module.parameters(), None) is None:
            raise
        traces.failed["full"] = str(error)
        return traces.module


def _default_rank(ranks: Collection[int]) -> int:
    """The rank of traces before one is chosen."""
    return max((rank for rank in ranks if rank <= DEFAULT_RANK), default=min(ranks))


def _name(module: LightningModule) -> str:
    return getattr(module, "model_name", None) or type(module).__name__


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
