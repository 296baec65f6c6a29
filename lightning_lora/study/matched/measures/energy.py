"""The energy that a GPU has used, where its driver counts it: NVIDIA GPUs since Volta."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

_LIBRARY = "libnvidia-ml.so.1"


def joules(device: torch.device) -> float | None:
    """The energy that a GPU has used since its driver was loaded, by all processes on it; None where none is told."""
    if device.type != "cuda":
        return None
    library = _driver()
    if library is None:
        return None
    handle, used = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(used)):
        return None
    return used.value / 1000


@cache
def _driver() -> Any | None:
    """The library of the driver, which needs no package; None where it is absent."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
