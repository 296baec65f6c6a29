"""The rows of an optimizer step and of each batch in it, as far as the data leave a choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule

from lightning_lora.batch.division import divide_rows
from lightning_lora.errors import PlanError
from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.fit_config import can_set_batch
from lightning_lora.planning.advice.method import Method
from lightning_lora.planning.advice.settings import PlannedBatch, choose_rows, divide_step, per_step
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.bad_input import check_target
from lightning_lora.planning.reason import Reason


class StepRows:
    """Chooses the rows of a step, and divides them."""

    def __init__(self, data: LightningDataModule, epoch: Epoch, length: RunLength, devices: int) -> None:
        self.epoch, self.length, self.devices = epoch, length, devices
        self.can_set = can_set_batch(data)
        # The rows of a batch as the data module makes them.
        self.own: int = data.batch_size if self.can_set else epoch.batch_size  # type: ignore[attr-defined]

    def choose(self, target: int | None, trainer: Mapping[str, Any]) -> tuple[int, Reason]:
        """Rows of an optimizer step on all devices.

        Args:
            target: The rows that the user asks for; None recommends a number.
            trainer: Settings of the Trainer, which may contradict it.

        Raises:
            ConfigError: If the rows asked for cannot be divided among the devices and batches of the loader.
        """
        if target is not None:
            check_target(target, trainer)
            divided = divide_rows(target, self.devices, self.own)
            if divided.micro_batch < self.own and not self.can_set:
                raise PlanError(
                    f"batches of {self.own} rows are more than the {divided.micro_batch} that a device has in a step "
                    f"of {target}: make the loader with batch_size={divided.micro_batch}."
                )
            return divided.rows, Reason(per_step(target), "yours", "target_batch_size")
        rows, reason = choose_rows(self.epoch, self.length, self.devices)
        if self.can_set:
            return rows, reason
        fewest = self.own * self.devices
        whole = fewest * max(1, round(rows / fewest))
        times = f", {whole // self.own} of them" if whole > self.own else ""
        why = f"batches of {self.own} as the loader makes them{times}; {reason.why}, would be {rows}"
        return whole, reason if whole == rows else Reason(per_step(whole), why, reason.source)

    def share(self, rows: int) -> int:
        """Rows of a step on one device that are in memory at once, if they fit."""
        return rows // self.devices if self.can_set else self.epoch.batch_size

    def batch(self, rows: int, traces: TracedMethods, method: Method, budget: int) -> PlannedBatch:
        """Rows of a step as batches that fit into ``budget``, bytes of one device."""
        if not self.can_set:
            micro = self.epoch.batch_size
            accumulation = max(1, round(rows / (micro * self.devices)))
            steps = self.length.steps(self.epoch, micro, accumulation, self.devices)
            return PlannedBatch(micro, accumulation, self.devices, steps)
        most = self.own
        if method.name not in traces.failed:
            share = rows // self.devices
            most = traces.largest_micro_batch(method.name, method.rank, method.strategy, share, budget)
        return divide_step(rows, self.devices, most, self.epoch, self.length)
