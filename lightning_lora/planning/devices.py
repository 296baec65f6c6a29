"""The devices that a run is planned for: those at hand, or those that the user names."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_lora.errors import PlanError, check_count, did_you_mean
from lightning_lora.memory.room import container_limits
from lightning_lora.planning.device_table import DATA_SHEETS, sheet_of

EFFICIENCY = 0.35
"""Share of the peak FLOP/s that training reaches in bfloat16, above a few thousand tokens in a micro-batch.

Chosen to lie between four steps on one H100 (docs/evidence/gpu.md, 8,192 tokens), operations of forward and backward,
with attention, over the time of the step: Llama-1B 0.29 with adapters and 0.37 in full, eight layers of Llama-8B 0.42
and 0.41. No other step tested it.
"""

CUDA_CONTEXT = 820_000_000
"""Bytes beside those that torch allocates: the context of CUDA and the libraries that a run loads.

Measured on one H100 with torch 2.11 and CUDA 13 (docs/evidence/gpu.md).
"""

_UNITS = {"b": 1} | {
    f"{letter}{end}": base**power for power, letter in enumerate("kmgt", 1) for end, base in (("ib", 1024), ("b", 1000))
}


@dataclass(frozen=True)
class Device:
    """One device.

    Args:
        kind: ``"cuda"``, ``"mps"``, ``"cpu"``, or ``"unknown"`` if only its memory was named.
        flops: Peak FLOP/s by dtype (``"float32"``, ``"bfloat16"``, ``"float16"``), empty if not known.
        bandwidth: Bytes per second of its memory; None if not known.
        efficiency: Share of the peak that training reaches.
        source: Where these numbers come from.
        is_timed: Whether ``flops`` is the speed of a product that was timed here, not a data sheet's.
    """

    name: str
    kind: str
    memory: int
    flops: Mapping[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    efficiency: float = EFFICIENCY
    source: str = ""
    is_timed: bool = False

    @property
    def context(self) -> int:
        """Bytes that are taken before a module is there. A device of which only the memory is known counts as a GPU."""
        return CUDA_CONTEXT if self.kind in ("cuda", "unknown") else 0


@dataclass(frozen=True)
class Devices:
    """Equal devices that train together.

    Args:
        is_here: Whether they are in this machine, so that steps can be tried on them.
    """

    device: Device
    count: int
    is_here: bool

    @property
    def memory(self) -> int:
        """Bytes of one device."""
        return self.device.memory

    def __str__(self) -> str:
        where = "here" if self.is_here else "named"
        return f"{self.count} x {self.device.name} with {self.memory / 2**30:.3g} GiB ({where})"


def find_devices(
    memory: str | None = None,
    count: int | None = None,
    name: str | None = None,
    efficiency: float | None = None,
    peak_tflops: float | None = None,
    bandwidth: str | None = None,
    accelerator: Any = None,
) -> Devices:
    """The devices at hand, or others that are named.

    Without arguments all GPUs of this machine, else its CPU. ``count`` alone means so many of those at hand.

    Args:
        memory: Bytes of one device with their unit, ``"24GiB"``. Without ``name`` nothing else is known of it.
        count: Number of devices, at least 1.
        name: A device of the table, ``"h100"``.
        efficiency: Share of the peak FLOP/s that training reaches, above 0 and at most 1; None for the measured one.
        peak_tflops: Peak of a matrix product in every type, 10^12 FLOP/s without sparsity; None for the data sheet's.
        bandwidth: Bytes per second of its memory with their unit, ``"3.35TB"``; None for the data sheet's.
        accelerator: ``accelerator`` of the Trainer; ``"cpu"`` takes the CPU where there are GPUs too.

    Raises:
        ConfigError: If a value is not valid, or the name is not in the table.
    """
    size = None if memory is None else parse_bytes(memory)
    check_count("devices", count, PlanError, optional=True)
    if name is not None:
        found = Devices(_listed(name), 1, is_here=False)
    elif size is not None:
        kind = "cpu" if accelerator == "cpu" else "unknown"
        unknown = Device("unnamed device", kind, size, source="its memory was named, nothing else is known of it")
        found = Devices(unknown, 1, is_here=False)
    else:
        found = _cpu() if accelerator == "cpu" else _at_hand()
    device = found.device if size is None else replace(found.device, memory=size)
    if efficiency is not None:
        device = replace(device, efficiency=_share(efficiency))
    if peak_tflops is not None or bandwidth is not None:
        device = _with_speeds(device, peak_tflops, bandwidth)
    number = found.count if count is None else count
    return Devices(device, number, found.is_here and number <= found.count)


def parse_bytes(text: Any, what: str = "memory") -> int:
    """Bytes from a number with a unit: powers of 1024 are ``KiB``, ``MiB``, ``GiB``, ``TiB``, of 1000 ``KB`` to ``TB``.

    >>> parse_bytes("24GiB"), parse_bytes("24 GB"), parse_bytes("1.5 MiB")
    (25769803776, 24000000000, 1572864)

    Raises:
        ConfigError: If the text is no number, has no unit or an unknown one, or is not above zero.
    """
    written = str(text).strip()
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?|[+-]?\.\d+)\s*([a-zA-Z]*)", written)
    if match is None:
        raise PlanError(f"{what} must be a number with a unit, such as 24GiB, got {written!r}.")
    number, unit = match.groups()
    if unit.lower() not in _UNITS:
        wrong = f"has the unknown unit {unit!r}" if unit else "has no unit"
        raise PlanError(f"{what} {written!r} {wrong}: write {number}GiB (powers of 1024) or {number}GB (of 1000).")
    size = int(float(number) * _UNITS[unit.lower()]) if float(number) > 0 else 0
    if size < 1:
        raise PlanError(f"{what} must be above zero, got {written!r}.")
    return size


def _listed(name: Any) -> Device:
    key = re.sub(r"^(nvidia|amd|geforce)[\s-]+", "", str(name).strip().lower())
    if key not in DATA_SHEETS:
        key = key.replace(" ", "").replace("_", "-")
    if key not in DATA_SHEETS:
        key = sheet_of(str(name)) or key
    if key not in DATA_SHEETS:
        known = ", ".join(DATA_SHEETS)
        raise PlanError(
            f"device {name!r} is not in the table ({known}){did_you_mean(key, DATA_SHEETS)} "
            f"Of other devices give the memory."
        )
    return _from_sheet(key, key, DATA_SHEETS[key].memory)


def _from_sheet(key: str, name: str, memory: int) -> Device:
    sheet = DATA_SHEETS[key]
    return Device(name, "cuda", memory, sheet.flops, sheet.bandwidth, source=f"data sheet of {key}")


def _at_hand() -> Devices:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
        smallest = sizes.index(min(sizes))
        name = torch.cuda.get_device_name(smallest)
        key = sheet_of(name)
        if key is not None:
            return Devices(_from_sheet(key, name, min(sizes)), count, is_here=True)
        return Devices(Device(name, "cuda", min(sizes), source="its driver; no data sheet here"), count, is_here=True)
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        return Devices(Device("Apple GPU", "mps", size, source="the size that Metal recommends"), 1, is_here=True)
    return _cpu()


def _cpu() -> Devices:
    name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return Devices(Device(name, "cpu", machine_memory(), source="the operating system"), 1, is_here=True)


def machine_memory() -> int:
    """Bytes of memory that this process may use: those of the machine, or the limit of its container."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *container_limits()])


def _with_speeds(device: Device, peak_tflops: Any, bandwidth: Any) -> Device:
    """The device with the user's own speeds."""
    flops, speed = device.flops, device.bandwidth
    if peak_tflops is not None:
        is_number = isinstance(peak_tflops, (int, float)) and not isinstance(peak_tflops, bool)
        if not is_number or not 0 < peak_tflops < 1e6:
            raise PlanError(f"peak_tflops must be a number above 0, in 10^12 FLOP/s, got {peak_tflops!r}.")
        flops = dict.fromkeys(("float32", "bfloat16", "float16"), peak_tflops * 1e12)
    if bandwidth is not None:
        speed = float(parse_bytes(str(bandwidth).strip().removesuffix("/s"), "bandwidth"))
    return replace(device, flops=flops, bandwidth=speed, source="speeds of yours", is_timed=False)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise PlanError(f"efficiency must be a number above 0 and at most 1, got {value!r}.")
    return float(value)
