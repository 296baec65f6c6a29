"""How often a study of preferences puts the answer that people chose first, on the rows of its verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.study.matched.options import option_of
from lightning_lora.study.matched.record import StudyRecord
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.crossed import paired_interval
from studies.modules.pages import markdown_table, read_lines

ACCURACY = "accuracy.csv"
_ALPHA = 0.025


def is_of_pairs(record: StudyRecord) -> bool:
    """Whether the rows of a study are pairs, each with the loss ``-log sigmoid(margin)``."""
    return str(option_of(record.arms[0].config, "data.class_path")).endswith("PreferenceDataModule")


def accuracy_lines(arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """A line for each arm with runs: the mean over seeds and rows, and its 95 % interval over both.

    A pair is right where its loss is below ``log 2``: the margin is above zero.
    """
    lines = []
    for name, arm in arms.items():
        if not arm.losses:
            continue
        right = np.stack([arm.rows(seed) < math.log(2) for seed in sorted(arm.losses)]).astype(float)
        found = paired_interval(right, alpha=_ALPHA)
        each = " ".join(f"{mean:.3f}" for mean in right.mean(1))
        numbers = {key: f"{getattr(found, key):.4f}" for key in ("mean", "low", "high")}
        lines.append({"arm": name, "pairs": right.shape[1], "each": each, **numbers})
    return lines


def accuracy_table(folder: Path) -> str:
    """A line for each arm."""
    rows = [
        (line["arm"], line["pairs"], line["each"], f"{line['mean']} ({line['low']} to {line['high']})")
        for line in read_lines(folder / ACCURACY)
    ]
    return markdown_table(("arm", "pairs", "right, each seed", "right, mean of seeds (95 % interval)"), rows)
