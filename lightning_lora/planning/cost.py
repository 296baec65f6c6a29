"""What a run costs: floating-point operations against full fine-tuning, disk, and time from data sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_lora.lora.reports import count_parameters
from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.devices import EFFICIENCY, Device
from lightning_lora.planning.timing.shapes import Shape, Validation, Work

# All measured on one H100 in bfloat16 (docs/evidence/gpu.md). Shares of the peak: 0.28 to 0.42; `EFFICIENCY` is one.
# Where micro-batches are small, the host launches slower than the GPU computes: Llama-1B (112 linear layers) with 1,024
# tokens took 106 ms with adapters and 55 ms in full; eight of its layers under a Trainer 74, 43, and 111 ms in NF4.
SECONDS_PER_LINEAR = {"lora": 0.95e-3, "qlora": 1.66e-3, "full": 0.49e-3}
"""Seconds in which the host launches forward and backward of one linear layer, by method."""
SECONDS_PER_BATCH = 0.018
"""Seconds of the host that a Trainer adds to a micro-batch."""
SECONDS_PER_LINEAR_ON_CPU = {"lora": 0.43e-3, "qlora": 0.43e-3, "full": 0.1e-3}
"""The same on a CPU, which computes nothing meanwhile: batches of 1 to 16 rows of a model with 35 linear layers, one
core of a Xeon. QLoRA was not measured and is taken as LoRA."""
LOW, HIGH = 0.75, 1.35
"""The interval of a time from the table, relative to it: what these measurements were apart from it, and a little."""
LOW_ELSEWHERE, HIGH_ELSEWHERE = 0.5, 2.0
"""The same for devices and types that were never measured."""
TABLE, PRODUCT, TIMED = "device table", "a product timed here", "steps timed here"
FORWARD = {"lora": 1 / 2, "qlora": 1 / 2, "full": 1 / 3}
"""The share of forward in the operations of forward and backward, by method, with adapters of a usual rank."""


@dataclass(frozen=True)
class RunSeconds:
    """How long the optimizer steps of a run take, and the validation between them.

    Loading the model, reading the data, the sanity check of validation and writing checkpoints are not in it.

    Args:
        total: Seconds of all steps and of validation.
        low: Lower end of the interval of ``total``.
        per_step: Seconds of one optimizer step.
        validation: Seconds of validation, which are part of ``total``.
        source: ``"steps timed here"``, ``"device table"`` or ``"a product timed here"``.
        how: How the number came about and how sure it is, in one sentence.
        validations: Number of passes over the validation rows; 0 if a clock decides.
    """

    total: float
    low: float
    high: float
    per_step: float
    validation: float
    source: str
    how: str
    validations: int = 0


@dataclass(frozen=True)
class RunWork:
    """The batches of a run on one device.

    Args:
        micro_batches: Forward and backward passes of all steps.
        shapes: The shapes of many micro-batches.
        work: Operations of a micro-batch by its shape.
        validation: A pass over the validation rows.
        passes: How many of these there are; None if a clock decides.
    """

    steps: int
    micro_batches: int
    shapes: Sequence[Shape]
    work: Work
    validation: Validation
    passes: int | None

    @property
    def validation_batches(self) -> int:
        """Validation batches of the whole run."""
        return self.validation.batches * (self.passes or 0)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; those of 4-bit weights count as what they stand for.

    Args:
        trained: Parameters that are trained. Of factors that keep their start (PiSSA, gradient), the half that learns.
        total: All parameters.
    """

    trained: int
    total: int

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """The parameters of a module, which may be built without memory. Shared parameters count once."""
        counted = count_parameters(module)
        return cls(counted.trainable, counted.total)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward of one micro-batch, counted on the operations that run.

    Our fused linear layers choose the order of their products by shape, so the count is below the formula of the
    written-out update ``4 T di do + 6 T r (di + do)`` where a cheaper order exists. The first layer needs no gradient
    of its input. Attention and the output layer, which the formula leaves out, count.

    Args:
        method: Operations of the method that is planned.
        full: Operations of full fine-tuning of the same model on the same batch.
    """

    method: int
    full: int

    @property
    def ratio(self) -> float:
        """The share of full fine-tuning's operations. Operations, not time: that also depends on memory traffic."""
        return self.method / self.full


# Measured on runs of 21 to 126 trained tensors: names and places of tensors, random states, position in loops and data.
_NAME_IN_ADAPTER, _NAME_IN_CHECKPOINT, _STATES = 124, 1_400, 52_000
"""Bytes beside the numbers: of a tensor in an adapter file and in a checkpoint, and of a checkpoint."""


@dataclass(frozen=True)
class Disk:
    """Bytes of the files of a run, within some kilobytes.

    Args:
        adapter: ``adapter_model.safetensors``, with modules that are trained in full; 0 without adapters.
        optimizer: The state of the optimizer, which is a part of each checkpoint.
        checkpoint: A checkpoint to continue from as this package writes it: with adapters, without frozen weights.
        whole_checkpoint: A checkpoint with all weights.
    """

    adapter: int
    optimizer: int
    checkpoint: int
    whole_checkpoint: int

    @classmethod
    def of(cls, memory: MemoryParts, module: nn.Module) -> Disk:
        """The files of a run."""
        trained = [parameter.nbytes for parameter in module.parameters() if parameter.requires_grad]
        beside = memory.optimizer + _STATES + len(trained) * _NAME_IN_CHECKPOINT
        whole = memory.weights + memory.adapters + beside
        if not memory.adapters:
            return cls(0, memory.optimizer, whole, whole)
        adapter = sum(trained) + len(trained) * _NAME_IN_ADAPTER
        return cls(adapter, memory.optimizer, sum(trained) + beside, whole)


@dataclass(frozen=True)
class StepWork:
    """What one micro-batch asks of a device.

    Args:
        method: ``"lora"``, ``"qlora"`` or ``"full"``.
    """

    memory: MemoryParts
    linears: int
    method: str


def seconds_from_table(step: StepWork, run: RunWork, device: Device, precision: object) -> RunSeconds | None:
    """Time of a run by the speed of a device; None if its speed at this precision is not known.

    A micro-batch takes the longest of: its operations at the peak times the efficiency, reading the weights in forward
    and backward, and the launches of the host; on a CPU their sum. An optimizer step reads and writes gradients and
    optimizer state once. Exchange between devices is not in it.
    """
    dtype = compute_dtype(precision)
    peak = device.flops.get(dtype)
    if peak is None:
        return None
    memory, speed = step.memory, peak * device.efficiency
    flops = run.work.mean(run.shapes)
    bounds = {"arithmetic": flops / speed}
    optimizer = 0.0
    if device.bandwidth is not None:
        bounds["memory traffic"] = 2 * memory.weights / device.bandwidth
        optimizer = (3 * memory.gradients + 2 * memory.optimizer) / device.bandwidth
    launches = SECONDS_PER_LINEAR_ON_CPU if device.kind == "cpu" else SECONDS_PER_LINEAR
    bounds["launches of the host"] = SECONDS_PER_BATCH + step.linears * launches[step.method]
    bound = max(bounds, key=lambda name: bounds[name])
    # A CPU computes what it launches, one after the other.
    batch = sum(bounds.values()) if device.kind == "cpu" else bounds[bound]
    training = run.micro_batches * batch + run.steps * optimizer
    validation = 0.0
    if run.validation_batches and run.validation.shapes:
        of_all = run.work.mean(run.validation.shapes) / flops
        validation = FORWARD[step.method] * of_all * batch * run.validation_batches
    total = training + validation
    low, high, known = _sureness(device, dtype)
    how = (
        f"{device.source}: {bound} decides, at {device.efficiency:.0%} of {peak / 1e12:.4g} TFLOP/s ({dtype}); "
        f"{known}: {low:g} to {high:g} times this"
    )
    source = PRODUCT if device.is_timed else TABLE
    return RunSeconds(
        total, low * total, high * total, training / max(1, run.steps), validation, source, how, run.passes or 0
    )


def _sureness(device: Device, dtype: str) -> tuple[float, float, str]:
    """The interval of a time from the table, relative to it, and why."""
    if device.is_timed:
        return LOW_ELSEWHERE, HIGH_ELSEWHERE, "the share was measured on one CPU"
    if device.efficiency != EFFICIENCY:
        return LOW_ELSEWHERE, HIGH_ELSEWHERE, "an efficiency of yours"
    fitted = "the efficiency was fitted to four steps of one H100 and tested on no others"
    if dtype == "bfloat16" and device.source == "data sheet of h100":
        return LOW, HIGH, fitted
    return LOW_ELSEWHERE, HIGH_ELSEWHERE, f"{fitted}, carried over to this device and type"


def compute_dtype(precision: object) -> str:
    """The type in which products are computed at a Trainer's ``precision``."""
    name = str(precision)
    if name.startswith(("bf16", "transformer-engine")):
        return "bfloat16"
    if name.startswith("64"):
        return "float64"
    return "float16" if name.startswith("16") else "float32"
