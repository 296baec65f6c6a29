"""Noise scales of a run beside that of its adapter gradient: as Adam scales it, and of the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_lora.batch_state import MIN_MEASURED
from lightning_lora.functional.noise_scale import NoiseScale
from lightning_lora.noise_history import NoiseHistory
from lightning_lora.step_sample import StepSample

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
