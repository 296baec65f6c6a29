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


# Vendors print FLOP/s with 2:4 sparsity for most devices since Ampere; the numbers here are dense, half of it. float32
# is that of the vector units, because torch does not use TF32 unless it is asked to. Memory is what nvidia-smi and
# rocm-smi show of the device, a little less than the vendor's number.
DATA_SHEETS: dict[str, DataSheet] = {
    # NVIDIA HGX B200 data sheet, eight GPUs: 36 PFLOP/s with sparsity, 600 TFLOP/s in float32; DGX B200: 64 TB/s
    "b200": _sheet(183_359, 75, 2250, 8000, "b200"),
    # NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, 4.8 TB/s
    "h200": _sheet(143_771, 67, 989.4, 4800, "h200"),
    # NVIDIA H100 data sheet: 1,979 (SXM), 1,513 (PCIe), 1,671 (NVL) TFLOP/s with sparsity; 3.35, 2 and 3.9 TB/s.
    # The Hopper white paper has one more digit.
    "h100": _sheet(81_559, 66.9, 989.4, 3350, "h100"),
    "h100-pcie": _sheet(81_559, 51.2, 756, 2000, "h100 pcie"),
    "h100-nvl": _sheet(95_830, 60, 835.5, 3900, "h100 nvl"),
    # NVIDIA A100 data sheet 1758950 r4, SXM: 312 TFLOP/s, 2,039 and 1,555 GB/s
    "a100": _sheet(81_920, 19.5, 312, 2039, "a100"),
    "a100-40gb": _sheet(40_960, 19.5, 312, 1555, "a100 40gb"),
    # NVIDIA L40S data sheet: 362.05 TFLOP/s, 733 with sparsity, 864 GB/s; L4: 242 TFLOP/s with sparsity, 300 GB/s
    "l40s": _sheet(46_068, 91.6, 362, 864, "l40s"),
    "l4": _sheet(23_034, 30.3, 121, 300, "l4"),
    # NVIDIA A10 data sheet: 125 TFLOP/s, 250 with sparsity, 600 GB/s
    "a10": _sheet(23_028, 31.2, 125, 600, "a10"),
    # NVIDIA T4 data sheet 951643: 65 TFLOP/s, 300 GB/s; V100 data sheet 1165301 r5, SXM2: 125 TFLOP/s, 900 GB/s.
    # Both are older than bfloat16.
    "t4": _sheet(15_360, 8.1, 65, 300, "t4", bfloat16=False),
    "v100": _sheet(32_768, 15.7, 125, 900, "v100", bfloat16=False),
    # NVIDIA GA102 white paper v2.1, appendix A, and Ada white paper, appendix A: tensor cores with float32 sums, which
    # are half as fast there as with float16 sums; 936 and 1,008 GB/s
    "rtx3090": _sheet(24_576, 35.6, 71, 936, "rtx 3090"),
    "rtx4090": _sheet(24_564, 82.6, 165.2, 1008, "rtx 4090"),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOP/s, 163.4 in float32, 5.3 TB/s
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
