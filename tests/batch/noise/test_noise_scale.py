"""Noise scales against closed forms: research/batch_and_capacity.md section 7, V1 to V4."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_lora.batch.noise.noise_scale import NoiseScale, noise_scale, noise_scale_of_steps, signal_and_trace
from lightning_lora.batch.noise.per_example_gradients import adapter_row_gradients
from lightning_lora.errors import DataError
from tests.batch.noise.linear_teacher import LinearTeacher

TEACHER = LinearTeacher.make()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def of_micro_batches(gradients: Tensor, sizes: int | Tensor) -> tuple[Tensor, Tensor]:
    """Signal and trace of steps ``(n, K, D)``."""
    sizes = torch.as_tensor(sizes, dtype=torch.float64)
    weights = (sizes.expand(gradients.shape[1]) / sizes.expand(gradients.shape[1]).sum())[:, None]
    return signal_and_trace(gradients.square().sum(-1), (weights * gradients).sum(1).square().sum(-1), sizes)


@pytest.mark.parametrize(("rows", "count"), [(1, 64), (4, 8), (4, 2), (8, 4)])
@pytest.mark.parametrize("metric", ["weight", "adapter"])
def test_every_split_of_the_rows_gives_the_noise_scale_of_the_teacher(rows: int, count: int, metric: str) -> None:
    num_rows = 64 * 400
    x, d_y = (part[:, None] for part in TEACHER.rows(num_rows, generator()))
    if metric == "weight":
        gradients, expected = torch.einsum("nto,nti->noi", d_y, x).flatten(1), TEACHER.weight_noise_scale
    else:
        factors = adapter_row_gradients(x, d_y, TEACHER.A, TEACHER.B, TEACHER.scale)
        gradients, expected = torch.cat([factor.flatten(1) for factor in factors], 1), TEACHER.adapter_noise_scale
    micro_batches = gradients.view(-1, count, rows, gradients.shape[1]).mean(2)
    estimate = noise_scale_of_steps(*of_micro_batches(micro_batches, rows))
    assert estimate.conclusive
    assert estimate.value == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("over_noise_scale", [1 / 8, 1, 8])
def test_a_step_at_its_best_rate_makes_the_progress_that_the_noise_scale_says(over_noise_scale: float) -> None:
    """V8: the loss of the teacher is a bowl of curvature one, so the law ``1 / (1 + B_noise / B)`` is exact."""
    batch = round(TEACHER.weight_noise_scale * over_noise_scale)
    x, d_y = TEACHER.rows(batch * 2000, generator(3))
    gradients = torch.einsum("nbo,nbi->noi", *(part.view(2000, batch, -1) for part in (d_y, x))) / batch
    losses = [  # after one step, a mean over the batches
        float(0.5 * (TEACHER.error - rate * gradients).square().sum((1, 2)).mean())
        for rate in torch.linspace(0, 1, 101).tolist()
    ]
    start = float(0.5 * TEACHER.error.square().sum())
    expected = 1 / (1 + TEACHER.weight_noise_scale / batch)
    assert (start - min(losses)) / start == pytest.approx(expected, abs=0.02)


def test_the_spread_of_both_estimates_is_that_of_the_theory() -> None:
    rows, count, deviations = 4, 4, torch.linspace(0.5, 2, 40, dtype=torch.float64)
    mean = torch.full((40,), 0.3, dtype=torch.float64)
    gradients = mean + deviations * normal(4000, count, 40) / rows**0.5
    signals, traces = of_micro_batches(gradients, rows)
    square = deviations.pow(4).sum()
    of_trace = (2 * square / (count - 1)).sqrt()
    of_signal = 4 * (mean * deviations).square().sum() / (rows * count)
    of_signal = (of_signal + 2 * square / (rows**2 * count * (count - 1))).sqrt()
    assert float(traces.std() / of_trace) == pytest.approx(1, abs=0.1)
    assert float(signals.std() / of_signal) == pytest.approx(1, abs=0.1)
    assert float(traces.mean()) == pytest.approx(float(deviations.square().sum()), rel=0.02)


def coverage(estimates: list[NoiseScale], truth: float) -> tuple[float, float]:
    """Shares of conclusive estimates, and of intervals among them that hold the truth."""
    conclusive = [estimate for estimate in estimates if estimate.conclusive]
    hits = sum(estimate.low <= truth <= estimate.high for estimate in conclusive)
    return len(conclusive) / len(estimates), hits / max(len(conclusive), 1)


def test_the_noise_scale_of_a_quadratic_form_is_that_of_the_form() -> None:
    """V7: a diagonal form in the place of the square norm, as Adam's metric and curvature are."""
    form = torch.logspace(-1, 1, 16, dtype=torch.float64) * torch.linspace(0.5, 1.5, 16, dtype=torch.float64).square()
    mean = torch.linspace(0.2, 1, 16, dtype=torch.float64)
    deviations = torch.linspace(1, 3, 16, dtype=torch.float64).flip(0)
    gradients = mean + deviations * normal(1500, 4, 16) / 4**0.5
    squares = (form * gradients.square()).sum(-1), (form * gradients.mean(1).square()).sum(-1)
    estimate = noise_scale_of_steps(*signal_and_trace(*squares, 4))
    truth = float((form * deviations.square()).sum() / (form * mean.square()).sum())
    simple = float(deviations.square().sum() / mean.square().sum())
    assert estimate.value == pytest.approx(truth, rel=0.03)
    assert abs(simple / truth - 1) > 0.15


@pytest.mark.parametrize("num_steps", [25, 100, 400])
def test_intervals_of_many_steps_hold_the_truth_as_often_as_they_say(num_steps: int) -> None:
    gradients = 1 + normal(300 * num_steps, 4, 20) * 2  # signal 20, trace 4 * 20 * 4 rows
    signals, traces = (part.view(300, num_steps) for part in of_micro_batches(gradients, 4))
    share, hits = coverage([noise_scale_of_steps(*step) for step in zip(signals, traces, strict=True)], 16)
    assert share > 0.9
    assert 0.9 <= hits <= 0.98


@pytest.mark.parametrize("count", [16, 64])
def test_intervals_of_one_step_hold_the_truth_as_often_as_they_say(count: int) -> None:
    gradients = 1 + normal(300, count, 20) * 2
    share, hits = coverage([noise_scale(step, 4) for step in gradients], 16)
    assert share > 0.9
    assert 0.9 <= hits <= 0.98


def test_a_signal_below_the_noise_is_called_inconclusive() -> None:
    gradients = 0.003 + normal(300 * 25, 2, 20)
    signals, traces = (part.view(300, 25) for part in of_micro_batches(gradients, 4))
    estimates = [noise_scale_of_steps(*step) for step in zip(signals, traces, strict=True)]
    assert sum(not estimate.conclusive for estimate in estimates) >= 0.8 * 300
    assert all(math.isinf(estimate.high) for estimate in estimates if not estimate.conclusive)
    # Nothing is clamped: about half of such signals are negative.
    assert 90 < sum(estimate.signal < 0 for estimate in estimates) < 210


def test_unequal_micro_batches_are_unbiased_where_a_mean_size_is_not() -> None:
    sizes = torch.tensor([1.0, 2, 4, 16], dtype=torch.float64)
    gradients = 1 + 10 * normal(20_000, 4, 50) / sizes.sqrt()[:, None]  # signal 50, trace 5000
    assert noise_scale_of_steps(*of_micro_batches(gradients, sizes)).value == pytest.approx(100, rel=0.1)
    weights = (sizes / sizes.sum())[:, None]
    naive = signal_and_trace(gradients.square().sum(-1), (weights * gradients).sum(1).square().sum(-1), sizes.mean())
    assert not 50 < noise_scale_of_steps(*naive).value < 200


def test_a_mean_over_unequal_micro_batches_has_weights_of_its_own() -> None:
    """Lightning's mean of means: each micro-batch counts the same, whatever it holds."""
    sizes = torch.tensor([1.0, 2, 4, 16], dtype=torch.float64)
    gradients = 1 + 3 * normal(20_000, 4, 50) / sizes.sqrt()[:, None]  # signal 50, trace 450
    norms = gradients.square().sum(-1), gradients.mean(1).square().sum(-1)
    assert noise_scale_of_steps(*signal_and_trace(*norms, sizes, torch.ones(4))).value == pytest.approx(9, rel=0.02)
    assert noise_scale_of_steps(*signal_and_trace(*norms, sizes)).value != pytest.approx(9, rel=0.1)


def test_one_step_and_its_norms_give_the_same_estimate() -> None:
    gradients, sizes = 1 + normal(5, 7), torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    estimate = noise_scale(gradients, sizes)
    signals, traces = of_micro_batches(gradients[None], sizes)
    assert (estimate.signal, estimate.trace) == (pytest.approx(float(signals)), pytest.approx(float(traces)))
    assert noise_scale(list(gradients), [1, 2, 3, 4, 5]) == estimate


def test_two_micro_batches_have_an_estimate_and_no_interval() -> None:
    estimate = noise_scale(1 + normal(2, 30), 8)
    assert not estimate.conclusive
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)


def test_gradients_in_bfloat16_are_compared_in_double_precision() -> None:
    gradients = (1 + normal(64, 30)).bfloat16()
    assert noise_scale(gradients, 1) == noise_scale(gradients.double(), 1)


@pytest.mark.parametrize(
    ("gradients", "sizes", "message"),
    [
        (torch.ones(1, 3), 4, "at least two micro-batches, got 1"),
        ([], 4, "at least two micro-batches, got 0"),
        (torch.ones(3, 3), [1, 2], "got 3 micro-batches and 2 batch sizes"),
        (torch.ones(2, 3), [1, 0], r"batch sizes must be positive, got \[1.0, 0.0\]"),
        ([torch.ones(3), torch.ones(4)], 1, "differ in shape"),
    ],
)
def test_what_gives_no_estimate_is_refused(gradients: Tensor, sizes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        noise_scale(gradients, sizes)


def test_steps_without_their_traces_are_refused() -> None:
    with pytest.raises(DataError, match="one signal, one trace and one weight for every step"):
        noise_scale_of_steps(torch.ones(3), torch.ones(2))
