"""What the machine can do at most."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import peft
import torch

from benchmarks.gpu.place import Place, milliseconds


def ceilings(place: Place) -> dict[str, Any]:
    """The machine, what it can do at most, and how narrow products fare."""
    found: dict[str, Any] = place.found
    found.update(_versions())
    if not place.dry:
        found["gpu"] = torch.cuda.get_device_name()
        found["smi"] = _smi()
    n = place.pick(8192, 64)
    a, b = (torch.randn(n, n, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16 TFLOP/s"] = 2 * n**3 / milliseconds(place, lambda: a @ b) / 1e9
    big = torch.randn(place.pick(2**29, 2**10), device=place.device, dtype=torch.bfloat16)
    other = torch.empty_like(big)
    found["copy TB/s"] = 2 * big.numel() * 2 / milliseconds(place, lambda: other.copy_(big)) / 1e9
    for width in place.pick((2048, 4096, 14336), (64,)):
        for rank in (16, 48, 64, 192):
            found |= _narrow_products(place, width, rank)
    shapes = ((2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096))
    for num_in, num_out in place.pick(shapes, ((64, 64),)):
        found[f"{num_in}->{num_out}: beta=1 over alone"] = _cost_of_adding(place, num_in, num_out)
    return found


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": sys.version.split()[0], "peft": peft.__version__}
    for name in ("triton", "transformers", "lightning", "pyarrow", "datasets", "jsonargparse"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError as reason:
            found[name] = f"missing: {reason}"
    return found


def _smi() -> str:
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _narrow_products(place: Place, width: int, rank: int) -> dict[str, float]:
    """TB/s of the five products of a LoRA layer that have a thin side."""
    tokens = place.pick(8192, 64)
    x = torch.randn(tokens, width, device=place.device, dtype=torch.bfloat16)
    A = torch.randn(rank, width, device=place.device, dtype=torch.bfloat16)
    B = torch.randn(width, rank, device=place.device, dtype=torch.bfloat16)
    inner, out = x @ A.T, torch.empty_like(x)
    ways = {
        "x A'": lambda: x @ A.T,
        "S B'": lambda: torch.mm(inner, B.T, out=out),
        "dY B": lambda: x @ B,
        "dS' x": lambda: inner.T @ x,
        "dY' S": lambda: x.T @ inner,
    }
    terabytes = tokens * width * 2 / 1e9
    return {
        f"{way} d={width} r={rank}, TB/s": terabytes / milliseconds(place, call, 10, 3) for way, call in ways.items()
    }


def _cost_of_adding(place: Place, num_in: int, num_out: int) -> float:
    """Time of a product that adds to its output (beta = 1) over that of the product alone."""
    tokens = place.pick(8192, 64)
    x = torch.randn(tokens, num_in, device=place.device, dtype=torch.bfloat16)
    W = torch.randn(num_out, num_in, device=place.device, dtype=torch.bfloat16)
    y = torch.zeros(tokens, num_out, device=place.device, dtype=torch.bfloat16)
    alone = milliseconds(place, lambda: torch.mm(x, W.T, out=y))
    return milliseconds(place, lambda: torch.addmm(y, x, W.T, out=y)) / alone
