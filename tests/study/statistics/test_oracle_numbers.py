"""Intervals, p-values and words against numbers computed elsewhere, by hand and with numpy and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_lora.errors import DataError
from lightning_lora.student_t import t_quantile
from lightning_lora.study.statistics.batch_penalty import batch_penalty
from lightning_lora.study.statistics.crossed import linearised, mean_squares, paired_interval
from lightning_lora.study.statistics.holm import holm
from lightning_lora.study.statistics.needed import rows_needed, seeds_needed
from lightning_lora.study.statistics.rates.over_rates import expected_best
from lightning_lora.study.statistics.rates.rate_vertex import vertex
from lightning_lora.study.statistics.steps_to_loss import Reached, crossing, step_ratio
from lightning_lora.study.statistics.word import word_of
from tests.study.statistics.arms import arm

BEHIND_OR_TOST = [
    # differences, mean, low, high, p of two one-sided tests, p of "behind", word
    ((0.001, 0.002, 0.000), 0.001, -0.000686, 0.002686, 0.0101, 0.1127, "matches"),
    ((0.001, 0.004, -0.002), 0.001, -0.004058, 0.006058, 0.0736, 0.3110, "cannot tell"),
    ((0.002, 0.003, 0.0025), 0.0025, 0.001657, 0.003343, 0.00654, 0.00654, "matches"),
    ((0.010, 0.012, 0.008), 0.010, 0.006628, 0.013372, 0.97529, 0.00654, "behind"),
    ((-0.010, -0.012, -0.008), -0.010, -0.013372, -0.006628, 0.97529, 0.99346, "ahead"),
    ((0.006, 0.001, 0.009), 0.005333, -0.001480, 0.012147, 0.55025, 0.0748, "cannot tell"),
    ((0.001, 0.030, 0.002), 0.011, -0.016753, 0.038753, 0.70381, 0.18334, "cannot tell"),
]


@pytest.mark.parametrize(("found", "mean", "low", "high", "p_equal", "p_behind", "word"), BEHIND_OR_TOST)
def test_an_interval_over_seeds(
    found: tuple[float, ...], mean: float, low: float, high: float, p_equal: float, p_behind: float, word: str
) -> None:
    interval = paired_interval(found)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((mean, low, high), abs=6e-7)
    assert (interval.p_equal(0.005), interval.p_behind) == pytest.approx((p_equal, p_behind), abs=6e-5)
    assert interval.p_ahead == pytest.approx(1 - interval.p_behind)
    assert word_of(interval, 0.005) == word
    # That the interval is inside of the band is the same as both one-sided tests.
    assert (interval.p_equal(0.005) < 0.05) == (word == "matches")


def test_the_probability_of_being_inside_of_the_band() -> None:
    interval = paired_interval([0.001, 0.004, -0.002])
    drawn = interval.mean + interval.error * np.random.default_rng(0).standard_t(2, 400_000)
    assert interval.inside(0.005) == pytest.approx(np.mean(np.abs(drawn) < 0.005), abs=0.003)
    assert paired_interval([0.001]).inside(0.005) == 0.0


def test_critical_values_of_t() -> None:
    found = [t_quantile(0.95, seeds - 1) for seeds in (2, 3, 4, 5, 6, 8, 10)]
    assert found == pytest.approx([6.314, 2.920, 2.353, 2.132, 2.015, 1.895, 1.833], abs=6e-4)
    assert [t_quantile(0.98, seeds - 1) for seeds in (3, 5, 8)] == pytest.approx([4.849, 2.999, 2.517], abs=6e-4)


CROSSED = [[0.1, 0.3, -0.2, 0.4], [0.0, 0.2, -0.1, 0.5], [0.3, 0.1, 0.1, 0.6]]


def test_an_interval_over_seeds_and_rows() -> None:
    assert mean_squares(np.array(CROSSED)) == pytest.approx((0.020833, 0.165278, 0.015278), abs=6e-7)
    both, alone = paired_interval(CROSSED), paired_interval(np.mean(CROSSED, axis=1))
    assert (both.mean, both.error**2, both.freedom) == pytest.approx((0.191667, 0.014236, 3.1175), abs=6e-5)
    assert (both.half_width, alone.half_width) == pytest.approx((0.276531, 0.121666), abs=6e-7)


def test_the_interval_over_seeds_is_kept_where_rows_explain_less_than_chance() -> None:
    """The crossed variance comes out near zero, or below it, by chance: the interval must not shrink with it."""
    found = np.array([[1.0, -1.0], [-1.0, 1.0], [0.02, 0.0]])
    seeds, rows, residual = mean_squares(found)
    assert seeds + rows < residual
    assert paired_interval(found) == paired_interval(found.mean(1))
    assert paired_interval(found).half_width > 0


def test_the_interval_is_never_narrower_than_that_over_seeds() -> None:
    rng = np.random.default_rng(0)
    narrower = 0
    for _ in range(200):
        found = 0.1 * rng.standard_normal((3, 1)) + rng.standard_normal((3, 16))
        seeds, rows, residual = mean_squares(found)
        narrower += 0 < seeds + rows - residual < seeds
        assert paired_interval(found).half_width >= paired_interval(found.mean(1)).half_width
    assert narrower > 20


def test_rows_weigh_as_many_tokens_as_they_have() -> None:
    tokens, ours, theirs = [10, 40, 25, 5], np.array([[1.2, 0.9, 1.1, 1.5]]), np.array([[1.25, 0.88, 1.12, 1.40]])
    interval = paired_interval(ours - theirs, tokens)
    assert (interval.mean, interval.error) == pytest.approx((0.00375, 0.016429), abs=6e-7)
    weighed = linearised(np.array(CROSSED), tokens).mean(1)
    assert weighed == pytest.approx(np.average(CROSSED, axis=1, weights=tokens))
    assert paired_interval(CROSSED, [3, 3, 3, 3]).half_width == pytest.approx(paired_interval(CROSSED).half_width)


def test_holm_corrects_in_the_order_given() -> None:
    assert holm([0.004, 0.030, 0.020, 0.200]) == pytest.approx([0.016, 0.060, 0.060, 0.200])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_gap_of_two_arms_at_two_batches() -> None:
    large = arm("rank 16", 1.20, 1.21, 1.22), arm("full fine-tuning", 1.15, 1.17, 1.16)
    small = arm("rank 16", 1.10, 1.12, 1.11), arm("full fine-tuning", 1.09, 1.10, 1.10)
    found = batch_penalty(large, small)
    assert found.interval is not None
    assert (found.interval.mean, found.interval.low, found.interval.high) == pytest.approx(
        (0.036667, 0.010915, 0.062419), abs=6e-7
    )
    assert found.sentence == (
        "rank 16 - full fine-tuning (large) falls behind rank 16 - full fine-tuning (small) by 0.0367 nats (0.0109 "
        "to 0.0624)"
    )


def test_steps_to_a_loss_and_their_ratio() -> None:
    assert crossing((100, 1.30), (200, 1.10), 1.15) == pytest.approx(168.179, abs=6e-4)
    full = {0: Reached(200), 1: Reached(210), 2: Reached(190)}
    assert str(step_ratio({0: Reached(260), 1: Reached(300), 2: Reached(240)}, full)) == "1.3287 (1.1921 to 1.4810)"
    censored = {0: Reached(260), 1: Reached(500, "at least"), 2: Reached(240)}
    assert str(step_ratio(censored, full)) == ">= 1.575, not reached in 1 of 3"
    assert step_ratio(censored, full).high == math.inf


def test_the_expected_best_of_a_smaller_budget() -> None:
    losses = [1.30, 1.20, 1.25, 1.60, 1.22]
    assert [expected_best(losses, budget) for budget in (1, 2, 3, 5)] == pytest.approx([1.314, 1.226, 1.211, 1.2])
    assert expected_best([*losses, math.nan], 1) == math.inf
    assert expected_best([*losses, math.nan], 6) == 1.2
    with pytest.raises(DataError, match="between 1 and the 5 measured rates, got 6"):
        expected_best(losses, 6)


def test_the_vertex_of_a_parabola_in_the_logarithm_of_the_rate() -> None:
    assert vertex((1e-4, 3e-4, 9e-4), (1.20, 1.10, 1.16)) == pytest.approx((3.4416e-4, 1.09875), rel=2e-5)
    assert vertex((1e-4, 3e-4, 9e-4), (1.12, 1.10, 2.50))[0] == pytest.approx(1.76e-4, rel=1e-3)


def test_rows_and_seeds_that_would_do() -> None:
    assert rows_needed(0.05, 0.005) == 1083
    assert seeds_needed(0.003, 0.004) == 4
    assert seeds_needed(0.003, 0.0) is None
    count = seeds_needed(1.0, 0.01)
    assert count is not None
    assert t_quantile(0.95, count - 1) / math.sqrt(count) < 0.01 <= t_quantile(0.95, count - 2) / math.sqrt(count - 1)


@pytest.mark.parametrize("found", [[], [0.1, math.nan], [[0.1], [math.inf]], [[[0.1]]]])
def test_differences_that_are_no_numbers_are_refused(found: list[float]) -> None:
    with pytest.raises(DataError, match="must be finite numbers"):
        paired_interval(found)


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3, 0], [1, 2, 3, -4], [1, 2, 3, math.nan]])
def test_rows_without_tokens_are_refused(tokens: list[float]) -> None:
    with pytest.raises(DataError, match="needs a positive number of tokens"):
        paired_interval(CROSSED, tokens)


def test_one_difference_has_no_interval() -> None:
    interval = paired_interval([0.001])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert (interval.p_equal(0.005), interval.p_behind) == (0.5, 0.5)
    assert word_of(interval) == "cannot tell"
    assert word_of(paired_interval([0.0, 0.0, 0.0])) == "matches"
    assert paired_interval([0.01, 0.01]).p_behind == 0.0
