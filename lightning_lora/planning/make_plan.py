"""Makes a plan: reads the settings, counts the data, and lets the parts be put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from lightning_lora.batch.trial_step import can_choose_rows, longest_batch
from lightning_lora.data import SFTDataModule
from lightning_lora.data.rows_module import RowsDataModule
from lightning_lora.data.split import row_lengths
from lightning_lora.errors import DataError, PlanError, check_arguments
from lightning_lora.lora.config import LoRAConfig
from lightning_lora.mixin.lora_mixin import LoRAMixin
from lightning_lora.planning.advice.epoch import Epoch
from lightning_lora.planning.advice.named_callbacks import as_list, as_named, target_rows, with_lora_callback
from lightning_lora.planning.advice.plan_parts import PlanParts
from lightning_lora.planning.bad_input import check_objects, check_trainer
from lightning_lora.planning.base_bits import BaseBits
from lightning_lora.planning.count_data import count_data
from lightning_lora.planning.devices import find_devices
from lightning_lora.planning.plan import Plan
from lightning_lora.planning.set_up_data import set_up
from lightning_lora.tasks import CausalLM
from lightning_lora.tasks.pretrained import PretrainedTask
from lightning_lora.tasks.variants import variant


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
        trainer: Settings of the Trainer, such as ``{"max_epochs": 3, "precision": "bf16-true"}``. A `LoRA` callback
            among its ``callbacks`` counts: its settings and its root.
        config: The settings of ``fit`` that ``model`` and ``datamodule`` came from, for `Plan.write_config`.

    Raises:
        ConfigError: If a setting is refused or contradicts another one, or the model cannot be found.
        DataError: If the data cannot be used or holds no target.
    """
    check_trainer(trainer, config)
    settings = {**((config or {}).get("trainer") or {}), **(trainer or {})}
    settings["callbacks"] = [as_named(each) for each in as_list(settings.get("callbacks"))]
    check_objects(model, datamodule)
    check_arguments(plan, locals(), PlanError)
    found = find_devices(memory, devices, device, efficiency, peak_tflops, bandwidth, settings.get("accelerator"))
    module = CausalLM(model, lora=lora or LoRAConfig()) if isinstance(model, str) else model
    data = SFTDataModule(train=datamodule) if isinstance(datamodule, str) else datamodule
    set_up_module = with_lora_callback(module, settings["callbacks"])
    used = _lora_config(set_up_module, lora)
    rows = target_rows(settings["callbacks"])
    if None not in (rows, target_batch_size):
        raise PlanError("target_batch_size and a TargetBatchSize callback are the same: give one of the two.")
    counts = count_data(data, module)
    bits = _measured_bits(module, data) if measure else None
    with set_up(data, module) as ready:
        loader = ready.train_dataloader()
        epoch = Epoch.of(loader)
        if not counts.rows and not epoch.rows and epoch.rows is not None:
            raise DataError("the training data has no rows: there is nothing to plan.")
        batch = largest_batches(ready, loader)
        parts = PlanParts(module, set_up_module, data, ready, used, counts, bits, found, epoch, settings, batch)
        return parts.plan(rows if target_batch_size is None else target_batch_size, config, calibrate)


def _measured_bits(module: LightningModule, data: LightningDataModule) -> BaseBits:
    from lightning_lora.planning.base_bits import measure_base_bits

    return measure_base_bits(module, data)


def _lora_config(module: LightningModule, given: LoRAConfig | dict[str, Any] | None) -> LoRAConfig:
    """The LoRA settings: those that are given, or those of a module that has the mixin."""
    own = given if given is not None or not isinstance(module, LoRAMixin) else module.lora
    if own is not None and not isinstance(own, (LoRAConfig, Mapping)):
        raise PlanError(f"lora must be a LoRAConfig, a mapping or None, got {type(own).__name__}.")
    used = LoRAConfig() if own is None else LoRAConfig.from_dict(own)
    if isinstance(module, PretrainedTask) and module.new_head and own is not module.lora:
        # A task names its new head among what is trained in full.
        return LoRAConfig.from_dict(variant(module, used).lora)  # type: ignore[attr-defined]
    return replace(used)


def largest_batches(data: LightningDataModule, loader: Any) -> Callable[[int], Any]:
    """A function from a number of rows to the batch of so many rows that needs the most memory.

    A padded batch is as long as its longest row, and the longest row comes in some batch of every epoch. Of rows that
    are no token sequences, the longest are searched among the first 1,000.

    Raises:
        DataError: If the loader gives no batch.
    """
    if isinstance(data, RowsDataModule) and "train" in data.rows and not getattr(data, "packing", False):
        lengths = row_lengths(data.rows["train"], data.max_length)
        rows_each = len(lengths) // len(loader.dataset)  # 2 of a pair
        longest = loader.dataset[int(numpy.argmax(lengths)) // rows_each]
        return lambda count: loader.collate_fn([longest] * count)
    if isinstance(loader, DataLoader) and can_choose_rows(loader) and data.trainer is not None:
        trainer = data.trainer
        return lambda count: longest_batch(trainer, loader, count)
    batch = next(iter(loader), None)
    if batch is None:
        raise DataError("the training loader gives no batch: there are no rows to plan for.")
    return lambda count: batch
