"""How a strategy divides the memory of a training step among devices."""

from __future__ import annotations

from dataclasses import replace

from lightning_lora.errors import StrategyError, check_count, did_you_mean
from lightning_lora.memory.parts import MemoryParts

SINGLE = ("single", "auto")
SHARDED = ("fsdp2", "fsdp")
STRATEGIES = (*SINGLE, "ddp", "deepspeed", *SHARDED)
"""Names of the files in ``cli_configs/strategy``, and ``auto``, which is one device or DDP."""
GATHERED_LAYERS = 2
"""Layers whose weights FSDP holds whole at a time: the one that computes and the one that it fetches meanwhile."""
_ZERO_BUCKET = 200_000_000 * 4
"""Bytes of DeepSpeed's bucket for gradients: Lightning's ``reduce_bucket_size`` in float32."""


def divide_memory(memory: MemoryParts, strategy: str, devices: int, *, layer: int = 0) -> MemoryParts:
    """What one of ``devices`` holds at the peak, from what a single device would hold.

    DDP adds a copy of the gradients, its buckets. ZeRO-2 (``deepspeed``) splits gradients and optimizer, and adds a
    bucket. FSDP splits weights, adapters, gradients and optimizer, and adds the layers that are whole at a time.
    Activations are those of the micro-batch of one device and are never divided.

    Args:
        memory: Bytes of one device, from `trace_step`.
        strategy: One of ``single``, ``auto``, ``ddp``, ``deepspeed`` (ZeRO-2), ``fsdp2`` and ``fsdp``.
        devices: Number of devices.
        layer: Bytes of the largest layer, `StepTrace.largest_layer`, for FSDP.

    Raises:
        ConfigError: If the strategy is unknown, or several devices are given to a single one.
    """
    if strategy not in STRATEGIES:
        raise StrategyError(
            f"the memory of strategy {strategy!r} is not known: {', '.join(STRATEGIES)}"
            f"{did_you_mean(strategy, STRATEGIES)}"
        )
    check_count("devices", devices, StrategyError)
    if strategy == "single" and devices > 1:
        raise StrategyError(f"strategy 'single' is one device, got devices={devices}: use ddp or fsdp2.")
    if devices == 1:
        return memory
    if strategy in ("ddp", "auto"):
        return replace(memory, overhead=memory.overhead + memory.gradients)
    gradients, optimizer = _share(memory.gradients, devices), _share(memory.optimizer, devices)
    if strategy == "deepspeed":
        bucket = min(_ZERO_BUCKET, memory.gradients)
        return replace(memory, gradients=gradients, optimizer=optimizer, overhead=memory.overhead + bucket)
    return replace(
        memory,
        weights=_share(memory.weights, devices),
        adapters=_share(memory.adapters, devices),
        gradients=gradients,
        optimizer=optimizer,
        overhead=memory.overhead + min(GATHERED_LAYERS * layer, memory.weights + memory.adapters),
    )


def _share(num_bytes: int, devices: int) -> int:
    return -(-num_bytes // devices)
