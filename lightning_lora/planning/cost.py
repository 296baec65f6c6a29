"""What a run costs: floating-point operations against full fine-tuning, disk, and time from data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_lora.memory.parts import MemoryParts
from lightning_lora.planning.devices import Device

# All measured on one H100 in bfloat16 (docs/gpu.md). The share of the peak was 0.28 to 0.42, `EFFICIENCY` lies between.
# Where micro-batches are small, the host launches slower than the GPU computes: Llama-1B (112 linear layers) with 1,024
# tokens took 106 ms with adapters and 55 ms in full; eight of its layers under a Trainer 74, 43, and 111 ms in NF4.
SECONDS_PER_LINEAR = {"lora": 0.95e-3, "qlora": 1.66e-3, "full": 0.49e-3}
"""Seconds in which the host launches forward and backward of one linear layer, by method."""
SECONDS_PER_BATCH = 0.018
"""Seconds of the host that a Trainer adds to a micro-batch."""
LOW, HIGH = 0.75, 1.35
"""The interval of a time from the table, relative to it: what these measurements were apart from it, and a little."""
LOW_ELSEWHERE, HIGH_ELSEWHERE = 0.5, 2.0
"""The same for devices and types that were never measured."""
TABLE, TIMED = "device table", "steps timed here"


@dataclass(frozen=True)
class RunSeconds:
    """How long the optimizer steps of a run take. Loading the model and reading the data are not in it.

    Args:
        total: Seconds of all steps, and of validation where it is known.
        low: Lower end of the interval of ``total``.
        high: Upper end.
        per_step: Seconds of one optimizer step.
        source: ``"steps timed here"`` or ``"device table"``.
        how: How the number came about and how sure it is, in one sentence.
    """

    total: float
    low: float
    high: float
    per_step: float
    source: str
    how: str


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; those of 4-bit weights count as what they stand for.

    Args:
        trained: Parameters that are trained.
        total: All parameters.
    """

    trained: int
    total: int

    @classmethod
    def of(cls, module: nn.Module) -> Parameters:
        """The parameters of a module, which may be built without memory. Shared parameters count once."""
        sizes = [(_size(parameter), parameter.requires_grad) for parameter in module.parameters()]
        return cls(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of forward and backward of one micro-batch, counted on the operations that run.

    Our fused linear layers choose the order of their products by shape, so the count is below the formula of the
    written-out update ``4 T di do + 6 T r (di + do)`` where a cheaper order exists. The first layer needs no gradient
    of its input. Attention and the output layer, which the formula leaves out, count.

    Args:
        method: Those of the method that is planned.
        full: Those of full fine-tuning of the same model on the same batch.
    """

    method: int
    full: int

    @property
    def ratio(self) -> float:
        """The share of full fine-tuning's operations. Operations, not time: that also depends on memory traffic."""
        return self.method / self.full


@dataclass(frozen=True)
class Disk:
    """Bytes of the files of a run.

    Args:
        adapter: An adapter folder; 0 without adapters.
        checkpoint: A checkpoint to continue from as this package writes it: with adapters, without frozen weights.
        whole_checkpoint: A checkpoint with all weights.
    """

    adapter: int
    checkpoint: int
    whole_checkpoint: int

    @classmethod
    def of(cls, memory: MemoryParts) -> Disk:
        """The files of a run whose step takes this memory on a device that holds the whole model."""
        whole = memory.weights + memory.adapters + memory.optimizer
        adapted = memory.adapters + memory.optimizer
        return cls(memory.adapters, adapted if memory.adapters else whole, whole)


@dataclass(frozen=True)
class StepWork:
    """The work of one optimizer step on one device.

    Args:
        flops: Floating-point operations of a micro-batch of usual size.
        memory: Memory of the step.
        micro_batches: Forward and backward passes of an optimizer step.
        linears: Linear layers of the model.
        method: ``"lora"``, ``"qlora"`` or ``"full"``.
    """

    flops: float
    memory: MemoryParts
    micro_batches: int
    linears: int
    method: str


def seconds_from_table(work: StepWork, device: Device, precision: object, steps: int) -> RunSeconds | None:
    """Time of a run by a device's data sheet; None if the device or its speed at this precision is not known.

    A micro-batch takes the longest of: its operations at the peak times the efficiency, reading the weights in forward
    and backward, and the launches of the host. An optimizer step reads and writes gradients and optimizer state once.
    Exchange between devices is not in it.
    """
    dtype = compute_dtype(precision)
    peak = device.flops.get(dtype)
    if peak is None or device.bandwidth is None:
        return None
    memory = work.memory
    bounds = {
        "arithmetic": work.flops / (peak * device.efficiency),
        "memory traffic": 2 * memory.weights / device.bandwidth,
        "launches of the host": SECONDS_PER_BATCH + work.linears * SECONDS_PER_LINEAR[work.method],
    }
    bound = max(bounds, key=lambda name: bounds[name])
    optimizer = (3 * memory.gradients + 2 * memory.optimizer) / device.bandwidth
    per_step = work.micro_batches * bounds[bound] + optimizer
    measured = dtype == "bfloat16" and "h100" in device.source and "-" not in device.source
    low, high = (LOW, HIGH) if measured else (LOW_ELSEWHERE, HIGH_ELSEWHERE)
    known = "measured on an H100" if measured else "never measured on this device and type, carried over from an H100"
    how = (
        f"{device.source}: {bound} decides, at {device.efficiency:.0%} of {peak / 1e12:.4g} TFLOP/s ({dtype}); "
        f"{known}: {low:g} to {high:g} times this"
    )
    total = per_step * steps
    return RunSeconds(total, low * total, high * total, per_step, TABLE, how)


def compute_dtype(precision: object) -> str:
    """The type in which products are computed at a Trainer's ``precision``."""
    name = str(precision)
    if name.startswith(("bf16", "transformer-engine")):
        return "bfloat16"
    if name.startswith("64"):
        return "float64"
    return "float16" if name.startswith("16") else "float32"


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs two values in a byte
    shape = getattr(state, "shape", None)
    return parameter.numel() if shape is None else int(shape.numel())
