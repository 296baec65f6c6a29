"""The noise scale of a run as it goes: samples of single steps, older ones counting less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.functional.noise_scale import NoiseScale, combine

# Older samples count less than a thousandth.
_FORGOTTEN_HALF_LIVES = 10


class NoiseHistory:
    """Samples of measured steps, older ones counting less: signal falls early in training, and noise with it.

    Args:
        half_life: Rows after which a sample counts half, but never before ``min_samples`` later ones.
        min_samples: Of fewer, no interval would be believed.

    Attributes:
        num_measured: Samples that were ever added.
    """

    def __init__(self, half_life: float, min_samples: int) -> None:
        self.half_life = half_life
        self.min_samples = min_samples
        self.num_measured = 0
        self._samples: list[tuple[float, float, float]] = []

    def clear(self) -> None:
        """Forget all samples."""
        self.num_measured, self._samples = 0, []

    def add(self, signal: float, trace: float, rows_seen: int) -> None:
        """Count a step that ended ``rows_seen`` rows into the run."""
        self.num_measured += 1
        self._samples.append((float(rows_seen), signal, trace))
        # Ages fall from the oldest sample to the latest.
        del self._samples[: int((self._ages() > _FORGOTTEN_HALF_LIVES).sum())]

    def estimate(self) -> NoiseScale:
        """The noise scale now; at least one sample must be there."""
        _, signals, traces = torch.tensor(self._samples, dtype=torch.float64).T
        return combine(signals, traces, 0.5 ** self._ages())

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"num_measured": self.num_measured, "samples": [list(sample) for sample in self._samples]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.num_measured = state["num_measured"]
        self._samples = [tuple(sample) for sample in state["samples"]]

    def _ages(self) -> Tensor:
        """Half-lives since each sample."""
        rows = torch.tensor([sample[0] for sample in self._samples], dtype=torch.float64)
        by_rows = (rows[-1] - rows) / self.half_life
        by_samples = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64) / self.min_samples
        return torch.minimum(by_rows, by_samples)
