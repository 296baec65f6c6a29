"""Data sheets of devices: memory, peak FLOP/s without sparsity, and memory bandwidth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_MIB = 2**20
_LESSER = {"laptop", "ti", "super", "max-q", "mobile"}
"""Words of another, unlisted device whose name contains that of a listed one."""


@dataclass(frozen=True)
class DataSheet:
    """What a vendor says of a device.

    Args:
        memory: Bytes that its driver reports, which is a little less than the vendor's number.
        flops: Peak FLOP/s of a matrix product by dtype, without sparsity and with float32 sums. A dtype that the device
            does not compute fast is absent.
        bandwidth: Bytes per second of its memory.
        words: Words in the name that the driver gives, lower case.
    """

    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    words: frozenset[str] = field(default_factory=frozenset)


def _sheet(mib: int, float32: float, half: float, bandwidth: float, words: str, bfloat16: bool = True) -> DataSheet:
    """A data sheet from MiB, TFLOP/s and GB/s."""
    flops = {"float32": float32 * 1e12, "float16": half * 1e12} | ({"bfloat16": half * 1e12} if bfloat16 else {})
    return DataSheet(mib * _MIB, flops, bandwidth * 1e9, frozenset(words.split()))


# Vendors print FLOP/s with 2:4 sparsity for most devices since Ampere: the numbers here are half of those. float32 is
# that of the vector units, because torch does not use TF32 unless it is asked to. Memory is what nvidia-smi shows.
DATA_SHEETS: dict[str, DataSheet] = {
    # NVIDIA HGX B200 data sheet: 36 PFLOP/s of eight with sparsity
    "b200": _sheet(183_359, 75, 2250, 7700, "b200"),
    # NVIDIA H200 data sheet (SXM): 1,979 TFLOP/s with sparsity
    "h200": _sheet(143_771, 67, 989.4, 4800, "h200"),
    # NVIDIA H100 data sheet: 1,979 (SXM), 1,513 (PCIe), 1,671 (NVL) TFLOP/s with sparsity
    "h100": _sheet(81_559, 66.9, 989.4, 3350, "h100"),
    "h100-pcie": _sheet(81_559, 51.2, 756, 2000, "h100 pcie"),
    "h100-nvl": _sheet(95_830, 60, 835, 3900, "h100 nvl"),
    # NVIDIA A100 data sheet, r4
    "a100": _sheet(81_920, 19.5, 312, 2039, "a100"),
    "a100-40gb": _sheet(40_960, 19.5, 312, 1555, "a100 40gb"),
    # NVIDIA L40S and L4 data sheets: 733 and 242 TFLOP/s with sparsity
    "l40s": _sheet(46_068, 91.6, 362, 864, "l40s"),
    "l4": _sheet(23_034, 30.3, 121, 300, "l4"),
    # NVIDIA A10 data sheet
    "a10": _sheet(23_028, 31.2, 125, 600, "a10"),
    # NVIDIA T4 and V100 data sheets: no bfloat16
    "t4": _sheet(15_360, 8.1, 65, 320, "t4", bfloat16=False),
    "v100": _sheet(32_768, 15.7, 125, 900, "v100", bfloat16=False),
    # NVIDIA GA102 and Ada architecture white papers: half the printed speed where sums are float32
    "rtx3090": _sheet(24_576, 35.6, 71, 936, "rtx 3090"),
    "rtx4090": _sheet(24_564, 82.6, 165.2, 1008, "rtx 4090"),
    # AMD Instinct MI300X data sheet
    "mi300x": _sheet(196_592, 163.4, 1307.4, 5300, "mi300x"),
}


def sheet_of(driver_name: str) -> str | None:
    """The name in the table of a device as its driver calls it; None if it is not listed.

    >>> sheet_of("NVIDIA H100 80GB HBM3"), sheet_of("NVIDIA H100 PCIe"), sheet_of("NVIDIA A100-SXM4-40GB")
    ('h100', 'h100-pcie', 'a100-40gb')
    >>> sheet_of("NVIDIA A10G")
    """
    words = set(re.split(r"[\s-]+", driver_name.lower()))
    found = [name for name, sheet in DATA_SHEETS.items() if sheet.words <= words]
    if words & _LESSER:
        return None
    return max(found, key=lambda name: len(DATA_SHEETS[name].words), default=None)
