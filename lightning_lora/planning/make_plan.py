"""Makes a plan: counts the data, traces the methods, chooses, and says why."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.batch.division import divide_rows
from lightning_lora.data import SFTDataModule
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.fit_config import fit_config
from lightning_lora.planning.advice.largest_batches import largest_batches
from lightning_lora.planning.advice.method import (
    DEFAULT_RANK,
    Method,
    Room,
    choose_method,
    sensible_rank,
    smallest_change,
)
from lightning_lora.planning.advice.plan_cost import plan_cost
from lightning_lora.planning.advice.run_tokens import run_tokens
from lightning_lora.planning.advice.settings import PlannedBatch, alarm, choose_rate, choose_rows, divide
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.advice.verdict import notes_on_data, sentence
from lightning_lora.planning.bad_input import check_objects, check_target
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.capacity import capacity_rows, highest_rank, needed_rank, target_sizes
from lightning_lora.planning.cost import Parameters
from lightning_lora.planning.count_data import count_data
from lightning_lora.planning.data_counts import DataCounts
from lightning_lora.planning.devices import Devices, find_devices
from lightning_lora.planning.plan import Plan
from lightning_lora.planning.reason import Reason
from lightning_lora.planning.set_up_data import set_up
from lightning_lora.tasks import CausalLM

SURE = "capacity bounds memorising, rules need less; memory is that of a CPU, within 1 % in 16 cases (docs/plan.md);"


def plan(
    model: LightningModule | str,
    datamodule: LightningDataModule | str,
    *,
    lora: LoRAConfig | dict[str, Any] | None = None,
    memory: str | None = None,
    devices: int | None = None,
    device: str | None = None,
    efficiency: float | None = None,
    peak_tflops: float | None = None,
    bandwidth: str | None = None,
    measure: bool = False,
    calibrate: bool | None = None,
    target_batch_size: int | None = None,
    trainer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a run before it is started: is LoRA enough, at which rank, and what does it take. Nothing is changed.

    No weights are read unless ``measure`` or ``calibrate`` asks for it, or the model is so small that some batches are
    timed in a few seconds.

    Args:
        model: A LightningModule, or folder or hub name of a causal language model.
        datamodule: A LightningDataModule, or file, glob or hub name of rows for `SFTDataModule`.
        lora: LoRA settings in place of the module's own.
        memory: Memory of one device with its unit, such as ``"24GiB"``. None takes that of the devices at hand.
        devices: Number of devices. None takes those at hand.
        device: Name of a device in the table, such as ``"h100"``.
        efficiency: Share of the device's peak FLOP/s that training reaches. None takes the measured one.
        peak_tflops: Peak of the device in 10^12 FLOP/s, without sparsity. None takes that of its data sheet.
        bandwidth: Bytes per second of its memory with their unit, such as ``"3.35TB"``. None takes the data sheet's.
        measure: Run the base model on a sample of rows, for the bits that it does not know yet.
        calibrate: Train a copy of the module for some batches, to time them. None does so if it takes a few seconds.
        target_batch_size: Rows of an optimizer step on all devices. None recommends a number.
        trainer: Settings of the Trainer, such as ``{"max_epochs": 3, "precision": "bf16-true"}``.
        config: The settings of ``fit`` that ``model`` and ``datamodule`` came from, for `Plan.write_config`.

    Raises:
        ConfigError: If a setting is refused or contradicts another one, or the model cannot be found.
        DataError: If the data cannot be used or holds no target.
    """
    settings = dict(trainer or {})
    check_objects(model, datamodule)
    found = find_devices(memory, devices, device, efficiency, peak_tflops, bandwidth, settings.get("accelerator"))
    module = CausalLM(model, lora=lora or LoRAConfig()) if isinstance(model, str) else model
    data = SFTDataModule(train=datamodule) if isinstance(datamodule, str) else datamodule
    used = _lora_config(module, lora)
    counts = count_data(data, module)
    bits = _measured_bits(module, data) if measure else None
    with set_up(data, module) as ready:
        loader = ready.train_dataloader()
        epoch = Epoch.of(loader)
        if not counts.rows and not epoch.rows and epoch.rows is not None:
            raise DataError("the training data has no rows: there is nothing to plan.")
        run = _Run(module, data, ready, used, counts, bits, found, epoch, settings, largest_batches(ready, loader))
        return run.plan(target_batch_size, config, calibrate)


@dataclass
class _Run:
    """Everything that the parts of a plan are made from."""

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
        length = RunLength.of(self.trainer)
        traces = self._traces()
        whole = traces.tracer("full", None).module
        sizes = target_sizes(whole, self.lora)
        rows = capacity_rows(sizes, self.lora.rank, self.counts, self.bits)
        own = [row for row in rows if row.targets == rows[0].targets]
        adapters = sizes[rows[0].targets]
        most = sensible_rank(highest_rank(adapters), adapters, Parameters.of(whole).total)
        target, batch_reason = self._rows(target_rows, length)
        default = min(DEFAULT_RANK, max(row.rank for row in own))
        room = Room(
            verdicts={row.rank: row.verdict for row in own},
            needed=needed_rank(rows),
            most_rank=most,
            placements=traces.placements(default, self._share(target), self.devices.memory),
            budget=self.devices.memory,
            asked_rank=self.lora.rank,
        )
        method = choose_method(room)
        batch = self._batch(target, length, traces, method)
        memory = self._memory(traces, method, batch.batch_size, default)
        rate, rate_reason = self._rate(config)
        few = alarm(batch.steps, self.lora.lr_multiplier)
        topics = [("method", reason) for reason in method.reasons]
        topics += [("settings", each) for each in (rate_reason, batch_reason, few) if each is not None]
        settings = {
            "rank": method.rank,
            "learning_rate": rate,
            "batch_size": batch.batch_size,
            "accumulate_grad_batches": batch.accumulate_grad_batches,
            "devices": batch.devices,
            "strategy": method.strategy,
            "precision": traces.precision[method.name],
            "rows_per_step": batch.rows,
            "steps": batch.steps,
        }
        in_epoch = self.epoch.batches(batch.batch_size, batch.devices, length.limit_train_batches)
        data = self.ready if method.fits else None
        cost = plan_cost(traces, method, batch, self.devices, data, self.epoch, self.trainer, calibrate)
        change = None if method.fits else self._change(traces, method)
        planned = {
            "steps": batch.steps,
            **run_tokens(self.ready, self.counts, self.epoch, length, batch),
            "trained_parameters": cost.parameters.trained,
            "peak_bytes": cost.peak,
            "seconds": None if cost.seconds is None else float(f"{cost.seconds:.3g}"),
        }
        planned = {name: value for name, value in planned.items() if value is not None}
        made, reasons = fit_config(
            self.module,
            self.data,
            config,
            settings | {"batches_in_epoch": in_epoch},
            method,
            self.lora,
            self.trainer,
            topics,
            planned,
        )
        return Plan(
            model=f"{_name(self.module)}, {cost.parameters.total:,} parameters; {self.devices}",
            data=self.counts,
            capacity=tuple(rows),
            method=method.name,
            fits=method.fits,
            sentence=sentence(method, self.counts, rows, self.bits, most, self.devices.memory, change),
            settings=settings,
            memory=memory,
            seconds=cost.seconds,
            cost=cost.words,
            topics=tuple(topics),
            notes=(
                *notes_on_data(self.counts, self.bits),
                *(f"QLoRA could not be traced: {why}" for why in traces.failed.values()),
            ),
            budget=self.devices.memory,
            targets=rows[0].targets,
            lr_multiplier=self.lora.lr_multiplier,
            length=str(length),
            sureness=f"{SURE} {cost.how}",
            config=made,
            config_reasons=reasons,
            numbers=cost.numbers,
        )

    def _traces(self) -> TracedMethods:
        given = self.trainer.get("precision")
        is_gpu = self.devices.device.kind != "cpu"
        defaults = {"lora": "bf16-true", "qlora": "bf16-true", "full": "bf16-mixed"} if is_gpu else {}
        precision = {name: str(given or defaults.get(name, "32-true")) for name in ("lora", "qlora", "full")}
        clip = self.trainer.get("gradient_clip_val")
        return TracedMethods(self.module, self.lora, self.batch, precision, clip, self.devices.count)

    def _rows(self, target: int | None, length: RunLength) -> tuple[int, Reason]:
        """Rows of an optimizer step on all devices."""
        own, count = getattr(self.data, "batch_size", self.epoch.batch_size), self.devices.count
        if target is not None:
            check_target(target, self.trainer)
            divided = divide_rows(target, count, own)
            if divided.micro_batch < own and not self._can_set:
                raise ConfigError(
                    f"batches of {own} rows are more than the {divided.micro_batch} that a device has in a step of "
                    f"{target}: make the loader with batch_size={divided.micro_batch}."
                )
            return divided.rows, Reason(f"{target} rows per step", "yours", "target_batch_size")
        rows, reason = choose_rows(self.epoch, length, count)
        if self._can_set:
            return rows, reason
        whole = own * count * max(1, round(rows / (own * count)))
        why = f"batches of {own} rows, as the loader makes them, {whole // own} of them; {reason.why} says {rows}"
        return whole, reason if whole == rows else Reason(f"{whole} rows per step", why, reason.source)

    @property
    def _can_set(self) -> bool:
        """Whether the rows of a batch are a setting of the data module."""
        return isinstance(getattr(self.data, "batch_size", None), int)

    def _batch(self, rows: int, length: RunLength, traces: TracedMethods, method: Method) -> PlannedBatch:
        count = self.devices.count
        if self._can_set:
            share = rows // count
            most = traces.largest_micro_batch(method.name, method.rank, method.strategy, share, self.devices.memory)
            return divide(rows, count, most, self.epoch, length)
        micro = self.epoch.batch_size
        accumulation = max(1, round(rows / (micro * count)))
        return PlannedBatch(micro, accumulation, count, length.steps(self.epoch, micro, accumulation, count))

    def _share(self, rows: int) -> int:
        """Rows of a step on one device that are in memory at once, if they fit."""
        return rows // self.devices.count if self._can_set else self.epoch.batch_size

    def _memory(self, traces: TracedMethods, method: Method, micro: int, default: int) -> dict[str, MemoryParts | None]:
        found: dict[str, MemoryParts | None] = {"lora": None, "qlora": None, "full": None}
        for name in traces.names:
            way = "ddp" if name == "qlora" and method.strategy == "fsdp2" else method.strategy
            found[name] = traces.known_memory(name, micro, method.rank or default, way)
        return found

    def _rate(self, config: Mapping[str, Any] | None) -> tuple[float | None, Reason]:
        """The learning rate: the one that a config names or an object has, else that of a law or the default."""
        rate = getattr(self.module, "learning_rate", getattr(self.module, "lr", None))
        known = inspect.signature(type(self.module)).parameters
        standard = known["learning_rate"].default if "learning_rate" in known else None
        rate = rate if isinstance(rate, (int, float)) else None
        is_named = "learning_rate" in (((config or {}).get("model") or {}).get("init_args") or {})
        given = None if rate == standard and not is_named else rate
        model_config = getattr(self.module, "model_config", None)
        return choose_rate(given, rate, model_config, self.lora.lr_multiplier)

    def _change(self, traces: TracedMethods, method: Method) -> str:
        memory = traces.memory(method.name, 1, method.rank, "single")
        sharded = traces.sharded(method.name, method.rank)
        return smallest_change(memory, self.devices.memory, sharded, self.counts.longest_row)


def _measured_bits(module: LightningModule, data: LightningDataModule) -> BaseBits:
    from lightning_lora.planning.base_bits import measure_base_bits

    return measure_base_bits(module, data)


def _lora_config(module: LightningModule, given: LoRAConfig | dict[str, Any] | None) -> LoRAConfig:
    own = given if given is not None else getattr(module, "lora", None)
    if own is not None and not isinstance(own, (LoRAConfig, Mapping)):
        raise ConfigError(f"lora must be a LoRAConfig, a mapping or None, got {type(own).__name__}.")
    return LoRAConfig() if own is None else replace(LoRAConfig.from_dict(own))


def _name(module: LightningModule) -> str:
    return getattr(module, "model_name", None) or type(module).__name__
