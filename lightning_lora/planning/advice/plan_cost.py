"""The cost of a planned run: parameters, operations, disk and time, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import nn

from lightning_lora.memory.failures import TraceError
from lightning_lora.planning.adapter_sizes import AdapterSizes
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
        flops: Operations of forward and backward of a micro-batch of the longest rows, and those of full fine-tuning;
            None if one of the two could not be traced.
        disk: Bytes of the files; None without a trace.
        time: Time of all steps; None if nothing is known of the device, or without a trace.
        peak: Bytes at the peak on one device; None without a trace.
    """

    parameters: Parameters
    flops: Flops | None
    disk: Disk | None
    time: RunSeconds | None
    peak: int | None

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps."""
        return None if self.time is None else self.time.total

    @property
    def how(self) -> str:
        """Where the time comes from and how sure it is."""
        if self.peak is None:
            return "neither are operations, files and time, which come from the trace"
        return _UNKNOWN if self.time is None else f"time: {self.time.how}"

    @property
    def words(self) -> str:
        """One sentence for the page."""
        share = self.parameters.trained / self.parameters.total
        told = [f"{self.parameters.trained:,} trained parameters ({share:.2%})"]
        if self.flops is not None:
            told.append(f"{self.flops.ratio:.0%} of the operations of full fine-tuning")
        if self.disk is not None:
            told += [f"adapter {_file_size(self.disk.adapter)}"] if self.disk.adapter else []
            told.append(f"checkpoint {_file_size(self.disk.checkpoint)}")
        return ", ".join([*told, "time unknown" if self.time is None else _told(self.time)])

    @property
    def numbers(self) -> Mapping[str, Any]:
        """What `Plan.to_dict` tells beside the settings."""
        return {
            "parameters": asdict(self.parameters),
            "flops": self.flops and asdict(self.flops) | {"ratio": self.flops.ratio},
            "disk": self.disk and asdict(self.disk),
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
    adapters: AdapterSizes,
) -> PlanCost:
    """The cost of a method at the planned batch.

    Args:
        calibrate: Whether to time some batches; None decides by how long that takes.
    """
    if method.name in traces.failed:
        return PlanCost(_untraced_parameters(traces, method, adapters), None, None, None, None)
    trace = traces.trace(method.name, batch.batch_size, method.rank)
    built = traces.tracer(method.name, method.rank).module
    parameters = Parameters.of(built)
    disk = Disk.of(trace.memory, built)
    flops = None
    if "full" not in traces.failed:
        flops = Flops(trace.flops, traces.trace("full", batch.batch_size, None).flops)
    memory = traces.memory(method.name, batch.batch_size, method.rank, method.strategy)
    time = None
    if data is not None and batch.steps:
        work = Work.of(trace.flops, trace.attention_flops, shape_of(traces.batch(batch.batch_size)))
        run, precision = _run_work(work, batch, data, epoch, trainer), traces.precision[method.name]
        linears = sum(isinstance(module, nn.Linear) for module in built.modules())
        options = dict(trainer) | {"precision": precision}
        trial = Trial(lambda: traces.variant(method.name, method.rank), data, options, batch.batch_size)
        step = StepWork(memory, linears, method.name)
        time = run_time(step, run, devices, precision, trial, calibrate) if run.shapes else None
    return PlanCost(parameters, flops, disk, time, memory.total - devices.device.context)


def _untraced_parameters(traces: TracedMethods, method: Method, adapters: AdapterSizes) -> Parameters:
    """The parameters of a method whose step could not be traced, from shapes."""
    try:
        base = Parameters.of(traces.tracer("full", None).module)
    except TraceError:  # it cannot even be built without values
        base = Parameters.of(traces.module)
    if method.rank is None:
        return base
    trained = adapters.parameters(method.rank)
    return Parameters(trained, base.total + trained - adapters.trained)


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
    if time.high < 1:
        return f"under 1 second ({time.source}){validation}, without loading and checkpoints"
    between = f"{_duration(time.low)} to {_duration(time.high)}"
    about = "about " if time.total >= 1 else ""
    return f"{about}{_duration(time.total)} ({between}; {time.source}){validation}, without loading and checkpoints"


def _file_size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    if seconds < 1:
        return "under 1 second"
    return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"
