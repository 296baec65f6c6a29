"""Where a kernel is used instead of torch: on shapes where it was measured to be faster on this very device.

``measured.json`` holds them by name of the device, then of the kernel, then by type and shape: the smallest and the
largest number of rows between which every measurement was won. ``benchmarks/on_gpu.py`` writes it. The environment
variable ``LIGHTNING_LORA_KERNELS`` decides over all kernels: ``measured`` (the default), ``off``, or ``all``, which
uses them on every shape, measured or not.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.errors import LoRASettingError

SETTING = "LIGHTNING_LORA_KERNELS"
TABLE_FILE = Path(__file__).with_name("measured.json")
KERNELS = ("gate", "gate_apart", "narrow", "cross_entropy")
"""Names in the table: a gate's gradients with its product in one pass, or the two apart; and the other two kernels."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
Table = dict[str, dict[str, dict[str, list[int]]]]


def chosen(kernel: str, shape: str, rows: int, *tensors: Tensor) -> bool:
    """Whether to use a kernel for these tensors.

    Args:
        kernel: Name of the kernel in the table.
        shape: What the time depends on besides the type of the tensors and the number of rows.
        rows: Number of rows; a kernel is never used for none.
        tensors: What the kernel would be given. On a CPU it needs Triton's interpreter (``TRITON_INTERPRET=1``).

    Raises:
        ConfigError: If the environment variable has another value than the three.
    """
    setting = os.environ.get(SETTING, "measured")
    if setting not in ("measured", "off", "all"):
        raise LoRASettingError(f"{SETTING} must be measured, off or all, got {setting!r}.")
    if setting == "off" or (setting == "measured" and not table()):
        return False
    if not rows or not _can_run(tensors):
        return False
    if setting == "all":
        return True
    fewest, most = table().get(device_name(tensors[0].device), {}).get(kernel, {}).get(key(tensors[0], shape), (1, 0))
    return fewest <= rows <= most


def key(tensor: Tensor, shape: str) -> str:
    """How the table calls a shape in the type of ``tensor``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape}"


@functools.cache
def table() -> Table:
    """The table that is shipped."""
    return json.loads(TABLE_FILE.read_text(encoding="utf-8"))


@functools.cache
def device_name(device: torch.device) -> str:
    """How the table calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _can_run(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    on_device = first.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return (
        on_device
        and has_triton()
        and all(
            type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in TYPES and tensor.device == first.device
            for tensor in tensors
        )
    )


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None
