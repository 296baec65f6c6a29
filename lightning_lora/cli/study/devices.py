"""A worker for each GPU of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def start_workers(
    devices: Sequence[str], arguments: Sequence[str], allowed: Sequence[str]
) -> list[subprocess.Popen[bytes]]:
    """Start a worker on every GPU but the first one, which this process keeps for itself.

    Args:
        devices: All GPUs.
        arguments: What follows ``study`` on the command line.
        allowed: Prefixes of class paths that a config may name.
    """
    if len(devices) < 2:
        return []
    os.environ[VISIBLE] = devices[0]
    more = [word for prefix in allowed for word in ("--allow", prefix)]
    command = [sys.executable, "-m", "lightning_lora", *more, "study", *arguments, "--worker"]
    return [subprocess.Popen(command, env=os.environ | {VISIBLE: device}) for device in devices[1:]]
