"""The cost of a planned run: parameters, operations, disk and time, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_lora.planning.advice.method import Method
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.cost import Disk, Flops, Parameters, RunSeconds, StepWork, seconds_from_table
from lightning_lora.planning.data_counts import DataCounts
from lightning_lora.planning.devices import Devices


@dataclass(frozen=True)
class PlanCost:
    """What a run costs.

    Args:
        parameters: Trained and all parameters.
        flops: Operations of a micro-batch of the longest rows, and those of full fine-tuning.
        disk: Bytes of the files.
        time: Time of all steps; None if nothing is known of the device.
        peak: Bytes at the peak on one device.
    """

    parameters: Parameters
    flops: Flops
    disk: Disk
    time: RunSeconds | None
    peak: int

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps."""
        return None if self.time is None else self.time.total

    @property
    def how(self) -> str:
        """Where the time comes from and how sure it is."""
        return "time is not known for this device (--device NAME)" if self.time is None else self.time.how

    @property
    def words(self) -> str:
        """One sentence for the page."""
        share = self.parameters.trained / self.parameters.total
        time = "time unknown" if self.time is None else f"about {_duration(self.time.total)} ({self.time.source})"
        return (
            f"{self.parameters.trained:,} trained parameters ({share:.2%}), {self.flops.ratio:.0%} of the operations "
            f"of full fine-tuning, checkpoint {self.disk.checkpoint / 2**20:,.1f} MiB, {time}"
        )

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What `Plan.to_dict` tells beside the settings."""
        return {
            "parameters": asdict(self.parameters),
            "flops": asdict(self.flops) | {"ratio": self.flops.ratio},
            "disk": asdict(self.disk),
            "time": self.time and asdict(self.time),
        }


def plan_cost(
    traces: TracedMethods, method: Method, batch: PlannedBatch, devices: Devices, counts: DataCounts
) -> PlanCost:
    """The cost of a method at the planned batch."""
    trace = traces.trace(method.name, batch.batch_size, method.rank)
    full = traces.trace("full", batch.batch_size, None)
    precision = traces.precision[method.name]
    built = traces.built(method.name, method.rank)
    parameters = Parameters.of(built)
    linears = sum(isinstance(module, nn.Linear) for module in built.modules())
    memory = traces.memory(method.name, batch.batch_size, method.rank, method.strategy)
    # The trace is of the longest rows; the usual ones are shorter.
    usual = counts.mean_row / counts.longest_row if counts.mean_row and counts.longest_row else 1.0
    work = StepWork(trace.flops * usual, memory, batch.accumulate_grad_batches, linears, method.name)
    time = seconds_from_table(work, devices.device, precision, batch.steps)
    return PlanCost(parameters, Flops(trace.flops, full.flops), Disk.of(trace.memory), time, memory.total)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
