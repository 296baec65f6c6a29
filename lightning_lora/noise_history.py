"""The noise scale of a run as it goes: samples of single steps, older ones counting less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_lora.functional.noise_scale import NoiseScale, combine
from lightning_lora.step_sample import StepSample

# Older samples count less than a thousandth.
_FORGOTTEN_HALF_LIVES = 10


class NoiseHistory:
    """Samples of measured steps, weighted by a half-life in rows: signal falls early in training, and noise with it.

    Args:
        half_life: Rows after which a sample counts half.
    """

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self._samples: list[tuple[float, float, float]] = []

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, sample: StepSample, rows_seen: int) -> None:
        """Count a step that ended ``rows_seen`` rows into the run."""
        oldest = rows_seen - _FORGOTTEN_HALF_LIVES * self.half_life
        kept = [past for past in self._samples if past[0] >= oldest]
        self._samples = [*kept, (float(rows_seen), sample.signal, sample.trace)]

    def estimate(self) -> NoiseScale:
        """The noise scale now; at least one sample must be there."""
        rows, signals, traces = torch.tensor(self._samples, dtype=torch.float64).T
        return combine(signals, traces, 0.5 ** ((rows[-1] - rows) / self.half_life))

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"half_life": self.half_life, "samples": [list(sample) for sample in self._samples]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.half_life = state["half_life"]
        self._samples = [tuple(sample) for sample in state["samples"]]
