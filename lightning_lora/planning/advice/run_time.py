"""The time of a planned run: from batches timed here, from the speed of a product here, or from a data sheet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule

from lightning_lora.errors import LoRAError, PlanError, first_line
from lightning_lora.planning.cost import RunSeconds, RunWork, StepWork, compute_dtype, seconds_from_table
from lightning_lora.planning.devices import EFFICIENCY, Device, Devices
from lightning_lora.planning.timed_steps import time_steps
from lightning_lora.planning.timing.stopwatch import WARM_UP

SHARE_OF_PRODUCT = 0.5
"""Share of a timed product's FLOP/s that training reaches: 0.42 to 0.65 on one Xeon core (docs/understand/plan.md)."""
AUTO_SECONDS, AUTO_BYTES = 2.0, 2**28
"""Batches are timed without being asked for if they take at most so long, and the weights that are read so much."""
ASKED_SECONDS = 60.0
"""Seconds of batches that are timed when they are asked for."""
_MOST_SECONDS = 2 * ASKED_SECONDS
"""Most seconds, for the fewest batches of one row may take longer."""
_BATCHES = 6
_SIDES = {"cpu": 768}
"""Side of the square product by kind of device: milliseconds on a core, enough for a GPU to be busy."""
_OTHER_SIDE, _SECONDS = 4096, 0.15


@dataclass(frozen=True)
class Trial:
    """What is trained for a moment to time it.

    Args:
        module: The module as it will be trained, not built yet.
        rows: Rows of a micro-batch of the run.
    """

    module: Callable[[], LightningModule]
    data: LightningDataModule
    trainer: Mapping[str, Any]
    rows: int


def run_time(
    step: StepWork, run: RunWork, devices: Devices, precision: object, trial: Trial, calibrate: bool | None
) -> RunSeconds | None:
    """The time of a run; None if nothing is known of the device.

    Args:
        calibrate: Whether to time some batches. None times them if that takes a few seconds.

    Raises:
        ConfigError: If batches shall be timed for devices that are not here, or do not fit into memory.
    """
    if calibrate and not devices.is_here:
        raise PlanError("calibrate times batches on this machine: leave out memory and the name of a device.")
    timed = _with_product(devices.device, precision) if devices.is_here else devices.device
    told = seconds_from_table(step, run, timed, precision)
    if calibrate is False or not devices.is_here or told is None:
        return told
    per_row = _seconds_of_row(run, told)
    budget = ASKED_SECONDS if calibrate else AUTO_SECONDS
    rows = trial.rows
    while rows > 1 and per_row * rows * (WARM_UP + _BATCHES) > budget:
        rows //= 2
    least = per_row * rows * (WARM_UP + 2)
    if calibrate is None:
        if least > AUTO_SECONDS or step.memory.weights > AUTO_BYTES:
            return replace(told, how=f"{told.how}; --calibrate times some batches")
    elif least > _MOST_SECONDS:
        why = f"{WARM_UP + 2} batches of one row would take about {least / 60:,.0f} minutes here"
        return replace(told, how=f"{told.how}; not timed: {why}")
    elif step.memory.total > devices.memory:
        raise PlanError(f"calibrate trains some batches, and they do not fit into {devices}.")
    if calibrate:
        print(f"training on some batches, for at most {_MOST_SECONDS:.0f} seconds", file=sys.stderr)
    try:
        times = time_steps(trial.module(), trial.data, trial.trainer, rows=rows, batches=_BATCHES, max_seconds=budget)
    except (OSError, LoRAError) as error:  # a model may be planned from its config alone
        if calibrate:
            raise
        return replace(told, how=f"{told.how}; not timed: {first_line(error)}")
    return told if times is None else times.for_run(run)


def _with_product(device: Device, precision: object) -> Device:
    """A device here; without a data sheet a product is timed on it."""
    if device.flops:
        return device
    dtype = compute_dtype(precision)
    share = SHARE_OF_PRODUCT if device.efficiency == EFFICIENCY else device.efficiency
    speed = {dtype: product_speed(dtype, device.kind)}
    return replace(device, flops=speed, efficiency=share, source=f"a product timed on {device.name}", is_timed=True)


def _seconds_of_row(run: RunWork, told: RunSeconds) -> float:
    """Seconds of one row by a first estimate."""
    rows = max(shape.rows for shape in run.shapes)
    return (told.total - told.validation) / max(1, run.micro_batches) / rows


def product_speed(dtype: str, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOP/s of a product of two square matrices, the best of those that fit into 0.15 seconds."""
    side = _SIDES.get(device, _OTHER_SIDE)
    left, right = (torch.ones(side, side, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    best, begun, count = float("inf"), clock(), 0
    # The first product prepares what the others use.
    while count < 3 or clock() - begun < _SECONDS:
        start = clock()
        torch.mm(left, right)
        if device != "cpu":
            torch.accelerator.synchronize()
        best, count = min(best, clock() - start), count + 1
    return 2 * side**3 / best
