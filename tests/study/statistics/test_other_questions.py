"""Steps to a loss with runs that never get there, envelopes, and gaps of gaps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from lightning_lora.errors import DataError
from lightning_lora.study.statistics.arm import Arm
from lightning_lora.study.statistics.batch_penalty import batch_penalty
from lightning_lora.study.statistics.power import chance_to_see_failures
from lightning_lora.study.statistics.rates.over_rates import envelope, expected_best
from lightning_lora.study.statistics.steps_to_loss import Reached, evaluation_steps, step_ratio, steps_to, target_loss
from tests.study.statistics.arms import arm

LATE = "at least"


def test_a_loss_is_reached_where_it_stays() -> None:
    steps = [0, 100, 200, 300, 400]
    reached = steps_to(steps, [2.0, 1.30, 1.10, 1.0, 0.9], 1.15)
    assert (reached.steps, reached.bound) == (pytest.approx(168.179, abs=1e-3), "")
    assert steps_to(steps, [2.0, 1.30, 1.10, 1.2, 0.9], 1.15) == Reached(400, LATE), "the last has no next one"
    assert steps_to(steps, [2.0, 1.1, 1.1, 1.2, 0.9], 1.15) == Reached(100, "at most")
    assert steps_to(steps, [2.0, math.nan, 1.1, 1.1, 0.9], 1.15) == Reached(200)
    assert target_loss(2.0, 1.0) == pytest.approx(1.1)
    for wrong in ([0, 100], [100, 100, 200], [200, 100]):
        with pytest.raises(DataError, match="at least two evaluations in ascending steps"):
            steps_to(wrong, [1.0] * len(wrong), 0.5)
    with pytest.raises(DataError, match="got 2 steps and 1 losses"):
        steps_to([1, 2], [1.0], 0.5)


def test_evaluations_are_dense_enough_to_interpolate_between() -> None:
    steps = evaluation_steps(1000)
    assert (steps[0], steps[-1], len(steps)) == (1, 1000, 64)
    assert all(later <= max(1.1 * step, step + 1) for step, later in pairwise(steps))
    assert evaluation_steps(1) == [1]


def test_runs_that_do_not_reach_the_loss_give_bounds() -> None:
    reached = {seed: Reached(200) for seed in range(3)}
    missed = reached | {1: Reached(500, LATE)}
    assert str(step_ratio(reached, missed)) == "<= 0.737, not reached in 1 of 3"
    assert step_ratio(reached, missed).low == 0
    both = step_ratio(missed, missed)
    assert (both.seeds, both.bound, both.ratio) == (2, "", 1.0)
    crossed = step_ratio(missed, reached | {0: Reached(500, LATE)})
    assert crossed.bound == "cannot tell"
    assert str(crossed).startswith("cannot tell")
    nothing = step_ratio({0: Reached(5, LATE)}, {0: Reached(5, LATE)})
    assert (math.isnan(nothing.ratio), nothing.bound, nothing.seeds) == (True, "cannot tell", 0)
    early = step_ratio(reached | {2: Reached(10, "at most")}, reached)
    assert (early.bound, early.low) == ("at most", 0)
    with pytest.raises(DataError, match="no seed has steps"):
        step_ratio({0: Reached(1)}, {1: Reached(1)})


def test_an_envelope_is_no_run_and_lies_below_all() -> None:
    rng = np.random.default_rng(0)
    found = envelope({rate: 1 + rng.standard_normal(20_000) for rate in range(1, 6)})
    assert found.legend == "best of 5 rates at each step; no single run"
    assert np.mean(1 - found.losses) == pytest.approx(1.16, abs=0.03)
    holes = envelope({1e-3: [1.0, math.nan, math.nan], 3e-3: [2.0, 0.5, math.inf]})
    assert np.array_equal(holes.losses, [1.0, 0.5, math.nan], equal_nan=True)
    for wrong in ({}, {1.0: [1.0], 2.0: [1.0, 2.0]}):
        with pytest.raises(DataError, match="an envelope needs curves of one length"):
            envelope(wrong)


def test_the_expected_best_is_the_mean_over_all_subsets() -> None:
    losses = [3.0, 1.0, 2.0]
    assert expected_best(losses, 2) == pytest.approx((1 + 2 + 1) / 3)


def test_a_gap_of_gaps_needs_all_four_cells() -> None:
    full = arm("full", 1.0, 1.0, 1.0)
    ours, broken = arm("lora", 1.0, 1.0, 1.001), Arm("lora", {0: 1.0, 1: 1.0}, {2: "out of memory"})
    assert batch_penalty((ours, full), (ours, full)).verdict == "matches"
    assert batch_penalty((broken, full), (ours, full)).sentence == (
        "cannot tell: lora - full (large) has no result for seed 2 (out of memory)"
    )
    wild = arm("lora", 1.0, 1.0, math.nan)
    assert "seed 2 (diverged)" in batch_penalty((ours, full), (wild, full)).sentence
    edge = arm("lora", 1.0, 1.0, 1.0, problem="best rate at the edge of the sweep")
    assert "edge of the sweep (lora)" in batch_penalty((ours, full), (edge, full)).sentence


def test_a_rare_failure_is_seldom_seen() -> None:
    assert chance_to_see_failures(0.2, 3) == pytest.approx(1 - 0.51, abs=0.005)
