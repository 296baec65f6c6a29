"""Where a run was made: hardware, threads, versions, and whether others used the machine meanwhile."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that leaves nothing behind and prints nothing."""


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to compare numbers with another run's."""
    packages = ("torch", "transformers", "peft", "lightning")
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float | None:
    """Mean number of runnable processes in the last minute; None where the system does not say (Windows)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def disturbed(before: float | None, after: float | None) -> bool | None:
    """Whether the load exceeded the cores, before or after the run; None where it is not known."""
    if before is None or after is None:
        return None
    # Our own threads are part of the load after; the average never quite settles at their number.
    return max(before, after) > cores() + 0.2


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
