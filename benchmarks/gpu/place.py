"""Where a part runs and how large it is, and how its times are taken."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Clock


class Notes(dict[str, Any]):
    """What a part has found so far, on disk at once: a part that is ended keeps what it had."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self, indent=1, default=str))


@dataclasses.dataclass
class Place:
    """Where and how large."""

    dry: bool
    out: Path
    name: str = ""

    @functools.cached_property
    def found(self) -> Notes:
        return Notes(self.out / f"{self.name}.json")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def pick(self, real: Any, toy: Any) -> Any:
        return toy if self.dry else real

    def sync(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def peak(self) -> float:
        return 0.0 if self.dry else torch.cuda.max_memory_allocated() / 2**30

    def fresh(self) -> None:
        if not self.dry:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def milliseconds(place: Place, function: Callable[[], object], repetitions: int = 20, warmups: int = 5) -> float:
    """Median; by events on a GPU, each call alone."""
    times = []
    for _ in range(warmups + repetitions):
        clock = Clock(place.device)
        function()
        clock.mark()
        times += clock.intervals()
    return statistics.median(times[warmups:]) * 1e3


def host_milliseconds(place: Place, function: Callable[[], object], repetitions: int = 10) -> float:
    """How long the host takes to ask for it, the device not waited for: launch-bound where above the device's time."""
    function()
    times = []
    for _ in range(repetitions):
        place.sync()
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    place.sync()
    return statistics.median(times)


def error(found: Tensor, right: Tensor) -> float:
    """Relative, 2-norm; NaN does not pass as small."""
    return float((found.double() - right.double()).norm() / right.double().norm())
