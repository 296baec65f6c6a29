"""Takes all capacity measurements of a module between two steps, and leaves it bit for bit as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_lora.batch.trial_step import observed
from lightning_lora.capacity.half_rank import cut_adapters
from lightning_lora.capacity.layer_groups import layer_groups, mean_spectrum, spectra
from lightning_lora.capacity.reading import IDLE_BELOW, CapacityReading, GroupReading
from lightning_lora.capacity.row_scores import RowScorer, Scores
from lightning_lora.capacity.tangent_capture import Capture, tangent_capture
from lightning_lora.errors import ConfigError
from lightning_lora.lora.adapter import disable_lora
from lightning_lora.lora.layers.adapted import learning_weights


@dataclass
class CapacityMeter:
    """Measures a module in training on fixed rows.

    Args:
        module: The module, whole on this device.
        train: Training batches to score.
        held_out: Held-out batches to score; training batches if there are none.
        gradients: Training batches for tangent capture.
    """

    trainer: Trainer
    module: LightningModule
    train: Sequence[Any]
    held_out: Sequence[Any]
    gradients: Sequence[Any]

    def bare_train_loss(self) -> float:
        """The loss of training rows without adapters, and with the values that other trained modules started from."""
        with self._between_steps(self.train) as scorer, disable_lora(self.module):
            return scorer.scores(self.train).mean

    def train_loss(self) -> float:
        """The loss of training rows."""
        with self._between_steps(self.train) as scorer:
            return scorer.scores(self.train).mean

    def half_rank(self, reading: CapacityReading) -> CapacityReading:
        """Add the losses of held-out rows: as they are, at half of the rank, and without adapters; and mean ranks."""
        with self._between_steps(self.held_out) as scorer:
            whole = scorer.scores(self.held_out)
            with cut_adapters(self.module, self._half_ranks()):
                half = scorer.scores(self.held_out)
            bare = self._bare(scorer, self.held_out)
        ranks = spectra(self.module, learning_weights(self.module))
        return replace(
            reading,
            loss=whole.mean,
            half_loss=half.mean,
            bare_loss=bare.mean,
            gain_error=bare.error_above(whole),
            num_scores=len(whole.losses),
            stable_rank=ranks["stable_rank"],
            effective_rank=ranks["effective_rank"],
        )

    def tangent_capture(self, reading: CapacityReading) -> CapacityReading:
        """Add tangent capture, of all layers and of groups that the reading has, or why it cannot be measured."""
        groups = layer_groups(self.module) if reading.groups else {}
        with self._between_steps(self.gradients):
            try:
                capture, captures = tangent_capture(self.trainer, self.module, self.gradients, groups)
            except ConfigError as reason:
                capture, captures = None, {}
                reading = replace(reading, no_capture=str(reason))
        reading = replace(reading, groups=_with_captures(reading.groups, captures), capture_rate=reading.rate)
        return _with_capture(reading, capture, len(learning_weights(self.module)))

    def groups(self, reading: CapacityReading) -> CapacityReading:
        """Add the readings of groups of layers, without tangent capture."""
        with self._between_steps(self.held_out) as scorer:
            return replace(reading, groups=self._groups(layer_groups(self.module), scorer))

    def _groups(self, groups: dict[str, list[str]], scorer: RowScorer) -> dict[str, GroupReading]:
        # Groups are many, and each is scored twice: a quarter of the batches.
        rows, halves = self.held_out[::4], self._half_ranks()
        whole, bare = scorer.scores(rows), self._bare(scorer, rows)
        gain = bare.mean - whole.mean
        has_gained = gain > 2 * bare.error_above(whole)
        found = {}
        for group, names in groups.items():
            share = truncation = None
            if has_gained:
                own = self._loss_at(scorer, rows, dict.fromkeys(names, 0)) - whole.mean
                share = own / gain
                if share >= IDLE_BELOW:
                    half = self._loss_at(scorer, rows, {name: halves[name] for name in names})
                    truncation = (half - whole.mean) / own
            spectrum = tuple(mean_spectrum(self.module, names))
            found[group] = GroupReading(
                **spectra(self.module, names), share=share, truncation=truncation, spectrum=spectrum
            )
        return found

    def _loss_at(self, scorer: RowScorer, rows: Sequence[Any], ranks: dict[str, int]) -> float:
        with cut_adapters(self.module, ranks):
            return scorer.scores(rows).mean

    def _bare(self, scorer: RowScorer, rows: Sequence[Any]) -> Scores:
        """Scores without the updates; other trained modules keep their values, so that only adapters are judged."""
        with cut_adapters(self.module, dict.fromkeys(learning_weights(self.module), 0)):
            return scorer.scores(rows)

    def _half_ranks(self) -> dict[str, int]:
        return {
            name: layer.lora_specs[weight].rank // 2 for name, (layer, weight) in learning_weights(self.module).items()
        }

    @contextmanager
    def _between_steps(self, batches: Sequence[Any]) -> Iterator[RowScorer]:
        with observed(self.trainer, self.module):
            torch.manual_seed(0)
            self.module.eval()
            yield RowScorer(self.trainer, self.module, batches[0])


def _with_capture(reading: CapacityReading, capture: Capture | None, num_weights: int) -> CapacityReading:
    reading = replace(reading, capture=None, capture_low=None, capture_high=None, num_weights=num_weights)
    if capture is None:
        return replace(reading, num_captured=0)
    reading = replace(reading, num_captured=capture.num_weights, no_capture="")
    if not capture.is_conclusive:
        return reading
    low = capture.value - 2 * capture.error
    return replace(reading, capture=capture.value, capture_low=low, capture_high=capture.high)


def _with_captures(groups: Mapping[str, GroupReading], captures: dict[str, Capture]) -> dict[str, GroupReading]:
    known = {name: capture for name, capture in captures.items() if capture.is_conclusive}
    return {
        name: replace(group, capture=known[name].value, capture_high=known[name].high) if name in known else group
        for name, group in groups.items()
    }


def stored_bits(tokens: float, base_loss: float, train_loss: float, parameters: int) -> float:
    """Bits per parameter that the fall of the loss of ``tokens`` tokens, in nats, amounts to."""
    return tokens * (base_loss - train_loss) / math.log(2) / parameters
