"""Arms with planted losses."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_lora.study.statistics.arm import Arm

FULL = "full fine-tuning"


def arm(name: str, *losses: float, **options: Any) -> Arm:
    """An arm with one loss for each of the seeds 0, 1, ..."""
    return Arm(name, dict(enumerate(losses)), **options)


def pair(*differences: float, **options: Any) -> tuple[Arm, Arm]:
    """Rank 16 and full fine-tuning, which differ by ``differences`` in seeds of their own."""
    base = 1 + 0.01 * np.arange(len(differences))
    return arm("rank 16", *(base + differences), **options), arm(
        FULL, *base, base_loss=options.get("base_loss", np.inf)
    )
