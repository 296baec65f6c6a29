"""Random labels, of which the bits are known: what low-rank updates store, and whether the needed rank is enough."""

from __future__ import annotations

import pytest

from benchmarks.capacity import needed, store_at_load, store_in_adapters

STEPS = 1500


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 8])
def test_two_bits_for_each_parameter_are_stored_and_four_are_not(rank: int) -> None:
    assert store_at_load(rank, 2.0, seeds=2, steps=STEPS).min() >= 0.98
    # On average: single seeds of rank 2 have stored up to 74 %.
    assert store_at_load(rank, 4.0, seeds=4, steps=STEPS).mean() <= 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "rank"), [(60, 4), (120, 8)])
def test_adapters_of_the_needed_rank_store_everything(rows: int, rank: int) -> None:
    for seed in range(2):
        assert needed(rows, seed) == rank
        assert store_in_adapters(rows, seed, rank, STEPS) >= 0.98
    # The rank below is over the bound, which is half of what is possible: it may be enough or not.
    assert store_in_adapters(rows, 0, rank // 4, STEPS) < 0.9
