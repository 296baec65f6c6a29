"""The peak memory of a run that happens: allocated on a GPU, else resident in this process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since `restart_peak` or the start of the process, in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not `getrusage`, which begins with the peak of the process that started this one.
    if (status := _PROC / "status").is_file():
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(found[0].split()[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak(device: torch.device) -> None:
    """Forget earlier peaks, where the system can: on CUDA and on Linux."""
    if device.type == "cuda":
        if torch.cuda.is_initialized():  # before that torch knows no device, and nothing is allocated
            torch.cuda.reset_peak_memory_stats(device)
        return
    # Where there is no such file, or a container forbids it, the earlier peak stays.
    with suppress(FileNotFoundError, PermissionError):
        (_PROC / "clear_refs").write_text("5")  # proc(5): the peak becomes what is resident now


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    sizes = _PROC / "statm"
    return int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if sizes.is_file() else None
