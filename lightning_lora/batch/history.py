"""The noise scale of a run as it goes: samples of single steps, older ones counting less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.batch.noise.noise_scale import NoiseScale, combine
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.state import MIN_MEASURED

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


SPACES = ("adam", "weight")


class NoiseSpaces:
    """Keeps a history of each, and names its estimates.

    Unlike the noise scale of the adapter gradient two numbers can be compared between ranks of adapters: that in Adam's
    metric, and ``lambda``, the frozen weights' over the adapters'. Neither says what a batch costs.
    """

    def __init__(self) -> None:
        self._histories: dict[str, NoiseHistory] = {}
        self._fresh: tuple[str, ...] = ()

    def clear(self) -> None:
        """Forget all samples."""
        self._histories, self._fresh = {}, ()

    def add(self, samples: Mapping[str, StepSample], rows_seen: int, half_life: float) -> None:
        """Take in what a step that ended ``rows_seen`` rows into the run has of these spaces."""
        self._fresh = tuple(space for space in SPACES if space in samples)
        for space in self._fresh:
            history = self._histories.setdefault(space, NoiseHistory(half_life, MIN_MEASURED))
            history.half_life = half_life
            history.add(samples[space].signal, samples[space].trace, rows_seen)

    def estimates(self) -> dict[str, NoiseScale]:
        """The noise scale of each space that was measured, rows."""
        return {space: history.estimate() for space, history in self._histories.items()}

    def numbers(self, adapter: NoiseScale | None) -> dict[str, float]:
        """What the latest step has changed, by the names it is logged under; 1 and 0 stand for yes and no."""
        found: dict[str, float] = {}
        for space in self._fresh:
            estimate = self._histories[space].estimate()
            found |= {f"gns/{space}": estimate.value, f"gns/{space}_conclusive": float(estimate.conclusive)}
            if space == "weight" and adapter is not None:
                both = adapter.conclusive and estimate.conclusive
                found |= {"gns/lambda": estimate.value / adapter.value, "gns/lambda_conclusive": float(both)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {space: history.state_dict() for space, history in self._histories.items()}

    def load_state_dict(self, state: Mapping[str, Any], half_life: float) -> None:
        """Go on from what `state_dict` gave."""
        self.clear()
        for space, history in state.items():
            self._histories[space] = NoiseHistory(half_life, MIN_MEASURED)
            self._histories[space].load_state_dict(history)
