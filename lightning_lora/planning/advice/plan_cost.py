"""The cost of a planned run: parameters, operations, disk and time, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from lightning_lora.planning.advice.epoch import Epoch, RunLength
from lightning_lora.planning.advice.method import Method
from lightning_lora.planning.advice.run_time import Trial, run_time
from lightning_lora.planning.advice.settings import PlannedBatch
from lightning_lora.planning.advice.traced_methods import TracedMethods
from lightning_lora.planning.cost import Disk, Flops, Parameters, RunSeconds, RunWork, StepWork
from lightning_lora.planning.devices import Devices
from lightning_lora.planning.timing.shapes import Validation, Work, shape_of, training_shapes


@dataclass(frozen=True)
class PlanCost:
    """What a run costs.

    Args:
        parameters: Trained and all parameters.
        flops: Operations of forward and backward of a micro-batch of the longest rows, and those of full fine-tuning.
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
        return _UNKNOWN if self.time is None else f"time: {self.time.how}"

    @property
    def words(self) -> str:
        """One sentence for the page."""
        share = self.parameters.trained / self.parameters.total
        files = f"checkpoint {self.disk.checkpoint / 2**20:,.1f} MiB"
        if self.disk.adapter:
            files = f"adapter {self.disk.adapter / 2**20:,.1f} MiB, {files}"
        time = "time unknown" if self.time is None else _told(self.time)
        return (
            f"{self.parameters.trained:,} trained parameters ({share:.2%}), {self.flops.ratio:.0%} of the operations "
            f"of full fine-tuning, {files}, {time}"
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
    traces: TracedMethods,
    method: Method,
    batch: PlannedBatch,
    devices: Devices,
    data: LightningDataModule | None,
    epoch: Epoch,
    trainer: Mapping[str, Any],
    calibrate: bool | None,
) -> PlanCost:
    """The cost of a method at the planned batch.

    Args:
        traces: The methods, traced.
        method: The method that is planned.
        batch: Its batch.
        devices: The devices.
        data: The data module, set up; None for a method that does not fit and takes no time.
        epoch: What its training loader draws.
        trainer: Settings of the Trainer.
        calibrate: Whether to time some batches; None decides by how long that takes.
    """
    trace = traces.trace(method.name, batch.batch_size, method.rank)
    full = traces.trace("full", batch.batch_size, None)
    precision = traces.precision[method.name]
    built = traces.tracer(method.name, method.rank).module
    parameters = Parameters.of(built)
    disk = Disk.of(trace.memory, built)
    linears = sum(isinstance(module, nn.Linear) for module in built.modules())
    memory = traces.memory(method.name, batch.batch_size, method.rank, method.strategy)
    work = Work.of(trace.flops, trace.attention_flops, shape_of(traces.batch(batch.batch_size)))
    time = None
    if data is not None and batch.steps and (run := _run_work(work, batch, data, epoch, trainer)).shapes:
        step = StepWork(memory, linears, method.name)
        trial = Trial(
            lambda: traces.variant(method.name, method.rank),
            data,
            dict(trainer) | {"precision": precision},
            batch.batch_size,
        )
        time = run_time(step, run, devices, precision, trial, calibrate)
    return PlanCost(parameters, Flops(trace.flops, full.flops), disk, time, memory.total)


def _run_work(
    work: Work, batch: PlannedBatch, data: LightningDataModule, epoch: Epoch, trainer: Mapping[str, Any]
) -> RunWork:
    length = RunLength.of(trainer)
    how = epoch, batch.batch_size, batch.accumulate_grad_batches, batch.devices
    passes = length.validations(*how)
    # Each device validates its share.
    pass_ = Validation.of(data, batch.batch_size, trainer.get("limit_val_batches"))
    pass_ = Validation(-(-pass_.batches // batch.devices), pass_.shapes)
    shapes = training_shapes(data, batch.batch_size)
    return RunWork(batch.steps, sum(length.parts(*how)), shapes, work, pass_, passes)


_UNKNOWN = "time is not known for this device: --device NAME, or --peak-tflops and --bandwidth"


def _told(time: RunSeconds) -> str:
    validation = f", {_duration(time.validation)} of it validation" if time.validation else ""
    between = f"{_duration(time.low)} to {_duration(time.high)}"
    return f"about {_duration(time.total)} ({between}; {time.source}){validation}, without loading and checkpoints"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
