"""The five words, and how often they are wrong on stationary noise (research/batch_and_capacity.md, V14)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale_of_steps, signal_and_trace
from lightning_lora.batch.reading import MIN_MEASURED, BatchReading, advice, read_batch
from lightning_lora.effective_batch import EffectiveBatch

NUM_ROWS, NUM_MICRO_BATCHES, DIMENSIONS = 8, 4, 40


def readings(fill: float, seed: int) -> list[BatchReading]:
    """Readings after each of 16 windows of 25 steps of a run whose batch is ``fill`` times its noise scale."""
    generator = torch.Generator().manual_seed(seed)
    batch = NUM_ROWS * NUM_MICRO_BATCHES
    # Noise of trace batch / fill on a signal of square norm 1.
    deviation = (batch / fill / DIMENSIONS) ** 0.5
    noise = torch.randn(16 * MIN_MEASURED, NUM_MICRO_BATCHES, DIMENSIONS, generator=generator, dtype=torch.float64)
    gradients = DIMENSIONS**-0.5 + deviation * noise / NUM_ROWS**0.5
    norms: tuple[Tensor, Tensor] = gradients.square().sum(-1), gradients.mean(1).square().sum(-1)
    signals, traces = signal_and_trace(*norms, NUM_ROWS)
    found, full = [], 0
    for end in range(MIN_MEASURED, len(signals) + 1, MIN_MEASURED):
        estimate = noise_scale_of_steps(signals[:end], traces[:end])
        found.append(read_batch(estimate, end, batch, math.inf, full_windows=full))
        full = full + 1 if found[-1].fill_low > 1 else 0
    return found


@pytest.mark.parametrize("fill", [0.1, 0.5, 2.0])
def test_stationary_noise_raises_no_false_alarm_and_a_full_batch_is_found(fill: float) -> None:
    runs = [readings(fill, seed) for seed in range(50)]
    states = [[reading.state for reading in run] for run in runs]
    if fill < 1:
        assert sum("signal-limited" in run for run in states) <= 1
    else:
        assert sum(run[-1] == "signal-limited" for run in states) >= 0.95 * 50
    if fill > 0.2:
        assert sum("noise-limited" in run for run in states) <= 1
    else:
        assert sum(run[-1] == "noise-limited" for run in states) >= 0.95 * 50


ESTIMATE = NoiseScale(64, 32, 96, 1, 64, conclusive=True)


def test_the_interval_of_the_fill_comes_from_that_of_the_noise_scale() -> None:
    reading = read_batch(ESTIMATE, 100, 32, math.inf)
    assert (reading.fill, reading.fill_low, reading.fill_high) == (0.5, 32 / 96, 1.0)
    assert reading.efficiency == 1 / 1.5
    assert reading.state == "transition"
    calibrated = read_batch(ESTIMATE, 100, 32, math.inf, calibration=10)
    assert calibrated.fill == 0.05
    assert calibrated.state == "noise-limited"
    assert read_batch(NoiseScale(1, -1, 3, 1, 1, conclusive=True), 100, 32, math.inf).fill_high == math.inf


def test_signal_limited_takes_three_windows_in_a_row() -> None:
    states = [read_batch(ESTIMATE, 100, 1000, math.inf, full_windows=full).state for full in range(4)]
    assert states == ["transition", "transition", "signal-limited", "signal-limited"]


@pytest.mark.parametrize("num_measured", [3, 100])
def test_too_few_steps_are_starved_whatever_the_noise(num_measured: int) -> None:
    assert read_batch(ESTIMATE, num_measured, 32, 99).state == "step-starved"
    assert read_batch(ESTIMATE, num_measured, 32, 100).state != "step-starved"


def test_few_measured_steps_and_weak_signals_are_inconclusive() -> None:
    weak = NoiseScale(-5, -math.inf, math.inf, -1, 5, conclusive=False)
    for reading in (read_batch(ESTIMATE, MIN_MEASURED - 1, 32, 500), read_batch(weak, 100, 32, 500)):
        assert reading.state == "inconclusive"
        assert math.isnan(reading.fill)
        assert math.isnan(reading.efficiency)


@pytest.mark.parametrize(
    ("batch", "num_steps", "full_windows", "told"),
    [
        (
            EffectiveBatch(8, 4, 1),
            math.inf,
            0,
            "fill 0.5: the batch is neither clearly too large nor clearly too small.",
        ),
        (
            EffectiveBatch(8, 40, 1),
            math.inf,
            0,
            "fill 5, certainly above 1: the batch is too large if 3 windows in a row agree.",
        ),
        (
            EffectiveBatch(8, 40, 1),
            math.inf,
            2,
            "by the model each row teaches 17% of what it could: set accumulate_grad_batches=20 for 160 rows a step.",
        ),
        (
            EffectiveBatch(320, 1, 1),
            math.inf,
            2,
            "by the model each row teaches 17% of what it could: set a batch of 160 rows a step (now 320).",
        ),
        (
            EffectiveBatch(8, 4, 2),
            25,
            0,
            "set accumulate_grad_batches=1 for 16 rows a step (or more epochs) for 1",
        ),
        (EffectiveBatch(8, 1, 1), 90, 0, "90 optimizer steps are few whatever the noise: set a batch of 4 rows a step"),
        (EffectiveBatch(3, 1, 1), 50, 0, "set a batch of 1 row a step (now 3) (or more epochs) for 100 steps"),
        (EffectiveBatch(3, 1, 1), 2, 0, "2 optimizer steps are few whatever the noise: train on more rows, or for 50"),
        (EffectiveBatch(2, 2, 4), 1, 0, "1 optimizer step is few whatever the noise: train on more rows, or for 100"),
        (EffectiveBatch(1, 2, 1), 50, 0, "set accumulate_grad_batches=1 for 1 row a step (or more epochs)"),
    ],
)
def test_advice_names_what_to_change(batch: EffectiveBatch, num_steps: float, full_windows: int, told: str) -> None:
    reading = read_batch(ESTIMATE, 100, batch.rows, num_steps, full_windows=full_windows)
    assert told in advice(reading, batch, num_steps)
