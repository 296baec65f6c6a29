"""Timing several contenders in turns, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from benchmarks.contenders import Trainee
from benchmarks.workloads import Batch

T = TypeVar("T")


class Phases(NamedTuple):
    """Seconds of one training step: its parts, and the whole with ``zero_grad``."""

    forward: float
    backward: float
    optimizer: float
    step: float


class Spread(NamedTuple):
    """Median, smallest, and 10th and 90th percentile."""

    median: float
    min: float
    p10: float
    p90: float


class Clock:
    """Marks in time; on a GPU those of its stream, so that reading them costs one synchronisation at the end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[float] = []
        self.events: list[torch.cuda.Event] = []
        if self.on_gpu:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Remember now."""
        if self.on_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Seconds between neighbouring marks."""
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.events)]
        return [b - a for a, b in itertools.pairwise(self.marks)]


def train_step(trainee: Trainee, batch: Batch) -> Phases:
    """One training step, timed."""
    clock = Clock(batch.input_ids.device)
    loss = trainee.loss(trainee.model, batch)
    clock.mark()
    loss.backward()
    clock.mark()
    if trainee.optimizer is not None:
        trainee.optimizer.step()
        trainee.optimizer.zero_grad(set_to_none=True)
    clock.mark()
    forward, backward, optimizer = clock.intervals()
    return Phases(forward, backward, optimizer, forward + backward + optimizer)


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Of one call on the CPU, the mean of several."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def interleave(
    measures: Mapping[str, Callable[[], T]], repetitions: int, warmups: int, seed: int = 0
) -> dict[str, list[T]]:
    """What the measures return, each called once a repetition in an order drawn anew, less the warm-up repetitions."""
    order, drawn = list(measures), random.Random(seed)
    found: dict[str, list[T]] = {name: [] for name in measures}
    # A collection within a step would be charged to whoever happens to be running. Those between repetitions look
    # only at what has come since.
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        for repetition in range(-warmups, repetitions):
            drawn.shuffle(order)
            gc.collect()
            for name in order:
                value = measures[name]()
                if repetition >= 0:
                    found[name].append(value)
    finally:
        gc.unfreeze()
        gc.enable()
    return found


def spread(values: Sequence[float]) -> Spread:
    """Of any number of values; percentiles are interpolated.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, min=1.0, p10=1.2, p90=2.8)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), min(values), tenths[0], tenths[-1])


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> Spread:
    """Of the ratios within each repetition: what slows both cancels."""
    return spread([a / b for a, b in zip(times, others, strict=True)])
