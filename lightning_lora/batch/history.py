"""The noise scale of a run over time, averaged over samples of single steps in which older samples count less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale_of_steps
from lightning_lora.batch.noise.step_sample import StepSample
from lightning_lora.batch.reading import MIN_MEASURED

MIN_HALF_LIFE = 2000.0
"""Least half-life of a sample, rows."""
# After ten half-lives a sample counts less than a thousandth, and is dropped.
_FORGOTTEN_HALF_LIVES = 10
_OTHER_METRICS = ("adam", "weight")


class NoiseHistory:
    """Samples of measured steps in one metric. Signal and noise fall early in training, so older samples count less.

    Attributes:
        half_life: Rows after which a sample counts half. A sample never counts half before `MIN_MEASURED` later ones.
        num_measured: Number of samples ever added.
    """

    def __init__(self) -> None:
        self.half_life = MIN_HALF_LIFE
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self.num_measured = 0
        self._samples: list[tuple[float, float, float]] = []

    def add(self, sample: StepSample, rows_seen: int) -> None:
        """Add the sample of a step that ended ``rows_seen`` rows into the run."""
        self.num_measured += 1
        self._samples.append((float(rows_seen), sample.signal, sample.trace))
        # Ages fall from the oldest sample to the latest.
        del self._samples[: int((self._ages() > _FORGOTTEN_HALF_LIVES).sum())]

    def estimate(self) -> NoiseScale:
        """The present noise scale. There must be a sample."""
        _, signals, traces = torch.tensor(self._samples, dtype=torch.float64).T
        return noise_scale_of_steps(signals, traces, 0.5 ** self._ages())

    def state_dict(self) -> dict[str, Any]:
        """The samples, in plain types."""
        return {"num_measured": self.num_measured, "samples": [list(sample) for sample in self._samples]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_measured = state["num_measured"]
        self._samples = [tuple(sample) for sample in state["samples"]]

    def _ages(self) -> Tensor:
        """Half-lives since each sample."""
        rows = torch.tensor([sample[0] for sample in self._samples], dtype=torch.float64)
        by_rows = (rows[-1] - rows) / self.half_life
        by_samples = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64) / MIN_MEASURED
        return torch.minimum(by_rows, by_samples)


class OtherMetrics:
    """Histories of the metrics beside the adapter gradient, and the numbers logged from them.

    Unlike the noise scale of the adapter gradient, two numbers can be compared between ranks of adapters: the noise
    scale in Adam's metric, and ``lambda``, the noise scale of the frozen weights over that of the adapters. Neither
    tells what a batch costs.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all samples."""
        self._histories: dict[str, NoiseHistory] = {}
        self._latest: tuple[str, ...] = ()

    def add(self, samples: Mapping[str, StepSample], rows_seen: int, half_life: float) -> None:
        """Add the samples of a step that ended ``rows_seen`` rows into the run; ``half_life`` is in rows."""
        self._latest = tuple(metric for metric in _OTHER_METRICS if metric in samples)
        for metric in self._latest:
            history = self._histories.setdefault(metric, NoiseHistory())
            history.half_life = half_life
            history.add(samples[metric], rows_seen)

    def numbers(self, adapter: NoiseScale | None) -> dict[str, float]:
        """The numbers that the latest step has changed, by their logged names; conclusive is 1 or 0."""
        found: dict[str, float] = {}
        for metric in self._latest:
            estimate = self._histories[metric].estimate()
            found |= {f"gns/{metric}": estimate.value, f"gns/{metric}_conclusive": float(estimate.conclusive)}
            if metric == "weight" and adapter is not None:
                both = adapter.conclusive and estimate.conclusive
                found |= {"gns/lambda": estimate.value / adapter.value, "gns/lambda_conclusive": float(both)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The samples of each metric, in plain types."""
        return {metric: history.state_dict() for metric, history in self._histories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.clear()
        for metric, samples in state.items():
            self._histories[metric] = NoiseHistory()
            self._histories[metric].load_state_dict(samples)
