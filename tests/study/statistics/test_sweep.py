"""A sweep widens until its best rate has a worse one on either side, and says why it stops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.study.matched.held_out import selection_rows
from lightning_lora.study.statistics.rates.halving import given_up
from lightning_lora.study.statistics.rates.rate_vertex import refined_rate, vertex
from lightning_lora.study.statistics.rates.sweep import NextStep, Trial, first_rates, next_step

NAN, BASE = math.nan, 2.0


def swept(
    loss: Callable[[float], float], start: Sequence[float], most_widenings: int = 4
) -> tuple[NextStep, dict[float, float]]:
    """Measure what the sweep asks for until it stops."""
    losses: dict[float, float] = {}
    for _ in range(12):
        trials = [Trial(rate, value) for rate, value in losses.items()]
        random.shuffle(trials)
        step = next_step(start, trials, BASE, most_widenings=most_widenings)
        if not step.rates:
            return step, losses
        assert not set(step.rates) & set(losses), "a rate is measured once"
        losses |= {rate: loss(rate) for rate in step.rates}
    raise AssertionError("the sweep does not end")


def valley(best: float, curvature: float = 0.02) -> Callable[[float], float]:
    """A parabola in the logarithm of the rate, ``curvature`` nats an octave^2."""
    return lambda rate: 1 + curvature * math.log2(rate / best) ** 2


@pytest.mark.parametrize("best", [1e-5, 1e-4, 4e-4, 1e-3, 1.7e-3, 6e-3, 2e-2, 5e-2])
def test_a_valley_is_found_wherever_it_is(best: float) -> None:
    step, losses = swept(valley(best), first_rates(1e-3))
    assert step.problem == ""
    assert step.chosen is not None
    # Half a step of the grid is .8 octaves; the refinement leaves much less.
    assert abs(math.log2(step.chosen / best)) < 0.35
    assert min(losses) < step.chosen < max(losses)
    assert len(losses) <= 8


def test_an_interior_optimum_needs_no_more_than_its_refinement() -> None:
    step, losses = swept(valley(1.2e-3), first_rates(1e-3))
    assert (len(losses), step.why) == (3, "0.001 is the best of 3 rates, 0.000333333 and 0.003 are worse")
    step, losses = swept(valley(1.2e-3, 0.1), first_rates(1e-3))
    assert (len(losses), step.why) == (4, "0.0012 is the best of 4 rates, 0.000333333 and 0.003 are worse")


def test_a_best_rate_at_the_edge_after_four_widenings_is_a_problem() -> None:
    step, losses = swept(valley(10.0, 0.002), first_rates(1e-4))
    assert len(losses) == 7
    assert (step.chosen, step.problem) == (0.0243, "best rate at the edge of the sweep, 0.0243")
    step, losses = swept(valley(10.0, 0.002), (1e-4, 2e-4), most_widenings=0)
    assert (len(losses), step.chosen) == (2, 2e-4)
    assert step.problem.startswith("best rate at the edge")


def test_the_grid_of_a_user_widens_by_its_own_steps() -> None:
    assert next_step((1e-4, 2e-4), [Trial(1e-4, 1.2), Trial(2e-4, 1.1)]).rates == (4e-4,)
    assert next_step((1e-4, 2e-4), [Trial(1e-4, 1.1), Trial(2e-4, 1.2)]).rates == (5e-5,)
    assert next_step((1e-4,), [Trial(1e-4, 1.1)]).rates == (pytest.approx(1e-4 / 3, rel=1e-5),)


@pytest.mark.parametrize("diverged", [NAN, math.inf, BASE + 0.1])
def test_a_diverged_rate_closes_the_upper_side(diverged: float) -> None:
    step, losses = swept(lambda rate: 1.5 - 0.1 * math.log10(rate) if rate < 2e-3 else diverged, first_rates(1e-3))
    assert step.problem == ""
    assert step.chosen == 1e-3
    assert max(losses) == 3e-3


def test_where_every_rate_diverges_the_sweep_goes_down_and_then_gives_up() -> None:
    step, losses = swept(lambda rate: NAN if rate > 1e-4 else 1 - 0.01 * math.log10(rate / 1e-9), first_rates(1e-3))
    assert step.chosen == pytest.approx(3.7037e-5)
    step, losses = swept(lambda rate: NAN, first_rates(1e-3))
    assert len(losses) == 7
    assert (step.chosen, step.problem) == (None, "every rate of the sweep diverged")


def test_a_flat_valley_is_called_flat_and_its_middle_is_taken() -> None:
    step, _ = swept(valley(1e-3, 0.0005), first_rates(1e-3))
    assert (step.chosen, step.problem, step.why) == (1e-3, "", "flat: any rate from 0.000333333 to 0.003 does")
    step, _ = swept(lambda rate: 1.0, first_rates(1e-3))
    assert step.problem == ""
    assert step.why.startswith("flat: any rate from")


def test_beside_a_cliff_no_parabola_is_fitted() -> None:
    """A parabola would flee from the cliff to 1.76e-4."""
    found = refined_rate((1e-4, 3e-4, 9e-4), (1.12, 1.10, 2.50), 0.005)
    assert found is not None
    assert found.rate == pytest.approx(3e-4 * 3 ** -((3 - math.sqrt(5)) / 2))


def test_a_refinement_must_promise_half_a_band() -> None:
    rates, losses = (1e-4, 3e-4, 9e-4), (1.20, 1.10, 1.16)
    assert refined_rate(rates, losses, 0.005) is None  # it promises .00125
    found = refined_rate(rates, losses, 0.002)
    assert found is not None
    assert found.rate == pytest.approx(3.4416e-4, rel=1e-4)


def test_the_refinement_keeps_to_half_a_step() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lower, upper = rng.uniform(0.1, 3, 2)
        rates, rises = (math.exp(-lower), 1.0, math.exp(upper)), rng.uniform(0.001, 1, 2)
        rate, loss = vertex(rates, (1 + rises[0], 1.0, 1 + rises[1]))
        assert -lower / 2 <= math.log(rate) <= upper / 2
        assert loss <= 1


def test_the_chosen_rate_is_the_best_measured_one() -> None:
    """The vertex of the parabola is a candidate like any other."""
    start, trials = (1e-4, 3e-4, 9e-4), [Trial(1e-4, 1.2), Trial(3e-4, 1.1), Trial(9e-4, 1.16)]
    step = next_step(start, [*trials, Trial(3.44e-4, 1.098)], BASE, 0.002)
    assert (step.chosen, step.why) == (3.44e-4, "0.000344 is the best of 4 rates, 0.0001 and 0.0009 are worse")
    for measured in (1.102, 1.17, NAN):
        step = next_step(start, [*trials, Trial(3.44e-4, measured)], BASE, 0.002)
        assert (step.chosen, step.why) == (3e-4, "0.0003 is the best of 4 rates, 0.0001 and 0.0009 are worse")


def test_the_parabola_leaves_little_regret_under_noise() -> None:
    """In units of the curvature with noise .3: .24 by the best of a x3 grid, .061 by the sweep (2,000 sweeps)."""
    rng, plain, refined = np.random.default_rng(0), 0.0, 0.0
    for _ in range(200):
        best = 1e-3 * 3 ** float(rng.uniform(-0.5, 0.5))
        step, losses = swept(
            lambda rate, best=best: 1 + math.log2(rate / best) ** 2 / 10 + 0.03 * rng.normal(), first_rates(1e-3)
        )
        assert step.chosen is not None
        grid = min(first_rates(1e-3), key=lambda rate: losses[rate])
        plain += math.log2(grid / best) ** 2 / 200
        refined += math.log2(step.chosen / best) ** 2 / 200
    assert refined < 0.4 * plain


@pytest.mark.parametrize("start", [(), (0.0,), (1e-3, -1e-3), (NAN,), (math.inf,)])
def test_rates_that_are_none_are_refused(start: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="learning_rates must be positive numbers, at least one"):
        next_step(start, [])


def test_only_what_is_far_worse_is_given_up_and_no_neighbour_of_the_best() -> None:
    losses = {1e-5: 1.2, 1e-4: 1.05, 1e-3: 1.0, 1e-2: 1.5, 1e-1: NAN}
    assert given_up(losses) == [1e-5, 1e-1]
    assert given_up(losses | {1e-5: 1.02}) == [1e-1]
    assert given_up({}) == []


def test_rows_are_halved_by_what_is_in_them() -> None:
    rows = [f"row {number}" for number in range(1000)]
    chosen = selection_rows(rows)
    assert 440 <= chosen.sum() <= 560
    assert (selection_rows(rows[::-1]) == chosen[::-1]).all()
    assert (selection_rows([row.encode() for row in rows]) == chosen).all()
